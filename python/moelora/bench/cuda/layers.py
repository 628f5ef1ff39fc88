"""One routed layer on a GPU, base product included, in CUDA graphs and called one after the other.

x, the weight W and the gradient are bfloat16, routing weights float32 with a sum of 1, adapters bfloat16, or float32
as PEFT makes them. All experts have rank 16.

    base               F.linear alone; its backward is dX
    moelora            `routed_lora(..., weight=)`
    moelora_WAY        the same, forced to one of the ways that its kernels have, where the layer can be computed so
    stacked            torch, A and B concatenated beforehand: two products, scaled between them, one addmm, in bfloat16
    stacked_compiled   the same through `torch.compile`
    one_lora           stock PEFT's layer with one adapter
    loop               as a fork of PEFT has it: one adapter after the other
    two_pass           the base without gradients, as in the pass that feeds a router, then that loop
    n_passes           base and one adapter, for each expert, and the outputs mixed

A pass is "forward", without gradients; "forward_grad", keeping what the backward needs; "dx", the gradient of x alone;
"backward", those of x, the routing weights and the adapters; and "forward+backward". For up to 64 tokens there is
"forward" alone, which is decoding. Forced ways are there for "forward" and "dx", in graphs; the compiled peer, and
calls without graphs ("calls"), for "forward" and "forward+backward".

Before they are timed, y, or dx where there is one, is compared with that of float32 products, but for base and
one_lora, which compute something else: "off" is the distance over the length. Calls have the peak of what torch
allocates in one.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

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
WHOLE = ("forward", "forward+backward")  # of the compiled peer, and of calls
DECODE = 64  # tokens, at most
SELDOM = {"loop": 4, "two_pass": 4, "n_passes": 4}  # slow, and no goal speaks of them
OTHER = ("base", "one_lora")  # than a mixture of N experts
OFF = 0.01  # at most; bfloat16 has 8 bits


class Cell(NamedTuple):
    """T tokens, N experts of rank r; adapters "bfloat16" or "float32"."""

    T: int
    d_in: int
    d_out: int
    n: int
    r: int
    adapters: str


class Set(NamedTuple):
    """The peers on the same buffers, the gradient that comes from above, and the layer in float32: y, or dx."""

    peers: dict[str, Peer]
    grad_y: Tensor
    exact: Callable[[bool], Tensor]


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
        w = torch.rand(T, n).softmax(-1).requires_grad_()
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

    def expert(e: int) -> Tensor:
        return F.linear(F.linear(x.to(dtype), A[e]), B[e]) * SCALING

    def loop() -> Tensor:
        y = F.linear(x, weight)
        for e in range(n):
            y = y + w[:, e, None] * expert(e)
        return y.to(x.dtype)

    def two_pass() -> Tensor:
        with torch.no_grad():
            F.linear(x, weight)
        return loop()

    def n_passes() -> Tensor:
        y = w[:, 0, None] * (F.linear(x, weight) + expert(0))
        for e in range(1, n):
            y = y + w[:, e, None] * (F.linear(x, weight) + expert(e))
        return y.to(x.dtype)

    @torch.no_grad()
    def exact(backward: bool) -> Tensor:
        W, all_A, all_B_t = weight.float(), stacked_A.float(), stacked_B_t.float()
        spread = w.repeat_interleave(r, 1) * SCALING
        if backward:
            return torch.addmm(grad_y.float() @ W, (grad_y.float() @ all_B_t.t()) * spread, all_A)
        return torch.addmm(x.float() @ W.t(), (x.float() @ all_A.t()) * spread, all_B_t)

    found = {
        "base": Peer(lambda: F.linear(x, weight), [x], []),
        "moelora": Peer(lambda: routed_lora(x, A, B, w, SCALING, weight=weight), [x, w], [*A, *B]),
        "stacked": Peer(lambda: stacked(*all_stacked), [x, w], [stacked_A, stacked_B_t]),
        "stacked_compiled": Peer(lambda: compiled(*all_stacked), [x, w], [stacked_A, stacked_B_t]),
        "one_lora": Peer(lambda: lora(x), [x], adapter),
        "loop": Peer(loop, [x, w], [*A, *B]),
        "two_pass": Peer(two_pass, [x, w], [*A, *B]),
        "n_passes": Peer(n_passes, [x, w], [*A, *B]),
    }
    return Set(found, grad_y, exact)


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


def in_way(one: str, of: Callable[[], object]) -> Callable[[], object]:
    """The same call, computed in one way."""

    def inside() -> object:
        with forced(one):
            return of()

    return inside


def way(cell: Cell, which: str, top_k: int = 0) -> str:
    """Names of the way forward, backward, or both with / between them, as it is now."""
    gpu = torch.cuda.get_device_properties()
    about = (gpu.major, gpu.multi_processor_count, cell.T, cell.d_in, cell.d_out, cell.n * cell.r, cell.n, top_k)
    directions = {"forward": [False], "forward_grad": [False], "forward+backward": [False, True]}.get(which, [True])
    return "/".join(_core.cuda_way(*about, backward) for backward in directions)


class Grid(NamedTuple):
    """Which cells: the product of these. A shape is T, d_in, d_out, R."""

    shapes: Sequence[tuple[int, int, int, int]]
    adapters: Sequence[str]
    timed: Sequence[str]
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
            for timed, which in itertools.product(grid.timed, grid.passes):
                if (which == "forward" or T > DECODE) and (which in WHOLE or timed == "graph"):
                    yield from _rows(cell, timed, which, _timed(cell, sets, timed, which, grid.peers, rounds))
            del sets
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def _n_sets(cell: Cell) -> int:
    """How many sets of buffers hold three times what the cache does; two to eight."""
    size = 2 * (cell.T * cell.d_in + cell.d_in * cell.d_out + cell.T * cell.d_out)
    return min(max(-(-3 * torch.cuda.get_device_properties().L2_cache_size // size), 2), 8)


class Timed(NamedTuple):
    """What is found of a peer: the way that it takes, if it is moelora, how far off it is, MiB at the peak, seconds."""

    way: str
    off: str
    peak_mib: str
    seconds: list[float]


def _timed(
    cell: Cell, sets: Sequence[Set], timed: str, which: str, names: Sequence[str], rounds: int
) -> dict[str, Timed]:
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    ways = {"moelora": way(cell, which)}
    with torch.set_grad_enabled(which != "forward"):
        for name in ("base", "moelora", *(name for name in sets[0].peers if name in names)):
            if name not in calls and (name != "stacked_compiled" or which in WHOLE):
                calls[name] = [call(of.peers[name], which, of.grad_y) for of in sets]
        for name in names:
            one = name.removeprefix("moelora_")
            if one == name or which not in FORCED or timed != "graph":
                continue
            with forced(one):
                if way(cell, which) != one:
                    continue
                ours = [call(of.peers["moelora"], which, of.grad_y) for of in sets]
            calls[name] = [in_way(one, each) for each in ours]
            ways[name] = one
        off = _compared(sets[0], which, {name: each[0] for name, each in calls.items()})
        if timed == "graph":
            peaks: dict[str, str] = {}
            seconds = clock.in_graphs(calls, rounds, every=SELDOM)
        else:
            peaks = {name: _peak_mib(each[0]) for name, each in calls.items()}
            seconds = clock.on_gpu({name: each[0] for name, each in calls.items()}, rounds, every=SELDOM)
    return {
        name: Timed(ways.get(name, ""), off.get(name, ""), peaks.get(name, ""), values)
        for name, values in seconds.items()
    }


def _compared(of: Set, which: str, calls: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
    """How far y or dx of each mixture is from float32's, over the length of that."""
    exact = of.exact(which not in ("forward", "forward_grad"))
    off = {}
    for name, run in calls.items():
        if name not in OTHER:
            found = run()
            first = (found[0] if isinstance(found, tuple) else found).detach()
            far = float(vector_norm(first.float() - exact) / vector_norm(exact))
            if not far <= OFF:
                raise RuntimeError(f"{which} of {name} is wrong: off by {far:.3g} of its length")
            off[name] = f"{far:.2g}"
    return off


def _peak_mib(run: Callable[[], object]) -> str:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def _rows(cell: Cell, timed: str, which: str, found: Mapping[str, Timed]) -> Iterator[dict[str, Any]]:
    base = quartiles(found["base"].seconds)[1]
    for name, (taken, off, peak, values) in found.items():
        yield {
            "T": cell.T,
            "d_in": cell.d_in,
            "d_out": cell.d_out,
            "N": cell.n,
            "r": cell.r,
            "adapters": cell.adapters,
            "timed": timed,
            "pass": which,
            "peer": name,
            "way": taken,
            **columns(values, "us"),
            "over_base": f"{quartiles(values)[1] / base:.3f}",
            "off": off,
            "peak_mib": peak,
            "rounds": len(values),
        }
