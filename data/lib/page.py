"""The page that a run leaves: the numbers of report.json become report.html, which
needs no network, and JavaScript only for what moves."""

import json
import math
import re
from pathlib import Path

from data.lib import files, findings
from data.lib.errors import UserError
from data.lib.findings import percent, perplexity, temperature
from data.lib.pictures import (
    PICTURES,
    curves,
    matrix,
    positions,
    table,
    text,
    visible,
)
from data.lib.transcript import sees_labels, won_back

FORMAT = 2  # of report.json
PAPERS = 10.0  # the temperature of the paper's experiments
DECADE = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8)
NOTCHES = [digits * power for power in (1, 10, 100) for digits in DECADE]  # of τ
MOST_HURT = 6  # tokens that are listed


def leave_report(out, numbers):
    """Writes report.json and report.html, and says where the page is."""
    # Six digits are enough. JSON has no infinity.
    numbers = json.loads(
        json.dumps(numbers),
        parse_float=lambda digits: float(f"{float(digits):.6g}"),
        parse_constant=lambda name: 1e300,
    )
    files.write_text(Path(out) / "report.json", json.dumps(numbers) + "\n")
    print(f"report: open {write_page(out)} in a browser")


def write_page(folder):
    """Makes report.html of the report.json in a folder, and returns its path. Raises
    UserError if there is none, and CheckpointError if it is foreign."""
    path = Path(folder) / "report.json"
    numbers = files.read_json(path, None)
    if numbers is None:
        raise UserError(f"{path} is missing: a run leaves it there when it ends")

    with files.refusing(path, "is no report of this version:"):
        if numbers["format"] != FORMAT:
            raise ValueError(f"its format is {numbers['format']}")
        content = make_page(numbers)

    page = path.with_name("report.html")
    files.write_text(page, content)
    return page


def make_page(numbers):
    """The page, from what report.gather returns."""
    sequence, texts, made = numbers["sequence"], numbers["texts"], numbers["made"]
    results, found = numbers["results"], numbers["matrix"]
    last = results[-1]
    values = findings.values_of(last["bits"])
    parts = {
        "title": f"Rounded to {values}, and trained back",
        "sentence": findings.happened(last),
        "lesson": findings.after_all(numbers),
        "scores": scores(results, numbers["curves"]),
        "measured": "the task’s right answers" if last["task"] else "validation text",
        "sizes": findings.sizes(last),
        "doubt": findings.doubt(sequence),
        "curves": curves(numbers["curves"]),
        "watched": f"{numbers['watched']:,}",
        "sequences": str(numbers["sequences"]),
        "positions": positions(numbers),
        "trends": findings.trends(numbers["rounded"], numbers["student"]),
        "hurt": most_hurt(sequence),
        "overlap": findings.overlap(sequence),
        "matrix": matrix(found, findings.spikes(found)),
        "begins": texts["title"],
        "prompt": text(texts["prompt"]),
        "samples": findings.samples(made),
        "texts": continuations(texts),
        "limits": "".join(f"<li>{words}</li>" for words in findings.limits(numbers)),
        "command": text(made["command"]),
        "settings": settings(made["settings"]),
        "others": table([], [[text(k), text(v)] for k, v in made["others"].items()]),
    }
    parts |= of_tokens(sequence, last)
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    content = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)

    # The name of a file can hold what is no character.
    return content.encode("utf-8", "replace").decode("utf-8")


# --------------------------------------------------------------------------------------
# 1. What happened


def bar(share):
    return f'<i class="bar" style="width:{100 * share:.2f}%"></i>'


def scores(results, labels):
    """All models in a table, with a bar for each perplexity. labels: of students."""
    first = results[0]
    models = [("teacher", "teacher", first, first["bytes_fp32"])]
    models.append(("rounded teacher", "ptq", first, first["bytes_packed"]))
    for label, row in zip(labels, results, strict=True):
        models.append((f"student, {label}", "student", row, row["bytes_packed"]))
    units = [u for u in ("accuracy", "acc_norm", "mcc") if f"teacher_{u}" in first]
    longest = max(row[f"{model}_ppl"] for _, model, row, _ in models)

    rows = []
    for name, model, row, size in models:
        ppl = row[f"{model}_ppl"]
        won = ""
        if model == "student":
            won = won_back(row["teacher_bpb"], row["ptq_bpb"], row["student_bpb"])
        cells = [text(name), bar(ppl / longest), perplexity(ppl)]
        cells.append(f"{row[f'{model}_bpb']:.3f}")
        cells += [f"{row[f'{model}_{unit}']:.3f}" for unit in units]
        if "test_teacher_ppl" in first:
            cells.append(perplexity(row[f"test_{model}_ppl"]))
        rows.append([*cells, won, f"{size / 1e6:,.2f}"])

    test = ["test perplexity"] * ("test_teacher_ppl" in first)
    head = ["model", "", "perplexity", "bits/byte", *units, *test, "won back", "MB"]
    return table(head, rows, [model for _, model, _, _ in models])


# --------------------------------------------------------------------------------------
# 2. The tokens


