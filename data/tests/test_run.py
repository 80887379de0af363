"""What a run does beyond what the main command promises in test_tsld.py.

1. Settings
2. Runs of every sort
3. The teacher
4. Interruptions
5. Two processes
6. Models of transformers
7. Devices
"""

import json
import math
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_small
import tsld
from data import tasks, texts
from data.lib import devices, hf, lean, resumable, sources
from data.lib.files import load_packed, read_checked
from data.lib.students import load_student
from data.tests.helpers import (
    QUESTIONS,
    ROOT,
    SHORT,
    WORDS,
    Beside,
    Watched,
    assert_equal,
    finished_run,
    has_loopback,
    interrupt_at,
    micro_gpt,
    nats_of_choice,
    refused,
    run,
    run_together,
    save_tokenizer_of_bytes,
    softmax64,
    tiny_preset,
)

PARTS = texts.split_text((WORDS * 40).encode())


def set_up(flags, tiny):
    return train_small.set_up(train_small.parse([*flags, *tiny]))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def weights(folder, name="student-tsld.pt"):
    """What a checkpoint holds of the model."""
    return read_checked(folder / name)["model"]


@pytest.fixture
def trained(monkeypatch):
    """Notes what is trained, how, and after how many steps it goes on."""
    calls = []
    train = tsld.train

    def note(model, tokens, config, teacher, optimizer, start, how):
        call = {"tokens": tokens, "config": config, "teacher": teacher, "start": start}
        calls.append(SimpleNamespace(**call))
        return train(model, tokens, config, teacher, optimizer, start, how)

    monkeypatch.setattr(tsld, "train", note)
    return calls


# --------------------------------------------------------------------------------------
# 1. Settings


def test_the_tiny_runs_settings_are_those_that_measured_best():
    preset = train_small.PRESETS["tiny"]
    assert (preset.student.temperature, preset.student.gt_weight) == (20.0, 0.25)
    assert (preset.teacher_epochs, preset.student_tokens) == (11, 100_000)
    assert preset.lr_4bit < preset.student.lr


def test_gpt2s_schedule_is_the_papers():
    for name, layers, heads, width in (
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    ):
        preset = train_small.PRESETS[name]
        assert preset.gpt == tsld.GPTConfig(512, 50257, layers, heads, width, 0.1)
        assert (preset.teacher_epochs, preset.student_epochs) == (3, 90)
        for config in (preset.teacher, preset.student):
            assert (config.batch_size, config.lr) == (4, 1e-4)
        assert (preset.student.temperature, preset.student.gt_weight) == (10.0, 0.0)


def test_a_training_ends_with_its_steps_or_its_epochs_whichever_comes_first():
    config = tsld.TrainConfig(steps=1000, batch_size=4)
    tokens = range(100_000)
    blocks = 100_000 / 512

    assert train_small.limit(config, 3, 512, tokens) == math.ceil(3 * blocks / 4)
    assert train_small.limit(config, 90, 512, tokens) == 1000
    assert train_small.limit(config, math.inf, 512, tokens) == 1000


