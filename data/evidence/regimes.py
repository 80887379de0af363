"""When does the ground truth help distillation, and when does the token scale? The paper's regime:
a teacher pretrained on other text and fine-tuned for a few epochs on the very text that its student
then sees. The teacher's epochs, the ground truth's weight and the token scale are varied.

    python -m data.evidence.regimes --seed 0    # one more seed, to data/evidence/regimes-0.json
    python -m data.evidence.regimes draw        # all seeds' rows as tables, and the figure

It may be stopped and started again: rows that are there stay. Seeds are independent, and two of
them share two cores best as two processes of one thread (OMP_NUM_THREADS=1), once the first one has
made the pretrained model."""

import collections
import copy
import importlib.util
import json
import math
import re
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train_small
import tsld
from data import tasks
from data.evidence.figures import sure_share
from data.evidence.table import FOLDER, untrained, where_and_when
from data.files import read_json
from data.texts import UserError
from tsld import TrainConfig

# The shape, vocabulary and student of the preset tiny, the Penn Treebank's first 100,000 tokens.
PRETRAINING = TrainConfig(loss="gt", steps=1600, batch_size=32, lr=4e-3)
FINE_TUNING = TrainConfig(loss="gt", batch_size=32, lr=1e-3)
TEACHERS = (3, 12, 24, 1, 6)  # epochs of fine-tuning, in the order in which they are taken
WEIGHTS = {0.0: "weight 0", 1 / 16: "1/16", 1 / 4: "1/4", 1.0: "1"}  # of the ground truth
# A mix: the loss; the token scale's temperature, None for no scale; the ground truth's weight.
MIXES = [("tsld", t, weight) for t in (None, 10.0) for weight in WEIGHTS]
LABELS_ALONE = ("gt", None, None)
# Table 1: what the authors' program runs as each row, the printed TSLD, and their TSLD unscaled.
TABLE_1 = {
    "L2L+logit": ("l2l", None, None),
    "logit+GT": ("tsld", None, 1.0),
    "logit": ("tsld", None, 0.0),
    "TSLD as printed": ("tsld", 10.0, 0.0),
    "TSLD as run: + ground truth · 1/4": ("tsld", 10.0, 1 / 4),
    "logit + ground truth · 1/4": ("tsld", None, 1 / 4),
}
OPTQ = ("OPTQ", None, None)
AT_4_BITS = [*TABLE_1.values()][1:]  # the paper has no L2L at 4 bits
# The token scale's best chance: other temperatures, and teachers that are surer of their text.
OTHERS = [("tsld", t, weight) for t in (1.0, 2.0, 5.0, 20.0) for weight in (0.0, 1 / 4)]
AT_2 = [mix for mix in OTHERS if mix[1] == 2.0]
# Does the token scale do what a shorter training would?
IS_IT_BREVITY = [("tsld", t, 0.0) for t in (None, 2.0)]
PAIRS = [mix for mix in MIXES if mix[2] in (0.0, 1 / 4)]
# Bits, what shares a scale, the student's epochs, the teachers, the mixes: of table 1, then of all.
TABLE_1_PARTS = (
    (2, "tensor", 16, (12,), TABLE_1.values()),
    (4, "channel", 0, (12,), [OPTQ]),
    (4, "channel", 16, (12,), AT_4_BITS),
    (4, "tensor", 16, (12,), AT_4_BITS),
)
MAP = (
    *TABLE_1_PARTS,
    (2, "tensor", 16, TEACHERS, [*MIXES, LABELS_ALONE]),
    (2, "tensor", 16, (24, 48), OTHERS),
    (2, "tensor", 16, (48, 96), [*PAIRS, TABLE_1["L2L+logit"]]),
    (2, "tensor", 16, (48,), [TABLE_1["logit+GT"]]),
    (2, "tensor", 16, (96,), AT_2),
    (2, "tensor", 16, (12,), AT_2[:1]),
    *((2, "tensor", epochs, (48,), IS_IT_BREVITY) for epochs in (4, 8, 32)),
    (4, "tensor", 16, TEACHERS[:3], MIXES),
    (2, "tensor", 64, (3, 24), [mix for mix in MIXES if mix[2] != 1 / 16]),
)
NAMES = ["bits", "a scale per", "epochs", "teacher's epochs"]  # of a setting
TAKES = {"seed", "out", "dtype", "device"}


