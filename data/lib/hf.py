"""Models of transformers come in as modules that tsld.py takes, and their students go
out in the format that they came from.

transformers is imported only where one of its models is asked for. GPT-2's published
format, which needs no transformers, stands in published.py and is offered here too.

A student leaves by export(student, tokenizer, folder). The save_pretrained of a model
with quantized layers is not for it: it writes the full-precision weights under the
ternary ones, without a word.
"""

import copy
import importlib.util
import inspect
import json
import math
import os
import socket
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tsld
from data.lib import checks
from data.lib.errors import UserError, is_out_of_memory, reason_of
from data.lib.exports import export_folder, is_of_disk
from data.lib.linear import is_conv1d, keep_exact, layers_that_are_read, linear_layers
from data.lib.published import check_fits, dequantized_state, save_gpt2
from data.lib.published import load_gpt2 as load_gpt2
from data.lib.tokenizers import TransformersTokenizer, save_tokenizer
from tsld import GPT

# --------------------------------------------------------------------------------------
# Models in


@dataclass
class CausalConfig:
    """The shape of a model of transformers, in the words of GPTConfig.

    A packed file holds it, and fills no model with another one: most of what decides
    about a model's outputs does not show in the shapes of its tensors.
    """

    architecture: str  # transformers' name of the class
    block_size: float  # longest sequence, in tokens; infinite where there is no limit
    vocab_size: int  # tokens that have an embedding and a logit
    n_layer: int
    n_head: int  # 0 in a model without attention
    n_embd: int
    settings: dict  # all else that makes its outputs, in the words of transformers


# Settings that change no output: what wrote the files and in which type of numbers.
OF_THE_FILES = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def settings_of(config):
    """What a configuration of transformers says that its class does not say by itself,
    as plain values. A later version of the class may have more to say."""
    try:
        usual = type(config)().to_dict()
    except Exception:  # of any type: some classes refuse their own defaults
        usual = {}

    settings = {}
    for name, value in config.to_dict().items():
        is_private = name.startswith("_") or name in OF_THE_FILES or name == "use_cache"
        if not is_private and (name not in usual or usual[name] != value):
            settings[name] = value
    return json.loads(json.dumps(settings, sort_keys=True, default=str))


def longest_sequence(config):
    """How many tokens a model takes, infinite where its configuration has no limit."""
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    limits = [getattr(config, name, None) or 0 for name in names]
    return next((limit for limit in limits if limit > 0), math.inf)


def vocabulary_of(inner):
    """How many tokens a model has an embedding and a logit of."""
    heads = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    return min(len(head.weight) for head in heads if hasattr(head, "weight"))


