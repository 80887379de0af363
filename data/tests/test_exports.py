"""data/lib/exports.py and what is written there: the folder is whole or as it was, and
other programs read in it what the student is."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import tsld
from data.lib import exports, hf, published
from data.lib import folder as lock
from data.lib.errors import UserError
from data.tests.helpers import WORDS, micro_gpt, micro_ids, save_llama

# --------------------------------------------------------------------------------------
# The folder


def write(folder, **contents):
    """Exports files, their names with _ for a dot."""
    with exports.export_folder(folder) as new:
        for name, content in contents.items():
            (new / name.replace("_", ".")).write_text(content)


def content_of(folder):
    """Name -> content of all files in a folder, but for the list of an export."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {str(file.relative_to(folder)): file.read_text() for file in files}
    return {name: text for name, text in names.items() if exports.LIST not in name}


FAILURES = [
    (OSError(28, "No space left on device"), UserError),
    (type("SafetensorError", (Exception,), {})("No space left on device"), UserError),
    (ValueError("No space left on device"), ValueError),
    (KeyboardInterrupt("No space left on device"), KeyboardInterrupt),
]


@pytest.mark.parametrize("state", ["new", "empty", "earlier"])
@pytest.mark.parametrize("error, raised", FAILURES)
def test_a_folder_that_could_not_be_filled_is_as_it_was(
    state, error, raised, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = Path("new", "folder") if state == "new" else Path()
    if state == "earlier":
        write(folder, config_json="1", weights="2")
    before = content_of(tmp_path)

    words = "No space left on device"
    with pytest.raises(raised, match=words), exports.export_folder(folder) as new:
        assert content_of(tmp_path) == before
        (new / "config.json").write_text("half")
        raise error
    assert content_of(tmp_path) == before
    assert len([*tmp_path.iterdir()]) == (3 if state == "earlier" else 0)


def test_a_new_folder_is_made_with_those_above_it(tmp_path):
    write(tmp_path / "new" / "folder", config_json="1", weights="2")
    files = {"new/folder/config.json": "1", "new/folder/weights": "2"}
    assert content_of(tmp_path) == files

    (tmp_path / "like").mkdir()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_dir()}
    assert len(modes) == 1


def test_an_empty_folder_stays_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat()
    write(".", config_json="1")
    after = tmp_path.stat()
    assert content_of(tmp_path) == {"config.json": "1"}
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "folder"
    write(folder, config_json="1", pytorch_model_bin="2", tokenizer_json="3")
    write(folder, config_json="4", model_safetensors="5")
    assert content_of(tmp_path) == {
        "folder/config.json": "4",
        "folder/model.safetensors": "5",
    }

    (folder / "model.safetensors").unlink()  # one may be missing
    write(folder, config_json="6")
    assert content_of(tmp_path) == {"folder/config.json": "6"}


def add_link(folder):
    (folder / "model.safetensors").symlink_to(folder / "config.json")


