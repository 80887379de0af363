"""Figure 4: tokens that the teacher is sure of, and what TSLD changes for them."""

import tsld
from data.evidence import models
from data.evidence.figures.common import COLOURS, SHOWN, Figure, mean_and_error

REGIONS = ("low confidence", "high confidence")


class Confidence(Figure):
    name = "4-confidence"
    size = (9, 3.8)
    widths = (3, 2)

    def __init__(self, subject):
        super().__init__(subject)
        self.ce = {}  # loss -> (B, T), the student's cross-entropy of the true token

    def look_at(self, name, student):
        if name in ("logit", "tsld"):
            subject = self.subject
            _, ce = models.confidence(student, subject.ids, subject.targets)
            self.ce[name] = ce

    def tables(self):
        return {self.name: self.tokens(), "4-change-by-confidence": self.changes()}

    def tokens(self):
        """Columns of tokens. A scale of 1 is what a token counts without scaling."""
        subject = self.subject
        temperature = subject.setup.student.temperature
        scale = tsld.token_scale(subject.ce, temperature)
        columns = {
            "top probability": subject.top,
            "cross-entropy": subject.ce,
            "token scale times N": subject.ids.shape[1] * scale,
            "TSLD minus logit": self.ce["tsld"] - self.ce["logit"],
        }

        return {name: x[:SHOWN].flatten().tolist() for name, x in columns.items()}

    def changes(self):
        """What TSLD changes on either side of the line, over the whole text."""
        change = self.ce["tsld"] - self.ce["logit"]
        is_sure = self.subject.top > models.SURE
        regions = [change[~is_sure], change[is_sure]]
        means, errors = zip(*map(mean_and_error, regions))

        return {
            "top probability from": (0, models.SURE),
            "tokens": [len(region) for region in regions],
            "mean change": means,
            "standard error": errors,
        }

    def draw(self, left, right):
        tokens = self.tokens()
        top = tokens["top probability"]
        scale = tokens["token scale times N"]
        style = {"s": 3, "cmap": "viridis", "rasterized": True}
        dots = left.scatter(top, tokens["cross-entropy"], c=scale, **style)
        left.figure.colorbar(dots, ax=left, label="token scale times N")
        left.axvline(models.SURE, color="C3")
        left.set(xlabel="teacher's top probability", xlim=(0, 1))
        left.set_ylabel("teacher's cross-entropy, nats")

        for x, region in zip((0.25, 0.75), REGIONS):  # above the dots, not on them
            place = {"transform": left.transAxes, "ha": "center", "color": "C3"}
            left.text(x, 1.02, region, **place)

        changes = self.changes()
        means = changes["mean change"]
        errors = changes["standard error"]
        right.bar(REGIONS, means, yerr=errors, color=COLOURS["tsld"], capsize=4)
        right.axhline(0, color="black", linewidth=0.8)
        right.set_ylabel("cross-entropy, TSLD minus logit, nats")

        title = (
            "Against logit distillation, TSLD changes a token's cross-entropy in nats\n"
        )
        low, high = (
            f"{mean:+.3f} ± {error:.3f} at {region}"
            for region, mean, error in zip(REGIONS, means, errors)
        )

        return f"{title}by {low} and {high}"