class CausalModel(nn.Module):
    """A causal language model of transformers that behaves as our GPT: model(ids) gives
    logits (B, T, V), model(ids, trace=True) a Trace, for ids, int64 (B, T).

    Parameters have transformers' names with "inner." before them, in state dicts and in
    packed files too. All linear layers are nn.Linear: what was a Conv1D has its weight
    transposed, until `unpacked` turns it back. No setting of the model is changed.
    """

    def __init__(self, inner):
        """inner: the model of transformers, which becomes a part of this one."""
        super().__init__()
        self.inner = linear_layers(inner)

        config = inner.config.get_text_config()
        self.config = CausalConfig(
            architecture=type(inner).__name__,
            block_size=longest_sequence(config),
            vocab_size=vocabulary_of(inner),
            n_layer=getattr(config, "num_hidden_layers", None) or 0,
            n_head=getattr(config, "num_attention_heads", None) or 0,
            n_embd=getattr(config, "hidden_size", None) or 0,
            settings=settings_of(inner.config),
        )

        # The cache of keys and values has two names in the versions of transformers.
        # Without being told not to, a model makes one in training too.
        arguments = inspect.signature(inner.forward).parameters
        names = [name for name in ("cache", "past_key_values") if name in arguments]
        self.cache_name = names[0] if names else None
        self.without_cache = {"use_cache": False} if "use_cache" in arguments else {}

    @property
    def lm_head(self):
        """The layer that makes the logits."""
        return self.inner.get_output_embeddings()

    def forward(self, ids, trace=False):
        """The hidden states of a Trace are n_layer + 1 of (B, T, C), the last one after
        the final norm. Its attention_scores, (B, H, T, T), are the probabilities that
        transformers gives, and not scores before the softmax. Raises ValueError if the
        model gives no attentions, or ids are no tokens of it."""
        tsld.check_ids(ids, self.config.vocab_size)
        if not trace:
            return self.inner(ids, **self.without_cache).logits

        output = self.traced(ids)
        attentions = attentions_of(output)
        if not attentions:
            raise ValueError(
                f"L2L compares attentions, and this {self.config.architecture} gives "
                "none: load_model(..., attentions=True) loads a model with them"
            )

        return tsld.Trace(output.logits, [*output.hidden_states], attentions)

    def traced(self, ids):
        """transformers' output with all hidden states and attentions."""
        return self.inner(
            ids,
            output_hidden_states=True,
            output_attentions=True,
            **self.without_cache,
        )

    @torch.no_grad()
    def stream(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Yields new columns of tokens as GPT.stream does. It does not stop at an end
        of the text. Raises ValueError as GPT.stream does."""
        T = ids.shape[1]
        block_size = self.config.block_size
        if T == 0 or max_new_tokens < 0 or T + max_new_tokens > block_size:
            sizes = f"a prompt of {T} tokens and {max_new_tokens} new ones"
            raise ValueError(f"{sizes} are not 1 to {block_size} tokens")
        tsld.check_ids(ids, self.config.vocab_size)

        with tsld.evaluating(self):
            cache = None
            for _ in range(max_new_tokens):
                logits, cache = self.read(ids, cache)
                new = tsld.sample(logits[:, -1].float(), temperature, top_k)
                yield new

                # A model without a cache reads all of it again.
                ids = torch.cat([ids, new], dim=1) if cache is None else new

    def read(self, ids, cache):
        """The logits (B, T, V) of tokens that follow those in the cache, and the cache
        with them; None for a model that has none."""
        if self.cache_name is None:
            return self(ids), None

        output = self.inner(ids, use_cache=True, **{self.cache_name: cache})
        return output.logits, getattr(output, self.cache_name)

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Continues each row of ids as GPT.generate does: (B, T + max_new_tokens)."""
        new = self.stream(ids, max_new_tokens, temperature, top_k)
        return torch.cat([ids, *new], dim=1)


class LinearHeadModel(CausalModel):
    """One whose logits are hidden states times the weight of lm_head, and nothing more.
    Its loss can be taken without the (B, T, V) logits."""

    def hidden(self, ids):
        """ids (B, T) -> (B, T, C), after the last norm: logits = hidden @ head.T."""
        tsld.check_ids(ids, self.config.vocab_size)
        return self.inner.base_model(ids, **self.without_cache)[0]


def adapted(inner):
    """A model of transformers as a CausalModel, in eval mode, of which it becomes a
    part; a LinearHeadModel where it can be one. Layers that it does not simply call
    stay in full precision. Raises ValueError if it is no causal language model, has no
    head that is known, or layers or weights that are not what its settings say."""
    if inner.get_output_embeddings() is None:
        words = "does not say which layer makes its logits, to be spared"
        raise ValueError(f"{type(inner).__name__} {words}")
    checks.check_tied(inner)

    model = LinearHeadModel(inner).eval()
    checks.check_causal(model)
    with checks.other_numbers(model):
        checks.check_causal(model)
    keep_exact(layers_that_are_read(model).values())
    if not checks.logits_are_hidden_times_head(model):
        model = CausalModel(inner).eval()

    if not cache_is_right(model):
        model.cache_name = None
    return model


@torch.no_grad()
def cache_is_right(model):
    """Whether tokens after those in the model's cache get the logits that they get when
    all are read again. A model without a cache, or with one of its own kind, reads them
    again."""
    ids = checks.random_ids(model)
    try:
        _, cache = model.read(ids[:, :-2], None)
        for n in (-2, -1):
            logits, cache = model.read(ids[:, [n]], cache)
    except Exception:  # of any type: no two classes of caches are alike
        return False

    expected = model(ids)[:, -1:]
    tolerance = 1e-3 * expected.abs().max().item()
    return torch.allclose(logits, expected, rtol=0, atol=tolerance)


def attentions_of(output):
    """The attentions in an output of transformers, (B, H, T, T) each. It has an empty
    place for each layer where they are not written down."""
    attentions = getattr(output, "attentions", None) or ()
    return [attention for attention in attentions if attention is not None]


def load_model(name_or_folder, attentions=False):
    """Any causal language model of transformers, as a CausalModel in float32 and eval
    mode, and its TransformersTokenizer. No code in a folder is run.

    name_or_folder: owner/name is downloaded once. attentions: L2L compares them, and
    the faster implementations do not write them down. Raises UserError if transformers
    is not installed, or what is asked for cannot be loaded, is not whole, is no causal
    language model, or has no attentions.
    """
    name = str(name_or_folder)
    if not importlib.util.find_spec("transformers"):
        message = f"{name} takes the package transformers, which is not installed"
        raise UserError(message)

    # Its warnings and progress bars would stand among the lines of a run.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # Without a network a model that was downloaded before still loads.
    path = Path(name)
    is_path = path.exists() or path.is_absolute() or len(path.parts) > 2
    is_local = is_path or not can_reach("huggingface.co")
    options = {"local_files_only": is_local, "trust_remote_code": False}

    try:
        with warnings.catch_warnings(action="ignore"):
            if is_path:
                check_folder(path)
            model = adapted(load_inner(name, attentions, options))
            output = model.traced(checks.random_ids(model)) if attentions else None
            with naming("its tokenizer"):
                wrapped = transformers.AutoTokenizer.from_pretrained(name, **options)
                tokenizer = TransformersTokenizer(
                    name, wrapped, model.config.vocab_size
                )
                model.tokenizer_fingerprint = tokenizer.fingerprint()
    except Exception as error:  # of any type: a folder can make it trip over anything
        message = f"{name}: {reason_of(error)}"
        if is_local and not is_path:
            remedy = "go online once, or name the folder of a copy with --model"
            message = f"{name} (offline): {reason_of(error).rstrip('.')}: {remedy}"
        raise UserError(message) from None

    if attentions and not attentions_of(output):
        raise UserError(f"{name}: L2L compares attentions, and this model has none")
    return model, tokenizer


def check_folder(folder):
    """Raises ValueError if a path is of no folder, or of one that holds an adapter, no
    config.json, other JSON than objects, or a setting of another type than we use."""
    if not folder.is_dir():
        raise ValueError("it is no folder")
    if (folder / "adapter_config.json").exists():
        remedy = "merge it into its model first"
        raise ValueError(f"it holds an adapter, adapter_config.json: {remedy}")
    if not (folder / "config.json").is_file():
        raise ValueError("it holds no config.json")

    for path in [*folder.glob("*config.json"), *folder.glob("tokenizer.json")]:
        with naming(f"its {path.name}"):
            settings = json.loads(path.read_bytes()) if path.is_file() else {}
            if not isinstance(settings, dict):
                raise ValueError("it is no JSON object")
            check_types(settings)


def check_types(settings):
    """Raises ValueError if one that transformers does not look at has another type."""
    length = settings.get("model_max_length")
    if length is not None and type(length) not in (int, float):
        raise ValueError(f"model_max_length is {length!r}, and no number")

    ends = settings.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    if ends is not None and any(type(id) is not int for id in ids):
        raise ValueError(f"eos_token_id is {ends!r}, and no token id or list of them")


def load_inner(name, attentions, options):
    """The model of transformers alone. Raises ValueError if its config.json makes no
    model, or weights are missing, left over, of another shape or type, or not finite.
    """
    from transformers import AutoModelForCausalLM

    folder, empty = empty_model(name, options)
    check_size(empty, stored_tensors(folder))

    changes = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    if attentions:
        changes["attn_implementation"] = "eager"

    # Of what does not fit transformers gives a list, but where it trips over it.
    try:
        inner, info = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, **changes, **options
        )
    except (OSError, ImportError):  # which names a file, or a package
        raise
    except Exception:
        stored = stored_tensors(folder)
        checks.check_loaded(empty, checks.compared(empty, stored), stored)
        raise  # for another reason

    checks.check_loaded(inner, info, stored_tensors(folder))
    checks.check_numbers(inner)
    return inner


