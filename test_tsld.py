"""The specification of tsld.py, in its own order, and of the main command.

Each test states one fact and checks it against an oracle that a reader can trust
without the code: float64 NumPy by hand, a closed form, brute force, another program.

    0. The docstring     3. GPT          6. The file alone
    1. Losses            4. Training     7. The main command
    2. Quantizers        5. Packing

The tests of all else are in data/tests/, one file a concern.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import train_small
import tsld
from tsld import GPT, CheckpointError, GPTConfig, PackedLinear, QuantLinear, TrainConfig

torch.set_num_threads(1)  # the tensors are tiny: two threads would wait for each other

each = pytest.mark.parametrize
HERE = Path(__file__).resolve().parent
MICRO = GPTConfig(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_embd=12)


def randn(*shape, seed=0):
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32))


def random_ids(*shape, below=MICRO.vocab_size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(below, size=shape))


def micro_gpt(seed=0, **changes):
    """A tiny GPT. Its biases and norms are well away from their initial values too."""
    torch.manual_seed(seed)
    model = GPT(replace(MICRO, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def quantized_gpt(granularity="tensor", seed=0, **changes):
    return tsld.quantize_model(micro_gpt(seed, **changes), granularity=granularity)


def names_of(model, layer_type):
    modules = model.named_modules(remove_duplicate=False)
    return {name for name, module in modules if type(module) is layer_type}


def softmax64(logits):
    """The softmax over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def assert_close(result, expected, rtol=1e-6, atol=0.0):
    if isinstance(result, torch.Tensor):
        result = result.detach().double()
    if isinstance(expected, torch.Tensor):
        expected = expected.detach()
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=atol)


def assert_same(model, other):
    """Their weights are the same, bit for bit."""
    states = [m.state_dict() for m in (model, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def refused(words=None):
    return pytest.raises(ValueError, match=words)


# ---- 0. The docstring ----------------------------------------------------------------


def test_the_example_loses_by_rounding_and_wins_back(tmp_path, monkeypatch, capsys):
    first = tsld.__doc__.index("    import argparse")
    last = tsld.__doc__.index("\n\nRounding costs")
    text = textwrap.dedent(tsld.__doc__[first:last])
    fewer = iter(["steps=300", "steps=50"])  # of the teacher, of the student
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.sub(r"steps=\d+", lambda _: next(fewer), text), names)

    printed = capsys.readouterr().out.splitlines()
    teacher, rounded, student = (float(line) for line in printed[50:53])
    assert rounded > teacher + 0.03
    assert student < teacher + 0.5 * (rounded - teacher)
    assert names["ids"].shape == (1, 9 + 50)
    assert os.listdir(tmp_path) == ["student.packed"]


# ---- 1. Losses -----------------------------------------------------------------------


def example(B=3, T=5, V=7, dtype=torch.float32):
    """Logits of student and teacher, (B, T, V), and targets, (B, T)."""
    student = 2 * randn(B, T, V).to(dtype)
    teacher = 2 * randn(B, T, V, seed=1).to(dtype)
    return student, teacher, random_ids(B, T, below=V)


def terms64(student, teacher, targets):
    """The three terms, (3, B, T), by their definitions, one token at a time."""
    p_student = softmax64(student.detach().double())
    p_teacher = softmax64(teacher.detach().double())

    terms = np.zeros((3, *targets.shape))
    for b, n in np.ndindex(*targets.shape):
        y = targets[b, n].item()
        terms[0, b, n] = -math.log(p_student[b, n, y])
        terms[1, b, n] = -math.log(p_teacher[b, n, y])
        terms[2, b, n] = -np.sum(p_teacher[b, n] * np.log(p_student[b, n]))
    return terms


def loss64(name, terms, layers=0.0, temperature=10.0, gt_weight=0.0):
    """A loss from the terms. TSLD is the printed formula, one sequence at a time."""
    ce_student, ce_teacher, kd = terms
    labels = gt_weight * ce_student.mean()
    if name == "tsld":
        sums = []
        for doubts, distances in zip(ce_teacher, kd):
            weights = [math.exp(doubt / temperature) for doubt in doubts]
            sums.append(sum(w * d for w, d in zip(weights, distances)) / sum(weights))
        return np.mean(sums) + labels

    losses = {"gt": ce_student.mean(), "logit": kd.mean() + labels}
    losses["logit_gt"] = kd.mean() + ce_student.mean()
    losses["l2l"] = kd.mean() + layers
    return losses[name]


@each("shape", [(3, 5, 7), (1, 1, 2)])
@each("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_terms_are_three_cross_entropies_in_float32(shape, dtype):
    batch = example(*shape, dtype)
    for term, expected in zip(tsld.per_token_terms(*batch), terms64(*batch)):
        assert term.dtype == torch.float32
        assert_close(term, expected, rtol=2e-6, atol=1e-6)


def test_the_terms_of_huge_logits_are_finite():
    student, teacher, targets = example()
    terms = tsld.per_token_terms(1e4 * student, 1e4 * teacher, targets)
    assert all(term.isfinite().all() for term in terms)


def test_logits_and_targets_that_do_not_fit_are_refused_with_their_shapes():
    student, teacher, targets = example()
    for batch in (
        (student, teacher, targets[:1]),  # would broadcast, as the next one
        (student, teacher[:1], targets),
        (student, teacher[..., 1:], targets),  # two vocabularies
        (student[:, 1:], teacher[:, 1:], targets),
    ):
        shapes = [tuple(tensor.shape) for tensor in batch]
        with refused(re.escape(str(shapes))):
            tsld.per_token_terms(*batch)


def test_the_floor_of_the_distillation_loss_is_the_teachers_entropy():
    student, teacher, targets = example()
    p = softmax64(teacher)
    q = softmax64(student)
    entropy = -(p * np.log(p)).sum(-1)
    divergence = (p * np.log(p / q)).sum(-1)
    assert (divergence > 0).all()

    kd = tsld.per_token_terms(student, teacher, targets).kd
    assert_close(kd, divergence + entropy)
    assert_close(tsld.per_token_terms(teacher, teacher, targets).kd, entropy)


def test_the_token_scale_is_a_softmax_over_the_tokens_of_each_sequence():
    ce_teacher = (5 * randn(4, 6).abs()).requires_grad_()
    scale = tsld.token_scale(ce_teacher, 2.0)
    for doubts, weights in zip(ce_teacher.detach(), scale):
        assert_close(weights, softmax64(doubts / 2.0))
        assert weights.argsort().equal(doubts.argsort())  # more doubt, more weight
    assert not scale.requires_grad
    assert_close(tsld.token_scale(ce_teacher, math.inf), np.full((4, 6), 1 / 6))


def test_tsld_of_a_batch_is_the_mean_over_its_sequences():
    batch = example(B=4)
    losses = []
    for sequence in zip(*batch):
        terms = tsld.per_token_terms(*(tensor[None] for tensor in sequence))
        losses.append(tsld.tsld_loss(terms).item())

    terms = tsld.per_token_terms(*batch)
    assert_close(tsld.tsld_loss(terms), np.mean(losses))

    # The authors' program sums over a batch of 4, and adds the ground truth.
    authors = sum(losses) + terms.ce_student.mean().item()
    assert_close(4 * tsld.tsld_loss(terms, gt_weight=0.25), authors)


@each("temperature", [1.0, 10.0, math.inf])
def test_the_gradient_of_tsld_is_scale_times_difference_of_distributions(temperature):
    student, teacher, targets = example()
    student.requires_grad_()
    teacher.requires_grad_()
    terms = tsld.per_token_terms(student, teacher, targets)
    tsld.tsld_loss(terms, temperature).backward()

    scale = softmax64(terms64(student, teacher, targets)[1] / temperature)
    difference = softmax64(student.detach()) - softmax64(teacher.detach())
    expected = scale[..., None] * difference / len(student)
    assert_close(student.grad, expected, rtol=1e-5, atol=1e-8)
    assert teacher.grad is None


@each("name", tsld.LOSSES)
@each("temperature, gt_weight", [(1.0, 0.0), (math.inf, 0.5)])
def test_each_loss_is_its_formula(name, temperature, gt_weight):
    terms = tsld.per_token_terms(*example())
    layers = torch.tensor(0.25)
    loss = tsld.distillation_loss(name, terms, temperature, gt_weight, layers)

    expected = loss64(name, terms64(*example()), 0.25, temperature, gt_weight)
    assert loss.shape == ()
    assert_close(loss, expected)


def test_without_settings_the_temperature_is_10_and_there_are_no_labels():
    terms = tsld.per_token_terms(*example())
    expected = loss64("tsld", terms64(*example()), temperature=10.0, gt_weight=0.0)
    assert_close(tsld.tsld_loss(terms), expected)
    assert_close(tsld.distillation_loss("tsld", terms), expected)
    assert_close(tsld.token_scale(terms.ce_teacher), softmax64(terms.ce_teacher / 10))


def test_the_four_lines_of_the_readme_are_the_loss():
    student, teacher, targets = example()
    names = {"F": F, "student_logits": student, "teacher_logits": teacher}
    names |= {"targets": targets, "temperature": 10.0}
    readme = (HERE / "README.md").read_text("utf-8")
    exec(readme.split("```python\n")[1].split("```")[0], names)
    assert_close(names["loss"], loss64("tsld", terms64(student, teacher, targets)))


def test_a_temperature_or_a_loss_that_there_is_not_is_refused():
    terms = tsld.per_token_terms(*example())
    for temperature in (0.0, -1.0, math.nan):
        with refused(f"temperature .*not {temperature}"):
            tsld.tsld_loss(terms, temperature)

    with refused("gt, logit, l2l, logit_gt, tsld, not 'mse'"):
        tsld.distillation_loss("mse", terms)
    with refused("needs layers"):
        tsld.distillation_loss("l2l", terms)


def random_trace(seed, n_layer=2, B=2, H=3, T=4, dtype=torch.float32):
    states = [randn(B, T, 6, seed=seed + i).to(dtype) for i in range(n_layer + 1)]
    scores = [randn(B, H, T, T, seed=seed + 50 + i).to(dtype) for i in range(n_layer)]
    for tensor in states + scores:
        tensor.requires_grad_()
    return tsld.Trace(None, states, scores)


def layers64(student, teacher, counted):
    """Σ MSE of states and scores. counted: the positions (b, n) that count."""
    total = 0.0
    for s, t in zip(student.hidden_states, teacher.hidden_states):
        squares = (s.double() - t.double()).square()
        total += sum(squares[b, n].mean().item() for b, n in counted) / len(counted)
    for s, t in zip(student.attention_scores, teacher.attention_scores):
        squares = (s.double() - t.double()).square()
        seen = [squares[b, :, n, m].mean() for b, n in counted for m in range(n + 1)]
        total += sum(seen).item() / len(seen)
    return total


@each("B, H, dtype", [(2, 3, torch.float32), (1, 1, torch.bfloat16)])
def test_l2l_adds_the_mse_of_states_and_of_scores_that_attention_sees(B, H, dtype):
    student = random_trace(0, B=B, H=H, dtype=dtype)
    teacher = random_trace(100, B=B, H=H, dtype=dtype)
    everywhere = list(itertools.product(range(B), range(4)))
    loss = tsld.layer_to_layer_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert_close(loss, layers64(student, teacher, everywhere))

    # Its gradient reaches all of the student's layers, and none of the teacher's.
    loss.backward()
    for trace in (student, teacher):
        for tensor in (*trace.hidden_states, *trace.attention_scores):
            assert (tensor.grad is not None) == (trace is student)


def test_l2l_does_not_count_the_positions_of_padding():
    student, teacher = random_trace(0), random_trace(100)
    targets = torch.tensor([[1, 2, 3, -100], [4, -100, 5, -100]])
    loss = tsld.layer_to_layer_loss(student, teacher, targets)
    counted = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)]
    assert_close(loss, layers64(student, teacher, counted))

    loss.backward()
    assert not student.hidden_states[0].grad[targets == -100].any()
    nothing = torch.full_like(targets, -100)
    assert tsld.layer_to_layer_loss(student, teacher, nothing) == 0


