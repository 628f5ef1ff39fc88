"""One routed layer: moelora against stacked torch, the loop over adapters, one stock LoRA and the base product.

These add a mixture to a base output that is there:

    moelora            `routed_lora(..., base_output=)`
    stacked            torch, A and B concatenated beforehand: one product, scaled, one addmm
    stacked_medium     the same under ``torch.set_float32_matmul_precision("medium")``, float32 only
    stacked_compiled   the same through `torch.compile`, where there is a C++ compiler
    loop               as a fork of PEFT has it: one adapter after the other

and these compute the base product, too:

    base               F.linear alone
    base_medium        the same in "medium" precision, float32 only
    one_lora           stock PEFT's layer with one adapter of rank r
    moelora_weight     `routed_lora(..., weight=)`

All of them run for the first of the mixtures, the first three for the others, moelora and stacked alone on an
instruction set that is forced and for dtype bfloat16+float32. "cold" rows have one token, and two linear layers of the
same size run between two calls.

With dtype bfloat16+float32 x is bfloat16 and the adapters are float32, as PEFT makes them; moelora and stacked then
compute in float32.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import moelora
from moelora.bench.peak import name_of
from moelora.bench.record import columns
from moelora.bench.small import OneLayer, with_lora
from moelora.bench.work import CAN_COMPILE, Peer, timed
from moelora.nn import routed_lora
from moelora.report.timing import kept_bytes, quartiles

SCALING = 2.0
PASSES = ("forward", "backward", "forward+backward")
MIXTURE_ONLY = ("moelora", "stacked", "stacked_medium")
FORCED = ("moelora", "stacked")
DTYPES = {  # of x, and of the adapters
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
}
SELDOM = {"loop": 4, "one_lora": 4, "base_medium": 4}  # slow, and no goal speaks of them


class Cell(NamedTuple):
    """T tokens, d_in = d_out = d, N experts of rank r; x and adapters of `dtype`, one of `DTYPES`."""

    T: int
    d: int
    n: int
    r: int
    dtype: str


def stacked(x: Tensor, A: Tensor, B_t: Tensor, w: Tensor, base: Tensor, r: int) -> Tensor:
    """The mixture in torch operations, A [R, d_in] and B^T [R, d_out] of all experts stacked."""
    if x.dtype is not A.dtype:
        return stacked(x.to(A.dtype), A, B_t, w, base.to(A.dtype), r).to(x.dtype)
    return torch.addmm(base, F.linear(x, A) * (w * SCALING).repeat_interleave(r, 1), B_t)


@contextmanager
def medium_precision() -> Iterator[None]:
    """Let torch compute float32 products by oneDNN, and in fewer bits where it likes."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def peers(cell: Cell, names: Sequence[str] | None = None) -> dict[str, Peer]:
    """Ways to compute one cell, on the same numbers; those of `names`, or all that there are for its dtype."""
    T, d, n, r, _ = cell
    dtype, of_adapters = DTYPES[cell.dtype]
    torch.manual_seed(0)
    x = torch.randn(T, d).to(dtype).requires_grad_()
    w = torch.randn(T, n).to(of_adapters).requires_grad_()
    base = torch.randn(T, d).to(dtype)
    A, B = adapters(cell)
    stacked_A = torch.cat(A).detach().requires_grad_()
    stacked_B_t = torch.cat(B, 1).t().detach().contiguous().requires_grad_()
    all_stacked = (x, stacked_A, stacked_B_t, w, base, r)

    def loop() -> Tensor:
        y = base
        for e in range(n):
            y = y + w[:, e, None] * (F.linear(F.linear(x, A[e]), B[e]) * SCALING)
        return y

    def medium() -> Tensor:
        with medium_precision():
            return stacked(*all_stacked)

    found = {
        "moelora": Peer(lambda: routed_lora(x, A, B, w, SCALING, base_output=base), [x, w], [*A, *B]),
        "stacked": Peer(lambda: stacked(*all_stacked), [x, w], [stacked_A, stacked_B_t]),
        "stacked_medium": Peer(medium, [x, w], [stacked_A, stacked_B_t]),
        "loop": Peer(loop, [x, w], [*A, *B]),
    }
    if names is None:
        weight = torch.randn(d, d).mul_(0.02).to(dtype)
        layer = OneLayer(d).to(dtype)
        layer.proj.weight.data = weight
        one_lora = with_lora(layer, 1, r, ["proj"]).to(dtype).base_model.model.proj

        def base_medium() -> Tensor:
            with medium_precision():
                return F.linear(x, weight)

        found |= {
            "base": Peer(lambda: F.linear(x, weight), [x], [weight]),
            "base_medium": Peer(base_medium, [x], [weight]),
            "one_lora": Peer(lambda: one_lora(x), [x], list(one_lora.parameters())),
            "moelora_weight": Peer(lambda: routed_lora(x, A, B, w, SCALING, weight=weight), [x, w], [*A, *B, weight]),
        }
        if CAN_COMPILE:
            compiled = torch.compile(stacked)
            found["stacked_compiled"] = Peer(lambda: compiled(*all_stacked), [x, w], [stacked_A, stacked_B_t])
    there = [name for name in found if dtype is torch.float32 or not name.endswith("_medium")]
    return {name: found[name] for name in there if names is None or name in names}


