"""When does the ground truth help distillation, and when does the token scale? This is
the paper's regime: a teacher pretrained on other text and fine-tuned for a few epochs
on the very text that its student then sees. The teacher's epochs, the ground truth's
weight and the token scale are varied.

    python -m data.evidence.map.regimes --seed 0    # 0 to 5: the rows of one seed
    python -m data.evidence.map.regimes draw        # tables.md and the picture

The first fills regimes-0.json beside this file; with other flags or seeds it fills
OUT/regimes-SEED.json. It may be stopped and started again: rows that are there stay.
Seeds are independent, and two of them share two cores best as two processes of one
thread (OMP_NUM_THREADS=1), once the first one has made the pretrained model."""

import copy
import math
import re
import sys
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path

import torch

import train_small
import tsld
from data import tasks
from data.evidence import models, rows
from data.evidence.map import drawing, mixes, tables
from data.lib import resumable
from data.lib.errors import UserError
from data.lib.files import fingerprint
from tsld import TrainConfig

ROOM = Path(__file__).resolve().parent
ABOUT = """python -m data.evidence.map.regimes makes the map of teachers and mixes for
one seed; with the word draw alone, tables.md and the picture of the rows there."""
DOCUMENTED = tuple(f"--seed {seed}" for seed in range(6))
TAKES = {"seed", "out", "dtype", "device"}

# The shape, vocabulary and student are those of the preset tiny-6, the text is the Penn
# Treebank's first 100,000 tokens.
PRETRAINING = TrainConfig(loss="gt", steps=1600, batch_size=32, lr=4e-3)
FINE_TUNING = TrainConfig(loss="gt", batch_size=32, lr=1e-3)


def main(argv):
    if argv == ["draw"]:
        draw(ROOM)
        return

    args = parse(argv)
    folder = rows.place(ROOM, argv, args.out, DOCUMENTED)
    setup = train_small.set_up(args)

    origin = fingerprint(pretrained(setup).parameters())
    for row in rows.read_rows(folder, "regimes-*.json"):
        if row["pretrained"] != origin:
            message = f"the rows in {folder} are of another pretrained model"
            raise UserError(f"{message}: move them away")

    path = folder / f"regimes-{args.seed}.json"
    measure = measurer(setup, origin)
    rows.fill(path, mixes.settings(args.seed), measure, str, "map.regimes")
    draw(folder)


def parse(argv):
    args = train_small.parse(
        argv, TAKES, ABOUT, data="ptb", model="tiny-6", out="out/regimes"
    )
    args.resume = True  # a student that was interrupted

    return args


def draw(folder):
    """Writes tables.md and, where matplotlib is installed, regimes.png."""
    groups = tables.grouped(rows.read_rows(folder, "regimes-*.json"))
    rows.write_page(folder, tables.page(groups))
    drawing.draw(groups, folder / "regimes.png")


def measurer(setup, origin):
    """The function that measures a row of this seed. What several rows share is made
    once."""

    @cache
    def teacher_of(epochs):
        teacher = fine_tuned(setup, epochs)
        scores = train_small.score(setup, teacher, ("student", "valid", "test"))
        scores["train"] = scores.pop("student")  # its own text, and its students'
        frozen = train_small.frozen_teacher(setup, teacher, scores)

        return teacher, scores, frozen, models.sure_share(setup, teacher, "student")

    @cache
    def rounded_scores(epochs, bits, granularity):
        return train_small.score(setup, rounded(epochs, bits, granularity))

    def rounded(epochs, bits, granularity):
        teacher = copy.deepcopy(teacher_of(epochs)[0])
        return tsld.quantize_model(teacher, bits, granularity)

    def measure(setting):
        bits, granularity, epochs, teacher_epochs = itemgetter(*mixes.SETTING)(setting)
        teacher, teacher_scores, frozen, sure = teacher_of(teacher_epochs)
        scores = {
            "teacher": teacher_scores,
            "rounded": rounded_scores(teacher_epochs, bits, granularity),
        }

        if setting["loss"] == "OPTQ":
            config = None
            model = models.untrained(setup, teacher, "OPTQ")
            scores["student"] = train_small.score(setup, model)
        else:
            config = replace(setup.student, loss=setting["loss"])
            config.temperature = setting["temperature"] or math.inf
            config.gt_weight = setting["gt_weight"] or 0.0
            config.steps = steps(epochs, config, setup.tokens["student"])
            config.lr = train_small.student_lr(setup.source.preset, bits)
            student = rounded(teacher_epochs, bits, granularity)
            name = f"seed-{config.seed}"
            _, scores["student"] = models.distil(setup, student, config, frozen, name)
            config = models.as_json(config)

        measured = {"pretrained": origin}
        for model, parts in scores.items():
            for part in parts:
                measured[f"{model}_{part}_ppl"] = parts[part]["ppl"]

        return measured | {"teacher_sure": sure, "config": config}

    return measure


def steps(epochs, config, tokens):
    return round(epochs * len(tokens) / (config.batch_size * config.block_size))


# --------------------------------------------------------------------------------------
# Teachers


def pretrained(setup):
    """A model that has seen the other text alone."""
    tokens = other_text(setup.source.tokenizer)
    path = Path(setup.args.out) / "pretrained.pt"
    model = copy.deepcopy(setup.source.model)

    return trained(setup, "pretraining", model, tokens, PRETRAINING, path)


def fine_tuned(setup, epochs):
    """The pretrained model after so many epochs of the student's text."""
    tokens = setup.tokens["student"]
    seed = setup.args.seed
    config = replace(FINE_TUNING, seed=seed, block_size=setup.teacher.block_size)
    config.steps = steps(epochs, config, tokens)
    path = Path(setup.args.out) / f"teacher-{epochs}-epochs-seed-{seed}.pt"
    label = f"teacher, {epochs} epochs"

    return trained(setup, label, pretrained(setup), tokens, config, path)


def trained(setup, label, model, tokens, config, path):
    """The model after a training in the dtype and block size of the run's teacher, or
    as its checkpoint has it."""
    block_size = setup.teacher.block_size
    config = replace(config, dtype=setup.teacher.dtype, block_size=block_size)
    resumable.train(label, model, tokens, config, path, setup.device, resume=True)

    return model


def other_text(tokenizer):
    """The training examples of all tasks without the prompts' own words, in lower case
    as the Penn Treebank: what a pretrained model's text is to the one that it is
    fine-tuned on. Returns int64 (n,)."""
    lines = []
    for task, (prompt, choices) in tasks.PROMPTS.items():
        words = [word for word in re.split(r"\{.?\}", prompt) if word.strip()]
        own_words = "|".join(map(re.escape, words))
        examples, _ = tasks.load_task(task)

        for example in examples:
            text = example.prompt
            if own_words:
                text = re.sub(own_words, " ", text)
            if not choices:
                text = f"{text} {example.choices[example.answer]}"
            lines.append(" ".join(text.split()).lower())

    return torch.tensor(tokenizer.encode_ordinary("\n".join(lines)))


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
