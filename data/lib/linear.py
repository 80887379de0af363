"""Linear layers as tsld.quantize_model looks for them: transformers' own classes become
nn.Linear, and an nn.Linear that is not simply called becomes something else."""

import torch
from torch import nn

from data.lib.checks import in_mode, random_ids

CONV1D = "transformers.pytorch_utils.Conv1D"
FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"


def linear_layers(model):
    """Makes layers of transformers' own linear classes, Conv1D and FalconLinear, plain
    nn.Linear, in place, and returns the model. tsld.quantize_model finds them then.

    A Conv1D's weight, (in, out), becomes a transposed copy. All other parameters stay
    the same ones. Raises ValueError, before any change, if such a layer does more than
    its class: it is of a subclass, or has hooks or a forward of its own.
    """
    layers = []
    for name, layer in model.named_modules():
        first, *others = classes_of(layer)
        if {CONV1D, FALCON_LINEAR}.isdisjoint([first, *others]):
            continue

        if first not in (CONV1D, FALCON_LINEAR):
            raise ValueError(f"{name} is a {first}, not a {others[0]}")
        if any(value for key, value in vars(layer).items() if key.endswith("_hooks")):
            raise ValueError(f"{name} has hooks, which an nn.Linear would lose")
        if "forward" in vars(layer):
            raise ValueError(f"{name} has a forward of its own, not its class's")
        layers.append(layer)

    for layer in layers:
        if is_conv1d(layer):
            transposed = layer.weight.detach().t()
            weight = transposed.clone(memory_format=torch.contiguous_format)
            layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
            layer.out_features, layer.in_features = weight.shape
        layer.__class__ = nn.Linear
    return model


def classes_of(layer):
    """The full names of a layer's class and of those that it is derived from."""
    return [f"{c.__module__}.{c.__qualname__}" for c in type(layer).__mro__]


def is_conv1d(layer):
    """Whether it is transformers' Conv1D. PyTorch's is another thing."""
    return classes_of(layer)[0] == CONV1D


class Watched(nn.Module):
    """A linear layer that notes whether anything else is done with it than to call it.
    A packed layer has no weight to be read, and a quantized one does not quantize what
    is read."""

    def __init__(self, layer):
        super().__init__()
        self.watched = [layer]  # no submodule of this one
        self.is_read = False

    def forward(self, x):
        return self.watched[0](x)

    def __getattr__(self, name):
        if name not in ("bias", "in_features"):
            self.is_read = True
        return getattr(self.watched[0], name)


@torch.no_grad()
def layers_that_are_read(model):
    """The nn.Linear layers, name to layer, of which a forward pass reads more than
    their bias: it multiplies by the weight itself, or asks for its type."""
    layers = {}
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if type(module) is nn.Linear and module is not model.lm_head:
            layers[name] = module
    watched = {layer: Watched(layer) for layer in layers.values()}

    for name, layer in layers.items():
        model.set_submodule(name, watched[layer])
    try:
        for training in (True, False):  # there may be a faster way in one of them
            with in_mode(training, model):
                model(random_ids(model))
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)

    return {name: layer for name, layer in layers.items() if watched[layer].is_read}


class ExactLinear(nn.Module):
    """A linear layer that tsld.quantize_model does not see."""

    forward = nn.Linear.forward


def keep_exact(layers):
    """Makes each nn.Linear a layer that stays in full precision, in place. It keeps all
    that it has: parameters, names, hooks, a forward of its own."""
    for layer in layers:
        layer.__class__ = ExactLinear
