"""CSV files that say where they come from."""

import csv
import functools
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moelora
from moelora.report.machine import cpu
from moelora.report.timing import quartiles

Row = Mapping[str, str]


def columns(seconds: Sequence[float], unit: str) -> dict[str, str]:
    """Columns of a row: quartiles in "ms" or "us"."""
    scale, names = {"ms": 1e3, "us": 1e6}[unit], ("q1", "median", "q3")
    return {f"{unit}_{name}": f"{value * scale:.2f}" for name, value in zip(names, quartiles(seconds), strict=True)}


def environment(device: str) -> dict[str, str]:
    """The columns that say on what a row was measured: "cpu" or "cuda"."""
    if device == "cuda":
        return _gpu() | {"cpu": cpu()} | _versions()
    config = moelora.show_config(mode="dicts")
    return {
        "cpu": cpu(),
        "isa": config["instruction set"]["used"],
        "threads": str(torch.get_num_threads()),
        "openblas": config["blas"]["name"],
    } | _versions()


@functools.cache
def _gpu() -> dict[str, str]:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        drivers = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        drivers = []
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": drivers[0] if drivers else "",  # one for all GPUs
        "cuda": str(torch.version.cuda),
        "nvrtc": moelora.show_config(mode="dicts")["cuda"].get("nvrtc", ""),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "peft": version("peft"),
        "transformers": version("transformers"),
        "moelora": moelora.__version__,
    }


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], command: str, device: str = "cpu") -> None:
    """Write rows as they come, so that an interrupted run keeps what it measured; the first row names the columns.

    Threads and instruction set are those in force when a row comes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows:
            whole = {**row, **environment(device), "command": command}
            if writer is None:
                writer = csv.DictWriter(file, [*whole])
                writer.writeheader()
            writer.writerow(whole)
            file.flush()
            print("  ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none if there is no such file. One that is no CSV file, or has broken rows: ValueError."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} of {path} has not the columns of its head")
    return rows
