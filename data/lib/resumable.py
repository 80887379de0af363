"""A training that says how far it is, and that goes on after it was interrupted."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn import functional as F

import tsld
from data.lib import lean
from data.lib.checkpoints import architecture, load_checkpoint, save_checkpoint
from data.lib.files import fingerprint, read_checked
from data.lib.hf import CausalModel
from data.lib.processes import any_process, blocks_of, processes, shared, spread
from data.lib.progress import TrainingStopped, show_progress, stop_on_signal, time_left

CHECKPOINT_SECONDS = 120  # between two checkpoints: what a power cut may cost
MEASUREMENTS = 20  # of a Measure in one training, or one every 100 steps


class Measure(NamedTuple):
    """A figure of the model that is shown while it trains."""

    name: str
    of: Callable  # model -> float; it leaves the model as it finds it


def first_blocks(ids, block_size, blocks=4):
    """The beginning of a text, int64 (n,) -> (blocks, block_size), to be measured on. A
    text that is shorter than a block is a row of its own."""
    ids = ids[: blocks * block_size]
    if len(ids) < block_size:
        return ids[None]
    return ids[: len(ids) // block_size * block_size].view(-1, block_size)


@torch.no_grad()
def kl_to_teacher(student, teacher, ids):
    """KL(teacher || student) of ids (B, T), the mean over all tokens, in nats.

    No student gets a distillation loss below the teacher's own entropy. This is the
    part above that floor, and 0 for the teacher itself.
    """
    ids = ids.to(next(student.parameters()).device)

    total = 0.0
    with tsld.evaluating(student):
        for row in ids.split(1):  # one at a time, to bound the logits' memory
            log_student = student(row).float().log_softmax(dim=-1)  # (1, T, V)
            log_teacher = teacher(row).float().log_softmax(dim=-1)
            kl = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
            total += kl.item()

    return total / ids.numel()


def train(
    label,
    model,
    tokens,
    config,
    path,
    device,
    resume,
    teacher=None,
    compile=False,
    watch=None,
    measure=None,
):
    """tsld.train with a progress line, which begins with the label, and checkpoints.

    The state is written to `path` now and then, at the end, and when a signal asks to
    stop. resume: whether to go on from there. watch(step, model) is called after each
    step. measure: a Measure for the progress line; the checkpoint keeps its curve over
    the steps. teacher.fingerprint, where there is one, keeps the checkpoints of two
    teachers' students apart.

    Returns the seconds that training took, those before a resume included, and the
    trained model. It is `model` itself; or, where several processes share its weights,
    the copy that they share, and `model` gets the same weights.
    Raises TrainingStopped after a signal, CheckpointError and TrainingDiverged.
    """
    if compile:
        for block in blocks_of(model):  # alike, so that one compilation serves them all
            block.compile()

    identity = identify(model, tokens, config, teacher)
    trained = spread(model, device)
    optimizer = tsld.make_optimizer(trained, config)

    start, seconds_before, curve = 0, 0.0, []
    if resume:
        found = load_checkpoint(path, identity, trained, optimizer)
        start, seconds_before, curve = found

    how = shared(choose_backward(trained, teacher, config))
    steps = tsld.train(trained, tokens, config, teacher, optimizer, start, how)
    line = ProgressLine(label, config, start, measure, curve)

    has_checkpoint = start > 0
    began = saved = time.perf_counter()
    try:
        with stop_on_signal() as received:
            for step, loss in steps:
                is_last = step == config.steps
                show_progress(line.after(step, loss, trained), is_last)
                if watch is not None:
                    watch(step, trained)

                now = time.perf_counter()
                is_time = now - saved >= CHECKPOINT_SECONDS
                stop, is_time = any_process(bool(received), is_time)

                if stop or is_time or is_last:
                    seconds = seconds_before + now - began
                    save_checkpoint(
                        path, identity, trained, optimizer, step, seconds, line.curve
                    )
                    saved = time.perf_counter()
                    has_checkpoint = True

                if stop:
                    raise TrainingStopped(how_to_go_on(step, config, resume))
    except tsld.TrainingDiverged as error:
        where = f"; the last checkpoint is {path}" if has_checkpoint else ""
        raise tsld.TrainingDiverged(f"{error}{where}") from None

    if trained is not model:
        distributed.barrier()  # until the first process has written the checkpoint
        model.load_state_dict(read_checked(path)["model"])
    return seconds_before + time.perf_counter() - began, trained


def identify(model, tokens, config, teacher):
    """All that makes a run the one that it is, in plain values."""
    layers = [m for m in model.modules() if isinstance(m, tsld.QuantLinear)]
    quantizers = {(layer.bits, layer.granularity) for layer in layers}

    identity = asdict(config)
    identity["model"] = architecture(model)
    identity["quantizers"] = sorted(quantizers)
    identity["text"] = fingerprint([tokens])
    identity["teacher"] = getattr(teacher, "fingerprint", None)

    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        _, world = processes()
        identity["processes, which draw their own dropout"] = world
    return identity


def choose_backward(student, teacher, config):
    """The one that needs less memory, if the loss and the models let it be used."""
    models = [student] if teacher is None else [student, teacher]
    is_lean = all(lean.takes(model) for model in models)

    # Of a forward pass of another class nobody knows what it does with its head.
    known = (tsld.GPT.forward, CausalModel.forward)
    forwards = [getattr(model.forward, "__func__", None) for model in models]
    is_lean &= all(forward in known for forward in forwards)

    if config.loss not in lean.LEAN_LOSSES or not is_lean:
        return tsld.backward
    return lean.backward


def how_to_go_on(step, config, resume):
    """The message of a training that a signal has stopped."""
    command = "the same command" if resume else "the same command and --resume"
    return f"stopped after step {step} of {config.steps}; go on with {command}"


class ProgressLine:
    """The line that a training shows: how far it is, its figures, and when it ends."""

    def __init__(self, label, config, start, measure=None, curve=()):
        """curve: what was measured before `start`, a list of [step, value]."""
        self.label = label
        self.config = config
        self.start = start
        self.measure = measure
        self.measured = ""
        self.curve = [*curve]
        self.first_step_at = None

    def after(self, step, loss, model):
        """The line after a step."""
        if self.measure is not None and self.is_due(step):
            value = self.measure.of(model)
            self.measured = f"{self.measure.name} {value:.3f}, "
            self.curve.append([step, value])

        done = f"step {step}/{self.config.steps}"
        speed = self.speed(step, time.perf_counter())
        return f"{self.label}: {done}, {self.measured}loss {loss:.3f}, {speed}"

    def is_due(self, step):
        """Whether to measure. All processes have to do so after the same steps."""
        pause = min(math.ceil(self.config.steps / MEASUREMENTS), 100)
        return step % pause == 0 or step in (self.start + 1, self.config.steps)

    def speed(self, step, now):
        """Tokens per second, and the time left. The first step of a run is slower than
        the others, and does not count."""
        if self.first_step_at is None:
            self.first_step_at = now
            return "measuring speed"

        if now == self.first_step_at:  # the clock has not ticked
            return "measuring speed"

        rate = (step - self.start - 1) / (now - self.first_step_at)  # steps per second
        tokens = self.config.batch_size * self.config.block_size
        left = time_left((self.config.steps - step) / rate)
        return f"{rate * tokens:,.0f} tokens/s, {left} left"
