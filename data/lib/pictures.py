"""The pictures of a run's page: HTML and SVG that need no script. Lines are stretched
to the width of the page, and words are not. What a picture shows is said as well."""

import html
import math

BINS = 16  # that a sequence is averaged in

# --------------------------------------------------------------------------------------
# Words and tables

PICTURES = {code: chr(0x2400 + code) for code in range(32)}  # of control characters
PICTURES |= {ord("\n"): "↵", 0x7F: "␡"}


def text(content):
    """A text as HTML that shows it, whatever it is."""
    return html.escape(str(content).translate(PICTURES))


def visible(token):
    """A token as HTML in which blanks can be seen."""
    return text(token).replace(" ", "␣")


def table(head, rows, classes=None):
    """head, rows: HTML of the cells; the first of a row is its heading. A narrow window
    shows the head beside each cell. classes: of the rows."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for n, (first, *others) in enumerate(rows):
        named = zip(others, head[1:] or [""] * len(others), strict=True)
        cells = "".join(f'<td data-head="{name}">{cell}</td>' for cell, name in named)
        kind = classes[n] if classes else ""
        lines.append(f'<tr class="{kind}"><th scope="row">{first}</th>{cells}</tr>')

    body = "".join(lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


# --------------------------------------------------------------------------------------
# 3 and 4. Curves


class Linear:
    """An axis from 0 to the largest value."""

    def __init__(self, values):
        self.top = max([*values, 1e-9])

    def place(self, value):
        """In percent of the axis."""
        return 100 * value / self.top

    def marks(self):
        """About five round numbers."""
        step = 10.0 ** math.floor(math.log10(self.top / 5))
        step *= next(
            factor for factor in (1, 2, 5, 10) if self.top / (step * factor) < 7
        )
        return [n * step for n in range(math.floor(self.top / step + 1e-9) + 1)]


class Logarithmic:
    """An axis from the smallest to the largest value, where equal ratios are equal
    distances. All values are above 0."""

    def __init__(self, values):
        self.low = 0.8 * min(values)
        self.high = max(values)

    def place(self, value):
        return 100 * math.log(value / self.low) / math.log(self.high / self.low)

    def marks(self):
        """1, 2 and 5 times the powers of ten; these alone where they are many, and
        others between them where they are few."""
        first, last = (math.floor(math.log10(v)) for v in (self.low, self.high))
        digits = (1, 2, 5) if last - first < 4 else (1,)
        if self.high < 20 * self.low:
            digits = (1, 1.5, 2, 3, 4, 5, 7)
        powers = range(first, last + 1)
        numbers = [digit * 10.0**power for power in powers for digit in digits]
        return [number for number in numbers if self.low <= number <= self.high]


def plot(drawn, marks, alt, kind="plot"):
    """SVG paths in a field of 100 by 100, y downwards, and the words around it."""
    return (
        f'<div class="{kind}" role="img" aria-label="{alt}">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f"{drawn}</svg>{marks}</div>"
    )


def chart(lines, title, x_name):
    """Lines as a picture, with a legend and the numbers in a table. lines: label ->
    (class, points). title: for those who cannot see it."""
    x_axis = Linear([x for _, points in lines.values() for x, _ in points])
    y_axis = Logarithmic([y for _, points in lines.values() for _, y in points])
    marks, drawn, keys = "", "", ""
    for y in y_axis.marks():
        place = y_axis.place(y)
        marks += f'<span class="y" style="bottom:{place:.2f}%">{y:.4g}</span>'
        drawn += f'<path class="grid" d="M0 {100 - place:.2f}H100"/>'
    for x in x_axis.marks():
        marks += f'<span class="x" style="left:{x_axis.place(x):.2f}%">{x:.4g}</span>'

    for label, (name, points) in lines.items():
        spots = ""
        for x, y in points:
            spots += f" {x_axis.place(x):.2f} {100 - y_axis.place(y):.2f}"
        drawn += f'<path class="{name}" d="M{spots}"/>'
        key = f'<svg viewBox="0 0 20 6"><path class="{name}" d="M0 3H20"/></svg>'
        keys += f"<li>{key}{text(label)}</li>"

    columns = [dict(points) for _, points in lines.values()]
    rows = []
    for x in sorted({x for points in columns for x in points}):
        rows.append([f"{x:g}", *(f"{of[x]:.4f}" if x in of else "" for of in columns)])
    numbers = table([x_name, *map(text, lines)], rows)

    marks += f'<span class="name">{x_name}</span>'
    marks += '<span class="height">KL in nats: lower is nearer to the teacher</span>'
    return (
        f'<figure><ul class="legend">{keys}</ul>'
        f"{plot(drawn, marks, f'{title}. Its numbers follow.')}"
        "<details><summary>The numbers</summary>"
        f'<div class="wide">{numbers}</div></details></figure>'
    )


def curves(students):
    """How far each student is from the teacher, step by step."""
    lines = {}
    for label, curve in students.items():
        # A hue for each loss, dashes for the student without labels.
        loss = label.split()[0]
        is_plain = any(other.startswith(f"{label} + ") for other in students)
        name = f"{loss} dashed" if is_plain else loss
        if len(students) == 1:
            label = name = "student"
        points = [(step, value) for step, value in curve if value and value > 0]
        lines[label] = (name, points or [(0, 1.0)])
    return chart(lines, "Distance to the teacher, in nats", "step")


def positions(numbers):
    """How far rounded teacher and student are from the teacher along a sequence."""
    lines = {}
    for name, label in (("rounded", "rounded teacher"), ("student", "student")):
        lines[label] = (name, averages(numbers[name]))

    title = "Distance to the teacher by position, in nats"
    return chart(lines, title, "position in the sequence")


def averages(values):
    """(place, mean) of neighbours, for a logarithmic axis. values: by position."""
    values = [max(value, 1e-6) for value in values]
    size = math.ceil(len(values) / BINS)
    bins = [values[n : n + size] for n in range(0, len(values), size)]
    return [(n * size + (len(b) + 1) / 2, sum(b) / len(b)) for n, b in enumerate(bins)]


# --------------------------------------------------------------------------------------
# 5. A matrix

CODES = {-1: "minus", 0: "zero", 1: "plus"}


def matrix(found, spikes):
    """A ternary matrix before and after training. spikes: a sentence about both."""
    if found is None:
        return "<p>A weight of 4 bits has 16 values. This picture is of three.</p>"

    rows, columns = found["shape"]
    shared = ""
    if found["granularity"] == "channel":
        shared = " Each row has its own Δ and α, so that the colours overlap; marked "
        shared += "are their means."
    limit = max(found[when]["limit"] for when in ("before", "after"))
    highest = max(max(densities(found[when])) for when in ("before", "after"))

    parts = ""
    for when, of in (("before", "the teacher’s"), ("after", "the student’s")):
        weights = found[when]
        parts += f"<div><h3>{when.capitalize()} training: {of} weights</h3>"
        codes = picture(weights["corner"], found["before"]["corner"], when)
        parts += histogram(weights, limit, highest) + codes + "</div>"

    moved = sum(found["after"]["moved"]) / (rows * columns)
    return (
        f"<p><code>{text(found['name'])}</code> has {rows:,} × {columns:,} weights. "
        "Training keeps all weights in full precision (the histograms, of one scale). "
        "The model computes with three values alone: a weight between −Δ and Δ becomes "
        f"0, any other −α or α.{shared} Orange is −α, grey 0, blue α. {spikes}</p>"
        "<p>Below them are the matrix’s first rows and columns as the model sees them. "
        f"Training moved {moved:.1%} of all its weights to another of the three "
        f'values; here they have a dot.</p><div class="pair">{parts}</div>'
    )


def densities(weights):
    """How many weights there are for each unit of size, by bin."""
    width = 2 * weights["limit"] / len(weights["moved"])
    return [sum(of_codes) / width for of_codes in zip(*weights["counts"])]


def histogram(weights, limit, highest):
    """How often a weight is of a size, and what becomes of it. limit, highest: of the
    axes, which several pictures share."""
    delta, alpha, bins = weights["threshold"], weights["scale"], weights["counts"]
    size = len(bins[0])
    width = 100 * weights["limit"] / limit / size
    unit = 100 / highest * size / (2 * weights["limit"])  # the height of one weight
    drawn, marks = "", ""
    heights = [100.0] * size
    for code in (0, -1, 1):
        bars = ""
        for n, count in enumerate(bins[code + 1]):
            heights[n] -= unit * count  # one code on top of another
            if count:
                corner = f"M{50 + (n - size / 2) * width:.2f} {heights[n]:.2f}"
                bars += f"{corner}h{width:.2f}v{unit * count:.2f}h-{width:.2f}z"
        drawn += f'<path class="fill {CODES[code]}" d="{bars}"/>'

    shares = [sum(counts) / sum(map(sum, bins)) for counts in bins]
    for sign, share in zip(CODES, shares, strict=True):
        place = 50 + 50 * sign * alpha / limit
        name = {-1: "−α", 0: "0", 1: f"α {alpha:.3f}"}[sign]
        drawn += f'<path class="stem" d="M{place:.2f} 100V0"/>'
        words = f"{name}<br>{share:.0%}"
        marks += f'<span class="x" style="left:{place:.2f}%">{words}</span>'
    for sign, name in ((-1, "−Δ"), (1, "Δ")):
        place = 50 + 50 * sign * delta / limit
        drawn += f'<path class="edge" d="M{place:.2f} 100V0"/>'
        value = f" {delta:.3f}" if sign > 0 else ""
        marks += f'<span class="top" style="left:{place:.2f}%">{name}{value}</span>'

    marks += '<span class="name">a weight’s value</span>'
    marks += '<span class="height">number of weights</span>'
    shares = ", ".join(f"{share:.1%}" for share in shares)
    alt = f"Histogram. Delta is {delta:.3g}, alpha {alpha:.3g}; the shares of minus "
    alt += f"alpha, 0 and alpha are {shares}"
    return plot(drawn, marks, alt, "plot low")


def picture(corner, earlier, when):
    """The codes of a matrix's corner as squares, with a dot where they changed."""
    squares = dict.fromkeys(CODES.values(), "")
    dots = ""
    for y, row in enumerate(corner):
        for x, code in enumerate(row):
            squares[CODES[code]] += f"M{x} {y}h1v1h-1z"
            if code != earlier[y][x]:
                dots += f"M{x + 0.3:.1f} {y + 0.3:.1f}h.4v.4h-.4z"
    paths = "".join(f'<path class="fill {n}" d="{d}"/>' for n, d in squares.items())
    paths += f'<path class="dot" d="{dots}"/>'
    alt = f"The codes of the corner {when} training, {dots.count('M')} of them changed"
    box = f"0 0 {len(corner[0])} {len(corner)}"
    attributes = f'viewBox="{box}" role="img" aria-label="{alt}"'
    return f'<svg class="codes" {attributes}>{paths}</svg>'
