"""data/lib/processes.py: several processes that train one model together.

Two real ones do so once, for all tests here (in_two_processes)."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import tsld
from data.lib import processes, resumable
from data.lib.files import read_checked
from data.lib.progress import TrainingStopped
from data.tests.helpers import (
    ROOT,
    TEXT,
    Beside,
    has_loopback,
    micro_gpt,
    micro_ids,
    run_together,
)

CPU = torch.device("cpu")
BRIEF = tsld.TrainConfig(steps=4, batch_size=4, block_size=8, lr=0.01)


def train(loss, path, resume=False, watch=None):
    """Trains a student, and returns what can be said of it and of the model that the
    processes share."""
    teacher = processes.spread(micro_gpt(2), CPU)
    student = tsld.quantize_model(micro_gpt(1))
    config = replace(BRIEF, loss=loss)
    _, trained = resumable.train(
        loss, student, TEXT, config, path, CPU, resume, teacher, watch=watch
    )
    prompt = micro_ids(2, 3)
    return {
        "nats": tsld.evaluate(trained, TEXT, 8),
        "nats of the whole": tsld.evaluate(student, TEXT, 8),
        "distance": resumable.kl_to_teacher(trained, teacher, micro_ids()),
        "text": trained.generate(prompt, 5, temperature=0).tolist(),
    }


def in_two_processes(folder):
    """What each of the two does; it writes down what it found."""
    torch.set_num_threads(1)
    with processes.process_group():
        rank, world = processes.processes()
        print(f"one of {world} processes")
        found = {"any": processes.any_process(rank == 1, False, True)}

        with processes.first_process_first():
            found["the other was there"] = (folder / "was there").exists()
            (folder / "was there").touch()

        model = micro_gpt()
        shared = processes.spread(model, CPU)
        parts = [parameter.to_local() for parameter in shared.parameters()]
        found["weights held"] = sum(part.numel() for part in parts)
        found["is a copy"] = shared is not model
        found["is shared"] = [isinstance(block, FSDPModule) for block in shared.h]
        found["is not shared again"] = processes.spread(shared, CPU) is shared

        for loss in tsld.LOSSES:
            found[loss] = train(loss, folder / f"{loss}.pt")

        def stop_the_second(step, model):
            if rank == 1 and step == 2:
                signal.raise_signal(signal.SIGTERM)

        try:
            train("tsld", folder / "stopped.pt", watch=stop_the_second)
        except TrainingStopped as stop:
            found["stopped"] = str(stop)

        (folder / f"{rank}.json").write_text(json.dumps(found))


@Beside
def run_of_two(folder):
    """The folder, and the run of two processes that leave files in it."""
    program = "import pathlib, sys; from data.tests import test_processes\n"
    program += "test_processes.in_two_processes(pathlib.Path(sys.argv[1]))\n"
    (folder / "program.py").write_text(program)
    return folder, run_together(folder / "program.py", folder, torchrun=True)


@pytest.fixture(scope="module")
def together():
    """The folder of two processes, what each of them found, and what was printed."""
    if not has_loopback():
        pytest.skip("no loopback network")
    folder, run = run_of_two()
    assert run.returncode == 0, run.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return folder, found, run.stdout


def test_the_first_process_alone_prints(together):
    _, _, printed = together
    assert printed.count("one of 2 processes\n") == 1
    assert printed.count("gt: step 4/4, loss ") == 2 - 1 + printed.count("logit_gt: ")


def test_what_is_true_in_one_process_is_true_in_all(together):
    _, found, _ = together
    assert [facts["any"] for facts in found] == [[True, False, True]] * 2


def test_the_first_process_goes_first(together):
    _, found, _ = together
    assert [facts["the other was there"] for facts in found] == [False, True]


def test_each_process_holds_a_part_of_a_copy_of_the_weights(together):
    _, found, _ = together
    total = sum(parameter.numel() for parameter in micro_gpt().parameters())
    held = [facts["weights held"] for facts in found]
    assert sum(held) == total
    assert max(held) < 0.6 * total

    for facts in found:
        assert facts["is a copy"]
        assert facts["is shared"] == [True, True]  # block by block
        assert facts["is not shared again"]


@pytest.mark.parametrize("loss", tsld.LOSSES)
def test_two_processes_train_score_and_write_as_one(loss, together, tmp_path):
    folder, found, _ = together
    alone = train(loss, tmp_path / "alone.pt")
    for facts in found:
        assert facts[loss]["text"] == alone["text"]
        for name in ("nats", "nats of the whole", "distance"):
            assert facts[loss][name] == pytest.approx(alone[name], rel=1e-3)
    assert_checkpoints_close(folder / f"{loss}.pt", tmp_path / "alone.pt")


def assert_checkpoints_close(one, two):
    states = [read_checked(path) for path in (one, two)]
    assert states[0]["step"] == states[1]["step"] == 4
    assert states[0]["identity"] == states[1]["identity"]
    for name, weight in states[0]["model"].items():
        torch.testing.assert_close(
            weight, states[1]["model"][name], rtol=1e-3, atol=1e-3
        )


def test_a_signal_to_one_stops_both_and_one_alone_resumes(together, tmp_path):
    folder, found, _ = together
    words = "stopped after step 2 of 4; go on with the same command and --resume"
    assert [facts["stopped"] for facts in found] == [words] * 2
    assert read_checked(folder / "stopped.pt")["step"] == 2

    (tmp_path / "resumed.pt").write_bytes((folder / "stopped.pt").read_bytes())
    train("tsld", tmp_path / "resumed.pt", resume=True)
    assert_checkpoints_close(tmp_path / "resumed.pt", folder / "tsld.pt")


@Beside
def run_of_two_without_a_text(folder):
    flags = ["--data", folder / "nowhere.txt", "--device", "cpu"]
    return folder, run_together(ROOT / "train_small.py", *flags, torchrun=True)


def test_an_error_is_said_once_and_is_the_last_line_of_torchruns_report():
    if not has_loopback():
        pytest.skip("no loopback network")
    folder, run = run_of_two_without_a_text()

    line = f"error: --data {folder / 'nowhere.txt'}: No such file or directory"
    assert run.returncode != 0
    assert run.stderr.splitlines().count(line) == 1
    *_, last, border = run.stderr.splitlines()
    assert last == f"  traceback : {line}"
    assert not border.strip("=")


# --------------------------------------------------------------------------------------
# One process, which is two for the code that is tested


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_takes_its_rows_with_dropout_of_its_own(rank, monkeypatch):
    seen = []

    def backward(student, teacher, ids, targets, config):
        seen.append((student, teacher, ids.tolist(), targets.tolist(), config))
        return torch.tensor(3.0) + torch.initial_seed()

    def all_reduce(tensor):
        tensor += 100.0  # what the other processes have

    monkeypatch.setattr(processes, "processes", lambda: (rank, 2))
    monkeypatch.setattr(processes.distributed, "all_reduce", all_reduce)
    torch.manual_seed(40)
    ids = torch.arange(4)[:, None]
    targets = torch.arange(4, 8)[:, None]
    share = processes.shared(backward)
    loss = share("student", "teacher", ids, targets, "config")

    rows = [[rank], [rank + 2]]
    targets = [[rank + 4], [rank + 6]]
    assert seen == [("student", "teacher", rows, targets, "config")]
    assert loss.item() == (3.0 + 40 + rank) / 2 + 100.0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_others_wait_for_the_first_process_even_if_it_fails(rank, fails, monkeypatch):
    done = []
    monkeypatch.setattr(processes, "processes", lambda: (rank, 2))
    monkeypatch.setattr(
        processes.distributed, "barrier", lambda: done.append("barrier")
    )
    try:
        with processes.first_process_first():
            done.append("work")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert done == (["work", "barrier"] if rank == 0 else ["barrier", "work"])


# --------------------------------------------------------------------------------------
# One process alone


def test_one_process_alone_is_not_touched(capsys):
    with processes.process_group():
        print("hello")
        assert processes.processes() == (0, 1)
        assert processes.any_process(True, False) == [True, False]
        with processes.first_process_first():
            pass
        assert processes.shared(tsld.backward) is tsld.backward
        model = micro_gpt()
        assert processes.spread(model, CPU) is model
    assert capsys.readouterr().out == "hello\n"


def test_the_blocks_of_a_model_are_its_longest_list_of_modules():
    gpt = micro_gpt(n_layer=3)
    other = torch.nn.Module()
    other.heads = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    other.inner = gpt
    assert processes.blocks_of(other) is gpt.h
