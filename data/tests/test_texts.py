"""Tests of data/texts.py: the texts, their download, and the vocabularies."""

import os
import socket
from pydoc_data.topics import topics
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch

from data import texts
from data.lib.errors import UserError
from data.tests.helpers import WORDS, sha256

# --------------------------------------------------------------------------------------
# Texts


def damage_ptb(folder):
    (folder / "data" / "ptb").mkdir(parents=True)
    (folder / "data" / "ptb" / "ptb.train.txt").write_text("altered")


def test_ptb_comes_from_the_first_mirror_that_has_it_and_is_kept(mirrors, monkeypatch):
    (mirrors / "one" / "ptb.test.txt").write_bytes(b"the test text\n" * 40)
    (mirrors / "two" / "ptb.test.txt").unlink()

    corpus = texts.load_corpus("ptb")
    assert corpus.name == "ptb"
    assert corpus.description.startswith("Penn Treebank, from ")
    assert corpus.description.endswith(", as asked for")
    assert corpus.parts == {
        part: f"the {part} text\n" * 40 for part in ("train", "valid", "test")
    }

    kept = sorted(os.listdir(mirrors / "data" / "ptb"))
    assert kept == ["ptb.test.txt", "ptb.train.txt", "ptb.valid.txt"]

    monkeypatch.setattr(texts, "PTB_MIRRORS", ["file:///nowhere/"])
    assert texts.load_corpus("ptb") == corpus


def test_the_default_is_ptb_where_it_can_be_had(mirrors):
    name, description, parts = texts.load_corpus(None)
    assert name == "ptb"
    assert description.endswith(", the default where it can be had")
    assert parts["train"].startswith("the train text")


@pytest.mark.parametrize(
    "damage, cause",
    [(None, "no route to host"), (damage_ptb, "does not match its SHA-256")],
    ids=["no network", "damaged"],
)
def test_ptb_that_cannot_be_had_is_replaced_by_pydoc_or_refused_if_asked_for(
    damage, cause, mirrors, no_network
):
    if damage is not None:
        damage(mirrors)

    corpus = texts.load_corpus(None)
    assert corpus.name == "pydoc"
    assert "instead of the Penn Treebank: " in corpus.description
    assert cause in corpus.description
    assert corpus.parts == texts.load_corpus("pydoc").parts

    remedy = "it takes ptb.train.txt, ptb.valid.txt, ptb.test.txt there; --data pydoc "
    with pytest.raises(UserError, match=f"ptb.train.txt .*{cause}.*{remedy}"):
        texts.load_corpus("ptb")


def test_pydoc_is_the_language_reference_of_this_python():
    name, description, parts = texts.load_corpus("pydoc")

    assert name == "pydoc"
    assert description.startswith("pydoc: the language reference inside Python 3.")
    assert description.endswith(", as asked for")

    size = sum(len(text.encode()) + 2 for text in topics.values()) - 2
    sizes = [len(parts[part].encode()) for part in ("train", "valid", "test")]
    assert sum(sizes) == size
    np.testing.assert_allclose(np.divide(sizes, size), [0.9, 0.05, 0.05], atol=1e-4)


def test_pydocs_topics_stand_in_alphabetical_order(monkeypatch):
    of_two = {"break": "to leave a loop", "assert": "to insist"}
    monkeypatch.setattr("pydoc_data.topics.topics", of_two)

    parts = texts.load_pydoc()
    assert "".join(parts.values()) == "to insist\n\nto leave a loop"


@pytest.mark.parametrize("text", ["x" * 200, "ä€😀" * 70, "é" * 3, "a", ""])
def test_a_text_is_cut_90_5_5_by_bytes_and_never_inside_a_character(text):
    parts = texts.split_text(text.encode())

    assert list(parts) == ["train", "valid", "test"]
    assert "".join(parts.values()) == text

    train = len(parts["train"].encode())
    valid = len(parts["valid"].encode())
    size = len(text.encode())

    assert 0 <= size * 90 // 100 - train < 4
    assert 0 <= size * 95 // 100 - (train + valid) < 4


def test_bytes_that_are_no_text_are_not_cut():
    with pytest.raises(UnicodeDecodeError):
        texts.split_text(b"\x80" * 40)


