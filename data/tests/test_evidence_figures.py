"""The evidence's figures."""

import importlib.util
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train_small
import tsld
from data import texts
from data.evidence import models
from data.evidence.figures import common, errors, figures, method
from data.lib.files import read_checked
from data.tests.helpers import (
    MICRO,
    SHORT,
    WORDS,
    micro_gpt,
    micro_ids,
    refused,
    run,
    softmax64,
)
from tsld import GPT

# --------------------------------------------------------------------------------------
# What is looked at


def relative_error(student, teacher):
    """Σ (student - teacher)² / Σ teacher² of outputs (B, T, C), for each position."""
    student, teacher = (x.detach().double().numpy() for x in (student, teacher))
    return ((student - teacher) ** 2).sum((0, 2)) / (teacher**2).sum((0, 2))


def test_error_by_position_is_relative_squared_error_at_each_token():
    teacher = micro_gpt()
    student = tsld.quantize_model(micro_gpt())
    ids = micro_ids(3)
    error = errors.error_by_position(student, teacher, ids)
    expected = relative_error(student(ids), teacher(ids))
    np.testing.assert_allclose(error["logits"].numpy(), expected, rtol=1e-4)

    # Attention's output once more, from the states before each block.
    layers = []
    states = [model(ids, trace=True).hidden_states for model in (student, teacher)]

    for i in range(MICRO.n_layer):
        outputs = []
        for model, of_model in zip((student, teacher), states):
            block = model.h[i]
            y, _ = block.attn(block.ln_1(of_model[i]))
            outputs.append(y)

        layers.append(relative_error(*outputs))

    attention = error["attention output"].numpy()
    np.testing.assert_allclose(attention, np.mean(layers, 0), rtol=1e-4)


def test_distance_by_token_is_the_kl_divergence_of_the_two_distributions():
    teacher = micro_gpt()
    student = micro_gpt(1)
    ids = micro_ids(3)
    p, q = (softmax64(model(ids).detach()) for model in (teacher, student))
    kl = (p * np.log(p / q)).sum(-1)
    distance = errors.distance_by_token(student, teacher, ids).numpy()
    np.testing.assert_allclose(distance, kl, rtol=1e-4, atol=1e-5)

    assert errors.distance_by_token(teacher, teacher, ids).abs().max() < 1e-6


def test_a_region_has_its_mean_and_standard_error_if_it_has_two_tokens():
    values = torch.tensor([1.0, 2.0, 6.0])
    error = np.std([1, 2, 6], ddof=1) / math.sqrt(3)

    assert common.mean_and_error(values) == pytest.approx((3.0, error))
    assert all(map(math.isnan, common.mean_and_error(values[:1])))


# --------------------------------------------------------------------------------------
# A run


def read_csv(path):
    """Title to the numbers of a column."""
    header, *lines = path.read_text().splitlines()
    titles = header.strip('"').split('","')
    columns = zip(*(map(float, line.split(",")) for line in lines))

    return dict(zip(titles, columns))


@pytest.fixture
def figures_of_run(tiny, capsys, tmp_path, monkeypatch):
    """Makes figures at τ = 20 of two blocks; returns the flags and what was printed."""
    monkeypatch.setattr(common, "SHOWN", 2)
    monkeypatch.setattr(errors, "SHOWN", 2)
    monkeypatch.setattr("data.evidence.figures.confidence.SHOWN", 2)
    monkeypatch.setattr(figures, "draw", lambda figures, folder: None)
    flags = ["--dtype", "float32", "--tsld-temperature", "20", "--steps", "3", *tiny]

    return flags, run(flags, capsys, figures.main)


@pytest.fixture
def models_of_run(figures_of_run, tmp_path):
    """Name to model: the teacher and two of its students."""
    out = tmp_path / "out"
    paths = {name: out / f"student-{name}.pt" for name in ("logit", "tsld")}
    (paths["teacher"],) = out.glob("teacher-*.pt")

    found = {}
    for name, path in paths.items():
        model = GPT(train_small.PRESETS["tiny-6"].gpt)
        if name != "teacher":
            model = tsld.quantize_model(model)
        model.load_state_dict(read_checked(path)["model"])
        found[name] = model.eval()

    return found


