"""TSLD: token-scaled logit distillation for ternary-weight generative language models, in one file.

After Kim et al., "Token-Scaled Logit Distillation for Ternary Weight Generative Language Models", NeurIPS
2023 (arXiv:2308.06744); the authors' own program is github.com/aiha-lab/TSLD.

A language model spends its time reading weights from memory. Make every weight one of {-1, 0, +1} times a
scale α and it needs 2 bits instead of 32, and a matrix product needs no multiplications. Rounding a trained
model that coarsely destroys it, so the ternary *student* is trained with the rounding in the loop
(quantization-aware training, QAT) to give the same next-token distribution as its full-precision *teacher*.
TSLD says how much each token counts:

    L = Σ_n  softmax_n( -Σ_i y_ni log P^T_ni / τ )  ·  Σ_i -P^T_ni log P^S_ni
             └─ token_scale: how unsure the     ┘      └─ kd: cross-entropy of student ┘
                teacher is of the true token             against teacher

Symbols, and what they are called below:

    n, N     a token's position in its sequence, and the sequence's length     dimension T
    i, V     an entry of the vocabulary, and the vocabulary's size             dimension V
    y_n      the true next token at position n (one-hot in the formula)        targets          (B, T)
    P^T      the teacher's next-token distribution                             teacher_logits   (B, T, V)
    P^S      the student's next-token distribution                             student_logits   (B, T, V)
    τ        temperature of the token scale: 1 as printed, 10 in the paper's   temperature
             experiments; τ → ∞ weights all tokens alike: plain logit distillation
    Δ        weights with magnitude up to Δ become 0                           threshold
    α        the one magnitude that all other weights get                      scale
    B, C, H  sequences in a batch, width of the model (n_embd), attention heads

Contents, in reading order:

    1. Quantizers    weights to codes and a scale, with a gradient all the same
    2. Bit packing   codes to 2 bits each, and the matrix product that reads them
    3. GPT           GPT-2, and text from it
    4. Losses        three numbers per token, and the five published ways to weigh them
    5. Training      the loop, evaluation, checkpoints
    6. Looking in    the measurements behind the paper's figures
    7. Baselines     OPTQ and AWQ, which round after training and leave it at that

Losses are in nats unless a name says bits. Tensors keep their device and dtype unless a docstring says
otherwise."""

import copy
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import time
import urllib.request
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------------------
# 1. Quantizers
#
# A weight matrix (out, in) becomes small integers, the codes, and one float32 scale for the whole matrix
# ("tensor") or for each of its rows, the output channels ("channel").


def _group(granularity):
    """The dimensions that share one scale; reducing over them with keepdim leaves (1, 1) or (out, 1)."""
    if granularity not in ("tensor", "channel"):
        raise ValueError(f"granularity must be 'tensor' or 'channel', not {granularity!r}")
    return (0, 1) if granularity == "tensor" else (1,)


def ternarize(weight, granularity="tensor"):
    """Ternary weight network (TWN) quantizer: w ≈ α · codes, the 2-bit (W2) rows of the paper's table 1.

        Δ = 0.7 · mean|w|   codes = +1 where w > Δ, -1 where w < -Δ, else 0   α = mean of |w| where |w| > Δ

    weight: (out, in), any float dtype. Returns codes, int8 (out, in) in {-1, 0, +1}, and scale, float32,
    (1, 1) for "tensor" or (out, 1) for "channel". A group of zeros gets scale 0.
    Source of Δ and α: Li et al., "Ternary Weight Networks", 2016. ValueError: an unknown granularity.
    """
    group = _group(granularity)
    w = weight.detach().float()
    threshold = 0.7 * w.abs().mean(group, keepdim=True)
    codes = (w > threshold).to(torch.int8) - (w < -threshold).to(torch.int8)
    count = codes.abs().sum(group, keepdim=True, dtype=torch.float32)
    total = (codes * w).sum(group, keepdim=True)  # codes · w is |w| where |w| > Δ, else 0
    scale = total / count.clamp(min=1)  # a group of zeros: 0 / 1 instead of 0 / 0
    return codes, scale


def quantize_int4(weight, granularity="tensor"):
    """Asymmetric 4-bit round-to-nearest: w ≈ scale · (codes - zero_point), the W4 rows of table 1.

        low = min(w, 0)   high = max(w, 0)   scale = (high - low) / 15   zero_point = round(-low / scale)

    The range always includes 0, so that 0 stays exactly 0 and weights all of one sign are not clipped.

    weight: (out, in), any float dtype. Returns codes, uint8 (out, in) in 0..15; scale, float32, and
    zero_point, int32 in 0..15, both (1, 1) for "tensor" or (out, 1) for "channel". A group of zeros gets
    scale 0. ValueError: an unknown granularity.
    """
    group = _group(granularity)
    w = weight.detach().float()
    low = w.amin(group, keepdim=True).clamp(max=0)
    high = w.amax(group, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero_point = (-low / _divisor(scale)).round().clamp(0, 15).to(torch.int32)
    return _int4_codes(w, scale, zero_point), scale, zero_point


def _divisor(scale):
    return torch.where(scale > 0, scale, 1.0)  # a group of zeros: 0 / 1 instead of 0 / 0


def _int4_codes(w, scale, zero_point):
    return ((w / _divisor(scale)).round() + zero_point).clamp(0, 15).to(torch.uint8)


def _quantize(weight, bits, granularity):
    """Codes, and what dequantizes them. ValueError: other bits than 2 and 4, or an unknown granularity."""
    if bits not in (2, 4):
        raise ValueError(f"bits must be 2 or 4, not {bits!r}")
    return ternarize(weight, granularity) if bits == 2 else quantize_int4(weight, granularity)


def _dequantize(codes, scale, zero_point=None):
    return scale * (codes if zero_point is None else codes - zero_point)


class _StraightThrough(torch.autograd.Function):
    """Rounding has gradient 0 almost everywhere and would stop all learning, so the backward pass leaves it
    out: forward w → ŵ, backward ∂L/∂w := ∂L/∂ŵ (the straight-through estimator)."""

    @staticmethod
    def forward(ctx, weight, bits, granularity):
        return _dequantize(*_quantize(weight, bits, granularity)).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None, None


def fake_quantize(weight, bits=2, granularity="tensor"):
    """The weight after quantizing and back, (out, in) in the weight's own dtype: forward exactly the
    dequantized value, backward the identity.

    bits: 2 (ternary) or 4. ValueError: other bits, or an unknown granularity.
    """
    return _StraightThrough.apply(weight, bits, granularity)


def _product_dtype(x):
    """The type that autocast takes matrix products in; without it x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _QuantizedProduct(torch.autograd.Function):
    """F.linear(x, fake_quantize(weight), bias), straight through as well; but of ŵ it keeps only the codes
    for the backward pass, a byte a weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, *quantized):
        ctx.dtype = _product_dtype(x)
        x = x.to(ctx.dtype)
        ctx.save_for_backward(x, *quantized)
        bias = None if bias is None else bias.to(ctx.dtype)
        return F.linear(x, _dequantize(*quantized).to(ctx.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y):  # (..., out)
        x, *quantized = ctx.saved_tensors
        grad_x = grad_y @ _dequantize(*quantized).to(ctx.dtype)  # (..., in)
        x, grad_y = (t.reshape(-1, t.shape[-1]) for t in (x, grad_y))  # (N, in), (N, out)
        grad_weight = grad_y.t() @ x  # (out, in): ∂L/∂ŵ
        grad_bias = grad_y.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, *[None] * len(quantized)


class QuantLinear(nn.Linear):
    """A linear layer that trains its weight in full precision and computes with the quantized one."""

    def __init__(self, in_features, out_features, bias=True, bits=2, granularity="tensor"):
        super().__init__(in_features, out_features, bias=bias)
        self.bits, self.granularity = bits, granularity
        self.quantized = None  # codes and what dequantizes them, within quantized_once

    def forward(self, x):  # (..., in) -> (..., out)
        quantized = self.quantized or _quantize(self.weight, self.bits, self.granularity)
        return _QuantizedProduct.apply(x, self.weight, self.bias, *quantized)

    def extra_repr(self):
        return f"{super().extra_repr()}, bits={self.bits}, granularity={self.granularity!r}"


@contextmanager
def quantized_once(model):
    """Within, the weights must not change, and each QuantLinear of the model quantizes its own only once."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    for layer in layers:
        layer.quantized = _quantize(layer.weight, layer.bits, layer.granularity)
    try:
        yield
    finally:
        for layer in layers:
            layer.quantized = None


def _is_conv1d(module):
    """Is it transformers' Conv1D, a linear layer with its weight stored (in, out)? Nothing is imported."""
    return type(module).__name__ == "Conv1D" and module.weight.shape == (module.nx, module.nf)


def _output_heads(model):
    """The layers that make logits: as the model says, else those tied to an embedding or named as heads."""
    if callable(getattr(model, "get_output_embeddings", None)):
        return [model.get_output_embeddings()]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if name.split(".")[-1] in ("lm_head", "head") or id(getattr(module, "weight", None)) in embeddings
    ]


