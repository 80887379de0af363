"""Decoding in C: data/lib/fast.py and fast.c.

The oracle is the sum itself, in float64, or what the layers of tsld.py compute.
"""

import concurrent.futures
import contextlib
import copy
import functools
import os
import platform
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tsld
from data.lib import fast
from data.tests.helpers import ROOT, micro_gpt, micro_ids, randn
from tsld import GPTConfig, PackedLinear


@pytest.fixture
def compiled():
    """Skips a test where C does not compile."""
    if fast.c_library() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def c_alone(compiled, monkeypatch):
    """PyTorch's products and attention fail: what succeeds is in C."""
    monkeypatch.setattr(fast, "product_in_parts", None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)


@pytest.fixture
def without_c(monkeypatch):
    """A call of C fails, if C compiles here."""

    class Library:
        def __getattr__(self, name):
            pytest.fail(f"{name} is called")

    monkeypatch.setattr(fast, "c_library", Library)


def random_codes(out, width):
    codes = np.random.default_rng(0).integers(-1, 2, size=(out, width))
    return torch.from_numpy(codes.astype(np.int8))


def packed_layer(codes, scale=None, bias=None):
    """A PackedLinear of these codes; the scale is 1 if there is none."""
    if scale is None:
        scale = torch.ones(1, 1)
    return PackedLinear(codes.shape[1], tsld.pack_ternary(codes), scale, bias)


def fast_layer(codes, scale=None, bias=None):
    """The same as a FastLinear, by way of speed_up."""
    model = fast.speed_up(nn.Sequential(packed_layer(codes, scale, bias)))
    return model[0]


def check_product(x, codes, scale=None, bias=None, tolerance=1e-6):
    """A FastLinear against the sum of scaled codes times x, in float64."""
    layer = fast_layer(codes, scale, bias)
    y = layer(x)
    assert type(layer) is fast.FastLinear
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], len(codes))

    weight = codes.double() if scale is None else scale.double() * codes
    exact = x.double() @ weight.t()
    if bias is not None:
        exact = exact + bias.double()

    bound = tolerance * (1 + x.double().abs().sum(-1, keepdim=True))
    assert torch.all((y.double() - exact).abs() <= bound)


# --------------------------------------------------------------------------------------
# The ternary product: one base case, then each axis around it


def test_the_product_adds_the_inputs_at_plus_1_and_subtracts_those_at_minus_1(c_alone):
    x = randn(96)
    codes = random_codes(128, 96)
    y = fast_layer(codes)(x)
    for value, row in zip(y, codes, strict=True):
        added = x[row == 1].double().sum()
        subtracted = x[row == -1].double().sum()
        assert value.item() == pytest.approx((added - subtracted).item(), abs=1e-5)


SHAPES = [(64, 16), (192, 48), (64, 1008), (64, 1040), (320, 2064), (128, 3072)]
SHAPES.append((64, 2**15 - 16))  # the widest


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_in_c_is_exact_in_every_shape(shape, c_alone):
    check_product(randn(1, shape[1]), random_codes(*shape))


@pytest.mark.parametrize("code", [-1, 0, 1])
def test_the_product_in_c_is_exact_for_codes_that_are_all_alike(code, c_alone):
    check_product(randn(1, 96), torch.full((128, 96), code, dtype=torch.int8))


@pytest.mark.parametrize("leading", [(), (1,), (1, 1)], ids=str)
def test_one_row_is_in_c_however_many_dimensions_it_has(leading, c_alone):
    check_product(randn(*leading, 96), random_codes(128, 96))


@pytest.mark.parametrize("leading", [(2,), (3, 5), (0,)], ids=str)
def test_several_rows_or_none_are_in_pytorch(leading, compiled, without_c):
    check_product(randn(*leading, 96), random_codes(128, 96))


def test_several_rows_of_a_matrix_of_many_rows_are_in_pytorch(compiled):
    check_product(randn(2, 16), random_codes(3008, 16))  # not a multiple of 1024


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-6)],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_result_is_in_the_inputs_dtype(dtype, tolerance, rows, compiled):
    x = randn(rows, 96).to(dtype)
    check_product(x, random_codes(128, 96), tolerance=tolerance)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_sum_is_added_up_in_float32(rows, compiled):
    codes = torch.zeros(64, 4096, dtype=torch.int8)
    codes[:, :257] = 1
    layer = fast_layer(codes, bias=torch.tensor([-1.0]))
    y = layer(torch.ones(rows, 4096, dtype=torch.bfloat16))

    assert torch.all(y == 256)  # bfloat16 has no 257


