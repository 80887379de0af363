"""Models of other programs, against our GPT, against a stand-in that shows what it was
asked, and against transformers itself where that is installed.

    1. GPT-2's published format
    2. Linear layers that are no nn.Linear
    3. What a model of transformers looks like from outside, with a stand-in
    4. Families of transformers
    5. Folders in and out
"""

import copy
import importlib.util
import json
import math
import operator
import socket
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tsld
from data.lib import checks, hf, linear, published
from data.lib.errors import UserError
from data.tests import helpers
from data.tests.helpers import MICRO, WORDS, Payload, micro_gpt, micro_ids, randn
from tsld import GPT, QuantLinear, TrainConfig

# --------------------------------------------------------------------------------------
# 1. GPT-2's published format


def write_published(folder, file, n_head=MICRO.n_head, **options):
    """Writes what a published file holds, and a config.json that says other things too.
    Returns the file's path."""
    torch.save(file, folder / "pytorch_model.bin", **options)
    config = {"n_head": n_head, "n_ctx": 99, "n_inner": None, "use_cache": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize(
    "prefix, zipped", [("", True), ("transformer.", True), ("", False)]
)
def test_published_weights_are_read_in_both_layouts(prefix, zipped, tmp_path):
    model, ids = micro_gpt(), micro_ids()
    file = helpers.published(model.state_dict(), prefix)
    path = write_published(tmp_path, file, _use_new_zipfile_serialization=zipped)
    for source in (path, tmp_path, str(tmp_path)):
        loaded = hf.load_gpt2(source)
        assert loaded.config == MICRO
        assert not loaded.training
        assert loaded.lm_head.weight is loaded.wte.weight
        assert loaded.wte.weight.requires_grad
        assert torch.equal(loaded(ids), model(ids))


def test_published_weights_in_float16_are_read_as_float32(tmp_path):
    file = helpers.published(micro_gpt().half().state_dict())
    loaded = hf.load_gpt2(write_published(tmp_path, file))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("width, heads", [(64, 1), (128, 2)])
def test_heads_are_64_wide_where_no_config_says_otherwise(width, heads, tmp_path):
    file = helpers.published(micro_gpt(n_embd=width).state_dict())
    path = write_published(tmp_path, file, n_head=2 * heads)
    assert hf.load_gpt2(path).config.n_head == 2 * heads
    (tmp_path / "config.json").unlink()
    assert hf.load_gpt2(path).config.n_head == heads


def test_heads_that_do_not_fit_are_refused(tmp_path):
    path = write_published(tmp_path, helpers.published(micro_gpt().state_dict()), 5)
    with pytest.raises(tsld.CheckpointError, match="is no GPT-2: .*5 heads"):
        hf.load_gpt2(path)

    for damaged in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(
            tsld.CheckpointError, match="with .*config.json, is no GPT-2"
        ):
            hf.load_gpt2(path)

    (tmp_path / "config.json").unlink()
    with pytest.raises(tsld.CheckpointError, match="is no GPT-2: ValueError"):
        hf.load_gpt2(path)


def test_published_weights_that_are_not_gpt2s_are_refused_by_name(tmp_path):
    good = helpers.published(micro_gpt().state_dict())
    without = {
        name: tensor for name, tensor in good.items() if "1.ln_2.bias" not in name
    }
    other = torch.zeros(17, 12)
    short = {"h.0.mlp.c_fc.bias": torch.zeros(47)}
    for file, words in (
        (without, r'Missing key.*"h\.1\.ln_2\.bias"'),
        (good | {"h.0.extra": other}, r'Unexpected key.*"h\.0\.extra"'),
        (good | short, r"size mismatch for h\.0\.mlp\.c_fc\.bias"),
        (good | {"lm_head.weight": other}, "lm_head.weight is not wte.weight"),
        (good | {"transformer.ln_f.bias": good["ln_f.bias"]}, "ln_f.bias is there tw"),
        (good | {"ln_f.bias": good["ln_f.bias"].long()}, "ln_f.bias is torch.int64"),
        (good | {"ln_f.bias": good["ln_f.bias"] / 0}, "ln_f.bias is not all finite"),
        (good | {"wpe.weight": good["wpe.weight"] * math.nan}, "wpe.weight is not all"),
        (good | {"ln_f.bias": good["ln_f.bias"].double() * 1e200}, "ln_f.bias is not"),
        ({"weight": other}, "KeyError: 'wte.weight'"),
        ({"wte.weight": 3}, "no GPT-2"),
        ([other], "no GPT-2"),
    ):
        path = write_published(tmp_path, file)
        with pytest.raises(tsld.CheckpointError, match=words) as refusal:
            hf.load_gpt2(path)
        assert "\n" not in str(refusal.value)

    with pytest.raises(OSError, match="nowhere"):
        hf.load_gpt2("nowhere")


def test_a_file_of_many_small_tensors_cannot_ask_for_as_many_blocks(
    tmp_path, monkeypatch
):
    configs = []

    def record(config):
        configs.append(config)
        return GPT(config)

    file = {"wte.weight": torch.zeros(17, 12), "wpe.weight": torch.zeros(8, 12)}
    file |= {f"h.{i}.ln_1.weight": torch.zeros(12) for i in range(240)}
    monkeypatch.setattr(published, "GPT", record)

    with pytest.raises(tsld.CheckpointError, match="no GPT-2"):
        hf.load_gpt2(write_published(tmp_path, file))
    assert configs[0].n_layer <= len(file) / 12 + 1


@pytest.mark.parametrize("zipped", [True, False])
def test_published_weights_that_are_truncated_or_would_run_code_run_nothing(
    zipped, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = {"_use_new_zipfile_serialization": zipped}
    good = helpers.published(micro_gpt().state_dict())
    path = write_published(tmp_path, good, **options)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        with pytest.raises(tsld.CheckpointError, match="is truncated"):
            hf.load_gpt2(path)

    write_published(tmp_path, good | {"extra": Payload()}, **options)
    with pytest.raises(tsld.CheckpointError, match="holds more than plain values"):
        hf.load_gpt2(path)
    assert not Path("executed").exists()


def in_form(form, folder):
    """A micro GPT: "trained", "quantized" to 2 or 4 bits, "packed", or "loaded"."""
    model = micro_gpt()
    if form == "trained":
        return model

    bits = 4 if form == "quantized to 4 bits" else 2
    tsld.quantize_model(model, bits)
    if form in ("packed", "loaded"):
        tsld.pack_model(model)
    if form == "loaded":
        tsld.save_model(folder / "model.packed", model)
        return tsld.load_model(folder / "model.packed")
    return model


@pytest.mark.parametrize(
    "form, most_values",
    [
        ("trained", 12 * 48),
        ("quantized", 3),
        ("quantized to 4 bits", 16),
        ("packed", 3),
        ("loaded", 3),
    ],
)
def test_what_is_saved_as_published_is_the_model_dequantized(
    form, most_values, tmp_path
):
    model, ids = in_form(form, tmp_path), micro_ids()
    published.save_gpt2(model, tmp_path / "new" / "folder")
    again = hf.load_gpt2(tmp_path / "new" / "folder")
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)
    values = len(again.h[1].mlp.c_fc.weight.unique())
    assert most_values / 2 < values <= most_values


def test_a_layer_with_two_names_is_dequantized_under_both():
    layer = QuantLinear(3, 4)
    state = published.dequantized_state(nn.ModuleDict({"a": layer, "b": layer}))
    assert [*state] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert torch.equal(state["a.weight"], layer.dequantized())
    assert torch.equal(state["b.weight"], layer.dequantized())
    assert not any(tensor.requires_grad for tensor in state.values())


def test_names_and_config_are_saved_in_transformers_words(tmp_path):
    model = micro_gpt(dropout=0.25)
    published.save_gpt2(model, tmp_path)
    saved = published.read_weights(published.weights_in(tmp_path)).keys()
    expected = {f"transformer.{name}" for name in model.state_dict()}
    assert saved ^ expected == {"transformer.lm_head.weight"}  # the tied one

    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {
        "n_positions": 8,
        "vocab_size": 17,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 12,
    }
    names = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    dropouts = {"attn_pdrop": 0.25, "embd_pdrop": 0.25, "resid_pdrop": 0.25}
    ends = {"bos_token_id": None, "eos_token_id": None}
    assert config == sizes | names | dropouts | ends


def test_published_weights_are_downloaded_and_cut_to_the_models_positions(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(published, "DATA", tmp_path)
    weights = micro_gpt(n_embd=64, n_head=1)
    content_path = write_published(tmp_path, helpers.published(weights.state_dict()))
    checksum = helpers.sha256(content_path.read_bytes())
    monkeypatch.setitem(published.PUBLISHED, "gpt2", checksum)
    urls = []

    def download(url, path, sha256, progress):
        urls.append(url)
        content_path.rename(path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for size in (8, 5):
        model = GPT(replace(weights.config, block_size=size))
        published.load_published("gpt2", model)
        assert torch.equal(model.wpe.weight, weights.wpe.weight[:size])
        assert torch.equal(model.h[1].mlp.c_fc.weight, weights.h[1].mlp.c_fc.weight)

    (url,) = urls
    assert url.endswith("openai-community/gpt2/resolve/main/pytorch_model.bin")

    for other in ({"block_size": 9}, {"n_layer": 1}):
        model = GPT(replace(weights.config, **other))
        with pytest.raises(tsld.CheckpointError, match="another model than gpt2"):
            published.load_published("gpt2", model)

    (tmp_path / "weights" / "gpt2.bin").write_bytes(b"altered")
    with pytest.raises(UserError, match="does not match its SHA-256"):
        published.load_published("gpt2", model)

    # Of the larger ones no SHA-256 is known.
    (tmp_path / "weights" / "gpt2-medium.bin").write_bytes(b"altered")
    words = "gpt2-medium.bin is truncated.*: delete it, and it is downloaded again$"
    with pytest.raises(tsld.CheckpointError, match=words):
        published.load_published("gpt2-medium", model)


def test_published_weights_that_cannot_be_had_are_one_line_with_a_remedy(
    tmp_path, monkeypatch, no_network
):
    monkeypatch.setattr(published, "DATA", tmp_path)
    with pytest.raises(UserError, match="go online once, .*or use --init scratch$"):
        published.load_published("gpt2", micro_gpt())


WIDE = {"n_layer": 2, "vocab_size": 101}  # the rest as in the smallest published one
TINY = {"vocab_size": 101, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}


@pytest.mark.parametrize(
    "sizes, layout",
    [(TINY, "bare"), (TINY, "with head"), (WIDE, "bare")],
)
def test_logits_are_those_of_transformers_gpt2_from_the_same_file(
    sizes, layout, tmp_path
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    expected = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in expected.parameters():  # biases and norms as well
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    saved = expected if layout == "with head" else expected.transformer
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    expected.config.save_pretrained(tmp_path)

    model = hf.load_gpt2(tmp_path)
    assert model.config.n_head == sizes.get("n_head", 12)
    ids = torch.randint(model.config.vocab_size, (2, 32))
    torch.testing.assert_close(model(ids), expected(ids).logits, rtol=1e-4, atol=1e-4)


def another(name, value):
    """A value of a setting that is not the one that it has."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return 2 * value
    others = {"activation_function": "relu", "n_inner": 24, "pad_token_id": 3}
    return others.get(name, "another")


ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@torch.no_grad()
def test_each_setting_of_transformers_gpt2_is_computed_or_refused_by_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    weights = model.transformer.state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ids = torch.randint(TINY["vocab_size"], (2, 32))

    settings = model.config.to_dict()
    of_any_model = transformers.PretrainedConfig().to_dict().keys()
    for name in of_any_model - {"model_type", "tie_word_embeddings"}:
        settings.pop(name, None)

    refused = []
    for name in [*settings, *ALIASES]:
        value = another(name, settings[ALIASES.get(name, name)])
        changed = settings | {name: value}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            loaded = hf.load_gpt2(tmp_path)
        except tsld.CheckpointError as error:
            assert f" {name} is {value!r}, " in str(error)
            assert "\n" not in str(error)
            refused.append(name)
            continue

        other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**changed)).eval()
        other.transformer.load_state_dict(weights)
        torch.testing.assert_close(loaded(ids), other(ids).logits, rtol=1e-4, atol=1e-4)

    sizes = {"n_inner", "n_layer", "n_embd", "n_positions", "vocab_size", *ALIASES}
    formulas = {"activation_function", "layer_norm_epsilon", "scale_attn_weights"}
    assert sizes | formulas | {"model_type"} < {*refused}
    assert not {"n_head", "attn_pdrop", "use_cache"} & {*refused}


def test_a_file_that_lacks_its_last_layer_is_refused(tmp_path):
    whole = helpers.published(micro_gpt().state_dict())
    file = {name: tensor for name, tensor in whole.items() if "h.1." not in name}
    write_published(tmp_path, file)
    configure = {"n_head": 2, "n_layer": 2, "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(configure))
    with pytest.raises(tsld.CheckpointError, match="n_layer is 2, .* 1$"):
        hf.load_gpt2(tmp_path)


# --------------------------------------------------------------------------------------
# 2. Linear layers that are no nn.Linear


class Conv1D(nn.Module):
    """Shaped like the class of that name in transformers: the weight is (in, out)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(randn(nx, nf))
        self.bias = nn.Parameter(randn(nf, seed=1))

    def forward(self, x):
        return x @ self.weight + self.bias


class FalconLinear(nn.Linear):
    """Computes what nn.Linear does, as the class of that name in transformers."""

    __module__ = "transformers.models.falcon.modeling_falcon"


def test_a_conv1d_becomes_a_linear_layer_with_the_transposed_weight():
    model = nn.Sequential(Conv1D(5, 3))
    model[0].weight.requires_grad_(False)
    model[0].eval()
    before, x = copy.copy(model[0]), randn(2, 3)
    before._parameters = dict(before._parameters)

    assert hf.linear_layers(model) is model
    assert type(model[0]) is nn.Linear
    assert (model[0].in_features, model[0].out_features) == (3, 5)
    assert torch.equal(model[0].weight, before.weight.t())
    assert model[0].weight.is_contiguous()
    assert model[0].bias is before.bias
    assert not model[0].weight.requires_grad
    assert not model[0].training
    torch.testing.assert_close(model(x), before(x))


@pytest.mark.parametrize("nf", [1, 4])
def test_the_new_weight_is_a_copy(nf):
    # With a single output the transposed weight lies in memory as the weight does.
    conv = Conv1D(nf, 3)
    weight = conv.weight
    before = weight.detach().clone()
    (linear,) = hf.linear_layers(nn.Sequential(conv))
    linear.weight.data.zero_()
    assert torch.equal(weight, before)


def test_falcons_linear_layer_becomes_torchs_with_the_same_parameters():
    layers = nn.Sequential(FalconLinear(3, 4, bias=False), FalconLinear(4, 2))
    before = [*layers.parameters()]
    after = hf.linear_layers(layers)
    assert [type(layer) for layer in after] == [nn.Linear, nn.Linear]
    assert all(map(operator.is_, after.parameters(), before))
    assert after[0].bias is None

    tsld.quantize_model(layers)  # which refuses the subclass


def with_forward_hook(layer):
    layer.register_forward_hook(lambda *step: 100 * step[-1])


def with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda _, x: (100 * x[0],))


def with_backward_hook(layer):
    layer.register_full_backward_hook(lambda _, into, out: into)


def with_old_weight_norm(layer):
    torch.nn.utils.weight_norm(layer)


def with_a_forward_of_its_own(layer):
    layer.forward = lambda x: 100 * type(layer).forward(layer, x)


def with_a_parametrization(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)


def with_a_subclass_of_the_same_name(layer):
    def forward(self, x):
        return 100 * super(type(self), self).forward(x)

    of_class = type(layer)
    layer.__class__ = type(of_class.__name__, (of_class,), {"forward": forward})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("of_class", [Conv1D, FalconLinear])
@pytest.mark.parametrize(
    "change, words",
    [
        (with_forward_hook, "has hooks"),
        (with_pre_hook, "has hooks"),
        (with_backward_hook, "has hooks"),
        (with_old_weight_norm, "has hooks"),
        (with_a_forward_of_its_own, "has a forward of its own"),
        (with_a_parametrization, "is a .*Parametrized"),
        (with_a_subclass_of_the_same_name, "is a "),
    ],
)
def test_a_layer_that_does_more_than_its_class_is_refused_before_any_change(
    change, words, of_class
):
    model = nn.ModuleDict({"first": of_class(4, 4), "second": of_class(4, 4)})
    change(model.second)
    before = {name: type(layer) for name, layer in model.items()}
    expected = [layer(randn(2, 4)) for layer in model.values()]

    with pytest.raises(ValueError, match=f"^second {words}"):
        hf.linear_layers(model)
    assert {name: type(layer) for name, layer in model.items()} == before
    for layer, y in zip(model.values(), expected, strict=True):
        assert torch.equal(layer(randn(2, 4)), y)


def test_a_layer_that_is_used_twice_stays_one_layer():
    shared = Conv1D(4, 4)
    model = nn.ModuleDict(
        {"a": shared, "b": nn.ModuleList([shared]), "c": Conv1D(4, 4)}
    )
    hf.linear_layers(model)

    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"][0] and model["a"] is not model["c"]


def test_what_only_has_the_name_or_is_a_linear_layer_already_stays():
    class Conv1D(nn.Conv1d):
        pass

    layers = [Conv1D(2, 2, 1), nn.Linear(2, 2), QuantLinear(2, 2), nn.LayerNorm(2)]
    before = [type(layer) for layer in layers]
    after = hf.linear_layers(nn.Sequential(*layers))
    assert [type(layer) for layer in after] == before


# --------------------------------------------------------------------------------------
# 3. What a model of transformers looks like from outside, with a stand-in


class Settings(SimpleNamespace):
    """A configuration of transformers, which gives that of the text by a method."""

    def get_text_config(self):
        return self

    def to_dict(self):
        return dict(vars(self))


SETTINGS = {
    "max_position_embeddings": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 12,
}


class Body(nn.Module):
    """A micro GPT's hidden states, and a Conv1D."""

    def __init__(self):
        super().__init__()
        self.gpt = micro_gpt()
        self.gpt.ln_f.reset_parameters()  # each position has its own best token
        self.mix = Conv1D(12, 12)
        self.mix.bias.data.zero_()

    def states(self, ids):
        return self.mix(self.gpt.hidden(ids))

    def forward(self, ids, use_cache):
        assert use_cache is False
        return (self.states(ids), "more")


class StandIn(nn.Module):
    """Looks like a model of transformers: a body, and a head by a name of its own. Its
    cache is the tokens that it has seen. It keeps the lengths of what it has read, and
    the options that came with them."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config or Settings(**SETTINGS)
        self.generation_config = {"eos_token_id": [3, 5]}
        self.base_model = Body()
        self.out = nn.Linear(12, 17, bias=False)
        self.out.weight.data = randn(17, 12)
        self.asked = []

    def get_input_embeddings(self):
        return self.base_model.gpt.wte

    def get_output_embeddings(self):
        return self.out

    def logits(self, ids):
        return self.out(self.base_model.states(ids))

    def attentions(self, ids):
        return tuple(self.base_model.gpt(ids, trace=True).attention_scores)

    def answer(self, ids, cache=None, **options):
        self.asked.append((ids.shape[1], options))
        seen = ids if cache is None else torch.cat([cache, ids], dim=1)
        return SimpleNamespace(
            logits=self.logits(seen)[:, -ids.shape[1] :],
            hidden_states=tuple(self.base_model.gpt(seen, trace=True).hidden_states),
            attentions=self.attentions(seen),
            cache=seen if options.get("use_cache") else None,
            past_key_values=seen if options.get("use_cache") else None,
        )

    def forward(self, ids, cache=None, use_cache=None, **options):
        return self.answer(ids, cache, use_cache=use_cache, **options)


class OlderStandIn(StandIn):
    """Its cache has the name that it had in earlier versions of transformers."""

    def forward(self, ids, past_key_values=None, use_cache=None, **options):
        return self.answer(ids, past_key_values, use_cache=use_cache, **options)


class CachelessStandIn(StandIn):
    """It has no cache, and takes no argument for it."""

    def __init__(self, config=None):
        super().__init__(config)
        self.base_model.forward = lambda ids: (self.base_model.states(ids), "more")

    def forward(self, ids, output_hidden_states=None, output_attentions=None):
        return self.answer(ids)


STAND_INS = (StandIn, OlderStandIn, CachelessStandIn)


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_a_forward_pass_gives_logits_and_makes_no_cache(stand_in):
    inner, ids = stand_in(), micro_ids()
    expected = inner.logits(ids)
    model = hf.adapted(inner)
    inner.asked.clear()
    torch.testing.assert_close(model(ids), expected)
    torch.testing.assert_close(model.hidden(ids) @ inner.out.weight.t(), expected)

    options = {} if stand_in is CachelessStandIn else {"use_cache": False}
    assert inner.asked == [(8, options)]


def test_a_trace_holds_what_transformers_gives():
    model, ids = hf.adapted(StandIn()), micro_ids()
    trace, expected = (
        model(ids, trace=True),
        model.inner.base_model.gpt(ids, trace=True),
    )
    everything = {"output_hidden_states": True, "output_attentions": True}
    assert model.inner.asked[-1] == (8, {"use_cache": False} | everything)
    assert isinstance(trace, tsld.Trace)
    assert torch.equal(trace.logits, model(ids))

    for found, wanted in zip(trace[1:], expected[1:]):
        assert isinstance(found, list) and len(found) == len(wanted)
        assert all(torch.equal(*pair) for pair in zip(found, wanted))


@pytest.mark.parametrize("attentions", [(None, None), None, ()])
def test_a_trace_without_attentions_is_refused(attentions):
    model = hf.adapted(StandIn())
    model.inner.attentions = lambda ids: attentions
    with pytest.raises(ValueError, match="this StandIn gives none: .*attentions=True"):
        model(micro_ids(), trace=True)


def test_the_configuration_has_our_words_and_what_is_missing_is_no_limit():
    words = {"block_size": 8, "vocab_size": 17, "n_layer": 2, "n_head": 2, "n_embd": 12}
    model = hf.adapted(StandIn())
    settings = {"settings": SETTINGS}
    assert asdict(model.config) == {"architecture": "StandIn"} | words | settings
    unlimited = hf.CausalModel(StandIn(Settings(num_hidden_layers=2))).config
    assert (unlimited.block_size, unlimited.n_head) == (math.inf, 0)


def test_settings_of_the_model_stay_as_they_were_found():
    inner = StandIn()
    before = copy.deepcopy((inner.config, inner.generation_config))
    model = hf.adapted(inner)
    model.generate(micro_ids(T=2), 2)
    assert (model.inner.config, model.inner.generation_config) == before


def test_names_are_the_models_own_with_inner_before_them():
    names = [f"inner.{name}" for name in StandIn().state_dict()]
    model = hf.adapted(StandIn())
    assert [*model.state_dict()] == names
    assert [*copy.deepcopy(model).state_dict()] == names
    tsld.quantize_model(model)
    assert [*model.state_dict()] == names


def test_a_student_is_quantized_but_for_its_head_packed_saved_and_loaded(tmp_path):
    teacher, ids = hf.adapted(StandIn()), micro_ids()
    student = tsld.quantize_model(copy.deepcopy(teacher))
    assert type(student.lm_head) is nn.Linear
    assert type(student.inner.base_model.gpt.h[1].mlp.c_fc) is QuantLinear
    assert type(student.inner.base_model.mix) is QuantLinear
    assert type(teacher.inner.base_model.mix) is nn.Linear

    exact = tsld.pack_model(student)(ids)
    tsld.save_model(tmp_path / "packed", student)

    for into in (hf.adapted(StandIn()), tsld.quantize_model(hf.adapted(StandIn()))):
        for parameter in into.parameters():
            parameter.data.zero_()
        loaded = tsld.load_model(tmp_path / "packed", into=into)
        assert loaded is into and not loaded.training
        torch.testing.assert_close(loaded(ids), exact, rtol=1e-2, atol=1e-2)

    with pytest.raises(tsld.CheckpointError):
        tsld.load_model(tmp_path / "packed")


@pytest.mark.parametrize(
    "stand_in, changes, words",
    [
        (StandIn, {"num_attention_heads": 3}, "'n_head': 2"),
        (StandIn, {"max_position_embeddings": 7}, "'block_size': 8"),
        (OlderStandIn, {}, "'architecture': 'StandIn'"),
    ],
)
def test_a_packed_file_fills_no_model_of_another_shape(
    stand_in, changes, words, tmp_path
):
    student = tsld.pack_model(tsld.quantize_model(hf.adapted(StandIn())))
    tsld.save_model(tmp_path / "packed", student)
    other = hf.adapted(stand_in(Settings(**SETTINGS | changes)))
    before = copy.deepcopy(other.state_dict())

    with pytest.raises(tsld.CheckpointError, match=words):
        tsld.load_model(tmp_path / "packed", into=other)

    after = other.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_greedy_generation_is_the_cache_free_argmax(stand_in):
    model, ids = hf.adapted(stand_in()), micro_ids(T=3)
    model.inner.asked.clear()
    generated = model.generate(ids, 4, temperature=0)
    lengths = [length for length, _ in model.inner.asked]

    assert lengths == ([3, 4, 5, 6] if stand_in is CachelessStandIn else [3, 1, 1, 1])

    expected = ids
    for _ in range(4):
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)

    assert torch.equal(generated, expected)


def test_generation_samples_by_temperature_and_top_k(monkeypatch):
    settings = []

    def record(logits, temperature, top_k):
        settings.append((tuple(logits.shape), temperature, top_k))
        return logits.argmax(-1, keepdim=True)

    monkeypatch.setattr(tsld, "sample", record)
    model = hf.adapted(StandIn())
    model.generate(micro_ids(T=2), 2, temperature=0.7, top_k=3)
    model.generate(micro_ids(T=2), 1)

    assert settings == [((2, 17), 0.7, 3)] * 2 + [((2, 17), 1.0, None)]


def test_each_modules_mode_is_left_as_it_was_even_after_an_error():
    model = hf.adapted(StandIn()).train()
    model.inner.base_model.gpt.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}

    def now():
        return {name: module.training for name, module in model.named_modules()}

    model.generate(micro_ids(T=2), 2)
    assert now() == before
    with pytest.raises(ValueError, match="too low"):
        model.generate(micro_ids(T=2), 2, temperature=-1)
    assert now() == before

    checks.logits_are_hidden_times_head(model)
    assert now() == before
    linear.layers_that_are_read(model)
    assert now() == before
    model.inner.base_model.mix.register_forward_hook(lambda *step: 1 / 0)
    for check in (checks.logits_are_hidden_times_head, linear.layers_that_are_read):
        with pytest.raises(ZeroDivisionError):
            check(model)
        assert now() == before


def test_a_stream_yields_the_columns_of_generate_and_leaves_the_mode_as_found():
    model, ids = hf.adapted(StandIn()), micro_ids(T=2)
    whole = model.generate(ids, 4, temperature=0)
    for mode in (True, False):
        model.train(mode)
        columns = [*model.stream(ids, 4, temperature=0)]
        assert torch.equal(torch.cat([ids, *columns], dim=1), whole)
        assert model.training == model.inner.training == mode

    model.train()
    graphs = []
    hook = lambda *step: graphs.append(step[-1].requires_grad)
    handle = model.lm_head.register_forward_hook(hook)
    stream = model.stream(ids, 4)
    next(stream)

    assert not model.training and torch.is_grad_enabled()

    stream.close()
    assert model.training
    assert graphs == [False]

    handle.remove()
    model(whole).sum().backward()  # what was generated can be trained on


@pytest.mark.parametrize("prompt, new", [(0, 1), (3, 6), (2, -1)])
def test_a_generation_that_does_not_fit_the_block_is_refused(prompt, new):
    model = hf.adapted(StandIn())
    words = f"a prompt of {prompt} tokens and {new} new ones are not 1 to 8 tokens"
    with pytest.raises(ValueError, match=words):
        model.generate(micro_ids(T=prompt), new)
    assert model.generate(micro_ids(T=3), 5).shape == (2, 8)
    assert model.generate(micro_ids(T=3), 0).shape == (2, 3)


def scaled(inner):
    inner.out.register_forward_hook(lambda *step: step[-1] / 2)


@pytest.mark.parametrize("wrong", [-1, 17, 2**40])
@pytest.mark.parametrize("change", [None, scaled])
def test_tokens_outside_the_vocabulary_are_refused_with_their_values(change, wrong):
    inner = StandIn()
    if change is not None:
        change(inner)

    # As other programs, which do not look at ids.
    gpt = inner.base_model.gpt
    gpt.embed = lambda ids, start=0: gpt.wte(ids) + gpt.wpe.weight[: ids.shape[1]]
    model = hf.adapted(inner)
    ids = micro_ids(T=4)
    ids[1, 2] = wrong
    low, high = ids.min().item(), ids.max().item()

    ways = [
        model,
        lambda ids: model(ids, trace=True),
        lambda ids: model.generate(ids, 1),
    ]
    ways += [model.hidden] if change is None else []
    ways += [lambda ids: tsld.evaluate(model, ids.flatten(), 4)]
    for way in ways:
        words = f"token ids are int64, 0 to 16, not {low} to {high} in torch.int64"
        with pytest.raises(ValueError, match=words):
            way(ids)
    with pytest.raises(ValueError, match="0 to 16, not .* in torch.int32"):
        model(micro_ids().int())


def biased(inner):
    inner.out.bias = nn.Parameter(torch.zeros(17))  # it is 0, but could be trained


def capped(inner):
    inner.out.register_forward_hook(lambda *step: 30 * torch.tanh(step[-1] / 30))


def scaled_where_a_padding_token_has_no_hidden(inner):
    gpt = inner.base_model.gpt
    gpt.wte.weight.data[0] = 0
    gpt.hidden = lambda ids: gpt.wte(ids)
    scaled(inner)


def of_another_width(inner):
    body = inner.base_model
    body.mix = Conv1D(10, 12)
    inner.logits = lambda ids: inner.out(body.gpt.hidden(ids))


def capped_far_above_its_logits(inner):
    inner.out.register_forward_hook(lambda *step: 5e3 * torch.tanh(step[-1] / 5e3))


def with_a_head_of_zeros(inner):
    nn.init.zeros_(inner.out.weight)
    scaled(inner)


def with_a_norm_of_zeros(inner):
    nn.init.zeros_(inner.base_model.gpt.ln_f.weight)
    scaled(inner)


def with_a_factor_inside_that_is_1(inner):
    inner.base_model.factor = nn.Parameter(torch.ones(1, 1))
    inner.out.register_forward_hook(lambda *step: inner.base_model.factor * step[-1])


def with_a_bias_elsewhere(inner):
    inner.bias = nn.Parameter(torch.zeros(17))
    inner.out.register_forward_hook(lambda *step: step[-1] + inner.bias)


def with_dropout_before_the_head(inner):
    inner.dropout = nn.Dropout(0.5)
    inner.out.register_forward_pre_hook(lambda _, x: inner.dropout(x[0]))


@pytest.mark.parametrize(
    "change",
    [
        biased,
        capped,
        scaled,
        scaled_where_a_padding_token_has_no_hidden,
        of_another_width,
        capped_far_above_its_logits,
        with_a_head_of_zeros,
        with_a_norm_of_zeros,
        with_a_factor_inside_that_is_1,
        with_a_bias_elsewhere,
        with_dropout_before_the_head,
    ],
)
def test_logits_that_are_more_than_hidden_times_head_have_no_hidden(change):
    inner = StandIn()
    change(inner)
    before = copy.deepcopy(hf.linear_layers(inner).state_dict())
    model = hf.adapted(inner)
    assert not hasattr(model, "hidden")
    assert all(torch.equal(inner.state_dict()[name], before[name]) for name in before)
    assert model(micro_ids()).shape == (2, 8, 17)
    assert not model.training


def test_a_model_with_a_head_of_zeros_that_sees_the_future_is_refused():
    inner = StandIn()
    nn.init.zeros_(inner.out.weight)
    assert hasattr(hf.adapted(inner), "hidden")

    inner.out.register_forward_pre_hook(lambda _, x: x[0] + x[0].sum(1, keepdim=True))
    with pytest.raises(ValueError, match="it is no causal language model"):
        hf.adapted(inner)
    assert not inner.out.weight.any()


def test_a_model_that_names_no_head_is_refused():
    inner = StandIn()
    inner.get_output_embeddings = lambda: None
    words = "StandIn does not say which layer makes its logits"
    with pytest.raises(ValueError, match=words):
        hf.adapted(inner)


def test_an_unpacked_student_is_a_model_of_its_class_with_its_settings():
    inner, ids = StandIn(), micro_ids()
    inner.generation_config = {"eos_token_id": 7}
    student = tsld.pack_model(tsld.quantize_model(hf.adapted(inner)))
    model = hf.unpacked(student)

    assert type(model) is StandIn and type(model.base_model.mix) is Conv1D
    assert not model.training
    torch.testing.assert_close(model(ids).logits, student(ids))
    assert model.base_model.mix.weight.unique().numel() <= 3
    assert model.config == inner.config and model.config is not inner.config
    assert model.generation_config == {"eos_token_id": 7}
    assert model.generation_config is not inner.generation_config
    assert (
        type(student.inner.base_model.mix) is tsld.PackedLinear
    )  # the student is left alone


def test_without_the_package_a_model_of_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = "^facebook/opt-125m takes the package transformers, which is not installed$"
    with pytest.raises(UserError, match=words):
        hf.load_model("facebook/opt-125m")


def test_a_proxy_or_mirror_is_not_looked_behind(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def refuse(address, timeout):
        asked.append((address, timeout))
        raise OSError

    monkeypatch.setattr(socket, "create_connection", refuse)

    assert not hf.can_reach("host")
    assert asked == [(("host", 443), 5)]

    for name in ("https_proxy", "HTTPS_PROXY", "HF_ENDPOINT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://somewhere")
            assert hf.can_reach("host")

    assert len(asked) == 1

    closed = []
    connection = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: connection)
    assert hf.can_reach("host") and closed


# --------------------------------------------------------------------------------------
# 4. Families of transformers

SIZES = {
    "vocab_size": 17,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
POSITIONS = {"max_position_embeddings": 16}

# Configuration, and the linear layers of one block as their authors name them.
FAMILIES = {
    "GPT2LMHeadModel": (
        {"vocab_size": 17, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2},
        "transformer.h.{}.: attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    ),
    "OPTForCausalLM": (
        SIZES | POSITIONS | {"ffn_dim": 20, "word_embed_proj_dim": 12},
        "model.decoder.layers.{}.: self_attn.q_proj self_attn.k_proj self_attn.v_proj "
        "self_attn.out_proj fc1 fc2",
    ),
    "GPTNeoForCausalLM": (
        {"vocab_size": 17, "hidden_size": 12, "num_layers": 2, "num_heads": 2}
        | POSITIONS
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "transformer.h.{}.: attn.attention.q_proj attn.attention.k_proj "
        "attn.attention.v_proj attn.attention.out_proj mlp.c_fc mlp.c_proj",
    ),
    "LlamaForCausalLM": (
        SIZES | POSITIONS | {"intermediate_size": 20},
        "model.layers.{}.: self_attn.q_proj self_attn.k_proj self_attn.v_proj "
        "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
    "FalconForCausalLM": (
        SIZES | POSITIONS,
        "transformer.h.{}.: self_attention.query_key_value self_attention.dense "
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
    ),
}
IDS = micro_ids(8, 8)
TEXT = torch.from_numpy(np.random.default_rng(1).integers(17, size=60))


def build(name, attention="eager", seed=0, **sizes):
    """A model of transformers of a few thousand random parameters."""
    transformers = pytest.importorskip("transformers")
    of_class = getattr(transformers, name)
    torch.manual_seed(seed)
    config = of_class.config_class(**sizes)
    config._attn_implementation = attention
    model = of_class(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def family(name, **options):
    return build(name, **FAMILIES[name][0] | options)


def train_to_end(student, config, teacher):
    """The losses of all steps."""
    return [loss for _, loss in tsld.train(student, TEXT, config, teacher)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_model_looks_like_ours_and_computes_what_it_did(name):
    inner = family(name)
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = inner(IDS, **options)
    model = hf.adapted(inner)

    torch.testing.assert_close(model(IDS), expected.logits, rtol=1e-4, atol=1e-5)

    from_hidden = model.hidden(IDS) @ model.lm_head.weight.t()
    torch.testing.assert_close(from_hidden, expected.logits, rtol=1e-4, atol=1e-5)

    trace = model(IDS, trace=True)
    wanted = [expected.logits, *expected.hidden_states, *expected.attentions]
    found = [trace.logits, *trace.hidden_states, *trace.attention_scores]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    config = asdict(model.config)
    assert config.pop("settings").items() <= inner.config.to_dict().items()
    assert config == {
        "architecture": name,
        "block_size": FAMILIES[name][0].get("max_position_embeddings", 16),
        "vocab_size": 17,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 12,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_student_is_quantized_distilled_packed_and_loaded(name, tmp_path):
    teacher = hf.adapted(family(name))
    student = tsld.quantize_model(copy.deepcopy(teacher))
    prefix, layers = FAMILIES[name][1].split(": ")
    blocks = [f"inner.{prefix.format(block)}" for block in range(2)]
    expected = {block + layer for block in blocks for layer in layers.split()}
    linear = {n: m for n, m in student.named_modules() if isinstance(m, nn.Linear)}

    assert {n for n, m in linear.items() if isinstance(m, QuantLinear)} == expected
    assert linear.keys() - expected == {"inner.lm_head"}

    lost = F.mse_loss(student(IDS), teacher(IDS))
    layers = copy.deepcopy(student)
    config = TrainConfig(steps=20, batch_size=16, block_size=8, lr=0.02)
    losses = train_to_end(student, config, teacher)
    terms = tsld.per_token_terms(teacher(IDS), teacher(IDS), micro_ids(8, 8, seed=1))
    floor = tsld.tsld_loss(terms).item()

    assert np.mean(losses[-3:]) - floor < 0.6 * (losses[0] - floor)
    assert F.mse_loss(student(IDS), teacher(IDS)) < lost

    losses = train_to_end(layers, replace(config, loss="l2l"), teacher)
    assert np.mean(losses[-3:]) < losses[0] - 0.02

    exact = student(IDS)
    tsld.pack_model(student)
    torch.testing.assert_close(student(IDS), exact, rtol=1e-4, atol=1e-4)

    tsld.save_model(tmp_path / "packed", student)
    loaded = tsld.load_model(tmp_path / "packed", into=hf.adapted(family(name, seed=1)))
    torch.testing.assert_close(loaded(IDS), exact, rtol=0.02, atol=0.02)

    nats = F.cross_entropy(loaded(TEXT[None, :8])[0], TEXT[1:9]).item()
    assert tsld.evaluate(loaded, TEXT[:9], 8) == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "MambaForCausalLM"])
def test_a_familys_greedy_generation_is_the_cache_free_argmax(name):
    if name in FAMILIES:
        model = hf.adapted(family(name))
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 2}
        model = hf.adapted(build(name, vocab_size=17, **sizes))
    expected = IDS[:, :4]
    for _ in range(6):
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)

    assert torch.equal(model.generate(IDS[:, :4], 6, temperature=0), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_student_is_unpacked_as_a_model_of_its_family(name, tmp_path):
    inner = family(name)
    layers = sum(type(m).__name__ == "Conv1D" for m in inner.modules())
    student = tsld.pack_model(tsld.quantize_model(hf.adapted(inner)))
    model = hf.unpacked(student)

    assert sum(type(m).__name__ == "Conv1D" for m in model.modules()) == layers

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, student(IDS), rtol=1e-4, atol=1e-4)

    packed = sum(isinstance(m, tsld.PackedLinear) for m in student.modules())
    values = [p.unique().numel() for p in again.parameters() if p.dim() == 2]
    assert sum(n <= 3 for n in values) >= packed > 0


@pytest.mark.parametrize(
    "name, place",
    [
        ("GPT2LMHeadModel", "transformer.h.1.mlp.c_fc"),
        ("FalconForCausalLM", "transformer.h.1.mlp.dense_h_to_4h"),
    ],
)
def test_a_hook_on_a_familys_own_linear_layer_is_refused_by_its_name(name, place):
    inner = family(name)
    inner.get_submodule(place).register_forward_hook(lambda *step: 100 * step[-1])
    with pytest.raises(ValueError, match=f"^{place} has hooks"):
        hf.adapted(inner)


def test_logits_of_a_head_with_layers_of_its_own_have_no_hidden():
    sizes = SIZES | POSITIONS | {"intermediate_size": 8, "is_decoder": True}
    assert not hasattr(hf.adapted(build("RobertaForCausalLM", **sizes)), "hidden")
    llama = family("LlamaForCausalLM")
    capped(SimpleNamespace(out=llama.lm_head))
    assert not hasattr(hf.adapted(llama), "hidden")


# --------------------------------------------------------------------------------------
# 5. Folders in and out


@pytest.fixture
def folder(tmp_path):
    """A tiny OPT in bfloat16 and a tokenizer of bytes, saved as transformers does."""
    path = tmp_path / "tiny-opt"
    helpers.save_tokenizer_of_bytes(path)

    sizes = {"vocab_size": 256, "max_position_embeddings": 600}
    model = family("OPTForCausalLM", **sizes)
    model.generation_config.eos_token_id = [0, 5, 7]
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def test_a_folder_gives_a_model_and_its_tokenizer(folder):
    import transformers

    model, tokenizer = hf.load_model(folder)
    assert (model.config.block_size, model.config.vocab_size) == (600, 256)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (tokenizer.name, tokenizer.vocab_size) == (str(folder), 256)
    assert tokenizer.decode(tokenizer.encode_ordinary(WORDS)) == WORDS

    load = transformers.AutoModelForCausalLM.from_pretrained
    original = load(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode_ordinary(WORDS)])
    torch.testing.assert_close(model(ids), original(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="this OPTForCausalLM gives none"):
        model(ids, trace=True)

    model, _ = hf.load_model(str(folder), attentions=True)
    attentions = model(ids, trace=True).attention_scores[1]
    assert attentions.shape == (1, 2, ids.shape[1], ids.shape[1])


def test_a_token_that_the_model_has_no_embedding_of_is_refused(folder):
    family("OPTForCausalLM", vocab_size=100).save_pretrained(folder)
    _, tokenizer = hf.load_model(folder)
    with pytest.raises(UserError, match=f"the tokenizer of {folder} makes token "):
        tokenizer.encode_ordinary(WORDS)


def test_a_model_without_attentions_is_refused_where_they_are_asked_for(folder):
    sizes = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 1}
    build("MambaForCausalLM", state_size=2, **sizes).save_pretrained(folder)
    words = f"{folder}: L2L compares attentions, and this model has none"
    with pytest.raises(UserError, match=words):
        hf.load_model(folder, attentions=True)

    model, _ = hf.load_model(folder)
    assert model.config.block_size == math.inf


def test_what_cannot_be_loaded_is_one_line_that_names_it(folder, monkeypatch):
    monkeypatch.setattr(hf, "can_reach", lambda host: False)
    (folder / "config.json").write_text("{}")
    for name, start in (
        (folder, f"{folder}: "),
        ("no/such-model", "no/such-model (off"),
    ):
        with pytest.raises(UserError) as refusal:
            hf.load_model(name)
        assert str(refusal.value).startswith(start)
        assert "\n" not in str(refusal.value)

    remedy = "go online once, or name the folder of a copy with --model"
    assert str(refusal.value).endswith(f": {remedy}")

    speechless = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", speechless)
    with pytest.raises(UserError, match=f"^{folder}: its config.json: AssertionError$"):
        hf.load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_exported_student_of_ours_opens_in_transformers(
    dtype, small_vocabulary, tmp_path
):
    torch.manual_seed(0)
    sizes = {
        "block_size": 16,
        "vocab_size": 2048,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
    }
    student = tsld.quantize_model(GPT(tsld.GPTConfig(**sizes)))
    tsld.save_model(tmp_path / "packed", tsld.pack_model(student))
    student = tsld.load_model(tmp_path / "packed")
    folder = tmp_path / "exported"
    hf.export(student, small_vocabulary, folder, dtype)

    weights = published.read_weights(published.weights_in(folder))
    for name, tensor in weights.items():
        assert tensor.dtype == dtype, name
        if ".c_" in name and tensor.dim() == 2:
            assert tensor.unique().numel() <= 3, name

    transformers = pytest.importorskip("transformers")
    open_model = transformers.AutoModelForCausalLM.from_pretrained
    again = open_model(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = small_vocabulary.encode_ordinary(WORDS)

    assert tokenizer(WORDS, add_special_tokens=False)["input_ids"] == ids

    ids = torch.tensor([ids[:6]])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(again(ids).logits, student(ids), rtol=0, atol=tolerance)

    if dtype == torch.float32:
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        generated = again.generate(ids, max_new_tokens=8, **options)
        assert torch.equal(generated, student.generate(ids, 8, temperature=0))


def test_an_exported_student_of_transformers_opens_there_with_its_settings(folder):
    model, tokenizer = hf.load_model(folder)
    student = tsld.pack_model(tsld.quantize_model(model))
    exported = folder / "exported"
    hf.export(student, tokenizer, exported, torch.float16)
    again, read = hf.load_model(exported)

    assert read.encode_ordinary(WORDS) == tokenizer.encode_ordinary(WORDS)

    ids = torch.tensor([tokenizer.encode_ordinary(WORDS)])
    torch.testing.assert_close(again(ids), student(ids), rtol=1e-2, atol=2e-2)
    assert again.inner.model.decoder.layers[0].fc1.weight.unique().numel() <= 3
    assert again.inner.generation_config.eos_token_id == [0, 5, 7]
    assert again.inner.config.use_cache

    config = json.loads((exported / "config.json").read_text())
    assert config["dtype"] == "float16"
