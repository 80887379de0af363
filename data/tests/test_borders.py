"""The borders of tsld.py: data as others have it (padding, masked vocabularies), models
that are not what they seem, and what is given back as it was found."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

import tsld
from data.tests.helpers import TEXT, micro_gpt, micro_ids, randn

PADDING = -100
BRIEF = tsld.TrainConfig(steps=2, batch_size=2, block_size=8, lr=1e-2)


def refused(words):
    return pytest.raises(ValueError, match=words)


# --------------------------------------------------------------------------------------
# Losses


def batch_of(lengths, T=6, V=5):
    """Logits of student and teacher and targets of sequences that are padded to T."""
    B = len(lengths)
    targets = torch.arange(B * T).view(B, T) % V
    for row, length in zip(targets, lengths):
        row[length:] = PADDING
    return randn(B, T, V), randn(B, T, V, seed=1), targets


@pytest.mark.parametrize("name", ["gt", "logit", "logit_gt", "tsld"])
@pytest.mark.parametrize("temperature", [1.0, 10.0, math.inf])
def test_padding_has_no_weight_in_any_loss(name, temperature):
    """What the sequences without it give, each by itself: tokens count alike, or, in
    TSLD, the sequences do that have a token."""
    lengths = [6, 2, 0, 5]
    batch = batch_of(lengths)
    expected, shares = 0.0, 0.0
    for student, teacher, targets, length in zip(*batch, lengths):
        if length == 0:
            continue
        alone = [t[None, :length] for t in (student, teacher, targets)]
        loss = tsld.distillation_loss(name, tsld.per_token_terms(*alone), temperature)
        share = 1 if name == "tsld" else length
        expected += share * loss.item()
        shares += share

    student = batch[0].requires_grad_()
    terms = tsld.per_token_terms(*batch)
    loss = tsld.distillation_loss(name, terms, temperature)
    assert math.isclose(loss.item(), expected / shares, rel_tol=1e-5)

    # No gradient comes from it.
    loss.backward()
    moved = student.grad.abs().sum(dim=-1) > 0
    assert moved.equal(batch[2] != PADDING)


def test_padding_takes_no_share_of_the_token_scale():
    terms = tsld.per_token_terms(*batch_of([4, 6, 0]))
    for temperature in (1.0, 10.0, math.inf):
        scale = tsld.token_scale(terms.ce_teacher, temperature)
        torch.testing.assert_close(scale.sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))
        assert (scale[0, 4:] == 0).all()
        assert (scale[0, :4] > 0).all()


@pytest.mark.parametrize("name", tsld.LOSSES)
def test_what_stands_at_the_places_of_padding_does_not_matter(name):
    """Tokens at the end, which no counted place sees."""
    student = tsld.quantize_model(micro_gpt())
    config = tsld.TrainConfig(loss=name)
    targets = micro_ids(2, 8, seed=1)
    targets[:, 5:] = PADDING

    losses = []
    for seed in (2, 3):
        ids = micro_ids(2, 8)
        ids[:, 5:] = micro_ids(2, 3, seed=seed)
        loss = tsld.training_loss(student, micro_gpt(4), ids, targets, config)
        losses.append(loss.item())
    assert math.isclose(*losses, rel_tol=1e-6)


def test_one_token_that_counts_has_the_whole_weight():
    terms = tsld.per_token_terms(*batch_of([1]))
    assert tsld.distillation_loss("gt", terms).item() == terms.ce_student[0, 0].item()
    assert tsld.tsld_loss(terms).item() == terms.kd[0, 0].item()


def test_a_batch_without_sequences_has_no_terms():
    assert [t.shape for t in tsld.per_token_terms(*batch_of([]))] == [(0, 6)] * 3


def test_a_vocabulary_that_both_models_mask_counts_0():
    """As if the masked entries were not there."""
    student, teacher, targets = batch_of([6, 6])
    expected = tsld.per_token_terms(student, teacher, targets)

    masked = torch.full((2, 6, 3), -math.inf)
    student = torch.cat([student, masked], dim=-1).requires_grad_()
    teacher = torch.cat([teacher, masked], dim=-1)
    terms = tsld.per_token_terms(student, teacher, targets)
    for term, value in zip(terms, expected):
        torch.testing.assert_close(term, value)

    tsld.tsld_loss(terms).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-29, 1.0, 10.0])
def test_true_tokens_that_the_teacher_rules_out_share_the_whole_weight(temperature):
    """The limit of softmax where some surprises grow without bound."""
    surprise = torch.tensor([[math.inf, 1.0, math.inf, 2.0]])
    scale = tsld.token_scale(surprise, temperature)
    assert scale.equal(torch.tensor([[0.5, 0.0, 0.5, 0.0]]))
    assert tsld.token_scale(surprise, math.inf).equal(torch.full((1, 4), 0.25))


@pytest.mark.parametrize("token", [-1, -99, 5, 10**9])
def test_targets_outside_the_vocabulary_are_refused(token):
    student, teacher, targets = batch_of([6])
    targets[0, 3] = token
    with refused(f"0 to 4, not .*{token}"):
        tsld.per_token_terms(student, teacher, targets)


def test_targets_of_another_dtype_are_refused():
    student, teacher, targets = batch_of([6])
    with refused("int64, .* in torch.int32"):
        tsld.per_token_terms(student, teacher, targets.int())


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30])
def test_a_temperature_that_float32_cannot_divide_by_is_refused(temperature):
    with refused(f"above 1e-30, not {temperature}"):
        tsld.token_scale(torch.ones(1, 2), temperature)
    assert tsld.token_scale(torch.tensor([[1.0, 50.0]]), 2e-30).equal(
        torch.tensor([[0.0, 1.0]])
    )


# --------------------------------------------------------------------------------------
# Layers that are replaced


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register):
    """A layer with a hook, which would be lost."""
    layer = nn.Linear(4, 4)
    getattr(layer, register)(lambda *arguments: None)
    return layer


def patched():
    """A layer whose forward is not its class's."""
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


