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
from itertools import product
from pathlib import Path

import torch

import train_small
import tsld
from data import tasks
from data.evidence.table import FOLDER, where_and_when
from data.files import read_json
from data.texts import UserError
from tsld import TrainConfig

# The shape, vocabulary and student of the preset tiny, the Penn Treebank's first 100,000 tokens.
PRETRAINING = TrainConfig(loss="gt", steps=1600, batch_size=32, lr=4e-3)
FINE_TUNING = TrainConfig(loss="gt", batch_size=32, lr=1e-3)
TEACHERS = (3, 12, 24, 1, 6)  # epochs of fine-tuning, in the order in which they are taken
# Temperature of the token scale, or None, and weight of the ground truth; then that alone.
MIXES = [*product((None, 10.0), (0.0, 1 / 16, 1 / 4, 1.0))]
LABELS_ALONE = (None, None)
# Bits, the student's epochs, the teachers, the mixes.
MAP = (
    (2, 16, TEACHERS, [*MIXES, LABELS_ALONE]),
    (4, 16, TEACHERS[:3], MIXES),
    (2, 16, (3, 24), [*product((1.0, 2.0, 5.0, 20.0), (0.0, 1 / 4))]),
    (2, 64, (3, 24), MIXES),
)
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
    wanted = [
        {"bits": bits, "epochs": epochs, "teacher_epochs": of_teacher, "temperature": temperature}
        | {"gt_weight": gt_weight, "seed": seed}
        for bits, epochs, teachers, mixes in MAP
        for of_teacher in teachers
        for temperature, gt_weight in mixes
    ]
    there = [{key: row[key] for key in wanted[0]} for row in rows]
    for number, setting in enumerate(wanted, 1):
        if setting in there:
            continue
        print(f"{number} of {len(wanted)}: {setting}", flush=True)
        measured = {"pretrained": known} | measure(setup, **setting)
        rows.append(setting | measured | where_and_when("regimes"))
        train_small.write_text(path, json.dumps(rows, indent=1) + "\n")
    draw(read_rows())


def measure(setup, bits, epochs, teacher_epochs, temperature, gt_weight, seed):
    """Perplexities of the teacher, of the rounded teacher, and of the student after training."""
    teacher = fine_tuned(setup, teacher_epochs, seed)
    scores = {"teacher": train_small.score(setup, teacher)}
    rounded = tsld.quantize_model(copy.deepcopy(teacher), bits)
    scores["rounded"] = train_small.score(setup, rounded)
    config = replace(setup.student, seed=seed)
    if gt_weight is None:
        config.loss = "gt"
    else:
        config.temperature, config.gt_weight = temperature or math.inf, gt_weight
    config.steps = steps(epochs, config, setup.tokens["student"])
    config.lr = train_small.student_lr(setup.source.preset, bits)
    frozen = train_small.frozen_teacher(setup, teacher, scores["teacher"])
    name = f"seed-{seed}"
    student = tsld.quantize_model(copy.deepcopy(teacher), bits)
    _, scores["student"] = train_small.train_student(setup, student, config, frozen, name)
    for file in Path(setup.args.out).glob(f"student-{name}.*pt"):
        file.unlink(missing_ok=True)  # its row is all that is needed
    measured = {f"{who}_{part}_ppl": x["ppl"] for who in scores for part, x in scores[who].items()}
    return measured | {"config": asdict(config) | {"temperature": temperature}}  # JSON has no ∞


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
    """Prints a table of each setting of bits and epochs, its seeds averaged, and draws the map."""
    groups = collections.defaultdict(list)
    for row in rows:
        key = row["bits"], row["epochs"], row["teacher_epochs"]
        groups[key, row["temperature"], row["gt_weight"]].append(row)
    found, mixes = {key[1:] for key in groups}, [*MIXES, LABELS_ALONE]
    mixes += sorted(found - {*mixes})  # other temperatures
    named = [f"{weight:g}, {f'τ {t:g}' if t else '-'}" for t, weight in mixes if weight is not None]
    named.insert(len(MIXES), "labels alone")
    print("validation perplexity: ground truth's weight, token scale")
    titles = ("bits", "epochs", "teacher's epochs", "teacher", "rounded", *named)
    print("\n| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
    for setting in sorted({key[0] for key in groups}):
        of_setting = [row for key in groups if key[0] == setting for row in groups[key]]
        cells = [f"{cell}" for cell in setting]
        cells += [mean_and_spread(of_setting, f"{who}_valid_ppl") for who in ("teacher", "rounded")]
        for mix in mixes:
            cells.append(mean_and_spread(groups.get((setting, *mix), []), "student_valid_ppl"))
        print("| " + " | ".join(cells) + " |")
    if importlib.util.find_spec("matplotlib"):
        figure(groups).savefig(FOLDER / "5-regimes.png", dpi=150)


def mean_and_spread(rows, key, digits=2):
    values = {row["seed"]: row[key] for row in rows}.values()  # a teacher has a row per student
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len({*values}) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({len(values)})" if values else ""


def figure(groups):
    """The student's perplexity against its teacher's, over how far the teacher has learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colors = {0.0: "tab:blue", 1 / 16: "tab:cyan", 1 / 4: "tab:orange", 1.0: "tab:red"}
    colors[None], styles = "black", {None: "--", 10.0: "-"}
    teachers = collections.defaultdict(list)
    for temperature, weight in [*MIXES, LABELS_ALONE]:
        lines = collections.defaultdict(list)
        for (setting, *mix), rows in groups.items():
            if setting[:2] == (2, 16) and mix == [temperature, weight]:
                teachers[setting[2]] += [row["teacher_valid_ppl"] for row in rows]
                lines[setting[2]] = [
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
    axes.set_xticks(epochs, [f"{n}\n({statistics.mean(teachers[n]):.1f})" for n in epochs])
    axes.minorticks_off()
    axes.set_xlabel("epochs of the teacher on the student's text (its own perplexity)")
    axes.set_ylabel("perplexity, student minus teacher")
    lines = [axes.plot([], [], color=color)[0] for color in [*colors.values()][:-1]]
    kinds = [":", *styles.values()]
    lines += [axes.plot([], [], color="black", linestyle=style)[0] for style in kinds]
    names = [f"ground truth · {weight:g}" for weight in colors if weight is not None]
    names += ["ground truth alone", "no token scale", "token scale, τ = 10"]
    axes.legend(lines, names, fontsize=8)
    axes.set_title(
        "The ground truth helps a student whose teacher has not finished learning its text;\n"
        "the token scale (full lines) changes little",
        fontsize=9,
    )
    return drawing


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
