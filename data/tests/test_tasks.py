"""Tests of data/tasks.py: the files of the tasks, and a model's scores on them."""

import math
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data import tasks
from data.lib.errors import UserError
from data.tasks import Example, evaluate_task
from data.tests.helpers import QUESTIONS, micro_gpt, nats_of_choice, sha256, softmax64
from tsld import GPT

# --------------------------------------------------------------------------------------
# Files

GLUE_TITLES = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
RTE_TITLES = "index\tsentence1\tsentence2\tlabel\n"
ARC_LETTERS = (
    '{"id": "1", "question": {"stem": "Why?", "choices": '
    '[{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}, "answerKey": "B"}\n'
)
ARC_NUMBERS = (
    '{"id": "1", "question": {"stem": "How?", "choices": '
    '[{"text": "t1", "label": "1"}, {"text": "t2", "label": "2"}, '
    '{"text": "t3", "label": "3"}]}, "answerKey": "3"}'
)

OPINION = "Is this sentence positive or negative?"


def asked(text, question, choices, answer):
    return Example(f"{text}\nQuestion: {question}\nAnswer:", choices, answer)


# Some lines of each file as it is published, and the examples to train and to test on.
TASKS = {
    "cola": (
        {
            "in_domain_train.tsv": "gj04\t1\t\tWe ran.\ngj04\t0\t*\tRan we.\n",
            "in_domain_dev.tsv": "gj04\t1\t\tHe left.\n",
            "out_of_domain_dev.tsv": 'clc95\t0\t*\tLeft "he.',
        },
        [
            asked("We ran.", "Does this sentence make sense?", ("no", "yes"), 1),
            asked("Ran we.", "Does this sentence make sense?", ("no", "yes"), 0),
        ],
        [
            asked("He left.", "Does this sentence make sense?", ("no", "yes"), 1),
            asked('Left "he.', "Does this sentence make sense?", ("no", "yes"), 0),
        ],
    ),
    "mrpc": (
        {
            "msr_paraphrase_train.txt": f"\ufeff{GLUE_TITLES}"
            '1\t1\t2\tA "b.\tB a.\n0\t3\t4\tC.\tD.\n',
            "dev.tsv": f"\ufeff{GLUE_TITLES}0\t3\t4\tC.\tD.\n",
        },
        [
            asked(
                'Sentence 1: A "b.\nSentence 2: B a.',
                "Do both sentences mean the same thing?",
                ("no", "yes"),
                1,
            )
        ],
        [
            asked(
                "Sentence 1: C.\nSentence 2: D.",
                "Do both sentences mean the same thing?",
                ("no", "yes"),
                0,
            )
        ],
    ),
    "rte": (
        {
            "train.tsv": f"{RTE_TITLES}0\tA.\tB.\tentailment\n",
            "dev.tsv": f"{RTE_TITLES}0\tC.\tD.\tnot_entailment\n",
        },
        [Example("A.\nQuestion: B. True or False?\nAnswer:", ("True", "False"), 0)],
        [Example("C.\nQuestion: D. True or False?\nAnswer:", ("True", "False"), 1)],
    ),
    "sst2": (
        {
            "train.tsv": "sentence\tlabel\nfine \t1\n",
            "dev.tsv": 'sentence\tlabel\nso " so \t0\n',
        },
        [asked("fine", OPINION, ("negative", "positive"), 1)],
        [asked('so " so', OPINION, ("negative", "positive"), 0)],
    ),
    "arc_easy": (
        {"train.jsonl": ARC_LETTERS, "test.jsonl": ARC_NUMBERS},
        [Example("Question: Why?\nAnswer:", ("a", "b"), 1)],
        [Example("Question: How?\nAnswer:", ("t1", "t2", "t3"), 2)],
    ),
    "arc_challenge": (
        {"train.jsonl": ARC_NUMBERS, "test.jsonl": ARC_LETTERS},
        [Example("Question: How?\nAnswer:", ("t1", "t2", "t3"), 2)],
        [Example("Question: Why?\nAnswer:", ("a", "b"), 1)],
    ),
    "openbookqa": (
        {"train.jsonl": f"\ufeff{ARC_LETTERS}", "test.jsonl": ARC_NUMBERS},
        [Example("Why?", ("a", "b"), 1)],
        [Example("How?", ("t1", "t2", "t3"), 2)],
    ),
    "piqa": (
        {
            "train.jsonl": '{"goal": "g", "sol1": "x", "sol2": "y"}\n',
            "train-labels.lst": "0\n",
            "valid.jsonl": '{"goal": "h", "sol1": "u", "sol2": "v"}\n'
            '{"goal": "i", "sol1": "w", "sol2": "z"}\n',
            "valid-labels.lst": "1\n0\n",
        },
        [Example("Question: g\nAnswer:", ("x", "y"), 0)],
        [
            Example("Question: h\nAnswer:", ("u", "v"), 1),
            Example("Question: i\nAnswer:", ("w", "z"), 0),
        ],
    ),
    "gsm8k": (
        {
            "train.jsonl": '{"question": "1+1?", "answer": "It is\\n#### 2"}\n',
            "test.jsonl": '{"question": "1+2?", "answer": "#### 3"}\n',
        },
        [Example("Question: 1+1?\nAnswer:", ("It is\n#### 2",), 0)],
        [Example("Question: 1+2?\nAnswer:", ("#### 3",), 0)],
    ),
}


