"""TSLD: token-scaled logit distillation for ternary-weight language models.

After Kim et al., "Token-Scaled Logit Distillation for Ternary Weight Generative
Language Models", NeurIPS 2023 (arXiv:2308.06744; their code: github.com/aiha-lab/TSLD).

A language model spends its time reading weights from memory. A weight that is -α, 0 or
+α takes 2 bits instead of 32, and a product with it is an addition. But rounding a
trained model that coarsely destroys it. So a ternary *student* is trained with rounding
in the loop (quantization-aware training, QAT), to give the next-token distributions of
its full-precision *teacher* (distillation). TSLD says how much each token counts:

    L = Σ_n  softmax_n( -Σ_i y_ni log P^T_ni / τ )  ·  Σ_i -P^T_ni log P^S_ni
             └─ token_scale: w_n, larger where  ┘      └─ kd: cross-entropy of ┘
                the true token was unlikely            student and teacher

    mathematics                             code             shape
    n, i       a token, a vocabulary entry                   T and V of them
    y_ni       1 if i is the true token     targets          (B, T), the true tokens
    P^T        the teacher's distribution   teacher_logits   (B, T, V), before softmax
    P^S        the student's distribution   student_logits   (B, T, V), before softmax
    τ          temperature                  temperature      a number
    Δ          weights up to Δ become 0     threshold        (1, 1) or (out, 1)
    α          size of the other weights    scale            (1, 1) or (out, 1)

This L is one sequence's; a batch's is the mean over its sequences. τ divides the
teacher's cross-entropies, not logits as Hinton's temperature does. The paper prints
τ = 1. Its experiments, and the defaults here, have 10.

The whole method, from a text to a packed student, in half a minute:

    import argparse, copy, torch, tsld
    tokens = torch.tensor(list(open(argparse.__file__, "rb").read()))  # a byte each
    text, new_text = tokens[:-10_000], tokens[-10_000:]
    torch.manual_seed(0)
    teacher = tsld.GPT(tsld.GPTConfig(64, 256, n_layer=2, n_head=4, n_embd=64))
    config = tsld.TrainConfig(loss="gt", steps=800, batch_size=8, lr=4e-3)
    list(tsld.train(teacher, text, config))
    rounded = tsld.quantize_model(copy.deepcopy(teacher))
    student = copy.deepcopy(rounded)
    config = tsld.TrainConfig(loss="tsld", steps=200, batch_size=8, lr=2e-3)
    for step, loss in tsld.train(student, text, config, teacher):
        print(step, loss)
    for model in (teacher, rounded, student):
        print(tsld.evaluate(model, new_text, block_size=64))  # 1.32, 1.80, 1.36 nats
    tsld.save_model("student.packed", tsld.pack_model(student))
    ids = tsld.load_model("student.packed").generate(tokens[None, :9], 50)
    print(bytes(ids[0].tolist()).decode(errors="replace"))

Rounding costs half a nat a byte on new text. The student starts as the rounded teacher
and wins nine tenths of it back. (So do other losses: a toy cannot tell which is best.)

Shapes have B sequences, T tokens, V vocabulary entries, width C and H heads. Tensors
keep device and dtype unless a docstring says otherwise. Bad arguments raise ValueError.
"""

import math
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, is_dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class CheckpointError(ValueError):
    """A file is truncated, foreign, or of another model."""


class TrainingDiverged(ArithmeticError):
    """The loss or its gradient became NaN or infinite."""


# ---- 1. Losses -----------------------------------------------------------------------
# Rounding errors add up. Attention at position n mixes the errors of all positions up
# to n, and each block hands its errors to the next. The logits stand at the end of that
# chain: a loss on them sees the whole accumulated error.
#
# A distillation loss never falls to 0. Its floor is the mean, weighted by w_n in TSLD,
# of the teacher's entropies, which no student changes:
#     -Σ_i P^T_i log P^S_i  =  KL(P^T ‖ P^S)  +  entropy of P^T

# Labels; teacher; teacher and layers; teacher and labels; token-scaled teacher (TSLD).
LOSSES = ("gt", "logit", "l2l", "logit_gt", "tsld")


class Terms(NamedTuple):
    """Three numbers for each token, in nats, float32 whatever the logits were."""

    ce_student: torch.Tensor  # (B, T)  -log P^S[y_n], the ground-truth loss
    ce_teacher: torch.Tensor  # (B, T)  -log P^T[y_n], its doubt; -∞ marks padding
    kd: torch.Tensor  # (B, T)  -Σ_i P^T_ni log P^S_ni, the distillation loss


