"""The map as a picture."""

import collections
import importlib.util
import statistics

from data.evidence.map.mixes import LABELS_ALONE, MIXES, TEACHERS
from data.evidence.map.tables import pairs

COLOURS = {0.0: "tab:blue", 1 / 16: "tab:cyan", 1 / 4: "tab:orange", 1.0: "tab:red"}
LABELS_ALONE_STYLE, UNSCALED_STYLE, SCALED_STYLE = ":", "--", "-"
STUDENT = (2, "tensor", 16)  # bits, what shares a scale, epochs: of what is drawn


def draw(groups, path):
    """Draws both halves, where matplotlib is installed. groups: of tables.grouped."""
    if not importlib.util.find_spec("matplotlib"):
        print(f"the package matplotlib would draw {path}")
        return

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.5), layout="constrained"
    )
    draw_labels(left, groups)
    draw_token_scale(right, pairs(groups))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def drawn(groups, mix):
    """The teacher's epochs to the group of a mix, in order."""
    found = {}
    for (setting, of_group), group in groups.items():
        if of_group == mix and setting[:3] == STUDENT:
            found[setting[3]] = group

    return dict(sorted(found.items()))


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0


def draw_labels(axes, groups):
    """Left: the student's perplexity minus its teacher's, over how far the teacher has
    learned."""
    teachers = collections.defaultdict(dict)  # epochs -> seed -> perplexity
    for mix in [*MIXES, LABELS_ALONE]:
        distances = {}
        for epochs, found in drawn(groups, mix).items():
            if epochs in TEACHERS:
                for row in found:
                    teachers[epochs][row["seed"]] = row["teacher_valid_ppl"]
                distances[epochs] = [
                    row["student_valid_ppl"] - row["teacher_valid_ppl"] for row in found
                ]

        _, temperature, weight = mix
        style = SCALED_STYLE if temperature else UNSCALED_STYLE
        if mix == LABELS_ALONE:
            style = LABELS_ALONE_STYLE
        means = [statistics.mean(values) for values in distances.values()]
        spreads = [spread(values) for values in distances.values()]
        look = {
            "color": COLOURS.get(weight, "black"),
            "linestyle": style,
            "marker": "o",
        }
        axes.errorbar(list(distances), means, spreads, **look, markersize=3, capsize=2)

    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = {n: statistics.mean(teachers[n].values()) for n in sorted(teachers)}
    axes.set_xticks(list(ticks), [f"{n}\n({x:.1f})" for n, x in ticks.items()])
    axes.minorticks_off()
    axes.set_xlabel(
        "epochs of the teacher on the student's text (its validation perplexity)"
    )
    axes.set_ylabel("perplexity, student minus teacher")
    title = "The ground truth helps a student whose teacher\n"
    title += "has not finished learning its text"
    axes.set_title(title, fontsize=9)

    # Colours are weights, styles are token scales.
    looks = {f"ground truth · {x:g}": {"color": COLOURS[x]} for x in COLOURS}
    looks["ground truth alone"] = {"color": "black", "linestyle": LABELS_ALONE_STYLE}
    looks["no token scale"] = {"color": "black", "linestyle": UNSCALED_STYLE}
    looks["token scale, τ = 10"] = {"color": "black", "linestyle": SCALED_STYLE}
    lines = [axes.plot([], [], **look)[0] for look in looks.values()]
    axes.legend(lines, list(looks), fontsize=8)


def draw_token_scale(axes, both_of):
    """Right: what the token scale changes, over how sure the teacher is. both_of: of
    tables.pairs."""
    sure_of = {}  # the teacher's epochs -> its share of sure tokens, %
    for temperature, style, marker in ((10.0, "-", "o"), (2.0, ":", "v")):
        for weight in (0.0, 1 / 4):
            points = []
            for epochs, both in drawn(both_of, ("tsld", temperature, weight)).items():
                ratios = [
                    x["student_valid_ppl"] / y["student_valid_ppl"] for x, y in both
                ]
                changes = [100 * (ratio - 1) for ratio in ratios]
                sure = 100 * statistics.mean(row["teacher_sure"] for row, _ in both)
                points.append((sure, statistics.mean(changes), spread(changes)))
                sure_of.setdefault(epochs, sure)

            if points:
                label = f"τ = {temperature:g}, ground truth · {weight:g}"
                look = {"color": COLOURS[weight], "linestyle": style, "marker": marker}
                axes.errorbar(
                    *zip(*points), **look, label=label, markersize=4, capsize=2
                )

    below = axes.get_xaxis_transform()
    for epochs, sure in sure_of.items():
        axes.text(sure, 0.02, f"{epochs}", transform=below, ha="center", fontsize=8)
    if sure_of:
        axes.legend(fontsize=8)
    axes.margins(y=0.12)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("tokens of the student's text that its teacher is sure of, %")
    axes.set_ylabel("change of perplexity by the token scale, %")
    title = "At τ = 2 the token scale helps where the teacher is sure of most tokens\n"
    title += "(mean and spread of the seeds' changes; below: the teacher's epochs)"
    axes.set_title(title, fontsize=9)
