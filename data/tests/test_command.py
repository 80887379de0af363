"""The command line: what it takes, and the one line that everything else gets.

1. Numbers
2. Flags
3. Help
4. Exit codes
5. Input that does not fit: exit code 2, and nothing half-written
"""

import argparse
import io
import math
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_small
import tsld
from data.lib import folder
from data.lib.command import exit_code, number
from data.lib.errors import UserError
from data.tests.helpers import ROOT, SHORT, refused, run
from tsld import LOSSES

# --------------------------------------------------------------------------------------
# 1. Numbers

COUNT = number(int, above=0)
RATE = number(float, above=0)
WEIGHT = number(float, least=0)
TEMPERATURE = number(float, above=0, finite=False)


@pytest.mark.parametrize(
    "parse_number, values",
    [
        (COUNT, {"1": 1, "9007199254740991": 2**53 - 1}),
        (RATE, {"1e-3": 0.001, "2": 2.0}),
        (WEIGHT, {"0": 0.0, "0.25": 0.25}),
        (TEMPERATURE, {"inf": math.inf, "0.5": 0.5}),
    ],
)
def test_a_number_within_its_bounds_is_taken(parse_number, values):
    for text, value in values.items():
        assert parse_number(text) == value
        assert type(parse_number(text)) is type(value)


@pytest.mark.parametrize(
    "parse_number, texts, words",
    [
        (COUNT, ["0", "-1", "1.5", "nan", "many", ""], "is no whole number above 0"),
        (COUNT, [str(2**53)], "is too large"),
        (RATE, ["0", "-1e-3", "nan", "fast"], "is no number above 0"),
        (RATE, ["inf", "1e16"], "is too large"),
        (WEIGHT, ["-0.5", "nan", "-inf"], "is no number 0 or more"),
        (WEIGHT, ["inf"], "is too large"),
        (TEMPERATURE, ["0", "-inf", "nan"], "is no number above 0"),
    ],
)
def test_another_number_is_refused_with_the_bound_that_it_breaks(
    parse_number, texts, words
):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as refusal:
            parse_number(text)
        assert str(refusal.value) == f"{text!r} {words}"


# --------------------------------------------------------------------------------------
# 2. Flags


def test_a_flag_that_is_not_named_has_its_default():
    values = vars(train_small.parse([]))
    defaults = {"loss": "tsld", "bits": 2, "accumulate": 1}
    defaults |= {"seed": 0, "teacher_seed": 0, "out": "out", "prompt": "the"}
    defaults |= {"compile": False, "resume": False}

    for name, value in values.items():
        assert value == defaults.get(name), name
    assert values.keys() >= defaults.keys()
    assert vars(train_small.parse(["--lr", "2"])) == values | {"lr": 2.0}


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--gran channel", "unrecognized arguments: --gran channel"),
        ("stray", "unrecognized arguments: stray"),
        ("--loss mse", "--loss: invalid choice: 'mse'"),
        ("--bits 3", "--bits: invalid choice: 3"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--task nothing", "--task: invalid choice: 'nothing'"),
        ("--steps 0", "--steps: '0' is no whole number above 0"),
        ("--block-size 1", "--block-size: '1' is no whole number above 1"),
        ("--seed -1", "--seed: '-1' is no whole number 0 or more"),
        ("--lr 0", "--lr: '0' is no number above 0"),
        ("--gt-weight -1", "--gt-weight: '-1' is no number 0 or more"),
        ("--tsld-temperature 0", "--tsld-temperature: '0' is no number above 0"),
        ("--out", "--out: expected one argument"),
        ("--model gpt3", "--model gpt3 is none of tiny, "),
        ("--task cola", "--data and --task: name one of them"),
        ("--prompt the", "--prompt has no meaning for training"),
    ],
)
def test_an_unknown_flag_or_value_is_refused(flags, words, tiny, capsys, tmp_path):
    assert refused([*tiny, *flags.split()], capsys, words) == ""
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_readme_are_taken():
    readme = (ROOT / "README.md").read_text("utf-8")
    command = r"^    (?:.*python|torchrun.*) train_small\.py(.*)$"
    commands = re.findall(command, readme, re.M)
    assert len(commands) > 7
    for flags in commands:
        words = shlex.split(flags, comments=True)
        train_small.parse([word.replace("FOLDER", str(ROOT)) for word in words])


