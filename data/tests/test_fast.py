"""Decoding in C: data/lib/fast.py, fast_linear.py and fast.c.

The oracle is the sum itself in float64, or the model with its weights unpacked.
"""

import concurrent.futures
import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tsld
from data.lib import fast, fast_linear
from data.lib.fast_linear import FastLinear
from data.tests.helpers import micro_gpt, micro_ids, randn
from tsld import GPT, PackedLinear


@pytest.fixture
def compiled():
    """Skips a test where C does not compile."""
    if fast_linear.c_library() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def c_alone(compiled, monkeypatch):
    """PyTorch's products and attention fail: what succeeds is in C."""
    monkeypatch.setattr(fast_linear, "unpack_ternary", None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)


@pytest.fixture
def without_c(monkeypatch):
    """A call of C fails, if C compiles here."""

    class Library:
        def __getattr__(self, name):
            pytest.fail(f"{name} is called")

    monkeypatch.setattr(fast_linear, "c_library", Library)


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
    assert type(layer) is FastLinear
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
SHAPES.append((64, 2**15 + 16))


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


def test_a_wide_product_takes_little_of_a_threads_stack(c_alone):
    layer = fast_layer(random_codes(64, 28672))
    x = randn(28672)
    results = []
    size_before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=lambda: results.append(layer(x)))
        thread.start()
    finally:
        threading.stack_size(size_before)
    thread.join()

    exact = random_codes(64, 28672).float() @ x
    torch.testing.assert_close(results[0], exact, rtol=0, atol=1e-2)


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

    assert fast_layer(codes).blocks.numpy().tobytes() == expected + bytes(4)


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

    assert held == 192 * 48 / 4 + 4 + 4  # two bits each, 4 bytes, and a scale


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
    [(1, 1), (96, 16), (64, 24), (64, 30), (64, 61)],
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
# Whole models

# All linear layers of this shape are in C.
WIDE = {"n_embd": 64, "vocab_size": 41}


def quantized_gpt(granularity="tensor", **changes):
    return tsld.quantize_model(micro_gpt(**WIDE | changes), granularity=granularity)


def loaded_gpt(tmp_path, granularity="tensor", **changes):
    """A packed model as load_model gives it, with a float16 head, and its file."""
    path = tmp_path / "model.packed"
    tsld.save_model(path, tsld.pack_model(quantized_gpt(granularity, **changes)))
    return tsld.load_model(path), path


def unpacked_gpt(model):
    """The same model in float64, its linear layers nn.Linear."""
    plain = GPT(model.config).double()
    plain.lm_head.weight = nn.Parameter(plain.wte.weight.detach().clone())
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            state[f"{name}.weight"] = layer.dequantized().double()
            del state[f"{name}.packed"], state[f"{name}.scale"]
    plain.load_state_dict(state)
    return plain.eval()


def logits_of_stream(model, ids, monkeypatch, prompt=1):
    """The logits (T - prompt, V) from which stream samples each token of ids (1, T)
    after the first `prompt` ones, if those before it are the tokens of ids."""
    seen = []

    def sample(logits, temperature, top_k):
        seen.append(logits[0].clone())
        n = prompt + len(seen) - 1
        return ids[:, n : n + 1]

    T = ids.shape[1]
    with monkeypatch.context() as patch:
        patch.setattr(tsld, "sample", sample)
        new = torch.cat([*model.stream(ids[:, :prompt], T - prompt)], dim=1)

    assert torch.equal(new, ids[:, prompt:])
    return torch.stack(seen)


