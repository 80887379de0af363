"""The map's rows as tables.

Rows are grouped by (setting, mix): bits, granularity, the student's and the teacher's
epochs; loss, temperature and the ground truth's weight. A group has a row per seed."""

import collections
import statistics
from operator import itemgetter

from data.evidence import rows
from data.evidence.map import mixes
from data.evidence.map.mixes import LABELS_ALONE, MIXES, OPTQ, OTHERS, TABLE_1, WEIGHTS
from data.evidence.rows import Table

COLUMNS = ["bits", "a scale per", "epochs", "teacher's epochs"]  # of a setting


def grouped(found):
    """(setting, mix) -> the rows of its seeds."""
    groups = collections.defaultdict(list)
    for row in found:
        setting = itemgetter(*mixes.SETTING)(row)
        mix = itemgetter(*mixes.MIX)(row)
        groups[setting, mix].append(row)

    return groups


def pairs(groups):
    """(setting, mix with a token scale) -> pairs of one seed: a row, and its twin
    without the token scale."""
    found = {}
    for (setting, mix), with_scale in groups.items():
        loss, temperature, weight = mix
        without_scale = groups.get((setting, (loss, None, weight)), [])
        twins = {row["seed"]: row for row in without_scale}
        both = [(row, twins[row["seed"]]) for row in with_scale if row["seed"] in twins]
        if temperature is not None and both:
            found[setting, mix] = both

    return found


def page(groups):
    makers = (table_of_weights, table_of_changes, table_of_temperatures, table_1)
    return rows.page("map.regimes draw", [make(groups) for make in makers])


def perplexity(groups, setting, mix, part="valid"):
    """A cell: of the students of a mix, over the seeds."""
    return rows.over_seeds(groups.get((setting, mix), []), f"student_{part}_ppl")


def table_of_weights(groups):
    """The students by the ground truth's weight, without token scale and with it."""
    lines = []
    for setting in sorted({setting for setting, mix in groups if mix in MIXES}):
        of_setting = [row for key in groups if key[0] == setting for row in groups[key]]
        shares = {row["seed"]: row["teacher_sure"] for row in of_setting}
        teacher = [
            rows.over_seeds(of_setting, "teacher_train_ppl"),
            f"{statistics.mean(shares.values()):.0%}",
            rows.over_seeds(of_setting, "teacher_valid_ppl"),
            rows.over_seeds(of_setting, "rounded_valid_ppl"),
        ]
        others = [
            perplexity(groups, setting, LABELS_ALONE),
            perplexity(groups, setting, TABLE_1["L2L+logit"]),
        ]

        head = [*setting, *teacher]
        for temperature, name in ((None, "no"), (10.0, "τ = 10")):
            of_scale = [("tsld", temperature, weight) for weight in WEIGHTS]
            cells = [perplexity(groups, setting, mix) for mix in of_scale]
            if any(cells):
                lines.append([*head, name, *cells, *others])
            head = [""] * len(head)
            others = ["", ""]

    columns = [*COLUMNS, "on its own text", "sure of", "teacher", "rounded"]
    columns += ["token scale", *WEIGHTS.values(), "labels alone", "L2L+logit"]
    text = (
        "Validation perplexity: mean ± standard deviation over the seeds (their "
        "number). On its own text: the teacher's perplexity on the 100,000 tokens that "
        "it was fine-tuned on. Sure of: the share of them for which it finds one next "
        "token likelier than all others together. The weights are the ground truth's."
    )

    return Table("When the ground truth helps", text, columns, lines)


def table_of_changes(groups):
    """What the token scale changes."""
    both_of = pairs(groups)
    teachers = sorted({setting[3] for setting, _ in both_of})

    cells = collections.defaultdict(dict)
    for (setting, (_, temperature, weight)), both in both_of.items():
        changes = [
            row["student_valid_ppl"] - twin["student_valid_ppl"] for row, twin in both
        ]
        cell = f"{statistics.mean(changes):+.2f}"

        if len(changes) > 1:
            error = statistics.stdev(changes) / len(changes) ** 0.5
            cell += f" ± {error:.2f}"

        ahead = sum(change < 0 for change in changes)
        *student, teacher_epochs = setting
        line = (*student, temperature, weight)
        cells[line][teacher_epochs] = f"{cell}, {ahead} of {len(changes)}"

    lines = []
    for line in sorted(cells):
        *student, temperature, weight = line
        of_teachers = [cells[line].get(epochs, "") for epochs in teachers]
        lines.append([*student, f"{temperature:g}", f"{weight:g}", *of_teachers])

    columns = [*COLUMNS[:3], "τ", "ground truth"]
    columns += [f"teacher of {epochs}" for epochs in teachers]
    text = (
        "Validation perplexity with the token scale minus without it, over pairs of "
        "one seed: mean ± standard error, and in how many of the pairs it is ahead. "
        "The columns are the teachers, by their epochs."
    )

    return Table("When the token scale helps", text, columns, lines)


def table_of_temperatures(groups):
    """The perplexities where other temperatures than 10 were tried."""
    temperatures = (1.0, 2.0, 5.0, 10.0, 20.0, None)

    lines = []
    for setting in sorted({setting for setting, mix in groups if mix in OTHERS}):
        for weight in (0.0, 1 / 4):
            of_weight = [("tsld", temperature, weight) for temperature in temperatures]
            cells = [perplexity(groups, setting, mix) for mix in of_weight]
            if any(cells):
                lines.append([*setting, f"{weight:g}", *cells])

    columns = [*COLUMNS, "ground truth"]
    columns += [f"τ = {temperature:g}" for temperature in temperatures[:-1]] + ["∞"]
    text = "Validation perplexity, as above; ∞ is no token scale."

    return Table("The token scale's temperature", text, columns, lines)


def table_1(groups):
    """The paper's table 1."""
    places = []  # bits and granularity, each with two columns
    cells = collections.defaultdict(dict)  # mix -> place -> its two cells
    for bits, granularity, epochs, teachers, of_part in mixes.TABLE_1_PARTS:
        place = bits, granularity
        if place not in places:
            places.append(place)
        setting = bits, granularity, epochs, teachers[0]

        for mix in of_part:
            valid = perplexity(groups, setting, mix)
            test = perplexity(groups, setting, mix, "test")
            cells[mix][place] = [valid, test]

    lines = []
    for name, mix in {"OPTQ": OPTQ, **TABLE_1}.items():
        line = [name]
        for place in places:
            line += cells[mix].get(place, ["", ""])
        lines.append(line)

    columns = ["method"]
    for bits, granularity in places:
        columns += [f"{bits} bits, a scale per {granularity}", "test"]
    text = "Validation and test perplexity of the students of the teacher of 12 epochs."

    return Table("Table 1 in this regime", text, columns, lines)
