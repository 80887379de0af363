"""TSLD: token-scaled logit distillation for ternary-weight generative language models, in one file.

After Kim et al., "Token-Scaled Logit Distillation for Ternary Weight Generative Language Models",
NeurIPS 2023 (arXiv:2308.06744). The authors' own program is github.com/aiha-lab/TSLD.

A language model spends its time reading weights from memory. When every weight is -α, 0 or +α, it
takes 2 bits instead of 32, and a matrix product needs additions, and one product by α per output.
But rounding a trained model that coarsely destroys it. So the ternary *student* is trained with the
rounding in the loop (quantization-aware training, QAT), and learns to give the same next-token
distribution as its full-precision *teacher* (distillation). TSLD says how much each token counts:

    L = Σ_n  softmax_n( -Σ_i y_ni log P^T_ni / τ )  ·  Σ_i -P^T_ni log P^S_ni
             └─ token_scale: how unsure the     ┘      └─ kd: cross-entropy of ┘
                teacher is of the true token              student against teacher

Symbols, and what the code calls them:
    n, N     a token's position in its sequence, and the sequence's length dimension T
    i, V     an entry of the vocabulary, and the vocabulary's size         dimension V
    y_n      the true next token at position n (one-hot in the formula)    targets        (B, T)
    P^T      the teacher's next-token distribution                         teacher_logits (B, T, V)
    P^S      the student's next-token distribution                         student_logits (B, T, V)
    Δ        weights of a magnitude up to Δ become 0                       threshold
    α        the one magnitude of all other weights                        scale
    τ        temperature of the token scale: 1 as printed, 10 in the paper's experiments. It divides
             the teacher's cross-entropies, not the logits as Hinton's temperature does
    B, C, H  sequences in a batch, width of the model (n_embd), attention heads

The whole method, from a teacher to a packed student (it writes student.packed):

    import copy, tsld, torch
    tokens = torch.tensor(list(open(tsld.__file__, "rb").read()))  # a text; each byte is a token
    teacher = tsld.GPT(tsld.GPTConfig(64, vocab_size=256, n_layer=2, n_head=2, n_embd=64))
    for step, loss in tsld.train(teacher, tokens, tsld.TrainConfig(loss="gt", steps=60)):
        print("teacher", step, loss)
    student = tsld.quantize_model(copy.deepcopy(teacher))  # same weights, now used in ternary form
    for step, loss in tsld.train(student, tokens, tsld.TrainConfig(loss="tsld", steps=60), teacher):
        print("student", step, loss)
    print([tsld.evaluate(model, tokens[:5000], block_size=64) for model in (teacher, student)])
    tsld.save_model("student.packed", tsld.pack_model(student))  # 2 bits a weight
    ids = tsld.load_model("student.packed").generate(tokens[None, :9], max_new_tokens=40)
    print(bytes(ids[0].tolist()).decode(errors="replace"))

The student starts as a copy of its teacher: what is left to learn is to live with the rounding.
Contents: 1. Losses. 2. Quantizers. 3. GPT. 4. Training. 5. Packing. 6. The same at less cost: a
loss without (B, T, V) logits, the product in C; skipping it loses nothing of the method.
Losses are in nats unless a name says bits. Tensors keep their device and dtype unless a docstring
says otherwise. Bad arguments raise ValueError, a file that is not what it should be raises
CheckpointError, a training run that blows up TrainingDiverged; each message names the cause."""

import ctypes
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist, nn
from torch.nn import functional as F


class CheckpointError(ValueError):
    """A file is truncated, altered, foreign, or from another configuration."""


class TrainingDiverged(ArithmeticError):
    """The loss or its gradient became NaN or infinite."""


# ------ 1. Losses ---------------------------------------------------------------------------------
# Rounding errors add up. Attention at position n mixes the errors of all positions up to n, and
# each block hands its errors on to the next. The logits stand at the end of that chain: a loss on
# them sees all of the accumulated error, where it counts. Every loss is a weighted sum of three
# numbers per token, each (B, T), in nats; L2L adds one number for the layers.

LOSSES = ("gt", "logit", "l2l", "logit_gt", "tsld")


class Terms(NamedTuple):
    """The per-token terms of every loss, float32 whatever the logits were."""
    ce_student: torch.Tensor  # (B, T)  -log P^S[y]: the ground-truth loss
    ce_teacher: torch.Tensor  # (B, T)  -log P^T[y]: how unsure the teacher is of the true token
    kd: torch.Tensor  # (B, T)  -Σ_i P^T_i log P^S_i: the distillation loss
    layers: torch.Tensor | float = 0.0  # scalar: layer_to_layer_loss, for L2L


def per_token_terms(student_logits, teacher_logits, targets):
    """Terms from logits (B, T, V) of any float dtype, or from objects with .logits; targets: int64
    (B, T). No gradient flows into the teacher. kd is a cross-entropy, KL(P^T ‖ P^S) plus the
    teacher's entropy, which no student changes: their gradients agree. ValueError: other shapes."""
    ours, known = (getattr(z, "logits", z).float() for z in (student_logits, teacher_logits))
    log_p_student, log_p_teacher = ours.log_softmax(-1), known.detach().log_softmax(-1)  # (B, T, V)
    if not log_p_student.shape == log_p_teacher.shape == (*targets.shape, log_p_student.shape[-1]):
        raise ValueError(f"the logits are not of targets of shape {tuple(targets.shape)}")
    true = targets[..., None]  # (B, T, 1)
    ce_student = -log_p_student.gather(-1, true).squeeze(-1)
    ce_teacher = -log_p_teacher.gather(-1, true).squeeze(-1)
    kd = -(log_p_teacher.exp() * log_p_student).sum(-1)
    return Terms(ce_student, ce_teacher, kd)


def token_scale(ce_teacher, temperature=10.0):
    """softmax_n(ce_teacher / τ): how much each token of a sequence counts. It runs over the tokens
    of one sequence, not over the vocabulary and not over the batch. ce_teacher: (B, T) in nats ->
    (B, T), rows sum to 1, detached. At τ = 1 the weights are proportional to 1 / P^T[y_n]; at
    math.inf all are 1/N: plain logit distillation. ValueError: a temperature not above 0."""
    if not temperature > 0:
        raise ValueError(f"the token scale's temperature must be above 0, not {temperature}")
    return (ce_teacher.detach() / temperature).softmax(dim=1)


