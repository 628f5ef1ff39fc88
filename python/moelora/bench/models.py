"""Whole small language models: moelora against stacked torch, one stock LoRA, loops over adapters and N passes.

A Llama and a GPT-2 of random parameters (`small.py`), all linear layers adapted with rank r, float32, batches of B x S
tokens, the same given weights [B, S, N] wherever nothing else is said:

    base               the model without adapters; its step has gradients of activations alone, and nothing to update
    one_lora           stock PEFT, one adapter of rank r
    stacked            each LoRA layer in torch operations: A and B concatenated beforehand, one pass
    loop               one pass, a Python loop over the adapters in each layer, as a fork of PEFT has it
    two_pass           a first pass for a router with a gate in each layer, then that loop
    n_passes           the whole model once for each expert, logits mixed
    moelora            one pass
    moelora_router     one pass with the default router, one gate in each layer
    base_compiled, stacked_compiled, moelora_compiled
                       the same through `torch.compile`, for the first model and mixture, where there is a C++ compiler

The experts of all of them are the same parameters, but for `stacked`, which has copies, and no B is zero.

For the first mixture of the Llama the base is bfloat16, too, and its adapters float32, as PEFT makes them, for
moelora, stacked and one_lora; stacked computes the mixture in float32, as the others do.

A forward is without gradients, in evaluation mode; a train step is forward, loss, backward and AdamW. For the first
mixture there are steps with LoRA dropout p, too, where stock PEFT's layers, their loop and moelora can do the same.
Peak memory is that of the process beyond what it held before.
"""

import functools
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

import moelora
from moelora.bench.record import columns
from moelora.bench.small import build
from moelora.bench.work import CAN_COMPILE
from moelora.demo.baselines import add_experts, n_passes, two_passes
from moelora.report.timing import interleave, peak_bytes, quartiles
from moelora.validate.reference import AdapterLoop, twin

SELDOM = {"n_passes": 4, "two_pass": 4}  # far slower than the rest
DROPOUT = 0.1
HALF = ("moelora", "stacked", "one_lora")  # with a bfloat16 base
COMPILED = ("base_compiled", "stacked_compiled", "moelora_compiled")


class Peer:
    """A model, how it turns a batch into a loss or logits, and an optimizer for what is trained."""

    def __init__(
        self, model: nn.Module, compute: Callable[[Tensor | None], Tensor], more: nn.Module | None = None
    ) -> None:
        self.model, self.compute = model, compute
        self.trained = [p for m in (model, more) if m is not None for p in m.parameters() if p.requires_grad]
        self.optimizer = None
        if self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=self.trained[0].is_cuda)

    def forward(self) -> None:
        """Logits, without gradients."""
        with torch.no_grad():
            self.compute(None)

    def step(self, labels: Tensor) -> None:
        """One of training."""
        self.compute(labels).backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.trained:
            parameter.grad = None


