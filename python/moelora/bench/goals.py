"""The goals of the kernels, and which measured cells meet them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from moelora.bench.record import Row, read_csv
from moelora.report.table import Section
from moelora.report.table import render as as_tables

SLACK = 1.02  # beyond a goal, and still met

# What makes a cell of a file, besides the peer.
_CPU_CELL = {
    "layers": ("T", "d", "N", "r", "dtype", "isa", "pass", "weights"),
    "topk": ("what", "T", "d", "N", "r", "k", "dtype", "pass"),
    "neighbours": ("what", "T", "d", "N", "r", "threads", "pass"),
    "models": ("model", "B", "S", "N", "r", "dtype", "p", "what"),
    "host": ("what", "T", "N", "pass"),
}
_GPU_CELL = {
    "layers": ("T", "d_in", "d_out", "N", "r", "adapters", "timed", "pass"),
    "topk": ("what", "T", "d", "N", "r", "k", "timed", "pass"),
    "neighbours": ("what", "model", "T", "N", "r", "timed", "pass"),
    "models": ("model", "B", "S", "N", "r", "p", "what", "timed"),
    "host": ("what", "T", "N", "pass"),
}
CELL = {"cpu": _CPU_CELL, "cuda": _GPU_CELL}
FILES = ("peak", *_CPU_CELL)

Results = Mapping[str, Sequence[Row]]


class Goal(NamedTuple):
    """What cells of a file shall reach.

    `cells` picks the rows: for each column named, a pattern of its text, or a range of numbers, "64..128" with both
    ends or "64.." with one. R is N times r. `quantity` is

        "ratio"  the row's median over that of the row that differs by `against`
        "floor"  the same over 1 + R / d_in + R / d_out, which counts the mixture's products
        "added"  the row's median less that of the row that differs by `against`, in microseconds
        "memory" the row's peak memory over that of the row that differs by `against`
        "us"     the row's median in microseconds
        "peak"   the row's share of the peak that was measured in the same run; at least the limit, all others at most
        "kept"   bytes kept for the backward over those of x, H and w
    """

    title: str
    file: str
    cells: str
    limit: float
    against: str = ""
    quantity: str = "ratio"


_HOT = "peer=moelora weights=hot"
_F32 = f"{_HOT} dtype=float32 isa=avx512* forced=no R=64..128"
_AVX2 = f"{_HOT} dtype=float32 isa=avx2 R=64..128"
_BF16 = f"{_HOT} dtype=bfloat16* isa=avx512* forced=no R=64..128"
_WHOLE = "peer=moelora_weight weights=hot dtype=float32 isa=avx512* forced=no R=64..64 pass=forward"
_COLD = "peer=moelora weights=cold dtype=float32 isa=avx512* forced=no R=64..128"
_MODEL = "peer=moelora what=train?step dtype=float32"

_ON_CPU = (
    Goal("f32 AVX-512 forward, T <= 16", "layers", f"{_F32} pass=forward T=..16", 0.45, "peer=stacked"),
    Goal("f32 AVX-512 forward, T = 64", "layers", f"{_F32} pass=forward T=64", 0.65, "peer=stacked"),
    Goal("f32 AVX-512 forward, T >= 256", "layers", f"{_F32} pass=forward T=256..", 0.50, "peer=stacked"),
    Goal("f32 AVX-512 gradients, T >= 256", "layers", f"{_F32} pass=backward T=256..", 0.48, "peer=stacked"),
    Goal("f32 AVX2 forward, T <= 16", "layers", f"{_AVX2} pass=forward T=..16", 0.75, "peer=stacked"),
    Goal("f32 AVX2 forward, T >= 64", "layers", f"{_AVX2} pass=forward T=64..", 0.90, "peer=stacked"),
    Goal("f32 AVX2 gradients, T >= 256", "layers", f"{_AVX2} pass=backward T=256..", 0.85, "peer=stacked"),
    Goal("bf16 forward, T <= 4", "layers", f"{_BF16} pass=forward T=..4", 0.35, "peer=stacked"),
    Goal("bf16 forward, T = 16", "layers", f"{_BF16} pass=forward T=16", 0.45, "peer=stacked"),
    Goal("bf16 forward, T = 64", "layers", f"{_BF16} pass=forward T=64", 0.80, "peer=stacked"),
    Goal("bf16 forward, T >= 256", "layers", f"{_BF16} pass=forward T=256..", 0.95, "peer=stacked"),
    Goal("bf16 gradients", "layers", f"{_BF16} pass=backward", 1.00, "peer=stacked"),
    Goal("f32 against medium, T <= 4", "layers", f"{_F32} pass=forward T=..4", 0.60, "peer=stacked_medium"),
    Goal("f32 against medium, T = 16", "layers", f"{_F32} pass=forward T=16", 0.90, "peer=stacked_medium"),
    Goal("f32 against medium, T >= 64", "layers", f"{_F32} pass=forward T=64..", 1.00, "peer=stacked_medium"),
    Goal("any cell, forward", "layers", f"{_HOT} forced=no pass=forward", 1.00, "peer=stacked"),
    Goal("any cell, forward + backward", "layers", f"{_HOT} forced=no pass=forward+backward", 1.00, "peer=stacked"),
    Goal("whole layer, d >= 2048, T >= 4", "layers", f"{_WHOLE} d=2048.. T=4..", 0.55, "peer=base"),
    Goal("whole layer, d = 768, T >= 4", "layers", f"{_WHOLE} d=768 T=4..", 0.70, "peer=base"),
    Goal("whole layer, T = 1", "layers", f"{_WHOLE} T=1", 0.65, "peer=base"),
    Goal("f32 AVX-512, cold weights, T = 1", "layers", _COLD, 0.45, "peer=stacked"),
    Goal("f32 AVX-512 products, T >= 256", "layers", f"{_F32} pass=forward T=256..", 0.85, quantity="peak"),
    Goal("bytes kept, f32", "layers", f"{_HOT} dtype=float32 pass=forward+backward", 1.00, quantity="kept"),
    Goal("one call without grad", "host", "peer=moelora what=call pass=forward", 8, quantity="us"),
    Goal("one call with grad, its forward", "host", "peer=moelora what=call pass=forward_grad", 20, quantity="us"),
    Goal("top 2, N = 64", "topk", "peer=moelora what=mixture T=2048 N=64 k=2", 1.25, "N=4"),
    Goal("route, top k", "topk", "peer=moelora what=route k=[0-9]*", 1.00, "peer=torch"),
    Goal("route, all experts", "topk", "peer=moelora what=route k=all", 1.00, "peer=torch"),
    Goal("route, all experts", "topk", "peer=moelora what=route k=all", 1.00, "peer=softmax"),
    Goal("layer between two others", "neighbours", "peer=moelora what=between d=2048..", 1.05, "peer=moelora_parts"),
    Goal("dropout p = 0.1, step", "models", f"{_MODEL} p=0.1", 1.30, "p=0.0"),
    Goal("dropout p = 0.1, step", "models", f"{_MODEL} p=0.1", 1.00, "peer=loop"),
    Goal("Llama, N = 4, step", "models", f"{_MODEL} model=llama N=4 p=0.0", 0.70, "peer=stacked"),
    Goal("Llama, N = 4, step", "models", f"{_MODEL} model=llama N=4 p=0.0", 1.00, "peer=one_lora"),
    Goal("bf16 Llama, step", "models", "peer=moelora what=train?step dtype=bfloat16", 1.00, "peer=stacked"),
)

_LARGE = "T=4096.. d_out=4096.. R=64..128"
_SQUARE = "T=2048 d_in=2048 d_out=2048 R=64..64"


def _of_layers(adapters: str) -> tuple[Goal, ...]:
    any_cell, about = f"peer=moelora adapters={adapters}", f"{adapters} adapters"
    ours = f"{any_cell} timed=graph"
    base, stacked = "peer=base", "peer=stacked"
    return (
        Goal(f"forward, {about}", "layers", f"{ours} pass=forward {_LARGE}", 1.01, base, "floor"),
        Goal(f"forward that keeps, {about}", "layers", f"{ours} pass=forward_grad {_LARGE}", 1.01, base, "floor"),
        Goal(f"dX, {about}", "layers", f"{ours} pass=dx {_LARGE}", 1.01, base, "floor"),
        Goal(f"forward, T = d = 2048, {about}", "layers", f"{ours} pass=forward {_SQUARE}", 1.20, base),
        Goal(f"dX, T = d = 2048, {about}", "layers", f"{ours} pass=dx {_SQUARE}", 1.20, base),
        Goal(
            f"forward + backward, {about}",
            "layers",
            f"{ours} pass=forward+backward T=4096.. d_in=4096.. d_out=4096.. R=64..64",
            1.10,
            base,
        ),
        Goal(f"decode, {about}", "layers", f"{ours} pass=forward T=..64", 3, base, "added"),
        Goal(f"any cell, {about}", "layers", any_cell, 1.00, stacked),
    )


_GEMMA = "peer=moelora model=gemma-2b N=8 p=0.0"
_LLAMA = "peer=moelora model=llama-8b N=8 p=0.0"
_STEP = "what=train?step"
_FORWARD = "what=forward timed=calls"
_ON_GPU = (
    *_of_layers("bfloat16"),
    *_of_layers("float32"),
    Goal("host time of a call without grad", "host", "peer=moelora what=call pass=forward N=4", 8, quantity="us"),
    Goal("host time of a call with grad", "host", "peer=moelora what=call pass=forward_grad N=4", 20, quantity="us"),
    Goal("host time of a layer", "host", "peer=per_token what=layer N=4", 1.00, "peer=one_lora"),
    Goal("host time of a layer, fixed weights", "host", "peer=static what=layer N=4", 1.00, "peer=one_lora"),
    Goal("Gemma 2B, N = 8, forward", "models", f"{_GEMMA} {_FORWARD}", 0.92, "peer=one_lora"),
    Goal("Gemma 2B, N = 8, step", "models", f"{_GEMMA} {_STEP}", 0.86, "peer=one_lora"),
    Goal("Gemma 2B, N = 8, memory of the step", "models", f"{_GEMMA} {_STEP}", 0.92, "peer=one_lora", "memory"),
    Goal("Llama 8B, N = 8, forward", "models", f"{_LLAMA} {_FORWARD}", 0.72, "peer=one_lora"),
    Goal("Llama 8B, N = 8, step", "models", f"{_LLAMA} {_STEP}", 0.85, "peer=one_lora"),
    Goal("Llama 8B, N = 8, memory of the step", "models", f"{_LLAMA} {_STEP}", 0.72, "peer=one_lora", "memory"),
    Goal("N passes, N = 8, forward", "models", f"peer=moelora N=8 p=0.0 {_FORWARD}", 1 / 9, "peer=n_passes"),
    Goal("any model", "models", "peer=moelora p=0.0", 1.00, "peer=stacked"),
    Goal("dropout p = 0.1, step", "models", f"peer=moelora p=0.1 {_STEP}", 1.15, "p=0.0"),
    Goal("top 2, N = 64", "topk", "peer=moelora what=mixture N=64 k=2", 1.30, "N=8"),
    Goal("top k, any cell", "topk", "peer=moelora what=mixture", 1.00, "peer=stacked"),
    Goal("route", "topk", "peer=moelora what=route", 1.00, "peer=torch"),
)
GOALS = {"cpu": _ON_CPU, "cuda": _ON_GPU}


class Verdict(NamedTuple):
    """One cell, its value, and whether that meets the goal."""

    cell: str
    value: float
    met: bool


def load(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each file that ``moelora bench`` writes into a folder; none of those that are not there.

    Raises
    ------
    ValueError
        A file is not as ``moelora bench`` writes it, or of another device than a file beside it, or has a cell twice,
        as where the rows of two runs have been put together.
    """
    results = {name: read_csv(folder / f"{name}.csv") for name in FILES}
    device = device_of(results)
    for file, places in CELL[device].items():
        seen = set()
        for row in results[file]:
            about = {name: row.get(name) for name in (*places, "peer")}
            if None in about.values():
                raise ValueError(f"{folder / file}.csv has not what results of {device!r} have: {', '.join(about)}")
            told = " ".join(f"{name}={value}" for name, value in about.items())
            if told in seen:
                raise ValueError(f"{folder / file}.csv has twice {told}")
            seen.add(told)
            if not re.fullmatch(r"[0-9.]*", _median(row)):  # none where there was no memory
                raise ValueError(f"{folder / file}.csv has the time {_median(row)!r} at {told}")
    return results