def count_of(name, text):
    titles = 1 if name in ("mrpc", "rte", "sst2") else 0
    return len(text.splitlines()) - titles


@pytest.fixture
def put_files(tmp_path, monkeypatch):
    """A function that puts a task's files of TASKS where load_task looks for them, and
    lists them with their SHA-256 and with their numbers of examples plus `more`."""

    def put(name, more=0):
        rows = []
        for file, text in TASKS[name][0].items():
            content = text.encode()
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
            count = count_of(name, text) + more
            rows.append(f"{sha256(content)} {count} {name}/{file}")

        monkeypatch.setattr(tasks, "DOWNLOADS", tmp_path)
        monkeypatch.setattr(tasks, "FILES", "\n".join(rows))
        return tmp_path / name

    return put


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_files_become_prompts_choices_and_answers(name, put_files):
    put_files(name)
    _, train, test = TASKS[name]
    assert tasks.load_task(name) == (train, test)


def test_a_tasks_name_is_not_taken_for_the_beginning_of_another(put_files, monkeypatch):
    put_files("rte")
    both = tasks.FILES.splitlines()
    both += [row.replace("rte/", "rte_more/") for row in both]
    monkeypatch.setattr(tasks, "FILES", "\n".join(both))
    assert tasks.load_task("rte") == TASKS["rte"][1:]


def test_a_file_with_another_number_of_examples_is_refused(put_files):
    put_files("rte", more=7)
    message = "train.tsv has 1 examples and not 8: delete it, to download it again"
    with pytest.raises(UserError, match=message):
        tasks.load_task("rte")


def test_a_file_with_another_checksum_is_refused(put_files):
    folder = put_files("rte")
    (folder / "dev.tsv").write_bytes(b"something else")
    with pytest.raises(UserError, match="dev.tsv does not match its SHA-256"):
        tasks.load_task("rte")


@pytest.mark.parametrize(
    "name, content",
    [
        ("rte", "titles\n0\tA.\tB.\tmaybe\n"),
        ("rte", "titles\n0\tA.\n"),
        ("sst2", "titles\nfine\tyes\n"),
        ("gsm8k", "{"),
        ("gsm8k", "1"),
        ("gsm8k", '{"question": "1+1?"}'),
        ("arc_easy", ARC_LETTERS.replace('"answerKey": "B"', '"answerKey": "C"')),
        ("gsm8k", b"\xff"),
    ],
)
def test_a_file_that_holds_no_examples_is_refused(
    name, content, put_files, monkeypatch
):
    folder = put_files(name)
    without_checksums = re.sub("[0-9a-f]{64}", "-", tasks.FILES)
    monkeypatch.setattr(tasks, "FILES", without_checksums)
    (path,) = folder.glob("train*")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(UserError, match=r"train.* is damaged \(.*Error.*\): delete it"):
        tasks.load_task(name)


