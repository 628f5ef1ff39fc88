"""What this machine reaches: the fastest products and the copying of memory, to measure the others against."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moelora.nn import routed_lora
from moelora.report.timing import interleave, quartiles


def measure(dtypes: Sequence[torch.dtype], rounds: int, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Rows for each dtype: large products of torch and of moelora in GF/s; then the bandwidth in GB/s.

    `best` is that of the fastest round.
    """
    size, copied = (64, 2**16) if smoke else (2048, 2**26)
    for dtype in dtypes:
        yield from _products(dtype, size, rounds)
    source = torch.ones(copied)
    target = torch.empty_like(source)
    seconds = interleave({"torch copy": lambda: target.copy_(source)}, rounds)
    yield from _rows("float32", seconds, {"torch copy": 2 * source.nbytes}, "GB/s")


@torch.no_grad()
def _products(dtype: torch.dtype, size: int, rounds: int) -> Iterator[dict[str, Any]]:
    n, r = 8, size // 32
    x, weight, w = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype), torch.rand(size, n)
    A, B = [torch.randn(r, size, dtype=dtype)] * n, [torch.randn(size, r, dtype=dtype)] * n
    w = w.to(dtype)

    def medium() -> None:
        torch.set_float32_matmul_precision("medium")
        try:
            F.linear(x, weight)
        finally:
            torch.set_float32_matmul_precision("highest")

    base, mixture = 2 * size**3, 4 * size * n * r * size
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "torch product": (lambda: F.linear(x, weight), base),
        "moelora mixture": (lambda: routed_lora(x, A, B, w, 1.0), mixture),
        "moelora base and mixture": (lambda: routed_lora(x, A, B, w, 1.0, weight=weight), base + mixture),
    }
    if dtype is torch.float32:
        calls["torch product, medium precision"] = (medium, base)
    seconds = interleave({name: call for name, (call, _) in calls.items()}, rounds)
    yield from _rows(name_of(dtype), seconds, {name: flops for name, (_, flops) in calls.items()}, "GF/s")


def _rows(dtype: str, seconds: dict[str, list[float]], work: dict[str, int], unit: str) -> Iterator[dict[str, Any]]:
    for name, values in seconds.items():
        rates = [work[name] / value / 1e9 for value in values]
        row = {"dtype": dtype, "what": name, "unit": unit, "best": f"{max(rates):.4g}"}
        for quartile, rate in zip(("q1", "median", "q3"), quartiles(rates), strict=True):
            row[quartile] = f"{rate:.4g}"
        yield row | {"rounds": len(rates)}


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