def device_of(results: Results) -> str:
    """Where the rows were measured, "cpu" or "cuda"; "cpu" if there are none."""
    return "cuda" if any("gpu" in row for rows in results.values() for row in rows) else "cpu"


def judge(results: Results, goals: Sequence[Goal] | None = None) -> list[tuple[Goal, list[Verdict]]]:
    """Each goal with its cells that were measured.

    Parameters
    ----------
    results : mapping
        Rows by the name of their file, all from one device.
    goals : sequence of Goal, optional
        By default those of the device.
    """
    device = device_of(results)
    return [
        (goal, list(_verdicts(goal, CELL[device][goal.file], results.get(goal.file, ()))))
        for goal in (GOALS[device] if goals is None else goals)
    ]


def _verdicts(goal: Goal, places: Sequence[str], rows: Sequence[Row]) -> Iterator[Verdict]:
    by_place = {tuple(row[name] for name in (*places, "peer")): row for row in rows}
    for row in rows:
        if not all(_fits(row, *condition.split("=")) for condition in goal.cells.split()):
            continue
        there = {name: row[name] for name in (*places, "peer")}
        if goal.against:
            name, value = goal.against.split("=")
            there[name] = value
        reference = by_place.get(tuple(there.values()))
        if reference is None or not (_median(row) and _median(reference)):  # not measured in this cell, or no memory
            continue
        found = _value(goal.quantity, row, reference)
        met = found * SLACK >= goal.limit if goal.quantity == "peak" else found <= goal.limit * SLACK
        yield Verdict(" ".join(f"{name}={row[name]}" for name in places if row[name]), found, met)