def test_l2l_of_models_of_two_shapes_is_refused():
    student = random_trace(0)
    with refused(r"do not fit: \[\(2, 4, 6\), \(2, 1, 6\), \(2, 4\)\]"):
        tsld.layer_to_layer_loss(student, random_trace(100, T=1))
    with refused("do not fit"):
        tsld.layer_to_layer_loss(student, random_trace(100), torch.zeros(2, 3))

    deeper, without = (
        random_trace(100, n_layer=3),
        student._replace(attention_scores=[]),
    )
    for teacher, words in ((deeper, "5 and 7 tensors"), (without, "5 and 3 tensors")):
        with refused(words):
            tsld.layer_to_layer_loss(student, teacher)


# ---- 2. Quantizers -------------------------------------------------------------------

WEIGHTS = {
    "normal": randn(7, 5),
    "one weight": torch.tensor([[-0.3]]),
    "a row of zeros": torch.cat([randn(3, 6), torch.zeros(1, 6)]),
    "zeros": torch.zeros(3, 4),
    "positive": randn(4, 6).abs() + 0.1,
    "negative": -randn(4, 6).abs() - 0.1,
    "bfloat16": randn(6, 10).bfloat16(),
    "transposed": randn(5, 8).t(),
    "two at Δ = 7": torch.tensor([[7.0, -7.0, 13.0, -13.0]]),  # which become 0
    "-7.5 and 7.5": torch.tensor([[-7.5, 0.0, 7.5]]),  # int4: 16 unless it is clamped
}
AXES = {"tensor": (0, 1), "channel": 1}  # that share a scale

each_weight = each("weight", WEIGHTS.values(), ids=WEIGHTS)
each_granularity = each("granularity", AXES)


def ternary64(weight, granularity):
    """The ternary quantizer by its formula: scale and quantized weight."""
    w = weight.detach().double().numpy()
    threshold = 0.7 * np.abs(w).mean(AXES[granularity], keepdims=True)
    is_large = np.abs(w) > threshold

    total = (np.abs(w) * is_large).sum(AXES[granularity], keepdims=True)
    count = is_large.sum(AXES[granularity], keepdims=True)
    scale = total / np.maximum(count, 1)
    return scale, scale * np.sign(w) * is_large


@each_granularity
@each_weight
def test_ternarize_is_the_formula_of_ternary_weight_networks(weight, granularity):
    codes, scale = tsld.ternarize(weight, granularity)
    expected_scale, quantized = ternary64(weight, granularity)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert_close(scale, expected_scale)
    assert_close(scale * codes, quantized)


@each_granularity
@each_weight
def test_int4_rounds_to_16_steps_over_a_range_that_includes_0(weight, granularity):
    w = weight.double().numpy()
    low = np.minimum(w.min(AXES[granularity], keepdims=True), 0)
    high = np.maximum(w.max(AXES[granularity], keepdims=True), 0)
    step = (high - low) / 15
    divisor = np.where(step > 0, step, 1)
    zero = np.round(-low / divisor)
    expected = np.clip(np.round(w / divisor) + zero, 0, 15)

    codes, scale, zero_point = tsld.quantize_int4(weight, granularity)
    types = [tensor.dtype for tensor in (codes, scale, zero_point)]
    assert types == [torch.uint8, torch.float32, torch.int32]
    assert_close(codes, expected, rtol=0)
    assert_close(scale, step)
    assert_close(zero_point, zero, rtol=0)


