"""A training step: tokens per second and peak memory with each of the losses, beside a
plain step of the full-precision model.

The losses are taken as the companion takes them: through data.lib.lean, but for L2L."""

import copy
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import tsld
from data.evidence.speed.timing import in_new_process, peak_memory, seconds_per_call
from data.lib import lean
from data.lib.captured import Captured, CudaGraph
from data.lib.devices import choose_device, default_dtype
from data.lib.errors import UserError
from tsld import GPT, LOSSES, GPTConfig, QuantLinear, TrainConfig

# Layers, width, heads, vocabulary; sequences and their length.
SHAPES = (
    (4, 128, 4, 2048, 32, 128),
    (6, 384, 6, 50257, 8, 256),
    (12, 768, 12, 50257, 4, 512),
)
PLAIN = ("plain", "plain, this program")

# How a step is taken. "quantizers": torch.compile of what rounds the weights, alone.
WAYS = (
    "eager",
    "captured",
    "captured, quantizers compiled",
    "compiled",
    "captured, compiled",
)


class CalledAgain:
    """Plays the part of a CUDA graph on a device that has none."""

    def __init__(self, function):
        self.function = function
        self.outputs = function()

    def replay(self):
        self.outputs = self.function()


class TrainingSteps:
    """A model, its ternary student, and a batch to train them on."""

    def __init__(self, shape, device=None, way="eager"):
        n_layer, n_embd, n_head, vocab_size, B, T = shape
        self.device = device or choose_device(None)
        self.way = way
        torch.manual_seed(0)
        config = GPTConfig(T, vocab_size, n_layer, n_head, n_embd)
        self.model = GPT(config).to(self.device)
        self.student = tsld.quantize_model(copy.deepcopy(self.model))
        self.half = copy.deepcopy(self.model).to(torch.bfloat16).eval()
        batch = torch.randint(vocab_size, (2, B, T), device=self.device)
        self.ids, self.targets = batch
        self.optimizers = {}
        self.gradients = {}
        self.compile()

    def compile(self):
        """What the way to take a step says is compiled."""
        if "quantizers" in self.way:
            for layer in self.student.modules():
                if isinstance(layer, QuantLinear):
                    layer.dequantized = torch.compile(layer.dequantized)

        elif "compiled" in self.way:
            for block in (*self.model.h, *self.student.h, *self.half.h):
                block.compile()

    def teacher(self, dtype):
        """What train_small.frozen_teacher makes of a teacher."""
        return self.half if dtype == "bfloat16" else self.model

    def gradients_of(self, loss, dtype):
        """What takes the place of backward in tsld.train."""
        if (loss, dtype) not in self.gradients:
            is_lean = loss in lean.LEAN_LOSSES
            found = lean.backward if is_lean else tsld.backward
            if "captured" in self.way:
                graph_of = CudaGraph if self.device.type == "cuda" else CalledAgain
                found = Captured(found, graph_of)
            self.gradients[loss, dtype] = found
        return self.gradients[loss, dtype]

    def take(self, name, dtype):
        """One step. name: "plain", of the full-precision model, written the nanoGPT
        way; "plain, this program", of the same; or one of LOSSES, of the student."""
        trained = self.model if name in PLAIN else self.student
        if trained not in self.optimizers:
            self.optimizers[trained] = tsld.make_optimizer(trained, TrainConfig())
        optimizer = self.optimizers[trained]

        optimizer.zero_grad()
        if name == "plain":
            self.nanogpt_gradients()
        else:
            loss = "gt" if name in PLAIN else name
            gradients = self.gradients_of(loss, dtype)
            config = TrainConfig(loss=loss, dtype=dtype)
            teacher = None if name in PLAIN else self.teacher(dtype)
            gradients(trained, teacher, self.ids, self.targets, config)

        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()

    def nanogpt_gradients(self):
        logits = self.model(self.ids)  # there until the backward pass is over
        loss = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
        loss.backward()


def taking(steps, name, dtype):
    """A function that takes one of TrainingSteps."""
    return lambda: steps.take(name, dtype)


def nanogpt_step(folder, shape, device):
    """A function that takes a step of nanoGPT's own model, compiled, as its train.py
    does, and gives the loss. folder: a checkout of github.com/karpathy/nanoGPT."""
    path = Path(folder) / "model.py"
    if not path.exists():
        raise UserError(f"--nanogpt {folder}: there is no model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    n_layer, n_embd, n_head, vocab_size, B, T = shape
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": T}
    config = program.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=True, **sizes)
    model = program.GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    compiled = torch.compile(model)
    ids, targets = torch.randint(vocab_size, (2, B, T), device=device)
    is_mixed = default_dtype(device) != "float32"

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            _, loss = compiled(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def step_seconds(shape, rows, rounds):
    """Prints the seconds of a step of each row, (name, dtype), measured in turns; for
    in_new_process."""
    steps = TrainingSteps(shape)
    functions = {row: taking(steps, *row) for row in rows}
    seconds = seconds_per_call(functions, steps.device, rounds)
    print(json.dumps([seconds[row] for row in rows]))


def step_memory(shape, row):
    """Prints the peak of resident bytes of two steps; for in_new_process."""
    steps = TrainingSteps(shape)
    steps.take(*row)
    steps.take(*row)
    peak = peak_memory()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps(peak))


def bench(rounds=3):
    """Prints tokens per second and peak memory of a step of each loss."""
    dtypes = ["float32"]
    if default_dtype(choose_device(None)) != "float32":
        dtypes.append("bfloat16")
    rows = [(name, "float32") for name in PLAIN]
    rows += [(loss, dtype) for dtype in dtypes for loss in LOSSES]

    for shape in SHAPES:
        n_layer, n_embd, _, vocab_size, B, T = shape
        title = (
            f"training, {n_layer} x {n_embd}, vocabulary {vocab_size}, batch {B} x {T}"
        )
        columns = f"{'tokens/s':>14}{'ratio':>8}{'peak MB':>10}{'ratio':>8}"
        print(f"\n{title:52}{columns}", flush=True)

        seconds = in_new_process("training", "step_seconds", shape, rows, rounds)
        plain_memory = None

        for row, of_row in zip(rows, seconds):
            memory = in_new_process("training", "step_memory", shape, row)
            plain_memory = plain_memory or memory
            speed = f"{B * T / of_row:14,.0f}{seconds[0] / of_row:8.2f}"
            size = f"{memory / 1e6:10,.0f}{memory / plain_memory:8.2f}"
            print(f"  {', '.join(row):50}{speed}{size}", flush=True)


def bench_growth(tokens=4096):
    """Prints how a TSLD step of as many tokens grows with the length of the sequences
    and with the vocabulary."""
    title = f"TSLD step, 4 x 256, FP32, {tokens} tokens"
    print(f"\n{title:52}{'seconds':>14}{'peak MB':>10}")
    row = ("tsld", "float32")

    for vocab_size in (2048, 16384, 50257):
        for length in (128, 512, 2048):
            B = tokens // length
            shape = (4, 256, 4, vocab_size, B, length)
            (seconds,) = in_new_process("training", "step_seconds", shape, [row], 3)
            memory = in_new_process("training", "step_memory", shape, row)
            title = f"vocabulary {vocab_size:6,}, batch {B} x {length}"
            print(f"  {title:50}{seconds:14.2f}{memory / 1e6:10,.0f}", flush=True)
