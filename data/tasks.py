"""The nine tasks of the paper: their prompts and choices, and a model's scores on them.

The files of the tasks are in data/downloads/, or are downloaded into it. The prompts
are those of lm-evaluation-harness; accuracy is its acc, acc_norm its acc_bytes."""

import collections
import json
import re
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data.lib.errors import UserError
from data.texts import DATA, fetch

DOWNLOADS = DATA / "downloads"

# The SHA-256 (- where none is published), the number of examples, the file.
FILES = """
cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624  8551 cola/in_domain_train.tsv
2dc8ae5dafcf3a46fa4d4215cd4882c7d05c17e5a7696de4f9c32b29286a530c   527 cola/in_domain_dev.tsv
a95f976e24a27e81d287f224bc07672813b703c3faa399bfdfada5b976854a11   516 cola/out_of_domain_dev.tsv
60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89  4076 mrpc/msr_paraphrase_train.txt
9e8f284788040f7c9ecde2e1b3c07237c756f926bd9ef8548ef5d34b56f69f17   408 mrpc/dev.tsv
41e3a9b063433392343fad9e962cf2f58b681c78d8f71592f4186f0837246c5c  2490 rte/train.tsv
80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb   277 rte/dev.tsv
48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1 67349 sst2/train.tsv
54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0   872 sst2/dev.tsv
-                                                                 2251 arc_easy/train.jsonl
ce32a0774b4beb1977d2c6b16dda5dd2b24fdc9c7f506882c452678676bd09be  2376 arc_easy/test.jsonl
-                                                                 1119 arc_challenge/train.jsonl
9fa8ffb3e3a1f88cb302d53dd95aae81e39209ad9bcf974376b319d8fd35717c  1172 arc_challenge/test.jsonl
388ce25926fa33b573ba6556d7245a6185f612dedf919871b6acb9340c8497a5  4957 openbookqa/train.jsonl
feb2bd9bfa6161dca4c44ce90e51e8cdada83eb5061407fcdc5005e44aaf2313   500 openbookqa/test.jsonl
f805f9c96518d7b59f2f870d90f712457cda949979469d9fa3fd706ce22e0a1a 16113 piqa/train.jsonl
df8ae080c41f02f88e81f6932d425f4b7ee72f433ad552e6a30d45e358e8f8bb 16113 piqa/train-labels.lst
93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d  1838 piqa/valid.jsonl
b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb  1838 piqa/valid-labels.lst
17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465  7473 gsm8k/train.jsonl
3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14  1319 gsm8k/test.jsonl
"""  # noqa: E501

# The folder of a task's files.
RAW = "https://raw.githubusercontent.com"
GLUE = f"{RAW}/F0restL1n/BERT/0d0288be08079531c7b3a85af3d532f9adb0f13a/glue_data"
PIQA = f"{RAW}/ybisk/ybisk.github.io/21edab439af693b961be2f069e8690a88d3b4e37"
GSM8K = f"{RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
FOLDERS = {
    "cola": f"{GLUE}/CoLA/original/raw",
    "mrpc": f"{GLUE}/MRPC",
    "rte": f"{GLUE}/RTE",
    "sst2": f"{GLUE}/SST-2",
    "piqa": f"{PIQA}/piqa/data",
    "gsm8k": f"{GSM8K}/grade_school_math/data",
}

# The zip archive of a task's files, and their names in it, where {file} stands for
# train.jsonl and {File} for Train.jsonl.
S3 = "https://ai2-public-datasets.s3.amazonaws.com"
ARC = f"{S3}/arc/ARC-V1-Feb2018.zip"
OPENBOOKQA = f"{S3}/open-book-qa/OpenBookQA-V1-Sep2018.zip"
ARCHIVES = {
    "arc_easy": (ARC, "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-{File}"),
    "arc_challenge": (ARC, "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-{File}"),
    "openbookqa": (OPENBOOKQA, "OpenBookQA-V1-Sep2018/Data/Main/{file}"),
}

# A task's prompt, and the choices where all its examples have the same. The numbers are
# the columns of the file.
PROMPTS = {
    "cola": ("{3}\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes")),
    "mrpc": (
        "Sentence 1: {3}\nSentence 2: {4}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "rte": ("{1}\nQuestion: {2} True or False?\nAnswer:", ("True", "False")),
    "sst2": (
        "{}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
    ),
    "arc_easy": ("Question: {}\nAnswer:", None),
    "arc_challenge": ("Question: {}\nAnswer:", None),
    "openbookqa": ("{}", None),
    "piqa": ("Question: {}\nAnswer:", None),
    "gsm8k": ("Question: {}\nAnswer:", None),
}

