"""The page that a run leaves: the numbers of report.json become report.html, which
needs no network, and JavaScript only for what moves."""

import json
import math
import re
from pathlib import Path

from data.lib import files
from data.lib.errors import UserError
from data.lib.pictures import (
    PICTURES,
    curves,
    matrix,
    positions,
    quarters,
    table,
    text,
)
from data.lib.transcript import won_back

FORMAT = 1  # of report.json
PAPERS = 10.0  # the temperature of the paper's experiments
DECADE = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8)
NOTCHES = [digits * power for power in (1, 10, 100) for digits in DECADE]  # of τ
MOST_HURT = 6  # tokens that are listed


def leave_report(out, numbers):
    """Writes report.json and report.html, and says where the page is."""
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
    parts = {
        "title": f"Rounded to {numbers['results'][-1]['bits']} bits, and trained back",
        "sentence": sentence(numbers["results"][-1]),
        "lesson": " ".join(numbers["lesson"]),
        "scores": scores(numbers["results"], numbers["curves"]),
        "curves": curves(numbers["curves"]),
        "sequences": str(numbers["sequences"]),
        "positions": positions(numbers),
        "growth": growths(numbers["rounded"], numbers["student"]),
        "hurt": most_hurt(sequence),
        "matrix": matrix(numbers["matrix"]),
        "begins": texts["title"],
        "prompt": text(texts["prompt"]),
        "texts": continuations(texts),
        "command": text(made["command"]),
        "settings": settings(made["settings"]),
        "others": table([], [[text(k), text(v)] for k, v in made["others"].items()]),
    }
    parts |= of_tokens(sequence, numbers["results"][-1]["loss"])
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    content = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)

    # The name of a file can hold what is no character.
    return content.encode("utf-8", "replace").decode("utf-8")


# --------------------------------------------------------------------------------------
# Words


def bar(share):
    return f'<i class="bar" style="width:{100 * share:.2f}%"></i>'


def perplexity(value):
    return f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def percent(share):
    return f"{share:.1%}"


def temperature(tau):
    return "∞" if math.isinf(tau) else f"{tau:g}"


# --------------------------------------------------------------------------------------
# 1. What happened


def sentence(row):
    """What happened, from a row of results.json."""
    won = won_back(row["teacher_bpb"], row["ptq_bpb"], row["student_bpb"])
    won = f", which wins {won} of the damage back" if won else ""
    packed, whole = row["bytes_packed"] / 1e6, row["bytes_fp32"] / 1e6

    return (
        "A language model was trained, the teacher. "
        f"Rounding its weights to {row['bits']} bits took the perplexity from "
        f"{perplexity(row['teacher_ppl'])} to "
        f'<em class="bad">{perplexity(row["ptq_ppl"])}</em>; '
        "a student, trained with the rounding in place to predict what the teacher "
        "does, has "
        f'<em class="good">{perplexity(row["student_ppl"])}</em>{won}, '
        f"in a file of {packed:,.2f} MB instead of {whole:,.2f} MB."
    )


def scores(results, labels):
    """All models in a table, with a bar for each perplexity."""
    first = results[0]
    models = [("teacher", "teacher", first, first["bytes_fp32"])]
    models.append(("rounded", "ptq", first, first["bytes_packed"]))
    models += [(n, "student", r, r["bytes_packed"]) for n, r in zip(labels, results)]
    units = [u for u in ("accuracy", "acc_norm", "mcc") if f"teacher_{u}" in first]
    longest = max(row[f"{model}_ppl"] for _, model, row, _ in models)

    rows = []
    for name, model, row, size in models:
        ppl = row[f"{model}_ppl"]
        won = ""
        if model == "student":
            won = won_back(row["teacher_bpb"], row["ptq_bpb"], row["student_bpb"])
        cells = [text(name), bar(ppl / longest), perplexity(ppl)]
        cells += [f"{row[f'{model}_{unit}']:.3f}" for unit in units]
        rows.append([*cells, won, f"{size:,}"])

    head = ["model", "", "perplexity", *units, "won back", "bytes"]
    return table(head, rows, [model for _, model, _, _ in models])


# --------------------------------------------------------------------------------------
# 2. The tokens


def of_tokens(sequence, loss):
    """The parts of the page that are about tokens and their weights."""
    tau = float(sequence["temperature"])
    notches = sorted({*NOTCHES, math.inf, tau})
    marks = {notches.index(PAPERS): "the paper’s"}
    own = (
        f"This run’s loss, {loss}, scales no token. Shown is what TSLD would do, with "
    )
    own += "the paper’s τ = 10."
    if sequence["is_scaled"]:
        own = f"This run has τ = {temperature(tau)}."
        is_papers = tau == PAPERS
        marks[notches.index(tau)] = (
            "the paper’s and ours" if is_papers else "this run’s"
        )

    buttons = ""
    for at, words in marks.items():
        place = f'style="--at:{at / (len(notches) - 1):.4f}"'
        side = "above" if notches[at] == PAPERS else "below"
        label = f"{temperature(notches[at])}, {words}"
        buttons += f'<i {place}></i><button type="button" class="{side}" {place} '
        buttons += f'value="{at}">{label}</button>'

    return {
        "own": own,
        "buttons": buttons,
        "last": str(len(notches) - 1),
        "notch": str(notches.index(tau)),
        "lead": text(sequence["lead"]),
        "tokens": shaded(sequence),
        "tokens_alt": extremes(sequence),
        "numbers": for_script(sequence, notches, marks),
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
    words = [
        f"“{text(t.strip())}” {c:.2f}" for t, c in zip(sequence["tokens"], of_token)
    ]

    # A token that comes twice is named once.
    most = ", ".join([*dict.fromkeys(words[n] for n in reversed(order))][:3])
    least = ", ".join([*dict.fromkeys(words[n] for n in order)][:3])
    tau = temperature(float(sequence["temperature"]))
    length = len(sequence["weights"])
    sizes = f"All {length}" if len(order) == length else f"{len(order)} of the {length}"
    start = f"{sizes} tokens that are predicted in one sequence; the grey one is read."
    return f"{start} At τ = {tau} count most: {most}; least: {least}."


def for_script(sequence, notches, marks):
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
        token = text(sequence["tokens"][n])
        row = [f"<bdi>{text(before)}<strong>{token}</strong></bdi>"]
        for model in sequence["models"]:
            guess, share = text(model["guesses"][n][0]), model["shares"][n][0]
            row.append(f"“<bdi>{guess}</bdi>” {percent(share)}")
        rows.append([*row, f"{distances[1][n]:.2f}", f"{distances[2][n]:.2f}"])

    head = ["what came (bold)", "teacher’s guess", "rounded’s", "student’s"]
    return table([*head, "KL, rounded", "KL, student"], rows)


def growths(rounded, student):
    """Whether errors add up along the sequence, in words."""
    first, last = quarters(rounded)
    found = "They do" if last > 1.05 * first else "Here they do not"
    words = f"{found}: the rounded teacher is {first:.2f} nats off in the first quarter"
    words += f" of a sequence and {last:.2f} in the last, the student "
    return words + "{:.3f} and {:.3f}.".format(*quarters(student))


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
        for name, continuation in texts[how].items():
            words = f"<bdi>{text(continuation)}</bdi>"
            parts += f"<div><h4>{text(name)}</h4><p>{words}</p></div>"
        parts += "</div>"
    return parts


def settings(of_models):
    """The fields of both TrainConfigs."""
    names = of_models["teacher"]
    rows = [map(text, [n, *(of[n] for of in of_models.values())]) for n in names]
    return table(["setting", *of_models], rows)
