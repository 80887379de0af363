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


# What Python raises by itself, and says little without its type.
ACCIDENTS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)


def reason_of(error):
    """What an exception of another program says, in one line. Where it was raised from
    another one, which says which setting is wrong, it is that one's line."""
    if not isinstance(error, OSError):
        error = error.__cause__ or error

    name = type(error).__name__
    lines = str(error).strip().splitlines()
    if not lines:
        return name
    return f"{name}: {lines[0]}" if isinstance(error, ACCIDENTS) else lines[0]
