"""GPT-2's published format: its weights are downloaded, read and written.

Names are our GPT's, with the prefix "transformer." or without. The matrices of blocks
are stored as (in, out).
"""

import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from data.lib.errors import UserError
from data.lib.files import load_tensors, refusing, replacing
from data.texts import DATA, fetch
from tsld import GPT, CheckpointError, GPTConfig

# The SHA-256 of pytorch_model.bin, where it is known.
PUBLISHED = {
    "gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421",
    "gpt2-medium": None,
    "gpt2-large": None,
    "gpt2-xl": None,
}


# What a GPT computes beside its sizes, in the words of a config.json.
COMPUTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def load_published(name, model):
    """Fills a GPT with the published weights of that name in PUBLISHED, which are
    downloaded once. The model may have fewer positions.

    Raises UserError if the weights are not to be had or their SHA-256 is another, and
    CheckpointError if the file is damaged or the model has another shape.
    """
    path = DATA / "weights" / f"{name}.bin"
    url = (
        f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
    )
    try:
        fetch([url], path, PUBLISHED[name])
    except UserError as error:
        message = f"{error}, or use --init scratch"
        raise UserError(message) from None

    remedy = "delete it, and it is downloaded again"
    try:
        weights = load_gpt2(path).state_dict()
        weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
        model.load_state_dict(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {remedy}") from None
    except RuntimeError:
        message = f"{path} is another model than {name}: {remedy}"
        raise CheckpointError(message) from None


def load_gpt2(path):
    """Reads a GPT, float32 and in eval mode.

    path: a pytorch_model.bin or model.safetensors, or a folder with one of them. A
    config.json beside it tells the number of heads; without it a head is 64 wide, as in
    the published sizes. Raises CheckpointError if the file is damaged, holds another
    model or values that are not finite, or could run code, which it then does not; or
    if its config.json says something that a GPT does not compute.
    """
    path = Path(path)
    if path.is_dir():
        path = weights_in(path)

    config_path = path.with_name("config.json")
    content = read_weights(path)

    try:
        tensors = from_published(content)
        config = published_config(tensors, config_path)
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(tensors, assign=True)
    except Exception as error:  # of any type: other content can make it trip anywhere
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"{path}, with {config_path}, is no GPT-2: {reason:.200}"
        raise CheckpointError(message) from None

    model.lm_head.weight = model.wte.weight
    return model.eval()


def weights_in(folder):
    """The file of weights that transformers would open."""
    path = folder / "model.safetensors"
    return path if path.exists() else folder / "pytorch_model.bin"


def has_safetensors():
    return importlib.util.find_spec("safetensors") is not None


def read_weights(path):
    """Name to tensor. Raises CheckpointError as load_gpt2 does."""
    if path.suffix != ".safetensors":
        return load_tensors(path)
    if not has_safetensors():
        raise CheckpointError(f"{path} takes the package safetensors to be read")

    from safetensors.torch import load_file

    with refusing(path, "is truncated or foreign:"):
        return load_file(path)


def from_published(content):
    """Name to tensor of a GPT, from what a published file holds."""
    tensors = {}
    for name, tensor in content.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, in old files
            continue

        if name in tensors:
            raise ValueError(f"{name} is there twice")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}")
        tensors[name] = flipped(name, tensor)
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} is not all finite")

    # The head is tied; one of the two layouts holds it all the same.
    embedding = tensors["wte.weight"]
    head = tensors.setdefault("lm_head.weight", embedding)
    if not torch.equal(head, embedding):
        raise ValueError("lm_head.weight is not wte.weight")

    return tensors


