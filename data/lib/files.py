"""Files that are there as a whole or not at all, and that notice any change.

The SHA-256 of what torch.save wrote stands behind it. torch.load takes no notice of
these 32 bytes, so tsld.load_model opens what save_packed wrote as well.
"""

import errno
import hashlib
import json
import os
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import tsld
from data.lib.errors import UserError, is_out_of_memory

DIGEST_BYTES = 32


def write_checked(path, content):
    """Writes what torch.save takes, and its checksum. Raises OSError, which names the
    file, if that fails; what was there before is then still there."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        append_checksum(temporary)


def save_packed(path, model):
    """tsld.save_model with a checksum, and with what `made_with` says. Raises
    ValueError as it does, and OSError as write_checked does."""
    with replacing(path) as temporary:
        try:
            tsld.save_model(temporary, model)
            if made_with(model):
                content = torch.load(temporary, weights_only=True)
                torch.save(content | made_with(model), temporary)
        except RuntimeError as error:
            # torch opens the file itself here, and does not pass on what failed.
            if is_out_of_memory(error):
                raise
            reason = "the file cannot be written: is the disk full?"
            raise OSError(errno.EIO, reason) from None

        append_checksum(temporary)


def made_with(model):
    """What a file of a student says about it beside its model: the fingerprint of the
    tokenizer that its ids are of, where that came with the model."""
    found = getattr(model, "tokenizer_fingerprint", None)
    return {} if found is None else {"tokenizer": found}


def append_checksum(path):
    """Adds the SHA-256 of the file's content at its end, and waits for the disk."""
    with open(path, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").digest()

        file.seek(0, os.SEEK_END)
        file.write(digest)

        file.flush()
        os.fsync(file.fileno())


def write_text(path, text):
    """Writes a text file. Raises OSError as write_checked does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path):
    """Yields a temporary name, whose file takes the place of that at `path` at the end.
    If something fails, all that was written goes and the other file stays.

    The name is in a new folder beside `path`. So two processes that write one file do
    not meet, a link is not followed, and what a writer leaves goes with the folder."""
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f"{path.name}.", suffix=".tmp", dir=path.parent
        ) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # After a failed write torch.save fails once more as it closes its archive. It
        # raises the RuntimeError of that; the OSError of the write is its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise

        cause.filename = str(path)  # and not the temporary one
        cause.filename2 = None
        raise cause from None


def read_checked(path):
    """What write_checked wrote, on the CPU. Raises CheckpointError if the file is
    truncated, altered, or foreign. Code in it is not run."""
    verify_checksum(path)
    return load_tensors(path)


def load_tensors(path):
    """What torch.save wrote, on the CPU. Raises CheckpointError if the file is damaged,
    is compressed or claims to hold more than it does, or could run code, which is not
    run."""
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file):
                entries = zipfile.ZipFile(file).infolist()
                if any(entry.compress_type for entry in entries):
                    raise ValueError("it is compressed")
                if sum(e.file_size for e in entries) > os.path.getsize(path):
                    raise ValueError("its content is larger than the file")

            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # of any type: foreign content can make torch raise them all
            message = f"{path} is truncated, foreign, or holds more than plain values"
            raise tsld.CheckpointError(message) from None


def load_packed(path, into=None):
    """tsld.load_model of what save_packed wrote. Raises CheckpointError as it does, and
    if the file is truncated or altered."""
    verify_checksum(path)
    return tsld.load_model(path, into)


def verify_checksum(path):
    """Raises CheckpointError if the file does not end with the SHA-256 of the rest."""
    if os.path.getsize(path) > DIGEST_BYTES:
        content = np.memmap(path, mode="r")
        digest = hashlib.sha256(content[:-DIGEST_BYTES]).digest()
        if digest == content[-DIGEST_BYTES:].tobytes():
            return

    message = f"{path} is truncated, altered, or not a file of this program"
    raise tsld.CheckpointError(message)


@contextmanager
def refusing(path, what=""):
    """Makes a CheckpointError of any error inside: foreign content makes torch trip in
    many ways. It reads: path, what, the error's type and words."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{what} {type(error).__name__} {error}".split())
        raise tsld.CheckpointError(f"{path} {reason:.300}") from None


def read_json(path, missing):
    """What a JSON file holds; `missing` where there is none. Raises UserError if it is
    damaged, or no file."""
    if path.exists() and not path.is_file():  # a pipe may never end
        raise UserError(f"{path} is no file: move it away")

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except ValueError as error:
        message = f"{path} is damaged ({error}): delete it, or mend it"
        raise UserError(message) from None


def fingerprint(tensors):
    """16 hexadecimal digits of the SHA-256 of the tensors' bytes, one after another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().reshape(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
