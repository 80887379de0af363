"""data/lib/scores.py: what a model scores, and what it weighs."""

import math

import pytest
import torch

import tsld
from data.lib import scores
from data.lib.errors import UserError
from data.lib.files import load_packed
from data.lib.students import load_weights
from data.tests.helpers import QUESTIONS, WORDS, micro_gpt, nats_of_choice, softmax64

CPU = torch.device("cpu")


@pytest.fixture
def model():
    """A GPT with the vocabulary bpe2048, and a block of 8 tokens."""
    return micro_gpt(vocab_size=2048)


# --------------------------------------------------------------------------------------
# Scores


def test_perplexity_is_per_token_and_bits_are_per_byte(model, small_vocabulary):
    ids = torch.tensor(small_vocabulary.encode_ordinary(WORDS))
    nats = 0.0
    for n in range(1, len(ids)):
        block = (n - 1) // 8 * 8  # where the context of token n begins
        logits = model(ids[None, block:n])[0, -1].detach()
        nats -= math.log(softmax64(logits)[ids[n]])

    first = small_vocabulary.decode_single_token_bytes(ids[0].item())
    n_bytes = len(WORDS) - len(first)
    found = scores.score_text(model, ids, 8, n_bytes)

    assert found.keys() == {"ppl", "bpb"}
    assert found["ppl"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert found["bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert scores.score_text(model, ids, 8) == {"ppl": found["ppl"]}  # nobody counted


def test_a_task_has_the_scores_of_its_right_answers_and_its_accuracies(
    model, small_vocabulary, capsys
):
    examples = QUESTIONS[::3]  # one prompt, and both answers
    found = scores.score_task(model, small_vocabulary, examples, 8)
    last = capsys.readouterr().out.splitlines()[-1]

    assert last == "scored 2 examples, 2 of them cut to a block of 8"

    answers = [example.choices[example.answer] for example in examples]
    nats = 0.0
    for example, answer in zip(examples, answers, strict=True):
        nats += nats_of_choice(model, small_vocabulary, example.prompt, answer, 8)

    tokens = [small_vocabulary.encode_ordinary(f" {answer}") for answer in answers]
    n_tokens = sum(len(ids) for ids in tokens)
    assert found["ppl"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-5)
    assert found["bpb"] == pytest.approx(nats / math.log(2) / len(" yes no"), rel=1e-5)
    assert found["accuracy"] == 0.5
    assert {"acc_norm", "mcc"} <= found.keys()


def test_without_a_cut_none_is_spoken_of(small_vocabulary, capsys):
    model = micro_gpt(vocab_size=2048, block_size=64)
    scores.score_task(model, small_vocabulary, QUESTIONS, 64)
    assert capsys.readouterr().out.splitlines()[-1] == "scored 4 examples"


@pytest.mark.parametrize("nats", [math.nan, math.inf, 710.0])
def test_a_perplexity_that_is_no_number_is_refused(nats):
    with pytest.raises(tsld.TrainingDiverged, match=f"costs {nats} nats per token"):
        scores.units(nats, 2, 5)


def test_a_perplexity_that_is_only_shown_may_be_infinite():
    assert scores.perplexity(2.0) == pytest.approx(math.exp(2))
    assert scores.perplexity(1e4) == math.inf
    assert math.isnan(scores.perplexity(math.nan))


# --------------------------------------------------------------------------------------
# Sizes


def test_parameters_and_those_that_are_ternary_are_counted():
    V, C, L, T = 17, 12, 2, 8
    matrices = 12 * C * C
    biases_and_norms = 9 * C + 4 * C
    student = micro_gpt()
    total = V * C + T * C + L * (matrices + biases_and_norms) + 2 * C

    assert scores.count_parameters(student) == total
    assert scores.count_ternary(student) == 0

    tsld.quantize_model(student)
    assert scores.count_parameters(student) == total
    assert scores.count_ternary(student) == L * matrices


def test_a_two_bit_model_is_packed_and_saved_with_its_sizes(tmp_path):
    path = tmp_path / "model.packed"
    model = tsld.quantize_model(micro_gpt())
    sizes = scores.pack(model, path)

    assert sizes["bytes_packed"] == path.stat().st_size
    assert sizes["linear_bytes_packed"] == 2 * 12 * 12 * 12 // 4
    assert isinstance(model.h[0].mlp.c_fc, tsld.PackedLinear)

    ids = torch.arange(8)[None]
    torch.testing.assert_close(load_packed(path)(ids), model(ids), rtol=0.01, atol=0.01)


def test_a_four_bit_model_is_saved_with_its_sizes_and_stays_as_it_is(tmp_path):
    path = tmp_path / "model.packed"
    model = tsld.quantize_model(micro_gpt(), bits=4)
    sizes = scores.pack(model, path)

    assert sizes["bytes_packed"] == path.stat().st_size
    assert sizes["linear_bytes_packed"] == 2 * 12 * 12 * 12 // 2
    assert isinstance(model.h[0].mlp.c_fc, tsld.QuantLinear)

    ids = torch.arange(8)[None]
    again = load_weights(path)
    torch.testing.assert_close(again(ids), model(ids), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_weight_that_no_packed_file_holds_is_refused_by_name(bits, tmp_path):
    model = tsld.quantize_model(micro_gpt(), bits)
    model.wpe.weight.data[0, 0] = 7e4
    words = "model.packed cannot be written: wpe.weight has values that are not finite"
    with pytest.raises(UserError, match=words):
        scores.pack(model, tmp_path / "model.packed")
    assert [*tmp_path.iterdir()] == []


def test_of_several_processes_the_first_one_writes_the_packed_model(
    tmp_path, monkeypatch
):
    path = tmp_path / "model.packed"
    monkeypatch.setattr(scores, "processes", lambda: (1, 2))
    path.write_bytes(b"of the first one")
    sizes = scores.pack(tsld.quantize_model(micro_gpt()), path)

    assert path.read_bytes() == b"of the first one"
    assert sizes["bytes_packed"] == len(b"of the first one")
