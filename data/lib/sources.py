"""What a run starts from: texts, and a teacher's model before its training."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from data import tasks
from data.lib import hf
from data.lib.errors import UserError
from data.lib.published import PUBLISHED, load_published
from data.texts import PARTS, load_corpus, load_tokenizer
from tsld import GPT, GPTConfig


def load_texts(corpus, task):
    """A name, part -> text or examples, and the examples to evaluate on, None without a
    task. Says what they are. Raises UserError if they cannot be had."""
    if task is None:
        name, description, texts = load_corpus(corpus)
        print(f"corpus: {description}", flush=True)
        return name, texts, None

    train, examples = tasks.load_task(task)
    counts = f"{len(train):,} examples, {len(examples):,} to evaluate on"
    print(f"corpus: {task}, {counts}", flush=True)
    return task, {"train": train, "valid": examples, "test": examples}, examples


def encode(texts, source, n_student):
    """Two dicts: part -> token ids, int64 (n,), and part -> how many bytes of the text
    all tokens but the first stand for, for the parts that are scored as texts.

    "student" is the beginning of "train": n_student tokens, those of the preset where
    that is None, or all. Raises UserError if a text is too short."""
    tokens, sizes = {}, {}
    for part in PARTS:
        text = texts[part]
        if isinstance(text, str):
            ids = source.tokenizer.encode_ordinary(text)
        else:
            ids = tasks.training_text(source.tokenizer, text)
        tokens[part] = torch.tensor(ids)

        if isinstance(text, str) and part != "train":
            first = source.tokenizer.size_before(text, ids, 1)
            sizes[part] = len(text.encode()) - first
    tokens["student"] = tokens["train"][: n_student or source.preset.student_tokens]

    for part, ids in tokens.items():
        is_trained_on = part in ("train", "student")
        least = source.preset.gpt.block_size + 1 if is_trained_on else 2
        if len(ids) < least:
            counts = f"{len(ids)} tokens, and it takes {least} or more"
            raise UserError(f"the {part} text is too short: {counts}")
    return tokens, sizes


@dataclass
class Source:
    """A teacher before its training."""

    name: str  # of a preset, or what --model named
    model: nn.Module
    tokenizer: object  # a tiktoken.Encoding or a TransformersTokenizer
    preset: object  # a Preset, with the block size that the model gets
    init: str  # "scratch" or "pretrained"
    granularity: str = "tensor"  # of its student's scales, where none is asked for


def with_block_size(preset, size):
    """The preset with another length of its sequences."""
    return replace(preset, gpt=replace(preset.gpt, block_size=size))


def from_preset(name, preset, init=None, block_size=None, seed=0):
    """A GPT of the preset's shape. Raises UserError if its vocabulary or its weights
    cannot be had, or it does not take so many tokens."""
    has_weights = name in PUBLISHED
    init = init or ("pretrained" if has_weights else "scratch")
    size = block_size or preset.gpt.block_size
    if init == "pretrained" and not has_weights:
        names = ", ".join(PUBLISHED)
        raise UserError(f"--init pretrained: only {names} have published weights")
    if size > 2**40:  # beyond any memory, and soon beyond the sizes that torch knows
        raise UserError(f"--block-size {size} is too large for any memory")
    if init == "pretrained" and size > GPTConfig.block_size:
        longest = GPTConfig.block_size
        raise UserError(f"--block-size {size}: {name} takes {longest} tokens at most")

    tokenizer = load_tokenizer(preset.tokenizer)
    preset = with_block_size(preset, size)
    torch.manual_seed(seed)
    model = GPT(preset.gpt)
    if init == "pretrained":
        load_published(name, model)
    return Source(name, model, tokenizer, preset, init)


def from_transformers(name, preset, init=None, block_size=None, attentions=False):
    """A causal language model of transformers, with its own tokenizer and the preset's
    schedule. attentions: L2L looks at them. Raises UserError if it cannot be had."""
    if init == "scratch":
        raise UserError(f"--init scratch: {name} comes with its weights")
    model, tokenizer = hf.load_model(name, attentions)

    longest = model.config.block_size
    if block_size and block_size > longest:
        sizes = f"{name} takes {longest} tokens at most"
        raise UserError(f"--block-size {block_size}: {sizes}")
    size = min(longest, block_size or preset.gpt.block_size)
    preset = with_block_size(preset, size)
    return Source(name, model, tokenizer, preset, "pretrained", "channel")
