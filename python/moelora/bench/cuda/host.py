"""Host time on a GPU: what a call takes to return, while the GPU works on.

`call` is `routed_lora` over four experts of rank 16 at T = 16, d = 2048, base product included, against `stacked` torch
and `base`, F.linear alone. `layer` is one layer as the forward of its model calls it, its peers as in
`moelora.bench.host`: `one_lora` and `stock_n` are PEFT with one and with N active adapters, `static` and `per_token`
moelora with weights [N] and weights per token. x and the base are bfloat16, adapters float32.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moelora.bench.arguments import RANK
from moelora.bench.cuda import clock
from moelora.bench.cuda.layers import Cell
from moelora.bench.cuda.layers import peers as layer_peers
from moelora.bench.host import PASSES, as_rows, layers
from moelora.bench.work import Peer, part

TOKENS, WIDTH = 16, 2048


def measure(experts: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``host.csv``."""
    of = layer_peers(Cell(TOKENS, WIDTH, WIDTH, 4, RANK, "float32")).peers
    calls = {name: of[name] for name in ("moelora", "stacked", "base")}
    for which in PASSES:
        yield from _rows("call", 4, calls, which, rounds, "stacked")
    for n, which in itertools.product(experts, PASSES):
        of = layers(n, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
        yield from _rows("layer", n, of, which, rounds, "one_lora")


def _rows(what: str, n: int, of: dict[str, Peer], which: str, rounds: int, reference: str) -> Iterator[dict[str, Any]]:
    with torch.set_grad_enabled(which != "forward"):
        seconds = clock.on_host({name: part(peer, which)[0] for name, peer in of.items()}, rounds)
    yield from as_rows(what, TOKENS, n, which, seconds, reference)
