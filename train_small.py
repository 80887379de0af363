"""Trains a small GPT teacher and its ternary student, and says what rounding cost and
what distillation won back.

    python train_small.py --loss tsld

The run comes first, then its parts: set-up, scores, training, what it prints, other
commands, presets, command line. The method is in tsld.py, all else in data/lib/.
"""

import argparse
import copy
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import tsld
from data import tasks
from data.lib import files, resumable, transcript
from data.lib.checkpoints import architecture, key_of, numbers_of, set_aside
from data.lib.checks import check_student, quantized_copy, runs_in
from data.lib.command import check_command, exit_code, make_parser, number
from data.lib.devices import choose_device, default_dtype
from data.lib.errors import UserError
from data.lib.files import fingerprint
from data.lib.folder import check_folder, check_out, hold
from data.lib.page import leave_report, write_page
from data.lib.processes import first_process_first, processes, spread
from data.lib.report import gather
from data.lib.resumable import Measure, first_blocks, kl_to_teacher
from data.lib.scores import (
    count_parameters,
    count_ternary,
    pack,
    perplexity,
    score_task,
    score_text,
)
from data.lib.sources import Source, encode, from_preset, from_transformers, load_texts
from data.lib.students import export, load_student, plain_copies, write_text
from tsld import LOSSES, GPTConfig, TrainConfig

# --------------------------------------------------------------------------------------
# The run


def run(args):
    """Trains a teacher, rounds it, and distills students from it. Leaves results.json
    and packed models in --out, and prints a table and samples of text."""
    out = check_folder(args.out)
    with hold(out):
        train_and_compare(set_up(args), out)


def train_and_compare(setup, out):
    paths = {name: out / f"student-{name}.pt" for name in setup.students}
    if not setup.args.resume:
        set_aside(paths.values())  # where a later --resume does not meet them

    # The teacher, and what rounding alone makes of it.
    teacher = train_teacher(setup)
    rounded = quantized(setup, teacher)
    scores = {"teacher": score(setup, teacher), "ptq": score(setup, rounded)}
    sizes = {"bytes_fp32": 4 * count_parameters(teacher)}
    sizes["linear_bytes_fp32"] = 4 * count_ternary(rounded)
    size = pack(rounded, out / "rounded.packed")["bytes_packed"]
    rows = [("teacher", scores["teacher"], sizes["bytes_fp32"])]
    rows.append((f"rounded to {setup.args.bits} bits", scores["ptq"], size))

    # Its students. Each starts as the rounded teacher.
    frozen = frozen_teacher(setup, teacher, scores["teacher"])
    results = []
    for name, config in setup.students.items():
        student = quantized(setup, teacher)
        seconds, scores["student"] = train_student(setup, student, config, frozen, name)
        sizes |= pack(student, out / f"student-{name}.packed")
        label = transcript.describe(config)
        rows.append((label, scores["student"], sizes["bytes_packed"]))
        results.append(result_row(setup, config, scores, sizes, seconds))
        if processes()[0] == 0:
            text = json.dumps(results, indent=2) + "\n"
            files.write_text(out / "results.json", text)

    # What came out.
    transcript.print_table(rows, setup.args.task, setup.examples)
    transcript.print_lessons(results, sizes)
    models = {"teacher": teacher, "rounded": rounded, name: student}
    models = plain_copies(models, setup.device)
    transcript.print_texts(setup, models)
    transcript.print_files(out)
    file = out / f"student-{name}.packed"
    transcript.print_next_command(__file__, file, setup)
    if processes()[0] == 0:
        leave_report(out, gather(setup, models, paths, results))


def quantized(setup, teacher):
    """The teacher rounded, to be trained. Raises UserError if it cannot be rounded."""
    args = setup.args
    return quantized_copy(teacher, args.bits, args.granularity, setup.source.name)


def result_row(setup, config, scores, sizes, seconds):
    """One entry of results.json."""
    source, args = setup.source, vars(setup.args)
    row = {"loss": config.loss, "model": source.name, "data": setup.corpus}
    row |= {"tokenizer": source.tokenizer.name, "gt_weight": None}
    if transcript.takes_weight(config.loss):
        row["gt_weight"] = config.gt_weight
    for name in ("bits", "granularity", "seed", "teacher_seed", "task"):
        row[name] = args[name]

    for part, prefix in (("valid", ""), ("test", "test_")):
        for model in ("teacher", "ptq", "student"):
            for unit, value in scores[model].get(part, {}).items():
                row[f"{prefix}{model}_{unit}"] = value

    tokens = config.steps * config.batch_size * config.block_size
    speed = tokens / seconds if seconds else None  # within one tick of the clock
    return row | {"train_seconds": seconds, "tokens_per_second": speed} | sizes