@pytest.fixture
def blocks(small_vocabulary):
    """The validation text of the run in whole blocks of 16, and its next tokens."""
    text = texts.split_text((WORDS * 40).encode())["valid"]
    ids = torch.tensor(small_vocabulary.encode_ordinary(text))
    B = (len(ids) - 1) // 16

    assert B > 2  # as many are shown, and the changes are those of all

    return ids[: 16 * B].view(B, 16), ids[1 : 16 * B + 1].view(B, 16)


def cross_entropies(model, ids, targets):
    logits = model(ids).detach().transpose(1, 2)
    return F.cross_entropy(logits, targets, reduction="none").flatten().numpy()


def test_the_figures_numbers_are_those_of_the_models(
    figures_of_run, models_of_run, blocks, capsys, tmp_path, monkeypatch
):
    flags, out = figures_of_run
    folder = tmp_path / "out"
    ids, targets = blocks
    teacher = models_of_run["teacher"]

    # 0: the text has no line of 12 tokens or more between two others.
    header = '"token","probability","count"'
    assert (folder / "0-sentence.csv").read_text().startswith(header)

    # 1: at each position.
    error = read_csv(folder / "1-error-by-position.csv")
    assert len(error) == 1 + 3 * 2 and error["position"] == tuple(range(1, 17))

    expected = relative_error(models_of_run["logit"](ids[:2]), teacher(ids[:2]))
    np.testing.assert_allclose(error["logit, logits"], expected, rtol=1e-4)

    # 2: of each token, sorted.
    distance = read_csv(folder / "2-distance-to-teacher.csv")
    assert set(distance) == {"without training", "l2l", "logit"}
    assert list(distance["logit"]) == sorted(distance["logit"])
    assert distance["logit"][0] > -1e-5

    # 3: the last point is what the run says of the student.
    said = dict(re.findall(r"student, (\w+): validation perplexity ([\d.]+)", out))
    curves = read_csv(folder / "3-training-curves.csv")

    assert curves["step"] == (1, 2, 3)

    for loss in ("logit", "logit_gt", "tsld"):
        last = math.log(float(said[loss]))
        assert curves[f"{loss}, validation"][-1] == pytest.approx(last, abs=1e-4)

    # 4: N times the token scale, and TSLD's change against logit distillation.
    tokens = read_csv(folder / "4-confidence.csv")
    weights = np.exp(np.array(tokens["cross-entropy"]) / 20).reshape(2, 16)
    scale = 16 * weights / weights.sum(1, keepdims=True)
    found = np.array(tokens["token scale times N"]).reshape(2, 16)
    np.testing.assert_allclose(found, scale, rtol=1e-3)
    ce = {name: cross_entropies(x, ids, targets) for name, x in models_of_run.items()}
    change = ce["tsld"] - ce["logit"]
    shown = tokens["TSLD minus logit"]
    np.testing.assert_allclose(shown, change[: 2 * 16], rtol=1e-3, atol=1e-5)

    # It learned too little to be sure of a token.
    changes = read_csv(folder / "4-change-by-confidence.csv")
    assert changes["tokens"] == (len(change), 0)
    assert np.isnan(changes["mean change"][1])

    # TSLD has the printed formula, without labels.
    identity = read_checked(folder / "student-tsld.pt")["identity"]
    assert identity["gt_weight"] == 0.0

    # A finished run, resumed: the curves are still those of its training. With a line
    # in the middle, both regions have their mean change and its error.
    top = softmax64(teacher(ids).detach()).max(-1).flatten()
    monkeypatch.setattr(models, "SURE", float(np.median(top)))
    before = (folder / "3-training-curves.csv").read_text()
    run([*flags, "--resume"], capsys, figures.main)

    assert (folder / "3-training-curves.csv").read_text() == before

    changes = read_csv(folder / "4-change-by-confidence.csv")

    for i, region in enumerate((change[top <= models.SURE], change[top > models.SURE])):
        assert changes["tokens"][i] == len(region) > 1
        mean = pytest.approx(region.mean(), rel=1e-3, abs=1e-5)
        assert changes["mean change"][i] == mean
        error = region.std(ddof=1) / math.sqrt(len(region))
        error = pytest.approx(error, rel=0.01, abs=1e-6)
        assert changes["standard error"][i] == error


