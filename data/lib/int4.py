"""Files of 4-bit students: two codes to a byte, with their scales and zero points.

tsld.save_model packs ternary layers alone. Here a 4-bit matrix takes an eighth of its
FP32 size in a file. In memory it takes all of it: what is loaded is a full-precision
model of the numbers that the codes stand for, and there are no products with codes.
"""

import torch
from torch import nn
from torch.nn import functional as F

import tsld
from data.lib import files
from tsld import GPT, GPTConfig, QuantLinear

FORMAT = "tsld 4 bits 1"
PARTS = ("codes", "scale", "zero_point")  # of a layer


def pack_codes(codes):
    """codes: uint8 (out, in) in 0 ... 15 -> uint8 (out, ceil(in / 2)). The first of two
    codes takes the lower half of a byte."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_codes(packed, in_features):
    """packed: uint8 (out, ceil(in / 2)) -> codes, uint8 (out, in)."""
    both = torch.stack([packed & 0b1111, packed >> 4], dim=-1)
    return both.flatten(1)[:, :in_features]


def save_int4(path, model):
    """Writes a 4-bit student: codes, float32 vectors and scales, float16 matrices. The
    file is there as a whole or not at all. Raises ValueError if a value is not finite
    as it is stored, or a GPT's head is not tied to its embedding."""
    if isinstance(model, GPT) and model.lm_head.weight is not model.wte.weight:
        raise ValueError("lm_head.weight is not wte.weight, and a GPT's head is tied")
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {n: m for n, m in modules.items() if isinstance(m, QuantLinear)}
    weights = {f"{name}.weight" for name in layers}

    tensors, of_parameter = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in weights:
            value = of_parameter.setdefault(id(tensor), as_stored(name, tensor))
            tensors[name] = value  # tied: only once

    # A layer that is used under two names is stored once too.
    for name, layer in layers.items():
        if id(layer.weight) not in of_parameter:
            of_parameter[id(layer.weight)] = quantized(name, layer)
        for part, tensor in of_parameter[id(layer.weight)].items():
            tensors[f"{name}.{part}"] = tensor

    config = tsld.config_of(model)
    content = {"format": FORMAT, "config": config, "tensors": tensors}
    files.write_checked(path, content | files.made_with(model))


def quantized(name, layer):
    """Codes, scale and zero point of a QuantLinear, as a file has them."""
    weight = layer.weight.detach().cpu()
    codes, scale, zero_point = tsld.quantize_int4(weight, layer.granularity)
    if not scale.isfinite().all():
        raise ValueError(f"{name}.weight has values that are not finite")

    zero_point = zero_point.to(torch.uint8)
    return {"codes": pack_codes(codes), "scale": scale, "zero_point": zero_point}


def as_stored(name, tensor):
    """The tensor in the dtype that a file has it in."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.half() if tensor.dim() > 1 else tensor.float()

    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite in {tensor.dtype}")
    return tensor


def load_int4(path, content, into=None):
    """The model of a file's content, in float32 and eval mode, with nothing to train.

    path: of the file, for messages. into: for another model than GPT, a full-precision
    one to fill. Raises CheckpointError if the content is of another model."""
    with files.refusing(path, "is no such 4-bit student:"):
        model = fill(content, into)
    return model.requires_grad_(False).eval()


def fill(content, model):
    config, tensors = content["config"], content["tensors"]
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is a view, which may claim any size")

    is_new = model is None
    if is_new:
        if config["n_layer"] > len(tensors):  # before anything is built
            raise ValueError(f"{config['n_layer']} layers exceed its tensors")
        with torch.device("meta"):  # without values
            model = GPT(GPTConfig(**config))
    if config != tsld.config_of(model):
        raise ValueError(f"its configuration is not {tsld.config_of(model)}")

    # Of each layer the numbers that its codes stand for, and all else as it is.
    state = dict(tensors)
    names = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
    for name in names:
        parts = [state.pop(f"{name}.{part}") for part in PARTS]
        state[f"{name}.weight"] = dequantized(name, model.get_submodule(name), *parts)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.float()

    # Strict: names and shapes have to be the model's.
    model.load_state_dict(state, assign=is_new)
    if is_new:
        if not torch.equal(model.lm_head.weight, model.wte.weight):
            raise ValueError("lm_head.weight is not wte.weight")
        model.lm_head.weight = model.wte.weight
    return model


def dequantized(name, linear, packed, scale, zero_point):
    """The weight of an nn.Linear, float32 (out, in). Raises ValueError if the parts are
    not those of such a layer."""
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name} is a {type(linear).__name__}, not an nn.Linear")

    out, width = linear.out_features, linear.in_features
    shapes = [tuple(part.shape) for part in (packed, scale, zero_point)]
    if shapes[0] != (out, -(-width // 2)) or shapes[1] != shapes[2]:
        raise ValueError(f"{name} has codes, scale and zero point of shapes {shapes}")
    if shapes[1] not in ((1, 1), (out, 1)):
        raise ValueError(f"{name} has a scale of shape {shapes[1]}")

    codes = unpack_codes(packed, width)
    return scale.float() * (codes.int() - zero_point.int())
