"""What takes a GPU, in one run: training steps with each loss, taken as they are,
captured and compiled; the same beside nanoGPT's; the packed product and decoding.

    python -m data.evidence.speed.gpu --nanogpt FOLDER
    python -m data.evidence.speed.gpu --device cpu --steps 2    # dry run

fills OUT/gpu.json, row by row. It may be stopped and started again: rows that are there
stay. What tells most comes first. FOLDER is a checkout of github.com/karpathy/nanoGPT,
and may be left out. The gpu.json beside this file is a copy of such a file, from the
GPU that was to be had. On a CPU a dry run shows that every part works, with minute
models; there a captured step is one that is called again."""

import collections
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import train_small
import tsld
from data.evidence import rows
from data.evidence.rows import METHODS, Table
from data.evidence.speed import decoding, training
from data.evidence.speed.timing import peak_memory, seconds_per_call
from data.evidence.speed.training import TrainingSteps
from data.lib.command import number
from data.lib.devices import choose_device, default_dtype
from data.lib.folder import check_folder
from tsld import GPT, GPTConfig, PackedLinear, TrainConfig

ROOM = Path(__file__).resolve().parent

# bfloat16 products of dense matrices, per second: the denominator of the utilisation.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SHAPES = {
    "GPT-2 small": GPTConfig(),
    "GPT-2 medium": GPTConfig(1024, 50257, 24, 16, 1024),
}
DRY_SHAPES = {"minute": GPTConfig(64, 512, 2, 2, 64)}
LENGTH = 512  # tokens in a sequence
BATCHES = (4, 32)
DRY_LENGTH = 64
DRY_BATCHES = (2, 4)


def main(argv):
    about = "Measures what takes a GPU, to OUT/gpu.json."
    parser = rows.words_parser("speed.gpu", about)
    parser.add_argument("--nanogpt", metavar="FOLDER", help="with its model.py")
    parser.add_argument("--device", help="cuda, or cpu for a dry run")
    count = number(int, above=0)
    parser.add_argument("--steps", type=count, default=20, help="of each row")
    parser.add_argument("--out", default="out/gpu", help="folder for gpu.json")
    args = parser.parse_args(argv)

    device = choose_device(args.device)
    path = check_folder(args.out) / "gpu.json"
    parts = {"step": measure_step, "turns": measure_turns}
    parts |= {"product": measure_product, "decoding": measure_decoding}

    def measure(setting):
        free_memory()
        names = setting.keys() - {"part", "device", "steps"}
        words = {name: setting[name] for name in names}
        if setting["part"] == "turns":
            words["nanogpt"] = args.nanogpt
        return parts[setting["part"]](device, args.steps, **words)

    def label(setting):
        return ", ".join(str(value) for value in setting.values())

    run = {"device": device.type, "steps": args.steps}
    wanted = [part | run for part in wanted_parts(device, args.nanogpt)]
    rows.fill(path, wanted, measure, label, "speed.gpu")
    if not args.nanogpt:
        print("nanoGPT is not measured beside it: see --nanogpt")


def wanted_parts(device, nanogpt):
    """What is measured, in the order in which it is."""
    shapes = SHAPES
    batches = BATCHES
    matrices = decoding.MATRICES
    if device.type == "cpu":
        shapes = DRY_SHAPES
        batches = DRY_BATCHES
        matrices = ((8, 16),)

    def steps(losses, batches, ways):
        for loss in losses:
            for way in ways:
                for batch in batches:
                    for shape in shapes:
                        step = {"part": "step", "shape": shape, "batch": batch}
                        yield step | {"loss": loss, "way": way}

    # What is compiled takes the longest, and comes last.
    others = [loss for loss in tsld.LOSSES if loss != "tsld"]
    quick = ("eager", "captured")
    slow = [way for way in training.WAYS if way not in quick]
    parts = [*steps(["tsld"], batches, quick)]
    parts += steps(others, batches[:1], quick)
    parts += [{"part": "product", "out": o, "width": w} for o, w in matrices]
    parts.append({"part": "decoding"})
    if nanogpt:
        turns = [(shape, batch) for shape in shapes for batch in batches]
        parts += [{"part": "turns", "shape": s, "batch": b} for s, b in turns]
    parts += steps(["tsld"], batches, slow)
    return parts


