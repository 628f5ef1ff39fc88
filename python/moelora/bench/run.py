"""The course of `moelora bench`."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import moelora
import moelora.functional
from moelora.bench import host, layers, models, neighbours, peak, topk
from moelora.bench.arguments import FULL, MEASURE, ROUNDS, SMOKE, SMOKE_ROUNDS
from moelora.bench.cuda import host as gpu_host
from moelora.bench.cuda import layers as gpu_layers
from moelora.bench.cuda import models as gpu_models
from moelora.bench.cuda import neighbours as gpu_neighbours
from moelora.bench.cuda import topk as gpu_topk
from moelora.bench.goals import Results, as_text, judge, load
from moelora.bench.page import render
from moelora.bench.record import write_csv


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Run one of the commands.

    Parameters
    ----------
    options : argparse.Namespace
        What the parser of `add_arguments` returns.
    given : sequence of str
        The command line that it parsed, which the rows name as what made them.

    Returns
    -------
    int
        Exit status.
    """
    if options.bench in (*MEASURE, "all"):
        return _measure(options, given)
    parser: argparse.ArgumentParser = options.parser
    if not options.folder.is_dir():
        parser.error(f"argument DIR: {options.folder} is not a folder")
    try:
        results = load(options.folder)
    except ValueError as error:
        parser.error(f"argument DIR: {error}")
    if options.bench == "page":
        return _page(parser, options, results)
    if not any(results.values()):
        parser.error(f"argument DIR: {options.folder} has none of {', '.join(f'{name}.csv' for name in results)}")
    if options.bench == "plot":
        return _draw(results, options.folder)
    judged = judge(results)
    print(as_text(judged))
    return 0 if all(verdict.met for _, verdicts in judged for verdict in verdicts) else 1


