"""A packed layer in C: one row of activations times a matrix that stays packed."""

import ctypes
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data.lib import compiled
from tsld import PackedLinear, unpack_ternary

ROWS = 64  # of a matrix stand side by side


@cache
def c_library():
    """fast.c as a library, or None, and one line on stderr, if it does not compile."""
    try:
        library = compiled.load(Path(__file__).with_name("fast.c"))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"tsld: no C ({error}): generating is slower", file=sys.stderr)
        return None

    # Pointers, then sizes.
    for name, pointers, sizes in (("ternary_layer", 4, 3), ("token_step", 4, 8)):
        types = pointers * [ctypes.c_void_p] + sizes * [ctypes.c_long]
        getattr(library, name).argtypes = types

    # A forked process has one thread, and would wait for OpenMP's others.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return library


def struct_of(fields):
    """A struct of C: where each tensor is (it must outlive the struct), integers, and
    NULL for None."""
    words = [f.data_ptr() if isinstance(f, torch.Tensor) else f for f in fields]
    return (ctypes.c_void_p * len(words))(*words)


def side_by_side(packed):
    """uint8 (out, in / 4), row by row -> (out / 64, in / 16, 64, 4) in one dimension,
    and 4 bytes behind it, as in fast.c."""
    out, size = packed.shape
    words = packed.contiguous().view(torch.int32)  # 4 bytes stay together
    blocks = words.view(out // ROWS, ROWS, size // 4).transpose(1, 2)
    return F.pad(blocks.flatten(), (0, 1)).view(torch.uint8)


class FastLinear(PackedLinear):
    """A PackedLinear whose rows stand side by side, in blocks of 64: the first 4 bytes
    of each, then the next 4. The matrix is held once. `packed` is made from the blocks
    when it is asked for, and a state dict has it in their place."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = len(layer.packed)
        self.training = layer.training
        self.register_buffer("blocks", side_by_side(layer.packed))
        self.register_buffer("scale", layer.scale)
        self.register_buffer("bias", layer.bias)

    @staticmethod
    def fits(layer):
        """Whether fast.c takes this PackedLinear."""
        out, size = layer.packed.shape
        is_whole = out % ROWS == 0 and size % 4 == 0 and layer.in_features == 4 * size
        return is_whole and layer.scale.numel() in (1, out) and layer.packed.is_cpu

    @property
    def packed(self):
        """uint8 (out, in / 4), as tsld.pack_ternary makes it."""
        blocks = self.blocks[:-4].view(-1, self.in_features // 16, ROWS, 4)
        return blocks.transpose(1, 2).reshape(self.out_features, -1)

    def fields(self):
        """What fast.c reads of it, in the order of its struct linear."""
        scale = self.scale.float().contiguous()
        bias = self.bias
        if bias is not None:
            bias = bias.float().expand(self.out_features).contiguous()
        return [self.blocks, scale, bias, min(1, scale.numel() - 1)]

    def forward(self, x):  # (..., in) -> (..., out)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} inputs, not {self.in_features}")

        is_row = x.numel() == self.in_features and x.is_cpu and not x.requires_grad
        if is_row and self.blocks.is_cpu and c_library() is not None:
            return self.row_in_c(x)

        # Several rows repay unpacking the weight; 1,024 rows of it become float32 at a
        # time.
        parts = unpack_ternary(self.packed, self.in_features).split(1024)
        y = torch.cat([x.float() @ part.float().t() for part in parts], dim=-1)
        y = y * self.scale.flatten()
        return (y if self.bias is None else y + self.bias).type_as(x)

    def row_in_c(self, x):
        """forward, of one row."""
        row = x.float().contiguous()
        y = row.new_empty(*x.shape[:-1], self.out_features)
        threads = torch.get_num_threads()
        tables = row.new_empty(threads * 8 * self.in_features)

        fields = self.fields()
        places = (row.data_ptr(), y.data_ptr(), tables.data_ptr())
        sizes = (self.out_features, self.in_features, threads)
        c_library().ternary_layer(struct_of(fields), *places, *sizes)
        return y.type_as(x)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # `packed` comes first, as in a PackedLinear: files are the same to the byte.
        destination[f"{prefix}packed"] = self.packed
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}blocks"]

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if f"{prefix}packed" in state_dict:
            packed = state_dict.pop(f"{prefix}packed")
            state_dict[f"{prefix}blocks"] = side_by_side(packed)

        super()._load_from_state_dict(state_dict, prefix, *rest)
