"""What a causal language model of another program has to be like, judged by what its
loader reports and by what the model computes.

Every check raises ValueError that names one cause; UserError where it is the command's.
"""

import copy
import warnings
from contextlib import contextmanager, suppress

import torch
from torch import nn

import tsld
from data.lib.devices import check_memory
from data.lib.errors import UserError, reason_of
from tsld import QuantLinear

# The share of a student's matrix weights that may stay as they were. Convolutions and
# the like are below it, experts that share one parameter are far above.
LARGEST_EXACT_SHARE = 0.05


# --------------------------------------------------------------------------------------
# A model as it was loaded


def check_loaded(model, info, stored):
    """Raises ValueError if the weights in a model's files are not those of the model:
    whatever is missing would be random numbers. info: transformers' loading info, from
    which transformers has taken what is tied, or what the model says is not needed.
    stored: the tensors in the files."""
    unexpected = [x for x in info["unexpected_keys"] if not is_computed(x, model)]

    faults = []
    if info["missing_keys"]:
        faults.append(f"lack {first_of(sorted(info['missing_keys']))}")
    if unexpected:
        faults.append(f"have {first_of(sorted(unexpected))}, unknown to the model")

    differing = {name: shapes for name, *shapes in info["mismatched_keys"]}
    if differing:
        names = sorted(differing)
        in_file, in_model = map(tuple, differing[names[0]])
        shapes = f"of shape {in_file}, where the model's is {in_model}"
        faults.append(f"have {first_of(names)} {shapes}")

    # transformers would take the whole numbers of a code for the weights.
    names = [name for name in sorted(stored) if name.endswith("weight")]
    codes = [name for name in names if not stored[name].is_floating_point()]
    if codes:
        faults.append(f"have {first_of(codes)} in {stored[codes[0]].dtype}")

    if faults:
        message = "; ".join(f"they {fault}" for fault in faults)
        raise ValueError(f"its weights are not those of its config.json: {message}")


def compared(model, stored):
    """The loading info of tensors that transformers could not load, by their names in
    the files. model: as its config.json makes it, on the meta device."""
    tied = getattr(model, "all_tied_weights_keys", {})
    written = model.state_dict()
    with suppress(ImportError):  # which transformers before 5 wrote as they are
        from transformers.core_model_loading import revert_weight_conversion

        written = revert_weight_conversion(model, written)

    both = written.keys() & stored.keys()
    shapes = [(name, stored[name].shape, written[name].shape) for name in both]
    return {
        "missing_keys": written.keys() - both - tied.keys(),
        "unexpected_keys": stored.keys() - both,
        "mismatched_keys": [s for s in shapes if s[1] != s[2]],
    }


def is_computed(name, model):
    """Whether a name in a file is of what the model now computes: older files have
    their causal masks and what was added where these are 0, with a prefix or without.
    """
    buffers = [f".{buffer}" for buffer, _ in model.named_buffers()]
    ends_alike = [b.endswith(f".{name}") or f".{name}".endswith(b) for b in buffers]
    return any(ends_alike) or name.endswith("attn.masked_bias")


def first_of(names):
    """The first of a list of names in print, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def check_numbers(model):
    """Raises ValueError if a parameter is not float32, or not finite. Steps that are
    small beside a weight are lost in fewer digits."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}, and not torch.float32")
        if not parameter.isfinite().all():
            raise ValueError(f"{name} is not all finite")


def check_tied(model):
    """Makes one weight of two where the settings of a model of transformers say so, and
    its files hold both. Raises ValueError if they differ."""
    if not hasattr(model, "get_expanded_tied_weights_keys"):  # before transformers 5
        return

    weights = dict(model.named_parameters(remove_duplicate=False))
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name, other in tied.items():
        weight, same = weights.get(name), weights.get(other)
        if weight is same:
            continue

        if weight is None or same is None or not torch.equal(weight, same):
            words = f"its settings make one weight of {name} and {other}, which differ"
            raise ValueError(f"{words}: set tie_word_embeddings to false")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, same)


# --------------------------------------------------------------------------------------
# What it computes


def random_ids(model, length=8):
    """Tokens, always the same, int64 (1, T). T is `length`, or the model's longest."""
    length = min(length, model.config.block_size)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=rng)
    return ids.to(next(model.parameters()).device)


@contextmanager
def in_mode(training, model):
    """The model in training or not inside; afterwards each module's own mode again."""
    with tsld.evaluating(model):
        model.train(training)
        try:
            yield
        finally:
            model.eval()


@contextmanager
def other_numbers(model):
    """The model inside with random numbers in its head, and in all its norms, biases
    and factors; afterwards with its own again. A head of zeros, or a factor that is
    still 1, would hide what is done with it."""
    head = getattr(model.lm_head, "weight", None)
    rng = torch.Generator().manual_seed(0)

    own = []
    try:
        for parameter in model.parameters():
            is_vector = parameter.numel() == max(parameter.shape, default=1)
            if parameter is not head and not is_vector:
                continue

            own.append((parameter, parameter.detach().clone()))
            numbers = torch.randn(parameter.shape, generator=rng)
            if is_vector:
                numbers = 0.5 + numbers.abs()  # a factor may have to be positive
            parameter.data.copy_(numbers)
        yield
    finally:
        for parameter, numbers in own:
            parameter.data.copy_(numbers)


