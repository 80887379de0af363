"""The evidence's benchmarks: what they time, memory on paper, llama.cpp's format."""

import copy
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tsld
from data import texts
from data.evidence.speed import bench, decoding, gpu, llama, memory, timing, training
from data.lib import hf
from data.lib.files import save_packed
from data.tests.helpers import (
    MICRO,
    ROOT,
    Beside,
    has_loopback,
    micro_gpt,
    refused,
    run,
    run_together,
)
from tsld import GPT, GPTConfig

needs_memory = pytest.mark.skipif(
    not timing.peak_memory(),
    reason="this system does not say how much memory a process had",
)

# --------------------------------------------------------------------------------------
# Benchmarks


def test_ratios_are_against_the_row_named_first(capsys):
    timing.print_ratios("speed", "µs", {"base": 300.0, "fast": 100.0})
    timing.print_ratios("rate", "tokens/s", {"base": 20.0, "fast": 50.0}, True)
    printed = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in printed if line.strip()]

    assert lines[1:3] == [["base", "300.0", "1.00"], ["fast", "100.0", "3.00"]]
    assert lines[4:] == [["base", "20.0", "1.00"], ["fast", "50.0", "2.50"]]


def test_the_parts_of_a_file_are_all_of_it_and_none_twice(tmp_path):
    model = tsld.pack_model(tsld.quantize_model(micro_gpt()))
    path = tmp_path / "model.packed"
    save_packed(path, model)

    sizes = decoding.parts_of_file(path)
    vectors = 2 * (3 * 12 + 12 + 48 + 12) + 5 * 2 * 12  # biases, and norms
    scales = 2 * 4
    assert sizes == {
        "embedding, float16": 2 * 17 * 12,
        "positions, float16": 2 * 8 * 12,
        "ternary weights": 2 * (12 * 12 * 12) // 4,
        "scales, biases, norms, float32": 4 * (vectors + scales),
    }


@pytest.mark.parametrize("name", [*training.PLAIN, *tsld.LOSSES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_benchmarked_step_trains_the_right_model(name, dtype):
    steps = training.TrainingSteps((1, 8, 2, 17, 3, 4))
    before = copy.deepcopy(steps.model.state_dict())
    student_before = copy.deepcopy(steps.student.state_dict())
    steps.take(name, dtype)
    is_plain = name in training.PLAIN

    assert has_changed(steps.model, before) == is_plain
    assert has_changed(steps.student, student_before) != is_plain


def has_changed(model, before):
    return any(
        not torch.equal(t, before[name]) for name, t in model.state_dict().items()
    )


def test_both_plain_steps_are_the_same_step():
    one, two = (training.TrainingSteps((1, 8, 2, 17, 3, 4)) for _ in range(2))
    one.take("plain", "float32")
    two.take("plain, this program", "float32")
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, two.model.state_dict()[name])


def test_decoding_is_timed_between_the_first_token_and_the_last(monkeypatch):
    monkeypatch.setattr(decoding, "LENGTH", 5)
    ticks = iter([10.0, 11.0, 12.0, 13.0, 18.0])
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: next(ticks))
    prompt = torch.zeros(1, 2, dtype=torch.long)

    assert decoding.rate_of(micro_gpt(), prompt) == 4 / 8.0


def test_each_product_goes_through_all_its_copies():
    seen = []

    class Layer(torch.nn.Module):
        def forward(self, x):
            seen.append(id(self))

    function = decoding.in_turn(Layer(), torch.zeros(1), 3)
    for _ in range(6):
        function()

    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:]


# A stand-in for nanoGPT's model.py, with what nanogpt_step calls of it.
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

    def forward(self, ids, targets):
        logits = self.head(self.embed(ids))
        return logits, nn.functional.cross_entropy(logits.mT, targets)
"""


@pytest.fixture
def uncompiled(monkeypatch):
    """To compile takes longer than the tests may."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.mark.parametrize("is_other", [False, True])
