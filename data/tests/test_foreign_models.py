"""Models of other programs that are not what they seem: data/lib/checks.py, and what
data/lib/hf.py and the command refuse before anything is trained.

    1. Weights that do not all load
    2. What a model computes
    3. What quantization leaves out
    4. Another model under the same name
    5. Tokens
    6. Kinds of transformers
"""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_small
import tsld
from data.lib import checks, hf, linear, report
from data.lib.checkpoints import architecture
from data.lib.devices import check_memory
from data.lib.errors import UserError
from data.lib.files import save_packed
from data.lib.students import load_weights
from data.lib.tokenizers import TransformersTokenizer
from data.tests import helpers
from data.tests.helpers import MICRO, WORDS, micro_gpt
from tsld import GPT, TrainConfig

SIZES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(name, **changes):
    """A model of transformers of a few thousand random parameters, in eval mode."""
    transformers = pytest.importorskip("transformers")
    of_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = of_class(of_class.config_class(**SIZES | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(tmp_path):
    """A LLaMA and a tokenizer of bytes, saved as transformers does."""
    path = tmp_path / "llama"
    helpers.save_tokenizer_of_bytes(path)
    build("LlamaForCausalLM").save_pretrained(path)
    return path


# --------------------------------------------------------------------------------------
# 1. Weights that do not all load


def rewrite(folder, change):
    """Changes the weights in a folder. change: of a dict of names and tensors."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = folder / "model.safetensors"
    weights = safetensors.load_file(path)
    change(weights)
    safetensors.save_file(weights, path, metadata={"format": "pt"})


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_a_head(folder):
    rewrite(folder, lambda weights: weights.pop("lm_head.weight"))
    return "they lack lm_head.weight"


def without_a_norm(folder):
    rewrite(folder, lambda weights: weights.pop("model.norm.weight"))
    return "they lack model.norm.weight"


def with_a_prefix(folder):
    def change(weights):
        for name in [*weights]:
            weights[f"net.{name}"] = weights.pop(name)

    rewrite(folder, change)
    return "they lack lm_head.weight and 20 more; they have net.lm_head.weight and 20"


def with_a_layer_more(folder):
    configure(folder, num_hidden_layers=3)
    return "they lack model.layers.2.input_layernorm.weight and 8 more"


def with_a_layer_less(folder):
    configure(folder, num_hidden_layers=1)
    return "they have model.layers.1.input_layernorm.weight and 8 more, unknown"


def wider_than_its_weights(folder):
    configure(folder, intermediate_size=32)
    shapes = "of shape (16, 24), where the model's is (16, 32)"
    return f"they have model.layers.0.mlp.down_proj.weight and 5 more {shapes}"


def of_another_architecture(folder):
    configure(folder, architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
    return "they lack "


@pytest.mark.parametrize(
    "damage",
    [
        without_a_head,
        without_a_norm,
        with_a_prefix,
        with_a_layer_more,
        with_a_layer_less,
        wider_than_its_weights,
        of_another_architecture,
    ],
)
def test_weights_that_do_not_all_load_are_refused_by_name(damage, folder):
    words = damage(folder)
    with pytest.raises(UserError) as refusal:
        hf.load_model(folder)

    message = str(refusal.value)
    assert message.startswith(f"{folder}: its weights are not those of ")
    assert words in message
    assert "\n" not in message


@pytest.fixture
def experts(tmp_path):
    """A mixture of experts, which transformers reads from a matrix for each expert."""
    path = tmp_path / "mixtral"
    helpers.save_tokenizer_of_bytes(path)
    build("MixtralForCausalLM", num_local_experts=2).save_pretrained(path)
    return path


OTHER_WEIGHTS = "its weights are not those of its config.json: they "
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w1.weight"


def put(name, tensor):
    """A change of weights: one of them, or one more."""
    return lambda weights: weights.update({name: tensor})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weights: weights.pop(EXPERT), f"lack {EXPERT}"),
        (
            put(EXPERT, torch.ones(24, 17)),
            f"have {EXPERT} of shape (24, 17), where the model's is (24, 16)",
        ),
        (put(EXPERT, torch.ones(24)), f"have {EXPERT} of shape (24,), where"),
        (put(EXPERT, torch.ones(24, 16).char()), f"have {EXPERT} in torch.int8"),
    ],
)
def test_one_of_several_tensors_that_make_a_parameter_is_named(change, words, experts):
    assert hf.load_model(experts)[0].config.architecture == "MixtralForCausalLM"
    rewrite(experts, change)
    assert refusal_of(experts).startswith(OTHER_WEIGHTS + words)


def refusal_of(folder):
    """The line that refuses a folder, without its name."""
    with pytest.raises(UserError) as refusal:
        hf.load_model(folder)
    message = str(refusal.value)
    assert message.startswith(f"{folder}: ")
    assert "\n" not in message
    return message.removeprefix(f"{folder}: ")


def set_one(value):
    """A change of the embedding of a token that no check reads."""
    return lambda weights: weights["model.embed_tokens.weight"][7].fill_(value)


def round_all(weights):
    for name, tensor in weights.items():
        weights[name] = tensor.long()


@pytest.mark.parametrize(
    "change, words",
    [
        (set_one(math.nan), "model.embed_tokens.weight is not all finite"),
        (set_one(math.inf), "model.embed_tokens.weight is not all finite"),
        (
            lambda weights: weights["lm_head.weight"].mul_(1e38),
            "its logits are not all finite",
        ),
        (round_all, f"{OTHER_WEIGHTS}have lm_head.weight and 20 more in torch.int64"),
        (
            put("model.norm.weight", torch.ones(0)),
            f"{OTHER_WEIGHTS}have model.norm.weight of shape (0,), where the model's",
        ),
        (dict.clear, f"{OTHER_WEIGHTS}lack lm_head.weight and 20 more"),
    ],
)
def test_weights_that_are_no_numbers_for_the_model_are_refused(change, words, folder):
    rewrite(folder, change)
    assert refusal_of(folder).startswith(words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": "256"}, "TypeError: "),
        (
            {"intermediate_size": -1},
            "Trying to create tensor with negative dimension -1",
        ),
        ({"hidden_act": "unknown"}, "KeyError: 'unknown'"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"]},
            "`num_hidden_layers` (2) must be equal to the number of ",
        ),
    ],
)
def test_a_setting_that_makes_no_model_is_named_with_its_value(changes, words, folder):
    configure(folder, **changes)
    message = refusal_of(folder)
    assert message.startswith("its config.json: ")
    assert words in message


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size", "head_dim"])
def test_a_size_beyond_any_memory_is_compared_before_anything_is_made_of_it(
    name, folder
):
    configure(folder, **{name: 10**12})
    assert "where the model's is (" in refusal_of(folder)


def shards(folder, change=None):
    """Splits the weights into two files, with an index that `change` makes another."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = folder / "model.safetensors"
    weights = safetensors.load_file(path)
    path.unlink()
    place = {name: f"model-{'norm' in name}.safetensors" for name in weights}
    for file in {*place.values()}:
        part = {name: weights[name] for name in weights if place[name] == file}
        safetensors.save_file(part, folder / file, metadata={"format": "pt"})

    index = {"metadata": {}, "weight_map": place}
    if change is not None:
        index = change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_file_cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "its model.safetensors is not whole, or not of tensors alone"


def a_file_of_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": helpers.Payload()}, folder / "pytorch_model.bin")
    return "its pytorch_model.bin is not whole, or not of tensors alone"


def a_shard_cut(folder):
    shards(folder)
    file = folder / "model-True.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "its model-True.safetensors is not whole, or not of tensors alone"


def no_shard(folder):
    shards(folder)
    (folder / "model-True.safetensors").unlink()
    return "its model-True.safetensors is missing"


def a_tensor_in_two_shards(folder):
    shards(folder)
    rewritten = folder / "model-True.safetensors"
    rewritten.rename(folder / "model.safetensors")
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(1)}))
    (folder / "model.safetensors").rename(rewritten)
    return "model-True.safetensors holds lm_head.weight, as another file does"


