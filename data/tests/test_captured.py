"""data/lib/captured.py: the recorded step.

A stand-in plays the part of the graph. It calls the function again, and leaves what it
gives in the tensors of the first call, as a GPU does. The steps are held against those
that tsld.train takes without it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tsld
from data.lib import captured, hf, lean
from data.lib.captured import Captured
from data.tests.helpers import TEXT, assert_equal, micro_gpt, micro_ids

CONFIG = tsld.TrainConfig("tsld", steps=5, batch_size=4, block_size=8, lr=0.01)
WAYS = [(lean.backward, loss) for loss in lean.LEAN_LOSSES]
WAYS += [(tsld.backward, loss) for loss in tsld.LOSSES]


class Rerun:
    """Plays the part of a CudaGraph."""

    made = 0

    def __init__(self, function):
        Rerun.made += 1
        function()  # before it is recorded: it draws random numbers

        # Nothing is computed while it is recorded.
        self.function = function
        self.outputs = [t if t is None else t * torch.nan for t in function()]

    def replay(self):
        for fixed, new in zip(self.outputs, self.function(), strict=True):
            if fixed is not None:
                fixed.copy_(new)


class Unrecordable:
    def __init__(self, function):
        function()
        raise RuntimeError("called a synchronizing CUDA operation\nand so on")


def a_student(dropout=0.0):
    return tsld.quantize_model(micro_gpt(1, dropout=dropout))


def train(way, dropout=0.0, **changes):
    """The losses and the weights of a training."""
    student = a_student(dropout)
    config = replace(CONFIG, **changes)
    steps = tsld.train(student, TEXT, config, micro_gpt(2), backward=way)
    losses = [loss for _, loss in steps]
    return losses, student.state_dict()


def assert_same(one, other):
    assert one[0] == other[0]
    assert_equal(one[1], other[1])


def batch(seed=0, B=4):
    return micro_ids(B=B, seed=seed), micro_ids(B=B, seed=seed + 10)


# --------------------------------------------------------------------------------------
# The same training


@pytest.mark.parametrize("way, loss", WAYS)
def test_replayed_steps_are_steps_bit_for_bit(way, loss):
    dropout = 0.0 if loss == "logit" else 0.3
    setting = {"loss": loss, "dropout": dropout, "gt_weight": 0.25}
    Rerun.made = 0
    replayed = train(Captured(way, Rerun), **setting)
    assert Rerun.made == 1
    assert_same(replayed, train(way, **setting))


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"dtype": "bfloat16"}], ids=str)
def test_parts_of_a_batch_and_bfloat16_are_replayed_as_well(changes):
    way = lean.backward
    changes |= {"dropout": 0.3}
    assert_same(train(Captured(way, Rerun), **changes), train(way, **changes))


def test_a_training_goes_on_where_it_was_left():
    way = lean.backward
    student = a_student(dropout=0.3)
    optimizer = tsld.make_optimizer(student, CONFIG)
    for start, stop in ((0, 2), (2, 5)):
        steps = tsld.train(
            student,
            TEXT,
            CONFIG,
            micro_gpt(2),
            optimizer,
            start,
            Captured(way, Rerun),
        )
        for step, _ in steps:
            if step == stop:
                break
    assert_equal(student.state_dict(), train(way, dropout=0.3)[1])


@pytest.mark.parametrize("lr", [1e18, 1e30])
def test_a_training_that_diverges_stops_at_the_same_step(lr):
    messages = []
    weights = []
    for way in (lean.backward, Captured(lean.backward, Rerun)):
        student = a_student()
        config = replace(CONFIG, lr=lr)
        steps = tsld.train(student, TEXT, config, micro_gpt(2), backward=way)
        with pytest.raises(tsld.TrainingDiverged) as error:
            list(steps)
        messages.append(str(error.value))
        weights.append(student.state_dict())

    assert messages[0] == messages[1]
    assert_equal(weights[1], weights[0])


def test_parameters_that_are_not_trained_get_no_gradient():
    student = a_student()
    student.wpe.weight.requires_grad_(False)
    Captured(lean.backward, Rerun)(student, micro_gpt(2), *batch(), CONFIG)
    without = [name for name, p in student.named_parameters() if p.grad is None]
    assert without == ["wpe.weight"]


# --------------------------------------------------------------------------------------
# One call


def gradients_of(student):
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def test_a_call_gives_the_loss_and_gradient_of_its_own_batch_and_seed():
    student = a_student(dropout=0.5).train()
    other = a_student(dropout=0.5).train()
    teacher = micro_gpt(2)
    step = Captured(lean.backward, Rerun)
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        loss = step(student, teacher, *batch(), CONFIG)

        torch.manual_seed(seed)
        other.zero_grad()
        expected = lean.backward(other, teacher, *batch(), CONFIG)
        assert torch.equal(loss, expected)
        assert torch.equal(gradients_of(student), gradients_of(other))
        losses.append(loss)

    # What was returned before stays as it was.
    assert losses[0] == losses[2] != losses[1]


def test_a_replay_leaves_the_random_numbers_that_a_step_leaves():
    drawn = []
    for way in (lean.backward, Captured(lean.backward, Rerun)):
        student = a_student(dropout=0.5).train()
        teacher = micro_gpt(2)
        torch.manual_seed(3)
        way(student, teacher, *batch(), CONFIG)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


def test_gradients_stand_where_they_stood_and_replace_what_was_there():
    student = a_student()
    teacher = micro_gpt(2)
    step = Captured(lean.backward, Rerun)
    student.wte.weight.grad = torch.ones_like(student.wte.weight)
    places = []
    for _ in range(2):
        step(student, teacher, *batch(), CONFIG)
        places.append([parameter.grad.data_ptr() for parameter in student.parameters()])
        gradients = gradients_of(student)
    assert places[0] == places[1]

    student.zero_grad()
    lean.backward(student, teacher, *batch(), CONFIG)
    assert torch.equal(gradients, gradients_of(student))


def test_what_is_another_step_is_recorded_anew():
    student = a_student()
    teacher = micro_gpt(2)
    step = Captured(lean.backward, Rerun)
    config = replace(CONFIG)
    Rerun.made = 0

    def made(*arguments):
        step(*arguments)
        return Rerun.made

    assert made(student, teacher, *batch(), config) == 1
    assert made(student, teacher, *batch(1), replace(config)) == 1
    assert made(student, teacher, *batch(B=2), config) == 2
    assert made(student, micro_gpt(3), *batch(B=2), config) == 3
    assert made(a_student(), teacher, *batch(B=2), config) == 4
    config.temperature = 1.0
    assert made(student, teacher, *batch(), config) == 5
    config.temperature = 2.0
    assert made(student, teacher, *batch(), config) == 6


def test_a_step_that_cannot_be_recorded_is_taken_as_it_is_and_one_line_says_why(capsys):
    way = lean.backward
    setting = {"dropout": 0.3, "steps": 4}
    fallen_back = train(Captured(way, Unrecordable), **setting)
    line = "the step is not captured: called a synchronizing CUDA operation\n"
    assert capsys.readouterr().out == line
    assert_same(fallen_back, train(way, **setting))


# --------------------------------------------------------------------------------------
# On a GPU


class Noted:
    """Stands for torch.cuda, and notes what is called in which order."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(" ".join([name, *(a for a in arguments if a == str(a))]))
            return self

        return call

    def __enter__(self):
        self.calls.append("enter")

    def __exit__(self, *error):
        self.calls.append("exit")