SCALES = {
    "one": torch.tensor([[0.3]]),
    "of each row": torch.linspace(0.1, 2.0, 128)[:, None],
    "zero": torch.zeros(1, 1),
}
BIASES = {
    "float32": randn(128),
    "bfloat16": randn(128).bfloat16(),
    "one number": torch.tensor([7.0]),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_product_is_scaled(scale, rows, compiled):
    check_product(randn(rows, 96), random_codes(128, 96), scale)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_bias_is_added_to_the_scaled_product(bias, rows, compiled):
    check_product(randn(rows, 96), random_codes(128, 96), SCALES["of each row"], bias)


def test_a_bias_of_another_size_is_refused(compiled):
    layer = fast_layer(random_codes(64, 16), bias=torch.ones(3))
    with pytest.raises(RuntimeError):
        layer(randn(1, 16))


def test_inputs_and_codes_need_not_be_contiguous(compiled):
    packed = tsld.pack_ternary(random_codes(64, 16))
    scattered = torch.stack([packed, packed], dim=2)[..., 0]
    assert not scattered.is_contiguous()

    model = nn.Sequential(PackedLinear(16, scattered, torch.ones(1, 1)))
    layer = fast.speed_up(model)[0]

    wide = randn(4, 32)[:, ::2]
    tall = randn(16, 4).t()
    for x in (wide, tall, wide[:1], tall[1]):
        exact = x @ random_codes(64, 16).float().t()
        torch.testing.assert_close(layer(x), exact)


@pytest.mark.parametrize("width", [13, 15, 17, 32])
@pytest.mark.parametrize("rows", [1, 2])
def test_inputs_of_another_width_are_refused(width, rows, compiled):
    layer = fast_layer(random_codes(64, 16))
    with pytest.raises(ValueError, match=f"{width} inputs, not 16"):
        layer(randn(rows, width))


def test_the_gradient_passes_a_layer(compiled):
    x = randn(1, 16).requires_grad_()
    upstream = randn(1, 64, seed=1)
    fast_layer(random_codes(64, 16), torch.tensor([[0.5]]))(x).backward(upstream)

    torch.testing.assert_close(x.grad, upstream @ (0.5 * random_codes(64, 16)))


def test_many_threads_may_multiply_at_once(c_alone):
    x = randn(96)
    exact = random_codes(64, 96).float() @ x
    layer = fast_layer(random_codes(64, 96))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: layer(x), range(200)):
            torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------
# The layout, and what a layer shows of it


@pytest.mark.parametrize("shape", [(64, 16), (192, 48)], ids=str)
def test_64_rows_stand_side_by_side_4_bytes_of_each(shape, compiled):
    codes = random_codes(*shape)
    bits = {0: 0b00, 1: 0b01, -1: 0b11}
    rows = []  # the bytes of each
    for row in codes.tolist():
        number = sum(bits[code] << 2 * j for j, code in enumerate(row))
        rows.append(number.to_bytes(len(row) // 4, "little"))

    expected = b""
    for begin in range(0, shape[0], 64):
        for byte in range(0, shape[1] // 4, 4):
            for row in rows[begin : begin + 64]:
                expected += row[byte : byte + 4]

    assert fast_layer(codes).blocks.numpy().tobytes() == expected


def test_a_layer_shows_its_codes_in_plain_order_and_its_weight(compiled):
    codes = random_codes(192, 48)
    scale = SCALES["one"]
    bias = randn(192)
    layer = fast_layer(codes, scale, bias)

    assert isinstance(layer, PackedLinear)
    assert layer.in_features == 48
    assert torch.equal(layer.packed, tsld.pack_ternary(codes))
    assert torch.equal(layer.dequantized(), scale * codes)
    assert layer.scale is scale
    assert layer.bias is bias


def test_a_layer_holds_its_codes_once(compiled):
    layer = fast_layer(random_codes(192, 48))
    held = sum(buffer.nbytes for buffer in layer.buffers())

    assert held == 192 * 48 / 4 + 4  # two bits each, and a scale


def test_a_state_dict_is_that_of_a_packed_layer_and_can_be_loaded(compiled):
    codes = random_codes(128, 96)
    scale = SCALES["of each row"]
    bias = BIASES["float32"]
    layer = fast_layer(codes, scale, bias)
    state = layer.state_dict()
    expected = packed_layer(codes, scale, bias).state_dict()

    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)

    other = fast_layer(-codes, 2 * scale, 0 * bias)
    other.load_state_dict(state)
    x = randn(1, 96)

    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"scale": scale, "bias": bias})


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (96, 16), (64, 24), (64, 30), (64, 61), (64, 2**15)],
    ids=str,
)
def test_a_layer_of_a_shape_that_c_does_not_take_stays(shape, compiled):
    layer = packed_layer(random_codes(*shape))
    model = nn.Sequential(layer)

    assert fast.speed_up(model)[0] is layer


