"""One routed layer on a GPU, base product included, in CUDA graphs.

x, the weight W and the gradient are bfloat16, routing weights float32, adapters bfloat16, or float32 as PEFT makes
them. All experts have rank 16.

    base               F.linear alone; its backward is dX
    moelora            `routed_lora(..., weight=)`
    moelora_WAY        the same, forced to one of the ways that its kernels have, where the layer can be computed so
    stacked            torch, A and B concatenated beforehand: two products, scaled between them, one addmm, in bfloat16
    stacked_compiled   the same through `torch.compile`
    one_lora           stock PEFT's layer with one adapter
    loop               as a fork of PEFT has it: one adapter after the other

A pass is "forward", without gradients; "forward_grad", keeping what the backward needs; "dx", the gradient of x alone;
"backward", those of x, the routing weights and the adapters; and "forward+backward". For up to 64 tokens there is
"forward" alone, which is decoding. Forced ways are there for "forward" and "dx", the compiled peer for "forward" and
"forward+backward".
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from moelora.bench.arguments import RANK
from moelora.bench.cuda import clock
from moelora.bench.layers import SCALING
from moelora.bench.record import columns
from moelora.bench.small import OneLayer, with_lora
from moelora.bench.work import Peer
from moelora.functional import HAS_EXT
from moelora.nn import routed_lora
from moelora.report.timing import quartiles

if HAS_EXT:
    from moelora import _core

PASSES = ("forward", "forward_grad", "dx", "backward", "forward+backward")
FORCED = ("forward", "dx")
COMPILED = ("forward", "forward+backward")
DECODE = 64  # tokens, at most
SELDOM = {"loop": 4}  # slow, and no goal speaks of it


class Cell(NamedTuple):
    """T tokens, N experts of rank r; adapters "bfloat16" or "float32"."""

    T: int
    d_in: int
    d_out: int
    n: int
    r: int
    adapters: str


class Set(NamedTuple):
    """The peers on the same buffers, and the gradient that comes from above."""

    peers: dict[str, Peer]
    grad_y: Tensor


def stacked(x: Tensor, weight: Tensor, A: Tensor, B_t: Tensor, w: Tensor) -> Tensor:
    """The layer in torch operations, in x's dtype; A [R, d_in] and B^T [R, d_out] of all experts stacked."""
    hidden = F.linear(x, A.to(x.dtype)).unflatten(-1, (w.shape[-1], -1))
    mixed = hidden * (w * SCALING).to(x.dtype).unsqueeze(-1)
    return torch.addmm(F.linear(x, weight), mixed.flatten(-2), B_t.to(x.dtype))


def peers(cell: Cell, seed: int = 0, device: str = "cuda") -> Set:
    """Ways to compute one cell, on the same numbers."""
    T, d_in, d_out, n, r, _ = cell
    dtype = getattr(torch, cell.adapters)
    torch.manual_seed(seed)
    with torch.device(device):
        x = torch.randn(T, d_in).bfloat16().requires_grad_()
        weight = torch.randn(d_out, d_in).mul_(d_in**-0.5).bfloat16()
        w = torch.rand(T, n).requires_grad_()
        A = [torch.randn(r, d_in).mul_(d_in**-0.5).to(dtype).requires_grad_() for _ in range(n)]
        B = [torch.randn(d_out, r).mul_(0.2).to(dtype).requires_grad_() for _ in range(n)]
        stacked_A = torch.cat(A).detach().requires_grad_()
        stacked_B_t = torch.cat(B, 1).t().detach().contiguous().requires_grad_()
        one = OneLayer(d_in, d_out).bfloat16()
        one.proj.weight.data = weight
        lora = with_lora(one, 1, r, ["proj"]).base_model.model.proj
        adapter = [parameter for name, parameter in lora.named_parameters() if "lora_" in name]
        for parameter in adapter:
            parameter.data = parameter.data.to(dtype)
        grad_y = torch.randn(T, d_out).bfloat16()
    compiled = torch.compile(stacked, dynamic=False)
    all_stacked = (x, weight, stacked_A, stacked_B_t, w)

    def loop() -> Tensor:
        y = F.linear(x, weight)
        for e in range(n):
            y = y + w[:, e, None] * F.linear(F.linear(x.to(dtype), A[e]), B[e]) * SCALING
        return y.to(x.dtype)

    found = {
        "base": Peer(lambda: F.linear(x, weight), [x], []),
        "moelora": Peer(lambda: routed_lora(x, A, B, w, SCALING, weight=weight), [x, w], [*A, *B]),
        "stacked": Peer(lambda: stacked(*all_stacked), [x, w], [stacked_A, stacked_B_t]),
        "stacked_compiled": Peer(lambda: compiled(*all_stacked), [x, w], [stacked_A, stacked_B_t]),
        "one_lora": Peer(lambda: lora(x), [x], adapter),
        "loop": Peer(loop, [x, w], [*A, *B]),
    }
    return Set(found, grad_y)


