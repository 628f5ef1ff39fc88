"""What the autograd nodes share: the settings of a call, what is kept, and the error for differentiating twice."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moelora.nn.dropout import draw_seed

__all__ = ["N_NODE", "TWICE", "Dropout", "Once", "Settings", "draw", "forward_and_save", "refuse_twice"]

Dropout: TypeAlias = tuple[int, tuple[float, ...]]
"""The seed of the masks and the experts' probabilities."""

Settings: TypeAlias = tuple[tuple[float, ...], int | None, Dropout | None, int | None]
"""scaling, top_k, dropout, and the sum of the ranks where the call is plain (`plain_call`), else None."""

N_NODE = 5  # arguments of the node before the adapters


def draw(probabilities: tuple[float, ...]) -> Dropout | None:
    return (int(draw_seed()), probabilities) if any(probabilities) else None


def forward_and_save(
    forward: Callable[..., tuple[Tensor, Tensor | None]],
    ctx: Any,
    x: Tensor,
    routing_weights: Tensor,
    base_output: Tensor | None,
    frozen: tuple[Tensor | None, Tensor | None],
    settings: tuple[tuple[float, ...], int | None, Dropout | None, Any],
    adapters: tuple[Tensor, ...],
) -> Tensor:
    """y, with what the backward of a node needs kept in its ctx."""
    n, need = len(settings[0]), ctx.needs_input_grad
    keep_hidden = need[1] or True in need[-n:]
    y, hidden = forward(x, routing_weights, base_output, frozen, settings, adapters, keep_hidden=keep_hidden)
    ctx.settings = settings[:3]
    kept_x = x if True in need[-2 * n : -n] else None
    ctx.save_for_backward(kept_x, hidden, routing_weights, frozen[0] if need[0] else None, *adapters)
    return y


TWICE = "moelora's torch functions can be differentiated once only: double backward is not supported"


class _Refuse(torch.autograd.Function):
    """Identity whose backward is the error for differentiating a gradient of routed_lora."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(TWICE)


def refuse_twice(grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, tied to all they come from: differentiating them meets the refusal, not a silent zero."""
    tied = [t for t in (*grads, *sources) if t is not None]
    refused = iter(_Refuse.apply(*tied))  # type: ignore[no-untyped-call]
    return [None if g is None else next(refused) for g in grads]


class Once(torch.autograd.Function):
    """Identity whose gradients pass through `_Refuse`: what is computed from the outputs has no second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return grad_outputs
        if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in grad_outputs):
            raise RuntimeError(TWICE)  # is_grads_batched would lose the tie
        return _Refuse.apply(*grad_outputs)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple(t if t is None else t.view_as(t) for t in tangents)
