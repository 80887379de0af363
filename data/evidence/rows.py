"""What the evidence's scripts share: rows that a command measures one after another,
and the tables that are made of them.

A row is one measurement: its setting, what was measured, the command, commit, machine
and date. The rows of a room stand in JSON files beside its scripts, and so does
tables.md, which a script makes of them.

Which flags write into a room: each script lists the commands that its README documents.
The flags of one of these, in any order, write beside the script. All other flags write
the same files into --out. So a try never changes what the repository shows."""

import datetime
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch

from data.lib.command import Parser
from data.lib.files import read_json, write_text
from data.lib.folder import check_folder
from data.lib.origin import commit, machine

EVIDENCE = Path(__file__).resolve().parent
# Flags that say where a command runs and what it goes on with, not what it measures.
WHEREABOUTS = ("out", "device", "resume")
METHODS = {
    "gt": "ground truth alone",
    "l2l": "L2L+logit",
    "logit_gt": "logit+GT",
    "logit": "logit",
    "tsld": "TSLD",
}


# --------------------------------------------------------------------------------------
# Commands


def place(room, argv, out, documented):
    """The folder that a command's files go to: `room`, where its flags are those of a
    documented command line, else the folder --out.

    argv: the command's words; documented: lines of words, without the module's name."""
    for line in documented:
        if flags_of(line.split()) == flags_of(argv):
            return room

    print(f"results: in {out}, because {room} has none with these flags", flush=True)
    return check_folder(out)


def flags_of(words):
    """Flag to value, without the whereabouts. A seed that is not named is 0."""
    flags = {"--seed": "0"}

    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags[flag] = value
        else:
            flags[flag] = word

    measured = flags.keys() - {f"--{name}" for name in WHEREABOUTS}
    return {flag: flags[flag] for flag in measured}


def words_parser(module, about):
    """The parser of a command that takes words, and not the flags of train_small."""
    name = f"python -m data.evidence.{module}"
    return Parser(prog=name, description=about, allow_abbrev=False)


# --------------------------------------------------------------------------------------
# Rows


def fill(path, wanted, measure, label, module):
    """Measures the rows that `path` lacks, one after another, and writes each as soon
    as it is there.

    wanted: settings, each a dict; a row with all its values is its row.
    measure(setting): what was measured, a dict. label(setting): names it in a line.
    module: the script's name below data.evidence, for the row's command."""
    for number, setting in enumerate(wanted, 1):
        if any(setting.items() <= row.items() for row in read_json(path, [])):
            continue

        print(f"{number} of {len(wanted)}: {label(setting)}", flush=True)
        row = setting | measure(setting) | where_and_when(module)

        # Read again: in the meantime another process may have added to the file.
        rows = [*read_json(path, []), row]
        write_text(path, json.dumps(rows, indent=1) + "\n")


def read_rows(folder, pattern):
    """All rows of the files of a folder whose names match, in the order of the
    names."""
    files = sorted(folder.glob(pattern))
    return [row for file in files for row in read_json(file, [])]


def where_and_when(module):
    """What a result needs beside it to be believed."""
    words = [f"python -m data.evidence.{module}", *sys.argv[1:]]
    return {
        "command": " ".join(words),
        "commit": commit(),
        "machine": f"{machine()}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


# --------------------------------------------------------------------------------------
# Tables


class Table(NamedTuple):
    """A table of tables.md, with what a reader needs to understand it."""

    title: str
    text: str
    columns: list
    lines: list  # of cells, one for each column


def mean_and_spread(values, digits=2):
    """The mean ± the standard deviation of numbers, as text; "" where there are none.
    Where all are alike there is no spread to show."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if mean >= 1e5:
        return f"{mean:,.0f}"
    if len({*values}) == 1:
        return f"{mean:.{digits}f}"

    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def over_seeds(rows, key, digits=2):
    """The mean and spread of a value over the seeds, and how many these are."""
    # A teacher's value stands in the row of each of its students.
    values = {row["seed"]: row[key] for row in rows}.values()
    if not values:
        return ""

    return f"{mean_and_spread(list(values), digits)} ({len(values)})"


def infinite(temperature):
    """A temperature as text; infinity, or None, is no token scale."""
    if temperature is None or math.isinf(temperature):
        return "∞"
    return f"{temperature:g}"


def markdown(columns, lines):
    """A table as Markdown."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def page(command, tables):
    """tables.md: its text. command: what makes it, below data.evidence."""
    text = f"Made by `python -m data.evidence.{command}`; not to be edited by hand.\n"

    for table in tables:
        text += f"\n## {table.title}\n\n"
        if table.text:
            text += textwrap.fill(table.text, 100) + "\n\n"
        text += markdown(table.columns, table.lines)

    return text


def write_page(folder, text):
    """Writes tables.md, and shows it."""
    write_text(folder / "tables.md", text)
    print(f"\n{text}\ntables: {folder / 'tables.md'}")