def _measure(options: argparse.Namespace, given: Sequence[str]) -> int:
    parser: argparse.ArgumentParser = options.parser
    if not moelora.functional.HAS_EXT:
        print("moelora bench: the C extension is not loaded, so there is nothing to measure", file=sys.stderr)
        return 1
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is not a folder")
    device: str = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no GPU here for 'cuda'")
    suites = list(FULL[device]) if options.bench == "all" else [options.bench]
    if suites[0] not in FULL[device]:
        parser.error(f"argument --device: on 'cuda' there are {', '.join(FULL[device])}, not {suites[0]}")
    # Where the files go is no part of what they hold.
    kept = [word for last, word in pairwise(["", *given]) if "--out" not in (last, word.partition("=")[0])]
    command = shlex.join(["moelora", *kept])
    grids = {name: _grid(options, name) for name in suites}
    rounds = options.rounds or (SMOKE_ROUNDS if options.smoke else ROUNDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        for name in suites:
            measured = _on_gpu if device == "cuda" else _on_cpu
            for file, rows in measured(name, grids[name], rounds, options.smoke):
                write_csv(options.out / f"{file}.csv", rows, command, device)
    finally:
        torch.set_num_threads(threads)
    try:
        results = load(options.out)
    except ValueError as error:
        print(f"moelora bench: no plots: {error}", file=sys.stderr)
        return 1
    return _draw(results, options.out)


def _grid(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What was asked for, each value once, the rest from the defaults."""
    defaults = (SMOKE if options.smoke else FULL)[options.device][name]
    grid = {key: getattr(options, key, None) or value for key, value in defaults.items()}
    grid = {key: list(dict.fromkeys(value)) if isinstance(value, list) else value for key, value in grid.items()}
    parser: argparse.ArgumentParser = options.parser
    foreign = {key for grids in FULL.values() for key in grids.get(name, {})} - {*defaults}
    for key in foreign | ({"isa"} if options.device == "cuda" else set()):
        if getattr(options, key, None) is not None:
            parser.error(f"argument --{key.replace('_', '-')}: there is none on {options.device!r}")
    for model in getattr(options, "models", None) or ():
        if model not in FULL[options.device][name]["models"]:
            parser.error(f"argument --models: there is no {model} on {options.device!r}")
    if name == "layers" and options.device == "cpu":
        available = moelora.show_config(mode="dicts")["instruction set"]["available"]
        best = moelora.get_isa()
        asked = getattr(options, "isa", None) or [best, "avx2" if "avx2" in available else best]
        grid["isa"] = list(dict.fromkeys(asked))
        for isa in grid["isa"]:
            if isa not in available:
                parser.error(f"argument --isa: this CPU has {', '.join(available)}, got {isa!r}")
    if name == "topk" and not any(k < n for k in grid["top_k"] for n, _ in grid["mixtures"]):
        parser.error(f"argument --top-k: {min(grid['top_k'])} is not less than the experts of any of the mixtures")
    return grid


Files = Iterator[tuple[str, Iterator[dict[str, Any]]]]
"""The files of a suite, and their rows as they are measured."""


def _on_gpu(name: str, grid: dict[str, Any], rounds: int, smoke: bool) -> Files:
    if name == "layers":
        cells = gpu_layers.Grid(grid["shapes"], grid["adapters"], grid["timed"], grid["passes"], grid["peers"])
        yield name, gpu_layers.measure(cells, rounds)
    elif name == "topk":
        few = gpu_topk.Grid(**{field: grid[field] for field in gpu_topk.Grid._fields})
        yield name, gpu_topk.measure(few, rounds)
    elif name == "neighbours":
        yield name, gpu_neighbours.measure(gpu_neighbours.Grid(grid["models"], smoke), rounds)
    elif name == "models":
        whole = gpu_models.Grid(grid["models"], grid["experts"], grid["peers"], smoke)
        yield name, gpu_models.measure(whole, rounds)
    else:
        yield name, gpu_host.measure(grid["experts"], rounds)


def _on_cpu(name: str, grid: dict[str, Any], rounds: int, smoke: bool) -> Files:
    if name == "layers":
        peaks: list[dict[str, Any]] = []

        def kept() -> Iterator[dict[str, Any]]:
            computed = dict.fromkeys(dtype for name in grid["dtype"] for dtype in layers.DTYPES[name])
            for row in peak.measure(list(computed), rounds, smoke=smoke):
                peaks.append(row)
                yield row

        yield "peak", kept()
        cells = layers.Grid(grid["tokens"], grid["widths"], grid["mixtures"], grid["dtype"], grid["isa"])
        yield name, layers.measure(cells, rounds, peaks)
    elif name == "topk":
        few = topk.Grid(grid["tokens"], grid["widths"], grid["mixtures"], grid["top_k"], grid["dtype"])
        yield name, topk.measure(few, rounds)
    elif name == "neighbours":
        beside = neighbours.Grid(grid["tokens"], grid["widths"], grid["mixtures"])
        yield name, neighbours.measure(beside, rounds)
    elif name == "models":
        yield name, models.measure(models.Grid(grid["models"], grid["mixtures"], grid["batch"], smoke), rounds)
    else:
        yield name, host.measure(grid["experts"], rounds)


def _draw(results: Results, target: Path) -> int:
    try:
        from moelora.bench.plots import draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("moelora"):
            raise
        print(f'No plots, {error.name} is not installed: pip install "moelora[plots]"')
        return 0
    pictures = draw(results, target)
    print(f"Wrote {', '.join(path.name for path in pictures) or 'no plots'} to {target}")
    return 0


def _page(parser: argparse.ArgumentParser, options: argparse.Namespace, results: Results) -> int:
    if not options.page.is_file():
        parser.error(f"argument PAGE: {options.page} is not a file")
    try:
        text = render(options.page.read_text(encoding="utf-8"), results, options.page.stem)
    except ValueError as error:
        parser.error(f"argument PAGE: {options.page}: {error}")
    options.page.write_text(text, encoding="utf-8")
    print(f"Wrote {options.page}")
    return _draw(results, options.page.with_suffix("")) if any(results.values()) else 0
