"""What the benchmarks share: interleaved timing, peak memory, and CSV files that say where they come from."""

from __future__ import annotations

import csv
import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import moelora


def interleave(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times each: A B C, C B A, A B C, ... so that drift and order hit all alike."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        order = list(functions) if i % 2 == 0 else list(reversed(functions))
        for name in order:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def columns(seconds: Sequence[float], unit: str) -> dict[str, str]:
    """Columns of a row: quartiles in "ms" or "us"."""
    scale, names = {"ms": 1e3, "us": 1e6}[unit], ("q1", "median", "q3")
    return {f"{unit}_{name}": f"{value * scale:.1f}" for name, value in zip(names, quartiles(seconds), strict=True)}


def peak_bytes(function: Callable[[], object]) -> int:
    """Growth of this process's resident memory at its highest point during the call (Linux only).

    The allocator first gives back what it holds, then the kernel's high-water mark is reset.
    """
    function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def environment() -> dict[str, str]:
    """The columns that say on what a row was measured."""
    config = moelora.show_config(mode="dicts")
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "isa": config["instruction set"]["used"],
        "threads": str(torch.get_num_threads()),
        "openblas": config["blas"]["name"],
        "torch": torch.__version__,
        "moelora": moelora.__version__,
    }


def write_csv(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """Write rows as they come, so that an interrupted run keeps what it measured; the first row names the columns."""
    about = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, [*row, *about, "command"])
                writer.writeheader()
            writer.writerow({**row, **about, "command": "python " + " ".join(sys.argv)})
            file.flush()
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
