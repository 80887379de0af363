"""data/lib/report.py, page.py and report.html: the page that a run leaves.

1. Its numbers are those of tsld.py
2. It is there after every sort of run
3. It is made again without training
4. Any text is shown as it is
5. In a browser
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import train_small
import tsld
from data import tasks, texts
from data.lib import page, pictures
from data.lib.files import load_packed, read_checked
from data.tests.helpers import (
    QUESTIONS,
    SHORT,
    WORDS,
    finished_run,
    interrupt_at,
    refused,
    run,
    save_llama,
    softmax64,
)

try:
    import fcntl  # Windows has none
except ImportError:
    fcntl = None

VOCABULARY = texts.load_tokenizer("bpe2048")


def numbers_of(folder):
    return json.loads((folder / "report.json").read_text())


class Reader(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, content):
        super().__init__()
        self.words = []
        self.tags = []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def named(self, name):
        """The attributes of all tags of a name."""
        return [attributes for tag, attributes in self.tags if tag == name]


def read_page(folder):
    return Reader((folder / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run whose rounding hurts, and what it printed."""
    flags = ["--dtype", "float32", "--tsld-temperature", "2", "--lr", "0.05"]
    return finished_run(tmp_path_factory.mktemp("one"), *flags)


def logits_of(folder, ids):
    """What teacher, rounded teacher and student say to ids (B, T), float64."""
    (path,) = folder.glob("teacher-*.pt")
    rounded = load_packed(folder / "rounded.packed")
    teacher = tsld.GPT(rounded.config)
    teacher.load_state_dict(read_checked(path)["model"])
    student = tsld.quantize_model(copy.deepcopy(teacher))
    student.load_state_dict(read_checked(folder / "student-tsld.pt")["model"])
    rounded = tsld.quantize_model(copy.deepcopy(teacher))
    with torch.no_grad():
        return [model.eval()(ids) for model in (teacher, rounded, student)]


@pytest.fixture(scope="module")
def read(one):
    """The validation text's blocks: ids, targets, and the three models' logits."""
    text = texts.split_text((WORDS * 40).encode())["valid"]
    ids = torch.tensor(VOCABULARY.encode_ordinary(text))
    blocks = (len(ids) - 1) // 16
    ids, targets = ids[: 16 * blocks + 1], None
    inputs, targets = ids[:-1].view(blocks, 16), ids[1:].view(blocks, 16)
    return inputs, targets, logits_of(one, inputs)


# --------------------------------------------------------------------------------------
# 1. Its numbers are those of tsld.py


def test_the_weights_are_the_token_scale_of_the_first_sequence(one, read):
    _, targets, (teacher, _, _) = read
    found = numbers_of(one)["sequence"]
    ce = tsld.per_token_terms(teacher[:1], teacher[:1], targets[:1]).ce_teacher
    assert found["ce_teacher"] == pytest.approx(ce[0].tolist(), rel=1e-4)
    weights = tsld.token_scale(ce, 2.0)[0].tolist()
    assert found["weights"] == pytest.approx(weights, rel=1e-4)
    assert found["temperature"] == "2.0"

    # The shade of a token depends on its weight times their number.
    spans = [tag for tag in read_page(one).named("span") if tag.get("class") == "t"]
    counts = [float(tag["style"].removeprefix("--c:")) for tag in spans]
    assert counts == pytest.approx([16 * weight for weight in weights], abs=1e-4)


def test_predictions_and_distances_are_those_of_the_three_models(one, read):
    _, targets, logits = read
    found = numbers_of(one)["sequence"]
    p_teacher = softmax64(logits[0][0])
    for model, of_model in zip(found["models"], logits, strict=True):
        p = softmax64(of_model[0])
        assert model["true"] == pytest.approx(p[range(16), targets[0]], rel=1e-3)
        kl = (p_teacher * np.log(p_teacher / p)).sum(-1)
        assert model["kl"] == pytest.approx(kl, abs=1e-5, rel=1e-3)
        assert np.array(model["shares"]) == pytest.approx(
            -np.sort(-p, axis=-1)[:, :3], rel=1e-3
        )
        for n, guesses in enumerate(model["guesses"]):
            token = VOCABULARY.encode_single_token(guesses[0].encode())
            assert p[n, token] == pytest.approx(p[n].max(), rel=1e-6)

        # Of the token that the teacher expects most.
        of_expected = p[range(16), p_teacher.argmax(-1)]
        assert model["expected"] == pytest.approx(of_expected, rel=1e-3)