IMPOSTORS = {
    "subclass": lambda: Scaled(4, 4),
    "forward hook": lambda: hooked("register_forward_hook"),
    "pre-hook": lambda: hooked("register_forward_pre_hook"),
    "backward hook": lambda: hooked("register_full_backward_hook"),
    "backward pre-hook": lambda: hooked("register_full_backward_pre_hook"),
    "forward of its own": patched,
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "weight norm": lambda: weight_norm(nn.Linear(4, 4)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", IMPOSTORS.values(), ids=IMPOSTORS)
def test_a_layer_that_is_not_just_an_nn_linear_is_refused_before_any_change(make):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": make()})
    with refused("second (is a|has its own)"):
        tsld.quantize_model(model)
    assert type(model.first) is nn.Linear

    # Skipped, it stays as it is.
    impostor = model.second
    tsld.quantize_model(model, skip=["second"])
    assert type(model.first) is tsld.QuantLinear
    assert model.second is impostor


@pytest.mark.parametrize("change", ["hook", "forward", "parametrized", "subclass"])
def test_a_student_whose_layer_does_more_is_not_packed_before_any_change(change):
    model = tsld.quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    if change == "hook":
        model[1].register_forward_hook(lambda *arguments: None)
    if change == "forward":
        model[1].forward = lambda x: 2 * x
    if change == "parametrized":
        parametrizations.weight_norm(model[1])
    if change == "subclass":
        model[1].__class__ = type("Branched", (tsld.QuantLinear,), {})

    with refused("1 (is a|has its own)"):
        tsld.pack_model(model)
    assert type(model[0]) is tsld.QuantLinear


def test_skipped_modules_keep_full_precision_with_all_that_is_in_them():
    model = micro_gpt()
    tsld.quantize_model(model, skip=["h.0", "h.1.attn.c_attn"])
    names = {n for n, m in model.named_modules() if isinstance(m, tsld.QuantLinear)}
    layers = {"attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert names == {f"h.1.{layer}" for layer in layers}

    with refused("no module 'h.9' to skip"):
        tsld.quantize_model(micro_gpt(), skip=["h.9"])


def test_the_head_is_the_models_own_and_not_a_part_that_is_called_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleDict({"head": nn.Linear(4, 4)})
            self.head = nn.Linear(4, 9)

    model = tsld.quantize_model(Model())
    assert type(model.attention["head"]) is tsld.QuantLinear
    assert type(model.head) is nn.Linear

    # A head of several layers is one, too.
    model = Model()
    model.lm_head = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 9))
    tsld.quantize_model(model)
    assert type(model.lm_head[0]) is type(model.lm_head[2]) is nn.Linear


def test_a_weight_under_two_names_is_packed_once_and_loads_again(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight  # one parameter of two layers
    model[2] = model[0]  # one layer at two places
    packed = tsld.pack_model(tsld.quantize_model(copy.deepcopy(model)))
    assert packed[0].packed is packed[1].packed is packed[2].packed

    path = tmp_path / "model.packed"
    tsld.save_model(path, packed)
    tensors = torch.load(path)["tensors"]
    places = [tensors[f"{i}.packed"].data_ptr() for i in range(3)]
    assert len(set(places)) == 1

    x = randn(3, 8)
    assert tsld.load_model(path, model)(x).equal(packed(x))


def test_a_weight_with_two_granularities_is_packed_as_each_layer_has_it():
    model = tsld.quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1].weight = model[0].weight
    model[1].granularity = "channel"
    expected = [layer.dequantized() for layer in model]
    packed = [layer.dequantized() for layer in tsld.pack_model(model)]
    torch.testing.assert_close(packed, expected)


# --------------------------------------------------------------------------------------
# Training


def test_weights_in_half_precision_are_refused_by_name():
    model = micro_gpt().bfloat16()
    with refused("wte.weight is torch.bfloat16"):
        next(tsld.train(model, TEXT, BRIEF, micro_gpt()))


def test_a_student_that_is_its_own_teacher_is_refused_by_name():
    teacher = micro_gpt()
    for student in (teacher, tsld.quantize_model(teacher)):
        with refused("wte.weight is the teacher's as well"):
            next(tsld.train(student, TEXT, BRIEF, teacher))


@pytest.mark.parametrize("way", ["assign", "data"])
def test_weights_that_stand_where_the_teachers_do_are_refused_by_name(way):
    teacher = micro_gpt()
    student = tsld.quantize_model(copy.deepcopy(teacher))
    if way == "assign":
        student.load_state_dict(teacher.state_dict(), assign=True)
    else:
        student.h[0].ln_1.bias.data = teacher.h[0].ln_1.bias.data
    with refused("is the teacher's as well"):
        next(tsld.train(student, TEXT, BRIEF, teacher))


@pytest.mark.parametrize("tokens", [TEXT + 9, TEXT - 9, TEXT.int()])
def test_tokens_outside_the_vocabulary_or_of_another_dtype_are_refused(tokens):
    model = micro_gpt()
    with refused("int64, 0 to 16, not"):
        list(tsld.train(model, tokens, BRIEF, micro_gpt()))
    with refused("int64, 0 to 16, not"):
        tsld.evaluate(model, tokens, 8)
    with refused("int64, 0 to 16, not"):
        model.generate(tokens.view(10, 6), 1)


def test_a_text_is_scored_per_token_that_counts():
    model = micro_gpt()
    expected = tsld.evaluate(model, TEXT[:5], 8)
    padded = torch.cat([TEXT[:5], torch.tensor([PADDING])])
    assert tsld.evaluate(model, padded, 8) == expected

    # The last token is no input, and still has to be one.
    with refused("0 to 16, not 0 to 17"):
        tsld.evaluate(model, torch.cat([TEXT[:5], torch.tensor([17])]), 8)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sequence_come_out_of_vmap():
    """What each gives by itself."""
    model = micro_gpt()
    ids = micro_ids(3, 5)

    def loss(parameters, row):
        return functional_call(model, parameters, (row[None],)).square().mean()

    parameters = dict(model.named_parameters())
    together = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        alone = torch.autograd.grad(loss(parameters, row), model.ln_f.weight)[0]
        torch.testing.assert_close(together["ln_f.weight"][i], alone)


@pytest.mark.parametrize("changes", [{"clip": 0}, {"accumulate": 0}, {"block_size": 0}])
def test_settings_of_0_are_refused_with_their_values(changes):
    config = tsld.TrainConfig(**{"batch_size": 2, "block_size": 8} | changes)
    with refused(f"{next(iter(changes))} .*0"):
        next(tsld.train(micro_gpt(), TEXT, config, micro_gpt()))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_infinite_loss_stops_the_training_though_its_gradient_is_finite(bad):
    def backward(student, *rest):
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return torch.tensor(bad)

    steps = tsld.train(micro_gpt(), TEXT, BRIEF, micro_gpt(), backward=backward)
    with pytest.raises(tsld.TrainingDiverged, match=f"loss {bad}, .* of norm 0"):
        next(steps)


def test_blocks_of_one_token_are_trained_on_and_scored():
    config = tsld.TrainConfig(steps=1, batch_size=2, block_size=1)
    model = micro_gpt()
    assert len(list(tsld.train(model, TEXT, config, micro_gpt(1)))) == 1

    # Each token is predicted from the one before it alone.
    logits = model(TEXT[:-1, None])[:, 0].double().detach()
    expected = -logits.log_softmax(-1)[range(len(TEXT) - 1), TEXT[1:]].mean().item()
    assert math.isclose(tsld.evaluate(model, TEXT, 1), expected, rel_tol=1e-5)


def test_a_text_in_blocks_of_0_is_refused():
    with refused("blocks of 0"):
        tsld.evaluate(micro_gpt(), TEXT, 0)


def test_training_gives_the_random_state_back():
    student = tsld.quantize_model(micro_gpt(dropout=0.1))
    teacher = micro_gpt()
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    list(tsld.train(student, TEXT, BRIEF, teacher))
    assert torch.rand(3).equal(expected)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_each_modules_mode_is_left_as_it_was_even_after_an_error():
    model = micro_gpt().train()
    model.h[0].eval()
    before = modes(model)

    tsld.evaluate(model, TEXT, 8)
    assert modes(model) == before
    model.generate(micro_ids(1, 3), 2)
    assert modes(model) == before

    with refused("0 to 16"):
        tsld.evaluate(model, TEXT + 17, 8)
    assert modes(model) == before
    with refused("0 to 16"):
        model.generate(micro_ids(1, 3) + 50, 2)
    assert modes(model) == before


def test_a_negative_place_is_refused():
    with refused("places -1 to 0 of 8"):
        micro_gpt().hidden(micro_ids(1, 1), start=-1)


@pytest.mark.parametrize("temperature", [-1.0, 1e-40, math.nan])
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(temperature):
    with refused(f"temperature {temperature} "):
        tsld.sample(randn(1, 5), temperature)


# --------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("code", [2, -2, 127, -128])
def test_codes_that_are_not_ternary_are_refused(code):
    codes = torch.tensor([[0, 1, -1, code]], dtype=torch.int8)
    with refused(f"-1, 0 and \\+1, not .*{code}"):
        tsld.pack_ternary(codes)


def test_a_compiled_model_is_saved_as_the_model_it_wraps(tmp_path):
    model = tsld.pack_model(tsld.quantize_model(micro_gpt()))
    tsld.save_model(tmp_path / "plain", model)
    tsld.save_model(tmp_path / "compiled", torch.compile(model))
    expected = (tmp_path / "plain").read_bytes()
    assert (tmp_path / "compiled").read_bytes() == expected

    # So is one whose blocks are compiled, each by itself.
    model.h = nn.ModuleList(torch.compile(block) for block in model.h)
    tsld.save_model(tmp_path / "compiled", model)
    assert (tmp_path / "compiled").read_bytes() == expected


def test_a_head_of_its_own_is_saved_and_loaded_as_one(tmp_path):
    model = micro_gpt()
    model.lm_head.weight = nn.Parameter(model.wte.weight * 2)
    tsld.save_model(tmp_path / "x", tsld.pack_model(tsld.quantize_model(model)))
    loaded = tsld.load_model(tmp_path / "x")
    assert loaded.lm_head.weight.equal((2 * model.wte.weight).half())
    assert loaded.wte.weight.equal(model.wte.weight.half())


def test_a_head_of_its_own_fills_no_model_whose_head_is_tied(tmp_path):
    model = micro_gpt()
    model.lm_head.weight = nn.Parameter(model.wte.weight * 2)
    tsld.save_model(tmp_path / "x", tsld.pack_model(tsld.quantize_model(model)))
    with pytest.raises(tsld.CheckpointError, match="weight is tied in this model"):
        tsld.load_model(tmp_path / "x", into=micro_gpt())


@pytest.mark.parametrize("into", [None, micro_gpt()], ids=["new", "into"])
def test_a_model_with_skipped_layers_computes_the_same_once_loaded(into, tmp_path):
    student = tsld.quantize_model(micro_gpt(), skip=["h.0.mlp.c_fc"])
    tsld.save_model(tmp_path / "x", tsld.pack_model(student))
    loaded = tsld.load_model(tmp_path / "x", into)
    ids = micro_ids(2, 8)
    torch.testing.assert_close(loaded(ids), student(ids), atol=2e-3, rtol=0)


@dataclass
class OtherConfig:
    width: int = 4


@pytest.mark.parametrize("config", [None, OtherConfig()])
def test_a_file_of_another_model_than_gpt_says_that_it_needs_one(config, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    model.config = config
    tsld.save_model(tmp_path / "x", tsld.pack_model(tsld.quantize_model(model)))
    with pytest.raises(tsld.CheckpointError, match="another model than GPT, .*`into`"):
        tsld.load_model(tmp_path / "x")


def test_a_bias_of_another_length_is_refused():
    packed = tsld.pack_ternary(torch.ones(2, 4, dtype=torch.int8))
    for n in (1, 3):
        with refused(f"{n} biases"):
            tsld.ternary_matmul(randn(1, 4), packed, torch.ones(1, 1), torch.ones(n))