def published_config(tensors, config_path):
    """The GPTConfig that shapes and names show, but for the number of heads. Raises
    ValueError if the config.json, where there is one, says something else."""
    vocab_size, n_embd = tensors["wte.weight"].shape
    block_size = len(tensors["wpe.weight"])

    # A block has 12 tensors: a file of small ones cannot ask for more blocks than that.
    n_norms = sum(".ln_1.weight" in name for name in tensors)
    n_layer = min(n_norms, len(tensors) // 12)

    settings = {"n_head": n_embd // 64}
    if config_path.exists():
        settings = json.loads(config_path.read_bytes())
    n_head = settings["n_head"]

    expected = COMPUTED | {
        "vocab_size": vocab_size,
        "n_positions": block_size,
        "max_position_embeddings": block_size,
        "n_embd": n_embd,
        "hidden_size": n_embd,
        "n_inner": 4 * n_embd,
        "n_layer": n_layer,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
    }
    for name, value in expected.items():
        found = settings.get(name)
        if found is not None and found != value:
            raise ValueError(f"{name} is {found!r}, and a GPT here has {value!r}")

    return GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)


def flipped(name, tensor):
    """The tensor in float32, the matrices of blocks transposed."""
    if name.startswith("h."):
        tensor = tensor.t()  # which leaves a bias as it is
    return tensor.float().contiguous()


def save_gpt2(model, folder, dtype=torch.float32, end_of_text=None):
    """Writes a GPT as load_gpt2 and transformers read it: its weights and config.json
    in `folder`. They are model.safetensors where that package is installed, and else
    pytorch_model.bin. Quantized and packed weights are written as the numbers that they
    stand for, at most three different ones in a ternary matrix.

    end_of_text: the token that other programs begin and end texts with, if any. Raises
    ValueError if dtype cannot hold a weight, the head is not tied to the embedding,
    there is no such token, or the folder has weights that would be read instead."""
    vocab_size = model.config.vocab_size
    if end_of_text is not None and not 0 <= end_of_text < vocab_size:
        words = f"token {end_of_text} ends a text, and the model has {vocab_size}"
        raise ValueError(f"{words}: the tokenizer is another model's")

    check_fits(model, dtype)
    state = dequantized_state(model)
    if not torch.equal(state.pop("lm_head.weight"), state["wte.weight"]):
        raise ValueError("lm_head.weight is not wte.weight, and GPT-2's head is tied")

    # The published layout has the tied weight once.
    tensors = {}
    for name, tensor in state.items():
        tensor = flipped(name, tensor).detach().cpu()
        tensors[f"transformer.{name}"] = tensor.to(dtype)

    # In transformers' words. Without a token they would fill in GPT-2's 50256.
    config = asdict(model.config)
    dropout = config.pop("dropout")
    config["n_positions"] = config.pop("block_size")
    config["model_type"] = "gpt2"
    config["architectures"] = ["GPT2LMHeadModel"]
    for part in ("attn", "embd", "resid"):
        config[f"{part}_pdrop"] = dropout
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, folder)
    write_json(folder / "config.json", config | ends)
    write_json(folder / "generation_config.json", ends)


def check_fits(model, dtype):
    """Raises ValueError if a weight is not finite in the dtype, or if one of a linear
    layer changes there by more than a rounding of the largest in its row: the codes of
    a quantized layer would no longer stand for what they did."""
    layers = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        is_linear = type(layer) is nn.Linear and layer is not model.lm_head
        if is_linear or hasattr(layer, "dequantized"):
            layers.add(f"{name}.weight")

    for name, tensor in dequantized_state(model).items():
        if not tensor.is_floating_point():
            continue

        written = tensor.to(dtype).to(tensor.dtype)
        lost = ~written.isfinite()
        if name in layers:
            largest = tensor.abs().amax(dim=1, keepdim=True)
            lost |= (written - tensor).abs() > torch.finfo(dtype).eps * largest
        if not lost.any():
            continue

        value, found = tensor[lost][0].item(), written[lost][0].item()
        words = f"{name.removeprefix('inner.')} has a weight of {value:g}"
        if math.isfinite(value):
            words += f", which is {found:g} in {dtype}: take float32"
        raise ValueError(words)


def write_weights(tensors, folder):
    """Writes name to tensor. Raises ValueError as save_gpt2 does."""
    if has_safetensors():
        from safetensors.torch import save_file

        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return

    # transformers opens another file first, where there is one.
    others = [file.name for file in folder.glob("*.safetensors*")]
    if others:
        raise ValueError(f"{folder} holds {others[0]}, which would be read instead")
    path = folder / "pytorch_model.bin"
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(tensors, file)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


@torch.no_grad()
def dequantized_state(model):
    """The state dict that the model would have if every quantized or packed layer was
    an nn.Linear with the weight that it computes with."""
    state = model.state_dict()

    for name, layer in model.named_modules(remove_duplicate=False):
        if not hasattr(layer, "dequantized"):
            continue

        for part in layer.state_dict():
            del state[f"{name}.{part}"]
        state[f"{name}.weight"] = layer.dequantized()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()

    return state
