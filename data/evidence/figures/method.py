"""Figure 0: what each loss wins back, and how much TSLD makes each token count."""

import collections
import statistics

import tsld
from data.evidence.figures.common import COLOURS, NAMES, Figure
from data.evidence.rows import EVIDENCE
from data.lib.files import read_json

TABLE = EVIDENCE / "table1" / "table.json"
BARS = {"teacher": "teacher (FP32)", "ternarized": "rounded, untrained"}
BARS |= {
    loss: f"student: {NAMES[loss]}"
    for loss in ("gt", "l2l", "logit_gt", "logit", "tsld")
}
LINE_TOKENS = range(12, 41)  # of the line that is shown
LINE_WIDTH = 46  # characters of its drawing


class Method(Figure):
    name = "0-method"
    size = (11, 4.2)
    widths = (2, 3)

    def tables(self):
        return {"0-sentence": self.sentence()}

    def sentence(self):
        """The tokens of the first whole line in the validation text of 12 to 40 tokens
        and no <unk>, what the teacher gave each of them, and how much TSLD makes it
        count: N times its weight."""
        subject = self.subject
        decode = subject.setup.source.tokenizer.decode
        scale = tsld.token_scale(subject.ce, subject.setup.student.temperature)

        for block, ids in enumerate(subject.targets.tolist()):
            words = [decode([token]) for token in ids]
            ends = [n for n, word in enumerate(words) if "\n" in word]

            for before, end in zip(ends, ends[1:]):
                line = slice(before + 1, end)
                tokens = words[line]

                if len(tokens) in LINE_TOKENS and "unk" not in "".join(tokens):
                    probability = (-subject.ce[block, line]).exp()
                    count = len(words) * scale[block, line]
                    return {
                        "token": tokens,
                        "probability": probability.tolist(),
                        "count": count.tolist(),
                    }

        return {"token": [], "probability": [], "count": []}

    def draw(self, left, right):
        draw_bars(left, bars_of_table(self.subject.setup))
        draw_sentence(right, **self.sentence())
        return ""


def bars_of_table(setup):
    """Name to the validation perplexities that table 1 has of it at 2 bits, with this
    run's settings and any seed: of the teacher with the most such rows."""
    of_run = {"teacher_steps": setup.teacher.steps}
    of_run["student_tokens"] = len(setup.tokens["student"])
    student = {"bits": 2, "gt_weight": 0.0}
    for key in ("steps", "lr", "temperature", "batch_size"):
        student[key] = getattr(setup.student, key)

    of_teacher = collections.defaultdict(list)
    for row in read_json(TABLE, []):
        is_untrained = row["method"] in ("teacher", "ternarized")
        wanted = of_run if is_untrained else of_run | student
        if wanted.items() <= row.items():
            of_teacher[row["teacher"]].append(row)

    bars = collections.defaultdict(list)
    for row in max(of_teacher.values(), key=len, default=[]):
        bars[row["method"]].append(row["valid_ppl"])

    return bars


def draw_bars(axis, bars):
    shown = [name for name in BARS if name in bars]
    places = range(len(shown), 0, -1)
    longest = 1

    for place, name in zip(places, shown):
        values = bars[name]
        mean = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axis.barh(place, mean, xerr=spread, color=COLOURS.get(name, "C7"), capsize=3)
        axis.text(mean + spread, place, f"  {mean:.1f}", va="center", fontsize=9)
        longest = max(longest, mean)

    axis.set(yticks=places, yticklabels=[BARS[name] for name in shown])
    axis.set(xlim=(0, 1.25 * longest), xlabel="validation perplexity")
    axis.set_title("what a loss wins back")


def draw_sentence(axis, token, probability, count):
    """Tokens in lines as they are read, shaded by what they count, the teacher's
    probability below."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    shade = Normalize(min(count, default=0), max(count, default=1))
    colours = colormaps["YlGn"]

    x = 0.0
    y = 0
    for word, p, weight in zip(token, probability, count):
        word = word.strip()
        size = max(len(word), 3) + 1.5  # in characters

        if x + size > LINE_WIDTH:
            x = 0.0
            y -= 1

        ink = "white" if shade(weight) > 0.6 else "black"
        text = {"ha": "center", "va": "center", "family": "monospace", "color": ink}
        middle = x + size / 2 - 0.15
        percent = f"{p:.2f}" if p >= 0.01 else "<.01"
        box = Rectangle((x, y), size - 0.3, 0.75, color=colours(shade(weight)))
        axis.add_patch(box)
        axis.text(middle, y + 0.5, word, fontsize=10, **text)
        axis.text(middle, y + 0.17, percent, fontsize=7, **text)
        x += size

    axis.set(xlim=(0, LINE_WIDTH), ylim=(y - 0.2, 1), xticks=[], yticks=[])
    title = "how much TSLD makes a token count; below: the teacher's probability"
    axis.set_title(title, fontsize=11)
    label = "N · w_n: 1 is what it counts without scaling"
    axis.figure.colorbar(ScalarMappable(shade, colours), ax=axis, label=label)
