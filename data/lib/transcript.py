"""What a run prints beside its progress: its settings, the table and what follows from
it, the weights of tokens, samples of text, and the next command."""

import shlex
import textwrap
from pathlib import Path

import torch

import tsld
from data import tasks
from data.lib.devices import default_dtype

WIDTH = 88
NAMES = {"ppl": "perplexity", "bpb": "bits/byte", "valid": "validation"}
SAMPLING = {"temperature": 0.8, "top_k": 200}


def takes_weight(loss):
    """Whether the ground truth can be added to a loss with a weight."""
    return loss in ("logit", "tsld")


def describe(config):
    """A student's name in print, from its TrainConfig."""
    name = config.loss
    if config.loss == "tsld":
        name += f" (τ = {config.temperature:g})"
    if takes_weight(config.loss) and config.gt_weight:
        name += f" + {config.gt_weight:g} gt"
    return name


def print_setup(model, ternary, student, device):
    """What is about to be trained. ternary: how many of the model's weights are in
    matrices that are rounded. student: a TrainConfig."""
    total = sum(parameter.numel() for parameter in model.parameters())
    shape = f"{model.config.n_layer} layers x {model.config.n_embd}"
    share = f"{ternary / total:.0%} of them in matrices that are rounded"
    print(f"model: {total:,} parameters, {shape}, {share}")

    tokens = f"{student.batch_size * student.block_size:,} tokens a step"
    where = f"{student.dtype} on {device}, {torch.get_num_threads()} threads"
    print(f"student: {describe(student)}, rate {student.lr:g}, {tokens}; {where}")

    if student.dtype == "bfloat16" and default_dtype(device) == "float32":
        print(f"dtype: bfloat16 is slow on this {device.type}, up to 20 times")


def print_table(rows, task=None, examples=None):
    """rows: (name, scores, bytes). The first is the teacher, the second the
    rounded teacher, all others are students. scores: part -> unit -> number; of a task
    they are those of its examples."""
    names = NAMES
    if task is not None:
        names = NAMES | {"valid": f"{len(examples):,} {tasks.part_of(task)} examples"}

    scores_of_teacher = rows[0][1]
    above = below = " " * 26
    for part, units in scores_of_teacher.items():
        above += f"{names.get(part, part):>{12 * len(units)}}"
        below += "".join(f"{NAMES.get(unit, unit):>12}" for unit in units)
    print(f"\n{above}\n{below}{'won back':>10}{'bytes':>18}")

    part = next(iter(scores_of_teacher))
    teacher, rounded = (scores[part]["bpb"] for _, scores, _ in rows[:2])
    for number, (name, scores, size) in enumerate(rows):
        line = f"{name:25} "
        for units in scores.values():
            line += "".join(cell(unit, value) for unit, value in units.items())

        won = ""
        if number > 1:
            won = won_back(teacher, rounded, scores[part]["bpb"])
        print(f"{line}{won:>10}{size:>18,}")

    for name, accuracy in tasks.chance(examples or []).items():
        print(f"{name:26}{'':24}{accuracy:12.4f}")
    if not won_back(teacher, rounded, teacher):
        print(
            "Rounding cost less than 1 % of the teacher's bits: too little to win back."
        )


def won_back(teacher, rounded, student):
    """The share of rounding's cost that a student won back, in print; empty where
    rounding cost less than a hundredth, which is no more than chance makes of two runs.
    All in bits per byte."""
    cost = rounded - teacher
    if cost < 0.01 * teacher:
        return ""
    return f"{(rounded - student) / cost:.0%}"


def cell(unit, value):
    """A number, 12 characters wide whatever it is."""
    if unit == "ppl":
        return f"{value:12,.2f}" if value < 1e6 else f"{value:12.3g}"
    return f"{value:12.4f}"


def print_lessons(results, sizes):
    """What follows from the table. results: rows of results.json. sizes: bytes."""
    lines = []
    name = "ternary" if results[0]["bits"] == 2 else f"{results[0]['bits']}-bit"
    matrices = sizes["linear_bytes_packed"]
    ratio = sizes["linear_bytes_fp32"] / matrices
    rest = sizes["bytes_packed"] - matrices
    lines.append(
        f"The {name} matrices take {matrices:,} bytes, {ratio:.0f} times less "
        f"than in FP32. The other {rest:,} are mostly the embedding, in float16."
    )
    if len(results) == 1:
        lines += lesson_of_better(results[0])
    lines += lessons_of_pairs(results)

    print()
    for line in lines:
        print(textwrap.fill(line, WIDTH))


def sees_labels(row):
    """Whether a student of results.json learned from the true tokens as well."""
    return row["loss"] in ("gt", "logit_gt") or bool(row["gt_weight"])


def lesson_of_better(row):
    """What a perplexity below the teacher's says of a student, and what it does not."""
    if row["student_ppl"] >= row["teacher_ppl"]:
        return []

    text = "task's answers" if row["task"] else "validation text"
    lesson = f"On the {text} the student's perplexity is lower than its teacher's "
    lesson += f"({row['student_ppl']:,.2f} and {row['teacher_ppl']:,.2f})"
    if "test_student_ppl" in row:
        student, teacher = row["test_student_ppl"], row["test_teacher_ppl"]
        found = "so it is" if student < teacher else "it is not"
        lesson += f", on the test text {found} ({student:,.2f} and {teacher:,.2f})"

    lesson += ". One run cannot say how much of that is chance."
    if sees_labels(row):
        lesson += (
            " The student also learned from the true tokens of its teacher's text."
        )
    return [lesson]