def call(peer: Peer, which: str, grad_y: Tensor) -> Callable[[], object]:
    """What one pass of a peer is; all but "forward" are to be called with gradients enabled."""
    leaves = [*peer.inputs, *peer.parameters]
    if which in ("forward", "forward_grad"):
        return peer.forward
    if which == "forward+backward":
        return lambda: torch.autograd.grad(peer.forward(), leaves, grad_y)
    wanted = leaves[:1] if which == "dx" else leaves
    for leaf in leaves:
        leaf.requires_grad_(any(leaf is one for one in wanted))
    y = peer.forward()
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(y, wanted, grad_y, retain_graph=True)


@contextmanager
def forced(way: str | None) -> Iterator[None]:
    """Context in which layers that can be computed in this way are."""
    _core.set_cuda_way(way)
    try:
        yield
    finally:
        _core.set_cuda_way(None)


def way(cell: Cell, which: str) -> str:
    """Names of the way forward, backward, or both with / between them, as it is now."""
    gpu = torch.cuda.get_device_properties()
    about = (gpu.major, gpu.multi_processor_count, cell.T, cell.d_in, cell.d_out, cell.n * cell.r, cell.n, 0)
    directions = {"forward": [False], "forward_grad": [False], "forward+backward": [False, True]}.get(which, [True])
    return "/".join(_core.cuda_way(*about, backward) for backward in directions)


class Grid(NamedTuple):
    """Which cells: the product of these. A shape is T, d_in, d_out, R."""

    shapes: Sequence[tuple[int, int, int, int]]
    adapters: Sequence[str]
    passes: Sequence[str]
    peers: Sequence[str]


def measure(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``layers.csv``."""
    stream = torch.cuda.Stream()
    with (
        torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
        torch.cuda.stream(stream),
    ):
        for (T, d_in, d_out, R), adapters in itertools.product(grid.shapes, grid.adapters):
            cell = Cell(T, d_in, d_out, R // RANK, RANK, adapters)
            sets = [peers(cell, seed) for seed in range(_n_sets(cell))]
            for which in grid.passes:
                if which == "forward" or T > DECODE:
                    yield from _rows(cell, which, _timed(cell, sets, which, grid.peers, rounds))
            del sets
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def _n_sets(cell: Cell) -> int:
    """How many sets of buffers hold three times what the cache does; two to eight."""
    size = 2 * (cell.T * cell.d_in + cell.d_in * cell.d_out + cell.T * cell.d_out)
    return min(max(-(-3 * torch.cuda.get_device_properties().L2_cache_size // size), 2), 8)


def _timed(
    cell: Cell, sets: Sequence[Set], which: str, names: Sequence[str], rounds: int
) -> dict[str, tuple[str, list[float]]]:
    """For each peer the way that it takes, if it is moelora, and seconds."""
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    ways = {}
    with torch.set_grad_enabled(which != "forward"):
        for name in ("base", "moelora", *(name for name in sets[0].peers if name in names)):
            if name not in calls and (name != "stacked_compiled" or which in COMPILED):
                calls[name] = [call(of.peers[name], which, of.grad_y) for of in sets]
        ways["moelora"] = way(cell, which)
        for name in names:
            one = name.removeprefix("moelora_")
            if one == name or which not in FORCED:
                continue
            with forced(one):
                if way(cell, which) != one:
                    continue
                ours = [call(of.peers["moelora"], which, of.grad_y) for of in sets]
            calls[name] = [_in_way(one, each) for each in ours]
            ways[name] = one
        seconds = clock.in_graphs(calls, rounds, every=SELDOM)
    return {name: (ways.get(name, ""), values) for name, values in seconds.items()}


def _in_way(one: str, of: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with forced(one):
            return of()

    return inside


def _rows(cell: Cell, which: str, timed: Mapping[str, tuple[str, list[float]]]) -> Iterator[dict[str, Any]]:
    base = quartiles(timed["base"][1])[1]
    for name, (taken, values) in timed.items():
        yield {
            "T": cell.T,
            "d_in": cell.d_in,
            "d_out": cell.d_out,
            "N": cell.n,
            "r": cell.r,
            "adapters": cell.adapters,
            "pass": which,
            "peer": name,
            "way": taken,
            **columns(values, "us"),
            "over_base": f"{quartiles(values)[1] / base:.3f}",
            "rounds": len(values),
        }
