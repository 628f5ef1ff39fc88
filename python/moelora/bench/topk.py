"""Few experts of many for each token: moelora with ``top_k=`` against a loop over experts and stacked torch.

`mixture` rows add the mixture to a base output that is there, by the k largest weights of each token:

    moelora      `routed_lora(..., top_k=)`
    topk_loop    torch: for each expert, gather its tokens, two products, scale, add at their places
    stacked      torch, A and B concatenated beforehand, all experts for all tokens, weights zero outside the top k

`route` rows turn logits [T, N] into such weights, or with k = "all" into those of all experts:

    moelora      `route(..., top_k=)`, which counts tokens and sums probabilities besides
    torch        softmax, topk, renormalise, scatter; of all experts what gives the same: softmax, its sums, counts
    softmax      softmax alone, where k = "all"

Gradients are those of the weights, and where k = "all" also of the sums, which softmax alone does not have.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora.bench.layers import DTYPES, SCALING, Cell, adapters, stacked
from moelora.bench.record import columns
from moelora.bench.work import Peer, timed
from moelora.nn import route, routed_lora
from moelora.report.timing import quartiles

PASSES = ("forward", "forward+backward")
ROUTE_TOKENS = (1, 16, 256)  # of `route`, besides the grid's


class Grid(NamedTuple):
    """Which cells: the product of these, as far as k < N."""

    tokens: Sequence[int]
    widths: Sequence[int]
    mixtures: Sequence[tuple[int, int]]
    top_k: Sequence[int]
    dtypes: Sequence[str]


def mixture_peers(cell: Cell, k: int, weight: Tensor | None = None) -> dict[str, Peer]:
    """Ways to add the mixture of each token's k best experts, on the same numbers; to x W^T if there is a weight."""
    T, d, n, r, _ = cell
    dtype, _ = DTYPES[cell.dtype]
    torch.manual_seed(0)

    x, given = torch.randn(T, d).to(dtype).requires_grad_(), torch.randn(T, d).to(dtype)
    # Distinct numbers: half precision would have ties, which each way breaks as it likes.
    w = (torch.rand(T, n).argsort(-1) + 1).div(n).to(dtype).requires_grad_()
    A, B = adapters(cell)
    stacked_A = torch.cat(A).detach().requires_grad_()
    stacked_B_t = torch.cat(B, 1).t().detach().contiguous().requires_grad_()

    def base() -> Tensor:
        return given if weight is None else F.linear(x, weight)

    def loop() -> Tensor:
        values, indices = w.topk(k, -1)
        y = base().clone()
        for e in range(n):
            tokens, places = torch.where(indices == e)
            added = F.linear(F.linear(x[tokens], A[e]), B[e]) * (SCALING * values[tokens, places, None])
            y.index_add_(0, tokens, added)
        return y

    def dense() -> Tensor:
        values, indices = w.topk(k, -1)
        kept = torch.zeros_like(w).scatter(-1, indices, values)
        return stacked(x, stacked_A, stacked_B_t, kept, base(), r)

    below: dict[str, Any] = {"base_output": given} if weight is None else {"weight": weight}
    return {
        "moelora": Peer(lambda: routed_lora(x, A, B, w, SCALING, **below, top_k=k), [x, w], [*A, *B]),
        "topk_loop": Peer(loop, [x, w], [*A, *B]),
        "stacked": Peer(dense, [x, w], [stacked_A, stacked_B_t]),
    }


def route_peers(T: int, n: int, k: int | None) -> dict[str, Peer]:
    """Ways to make weights of logits, on the same numbers, float32; those of all experts where k is None."""
    torch.manual_seed(0)
    logits = torch.randn(T, n, requires_grad=True)
    if k is None:

        def ours() -> tuple[Tensor, Tensor]:
            routing = route(logits)
            return routing.weights, routing.prob_sums

        def with_sums() -> tuple[Tensor, Tensor]:
            weights = logits.softmax(-1)
            torch.full((n,), T, device=logits.device)  # the counts
            return weights, weights.sum(0)

        return {
            "moelora": Peer(ours, [logits], []),
            "torch": Peer(with_sums, [logits], []),
            "softmax": Peer(lambda: logits.softmax(-1), [logits], []),
        }

    def by_torch() -> Tensor:
        values, indices = logits.softmax(-1).topk(k, -1)
        values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, indices, values)

    return {
        "moelora": Peer(lambda: route(logits, top_k=k).weights, [logits], []),
        "torch": Peer(by_torch, [logits], []),
    }


def measure(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``topk.csv``."""
    for dtype, d, T, (n, r), k in itertools.product(grid.dtypes, grid.widths, grid.tokens, grid.mixtures, grid.top_k):
        if k < n:
            about = {"what": "mixture", "T": T, "d": d, "N": n, "r": r, "k": k, "dtype": dtype}
            yield from _rows(mixture_peers(Cell(T, d, n, r, dtype), k), rounds, about)
    experts = dict.fromkeys(n for n, _ in grid.mixtures)
    for T, n, kept in itertools.product(dict.fromkeys((*ROUTE_TOKENS, *grid.tokens)), experts, (None, *grid.top_k)):
        if kept is None or kept < n:
            about = {"what": "route", "T": T, "d": "", "N": n, "r": "", "k": kept or "all", "dtype": "float32"}
            yield from _rows(route_peers(T, n, kept), rounds, about)


def _rows(of: dict[str, Peer], rounds: int, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for which in PASSES:
        yield from as_rows(timed(of, which, rounds), {**about, "pass": which})


def as_rows(seconds: Mapping[str, Sequence[float]], about: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each peer."""
    ours = quartiles(seconds["moelora"])[1]
    for name, values in seconds.items():
        yield {
            **about,
            "peer": name,
            **columns(values, "us"),
            "over_moelora": f"{quartiles(values)[1] / ours:.3f}",
            "rounds": len(values),
        }
