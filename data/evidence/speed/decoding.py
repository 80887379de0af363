"""The packed model: the product of one row, text from a model, file and memory.

Decoding goes through data.lib.fast, as that of train_small.py --generate."""

import collections
import copy
import importlib.util
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import tsld
from data.evidence.speed.llama import write_gguf
from data.evidence.speed.timing import (
    in_new_process,
    instruction_sets,
    peak_memory,
    print_ratios,
    seconds_per_call,
)
from data.lib import fast, hf
from data.lib.files import (
    load_packed,
    load_tensors,
    read_checked,
    save_packed,
    write_checked,
)
from tsld import GPT, GPTConfig, PackedLinear

SAMPLE = tsld.sample
MATRICES = ((2304, 768), (3072, 768), (768, 3072), (4096, 4096))
PROMPT = 8  # tokens
LENGTH = 120  # new tokens
GREEDY = 200  # new tokens that C and PyTorch are compared by


def bench(device):
    """Prints all tables, of GPT-2 small's shape with random weights."""
    torch.manual_seed(0)
    name = f"CPU, {torch.get_num_threads()} threads, {instruction_sets()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    bandwidth = measure_bandwidth(device)
    print(f"{name}, torch {torch.__version__}")
    print(f"memory read at {bandwidth / 1e9:.1f} GB/s")

    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        bench_products(device, bandwidth)

        model = GPT(GPTConfig()).eval()
        packed = tsld.pack_model(tsld.quantize_model(copy.deepcopy(model)))
        write_checked(folder / "model.pt", model.state_dict())
        save_packed(folder / "model.packed", packed)
        packed = fast.speed_up(load_packed(folder / "model.packed").to(device))
        bench_generation(device, bandwidth, model.to(device), packed, folder)
        compare_with_pytorch(packed, folder)
        bench_files(folder)


def measure_bandwidth(device):
    """Bytes per second that this machine reads from memory."""
    block = torch.zeros(2**26, device=device)  # 268 MB, beyond most caches
    seconds = seconds_per_call({"sum": lambda: block.sum()}, device)["sum"]

    return 4 * block.numel() / seconds


# --------------------------------------------------------------------------------------
# Products


def bench_products(device, bandwidth):
    """One row of activations times a weight matrix: what generating a token consists
    of. As in a model, the weights come from memory: each contestant goes through copies
    that no cache holds."""
    for out, width in MATRICES:
        codes = torch.randint(-1, 2, (out, width), dtype=torch.int8, device=device)
        packed = tsld.pack_ternary(codes)
        scale = torch.ones(1, 1, device=device)
        layers = {
            "torch FP32 linear": dense_layer(codes.float()),
            "torch bf16 linear": dense_layer(codes.bfloat16()),
            "packed": packed_layer(PackedLinear(width, packed, scale)),
        }
        x = torch.randn(1, width, device=device)
        copies = math.ceil(2**29 / (4 * codes.numel()))  # 0.5 GB in FP32
        functions = {name: in_turn(layers[name], x, copies) for name in layers}
        seconds = seconds_per_call(functions, device)
        values = {name: 1e6 * seconds[name] for name in seconds}
        values["bandwidth alone, packed"] = 1e6 * packed.nbytes / bandwidth
        print_ratios(f"matrix-vector product, {out} x {width}", "µs", values)


def packed_layer(layer):
    """The layer as a model has it that fast.speed_up has been given."""
    return fast.speed_up(nn.Sequential(layer))[0]


