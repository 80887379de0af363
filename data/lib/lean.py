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

kd_n and ce_student_n are the cross-entropies of P^S_n = softmax(z_n) against P^T_n and
against the true token y_n. With the logits z = h Wᵀ, hidden states h and head W,

    ∂L/∂z_ni = a_n (P^S_ni - P^T_ni) + b_n (P^S_ni - y_ni)                      (N, V)
    ∂L/∂h = ∂L/∂z W  (N, C)             ∂L/∂W = (∂L/∂z)ᵀ h  (V, C)
"""

from functools import partial

import torch

from tsld import LOSSES, Terms, distillation_loss

# A loss that is not of the form above would get wrong gradients: it is left out here.
LEAN_LOSSES = [name for name in LOSSES if name != "l2l"]
SCRATCH_BYTES = 2**27  # of the float32 logits of one model that are held at once


def forward_backward(student, teacher, ids, targets, config):
    """Does what tsld.forward_backward does, through lean_loss. The models are modules
    with hidden(ids) and lm_head whose logits are hidden @ lm_head.weight.T.

    ids, targets: int64 (B, T), taken in config.accumulate parts, one after the other.
    Adds the gradient of the batch's mean loss to the student's .grad, and returns that
    loss, a detached 0-d tensor in nats. Raises ValueError if lean_loss does.
    """
    dtype = getattr(torch, config.dtype)
    mixed = dtype != torch.float32
    batch_loss = torch.zeros((), device=ids.device)

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
            teacher_output = (teacher.hidden(ids), teacher.lm_head.weight)

    student_output = (student.hidden(ids), student.lm_head.weight)
    setting = (config.temperature, config.gt_weight)
    return lean_loss(config.loss, *student_output, *teacher_output, targets, *setting)


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
    float32 scalar in nats. Under autocast the products are taken in its type.

    hidden: (B, T, C), after the final norm; head: (V, C); targets: int64 (B, T). The
    teacher's get no gradient, may have another C, and are not needed for "gt". Raises
    ValueError if there is no such loss, no teacher for it, or the shapes do not fit.
    """
    if name not in LEAN_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LEAN_LOSSES)}, not {name!r}")
    if teacher_hidden is None and name != "gt":
        raise ValueError(f"the loss {name!r} needs a teacher")

    teacher_tensors = None
    if teacher_hidden is not None:
        teacher_tensors = (teacher_hidden, teacher_head)

    setting = {"temperature": temperature, "gt_weight": gt_weight}
    loss_of = partial(distillation_loss, name, **setting)  # of the terms
    student_tensors = (student_hidden, student_head)
    return _LeanLoss.apply(*student_tensors, teacher_tensors, targets, loss_of)


class _LeanLoss(torch.autograd.Function):
    """Computes the gradients, by the formulas above, together with the loss."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_tensors, targets, loss_of):
        B, T = targets.shape
        device = targets.device
        y = targets.reshape(-1, 1)  # (N, 1)

        # As many rows at a time as fit the scratch memory, whole sequences if one does.
        rows = max(1, SCRATCH_BYTES // (4 * len(head)))
        if rows >= T:
            rows -= rows % T
        rows = min(rows, B * T)
        pieces = [slice(begin, begin + rows) for begin in range(0, B * T, rows)]

        dtype = head.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        logits_shape = (B, T, len(head))
        student = _Output(hidden, head, logits_shape, dtype, rows)
        teacher = None
        if teacher_tensors is not None:
            teacher = _Output(*teacher_tensors, logits_shape, dtype, rows)

        # What the pieces fill in, part by part.
        terms = Terms(*torch.zeros(3, B, T, device=device))
        ce_student, ce_teacher, kd = (term.view(-1) for term in terms)  # the same, (N,)
        grad_hidden = torch.zeros_like(student.hidden)  # (N, C)
        grad_head = torch.zeros_like(student.head, dtype=torch.float32)  # (V, C)

        with torch.autocast(device.type, enabled=False):
            # A token's weight depends on its whole sequence. Where a piece is less than
            # that, the teacher goes over all tokens once before.
            if teacher is not None and rows < T:
                for piece in pieces:
                    log_p = teacher.log_probabilities(piece)
                    ce_teacher[piece] = -log_p.gather(1, y[piece])[:, 0]

            for piece in pieces:
                # The terms of these rows.
                log_p = student.log_probabilities(piece)  # (rows, V)
                ce_student[piece] = -log_p.gather(1, y[piece])[:, 0]
                if teacher is not None:
                    log_p_teacher = teacher.log_probabilities(piece)  # (rows, V)
                    ce_teacher[piece] = -log_p_teacher.gather(1, y[piece])[:, 0]

                    # A softmax of log-probabilities is their exp, but faster on CPUs.
                    p_teacher = torch.softmax(log_p_teacher, dim=-1, out=log_p_teacher)
                    kd[piece] = -torch.einsum("ni,ni->n", p_teacher, log_p)

                # ∂L/∂z = (a + b) P^S - a P^T - b y, in the memory of log P^S.
                a, b = _token_weights(loss_of, terms.ce_teacher)  # each (N, 1)

                grad_logits = torch.softmax(log_p, dim=-1, out=log_p)
                grad_logits.mul_(a[piece] + b[piece])
                if teacher is not None:
                    grad_logits.addcmul_(p_teacher, a[piece], value=-1)
                grad_logits.scatter_add_(1, y[piece], -b[piece])

                # ∂L/∂h of these rows, and what they add to ∂L/∂W.
                grad_logits = grad_logits.to(dtype)
                grad_hidden[piece] = grad_logits @ student.head
                grad_head += grad_logits.t() @ student.hidden[piece]

        grad_hidden = grad_hidden.view(hidden.shape)
        ctx.gradients = (grad_hidden.to(hidden.dtype), grad_head.to(head.dtype))
        return loss_of(terms)

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_head = ctx.gradients
        return grad_hidden * grad_loss, grad_head * grad_loss, None, None, None


def _token_weights(loss_of, ce_teacher):
    """a = ∂L/∂kd and b = ∂L/∂ce_student, each (N, 1). The loss is linear in both terms,
    so that its gradient at zero is its gradient everywhere."""
    with torch.enable_grad():
        kd = torch.zeros_like(ce_teacher, requires_grad=True)
        ce_student = torch.zeros_like(ce_teacher, requires_grad=True)
        loss = loss_of(Terms(ce_student, ce_teacher, kd))
    weights = torch.autograd.grad(loss, (kd, ce_student), materialize_grads=True)
    return [weight.view(-1, 1) for weight in weights]


class _Output:
    """The last product of one model, some rows at a time."""

    def __init__(self, hidden, head, logits_shape, dtype, rows):
        shape = (*hidden.shape[:-1], len(head))
        if shape != logits_shape:
            raise ValueError(f"the logits' shape is {shape}, not {logits_shape}")

        self.hidden = hidden.flatten(0, 1).to(dtype)  # (N, C)
        self.head = head.to(dtype)  # (V, C)
        self.scratch = torch.empty(rows, len(head), device=head.device)

    def log_probabilities(self, piece):
        """log softmax(hidden @ head.T) of some rows, float32 (rows, V). They last until
        the next call: memory that is used again is faster than new memory."""
        hidden = self.hidden[piece]
        logits = self.scratch[: len(hidden)]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, self.head.t(), out=logits)
        else:
            logits.copy_(hidden @ self.head.t())
        return torch.log_softmax(logits, dim=-1, out=logits)
