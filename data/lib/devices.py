"""Which device and which type of numbers a run takes, where none is asked for."""

import torch

from data.lib.errors import UserError


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
