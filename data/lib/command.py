"""What a command line needs beside argparse: numbers with bounds, and for every error
one line and an exit code."""

import argparse
import math
import os
import sys

import tsld
from data.lib.errors import UserError, is_out_of_memory
from data.lib.processes import process_group, tell_torchrun


def number(of_type, above=None, least=None, finite=True):
    """An argparse type: a number above a bound, or from a least one on."""

    def parse_number(text):
        bound = f"above {above}" if least is None else f"{least} or more"
        name = "whole number" if of_type is int else "number"
        try:
            value = of_type(text)
        except ValueError:
            value = math.nan
        is_in_range = value > above if least is None else value >= least
        if not is_in_range:
            raise argparse.ArgumentTypeError(f"{text!r} is no {name} {bound}")
        if finite and value >= 2**53:
            raise argparse.ArgumentTypeError(f"{text!r} is too large")
        return value

    return parse_number


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def make_parser(groups, takes, description, other_defaults):
    """groups: title -> flags, each (name, default, what argparse makes of the value,
    what it is for). takes: the names that this command has. other_defaults: by name."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, default, how, about in flags:
            default = other_defaults.get(name, default)
            if default is not None and default is not False:
                about += f" (default {default})"
            if name in takes:
                group.add_argument(f"--{name}", help=about.replace("%", "%%"), **how)
    return parser


def check_command(parser, flags, takes):
    """Raises UserError for a flag that the chosen command does not use. takes: command
    -> its flags. Where no flag names another one, it is training."""
    named = [name for name in takes if name.removeprefix("--") in flags]
    command = named[-1] if named else "training"

    unused = [f"--{name}" for name in flags if name not in takes[command]]
    if unused:
        parser.error(f"{', '.join(unused)} has no meaning for {command}")


def exit_code(command, argv):
    """Runs a command, a function of argv. Returns 0; with a line on stderr 2 for what
    the user can mend, 1 for a training that diverged, 130 for one that was stopped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for a terminal that has no τ

    try:
        with process_group():
            command(argv)
        return 0
    except (UserError, tsld.CheckpointError) as error:
        message, code = str(error), 2
    except OSError as error:  # a disk full, a file gone
        message, code = str(error), 2
        if error.filename:
            message = f"{error.filename}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "try --accumulate, or a smaller --batch-size or --block-size"
        message, code = f"not enough memory: {remedy}", 2
    except tsld.TrainingDiverged as error:
        message, code = str(error), 1
    except KeyboardInterrupt as error:
        message, code = str(error) or "interrupted; the checkpoints are kept", 130

    # torchrun's processes mostly meet the same error, which the first of them prints.
    line = f"error: {' '.join(message.split())}"
    if os.environ.get("LOCAL_RANK", "0") == "0" or code != 2:
        print(line, file=sys.stderr)
    tell_torchrun(line)
    return code