def test_a_file_is_downloaded_from_its_tasks_folder(put_files, monkeypatch, tmp_path):
    put_files("rte")
    (tmp_path / "rte").rename(tmp_path / "published")
    folder = (tmp_path / "published").as_uri()
    monkeypatch.setattr(tasks, "FOLDERS", {"rte": folder})

    assert tasks.load_task("rte") == TASKS["rte"][1:]

    monkeypatch.setattr(tasks, "FOLDERS", {"rte": "file:///nowhere"})
    assert tasks.load_task("rte") == TASKS["rte"][1:]  # it is kept


def test_a_task_that_cannot_be_downloaded_names_all_its_files(
    no_network, monkeypatch, tmp_path
):
    monkeypatch.setattr(tasks, "DOWNLOADS", tmp_path)
    files = "in_domain_train.tsv, in_domain_dev.tsv, out_of_domain_dev.tsv"
    message = f"or copy it into {tmp_path / 'cola'}; it takes {files} there$"
    with pytest.raises(UserError, match=message):
        tasks.load_task("cola")

    message = f"ARC-V1-Feb2018.zip cannot be .* or copy it into {tmp_path}$"
    with pytest.raises(UserError, match=message):
        tasks.load_task("arc_easy")


def test_a_file_is_taken_out_of_its_tasks_archive(put_files, monkeypatch, tmp_path):
    folder = put_files("arc_easy")
    with zipfile.ZipFile(tmp_path / "published.zip", "w") as archive:
        archive.write(folder / "train.jsonl", "arc/train.jsonl/ARC-Train.jsonl")
        archive.write(folder / "test.jsonl", "arc/test.jsonl/ARC-Test.jsonl")

    for file in ("train.jsonl", "test.jsonl"):
        (folder / file).unlink()

    folder.rmdir()

    address = (tmp_path / "published.zip").as_uri()
    archives = {"arc_easy": (address, "arc/{file}/ARC-{File}")}
    monkeypatch.setattr(tasks, "ARCHIVES", archives)

    assert tasks.load_task("arc_easy") == TASKS["arc_easy"][1:]

    (tmp_path / "published.zip").unlink()
    assert tasks.load_task("arc_easy") == TASKS["arc_easy"][1:]  # the files are kept


def test_an_archive_that_is_damaged_or_lacks_a_file_is_refused(
    put_files, monkeypatch, tmp_path
):
    folder = put_files("arc_easy")
    (folder / "train.jsonl").unlink()
    path = tmp_path / "published.zip"
    archives = {"arc_easy": (path.as_uri(), "arc/{file}")}
    monkeypatch.setattr(tasks, "ARCHIVES", archives)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arc/other.jsonl", ARC_LETTERS)

    with pytest.raises(UserError, match="published.zip has no arc/train.jsonl: delete"):
        tasks.load_task("arc_easy")

    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="published.zip has no arc/train.jsonl: delete"):
        tasks.load_task("arc_easy")

    assert not (folder / "train.jsonl").exists()


def test_every_task_has_files_with_an_address_and_a_prompt():
    rows = [row.split() for row in tasks.FILES.strip().splitlines()]
    names = {file.split("/")[0] for _, _, file in rows}

    assert len(names) == 9
    assert names == set(tasks.PROMPTS)
    assert names == {*tasks.FOLDERS, *tasks.ARCHIVES}

    for checksum, count, file in rows:
        assert re.fullmatch("-|[0-9a-f]{64}", checksum), file
        assert int(count) > 200, file

    addresses = [*tasks.FOLDERS.values()]
    addresses += [address for address, _ in tasks.ARCHIVES.values()]

    assert all(address.startswith("https://") for address in addresses)


