"""data/lib/transcript.py: what a run prints, and what follows from its numbers."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_small
from data.lib import transcript
from data.tasks import Example
from data.tests.helpers import ROOT, micro_gpt, run, softmax64
from tsld import TrainConfig

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------
# Set-up

CONFIG = TrainConfig(batch_size=4, block_size=8, lr=1e-3, temperature=20.0)


def set_up_lines(capsys, dtype="float32", **changes):
    config = TrainConfig(**{**vars(CONFIG), "dtype": dtype, **changes})
    transcript.print_setup(micro_gpt(), 3456, config, CPU)
    return capsys.readouterr().out.splitlines()


def test_what_is_about_to_be_trained_is_said_in_two_lines(capsys):
    model, student = set_up_lines(capsys, gt_weight=0.25)
    # 2 blocks of 12 C^2 and 13 C numbers, two embeddings, and the last norm.
    total = 2 * (12 * 12 * 12 + 13 * 12) + 17 * 12 + 8 * 12 + 2 * 12
    assert total == 4092
    assert (
        model == "model: 4,092 parameters, 2 layers x 12, 84% of them in matrices "
        "that are rounded"
    )

    threads = torch.get_num_threads()
    assert (
        student == "student: tsld (τ = 20) + 0.25 gt, rate 0.001, 32 tokens a "
        f"step; float32 on cpu, {threads} threads"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", ["float32", "bfloat16"])
def test_bfloat16_where_it_is_slow_is_announced(dtype, fast, capsys, monkeypatch):
    monkeypatch.setattr(transcript, "default_dtype", lambda device: fast)
    lines = set_up_lines(capsys, dtype)[2:]
    is_slow = dtype == "bfloat16" and fast == "float32"
    assert lines == ["dtype: bfloat16 is slow on this cpu, up to 20 times"] * is_slow


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "tsld (τ = 10)"),
        ({"temperature": float("inf"), "gt_weight": 0.5}, "tsld (τ = inf) + 0.5 gt"),
        ({"loss": "logit"}, "logit"),
        ({"loss": "logit", "gt_weight": 1.0}, "logit + 1 gt"),
        ({"loss": "logit_gt", "gt_weight": 0.5}, "logit_gt"),
        ({"loss": "gt", "gt_weight": 0.5}, "gt"),
        ({"loss": "l2l", "gt_weight": 0.5}, "l2l"),
    ],
)
def test_a_student_is_named_by_its_loss_and_what_acts_on_it(changes, name):
    assert transcript.describe(TrainConfig(**changes)) == name


# --------------------------------------------------------------------------------------
# The table


def both(ppl, bpb):
    return {"valid": {"ppl": ppl, "bpb": bpb}, "test": {"ppl": 2 * ppl, "bpb": bpb / 2}}


def test_the_table_has_every_score_and_the_share_that_each_student_wins_back(capsys):
    rows = [
        ("teacher", both(55.09, 2.0), 5873664),
        ("rounded", both(1e3, 3.0), 922967),
        ("good", both(60.5, 2.1), 922967),
        ("better", both(3e7, 1.9), 1),
        ("bad", both(61, 3.05), 1),
    ]
    transcript.print_table(rows)
    above, below, *lines = capsys.readouterr().out.splitlines()[1:]

    assert above.split() == ["validation", "test"]

    titles = ["perplexity", "bits/byte"] * 2 + ["won", "back", "bytes"]
    assert below.split() == titles

    words = [line.split() for line in lines]
    assert words[0] == ["teacher", "55.09", "2.0000", "110.18", "1.0000", "5,873,664"]
    scores = ["1,000.00", "3.0000", "2,000.00", "1.5000"]
    assert words[1] == ["rounded", *scores, "922,967"]
    # Rounding costs one bit a byte.
    assert [line[-2] for line in words[2:]] == ["90%", "110%", "-5%"]
    assert words[3][1] == "3e+07"

    # Every number ends below its title.
    assert {len(line) for line in (below, *lines)} == {len(below)}

    end = below.index("perplexity") + len("perplexity")
    assert [line[:end].split()[-1] for line in lines] == [line[1] for line in words]


def test_columns_of_the_largest_numbers_stay_apart(capsys):
    scores = {"valid": {"ppl": 1e300, "bpb": 996.5784}}
    scores |= {"test": {"ppl": 999_999.99, "bpb": 19.9316}}
    name = "tsld (τ = 0.333333) + 0.333333 gt"
    rows = [("teacher", both(55.0, 2.0), 10**12), ("rounded", scores, 10**12)]
    transcript.print_table([*rows, (name, scores, 10**12)])
    line = capsys.readouterr().out.splitlines()[-1]
    numbers = ["1e+300", "996.5784", "999,999.99", "19.9316"]
    assert line.removeprefix(name).split()[:4] == numbers
    assert line.split()[-1] == "1,000,000,000,000"


@pytest.mark.parametrize("cost", [0.0, 1e-9, -0.1, 0.0199])
def test_where_rounding_costs_next_to_nothing_nothing_is_won_back(cost, capsys):
    rows = [("teacher", both(55.0, 2.0), 1), ("rounded", both(55.0, 2.0 + cost), 1)]
    transcript.print_table([*rows, ("student", both(54.0, 1.9), 1)])
    *lines, why = capsys.readouterr().out.splitlines()
    assert "%" not in " ".join(lines)
    assert why.startswith("Rounding cost less than 1 % of the teacher's bits")


def test_from_a_hundredth_of_the_teachers_bits_on_a_share_is_won_back():
    assert transcript.won_back(2.0, 2.021, 2.0) == "100%"
    assert transcript.won_back(2.0, 2.04, 2.03) == "25%"


def test_a_tasks_table_has_its_accuracies(capsys):
    scores = {"valid": {"ppl": 2.0, "bpb": 1.0, "accuracy": 0.5, "acc_norm": 0.25}}
    transcript.print_table([("teacher", scores, 1), ("rounded", scores, 1)])
    titles, teacher = capsys.readouterr().out.splitlines()[2:4]
    assert titles.split()[:4] == ["perplexity", "bits/byte", "accuracy", "acc_norm"]
    assert teacher.split() == ["teacher", "2.00", "1.0000", "0.5000", "0.2500", "1"]


@pytest.mark.parametrize("task, part", [("sst2", "dev"), ("arc_easy", "test")])
def test_a_tasks_table_says_which_examples_it_is_of_and_what_chance_scores(
    task, part, capsys
):
    scores = {"valid": {"ppl": 2.0, "bpb": 1.0, "accuracy": 0.5, "acc_norm": 0.25}}
    examples = [Example("x", ("no", "yes"), i == 0) for i in range(4)]
    worse = {"valid": scores["valid"] | {"bpb": 2.0}}
    rows = [("teacher", scores, 1), ("rounded", worse, 1)]
    transcript.print_table(rows, task, examples)
    lines = capsys.readouterr().out.splitlines()

    assert lines[1].strip() == f"4 {part} examples"
    assert [line.split() for line in lines[-2:]] == [
        ["a", "guess", "0.5000"],
        ["always", "'no'", "0.7500"],
    ]
    end = lines[2].index("accuracy") + len("accuracy")
    assert {len(line) for line in lines[-2:]} == {end}


# --------------------------------------------------------------------------------------
# What follows

SIZES = {"bytes_fp32": 5_873_664, "linear_bytes_fp32": 4_718_592}
SIZES |= {"bytes_packed": 922_967, "linear_bytes_packed": 294_912}
BETTER = "the student's perplexity is lower than its teacher's"


def result(loss, student=50.0, gt_weight=None, teacher=55.0):
    scores = {"student_ppl": student, "teacher_ppl": teacher, "task": None}
    return {"loss": loss, "gt_weight": gt_weight, "bits": 2} | scores


def lessons(capsys, *results, **sizes):
    transcript.print_lessons(results, SIZES | sizes)
    printed = capsys.readouterr().out
    assert all(len(line) <= 88 for line in printed.splitlines())
    return " ".join(printed.split())


def test_the_sizes_are_explained(capsys):
    text = lessons(capsys, result("tsld", 60.0))
    expected = "The ternary matrices take 294,912 bytes, 16 times less than in FP32. "
    expected += "The other 628,055 are mostly the embedding, in float16."

    assert text == expected

    row = result("tsld", 60.0) | {"bits": 4}
    text = lessons(capsys, row, linear_bytes_packed=589_824, bytes_packed=1_217_879)
    expected = expected.replace("ternary", "4-bit").replace("16 times", "8 times")
    assert text == expected.replace("294,912", "589,824")


@pytest.mark.parametrize(
    "row, is_lower, sees_labels",
    [
        (result("tsld", 54.9, gt_weight=0.25), True, True),
        (result("logit", 54.9, gt_weight=0.25), True, True),
        (result("gt", 54.9), True, True),
        (result("logit_gt", 54.9), True, True),
        (result("tsld", 55.0, gt_weight=0.25), False, True),
        (result("tsld", 54.9, gt_weight=0.0), True, False),
        (result("l2l", 54.9), True, False),
    ],
)
def test_a_perplexity_below_the_teachers_may_be_chance_or_due_to_labels(
    row, is_lower, sees_labels, capsys
):
    text = lessons(capsys, row)
    lower = "On the validation text the student's perplexity is lower than its "
    lower += (
        "teacher's (54.90 and 55.00). One run cannot say how much of that is chance."
    )
    assert (lower in text) == is_lower
    assert ("chance" in text) == is_lower
    is_explained = is_lower and sees_labels
    assert (
        "also learned from the true tokens of its teacher's text" in text
    ) == is_explained


@pytest.mark.parametrize(
    "test_ppl, words",
    [
        (29.0, ", on the test text so it is (29.00 and 30.00)."),
        (30.0, ", on the test text it is not (30.00 and 30.00)."),
        (31.5, ", on the test text it is not (31.50 and 30.00)."),
    ],
)
def test_a_lower_perplexity_is_compared_with_that_of_the_test_text(test_ppl, words):
    row = result("tsld", gt_weight=0.0)
    row |= {"test_student_ppl": test_ppl, "test_teacher_ppl": 30.0}
    (lesson,) = transcript.lesson_of_better(row)
    assert words in lesson


def test_a_task_has_no_test_text_beside_its_answers():
    row = result("tsld", gt_weight=0.0) | {"task": "sst2"}
    (lesson,) = transcript.lesson_of_better(row)
    assert lesson.startswith("On the task's answers the student's perplexity is lower ")
    assert "test text" not in lesson


def test_the_token_scale_is_judged_by_pairs_with_the_same_labels(capsys):
    rows = [
        result("gt"),
        result("logit", 50.0, 0.25),
        result("tsld", 49.0, 0.25),
        result("logit", 60.0, 0.0),
        result("tsld", 63.0, 0.0),
        result("logit_gt"),
    ]
    text = lessons(capsys, *rows)

    assert "Token scale, with 0.25 gt: -2.0% perplexity against logit, one " in text
    assert "Token scale, with no labels: +5.0% perplexity against logit, one " in text
    assert text.count("Token scale") == 2
    assert BETTER not in text  # which is said of a single student
    assert "Token scale" not in lessons(capsys, result("logit", 50.0, 0.0), rows[2])


# --------------------------------------------------------------------------------------
# Texts


def decode(ids):
    return "".join(f" w{i}" for i in ids)


def test_a_tokens_weight_is_its_token_scale_times_their_number(capsys):
    teacher = micro_gpt()
    ids = torch.tensor([3, 14, 15, 9, 2, 6, 5])
    transcript.print_token_weights(teacher, ids, 0.5, decode, shown=4)
    title, line = capsys.readouterr().out.splitlines()[1:]

    p = softmax64(teacher(ids[None, :-1])[0].detach())
    ce = -np.log(p[range(6), ids[1:]])
    weights = 6 * softmax64(ce / 0.5)
    assert weights.max() > 1.5

    title, *words = f"{title}  {line}".split("  ")
    assert title == "How much TSLD (τ = 0.5) lets each token count, on average 1:"
    tokens = ["' w14'", "' w15'", "' w9'", "' w2'"]
    pairs = zip(tokens, weights, strict=False)
    assert words == [f"{token} {weight:.2f}" for token, weight in pairs]


def test_no_token_is_broken_at_the_end_of_a_line(capsys):
    ids = torch.arange(17)
    teacher = micro_gpt(block_size=16)
    transcript.print_token_weights(teacher, ids, 10.0, lambda ids: f"{ids[0]}   \n ")
    lines = capsys.readouterr().out.splitlines()[1:]

    tokens = re.findall(r"'(\d+)   \\n ' \d\.\d\d", "\n".join(lines))
    assert tokens == [str(i) for i in range(1, 17)]
    assert max(len(line) for line in lines) <= 88
    assert min(len(line) for line in lines[:-1]) > 88 - 2 - len("'10   \\n ' 1.00")


def test_each_model_goes_on_with_the_prompt_from_the_seed(capsys):
    models = {"teacher": micro_gpt(), "tsld": micro_gpt(1)}
    prompt = torch.tensor([1, 2, 3])
    tokenizer = SimpleNamespace(decode=decode, end_of_text=None)
    transcript.print_samples(models, prompt, 4, tokenizer, 5, "The text begins")
    lines = capsys.readouterr().out.splitlines()[1:]

    assert lines[0] == "The text begins: w1 w2 w3"

    for line, (name, model) in zip(lines[1:], models.items(), strict=True):
        torch.manual_seed(5)
        ids = model.generate(prompt[None], 4, temperature=0.8, top_k=200)[0, 3:]
        assert line == f"{name} goes on:{decode(ids.tolist())}"


def test_no_sample_goes_on_after_the_end_of_the_text(capsys):
    model = SimpleNamespace(generate=lambda *_, **__: torch.tensor([[1, 2, 3, 9, 4]]))
    tokenizer = SimpleNamespace(decode=decode, end_of_text=9)
    prompt = torch.tensor([1, 2])
    transcript.print_samples({"it": model}, prompt, 3, tokenizer, 0, "Text")
    assert capsys.readouterr().out == "\nText: w1 w2\nit goes on:  w3\n".replace(
        "  ", " "
    )


def test_of_a_task_the_models_go_on_with_the_first_question(capsys):
    setup = a_setup(8, [0] * 17, tsld=TrainConfig())
    setup.examples = [Example("1 2 3 4 5 6", ("x",), 0), Example("7", ("x",), 0)]
    encode = lambda text: [int(word) for word in text.split()]
    setup.source.tokenizer.encode_ordinary = encode
    transcript.print_texts(setup, {"teacher": micro_gpt()})
    printed = capsys.readouterr().out

    assert "The first question: w3 w4 w5 w6\n" in printed  # which fills half a block
    assert "How much" not in printed


def a_setup(block_size=8, valid=range(17), **students):
    """What print_texts and print_next_command look at in a Setup."""
    tokenizer = SimpleNamespace(decode=decode, end_of_text=None)
    return SimpleNamespace(
        args=SimpleNamespace(seed=0),
        device=CPU,
        examples=None,
        source=SimpleNamespace(name="tiny", model=micro_gpt(), tokenizer=tokenizer),
        student=TrainConfig(block_size=block_size),
        students=students,
        tokens={"valid": torch.tensor([*valid])},
    )


def test_the_weights_are_shown_where_a_student_is_trained_by_them(capsys):
    models = {"teacher": micro_gpt(), "rounded": micro_gpt(1), "student": micro_gpt(2)}
    scale = "How much TSLD (τ = 3)"
    setup = a_setup(gt=None, tsld=TrainConfig(temperature=3.0))
    transcript.print_texts(setup, models)
    printed = capsys.readouterr().out

    assert scale in printed
    assert printed.count(" w8' ") == 1 and "w9'" not in printed  # a block, and its end
    assert "The validation text begins: w0 w1 w2 w3\n" in printed

    for name in models:
        (line,) = re.findall(f"^{name} goes on: .*$", printed, re.M)
        assert len(line.split(": ")[1].split()) == 4

    setup.examples = []
    transcript.print_texts(setup, models)
    assert "How much" not in capsys.readouterr().out

    transcript.print_texts(a_setup(logit=None), models)
    assert "How much" not in capsys.readouterr().out


@pytest.mark.parametrize("block_size, valid", [(2, [1, 2]), (2, [5]), (8, [7, 8])])
def test_a_short_text_or_block_is_shown_as_far_as_it_goes(block_size, valid, capsys):
    model = micro_gpt(block_size=block_size)
    setup = a_setup(block_size, [3, *valid], tsld=TrainConfig())
    transcript.print_texts(setup, {"teacher": model})
    assert "teacher goes on: " in capsys.readouterr().out


# --------------------------------------------------------------------------------------
# The next command


@pytest.mark.parametrize("folder, out", [(".", "it's out"), (ROOT, "out")])
def test_the_next_command_works_from_where_the_user_stands(
    folder, out, tiny, capsys, tmp_path, monkeypatch
):
    out = out if folder == "." else str(tmp_path / out)
    monkeypatch.chdir(tmp_path / folder)
    printed = run([*tiny, "--out", out], capsys)

    line = printed.splitlines()[-2]
    python, program, *argv = shlex.split(line.removeprefix("more text: "))
    assert python == "python"
    assert Path(program).samefile(train_small.__file__)
    assert (program == "train_small.py") == (folder == ROOT)

    file = str(Path(out) / "student-tsld.packed")
    assert argv == ["--generate", file, "--prompt", "the quick brown fox"]
    assert run([*argv, "--device", "cpu"], capsys).startswith("the quick brown fox")


@pytest.mark.parametrize(
    "block_size, prompt",
    [(128, "a 'b c d"), (8, "a 'b c d"), (7, "a 'b c"), (2, "a"), (1, None)],
)
def test_the_next_commands_prompt_fills_half_a_block_at_most(
    block_size, prompt, capsys, monkeypatch
):
    setup = a_setup(block_size)
    setup.source.tokenizer = SimpleNamespace(
        decode=lambda ids: "\n a  'b c d e f" if len(ids) == 12 else "",
        encode_ordinary=str.split,
        end_of_text=None,
    )
    transcript.print_next_command(train_small.__file__, "student.packed", setup)
    words = shlex.split(capsys.readouterr().out)

    assert words[4:6] == ["--generate", "student.packed"]
    assert words[6:] == ([] if prompt is None else ["--prompt", prompt])