# Of the tasks whose files are tables: the column of the label.
LABEL_COLUMNS = {"cola": 1, "mrpc": 0, "rte": 3, "sst2": 1}
RTE_LABELS = ("entailment", "not_entailment")
WITH_TITLES = ("mrpc", "rte", "sst2")  # their first line is no example


class Example(NamedTuple):
    """A question. Free answers are questions with one choice."""

    prompt: str
    choices: tuple  # of texts, which follow the prompt after a space
    answer: int  # the index of the right choice


# --------------------------------------------------------------------------------------
# Files


def load_task(name):
    """Returns two lists of examples: to train on, and those that papers report.

    Raises UserError if a file cannot be had or is not as published."""
    train = []
    test = []
    rows = [row.split() for row in FILES.strip().splitlines()]
    rows = [row for row in rows if row[2].startswith(f"{name}/")]

    for sha256, count, file in rows:
        part = train if "train" in file else test
        try:
            part += read(file, None if sha256 == "-" else sha256, int(count))
        except UserError as error:
            if name in ARCHIVES or (DOWNLOADS / file).exists():
                raise
            files = ", ".join(file.split("/")[1] for _, _, file in rows)
            raise UserError(f"{error}; it takes {files} there") from error

    if name == "piqa":
        return join_labels(train), join_labels(test)

    # MRPC's training file has the examples of both parts.
    if name == "mrpc":
        train = [example for example in train if example not in test]

    return train, test


def part_of(name):
    """Which part of a task its scores are of: "dev" or "test"."""
    return "test" if f" {name}/test." in FILES else "dev"


def join_labels(rows):
    """PIQA has two files: the examples without their answers, and the answers."""
    half = len(rows) // 2

    pairs = zip(rows[:half], rows[half:], strict=True)
    return [example._replace(answer=answer) for example, answer in pairs]


def read(file, sha256, count):
    """The examples of a file, one a line."""
    task, name = file.split("/")
    path = find(task, name, sha256)
    remedy = "delete it, to download it again"

    # A byte order mark may stand first, and the last line may lack its end.
    try:
        lines = path.read_text("utf-8-sig").removesuffix("\n").split("\n")
        if task in WITH_TITLES:
            del lines[0]
        examples = [parse(task, line) for line in lines]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {remedy}") from error

    if len(examples) != count:
        found = f"{path} has {len(examples)} examples and not {count}"
        raise UserError(f"{found}: {remedy}")

    return examples


def parse(task, line):
    """A line as an Example; of PIQA, as one without its answer or as an answer."""
    prompt, choices = PROMPTS[task]

    # A table is no CSV: its quotes are literal.
    if task in LABEL_COLUMNS:
        columns = [column.strip() for column in line.split("\t")]
        label = columns[LABEL_COLUMNS[task]]
        answer = RTE_LABELS.index(label) if task == "rte" else int(label)
        return Example(prompt.format(*columns), choices, answer)

    row = json.loads(line)
    if task == "piqa" and isinstance(row, int):
        return row
    if task == "piqa":
        return Example(prompt.format(row["goal"]), (row["sol1"], row["sol2"]), None)

    # The one choice of a free answer is the right one.
    if task == "gsm8k":
        return Example(prompt.format(row["question"]), (row["answer"],), 0)

    # ARC and OpenBookQA: 3 to 5 choices, labelled by letters or by numbers.
    question = row["question"]
    choices = tuple(choice["text"] for choice in question["choices"])
    labels = [choice["label"] for choice in question["choices"]]
    answer = labels.index(row["answerKey"])
    return Example(prompt.format(question["stem"]), choices, answer)


def find(task, name, sha256):
    """The path of a task's file, which is downloaded if it is not there yet."""
    path = DOWNLOADS / task / name

    if task in FOLDERS:
        return fetch([f"{FOLDERS[task]}/{name}"], path, sha256)

    if not path.exists():
        unpack(task, path)
    return fetch([], path, sha256)


