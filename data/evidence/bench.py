"""Speed and memory: each table is one run, its rows measured in turns, its ratios against its first
row.

    python -m data.evidence.bench               # the packed product, and text from a packed model
    python -m data.evidence.bench training      # a training step with each of the losses
    python -m data.evidence.bench memory        # what the paper's models take, on paper

Any other load on the machine spoils the figures. So does a virtual machine that puts two threads on
one processor, where they wait for each other: OMP_PROC_BIND=true before the command prevents it."""

import collections
import copy
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import tsld
from data.evidence.llama import write_gguf
from train_small import UserError, choose_device, default_dtype
from train_small import main as run_as_command
from tsld import GPT, LOSSES, GPTConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def timed(function, calls, device):
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def seconds_per_call(functions, device, rounds=7, least=0.05):
    """Median seconds of each function, in turns of `least` seconds, so that all meet the same
    noise."""
    for function in functions.values():
        function()  # compiles what is compiled
    calls = {
        name: math.ceil(least / timed(function, 1, device)) for name, function in functions.items()
    }
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function, calls[name], device))
    return {name: statistics.median(times) for name, times in seconds.items()}


def print_ratios(title, unit, values, larger_is_better=False):
    """values: name to number; the first one is the baseline."""
    print(f"\n{title:52}{unit:>14}{'ratio':>8}")
    baseline = next(iter(values.values()))
    for name, value in values.items():
        ratio = value / baseline if larger_is_better else baseline / value
        print(f"  {name:50}{value:14,.1f}{ratio:8.2f}")


def instruction_sets():
    """What of this processor's vector instructions decides the speed of the products."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.exists() else []
    named = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return " ".join(name for name in named if name in flags) or "instruction sets unknown"


def bench_bandwidth(device):
    """Bytes per second that this machine reads from memory."""
    block = torch.zeros(2**26, device=device)  # 268 MB, beyond most caches
    return 4 * block.numel() / seconds_per_call({"sum": lambda: block.sum()}, device)["sum"]


def bench_matvec(device, bandwidth):
    """One row of activations times a weight matrix: what generating a token consists of. As in a
    model, the weights come from memory: each contestant goes through copies that no cache holds."""
    for shape in ((2304, 768), (3072, 768), (768, 3072), (4096, 4096)):
        codes = torch.randint(-1, 2, shape, dtype=torch.int8, device=device)
        scale, x = torch.ones(1, 1, device=device), torch.randn(1, shape[1], device=device)
        packed, half_x = tsld.pack_ternary(codes), x.bfloat16()
        copies = math.ceil(2**29 / (4 * codes.numel()))  # 0.5 GB in FP32

        def in_turn(product, weight):
            weights = itertools.cycle([weight.clone() for _ in range(copies)])
            return lambda: product(next(weights))

        functions = {
            "torch FP32 linear": in_turn(lambda weight: F.linear(x, weight), codes.float()),
            "torch bf16 linear": in_turn(lambda weight: F.linear(half_x, weight), codes.bfloat16()),
            "packed": in_turn(lambda weight: tsld.ternary_matmul(x, weight, scale), packed),
        }
        values = {
            name: 1e6 * seconds for name, seconds in seconds_per_call(functions, device).items()
        }
        values["bandwidth alone, packed"] = 1e6 * packed.numel() / bandwidth
        print_ratios(f"matrix-vector product, {shape[0]} x {shape[1]}", "µs", values)


def bench_generation(device, bandwidth, model, packed, folder):
    """Tokens per second after the first one, batch 1, greedy."""
    prompt, length = torch.randint(model.config.vocab_size, (1, 8), device=device), 120

    def ours(model):
        times = []
        model.generate(
            prompt, length, 0, on_token=lambda new: times.append((new.item(), time.perf_counter()))
        )
        return (length - 1) / (times[-1][1] - times[0][1])

    contestants = {"FP32": lambda: ours(model)}
    if importlib.util.find_spec("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(device)

        def seconds(n):
            begin = time.perf_counter()
            theirs.generate(
                prompt, min_new_tokens=n, max_new_tokens=n, do_sample=False, pad_token_id=0
            )
            return time.perf_counter() - begin

        contestants["FP32, transformers generate"] = lambda: (
            (length - 1) / (seconds(length) - seconds(1))
        )
    contestants["packed"] = lambda: ours(packed)
    if device.type == "cpu" and all(map(importlib.util.find_spec, ("gguf", "llama_cpp"))):
        theirs_packed = llama_cpp_model(packed, folder)

        def llama_cpp():
            theirs_packed.reset()
            theirs_packed.eval(prompt[0].tolist())
            begin = time.perf_counter()
            for n in range(prompt.shape[1], prompt.shape[1] + length - 1):
                theirs_packed.eval([int(theirs_packed.scores[n - 1].argmax())])
            return (length - 1) / (time.perf_counter() - begin)

        contestants["llama.cpp, ternary weights in TQ2_0"] = llama_cpp
    rates = {name: [] for name in contestants}
    for turn in range(6):
        for name, contestant in contestants.items():
            rates[name].append(contestant())
    values = {
        name: statistics.median(rate[1:]) for name, rate in rates.items()
    }  # the first warms up
    read = sum(t.numel() * t.element_size() for t in (*packed.parameters(), *packed.buffers()))
    values["bandwidth alone, packed"] = bandwidth / (read - packed.wpe.weight.numel() * 2)
    print_ratios("generation, GPT-2 small's shape", "tokens/s", values, larger_is_better=True)


def llama_cpp_model(packed, folder):
    """The same model in llama.cpp, with as many threads."""
    from llama_cpp import Llama

    packed.save_pretrained(folder)
    write_gguf(GPT.from_pretrained(folder), folder / "model.gguf")
    # logits_all: where they are read, each step writes its own alone.
    setting = {"n_threads": torch.get_num_threads(), "logits_all": True, "verbose": False}
    return Llama(str(folder / "model.gguf"), n_ctx=256, **setting)


def in_new_process(function, *arguments):
    """What a function of this file prints, as JSON, in a process whose memory is all its own."""
    code = f"from data.evidence import bench; bench.{function}(*{arguments!r})"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))


def peak_memory():
    """Bytes that this process has had resident at most; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0