def test_a_task_is_trained_on_as_prompts_with_right_answers_and_ends(small_vocabulary):
    ids = tasks.training_text(small_vocabulary, QUESTIONS[:2])
    assert small_vocabulary.decode(ids) == (
        "The cat sat.\nQuestion: Yes or no?\nAnswer: yes\0"
        "Question: Why?\nAnswer: ünïcödé\0"
    )


# --------------------------------------------------------------------------------------
# Choices


def task_model(block_size=64, seed=0, **changes):
    """A model for the small vocabulary. Its logits are large, so choices differ."""
    return micro_gpt(seed, block_size=block_size, vocab_size=2048, **changes)


def word_tokenizer(words):
    """Gives each word a token: its place among `words`."""
    return SimpleNamespace(
        encode_ordinary=lambda text: [words.index(word) for word in text.split()]
    )


def choice_costs(model, tokenizer, example, block_size):
    return [
        nats_of_choice(model, tokenizer, example.prompt, text, block_size)
        for text in example.choices
    ]


@pytest.mark.parametrize("block_size", [64, 16, 7])
def test_a_tasks_scores_are_the_choices_log_likelihoods(block_size, small_vocabulary):
    model = task_model(block_size)
    encode = small_vocabulary.encode_ordinary
    total, likeliest, likeliest_per_byte, cut, tokens = 0.0, 0, 0, 0, []
    for example in QUESTIONS:
        costs = choice_costs(model, small_vocabulary, example, block_size)
        per_byte = [
            cost / len(text.encode()) for cost, text in zip(costs, example.choices)
        ]
        total += costs[example.answer]
        likeliest += costs[example.answer] == min(costs)
        likeliest_per_byte += per_byte[example.answer] == min(per_byte)

        lengths = [len(encode(f"{example.prompt} {x}")) for x in example.choices]
        cut += max(lengths) > block_size + 1
        tokens += encode(f" {example.choices[example.answer]}")[-block_size:]

    result = evaluate_task(model, small_vocabulary, QUESTIONS, block_size)
    assert result[0] == pytest.approx(total, rel=1e-5)
    assert result[1] == len(tokens)
    assert result[2] == len(small_vocabulary.decode_bytes(tokens))
    assert result[3] == cut
    assert result[4] == {"accuracy": likeliest / 4, "acc_norm": likeliest_per_byte / 4}


def test_a_task_is_scored_without_dropout_and_without_a_graph(small_vocabulary):
    model = task_model(dropout=0.5)
    expected = evaluate_task(model, small_vocabulary, QUESTIONS, 64)
    watched = []
    model.register_forward_hook(lambda *call: watched.append(call[-1].requires_grad))

    assert evaluate_task(model.train(), small_vocabulary, QUESTIONS, 64) == expected
    assert watched == [False]


def test_a_prompt_is_cut_where_the_block_cannot_predict_every_token_after_the_first(
    small_vocabulary,
):
    example = QUESTIONS[0]
    length = max(
        len(small_vocabulary.encode_ordinary(f"{example.prompt} {text}"))
        for text in example.choices
    )
    for block_size, cut in ((length, 0), (length - 1, 0), (length - 2, 1)):
        model = task_model(block_size)
        result = evaluate_task(model, small_vocabulary, [example], block_size)
        assert result[3] == cut


def test_a_choice_is_as_long_as_its_bytes():
    uniform = micro_gpt()
    uniform.ln_f.weight.data.zero_()  # every choice of one token costs log 17
    examples = [Example("a", ("éé", "abc"), 0), Example("a", ("abc", "éé"), 1)]
    *_, scores = evaluate_task(uniform, word_tokenizer(["éé", "abc", "a"]), examples, 8)
    assert scores["acc_norm"] == 1  # 4 bytes against 3, though 2 letters against 3


