"""The folder that a run writes to."""

import os
import shutil
import stat
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
    of several processes does it for all. Raises UserError if another run holds it.
    Windows and some file systems have no such locks: none is held there."""
    path = Path(folder) / ".lock"
    is_first = processes()[0] == 0
    file = locked(path) if is_first else None
    if file is None:
        yield
        return

    # The lock ends with this process, however it ends. Its number is for others. If
    # somebody removes the file, the folder's own lock holds, on one machine at least.
    with file:
        file.write(str(os.getpid()))
        file.flush()

        try:
            with alone_in(folder):
                remove_leftovers(folder)
                yield
        finally:
            if is_at(path, file):  # and no other run's, if somebody removed ours
                path.unlink()


@contextmanager
def alone_in(folder):
    """Keeps other processes of this machine that ask for it out of a folder, and yields
    whether it does: not where there are no locks. Raises UserError if one is there."""
    if fcntl is None:
        yield False
        return

    descriptor = os.open(folder, os.O_RDONLY)
    is_alone = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"folder {folder} is in use by another process: name another"
            raise UserError(message) from None
        except OSError:  # a network file system, for example
            is_alone = False
        yield is_alone
    finally:
        os.close(descriptor)


def locked(path):
    """The file of a lock, open, empty and locked, or None where there are no locks.
    Raises UserError if another process has locked it, or it is none of ours."""
    if fcntl is None:
        return None

    while True:
        file = open_lock(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = f"process {file.read() or 'unknown'}"
            file.close()
            message = f"--out {path.parent} is in use by {holder}: name another"
            raise UserError(message) from None
        except OSError as error:  # a network file system, for example
            path.unlink()
            file.close()
            reason = f"its file system has no locks ({error.strerror})"
            print(f"--out {path.parent}: {reason}, start no second run in it")
            return None

        # A run that ended in the meantime has removed this file. Another process may
        # hold the new one.
        if is_at(path, file):
            file.truncate(0)
            return file
        file.close()


def open_lock(path):
    """The file of a lock, open to be read and written. Raises UserError if it is a link
    or anything else that must not be written over."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.fdopen(os.open(path, flags, 0o666), "r+")
    except OSError:
        if path.is_symlink() or path.exists():
            raise UserError(f"{path} is no lock of a run: remove it") from None
        raise

    found = os.fstat(file.fileno())
    is_plain = stat.S_ISREG(found.st_mode) and found.st_nlink <= 1
    content = file.read(100) if is_plain else None
    if not is_plain or not (content == "" or content.isdigit()):
        file.close()
        raise UserError(f"{path} is no lock of a run: remove it")

    file.seek(0)
    return file


def is_at(path, file):
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


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
