"""What the five figures share."""

import json
import math
from dataclasses import dataclass

import torch

from data.evidence.models import confidence, whole_blocks
from data.evidence.rows import METHODS
from data.lib.files import write_text

SHOWN = 64  # blocks of text in figures 1, 2 and 4; the means of figure 4 are of all
NAMES = METHODS | {"without training": "without training"}
COLOURS = {
    "without training": "C7",
    "gt": "C4",
    "l2l": "C1",
    "logit": "C0",
    "logit_gt": "C3",
    "tsld": "C2",
}


@dataclass
class Subject:
    """What is looked at: the teacher, and the validation text in whole blocks."""

    setup: object  # a train_small.Setup
    teacher: object
    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T)
    top: torch.Tensor  # (B, T)  the probability of the teacher's likeliest token
    ce: torch.Tensor  # (B, T)  the teacher's cross-entropy of the true token, in nats


def subject_of(setup, teacher):
    ids, targets = whole_blocks(setup, "valid")
    return Subject(setup, teacher, ids, targets, *confidence(teacher, ids, targets))


class Figure:
    """A figure is shown one student after another, writes what it saw as CSV files, and
    draws it. Its title is made of the numbers, so that it says what is seen."""

    name = ""
    size = (9, 3.6)  # in inches, of both halves together
    widths = (1, 1)  # of the halves

    def __init__(self, subject):
        self.subject = subject

    def look_at(self, name, student):
        """name: a loss, or "without training"."""

    def tables(self):
        """Name of a CSV file to its columns, title to values."""
        raise NotImplementedError

    def draw(self, *axes):
        """Draws into one axis or two, and returns the title."""
        raise NotImplementedError

    def write(self, folder):
        for name, columns in self.tables().items():
            write_csv(folder / f"{name}.csv", columns)

    def picture(self, pyplot, folder):
        layout = {"layout": "constrained", "width_ratios": self.widths}
        picture, axes = pyplot.subplots(
            1, len(self.widths), figsize=self.size, squeeze=False, **layout
        )
        picture.suptitle(self.draw(*axes[0]), fontsize=10)
        picture.savefig(folder / f"{self.name}.png", dpi=110)
        pyplot.close(picture)


def write_csv(path, columns):
    lines = [",".join(f'"{title}"' for title in columns)]
    for row in zip(*columns.values()):
        lines.append(",".join(map(cell, row)))
    write_text(path, "\n".join(lines) + "\n")


def cell(value):
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.6g}"


def mean_and_error(values):
    """The mean of a tensor and its standard error; not a number where there are too few
    values."""
    if len(values) < 2:
        return math.nan, math.nan

    return values.mean().item(), values.std().item() / len(values) ** 0.5
