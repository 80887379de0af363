"""Packed files that a stranger might send: whatever they claim, tsld.load_model refuses
them within moments, and runs nothing that is in them."""

import copy
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch

import tsld
from data.tests.helpers import GONE, Payload, altered, micro_gpt


@pytest.fixture
def packed_file(tmp_path):
    """A packed file of a micro GPT."""
    path = tmp_path / "model.packed"
    tsld.save_model(path, tsld.pack_model(tsld.quantize_model(micro_gpt())))
    return path


def assert_refused(path, words=""):
    """It is a CheckpointError of one line, which names the file."""
    with pytest.raises(tsld.CheckpointError) as caught:
        tsld.load_model(path)

    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert words in message


NUMBERS = (None, -1, 0, 20, 10**7, 10**30, 0.5, "2", math.nan, True)
TENSORS = (
    GONE,
    "x",
    torch.zeros(3, 5),
    torch.zeros(48, 3, dtype=torch.int64),
    torch.zeros(3, 48).byte().t(),
    torch.zeros(12).to_sparse(),
    torch.zeros(1).expand(10**9, 12),  # a view that claims 48 gigabytes
)
LAYER = "h.0.mlp.c_fc"


def crafted(tensors):
    """What a sender may put into a packed file: place, value, words of the message.
    tensors: those that belong there."""
    for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
        for value in NUMBERS:
            yield ("config", name), value, ""
    for value in (-0.1, 1.5, "x", None):
        yield ("config", "dropout"), value, ""
    yield ("config", "n_layer"), len(tensors) + 1, "layers"
    yield ("config", "extra"), 1, ""

    for name in ("format", "config", "tensors"):
        for value in (*NUMBERS, GONE, Payload()):
            yield (name,), value, ""
    yield ("format",), "tsld packed 3", "'tsld packed 3'"

    for name in (f"{LAYER}.packed", f"{LAYER}.scale", f"{LAYER}.bias", "wte.weight"):
        for value in TENSORS:
            yield ("tensors", name), value, ""
    for name in ("extra", "wte.packed", "h.9.mlp.c_fc.packed", 3, ""):
        yield ("tensors", name), torch.zeros(3).byte(), ""
    for name, tensor in tensors.items():
        yield ("tensors", name), tensor.double(), ""
        if tensor.is_floating_point():
            yield ("tensors", name), tensor * math.nan, ""

    # The bits 10 stand for no code.
    for j in range(4):
        codes = torch.zeros(48, 3).byte()
        codes[-1, -1] = 0b10 << 2 * j
        yield ("tensors", f"{LAYER}.packed"), codes, LAYER


@pytest.mark.filterwarnings("ignore")  # torch warns of some of these
def test_whatever_a_crafted_file_claims_it_is_refused(packed_file, monkeypatch):
    monkeypatch.chdir(packed_file.parent)
    content = torch.load(packed_file)
    for place, value, words in crafted(content["tensors"]):
        torch.save(altered(content, place, value), packed_file)
        assert_refused(packed_file, words)
    assert not Path("executed").exists()


def test_a_compressed_archive_is_not_unpacked(packed_file, monkeypatch):
    with zipfile.ZipFile(packed_file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    monkeypatch.setattr(torch, "load", lambda *rest, **options: pytest.fail("it is"))
    assert_refused(packed_file)


def test_entries_that_share_their_bytes_are_not_loaded(packed_file, monkeypatch):
    """Each is as large as it says. All together are larger than the file."""
    with zipfile.ZipFile(packed_file, "w") as archive:
        archive.writestr("archive/data/0", bytes(10**4))
        for number in range(1, 100):
            entry = copy.copy(archive.filelist[0])
            entry.filename = f"archive/data/{number}"
            archive.filelist.append(entry)
    assert os.path.getsize(packed_file) < 10**5

    monkeypatch.setattr(torch, "load", lambda *rest, **options: pytest.fail("it is"))
    assert_refused(packed_file, "larger than the file")