def main(argv):
    if argv == ["draw"]:
        return draw(read_rows())
    about = "The map of teachers and mixes, for one seed."
    args = train_small.parse(argv, TAKES, about, data="ptb", model="tiny", out="out/regimes")
    # The pretrained model is the one of seed 0; resume: a student that was interrupted.
    seed, args.seed, args.resume = args.seed, 0, True
    setup = train_small.set_up(args)
    path = FOLDER / f"regimes-{seed}.json"
    rows, known = read_json(path, []), train_small.fingerprint(pretrained(setup).parameters())
    if any(row["pretrained"] != known for row in read_rows()):
        raise UserError(f"the rows in {FOLDER} are of another pretrained model: move them away")
    names = "bits", "granularity", "epochs", "teacher_epochs", "loss", "temperature", "gt_weight"
    wanted = [
        dict(zip(names, (*setting, of_teacher, *mix))) | {"seed": seed}
        for *setting, teachers, mixes in MAP
        for of_teacher in teachers
        for mix in mixes
    ]
    prepared = {}
    for number, setting in enumerate(wanted, 1):
        if any(setting.items() <= row.items() for row in rows):
            continue
        print(f"{number} of {len(wanted)}: {setting}", flush=True)
        measured = {"pretrained": known} | measure(setup, prepared, **setting)
        rows.append(setting | measured | where_and_when("regimes"))
        train_small.write_text(path, json.dumps(rows, indent=1) + "\n")
    draw(read_rows())


def measure(
    setup, prepared, bits, granularity, epochs, teacher_epochs, loss, temperature, gt_weight, seed
):
    """Perplexities of the teacher, of the rounded teacher, and of the student after training, and
    the share of its own text's tokens that the teacher is sure of. prepared: what several students
    share, filled in."""
    if teacher_epochs not in prepared:
        teacher = fine_tuned(setup, teacher_epochs, seed)
        scores = train_small.score(setup, teacher, ("student", "valid", "test"))
        scores["train"] = scores.pop("student")  # its own text, and its students'
        frozen = train_small.frozen_teacher(setup, teacher, scores)
        sure = sure_share(setup, teacher, "student")
        prepared[teacher_epochs] = teacher, scores, sure, frozen
    teacher, of_teacher, sure, frozen = prepared[teacher_epochs]
    student = tsld.quantize_model(copy.deepcopy(teacher), bits, granularity)
    rounding = teacher_epochs, bits, granularity
    if rounding not in prepared:
        prepared[rounding] = train_small.score(setup, student)
    scores, config = {"teacher": of_teacher, "rounded": prepared[rounding]}, None
    if loss == "OPTQ":
        scores["student"] = train_small.score(setup, untrained(setup, teacher, "OPTQ"))
    else:
        config = replace(setup.student, loss=loss, seed=seed)
        config.temperature, config.gt_weight = temperature or math.inf, gt_weight or 0.0
        config.steps = steps(epochs, config, setup.tokens["student"])
        config.lr = train_small.student_lr(setup.source.preset, bits)
        name = f"seed-{seed}"
        _, scores["student"] = train_small.train_student(setup, student, config, frozen, name)
        for file in Path(setup.args.out).glob(f"student-{name}.*pt"):
            file.unlink(missing_ok=True)  # its row is all that is needed
        config = asdict(config) | {"temperature": temperature}  # JSON has no ∞
    measured = {f"{who}_{part}_ppl": x["ppl"] for who in scores for part, x in scores[who].items()}
    return measured | {"teacher_sure": sure, "config": config}


def steps(epochs, config, tokens):
    return round(epochs * len(tokens) / (config.batch_size * config.block_size))


def pretrained(setup):
    """A model that has seen the other text alone."""
    model, path = copy.deepcopy(setup.source.model), Path(setup.args.out) / "pretrained.pt"
    size = {"dtype": setup.teacher.dtype, "block_size": setup.teacher.block_size}
    config, tokens = replace(PRETRAINING, **size), other_text(setup.source.tokenizer)
    train_small.train(setup, "pretraining", model, tokens, config, path, True)
    return model


def fine_tuned(setup, epochs, seed):
    """The pretrained model after so many epochs of the student's text."""
    model, tokens = pretrained(setup), setup.tokens["student"]
    size = {"dtype": setup.teacher.dtype, "block_size": setup.teacher.block_size}
    config = replace(FINE_TUNING, **size, seed=seed)
    config.steps = steps(epochs, config, tokens)
    path = Path(setup.args.out) / f"teacher-{epochs}-epochs-seed-{seed}.pt"
    train_small.train(setup, f"teacher, {epochs} epochs", model, tokens, config, path, True)
    return model


def other_text(tokenizer):
    """The training examples of all tasks without the prompts' own words, in lower case as the Penn
    Treebank: what a pretrained model's text is to the one that it is fine-tuned on."""
    lines = []
    for task, (prompt, choices) in tasks.PROMPTS.items():
        fixed = "|".join(re.escape(s) for s in re.split(r"\{.?\}", prompt) if s.strip())
        for example in tasks.load_task(task)[0]:
            text = re.sub(fixed, " ", example.prompt) if fixed else example.prompt
            lines.append(text if choices else f"{text} {example.choices[example.answer]}")
    text = "\n".join(" ".join(line.split()).lower() for line in lines)
    return torch.tensor(tokenizer.encode_ordinary(text))