def test_the_packed_models_text_is_compared_with_that_of_its_weights_in_fp32(
    is_other, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(decoding, "PROMPT", 2)
    monkeypatch.setattr(decoding, "GREEDY", 6)
    if is_other:
        other = micro_gpt(seed=1, n_embd=64)
        monkeypatch.setattr(decoding, "unpacked", lambda packed, folder: other)
    packed = tsld.pack_model(tsld.quantize_model(micro_gpt(n_embd=64)))
    decoding.compare_with_pytorch(packed, tmp_path)
    lines = capsys.readouterr().out.splitlines()[2:]

    assert len(lines) == 3
    assert all(("6 tokens are the same" in line) != is_other for line in lines)
    assert all((float(line.split()[-3]) < 1e-4) != is_other for line in lines)


def test_a_dry_run_on_a_cpu_fills_every_row(capsys, tmp_path, monkeypatch, uncompiled):
    monkeypatch.setattr(gpu, "DRY_SHAPES", {"minute": GPTConfig(64, 17, 1, 1, 4)})
    monkeypatch.setattr(gpu, "DRY_LENGTH", 8)
    monkeypatch.setattr(decoding, "LENGTH", 3)
    (tmp_path / "model.py").write_text(NANOGPT)
    flags = ["--device", "cpu", "--steps", "1", "--nanogpt", str(tmp_path)]
    flags += ["--out", str(tmp_path / "out")]
    run(flags, capsys, gpu.main)

    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    steps = [row for row in found if row["part"] == "step"]
    assert {row["device"] for row in found} == {"cpu"}
    assert all(row["tokens_per_second"] > 0 for row in steps)
    assert all(row["captured"] == ("captured" in row["way"]) for row in steps)

    # TSLD in every way with both batches; the others eager and captured.
    measured = [(row["loss"], row["batch"], row["way"]) for row in steps]
    expected = {("tsld", batch, way) for batch in (2, 4) for way in training.WAYS}
    expected |= {(loss, 2, "eager") for loss in tsld.LOSSES}
    expected |= {(loss, 2, "captured") for loss in tsld.LOSSES}
    assert sorted(measured) == sorted(expected)

    rest = [row for row in found if row["part"] != "step"]
    parts = [row["part"] for row in rest]
    assert parts == ["product", "decoding", "turns", "turns"]
    assert rest[0]["packed_us"] > 0 and rest[0]["bf16_us"] > 0
    assert rest[1]["packed_tokens_per_second"] > 0
    assert rest[1]["bf16_tokens_per_second"] > 0
    assert rest[2]["nanoGPT, compiled"] > 0 and rest[2]["tsld, captured"] > 0

    assert f"of {len(found)}: " not in run(flags, capsys, gpu.main)


STEP = {"part": "step", "shape": "GPT-2 small", "batch": 4, "loss": "tsld"}
STEP |= {"tokens_per_second": 1234.5, "peak_bytes": 2.5e9, "utilisation": 0.25}


def test_the_tables_of_a_gpu_have_every_part_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOM", tmp_path)
    turns = {"part": "turns", "shape": "GPT-2 medium", "batch": 32, "dtype": "bfloat16"}
    found = [
        STEP | {"way": "eager", "captured": False},
        STEP | {"way": "captured", "captured": True, "batch": 32},
        STEP | {"way": "captured", "captured": False, "shape": "GPT-2 medium"},
        turns | {"nanoGPT, compiled": 200.0, "tsld, captured": 150.0},
        {"part": "product", "out": 8, "width": 4, "FP32_us": 3, "bf16_us": 2}
        | {"packed_us": 1.5},
        {"part": "decoding", "FP32_tokens_per_second": 10.0}
        | {"bf16_tokens_per_second": 20.0, "packed_tokens_per_second": 5.0},
    ]
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    steps, beside, packed = gpu.tables()
    cell = "1,234, 2.5, 25.0 %"
    assert steps.lines == [
        ["TSLD", cell, ""],
        ["TSLD, captured, batch 32", cell, ""],
        ["TSLD, captured (could not be)", "", cell],
    ]
    assert beside.columns[1:] == ["nanoGPT, compiled", "tsld, captured"]
    assert beside.lines == [["GPT-2 medium, batch 32", "200 (1.00)", "150 (0.75)"]]
    assert packed.lines[0] == ["one row times 8 x 4, µs", "3.0", "2.0", "1.5"]
    assert packed.lines[1][1:] == ["10.0", "20.0", "5.0"]


def test_a_dry_run_without_nanogpt_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "wanted_parts", lambda device, nanogpt: [])
    flags = ["--device", "cpu", "--out", str(tmp_path)]
    assert "nanoGPT is not measured" in run(flags, capsys, gpu.main)


