"""An exported student of GPT-2's shape in llama.cpp, its ternary matrices in 2 bits.

    python train_small.py --export out/student-tsld.packed out/exported
    python -m data.evidence.llama out/exported out/student.gguf

writes the GGUF file (package gguf), its ternary matrices as TQ2_0, and where llama-cpp-python is
installed compares perplexity and greedy text. TQ2_0 cuts rows into blocks of 256 weights with one
float16 scale each. So the width must be a multiple of 256, as GPT-2 small's, medium's and large's
are, but not the 1,600 of gpt2-xl and the 128 of tiny."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import torch

import tsld
from train_small import UserError
from train_small import main as run_as_command

NAMES = {  # ours, as GPT-2 calls them, to llama.cpp's
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def write_gguf(model, path, tokenizer=None):
    """model: a GPT. tokenizer: the content of an exported tokenizer.json; None: the file holds no
    vocabulary, and serves token ids alone."""
    import gguf

    config, kinds = model.config, gguf.GGMLQuantizationType
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
        vocabulary = tokenizer["model"]["vocab"] | {
            t["content"]: t["id"] for t in tokenizer["added_tokens"]
        }
        special = {t["content"] for t in tokenizer["added_tokens"]}
        normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
        tokens = sorted(vocabulary, key=vocabulary.get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([control if token in special else normal for token in tokens])
        writer.add_token_merges(tokenizer["model"]["merges"])
        writer.add_bos_token_id(len(tokens) - 1)
        writer.add_eos_token_id(len(tokens) - 1)
    for name, module in model.named_modules():
        parts = name.split(".")
        known = ".".join(parts[2:]) if parts[0] == "h" else name
        if known not in NAMES:
            continue
        ours = f"blk.{parts[1]}.{NAMES[known]}" if parts[0] == "h" else NAMES[known]
        for part, tensor in (("weight", module.weight), ("bias", getattr(module, "bias", None))):
            if tensor is None:
                continue
            kind, values = kinds.F32, tensor.detach().float().numpy()
            if name == "wte":
                kind = kinds.F16
            elif isinstance(module, torch.nn.Linear) and part == "weight":
                kind = kinds.TQ2_0
            content = gguf.quants.quantize(values, kind)
            if kind == kinds.TQ2_0:
                error = abs(gguf.quants.dequantize(content, kind) - values).max()
                if error > 1e-3 * abs(values).max():
                    raise UserError(f"{name} is not ternary with one scale per row")
            writer.add_tensor(f"{ours}.{part}", content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(argv):
    if len(argv) != 2:
        raise UserError("it takes an exported FOLDER, and the name of the GGUF file")
    if not importlib.util.find_spec("gguf"):
        raise UserError("it takes the package gguf, which is not installed")
    model = tsld.GPT.from_pretrained(argv[0])
    if model.config.n_embd % 256:
        raise UserError(f"TQ2_0 takes widths that are multiples of 256, not {model.config.n_embd}")
    tokenizer = json.loads((Path(argv[0]) / "tokenizer.json").read_text())
    write_gguf(model, argv[1], tokenizer)
    print(f"{argv[1]}: {Path(argv[1]).stat().st_size:,} bytes")
    if importlib.util.find_spec("llama_cpp"):
        compare(model, argv[1])


def compare(model, path, count=2000, length=50):
    """Perplexity of `count` tokens of the Penn Treebank's validation text, and whether the greedy
    continuation of its first 16 tokens is the same."""
    import numpy as np
    from llama_cpp import Llama

    from data.texts import load_corpus, load_tokenizer

    block = min(512, model.config.block_size)
    _, description, texts = load_corpus("ptb")
    ids = load_tokenizer("gpt2").encode_ordinary(texts["valid"])[: count + 1]
    theirs = Llama(path, n_ctx=block, n_batch=block, logits_all=True, verbose=False)
    nats = 0.0
    for begin in range(0, count, block):
        part = ids[begin : begin + block + 1]
        theirs.reset()
        theirs.eval(part[:-1])
        logits = torch.from_numpy(np.array(theirs.scores[: len(part) - 1]))
        targets = torch.tensor(part[1:])
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    ours = tsld.evaluate(model, torch.tensor(ids), block)
    print(f"{description}: perplexity of {count} tokens")
    print(f"  this program {math.exp(ours):.3f}, llama.cpp {math.exp(nats / count):.3f}")
    text = model.generate(torch.tensor([ids[:16]]), length, temperature=0)[0].tolist()
    theirs.reset()
    continued = ids[:16]
    for _ in range(length):
        theirs.eval(continued[theirs.n_tokens :])
        continued = [*continued, int(np.argmax(theirs.scores[theirs.n_tokens - 1]))]
    same = sum(a == b for a, b in zip(text[16:], continued[16:]))
    print(f"  greedy text: {same} of {length} tokens are the same")


if __name__ == "__main__":
    sys.exit(run_as_command(sys.argv[1:], main))
