"""What the user can mend, told apart from a mistake in the program."""

import torch


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


def is_out_of_memory(error):
    """Whether an exception says that there is too little memory.

    Python and NumPy raise MemoryError, and GPUs torch.OutOfMemoryError. For the memory
    of the CPU and of Apple's GPUs torch has no such type: it raises RuntimeError, and
    the name of the allocator in its text is all that tells it from other errors.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True

    allocators = ("DefaultCPUAllocator", "MPS backend out of memory")
    text = str(error)
    return isinstance(error, RuntimeError) and any(name in text for name in allocators)