@each_granularity
@each("bits", [2, 4])
@each("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_rounds_forward_not_backward(bits, granularity, dtype):
    weight = (3 * randn(6, 9)).to(dtype)
    weight[:, 4] = 0.0
    weight.requires_grad_()
    if bits == 2:
        codes, scale = tsld.ternarize(weight, granularity)
        expected = scale * codes
    else:
        codes, scale, zero_point = tsld.quantize_int4(weight, granularity)
        expected = scale * (codes.int() - zero_point)

    quantized = tsld.fake_quantize(weight, bits, granularity)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, expected.to(dtype))
    assert not quantized[:, 4].any()  # a 0 stays 0

    # ∂L/∂w := ∂L/∂ŵ
    gradient = randn(6, 9, seed=1).to(dtype)
    quantized.backward(gradient)
    assert torch.equal(weight.grad, gradient)


@each("options", [{}, {"granularity": "channel"}, {"bias": False}])
def test_a_quant_linear_has_a_rounded_weight_and_an_exact_bias(options):
    layer = QuantLinear(7, 4, **options)
    _, rounded = ternary64(layer.weight, options.get("granularity", "tensor"))
    assert (layer.bias is not None) == options.get("bias", True)
    assert_close(layer.dequantized(), rounded)

    x = randn(2, 3, 7)
    y = layer(x)
    expected = x.double().numpy() @ rounded.T
    if layer.bias is not None:
        expected = expected + layer.bias.detach().double().numpy()
    assert_close(y, expected, rtol=1e-5, atol=1e-6)

    # The optimizer holds the full-precision weight, and gives it this gradient.
    y.sum().backward()
    assert_close(layer.weight.grad, x.sum((0, 1)).expand(4, 7), rtol=1e-5)


def test_other_bits_and_granularities_are_refused():
    model = micro_gpt()
    for bits in (3, "2", None):
        with refused(f"bits must be 2 or 4, not {bits!r}"):
            tsld.quantize_model(model, bits)
    for bits in (2, 4):
        with refused("'tensor' or 'channel', not 'row'"):
            tsld.quantize_model(model, bits, granularity="row")
    assert not names_of(model, QuantLinear)


def test_quantize_model_replaces_the_linear_layers_of_the_blocks_alone():
    model = micro_gpt()
    before = dict(model.named_parameters())
    assert tsld.quantize_model(model, bits=4, granularity="channel") is model

    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {f"h.{i}.{layer}" for i in range(2) for layer in layers}
    assert names_of(model, QuantLinear) == expected
    assert model.lm_head.weight is model.wte.weight
    layer = model.h[0].attn.c_attn
    assert (layer.bits, layer.granularity, layer.training) == (4, "channel", False)

    # Its parameters are the very ones that it had.
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_layer_that_is_used_twice_keeps_its_one_weight_packed_or_not():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    expected = tsld.quantize_model(model)(randn(3, 4))
    assert names_of(model, QuantLinear) == {"0", "2"}
    assert model[0].weight is model[2].weight is shared.weight
    assert_close(tsld.pack_model(model)(randn(3, 4)), expected, rtol=1e-5)
    same = QuantLinear(4, 4)
    assert names_of(tsld.pack_model(nn.Sequential(same, same)), PackedLinear) == {*"01"}


@each("head", ["lm_head", "head", "tied", "lm_head elsewhere"])
def test_quantize_model_spares_the_output_head(head):
    layers = {"embedding": nn.Embedding(9, 3), "body": nn.Linear(3, 3)}
    model = nn.ModuleDict(layers | {head: nn.Linear(3, 9, bias=False)})
    if head == "tied":
        model["tied"].weight = model["embedding"].weight
    if head == "lm_head elsewhere":
        model.lm_head = model[head]

    tsld.quantize_model(model)
    assert type(model[head]) is nn.Linear
    assert names_of(model, QuantLinear) == {"body"}


def test_a_model_whose_layers_cannot_be_replaced_is_refused_by_name():
    encoder = nn.TransformerEncoderLayer(4, 2)  # reads its layers' weights, calls none
    with refused("self_attn.out_proj is a NonDynamicallyQuantizableLinear"):
        tsld.quantize_model(encoder)
    with refused("ModuleDict holds no"):
        tsld.quantize_model(nn.ModuleDict({"head": nn.Linear(2, 2)}))
    assert type(encoder.linear1) is nn.Linear  # before any change