def test_a_folder_without_nanogpts_model_is_refused(capsys, tmp_path, monkeypatch):
    part = {"part": "turns", "shape": "minute", "batch": 2}
    monkeypatch.setattr(gpu, "wanted_parts", lambda device, nanogpt: [part])
    flags = ["--device", "cpu", "--out", str(tmp_path), "--nanogpt", str(tmp_path)]
    refused(flags, capsys, "there is no model.py", gpu.main)


def test_a_step_of_nanogpt_trains_its_model(tmp_path, uncompiled):
    (tmp_path / "model.py").write_text(NANOGPT)
    step = training.nanogpt_step(tmp_path, (1, 8, 2, 17, 3, 4), torch.device("cpu"))
    losses = [step() for _ in range(30)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("way", training.WAYS)
def test_a_step_is_the_same_however_it_is_taken(way, uncompiled):
    shape = (1, 8, 2, 17, 3, 4)
    expected = training.TrainingSteps(shape)
    steps = training.TrainingSteps(shape, way=way)
    for _ in range(3):
        expected.take("tsld", "float32")
        steps.take("tsld", "float32")
    for name, tensor in steps.student.state_dict().items():
        assert torch.equal(tensor, expected.student.state_dict()[name])


# --------------------------------------------------------------------------------------
# Memory on paper

# Two sizes: their difference is free of what torch itself takes.
SIZES = ((2, 4), (12, 16))  # layers, sequences


def difference_on_paper(width, vocabulary, sizes=SIZES, gpus=1):
    """Bytes of training between two sizes, in float32, 128 tokens a sequence."""
    bytes_of = []
    for layers, batch in sizes:
        shape = memory.Shape(layers, width, 4 * width, vocabulary, 128)
        on_paper = memory.memory_on_paper(shape, batch, 128, "float32", gpus)
        bytes_of.append(on_paper["training"])

    return bytes_of[1] - bytes_of[0]


def test_memory_on_paper_counts_the_published_models_parameters():
    published = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]  # GPT-2
    published += [125_239_296, 1_315_758_080, 2_651_596_800, 6_658_473_984]  # OPT
    published += [1_315_575_808, 6_738_415_616]  # GPT-Neo, LLaMA
    counts = [sum(shape.parameters()) for shape in memory.SHAPES.values()]

    assert counts == published


def test_memory_on_paper_is_that_of_a_real_file(tmp_path):
    model = GPT(GPTConfig(128, 4096, n_layer=4, n_head=4, n_embd=256))
    on_paper = memory.memory_on_paper(memory.Shape(4, 256, 1024, 4096, 128))

    assert on_paper["FP32"] == 4 * sum(p.numel() for p in model.parameters())

    path = tmp_path / "model.packed"
    save_packed(path, tsld.pack_model(tsld.quantize_model(model)))

    assert os.path.getsize(path) == pytest.approx(on_paper["packed"], rel=0.02)


MEASURED = ((2, 2), (6, 16))


@Beside
def measured_steps(folder):
    code = "import torch\nfrom data.evidence.speed import training\n"
    code += "torch.set_num_threads(1)\n"

    for layers, batch in MEASURED:
        shape = (layers, 128, 4, 2048, batch, 128)
        code += f"training.step_memory({shape}, ('tsld', 'float32'))\n"
    return subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)


