"""What takes a GPU, in one run: speed and memory of training, of the packed product and of decoding
(minutes), then the paper's experiment on a pretrained model (hours).

    python -m data.evidence.gpu --model FOLDER     # a model of transformers, such as SmolLM2-135M
    python -m data.evidence.gpu --model FOLDER --device cpu --steps 2    # a dry run

fills gpu.json in --out, row by row. It may be stopped and started again: rows that are there stay.
On a CPU a dry run shows that every part works: its training steps are those of a minute model, its
rows say "cpu"."""

import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import train_small
import tsld
from data.evidence import bench
from data.evidence.table import where_and_when
from data.files import read_json
from tsld import GPT, GPTConfig, TrainConfig

# bfloat16 products of dense matrices, per second: the denominator of the utilisation.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SHAPES = {"GPT-2 small": GPTConfig(), "GPT-2 medium": GPTConfig(1024, 50257, 24, 16, 1024)}
DRY = {"minute": GPTConfig(512, 512, 2, 2, 64)}
# The paper's schedule: 3 epochs of the teacher, then the student at batch 4 x 512, rate 1e-4.
STUDENTS = [("logit", 0.0), ("logit_gt", 0.0), ("tsld", 0.0), ("tsld", 0.25), ("l2l", 0.0)]
EPOCHS = 30
TAKES = {"model", "data", "device", "dtype", "compile", "steps", "out", "seed", "bits"}


def main(argv):
    about = "What takes a GPU, to data/evidence/gpu.json."
    args = train_small.parse(argv, TAKES, about, data="ptb", out="out/gpu", loss="all")
    args.resume, path = True, train_small.check_folder(args.out) / "gpu.json"
    rows = read_json(path, [])
    device = train_small.choose_device(args.device)
    parts = [("step", *row) for row in step_rows(args)]
    parts += [("decoding",), *(("student", *student) for student in STUDENTS)]
    setup = teacher = None
    for part in parts:
        about = {"part": " ".join(map(str, part)), "device": device.type}
        about |= {"steps": args.steps, "bits": args.bits, "seed": args.seed}
        if any(about.items() <= row.items() for row in rows):
            continue
        print(" ".join(map(str, part)), flush=True)
        if part[0] == "step":
            row = measure_step(device, args.steps or 20, *part[1:])
        elif part[0] == "decoding":
            row = measure_decoding(device)
        else:
            if setup is None:
                setup = train_small.set_up(args)
                teacher = train_small.train_teacher(setup)
            row = measure_student(setup, teacher, *part[1:])
        rows.append(about | row | where_and_when("gpu"))
        print(row, flush=True)
        train_small.write_text(path, json.dumps(rows, indent=1) + "\n")


def step_rows(args):
    """Shape, loss, dtype, compiled."""
    device = train_small.choose_device(args.device)
    fast, names = train_small.default_dtype(device), DRY if device.type == "cpu" else SHAPES
    rows = [(name, loss, fast, False) for name in names for loss in tsld.LOSSES]
    return rows + [(name, "tsld", fast, True) for name in names]


def measure_step(device, steps, name, loss, dtype, compiled, batch=4, length=512):
    """Tokens per second, peak memory in bytes, and the share of the device's products that the
    student's and the teacher's take: 6 and 2 per parameter and token."""
    torch.manual_seed(0)
    teacher = GPT((SHAPES | DRY)[name]).to(device)
    student = tsld.quantize_model(copy.deepcopy(teacher))
    if compiled:
        for block in (*student.h, *teacher.h):
            block.compile()
    config = TrainConfig(
        loss=loss, steps=steps + 1, batch_size=batch, block_size=length, dtype=dtype
    )
    tokens = torch.randint(teacher.config.vocab_size, (10 * length,))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step, _ in tsld.train(student, tokens, config, None if loss == "gt" else teacher):
        if step == 1:
            began = time.perf_counter()  # the first step compiles, and makes the optimizer's state
    seconds = (time.perf_counter() - began) / steps
    parameters = sum(p.numel() for p in teacher.parameters())
    flops = (6 if loss == "gt" else 8) * parameters * batch * length
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((PEAK_FLOPS[kind] for kind in PEAK_FLOPS if kind in gpu), None)
    return {
        "tokens_per_second": batch * length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else bench.peak_memory(),
        "utilisation": peak and flops / seconds / peak,
    }


def measure_decoding(device):
    """The packed product and decoding; bench prints them."""
    bench.bench(device)
    return {}


def measure_student(setup, teacher, loss, gt_weight):
    """The paper's experiment: perplexities of the teacher, rounded, and of one student."""
    scores = {"teacher": train_small.score(setup, teacher)}
    frozen = train_small.frozen_teacher(setup, teacher, scores["teacher"])
    student = tsld.quantize_model(copy.deepcopy(teacher), setup.args.bits)
    scores["rounded"] = train_small.score(setup, student)
    config = replace(setup.student, loss=loss, gt_weight=gt_weight, temperature=10.0)
    tokens = len(setup.tokens["student"])
    config.steps = setup.args.steps or EPOCHS * tokens // (config.batch_size * config.block_size)
    name = f"{loss}-{gt_weight}"
    seconds, scores["student"] = train_small.train_student(setup, student, config, frozen, name)
    for file in Path(setup.args.out).glob(f"student-{name}.*pt"):
        file.unlink(missing_ok=True)  # its row is all that is needed
    measured = {f"{who}_{part}_ppl": x["ppl"] for who in scores for part, x in scores[who].items()}
    return measured | {"seconds": seconds}


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
