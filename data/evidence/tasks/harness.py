"""The task scores beside lm-evaluation-harness's, example by example.

    pip install "lm-eval[hf]"
    python -m data.evidence.tasks.harness FOLDER           # a model of transformers
    python -m data.evidence.tasks.harness FOLDER random    # a minute random one

It takes 200 examples of a task; the random model has the folder's tokenizer. The
harness brings its own task definitions (prompts, choices, answers, measures). Only the
data come from data/downloads/, read a second time by this file into the columns that it
expects. GSM8K, which has no choices, is not compared."""

import importlib.resources
import importlib.util
import json
import logging
import sys

import numpy as np
import torch

import train_small
from data import tasks
from data.evidence.rows import markdown, words_parser
from data.lib import hf
from data.lib.errors import UserError

# Task: the harness's definition, our files, and its columns from a line of ours.
GLUE = "glue/{}/default.yaml"
COLA = ["in_domain_dev.tsv", "out_of_domain_dev.tsv"]
DEFINITIONS = {
    "cola": (GLUE, COLA, {"sentence": 3, "label": 1}),
    "mrpc": (GLUE, ["dev.tsv"], {"sentence1": 3, "sentence2": 4, "label": 0}),
    "rte": (GLUE, ["dev.tsv"], {"sentence1": 1, "sentence2": 2, "label": 3}),
    "sst2": (GLUE, ["dev.tsv"], {"sentence": 0, "label": 1}),
    "arc_easy": ("arc/{}.yaml", ["test.jsonl"], "question"),
    "arc_challenge": ("arc/{}.yaml", ["test.jsonl"], "question"),
    "openbookqa": ("openbookqa/{}.yaml", ["test.jsonl"], "question_stem"),
    "piqa": ("piqa/{}.yaml", ["valid.jsonl"], None),
}
LABELS = {"entailment": 0, "not_entailment": 1, "0": 0, "1": 1}
COLUMNS = ["task", "accuracy", "the harness", "per byte", "the harness", "its acc_norm"]
COLUMNS += ["prompts alike", "choices alike", "largest difference, nats"]
BLOCK_SIZE = 512


def main(argv, count=200):
    parser = words_parser(
        "tasks.harness", "The task scores beside lm-evaluation-harness's."
    )
    parser.add_argument("folder", help="a model of transformers")
    parser.add_argument("random", nargs="?", choices=["random"], help="a minute model")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("it takes the package lm-eval, which is not installed")
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = hf.load_model(args.folder)
    if args.random:
        model = hf.adapted(random_model(model.config.vocab_size))

    # No token in front, as in training.
    options = {"batch_size": 8, "add_bos_token": False}
    harness = HFLM(pretrained=model.inner, tokenizer=tokenizer.wrapped, **options)

    print(markdown(COLUMNS, []), end="")
    for task in DEFINITIONS:
        line = compare(task, model, tokenizer, harness, count)
        print(f"| {' | '.join(line)} |", flush=True)


def random_model(vocab_size):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    shape |= {"intermediate_size": 128, "max_position_embeddings": 1024}
    config = LlamaConfig(vocab_size, **shape, tie_word_embeddings=True)
    config.initializer_range = 0.3

    return LlamaForCausalLM(config).eval()


def compare(task, model, tokenizer, harness, count):
    """The cells of a task's line."""
    _, examples = tasks.load_task(task)
    examples = examples[:count]
    *_, scores = tasks.evaluate_task(model, tokenizer, examples, BLOCK_SIZE)
    costs = costs_of_choices(model, tokenizer, examples)

    results = evaluate(harness, task, count)
    harness_scores = results["results"][task]
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])

    same_prompts = 0
    same_choices = 0
    difference = 0.0
    for example, of_example, sample in zip(examples, costs, samples, strict=True):
        of_harness = [-float(answer[0][0]) for answer in sample["resps"]]
        same_prompts += example.prompt == sample["arguments"][0][0]
        same_choices += np.argmin(of_example) == np.argmin(of_harness)
        difference = max(difference, *np.abs(np.subtract(of_example, of_harness)))

    pairs = [(scores["accuracy"], harness_scores["acc,none"])]
    pairs.append((scores["acc_norm"], harness_scores["acc_bytes,none"]))
    cells = [f"{score:.3f}" for pair in pairs for score in pair]
    cells += [f"{harness_scores['acc_norm,none']:.3f}"]
    cells += [f"{same_prompts} of {len(samples)}", f"{same_choices}"]

    return [task, *cells, f"{difference:.1e}"]


def costs_of_choices(model, tokenizer, examples):
    """Nats of each choice, each by an evaluation of its own, as the right one."""

    def cost(example):
        nats, *_ = tasks.evaluate_task(model, tokenizer, [example], BLOCK_SIZE)
        return nats

    return [
        [cost(example._replace(answer=i)) for i in range(len(example.choices))]
        for example in examples
    ]


def evaluate(harness, task, count):
    """The harness's own results, with its definition of the task and our data."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    path, files, columns = DEFINITIONS[task]
    config = definition(path.format(task))
    examples = datasets.Dataset.from_list([*rows_of(task, files, columns)][:count])
    split = config.get("test_split") or config["validation_split"]
    config |= {"custom_dataset": lambda **_: {split: examples}, "fewshot_split": split}
    config |= {"training_split": None, "validation_split": None, "test_split": split}
    config["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm", "acc_bytes")
    ]
    options = {"log_samples": True, "verbosity": "ERROR", "bootstrap_iters": 0}
    config = ConfigurableTask(config=config)

    return lm_eval.simple_evaluate(harness, tasks=[config], **options)


def definition(path):
    """A task's YAML file in the harness, with the one that it includes."""
    import yaml

    file = importlib.resources.files("lm_eval") / "tasks" / path
    config = yaml.safe_load(file.read_text())
    included = config.pop("include", None)

    if included:
        folder = path.rsplit("/", 1)[0]
        config = definition(f"{folder}/{included}") | config

    foreign = ("tag", "dataset_path", "dataset_name")
    return {key: config[key] for key in config if key not in foreign}


def rows_of(task, files, columns):
    """The lines of a task's files in the harness's columns. SST-2's sentences end in a
    space. tasks.py strips it, and so does this."""
    folder = tasks.DOWNLOADS / task

    for file in files:
        lines = (folder / file).read_text("utf-8-sig").removesuffix("\n").split("\n")
        if file.endswith(".tsv"):
            has_titles = task != "cola"
            for line in lines[has_titles:]:
                cells = line.split("\t")
                row = {name: cells[place].strip() for name, place in columns.items()}
                yield row | {"label": LABELS[row["label"]]}
        elif task == "piqa":
            labels = (folder / "valid-labels.lst").read_text().split()
            for line, label in zip(lines, labels):
                yield json.loads(line) | {"label": int(label)}
        else:
            for row in map(json.loads, lines):
                question = row["question"]
                choices = {"text": [], "label": []}

                for choice in question["choices"]:
                    choices["text"].append(choice["text"])
                    choices["label"].append(choice["label"])

                answer = {"choices": choices, "answerKey": row["answerKey"]}
                yield {columns: question["stem"], **answer}


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
