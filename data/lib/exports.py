"""The folder of an export: new, empty, or of an earlier export; whole, or as it was.

A list of the files that were written, with their SHA-256, stands among them. What is
not on it belongs to somebody, and is never replaced.
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from data.lib.errors import UserError
from data.lib.folder import alone_in

LIST = ".exported.json"
WORK = ".export-????????"  # the folder in which an export is made


def check_target(path):
    """Raises UserError if something stands at `path` that no export wrote, or another
    export writes there."""
    if is_folder(path):
        with alone_in(path):
            check_files(Path(path))


def is_folder(path):
    """Whether a folder stands at `path`. Raises UserError if anything else does."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is no folder: name a new one")
    return os.path.isdir(path)


def check_files(folder):
    """Raises UserError if a file in the folder was written by no export."""
    sums = listed(folder)
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        is_made = is_work(folder / Path(name).parts[0])
        if is_made or (file.is_dir() and not file.is_symlink()):
            continue

        is_list = name == LIST and len(sums) > 0
        if not is_list and (name not in sums or sums[name] != sha256(file)):
            remedy = "name a new folder, or move it"
            raise UserError(f"{folder} holds {name}, which no export wrote: {remedy}")


def listed(folder):
    """Name -> SHA-256 of the files that an export wrote into the folder."""
    try:
        return dict(json.loads((folder / LIST).read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # it is missing, or somebody's
        return {}


def write_list(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    sums = {file.relative_to(folder).as_posix(): sha256(file) for file in files}
    (folder / LIST).write_text(json.dumps(sums, indent=1) + "\n", "utf-8")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def export_folder(path):
    """Yields an empty folder, which becomes the one at `path` in the end, with all that
    is in it. If something fails, what was at `path` is there as before.

    Raises UserError, before anything is written, if `path` holds what no export wrote,
    or another export writes to it, and if it cannot be written."""
    fill = replace if is_folder(path) else make
    target = Path(os.path.realpath(path))
    try:
        with fill(target) as folder:
            yield folder
    except Exception as error:
        if not is_of_disk(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"folder {path} cannot be written: {reason}") from None


@contextmanager
def make(target):
    """Does it for a folder that is missing, and maybe those above it too: what is new
    is there at once, by one rename."""
    first = target
    while not first.parent.exists():
        first = first.parent

    with work_folder(first.parent) as (new, _):
        folder = new / target.relative_to(first)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        write_list(folder)
        os.rename(new, first)


@contextmanager
def replace(target):
    """Does it for a folder that is there."""
    with alone_in(target) as is_alone:
        check_files(target)
        for work in target.glob(WORK):
            if is_alone and is_work(work):  # of an export that was killed
                discard(work)

        with work_folder(target) as (new, old):
            yield new
            write_list(new)
            exchange(target, new, old)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def work_folder(parent):
    """Yields two empty folders: for the new files, and for the old ones."""
    work = Path(tempfile.mkdtemp(prefix=WORK.rstrip("?"), dir=parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        old.mkdir()
        yield new, old
    finally:
        discard(work)


def is_work(path):
    return path.match(WORK) and path.is_dir() and not path.is_symlink()


def discard(work):
    """Removes such a folder, but for old files: they are deleted after a success, and
    never else."""
    shutil.rmtree(work / "new", ignore_errors=True)
    for folder in (work / "old", work):
        with suppress(OSError):  # which is not empty
            folder.rmdir()


def exchange(folder, new, old):
    """Moves the files of an earlier export from the folder to `old`, and those in `new`
    to the folder. If one cannot be moved, all are moved back."""
    outgoing = {Path(name).parts[0] for name in (*listed(folder), LIST)}
    outgoing = {name for name in outgoing if (folder / name).exists()}
    incoming = {file.name for file in new.iterdir()}

    # Without a config.json no program opens a folder. It goes first and comes last, so
    # that old and new files are never taken for one model.
    moves = [(folder / name, old / name) for name in config_last(outgoing)[::-1]]
    moves += [(new / name, folder / name) for name in config_last(incoming)]

    try:
        for source, destination in moves:
            os.rename(source, destination)
    except BaseException as error:
        try:
            move_back(moves)
        except OSError:
            words = f"{error}; what is left of the earlier files is in {old}"
            raise UserError(f"folder {folder} cannot be written: {words}") from None
        raise


def move_back(moves):
    for source, destination in reversed(moves):
        if not source.exists():
            os.rename(destination, source)


def config_last(names):
    return sorted(names, key=lambda name: (name == "config.json", name))


def is_of_disk(error):
    """Whether an error is the disk's: safetensors has one of its own for that."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