def empty_model(name, options):
    """The folder of a model's config.json, which may be a download, and what it makes:
    a model of transformers on the meta device. Raises ValueError if that is none."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import cached_file

    is_local = options["local_files_only"]
    folder = Path(cached_file(name, "config.json", local_files_only=is_local)).parent
    with naming("its config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, **options)
        return folder, AutoModelForCausalLM.from_config(config)


def check_size(model, stored):
    """Raises ValueError if tensors in files have less than half of the numbers of their
    model: transformers would make the others up, for which there may be no memory."""
    found = sum(tensor.numel() for tensor in stored.values())
    needed = sum(parameter.numel() for parameter in model.parameters())
    is_quantized = hasattr(model.config, "quantization_config")
    if stored and not is_quantized and 2 * found < needed:
        checks.check_loaded(model, checks.compared(model, stored), stored)


def stored_tensors(folder):
    """Name to tensor of the weights that transformers finds in a folder, on the meta
    device. Raises ValueError if a file is not whole, or two hold the same tensor."""
    from transformers.modeling_utils import load_state_dict

    stored = {}
    for path in weight_files(folder):
        try:
            tensors = load_state_dict(str(path), map_location="meta")
            tensors = {str(name): tensors[name].to("meta") for name in tensors}
        except Exception:  # of any type: the file can be anything
            what = "not whole, or not of tensors alone" if path.exists() else "missing"
            raise ValueError(f"its {path.name} is {what}") from None

        twice = sorted(stored.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{path.name} holds {twice[0]}, as another file does")
        stored |= tensors
    return stored


def weight_files(folder):
    """The files that transformers reads the weights of a folder from, if it has any."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            with naming(f"its {index.name}"):
                shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
                return [folder / shard for shard in sorted(set(shards))]
    return []


