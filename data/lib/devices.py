"""Which device and which type of numbers a run takes, where none is asked for, and
whether a batch fits in."""

import os

import torch

from data.lib.errors import UserError
from data.lib.processes import processes


def choose_device(name):
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        message = f"--device {name}: this machine has none; leave the flag out"
        raise UserError(message) from None


def default_dtype(device):
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities()
        is_fast = any(features[name] for name in features if "bf16" in name)
    else:
        is_fast = False
    return "bfloat16" if is_fast else "float32"


def memory_of(device):
    """The bytes of memory that a device has, None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):  # Windows has none
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def check_memory(device, model, config):
    """Raises UserError if the memory of a device is too small for a batch, whatever
    else is in it. config: a TrainConfig."""
    _, world = processes()
    tokens = config.batch_size * config.block_size
    host = torch.device("cpu")
    needed = {host: 16 * tokens}  # ids and targets, int64

    # Until the backward pass a layer keeps what it was given, in float32.
    width = max(1, model.config.n_layer) * max(1, model.config.n_embd)
    kept = 4 * width * tokens // (config.accumulate * world)
    needed[device] = needed.get(device, 0) + kept

    for place, size in needed.items():
        memory = memory_of(place)
        if memory is not None and size > memory:
            batch = f"a batch of {config.batch_size:,} x {config.block_size:,} tokens"
            sizes = f"{size / 1e9:,.0f} GB or more, the {place.type} has "
            remedy = "lower --batch-size or --block-size, or try --accumulate"
            message = f"{batch} takes {sizes}{memory / 1e9:,.0f} GB: {remedy}"
            raise UserError(message)
