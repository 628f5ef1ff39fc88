"""One routed layer on a CPU: moelora against stacked torch, the PEFT-style loop, one stock LoRA and the base product.

    python benchmarks/layers/run.py --out benchmarks/results/layers_cpu_f32.csv

All but `base` and `moelora_weight` add a mixture to a base output that is there already; `stacked` is torch with A and
B concatenated beforehand, `stacked_medium` the same under ``torch.set_float32_matmul_precision("medium")``; `one_lora`
has one expert of rank r; `moelora_weight` computes the base product too. Columns *_over_moelora: a peer's median over
moelora's.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import interleave, quartiles, write_csv  # noqa: E402

from moelora.nn import routed_lora  # noqa: E402

SCALING = 2.0


def peers(T: int, d: int, n: int, r: int, train: bool) -> dict[str, Callable[[], object]]:
    def parameter(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.02).requires_grad_(train)

    x, w, base = torch.randn(T, d, requires_grad=train), torch.rand(T, n, requires_grad=train), torch.randn(T, d)
    A, B = [parameter(r, d) for _ in range(n)], [parameter(d, r) for _ in range(n)]
    stacked_A, stacked_B_t = parameter(n * r, d), parameter(n * r, d)
    weight, grad = torch.randn(d, d) * 0.02, torch.randn(T, d)

    def loop(experts: int) -> Tensor:
        y = base
        for e in range(experts):
            y = y + w[:, e, None] * (F.linear(F.linear(x, A[e]), B[e]) * SCALING)
        return y

    def stacked() -> Tensor:
        weights = (w * SCALING).repeat_interleave(r, 1)
        return torch.addmm(base, F.linear(x, stacked_A) * weights, stacked_B_t)

    def medium() -> Tensor:
        torch.set_float32_matmul_precision("medium")
        try:
            return run(stacked)
        finally:
            torch.set_float32_matmul_precision("highest")

    def run(forward: Callable[[], Tensor]) -> Tensor:
        if not train:
            with torch.no_grad():
                return forward()
        y = forward()
        y.backward(grad)
        for leaf in (x, w, *A, *B, stacked_A, stacked_B_t):
            leaf.grad = None
        return y

    return {
        "moelora": lambda: run(lambda: routed_lora(x, A, B, w, SCALING, base_output=base)),
        "stacked": lambda: run(stacked),
        "stacked_medium": medium,
        "loop": lambda: run(lambda: loop(n)),
        "one_lora": lambda: run(lambda: F.linear(F.linear(x, A[0]), B[0]) * SCALING + base),
        "base": lambda: run(lambda: F.linear(x, weight)),
        "moelora_weight": lambda: run(lambda: routed_lora(x, A, B, w, SCALING, weight=weight)),
    }


def measure(
    tokens: list[int], widths: list[int], mixtures: list[tuple[int, int]], rounds: int
) -> Iterator[dict[str, Any]]:
    for d, T, (n, r), train in itertools.product(widths, tokens, mixtures, (False, True)):
        torch.manual_seed(0)
        times = interleave(peers(T, d, n, r, train), rounds)
        row: dict[str, Any] = {"T": T, "d": d, "N": n, "r": r, "pass": "forward+backward" if train else "forward"}
        medians = {}
        for peer, seconds in times.items():
            q1, medians[peer], q3 = quartiles(seconds)
            for name, value in (("q1", q1), ("median", medians[peer]), ("q3", q3)):
                row[f"{peer}_us_{name}"] = f"{value * 1e6:.1f}"
        for peer in ("stacked", "stacked_medium", "loop", "one_lora"):
            row[f"{peer}_over_moelora"] = f"{medians[peer] / medians['moelora']:.3f}"
        row["moelora_weight_over_base"] = f"{medians['moelora_weight'] / medians['base']:.3f}"
        yield row | {"rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 2048, 4096], help="d_in = d_out")
    parser.add_argument("--smoke", action="store_true", help="two small cells, three rounds: does it run?")
    args = parser.parse_args()
    if args.smoke:
        write_csv(args.out, measure([1, 16], [64], [(4, 8)], 3))
    else:
        write_csv(
            args.out,
            measure([1, 16, 256, 1024, 2048], args.widths, [(4, 8), (8, 8), (4, 16), (8, 16)], args.rounds),
        )


if __name__ == "__main__":
    main()
