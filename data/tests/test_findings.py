"""data/lib/findings.py: the sentences of a run's page, each by numbers made by hand."""

import math

import pytest

from data.lib import findings
from data.lib.transcript import lessons_of_pairs

# --------------------------------------------------------------------------------------
# What happened


def result(**changes):
    """A row of results.json: rounding costs a bit a byte, a student wins half back."""
    row = {"loss": "tsld", "gt_weight": 0.25, "bits": 2, "task": None}
    row |= {"teacher_ppl": 40.0, "ptq_ppl": 1234.5, "student_ppl": 50.0}
    row |= {"teacher_bpb": 2.0, "ptq_bpb": 3.0, "student_bpb": 2.5}
    row |= {"bytes_fp32": 3_000_000, "bytes_packed": 700_000}
    row |= {"linear_bytes_fp32": 1_600_000, "linear_bytes_packed": 100_000}
    return row | {"seed": 3, "teacher_seed": 4} | changes


def test_what_happened_is_said_in_numbers():
    words = findings.happened(result())
    assert (
        "to three values (ternary, 2 bits each) took the perplexity from 40.0" in words
    )
    assert ">1,234.5</em>" in words and ">50.0</em>, which wins 50% of the" in words
    assert "file has 0.70 MB; the teacher has 3.00 MB in 32 bits" in words
    assert words.endswith("and would have 1.50 in 16.")
    assert "to 16 values (4 bits each)" in findings.happened(result(bits=4))


@pytest.mark.parametrize(
    "changes, task",
    [
        ({}, "what the teacher does, and the text as well, has"),
        ({"gt_weight": 0.0}, "what the teacher does, has"),
        ({"loss": "l2l", "gt_weight": None}, "what the teacher does, has"),
        (
            {"loss": "logit_gt", "gt_weight": None},
            "what the teacher does, and the text as well",
        ),
        ({"loss": "gt", "gt_weight": None}, "the text, without its teacher, has"),
    ],
)
def test_it_is_said_what_the_student_was_trained_to_predict(changes, task):
    assert f"to predict {task}" in findings.happened(result(**changes))


@pytest.mark.parametrize(
    "scores, words",
    [
        ({"student_bpb": 1.9}, "</em>, which wins 110% of the damage back. Its"),
        ({"student_bpb": 3.0}, "</em>, which wins 0% of the damage back. Its"),
        ({"student_bpb": 3.1}, "</em>, which is worse still. Its"),
        ({"ptq_bpb": 2.01}, "</em>. Its"),  # rounding cost too little to win back
    ],
)
def test_what_was_won_back_can_be_more_than_all_or_less_than_nothing(scores, words):
    assert words in findings.happened(result(**scores))


def test_the_bytes_of_the_matrices_are_told_from_those_of_all_else():
    words = findings.sizes(result())
    assert "take 100,000 bytes, 16 times less" in words
    assert "the other 600,000 are mostly" in words


def test_how_far_the_student_is_from_the_teacher_is_said_whatever_its_perplexity():
    numbers = {"results": [result()], "student": [0.1, 0.3], "rounded": [1.0, 2.0]}
    words = findings.after_all(numbers)
    assert words.startswith("The student’s predictions are 0.2 nats from the teacher’s")
    assert "rounded teacher’s 1.5 " in words
    assert "last one of the table" not in words

    numbers["results"] = [result(), result(student_ppl=39.0)]
    words = findings.after_all(numbers)
    assert words.startswith("On the validation text the student’s perplexity is lower")
    assert words.endswith("The student is the last one of the table, here and below.")


# --------------------------------------------------------------------------------------
# The tokens


def sequence(**changes):
    """Two tokens, of which the second one counts more."""
    teacher = {"true": [0.5, 0.0001], "guesses": [["a"], ["<"]]}
    teacher["shares"] = [[0.5], [0.62]]
    made = {"tokens": ["a", " b"], "weights": [0.4, 0.6], "ce_teacher": [0.7, 9.2]}
    models = [teacher | changes, {"kl": [0.0, 0.0]}]
    return made | {"models": models}


def test_the_heaviest_token_is_named_with_what_the_teacher_expected():
    words = findings.doubt(sequence())
    assert "“<bdi>␣b</bdi>”, had a probability of less than 0.1% for" in words
    assert words.endswith("which expected “<bdi>&lt;</bdi>” (62.0%).")