# --------------------------------------------------------------------------------------
# Set-up


@dataclass
class Setup:
    """What the parts of one command share."""

    args: argparse.Namespace
    device: torch.device
    corpus: str
    source: Source
    tokens: dict  # part -> int64 (n,); "student" is the share that the student sees
    size: dict  # part -> bytes of its tokens but the first, where it is a text
    examples: list | None  # of --task, to evaluate on
    teacher: TrainConfig
    student: TrainConfig
    students: dict  # name -> TrainConfig, of all students that the command trains


def set_up(args):
    """Reads texts, model and flags. Raises UserError if they do not fit together."""
    device = choose_device(args.device)
    with first_process_first():  # it downloads, the others find
        corpus, texts, examples = load_texts(args.data, args.task)
        source = choose_source(args, device)
    args.granularity = args.granularity or source.granularity
    tokens, size = encode(texts, source, args.student_tokens)
    teacher, student = configs(args, source, tokens, device)
    students = all_students(student) if args.loss == "all" else {args.loss: student}
    check_out(args.out, source.model, students)
    setup = Setup(
        args, device, corpus, source, tokens, size, examples, teacher, student, students
    )
    rounded = quantized(setup, source.model)
    check_student(rounded, setup)
    transcript.print_setup(source.model, count_ternary(rounded), student, device)
    return setup


def configs(args, source, tokens, device):
    """The teacher's and the student's TrainConfig."""
    preset, block_size = source.preset, source.preset.gpt.block_size
    student = replace(preset.student, loss="tsld" if args.loss == "all" else args.loss)
    student.lr = args.lr or student_lr(preset, args.bits)
    student.batch_size = args.batch_size or student.batch_size
    student.accumulate = args.accumulate
    student.temperature = args.tsld_temperature or student.temperature
    if args.gt_weight is not None:
        student.gt_weight = args.gt_weight
    whole = limit(student, preset.student_epochs, block_size, tokens["student"])
    student.steps = args.steps or whole

    # A run that is shortened to try things out shortens its teacher in proportion.
    teacher = replace(preset.teacher, accumulate=args.accumulate)
    teacher.steps = limit(teacher, preset.teacher_epochs, block_size, tokens["train"])
    share = min(1, student.steps / whole)
    teacher.steps = args.teacher_steps or math.ceil(teacher.steps * share)
    while teacher.batch_size % teacher.accumulate:  # in a part or a few more
        teacher.accumulate = min(teacher.accumulate + 1, teacher.batch_size)

    world = processes()[1]
    for config, seed in ((teacher, args.teacher_seed), (student, args.seed)):
        config.seed = seed
        config.block_size = block_size
        config.dtype = args.dtype or default_dtype(device)
        if config.batch_size % (world * config.accumulate):
            parts = f"{world} (processes) x {config.accumulate} (--accumulate)"
            message = f"a batch of {config.batch_size} does not divide by {parts}"
            raise UserError(message)
    return teacher, student


def all_students(student):
    """Name -> TrainConfig for --loss all; logit and TSLD without labels as well."""
    students = {}
    for loss in LOSSES:
        if transcript.takes_weight(loss) and student.gt_weight > 0:
            students[f"{loss}-no-gt"] = replace(student, loss=loss, gt_weight=0.0)
        students[loss] = replace(student, loss=loss)
    return students


def choose_source(args, device):
    """The model that is asked for, or the best that can be had without failing."""
    init, size, seed = args.init, args.block_size, args.teacher_seed
    if args.model is not None and args.model not in PRESETS:
        attentions = args.loss in ("l2l", "all")
        return from_transformers(args.model, GPT2, init, size, attentions)
    if args.model is None and device.type == "cuda":
        try:
            return from_preset("gpt2", GPT2, init, size, seed)
        except UserError as error:
            if init == "pretrained":
                raise
            print(f"model: tiny, instead of gpt2: {error}", flush=True)
    name = args.model or "tiny"
    return from_preset(name, PRESETS[name], init, size, seed)


# --------------------------------------------------------------------------------------
# Scores and sizes