def test_matthews_correlation_is_its_definition():
    words = ["no", "yes", "the", "cat", "a", "dog", "ran", "sat", "long", "rained"]
    tokenizer = word_tokenizer(words)
    model = micro_gpt(1)
    model.ln_f.bias.data.zero_()  # else one answer is always likelier
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(40):
        prompt = " ".join(rng.choice(words[2:], size=4))
        examples.append(Example(prompt, ("no", "yes"), int(rng.integers(2))))

    counts = np.zeros((2, 2))  # the right answer, the one found
    for example in examples:
        no, yes = choice_costs(model, tokenizer, example, 8)
        counts[example.answer, int(yes < no)] += 1

    (tn, fp), (fn, tp) = counts
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)

    assert product > 0

    *_, scores = evaluate_task(model, tokenizer, examples, 8)
    assert scores["mcc"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(product))
    assert scores["accuracy"] == pytest.approx((tp + tn) / 40)


def test_matthews_correlation_is_0_where_all_answers_are_one():
    mixed, constant = np.array([0, 1, 1, 0]), np.array([1, 1, 1, 1])
    assert tasks.matthews(constant, mixed) == 0
    assert tasks.matthews(mixed, constant) == 0
    assert tasks.matthews(mixed, mixed) == pytest.approx(1)


def test_inputs_of_like_length_are_scored_together_and_with_2048_tokens_at_most():
    lengths = np.random.default_rng(0).integers(1, 400, size=300).tolist() + [3000]
    contexts = [(number,) * length for number, length in enumerate(lengths)]
    batches = list(tasks.batches(contexts))

    assert sorted(sum(batches, [])) == sorted(contexts)
    assert [len(context) for context in sum(batches, [])] == sorted(lengths)[::-1]
    assert len(batches[0]) == 1

    for batch, next_batch in zip(batches[1:], batches[2:]):
        longest = len(batch[0])
        assert len(batch) * longest <= 2048 < (len(batch) + 1) * longest
        assert len(next_batch[0]) <= longest


def test_progress_counts_the_inputs(monkeypatch):
    monkeypatch.setattr(tasks, "BATCH_TOKENS", 4)
    words = ["no", "yes", "a", "b", "c"]
    prompts = ["a a", "a b", "b a", "b b", "c a"]  # each is an input of both choices
    examples = [Example(prompt, ("no", "yes"), 0) for prompt in prompts]

    lines = []
    evaluate_task(micro_gpt(), word_tokenizer(words), examples, 8, lines.append)
    assert lines == [f"scored {number} of 5 inputs" for number in (0, 2, 4)]


