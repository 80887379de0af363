"""What takes a GPU, in one run: speed and memory of training, of the packed product and
of decoding (minutes), then the paper's experiment on a pretrained model (hours).

    python -m data.evidence.speed.gpu --model FOLDER    # of transformers: SmolLM2-135M
    python -m data.evidence.speed.gpu --model FOLDER --device cpu --steps 2    # dry run

fills OUT/gpu.json, row by row. It may be stopped and started again: rows that are there
stay. The gpu.json beside this file is a copy of such a file, from the GPU that was to
be had. On a CPU a dry run shows that every part works: its training steps are those of
a minute model, its rows say "cpu"."""

import collections
import copy
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

import train_small
import tsld
from data.evidence import models, rows
from data.evidence.rows import METHODS, Table
from data.evidence.speed import decoding
from data.evidence.speed.timing import peak_memory
from data.lib.devices import choose_device, default_dtype
from data.lib.folder import check_folder
from data.lib.resumable import choose_backward
from tsld import GPT, GPTConfig, TrainConfig

ROOM = Path(__file__).resolve().parent
ABOUT = "python -m data.evidence.speed.gpu measures what takes a GPU, to OUT/gpu.json."
TAKES = {"model", "data", "device", "dtype", "compile", "steps", "out", "seed", "bits"}

# bfloat16 products of dense matrices, per second: the denominator of the utilisation.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SHAPES = {
    "GPT-2 small": GPTConfig(),
    "GPT-2 medium": GPTConfig(1024, 50257, 24, 16, 1024),
}
DRY_SHAPES = {"minute": GPTConfig(512, 512, 2, 2, 64)}

# The paper's schedule: 3 epochs of the teacher, then the student at batch 4 x 512, rate
# 1e-4. A student: the loss, and the ground truth's weight.
STUDENTS = [("logit", 0.0), ("logit_gt", 0.0), ("tsld", 0.0), ("tsld", 0.25)]
STUDENTS.append(("l2l", 0.0))
EPOCHS = 30


def main(argv):
    args = train_small.parse(argv, TAKES, ABOUT, data="ptb", out="out/gpu", loss="all")
    args.resume = True
    path = check_folder(args.out) / "gpu.json"
    device = choose_device(args.device)

    # Part to the function that measures it.
    parts = {}
    for step in step_rows(device):
        name = " ".join(map(str, ("step", *step)))
        parts[name] = partial(measure_step, device, args.steps or 20, *step)

    parts["decoding"] = partial(measure_decoding, device)
    student_of = student_measurer(args)

    for student in STUDENTS:
        name = " ".join(map(str, ("student", *student)))
        parts[name] = partial(student_of, *student)

    run = {"device": device.type, "steps": args.steps}
    run |= {"bits": args.bits, "seed": args.seed}
    wanted = [{"part": part, **run} for part in parts]

    def measure(setting):
        return parts[setting["part"]]()

    def label(setting):
        return setting["part"]

    rows.fill(path, wanted, measure, label, "speed.gpu")


# --------------------------------------------------------------------------------------
# Speed


def step_rows(device):
    """Shape, loss, dtype, compiled."""
    dtype = default_dtype(device)
    names = DRY_SHAPES if device.type == "cpu" else SHAPES
    steps = [(name, loss, dtype, False) for name in names for loss in tsld.LOSSES]

    return steps + [(name, "tsld", dtype, True) for name in names]


def measure_step(device, steps, name, loss, dtype, compiled, batch=4, length=512):
    """Tokens per second, peak memory in bytes, and the share of the device's products
    that the student's and the teacher's take: 6 and 2 per parameter and token."""
    torch.manual_seed(0)
    teacher = GPT((SHAPES | DRY_SHAPES)[name]).to(device)
    student = tsld.quantize_model(copy.deepcopy(teacher))

    if compiled:
        for block in (*student.h, *teacher.h):
            block.compile()

    config = TrainConfig(loss=loss, steps=steps + 1, batch_size=batch, dtype=dtype)
    config.block_size = length
    tokens = torch.randint(teacher.config.vocab_size, (10 * length,))
    gradients = choose_backward(student, teacher, config)
    training = tsld.train(student, tokens, config, teacher, backward=gradients)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    next(training)  # the first step compiles, and makes the optimizer's state
    began = time.perf_counter()
    for _ in training:
        pass
    tokens_per_second = steps * batch * length / (time.perf_counter() - began)

    measured = {"tokens_per_second": tokens_per_second, "peak_bytes": peak_memory()}
    measured["utilisation"] = None

    if device.type == "cuda":
        measured["peak_bytes"] = torch.cuda.max_memory_allocated()
        parameters = sum(p.numel() for p in teacher.parameters())
        flops = (6 if loss == "gt" else 8) * parameters * tokens_per_second

        for family, peak in PEAK_FLOPS.items():
            if family in torch.cuda.get_device_name():
                measured["utilisation"] = flops / peak

    return measured


def measure_decoding(device):
    """The packed product and decoding, which are printed."""
    decoding.bench(device)
    return {}


# --------------------------------------------------------------------------------------
# The paper's experiment


def student_measurer(args):
    """The function that trains and scores a student. The first one makes the
    teacher."""

    @cache
    def shared():
        setup = train_small.set_up(args)
        teacher = train_small.train_teacher(setup)
        teacher_scores = train_small.score(setup, teacher)
        frozen = train_small.frozen_teacher(setup, teacher, teacher_scores)

        return setup, teacher, teacher_scores, frozen

    def measure(loss, gt_weight):
        """Perplexities of the teacher, rounded, and of one student."""
        setup, teacher, teacher_scores, frozen = shared()
        student = tsld.quantize_model(copy.deepcopy(teacher), args.bits)
        scores = {"teacher": teacher_scores}
        scores["rounded"] = train_small.score(setup, student)

        config = replace(setup.student, loss=loss, gt_weight=gt_weight)
        config.temperature = 10.0
        tokens = len(setup.tokens["student"])
        in_step = config.batch_size * config.block_size
        config.steps = args.steps or EPOCHS * tokens // in_step
        name = f"{loss}-{gt_weight}"
        seconds, scores["student"] = models.distil(setup, student, config, frozen, name)

        measured = {}
        for model, parts in scores.items():
            measured |= {f"{model}_{part}_ppl": parts[part]["ppl"] for part in parts}
        return measured | {"seconds": seconds}

    return measure


# --------------------------------------------------------------------------------------
# The table


def table():
    """The training steps in the gpu.json beside this file."""
    cells = collections.defaultdict(dict)
    for row in rows.read_rows(ROOM, "gpu.json"):
        first, *words = row["part"].split()
        if first == "step":
            *shape, loss, _, compiled = words
            name = METHODS[loss]
            if compiled == "True":
                name += ", compiled"
            speed = f"{row['tokens_per_second']:,.0f}"
            share = f"{100 * row['utilisation']:.1f} %"
            cell = f"{speed}, {row['peak_bytes'] / 1e9:.1f}, {share}"
            cells[name][" ".join(shape)] = cell

    lines = []
    for name in cells:
        lines.append([name, *(cells[name].get(shape, "") for shape in SHAPES)])
    columns = ["tokens/s, peak GB, share of the products", *SHAPES]
    text = (
        "One NVIDIA H200, training steps in bfloat16 of 4 x 512 tokens; the share of "
        "the GPU's matrix products is against 989 TFLOP/s. The run was stopped after "
        "these rows."
    )

    return Table("A training step on a GPU", text, columns, lines)


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