def quantize_model(model, bits=2, granularity="tensor"):
    """Replaces every nn.Linear (and transformers' Conv1D) of any torch module by a QuantLinear, in place.

    Embeddings, norms and the output head stay in full precision, as in the paper. The new layers hold the
    very parameters of the old ones, so nothing is copied (Conv1D's are transposed). Returns the same model.
    ValueError: other bits than 2 and 4, an unknown granularity, or no layer to quantize.
    """
    fake_quantize(torch.zeros(1, 1), bits, granularity)  # refuse bad arguments before anything is changed
    heads = _output_heads(model)
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)  # a layer used twice has two names
        if name
        and (isinstance(module, nn.Linear) or _is_conv1d(module))
        and not any(module is h for h in heads)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    for name, old in layers.items():
        weight = old.weight
        if _is_conv1d(old):
            weight = nn.Parameter(old.weight.detach().t().contiguous(), old.weight.requires_grad)
        with torch.device("meta"):  # allocates nothing: the parameters come from the old layer
            new = QuantLinear(weight.shape[1], weight.shape[0], old.bias is not None, bits, granularity)
        new.weight, new.bias = weight, old.bias
        model.set_submodule(name, new.train(old.training))
    return model


# ------------------------------------------------------------------------------------------------------------
# 2. Bit packing
#
# The slide "Motivation: Accuracy Loss in Ternary Quantization" promises 16 times less memory and a matrix
# product without multiplications. Here is where the student keeps both promises.
#
# A ternary code needs 2 bits: code + 1 is 0, 1 or 2. A row of `in` codes is cut into 4 quarters of
# K = ceil(in / 4) codes, the last one filled up with code 0. Byte i of the packed row holds the i-th code of
# each quarter, quarter j in bits 2j and 2j + 1: one shift and one mask of all bytes give a quarter in order.


def pack_ternary(codes):
    """codes: int8 (out, in) in {-1, 0, +1} -> uint8 (out, ceil(in / 4)).

    An example with 3 columns: K = 1, so a row is one byte, and the fourth quarter is filling (code 0).

        codes          code + 1 in bits, last quarter first      byte
        +1  0 -1       01 00 01 10                               0x46 = 70
         0 +1 +1       01 10 10 01                               0x69 = 105
        -1  0  0       01 01 01 00                               0x54 = 84

    and ternary_matmul of x = (2, 3, 5) with it adds and subtracts:

        y = α · ( 2 - 5,  3 + 5,  -2 ) = α · (-3, 8, -2)
    """
    K = math.ceil(codes.shape[1] / 4)
    filled = F.pad(codes, (0, 4 * K - codes.shape[1]))  # (out, 4 K)
    quarters = (filled + 1).to(torch.uint8).view(-1, 4, K)  # (out, 4, K) in {0, 1, 2}
    return sum(quarters[:, j] << 2 * j for j in range(4))


def unpack_ternary(packed, in_features):
    """packed: uint8 (out, ceil(in / 4)) -> codes, int8 (out, in)."""
    quarters = [((packed >> 2 * j) & 3).to(torch.int8) - 1 for j in range(4)]  # each (out, K)
    return torch.cat(quarters, dim=1)[:, :in_features]


def ternary_matmul_by_sums(x, codes, scale):
    """The product without multiplications, in its plainest dress: for each output the sum of the x where the
    code is +1 minus the sum of the x where it is -1, and one product with α at the end.

    x: (in,); codes: (out, in); scale: (1, 1) or (out, 1). Returns (out,).
    """
    sums = torch.stack([x[row == 1].sum() - x[row == -1].sum() for row in codes])
    return scale.flatten() * sums


def ternary_matmul(x, packed, scale):
    """x @ (scale · codes).T from the packed bytes; the activations stay in floating point (W2A16).

    x: (..., in), any float dtype; packed: uint8 (out, ceil(in / 4)); scale: float32 (1, 1) or (out, 1).
    Returns (..., out) in x's dtype, accumulated in float32.

    One row of x takes as long as reading the weights: under torch.compile it is one loop over the bytes.
    Many rows take as long as the arithmetic: they unpack a block of outputs at a time for a dense product.
    """
    rows = x.reshape(-1, x.shape[-1]).float()  # (M, in)
    if len(rows) == 1:
        K = packed.shape[1]
        quarters = F.pad(rows[0], (0, 4 * K - rows.shape[1])).view(4, K)  # of x, like those of the weight

        def product(packed):  # (R, K) -> (R,)
            p = packed.int()
            # p & (3 << 2j) is (code + 1) · 4^j: dividing x by 4^j, once for all rows, is less than shifting.
            return sum((p & 3 << 2 * j) * (quarters[j] / 4**j) for j in range(4)).sum(1)

        y = (in_streams(product, packed) - rows.sum())[None]  # Σ (code + 1) · x - Σ x
    else:
        blocks = packed.split(1024)
        y = torch.cat([rows @ unpack_ternary(block, rows.shape[1]).float().t() for block in blocks], dim=1)
    return (y * scale.flatten()).to(x.dtype).view(*x.shape[:-1], len(packed))


def in_streams(product, weight):
    """product(weight), (out,), with the rows of the weight, (out, ...), taken from four places at once: a
    processor fetches ahead in each of them, and gets more out of memory than from one place."""
    R = math.ceil(len(weight) / 4)
    parts = []
    for begin in range(0, 4 * R, R):
        first = min(begin, len(weight) - R)  # the last ones overlap those before, to be R rows as well
        parts.append(product(weight[first : first + R])[begin - first :])
    return torch.cat(parts)


COMPILE_OPTIONS = {
    # On a CPU, multiplying and adding is one instruction.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Each call trusts that the model's layers are still those that were compiled.
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    # So do the shapes of the weights, some 200 tensors a token.
    "size_asserts": False,
}


class PackedLinear(nn.Module):
    """A linear layer whose ternary weight is packed, 2 bits each. For inference: it has nothing to train."""

    def __init__(self, in_features, packed, scale, bias=None):
        super().__init__()
        self.in_features = in_features
        self.register_buffer("packed", packed)  # uint8 (out, ceil(in / 4))
        self.register_buffer("scale", scale)  # float32 (1, 1) or (out, 1)
        self.register_buffer("bias", bias)  # (out,) or None

    def forward(self, x):  # (..., in) -> (..., out)
        y = ternary_matmul(x, self.packed, self.scale)
        return y if self.bias is None else y + self.bias

    def extra_repr(self):
        return f"{self.in_features}, {len(self.packed)}, bias={self.bias is not None}"


def _head_product(x, weight):
    """x @ weight.T in float32, (..., C) -> (..., V); weight: (V, C) of any dtype, never converted whole."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if len(rows) == 1 and torch.compiler.is_compiling():  # one loop over the bytes, as in ternary_matmul
        y = in_streams(lambda part: (rows * part).sum(1), weight)[None]
    else:
        y = torch.cat([rows @ block.float().t() for block in weight.split(4096)], dim=1)
    return y.view(*x.shape[:-1], len(weight))


class HalfHead(nn.Module):
    """The output head of a loaded model: reads the float16 embedding, computes in float32."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight  # float16 (V, C)

    def forward(self, x):  # (..., C) -> (..., V) float32
        return _head_product(x, self.weight)