class Constant(nn.Module):
    """Its logits are the same for every token, and bfloat16."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5, 4.0, -3.0]).bfloat16())

    def forward(self, ids):
        return self.logits.expand(*ids.shape, 3)


def test_probabilities_are_float32_whatever_the_logits_are():
    example = Example("a", ("no",) * 2, 0)
    model = Constant()
    nats, *_ = evaluate_task(model, word_tokenizer(["a", "yes", "no"]), [example], 8)

    expected = -math.log(softmax64(model.logits.float().detach())[2])
    assert nats == pytest.approx(expected, rel=1e-6)


def test_chance_is_a_guess_or_one_answer_to_all():
    choices = [("a", "b"), ("a", "b", "c", "d")]
    mixed = [Example("x", texts, 0) for texts in choices]
    assert tasks.chance(mixed) == {"a guess": 0.375}

    answers = [1, 0, 1, 1, 1]
    alike = [Example("x", ("no", "yes"), answer) for answer in answers]
    assert tasks.chance(alike) == {"a guess": 0.5, "always 'yes'": 0.8}
    assert tasks.chance([Example("x", ("free",), 0)]) == {}
    assert tasks.chance([]) == {}


# --------------------------------------------------------------------------------------
# Free answers


class Says(GPT):
    """Continues each prompt with what `says` has for it, and then with anything."""

    largest_batch = 0

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        assert temperature == 0

        self.largest_batch = max(self.largest_batch, len(ids))
        rows = []
        for row in ids.tolist():
            said = self.tokenizer.encode_ordinary(self.says[self.tokenizer.decode(row)])
            more = [self.tokenizer.end_of_text, 4, 2] * max_new_tokens
            rows.append(row + (said + more)[:max_new_tokens])

        return torch.tensor(rows)


@pytest.mark.parametrize(
    "said, number, is_right",
    [
        ("so 1,300.\n#### 1,234", "1,234", True),
        ("#### 1234.", "1,234", True),
        ("####1234\n#### 5", "1,234", True),
        ("#### 12345", "1,234", False),
        ("#### -1234", "1,234", False),
        ("1234", "1,234", False),
        ("#### 1234.5", "1,234", False),
        ("\0#### 1234", "1,234", False),  # after the end of the text
        ("#### -7", "-7", True),
        ("#### -8", "-7", False),
    ],
)
def test_a_free_answer_matches_where_its_number_is_the_answers(
    said, number, is_right, small_vocabulary
):
    model = Says(task_model(256).config)
    model.tokenizer = small_vocabulary
    prompts = ["Question: How many?\nAnswer:", "Question: What?\nAnswer:"]
    model.says = {prompts[0]: said, prompts[1]: "none"}
    answer = f"It is 3.\n#### {number}"
    examples = [Example(prompt, (answer,), 0) for prompt in prompts]

    result = evaluate_task(model, small_vocabulary, examples * 70, 256)
    assert result[4] == {"accuracy": is_right / 2}
    assert model.largest_batch == 64  # of 70 that have one length


def test_free_answers_are_the_models_own_greedy_text(small_vocabulary):
    """This model never writes ####. The tokenizer does, and the sum of the ids."""
    tokenizer = SimpleNamespace(
        encode_ordinary=small_vocabulary.encode_ordinary,
        decode=lambda ids: f"#### {sum(ids)}",
        end_of_text=None,
    )
    model = task_model(16)
    prompts = ["the cat", "a dog", "it rained", "The quick brown fox jumps over a dog"]
    examples = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode_ordinary(prompt)[-8:]])
        continued = model.generate(ids, 8, temperature=0)[0, ids.shape[1] :]
        answer = tokenizer.decode(continued.tolist())
        examples.append(Example(prompt, (answer,), 0))

    lengths = [len(tokenizer.encode_ordinary(prompt)) for prompt in prompts]
    assert min(lengths) < 8 < max(lengths)

    lines = []
    *_, scores = evaluate_task(model, tokenizer, examples, 16, lines.append)

    assert scores == {"accuracy": 1.0}
    assert "answered 0 of 4" in lines


def test_an_answer_has_half_a_block_and_256_tokens_at_most(small_vocabulary):
    model = Says(task_model(8).config)
    asked = []

    def generate(ids, max_new_tokens, temperature):
        asked.append((ids.shape[1], max_new_tokens))
        return torch.cat([ids, ids.new_zeros(len(ids), max_new_tokens)], 1)

    model.generate = generate
    example = Example("the cat " * 400, ("#### 1",), 0)
    for block_size, prompt, new_tokens in ((8, 4, 4), (9, 5, 4), (600, 344, 256)):
        texts, is_cut = tasks.free_answers(
            model, small_vocabulary, [example], block_size, tasks.no_progress
        )
        assert asked.pop() == (prompt, new_tokens)
        assert texts == [""]
        assert is_cut == [True]


def test_a_question_is_cut_where_its_answer_leaves_no_room(small_vocabulary):
    encode = small_vocabulary.encode_ordinary
    ids = encode("the cat sat on a mat while it rained")
    model = task_model(16)

    # A block of 16 leaves 8 tokens for the question, and 17 for it and its answer.
    for length, answer, is_cut in (
        (8, "#### 1", False),
        (9, "#### 1", True),
        (8, "#### 1" * 5, True),
    ):
        prompt = small_vocabulary.decode(ids[:length])
        assert len(encode(prompt)) == length
        assert (len(encode(f"{prompt} {answer}")) > 17) == (answer != "#### 1")

        example = Example(prompt, (answer,), 0)
        result = evaluate_task(model, small_vocabulary, [example] * 3, 16)
        assert result[3] == 3 * is_cut
