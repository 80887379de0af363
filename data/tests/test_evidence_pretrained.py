"""The evidence's room pretrained: the schedule of a pretrained model on one GPU."""

import json
from types import SimpleNamespace

import pytest

import train_small
from data.evidence.pretrained import schedule
from data.tests.helpers import SHORT, refused, run

HERE = "data.evidence.pretrained.schedule"


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs the processes of a schedule here, one after the other. Returns their words,
    of which those of a task are only noted."""
    started = []

    def start(words, log):
        started.append(words)
        code = 0
        if words[0] == HERE:
            code = train_small.main(words[1:], schedule.main)
        return SimpleNamespace(wait=lambda timeout: code)

    monkeypatch.setattr(schedule, "start", start)
    return started


def test_a_dry_run_fills_every_row_and_the_table(
    tiny, capsys, tmp_path, monkeypatch, in_this_process
):
    monkeypatch.setattr(schedule, "GRANULARITIES", ("channel",))
    monkeypatch.setattr(schedule, "UNTRAINED", ("round-to-nearest",))
    flags = ["--model", "tiny", *SHORT, *tiny]
    run(flags, capsys, schedule.main)

    out = tmp_path / "out"
    files = sorted(out.glob("students-*.json"))
    found = [row for file in files for row in json.loads(file.read_text())]
    trained = [row for row in found if row["method"] in train_small.LOSSES]
    mixes = [(row["method"], row["gt_weight"], row["seed"]) for row in trained]
    students = (*schedule.STUDENTS, *schedule.L2L)
    assert sorted(mixes) == sorted((*mix, seed) for mix in students for seed in (0, 1))
    assert {row["steps"] for row in trained} == {1}
    assert all(row["valid_ppl"] > 1 and row["test_ppl"] > 1 for row in found)

    rest = [row["method"] for row in found if row not in trained]
    assert sorted(rest) == ["round-to-nearest", "rounded", "rounded", "teacher"]

    lines = (out / "tables.md").read_text().splitlines()
    for name in ("teacher", "rounded", "TSLD + ground truth · 0.25", "L2L+logit"):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1, name

    tasks = [words for words in in_this_process if words[0] != HERE]
    assert [words[2] for words in tasks] == ["sst2", "cola", "openbookqa"]

    # A second time everything is there.
    assert " of 6: " not in run(flags, capsys, schedule.main)


def test_the_words_of_a_task_are_a_command(in_this_process, tmp_path):
    from data.evidence.tasks import accuracy

    args = SimpleNamespace(model="tiny", device="cpu", steps=7)
    for _, (module, *words) in schedule.jobs_of_tasks(args, tmp_path):
        assert module == accuracy.__name__
        assert accuracy.parse(words).steps == 7


def test_a_process_that_fails_does_not_stop_the_others(
    tiny, capsys, tmp_path, monkeypatch
):
    started = []

    def start(words, log):
        started.append(words)
        failed = "tensor" in words and "l2l" not in words
        return SimpleNamespace(wait=lambda timeout: int(failed))

    monkeypatch.setattr(schedule, "start", start)
    words = "students-tensor-0.log"
    refused(["--model", "tiny", *tiny], capsys, words, schedule.main)
    assert len(started) == 1 + 2 * 2 * 2 + 3


def test_without_a_teacher_nothing_else_is_started(tiny, capsys, monkeypatch):
    started = []

    def start(words, log):
        started.append(words)
        return SimpleNamespace(wait=lambda timeout: 2)

    monkeypatch.setattr(schedule, "start", start)
    refused(["--model", "tiny", *tiny], capsys, "teacher.log", schedule.main)
    assert len(started) == 1


def test_so_many_processes_run_at_once_and_write_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "AT_ONCE", 2)
    jobs = []
    for name, code in (("a", 0), ("b", 3), ("c", 0)):
        script = tmp_path / f"{name}.sh"
        script.write_text(f"echo {name} $1; exit {code}\n")
        jobs.append((name, [str(script), "word"]))

    def start(words, log):
        command = ["/bin/sh", *words]
        return schedule.subprocess.Popen(command, stdout=log, stderr=log)

    monkeypatch.setattr(schedule, "start", start)
    assert schedule.run_at_once(jobs, tmp_path) == [str(tmp_path / "b.log")]
    for name, _ in jobs:
        assert (tmp_path / f"{name}.log").read_text() == f"{name} word\n"


def test_the_teacher_of_a_short_dry_run_has_its_epochs(tiny, capsys, tmp_path):
    """--steps shortens the students, and not the teacher."""
    flags = ["--model", "tiny", "--steps", "2", *tiny]
    args = train_small.parse(flags, schedule.TAKES, out=str(tmp_path / "out"))
    args.resume = True
    setup, _ = schedule.set_up(args)
    assert setup.teacher.steps == setup.source.preset.teacher.steps == 4