def test_the_error_along_the_sequence_is_the_mean_over_sequences(one, read):
    _, targets, logits = read
    found = numbers_of(one)
    assert found["sequences"] == len(targets)
    p_teacher = softmax64(logits[0])
    for name, of_model in (("rounded", logits[1]), ("student", logits[2])):
        kl = (p_teacher * np.log(p_teacher / softmax64(of_model))).sum(-1)
        assert found[name] == pytest.approx(kl.mean(0), abs=1e-5, rel=1e-3)


def test_the_curve_begins_with_the_rounded_teacher_and_ends_with_the_student(one, read):
    inputs, _, logits = read
    ((label, curve),) = numbers_of(one)["curves"].items()
    assert label == "tsld (τ = 2) + 0.25 gt"
    assert numbers_of(one)["watched"] == 4 * 16
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4, 5, 6]
    p = softmax64(logits[0][:4])
    for (_, value), of_model in ((curve[0], logits[1]), (curve[-1], logits[2])):
        kl = (p * np.log(p / softmax64(of_model[:4]))).sum(-1).mean()
        assert value == pytest.approx(kl, abs=1e-5, rel=1e-3)


def test_the_matrix_is_shown_by_its_codes_before_and_after_training(one):
    found = numbers_of(one)["matrix"]
    assert (found["name"], found["shape"]) == ("h.0.attn.c_attn", [24, 8])
    (path,) = one.glob("teacher-*.pt")
    codes = []
    for part, file in (("before", path), ("after", one / "student-tsld.pt")):
        w = read_checked(file)["model"]["h.0.attn.c_attn.weight"]
        code, scale = tsld.ternarize(w)
        codes.append(code)
        assert found[part]["scale"] == pytest.approx(scale.item(), rel=1e-5)
        assert found[part]["corner"] == code[:32, :32].tolist()
        numbers = [(code == value).sum().item() for value in (-1, 0, 1)]
        assert list(map(sum, found[part]["counts"])) == numbers

        # Between the largest weight that becomes 0 and the smallest that does not.
        delta = found[part]["threshold"]
        assert w[code == 0].abs().max() == pytest.approx(delta, rel=1e-5)
        assert delta < w[code != 0].abs().min()

        # Below Δ eight bars are of 0, and beyond it all others are not; but the
        # largest weight that becomes 0 can stand in the first bar beyond.
        middle = len(found[part]["moved"]) // 2
        below, zero, above = found[part]["counts"]
        assert found[part]["limit"] == pytest.approx(middle * delta / 8, rel=1e-5)
        assert sum(below[middle - 8 :]) == sum(above[: middle + 8]) == 0
        assert sum(zero[middle - 8 : middle + 8]) >= sum(zero) - 1

    moved = (codes[0] != codes[1]).sum().item()
    assert sum(found["before"]["moved"]) == 0 < moved
    assert sum(found["after"]["moved"]) == moved
    share = f"{moved / w.numel():.1%} of all its weights"
    assert share in "".join(read_page(one).words)


def test_with_a_scale_for_each_row_the_means_over_rows_are_marked():
    from data.lib.report import look_at_weights

    w = torch.tensor([[1.0, -0.1, 0.2], [10.0, -1.0, 2.0]])
    found = look_at_weights(w, w, "channel")
    assert found["corner"] == [[1, 0, 0], [1, 0, 0]]
    assert (found["scale"], found["threshold"]) == pytest.approx((5.5, 1.1))


@pytest.mark.parametrize("w", [[[0.0, 0.0]], [[1.0, 1.0]], [[1.0] + 99_999 * [1e-9]]])
def test_a_matrix_of_zeros_or_of_extremes_has_a_histogram_of_some_bars(w):
    from data.lib.report import look_at_weights

    found = look_at_weights(torch.tensor(w), torch.tensor(w), "tensor")
    assert 2 <= len(found["moved"]) <= 200
    assert sum(map(sum, found["counts"])) == len(w[0])
    matrix = {"before": found, "after": found, "granularity": "tensor"}
    content = pictures.matrix(matrix | {"name": "w", "shape": [1, len(w[0])]}, "")
    assert "nan" not in content and "inf" not in content


