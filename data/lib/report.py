"""The numbers of the page that a run leaves. page.py makes the page of them."""

import copy
import json

import torch

import tsld
from data.lib import transcript
from data.lib.origin import how_it_was_made
from data.lib.page import FORMAT, PAPERS
from data.lib.resumable import first_blocks, kl_to_teacher

READ = 4096  # tokens of the validation text that the models are compared on
SHOWN = 256  # most tokens that are shown one by one
CORNER = 32  # rows and columns of a matrix that are shown one by one
BINS = 60  # of a histogram


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
    start = kl_to_teacher(rounded, teacher, first_blocks(text, block_size))
    curves = {}
    for config, path in zip(setup.students.values(), paths.values(), strict=True):
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        curves[transcript.describe(config)] = [[0, start], *state["curve"]]

    numbers = {
        "format": FORMAT,
        "results": results,
        "lesson": transcript.lesson_of_labels(results[-1]),
        "sequence": look_at_sequence(setup, models, ids[:1], targets[:1]),
        "curves": curves,
        "sequences": len(ids),
        "rounded": kl_by_position(rounded, teacher, ids, targets),
        "student": kl_by_position(student, teacher, ids, targets),
        "matrix": look_at_matrix(setup.args, teacher, state["model"]),
        "texts": transcript.texts_of(setup, models),
        "made": how_it_was_made(setup, teacher),
    }

    # Six digits are enough. JSON has no infinity.
    return json.loads(
        json.dumps(numbers),
        parse_float=lambda digits: float(f"{float(digits):.6g}"),
        parse_constant=lambda name: 1e300,
    )


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
        "is_scaled": bool(scaled),
        "temperature": str(temperature),
        "weights": tsld.token_scale(ce_teacher, temperature)[0].tolist(),
        "models": [predictions(each, logits[0], targets, text_of) for each in logits],
    }


def predictions(logits, teacher_logits, targets, text_of):
    """For each token of a sequence that is shown: the probability of the true one, the
    likeliest ones, and the distance to the teacher."""
    terms = tsld.per_token_terms(logits, teacher_logits, targets)
    likeliest = logits[0, :SHOWN].float().softmax(-1).topk(min(3, logits.shape[-1]))

    return {
        "true": (-terms.ce_student[0, :SHOWN]).exp().tolist(),
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

    layers = tsld.quantize_model(copy.deepcopy(teacher)).named_modules()
    name = next(name for name, m in layers if isinstance(m, tsld.QuantLinear))
    before = teacher.get_submodule(name).weight.float().cpu()
    after = trained[f"{name}.weight"].float()
    codes, later = (tsld.ternarize(w, args.granularity)[0] for w in (before, after))

    return {
        "name": name,
        "shape": [*before.shape],
        "granularity": args.granularity,
        "changed": (codes != later).float().mean().item(),
        "before": look_at_weights(before, args.granularity),
        "after": look_at_weights(after, args.granularity),
    }


def look_at_weights(w, granularity):
    """A matrix (out, in): its histogram, where its codes change, the share of each."""
    codes, scale = tsld.ternarize(w, granularity)
    largest = (w.abs() * (codes == 0)).amax(dim=1)  # in each row, of what becomes 0
    threshold = largest.max() if granularity == "tensor" else largest.mean()
    limit = 3 * scale.mean().item()  # what is larger stands in the last bin

    return {
        "limit": limit,
        "counts": w.clamp(-limit, limit).histc(BINS, -limit, limit).tolist(),
        "threshold": threshold.item(),
        "scale": scale.mean().item(),
        "shares": [(codes == code).float().mean().item() for code in (-1, 0, 1)],
        "corner": codes[:CORNER, :CORNER].tolist(),
    }