@needs_memory
def test_memory_on_paper_is_that_of_a_measured_step():
    small, large = map(int, measured_steps().split())
    on_paper = difference_on_paper(128, 2048, MEASURED)

    assert large - small == pytest.approx(on_paper, rel=0.2)


TRAINING_OF_TWO = f"""
import torch, tsld
from data.evidence.speed.timing import peak_memory
from data.lib import lean, processes

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
backward = processes.shared(lean.backward)
device = torch.device("cpu")
text = torch.arange(10_000) % 2048
for layers, batch in {SIZES}:
    teacher = tsld.GPT(tsld.GPTConfig(128, 2048, layers, 4, 128))
    student = tsld.quantize_model(tsld.GPT(teacher.config))
    student = processes.spread(student, device)
    teacher = processes.spread(teacher, device)
    config = tsld.TrainConfig(steps=2, batch_size=batch, block_size=128)
    for _ in tsld.train(
        student, text, config, teacher, backward=backward
    ):
        pass
    if torch.distributed.get_rank() == 0:
        print(peak_memory())
    del teacher, student
"""


@Beside
def memory_of_two(folder):
    (folder / "memory.py").write_text(TRAINING_OF_TWO)

    # Without it glibc keeps much of what is freed, in pieces too small to use again.
    return run_together(folder / "memory.py", MALLOC_MMAP_THRESHOLD_="65536")


@needs_memory
@pytest.mark.skipif(not has_loopback(), reason="no loopback network")
def test_memory_on_paper_of_two_gpus_is_that_of_two_processes():
    small, large = map(int, memory_of_two().stdout.split())
    on_paper = difference_on_paper(128, 2048, gpus=2)

    assert large - small == pytest.approx(on_paper, rel=0.15)


def test_the_table_of_memory_says_how_many_gpus_a_model_takes():
    table = memory.table()
    line = {name: cells for name, *cells in table.lines}

    assert table.columns[-1] == "GPUs of 80 GB"
    assert line["GPT-2 1.5B"][-1] == 1
    assert line["LLaMA 7B"][-1] == 2

    for name, cells in line.items():
        sizes = [float(cell) for cell in cells[3:-1]]
        assert sizes == sorted(sizes, reverse=True), name


def test_the_command_prints_the_table_of_memory(capsys):
    out = run(["memory"], capsys, bench.main)
    assert "| LLaMA 7B | 26.95 | 13.48 | 2.14 | 121.29 |" in out


# --------------------------------------------------------------------------------------
# llama.cpp


def test_a_gguf_file_holds_the_ternary_matrices_in_two_bits(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=256)
    model = tsld.pack_model(tsld.quantize_model(GPT(config)))
    hf.save_gpt2(model, tmp_path)
    llama.write_gguf(hf.load_gpt2(tmp_path), tmp_path / "model.gguf")

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    assert len(tensors) == 2 + 2 + 12

    block = model.h[0]

    for name, layer in (
        ("attn_qkv", block.attn.c_attn),
        ("attn_output", block.attn.c_proj),
        ("ffn_up", block.mlp.c_fc),
        ("ffn_down", block.mlp.c_proj),
    ):
        stored = tensors[f"blk.0.{name}.weight"]
        weight = layer.dequantized()
        assert stored.n_bytes == weight.numel() / 256 * 66  # 2 bits, and a scale
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        torch.testing.assert_close(torch.from_numpy(values), weight, rtol=5e-4, atol=0)


def test_a_gguf_file_names_the_token_that_ends_the_exports_texts(
    small_vocabulary, tmp_path, capsys, monkeypatch
):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(llama, "compare", lambda *arguments: None)
    config = GPTConfig(8, 2048, n_layer=1, n_head=2, n_embd=256)
    model = tsld.pack_model(tsld.quantize_model(GPT(config)))
    folder, file = tmp_path / "exported", tmp_path / "model.gguf"
    hf.export(model, small_vocabulary, folder)
    run([str(folder), str(file)], capsys, llama.main)

    fields = gguf.GGUFReader(file).fields
    for name in ("bos", "eos"):
        (token,) = fields[f"tokenizer.ggml.{name}_token_id"].parts[-1].tolist()
        assert small_vocabulary.decode_single_token_bytes(token) == b"\0"

    hf.save_gpt2(model, folder)  # which names none
    words = f"{folder}: its config.json names no one eos_token_id"
    refused([str(folder), str(file)], capsys, words, llama.main)