@pytest.mark.parametrize(
    "flags, student, teacher",
    [
        ([], {"steps": 6, "loss": "tsld", "seed": 0}, {"steps": 4, "seed": 0}),
        (["--steps", "3"], {"steps": 3}, {"steps": 2}),  # shortened in proportion
        (["--steps", "12"], {"steps": 12}, {"steps": 4}),
        (["--steps", "3", "--teacher-steps", "9"], {"steps": 3}, {"steps": 9}),
        (["--loss", "all"], {"loss": "tsld"}, {"loss": "gt"}),
        (["--loss", "l2l"], {"loss": "l2l"}, {"loss": "gt"}),
        (["--seed", "3"], {"seed": 3}, {"seed": 0}),
        (["--teacher-seed", "3"], {"seed": 0}, {"seed": 3}),
        (["--gt-weight", "0"], {"gt_weight": 0.0}, {}),
        (["--gt-weight", "2"], {"gt_weight": 2.0}, {"gt_weight": 0.0}),
        (["--tsld-temperature", "inf"], {"temperature": math.inf}, {}),
        (["--lr", "0.5"], {"lr": 0.5}, {"lr": 4e-3}),
        (["--bits", "4"], {"lr": 1e-4}, {"lr": 4e-3}),
        (["--bits", "4", "--lr", "0.5"], {"lr": 0.5}, {}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        (["--block-size", "9"], {"block_size": 9}, {"block_size": 9}),
        (["--batch-size", "8"], {"batch_size": 8}, {"batch_size": 4}),
        # The teacher's batch of 4 is split into as many parts, or a few more.
        (["--accumulate", "2"], {"accumulate": 2}, {"accumulate": 2}),
        (
            ["--accumulate", "3", "--batch-size", "6"],
            {"accumulate": 3},
            {"accumulate": 4},
        ),
        (
            ["--accumulate", "8", "--batch-size", "8"],
            {"accumulate": 8},
            {"accumulate": 4},
        ),
    ],
)
def test_flags_are_settings_of_the_student_and_of_its_teacher(
    flags, student, teacher, tiny
):
    setup = set_up(flags, tiny)
    for config, expected in ((setup.student, student), (setup.teacher, teacher)):
        assert vars(config) | expected == vars(config)


def test_epochs_end_a_training_too(tiny, monkeypatch):
    preset = replace(tiny_preset(), teacher_epochs=0.1, student_epochs=0.5)
    preset.teacher.steps = preset.student.steps = 10**6
    monkeypatch.setitem(train_small.PRESETS, "tiny", preset)
    setup = set_up([], tiny)

    assert setup.student.steps == math.ceil(0.5 * 300 / (4 * 16))

    n_tokens = len(setup.tokens["train"])
    assert setup.teacher.steps == math.ceil(0.1 * n_tokens / (4 * 16))

    # A run that is shortened is shortened from there.
    assert set_up(["--steps", "1"], tiny).teacher.steps < setup.teacher.steps


def test_a_batch_is_shared_out_among_processes_and_parts(tiny, capsys, monkeypatch):
    words = "a batch of 4 does not divide by 1 (processes) x 3 (--accumulate)"
    assert "teacher" not in refused(["--accumulate", "3", *tiny], capsys, words)

    monkeypatch.setattr(train_small, "processes", lambda: (1, 2))
    words = "a batch of 4 does not divide by 2 (processes) x 4 (--accumulate)"
    assert "teacher" not in refused(["--accumulate", "4", *tiny], capsys, words)
    assert set_up(["--accumulate", "2"], tiny).teacher.accumulate == 2


def test_all_losses_are_compared_with_the_same_labels_and_without(tiny):
    setup = set_up(["--loss", "all", "--gt-weight", "0.5"], tiny)
    found = {name: (c.loss, c.gt_weight) for name, c in setup.students.items()}
    expected = {loss: (loss, 0.5) for loss in tsld.LOSSES}
    expected |= {"logit-no-gt": ("logit", 0.0), "tsld-no-gt": ("tsld", 0.0)}

    assert found == expected

    setup = set_up(["--loss", "all", "--gt-weight", "0"], tiny)
    assert [*setup.students] == [*tsld.LOSSES]
    assert [*set_up(["--loss", "gt"], tiny).students] == ["gt"]


# --------------------------------------------------------------------------------------
# 2. Runs of every sort


@pytest.mark.parametrize("size", [2, 40])
def test_the_block_size_asked_for_is_the_length_of_the_sequences(
    size, tiny, capsys, tmp_path, small_vocabulary
):
    run(["--block-size", str(size), *tiny], capsys)
    (row,) = results(tmp_path / "out")
    tokens = 6 * 4 * size

    assert row["tokens_per_second"] == pytest.approx(tokens / row["train_seconds"])

    student = load_packed(tmp_path / "out" / "student-tsld.packed")
    assert student.config.block_size == size

    ids = torch.tensor(small_vocabulary.encode_ordinary(PARTS["valid"]))
    nats = 0.0
    for start in range(0, len(ids) - 1, size):  # where the context of a block begins
        targets = ids[start + 1 : start + size + 1]
        p = softmax64(student(ids[None, start : start + len(targets)])[0])
        nats -= np.log(p[range(len(targets)), targets]).sum()
    perplexity = math.exp(nats / (len(ids) - 1))

    assert row["student_ppl"] == pytest.approx(perplexity, rel=2e-3)


def test_a_task_is_a_text_to_train_on_and_examples_to_choose_from(
    tiny, capsys, tmp_path, monkeypatch, small_vocabulary
):
    examples = QUESTIONS[::3]  # one prompt, and both answers
    task = {"cola": (QUESTIONS[1:3] * 20, examples)}
    monkeypatch.setattr(tasks, "load_task", task.get)
    printed = run(["--task", "cola", *tiny[2:]], capsys)

    assert "corpus: cola, 40 examples, 2 to evaluate on\n" in printed
    assert "scored 2 examples, 2 of them cut to a block of 16\n" in printed

    titles = r"perplexity +bits/byte +accuracy +acc_norm +mcc +won back +bytes\n"
    assert re.search(titles, printed)
    assert "How much TSLD" not in printed
    # Of 13 tokens, which are more than half a block.
    question = small_vocabulary.encode_ordinary(examples[0].prompt)[-8:]
    text = " ".join(small_vocabulary.decode(question).split())
    assert f"The first question: {text}\n" in printed
    assert "\0" not in printed
    assert "2 dev examples" in printed and "validation" not in printed

    (row,) = results(tmp_path / "out")
    names = (row["task"], row["data"], row["model"])
    assert names == ("cola", "cola", "tiny")
    assert not [name for name in row if name.startswith("test_")]

    for model in ("teacher", "ptq", "student"):
        assert (row[f"{model}_accuracy"], row[f"{model}_mcc"]) == (0.5, 0)

    student = load_packed(tmp_path / "out" / "student-tsld.packed")
    nats = n_tokens = 0
    for example in examples:
        answer = example.choices[example.answer]
        nats += nats_of_choice(student, small_vocabulary, example.prompt, answer, 16)
        n_tokens += len(small_vocabulary.encode_ordinary(f" {answer}"))

    assert row["student_ppl"] == pytest.approx(math.exp(nats / n_tokens), rel=2e-3)


def test_four_bits_have_a_rate_of_their_own_and_leave_a_file_to_use(
    tiny, capsys, tmp_path, trained
):
    out = tmp_path / "out"
    run([*SHORT, *tiny], capsys)
    packed = {path.name for path in out.glob("*.packed")}

    assert packed == {"rounded.packed", "student-tsld.packed"}

    printed = run(["--bits", "4", *SHORT, *tiny], capsys)
    assert "rounded to 4 bits" in printed and "The 4-bit matrices take 384" in printed
    assert "ternary" not in printed
    assert {path.name for path in out.glob("*.packed")} == packed

    (row,) = results(out)
    assert row["bits"] == 4
    assert row["bytes_packed"] == (out / "student-tsld.packed").stat().st_size
    assert row["linear_bytes_packed"] == 12 * 8 * 8 / 2
    student, tokenizer = load_student(out / "student-tsld.packed", train_small.PRESETS)
    ids = tokenizer.encode_ordinary(PARTS["valid"])
    perplexity = math.exp(tsld.evaluate(student, torch.tensor(ids), 16))
    assert row["student_ppl"] == pytest.approx(perplexity, rel=2e-3)

    argv = shlex.split(printed.splitlines()[-2].removeprefix("more text: "))
    assert run([*argv[2:], "--device", "cpu"], capsys).startswith(argv[-1])

    preset = train_small.PRESETS["tiny"]
    rates = [call.config.lr for call in trained if call.teacher]
    assert rates == [preset.student.lr, preset.lr_4bit]
    assert train_small.student_lr(train_small.PRESETS["gpt2"], 4) == 1e-4


def test_a_run_within_one_tick_of_the_clock_has_no_speed(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(resumable.time, "perf_counter", lambda: 500.0)
    run([*SHORT, *tiny], capsys)
    (row,) = results(tmp_path / "out")
    assert (row["train_seconds"], row["tokens_per_second"]) == (0.0, None)


def test_the_same_command_again_finds_its_teacher_and_trains_its_student_anew(
    tiny, capsys, trained
):
    for _ in range(2):
        run([*SHORT, *tiny], capsys)
    assert [call.start for call in trained] == [0, 0, 1, 0]


def test_the_student_sees_the_beginning_of_the_text_alone(tiny, capsys, trained):
    run(["--student-tokens", "150", *SHORT, *tiny], capsys)
    teacher, student = trained
    assert len(student.tokens) == 150 < len(teacher.tokens)
    assert torch.equal(student.tokens, teacher.tokens[:150])


def test_where_asked_teacher_and_student_are_compiled(tiny, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    run(["--compile", *SHORT, *tiny], capsys)

    assert [type(block) for block in compiled] == [tsld.Block] * 2

    run([*SHORT, *tiny], capsys)
    assert len(compiled) == 2


def test_a_model_that_cannot_be_rounded_is_refused_before_training(
    tiny, capsys, monkeypatch, small_vocabulary
):
    class Other(torch.nn.Linear):
        pass

    model = micro_gpt(vocab_size=2048, block_size=16)
    model.h[0].mlp.c_fc = Other(12, 48)
    source = sources.Source("a/b", model, small_vocabulary, tiny_preset(), "scratch")
    monkeypatch.setattr(train_small, "choose_source", lambda args, device: source)

    words = "--model a/b: h.0.mlp.c_fc is a Other, not an nn.Linear"
    assert "teacher" not in refused(tiny, capsys, words)


# --------------------------------------------------------------------------------------
# 3. The teacher


def test_a_teacher_is_named_after_all_that_makes_it(tiny, tmp_path):
    same = [[], ["--seed", "1"], ["--loss", "gt"], ["--lr", "1"], ["--bits", "4"]]
    same += [["--student-tokens", "99"], ["--steps", "6"], ["--gt-weight", "0"]]

    (tmp_path / "other.txt").write_bytes((WORDS * 39).encode())
    others = [["--teacher-steps", "5"], ["--teacher-seed", "1"], ["--steps", "3"]]
    others += [["--block-size", "5"], ["--data", str(tmp_path / "other.txt")]]
    others += [["--dtype", "bfloat16"]]

    def path(flags):
        return train_small.teacher_path(
            set_up([], ["--dtype", "float32", *tiny, *flags])
        )

    (name,) = {path(flags) for flags in same}
    assert re.fullmatch(r"teacher-tiny-[0-9a-f]{8}\.pt", name.name)
    assert name.parent == tmp_path / "out"
    assert len({path(flags) for flags in others} | {name}) == len(others) + 1

    # A model that comes with weights is another one with other weights.
    setup = set_up([], tiny)
    names = {train_small.teacher_path(setup)}
    setup.source.model.wte.weight.data[3] += 1
    names.add(train_small.teacher_path(setup))
    setup.source.name = "other/tiny"
    names.add(train_small.teacher_path(setup))

    assert len(names) == 3


def test_students_learn_from_a_bfloat16_teacher_where_it_is_as_good_to_three_digits(
    tiny, capsys, trained, monkeypatch
):
    in_bfloat16 = ["--dtype", "bfloat16", *SHORT, *tiny]
    printed = run(in_bfloat16, capsys)
    assert "teacher for distillation: bfloat16 (perplexity " in printed

    printed = run(["--dtype", "float32", *SHORT, *tiny], capsys)
    assert "teacher for distillation" not in printed

    evaluate = tsld.evaluate

    def worse_in_bfloat16(model, *others):
        is_half = model.ln_f.weight.dtype == torch.bfloat16
        return evaluate(model, *others) + is_half * math.log(1.001)

    monkeypatch.setattr(tsld, "evaluate", worse_in_bfloat16)
    printed = run(in_bfloat16, capsys)
    assert "teacher for distillation: float32; in bfloat16 (perplexity " in printed

    teachers = [call.teacher for call in trained if call.teacher is not None]
    dtypes = [teacher.wte.weight.dtype for teacher in teachers]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]

    # Of a teacher that is worse than any chance.
    monkeypatch.setattr(tsld, "evaluate", lambda *others: 338.0)
    printed = run(in_bfloat16, capsys)
    assert "bfloat16 (perplexity 6.188e+146, in float32 6.188e+146)" in printed


# --------------------------------------------------------------------------------------
# 4. Interruptions


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The student's weights after a run that nothing interrupted."""
    return weights(finished_run(tmp_path_factory.mktemp("uninterrupted")))


@pytest.mark.parametrize(
    "line, stopped, next_command, starts",
    [
        ("teacher: step 2/", "2 of 4", "the same command", [2, 0]),
        ("student, tsld: step 2/", "2 of 6", "the same command and --resume", [4, 2]),
    ],
)
def test_a_signal_stops_a_run_which_goes_on_to_the_very_same_weights(
    line,
    stopped,
    next_command,
    starts,
    uninterrupted,
    tiny,
    capsys,
    tmp_path,
    monkeypatch,
    trained,
):
    with monkeypatch.context() as patch:
        interrupt_at(line, patch)
        assert train_small.main(tiny) == 130
    error = capsys.readouterr().err

    assert error == f"error: stopped after step {stopped}; go on with {next_command}\n"
    assert not (tmp_path / "out" / "results.json").exists()

    trained.clear()
    run([*tiny, "--resume"], capsys)
    assert [call.start for call in trained] == starts
    assert results(tmp_path / "out")
    assert_equal(weights(tmp_path / "out"), uninterrupted)


def test_an_interrupted_run_goes_on_in_the_folder_of_an_earlier_one(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "LOSSES", ("gt", "tsld"))
    flags = ["--loss", "all", "--gt-weight", "0", "--teacher-steps", "2", *tiny]
    run([*flags, "--steps", "2"], capsys)

    with monkeypatch.context() as patch:
        interrupt_at("student, gt: step 2/", patch)
        assert train_small.main([*flags, "--steps", "3"]) == 130

    assert "step 3/3" in run([*flags, "--steps", "3", "--resume"], capsys)
    assert read_checked(tmp_path / "out" / "student-tsld.pt")["step"] == 3
    assert not (tmp_path / "out" / "student-tsld.previous.pt").exists()


def test_a_run_that_diverges_leaves_the_last_good_checkpoint(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(resumable, "CHECKPOINT_SECONDS", 0)
    calls = []
    exact = lean.backward

    def fails_later(*arguments):
        calls.append(1)
        is_students_third = len(calls) == 4 + 3
        return exact(*arguments) * (math.inf if is_students_third else 1.0)

    monkeypatch.setattr(lean, "backward", fails_later)
    assert train_small.main(tiny) == 1

    error = capsys.readouterr().err
    path = tmp_path / "out" / "student-tsld.pt"
    assert "at step 3, rate " in error
    assert error.endswith(f"; the last checkpoint is {path}\n")
    assert read_checked(path)["step"] == 2
    assert not (tmp_path / "out" / "results.json").exists()


# --------------------------------------------------------------------------------------
# 5. Two processes

TOGETHER = """
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import train_small
from data.tests.helpers import tiny_preset
torch.set_num_threads(1)
train_small.PRESETS["tiny"] = tiny_preset()
sys.exit(train_small.main(sys.argv[1:]))
"""


@Beside
def run_of_two(folder):
    """The folder, the flags but for --out, and how the run ended."""
    (folder / "together.py").write_text(TOGETHER)
    (folder / "text.txt").write_bytes((WORDS * 40).encode())
    flags = ["--dtype", "float32", "--device", "cpu"]
    flags += ["--data", str(folder / "text.txt")]
    out = ["--out", str(folder / "out")]
    return folder, flags, run_together(folder / "together.py", *flags, *out)


@pytest.mark.skipif(not has_loopback(), reason="no loopback network")
def test_two_processes_make_the_files_and_the_table_of_one(tiny, capsys):
    folder, flags, together = run_of_two()
    assert together.returncode == 0, together.stderr

    # The first process alone prints.
    for title in ("corpus", "model", "results", "more text"):
        assert len(re.findall(f"^{title}: ", together.stdout, re.M)) == 1

    run([*flags, "--out", str(folder / "alone")], capsys)
    folders = folder / "out", folder / "alone"
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert names[0] == names[1]

    (two,), (one,) = (results(folder) for folder in folders)
    assert two.keys() == one.keys()
    for name in one.keys() - {"train_seconds", "tokens_per_second", "bytes_packed"}:
        is_score = name.endswith(("_ppl", "_bpb"))
        expected = pytest.approx(one[name], rel=1e-4) if is_score else one[name]
        assert two[name] == expected, name


# --------------------------------------------------------------------------------------
# 6. Models of transformers


@pytest.fixture
def opt(tmp_path):
    """The folder of a tiny OPT and a tokenizer whose tokens are bytes."""
    path = tmp_path / "tiny-opt"
    save_tokenizer_of_bytes(path)
    save_opt(path, vocab_size=256)
    return path


def save_opt(path, vocab_size):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "ffn_dim": 20, "word_embed_proj_dim": 12}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": vocab_size, "max_position_embeddings": 600}
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))
    model.save_pretrained(path)


