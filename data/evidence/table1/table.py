"""The paper's table 1 in kind, and the ablation of the token scale: many students of
one teacher.

    python -m data.evidence.table1.table --data ptb --teacher-steps 5000
    python -m data.evidence.table1.table draw    # tables.md, from the rows alone

The first fills table.json beside this file; with other flags it fills OUT/table.json.
It may be stopped and started again: rows of the same teacher and setting stay."""

import collections
import copy
import functools
import math
import sys
from dataclasses import fields, replace
from operator import itemgetter
from pathlib import Path

import train_small
import tsld
from data.evidence import models, rows
from data.evidence.rows import METHODS, Table
from data.lib.files import fingerprint, read_json

ROOM = Path(__file__).resolve().parent
ABOUT = """python -m data.evidence.table1.table makes the paper's table 1 in kind and
its ablation; with the word draw alone, tables.md of the rows that are there."""
DOCUMENTED = ("--data ptb --teacher-steps 5000",)
TAKES = train_small.TRAIN - {"loss", "bits", "granularity", "gt-weight", "task"}
TAKES -= {"seed", "resume"}

# As the paper has them: post-training methods at 4 bits with a scale per channel, all
# others per tensor.
UNTRAINED = (
    (32, "teacher"),
    (4, "round-to-nearest"),
    (4, "OPTQ"),
    (4, "AWQ"),
    (2, "ternarized"),
)
TRAINED = {
    2: ("logit", "tsld", "l2l", "logit_gt", "gt"),
    4: ("logit", "tsld", "logit_gt"),
}
# τ and ground-truth weight of further TSLD students. τ = 10 is above, and τ = ∞ is
# logit distillation.
ABLATION = ((1.0, 0.0), (2.0, 0.0), (5.0, 0.0), (20.0, 0.0), (10.0, 0.25), (10.0, 1.0))
SEEDS = (0, 1, 2)


def main(argv):
    if argv == ["draw"]:
        rows.write_page(ROOM, page(rows.read_rows(ROOM, "table.json")))
        return

    args = parse(argv)
    models.check_model(args)
    path = rows.place(ROOM, argv, args.out, DOCUMENTED) / "table.json"
    read_json(path, [])  # a damaged file is found before anything is trained
    setup = train_small.set_up(args)
    teacher = train_small.train_teacher(setup)

    @functools.cache
    def frozen_teacher():  # where a student is still wanted
        exact = train_small.score(setup, teacher, ["valid"])
        return train_small.frozen_teacher(setup, teacher, exact)

    def measure(setting):
        if "seed" not in setting:
            model = models.untrained(setup, teacher, setting["method"])
            scores = train_small.score(setup, model)
        else:
            names = [field.name for field in fields(tsld.TrainConfig)]
            config = models.from_json({name: setting[name] for name in names})
            student = tsld.quantize_model(copy.deepcopy(teacher), setting["bits"])
            _, scores = models.distil(
                setup, student, config, frozen_teacher(), label(setting)
            )

        return {f"{part}_{x}": scores[part][x] for part in scores for x in scores[part]}

    wanted = wanted_rows(setup, teacher)
    rows.fill(path, wanted, measure, label, "table1.table")
    rows.write_page(path.parent, page(read_json(path, [])))


def parse(argv):
    args = train_small.parse(argv, TAKES, ABOUT, model="tiny-6", steps=400)
    args.resume = True  # a student that was interrupted
    return args


def wanted_rows(setup, teacher):
    """The settings of the table's rows. A student's has all fields of its
    TrainConfig."""
    of_teacher = {
        "teacher": fingerprint(teacher.parameters()),
        "teacher_steps": setup.teacher.steps,
        "student_tokens": len(setup.tokens["student"]),
    }
    wanted = [{"bits": bits, "method": method} for bits, method in UNTRAINED]

    # Where no temperature is asked for it is the paper's, not the preset's.
    temperature = setup.args.tsld_temperature or tsld.TrainConfig.temperature
    groups = []
    for bits, losses in TRAINED.items():
        groups.append([(bits, loss, temperature, 0.0) for loss in losses])
    groups.append([(2, "tsld", *setting) for setting in ABLATION])

    for group in groups:
        for seed in SEEDS:
            for bits, loss, temperature, gt_weight in group:
                config = replace(setup.student, loss=loss, seed=seed)
                config.temperature = temperature
                config.gt_weight = gt_weight
                preset_rate = train_small.student_lr(setup.source.preset, bits)
                config.lr = setup.args.lr or preset_rate
                student = {"bits": bits, "method": loss, **models.as_json(config)}
                wanted.append(student)

    return [setting | of_teacher for setting in wanted]


def label(setting):
    """A row's name, and that of its student's checkpoint."""
    named = ("method", "bits", "temperature", "gt_weight", "seed")
    return "-".join(str(setting[key]) for key in named if key in setting)


# --------------------------------------------------------------------------------------
# Tables

MEASURES = {
    "valid_ppl": "validation perplexity",
    "valid_bpb": "bits/byte",
    "test_ppl": "test perplexity",
    "test_bpb": "bits/byte",
}
PAPER = {
    (32, "teacher"): "20.91 (FP16)",
    (4, "OPTQ"): "22.41",
    (4, "logit"): "20.98",
    (4, "logit_gt"): "21.51",
    (4, "tsld"): "19.95",
    (2, "l2l"): "23.79",
    (2, "logit"): "22.84",
    (2, "logit_gt"): "23.80",
    (2, "tsld"): "21.74",
}


