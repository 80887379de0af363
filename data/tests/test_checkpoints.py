"""data/lib/checkpoints.py: the state of a training on disk."""

import math
import os
from dataclasses import asdict, replace

import pytest
import torch

import tsld
from data.lib import checkpoints
from data.lib.checkpoints import load_checkpoint, save_checkpoint
from data.lib.files import read_checked, write_checked
from data.tests.helpers import MICRO, TEXT, micro_gpt

BRIEF = tsld.TrainConfig(loss="gt", steps=6, batch_size=2, block_size=8, lr=0.01)
IDENTITY = asdict(BRIEF) | {"model": asdict(MICRO), "teacher": None}
CURVE = [[1, 0.75], [3, 0.5]]


def trained(steps, seed=1):
    """A student and its optimizer after a few steps; none of them is a fresh pair."""
    model = tsld.quantize_model(micro_gpt(seed))
    optimizer = tsld.make_optimizer(model, BRIEF)
    list(tsld.train(model, TEXT, replace(BRIEF, steps=steps), optimizer=optimizer))
    return model, optimizer


def saved(path, steps=3):
    """Writes the checkpoint after a few steps; returns what trained does."""
    model, optimizer = trained(steps)
    save_checkpoint(path, IDENTITY, model, optimizer, steps, seconds=1.5, curve=CURVE)
    return model, optimizer


def assert_same_state(one, two):
    """one, two: a model and its optimizer each."""
    weights = two[0].state_dict()
    for name, tensor in one[0].state_dict().items():
        assert torch.equal(tensor, weights[name]), name

    for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(one[1].state[a][name], two[1].state[b][name]), name


def test_a_checkpoint_has_all_that_a_training_needs_to_go_on(tmp_path):
    path = tmp_path / "state.pt"
    before = saved(path)
    other = trained(0, seed=2)
    assert load_checkpoint(path, IDENTITY, *other) == (3, 1.5, CURVE)
    assert_same_state(before, other)
    assert os.listdir(tmp_path) == ["state.pt"]


def test_without_a_checkpoint_a_training_begins_at_0(tmp_path):
    assert load_checkpoint(tmp_path / "state.pt", IDENTITY, *trained(0)) == (0, 0.0, [])


def test_a_model_is_its_configuration_or_what_it_prints():
    assert checkpoints.architecture(micro_gpt()) == asdict(MICRO)
    other = torch.nn.Linear(3, 4)
    assert checkpoints.architecture(other) == repr(other)


def test_a_difference_of_nested_values_is_that_of_the_first_name():
    one = {"heads": 2, "settings": {"eps": 1, "theta": 5}}
    other = {"heads": 2, "settings": {"eps": 1, "theta": 6, "type": "x"}}
    assert checkpoints.difference("model", one, other) == "theta is 5, not 6"
    assert checkpoints.difference("model", one, None) == f"model is {one}, not None"


def test_models_that_print_alike_differ_by_their_configuration():
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    one.config, other.config = MICRO, replace(MICRO, n_head=MICRO.n_head * 2)
    assert checkpoints.architecture(one) != checkpoints.architecture(other)


# --------------------------------------------------------------------------------------
# There is a whole one at any moment


def test_the_checkpoint_before_is_kept_and_used_when_the_newest_is_gone(tmp_path):
    path = tmp_path / "state.pt"
    saved(path, steps=2)
    before = saved(path, steps=3)
    saved(path, steps=4)
    assert sorted(os.listdir(tmp_path)) == ["state.previous.pt", "state.pt"]
    assert read_checked(path)["step"] == 4

    path.unlink()
    other = trained(0, seed=2)
    assert load_checkpoint(path, IDENTITY, *other) == (3, 1.5, CURVE)
    assert_same_state(before, other)


def test_a_finished_training_keeps_its_weights_alone(tmp_path):
    path = tmp_path / "state.pt"
    saved(path, steps=3)
    unfinished = path.stat().st_size
    before = saved(path, steps=6)

    assert os.listdir(tmp_path) == ["state.pt"]
    assert "optimizer" not in read_checked(path)
    assert path.stat().st_size < 0.5 * unfinished

    other, optimizer = trained(0, seed=2)
    assert load_checkpoint(path, IDENTITY, other, optimizer) == (6, 1.5, CURVE)
    weights = before[0].state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_finished_training_without_weights_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    saved(path, steps=6)
    write_checked(path, read_checked(path) | {"model": {}})
    with pytest.raises(tsld.CheckpointError, match="it has no weights"):
        load_checkpoint(path, IDENTITY, *trained(0))


