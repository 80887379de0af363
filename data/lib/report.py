"""The numbers of the page that a run leaves. page.py makes the page of them."""

import math

import torch

import tsld
from data.lib import transcript
from data.lib.checks import quantized_copy
from data.lib.origin import how_it_was_made
from data.lib.page import FORMAT, PAPERS
from data.lib.resumable import first_blocks, kl_to_teacher

READ = 4096  # tokens of the validation text that the models are compared on
SHOWN = 256  # most tokens that are shown one by one
CORNER = 32  # rows and columns of a matrix that are shown one by one
PARTS = 8  # bins of a histogram from 0 to Δ
MOST = 32  # of them from 0 to α


@torch.no_grad()
def gather(setup, models, paths, results):
    """The numbers of the page, in plain values.

    models: name -> the teacher, what rounding made of it, and the last student, all on
    the device. paths: name -> checkpoint, of all students. results: of results.json."""
    teacher, rounded, student = models.values()
    block_size, text = setup.student.block_size, setup.tokens["valid"]
    blocks = max(1, READ // block_size)
    ids = first_blocks(text[:-1], block_size, blocks).to(setup.device)
    targets = first_blocks(text[1:], block_size, blocks).to(setup.device)

    # All students start as the rounded teacher. mmap reads what is looked at alone.
    watched = first_blocks(text, block_size)
    start = kl_to_teacher(rounded, teacher, watched)
    curves = {}
    for config, path in zip(setup.students.values(), paths.values(), strict=True):
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        curves[transcript.describe(config)] = [[0, start], *state["curve"]]

    return {
        "format": FORMAT,
        "results": results,
        "sequence": look_at_sequence(setup, models, ids[:1], targets[:1]),
        "curves": curves,
        "watched": watched.numel(),
        "sequences": len(ids),
        "rounded": kl_by_position(rounded, teacher, ids, targets),
        "student": kl_by_position(student, teacher, ids, targets),
        "matrix": look_at_matrix(setup.args, teacher, state["model"]),
        "texts": transcript.texts_of(setup, models),
        "made": how_it_was_made(setup, teacher),
    }


def look_at_sequence(setup, models, ids, targets):
    """The tokens of one sequence, how they count, and what each model predicts. ids,
    targets: int64 (1, T)."""
    logits = [model(ids) for model in models.values()]  # each (1, T, V)
    ce_teacher = tsld.per_token_terms(logits[0], logits[0], targets).ce_teacher

    # This run's temperature, or the paper's where its loss has none.
    scaled = [c.temperature for c in setup.students.values() if c.loss == "tsld"]
    temperature = scaled[-1] if scaled else PAPERS

    def text_of(token):
        """Bytes that are only a part of a character are spelled as \\x and digits."""
        content = setup.source.tokenizer.decode_bytes([token])
        return content.decode("utf-8", "backslashreplace")

    return {
        "lead": text_of(ids[0, 0].item()),
        "tokens": [text_of(token) for token in targets[0, :SHOWN].tolist()],
        "ce_teacher": ce_teacher[0].tolist(),
        "temperature": str(temperature),
        "weights": tsld.token_scale(ce_teacher, temperature)[0].tolist(),
        "models": [predictions(each, logits[0], targets, text_of) for each in logits],
    }


def predictions(logits, teacher_logits, targets, text_of):
    """For each token of a sequence that is shown: the probability of the true one, of
    the teacher's likeliest, the likeliest ones, and the distance to the teacher."""
    terms = tsld.per_token_terms(logits, teacher_logits, targets)
    p = logits[0, :SHOWN].float().softmax(-1)
    expected = teacher_logits[0, :SHOWN].argmax(-1, keepdim=True)
    likeliest = p.topk(min(3, p.shape[-1]))

    return {
        "true": (-terms.ce_student[0, :SHOWN]).exp().tolist(),
        "expected": p.gather(1, expected)[:, 0].tolist(),
        "guesses": [[text_of(t) for t in row] for row in likeliest.indices.tolist()],
        "shares": likeliest.values.tolist(),
        "kl": kl(logits, teacher_logits, targets)[0, :SHOWN].tolist(),
    }


def kl(logits, teacher_logits, targets):
    """KL(teacher ‖ model) of each token, (B, T), in nats: kd above its floor."""
    floor = tsld.per_token_terms(teacher_logits, teacher_logits, targets).kd
    return tsld.per_token_terms(logits, teacher_logits, targets).kd - floor


def kl_by_position(model, teacher, ids, targets):
    """The mean over the sequences. ids, targets: (B, T) -> a list of T."""
    rows = zip(ids.split(1), targets.split(1))
    distances = [kl(model(row), teacher(row), y) for row, y in rows]  # each (1, T)
    return torch.cat(distances).mean(dim=0).tolist()


def look_at_matrix(args, teacher, trained):
    """The first ternary matrix before and after training; None with 4 bits. trained: a
    student's full-precision weights, by name."""
    if args.bits != 2:
        return None

    student = quantized_copy(teacher, 2, args.granularity, args.model)
    name = next(n for n, m in student.named_modules() if type(m) is tsld.QuantLinear)
    before = teacher.get_submodule(name).weight.float().cpu()
    after = trained[f"{name}.weight"].float()

    return {
        "name": name,
        "shape": [*before.shape],
        "granularity": args.granularity,
        "before": look_at_weights(before, before, args.granularity),
        "after": look_at_weights(after, before, args.granularity),
    }


def look_at_weights(w, first, granularity):
    """A matrix (out, in): a histogram of the weights of each code, and of those that
    had another code at first, in bins that begin at 0 and Δ."""
    codes, scale = tsld.ternarize(w, granularity)
    moved = codes != tsld.ternarize(first, granularity)[0]
    largest = (w.abs() * (codes == 0)).amax(dim=1)  # in each row, of what becomes 0
    delta = (largest.max() if granularity == "tensor" else largest.mean()).item()
    alpha = scale.mean().item()

    # What is larger than the limit stands in the last bin.
    width = max(delta / PARTS, alpha / MOST) or 1.0
    bins = math.ceil(3 * alpha / width) + 1
    limit = bins * width
    kinds = (codes < 0, codes == 0, codes > 0, moved)
    parts = [w[kind].clamp(-limit, limit) for kind in kinds]
    *counts, of_moved = [part.histc(2 * bins, -limit, limit).tolist() for part in parts]

    numbers = {"threshold": delta, "scale": alpha, "limit": limit}
    numbers |= {"counts": counts, "moved": of_moved}
    return numbers | {"corner": codes[:CORNER, :CORNER].tolist()}