@pytest.mark.parametrize("loss", ["tsld", "l2l"])
def test_a_model_of_transformers_is_trained_with_its_own_tokenizer(
    loss, opt, tiny, capsys, tmp_path
):
    flags = ["--model", str(opt), "--loss", loss, "--steps", "3", "--batch-size", "2"]
    printed = run([*flags, *tiny], capsys)
    assert f"student, {loss}: 3 steps" in printed
    assert "2 layers x 12" in printed
    argv = shlex.split(printed.splitlines()[-2].removeprefix("more text: "))
    assert argv[4:6] == ["--model", str(opt)]
    assert run([*argv[2:], "--device", "cpu"], capsys).startswith(argv[-1])

    (row,) = results(tmp_path / "out")
    assert row["model"] == row["tokenizer"] == str(opt)
    # A token is a byte, so bits per byte are bits per token.
    bits = math.log2(row["student_ppl"])
    assert row["student_bpb"] == pytest.approx(bits, rel=1e-6)

    model, tokenizer = hf.load_model(opt)
    ids = torch.tensor(tokenizer.encode_ordinary(PARTS["valid"]))
    assert len(ids) == len(PARTS["valid"])

    packed = load_packed(tmp_path / "out" / f"student-{loss}.packed", into=model)
    perplexity = math.exp(tsld.evaluate(packed, ids, 512))
    assert row["student_ppl"] == pytest.approx(perplexity, rel=2e-3)

    exported = tmp_path / "exported"
    file = str(tmp_path / "out" / f"student-{loss}.packed")
    words = ["--export", file, str(exported), "--model", str(opt)]

    assert run(words, capsys).startswith(f"{exported}: {file}, ")

    again, _ = hf.load_model(exported)
    torch.testing.assert_close(
        again(ids[None, :50]), packed(ids[None, :50]), rtol=1e-2, atol=1e-2
    )


