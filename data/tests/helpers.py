"""What several test files share.

train_small is imported where it is used, so that the tests of a file in data/ need only
that file and tsld.py."""

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.tasks import Example
from tsld import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[2]

WORDS = (
    "the quick brown fox jumps over the lazy dog and the cat sat on a mat "
    "while it rained all day long .\n"
)

# --------------------------------------------------------------------------------------
# Tensors and models

MICRO = GPTConfig(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_embd=12)


def randn(*shape, seed=0):
    """Standard normal float32 numbers, the same for every version of torch."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32))


def micro_gpt(seed=0, **changes):
    """A GPT of the shape MICRO with `changes`, in evaluation mode. All its parameters,
    biases and norms included, are well away from their initial values."""
    torch.manual_seed(seed)
    model = GPT(replace(MICRO, **changes))

    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)

    return model.eval()


def micro_ids(B=2, T=8, seed=0):
    """Random token ids for a micro GPT, int64 (B, T)."""
    ids = np.random.default_rng(seed).integers(MICRO.vocab_size, size=(B, T))
    return torch.from_numpy(ids)


# A text for a micro GPT to learn.
TEXT = micro_ids(1, 60, seed=1)[0]


def softmax64(logits):
    """The softmax over the last axis as a float64 array."""
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def assert_equal(weights, expected):
    """Two state dicts are the same, bit for bit."""
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


class Watched(TorchDispatchMode):
    """Notes of what size and of which types the tensors are that operations make."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            self.largest = max(self.largest, tensor.numel())
            self.dtypes.add(tensor.dtype)
        return made


# --------------------------------------------------------------------------------------
# Files


def sha256(content):
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


GONE = object()


def altered(content, place, value):
    """A copy of nested dictionaries with a value, or without one if it is GONE, at a
    place: the names from the outermost to the innermost."""
    name, *rest = place
    if rest:
        return content | {name: altered(content[name], rest, value)}
    if value is GONE:
        return {key: part for key, part in content.items() if key != name}
    return content | {name: value}


class Payload:
    """What a malicious pickle holds: whoever runs its code gets a file `executed`."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def published(state, prefix=""):
    """The state of a GPT as the published files of GPT-2 have it: linear weights are
    (in, out), and the causal mask is there as well. The files have two layouts: names
    are bare, or they have the prefix "transformer." and the tied head is stored too."""
    file = {}
    for name, tensor in state.items():
        is_linear = name.startswith("h.") and tensor.dim() == 2
        if name != "lm_head.weight":
            file[prefix + name] = tensor.t().clone() if is_linear else tensor

    size = len(state["wpe.weight"])
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    for layer in range(layers):
        file[f"{prefix}h.{layer}.attn.bias"] = torch.ones(size, size).tril()[None, None]
        file[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    if prefix:
        file["lm_head.weight"] = state["wte.weight"]

    return file


def save_tokenizer_of_bytes(folder):
    """Saves a tokenizer of 256 tokens, the bytes, as transformers does. Skips the test
    where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: rank for rank, letter in enumerate(alphabet)}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.pre_tokenizer = byte_level
    bytewise.decoder = tokenizers.decoders.ByteLevel()

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise)
    tokenizer.save_pretrained(folder)


def save_llama(folder, settings=None, generation=None, seed=0, **sizes):
    """A LLaMA and a tokenizer of bytes, saved as transformers does."""
    save_tokenizer_of_bytes(folder)
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": 64}
    config = transformers.LlamaConfig(**shape | sizes, **settings or {})
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)

    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


# --------------------------------------------------------------------------------------
# The main command


def tiny_preset():
    """The preset `tiny` made minute: it trains within milliseconds."""
    import train_small

    preset = train_small.PRESETS["tiny"]

    return replace(
        preset,
        gpt=GPTConfig(block_size=16, vocab_size=2048, n_layer=1, n_head=2, n_embd=8),
        teacher=replace(preset.teacher, steps=4, batch_size=4),
        student=replace(preset.student, steps=6, batch_size=4),
        student_tokens=300,
    )


SHORT = ["--steps", "1", "--teacher-steps", "1"]  # where the steps do not matter


