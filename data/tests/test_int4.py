"""data/lib/int4.py: a 4-bit student in a file, two codes to a byte, and back."""

import math

import pytest
import torch
from torch import nn

import tsld
from data.lib import files, int4, students
from data.tests.helpers import MICRO, TEXT, altered, micro_gpt, micro_ids


def quantized(granularity="channel", **changes):
    return tsld.quantize_model(micro_gpt(**changes), 4, granularity).eval()


def load(path, into=None):
    return int4.load_int4(path, files.read_checked(path), into)


def test_the_first_of_two_codes_takes_the_lower_half_of_a_byte():
    codes = torch.tensor([[1, 2, 15], [0, 7, 8]], dtype=torch.uint8)
    packed = int4.pack_codes(codes)
    assert packed.tolist() == [[0x21, 0x0F], [0x70, 0x08]]
    assert packed.dtype == torch.uint8
    assert torch.equal(int4.unpack_codes(packed, 3), codes)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("n_embd", [12, 6])
def test_what_is_loaded_computes_what_the_student_does(granularity, n_embd, tmp_path):
    student = quantized(granularity, n_embd=n_embd)
    int4.save_int4(tmp_path / "student", student)
    loaded = load(tmp_path / "student")

    assert loaded.config == student.config
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for block, expected in zip(loaded.h, student.h, strict=True):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            layer, like = block.get_submodule(name), expected.get_submodule(name)
            weight = tsld.fake_quantize(like.weight, 4, granularity)
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, weight)
            assert torch.equal(layer.bias, like.bias)

    # Embeddings are stored in float16.
    assert loaded.lm_head.weight is loaded.wte.weight
    assert torch.equal(loaded.wte.weight, student.wte.weight.half().float())
    torch.testing.assert_close(
        loaded(micro_ids()), student(micro_ids()), atol=0.02, rtol=0
    )


def test_a_layer_of_odd_width_with_two_names_is_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 9000)
            self.second = self.first

    model = tsld.quantize_model(Twice(), 4)
    int4.save_int4(tmp_path / "student", model)
    assert (tmp_path / "student").stat().st_size < 2 * 9000 + 4 * 9000 + 9000

    loaded = load(tmp_path / "student", into=Twice())
    expected = tsld.fake_quantize(model.first.weight, 4)
    assert torch.equal(loaded.first.weight, expected)
    assert torch.equal(loaded.second.weight, expected)


def test_a_matrix_takes_an_eighth_of_its_float32_size(tmp_path):
    student = quantized("tensor", n_embd=96, n_layer=1)
    int4.save_int4(tmp_path / "student", student)
    matrices = 12 * 96 * 96 // 2
    halves = 2 * (MICRO.vocab_size + MICRO.block_size) * 96
    vectors = 4 * 15 * 96
    size = (tmp_path / "student").stat().st_size
    assert matrices + halves + vectors < size < matrices + halves + vectors + 12_000


def test_what_is_not_finite_as_it_is_stored_leaves_the_old_file(tmp_path):
    path = tmp_path / "student"
    int4.save_int4(path, quantized())
    old = path.read_bytes()
    for name, value in (("wte.weight", 7e4), ("h.0.mlp.c_fc.weight", math.inf)):
        student = quantized()
        student.get_parameter(name).data[0, 0] = value
        with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
            int4.save_int4(path, student)
        assert path.read_bytes() == old
    assert [*tmp_path.iterdir()] == [path]


def test_a_head_of_its_own_is_refused(tmp_path):
    student = quantized()
    student.lm_head.weight = nn.Parameter(student.wte.weight.detach().clone())
    with pytest.raises(ValueError, match="lm_head.weight is not wte.weight"):
        int4.save_int4(tmp_path / "student", student)


def crafted(tensors):
    """Place and value of what a sender may put into such a file."""
    layer = "h.0.mlp.c_fc"
    for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
        for value in (None, -1, 0, 20, 10**7, 10**30, 0.5, "2", math.nan):
            yield ("config", name), value
    yield ("config", "extra"), 1
    yield ("tensors", "lm_head.weight"), tensors["lm_head.weight"] + 1
    for name in ("config", "tensors"):
        for value in (None, 3, "x", []):
            yield (name,), value
    for part in ("codes", "scale", "zero_point", "bias"):
        for value in (
            "x",
            torch.zeros(3, 5),
            torch.zeros(48, 7, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.uint8).expand(10**9, 12),
        ):
            yield ("tensors", f"{layer}.{part}"), value
    of_columns = {f"{layer}.scale": torch.ones(1, 12)}
    of_columns[f"{layer}.zero_point"] = torch.zeros(1, 12, dtype=torch.uint8)
    yield ("tensors",), tensors | of_columns
    for name in ("extra", "wte.codes", "h.9.mlp.c_fc.codes", 3, ""):
        yield ("tensors", name), torch.zeros(3, 3).byte()


def test_whatever_a_crafted_file_claims_it_is_refused(tmp_path):
    int4.save_int4(tmp_path / "student", quantized())
    content = files.read_checked(tmp_path / "student")
    for place, value in crafted(content["tensors"]):
        with pytest.raises(tsld.CheckpointError) as refusal:
            int4.load_int4("the file", altered(content, place, value))
        message = str(refusal.value)
        assert message.startswith("the file is no such 4-bit student: ")
        assert "\n" not in message


def test_it_fills_no_other_model(tmp_path):
    int4.save_int4(tmp_path / "student", quantized())
    for into in (micro_gpt(n_head=3), quantized(), nn.Linear(3, 3)):
        with pytest.raises(tsld.CheckpointError, match="no such 4-bit student"):
            load(tmp_path / "student", into)
    into = micro_gpt(seed=5)
    assert load(tmp_path / "student", into) is into


def test_a_packed_file_of_either_kind_is_loaded_as_what_it_is(tmp_path):
    int4.save_int4(tmp_path / "four", quantized())
    two = tsld.pack_model(tsld.quantize_model(micro_gpt()))
    files.save_packed(tmp_path / "two", two)
    for name, model in (("four", quantized()), ("two", two)):
        loaded = students.load_weights(tmp_path / name)
        nats, like = (tsld.evaluate(m, TEXT, 8) for m in (loaded, model))
        assert nats == pytest.approx(like, abs=0.02)
