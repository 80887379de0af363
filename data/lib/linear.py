"""Linear layers as tsld.quantize_model looks for them: transformers' own classes become
nn.Linear, and an nn.Linear that is not simply called becomes something else."""

import torch
from torch import nn
from torch.nn import functional as F

from data.lib.checks import random_ids


def linear_layers(model):
    """Replaces transformers' own classes of linear layers, Conv1D and FalconLinear, by
    nn.Linear, in place, and returns the model. tsld.quantize_model finds them then.

    A Conv1D's weight, (in, out), becomes a transposed copy. All other parameters stay
    the same ones, and a layer that is used twice stays one layer.
    """
    replaced = {}
    for name, layer in [*model.named_modules(remove_duplicate=False)]:
        if not is_conv1d(layer) and type(layer).__name__ != "FalconLinear":
            continue

        # The second name of a layer gets what the first one got.
        if layer not in replaced:
            replaced[layer] = as_linear(layer)
        model.set_submodule(name, replaced[layer])

    return model


def is_conv1d(layer):
    """Whether it is transformers' Conv1D: PyTorch's has no nx and nf, its two sizes."""
    return type(layer).__name__ == "Conv1D" and {"nx", "nf"} <= vars(layer).keys()


def as_linear(layer):
    """The nn.Linear that computes what a Conv1D or a FalconLinear does."""
    weight = layer.weight
    if is_conv1d(layer):
        transposed = weight.detach().t().clone(memory_format=torch.contiguous_format)
        weight = nn.Parameter(transposed, weight.requires_grad)

    out_features, in_features = weight.shape
    with torch.device("meta"):  # allocates no parameters that are replaced below
        linear = nn.Linear(in_features, out_features, layer.bias is not None)

    linear.weight = weight
    linear.bias = layer.bias
    return linear.train(layer.training)


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

    was_training = model.training
    for name, layer in layers.items():
        model.set_submodule(name, watched[layer])
    try:
        for training in (True, False):  # there may be a faster way in one of them
            model.train(training)
            model(random_ids(model))
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        model.train(was_training)

    return {name: layer for name, layer in layers.items() if watched[layer].is_read}


class ExactLinear(nn.Module):
    """A linear layer that tsld.quantize_model does not see."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def keep_exact(model, layers):
    """Replaces nn.Linear layers by ones that stay in full precision, with the same
    parameters, in place. layers: name to layer."""
    exact = {layer: ExactLinear(layer) for layer in layers.values()}
    for name, layer in layers.items():
        model.set_submodule(name, exact[layer])