def tsld_loss(terms, temperature=10.0, gt_weight=0.0):
    """TSLD, a scalar: with w = token_scale(ce_teacher), the mean over the B sequences of Σ_n w_n ·
    kd_n (+ gt_weight · mean of ce_student).

    Its gradient for the student's logits at token n is w_n (P^S_n - P^T_n) / B: the scale says how
    hard a token pulls, not where to. Where the teacher is sure of the true token, P^T_n is nearly
    the one-hot label: a label loss, if added, pulls the same way once more, and the student learns
    the text by heart. TSLD makes exactly these tokens count less.
    The authors' program sums over a batch of 4 and adds the ground-truth loss: up to a factor that
    is gt_weight = 0.25. The printed formula has neither sum nor label, and is the default."""
    w = token_scale(terms.ce_teacher, temperature)  # (B, T)
    loss = (w * terms.kd).sum(1).mean()
    return loss + gt_weight * terms.ce_student.mean() if gt_weight else loss


class Trace(NamedTuple):
    """What layer-to-layer distillation compares, besides the logits."""
    logits: torch.Tensor  # (B, T, V)
    hidden_states: list  # n_layer + 1 of (B, T, C): the embedding, then each block; before ln_f
    attention_scores: list  # n_layer of (B, H, T, T): q·k/√d, before mask and softmax


def layer_to_layer_loss(student_trace, teacher_trace):
    """L2L, the distillation made for encoders (table 1: L2L+logit), a float32 scalar:
        Σ_layers MSE(hidden states) + Σ_layers MSE(attention scores at and before each position)
    The mask hides the future, so T(T+1)/2 scores of a head count. The teacher gets no gradient. A
    transformers model has .attentions, probabilities, in place of scores, and its last state after
    the norm. ValueError: it has no .attentions, or the two differ in layers, heads or width."""
    traces = student_trace, teacher_trace
    scores = [getattr(t, "attention_scores", getattr(t, "attentions", None)) for t in traces]
    if not all(of_layers and of_layers[0] is not None for of_layers in scores):
        raise ValueError("L2L needs attentions: load the model with attn_implementation='eager'")
    pairs = [*zip(*(t.hidden_states for t in traces), strict=True)]  # each (B, T, C)
    for student, teacher in zip(*scores, strict=True):
        seen = torch.ones_like(student[0, 0], dtype=torch.bool).tril()  # (T, T)
        pairs.append((student[..., seen], teacher[..., seen]))  # each (B, H, T(T+1)/2)
    if any(student.shape != teacher.shape for student, teacher in pairs):
        raise ValueError("L2L compares models of one width and one number of heads")
    return sum(F.mse_loss(student.float(), teacher.detach().float()) for student, teacher in pairs)