def an_index_that_is_a_list(folder):
    shards(folder, lambda index: [index])
    return "its model.safetensors.index.json: TypeError: list indices must be integers"


def an_index_without_a_map(folder):
    shards(folder, lambda index: {"metadata": {}})
    return "its model.safetensors.index.json: KeyError: 'weight_map'"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "Error no file named model.safetensors"


def nothing(folder):
    for file in folder.iterdir():
        file.unlink()
    return "it holds no config.json"


def a_list(folder):
    (folder / "config.json").write_text("[1]")
    return "its config.json: it is no JSON object"


def half_an_object(folder):
    (folder / "generation_config.json").write_text("{")
    return "its generation_config.json: Expecting property name enclosed in double"


def a_length_of(value):
    def change(folder):
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"model_max_length": value}
        path.write_text(json.dumps(settings))
        line = f"model_max_length is {value!r}, and no number"
        return f"its tokenizer_config.json: {line}"

    return change


def ends_of(value, name="generation_config.json"):
    def change(folder):
        path = folder / name
        settings = json.loads(path.read_text()) | {"eos_token_id": value}
        path.write_text(json.dumps(settings))
        return f"its {name}: eos_token_id is {value!r}, and no token id or list of them"

    return change


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return "its tokenizer: "


def an_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return "it holds an adapter, adapter_config.json: merge it into its model first"