def test_a_users_text_is_a_file_that_is_cut_or_a_folder_of_three(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(("é" * 50).encode() + b"\r\n")
    for choice in (path, str(path)):
        corpus = texts.load_corpus(choice)
        assert corpus.name == str(path)
        assert corpus.description == f"{path}, as asked for"
        assert corpus.parts == texts.split_text(path.read_bytes())

    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_bytes(f"{part} é\r\n".encode())

    corpus = texts.load_corpus(str(tmp_path))
    assert corpus.name == str(tmp_path)
    assert corpus.parts == {
        "train": "train é\r\n",
        "valid": "valid é\r\n",
        "test": "test é\r\n",
    }


def test_a_text_that_is_missing_empty_or_not_utf8_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^--data .*nowhere.txt: No such file"):
        texts.load_path(tmp_path / "nowhere.txt")

    path = tmp_path / "bad.txt"
    path.write_bytes(b"")

    with pytest.raises(UserError, match="bad.txt: the train part is empty"):
        texts.load_path(path)

    path.write_bytes(b"x" * 96 + b"caf\xe9")
    with pytest.raises(UserError, match=r"bad.txt is not UTF-8 text \(.* at byte 99\)"):
        texts.load_path(path)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]
)
def test_a_text_in_wide_characters_is_refused_with_its_mark_or_without(
    encoding, tmp_path
):
    (tmp_path / "wide.txt").write_bytes((WORDS * 40).encode(encoding))
    message = r"wide.txt is not UTF-8 text \(.*\): convert it to UTF-8"
    with pytest.raises(UserError, match=message):
        texts.load_path(tmp_path / "wide.txt")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes((WORDS * 40).encode("utf-8-sig"))
    assert "".join(texts.load_path(path).values()) == WORDS * 40

    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_bytes(f"\ufeff{part} \ufeff".encode())
    assert texts.load_path(tmp_path)["valid"] == "valid \ufeff"  # but at its beginning


def pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_what_may_never_end_is_refused_in_place_of_a_text(tmp_path):
    with pytest.raises(UserError, match="null is no file and no folder"):
        texts.load_path(texts.Path(os.devnull))

    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text(WORDS)
    for path in (tmp_path, tmp_path / "test.txt"):
        pipe(tmp_path / "test.txt")
        with pytest.raises(UserError, match="test.txt is no file and no folder"):
            texts.load_path(path)

    with pytest.raises(UserError, match="test.txt is no file: delete it"):
        texts.fetch([], tmp_path / "test.txt", sha256(b""))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux has it")
def test_a_text_whose_reading_fails_is_named(tmp_path):
    """Python names a file that cannot be opened, and not one that cannot be read."""
    for part in texts.PARTS:
        (tmp_path / f"{part}.txt").symlink_to("/proc/self/mem")
    for path, named in (("/proc/self/mem",) * 2, (tmp_path, tmp_path / "train.txt")):
        with pytest.raises(UserError, match=f"^--data {named}: Input/output error$"):
            texts.load_path(texts.Path(path))