def lessons_of_pairs(results):
    """The token scale, judged by students that see the same labels."""
    perplexity = {(r["loss"], r["gt_weight"]): r["student_ppl"] for r in results}
    lines = []
    for (loss, weight), value in perplexity.items():
        if loss == "tsld" and ("logit", weight) in perplexity:
            change = value / perplexity["logit", weight] - 1
            labels = f"{weight:g} gt" if weight else "no labels"
            lines.append(
                f"Token scale, with {labels}: {change:+.1%} perplexity against logit, "
                "one seed each. One seed is no finding: data/evidence has several."
            )
    return lines


@torch.no_grad()
def print_token_weights(teacher, ids, temperature, decode, shown=16):
    """How much the tokens of a text count in TSLD. ids: int64 (T + 1,), on the device
    of the teacher. decode: a list of ids -> text."""
    logits = teacher(ids[None, :-1])  # (1, T, V)
    targets = ids[None, 1:]
    ce_teacher = tsld.per_token_terms(logits, logits, targets).ce_teacher
    weights = tsld.token_scale(ce_teacher, temperature)[0] * targets.shape[1]

    # No token is broken where a line ends.
    lines = [
        f"How much TSLD (τ = {temperature:g}) lets each token count, on average 1:"
    ]
    for i, weight in zip(targets[0, :shown].tolist(), weights.tolist(), strict=False):
        word = f"{decode([i])!r} {weight:.2f}"
        if len(f"{lines[-1]}  {word}") > WIDTH:
            lines.append(word)
        else:
            lines[-1] += f"  {word}"
    print("\n" + "\n".join(lines))


def samples(models, prompt, length, tokenizer, seed, sampling=SAMPLING):
    """Name -> how that model goes on, up to the end of the text. models: name -> model.
    prompt: int64 (T,), on their device. sampling: of model.generate."""
    texts = {}
    for name, model in models.items():
        torch.manual_seed(seed)
        ids = model.generate(prompt[None], length, **sampling)[0, len(prompt) :]
        ids = tasks.up_to(ids.tolist(), tokenizer.end_of_text)
        texts[name] = " ".join(tokenizer.decode(ids).split())
    return texts


def print_samples(models, prompt, length, tokenizer, seed, title):
    """What each model makes of a prompt. title: says what the prompt is."""
    text = " ".join(tokenizer.decode(prompt.tolist()).split())
    print(f"\n{title}: {text}")
    for name, text in samples(models, prompt, length, tokenizer, seed).items():
        print(textwrap.fill(f"{name} goes on: {text}", WIDTH))


def prompt_of(setup):
    """What is gone on with: a title, a prompt, int64 (T,), and how many tokens more."""
    tokenizer, half = setup.source.tokenizer, setup.student.block_size // 2
    title, prompt = "The validation text begins", setup.tokens["valid"][: min(16, half)]
    if setup.examples:
        title = "The first question"
        question = tokenizer.encode_ordinary(setup.examples[0].prompt)
        prompt = torch.tensor(question[-half:])

    length = min(48, setup.student.block_size - len(prompt))
    return title, prompt.to(setup.device), length


def print_texts(setup, models):
    """How the validation text's first tokens count, and what each model makes of them.
    setup: the run's. models: name -> model, the first one the teacher."""
    block_size = setup.student.block_size
    ids = setup.tokens["valid"][: block_size + 1].to(setup.device)
    tokenizer = setup.source.tokenizer
    models = {name: model.to(setup.device) for name, model in models.items()}
    if "tsld" in setup.students and setup.examples is None:
        temperature = setup.students["tsld"].temperature
        teacher = next(iter(models.values()))
        print_token_weights(teacher, ids, temperature, tokenizer.decode)

    title, prompt, length = prompt_of(setup)
    print_samples(models, prompt, length, tokenizer, setup.args.seed, title)


def texts_of(setup, models):
    """What print_texts shows: the prompt, and what each model makes of it by taking the
    likeliest token each time, and by drawing as print_texts does."""
    title, prompt, length = prompt_of(setup)
    tokenizer, seed = setup.source.tokenizer, setup.args.seed
    greedy = {"temperature": 0.0}
    return {
        "title": title,
        "prompt": " ".join(tokenizer.decode(prompt.tolist()).split()),
        "greedy": samples(models, prompt, length, tokenizer, seed, greedy),
        "sampled": samples(models, prompt, length, tokenizer, seed),
    }


def print_files(out):
    """Where the results are, and what may be deleted."""
    print(f"\nresults: {out / 'results.json'}")
    size = sum(path.stat().st_size for path in out.glob("*.pt")) / 1e6
    then = "a later run would train its teacher anew"
    print(f"may go: {out / '*.pt'}, checkpoints of {size:,.1f} MB; {then}")


def print_next_command(program, file, setup):
    """How to make more text, from where the user stands. The prompt is the validation
    text's first four words, or as many as half a block has room for."""
    tokenizer, block_size = setup.source.tokenizer, setup.student.block_size
    ids = tasks.up_to(setup.tokens["valid"][:12].tolist(), tokenizer.end_of_text)
    words = tokenizer.decode(ids).split()[:4]
    while len(tokenizer.encode_ordinary(" ".join(words))) > block_size // 2:
        words.pop()

    program = Path(program)
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())

    command = ["python", str(program), "--generate", str(file)]
    if not isinstance(setup.source.model, tsld.GPT):
        command += ["--model", setup.source.name]
    if words:
        command += ["--prompt", " ".join(words)]
    print(f"more text: {shlex.join(command)}")