def page(found):
    """tables.md. The tables of methods and of scales have students of the usual setting
    alone, the one that most students of their width have."""
    students = [row for row in found if "seed" in row]

    usual = {}
    for bits in {row["bits"] for row in students}:
        settings = [student_setting(row) for row in students if row["bits"] == bits]
        usual[bits] = collections.Counter(settings).most_common(1)[0][0]

    # The teacher with the most rows comes first.
    teachers = collections.Counter(row["teacher"] for row in found)
    of_teacher = {teacher: [] for teacher, _ in teachers.most_common()}

    for row in found:
        if "seed" not in row or student_setting(row) == usual[row["bits"]]:
            of_teacher[row["teacher"]].append(row)

    tables = [table_of_methods(of_teacher[teacher]) for teacher in of_teacher]
    tables += [table_of_scales(of_teacher), table_of_seeds(found)]
    return rows.page("table1.table draw", tables)


def student_setting(row):
    return row["student_tokens"], row["steps"], row["lr"]


def outside_ablation(found):
    """The rows but for TSLD with another temperature than logit distillation's, which
    does not use it, or with labels."""
    temperatures = {row["temperature"] for row in found if row["method"] == "logit"}

    plain = []
    for row in found:
        in_table_1 = row["method"] != "tsld"
        if not in_table_1:
            in_table_1 = row["temperature"] in temperatures and row["gt_weight"] == 0
        if in_table_1:
            plain.append(row)

    return plain


def name_of_teacher(row):
    return f"{row['teacher'][:4]}, {row['teacher_steps']:,} steps"


def table_of_methods(of_teacher):
    """The paper's table 1, of one teacher."""
    groups = collections.defaultdict(list)
    for row in outside_ablation(of_teacher):
        groups[row["bits"], row["method"]].append(row)

    order = []
    for bits in (32, 4, 2):
        order += [key for key in UNTRAINED if key[0] == bits]
        order += [(bits, method) for method in METHODS]

    lines = []
    for bits, method in order:
        group = groups[bits, method]
        if not group:
            continue
        cells = [bits, METHODS.get(method, method), len(group)]

        for measure in MEASURES:
            digits = 4 if measure.endswith("bpb") else 2
            values = [row[measure] for row in group]
            cells.append(rows.mean_and_spread(values, digits))

        lines.append([*cells, PAPER.get((bits, method), "")])

    title = f"Table 1 in kind: teacher {name_of_teacher(of_teacher[0])}"
    text = (
        "Perplexity is per token of the 2,048-entry vocabulary: mean ± standard "
        "deviation over the seeds of the student. The last column is the paper's "
        "perplexity of GPT-2 0.1B, per GPT-2 token."
    )
    columns = ["bits", "method", "seeds", *MEASURES.values(), "*the paper*"]

    return Table(title, text, columns, lines)


def table_of_scales(of_teacher):
    """Students at 2 bits by τ and the ground truth's weight."""
    without_scale = {"logit": (math.inf, 0.0), "logit_gt": (math.inf, 1.0)}

    groups = collections.defaultdict(list)
    for teacher, found in of_teacher.items():
        for row in found:
            mix = without_scale.get(row["method"])
            if row["method"] == "tsld":
                mix = row["temperature"], row["gt_weight"]
            if row["bits"] == 2 and mix:
                groups[mix, teacher].append(row)

    lines = []
    for mix in sorted({mix for mix, _ in groups}, key=itemgetter(1, 0)):
        temperature, weight = mix
        cells = [
            rows.over_seeds(groups[mix, teacher], "valid_ppl") for teacher in of_teacher
        ]
        lines.append([rows.infinite(temperature), f"{weight:g}", *cells])

    names = [name_of_teacher(found[0]) for found in of_teacher.values()]
    columns = ["τ", "ground truth's weight", *(f"teacher {name}" for name in names)]
    text = (
        "TSLD at 2 bits: validation perplexity (number of seeds). τ = ∞ is logit "
        "distillation, and with\nweight 1 logit+GT."
    )

    return Table("The ablation: temperature and labels", text, columns, lines)


def table_of_seeds(found):
    """Logit distillation and TSLD in pairs of one seed, of every setting."""
    pairs = collections.defaultdict(dict)
    for row in outside_ablation(found):
        if row["bits"] == 2 and row["method"] in ("logit", "tsld"):
            setting = row["teacher_steps"], name_of_teacher(row), *student_setting(row)
            pairs[*setting, row["seed"]][row["method"]] = f"{row['valid_ppl']:.2f}"

    lines = []
    for key in sorted(pairs):
        _, teacher, tokens, steps, rate, seed = key
        both = [pairs[key].get(method, "") for method in ("logit", "tsld")]
        lines.append([teacher, f"{tokens:,}", steps, f"{rate:g}", seed, *both])

    columns = ["teacher", "student's tokens", "steps", "rate", "seed", "logit", "TSLD"]
    text = (
        "Validation perplexity at 2 bits, no ground truth: how the setting was found."
    )

    return Table("Seed by seed", text, columns, lines)


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