@torch.no_grad()
def check_causal(model):
    """Raises ValueError if the model does not take tokens alone, does not give a logit
    for each of those that it can read, or sees the future: if earlier logits change
    with the last token."""
    ids = random_ids(model)
    check_length(model, ids.shape[1])
    logits = model(ids)
    vocab_size = model.config.vocab_size
    if logits.shape[:-1] != ids.shape or logits.shape[-1] < vocab_size:
        wanted = f"(1, {ids.shape[1]}, {vocab_size})"
        raise ValueError(
            f"its logits have shape {tuple(logits.shape)}, and not {wanted}"
        )
    if not (logits.abs() < 1e34).all():  # or a loss of them is not finite
        raise ValueError("its logits are not all finite and below 1e34")
    if ids.shape[1] == 1:  # there is no earlier one
        return

    ids[0, -1] = (ids[0, -1] + 1) % vocab_size
    change = (model(ids) - logits)[:, :-1].abs().max().item()
    if change > 1e-4 * logits.abs().max().item():
        message = f"with another last token earlier logits change by {change:.2g}"
        raise ValueError(f"it is no causal language model: {message}")


@torch.no_grad()
def check_length(model, length, dtype=torch.float32):
    """Raises ValueError if the model does not take so many tokens. Its configuration
    may say that it does, or nothing at all. dtype: of the products."""
    ids = random_ids(model, length)
    is_mixed = dtype != torch.float32
    try:
        with torch.autocast(ids.device.type, dtype, enabled=is_mixed):
            model(ids)
    except Exception as error:  # of any type: an index, a shape, a limit of its own
        message = f"it does not take {length} tokens in {dtype}: {reason_of(error)}"
        raise ValueError(message) from None


@torch.no_grad()
def runs_in(dtype, model):
    """Whether the model computes if all its parameters are of another dtype: some mix
    them with numbers of a dtype that they have chosen themselves."""
    try:
        copy.deepcopy(model).to(dtype)(random_ids(model))
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def logits_are_hidden_times_head(model):
    """Whether model(ids) is model.hidden(ids) @ model.lm_head.weight.T and nothing
    more, in training too. A soft cap shows at large logits alone, dropout in training
    alone, and a product with matrices of zeros in the parameters alone.
    """
    head = model.lm_head
    weight = getattr(head, "weight", None)
    is_matrix = isinstance(weight, nn.Parameter) and weight.dim() == 2
    base = model.inner.base_model
    if not is_matrix or base is model.inner:
        return False

    inside = {id(parameter) for parameter in (weight, *base.parameters())}
    if any(id(parameter) not in inside for parameter in model.inner.parameters()):
        return False

    with other_numbers(model):
        for training, factor in ((False, 1), (True, 1), (False, 2**12)):
            weight.mul_(factor)
            with in_mode(training, model):
                if not is_hidden_times_weight(model, weight):
                    return False
    return True


def is_hidden_times_weight(model, weight):
    """The same for a few tokens, in the model's present mode and with its numbers."""
    ids = random_ids(model)

    # Both passes draw the same dropout.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = model.hidden(ids)
        torch.manual_seed(0)
        logits = model(ids)

    if hidden.dim() != 3 or hidden.shape[-1] != weight.shape[1]:
        return False
    expected = hidden @ weight.t()
    if expected.shape != logits.shape or not expected.isfinite().all():
        return False
    tolerance = 1e-5 * expected.abs().max().item()
    return torch.allclose(logits, expected, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------
# What quantization leaves out


def quantized_copy(model, bits, granularity, name):
    """A copy whose linear layers are quantized. name: what --model says. Raises
    UserError if it has none, or one that cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # check_student says what stays exact
            return tsld.quantize_model(copy.deepcopy(model), bits, granularity)
    except ValueError as error:
        raise UserError(f"--model {name}: {error}") from None


def exact_matrices(student):
    """What stays in full precision in a quantized model though it is neither embedding
    nor output head nor norm: a list of names, and their share of the weights that are
    in matrices. Whatever has two dimensions or more counts as a matrix."""
    spared = {id(getattr(student.lm_head, "weight", None))}
    quantized = set()
    for module in student.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        is_norm = "norm" in type(module).__name__.lower()
        if is_norm or isinstance(module, nn.Embedding):
            spared |= own
        if isinstance(module, QuantLinear):
            quantized.add(id(module.weight))

    exact = {}
    total = 0
    for name, parameter in student.named_parameters():
        is_exact = id(parameter) not in quantized
        if is_exact and (parameter.dim() < 2 or id(parameter) in spared):
            continue

        total += parameter.numel()
        if is_exact:
            exact[name.removeprefix("inner.")] = parameter.numel()

    names = sorted(exact, key=exact.get, reverse=True)
    return names, sum(exact.values()) / max(1, total)


def check_student(student, setup):
    """Raises UserError if a run cannot train the student, a quantized model, or if too
    much of it is not quantized. Says what is not, if it is little."""
    name, config = setup.source.name, setup.student
    check_memory(setup.device, student, config)
    try:
        check_length(student, config.block_size, getattr(torch, config.dtype))
    except ValueError as error:
        message = f"--model {name}: {error}"
        with suppress(ValueError):
            check_length(student, config.block_size, torch.float32)
            message = f"{message.rstrip('.')}: take --dtype float32"
        raise UserError(message) from None

    names, share = exact_matrices(student)
    if not names:
        return

    what = f"{share:.1%} of its matrix weights, in no layer that is quantized"
    if share > LARGEST_EXACT_SHARE:
        message = f"--model {name} would keep full precision in {what}"
        raise UserError(f"{message}: {first_of(names)}")
    print(f"full precision: {what}: {first_of(names)}", flush=True)
