"""data/lib/students.py: a packed student writes text, and other programs open it."""

import os
from types import SimpleNamespace

import pytest
import torch

import train_small
import tsld
from data.lib import files, hf, students
from data.lib.errors import UserError
from data.tests.helpers import WORDS, micro_gpt, refused, run
from tsld import GPT, GPTConfig


@pytest.fixture
def packed(tmp_path):
    """The file of a student with bpe2048's vocabulary and a block of 16 tokens."""
    torch.manual_seed(0)
    config = GPTConfig(16, 2048, n_layer=1, n_head=2, n_embd=8)
    student = tsld.quantize_model(GPT(config))
    path = tmp_path / "student.packed"
    files.save_packed(path, tsld.pack_model(student))
    return path


# --------------------------------------------------------------------------------------
# Text


def test_a_student_fills_its_block_with_what_its_model_draws_from_the_seed(
    packed, small_vocabulary, capsys
):
    flags = ["--generate", str(packed), "--prompt", "the quick", "--device", "cpu"]
    printed = run([*flags, "--seed", "7"], capsys)

    prompt = torch.tensor([small_vocabulary.encode_ordinary("the quick")])
    torch.manual_seed(7)
    model = files.load_packed(packed)
    ids = model.generate(prompt, 16 - prompt.shape[1], temperature=0.8, top_k=200)

    assert printed == small_vocabulary.decode(ids[0].tolist()) + "\n"
    assert run([*flags, "--seed", "8"], capsys) != printed


def test_without_a_prompt_the_text_begins_with_the(packed, capsys):
    assert run(["--generate", str(packed), "--device", "cpu"], capsys).startswith("the")


def test_text_comes_token_by_token_and_no_character_in_parts(
    small_vocabulary, monkeypatch
):
    model = GPT(GPTConfig(16, 2048, n_layer=1, n_head=2, n_embd=8))
    content = "é 中".encode() + b"\xe4"  # in the end the first byte of a character
    tokens = [small_vocabulary.encode_single_token(bytes([byte])) for byte in content]
    asked = []

    def stream(ids, max_new_tokens, **sampling):
        asked.append((ids.tolist(), max_new_tokens, sampling))
        for token in tokens:
            yield torch.tensor([[token]])

    shown = []
    monkeypatch.setattr(model, "stream", stream)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=shown.append, flush=int))
    students.write_text(model, small_vocabulary, "the cat", seed=0)

    ids = small_vocabulary.encode_ordinary("the cat")
    sampling = {"temperature": 0.8, "top_k": 200}
    assert asked == [([ids], 16 - len(ids), sampling)]
    assert [text for text in shown if text] == ["the cat", "é", " ", "中", "\n"]


def test_a_prompt_leaves_room_for_a_token(packed, small_vocabulary, capsys):
    ids = small_vocabulary.encode_ordinary(WORDS)
    fits = small_vocabulary.decode(ids[:15])
    fills = small_vocabulary.decode(ids[:16])
    flags = ["--generate", str(packed), "--device", "cpu", "--prompt"]

    assert len(small_vocabulary.encode_ordinary(fits)) == 15
    assert run([*flags, fits], capsys).startswith(fits)

    for prompt, length in ((fills, 16), ("", 0)):
        words = f"--prompt has {length} tokens, the model's block 16: it takes 1 to 15"
        assert refused([*flags, prompt], capsys, words) == ""


def test_a_file_that_is_no_packed_model_is_refused(packed, capsys, tmp_path):
    words = f"{tmp_path / 'nowhere'}: No such file"
    refused(["--generate", str(tmp_path / "nowhere")], capsys, words)

    files.write_checked(tmp_path / "checkpoint", {"step": 3})
    words = f"{tmp_path / 'checkpoint'} is no such packed model: "
    refused(["--generate", str(tmp_path / "checkpoint")], capsys, words)

    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    packed.write_bytes(content)
    words = f"{packed} is truncated, altered, or not"

    assert refused(["--generate", str(packed)], capsys, words) == ""


def test_a_student_gets_the_vocabulary_of_the_preset_with_as_many_tokens(
    packed, monkeypatch
):
    monkeypatch.setattr(students, "load_tokenizer", lambda name: f"tokens of {name}")
    presets = train_small.PRESETS
    assert students.load_student(packed, presets)[1] == "tokens of bpe2048"

    for vocab_size in (50257, 17):
        model = tsld.quantize_model(micro_gpt(vocab_size=vocab_size))
        files.save_packed(packed, tsld.pack_model(model))
        if vocab_size == 50257:
            assert students.load_student(packed, presets)[1] == "tokens of gpt2"

    with pytest.raises(UserError, match=f"no tokenizer has the 17 tokens of {packed}"):
        students.load_student(packed, presets)


# --------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("words, dtype", [([], "float32"), (["float16"], "float16")])
def test_an_export_has_the_students_weights_and_its_tokenizer(
    words, dtype, packed, capsys, tmp_path
):
    new = tmp_path / "new" / "folder"
    printed = run(["--export", str(packed), str(new), *words], capsys)
    assert printed == f"{new}: {packed}, its weights in torch.{dtype}\n"

    names = {"pytorch_model.bin", "config.json"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {*os.listdir(new)} == names

    tensors = torch.load(new / "pytorch_model.bin")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}

    again, student = hf.load_gpt2(new), files.load_packed(packed)
    ids = torch.arange(32).view(2, 16)
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    torch.testing.assert_close(again(ids), student(ids), rtol=0, atol=tolerance)


def test_an_export_is_there_as_a_whole_or_not_at_all(
    packed, capsys, tmp_path, monkeypatch
):
    folder = tmp_path / "exported"

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_tokenizer", fail)
        refused(["--export", str(packed), str(folder)], capsys, "No space left")
        assert not folder.exists()

        folder.mkdir()
        (folder / "pytorch_model.bin").write_text("an earlier one")
        refused(["--export", str(packed), str(folder)], capsys, "No space left")
        assert [file.read_text() for file in folder.iterdir()] == ["an earlier one"]

    run(["--export", str(packed), str(folder)], capsys)
    assert "an earlier one" not in (folder / "config.json").read_text()

    words = f"{tmp_path / 'nowhere'}: No such file"
    flags = ["--export", str(tmp_path / "nowhere"), str(tmp_path / "new")]
    refused(flags, capsys, words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", ["x", "x y float8", "x y float16 z", "x "])
def test_an_export_takes_a_file_a_folder_and_float16(words, capsys):
    line = "--export takes FILE FOLDER, and after them float16 or nothing"
    refused(["--export", *words.split(" ")], capsys, line)


def test_an_export_takes_no_preset_as_the_model_of_transformers(packed, capsys):
    flags = ["--export", str(packed), "folder", "--model", "tiny"]
    words = "--export: --model is for transformers, not tiny"
    assert refused(flags, capsys, words) == ""
