"""The evidence's table 1: OPTQ, AWQ, and the table's rows."""

import collections
import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import train_small
import tsld
from data import texts
from data.evidence.rows import read_rows
from data.evidence.table1 import baselines, table
from data.lib import sources
from data.tests.helpers import MICRO, WORDS, micro_gpt, micro_ids, randn, refused, run

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def correlated(n, width, seed=0):
    """Inputs whose channels depend on each other, as those of a language model do."""
    return randn(n, width, seed=seed) @ randn(width, width, seed=seed + 1) + 0.5


def output_error(quantized, weight, x):
    return ((x @ (quantized - weight).t()) ** 2).sum().item()


def grid64(weight):
    """Per row the values that 4 bits can take: quantize_int4's formula in float64."""
    w = weight.double().numpy()
    low = np.minimum(w.min(1), 0)
    high = np.maximum(w.max(1), 0)
    scale = (high - low) / 15
    zero_point = np.round(-low / scale)

    return scale[:, None] * (np.arange(16) - zero_point[:, None])


def inputs(model, name, ids):
    """What reaches a layer, (B · T, in)."""
    caught = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, x: caught.append(x[0]))
    model(ids)
    hook.remove()

    return caught[0].flatten(0, 1).detach()


# --------------------------------------------------------------------------------------
# OPTQ


def test_optq_rounds_each_column_and_lets_the_rest_make_up_for_it():
    weight = randn(3, 6)
    x = correlated(40, 6)
    w = weight.double().numpy()
    grid = grid64(weight)
    H = x.double().numpy().T @ x.double().numpy()
    H += 0.01 * np.mean(np.diag(H)) * np.eye(6)

    expected = np.zeros_like(w)
    current = w.copy()

    for i in range(6):
        for row in range(3):
            nearest = np.abs(grid[row] - current[row, i]).argmin()
            expected[row, i] = grid[row, nearest]

        # What minimizes the quadratic error in the rest, the columns done being fixed.
        done = slice(0, i + 1)
        rest = slice(i + 1, 6)
        wrong = H[rest, done] @ (expected - w)[:, done].T
        current[:, rest] = w[:, rest] - np.linalg.solve(H[rest, rest], wrong).T

    quantized = baselines.optq_weight(weight, x).numpy()
    np.testing.assert_allclose(quantized, expected, rtol=1e-5, atol=1e-6)


def test_optq_lies_between_round_to_nearest_and_the_best_of_all_roundings():
    gap = 0.0
    closed = 0.0
    for seed in range(10):
        weight = randn(1, 4, seed=seed)
        x = correlated(30, 4, seed=seed)
        values = torch.from_numpy(grid64(weight)[0]).float()
        every = torch.cartesian_prod(*[values] * 4)  # 16^4 roundings
        best = ((x @ (every - weight).t()) ** 2).sum(0).min().item()
        nearest = output_error(tsld.fake_quantize(weight, 4, "channel"), weight, x)
        of_optq = output_error(baselines.optq_weight(weight, x), weight, x)
        assert best <= of_optq * (1 + 1e-4)
        gap += nearest - best
        closed += nearest - of_optq

    assert closed > 0.5 * gap > 0


def test_optq_is_round_to_nearest_where_inputs_are_independent():
    weight = randn(4, 5)
    quantized = baselines.optq_weight(weight, torch.eye(5) * 3)
    torch.testing.assert_close(quantized, tsld.fake_quantize(weight, 4, "channel"))


@pytest.mark.parametrize(
    "x",
    [
        correlated(2, 6),
        torch.zeros(4, 6),
        correlated(9, 6) * torch.tensor([1.0, 0, 1, 1, 0, 1]),
    ],
    ids=["few", "zero", "zero in two channels"],
)
def test_optq_takes_inputs_that_are_few_or_zero_and_rows_of_zeros(x):
    weight = torch.cat([randn(2, 6), torch.zeros(1, 6)])
    quantized = baselines.optq_weight(weight, x)

    assert torch.isfinite(quantized).all()
    assert quantized[2].abs().max() == 0


def test_optq_calibrates_each_layer_with_those_before_it_quantized():
    model = micro_gpt()
    ids = micro_ids(20)
    expected = copy.deepcopy(model)
    quantized = baselines.optq(model, ids)

    for block in range(MICRO.n_layer):
        for name in LAYERS:
            name = f"h.{block}.{name}"
            layer = expected.get_submodule(name)
            x = inputs(expected, name, ids)
            layer.weight.data = baselines.optq_weight(layer.weight, x)
            weight = quantized.get_submodule(name).weight
            torch.testing.assert_close(weight, layer.weight)


# --------------------------------------------------------------------------------------
# AWQ


