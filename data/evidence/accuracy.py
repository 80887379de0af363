"""The paper's task tables in kind: accuracy and perplexity of a teacher, of the rounded teacher, and
of its students at 4 and 2 bits. With --data a text takes the place of the task.

    python -m data.evidence.accuracy --task sst2 --seed 0    # one more seed of the students
    python -m data.evidence.accuracy draw                    # all rows as tables

fills accuracy-SEED.json. It may be stopped and started again: rows of the same teacher and setting
stay. Seeds share their teacher, which the first one trains: start the others after that."""

import collections
import copy
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import train_small
import tsld
from data.evidence.figures import sure_share
from data.evidence.regimes import mean_and_spread
from data.evidence.table import FOLDER, where_and_when
from data.files import read_json
from tsld import TrainConfig

BITS = (4, 2)
# Loss; the ground truth's weight in TSLD, and its τ: the paper's, or None for no token scale. The
# authors run τ = 10 with the weight 1/4. The last two let the token scale do more.
STUDENTS = (
    ("logit", 0.0, 10.0),
    ("logit_gt", 0.0, 10.0),
    ("tsld", 0.0, 10.0),
    ("tsld", 0.25, 10.0),
    ("tsld", 0.25, None),
    ("tsld", 0.0, 2.0),
    ("tsld", 0.0, 5.0),
)
TAKES = {"task", "data", "model", "seed", "teacher-steps", "steps", "student-tokens", "batch-size"}
TAKES |= {"block-size", "granularity", "out", "device", "dtype"}


def main(argv):
    if argv == ["draw"]:
        return draw()
    about = "The paper's task tables in kind, to data/evidence/accuracy-SEED.json."
    args = train_small.parse(argv, TAKES, about, model="tiny", out="out/accuracy")
    seed, args.seed, args.resume = args.seed, 0, True  # the teacher's is 0
    setup, path = train_small.set_up(args), FOLDER / f"accuracy-{seed}.json"
    rows, teacher = read_json(path, []), train_small.train_teacher(setup)
    of = {"task": Path(setup.corpus).name, "model": Path(setup.source.name).name, "seed": seed}
    of |= {"granularity": args.granularity}
    of |= {"teacher": train_small.fingerprint(teacher.parameters())}
    of |= {"teacher_steps": setup.teacher.steps}
    of |= {"student_tokens": len(setup.tokens["student"]), "steps": setup.student.steps}
    wanted = [
        of | {"loss": x, "gt_weight": w, "bits": b, "config": config_of(setup, x, w, t, b, seed)}
        for b in BITS
        for x, w, t in STUDENTS
    ]
    wanted = [row for row in wanted if not any(row.items() <= there.items() for there in rows)]
    if not wanted:
        return draw()
    known = {"teacher": train_small.score(setup, teacher)["valid"]}
    if not args.task:  # how well it knows its own text
        own = train_small.score(setup, teacher, ["student"])["student"]
        known["teacher"]["train_ppl"] = own["ppl"]
        known["teacher"]["sure"] = sure_share(setup, teacher, "student")
    frozen = train_small.frozen_teacher(setup, teacher, {"valid": known["teacher"]})
    for number, row in enumerate(wanted, 1):
        bits = row["bits"]
        config = TrainConfig(**row["config"])
        config.temperature = config.temperature or math.inf
        mix = f"{config.loss}, τ {config.temperature}, ground truth · {config.gt_weight}"
        print(f"{number} of {len(wanted)}: {bits} bits, {mix}", flush=True)
        student = tsld.quantize_model(copy.deepcopy(teacher), bits, args.granularity)
        if bits not in known:
            known[bits] = train_small.score(setup, student)["valid"]
        name = f"{of['task']}-seed-{seed}"
        _, scores = train_small.train_student(setup, student, config, frozen, name)
        for file in Path(args.out).glob(f"student-{name}.*pt"):
            file.unlink(missing_ok=True)  # its row is all that is needed
        found = {"teacher": known["teacher"], "rounded": known[bits], "student": scores["valid"]}
        measured = {f"{who}_{unit}": x for who in found for unit, x in found[who].items()}
        # Read again: another task may have added to the file.
        rows = [*read_json(path, []), row | measured | where_and_when("accuracy")]
        train_small.write_text(path, json.dumps(rows, indent=1) + "\n")
    draw()


def config_of(setup, loss, gt_weight, temperature, bits, seed):
    """A student's configuration as JSON gives it back; it has no ∞, and None stands for it."""
    config = replace(setup.student, loss=loss, gt_weight=gt_weight, seed=seed)
    config.lr = train_small.student_lr(setup.source.preset, bits)
    return asdict(config) | {"betas": list(config.betas), "temperature": temperature}


def draw():
    """Prints a table of each task and model, its seeds averaged."""
    files = sorted(FOLDER.glob("accuracy-*.json"))
    tables = collections.defaultdict(list)
    for row in (row for file in files for row in read_json(file, [])):
        key = "task model granularity teacher_steps steps teacher student_tokens".split()
        sizes = row["config"]["batch_size"], row["config"]["block_size"], row["config"]["dtype"]
        tables[*(row[name] for name in key), *sizes].append(row)
    for (task, model, granularity, teacher_steps, steps, *_), rows in tables.items():
        units = [key[8:] for key in rows[0] if key.startswith("rounded_")]
        print(f"\n{task}, {model}, a scale per {granularity}, {teacher_steps} and {steps} steps")
        if "teacher_train_ppl" in rows[0]:
            own, sure = rows[0]["teacher_train_ppl"], rows[0]["teacher_sure"]
            print(f"the teacher's perplexity on its own text: {own:.2f}; it is sure of {sure:.1%}")
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
            for loss, weight, t in STUDENTS:
                mix = {"loss": loss, "gt_weight": weight}
                of_mix = [row for row in of_bits if mix.items() <= row.items()]
                same = [row for row in of_mix if row["config"]["temperature"] == t]
                if loss == "tsld":  # without its token scale it is logit distillation
                    loss = f"tsld, τ {t:g}" if t else "logit"
                name = f"{loss} + ground truth · {weight}" if weight else loss
                print_row(bits, name, same, "student", units)


def print_row(bits, name, rows, who, units):
    if rows:
        cells = [
            mean_and_spread(rows, f"{who}_{unit}", 3 if unit == "ppl" else 4) for unit in units
        ]
        print(f"| {bits} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