def score(setup, model, parts=("valid", "test")):
    """part -> {"ppl": perplexity per token, "bpb": bits per byte}. A task has one part,
    of its right answers, with accuracies. Raises TrainingDiverged."""
    model, block_size = spread(model, setup.device), setup.student.block_size
    if setup.examples is not None:
        tokenizer = setup.source.tokenizer
        return {parts[0]: score_task(model, tokenizer, setup.examples, block_size)}

    scores = {}
    for part in parts:
        n_bytes = setup.size.get(part)
        scores[part] = score_text(model, setup.tokens[part], block_size, n_bytes)
    return scores


# --------------------------------------------------------------------------------------
# Training


def train_teacher(setup):
    """The teacher, trained, or found in --out. An interrupted one goes on."""
    teacher, config, path = setup.source.model, setup.teacher, teacher_path(setup)
    found = ", found there" if path.exists() else ""
    print(f"teacher: {config.steps} steps, kept in {path}{found}", flush=True)

    ids = first_blocks(setup.tokens["valid"], config.block_size).flatten()
    measure = Measure(
        "perplexity of unseen text",
        lambda model: perplexity(tsld.evaluate(model, ids, config.block_size)),
    )
    resumable.train(
        "teacher",
        teacher,
        setup.tokens["train"],
        config,
        path,
        setup.device,
        resume=True,
        compile=setup.args.compile,
        measure=measure,
    )
    return teacher


def teacher_path(setup):
    """The teacher's file, named after everything that makes it, to be found again."""
    source = setup.source
    start = fingerprint(numbers_of(source.model))
    text = fingerprint([setup.tokens["train"]])
    made_of = [source.name, architecture(source.model), start]
    made_of += [asdict(setup.teacher), text]
    name = f"teacher-{Path(source.name).name}-{key_of(made_of)}.pt"
    return Path(setup.args.out) / name


def frozen_teacher(setup, teacher, scores):
    """The teacher as its students see it: in bfloat16, if products are taken in it and
    the validation perplexity is then the same to three digits."""
    frozen = teacher
    if setup.student.dtype == "bfloat16" and runs_in(torch.bfloat16, teacher):
        half = copy.deepcopy(teacher).to(torch.bfloat16)
        rounded = score(setup, half, ["valid"])["valid"]["ppl"]
        exact = scores["valid"]["ppl"]
        is_same = math.isclose(rounded, exact, rel_tol=5e-4)
        frozen = half if is_same else teacher
        stored = "bfloat16" if is_same else "float32; in bfloat16"
        figures = f"perplexity {rounded:.4g}, in float32 {exact:.4g}"
        print(f"teacher for distillation: {stored} ({figures})", flush=True)

    frozen.fingerprint = fingerprint(numbers_of(teacher))  # for students' checkpoints
    return spread(frozen, setup.device)


def train_student(setup, student, config, frozen, name, watch=None):
    """Trains a quantized copy of the teacher in place. Returns the seconds that took,
    and its scores. name: of the checkpoint. watch(step, model): called each step."""
    path = Path(setup.args.out) / f"student-{name}.pt"
    print(f"student, {name}: {config.steps} steps, kept in {path}", flush=True)

    ids = first_blocks(setup.tokens["valid"], config.block_size)
    kl = partial(kl_to_teacher, teacher=frozen, ids=ids)
    measure = Measure("KL to the teacher", kl)
    seconds, trained = resumable.train(
        f"student, {name}",
        student,
        setup.tokens["student"],
        config,
        path,
        setup.device,
        resume=setup.args.resume,
        teacher=frozen,
        compile=setup.args.compile,
        watch=watch,
        measure=measure,
    )
    return seconds, score(setup, trained)


# --------------------------------------------------------------------------------------
# Presets


@dataclass
class Preset:
    """A model and how it is trained: for its steps or its epochs, whichever end first.
    An epoch is as many random pieces as the text has blocks."""

    gpt: GPTConfig
    tokenizer: str
    teacher: TrainConfig
    student: TrainConfig
    teacher_epochs: float = math.inf
    student_epochs: float = math.inf
    student_tokens: int | None = None  # the student sees the first so many; None: all
    lr_4bit: float | None = None  # of a 4-bit student, with less to win back


