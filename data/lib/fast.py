"""Decoding in C: speed_up(model) makes a packed model generate text faster.

A new token takes one row of activations through every matrix of the model. For one row,
fast.c multiplies by a packed matrix without unpacking it (FastLinear), and for one
sequence it takes the whole step of a token through our GPT (FastGPT). Whatever else
comes to them (several rows, a gradient, a GPU) is left to PyTorch.
"""

import torch
from torch import nn

import tsld
from data.lib import fast_linear
from data.lib.fast_linear import FastLinear
from tsld import GPT, Attention, Block, PackedLinear

LONG = 256  # tokens of a prompt that repay what PyTorch does first: it unpacks weights


def speed_up(model):
    """Replaces the packed layers of a model by those in C, in place, has a GPT continue
    one sequence in C, and returns the model, which tsld.save_model writes as before.

    What fast.c does not take stays as it is, and so does all where it does not compile.
    """
    if fast_linear.c_library() is None:
        return model

    faster = {}  # a layer that is used twice stays one layer
    for name, layer in [*model.named_modules(remove_duplicate=False)]:
        if type(layer) is GPT:
            layer.__class__ = FastGPT  # it has the same parts
        if type(layer) is PackedLinear and FastLinear.fits(layer) and name:
            if is_watched(layer):
                continue
            if layer not in faster:
                faster[layer] = FastLinear(layer)
            model.set_submodule(name, faster[layer])

    return model


def is_watched(module):
    """Whether a call does more than its class says: by a hook, or its own forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


class FastGPT(GPT):
    """A GPT that continues one sequence in C where all its layers are as load_model and
    speed_up make them: FastLinear, float16 embeddings, and float32 for the rest."""

    @torch.inference_mode()
    def stream(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Yields what GPT.stream does."""
        fields = self.fields() if self.takes(ids, max_new_tokens) else None
        if fields is None:
            yield from super().stream(ids, max_new_tokens, temperature, top_k)
            return

        T = ids.shape[1]
        S = T + max_new_tokens
        H = self.config.n_head
        V, C = self.wte.weight.shape
        cache = torch.empty(len(self.h), 2, 1, H, S, C // H)
        logits = torch.empty(1, V)
        threads = torch.get_num_threads()
        work = torch.empty(6 * C + threads * 32 * C)

        # PyTorch reads a long prompt, but for its last token.
        start = 0
        if T > LONG:
            start = T - 1
            with tsld.evaluating(self):
                self.hidden(ids[:, :start], [*cache])

        step = fast_linear.c_library().token_step
        model = fast_linear.struct_of(fields)
        sizes = (len(self.h), H, C, V, S)
        tokens = ids[0].tolist()
        for n in range(start, S - 1):
            # From the last token of the prompt on, it is asked what follows.
            is_asked = n >= T - 1
            asked = logits.data_ptr() if is_asked else None
            places = (cache.data_ptr(), asked, work.data_ptr())
            threads = min(threads, torch.get_num_threads())  # fewer after a fork
            step(model, *places, tokens[n], n, *sizes, threads)

            if is_asked:
                new = tsld.sample(logits, temperature, top_k)
                tokens.append(new.item())
                yield new

    def takes(self, ids, max_new_tokens):
        """Whether C continues these ids. What is not right, GPT.stream refuses."""
        is_one = ids.dim() == 2 and len(ids) == 1 and ids.numel() > 0
        is_right = is_one and ids.is_cpu and ids.dtype == torch.int64
        if not is_right or fast_linear.c_library() is None:
            return False

        is_in_vocabulary = ids.min() >= 0 and ids.max() < self.config.vocab_size
        room = self.config.block_size - ids.numel()
        return is_in_vocabulary and 0 < max_new_tokens <= room

    def fields(self):
        """What fast.c reads of it, in the order of its struct gpt. None if some part is
        not what it was written for, or is watched by a hook."""
        if any(is_watched(module) for module in self.modules()):
            return None

        layers = [self.ln_f]
        for block in self.h:
            if type(block) is not Block or type(block.attn) is not Attention:
                return None
            layers += [block.ln_1, block.attn.c_attn, block.attn.c_proj]
            layers += [block.ln_2, block.mlp.c_fc, block.mlp.c_proj]

        halves = [self.wte.weight, self.wpe.weight, self.lm_head.weight]
        rest = []
        for layer in layers:
            if type(layer) is FastLinear:
                rest += layer.fields()
            elif type(layer) is nn.LayerNorm and layer.eps == 1e-5:
                rest += [layer.weight, layer.bias]
            else:
                return None

        tensors = [field for field in rest if isinstance(field, torch.Tensor)]
        is_right = all(t.dtype == torch.float16 for t in halves)
        is_right &= all(t.dtype in (torch.float32, torch.uint8) for t in tensors)
        is_right &= all(t.is_cpu and t.is_contiguous() for t in halves + tensors)
        return halves + rest if is_right else None