def dense_layer(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def in_turn(layer, x, copies):
    """A function that takes x through one copy of the layer after the other."""
    x = x.to(getattr(layer, "weight", x).dtype)
    layers = itertools.cycle([copy.deepcopy(layer) for _ in range(copies)])

    return lambda: next(layers)(x)


# --------------------------------------------------------------------------------------
# Text


def bench_generation(device, bandwidth, model, packed, folder):
    """Tokens per second after the first one, batch 1, greedy."""
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
    contestants = {"FP32": lambda: rate_of(model, prompt)}
    if importlib.util.find_spec("transformers"):
        contestants["FP32, transformers generate"] = transformers_contestant(prompt)
    contestants["packed"] = lambda: rate_of(packed, prompt)
    llama_packages = ("gguf", "llama_cpp")

    if device.type == "cpu" and all(map(importlib.util.find_spec, llama_packages)):
        name = "llama.cpp, ternary weights in TQ2_0"
        contestants[name] = llama_contestant(packed, prompt, folder)

    rates = {name: [] for name in contestants}
    for _ in range(6):
        for name, contestant in contestants.items():
            rates[name].append(contestant())

    # The first turn warms up.
    values = {name: statistics.median(rates[name][1:]) for name in rates}

    # All but the positions is read for each token.
    tensors = [*packed.parameters(), *packed.buffers()]
    size = sum(tensor.nbytes for tensor in tensors) - packed.wpe.weight.nbytes
    values["bandwidth alone, packed"] = bandwidth / size
    print_ratios("generation, GPT-2 small's shape", "tokens/s", values, True)
    for name in values:
        if name != "packed":
            print(f"    packed: {values['packed'] / values[name]:5.2f} of {name}")


def rate_of(model, prompt):
    """Tokens per second of one of our models, after the first."""
    times = []
    for new in model.stream(prompt, LENGTH, temperature=0):
        new.item()  # waits for a GPU
        times.append(time.perf_counter())

    return (LENGTH - 1) / (times[-1] - times[0])


def transformers_contestant(prompt):
    """The same for a GPT-2 of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    model.to(prompt.device)

    def seconds(n):
        begin = time.perf_counter()
        length = {"min_new_tokens": n, "max_new_tokens": n}
        model.generate(prompt, **length, do_sample=False, pad_token_id=0)

        return time.perf_counter() - begin

    return lambda: (LENGTH - 1) / (seconds(LENGTH) - seconds(1))


def llama_contestant(packed, prompt, folder):
    """The same for the packed model in llama.cpp, with as many threads."""
    from llama_cpp import Llama

    path = folder / "model.gguf"
    write_gguf(unpacked(packed, folder), path)

    # logits_all: where they are read, each step writes its own alone.
    model = Llama(
        str(path),
        n_ctx=256,
        n_threads=torch.get_num_threads(),
        logits_all=True,
        verbose=False,
    )

    def rate():
        model.reset()
        model.eval(prompt[0].tolist())
        begin = time.perf_counter()
        for n in range(PROMPT, PROMPT + LENGTH - 1):
            model.eval([int(model.scores[n - 1].argmax())])

        return (LENGTH - 1) / (time.perf_counter() - begin)

    return rate


def unpacked(packed, folder):
    """The FP32 model whose weights are the numbers that the packed ones stand for."""
    hf.save_gpt2(packed, folder)
    return hf.load_gpt2(folder)


def compare_with_pytorch(packed, folder):
    """Prints how far the packed model's text is that of the same numbers in PyTorch."""
    model = unpacked(packed, folder).to(packed.wte.weight.device)
    print(f"\nthe packed model and the same weights in FP32, {GREEDY} greedy tokens")

    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=rng)
        prompt = prompt.to(packed.wte.weight.device)
        text, logits = greedy(packed, prompt)
        expected, expected_logits = greedy(model, prompt)

        same = (text == expected).sum().item()
        difference = (logits - expected_logits).abs().max().item()
        title = f"prompt {seed}: {same} tokens are the same"
        print(f"  {title:50} logits differ by {difference:.1e} at most")


def greedy(model, prompt):
    """The tokens that follow a prompt greedily, and the logits of each."""
    logits = []

    def keep(of_token, *rest):
        logits.append(of_token[0].clone())
        return SAMPLE(of_token, *rest)

    with mock.patch.object(tsld, "sample", keep):
        tokens = torch.cat([*model.stream(prompt, GREEDY, temperature=0)], dim=1)

    return tokens[0], torch.stack(logits)


# --------------------------------------------------------------------------------------
# Files and memory


def bench_files(folder):
    """Bytes on disk, and bytes resident at most in a process that loads the file and
    generates."""
    files = {"FP32": folder / "model.pt", "packed": folder / "model.packed"}
    sizes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
    print_ratios("file", "MB", sizes)
    for part, size in parts_of_file(files["packed"]).most_common():
        print(f"    of it {part:44}{size / 1e6:14,.1f}")

    peaks = {}
    first_token = {}
    for name, path in files.items():
        measured = in_new_process("decoding", "load_and_generate", str(path))
        start, peak, seconds = measured
        peaks[f"{name}, beyond importing torch"] = (peak - start) / 1e6
        first_token[name] = 1e3 * seconds

    title = "from the prompt to the first token, a new process"
    print_ratios(title, "ms", first_token)
    if peak_memory():
        print_ratios("memory to load and generate, peak", "MB", peaks)


def parts_of_file(path):
    """The bytes of a packed file's tensors, by what they are."""
    sizes = collections.Counter()
    for name, tensor in load_tensors(path)["tensors"].items():
        if name == "lm_head.weight":
            continue  # the embedding under its other name, stored once

        part = "scales, biases, norms, float32"
        if name == "wte.weight":
            part = "embedding, float16"
        elif name == "wpe.weight":
            part = "positions, float16"
        elif name.endswith(".packed"):
            part = "ternary weights"

        sizes[part] += tensor.nbytes

    return sizes


def load_and_generate(path):
    """Prints the peak of resident bytes before and after, and the seconds that the
    first token took from the prompt on; for in_new_process."""
    start = peak_memory()

    if path.endswith(".packed"):
        model = load_packed(path)
    else:
        with torch.device("meta"):
            model = GPT(GPTConfig())
        model.load_state_dict(read_checked(path), assign=True)
        model.lm_head.weight = model.wte.weight

    begin = time.perf_counter()
    if path.endswith(".packed"):
        model = fast.speed_up(model)  # finds the library in the cache
    prompt = torch.zeros(1, PROMPT, dtype=torch.long)
    times = []
    for _ in model.stream(prompt, 8):
        times.append(time.perf_counter() - begin)
    print(json.dumps([start, peak_memory(), times[0]]))