def per_token_terms(student_logits, teacher_logits, targets):
    """Terms from logits (B, T, V) of any float dtype, and targets, int64 (B, T), -100
    for padding, which counts in no loss. No gradient flows into the teacher."""
    shapes = [tuple(t.shape) for t in (student_logits, teacher_logits, targets)]
    if shapes[0] != shapes[1] or shapes[0][:-1] != shapes[2]:
        raise ValueError(f"student, teacher and targets do not fit: {shapes}")

    ignored = targets == -100
    y = targets.masked_fill(ignored, 0)[..., None]  # (B, T, 1)
    check_ids(y, student_logits.shape[-1])

    log_p_student = student_logits.float().log_softmax(dim=-1)  # (B, T, V)
    log_p_teacher = teacher_logits.detach().float().log_softmax(dim=-1)  # (B, T, V)
    p_teacher = log_p_teacher.exp()

    ce_student = -log_p_student.gather(-1, y).squeeze(-1)
    ce_teacher = -log_p_teacher.gather(-1, y).squeeze(-1)

    # Where the teacher has 0, so has the sum, even if the student's log is -∞.
    kd = -(p_teacher * log_p_student.masked_fill(p_teacher == 0, 0)).sum(dim=-1)

    ce_student = ce_student.masked_fill(ignored, 0)
    ce_teacher = ce_teacher.masked_fill(ignored, -math.inf)
    return Terms(ce_student, ce_teacher, kd.masked_fill(ignored, 0))


def mean_over_tokens(values, terms):
    """The mean of values, (B, T), over the tokens that count."""
    is_real = terms.ce_teacher != -math.inf
    return values.sum() / is_real.sum().clamp(min=1)


def token_scale(ce_teacher, temperature=10.0):
    """w_n = softmax_n(ce_teacher_n / τ): how much each token of a sequence counts.

    The softmax runs over the T tokens of one sequence, not over vocabulary or batch:
    (B, T), in nats -> (B, T), each row sums to 1. At τ = 1 the weights are proportional
    to 1 / P^T[y_n]. At τ = ∞ (math.inf) they are equal: without padding, that is logit
    distillation. No gradient flows through them. Padding weighs 0."""
    if not temperature > 1e-30:  # below it, float32 would overflow
        raise ValueError(f"the temperature must be above 1e-30, not {temperature}")

    ignored = ce_teacher == -math.inf
    ce = ce_teacher.detach().clamp(max=1e8)  # infinite where the vocabulary is masked
    scores = (ce / temperature).masked_fill(ignored, -math.inf)
    return scores.softmax(dim=1).masked_fill(ignored, 0)


def tsld_loss(terms, temperature=10.0, gt_weight=0.0):
    """TSLD, a scalar: the mean over sequences of Σ_n w_n · kd_n, w = token_scale.

    Its gradient for the student's logits at token n is w_n (P^S_n - P^T_n) / B. The
    scale says how hard a token pulls, not where to.

    Where the teacher is sure of the true token, P^T_n is nearly the label: imitating it
    is learning by heart. Where the true token surprises it, P^T_n spreads over what
    else could follow, which no label tells. TSLD gives this more weight.

    gt_weight adds gt_weight · mean(ce_student). The authors' program sums over its
    batch of 4 and adds mean(ce_student): 4 times this loss at a gt_weight of 0.25."""
    w = token_scale(terms.ce_teacher, temperature)  # (B, T), each row sums to 1
    loss = (w * terms.kd).sum() / w.sum().clamp(min=1)  # w.sum(): B, but for padding
    return loss + gt_weight * mean_over_tokens(terms.ce_student, terms)


class Trace(NamedTuple):
    """One forward pass as layer-to-layer distillation (L2L) sees it."""

    logits: torch.Tensor  # (B, T, V)
    hidden_states: list  # n_layer + 1 of (B, T, C): the embedding, then each block's
    attention_scores: list  # n_layer of (B, H, T, T): q·k/√d, before mask and softmax


def layer_to_layer_loss(student_trace, teacher_trace, targets=None):
    """What L2L adds to the logits' loss, a float32 scalar without a unit (not nats):

        Σ MSE(hidden states)  +  Σ MSE(attention scores)

    Scores count where the causal mask lets them through, and nothing where targets,
    (B, T), are -100. No gradient flows into the teacher. In a decoder L2L is a poor
    guide: nothing says which errors of its layers reach the logits and add up there."""
    student_tensors = [*student_trace.hidden_states, *student_trace.attention_scores]
    teacher_tensors = [*teacher_trace.hidden_states, *teacher_trace.attention_scores]
    if len(student_tensors) != len(teacher_tensors):
        depths = f"{len(student_tensors)} and {len(teacher_tensors)} tensors"
        raise ValueError(f"L2L compares models of one depth, not {depths}")

    if targets is None:
        targets = torch.zeros_like(student_tensors[0][..., 0])
    counts = targets != -100  # (B, T)

    loss = 0.0
    for student, teacher in zip(student_tensors, teacher_tensors):
        shapes = [tuple(t.shape) for t in (student, teacher, targets)]
        B, *_, T, _ = student.shape
        if shapes[0] != shapes[1] or shapes[2] != (B, T):
            raise ValueError(f"student, teacher and targets do not fit: {shapes}")

        if student.dim() == 3:  # states (B, T, C)
            seen = counts[:, :, None].expand_as(student)
        else:  # scores (B, H, T, T), of which the causal mask hides half
            seen = counts[:, None, :, None].expand_as(student).tril()

        error = torch.where(seen, student.float() - teacher.detach().float(), 0)
        loss += error.square().sum() / seen.sum().clamp(min=1)
    return loss


