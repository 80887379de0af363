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

LIST = ".exported.json"


def check_target(path):
    """Raises UserError if something stands at `path` that no export wrote."""
    folder = Path(path)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is no folder: name a new one")

    sums = listed(folder)
    for file in folder.rglob("*"):
        if file.is_dir() and not file.is_symlink():
            continue

        name = file.relative_to(folder).as_posix()
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
    and if it cannot be written."""
    check_target(path)
    target = Path(os.path.realpath(path))

    # Where the target is new, its first missing folder is made at once, by one rename.
    first = target
    while not first.parent.exists():
        first = first.parent
    is_new = not target.exists()
    beside = first.parent if is_new else target

    try:
        work = Path(tempfile.mkdtemp(prefix=".export-", dir=beside))
        new, old = work / "new", work / "old"
        try:
            folder = new / target.relative_to(first) if is_new else new
            folder.mkdir(parents=True)
            old.mkdir()
            yield folder

            write_list(folder)
            if is_new:
                os.rename(new, first)
            else:
                exchange(target, new, old)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            # What is in `old` is deleted after a success, and never else.
            shutil.rmtree(new, ignore_errors=True)
            remove_if_empty(old)
            remove_if_empty(work)
    except Exception as error:
        if not is_of_disk(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"folder {path} cannot be written: {reason}") from None


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


def remove_if_empty(folder):
    with suppress(OSError):
        folder.rmdir()
