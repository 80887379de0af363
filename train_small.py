"""Trains a small GPT teacher and its ternary student with tsld.py, and says what the student lost.

    python train_small.py --loss tsld

The run first, then its parts: models and training, data, presets, processes, command line. The
method itself is all in tsld.py."""

import argparse
import codecs
import copy
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as sharded

import tsld
from data import exchange, tasks
from data.files import all_or_nothing, check_folder, check_space, fingerprint, hold
from data.progress import show_progress, stop_on_signal, time_left
from data.texts import PARTS, UserError, load_corpus, load_tokenizer
from tsld import GPT, LOSSES, GPTConfig, QuantLinear, TrainConfig

class TrainingStopped(KeyboardInterrupt):
    """A signal asked training to stop; the checkpoint is on disk."""


# --------------------------------------------------------------------------------------------------
# The run


def run(args):
    """Corpus, teacher, rounded teacher, students; then the table, a sample of text and
    results.json."""
    out = check_folder(args.out)
    with hold(out) if processes()[0] == 0 else nullcontext():
        train_and_compare(set_up(args), args, out)


def train_and_compare(setup, args, out):
    losses = LOSSES if args.loss == "all" else (args.loss,)
    for path in [] if args.resume else [out / f"student-{loss}.pt" for loss in losses]:
        if path.exists() and processes()[0] == 0:  # of an earlier run: not for a later --resume
            os.replace(path, path.with_suffix(".previous.pt"))
    teacher = train_teacher(setup)
    rounded = tsld.quantize_model(copy.deepcopy(teacher), args.bits, args.granularity)
    scores = {"teacher": score(setup, teacher), "ptq": score(setup, rounded)}
    sizes = {"bytes_fp32": sum(4 * p.numel() for p in teacher.parameters())}
    linear = [m for m in rounded.modules() if isinstance(m, QuantLinear)]
    sizes["linear_bytes_fp32"] = sum(4 * m.weight.numel() for m in linear)
    table = [("teacher", scores["teacher"], sizes["bytes_fp32"])]
    packed = pack(rounded, out / "rounded.packed")["bytes_packed"]
    table.append((f"teacher in {args.bits} bits, untrained", scores["ptq"], packed))
    frozen, results = frozen_teacher(setup, teacher, scores["teacher"]), []
    for loss in losses:
        student = tsld.quantize_model(copy.deepcopy(teacher), args.bits, args.granularity)
        config = replace(setup.student, loss=loss)
        seconds, scores["student"] = train_student(setup, student, config, frozen, loss)
        sizes |= pack(student, out / f"student-{loss}.packed")
        weight = config.gt_weight if loss == "tsld" else None
        name = f"student, {loss} + {weight:g} gt" if weight else f"student, {loss}"
        table.append((name, scores["student"], sizes["bytes_packed"]))
        row = {"loss": loss, **{key: getattr(args, key) for key in ("bits", "granularity", "seed")}}
        row |= {"gt_weight": weight, "model": setup.source.name, "data": setup.corpus}
        row |= {"tokenizer": setup.source.tokenizer.name, "task": args.task}
        for part, prefix in (("valid", ""), ("test", "test_")):
            for who in ("teacher", "ptq", "student"):
                values = scores[who].get(part, {})
                row |= {f"{prefix}{who}_{unit}": x for unit, x in values.items()}
        trained = config.steps * config.batch_size * config.block_size
        row |= {**sizes, "train_seconds": seconds, "tokens_per_second": trained / seconds}
        results.append(row)
        write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    print_table(table)
    print_sample(setup, student, loss)
    print(f"\nresults: {out / 'results.json'}")
    if args.bits == 2 and isinstance(student, GPT):
        file = out / f"student-{loss}.packed"
        print(f"more text: python train_small.py --generate {file} --prompt 'the company said'")


@dataclass
class Source:
    """Where the teacher starts."""

    name: str  # a key of PRESETS, or what --model named
    model: nn.Module
    tokenizer: object  # a tiktoken.Encoding or a TheirTokenizer
    preset: object  # a Preset
    init: str  # "scratch" or "pretrained"


@dataclass
class Setup:
    """What the parts of one command share."""

    args: argparse.Namespace
    device: torch.device
    corpus: str
    source: Source
    tokens: dict  # part -> int64 (n,); "student" is the share of "train" that the student sees
    examples: list | None  # of --task, to evaluate on
    teacher: TrainConfig
    student: TrainConfig