def adapters(cell: Cell) -> tuple[list[Tensor], list[Tensor]]:
    """A [r, d] and B [d, r] of each expert."""
    _, dtype = DTYPES[cell.dtype]

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.02).to(dtype).requires_grad_()

    return [leaf(cell.r, cell.d) for _ in range(cell.n)], [leaf(cell.d, cell.r) for _ in range(cell.n)]


def flops(cell: Cell, which: str) -> int:
    """Those of the mixture's products: two forward, four backward."""
    return {"forward": 4, "backward": 8, "forward+backward": 12}[which] * cell.T * cell.d * cell.n * cell.r


class Grid(NamedTuple):
    """Which cells: the product of these."""

    tokens: Sequence[int]
    widths: Sequence[int]
    mixtures: Sequence[tuple[int, int]]
    dtypes: Sequence[str]
    isas: Sequence[str]


def measure(grid: Grid, rounds: int, peaks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of ``layers.csv``; `peaks` are those of ``peak.csv``."""
    chosen = moelora.get_isa()
    try:
        # By default the compiled peer would go on uncompiled after eight variants.
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            yield from _cells(grid, chosen, rounds, peaks)
    finally:
        moelora.set_isa(chosen)


def _cells(grid: Grid, chosen: str, rounds: int, peaks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for isa, dtype in itertools.product(grid.isas, grid.dtypes):
        moelora.set_isa(isa)
        about = {"forced": "no" if isa == chosen else "yes", **_reached(peaks, dtype)}
        for d, T, mixture in itertools.product(grid.widths, grid.tokens, grid.mixtures):
            names: Sequence[str] | None = FORCED
            if isa == chosen and "+" not in dtype:
                names = None if mixture == grid.mixtures[0] else MIXTURE_ONLY
            yield from _cell(Cell(T, d, *mixture, dtype), names, rounds, about)


def _reached(peaks: Sequence[Mapping[str, Any]], dtype: str) -> dict[str, str]:
    """The columns on the peaks of a run."""
    computed = name_of(DTYPES[dtype][1])
    products = [float(row["best"]) for row in peaks if row["unit"] == "GF/s" and row["dtype"] == computed]
    memory = [float(row["best"]) for row in peaks if row["unit"] == "GB/s"]
    return {"peak_gflops": f"{max(products):.4g}", "peak_gb_per_s": f"{max(memory):.4g}"}


def _cell(cell: Cell, names: Sequence[str] | None, rounds: int, about: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    of = peers(cell, names)
    for which in PASSES:
        seconds = timed(of, which, rounds, every=SELDOM)
        yield from _rows(cell, of, seconds, {"pass": which, "weights": "hot"}, about)
    if cell.T == 1:
        dtype, _ = DTYPES[cell.dtype]
        others = [torch.randn(cell.d, cell.d).to(dtype) for _ in range(2)]
        token = torch.randn(1, cell.d).to(dtype)
        mixtures = {name: peer for name, peer in of.items() if name in FORCED}
        seconds = timed(mixtures, "forward", rounds, between=lambda: [F.linear(token, other) for other in others])
        yield from _rows(cell, of, seconds, {"pass": "forward", "weights": "cold"}, about)


def _rows(
    cell: Cell,
    of: Mapping[str, Peer],
    seconds: Mapping[str, Sequence[float]],
    what: Mapping[str, str],
    about: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    ours = quartiles(seconds["moelora"])[1]
    for name, values in seconds.items():
        median = quartiles(values)[1]
        gflops = f"{flops(cell, what['pass']) / median / 1e9:.2f}" if name in MIXTURE_ONLY else ""
        kept = kept_bytes(of[name].forward, of[name].parameters) if what["pass"] == "forward+backward" else ""
        yield {
            "T": cell.T,
            "d": cell.d,
            "N": cell.n,
            "r": cell.r,
            "dtype": cell.dtype,
            **what,
            "peer": name,
            **columns(values, "us"),
            "over_moelora": f"{median / ours:.3f}",
            "gflops": gflops,
            "kept_bytes": kept,
            "rounds": len(values),
            **about,
        }
