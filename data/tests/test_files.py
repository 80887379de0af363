"""data/lib/files.py: files that are whole or not there, and that notice any change; and
data/lib/errors.py."""

import copy
import errno
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import tsld
from data.lib import files
from data.lib.errors import UserError, is_out_of_memory
from data.tests.helpers import Payload, micro_gpt, micro_ids, randn

try:
    import resource  # Windows has none
except ImportError:
    resource = None


def packed_model(seed=0):
    return tsld.pack_model(tsld.quantize_model(micro_gpt(seed)))


def save_large_packed(path, seed):
    """A packed model of 400 kB."""
    model = tsld.quantize_model(micro_gpt(seed, n_embd=128))
    files.save_packed(path, tsld.pack_model(model))


# Each writes a file of more than 100 kB that depends on the number.
WRITERS = {
    "write_checked": lambda path, n: files.write_checked(path, torch.full((10**5,), n)),
    "save_packed": save_large_packed,
    "write_text": lambda path, n: files.write_text(path, str(n) * 10**6),
}

# --------------------------------------------------------------------------------------
# Checksums


def test_what_was_written_is_read_and_no_other_file_is_left(tmp_path):
    path = tmp_path / "file.pt"
    files.write_checked(path, {"weights": randn(3, 4), "name": "x"})
    content = files.read_checked(path)

    assert torch.equal(content["weights"], randn(3, 4))
    assert content["name"] == "x"
    assert os.listdir(tmp_path) == ["file.pt"]


def test_the_last_32_bytes_are_the_sha256_of_the_others(tmp_path):
    files.write_checked(tmp_path / "file.pt", 5)
    content = (tmp_path / "file.pt").read_bytes()
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()


def write_small_file(path):
    files.write_checked(path, {"weights": torch.arange(5.0), "name": "x"})


def write_packed_file(path):
    files.save_packed(path, packed_model())


@pytest.mark.parametrize(
    "write, read",
    [
        (write_small_file, files.read_checked),
        (write_packed_file, files.load_packed),
    ],
)
def test_every_changed_or_missing_byte_is_noticed(write, read, tmp_path):
    path = tmp_path / "file"
    write(path)
    read(path)
    content = path.read_bytes()

    every_so_often = range(0, len(content), len(content) // 60)
    for position in (*every_so_often, len(content) - 1):
        altered = bytearray(content)
        altered[position] ^= 4
        path.write_bytes(altered)
        with pytest.raises(tsld.CheckpointError, match="file is .*altered"):
            read(path)

    for length in (
        0,
        1,
        31,
        32,
        len(content) // 2,
        len(content) - 32,
        len(content) - 1,
    ):
        path.write_bytes(content[:length])
        with pytest.raises(tsld.CheckpointError, match="file is truncated"):
            read(path)

    path.write_bytes(b"GIF89a" + content[6:])
    with pytest.raises(tsld.CheckpointError, match="not a file of this program"):
        read(path)


def write_with_checksum(path, content):
    path.write_bytes(content + hashlib.sha256(content).digest())


def test_foreign_content_under_a_right_checksum_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"weights": randn(300)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    compressed = tmp_path / "compressed"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)

    # Two entries that are the same bytes.
    overlapping = tmp_path / "overlapping"
    with zipfile.ZipFile(overlapping, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        entry = copy.copy(max(archive.filelist, key=lambda e: e.file_size))
        entry.filename += "0"
        archive.filelist += 9 * [entry]

    for content in (
        b"hello",
        b"PK" * 99,
        path.read_bytes()[:-200],
        compressed.read_bytes(),
        overlapping.read_bytes(),
    ):
        write_with_checksum(path, content)
        for read in (files.read_checked, files.load_tensors):
            with pytest.raises(tsld.CheckpointError, match="file.pt is truncated"):
                read(path)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_checked("file.pt", {"identity": Payload()})
    for read in (files.read_checked, files.load_tensors):
        with pytest.raises(tsld.CheckpointError, match="file.pt is .*plain values"):
            read("file.pt")
    assert not Path("executed").exists()


def test_a_file_that_is_not_there_is_no_damaged_one(tmp_path):
    for read in (files.read_checked, files.load_packed, files.load_tensors):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "file")


# --------------------------------------------------------------------------------------
# Packed models


def test_a_packed_model_is_read_by_load_packed_and_by_tsld_alike(tmp_path):
    model = packed_model()
    files.save_packed(tmp_path / "checked", model)
    tsld.save_model(tmp_path / "plain", model)
    expected = tsld.load_model(tmp_path / "plain")(micro_ids())

    for load in (files.load_packed, tsld.load_model):
        assert torch.equal(load(tmp_path / "checked")(micro_ids()), expected)
    with pytest.raises(tsld.CheckpointError, match="not a file of this program"):
        files.load_packed(tmp_path / "plain")


def test_a_packed_file_fills_the_model_that_is_named(tmp_path):
    files.save_packed(tmp_path / "file", packed_model(0))
    into = tsld.quantize_model(micro_gpt(1))
    assert files.load_packed(tmp_path / "file", into) is into
    expected = packed_model(0).h[0].mlp.c_fc.packed
    assert torch.equal(into.h[0].mlp.c_fc.packed, expected)