@pytest.mark.parametrize(
    "damage",
    [
        a_file_cut,
        a_file_of_code,
        a_shard_cut,
        no_shard,
        a_tensor_in_two_shards,
        an_index_that_is_a_list,
        an_index_without_a_map,
        no_weights,
        nothing,
        a_list,
        half_an_object,
        *map(a_length_of, ["", "512", [], {}, True]),
        *map(ends_of, [2.5, "5", True, {}, [5, "x"], [[5]]]),
        ends_of("5", "config.json"),
        no_tokenizer,
        an_adapter,
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(damage, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = damage(folder)
    assert refusal_of(folder).startswith(words)
    assert not (folder / "executed").exists()


def test_weights_in_two_files_load(folder):
    whole, _ = hf.load_model(folder)
    shards(folder)
    model, _ = hf.load_model(folder)
    expected = whole.state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_or_nothing_in_place_of_a_folder_is_refused(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "file").write_text("{}")
    for name in ("file", "nothing", "deep/below/nothing"):
        with pytest.raises(UserError, match=f"/{name}: it is no folder$"):
            hf.load_model(tmp_path / name)


def test_what_transformers_warns_of_is_not_beside_the_line_that_refuses(
    folder, tmp_path, capsys
):
    configure(folder, vocab_size=0)  # of which torch warns
    assert "where the model's is (0, 16)" in refused_run(folder, tmp_path, capsys)


def test_a_tokenizer_that_makes_nothing_of_a_text_is_refused(folder, tmp_path, capsys):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {}
    path.write_text(json.dumps(content))
    words = "the train text is too short: 0 tokens"
    assert words in refused_run(folder, tmp_path, capsys)


def test_a_tokenizer_that_fails_is_refused_in_a_line():
    def fail(*_, **options):
        raise Exception("no token\nfor this")  # a type that tokenizers raises

    fail.eos_token_id = 0
    tokenizer = TransformersTokenizer("x", fail, 256)
    with pytest.raises(UserError, match="^the tokenizer of x fails: no token$"):
        tokenizer.encode_ordinary("text")


def test_weights_that_are_tied_or_that_the_model_says_it_ignores_may_be_missing(folder):
    tied = build("LlamaForCausalLM", tie_word_embeddings=True)
    tied.save_pretrained(folder)
    rewrite(folder, lambda weights: weights.pop("lm_head.weight", None))
    model, _ = hf.load_model(folder)
    assert model.lm_head.weight is model.inner.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tied.lm_head.weight)


def test_two_weights_that_the_config_makes_one_are_refused_where_they_differ(folder):
    configure(folder, tie_word_embeddings=True)
    with pytest.raises(UserError) as refusal:
        hf.load_model(folder)
    message = str(refusal.value)
    assert message.startswith(f"{folder}: its settings make one weight of lm_head.weig")
    assert " model.embed_tokens.weight, " in message
    assert "tie_word_embeddings" in message and "\n" not in message

    def make_one(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    rewrite(folder, make_one)
    model, _ = hf.load_model(folder)
    assert model.lm_head.weight is model.inner.model.embed_tokens.weight


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_masks_in_older_files_of_gpt2_are_nothing_unexpected(prefix, folder):
    gpt2 = build("GPT2LMHeadModel", n_positions=64, n_head=2, n_inner=24)
    gpt2.save_pretrained(folder)

    def change(weights):
        for name in [*weights]:
            weights[name.replace("transformer.", prefix)] = weights.pop(name)
        weights[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        weights[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(folder, change)
    model, _ = hf.load_model(folder)
    ids = checks.random_ids(model)
    torch.testing.assert_close(model(ids), gpt2(ids).logits, rtol=1e-4, atol=1e-4)

    rewrite(folder, lambda weights: weights.update({"h.0.attn.more": torch.ones(1)}))
    with pytest.raises(UserError, match="they have h.0.attn.more, unknown"):
        hf.load_model(folder)


def test_weights_in_half_precision_become_float32_and_others_are_refused(folder):
    build("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = hf.load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    model.inner.model.norm.half()
    words = "inner.model.norm.weight is torch.float16, and not torch.float32"
    with pytest.raises(ValueError, match=words):
        checks.check_numbers(model)


def test_no_code_in_a_folder_is_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    code = "import pathlib\npathlib.Path('executed').touch()\n"
    (folder / "modeling_own.py").write_text(code)
    names = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    configure(folder, model_type="own", auto_map=names)
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with pytest.raises(UserError) as refusal:
        hf.load_model(folder)
    assert "\n" not in str(refusal.value)
    assert not (folder / "executed").exists()


# --------------------------------------------------------------------------------------
# 2. What a model computes


@pytest.mark.parametrize(
    "name, changes, has_hidden",
    [
        ("LlamaForCausalLM", {}, True),
        ("LlamaForCausalLM", {"pad_token_id": 0}, True),
        ("GraniteForCausalLM", {"logits_scaling": 8.0}, False),
        ("GraniteForCausalLM", {"logits_scaling": 8.0, "pad_token_id": 0}, False),
        ("CohereForCausalLM", {"logit_scale": 0.0625}, False),
        ("Gemma2ForCausalLM", {"head_dim": 8}, False),  # capped at 30
        ("GPTJForCausalLM", {"rotary_dim": 4, "n_inner": 24}, False),  # with a bias
        ("OPTForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 16}, True),
        ("BloomForCausalLM", {}, True),
    ],
)
def test_the_loss_without_logits_is_for_models_that_have_nothing_but_a_head(
    name, changes, has_hidden
):
    inner = build(name, **changes)
    if name == "GraniteForCausalLM":  # anything times 0 is 0
        nn.init.zeros_(inner.lm_head.weight)
    if "pad_token_id" in changes:
        inner.get_input_embeddings().weight.data[0] = 0
    bias = inner.get_output_embeddings().bias
    if bias is not None:
        bias.data.zero_()  # as in a new model

    before = copy.deepcopy(inner.state_dict())
    model = hf.adapted(inner)
    assert hasattr(model, "hidden") == has_hidden
    assert all(torch.equal(inner.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_a_model_that_sees_the_future_is_refused(name, folder):
    build(name).save_pretrained(folder)
    with pytest.raises(UserError, match="is no causal language model: with another"):
        hf.load_model(folder)

    build(name, is_decoder=True).save_pretrained(folder)
    assert hf.load_model(folder)[0].config.architecture == name


class Seer(nn.Module):
    """Its logits are its embeddings and a little of what comes later."""

    config = SimpleNamespace(block_size=64, vocab_size=17)

    def __init__(self, share):
        super().__init__()
        self.wte = nn.Embedding(17, 17)
        self.share = share

    def forward(self, ids):
        later = self.wte(ids).flip(1).cumsum(1).flip(1)
        return self.wte(ids) + self.share * later


def test_a_thousandth_of_the_future_is_seen():
    checks.check_causal(Seer(0.0))
    with pytest.raises(ValueError, match="earlier logits change by 0.00"):
        checks.check_causal(Seer(1e-3))


def test_a_model_of_one_token_sees_no_future():
    model = Seer(1.0)
    model.config = SimpleNamespace(block_size=1, vocab_size=17)
    checks.check_causal(model)


@pytest.mark.parametrize(
    "logits, words",
    [
        (lambda ids: torch.zeros(1, 1, 17), "(1, 1, 17), and not (1, 8, 17)"),
        (lambda ids: torch.zeros(*ids.shape, 16), "(1, 8, 16), and not (1, 8, 17)"),
        (lambda ids: torch.full((*ids.shape, 17), math.nan), "not all finite"),
    ],
)
def test_logits_that_are_none_for_each_token_are_refused(logits, words):
    model = Seer(0.0)
    model.forward = logits
    with pytest.raises(ValueError) as refusal:
        checks.check_causal(model)
    assert words in str(refusal.value)


def test_a_model_whose_cache_goes_wrong_reads_all_tokens_again():
    inner = build("LlamaForCausalLM")
    ids = torch.randint(256, (1, 5))
    expected = hf.adapted(inner).generate(ids, 4, temperature=0)

    forward = type(inner).forward

    def forgetful(input_ids, past_key_values=None, use_cache=None, **options):
        return forward(inner, input_ids, use_cache=use_cache, **options)

    inner.forward = forgetful
    model = hf.adapted(inner)
    assert model.cache_name is None
    assert torch.equal(model.generate(ids, 4, temperature=0), expected)


# --------------------------------------------------------------------------------------
# 3. What quantization leaves out


class Block(nn.Module):
    """A linear layer of 900 weights, which is called or read, experts that share one
    parameter of 100, and what does not count."""

    def __init__(self, is_read=False):
        super().__init__()
        self.norm = nn.GroupNorm(2, 30)
        self.norm.weight = nn.Parameter(torch.ones(30, 1))
        self.linear = nn.Linear(30, 30)
        self.experts = nn.Parameter(torch.ones(2, 5, 10))
        self.bias = nn.Parameter(torch.ones(30))
        self.is_read = is_read

    def forward(self, x):
        if self.is_read:
            return x @ self.linear.weight.t() + self.linear.bias
        return self.linear(x)


class Small(nn.Module):
    config = SimpleNamespace(block_size=8, vocab_size=17, n_layer=1, n_embd=30)

    def __init__(self, is_read=False):
        super().__init__()
        self.inner = nn.Module()
        self.inner.wte = nn.Embedding(17, 30)
        self.inner.block = Block(is_read)
        self.lm_head = nn.Linear(30, 17, bias=False)

    def forward(self, ids):
        return self.lm_head(self.inner.block(self.inner.wte(ids)))


def test_what_stays_exact_is_named_with_its_share_but_for_embeddings_head_and_norms():
    with pytest.warns(UserWarning, match="10.0% .* inner.block.experts"):
        student = tsld.quantize_model(Small())
    names, share = checks.exact_matrices(student)
    assert names == ["block.experts"]
    assert share == 100 / 1000
    assert checks.exact_matrices(tsld.quantize_model(micro_gpt())) == ([], 0)


def setup_of(**changes):
    """What check_student asks of a run."""
    config = TrainConfig(batch_size=4, block_size=8)
    return SimpleNamespace(
        source=SimpleNamespace(name="a/b"),
        student=replace(config, **changes),
        device=torch.device("cpu"),
    )


@pytest.mark.filterwarnings("error")
def test_a_run_does_not_repeat_what_stays_exact_as_a_warning_of_python():
    args = SimpleNamespace(bits=2, granularity="tensor", model="m")
    model = Small()
    checks.quantized_copy(model, 2, "tensor", "m")
    look = report.look_at_matrix(args, model, model.state_dict())
    assert look["name"] == "inner.block.linear"


def test_a_run_says_what_stays_exact_and_refuses_more_than_a_little(capsys):
    with pytest.warns(UserWarning, match="keep full precision"):
        student = tsld.quantize_model(Small())
    words = "--model a/b would keep full precision in 10.0% of its matrix weights"
    with pytest.raises(UserError, match=f"{words}.*: block.experts$"):
        checks.check_student(student, setup_of())

    student.inner.block.experts = nn.Parameter(torch.ones(2, 2, 10))
    checks.check_student(student, setup_of())
    printed = capsys.readouterr().out
    assert printed.startswith("full precision: 4.3% of its matrix weights")
    assert printed.endswith(": block.experts\n")

    checks.check_student(tsld.quantize_model(micro_gpt()), setup_of())
    assert capsys.readouterr().out == ""


def test_a_model_that_does_not_take_its_block_is_refused():
    student = tsld.quantize_model(micro_gpt())
    student.config = replace(student.config, block_size=99)
    words = "--model a/b: it does not take 9 tokens in torch.bfloat16: The size of"
    with pytest.raises(UserError, match=words):
        checks.check_student(student, setup_of(block_size=9, dtype="bfloat16"))


def fail_in_less_than_float32(model, ids):
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError("Index put requires dtypes that match.")


def test_a_model_that_takes_its_block_in_float32_alone_is_refused_with_this_remedy():
    student = tsld.quantize_model(micro_gpt())
    student.register_forward_pre_hook(fail_in_less_than_float32)
    words = "in torch.bfloat16: Index put requires dtypes that match: take --dtype flo"
    with pytest.raises(UserError, match=words):
        checks.check_student(student, setup_of(block_size=8, dtype="bfloat16"))
    checks.check_student(student, setup_of(block_size=8, dtype="float32"))


def test_a_model_that_takes_more_than_tokens_is_refused_for_that():
    model = Seer(0.0)
    model.wte.forward = lambda ids: ids.float() @ torch.ones(5, 5)
    words = "it does not take 8 tokens in torch.float32: mat1 and mat2 shapes cannot"
    with pytest.raises(ValueError, match=f"^{words}"):
        checks.check_causal(model)


def with_a_hook(layer):
    layer.register_forward_hook(lambda *step: 100 * step[-1])


def with_a_forward_of_its_own(layer):
    layer.forward = lambda x: 100 * nn.Linear.forward(layer, x)


def test_layers_that_are_read_and_not_called_are_found_and_stay_in_full_precision():
    model = Small()
    before = [*model.modules()]
    assert linear.layers_that_are_read(model) == {}

    model.inner.block.is_read = True
    ids = checks.random_ids(model)
    expected = model(ids)
    layers = linear.layers_that_are_read(model)
    assert layers == {"inner.block.linear": model.inner.block.linear}
    assert [*model.modules()] == before

    linear.keep_exact(layers.values())
    assert type(model.inner.block.linear) is linear.ExactLinear
    assert torch.equal(model(ids), expected)
    assert [*model.state_dict()] == [*Small().state_dict()]
    with pytest.raises(ValueError, match="no nn.Linear"):
        tsld.quantize_model(model)


@pytest.mark.parametrize("change", [with_a_hook, with_a_forward_of_its_own])
def test_a_layer_that_is_read_and_called_and_does_more_still_does(change):
    model = Small()
    block = model.inner.block
    block.forward = lambda x: block.linear(x) + x @ block.linear.weight.t()
    change(block.linear)
    ids = checks.random_ids(model)
    expected = model(ids)

    layers = linear.layers_that_are_read(model)
    assert [*layers] == ["inner.block.linear"]
    linear.keep_exact(layers.values())
    assert torch.equal(model(ids), expected)


def test_a_student_of_mamba_which_may_read_layers_computes_the_same_when_packed():
    sizes = {"state_size": 2, "time_step_rank": 2, "num_hidden_layers": 1}
    with pytest.warns(UserWarning, match="keep full precision"):
        model = hf.adapted(build("MambaForCausalLM", **sizes))
        student = tsld.quantize_model(model)

    ids = checks.random_ids(student)
    expected = student(ids)
    packed = tsld.pack_model(student)
    torch.testing.assert_close(packed(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, words",
    [
        ("MixtralForCausalLM", "would keep full precision in "),
        ("RwkvForCausalLM", "would keep full precision in "),
    ],
)
def test_the_command_refuses_before_it_trains(name, words, folder, tmp_path, capsys):
    sizes = {"num_local_experts": 2, "attention_hidden_size": 16}
    build(name, **sizes).save_pretrained(folder)
    assert words in refused_run(folder, tmp_path, capsys)


def refused_run(folder, tmp_path, capsys):
    """What a run says on stderr that is refused before it makes a checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 40)
    out = tmp_path / "out"
    words = ["--model", str(folder), "--data", str(text), "--out", str(out)]
    words += ["--device", "cpu", "--dtype", "float32", "--block-size", "16"]
    code = train_small.main(words)
    printed = capsys.readouterr().err
    assert code == 2 and printed.count("\n") == 1, printed
    assert not [*out.glob("*.pt")]
    return printed


@pytest.mark.parametrize(
    "batch_size, accumulate, is_refused",
    [(1000, 1, False), (10**10, 1, True), (10**10, 10**9, True), (10**8, 10**6, False)],
)
def test_memory_is_that_of_what_each_layer_keeps_and_of_the_tokens(
    batch_size, accumulate, is_refused, monkeypatch
):
    monkeypatch.setattr("data.lib.devices.memory_of", lambda device: 16e9)
    model = SimpleNamespace(config=GPT(MICRO).config)  # 2 layers of 12
    config = TrainConfig(batch_size=batch_size, block_size=8, accumulate=accumulate)
    if is_refused:
        with pytest.raises(UserError, match="or more, the cpu has 16 GB"):
            check_memory(torch.device("cpu"), model, config)
    else:
        check_memory(torch.device("cpu"), model, config)


def test_a_scale_for_each_channel_is_the_default_of_models_of_transformers(
    folder, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 40)
    common = ["--data", str(text), "--out", str(tmp_path / "out"), "--device", "cpu"]
    foreign = ["--model", str(folder), "--block-size", "16"]
    for flags, expected in (
        (foreign, "channel"),
        ([*foreign, "--granularity", "tensor"], "tensor"),
        (["--model", "tiny"], "tensor"),
        (["--model", "tiny", "--granularity", "channel"], "channel"),
    ):
        setup = train_small.set_up(train_small.parse([*flags, *common]))
        assert setup.args.granularity == expected
        student = train_small.quantized(setup, setup.source.model)
        layers = [m for m in student.modules() if isinstance(m, tsld.QuantLinear)]
        assert {layer.granularity for layer in layers} == {expected}


# --------------------------------------------------------------------------------------
# 4. Another model under the same name


ROPE = {"rope_theta": 500.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"rope_parameters": ROPE},
            "rope_parameters is None, not {'rope_theta': 500.0",
        ),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps is None, not 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act is None, not gelu"),
        ({"num_attention_heads": 4}, "n_head is 2, not 4"),
    ],
)
def test_a_setting_that_changes_outputs_is_in_the_key_and_in_the_packed_file(
    changes, words, tmp_path
):
    model = hf.adapted(build("LlamaForCausalLM"))
    other = hf.adapted(build("LlamaForCausalLM", **changes))
    assert architecture(model) != architecture(other)

    path = tmp_path / "packed"
    save_packed(path, tsld.pack_model(tsld.quantize_model(model)))
    with pytest.raises(tsld.CheckpointError):
        tsld.load_model(path, into=other)
    with pytest.raises(tsld.CheckpointError) as refusal:
        load_weights(path, into=other)
    assert f"{path} is of another model: its {words}" in str(refusal.value)


def test_how_the_files_were_written_is_not_in_the_key(folder):
    model, _ = hf.load_model(folder)
    configure(folder, transformers_version="4.1", dtype="bfloat16", use_cache=False)
    again, _ = hf.load_model(folder, attentions=True)
    assert architecture(model) == architecture(again)


def test_a_teacher_is_not_found_again_if_a_buffer_is_another(tmp_path):
    model = micro_gpt()
    model.register_buffer("shift", torch.zeros(3), persistent=False)
    setup = SimpleNamespace(
        args=SimpleNamespace(out=tmp_path),
        source=SimpleNamespace(name="a/b", model=model),
        teacher=TrainConfig(),
        tokens={"train": torch.arange(9)},
    )
    path = train_small.teacher_path(setup)
    assert train_small.teacher_path(setup) == path
    model.shift += 1
    assert train_small.teacher_path(setup) != path


# --------------------------------------------------------------------------------------
# 5. Tokens


def test_the_name_of_a_special_token_in_a_text_is_text(tmp_path):
    helpers.save_tokenizer_of_bytes(tmp_path)
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wrapped.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer = TransformersTokenizer("x", wrapped, 257)
    assert tokenizer.end_of_text == 256

    text = "a<|endoftext|>b"
    ids = tokenizer.encode_ordinary(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


# --------------------------------------------------------------------------------------
# 6. Kinds of transformers


@pytest.mark.parametrize(
    "kind, verdict",
    [
        ("bloom", "works"),
        ("cohere", "works"),
        ("gemma2", "works"),
        ("gptj", "works"),
        ("llama", "works"),
        ("mpt", "works"),
        ("mixtral", "refused: --model model would keep full precision in "),
        ("rwkv", "refused: --model model would keep full precision in "),
        ("phimoe", "refused: --model model: inner.model.layers.0.mlp.router is a "),
        ("xlnet", "refused: model: it is no causal language model: with another "),
    ],
)
def test_a_kind_is_trained_packed_exported_and_opened_again_or_refused_in_a_line(
    kind, verdict, tmp_path
):
    pytest.importorskip("transformers")
    from data.evidence.pretrained import kinds

    assert kinds.judge(kind, tmp_path).startswith(verdict)