def distillation_loss(name, terms, temperature=10.0, gt_weight=0.0, layers=None):
    """The loss of a name in LOSSES (the paper's table 1), a float32 scalar. gt_weight
    acts on "logit" and "tsld". layers: layer_to_layer_loss, for "l2l"."""
    gt = mean_over_tokens(terms.ce_student, terms)
    logit = mean_over_tokens(terms.kd, terms)

    if name == "gt":
        return gt
    if name == "logit":
        return logit + gt_weight * gt
    if name == "logit_gt":
        return logit + gt
    if name == "tsld":
        return tsld_loss(terms, temperature, gt_weight)
    if name != "l2l":
        raise ValueError(f"the loss must be one of {', '.join(LOSSES)}, not {name!r}")
    if layers is None:
        raise ValueError("the loss 'l2l' needs layers, from layer_to_layer_loss")
    return logit + layers


# ---- 2. Quantizers -------------------------------------------------------------------
# A weight matrix (out, in) becomes small integers, the codes, and a float32 scale: one
# for the whole matrix ("tensor") or one for each row, an output channel ("channel").


def _shared_dimensions(granularity):
    """The dimensions that share a scale. Reduced, they leave (1, 1) or (out, 1)."""
    if granularity not in ("tensor", "channel"):
        raise ValueError(f"granularity is 'tensor' or 'channel', not {granularity!r}")
    return (0, 1) if granularity == "tensor" else (1,)


def ternarize(weight, granularity="tensor"):
    """The ternary quantizer, ŵ = α · codes (Li et al., Ternary Weight Networks, 2016).

        Δ = 0.7 · mean |w|
        codes = +1 where w > Δ, -1 where w < -Δ, else 0
        α = mean of |w| where |w| > Δ

    weight: (out, in), any float dtype. Returns codes, int8 (out, in), and the scale,
    float32 (1, 1) or (out, 1). With "channel", a row of zeros has the scale 0."""
    dims = _shared_dimensions(granularity)
    w = weight.detach().float()

    threshold = 0.7 * w.abs().mean(dims, keepdim=True)
    codes = (w > threshold).to(torch.int8) - (w < -threshold).to(torch.int8)

    count = codes.abs().sum(dims, keepdim=True, dtype=torch.float32)
    total = (codes * w).sum(dims, keepdim=True)  # codes · w is |w|, or 0
    return codes, total / count.clamp(min=1)


def quantize_int4(weight, granularity="tensor"):
    """Round-to-nearest in 4 bits, ŵ = scale · (codes - zero_point), the paper's W4.

        low = min(w, 0)    high = max(w, 0)    scale = (high - low) / 15
        zero_point = round(-low / scale)
        codes = round(w / scale) + zero_point, both clamped to 0 ... 15

    The range includes 0, so a weight of 0 stays exactly 0. Returns codes, uint8, the
    scale, float32, and zero_point, int32, with the shapes that ternarize has."""
    dims = _shared_dimensions(granularity)
    w = weight.detach().float()

    low = w.amin(dims, keepdim=True).clamp(max=0)
    high = w.amax(dims, keepdim=True).clamp(min=0)
    scale = (high - low) / 15

    divisor = torch.where(scale > 0, scale, 1.0)  # zeros alone: 0 / 1, not 0 / 0
    zero_point = (-low / divisor).round().clamp(0, 15).to(torch.int32)
    codes = (w / divisor).round() + zero_point
    return codes.clamp(0, 15).to(torch.uint8), scale, zero_point


def fake_quantize(weight, bits=2, granularity="tensor"):
    """ŵ, the weight as the quantized model sees it, (out, in) in the weight's dtype.

    Rounding is a staircase, whose gradient is 0 almost everywhere. So the backward pass
    leaves it out, ∂L/∂w := ∂L/∂ŵ: the straight-through estimator. bits: 2 or 4."""
    if bits == 2:
        codes, scale = ternarize(weight, granularity)
        quantized = scale * codes
    elif bits == 4:
        codes, scale, zero_point = quantize_int4(weight, granularity)
        quantized = scale * (codes - zero_point)
    else:
        raise ValueError(f"bits must be 2 or 4, not {bits!r}")

    # The last term is 0, and its gradient is 1.
    return quantized.to(weight.dtype) + (weight - weight.detach())


class QuantLinear(nn.Linear):
    """A linear layer under QAT. The optimizer holds its full-precision weight, where
    steps too small to change a code add up; the forward pass sees the quantized one."""

    def __init__(
        self, in_features, out_features, bias=True, bits=2, granularity="tensor"
    ):
        super().__init__(in_features, out_features, bias)
        self.bits = bits
        self.granularity = granularity

    @classmethod
    def of(cls, linear, bits=2, granularity="tensor"):
        """Makes an nn.Linear a QuantLinear, in place: its parameters stay the same."""
        linear.__class__ = cls
        linear.bits = bits
        linear.granularity = granularity

    def dequantized(self):
        """The weight that the layer computes with, (out, in)."""
        return fake_quantize(self.weight, self.bits, self.granularity)

    def forward(self, x):  # (..., in) -> (..., out)
        return F.linear(x, self.dequantized(), self.bias)


def check_plain(name, layer):
    """Raises ValueError if a linear layer does more than its class says."""
    if type(layer) not in (nn.Linear, QuantLinear):
        raise ValueError(f"{name} is a {type(layer).__name__}, not an nn.Linear")
    for key, value in vars(layer).items():
        if key == "forward" or (key.endswith("_hooks") and value):
            raise ValueError(f"{name} has its own {key}, which packing would lose")


