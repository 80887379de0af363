"""What the evidence's scripts share: rows, tables, commands; and the vocabulary."""

import ast
import collections
import importlib.util
import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data.evidence
import train_small
from data import texts
from data.evidence import models, rows, vocabulary
from data.evidence.figures import common, figures
from data.evidence.map import regimes, tables
from data.evidence.pretrained import schedule, smollm
from data.evidence.speed import bench, gpu, llama
from data.evidence.table1 import table
from data.evidence.tasks import accuracy, harness
from data.lib.errors import UserError
from data.tests.helpers import ROOT, micro_gpt, micro_ids, refused, softmax64
from tsld import LOSSES, TrainConfig

EVIDENCE = ROOT / "data" / "evidence"
COMMANDS = [table, regimes, accuracy, harness, smollm, schedule, figures, bench]
COMMANDS += [gpu, llama]

# --------------------------------------------------------------------------------------
# The folder


def test_no_other_package_of_the_name_hides_data():
    assert data.__file__ == str(ROOT / "data" / "__init__.py")
    assert data.evidence.__file__ == str(EVIDENCE / "__init__.py")


def test_every_loss_has_a_name_and_a_colour():
    assert rows.METHODS.keys() == set(LOSSES)
    assert common.COLOURS.keys() >= rows.METHODS.keys()


def test_no_room_imports_another_room():
    rooms = {path.parent.name for path in EVIDENCE.glob("*/*.py")}

    imported = collections.defaultdict(set)
    for path in EVIDENCE.glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]

            for name in names:
                if name.startswith("data.evidence."):
                    imported[path.parent.name].add(name.split(".")[2])

    assert len(rooms) == 6 and imported.keys() == rooms

    for room, names in imported.items():
        assert names <= {room, "rows", "models"}