def check_stream(model, monkeypatch, T=8, tolerance=1e-5, prompt=1):
    """The logits in C of random tokens against those of the model in float64. PyTorch
    computes neither a product nor attention meanwhile."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(17, size=(1, T)))
    exact = unpacked_gpt(model)(ids)[0, prompt - 1 : -1]
    fast.speed_up(model)
    with monkeypatch.context() as patch:
        patch.setattr(fast_linear, "unpack_ternary", None)
        patch.setattr(F, "scaled_dot_product_attention", None)
        logits = logits_of_stream(model, ids, monkeypatch, prompt)

    bound = tolerance * exact.abs().max()
    assert (logits - exact).abs().max() <= bound


@pytest.mark.parametrize(
    "n_head, d, granularity",
    [
        (2, 32, "tensor"),
        (2, 32, "channel"),
        (1, 64, "tensor"),
        (64, 1, "tensor"),
        (6, 32, "tensor"),
    ],
)
def test_the_step_of_a_token_in_c_gives_the_models_logits(
    n_head, d, granularity, tmp_path, compiled, monkeypatch
):
    shape = {"n_head": n_head, "n_embd": n_head * d, "block_size": 40, "n_layer": 3}
    check_stream(loaded_gpt(tmp_path, granularity, **shape)[0], monkeypatch, T=40)


def test_a_head_of_its_own_makes_the_logits(tmp_path, compiled, monkeypatch):
    model, _ = loaded_gpt(tmp_path)
    weight = randn(*model.wte.weight.shape).half()
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    check_stream(model, monkeypatch)


@pytest.mark.parametrize("prompt", [2, 7])
def test_the_prompt_is_read_in_c(prompt, tmp_path, compiled, monkeypatch):
    check_stream(loaded_gpt(tmp_path)[0], monkeypatch, prompt=prompt)


@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0, 1e6])
@pytest.mark.parametrize("part", ["attn.c_attn", "mlp.c_fc"])
def test_attention_scores_and_inner_states_of_any_size_are_right(
    size, part, tmp_path, compiled, monkeypatch
):
    """The largest would overflow exp by far."""
    model, _ = loaded_gpt(tmp_path, n_layer=1)
    layer = model.h[0].get_submodule(part)
    layer.scale.mul_(size)
    layer.bias.mul_(size)
    check_stream(model, monkeypatch, tolerance=1e-4)


def test_both_signs_and_all_finite_float16_numbers_are_read_exactly(
    tmp_path, compiled, monkeypatch
):
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = torch.from_numpy(bits.view(np.float16))
    numbers = numbers[numbers.isfinite()]
    model, _ = loaded_gpt(tmp_path, vocab_size=len(numbers), n_layer=1)

    # The last norm gives (1, 0, 0, ...), and so the logits are the head's first column.
    model.ln_f.weight.zero_()
    model.ln_f.bias.zero_()
    model.ln_f.bias[0] = 1.0
    model.wte.weight[:, 0] = numbers
    logits = logits_of_stream(fast.speed_up(model), micro_ids(1, 2), monkeypatch)

    assert torch.equal(logits[0], numbers.float())


def test_speed_up_replaces_layers_in_place_and_keeps_all_else(tmp_path, compiled):
    model, _ = loaded_gpt(tmp_path)
    head = model.lm_head

    assert fast.speed_up(model) is model
    assert isinstance(model, GPT)
    assert model.lm_head is head
    assert model.lm_head.weight is model.wte.weight
    for block in model.h:
        attn, mlp = block.attn, block.mlp
        linear = (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
        assert all(type(layer) is FastLinear for layer in linear)

    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_second_speed_up_changes_nothing(tmp_path, compiled):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    modules = list(model.modules())

    assert list(fast.speed_up(model).modules()) == modules


def test_a_packed_layer_alone_stays_as_it_is(compiled):
    layer = packed_layer(random_codes(64, 64))
    assert fast.speed_up(layer) is layer


def test_a_layer_that_is_used_twice_stays_one_layer(compiled):
    layer = packed_layer(random_codes(64, 64))
    model = fast.speed_up(nn.Sequential(layer, nn.ReLU(), layer))

    assert type(model[0]) is FastLinear
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


@pytest.mark.parametrize("B", [1, 3])
@torch.inference_mode()
def test_token_by_token_with_a_cache_hidden_is_what_it_is_for_the_whole_sequence(
    B, tmp_path, compiled
):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    ids = micro_ids(B=B)
    cache = [torch.zeros(2, B, 2, 8, 32) for _ in model.h]
    parts = [model.hidden(ids[:, :3], cache)]
    for n in range(3, 8):
        parts.append(model.hidden(ids[:, n : n + 1], cache, n))

    whole = model.hidden(ids)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_sped_up_model_is_saved_as_the_very_same_bytes(tmp_path, compiled):
    model, path = loaded_gpt(tmp_path, "channel")
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


def test_a_full_precision_model_works_as_before(compiled):
    model = micro_gpt(**WIDE)
    ids = micro_ids(B=1, T=2)
    greedy = model.generate(ids, 6, temperature=0)
    fast.speed_up(model).train()

    assert torch.equal(model.generate(ids, 6, temperature=0), greedy)
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
# Text from one sequence


def test_greedy_text_in_c_is_that_of_pytorch_for_200_tokens(tmp_path, compiled):
    model, _ = loaded_gpt(tmp_path, block_size=256)
    ids = micro_ids(1, 8)
    expected = model.generate(ids, 200, temperature=0)
    fast.speed_up(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", None)  # C alone
        text = model.generate(ids, 200, temperature=0)

    assert torch.equal(text, expected)


def test_sampled_text_in_c_is_that_of_pytorch(tmp_path, compiled):
    model, _ = loaded_gpt(tmp_path)
    torch.manual_seed(0)
    expected = model.generate(micro_ids(1, 2), 6, temperature=0.8, top_k=5)
    torch.manual_seed(0)

    text = fast.speed_up(model).generate(micro_ids(1, 2), 6, temperature=0.8, top_k=5)
    assert torch.equal(text, expected)


def test_a_long_prompt_is_read_in_pytorch_and_continued_in_c(
    tmp_path, compiled, monkeypatch
):
    model, _ = loaded_gpt(tmp_path, dropout=0.5)
    ids = micro_ids(1, 8)
    exact = unpacked_gpt(model)(ids)[0, 4:-1]
    monkeypatch.setattr(fast, "LONG", 4)
    fast.speed_up(model).train()
    logits = logits_of_stream(model, ids, monkeypatch, prompt=5)

    assert all(module.training for module in model.modules())
    assert (logits - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_many_threads_may_write_at_once(tmp_path, compiled):
    model, _ = loaded_gpt(tmp_path)
    prompts = [micro_ids(1, 2, seed) for seed in range(16)]
    expected = [model.generate(ids, 6, temperature=0) for ids in prompts]
    fast.speed_up(model)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda ids: model.generate(ids, 6, temperature=0), prompts)
        for text, of_pytorch in zip(texts, expected, strict=True):
            assert torch.equal(text, of_pytorch)


def test_dropout_and_autocast_change_nothing_of_a_text_in_c(tmp_path, compiled):
    model = fast.speed_up(loaded_gpt(tmp_path, dropout=0.5)[0])
    ids = micro_ids(1, 2)
    expected = model.generate(ids, 6, temperature=0)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        text = model.generate(ids, 6, temperature=0)

    assert torch.equal(text, expected)
    assert all(module.training for module in model.modules())


def watch(model):
    model.h[1].mlp.register_forward_hook(lambda *of_call: None)


def norm_otherwise(model):
    model.ln_f.eps = 0.1


def use_other_layer(model):
    layer = model.h[0].mlp.c_fc
    model.h[0].mlp.c_fc = nn.Linear(64, 256).requires_grad_(False)
    assert type(layer) is FastLinear


def patch(model):
    gelu = model.h[0].mlp.gelu
    gelu.forward = lambda x: 2 * torch.relu(x)


CHANGES = {
    "a forward of its own": patch,
    "float32": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "a hook": watch,
    "another norm": norm_otherwise,
    "another layer": use_other_layer,
}


def test_a_packed_layer_with_a_hook_keeps_it(tmp_path, compiled):
    model = loaded_gpt(tmp_path)[0]
    model.h[0].mlp.c_fc.register_forward_hook(lambda module, inputs, y: 10 * y)
    ids = micro_ids(1, 3)
    expected = model(ids)
    found = fast.speed_up(model)(ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert type(model.h[0].mlp.c_proj) is FastLinear


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_c_was_not_written_for_is_left_to_pytorch(
    change, tmp_path, compiled, monkeypatch
):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    change(model)
    ids = micro_ids(1, 2)
    twin = copy.deepcopy(model)
    twin.__class__ = GPT
    expected = twin.generate(ids, 6, temperature=0)

    library = fast_linear.c_library()
    monkeypatch.setattr(library, "token_step", None)
    assert torch.equal(model.generate(ids, 6, temperature=0), expected)


def test_several_sequences_are_left_to_pytorch(tmp_path, compiled, without_c):
    model, _ = loaded_gpt(tmp_path)
    expected = model.generate(micro_ids(2, 2), 6, temperature=0)

    text = fast.speed_up(model).generate(micro_ids(2, 2), 6, temperature=0)
    assert torch.equal(text, expected)


REFUSED = {
    "no prompt": (micro_ids(1, 0), 3),
    "no rows": (micro_ids(1, 2)[None], 3),
    "too many tokens": (micro_ids(1, 6), 3),
    "fewer than none": (micro_ids(1, 6), -1),
    "a token beyond the vocabulary": (torch.tensor([[1, 41]]), 3),
    "a token before it": (torch.tensor([[-1, 1]]), 3),
    "no int64": (micro_ids(1, 2).int(), 3),
}


def test_what_cannot_be_continued_is_refused_as_before(tmp_path, compiled, without_c):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    for what, (ids, count) in REFUSED.items():
        with pytest.raises(ValueError):
            model.generate(ids, count)
            pytest.fail(what)


def test_no_new_tokens_are_none(tmp_path, compiled, without_c):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    assert torch.equal(model.generate(micro_ids(1, 3), 0), micro_ids(1, 3))


UNFIT_CACHES = {
    "no room": (torch.zeros(2, 1, 2, 8, 32), 8),
    "other heads": (torch.zeros(2, 1, 3, 8, 32), 0),
    "heads of another size": (torch.zeros(2, 1, 2, 8, 16), 0),
    "no values": (torch.zeros(1, 1, 2, 8, 32), 0),
}


def test_a_cache_that_does_not_fit_is_refused(tmp_path, compiled):
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    for what, (cache, start) in UNFIT_CACHES.items():
        with pytest.raises((ValueError, RuntimeError)):
            model.hidden(micro_ids(1, 1), [cache, cache.clone()], start)
            pytest.fail(what)
