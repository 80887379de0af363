"""The evidence's map of teachers and mixes."""

import copy
import importlib.util
import json
import math
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_small
import tsld
from data import tasks, texts
from data.evidence import models, rows
from data.evidence.map import drawing, mixes, regimes, tables
from data.evidence.table1 import baselines
from data.lib import resumable, sources
from data.lib.files import read_checked
from data.tests.helpers import WORDS, refused, run, softmax64
from tsld import GPT

UNSCALED = ("tsld", None, 0.0)
MIXES = [UNSCALED, ("tsld", 10.0, 0.25), ("gt", None, None)]


@pytest.fixture
def small_map(tiny, tmp_path, monkeypatch):
    """The documented flags of a map of three mixes and two teachers, in a room of its
    own, and its corpus. An epoch of a student, 300 tokens, is 4.7 steps."""
    monkeypatch.setattr(regimes, "ROOM", tmp_path)

    for name in ("PRETRAINING", "FINE_TUNING"):
        config = replace(getattr(regimes, name), steps=2, batch_size=4)
        monkeypatch.setattr(regimes, name, config)

    monkeypatch.setattr(
        regimes, "other_text", lambda tokenizer: torch.arange(900) % 2048
    )
    monkeypatch.setattr(mixes, "MAP", ((2, "tensor", 2, (1, 3), MIXES),))
    monkeypatch.setattr(drawing, "draw", lambda groups, path: None)
    corpus = texts.split_text((WORDS * 40).encode())
    monkeypatch.setattr(sources, "load_corpus", lambda choice: ("ptb", "", corpus))

    return ["--seed", "0", *tiny[2:]], corpus


def rows_of(path):
    return json.loads(path.read_text())


def test_the_map_has_every_teacher_and_mix_and_goes_on_where_it_stopped(
    small_map, capsys, tmp_path, monkeypatch
):
    flags, _ = small_map
    out = run(flags, capsys, regimes.main)
    path = tmp_path / "regimes-0.json"
    found = rows_of(path)
    seen = [(x["teacher_epochs"], x["temperature"], x["gt_weight"]) for x in found]

    assert seen == [(epochs, *mix[1:]) for epochs in (1, 3) for mix in MIXES]

    configs = [row["config"] for row in found]
    assert [config["loss"] for config in configs] == 2 * ["tsld", "tsld", "gt"]
    assert [config["gt_weight"] for config in configs] == 2 * [0.0, 0.25, 0.0]
    assert {config["steps"] for config in configs} == {9}
    assert "Infinity" not in path.read_text()
    assert "teacher, 3 epochs: step 14/14" in out
    assert len({row["teacher_valid_ppl"] for row in found}) == 2

    # Interrupted in the middle of its last student.
    path.write_text(json.dumps(found[:5]))
    steps = []

    def interrupt_once(text, last=False):
        if text.startswith("student"):
            steps.append(int(re.search(r"step (\d+)/9", text)[1]))
            if steps == [*range(1, 6)]:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(resumable, "show_progress", interrupt_once)
    assert train_small.main(flags, regimes.main) == 130

    error = capsys.readouterr().err
    assert error.endswith("step 5 of 9; go on with the same command\n")

    out = run(flags, capsys, regimes.main)
    assert re.findall(r"(\d) of 6: ", out) == ["6"]
    assert steps == [*range(1, 10)]

    again = rows_of(path)
    perplexities = [row["student_valid_ppl"] for row in found]

    assert [row["student_valid_ppl"] for row in again] == perplexities