class Experts(nn.Module):
    """Weights in matrices: 40 quantized, 60 in no layer; the others are to stay."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(9, 2)
        self.router = nn.Linear(4, 10)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.norm = nn.LayerNorm((2, 4))
        self.gate = nn.Linear(1, 1)
        self.lm_head = nn.Linear(2, 9)


def test_matrices_that_stay_exact_are_named_in_a_warning_with_their_share():
    with pytest.warns(UserWarning) as caught:
        tsld.quantize_model(Experts(), skip=["gate"])
    (warning,) = caught
    assert warning.filename == __file__  # the caller's line
    message = "60.0% of the matrix weights keep full precision: experts"
    assert str(warning.message) == message

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tsld.quantize_model(micro_gpt())


# ---- 3. GPT --------------------------------------------------------------------------


def gpt64(model, row):
    """GPT-2 of one sequence, one head at a time: logits (T, V), hidden states
    (n_layer + 1, T, C), attention scores (n_layer · H, T, T)."""
    p = {name: t.detach().double().numpy() for name, t in model.state_dict().items()}
    size = model.config.n_embd // model.config.n_head

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = p["wte.weight"][row] + p["wpe.weight"][: len(row)]
    states = [x]
    scores = []
    for h in (f"h.{i}" for i in range(model.config.n_layer)):
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        q, k, v = np.split(qkv, 3, axis=-1)
        heads = []
        for i in range(model.config.n_head):
            part = slice(i * size, (i + 1) * size)
            score = q[:, part] @ k[:, part].T / math.sqrt(size)
            scores.append(score)
            seen = np.where(np.tri(len(row), dtype=bool), score, -np.inf)
            heads.append(softmax64(seen) @ v[:, part])
        x = x + linear(np.concatenate(heads, -1), f"{h}.attn.c_proj")

        wide = gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
        x = x + linear(wide, f"{h}.mlp.c_proj")
        states.append(x)

    return norm(x, "ln_f") @ p["wte.weight"].T, states, scores


@each("T", [1, 5, 8])
def test_gpt_is_gpt2(T):
    model = micro_gpt()
    ids = random_ids(2, T)
    trace = model(ids, trace=True)
    product = model.hidden(ids) @ model.wte.weight.T
    exact = copy.deepcopy(model).double()(ids)

    for b in range(2):
        logits, states, scores = gpt64(model, ids[b].numpy())
        assert_close(exact[b], logits, 1e-9, 1e-9)
        for result in (model(ids), trace.logits, product):
            assert_close(result[b], logits, 1e-4, 1e-4)
        assert_close(torch.stack(trace.hidden_states)[:, b], states, 1e-4, 1e-4)
        result = torch.stack(trace.attention_scores)[:, b].flatten(0, 1)
        assert_close(result, scores, 1e-4, 1e-4)


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, vocab_size=500, n_layer=3, n_head=2, n_embd=96))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 3) if "c_proj" in name else 0.02
            assert_close(parameter.std(), std, rtol=0.05)
            assert abs(parameter.mean().item()) < 0.1 * std


def test_sizes_that_make_no_gpt_are_refused():
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        for size in (0, -1, 1.0, "2", None, True):
            with refused(re.escape(repr(size))):
                replace(MICRO, **{name: size})
    with refused("12 does not divide into 5 heads"):
        replace(MICRO, n_head=5)
    assert GPT(GPTConfig(1, 1, 1, 1, 1))(torch.zeros(2, 1).long()).shape == (2, 1, 1)


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    model = micro_gpt(dropout=0.5)
    ids = random_ids(2, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model.embed(ids), model.embed(ids))

    # Position 0 sees itself alone. Dropout takes half of its weights in attention, and
    # half of the outputs: a quarter of the values is there, at 4 times their size.
    attention = model.h[0].attn
    attention.c_proj = nn.Identity()
    x = randn(1, 8, 12)
    expected, _ = attention.eval()(x)
    x = x.expand(20_000, -1, -1)
    outputs, _ = attention.train()(x)
    assert_close((outputs[:, 0] != 0).float().mean(), 1 / 4, atol=0.01)
    assert_close(outputs.mean(0), expected[0], atol=0.15 * expected.abs().max().item())

    # In an MLP it takes half of the outputs.
    assert_close((model.h[0].mlp(x) != 0).float().mean(), 1 / 2, atol=0.01)


@each("B", [1, 3])
def test_with_a_cache_tokens_can_come_one_after_the_other(B):
    model = micro_gpt()
    ids = random_ids(B, 8)
    cache = [torch.zeros(2, B, 2, 8, 6) for _ in range(2)]
    parts = [model.hidden(ids[:, :3], cache)]
    for n in range(3, 8):
        parts.append(model.hidden(ids[:, n : n + 1], cache, n))
    assert_close(torch.cat(parts, dim=1), model.hidden(ids), 1e-4, 1e-5)


def test_attention_in_float64_has_the_gradient_of_finite_differences():
    attention = micro_gpt().h[0].attn.double()
    x = randn(2, 3, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x)[0], x)


def test_greedy_generation_is_the_argmax_without_a_cache():
    model = micro_gpt(1)  # which does not repeat one token
    ids = random_ids(3, 2)
    expected = ids
    for _ in range(6):
        best = model(expected)[:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)

    assert torch.equal(model.generate(ids, 6, temperature=0), expected)
    assert torch.equal(model.generate(ids, 6, top_k=1), expected)
    assert torch.equal(model.generate(ids, 0), ids)
    columns = list(model.stream(ids, 6, temperature=0))
    assert torch.equal(torch.cat(columns, dim=1), expected[:, 2:])


@each("options", [{}, {"top_k": 99}, {"temperature": 0.5, "top_k": 4}])
def test_tokens_are_drawn_from_softmax_of_logits_over_temperature(options):
    model = micro_gpt()
    ids = random_ids(1, 3)
    logits = gpt64(model, ids[0].numpy())[0][-1] / options.get("temperature", 1.0)
    if options.get("top_k") == 4:
        logits[np.argsort(logits)[:-4]] = -np.inf
    expected = softmax64(logits)

    torch.manual_seed(0)
    ids = ids.expand(20_000, -1)
    generated = model.generate(ids, 1, **options)[:, -1:]
    sampled = tsld.sample(model(ids)[:, -1], **options)
    for drawn in (generated, sampled, *model.stream(ids, 1, **options)):
        frequency = np.bincount(drawn[:, 0], minlength=17) / 20_000
        assert_close(frequency, expected, rtol=0, atol=4 * 0.5 / math.sqrt(20_000))
        assert not frequency[expected == 0].any()


@each("training", [True, False])
def test_generation_has_no_dropout_and_leaves_the_mode_as_it_was(training):
    model = micro_gpt(dropout=0.9).train(training)
    ids = random_ids(2, 3)
    first = model.generate(ids, 5, temperature=0)
    assert torch.equal(first, model.generate(ids, 5, temperature=0))
    assert model.training == training

    # What was generated can be trained on.
    model(first).sum().backward()
    assert model.wte.weight.grad is not None


def test_what_does_not_fit_the_block_or_cannot_be_drawn_is_refused():
    model = micro_gpt().train()
    with refused("exceed block_size: places 0 to 9 of 8"):
        model(random_ids(1, 9))
    for T, start in ((1, 8), (9, 0), (2, 1)):
        cache = torch.zeros(2, 1, 2, 8, 6)
        with refused(f"no {T} tokens at position {start}"):
            model.h[0].attn(randn(1, T, 12), cache, start)
    for T, new in ((4, 5), (0, 1), (2, -1)):
        with refused(f"{T} tokens and {new} new .*size 8"):
            model.generate(random_ids(1, T), new)
    for setting in ({"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}):
        with refused("temperature -1|temperature nan|top_k 0"):
            model.generate(random_ids(1, 2), 1, **setting)
    assert model.training


# ---- 4. Training ---------------------------------------------------------------------

BRIEF = TrainConfig(loss="tsld", steps=6, batch_size=2, lr=0.01)
BRIEF_GT = replace(BRIEF, loss="gt")
TEXT = random_ids(60, seed=1)


def batch_of_step(config, step):
    """The batch that a training draws, ids and targets, each (B, 8)."""
    rng = np.random.default_rng((config.seed, step))
    return tsld.get_batch(TEXT, config.batch_size, 8, rng)


def train_to_end(student, config, teacher=None, **how):
    """The losses of all steps."""
    return [loss for _, loss in tsld.train(student, TEXT, config, teacher, **how)]


def test_a_training_has_these_settings_where_none_are_named():
    losses = {"loss": "tsld", "temperature": 10.0, "gt_weight": 0.0}
    sizes = {"steps": 450, "batch_size": 32, "block_size": None, "accumulate": 1}
    rates = {"lr": 1e-3, "warmup": 0.05, "final_lr": 0.1}
    adamw = {"weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0}
    rest = {"dtype": "float32", "seed": 0}
    assert asdict(TrainConfig()) == losses | sizes | rates | adamw | rest


def test_the_learning_rate_rises_linearly_then_falls_by_a_cosine():
    config = TrainConfig(steps=201, lr=2.0, warmup=0.05, final_lr=0.1)
    rates = [tsld.learning_rate(step, config) for step in range(201)]
    assert_close(rates[:11], 2.0 * np.arange(1, 12) / 11)  # 5 % are 11 steps
    cosine = (1 + np.cos(np.pi * np.arange(190) / 189)) / 2
    assert_close(rates[11:], 2.0 * (0.1 + 0.9 * cosine))
    assert tsld.learning_rate(0, replace(config, steps=1)) == 2.0


def test_a_batch_is_pieces_of_the_text_with_targets_one_token_ahead():
    tokens = torch.arange(100, 120)
    ids, targets = tsld.get_batch(tokens, 500, 8, np.random.default_rng(0))
    assert ids.shape == (500, 8)
    assert torch.equal(ids, ids[:, :1] + torch.arange(8))
    assert torch.equal(targets, ids + 1)
    assert set(ids[:, 0].tolist()) == set(range(100, 112))  # where 9 tokens fit


def test_two_training_steps_are_clipped_adamw_by_hand():
    config = replace(BRIEF_GT, steps=2, warmup=0.0, clip=0.5, weight_decay=0.3)
    trained = micro_gpt()
    train_to_end(trained, config)

    by_hand = micro_gpt().double()
    averages = {name: [0.0, 0.0] for name, _ in by_hand.named_parameters()}
    for t, lr in ((1, 0.01), (2, 0.001)):
        ids, targets = batch_of_step(config, t - 1)
        by_hand.zero_grad()
        F.cross_entropy(by_hand(ids).flatten(0, 1), targets.flatten()).backward()
        norm = math.sqrt(sum((p.grad**2).sum() for p in by_hand.parameters()))
        assert norm > 0.5  # so that it is clipped

        for name, p in by_hand.named_parameters():
            gradient = p.grad * 0.5 / norm
            m, v = averages[name]
            m = 0.9 * m + 0.1 * gradient
            v = 0.95 * v + 0.05 * gradient**2
            averages[name] = [m, v]
            step = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            decay = 0.3 if p.dim() == 2 else 0.0  # none on biases and norms
            p.data = p.data * (1 - lr * decay) - lr * step

    for name, p in by_hand.named_parameters():
        result, expected = trained.get_parameter(name), p
        if name.endswith("c_attn.bias"):
            # A bias on the keys shifts all scores of a token: its gradient is noise.
            result, expected = result.view(3, -1)[[0, 2]], expected.view(3, -1)[[0, 2]]
        assert_close(result, expected, 1e-3, 2e-5)


@each("name", tsld.LOSSES)
def test_train_descends_the_named_loss_of_both_models_logits(name):
    student = quantized_gpt(seed=1)
    teacher = micro_gpt(2)
    config = replace(BRIEF, loss=name, temperature=2.0, gt_weight=0.25)
    ids, targets = batch_of_step(config, 0)
    with torch.no_grad():
        one = student(ids, trace=True)
        two = teacher(ids, trace=True)
    terms = terms64(one.logits, two.logits, targets)
    layers = tsld.layer_to_layer_loss(one, two).item()

    _, loss = next(tsld.train(student, TEXT, config, teacher))
    assert_close(loss, loss64(name, terms, layers, 2.0, 0.25), rtol=1e-5)
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_ground_truth_alone_needs_no_teacher_and_does_not_look_at_one():
    losses = train_to_end(micro_gpt(), BRIEF_GT)
    silent = nn.Module()  # cannot be called
    assert train_to_end(micro_gpt(), BRIEF_GT, silent) == losses


def test_training_lowers_the_loss_and_leaves_the_teacher_as_it_was():
    teacher = micro_gpt().train()
    teacher.ln_f.weight.data *= 10  # sure of itself, so that there is much to learn
    before = copy.deepcopy(teacher)
    student = tsld.quantize_model(copy.deepcopy(teacher))

    losses = []
    config = replace(BRIEF, steps=60, batch_size=8)
    for step, loss in tsld.train(student, TEXT, config, teacher):
        losses.append(loss)
        assert step == len(losses)
        assert (student.training, teacher.training) == (True, False)

    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert not student.training
    assert_same(teacher, before)


def test_another_way_to_loss_and_gradient_can_take_the_place_of_tslds():
    calls = []

    def another_way(*arguments):
        calls.append(arguments)
        return tsld.backward(*arguments)

    teacher = micro_gpt(2)
    usual = quantized_gpt(seed=1)
    other = quantized_gpt(seed=1)
    losses = train_to_end(usual, BRIEF, teacher)
    assert train_to_end(other, BRIEF, teacher, backward=another_way) == losses
    assert_same(usual, other)

    assert len(calls) == 6
    student, asked, ids, targets, config = calls[-1]
    assert (student, asked, config) == (other, teacher, BRIEF)
    assert torch.stack(batch_of_step(BRIEF, 5)).equal(torch.stack([ids, targets]))


@each("dtype", ["float32", "bfloat16"])
def test_products_are_taken_in_the_dtype_asked_for_and_weights_stay_float32(dtype):
    model = micro_gpt()
    seen = set()
    model.h[0].mlp.c_fc.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    train_to_end(model, replace(BRIEF_GT, dtype=dtype))
    assert seen == {getattr(torch, dtype)}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_training_that_goes_on_from_a_step_ends_with_the_very_same_weights():
    teacher = micro_gpt(2)
    whole = quantized_gpt(seed=1, dropout=0.5)
    losses = train_to_end(whole, BRIEF, teacher)

    parts = quantized_gpt(seed=1, dropout=0.5)
    optimizer = tsld.make_optimizer(parts, BRIEF)
    first = itertools.islice(tsld.train(parts, TEXT, BRIEF, teacher, optimizer), 4)
    losses_of_parts = [loss for _, loss in first]
    torch.manual_seed(99)
    losses_of_parts += train_to_end(parts, BRIEF, teacher, optimizer=optimizer, start=4)

    assert losses_of_parts == losses
    assert_same(whole, parts)


@each("name", tsld.LOSSES)
def test_a_batch_that_is_taken_in_parts_gives_the_same_training(name):
    config = replace(BRIEF, loss=name, batch_size=6)
    whole = quantized_gpt(seed=1)
    losses = train_to_end(whole, config, micro_gpt(2))

    parts = quantized_gpt(seed=1)
    sizes = []
    parts.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    in_parts = train_to_end(parts, replace(config, accumulate=3), micro_gpt(2))
    assert sizes == [2] * 3 * 6
    assert_close(in_parts, losses, rtol=1e-5)
    assert_close(parts.wte.weight, whole.wte.weight, 1e-3, 1e-4)


def test_the_seed_chooses_the_batches_and_the_block_size_their_length():
    model = micro_gpt()
    lengths = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    losses = train_to_end(model, BRIEF_GT)
    assert train_to_end(micro_gpt(), BRIEF_GT) == losses
    assert train_to_end(micro_gpt(), replace(BRIEF_GT, seed=1)) != losses

    train_to_end(model, replace(BRIEF_GT, block_size=3))
    assert lengths == [8] * 6 + [3] * 6


def test_what_a_training_lacks_is_refused_by_name():
    teacher = micro_gpt()
    uneven = replace(BRIEF, batch_size=6, accumulate=4)
    for config, tokens, taught_by, words in (
        (BRIEF, TEXT, None, "'tsld' needs a teacher"),
        (BRIEF, TEXT[:8], teacher, "8 tokens"),
        (uneven, TEXT, teacher, "batch_size 6, accumulate 4"),
        (replace(BRIEF, batch_size=0), TEXT, teacher, "batch_size 0"),
        (replace(BRIEF, accumulate=0), TEXT, teacher, "accumulate 0"),
        (replace(BRIEF, loss="mse"), TEXT, teacher, "'mse'"),
        (replace(BRIEF, dtype="float16"), TEXT, teacher, "'float16'"),
        (BRIEF, TEXT, micro_gpt(vocab_size=99), "do not fit"),
    ):
        with refused(words):
            next(tsld.train(micro_gpt(), tokens, config, taught_by))
    assert len(list(tsld.train(teacher, TEXT[:9], BRIEF_GT))) == 6


def test_a_packed_model_has_nothing_to_train():
    with refused("nothing to train"):
        next(tsld.train(tsld.pack_model(quantized_gpt()), TEXT, BRIEF_GT))


@each("bad", [math.nan, math.inf])
@each("place", ["loss", "gradient of norm"])
def test_training_stops_before_what_is_not_finite_reaches_the_weights(place, bad):
    model = micro_gpt()
    factor = torch.ones(())
    if place == "loss":
        model.ln_f.register_forward_hook(lambda _, args, output: output * factor)
    else:
        model.wpe.weight.register_hook(lambda gradient: gradient * factor)

    config = replace(BRIEF_GT, steps=9, lr=1e-3, warmup=0.5)
    words = rf"{place} (nan|inf).* at step 4, .*rate 8\.00e-04"
    with pytest.raises(tsld.TrainingDiverged, match=words):
        for step, _ in tsld.train(model, TEXT, config):
            before = copy.deepcopy(model)
            if step == 3:
                factor.fill_(bad)
    assert_same(model, before)


def test_a_gradient_that_was_there_before_does_not_count():
    models = []
    for old_gradient in (0.0, math.nan):
        model = micro_gpt()
        optimizer = tsld.make_optimizer(model.ln_f, BRIEF_GT)  # it holds no others
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, old_gradient)
        train_to_end(model, BRIEF_GT, optimizer=optimizer)
        models.append(model)
    assert_same(*models)


@each("training", [True, False])
@each("length, size", [(60, 8), (57, 8), (2, 8), (59, 7)])
def test_evaluation_predicts_each_token_but_one_from_its_block(length, size, training):
    model = micro_gpt(dropout=0.5)
    nats = []
    for n in range(length - 1):
        block = TEXT[n // size * size : n + 1]  # token n is its last one
        p = softmax64(model(block[None])[0, -1].detach())
        nats.append(-math.log(p[TEXT[n + 1]]))

    model.train(training)
    assert_close(tsld.evaluate(model, TEXT[:length], size), np.mean(nats), 1e-5)
    assert model.training == training


def test_evaluation_takes_no_gradient_and_bounds_the_logits_memory():
    class Uniform(nn.Module):
        def forward(self, ids):
            assert not torch.is_grad_enabled()
            assert ids.numel() <= max(2048, ids.shape[1])
            return torch.zeros(*ids.shape, 5, dtype=torch.bfloat16)

    text = torch.zeros(10_000, dtype=torch.long)
    for block_size in (16, 3000):
        assert_close(tsld.evaluate(Uniform(), text, block_size), math.log(5))
    for text in (TEXT[:1], TEXT[:0], TEXT[None]):
        with refused(re.escape(str(tuple(text.shape)))):
            tsld.evaluate(micro_gpt(), text, 8)


def test_bits_per_byte_are_the_bits_of_all_tokens_over_all_bytes():
    assert_close(tsld.bits_per_byte(math.log(2), tokens=30, bytes=60), 0.5)


# ---- 5. Packing ----------------------------------------------------------------------


def random_codes(out_features, in_features):
    return (random_ids(out_features, in_features, below=3) - 1).to(torch.int8)


def test_plus_minus_zero_plus_is_the_byte_77():
    codes = torch.tensor([[1, -1, 0, 1]], dtype=torch.int8)
    assert tsld.pack_ternary(codes).tolist() == [[0b01_00_11_01]] == [[77]]


@each("shape", [(1, 1), (3, 2), (2, 3), (4, 8), (7, 30), (3000, 5)])
def test_a_rows_codes_stand_in_order_four_in_a_byte_the_first_one_lowest(shape):
    out_features, in_features = shape
    K = math.ceil(in_features / 4)
    for codes in (random_codes(*shape), random_codes(in_features, out_features).t()):
        packed = tsld.pack_ternary(codes)
        assert packed.dtype == torch.uint8
        assert packed.shape == (out_features, K)
        for row, bytes_of_row in zip(codes.tolist(), packed.tolist()):
            number = sum(code % 4 << 2 * j for j, code in enumerate(row))
            assert bytes(bytes_of_row) == number.to_bytes(K, "little")

        unpacked = tsld.unpack_ternary(packed, in_features)
        assert unpacked.dtype == torch.int8
        assert torch.equal(unpacked, codes)


@each("leading", [(), (2,), (3, 5), (0,)])
@each("shape", [(1, 1), (5, 5), (7, 30), (64, 16)])
def test_ternary_matmul_is_the_product_with_scale_times_codes(shape, leading):
    codes = random_codes(*shape)
    packed = tsld.pack_ternary(codes)
    x = randn(*leading, 2 * shape[1])[..., ::2]  # not contiguous
    bias = randn(shape[0], seed=2)
    sums = x.double() @ codes.double().T

    for scale in (torch.tensor([[0.3]]), torch.rand(shape[0], 1), torch.zeros(1, 1)):
        expected = sums * scale.double().flatten()
        y = tsld.ternary_matmul(x, packed, scale)
        assert_close(y, expected, atol=1e-5)
        y = tsld.ternary_matmul(x, packed, scale, bias)
        assert_close(y, expected + bias.double(), atol=1e-5)


@each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ternary_matmul_adds_up_in_float32_without_a_matrix_product(dtype):
    packed = tsld.pack_ternary(torch.ones(3, 4096, dtype=torch.int8))
    with FlopCounterMode(display=False) as counter:
        y = tsld.ternary_matmul(torch.ones(4096, dtype=dtype), packed, torch.ones(1, 1))
    assert counter.get_total_flops() == 0  # of matrix products
    assert y.dtype == dtype
    assert y.tolist() == [4096] * 3  # bfloat16 cannot count beyond 256


def test_products_of_shapes_that_do_not_fit_are_refused():
    packed = tsld.pack_ternary(random_codes(3, 14))
    for width, scales in ((12, 1), (17, 1), (1, 1), (14, 2)):
        words = rf"\(3, 4\), {scales} scales, {width} inputs"
        with refused(words):
            tsld.ternary_matmul(randn(2, width), packed, torch.ones(scales, 1))

    for width in (13, 15, 16):  # of as many bytes
        with refused(f"{width} inputs, not 14"):
            PackedLinear(14, packed, torch.ones(1, 1))(randn(2, width))


def test_the_gradient_passes_a_packed_layer():
    codes = random_codes(3, 5)
    layer = PackedLinear(5, tsld.pack_ternary(codes), torch.tensor([[0.5]]))
    x = randn(2, 5).requires_grad_()
    layer(x).sum().backward()
    assert_close(x.grad, (0.5 * codes.sum(0)).expand(2, 5))


@each_granularity
def test_a_packed_model_computes_what_the_quantized_one_did(granularity):
    model = quantized_gpt(granularity).train()
    ids = random_ids(2, 8)
    expected = model(ids).detach()
    greedy = model.generate(ids[:, :2], 6, temperature=0)
    weight = model.h[1].mlp.c_fc.dequantized()

    assert tsld.pack_model(model) is model
    assert len(names_of(model, PackedLinear)) == 8
    assert not names_of(model, QuantLinear)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())

    assert_close(model.h[1].mlp.c_fc.dequantized(), weight)
    assert_close(model(ids), expected, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(model.generate(ids[:, :2], 6, temperature=0), greedy)


def partly_ternary_gpt():
    model = quantized_gpt()
    model.h[1].mlp.c_fc.bits = 4
    return model


def test_a_model_without_layers_of_2_bits_is_not_packed():
    for model in (micro_gpt(), tsld.quantize_model(micro_gpt(), bits=4)):
        with refused("no 2-bit QuantLinear"):
            tsld.pack_model(model)
    assert names_of(tsld.pack_model(partly_ternary_gpt()), QuantLinear)


@pytest.fixture
def packed_file(tmp_path):
    path = tmp_path / "model.packed"
    tsld.save_model(path, tsld.pack_model(quantized_gpt()))
    return path


@each_granularity
def test_a_loaded_model_differs_by_the_float16_of_its_matrices(granularity, tmp_path):
    path = tmp_path / "model.packed"
    model = tsld.pack_model(quantized_gpt(granularity))
    tsld.save_model(path, model)
    loaded = tsld.load_model(path)
    assert os.listdir(tmp_path) == ["model.packed"]
    assert loaded.config == MICRO
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.lm_head.weight is loaded.wte.weight
    assert loaded.lm_head(randn(12).bfloat16()).dtype == torch.bfloat16

    for embedding in (model.wte, model.wpe):
        embedding.weight.data = embedding.weight.data.half().float()
    ids = random_ids(2, 8)
    expected = model(ids)
    greedy = model.generate(ids[:, :2], 6, temperature=0)
    assert_close(loaded(ids), expected, 1e-5, 1e-5)
    assert torch.equal(loaded.generate(ids[:, :2], 6, temperature=0), greedy)

    # It can be saved again, and made float32.
    tsld.save_model(path, loaded)
    assert_same(tsld.load_model(path), loaded)
    assert_close(loaded.float()(ids), expected, 1e-5, 1e-5)


def test_a_file_holds_bytes_of_codes_float32_vectors_and_float16_matrices(tmp_path):
    tsld.save_model(tmp_path / "file", tsld.pack_model(quantized_gpt("channel")))
    content = torch.load(tmp_path / "file")
    assert content["format"] == "tsld packed 4"
    assert content["config"] == asdict(MICRO)

    tensors = content["tensors"]
    expected = dict.fromkeys(tensors, torch.float32)
    for name in ("wte", "wpe", "lm_head"):
        expected[f"{name}.weight"] = torch.float16
    for name in names_of(quantized_gpt(), QuantLinear):
        expected[f"{name}.packed"] = torch.uint8
    assert {name: tensor.dtype for name, tensor in tensors.items()} == expected
    assert tensors["lm_head.weight"].data_ptr() == tensors["wte.weight"].data_ptr()


def test_gpt2_small_is_a_file_of_101_megabytes_a_fifth_of_fp32(tmp_path):
    with torch.device("meta"):
        model = tsld.quantize_model(GPT(GPTConfig()))
    model.to_empty(device="cpu")
    model.lm_head.weight = model.wte.weight
    for parameter in model.parameters():
        parameter.data.zero_()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808

    tsld.save_model(tmp_path / "file", tsld.pack_model(model))
    size = os.path.getsize(tmp_path / "file")
    assert (round(size / 1e6), round(4 * 124_439_808 / 1e6)) == (101, 498)

    layers = [m.packed.numel() for m in model.modules() if isinstance(m, PackedLinear)]
    assert 4 * sum(layers) == 84_934_656  # of the weights are ternary, 4 in a byte
    assert model.h[0].mlp.c_proj.packed.numel() == 589_824


def other_model(tied=True):
    """A model that is not our GPT, with a complex tensor."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.embedding = nn.Embedding(11, 6)
    model.up = nn.Linear(6, 7)
    model.down = nn.Linear(7, 6, bias=False)
    model.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
    model.lm_head = nn.Linear(6, 11, bias=False)
    if tied:
        model.lm_head.weight = model.embedding.weight
    return model


