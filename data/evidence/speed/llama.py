"""An exported student of GPT-2's shape in llama.cpp, its ternary matrices in 2 bits.

    python train_small.py --export out/student-tsld.packed out/exported
    python -m data.evidence.speed.llama out/exported out/student.gguf

writes the GGUF file (package gguf), its ternary matrices as TQ2_0, and where
llama-cpp-python is installed compares perplexity and greedy text. TQ2_0 cuts rows into
blocks of 256 weights with one float16 scale each. So the width must be a multiple of
256, as GPT-2 small's, medium's and large's are, but not the 1,600 of gpt2-xl and the
128 of tiny."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import train_small
import tsld
from data.evidence.rows import words_parser
from data.lib import hf
from data.lib.errors import UserError
from data.texts import load_corpus

NAMES = {  # GPT-2's, to llama.cpp's
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
BLOCK = 256  # weights that share a scale in TQ2_0


def main(argv):
    about = "An exported student of GPT-2's shape as a GGUF file for llama.cpp."
    parser = words_parser("speed.llama", about)
    parser.add_argument("folder", help="what train_small.py --export wrote")
    parser.add_argument("file", help="the GGUF file to write")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("gguf"):
        raise UserError("it takes the package gguf, which is not installed")

    model = hf.load_gpt2(args.folder)
    width = model.config.n_embd

    if width % BLOCK:
        raise UserError(
            f"TQ2_0 takes widths that are multiples of {BLOCK}, not {width}"
        )

    tokenizer = read_json(Path(args.folder) / "tokenizer.json")
    end_of_text = read_json(Path(args.folder) / "config.json").get("eos_token_id")
    if type(end_of_text) is not int:
        raise UserError(f"{args.folder}: its config.json names no one eos_token_id")

    write_gguf(model, args.file, tokenizer, end_of_text)
    print(f"{args.file}: {Path(args.file).stat().st_size:,} bytes")
    if importlib.util.find_spec("llama_cpp"):
        compare(model, args.file)


# --------------------------------------------------------------------------------------
# The file


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def write_gguf(model, path, tokenizer=None, end_of_text=None):
    """model: a GPT. tokenizer: the content of an exported tokenizer.json; None: the
    file holds no vocabulary, and serves token ids alone. end_of_text: the token that
    texts begin and end with. Raises UserError if a matrix is not ternary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(model.ln_f.eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)

    if tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
    else:
        add_vocabulary(writer, tokenizer, end_of_text)

    for name, module in model.named_modules():
        if llama_name(name) is not None:
            add_layer(writer, name, module)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer, tokenizer, end_of_text):
    import gguf

    vocabulary = dict(tokenizer["model"]["vocab"])
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= special
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [gguf.TokenType.NORMAL] * len(tokens)

    for i, token in enumerate(tokens):
        if token in special:
            types[i] = gguf.TokenType.CONTROL

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(tokenizer["model"]["merges"])
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)


def llama_name(name):
    """llama.cpp's name of a module; None of those that it does not have."""
    if not name.startswith("h."):
        return NAMES.get(name)
    _, block, *rest = name.split(".")
    inner = NAMES.get(".".join(rest))

    return inner and f"blk.{block}.{inner}"


def add_layer(writer, name, module):
    """Adds weight and bias: matrices of blocks in 2 bits, the embedding in float16, all
    else in float32."""
    import gguf

    types = gguf.GGMLQuantizationType
    for part in ("weight", "bias"):
        tensor = getattr(module, part, None)
        if tensor is None:
            continue

        form = types.F32
        if name == "wte":
            form = types.F16
        elif isinstance(module, torch.nn.Linear) and part == "weight":
            form = types.TQ2_0

        values = tensor.detach().float().numpy()
        content = gguf.quants.quantize(values, form)

        if form == types.TQ2_0:
            error = abs(gguf.quants.dequantize(content, form) - values).max()
            if error > 1e-3 * abs(values).max():
                raise UserError(f"{name} is not ternary with one scale per row")

        writer.add_tensor(f"{llama_name(name)}.{part}", content, raw_dtype=form)


# --------------------------------------------------------------------------------------
# The comparison


def compare(model, path, count=2000, length=50):
    """Perplexity of `count` tokens of a validation text, and whether the greedy
    continuation of its first 16 tokens, or of as many as fill half a block, is the
    same. The text is the Penn Treebank's, or pydoc's where that cannot be had."""
    from llama_cpp import Llama

    block = min(512, model.config.block_size)
    llama = Llama(path, n_ctx=block, n_batch=block, logits_all=True, verbose=False)

    # The file's own vocabulary, whichever it is.
    corpus = load_corpus(None)
    text = corpus.parts["valid"].encode()
    ids = llama.tokenize(text, add_bos=False)[: count + 1]

    nats = tsld.evaluate(model, torch.tensor(ids), block)
    llama_nats = evaluate_llama(llama, ids, block)
    print(f"{corpus.description}: perplexity of {len(ids) - 1} tokens")
    print(f"  this program {math.exp(nats):.3f}, llama.cpp {math.exp(llama_nats):.3f}")

    prompt = ids[: min(16, block // 2)]
    length = min(length, block - len(prompt))
    text = model.generate(torch.tensor([prompt]), length, temperature=0)[0].tolist()
    llama_text = continue_llama(llama, prompt, length)
    same = sum(a == b for a, b in zip(text[len(prompt) :], llama_text[len(prompt) :]))
    print(f"  greedy text: {same} of {length} tokens are the same")


def evaluate_llama(llama, ids, block):
    """tsld.evaluate of a model in llama.cpp: nats per token."""
    import numpy as np

    nats = 0.0
    for begin in range(0, len(ids) - 1, block):
        part = ids[begin : begin + block + 1]
        llama.reset()
        llama.eval(part[:-1])
        logits = torch.from_numpy(np.array(llama.scores[: len(part) - 1]))
        targets = torch.tensor(part[1:])
        nats += F.cross_entropy(logits, targets, reduction="sum").item()

    return nats / (len(ids) - 1)


def continue_llama(llama, prompt, length):
    """The prompt and its greedy continuation by a model in llama.cpp."""
    llama.reset()
    ids = list(prompt)

    for _ in range(length):
        llama.eval(ids[llama.n_tokens :])
        ids.append(int(llama.scores[llama.n_tokens - 1].argmax()))

    return ids


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
