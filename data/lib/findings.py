"""What a run found and what it did not, in sentences for its page. Each is chosen by
the run's numbers, and says no more than they do."""

import math
from statistics import StatisticsError, correlation

from data.lib.pictures import averages, text, visible
from data.lib.transcript import (
    lesson_of_better,
    lessons_of_pairs,
    sees_labels,
    won_back,
)

GATHERED = 1.2  # times as many weights near the threshold as before are a spike


def perplexity(value):
    return f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def percent(share):
    return "less than 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def temperature(tau):
    return "∞" if math.isinf(tau) else f"{tau:g}"


def listing(words):
    """a; a and b; a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# --------------------------------------------------------------------------------------
# What happened


def values_of(bits):
    return f"{'three' if bits == 2 else 2**bits} values"


def happened(row):
    """What happened, from a row of results.json."""
    ternary = "ternary, " if row["bits"] == 2 else ""
    task = "what the teacher does"
    if row["loss"] == "gt":
        task = "the text, without its teacher"
    elif sees_labels(row):
        task += ", and the text as well"

    won = won_back(row["teacher_bpb"], row["ptq_bpb"], row["student_bpb"])
    won = f", which wins {won} of the damage back" if won else ""
    if won and row["student_bpb"] > row["ptq_bpb"]:
        won = ", which is worse still"

    whole = row["bytes_fp32"] / 1e6
    return (
        "A language model was trained, the teacher. Rounding the weights of its layers "
        f"to {values_of(row['bits'])} ({ternary}{row['bits']} bits each) took the "
        f"perplexity from {perplexity(row['teacher_ppl'])} to "
        f'<em class="bad">{perplexity(row["ptq_ppl"])}</em>; '
        f"a student, trained with the rounding in place to predict {task}, has "
        f'<em class="good">{perplexity(row["student_ppl"])}</em>{won}. '
        f"Its file has {row['bytes_packed'] / 1e6:,.2f} MB; the teacher has "
        f"{whole:,.2f} MB in 32 bits a number and would have {whole / 2:,.2f} in 16."
    )


def after_all(numbers):
    """How the student compares with its teacher, and which student it is."""
    lines = [
        line.replace("'", "’") for line in lesson_of_better(numbers["results"][-1])
    ]
    student, rounded = (
        sum(numbers[name]) / len(numbers[name]) for name in ("student", "rounded")
    )
    lines.append(
        f"The student’s predictions are {student:.3g} nats from the teacher’s, and the "
        f"rounded teacher’s {rounded:.3g} (KL, a mean over validation text)."
    )
    if len(numbers["results"]) > 1:
        lines.append("The student is the last one of the table, here and below.")
    return " ".join(lines)


def sizes(row):
    """What the bytes of the student's file are."""
    matrices = row["linear_bytes_packed"]
    rest = row["bytes_packed"] - matrices
    return (
        f"In the student’s file they take {matrices:,} bytes, "
        f"{row['linear_bytes_fp32'] / matrices:.0f} times less than in 32 bits; the "
        f"other {rest:,} are mostly the embedding, in 16 bits."
    )


# --------------------------------------------------------------------------------------
# The tokens


def doubt(sequence):
    """The token that counts most, and what the teacher expected there."""
    shown = sequence["weights"][: len(sequence["tokens"])]
    heaviest = shown.index(max(shown))
    token, teacher = sequence["tokens"][heaviest], sequence["models"][0]
    guess, share = teacher["guesses"][heaviest][0], teacher["shares"][heaviest][0]
    words = f"The token that counts most here, “<bdi>{visible(token)}</bdi>”, had a "
    words += f"probability of {percent(teacher['true'][heaviest])} for the teacher, "
    if guess == token:
        return f"{words}and was still its likeliest."
    return f"{words}which expected “<bdi>{visible(guess)}</bdi>” ({percent(share)})."


def overlap(sequence):
    """Whether the tokens that count most are those where rounding hurts."""
    distances = sequence["models"][1]["kl"]
    surprise = sequence["ce_teacher"][: len(distances)]
    try:
        r = correlation(surprise, distances)
    except StatisticsError:  # one token, or the same number for all
        return ""

    found = "Here the tokens that count more are hurt more, as a tendency."
    if r < 0:
        found = "Here the tokens that count more are hurt less, as a tendency."
    if abs(r) < 2 / math.sqrt(len(distances)):
        found = "That is no more than chance makes of so few, and no sign that TSLD "
        found += "weighs most where rounding hurts most."
    return (
        "TSLD’s weights know nothing of rounding. The correlation of the teacher’s "
        "surprise, −log P<sup>T</sup>(true token), with the rounded teacher’s distance "
        f"is {r:.2f}, over {len(distances)} tokens. {found}"
    )


# --------------------------------------------------------------------------------------
# Along the sequence