def unpack(task, path):
    """Takes a task's file out of its archive."""
    address, pattern = ARCHIVES[task]
    archive = fetch([address], DOWNLOADS / address.split("/")[-1], None)

    member = pattern.format(file=path.name, File=path.name.capitalize())
    try:
        with zipfile.ZipFile(archive) as files:
            content = files.read(member)
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{archive} has no {member}: delete it") from error

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def training_text(tokenizer, examples):
    """Token ids: each prompt with its right answer, and the end of text after it.
    Raises UserError if the tokenizer has no token for that."""
    if tokenizer.end_of_text is None:
        message = f"the tokenizer of {tokenizer.name} has no token that ends a text"
        raise UserError(f"{message}, which a task takes: name another --model")

    ids = []
    for example in examples:
        answer = example.choices[example.answer]
        ids += tokenizer.encode_ordinary(f"{example.prompt} {answer}")
        ids.append(tokenizer.end_of_text)

    return ids


def chance(examples):
    """Name -> the accuracy that takes no model; nothing where answers are free."""
    if not examples or len(examples[0].choices) == 1:
        return {}

    found = {"a guess": np.mean([1 / len(example.choices) for example in examples])}
    if len({example.choices for example in examples}) == 1:
        counts = collections.Counter(example.answer for example in examples)
        answer, count = counts.most_common(1)[0]
        found[f"always {examples[0].choices[answer]!r}"] = count / len(examples)
    return found


# --------------------------------------------------------------------------------------
# Scores

BATCH_TOKENS = 2048  # that are scored at a time
BATCH_PROMPTS = 64  # that are answered at a time
ANSWER_TOKENS = 256  # of the longest free answer


class Choice(NamedTuple):
    """A choice as token ids."""

    context: tuple  # the model's input, whose last outputs predict the choice
    ids: tuple
    size: int  # the bytes of the text that ids stand for
    is_cut: bool  # the prompt has lost its beginning


def no_progress(text):
    """Shows nothing."""


@torch.no_grad()
def evaluate_task(model, tokenizer, examples, block_size, show=no_progress):
    """Scores a model, and puts it into evaluation mode. `show` gets lines of progress.

    Returns five things: -log P of all right answers together, in nats; how many tokens
    they have; how many bytes; how many examples are too long for a block and lose their
    beginning; and a dict.
        accuracy  share of examples whose right choice is the likeliest one;
                  of free answers, share of exact matches, and nothing else
        acc_norm  share of examples whose right choice is the likeliest per byte
        mcc       Matthews correlation, where the choices are no and yes"""
    model.eval()

    choices = [encode(tokenizer, example, block_size) for example in examples]
    nats_of = choice_nats(model, choices, show)
    is_cut = np.array([any(choice.is_cut for choice in row) for row in choices])

    if all(len(example.choices) == 1 for example in examples):
        texts, lost = free_answers(model, tokenizer, examples, block_size, show)
        scores = {"accuracy": exact_match(examples, texts)}
        is_cut |= lost
    else:
        costs = [[nats_of[choice] for choice in row] for row in choices]
        scores = choice_scores(examples, costs)

    # The right answers are a text, and have a perplexity.
    right = [row[example.answer] for row, example in zip(choices, examples)]
    nats = sum(nats_of[choice] for choice in right)
    n_tokens = sum(len(choice.ids) for choice in right)
    n_bytes = sum(choice.size for choice in right)
    return nats, n_tokens, n_bytes, int(is_cut.sum()), scores


def encode(tokenizer, example, block_size):
    """The choices of an example, with the end of what is too long for a block."""
    prompt_length = len(tokenizer.encode_ordinary(example.prompt))

    choices = []
    for text in example.choices:
        whole = f"{example.prompt} {text}"
        ids = tokenizer.encode_ordinary(whole)

        # The last token is predicted, and no input.
        context = tuple(ids[-block_size - 1 : -1])
        answer = tuple(ids[prompt_length:][-block_size:])

        # An answer that does not fit has lost its beginning as well.
        size = len(f" {text}".encode())
        if len(ids) - prompt_length > block_size:
            lost = len(ids) - block_size
            size = len(whole.encode()) - tokenizer.size_before(whole, ids, lost)

        is_cut = len(ids) > block_size + 1
        choices.append(Choice(context, answer, size, is_cut))
    return choices


