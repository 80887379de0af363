"""data/lib/students.py: a packed student writes text, and other programs open it."""

import copy
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

import train_small
import tsld
from data.lib import files, hf, int4, scores, students
from data.lib.errors import UserError
from data.lib.exports import LIST
from data.lib.published import read_weights, weights_in
from data.tests.helpers import WORDS, micro_gpt, refused, run, save_llama
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

    # An end of text is not shown, and nothing after it.
    shown.clear()
    tokens[3:3] = [small_vocabulary.end_of_text]
    students.write_text(model, small_vocabulary, "the cat", seed=0)
    assert [text for text in shown if text] == ["the cat", "é", " ", "\n"]


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
    words = f"{tmp_path / 'checkpoint'} does not load: "
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

    names = {"config.json", "generation_config.json", "tokenizer.json"}
    names |= {"tokenizer_config.json", weights_in(new).name, LIST}
    assert {*os.listdir(new)} == names

    tensors = read_weights(weights_in(new))
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
        words = f"{folder} holds pytorch_model.bin, which no export wrote"
        refused(["--export", str(packed), str(folder)], capsys, words)
        assert [file.read_text() for file in folder.iterdir()] == ["an earlier one"]
        (folder / "pytorch_model.bin").unlink()

    monkeypatch.chdir(folder)
    for words in ([], ["float16"]):
        run(["--export", str(packed), ".", *words], capsys)
    weights = read_weights(weights_in(folder))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}

    words = f"{tmp_path / 'nowhere'}: No such file"
    flags = ["--export", str(tmp_path / "nowhere"), str(tmp_path / "new")]
    refused(flags, capsys, words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", ["x", "x y float8", "x y float16 z", "x "])
def test_an_export_takes_a_file_a_folder_and_float16(words, capsys):
    line = "--export takes FILE FOLDER, and after them float16 or nothing"
    refused(["--export", *words.split(" ")], capsys, line)


@pytest.mark.parametrize("words", [["--export", "FILE", "new"], ["--generate", "FILE"]])
def test_a_student_of_a_preset_takes_none_as_the_model_of_transformers(words, capsys):
    line = "--model is for transformers here, not tiny"
    assert refused([*words, "--model", "tiny"], capsys, line) == ""


def test_an_export_never_overwrites_the_folder_that_model_names(
    packed, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_small, "from_transformers", lambda *rest: pytest.fail())
    model = tmp_path / "model"
    run(["--export", str(packed), str(model)], capsys)  # of an export, too
    (tmp_path / "link").symlink_to(model)
    before = {file.name: file.read_bytes() for file in model.iterdir()}

    for folder in (model, tmp_path / "link", f"{tmp_path}/./model/"):
        flags = ["--export", str(packed), str(folder), "--model", str(model)]
        refused(flags, capsys, f"{folder} is --model's own: name a new folder")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_a_float16_that_holds_no_weight_is_refused_with_a_remedy(
    capsys, small_vocabulary, tmp_path
):
    student = tsld.quantize_model(micro_gpt(vocab_size=2048))
    student.h[0].ln_1.bias.data[0] = 1e5
    files.save_packed(tmp_path / "student", tsld.pack_model(student))
    flags = ["--export", str(tmp_path / "student"), str(tmp_path / "new")]
    words = "h.0.ln_1.bias has a weight of 100000, which is inf in torch.float16: "
    refused([*flags, "float16"], capsys, words + "take float32")
    assert not (tmp_path / "new").exists()
    run(flags, capsys)


# --------------------------------------------------------------------------------------
# Four bits


def test_a_student_of_four_bits_writes_text_and_is_exported(
    capsys, small_vocabulary, tmp_path
):
    torch.manual_seed(0)
    config = GPTConfig(16, 2048, n_layer=1, n_head=2, n_embd=8)
    student = tsld.quantize_model(GPT(config), 4).eval()
    path = tmp_path / "student.packed"
    int4.save_int4(path, student)

    printed = run(["--generate", str(path), "--device", "cpu"], capsys)
    assert len(small_vocabulary.encode_ordinary(printed)) > 5

    new = tmp_path / "new"
    assert run(["--export", str(path), str(new)], capsys).startswith(f"{new}: {path}")
    weights = read_weights(weights_in(new))
    layer = student.h[0].mlp.c_fc
    expected = tsld.fake_quantize(layer.weight, 4).t()
    assert torch.equal(weights["transformer.h.0.mlp.c_fc.weight"], expected)
    assert expected.unique().numel() > 3


# --------------------------------------------------------------------------------------
# Students of transformers' models


@pytest.fixture
def teacher(tmp_path):
    """The folder of a LLaMA with a tokenizer of bytes."""
    return save_llama(tmp_path / "teacher")


@pytest.mark.parametrize("bits", [2, 4])
def test_a_student_of_model_writes_text_until_one_of_its_ends(
    bits, teacher, capsys, tmp_path, monkeypatch
):
    model, tokenizer = hf.load_model(teacher)
    student = tsld.quantize_model(model, bits).eval()
    path = tmp_path / "student.packed"
    scores.pack(copy.deepcopy(student), path)

    prompt = torch.tensor([tokenizer.encode_ordinary("the cat")])
    length = student.config.block_size - prompt.shape[1]
    ids = student.generate(prompt, length, temperature=0)[0].tolist()
    assert tokenizer.end_of_text not in ids
    never = min({*range(256)} - {*ids})

    monkeypatch.setattr(students, "SAMPLING", {"temperature": 0})
    flags = ["--generate", str(path), "--model", str(teacher), "--device", "cpu"]
    for ends in ([never], [never, ids[30]], [ids[30], ids[20], never]):
        save_llama(teacher, generation={"eos_token_id": ends})
        ended = [i for i in range(7, len(ids)) if ids[i] in ends]
        text = tokenizer.decode(ids[: min(ended, default=len(ids))])
        printed = run([*flags, "--prompt", "the cat"], capsys)
        assert printed == text.rstrip("\ufffd") + "\n"

    save_llama(teacher, generation={"eos_token_id": ids[9]})  # one, and no list
    printed = run([*flags, "--prompt", "the cat"], capsys)
    assert (
        printed == tokenizer.decode(ids[: ids.index(ids[9], 7)]).rstrip("\ufffd") + "\n"
    )


def test_a_student_of_model_is_refused_without_it_and_with_another(
    teacher, packed, capsys, tmp_path
):
    model, _ = hf.load_model(teacher)
    for bits in (2, 4):
        path = tmp_path / f"student-{bits}"
        scores.pack(tsld.quantize_model(copy.deepcopy(model), bits), path)
        line = f"{path} is a student of a LlamaForCausalLM: name its teacher's folder"
        for words in (["--generate", str(path)], ["--export", str(path), "new"]):
            refused(words, capsys, line)

        other = save_llama(tmp_path / "other", num_hidden_layers=2)
        flags = ["--generate", str(path), "--model", str(other), "--device", "cpu"]
        words = f"{path} is of another model: its n_layer is "
        refused(flags, capsys, words)

    flags = ["--generate", str(packed), "--model", str(teacher), "--device", "cpu"]
    words = f"{packed} is of another model: its architecture is None, not Llama"
    refused(flags, capsys, words)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_student_of_another_tokenizer_is_refused(bits, teacher, capsys, tmp_path):
    model, _ = hf.load_model(teacher)
    path = tmp_path / "student.packed"
    scores.pack(tsld.quantize_model(model, bits), path)
    flags = ["--model", str(teacher), "--device", "cpu"]
    before = run(["--generate", str(path), *flags], capsys)

    # As earlier versions of this program wrote it, with no word of a tokenizer.
    content = torch.load(path, weights_only=True)
    assert len(content.pop("tokenizer")) == 16
    old = tmp_path / "old.packed"
    files.write_checked(old, content)
    assert run(["--generate", str(old), *flags], capsys) == before

    file = teacher / "tokenizer.json"
    saved = json.loads(file.read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(saved))

    words = f"{path} is of another tokenizer: its fingerprint is "
    refused(["--generate", str(path), *flags], capsys, words)
    export = ["--export", str(path), str(tmp_path / "new"), "--model", str(teacher)]
    refused(export, capsys, words)
    assert not (tmp_path / "new").exists()
    run(["--generate", str(old), *flags], capsys)


def test_a_file_that_names_a_tokenizer_is_opened_without_it(teacher, tmp_path):
    model, _ = hf.load_model(teacher)
    student = tsld.pack_model(tsld.quantize_model(model))
    files.save_packed(tmp_path / "student.packed", student)
    again = tsld.load_model(tmp_path / "student.packed", hf.load_model(teacher)[0])
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids), student(ids), rtol=0, atol=1e-2)


def test_a_model_without_a_limit_writes_so_many_tokens(small_vocabulary, capsys):
    model = micro_gpt(vocab_size=2048, block_size=1100)
    small_vocabulary.end_of_text = None
    model.config.block_size = math.inf
    asked = []
    model.stream = lambda ids, length, **sampling: asked.append(length) or []
    students.write_text(model, small_vocabulary, "the", seed=0)
    assert asked == [1024 - len(small_vocabulary.encode_ordinary("the"))]
