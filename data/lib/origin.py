"""Where a result comes from: command, settings, versions and machine."""

import datetime
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data.lib.processes import processes
from data.lib.scores import count_parameters
from data.lib.transcript import takes_weight

PACKAGES = ("torch", "numpy", "tiktoken", "transformers")


def commit():
    """The first digits of the program's present commit, or "unknown"."""
    if not shutil.which("git"):
        return "unknown"
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(ask, capture_output=True, text=True)

    return answer.stdout.strip() or "unknown"


def machine():
    """The GPU, or the processor and how many threads torch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.machine()
    path = Path("/proc/cpuinfo")

    if path.exists():
        model = re.search(r"model name\s*: (.+)", path.read_text())
        processor = model[1] if model else processor

    return f"{processor}, {torch.get_num_threads()} threads"


def versions():
    """Python's version, and those of the packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def command_of(words):
    """The command line of a run, from its words."""
    _, world = processes()
    program = ["python"]
    if world > 1:
        program = ["torchrun", "--standalone", f"--nproc_per_node={world}"]
    return shlex.join([*program, "train_small.py", *words])


def how_it_was_made(setup, teacher):
    """What it takes to make a run again, as text: its command, the settings of teacher
    and student, and everything else, name -> value."""
    args, source = setup.args, setup.source
    tokens = {part: len(ids) for part, ids in setup.tokens.items()}
    configs = {"teacher": setup.teacher, "student": setup.student}
    read = [c.steps * c.batch_size * c.block_size for c in configs.values()]
    parameters = count_parameters(teacher)

    return {
        "command": command_of(args.words),
        "settings": {name: settings_of(c) for name, c in configs.items()},
        "init": source.init,
        "parameters": parameters,
        "tokens": tokens,
        "read": read,
        "others": {
            "model": f"{source.name}, {parameters:,} parameters",
            "the teacher starts": source.init,
            "quantizer": f"{args.bits} bits, one scale for each {args.granularity}",
            "text": setup.corpus,
            "tokens": ", ".join(f"{part} {size:,}" for part, size in tokens.items()),
            "tokenizer": source.tokenizer.name,
            "device": f"{setup.device}, {processes()[1]} process(es)",
            "machine": f"{machine()}, {platform.platform()}",
            "versions": versions(),
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        },
    }


def settings_of(config):
    """The fields of a TrainConfig as text, empty where its loss does not use them."""
    settings = {key: str(value) for key, value in asdict(config).items()}
    if config.loss != "tsld":
        settings["temperature"] = ""
    if not takes_weight(config.loss):
        settings["gt_weight"] = ""
    return settings
