"""data/lib/resumable.py: a training that shows how far it is, and that goes on after an
interruption to the weights of the undisturbed one, bit for bit."""

import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import tsld
from data.lib import checkpoints, lean, resumable
from data.lib.files import fingerprint, read_checked, write_checked
from data.lib.progress import TrainingStopped
from data.lib.resumable import Measure, ProgressLine, kl_to_teacher
from data.tests.helpers import (
    ROOT,
    TEXT,
    Beside,
    assert_equal,
    micro_gpt,
    micro_ids,
    softmax64,
)

CPU = torch.device("cpu")
BRIEF = tsld.TrainConfig(loss="tsld", steps=6, batch_size=2, block_size=8, lr=0.01)


def a_student(dropout=0.5, bits=2, granularity="tensor"):
    return tsld.quantize_model(micro_gpt(1, dropout=dropout), bits, granularity)


def a_teacher(seed=2):
    teacher = micro_gpt(seed)
    teacher.fingerprint = fingerprint(teacher.parameters())
    return teacher


def train(
    path,
    student=None,
    teacher=None,
    text=TEXT,
    resume=False,
    stop_at=None,
    measure=None,
    **changes,
):
    """The weights after a training with checkpoints. stop_at: the step after which a
    signal comes. changes: of the configuration."""

    def watch(step, model):
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    student = student or a_student()
    resumable.train(
        "student",
        student,
        text,
        replace(BRIEF, **changes),
        path,
        CPU,
        resume,
        teacher or a_teacher(),
        watch=watch,
        measure=measure,
    )
    return student.state_dict()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of a training that nothing interrupted."""
    return train(tmp_path_factory.mktemp("undisturbed") / "state.pt")


# --------------------------------------------------------------------------------------
# The training is that of tsld.train


@pytest.mark.parametrize("loss", ["gt", "tsld", "l2l"])
def test_the_weights_are_those_of_tsld_train(loss, tmp_path):
    weights = train(tmp_path / "state.pt", loss=loss)
    expected = a_student()
    config = replace(BRIEF, loss=loss)
    way = tsld.backward if loss == "l2l" else lean.backward
    list(tsld.train(expected, TEXT, config, a_teacher(), backward=way))
    assert_equal(weights, expected.state_dict())


def test_a_model_whose_logits_are_not_hidden_times_head_takes_the_losses_of_logits():
    class Other(torch.nn.Module):
        pass

    with_bias = micro_gpt()
    with_bias.lm_head = torch.nn.Linear(12, 17)

    def chosen(student, teacher, loss):
        config = replace(BRIEF, loss=loss)
        return resumable.choose_backward(student, teacher, config)

    class Scaled(tsld.GPT):
        def forward(self, ids, trace=False):
            return super().forward(ids) / 3

    gpt, scaled = micro_gpt(), Scaled(micro_gpt().config)
    assert chosen(scaled, gpt, "tsld") is tsld.backward
    assert chosen(gpt, scaled, "tsld") is tsld.backward
    scaled.__class__ = tsld.GPT
    assert chosen(gpt, scaled, "tsld") is lean.backward
    scaled.forward = lambda ids: tsld.GPT.forward(scaled, ids) / 3
    assert chosen(gpt, scaled, "tsld") is tsld.backward
    assert chosen(gpt, gpt, "tsld") is lean.backward
    assert chosen(gpt, None, "gt") is lean.backward
    assert chosen(gpt, gpt, "l2l") is tsld.backward
    assert chosen(Other(), gpt, "tsld") is tsld.backward
    assert chosen(gpt, Other(), "tsld") is tsld.backward
    assert chosen(with_bias, gpt, "tsld") is tsld.backward
    assert chosen(gpt, with_bias, "tsld") is tsld.backward


def test_after_each_step_the_one_who_watches_is_called_and_the_trained_model_returned(
    tmp_path,
):
    student = a_student()
    seen = []

    def watch(step, model):
        assert model is student
        assert model.training
        seen.append(step)

    path = tmp_path / "state.pt"
    seconds, trained = resumable.train(
        "student", student, TEXT, BRIEF, path, CPU, False, a_teacher(), watch=watch
    )
    assert seen == [1, 2, 3, 4, 5, 6]
    assert trained is student
    assert not trained.training
    assert seconds > 0


def test_where_asked_each_block_is_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    student = micro_gpt()
    config = replace(BRIEF, loss="gt", steps=1)
    path = tmp_path / "state.pt"
    for compile in (False, True):
        resumable.train(
            "student", student, TEXT, config, path, CPU, False, compile=compile
        )
    assert compiled == list(student.h)


# --------------------------------------------------------------------------------------
# Interruptions


def test_stopped_and_resumed_training_ends_with_the_very_same_weights(
    undisturbed, tmp_path
):
    path = tmp_path / "state.pt"
    for stop_at in (1, 4):
        with pytest.raises(TrainingStopped, match=f"stopped after step {stop_at} of 6"):
            train(path, resume=True, stop_at=stop_at)
        assert read_checked(path)["step"] == stop_at
    for _ in range(2):  # the second time there is nothing left to do
        assert_equal(train(path, resume=True), undisturbed)


def test_without_resume_a_training_begins_anew(undisturbed, tmp_path):
    path = tmp_path / "state.pt"
    train(path, lr=0.5)
    assert_equal(train(path, resume=False), undisturbed)


def test_a_signal_at_the_last_step_stops_the_run_too(undisturbed, tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(TrainingStopped, match="stopped after step 6 of 6"):
        train(path, stop_at=6)
    assert_equal(read_checked(path)["model"], undisturbed)


def test_a_signal_during_the_last_checkpoint_interrupts_after_it(
    undisturbed, tmp_path, monkeypatch
):
    def save_and_interrupt(*arguments):
        signal.raise_signal(signal.SIGTERM)
        checkpoints.save_checkpoint(*arguments)

    monkeypatch.setattr(resumable, "save_checkpoint", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(tmp_path / "state.pt")
    assert not isinstance(stop.value, TrainingStopped)
    assert_equal(read_checked(tmp_path / "state.pt")["model"], undisturbed)


def train_and_die(path):
    """Saves after each step, and is killed when the third one's file is written, but
    has not got its name yet."""
    torch.set_num_threads(1)
    resumable.CHECKPOINT_SECONDS = 0
    write = checkpoints.write_checked

    def write_and_die(path, content):
        write(path, content)
        if content["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.write_checked = write_and_die
    train(path)


@Beside
def killed_training(folder):
    """The file that it leaves, and how it ended."""
    path = folder / "state.pt"
    program = "import pathlib, sys; from data.tests import test_resumable;"
    program += "test_resumable.train_and_die(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(path)]
    return path, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_killed_training_resumed_ends_with_the_very_same_weights(undisturbed):
    path, killed = killed_training()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_checked(path)["step"] == 2
    assert_equal(train(path, resume=True), undisturbed)


def test_a_checkpoint_is_written_now_and_then(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        resumable, "save_checkpoint", lambda *arguments: saved.append(arguments[4])
    )
    for seconds, steps in ((0, [1, 2, 3, 4, 5, 6]), (1000, [6])):
        monkeypatch.setattr(resumable, "CHECKPOINT_SECONDS", seconds)
        saved.clear()
        train(tmp_path / "state.pt")
        assert saved == steps


def test_the_seconds_before_a_resume_count(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(TrainingStopped):
        train(path, stop_at=2)
    write_checked(path, read_checked(path) | {"seconds": 5000.0})

    seconds, _ = resumable.train(
        "student", a_student(), TEXT, BRIEF, path, CPU, True, a_teacher()
    )
    assert 5000 < seconds < 5100
    assert 5000 < read_checked(path)["seconds"] < 5100


def test_a_model_that_was_trained_before_goes_on_too(undisturbed, tmp_path):
    path = tmp_path / "state.pt"
    student = a_student()
    with pytest.raises(TrainingStopped):
        train(path, student, stop_at=2)
    train(path, student, resume=True)
    assert_equal(student.state_dict(), undisturbed)


# --------------------------------------------------------------------------------------
# Other runs


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path / "state.pt")
    for changes, name in (
        ({"lr": 0.02}, "lr"),
        ({"steps": 7}, "steps"),
        ({"loss": "logit"}, "loss"),
        ({"seed": 1}, "seed"),
        ({"student": a_student(dropout=0.0)}, "dropout"),
        ({"student": a_student(bits=4)}, "quantizers"),
        ({"student": a_student(granularity="channel")}, "quantizers"),
        ({"teacher": a_teacher(3)}, "teacher"),
        ({"text": TEXT.flip(0)}, "text"),
    ):
        with pytest.raises(tsld.CheckpointError, match=f"of another run: {name} is "):
            train(tmp_path / "state.pt", resume=True, **changes)


def test_a_student_with_dropout_resumes_with_as_many_processes_alone(
    tmp_path, monkeypatch
):
    path = tmp_path / "state.pt"
    for dropout in (0.5, 0.0):
        with pytest.raises(TrainingStopped):
            train(path, a_student(dropout=dropout), stop_at=2)
        with monkeypatch.context() as patch:
            patch.setattr(resumable, "processes", lambda: (0, 2))
            if dropout:
                with pytest.raises(tsld.CheckpointError, match="dropout is 1, not 2"):
                    train(path, a_student(dropout=dropout), resume=True)
            else:
                train(path, a_student(dropout=dropout), resume=True)


# --------------------------------------------------------------------------------------
# A loss that is not finite


def test_training_that_diverges_names_the_last_checkpoint_if_it_made_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(resumable, "CHECKPOINT_SECONDS", 0)
    path = tmp_path / "state.pt"
    calls = []
    diverges_at = 3

    def fails_later(*arguments):
        calls.append(1)
        loss = lean.backward(*arguments)
        return loss * math.inf if len(calls) == diverges_at else loss

    monkeypatch.setattr(resumable, "choose_backward", lambda *models: fails_later)
    with pytest.raises(tsld.TrainingDiverged) as error:
        train(path)
    assert re.search("loss inf.* at step 3, ", str(error.value))
    assert str(error.value).endswith(f"; the last checkpoint is {path}")
    assert read_checked(path)["step"] == 2

    calls.clear()
    diverges_at = 1
    for resume, named in ((True, 1), (False, 0)):  # else it is of the run before
        calls.clear()
        with pytest.raises(tsld.TrainingDiverged) as error:
            train(path, resume=resume)
        assert str(error.value).count("the last checkpoint is") == named


# --------------------------------------------------------------------------------------
# What a training shows


def test_the_distance_to_the_teacher_is_the_mean_kl_divergence():
    student = a_student().train()
    student.h[0].eval()
    modes = [module.training for module in student.modules()]
    teacher = micro_gpt(2)
    ids = micro_ids(3, 8)
    distance = kl_to_teacher(student, teacher, ids)
    assert [module.training for module in student.modules()] == modes
    with pytest.raises(ValueError, match="0 to 16"):
        kl_to_teacher(student, teacher, ids + 17)
    assert [module.training for module in student.modules()] == modes

    q = softmax64(student.eval()(ids).detach())
    p = softmax64(teacher(ids).detach())
    assert distance == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert kl_to_teacher(teacher, teacher, ids) == 0.0

    # It is plain logit distillation above its floor, the teacher's entropy.
    terms = tsld.per_token_terms(student(ids), teacher(ids), ids)
    entropy = -(p * np.log(p)).sum(-1).mean()
    assert distance == pytest.approx(terms.kd.mean().item() - entropy, rel=1e-4)


def test_the_first_whole_blocks_of_a_text_are_measured_on():
    ids = torch.arange(45)
    assert torch.equal(resumable.first_blocks(ids, 10), ids[:40].view(4, 10))
    assert torch.equal(resumable.first_blocks(ids, 10, blocks=2), ids[:20].view(2, 10))
    assert torch.equal(resumable.first_blocks(ids, 20), ids[:40].view(2, 20))
    assert torch.equal(resumable.first_blocks(ids, 46), ids[None])


def test_the_distance_to_the_teacher_falls_where_the_loss_has_a_floor(tmp_path):
    teacher = a_teacher()
    distances = []

    def distance(model):
        distances.append(kl_to_teacher(model, teacher, micro_ids(4, 8, seed=5)))
        return distances[-1]

    student = tsld.quantize_model(a_teacher())
    measure = Measure("KL to the teacher", distance)
    train(tmp_path / "state.pt", student, steps=20, batch_size=8, measure=measure)
    assert distances[-1] < 0.5 * distances[0]


def test_measuring_does_not_change_the_training(undisturbed, tmp_path):
    def disturbing(model):
        torch.manual_seed(0)
        return kl_to_teacher(model, a_teacher(), micro_ids())

    measure = Measure("KL", disturbing)
    assert_equal(train(tmp_path / "state.pt", measure=measure), undisturbed)


def line_after(step, steps, start=0):
    """The step's line; the figure counts how often it was measured."""
    counts = []

    def count(model):
        counts.append(model)
        return len(counts)

    config = replace(BRIEF, steps=steps)
    line = ProgressLine("student", config, start, Measure("figure", count))
    return [line.after(n, 4.98, "model") for n in range(start + 1, step + 1)][-1]