def set_up(args):
    device, out = choose_device(args.device), check_folder(args.out)
    with first_process_first():  # it downloads, the others find
        if args.task:
            train, examples = tasks.load_task(args.task)
            name, texts = args.task, {"train": train, "valid": examples, "test": examples}
            description = f"{name}, {len(train):,} examples, {len(examples):,} to evaluate on"
        else:
            examples, (name, description, texts) = None, load_corpus(args.data)
        print(f"corpus: {description}", flush=True)
        source = choose_source(args, device)
    preset, block_size = source.preset, source.preset.gpt.block_size
    check_space(out, source.model, 1 + (len(LOSSES) if args.loss == "all" else 1))
    encode = source.tokenizer.encode_ordinary
    if args.task:
        encode = lambda examples: tasks.training_text(source.tokenizer, examples)
    tokens = {part: torch.tensor(encode(texts[part])) for part in PARTS}
    tokens["student"] = tokens["train"][: args.student_tokens or preset.student_tokens]
    for part, tokens_of_part in tokens.items():
        least = block_size + 1 if part in ("train", "student") else 2
        if len(tokens_of_part) < least:
            length = f"{len(tokens_of_part)} tokens, and it takes {least} or more"
            raise UserError(f"the {part} text is too short: {length}")
    lr = args.lr or student_lr(preset, args.bits)
    given = {"batch_size": args.batch_size, "accumulate": args.accumulate, "lr": lr}
    given |= {"temperature": args.tsld_temperature, "gt_weight": args.gt_weight}
    given = {key: value for key, value in given.items() if value is not None}
    batch = preset.teacher.batch_size  # in as many parts as asked for, or a few more
    parts = next(n for n in range(min(args.accumulate, batch), batch + 1) if batch % n == 0)
    teacher, student = replace(preset.teacher, accumulate=parts), replace(preset.student, **given)
    full = limit(student, preset.student_epochs, block_size, tokens["student"])
    student.steps = args.steps or full
    teacher.steps = limit(teacher, preset.teacher_epochs, block_size, tokens["train"])
    # A run shortened to try things out shortens the teacher as well.
    teacher.steps = args.teacher_steps or math.ceil(teacher.steps * min(1, student.steps / full))
    for config in (teacher, student):
        config.dtype, config.seed = args.dtype or default_dtype(device), args.seed
        config.block_size = block_size
        if config.batch_size % (processes()[1] * config.accumulate):
            parts = f"{processes()[1]} processes times {config.accumulate} parts (--accumulate)"
            raise UserError(f"a batch of {config.batch_size} does not divide into {parts}")
    if student.dtype == "bfloat16" and default_dtype(device) == "float32":
        print("dtype: this device has no fast bfloat16, a step may take 20 times that of float32")
    return Setup(args, device, name, source, tokens, examples, teacher, student)


def score(setup, model, parts=("valid", "test")):
    """Each part's perplexity per token and bits per byte. A task has one part: only its right
    answers count, and its accuracies are added. TrainingDiverged: a loss is not finite."""
    model, scores, tokenizer = spread(model, setup.device), {}, setup.source.tokenizer
    block_size, more = setup.student.block_size, {}
    for part in parts[:1] if setup.examples else parts:
        if setup.examples:
            given = model, tokenizer, setup.examples, block_size, show_progress
            nats, predicted, cut, more = tasks.evaluate_task(*given)
            nats /= len(predicted)
            cut = f", {cut} of them cut from the left to fit a block of {block_size}" if cut else ""
            show_progress(f"scored {len(setup.examples)} examples{cut}", last=True)
        else:
            nats = tsld.evaluate(model, setup.tokens[part], block_size)
            predicted = setup.tokens[part][1:].tolist()
        if not nats < math.log(sys.float_info.max):
            raise tsld.TrainingDiverged(f"the {part} text costs {nats} nats per token")
        size = len(tokenizer.decode_bytes(predicted))
        bpb = tsld.bits_per_byte(nats, len(predicted), size)
        scores[part] = {"ppl": math.exp(nats), "bpb": bpb} | more
    return scores


