"""Settings and fixtures of all tests of data/."""

import gc
import os
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data import texts
from data.tests.helpers import WORDS, Beside, sha256, tiny_preset

# The tensors here are tiny: two threads would only wait for one another.
torch.set_num_threads(1)

# torch.manual_seed notes the stack, for three sorts of device that are not in use. No
# test reads it, and pytest's stack is so deep that this takes a millisecond.
traceback.format_stack = lambda *arguments: []


def pytest_collection_modifyitems(items):
    """The files that wait for what runs beside the tests come last."""
    waiting = {function.module for function in Beside.functions}
    items.sort(key=lambda item: item.module.__name__ in waiting)


def pytest_collection_finish(session):
    """Starts what runs beside the tests that have been chosen."""
    if session.config.option.collectonly:
        return

    pool = ThreadPoolExecutor(1)
    chosen = {item.module.__name__ for item in session.items}
    for function in Beside.functions:
        if function.module in chosen:
            function.start(pool)

    gc.freeze()  # what has been imported is not searched for garbage again and again


HERE_ALONE = (None, "", b"", "localhost", "127.0.0.1", "::1")


@pytest.fixture(autouse=True)
def network_guard(monkeypatch):
    """Fails every test that looks up or connects to another machine. What pytest.fail
    raises is no Exception: code that expects a missing network cannot swallow it."""
    look_up = socket.getaddrinfo
    connect = socket.socket.connect

    def guarded_look_up(host, *rest, **options):
        if host not in HERE_ALONE:
            pytest.fail(f"a test looks up the address of {host}")
        return look_up(host, *rest, **options)

    def guarded_connect(self, address):
        is_path = not isinstance(address, tuple)  # of a Unix socket
        if not is_path and address[0] not in HERE_ALONE:
            pytest.fail(f"a test connects to {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    monkeypatch.setattr(socket.socket, "connect", guarded_connect)


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does on a machine without a network."""

    def refuse(url, *rest, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """The Penn Treebank's mirrors as local folders: one/, which is empty, and two/.
    What is downloaded is kept in data/. Returns the folder of all three."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()

    checksums = {}
    for part in texts.PARTS:
        content = f"the {part} text\n".encode() * 40
        (tmp_path / "two" / f"ptb.{part}.txt").write_bytes(content)
        checksums[part] = sha256(content)

    urls = [f"{(tmp_path / name).as_uri()}/" for name in ("one", "two")]
    monkeypatch.setattr(texts, "PTB_MIRRORS", urls)
    monkeypatch.setattr(texts, "PTB_SHA256", checksums)
    monkeypatch.setattr(texts, "DATA", tmp_path / "data")
    return tmp_path


@pytest.fixture
def small_vocabulary():
    """The tokenizer bpe2048."""
    return texts.load_tokenizer("bpe2048")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The presets `tiny` and `tiny-6` made minute. Returns the flags that name a text
    to train on, the folder tmp_path / "out" and the CPU."""
    import train_small

    for name in ("tiny", "tiny-6"):
        monkeypatch.setitem(train_small.PRESETS, name, tiny_preset())
    path = tmp_path / "text.txt"
    path.write_bytes((WORDS * 40).encode())
    return ["--data", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
