"""The losses without (B, T, V) logits: data/lib/lean.py.

The oracle is the definition of each loss in float64, on logits that are all there, and
autograd's gradient of it.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tsld
from data.lib import lean
from data.tests.helpers import MICRO, micro_gpt, micro_ids, randn
from tsld import TrainConfig

LEAN_LOSSES = ("gt", "logit", "logit_gt", "tsld")


def reference_loss(name, student_logits, teacher_logits, targets, temperature, weight):
    """The loss of float64 logits (B, T, V), by its definition."""
    log_p = student_logits.log_softmax(-1)
    ce_student = -log_p.gather(-1, targets[..., None])[..., 0]  # (B, T)
    if name == "gt":
        return ce_student.mean()

    p_teacher = teacher_logits.detach().softmax(-1)
    kd = -(p_teacher * log_p).sum(-1)  # (B, T)
    if name == "logit":
        return kd.mean() + weight * ce_student.mean()
    if name == "logit_gt":
        return kd.mean() + ce_student.mean()

    # TSLD, one sequence after the other. exp(ce / τ) is P^T[y] to the power of -1 / τ.
    total = weight * ce_student.mean()
    for p, y, kd_of_sequence in zip(p_teacher, targets, kd):
        scale = p.gather(-1, y[:, None])[:, 0] ** (-1 / temperature)
        total = total + (scale / scale.sum() * kd_of_sequence).sum() / len(targets)
    return total


def random_targets(B, T, V):
    return torch.from_numpy(np.random.default_rng(0).integers(V, size=(B, T)))


def example(B=3, T=5, C=4, V=7):
    """hidden (B, T, C) and head (V, C) of a student, those of a teacher, targets."""
    student = (randn(B, T, C, seed=1), randn(V, C, seed=2))
    teacher = (randn(B, T, C + 1, seed=3), randn(V, C + 1, seed=4))
    return student, teacher, random_targets(B, T, V)


def set_rows(monkeypatch, rows, V):
    """Makes the scratch memory that of so many rows of logits."""
    monkeypatch.setattr(lean, "SCRATCH_BYTES", 4 * V * rows)


def check_lean_loss(name, shape=(3, 5, 4, 7), tied=False, with_teacher=True):
    """lean_loss and its gradients against the reference."""
    student, teacher, targets = example(*shape)
    inner = student[0].requires_grad_()
    head = student[1].requires_grad_()
    # Where embedding and head are tied, the hidden states depend on the head as well.
    hidden = inner + head[targets.flip(0)] if tied else 1 * inner

    logits = hidden.double() @ head.double().T
    teacher_logits = teacher[0].double() @ teacher[1].double().T
    exact = reference_loss(name, logits, teacher_logits, targets, 2.0, 0.3)
    gradients = torch.autograd.grad(3 * exact, (inner, head), retain_graph=True)

    for tensor in teacher:
        tensor.requires_grad_()
    teacher_output = teacher if with_teacher else (None, None)
    loss = lean.lean_loss(name, hidden, head, *teacher_output, targets, 2.0, 0.3)

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)

    (3 * loss).backward()

    torch.testing.assert_close(inner.grad, gradients[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.grad, gradients[1], rtol=1e-5, atol=1e-5)
    assert all(tensor.grad is None for tensor in teacher)


# --------------------------------------------------------------------------------------
# lean_loss


def test_every_loss_but_l2l_is_lean():
    assert tuple(lean.LEAN_LOSSES) == LEAN_LOSSES


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_the_lean_loss_and_its_gradients_are_those_of_full_logits(name, monkeypatch):
    set_rows(monkeypatch, rows=7, V=7)  # one sequence of 5 at a time
    check_lean_loss(name)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 10, 14, 1000])
@pytest.mark.parametrize("name", ["tsld", "logit_gt"])
def test_the_size_of_the_pieces_changes_nothing(name, rows, monkeypatch):
    """Sequences of 5 tokens: parts of one, one, several, and all three."""
    set_rows(monkeypatch, rows, V=7)
    check_lean_loss(name)


def test_pieces_smaller_than_one_row_of_logits_are_one_row(monkeypatch):
    monkeypatch.setattr(lean, "SCRATCH_BYTES", 1)
    check_lean_loss("tsld")


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 8, 3, 11)], ids=str)
@pytest.mark.parametrize("rows", [3, 10])
def test_the_shape_of_the_batch_changes_nothing(shape, rows, monkeypatch):
    set_rows(monkeypatch, rows, V=shape[-1])
    check_lean_loss("tsld", shape)


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_hidden_states_may_depend_on_the_head(name, monkeypatch):
    set_rows(monkeypatch, rows=7, V=7)
    check_lean_loss(name, tied=True)


@pytest.mark.parametrize("rows", [2, 7, 1000])
def test_the_ground_truth_alone_needs_no_teacher(rows, monkeypatch):
    set_rows(monkeypatch, rows, V=7)
    check_lean_loss("gt", tied=True, with_teacher=False)


def test_the_defaults_are_the_papers_temperature_and_no_labels():
    student, teacher, targets = example()
    logits = [hidden.double() @ head.double().T for hidden, head in (student, teacher)]
    for name in ("tsld", "logit"):
        exact = reference_loss(name, *logits, targets, 10.0, 0.0)
        loss = lean.lean_loss(name, *student, *teacher, targets)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


class Watched(TorchDispatchMode):
    """Notes of what size and of which types the tensors are that operations make."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if torch.is_tensor(made):
            self.largest = max(self.largest, made.numel())
            self.dtypes.add(made.dtype)
        return made