WARMED_UP = """current_stream, Stream, wait_stream, stream, enter, function,
set_sync_debug_mode error, function, set_sync_debug_mode default, exit"""
RECORDED = """wait_stream, CUDAGraph, stream, enter, graph, enter, function, exit, exit,
replay"""


def test_a_graph_is_recorded_after_calls_on_a_side_stream(monkeypatch):
    calls = []
    told = []

    def function():
        calls.append("function")
        told.append(torch.cuda.is_current_stream_capturing() is True)
        return "outputs"

    stand_in = Noted(calls)
    stand_in.is_current_stream_capturing = lambda: "as it is"
    monkeypatch.setattr(torch, "cuda", stand_in)
    graph = captured.CudaGraph(function)
    graph.replay()
    assert calls == f"{WARMED_UP}, {RECORDED}".replace("\n", " ").split(", ")
    assert graph.outputs == "outputs"
    assert told == [False, True, False]


def test_what_waits_for_the_gpu_is_found_before_anything_is_recorded(monkeypatch):
    calls = []

    def waits():
        calls.append("function")
        if "set_sync_debug_mode error" in calls:
            raise RuntimeError("called a synchronizing CUDA operation")

    stand_in = Noted(calls)
    stand_in.is_current_stream_capturing = lambda: "as it is"
    monkeypatch.setattr(torch, "cuda", stand_in)
    with pytest.raises(RuntimeError, match="synchronizing"):
        captured.CudaGraph(waits)
    assert torch.cuda.is_current_stream_capturing() == "as it is"
    assert calls == WARMED_UP.replace("\n", " ").split(", ")


