"""The paper's table 1 in kind, and the ablation of the token scale: many students of one teacher.

    python -m data.evidence.table --data ptb --teacher-steps 5000

fills data/evidence/table.json. It may be stopped and started again: rows that are there, of the
same teacher and setting, stay."""

import collections
import copy
import datetime
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train_small
import tsld
from data.evidence import baselines
from data.files import read_json

FOLDER = Path(__file__).resolve().parent

# As the paper has them: post-training methods at 4 bits with a scale per channel, all others per
# tensor.
UNTRAINED = ((4, "round-to-nearest"), (4, "OPTQ"), (4, "AWQ"), (2, "ternarized"))
TRAINED = {2: ("logit", "tsld", "l2l", "logit_gt", "gt"), 4: ("logit", "tsld", "logit_gt")}
# τ and ground-truth weight of further TSLD students. τ = ∞ is logit distillation; τ = 10 is above.
ABLATION = ((1.0, 0.0), (2.0, 0.0), (5.0, 0.0), (20.0, 0.0), (10.0, 0.25), (10.0, 1.0))
SEEDS = (0, 1, 2)
TAKES = train_small.TRAIN - {"loss", "bits", "granularity", "gt-weight", "seed", "resume", "task"}


def main(argv):
    setup, path = set_up(argv), FOLDER / "table.json"
    rows = read_json(path, [])
    teacher, half = train_small.train_teacher(setup), None
    same = {"teacher": train_small.fingerprint(teacher.parameters())}  # it is its weights
    same |= {"teacher_steps": setup.teacher.steps, "student_tokens": len(setup.tokens["student"])}
    wanted = [(setting | same, config) for setting, config in wanted_rows(setup)]
    for number, (setting, config) in enumerate(wanted, 1):
        if any(setting.items() <= row.items() for row in rows):
            continue
        named = ("method", "bits", "temperature", "gt_weight", "seed")
        name = "-".join(str(setting[key]) for key in named if key in setting)
        print(f"{number} of {len(wanted)}: {name}", flush=True)
        if config is None:
            scores = train_small.score(setup, untrained(setup, teacher, setting["method"]))
        else:
            if half is None:
                exact = train_small.score(setup, teacher, ["valid"])
                half = train_small.frozen_teacher(setup, teacher, exact)
            student = tsld.quantize_model(copy.deepcopy(teacher), setting["bits"])
            _, scores = train_small.train_student(setup, student, config, half, name)
        measured = {f"{part}_{unit}": x for part in scores for unit, x in scores[part].items()}
        rows.append(setting | measured | where_and_when())
        train_small.write_text(path, json.dumps(rows, indent=1) + "\n")
        for file in Path(setup.args.out).glob(f"student-{name}.*pt"):
            file.unlink(missing_ok=True)  # its row is all that is needed
    print_results(
        [row for row in rows if any(setting.items() <= row.items() for setting, _ in wanted)]
    )


def set_up(argv):
    about = "The paper's table 1 in kind, and its ablation, to data/evidence/table.json."
    args = train_small.parse(argv, TAKES, about, steps=400)
    check_model(args)
    args.resume = True  # a student that was interrupted
    return train_small.set_up(args)


def check_model(args):
    """OPTQ, AWQ and the figures look into our GPT; said before anything is trained."""
    if args.model not in (None, *train_small.PRESETS):
        known = ", ".join(train_small.PRESETS)
        raise train_small.UserError(f"--model {args.model}: it takes one of {known}")


def wanted_rows(setup):
    """What the table is to hold: a setting, and the training configuration where there is one."""
    wanted = [
        ({"bits": bits, "method": method}, None) for bits, method in ((32, "teacher"), *UNTRAINED)
    ]
    # Where none is asked for, the paper's temperature, not the preset's.
    default = setup.args.tsld_temperature or tsld.TrainConfig.temperature, 0.0
    groups = [[(bits, loss, *default) for loss in losses] for bits, losses in TRAINED.items()]
    groups.append([(2, "tsld", *setting) for setting in ABLATION])
    students = [(seed, *student) for group in groups for seed in SEEDS for student in group]
    preset = setup.source.preset
    for seed, bits, loss, temperature, gt_weight in students:
        config = replace(
            setup.student, loss=loss, seed=seed, temperature=temperature, gt_weight=gt_weight
        )
        config.lr = setup.args.lr or train_small.student_lr(preset, bits)
        # Every field of the configuration, the pair of betas as JSON gives it back.
        setting = {"bits": bits, "method": loss, **asdict(config), "betas": list(config.betas)}
        wanted.append((setting, config))
    return wanted


def untrained(setup, teacher, method):
    """The teacher, or what a post-training method makes of it."""
    if method == "teacher":
        return teacher
    if method == "ternarized":
        return tsld.quantize_model(copy.deepcopy(teacher), 2, "tensor")
    if method == "round-to-nearest":
        return tsld.quantize_model(copy.deepcopy(teacher), 4, "channel")
    block_size = setup.student.block_size
    text = setup.tokens["student"][: 64 * block_size]  # to calibrate on
    text = text[: len(text) // block_size * block_size].view(-1, block_size)
    return {"OPTQ": baselines.optq, "AWQ": baselines.awq}[method](teacher, text)


def where_and_when(module="table"):
    """What a result needs beside it to be believed."""
    commit = "unknown"
    if shutil.which("git"):
        ask = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or commit
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None
    machine = f"{named[1] if named else platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return {
        "command": " ".join([f"python -m data.evidence.{module}", *sys.argv[1:]]),
        "commit": commit,
        "machine": f"{machine}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


MEASURES = {
    "valid_ppl": "validation perplexity",
    "valid_bpb": "bits/byte",
    "test_ppl": "test perplexity",
    "test_bpb": "bits/byte",
}


def print_results(rows):
    """Mean and spread (standard deviation over the seeds) of each setting, as Markdown."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[
            tuple(row.get(key) for key in ("bits", "method", "temperature", "gt_weight"))
        ].append(row)
    print("\n| bits | method | τ | ground truth | seeds | " + " | ".join(MEASURES.values()) + " |")
    print("| --- " * (5 + len(MEASURES)) + "|")
    for (bits, method, temperature, gt_weight), members in groups.items():
        only = (temperature, gt_weight) if method == "tsld" else ("", "")
        cells = [bits, method, *only, len(members)]
        for key in MEASURES:
            values = [row[key] for row in members]
            digits = 4 if key.endswith("bpb") else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
