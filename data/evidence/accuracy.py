"""The paper's task tables in kind: accuracy and perplexity of a teacher, of the rounded teacher, and
of its students at 2 and 4 bits.

    python -m data.evidence.accuracy --task sst2 --seed 0    # one more seed of the students
    python -m data.evidence.accuracy draw                    # all rows as tables

fills accuracy-SEED.json. It may be stopped and started again: rows that are there stay. Seeds share
their teacher: the first one trains it, and the others find it in --out."""

import collections
import copy
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import train_small
import tsld
from data.evidence.regimes import mean_and_spread
from data.evidence.table import FOLDER, where_and_when
from data.files import read_json

BITS = (2, 4)
# The loss, and the weight of the ground truth that TSLD adds; 1/4 is how the authors run it.
STUDENTS = (("logit", 0.0), ("logit_gt", 0.0), ("tsld", 0.0), ("tsld", 0.25))
TAKES = {"task", "model", "seed", "teacher-steps", "steps", "student-tokens", "batch-size"}
TAKES |= {"out", "device", "dtype"}


def main(argv):
    if argv == ["draw"]:
        return draw()
    about = "The paper's task tables in kind, to data/evidence/accuracy-SEED.json."
    args = train_small.parse(argv, TAKES, about, task="sst2", model="tiny", out="out/accuracy")
    seed, args.seed, args.resume = args.seed, 0, True  # the teacher's is 0
    setup, path = train_small.set_up(args), FOLDER / f"accuracy-{seed}.json"
    rows, teacher = read_json(path, []), train_small.train_teacher(setup)
    of = {"task": args.task, "model": Path(setup.source.name).name, "seed": seed}
    of |= {"teacher_steps": setup.teacher.steps, "steps": setup.student.steps}
    wanted = [of | {"bits": b, "loss": x, "gt_weight": w} for x, w in STUDENTS for b in BITS]
    wanted = [row for row in wanted if not any(row.items() <= there.items() for there in rows)]
    known = {"teacher": train_small.score(setup, teacher)["valid"]}
    frozen = train_small.frozen_teacher(setup, teacher, {"valid": known["teacher"]})
    for number, row in enumerate(wanted, 1):
        print(f"{number} of {len(wanted)}: {row}", flush=True)
        student = tsld.quantize_model(copy.deepcopy(teacher), row["bits"])
        if row["bits"] not in known:
            known[row["bits"]] = train_small.score(setup, student)["valid"]
        config = replace(setup.student, loss=row["loss"], seed=seed, gt_weight=row["gt_weight"])
        config.temperature = tsld.TrainConfig.temperature  # the paper's
        config.lr = train_small.student_lr(setup.source.preset, row["bits"])
        name = f"{args.task}-seed-{seed}"
        _, scores = train_small.train_student(setup, student, config, frozen, name)
        for file in Path(args.out).glob(f"student-{name}.*pt"):
            file.unlink()  # its row is all that is needed
        found = {"teacher": known["teacher"], "rounded": known[row["bits"]]} | {
            "student": scores["valid"]
        }
        measured = {f"{who}_{unit}": x for who in found for unit, x in found[who].items()}
        rows.append(row | measured | {"config": asdict(config)} | where_and_when("accuracy"))
        train_small.write_text(path, json.dumps(rows, indent=1) + "\n")
    draw()


def draw():
    """Prints a table of each task and model, its seeds averaged."""
    files = sorted(FOLDER.glob("accuracy-*.json"))
    tables = collections.defaultdict(list)
    for row in (row for file in files for row in read_json(file, [])):
        tables[row["task"], row["model"], row["teacher_steps"], row["steps"]].append(row)
    for (task, model, teacher_steps, steps), rows in tables.items():
        units = [key[8:] for key in rows[0] if key.startswith("student_")]
        print(f"\n{task}, {model}, teacher {teacher_steps} steps, students {steps}")
        print(
            "\n| bits | method | "
            + " | ".join(units)
            + " |"
            + "\n| --- | --- "
            + "| --- " * len(units)
            + "|"
        )
        print_row(32, "teacher", rows, "teacher", units)
        for bits in BITS:
            of_bits = [row for row in rows if row["bits"] == bits]
            print_row(bits, "rounded", of_bits, "rounded", units)
            for loss, weight in STUDENTS:
                same = [r for r in of_bits if (r["loss"], r["gt_weight"]) == (loss, weight)]
                name = f"{loss} + ground truth · {weight}" if weight else loss
                print_row(bits, name, same, "student", units)


def print_row(bits, name, rows, who, units):
    if rows:
        cells = [
            mean_and_spread(rows, f"{who}_{unit}", 2 if unit == "ppl" else 4) for unit in units
        ]
        print(f"| {bits} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