class HostReads(TorchDispatchMode):
    """Fails at an operation whose result the processor would have to wait for, or that
    copies between it and the device."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        devices = {
            t.device for t in tree_leaves((arguments, made)) if torch.is_tensor(t)
        }
        assert len(devices) == 1, f"{function} is between {devices}"
        return made


def meta_step(monkeypatch, student, teacher, config, backward=lean.backward):
    """A step on the meta device, which has no values to wait for: to ask for one, or
    for as many numbers as a mask lets pass, is an error there."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(lean, "columns_of", lambda V, device: V + 5)  # as on a GPU
    ids = torch.zeros(4, 8, dtype=torch.long, device="meta")
    models = (student.to("meta").train(), teacher.to("meta"))
    with HostReads():
        return backward(*models, ids, ids, config)


@pytest.mark.parametrize(
    "loss, bits, granularity",
    [("tsld", 2, "tensor"), ("gt", 2, "tensor"), ("tsld", 4, "channel")],
)
def test_a_step_never_waits_for_a_value(loss, bits, granularity, monkeypatch):
    student = micro_gpt(1, dropout=0.3, n_layer=1)
    student = tsld.quantize_model(student, bits, granularity)
    config = replace(CONFIG, loss=loss, accumulate=2)
    meta_step(monkeypatch, student, micro_gpt(2, n_layer=1), config)
    assert all(p.grad.is_meta for p in student.parameters())


def test_a_step_of_l2l_never_waits_for_a_value(monkeypatch):
    student = tsld.quantize_model(micro_gpt(1, dropout=0.3))
    config = replace(CONFIG, loss="l2l", accumulate=2)
    meta_step(monkeypatch, student, micro_gpt(2), config, tsld.backward)
    assert all(p.grad.is_meta for p in student.parameters())


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT"])
def test_a_model_of_transformers_never_waits_where_it_is_recorded(name, monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"hidden_size": 12, "pad_token_id": 0, "bos_token_id": 0}
    sizes |= {"eos_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes)
    kind = getattr(
        transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    )
    teacher = hf.LinearHeadModel(kind(config))
    student = tsld.quantize_model(hf.LinearHeadModel(kind(config)))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    meta_step(monkeypatch, student, teacher.eval(), CONFIG)
    assert student.lm_head.weight.grad.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("loss", lean.LEAN_LOSSES)
def test_on_a_gpu_captured_steps_are_steps(loss, dropout, capsys):
    outcomes = []
    for way in (lean.backward, Captured(lean.backward)):
        student = a_student(dropout).cuda()
        config = replace(CONFIG, loss=loss, steps=20)
        teacher = micro_gpt(2).cuda()
        steps = tsld.train(student, TEXT, config, teacher, backward=way)
        losses = [loss for _, loss in steps]
        outcomes.append([*losses, *student.parameters()])

    assert "not captured" not in capsys.readouterr().out
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)
