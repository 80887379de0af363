"""The losses without (B, T, V) logits: data/lib/lean.py.

The oracle is the definition of each loss in float64, on logits that are all there, and
autograd's gradient of it.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual

import tsld
from data.lib import lean
from data.tests.helpers import MICRO, Watched, micro_gpt, micro_ids, randn
from tsld import TrainConfig

LEAN_LOSSES = ("gt", "logit", "logit_gt", "tsld")


def reference_loss(name, student_logits, teacher_logits, targets, temperature, weight):
    """The loss of float64 logits (B, T, V), by its definition, one sequence after the
    other. Tokens whose target is -100 are cut out before anything is computed."""
    ce_student = []  # of all tokens
    kd = []
    scaled = []  # of each sequence
    for z_student, z_teacher, y in zip(student_logits, teacher_logits, targets):
        z_student, z_teacher, y = (t[y != -100] for t in (z_student, z_teacher, y))
        if len(y) == 0:
            continue

        log_p = z_student.log_softmax(-1)  # (n, V)
        p_teacher = z_teacher.detach().softmax(-1)
        kd_of_sequence = -(p_teacher * log_p).sum(-1)
        kd += kd_of_sequence
        ce_student += -log_p.gather(-1, y[:, None])[:, 0]

        # exp(ce_teacher / τ) is P^T[y] to the power of -1 / τ.
        scale = p_teacher.gather(-1, y[:, None])[:, 0] ** (-1 / temperature)
        scaled.append((scale / scale.sum() * kd_of_sequence).sum())

    gt, logit, tsld = (
        torch.stack(values).mean() for values in (ce_student, kd, scaled)
    )
    return {
        "gt": gt,
        "logit": logit + weight * gt,
        "logit_gt": logit + gt,
        "tsld": tsld + weight * gt,
    }[name]


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


def check_lean_loss(
    name, shape=(3, 5, 4, 7), tied=False, with_teacher=True, targets=None
):
    """lean_loss and its gradients against the reference."""
    student, teacher, random = example(*shape)
    targets = random if targets is None else targets
    inner = student[0].requires_grad_()
    head = student[1].requires_grad_()
    # Where embedding and head are tied, the hidden states depend on the head as well.
    hidden = inner + head[random.flip(0)] if tied else 1 * inner

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
def test_the_size_of_the_pieces_changes_nothing(rows, monkeypatch):
    """Sequences of 5 tokens: parts of one, one, several, and all three."""
    set_rows(monkeypatch, rows, V=7)
    check_lean_loss("tsld")
    check_lean_loss("logit_gt")


def test_pieces_smaller_than_one_row_of_logits_are_one_row(monkeypatch):
    monkeypatch.setattr(lean, "SCRATCH_BYTES", 1)
    check_lean_loss("tsld")


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_columns_that_stand_for_no_token_change_nothing(name, monkeypatch):
    set_rows(monkeypatch, rows=2, V=7)
    monkeypatch.setattr(lean, "columns_of", lambda V, device: V + 5)
    check_lean_loss(name)
    targets = random_targets(3, 5, 7)
    targets[1, 2:] = -100
    check_lean_loss(name, tied=True, targets=targets)


def test_rows_of_logits_have_a_length_that_a_gpu_is_fast_with():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert lean.columns_of(50257, cuda) == 50304
    assert lean.columns_of(50304, cuda) == 50304
    assert lean.columns_of(50257, cpu) == 50257


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


# Of 3 sequences of 5 tokens: where the targets are -100.
IGNORED = {
    "one token": [(1, 2)],
    "the end of each sequence": [(slice(None), slice(3, 5)), (2, 2)],
    "all but one token": [(0,), (1,), (2, slice(1, 5))],
    "a whole sequence": [(1,)],
    "a whole sequence and parts": [(0,), (1, 0), (2, slice(2, 4))],
}


@pytest.mark.parametrize("where", IGNORED)
def test_tokens_with_a_target_of_minus_100_have_no_weight(where, monkeypatch):
    targets = random_targets(3, 5, 7)
    for place in IGNORED[where]:
        targets[place] = -100
    for rows in (2, 7, 1000):
        set_rows(monkeypatch, rows, V=7)
        check_lean_loss("tsld", targets=targets)
    for name in LEAN_LOSSES:
        check_lean_loss(name, targets=targets, tied=True)


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_what_stands_at_tokens_without_weight_changes_nothing(name):
    student, teacher, targets = example()
    targets[1, 3:] = -100
    outcomes = []
    for filling in (0.0, 50.0):
        hidden, head = (tensor.clone() for tensor in student)
        hidden[1, 3:] = filling
        loss = lean.lean_loss(name, hidden.requires_grad_(), head, *teacher, targets)
        loss.backward()
        assert not hidden.grad[1, 3:].any()
        outcomes.append((loss, hidden.grad))

    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_where_no_token_counts_loss_and_gradient_are_0(name):
    student, teacher, targets = example()
    tensors = [tensor.requires_grad_() for tensor in student]
    loss = lean.lean_loss(name, *student, *teacher, targets.fill_(-100))
    loss.backward()

    assert loss.item() == 0
    assert all(not tensor.grad.any() for tensor in tensors)


@pytest.mark.parametrize(
    "name, temperature",
    [*((name, 2.0) for name in LEAN_LOSSES), ("tsld", 1e-3), ("tsld", math.inf)],
)
def test_the_lean_loss_of_padded_texts_is_that_of_tsld(name, temperature):
    student, teacher, targets = example()
    targets[0, 2:] = -100
    targets[2] = -100
    logits = [hidden @ head.T for hidden, head in (student, teacher)]
    terms = tsld.per_token_terms(*logits, targets)
    expected = tsld.distillation_loss(name, terms, temperature, 0.3)
    loss = lean.lean_loss(name, *student, *teacher, targets, temperature, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


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


@pytest.mark.parametrize("by_autocast", [True, False])
def test_in_float16_no_part_of_a_small_gradient_is_lost(by_autocast):
    """A student that has nearly learnt, and 2048 tokens: many ∂L/∂z are less than the
    smallest number of float16. A loss scaler's factor comes only afterwards."""
    student, _, targets = example(4, 512, 8, 200)
    teacher = [tensor.clone() for tensor in student]
    student[0].add_(randn(4, 512, 8, seed=5), alpha=0.03)
    if not by_autocast:
        student, teacher = ([t.half() for t in pair] for pair in (student, teacher))
    hidden, head = (tensor.requires_grad_() for tensor in student)

    with torch.autocast("cpu", torch.float16, enabled=by_autocast):
        loss = lean.lean_loss("tsld", hidden.half(), head, *teacher, targets)
    (2**16 * loss).backward()

    # By hand: factors and logits are rounded to float16, and nothing else.
    rounded = [t.detach().half().double() for t in (hidden, head, *teacher)]
    logits = (rounded[0] @ rounded[1].T).half().double().requires_grad_()
    teacher_logits = (rounded[2] @ rounded[3].T).half().double()
    reference_loss("tsld", logits, teacher_logits, targets, 10.0, 0.0).backward()
    of_head = 2**16 * logits.grad.flatten(0, 1).T @ rounded[0].flatten(0, 1)
    of_hidden = 2**16 * logits.grad @ rounded[1]

    for tensor, exact in ((head, of_head), (hidden, of_hidden)):
        error = (tensor.grad - exact).norm() / exact.norm()
        assert error < 2e-3  # 1.2e-2 if ∂L/∂z is rounded
        assert tensor.grad.dtype == tensor.dtype


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default):
    def gradients():
        model = micro_student()
        config = replace(BRIEF, accumulate=2)
        loss = lean.backward(model, micro_gpt(2), *micro_batch(), config)
        return loss, gradients_of(model)

    expected = gradients()
    student = micro_student()
    teacher = micro_gpt(2)
    torch.set_default_dtype(default)
    try:
        config = replace(BRIEF, accumulate=2)
        loss = lean.backward(student, teacher, *micro_batch(), config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradients_of(student), expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_tensors_and_the_loss_is_float32(dtype):
    student, teacher, targets = example()
    hidden, head, *teacher = (t.to(dtype) for t in (*student, *teacher))
    loss = lean.lean_loss(
        "tsld", hidden.requires_grad_(), head.requires_grad_(), *teacher, targets
    )
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == head.grad.dtype == dtype


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_without_gradients_the_loss_is_the_same(name):
    student, teacher, targets = example()
    expected = lean.lean_loss(name, *student, *teacher, targets)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            loss = lean.lean_loss(name, *student, *teacher, targets)
        assert torch.equal(loss, expected)
        assert not loss.requires_grad


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_a_second_derivative_is_refused(name):
    student, teacher, targets = example()
    hidden = student[0].requires_grad_()
    loss = lean.lean_loss(name, *student, *teacher, targets)
    with pytest.raises(ValueError, match="the lean loss has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_loss_may_go_backward_twice():
    student, teacher, targets = example()
    hidden = student[0].requires_grad_()
    loss = lean.lean_loss("tsld", *student, *teacher, targets)
    first, second = (
        torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_derivatives_that_pytorch_cannot_take_of_it_are_refused():
    student, teacher, targets = example()

    def of(hidden):
        return lean.lean_loss("tsld", hidden, student[1], *teacher, targets)

    with pytest.raises(RuntimeError, match="vmap, grad, jvp"):
        torch.func.vmap(of)(student[0][None])
    with pytest.raises(RuntimeError, match="vmap, grad, jvp"):
        torch.func.jvp(of, (student[0],), (student[0],))
    with pytest.raises(NotImplementedError, match="forward mode"), dual_level():
        of(make_dual(student[0], student[0]))


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
    found = f"student's hidden states have shape {(*student, 5)}"
    if student == targets:
        found = f"teacher's hidden states have shape {(*teacher, 5)}"
    expected = re.escape(f"the {found}, and the targets {targets}")
    targets = torch.zeros(targets, dtype=torch.long)

    with pytest.raises(ValueError, match=expected):
        lean.lean_loss(name, *student_output, *teacher_output, targets)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_teacher_of_another_vocabulary_is_refused(size):
    student, _, targets = example(2, 3, 4, 5)
    teacher = (randn(2, 3, 4), randn(size, 4))

    words = f"the teacher's vocabulary has {size} tokens, and the student's 5"
    with pytest.raises(ValueError, match=words):
        lean.lean_loss("tsld", *student, *teacher, targets)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_an_empty_batch_is_refused(shape):
    student = (torch.zeros(*shape, 5), torch.eye(5))
    targets = torch.zeros(shape, dtype=torch.long)
    expected = re.escape(f"not empty, not {shape}")
    with pytest.raises(ValueError, match=expected):
        lean.lean_loss("gt", *student, None, None, targets)


@pytest.mark.parametrize("wrong", [-101, -99, -1, 7, 2**40])
def test_a_target_out_of_range_is_refused(wrong):
    student, teacher, targets = example()
    targets[1, 2] = wrong
    expected = f"are int64, 0 to 6, not {min(wrong, 0)} to {max(wrong, 6)} in"
    with pytest.raises(ValueError, match=expected):
        lean.lean_loss("tsld", *student, *teacher, targets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_targets_that_are_not_int64_are_refused(dtype):
    student, teacher, targets = example()
    with pytest.raises(ValueError, match=f"are int64, .* in {dtype}"):
        lean.lean_loss("tsld", *student, *teacher, targets.to(dtype))


def test_targets_of_another_number_of_dimensions_are_refused():
    student, teacher, targets = example()
    with pytest.raises(
        ValueError, match=r"must be \(B, T\) and not empty, not \(15,\)"
    ):
        lean.lean_loss("tsld", *student, *teacher, targets.flatten())


def test_a_head_of_another_width_than_its_hidden_states_is_refused():
    student, teacher, targets = example()
    words = "the teacher's hidden states and head are of other widths: "
    shapes = words + r"\(3, 5, 5\) and \(7, 4\)"
    with pytest.raises(ValueError, match=shapes):
        lean.lean_loss("tsld", *student, teacher[0], student[1], targets)


def test_a_temperature_of_0_is_refused():
    student, teacher, targets = example()
    with pytest.raises(ValueError, match="above 1e-30, not 0"):
        lean.lean_loss("tsld", *student, *teacher, targets, temperature=0)


# --------------------------------------------------------------------------------------
# backward

BRIEF = TrainConfig(steps=6, batch_size=6, lr=0.01, temperature=2.0, gt_weight=0.25)


def micro_student():
    return tsld.quantize_model(micro_gpt(1))


def micro_batch():
    """ids and targets of 6 sequences."""
    return micro_ids(B=6), micro_ids(B=6, seed=1)


def gradients_of(student):
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


@pytest.mark.parametrize(
    "name, accumulate", [*((name, 3) for name in LEAN_LOSSES), ("tsld", 1)]
)
def test_backward_gives_the_loss_and_gradient_of_the_models_logits(name, accumulate):
    teacher = micro_gpt(2)
    ids, targets = micro_batch()
    by_hand = micro_student()
    logits = by_hand(ids).double()
    exact = reference_loss(name, logits, teacher(ids).double(), targets, 2.0, 0.25)
    exact.backward()

    student = micro_student()
    config = replace(BRIEF, loss=name, accumulate=accumulate)
    loss = lean.backward(student, teacher, ids, targets, config)

    assert loss.shape == ()
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(
        gradients_of(student), gradients_of(by_hand), rtol=1e-4, atol=1e-5
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_backward_adds_to_the_gradient_that_is_there():
    student = micro_student()
    config = replace(BRIEF, loss="gt")
    lean.backward(student, None, *micro_batch(), config)
    once = gradients_of(student)
    lean.backward(student, None, *micro_batch(), config)

    torch.testing.assert_close(gradients_of(student), 2 * once)


def test_the_parts_of_a_batch_go_through_the_models_one_after_the_other():
    student = micro_student()
    teacher = micro_gpt(2)
    shapes = []
    for model in (student, teacher):
        block = model.h[0]
        block.register_forward_hook(lambda block, x, y: shapes.append(x[0].shape[0]))
    config = replace(BRIEF, accumulate=3)
    lean.backward(student, teacher, *micro_batch(), config)

    assert shapes == 6 * [2]


def test_the_teacher_keeps_nothing_for_a_backward_pass():
    teacher = micro_gpt(2)
    seen = []
    teacher.ln_f.register_forward_hook(lambda norm, x, y: seen.append(y.requires_grad))
    lean.backward(micro_student(), teacher, *micro_batch(), BRIEF)
    assert seen == [False]


def test_the_ground_truth_does_not_ask_the_teacher():
    teacher = micro_gpt(2)
    teacher.forward = None
    teacher.hidden = None
    config = replace(BRIEF, loss="gt")
    lean.backward(micro_student(), teacher, *micro_batch(), config)


def test_backward_without_the_teacher_that_a_loss_needs_is_refused():
    config = replace(BRIEF, loss="tsld")
    with pytest.raises(ValueError, match="'tsld' needs a teacher"):
        lean.backward(micro_student(), None, *micro_batch(), config)


class ScaledLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_heads():
    """Output heads that do more than to multiply by their weight."""
    hooked = torch.nn.Linear(12, 17, bias=False)
    hooked.register_forward_hook(lambda head, x, y: 30 * torch.tanh(y / 30))
    before = torch.nn.Linear(12, 17, bias=False)
    before.register_forward_pre_hook(lambda head, x: x[0] / 2)
    normed = torch.nn.Linear(12, 17, bias=False)
    torch.nn.utils.parametrizations.weight_norm(normed)
    return {
        "bias": torch.nn.Linear(12, 17),
        "subclass": ScaledLinear(12, 17, bias=False),
        "quantized": tsld.QuantLinear(12, 17, bias=False),
        "hook": hooked,
        "hook before": before,
        "parametrization": normed,
        "sequence": torch.nn.Sequential(torch.nn.Linear(12, 17, bias=False)),
        "none": None,
    }


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("kind", other_heads())
def test_an_output_head_that_does_more_than_multiply_is_refused(kind, whose):
    models = {"student": micro_student(), "teacher": micro_gpt(2)}
    models[whose].lm_head = other_heads()[kind]
    assert not lean.takes(models[whose])
    with pytest.raises(ValueError, match="an nn.Linear without bias and hooks, which"):
        lean.backward(*models.values(), *micro_batch(), BRIEF)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_backward_multiplies_in_the_dtype_of_the_configuration(dtype):
    student = micro_student()
    teacher = micro_gpt(2)
    seen = set()
    for layer in (student.h[0].mlp.c_fc, teacher.h[0].mlp.c_fc):
        layer.register_forward_hook(lambda layer, x, y: seen.add(y.dtype))
    config = replace(BRIEF, dtype=dtype)
    loss = lean.backward(student, teacher, *micro_batch(), config)

    assert seen == {getattr(torch, dtype)}
    assert loss.dtype == gradients_of(student).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


@pytest.mark.parametrize(
    "name, dtype", [*((name, "float32") for name in LEAN_LOSSES), ("tsld", "bfloat16")]
)
def test_nothing_is_float64_which_apples_gpus_lack(name, dtype):
    config = replace(BRIEF, loss=name, dtype=dtype, accumulate=2)
    with Watched() as watched:
        lean.backward(micro_student(), micro_gpt(2), *micro_batch(), config)

    assert torch.float32 in watched.dtypes
    assert torch.float64 not in watched.dtypes


@pytest.mark.parametrize("name", LEAN_LOSSES)
def test_training_through_the_lean_loss_is_training_through_full_logits(name):
    text = micro_ids(B=1, T=60)[0]
    config = replace(BRIEF, loss=name, block_size=MICRO.block_size)
    students = []
    losses = []
    for seam in (tsld.backward, lean.backward):
        student = micro_student()
        steps = tsld.train(student, text, config, micro_gpt(2), backward=seam)
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
            backward=lean.backward,
        )
        losses.append([loss for _, loss in steps])

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
