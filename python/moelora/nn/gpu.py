"""The CUDA kernels under autograd, for plain tensors on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora.nn.arguments import read_probabilities
from moelora.nn.cuda import current_device, on_gpu
from moelora.nn.formula import formula_backward
from moelora.nn.node import N_NODE, TWICE, Dropout, draw, forward_and_save, refuse_twice
from moelora.nn.plain import is_unwatched
from moelora.runtime import HAS_EXT

if HAS_EXT:
    from moelora import _core

__all__ = ["call_on_gpu", "gpu_backward", "gpu_forward", "kernels_backward", "products_backward"]

_Settings: TypeAlias = tuple[tuple[float, ...], int | None, Dropout | None, Any]
"""scaling, top_k, dropout, and what `cuda_forward` returned where it has been called."""


def call_on_gpu(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: float | Sequence[float],
    base_output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    top_k: int | None,
    dropout_p: float | Sequence[float],
) -> Tensor | None:
    """What the CUDA kernels make of plain tensors on the current GPU; None where something is not plain."""
    if x.get_device() != current_device():  # where new tensors are made
        with torch.cuda.device(x.device):
            return call_on_gpu(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
    drops = type(dropout_p) is not float or dropout_p != 0
    if drops:
        dense = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided
        if dense and not (x.is_contiguous() and x.data_ptr() % 16 == 0):
            x = x.clone(memory_format=torch.contiguous_format)  # the masks have no other way
    call = (x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
    plain = _core.cuda_call(*call, top_k or 0, torch.is_grad_enabled(), None if drops else False)
    if plain is None:
        return None
    adapters, scales, record, done = plain
    if done is not None and done[2] is None and not record:
        y: Tensor = done[0]
        return y
    dropout = None
    if drops:
        probabilities = read_probabilities(dropout_p, len(scales))
        if any(probabilities) and torch.cuda.is_current_stream_capturing():
            return None
        dropout = draw(probabilities)
    settings = (scales, None if top_k == len(scales) else top_k, dropout, done)
    if record:
        return apply_on_gpu(x, routing_weights, base_output, (weight, bias), settings, *adapters)
    y, _ = gpu_forward(x, routing_weights, base_output, (weight, bias), settings, adapters, keep_hidden=False)
    return y


def gpu_forward(
    x: Tensor,
    routing_weights: Tensor,
    base_output: Tensor | None,
    frozen: tuple[Tensor | None, Tensor | None],
    settings: _Settings,
    adapters: tuple[Tensor, ...],
    *,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and hidden [..., C] with the experts' columns as the kernels lay them."""
    scaling, top_k, dropout, done = settings
    weight, bias = frozen
    if done is None:
        done = _core.cuda_forward(x, adapters, routing_weights, scaling, weight, bias, dropout, top_k or 0, keep_hidden)
    if done is not None:
        y, hidden, factors = done
        if factors is None:
            return y, hidden
        mixed, stacked_b = factors
    else:
        call = (x, adapters, routing_weights, scaling, top_k or 0)
        prepared: Any = _core.cuda_prepare(*call, False, dropout)
        workspace, stacked_a, stacked_b, mixed, _ = prepared
        hidden = x.flatten(0, -2) @ stacked_a.t() if dropout is None else torch.empty_like(mixed)
        _core.cuda_mix(*call, hidden, dropout, workspace)
        hidden = hidden.view(*x.shape[:-1], hidden.shape[-1]) if keep_hidden else None
    if weight is not None:
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(mixed, stacked_b.t())
        return y, hidden
    stacked_b = stacked_b.t()
    y = mixed @ stacked_b if base_output is None else torch.addmm(base_output.flatten(0, -2), mixed, stacked_b)
    return y.view(*x.shape[:-1], y.shape[-1]), hidden


class _RoutedLoRAOnGPU(torch.autograd.Function):
    """The CUDA kernels under autograd; arguments as those of `_RoutedLoRA`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing_weights: Tensor,
        base_output: Tensor | None,
        frozen: tuple[Tensor | None, Tensor | None],
        settings: _Settings,
        *adapters: Tensor,
    ) -> Tensor:
        return forward_and_save(gpu_forward, ctx, x, routing_weights, base_output, frozen, settings, adapters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        need = ctx.needs_input_grad
        if not (need[0] or need[1] or True in need[N_NODE:]):
            return (None, None, grad_y, *(None,) * (len(need) - 3))
        saved = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # create_graph
        grads: Sequence[Tensor | None] | None = None
        if is_unwatched():
            grads = gpu_backward(ctx, saved, grad_y)
            if grads is None and on_gpu(grad_y) and not torch._C._functorch.is_legacy_batchedtensor(grad_y):
                # What may be unusual is where its rows lie: the gradient of a sum has no memory of its own.
                grads = gpu_backward(ctx, saved, grad_y.clone(memory_format=torch.contiguous_format))
        if grads is not None:
            return tuple(refuse_twice(grads, [grad_y, *saved]) if twice else grads)
        if twice:
            raise RuntimeError(TWICE)
        grads = formula_backward(ctx, saved, grad_y)
        return (*grads[:2], grad_y if need[2] else None, None, None, *grads[2:])


apply_on_gpu: Callable[..., Tensor] = super(torch.autograd.Function, _RoutedLoRAOnGPU).apply


def gpu_backward(ctx: Any, saved: tuple[Any, ...], grad_y: Tensor) -> Sequence[Tensor | None] | None:
    """Gradients of the node's arguments; None: not plain."""
    need, weight, dropout = ctx.needs_input_grad, saved[3], ctx.settings[2]
    base = None
    if dropout is not None and need[0] and weight is not None:
        with torch.no_grad():
            base = (grad_y @ weight).to(grad_y.dtype)  # under autocast the product may come in another
    grads = kernels_backward(ctx, saved, grad_y, base)
    return products_backward(ctx, saved, grad_y, base) if grads is None and on_gpu(grad_y) else grads


