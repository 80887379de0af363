"""What a packed student is for: it writes text, and other programs open it."""

import codecs

import torch

from data.lib import fast, files, hf
from data.lib.errors import UserError
from data.lib.transcript import SAMPLING
from data.texts import load_tokenizer


def load_student(path, presets):
    """A packed GPT, and the tokenizer of its preset. Raises UserError if none of the
    presets has its vocabulary."""
    model = files.load_packed(path)
    vocab_size = model.config.vocab_size
    for preset in presets.values():
        if preset.gpt.vocab_size == vocab_size:
            return model, load_tokenizer(preset.tokenizer)
    raise UserError(f"no tokenizer has the {vocab_size} tokens of {path}")


def write_text(model, tokenizer, prompt, seed):
    """Prints the prompt and its continuation, as it comes, until the block is full.
    Raises UserError if the prompt is empty or fills it."""
    ids = tokenizer.encode_ordinary(prompt)
    block_size = model.config.block_size
    if not 0 < len(ids) < block_size:
        sizes = f"--prompt has {len(ids)} tokens, the model's block {block_size}"
        raise UserError(f"{sizes}: it takes 1 to {block_size - 1} tokens")

    model = fast.speed_up(model)
    ids = torch.tensor([ids], device=model.wte.weight.device)
    torch.manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for new in model.stream(ids, block_size - ids.shape[1], **SAMPLING):
        content = tokenizer.decode_single_token_bytes(new.item())
        text = decoder.decode(content)  # keeps a part of a character for later
        print(text, end="", flush=True)
    print()


def export(words, presets, source=None):
    """Writes a packed model as transformers opens it. words: file, folder, and
    "float16" if its numbers are to take half of the space. source: the Source that the
    student was made from, unless that is a preset. Raises UserError."""
    is_right = len(words) == 2 or (len(words) == 3 and words[2] == "float16")
    if not is_right or words[1] == "":
        raise UserError("--export takes FILE FOLDER, and after them float16 or nothing")

    file, folder = words[:2]
    dtype = torch.float16 if len(words) == 3 else torch.float32
    with files.all_or_nothing(folder) as new:
        if source is None:
            student, tokenizer = load_student(file, presets)
        else:
            student = files.load_packed(file, into=source.model)
            tokenizer = source.tokenizer
        hf.export(student, tokenizer, new, dtype)
    print(f"{folder}: {file}, its weights in {dtype}")