def finished_run(folder, *flags):
    """The folder of a run of the minute preset with these flags beside its own."""
    import train_small

    (folder / "text.txt").write_bytes((WORDS * 40).encode())
    flags = ["--data", str(folder / "text.txt"), "--device", "cpu", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_small.PRESETS, "tiny", tiny_preset())
        assert train_small.main([*flags, "--out", str(folder / "out")]) == 0
    return folder / "out"


def exit_code(argv, command):
    """Runs a command, a function of argv; None stands for train_small's own."""
    import train_small

    if command is None:
        return train_small.main(argv)

    return train_small.main(argv, command)


def run(argv, capsys, command=None):
    """Runs a command, by default the main one, and returns what it printed."""
    code = exit_code(argv, command)

    assert code == 0
    return capsys.readouterr().out


def refused(argv, capsys, words, command=None):
    """Runs a command that must end with exit code 2 and one line on stderr that has
    these words. Returns what it printed before."""
    code = exit_code(argv, command)
    printed = capsys.readouterr()

    assert code == 2, printed.out
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err, printed.err

    return printed.out


def interrupt_at(line, monkeypatch):
    """SIGTERM comes when a line of progress that begins so is shown."""
    from data.lib import resumable

    show = resumable.show_progress

    def interrupted(text, last=False):
        if text.startswith(line):
            signal.raise_signal(signal.SIGTERM)
        show(text, last)

    monkeypatch.setattr(resumable, "show_progress", interrupted)


def has_loopback():
    """Whether processes can talk over 127.0.0.1, which a machine cut off from every
    network may not have."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=1).close()
    except OSError:
        return False

    return True


def run_together(program, *arguments, torchrun=False, **environment):
    """Runs a Python file in two processes that train together. They are started by
    torchrun or, which is faster, as it starts them. Returns the first one and what
    it printed; torchrun prints what both do."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # of two processes each would need its own
        **environment,
    }
    command = [sys.executable, str(program), *map(str, arguments)]
    if torchrun:
        torchrun_here = ["-m", "torch.distributed.run", "--standalone"]
        command[1:1] = [*torchrun_here, "--nproc_per_node=2"]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120
        )

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2"}

    both = []
    for rank in ("0", "1"):
        process = subprocess.Popen(
            command,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        both.append(process)
    printed = [process.communicate(timeout=120) for process in both]
    return subprocess.CompletedProcess(command, both[0].returncode, *printed[0])


class Beside:
    """A function of an empty folder that waits for other processes. It runs beside the
    tests, from before the first one on; whoever calls it gets what it returned.

    The tests need one core, and the machine has two."""

    functions = []

    def __init__(self, function):
        self.function = function
        self.module = function.__module__
        self.running = None
        self.functions.append(self)

    def start(self, pool):
        self.folder = tempfile.TemporaryDirectory()
        self.running = pool.submit(self.function, Path(self.folder.name))

    def __call__(self):
        return self.running.result()


# --------------------------------------------------------------------------------------
# Tasks

# Of 2, 3 and 5 choices, one of them a beginning of another, and one beyond ASCII.
QUESTIONS = [
    Example("The cat sat.\nQuestion: Yes or no?\nAnswer:", ("no", "yes"), 1),
    Example("Question: Why?\nAnswer:", ("because", "because it rained", "ünïcödé"), 2),
    Example("It is long", ("a", "b", "c", "d d d d", "e"), 0),
    Example("The cat sat.\nQuestion: Yes or no?\nAnswer:", ("no", "yes"), 0),
]


def nats_of_choice(model, tokenizer, prompt, choice, block_size):
    """-log P of a choice's tokens after its prompt, by one pass of the model for each
    token and in float64. What is too long for a block loses its beginning."""
    ids = tokenizer.encode_ordinary(f"{prompt} {choice}")
    lost = max(0, len(ids) - block_size - 1)
    first = len(tokenizer.encode_ordinary(prompt)) - lost
    ids = ids[lost:]

    nats = 0.0
    for n in range(max(1, first), len(ids)):
        logits = model(torch.tensor([ids[:n]]))[0, -1].detach()
        nats -= math.log(softmax64(logits)[ids[n]])

    return nats