def test_the_bars_of_two_histograms_have_one_scale():
    """Bars are drawn from the bottom, 100, so their tops tell how high they are."""
    of_ten = {"threshold": 1.0, "scale": 1.0, "limit": 2.0, "moved": [0] * 4}
    of_ten |= {
        "counts": [[10, 0, 0, 0], [0, 40, 30, 0], [0, 0, 10, 10]],
        "corner": [[0]],
    }
    wider = of_ten | {"limit": 4.0}  # a bar of as many weights is half as high
    tops = []
    for weights in (of_ten, wider):
        drawn = pictures.histogram(weights, 4.0, 40.0)
        paths = re.findall('<path class="fill [a-z]+" d="([^"]*)"', drawn)
        bars = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", "".join(paths))
        tops.append(sorted(tuple(map(float, bar)) for bar in bars))

    assert max(pictures.densities(of_ten)) == 40.0
    assert max(pictures.densities(wider)) == 20.0
    # Left edge, top, width. The third bar has 30 of one code below 10 of another.
    first = [(25, 75), (37.5, 0), (50, 0), (50, 25), (62.5, 75)]
    assert tops[0] == [(x, top, 12.5) for x, top in first]
    second = [(0, 87.5), (25, 50), (50, 50), (50, 62.5), (75, 87.5)]
    assert tops[1] == [(x, top, 25.0) for x, top in second]


# --------------------------------------------------------------------------------------
# 2. It is there after every sort of run

TITLES = [
    "Which tokens count",
    "The way back to the teacher",
    "Where rounding hurt most",
    "Inside one matrix",
    "One prompt, three models",
    "What this run does not show",
    "To make this run again",
]


def assert_whole(folder):
    """The page has all its parts in their order, and fetches nothing."""
    content = (folder / "report.html").read_text("utf-8")
    assert "{{" not in content
    titles = re.findall("<h2>(.*)</h2>", content)
    assert titles == TITLES
    assert "http:" not in content and "https:" not in content
    reader = Reader(content)
    for _, attributes in reader.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "data", "action"}
    for attributes in reader.named("div") + reader.named("svg"):
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
    assert len(content) < 400_000
    return " ".join("".join(reader.words).split())