class Int8Head(nn.Module):
    """A loaded model's output head in 8 bits, half the bytes to read for each token:

        w ≈ scale · codes   scale = max|w| / 127 of each row, a token's   codes = round(w / scale)

    weight: (V, C), any float dtype. `model.lm_head = Int8Head(model.wte.weight)`; save_model leaves it out.
    """

    def __init__(self, weight):
        super().__init__()
        w = weight.detach().float()
        scale = w.abs().amax(1, keepdim=True) / 127
        codes = (w / _divisor(scale)).round().to(torch.int8)
        self.register_buffer("codes", codes, persistent=False)  # int8 (V, C)
        self.register_buffer("scale", scale, persistent=False)  # float32 (V, 1)

    def forward(self, x):  # (..., C) -> (..., V) float32
        return _head_product(x, self.codes) * self.scale.flatten()


def pack_model(model):
    """Replaces every 2-bit QuantLinear by a PackedLinear, in place; 4-bit ones stay. Returns the same model,
    in eval mode. ValueError: there is none."""
    layers = [
        (n, m)
        for n, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, QuantLinear) and m.bits == 2
    ]
    if not layers:
        kind = type(model).__name__
        raise ValueError(f"{kind} has no 2-bit QuantLinear to pack: quantize_model(model, bits=2) first")
    for name, layer in layers:
        codes, scale = ternarize(layer.weight, layer.granularity)
        bias = None if layer.bias is None else layer.bias.detach()
        model.set_submodule(name, PackedLinear(layer.in_features, pack_ternary(codes), scale, bias))
    return model.eval()


def _own_tensors(model):
    """Name to tensor of all that a state dict holds, tied ones once."""
    kept = model.state_dict().keys()
    return {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in kept}


def save_model(path, model):
    """Writes a packed model: packed weights, float32 scales, biases and norms, float16 embeddings and output
    head, the config of a GPT, and a checksum over it all. Whole or not at all.
    ValueError: nothing in the model is packed."""
    layers = {name: m.in_features for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no packed layer to save: pack_model(model) first")
    half = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    half |= {id(getattr(head, "weight", None)) for head in _output_heads(model)}
    tensors = {n: (t.half() if id(t) in half else t).detach().cpu() for n, t in _own_tensors(model).items()}
    config = asdict(model.config) if isinstance(model, GPT) else None
    write_file(path, {"format": PACKED_FORMAT, "config": config, "layers": layers, "tensors": tensors})


def load_model(path, into=None):
    """Reads what save_model wrote; the model is in eval mode and has nothing to train.

    into: the module to fill in place, full-precision or quantized, for models that are not our GPT. Our GPT
        keeps its embeddings in float16; other models get them in the dtype they have.
    CheckpointError: truncated, altered, foreign, or of a model with other layers.
    """
    content = read_file(path)
    if not isinstance(content, dict) or content.get("format") != PACKED_FORMAT:
        raise CheckpointError(f"{path} is not a packed model")
    layers, tensors = content["layers"], content["tensors"]
    if into is None and content["config"] is None:
        raise CheckpointError(f"{path} is not of our GPT: load_model needs `into`, a model of its kind")
    with torch.device("meta"):
        model = GPT(GPTConfig(**content["config"])) if into is None else into
    there, here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {}
    modules = dict(model.named_modules())
    for name, tensor in _own_tensors(model).items():  # here: what a packed model of this kind would hold
        layer, _, part = name.rpartition(".")
        if layer in layers and part == "weight":
            out_features, in_features = tensor.shape[::-1] if _is_conv1d(modules[layer]) else tensor.shape
            here[f"{layer}.packed"] = (out_features, math.ceil(in_features / 4))
            here[f"{layer}.scale"] = there.get(f"{layer}.scale")  # depends on the granularity
        else:
            here[name] = tuple(tensor.shape)
    _refuse_other_shapes(path, there, here)
    for name, in_features in layers.items():
        parts = (tensors.get(f"{name}.{part}") for part in ("packed", "scale", "bias"))
        model.set_submodule(name, PackedLinear(in_features, *parts))
    model.load_state_dict(tensors, strict=False, assign=into is None)  # not strict: tied ones are there once
    if into is None:
        model.lm_head = HalfHead(model.wte.weight)
    return model.requires_grad_(False).eval()


def _refuse_other_shapes(path, there, here):
    """CheckpointError where the tensors in a file are not those of the model; both are name to shape."""
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            shapes = f"shape {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
            raise CheckpointError(f"{path} is of another model: {name} has {shapes}")


PACKED_FORMAT = "tsld packed 1"


# ------------------------------------------------------------------------------------------------------------
# 3. GPT
#
# GPT-2 (Radford et al., 2019): learned positions, layer norm before each sublayer, biases everywhere, GELU in
# its tanh approximation, output head tied to the token embedding. Parameter names and shapes are those of the
# published weights (there c_attn, c_proj and c_fc are stored transposed).


@dataclass
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 small's (124 million parameters)."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


class Trace(NamedTuple):
    """What layer-to-layer distillation and the figures look at besides the logits."""

    logits: torch.Tensor  # (B, T, V)
    hidden_states: list  # n_layer + 1 of (B, T, C): the embedding, then each block's output; before ln_f
    attention_scores: list  # n_layer of (B, H, T, T): q·k/√d, before mask and softmax


class Attention(nn.Module):
    """Causal multi-head self-attention: position n sees positions up to n, so the quantization errors of
    early tokens reach every later one (slide "Approach: Logit KD for Cumulative Quantization Error")."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, positions, cache=None, scores=None):
        """x: (B, T, C) -> (B, T, C); positions: (T,), where the tokens stand.

        cache: the keys and the values so far, each (B, H, S, C / H); x's are written in at `positions`.
        scores: a list that gets the (B, H, T, T) attention scores appended.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C / H)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            k, v = (old.index_copy_(2, positions, new) for old, new in zip(cache, (k, v)))  # (B, H, S, C / H)
        if cache is not None or scores is not None:
            score = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])  # (B, H, T, T or S)
            if scores is not None:
                scores.append(score)
            future = torch.arange(k.shape[2], device=x.device) > positions[:, None]  # (T, T or S)
            p = score.masked_fill(future, -math.inf).softmax(-1)
            y = F.dropout(p, dropout) @ v
        else:
            on_cpu = x.device.type == "cpu"  # where the fused kernel's backward is slower in bfloat16
            with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
                q, k, v = (t.float() if on_cpu else t for t in (q, k, v))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = self.c_proj(y.to(x.dtype).transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, dropout)