def test_a_layer_on_another_device_stays(compiled):
    layer = packed_layer(random_codes(64, 16)).to("meta")
    assert fast.speed_up(nn.Sequential(layer))[0] is layer


# --------------------------------------------------------------------------------------
# The float16 head


def fast_head(weight):
    head = tsld.Head(*weight.shape[::-1], bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return fast.speed_up(nn.Sequential(head))[0]


def half_weight(*shape):
    """Weights of all sizes, the largest and subnormal ones as well."""
    weight = (randn(*shape) * torch.logspace(-7, 3, shape[1])).half()
    weight[0, 0] = 65504.0
    return weight


def check_head(x, weight):
    y = fast_head(weight)(x)
    exact = x.double() @ weight.double().t()
    bound = x.double().abs() @ weight.double().abs().t()

    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    assert torch.all((y - exact).abs() <= 1e-6 * bound)


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (5000, 7)], ids=str)
@pytest.mark.parametrize("leading", [(), (1, 1)], ids=str)
def test_the_head_multiplies_one_row_in_c(shape, leading, c_alone):
    check_head(randn(*leading, shape[1]), half_weight(*shape))


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (5000, 7)], ids=str)
def test_the_head_multiplies_several_rows_in_pytorch(shape, compiled, without_c):
    check_head(randn(2, 3, shape[1]), half_weight(*shape))


def test_both_signs_and_all_finite_float16_numbers_are_read_exactly(c_alone):
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = torch.from_numpy(bits.view(np.float16))
    numbers = numbers[numbers.isfinite()]
    y = fast_head(numbers[:, None].clone())(torch.ones(1))

    assert torch.equal(y, numbers.float())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_heads_logits_are_in_the_inputs_dtype(rows, dtype, compiled):
    x = randn(rows, 33).to(dtype)
    weight = randn(5, 33).half()
    y = fast_head(weight)(x)
    exact = x.double() @ weight.double().t()

    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.05)


def test_a_head_that_is_not_contiguous_is_left_to_pytorch(compiled, without_c):
    check_head(randn(1, 33), half_weight(33, 5).t())


@pytest.mark.parametrize("rows", [1, 2])
def test_a_head_refuses_inputs_of_another_width(rows, compiled):
    with pytest.raises(RuntimeError):
        fast_head(torch.ones(10, 8).half())(torch.ones(rows, 12))


def test_the_gradient_passes_the_head(compiled):
    x = randn(1, 33).requires_grad_()
    weight = half_weight(5, 33)
    fast_head(weight)(x).sum().backward()

    torch.testing.assert_close(x.grad[0], weight.float().sum(0))


# --------------------------------------------------------------------------------------
# The attention of one token


def attentions(n_head, d, block_size):
    """An Attention, and the same one in C. c_proj changes nothing."""
    config = GPTConfig(block_size, 8, 1, n_head, n_head * d)
    attention = tsld.Attention(config).eval()
    attention.c_proj = nn.Identity()
    return attention, fast.speed_up(nn.Sequential(copy.deepcopy(attention)))[0]