def kernels_backward(
    ctx: Any, saved: tuple[Any, ...], grad_y: Tensor, base: Tensor | None = None
) -> tuple[Tensor | None, ...] | None:
    """Each in memory of its own; base: g W, if there is dropout and a weight. None: it takes torch's products."""
    need, weight, (scaling, top_k, dropout) = ctx.needs_input_grad, saved[3], ctx.settings
    done = _core.cuda_backward(saved, need, scaling, grad_y, base, dropout, top_k or 0)
    if done is None:
        return None
    grads: tuple[Tensor | None, ...]
    grads, factors = done
    if factors is None:
        return grads
    mixed, stacked_a = factors
    with torch.no_grad():
        if weight is None:
            grad_x = mixed @ stacked_a
        else:
            base = grad_y.flatten(0, -2) @ weight
            # Under autocast the product may come in another dtype.
            grad_x = (base.addmm_ if base.dtype is mixed.dtype else base.addmm)(mixed, stacked_a)
        return (grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1]), *grads[1:])


@torch.no_grad()
def products_backward(
    ctx: Any, saved: Sequence[Any], grad_y: Tensor, base: Tensor | None = None
) -> list[Tensor | None] | None:
    """The same by torch's products, what lies between them by kernels; those of all A in one memory."""
    x, hidden, routing_weights, weight, *adapters = saved
    need, (scaling, top_k, dropout) = ctx.needs_input_grad, ctx.settings
    n, call = len(scaling), (grad_y, tuple(adapters), routing_weights, scaling, top_k or 0)
    prepared = _core.cuda_prepare(*call, True, dropout)
    if prepared is None:
        return None
    workspace, stacked_a, stacked_b, mixed, weighted = prepared
    g, d_in = grad_y.flatten(0, -2), stacked_a.shape[1]
    torch.mm(g, stacked_b, out=mixed)
    grad_w = torch.empty_like(routing_weights, memory_format=torch.contiguous_format) if need[1] else None
    _core.cuda_mix_backward(*call, hidden, grad_w, dropout, workspace)

    need_A, need_B = need[N_NODE : N_NODE + n], need[N_NODE + n :]
    grad_x: Tensor | None = None
    grads_A: list[Tensor | None] = [None] * n
    if dropout is not None:
        if need[0]:
            grad_x = grad_y.new_empty((*grad_y.shape[:-1], d_in)) if base is None else base
        if x is not None:
            grads_A = [torch.empty_like(a) if needed else None for a, needed in zip(adapters[:n], need_A, strict=True)]
        given = None if x is None else tuple(grads_A)
        _core.cuda_drop_backward(*call, x, given, grad_x, base is not None, dropout, workspace)
    else:
        if need[0]:
            rows = mixed @ stacked_a if weight is None else torch.addmm(g @ weight, mixed, stacked_a)
            grad_x = rows.view(*grad_y.shape[:-1], d_in)
        grads_A = _cut(adapters[:n], need_A, 0, mixed, x)
    grads_B = _cut(adapters[n:], need_B, 1, weighted, grad_y)
    return [grad_x, grad_w, grad_y if need[2] else None, None, None, *grads_A, *grads_B]


def _cut(
    adapters: Sequence[Tensor], wanted: Sequence[bool], axis: int, narrow: Tensor, wide: Tensor | None
) -> list[Tensor | None]:
    """Gradients of A (whose axis 0 has the rank) or of B (axis 1): the expert's own rows of narrow^T wide."""
    if wide is None or True not in wanted:
        return [None] * len(adapters)
    stacked = torch.mm(narrow.t(), wide.flatten(0, -2), out_dtype=adapters[0].dtype)
    grads: list[Tensor | None] = []
    column = 0
    for adapter, needed in zip(adapters, wanted, strict=True):
        rank = adapter.shape[axis]
        rows = stacked[column : column + rank]
        if needed:
            grads.append(rows if axis == 0 else rows.t().clone(memory_format=torch.contiguous_format))
        else:
            grads.append(None)
        column += -(-rank // 8) * 8
    return grads
