"""data/lib/folder.py: the folder that a run writes to."""

import errno
import os
import shutil
import stat
from types import SimpleNamespace

import pytest
import torch

from data.lib import files, folder
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


locks_files = pytest.mark.skipif(
    folder.fcntl is None, reason="this system does not lock files"
)


@locks_files
def test_a_folder_that_another_run_holds_is_refused_until_that_ends(tmp_path):
    in_use = f"^{tmp_path} is in use by another process: name another folder$"
    (tmp_path / ".lock").write_text("")  # of a run that was killed
    for _ in range(2):
        with folder.hold(tmp_path):
            for _ in range(2):
                with pytest.raises(UserError, match=in_use), folder.hold(tmp_path):
                    pass
        assert os.listdir(tmp_path) == []


@locks_files
def test_where_a_folders_lock_holds_for_one_machine_that_of_its_file_holds_for_all(
    tmp_path, monkeypatch
):
    """A network file system locks folders on each machine by itself."""
    flock = folder.fcntl.flock

    def flock_files(file, flags):
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            flock(file, flags)

    monkeypatch.setattr(folder.fcntl, "flock", flock_files)
    in_use = f"{tmp_path / '.lock'} is in use by another process: name another folder"
    with folder.hold(tmp_path), pytest.raises(UserError, match=in_use):
        folder.hold(tmp_path).__enter__()
    assert os.listdir(tmp_path) == []


@locks_files
def test_a_folder_is_let_go_by_a_run_that_fails_or_whose_lock_was_tidied_up(tmp_path):
    with pytest.raises(ZeroDivisionError), folder.hold(tmp_path):
        raise ZeroDivisionError
    with folder.hold(tmp_path):
        (tmp_path / ".lock").unlink()
    with folder.hold(tmp_path):
        pass


@locks_files
def test_a_run_whose_lock_was_removed_keeps_others_out(tmp_path):
    with folder.hold(tmp_path):
        for _ in range(2):
            (tmp_path / ".lock").unlink(missing_ok=True)
            with pytest.raises(UserError, match=f"{tmp_path} is in use by another"):
                folder.hold(tmp_path).__enter__()
    assert os.listdir(tmp_path) == []


@locks_files
@pytest.mark.parametrize(
    "error", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO]
)
def test_a_file_system_without_locks_holds_none_and_says_so(
    error, tmp_path, monkeypatch, capsys
):
    def refuse(file, flags):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    with folder.hold(tmp_path), folder.hold(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
    words = f"--out {tmp_path}: there are no locks, start no second run in it\n"
    assert capsys.readouterr().out == 2 * words


def hard_link(path, target):
    path.hardlink_to(target)


def copy(path, target):
    path.write_bytes(target.read_bytes())


def make_folder(path, target):
    path.mkdir()


def make_pipe(path, target):
    os.mkfifo(path)


@locks_files
@pytest.mark.parametrize("make", [hard_link, copy, make_folder, make_pipe])
def test_what_has_the_locks_name_is_not_written_over(make, tmp_path):
    target = tmp_path / "notes"
    target.write_text("mine")
    out = folder.check_folder(tmp_path / "out")
    make(out / ".lock", target)
    before = os.lstat(out / ".lock")

    with folder.hold(out):
        pass
    assert target.read_text() == "mine"
    after = os.lstat(out / ".lock")
    assert (after.st_ino, after.st_mtime) == (before.st_ino, before.st_mtime)


@locks_files
def test_a_link_that_has_the_locks_name_is_not_followed(tmp_path):
    out = folder.check_folder(tmp_path / "out")
    (out / ".lock").symlink_to(tmp_path / "notes")
    with pytest.raises(OSError) as refusal, folder.hold(out):
        pass
    assert refusal.value.filename == str(out / ".lock")
    assert os.listdir(tmp_path) == ["out"]


@locks_files
def test_what_a_killed_run_has_left_half_written_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a.pt") as name:
        half = shutil.copytree(name.parent, tmp_path / "kept")
        raise ZeroDivisionError
    left = half.rename(tmp_path / name.parent.name)
    (left / "a.pt").write_text("half")
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / "my.chapters.tmp").mkdir()
    (tmp_path / "my.chapters.tmp" / "one").write_text("mine")

    with folder.hold(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == ["my.chapters.tmp", "notes.tmp"]
    assert os.listdir(tmp_path / "my.chapters.tmp") == ["one"]


@pytest.mark.parametrize("name", ["results.json", "student-tsld.pt", "rounded.packed"])
def test_a_folder_with_a_results_name_is_refused_by_name(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{tmp_path / name} is no file, and a run may"):
        folder.check_out(tmp_path, torch.nn.Linear(1, 1), ["tsld"])

    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("")
    (tmp_path / "notes").mkdir()
    folder.check_out(tmp_path, torch.nn.Linear(1, 1), ["tsld"])


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    with folder.hold(tmp_path), folder.hold(tmp_path):
        assert os.listdir(tmp_path) == []


def test_a_disk_without_room_for_three_checkpoints_is_refused(tmp_path, monkeypatch):
    # 1000 weights, and two averages of each, are 12 kB. A training keeps two such
    # checkpoints and writes one more. What another has left are its weights.
    model = torch.nn.Linear(100, 10, bias=False)
    free = {"bytes": 3 * 12_000 + 4_000}

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