def check_attention(n_head, d, n, size, monkeypatch):
    """The last of n tokens', over keys and values of this size, is as exact as
    PyTorch's, and the cache is the same afterwards."""
    attention, in_c = attentions(n_head, d, n)
    x = randn(1, 1, n_head * d)
    before = size * randn(2, 1, n_head, n, d, seed=1)
    with torch.inference_mode():
        cache = before.clone()
        same_cache = before.clone()
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", None)  # C alone
            y, _ = in_c(x, cache, n - 1)
        in_pytorch, _ = attention(x, same_cache, n - 1)
        exact, _ = attention.double()(x.double(), before.double(), n - 1)

    assert y.shape == x.shape
    assert torch.equal(cache, same_cache)

    bound = 1e-6 * before.abs().max() + 2 * (in_pytorch - exact).abs().max()
    assert (y - exact).abs().max() <= bound


@pytest.mark.parametrize("n_head, d, n", [(1, 1, 1), (2, 6, 5), (3, 17, 40)])
def test_the_attention_of_one_token_in_c_is_that_of_pytorch(
    n_head, d, n, compiled, monkeypatch
):
    check_attention(n_head, d, n, 1.0, monkeypatch)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0, 1e6])
def test_scores_of_any_size_are_attended_to(size, compiled, monkeypatch):
    """The largest would overflow exp by far."""
    check_attention(12, 64, 300, size, monkeypatch)


@pytest.mark.parametrize(
    "case", ["float64", "two sequences", "scores", "dropout", "gradient", "no cache"]
)
def test_what_the_attention_in_c_cannot_do_is_left_to_pytorch(
    case, compiled, without_c
):
    _, attention = attentions(2, 6, 8)
    x = randn(1, 1, 12)
    cache = torch.zeros(2, 1, 2, 8, 6)
    if case == "gradient":
        assert attention(x, cache, 0)[0].requires_grad
        return

    with torch.no_grad():
        if case == "float64":
            attention.double()(x.double(), cache.double(), 0)
        elif case == "two sequences":
            attention(randn(2, 1, 12), torch.zeros(2, 2, 2, 8, 6), 0)
        elif case == "scores":
            _, scores = attention(x, cache, 0, trace=True)
            assert scores.shape == (1, 2, 1, 1)
        elif case == "dropout":
            attention.train()(x, cache, 0)
        else:
            attention(x)


@torch.inference_mode()
def test_a_cache_in_pieces_is_left_to_pytorch(compiled, without_c):
    attention, in_c = attentions(2, 6, 8)
    x = randn(1, 1, 12)
    whole = randn(2, 1, 2, 8, 6, seed=1)
    pieces = torch.zeros(2, 1, 2, 16, 6)[:, :, :, ::2]
    pieces.copy_(whole)

    torch.testing.assert_close(in_c(x, pieces, 3)[0], attention(x, whole, 3)[0])
    assert torch.equal(pieces, whole)


def test_attention_under_autocast_is_left_to_pytorch(compiled, without_c):
    _, attention = attentions(2, 6, 8)
    cache = torch.zeros(2, 1, 2, 8, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attention(randn(1, 1, 12), cache, 0)

    assert cache[:, :, :, 0].abs().min() > 0


@pytest.mark.parametrize("T, start", [(1, 8), (9, 0), (2, 3)])
def test_a_cache_without_room_or_begun_in_the_middle_is_refused(T, start, compiled):
    _, attention = attentions(2, 6, 8)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{T} .*position {start}"):
        attention(randn(1, T, 12), torch.zeros(2, 1, 2, 8, 6), start)


UNFIT_CACHES = {
    "a place before the first": (torch.zeros(2, 1, 2, 8, 6), -1),
    "other heads": (torch.zeros(2, 1, 3, 8, 6), 0),
    "other heads of one size in all": (torch.zeros(2, 1, 3, 8, 4), 0),
    "heads of another size": (torch.zeros(2, 1, 2, 8, 5), 0),
    "three sequences": (torch.zeros(2, 3, 2, 8, 6), 0),
    "no values": (torch.zeros(1, 1, 2, 8, 6), 0),
    "another dtype": (torch.zeros(2, 1, 2, 8, 6).bfloat16(), 0),
    "another device": (torch.zeros(2, 1, 2, 8, 6, device="meta"), 0),
}


@pytest.mark.parametrize("cache, start", UNFIT_CACHES.values(), ids=UNFIT_CACHES)
def test_c_is_not_called_for_a_cache_that_does_not_fit(
    cache, start, compiled, without_c
):
    _, attention = attentions(2, 6, 8)
    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):
        attention(randn(1, 1, 12), cache.clone(), start)


