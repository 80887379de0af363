"""Decoding in C: speed_up(model) makes a packed model generate text faster.

A new token takes one row of activations through every matrix of the model, and attends
from one position to those before it. speed_up replaces three kinds of layers by
subclasses that call fast.c for such a token:

    PackedLinear -> FastLinear     Head -> FastHead         Attention -> FastAttention

Whatever else comes to them (several rows, a gradient, a GPU) is left to PyTorch.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn

from tsld import Attention, Head, PackedLinear, unpack_ternary

SOURCE = Path(__file__).with_name("fast.c")
ROWS = 64  # of a ternary matrix stand side by side
LIMIT = 2**15  # columns: the tables of so many do not fit a thread's stack


@cache
def c_library():
    """fast.c, compiled for this processor by the command in CC, or by cc, in a fifth of
    a second. None, and one line on stderr, if that fails."""
    flags = "-O3 -march=native -fopenmp -fPIC -shared"
    compiler = f"{os.environ.get('CC', 'cc')} {flags}".split()

    try:
        # Once it is loaded, the file may go.
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "fast.so")
            command = [*compiler, str(SOURCE), "-lm", "-o", path]
            subprocess.run(command, capture_output=True, check=True)
            library = ctypes.CDLL(path)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"tsld: no C ({error}): generating is slower", file=sys.stderr)
        return None

    # Each function takes three arrays, then sizes.
    sizes = {"ternary_product": 2, "half_product": 2, "attention": 4}
    for name, count in sizes.items():
        types = 3 * [ctypes.c_void_p] + count * [ctypes.c_long]
        getattr(library, name).argtypes = types

    # A forked process has one thread, and would wait for OpenMP's others.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return library


def speed_up(model):
    """Replaces the layers of a packed model by those in C, in place, and returns the
    model, which tsld.save_model writes as before. Layers that fast.c does not take stay
    as they are, and so do all where it does not compile."""
    if c_library() is None:
        return model

    names = {}  # of each layer: one that is used twice has two
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer is not model:
            names.setdefault(layer, []).append(name)

    # Each layer is let go before the next one's matrix is copied.
    while names:
        layer, its_names = names.popitem()
        faster = in_c(layer)
        for name in its_names:
            model.set_submodule(name, faster)
    return model


def in_c(layer):
    """The layer that does in C what this one does, or this one."""
    if type(layer) is PackedLinear and FastLinear.fits(layer):
        return FastLinear(layer)
    if type(layer) is Head and layer.weight.dtype == torch.float16:
        return FastHead(layer)
    if type(layer) is Attention:
        return FastAttention(layer)
    return layer


def is_one_row(x):
    """Whether C takes x: one row of numbers on the CPU that has no gradient."""
    # Several rows repay what PyTorch does first: it unpacks the weight.
    is_one = x.numel() == x.shape[-1]
    return is_one and x.is_cpu and not x.requires_grad and c_library() is not None


def product_in_c(function, x, weight, out):
    """weight @ x, float32 (..., out), by a function of fast.c. x: one row (..., in)."""
    x = x.float().contiguous()
    y = x.new_empty(*x.shape[:-1], out)

    # Both are in local variables: their memory lasts as long as the call.
    function(x.data_ptr(), weight.data_ptr(), y.data_ptr(), out, x.numel())
    return y


def product_in_parts(x, weight):
    """x @ weight.T, (..., out) in x's dtype, of a weight in another dtype. 1,024 of its
    rows at a time are brought into x's: the whole would take too much memory."""
    parts = [x @ part.to(x.dtype).t() for part in weight.split(1024)]
    return torch.cat(parts, dim=-1)


def side_by_side(packed):
    """uint8 (out, in / 4), row by row -> (out / 64, in / 16, 64, 4), as in fast.c."""
    out, size = packed.shape
    blocks = packed.reshape(out // ROWS, ROWS, size // 4, 4)
    return blocks.transpose(1, 2).contiguous()


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
        return is_whole and layer.in_features < LIMIT and layer.packed.is_cpu

    @property
    def packed(self):
        """uint8 (out, in / 4), as tsld.pack_ternary makes it."""
        return self.blocks.transpose(1, 2).reshape(self.out_features, -1)

    def forward(self, x):  # (..., in) -> (..., out)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} inputs, not {self.in_features}")

        blocks = self.blocks
        if is_one_row(x) and blocks.is_cpu:
            function = c_library().ternary_product
            y = product_in_c(function, x, blocks, self.out_features)
        else:
            codes = unpack_ternary(self.packed, self.in_features)
            y = product_in_parts(x.float(), codes)

        # y · scale + bias
        scale = self.scale.flatten()
        bias = self.bias
        y = y * scale if bias is None else torch.addcmul(bias, y, scale)
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


class FastHead(Head):
    """A Head that multiplies one row in C, and several rows in parts."""

    def __init__(self, head):
        nn.Module.__init__(self)
        vars(self).update(vars(head))  # takes over its weight and settings

    def forward(self, x):  # (..., C) -> (..., V), in x's dtype
        weight = self.weight
        is_half = weight.dtype == torch.float16 and weight.is_cpu
        fits = is_half and weight.is_contiguous() and x.shape[-1] == weight.shape[1]

        if not (fits and is_one_row(x)):
            return product_in_parts(x, weight)

        y = product_in_c(c_library().half_product, x, weight, len(weight))
        return y.type_as(x)


class FastAttention(Attention):
    """An Attention that attends from one token over the cache in C."""

    def __init__(self, attention):
        nn.Module.__init__(self)
        vars(self).update(vars(attention))  # takes over its layers and settings

    def forward(self, x, cache=None, start=0, trace=False):
        """See Attention.forward."""
        is_plain = cache is not None and not trace and not self.training
        if not (is_plain and is_one_row(x)):
            return super().forward(x, cache, start, trace)

        # The cache must be that of one sequence, in one piece, and have room: C writes
        # wherever it is told to.
        H = self.n_head
        S = cache.shape[3]
        d = x.shape[-1] // H
        fits = cache.shape == (2, 1, H, S, d) and 0 <= start < S
        fits = fits and cache.is_cpu and cache.is_contiguous()

        qkv = self.c_attn(x)  # (1, 1, 3 C)
        is_float = qkv.dtype == cache.dtype == torch.float32
        if not (fits and is_float) or qkv.requires_grad:
            return super().forward(x, cache, start)

        # C writes the token's key and value into the cache, and attends to it.
        y = qkv.new_empty(x.shape)
        arrays = (qkv.data_ptr(), cache.data_ptr(), y.data_ptr())
        c_library().attention(*arrays, start, H, S, d)
        return self.c_proj(y), None