TINY = Preset(  # a few minutes on two CPU cores; rounding destroys its teacher
    gpt=GPTConfig(block_size=128, vocab_size=2048, n_layer=2, n_head=4, n_embd=128),
    tokenizer="bpe2048",
    teacher=TrainConfig("gt", steps=4000, batch_size=4, lr=4e-3, weight_decay=0.0),
    student=TrainConfig(
        "tsld", temperature=20.0, gt_weight=0.25, steps=200, batch_size=8, lr=2e-3
    ),
    teacher_epochs=11,  # more would only teach it a small text by heart
    student_tokens=100_000,
    lr_4bit=1e-4,
)
TINY_6 = replace(  # six layers: the model of data/evidence
    TINY,
    gpt=replace(TINY.gpt, n_layer=6),
    teacher=TrainConfig("gt", steps=350, batch_size=32, lr=4e-3),
    student=replace(TINY.student, steps=100, batch_size=32, lr=1e-3),
)
GPT2 = Preset(  # the schedule of the paper's GPT-2 runs
    gpt=GPTConfig(block_size=512, dropout=0.1),
    tokenizer="gpt2",
    teacher=TrainConfig(loss="gt", steps=10**6, batch_size=4, lr=1e-4),
    student=TrainConfig(steps=10**6, batch_size=4, lr=1e-4),
    teacher_epochs=3,
    student_epochs=90,
)