def of_tokens(sequence, row):
    """The parts of the page that are about tokens and their weights. row: the
    student's, of results.json."""
    tau = float(sequence["temperature"])
    notches = sorted({*NOTCHES, math.inf, tau})
    marks = {notches.index(PAPERS): "the paper’s"}
    own = f"This run’s loss, {row['loss']}, scales no token. Shown is what TSLD would "
    own += "do, with the paper’s τ = 10."
    added = ""
    if row["loss"] == "tsld":
        own = f"This run has τ = {temperature(tau)}."
        is_papers = tau == PAPERS
        marks[notches.index(tau)] = (
            "the paper’s and ours" if is_papers else "this run’s"
        )
        if sees_labels(row):
            added = f" + {row['gt_weight']:g} · mean<sub>n</sub>(−log P<sup>S</sup>"
            added += "(true token n))"

    buttons = ""
    for at, words in marks.items():
        place = f'style="--at:{at / (len(notches) - 1):.4f}"'
        side = "above" if notches[at] == PAPERS else "below"
        label = f"{temperature(notches[at])}, {words}"
        buttons += f'<i {place}></i><button type="button" class="{side}" {place} '
        buttons += f'value="{at}">{label}</button>'

    return {
        "own": own,
        "added": added,
        "buttons": buttons,
        "last": str(len(notches) - 1),
        "notch": str(notches.index(tau)),
        "lead": visible(sequence["lead"]),
        "tokens": shaded(sequence),
        "tokens_alt": extremes(sequence),
        "numbers": for_script(sequence, notches, marks, added and row["gt_weight"]),
    }


def counts(sequence):
    """How much each token that is shown counts, on average 1."""
    length = len(sequence["weights"])
    return [length * w for w in sequence["weights"][: len(sequence["tokens"])]]


def shaded(sequence):
    """The tokens, each with what its shade depends on."""
    spans = ""
    for token, count in zip(sequence["tokens"], counts(sequence)):
        spans += f'<span class="t" style="--c:{count:.4f}">{text(token)}</span>'
        spans += "<br>" * token.count("\n")
    return spans


def extremes(sequence):
    """The shades in words."""
    of_token = counts(sequence)
    order = sorted(range(len(of_token)), key=lambda n: of_token[n])
    words = [f"“{visible(t)}” {c:.2f}" for t, c in zip(sequence["tokens"], of_token)]

    # A token that comes twice is named once.
    most = ", ".join([*dict.fromkeys(words[n] for n in reversed(order))][:3])
    least = ", ".join([*dict.fromkeys(words[n] for n in order)][:3])
    tau = temperature(float(sequence["temperature"]))
    length = len(sequence["weights"])
    sizes = f"All {length}" if len(order) == length else f"{len(order)} of the {length}"
    start = (
        f"{sizes} tokens that are predicted in one sequence. The first token of the "
    )
    start += f"text, “{visible(sequence['lead'])}” in grey, is read and not predicted."
    return f"{start} At τ = {tau} count most: {most}; least: {least}."


def for_script(sequence, notches, marks, gt_weight):
    """What the page's script needs, as JSON that may stand in a <script>."""
    models = []
    for model in sequence["models"]:
        guesses = [[t.translate(PICTURES) for t in row] for row in model["guesses"]]
        models.append(model | {"guesses": guesses})

    of_token = counts(sequence)
    content = {
        "ce_teacher": sequence["ce_teacher"],
        "notches": [None if math.isinf(tau) else tau for tau in notches],
        "marks": marks,
        "gt_weight": gt_weight or 0,
        "tokens": [token.translate(PICTURES) for token in sequence["tokens"]],
        "models": models,
        "heaviest": of_token.index(max(of_token)),
    }
    return json.dumps(content).replace("<", "\\u003c")


def most_hurt(sequence):
    """The tokens where the rounded teacher is farthest from the teacher."""
    distances = [model["kl"] for model in sequence["models"]]
    order = sorted(range(len(distances[1])), key=lambda n: -distances[1][n])
    rows = []
    for n in order[:MOST_HURT]:
        before = "".join([sequence["lead"], *sequence["tokens"]][max(0, n - 3) : n + 1])
        token = visible(sequence["tokens"][n])
        row = [f"<bdi>{visible(before)}<mark>{token}</mark></bdi>"]
        for model in sequence["models"]:
            guess, share = visible(model["guesses"][n][0]), model["shares"][n][0]
            row.append(f"“<bdi>{guess}</bdi>” {percent(share)}")
        rows.append([*row, f"{distances[1][n]:.2f}", f"{distances[2][n]:.2f}"])

    head = ["what came (marked)", "teacher’s guess", "rounded’s", "student’s"]
    return table([*head, "KL, rounded", "KL, student"], rows)


# --------------------------------------------------------------------------------------
# 6 and 7. Texts, and how it was made


def continuations(texts):
    """What each model makes of the prompt."""
    parts = ""
    for how, title in (
        ("greedy", "The likeliest token each time"),
        ("sampled", "Drawn from the 200 likeliest, temperature 0.8"),
    ):
        parts += f'<h3>{title}</h3><div class="three">'
        names = ("teacher", "rounded teacher", "student")
        for name, continuation in zip(names, texts[how].values(), strict=True):
            words = f"<bdi>{text(continuation)}</bdi>"
            parts += f"<div><h4>{name}</h4><p>{words}</p></div>"
        parts += "</div>"
    return parts


def settings(of_models):
    """The fields of both TrainConfigs."""
    names = of_models["teacher"]
    rows = [map(text, [n, *(of[n] for of in of_models.values())]) for n in names]
    return table(["setting", *of_models], rows)