def trend(values, digits):
    """Whether a distance rises or falls along the sequence. values: by position."""
    if len(values) < 8:
        return "has too few places for a trend"

    ends = [n * len(values) // 4 for n in range(5)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(ends, ends[1:])]
    words = listing([f"{mean:.{digits}f}" for mean in means])
    points = [y for _, y in averages(values)]
    high, low = (points.index(end(points)) * 4 // len(points) for end in (max, min))

    steps = [after - before for before, after in zip(means, means[1:])]
    if min(steps) > 0 and (low, high) == (0, 3):
        return f"rises from quarter to quarter of the sequence: {words}"
    if max(steps) < 0 and (low, high) == (3, 0):
        return f"falls from quarter to quarter of the sequence: {words}"
    return (
        f"has no clear trend: the quarters of the sequence have {words}, and the "
        f"highest of the points below, {max(points):.{digits}f}, lies in the "
        f"{ORDER[high]}"
    )


ORDER = ("first", "second", "third", "last")


def trends(rounded, student):
    return (
        f"Here the rounded teacher’s distance {trend(rounded, 2)}. The student’s "
        f"{trend(student, 3)}."
    )


# --------------------------------------------------------------------------------------
# The matrix


def beside_threshold(weights):
    """Of a matrix's weights, the share that stands in the bars beside ±Δ; of these, and
    of all others, the share that had another code at first."""
    size = len(weights["moved"]) // 2
    edge = round(weights["threshold"] / weights["limit"] * size)
    bars = {size + edge - 1, size + edge, size - edge - 1, size - edge}

    there, everywhere = [0, 0], [0, 0]  # weights, and those that moved
    of_bars = zip(map(sum, zip(*weights["counts"])), weights["moved"], strict=True)
    for n, pair in enumerate(of_bars):
        for k, count in enumerate(pair):
            everywhere[k] += count
            there[k] += count if n in bars else 0

    elsewhere = [a - b for a, b in zip(everywhere, there)]
    shares = [moved / max(1, count) for count, moved in (there, elsewhere)]
    return there[0] / everywhere[0], *shares


def spikes(found):
    """What the spikes at ±Δ are, if there are any."""
    if found is None or found["granularity"] != "tensor":
        return ""

    before, _, _ = beside_threshold(found["before"])
    after, near, others = beside_threshold(found["after"])
    words = f"In the four bars beside −Δ and Δ stand {before:.1%} of the weights "
    words += f"before training and {after:.1%} after it"
    if after < GATHERED * before:
        return f"{words}."

    words += f": the spikes. Of these {near:.1%} have another of the three values than "
    words += f"before, of all others {others:.1%}."
    if near <= others:
        return words
    return (
        f"{words} A likely reason: where 0 is too small for a weight and α too large, "
        "training pushes it across Δ and back."
    )


# --------------------------------------------------------------------------------------
# What it does not show


def samples(made):
    """How to read samples of text."""
    words = "Compare with the teacher’s text, not with good English"
    if made["parameters"] < 1e7:
        words += f": a model of {made['parameters']:,} parameters writes little of it"
    return (
        f"{words}. Look for loops, the same again and again. "
        "Line breaks are shown as blanks."
    )


def limits(numbers):
    """What this run does not show, in HTML sentences."""
    made, results = numbers["made"], numbers["results"]
    last, tokens = results[-1], made["tokens"]
    one = "one seed" if len(results) == 1 else f"one seed for {len(results)} students"
    of_what = "the task’s examples" if last["task"] else "validation text"
    lines = [
        f"One model of {made['parameters']:,} parameters (the paper’s have 0.1 to 7 "
        f"billion), {one} ({last['seed']}; the teacher’s {last['teacher_seed']}), "
        f"{tokens['valid']:,} tokens of {of_what}. Another seed gives other "
        "numbers, and one run cannot say how far they lie apart.",
        without_controls({row["loss"] for row in results}),
        *map(text, lessons_of_pairs(results)),
    ]

    part = f"the first {tokens['student']:,} of the teacher’s {tokens['train']:,}"
    if tokens["student"] == tokens["train"]:
        part = f"the teacher’s {tokens['train']:,}"
    before = " and its pretraining" if made["init"] == "pretrained" else ""
    lines.append(
        f"A student’s text is {part} training tokens. It reads {made['read'][1]:,} "
        f"tokens in training, after the teacher’s {made['read'][0]:,}{before}. No "
        "teacher was trained for so much longer, so the page cannot say what that "
        "alone does."
    )
    return lines


CONTROLS = {
    "tsld": "TSLD",
    "logit": "logit distillation without the token scale",
    "gt": "the true tokens alone",
}


def without_controls(losses):
    """losses: that there are students of."""
    missing = [words for loss, words in CONTROLS.items() if loss not in losses]
    if not missing:
        return (
            "There are students with and without the token scale and one without a "
            "teacher’s help. What differs between two of them may be chance."
        )
    students = "No student was trained with " + ", and none with ".join(missing)
    return (
        f"{students}. So the page shows what training won back, and not that "
        "one loss is better than another. <code>--loss all</code> trains them all."
    )
