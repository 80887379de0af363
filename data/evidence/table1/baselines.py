"""The post-training baselines of the paper's table 1: OPTQ and AWQ, 4 bits with a scale
per output channel. They train nothing, and only look at the inputs that a calibration
text brings to each layer.

Both take the layers in the order in which they compute. So each layer sees the inputs
that the layers before it, already quantized, give."""

import copy

import torch
from torch import nn

from data.lib.processes import blocks_of
from tsld import GPT, fake_quantize, quantize_int4

# --------------------------------------------------------------------------------------
# OPTQ


def optq(model, calibration_ids, bits=4):
    """A copy of a language model with every linear layer of its blocks quantized by
    OPTQ, channel-wise; the weights are stored dequantized. A block's layers have to
    stand in the order in which they compute.

    calibration_ids: int64 (B, T). Raises ValueError if bits is not 4."""
    check_bits(bits)
    model = frozen_copy(model)

    for block in blocks_of(model):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                x = inputs_of(model, layer, calibration_ids)
                layer.weight.copy_(optq_weight(layer.weight, x))

    return model


def optq_weight(weight, x):
    """The 4-bit weight ŵ, (out, in), that makes ‖x ŵ^T - x w^T‖² small, a column at a
    time: each column is rounded, and those still to come are changed to make up for its
    error as well as they can.

    With H = x^T x and U the upper Cholesky factor of its inverse, H⁻¹ = U^T U, column i

        ŵ_i = round(w_i)    e = (w_i - ŵ_i) / U_ii    w_j ← w_j - e U_ij for all j > i

    weight: (out, in); x: (N, in), the inputs. Each row's scale and zero point are those
    of quantize_int4 for w. Source: Frantar et al., "OPTQ: Accurate Quantization for
    Generative Pre-trained Transformers", 2023."""
    # On the CPU, since Apple's GPU has no float64.
    w = weight.detach().cpu().double()
    x = x.cpu().double()
    _, scale, zero_point = quantize_int4(weight.cpu(), "channel")  # each (out, 1)
    step = torch.where(scale > 0, scale, 1.0)  # a row of zeros: 0 / 1 instead of 0 / 0

    # Few inputs leave H singular, and a small diagonal mends that.
    H = x.t() @ x  # (in, in)
    H.diagonal().add_(max(0.01 * H.diagonal().mean().item(), 1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)

    for i in range(w.shape[1]):
        column = w[:, i : i + 1]  # (out, 1)
        codes = ((column / step).round() + zero_point).clamp(0, 15)
        rounded = scale * (codes - zero_point)
        error = (column - rounded) / U[i, i]
        w[:, i + 1 :] -= error * U[i, i + 1 :]
        w[:, i : i + 1] = rounded

    return w.to(weight.device, weight.dtype)


# --------------------------------------------------------------------------------------
# AWQ


def awq(model, calibration_ids, bits=4):
    """A copy of our GPT with every linear layer but the head quantized by AWQ,
    channel-wise; the weights are stored dequantized.

    The factor 1 / s goes into whatever makes the layer's input, where that is linear:
    the norm before c_attn and c_fc; before the attention's c_proj the values, which are
    rows of the quantized c_attn and only get other scales by it. After the GELU it
    stays with the layer, which is a ScaledLinear then.

    calibration_ids: int64 (B, T). Raises ValueError if bits is not 4, or if the model
    is no GPT of this program."""
    check_bits(bits)
    if not isinstance(model, GPT):
        raise ValueError(f"AWQ is for our GPT, not {type(model).__name__}")
    model = frozen_copy(model)

    def quantize(layer):
        """Quantizes weight · s in place, and returns s."""
        s = awq_scale(layer.weight, inputs_of(model, layer, calibration_ids))
        layer.weight.copy_(fake_quantize(layer.weight * s, 4, "channel"))
        return s

    for block in model.h:
        attn = block.attn
        mlp = block.mlp

        s = quantize(attn.c_attn)
        block.ln_1.weight.div_(s)
        block.ln_1.bias.div_(s)

        s = quantize(attn.c_proj)
        C = len(s)  # the values are the last C of c_attn's 3 C rows
        attn.c_attn.weight[-C:].div_(s[:, None])
        attn.c_attn.bias[-C:].div_(s)

        s = quantize(mlp.c_fc)
        block.ln_2.weight.div_(s)
        block.ln_2.bias.div_(s)

        s = quantize(mlp.c_proj)
        mlp.c_proj = ScaledLinear(mlp.c_proj, s)

    return model


def awq_scale(weight, x):
    """The scales s, (in,), of the input channels. The rounding error of a weight is
    about the same whatever the weight's size. So multiplying the columns that meet
    large inputs by s > 1, and those inputs by 1 / s, makes their error count less.

        s = mean|x|^a,  of a = 0, 0.05, ... 0.95 the one with the least error
        ‖(x / s) round(w s)^T - x w^T‖²

    weight: (out, in); x: (N, in), the inputs. With a = 0 it is plain rounding.
    Source: Lin et al., "AWQ: Activation-aware Weight Quantization", 2024."""
    size = x.abs().mean(0).clamp(min=1e-4)  # (in,)
    exact = x @ weight.t()  # (N, out)

    errors = []
    scales = []
    for step in range(20):
        s = size ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        quantized = fake_quantize(weight * s, 4, "channel")
        output = (x / s) @ quantized.t()
        errors.append((output - exact).square().mean().item())
        scales.append(s)

    return scales[errors.index(min(errors))]


class ScaledLinear(nn.Module):
    """A linear layer of x / input_scale."""

    def __init__(self, layer, input_scale):
        super().__init__()
        self.layer = layer
        self.register_buffer("input_scale", input_scale)  # (in,)

    def forward(self, x):  # (..., in) -> (..., out)
        return self.layer(x / self.input_scale)


# --------------------------------------------------------------------------------------
# What both need


def check_bits(bits):
    if bits != 4:
        raise ValueError(f"the post-training baselines are for 4 bits, not {bits!r}")


def frozen_copy(model):
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def inputs_of(model, layer, ids):
    """What reaches `layer` when the model reads ids (B, T): float32 (B · T, in)."""
    caught = []

    def catch(module, inputs):
        caught.append(inputs[0].flatten(0, -2).float())

    hook = layer.register_forward_pre_hook(catch)
    for some_ids in ids.to(layer.weight.device).split(8):
        model(some_ids)
    hook.remove()

    return torch.cat(caught)