def test_in_llama_cpp_a_text_ends_where_it_should(
    small_vocabulary, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    monkeypatch.setattr(llama, "compare", lambda *arguments: None)
    config = {"block_size": 64, "vocab_size": 2048, "n_head": 4, "n_embd": 256}
    model = micro_gpt(seed=1, **config)
    model.wpe.weight.data *= 10  # or a random model repeats itself
    model.ln_f.weight.data.fill_(1)
    tsld.pack_model(tsld.quantize_model(model))
    prompt = small_vocabulary.encode_ordinary("the company said")
    expected = model.generate(torch.tensor([prompt]), 30, temperature=0)[0].tolist()
    expected = expected[len(prompt) :]

    length = next(n for n in range(8, 30) if expected[n] not in expected[:n])
    small_vocabulary.end_of_text = expected[length]
    folder, file = tmp_path / "exported", str(tmp_path / "model.gguf")
    hf.export(model, small_vocabulary, folder)
    run([str(folder), file], capsys, llama.main)

    options = {"max_tokens": 30, "temperature": 0.0, "repeat_penalty": 1.0}
    found = llama_cpp.Llama(file, verbose=False).create_completion(prompt, **options)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == length


def test_a_matrix_that_is_not_ternary_is_refused_by_name(tmp_path):
    pytest.importorskip("gguf")
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=256)
    with pytest.raises(llama.UserError, match="h.0.attn.c_attn is not ternary"):
        llama.write_gguf(GPT(config), tmp_path / "model.gguf")


def test_a_width_that_llama_cpp_cannot_pack_is_refused(tmp_path, capsys, monkeypatch):
    hf.save_gpt2(micro_gpt(), tmp_path)
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: name == "gguf")
    words = f"multiples of 256, not {MICRO.n_embd}"
    refused([str(tmp_path), "out.gguf"], capsys, words, llama.main)


def test_without_the_package_gguf_one_line_asks_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    refused([str(tmp_path), "out.gguf"], capsys, "package gguf", llama.main)


class StandInLlama:
    """A Llama of llama_cpp that computes with one of our models. Its tokens are the
    remainders of bytes."""

    def __init__(self, model):
        self.model = model

    def __call__(self, path, n_ctx, **options):
        self.scores = np.zeros((n_ctx, self.model.config.vocab_size), np.float32)
        return self

    def tokenize(self, text, add_bos):
        return [byte % self.model.config.vocab_size for byte in text]

    def reset(self):
        self.ids = []

    @property
    def n_tokens(self):
        return len(self.ids)

    def eval(self, ids):
        self.ids += ids
        logits = self.model(torch.tensor([self.ids])).detach()
        self.scores[: len(self.ids)] = logits[0].numpy()


@pytest.mark.parametrize("block, compared", [(7, 4), (64, 48), (512, 50)])
def test_a_student_of_any_block_is_compared_on_the_text_that_can_be_had(
    block, compared, no_network, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(texts, "DATA", tmp_path)  # without the Penn Treebank
    model = micro_gpt(block_size=block)
    package = SimpleNamespace(Llama=StandInLlama(model))
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    llama.compare(model, "model.gguf", count=600)

    lines = capsys.readouterr().out.splitlines()
    assert "pydoc" in lines[0] and lines[0].endswith(": perplexity of 600 tokens")
    this_program, llama_cpp = re.findall(r"\d+\.\d+", lines[1])
    assert this_program == llama_cpp
    assert lines[2] == f"  greedy text: {compared} of {compared} tokens are the same"
