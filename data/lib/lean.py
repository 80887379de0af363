"""The losses without (B, T, V) logits: the same numbers and gradients, less memory.

For GPT-2's vocabulary the logits are by far the largest tensors of a training step:
those of 4 x 512 tokens take 412 MB in float32, as much as their log-probabilities, and
as their gradient. So the last product, hidden @ head.T, and the loss on it are one
function here. It takes a few rows (a row is a token) at a time, adds up what they
contribute to the loss and to its gradient, and then uses their memory again.

All losses but L2L, which compares what lies between the layers, are

    L = Σ_n  a_n kd_n + b_n ce_student_n            over the N = B T tokens of a batch

            gt      logit            logit_gt    tsld
    a_n     0       1 / N            1 / N       token_scale_n / B
    b_n     1 / N   gt_weight / N    1 / N       gt_weight / N

A token whose target is -100 does not count: its a_n and b_n are 0, the softmax of the
token scale leaves it out, N is the number of tokens that count, and B is the number of
sequences that have one.

kd_n and ce_student_n are the cross-entropies of P^S_n = softmax(z_n) against P^T_n and
against the true token y_n. With the logits z = h Wᵀ, hidden states h and head W,

    ∂L/∂z_ni = a_n (P^S_ni - P^T_ni) + b_n (P^S_ni - y_ni)                      (N, V)
    ∂L/∂h = ∂L/∂z W  (N, C)             ∂L/∂W = (∂L/∂z)ᵀ h  (V, C)

A logit of -inf, as of a vocabulary with a mask, is no product of finite numbers and
cannot occur here.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from tsld import LOSSES, Head, check_ids, token_scale

# A loss that is not of the form above would get wrong gradients: it is left out here.
LEAN_LOSSES = [name for name in LOSSES if name != "l2l"]
PLAIN_HEADS = (nn.Linear, Head)
IGNORED = -100  # the target of a token that does not count
SCRATCH_BYTES = 2**27  # of the float32 logits of one model that are held at once


def backward(student, teacher, ids, targets, config):
    """Does what tsld.backward does, through lean_loss. The models are modules
    with hidden(ids) and lm_head whose logits are hidden @ lm_head.weight.T.

    ids, targets: int64 (B, T), taken in config.accumulate parts, one after the other.
    Adds the gradient of the mean of the parts' losses to the student's .grad, and
    returns that mean, a detached 0-d tensor in nats. Raises ValueError if lean_loss
    does, or if a head does more than multiply.
    """
    dtype = getattr(torch, config.dtype)
    mixed = dtype != torch.float32
    batch_loss = torch.zeros((), dtype=torch.float32, device=ids.device)

    parts = zip(ids.chunk(config.accumulate), targets.chunk(config.accumulate))
    for part_ids, part_targets in parts:
        with torch.autocast(ids.device.type, dtype, enabled=mixed):
            loss = training_loss(student, teacher, part_ids, part_targets, config)

        share = loss / config.accumulate
        share.backward()
        batch_loss += share.detach()
    return batch_loss


def training_loss(student, teacher, ids, targets, config):
    """config.loss of ids and targets (B, T); "gt" needs no teacher."""
    teacher_output = (None, None)
    if teacher is not None and config.loss != "gt":
        with torch.no_grad():
            teacher_output = hidden_and_head(teacher, ids)

    student_output = hidden_and_head(student, ids)
    setting = (config.temperature, config.gt_weight)
    return lean_loss(config.loss, *student_output, *teacher_output, targets, *setting)


def takes(model):
    """Whether logits can be made of its hidden states by lm_head.weight alone."""
    head = getattr(model, "lm_head", None)
    if not hasattr(model, "hidden") or type(head) not in PLAIN_HEADS:
        return False
    return head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)


def hidden_and_head(model, ids):
    """(B, T, C) and (V, C). Raises ValueError if the lean loss cannot be of the
    model."""
    if not takes(model):
        raise ValueError(
            "the lean loss needs hidden(ids) and an lm_head that is an nn.Linear "
            f"without bias and hooks, which {type(model).__name__} lacks"
        )
    return model.hidden(ids), model.lm_head.weight


def lean_loss(
    name,
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    targets,
    temperature=10.0,
    gt_weight=0.0,
):
    """distillation_loss(name, per_token_terms(...), ...) of logits = hidden @ head.T, a
    float32 scalar in nats. Under autocast the products are taken in its type. It has a
    first derivative alone.

    hidden: (B, T, C), after the final norm; head: (V, C); targets: int64 (B, T). The
    teacher's get no gradient, may have another C, and are not needed for "gt". Raises
    ValueError if there is no such loss, no teacher for it, or the shapes do not fit;
    and on the CPU for a target out of range, where a GPU would have to be waited for.
    """
    if name not in LEAN_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LEAN_LOSSES)}, not {name!r}")
    if teacher_hidden is None and name != "gt":
        raise ValueError(f"the loss {name!r} needs a teacher")
    if targets.dim() != 2 or 0 in targets.shape:
        shape = tuple(targets.shape)
        raise ValueError(f"the targets must be (B, T) and not empty, not {shape}")
    check_ids(targets.masked_fill(targets == IGNORED, 0), len(student_head))

    teacher_tensors = None
    check_output("student", student_hidden, student_head, targets)
    if teacher_hidden is not None:
        teacher_tensors = (teacher_hidden, teacher_head)
        check_output("teacher", *teacher_tensors, targets)
        if len(teacher_head) != len(student_head):
            counts = (
                f"{len(teacher_head)} tokens, and the student's {len(student_head)}"
            )
            raise ValueError(f"the teacher's vocabulary has {counts}")

    setting = {"temperature": temperature, "gt_weight": gt_weight}
    weights_of = partial(token_weights, name, targets != IGNORED, **setting)
    student_tensors = (student_hidden, student_head)
    return _LeanLoss.apply(*student_tensors, teacher_tensors, targets, weights_of)


def check_output(model, hidden, head, targets):
    """Raises ValueError, which names the model, if its hidden states and its head make
    no logits for these targets."""
    if hidden.shape[:-1] != targets.shape:
        shapes = f"{tuple(hidden.shape)}, and the targets {tuple(targets.shape)}"
        raise ValueError(f"the {model}'s hidden states have shape {shapes}")
    if hidden.shape[-1] != head.shape[-1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(head.shape)}"
        raise ValueError(
            f"the {model}'s hidden states and head are of other widths: {shapes}"
        )


def token_weights(name, counts, ce_teacher, temperature, gt_weight):
    """a and b of the table above, each (B, T). counts: bool (B, T)."""
    sequences = counts.any(dim=1).sum().clamp(min=1)
    mean = counts.float() / counts.sum().clamp(min=1)  # 1 / N, or 0

    if name == "gt":
        return torch.zeros_like(mean), mean
    if name == "logit":
        return mean, gt_weight * mean
    if name == "logit_gt":
        return mean, mean

    scale = token_scale(ce_teacher.masked_fill(~counts, -torch.inf), temperature)
    return scale / sequences, gt_weight * mean


class _LeanLoss(torch.autograd.Function):
    """Computes the gradients, by the formulas above, together with the loss."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_tensors, targets, weights_of):
        B, T = targets.shape
        V = len(head)
        device = targets.device

        # As many rows at a time as fit the scratch memory, whole sequences if one does.
        rows = max(1, SCRATCH_BYTES // (4 * V))
        if rows >= T:
            rows -= rows % T
        rows = min(rows, B * T)

        dtype = head.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        student = _Output(hidden, head, dtype, rows)
        teacher = None
        if teacher_tensors is not None:
            teacher = _Output(*teacher_tensors, dtype, rows)

        with torch.autocast(device.type, enabled=False):
            loss, *ctx.gradients = _loss_and_gradients(
                student, teacher, targets, weights_of, rows
            )
        ctx.shape = hidden.shape
        ctx.dtypes = (hidden.dtype, head.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # With create_graph the gradients below would silently be taken for constants.
        if torch.is_grad_enabled():
            raise ValueError(
                "the lean loss has no second derivative: backward(create_graph=True) "
                "takes tsld.distillation_loss"
            )

        # In float32 until the end: a loss that is scaled for float16 is scaled here.
        grad_hidden, grad_head = (grad * grad_loss for grad in ctx.gradients)
        hidden_dtype, head_dtype = ctx.dtypes
        grad_hidden = grad_hidden.view(ctx.shape).to(hidden_dtype)
        return grad_hidden, grad_head.to(head_dtype), None, None, None


def _loss_and_gradients(student, teacher, targets, weights_of, rows):
    """The loss, ∂L/∂h (N, C) and ∂L/∂W (V, C), all float32, `rows` rows at a time."""
    N = targets.numel()
    pieces = [slice(begin, begin + rows) for begin in range(0, N, rows)]
    y = targets.masked_fill(targets == IGNORED, 0).view(N, 1)
    hidden, head = student.factors_of_gradient()

    # What the pieces fill in, part by part.
    terms = torch.zeros(3, N, dtype=torch.float32, device=targets.device)
    kd, ce_student, ce_teacher = terms
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    grad_head = torch.zeros_like(head, dtype=torch.float32)

    # A token's weight depends on its whole sequence. Where a piece is less than that,
    # the teacher goes over all tokens once before.
    if teacher is not None and rows < targets.shape[1]:
        for piece in pieces:
            log_p = teacher.log_probabilities(piece)
            ce_teacher[piece] = -log_p.gather(1, y[piece])[:, 0]

    for piece in pieces:
        # The terms of these rows.
        log_p = student.log_probabilities(piece)  # (rows, V)
        ce_student[piece] = -log_p.gather(1, y[piece])[:, 0]
        p_teacher = None
        if teacher is not None:
            log_p_teacher = teacher.log_probabilities(piece)  # (rows, V)
            ce_teacher[piece] = -log_p_teacher.gather(1, y[piece])[:, 0]

            # A softmax of log-probabilities is their exp, but faster on CPUs.
            p_teacher = torch.softmax(log_p_teacher, dim=-1, out=log_p_teacher)
            kd[piece] = -torch.einsum("ni,ni->n", p_teacher, log_p)

        # ∂L/∂z and ∂L/∂h of these rows, and what they add to ∂L/∂W.
        a, b = (w.view(N, 1) for w in weights_of(ce_teacher.view_as(targets)))
        grad_logits = _logits_gradient(log_p, p_teacher, a[piece], b[piece], y[piece])
        grad_logits = grad_logits.to(head.dtype)
        grad_hidden[piece] = grad_logits @ head
        grad_head += grad_logits.t() @ hidden[piece]

    loss = (a[:, 0] * kd + b[:, 0] * ce_student).sum()
    return loss, grad_hidden, grad_head[: student.V]


def _logits_gradient(log_p, p_teacher, a, b, y):
    """∂L/∂z = (a + b) P^S - a P^T - b y of some rows, in the memory of log P^S."""
    gradient = torch.softmax(log_p, dim=-1, out=log_p)
    gradient.mul_(a + b)
    if p_teacher is not None:
        gradient.addcmul_(p_teacher, a, value=-1)
    return gradient.scatter_add_(1, y, -b)


def columns_of(V, device):
    """Of the logits. Rows whose length no power of two divides, as 50257, are slow to
    multiply on a GPU. There the last columns stand for no token."""
    return 64 * math.ceil(V / 64) if device.type == "cuda" else V


class _Output:
    """The last product of one model, some rows at a time."""

    def __init__(self, hidden, head, dtype, rows):
        self.V = len(head)
        columns = columns_of(self.V, head.device)
        self.hidden = hidden.flatten(0, 1).to(dtype)  # (N, C)
        self.head = head.to(dtype)  # (columns, C)
        if columns > self.V:
            self.head = F.pad(self.head, (0, 0, 0, columns - self.V))
        self.scratch = torch.empty(
            rows, columns, dtype=torch.float32, device=head.device
        )

    def factors_of_gradient(self):
        """hidden (N, C) and head (columns, C) in the type that the gradient's products
        have. The gradient of a mean over many tokens is too small for float16."""
        dtype = self.head.dtype
        if dtype == torch.float16:
            dtype = torch.float32
        return self.hidden.to(dtype), self.head.to(dtype)

    def log_probabilities(self, piece):
        """log softmax(hidden @ head.T) of some rows, float32 (rows, columns). They last
        until the next call: memory that is used again is faster than new memory."""
        hidden = self.hidden[piece]
        logits = self.scratch[: len(hidden)]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, self.head.t(), out=logits)
        else:
            logits.copy_(hidden @ self.head.t())
        logits[:, self.V :] = -1e4  # of probability 0
        return torch.log_softmax(logits, dim=-1, out=logits)