# --------------------------------------------------------------------------------------
# Whole models

# All linear layers of this shape are in C.
WIDE = {"n_embd": 64, "vocab_size": 41}


def quantized_gpt(granularity="tensor"):
    return tsld.quantize_model(micro_gpt(**WIDE), granularity=granularity)


def loaded_gpt(tmp_path, granularity="tensor"):
    """A packed model as load_model gives it, with a float16 head, and its file."""
    path = tmp_path / "model.packed"
    tsld.save_model(path, tsld.pack_model(quantized_gpt(granularity)))
    return tsld.load_model(path), path


def test_speed_up_replaces_layers_attention_and_head_in_place(tmp_path, compiled):
    model, _ = loaded_gpt(tmp_path)
    model.eval()

    assert fast.speed_up(model) is model
    assert type(model.lm_head) is fast.FastHead
    assert model.lm_head.weight is model.wte.weight
    for block in model.h:
        assert type(block.attn) is fast.FastAttention
        linear = (
            block.attn.c_attn,
            block.attn.c_proj,
            block.mlp.c_fc,
            block.mlp.c_proj,
        )
        assert all(type(layer) is fast.FastLinear for layer in linear)

    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_second_speed_up_changes_nothing(tmp_path, compiled):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    modules = list(model.modules())

    assert list(fast.speed_up(model).modules()) == modules


def test_a_layer_that_is_used_twice_stays_one_layer(compiled):
    layer = packed_layer(random_codes(64, 64))
    model = fast.speed_up(nn.Sequential(layer, nn.ReLU(), layer))

    assert type(model[0]) is fast.FastLinear
    assert model[0] is model[2]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_sped_up_model_computes_what_the_quantized_one_did(granularity, compiled):
    model = quantized_gpt(granularity)
    ids = micro_ids()
    expected = model(ids).detach()
    fast.speed_up(tsld.pack_model(model))

    bound = 1e-4 * expected.abs().max()
    assert (model(ids) - expected).abs().max() <= bound

    # The first token of the first sequence goes through C.
    assert (model(ids[:1, :1]) - expected[:1, :1]).abs().max() <= bound

    prompt = ids[:, :2]
    greedy = quantized_gpt(granularity).generate(prompt, 6, temperature=0)
    assert torch.equal(model.generate(prompt, 6, temperature=0), greedy)
    assert torch.equal(model.generate(prompt[:1], 6, temperature=0), greedy[:1])


def test_generating_from_one_sequence_is_in_c_after_the_prompt(
    tmp_path, compiled, monkeypatch
):
    model, _ = loaded_gpt(tmp_path)
    ids = micro_ids(B=1, T=1)  # a prompt of one row is in C as well
    expected = model.generate(ids, 7, temperature=0)
    fast.speed_up(model)
    monkeypatch.setattr(fast, "product_in_parts", None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)

    assert torch.equal(model.generate(ids, 7, temperature=0), expected)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("B", [1, 3])
def test_token_by_token_with_a_cache_hidden_is_what_it_is_for_the_whole_sequence(
    B, gradient, compiled
):
    model = fast.speed_up(micro_gpt(**WIDE))
    ids = micro_ids(B=B)
    cache = [torch.zeros(2, B, 2, 8, 32) for _ in model.h]
    with torch.set_grad_enabled(gradient):
        parts = [model.hidden(ids[:, :3], cache)]
        for n in range(3, 8):
            parts.append(model.hidden(ids[:, n : n + 1], cache, n))
        whole = model.hidden(ids)

    assert all(part.requires_grad == gradient for part in parts)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_sped_up_model_is_saved_as_the_very_same_bytes(
    granularity, tmp_path, compiled
):
    model, path = loaded_gpt(tmp_path, granularity)
    again = tmp_path / "again" / path.name  # torch.save writes the name into the file
    again.parent.mkdir()
    fast.speed_up(model)
    model.generate(micro_ids(B=1, T=2), 4)
    tsld.save_model(again, model)

    assert again.read_bytes() == path.read_bytes()
    assert torch.equal(
        tsld.load_model(again)(micro_ids()), tsld.load_model(path)(micro_ids())
    )


