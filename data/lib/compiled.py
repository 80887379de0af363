"""A C file as a library: compiled for this processor, and kept between processes.

It is kept in the user's cache folder under a name that follows from the C, the command,
the compiler's version and the processor. So a change of any of them compiles it anew.
Where that folder cannot be written, each process compiles for itself.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def load(source):
    """The C file `source` as a library, made by the command in CC, or by cc. Raises
    OSError, ValueError or subprocess.SubprocessError if that fails."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    is_arm = platform.machine() in ("arm64", "aarch64")
    processor = "-mcpu=native" if is_arm else "-march=native"
    command = [*compiler, "-O3", processor, "-fPIC", "-shared"]
    command.append("-fno-tree-ter")  # GCC would store sums that fit into registers

    try:
        return load_or_compile(source, [*command, "-fopenmp"])
    except (OSError, subprocess.SubprocessError):
        # A compiler without OpenMP, as macOS has it: one thread does the work.
        return load_or_compile(source, [*command, "-fopenmp-simd"])


def load_or_compile(source, command):
    """The library that this command makes of the file, out of the cache if it is there
    and nobody but the user can have put it there."""
    kept = cache_folder() / f"{source.stem}-{fingerprint(source, command)}.so"
    with contextlib.suppress(OSError):
        if is_private(kept.parent) and is_private(kept):
            return ctypes.CDLL(str(kept))

    # Once it is loaded, the file may go.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kept.name
        command = [*command, str(source), "-lm", "-o", str(path)]
        subprocess.run(command, capture_output=True, check=True)
        library = ctypes.CDLL(str(path))
        with contextlib.suppress(OSError):
            keep(path, kept)
    return library


def fingerprint(source, command):
    """A name for what the command makes of the file here."""
    # The macros that a compiler defines tell its version and the processor's abilities.
    question = [*command, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(question, capture_output=True, check=True).stdout

    parts = (source.read_bytes(), repr(command).encode(), macros)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def cache_folder():
    """Where a program of the user's keeps what it can make again: on Windows, on macOS
    and elsewhere. No absolute path if there is no such place."""
    if os.name == "nt":
        parent = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        parent = "~/Library/Caches"
    else:
        parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(parent)) / "tsld"


def is_private(path):
    """Whether a file or folder is the user's, and nobody else may write to it."""
    if os.name == "nt":  # the folder in LOCALAPPDATA is
        return path.is_absolute() and path.exists()

    status = path.stat()
    is_own = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return path.is_absolute() and is_own


def keep(path, kept):
    """Copies a library into the cache, whole or not at all."""
    if not kept.is_absolute():
        return
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(kept.parent):
        return

    # Under another name first.
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        whole = Path(shutil.copyfile(path, Path(folder) / path.name))
        whole.chmod(0o600)
        whole.replace(kept)
