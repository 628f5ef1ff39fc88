"""Seconds of calls on a GPU, and of what they cost on the host, with all peers in turns."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from moelora.report.timing import in_turns

LEAST = 1e-3  # seconds for which short calls are repeated
LONG = 1e-2  # seconds beside which the launch of a graph is nothing

Call = Callable[[], object]


def in_graphs(
    calls: Mapping[str, Sequence[Call]], rounds: int, *, every: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of one call by each peer, captured into a CUDA graph that goes round its sets of buffers.

    Runs on the current stream, which must not be the default one. Before each timing of a graph that is not long, the
    first peer's is replayed, so that the one that is timed is launched while the GPU is busy, and at clocks of work.

    Parameters
    ----------
    calls : mapping of sequences of callables
        Of each peer the same call on other buffers; more than the GPU's cache holds, so that no call finds its own
        there. What a call returns is kept until its turn comes again.
    rounds, every
        See `interleave`.
    """
    graphs = {name: _captured(of) for name, of in calls.items()}
    first = next(iter(graphs.values())).graph
    samples = {name: partial(_replayed, graph, n, None if long else first) for name, (graph, n, long) in graphs.items()}
    return in_turns(samples, rounds, every=every)


def on_gpu(calls: Mapping[str, Call], rounds: int, *, every: Mapping[str, int] | None = None) -> dict[str, list[float]]:
    """Seconds from a call's begin to its end on the GPU, back to back and not captured: those of the slower side."""
    return in_turns(_repeated(calls, _between_events), rounds, every=every)


def on_host(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds that a call takes to return, while the GPU works on."""
    return in_turns(_repeated(calls, _to_return), rounds)


class Captured(NamedTuple):
    """A graph, the number of calls in it, and whether it is a long one."""

    graph: torch.cuda.CUDAGraph
    n: int
    long: bool


def _captured(calls: Sequence[Call]) -> Captured:
    """A graph that takes at least about as long as short calls are repeated."""
    for call in calls:
        call()
    rounds = 1
    while True:
        graph, kept = torch.cuda.CUDAGraph(), [None] * len(calls)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(rounds):
                for i, call in enumerate(calls):
                    kept[i] = call()  # type: ignore[call-overload]
        graph.replay()
        n = rounds * len(calls)
        seconds = n * _replayed(graph, n, graph)
        if rounds > 1 or seconds > LEAST / 2:
            return Captured(graph, n, seconds > LONG)
        rounds = math.ceil(LEAST / seconds)


def _replayed(graph: torch.cuda.CUDAGraph, n: int, warm_up: torch.cuda.CUDAGraph | None) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if warm_up is not None:
        warm_up.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / n


def _repeated(calls: Mapping[str, Call], sample: Callable[[Call, int], float]) -> dict[str, Callable[[], float]]:
    samples: dict[str, Callable[[], float]] = {}
    for name, call in calls.items():
        sample(call, 1)  # what only a first call does
        samples[name] = partial(sample, call, max(1, math.ceil(LEAST / sample(call, 1))))
    return samples


def _between_events(call: Call, n: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / n


def _to_return(call: Call, n: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n