def test_a_folder_without_its_three_parts_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text(WORDS)
    message = "has no valid.txt: a folder needs train.txt, valid.txt and test.txt"

    with pytest.raises(UserError, match=message):
        texts.load_path(tmp_path)

    (tmp_path / "valid.txt").write_text(WORDS)
    (tmp_path / "test.txt").write_text("")

    with pytest.raises(UserError, match="the test part is empty"):
        texts.load_path(tmp_path)

    (tmp_path / "test.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="test.txt is not UTF-8 .* at byte 0"):
        texts.load_path(tmp_path)


# --------------------------------------------------------------------------------------
# Downloads


def test_a_download_is_made_once_and_its_checksum_looked_at_every_time(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    path = tmp_path / "kept" / "gpt2.bin"
    urls = ["file:///nowhere", source.as_uri()]

    assert texts.fetch(urls, path, sha256(b"weights")) == path
    assert path.read_bytes() == b"weights"

    source.unlink()
    assert texts.fetch(urls, path, sha256(b"weights")) == path

    path.write_bytes(b"Weights")
    message = "gpt2.bin does not match its SHA-256: delete it"

    with pytest.raises(UserError, match=message):
        texts.fetch(urls, path, sha256(b"weights"))

    assert texts.fetch(urls, path, None).read_bytes() == b"Weights"


def test_a_download_with_another_checksum_leaves_nothing(mirrors):
    (mirrors / "two" / "ptb.valid.txt").write_bytes(b"something else")
    with pytest.raises(UserError, match="ptb.valid.txt cannot be downloaded.*hash"):
        texts.load_corpus("ptb")
    assert os.listdir(mirrors / "data" / "ptb") == ["ptb.train.txt"]


def test_a_failed_download_names_each_host_and_each_cause_once(tmp_path, no_network):
    urls = ["https://one.org/a", "https://two.org/a", "https://one.org/b"]
    causes = r"\(one.org: no route to host; two.org: no route to host\)"
    remedy = f"go online once, or copy it into {tmp_path}"
    message = f"^a cannot be downloaded {causes}: {remedy}$"

    with pytest.raises(UserError, match=message):
        texts.fetch(urls, tmp_path / "a", None)

    # A file that has another name there.
    remedy = f"or copy a as b into {tmp_path}$"
    with pytest.raises(UserError, match=remedy):
        texts.fetch(urls, tmp_path / "b", None)


def test_a_host_has_ten_seconds_to_answer_and_others_as_long_as_before(
    tmp_path, monkeypatch
):
    timeouts = []

    def give_no_answer(request):
        timeouts.append(socket.getdefaulttimeout())
        raise OSError

    monkeypatch.setattr(torch.hub, "urlopen", give_no_answer)
    with texts.socket_timeout(77):
        with pytest.raises(UserError):
            texts.fetch(["https://one.org/a"], tmp_path / "a", None)
        assert socket.getdefaulttimeout() == 77

    assert timeouts == [10]
    assert socket.getdefaulttimeout() is None


def test_no_test_reaches_another_machine():
    with pytest.raises(pytest.fail.Exception, match="looks up the address of"):
        socket.create_connection(("example.org", 80))
    with pytest.raises(pytest.fail.Exception, match="connects to 192.0.2.1"):
        socket.socket().connect(("192.0.2.1", 80))


# --------------------------------------------------------------------------------------
# Vocabularies

STRINGS = [
    "",
    " ",
    "the the  the\n\n\tthe",
    "N <unk> $ mr. 'quoted' isn't 3.14 snake_case\r\n",
    "Grüße, 世界! 🙂👩‍👩‍👧 \u0000\u00a0\u2028 ١٢٣",
    "".join(map(chr, range(1, 1000))),
    "a" * 3000,
]


def random_strings(count, length):
    """Strings of any of the first 69,632 characters of Unicode, but no surrogates."""
    rng = np.random.default_rng(0)
    points = [point for point in range(0x11000) if not 0xD800 <= point < 0xE000]
    return ["".join(map(chr, rng.choice(points, size=length))) for _ in range(count)]


def test_every_text_survives_the_small_vocabulary(small_vocabulary):
    assert small_vocabulary.name == "bpe2048"
    assert small_vocabulary.n_vocab == 2048
    for text in STRINGS + random_strings(50, 50):
        ids = small_vocabulary.encode_ordinary(text)
        assert small_vocabulary.decode(ids) == text


def test_the_small_vocabularys_first_tokens_are_the_bytes_and_0_ends_a_text(
    small_vocabulary,
):
    for byte in range(256):
        assert small_vocabulary.decode_single_token_bytes(byte) == bytes([byte])
    assert small_vocabulary.end_of_text == 0


def test_the_small_vocabulary_shortens_english_by_more_than_half(small_vocabulary):
    text = "The company said it expects to report a loss for the third quarter."
    assert len(small_vocabulary.encode_ordinary(text)) < len(text) / 2


def minute_encoding(name):
    """As tiktoken gives them: 256 bytes, a merge, and a token that ends a text."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    return tiktoken.Encoding(
        name,
        pat_str=texts.PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 257},
    )


def test_gpt2s_vocabulary_is_kept_in_data_and_has_its_own_end_of_text(monkeypatch):
    monkeypatch.setattr(texts.tiktoken, "get_encoding", minute_encoding)
    with mock.patch.dict(os.environ):
        os.environ.pop("TIKTOKEN_CACHE_DIR", None)
        tokenizer = texts.load_tokenizer("gpt2")
        assert (tokenizer.name, tokenizer.end_of_text) == ("gpt2", 257)
        assert tokenizer.encode_ordinary("abba") == [256, 98, 97]
        assert os.environ["TIKTOKEN_CACHE_DIR"] == str(texts.DATA / "tiktoken")

        os.environ["TIKTOKEN_CACHE_DIR"] = "elsewhere"
        texts.load_tokenizer("gpt2")
        assert os.environ["TIKTOKEN_CACHE_DIR"] == "elsewhere"


def test_gpt2s_vocabulary_that_cannot_be_downloaded_is_refused(monkeypatch):
    def unreachable(name):
        raise ConnectionError(f"no route to host for {name} (Caused by Error(<0x7f>))")

    monkeypatch.setattr(texts.tiktoken, "get_encoding", unreachable)
    message = (
        r"^GPT-2's vocabulary cannot be downloaded \(no route to host for gpt2\): "
        r"go online once, copy .*tiktoken.* from a machine that was online, or use "
        r"--model tiny$"
    )

    with pytest.raises(UserError, match=message):
        texts.load_tokenizer("gpt2")