def test_a_model_of_transformers_that_does_not_fit_is_refused_before_training(
    opt, tiny, capsys
):
    save_opt(opt, vocab_size=100)
    words = f"the tokenizer of {opt} makes token "
    assert "teacher" not in refused(["--model", str(opt), *tiny], capsys, words)
    (opt / "config.json").write_text("{}")
    assert "teacher" not in refused(["--model", str(opt), *tiny], capsys, f"{opt}: ")


def test_without_the_package_a_model_of_transformers_is_refused_by_name(
    tiny, capsys, monkeypatch
):
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    words = "a/b takes the package transformers, which is not installed"
    assert "teacher" not in refused(["--model", "a/b", *tiny], capsys, words)


def test_the_recipe_in_the_readme_runs_as_written(opt, tmp_path, monkeypatch, capsys):
    blocks = (ROOT / "README.md").read_text("utf-8").split("```python\n")
    (recipe,) = [block.split("```")[0] for block in blocks if "load_model" in block]
    assert "facebook/opt-125m" in recipe
    assert "steps=300" in recipe

    load_model = hf.load_model
    monkeypatch.setattr(hf, "load_model", lambda name: load_model(opt))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes((WORDS * 60).encode())
    names = {}
    exec(recipe.replace("steps=300", "steps=2"), names)

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["1", "2"]
    assert lines[2].startswith("the company said")
    layer = names["small"].inner.model.decoder.layers[1].fc2
    assert layer.dequantized().unique().numel() > 3  # a scale for each channel
    assert (tmp_path / "opt.packed").stat().st_size < 100_000

    exported, _ = load_model(tmp_path / "ternary-opt")
    found = exported.inner.model.decoder.layers[1].fc2.weight
    assert torch.equal(found, layer.dequantized())


