"""The folder that a run writes to, and the rows that are already there."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from data.texts import UserError

try:
    import fcntl  # Windows has none
except ImportError:
    fcntl = None


def check_folder(path):
    """Finds out before training, not after, that results cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"folder {path} cannot be written: {error.strerror}")


@contextmanager
def hold(folder):
    """Two runs would write the same files: the first one holds the folder until it ends."""
    if fcntl is None:
        yield
        return
    path = Path(folder) / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"--out {folder} is in use by process {file.read()}: name another")
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_space(path, model, trainings):
    """A checkpoint holds the weights and AdamW's two averages; the one before is kept as well."""
    size = 3 * sum(4 * p.numel() for p in model.parameters())
    needed, free = size * (2 * trainings + 1), shutil.disk_usage(path).free
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB for checkpoints and has {free / 1e9:.1f} GB free"
        raise UserError(f"--out {path} needs {sizes}: name a folder on another disk")


@contextmanager
def all_or_nothing(path):
    """A new folder, whose files come into that at `path` when all of them are there."""
    made, folder = not Path(path).exists(), check_folder(path)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as new:
            yield Path(new)
            for file in Path(new).iterdir():
                os.replace(file, folder / file.name)
    except Exception as error:
        if made:
            shutil.rmtree(folder)
        if type(error).__module__.startswith("safetensors"):  # it writes transformers' models
            raise UserError(f"folder {folder} cannot be written: {error}")
        raise


def fingerprint(tensors):
    """16 hexadecimal digits of the SHA-256 of the tensors' bytes, in turn."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def read_json(path, missing):
    """What a JSON file holds; `missing` where there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else missing
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, or mend it")
