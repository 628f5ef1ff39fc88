"""Routed layers beside others: what one costs between two torch layers, and what siblings could share.

`between` rows, float32, without gradients, on one thread and on all, run linear, routed, linear, each [d, d]:

    moelora          in one go, the routed layer by `routed_lora(..., weight=)`
    moelora_parts    the three timed alone; the sum
    stacked          in one go, the routed layer as F.linear and stacked torch
    stacked_parts    the three timed alone; the sum

`qkv` and `gate_up` rows are of the mixtures of layers that read the same input: three with d outputs, two with 43/16 d.

    separate    a `routed_lora` for each
    shared      one `routed_lora` over the experts of all of them, so that x is read, multiplied with A and given its
                gradient once, with all outputs in one; the bases of the other outputs are copied. As many operations
                as `separate`, and less traffic than layers with outputs of their own can do with, so what it saves is
                the most that sharing could.
    step        forward and backward of a decoder layer of a Llama of that width, all its linear layers routed: what
                the savings of both are a share of; among the rows of `qkv`

A part that is timed alone finds its weights in the cache where they fit, as those of d = 768 do; in one go it does not.
The rows of stacked torch have the same.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moelora.bench.layers import SCALING, Cell, adapters, stacked
from moelora.bench.record import columns
from moelora.bench.work import CALL
from moelora.nn import routed_lora
from moelora.peft import MoELoraConfig, get_peft_model
from moelora.report.timing import interleave

SIBLINGS = {"qkv": (3, 1.0), "gate_up": (2, 43 / 16)}  # how many, and their outputs for each input


class Grid(NamedTuple):
    """Which cells: the product of these."""

    tokens: Sequence[int]
    widths: Sequence[int]
    mixtures: Sequence[tuple[int, int]]


def measure(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``neighbours.csv``."""
    threads = torch.get_num_threads()
    try:
        for d, T, (n, r) in itertools.product(grid.widths, grid.tokens, grid.mixtures):
            cell = Cell(T, d, n, r, "float32")
            for used in sorted({1, threads}):
                torch.set_num_threads(used)
                yield from _rows("between", cell, "forward", _between(cell, rounds))
            yield from _siblings(cell, rounds)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _between(cell: Cell, rounds: int) -> dict[str, list[float]]:
    calls = between(cell)
    seconds = interleave(calls, rounds, least=CALL)

    def parts(routed: str) -> list[float]:
        return [sum(three) for three in zip(seconds["first"], seconds[routed], seconds["last"], strict=True)]

    return {
        "moelora": seconds["moelora"],
        "moelora_parts": parts("moelora alone"),
        "stacked": seconds["stacked"],
        "stacked_parts": parts("stacked alone"),
    }


def between(cell: Cell) -> dict[str, Callable[[], Tensor]]:
    """The layers one after the other, and each of them alone, on the same numbers."""
    torch.manual_seed(0)
    T, d, n, r, _ = cell
    x, w = torch.randn(T, d), torch.rand(T, n)
    A, B = adapters(cell)
    first, weight, last = ((torch.randn(d, d) / d**0.5) for _ in range(3))
    stacked_A, stacked_B_t = torch.cat(A).detach(), torch.cat(B, 1).t().detach().contiguous()
    between, after = F.linear(x, first), F.linear(F.linear(x, first), weight)

    def ours(x: Tensor) -> Tensor:
        return routed_lora(x, A, B, w, SCALING, weight=weight)

    def by_torch(x: Tensor) -> Tensor:
        return stacked(x, stacked_A, stacked_B_t, w, F.linear(x, weight), r)

    return {
        "moelora": lambda: F.linear(ours(F.linear(x, first)), last),
        "stacked": lambda: F.linear(by_torch(F.linear(x, first)), last),
        "first": lambda: F.linear(x, first),
        "moelora alone": lambda: ours(between),
        "stacked alone": lambda: by_torch(between),
        "last": lambda: F.linear(after, last),
    }


def _siblings(cell: Cell, rounds: int) -> Iterator[dict[str, Any]]:
    step = decoder_layer(cell)
    for what, which in itertools.product(SIBLINGS, ("forward", "forward+backward")):
        calls = siblings(cell, what)
        passes: dict[str, Callable[[], object]] = {name: _pass(call, which) for name, call in calls.items()}
        if (what, which) == ("qkv", "forward+backward"):
            passes["step"] = step
        yield from _rows(what, cell, which, interleave(passes, rounds, least=CALL, every={"step": 4}))


def siblings(cell: Cell, what: str) -> dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]]:
    """Ways to compute the mixtures of siblings; each gives outputs, and the leaves that get gradients."""
    torch.manual_seed(0)
    T, d, n, r, _ = cell
    count, ratio = SIBLINGS[what]
    d_out = int(d * ratio)
    x, w = torch.randn(T, d, requires_grad=True), torch.rand(T, n, requires_grad=True)
    bases = [torch.randn(T, d_out) for _ in range(count)]
    A = [[torch.randn(r, d).mul_(0.02).requires_grad_() for _ in range(n)] for _ in range(count)]
    B = [[torch.randn(d_out, r).mul_(0.02).requires_grad_() for _ in range(n)] for _ in range(count)]
    all_A, all_B, all_w = sum(A, []), sum(B, []), w.detach().repeat(1, count).requires_grad_()

    def separate() -> tuple[list[Tensor], list[Tensor]]:
        outputs = [routed_lora(x, a, b, w, SCALING, base_output=base) for a, b, base in zip(A, B, bases, strict=True)]
        return outputs, [x, w, *all_A, *all_B]

    def shared() -> tuple[list[Tensor], list[Tensor]]:
        y = routed_lora(x, all_A, all_B, all_w, SCALING, base_output=bases[0])
        for base in bases[1:]:
            base.clone()
        return [y], [x, all_w, *all_A, *all_B]

    return {"separate": separate, "shared": shared}


def _pass(call: Callable[[], tuple[list[Tensor], list[Tensor]]], which: str) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            call()

    seeds = [torch.randn_like(y) for y in call()[0]]

    def both() -> None:
        outputs, leaves = call()
        torch.autograd.backward(outputs, seeds)
        for leaf in leaves:
            leaf.grad = None

    return forward if which == "forward" else both


def decoder_layer(cell: Cell) -> Callable[[], None]:
    """Forward and backward of a Llama of one layer, with next to no vocabulary, on T tokens."""
    T, d, n, r, _ = cell
    config = LlamaConfig(
        hidden_size=d,
        intermediate_size=int(d * SIBLINGS["gate_up"][1]),
        num_hidden_layers=1,
        num_attention_heads=max(1, d // 64),
        vocab_size=64,
        use_cache=False,
        max_position_embeddings=max(T, 64),
    )
    experts = MoELoraConfig(num_experts=n, top_k_experts=n, r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(LlamaForCausalLM(config), experts)
    model.base_model.detach_router()
    model.enable_input_require_grads()
    ids, weights = torch.randint(64, (1, T)), torch.rand(1, T, n)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        model(input_ids=ids, routing_weights=weights).logits.sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def _rows(what: str, cell: Cell, which: str, seconds: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    for name, values in seconds.items():
        yield {
            "what": what,
            "T": cell.T,
            "d": cell.d,
            "N": cell.n,
            "r": cell.r,
            "pass": which,
            "peer": name,
            **columns(values, "us"),
            "rounds": len(values),
        }
