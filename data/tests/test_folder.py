"""data/lib/folder.py: the folder that a run writes to."""

import os
from types import SimpleNamespace

import pytest
import torch

from data.lib import folder
from data.lib.errors import UserError


def test_a_folder_is_made_with_those_above_it_and_nothing_is_left_in_it(tmp_path):
    path = tmp_path / "a" / "b"
    for _ in range(2):
        assert folder.check_folder(str(path)) == path
        assert os.listdir(path) == []


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=f"folder {path} cannot be written: "):
            folder.check_folder(path)

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        folder.check_folder(tmp_path)


@pytest.mark.skipif(folder.fcntl is None, reason="this system does not lock files")
def test_a_folder_that_another_run_holds_is_refused_until_that_ends(tmp_path):
    in_use = f"--out {tmp_path} is in use by process {os.getpid()}: name another"
    (tmp_path / ".lock").write_text("12345")  # of a run that was killed
    for _ in range(2):
        with folder.hold(tmp_path):
            for _ in range(2):
                with pytest.raises(UserError, match=in_use), folder.hold(tmp_path):
                    pass
        assert os.listdir(tmp_path) == []


@pytest.mark.skipif(folder.fcntl is None, reason="this system does not lock files")
def test_a_folder_is_let_go_by_a_run_that_fails_or_whose_lock_was_tidied_up(tmp_path):
    with pytest.raises(ZeroDivisionError), folder.hold(tmp_path):
        raise ZeroDivisionError
    with folder.hold(tmp_path):
        (tmp_path / ".lock").unlink()
    with folder.hold(tmp_path):
        pass


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    with folder.hold(tmp_path), folder.hold(tmp_path):
        assert os.listdir(tmp_path) == []


def test_a_disk_without_room_for_three_checkpoints_is_refused(tmp_path, monkeypatch):
    # 1000 weights, and two averages of each, are 12 kB. Two trainings keep two
    # checkpoints each, and write one more.
    model = torch.nn.Linear(100, 10, bias=False)
    free = {"bytes": 5 * 12_000}

    def disk_usage(path):
        assert path == tmp_path
        return SimpleNamespace(free=free["bytes"])

    monkeypatch.setattr(folder.shutil, "disk_usage", disk_usage)
    folder.check_space(tmp_path, model, trainings=2)
    free["bytes"] -= 1
    with pytest.raises(
        UserError, match=f"--out {tmp_path} needs 0.0 GB for checkpoints"
    ):
        folder.check_space(tmp_path, model, trainings=2)