def load_and_generate(path):
    """Prints the peak of resident bytes before and after, and the seconds that the first token took
    from the prompt on; for in_new_process."""
    start, times = peak_memory(), []
    if path.endswith(".packed"):
        model = tsld.load_model(path)
    else:
        with torch.device("meta"):
            model = GPT(GPTConfig())
        model.load_state_dict(tsld.read_file(path), assign=True)
        model.lm_head.weight = model.wte.weight
    begin = time.perf_counter()
    note = lambda new: times.append(time.perf_counter() - begin)
    model.generate(torch.zeros(1, 8, dtype=torch.long), 8, on_token=note)
    print(json.dumps([start, peak_memory(), times[0]]))


def bench_memory(folder):
    """Bytes on disk, and bytes resident at most in a process that loads the file and generates."""
    files = {"FP32": folder / "model.pt", "packed": folder / "model.packed"}
    print_ratios("file", "MB", {name: path.stat().st_size / 1e6 for name, path in files.items()})
    sizes = collections.Counter()
    for name, tensor in tsld.read_file(files["packed"])["tensors"].items():
        part = {"wte.weight": "embedding, float16", "wpe.weight": "positions, float16"}.get(name)
        part = part or (
            "ternary weights" if name.endswith(".packed") else "scales, biases, norms, float32"
        )
        sizes[part] += tensor.numel() * tensor.element_size()
    for part, size in sizes.most_common():
        print(f"    of it {part:44}{size / 1e6:14,.1f}")
    peaks, first = {}, {}
    for name, path in files.items():
        start, peak, seconds = in_new_process("load_and_generate", str(path))
        peaks[f"{name}, beyond importing torch"] = (peak - start) / 1e6
        first[name] = 1e3 * seconds
    print_ratios("from the prompt to the first token, a new process", "ms", first)
    if Path("/proc/self/status").exists():
        print_ratios("memory to load and generate, peak", "MB", peaks)


# Layers, width, heads, vocabulary; sequences and their length.
TRAINING_SHAPES = (
    (4, 128, 4, 2048, 32, 128),
    (6, 384, 6, 50257, 8, 256),
    (12, 768, 12, 50257, 4, 512),
)


def training_steps(shape, rows):
    """One function per row that takes a training step. Rows: ("plain", dtype), a step of the
    full-precision model written the nanoGPT way; ("plain, ours", dtype); or (one of LOSSES, dtype),
    of a ternary student."""
    n_layer, n_embd, n_head, vocab_size, B, T = shape
    device = choose_device(None)
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, vocab_size, n_layer, n_head, n_embd)).to(device)
    ids, targets = torch.randint(vocab_size, (2, B, T), device=device)
    student, half = (
        tsld.quantize_model(copy.deepcopy(model)),
        copy.deepcopy(model).to(torch.bfloat16),
    )
    optimizers = {}

    def nanogpt_loss():
        logits = model(ids)  # there until the backward pass is over
        loss = F.cross_entropy(logits.view(-1, vocab_size), targets.view(-1))
        loss.backward()

    def step(trained, gradients):
        if trained not in optimizers:
            optimizers[trained] = tsld.make_optimizer(trained, TrainConfig())
        gradients()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizers[trained].step()
        optimizers[trained].zero_grad()

    def step_of(name, dtype):
        if name == "plain":
            return lambda: step(model, nanogpt_loss)
        trained = student if name in LOSSES else model
        teacher = half if dtype == "bfloat16" else model  # see frozen_teacher
        config = TrainConfig(loss=name if name in LOSSES else "gt", dtype=dtype)

        def gradients():
            with torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
                loss = tsld.training_loss(
                    trained, teacher, ids, targets, config, config.loss != "l2l"
                )
            loss.backward()

        return lambda: step(trained, gradients)

    return {row: step_of(*row) for row in rows}


