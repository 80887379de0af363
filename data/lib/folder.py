"""The folder that a run writes to."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from data.lib.errors import UserError

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
    """Keeps other runs, which would write the same files, out of the folder. Raises
    UserError if another process holds it. Windows has no such locks: none is held."""
    if fcntl is None:
        yield
        return

    path = Path(folder) / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            message = f"--out {folder} is in use by process {file.read()}: name another"
            raise UserError(message) from None

        # The lock ends with this process, however it ends. Its number is for others.
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()

        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_space(path, model, trainings):
    """Raises UserError if the disk has no room for the checkpoints of so many trainings
    of the model."""
    # A checkpoint holds the weights and AdamW's two averages, in float32. Each training
    # keeps two, and there is a third one while it is written.
    checkpoint = 3 * sum(4 * p.numel() for p in model.parameters())
    needed = checkpoint * (2 * trainings + 1)
    free = shutil.disk_usage(path).free

    if free < needed:
        sizes = (
            f"{needed / 1e9:.1f} GB for checkpoints and has {free / 1e9:.1f} GB free"
        )
        raise UserError(f"--out {path} needs {sizes}: name a folder on another disk")
