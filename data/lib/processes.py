"""Several processes that train one model together, as torchrun starts them.

Each holds a part of every parameter, of its gradient and of the optimizer's averages
(PyTorch's fully_shard), and takes a part of every batch. One process alone is not
touched by any of this.
"""

import copy
import json
import os
import sys
import time
from contextlib import contextmanager, redirect_stdout, suppress

import torch
from torch import distributed, nn
from torch.distributed import fsdp


@contextmanager
def process_group():
    """Joins torchrun's processes, where there are any. The first one alone prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"

    distributed.init_process_group(backend)
    try:
        with open(os.devnull, "w") as nowhere:
            output = sys.stdout if distributed.get_rank() == 0 else nowhere
            with redirect_stdout(output):
                yield
    finally:
        distributed.destroy_process_group()


def tell_torchrun(message):
    """Has torchrun end its own report of a process that failed with this message."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return

    # The layout of torch.distributed.elastic's error files.
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    content = {"message": {"message": message, "extraInfo": extra}}
    with suppress(OSError), open(path, "w") as file:
        json.dump(content, file)


def processes():
    """This process's rank and the number of processes; (0, 1) without torchrun."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@contextmanager
def first_process_first():
    """The first process does what follows alone, then all others do. If it fails, the
    others go on, and fail by themselves."""
    rank, world = processes()
    if world > 1 and rank > 0:
        distributed.barrier()

    try:
        yield
    finally:
        if world > 1 and rank == 0:
            distributed.barrier()


def any_process(*values):
    """Each of the booleans, true if it is true in one of the processes, so that all of
    them do the same."""
    if not distributed.is_initialized():
        return list(values)

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    counts = torch.tensor(values, dtype=torch.int32, device=device)
    distributed.all_reduce(counts)
    return counts.bool().tolist()


def spread(model, device):
    """The model on its device. Where several processes train together, it is a copy, of
    whose parameters each process holds a part."""
    _, world = processes()
    if world == 1 or isinstance(model, fsdp.FSDPModule):
        return model.to(device)

    model = copy.deepcopy(model).to(device)
    for block in blocks_of(model):
        fsdp.fully_shard(block)
    fsdp.fully_shard(model)

    # Beside model(ids), these need the whole weights as well.
    for method in ("hidden", "generate"):
        if hasattr(model, method):
            fsdp.register_fsdp_forward_method(model, method)
    return model


def blocks_of(model):
    """The blocks of a language model: its longest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def shared(backward):
    """What tsld.train calls in place of `backward`, so that each process takes
    its part of the batch, with dropout of its own.

    The loss is the mean over all processes, and fully_shard makes the gradient the same
    mean: both are those of the whole batch if it divides by the number of processes.
    """
    rank, world = processes()
    if world == 1:
        return backward

    def share(student, teacher, ids, targets, config):
        torch.manual_seed(torch.initial_seed() + rank)
        rows = slice(rank, None, world)
        loss = backward(student, teacher, ids[rows], targets[rows], config)

        mean = loss / world
        distributed.all_reduce(mean)
        return mean

    return share
