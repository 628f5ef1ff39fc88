"""Few experts of many for each token, and routing, on a GPU; the peers are those of `moelora.bench.topk`.

`mixture` rows are whole layers, d_in = d_out = d, in bfloat16, base product included; `route` rows are routing alone.
Both are in CUDA graphs ("graph"), and again called one after the other ("calls"). A loop over experts asks the GPU how
many tokens each has, and so is called only. In graphs there are, besides, of a mixture that can be computed so:

    moelora_dual       moelora, forced to multiply the experts that are dropped with zero
    moelora_grouped    moelora, forced to compute the pairs of a token and an expert
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from moelora.bench.cuda import clock, layers
from moelora.bench.layers import Cell
from moelora.bench.topk import PASSES, as_rows, mixture_peers, route_peers
from moelora.bench.work import Peer, part, returned

SELDOM = {"topk_loop": 4}
WAYS = ("dual", "grouped")


class Grid(NamedTuple):
    """Which cells: the product of these, as far as k < N."""

    tokens: Sequence[int]
    widths: Sequence[int]
    mixtures: Sequence[tuple[int, int]]
    top_k: Sequence[int]
    timed: Sequence[str]
    what: Sequence[str]


def measure(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``topk.csv``."""
    for d, T, (n, r), k in itertools.product(grid.widths, grid.tokens, grid.mixtures, grid.top_k):
        if k < n and "mixture" in grid.what:
            with torch.device("cuda"):  # not while they are timed: every operation would take longer
                weight = torch.randn(d, d).mul_(d**-0.5).bfloat16()
                of = mixture_peers(Cell(T, d, n, r, "bfloat16"), k, weight)
            about = {"what": "mixture", "T": T, "d": d, "N": n, "r": r, "k": k, "dtype": "bfloat16"}
            yield from _rows(of, grid.timed, rounds, about)
    experts = dict.fromkeys(n for n, _ in grid.mixtures)
    for T, n, kept in itertools.product(grid.tokens, experts, (None, *grid.top_k)):
        if (kept is None or kept < n) and "route" in grid.what:
            with torch.device("cuda"):
                of = route_peers(T, n, kept)
            about = {"what": "route", "T": T, "d": "", "N": n, "r": "", "k": kept or "all", "dtype": "float32"}
            yield from _rows(of, grid.timed, rounds, about)


def _ways(about: dict[str, Any], which: str) -> list[str]:
    """Those in which all of a pass can be computed."""
    if about["what"] == "route":
        return []
    cell = layers.Cell(about["T"], about["d"], about["d"], about["N"], about["r"], about["dtype"])
    possible = []
    for one in WAYS:
        with layers.forced(one):
            if {*layers.way(cell, which, about["k"]).split("/")} == {one}:
                possible.append(one)
    return possible


def _rows(of: dict[str, Peer], timed: Sequence[str], rounds: int, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for how, which in itertools.product(timed, PASSES):
        # A graph is captured on another stream than the default one, and with it its backward.
        stream = torch.cuda.Stream() if how == "graph" else torch.cuda.default_stream()
        with torch.cuda.stream(stream), torch.set_grad_enabled(which != "forward"):
            if how == "graph":
                graphs = {name: [returned(peer, which)] for name, peer in of.items() if name not in SELDOM}
                for one in _ways(about, which):
                    graphs[f"moelora_{one}"] = [layers.in_way(one, returned(of["moelora"], which))]
                seconds = clock.in_graphs(graphs, rounds)
            else:
                calls = {name: part(peer, which)[0] for name, peer in of.items()}
                seconds = clock.on_gpu(calls, rounds, every=SELDOM)
        yield from as_rows(seconds, {**about, "timed": how, "pass": which})