FOREIGN = {
    "model.safetensors": lambda folder: (folder / "model.safetensors").write_text("x"),
    "model.safetensors.index.json": lambda folder: (
        folder / "model.safetensors.index.json"
    ).write_text("{}"),
    "notes/mine": lambda folder: (
        (folder / "notes").mkdir(),
        (folder / "notes" / "mine").write_text(""),
    ),
    ".hidden": lambda folder: (folder / ".hidden").write_text(""),
    "a link": lambda folder: (folder / "a link").symlink_to(folder / "config.json"),
    "a link to nothing": lambda folder: (folder / "a link to nothing").symlink_to("x"),
    "a linked folder": lambda folder: (folder / "a linked folder").symlink_to("/"),
    "a pipe": lambda folder: os.mkfifo(folder / "a pipe"),
    "weights": lambda folder: (folder / "weights").write_text("trained further"),
    "": lambda folder: (folder / exports.LIST).write_text("[3"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_export_wrote_is_never_replaced(name, tmp_path):
    folder = tmp_path / "folder"
    write(folder, config_json="1", weights="2")
    FOREIGN[name](folder)
    before = sorted(tmp_path.rglob("*")), (folder / "weights").read_text()

    words = f"folder holds {name}.*, which no export wrote: name a new folder"
    with pytest.raises(UserError, match=words):
        write(folder, config_json="3")
    after = sorted(tmp_path.rglob("*")), (folder / "weights").read_text()
    assert after == before
    assert (folder / "config.json").read_text() == "1"


def test_a_file_or_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is no folder: name a new one"):
            write(tmp_path / name, config_json="1")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        write(tmp_path / "file" / "folder", config_json="1")
    assert content_of(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("failing", range(1, 8))
def test_a_failure_at_any_rename_loses_nothing_of_the_earlier_export(
    failing, lasts, tmp_path, monkeypatch
):
    rename = os.rename
    moves = []

    def failing_rename(source, destination):
        moves.append(source)
        if len(moves) == failing or (lasts and len(moves) > failing):
            raise OSError(28, "No space left on device")
        rename(source, destination)

    folder = tmp_path / "folder"
    write(folder, config_json="1", pytorch_model_bin="2", tokenizer_json="3")
    before = content_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing_rename)
        words = "folder cannot be written: .*No space left on device"
        with pytest.raises(UserError, match=words) as refusal:
            write(folder, config_json="4", model_safetensors="5")

    # Where not even the moves back succeed, the old files stand beside the others.
    if lasts and failing > 1:
        assert set(before.values()) <= set(content_of(folder).values())
        assert str(folder / ".export-") in str(refusal.value)
    else:
        assert content_of(folder) == before
        assert [file.name for file in folder.iterdir()].count(exports.LIST) == 1
        assert len([*folder.iterdir()]) == 4


def test_an_earlier_export_is_replaced_by_as_many_renames_as_there_are_files(
    tmp_path, monkeypatch
):
    rename = os.rename
    moves = []
    write(tmp_path, config_json="1", pytorch_model_bin="2", tokenizer_json="3")
    monkeypatch.setattr(os, "rename", lambda *paths: moves.append(rename(*paths)))
    write(tmp_path, config_json="4", model_safetensors="5")
    assert len(moves) == 7  # so that the test above lets each of them fail


def test_no_moment_shows_a_config_beside_another_exports_weights(tmp_path, monkeypatch):
    rename = os.rename
    seen = []

    def spying_rename(source, destination):
        rename(source, destination)
        seen.append({f.name: f.read_text() for f in folder.iterdir() if f.is_file()})

    folder = tmp_path / "folder"
    write(folder, config_json="1", tokenizer_json="2", weights="3")
    monkeypatch.setattr(os, "rename", spying_rename)
    write(folder, config_json="4", tokenizer_json="5", weights="6")

    assert len(seen) == 8
    for files in seen[:-1]:
        assert "config.json" not in files
    assert [seen[-1][name] for name in ("config.json", "weights")] == ["4", "6"]


@pytest.fixture
def states(tmp_path, monkeypatch):
    """What a folder of an earlier export looks like to somebody else, or after a power
    cut, before the first file of the next one, and after each rename: copies of it."""
    folder = tmp_path / "folder"
    write(folder, config_json="1", pytorch_model_bin="2", tokenizer_json="3")
    copies = []

    def copy():
        copies.append(shutil.copytree(folder, tmp_path / f"copy {len(copies)}"))

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *paths: (rename(*paths), copy()))
        with exports.export_folder(folder) as new:
            copy()
            (new / "config.json").write_text("4")
            copy()
    return copies


def test_an_export_that_was_killed_at_any_moment_does_not_block_the_next(states):
    assert len(states) == 2 + 6
    for folder in states:
        before = content_of(folder)
        write(folder, config_json="5", weights="6")

        # What the killed one was to write is gone. What it had moved away is not.
        moved = {name: text for name, text in before.items() if "/old/" in name}
        files = {"config.json": "5", "weights": "6"}
        assert content_of(folder) == files | moved


@pytest.mark.skipif(lock.fcntl is None, reason="this system does not lock files")
@pytest.mark.parametrize("state", ["empty", "earlier"])
def test_of_two_exports_at_once_the_second_is_refused(state, tmp_path):
    if state == "earlier":
        write(tmp_path, config_json="1", weights="2")
    with exports.export_folder(tmp_path) as new:
        (new / "config.json").write_text("3")
        words = f"^{tmp_path} is in use by another process: name another folder$"
        for ask in (exports.check_target, partial(write, config_json="4")):
            with pytest.raises(UserError, match=words):
                ask(tmp_path)
    assert content_of(tmp_path) == {"config.json": "3"}
    write(tmp_path, config_json="4")


def test_of_two_exports_to_a_new_folder_the_first_that_ends_is_there(tmp_path):
    folder = tmp_path / "new" / "folder"
    words = "folder cannot be written: Directory not empty"
    with pytest.raises(UserError, match=words), exports.export_folder(folder) as new:
        (new / "config.json").write_text("1")
        write(folder, config_json="2", weights="3")
    files = {"new/folder/config.json": "2", "new/folder/weights": "3"}
    assert content_of(tmp_path) == files
    assert [*tmp_path.iterdir()] == [tmp_path / "new"]


# --------------------------------------------------------------------------------------
# A student of ours


def weights_of(folder):
    """Name -> tensor, from whichever file of weights there is."""
    path = folder / "model.safetensors"
    if not path.exists():
        return torch.load(folder / "pytorch_model.bin")
    return pytest.importorskip("safetensors.torch").load_file(path)


def greedy(model, ids, length):
    """The tokens that follow ids, a list."""
    return model.generate(ids, length, temperature=0)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("has_package", [True, False])
def test_weights_are_written_as_safetensors_where_that_is_installed(
    has_package, tmp_path, monkeypatch
):
    if has_package:
        pytest.importorskip("safetensors")
    monkeypatch.setattr(published, "has_safetensors", lambda: has_package)
    model = tsld.pack_model(tsld.quantize_model(micro_gpt()))
    hf.save_gpt2(model, tmp_path)

    names = ["model.safetensors", "pytorch_model.bin"]
    assert [(tmp_path / name).exists() for name in names] == [
        has_package,
        not has_package,
    ]
    torch.testing.assert_close(hf.load_gpt2(tmp_path)(micro_ids()), model(micro_ids()))


def test_weights_that_would_be_read_instead_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "has_safetensors", lambda: False)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json, which would be read instead"):
        hf.save_gpt2(micro_gpt(), tmp_path)
    assert len([*tmp_path.iterdir()]) == 1


