"""What layers that read the same input could share on a GPU: q, k and v; gate and up.

Layers of the shapes of Gemma 2B and Llama 3 8B, base product and mixture in one call, a bfloat16 base and float32
experts, in CUDA graphs ("graph") and called one after the other ("calls"):

    separate        `routed_lora(..., weight=)` for each
    shared          one of these over the weights of all of them, one below the other, and over A of the first alone: x
                    is read once, H made once, and dx given once. The shrink, and the gradient of A, are those of one
                    layer, so this does less than layers with experts of their own can do with, and what it saves is
                    more than sharing could.
    base            F.linear for each
    base_shared     one over the weights of all of them; what it saves needs no shared shrink

and what the savings are a share of:

    decoder_layer   all layers that `moelora.bench.cuda.models` adapts routed: a model of two less one of one, in graphs
                    alone, since a call of such a small model waits for the host
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moelora
from moelora.bench.arguments import RANK
from moelora.bench.cuda import clock
from moelora.bench.cuda.models import SHAPES, build, whole_rows
from moelora.bench.layers import SCALING
from moelora.bench.record import columns
from moelora.bench.work import Peer, part, returned
from moelora.nn import routed_lora

SIBLINGS = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
PASSES = ("forward", "forward+backward")
MODELS = {"model 1": 1, "model 2": 2}  # and their decoder layers
SETS = 3  # of buffers, which together hold more than the cache does


class Grid(NamedTuple):
    """Which models."""

    models: Sequence[str]
    smoke: bool


def measure(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``neighbours.csv``."""
    for name in grid.models:
        n, (B, S) = SHAPES[name].cells[-1]
        if grid.smoke:
            B, S = 1, 64
        with torch.device("cuda"):
            of: dict[str, Sequence[Peer]] = {}
            for what, d, widths in siblings(name, smoke=grid.smoke):
                ways = [peers(B * S, d, widths, n) for _ in range(SETS)]
                of |= {f"{what} {way}": [each[way] for each in ways] for way in ways[0]}
            of |= {key: [model(name, depth, n, (B, S), smoke=grid.smoke)] for key, depth in MODELS.items()}
        about = {"model": name, "T": B * S, "N": n, "r": RANK}
        for timed, which in itertools.product(("graph", "calls"), PASSES):
            yield from _rows({**about, "timed": timed, "pass": which}, _seconds(of, timed, which, rounds))


def siblings(name: str, *, smoke: bool) -> Iterator[tuple[str, int, list[int]]]:
    """Those that are adapted in a model: which, their d_in, and d_out of each."""
    base = build(name, smoke=smoke, device="meta", num_hidden_layers=1)
    targets = SHAPES[name].targets
    for what, names in SIBLINGS.items():
        if targets == "all-linear" or set(names) <= set(targets):
            found = {key.rpartition(".")[2]: module for key, module in base.named_modules()}
            layers: list[Any] = [found[key] for key in names]
            yield what, layers[0].in_features, [layer.out_features for layer in layers]


def peers(T: int, d: int, widths: Sequence[int], n: int) -> dict[str, Peer]:
    """Ways to compute siblings [T, d] to [T, d_out] for each of `widths`, with N experts each, or the base alone."""
    x, w = torch.randn(T, d).bfloat16().requires_grad_(), torch.rand(T, n).softmax(-1).requires_grad_()
    weights = [torch.randn(d_out, d).mul_(d**-0.5).bfloat16() for d_out in widths]
    A = [[torch.randn(RANK, d).mul_(d**-0.5).requires_grad_() for _ in range(n)] for _ in widths]
    B = [[torch.randn(d_out, RANK).mul_(0.2).requires_grad_() for _ in range(n)] for d_out in widths]
    weight = torch.cat(weights)
    all_B = [torch.cat(of_one).detach().requires_grad_() for of_one in zip(*B, strict=True)]

    def separate() -> tuple[Tensor, ...]:
        return tuple(routed_lora(x, a, b, w, SCALING, weight=W) for a, b, W in zip(A, B, weights, strict=True))

    return {
        "base": Peer(lambda: tuple(F.linear(x, W) for W in weights), [x], []),
        "base_shared": Peer(lambda: F.linear(x, weight), [x], []),
        "separate": Peer(separate, [x, w], sum(A + B, [])),
        "shared": Peer(lambda: routed_lora(x, A[0], all_B, w, SCALING, weight=weight), [x, w], [*A[0], *all_B]),
    }


def model(name: str, depth: int, n: int, batch: tuple[int, int], *, smoke: bool, device: str = "cuda") -> Peer:
    """A model of so many decoder layers, with next to no vocabulary, and all that is adapted routed."""
    base = build(name, smoke=smoke, device=device, num_hidden_layers=depth, vocab_size=64)
    names = [f"expert_{i}" for i in range(n)]
    config = LoraConfig(r=RANK, target_modules=SHAPES[name].targets, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(base, config, adapter_name=names[0])
    for one in names[1:]:
        adapted.add_adapter(one, config)
    moelora.adopt(adapted)
    moelora.activate_all_experts(adapted)
    experts = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in experts:
        nn.init.normal_(parameter, std=1e-3)
    x = torch.randn(*batch, base.config.hidden_size, device=device).bfloat16().requires_grad_()
    weights = torch.rand(*batch, n, device=device).softmax(-1)

    def forward() -> Tensor:
        logits: Tensor = adapted(inputs_embeds=x, routing_weights=weights, use_cache=False).logits
        return logits

    return Peer(forward, [x], experts)


def _seconds(of: Mapping[str, Sequence[Peer]], timed: str, which: str, rounds: int) -> dict[str, list[float]]:
    if timed == "calls":
        with torch.set_grad_enabled(which != "forward"):
            calls = {name: part(peer, which)[0] for name, (peer, *_) in of.items() if name not in MODELS}
            return clock.on_gpu(calls, rounds)
    with torch.cuda.stream(torch.cuda.Stream()), whole_rows(), torch.set_grad_enabled(which != "forward"):
        return clock.in_graphs({name: [returned(peer, which) for peer in each] for name, each in of.items()}, rounds)


def _rows(about: Mapping[str, Any], seconds: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    if about["timed"] == "graph":
        one, two = (seconds.pop(name) for name in MODELS)
        seconds["layer decoder_layer"] = [both - first for first, both in zip(one, two, strict=True)]
    for name, values in seconds.items():
        what, peer = name.split()
        yield {"what": what, **about, "peer": peer, **columns(values, "us"), "rounds": len(values)}
