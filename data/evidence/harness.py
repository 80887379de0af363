"""The task scores beside lm-evaluation-harness's, example by example.

    pip install "lm-eval[hf]"
    python -m data.evidence.harness FOLDER           # a model of transformers; 200 examples a task
    python -m data.evidence.harness FOLDER random    # a minute random one, with its tokenizer

The harness brings its own task definitions (prompts, choices, answers, measures). Only the data come
from data/downloads/, read a second time by this file into the columns that it expects. GSM8K, which
has no choices, is not compared."""

import importlib.resources
import importlib.util
import json
import logging
import sys

import numpy as np
import torch

import train_small
from data import exchange, tasks
from data.texts import UserError

# Task: the harness's definition, our files, and its columns from a line of ours.
GLUE, LINES = "glue/{}/default.yaml", {"entailment": 0, "not_entailment": 1, "0": 0, "1": 1}
DEFINITIONS = {
    "cola": (GLUE, "in_domain_dev.tsv out_of_domain_dev.tsv", {"sentence": 3, "label": 1}),
    "mrpc": (GLUE, "dev.tsv", {"sentence1": 3, "sentence2": 4, "label": 0}),
    "rte": (GLUE, "dev.tsv", {"sentence1": 1, "sentence2": 2, "label": 3}),
    "sst2": (GLUE, "dev.tsv", {"sentence": 0, "label": 1}),
    "arc_easy": ("arc/{}.yaml", "test.jsonl", "question"),
    "arc_challenge": ("arc/{}.yaml", "test.jsonl", "question"),
    "openbookqa": ("openbookqa/{}.yaml", "test.jsonl", "question_stem"),
    "piqa": ("piqa/{}.yaml", "valid.jsonl", None),
}


def main(argv, count=200):
    if not argv or argv[1:] not in ([], ["random"]):
        raise UserError("the harness takes the folder of a model, and the word random or nothing")
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("it takes the package lm-eval, which is not installed")
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    model, tokenizer = exchange.load_theirs(argv[0])
    if argv[1:]:
        model = random_model(model.config.vocab_size)
    kinds = {"batch_size": 8, "add_bos_token": False}  # no token in front, as in training
    harness = HFLM(pretrained=model, tokenizer=tokenizer.theirs, **kinds)
    print("| task | accuracy | the harness | per byte | the harness | its acc_norm | ", end="")
    print("prompts alike | choices alike | largest difference, nats |\n" + "| --- " * 9 + "|")
    for task in DEFINITIONS:
        examples = tasks.load_task(task)[1][:count]
        costs = costs_of_choices(model, tokenizer, examples)
        results = evaluate(harness, task, count)
        samples, scores = results["samples"][task], results["results"][task]
        samples.sort(key=lambda sample: sample["doc_id"])
        theirs = [[-float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
        prompts = [sample["arguments"][0][0] for sample in samples]
        alike = sum(e.prompt == prompt for e, prompt in zip(examples, prompts, strict=True))
        same = sum(np.argmin(a) == np.argmin(b) for a, b in zip(costs, theirs))
        apart = max(np.abs(np.subtract(a, b)).max() for a, b in zip(costs, theirs))
        ours = tasks.evaluate_task(model, tokenizer, examples, 512)[-1]
        pairs = [
            (ours["accuracy"], scores["acc,none"]),
            (ours["acc_norm"], scores["acc_bytes,none"]),
        ]
        cells = [f"{x:.3f}" for pair in pairs for x in pair] + [f"{scores['acc_norm,none']:.3f}"]
        cells += [f"{alike} of {len(prompts)}", f"{same}", f"{apart:.1e}"]
        print(f"| {task} | " + " | ".join(cells) + " |", flush=True)


def random_model(vocab_size):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    shape |= {"intermediate_size": 128, "tie_word_embeddings": True, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size, max_position_embeddings=1024, **shape)).eval()


@torch.no_grad()
def costs_of_choices(model, tokenizer, examples):
    """Nats of each choice, each by an evaluation of its own, as the right one."""
    one = lambda e, i: tasks.evaluate_task(model, tokenizer, [e._replace(answer=i)], 512)[0]
    return [[one(e, i) for i in range(len(e.choices))] for e in examples]


def evaluate(harness, task, count):
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    path, files, columns = DEFINITIONS[task]
    config = definition(path.format(task))
    rows = datasets.Dataset.from_list([*rows_of(task, files.split(), columns)][:count])
    split = config.get("test_split") or config["validation_split"]
    config |= {"custom_dataset": lambda **_: {split: rows}, "fewshot_split": split}
    config |= {"training_split": None, "validation_split": None, "test_split": split}
    measures = ("acc", "acc_norm", "acc_bytes")
    config["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in measures
    ]
    config = ConfigurableTask(config=config)
    quiet = {"log_samples": True, "verbosity": "ERROR", "bootstrap_iters": 0}
    return lm_eval.simple_evaluate(harness, tasks=[config], **quiet)


def definition(path):
    """A task's YAML file in the harness, with the one that it includes."""
    import yaml

    text = importlib.resources.files("lm_eval") / "tasks" / path
    config = yaml.safe_load(text.read_text())
    included = config.pop("include", None)
    whole = definition(f"{path.rsplit('/', 1)[0]}/{included}") if included else {}
    return {
        k: x
        for k, x in (whole | config).items()
        if k not in ("tag", "dataset_path", "dataset_name")
    }


def rows_of(task, files, columns):
    """SST-2's sentences end in a space. tasks.py strips it, and so does this."""
    folder = tasks.DOWNLOADS / task
    for file in files:
        lines = (folder / file).read_text("utf-8-sig").removesuffix("\n").split("\n")
        if file.endswith(".tsv"):
            for line in lines if task == "cola" else lines[1:]:
                row = line.split("\t")
                found = {name: row[place].strip() for name, place in columns.items()}
                yield found | {"label": LINES[found["label"]]}
        elif task == "piqa":
            labels = (folder / "valid-labels.lst").read_text().split()
            yield from (json.loads(x) | {"label": int(y)} for x, y in zip(lines, labels))
        else:
            for row in map(json.loads, lines):
                choices = row["question"]["choices"]
                lists = {key: [choice[key] for choice in choices] for key in ("text", "label")}
                stem = {columns: row["question"]["stem"]}
                yield stem | {"choices": lists, "answerKey": row["answerKey"]}


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