def gpt2(n_layer, n_head, n_embd):
    gpt = replace(GPT2.gpt, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return replace(GPT2, gpt=gpt)


PRESETS = {
    "tiny": TINY,
    "tiny-6": TINY_6,
    "gpt2": GPT2,
    "gpt2-medium": gpt2(24, 16, 1024),
    "gpt2-large": gpt2(36, 20, 1280),
    "gpt2-xl": gpt2(48, 25, 1600),
}


def student_lr(preset, bits):
    if bits > 2 and preset.lr_4bit is not None:
        return preset.lr_4bit
    return preset.student.lr


def limit(config, epochs, block_size, tokens):
    """The smaller of config.steps and `epochs`, in steps."""
    if math.isinf(epochs):
        return config.steps
    blocks = epochs * len(tokens) / (config.batch_size * block_size)
    return min(config.steps, math.ceil(blocks))


# --------------------------------------------------------------------------------------
# Command line


COUNT = number(int, above=0)
POSITIVE = number(float, above=0)


def defaults(tiny, others):
    """The end of a help text: what a flag is without being given."""
    return f"(default {tiny} for tiny, else {others})"


# Group -> flags: name, default, what argparse makes of the value, what it is for.
FLAGS = {
    "the student": [
        ("loss", "tsld", {"choices": (*LOSSES, "all")}, "what it learns from"),
        ("bits", 2, {"type": int, "choices": (2, 4)}, "bits per weight; 2 is ternary"),
        ("granularity", None, {"choices": ("tensor", "channel")},
         "what shares a scale (default tensor, for models of transformers channel)"),
        ("tsld-temperature", None, {"type": number(float, above=0, finite=False)},
         "τ of the token scale; inf gives every token the same weight "
         + defaults(*(f"{p.student.temperature:g}" for p in (TINY, GPT2)))),
        ("gt-weight", None, {"type": number(float, least=0)},
         "weight of the ground-truth loss that is added to logit and tsld "
         + defaults(*(f"{p.student.gt_weight:g}" for p in (TINY, GPT2)))),
    ],
    "model and data": [
        ("model", None, {}, f"{', '.join(PRESETS)}, or one of transformers by folder "
         "or owner/name (default gpt2 on a GPU, else tiny)"),
        ("init", None, {"choices": ("scratch", "pretrained")},
         f"where the teacher starts {defaults('scratch', 'pretrained')}"),
        ("data", None, {}, "ptb, pydoc, a text file, or a folder with "
         "{train,valid,test}.txt (default ptb, or pydoc where that cannot be had)"),
        ("task", None, {"choices": tuple(tasks.PROMPTS)},
         "train on one of the paper's tasks instead, and report accuracies"),
        ("student-tokens", None, {"type": COUNT},
         "how much of the training text the student sees "
         + defaults(TINY.student_tokens, "all")),
    ],
    "training": [
        ("steps", None, {"type": COUNT}, "of the student; fewer than the default "
         "shorten the teacher's training in proportion "
         + defaults(TINY.student.steps, f"{GPT2.student_epochs} epochs")),
        ("teacher-steps", None, {"type": COUNT}, "of the teacher "
         + defaults(f"{TINY.teacher.steps}, at most {TINY.teacher_epochs} epochs,",
                    f"{GPT2.teacher_epochs} epochs")),
        ("batch-size", None, {"type": COUNT}, "sequences in a step of the student "
         + defaults(TINY.student.batch_size, GPT2.student.batch_size)),
        ("block-size", None, {"type": number(int, above=1)}, "tokens in a sequence "
         + defaults(TINY.gpt.block_size, GPT2.gpt.block_size)),
        ("accumulate", 1, {"type": COUNT},
         "parts that every batch is split into, to save memory"),
        ("lr", None, {"type": POSITIVE}, "peak learning rate of the student "
         + defaults(f"{TINY.student.lr:g}, {TINY.lr_4bit:g} with 4 bits,",
                    f"{GPT2.student.lr:g}")),
        ("dtype", None, {"choices": ("float32", "bfloat16")},
         "of matrix products (default bfloat16 where the hardware has it)"),
        ("compile", False, {"action": "store_true"},
         "torch.compile: a slow start, then faster steps"),
    ],
    "the run": [
        ("seed", 0, {"type": number(int, least=0)},
         "of the students' data order and dropout, and of sampled text"),
        ("teacher-seed", 0, {"type": number(int, least=0)},
         "of the teacher's weights, data order and dropout"),
        ("device", None, {}, "cpu, cuda, mps, ... (default the accelerator, if any)"),
        ("out", "out", {}, "folder for checkpoints and results"),
        ("resume", False, {"action": "store_true"},
         "go on with a student that was interrupted"),
    ],
    "instead of training": [
        ("generate", None, {"metavar": "FILE"},
         "write text with a packed student, given --model too if its run had it"),
        ("prompt", "the", {}, "what the text begins with"),
        ("export", None, {"metavar": ("FILE", "FOLDER"), "nargs": "+"},
         "write a student for transformers; a third word, float16, halves the files"),
        ("report", None, {"metavar": "FOLDER"}, "make the page of a run again"),
    ],
}  # fmt: skip
ALL = {name: default for flags in FLAGS.values() for name, default, _, _ in flags}
TAKES = {
    "--generate": {"generate", "prompt", "seed", "device", "model"},
    "--export": {"export", "model"},
    "--report": {"report"},
    "training": ALL.keys() - {"generate", "prompt", "export", "report"},
}
TRAIN = TAKES["training"]


def parse(argv, takes=None, description=None, **other_defaults):
    """The flags as a namespace. takes, description: another command's own."""
    description = description or " ".join(__doc__.split("\n\n")[0].split())
    names = ALL if takes is None else takes
    parser = make_parser(FLAGS, names, description, other_defaults)
    found = vars(parser.parse_args(argv))
    flags = {name.replace("_", "-"): value for name, value in found.items()}
    if takes is None:
        check_command(parser, flags, TAKES)

    values = ALL | other_defaults | flags
    losses = ("logit", "tsld", "all")
    if "gt-weight" in flags and values["loss"] not in losses:
        parser.error(f"--gt-weight has no meaning for --loss {values['loss']}")
    if "tsld-temperature" in flags and values["loss"] not in ("tsld", "all"):
        parser.error(f"--tsld-temperature has no meaning for --loss {values['loss']}")
    if "data" in flags and values["task"]:
        parser.error("--data and --task: name one of them")
    for name in ("generate", "report", "data", "model", "out", "device"):
        if values[name] == "":
            parser.error(f"--{name} is empty")

    model = values["model"]
    is_named = model in (None, *PRESETS)
    if not is_named and "/" not in model and not Path(model).is_dir():
        choices = f"{', '.join(PRESETS)}, a folder, or owner/name of transformers"
        parser.error(f"--model {model} is none of {choices}")
    return argparse.Namespace(**{k.replace("-", "_"): v for k, v in values.items()})


def own_command(argv):
    args = parse(argv)
    args.words = sys.argv[1:] if argv is None else argv
    load_source = partial(from_transformers, args.model, GPT2)
    if args.report:
        print(write_page(args.report))
    elif not args.generate and not args.export:
        run(args)
    elif args.model in PRESETS:
        raise UserError(f"--model is for transformers here, not {args.model}")
    elif args.export:
        export(args.export, PRESETS, args.model, load_source)
    else:
        device = choose_device(args.device)
        source = load_source() if args.model else None
        model, tokenizer = load_student(args.generate, PRESETS, source)
        write_text(model.to(device), tokenizer, args.prompt, args.seed)


def main(argv=None, command=own_command):
    """The exit code of a command, a function of argv: see data/lib/command.py."""
    return exit_code(command, argv)


if __name__ == "__main__":
    sys.exit(main())