@pytest.mark.parametrize("name", ["generate", "data", "model", "out", "device"])
def test_an_empty_name_is_refused(name, capsys):
    refused([f"--{name}", ""], capsys, f"--{name} is empty (see --help)")


def example(name):
    """A flag with a value that it takes."""
    values = {"compile": [], "resume": [], "export": ["x", "y"], "loss": ["all"]}
    values |= {"granularity": ["tensor"], "bits": ["2"], "block-size": ["2"]}
    values |= {"model": ["a/b"], "init": ["scratch"], "task": ["cola"]}
    values |= {"dtype": ["float32"]}
    return [f"--{name}", *values.get(name, ["1"])]


@pytest.mark.parametrize(
    "command, chosen_by, used",
    [
        (
            "--generate",
            ["generate"],
            {"generate", "prompt", "seed", "device", "model"},
        ),
        ("--export", ["export"], {"export", "model"}),
        (
            "training",
            [],
            {*train_small.ALL} - {"generate", "prompt", "export", "report"},
        ),
        ("--report", ["report"], {"report"}),
    ],
)
def test_a_flag_that_the_chosen_command_does_not_use_is_refused(
    command, chosen_by, used
):
    chosen = [word for name in chosen_by for word in example(name)]
    for name in used:
        train_small.parse([*chosen, *example(name)])
    for name in train_small.ALL.keys() - used - {"generate", "export", "report"}:
        words = f"^--{name} has no meaning for {command} "
        with pytest.raises(UserError, match=words):
            train_small.parse([*chosen, *example(name)])


def test_one_command_at_a_time():
    with pytest.raises(UserError, match="--generate has no meaning for --export"):
        train_small.parse([*example("generate"), *example("export")])


@pytest.mark.parametrize(
    "flag, losses",
    [
        ("--gt-weight", {"logit", "tsld", "all"}),
        ("--tsld-temperature", {"tsld", "all"}),
    ],
)
def test_a_flag_that_the_loss_does_not_use_is_refused(flag, losses):
    for loss in (*LOSSES, "all"):
        argv = ["--loss", loss, flag, "1"]
        if loss in losses:
            train_small.parse(argv)
        else:
            words = f"{flag} has no meaning for --loss {loss}"
            with pytest.raises(UserError, match=words):
                train_small.parse(argv)


def test_another_command_has_flags_and_defaults_of_its_own(capsys):
    takes = {"steps", "loss"}
    assert train_small.parse([], takes, steps=7).steps == 7
    assert train_small.parse(["--steps", "8"], takes, steps=7).steps == 8
    with pytest.raises(UserError, match="unrecognized arguments: --bits 2"):
        train_small.parse(["--bits", "2"], takes)

    with pytest.raises(SystemExit):
        train_small.parse(
            ["--help"], takes, "Does another thing, 100 % of it.", loss="gt"
        )

    text = " ".join(capsys.readouterr().out.split())
    assert "Does another thing, 100 % of it." in text
    assert "what it learns from (default gt)" in text
    assert "--bits" not in text


def random_flags(rng):
    """One to four flags of the table, with values good and bad."""
    flags = [flag for group in train_small.FLAGS.values() for flag in group]
    argv = []
    for i in rng.choice(len(flags), size=rng.integers(1, 5), replace=False):
        name, default, options, _ = flags[i]
        argv.append(f"--{name}")
        if options.get("action") != "store_true":
            values = [*options.get("choices", ()), default, 1, 2, 0, -1, 1e-3]
            values += ["inf", "nan", "", 2**64, "x"]
            argv.append(str(values[rng.integers(len(values))]))
    return argv