class MLP(nn.Module):
    """The position-wise half of a block: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, positions, cache=None, scores=None):
        x = x + self.attn(self.ln_1(x), positions, cache, scores)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. `model(ids)` gives logits (B, T, V), `model(ids, trace=True)` a Trace.

    ids: int64 (B, T), T ≤ block_size, else ValueError.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.compiled_step = None  # see compile_generation
        for name, parameter in self.named_parameters():  # GPT-2's initialization
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" not in name:
                residual = name.endswith("c_proj.weight")  # 2 per block add up on the residual path
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    @classmethod
    def from_pretrained(cls, source, block_size=None, dropout=0.0, progress=None):
        """GPT-2's published weights, in float32 and eval mode.

        source: one of PUBLISHED, downloaded once into WEIGHTS; a pytorch_model.bin in the published format;
            or a folder with one. The number of heads is that of a config.json beside it, else n_embd / 64,
            which holds for all of PUBLISHED.
        block_size: keep only the first so many positions. progress: see download.
        ConnectionError: cannot be downloaded. CheckpointError: truncated, of another model, or holds more
        than tensors; it then runs nothing. ValueError: block_size is beyond what the file has.
        """
        path = Path(source)
        if source in PUBLISHED:
            path = WEIGHTS / f"{source}.bin"
            if not path.exists():
                url = f"https://huggingface.co/openai-community/{source}/resolve/main/pytorch_model.bin"
                download([url], path, PUBLISHED[source], progress)
        elif path.is_dir():
            path = path / "pytorch_model.bin"
        tensors = _published_tensors(path)
        for name in ("wte.weight", "wpe.weight"):
            if name not in tensors or tensors[name].dim() != 2:
                raise CheckpointError(f"{path} is of another model: it has no matrix {name}")
        if block_size is not None:
            if block_size > len(tensors["wpe.weight"]):
                raise ValueError(f"{path} has {len(tensors['wpe.weight'])} positions, not {block_size}")
            tensors["wpe.weight"] = tensors["wpe.weight"][:block_size].clone()
        n_layer = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("h.")), default=0)
        (vocab_size, n_embd), block_size = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
        n_head = _published_heads(path, n_embd)
        with torch.device("meta"):
            model = cls(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout))
        there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        here = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        _refuse_other_shapes(path, there, here)
        model.load_state_dict(tensors, strict=False, assign=True)  # not strict: the head is tied
        model.lm_head.weight = model.wte.weight
        return model.eval()

    def hidden(self, ids, positions=None, cache=None, hidden_states=None, scores=None):
        """ids (B, T) -> (B, T, C) after the final norm; logits are hidden @ head.T.

        positions: (T,), where the tokens stand; 0..T-1 if not given. cache: n_layer pairs, see Attention.
        hidden_states, scores: lists that get what a Trace holds appended.
        """
        if ids.shape[1] > self.config.block_size:
            raise ValueError(f"{ids.shape[1]} tokens do not fit block_size {self.config.block_size}")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        dtype = self.ln_f.weight.dtype  # a packed model's embeddings are float16, and only they
        x = self.wte(ids).to(dtype) + self.wpe(positions).to(dtype)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            if hidden_states is not None:
                hidden_states.append(x)
            x = block(x, positions, None if cache is None else cache[layer], scores)
        if hidden_states is not None:
            hidden_states.append(x)
        return self.ln_f(x)

    def forward(self, ids, trace=False):
        if not trace:
            return self.lm_head(self.hidden(ids))
        hidden_states, scores = [], []
        logits = self.lm_head(self.hidden(ids, hidden_states=hidden_states, scores=scores))
        return Trace(logits, hidden_states, scores)

    def next_logits(self, ids, positions, cache):
        """ids (B, T) at `positions` (T,) -> (B, V), the logits of the token after the last of them."""
        return self.lm_head(self.hidden(ids, positions, cache)[:, -1:])[:, 0].float()

    def compile_generation(self):
        """Compiles the step that adds one token, which takes a minute at the first one and makes generation
        several times faster. To be called again after a change to the model's layers."""

        def step(model, ids, positions, cache):
            return model.next_logits(ids, positions, cache)

        # torch.compile keeps what it compiled with the code object: as this one is new, another model, whose
        # layers COMPILE_OPTIONS would not look at, gets its own.
        step.__code__ = step.__code__.replace()
        self.compiled_step = torch.compile(step, options=COMPILE_OPTIONS)

    @torch.no_grad()
    def stream(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Like generate, but yields the new tokens as they come, each (B, 1)."""
        B, T = ids.shape
        room = T + max_new_tokens
        if T == 0:
            raise ValueError("the prompt is empty: generation starts from one token or more")
        if room > self.config.block_size:
            together = f"a prompt of {T} tokens and {max_new_tokens} new ones"
            raise ValueError(f"{together} do not fit block_size {self.config.block_size}")
        was_training = self.training
        self.eval()
        shape = (B, self.config.n_head, room, self.config.n_embd // self.config.n_head)
        cache = [tuple(self.ln_f.weight.new_zeros(shape) for _ in range(2)) for _ in self.h]
        positions = torch.arange(T, device=ids.device)
        try:
            for _ in range(max_new_tokens):
                step = self.compiled_step if ids.shape[1] == 1 else None
                logits = (step or GPT.next_logits)(self, ids, positions, cache)  # (B, V)
                if temperature == 0:
                    ids = logits.argmax(-1, keepdim=True)  # (B, 1)
                else:
                    if top_k is not None:
                        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                        logits = logits.masked_fill(logits < least, -math.inf)
                    ids = torch.multinomial((logits / temperature).softmax(-1), 1)
                positions = positions[-1:] + 1
                yield ids
        finally:
            self.train(was_training)

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Continues each row of ids, int64 (B, T), by sampling from softmax(logits / temperature), among the
        `top_k` likeliest tokens where given; temperature 0 takes the likeliest.

        Returns (B, T + max_new_tokens), the prompt in front. Leaves the model in the mode it found.
        ValueError: an empty prompt, or T + max_new_tokens > block_size.
        """
        return torch.cat([ids, *self.stream(ids, max_new_tokens, temperature, top_k)], dim=1)


PUBLISHED = {  # name to SHA-256 of its pytorch_model.bin, where it is known
    "gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421",
    "gpt2-medium": None,
    "gpt2-large": None,
    "gpt2-xl": None,
}
WEIGHTS = Path(__file__).resolve().parent / "data" / "weights"


def _published_tensors(path):
    """Name to float32 tensor of a published pytorch_model.bin, as our GPT calls and lays them out."""
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file can make torch trip over anything
            problem = "is truncated or holds more than plain values, and is not loaded"
            raise CheckpointError(f"{path} {problem}") from None
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(f"{path} holds no named tensors")
    tensors = {}
    for name, tensor in content.items():
        name = name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue  # the causal mask, which old files hold as well
        if re.fullmatch(r"h\.\d+\..*\.c_(attn|proj|fc)\.weight", name):
            tensor = tensor.t()  # Conv1D's is (in, out)
        tensors[name] = tensor.float().contiguous()
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", head[:0])):
        raise CheckpointError(f"{path} is of another model: lm_head.weight is not wte.weight")
    return tensors


def _published_heads(path, n_embd):
    config = path.parent / "config.json"
    try:
        n_head = json.loads(config.read_bytes())["n_head"] if config.exists() else n_embd / 64
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{config} does not say n_head") from None
    if n_head != int(n_head) or n_head < 1 or n_embd % n_head:
        raise CheckpointError(f"{path} needs a config.json beside it that says n_head: n_embd is {n_embd}")
    return int(n_head)


# ------------------------------------------------------------------------------------------------------------
# 4. Losses
#
# Every loss here weighs the same three numbers per token, each (B, T), in nats. So they are computed once,
# and each published loss is a line or two on top of them.

LOSSES = ("gt", "logit", "l2l", "logit_gt", "tsld")


class Terms(NamedTuple):
    """The per-token terms of every loss, float32 whatever the logits were."""

    ce_student: torch.Tensor  # (B, T)  -log P^S[y]: the ground-truth loss
    ce_teacher: torch.Tensor  # (B, T)  -log P^T[y]: how unsure the teacher is of the true token
    kd: torch.Tensor  #         (B, T)  -Σ_i P^T_i log P^S_i: the distillation loss
    layers: torch.Tensor | float = 0.0  # scalar, layer_to_layer_loss where L2L is asked for


def per_token_terms(student_logits, teacher_logits, targets):
    """Terms from full logits, (B, T, V) of any float dtype, or objects with .logits; targets: int64 (B, T).
    No gradient flows into the teacher."""
    log_p_student = F.log_softmax(_logits(student_logits).float(), dim=-1)  # (B, T, V)
    log_p_teacher = F.log_softmax(_logits(teacher_logits).detach().float(), dim=-1)
    true = targets[..., None]  # (B, T, 1)
    ce_student = -log_p_student.gather(-1, true).squeeze(-1)
    ce_teacher = -log_p_teacher.gather(-1, true).squeeze(-1)
    kd = -(log_p_teacher.exp() * log_p_student).sum(-1)
    return Terms(ce_student, ce_teacher, kd)


def _logits(output):
    """What a model returned, or its .logits: transformers' models, and a Trace."""
    return getattr(output, "logits", output)


def layer_to_layer_loss(student_trace, teacher_trace):
    """L2L, the distillation made for encoders (slide "QAT-KD Methods for Encoder and Decoder QAT"):

        Σ_layers MSE(hidden states) + Σ_layers MSE(attention scores at and before each position)

    The mask hides the future from the model, so the scores count over the T(T+1)/2 positions on and below the
    diagonal alone. Returns a float32 scalar. No gradient flows into the teacher.

    transformers' models give .hidden_states and .attentions instead: there the last state is the one after
    the final norm, and for the scores stand the probabilities after the softmax. ValueError: not even those.
    """
    loss = 0.0
    for student, teacher in zip(student_trace.hidden_states, teacher_trace.hidden_states, strict=True):
        loss = loss + F.mse_loss(student.float(), teacher.detach().float())
    for student, teacher in zip(_attention(student_trace), _attention(teacher_trace), strict=True):
        seen = torch.ones(student.shape[-2:], dtype=torch.bool, device=student.device).tril()  # (T, T)
        loss = loss + F.mse_loss(student[..., seen].float(), teacher[..., seen].detach().float())
    return loss


def _attention(trace):
    """n_layer tensors (B, H, T, T): a Trace's scores, or the probabilities of transformers' models."""
    if isinstance(trace, Trace):
        return trace.attention_scores
    if not trace.attentions or trace.attentions[0] is None:
        raise ValueError("L2L looks at the attention: load the model with attn_implementation='eager'")
    return trace.attentions


def token_scale(ce_teacher, temperature=10.0):
    """softmax_n(ce_teacher / τ): how much each token of a sequence counts. The surer the teacher is of the
    true token, the less: there distillation and ground truth teach the same thing, and the student overfits.

    The softmax runs over the N tokens of one sequence, not over the vocabulary and not over the batch.
    ce_teacher: (B, T) in nats -> (B, T), rows sum to 1, a constant to the gradient.
    temperature: math.inf gives 1/N everywhere. ValueError: not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"the token scale's temperature must be above 0, not {temperature}")
    return (ce_teacher.detach() / temperature).softmax(dim=1)


def tsld_loss(terms, temperature=10.0, gt_weight=0.0):
    """Mean over the B sequences of Σ_n token_scale_n · kd_n (+ gt_weight · mean ce_student), a scalar.

    The authors' program sums over the batch where this takes the mean, and adds the ground-truth loss; the
    printed formula does neither.
    """
    w = token_scale(terms.ce_teacher, temperature)  # (B, T)
    loss = (w * terms.kd).sum(1).mean()
    return loss + gt_weight * terms.ce_student.mean() if gt_weight else loss


def distillation_loss(name, terms, temperature=10.0, gt_weight=0.0):
    """One of LOSSES as a float32 scalar: the rows of the paper's table 1. Only "tsld" looks at temperature
    and gt_weight. ValueError: an unknown name."""
    if name == "gt":  # ground truth alone
        return terms.ce_student.mean()
    if name == "logit":
        return terms.kd.mean()
    if name == "l2l":  # L2L+logit
        return terms.kd.mean() + terms.layers
    if name == "logit_gt":
        return terms.kd.mean() + terms.ce_student.mean()
    if name == "tsld":
        return tsld_loss(terms, temperature, gt_weight)
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {name!r}")


# The same terms at less cost. For GPT-2's vocabulary the logits are the largest tensors of a training step
# by far; what follows keeps them from ever being there whole. Skipping it loses nothing of the method.

SCRATCH_BYTES = 2**27  # what the logits of one model take at a time, in float32; so twice this for two models


def lean_per_token_terms(
    student_hidden, student_head, teacher_hidden, teacher_head, targets,
    loss=None, temperature=10.0, gt_weight=0.0,
):
    """The Terms of per_token_terms from logits = hidden @ head.T, a few rows of them at a time: neither
    model's (B, T, V) logits ever exist whole, forward or backward.

    hidden: (B, T, C), after the final norm; head: (V, C); targets: int64 (B, T). For the loss "gt" the
        teacher's may be None, and its terms are then 0.
    loss: the one of LOSSES that the terms will go into, with its temperature and gt_weight. Its gradient is
        then taken while the logits are there, and the terms must not go into another. Without it they may,
        and the backward pass computes the logits again.
    No gradient flows into the teacher. ValueError: an unknown loss, or no teacher where the loss needs one.
    """
    if loss is not None and loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")
    if teacher_hidden is None and loss != "gt":
        raise ValueError(f"only the loss 'gt' can do without a teacher, not {loss!r}")
    teacher = (None if x is None else x.detach() for x in (teacher_hidden, teacher_head))
    models = student_hidden, student_head, *teacher
    return Terms(*_LeanTerms.apply(*models, targets, loss, temperature, gt_weight))


def _log_probabilities(hidden, head, scratch):
    """(R, C), (V, C) -> float32 (R, V), in the first R rows of scratch. Memory that is used again and again
    is faster than new memory."""
    z = scratch[: len(hidden)]
    if hidden.dtype == z.dtype:
        torch.mm(hidden, head.t(), out=z)
    else:
        z.copy_(hidden @ head.t())
    return torch.log_softmax(z, dim=-1, out=z)


def _probabilities_in_place(log_p):
    """exp(log_p), as a softmax, which is several times faster than exp on CPUs."""
    return torch.softmax(log_p, dim=-1, out=log_p)


def _weights_of_terms(loss, ce_teacher, temperature, gt_weight):
    """a and b, each (B, T), with which a loss is Σ_n a_n · kd_n + b_n · ce_student_n, L2L's layers apart."""
    a, b = {"gt": (0, 1), "logit": (1, 0), "l2l": (1, 0), "logit_gt": (1, 1), "tsld": (1, gt_weight)}[loss]
    mean = torch.full_like(ce_teacher, 1 / ce_teacher.numel())
    scale = token_scale(ce_teacher, temperature) / len(ce_teacher) if loss == "tsld" else mean
    return a * scale, b * mean


def _add_gradients(grad_hidden, grad_head, hidden, head, log_p_student, p_teacher, y, a, b):
    """The loss Σ_n a_n · kd_n + b_n · ce_student_n of R tokens has, with logits z = hidden @ head.T,

        ∂L/∂z_ni = a_n (P^S_ni - P^T_ni) + b_n (P^S_ni - y_ni)
        ∂L/∂hidden = ∂L/∂z @ head        ∂L/∂head = (∂L/∂z).T @ hidden

    and these are added to grad_hidden (R, C) and grad_head (V, C). Overwrites log_p_student.
    """
    a, b = a[:, None], b[:, None]  # (R, 1)
    grad_z = _probabilities_in_place(log_p_student).mul_(a + b)  # (R, V)
    if p_teacher is not None:
        grad_z.addcmul_(p_teacher, a, value=-1)
    grad_z = grad_z.scatter_add_(1, y, -b).to(head.dtype)
    grad_hidden += grad_z @ head
    if grad_head.dtype == head.dtype:
        grad_head.addmm_(grad_z.t(), hidden)
    else:
        grad_head += grad_z.t() @ hidden


class _LeanTerms(torch.autograd.Function):
    """lean_per_token_terms for N = B · T tokens. h (N, C) and w (V, C) are hidden and head of the student, in
    the type that products are taken in; H and W of the teacher."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, loss, temperature, gt_weight):
        kind, (B, T), dtype = hidden.device.type, targets.shape, _product_dtype(head)
        models = hidden, head, teacher_hidden, teacher_head
        h, w, H, W = (None if x is None else x.flatten(0, -2).to(dtype) for x in models)
        y = targets.reshape(-1, 1)  # (N, 1)
        rows = min(B * T, max(1, SCRATCH_BYTES // (4 * len(w))))
        if rows > T:
            rows -= rows % T  # whole sequences: a token scale takes all of its own
        pieces = [slice(begin, begin + rows) for begin in range(0, B * T, rows)]
        ce_student, ce_teacher, kd = torch.zeros(3, B * T, device=h.device)
        scratch = torch.empty(1 if H is None else 2, rows, len(w), device=h.device)
        early = loss is not None and any(ctx.needs_input_grad)  # gradients while the logits are there
        gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (h, w)] if early else None
        with torch.autocast(kind, enabled=False):
            if early and loss == "tsld" and rows < T:
                for piece in pieces:
                    log_P = _log_probabilities(H[piece], W, scratch[1])
                    ce_teacher[piece] = -log_P.gather(1, y[piece])[:, 0]
            for piece in pieces:
                log_p = _log_probabilities(h[piece], w, scratch[0])  # (R, V)
                ce_student[piece] = -log_p.gather(1, y[piece])[:, 0]
                P = None
                if H is not None:
                    log_P = _log_probabilities(H[piece], W, scratch[1])
                    ce_teacher[piece] = -log_P.gather(1, y[piece])[:, 0]
                    P = _probabilities_in_place(log_P)
                    kd[piece] = -torch.einsum("ni,ni->n", P, log_p)
                if early:
                    weights = _weights_of_terms(loss, ce_teacher.view(B, T), temperature, gt_weight)
                    a, b = (x.flatten()[piece] for x in weights)
                    _add_gradients(gradients[0][piece], gradients[1], h[piece], w, log_p, P, y[piece], a, b)
        ctx.loss, ctx.pieces, ctx.gradients = loss, pieces, gradients
        ctx.kind, ctx.shape, ctx.dtypes = kind, hidden.shape, (hidden.dtype, head.dtype)
        ctx.save_for_backward(*(() if early else (h, w, H, W, y)))
        ctx.mark_non_differentiable(ce_teacher)
        return tuple(x.view(B, T) for x in (ce_student, ce_teacher, kd))

    @staticmethod
    def backward(ctx, grad_ce_student, _, grad_kd):
        if ctx.gradients is not None:
            # They are the loss's own. Back through it came g · a and g · b, and Σ a = 1 (Σ b in "gt").
            g = (grad_ce_student if ctx.loss == "gt" else grad_kd).sum()
            grad_hidden, grad_head = (x.mul_(g) for x in ctx.gradients)
        else:
            h, w, H, W, y = ctx.saved_tensors
            grad_hidden, grad_head = (torch.zeros_like(x, dtype=torch.float32) for x in (h, w))
            a, b = grad_kd.flatten(), grad_ce_student.flatten()
            scratch = torch.empty(2, ctx.pieces[0].stop, len(w), device=h.device)
            with torch.autocast(ctx.kind, enabled=False):
                for piece in ctx.pieces:
                    P = _probabilities_in_place(_log_probabilities(H[piece], W, scratch[1]))
                    log_p = _log_probabilities(h[piece], w, scratch[0])
                    rows = y[piece], a[piece], b[piece]
                    _add_gradients(grad_hidden[piece], grad_head, h[piece], w, log_p, P, *rows)
        grad_hidden = grad_hidden.view(ctx.shape).to(ctx.dtypes[0])
        return grad_hidden, grad_head.to(ctx.dtypes[1]), *[None] * 6


# ------------------------------------------------------------------------------------------------------------
# 5. Training


@dataclass
class TrainConfig:
    """One training run; the token scale's settings matter to "tsld" alone. The loss "gt" needs no teacher."""

    loss: str = "tsld"
    temperature: float = 10.0  # τ of the token scale
    gt_weight: float = 0.0  # weight of the ground-truth loss added to TSLD
    steps: int = 450  # optimizer steps
    batch_size: int = 32  # sequences per step, over all processes
    block_size: int | None = None  # tokens in a sequence; None: our GPT's own block_size
    accumulate: int = 1  # parts that each process takes its share of a batch in, one after the other
    lr: float = 1e-3  # peak learning rate, reached after the warm-up
    warmup: float = 0.05  # share of the steps over which the learning rate rises from 0
    final_lr: float = 0.1  # share of lr that the cosine ends on
    weight_decay: float = 0.1  # on matrices and embeddings, not on biases and norms
    betas: tuple = (0.9, 0.95)  # AdamW's running averages of gradient and squared gradient
    clip: float = 1.0  # largest L2 norm of the gradient
    dtype: str = "float32"  # matrix products in this type (autocast); the weights stay float32
    seed: int = 0  # of data order and dropout


class CheckpointError(ValueError):
    """A file that is truncated, altered, foreign, or from another configuration."""


class TrainingDiverged(ArithmeticError):
    """The loss became NaN or infinite."""


class TrainingStopped(Exception):
    """`on_step` asked training to stop; the checkpoint is on disk."""


def learning_rate(step, config):
    """Linear warm-up, then half a cosine from lr down to final_lr · lr. step: 0-based."""
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)  # 0 after the warm-up, 1 at the last step
    cosine = (1 + math.cos(math.pi * progress)) / 2  # 1 ... 0
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def get_batch(tokens, batch_size, block_size, rng):
    """Random pieces of the text. tokens: int64 (n,), n > block_size; rng: a numpy Generator.
    Returns ids and targets, each int64 (batch_size, block_size), the targets one token ahead."""
    starts = torch.from_numpy(rng.integers(len(tokens) - block_size, size=batch_size))  # (B,)
    pieces = tokens[starts[:, None] + torch.arange(block_size + 1)]  # (B, T + 1)
    return pieces[:, :-1], pieces[:, 1:]