def distillation_loss(name, terms, temperature=10.0, gt_weight=0.0):
    """One of LOSSES, a row of the paper's table 1: a float32 scalar. ValueError: another name."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {name!r}")
    if name == "tsld":
        return tsld_loss(terms, temperature, gt_weight)
    gt, kd = terms.ce_student.mean(), terms.kd.mean()
    return {"gt": gt, "logit": kd, "l2l": kd + terms.layers, "logit_gt": kd + gt}[name]


# ------ 2. Quantizers -----------------------------------------------------------------------------
# A weight matrix (out, in) becomes small integers, the codes, and one float32 scale for the whole
# matrix ("tensor") or for each of its rows, the output channels ("channel").

def _group(granularity):
    """The dimensions that share one scale; reducing them with keepdim leaves (1, 1) or (out, 1)."""
    if granularity not in ("tensor", "channel"):
        raise ValueError(f"granularity must be 'tensor' or 'channel', not {granularity!r}")
    return (0, 1) if granularity == "tensor" else (1,)


def ternarize(weight, granularity="tensor"):
    """The ternary quantizer, w ≈ α · codes: the 2-bit (W2) rows of the paper's table 1.
        Δ = 0.7 · mean|w|   codes = +1 where w > Δ, -1 where w < -Δ, else 0
        α = mean of |w| where |w| > Δ       (Li et al., "Ternary Weight Networks", 2016)
    weight: (out, in), any float dtype. Returns codes, int8 (out, in) in {-1, 0, +1}, and a float32
    scale, (1, 1) or (out, 1). A group of zeros gets scale 0. ValueError: another granularity."""
    group = _group(granularity)
    w = weight.detach().float()
    threshold = 0.7 * w.abs().mean(group, keepdim=True)
    codes = (w > threshold).to(torch.int8) - (w < -threshold).to(torch.int8)
    count = codes.abs().sum(group, keepdim=True, dtype=torch.float32)
    scale = (codes * w).sum(group, keepdim=True) / count.clamp(min=1)  # codes · w is |w| or 0
    return codes, scale


def quantize_int4(weight, granularity="tensor"):
    """Asymmetric 4-bit round-to-nearest, w ≈ scale · (codes - zero_point): the W4 rows of table 1.
        low = min(w, 0)   high = max(w, 0)   scale = (high - low) / 15
        zero_point = round(-low / scale)     codes = round(w / scale) + zero_point, clamped to 0..15
    The range includes 0, so 0 stays exactly 0 and weights all of one sign are not clipped.
    weight: (out, in), any float dtype. Returns codes, uint8 (out, in), and float32 scale and int32
    zero_point, each of the shape of ternarize's scale. ValueError: another granularity."""
    group = _group(granularity)
    w = weight.detach().float()
    low = w.amin(group, keepdim=True).clamp(max=0)
    high = w.amax(group, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    divisor = torch.where(scale > 0, scale, 1.0)  # a group of zeros: 0 / 1 instead of 0 / 0
    zero_point = (-low / divisor).round().clamp(0, 15).to(torch.int32)
    codes = ((w / divisor).round() + zero_point).clamp(0, 15).to(torch.uint8)
    return codes, scale, zero_point


def fake_quantize(weight, bits=2, granularity="tensor"):
    """The weight after quantizing and back, ŵ, (out, in) in its own dtype. Rounding has gradient 0
    almost everywhere and would stop all learning. So the backward pass leaves it out: ∂L/∂w :=
    ∂L/∂ŵ (the straight-through estimator). ValueError: bits other than 2 (ternary) and 4."""
    if bits not in (2, 4):
        raise ValueError(f"bits must be 2 or 4, not {bits!r}")
    codes, scale, *zero_point = (ternarize if bits == 2 else quantize_int4)(weight, granularity)
    quantized = scale * (codes - zero_point[0] if zero_point else codes)
    return quantized.to(weight.dtype) + (weight - weight.detach())  # adds 0, whose gradient is 1


class QuantLinear(nn.Linear):
    """A linear layer that trains its full-precision weight and computes with the quantized one."""
    def __init__(self, in_features, out_features, bias=True, bits=2, granularity="tensor"):
        super().__init__(in_features, out_features, bias=bias)
        self.bits, self.granularity = bits, granularity

    def dequantized(self):
        """The weight that the layer computes with, (out, in)."""
        return fake_quantize(self.weight, self.bits, self.granularity)

    def forward(self, x):  # (..., in) -> (..., out)
        return F.linear(x, self.dequantized(), self.bias)


def quantize_model(model, bits=2, granularity="tensor"):
    """Replaces every nn.Linear (and transformers' Conv1D) in any torch module by a QuantLinear, in
    place, and returns the module. Embeddings, norms and the output head stay in full precision, as
    in the paper. The new layers hold the parameters of the old; only a Conv1D's weight is copied,
    transposed. ValueError: other bits or granularity, no such layer, or nn.MultiheadAttention."""
    fake_quantize(torch.zeros(1, 1), bits, granularity)  # refuses bad arguments before any change
    heads, every = _output_heads(model), model.named_modules(remove_duplicate=False)
    every = {n: m for n, m in every if not any(m is head for head in heads)}
    layers = {n: m for n, m in every.items() if isinstance(m, nn.Linear) or is_conv1d(m)}
    silent = any(isinstance(m, nn.MultiheadAttention) for m in every.values())  # calls no layer
    if silent or not layers or "" in layers:
        raise ValueError(f"{type(model).__name__} holds no linear layer, or a MultiheadAttention")
    for name, old in layers.items():  # a layer that is used twice has two names
        weight = old.weight
        if is_conv1d(old):
            weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
        with torch.device("meta"):  # allocates nothing: the parameters come from the old layer
            new = QuantLinear(*weight.shape[::-1], old.bias is not None, bits, granularity)
        new.weight, new.bias = weight, old.bias
        model.set_submodule(name, new.train(old.training))
    return model


def is_conv1d(module):
    """Is it transformers' Conv1D, a linear layer whose weight is (in, out)? Nothing is imported."""
    return type(module).__name__ == "Conv1D" and {"nx", "nf"} <= vars(module).keys()


def _output_heads(model):
    """What makes the logits: as the model says, else what is tied to an embedding or named so."""
    if head := getattr(model, "get_output_embeddings", lambda: None)():
        return [head]
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [m for name, m in model.named_modules(remove_duplicate=False)
            if name.split(".")[-1] in ("lm_head", "head") or id(getattr(m, "weight", None)) in tied]


# ------ 3. GPT ------------------------------------------------------------------------------------
# GPT-2 (Radford et al., 2019): learned positions, layer norm before each sublayer, biases
# everywhere, GELU in its tanh approximation, output head tied to the token embedding. Parameters
# have the names and shapes of the published weights (where c_attn, c_proj, c_fc are transposed).

def load_tensors(path):
    """What torch.save wrote, on the CPU. CheckpointError: the file is damaged, is compressed,
    or could run code, which it then does not."""
    with open(path, "rb") as file, refusing(path, "is truncated or holds more than plain values"):
        entries = zipfile.ZipFile(file).filelist if zipfile.is_zipfile(file) else []
        if any(entry.compress_type for entry in entries):
            raise ValueError("torch.save does not compress")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def refusing(path, what=None):
    """Whatever a file's content makes torch trip over becomes a CheckpointError."""
    try:
        yield
    except Exception as error:
        words = what or f"{type(error).__name__} {' '.join(str(error).split()):.200}"
        raise CheckpointError(f"{path} {words}") from None


@dataclass
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 small's (124 million parameters)."""
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


class Attention(nn.Module):
    """Causal multi-head self-attention: position n sees the positions up to n. So the quantization
    errors of early tokens reach every later one (the paper's cumulative quantization error)."""
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, start=0, trace=False):
        """x: (B, T, C) -> (B, T, C), and the scores (B, H, T, T) if `trace` asks for them. cache:
        keys and values, (2, B, H, S, C / H) in one piece, filled in before position `start`; those
        of x are written from there on. ValueError: no room, or a T above 1 where start is not 0."""
        B, T, C = x.shape
        if cache is not None and (start + T > cache.shape[3] or T > 1 and start > 0):
            raise ValueError(f"the cache does not take {T} tokens at position {start}")
        qkv = self.c_attn(x)  # (B, T, 3 C)
        in_c = cache is not None and B == T == 1 and not (self.training or trace)
        in_c = in_c and qkv.type() == cache.type() == "torch.FloatTensor" and not qkv.requires_grad
        if in_c and c_library():  # one token, as below in a third of the time
            y = torch.zeros_like(x)
            c_library().attention(*(t.data_ptr() for t in (qkv, cache, y)), start, *cache.shape[2:])
            return self.c_proj(y), None
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, C / H)
        if cache is not None:
            cache[:, :, :, start : start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, : start + T]
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1]) if trace else None
        # Causal attention, fused; in float32 on CPUs, where its backward in bfloat16 is slow.
        q, k, v = (t.float() if t.is_cpu and t.element_size() == 2 else t for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout)
        return F.dropout(self.c_proj(y.to(x.dtype).transpose(1, 2).flatten(2)), dropout), scores


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). Takes and returns what Attention does."""
    def __init__(self, config):
        super().__init__()
        C, dropout = config.n_embd, nn.Dropout(config.dropout)
        self.ln_1, self.attn = nn.LayerNorm(C), Attention(config)
        mlp = {"c_fc": nn.Linear(C, 4 * C), "gelu": nn.GELU("tanh"), "c_proj": nn.Linear(4 * C, C)}
        self.ln_2, self.mlp = nn.LayerNorm(C), nn.Sequential(OrderedDict(mlp, dropout=dropout))

    def forward(self, x, cache=None, start=0, trace=False):
        y, scores = self.attn(self.ln_1(x), cache, start, trace)
        x = x + y
        return x + self.mlp(self.ln_2(x)), scores


class GPT(nn.Module):
    """GPT-2. model(ids) gives logits (B, T, V), model(ids, trace=True) a Trace. ids: (B, T)."""
    def __init__(self, config):
        super().__init__()
        *sizes, dropout = astuple(config)
        wrong = any(type(n) is not int or n < 1 for n in sizes) or not 0 <= dropout < 1
        if wrong or config.n_embd % config.n_head:
            raise ValueError(f"{config} is wrong, or does not divide into {config.n_head} heads")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():  # as transformers initializes GPT-2
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" not in name:
                adds_up = 2 * config.n_layer if name.endswith("c_proj.weight") else 1  # residuals
                nn.init.normal_(parameter, std=0.02 / math.sqrt(adds_up))

    def embed(self, ids, start=0):
        """ids (B, T) at positions from `start` on -> (B, T, C). ValueError: beyond block_size."""
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.config.block_size}")
        dtype = self.ln_f.weight.dtype  # a loaded model's embeddings are float16, and only they
        x = self.wte(ids).to(dtype) + self.wpe.weight[start:end].to(dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def hidden(self, ids, cache=None, start=0):
        """ids (B, T) -> (B, T, C) after the final norm: logits = hidden @ head.T."""
        x = self.embed(ids, start)
        for layer, block in enumerate(self.h):
            x, _ = block(x, None if cache is None else cache[layer], start)
        return self.ln_f(x)

    def forward(self, ids, trace=False):
        if not trace:
            return self.lm_head(self.hidden(ids))
        states, scores = [self.embed(ids)], []
        for block in self.h:
            x, score = block(states[-1], trace=True)
            states.append(x)
            scores.append(score)
        return Trace(self.lm_head(self.ln_f(states[-1])), states, scores)

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, on_token=None):
        """Continues each row of ids, int64 (B, T), by samples from softmax(logits / temperature),
        of the `top_k` likeliest tokens where given; temperature 0 takes the likeliest. Returns all,
        (B, T + max_new_tokens). Its mode is left as found. on_token: gets each new column, (B, 1),
        as it comes. ValueError: no prompt, more than block_size tokens, a setting out of range."""
        (B, T), config, was_training = ids.shape, self.config, self.training
        if T == 0 or max_new_tokens < 0 or T + max_new_tokens > config.block_size:
            asked = f"a prompt of {T} tokens and {max_new_tokens} new ones"
            raise ValueError(f"{asked} are not 1 to block_size {config.block_size} tokens")
        if not temperature >= 0 or top_k is not None and top_k < 1:
            raise ValueError(f"temperature {temperature} is below 0, or top_k {top_k} below 1")
        shape = (2, B, config.n_head, T + max_new_tokens, config.n_embd // config.n_head)
        self.eval()
        parts, start = [ids], 0
        with torch.inference_mode():  # a little faster than no_grad
            cache = [self.ln_f.weight.new_zeros(shape) for _ in self.h]  # keys, values
            for _ in range(max_new_tokens):
                logits = self.lm_head(self.hidden(parts[-1], cache, start)[:, -1]).float()  # (B, V)
                start += parts[-1].shape[1]
                if top_k is not None:
                    logits, tokens = logits.topk(min(top_k, logits.shape[-1]))  # each (B, top_k)
                new = (logits.argmax(-1, keepdim=True) if temperature == 0 else  # (B, 1)
                       torch.multinomial((logits / temperature).softmax(-1), 1))
                parts.append(new if top_k is None else tokens.gather(-1, new))
                if on_token is not None:
                    on_token(parts[-1])
        self.train(was_training)
        return torch.cat(parts, dim=1)

    @classmethod
    def from_pretrained(cls, path):
        """Weights in GPT-2's published format, float32, in eval mode. path: a pytorch_model.bin, or
        a folder with one. A config.json beside it gives n_head and no more; else it is n_embd / 64,
        as in all four sizes. CheckpointError: truncated, another model's, or more than tensors."""
        path = Path(path) / "pytorch_model.bin" if Path(path).is_dir() else Path(path)
        content, config = load_tensors(path), path.with_name("config.json")
        with refusing(f"{path} (n_head from {config}) is no GPT-2:"), torch.device("meta"):
            content = {name.removeprefix("transformer."): t for name, t in content.items()}
            masks = (".attn.bias", ".attn.masked_bias")  # which old files hold as well
            tensors = {n: _flipped(n, t) for n, t in content.items() if not n.endswith(masks)}
            embedding, block_size = tensors["wte.weight"], len(tensors["wpe.weight"])
            if not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
                raise ValueError("lm_head.weight is not wte.weight")
            vocab_size, n_embd = embedding.shape
            n_layer = min(sum(".ln_1.weight" in name for name in tensors), len(tensors) // 12)
            n_head = json.loads(config.read_bytes())["n_head"] if config.exists() else n_embd // 64
            model = cls(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
            model.load_state_dict(tensors, assign=True)
        model.lm_head.weight = model.wte.weight
        return model.eval()

    @torch.no_grad()
    def save_pretrained(self, folder, dtype=torch.float32):
        """Writes pytorch_model.bin in GPT-2's published format, and config.json, as transformers
        and from_pretrained read them: quantized and packed weights dequantized."""
        tensors, config = {}, asdict(self.config)
        for name, module in self.named_modules():
            parts = {part: getattr(module, part, None) for part in ("weight", "bias")}
            if hasattr(module, "dequantized"):
                parts["weight"] = module.dequantized()
            parts = {f"{name}.{part}": t for part, t in parts.items() if t is not None}
            tensors |= {n: _flipped(n, t).to("cpu", dtype) for n, t in parts.items()}
        tensors = {n if "lm_head" in n else f"transformer.{n}": t for n, t in tensors.items()}
        config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        config["n_positions"], dropout = config.pop("block_size"), config.pop("dropout")
        config |= {f"{part}_pdrop": dropout for part in ("attn", "embd", "resid")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(tensors, Path(folder) / "pytorch_model.bin")
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _flipped(name, tensor):
    """In float32; the blocks' matrices transposed, which the published format has as (in, out)."""
    return (tensor.t() if name.startswith("h.") else tensor).float().contiguous()


# ------ 4. Training -------------------------------------------------------------------------------

@dataclass
class TrainConfig:
    """One training run. temperature and gt_weight matter to "tsld" alone."""
    loss: str = "tsld"
    temperature: float = 10.0  # τ of the token scale
    gt_weight: float = 0.0  # weight of the ground-truth loss added to TSLD
    steps: int = 450  # optimizer steps
    batch_size: int = 32  # sequences per step, over all processes
    block_size: int | None = None  # tokens in a sequence; None: our GPT's own block_size
    accumulate: int = 1  # parts that a batch is taken in, one after the other, to save memory
    lr: float = 1e-3  # peak learning rate, reached after the warm-up
    warmup: float = 0.05  # share of the steps over which the learning rate rises to lr
    final_lr: float = 0.1  # share of lr that the cosine ends on
    weight_decay: float = 0.1  # on matrices and embeddings, not on biases and norms
    betas: tuple = (0.9, 0.95)  # AdamW's running averages of gradient and squared gradient
    clip: float = 1.0  # largest L2 norm of the gradient
    dtype: str = "float32"  # matrix products in this type (autocast); the weights stay float32
    seed: int = 0  # of data order and dropout


def learning_rate(step, config):
    """Linear warm-up, then half a cosine from lr down to final_lr · lr. step: 0-based."""
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)  # 0 ... 1
    cosine = (1 + math.cos(math.pi * progress)) / 2  # 1 ... 0
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def get_batch(tokens, batch_size, block_size, rng):
    """Random pieces of the text. tokens: int64 (n,), n > block_size; rng: a numpy Generator.
    Returns ids and targets, each int64 (batch_size, block_size), the targets one token ahead."""
    starts = torch.from_numpy(rng.integers(len(tokens) - block_size, size=batch_size))  # (B,)
    pieces = tokens[starts[:, None] + torch.arange(block_size + 1)]  # (B, T + 1)
    return pieces[:, :-1], pieces[:, 1:]


def make_optimizer(model, config):
    """AdamW; weight decay on matrices alone. ValueError: nothing is to be trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, others = ([p for p in parameters if (p.dim() > 1) == yes] for yes in (True, False))
    decays = (matrices, config.weight_decay), (others, 0.0)
    groups = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def training_loss(student, teacher, ids, targets, config, lean=False):
    """config.loss of one batch, ids and targets (B, T): both models forward, the terms, the loss.
    lean: from lean_loss (section 6), for models with hidden(ids) and lm_head; not for "l2l"."""
    loss, *setting = config.loss, config.temperature, config.gt_weight
    if lean:
        with torch.no_grad():
            known = (None, None) if loss == "gt" else (teacher.hidden(ids), teacher.lm_head.weight)
        ours = student.hidden(ids), student.lm_head.weight
        return lean_loss(loss, *ours, *known, targets, *setting)
    ask = {}
    if loss == "l2l":
        ours = isinstance(student, GPT)
        ask = {"trace": True} if ours else {"output_hidden_states": True, "output_attentions": True}
    output = student(ids, **ask)
    with torch.no_grad():
        known = output if loss == "gt" else teacher(ids, **ask)  # "gt" ignores it
    terms = per_token_terms(output, known, targets)
    if loss == "l2l":
        terms = terms._replace(layers=layer_to_layer_loss(output, known))
    return distillation_loss(loss, terms, *setting)


def train(student, tokens, config, teacher=None, optimizer=None, start=0):
    """Trains `student` in place on random pieces of `tokens`, an int64 CPU tensor (n,), and yields
    (step, loss) after each step: 1-based, in nats. The loss "gt" needs no teacher.
    student, teacher: GPTs, or causal language models of transformers, which need config.block_size.
    optimizer, start: go on after `start` steps, to the result of an uninterrupted run. Processes
    share every batch: their models are spread over them (fully_shard, `hidden` registered too).
    ValueError, at the first step: what does not fit. TrainingDiverged: a value is not finite."""
    device = next(student.parameters()).device
    block_size = config.block_size or getattr(student.config, "block_size", None)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if block_size is None or len(tokens) <= block_size:
        raise ValueError(f"{len(tokens)} tokens are too few for pieces of block_size {block_size}")
    if config.loss not in LOSSES or config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"there is no loss {config.loss!r}, or no training in {config.dtype!r}")
    if teacher is None and config.loss != "gt":
        raise ValueError(f"the loss {config.loss!r} needs a teacher")
    if config.batch_size % (world * config.accumulate):
        raise ValueError(f"batch_size {config.batch_size} does not divide by {world} · accumulate")
    optimizer, dtype = optimizer or make_optimizer(student, config), getattr(torch, config.dtype)
    lean = config.loss != "l2l" and all(hasattr(m, "hidden") for m in (student, teacher or student))
    if teacher is not None:
        teacher.eval()
    student.train()
    for step in range(start, config.steps):
        rng = np.random.default_rng((config.seed, step))  # a resumed run draws the same
        ids, targets = get_batch(tokens, config.batch_size, block_size, rng)
        torch.manual_seed(rng.integers(2**62) + rank)  # of dropout
        lr, loss = learning_rate(step, config), 0.0
        for group in optimizer.param_groups:
            group["lr"] = lr
        student.zero_grad()
        share = (t[rank::world].to(device).chunk(config.accumulate) for t in (ids, targets))
        for part in zip(*share):
            with torch.autocast(device.type, dtype, dtype != torch.float32):
                value = training_loss(student, teacher, *part, config, lean)
            (value / config.accumulate).backward()
            loss += value.item() / config.accumulate
        if world > 1:
            mean = torch.tensor(loss / world, dtype=torch.float64, device=device)
            dist.all_reduce(mean)
            loss = mean.item()
        norm = nn.utils.clip_grad_norm_(student.parameters(), config.clip).item()
        if not math.isfinite(loss + norm):
            where = f"step {step + 1}, learning rate {lr:.2e}"
            raise TrainingDiverged(f"loss {loss}, gradient of norm {norm} at {where}")
        optimizer.step()
        yield step + 1, loss
    student.eval()


@torch.no_grad()
def evaluate(model, tokens, block_size):
    """Mean cross-entropy in nats per predicted token; the perplexity is exp(nats).
    The text is cut into blocks that do not overlap, each token but the first is predicted exactly
    once, and each block starts without context. tokens: int64 (n,), n ≥ 2, else ValueError. model:
    gives logits (B, T, V) for ids (B, T), or an object with .logits. Its mode is left as found."""
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"evaluation needs at least 2 tokens, not {tuple(tokens.shape)}")
    device, was_training, total = next(model.parameters(), tokens).device, model.training, 0.0
    model.eval()
    filling = (0, -(len(tokens) - 1) % block_size)  # of the last block; cross_entropy skips -100
    inputs = F.pad(tokens[:-1], filling).view(-1, block_size)
    targets = F.pad(tokens[1:], filling, value=-100).view(-1, block_size)
    rows = max(1, 2048 // block_size)  # blocks at a time: bounds the logits' memory
    for ids, true in zip(inputs.split(rows), targets.split(rows)):
        output = model(ids.to(device))
        logits = getattr(output, "logits", output).float().flatten(0, 1)  # (B T, V)
        total += F.cross_entropy(logits, true.flatten().to(device), reduction="sum").item()
    model.train(was_training)
    return total / (len(tokens) - 1)


def bits_per_byte(nats_per_token, tokens, bytes):
    """nats_per_token · tokens / ln 2 / bytes: it compares across tokenizers, unlike perplexity."""
    return nats_per_token * tokens / math.log(2) / bytes


# ------ 5. Packing --------------------------------------------------------------------------------
# The paper promises 16 times less memory than FP32 and a product without multiplications. A code
# takes the two lowest bits of its two's complement, 0 = 00, +1 = 01, -1 = 11: the low bit says "not
# zero", the high one "negative". A row takes K = ceil(in / 4) bytes, code 4k + j in bits 2j and
# 2j + 1 of byte k. Where the rows are a multiple of 64, and K of 4, 64 rows stand side by side:
# the first 4 bytes of each of them, then the next 4, so that one read serves many outputs.

def pack_ternary(codes):
    """codes: int8 (out, in) in {-1, 0, +1} -> uint8 (out, ceil(in / 4)).
    An example with 3 columns: K = 1, a row is one byte, and the fourth code is filling.

        codes          two's complement, last code first      byte
        +1  0 -1       00 11 00 01                             49
         0 +1 +1       00 01 01 00                             20
        -1  0  0       00 00 00 11                              3
    and ternary_matmul of x = (2, 3, 5) adds up y = α · (2 - 5,  3 + 5,  -2) = α · (-3, 8, -2)."""
    (out, width), K = codes.shape, math.ceil(codes.shape[1] / 4)
    bits = F.pad(codes & 3, (0, 4 * K - width)).to(torch.uint8).view(out, K, 4)
    packed = sum(bits[:, :, j] << 2 * j for j in range(4))  # (out, K)
    rows, size = (64, 4) if out % 64 == K % 4 == 0 else (1, 1)  # side by side, bytes at a time
    return packed.view(-1, rows, K // size, size).transpose(1, 2).reshape(out, K)


def unpack_ternary(packed, in_features):
    """packed: uint8 (out, ceil(in / 4)) -> codes, int8 (out, in)."""
    out, K = packed.shape
    rows, size = (64, 4) if out % 64 == K % 4 == 0 else (1, 1)  # side by side, bytes at a time
    packed = packed.reshape(-1, K // size, rows, size).transpose(1, 2).reshape(out, K)
    codes = [(packed << 6 - 2 * j).view(torch.int8) >> 6 for j in range(4)]  # >> keeps the sign
    return torch.stack(codes, dim=2).view(out, 4 * K)[:, :in_features]


def ternary_matmul(x, packed, scale, bias=None):
    """x @ (scale · codes).T + bias from the packed bytes; activations stay floating-point (W2A16).
    x: (..., in), any float dtype; packed: uint8 (out, ceil(in / 4)); scale: float32, (1, 1) or
    (out, 1); bias: (out,) or None. Returns (..., out) in x's dtype, accumulated in float32.
    ValueError: other shapes. For one row of x, reading the weights dominates the time: C (section
    6) adds and subtracts. For many rows, or without C, a dense product multiplies by -1, 0, 1."""
    (out, K), width = packed.shape, x.shape[-1]
    if K != math.ceil(width / 4) or packed.dtype != torch.uint8 or scale.numel() not in (1, out):
        raise ValueError(f"packed {packed.shape} or scale {scale.shape} do not fit {width} inputs")
    y, scale = _product(x.float(), packed), scale.flatten()
    return (y * scale if bias is None else torch.addcmul(bias, y, scale)).type_as(x)


class PackedLinear(nn.Module):
    """A linear layer whose ternary weight is packed, 2 bits each. For inference only."""
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


class HalfHead(nn.Module):
    """The output head of a loaded model: reads the float16 embedding, computes in float32."""
    def __init__(self, weight):
        super().__init__()
        self.weight = weight  # float16 (V, C)

    def forward(self, x):  # (..., C) -> (..., V) float32
        return _product(x.float(), self.weight)


def pack_model(model):
    """Replaces every 2-bit QuantLinear by a PackedLinear, in place; 4-bit ones stay. Returns the
    model, in eval mode, with nothing to train. ValueError: it has no 2-bit QuantLinear."""
    every = model.named_modules(remove_duplicate=False)
    layers = {n: m for n, m in every if isinstance(m, QuantLinear) and m.bits == 2}
    if not layers:
        raise ValueError("there is no 2-bit QuantLinear to pack: quantize_model makes them")
    for name, layer in layers.items():
        codes, scale = ternarize(layer.weight, layer.granularity)
        rest = scale, None if layer.bias is None else layer.bias.detach()
        model.set_submodule(name, PackedLinear(layer.in_features, pack_ternary(codes), *rest))
    return model.requires_grad_(False).eval()


PACKED_FORMAT = "tsld packed 3"  # the layout of section 5; older ones were others


def save_model(path, model):
    """Writes a packed model, whole or not at all: packed weights, float32 scales, biases and norms,
    float16 embeddings and output head, a GPT's config, and a checksum over it all. ValueError:
    nothing is packed, not all quantized layers are, or a value is not finite, in float16 either."""
    layers = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    if not layers or any(isinstance(m, QuantLinear) for m in model.modules()):
        raise ValueError("it takes PackedLinear layers in place of all QuantLinear: see pack_model")
    tensors = {}
    for name, (tensor, dtype) in _stored(model).items():
        tensors[name] = tensor.detach().to("cpu", dtype)
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} has values that are not finite in {dtype}")
    write_file(path, dict(format=PACKED_FORMAT, kind=_kind(model), layers=layers, tensors=tensors))


def _kind(model):
    """A GPT's configuration; of other models the number of heads, which no tensor's shape shows."""
    config = getattr(model, "config", None)
    return asdict(config) if isinstance(model, GPT) else getattr(config, "num_attention_heads", 0)


def _stored(model):
    """Name to tensor, and its dtype in a file, of all that a state dict holds, tied ones once."""
    half = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    half |= {id(getattr(head, "weight", None)) for head in _output_heads(model)}
    kept = model.state_dict().keys()
    both = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n in kept}
    kinds = {n: torch.float16 if id(t) in half else torch.float32 for n, t in both.items()}
    return {n: (t, kinds[n] if t.is_floating_point() else t.dtype) for n, t in both.items()}


def load_model(path, into=None):
    """Reads what save_model wrote, onto the CPU, in eval mode, nothing to train. into: the module
    to fill, full-precision or quantized, if it is not our GPT. Our GPT's embeddings are
    float16; `into` keeps its dtype. CheckpointError: altered, foreign, another model's."""
    content = read_file(path)
    if (form := content.get("format") if isinstance(content, dict) else None) != PACKED_FORMAT:
        raise CheckpointError(f"{path} is not a packed model: {form} is not {PACKED_FORMAT}")
    with refusing(f"{path} is of another model:"):
        kind, layers, tensors = (content[key] for key in ("kind", "layers", "tensors"))
        if into is None and not (isinstance(kind, dict) and kind["n_layer"] < len(tensors)):
            raise ValueError("it is not of our GPT, and needs `into`, a model of its kind")
        with torch.device("meta"):
            model = GPT(GPTConfig(**kind)) if into is None else into
        if (ours := _kind(model)) != kind:
            raise ValueError(f"its configuration, or number of heads, is {kind}, not {ours}")
        packed, expected = {}, {n: (tuple(t.shape), d) for n, (t, d) in _stored(model).items()}
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear) and (name not in layers or module.bits != 2):
                raise ValueError(f"{name} is not ternary in both")
        for name in layers:
            old, _ = model.get_submodule(name), expected.pop(f"{name}.weight")
            out, width = (old.nf, old.nx) if is_conv1d(old) else (old.out_features, old.in_features)
            parts = [tensors.get(f"{name}.{part}") for part in ("packed", "scale", "bias")]
            packed[name] = PackedLinear(width, *parts)
            stored = "channel" if len(parts[1]) > 1 else "tensor"
            scales = out if getattr(old, "granularity", stored) == "channel" else 1
            expected[f"{name}.packed"] = (out, math.ceil(width / 4)), torch.uint8
            expected[f"{name}.scale"] = (scales, 1), torch.float32
        found = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items() if t.device.type == "cpu"}
        for name in sorted(expected.keys() | tensors.keys()):
            if found.get(name) != expected.get(name):
                raise ValueError(f"{name} is {found.get(name)}, not {expected.get(name)}")
        if sum(t.nbytes for t in tensors.values()) > os.path.getsize(path):
            raise ValueError("its tensors are larger than the file")
        unused = any((p.packed >> 1 & ~p.packed & 0x55).any() for p in packed.values())  # code 10
        if unused or not all(t.isfinite().all() for t in tensors.values()):
            raise ValueError("its tensors are not finite, or hold another code than -1, 0 and +1")
    for name, layer in packed.items():
        model.set_submodule(name, layer)
    model.load_state_dict(tensors, strict=False, assign=into is None)  # not strict: tied ones once
    if into is None:
        model.lm_head = HalfHead(model.wte.weight)
    return model.cpu().requires_grad_(False).eval()