@contextmanager
def naming(what):
    """Makes a ValueError of one line, which begins with `what`, of any error inside but
    the disk's and that of too little memory: transformers trips over anything."""
    try:
        yield
    except Exception as error:
        if is_of_disk(error) or is_out_of_memory(error):
            raise
        raise ValueError(f"{what}: {reason_of(error)}") from None


def can_reach(host):
    """Whether there is a network: transformers would try for a minute to find out. A
    proxy or a mirror is left to it."""
    settings = ("https_proxy", "HTTPS_PROXY", "HF_ENDPOINT")
    if any(os.environ.get(name) for name in settings):
        return True

    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


# --------------------------------------------------------------------------------------
# Students out


def export(student, tokenizer, folder, dtype=torch.float32):
    """Writes a student, quantized or packed, and its tokenizer into a folder, as
    transformers opens them: a GPT in GPT-2's published format, a CausalModel in the
    format that it came from, with its own settings.

    The folder is new, empty, or of an earlier export, and gets all files or none.
    Raises UserError if it is another one or cannot be written, and ValueError if dtype
    cannot hold a weight, or transformers cannot save the model and open it again."""
    with export_folder(folder) as new:
        if isinstance(student, GPT):
            save_gpt2(student, new, dtype, getattr(tokenizer, "end_of_text", None))
        else:
            with naming(f"{student.config.architecture} cannot be exported"):
                save_causal(student, new, dtype)

        with naming("the tokenizer cannot be exported"):
            save_tokenizer(tokenizer, new)


def save_causal(student, folder, dtype):
    """Writes a CausalModel as transformers does, and opens it again. Raises ValueError
    if that does not give the same weights."""
    check_fits(student, dtype)
    model = unpacked(student)
    check_computes_as(student, model)

    # transformers refuses settings that contradict each other, as some published ones
    # do. They are the model's own, and are written as they are.
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        model.generation_config = type(settings)()
    model.to(dtype).save_pretrained(folder)
    if settings is not None:
        settings.to_json_file(Path(folder) / "generation_config.json")

    check_opened_again(model, folder)


def check_opened_again(model, folder):
    """Raises ValueError if the folder holds other weights than the model of
    transformers that was saved there."""
    options = {"local_files_only": True, "trust_remote_code": False}
    again = load_inner(folder, False, options)

    saved, found = model.state_dict(), again.state_dict()
    for name in saved.keys() | found.keys():
        is_there = name in saved and name in found
        if not is_there or not torch.equal(saved[name].float(), found[name].float()):
            raise ValueError(f"opened again, it has another {name}")


@torch.no_grad()
def check_computes_as(student, model):
    """Raises ValueError if the unpacked model computes other logits than its student:
    not all that a module does need be in its configuration and its weights."""
    ids = checks.random_ids(student)
    expected = student(ids).cpu()
    found = model(ids.cpu(), **student.without_cache).logits
    if (found - expected).abs().max() > 0.01 * expected.abs().max():
        raise ValueError("unpacked, it computes something else")


def unpacked(student):
    """A new model of transformers, in eval mode, of the class and with the settings of
    the one in a CausalModel. Its weights are the numbers that the quantized or packed
    ones stand for, at most three different ones in a ternary matrix."""
    inner = student.inner
    model = type(inner)(copy.deepcopy(inner.config))
    if getattr(inner, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(inner.generation_config)

    # The fresh model has its Conv1D layers again, whose weights are (in, out).
    state = dequantized_state(inner)
    for name, layer in model.named_modules(remove_duplicate=False):
        if is_conv1d(layer):
            state[f"{name}.weight"] = state[f"{name}.weight"].t()

    model.load_state_dict(state)
    return model.eval()
