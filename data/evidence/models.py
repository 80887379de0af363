"""What several rooms do with models: make students of a teacher, round it without
training, and ask how sure it is of a text."""

import copy
import math
from dataclasses import asdict
from pathlib import Path

import torch

import train_small
import tsld
from data.evidence.table1 import baselines
from data.lib.errors import UserError
from tsld import TrainConfig

SURE = 0.5  # a likeliest token above this is likelier than all others together
CALIBRATION_BLOCKS = 64  # of the students' text, for OPTQ and AWQ


def check_model(args):
    """Raises UserError if --model is not a GPT of this program, into which OPTQ, AWQ
    and the figures look. It is called before anything is trained."""
    if args.model is not None and args.model not in train_small.PRESETS:
        names = ", ".join(train_small.PRESETS)
        raise UserError(f"--model {args.model}: it takes one of {names}")


def untrained(setup, teacher, method):
    """The teacher itself, or what a method without training makes of it."""
    if method == "teacher":
        return teacher
    if method == "ternarized":
        return tsld.quantize_model(copy.deepcopy(teacher), 2, "tensor")
    if method == "round-to-nearest":
        return tsld.quantize_model(copy.deepcopy(teacher), 4, "channel")

    T = setup.student.block_size
    text = setup.tokens["student"][: CALIBRATION_BLOCKS * T]
    blocks = text[: len(text) // T * T].view(-1, T)
    methods = {"OPTQ": baselines.optq, "AWQ": baselines.awq}

    return methods[method](teacher, blocks)


def distil(setup, student, config, frozen, name):
    """Trains a quantized copy of the teacher in place. Returns the seconds that it took
    and the student's scores. name: of the checkpoints, which are deleted at the end: a
    row is all that is kept of a student."""
    seconds, scores = train_small.train_student(setup, student, config, frozen, name)
    for file in Path(setup.args.out).glob(f"student-{name}.*pt"):
        file.unlink(missing_ok=True)

    return seconds, scores


def as_json(config):
    """A TrainConfig as a dict that JSON gives back unchanged. JSON has no infinity:
    where there is no token scale, the temperature is None."""
    values = asdict(config)
    values["betas"] = list(config.betas)
    if math.isinf(config.temperature):
        values["temperature"] = None

    return values


def from_json(values):
    """The TrainConfig that as_json made these values of."""
    config = TrainConfig(**values)
    config.betas = tuple(config.betas)
    if config.temperature is None:
        config.temperature = math.inf

    return config


# --------------------------------------------------------------------------------------
# How sure a model is


@torch.no_grad()
def confidence(model, ids, targets):
    """The probability of the likeliest token, and the cross-entropy of the true one in
    nats, both (B, T). ids, targets: int64 (B, T)."""
    rows = max(1, 2048 // ids.shape[1])  # at a time: it bounds the logits' memory

    top = []
    cross_entropy = []
    for some_ids, some_targets in zip(ids.split(rows), targets.split(rows)):
        log_p = model(some_ids).float().log_softmax(-1)  # (b, T, V)
        top.append(log_p.amax(-1).exp())
        true = log_p.gather(-1, some_targets[..., None])  # (b, T, 1)
        cross_entropy.append(-true[..., 0])

    return torch.cat(top), torch.cat(cross_entropy)


def whole_blocks(setup, part):
    """A text's tokens in whole blocks, and the token after each: int64 (B, T) both.
    Raises UserError if the text has no whole block."""
    text = setup.tokens[part]
    T = setup.student.block_size
    B = (len(text) - 1) // T
    if B < 1:
        raise UserError(f"the {part} text has no whole block of {T} tokens")
    ids = text[: B * T].view(B, T)
    targets = text[1 : B * T + 1].view(B, T)

    return ids.to(setup.device), targets.to(setup.device)


def sure_share(setup, model, part):
    """The share of a text's tokens for which the model has a next one that it finds
    likelier than all others together."""
    ids, targets = whole_blocks(setup, part)
    top, _ = confidence(model.eval(), ids, targets)

    return (top > SURE).float().mean().item()
