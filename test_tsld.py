"""The specification of tsld.py, train_small.py and data/, as tests. Each states one fact and checks
it against an oracle that a reader can trust without them: float64 NumPy by hand, a closed form,
brute force, or another library.

    1. Losses
    2. Quantizers
    3. GPT
    4. Training and evaluation
    5. Packing
    6. The same at less cost
    7. Other model families, of transformers
    8. The evidence
    9. Checkpoints
    10. Data and vocabulary
    11. The run
    12. What bad input gets
"""

import collections
import concurrent.futures
import copy
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before transformers is imported: nothing here may use a network
)

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train_small
import tsld
from data import exchange, files, progress, tasks, texts
from data.evidence import accuracy, baselines, bench, figures, llama, regimes, table, vocabulary
from tsld import GPT, GPTConfig, QuantLinear, TrainConfig

torch.set_num_threads(1)  # the tensors here are tiny: two threads would only wait for one another


HERE = Path(__file__).parent
MICRO = GPTConfig(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_embd=12)


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def micro_gpt(seed=0, **changes):
    """A tiny GPT whose parameters, biases and norms included, are all well away from their initial
    values."""
    torch.manual_seed(seed)
    model = GPT(replace(MICRO, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def micro_ids(B=2, T=8, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(MICRO.vocab_size, size=(B, T)))


def softmax64(logits):
    """float64 softmax over the last axis."""
    z = np.asarray(logits, np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


class Payload:
    """What a malicious pickle holds: loading it with its code makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


# --------------------------------------------------------------------------------------------------
# 1. Losses


def example(B=3, T=5, V=7, seed=0, dtype=torch.float32):
    student, teacher = (
        2 * randn(B, T, V, seed=seed).to(dtype),
        2 * randn(B, T, V, seed=seed + 1).to(dtype),
    )
    targets = torch.from_numpy(np.random.default_rng(seed).integers(V, size=(B, T)))
    return student, teacher, targets


def terms64(student, teacher, targets):
    """The three terms by their definitions, one token at a time."""
    ps, pt = softmax64(student.detach().double()), softmax64(teacher.detach().double())
    out = np.zeros((3, *targets.shape))
    for b, n in np.ndindex(*targets.shape):
        y = targets[b, n].item()
        out[0, b, n] = -math.log(ps[b, n, y])
        out[1, b, n] = -math.log(pt[b, n, y])
        out[2, b, n] = -sum(pt[b, n, i] * math.log(ps[b, n, i]) for i in range(ps.shape[-1]))
    return out


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 2), (2, 1, 50), (1, 9, 3)])
def test_terms_are_the_two_cross_entropies_and_the_soft_one(shape):
    student, teacher, targets = example(*shape)
    terms = tsld.per_token_terms(student, teacher, targets)
    for got, expected in zip(terms[:3], terms64(student, teacher, targets)):
        assert got.shape == shape[:2]
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert terms.layers == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_terms_are_float32_whatever_the_logits_were(dtype):
    student, teacher, targets = example(dtype=dtype)
    terms = tsld.per_token_terms(student, teacher, targets)
    assert all(term.dtype == torch.float32 for term in terms[:3])
    np.testing.assert_allclose(
        torch.stack(terms[:3]), terms64(student, teacher, targets), rtol=2e-6, atol=2e-6
    )


SHAPES_THAT_DO_NOT_FIT = [  # of student, teacher and targets; many of them would broadcast
    *[((2, 3), (2, 3), (2, 2)), ((2, 3), (2, 3), (1, 3)), ((2, 3), (1, 3), (2, 3))],
    *[((1, 3), (2, 3), (2, 3)), ((2, 3), (2, 4), (2, 3)), ((2, 4), (2, 4), (2, 3))],
    ((3, 2), (3, 2), (2, 3)),
]


@pytest.mark.parametrize("shapes", SHAPES_THAT_DO_NOT_FIT)
def test_logits_of_other_tokens_than_the_targets_are_refused(shapes):
    student, teacher, targets = (torch.zeros(shape, dtype=torch.long) for shape in shapes)
    logits = (F.one_hot(ids, 5).float() for ids in (student, teacher))
    with pytest.raises(ValueError, match="not of targets"):
        tsld.per_token_terms(*logits, targets)


@pytest.mark.parametrize("shapes", SHAPES_THAT_DO_NOT_FIT)
@pytest.mark.parametrize("name", ["gt", "logit"])
def test_hidden_states_of_other_tokens_than_the_targets_are_refused(name, shapes):
    student, teacher, targets = (torch.zeros(shape, dtype=torch.long) for shape in shapes)
    student, teacher = (F.one_hot(ids, 5).float() for ids in (student, teacher))
    if name == "gt":
        teacher = None
    if student.shape[:2] == targets.shape and teacher is None:
        return
    with pytest.raises(ValueError, match="not of targets"):
        tsld.lean_loss(name, student, torch.eye(5), teacher, torch.eye(5), targets)


def test_a_teacher_of_another_vocabulary_is_refused():
    hidden, targets = randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    for size in (1, 4, 6):
        with pytest.raises(ValueError, match="not of targets"):
            tsld.lean_loss("tsld", hidden, torch.eye(5), hidden, torch.eye(6)[:size, :5], targets)
    with pytest.raises(ValueError, match="not of targets"):
        next(tsld.train(micro_gpt(), TEXT, BRIEF, micro_gpt(vocab_size=99)))


def test_terms_stay_finite_for_logits_of_any_size():
    student, teacher, targets = example()
    terms = tsld.per_token_terms(student * 1e4, teacher * 1e4, targets)
    assert all(torch.isfinite(term).all() for term in terms[:3])


def loss64(name, terms, layers=0.0, temperature=10.0, gt_weight=0.0):
    """The five losses from float64 terms (3, B, T), one sequence at a time."""
    ce_student, ce_teacher, kd = terms
    if name == "tsld":
        total = 0.0
        for sequence in range(len(kd)):
            weights = [math.exp(ce / temperature) for ce in ce_teacher[sequence]]
            total += sum(w / sum(weights) * k for w, k in zip(weights, kd[sequence]))
        return total / len(kd) + gt_weight * ce_student.mean()
    parts = {"gt": (ce_student,), "logit": (kd,), "l2l": (kd,), "logit_gt": (kd, ce_student)}[name]
    return sum(part.mean() for part in parts) + (layers if name == "l2l" else 0.0)


@pytest.mark.parametrize("name", tsld.LOSSES)
@pytest.mark.parametrize("temperature, gt_weight", [(10.0, 0.0), (1.0, 0.5)])
def test_each_loss_is_its_formula(name, temperature, gt_weight):
    student, teacher, targets = example()
    terms = tsld.per_token_terms(student, teacher, targets)._replace(layers=torch.tensor(0.25))
    expected = loss64(name, terms64(student, teacher, targets), 0.25, temperature, gt_weight)
    got = tsld.distillation_loss(name, terms, temperature, gt_weight)
    assert got.shape == () and got.item() == pytest.approx(expected, rel=1e-6)
    if name == "tsld":
        assert tsld.tsld_loss(terms, temperature, gt_weight).item() == pytest.approx(
            expected, rel=1e-6
        )


def test_the_defaults_are_the_papers():
    student, teacher, targets = example()
    terms = tsld.per_token_terms(student, teacher, targets)
    expected = loss64("tsld", terms64(student, teacher, targets), temperature=10.0, gt_weight=0.0)
    assert tsld.distillation_loss("tsld", terms).item() == pytest.approx(expected, rel=1e-6)
    assert tsld.tsld_loss(terms).item() == pytest.approx(expected, rel=1e-6)
    scale = np.exp(terms.ce_teacher.double().numpy() / 10)
    np.testing.assert_allclose(
        tsld.token_scale(terms.ce_teacher), scale / scale.sum(1, keepdims=True), rtol=1e-6
    )


def test_temperature_1_is_the_printed_formula():
    student, teacher, targets = example()
    ps, pt, y = softmax64(student), softmax64(teacher), np.eye(7)[targets.numpy()]
    inner = -np.sum(y * np.log(pt), axis=-1)  # -Σ_i y_ni log P^T_ni
    expected = np.sum(softmax64(inner) * np.sum(-pt * np.log(ps), axis=-1), axis=1).mean()
    terms = tsld.per_token_terms(student, teacher, targets)
    assert tsld.tsld_loss(terms, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)


def test_infinite_temperature_is_plain_logit_distillation():
    terms = tsld.per_token_terms(*example())
    assert torch.equal(tsld.token_scale(terms.ce_teacher, math.inf), torch.full((3, 5), 1 / 5))
    assert tsld.tsld_loss(terms, math.inf).item() == pytest.approx(
        terms.kd.double().mean().item(), rel=1e-6
    )


def test_token_scale_is_a_softmax_over_each_sequence_that_grows_with_the_teachers_doubt():
    ce = randn(4, 6).abs() * 5
    scale = tsld.token_scale(ce, 2.0)
    np.testing.assert_allclose(scale.sum(1), 1, rtol=1e-6)
    for row, weights in zip(
        ce.double().numpy(), scale.numpy()
    ):  # over its own sequence, whatever the others are
        np.testing.assert_allclose(weights, softmax64(row / 2.0), rtol=1e-6)
        assert (np.argsort(row) == np.argsort(weights)).all()
    assert tsld.token_scale(torch.tensor([[123.0]])).item() == 1.0
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            tsld.token_scale(ce, temperature)


def test_the_four_lines_of_the_readme_are_the_loss():
    student, teacher, targets = example()
    names = {"F": F, "student_logits": student, "teacher_logits": teacher, "targets": targets}
    names["temperature"] = 10.0
    exec((HERE / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    expected = loss64("tsld", terms64(student, teacher, targets))
    assert names["loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 10.0, math.inf])
def test_gradient_of_tsld_is_scale_times_difference_of_distributions(temperature):
    student, teacher, targets = example()
    student.requires_grad_(), teacher.requires_grad_()
    tsld.tsld_loss(tsld.per_token_terms(student, teacher, targets), temperature).backward()
    scale = softmax64(terms64(student, teacher, targets)[1] / temperature)
    expected = (
        scale[..., None]
        * (softmax64(student.detach()) - softmax64(teacher.detach()))
        / len(student)
    )
    np.testing.assert_allclose(student.grad, expected, rtol=1e-5, atol=1e-8)
    assert teacher.grad is None


def traces(requires_grad=False):
    def one(seed):
        states = [randn(2, 4, 6, seed=seed + i).requires_grad_(requires_grad) for i in range(3)]
        scores = [
            randn(2, 3, 4, 4, seed=seed + 5 + i).requires_grad_(requires_grad) for i in range(2)
        ]
        return tsld.Trace(randn(2, 4, 9, seed=seed), states, scores)

    return one(0), one(100)


def test_layer_to_layer_loss_is_mse_of_states_and_of_causal_scores():
    student, teacher = traces()
    expected = 0.0
    for s, t in zip(student.hidden_states, teacher.hidden_states):
        expected += ((s.double() - t.double()) ** 2).mean().item()
    for s, t in zip(student.attention_scores, teacher.attention_scores):
        squares = [
            (s[b, h, n, m].double() - t[b, h, n, m].double()).item() ** 2
            for b in range(2)
            for h in range(3)
            for n in range(4)
            for m in range(n + 1)  # the T (T + 1) / 2 positions that attention sees
        ]
        assert len(squares) == 2 * 3 * 10
        expected += np.mean(squares)
    assert tsld.layer_to_layer_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_no_gradient_reaches_the_teachers_layers():
    student, teacher = traces(requires_grad=True)
    tsld.layer_to_layer_loss(student, teacher).backward()
    assert all(x.grad is not None for x in (*student.hidden_states, *student.attention_scores))
    assert all(x.grad is None for x in (*teacher.hidden_states, *teacher.attention_scores))


LEAN_SHAPES = [(3, 5, 4, 7), (1, 1, 2, 2), (2, 8, 3, 11)]  # B, T, C, V


def lean_example(B, T, C, V, tied, seed=0):
    """hidden and head of a student, of a teacher; targets. tied: the student's hidden depends on
    its head."""
    head = randn(V, C, seed=seed).requires_grad_()
    inner = randn(B, T, C, seed=seed + 1).requires_grad_()
    targets = torch.from_numpy(np.random.default_rng(seed).integers(V, size=(B, T)))
    hidden = inner + head[targets.flip(0)] if tied else inner * 1
    teacher = (
        randn(B, T, C, seed=seed + 2).requires_grad_(),
        randn(V, C, seed=seed + 3).requires_grad_(),
    )
    return (hidden, head), teacher, targets, inner


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="gt, logit, l2l, logit_gt, tsld"):
        tsld.distillation_loss("mse", tsld.per_token_terms(*example()))
    student, teacher, targets, _ = lean_example(1, 2, 3, 4, tied=False)
    for name in ("mse", "l2l"):
        with pytest.raises(
            ValueError, match=f"gt, logit, l2l, logit_gt, tsld but l2l, not '{name}'"
        ):
            tsld.lean_loss(name, *student, *teacher, targets)


# --------------------------------------------------------------------------------------------------
# 2. Quantizers


def groups64(weight, granularity):
    """The float64 weights that share a scale, one list per group."""
    w = weight.double().numpy()
    return [w.ravel()] if granularity == "tensor" else list(w)


WEIGHTS = {
    "normal": randn(7, 5),
    "one row": randn(1, 9),
    "one weight": torch.tensor([[-0.3]]),
    "a zero row": torch.cat([randn(3, 6), torch.zeros(1, 6)]),
    "all zero": torch.zeros(3, 4),
    "constant": torch.full((2, 6), 0.7),
    "all positive": randn(4, 6).abs() + 0.1,
    "all negative": -randn(4, 6).abs() - 0.1,
    "bfloat16": randn(6, 10).bfloat16(),
    "float64": randn(6, 10).double(),
    "transposed": randn(5, 8).t(),
    "strided": randn(6, 12)[:, ::2],
}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_ternarize_is_the_twn_formula(kind, granularity):
    weight = WEIGHTS[kind]
    codes, scale = tsld.ternarize(weight, granularity)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scale.dtype == torch.float32 and scale.shape == (
        (1, 1) if granularity == "tensor" else (len(weight), 1)
    )
    got = (scale * codes).reshape(len(scale), -1).double().numpy()
    for group, values, alpha in zip(groups64(weight, granularity), got, scale):
        threshold = 0.7 * np.abs(group).mean()
        kept = np.abs(group) > threshold
        expected_alpha = np.abs(group[kept]).mean() if kept.any() else 0.0
        assert alpha.item() == pytest.approx(expected_alpha, rel=1e-6, abs=0)
        np.testing.assert_allclose(values, expected_alpha * np.sign(group) * kept, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_quantize_int4_is_asymmetric_rounding_over_a_range_with_zero(kind, granularity):
    weight = WEIGHTS[kind]
    codes, scale, zero_point = tsld.quantize_int4(weight, granularity)
    shape = (1, 1) if granularity == "tensor" else (len(weight), 1)
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape and codes.max() <= 15
    assert scale.dtype == torch.float32 and scale.shape == zero_point.shape == shape
    assert not zero_point.is_floating_point() and 0 <= zero_point.min() and zero_point.max() <= 15
    all_codes = codes.reshape(len(scale), -1).double().numpy()
    for group, code, s, z in zip(
        groups64(weight, granularity), all_codes, scale.numpy(), zero_point.numpy()
    ):
        low, high = min(group.min(), 0.0), max(group.max(), 0.0)
        step = (high - low) / 15
        assert s[0] == pytest.approx(step, rel=1e-6, abs=0)
        if step == 0:
            np.testing.assert_array_equal(s[0] * (code - z[0]), 0.0)
            continue
        assert z[0] == np.round(-low / step)
        expected = np.clip(np.round(group / step) + z[0], 0, 15)
        np.testing.assert_array_equal(code, expected)
        clipped = step * abs(
            -low / step - z[0]
        )  # rounding the zero point shifts the range by up to half a step
        assert np.abs(step * (code - z[0]) - group).max() <= step / 2 + clipped + 1e-6 * step


def test_int4_keeps_weights_of_one_sign_unclipped():
    weight = torch.linspace(1.0, 4.0, 31)[None]
    for sign in (1, -1):
        error = tsld.fake_quantize(sign * weight, bits=4) - sign * weight
        assert error.abs().max() <= 4.0 / 15 / 2 + 1e-6


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_is_exactly_the_dequantized_value_forward_and_the_identity_backward(
    bits, granularity, dtype
):
    weight = (randn(6, 9) * 3).to(dtype).requires_grad_()
    quantized = tsld.fake_quantize(weight, bits, granularity)
    if bits == 2:
        codes, scale = tsld.ternarize(weight, granularity)
        expected = scale * codes
    else:
        codes, scale, zero_point = tsld.quantize_int4(weight, granularity)
        expected = scale * (codes.int() - zero_point.int())
    assert quantized.dtype == dtype
    assert torch.equal(quantized, expected.to(dtype))
    upstream = randn(6, 9, seed=1).to(dtype)
    quantized.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_quant_linear_computes_with_the_quantized_weight_and_the_exact_bias():
    layer = QuantLinear(6, 4, bits=2, granularity="channel")
    x = randn(2, 3, 6)
    w = layer.weight.detach().double().numpy()
    kept = np.abs(w) > 0.7 * np.abs(w).mean(1, keepdims=True)
    alpha = (np.abs(w) * kept).sum(1, keepdims=True) / kept.sum(1, keepdims=True)
    expected = (
        x.double().numpy() @ (alpha * np.sign(w) * kept).T + layer.bias.detach().double().numpy()
    )
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (1, 1, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_quant_linear_is_the_product_with_the_fake_quantized_weight_forward_and_backward(
    bits, bias, leading
):
    layer, x = QuantLinear(7, 4, bias=bias, bits=bits), randn(*leading, 7).requires_grad_()
    leaves = [x, *layer.parameters()]
    y, upstream = layer(x), randn(*leading, 4, seed=1)
    ours = torch.autograd.grad(y, leaves, upstream)
    expected = nn.functional.linear(x, tsld.fake_quantize(layer.weight, bits), layer.bias)
    assert torch.equal(y, expected)
    for gradient, exact in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(gradient, exact)


def test_unknown_bits_and_granularity_are_refused():
    with pytest.raises(ValueError, match="bits"):
        tsld.fake_quantize(randn(2, 2), bits=3)
    with pytest.raises(ValueError, match="bits"):
        QuantLinear(2, 2, bits=3)(randn(2))
    for function in (tsld.ternarize, tsld.quantize_int4, tsld.fake_quantize):
        with pytest.raises(ValueError, match="granularity"):
            function(randn(2, 2), granularity="row")
    model = micro_gpt()
    with pytest.raises(ValueError, match="bits"):
        tsld.quantize_model(model, bits=8)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_quantize_model_replaces_the_blocks_linear_layers_and_nothing_else():
    model = micro_gpt()
    before = dict(model.named_parameters())
    assert tsld.quantize_model(model, bits=4, granularity="channel") is model
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    per_block = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert layers == {f"h.{i}.{name}" for i in range(2) for name in per_block}
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.wte.weight
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert not model.h[0].attn.c_attn.training and model.h[0].attn.c_attn.bits == 4
    assert model.h[0].attn.c_attn.granularity == "channel"


class Conv1D(nn.Module):
    """Shaped like the class of that name in transformers: the weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(randn(nx, nf)), nn.Parameter(randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_quantize_model_knows_conv1d_and_shared_layers():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": Conv1D(5, 3), "b": shared, "c": shared})
    weight, x = model["a"].weight.detach(), randn(2, 3)
    expected = x @ tsld.fake_quantize(weight.t().contiguous()).t() + model["a"].bias
    tsld.quantize_model(model)
    assert all(isinstance(layer, QuantLinear) for layer in model.values())
    torch.testing.assert_close(model["a"](x), expected)
    assert model["b"].weight is shared.weight and model["c"].weight is shared.weight


class Declared(nn.Module):
    """Says itself which layer its head is, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(3, 3), nn.Linear(3, 9)

    def get_output_embeddings(self):
        return self.out


def test_quantize_model_spares_the_output_head_however_it_is_known():
    tied = nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 3),
            "body": nn.Linear(3, 3),
            "logits": nn.Linear(3, 9, bias=False),
        }
    )
    tied["logits"].weight = tied["embed"].weight
    named = nn.ModuleDict(
        {"body": nn.Linear(3, 3), "head": nn.Linear(3, 9), "lm_head": nn.Linear(3, 9)}
    )
    undeclared = copy.deepcopy(tied)
    undeclared.get_output_embeddings = lambda: None  # transformers' base class says so
    for model, spared in (
        (tied, {"logits"}),
        (undeclared, {"logits"}),
        (named, {"head", "lm_head"}),
        (Declared(), {"out"}),
    ):
        tsld.quantize_model(model)
        linear = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        assert {
            name for name, module in linear.items() if not isinstance(module, QuantLinear)
        } == spared


def test_quantize_model_refuses_a_model_without_layers_that_it_could_replace():
    attention = nn.TransformerEncoderLayer(4, 2)  # reads its layers' weights and calls none of them
    for model in (nn.ModuleDict({"head": nn.Linear(2, 2)}), nn.Linear(2, 2), attention):
        with pytest.raises(ValueError, match=f"{type(model).__name__} holds no linear layer"):
            tsld.quantize_model(model)
    assert type(attention.linear1) is nn.Linear


def test_a_class_of_the_name_conv1d_that_is_not_transformers_stays():
    class Conv1D(nn.Conv1d):
        pass

    model = tsld.quantize_model(nn.ModuleDict({"a": Conv1D(2, 2, 1), "b": nn.Linear(2, 2)}))
    assert type(model["a"]) is Conv1D and type(model["b"]) is QuantLinear


# --------------------------------------------------------------------------------------------------
# 3. GPT


def gpt64(model, ids):
    """GPT-2 in float64 NumPy, one sequence and one head at a time: logits, hidden states, attention
    scores."""
    p = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    config = model.config

    def norm(x, name):
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return z * p[name + ".weight"] + p[name + ".bias"]

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    logits, states, scores = [], [], []
    for row in ids.numpy():
        x = p["wte.weight"][row] + p["wpe.weight"][: len(row)]
        states.append([x])
        scores.append([])
        for layer in range(config.n_layer):
            q, k, v = np.split(
                linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn"), 3, axis=-1
            )
            size, heads, of_layer = config.n_embd // config.n_head, [], []
            for head in range(config.n_head):
                part = slice(head * size, (head + 1) * size)
                score = q[:, part] @ k[:, part].T / math.sqrt(size)
                of_layer.append(score)
                masked = np.where(np.tri(len(row), dtype=bool), score, -np.inf)
                heads.append(softmax64(masked) @ v[:, part])
            scores[-1].append(of_layer)
            x = x + linear(np.concatenate(heads, -1), f"h.{layer}.attn.c_proj")
            x = x + linear(
                gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")),
                f"h.{layer}.mlp.c_proj",
            )
            states[-1].append(x)
        logits.append(norm(x, "ln_f") @ p["wte.weight"].T)
    return np.array(logits), np.array(states).swapaxes(0, 1), np.array(scores).swapaxes(0, 1)


@pytest.mark.parametrize("T", [1, 5, 8])
def test_gpt_is_gpt2(T):
    model, ids = micro_gpt(), micro_ids(T=T)
    logits, states, scores = gpt64(model, ids)
    np.testing.assert_allclose(model(ids).detach().numpy(), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        (model.hidden(ids) @ model.wte.weight.T).detach().numpy(), logits, rtol=1e-4, atol=1e-4
    )
    trace = model(ids, trace=True)
    np.testing.assert_allclose(trace.logits.detach().numpy(), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        torch.stack(trace.hidden_states).detach().numpy(), states, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        torch.stack(trace.attention_scores).detach().numpy(), scores, rtol=1e-4, atol=1e-4
    )


def test_default_config_is_gpt2_small():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert (
        sum(
            m.weight.numel()
            for m in tsld.quantize_model(model).modules()
            if isinstance(m, QuantLinear)
        )
        == 84_934_656
    )


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=3, n_head=2, n_embd=96))
    for name, p in model.named_parameters():
        if "ln_" in name:
            assert torch.all(p == (1.0 if name.endswith("weight") else 0.0))
        elif name.endswith("bias"):
            assert torch.all(p == 0)
        else:
            expected = 0.02 / math.sqrt(2 * 3) if "c_proj" in name else 0.02
            assert (
                p.std().item() == pytest.approx(expected, rel=0.05)
                and abs(p.mean().item()) < 0.1 * expected
            )


def test_a_sequence_longer_than_the_block_and_an_uneven_head_are_refused():
    with pytest.raises(ValueError, match="block_size 8"):
        micro_gpt()(micro_ids(T=9))
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        GPT(replace(MICRO, n_head=5))


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    model, ids = micro_gpt(dropout=0.5), micro_ids()
    assert torch.equal(model(ids), model(ids))
    model.train()
    for trace in (False, True):  # the fused and the explicit attention
        outputs = [model(ids, trace=True).logits if trace else model(ids) for _ in range(2)]
        assert not torch.equal(*outputs)
    attention, x = model.h[0].attn, randn(1, 8, 12)
    attention.c_proj = (
        nn.Identity()
    )  # leaves the dropout on probabilities, and the one on the output
    expected, _ = attention.eval()(x)
    for trace in (False, True):
        mean = attention.train()(x.expand(20_000, -1, -1), trace=trace)[0].mean(0)
        assert (mean - expected).abs().max() < 0.15 * expected.abs().max()
    mlp, x = model.h[0].mlp.train(), randn(1, 12)
    mean = mlp(x.expand(20_000, -1)).mean(0)
    torch.testing.assert_close(mean, mlp.eval()(x)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("product", ["in C", "in PyTorch"], indirect=True)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("B", [1, 3])
def test_token_by_token_with_a_cache_hidden_is_what_it_is_for_the_whole_sequence(
    B, gradient, product
):
    model, ids = micro_gpt().eval(), micro_ids(B=B)
    cache = [torch.zeros(2, B, MICRO.n_head, 8, 6) for _ in range(MICRO.n_layer)]
    with torch.set_grad_enabled(gradient):
        parts = [model.hidden(ids[:, :3], cache)]
        parts += [model.hidden(ids[:, n : n + 1], cache, n) for n in range(3, 8)]
        whole = model.hidden(ids)
    assert all(part.requires_grad == gradient for part in parts)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_the_attention_of_one_token_is_in_c_and_that_of_pytorch(monkeypatch):
    if not tsld.c_library():
        pytest.skip("there is no C compiler")
    for n_head, d, n in ((1, 1, 1), (2, 6, 5), (3, 17, 40), (12, 64, 300)):
        check_attention_in_c(n_head, d, n, monkeypatch)


def check_attention_in_c(n_head, d, n, monkeypatch):
    """The last of n tokens', with scores of all sizes, is as exact as PyTorch's."""
    C = n_head * d
    attention = tsld.Attention(tsld.GPTConfig(n, 8, 1, n_head, C)).eval()
    attention.c_proj = nn.Identity()
    for size in (0.1, 1.0, 30.0, 1e6):  # the largest overflows exp by far
        x, before = randn(1, 1, C), size * randn(2, 1, n_head, n, d, seed=1)
        with torch.inference_mode():
            cache, same = before.clone(), before.clone()
            with monkeypatch.context() as patch:
                patch.setattr(F, "scaled_dot_product_attention", None)  # the other way is not taken
                got, _ = attention(x, cache, n - 1)
            exact, _ = attention.double()(x.double(), same.double(), n - 1)
            attention.float()
            with monkeypatch.context() as patch:
                patch.setattr(tsld, "c_library", lambda: None)
                torchs, _ = attention(x, same, n - 1)
        assert torch.equal(cache, same) and got.shape == (1, 1, C)
        bound = 1e-6 * before.abs().max() + 2 * (torchs - exact).abs().max()
        assert (got - exact).abs().max() <= bound


def test_what_the_attention_in_c_cannot_do_is_left_to_pytorch(monkeypatch):
    """Another dtype, several sequences, scores, dropout, a gradient."""
    attention = tsld.Attention(tsld.GPTConfig(8, 8, 1, 2, 12)).eval()
    monkeypatch.setattr(tsld, "c_library", lambda: pytest.fail("C is called"))
    with torch.no_grad():
        attention.double()(randn(1, 1, 12).double(), torch.zeros(2, 1, 2, 8, 6).double(), 0)
        attention.float()(randn(2, 1, 12), torch.zeros(2, 2, 2, 8, 6), 0)
        attention(randn(1, 1, 12), torch.zeros(2, 1, 2, 8, 6), 0, trace=True)[1].sum()
        attention.train()(randn(1, 1, 12), torch.zeros(2, 1, 2, 8, 6), 0)
    attention.eval()(randn(1, 1, 12), torch.zeros(2, 1, 2, 8, 6), 0)


@pytest.mark.parametrize("T, start", [(1, 8), (9, 0), (2, 3)])
def test_a_cache_without_room_or_begun_in_the_middle_is_refused(T, start):
    attention = tsld.Attention(tsld.GPTConfig(8, 8, 1, 2, 12))
    with pytest.raises(ValueError, match=f"does not take {T} tokens at position {start}"):
        attention(randn(1, T, 12), torch.zeros(2, 1, 2, 8, 6), start)


def test_attention_in_float64_has_the_gradient_of_finite_differences():
    attention = tsld.Attention(tsld.GPTConfig(8, 8, 1, 2, 12)).double()
    x = randn(2, 3, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x)[0], x)


def test_generated_tokens_can_be_trained_on():
    model = micro_gpt().train()
    ids = model.generate(micro_ids(B=1, T=3), 3)
    model(ids).sum().backward()
    assert model.training and model.wte.weight.grad is not None


def test_greedy_generation_is_the_cache_free_argmax():
    model, ids = micro_gpt(), micro_ids(B=3, T=2)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 6, temperature=0), expected)
    assert torch.equal(model.generate(ids, 6, temperature=1.0, top_k=1), expected)
    assert torch.equal(model.generate(ids, 0), ids)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (1.3, 4), (1.0, 100)])
def test_sampling_follows_softmax_of_logits_over_temperature_among_the_top_k(temperature, top_k):
    model, ids, draws = micro_gpt(), micro_ids(B=1, T=3), 20_000
    logits = gpt64(model, ids)[0][0, -1] / temperature
    if top_k is not None and top_k < len(logits):
        logits[np.argsort(logits)[:-top_k]] = -np.inf
    torch.manual_seed(0)
    drawn = model.generate(ids.expand(draws, -1), 1, temperature, top_k)[:, -1]
    frequency = np.bincount(drawn.numpy(), minlength=MICRO.vocab_size) / draws
    np.testing.assert_allclose(frequency, softmax64(logits), atol=4 * 0.5 / math.sqrt(draws))
    assert np.all(frequency[np.isinf(logits)] == 0)


def test_generate_restores_the_mode_and_refuses_what_does_not_fit():
    model = micro_gpt(dropout=0.9).train()
    first = model.generate(micro_ids(T=2), 5, temperature=0)
    assert model.training and torch.equal(first, model.generate(micro_ids(T=2), 5, temperature=0))
    assert not model.eval().generate(micro_ids(T=2), 1).requires_grad and not model.training
    with pytest.raises(ValueError, match="block_size 8"):
        model.generate(micro_ids(T=4), 5)
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        model.generate(micro_ids(T=0), 1)
    with pytest.raises(ValueError, match="-1 new ones"):
        model.generate(micro_ids(T=2), -1)
    for setting in ({"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}):
        with pytest.raises(ValueError, match="temperature -1|temperature nan|top_k 0"):
            model.generate(micro_ids(T=2), 1, **setting)
    columns, ids = [], micro_ids(T=2)
    whole = model.generate(ids, 5, temperature=0, on_token=columns.append)
    assert torch.equal(torch.cat([ids, *columns], 1), whole)


def published(state, prefix):
    """The state of one of our GPTs as the published files have it: linear weights (in, out); the
    causal mask as well; in one of two layouts, bare or with a prefix and the tied head."""
    file, size = {}, state["wpe.weight"].shape[0]
    for name, tensor in state.items():
        if name != "lm_head.weight":
            linear = name.startswith("h.") and tensor.dim() == 2
            file[prefix + name] = tensor.t().clone() if linear else tensor
    for layer in range(MICRO.n_layer):
        file[f"{prefix}h.{layer}.attn.bias"] = torch.ones(size, size).tril()[None, None]
        file[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        file["lm_head.weight"] = state["wte.weight"]
    return file


def write_published(folder, file, n_head=MICRO.n_head, **how):
    torch.save(file, folder / "pytorch_model.bin", **how)
    (folder / "config.json").write_text(json.dumps({"n_head": n_head, "n_layer": 99}))
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_published_weights_are_read_in_both_layouts(prefix, zipped, tmp_path):
    model, ids = micro_gpt(), micro_ids()
    path = write_published(
        tmp_path, published(model.state_dict(), prefix), _use_new_zipfile_serialization=zipped
    )
    for source in (path, tmp_path, str(tmp_path)):
        loaded = GPT.from_pretrained(source)
        assert loaded.config == MICRO and not loaded.training
        assert loaded.lm_head.weight is loaded.wte.weight and loaded.wte.weight.requires_grad
        assert torch.equal(loaded(ids), model(ids))


def test_heads_are_64_wide_where_no_config_says_otherwise(tmp_path):
    for width, heads in ((128, 2), (64, 1)):
        path = write_published(tmp_path, published(micro_gpt(n_embd=width).state_dict(), ""))
        (tmp_path / "config.json").unlink()
        assert GPT.from_pretrained(path).config.n_head == heads
    path = write_published(tmp_path, published(micro_gpt().state_dict(), ""), n_head=5)
    for words in ("does not divide into 5 heads", "does not divide into 0 heads"):
        with pytest.raises(tsld.CheckpointError, match=words):
            GPT.from_pretrained(path)
        (tmp_path / "config.json").unlink(missing_ok=True)
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(tsld.CheckpointError, match="n_head from .*config.json"):
            GPT.from_pretrained(path)


@pytest.mark.parametrize("size", ["tiny", "0.1B"])
@pytest.mark.parametrize("layout", ["bare", "with head"])
def test_logits_are_those_of_transformers_gpt2_from_the_same_file(size, layout, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 101, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**small if size == "tiny" else {})
    ).eval()
    for parameter in theirs.parameters():  # biases and norms as well
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    state = (theirs if layout == "with head" else theirs.transformer).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.n_head == (4 if size == "tiny" else 12)
    ids = torch.randint(theirs.config.vocab_size, (2, 32))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_saved_tokenizer_merges_bytes_as_tiktoken_does(tmp_path):
    tokenizer = train_small.load_tokenizer("bpe2048")
    exchange.save_tokenizer(tokenizer, tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    split, spelled = saved["pre_tokenizer"]["pretokenizers"]
    assert (split["behavior"], spelled["add_prefix_space"]) == ("Isolated", False)
    # GPT-2's letters of the 256 bytes, from the vocabulary: they are its first 256 entries.
    letter = {tokenizer.decode_single_token_bytes(i): i for i in range(2048)}
    by_id = {i: token for token, i in saved["model"]["vocab"].items()}
    letters = {byte: by_id[letter[bytes([byte])]] for byte in range(256)}
    assert [letters[ord(c)] for c in "aZ~ \n"] == ["a", "Z", "~", "\u0120", "\u010a"]
    merges = {tuple(pair.split()): rank for rank, pair in enumerate(saved["model"]["merges"])}
    text, ids = "the company said it wo n't, café 中\n\n  in N", []
    for word in re.findall(split["pattern"]["Regex"], text):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [(merges[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in merges]:
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [saved["model"]["vocab"][part] for part in parts]
    assert ids == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 5e-3)])
def test_an_exported_student_opens_in_transformers_as_the_same_model(
    dtype, tolerance, tiny, capsys, tmp_path
):
    run(tiny, capsys)
    packed, folder = tmp_path / "out" / "student-tsld.packed", tmp_path / "exported"
    word = [] if dtype == "float32" else [dtype]
    assert str(folder) in run(["--export", str(packed), str(folder), *word], capsys)
    student, tokenizer = train_small.load_student(packed)
    for name, tensor in torch.load(folder / "pytorch_model.bin").items():
        assert tensor.dtype == getattr(torch, dtype), name
        if ".c_" in name and tensor.dim() == 2:
            assert tensor.unique().numel() <= 3, name
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    again = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (WORDS, "the quick brown fox wo n't\n\n\t  jump: 1,000 café 中文 🙂 "):
        assert again(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_ordinary(text)
        assert again.decode(tokenizer.encode_ordinary(text)) == text
    ids = torch.tensor([tokenizer.encode_ordinary(WORDS)[:6]])
    exact = student(ids)
    assert (theirs(ids).logits - exact).abs().max() <= tolerance * max(1, exact.abs().max().item())
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if dtype == "float32":
        assert torch.equal(theirs.generate(ids, **asked), student.generate(ids, 8, temperature=0))


@pytest.mark.parametrize("words", [["x"], ["x", "y", "float8"], ["x", "y", "float16", "z"]])
def test_an_export_takes_a_file_a_folder_and_float16(words, capsys):
    refused(["--export", *words], capsys, "--export takes FILE FOLDER")


def test_an_export_is_there_as_a_whole_or_not_at_all(tiny, capsys, tmp_path, monkeypatch):
    packed, folder = tmp_path / "student.packed", tmp_path / "exported"
    model = tsld.quantize_model(GPT(train_small.PRESETS["tiny"].gpt))
    tsld.save_model(packed, tsld.pack_model(model))
    export = ["--export", str(packed), str(folder)]
    unwritable = type("SafetensorError", (Exception,), {"__module__": "safetensors_rust"})
    for error in (OSError(28, "No space left on device"), unwritable("No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "save_tokenizer", mock.Mock(side_effect=error))
            refused(export, capsys, "No space left on device")
            assert not folder.exists()
            folder.mkdir()
            (folder / "pytorch_model.bin").write_text("an earlier one")
            refused(export, capsys, "No space left on device")
        assert [file.read_text() for file in folder.iterdir()] == ["an earlier one"]
        shutil.rmtree(folder)
    run(export, capsys)
    assert {"pytorch_model.bin", "config.json", "tokenizer.json"} < set(os.listdir(folder))
    for flags in ([str(packed), ""], [str(packed), str(folder), "--model", "tiny"]):
        refused(["--export", *flags], capsys, "--export takes FILE FOLDER")
    refused(["--export", str(tmp_path / "nowhere"), str(tmp_path / "new")], capsys, "nowhere")
    assert not (tmp_path / "new").exists()


def test_published_weights_that_are_not_gpt2s_are_refused_by_name(tmp_path):
    good = published(micro_gpt().state_dict(), "")
    without = {name: tensor for name, tensor in good.items() if name != "h.1.ln_2.bias"}
    other = torch.zeros(17, 12)
    for file, words in (
        (without, r'Missing key.*"h\.1\.ln_2\.bias"'),
        (good | {"h.0.extra": other}, r'Unexpected key.*"h\.0\.extra"'),
        (good | {"h.0.mlp.c_fc.bias": torch.zeros(47)}, r"size mismatch for h\.0\.mlp\.c_fc\.bias"),
        (good | {"lm_head.weight": other}, "lm_head.weight is not wte.weight"),
        ({"weight": other}, "KeyError .*wte.weight"),
        ({"wte.weight": 3}, "no GPT-2"),
        ([other], "no GPT-2"),
    ):
        path = write_published(tmp_path, file)
        with pytest.raises(tsld.CheckpointError, match=words):
            GPT.from_pretrained(path)
    with pytest.raises(OSError, match="nowhere"):
        GPT.from_pretrained("nowhere")


@pytest.mark.parametrize("form", ["trained", "quantized", "packed and loaded"])
def test_what_is_saved_in_the_published_format_is_the_model_dequantized(form, tmp_path):
    model, ids = micro_gpt(), micro_ids()
    if form != "trained":
        model = quantized_gpt()
    if form == "packed and loaded":
        tsld.save_model(tmp_path / "model.packed", tsld.pack_model(model))
        model = tsld.load_model(tmp_path / "model.packed")
    model.save_pretrained(tmp_path / "folder")
    again = GPT.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)
    values = len(again.h[1].mlp.c_fc.weight.unique())
    assert values == 3 if form != "trained" else values > 100
    if importlib.util.find_spec("transformers"):
        import transformers

        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder").eval()
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


def test_published_weights_that_are_truncated_or_would_run_code_are_refused_and_run_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    good = published(micro_gpt().state_dict(), "")
    for zipped in (True, False):
        path = write_published(tmp_path, good, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        for length in (0, 1, 100, len(content) // 2, len(content) - 30):
            path.write_bytes(content[:length])
            with pytest.raises(
                tsld.CheckpointError, match="truncated or holds more than plain values"
            ):
                GPT.from_pretrained(path)
        write_published(
            tmp_path, good | {"extra": Payload()}, _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(tsld.CheckpointError, match="holds more than plain values"):
            GPT.from_pretrained(path)
    assert not Path("executed").exists()


# --------------------------------------------------------------------------------------------------
# 4. Training and evaluation


def test_learning_rate_rises_linearly_then_falls_by_a_cosine_to_a_tenth():
    config = TrainConfig(
        steps=201, lr=2.0, warmup=0.05, final_lr=0.1
    )  # 11 steps of warm-up, 190 steps of cosine
    rates = [tsld.learning_rate(step, config) for step in range(201)]
    np.testing.assert_allclose(rates[:11], 2.0 * np.arange(1, 12) / 11)
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(190) / 189))
    np.testing.assert_allclose(rates[11:], 2.0 * cosine)
    assert rates[11] == max(rates) == 2.0 and rates[-1] == pytest.approx(0.2)
    assert tsld.learning_rate(0, TrainConfig(steps=1, lr=2.0)) == 2.0


def test_a_batch_is_pieces_of_the_text_with_targets_one_token_ahead():
    tokens = torch.arange(100, 120)
    ids, targets = tsld.get_batch(tokens, 500, 8, np.random.default_rng(0))
    assert ids.shape == targets.shape == (500, 8) and torch.equal(targets, ids + 1)
    assert torch.equal(ids, ids[:, :1] + torch.arange(8))
    assert set(ids[:, 0].tolist()) == set(range(100, 112))  # every place where 9 tokens fit
    ids, targets = tsld.get_batch(tokens[:9], 3, 8, np.random.default_rng(0))
    assert torch.equal(ids, tokens[:8].expand(3, 8))


TEXT = torch.from_numpy(np.random.default_rng(1).integers(MICRO.vocab_size, size=60))


BRIEF = TrainConfig(loss="tsld", steps=6, batch_size=2, lr=0.01)


def batch_of_step(config, step, model):
    return tsld.get_batch(
        TEXT, config.batch_size, model.config.block_size, np.random.default_rng((config.seed, step))
    )


def train_to_end(student, config, teacher=None, tokens=None, **how):
    """The losses of all steps."""
    return [
        loss
        for _, loss in tsld.train(
            student, TEXT if tokens is None else tokens, config, teacher, **how
        )
    ]


def test_two_training_steps_are_clipped_adamw_by_hand():
    config = TrainConfig(
        loss="gt", steps=2, batch_size=2, lr=0.01, warmup=0.0, clip=0.5, weight_decay=0.3
    )
    trained, by_hand = micro_gpt(), micro_gpt().double()
    train_to_end(trained, config)
    moments = {name: [0.0, 0.0] for name, _ in by_hand.named_parameters()}
    for step, lr in enumerate([0.01, 0.001]):
        ids, targets = batch_of_step(config, step, by_hand)
        by_hand.zero_grad()
        F.cross_entropy(by_hand(ids, trace=True).logits.flatten(0, 1), targets.flatten()).backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in by_hand.parameters()))
        assert norm > 0.5  # so that clipping is seen
        for name, p in by_hand.named_parameters():
            gradient, moment = p.grad * 0.5 / norm, moments[name]
            moment[0] = 0.9 * moment[0] + 0.1 * gradient
            moment[1] = 0.95 * moment[1] + 0.05 * gradient**2
            mean, square = moment[0] / (1 - 0.9 ** (step + 1)), moment[1] / (1 - 0.95 ** (step + 1))
            decay = 0.3 if p.dim() == 2 else 0.0
            p.data = p.data * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)
    for (name, got), expected in zip(trained.named_parameters(), by_hand.parameters()):
        if name.endswith(
            "c_attn.bias"
        ):  # a bias on the keys shifts all scores alike: its gradient is rounding noise
            got, expected = got.view(3, -1)[[0, 2]], expected.view(3, -1)[[0, 2]]
        np.testing.assert_allclose(
            got.detach(), expected.detach(), rtol=1e-3, atol=2e-5, err_msg=name
        )


@pytest.mark.parametrize("name", tsld.LOSSES)
def test_training_loss_is_the_named_loss_of_both_models(name):
    student, teacher = tsld.quantize_model(micro_gpt(1)), micro_gpt(2)
    config = replace(BRIEF, loss=name, temperature=2.0, gt_weight=0.25)
    ids, targets = batch_of_step(config, 0, student)
    with torch.no_grad():
        one, two = student(ids, trace=True), teacher(ids, trace=True)
    layers = sum(
        ((a - b).double() ** 2).mean().item() for a, b in zip(one.hidden_states, two.hidden_states)
    )
    seen = np.tri(8, dtype=bool)
    for a, b in zip(one.attention_scores, two.attention_scores):
        layers += ((a - b).double().numpy()[..., seen] ** 2).mean()
    expected = loss64(name, terms64(one.logits, two.logits, targets), layers, 2.0, 0.25)
    for lean in (False, True) if name != "l2l" else (False,):
        got = tsld.training_loss(student, teacher, ids, targets, config, lean)
        assert got.item() == pytest.approx(expected, rel=1e-5)
    got.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_training_lowers_the_loss_and_leaves_the_teacher_as_it_was():
    teacher = micro_gpt().train()
    teacher.ln_f.weight.data *= 10  # sure of itself, so that there is something to learn
    student = tsld.quantize_model(copy.deepcopy(teacher))
    before, losses = copy.deepcopy(teacher.state_dict()), []
    config = replace(BRIEF, steps=60, batch_size=8)
    for step, loss in tsld.train(student, TEXT, config, teacher):
        assert student.training and not teacher.training
        losses.append((step, loss))
    assert [step for step, _ in losses] == list(range(1, 61))
    assert np.mean([loss for _, loss in losses[-10:]]) < 0.9 * np.mean(
        [loss for _, loss in losses[:10]]
    )
    assert not student.training and not teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_bfloat16_training_multiplies_in_bfloat16_and_keeps_float32_weights():
    model, seen = micro_gpt(), set()
    model.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    for dtype in ("bfloat16", "float32"):
        seen.clear()
        train_to_end(model, TrainConfig(loss="gt", steps=1, batch_size=2, dtype=dtype))
        assert seen == {getattr(torch, dtype)}
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_training_that_goes_on_from_a_step_ends_with_the_very_same_weights():
    whole, parts = (tsld.quantize_model(micro_gpt(1, dropout=0.5)) for _ in range(2))
    teacher = micro_gpt(2)
    losses = train_to_end(whole, BRIEF, teacher)
    optimizer, first = tsld.make_optimizer(parts, BRIEF), []
    for step, loss in tsld.train(parts, TEXT, BRIEF, teacher, optimizer):
        first.append(loss)
        if step == 4:
            break
    assert first + train_to_end(parts, BRIEF, teacher, optimizer=optimizer, start=4) == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


@pytest.mark.parametrize("name", tsld.LOSSES)
def test_a_batch_in_parts_gives_the_same_training(name):
    whole, parts = (tsld.quantize_model(micro_gpt(1)) for _ in range(2))
    config = replace(BRIEF, loss=name, batch_size=6)
    losses = train_to_end(whole, config, micro_gpt(2))
    losses_in_parts = train_to_end(parts, replace(config, accumulate=3), micro_gpt(2))
    np.testing.assert_allclose(losses_in_parts, losses, rtol=1e-5)
    torch.testing.assert_close(parts.wte.weight, whole.wte.weight, rtol=1e-3, atol=1e-4)


def test_what_training_lacks_is_refused_by_name():
    model = micro_gpt()
    for config, tokens, teacher, words in (
        (BRIEF, TEXT, None, "'tsld' needs a teacher"),
        (BRIEF, TEXT[:8], micro_gpt(), "8 tokens are too few for pieces of block_size 8"),
        (
            replace(BRIEF, batch_size=6, accumulate=4),
            TEXT,
            micro_gpt(),
            "batch_size 6 does not divide by 1 · accumulate",
        ),
        (replace(BRIEF, loss="TSLD"), TEXT, None, "no loss 'TSLD'"),
        (replace(BRIEF, dtype="float16"), TEXT, micro_gpt(), "no training in 'float16'"),
    ):
        with pytest.raises(ValueError, match=words):
            next(tsld.train(model, tokens, config, teacher))
    foreign = nn.Linear(2, 2)
    foreign.config = object()
    with pytest.raises(ValueError, match="pieces of block_size None"):
        next(tsld.train(foreign, TEXT, replace(BRIEF, loss="gt")))


def test_a_loss_that_is_not_finite_stops_training_before_it_reaches_the_weights():
    model = micro_gpt()
    config = TrainConfig(loss="gt", steps=9, batch_size=2, lr=1e-3, warmup=0.5)
    with pytest.raises(
        tsld.TrainingDiverged, match=r"loss nan.* at step 4, learning rate 8\.00e-04"
    ):
        for step, _ in tsld.train(model, TEXT, config):
            if step == 3:
                model.ln_f.bias.data[0] = math.nan
    assert torch.isfinite(model.wte.weight).all()


def test_a_gradient_that_was_there_before_does_not_count():
    fresh, stale = (tsld.quantize_model(micro_gpt(1)) for _ in range(2))
    for parameter in stale.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    losses = [train_to_end(model, BRIEF, micro_gpt(2)) for model in (fresh, stale)]
    assert losses[0] == losses[1]
    assert torch.equal(fresh.wte.weight, stale.wte.weight)

    # Nor does that of earlier steps, where the optimizer has a part of the weights alone.
    still, gradients = replace(BRIEF, loss="gt", lr=0.0, clip=math.inf), []
    part = tsld.make_optimizer(fresh.ln_f, still)
    for start in (0, still.steps - 1):
        list(tsld.train(fresh, TEXT, still, optimizer=part, start=start))
        gradients.append(fresh.wte.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_training_before_it_reaches_the_weights(bad):
    model = micro_gpt()
    model.wpe.weight.register_hook(lambda gradient: gradient * bad)  # under a finite loss
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        tsld.TrainingDiverged, match=r"loss \d.*gradient of norm (nan|inf) at step 1"
    ):
        train_to_end(model, TrainConfig(loss="gt", steps=1, batch_size=2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "length, block_size", [(60, 8), (57, 8), (2, 8), (9, 8), (10, 8), (60, 1), (59, 7), (8, 8)]
)
def test_evaluation_predicts_every_token_but_the_first_once_from_its_own_block(length, block_size):
    model = micro_gpt()
    nats = []
    for n in range(length - 1):  # token n + 1, from the block that n stands in
        block = TEXT[n // block_size * block_size : n + 1]
        p = softmax64(model(block[None])[0, -1].detach().double())
        nats.append(-math.log(p[TEXT[n + 1]]))
    assert tsld.evaluate(model, TEXT[:length], block_size) == pytest.approx(np.mean(nats), rel=1e-5)


def test_evaluation_takes_many_blocks_at_a_time_and_objects_with_logits():
    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.dropout = nn.Parameter(torch.zeros(1)), nn.Dropout(0.5)

        def forward(self, ids):
            assert not self.training and not torch.is_grad_enabled()
            return collections.namedtuple("Output", "logits")(
                self.weight.expand(*ids.shape, 5).bfloat16()
            )

    model = Uniform().train()
    assert tsld.evaluate(model, torch.zeros(10_000, dtype=torch.long), 16) == pytest.approx(
        math.log(5), rel=1e-6
    )
    assert model.training
    with pytest.raises(ValueError, match="2 tokens"):
        tsld.evaluate(model, torch.zeros(1, dtype=torch.long), 16)

    class Constant(nn.Module):  # it has no parameters
        def forward(self, ids):
            return torch.zeros(*ids.shape, 17)

    assert tsld.evaluate(Constant(), TEXT[:20], 16) == pytest.approx(math.log(17), rel=1e-6)


def test_the_example_in_the_docstring_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, last = (
        tsld.__doc__.index(words) for words in ("    import copy", "\n\nThe student starts")
    )
    names = {}
    exec(textwrap.dedent(tsld.__doc__[first:last]), names)
    printed = capsys.readouterr().out
    losses = [
        float(line.split()[2]) for line in printed.splitlines() if line.startswith("teacher ")
    ]
    assert len(losses) == 60 and losses[-1] < losses[0] - 1
    assert names["ids"].shape == (1, 9 + 40) and os.listdir(tmp_path) == ["student.packed"]
    assert isinstance(names["student"].h[0].attn.c_attn, tsld.PackedLinear)


def test_bits_per_byte_are_bits_of_all_tokens_over_all_bytes():
    assert tsld.bits_per_byte(math.log(2), 30, 60) == pytest.approx(0.5)
    assert tsld.bits_per_byte(1.0, 8, 1) == pytest.approx(8 / math.log(2))


# --------------------------------------------------------------------------------------------------
# 5. Packing


def random_codes(out_features, in_features, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(-1, 2, size=(out_features, in_features), dtype=np.int8)
    )


SHAPES = [
    (1, 1),
    (1, 4),
    (3, 2),
    (2, 3),
    (5, 5),
    (4, 8),
    (7, 30),
    (16, 31),
    (1, 33),
    (3000, 6),
    (5, 64),
    (40, 61),
    (2, 256),
    (32, 16),
    (96, 16),
    (64, 16),  # the shapes that the product in C takes, from here on
    (192, 48),
    (64, 1040),
    (128, 3072),
]


@pytest.fixture
def product(request, monkeypatch):
    """With the compiled functions, and without them."""
    if request.param == "in PyTorch":
        monkeypatch.setattr(tsld, "c_library", lambda: None)
    elif not tsld.c_library():
        pytest.skip("there is no C compiler")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_unpacking_is_lossless_at_two_bits_a_weight(shape):
    for codes in (
        random_codes(*shape),
        random_codes(*shape[::-1]).t(),
        *(torch.full(shape, c).char() for c in (-1, 0, 1)),
    ):
        packed = tsld.pack_ternary(codes)
        assert packed.dtype == torch.uint8 and packed.shape == (shape[0], math.ceil(shape[1] / 4))
        assert torch.equal(tsld.unpack_ternary(packed, shape[1]), codes)
        assert tsld.unpack_ternary(packed, shape[1]).dtype == torch.int8


@pytest.mark.parametrize(
    "shape, together", [((3, 10), 1), ((64, 10), 1), ((96, 16), 1), ((64, 16), 64), ((192, 46), 64)]
)
def test_a_rows_codes_are_in_order_and_64_rows_stand_side_by_side_4_bytes_of_each(shape, together):
    codes, bits = random_codes(*shape), {0: 0b00, 1: 0b01, -1: 0b11}
    K = math.ceil(shape[1] / 4)
    rows = []  # the bytes of each
    for row in codes.tolist():
        row += [0] * (4 * K - len(row))
        number = sum(bits[code] << 2 * j for j, code in enumerate(row))
        rows.append(number.to_bytes(K, "little"))
    size = K if together == 1 else 4
    expected = [
        rows[begin + r][4 * i : 4 * i + size]
        for begin in range(0, shape[0], together)
        for i in range(K // size)
        for r in range(together)
    ]
    assert tsld.pack_ternary(codes).numpy().tobytes() == b"".join(expected)


@pytest.mark.parametrize("product", ["in C", "in PyTorch"], indirect=True)
def test_the_worked_example_of_pack_ternary(product):
    codes = torch.tensor([[1, 0, -1], [0, 1, 1], [-1, 0, 0]], dtype=torch.int8)
    packed = tsld.pack_ternary(codes)
    assert packed.tolist() == [[49], [20], [3]] == [[0b00110001], [0b00010100], [0b00000011]]
    y = tsld.ternary_matmul(torch.tensor([2.0, 3.0, 5.0]), packed, torch.tensor([[0.5]]))
    assert y.tolist() == [-1.5, 4.0, -1.0]


def test_the_product_in_c_is_the_sum_of_the_x_at_plus_1_minus_that_at_minus_1():
    if not tsld.c_library():
        pytest.skip("there is no C compiler")
    for out_features, in_features in ((64, 16), (128, 64), (64, 1008), (320, 2064)):
        x, codes = randn(in_features), random_codes(out_features, in_features)
        sums = [x[row == 1].double().sum() - x[row == -1].double().sum() for row in codes]
        got = tsld.ternary_matmul(x, tsld.pack_ternary(codes), torch.ones(1, 1))
        assert (got - torch.stack(sums)).abs().max() <= 1e-6 * x.abs().sum()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("product", ["in C", "in PyTorch"], indirect=True)
@pytest.mark.parametrize("leading", [(), (1,), (2,), (1, 1), (3, 5), (0,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ternary_matmul_is_x_times_the_transposed_weight(shape, leading, dtype, tolerance, product):
    codes, x = random_codes(*shape), randn(*leading, shape[1]).to(dtype)
    packed = tsld.pack_ternary(codes)
    for scale in (torch.tensor([[0.3]]), torch.rand(shape[0], 1), torch.zeros(1, 1)):
        y = tsld.ternary_matmul(x, packed, scale)
        assert y.dtype == dtype and y.shape == (*leading, shape[0])
        expected = x.double() @ (scale.double() * codes).t()
        largest = max(1.0, x.double().abs().sum(-1).max().item()) if x.numel() else 1.0
        assert torch.all((y.double() - expected).abs() <= tolerance * largest)


@pytest.mark.parametrize("product", ["in C", "in PyTorch"], indirect=True)
def test_ternary_matmul_takes_tensors_that_are_not_contiguous(product):
    codes, scale = random_codes(64, 16), torch.full((1, 1), 0.5)
    wide, tall = randn(4, 32)[:, ::2], randn(16, 4).t()
    packed = tsld.pack_ternary(codes)
    scattered = torch.stack([packed, packed], dim=2)[..., 0]
    assert not scattered.is_contiguous()
    for x in (wide, tall, wide[:1], tall[1]):
        torch.testing.assert_close(tsld.ternary_matmul(x, packed, scale), x @ (scale * codes).t())
        torch.testing.assert_close(
            tsld.ternary_matmul(x, scattered, scale), x @ (scale * codes).t()
        )


def test_ternary_matmul_accumulates_in_float32():
    packed = tsld.pack_ternary(torch.ones(64, 4096, dtype=torch.int8))
    for rows in (1, 2):  # bfloat16 cannot count beyond 256
        y = tsld.ternary_matmul(
            torch.ones(rows, 4096, dtype=torch.bfloat16), packed, torch.ones(1, 1)
        )
        assert torch.all(y == 4096)


def test_ternary_matmul_refuses_a_width_that_is_not_its_own():
    packed = tsld.pack_ternary(random_codes(3, 8))
    for width in (4, 9, 1):
        with pytest.raises(ValueError, match=f"do not fit {width} inputs"):
            tsld.ternary_matmul(randn(2, width), packed, torch.ones(1, 1))


def test_a_packed_layer_refuses_a_width_that_is_not_its_own():
    layer = tsld.PackedLinear(14, tsld.pack_ternary(random_codes(3, 14)), torch.ones(1, 1))
    for width in (13, 15, 16):  # of as many bytes
        with pytest.raises(ValueError, match=f"{width} inputs, not 14"):
            layer(randn(2, width))


def test_what_the_c_code_cannot_take_is_left_to_pytorch_or_refused():
    packed, scale = tsld.pack_ternary(random_codes(64, 16)), torch.ones(1, 1)
    x, one = randn(1, 16), torch.tensor([7.0])
    y = tsld.ternary_matmul(x, packed, scale, one)  # as F.linear does not, but addition does
    torch.testing.assert_close(y, x @ random_codes(64, 16).float().t() + 7)
    for wrong in (
        lambda: tsld.ternary_matmul(x, packed, scale, torch.ones(3)),
        lambda: tsld.ternary_matmul(x, packed, torch.ones(2, 1)),
        lambda: tsld.ternary_matmul(x, packed.int(), scale),
        lambda: tsld.HalfHead(torch.ones(10, 8).half())(torch.ones(1, 12)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            wrong()


def test_a_loaded_model_made_float32_computes_the_same(tmp_path):
    tsld.save_model(tmp_path / "model.packed", tsld.pack_model(quantized_gpt()))
    model, ids = tsld.load_model(tmp_path / "model.packed"), micro_ids()
    expected, last = model(ids), model(ids[:1, :1])
    torch.testing.assert_close(model.float()(ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids[:1, :1]), last, rtol=1e-5, atol=1e-5)


def test_a_packed_model_has_nothing_to_train():
    packed = tsld.pack_model(quantized_gpt())
    with pytest.raises(ValueError, match="empty parameter list"):
        next(tsld.train(packed, TEXT, replace(BRIEF, loss="gt", block_size=8)))


@pytest.mark.parametrize("shape", [(3, 5), (64, 16)])
def test_the_gradient_passes_a_packed_layer(shape):
    layer = tsld.PackedLinear(
        shape[1], tsld.pack_ternary(random_codes(*shape)), torch.tensor([[0.5]])
    )
    x, upstream = randn(1, shape[1]).requires_grad_(), randn(1, shape[0], seed=1)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ (0.5 * random_codes(*shape)))


@pytest.mark.parametrize("product", ["in C", "in PyTorch"], indirect=True)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (5000, 7)])
def test_the_float16_head_is_the_product_with_its_weight(shape, product):
    weight = (randn(*shape) * torch.logspace(-7, 3, shape[1])).half()  # subnormal ones as well
    weight[0, 0] = 65504.0
    head = tsld.HalfHead(weight)
    for leading in ((), (1, 1), (2, 3)):
        x = randn(*leading, shape[1])
        exact = x.double() @ weight.double().t()
        bound = x.double().abs() @ weight.double().abs().t()
        assert head(x).dtype == torch.float32 and ((head(x) - exact).abs() <= 1e-6 * bound).all()


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "native"])
def test_the_product_in_c_is_right_with_registers_of_every_width(processor, tmp_path, monkeypatch):
    if not tsld.c_library() or platform.machine() != "x86_64":
        pytest.skip("there is no C compiler, or another kind of processor")
    if processor == "x86-64-v3" and "AVX2" not in torch.backends.cpu.get_cpu_capability().replace(
        "AVX512", "AVX2"
    ):
        pytest.skip("the processor has no AVX2")
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec cc "$@" -march={processor}\n')  # the last one counts
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    library = tsld.c_library.__wrapped__()
    assert library is not None
    monkeypatch.setattr(tsld, "c_library", lambda: library)
    monkeypatch.setattr(tsld, "unpack_ternary", None)  # the other way is not taken
    x, codes, bias = randn(1, 2064), random_codes(192, 2064), randn(192)
    for scale in (torch.rand(192, 1), torch.tensor([[0.7]])):
        for b in (None, bias, bias.bfloat16()):
            got = tsld.ternary_matmul(x, tsld.pack_ternary(codes), scale, b)
            exact = x.double() @ (scale.double() * codes).t() + (0.0 if b is None else b.double())
            assert (got - exact).abs().max() <= 1e-6 * x.abs().sum()
    check_attention_in_c(2, 24, 30, monkeypatch)


@pytest.mark.parametrize("compiler", ["cc", "/nowhere/cc", "false", "no folder"])
def test_without_a_compiler_that_works_the_product_is_torchs_and_one_line_says_so(
    compiler, monkeypatch, capsys
):
    if compiler == "cc" and not tsld.c_library():
        pytest.skip("there is no C compiler")
    if compiler == "no folder":  # that a temporary file could be written to
        monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    else:
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(tsld, "c_library", functools.cache(tsld.c_library.__wrapped__))
    x, codes = randn(1, 96), random_codes(64, 96)
    for _ in range(2):
        y = tsld.ternary_matmul(x, tsld.pack_ternary(codes), torch.ones(1, 1))
        torch.testing.assert_close(y, x @ codes.float().t(), rtol=1e-5, atol=1e-5)
    works = compiler == "cc"
    assert (tsld.c_library() is not None) == works
    printed = capsys.readouterr().err
    assert printed.count("tsld: no C (") == printed.count("\n") == (0 if works else 1)


FORK = """
import os, torch, tsld
packed, x = tsld.pack_ternary(torch.ones(64, 4096, dtype=torch.int8)), torch.ones(1, 4096)
tsld.ternary_matmul(x, packed, torch.ones(1, 1))
if os.fork() == 0:
    os._exit(0 if (tsld.ternary_matmul(x, packed, torch.ones(1, 1)) == 4096).all() else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_multiplies_too():
    run = [sys.executable, "-c", FORK]
    assert subprocess.check_output(run, cwd=HERE, timeout=60).strip() == b"0"


def test_the_c_product_is_right_in_many_threads_at_once():
    packed, x = tsld.pack_ternary(random_codes(64, 96)), randn(96)
    expected = random_codes(64, 96).float() @ x
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: tsld.ternary_matmul(x, packed, torch.ones(1, 1)), range(200)):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def quantized_gpt(granularity="tensor", **changes):
    return tsld.quantize_model(micro_gpt(**changes), granularity=granularity)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_packed_model_computes_what_the_quantized_one_did(granularity):
    model, ids = quantized_gpt(granularity), micro_ids()
    expected = model(ids).detach()
    assert tsld.pack_model(model) is model and not model.training
    layers = [m for m in model.modules() if isinstance(m, tsld.PackedLinear)]
    assert len(layers) == 8 and not any(isinstance(m, QuantLinear) for m in model.modules())
    assert (model(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    one_by_one = torch.cat(
        [model(ids[:1, : n + 1])[:, -1:] for n in range(8)], dim=1
    )  # the last row alone
    torch.testing.assert_close(one_by_one, expected[:1], rtol=1e-4, atol=1e-4)
    greedy = model.generate(ids[:, :2], 6, temperature=0)
    assert torch.equal(greedy, quantized_gpt(granularity).generate(ids[:, :2], 6, temperature=0))


def test_only_two_bit_layers_are_packed():
    model = quantized_gpt()
    model.h[1].mlp.c_fc.bits = 4
    tsld.pack_model(model)
    assert isinstance(model.h[1].mlp.c_fc, QuantLinear) and isinstance(
        model.h[1].mlp.c_proj, tsld.PackedLinear
    )
    for model in (micro_gpt(), tsld.quantize_model(micro_gpt(), bits=4)):
        with pytest.raises(ValueError, match="no 2-bit QuantLinear"):
            tsld.pack_model(model)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_saved_and_loaded_model_differs_by_the_float16_of_its_embeddings_alone(
    tmp_path, granularity
):
    model, path = tsld.pack_model(quantized_gpt(granularity)), tmp_path / "model.packed"
    tsld.save_model(path, model)
    loaded = tsld.load_model(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config == model.config
    for embedding in (model.wte, model.wpe):
        embedding.weight.data = embedding.weight.data.half().float()
    ids = micro_ids()
    for x in (ids, ids[:1], ids[:1, :1]):
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert loaded.wte.weight.dtype == torch.float16
    assert torch.equal(
        loaded.generate(ids[:, :2], 6, temperature=0), model.generate(ids[:, :2], 6, temperature=0)
    )
    tsld.save_model(tmp_path / "again.packed", loaded)
    torch.testing.assert_close(tsld.load_model(tmp_path / "again.packed")(ids), loaded(ids))


def test_gpt2_small_takes_at_most_105_megabytes_and_its_ternary_weights_a_sixteenth(tmp_path):
    with torch.device("meta"):
        model = tsld.quantize_model(GPT(GPTConfig()))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.lm_head.weight = model.wte.weight
    tsld.save_model(tmp_path / "gpt2.packed", tsld.pack_model(model))
    assert os.path.getsize(tmp_path / "gpt2.packed") < 105e6
    packed = sum(m.packed.numel() for m in model.modules() if isinstance(m, tsld.PackedLinear))
    assert packed * 16 == 4 * 84_934_656


def test_a_packed_file_fills_a_model_that_is_not_our_gpt(tmp_path):
    def other(tied):
        torch.manual_seed(0)
        layers = {"embed": nn.Embedding(11, 6), "up": nn.Linear(6, 7), "norm": nn.LayerNorm(7)}
        layers["norm"].register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
        layers["norm"].register_buffer("empty", torch.zeros(0))
        layers |= {
            "down": nn.Linear(7, 6, bias=False),
            "conv": Conv1D(6, 6),
            "lm_head": nn.Linear(6, 11, bias=False),
        }
        if tied:
            layers["lm_head"].weight = layers["embed"].weight
        return nn.Sequential(collections.OrderedDict(layers))

    for tied in (True, False):
        source, path = (
            tsld.pack_model(tsld.quantize_model(other(tied))),
            tmp_path / f"{tied}.packed",
        )
        tsld.save_model(path, source)
        ids = torch.arange(11)[None]
        blank = other(tied)
        for parameter in blank.parameters():
            parameter.data.zero_()
        for into in (blank, tsld.quantize_model(other(tied))):
            loaded = tsld.load_model(path, into=into)
            assert loaded is into and not loaded.training
            assert torch.equal(loaded.norm.turns, source.norm.turns)
            torch.testing.assert_close(loaded(ids), source(ids), rtol=1e-2, atol=1e-2)
        with pytest.raises(tsld.CheckpointError, match="needs `into`"):
            tsld.load_model(path)
        wrong = other(tied)
        wrong.norm = nn.LayerNorm(8)
        with pytest.raises(
            tsld.CheckpointError,
            match=r"another model: ValueError norm\.bias is \(\(7,\), .*, not \(\(8,\)",
        ):
            tsld.load_model(path, into=wrong)
        assert type(wrong.up) is nn.Linear  # untouched


def test_a_file_that_is_no_packed_model_is_refused(tmp_path):
    path = tmp_path / "model.packed"
    tsld.save_model(path, tsld.pack_model(quantized_gpt()))
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"PK", b"", b"GGUF" + content[4:]):
        path.write_bytes(damaged)
        with pytest.raises(tsld.CheckpointError, match="truncated, altered, or not a file"):
            tsld.load_model(path)
    rng = np.random.default_rng(0)
    for position in rng.integers(len(content), size=50):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        with pytest.raises(tsld.CheckpointError):
            tsld.load_model(path)
    tsld.write_file(path, {"format": "tsld packed 2"})
    with pytest.raises(tsld.CheckpointError, match="tsld packed 2 is not tsld packed 3"):
        tsld.load_model(path)
    tsld.write_file(path, {"step": 3})
    with pytest.raises(tsld.CheckpointError, match="not a packed model"):
        tsld.load_model(path)
    with pytest.raises(ValueError, match="pack_model"):
        tsld.save_model(path, quantized_gpt())


def mutations():
    """Name to what it does to the content of a packed file, whose checksum is then made again."""

    def put(*keys):
        def change(content, value):
            for key in keys[:-1]:
                content = content[key]
            content[keys[-1]] = value

        return change

    wrong = (None, -1, 0, 10**7, 10**30, 0.5, "2", [], {}, math.nan, torch.zeros(2), True)
    for key in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
        for value in wrong:
            yield f"{key} = {value!r}", put("kind", key), value
    for key in ("format", "kind", "layers", "tensors"):
        for value in wrong:
            yield f"{key} = {value!r}", put(key), value
    for layers in (
        ["h.0.attn"],
        ["h.9.mlp.c_fc"],
        ["lm_head"],
        ["ln_f"],
        [3],
        ["h.0.mlp.c_fc"] * 9,
    ):
        yield f"layers = {layers}", put("layers"), layers
    name = "h.0.mlp.c_fc"
    for tensor in (f"{name}.packed", f"{name}.scale", f"{name}.bias", "wte.weight", "ln_f.weight"):
        for value in (
            *(None, 3, "x", torch.zeros(0), torch.zeros(3, 5), torch.zeros(1).expand(10**9, 12)),
            *(
                torch.zeros(48, 3, dtype=kind)
                for kind in (torch.int64, torch.bool, torch.complex64)
            ),
            *(torch.zeros(12).to_sparse(), torch.zeros(48, 3).t(), torch.zeros(1, 1, 1)),
        ):
            yield f"{tensor} = {str(value)[:30]}", put("tensors", tensor), value

    def claim(content, positions):  # which the file does not hold: they are one, repeated
        content["kind"]["block_size"] = positions
        content["tensors"]["wpe.weight"] = torch.zeros(1, 12).half().expand(positions, 12)

    yield "positions that are not there", claim, 10**6
    for name in ("wte.weight", "h.0.ln_1.weight", "h.1.mlp.c_proj.scale", "h.1.mlp.c_proj.bias"):
        for value in (math.nan, math.inf):
            yield f"{name} = {value}", lambda c, v, n=name: c["tensors"][n].fill_(v), value
    for value in (math.nan, -0.1, 1.5, "x", None):
        yield f"dropout = {value}", put("kind", "dropout"), value

    def pack_an_embedding(content, name):  # of which there is no packed form
        content["layers"].append(name)
        shape = content["tensors"].pop(f"{name}.weight").shape
        content["tensors"][f"{name}.packed"] = torch.zeros(shape[0], 3).byte()
        content["tensors"][f"{name}.scale"] = torch.ones(1, 1)

    for name in ("wpe", "wte"):
        yield f"{name} among the layers", pack_an_embedding, name
    for name in ("h.0.attn.c_attn", "h.1.mlp.c_proj"):
        yield f"{name}: code 10", lambda c, v: c["tensors"][f"{v}.packed"].fill_(0b10), name
    yield "another tensor", put("tensors", "extra"), torch.zeros(3)
    yield "kind.extra", put("kind", "extra"), 1


def test_whatever_a_packed_file_claims_it_is_refused_in_one_line_or_is_an_equal_model(tmp_path):
    model, path, ids = tsld.pack_model(quantized_gpt()), tmp_path / "model.packed", micro_ids()
    tsld.save_model(path, model)
    exact = tsld.load_model(path)(ids)
    refused = 0
    for name, change, value in mutations():
        content = tsld.read_file(path)
        change(content, value)
        tsld.write_file(tmp_path / "changed.packed", content)
        try:
            loaded = tsld.load_model(tmp_path / "changed.packed")
        except tsld.CheckpointError as error:
            assert "\n" not in str(error) and "weights_only" not in str(error), name
            refused += 1
        else:
            torch.testing.assert_close(loaded(ids), exact, msg=name)
    assert refused > 150


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    tsld.save_model(tmp_path / "model.packed", tsld.pack_model(quantized_gpt()))
    bomb = tmp_path / "bomb.packed"
    with (
        zipfile.ZipFile(tmp_path / "model.packed") as archive,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in archive.namelist():
            packed.writestr(entry, archive.read(entry))
    bomb.write_bytes(bomb.read_bytes() + hashlib.sha256(bomb.read_bytes()).digest())
    with pytest.raises(tsld.CheckpointError, match="holds more than plain values"):
        tsld.load_model(bomb)


def test_a_packed_file_fills_no_model_that_computes_something_else(tmp_path):
    path = tmp_path / "model.packed"
    tsld.save_model(path, tsld.pack_model(quantized_gpt()))
    four_bits = tsld.quantize_model(micro_gpt(), bits=4)
    mixed = quantized_gpt()
    mixed.h[1].mlp.c_fc.bits = 4
    for into, words in (
        (micro_gpt(n_head=4), "'n_head': 2"),
        (four_bits, "h.0.attn.c_attn is not ternary in both"),
        (mixed, "h.1.mlp.c_fc is not ternary in both"),
        (quantized_gpt("channel"), r"h.0.attn.c_attn.scale is \(\(1, 1\), .*, not \(\(36, 1\)"),
    ):
        before = copy.deepcopy(into.state_dict())
        with pytest.raises(tsld.CheckpointError, match=words):
            tsld.load_model(path, into=into)
        assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())
    with pytest.raises(ValueError, match="in place of all QuantLinear"):
        tsld.save_model(path, tsld.pack_model(mixed))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "OPTForCausalLM"])
def test_another_familys_file_fills_no_model_with_another_number_of_heads(name, tmp_path):
    path, source = tmp_path / "model.packed", tsld.pack_model(tsld.quantize_model(family(name)))
    tsld.save_model(path, source)
    other = family(name)
    key = "n_head" if name == "GPT2LMHeadModel" else "num_attention_heads"
    setattr(other.config, key, 1)
    with pytest.raises(tsld.CheckpointError, match="number of heads, is 2, not 1"):
        tsld.load_model(path, into=other)


def test_an_embedding_beyond_float16_is_not_saved(tmp_path):
    model = tsld.pack_model(quantized_gpt())
    model.wte.weight.data[3, 4] = 7e4
    with pytest.raises(
        ValueError, match="wte.weight has values that are not finite in torch.float16"
    ):
        tsld.save_model(tmp_path / "model.packed", model)
    assert os.listdir(tmp_path) == []


def test_every_changed_or_missing_byte_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "file.pt"
    tsld.write_file(path, {"weights": torch.arange(5.0), "name": "x"})
    content = path.read_bytes()
    assert tsld.read_file(path)["name"] == "x" and os.listdir(tmp_path) == ["file.pt"]
    for position in [*range(0, len(content), 7), len(content) - 1]:
        altered = bytearray(content)
        altered[position] ^= 4
        path.write_bytes(altered)
        with pytest.raises(tsld.CheckpointError, match="altered"):
            tsld.read_file(path)
    for length in (0, 1, 31, 32, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(tsld.CheckpointError, match="truncated"):
            tsld.read_file(path)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tsld.write_file("file.pt", {"identity": Payload()})
    with pytest.raises(tsld.CheckpointError, match="file.pt"):
        tsld.read_file("file.pt")
    assert not Path("executed").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    tsld.write_file(path, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tsld.write_file(path, 2)
    assert tsld.read_file(path) == 1


# --------------------------------------------------------------------------------------------------
# 6. The same at less cost


LEAN = [name for name in tsld.LOSSES if name != "l2l"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 10, 1000])
@pytest.mark.parametrize("name", LEAN)
def test_the_lean_loss_and_its_gradients_are_those_of_full_logits(name, rows, tied, monkeypatch):
    for shape in LEAN_SHAPES:
        monkeypatch.setattr(tsld, "SCRATCH_BYTES", 4 * shape[-1] * rows)
        student, teacher, targets, inner = lean_example(*shape, tied)
        logits = [hidden @ head.T for hidden, head in (student, teacher)]
        exact = loss64(name, terms64(*logits, targets), 0.0, 2.0, 0.3)
        full = tsld.distillation_loss(name, tsld.per_token_terms(*logits, targets), 2.0, 0.3)
        expected = torch.autograd.grad(3 * full, (inner, student[1]), retain_graph=True)
        lean = tsld.lean_loss(name, *student, *teacher, targets, 2.0, 0.3)
        assert lean.shape == () and lean.dtype == torch.float32
        assert lean.item() == pytest.approx(exact, rel=1e-5)
        (3 * lean).backward()
        for got, gradient in zip((inner.grad, student[1].grad), expected):
            torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-5)
        assert all(t.grad is None for t in teacher)


def test_the_lean_loss_has_the_defaults_of_the_others():
    student, teacher, targets, _ = lean_example(2, 8, 3, 11, tied=False)
    exact = loss64("tsld", terms64(*(h @ w.T for h, w in (student, teacher)), targets))
    assert tsld.lean_loss("tsld", *student, *teacher, targets).item() == pytest.approx(
        exact, rel=1e-5
    )


@pytest.mark.parametrize("rows", [2, 7, 1000])
def test_the_ground_truth_alone_takes_the_lean_loss_without_a_teacher(rows, monkeypatch):
    monkeypatch.setattr(tsld, "SCRATCH_BYTES", 4 * 11 * rows)
    (hidden, head), _, targets, inner = lean_example(3, 5, 6, 11, tied=True)
    exact = F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(2 * exact, (inner, head), retain_graph=True)
    loss = tsld.lean_loss("gt", hidden, head, None, None, targets)
    torch.testing.assert_close(loss, exact)
    (2 * loss).backward()
    for got, gradient in zip((inner.grad, head.grad), expected):
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'tsld' needs a teacher"):
        tsld.lean_loss("tsld", hidden, head, None, None, targets)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        self.numbers = max([self.numbers] + [t.numel() for t in (made,) if torch.is_tensor(t)])
        return made


def test_the_lean_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(tsld, "SCRATCH_BYTES", 4 * 50 * 6)  # six rows of 50
    student, teacher, targets, _ = lean_example(2, 8, 3, 50, tied=False)
    with Largest() as largest:
        tsld.lean_loss("tsld", *student, *teacher, targets).backward()
    assert 6 * 50 <= largest.numbers <= 2 * 6 * 50 < 2 * 8 * 50  # the scratch of both models


def test_the_lean_loss_multiplies_in_bfloat16_under_autocast_and_adds_up_in_float32():
    (hidden, head), teacher, targets, inner = lean_example(4, 16, 32, 50, tied=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = tsld.lean_loss("tsld", hidden, head, *teacher, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert inner.grad.dtype == head.grad.dtype == torch.float32
    rounded = [x.detach().bfloat16().float() for x in (hidden, head, *teacher)]
    logits = [(a @ b.T).bfloat16() for a, b in (rounded[:2], rounded[2:])]
    assert loss.item() == pytest.approx(loss64("tsld", terms64(*logits, targets)), rel=1e-3)
    leaves = [logit.float().requires_grad_() for logit in logits]
    tsld.tsld_loss(tsld.per_token_terms(*leaves, targets)).backward()
    torch.testing.assert_close(
        head.grad, (leaves[0].grad.flatten(0, 1).T @ rounded[0].flatten(0, 1)), rtol=0.05, atol=2e-3
    )


# --------------------------------------------------------------------------------------------------
# 7. Other model families, of transformers


SMALL = {"vocab_size": 17, "max_position_embeddings": 16}


FAMILIES = {  # configuration, and the linear layers of one block, as their authors name them
    "GPT2LMHeadModel": (
        {"vocab_size": 17, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2},
        "transformer.h.{}.: attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    ),
    "OPTForCausalLM": (
        SMALL
        | {"hidden_size": 12, "ffn_dim": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"word_embed_proj_dim": 12},
        "model.decoder.layers.{}.: self_attn.q_proj self_attn.k_proj self_attn.v_proj "
        "self_attn.out_proj fc1 fc2",
    ),
    "GPTNeoForCausalLM": (
        SMALL
        | {
            "hidden_size": 12,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
        }
        | {"window_size": 4},
        "transformer.h.{}.: attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj "
        "attn.attention.out_proj mlp.c_fc mlp.c_proj",
    ),
    "LlamaForCausalLM": (
        SMALL
        | {
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "model.layers.{}.: self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
}


def family(name, seed=0, attention="eager"):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    config = kind.config_class(**FAMILIES[name][0], use_cache=False)
    config._attn_implementation = attention
    model = kind(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_another_familys_student_is_quantized_distilled_packed_and_saved(name, tmp_path):
    teacher = family(name)
    student = tsld.quantize_model(copy.deepcopy(teacher))
    prefix, layers = FAMILIES[name][1].split(": ")
    expected = {prefix.format(i) + layer for i in range(2) for layer in layers.split()}
    assert {n for n, m in student.named_modules() if isinstance(m, QuantLinear)} == expected
    assert type(student.get_output_embeddings()) is nn.Linear
    assert not any(
        isinstance(m, nn.Linear) and not isinstance(m, QuantLinear)
        for n, m in student.named_modules()
        if n != "lm_head"
    )

    ids, targets = micro_ids(8, 8), micro_ids(8, 8, seed=1)
    lost = student(ids).logits - teacher(ids).logits
    config = TrainConfig(steps=20, batch_size=16, block_size=8, lr=0.02)
    losses = train_to_end(student, config, teacher)
    layers = tsld.quantize_model(copy.deepcopy(teacher))  # L2L trains it as well
    l2l = train_to_end(layers, replace(config, loss="l2l"), teacher)
    assert np.mean(l2l[-3:]) < l2l[0] - 0.02
    with torch.no_grad():
        floor = tsld.distillation_loss(
            "tsld", tsld.per_token_terms(teacher(ids), teacher(ids), targets)
        )
    assert np.mean(losses[-3:]) - floor < 0.6 * (
        losses[0] - floor
    )  # what is left above the least possible
    assert (student(ids).logits - teacher(ids).logits).pow(2).mean() < lost.pow(2).mean()
    assert tsld.evaluate(student, TEXT, 8) > 0

    with torch.no_grad():
        before, packed = student(ids).logits, tsld.pack_model(student)
        torch.testing.assert_close(packed(ids).logits, before, rtol=1e-4, atol=1e-4)
        tsld.save_model(tmp_path / "model.packed", packed)
        loaded = tsld.load_model(tmp_path / "model.packed", into=family(name, seed=1))
        torch.testing.assert_close(loaded(ids).logits, before, rtol=0.02, atol=0.02)
        text = loaded.generate(ids[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_familys_student_is_exported_as_a_model_of_its_family(name, tmp_path):
    student = tsld.pack_model(tsld.quantize_model(family(name)))
    unpacked = exchange.unpacked(student, family(name, seed=1))
    unpacked.save_pretrained(tmp_path)
    again = type(unpacked).from_pretrained(tmp_path).eval()
    ids = micro_ids(2, 8)
    torch.testing.assert_close(again(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-4)
    layers = [m for m in student.modules() if isinstance(m, tsld.PackedLinear)]
    values = [p.unique().numel() for n, p in again.named_parameters() if p.dim() == 2]
    assert sum(n <= 3 for n in values) >= len(layers) > 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("loss", ["gt", "logit", "l2l", "logit_gt", "tsld"])
def test_another_familys_losses_are_those_of_its_logits(name, loss):
    teacher, student = family(name), family(name, seed=1)
    ids, targets = micro_ids(3, 8), micro_ids(3, 8, seed=1)
    config = TrainConfig(loss=loss)
    ask = {"output_hidden_states": True, "output_attentions": True}
    traces = [model(ids, **ask) for model in (student, teacher)]
    terms = tsld.per_token_terms(traces[0].logits, traces[1].logits, targets)
    layers = sum(F.mse_loss(s, t) for s, t in zip(*(trace.hidden_states for trace in traces)))
    for s, t in zip(
        *(trace.attentions for trace in traces)
    ):  # the future has probability 0 in both
        layers = layers + (s - t).square().sum() / (3 * 2 * 8 * 9 / 2)
    expected = tsld.distillation_loss(loss, terms._replace(layers=layers))
    assert exchange.logits_are_hidden_times_head(student)
    type(student).hidden = lambda self, ids: self.base_model(ids)[0]  # as train_small gives it
    for way in {loss != "l2l", False}:
        ours = tsld.training_loss(student, teacher, ids, targets, config, way)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [{"n_head": 1}, {"n_embd": 24}, {"n_layer": 1}])
def test_layer_to_layer_distillation_needs_two_models_of_one_shape(other):
    student, teacher, ids = micro_gpt(), micro_gpt(**other), micro_ids()
    with pytest.raises(ValueError):
        tsld.layer_to_layer_loss(student(ids, trace=True), teacher(ids, trace=True))


def test_layer_to_layer_distillation_needs_attentions():
    trace = collections.namedtuple("Output", "hidden_states")([randn(1, 2, 3)])  # as Mamba's
    with pytest.raises(ValueError, match="L2L needs attentions"):
        tsld.layer_to_layer_loss(trace, trace)
    student, ids = family("GPT2LMHeadModel", attention="sdpa"), micro_ids()
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        tsld.training_loss(student, student, ids, ids, TrainConfig(loss="l2l"))


def test_logits_that_are_more_than_hidden_times_head_are_not_taken_for_it():
    student = family("LlamaForCausalLM")
    student.lm_head.register_forward_hook(
        lambda module, inputs, logits: 30 * torch.tanh(logits / 30)
    )
    assert not exchange.logits_are_hidden_times_head(student)


# --------------------------------------------------------------------------------------------------
# 8. The evidence


def test_error_by_position_is_relative_squared_error_at_each_token():
    teacher, student, ids = micro_gpt(), tsld.quantize_model(micro_gpt()), micro_ids(3)
    error = figures.error_by_position(student, teacher, ids)
    ours, theirs = (model(ids).detach().double().numpy() for model in (student, teacher))
    expected = ((ours - theirs) ** 2).sum((0, 2)) / (theirs**2).sum((0, 2))
    np.testing.assert_allclose(error["logits"].numpy(), expected, rtol=1e-4)
    layers = []
    states = [model(ids, trace=True).hidden_states for model in (student, teacher)]
    for i in range(MICRO.n_layer):
        blocks = zip((student, teacher), states)
        ours, theirs = (
            m.h[i].attn(m.h[i].ln_1(state[i]))[0].detach().double().numpy() for m, state in blocks
        )
        layers.append(((ours - theirs) ** 2).sum((0, 2)) / (theirs**2).sum((0, 2)))
    np.testing.assert_allclose(error["attention output"].numpy(), np.mean(layers, 0), rtol=1e-4)


def test_distance_by_token_is_the_kl_divergence_of_the_two_distributions():
    teacher, student, ids = micro_gpt(), micro_gpt(1), micro_ids(3)
    p, q = (softmax64(model(ids).detach()) for model in (teacher, student))
    kl = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(
        figures.distance_by_token(student, teacher, ids).numpy(), kl, rtol=1e-4, atol=1e-5
    )
    assert figures.distance_by_token(teacher, teacher, ids).abs().max() < 1e-6


def test_confidence_is_the_largest_probability_and_the_cross_entropy():
    model, ids, targets = micro_gpt(), micro_ids(300), micro_ids(300, seed=1)  # two parts
    p = softmax64(model(ids).detach())
    sure, ce = figures.confidence(model, ids, targets)
    np.testing.assert_allclose(sure.numpy(), p.max(-1), rtol=1e-4)
    true = np.take_along_axis(p, targets.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(ce.numpy(), -np.log(true), rtol=1e-4)
    wrapped = lambda ids: SimpleNamespace(logits=model(ids))  # as transformers' models answer
    assert torch.equal(figures.confidence(wrapped, ids, targets)[1], ce)


def test_a_model_is_sure_of_a_token_likelier_than_all_others_together():
    model, text = micro_gpt(), micro_ids(3, 40).flatten()
    model.lm_head.weight.data *= 4  # or no token of a random model is likely
    setup = SimpleNamespace(
        tokens={"student": text}, student=TrainConfig(block_size=7), device=torch.device("cpu")
    )
    blocks = text[: (len(text) - 1) // 7 * 7].view(-1, 7)
    expected = (softmax64(model(blocks).detach()).max(-1) > 0.5).mean()
    assert 0.05 < expected < 0.95
    assert figures.sure_share(setup, model, "student") == pytest.approx(expected)
    setup.student.block_size = len(text)  # and its last token has no next one
    with pytest.raises(
        train_small.UserError, match=f"the student text has no whole block of {len(text)} "
    ):
        figures.sure_share(setup, model, "student")


def correlated(n, width, seed=0):
    """Inputs whose channels depend on each other, as those of a language model do."""
    return randn(n, width, seed=seed) @ randn(width, width, seed=seed + 1) + 0.5


def output_error(quantized, weight, x):
    return ((x @ (quantized - weight).t()) ** 2).sum().item()


def grid64(weight):
    """Per row the values that 4 bits can take: quantize_int4's formula in float64."""
    w = weight.double().numpy()
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    scale = (high - low) / 15
    return scale[:, None] * (np.arange(16) - np.round(-low / scale)[:, None])


def test_optq_rounds_each_column_and_lets_the_rest_make_up_for_it():
    weight, x = randn(3, 6), correlated(40, 6)
    w, grid = weight.double().numpy(), grid64(weight)
    H = x.double().numpy().T @ x.double().numpy()
    H += 0.01 * np.mean(np.diag(H)) * np.eye(6)
    expected, current = np.zeros_like(w), w.copy()
    for i in range(6):
        for row in range(3):
            expected[row, i] = grid[row, np.abs(grid[row] - current[row, i]).argmin()]
        done, rest = slice(0, i + 1), slice(i + 1, 6)
        if (
            i < 5
        ):  # what minimizes the quadratic error in the rest, the columns done being what they are
            made_up = np.linalg.solve(H[rest, rest], H[rest, done] @ (expected - w)[:, done].T)
            current[:, rest] = w[:, rest] - made_up.T
    np.testing.assert_allclose(
        baselines.optq_weight(weight, x).numpy(), expected, rtol=1e-5, atol=1e-6
    )


def test_optq_lies_between_round_to_nearest_and_the_best_of_all_roundings():
    gap, closed = 0.0, 0.0
    for seed in range(10):
        weight, x = randn(1, 4, seed=seed), correlated(30, 4, seed=seed)
        values = [torch.from_numpy(row).float() for row in np.repeat(grid64(weight), 4, 0)]
        every = torch.cartesian_prod(*values)  # 16^4 roundings
        best = ((x @ (every - weight).t()) ** 2).sum(0).min().item()
        nearest = output_error(tsld.fake_quantize(weight, 4, "channel"), weight, x)
        ours = output_error(baselines.optq_weight(weight, x), weight, x)
        assert best <= ours * (1 + 1e-4)
        gap, closed = gap + nearest - best, closed + nearest - ours
    assert closed > 0.5 * gap > 0


def test_optq_is_round_to_nearest_where_inputs_are_independent():
    weight, x = randn(4, 5), torch.eye(5) * 3
    torch.testing.assert_close(
        baselines.optq_weight(weight, x), tsld.fake_quantize(weight, 4, "channel")
    )


def test_optq_takes_inputs_that_are_few_or_zero_and_rows_of_zeros():
    weight = torch.cat([randn(2, 6), torch.zeros(1, 6)])
    for x in (
        correlated(2, 6),
        torch.zeros(4, 6),
        correlated(9, 6) * torch.tensor([1.0, 0, 1, 1, 0, 1]),
    ):
        quantized = baselines.optq_weight(weight, x)
        assert torch.isfinite(quantized).all() and quantized[2].abs().max() == 0


@pytest.mark.parametrize("seed", range(4))
def test_awq_takes_the_best_scale_of_its_grid(seed):
    weight, x = (
        randn(5, 8, seed=seed),
        correlated(50, 8, seed) * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 12.0]),
    )
    exact, mean = x @ weight.t(), x.abs().mean(0)
    errors, scales = [], []
    for step in range(20):
        s = mean ** (step / 20)
        scales.append(s / math.sqrt(s.max() * s.min()))
        quantized = tsld.fake_quantize(weight * scales[-1], 4, "channel")
        errors.append((((x / scales[-1]) @ quantized.t() - exact) ** 2).sum().item())
    best = int(np.argmin(errors))
    assert best > 0 and errors[best] < errors[0]  # a = 0 is round to nearest
    torch.testing.assert_close(baselines.awq_scale(weight, x), scales[best])


LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("method", ["optq", "awq"])
def test_post_training_methods_give_a_copy_whose_layers_beat_round_to_nearest(method):
    model, ids = micro_gpt(block_size=16, n_embd=24), micro_ids(40, 16)
    before = copy.deepcopy(model.state_dict())
    quantized = getattr(baselines, method)(model, ids)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not quantized.training and quantized.lm_head.weight is quantized.wte.weight
    weight = model.h[0].attn.c_attn.weight  # the first layer sees the same inputs in both
    x = model.h[0].ln_1(model.wte(ids) + model.wpe(torch.arange(16))).flatten(0, 1).detach()
    exact = x @ weight.t()
    ours = quantized.h[0]
    theirs = (
        ours.ln_1(model.wte(ids) + model.wpe(torch.arange(16))).flatten(0, 1)
        @ ours.attn.c_attn.weight.t()
    )
    if (
        method == "awq"
    ):  # the values carry the next layer's scale, which that layer's weight takes back
        exact, theirs, weight = exact[:, :48], theirs[:, :48], weight[:48]
    nearest = x @ tsld.fake_quantize(weight, 4, "channel").t()
    assert ((theirs - exact) ** 2).sum() < ((nearest - exact) ** 2).sum()
    with pytest.raises(ValueError, match="4 bits, not 2"):
        getattr(baselines, method)(model, ids, bits=2)
    with pytest.raises(ValueError, match="not Linear"):
        getattr(baselines, method)(nn.Linear(2, 2), ids)


def test_optq_calibrates_each_layer_with_those_before_it_quantized():
    model, ids = micro_gpt(), micro_ids(20)
    expected, ours = copy.deepcopy(model), baselines.optq(model, ids)
    for block in range(MICRO.n_layer):
        for name in LAYERS:
            caught = []
            layer = expected.get_submodule(f"h.{block}.{name}")
            hook = layer.register_forward_pre_hook(lambda module, x: caught.append(x[0].detach()))
            expected(ids)
            hook.remove()
            layer.weight.data = baselines.optq_weight(layer.weight, caught[0].flatten(0, 1))
            torch.testing.assert_close(ours.get_submodule(f"h.{block}.{name}").weight, layer.weight)


def test_awqs_folded_scales_compute_what_scales_on_every_layers_own_input_would():
    model, ids = micro_gpt(), micro_ids(20)
    expected, ours = copy.deepcopy(model).requires_grad_(False), baselines.awq(model, ids)
    for block in range(MICRO.n_layer):
        for name in LAYERS:
            name, caught = f"h.{block}.{name}", []
            layer = expected.get_submodule(name)
            hook = layer.register_forward_pre_hook(
                lambda module, x: caught.append(x[0].flatten(0, 1))
            )
            expected(ids)
            hook.remove()
            s = baselines.awq_scale(layer.weight, caught[0])
            layer.weight.copy_(tsld.fake_quantize(layer.weight * s, 4, "channel") / s)
    torch.testing.assert_close(ours(ids), expected(ids), rtol=1e-3, atol=1e-3)
    assert type(ours.h[0].attn.c_proj) is nn.Linear and isinstance(
        ours.h[0].mlp.c_proj, baselines.ScaledLinear
    )
    for (
        block
    ) in ours.h:  # the weights are on a grid of 16 values in each row, those of the values as well
        for weight in (
            block.attn.c_attn.weight,
            block.attn.c_proj.weight,
            block.mlp.c_proj.layer.weight,
        ):
            assert all(len(np.unique(row.numpy().round(5))) <= 16 for row in weight)


def test_learning_a_vocabulary_joins_the_most_frequent_pair_each_time():
    text = "low lower lowest newer newest wider low low  new\nnew 1999 aaaa aaaaa"
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(texts.PATTERN, text)]
    expected = [bytes([byte]) for byte in range(256)]
    while len(expected) < 275:  # brute force: count everything anew for every token
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        expected.append(b"".join(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [b"".join(best)]
                i += 1
    assert vocabulary.learn_vocabulary(text, 275) == expected


def test_ratios_are_against_the_row_named_first(capsys):
    bench.print_ratios("speed", "µs", {"base": 300.0, "fast": 100.0})
    bench.print_ratios("rate", "tokens/s", {"base": 20.0, "fast": 50.0}, larger_is_better=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[1:3] == [["base", "300.0", "1.00"], ["fast", "100.0", "3.00"]]
    assert lines[4:] == [["base", "20.0", "1.00"], ["fast", "50.0", "2.50"]]


@pytest.mark.parametrize(
    "row", [("plain", "float32"), ("plain, ours", "float32"), ("tsld", "bfloat16")]
)
def test_the_benchmarked_steps_train_the_right_model(row, monkeypatch):
    made = []
    monkeypatch.setattr(bench, "GPT", lambda config: made.append(GPT(config)) or made[-1])
    monkeypatch.setattr(
        tsld,
        "quantize_model",
        lambda model, exact=tsld.quantize_model: made.append(exact(model)) or model,
    )
    step = bench.training_steps((1, 8, 2, 17, 3, 4), [row])[row]
    before = [copy.deepcopy(model.state_dict()) for model in made]
    step()
    changed = [not torch.equal(state["wte.weight"], m.wte.weight) for state, m in zip(before, made)]
    assert changed == [row[0] != "tsld", row[0] == "tsld"]  # the full-precision model, the student


def test_memory_on_paper_counts_the_published_models_parameters():
    published = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]  # GPT-2
    published += [125_239_296, 1_315_758_080, 2_651_596_800, 6_658_473_984]  # OPT
    published += [1_315_575_808, 6_738_415_616]  # GPT-Neo, LLaMA
    for (name, shape), count in zip(bench.SHAPES.items(), published, strict=True):
        assert sum(shape.parameters()) == count, name


def test_memory_on_paper_is_that_of_a_real_file_and_of_a_measured_step(tmp_path):
    config = GPTConfig(block_size=128, vocab_size=4096, n_layer=4, n_head=4, n_embd=256)
    shape = bench.Shape(4, 256, 1024, 4096, 128)
    tsld.save_model(tmp_path / "model.packed", tsld.pack_model(tsld.quantize_model(GPT(config))))
    paper = bench.memory_on_paper(shape)
    assert paper["FP32"] == 4 * sum(p.numel() for p in GPT(config).parameters())
    assert os.path.getsize(tmp_path / "model.packed") == pytest.approx(paper["packed"], rel=0.02)
    if not bench.peak_memory():
        pytest.skip("this system does not say how much memory a process had")
    # Two steps that differ in depth and batch: their difference is free of what torch itself takes.
    sizes = (2, 4), (8, 16)
    shapes = [(layers, 256, 4, 4096, batch, 128) for layers, batch in sizes]
    steps = f"[bench.training_memory(shape, ('tsld', 'float32')) for shape in {shapes}]"
    code = f"import torch; torch.set_num_threads(2); from data.evidence import bench; {steps}"
    small, large = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=HERE).split())
    paper = []
    for layers, batch in sizes:
        shape = bench.Shape(layers, 256, 1024, 4096, 128)
        paper.append(bench.memory_on_paper(shape, batch, 128, "float32")["training"])
    assert large - small == pytest.approx(paper[1] - paper[0], rel=0.2)


def test_a_gguf_file_holds_the_ternary_matrices_in_two_bits(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=256)
    model = tsld.pack_model(tsld.quantize_model(GPT(config)))
    model.save_pretrained(tmp_path)
    llama.write_gguf(GPT.from_pretrained(tmp_path), tmp_path / "model.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 2 + 2 + 12
    for name, layer in (
        ("blk.0.attn_qkv", model.h[0].attn.c_attn),
        ("blk.0.attn_output", model.h[0].attn.c_proj),
        ("blk.0.ffn_up", model.h[0].mlp.c_fc),
        ("blk.0.ffn_down", model.h[0].mlp.c_proj),
    ):
        stored = tensors[f"{name}.weight"]
        assert stored.n_bytes == layer.dequantized().numel() / 256 * 66  # 2 bits, and a scale
        weight = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
        torch.testing.assert_close(weight, layer.dequantized(), rtol=5e-4, atol=0)


def test_a_width_that_llama_cpp_cannot_pack_is_refused(tmp_path, capsys):
    micro_gpt().save_pretrained(tmp_path)
    assert train_small.main([str(tmp_path), "out.gguf"], llama.main) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("not 12" in error or "package gguf" in error)


# --------------------------------------------------------------------------------------------------
# 9. Checkpoints


def train_brief(path=None, resume=False, stop_at=None, dropout=0.5, **changes):
    """A student's weights after training with checkpoints; stop_at: a signal comes after that
    step."""
    student, teacher = tsld.quantize_model(micro_gpt(1, dropout=dropout)), micro_gpt(2)
    teacher.fingerprint = train_small.fingerprint(teacher.parameters())
    setup = SimpleNamespace(args=SimpleNamespace(compile=False), device=torch.device("cpu"))
    config = replace(BRIEF, **{"block_size": 8, **changes})

    def watch(step, model):
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    train_small.train(setup, "student", student, TEXT, config, path, resume, teacher, watch)
    return student.state_dict()


def test_stopped_and_resumed_training_ends_with_the_very_same_weights(tmp_path):
    path, uninterrupted = tmp_path / "state.pt", train_brief(tmp_path / "other.pt")
    for stop_at in (1, 4):
        with pytest.raises(train_small.TrainingStopped, match=f"step {stop_at} of 6"):
            train_brief(path, resume=True, stop_at=stop_at)
    for _ in range(2):  # the second time there is nothing left to do
        resumed = train_brief(path, resume=True)
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    fresh = train_brief(path, resume=False, seed=5)
    assert not torch.equal(fresh["wte.weight"], uninterrupted["wte.weight"])


def test_the_checkpoint_before_is_kept_and_used_when_the_newest_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(train_small, "CHECKPOINT_SECONDS", 0)
    (tmp_path / "one").mkdir()
    path, uninterrupted = tmp_path / "one" / "state.pt", train_brief(tmp_path / "other.pt")
    with pytest.raises(train_small.TrainingStopped):
        train_brief(path, stop_at=4)
    assert sorted(os.listdir(tmp_path / "one")) == ["state.previous.pt", "state.pt"]
    assert (
        tsld.read_file(tmp_path / "one" / "state.previous.pt")["step"] == 3
        and tsld.read_file(path)["step"] == 4
    )
    path.unlink()
    resumed = train_brief(path, resume=True)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


@pytest.mark.parametrize(
    "changes", [{"lr": 0.02}, {"steps": 7}, {"loss": "logit"}, {"seed": 1}, {"dropout": 0.0}]
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, changes):
    train_brief(tmp_path / "state.pt")
    with pytest.raises(
        tsld.CheckpointError, match="another run: (model|" + "|".join(changes) + ")"
    ):
        train_brief(tmp_path / "state.pt", resume=True, **changes)


def test_a_checkpoint_of_another_text_is_refused(tmp_path, monkeypatch):
    train_brief(tmp_path / "state.pt")
    monkeypatch.setattr(sys.modules[__name__], "TEXT", TEXT.flip(0))
    with pytest.raises(tsld.CheckpointError, match="another run: text"):
        train_brief(tmp_path / "state.pt", resume=True)


# --------------------------------------------------------------------------------------------------
# 10. Data and vocabulary


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(url, *rest, **how):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """Two mirrors as local folders, the first without files, and an empty data folder with the
    vocabulary."""
    content = {part: f"the {part} text\n".encode() * 40 for part in texts.PARTS}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for part, text in content.items():
        (tmp_path / "two" / f"ptb.{part}.txt").write_bytes(text)
    monkeypatch.setattr(
        texts, "PTB_MIRRORS", [f"file://{tmp_path}/{name}/" for name in ("one", "two")]
    )
    monkeypatch.setattr(texts, "PTB_SHA256", {part: sha256(text) for part, text in content.items()})
    monkeypatch.setattr(texts, "DATA", tmp_path / "data")
    return tmp_path


def test_ptb_is_downloaded_from_the_first_mirror_that_has_it_and_kept(mirrors, monkeypatch):
    assert texts.load_corpus("ptb")[2]["valid"] == "the valid text\n" * 40
    kept = ["ptb.test.txt", "ptb.train.txt", "ptb.valid.txt"]
    assert sorted(os.listdir(mirrors / "data" / "ptb")) == kept
    monkeypatch.setattr(texts, "PTB_MIRRORS", ["file:///nowhere/"])
    name, _, parts = texts.load_corpus(None)
    assert name == "ptb" and parts["train"].startswith("the train text")


def test_a_download_that_does_not_match_its_checksum_leaves_nothing(mirrors):
    (mirrors / "two" / "ptb.valid.txt").write_bytes(b"something else")
    with pytest.raises(train_small.UserError, match="ptb.valid.txt cannot be downloaded.*hash"):
        texts.load_corpus("ptb")
    assert os.listdir(mirrors / "data" / "ptb") == ["ptb.train.txt"]


def test_a_download_is_made_once_and_its_checksum_looked_at_every_time(tmp_path):
    (tmp_path / "source").write_bytes(b"weights")
    path, url = tmp_path / "kept" / "gpt2.bin", (tmp_path / "source").as_uri()
    with pytest.raises(train_small.UserError, match="gpt2.bin cannot be downloaded"):
        texts.fetch([url], path, "0" * 64)
    assert os.listdir(tmp_path / "kept") == []
    assert texts.fetch(["file:///nowhere", url], path, sha256(b"weights")) == path
    (tmp_path / "source").unlink()
    texts.fetch([url], path, sha256(b"weights"))
    path.write_bytes(b"Weights")
    with pytest.raises(train_small.UserError, match="does not match its SHA-256"):
        texts.fetch([url], path, sha256(b"weights"))


def test_without_data_and_network_the_corpus_is_pydoc_and_says_why(mirrors, no_network):
    name, description, parts = texts.load_corpus(None)
    assert name == "pydoc" and "instead of the Penn Treebank" in description
    assert "no route to host" in description
    from pydoc_data.topics import topics

    whole = "\n\n".join(text for _, text in sorted(topics.items()))
    assert "".join(parts[part] for part in texts.PARTS) == whole
    sizes = [len(parts[part].encode()) / len(whole.encode()) for part in texts.PARTS]
    np.testing.assert_allclose(sizes, [0.90, 0.05, 0.05], atol=1e-4)


def test_a_text_is_cut_90_5_5_by_bytes_and_never_inside_a_character():
    for text in ("x" * 200, "ä€😀" * 70, "é" * 3, "a"):
        content = text.encode()
        parts = texts.split_text(content)
        assert list(parts) == ["train", "valid", "test"] and "".join(parts.values()) == text
        for part, end in (("train", 0.9), ("valid", 0.95)):
            upto = "".join(list(parts.values())[: 1 + list(parts).index(part)])
            assert 0 <= int(end * len(content)) - len(upto.encode()) < 4


STRINGS = [
    "",
    " ",
    "the the  the\n\n\tthe",
    "N <unk> $ mr. 'quoted' isn't 3.14 snake_case\r\n",
    "Grüße, 世界! 🙂👩‍👩‍👧 \u0000\u00a0\u2028 ١٢٣",
    "".join(map(chr, range(1, 1000))),
    "a" * 3000,
]


def test_every_text_survives_the_small_vocabulary():
    tokenizer = train_small.load_tokenizer("bpe2048")
    assert tokenizer.n_vocab == 2048 == train_small.PRESETS["tiny"].gpt.vocab_size
    rng = np.random.default_rng(0)
    points = [p for p in range(0x11000) if not 0xD800 <= p < 0xE000]
    random = [
        "".join(chr(points[i]) for i in rng.integers(len(points), size=50)) for _ in range(50)
    ]
    for text in STRINGS + random:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    for byte in range(256):
        assert tokenizer.decode_single_token_bytes(byte) == bytes([byte])


ARC = '{"id": "1", "question": {"stem": "Why?", "choices": [%s]}, "answerKey": "%s"}'
TASKS = {  # a few lines of each file in its original format, and the last example of the last part
    "cola": (
        {
            "in_domain_train.tsv": "gj04\t1\t\tWe ran.\ngj04\t0\t*\tRan we.\n",
            "in_domain_dev.tsv": "gj04\t1\t\tHe left.\n",
            "out_of_domain_dev.tsv": 'clc95\t0\t*\tLeft "he.',
        },
        ('Left "he.\nQuestion: Does this sentence make sense?\nAnswer:', ("no", "yes"), 0),
        (2, 2),
    ),
    "mrpc": (
        {
            "msr_paraphrase_train.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
            '1\t1\t2\tA "b.\tB a.\n0\t3\t4\tC.\tD.\n',
            "dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t3\t4\tC.\tD.\n",
        },
        (
            "Sentence 1: C.\nSentence 2: D.\nQuestion: Do both sentences mean the same thing?\n"
            "Answer:",
            ("no", "yes"),
            0,
        ),
        (1, 1),
    ),
    "rte": (
        {
            "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
            "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n",
        },
        ("A.\nQuestion: B. True or False?\nAnswer:", ("True", "False"), 1),
        (1, 1),
    ),
    "sst2": (
        {"train.tsv": "sentence\tlabel\nfine \t1\n", "dev.tsv": 'sentence\tlabel\nso " so \t1\n'},
        (
            'so " so\nQuestion: Is this sentence positive or negative?\nAnswer:',
            ("negative", "positive"),
            1,
        ),
        (1, 1),
    ),
    "arc_challenge": (
        {
            "train.jsonl": ARC % ('{"text": "a", "label": "A"}, {"text": "b", "label": "B"}', "B"),
            "test.jsonl": ARC
            % (", ".join(f'{{"text": "t{i}", "label": "{i}"}}' for i in (1, 2, 3)), "3"),
        },
        ("Question: Why?\nAnswer:", ("t1", "t2", "t3"), 2),
        (1, 1),
    ),
    "openbookqa": (
        {
            name: ARC % ('{"text": "a", "label": "A"}', "A")
            for name in ("train.jsonl", "test.jsonl")
        },
        ("Why?", ("a",), 0),
        (1, 1),
    ),
    "piqa": (
        {
            "train.jsonl": '{"goal": "g", "sol1": "x", "sol2": "y"}\n',
            "train-labels.lst": "0\n",
            "valid.jsonl": '{"goal": "h", "sol1": "u", "sol2": "v"}\n',
            "valid-labels.lst": "1\n",
        },
        ("Question: h\nAnswer:", ("u", "v"), 1),
        (1, 1),
    ),
    "gsm8k": (
        {
            name: '{"question": "1+1?", "answer": "#### 2"}\n'
            for name in ("train.jsonl", "test.jsonl")
        },
        ("Question: 1+1?\nAnswer:", ("#### 2",), 0),
        (1, 1),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_files_become_prompts_choices_and_answers(name, tmp_path, monkeypatch):
    written, last, counts = TASKS[name]
    (tmp_path / name).mkdir()
    rows = []
    for file, text in written.items():
        (tmp_path / name / file).write_bytes(text.encode())
        lines = text.strip("\n").count("\n") + (0 if name in ("mrpc", "rte", "sst2") else 1)
        rows.append(f"- {lines} {name}/{file}")
    monkeypatch.setattr(tasks, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(tasks, "FILES", "\n".join(rows))
    train, test = tasks.load_task(name)
    assert (len(train), len(test)) == counts and tuple(test[-1]) == last
    monkeypatch.setattr(tasks, "FILES", "\n".join(row.replace("- ", "- 9") for row in rows))
    with pytest.raises(texts.UserError, match="does not hold 9.* examples"):
        tasks.load_task(name)
    monkeypatch.setattr(tasks, "FILES", "\n".join(row.replace("-", "0" * 64, 1) for row in rows))
    with pytest.raises(texts.UserError, match="does not match its SHA-256"):
        tasks.load_task(name)


@pytest.fixture
def small_vocabulary():
    return train_small.load_tokenizer("bpe2048")


QUESTIONS = [  # of 2, 3 and 5 choices, one of them a beginning of another, and one beyond ASCII
    tasks.Example("The cat sat.\nQuestion: Yes or no?\nAnswer:", ("no", "yes"), 1),
    tasks.Example("Question: Why?\nAnswer:", ("because", "because it rained", "ünïcödé"), 2),
    tasks.Example("It is long", ("a", "b", "c", "d d d d", "e"), 0),
    tasks.Example("The cat sat.\nQuestion: Yes or no?\nAnswer:", ("no", "yes"), 0),
]


def task_model(block_size=64, seed=0):
    """Whose logits are large: choices differ clearly."""
    return micro_gpt(seed, block_size=block_size, vocab_size=2048)


def nats_of_choice(model, tokenizer, prompt, choice, block_size):
    """-log P of the choice's tokens, by one pass for each, float64; their number."""
    ids = tokenizer.encode_ordinary(f"{prompt} {choice}")
    first, nats = len(tokenizer.encode_ordinary(prompt)), 0.0
    ids, first = ids[-block_size - 1 :], max(1, first - max(0, len(ids) - block_size - 1))
    for n in range(first, len(ids)):
        logits = model(torch.tensor([ids[:n]]))[0, -1].detach()
        nats -= math.log(softmax64(logits)[ids[n]])
    return nats


@pytest.mark.parametrize("block_size", [64, 16, 7])
@pytest.mark.parametrize("kind", ["logits", "an object with .logits"])
def test_a_tasks_scores_are_the_choices_log_likelihoods(kind, block_size, small_vocabulary):
    model = task_model(block_size)
    scored = model
    if kind != "logits":
        scored = nn.Module()
        scored.inner = model
        scored.forward = lambda ids: SimpleNamespace(logits=model(ids))
    nats, right, cut, scores = tasks.evaluate_task(scored, small_vocabulary, QUESTIONS, block_size)
    total, matches, per_byte, tokens, lengths = 0.0, 0, 0, [], []
    for prompt, choices, answer in QUESTIONS:
        costs = [nats_of_choice(model, small_vocabulary, prompt, c, block_size) for c in choices]
        total += costs[answer]
        matches += costs[answer] == min(costs)
        ratios = [cost / len(text.encode()) for cost, text in zip(costs, choices)]
        per_byte += ratios[answer] == min(ratios)
        tokens += small_vocabulary.encode_ordinary(" " + choices[answer])[-block_size:]
        lengths.append(
            max(len(small_vocabulary.encode_ordinary(f"{prompt} {text}")) for text in choices)
        )
    assert nats == pytest.approx(total, rel=1e-5)
    assert sorted(right) == sorted(tokens)
    assert cut == sum(length > block_size + 1 for length in lengths)
    assert scores == {"accuracy": matches / 4, "acc_norm": per_byte / 4}


def test_a_choice_is_as_long_as_its_bytes():
    words = ["éé", "abc", "a"]
    tokenizer = SimpleNamespace(encode_ordinary=lambda text: [*map(words.index, text.split())])
    uniform = micro_gpt()
    uniform.ln_f.weight.data.zero_()  # a choice of one token costs log 17, whatever it is
    examples = [tasks.Example("a", ("éé", "abc"), 0), tasks.Example("a", ("abc", "éé"), 1)]
    *_, scores = tasks.evaluate_task(uniform, tokenizer, examples, 8)
    assert scores["acc_norm"] == 1  # of 4 bytes and of 3, though of 2 letters and of 3


def test_matthews_correlation_is_its_definition():
    words = ["no", "yes", "the", "cat", "a", "dog", "ran", "sat", "long", "it", "rained"]
    tokenizer = SimpleNamespace(encode_ordinary=lambda text: [*map(words.index, text.split())])
    model, rng = micro_gpt(1), np.random.default_rng(0)
    model.ln_f.bias.data.zero_()  # else one answer is always likelier
    prompts = [" ".join(rng.choice(words[2:], size=4)) for _ in range(40)]
    examples = [tasks.Example(p, ("no", "yes"), int(rng.integers(2))) for p in prompts]
    *_, scores = tasks.evaluate_task(model, tokenizer, examples, 8)
    table = np.zeros((2, 2))  # true, found
    for prompt, choices, answer in examples:
        costs = [nats_of_choice(model, tokenizer, prompt, choice, 8) for choice in choices]
        table[answer, int(costs[1] < costs[0])] += 1
    (tn, fp), (fn, tp) = table
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert product > 0
    assert scores["mcc"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(product))
    assert scores["accuracy"] == pytest.approx((tp + tn) / 40)
    all_yes = [example._replace(answer=1) for example in examples]
    assert tasks.evaluate_task(model, tokenizer, all_yes, 8)[-1]["mcc"] == 0


class Says(GPT):
    """Continues every prompt with the text that stands in `says` for it, then with anything."""

    most = 0  # prompts at a time

    def generate(self, ids, max_new_tokens, temperature=1.0):
        assert temperature == 0
        rows, self.most = [], max(self.most, len(ids))
        for row in ids.tolist():
            said = self.tokenizer.encode_ordinary(self.says[self.tokenizer.decode(row)])
            rows.append([*row, *said, *[self.tokenizer.end_of_text, 4, 2] * 99][:max_new_tokens])
        return torch.tensor([row + [7] * (max_new_tokens - len(row)) for row in rows])


@pytest.mark.parametrize(
    "said, number, right",
    [
        ("so 1,300.\n#### 1,234", "1,234", True),
        ("#### 1234.", "1,234", True),
        ("####1234\n#### 5", "1,234", True),
        ("#### 12345", "1,234", False),
        ("#### -1234", "1,234", False),
        ("1234", "1,234", False),
        ("#### 1234.5", "1,234", False),
        ("\0#### 1234", "1,234", False),  # after the end of the text
        ("#### -7", "-7", True),
        ("#### -8", "-7", False),
    ],
)
def test_a_free_answer_matches_where_its_number_is_the_answers(
    said, number, right, small_vocabulary
):
    model = Says(task_model(256).config)
    model.tokenizer = small_vocabulary
    prompts = ["Question: How many?\nAnswer:", "Question: What?\nAnswer:"]
    model.says = dict(zip(prompts, [said, "none"]))
    examples = [tasks.Example(prompt, (f"It is 3.\n#### {number}",), 0) for prompt in prompts]
    examples *= 70  # more of one length than are answered at a time
    *_, scores = tasks.evaluate_task(model, small_vocabulary, examples, 256)
    assert scores == {"accuracy": right / 2} and model.most == 64


def test_free_answers_are_the_models_own_greedy_text(small_vocabulary, monkeypatch):
    """No #### is ever written by this model: each token's number stands in for it."""
    model, shown = task_model(32), []
    prompts = ["the cat", "a dog", "it rained", "The quick brown fox jumps over the lazy dog"]
    decode = lambda ids: f"#### {sum(ids)}"
    spy = SimpleNamespace(
        encode_ordinary=small_vocabulary.encode_ordinary, decode=decode, end_of_text=None
    )
    examples = []
    for prompt in prompts:
        ids = small_vocabulary.encode_ordinary(prompt)[-16:]
        new = model.generate(torch.tensor([ids]), 16, temperature=0)[0, len(ids) :]
        examples.append(tasks.Example(prompt, (decode(new.tolist()),), 0))
    scores = tasks.evaluate_task(model, spy, examples, 32, shown.append)[-1]
    assert scores == {"accuracy": 1.0} and any("answered" in line for line in shown)


def test_a_prompt_is_cut_where_the_block_cannot_predict_every_token_after_the_first(
    small_vocabulary,
):
    (example,) = QUESTIONS[:1]
    length = max(
        len(small_vocabulary.encode_ordinary(f"{example.prompt} {text}"))
        for text in example.choices
    )
    for block_size, cut in ((length, 0), (length - 1, 0), (length - 2, 1)):
        model = task_model(block_size)
        found = tasks.evaluate_task(model, small_vocabulary, [example], block_size)
        assert found[2] == cut


def test_a_task_is_trained_on_as_prompts_with_their_right_answers_and_the_end_after_each(
    small_vocabulary,
):
    ids = tasks.training_text(small_vocabulary, QUESTIONS[:2])
    first, second, rest = small_vocabulary.decode(ids).split("\0")
    assert first == "The cat sat.\nQuestion: Yes or no?\nAnswer: yes" and rest == ""
    assert second == "Question: Why?\nAnswer: ünïcödé"


def test_every_task_has_files_with_an_address_and_a_prompt():
    rows = [row.split() for row in tasks.FILES.strip().splitlines()]
    assert {row[2].split("/")[0] for row in rows} == set(tasks.PROMPTS) == set(tasks.ADDRESSES)
    for sha256, count, file in rows:
        assert re.fullmatch("-|[0-9a-f]{64}", sha256) and int(count) > 200, file


def test_the_small_vocabulary_shortens_english_by_more_than_half():
    text = "The company said it expects to report a loss for the third quarter of the year."
    assert len(train_small.load_tokenizer("bpe2048").encode_ordinary(text)) < len(text) / 2


# --------------------------------------------------------------------------------------------------
# 11. The run


WORDS = "the quick brown fox jumps over the lazy dog and the cat sat on a mat while it rained all "
WORDS += "day long .\n"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The preset `tiny` made minute, and a text to train on."""
    preset = train_small.PRESETS["tiny"]
    gpt = GPTConfig(block_size=16, vocab_size=2048, n_layer=1, n_head=2, n_embd=8)
    teacher, student = (
        replace(preset.teacher, steps=4, batch_size=4),
        replace(preset.student, steps=6, batch_size=4),
    )
    small = replace(preset, gpt=gpt, teacher=teacher, student=student, student_tokens=300)
    monkeypatch.setitem(train_small.PRESETS, "tiny", small)
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 40)
    return ["--data", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]


def run(argv, capsys, command=None):
    """Runs the command, returns what it printed."""
    assert train_small.main(argv, command) == 0
    return capsys.readouterr().out


def refused(argv, capsys, words):
    """The command ends with exit code 2 and one line on stderr that has these words; returns what
    it printed before."""
    assert train_small.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    assert words in printed.err, printed.err
    return printed.out


SCORES = [
    f"{test}{who}_{u}"
    for test in ("", "test_")
    for who in ("teacher", "ptq", "student")
    for u in ("ppl", "bpb")
]


def test_a_run_leaves_one_result_per_loss_with_all_fields(tiny, capsys, tmp_path):
    out = run(["--loss", "all", "--seed", "3", "--granularity", "channel", *tiny], capsys)
    assert out.startswith(f"corpus: {tiny[1]}, as asked for\n")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["loss"] for row in rows] == list(tsld.LOSSES)
    assert [row["gt_weight"] for row in rows] == [
        0.25 if x == "tsld" else None for x in tsld.LOSSES
    ]
    for row in rows:
        name = f"student, {row['loss']}" + " + 0.25 gt" * (row["loss"] == "tsld")
        assert re.search(rf"^{re.escape(name)} +\d", out, re.M)
        assert (row["bits"], row["granularity"], row["seed"]) == (2, "channel", 3)
        assert (row["model"], row["data"], row["tokenizer"]) == ("tiny", tiny[1], "bpe2048")
        assert all(row[name] > 0 for name in SCORES)
        assert row["teacher_ppl"] == rows[0]["teacher_ppl"]
        assert row["bytes_fp32"] == 4 * (
            2048 * 8 + 16 * 8 + 8 * (24 + 8 + 32 + 32) + 24 + 8 + 32 + 8 + 6 * 8
        )
        assert row["linear_bytes_fp32"] == 4 * 8 * (24 + 8 + 32 + 32)
        assert row["train_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(6 * 4 * 16 / row["train_seconds"])


@pytest.mark.parametrize("size", [2, 5, 40])
def test_the_block_size_asked_for_is_the_length_of_the_sequences(
    size, tiny, capsys, tmp_path, small_vocabulary
):
    run(["--block-size", str(size), *tiny], capsys)
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["tokens_per_second"] == pytest.approx(6 * 4 * size / row["train_seconds"])
    student = tsld.load_model(tmp_path / "out" / "student-tsld.packed")
    assert student.config.block_size == len(student.wpe.weight) == size
    text = texts.split_text((WORDS * 40).encode())["valid"]
    ids = torch.tensor(small_vocabulary.encode_ordinary(text))
    nats = [  # token n's context begins at the last multiple of the size before it
        -student(ids[None, (n - 1) // size * size : n])[0, -1].log_softmax(-1)[ids[n]].item()
        for n in range(1, len(ids))
    ]
    assert row["student_ppl"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=2e-3)


def test_a_task_is_a_text_to_train_on_and_examples_to_choose_from(
    tiny, capsys, tmp_path, monkeypatch, small_vocabulary
):
    examples = QUESTIONS[::3]
    monkeypatch.setattr(tasks, "load_task", {"cola": (QUESTIONS[1:3] * 20, examples)}.get)
    out = run(["--task", "cola", *tiny[2:]], capsys)
    assert "corpus: cola, 40 examples, 2 to evaluate on" in out
    assert "scored 2 examples, 2 of them cut from the left to fit a block of 16" in out
    assert re.search(r"perplexity +bits/byte +accuracy +acc_norm +mcc +bytes\n", out)
    ids = small_vocabulary.encode_ordinary(f"{examples[0].prompt} {examples[0].choices[1]}")
    assert f"student continues “{small_vocabulary.decode(ids[:8]).strip()}”:" in out
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (row["task"], row["data"], row["model"]) == ("cola", "cola", "tiny")
    student = tsld.load_model(tmp_path / "out" / "student-tsld.packed")
    nats = [
        nats_of_choice(student, small_vocabulary, e.prompt, e.choices[e.answer], 16)
        for e in QUESTIONS[::3]
    ]
    tokens = sum(len(small_vocabulary.encode_ordinary(text)) for text in (" no", " yes"))
    assert row["student_ppl"] == pytest.approx(math.exp(sum(nats) / tokens), rel=2e-3)
    assert row["student_bpb"] == pytest.approx(sum(nats) / math.log(2) / len(" no yes"), rel=2e-3)
    for who in ("teacher", "ptq", "student"):
        assert row[f"{who}_accuracy"] == 0.5  # one prompt, both answers
        assert row[f"{who}_mcc"] == 0
    assert "test_student_ppl" not in row


def test_a_task_that_is_not_there_or_comes_with_a_text_is_refused(tiny, capsys, no_network):
    refused(["--task", "nothing", *tiny], capsys, "--task: invalid choice: 'nothing'")
    refused(["--task", "cola", *tiny], capsys, "--data and --task: give one")


def test_perplexity_is_per_token_and_bits_are_per_byte_of_the_predicted_text(
    tiny, capsys, tmp_path
):
    run(tiny, capsys)
    row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    tokenizer = train_small.load_tokenizer("bpe2048")
    for prefix, part in (("", "valid"), ("test_", "test")):
        tokens = tokenizer.encode_ordinary(texts.split_text((WORDS * 40).encode())[part])
        size = len(b"".join(tokenizer.decode_single_token_bytes(t) for t in tokens[1:]))
        for who in ("teacher", "ptq", "student"):
            bits = math.log2(row[f"{prefix}{who}_ppl"]) * (len(tokens) - 1)
            assert row[f"{prefix}{who}_bpb"] == pytest.approx(bits / size)


def test_the_teacher_is_trained_once_per_configuration_and_text(tiny, capsys, tmp_path):
    folder = tmp_path / "out"
    assert "found there" not in run(["--loss", "gt", *tiny], capsys)
    kept = set(folder.glob("teacher-tiny-*.pt"))
    out = run(["--loss", "logit", "--lr", "1e-4", "--student-tokens", "200", *tiny], capsys)
    assert (
        "found there" in out
        and "teacher: step" not in out
        and set(folder.glob("teacher-*")) == kept
    )
    for changed in (["--teacher-steps", "5"], ["--seed", "1"]):
        assert "found there" not in run(["--loss", "gt", *changed, *tiny], capsys)
    assert len(set(folder.glob("teacher-*"))) == 3


def test_a_shortened_run_shortens_the_teacher_in_proportion(tiny, capsys):
    assert "teacher: 2 steps" in run(["--steps", "3", *tiny], capsys)
    assert "teacher: 4 steps" in run(["--steps", "12", *tiny], capsys)
    assert "teacher: 1 steps" in run(["--steps", "3", "--teacher-steps", "1", *tiny], capsys)


def test_gpt2s_schedule_is_the_papers():
    preset = train_small.PRESETS["gpt2"]
    assert (
        preset.gpt.n_layer,
        preset.gpt.n_embd,
        preset.gpt.block_size,
        preset.gpt.vocab_size,
    ) == (
        12,
        768,
        512,
        50257,
    )
    assert (preset.teacher_epochs, preset.student_epochs) == (3, 90)
    for config in (preset.teacher, preset.student):
        assert (config.batch_size, config.lr) == (4, 1e-4)
    tokens = torch.zeros(1_000_000)
    assert train_small.limit(preset.teacher, 3, 512, tokens) == math.ceil(3 * 1_000_000 / (4 * 512))


def test_four_bits_are_trained_too_and_nothing_is_packed(tiny, capsys, tmp_path):
    run(["--bits", "4", *tiny], capsys)
    row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert row["bits"] == 4 and row["bytes_packed"] is row["linear_bytes_packed"] is None


def test_a_four_bit_student_has_a_learning_rate_of_its_own_and_lr_replaces_both(
    tiny, capsys, monkeypatch
):
    rates, train = [], tsld.train

    def spy(model, tokens, config, teacher=None, *rest):
        if teacher is not None:
            rates.append(config.lr)
        return train(model, tokens, config, teacher, *rest)

    monkeypatch.setattr(tsld, "train", spy)
    for bits in ("2", "4"):
        run(["--bits", bits, *tiny], capsys)
        run(["--bits", bits, "--lr", "0.5", *tiny], capsys)
    preset = train_small.PRESETS["tiny"]
    assert (
        rates == [preset.student.lr, 0.5, preset.lr_4bit, 0.5]
        and preset.lr_4bit < preset.student.lr
    )
    assert (
        train_small.student_lr(train_small.PRESETS["gpt2"], 4) == 1e-4
    )  # the paper's, whatever the bits


def test_the_teacher_is_kept_in_bfloat16_where_its_perplexity_is_the_same_to_three_digits(
    tiny, capsys, monkeypatch
):
    taught_by, train = [], tsld.train

    def spy(model, tokens, config, teacher=None, *rest):
        taught_by.append(None if teacher is None else teacher.wte.weight.dtype)
        return train(model, tokens, config, teacher, *rest)

    monkeypatch.setattr(tsld, "train", spy)
    out = run(["--dtype", "bfloat16", *tiny], capsys)
    assert "teacher for distillation: bfloat16 (perplexity " in out
    run(["--dtype", "float32", *tiny], capsys)
    evaluate, loss = tsld.evaluate, {torch.bfloat16: math.log(1.01), torch.float32: 0.0}

    def worse(model, *rest):
        return evaluate(model, *rest) + loss[model.ln_f.weight.dtype]

    monkeypatch.setattr(tsld, "evaluate", worse)
    out = run(["--dtype", "bfloat16", *tiny], capsys)
    assert "teacher for distillation: float32; in bfloat16 (perplexity " in out
    assert taught_by[::2] == [None] * 3  # the teachers' own training
    assert taught_by[1::2] == [torch.bfloat16, torch.float32, torch.float32]


def test_every_ternary_student_is_saved_packed_and_generates_text(tiny, capsys, tmp_path):
    assert "--generate" in run(["--loss", "all", *tiny], capsys)
    tokenizer = train_small.load_tokenizer("bpe2048")
    valid = torch.tensor(
        tokenizer.encode_ordinary(texts.split_text((WORDS * 40).encode())["valid"])
    )
    for row in json.loads((tmp_path / "out" / "results.json").read_text()):
        path = tmp_path / "out" / f"student-{row['loss']}.packed"
        assert row["bytes_packed"] == path.stat().st_size
        assert row["linear_bytes_fp32"] == 16 * row["linear_bytes_packed"]
        packed = tsld.load_model(path)
        assert math.exp(tsld.evaluate(packed, valid, 16)) == pytest.approx(
            row["student_ppl"], rel=5e-4
        )
        prompt = torch.tensor([tokenizer.encode_ordinary("the quick")])
        asked = ["--generate", str(path), "--prompt", "the quick", "--seed", "7", "--device", "cpu"]
        printed = run(asked, capsys)
        torch.manual_seed(7)
        expected = packed.generate(prompt, 16 - prompt.shape[1], temperature=0.8, top_k=200)[0]
        assert printed == tokenizer.decode(expected.tolist()) + "\n"


def student_weights(folder):
    return tsld.read_file(folder / "student-tsld.pt")["model"]


KILLED = """
import os, signal, sys
import torch, train_small, tsld
from dataclasses import replace
torch.set_num_threads(1)
preset = train_small.PRESETS["tiny"]
gpt = tsld.GPTConfig(block_size=16, vocab_size=2048, n_layer=1, n_head=2, n_embd=8)
teacher = replace(preset.teacher, steps=4, batch_size=4)
student = replace(preset.student, steps=6, batch_size=4)
new = replace(preset, gpt=gpt, teacher=teacher, student=student, student_tokens=300)
train_small.PRESETS["tiny"] = new
train_small.CHECKPOINT_SECONDS = 0
write = tsld.write_file
def write_and_die(path, content):
    write(path, content)
    if "student" in str(path) and content["step"] == 3:  # not yet under its name
        os.kill(os.getpid(), signal.SIGKILL)
tsld.write_file = write_and_die
train_small.main(sys.argv[1:])
"""


def test_a_killed_run_resumed_ends_with_the_very_same_weights(tiny, capsys, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, *tiny], cwd=HERE, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert tsld.read_file(tmp_path / "out" / "student-tsld.pt")["step"] == 2
    run(["--resume", *tiny], capsys)
    resumed = student_weights(tmp_path / "out")
    run([*tiny[:2], "--out", str(tmp_path / "uninterrupted"), "--device", "cpu"], capsys)
    uninterrupted = student_weights(tmp_path / "uninterrupted")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


TOGETHER = """
import os, signal, sys
import torch, train_small, tsld
from dataclasses import replace
torch.set_num_threads(1)
preset = train_small.PRESETS["tiny"]
gpt = tsld.GPTConfig(block_size=16, vocab_size=2048, n_layer=1, n_head=2, n_embd=8)
teacher = replace(preset.teacher, steps=4, batch_size=4)
student = replace(preset.student, steps=6, batch_size=4)
new = replace(preset, gpt=gpt, teacher=teacher, student=student, student_tokens=300)
train_small.PRESETS["tiny"] = new
show = train_small.show_progress
def show_and_stop(text, last=False):
    show(text, last)
    if text.startswith(os.environ["STOP_AT"]) and os.environ["RANK"] == "1":  # all stop
        signal.raise_signal(signal.SIGTERM)
train_small.show_progress = show_and_stop
sys.exit(train_small.main(sys.argv[1:]))
"""


def has_loopback():
    """Processes talk over 127.0.0.1, which a machine cut off from every network may not have."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=1).close()
        return True
    except OSError:
        return False


def run_together(tmp_path, flags, program="together.py", torchrun=False, **environment):
    """Two processes, started by torchrun or, which is faster, as it starts them; returns the first
    one, with what it printed."""
    (tmp_path / "together.py").write_text(TOGETHER)
    environment = {"STOP_AT": "never", **environment}
    environment |= {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    program = [tmp_path / program, *map(str, flags)]
    if torchrun:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program]
        run = [sys.executable, *command]
        return subprocess.run(run, capture_output=True, env=environment, timeout=120, text=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    environment |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen([sys.executable, *program], env=environment | {"RANK": rank}, **pipes)
        for rank in "01"
    ]
    printed = [process.communicate(timeout=120) for process in both]
    return subprocess.CompletedProcess(program, both[0].returncode, *printed[0])


MEMORY_OF_TWO = """
import torch, train_small, tsld
from data.evidence import bench
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
device, text = torch.device("cpu"), torch.arange(10_000) % 2048
for layers, batch in ((2, 4), (12, 16)):
    teacher = tsld.GPT(tsld.GPTConfig(128, 2048, layers, 4, 128))
    student = train_small.spread(tsld.quantize_model(tsld.GPT(teacher.config)), device)
    teacher = train_small.spread(teacher, device)
    for _ in tsld.train(student, text, tsld.TrainConfig(steps=2, batch_size=batch), teacher):
        pass
    if torch.distributed.get_rank() == 0:
        print(bench.peak_memory())
    del teacher, student
"""


@pytest.mark.skipif(not has_loopback(), reason="no loopback network")
def test_memory_on_paper_of_two_gpus_is_that_of_two_processes(tmp_path):
    if not bench.peak_memory():
        pytest.skip("this system does not say how much memory a process had")
    (tmp_path / "memory.py").write_text(MEMORY_OF_TWO)
    # Without it glibc keeps much of what is freed, in pieces too small to be used again.
    together = run_together(tmp_path, [], "memory.py", MALLOC_MMAP_THRESHOLD_="65536")
    small, large = map(int, together.stdout.split())  # their difference is free of torch's own
    paper = []
    for layers, batch in ((2, 4), (12, 16)):
        shape = bench.Shape(layers, 128, 512, 2048, 128)
        paper.append(bench.memory_on_paper(shape, batch, 128, "float32", gpus=2)["training"])
    assert large - small == pytest.approx(paper[1] - paper[0], rel=0.15)


ANSWERS_OF_TWO = """
import json, torch, train_small, tsld
from data import tasks
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = tsld.GPT(tsld.GPTConfig(32, 2048, 2, 2, 16)).eval()
vocabulary = train_small.load_tokenizer("bpe2048")
vocabulary.end_of_text = None
vocabulary.decode = lambda ids: f"#### {sum(ids)}"  # a number for every answer
new = model.generate(torch.tensor([vocabulary.encode_ordinary("the cat")]), 16, temperature=0)
answer = vocabulary.decode(new[0, -16:].tolist())
examples = [tasks.Example("the cat", (answer,), 0), tasks.Example("a dog", (answer,), 0)]
spread = train_small.spread(model, torch.device("cpu"))
scored = [tasks.evaluate_task(m, vocabulary, examples, 32) for m in (model, spread)]
if torch.distributed.get_rank() == 0:
    print(json.dumps(scored))
"""


@pytest.mark.skipif(not has_loopback(), reason="no loopback network")
def test_two_processes_that_share_the_weights_answer_as_one(tmp_path):
    (tmp_path / "answers.py").write_text(ANSWERS_OF_TWO)
    one, two = json.loads(run_together(tmp_path, [], "answers.py").stdout)
    assert two[0] == pytest.approx(one[0]) and two[1:] == one[1:]
    assert one[-1] == {"accuracy": 0.5}


@pytest.mark.skipif(not has_loopback(), reason="no loopback network")
def test_two_processes_that_share_the_weights_train_and_score_as_one(tiny, capsys, tmp_path):
    flags = ["--loss", "all", "--dtype", "float32", *tiny]
    together = run_together(tmp_path, flags, torchrun=True)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("corpus: ") == 1  # the first process alone prints
    run([*flags[:-3], str(tmp_path / "alone"), "--device", "cpu"], capsys)
    folders = [tmp_path / folder for folder in ("out", "alone")]
    rows = [json.loads((folder / "results.json").read_text()) for folder in folders]
    for two, one in zip(*rows, strict=True):
        for name in SCORES:
            assert two[name] == pytest.approx(one[name], rel=1e-4)
    for loss in tsld.LOSSES:
        files = [tsld.read_file(folder / f"student-{loss}.pt") for folder in folders]
        assert files[0]["step"] == files[1]["step"] == 6
        for name, weight in files[0]["model"].items():
            torch.testing.assert_close(weight, files[1]["model"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not has_loopback(), reason="no loopback network")
def test_what_two_processes_left_off_one_resumes(tiny, capsys, tmp_path):
    flags = ["--loss", "l2l", "--dtype", "float32", *tiny]
    stopped = run_together(tmp_path, flags, STOP_AT="student, l2l: step 2/6")
    assert "stopped after step 2 of 6; go on with the same command and --resume" in stopped.stderr
    resumed = run([*flags, "--resume"], capsys)
    assert "student, l2l: step 6/6" in resumed and "student, l2l: step 2/6" not in resumed
    run([*flags[:-3], str(tmp_path / "alone"), "--device", "cpu"], capsys)
    files = [tsld.read_file(tmp_path / f / "student-l2l.pt") for f in ("out", "alone")]
    for name, weight in files[0]["model"].items():
        torch.testing.assert_close(weight, files[1]["model"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tiny, capsys, tmp_path, monkeypatch, number):
    show, handler = train_small.show_progress, signal.getsignal(signal.SIGINT)

    def interrupted(text, last=False):
        if text.startswith("student, tsld: step 2/"):
            signal.raise_signal(number)
        show(text, last)

    monkeypatch.setattr(train_small, "show_progress", interrupted)
    assert train_small.main(tiny) == 130
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("stopped after step 2 of 6; go on with the same command and --resume")
    )
    assert tsld.read_file(tmp_path / "out" / "student-tsld.pt")["step"] == 2
    assert signal.getsignal(signal.SIGINT) is handler  # a background shell may ignore it


@pytest.mark.parametrize("moment", ["the last step", "its checkpoint"])
def test_a_signal_at_the_end_of_a_training_stops_the_run_too(
    moment, tiny, capsys, tmp_path, monkeypatch
):
    show, save = train_small.show_progress, train_small.save_checkpoint

    def interrupt_step(text, last=False):
        if text.startswith("student, tsld: step 6/6"):
            signal.raise_signal(signal.SIGTERM)
        show(text, last)

    def interrupt_saving(path, *arguments):
        if path.name == "student-tsld.pt":
            signal.raise_signal(signal.SIGTERM)
        save(path, *arguments)

    with monkeypatch.context() as patch:
        if moment == "the last step":
            patch.setattr(train_small, "show_progress", interrupt_step)
        else:
            patch.setattr(train_small, "save_checkpoint", interrupt_saving)
        assert train_small.main(tiny) == 130
    words = {
        "the last step": "stopped after step 6 of 6; go on with the same command and --resume",
        "its checkpoint": "interrupted; the checkpoints so far are kept",
    }
    assert capsys.readouterr().err == f"error: {words[moment]}\n"
    out = run([*tiny, "--resume"], capsys)
    assert "student, tsld: step" not in out and (tmp_path / "out" / "results.json").exists()


def test_an_interrupted_run_goes_on_in_the_folder_of_an_earlier_one(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "LOSSES", ("gt", "tsld"))
    flags, show = ["--loss", "all", "--teacher-steps", "2", *tiny], train_small.show_progress
    run([*flags, "--steps", "2"], capsys)
    earlier = (tmp_path / "out" / "student-tsld.pt").read_bytes()

    def interrupted(text, last=False):
        if text.startswith("student, gt: step 2/"):
            signal.raise_signal(signal.SIGTERM)
        show(text, last)

    with monkeypatch.context() as patch:
        patch.setattr(train_small, "show_progress", interrupted)
        assert train_small.main([*flags, "--steps", "3"]) == 130
    assert "step 3/3" in run([*flags, "--steps", "3", "--resume"], capsys)
    file = tsld.read_file(tmp_path / "out" / "student-tsld.pt")
    assert file["step"] == 3
    assert (tmp_path / "out" / "student-tsld.previous.pt").read_bytes() == earlier  # not lost


def source(argv, device):
    args = train_small.parse(argv)
    return train_small.choose_source(args, torch.device(device))


def test_a_gpu_without_gpt2s_vocabulary_or_weights_uses_tiny_and_says_so(
    monkeypatch, capsys, no_network, tmp_path
):
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(exchange, "DATA", tmp_path)
    for encoding in (unreachable, lambda name: SimpleNamespace(eot_token=50256)):
        monkeypatch.setattr(texts.tiktoken, "get_encoding", encoding)
        found = source([], "cuda")
        assert (found.name, found.tokenizer.name, found.init) == ("tiny", "bpe2048", "scratch")
        assert "model: tiny, instead of gpt2: " in capsys.readouterr().out
    with pytest.raises(train_small.UserError, match="no route to host.*--init scratch"):
        source(["--model", "gpt2"], "cuda")  # pretrained is the default
    monkeypatch.setattr(texts.tiktoken, "get_encoding", unreachable)
    with pytest.raises(train_small.UserError, match="--model tiny"):
        source(["--model", "gpt2"], "cuda")
    assert source([], "cpu").name == "tiny"


def test_published_weights_start_the_teacher_and_their_absence_is_one_clear_line(
    tiny, capsys, monkeypatch, tmp_path, no_network
):
    monkeypatch.setattr(exchange, "DATA", tmp_path)
    monkeypatch.setattr(
        train_small,
        "load_tokenizer",
        lambda name, exact=train_small.load_tokenizer: exact("bpe2048"),
    )
    tiny_preset = train_small.PRESETS["tiny"]
    wide = replace(tiny_preset.gpt, n_embd=64, n_head=1)
    small = replace(tiny_preset, tokenizer="gpt2", gpt=wide)
    monkeypatch.setitem(train_small.PRESETS, "gpt2", small)
    refused(["--model", "gpt2", *tiny], capsys, "go online once, or use --init scratch")
    refused(["--model", "tiny", "--init", "pretrained", *tiny], capsys, "--init pretrained")
    long = ["--model", "gpt2", "--block-size", "1025", *tiny]
    refused(long, capsys, "--block-size 1025: gpt2 takes 1024 tokens at most")
    torch.manual_seed(5)
    weights = GPT(replace(small.gpt, block_size=20))
    path = tmp_path / "weights" / "gpt2.bin"
    torch.save(published(weights.state_dict(), ""), path)
    with pytest.raises(train_small.UserError, match="does not match its SHA-256"):
        source(["--model", "gpt2"], "cpu")
    monkeypatch.setitem(train_small.PUBLISHED, "gpt2", sha256(path.read_bytes()))
    found = source(["--model", "gpt2"], "cpu")
    assert found.init == "pretrained" and found.model.config.block_size == small.gpt.block_size
    assert torch.equal(found.model.h[0].mlp.c_fc.weight, weights.h[0].mlp.c_fc.weight)
    with pytest.raises(tsld.CheckpointError, match="another model than gpt2"):  # it has 20
        source(["--model", "gpt2", "--block-size", "1024"], "cpu")
    cropped = source(["--model", "gpt2", "--block-size", "7"], "cpu").model
    assert torch.equal(cropped.wpe.weight, weights.wpe.weight[:7])
    run(["--model", "gpt2", *tiny], capsys)
    assert json.loads((tmp_path / "out" / "results.json").read_text())[0]["model"] == "gpt2"


@pytest.fixture
def theirs(tmp_path):
    """A tiny OPT with a tokenizer of bytes, saved as transformers does."""
    transformers, tokenizers = (
        pytest.importorskip("transformers"),
        pytest.importorskip("tokenizers"),
    )
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    folder = tmp_path / "tiny-opt"
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    shape = FAMILIES["OPTForCausalLM"][0] | {"vocab_size": 256, "max_position_embeddings": 600}
    torch.manual_seed(0)
    transformers.OPTForCausalLM(transformers.OPTConfig(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loss", ["tsld", "l2l"])
def test_a_model_of_transformers_is_trained_with_its_own_tokenizer(
    loss, theirs, tiny, capsys, tmp_path
):
    out = run(
        ["--model", str(theirs), "--loss", loss, "--steps", "3", "--batch-size", "2", *tiny], capsys
    )
    assert f"student, {loss}: 3 steps" in out
    row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert row["model"] == row["tokenizer"] == str(theirs)
    # A token is a byte, so bits per byte are bits per token.
    assert row["student_bpb"] == pytest.approx(math.log2(row["student_ppl"]), rel=1e-6)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(theirs)
    tokens = torch.tensor(list(texts.split_text((WORDS * 40).encode())["valid"].encode()))
    names = sorted(tokenizers_alphabet().items(), key=lambda item: item[1])
    ids = torch.tensor(
        [[index for index, (byte, _) in enumerate(names) if byte == t][0] for t in tokens.tolist()]
    )
    packed = tsld.load_model(tmp_path / "out" / f"student-{loss}.packed", into=model)
    assert math.exp(tsld.evaluate(packed, ids, 512)) == pytest.approx(row["student_ppl"], rel=2e-3)


def test_a_teacher_is_found_again_only_where_it_starts_from_the_same_weights(theirs, tiny, capsys):
    import transformers

    flags = ["--model", str(theirs), "--steps", "1", *tiny]
    assert "found there" not in run(flags, capsys)
    assert "found there" in run(flags, capsys)
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs)
    model.get_input_embeddings().weight.data[3] += 1
    model.save_pretrained(theirs)
    assert "found there" not in run(flags, capsys)


def test_a_model_of_transformers_takes_blocks_up_to_its_own_length(theirs, tiny, capsys, tmp_path):
    flags = ["--model", str(theirs), "--steps", "1", *tiny]
    refused([*flags, "--block-size", "601"], capsys, "--block-size 601: ")
    for size in (600, 2):
        run([*flags, "--block-size", str(size)], capsys)
        (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
        assert row["tokens_per_second"] == pytest.approx(4 * size / row["train_seconds"])


def test_a_model_that_does_not_fit_its_tokenizer_or_the_loss_is_refused(theirs, tiny, capsys):
    import transformers

    shape = FAMILIES["OPTForCausalLM"][0] | {"vocab_size": 100, "max_position_embeddings": 600}
    transformers.OPTForCausalLM(transformers.OPTConfig(**shape)).save_pretrained(theirs)
    words = f"the tokenizer of {theirs} makes token "
    assert "teacher" not in refused(["--model", str(theirs), *tiny], capsys, words)
    shape = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2}
    transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).save_pretrained(theirs)
    flags = ["--model", str(theirs), "--loss", "l2l", *tiny]
    assert "teacher" not in refused(flags, capsys, "L2L compares attentions, and this model has")
    shape = SMALL | {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**shape, intermediate_size=8, is_decoder=True)
    model = transformers.RobertaForCausalLM(config)
    assert not exchange.logits_are_hidden_times_head(model)  # its head has layers of its own


def tokenizers_alphabet():
    """Byte to the character that stands for it in byte-level BPE: itself where it is printable,
    else the next one from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def test_the_recipe_in_the_readme_runs_as_written(theirs, tmp_path, monkeypatch, capsys):
    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        kind = getattr(transformers, name)
        load = kind.from_pretrained
        monkeypatch.setattr(
            kind, "from_pretrained", lambda name, load=load, **how: load(theirs, **how)
        )
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(WORDS * 60)
    recipe = (HERE / "README.md").read_text().split("```python\n")[2].split("```")[0]
    assert "facebook/opt-125m" in recipe
    names = {}
    exec(recipe, names)
    assert isinstance(names["student"].model.decoder.layers[1].fc2, tsld.PackedLinear)
    printed = capsys.readouterr().out
    assert printed.startswith("1 ") and "\n300 " in printed
    assert "\nthe company said" in printed
    assert Path("opt.packed").stat().st_size < 100_000


def read_csv(path):
    header, *lines = path.read_text().splitlines()
    rows = [[float(x) for x in line.split(",")] for line in lines]
    return dict(zip([title.strip('"') for title in header.split('","')], zip(*rows)))


@pytest.mark.parametrize("drawn", [True, False])
def test_figures_are_drawn_and_their_numbers_kept(drawn, tiny, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "figures"
    folder.mkdir()
    monkeypatch.setattr(figures, "FOLDER", folder)
    monkeypatch.setattr(figures, "SHOWN", 2)
    exact = importlib.util.find_spec
    if not drawn:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name != "matplotlib" and exact(name)
        )
    elif not exact("matplotlib"):
        pytest.skip("matplotlib is not installed")
    argv = ["--dtype", "float32", "--steps", "6", "--tsld-temperature", "20", *tiny]
    out = run(argv, capsys, figures.main)
    names = [
        "0-method",
        "1-error-by-position",
        "2-distance-to-teacher",
        "3-training-curves",
        "4-confidence",
    ]
    numbers = ["0-sentence", *names[1:4], "4-change-by-confidence", names[4]]
    assert sorted(path.stem for path in folder.glob("*.csv")) == numbers
    assert sorted(path.stem for path in folder.glob("*.png")) == (names if drawn else [])
    assert drawn or "the package matplotlib would draw them" in out
    said = dict(re.findall(r"student, (\w+): validation perplexity ([\d.]+)", out))
    curves = read_csv(folder / "3-training-curves.csv")
    assert curves["step"] == (1, 2, 3, 4, 5, 6)
    for loss in ("logit", "logit_gt", "tsld"):
        assert curves[f"{loss}, validation"][-1] == pytest.approx(
            math.log(float(said[loss])), abs=1e-4
        )
    error = read_csv(folder / "1-error-by-position.csv")
    assert len(error) == 1 + 3 * 2 and error["position"] == tuple(range(1, 17))
    distance = read_csv(folder / "2-distance-to-teacher.csv")
    assert set(distance) == {"without training", "l2l", "logit"} and min(distance["logit"]) > -1e-5
    tokens = read_csv(folder / "4-confidence.csv")
    scale, ce = np.array(tokens["token scale times N"]), np.array(tokens["cross-entropy"])
    whole = np.exp(ce / 20).reshape(-1, 16)
    np.testing.assert_allclose(
        scale.reshape(-1, 16), 16 * whole / whole.sum(1, keepdims=True), rtol=1e-3
    )
    models = {}
    for name, path in (
        ("teacher", next((tmp_path / "out").glob("teacher-*.pt"))),
        *((loss, tmp_path / "out" / f"student-{loss}.pt") for loss in ("logit", "tsld")),
    ):
        model = GPT(train_small.PRESETS["tiny"].gpt)
        models[name] = model if name == "teacher" else tsld.quantize_model(model)
        model.load_state_dict(tsld.read_file(path)["model"])
    student = tsld.read_file(tmp_path / "out" / "student-tsld.pt")
    assert student["identity"]["gt_weight"] == 0.0  # the printed formula
    text = texts.split_text((WORDS * 40).encode())["valid"]
    valid = torch.tensor(train_small.load_tokenizer("bpe2048").encode_ordinary(text))
    B = (len(valid) - 1) // 16
    ids, true = valid[: 16 * B].view(B, 16), valid[1 : 16 * B + 1].view(B, 16)
    losses = {
        name: F.cross_entropy(model(ids).transpose(1, 2), true, reduction="none")
        .flatten()
        .detach()
        .numpy()
        for name, model in models.items()
    }
    change = losses["tsld"] - losses["logit"]
    assert B > 2  # blocks: as many are shown, and the changes are those of all
    np.testing.assert_allclose(tokens["TSLD minus logit"], change[: 2 * 16], rtol=1e-3, atol=1e-5)
    ours, theirs = (
        models[name](ids[:2]).detach().double().numpy() for name in ("logit", "teacher")
    )
    expected = ((ours - theirs) ** 2).sum((0, 2)) / (theirs**2).sum((0, 2))
    np.testing.assert_allclose(error["logit, logits"], expected, rtol=1e-4)
    changes = read_csv(folder / "4-change-by-confidence.csv")
    assert changes["tokens"] == (16 * B, 0) and np.isnan(
        changes["mean change"][1]
    )  # it learned too little to be sure
    # A finished run, resumed: the curves are still those of its training.
    sure = softmax64(models["teacher"](ids).detach()).max(-1).flatten()
    monkeypatch.setattr(figures, "SURE", float(np.median(sure)))
    before = (folder / "3-training-curves.csv").read_text()
    run([*argv, "--resume"], capsys, figures.main)
    assert (folder / "3-training-curves.csv").read_text() == before
    changes = read_csv(folder / "4-change-by-confidence.csv")
    for i, region in enumerate((change[sure <= figures.SURE], change[sure > figures.SURE])):
        assert changes["tokens"][i] == len(region) > 1
        assert changes["mean change"][i] == pytest.approx(region.mean(), rel=1e-3, abs=1e-5)
        spread = region.std(ddof=1) / math.sqrt(len(region))
        assert changes["standard error"][i] == pytest.approx(spread, rel=0.01, abs=1e-6)


def test_a_run_has_the_settings_that_measured_best_and_the_table_the_papers_temperature(tiny):
    def temperatures(*flags):
        setup = train_small.set_up(train_small.parse([*flags, *tiny]))
        wanted = [
            config for _, config in table.wanted_rows(table.set_up([*flags, *tiny])) if config
        ]
        plain = {config.temperature for config in wanted if config.loss == "logit"}
        return setup.student.temperature, plain, {c.temperature for c in wanted} - plain

    assert temperatures() == (20.0, {10.0}, {1.0, 2.0, 5.0, 20.0})
    assert temperatures("--tsld-temperature", "7") == (7.0, {7.0}, {1.0, 2.0, 5.0, 10.0, 20.0})
    assert train_small.PRESETS["gpt2"].student.temperature == 10.0
    assert train_small.PRESETS["gpt2"].student.gt_weight == 0.0
    for flags, weight in (([], 0.25), (["--gt-weight", "0"], 0.0), (["--gt-weight", "1"], 1.0)):
        assert train_small.set_up(train_small.parse([*flags, *tiny])).student.gt_weight == weight


def test_the_table_has_every_row_of_the_papers_and_goes_on_where_it_stopped(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    tiny += ["--steps", "6"]
    monkeypatch.setattr(table, "SEEDS", (0, 1))
    out = run(tiny, capsys, table.main)
    path = tmp_path / "table.json"
    rows = json.loads(path.read_text())
    methods = collections.Counter((row["bits"], row["method"]) for row in rows)
    once = [(32, "teacher"), (4, "round-to-nearest"), (4, "OPTQ"), (4, "AWQ"), (2, "ternarized")]
    assert methods == {key: 1 for key in once} | {
        **{(4, loss): 2 for loss in ("logit", "logit_gt", "tsld")},
        **{(2, loss): 2 for loss in ("l2l", "logit", "logit_gt", "gt")},
        (2, "tsld"): 2 * (1 + 6),
    }
    assert all(row[key] for row in rows for key in ("command", "commit", "machine", "date"))
    preset = train_small.PRESETS["tiny"]
    assert {(row["bits"], row["lr"]) for row in rows if "lr" in row} == {
        (2, preset.student.lr),
        (4, preset.lr_4bit),
    }
    assert not list((tmp_path / "out").glob("student-*"))
    values = [row["valid_ppl"] for row in rows if (row["bits"], row["method"]) == (2, "gt")]
    cell = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert f"| 2 | gt |  |  | 2 | {cell} |" in out

    # Rows of another rate or another teacher neither count as done nor show.
    other = [row | {"lr": 1.0, "valid_ppl": 1e9} for row in rows if "lr" in row]
    other += [row | {"teacher": "another", "valid_ppl": 1e9} for row in rows]
    path.write_text(json.dumps(other + rows[3:-2]))
    out = run(tiny, capsys, table.main)
    assert out.count("student, tsld-2-10.0-1.0-1: 6 steps") == 1 and "student, logit-2-" not in out
    assert f"| 2 | gt |  |  | 2 | {cell} |" in out
    again = json.loads(path.read_text())[len(other) :]
    key = lambda row: json.dumps(
        {k: v for k, v in row.items() if k not in ("date", "command")}, sort_keys=True
    )
    assert sorted(map(key, again)) == sorted(map(key, rows))

    setup = table.set_up(["--lr", "0.5", *tiny])
    assert {config.lr for _, config in table.wanted_rows(setup) if config} == {0.5}

    run(["--loss", "logit", *tiny], capsys)
    single = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    row = next(r for r in rows if (r["bits"], r["method"], r.get("seed")) == (2, "logit", 0))
    assert (single["student_ppl"], single["test_student_bpb"]) == (
        row["valid_ppl"],
        row["test_bpb"],
    )
    for bits, method, granularity in (
        (2, "ternarized", "tensor"),
        (4, "round-to-nearest", "channel"),
    ):
        run(["--bits", str(bits), "--granularity", granularity, *tiny], capsys)
        single = json.loads((tmp_path / "out" / "results.json").read_text())[0]
        assert single["ptq_ppl"] == next(r["valid_ppl"] for r in rows if r["method"] == method)


def test_the_task_tables_have_every_student_and_go_on_where_they_stopped(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(accuracy, "FOLDER", tmp_path)
    monkeypatch.setattr(tasks, "load_task", {"rte": (QUESTIONS * 20, QUESTIONS)}.get)
    for seed in "01":
        flags = ["--task", "rte", "--steps", "3", "--seed", seed, *tiny[2:]]
        out = run(flags, capsys, accuracy.main)
    rows = json.loads((tmp_path / "accuracy-1.json").read_text())
    known = [(r["bits"], r["loss"], r["gt_weight"], r["config"]["temperature"]) for r in rows]
    assert known == [(bits, *student) for bits in (4, 2) for student in accuracy.STUDENTS]
    assert {row["config"]["seed"] for row in rows} == {1}
    assert "Infinity" not in (tmp_path / "accuracy-1.json").read_text()
    assert {(row["bits"], row["config"]["lr"]) for row in rows} == {(2, 1e-3), (4, 1e-4)}
    both = rows + json.loads((tmp_path / "accuracy-0.json").read_text())
    assert len({row["teacher_ppl"] for row in both}) == 1  # one teacher
    names = [
        *("logit", "logit_gt", "tsld, τ 10"),
        *(f"{x} + ground truth · 0.25" for x in ("tsld, τ 10", "logit")),
        *("tsld, τ 2", "tsld, τ 5"),
    ]
    for number, name in enumerate(names, 7):
        values = [file[number]["student_ppl"] for file in (both[:14], both[14:])]
        cell = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (2)"
        assert re.search(rf"\| 2 \| {re.escape(f'{name} | {cell}')} \|", out)
    (tmp_path / "accuracy-1.json").write_text(json.dumps(rows[:11]))
    out = run(flags, capsys, accuracy.main)
    assert "3 of 3: " in out and "4 of" not in out
    again = json.loads((tmp_path / "accuracy-1.json").read_text())
    assert [row["student_ppl"] for row in again] == [row["student_ppl"] for row in rows]
    rounded = {}
    for granularity in ("tensor", "channel"):
        flags = ["--task", "rte", "--steps", "3", "--granularity", granularity, *tiny[2:]]
        run(flags, capsys)
        (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
        rounded[granularity] = row["ptq_ppl"]
    run(flags, capsys, accuracy.main)
    rows = json.loads((tmp_path / "accuracy-0.json").read_text())
    found = {row["granularity"]: row["rounded_ppl"] for row in rows if row["bits"] == 2}
    assert found == rounded and found["tensor"] != found["channel"]


def test_the_task_tables_take_a_text_and_no_token_scale_is_logit_distillation(
    tiny, capsys, tmp_path, monkeypatch, small_vocabulary
):
    monkeypatch.setattr(accuracy, "FOLDER", tmp_path)
    students = ("logit", 0.0, 10.0), ("tsld", 0.0, None), ("tsld", 0.0, 0.02)
    monkeypatch.setattr(accuracy, "STUDENTS", students)
    monkeypatch.setattr(figures, "SURE", 0.0006)  # of 2,048 tokens; this teacher has hardly learned
    out = run([*tiny, "--steps", "20", "--dtype", "float32"], capsys, accuracy.main)
    rows = json.loads((tmp_path / "accuracy-0.json").read_text())
    assert {row["task"] for row in rows} == {Path(tiny[1]).name} and len(rows) == 6
    text = torch.tensor(
        small_vocabulary.encode_ordinary(texts.split_text((WORDS * 40).encode())["train"])
    )
    teacher = GPT(train_small.PRESETS["tiny"].gpt)
    (path,) = (tmp_path / "out").glob("teacher-*.pt")
    teacher.load_state_dict(tsld.read_file(path)["model"])
    own = math.exp(tsld.evaluate(teacher, text[:300], 16))
    assert rows[0]["teacher_train_ppl"] == pytest.approx(own, rel=1e-6)
    blocks = text[:288].view(18, 16)  # of 300 tokens
    sure = (softmax64(teacher(blocks).detach()).max(-1) > 0.0006).mean()
    assert 0 < sure < 1
    assert rows[0]["teacher_sure"] == pytest.approx(sure, abs=1e-2)
    share = rows[0]["teacher_sure"]
    line = f"the teacher's perplexity on its own text: {own:.2f}; it is sure of {share:.1%}\n"
    assert line in out
    for bits in (rows[:3], rows[3:]):
        logit, unscaled, scaled = (row["student_ppl"] for row in bits)
        assert unscaled == pytest.approx(logit, rel=1e-6)
        assert scaled != pytest.approx(logit, rel=1e-6)


@pytest.fixture
def small_map(tiny, tmp_path, monkeypatch):
    """The flags of a map of three mixes, the mixes, and its corpus."""
    monkeypatch.setattr(regimes, "FOLDER", tmp_path)
    monkeypatch.setattr(regimes, "PRETRAINING", replace(regimes.PRETRAINING, steps=2, batch_size=4))
    monkeypatch.setattr(regimes, "FINE_TUNING", replace(regimes.FINE_TUNING, batch_size=4))
    monkeypatch.setattr(regimes, "other_text", lambda tokenizer: torch.arange(900) % 2048)
    mixes = [("tsld", None, 0.0), ("tsld", 10.0, 0.25), ("gt", None, None)]
    monkeypatch.setattr(regimes, "MAP", ((2, "tensor", 16, (1, 3), mixes),))
    texts_of = texts.split_text((WORDS * 40).encode())
    monkeypatch.setattr(train_small, "load_corpus", lambda choice: ("ptb", "a text", texts_of))
    return tiny[2:], mixes, texts_of


def test_the_map_has_every_teacher_and_mix_and_goes_on_where_it_stopped(
    small_map, capsys, tmp_path, monkeypatch
):
    flags, mixes, _ = small_map
    short = replace(train_small.PRESETS["tiny"], student_tokens=100)
    monkeypatch.setitem(train_small.PRESETS, "tiny", short)
    out = run(flags, capsys, regimes.main)
    rows = json.loads((tmp_path / "regimes-0.json").read_text())
    seen = [(row["teacher_epochs"], row["temperature"], row["gt_weight"]) for row in rows]
    assert seen == [(epochs, *mix[1:]) for epochs in (1, 3) for mix in mixes]
    assert [row["config"]["loss"] for row in rows] == 2 * ["tsld", "tsld", "gt"]
    assert [row["config"]["gt_weight"] for row in rows] == 2 * [0.0, 0.25, 0.0]
    assert "Infinity" not in (tmp_path / "regimes-0.json").read_text()
    # 100 tokens, 4 pieces of 16: an epoch is 1.56 steps.
    assert {row["config"]["steps"] for row in rows} == {25}
    assert "teacher, 3 epochs: step 5/5" in out
    assert len({row["teacher_valid_ppl"] for row in rows}) == 2
    drawn = (tmp_path / "5-regimes.png").exists()
    assert drawn == bool(importlib.util.find_spec("matplotlib"))
    (tmp_path / "regimes-0.json").write_text(json.dumps(rows[:5]))
    steps = []

    def interrupt_once(text, last=False):
        if text.startswith("student"):
            steps.append(int(re.search(r"step (\d+)/25", text)[1]))
            if steps == [*range(1, 10)]:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_small, "show_progress", interrupt_once)
    assert train_small.main(flags, regimes.main) == 130
    assert capsys.readouterr().err.endswith("step 9 of 25; go on with the same command\n")
    out = run(flags, capsys, regimes.main)
    assert "6 of 6: " in out and "5 of 6: " not in out and steps == [*range(1, 26)]
    again = json.loads((tmp_path / "regimes-0.json").read_text())
    assert [row["student_valid_ppl"] for row in again] == [row["student_valid_ppl"] for row in rows]


def test_the_maps_seeds_share_one_pretrained_model(small_map, capsys, tmp_path, monkeypatch):
    flags, mixes, _ = small_map
    monkeypatch.setattr(regimes, "MAP", ((2, "tensor", 1, (1,), mixes[:1]),))
    (tmp_path / "fresh").mkdir()
    rows = {}
    for folder, seed in (("", 0), ("", 1), ("fresh", 1)):  # and the second seed before the first
        monkeypatch.setattr(regimes, "FOLDER", tmp_path / folder)
        out = ["--out", str(tmp_path / folder / "models"), "--seed", str(seed)]
        run([*flags[2:], *out], capsys, regimes.main)
        path = tmp_path / folder / f"regimes-{seed}.json"
        (rows[folder, seed],) = json.loads(path.read_text())
    assert len({row["pretrained"] for row in rows.values()}) == 1
    assert rows["", 0]["teacher_valid_ppl"] != rows["", 1]["teacher_valid_ppl"]
    path.write_text(json.dumps([rows["", 1] | {"pretrained": "another"}]))
    assert train_small.main([*flags[2:], *out], regimes.main) == 2
    assert "are of another pretrained model: move them away" in capsys.readouterr().err


def test_a_row_of_the_map_has_its_teachers_and_its_roundings_perplexity(
    small_map, capsys, tmp_path, monkeypatch, small_vocabulary
):
    flags, mixes, texts_of = small_map
    monkeypatch.setattr(figures, "SURE", 0.0006)  # of 2,048 tokens; this teacher has hardly learned
    parts = (4, "channel", 0, (3,), [regimes.OPTQ]), (2, "channel", 2, (3,), [("l2l", None, None)])
    monkeypatch.setattr(regimes, "TABLE_1_PARTS", parts)
    monkeypatch.setattr(regimes, "MAP", ((2, "tensor", 2, (3,), mixes[:1]), *parts))
    out = run(flags, capsys, regimes.main)
    rows = json.loads((tmp_path / "regimes-0.json").read_text())
    teacher = GPT(train_small.PRESETS["tiny"].gpt)
    path = tmp_path / "out" / "teacher-3-epochs-seed-0.pt"
    teacher.load_state_dict(tsld.read_file(path)["model"])
    ids = {x: torch.tensor(small_vocabulary.encode_ordinary(texts_of[x])) for x in texts_of}
    perplexity = lambda model, part: math.exp(tsld.evaluate(model, part, 16))
    p = softmax64(teacher(ids["train"][:288].view(18, 16)).detach())
    sure = (p.max(-1) > 0.0006).mean()
    assert 0 < sure < 1
    for row in rows:
        rounded = tsld.quantize_model(copy.deepcopy(teacher), row["bits"], row["granularity"])
        expected = perplexity(rounded, ids["valid"])
        assert row["rounded_valid_ppl"] == pytest.approx(expected, rel=1e-6)
        own = perplexity(teacher, ids["train"][:300])
        assert row["teacher_train_ppl"] == pytest.approx(own, rel=1e-6)
        assert row["teacher_sure"] == pytest.approx(sure, abs=1e-2)
    _, optq, l2l = rows
    calibration = ids["train"][:288].view(18, 16)
    expected = perplexity(baselines.optq(teacher, calibration), ids["valid"])
    assert optq["config"] is None and optq["student_valid_ppl"] == pytest.approx(expected, rel=1e-6)
    assert l2l["config"]["loss"] == l2l["loss"] == "l2l"
    for name, row in (("OPTQ", optq), ("L2L+logit", l2l)):
        cells = [f"{row[f'student_{part}_ppl']:.2f} (1)" for part in ("valid", "test")]
        cells = [*cells, "", ""] if name == "OPTQ" else ["", "", *cells]
        assert f"| {name} | {' | '.join(cells)} |\n" in out


def test_the_token_scale_is_judged_by_pairs_of_one_seed_and_one_weight(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(regimes, "FOLDER", tmp_path)
    values = {  # temperature, weight, seed: validation perplexity
        **{(None, 0.0, 0): 50.0, (10.0, 0.0, 0): 51.5},
        **{(None, 0.0, 1): 60.0, (10.0, 0.0, 1): 59.0},
        **{(None, 0.25, 0): 40.0, (10.0, 0.25, 0): 39.0},
        **{(10.0, 0.25, 1): 7.0, (2.0, 0.0, 0): 47.0},  # without a twin, at another temperature
    }
    measured = dict.fromkeys(("teacher_train_ppl", "teacher_valid_ppl", "rounded_valid_ppl"), 9.0)
    measured |= {"bits": 2, "granularity": "tensor", "epochs": 16, "loss": "tsld"}
    rows = [
        measured
        | {"teacher_epochs": 3, "teacher_sure": 0.1 + seed, "temperature": t, "gt_weight": weight}
        | {"seed": seed, "student_valid_ppl": value, "student_test_ppl": value}
        for (t, weight, seed), value in values.items()
    ]
    regimes.draw(rows)
    printed = capsys.readouterr().out
    error = np.std([1.5, -1.0], ddof=1) / 2**0.5
    assert f"| 2 | tensor | 16 | 10 | 0 | +0.25 ± {error:.2f}, 1 of 2 |\n" in printed
    assert "| 2 | tensor | 16 | 10 | 0.25 | -1.00, 1 of 1 |\n" in printed
    assert "| 2 | tensor | 16 | 2 | 0 | -3.00, 1 of 1 |\n" in printed
    spread = np.std([50.0, 60.0], ddof=1)
    head = "| 2 | tensor | 16 | 3 | 9.00 (2) | 60% | 9.00 (2) | 9.00 (2) | no | "
    assert f"{head}55.00 ± {spread:.2f} (2) |  | 40.00 (1) |  |  |  |\n" in printed
    scaled = np.std([51.5, 59.0], ddof=1), np.std([39.0, 7.0], ddof=1)
    scaled = f"55.25 ± {scaled[0]:.2f} (2)", f"23.00 ± {scaled[1]:.2f} (2)"
    assert f"| τ = 10 | {scaled[0]} |  | {scaled[1]} |  |  |  |\n" in printed
    unscaled = f"55.00 ± {spread:.2f} (2)"
    cells = f"|  | 47.00 (1) |  | {scaled[0]} |  | {unscaled} |\n"
    assert f"| 2 | tensor | 16 | 3 | 0 {cells}" in printed


def test_the_evidence_shows_the_tables_that_its_rows_give(capsys, tmp_path, monkeypatch):
    rows = regimes.read_rows()
    monkeypatch.setattr(regimes, "FOLDER", tmp_path)  # where the picture goes
    regimes.draw(rows)
    tables = capsys.readouterr().out.strip().split("\n\n")
    shown = (HERE / "data" / "evidence" / "README.md").read_text()
    assert len(tables) == 4 and all(f"\n\n{table}\n\n" in shown for table in tables)


def test_the_other_text_is_the_tasks_own_words_without_the_prompts(monkeypatch, small_vocabulary):
    examples = {
        name: [tasks.Example(prompt.replace("{}", "Why  NOT").format(*"abcde"), ("x", "Y"), 1)]
        for name, (prompt, _) in tasks.PROMPTS.items()
    }
    monkeypatch.setattr(tasks, "load_task", lambda name: (examples[name], []))
    text = small_vocabulary.decode(regimes.other_text(small_vocabulary).tolist())
    lines = dict(zip(tasks.PROMPTS, text.split("\n"), strict=True))
    assert lines["mrpc"] == "d e" and lines["rte"] == "b c" and lines["gsm8k"] == "why not y"


# --------------------------------------------------------------------------------------------------
# 12. What bad input gets: one line that names cause and remedy, exit code 2, nothing half-written


BAD_FLAGS = [
    ["--frobnicate"],
    ["--loss", "mse"],
    ["--bits", "3"],
    ["--granularity", "row"],
    ["--model", "gpt3"],
    ["--table"],
    ["--lr", "inf"],
    ["--gt-weight", "inf"],
    ["--prompt", "the"],
    ["--model", ""],
    ["--data", ""],
    ["--gt-weight", "1", "--loss", "logit"],
    ["--tsld-temperature", "5", "--loss", "gt"],
    ["--resume", "--generate", "x"],
    ["--seed", str(2**64)],
    ["--steps", "0"],
    ["--steps", "many"],
    ["--batch-size", "-1"],
    ["--block-size", "1"],
    ["--lr", "0"],
    ["--lr", "nan"],
    ["--seed", "-1"],
    ["--gt-weight", "-0.5"],
    ["--tsld-temperature", "0"],
    ["--student-tokens", "1.5"],
    ["--dtype", "int8"],
    ["--data"],
    ["stray"],
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_an_unknown_flag_or_value_is_refused(flags, tiny, capsys, tmp_path):
    assert refused([*tiny, *flags], capsys, flags[0]) == ""
    assert not (tmp_path / "out").exists()


def test_a_missing_empty_or_undecodable_text_is_refused(tiny, capsys, tmp_path):
    refused([*tiny, "--data", str(tmp_path / "nowhere.txt")], capsys, "nowhere.txt: No such file")
    for content, words in ((b"", "empty"), (b"caf\xe9 " * 1000, "not UTF-8")):
        (tmp_path / "bad.txt").write_bytes(content)
        refused([*tiny, "--data", str(tmp_path / "bad.txt")], capsys, words)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text(WORDS)
    refused(
        [*tiny, "--data", str(folder)], capsys, "a folder needs train.txt, valid.txt and test.txt"
    )
    for part in ("valid", "test"):
        (folder / f"{part}.txt").write_text("" if part == "test" else WORDS)
    refused([*tiny, "--data", str(folder)], capsys, "the test part is empty")
    (folder / "test.txt").write_text(WORDS)
    assert "corpus: " + str(folder) in run([*tiny, "--data", str(folder)], capsys)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_text_too_short_for_one_block_is_refused(tiny, capsys, tmp_path):
    (tmp_path / "short.txt").write_text(WORDS[:30])
    refused([*tiny, "--data", str(tmp_path / "short.txt")], capsys, "too short")
    refused(
        [*tiny, "--student-tokens", "16"],
        capsys,
        "the student text is too short: 16 tokens, and it takes 17",
    )
    assert os.listdir(tmp_path / "out") == []


def test_ptb_asked_for_and_not_to_be_had_is_refused(tiny, capsys, mirrors, no_network):
    refused([*tiny, "--data", "ptb"], capsys, "ptb.train.txt cannot be downloaded")
    (mirrors / "data" / "ptb").mkdir(parents=True, exist_ok=True)
    (mirrors / "data" / "ptb" / "ptb.train.txt").write_text("altered")
    refused([*tiny, "--data", "ptb"], capsys, "does not match its SHA-256: delete it")


def test_without_data_a_damaged_ptb_falls_back_to_pydoc(tiny, capsys, mirrors, no_network):
    (mirrors / "data" / "ptb").mkdir(parents=True)
    (mirrors / "data" / "ptb" / "ptb.train.txt").write_text("altered")
    out = run(tiny[2:], capsys).splitlines()[0]
    assert out.startswith("corpus: pydoc") and "does not match its SHA-256" in out


def test_a_prompt_too_long_or_a_file_that_is_no_packed_model_is_refused(tiny, capsys, tmp_path):
    run(tiny, capsys)
    packed = str(tmp_path / "out" / "student-tsld.packed")
    refused(
        ["--generate", packed, "--prompt", "word " * 16],
        capsys,
        "tokens, and the model's block is 16",
    )
    refused(["--generate", packed, "--prompt", ""], capsys, "--prompt has 0 tokens")
    refused(["--generate", str(tmp_path / "nowhere")], capsys, "nowhere: No such file")
    refused(["--generate", packed.replace(".packed", ".pt")], capsys, "not a packed model")
    content = bytearray(Path(packed).read_bytes())
    content[len(content) // 2] ^= 1
    Path(packed).write_bytes(content)
    assert refused(["--generate", packed], capsys, "altered") == ""
    tsld.save_model(packed, tsld.pack_model(quantized_gpt()))
    refused(["--generate", packed], capsys, "no tokenizer has the 17 tokens of")


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny, capsys, tmp_path):
    run(tiny, capsys)
    student = tmp_path / "out" / "student-tsld.pt"
    teacher = next((tmp_path / "out").glob("teacher-*.pt"))
    for path in (student, teacher):
        content = path.read_bytes()
        for damaged in (content[:-100], content[:500] + b"!" + content[501:], b"GIF89a", b""):
            path.write_bytes(damaged)
            refused(["--resume", *tiny], capsys, f"{path} is truncated, altered")
            assert path.read_bytes() == damaged
        path.write_bytes(content)
    refused(["--resume", "--lr", "0.5", *tiny], capsys, "another run: lr is 0.001, not 0.5")
    rate = str(
        train_small.PRESETS["tiny"].student.lr
    )  # a 4-bit student's own would be noticed first
    refused(["--resume", "--bits", "4", "--lr", rate, *tiny], capsys, "another run: quantizers is")
    refused(["--resume", "--granularity", "channel", *tiny], capsys, "another run: quantizers is")
    refused(["--resume", "--teacher-steps", "2", *tiny], capsys, "another run: teacher is")
    run(["--resume", *tiny], capsys)


@pytest.mark.parametrize(
    "key, value",
    [("step", "x"), ("step", None), ("seconds", "y"), ("identity", 3), ("model", {}), ("model", 3)]
    + [("model", {"wte.weight": torch.zeros(3)}), ("optimizer", {}), ("optimizer", [1])]
    + [("step", 0), ("step", 7), ("step", 10**9), ("seconds", math.nan), ("seconds", -1.0)],
)
def test_a_checkpoint_of_other_content_is_refused(key, value, tiny, capsys, tmp_path):
    run(tiny, capsys)
    path = tmp_path / "out" / "student-tsld.pt"
    content = tsld.read_file(path)
    tsld.write_file(path, content | {key: value})
    refused(["--resume", *tiny], capsys, f"{path} is no checkpoint of this program")
    del content[key]
    tsld.write_file(path, content)
    refused(["--resume", *tiny], capsys, f"{path} is no checkpoint of this program")


@pytest.mark.parametrize("what", ["shape of an average", "weight decay"])
def test_an_optimizers_state_that_does_not_fit_is_refused(what, tiny, capsys, tmp_path):
    run(tiny, capsys)
    path = tmp_path / "out" / "student-tsld.pt"
    content = tsld.read_file(path)
    state = content["optimizer"]
    if what == "weight decay":
        state["param_groups"][0]["weight_decay"] = 0.5
    else:
        name = next(iter(state["state"]))
        state["state"][name]["exp_avg"] = torch.zeros(3)
    tsld.write_file(path, content)
    refused(["--resume", *tiny], capsys, f"{path} is no checkpoint of this program")


def test_a_truncated_checkpoint_names_the_one_before_it(tiny, capsys, tmp_path):
    run(tiny, capsys)
    path = tmp_path / "out" / "student-tsld.pt"
    path.write_bytes(path.read_bytes()[:-9])
    refused(["--resume", *tiny], capsys, "not a file of this program: delete it\n")
    before = path.with_suffix(".previous.pt")
    assert not before.exists()
    before.touch()
    refused(["--resume", *tiny], capsys, f"delete it, {before} is the one before")


def test_a_student_with_dropout_resumes_with_as_many_processes_alone(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    with pytest.raises(train_small.TrainingStopped):
        train_brief(path, resume=True, stop_at=2)
    monkeypatch.setattr(train_small, "processes", lambda: (0, 2))
    monkeypatch.setattr(train_small, "spread", lambda model, device: model)
    with pytest.raises(tsld.CheckpointError, match="dropout is 1, not 2"):
        train_brief(path, resume=True)


@pytest.mark.parametrize("command", [table.main, figures.main])
def test_evidence_that_cannot_be_made_is_refused_before_anything_is_trained(
    command, tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "train_teacher", None)
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    argv = [*tiny, "--steps", "2"]
    for flags, words in (
        (["--model", str(tmp_path)], f"--model {tmp_path}: it takes one of tiny"),
        ([], f"{tmp_path / 'table.json'} is damaged"),
    ):
        (tmp_path / "table.json").write_text("[]" if flags else "[{")
        assert train_small.main([*argv, *flags], command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error


def test_figures_resume_with_the_history_of_each_student_or_not_at_all(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "train_teacher", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "student-tsld.pt").touch()
    for history in (None, "{"):
        path = tmp_path / "out" / "student-tsld.history.json"
        if history:
            path.write_text(history)
        assert train_small.main([*tiny, "--resume"], figures.main) == 2
        words = f"{path} is damaged" if history else f"{path} is missing"
        assert words in capsys.readouterr().err


def test_a_folder_that_another_run_holds_is_refused_by_name(tiny, capsys, tmp_path):
    if files.fcntl is None:
        pytest.skip("this system does not lock files")
    out = files.check_folder(tmp_path / "out")
    with files.hold(out):
        refused(tiny, capsys, f"--out {out} is in use by process {os.getpid()}")
    run(tiny, capsys)
    with files.hold(out):
        (out / ".lock").unlink()  # somebody has tidied up


def test_too_little_memory_is_one_line(tiny, capsys):
    refused(["--batch-size", str(10**15), *tiny], capsys, "not enough memory")


def test_progress_without_a_terminal_or_any_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as `>&-` leaves it
    progress.show_progress("step 1", last=True)


def test_no_other_package_of_the_name_hides_data():
    assert data.__file__ == str(HERE / "data" / "__init__.py")
    assert data.evidence.__file__ == str(HERE / "data" / "evidence" / "__init__.py")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_without_greek_letters_gets_the_help(encoding, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        train_small.main(["--help"])
    terminal.flush()
    assert "? of the token scale" in terminal.buffer.getvalue().decode(encoding)


def flag_values(rng):
    """Random flags of the parser's own table, with values good and bad."""
    flags = [flag for group in train_small.FLAGS.values() for flag in group]
    for i in rng.choice(len(flags), size=rng.integers(1, 5), replace=False):
        name, default, how, _ = flags[i]
        yield f"--{name}"
        if how.get("action") != "store_true":
            pool = [
                *how.get("choices", ()),
                default,
                1,
                2,
                0,
                -1,
                1e-3,
                "inf",
                "nan",
                "",
                2**64,
                "x",
            ]
            yield str(pool[rng.integers(len(pool))])


@pytest.mark.parametrize("seed", range(300))
def test_any_combination_of_flags_is_taken_or_refused_in_one_line(seed, capsys, monkeypatch):
    for command in ("run", "generate", "export"):
        monkeypatch.setattr(train_small, command, lambda args: None)
    code = train_small.main([*flag_values(np.random.default_rng(seed))])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == ((2, 1) if error else (0, 0))
    assert error.startswith("error: " if error else "")


@pytest.mark.parametrize("accelerator, dtype", [("mps", "float32"), (None, None)])
def test_the_accelerator_that_is_there_is_chosen(accelerator, dtype, monkeypatch):
    found = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    device = train_small.choose_device(None)
    assert device.type == (accelerator or "cpu")
    if dtype:
        assert train_small.default_dtype(device) == dtype


class Types(TorchDispatchMode):
    """Notes the types of the tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        self.made |= {t.dtype for t in (made,) if torch.is_tensor(t)}
        return made


@pytest.mark.parametrize("loss", tsld.LOSSES)
def test_nothing_on_the_device_is_float64_which_apples_gpus_lack(loss):
    with Types() as types:
        student, teacher = tsld.quantize_model(micro_gpt()), micro_gpt(1)
        for _ in tsld.train(student, TEXT, replace(BRIEF, loss=loss, block_size=8), teacher):
            pass
        tsld.evaluate(student, TEXT, 8)
        tsld.pack_model(student).generate(micro_ids(T=6), 2, top_k=3)
    assert torch.float32 in types.made and torch.float64 not in types.made


def test_a_device_that_is_not_there_is_refused(tiny, capsys):
    for device in ("cuda:99", "abacus"):
        refused([*tiny, "--device", device], capsys, f"--device {device}: there is no such device")


def test_a_model_that_is_not_there_is_refused(tiny, capsys, monkeypatch):
    exact = importlib.util.find_spec
    if exact("transformers"):
        refused(["--model", "no/such-model", *tiny], capsys, "--model no/such-model")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else exact(name)
    )
    refused(
        ["--model", "facebook/opt-125m", *tiny],
        capsys,
        "takes the package transformers, which is not",
    )


def test_a_folder_that_cannot_be_written_is_refused_before_training(tiny, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused([*tiny, "--out", str(tmp_path / "file")], capsys, "cannot be written") == ""
    assert (
        refused([*tiny, "--out", str(tmp_path / "file" / "out")], capsys, "cannot be written") == ""
    )


def test_a_perplexity_that_is_no_number_ends_the_run(tiny, capsys, tmp_path):
    assert train_small.main(["--lr", "1e9", "--steps", "1", "--dtype", "float32", *tiny]) == 1
    assert "nats per token" in capsys.readouterr().err or "loss" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_bfloat16_where_it_is_slow_is_announced(tiny, capsys, monkeypatch):
    for has, words in (("float32", 1), ("bfloat16", 0)):
        monkeypatch.setattr(train_small, "default_dtype", lambda device: has)
        out = run(["--dtype", "bfloat16", *tiny], capsys)
        assert out.count("dtype: this device has no fast bfloat16") == words


def test_a_full_disk_is_found_before_training(tiny, capsys, monkeypatch):
    usage = collections.namedtuple("usage", "free")(1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    assert "teacher:" not in refused(tiny, capsys, "GB free: name a folder on another disk")


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny, capsys):
    refused(
        ["--accumulate", "3", *tiny],
        capsys,
        "a batch of 4 does not divide into 1 processes times 3",
    )
    run(["--accumulate", "2", *tiny], capsys)
    for batch_size, parts, teachers in ((4, 2, 2), (6, 3, 4), (8, 8, 4)):  # of its batch of 4
        flags = ["--accumulate", str(parts), "--batch-size", str(batch_size), *tiny]
        setup = train_small.set_up(train_small.parse(flags))
        assert (setup.student.accumulate, setup.teacher.accumulate) == (parts, teachers)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good_checkpoint(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "CHECKPOINT_SECONDS", 0)
    exact, calls = tsld.training_loss, []

    def fails_later(*arguments):
        calls.append(1)
        return exact(*arguments) * (
            math.inf if len(calls) == 4 + 3 else 1.0
        )  # the student's third step

    monkeypatch.setattr(tsld, "training_loss", fails_later)
    assert train_small.main(tiny) == 1
    printed = capsys.readouterr().err
    assert "at step 3, learning rate" in printed
    assert f"the last checkpoint is {tmp_path / 'out' / 'student-tsld.pt'}" in printed
    assert tsld.read_file(tmp_path / "out" / "student-tsld.pt")["step"] == 2
    monkeypatch.setattr(tsld, "training_loss", lambda *arguments: exact(*arguments) * math.nan)
    assert train_small.main(tiny) == 1
    assert "last checkpoint" not in capsys.readouterr().err  # that one is of the run before


def test_a_run_at_4_bits_leaves_no_packed_model_of_an_earlier_one(tiny, capsys, tmp_path):
    run(tiny, capsys)
    names = {path.name for path in (tmp_path / "out").glob("*.packed")}
    assert names == {"rounded.packed", "student-tsld.packed"}
    run(["--bits", "4", *tiny], capsys)
    assert not [*(tmp_path / "out").glob("*.packed")]