def quantize_model(model, bits=2, granularity="tensor", skip=()):
    """Makes each nn.Linear of any torch module a QuantLinear, in place.

    Embeddings, norms, biases and the output head (model.lm_head, model.head, or tied to
    an embedding) keep full precision, as in the paper. So do the modules that `skip`
    names. A warning names all other matrices. Returns the model. Raises ValueError,
    before any change, if no layer is left, or one is of a subclass or has hooks."""
    fake_quantize(torch.zeros(1, 1), bits, granularity)  # refuses bad arguments
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in skip:
        if name not in modules:
            raise ValueError(f"the model has no module {name!r} to skip")

    # What keeps full precision.
    kept = [modules[name] for name in skip]
    kept += [getattr(model, "lm_head", None), getattr(model, "head", None)]
    exact = {m for top in kept if isinstance(top, nn.Module) for m in top.modules()}
    for module in modules.values():
        is_norm = type(module).__name__.endswith("Norm")  # they share no base class
        if is_norm or isinstance(module, nn.Embedding):
            exact.add(module)
    spared = {p for module in exact for p in module.parameters(recurse=False)}

    layers = []
    for name, module in modules.items():
        is_linear = isinstance(module, nn.Linear) and module not in exact
        if not is_linear or module.weight in spared:
            continue

        check_plain(name, module)
        layers.append(module)

    if not layers:
        raise ValueError(f"{type(model).__name__} holds no nn.Linear to quantize")
    for layer in layers:
        QuantLinear.of(layer, bits, granularity)

    # Some modules hold matrices of their own, such as the experts of a mixture.
    quantized = {layer.weight for layer in layers}
    covered = spared | quantized
    named = model.named_parameters()
    others = {n: p.numel() for n, p in named if p.dim() > 1 and p not in covered}

    if others:
        left = sum(others.values())
        share = left / (left + sum(weight.numel() for weight in quantized))
        names = ", ".join(others)
        message = f"{share:.1%} of the matrix weights keep full precision: {names}"
        warnings.warn(message, stacklevel=2)
    return model


# ---- 3. GPT --------------------------------------------------------------------------
# GPT-2 (Radford et al., 2019): learned positions, a norm before each sublayer, biases,
# tanh GELU, and a head tied to the token embedding. Names are the published weights'.


def check_ids(ids, vocab_size):
    """Raises ValueError for bad token ids on a CPU. (To look at them stalls a GPU.)"""
    if not ids.is_cpu or ids.numel() == 0 or torch.compiler.is_compiling():
        return

    try:
        low, high = ids.min().item(), ids.max().item()
    except RuntimeError:  # under vmap, and in fake tensors, there are no values
        return

    if ids.dtype != torch.int64 or low < 0 or high >= vocab_size:
        found = f"{low} to {high} in {ids.dtype}"
        raise ValueError(f"token ids are int64, 0 to {vocab_size - 1}, not {found}")


@contextmanager
def evaluating(model):
    """Eval mode inside; afterwards each module's own mode again."""
    in_training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in in_training:
            module.training = True


@dataclass
class GPTConfig:
    """Shape of a GPT. The defaults are GPT-2 small's, 124 million parameters."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self):
        *sizes, _ = astuple(self)  # all but dropout
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"the sizes must be positive integers, not {sizes}")

        if self.n_embd % self.n_head:
            raise ValueError(f"{self.n_embd} does not divide into {self.n_head} heads")


class Attention(nn.Module):
    """Causal multi-head self-attention: position n sees the positions up to n."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, start=0, trace=False):
        """x: (B, T, C) -> (B, T, C), and the scores (B, H, T, T) if trace, else None.
        cache: (2, B, H, S, C / H), keys and values before `start`, then those of x."""
        T = x.shape[1]
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, C / H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C / H)

        if cache is not None:
            if start + T > cache.shape[3] or (T > 1 and start > 0):
                raise ValueError(f"the cache takes no {T} tokens at position {start}")
            cache[..., start : start + T, :] = torch.stack((k, v))
            k, v = cache[..., : start + T, :]

        scores = None
        if trace:
            scores = q @ k.mT / math.sqrt(q.shape[-1])

        # The fused product, in float32 on CPUs, where bfloat16 is slow. Its mask begins
        # at key 0, so that one token after cached ones has to go without it.
        if x.is_cpu and q.element_size() == 2:
            q, k, v = q.float(), k.float(), v.float()
        dropout = self.dropout if self.training else 0.0
        attend = F.scaled_dot_product_attention
        with torch.autocast("cpu", enabled=False):
            y = attend(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, H, T, C / H)

        y = y.to(x.dtype).transpose(1, 2).flatten(2)  # (B, T, C)
        return F.dropout(self.c_proj(y), dropout), scores


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). Arguments are Attention's."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)

        # Two linear layers with GELU between them, each token by itself.
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.mlp.gelu = nn.GELU("tanh")
        self.mlp.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.mlp.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, start=0, trace=False):
        y, scores = self.attn(self.ln_1(x), cache, start, trace)
        x = x + y
        return x + self.mlp(self.ln_2(x)), scores