def free_memory():
    """Of the part before, so that this peak is its own. A CPU's is not measured."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------
# Training steps


def sizes(shape, batch):
    """The GPTConfig of a name, and what TrainingSteps takes."""
    config = (SHAPES | DRY_SHAPES)[shape]
    length = DRY_LENGTH if shape in DRY_SHAPES else LENGTH
    widths = (config.n_layer, config.n_embd, config.n_head, config.vocab_size)
    return config, (*widths, batch, length)


def measure_step(device, steps, shape, batch, loss, way):
    """A step as tsld.train takes it: tokens per second, peak memory in bytes, whether
    it was captured, and the share of the device's products that the student's and the
    teacher's take, which are 6 and 2 per parameter and token."""
    config, of_steps = sizes(shape, batch)
    length = of_steps[-1]
    dtype = default_dtype(device)
    models = TrainingSteps(of_steps, device, way)
    gradients = models.gradients_of(loss, dtype)

    setting = TrainConfig(loss, steps=steps + 3, batch_size=batch, block_size=length)
    setting.dtype = dtype
    tokens = torch.randint(config.vocab_size, (10 * length,))
    teacher = models.teacher(dtype)
    training_run = tsld.train(
        models.student, tokens, setting, teacher, backward=gradients
    )

    # The first steps compile, record, and make the optimizer's state.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        next(training_run)
    began = time.perf_counter()
    for _ in training_run:
        pass
    tokens_per_second = steps * batch * length / (time.perf_counter() - began)

    measured = {"dtype": dtype, "tokens_per_second": tokens_per_second}
    measured["captured"] = getattr(gradients, "graph", None) is not None
    measured["peak_bytes"] = peak_memory()
    measured["utilisation"] = None
    if device.type == "cuda":
        measured["peak_bytes"] = torch.cuda.max_memory_allocated()
        parameters = sum(p.numel() for p in models.model.parameters())
        flops = (6 if loss == "gt" else 8) * parameters * tokens_per_second
        measured["utilisation"] = share_of_peak(flops)
    return measured


def share_of_peak(flops):
    """Of what the GPU could do, or None for one that is not in the table."""
    for family, peak in PEAK_FLOPS.items():
        if family in torch.cuda.get_device_name():
            return flops / peak
    return None


