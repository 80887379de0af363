"""README.md: its numbers are those of the rows that they come from, its links lead
somewhere, and it says what it is in few words."""

import json
import re
import statistics

import pytest

from data.tests.helpers import ROOT
from tsld import GPTConfig

README = (ROOT / "README.md").read_text("utf-8")
EVIDENCE = ROOT / "data" / "evidence"


def read_rows(pattern):
    rows = []
    for path in sorted(EVIDENCE.glob(pattern)):
        rows += json.loads(path.read_text("utf-8"))
    return rows


def cells(values):
    """Mean ± standard deviation, and how many, as the tables have them."""
    mean, spread = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.2f} ± {spread:.2f}", str(len(values))


def table_row(beginning):
    """The cells of the one line of a table that begins so."""
    lines = [line for line in README.splitlines() if line.startswith(f"| {beginning}")]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def of_map(teacher_epochs, temperature):
    """Validation perplexities of the map's 2-bit TSLD students without labels."""
    setting = {"bits": 2, "granularity": "tensor", "epochs": 16, "loss": "tsld"}
    setting |= {"teacher_epochs": teacher_epochs, "temperature": temperature}
    setting["gt_weight"] = 0.0
    rows = read_rows("map/regimes-*.json")
    return {row["seed"]: row for row in rows if setting.items() <= row.items()}


@pytest.mark.parametrize(
    "share, epochs, temperature", [("25 %", 12, 10.0), ("58 %", 48, 2.0)]
)
def test_when_the_token_scale_helps_is_the_maps(share, epochs, temperature):
    scaled, plain = of_map(epochs, temperature), of_map(epochs, None)
    assert scaled.keys() == plain.keys()
    sure = statistics.mean(row["teacher_sure"] for row in plain.values())
    assert f"{sure:.0%}".replace("%", " %") == share

    columns = [
        cells([row["student_valid_ppl"] for row in rows.values()])
        for rows in (scaled, plain)
    ]
    (of_scaled, seeds), (of_plain, _) = columns
    shown = table_row(share)
    assert shown[1:] == [f"{temperature:g}", of_scaled, of_plain, seeds]


def test_when_the_token_scale_helps_smollm_is_its_students():
    setting = {"model": "smollm", "task": "ptb-100k", "bits": 4, "gt_weight": 0.0}
    rows = [
        r for r in read_rows("tasks/accuracy-*.json") if setting.items() <= r.items()
    ]
    scaled, plain = [], []
    for row in rows:
        if row["loss"] == "logit":
            plain.append(row["student_ppl"])
        elif row["loss"] == "tsld" and row["config"]["temperature"] == 10:
            scaled.append(row["student_ppl"])

    (of_scaled, seeds), (of_plain, _) = cells(scaled), cells(plain)
    assert table_row("46 %")[1:] == ["10", of_scaled, of_plain, seeds]


def test_gpt2_smalls_sizes_are_its_parameters():
    C = GPTConfig.n_embd
    ternary = GPTConfig.n_layer * 12 * C * C
    embeddings = (GPTConfig.vocab_size + GPTConfig.block_size) * C
    vectors = GPTConfig.n_layer * 13 * C + 2 * C

    _, fp32, packed, text = table_row("file")
    assert fp32 == f"{4 * (ternary + embeddings + vectors) / 1e6:.0f} MB"
    megabytes = (ternary / 4 + 2 * embeddings + 4 * vectors) / 1e6
    assert float(packed.removesuffix(" MB")) == pytest.approx(megabytes, abs=1)
    assert f"{ternary / 4 / 1e6:.0f} MB" in text


def test_every_link_leads_to_a_file():
    for page in [ROOT / "README.md", ROOT / "data" / "README.md"]:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
        for link in links:
            assert (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize(
    "page, most", [("README.md", 1100), ("data/evidence/README.md", 900)]
)
def test_the_front_pages_are_short(page, most):
    assert len((ROOT / page).read_text("utf-8").split()) <= most
