"""The evidence's task tables."""

import json
import math

import numpy as np
import pytest
import torch

import train_small
import tsld
from data import tasks, texts
from data.evidence import models, rows
from data.evidence.tasks import accuracy
from data.lib.files import read_checked
from data.tests.helpers import QUESTIONS, SHORT, WORDS, run, softmax64
from tsld import GPT


def rows_of(tmp_path, seed):
    return json.loads((tmp_path / "out" / f"accuracy-{seed}.json").read_text())


@pytest.fixture
def task(tiny, monkeypatch):
    """The flags of a minute task."""
    monkeypatch.setattr(tasks, "load_task", {"rte": (QUESTIONS * 20, QUESTIONS)}.get)
    return ["--task", "rte", *SHORT, *tiny[2:]]


def test_the_task_tables_have_every_student_at_both_widths(task):
    setup = train_small.set_up(accuracy.parse(task))
    wanted = accuracy.wanted_rows(setup, setup.source.model)
    mixes = [(row["bits"], *accuracy.mix_of(row)) for row in wanted]

    assert mixes == [(bits, *mix) for bits in (4, 2) for mix in accuracy.STUDENTS]


def test_the_documented_command_of_sst2_makes_the_rows_that_are_there(
    tmp_path, monkeypatch
):
    examples = QUESTIONS * 20
    monkeypatch.setattr(tasks, "load_task", lambda name: (examples, examples))
    words = [*accuracy.DOCUMENTED[0].split(), "--dtype", "bfloat16"]
    args = accuracy.parse([*words, "--out", str(tmp_path), "--device", "cpu"])
    setup = train_small.set_up(args)
    wanted = accuracy.wanted_rows(setup, setup.source.model)

    for row in wanted:  # which the text and the weights make
        del row["teacher"], row["student_tokens"]

    found = rows.read_rows(accuracy.ROOM, "accuracy-0.json")
    found = [row for row in found if row["task"] == "sst2"]
    assert len(found) == 6
    for row in found:
        assert sum(setting.items() <= row.items() for setting in wanted) == 1


@pytest.mark.parametrize("task", accuracy.CHANCE)
def test_the_tables_of_the_repository_say_what_chance_scores(task):
    page = (accuracy.ROOM / "tables.md").read_text()
    tables = [table for table in page.split("\n## ") if table.startswith(f"{task},")]
    assert tables
    for table in tables:
        text = " ".join(table.split())
        for name, score in accuracy.CHANCE[task].items():
            assert f"Accuracy of {name}: {score:.4f}." in text

    files = [line.split()[-1] for line in tasks.FILES.strip().splitlines()]
    files = [tasks.DOWNLOADS / name for name in files if name.startswith(f"{task}/")]
    if all(file.exists() for file in files):
        _, examples = tasks.load_task(task)
        assert tasks.chance(examples) == pytest.approx(accuracy.CHANCE[task], abs=5e-5)


def test_the_task_tables_average_seeds_and_go_on_where_they_stopped(
    task, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(accuracy, "BITS", (2,))
    for seed in "01":
        run([*task, "--seed", seed], capsys, accuracy.main)
    found = rows_of(tmp_path, 1)

    assert [accuracy.mix_of(row) for row in found] == list(accuracy.STUDENTS)
    assert {row["config"]["seed"] for row in found} == {1}
    assert "Infinity" not in (tmp_path / "out" / "accuracy-1.json").read_text()
    assert not list((tmp_path / "out").glob("student-*"))

    # One teacher, and the means of both seeds.
    both = [*rows_of(tmp_path, 0), *found]
    assert len({row["teacher_ppl"] for row in both}) == 1

    page = (tmp_path / "out" / "tables.md").read_text()
    names = ["logit", "logit+GT", "TSLD, τ = 10", "TSLD, τ = 10 + ground truth · 0.25"]
    names += ["logit + ground truth · 0.25", "TSLD, τ = 2", "TSLD, τ = 5"]

    for number, name in enumerate(names):
        values = [file[number]["student_ppl"] for file in (both[:7], both[7:])]
        cell = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (2)"
        assert f"\n| 2 | {name} | {cell} |" in page

    # The same numbers once more.
    (tmp_path / "out" / "accuracy-1.json").write_text(json.dumps(found[:4]))
    out = run([*task, "--seed", "1"], capsys, accuracy.main)

    assert "5 of 7: " in out and "4 of 7: " not in out

    again = rows_of(tmp_path, 1)
    perplexities = [row["student_ppl"] for row in found]

    assert [row["student_ppl"] for row in again] == perplexities


def test_a_row_of_the_task_tables_has_the_rounded_teachers_score_of_the_main_command(
    task, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(accuracy, "STUDENTS", accuracy.STUDENTS[:1])
    monkeypatch.setattr(accuracy, "BITS", (2,))

    rounded = {}
    for granularity in ("tensor", "channel"):
        flags = [*task, "--granularity", granularity]
        run(flags, capsys)
        (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
        rounded[granularity] = result["ptq_ppl"]
        run(flags, capsys, accuracy.main)

    found = rows_of(tmp_path, 0)
    assert {row["granularity"]: row["rounded_ppl"] for row in found} == rounded
    assert rounded["tensor"] != rounded["channel"]


def test_the_task_tables_take_a_text_and_no_token_scale_is_logit_distillation(
    tiny, capsys, tmp_path, monkeypatch, small_vocabulary
):
    students = ("logit", 0.0, 10.0), ("tsld", 0.0, None), ("tsld", 0.0, 0.02)
    monkeypatch.setattr(accuracy, "STUDENTS", students)

    # Of 2,048 tokens; this teacher has hardly learned.
    monkeypatch.setattr(models, "SURE", 0.0006)
    run([*tiny, "--steps", "6", "--dtype", "float32"], capsys, accuracy.main)
    found = rows_of(tmp_path, 0)

    assert {row["task"] for row in found} == {"text.txt"}
    assert len(found) == 6

    (path,) = (tmp_path / "out").glob("teacher-*.pt")
    teacher = GPT(train_small.PRESETS["tiny-6"].gpt)
    teacher.load_state_dict(read_checked(path)["model"])
    teacher.eval()
    text = texts.split_text((WORDS * 40).encode())["train"]
    ids = torch.tensor(small_vocabulary.encode_ordinary(text))[:300]
    own = math.exp(tsld.evaluate(teacher, ids, 16))
    sure = (softmax64(teacher(ids[:288].view(18, 16)).detach()).max(-1) > 0.0006).mean()

    assert 0 < sure < 1
    assert found[0]["teacher_train_ppl"] == pytest.approx(own, rel=1e-6)
    assert found[0]["teacher_sure"] == pytest.approx(sure, abs=1e-2)

    page = " ".join((tmp_path / "out" / "tables.md").read_text().split())
    share = found[0]["teacher_sure"]
    words = f"perplexity {own:.2f} on its own text, and is sure of {share:.1%} of it."

    assert words in page

    for of_bits in (found[:3], found[3:]):
        logit, unscaled, scaled = (row["student_ppl"] for row in of_bits)
        assert unscaled == pytest.approx(logit, rel=1e-6)
        assert scaled != pytest.approx(logit, rel=1e-6)