@pytest.mark.parametrize("seed", range(4))
def test_awq_takes_the_best_scale_of_its_grid(seed):
    weight = randn(5, 8, seed=seed)
    x = correlated(50, 8, seed) * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 12])
    exact = x @ weight.t()

    errors = []
    scales = []
    for step in range(20):
        s = x.abs().mean(0) ** (step / 20)
        s = s / math.sqrt(s.max() * s.min())
        quantized = tsld.fake_quantize(weight * s, 4, "channel")
        errors.append((((x / s) @ quantized.t() - exact) ** 2).sum().item())
        scales.append(s)

    best = int(np.argmin(errors))
    assert best > 0 and errors[best] < errors[0]  # a = 0 is round to nearest

    torch.testing.assert_close(baselines.awq_scale(weight, x), scales[best])


def test_awqs_folded_scales_compute_what_scales_on_every_layers_own_input_would():
    model = micro_gpt()
    ids = micro_ids(20)
    expected = copy.deepcopy(model).requires_grad_(False)
    quantized = baselines.awq(model, ids)

    for block in range(MICRO.n_layer):
        for name in LAYERS:
            name = f"h.{block}.{name}"
            layer = expected.get_submodule(name)
            s = baselines.awq_scale(layer.weight, inputs(expected, name, ids))
            layer.weight.copy_(tsld.fake_quantize(layer.weight * s, 4, "channel") / s)

    torch.testing.assert_close(quantized(ids), expected(ids), rtol=1e-3, atol=1e-3)

    for block in quantized.h:
        assert type(block.attn.c_proj) is nn.Linear
        assert type(block.mlp.c_proj) is baselines.ScaledLinear

        # The weights are on a grid of 16 values in each row, the values' rows as well.
        attn = block.attn
        for layer in (attn.c_attn, attn.c_proj, block.mlp.c_proj.layer):
            for row in layer.weight:
                assert len(np.unique(row.numpy().round(5))) <= 16


# --------------------------------------------------------------------------------------
# Both


@pytest.mark.parametrize("method", ["optq", "awq"])
def test_post_training_methods_give_a_copy_whose_layers_beat_round_to_nearest(method):
    model = micro_gpt(block_size=16, n_embd=24)
    ids = micro_ids(40, 16)
    before = copy.deepcopy(model.state_dict())
    quantized = getattr(baselines, method)(model, ids)

    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not quantized.training
    assert quantized.lm_head.weight is quantized.wte.weight

    # The first layer sees the same inputs in both. AWQ's values carry the next layer's
    # scale, which that layer's weight takes back: they are left out.
    rows = slice(0, 48 if method == "awq" else 72)
    embedded = model.wte(ids) + model.wpe(torch.arange(16))
    block = quantized.h[0]
    weight = model.h[0].attn.c_attn.weight[rows]
    x = model.h[0].ln_1(embedded)
    exact = x @ weight.t()
    nearest = x @ tsld.fake_quantize(weight, 4, "channel").t()
    output = block.ln_1(embedded) @ block.attn.c_attn.weight[rows].t()

    assert ((output - exact) ** 2).sum() < ((nearest - exact) ** 2).sum()


@pytest.mark.parametrize("method", [baselines.optq, baselines.awq])
def test_post_training_methods_refuse_other_bits(method):
    with pytest.raises(ValueError, match="4 bits, not 2"):
        method(micro_gpt(), micro_ids(), bits=2)


def test_awq_refuses_another_model():
    with pytest.raises(ValueError, match="not Linear"):
        baselines.awq(nn.Linear(2, 2), micro_ids())


def test_optq_takes_the_blocks_of_any_language_model():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(17, 12)
            self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
            self.lm_head = nn.Linear(12, 17)

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.lm_head(x)

    torch.manual_seed(0)
    model = Other()
    ids = micro_ids(8)
    quantized = baselines.optq(model, ids)

    x = model.embed(ids).flatten(0, 1).detach()
    for layer, found in zip(model.layers, quantized.layers):
        weight = baselines.optq_weight(layer.weight, x)
        assert torch.equal(found.weight, weight)
        x = torch.tanh(x @ weight.t() + layer.bias).detach()
    assert torch.equal(quantized.lm_head.weight, model.lm_head.weight)


# --------------------------------------------------------------------------------------
# The table


def wanted(flags):
    """The rows that a command of these flags wants."""
    setup = train_small.set_up(table.parse(flags))
    return table.wanted_rows(setup, setup.source.model)


def methods(found):
    """(bits, method) of each row, with how often it is there."""
    return collections.Counter((row["bits"], row["method"]) for row in found)


def test_the_table_has_every_row_of_the_papers(tiny):
    expected = dict.fromkeys(table.UNTRAINED, 1)
    expected |= {(4, loss): 3 for loss in ("logit", "logit_gt", "tsld")}
    expected |= {(2, loss): 3 for loss in ("l2l", "logit", "logit_gt", "gt")}
    expected[2, "tsld"] = 3 * (1 + 6)

    assert methods(wanted(tiny)) == expected


