"""The state of a training on disk, from which it goes on to the very same end.

A checkpoint is the same however many processes wrote it. Beside `name.pt` there is the
one before it, `name.previous.pt`.
"""

import hashlib
import json
import os

from torch.distributed.checkpoint import state_dict as sharded

from data.lib.files import read_checked, refusing, write_checked
from data.lib.processes import processes
from tsld import CheckpointError, config_of

# Each tensor as a whole and on the CPU, not the part of it that this process holds.
WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)

FOREIGN = "is no checkpoint of this program:"


def architecture(model):
    """All that says which model this is but for its weights."""
    return config_of(model) or repr(model)


def numbers_of(model):
    """All tensors that make its outputs. Some stand in no state dict."""
    return [*model.parameters(), *model.buffers()]


def key_of(made_of):
    """8 hexadecimal digits that stand for plain values, to name a file after them."""
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]


def previous(path):
    """Where the checkpoint before that at `path` is kept."""
    return path.with_suffix(".previous.pt")


def set_aside(paths):
    """Moves checkpoints of an earlier run to where load_checkpoint does not take them
    for those of a later one. The first process does it for all."""
    rank, _ = processes()
    for path in paths:
        if rank == 0 and path.exists():
            os.replace(path, previous(path))


def save_checkpoint(path, identity, model, optimizer, step, seconds, curve):
    """Writes the state after `step` steps, which took `seconds`. At any moment there is
    a whole one on disk. identity: plain values that say which run this is. curve: what
    was measured so far, a list of [step, value]. All processes call this, and the first
    one writes.

    After the last step the weights are all that anybody needs: the optimizer's averages
    are not kept, nor the checkpoint before."""
    state = {"identity": identity, "step": step, "seconds": seconds, "curve": curve}
    state["model"] = sharded.get_model_state_dict(model, options=WHOLE)
    is_last = step == identity["steps"]
    if not is_last:
        state["optimizer"] = sharded.get_optimizer_state_dict(
            model, optimizer, options=WHOLE
        )

    rank, _ = processes()
    if rank > 0:
        return
    new = path.with_suffix(".new.pt")
    write_checked(new, state)

    if path.exists():
        os.replace(path, previous(path))
    os.replace(new, path)
    if is_last:
        previous(path).unlink(missing_ok=True)


def load_checkpoint(path, identity, model, optimizer):
    """Fills model and optimizer. Returns step, seconds and curve; 0, 0.0 and [] where
    there is no checkpoint. Raises CheckpointError if it is damaged, foreign, or of
    another run."""
    # Between the renames of save_checkpoint there is the previous one alone.
    is_previous = not path.exists()
    if is_previous:
        path = previous(path)
    if not path.exists():
        return 0, 0.0, []

    state = read_state(path)
    with refusing(path, FOREIGN):
        found = dict(state["identity"])
        step = int(state["step"])
        seconds = float(state["seconds"])
        # Earlier versions of this program kept no curve.
        curve = [[int(at), float(value)] for at, value in state.get("curve", [])]
        names = sorted(found.keys() | identity.keys())
        differing = [name for name in names if found.get(name) != identity.get(name)]

    if differing and is_previous:
        return 0, 0.0, []  # an earlier run's, which was set aside
    for name in differing:
        values = difference(name, found.get(name), identity.get(name))
        raise CheckpointError(f"{path} is of another run: {values}; delete it")

    with refusing(path, FOREIGN):
        if not 0 < step <= identity["steps"] or not 0 <= seconds < 1e9:
            values = f"step {step} of {identity['steps']} after {seconds} seconds"
            raise ValueError(values)
        if step == identity["steps"]:
            restore_weights(model, state["model"])
        else:
            restore(model, optimizer, state["model"], state["optimizer"])
    return step, seconds, curve


def difference(name, found, wanted):
    """The two values in print; of dicts, those of the first name that differ."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return f"{name} is {found}, not {wanted}"

    names = found.keys() | wanted.keys()
    first = min(name for name in names if found.get(name) != wanted.get(name))
    return difference(first, found.get(first), wanted.get(first))


def read_state(path):
    """What a checkpoint holds. Raises CheckpointError, with a remedy, for a damaged
    one."""
    try:
        return read_checked(path)
    except CheckpointError as error:
        remedy = "delete it"
        if previous(path).exists():
            remedy += f", {previous(path)} is the one before it"
        raise CheckpointError(f"{error}: {remedy}") from None


def restore_weights(model, weights):
    """Fills a model that is trained. Raises an exception if anything does not fit."""
    if not weights:  # torch would take that for nothing to do
        raise ValueError("it has no weights")
    sharded.set_model_state_dict(model, weights, options=WHOLE)


def restore(model, optimizer, weights, averages):
    """Fills model and optimizer. Raises an exception if anything does not fit."""
    if not weights or not averages:  # torch would take that for nothing to do
        raise ValueError("it has no weights, or no averages")

    settings = settings_of(optimizer)
    model.zero_grad()  # torch fills no optimizer of a model that has gradients
    sharded.set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=averages,
        options=WHOLE,
    )

    # torch looks at neither of these.
    if settings_of(optimizer) != settings:
        raise ValueError(f"the optimizer had other settings than {settings}")

    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameter.shape:
                shapes = f"{tuple(state[name].shape)}, not {tuple(parameter.shape)}"
                raise ValueError(f"{name} of a parameter is {shapes}")


def settings_of(optimizer):
    """The optimizer's settings but for the learning rate, which each step sets."""
    changing = {"params": None, "lr": None}
    groups = optimizer.param_groups
    return [{**group, "betas": list(group["betas"]), **changing} for group in groups]