def test_a_figure_is_measured_at_both_ends_and_about_twenty_times():
    expected = [(1, 1), (4, 1), (5, 2), (99, 20), (100, 21)]
    for step, measured in expected:
        line = line_after(step, steps=100)
        words = f"student: step {step}/100, figure {measured}.000, loss 4.980, "
        assert line.startswith(words)
    assert "figure 1.000" in line_after(44, steps=99, start=41)
    assert "figure 2.000" in line_after(45, steps=99, start=41)
    assert "figure 20.000" in line_after(98, steps=99)
    assert "figure 21.000" in line_after(99, steps=99)
    assert "figure 11.000" in line_after(1000, steps=10**6)  # every 100 steps
    assert "figure 6.000" in line_after(6, steps=6)


def test_a_line_without_a_figure_has_the_loss_alone():
    line = ProgressLine("teacher", BRIEF, 0).after(1, 3.6, None)
    assert line == "teacher: step 1/6, loss 3.600, measuring speed"


def test_the_speed_counts_from_the_second_step_of_a_run_on():
    config = replace(BRIEF, steps=1000, batch_size=32, block_size=128)
    line = ProgressLine("student", config, start=10)
    assert line.speed(11, now=500.0) == "measuring speed"
    # 4 steps in 2 seconds, of 4096 tokens each, and 985 steps to go.
    assert line.speed(15, now=502.0) == "8,192 tokens/s, 8:12 left"


def test_a_clock_that_has_not_ticked_gives_no_speed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resumable.time, "perf_counter", lambda: 500.0)
    train(tmp_path / "state.pt")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("student: step 6/6, ")
    assert lines[-1].endswith(", measuring speed")


def test_the_line_of_the_last_step_is_shown(tmp_path, capsys):
    train(tmp_path / "state.pt")
    shown = capsys.readouterr().out.splitlines()
    pattern = r"student: step 6/6, loss \d\.\d{3}, [\d,]+ tokens/s, 0:00 left"
    assert re.fullmatch(pattern, shown[-1])