def training_speeds(shape, rows, rounds):
    """Prints the seconds of a step of each row, measured in turns; for in_new_process."""
    seconds = seconds_per_call(training_steps(shape, rows), choose_device(None), rounds)
    print(json.dumps([seconds[row] for row in rows]))


def training_memory(shape, row):
    """Prints the peak of resident bytes of two training steps; for in_new_process."""
    function = training_steps(shape, [row])[row]
    function()
    function()
    gpu = torch.cuda.is_available()
    print(json.dumps(torch.cuda.max_memory_allocated() if gpu else peak_memory()))


def bench_training(rounds=3):
    """Tokens per second and peak memory of a training step."""
    fast = default_dtype(choose_device(None))
    rows = [("plain", "float32"), ("plain, ours", "float32")]
    rows += [(loss, dtype) for dtype in dict.fromkeys(("float32", fast)) for loss in LOSSES]
    for shape in TRAINING_SHAPES:
        n_layer, n_embd, _, vocab_size, B, T = shape
        title = f"training, {n_layer} x {n_embd}, vocabulary {vocab_size}, batch {B} x {T}"
        print(f"\n{title:52}{'tokens/s':>14}{'ratio':>8}{'peak MB':>10}{'ratio':>8}", flush=True)
        seconds = in_new_process("training_speeds", shape, rows, rounds)
        memory = []
        for row, s in zip(rows, seconds):
            memory.append(in_new_process("training_memory", shape, row))
            print(f"  {', '.join(row):50}{B * T / s:14,.0f}{seconds[0] / s:8.2f}", end="")
            print(f"{memory[-1] / 1e6:10,.0f}{memory[-1] / memory[0]:8.2f}", flush=True)