def test_figures_are_drawn_with_titles_that_say_what_is_seen(
    tiny, capsys, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    titles = []
    show_title = Figure.suptitle

    def remember(figure, title, **look):
        titles.append(title)
        return show_title(figure, title, **look)

    monkeypatch.setattr(Figure, "suptitle", remember)
    run([*SHORT, "--dtype", "float32", *tiny], capsys, figures.main)
    drawn = sorted(path.name for path in (tmp_path / "out").glob("*.png"))

    assert drawn == [
        "0-method.png",
        "1-error-by-position.png",
        "2-distance-to-teacher.png",
        "3-training-curves.png",
        "4-confidence.png",
    ]
    assert titles[0] == ""
    assert re.search(r"the last quarter is [\d.]+ times the first's", titles[1])
    assert "distillation ends nearer to the teacher's distribution than" in titles[2]
    assert re.search(r"lose, nats: logit -?[\d.]+, logit\+GT -?[\d.]+, TSLD", titles[3])
    assert " at low confidence and " in titles[4]


def test_without_matplotlib_the_numbers_are_kept_and_a_line_says_so(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figures.draw([], tmp_path)

    assert (
        f"the numbers are in {tmp_path}; matplotlib would draw"
        in capsys.readouterr().out
    )


# --------------------------------------------------------------------------------------
# Bars and sentence


def test_the_bars_are_those_of_the_teacher_with_the_most_rows(
    tiny, tmp_path, monkeypatch
):
    args = train_small.parse([*tiny, "--steps", "6", "--tsld-temperature", "10"])
    setup = train_small.set_up(args)
    of_run = {"teacher_steps": setup.teacher.steps}
    of_run["student_tokens"] = len(setup.tokens["student"])
    student = {"bits": 2, "gt_weight": 0.0, "temperature": 10.0}
    for key in ("steps", "lr", "batch_size"):
        student[key] = getattr(setup.student, key)
    untrained = {"method": "ternarized", "teacher": "a", "valid_ppl": 9.0, **of_run}
    first = {"method": "tsld", "teacher": "a", "valid_ppl": 5.0, **of_run, **student}
    rows = [
        untrained,
        first,
        first | {"valid_ppl": 7.0},
        first | {"teacher": "b", "valid_ppl": 1.0},
        first | {"gt_weight": 0.25, "valid_ppl": 1.0},
        first | {"steps": 7, "valid_ppl": 1.0},
    ]
    monkeypatch.setattr(method, "read_json", lambda path, missing: rows)
    bars = method.bars_of_table(setup)

    assert bars == {"ternarized": [9.0], "tsld": [5.0, 7.0]}


def test_the_sentence_is_the_first_whole_line_with_what_each_token_counts(
    small_vocabulary,
):
    line = " the cat sat on a mat while it rained all day long and longer .\n"
    text = "short\n" + line * 3
    ids = torch.tensor(small_vocabulary.encode_ordinary(text))[None]
    ce = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) * 5
    source = SimpleNamespace(tokenizer=small_vocabulary)
    config = tsld.TrainConfig(temperature=10.0)
    setup = SimpleNamespace(source=source, student=config)
    subject = common.Subject(setup, None, ids, ids, None, ce)
    sentence = method.Method(subject).sentence()

    assert "".join(sentence["token"]) == line.rstrip("\n")

    words = small_vocabulary.encode_ordinary("short\n")
    shown = slice(len(words), len(words) + len(sentence["token"]))
    np.testing.assert_allclose(
        sentence["probability"], np.exp(-ce[0, shown].numpy()), rtol=1e-5
    )
    weights = np.exp(ce[0].double().numpy() / 10)
    count = ids.shape[1] * weights / weights.sum()
    np.testing.assert_allclose(sentence["count"], count[shown], rtol=1e-5)


# --------------------------------------------------------------------------------------
# What cannot be made


def test_figures_of_another_model_are_refused_before_anything_is_trained(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "train_teacher", None)
    words = f"--model {tmp_path}: it takes one of tiny"
    refused([*tiny, "--model", str(tmp_path)], capsys, words, figures.main)


def test_a_damaged_table_is_found_before_anything_is_trained(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "train_teacher", None)
    path = tmp_path / "table.json"
    path.write_text("[{")
    monkeypatch.setattr(figures, "TABLE", path)
    refused(tiny, capsys, f"{path} is damaged", figures.main)


@pytest.mark.parametrize("history, words", [(None, "is missing"), ("{", "is damaged")])
def test_figures_resume_with_the_history_of_each_student_or_not_at_all(
    history, words, tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "train_teacher", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "student-tsld.pt").touch()
    path = tmp_path / "out" / "student-tsld.history.json"
    if history is not None:
        path.write_text(history)
    refused([*tiny, "--resume"], capsys, f"{path} {words}", figures.main)