def test_a_copy_of_a_sped_up_model_computes_the_same(tmp_path, compiled):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    ids = micro_ids(B=1, T=2)
    twin = copy.deepcopy(model)

    assert torch.equal(twin(ids), model(ids))

    greedy = model.generate(ids, 6, temperature=0)
    assert torch.equal(twin.generate(ids, 6, temperature=0), greedy)


def test_a_sped_up_model_made_float32_computes_the_same(tmp_path, compiled):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    ids = micro_ids()
    expected = model(ids)
    of_first = model(ids[:1, :1])

    model.float()

    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids[:1, :1]), of_first, rtol=1e-5, atol=1e-5)


def test_a_full_precision_models_attention_is_in_c_and_it_can_be_trained(compiled):
    model = fast.speed_up(micro_gpt(**WIDE)).train()

    assert all(type(block.attn) is fast.FastAttention for block in model.h)
    assert all(module.training for module in model.modules())
    model(micro_ids()).sum().backward()

    assert model.h[0].attn.c_attn.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_sped_up_model_may_move_to_a_gpu_and_back(tmp_path, compiled):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    ids = micro_ids(B=1, T=2)
    greedy = model.generate(ids, 6, temperature=0)
    there = model.to("cuda").generate(ids.to("cuda"), 6, temperature=0)

    assert torch.equal(there.cpu(), greedy)
    assert torch.equal(model.cpu().generate(ids, 6, temperature=0), greedy)


# --------------------------------------------------------------------------------------
# Compiling


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "native"])
def test_registers_of_every_width_give_the_same(
    processor, compiled, tmp_path, monkeypatch
):
    capability = torch.backends.cpu.get_cpu_capability()
    if processor == "x86-64-v3" and capability not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")

    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec cc "$@" -march={processor}\n')  # the last one
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    library = fast.c_library.__wrapped__()
    assert library is not None

    monkeypatch.setattr(fast, "c_library", lambda: library)
    monkeypatch.setattr(fast, "product_in_parts", None)
    for out, width in ((192, 2064), (64, 16)):
        check_product(randn(1, width), random_codes(out, width))
    check_head(randn(1, 33), half_weight(50, 33))
    check_attention(2, 24, 30, 1.0, monkeypatch)


@pytest.mark.parametrize("problem", ["no compiler", "it fails", "no folder"])
def test_without_a_compiler_the_model_stays_and_one_line_says_so(
    problem, tmp_path, monkeypatch, capsys
):
    if problem == "no folder":  # for the compiled file
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    else:
        compiler = {"no compiler": str(tmp_path / "cc"), "it fails": "false"}[problem]
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(fast, "c_library", functools.cache(fast.c_library.__wrapped__))

    model, _ = loaded_gpt(tmp_path)
    modules = list(model.modules())
    expected = model(micro_ids())
    for _ in range(2):
        assert list(fast.speed_up(model).modules()) == modules

    assert torch.equal(model(micro_ids()), expected)

    printed = capsys.readouterr().err
    assert printed.count("tsld: no C (") == printed.count("\n") == 1


def test_a_layer_that_comes_to_a_machine_without_a_compiler_works(
    compiled, monkeypatch
):
    layer = fast_layer(random_codes(64, 96))
    monkeypatch.setattr(fast, "c_library", lambda: None)
    x = randn(1, 96)

    torch.testing.assert_close(layer(x), x @ random_codes(64, 96).float().t())


def test_a_compiler_that_works_says_nothing(compiled, capsys):
    assert fast.c_library.__wrapped__() is not None
    assert capsys.readouterr().err == ""


def test_the_compiler_may_have_flags_of_its_own(compiled, monkeypatch):
    monkeypatch.setenv("CC", "cc -DSOMETHING=1")
    assert fast.c_library.__wrapped__() is not None


FORK = """
import os, torch, tsld
from torch import nn
from data.lib import fast

torch.set_num_threads(2)
packed = tsld.pack_ternary(torch.ones(64, 4096, dtype=torch.int8))
layer = tsld.PackedLinear(4096, packed, torch.ones(1, 1))
model = fast.speed_up(nn.Sequential(layer))
x = torch.ones(1, 4096)
model(x)
if os.fork() == 0:
    os._exit(0 if (model(x) == 4096).all() else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_multiplies_too(compiled):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    printed = subprocess.check_output(
        [sys.executable, "-c", FORK], cwd=ROOT, env=environment, timeout=60
    )

    assert printed.strip() == b"0"