def read_rows():
    files = sorted(FOLDER.glob("regimes-*.json"))
    return [row for file in files for row in read_json(file, [])]


def draw(rows):
    """Prints the tables that README.md beside this file shows, and draws the map."""
    groups = collections.defaultdict(list)
    for row in rows:
        setting = row["bits"], row["granularity"], row["epochs"], row["teacher_epochs"]
        groups[setting, (row["loss"], row["temperature"], row["gt_weight"])].append(row)
    for table in (table_of_weights, table_of_changes, table_of_temperatures, table_1):
        titles, lines = table(groups)
        print("\n| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
        for line in lines:
            print("| " + " | ".join(map(str, line)) + " |")
    if importlib.util.find_spec("matplotlib"):
        figure(groups).savefig(FOLDER / "5-regimes.png", dpi=150)


def table_of_weights(groups):
    """The students' perplexities by the ground truth's weight, without token scale and with it."""
    lines = []
    for setting in sorted({setting for setting, mix in groups if mix in MIXES}):
        of_setting = [row for key in groups if key[0] == setting for row in groups[key]]
        keys = "teacher_train_ppl", "teacher_valid_ppl", "rounded_valid_ppl"
        train, *scores = (mean_and_spread(of_setting, key) for key in keys)
        sure = statistics.mean({row["seed"]: row["teacher_sure"] for row in of_setting}.values())
        head = [*setting, train, f"{sure:.0%}", *scores, "no"]
        others = [perplexity(groups, setting, mix) for mix in (LABELS_ALONE, TABLE_1["L2L+logit"])]
        for t in (None, 10.0):
            cells = [perplexity(groups, setting, ("tsld", t, weight)) for weight in WEIGHTS]
            lines += [[*head, *cells, *others]] if any(cells) else []
            head, others = [""] * 8 + ["τ = 10"], ["", ""]
    titles = ["on its own text", "sure of", "teacher", "rounded", "token scale", *WEIGHTS.values()]
    return [*NAMES, *titles, "labels alone", "L2L+logit"], lines


def table_of_changes(groups):
    """Perplexity with the token scale minus without it, with its standard error, and in how many of
    the pairs it is ahead."""
    teachers = sorted({setting[3] for setting, _ in pairs(groups)})
    lines = collections.defaultdict(lambda: dict.fromkeys(teachers, ""))
    for (setting, (_, t, weight)), both in pairs(groups).items():
        changes = [row["student_valid_ppl"] - twin["student_valid_ppl"] for row, twin in both]
        cell = f"{statistics.mean(changes):+.2f}"
        if len(changes) > 1:
            cell += f" ± {statistics.stdev(changes) / len(changes) ** 0.5:.2f}"
        ahead = sum(change < 0 for change in changes)
        lines[*setting[:3], t, weight][setting[3]] = f"{cell}, {ahead} of {len(changes)}"
    titles = [*NAMES[:3], "τ", "ground truth", *(f"teacher of {n}" for n in teachers)]
    head = lambda key: [*key[:3], *(f"{number:g}" for number in key[3:])]
    return titles, [[*head(key), *lines[key].values()] for key in sorted(lines)]


def table_of_temperatures(groups):
    """The perplexities where other temperatures than 10 were tried."""
    lines, ts = [], (1.0, 2.0, 5.0, 10.0, 20.0, None)
    for setting in sorted({setting for setting, mix in groups if mix in OTHERS}):
        for weight in (0.0, 1 / 4):
            cells = [perplexity(groups, setting, ("tsld", t, weight)) for t in ts]
            lines += [[*setting, f"{weight:g}", *cells]] if any(cells) else []
    return [*NAMES, "ground truth", *(f"τ = {t:g}" if t else "∞" for t in ts)], lines


def table_1(groups):
    """The paper's table 1, validation and test perplexity."""
    found = collections.defaultdict(dict)  # mix to the cells of its places
    for bits, granularity, epochs, (of_teacher, *_), mixes in TABLE_1_PARTS:
        for mix in mixes:
            given = groups, (bits, granularity, epochs, of_teacher), mix
            found[mix][bits, granularity] = perplexity(*given), perplexity(*given, "test")
    places = list(dict.fromkeys((bits, granularity) for bits, granularity, *_ in TABLE_1_PARTS))
    titles = [x for bits, per in places for x in (f"{bits} bits, a scale per {per}", "test")]
    lines = [
        [name, *(cell for place in places for cell in found[mix].get(place, ("", "")))]
        for name, mix in ({"OPTQ": OPTQ} | TABLE_1).items()
    ]
    return ["method", *titles], lines


def perplexity(groups, setting, mix, part="valid"):
    """A table's cell: of the students of a mix, over the seeds."""
    return mean_and_spread(groups.get((setting, mix), []), f"student_{part}_ppl")


def pairs(groups):
    """Setting and TSLD's mix to its rows, each with its twin without token scale."""
    found = {}
    for (setting, (loss, temperature, weight)), rows in groups.items():
        twins = {row["seed"]: row for row in groups.get((setting, (loss, None, weight)), [])}
        both = [(row, twins[row["seed"]]) for row in rows if row["seed"] in twins]
        if temperature and both:
            found[setting, (loss, temperature, weight)] = both
    return found


def mean_and_spread(rows, key, digits=2):
    values = {row["seed"]: row[key] for row in rows}.values()  # a teacher has a row per student
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len({*values}) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({len(values)})" if values else ""


def figure(groups):
    """Left, the student's perplexity against its teacher's, over how far the teacher has learned;
    right, what the token scale changes, over how sure the teacher is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (axes, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    colors = {0.0: "tab:blue", 1 / 16: "tab:cyan", 1 / 4: "tab:orange", 1.0: "tab:red"}
    colors[None], styles = "black", {None: "--", 10.0: "-"}
    teachers = collections.defaultdict(dict)
    for mix in [*MIXES, LABELS_ALONE]:
        lines, (_, temperature, weight) = collections.defaultdict(list), mix
        for (setting, of_mix), rows in groups.items():
            drawn = setting[:3] == (2, "tensor", 16) and setting[3] in TEACHERS
            if rows and drawn and of_mix == mix:
                teachers[setting[3]] |= {row["seed"]: row["teacher_valid_ppl"] for row in rows}
                lines[setting[3]] = [
                    row["student_valid_ppl"] - row["teacher_valid_ppl"] for row in rows
                ]
        epochs = sorted(lines)
        axes.errorbar(
            epochs,
            [statistics.mean(lines[n]) for n in epochs],
            [statistics.stdev(lines[n]) if len(lines[n]) > 1 else 0 for n in epochs],
            color=colors[weight],
            linestyle=styles[temperature] if weight is not None else ":",
            marker="o",
            markersize=3,
            capsize=2,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    epochs = sorted(teachers)
    axes.set_xticks(epochs, [f"{n}\n({statistics.mean(teachers[n].values()):.1f})" for n in epochs])
    axes.minorticks_off()
    axes.set_xlabel("epochs of the teacher on the student's text (its validation perplexity)")
    axes.set_ylabel("perplexity, student minus teacher")
    lines = [axes.plot([], [], color=color)[0] for color in [*colors.values()][:-1]]
    kinds = [":", *styles.values()]
    lines += [axes.plot([], [], color="black", linestyle=style)[0] for style in kinds]
    names = [f"ground truth · {weight:g}" for weight in colors if weight is not None]
    names += ["ground truth alone", "no token scale", "token scale, τ = 10"]
    axes.legend(lines, names, fontsize=8)
    axes.set_title(
        "The ground truth helps a student whose teacher\nhas not finished learning its text",
        fontsize=9,
    )
    scaled, epochs = {10.0: ("-", "o"), 2.0: (":", "v")}, {}
    for t, (style, marker) in scaled.items():
        for weight in (0.0, 1 / 4):
            points = []
            for (setting, mix), both in sorted(pairs(groups).items()):
                if setting[:3] == (2, "tensor", 16) and mix == ("tsld", t, weight):
                    before = [twin["student_valid_ppl"] for _, twin in both]
                    after = [row["student_valid_ppl"] for row, _ in both]
                    changes = [100 * (y / x - 1) for x, y in zip(before, after)]
                    spread = statistics.stdev(changes) if len(changes) > 1 else 0
                    sure = 100 * statistics.mean(row["teacher_sure"] for row, _ in both)
                    points.append((sure, statistics.mean(changes), spread))
                    epochs.setdefault(setting[3], sure)
            look = {"color": colors[weight], "linestyle": style, "marker": marker}
            label = f"τ = {t:g}, ground truth · {weight:g}"
            if points:
                right.errorbar(*zip(*points), **look, label=label, markersize=4, capsize=2)
    for teacher, sure in epochs.items():
        place = {"transform": right.get_xaxis_transform(), "ha": "center", "fontsize": 8}
        right.text(sure, 0.02, f"{teacher}", **place)
    if epochs:
        right.legend(fontsize=8)
    right.margins(y=0.12)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlabel("tokens of the student's text that its teacher is sure of, %")
    right.set_ylabel("change of perplexity by the token scale, %")
    right.set_title(
        "At τ = 2 the token scale helps where the teacher is sure of most tokens\n"
        "(mean and spread of the seeds' changes; below: the teacher's epochs)",
        fontsize=9,
    )
    return drawing


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
