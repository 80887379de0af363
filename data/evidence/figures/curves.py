"""Figure 3: the students' cross-entropy on their own text and on another, as they
train."""

import json
from pathlib import Path

import tsld
from data.evidence.figures.common import COLOURS, NAMES, Figure
from data.lib.errors import UserError
from data.lib.files import read_json, write_text

LOSSES = ("logit", "logit_gt", "tsld")
TEXTS = ("training", "validation")
LOOKS = 20  # in a training
TOKENS = 20_000  # of a text


class TrainingCurves(Figure):
    name = "3-training-curves"

    def __init__(self, subject):
        super().__init__(subject)
        self.histories = {}  # loss -> step, as text -> nats of both texts

    def watch(self, loss):
        """What is called after each step of a student's training; None for others."""
        if loss not in LOSSES:
            return None
        setup = self.subject.setup
        path = history_path(setup.args, loss)
        history = read_json(path, {}) if setup.args.resume else {}
        self.histories[loss] = history
        every = max(1, setup.student.steps // LOOKS)

        def watch(step, student):
            if step % every == 0 or step == setup.student.steps:
                history[str(step)] = []
                for part in ("student", "valid"):
                    text = setup.tokens[part][:TOKENS]
                    nats = tsld.evaluate(student, text, setup.student.block_size)
                    history[str(step)].append(nats)

                write_text(path, json.dumps(history))

        return watch

    def tables(self):
        steps = self.histories["logit"]
        columns = {"step": [int(step) for step in steps]}

        for loss, history in self.histories.items():
            for i, text in enumerate(TEXTS):
                columns[f"{loss}, {text}"] = [history[step][i] for step in steps]

        return {self.name: columns}

    def draw(self, *axes):
        columns = self.tables()[self.name]

        gaps = []
        for loss in LOSSES:
            for axis, text in zip(axes, TEXTS):
                style = {"color": COLOURS[loss], "label": NAMES[loss]}
                axis.plot(columns["step"], columns[f"{loss}, {text}"], **style)
                axis.set(title=f"{text} text", xlabel="step")
                axis.set_ylabel("cross-entropy, nats per token")

            training, validation = (columns[f"{loss}, {text}"][-1] for text in TEXTS)
            gaps.append(f"{NAMES[loss]} {validation - training:.2f}")

        axes[0].legend()
        lost = ", ".join(gaps)
        return f"From training to validation text the students lose, nats: {lost}"


def history_path(args, loss):
    return Path(args.out) / f"student-{loss}.history.json"


def check_histories(args):
    """Raises UserError if a student is to be resumed whose history is not there: a
    checkpoint alone has no curves."""
    for loss in LOSSES if args.resume else ():
        path = history_path(args, loss)
        checkpoint = Path(args.out) / f"student-{loss}.pt"
        if checkpoint.exists() and read_json(path, None) is None:
            raise UserError(f"{path} is missing: without --resume it is made anew")