def write_file(path, content):
    """torch.save, then the SHA-256 of all of it; under a temporary name, then renamed."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w+b") as file:
        torch.save(content, file)
        file.seek(0)
        file.write(hashlib.file_digest(file, "sha256").digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_file(path):
    """What write_file wrote. CheckpointError: truncated, altered or foreign. Runs no code in it."""
    content = np.memmap(path, mode="r") if os.path.getsize(path) > 32 else np.zeros(32, np.uint8)
    if hashlib.sha256(content[:-32]).digest() != content[-32:].tobytes():
        raise CheckpointError(f"{path} is truncated, altered, or not a file of this program")
    return load_tensors(path)


# ------ 6. The same at less cost ------------------------------------------------------------------
# For GPT-2's vocabulary the logits are by far the largest tensors of a training step. lean_loss
# takes a few rows of them at a time, and the loss's gradient while they are there.
SCRATCH_BYTES = 2**27  # of the float32 logits of one model that are held at once


def lean_loss(name, student_hidden, student_head, teacher_hidden, teacher_head, targets,
              temperature=10.0, gt_weight=0.0):
    """distillation_loss(name, per_token_terms(...)) of logits = hidden @ head.T, a float32 scalar,
    without the (B, T, V) logits. "l2l" looks between the layers, and is not among them. hidden:
    (B, T, C), after the final norm; head: (V, C); targets: int64 (B, T). The teacher's may be None
    for "gt"; no gradient flows into them. ValueError: another name or shape, or no teacher."""
    if name not in LOSSES or name == "l2l":
        raise ValueError(f"lean_loss takes {', '.join(LOSSES)} but l2l, not {name!r}")
    if teacher_hidden is None and name != "gt":
        raise ValueError(f"the loss {name!r} needs a teacher")
    models = student_hidden, student_head, teacher_hidden, teacher_head
    shapes = {(*x.shape[:-1], len(w)) for x, w in (models[:2], models[2:]) if x is not None}
    if shapes != {(*targets.shape, len(student_head))}:
        raise ValueError(f"states or heads are not of targets of shape {tuple(targets.shape)}")
    return _LeanLoss.apply(*models, targets, name, temperature, gt_weight)


class _LeanLoss(torch.autograd.Function):
    """hs (BT, C) and ws (V, C) are the student's hidden and head, in the type that products are
    taken in, ht and wt the teacher's. All losses but L2L have the form Σ_n a_n · kd_n +
    b_n · ce_student_n. With logits z = hs @ ws.T their gradients are
        ∂L/∂z_ni = a_n (P^S_ni - P^T_ni) + b_n (P^S_ni - y_ni)
        ∂L/∂hs = ∂L/∂z @ ws        ∂L/∂ws = ∂L/∂z.T @ hs"""
    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, name, *setting):
        (B, T), kind = targets.shape, hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        models = hidden, head, teacher_hidden, teacher_head
        hs, ws, ht, wt = (None if x is None else x.flatten(0, -2).to(dtype) for x in models)
        y = targets.reshape(-1, 1)  # (BT, 1)
        rows = max(1, SCRATCH_BYTES // (4 * len(ws)))
        rows = min(B * T, rows - rows % T or rows)  # whole sequences, where one fits
        pieces = [slice(begin, begin + rows) for begin in range(0, B * T, rows)]
        ce_student, ce_teacher, kd = torch.zeros(3, B * T, device=hs.device)
        grad_hs, grad_ws = (torch.zeros_like(x, dtype=torch.float32) for x in (hs, ws))
        scratch = torch.empty(1 if ht is None else 2, rows, len(ws), device=hs.device)

        def log_probabilities(hidden, head, z, ce, piece):  # -> (rows, V), and fills in ce
            z = z[: len(hidden[piece])]  # memory that is used again is faster than new memory
            z.copy_(torch.mm(hidden[piece], head.t(), out=z if dtype == torch.float32 else None))
            torch.log_softmax(z, dim=-1, out=z)
            ce[piece] = -z.gather(1, y[piece])[:, 0]
            return z

        with torch.autocast(kind, enabled=False):
            if ht is not None and rows < T:  # a token's weight depends on its whole sequence
                for piece in pieces:
                    log_probabilities(ht, wt, scratch[1], ce_teacher, piece)
            for piece in pieces:
                log_p = log_probabilities(hs, ws, scratch[0], ce_student, piece)
                if ht is not None:
                    P = log_probabilities(ht, wt, scratch[1], ce_teacher, piece)
                    P = torch.softmax(P, dim=-1, out=P)  # exp, but faster on CPUs
                    kd[piece] = -torch.einsum("ni,ni->n", P, log_p)
                with torch.enable_grad():  # a = ∂L/∂kd, b = ∂L/∂ce_student: L is linear in both
                    x = torch.zeros(2, B, T, device=hs.device, requires_grad=True)
                    terms = Terms(x[1], ce_teacher.view(B, T), x[0])
                    (ab,) = torch.autograd.grad(distillation_loss(name, terms, *setting), x)
                a, b = ab.view(2, -1, 1)[:, piece]  # each (rows, 1)
                grad_z = torch.softmax(log_p, dim=-1, out=log_p).mul_(a + b)
                if ht is not None:
                    grad_z.addcmul_(P, a, value=-1)
                grad_z = grad_z.scatter_add_(1, y[piece], -b).to(dtype)
                grad_hs[piece] = grad_z @ ws
                grad_ws += grad_z.t() @ hs[piece]
        ctx.gradients = grad_hs.view(hidden.shape).to(hidden.dtype), grad_ws.to(head.dtype)
        terms = Terms(*(x.view(B, T) for x in (ce_student, ce_teacher, kd)))
        return distillation_loss(name, terms, *setting)

    @staticmethod
    def backward(ctx, grad_loss):
        return *(x * grad_loss for x in ctx.gradients), *[None] * 6


# The product in C looks sums up. Two codes (CODES = 2) make an index below 16, into a table of sums
# that two activations can give: 0, x_0, (unused), -x_0, x_1, x_0 + x_1, ... A register of 512 bits
# holds it, and one instruction selects for 16 rows at once. A narrower register (CODES = 1) holds
# what one activation gives, 0, x, 0, -x over and over; the higher bits of an index change nothing.
C_SOURCE = """
#include <math.h>
enum { W = __BIGGEST_ALIGNMENT__ > 32 ? 16 : __BIGGEST_ALIGNMENT__ > 16 ? 8 : 4 };
enum { CODES = W == 16 ? 2 : 1, R = 64 / W };    /* in an index; registers that hold 64 rows */
typedef float floats __attribute__((vector_size(4 * W)));               /* a register */
typedef unsigned words __attribute__((vector_size(4 * W), aligned(1)));
static float of_half(short half) {      /* its bits at a float's places are 2^-112 of its value */
    union { unsigned bits; float value; } v = {(unsigned)half << 13 & 0x8fffe000};
    return v.value * 0x1p112f;
}
void half_product(const float *x, const short *w, float *y, long out, long in) {
    #pragma omp parallel for
    for (long r = 0; r < out; r++) {
        float sum = 0;
        #pragma omp simd reduction(+:sum)
        for (long i = 0; i < in; i++) sum += of_half(w[r * in + i]) * x[i];
        y[r] = sum;
    }
}
void attention(float *qkv, float *cache, float *y, long n, long H, long S, long d) {
    #pragma omp parallel for
    for (long h = 0; h < H; h++) {
        float *q = qkv + h * d, *mean = y + h * d, *k = cache + h * S * d, *v = k + H * S * d;
        float most = -INFINITY, total = 0;  /* highest score so far; sum of exp(score - most) */
        for (long i = 0; i < d; i++) k[n * d + i] = q[H * d + i], v[n * d + i] = q[2 * H * d + i];
        for (long t = 0; t <= n; t++, k += d, v += d) {
            float score = 0;
            #pragma omp simd reduction(+:score)
            for (long i = 0; i < d; i++) score += q[i] * k[i];
            if ((score /= sqrtf(d)) > most) total *= expf(most - score), most = score;
            float weight = expf(score - most), share = weight / (total += weight);
            for (long i = 0; i < d; i++) mean[i] += share * (v[i] - mean[i]);   /* from 0 on */
        }
    }
}
void ternary_product(const float *x, const words *packed, float *y, long out, long in) {
    words id; for (int e = 0; e < W; e++) id[e] = e;
    #pragma omp parallel
    {
        floats sums[in / CODES], *sum = sums;                    /* that codes 0 to 3 make */
        for (long i = 0; i < in; i += CODES, sum++) {
            *sum = __builtin_shuffle((floats){0, x[i], 0, -x[i]}, id & 3);
            if (CODES == 2) *sum += __builtin_shuffle((floats){0, x[i + 1], 0, -x[i + 1]}, id >> 2);
        }
        #pragma omp for
        for (long begin = 0; begin < out; begin += 64) {         /* rows side by side */
            const words *word = packed + begin / 64 * (in / 16) * R;    /* in / 16 words a row */
            floats y64[R] = {0};
            for (sum = sums; sum < sums + in / CODES; word += R) {
                #pragma GCC unroll 16
                for (int j = 0; j < 32; j += 2 * CODES, sum++)   /* bits of a word */
                    for (int r = 0; r < R; r++) y64[r] += __builtin_shuffle(*sum, word[r] >> j);
                for (int r = 0; r < R; r++) __builtin_prefetch(word + 9 * R + r);
            }
            for (int e = 0; e < 64; e++) y[begin + e] = y64[e / W][e % W];
        }
    }
}
"""


@cache
def c_library():
    """C_SOURCE, compiled in a fifth of a second; None, and one line on stderr, where that fails."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = "-O3 -march=native -fopenmp -fPIC -shared -x c - -lm -o"
            command = f"{os.environ.get('CC', 'cc')} {flags}".split() + [f"{folder}/tsld.so"]
            subprocess.run(command, input=C_SOURCE.encode(), capture_output=True, check=True)
            library = ctypes.CDLL(command[-1])
    except (OSError, subprocess.SubprocessError) as error:
        return print(f"tsld: no C ({error}): generating is slower", file=sys.stderr)
    for name, sizes in {"half_product": 2, "ternary_product": 2, "attention": 4}.items():
        getattr(library, name).argtypes = 3 * [ctypes.c_void_p] + sizes * [ctypes.c_long]
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # the child has one
    return library


def _product(x, weight):
    """x (..., in) @ weight.T, float32 (..., out); weight: packed codes, or numbers (out, in). In C:
    one row of x, on the CPU, no gradient; packed rows side by side, or a float16 weight."""
    (out, n), width, packed = weight.shape, x.shape[-1], weight.dtype == torch.uint8
    ok = {torch.uint8: width == 4 * n < 2**15 and out % 64 == n % 4 == 0, torch.float16: width == n}
    cpu = x.is_cpu and weight.is_cpu and weight.is_contiguous() and not x.requires_grad
    if ok.get(weight.dtype) and cpu and x.numel() == width and c_library():  # sums on the stack
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], out)
        product = c_library().ternary_product if packed else c_library().half_product
        product(x.data_ptr(), weight.data_ptr(), y.data_ptr(), out, width)
        return y
    parts = (unpack_ternary(weight, width) if packed else weight).split(1024)  # outputs at a time
    return torch.cat([x @ part.float().t() for part in parts], dim=-1)