def test_any_combination_of_flags_is_taken_or_refused_in_one_line(capsys, monkeypatch):
    for name in ("run", "export", "write_text", "write_page", "from_transformers"):
        monkeypatch.setattr(train_small, name, lambda *arguments: None)
    student = SimpleNamespace(to=lambda device: None), None
    monkeypatch.setattr(train_small, "load_student", lambda *arguments: student)

    codes = []
    for seed in range(300):
        argv = random_flags(np.random.default_rng(seed))
        codes.append(train_small.main(argv))
        error = capsys.readouterr().err
        if codes[-1] == 0:
            assert error == "", argv
        else:
            assert codes[-1] == 2, argv
            assert error.startswith("error: ") and error.count("\n") == 1, argv

    assert 20 < codes.count(0) < 270


# --------------------------------------------------------------------------------------
# 3. Help


@pytest.fixture
def help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        train_small.main(["--help"])
    return " ".join(capsys.readouterr().out.split())


def test_the_help_names_every_flag_in_its_group(help_text):
    assert "says what rounding cost and what distillation won back." in help_text

    position = 0
    for title, flags in train_small.FLAGS.items():
        position = help_text.index(f"{title}: --", position)
        for name, _, _, about in flags:
            position = help_text.index(f"--{name} ", position)
            assert about in help_text[position:]


def test_the_help_has_the_defaults_of_the_presets(help_text):
    tiny, others = train_small.TINY, train_small.GPT2
    for flag, of_tiny, of_others in (
        ("tsld-temperature", "20", "10"),
        ("gt-weight", "0.25", "0"),
        ("student-tokens", tiny.student_tokens, "all"),
        ("steps", tiny.student.steps, f"{others.student_epochs} epochs"),
        ("batch-size", tiny.student.batch_size, others.student.batch_size),
        ("block-size", tiny.gpt.block_size, others.gpt.block_size),
    ):
        position = help_text.rindex(f"--{flag} ")
        words = f"(default {of_tiny} for tiny, else {of_others})"
        assert help_text.index(words, position) < help_text.find(" --", position + 1)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_without_greek_letters_gets_the_help(encoding, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit, match="0"):
        train_small.main(["--help"])

    terminal.flush()
    assert "? of the token scale" in terminal.buffer.getvalue().decode(encoding)


# --------------------------------------------------------------------------------------
# 4. Exit codes

OUT_OF_MEMORY = "not enough memory: try --accumulate, or a smaller --batch-size or "
OUT_OF_MEMORY += "--block-size"
INTERRUPTED = "interrupted; the checkpoints are kept"


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("two\n  lines"), 2, "two lines"),
        (tsld.CheckpointError("x is damaged"), 2, "x is damaged"),
        (FileNotFoundError(2, "No such file", "x"), 2, "x: No such file"),
        (OSError("no route to host"), 2, "no route to host"),
        (MemoryError(), 2, OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: not enough"), 2, OUT_OF_MEMORY),
        (tsld.TrainingDiverged("loss nan at step 3"), 1, "loss nan at step 3"),
        (KeyboardInterrupt("stopped after step 2"), 130, "stopped after step 2"),
        (KeyboardInterrupt(), 130, INTERRUPTED),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(error, code, line, capsys):
    def fail(argv):
        raise error

    assert exit_code(fail, []) == code
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_command_that_succeeds_says_nothing_more_and_a_mistake_is_not_hidden(capsys):
    seen = []
    assert exit_code(seen.append, ["--flag"]) == 0
    assert seen == [["--flag"]]
    assert capsys.readouterr() == ("", "")

    def mistaken(argv):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        exit_code(mistaken, [])


# --------------------------------------------------------------------------------------
# 5. Input that does not fit


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "meta"])
def test_a_device_that_is_not_there_is_refused(device, tiny, capsys):
    words = f"--device {device}: this machine has none; leave the flag out"
    for argv in (tiny, ["--generate", "x"]):
        assert refused([*argv, "--device", device], capsys, words) == ""


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    tiny, capsys, tmp_path
):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        words = f"folder {path} cannot be written: "
        assert refused([*tiny, "--out", str(path)], capsys, words) == ""


