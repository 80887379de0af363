"""The paper's figures in kind, from one teacher and its five ternary students:

    python -m data.evidence.figures.figures --data ptb --teacher-steps 5000

writes their numbers as CSV beside this file, and draws PNG files where matplotlib is
installed; with other flags it writes them into --out. The bars of the first figure are
means over the seeds of table1/table.json."""

import copy
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import train_small
import tsld
from data.evidence import models, rows
from data.evidence.figures.common import subject_of
from data.evidence.figures.confidence import Confidence
from data.evidence.figures.curves import TrainingCurves, check_histories
from data.evidence.figures.errors import DistanceToTeacher, ErrorByPosition
from data.evidence.figures.method import TABLE, Method
from data.lib.files import read_json

ROOM = Path(__file__).resolve().parent
ABOUT = "python -m data.evidence.figures.figures makes the paper's figures in kind."
DOCUMENTED = ("--data ptb --teacher-steps 5000",)
TAKES = train_small.TRAIN - {"loss", "gt-weight", "bits", "task"}


def main(argv):
    defaults = {"loss": "all", "model": "tiny-6", "steps": 400}
    defaults["tsld-temperature"] = 10.0
    args = train_small.parse(argv, TAKES, ABOUT, **defaults)
    folder = rows.place(ROOM, argv, args.out, DOCUMENTED)

    # What cannot be made is refused before anything is trained.
    models.check_model(args)
    read_json(TABLE, [])
    check_histories(args)

    setup = train_small.set_up(args)
    teacher = train_small.train_teacher(setup)
    scores = train_small.score(setup, teacher, ["valid"])
    frozen = train_small.frozen_teacher(setup, teacher, scores)
    subject = subject_of(setup, frozen)
    curves = TrainingCurves(subject)
    figures = [
        Method(subject),
        ErrorByPosition(subject),
        DistanceToTeacher(subject),
        curves,
        Confidence(subject),
    ]

    def new_student():
        return tsld.quantize_model(copy.deepcopy(teacher), 2, args.granularity)

    for figure in figures:
        figure.look_at("without training", new_student())

    for loss in tsld.LOSSES:
        student = new_student()
        config = replace(setup.student, loss=loss, gt_weight=0.0)
        _, scores = train_small.train_student(
            setup, student, config, frozen, loss, curves.watch(loss)
        )
        perplexity = scores["valid"]["ppl"]
        print(f"student, {loss}: validation perplexity {perplexity:.2f}", flush=True)
        for figure in figures:
            figure.look_at(loss, student)

    for figure in figures:
        figure.write(folder)
    draw(figures, folder)


def draw(figures, folder):
    """Draws the PNG files, where matplotlib is installed."""
    if not importlib.util.find_spec("matplotlib"):
        print(f"figures: the numbers are in {folder}; matplotlib would draw them")
        return

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for figure in figures:
        figure.picture(pyplot, folder)
    print(f"figures: {folder}")


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