def test_the_maps_seeds_share_one_pretrained_model(
    small_map, capsys, tmp_path, monkeypatch
):
    flags, _ = small_map
    monkeypatch.setattr(mixes, "MAP", ((2, "tensor", 1, (1,), MIXES[:1]),))
    (tmp_path / "fresh").mkdir()

    found = {}
    for folder, seed in (("", 0), ("", 1), ("fresh", 1)):  # and the second seed first
        room = tmp_path / folder
        monkeypatch.setattr(regimes, "ROOM", room)
        command = ["--seed", str(seed), "--out", str(room / "models"), *flags[4:]]
        run(command, capsys, regimes.main)
        path = room / f"regimes-{seed}.json"
        (found[folder, seed],) = rows_of(path)

    assert len({row["pretrained"] for row in found.values()}) == 1

    first, second = found["", 0], found["", 1]
    assert first["teacher_valid_ppl"] != second["teacher_valid_ppl"]

    path.write_text(json.dumps([second | {"pretrained": "another"}]))
    words = "are of another pretrained model: move them away"
    refused(command, capsys, words, regimes.main)


def test_a_row_of_the_map_has_its_teachers_and_its_roundings_perplexity(
    small_map, capsys, tmp_path, monkeypatch, small_vocabulary
):
    flags, corpus = small_map
    # Of 2,048 tokens; this teacher has hardly learned.
    monkeypatch.setattr(models, "SURE", 0.0006)
    parts = (
        (4, "channel", 0, (3,), [mixes.OPTQ]),
        (2, "channel", 2, (3,), [("l2l", None, None)]),
    )
    monkeypatch.setattr(mixes, "TABLE_1_PARTS", parts)
    monkeypatch.setattr(mixes, "MAP", ((2, "tensor", 2, (3,), MIXES[:1]), *parts))
    run(flags, capsys, regimes.main)
    found = rows_of(tmp_path / "regimes-0.json")

    teacher = GPT(train_small.PRESETS["tiny-6"].gpt)
    path = tmp_path / "out" / "teacher-3-epochs-seed-0.pt"
    teacher.load_state_dict(read_checked(path)["model"])
    teacher.eval()
    ids = {}
    for part, text in corpus.items():
        ids[part] = torch.tensor(small_vocabulary.encode_ordinary(text))

    def perplexity(model, tokens):
        return pytest.approx(math.exp(tsld.evaluate(model, tokens, 16)), rel=1e-6)

    blocks = ids["train"][:288].view(18, 16)  # of 300 tokens
    sure = (softmax64(teacher(blocks).detach()).max(-1) > 0.0006).mean()

    assert 0 < sure < 1

    for row in found:
        student = copy.deepcopy(teacher)
        rounded = tsld.quantize_model(student, row["bits"], row["granularity"])
        assert row["rounded_valid_ppl"] == perplexity(rounded, ids["valid"])
        assert row["teacher_train_ppl"] == perplexity(teacher, ids["train"][:300])
        assert row["teacher_sure"] == pytest.approx(sure, abs=1e-2)

    _, optq, l2l = found
    quantized = baselines.optq(teacher, blocks)

    assert optq["student_valid_ppl"] == perplexity(quantized, ids["valid"])
    assert optq["config"] is None
    assert l2l["config"]["loss"] == l2l["loss"] == "l2l"

    page = (tmp_path / "tables.md").read_text()

    for name, row, before, after in (
        ("OPTQ", optq, [], ["", ""]),
        ("L2L+logit", l2l, ["", ""], []),
    ):
        cells = [f"{row[f'student_{part}_ppl']:.2f} (1)" for part in ("valid", "test")]
        line = " | ".join([name, *before, *cells, *after])
        assert f"| {line} |\n" in page


def made_up_rows():
    """Rows of one teacher: with and without token scale, and some without a twin."""
    values = {  # temperature, weight, seed: validation perplexity
        (None, 0.0, 0): 50.0,
        (10.0, 0.0, 0): 51.5,
        (None, 0.0, 1): 60.0,
        (10.0, 0.0, 1): 59.0,
        (None, 0.25, 0): 40.0,
        (10.0, 0.25, 0): 39.0,
        (10.0, 0.25, 1): 7.0,  # without a twin
        (2.0, 0.0, 0): 47.0,
    }
    measures = ("teacher_train_ppl", "teacher_valid_ppl", "rounded_valid_ppl")
    same = dict.fromkeys(measures, 9.0) | {"teacher_epochs": 3, "loss": "tsld"}
    same |= {"bits": 2, "granularity": "tensor", "epochs": 16}

    found = []
    for (temperature, weight, seed), value in values.items():
        row = {"temperature": temperature, "gt_weight": weight, "seed": seed}
        row |= {"student_valid_ppl": value, "student_test_ppl": value}
        found.append(same | row | {"teacher_sure": 0.1 + seed})

    return found