class Head(nn.Linear):
    """The output head. In a loaded model its weight is in float16, as in the file."""

    def forward(self, x):  # (..., C) -> (..., V)
        return F.linear(x, self.weight.to(x.dtype))


class GPT(nn.Module):
    """model(ids) is logits (B, T, V), model(ids, trace=True) a Trace. ids: (B, T)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied

        # Initial weights, as GPT-2's.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):  # 2 n_layer of them add up
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif "ln_" not in name:
                nn.init.normal_(parameter, std=0.02)

    def embed(self, ids, start=0):
        """ids (B, T), at positions from `start` on -> (B, T, C)."""
        end = start + ids.shape[1]
        if start < 0 or end > self.config.block_size:
            places = f"places {start} to {end} of {self.config.block_size}"
            raise ValueError(f"the tokens exceed block_size: {places}")
        check_ids(ids, self.config.vocab_size)

        dtype = self.ln_f.weight.dtype  # a loaded model has its embeddings in float16
        x = self.wte(ids).to(dtype) + self.wpe.weight[start:end].to(dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def hidden(self, ids, cache=None, start=0):
        """(B, T) -> (B, T, C), after the last norm. cache: one for each block."""
        x = self.embed(ids, start)
        for i, block in enumerate(self.h):
            x, _ = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x)

    def forward(self, ids, trace=False):
        if not trace:
            return self.lm_head(self.hidden(ids))

        states, scores = [self.embed(ids)], []
        for block in self.h:
            x, of_layer = block(states[-1], trace=True)
            states.append(x)
            scores.append(of_layer)
        return Trace(self.lm_head(self.ln_f(states[-1])), states, scores)

    @torch.inference_mode()
    def stream(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Yields the new columns of generate, int64 (B, 1), one after the other."""
        B, T = ids.shape
        H, C = self.config.n_head, self.config.n_embd
        S = T + max_new_tokens
        if T < 1 or max_new_tokens < 0 or self.config.block_size < S:
            sizes = f"a prompt of {T} tokens and {max_new_tokens} new ones"
            raise ValueError(f"{sizes} do not fit block_size {self.config.block_size}")

        with evaluating(self):
            # Keys and values are kept: each token is computed once.
            cache = self.ln_f.weight.new_zeros(len(self.h), 2, B, H, S, C // H)
            start = 0
            for _ in range(max_new_tokens):
                x = self.hidden(ids, cache, start)
                start += ids.shape[1]

                # The token that follows is the next input, alone.
                logits = self.lm_head(x[:, -1]).float()  # (B, V)
                ids = sample(logits, temperature, top_k)
                yield ids

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Continues each row of ids: int64 (B, T) -> (B, T + max_new_tokens)."""
        new = self.stream(ids, max_new_tokens, temperature, top_k)
        return torch.cat([ids, *new], dim=1)


def sample(logits, temperature=1.0, top_k=None):
    """One token for each row, (B, V) -> int64 (B, 1), by softmax(logits / temperature)
    of the top_k likeliest, or of all. Temperature 0 takes the likeliest."""
    is_cold = temperature != 0 and not temperature > 1e-30  # logits would overflow
    if is_cold or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} or top_k {top_k} is too low")

    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)

    if top_k is not None:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]))  # each (B, top_k)
        return tokens.gather(-1, sample(logits, temperature))

    return torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1)


# ---- 4. Training ---------------------------------------------------------------------
# A student is trained as any model is. Each forward pass rounds its weights anew, and
# the gradient moves the full-precision ones. The teacher only looks on.


@dataclass
class TrainConfig:
    """One training run. temperature and gt_weight are distillation_loss's."""

    loss: str = "tsld"
    temperature: float = 10.0  # τ of the token scale
    gt_weight: float = 0.0  # of the ground-truth loss beside "tsld" or "logit"
    steps: int = 450  # optimizer steps
    batch_size: int = 32  # sequences in a step
    block_size: int | None = None  # tokens in a sequence; None: the model's block_size
    accumulate: int = 1  # parts that a batch is taken in, to save memory
    lr: float = 1e-3  # peak learning rate, reached after the warm-up
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    final_lr: float = 0.1  # share of lr that the cosine ends on
    weight_decay: float = 0.1  # on matrices and embeddings, not on biases and norms
    betas: tuple = (0.9, 0.95)  # AdamW's averages of the gradient and its square
    clip: float = 1.0  # largest L2 norm of the gradient
    dtype: str = "float32"  # of matrix products (autocast); the weights stay float32
    seed: int = 0  # of the data order and dropout


def learning_rate(step, config):
    """Linear warm-up to lr, then half a cosine down to final_lr · lr. step: from 0."""
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup

    progress = (step - warmup) / max(1, config.steps - 1 - warmup)  # 0 ... 1
    cosine = (1 + math.cos(math.pi * progress)) / 2  # 1 ... 0
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def get_batch(tokens, batch_size, block_size, rng):
    """Random pieces of a text: ids and targets, each int64 (batch_size, block_size),
    the targets one token ahead. tokens: int64 (n,). rng: a NumPy Generator."""
    starts = rng.integers(len(tokens) - block_size, size=(batch_size, 1))
    places = torch.from_numpy(starts) + torch.arange(block_size + 1)  # (B, T + 1)

    pieces = tokens[places]
    return pieces[:, :-1], pieces[:, 1:]


def make_optimizer(model, config):
    """AdamW, with weight decay on matrices and embeddings alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    if not parameters:
        raise ValueError("the model has nothing to train: is it packed?")

    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    groups = [decayed, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def training_loss(student, teacher, ids, targets, config):
    """config.loss of one batch, a scalar. ids, targets: int64 (B, T)."""
    if config.loss == "l2l":  # looks inside both models
        student_trace = student(ids, trace=True)
        with torch.no_grad():
            teacher_trace = teacher(ids, trace=True)
        terms = per_token_terms(student_trace.logits, teacher_trace.logits, targets)
        layers = layer_to_layer_loss(student_trace, teacher_trace, targets)
        return distillation_loss("l2l", terms, layers=layers)

    # All others take logits. The labels alone need no teacher's.
    logits = student(ids)
    teacher_logits = logits
    if config.loss != "gt":
        with torch.no_grad():
            teacher_logits = teacher(ids)
    terms = per_token_terms(logits, teacher_logits, targets)
    return distillation_loss(config.loss, terms, config.temperature, config.gt_weight)


def backward(student, teacher, ids, targets, config):
    """Adds the gradient of a batch's loss to the student's .grad, in config.accumulate
    parts. Returns the loss, a detached scalar."""
    dtype = getattr(torch, config.dtype)
    total = torch.zeros((), device=ids.device)

    parts = config.accumulate
    for x, y in zip(ids.chunk(parts), targets.chunk(parts)):
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            loss = training_loss(student, teacher, x, y, config)

        # The batch's loss is the mean over its parts, which are of equal size.
        loss = loss / parts
        loss.backward()
        total += loss.detach()
    return total


def train(
    student, tokens, config, teacher=None, optimizer=None, start=0, backward=backward
):
    """Trains the student in place on random pieces of a text. A generator of (step,
    loss), from step 1 on: nothing runs, no check either, before a step is asked for.

    student, teacher: modules that give logits (B, T, V) for ids (B, T), as GPT does.
    tokens: int64 (n,), on the CPU. The loss "gt" needs no teacher.
    optimizer, start: go on after `start` steps, and end as a run without a break does.
    backward: a cheaper way to the same loss and gradient may take its place.
    Raises TrainingDiverged, the weights kept, if loss or gradient is not finite."""
    block_size = config.block_size
    if block_size is None:
        block_size = student.config.block_size
    check_training(student, tokens, config, teacher, block_size)
    device = next(student.parameters()).device
    gpus = [device] if device.type == "cuda" else []
    optimizer = optimizer or make_optimizer(student, config)
    if teacher is not None:
        teacher.eval()
    student.train()

    for step in range(start, config.steps):
        # Batch and dropout follow from seed and step. A resumed run draws the same.
        rng = np.random.default_rng((config.seed, step))
        batch = get_batch(tokens, config.batch_size, block_size, rng)
        ids, targets = (t.to(device, non_blocking=True) for t in batch)

        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward.
        student.zero_grad()
        with torch.random.fork_rng(gpus):  # the caller's random numbers go on
            torch.manual_seed(rng.integers(2**62))
            loss = backward(student, teacher, ids, targets, config)

        # Clip and step.
        norm = nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        if not math.isfinite(loss + norm):  # the one wait for the device
            values = f"loss {loss:.4g}, gradient of norm {norm:.4g}"
            raise TrainingDiverged(f"{values} at step {step + 1}, rate {lr:.2e}")
        value = loss.item()
        optimizer.step()
        yield step + 1, value

    student.eval()


def check_training(student, tokens, config, teacher, block_size):
    """Raises ValueError if `train` cannot do what it is asked for."""
    if teacher is None and config.loss != "gt":
        raise ValueError(f"the loss {config.loss!r} needs a teacher")
    if not config.clip > 0:
        raise ValueError(f"clip must be above 0 (infinity: never), not {config.clip}")
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {config.dtype!r}")

    B, parts = config.batch_size, config.accumulate
    if B < 1 or parts < 1 or B % parts:
        raise ValueError(f"no equal parts: batch_size {B}, accumulate {parts}")

    if not 1 <= block_size < len(tokens):
        raise ValueError(f"block_size {block_size} does not fit {len(tokens)} tokens")

    # bfloat16 would lose small steps. A shared weight would move the teacher, too.
    frozen = () if teacher is None else teacher.parameters()
    of_teacher = {parameter.data_ptr() for parameter in frozen} - {0}  # 0: no memory
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.element_size() < 4:
            raise ValueError(f"{name} is {parameter.dtype}: train float32 weights")
        if parameter.requires_grad and parameter.data_ptr() in of_teacher:
            raise ValueError(f"{name} is the teacher's as well: copy the model first")


@torch.no_grad()
def evaluate(model, tokens, block_size):
    """Mean cross-entropy of a text in nats per token. exp of it is the perplexity.

    tokens, int64 (n,), are cut into blocks that do not overlap. Each token but the
    first is predicted once, from the 1 to block_size tokens before it in its block."""
    if tokens.dim() != 1 or len(tokens) < 2 or block_size < 1:
        raise ValueError(f"no text: {tuple(tokens.shape)} in blocks of {block_size}")

    tokens = tokens.to(next(model.parameters(), tokens).device)

    # The last block is filled up with targets of -100, which cross_entropy skips.
    filling = -(len(tokens) - 1) % block_size
    inputs = F.pad(tokens[:-1], (0, filling)).view(-1, block_size)
    targets = F.pad(tokens[1:], (0, filling), value=-100).view(-1, block_size)

    # As many blocks at a time as have 2048 tokens: it bounds the logits' memory.
    total = 0.0
    rows = max(1, 2048 // block_size)
    with evaluating(model):
        for ids, y in zip(inputs.split(rows), targets.split(rows)):
            logits = model(ids).float().flatten(0, 1)  # (rows · block_size, V)
            check_ids(y[y != -100], logits.shape[-1])
            total += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return total / (targets != -100).sum().item()


def bits_per_byte(nats_per_token, tokens, bytes):
    """The bits that a byte of the text costs. Unlike perplexity this compares models
    with different vocabularies. tokens, bytes: how many of them are predicted."""
    return nats_per_token * tokens / math.log(2) / bytes


# ---- 5. Packing ----------------------------------------------------------------------
# A code takes the two lowest bits of its two's complement: 0 is 00, +1 is 01, -1 is 11.
# Byte k of a row holds codes 4k to 4k + 3, the first one in its lowest bits:
#
#     codes                 bits, from the highest on            byte
#     +1  -1   0  +1        01 00 11 01                          64 + 12 + 1 = 77
# 768 rows of 3072 codes take 768 · 768 = 589,824 bytes, where FP32 takes 16 times that.


def pack_ternary(codes):
    """codes: int8 (out, in) in {-1, 0, +1} -> uint8 (out, ceil(in / 4)). Where in is
    no multiple of 4, codes of 0 fill the last byte."""
    if not codes.is_meta and ((codes < -1) | (codes > 1)).any():
        raise ValueError(f"codes are -1, 0 and +1, not {codes.unique().tolist()}")

    filled = F.pad(codes & 0b11, (0, -codes.shape[1] % 4))
    bits = filled.to(torch.uint8).unflatten(1, (-1, 4))  # (out, bytes in a row, 4)
    return bits[..., 0] | bits[..., 1] << 2 | bits[..., 2] << 4 | bits[..., 3] << 6


def unpack_ternary(packed, in_features):
    """packed: uint8 (out, ceil(in / 4)) -> codes, int8 (out, in)."""
    # Each code moves to the two highest bits, and back with its sign.
    highest = torch.stack([packed << 6, packed << 4, packed << 2, packed], dim=-1)
    codes = highest.view(torch.int8) >> 6
    return codes.flatten(1)[:, :in_features]


def ternary_matmul(x, packed, scale, bias=None):
    """x @ (scale · codes).T + bias, from the packed bytes. Faster code must agree.

    An output adds the inputs whose code is +1, subtracts those whose code is -1, and is
    multiplied by its scale. (Attention, norms, GELU and output head still multiply.)

    x: (..., in) -> (..., out) in its dtype, added up in float32. packed: uint8
    (out, ceil(in / 4)). scale: float32, (1, 1) or (out, 1). bias: (out,) or None."""
    *leading, width = x.shape
    out, K = packed.shape
    scales = scale.numel()
    biases = None if bias is None else bias.numel()
    if math.ceil(width / 4) != K or scales not in (1, out) or biases not in (None, out):
        shapes = f"packed {(out, K)}, {scales} scales, {width} inputs, {biases} biases"
        raise ValueError(f"the shapes do not fit: {shapes}")

    codes = unpack_ternary(packed, width)  # (out, in)
    rows = x.float().reshape(-1, width)
    y = rows.new_zeros(len(rows), out)

    # Additions and subtractions alone.
    for n, row in enumerate(rows):
        added = torch.where(codes == 1, row, 0).sum(dim=1)  # (out,)
        subtracted = torch.where(codes == -1, row, 0).sum(dim=1)
        y[n] = added - subtracted

    # The one multiplication.
    y = y * scale.flatten()
    if bias is not None:
        y = y + bias
    return y.view(*leading, out).to(x.dtype)


class PackedLinear(nn.Module):
    """A linear layer whose ternary weight is packed, 2 bits each. For inference."""

    def __init__(self, in_features, packed, scale, bias=None):
        super().__init__()
        self.in_features = in_features
        self.register_buffer("packed", packed)  # uint8 (out, ceil(in / 4))
        self.register_buffer("scale", scale)  # float32 (1, 1) or (out, 1)
        self.register_buffer("bias", bias)  # (out,) or None

    def dequantized(self):
        """The weight, float32 (out, in)."""
        return self.scale * unpack_ternary(self.packed, self.in_features)

    def forward(self, x):  # (..., in) -> (..., out)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} inputs, not {self.in_features}")
        return ternary_matmul(x, self.packed, self.scale, self.bias)


def pack_model(model):
    """Replaces every 2-bit QuantLinear by a PackedLinear, in place. 4-bit layers stay.
    Returns the model, in eval mode, with nothing to train."""
    layers = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantLinear) and layer.bits == 2:
            check_plain(name, layer)
            layers[name] = layer

    if not layers:
        raise ValueError("there is no 2-bit QuantLinear to pack: see quantize_model")

    packed = {}  # once for each weight, which two layers may share
    for name, layer in layers.items():
        key = layer.weight, layer.granularity
        if key not in packed:
            codes, scale = ternarize(*key)
            packed[key] = pack_ternary(codes), scale

        bias = None if layer.bias is None else layer.bias.detach()
        ternary = PackedLinear(layer.in_features, *packed[key], bias)
        model.set_submodule(name, ternary)
    return model.requires_grad_(False).eval()


# A file holds codes, float32 vectors (scales, biases, norms) and float16 embeddings.
# GPT-2 small's has 101 MB, 79 of them embeddings: from 498 it shrinks 5 times, not 16.

PACKED_FORMAT = "tsld packed 4"


def config_of(model):
    """The configuration as a dict. None if it is no dataclass."""
    config = getattr(model, "config", None)
    return asdict(config) if is_dataclass(config) else None


def as_stored(name, tensor):
    """The tensor in a file's dtype. Raises ValueError if it is not finite in that."""
    if tensor.is_floating_point():
        is_matrix = tensor.dim() > 1 and not name.endswith(".scale")
        tensor = tensor.half() if is_matrix else tensor.float()

    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite in {tensor.dtype}")
    return tensor


def save_model(path, model):
    """Writes a packed model, whole or not at all. Raises ValueError, the old file left
    as it was, if not all is packed, or a value is not finite as it is stored."""
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    if not layers or any(isinstance(m, QuantLinear) for m in model.modules()):
        raise ValueError("the model is not packed, or not all of it: see pack_model")

    tensors, of_parameter = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        name = name.replace("_orig_mod.", "")  # what torch.compile wraps
        value = as_stored(name, tensor.detach().cpu())
        tensors[name] = of_parameter.setdefault(id(tensor), value)  # tied: only once
    content = {"format": PACKED_FORMAT, "config": config_of(model), "tensors": tensors}

    # In a folder of its own first: at `path` there is always a whole file.
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        whole = Path(folder, "model")
        with open(whole, "wb") as file:
            torch.save(content, file)
        whole.replace(path)


def load_model(path, into=None):
    """Reads what save_model wrote, onto the CPU, in eval mode, with nothing to train.

    into: the module to fill if it is no GPT, with its dtype, and alike in all that its
    config, a dataclass, does not say. Raises CheckpointError, and runs no code, for
    anything but such a model. `into` may then be half filled."""
    with open(path, "rb") as file:
        try:
            sizes = [entry.file_size for entry in zipfile.ZipFile(file).infolist()]
            if sum(sizes) > Path(path).stat().st_size:
                raise ValueError("its content is larger than the file")  # a zip bomb

            # weights_only: no code in the file is run.
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            return fill(content, into)
        except Exception as error:  # a foreign file can make torch raise any of them
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(f"{path} does not load: {reason:.200}") from None


def fill(content, model):
    """Packs the model, a new GPT if it is None, and gives it the file's tensors."""
    if content["format"] != PACKED_FORMAT:
        raise ValueError(f"its format is {content['format']!r}")
    config, tensors = content["config"], content["tensors"]

    for name, tensor in tensors.items():
        # An expanded view claims gigabytes that a few bytes stand for.
        if not tensor.is_contiguous() or as_stored(name, tensor).dtype != tensor.dtype:
            raise ValueError(f"{name} is not as save_model stores it")

    is_new = model is None
    if is_new:
        if config is None or config.keys() != asdict(GPTConfig()).keys():
            raise ValueError("it is of another model than GPT, which goes to `into`")
        if config["n_layer"] > len(tensors):  # before anything is built
            raise ValueError(f"{config['n_layer']} layers exceed its tensors")
        with torch.device("meta"):  # without values
            model = GPT(GPTConfig(**config))
    if config != config_of(model):
        raise ValueError(f"its configuration is {config}, not {config_of(model)}")

    # Pack the layers that the file has packed.
    names = [key.removesuffix(".packed") for key in tensors if key.endswith(".packed")]
    for name in names:
        packed = tensors[f"{name}.packed"]
        if packed.dtype != torch.uint8 or (packed >> 1 & ~packed & 0b01010101).any():
            raise ValueError(f"{name} has a code that is none of -1, 0 and +1")

        linear = model.get_submodule(name)
        if type(linear) is nn.Linear:
            granularity = "tensor" if len(tensors[f"{name}.scale"]) == 1 else "channel"
            QuantLinear.of(linear, 2, granularity)
    pack_model(model)

    # Strict: names and shapes have to be the model's.
    model.load_state_dict(tensors, assign=is_new)
    if is_new and torch.equal(model.lm_head.weight, model.wte.weight):
        model.lm_head.weight = model.wte.weight  # one parameter, as it was
    for module in model.modules():
        if is_new and type(module) is nn.Linear:  # which quantize_model skipped
            module.float()

    for name, tensor in model.cpu().state_dict().items():
        if not torch.equal(tensor, tensors[name].to(tensor.dtype)):
            raise ValueError(f"{name} is tied in this model, and not in the file's")
    return model
