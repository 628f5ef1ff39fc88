"""Time and memory of calls that are compared with each other."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    least: float = 0.0,
    before: Mapping[str, Callable[[], object]] | None = None,
    every: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times each: A B C, C B A, A B C, ... so that drift and order hit all alike.

    Parameters
    ----------
    functions : mapping of callables
    rounds : int
    least : float
        Seconds for which a short call is repeated; its time is then the mean. 0: it is called once.
    before : mapping of callables, optional
        What runs, untimed, before each single call of a function.
    every : mapping of int, optional
        A slow function may run in every n-th round only, from the first on.
    """
    samples: dict[str, Callable[[], float]] = {}
    for name, function in functions.items():
        prepare = (before or {}).get(name)
        _sample(function, prepare, 1)  # what only a first call does
        repeats = 1
        if least:
            repeats = max(1, math.ceil(least / max(_sample(function, prepare, 1), 1e-7)))
        samples[name] = partial(_sample, function, prepare, repeats)
    return in_turns(samples, rounds, every=every)


def in_turns(
    samples: Mapping[str, Callable[[], float]], rounds: int, *, every: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """What `interleave` does with functions that say themselves how many seconds they took."""
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    for i in range(rounds):
        for name in list(samples)[:: 1 if i % 2 == 0 else -1]:
            if i % (every or {}).get(name, 1) == 0:
                seconds[name].append(samples[name]())
    return seconds


def _sample(function: Callable[[], object], prepare: Callable[[], object] | None, repeats: int) -> float:
    """Seconds of one call, as the mean of some."""
    if prepare is None:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    seconds = 0.0
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        function()
        seconds += time.perf_counter() - start
    return seconds / repeats


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def kept_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Size of what a forward keeps for its backward, `parameters` aside; what is kept twice counts once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    del result  # which held the graph, and with it every tensor that was seen, until here
    return sum(size for pointer, size in kept.items() if pointer not in known)


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