def make_optimizer(model, config):
    """AdamW; weight decay on matrices alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def hidden_and_head(model, ids):
    """(B, T, C) after the final norm, and the head (V, C); of our GPT, or of a transformers model."""
    if isinstance(model, GPT):
        return model.hidden(ids), model.lm_head.weight
    return model.base_model(ids)[0], model.get_output_embeddings().weight


@torch.no_grad()
def has_lean_terms(model, loss):
    """Can training_loss take lean terms? L2L looks between the layers; and a model's logits must be
    hidden @ head.T and nothing more, which is tried out on two tokens."""
    if loss == "l2l" or isinstance(model, GPT):
        return loss != "l2l"
    was_training = model.training
    model.eval()
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    hidden, head = hidden_and_head(model, ids)
    logits, product = _logits(model(ids)).float(), hidden.float() @ head.float().t()
    model.train(was_training)
    return logits.shape == product.shape and torch.allclose(logits, product, rtol=1e-5, atol=1e-5)


def training_loss(student, teacher, ids, targets, config, lean=True):
    """One of LOSSES on one batch, ids and targets (B, T): both models forward, the terms, the loss.

    The models are our GPTs, or both transformers' causal language models.
    lean: take lean terms where the loss allows it, even for a vocabulary of 2,048, where they are already a
        fifth faster than full logits.
    """
    setting = config.loss, config.temperature, config.gt_weight
    if config.loss == "gt" and not lean:
        return F.cross_entropy(_logits(student(ids)).float().flatten(0, 1), targets.flatten())
    if config.loss == "gt":
        terms = lean_per_token_terms(*hidden_and_head(student, ids), None, None, targets, *setting)
    elif config.loss == "l2l":
        ours = isinstance(student, GPT)
        ask = {"trace": True} if ours else {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            teacher_trace = teacher(ids, **ask)
        student_trace = student(ids, **ask)
        terms = per_token_terms(student_trace, teacher_trace, targets)
        terms = terms._replace(layers=layer_to_layer_loss(student_trace, teacher_trace))
    elif lean:
        with torch.no_grad():
            teachers = hidden_and_head(teacher, ids)
        terms = lean_per_token_terms(*hidden_and_head(student, ids), *teachers, targets, *setting)
    else:
        with torch.no_grad():
            teacher_logits = teacher(ids)
        terms = per_token_terms(student(ids), teacher_logits, targets)
    return distillation_loss(config.loss, terms, *setting[1:])


class TrainingLoss(nn.Module):
    """training_loss as a module of the student's parameters, for DistributedDataParallel to wrap."""

    def __init__(self, student, teacher, config):
        super().__init__()
        self.student, self.config = student, config
        self.lean = has_lean_terms(student, config.loss)
        self.frozen = [teacher]  # in a list, so that it is no submodule: it has nothing to synchronize

    def forward(self, ids, targets):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return training_loss(self.student, self.frozen[0], ids, targets, self.config, self.lean)