def pack(model, path):
    """Packs a 2-bit model in place and saves it. Returns the file's size and that of its ternary
    weights, in bytes; 4-bit models have no packed form, and None for both."""
    if any(isinstance(m, QuantLinear) and m.bits != 2 for m in model.modules()):
        path.unlink(missing_ok=True)  # of an earlier run
        return {"bytes_packed": None, "linear_bytes_packed": None}
    tsld.pack_model(model)
    with first_process_first():
        if processes()[0] == 0:
            tsld.save_model(path, model)
    weights = sum(m.packed.numel() for m in model.modules() if isinstance(m, tsld.PackedLinear))
    return {"bytes_packed": path.stat().st_size, "linear_bytes_packed": weights}


def print_table(rows):
    """rows: (name, scores, bytes or None)."""
    names = {"ppl": "perplexity", "bpb": "bits/byte", "valid": "validation"}
    parts = {part: [names.get(unit, unit) for unit in units] for part, units in rows[0][1].items()}
    titles = ("".join(f"{title:>11}" for title in units) for units in parts.values())
    above = "".join(f"{names.get(p, p):>{11 * len(units)}}" for p, units in parts.items())
    print(f"\n{'':32}{above}{'size':>13}\n{'':32}{''.join(titles)}{'bytes':>13}")
    for name, scores, size in rows:
        values = [x for part in scores.values() for x in part.items()]
        cells = "".join(f"{x:11.2f}" if unit == "ppl" else f"{x:11.4f}" for unit, x in values)
        print(f"{name:32}{cells}{'not packed' if size is None else f'{size:,}':>13}")


SAMPLING = {"temperature": 0.8, "top_k": 200}


