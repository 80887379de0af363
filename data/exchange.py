"""Models and tokenizers of other programs. GPT-2's published weights and causal language models of
transformers come in; a packed student goes out, as GPT-2's published format with a tokenizer.json,
or in the format of the model that it was made from. Its ternary matrices are then numbers, at most
three different ones each."""

import importlib.util
import json
import os
import socket
from pathlib import Path

import torch

import tsld
from data.texts import DATA, UserError, fetch


def load_published(name, sha256, model):
    """GPT-2's published weights into our GPT, which may have fewer positions; downloaded once."""
    url = f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
    try:
        path = fetch([url], DATA / "weights" / f"{name}.bin", sha256)
    except UserError as error:
        raise UserError(f"{error}: go online once, or use --init scratch")
    state = tsld.GPT.from_pretrained(path).state_dict()
    state["wpe.weight"] = state["wpe.weight"][: model.config.block_size]  # the first positions do
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise tsld.CheckpointError(f"{path} is another model than {name}") from None


class TheirTokenizer:
    """A tokenizer of transformers, with the methods of tiktoken's. size: of the model's embedding."""

    def __init__(self, name, tokenizer, size):
        self.name, self.decode, self.theirs, self.size = name, tokenizer.decode, tokenizer, size
        self.decode_bytes = lambda ids: tokenizer.decode(ids).encode()
        known = tokenizer.eos_token_id is not None
        self.end_of_text = tokenizer.eos_token_id if known else self.encode_ordinary("\0")[-1]

    def encode_ordinary(self, text):
        ids = self.theirs(text, add_special_tokens=False)["input_ids"]
        if max(ids, default=0) >= self.size:
            sizes = f"makes token {max(ids)}, and its model knows {self.size}"
            raise UserError(f"the tokenizer of {self.name} {sizes}")
        return ids


def load_theirs(name, eager=False):
    """Model and tokenizer, by path or owner/name. eager: L2L looks at the attention, which the
    faster implementations never write down."""
    if not importlib.util.find_spec("transformers"):
        raise UserError(f"{name} takes the package transformers, which is not installed")
    import transformers

    kind = {"attn_implementation": "eager"} if eager else {}
    local = {"local_files_only": Path(name).is_dir() or not can_reach("huggingface.co")}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **local)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(name, dtype=torch.float32, **local, **kind)
        output = forward(model, output_attentions=True) if eager else None
    except Exception as error:  # of any kind: what is in a folder can make it trip over anything
        offline = " (offline)" if local["local_files_only"] and not Path(name).is_dir() else ""
        words = str(error).strip() or type(error).__name__
        raise UserError(f"{name}{offline}: {words.splitlines()[0]}")
    model.config.use_cache = False  # of keys and values, which training has no use for
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if eager and not getattr(output, "attentions", None):
        raise UserError(f"{name}: L2L compares attentions, and this model has none")
    return model, TheirTokenizer(name, tokenizer, len(model.get_input_embeddings().weight))


@torch.no_grad()
def forward(model, **ask):
    """What it gives for two tokens."""
    return model.eval()(torch.zeros(1, 2, dtype=torch.long), **ask)


def can_reach(host):
    """Saves a minute of its library's trying. A proxy or a mirror is left to the library."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "HF_ENDPOINT")):
        return True
    try:
        socket.create_connection((host, 443), timeout=5).close()
        return True
    except OSError:
        return False


@torch.no_grad()
def logits_are_hidden_times_head(model):
    """Are they hidden @ head.T and nothing more? Two tokens show it."""
    if not hasattr(getattr(model, "lm_head", None), "weight"):
        return False
    product = forward(model.base_model)[0] @ model.lm_head.weight.t()
    return torch.allclose(forward(model).logits, product, rtol=1e-5, atol=1e-5)


def unpacked(student, blank):
    """`blank`, a full-precision model of transformers, with the weights of its packed student."""
    weights = student.state_dict()
    for name, layer in student.named_modules():
        if isinstance(layer, tsld.PackedLinear):
            weight = layer.dequantized()
            del weights[f"{name}.packed"], weights[f"{name}.scale"]
            transposed = tsld.is_conv1d(blank.get_submodule(name))
            weights[f"{name}.weight"] = weight.t() if transposed else weight
    blank.load_state_dict(weights)
    return blank


def save_tokenizer(tokenizer, folder):
    """A tiktoken.Encoding as tokenizer.json and tokenizer_config.json, as transformers reads them."""
    special = {tokenizer.encode_single_token(s): s for s in tokenizer.special_tokens_set}
    ids = [i for i in range(tokenizer.n_vocab) if i not in special]
    ranks = {tokenizer.decode_single_token_bytes(i): i for i in ids}
    merges = [split(token, ranks) for token in ranks if len(token) > 1]
    isolated = {"behavior": "Isolated", "invert": False}
    bytes_as_letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    bytes_as_letters["trim_offsets"] = True
    steps = [{"type": "Split", "pattern": {"Regex": tokenizer._pat_str}} | isolated]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": s, "special": True} | added for i, s in special.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_as_letters]},
        "decoder": bytes_as_letters,
        "model": {
            "type": "BPE",
            "vocab": {letters(token): i for token, i in ranks.items()},
            "merges": [" ".join(map(letters, pair)) for pair in merges],
        },
    }
    file = Path(folder) / "tokenizer.json"
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
        "eos_token": s for s in special.values()
    }
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def letters(token):
    """A token's bytes as GPT-2's files spell them: each byte that is no visible character of
    Latin-1 as the next letter from 256 on."""
    return "".join(LETTERS[byte] for byte in token)


VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
HIDDEN = sorted({*range(256)} - VISIBLE)
LETTERS = [chr(b if b in VISIBLE else 256 + HIDDEN.index(b)) for b in range(256)]


def split(token, ranks):
    """The two tokens that byte-pair encoding merges last to make `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