def test_the_lean_loss_never_holds_all_logits(monkeypatch):
    set_rows(monkeypatch, rows=6, V=50)
    student, teacher, targets = example(2, 8, 3, 50)
    student[0].requires_grad_()
    with Watched() as watched:
        lean.lean_loss("tsld", *student, *teacher, targets).backward()

    assert watched.largest == 6 * 50


def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32(monkeypatch):
    set_rows(monkeypatch, rows=1, V=50)  # so that many sums are rounded, if any is
    student, teacher, targets = example(4, 16, 32, 50)
    hidden, head = (tensor.requires_grad_() for tensor in student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lean.lean_loss("tsld", hidden, head, *teacher, targets)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == head.grad.dtype == torch.float32

    # By hand: factors and logits are rounded to bfloat16, and nothing else.
    rounded = [t.detach().bfloat16().float() for t in (hidden, head, *teacher)]
    logits = (rounded[0] @ rounded[1].T).bfloat16().double().requires_grad_()
    teacher_logits = (rounded[2] @ rounded[3].T).bfloat16().double()
    exact = reference_loss("tsld", logits, teacher_logits, targets, 10.0, 0.0)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)

    # The gradient's products are rounded too. Were their sum, it would be 0.8 % off.
    exact.backward()
    gradient = logits.grad.flatten(0, 1).T @ rounded[0].flatten(0, 1).double()
    error = (head.grad - gradient).abs().max() / gradient.abs().max()
    assert 1e-5 < error < 5e-3


@pytest.mark.parametrize("name", ["mse", "l2l"])
def test_a_loss_that_is_not_lean_is_refused_by_name(name):
    student, teacher, targets = example()
    with pytest.raises(ValueError, match=f"gt, logit, logit_gt, tsld, not '{name}'"):
        lean.lean_loss(name, *student, *teacher, targets)


@pytest.mark.parametrize("name", ["logit", "logit_gt", "tsld"])
def test_a_loss_without_its_teacher_is_refused(name):
    student, _, targets = example()
    with pytest.raises(ValueError, match=f"'{name}' needs a teacher"):
        lean.lean_loss(name, *student, None, None, targets)


@pytest.mark.parametrize(
    "student, teacher, targets",  # many of them would broadcast
    [
        ((2, 3), (2, 3), (2, 2)),
        ((2, 3), (2, 3), (1, 3)),
        ((2, 3), (1, 3), (2, 3)),
        ((1, 3), (2, 3), (2, 3)),
        ((2, 3), (2, 4), (2, 3)),
        ((2, 4), (2, 4), (2, 3)),
        ((3, 2), (3, 2), (2, 3)),
        ((2, 4), None, (2, 3)),
        ((1, 3), None, (2, 3)),
    ],
    ids=str,
)
def test_hidden_states_of_other_tokens_than_the_targets_are_refused(
    student, teacher, targets
):
    name = "gt" if teacher is None else "logit"
    student_output = (torch.zeros(*student, 5), torch.eye(5))
    teacher_output = (None, None)
    if teacher is not None:
        teacher_output = (torch.zeros(*teacher, 5), torch.eye(5))
    expected = re.escape(f"not {(*targets, 5)}")
    targets = torch.zeros(targets, dtype=torch.long)

    with pytest.raises(ValueError, match=expected):
        lean.lean_loss(name, *student_output, *teacher_output, targets)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_teacher_of_another_vocabulary_is_refused(size):
    student, _, targets = example(2, 3, 4, 5)
    teacher = (randn(2, 3, 4), randn(size, 4))

    with pytest.raises(ValueError, match=rf"\(2, 3, {size}\), not \(2, 3, 5\)"):
        lean.lean_loss("tsld", *student, *teacher, targets)


def test_a_temperature_of_0_is_refused():
    student, teacher, targets = example()
    with pytest.raises(ValueError, match="above 0, not 0"):
        lean.lean_loss("tsld", *student, *teacher, targets, temperature=0)