def test_a_runs_last_line_says_where_its_page_is(tiny, capsys, tmp_path):
    printed = run([*SHORT, *tiny], capsys)
    page_path = tmp_path / "out" / "report.html"
    assert printed.splitlines()[-1] == f"report: open {page_path} in a browser"
    words = assert_whole(tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    for model in ("teacher", "ptq", "student"):
        assert f"{row[f'{model}_ppl']:,.1f}" in words
    (row,) = numbers_of(tmp_path / "out")["results"]  # of six digits
    for model in ("teacher", "ptq", "student"):
        assert f"{row[f'test_{model}_ppl']:,.1f}" in words
        assert f"{row[f'{model}_bpb']:.3f}" in words
    assert f"Its file has {row['bytes_packed'] / 1e6:.2f} MB" in words
    assert "student, tsld (τ = 20) + 0.25 gt" in words
    assert ") + 0.25 · meann(−log PS(true token n))" in words
    assert "No student was trained with logit distillation without" in words

    # What a loss does not use is no setting of it.
    settings = numbers_of(tmp_path / "out")["made"]["settings"]
    assert (settings["teacher"]["temperature"], settings["teacher"]["gt_weight"]) == (
        "",
        "",
    )
    assert (settings["student"]["temperature"], settings["student"]["gt_weight"]) == (
        "20.0",
        "0.25",
    )

    # Printed and shown are the same texts.
    texts = numbers_of(tmp_path / "out")["texts"]["sampled"]
    flat = " ".join(printed.split())
    assert [*texts] == ["teacher", "rounded", "tsld"]
    for name, text in texts.items():
        assert f"{name} goes on: {text}" in flat


def test_all_losses_have_a_curve_each_in_one_picture(tiny, capsys, tmp_path):
    run(["--loss", "all", "--granularity", "channel", "--steps", "2", *tiny], capsys)
    words = assert_whole(tmp_path / "out")
    curves = numbers_of(tmp_path / "out")["curves"]
    assert len(curves) == 7
    assert "one seed for 7 students" in words
    assert words.count("Token scale, with") == 2
    assert "No student was trained with" not in words
    for label, curve in curves.items():
        assert curve[-1][0] == 2
        assert label in words
    assert "Each row has its own Δ and α" in words


@pytest.mark.parametrize("loss", ["gt", "l2l", "logit"])
def test_a_loss_without_a_token_scale_is_shown_with_the_papers(
    loss, tiny, capsys, tmp_path
):
    run(["--loss", loss, *SHORT, *tiny], capsys)
    words = assert_whole(tmp_path / "out")
    assert f"This run’s loss, {loss}, scales no token." in words
    assert "· mean" not in words
    assert "this run’s" not in words
    found = numbers_of(tmp_path / "out")["sequence"]
    assert found["temperature"] == "10.0"


@pytest.mark.parametrize(
    "tau, marks",
    [
        ("inf", "∞, this run’s"),
        ("0.5", "0.5, this"),
        ("10", "10, the paper’s and ours"),
    ],
)
def test_the_runs_own_temperature_is_marked(tau, marks, tiny, capsys, tmp_path):
    run(["--tsld-temperature", tau, *SHORT, *tiny], capsys)
    assert marks in assert_whole(tmp_path / "out")


def test_without_labels_the_loss_that_is_shown_has_none(tiny, capsys, tmp_path):
    run(["--gt-weight", "0", *SHORT, *tiny], capsys)
    assert "· mean" not in assert_whole(tmp_path / "out")


def test_four_bits_have_all_but_the_ternary_matrix(tiny, capsys, tmp_path):
    run(["--bits", "4", *SHORT, *tiny], capsys)
    words = assert_whole(tmp_path / "out")
    assert "A weight of 4 bits has 16 values." in words
    assert numbers_of(tmp_path / "out")["matrix"] is None


def test_a_task_has_its_accuracies(tiny, capsys, tmp_path, monkeypatch):
    task = {"cola": (QUESTIONS[1:3] * 20, QUESTIONS[::3])}
    monkeypatch.setattr(tasks, "load_task", task.get)
    run(["--task", "cola", *SHORT, *tiny[2:]], capsys)
    words = assert_whole(tmp_path / "out")
    assert "accuracy" in words and "test perplexity" not in words
    assert "it is of the task’s right answers, which" in words


@pytest.mark.parametrize("size", [2, 250])
def test_a_sequence_can_be_short_or_longer_than_the_text(size, tiny, capsys, tmp_path):
    run(["--block-size", str(size), *SHORT, *tiny], capsys)
    assert_whole(tmp_path / "out")
    found = numbers_of(tmp_path / "out")
    assert len(found["student"]) == min(size, len(found["sequence"]["ce_teacher"]))
    assert len(found["sequence"]["tokens"]) <= 256


def test_a_model_of_transformers_has_the_page_too(tiny, capsys, tmp_path):
    save_llama(tmp_path / "llama")
    flags = ["--model", str(tmp_path / "llama"), "--steps", "2", "--batch-size", "2"]
    run([*flags, *tiny], capsys)
    words = assert_whole(tmp_path / "out")
    assert "inner.model.layers.0.self_attn.q_proj" in words


def test_a_resumed_run_has_the_whole_curve(tiny, capsys, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at("student, tsld: step 3/", patch)
        assert train_small.main(tiny) == 130
    assert not (tmp_path / "out" / "report.html").exists()

    run([*tiny, "--resume"], capsys)
    assert_whole(tmp_path / "out")
    resumed = numbers_of(tmp_path / "out")["curves"]
    run([*tiny, "--out", str(tmp_path / "undisturbed")], capsys)
    assert resumed == numbers_of(tmp_path / "undisturbed")["curves"]


# --------------------------------------------------------------------------------------
# 3. It is made again without training


def test_the_page_is_made_again_from_the_folder(one, capsys, monkeypatch):
    before = (one / "report.html").read_bytes()
    (one / "report.html").unlink()
    monkeypatch.setattr(train_small, "run", None)
    assert run(["--report", str(one)], capsys) == f"{one / 'report.html'}\n"
    assert (one / "report.html").read_bytes() == before


def test_a_folder_without_the_numbers_is_refused(tmp_path, capsys):
    path = tmp_path / "report.json"
    refused(["--report", str(tmp_path)], capsys, f"{path} is missing")
    refused(["--report", str(tmp_path / "no")], capsys, "report.json is missing")
    path.write_text("{")
    refused(["--report", str(tmp_path)], capsys, f"{path} is damaged")
    for content in ("[]", "{}", '{"format": 0}', '{"format": 2}', "null"):
        path.write_text(content)
        refused(["--report", str(tmp_path)], capsys, "report.json is ")
    path.write_text('{"format": 1}')  # of an earlier version
    refused(["--report", str(tmp_path)], capsys, "its format is 1")
    assert os.listdir(tmp_path) == ["report.json"]

    words = "--steps has no meaning for --report"
    refused(["--report", str(tmp_path), "--steps", "3"], capsys, words)
    refused(["--report", ""], capsys, "--report is empty")


# --------------------------------------------------------------------------------------
# 4. Any text is shown as it is

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><!--",
    "a & b",
    "\"quoted\" 'twice'",
    "nul \0 bell \a",
    "שלום \u202e mirrored",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 👩\u200d👧",
    "\u2028\u2029",
    "{{numbers}}",
    "\\xe2\\x82",
    "\udcff",
]


def hostile(numbers):
    """The numbers of a page whose every text is one of HOSTILE, or holds it."""
    numbers = copy.deepcopy(numbers)
    sequence = numbers["sequence"]
    size = len(sequence["tokens"])
    tokens = (HOSTILE * size)[:size]
    sequence |= {"tokens": tokens, "lead": HOSTILE[0]}
    for model in sequence["models"]:
        model["guesses"] = [[token] * 3 for token in tokens]
    everything = " ".join(HOSTILE)
    numbers["curves"] = {everything: [*numbers["curves"].values()][0]}
    numbers["matrix"]["name"] = everything
    numbers["texts"]["prompt"] = everything
    for how in ("greedy", "sampled"):
        numbers["texts"][how] = {f"{everything}{n}": everything for n in range(3)}
    made = numbers["made"]
    made["command"] = everything
    made["others"] = {everything: everything}
    made["settings"] = dict.fromkeys(made["settings"], {everything: everything})
    return numbers


def test_whatever_a_text_holds_it_makes_no_tags(one):
    honest = Reader(page.make_page(numbers_of(one)))
    reader = Reader(page.make_page(hostile(numbers_of(one))))
    count = lambda r, name: len(r.named(name))
    assert count(reader, "script") == count(honest, "script") == 2
    assert count(reader, "span") == count(honest, "span")
    words = "".join(reader.words)
    for text in HOSTILE[:-1]:
        assert text.translate(pictures.PICTURES) in words
    assert "\0" not in words


def test_the_numbers_in_the_page_are_json_that_ends_no_script(one):
    content = page.make_page(hostile(numbers_of(one)))
    part = re.search(r'<script type="application/json" id="numbers">(.*?)</', content)
    held = json.loads(part[1])
    assert "<" not in part[1] and "\u2028" not in part[1]
    visible = [text.translate(pictures.PICTURES) for text in HOSTILE]
    assert held["tokens"][: len(HOSTILE)] == visible


def test_half_a_character_is_spelled_by_its_bytes(tiny, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("💡€ " * 400, encoding="utf-8")
    run([*SHORT, *tiny], capsys)
    assert_whole(tmp_path / "out")
    found = numbers_of(tmp_path / "out")["sequence"]
    pieces = "".join([found["lead"], *found["tokens"]])
    content = re.sub(r"\\x(..)", lambda m: chr(int(m[1], 16)), pieces)
    assert "\\x" in pieces
    assert set(content.encode("latin-1", "ignore")) >= set("💡".encode())


def test_the_command_is_quoted(tiny, capsys, tmp_path):
    run([*SHORT, *tiny, "--out", str(tmp_path / "it's <b>")], capsys)
    words = assert_whole(tmp_path / "it's <b>")
    assert f"--out '{tmp_path}/it'\"'\"'s <b>'" in words


# --------------------------------------------------------------------------------------
# 5. In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


class Browser:
    """Chromium without a window, driven by its own protocol over two pipes."""

    def __init__(self, profile):
        to_read, self.writing = os.pipe()
        self.reading, to_write = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_read, to_write)]

        def wire():  # the browser reads file 3 and writes file 4
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        words = ["--headless", "--no-sandbox", "--disable-gpu", "about:blank"]
        words += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [CHROMIUM, *words],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_read, to_write, *ends):
            os.close(end)

        self.unread = b""
        self.events = []
        self.session = {}
        (target,) = [
            info
            for info in self.call("Target.getTargets")["targetInfos"]
            if info["type"] == "page"
        ]
        attach = {"targetId": target["targetId"], "flatten": True}
        session = self.call("Target.attachToTarget", **attach)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.unread:
            received = os.read(self.reading, 1 << 16)
            assert received, "the browser has ended"
            self.unread += received
        first, self.unread = self.unread.split(b"\0", 1)
        return json.loads(first)

    def call(self, method, **parameters):
        request = {"id": 1, "method": method, "params": parameters} | self.session
        content = json.dumps(request).encode() + b"\0"
        while content:
            content = content[os.write(self.writing, content) :]
        while "id" not in (answer := self.message()):
            self.events.append(answer)
        return answer["result"]

    def open(self, path, width=1280, dark=False, scripts=True):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not self.happened("Page.loadEventFired"):
            self.events.append(self.message())

    def happened(self, *methods):
        return [event for event in self.events if event.get("method") in methods]

    def value(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key, code):
        stroke = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **stroke)

    def mouse(self, x, y, *kinds):
        for kind in kinds:
            pressed = {} if kind == "mouseMoved" else {"button": "left"}
            event = {"type": kind, "x": x, "y": y, "clickCount": 1} | pressed
            self.call("Input.dispatchMouseEvent", **event)

    def middle_of(self, selector):
        box = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{box}.scrollIntoView({{block: 'center'}})")
        corner = f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box}"
        return self.value(f"{corner}.getBoundingClientRect())")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or fcntl is None:
        pytest.skip("there is no Chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate()
    browser.process.wait(10)


TROUBLES = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_fetches_nothing(width, dark, one, browser):
    browser.open(one / "report.html", width, dark)
    root = "document.documentElement"
    assert browser.value(f"{root}.scrollWidth <= {root}.clientWidth")
    tables = "[...document.querySelectorAll('.stack')]"
    assert browser.value(f"{tables}.length") == 2
    assert browser.value(f"{tables}.every(t => t.scrollWidth <= t.clientWidth)")
    assert not browser.happened(*TROUBLES)
    requests = browser.happened("Network.requestWillBeSent")
    assert [request["params"]["request"]["url"] for request in requests] == [
        (one / "report.html").as_uri()
    ]

    # Ink on paper: at least 7 to 1 in both schemes.
    style = "getComputedStyle(document.body)"
    colours = browser.value(f"[{style}.color, {style}.backgroundColor]")
    ink, paper = sorted(map(luminance, colours))
    assert (paper + 0.05) / (ink + 0.05) > 7


def luminance(colour):
    """The relative luminance of a CSS colour "rgb(r, g, b)", as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def shown_weights(browser):
    script = "[...document.querySelectorAll('.t')].map(t => Number(t.dataset.weight))"
    return browser.value(script)


@pytest.mark.parametrize("tau", [1.0, 2.0, 10.0, math.inf])
def test_the_slider_recomputes_the_token_scale(tau, one, browser):
    browser.open(one / "report.html")
    ce = torch.tensor([numbers_of(one)["sequence"]["ce_teacher"]])
    assert shown_weights(browser) == pytest.approx(
        tsld.token_scale(ce, 2.0)[0].tolist(), rel=1e-3
    )

    # By keyboard: from one end, notch by notch.
    browser.value("document.getElementById('tau').focus()")
    browser.press("Home", 36)
    for _ in range(40):
        at = browser.value("numbers.notches[slider.value] ?? 'inf'")
        if float(at) == tau:
            break
        browser.press("ArrowRight", 39)
    assert float(at) == tau
    expected = tsld.token_scale(ce, tau)[0].tolist()
    assert shown_weights(browser) == pytest.approx(expected, rel=1e-3)
    assert not browser.happened(*TROUBLES)


def test_the_slider_and_its_marks_move_by_mouse(one, browser):
    browser.open(one / "report.html")
    ce = torch.tensor([numbers_of(one)["sequence"]["ce_teacher"]])
    x, y = browser.middle_of("#tau")
    browser.mouse(x, y, "mouseMoved", "mousePressed", "mouseReleased")
    tau = browser.value("numbers.notches[slider.value]")
    assert tau > 10
    expected = tsld.token_scale(ce, tau)[0].tolist()
    assert shown_weights(browser) == pytest.approx(expected, rel=1e-3)

    x, y = browser.middle_of(".track .above")
    browser.mouse(x, y, "mouseMoved", "mousePressed", "mouseReleased")
    expected = tsld.token_scale(ce, 10.0)[0].tolist()
    assert shown_weights(browser) == pytest.approx(expected, rel=1e-3)


def test_a_token_shows_what_the_models_predict_by_mouse_and_by_keyboard(one, browser):
    browser.open(one / "report.html")
    found = numbers_of(one)["sequence"]
    panel = "document.getElementById('panel').textContent"
    x, y = browser.middle_of(".t:nth-of-type(4)")
    browser.mouse(x, y, "mouseMoved", "mousePressed", "mouseReleased")
    at = browser.value("chosen")
    assert f"{found['models'][1]['kl'][at]:.3f} nats" in browser.value(panel)
    browser.press("ArrowRight", 39)
    assert browser.value("chosen") == at + 1
    assert browser.value("document.activeElement === tokens[chosen]")
    for model in found["models"][1:]:
        assert f"{model['kl'][at + 1]:.3f} nats" in browser.value(panel)

    # The pull at the teacher's likeliest token: w (P^S - P^T), and the labels' share.
    weight = found["weights"][at + 1]
    teacher, _, student = (model["expected"][at + 1] for model in found["models"])
    words = browser.value(panel)
    pulls = re.search(r"likeliest, “.*?”, (\S+) · \((\S+) − (\S+)\) = (\S+);", words)
    expected = [weight, student, teacher, weight * (student - teacher)]
    assert [float(x) for x in pulls.groups()] == pytest.approx(expected, rel=0.06)
    assert "The ground truth adds 0.016 · (Pˢ − 1)" in words  # 0.25 / 16


def test_the_legend_says_what_the_shade_is_a_multiple_of(one, browser):
    browser.open(one / "report.html")
    unit = "document.getElementById('unit').textContent"
    assert browser.value(unit) == "times the average weight"
    browser.value("document.querySelector('[name=shade][value=\"2\"]').click()")
    assert browser.value(unit) == "times the rounded teacher’s mean distance"


def test_hostile_texts_do_nothing_in_a_browser(one, browser, tmp_path):
    content = page.make_page(hostile(numbers_of(one)))
    (tmp_path / "hostile.html").write_text(content, encoding="utf-8")
    browser.open(tmp_path / "hostile.html", width=390)
    assert not browser.happened(*TROUBLES, "Page.javascriptDialogOpening")
    shown = browser.value("tokens.map(token => token.textContent)")
    visible = [text.translate(pictures.PICTURES) for text in HOSTILE[:-1]]
    assert shown[: len(visible)] == visible
    root = "document.documentElement"
    assert browser.value(f"{root}.scrollWidth <= {root}.clientWidth")


def test_without_javascript_all_but_the_slider_is_there(one, browser):
    browser.open(one / "report.html", scripts=False)
    text = browser.call("DOM.getDocument")["root"]
    assert text["nodeName"] == "#document"
    hidden = ".dial, .panel"
    node = browser.call("DOM.querySelectorAll", nodeId=text["nodeId"], selector=hidden)
    for number in node["nodeIds"]:
        with pytest.raises(KeyError):  # it has no box
            browser.call("DOM.getBoxModel", nodeId=number)
