"""The folder that a run writes to."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from data.lib.errors import UserError
from data.lib.processes import processes

try:
    import fcntl  # Windows has none
except ImportError:
    fcntl = None


def check_folder(path):
    """Makes the folder if it is missing, and returns it as a Path. Raises UserError if
    no file can be written there: a run finds out before training, not after."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        message = f"folder {path} cannot be written: {error.strerror}"
        raise UserError(message) from None


@contextmanager
def hold(folder):
    """Keeps other runs, which would write the same files, out of the folder. The first
    of several processes does it for all. Raises UserError if another run holds it."""
    if processes()[0] > 0:
        yield
        return

    # The folder's own lock holds whatever is removed in it. On a network file system it
    # holds for one machine, and only the lock of a file for all of them.
    file = Path(folder) / ".lock"
    with alone_in(folder) as is_alone, alone_in(file):
        if is_alone:
            remove_leftovers(folder)
        else:
            print(f"--out {folder}: there are no locks, start no second run in it")

        try:
            yield
        finally:
            if file.is_file() and file.stat().st_size == 0:  # and nobody's notes
                file.unlink()


@contextmanager
def alone_in(path):
    """Keeps other processes that ask for it out of a folder, or from a file, which is
    made if it is missing and never written, until this process ends, however it ends.
    Raises UserError if one is there. Yields whether it does: Windows and some file
    systems have no such locks."""
    if fcntl is None:
        yield False
        return

    flags = os.O_RDONLY
    if not os.path.isdir(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW

    file = os.open(path, flags, 0o666)
    is_alone = True
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{path} is in use by another process: name another folder"
            raise UserError(message) from None
        except OSError:
            is_alone = False
        yield is_alone
    finally:
        os.close(file)


def remove_leftovers(folder):
    """Removes what a run that was killed has left half-written: folders that
    files.replacing makes, with nothing in them but the file that they are for."""
    for path in Path(folder).glob("*.????????.tmp"):
        name = path.name[: -len(".????????.tmp")]
        if path.is_symlink() or not path.is_dir():
            continue

        files = [*path.iterdir()]
        if all(file.name in (name, f"{name}.tmp") for file in files):
            for file in files:
                file.unlink()
            path.rmdir()


def check_out(path, model, students):
    """Raises UserError if a run has no room there for its files: the disk is too small
    for the checkpoints of a teacher and its students, or a folder has a file's name."""
    folder = check_folder(path)
    check_names(folder)
    check_space(folder, model, 1 + len(students))


def check_names(folder):
    for path in folder.iterdir():
        is_result = path.suffix in (".pt", ".packed", ".json", ".html")
        if is_result and path.exists() and not path.is_file():
            remedy = "move it away, or name another --out"
            raise UserError(
                f"{path} is no file, and a run may write one there: {remedy}"
            )


def check_space(path, model, trainings):
    """Raises UserError if the disk has no room for the checkpoints of so many trainings
    of the model."""
    # A checkpoint holds the weights and AdamW's two averages, in float32. A training
    # keeps two of them, and there is a third one while it is written. A training that
    # is finished keeps its weights alone.
    weights = sum(4 * p.numel() for p in model.parameters())
    needed = weights * (3 * 3 + trainings - 1)
    free = shutil.disk_usage(path).free

    if free < needed:
        sizes = (
            f"{needed / 1e9:.1f} GB for checkpoints and has {free / 1e9:.1f} GB free"
        )
        raise UserError(f"--out {path} needs {sizes}: name a folder on another disk")