@pytest.mark.skipif(folder.fcntl is None, reason="this system does not lock files")
def test_a_folder_that_another_run_holds_is_refused_by_name(tiny, capsys, tmp_path):
    out = folder.check_folder(tmp_path / "out")
    with folder.hold(out):
        words = f"{out} is in use by another process: name another folder"
        assert refused(tiny, capsys, words) == ""
    run([*SHORT, *tiny], capsys)

    assert not (out / ".lock").exists()


def test_a_disk_without_room_is_found_before_training(tiny, capsys, monkeypatch):
    # A training keeps two checkpoints and writes one more. Each has a weight and two
    # averages, of 4 bytes. The other training keeps its weights.
    enough = (3 * 3 + 1) * 4 * 17_400
    usage = SimpleNamespace(free=enough)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    run([*SHORT, *tiny], capsys)

    words = "GB free: name a folder on another disk"
    assert "teacher:" not in refused(["--loss", "all", *tiny], capsys, words)

    usage.free = enough - 1
    assert "teacher:" not in refused(tiny, capsys, words)


@pytest.mark.parametrize("parts", ["1", "1000000000000000"])
def test_a_batch_that_no_memory_holds_is_refused_before_the_teacher(
    parts, tiny, capsys
):
    words = "a batch of 1,000,000,000,000,000 x 16 tokens takes "
    batch = ["--batch-size", str(10**15), "--accumulate", parts]
    assert "teacher:" not in refused([*batch, *tiny], capsys, words)


def test_a_block_beyond_all_memory_is_refused(tiny, capsys):
    model = ["--model", "gpt2-xl", "--init", "scratch"]  # whose size in bytes overflows
    for flags in ([], model):
        words = "--block-size 9007199254740991 is too large for any memory"
        refused(["--block-size", str(2**53 - 1), *flags, *tiny], capsys, words)


def test_too_little_memory_is_one_line(tiny, capsys):
    refused(["--block-size", str(10**12), *tiny], capsys, OUT_OF_MEMORY)


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny, capsys, tmp_path):
    run([*SHORT, *tiny], capsys)
    out = tmp_path / "out"
    results = (out / "results.json").read_bytes()
    for path in (out / "student-tsld.pt", next(out.glob("teacher-*.pt"))):
        content = path.read_bytes()
        for damaged in (content[:500] + b"!" + content[501:], b"GIF"):
            path.write_bytes(damaged)
            words = f"{path} is truncated, altered, or not a file of this program: "
            refused(["--resume", *SHORT, *tiny], capsys, words)
            assert path.read_bytes() == damaged
        path.write_bytes(content)

    assert (out / "results.json").read_bytes() == results

    run(["--resume", *SHORT, *tiny], capsys)


def test_a_student_of_another_run_is_refused_with_both_values(tiny, capsys):
    run([*SHORT, *tiny], capsys)
    rate = str(train_small.PRESETS["tiny"].student.lr)
    for flags, words in (
        (["--lr", "0.5"], f"lr is {rate}, not 0.5; delete it"),
        (["--bits", "4", "--lr", rate], "quantizers is [(2, 'tensor')], not [(4, 't"),
        (["--teacher-seed", "1"], "teacher is "),
        (["--student-tokens", "200"], "text is "),
    ):
        words = f" is of another run: {words}"
        refused(["--resume", *SHORT, *flags, *tiny], capsys, words)