def choice_nats(model, choices, show):
    """Takes lists of choices. Returns a dict from each choice to its -log P in nats."""
    # Choices of one token, such as no and yes, are read off the same output.
    waiting = collections.defaultdict(set)
    for row in choices:
        for choice in row:
            waiting[choice.context].add(choice)

    nats = {}
    scored = 0
    device = next(model.parameters()).device
    for contexts in batches(waiting):
        show(f"scored {scored} of {len(waiting)} inputs")
        scored += len(contexts)

        # Padding at the end changes nothing: no token sees what follows it.
        rows = [torch.tensor(context) for context in contexts]
        logits = model(pad_sequence(rows, batch_first=True).to(device))  # (B, T, V)
        log_p = logits.float().log_softmax(-1).cpu()

        for context, log_p_of_row in zip(contexts, log_p):
            for choice in waiting[context]:
                predicted = log_p_of_row[: len(context)][-len(choice.ids) :]
                targets = torch.tensor(choice.ids)[:, None]
                nats[choice] = -predicted.gather(1, targets).sum().item()
    return nats


def batches(contexts):
    """Contexts of like length together, the longest first: as many as have BATCH_TOKENS
    with their padding, or one that has more alone."""
    contexts = sorted(contexts, key=len)[::-1]

    while contexts:
        size = max(1, BATCH_TOKENS // len(contexts[0]))
        yield contexts[:size]
        contexts = contexts[size:]


def choice_scores(examples, costs):
    """The scores of choices whose costs are -log P in nats: a list for each example."""
    right = np.array([example.answer for example in examples])
    likeliest = np.array([np.argmin(row) for row in costs])

    # A long choice costs more than a short one, however good it is.
    sizes = [[len(text.encode()) for text in example.choices] for example in examples]
    per_byte = [np.divide(*pair) for pair in zip(costs, sizes)]
    likeliest_per_byte = np.array([np.argmin(row) for row in per_byte])

    scores = {
        "accuracy": np.mean(likeliest == right),
        "acc_norm": np.mean(likeliest_per_byte == right),
    }
    if all(example.choices == ("no", "yes") for example in examples):
        scores["mcc"] = matthews(right, likeliest)

    return scores


def matthews(right, found):
    """The correlation of two arrays of 0 and 1; 0 where one of them is constant."""
    if right.std() == 0 or found.std() == 0:
        return 0.0

    return np.corrcoef(right, found)[0, 1]


def free_answers(model, tokenizer, examples, block_size, show):
    """Returns the model's greedy continuation of each prompt up to the end of text, and
    an array: whether the prompt lost its beginning to make room for it."""
    new_tokens = min(ANSWER_TOKENS, block_size // 2)
    room = block_size - new_tokens

    prompts = [tokenizer.encode_ordinary(example.prompt) for example in examples]
    is_cut = np.array([len(ids) > room for ids in prompts])
    prompts = [ids[-room:] for ids in prompts]

    texts = {}
    device = next(model.parameters()).device
    for numbers in batches_of_equal_length(prompts):
        show(f"answered {len(texts)} of {len(examples)}")
        ids = torch.tensor([prompts[number] for number in numbers], device=device)
        answers = model.generate(ids, new_tokens, temperature=0)[:, ids.shape[1] :]

        for number, answer in zip(numbers, answers.tolist()):
            texts[number] = tokenizer.decode(up_to(answer, tokenizer.end_of_text))

    return [texts[number] for number in range(len(examples))], is_cut


def batches_of_equal_length(prompts):
    """The indices of prompts that need no padding beside each other."""
    waiting = collections.defaultdict(list)
    for number, ids in enumerate(prompts):
        waiting[len(ids)].append(number)

    for numbers in waiting.values():
        for start in range(0, len(numbers), BATCH_PROMPTS):
            yield numbers[start : start + BATCH_PROMPTS]


def up_to(ids, stop):
    return ids[: ids.index(stop)] if stop in ids else ids


def exact_match(examples, texts):
    """The share of free answers that give the number of the right one."""
    right = [marked_number(example.choices[0]) for example in examples]
    found = [marked_number(text) for text in texts]

    return np.mean([a == b for a, b in zip(right, found)])


def marked_number(text):
    """The first number behind ####, without its commas."""
    found = re.search(r"#### *(-?[\d.]*\d)", text.replace(",", ""))
    return found[1] if found else None