@pytest.mark.parametrize("steps", [3, 6])  # the last one has six
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_process_that_dies_while_saving_leaves_the_last_checkpoint(
    moment, steps, tmp_path, monkeypatch
):
    """Dies at the first, second or third time that a file is renamed."""
    path = tmp_path / "state.pt"
    before = saved(path, steps=2)
    calls = []
    replace_file = os.replace

    def dies(source, target):
        calls.append(target)
        if len(calls) == moment:
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dies)
        saved(path, steps)

    other = trained(0, seed=2)
    assert load_checkpoint(path, IDENTITY, *other) == (2, 1.5, CURVE)
    assert_same_state(before, other)


# --------------------------------------------------------------------------------------
# Nothing else is taken for it


def test_a_checkpoint_of_another_run_is_refused_with_both_values(tmp_path):
    path = tmp_path / "state.pt"
    saved(path)
    model, optimizer = trained(0, seed=2)
    for changes, words in (
        ({"lr": 0.5}, "lr is 0.01, not 0.5"),
        ({"teacher": "abc"}, "teacher is None, not abc"),
        ({"steps": 9, "seed": 7}, "seed is 0, not 7"),  # the first one by name
        ({"added": 1}, "added is None, not 1"),
        ({"model": asdict(replace(MICRO, n_head=3))}, "n_head is 2, not 3"),
    ):
        with pytest.raises(tsld.CheckpointError) as error:
            load_checkpoint(path, IDENTITY | changes, model, optimizer)
        assert str(error.value) == f"{path} is of another run: {words}; delete it"

    untouched, _ = trained(0, seed=2)
    assert torch.equal(model.wte.weight, untouched.wte.weight)


def test_an_earlier_runs_checkpoint_that_was_set_aside_is_left_alone(tmp_path):
    saved(tmp_path / "state.previous.pt")
    model, optimizer = trained(0, seed=2)
    other_run = IDENTITY | {"lr": 0.5}
    path = tmp_path / "state.pt"
    assert load_checkpoint(path, other_run, model, optimizer) == (0, 0.0, [])
    assert not optimizer.state


def test_checkpoints_of_an_earlier_run_are_set_aside_by_the_first_process(
    tmp_path, monkeypatch
):
    names = ("student-gt.pt", "student-tsld.pt")
    paths = [tmp_path / name for name in names]
    paths[1].write_text("an earlier run's")
    for rank, found in ((1, "student-tsld.pt"), (0, "student-tsld.previous.pt")):
        monkeypatch.setattr(checkpoints, "processes", lambda rank=rank: (rank, 2))
        checkpoints.set_aside(paths)
        assert os.listdir(tmp_path) == [found]
    assert (tmp_path / found).read_text() == "an earlier run's"


def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "state.pt"
    saved(path)
    path.write_bytes(path.read_bytes()[:-9])
    refusal = f"{path} is truncated, altered, or not a file of this program: delete it"
    with pytest.raises(tsld.CheckpointError) as error:
        load_checkpoint(path, IDENTITY, *trained(0))
    assert str(error.value) == refusal

    before = tmp_path / "state.previous.pt"
    before.touch()
    with pytest.raises(tsld.CheckpointError) as error:
        load_checkpoint(path, IDENTITY, *trained(0))
    assert str(error.value) == f"{refusal}, {before} is the one before it"


OTHER_CONTENT = [
    ("identity", 3),
    ("step", "x"),
    ("step", None),
    ("step", 0),
    ("step", 7),
    ("step", 10**9),
    ("seconds", "y"),
    ("seconds", math.nan),
    ("seconds", -1.0),
    ("model", {}),
    ("model", 3),
    ("model", {"wte.weight": torch.zeros(3)}),
    ("optimizer", {}),
    ("optimizer", [1]),
]


def assert_foreign(path, content):
    """The content is refused, in one line that names the file."""
    write_checked(path, content)
    with pytest.raises(tsld.CheckpointError) as error:
        load_checkpoint(path, IDENTITY, *trained(0))
    message = str(error.value)
    assert message.startswith(f"{path} is no checkpoint of this program: ")
    assert "\n" not in message


def test_a_file_of_other_content_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    saved(path)
    content = read_checked(path)
    for key, value in OTHER_CONTENT:
        assert_foreign(path, content | {key: value})
    for key in dict(OTHER_CONTENT):
        rest = {name: part for name, part in content.items() if name != key}
        assert_foreign(path, rest)
    assert_foreign(path, [1, 2])


def test_an_optimizers_state_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    saved(path)
    for name in ("exp_avg", "exp_avg_sq"):
        content = read_checked(path)
        content["optimizer"]["state"]["ln_f.bias"][name] = torch.zeros(3)
        assert_foreign(tmp_path / "other.pt", content)

    content = read_checked(path)
    content["optimizer"]["param_groups"][0]["weight_decay"] = 0.5
    assert_foreign(tmp_path / "other.pt", content)
