"""The post-training baselines of the paper's table 1: OPTQ and AWQ, 4 bits with a scale per output
channel, no training, only a look at the inputs that a calibration text brings to each layer.

Both take our GPT's layers in the order in which they compute, so that each sees the inputs that the
layers before it, already quantized, give. Used by `python -m data.evidence.table`."""

import copy

import torch
from torch import nn

from tsld import GPT, fake_quantize, quantize_int4


@torch.no_grad()
def _inputs(model, layer, ids):
    """What reaches `layer` when the model reads ids (B, T): (B · T, in)."""
    caught = []
    hook = layer.register_forward_pre_hook(
        lambda module, x: caught.append(x[0].flatten(0, -2).float())
    )
    for rows in ids.split(8):
        model.hidden(rows)
    hook.remove()
    return torch.cat(caught)


def _calibrated_copy(model, calibration_ids, bits):
    if bits != 4:
        raise ValueError(f"the post-training baselines are for 4 bits, not {bits!r}")
    if not isinstance(model, GPT):
        raise ValueError(f"the post-training baselines are for our GPT, not {type(model).__name__}")
    return copy.deepcopy(model).eval().requires_grad_(False), calibration_ids.to(
        model.wte.weight.device
    )


def optq_weight(weight, x):
    """The 4-bit weight ŵ, (out, in), that makes ‖x ŵ^T - x w^T‖² small, a column at a time: each
    column is rounded, and those still to come are changed to make up for its error as well as they
    can.

    With H = x^T x and U the upper Cholesky factor of its inverse, H⁻¹ = U^T U, for column i

        ŵ_i = round(w_i)    e = (w_i - ŵ_i) / U_ii    w_j ← w_j - e U_ij for all j > i

    weight: (out, in); x: (N, in), the inputs. Each row's scale and zero point are quantize_int4's
    for w. Source: Frantar et al., "OPTQ: Accurate Quantization for Generative Pre-trained
    Transformers", 2023.
    """
    w, x = weight.detach().cpu().double(), x.cpu().double()  # on CPUs: Apple's GPU has no float64
    _, scale, zero_point = quantize_int4(weight.cpu(), "channel")  # each (out, 1)
    step = torch.where(scale > 0, scale, 1.0)  # of a row of zeros: 0 / 1 instead of 0 / 0
    H = x.t() @ x  # (in, in)
    H.diagonal().add_(max(0.01 * H.diagonal().mean().item(), 1e-12))  # few inputs leave H singular
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for i in range(w.shape[1]):
        codes = ((w[:, i : i + 1] / step).round() + zero_point).clamp(0, 15)
        rounded = scale * (codes - zero_point)  # (out, 1)
        error = (w[:, i : i + 1] - rounded) / U[i, i]
        w[:, i + 1 :] -= error * U[i, i + 1 :]
        w[:, i : i + 1] = rounded
    return w.to(weight.device, weight.dtype)


def optq(model, calibration_ids, bits=4):
    """A copy of our GPT with every linear layer but the head quantized by OPTQ, channel-wise.

    calibration_ids: int64 (B, T). The weights are stored dequantized. ValueError: bits other than
    4, or another kind of model.
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
    """The scales s, (in,), of the input channels. The rounding error of a weight is about the same
    whatever the weight's size. So multiplying the columns that meet large inputs by s > 1, and
    those inputs by 1 / s, makes their error count less.

        s = mean|x|^a,  of a = 0, 0.05, ... 0.95 the one with the least ‖(x / s) round(w s)^T - x
        w^T‖²

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

    The factor 1 / s goes into whatever makes the layer's input, where that is linear: the norm
    before c_attn and c_fc; before the attention's c_proj the values, which are rows of the
    quantized c_attn and only get other scales by it. After the GELU it stays with the layer, a
    ScaledLinear then.

    calibration_ids: int64 (B, T). The weights are stored dequantized. ValueError: bits other than
    4, or another kind of model.
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