def measure_turns(device, steps, shape, batch, nanogpt):
    """Tokens per second of nanoGPT's compiled step and of this program's, taken in
    turns, each with its own models."""
    config, of_steps = sizes(shape, batch)
    dtype = default_dtype(device)
    functions = {"nanoGPT, compiled": training.nanogpt_step(nanogpt, of_steps, device)}

    # The plain step of the full-precision model, and TSLD's.
    for name in ("plain, this program", "tsld"):
        for way in ("captured", "captured, compiled"):
            models = TrainingSteps(of_steps, device, way)
            functions[f"{name}, {way}"] = training.taking(models, name, dtype)

    least = 0.01 if device.type == "cpu" else 1.0
    seconds = seconds_per_call(
        functions, device, rounds=max(1, steps // 4), least=least
    )
    tokens = batch * of_steps[-1]
    return {name: tokens / seconds[name] for name in seconds} | {"dtype": dtype}


# --------------------------------------------------------------------------------------
# The packed student


def measure_product(device, steps, out, width):
    """Microseconds of one row of activations times a matrix, each way in turns."""
    codes = torch.randint(-1, 2, (out, width), dtype=torch.int8, device=device)
    scale = torch.ones(1, 1, device=device)
    layers = {
        "FP32": decoding.dense_layer(codes.float()),
        "bf16": decoding.dense_layer(codes.bfloat16()),
        "packed": PackedLinear(width, tsld.pack_ternary(codes), scale),
    }
    x = torch.randn(1, width, device=device)
    with torch.inference_mode():
        functions = {name: decoding.in_turn(layers[name], x, 8) for name in layers}
        seconds = seconds_per_call(functions, device, rounds=3, least=0.01)
    return {f"{name}_us": 1e6 * seconds[name] for name in seconds}


def measure_decoding(device, steps):
    """Tokens per second of greedy decoding, batch 1, after the first token."""
    name = "minute" if device.type == "cpu" else "GPT-2 small"
    config = replace((SHAPES | DRY_SHAPES)[name], block_size=1024)
    torch.manual_seed(0)
    models = {"FP32": GPT(config), "bf16": GPT(config).to(torch.bfloat16)}
    models["packed"] = tsld.pack_model(tsld.quantize_model(GPT(config)))

    prompt = torch.randint(config.vocab_size, (1, decoding.PROMPT), device=device)
    rates = collections.defaultdict(list)
    for _ in range(3):
        for name, model in models.items():
            rates[name].append(decoding.rate_of(model.eval().to(device), prompt))
    return {f"{name}_tokens_per_second": max(rates[name]) for name in rates}


# --------------------------------------------------------------------------------------
# The tables


def tables():
    """Of the rows in the gpu.json beside this file, those that there are rows for."""
    found = rows.read_rows(ROOM, "gpu.json")
    of_part = collections.defaultdict(list)
    for row in found:
        of_part[row["part"]].append(row)

    made = [table_of_steps(of_part["step"])]
    if of_part["turns"]:
        made.append(table_of_turns(of_part["turns"]))
    packed = of_part["product"] + of_part["decoding"]
    if packed:
        made.append(table_of_packed(packed))
    return made


def table_of_steps(found):
    cells = collections.defaultdict(dict)
    for row in found:
        name = METHODS[row["loss"]]
        if row["way"] != "eager":
            name += f", {row['way']}"
        if "captured" in row["way"] and not row["captured"]:
            name += " (could not be)"
        if row["batch"] != BATCHES[0]:
            name += f", batch {row['batch']}"
        speed = f"{row['tokens_per_second']:,.0f}"
        share = f"{100 * row['utilisation']:.1f} %"
        cells[name][row["shape"]] = f"{speed}, {row['peak_bytes'] / 1e9:.1f}, {share}"

    lines = []
    for name in cells:
        lines.append([name, *(cells[name].get(shape, "") for shape in SHAPES)])
    columns = ["tokens/s, peak GB, share of the products", *SHAPES]
    text = (
        "One NVIDIA H200, training steps in bfloat16 of 4 x 512 tokens; the share of "
        "the GPU's matrix products is against 989 TFLOP/s. The run was stopped after "
        "these rows."
    )
    return Table("A training step on a GPU", text, columns, lines)


def table_of_turns(found):
    """Tokens per second, and as a ratio to nanoGPT's."""
    names = [name for name in found[0] if name.startswith(("nanoGPT", "plain", "tsld"))]
    lines = []
    for row in found:
        cells = [
            f"{row[name]:,.0f} ({row[name] / row[names[0]]:.2f})" for name in names
        ]
        lines.append([f"{row['shape']}, batch {row['batch']}", *cells])
    text = "Steps taken in turns, with the ratio to nanoGPT's plain step."
    return Table("Beside nanoGPT", text, ["tokens/s (ratio)", *names], lines)


def table_of_packed(found):
    lines = []
    for row in found:
        name = "decoding, GPT-2 small, tokens/s"
        unit = "_tokens_per_second"
        if row["part"] == "product":
            name = f"one row times {row['out']} x {row['width']}, µs"
            unit = "_us"
        numbers = [row[f"{kind}{unit}"] for kind in ("FP32", "bf16", "packed")]
        lines.append([name, *(f"{number:,.1f}" for number in numbers)])
    text = "The packed student on the GPU, where its product is PyTorch's."
    return Table("Packed, on a GPU", text, ["", "FP32", "bf16", "packed"], lines)


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