def _median(row: Row) -> str:
    return row["us_median" if "us_median" in row else "ms_median"]


def _fits(row: Row, name: str, wanted: str) -> bool:
    if ".." not in wanted:
        return fnmatchcase(row[name], wanted)
    least, most = wanted.split("..")
    value = int(row["N"]) * int(row["r"]) if name == "R" else int(row[name])
    return int(least or 0) <= value and (not most or value <= int(most))


def _value(quantity: str, row: Row, reference: Row) -> float:
    if quantity == "us":
        return float(row["us_median"])
    if quantity == "peak":
        return float(row["gflops"]) / float(row["peak_gflops"])
    if quantity == "kept":
        T, d, n, r = (int(row[name]) for name in ("T", "d", "N", "r"))
        return int(row["kept_bytes"]) / (T * (d + n * r + n) * {"float32": 4, "bfloat16": 2}[row["dtype"]])
    if quantity == "memory":
        return float(row["peak_mib"]) / float(reference["peak_mib"])
    if quantity == "added":
        return float(row["us_median"]) - float(reference["us_median"])
    ratio = float(_median(row)) / float(_median(reference))
    if quantity == "floor":
        R, d_in, d_out = int(row["N"]) * int(row["r"]), int(row["d_in"]), int(row["d_out"])
        return ratio / (1 + R / d_in + R / d_out)
    return ratio