def test_what_tsld_refuses_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_checked(path, {"step": 3})
    with pytest.raises(tsld.CheckpointError, match="file"):
        files.load_packed(path)
    with pytest.raises(ValueError, match="pack_model"):
        files.save_packed(path, micro_gpt())
    assert files.read_checked(path) == {"step": 3}
    assert os.listdir(tmp_path) == ["file"]


# --------------------------------------------------------------------------------------
# Writes that fail


@pytest.fixture
def small_files_only():
    """No file can grow beyond 50 kB, as on a disk that is full then."""
    if resource is None:
        pytest.skip("this system does not limit files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_on_a_full_disk_the_error_names_the_file_and_the_old_one_stays(
    write, tmp_path, request
):
    path = tmp_path / "file"
    write(path, 1)
    before = path.read_bytes()

    request.getfixturevalue("small_files_only")
    with pytest.raises(OSError) as error:
        write(path, 2)

    assert error.value.filename == str(path)
    assert error.value.errno in (errno.EFBIG, errno.EIO)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_an_interrupted_write_leaves_the_old_file(write, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, 1)
    before = path.read_bytes()
    replace = os.replace

    def interrupted(source, target):
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, 2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_two_writers_of_one_file_do_not_meet(write, tmp_path, monkeypatch):
    """A second one writes the file from the first to the last byte as the first one is
    about to put its own there."""
    path = tmp_path / "file"
    replace = os.replace
    once = []

    def meet(source, target):
        if target == path and not once:
            once.append(True)
            write(path, 2)
        replace(source, target)

    write(tmp_path / "expected", 1)
    monkeypatch.setattr(os, "replace", meet)
    write(path, 1)
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected", "file"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_is_replaced_and_not_followed(write, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("file", "file.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write(tmp_path / "file", 1)

    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_cannot_be_written_there_is_named(write, tmp_path):
    (tmp_path / "file").mkdir()
    for path in (tmp_path / "file", tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError) as error:
            write(path, 1)
        assert error.value.filename == str(path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["write_checked", "save_packed"])
def test_a_file_has_its_name_only_when_the_disk_has_it(name, tmp_path, monkeypatch):
    path = tmp_path / "file"

    def fails(descriptor):
        assert os.fstat(descriptor).st_size > 100_000
        assert not path.exists()
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="the disk is broken"):
        WRITERS[name](path, 1)
    assert os.listdir(tmp_path) == []


def test_an_error_that_is_not_the_disks_is_left_as_it_is(tmp_path, monkeypatch):
    def needs_memory(path, model):
        torch.empty(10**15)

    monkeypatch.setattr(tsld, "save_model", needs_memory)
    with pytest.raises(RuntimeError) as error:
        files.save_packed(tmp_path / "file", None)
    assert is_out_of_memory(error.value)

    temporary = files.replacing(tmp_path / "file")
    with pytest.raises(RuntimeError, match="no such shape"), temporary:
        raise RuntimeError("no such shape")


# --------------------------------------------------------------------------------------
# Text, JSON, names and errors


def test_text_and_json_are_written_and_read(tmp_path):
    path = tmp_path / "rows.json"
    assert files.read_json(path, missing=[]) == []
    files.write_text(path, json.dumps({"τ": [1, 2]}, ensure_ascii=False))
    assert files.read_json(path, missing=[]) == {"τ": [1, 2]}


@pytest.mark.parametrize("content", [b"", b"[{", b"\xff"])
def test_damaged_json_is_refused_by_name(content, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.json is damaged .*: delete it"):
        files.read_json(path, missing=[])


def test_a_folder_or_a_pipe_in_place_of_json_is_refused_by_name(tmp_path):
    for path in (tmp_path, a_pipe(tmp_path / "rows.json")):
        with pytest.raises(UserError, match=f"{path} is no file: move it away"):
            files.read_json(path, missing=[])


def a_pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(path)
    return path


def test_a_fingerprint_is_the_sha256_of_all_bytes_in_turn():
    tensors = [randn(3, 4), randn(3, 4).t(), torch.tensor(7), torch.tensor([True])]
    content = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors)
    expected = hashlib.sha256(content).hexdigest()[:16]
    assert files.fingerprint(tensors) == expected
    assert files.fingerprint(tensors[::-1]) != expected

    half = torch.nn.Parameter(randn(5).bfloat16())
    content = half.detach().view(torch.int16).numpy().tobytes()
    assert files.fingerprint([half]) == hashlib.sha256(content).hexdigest()[:16]


def test_whatever_foreign_content_leads_to_is_one_line():
    for error in (
        KeyError("step"),
        RuntimeError("two\n  lines"),
        MemoryError("x" * 999),
    ):
        refusing = files.refusing("file.pt", "is no checkpoint:")
        with pytest.raises(tsld.CheckpointError) as refusal, refusing:
            raise error
        text = str(refusal.value)
        assert text.startswith(f"file.pt is no checkpoint: {type(error).__name__} ")
        assert "\n" not in text
        assert len(text) < 400


def test_too_little_memory_is_told_from_other_errors():
    for allocate in (torch.empty, np.empty, bytearray):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate(10**15)
        assert is_out_of_memory(error.value)

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
    )
    with pytest.raises(RuntimeError) as error:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(error.value)
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
