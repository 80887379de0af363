"""What a model scores on a text or on the examples of a task, and what it weighs."""

import math
import sys

import torch

import tsld
from data import tasks
from data.lib.errors import UserError
from data.lib.files import save_packed
from data.lib.int4 import save_int4
from data.lib.processes import first_process_first, processes
from data.lib.progress import show_progress
from tsld import QuantLinear


def score_text(model, ids, block_size, n_bytes=None):
    """{"ppl": perplexity per token, "bpb": bits per byte} of a text. ids: int64 (n,).
    n_bytes: of all tokens but the first; where they are not counted there is no "bpb".
    Raises TrainingDiverged if the perplexity is not finite."""
    nats = tsld.evaluate(model, ids, block_size)
    return units(nats, len(ids) - 1, n_bytes)


def score_task(model, tokenizer, examples, block_size):
    """The same of a task's right answers, together with its accuracies."""
    nats, n_tokens, n_bytes, n_cut, accuracies = tasks.evaluate_task(
        model, tokenizer, examples, block_size, show_progress
    )
    cut = f", {n_cut} of them cut to a block of {block_size}" if n_cut else ""
    show_progress(f"scored {len(examples)} examples{cut}", last=True)
    return units(nats / n_tokens, n_tokens, n_bytes) | accuracies


def perplexity(nats):
    """exp(nats), infinite where it is too large for a float."""
    return torch.tensor(nats).exp().item()


def units(nats, n_tokens, n_bytes):
    """nats: the mean over the predicted tokens. n_tokens, n_bytes: how many these are,
    and the bytes that they stand for; None where nobody has counted them."""
    if not nats < math.log(sys.float_info.max):
        raise tsld.TrainingDiverged(f"the text costs {nats} nats per token")

    scores = {"ppl": math.exp(nats)}
    if n_bytes is not None:
        scores["bpb"] = tsld.bits_per_byte(nats, n_tokens, n_bytes)
    return scores


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def count_ternary(model):
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return sum(layer.weight.numel() for layer in layers)


def pack(model, path):
    """Saves a quantized model, and packs one of 2 bits in place. Returns the bytes of
    the file and of the codes in it. Raises UserError if a value cannot be stored."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    bits = layers[0].bits
    codes_per_byte = 8 // bits
    sizes = [m.out_features * -(-m.in_features // codes_per_byte) for m in layers]

    save = save_int4
    if bits == 2:
        save = save_packed
        tsld.pack_model(model)

    with first_process_first():
        if processes()[0] == 0:
            try:
                save(path, model)
            except ValueError as error:  # float16 does not hold an embedding, say
                raise UserError(f"{path} cannot be written: {error}") from None
    return {"bytes_packed": path.stat().st_size, "linear_bytes_packed": sum(sizes)}
