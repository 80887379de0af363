"""The nine tasks of the paper: prompts, choices and answers, and what a model scores on them. Their
files are found in data/downloads/, or downloaded into it once from ADDRESSES. Prompts follow
lm-evaluation-harness; accuracy is its acc, acc_norm its acc_bytes."""

import collections
import json
import re
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data.texts import DATA, UserError, fetch
from tsld import GPT

DOWNLOADS = DATA / "downloads"
# SHA-256 (- where none is published), number of examples, file.
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
"""
RAW = "https://raw.githubusercontent.com/"
GLUE = RAW + "F0restL1n/BERT/0d0288be08079531c7b3a85af3d532f9adb0f13a/glue_data/"
S3 = "https://ai2-public-datasets.s3.amazonaws.com/"
# Where a task's file {0} is; after a space, its name in the zip archive. {1}: capitalized.
ADDRESSES = {
    "cola": GLUE + "CoLA/original/raw/{0}",
    "mrpc": GLUE + "MRPC/{0}",
    "rte": GLUE + "RTE/{0}",
    "sst2": GLUE + "SST-2/{0}",
    "arc_easy": S3 + "arc/ARC-V1-Feb2018.zip ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-{1}",
    "arc_challenge": S3 + "arc/ARC-V1-Feb2018.zip ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-{1}",
    "openbookqa": S3 + "open-book-qa/OpenBookQA-V1-Sep2018.zip OpenBookQA-V1-Sep2018/Data/Main/{0}",
    "piqa": RAW + "ybisk/ybisk.github.io/21edab439af693b961be2f069e8690a88d3b4e37/piqa/data/{0}",
    "gsm8k": RAW + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/{0}",
}
# Task: its prompt, and the choices where all its examples have the same. Numbers are columns.
PROMPTS = {
    "cola": ("{3}\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes")),
    "mrpc": ("Sentence 1: {3}\nSentence 2: {4}\nQuestion: Do both sentences mean the same thing?\n"
             "Answer:", ("no", "yes")),
    "rte": ("{1}\nQuestion: {2} True or False?\nAnswer:", ("True", "False")),
    "sst2": ("{}\nQuestion: Is this sentence positive or negative?\nAnswer:",
             ("negative", "positive")),
    "arc_easy": ("Question: {}\nAnswer:", None),
    "arc_challenge": ("Question: {}\nAnswer:", None),
    "openbookqa": ("{}", None),
    "piqa": ("Question: {}\nAnswer:", None),
    "gsm8k": ("Question: {}\nAnswer:", None),
}  # fmt: skip


class Example(NamedTuple):
    prompt: str
    choices: tuple  # of texts, which follow the prompt after a space
    answer: int  # index of the right choice


def load_task(name):
    """Examples to train on, and those that papers report. UserError: a file cannot be had."""
    rows = [row for row in map(str.split, FILES.strip().splitlines()) if row[2].startswith(name)]
    both = [[read(*row) for row in rows if ("train" in row[2]) == training] for training in (1, 0)]
    if name == "piqa":  # texts, and labels
        both = [[[Example(*text, label) for text, label in zip(*part)]] for part in both]
    train, test = (sum(part, []) for part in both)  # MRPC's training file holds both
    return [e for e in train if name != "mrpc" or e not in test], test


def read(sha256, count, file):
    """A file's lines as examples; PIQA's texts and labels stand in two files."""
    task, file = file.split("/")
    path = find(task, file, None if sha256 == "-" else sha256)
    try:
        lines = path.read_text("utf-8-sig").removesuffix("\n").split("\n")
        lines = lines[1:] if task in ("mrpc", "rte", "sst2") else lines  # a header
        examples = [parse(task, line) for line in lines]
    except (ValueError, LookupError, TypeError):
        examples = []
    if len(examples) != int(count):
        raise UserError(f"{path} does not hold {count} examples: delete it, to download it again")
    return examples


def parse(task, line):
    prompt, choices = PROMPTS[task]
    if choices:  # tab-separated, quotes are literal
        row = [column.strip() for column in line.split("\t")]
        label = row[{"cola": 1, "mrpc": 0, "rte": 3, "sst2": 1}[task]]
        answer = {"entailment": 0, "not_entailment": 1}.get(label)
        return Example(prompt.format(*row), choices, int(label) if answer is None else answer)
    row = json.loads(line)
    if task == "piqa":
        return row if type(row) is int else (prompt.format(row["goal"]), (row["sol1"], row["sol2"]))
    if task == "gsm8k":
        return Example(prompt.format(row["question"]), (row["answer"],), 0)
    stem, choices = row["question"]["stem"], row["question"]["choices"]  # 3 to 5 of them,
    answer = [c["label"] for c in choices].index(row["answerKey"])  # with letters or numbers
    return Example(prompt.format(stem), tuple(c["text"] for c in choices), answer)


def find(task, file, sha256):
    """The path of a task's file, downloaded or taken out of its archive if it is not there yet."""
    path = DOWNLOADS / task / file
    address, *inside = ADDRESSES[task].format(file, file.capitalize()).split()
    if inside and not path.exists():
        archive = fetch([address], DOWNLOADS / address.split("/")[-1], None)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(zipfile.ZipFile(archive).read(inside[0]))
        except (KeyError, ValueError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{archive} has no {inside[0]}: delete it")
    return fetch([address], path, sha256)


def training_text(tokenizer, examples):
    """Token ids: each prompt with its right answer, and the end of text after it."""
    texts = [f"{e.prompt} {e.choices[e.answer]}" for e in examples]
    return [i for text in texts for i in (*tokenizer.encode_ordinary(text), tokenizer.end_of_text)]


@torch.no_grad()
def evaluate_task(model, tokenizer, examples, block_size, show=lambda text: None):
    """Nats of all right answers, their token ids, how many examples are too long for a block and
    lose their beginning, and scores: accuracy, the likeliest choice is right (of free answers:
    exact_match); acc_norm, the likeliest per byte is; mcc, Matthews. show: gets progress lines."""
    nats, right, cut = [[0.0] * len(e.choices) for e in examples], [], set()
    waiting = collections.defaultdict(list)  # input to the answers that are read off its output
    for number, (prompt, choices, _) in enumerate(examples):
        for choice, text in enumerate(choices):
            ids = tokenizer.encode_ordinary(f"{prompt} {text}")
            answer = ids[len(tokenizer.encode_ordinary(prompt)) :][-block_size:]
            cut |= {number} if len(ids) > block_size + 1 else set()
            waiting[tuple(ids[-block_size - 1 : -1])].append((number, choice, answer))
    inputs, device = sorted(waiting, key=len), next(model.eval().parameters()).device
    while inputs:  # the longest first, as many as have 2048 tokens together
        show(f"scored {len(waiting) - len(inputs)} of {len(waiting)} inputs")
        part = [inputs.pop() for _ in inputs[: max(1, 2048 // len(inputs[-1]))]]
        ids = pad_sequence([torch.tensor(ids) for ids in part], batch_first=True)
        output = model(ids.to(device))  # (B, T, V); a token's logits see none that follow
        logits = getattr(output, "logits", output).float()
        for row, ids in zip(logits.log_softmax(-1).cpu(), part):
            for number, choice, answer in waiting[ids]:
                log_p = row[torch.arange(len(ids) - len(answer), len(ids)), answer]
                nats[number][choice] = -log_p.sum().item()
                right += answer if choice == examples[number].answer else []
    true, found = np.array([e.answer for e in examples]), np.array([np.argmin(x) for x in nats])
    total = sum(cost[answer] for cost, answer in zip(nats, true))
    sizes = [[len(choice.encode()) for choice in e.choices] for e in examples]
    per_byte = np.array([np.argmin(np.divide(*pair)) for pair in zip(nats, sizes)])
    scores = {"accuracy": (found == true).mean(), "acc_norm": (per_byte == true).mean()}
    if {e.choices for e in examples} == {("no", "yes")}:
        scores["mcc"] = np.corrcoef(true, found)[0, 1] if true.std() * found.std() > 0 else 0.0
    if all(len(e.choices) == 1 for e in examples):
        scores = {"accuracy": exact_match(model, tokenizer, examples, block_size, show, cut)}
    return total, right, len(cut), scores


def exact_match(model, tokenizer, examples, block_size, show, cut):
    """Share of prompts whose greedy continuation gives the answer's number after ####. Prompts of
    equal length share a batch, which then needs no padding."""
    new, waiting, matches = min(256, block_size // 2), collections.defaultdict(list), []
    stop, device = tokenizer.end_of_text, next(model.parameters()).device
    for number, (prompt, (answer,), _) in enumerate(examples):
        ids = tokenizer.encode_ordinary(prompt)
        cut |= {number} if len(ids) > block_size - new else set()
        waiting[min(len(ids), block_size - new)].append((ids[new - block_size :], answer))
    how = {"temperature": 0} if isinstance(model, GPT) else {"do_sample": False, "use_cache": True}
    value = lambda text: re.findall(r"#### *(-?[\d.]*\d)", text.replace(",", ""))[:1]
    parts = [(n, g[i : i + 64]) for n, g in waiting.items() for i in range(0, len(g), 64)]
    for length, group in parts:
        show(f"answered {len(matches)} of {len(examples)}")
        ids = torch.tensor([ids for ids, _ in group], device=device)
        ids = model.generate(ids, max_new_tokens=new, **how)[:, length:].tolist()
        for row, (_, answer) in zip(ids, group):
            text = tokenizer.decode(row[: row.index(stop)] if stop in row else row)
            matches.append(value(text) == value(answer))
    return np.mean(matches)