def test_safetensors_that_are_damaged_or_cannot_be_read_are_refused(
    tmp_path, monkeypatch
):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    monkeypatch.setattr(published, "has_safetensors", lambda: False)
    with pytest.raises(tsld.CheckpointError, match="takes the package safetensors"):
        hf.load_gpt2(tmp_path)

    pytest.importorskip("safetensors")
    monkeypatch.setattr(published, "has_safetensors", lambda: True)
    with pytest.raises(tsld.CheckpointError, match="safetensors is truncated or"):
        hf.load_gpt2(tmp_path)


def test_the_tied_embedding_is_written_once(tmp_path):
    model = micro_gpt()
    hf.save_gpt2(model, tmp_path)
    numbers = sum(tensor.numel() for tensor in weights_of(tmp_path).values())
    assert numbers == sum(parameter.numel() for parameter in model.parameters())


def test_a_head_of_its_own_has_no_place_in_the_format(tmp_path):
    model = micro_gpt()
    model.lm_head.weight = torch.nn.Parameter(model.wte.weight.detach() + 1)
    with pytest.raises(ValueError, match="lm_head.weight is not wte.weight"):
        hf.save_gpt2(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def scaled(factor, bits=2, channel=None):
    """A student, one of whose layers, or one of its channels, is so much smaller or
    larger."""
    granularity = "tensor" if channel is None else "channel"
    student = tsld.quantize_model(micro_gpt(vocab_size=2048), bits, granularity)
    weight = student.h[0].mlp.c_fc.weight.detach()
    weight[slice(None) if channel is None else channel] *= factor
    return student


def poisoned(name, value):
    """A packed student with one value that no file of ours would hold."""
    student = tsld.pack_model(tsld.quantize_model(micro_gpt(vocab_size=2048)))
    student.state_dict()[name].view(-1)[3] = value
    return student


C_FC = "h.0.mlp.c_fc.weight"
GONE = "which is -?0 in torch.float16: take float32"
UNFIT = [
    (lambda: scaled(1e-9), C_FC, GONE),
    (lambda: tsld.pack_model(scaled(1e-9)), C_FC, GONE),
    (lambda: scaled(1e-9, channel=3), C_FC, GONE),
    (lambda: scaled(2.9e-6, channel=3), C_FC, "which is .*e-06 in torch.float16"),
    (lambda: scaled(1e-30, bits=4), C_FC, GONE),
    (lambda: scaled(1e7, bits=4), C_FC, "which is -?inf in torch.float16: take"),
    (lambda: poisoned("h.1.ln_2.weight", -7e4), "h.1.ln_2.weight", "-70000, which is "),
]


@pytest.mark.parametrize("make, name, words", UNFIT)
def test_a_weight_that_float16_does_not_hold_is_refused_by_name(
    make, name, words, small_vocabulary, tmp_path
):
    student = make()
    with pytest.raises(ValueError, match=f"^{name} has a weight of .*{words}"):
        hf.export(student, small_vocabulary, tmp_path / "new", torch.float16)
    assert [*tmp_path.iterdir()] == []

    hf.export(student, small_vocabulary, tmp_path / "new")
    written = weights_of(tmp_path / "new")[f"transformer.{name}"]
    layer = student.get_submodule(name.removesuffix(".weight"))
    is_matrix = hasattr(layer, "dequantized")
    expected = layer.dequantized().t() if is_matrix else layer.weight
    assert torch.equal(written, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.bias", "ln_f.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_never_written(
    dtype, name, value, small_vocabulary, tmp_path
):
    with pytest.raises(ValueError, match=f"^{name} has a weight of {value}$"):
        hf.export(poisoned(name, value), small_vocabulary, tmp_path / "new", dtype)
    assert [*tmp_path.iterdir()] == []


def test_small_numbers_that_are_no_codes_do_not_stop_a_float16(
    small_vocabulary, tmp_path
):
    student = poisoned("wte.weight", 1e-9)
    student.ln_f.bias.fill_(1e-9)
    hf.export(student, small_vocabulary, tmp_path / "new", torch.float16)
    assert (weights_of(tmp_path / "new")["transformer.ln_f.bias"] == 0).all()


@pytest.mark.parametrize("end_of_text", [2048, 50256, -1])
def test_an_end_of_text_that_the_model_does_not_know_is_refused(
    end_of_text, small_vocabulary, tmp_path
):
    small_vocabulary.end_of_text = end_of_text
    words = f"token {end_of_text} ends a text, and the model has 2048: the tokenizer"
    with pytest.raises(ValueError, match=words):
        hf.export(micro_gpt(vocab_size=2048), small_vocabulary, tmp_path / "new")
    assert [*tmp_path.iterdir()] == []


def test_both_configurations_name_the_token_between_texts(small_vocabulary, tmp_path):
    model = micro_gpt(vocab_size=2048)
    hf.export(model, small_vocabulary, tmp_path / "new")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "new" / name).read_text())
        for key in ("bos_token_id", "eos_token_id"):
            token = small_vocabulary.decode_single_token_bytes(config[key])
            assert token == b"\0"

    hf.save_gpt2(micro_gpt(), tmp_path / "other")  # 17 tokens, none of them an end
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["bos_token_id"] is config["eos_token_id"] is None