@each_granularity
@each("tied", [True, False])
def test_a_file_fills_a_model_that_is_not_our_gpt(tied, granularity, tmp_path):
    path = tmp_path / "other.packed"
    model = tsld.quantize_model(other_model(tied), granularity=granularity)
    tsld.save_model(path, tsld.pack_model(model))

    blank = other_model(tied).double()
    blank.load_state_dict({n: t * 0 for n, t in blank.state_dict().items()})
    quantized = tsld.quantize_model(other_model(tied), granularity=granularity)
    ids = torch.arange(11)[None]
    for into, dtype in ((blank, torch.float64), (quantized, torch.float32)):
        loaded = tsld.load_model(path, into)
        assert loaded is into
        assert not loaded.training
        assert loaded.embedding.weight.dtype == dtype
        assert (loaded.lm_head.weight is loaded.embedding.weight) == tied
        assert_close(loaded.turns.angle(), [0.0, 1.0, 2.0])
        assert_close(loaded(ids), model(ids), 1e-2, 1e-2)

    with pytest.raises(CheckpointError):
        tsld.load_model(path)


@each("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_filled_keeps_its_dtype(dtype, packed_file):
    model = tsld.load_model(packed_file, into=micro_gpt(1).to(dtype))
    expected = tsld.load_model(packed_file)
    for name in ("wte.weight", "h.1.ln_1.weight", "h.1.mlp.c_fc.bias"):
        value = model.state_dict()[name]
        assert value.dtype == dtype
        assert torch.equal(value, expected.state_dict()[name].to(dtype))


def test_a_file_fills_no_model_that_computes_something_else(packed_file):
    for into, words in (
        (micro_gpt(n_head=4), "'n_head': 2"),
        (tsld.quantize_model(micro_gpt(), bits=4), "2-bit"),
        (partly_ternary_gpt(), "h.1.mlp.c_fc"),
        (quantized_gpt("channel"), "h.0.attn.c_attn.scale"),
        (other_model(), "config"),
    ):
        with pytest.raises(CheckpointError, match=words):
            tsld.load_model(packed_file, into)


def test_what_is_not_packed_as_a_whole_or_not_finite_is_not_saved(packed_file):
    before = packed_file.read_bytes()
    for model in (micro_gpt(), quantized_gpt(), tsld.pack_model(partly_ternary_gpt())):
        with refused("pack_model"):
            tsld.save_model(packed_file, model)

    for name, value in (
        ("wte.weight", 7e4),  # float16 ends at 65,504
        ("wpe.weight", math.nan),
        ("h.1.ln_2.bias", math.inf),
        ("h.0.mlp.c_fc.scale", math.nan),
    ):
        model = tsld.pack_model(quantized_gpt())
        model.state_dict()[name].view(-1)[0] = value
        with refused(f"{name} .*not finite"):
            tsld.save_model(packed_file, model)
    assert packed_file.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file_alone(packed_file, monkeypatch):
    save = torch.save

    def fail(content, file):
        save("half of it", file)
        raise OSError("the disk is full")

    before = packed_file.read_bytes()
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk is full"):
        tsld.save_model(packed_file, tsld.pack_model(quantized_gpt(seed=1)))
    assert packed_file.read_bytes() == before
    assert os.listdir(packed_file.parent) == [packed_file.name]


def assert_refused(path, words=""):
    """It is a CheckpointError of one line, which names the file."""
    with pytest.raises(CheckpointError) as caught:
        tsld.load_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert words in message


def test_a_file_that_is_truncated_or_foreign_is_refused(packed_file):
    content = packed_file.read_bytes()
    half = len(content) // 2
    for damaged in (content[:-1], content[:half], content[half:], b"PK", b"", b"GGUF"):
        packed_file.write_bytes(damaged)
        assert_refused(packed_file)


# ---- 6. The file alone ---------------------------------------------------------------

ALONE = """
import sys
sys.path.append(sys.argv[1])
import copy, torch, tsld

tokens = torch.arange(300) ** 2 % 7
teacher = tsld.GPT(tsld.GPTConfig(8, 7, n_layer=1, n_head=2, n_embd=16))
config = tsld.TrainConfig(loss="gt", steps=3, batch_size=4)
steps = list(tsld.train(teacher, tokens, config))
student = tsld.quantize_model(copy.deepcopy(teacher))
for config.loss in tsld.LOSSES:
    steps += tsld.train(student, tokens, config, teacher)
assert 0 < tsld.evaluate(student, tokens, 8) < 9

tsld.save_model("student.packed", tsld.pack_model(student))
ids = tsld.load_model("student.packed").generate(tokens[None, :3], 5)
print(len(steps), ids.shape, tsld.__file__, "data" in sys.modules)
"""


def test_copied_alone_it_trains_packs_saves_loads_and_generates(tmp_path):
    shutil.copy(tsld.__file__, tmp_path)
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"18 torch.Size([1, 8]) {tmp_path / 'tsld.py'} False\n"


# ---- 7. The main command -------------------------------------------------------------

WORDS = "the quick brown fox jumps over the lazy dog and the cat sat on a mat .\n"


def small_preset():
    """The preset `tiny`, so small that it trains within a second."""
    preset = train_small.PRESETS["tiny"]
    return replace(
        preset,
        gpt=GPTConfig(block_size=16, vocab_size=2048, n_layer=1, n_head=2, n_embd=16),
        teacher=replace(preset.teacher, steps=40, batch_size=4, lr=0.03),
        student=replace(preset.student, steps=10, batch_size=4, lr=0.01),
    )


class Run(NamedTuple):
    code: int
    out: Path  # its folder
    printed: str
    results: list


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The main command on a small text: run(*flags, out=None) -> Run."""
    data = tmp_path_factory.mktemp("data")
    for part in ("train", "valid", "test"):
        (data / f"{part}.txt").write_text(f"{part} {WORDS * 20}")
    settings = ["--data", str(data), "--device", "cpu", "--dtype", "float32"]

    def run_command(*flags, out=None):
        out = out or tmp_path_factory.mktemp("out")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = train_small.main([*settings, "--out", str(out), *flags])
        file = out / "results.json"
        results = json.loads(file.read_text()) if file.exists() else []
        return Run(code, out, printed.getvalue(), results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_small.PRESETS, "tiny", small_preset())
        yield run_command


@pytest.fixture(scope="module")
def one(run):
    return run()


@pytest.fixture(scope="module")
def all_losses(run):
    return run("--loss", "all", "--granularity", "channel")


def test_a_run_leaves_results_packed_models_and_checkpoints(one):
    (teacher,) = one.out.glob("teacher-tiny-*.pt")
    files = ["report.html", "report.json", "results.json", "rounded.packed"]
    files += ["student-tsld.packed", "student-tsld.pt", teacher.name]
    assert sorted(os.listdir(one.out)) == files


def test_results_json_says_what_was_run_and_what_came_out(one, all_losses):
    fields = "loss bits granularity seed teacher_seed gt_weight model data tokenizer "
    fields += "task train_seconds tokens_per_second bytes_fp32 linear_bytes_fp32 "
    fields += "bytes_packed linear_bytes_packed teacher_ppl teacher_bpb ptq_ppl "
    fields += "ptq_bpb student_ppl student_bpb test_teacher_ppl test_teacher_bpb "
    fields += "test_ptq_ppl test_ptq_bpb test_student_ppl test_student_bpb"
    for row in one.results + all_losses.results:
        assert row.keys() == set(fields.split())
        assert (row["model"], row["tokenizer"], row["bits"]) == ("tiny", "bpe2048", 2)
        assert row["linear_bytes_fp32"] == 16 * row["linear_bytes_packed"] == 4 * 3072


def test_all_losses_are_compared_in_pairs_with_and_without_labels(all_losses):
    pairs = [(row["loss"], row["gt_weight"]) for row in all_losses.results]
    logit, tsld_alone = ("logit", 0.0), ("tsld", 0.0)
    assert pairs[:3] == [("gt", None), logit, ("logit", 0.25)]
    assert pairs[3:] == [("l2l", None), ("logit_gt", None), tsld_alone, ("tsld", 0.25)]
    assert len(list(all_losses.out.glob("student-*.packed"))) == 7


def test_the_table_says_how_much_of_the_cost_of_rounding_was_won_back(all_losses):
    line = r"^(.{26}) +([\d,.]+) +([\d.]+) +[\d,.]+ +[\d.]+ +(-?\d+%)? +([\d,]+)$"
    lines = re.findall(line, all_losses.printed, re.M)
    names = ["teacher", "rounded to 2 bits", "gt", "logit", "logit + 0.25 gt", "l2l"]
    names += ["logit_gt", "tsld (τ = 20)", "tsld (τ = 20) + 0.25 gt"]
    assert [words[0].strip() for words in lines] == names

    for (_, *words), row in zip(lines[2:], all_losses.results, strict=True):
        cost = row["ptq_bpb"] - row["teacher_bpb"]
        won_back = (row["ptq_bpb"] - row["student_bpb"]) / cost
        scores = [f"{row['student_ppl']:,.2f}", f"{row['student_bpb']:.4f}"]
        assert words == [*scores, f"{won_back:.0%}", f"{row['bytes_packed']:,}"]


def test_a_run_says_what_follows_and_shows_texts_and_weights(one, all_losses):
    printed = " ".join(one.printed.split())
    for words in (
        "model: 36,336 parameters, 1 layers x 16, 8% of them in matrices",
        "The ternary matrices take 768 bytes, 16 times less than in FP32.",
        "On the validation text the student's perplexity is lower than its teacher's",
        "How much TSLD (τ = 20) lets each token count, on average 1: 'id' ",
        "The validation text begins: valid the quick brown fo",
        *(f"{name} goes on:" for name in ("teacher", "rounded", "tsld")),
    ):
        assert words in printed
    assert all_losses.printed.count("Token scale, with") == 2


def test_the_next_command_writes_more_text_with_the_student(one, capsys):
    command = re.search("^more text: (.*)$", one.printed, re.M)[1]
    _, program, *flags = shlex.split(command)
    file = str(one.out / "student-tsld.packed")
    assert Path(program).resolve() == HERE / "train_small.py"
    assert flags == ["--generate", file, "--prompt", "valid the quick brown"]

    assert train_small.main([*flags, "--seed", "7", "--device", "cpu"]) == 0
    student, tokenizer = train_small.load_student(file, train_small.PRESETS)
    ids = torch.tensor([tokenizer.encode_ordinary(flags[-1])])
    torch.manual_seed(7)
    ids = student.generate(ids, 16 - ids.shape[1], temperature=0.8, top_k=200)
    assert capsys.readouterr().out == tokenizer.decode(ids[0].tolist()) + "\n"


def test_scores_are_those_of_the_packed_model(one):
    (row,) = one.results
    file = one.out / "student-tsld.packed"
    student, tokenizer = train_small.load_student(file, train_small.PRESETS)
    ids = torch.tensor(tokenizer.encode_ordinary(f"valid {WORDS * 20}"))
    nats = tsld.evaluate(student, ids, 16)
    assert row["student_ppl"] == pytest.approx(math.exp(nats), rel=2e-3)


def test_teacher_and_students_have_seeds_of_their_own(run, one):
    (first,) = one.results
    (student,) = run("--seed", "1").results
    (teacher,) = run("--teacher-seed", "1").results
    assert student["teacher_ppl"] == first["teacher_ppl"]
    assert student["student_ppl"] != first["student_ppl"]
    assert teacher["teacher_ppl"] != first["teacher_ppl"]


def test_a_teacher_is_trained_once_for_all_students_that_it_fits(run, tmp_path):
    found = []
    for flags in ("--seed=0", "--seed=1 --lr=1e-4 --bits=4", "--teacher-seed=1"):
        last = run("--loss=gt", *flags.split(), out=tmp_path)
        found.append("found there" in last.printed)
    assert found == [False, True, False]
    assert len(list(tmp_path.glob("teacher-*.pt"))) == 2


def test_a_run_that_is_cut_off_and_resumed_ends_the_same(run, one, tmp_path):
    save = train_small.resumable.save_checkpoint

    def cut_off(path, identity, model, optimizer, step, *others):
        if "student" in path.name and step == 4:
            raise KeyboardInterrupt
        save(path, identity, model, optimizer, step, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_small.resumable, "CHECKPOINT_SECONDS", 0)
        patch.setattr(train_small.resumable, "save_checkpoint", cut_off)
        assert run(out=tmp_path).code == 130
    assert not (tmp_path / "student-tsld.packed").exists()

    resumed = run("--resume", out=tmp_path)
    students = [tsld.load_model(r.out / "student-tsld.packed") for r in (one, resumed)]
    assert_same(*students)