# --------------------------------------------------------------------------------------
# 7. Devices


@pytest.mark.parametrize("found", ["mps", "cuda", None])
def test_the_accelerator_that_is_there_is_chosen(found, monkeypatch):
    def current_accelerator(check_available):
        assert check_available
        return found and torch.device(found)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert devices.choose_device(None) == torch.device(found or "cpu")
    assert devices.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "device, features, has_bfloat16",
    [
        ("cpu", {"avx2": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ("cpu", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("cpu", {"avx2": True}, False),
        ("cuda", True, True),
        ("cuda", False, False),
        ("mps", None, False),
    ],
)
def test_products_are_in_bfloat16_where_the_hardware_has_it(
    device, features, has_bfloat16, monkeypatch
):
    def is_bf16_supported(including_emulation):
        assert not including_emulation
        return features

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    expected = "bfloat16" if has_bfloat16 else "float32"

    assert devices.default_dtype(torch.device(device)) == expected


def test_nothing_in_a_run_is_float64_which_apples_gpus_lack(tiny, capsys, tmp_path):
    with Watched() as watched:
        for loss in ("l2l", "tsld"):
            run(["--loss", loss, *SHORT, *tiny], capsys)
        file = str(tmp_path / "out" / "student-tsld.packed")
        run(["--generate", file, "--device", "cpu"], capsys)

    assert torch.float32 in watched.dtypes
    assert torch.float64 not in watched.dtypes