class StackedLinear(nn.Module):
    """A LoRA layer's adapters in torch operations, A [R, d_in] and B^T [R, d_out] of all of them stacked.

    A CPU computes in the adapters' dtype; a GPU in that of x, which its tensor cores take.

    Attributes
    ----------
    weights : Tensor [B * S, R]
        Each expert's weight times its scaling, once for each of its ranks.
    """

    weights: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        names = layer.active_adapters
        self.base_layer = layer.base_layer
        self.A = nn.Parameter(torch.cat([layer.lora_A[name].weight.detach() for name in names]))
        self.B_t = nn.Parameter(torch.cat([layer.lora_B[name].weight.detach().t() for name in names]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        base: Tensor = self.base_layer(x)
        dtype = self.weights.dtype
        hidden = F.linear(x.flatten(0, -2).to(dtype), self.A.to(dtype)) * self.weights
        mixed = torch.addmm(base.flatten(0, -2).to(dtype), hidden, self.B_t.to(dtype))
        return mixed.view(base.shape).to(base.dtype)


def stack(model: peft.PeftModel, weights: Tensor) -> nn.Module:
    """Put `StackedLinear` in place of each LoRA layer of a stock model; the transformers model inside, changed.

    Parameters
    ----------
    model : PeftModel
        Its active adapters have equal ranks and scalings.
    weights : Tensor [B, S, N]
    """
    top: nn.Module = model.get_base_model()
    for name, layer in list(top.named_modules()):
        if isinstance(layer, LoraLayer):
            looked_at: Any = layer
            first = looked_at.active_adapters[0]
            new = StackedLinear(layer)
            spread = weights.flatten(0, 1) * looked_at.scaling[first]
            dtype = looked_at.base_layer.weight.dtype if weights.is_cuda else new.A.dtype
            new.weights = spread.repeat_interleave(looked_at.r[first], 1).to(dtype)
            top.set_submodule(name, new)
    return top


def peers(
    base: PreTrainedModel,
    n: int,
    r: int,
    ids: Tensor,
    weights: Tensor,
    *,
    p: float = 0.0,
    targets: str | list[str] = "all-linear",
    compiled: Callable[[nn.Module], Any] | None = None,
    only: Container[str] | None = None,
) -> dict[str, Peer]:
    """Ways to run `base` with N experts; with dropout those alone that do it as PEFT does.

    Parameters
    ----------
    compiled : callable, optional
        What compiles a model, for `COMPILED`.
    only : container of str, optional
        Names of those that are made.
    """
    names = [f"expert_{i}" for i in range(n)]
    plain: dict[str, Any] = {
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "lora_dropout": p,
    }

    def result(model: Any, labels: Tensor | None, **given: Any) -> Tensor:
        outputs = model(input_ids=ids, labels=labels, use_cache=False, **given)
        found: Tensor = outputs.logits if labels is None else outputs.loss
        return found

    def filled(experts: int) -> peft.PeftModel:
        torch.manual_seed(0)
        model = peft.get_peft_model(twin(base), peft.LoraConfig(**plain), adapter_name=names[0])
        add_experts(model, names[:experts])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # products of zeros take less power, and so less time on a GPU
                nn.init.normal_(parameter, std=0.05)
        return model

    of_all = functools.cache(lambda: filled(n))

    def stock() -> peft.PeftModel:
        return twin(of_all())

    def routed() -> Any:
        model: Any = moelora.adopt(stock())
        config = moelora.MoELoraConfig(**plain, num_experts=n, top_k_experts=n, router_aux_loss_coef=0.0)
        model.base_model.attach_router(model.base_model.make_router(config), config)
        return model

    def called(model: Any, prepare: Callable[[nn.Module], Any] = lambda model: model, **given: Any) -> Peer:
        return Peer(model, partial(result, prepare(model), **given))

    def frozen() -> PreTrainedModel:
        model = twin(base).requires_grad_(False)
        model.enable_input_require_grads()  # type: ignore[no-untyped-call]
        return model

    def passes() -> Peer:
        model = stock()
        return Peer(model, lambda labels: n_passes(model, weights, ids, labels))

    def looped(weights: Tensor | None) -> Peer:
        model = stock()
        loop = AdapterLoop(model)
        loop.weights = weights
        if weights is not None:
            return called(model)
        router = routed().base_model.router
        return Peer(model, lambda labels: two_passes(loop, model, router, ids, labels), router)

    makers: dict[str, Callable[[], Peer]] = {
        "moelora": lambda: called(moelora.adopt(stock()), routing_weights=weights),
        "one_lora": lambda: called(filled(1)),
        "loop": lambda: looped(weights),
    }
    if not p:
        makers |= {
            "moelora_router": lambda: called(routed()),
            "stacked": lambda: called(stack(stock(), weights)),
            "base": lambda: called(frozen()),
            "two_pass": lambda: looped(None),
            "n_passes": passes,
        }
    if compiled is not None:
        makers |= {
            "base_compiled": lambda: called(frozen(), compiled),
            "stacked_compiled": lambda: called(stack(stock(), weights), compiled),
            "moelora_compiled": lambda: called(moelora.adopt(stock()), compiled, routing_weights=weights),
        }
    return {name: make() for name, make in makers.items() if only is None or name in only}


class Grid(NamedTuple):
    """Which cells: the product of models and mixtures, on one batch [B, S]."""

    models: Sequence[str]
    mixtures: Sequence[tuple[int, int]]
    batch: tuple[int, int]
    smoke: bool


def measure(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``models.csv``."""
    for model, (n, r) in itertools.product(grid.models, grid.mixtures):
        base = build(model, smoke=grid.smoke)
        torch.manual_seed(0)
        ids = torch.randint(base.config.vocab_size, grid.batch)
        weights = torch.rand(*grid.batch, n).softmax(-1)
        first = (model, n, r) == (grid.models[0], *grid.mixtures[0])
        compiled = torch.compile if first and CAN_COMPILE else None
        without = {(name, 0.0): peer for name, peer in peers(base, n, r, ids, weights, compiled=compiled).items()}
        dropped = {}
        if (n, r) == grid.mixtures[0]:
            dropped = {(name, DROPOUT): peer for name, peer in peers(base, n, r, ids, weights, p=DROPOUT).items()}
        about = {"model": model, "B": grid.batch[0], "S": grid.batch[1], "N": n, "r": r}
        yield from _rows(without, "forward", ids, rounds, about | {"dtype": "float32"})
        yield from _rows(without | dropped, "train step", ids, rounds, about | {"dtype": "float32"})
        if (model, (n, r)) == ("llama", grid.mixtures[0]):
            ways = peers(base.bfloat16(), n, r, ids, weights)
            half = {(name, 0.0): ways[name] for name in HALF}
            for what in ("forward", "train step"):
                yield from _rows(half, what, ids, rounds, about | {"dtype": "bfloat16"})


def _rows(
    of: Mapping[tuple[str, float], Peer], what: str, ids: Tensor, rounds: int, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    calls: dict[str, Callable[[], None]] = {}
    for (name, p), peer in of.items():
        peer.model.train(what == "train step")
        calls[f"{name} {p}"] = peer.forward if what == "forward" else partial(peer.step, ids)
    every = {call: SELDOM[name] for call, (name, _) in zip(calls, of, strict=True) if name in SELDOM}
    seconds = interleave(calls, rounds, every=every)
    ours = quartiles(seconds["moelora 0.0"])[1]
    for (call, values), (name, p) in zip(seconds.items(), of, strict=True):
        yield {
            **about,
            "p": p,
            "what": what,
            "peer": name,
            **columns(values, "ms"),
            "over_moelora": f"{quartiles(values)[1] / ours:.3f}",
            "peak_mib": _peak_mib(calls[call]),
            "rounds": len(values),
        }


def _peak_mib(call: Callable[[], None]) -> str:
    try:
        return f"{peak_bytes(call) / 2**20:.1f}"
    except OSError:  # no /proc
        return ""
