"""What a packed student is for: it writes text, and other programs open it."""

import copy
from pathlib import Path

import torch

from data.lib import fast, files, hf, int4
from data.lib.checkpoints import difference
from data.lib.errors import UserError
from data.lib.exports import check_target
from data.lib.published import dequantized_state
from data.lib.transcript import SAMPLING
from data.texts import load_tokenizer
from tsld import CheckpointError, config_of

LONGEST = 1024  # tokens of a text, where the model has no shorter limit


def load_student(path, presets, source=None):
    """A packed student, of 2 or 4 bits, and its tokenizer. source: the Source that it
    was made from; without one it is a GPT with the vocabulary of a preset. Raises
    UserError if the file is of another model, or no preset has its vocabulary."""
    if source is not None:
        return load_weights(path, into=source.model), source.tokenizer

    model = load_weights(path)
    vocab_size = model.config.vocab_size
    for preset in presets.values():
        if preset.gpt.vocab_size == vocab_size:
            return model, load_tokenizer(preset.tokenizer)
    raise UserError(f"no tokenizer has the {vocab_size} tokens of {path}")


def load_weights(path, into=None):
    """The model of a packed file. Raises UserError if it takes another one to fill."""
    content = files.read_checked(path)
    is_dict = isinstance(content, dict)
    config = content.get("config") if is_dict else None

    if into is None and isinstance(config, dict) and "architecture" in config:
        words = f"{path} is a student of a {config['architecture']!s:.80}"
        raise UserError(f"{words}: name its teacher's folder or name with --model")
    if isinstance(config, dict) and into is not None and config != config_of(into):
        words = difference("configuration", config, config_of(into))
        raise CheckpointError(f"{path} is of another model: its {words}")

    # Files of earlier versions of this program say nothing about that.
    made_with = content.get("tokenizer") if is_dict else None
    wanted = getattr(into, "tokenizer_fingerprint", made_with)
    if made_with is not None and made_with != wanted:
        words = f"{made_with!s:.16}, not {wanted}"
        raise CheckpointError(
            f"{path} is of another tokenizer: its fingerprint is {words}"
        )

    if is_dict and content.get("format") == int4.FORMAT:
        return int4.load_int4(path, content, into)
    return files.load_packed(path, into)


def write_text(model, tokenizer, prompt, seed):
    """Prints the prompt and its continuation, as it comes, until the text ends or the
    block is full. Raises UserError if the prompt is empty or fills it."""
    ids = tokenizer.encode_ordinary(prompt)
    block_size = min(model.config.block_size, LONGEST)
    if not 0 < len(ids) < block_size:
        sizes = f"--prompt has {len(ids)} tokens, the model's block {block_size}"
        raise UserError(f"{sizes}: it takes 1 to {block_size - 1} tokens")

    model = fast.speed_up(model)
    device = next(model.parameters()).device
    stream = model.stream(
        torch.tensor([ids], device=device), block_size - len(ids), **SAMPLING
    )

    print(prompt, end="", flush=True)
    shown = tokenizer.decode(ids)
    ends = end_tokens(model, tokenizer)
    torch.manual_seed(seed)
    for new in stream:
        if new.item() in ends:
            break

        # The first bytes of a character wait for its others.
        ids.append(new.item())
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def end_tokens(model, tokenizer):
    """The tokens that end a text. A model of transformers may name several."""
    ends = {tokenizer.end_of_text}
    if isinstance(model, hf.CausalModel):
        settings = getattr(model.inner, "generation_config", None)
        named = getattr(settings, "eos_token_id", None)
        ends |= {named} if isinstance(named, int) else set(named or ())
    return ends


def plain_copies(models, device):
    """Copies, on the device, that compute the same with full-precision layers, which is
    many times faster than with packed ones. models: name -> model, the first of them
    the teacher, whose layers are such."""
    teacher = next(iter(models.values()))
    copies = {}
    for name, model in models.items():
        copies[name] = copy.deepcopy(teacher).eval()
        copies[name].load_state_dict(dequantized_state(model))
        copies[name].to(device)
    return copies


def export(words, presets, model=None, load_source=None):
    """Writes a packed student as transformers opens it. words: file, folder, and
    "float16" if its numbers are to take half of the space. model: what --model named,
    which load_source() loads. Raises UserError."""
    is_right = len(words) == 2 or (len(words) == 3 and words[2] == "float16")
    if not is_right or words[1] == "":
        raise UserError("--export takes FILE FOLDER, and after them float16 or nothing")

    # Before anything is loaded.
    file, folder = words[:2]
    check_target(folder)
    if model and is_same_folder(folder, model):
        raise UserError(f"--export: {folder} is --model's own: name a new folder")

    source = load_source() if model else None
    student, tokenizer = load_student(file, presets, source)
    dtype = torch.float16 if len(words) == 3 else torch.float32
    try:
        hf.export(student, tokenizer, folder, dtype)
    except ValueError as error:
        raise UserError(f"--export: {error}") from None
    print(f"{folder}: {file}, its weights in {dtype}")


def is_same_folder(one, other):
    one, other = Path(one), Path(other)
    return one.exists() and other.exists() and one.samefile(other)