def limit_text(goal: Goal) -> str:
    """The limit, as in "<= 0.45 of stacked"."""
    if goal.quantity == "us":
        return f"<= {goal.limit:g} us"
    if goal.quantity == "peak":
        return f">= {goal.limit:.2f} of the peak"
    against = goal.against.removeprefix("peer=") or "x, H and w"
    if goal.quantity == "added":
        return f"<= {against} + {goal.limit:g} us"
    factor = {"floor": " x (1 + R/d_in + R/d_out)", "memory": " of the memory"}.get(goal.quantity, "")
    return f"<= {goal.limit:.2f}{factor} of {against}"


def summary_rows(judged: Sequence[tuple[Goal, Sequence[Verdict]]]) -> list[list[str]]:
    """For each goal: title, limit, cells that meet it, smallest, middle and largest value."""
    rows = []
    for goal, verdicts in judged:
        values = sorted(verdict.value for verdict in verdicts)
        met = f"{sum(verdict.met for verdict in verdicts)} of {len(verdicts)}" if values else "not measured"
        spread = [f"{value:.3g}" for value in (values[0], values[len(values) // 2], values[-1])] if values else [""] * 3
        rows.append([goal.title, limit_text(goal), met, *spread])
    return rows


SUMMARY_HEADS = ["goal", "limit", "cells that meet it", "least", "middle", "largest"]


def as_text(judged: Sequence[tuple[Goal, Sequence[Verdict]]]) -> str:
    """Every cell of every goal, and the summary, for a terminal."""
    tables = [
        Section(
            f"{goal.title}: {limit_text(goal)}",
            ["cell", "value", "goal", ""],
            [
                [verdict.cell, f"{verdict.value:.3f}", f"{goal.limit:g}", "met" if verdict.met else "short"]
                for verdict in verdicts
            ],
        )
        for goal, verdicts in judged
        if verdicts
    ]
    return as_tables([*tables, Section("Goals", SUMMARY_HEADS, summary_rows(judged))])
