"""Clocks for the benchmarks: functions that are timed in turns, and memory that is
measured in processes of its own."""

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def timed(function, calls, device):
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()

    return (time.perf_counter() - begin) / calls


def seconds_per_call(functions, device, rounds=7, least=0.05):
    """Name to the median seconds of a function. They are called in turns of `least`
    seconds, so that all meet the same noise."""
    calls = {}
    for name, function in functions.items():
        function()  # compiles what is compiled
        calls[name] = math.ceil(least / timed(function, 1, device))

    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function, calls[name], device))

    return {name: statistics.median(times) for name, times in seconds.items()}


def print_ratios(title, unit, values, larger_is_better=False):
    """values: name to number; the first one is the baseline."""
    print(f"\n{title:52}{unit:>14}{'ratio':>8}")
    baseline = next(iter(values.values()))

    for name, value in values.items():
        ratio = value / baseline if larger_is_better else baseline / value
        print(f"  {name:50}{value:14,.1f}{ratio:8.2f}")


def instruction_sets():
    """What of this processor's vector instructions decides the speed of products."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.exists() else []
    names = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    found = " ".join(name for name in names if name in flags)

    return found or "instruction sets unknown"


def peak_memory():
    """Bytes that this process has had resident at most; 0 where the system does not
    say."""
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    kilobytes = path.read_text().split("VmHWM:")[1].split()[0]

    return 1024 * int(kilobytes)


def in_new_process(module, function, *arguments):
    """What a function of this room prints, as JSON, in a process whose memory is all
    its own. Arguments are written as Python has them."""
    code = (
        f"from data.evidence.speed import {module}\n{module}.{function}(*{arguments})"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)

    return json.loads(printed)