def test_a_table_goes_on_where_it_stopped_and_mixes_no_teachers_or_rates(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(table, "SEEDS", (0, 1))
    monkeypatch.setattr(table, "TRAINED", {2: ("gt", "l2l"), 4: ("logit",)})
    monkeypatch.setattr(table, "ABLATION", ((2.0, 0.25),))
    flags = [*tiny, "--steps", "2", "--dtype", "float32"]
    run(flags, capsys, table.main)
    path = tmp_path / "out" / "table.json"
    found = json.loads(path.read_text())
    expected = dict.fromkeys(table.UNTRAINED, 1)
    expected |= {(2, "gt"): 2, (2, "l2l"): 2, (4, "logit"): 2, (2, "tsld"): 2}

    assert methods(found) == expected

    preset = train_small.PRESETS["tiny-6"]
    rates = {(row["bits"], row["lr"]) for row in found if "lr" in row}

    assert rates == {(2, preset.student.lr), (4, preset.lr_4bit)}
    assert not list((tmp_path / "out").glob("student-*"))

    # Its page has mean and spread.
    of_gt = [row for row in found if row["method"] == "gt"]
    values = [row["valid_ppl"] for row in of_gt]
    cell = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    line = f"| 2 | ground truth alone | 2 | {cell} |"

    assert line in (tmp_path / "out" / "tables.md").read_text()

    # Rows of another rate or another teacher neither count as done nor go into a cell.
    other = [row | {"lr": 1.0, "valid_ppl": 1e9} for row in of_gt[:1]]
    other += [row | {"teacher": "another", "valid_ppl": 1e9} for row in found]
    path.write_text(json.dumps(other + found[3:-1]))
    out = run(flags, capsys, table.main)

    assert re.findall(r"student, (\S+): 2 steps", out) == ["tsld-2-2.0-0.25-1"]
    assert line in (tmp_path / "out" / "tables.md").read_text()

    # The same numbers came once more.
    again = json.loads(path.read_text())[len(other) :]
    assert sorted(map(comparable, again)) == sorted(map(comparable, found))


def comparable(row):
    row = {key: x for key, x in row.items() if key not in ("date", "command")}
    return json.dumps(row, sort_keys=True)


def test_the_tables_rows_are_those_of_the_main_command(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(table, "SEEDS", (0,))
    monkeypatch.setattr(table, "TRAINED", {2: ("logit",)})
    monkeypatch.setattr(table, "ABLATION", ())
    flags = [*tiny, "--steps", "2", "--dtype", "float32"]
    run(flags, capsys, table.main)
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    row_of = {row["method"]: row for row in found}

    def result(*more):
        run([*flags, *more], capsys)
        (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
        return row

    of_run = result("--loss", "logit", "--gt-weight", "0")
    assert of_run["student_ppl"] == row_of["logit"]["valid_ppl"]
    assert of_run["test_student_bpb"] == row_of["logit"]["test_bpb"]
    assert of_run["ptq_ppl"] == row_of["ternarized"]["valid_ppl"]

    of_run = result("--bits", "4", "--granularity", "channel")
    assert of_run["ptq_ppl"] == row_of["round-to-nearest"]["valid_ppl"]


@pytest.mark.parametrize(
    "more, plain, ablation",
    [
        ([], 10.0, {1.0, 2.0, 5.0, 20.0}),
        (["--tsld-temperature", "7"], 7.0, {1.0, 2.0, 5.0, 10.0, 20.0}),
    ],
)
def test_the_table_has_the_papers_temperature_where_no_other_is_asked_for(
    more, plain, ablation, tiny
):
    students = [row for row in wanted([*tiny, *more]) if "seed" in row]
    of_logit = {row["temperature"] for row in students if row["loss"] == "logit"}

    assert of_logit == {plain}
    assert {row["temperature"] for row in students} - of_logit == ablation


def test_the_documented_command_makes_the_rows_that_are_there(tmp_path, monkeypatch):
    corpus = dict.fromkeys(texts.PARTS, WORDS) | {"train": WORDS * 5000}
    monkeypatch.setattr(sources, "load_corpus", lambda choice: ("ptb", "", corpus))
    words = [*table.DOCUMENTED[0].split(), "--dtype", "bfloat16"]
    settings = wanted([*words, "--out", str(tmp_path), "--device", "cpu"])
    for setting in settings:
        del setting["teacher"]  # which the text makes

    # The students of teachers of 5,000 steps, but for those of other settings.
    found = read_rows(table.ROOM, "table.json")
    usual = {"teacher_steps": 5000, "student_tokens": 100_000, "steps": 400}
    found = [row for row in found if usual.items() <= row.items()]
    found = [row for row in found if row["lr"] in (1e-3, 1e-4)]
    assert len(found) > 30
    for row in found:
        assert sum(setting.items() <= row.items() for setting in settings) == 1


def test_a_rate_that_is_asked_for_is_that_of_all_students(tiny):
    found = wanted([*tiny, "--lr", "0.5"])
    assert {row["lr"] for row in found if "lr" in row} == {0.5}


def test_a_table_that_cannot_be_made_is_refused_before_anything_is_trained(
    tiny, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "train_teacher", None)
    words = f"--model {tmp_path}: it takes one of tiny"
    refused([*tiny, "--model", str(tmp_path)], capsys, words, table.main)
    path = tmp_path / "out" / "table.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("[{")
    refused(tiny, capsys, f"{path} is damaged", table.main)
