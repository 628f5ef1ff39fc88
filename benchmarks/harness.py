"""What the benchmarks share: interleaved timing, peak memory, and CSV files that say where they come from."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import moelora
from moelora.report.machine import cpu
from moelora.report.timing import interleave as interleave
from moelora.report.timing import peak_bytes as peak_bytes
from moelora.report.timing import quartiles as quartiles


def columns(seconds: Sequence[float], unit: str) -> dict[str, str]:
    """Columns of a row: quartiles in "ms" or "us"."""
    scale, names = {"ms": 1e3, "us": 1e6}[unit], ("q1", "median", "q3")
    return {f"{unit}_{name}": f"{value * scale:.1f}" for name, value in zip(names, quartiles(seconds), strict=True)}


def environment() -> dict[str, str]:
    """The columns that say on what a row was measured."""
    config = moelora.show_config(mode="dicts")
    return {
        "cpu": cpu(),
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