def test_the_token_scale_is_judged_by_pairs_of_one_seed_and_one_weight():
    page = tables.page(tables.grouped(made_up_rows()))
    error = np.std([1.5, -1.0], ddof=1) / 2**0.5

    assert f"| 2 | tensor | 16 | 10 | 0 | +0.25 ± {error:.2f}, 1 of 2 |\n" in page
    assert "| 2 | tensor | 16 | 10 | 0.25 | -1.00, 1 of 1 |\n" in page
    assert "| 2 | tensor | 16 | 2 | 0 | -3.00, 1 of 1 |\n" in page


def test_a_setting_has_a_line_without_token_scale_and_one_with_it():
    page = tables.page(tables.grouped(made_up_rows()))
    unscaled = f"55.00 ± {np.std([50, 60], ddof=1):.2f} (2)"
    head = "| 2 | tensor | 16 | 3 | 9.00 (2) | 60% | 9.00 (2) | 9.00 (2) | no | "

    assert f"{head}{unscaled} |  | 40.00 (1) |  |  |  |\n" in page

    scaled = f"55.25 ± {np.std([51.5, 59], ddof=1):.2f} (2)"
    with_labels = f"23.00 ± {np.std([39, 7], ddof=1):.2f} (2)"

    assert f"| τ = 10 | {scaled} |  | {with_labels} |  |  |  |\n" in page

    cells = f"|  | 47.00 (1) |  | {scaled} |  | {unscaled} |\n"
    assert f"| 2 | tensor | 16 | 3 | 0 {cells}" in page


@pytest.mark.parametrize("temperatures", [(None, 2.0, 10.0), (None,)])
def test_the_map_is_drawn_with_and_without_pairs(temperatures, tmp_path):
    pytest.importorskip("matplotlib")
    found = [row for row in made_up_rows() if row["temperature"] in temperatures]
    drawing.draw(tables.grouped(found), tmp_path / "map.png")

    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_without_matplotlib_a_line_says_what_it_would_draw(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    drawing.draw({}, tmp_path / "map.png")
    words = f"the package matplotlib would draw {tmp_path / 'map.png'}"

    assert words in capsys.readouterr().out


def test_the_map_has_the_mixes_of_the_rows_that_were_measured():
    room = regimes.ROOM
    wanted = [setting for seed in range(6) for setting in mixes.settings(seed)]
    keys = (*mixes.SETTING, *mixes.MIX, "seed")
    wanted = {tuple(setting[key] for key in keys) for setting in wanted}
    found = rows.read_rows(room, "regimes-*.json")

    assert {tuple(row[key] for key in keys) for row in found} <= wanted


def test_the_other_text_is_the_tasks_own_words_without_the_prompts(
    monkeypatch, small_vocabulary
):
    examples = {}
    for name, (prompt, _) in tasks.PROMPTS.items():
        prompt = prompt.replace("{}", "Why  NOT").format(*"abcde")
        examples[name] = [tasks.Example(prompt, ("x", "Y"), 1)]

    monkeypatch.setattr(tasks, "load_task", lambda name: (examples[name], []))
    text = small_vocabulary.decode(regimes.other_text(small_vocabulary).tolist())
    lines = dict(zip(tasks.PROMPTS, text.split("\n"), strict=True))

    assert lines["mrpc"] == "d e"
    assert lines["rte"] == "b c"
    assert lines["gsm8k"] == "why not y"