def commands_of(path):
    """The module and the words of every command of the evidence in a file."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")

    for line in re.findall(r"python -m data\.evidence\.(\w[^`#\"\n]*)", text):
        module, *words = line.split()
        yield f"data.evidence.{module.rstrip('.,:;')}", words


def test_every_command_that_is_written_down_is_a_module():
    files = [*ROOT.glob("*.md"), *ROOT.glob("data/**/*.md"), *EVIDENCE.glob("**/*.py")]
    modules = {module for path in files for module, _ in commands_of(path)}
    front = (EVIDENCE / "README.md").read_text(encoding="utf-8")
    rooms = "table1|map|tasks|pretrained|speed|figures"
    for name in re.findall(rf"`((?:{rooms})\.[a-z]+)\b(?!\.)", front):
        modules.add(f"data.evidence.{name}")

    assert len(modules) >= len(COMMANDS)

    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec and not spec.submodule_search_locations, name


@pytest.mark.parametrize("module", [table, regimes, accuracy, figures, schedule])
def test_the_commands_of_a_rooms_readme_write_into_the_room(module, tmp_path):
    documented = []
    for path in EVIDENCE.glob("*/README.md"):
        for name, words in commands_of(path):
            if name == module.__name__ and words not in ([], ["draw"]):
                documented.append(words)
                folder = rows.place(module.ROOM, words, tmp_path, module.DOCUMENTED)
                assert folder == module.ROOM, words

    assert documented


@pytest.mark.parametrize("module", [*COMMANDS, vocabulary])
def test_every_command_has_a_help(module, capsys):
    with pytest.raises(SystemExit, match="0"):
        train_small.main(["--help"], module.main)
    help_text = " ".join(capsys.readouterr().out.split())

    assert f"python -m {module.__name__}" in help_text and "--help" in help_text


@pytest.mark.parametrize("module", [harness, smollm, llama, bench, vocabulary])
def test_words_that_a_command_does_not_take_are_refused_in_a_line(module, capsys):
    refused(["--frobnicate", "x", "y", "z"], capsys, "see --help", module.main)


def test_the_help_fits_a_terminal_without_greek_letters(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit, match="0"):
        train_small.main(["--help"], table.main)


# --------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize(
    "words, is_documented",
    [
        ("--steps 9 --task a --seed 1", True),
        ("--seed=1 --task a --out elsewhere --steps 9 --device cpu --resume", True),
        ("--task b --steps 3", True),
        ("--task b --steps 3 --seed 0", True),
        ("--task a --steps 9 --seed 2", False),
        ("--task a --steps 9", False),
        ("--task a --steps 9 --seed 1 --dtype float32", False),
        ("", False),
    ],
)
def test_the_flags_of_a_documented_command_write_beside_the_script_all_others_to_out(
    words, is_documented, tmp_path, capsys
):
    documented = ("--task a --steps 9 --seed 1", "--task b --steps 3")
    room = tmp_path / "room"
    out = tmp_path / "out"
    folder = rows.place(room, words.split(), out, documented)

    assert folder == (room if is_documented else out)
    assert out.exists() != is_documented
    assert (str(out) in capsys.readouterr().out) != is_documented


def test_rows_that_are_missing_are_measured_in_turn_and_written_at_once(
    tmp_path, monkeypatch
):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["table.py", "--seed", "7"])
    old = {"n": 1, "measured": "before", "more": [1.5]}
    path.write_text(json.dumps([old]))
    wanted = [{"n": 0}, {"n": 1}, {"n": 2}]
    seen = []

    def measure(setting):
        seen.append((setting["n"], len(json.loads(path.read_text()))))
        if setting["n"] == 2:
            raise KeyboardInterrupt
        return {"measured": "now"}

    with pytest.raises(KeyboardInterrupt):
        rows.fill(path, wanted, measure, str, "room.script")
    assert seen == [(0, 1), (2, 2)]

    first, second = json.loads(path.read_text())
    assert first == old
    assert second.items() >= {"n": 0, "measured": "now"}.items()
    assert second["command"] == "python -m data.evidence.room.script --seed 7"
    assert "torch " in second["machine"] and second["commit"] and second["date"]


def test_rows_that_another_process_adds_meanwhile_are_kept(tmp_path):
    path = tmp_path / "rows.json"

    def measure(setting):
        path.write_text(json.dumps([{"n": 9}]))
        return {}

    rows.fill(path, [{"n": 0}], measure, str, "room.script")
    assert [row["n"] for row in json.loads(path.read_text())] == [9, 0]


@pytest.mark.parametrize("pattern", ["*/*.json"])
def test_every_row_says_how_where_and_when_it_was_made(pattern):
    found = rows.read_rows(EVIDENCE, pattern)
    assert len(found) > 500

    for row in found:
        assert row["command"].startswith("python ") and row["commit"]
        assert "torch 2." in row["machine"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])


# --------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize(
    "room, page",
    [
        ("table1", lambda folder: table.page(rows.read_rows(folder, "*.json"))),
        (
            "map",
            lambda folder: tables.page(
                tables.grouped(rows.read_rows(folder, "*.json"))
            ),
        ),
        ("tasks", lambda folder: accuracy.page(rows.read_rows(folder, "*.json"))),
        ("speed", lambda folder: bench.page()),
    ],
)
def test_the_tables_are_those_that_the_rows_give(room, page):
    folder = EVIDENCE / room
    assert (folder / "tables.md").read_text(encoding="utf-8") == page(folder)


def test_a_cell_has_mean_and_standard_deviation_over_the_seeds_each_counted_once():
    values = {0: 2.0, 1: 3.5, 2: 7.0}
    found = [{"seed": seed, "x": x} for seed, x in values.items() for _ in range(3)]
    spread = np.std(list(values.values()), ddof=1)
    mean = np.mean(list(values.values()))

    assert rows.over_seeds(found, "x", 3) == f"{mean:.3f} ± {spread:.3f} (3)"
    assert rows.over_seeds(found[:3], "x") == "2.00 (1)"
    assert rows.over_seeds([], "x") == rows.mean_and_spread([]) == ""
    assert rows.mean_and_spread([4.0, 4.0]) == "4.00"
    assert rows.mean_and_spread([2e6, 4e6]) == "3,000,000"


def test_a_page_names_its_command_and_has_each_table_with_its_text():
    one = rows.Table("One", "What it is.", ["a", "b"], [[1, ""], ["x", 2.5]])
    two = rows.Table("Two", "", ["c"], [])
    first, one, two = rows.page("room.script draw", [one, two]).split("\n## ")

    assert "`python -m data.evidence.room.script draw`" in first
    assert (
        one == "One\n\nWhat it is.\n\n| a | b |\n| --- | --- |\n| 1 |  |\n| x | 2.5 |\n"
    )
    assert two == "Two\n\n| c |\n| --- |\n"


# --------------------------------------------------------------------------------------
# Models


def test_confidence_is_the_largest_probability_and_the_cross_entropy():
    model = micro_gpt()
    ids = micro_ids(300)  # two parts
    targets = micro_ids(300, seed=1)
    p = softmax64(model(ids).detach())
    true = np.take_along_axis(p, targets.numpy()[..., None], -1)[..., 0]
    top, cross_entropy = models.confidence(model, ids, targets)
    np.testing.assert_allclose(top.numpy(), p.max(-1), rtol=1e-4)
    np.testing.assert_allclose(cross_entropy.numpy(), -np.log(true), rtol=1e-4)


def test_a_model_is_sure_of_a_token_likelier_than_all_others_together():
    model = micro_gpt()
    model.lm_head.weight.data *= 4  # or no token of a random model is likely
    text = micro_ids(3, 40).flatten()
    setup = SimpleNamespace(tokens={"student": text}, device=torch.device("cpu"))
    setup.student = TrainConfig(block_size=7)

    blocks = text[: (len(text) - 1) // 7 * 7].view(-1, 7)
    expected = (softmax64(model(blocks).detach()).max(-1) > 0.5).mean()

    assert 0.05 < expected < 0.95
    assert models.sure_share(setup, model, "student") == pytest.approx(expected)

    setup.student.block_size = len(text)  # and its last token has no next one
    message = f"the student text has no whole block of {len(text)} "
    with pytest.raises(UserError, match=message):
        models.sure_share(setup, model, "student")


@pytest.mark.parametrize("temperature", [10.0, float("inf")])
def test_a_configuration_comes_back_from_json(temperature):
    config = TrainConfig(temperature=temperature, seed=3, gt_weight=0.25)
    text = json.dumps(models.as_json(config), allow_nan=False)
    values = json.loads(text)

    assert values == models.as_json(config)
    assert models.from_json(values) == config


# --------------------------------------------------------------------------------------
# The vocabulary


def test_learning_a_vocabulary_joins_the_most_frequent_pair_each_time():
    text = "low lower lowest newer newest wider low low  new\nnew 1999 aaaa aaaaa"
    found = re.findall(texts.PATTERN, text)
    words = [[bytes([byte]) for byte in word.encode()] for word in found]
    expected = [bytes([byte]) for byte in range(256)]

    while len(expected) < 275:  # brute force: count everything anew for every token
        counts = collections.Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        expected.append(b"".join(best))

        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [b"".join(best)]
                i += 1

    assert vocabulary.learn_vocabulary(text, 275) == expected