def bench_growth(tokens=4096):
    """How a TSLD step of as many tokens grows with the length of the sequences and with the
    vocabulary."""
    print(f"\n{f'TSLD step, 4 x 256, FP32, {tokens} tokens':52}{'seconds':>14}{'peak MB':>10}")
    for vocab_size in (2048, 16384, 50257):
        for length in (128, 512, 2048):
            shape = (4, 256, 4, vocab_size, tokens // length, length)
            (seconds,) = in_new_process("training_speeds", shape, [("tsld", "float32")], 3)
            memory = in_new_process("training_memory", shape, ("tsld", "float32"))
            title = f"vocabulary {vocab_size:6,}, batch {tokens // length} x {length}"
            print(f"  {title:50}{seconds:14.2f}{memory / 1e6:10,.0f}", flush=True)


@dataclass
class Shape:
    """What a model's memory depends on."""

    layers: int
    width: int
    inner: int  # width of the MLP
    vocabulary: int
    positions: int  # learned ones
    matrices: int = 6  # per layer: 4 of width x width, and 2 of width x inner (3 in a gated MLP)
    biases: int = 5  # of `width` per layer: query, key, value, two outputs; 0: no bias anywhere
    tied: bool = True  # the head is the token embedding

    def parameters(self):
        """Numbers of linear weights, of embeddings and head, and of biases and norms."""
        w = self.width
        linear = self.layers * (4 * w * w + (self.matrices - 4) * w * self.inner)
        embeddings = (self.vocabulary * (1 if self.tied else 2) + self.positions) * w
        norm = 2 * w if self.biases else w  # RMSNorm has no bias
        rest = (
            self.layers * (2 * norm + self.biases * w + (self.inner if self.biases else 0)) + norm
        )
        return linear, embeddings, rest


# The models of the paper's tables.
SHAPES = {
    "GPT-2 0.1B": Shape(12, 768, 3072, 50257, 1024),
    "GPT-2 0.3B": Shape(24, 1024, 4096, 50257, 1024),
    "GPT-2 0.8B": Shape(36, 1280, 5120, 50257, 1024),
    "GPT-2 1.5B": Shape(48, 1600, 6400, 50257, 1024),
    "OPT 0.1B": Shape(12, 768, 3072, 50272, 2050),
    "OPT 1.3B": Shape(24, 2048, 8192, 50272, 2050),
    "OPT 2.7B": Shape(32, 2560, 10240, 50272, 2050),
    "OPT 6.7B": Shape(32, 4096, 16384, 50272, 2050),
    "GPT-Neo 1.3B": Shape(24, 2048, 8192, 50257, 2048, biases=2),
    "LLaMA 7B": Shape(32, 4096, 11008, 32000, 0, matrices=7, biases=0, tied=False),
}


def memory_on_paper(shape, batch=4, length=512, dtype="bfloat16", gpus=1):
    """Bytes: the model in FP32, in FP16 and packed, and what training its student under TSLD takes
    on each of `gpus` GPUs.

    Training holds the student with AdamW's two averages, and the teacher; several GPUs share these
    out. On top of them come at first the layers' dequantized weights and activations with the lean
    loss's scratch space and gradient of the head, and at the end the gradients of all weights; the
    larger of the two makes the peak. Of several GPUs each has its part of the batch, and gathers
    the weights that it works with: those of two blocks (this one, and the next on its way) and the
    embeddings, and their gradients before these are shared out.
    """
    linear, embeddings, rest = shape.parameters()
    N, product = linear + embeddings + rest, {"bfloat16": 2, "float32": 4}[dtype]
    state = (4 * N + 8 * N + product * N) / gpus
    # Per token and layer: the residual twice, in float32; both norms, query, key, value, and what
    # attention gives, laid out in two ways; the MLP's inner state before and after its
    # nonlinearity, and in a gated MLP the two factors as well.
    inner = (2 if shape.matrices == 6 else 4) * shape.inner
    sequences = math.ceil(batch / gpus)
    activations = (
        sequences
        * length
        * shape.layers
        * (2 * 4 * shape.width + product * (7 * shape.width + inner))
    )
    logits = min(tsld.SCRATCH_BYTES, 4 * sequences * length * shape.vocabulary)
    lean = 2 * logits + 4 * shape.vocabulary * shape.width
    gathered, gathered_gradients = 0, 0
    if gpus > 1:
        blocks = 2 * (linear + rest) / shape.layers
        gathered = (4 + product) * (blocks + embeddings)
        gathered_gradients = 4 * (blocks + embeddings)
    forward = product * linear + activations + lean + gathered
    backward = 4 * N / gpus + gathered + gathered_gradients
    return {
        "FP32": 4 * N,
        "FP16": 2 * N,
        "packed": linear / 4 + 2 * embeddings + 4 * rest,
        "training": state + max(forward, backward),
    }


def bench_memory_on_paper(gpus=(2, 4, 8), size=80e9):
    """A model fits where a tenth of the GPU is left for the rest."""
    print(f"\n{'GB, training with TSLD: bf16, 4 x 512 tokens':44}", end="")
    titles = ("FP32", "FP16", "packed", "training", *(f"each of {n}" for n in gpus))
    print("".join(f"{title:>11}" for title in titles), f"  GPUs of {size / 1e9:.0f} GB")
    for name, shape in SHAPES.items():
        memory = memory_on_paper(shape)
        for n in gpus:
            memory[n] = memory_on_paper(shape, gpus=n)["training"]
        fits = [n for n in (1, *gpus) if memory[n if n > 1 else "training"] < 0.9 * size]
        figures = "".join(f"{value / 1e9:11.2f}" for value in memory.values())
        print(f"  {name:42}{figures}  {fits[0] if fits else f'more than {gpus[-1]}'}")


def bench(device):
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    cpu = f"CPU, {torch.get_num_threads()} threads, {instruction_sets()}"
    bandwidth = bench_bandwidth(device)
    print(f"{torch.cuda.get_device_name() if gpu else cpu}, torch {torch.__version__}")
    print(f"memory read at {bandwidth / 1e9:.1f} GB/s")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        bench_matvec(device, bandwidth)
        model = GPT(GPTConfig()).eval()
        packed = tsld.pack_model(tsld.quantize_model(copy.deepcopy(model)))
        tsld.write_file(Path(folder) / "model.pt", model.state_dict())
        tsld.save_model(Path(folder) / "model.packed", packed)
        packed = tsld.load_model(Path(folder) / "model.packed")
        bench_generation(device, bandwidth, model.to(device), packed.to(device), Path(folder))
        bench_memory(Path(folder))


def main(argv):
    what = argv[0] if argv else "generation"
    if len(argv) > 1 or what not in ("generation", "training", "memory"):
        raise UserError(f"{' '.join(argv)}: the benchmark takes generation, training or memory")
    if what == "generation":
        bench(choose_device(None))
    elif what == "training":
        bench_training()
        bench_growth()
    else:
        bench_memory_on_paper()


if __name__ == "__main__":
    sys.exit(run_as_command(sys.argv[1:], main))
