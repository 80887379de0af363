"""data/lib/sources.py: the texts and the model that a run starts from.

A GPT stands in for what transformers loads. test_run.py has a real model of it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train_small
from data import tasks, texts
from data.lib import published, sources
from data.lib.errors import UserError
from data.tests.helpers import MICRO, QUESTIONS, WORDS, micro_gpt
from tsld import GPT, GPTConfig

TINY, GPT2 = train_small.TINY, train_small.GPT2

# --------------------------------------------------------------------------------------
# Texts


def test_a_corpus_has_its_name_and_parts_and_is_announced(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes((WORDS * 20).encode())

    name, parts, examples = sources.load_texts(str(path), task=None)
    assert (name, examples) == (str(path), None)
    assert parts == texts.split_text((WORDS * 20).encode())
    assert capsys.readouterr().out == f"corpus: {path}, as asked for\n"


def test_without_the_treebank_a_run_takes_pydoc_and_says_why(
    mirrors, no_network, capsys
):
    name, _, _ = sources.load_texts(None, task=None)
    printed = capsys.readouterr().out
    assert name == "pydoc"
    assert printed.startswith("corpus: pydoc: ")
    assert "ptb.train.txt cannot be downloaded" in printed


def test_a_task_is_trained_on_its_training_examples_and_evaluated_on_the_others(
    monkeypatch, capsys
):
    train, examples = QUESTIONS[1:], QUESTIONS[:2]
    monkeypatch.setattr(tasks, "load_task", {"cola": (train, examples)}.get)
    name, parts, evaluated = sources.load_texts(None, "cola")

    assert (name, evaluated) == ("cola", examples)
    assert parts == {"train": train, "valid": examples, "test": examples}

    words = "corpus: cola, 3 examples, 2 to evaluate on\n"
    assert capsys.readouterr().out == words


def a_source(block_size):
    """As many tokens as characters, and sequences of so many."""
    tokenizer = SimpleNamespace(
        encode_ordinary=lambda text: [ord(c) for c in text],
        size_before=lambda text, ids, count: len(text[:count].encode()),
    )
    preset = sources.with_block_size(TINY, block_size)
    return sources.Source("tiny", None, tokenizer, preset, "scratch")


def test_texts_become_tokens_and_the_student_sees_the_first_of_them():
    parts = {"train": "abcdef", "valid": "xy", "test": "é!"}
    tokens, size = sources.encode(parts, a_source(4), n_student=5)
    found = {part: ids.tolist() for part, ids in tokens.items()}

    assert found == {
        "train": [97, 98, 99, 100, 101, 102],
        "student": [97, 98, 99, 100, 101],
        "valid": [120, 121],
        "test": [233, 33],
    }
    assert tokens["train"].dtype == torch.int64
    assert size == {"valid": 1, "test": 1}  # the bytes of what follows "x" and "é"

    tokens, _ = sources.encode(parts, a_source(4), n_student=None)
    assert len(tokens["student"]) == 6


def test_examples_become_a_text_of_prompts_and_right_answers(small_vocabulary):
    parts = dict.fromkeys(texts.PARTS, QUESTIONS)
    source = a_source(4)
    source.tokenizer = small_vocabulary
    ids = tasks.training_text(small_vocabulary, QUESTIONS)
    tokens, size = sources.encode(parts, source, None)
    assert tokens["valid"].tolist() == [*ids]
    assert size == {}  # a task's scores count the bytes of its answers


@pytest.mark.parametrize(
    "part, length, least",
    [("train", 4, 5), ("student", 4, 5), ("valid", 1, 2), ("test", 0, 2)],
)
def test_a_text_that_is_too_short_is_refused_by_its_part(part, length, least):
    parts = dict.fromkeys(texts.PARTS, "abcdefgh")
    n_student = length if part == "student" else None
    if part != "student":
        parts[part] = parts[part][:length]

    with pytest.raises(UserError) as refusal:
        sources.encode(parts, a_source(4), n_student)

    counts = f"{length} tokens, and it takes {least} or more"
    assert str(refusal.value) == f"the {part} text is too short: {counts}"


# --------------------------------------------------------------------------------------
# Presets


def small(preset):
    """The preset with a model of a few thousand parameters."""
    gpt = GPTConfig(8, 17, n_layer=1, n_head=1, n_embd=64)
    return replace(preset, gpt=gpt, tokenizer="bpe2048")


def test_a_preset_gives_a_new_gpt_of_its_shape_from_the_seed():
    source = sources.from_preset("tiny", small(TINY), block_size=5, seed=3)
    assert (source.name, source.init) == ("tiny", "scratch")
    assert source.tokenizer.name == "bpe2048"
    assert source.preset.gpt == source.model.config
    assert source.model.config == GPTConfig(5, 17, n_layer=1, n_head=1, n_embd=64)
    assert source.preset.student is TINY.student

    torch.manual_seed(3)
    expected = GPT(source.model.config)
    assert torch.equal(source.model.wte.weight, expected.wte.weight)

    other = sources.from_preset("tiny", small(TINY), block_size=5, seed=4)
    assert not torch.equal(source.model.wte.weight, other.model.wte.weight)


@pytest.mark.parametrize(
    "name, init, loaded",
    [
        ("tiny", None, False),
        ("gpt2", None, True),
        ("gpt2", "pretrained", True),
        ("gpt2", "scratch", False),
    ],
)
def test_published_weights_are_taken_where_there_are_some(
    name, init, loaded, monkeypatch
):
    filled = []
    monkeypatch.setattr(sources, "load_published", lambda *what: filled.append(what))
    source = sources.from_preset(name, small(GPT2), init)
    assert filled == [(name, source.model)] * loaded
    assert source.init == ("pretrained" if loaded else "scratch")


def test_weights_or_lengths_that_were_not_published_are_refused(monkeypatch):
    with pytest.raises(UserError, match="--init pretrained: only gpt2, gpt2-medium"):
        sources.from_preset("tiny", small(TINY), "pretrained")

    words = "--block-size 1025: gpt2 takes 1024 tokens at most"
    with pytest.raises(UserError, match=words):
        sources.from_preset("gpt2", small(GPT2), block_size=1025)

    longer = sources.from_preset("gpt2", small(GPT2), "scratch", block_size=1025)
    assert longer.model.config.block_size == 1025

    monkeypatch.setattr(sources, "load_published", lambda name, model: None)
    longest = sources.from_preset("gpt2", small(GPT2), block_size=1024)
    assert longest.model.config.block_size == 1024


# --------------------------------------------------------------------------------------
# Models of transformers


@pytest.fixture
def asked(monkeypatch):
    """What hf.load_model is asked for; it gives a GPT."""
    calls = []

    def load_model(name, attentions):
        calls.append((name, attentions))
        return micro_gpt(), "its tokenizer"

    monkeypatch.setattr(sources.hf, "load_model", load_model)
    return calls


def test_a_model_of_transformers_has_its_own_tokenizer_and_gpt2s_schedule(asked):
    source = sources.from_transformers("a/b", GPT2)
    assert (source.name, source.init) == ("a/b", "pretrained")
    assert source.tokenizer == "its tokenizer"
    assert source.preset.teacher is GPT2.teacher
    assert source.preset.student_epochs == 90
    assert asked == [("a/b", False)]

    with pytest.raises(UserError, match="--init scratch: a/b comes with its weights"):
        sources.from_transformers("a/b", GPT2, "scratch")


@pytest.mark.parametrize(
    "longest, block_size, expected",
    [(8, None, 8), (8, 8, 8), (8, 5, 5), (math.inf, None, 512), (2000, 600, 600)],
)
def test_its_sequences_are_as_long_as_asked_for_or_as_the_preset_and_it_allow(
    longest, block_size, expected, asked, monkeypatch
):
    model = SimpleNamespace(config=SimpleNamespace(block_size=longest))
    monkeypatch.setattr(sources.hf, "load_model", lambda *what: (model, None))
    source = sources.from_transformers("a/b", GPT2, block_size=block_size)
    assert source.preset.gpt.block_size == expected


def test_sequences_longer_than_a_model_of_transformers_takes_are_refused(asked):
    words = "--block-size 9: a/b takes 8 tokens at most"
    with pytest.raises(UserError, match=words):
        sources.from_transformers("a/b", GPT2, block_size=9)


# --------------------------------------------------------------------------------------
# The choice


def choose(argv, device="cpu"):
    args = train_small.parse(argv)
    return train_small.choose_source(args, torch.device(device))


@pytest.mark.parametrize("loss", ["tsld", "l2l", "all"])
def test_what_is_no_preset_is_a_model_of_transformers(loss, asked):
    source = choose(["--model", "a/b", "--loss", loss, "--block-size", "7"])
    assert source.model.config == MICRO
    assert source.preset.gpt.block_size == 7
    assert asked == [("a/b", loss != "tsld")]  # L2L compares attentions


def test_the_teachers_seed_is_that_of_its_weights(tiny):
    weights = []
    for flags in ([], ["--seed", "1"], ["--teacher-seed", "1"]):
        weights.append(choose([*flags, *tiny]).model.wte.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_gpu_without_gpt2s_vocabulary_or_weights_takes_tiny_and_says_so(
    monkeypatch, capsys, no_network, tmp_path
):
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(published, "DATA", tmp_path)
    monkeypatch.setitem(train_small.PRESETS, "gpt2", small(GPT2))
    for tokenizer in ("bpe2048", "gpt2"):
        gpt2 = replace(small(GPT2), tokenizer=tokenizer)
        monkeypatch.setitem(train_small.PRESETS, "gpt2", gpt2)
        monkeypatch.setattr(texts.tiktoken, "get_encoding", unreachable)
        source = choose([], "cuda")
        assert (source.name, source.tokenizer.name) == ("tiny", "bpe2048")
        assert source.init == "scratch"
        assert "model: tiny, instead of gpt2: " in capsys.readouterr().out
        remedy = "--model tiny" if tokenizer == "gpt2" else "--init scratch"
        with pytest.raises(UserError, match=f"no route to host.*{remedy}"):
            choose(["--model", "gpt2"], "cuda")

        # Whoever asks for published weights does not want tiny, which has none.
        with pytest.raises(UserError, match="no route to host"):
            choose(["--init", "pretrained"], "cuda")

    assert choose([], "cpu").name == "tiny"
    assert capsys.readouterr().out == ""


def test_a_gpu_with_gpt2s_vocabulary_and_weights_takes_gpt2(monkeypatch):
    monkeypatch.setitem(train_small.PRESETS, "gpt2", small(GPT2))
    monkeypatch.setattr(train_small, "GPT2", small(GPT2))
    monkeypatch.setattr(sources, "load_published", lambda name, model: None)
    source = choose([], "cuda")

    assert (source.name, source.init) == ("gpt2", "pretrained")
    source = choose(["--init", "pretrained"], "cuda")
    assert (source.name, source.init) == ("gpt2", "pretrained")
    assert choose(["--model", "tiny"], "cuda").name == "tiny"
    with pytest.raises(UserError, match="--init pretrained: only gpt2"):
        choose(["--init", "pretrained", "--model", "tiny"], "cuda")