def test_the_heaviest_token_can_be_the_teachers_likeliest():
    words = findings.doubt(sequence(guesses=[["a"], [" b"]], true=[0.9, 0.25]))
    assert (
        "a probability of 25.0% for the teacher, and was still its likeliest." in words
    )


def of_distances(surprise, distances):
    models = [{}, {"kl": distances}]
    return findings.overlap({"ce_teacher": surprise, "models": models})


def test_whether_heavy_tokens_are_hurt_is_said_only_beyond_chance():
    surprise = [float(n % 10) for n in range(100)]
    more = [2 * s + n % 3 for n, s in enumerate(surprise)]
    assert "hurt more, as a tendency" in of_distances(surprise, more)
    assert "hurt less, as a tendency" in of_distances(surprise, [-d for d in more])

    # Every surprise has every distance: the correlation is 0.
    words = of_distances(surprise, [float(n // 10) for n in range(100)])
    assert "is 0.00, over 100 tokens" in words
    assert "no more than chance" in words and "tendency" not in words


def test_three_tokens_show_no_tendency_and_equal_ones_no_correlation():
    words = of_distances([0.0, 1.0, 2.0, 7.0], [0.0, 1.0, 2.0])  # three are shown
    assert "is 1.00, over 3 tokens" in words and "no more than chance" in words
    assert of_distances([1.0, 1.0], [1.0, 2.0]) == ""
    assert of_distances([1.0], [1.0]) == ""


# --------------------------------------------------------------------------------------
# Along the sequence


def test_a_distance_that_rises_in_every_quarter_and_ends_highest_rises():
    words = findings.trend([1, 1, 2, 2, 3, 3, 4, 4], 1)
    assert (
        words == "rises from quarter to quarter of the sequence: 1.0, 2.0, 3.0 and 4.0"
    )
    words = findings.trend([4, 4, 3, 3, 2, 2, 1, 1], 0)
    assert words == "falls from quarter to quarter of the sequence: 4, 3, 2 and 1"


@pytest.mark.parametrize(
    "values, high",
    [
        ([5, 0, 3, 3, 4, 4, 4, 5], "5.0, lies in the first"),  # the quarters rise
        ([1, 1, 3, 3, 2, 2, 4, 4], "4.0, lies in the last"),
        ([2, 2, 1, 3, 3, 2, 3, 4], "4.0, lies in the last"),  # 1 is the lowest
        ([4, 0, 1, 1, 1, 1, 0, 0], "4.0, lies in the first"),  # two quarters are equal
        ([1, 1, 1, 1, 1, 1, 1, 1], "1.0, lies in the first"),
    ],
)
def test_a_trend_that_any_point_contradicts_is_none(values, high):
    words = findings.trend(values, 1)
    assert words.startswith("has no clear trend: the quarters of the sequence have ")
    assert words.endswith(f"the highest of the points below, {high}")


def test_of_few_places_no_trend_is_said():
    assert findings.trend([1, 2, 3, 4, 5, 6, 7], 1) == "has too few places for a trend"


def test_both_models_have_a_trend_of_their_own():
    words = findings.trends([1, 1, 2, 2, 3, 3, 4, 4], [1.0] * 8)
    assert "rounded teacher’s distance rises from quarter" in words
    assert "The student’s has no clear trend" in words


# --------------------------------------------------------------------------------------
# The matrix


def matrix(beside, moved_beside, moved_elsewhere, granularity="tensor"):
    """Histograms of 100 weights in ten bins, with ±Δ at two bins from 0."""

    def weights(beside, moved_beside, moved_elsewhere):
        rest = (100 - 4 * beside) / 2
        bars = [0, rest, beside, beside, 0, 0, beside, beside, rest, 0]
        moved = [0, moved_elsewhere, moved_beside] + 7 * [0]
        counts = [bars[:3] + 7 * [0], 3 * [0] + bars[3:7] + 3 * [0], 7 * [0] + bars[7:]]
        return {"threshold": 0.2, "limit": 0.5, "counts": counts, "moved": moved}

    before, after = weights(5, 0, 0), weights(beside, moved_beside, moved_elsewhere)
    return {"granularity": granularity, "before": before, "after": after}


def test_spikes_at_the_threshold_are_named_with_the_shares_that_moved():
    words = findings.spikes(matrix(10, 8, 6))
    assert "stand 20.0% of the weights before training and 40.0% after it" in words
    assert ": the spikes. Of these 20.0% have another" in words
    assert "of all others 10.0%." in words
    assert words.endswith("training pushes it across Δ and back.")


def test_where_weights_beside_the_threshold_moved_no_more_no_reason_is_given():
    words = findings.spikes(matrix(10, 4, 6))
    assert "Of these 10.0% have" in words and words.endswith("all others 10.0%.")


def test_without_spikes_only_the_shares_are_said():
    words = findings.spikes(matrix(5.9, 8, 6))
    assert words.endswith("20.0% of the weights before training and 23.6% after it.")
    assert "spikes" in findings.spikes(matrix(6, 8, 6))


def test_rows_with_thresholds_of_their_own_and_four_bits_have_no_spikes():
    assert findings.spikes(matrix(10, 8, 6, "channel")) == ""
    assert findings.spikes(None) == ""


# --------------------------------------------------------------------------------------
# What it does not show


def run(*results, **made):
    tokens = {"train": 1000, "student": 1000, "valid": 800, "test": 700}
    whole = {"parameters": 5_000_000, "tokens": tokens, "read": [9000, 3000]}
    return {"results": [*results], "made": whole | {"init": "scratch"} | made}


def test_a_run_of_one_loss_lacks_its_controls():
    numbers, controls, text = findings.limits(run(result()))
    assert "5,000,000 parameters" in numbers and "800 tokens of validation" in numbers
    assert "one seed (3; the teacher’s 4)" in numbers
    assert controls.startswith(
        "No student was trained with logit distillation without the token scale, and "
        "none with the true tokens alone. So the page shows what training won back"
    )
    assert "is the teacher’s 1,000 training tokens. It reads 3,000 tokens" in text
    assert "after the teacher’s 9,000. No" in text


@pytest.mark.parametrize(
    "losses, there, lacking",
    [
        (["gt"], ["true tokens"], ["TSLD", "logit distillation"]),
        (["logit", "tsld"], ["TSLD", "logit distillation"], ["true tokens"]),
        (["l2l"], [], ["TSLD", "logit distillation", "true tokens"]),
    ],
)
def test_only_what_was_not_trained_is_said_to_lack(losses, there, lacking):
    words = findings.without_controls(set(losses))
    first = words.split(". So")[0]
    assert all(name in first for name in lacking)
    assert not any(name in first for name in there)
    assert first.count("none with") == len(lacking) - 1


def test_students_of_other_losses_are_compared_and_said_to_be_of_one_seed():
    results = [result(loss="gt", gt_weight=None), result(loss="logit"), result()]
    numbers, controls, pair, _ = findings.limits(run(*results))
    assert "one seed for 3 students" in numbers
    assert "No student" not in controls and "may be chance" in controls
    assert [pair] == lessons_of_pairs(results)


def test_that_the_student_saw_a_part_of_the_text_is_said():
    tokens = {"train": 1000, "student": 600, "valid": 800, "test": 700}
    *_, text = findings.limits(run(result(), tokens=tokens))
    assert "is the first 600 of the teacher’s 1,000 training tokens" in text


def test_a_pretrained_teacher_has_read_more_and_a_task_has_examples():
    numbers, _, text = findings.limits(run(result(task="sst2"), init="pretrained"))
    assert "after the teacher’s 9,000 and its pretraining. No" in text
    assert "800 tokens of the task’s examples" in numbers


def test_only_small_models_are_said_to_write_badly():
    assert "of 5,000,000 parameters writes" in findings.samples(
        {"parameters": 5_000_000}
    )
    words = findings.samples({"parameters": 10_000_000})
    assert "parameters" not in words and "not with good English. Look" in words


def test_numbers_are_printed_as_the_page_has_them():
    assert findings.temperature(math.inf) == "∞"
    assert findings.perplexity(1e7) == "1e+07"
    assert [findings.percent(p) for p in (0.0, 0.0004, 0.0005, 1.0)] == [
        "0.0%",
        "less than 0.1%",
        "0.1%",
        "100.0%",
    ]