def add_gradients(objective, batch):
    """Forward and backward pass of a TrainingLoss over the parts of a batch, a list of ids and targets, each
    (B, T); the weights are quantized once for all of them. Returns the mean loss in nats."""
    loss_of_batch = 0.0
    several = isinstance(objective, nn.parallel.DistributedDataParallel)
    with quantized_once(objective):
        for i, part in enumerate(batch):
            last = i + 1 == len(batch)  # processes exchange gradients once per step
            with objective.no_sync() if several and not last else nullcontext():
                loss = objective(*part) / len(batch)
                loss.backward()
            loss_of_batch += loss.item()
    return loss_of_batch


def processes():
    """This process's rank and the number of processes that train together: 0 and 1 outside of torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(*values):
    """Each number summed over the processes, on all of them."""
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def train(model, tokens, config, teacher=None, checkpoint=None, resume=False, on_step=None):
    """Trains `model` in place, under any of LOSSES, on random pieces of `tokens`, int64 (n,), on the CPU.

    model, teacher: GPTs, or both transformers' causal language models, which need config.block_size.
    checkpoint: a path. The state is written there every CHECKPOINT_SECONDS and at the end, the one before is
        kept beside it; with `resume` training goes on from there, to the weights it would have had anyway.
    on_step(step, loss): called after each step, 1-based, with the loss in nats; True saves and stops.

    Where torch.distributed is initialized, each process takes its share of every batch.
    Returns the seconds that training took, those before a resume included. Both models end in eval mode.
    TrainingDiverged: a NaN or infinite loss, before it can reach the weights. TrainingStopped: on_step asked.
    CheckpointError: the checkpoint is damaged or of another run. ValueError: the batch cannot be shared out.
    """
    device, block_size = next(model.parameters()).device, config.block_size or model.config.block_size
    rank, world = processes()
    if config.batch_size % (world * config.accumulate):
        shares = f"{world} processes times {config.accumulate} parts"
        raise ValueError(f"a batch of {config.batch_size} sequences cannot be shared out to {shares}")
    optimizer = make_optimizer(model, config)
    identity = _identity(model, tokens, config, teacher)
    start, seconds = 0, 0.0
    if resume and checkpoint is not None:
        start, seconds = _load_state(checkpoint, identity, model, optimizer)
    if teacher is not None:
        teacher.eval()
    model.train()
    objective = TrainingLoss(model, teacher, config)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    began = saved_at = time.monotonic()
    for step in range(start, config.steps):
        rng = np.random.default_rng((config.seed, step))  # a resumed run draws what it would have drawn
        ids, targets = get_batch(tokens, config.batch_size, block_size, rng)
        torch.manual_seed(rng.integers(2**62) + rank)  # dropout
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = (t[rank::world].to(device).chunk(config.accumulate) for t in (ids, targets))
        (value,) = sum_over_processes(add_gradients(objective, list(zip(*parts))) / world)
        if not math.isfinite(value):
            where = f"; the last checkpoint is {checkpoint}" if Path(checkpoint or "").is_file() else ""
            when = f"at step {step + 1}, learning rate {lr:.2e}"
            raise TrainingDiverged(f"the loss became {value} {when}{where}")
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        stop = on_step is not None and on_step(step + 1, value)
        due = time.monotonic() - saved_at >= CHECKPOINT_SECONDS
        stop, due = sum_over_processes(bool(stop), due)  # all processes stop at the same step
        if checkpoint is not None and (stop or due or step + 1 == config.steps):
            saved_at = time.monotonic()
            if rank == 0:
                _save_state(checkpoint, identity, model, optimizer, step + 1, seconds + saved_at - began)
        if stop and step + 1 < config.steps:
            raise TrainingStopped(f"stopped after step {step + 1} of {config.steps}")
    model.eval()
    return seconds + time.monotonic() - began


@torch.no_grad()
def evaluate(model, tokens, block_size):
    """Mean cross-entropy in nats per predicted token; its exponential is the perplexity.

    The text is cut into blocks that do not overlap, the last one shorter, so each token but the first is
    predicted exactly once. tokens: int64 (n,), n ≥ 2, else ValueError.
    Where torch.distributed is initialized, all processes must call this, and each takes its share.
    model: anything that gives logits (B, T, V) for ids (B, T), or an object with .logits.
    """
    if len(tokens) < 2:
        raise ValueError(f"evaluation needs at least 2 tokens, not {len(tokens)}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    inputs, targets = tokens[:-1], tokens[1:]
    whole = len(inputs) // block_size * block_size  # tokens in whole blocks
    rows = max(1, 2048 // block_size)  # sequences at a time: bounds the logits' memory
    blocks = [part[:whole].view(-1, block_size).split(rows) for part in (inputs, targets)]
    batches = list(zip(*blocks)) if whole else []
    if whole < len(inputs):
        batches.append((inputs[None, whole:], targets[None, whole:]))
    total, (rank, world) = 0.0, processes()
    with quantized_once(model):
        for ids, true in batches[rank::world]:
            logits = _logits(model(ids.to(device))).float()  # (B, T, V)
            total += F.cross_entropy(logits.flatten(0, 1), true.flatten().to(device), reduction="sum").item()
    model.train(was_training)
    (total,) = sum_over_processes(total)
    return total / len(inputs)


def download(urls, path, sha256=None, progress=None):
    """The first of `urls` that answers, and matches the SHA-256 where one is given, into `path`: under a
    temporary name, then renamed.

    progress(done, total): called as the bytes come; total is 0 where it is not known.
    ConnectionError: none of them does.
    """
    path, problems = Path(path), []
    temporary = path.with_name(path.name + ".tmp")
    for url in urls:
        try:
            done, digest = 0, hashlib.sha256()
            with urllib.request.urlopen(url, timeout=10) as response:
                total = int(response.headers.get("Content-Length") or 0)
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as file:
                    while chunk := response.read(1 << 18):
                        file.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress(done, total)
            if done < total:
                raise OSError(f"the connection broke off after {done:,} of {total:,} bytes")
            if sha256 not in (None, digest.hexdigest()):
                raise OSError("the content does not match its SHA-256")
            os.replace(temporary, path)
            return
        except (OSError, http.client.HTTPException) as error:  # urllib's errors and time-outs are OSErrors
            temporary.unlink(missing_ok=True)
            problems.append(f"{url.split('/')[2]}: {getattr(error, 'reason', error)}")
    raise ConnectionError(f"{path.name} cannot be downloaded ({'; '.join(dict.fromkeys(problems))})")


CHECKPOINT_SECONDS = 120  # between two checkpoints: what a power cut may cost


def write_file(path, content):
    """torch.save, then the SHA-256 of all of it; under a temporary name, then renamed."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w+b") as file:
        torch.save(content, file)
        file.write(_digest(file, file.tell()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_file(path):
    """What write_file wrote. CheckpointError: truncated, altered or foreign. Runs no code from the file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - 32
        if size < 0 or _digest(file, size) != file.read():
            raise CheckpointError(f"{path} is truncated, altered, or not a file of this program")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(f"{path} holds more than plain values, and is not loaded") from None


def _digest(file, size):
    """SHA-256 of the first `size` bytes; leaves the file's position behind them."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def architecture(model):
    """All that says which model this is but for its weights: a GPT's config, or what torch prints of it."""
    return asdict(model.config) if isinstance(model, GPT) else repr(model)


def fingerprint(tensors):
    """16 hexadecimal digits of the SHA-256 of the tensors' bytes, in turn."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _identity(model, tokens, config, teacher):
    """What a checkpoint must agree on with the run that resumes it: all that its weights depend on."""
    quantizers = {(m.bits, m.granularity) for m in model.modules() if isinstance(m, QuantLinear)}
    return {
        **asdict(config),
        "model": architecture(model),
        "quantizers": sorted(quantizers),
        "text": fingerprint([tokens]),
        "teacher": None if teacher is None else fingerprint(teacher.parameters()),
    }


def _previous(path):
    return Path(path).with_suffix(".previous.pt")


def _save_state(path, identity, model, optimizer, step, seconds):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    new = Path(path).with_suffix(".new.pt")
    write_file(new, {"identity": identity, "step": step, "seconds": seconds, **state})
    if Path(path).exists():
        os.replace(path, _previous(path))
    os.replace(new, path)


def _load_state(path, identity, model, optimizer):
    """Step and seconds of the checkpoint; 0 and 0 where there is none."""
    if not Path(path).exists():
        path = _previous(path)  # a kill between the two renames of _save_state
    if not Path(path).exists():
        return 0, 0.0
    state = read_file(path)
    there = state.get("identity", {})
    for key, here in identity.items():
        if there.get(key) != here:
            raise CheckpointError(f"{path} is of another run: {key} is {there.get(key)} there, {here} here")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


# ------------------------------------------------------------------------------------------------------------
# 6. Looking inside
#
# What the paper's argument rests on, measured: errors add up along the sequence, layer-to-layer distillation
# leaves the final distribution wrong, and where the teacher is sure, distillation says what the ground truth
# says. All of it on our GPT.


@torch.no_grad()
def error_by_position(student, teacher, ids):
    """How far the student is from the teacher at each position of the sequence: Σ (student - teacher)² /
    Σ teacher², summed over the sequences and the channels.

    ids: int64 (B, T). Returns {"attention output": (T,), "logits": (T,)}, the former a mean over layers.
    Slide "Approach: Logit KD for Cumulative Quantization Error".
    """
    outputs = []
    for model in (student, teacher):
        caught = []
        hooks = [b.attn.register_forward_hook(lambda module, inputs, y: caught.append(y)) for b in model.h]
        logits = model(ids)
        for hook in hooks:
            hook.remove()
        outputs.append((torch.stack(caught), logits[None]))  # (n_layer, B, T, C) and (1, B, T, V)
    error = {}
    for name, ours, theirs in zip(("attention output", "logits"), *outputs):
        wrong, size = ((x.float() ** 2).sum((1, 3)) for x in (ours - theirs, theirs))  # (layers, T)
        error[name] = (wrong / size).mean(0)
    return error


@torch.no_grad()
def distance_by_token(student, teacher, ids):
    """KL(P^T ‖ P^S) = Σ_i P^T_i (log P^T_i - log P^S_i) of each token, in nats. ids: (B, T) -> (B, T)."""
    theirs = teacher(ids)  # kd does not depend on the targets: ids stand in for them
    return per_token_terms(student(ids), theirs, ids).kd - per_token_terms(theirs, theirs, ids).kd


@torch.no_grad()
def confidence(model, ids, targets):
    """The probability of the likeliest token, and the cross-entropy of the true one in nats, each (B, T)."""
    log_p = F.log_softmax(model(ids).float(), dim=-1)  # (B, T, V)
    return log_p.amax(-1).exp(), -log_p.gather(-1, targets[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------------
# 7. Post-training baselines
#
# What the trained students are compared with in table 1: 4 bits, a scale per output channel, no training,
# only a look at the inputs that a calibration text brings to each layer. Both take our GPT's layers in the
# order in which they compute, so that each sees the inputs that the ones before it, already quantized, give.


@torch.no_grad()
def _inputs(model, layer, ids):
    """What reaches `layer` when the model reads ids (B, T), (B · T, in)."""
    caught = []
    hook = layer.register_forward_pre_hook(lambda module, x: caught.append(x[0].flatten(0, -2).float()))
    for rows in ids.split(8):
        model.hidden(rows)
    hook.remove()
    return torch.cat(caught)


def _calibrated_copy(model, calibration_ids, bits):
    if bits != 4:
        raise ValueError(f"the post-training baselines are for 4 bits, not {bits!r}")
    if not isinstance(model, GPT):
        raise ValueError(f"the post-training baselines are for our GPT, not {type(model).__name__}")
    return copy.deepcopy(model).eval().requires_grad_(False), calibration_ids.to(model.wte.weight.device)


def optq_weight(weight, x):
    """The 4-bit weight ŵ, (out, in), that makes ‖x ŵ^T - x w^T‖² small, a column at a time: each column is
    rounded, and those still to come are changed so as to make up for its error as well as they can.

    With H = x^T x and U the upper Cholesky factor of its inverse, H⁻¹ = U^T U, for column i

        ŵ_i = round(w_i)    e = (w_i - ŵ_i) / U_ii    w_j ← w_j - e U_ij for all j > i

    weight: (out, in); x: (N, in), the inputs. Each row's scale and zero point are quantize_int4's for w.
    Source: Frantar et al., "OPTQ: Accurate Quantization for Generative Pre-trained Transformers", 2023.
    """
    w = weight.detach().double()
    _, scale, zero_point = quantize_int4(weight, "channel")
    H = x.double().t() @ x.double()  # (in, in)
    H.diagonal().add_(max(0.01 * H.diagonal().mean().item(), 1e-12))  # damped: few inputs leave H singular
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for i in range(w.shape[1]):
        rounded = _dequantize(_int4_codes(w[:, i : i + 1], scale, zero_point), scale, zero_point)  # (out, 1)
        error = (w[:, i : i + 1] - rounded) / U[i, i]
        w[:, i + 1 :] -= error * U[i, i + 1 :]
        w[:, i : i + 1] = rounded
    return w.to(weight.dtype)


def optq(model, calibration_ids, bits=4):
    """A copy of our GPT with every linear layer but the head quantized by OPTQ, channel-wise.

    calibration_ids: int64 (B, T). The weights are stored dequantized. ValueError: bits other than 4, or
    another kind of model.
    """
    model, ids = _calibrated_copy(model, calibration_ids, bits)
    for block in model.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.weight.copy_(optq_weight(layer.weight, _inputs(model, layer, ids)))
    return model


class ScaledLinear(nn.Module):
    """A linear layer of x / input_scale."""

    def __init__(self, layer, input_scale):
        super().__init__()
        self.layer = layer
        self.register_buffer("input_scale", input_scale)  # (in,)

    def forward(self, x):  # (..., in) -> (..., out)
        return self.layer(x / self.input_scale)


def awq_scale(weight, x):
    """The scales s, (in,), of the input channels: the rounding error of a weight is about the same whatever
    the weight's size, so multiplying the columns that meet large inputs by s > 1, and those inputs by 1 / s,
    makes their error count less.

        s = mean|x|^a,  of a = 0, 0.05, ... 0.95 the one with the least ‖(x / s) round(w s)^T - x w^T‖²

    weight: (out, in); x: (N, in), the inputs. With a = 0 it is plain rounding.
    Source: Lin et al., "AWQ: Activation-aware Weight Quantization", 2024.
    """
    size, exact = x.abs().mean(0).clamp(min=1e-4), x @ weight.t()
    best = None
    for step in range(20):
        s = size ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        error = ((x / s) @ fake_quantize(weight * s, 4, "channel").t() - exact).square().mean()
        if best is None or error < best[0]:
            best = error, s
    return best[1]


def awq(model, calibration_ids, bits=4):
    """A copy of our GPT with every linear layer but the head quantized by AWQ, channel-wise.

    The factor 1 / s goes into whatever makes the layer's input, where that is linear: the norm before c_attn
    and c_fc; before the attention's c_proj the values, which are rows of the quantized c_attn and only get
    other scales by it. After the GELU it stays with the layer, which becomes a ScaledLinear.

    calibration_ids: int64 (B, T). The weights are stored dequantized. ValueError: bits other than 4, or
    another kind of model.
    """
    model, ids = _calibrated_copy(model, calibration_ids, bits)

    def quantized(layer):
        s = awq_scale(layer.weight, _inputs(model, layer, ids))
        layer.weight.copy_(fake_quantize(layer.weight * s, 4, "channel"))
        return s

    def divide(s, *tensors):  # in place, each (..., len(s))
        for tensor in tensors:
            tensor.div_(s)

    for block in model.h:
        attn, mlp = block.attn, block.mlp
        divide(quantized(attn.c_attn), block.ln_1.weight, block.ln_1.bias)
        s = quantized(attn.c_proj)
        C = len(s)  # the values are the last C of c_attn's 3C rows
        divide(s, attn.c_attn.weight[-C:].t(), attn.c_attn.bias[-C:])
        divide(quantized(mlp.c_fc), block.ln_2.weight, block.ln_2.bias)
        mlp.c_proj = ScaledLinear(mlp.c_proj, quantized(mlp.c_proj))
    return model