def print_sample(setup, student, loss, prompt_length=16, length=64):
    """The student's continuation of the first words of the validation text."""
    block_size = setup.student.block_size
    prompt = setup.tokens["valid"][: min(prompt_length, block_size // 2)]
    length = min(length, block_size - len(prompt))
    torch.manual_seed(setup.args.seed)
    student, prompt = student.to(setup.device), prompt[None].to(setup.device)
    ids = student.generate(prompt, max_new_tokens=length, **SAMPLING)[0].tolist()
    decode, n = setup.source.tokenizer.decode, prompt.shape[1]
    print(f"\nthe {loss} student continues “{decode(ids[:n]).strip()}”:\n{decode(ids[n:]).strip()}")


def load_student(path):
    """A packed GPT, and the tokenizer of its preset."""
    model = tsld.load_model(path)
    names = {preset.gpt.vocab_size: preset.tokenizer for preset in PRESETS.values()}
    if model.config.vocab_size not in names:
        raise UserError(f"no tokenizer has the {model.config.vocab_size} tokens of {path}")
    return model, load_tokenizer(names[model.config.vocab_size])


def export(args):
    """Writes a packed model as other programs open it."""
    file, folder, *dtype = args.export if len(args.export) > 1 else ("", "", "")
    if dtype not in ([], ["float16"]) or not folder or args.model in PRESETS:
        raise UserError("--export takes FILE FOLDER [float16], and --model for transformers alone")
    dtype = torch.float16 if dtype else torch.float32
    with all_or_nothing(folder) as new:
        if args.model is None:
            model, tokenizer = load_student(file)
            model.save_pretrained(new, dtype)
            exchange.save_tokenizer(tokenizer, new)
        else:
            source = load_theirs(args)
            student = tsld.load_model(file, into=copy.deepcopy(source.model))
            exchange.unpacked(student, source.model).to(dtype).save_pretrained(new)
            source.tokenizer.theirs.save_pretrained(new)
    print(f"{folder}: {file}, its weights in {dtype}")


def generate(args):
    """Writes the packed model's continuation of the prompt, as it comes, until its block is
    full."""
    (model, tokenizer), device = load_student(args.generate), choose_device(args.device)
    prompt, block = tokenizer.encode_ordinary(args.prompt), model.config.block_size
    if not 0 < len(prompt) < block:
        length = f"--prompt has {len(prompt)} tokens, and the model's block is {block}"
        raise UserError(f"{length}: it takes 1 to {block - 1} tokens")
    torch.manual_seed(args.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens

    def show(new):
        text = decoder.decode(tokenizer.decode_single_token_bytes(new.item()))
        print(text, end="", flush=True)

    print(args.prompt, end="", flush=True)
    ids = torch.tensor([prompt], device=device)
    model.to(device).generate(ids, block - len(prompt), **SAMPLING, on_token=show)
    print()


# --------------------------------------------------------------------------------------------------
# Teacher and student


def teacher_path(setup):
    """The teacher's file is named after everything that makes it, so that it is found again."""
    source = setup.source
    start, text = fingerprint(source.model.parameters()), fingerprint([setup.tokens["train"]])
    made_of = [source.name, architecture(source.model), start, asdict(setup.teacher), text]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    return Path(setup.args.out) / f"teacher-{Path(source.name).name}-{key}.pt"


def train_teacher(setup):
    """A run that was killed while training it goes on where it was."""
    teacher, path = setup.source.model, teacher_path(setup)
    found = ", found there" if path.exists() else ""
    print(f"teacher: {setup.teacher.steps} steps, kept in {path}{found}", flush=True)
    train(setup, "teacher", teacher, setup.tokens["train"], setup.teacher, path, resume=True)
    return teacher


def frozen_teacher(setup, teacher, scores):
    """The teacher as the students see it: where products are taken in bfloat16, stored in it, if
    its validation perplexity is then the same to three digits."""
    frozen, exact = teacher, scores["valid"]["ppl"]
    if setup.student.dtype == "bfloat16":
        half = copy.deepcopy(teacher).to(torch.bfloat16)
        rounded = score(setup, half, ["valid"])["valid"]["ppl"]
        same = math.isclose(rounded, exact, rel_tol=5e-4)
        stored = "bfloat16" if same else "float32; in bfloat16"
        figures = f"perplexity {rounded:.2f}, in float32 {exact:.2f}"
        print(f"teacher for distillation: {stored} ({figures})", flush=True)
        frozen = half if same else teacher
    frozen.fingerprint = fingerprint(teacher.parameters())  # for the students' checkpoints
    return spread(frozen, setup.device)


def train_student(setup, student, config, frozen, name, watch=None):
    """Trains a quantized copy of the teacher in place; returns the seconds that took, and its
    scores. name: of the checkpoint. watch(step, model): called after each step."""
    path = Path(setup.args.out) / f"student-{name}.pt"
    print(f"student, {name}: {config.steps} steps, kept in {path}", flush=True)
    label, text, resume = f"student, {name}", setup.tokens["student"], setup.args.resume
    seconds, trained = train(setup, label, student, text, config, path, resume, frozen, watch)
    return seconds, score(setup, trained)


CHECKPOINT_SECONDS = 120  # between two checkpoints: what a power cut may cost


def train(setup, label, model, tokens, config, path, resume, teacher=None, watch=None):
    """tsld.train with a progress line and checkpoints. The state is written to `path` now and then,
    at the end, and when a signal asks to stop; the one before is kept beside it. Returns the
    seconds that training took, those before a resume included, and the trained model: `model`
    itself, or where several processes share its weights, the shared copy of it."""
    if setup.args.compile:  # block by block: they are alike, so one compilation serves all
        for block in blocks_of(model):
            block.compile()
    quantizers = {(m.bits, m.granularity) for m in model.modules() if isinstance(m, QuantLinear)}
    identity = asdict(config) | {"model": architecture(model), "quantizers": sorted(quantizers)}
    identity |= {"text": fingerprint([tokens]), "teacher": getattr(teacher, "fingerprint", None)}
    if any(isinstance(m, nn.Dropout) and m.p for m in model.modules()):
        identity["processes, which draw their own dropout"] = processes()[1]
    trained = spread(model, setup.device)
    optimizer = tsld.make_optimizer(trained, config)
    start, before = load_checkpoint(path, identity, trained, optimizer) if resume else (0, 0.0)
    began = saved = time.monotonic()
    per_step, speed = config.batch_size * config.block_size, "timing"
    try:
        with stop_on_signal() as received:
            steps = tsld.train(trained, tokens, config, teacher, optimizer, start)
            for step, loss in steps:
                now = time.monotonic()
                if step == start + 1:
                    first = now  # this step of a run is slower, and does not count
                else:
                    rate = (step - start - 1) / (now - first)
                    left = time_left((config.steps - step) / rate)
                    speed = f"{rate * per_step:,.0f} tokens/s, {left} left"
                line = f"{label}: step {step}/{config.steps}, loss {loss:.3f}, {speed}"
                show_progress(line, step == config.steps)
                if watch is not None:
                    watch(step, trained)
                stop, due = any_process(bool(received), now - saved >= CHECKPOINT_SECONDS)
                if stop or due or step == config.steps:
                    saved = time.monotonic()
                    seconds = before + saved - began
                    save_checkpoint(path, identity, trained, optimizer, step, seconds)
                if stop:
                    how = "the same command" + ("" if resume else " and --resume")
                    words = f"stopped after step {step} of {config.steps}; go on with {how}"
                    raise TrainingStopped(words)
    except tsld.TrainingDiverged as error:
        where = f"; the last checkpoint is {path}" if start or saved > began else ""
        raise tsld.TrainingDiverged(f"{error}{where}") from None
    if trained is not model:
        dist.barrier()  # until the first process has written it
        model.load_state_dict(tsld.read_file(path)["model"])
    trained.eval()
    return before + time.monotonic() - began, trained


# What a checkpoint holds does not depend on how many processes wrote it.
WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(path, identity, model, optimizer, step, seconds):
    weights, averages = sharded.get_state_dict(model, optimizer, options=WHOLE)
    if processes()[0] > 0:
        return
    state = {"identity": identity, "step": step, "seconds": seconds}
    new = path.with_suffix(".new.pt")
    tsld.write_file(new, state | {"model": weights, "optimizer": averages})
    if path.exists():
        os.replace(path, path.with_suffix(".previous.pt"))
    os.replace(new, path)


def load_checkpoint(path, identity, model, optimizer):
    """Step and seconds of the checkpoint; 0 and 0 where there is none."""
    if not path.exists():
        path = path.with_suffix(".previous.pt")  # killed between the two renames of save_checkpoint
    if not path.exists():
        return 0, 0.0
    try:
        state = tsld.read_file(path)
    except tsld.CheckpointError as error:
        before = path.with_suffix(".previous.pt")
        before = f", {before} is the one before it" if before.exists() else ""
        raise tsld.CheckpointError(f"{error}: delete it{before}") from None
    with tsld.refusing(path, "is no checkpoint of this program"):
        found, step, seconds = dict(state["identity"]), int(state["step"]), float(state["seconds"])
        keys = found.keys() | identity.keys()
        differ = [key for key in keys if found.get(key) != identity.get(key)]
    if differ and ".previous" in path.suffixes:  # an earlier run's, set aside
        return 0, 0.0
    for key in sorted(differ):
        other = f"{key} is {found.get(key)}, not {identity.get(key)}"
        raise tsld.CheckpointError(f"{path} is of another run: {other}; delete it")
    with tsld.refusing(path, "is no checkpoint of this program"):
        weights = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        groups = lambda: optimizer.param_groups
        kept = lambda: [{**g, "params": 0, "lr": 0, "betas": [*g["betas"]]} for g in groups()]
        before = kept()
        # torch takes an empty one for nothing to do, and does not look at an average's shape.
        if not all(weights.values()) or not 0 < step <= identity["steps"] or not 0 <= seconds < 1e9:
            raise ValueError
        sharded.set_state_dict(model, optimizer, **weights, options=WHOLE)
        if kept() != before:
            raise ValueError
        for parameter, averages in optimizer.state.items():
            if any(averages[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError
    return step, seconds


def architecture(model):
    """All that says which model this is but for its weights."""
    return asdict(model.config) if isinstance(model, GPT) else repr(model)


# --------------------------------------------------------------------------------------------------
# Presets, and models from elsewhere


@dataclass
class Preset:
    """A model and how it is trained. Training ends with whichever comes first, its steps or its
    epochs (an epoch is as many random pieces of block_size tokens as the text is long)."""

    gpt: GPTConfig
    tokenizer: str
    teacher: TrainConfig
    student: TrainConfig
    teacher_epochs: float = math.inf
    student_epochs: float = math.inf
    student_tokens: int | None = None  # the student sees the first so many; None: all
    lr_4bit: float | None = None  # of a 4-bit student, which has less to win back; None: student.lr


# The schedule of the paper's GPT-2 runs.
GPT2 = Preset(
    gpt=GPTConfig(block_size=512, dropout=0.1),
    tokenizer="gpt2",
    teacher=TrainConfig(loss="gt", steps=10**6, batch_size=4, lr=1e-4),
    student=TrainConfig(steps=10**6, batch_size=4, lr=1e-4),
    teacher_epochs=3,
    student_epochs=90,
)
PRESETS = {
    # Under five minutes on two CPU cores; a teacher that saw more text than its student. More than
    # 11 epochs would only teach it a small text by heart.
    "tiny": Preset(
        gpt=GPTConfig(block_size=128, vocab_size=2048, n_layer=6, n_head=4, n_embd=128),
        tokenizer="bpe2048",
        teacher=TrainConfig(loss="gt", steps=350, batch_size=32, lr=4e-3),
        student=TrainConfig(steps=100, batch_size=32, lr=1e-3, temperature=20.0, gt_weight=0.25),
        lr_4bit=1e-4,
        teacher_epochs=11,
        student_tokens=100_000,
    ),
    "gpt2": GPT2,
    "gpt2-medium": replace(GPT2, gpt=replace(GPT2.gpt, n_layer=24, n_head=16, n_embd=1024)),
    "gpt2-large": replace(GPT2, gpt=replace(GPT2.gpt, n_layer=36, n_head=20, n_embd=1280)),
    "gpt2-xl": replace(GPT2, gpt=replace(GPT2.gpt, n_layer=48, n_head=25, n_embd=1600)),
}
PUBLISHED = {  # name to SHA-256 of its pytorch_model.bin, where it is known
    "gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421",
    "gpt2-medium": None,
    "gpt2-large": None,
    "gpt2-xl": None,
}


def student_lr(preset, bits):
    return preset.lr_4bit if bits == 4 and preset.lr_4bit else preset.student.lr


def limit(config, epochs, block_size, tokens):
    """The smaller of config.steps and `epochs`, in steps."""
    if math.isinf(epochs):
        return config.steps
    return min(config.steps, math.ceil(epochs * len(tokens) / (config.batch_size * block_size)))


def choose_source(args, device):
    """The model and tokenizer that are asked for, or the best that can be had without failing."""
    if args.model is not None and args.model not in PRESETS:
        return load_theirs(args)
    if args.model is None and args.init != "pretrained" and device.type == "cuda":
        try:
            return load_preset("gpt2", args)
        except UserError as error:
            print(f"model: tiny, instead of gpt2: {error}", flush=True)
    return load_preset(args.model or "tiny", args)


def load_preset(name, args):
    preset = PRESETS[name]
    size = args.block_size or preset.gpt.block_size
    preset = replace(preset, gpt=replace(preset.gpt, block_size=size))
    init = args.init or ("pretrained" if name in PUBLISHED else "scratch")
    if init == "pretrained" and name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise UserError(f"--init pretrained: there are published weights for {known} alone")
    if init == "pretrained" and size > GPTConfig.block_size:
        raise UserError(f"--block-size {size}: {name} takes {GPTConfig.block_size} tokens at most")
    tokenizer = load_tokenizer(preset.tokenizer)
    torch.manual_seed(args.seed)
    model = GPT(preset.gpt)
    if init == "pretrained":
        exchange.load_published(name, PUBLISHED[name], model)
    return Source(name, model, tokenizer, preset, init)


def load_theirs(args):
    """Any causal language model of transformers, with its own tokenizer and GPT-2's schedule."""
    if args.init == "scratch":
        raise UserError(f"--init scratch: {args.model} starts from the weights it comes with")
    try:
        model, tokenizer = exchange.load_theirs(args.model, args.loss in ("l2l", "all"))
    except UserError as error:
        raise UserError(f"--model {error}; without it there are {', '.join(PRESETS)}")
    if processes()[1] == 1 and exchange.logits_are_hidden_times_head(model):
        type(model).hidden = lambda self, ids: self.base_model(ids)[0]  # for lean_loss
    size = args.block_size or GPT2.gpt.block_size
    positions = getattr(model.config, "max_position_embeddings", size)
    if (args.block_size or 0) > positions:
        raise UserError(f"--block-size {size}: {args.model} takes {positions} tokens at most")
    gpt = replace(GPT2.gpt, block_size=min(positions, size))
    return Source(args.model, model, tokenizer, replace(GPT2, gpt=gpt), "pretrained")


def choose_device(name):
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        remedy = "without it a run takes what there is"
        raise UserError(f"--device {name}: there is no such device here; {remedy}")


def default_dtype(device):
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = any(has[name] for name in has if "bf16" in name)
    return "bfloat16" if fast else "float32"


# --------------------------------------------------------------------------------------------------
# Processes

def processes():
    """This process's rank and the number of processes that train together: 0 and 1 without
    torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_process(*values):
    """Each boolean, true where it is in one of the processes: all of them then do the same."""
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.int32, device=device)
    dist.all_reduce(total)
    return total.bool().tolist()


def blocks_of(model):
    """The layers of a language model: its longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def spread(model, device):
    """The model on its device; where several processes train together, a copy whose parameters (and
    gradients, and optimizer state) are shared out, each process holding a part of every one."""
    if processes()[1] == 1 or isinstance(model, fsdp.FSDPModule):
        return model.to(device)
    model = copy.deepcopy(model).to(device)
    for block in blocks_of(model):
        fsdp.fully_shard(block)
    fsdp.fully_shard(model)
    if isinstance(model, GPT):
        for name in ("hidden", "generate"):  # what lean_loss and GSM8K's answers take
            fsdp.register_fsdp_forward_method(model, name)
    return model


@contextmanager
def first_process_first():
    """The first process does what follows alone, then all the others do."""
    rank, world = processes()
    if world > 1 and rank > 0:
        dist.barrier()
    try:
        yield
    finally:  # where the first one fails, the others fail by themselves
        if world > 1 and rank == 0:
            dist.barrier()


@contextmanager
def process_group():
    """torchrun's processes, where there are any, train together; the first one alone prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        with open(os.devnull, "w") as nowhere:
            with nullcontext() if dist.get_rank() == 0 else redirect_stdout(nowhere):
                yield
    finally:
        dist.destroy_process_group()


def write_text(path, text):
    if processes()[0] == 0:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------
# Command line


def number(kind, least=0, or_equal=False, finite=True):
    """An argparse type: a number above `least`, or from it on."""

    def parse(text):
        value = kind(text)
        if not (value > least or or_equal and value == least) or finite and value >= 2**53:
            raise ValueError
        return value

    bound = f"from {least} on" if or_equal else f"above {least}"
    parse.__name__ = f"{kind.__name__} {bound}"  # argparse says: invalid NAME value: TEXT
    return parse


count, positive = number(int), number(float)
# Group to flags: the name, the default, what argparse makes of the value, and what it is for.
FLAGS = {
    "the student": [
        ("loss", "tsld", {"choices": (*LOSSES, "all")}, "what it learns from"),
        ("bits", 2, {"type": int, "choices": (2, 4)}, "bits per weight, 2 is ternary"),
        ("granularity", "tensor", {"choices": ("tensor", "channel")}, "what shares a scale"),
        ("tsld-temperature", None, {"type": number(float, finite=False)},
         "τ of the token scale, for --loss tsld (default 20 for tiny, else 10; inf: logit)"),
        ("gt-weight", None, {"type": number(float, or_equal=True)},
         "weight of the ground-truth loss added to tsld (default 0.25 for tiny, else 0): labels "
         "help a student whose teacher has not finished learning its text"),
    ],
    "model and data": [
        ("model", None, {}, f"{', '.join(PRESETS)}, or one of transformers by path or name "
         "(default gpt2 on a GPU, else tiny)"),
        ("init", None, {"choices": ("scratch", "pretrained")},
         "where the teacher starts (default scratch for tiny, else pretrained)"),
        ("data", None, {}, "ptb, pydoc, a text file, or a folder with {train,valid,test}.txt "
         "(default ptb, or pydoc where that cannot be had)"),
        ("task", None, {"choices": tuple(tasks.PROMPTS)}, "train on one of the paper's tasks "
         "instead of a text, and say how often the model chooses the right answer"),
        ("student-tokens", None, {"type": count},
         "how much of the training text the student sees (default 100000 for tiny, else all)"),
    ],
    "training": [
        ("steps", None, {"type": count}, "of the student (default 100 for tiny, else 90 epochs); "
         "fewer shorten the teacher's as well"),
        ("teacher-steps", None, {"type": count}, "of the teacher (default 350 for tiny, at "
         "most 11 epochs, else 3 epochs)"),
        ("batch-size", None, {"type": count}, "of the student, in sequences (default 32 for tiny, "
         "else 4)"),
        ("block-size", None, {"type": number(int, 1)},
         "tokens of a sequence (default 128 for tiny, else 512)"),
        ("accumulate", 1, {"type": count},
         "parts that a batch, the teacher's as well, is taken in to save memory"),
        ("lr", None, {"type": positive}, "peak learning rate of the student (default 1e-3 for tiny "
         "with 2 bits, else 1e-4)"),
        ("dtype", None, {"choices": ("float32", "bfloat16")},
         "of matrix products (default bfloat16 where the hardware has it)"),
        ("compile", False, {"action": "store_true"}, "torch.compile: a slow start, faster steps"),
    ],
    "the run": [
        ("seed", 0, {"type": number(int, or_equal=True)}, "of weights, data order and sampling"),
        ("device", None, {}, "cpu, cuda, mps, ... (default the accelerator where there is one)"),
        ("out", "out", {}, "folder for checkpoints and results"),
        ("resume", False, {"action": "store_true"}, "go on with a student that was interrupted"),
    ],
    "instead of training": [
        ("generate", None, {"metavar": "FILE"}, "write text with a packed model"),
        ("prompt", "the", {}, "what the text begins with"),
        ("export", None, {"metavar": ("FILE", "FOLDER"), "nargs": "+"}, "write a packed model as "
         "transformers opens it; a third word, float16, halves it"),
    ],
}  # fmt: skip
ALL = {name: default for flags in FLAGS.values() for name, default, _, _ in flags}
INSTEAD = {"generate": {"generate", "prompt", "seed", "device"}, "export": {"export", "model"}}
TRAIN = ALL.keys() - {"generate", "prompt", "export"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(argv, takes=None, description=__doc__.split("\n")[0], **defaults):
    """The flags as a namespace. takes: those of another command than this file's own."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, default, how, about in flags:
            default = defaults.get(name, default)
            shown = "" if default is None or default is False else f" (default {default})"
            if takes is None or name in takes:
                group.add_argument(f"--{name}", help=(about + shown).replace("%", "%%"), **how)
    given = {name.replace("_", "-"): x for name, x in vars(parser.parse_args(argv)).items()}
    command = next((name for name in INSTEAD if name in given), "training")
    takes = takes if takes is not None else INSTEAD.get(command, TRAIN)
    unused = [f"--{name}" for name in given if name not in takes]
    if unused:
        parser.error(f"{', '.join(unused)} has no meaning for {command}")
    values = ALL | defaults | given
    if values["task"] and "data" in given:
        parser.error("--data and --task: give one")
    if values["loss"] not in ("tsld", "all") and given.keys() & {"tsld-temperature", "gt-weight"}:
        parser.error(f"--tsld-temperature, --gt-weight: not for --loss {values['loss']}")
    for name in ("generate", "data", "model", "out", "device"):
        if values[name] == "":
            parser.error(f"--{name} is empty")
    name = values["model"]
    if name not in (None, *PRESETS) and "/" not in name and not Path(name).is_dir():
        known = f"none of {', '.join(PRESETS)}, no folder, and no owner/name of transformers"
        parser.error(f"--model {name} is {known}")
    return argparse.Namespace(**{name.replace("-", "_"): x for name, x in values.items()})


def main(argv=None, command=None):
    """Exit code: 0, 2 for what the user can mend, 1 for a diverged, 130 for a stopped run. command:
    another than this file's own, a function of argv."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for a terminal that has no τ
    try:
        if command is None:
            args = parse(argv)
            chosen = generate if args.generate else export if args.export else run
            command = lambda argv: chosen(args)
        with process_group():
            command(argv)
        return 0
    except (UserError, tsld.CheckpointError) as error:
        message, code = error, 2
    except OSError as error:  # a disk full, a file gone
        message, code = f"{error.filename}: {error.strerror}" if error.filename else error, 2
    except (MemoryError, RuntimeError) as error:
        remedy = "try --accumulate, or a smaller --batch-size or --block-size"
        known = {"allocate": f"not enough memory: {remedy}"}
        known |= {"inline_container": "a file cannot be written: is the disk full?"}  # torch.save
        messages = [known[word] for word in known if word in str(error)]
        if isinstance(error, RuntimeError) and not messages:
            raise
        message, code = (messages or [known["allocate"]])[0], 2
    except tsld.TrainingDiverged as error:
        message, code = error, 1
    except KeyboardInterrupt as error:
        message, code = str(error) or "interrupted; the checkpoints so far are kept", 130
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