def test_in_transformers_a_text_begins_and_ends_where_it_should(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tsld.pack_model(tsld.quantize_model(micro_gpt(block_size=32, seed=3)))
    ids = micro_ids(1, 4)
    expected = greedy(model, ids, 28)
    end = expected[6]
    length = expected.index(end) + 1
    assert length < 28

    hf.save_gpt2(model, tmp_path, end_of_text=end)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found = again.generate(ids, max_new_tokens=28, do_sample=False, pad_token_id=0)
    assert found[0, 4:].tolist() == expected[:length]

    # Without a prompt it begins with that token.
    found = again.generate(max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    assert found[0] == end
    after = greedy(model, torch.tensor([[end]]), 5)
    assert found[1:].tolist() == after[: len(found) - 1]


# --------------------------------------------------------------------------------------
# A student of transformers

GREEDY = {"eos_token_id": 7}
SETTINGS = {
    "several ends": ({}, {"eos_token_id": [0, 5, 7], "bos_token_id": 1}),
    "only in the model's configuration": ({"eos_token_id": [0, 5, 7]}, None),
    "another one in each": ({"eos_token_id": 3}, {"eos_token_id": [5]}),
    "a cache": ({"use_cache": True}, GREEDY | {"use_cache": True}),
    "no cache": ({"use_cache": False}, GREEDY | {"use_cache": False}),
    "sampling": ({}, GREEDY | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
    "sampling that contradicts itself": ({}, GREEDY | {"temperature": 0.6}),
    "lengths": ({}, GREEDY | {"max_length": 50, "max_new_tokens": 3}),
    "unknown ones": ({"mine": [1, {"a": None}]}, GREEDY | {"mine": "b"}),
}


def packed_student(folder):
    """The student that a folder's model is when its weights are rounded."""
    model, tokenizer = hf.load_model(folder)
    return tsld.pack_model(tsld.quantize_model(model)), tokenizer


@pytest.mark.parametrize("case", SETTINGS)
def test_the_models_own_settings_come_out_as_they_went_in(case, tmp_path):
    settings, generation = SETTINGS[case]
    folder = save_llama(tmp_path / "teacher", settings, generation)
    hf.export(*packed_student(folder), tmp_path / "exported")

    changes = {"transformers_version", "dtype", "_from_model_config"}
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert {k: after[k] for k in before if k not in changes} == {
        k: before[k] for k in before if k not in changes
    }

    path = tmp_path / "exported" / "generation_config.json"
    after = json.loads(path.read_text())
    after = {k: value for k, value in after.items() if k not in changes}
    if generation is None:
        assert after["eos_token_id"] == settings["eos_token_id"]
    else:
        assert after == generation


def test_in_transformers_a_text_stops_at_any_of_several_ends(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save_llama(tmp_path / "teacher", generation={})
    ids = torch.tensor([[*b"the cat"]])
    student, _ = packed_student(folder)
    expected = greedy(student, ids, 40)
    end = expected[10]
    others = sorted(set(range(256)) - set(expected))[:2]

    ends = {"eos_token_id": [others[0], end, others[1]]}
    folder = save_llama(tmp_path / "teacher", generation=ends)
    hf.export(*packed_student(folder), tmp_path / "exported")
    load = transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path / "exported", dtype=torch.float32)
    found = again.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert found[0, 7:].tolist() == expected[: expected.index(end) + 1]


def test_a_weight_of_transformers_that_float16_does_not_hold_is_refused(tmp_path):
    student, tokenizer = packed_student(save_llama(tmp_path / "teacher"))
    student.inner.model.norm.weight[2] = 1e6
    words = "model.norm.weight has a weight of 1e"
    with pytest.raises(ValueError, match=f"LlamaForCausalLM .* {words}"):
        hf.export(student, tokenizer, tmp_path / "new", torch.float16)
    assert not (tmp_path / "new").exists()

    student.inner.model.norm.weight[2] = 1
    student.inner.model.layers[0].mlp.up_proj.scale[:] = 1e-9
    words = "model.layers.0.mlp.up_proj.weight has a weight of -?1e-09, which is -?0 in"
    with pytest.raises(ValueError, match=f"LlamaForCausalLM .* {words}"):
        hf.export(student, tokenizer, tmp_path / "new", torch.float16)
    hf.export(student, tokenizer, tmp_path / "new")


def test_what_transformers_cannot_save_or_opens_as_another_is_refused(
    tmp_path, monkeypatch
):
    student, tokenizer = packed_student(save_llama(tmp_path / "teacher"))
    llama = type(student.inner)
    save = llama.save_pretrained

    def save_another(model, folder):
        model.model.norm.weight.data += 1
        save(model, folder)
        model.model.norm.weight.data -= 1

    def fail(model, folder):
        (Path(folder) / "model.safetensors").write_text("half")
        raise NotImplementedError("not\nthis one")

    for broken, words in ((save_another, "another model.norm.weight"), (fail, "not")):
        monkeypatch.setattr(llama, "save_pretrained", broken)
        with pytest.raises(ValueError) as refusal:
            hf.export(student, tokenizer, tmp_path / "new")
        line = str(refusal.value)
        assert line.startswith("LlamaForCausalLM cannot be exported: ")
        assert line.endswith(words)
        assert not (tmp_path / "new").exists()

    monkeypatch.setattr(llama, "save_pretrained", save)
    with monkeypatch.context() as patch:
        # tokenizers says so of a full disk, with an error of no type of its own.
        fails = mock.Mock(
            side_effect=Exception("No space left on device (os error 28)")
        )
        patch.setattr(type(tokenizer.wrapped), "save_pretrained", fails)
        with pytest.raises(ValueError, match="the tokenizer cannot be exported: No sp"):
            hf.export(student, tokenizer, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(hf, "dequantized_state", lambda inner: other)
        other = llama(student.inner.config).state_dict()
        with pytest.raises(ValueError, match="unpacked, it computes something else"):
            hf.export(student, tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()

    hf.export(student, tokenizer, tmp_path / "new")
    assert hf.load_model(tmp_path / "new")[1].encode_ordinary(WORDS)


def test_an_export_makes_no_cache_which_some_models_fail_to_make(tmp_path, monkeypatch):
    student, tokenizer = packed_student(save_llama(tmp_path / "teacher"))
    llama = type(student.inner)
    forward = llama.forward

    def without_cache(self, input_ids, use_cache=None):
        assert use_cache is False
        return forward(self, input_ids, use_cache=False)

    monkeypatch.setattr(llama, "forward", without_cache)
    hf.export(student, tokenizer, tmp_path / "new")


def test_the_folder_that_a_model_came_from_is_never_overwritten(tmp_path):
    folder = save_llama(tmp_path / "teacher")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=", which no export wrote"):
        hf.export(*packed_student(folder), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