# --------------------------------------------------------------------------------------
# forward_backward

BRIEF = TrainConfig(steps=6, batch_size=6, lr=0.01, temperature=2.0, gt_weight=0.25)


def micro_student():
    return tsld.quantize_model(micro_gpt(1))


def micro_batch():
    """ids and targets of 6 sequences."""
    return micro_ids(B=6), micro_ids(B=6, seed=1)


def gradients_of(student):
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_forward_backward_gives_the_loss_and_gradient_of_the_models_logits(
    name, accumulate
):
    teacher = micro_gpt(2)
    ids, targets = micro_batch()
    by_hand = micro_student()
    logits = by_hand(ids).double()
    exact = reference_loss(name, logits, teacher(ids).double(), targets, 2.0, 0.25)
    exact.backward()

    student = micro_student()
    config = replace(BRIEF, loss=name, accumulate=accumulate)
    loss = lean.forward_backward(student, teacher, ids, targets, config)

    assert loss.shape == ()
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(
        gradients_of(student), gradients_of(by_hand), rtol=1e-4, atol=1e-5
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_forward_backward_adds_to_the_gradient_that_is_there():
    student = micro_student()
    config = replace(BRIEF, loss="gt")
    lean.forward_backward(student, None, *micro_batch(), config)
    once = gradients_of(student)
    lean.forward_backward(student, None, *micro_batch(), config)

    torch.testing.assert_close(gradients_of(student), 2 * once)


def test_the_parts_of_a_batch_go_through_the_models_one_after_the_other():
    student = micro_student()
    teacher = micro_gpt(2)
    shapes = []
    for model in (student, teacher):
        block = model.h[0]
        block.register_forward_hook(lambda block, x, y: shapes.append(x[0].shape[0]))
    config = replace(BRIEF, accumulate=3)
    lean.forward_backward(student, teacher, *micro_batch(), config)

    assert shapes == 6 * [2]


def test_the_teacher_keeps_nothing_for_a_backward_pass():
    teacher = micro_gpt(2)
    seen = []
    teacher.ln_f.register_forward_hook(lambda norm, x, y: seen.append(y.requires_grad))
    lean.forward_backward(micro_student(), teacher, *micro_batch(), BRIEF)
    assert seen == [False]


def test_the_ground_truth_does_not_ask_the_teacher():
    teacher = micro_gpt(2)
    teacher.forward = None
    teacher.hidden = None
    config = replace(BRIEF, loss="gt")
    lean.forward_backward(micro_student(), teacher, *micro_batch(), config)


def test_forward_backward_without_the_teacher_that_a_loss_needs_is_refused():
    config = replace(BRIEF, loss="tsld")
    with pytest.raises(ValueError, match="'tsld' needs a teacher"):
        lean.forward_backward(micro_student(), None, *micro_batch(), config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_backward_multiplies_in_the_dtype_of_the_configuration(dtype):
    student = micro_student()
    teacher = micro_gpt(2)
    seen = set()
    for layer in (student.h[0].mlp.c_fc, teacher.h[0].mlp.c_fc):
        layer.register_forward_hook(lambda layer, x, y: seen.add(y.dtype))
    config = replace(BRIEF, dtype=dtype)
    loss = lean.forward_backward(student, teacher, *micro_batch(), config)

    assert seen == {getattr(torch, dtype)}
    assert loss.dtype == gradients_of(student).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


@pytest.mark.parametrize("name", LEAN_LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_float64_which_apples_gpus_lack(name, dtype):
    config = replace(BRIEF, loss=name, dtype=dtype, accumulate=2)
    with Watched() as watched:
        lean.forward_backward(micro_student(), micro_gpt(2), *micro_batch(), config)

    assert torch.float32 in watched.dtypes
    assert torch.float64 not in watched.dtypes


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_training_through_the_lean_loss_is_training_through_full_logits(name):
    text = micro_ids(B=1, T=60)[0]
    config = replace(BRIEF, loss=name, block_size=MICRO.block_size)
    students = []
    losses = []
    for seam in (tsld.forward_backward, lean.forward_backward):
        student = micro_student()
        steps = tsld.train(student, text, config, micro_gpt(2), forward_backward=seam)
        losses.append([loss for _, loss in steps])
        students.append(student)

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(
        students[1].wte.weight, students[0].wte.weight, rtol=1e-3, atol=1e-4
    )


def test_a_whole_batch_and_its_parts_train_alike():
    text = micro_ids(B=1, T=60)[0]
    losses = []
    for accumulate in (1, 3):
        config = replace(BRIEF, accumulate=accumulate)
        steps = tsld.train(
            micro_student(),
            text,
            config,
            micro_gpt(2),
            forward_backward=lean.forward_backward,
        )
        losses.append([loss for _, loss in steps])

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
