"""The CUDA kernels under autograd, for plain tensors on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora.nn.arguments import read_probabilities
from moelora.nn.cuda import on_gpu
from moelora.nn.formula import formula_backward
from moelora.nn.node import N_NODE, TWICE, Settings, draw, forward_and_save, refuse_twice
from moelora.nn.plain import is_unwatched
from moelora.runtime import HAS_EXT

if HAS_EXT:
    from moelora import _core

__all__ = ["call_on_gpu", "gpu_forward", "products_backward"]


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
    if x.get_device() != torch.cuda.current_device():  # where new tensors are made
        with torch.cuda.device(x.device):
            return call_on_gpu(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
    drops = type(dropout_p) is not float or dropout_p != 0
    dense = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided
    if drops and dense and not (x.is_contiguous() and x.data_ptr() % 16 == 0):
        x = x.clone(memory_format=torch.contiguous_format)  # the masks have no other way
    plain = _core.cuda_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
    if plain is None:
        return None
    adapters, scales, needs_grad, has_dropout = plain
    if (top_k or 0) > len(scales):
        return None
    probabilities = read_probabilities(dropout_p, len(scales))
    if any(probabilities) and (not has_dropout or torch.cuda.is_current_stream_capturing()):
        return None
    settings = (scales, None if top_k == len(scales) else top_k, draw(probabilities), None)
    if needs_grad and torch.is_grad_enabled():
        return apply_on_gpu(x, routing_weights, base_output, (weight, bias), settings, *adapters)
    y, _ = gpu_forward(x, routing_weights, base_output, (weight, bias), settings, adapters, keep_hidden=False)
    return y


def gpu_forward(
    x: Tensor,
    routing_weights: Tensor,
    base_output: Tensor | None,
    frozen: tuple[Tensor | None, Tensor | None],
    settings: Settings,
    adapters: tuple[Tensor, ...],
    *,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and hidden [..., C] with the experts' columns as the kernels lay them."""
    scaling, top_k, dropout, _ = settings
    weight, bias = frozen
    if weight is not None:
        done = _core.cuda_forward(x, adapters, routing_weights, scaling, weight, bias, dropout, top_k or 0, keep_hidden)
        if done is not None:
            return done[0], done[1]
        base_output = F.linear(x, weight, bias)
    call = (x, adapters, routing_weights, scaling, top_k or 0)
    prepared: Any = _core.cuda_prepare(*call, False, dropout)
    workspace, stacked_a, stacked_b, mixed, _ = prepared
    hidden = x.flatten(0, -2) @ stacked_a.t() if dropout is None else torch.empty_like(mixed)
    _core.cuda_mix(*call, hidden, dropout, workspace)
    y = mixed @ stacked_b.t() if base_output is None else torch.addmm(base_output.flatten(0, -2), mixed, stacked_b.t())
    return y.view(*x.shape[:-1], y.shape[-1]), hidden.view(*x.shape[:-1], hidden.shape[-1]) if keep_hidden else None


class _RoutedLoRAOnGPU(torch.autograd.Function):
    """The CUDA kernels under autograd; arguments as those of `_RoutedLoRA`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing_weights: Tensor,
        base_output: Tensor | None,
        frozen: tuple[Tensor | None, Tensor | None],
        settings: Settings,
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
            grads = _kernels_backward(ctx, saved, grad_y)
            if grads is None and on_gpu(grad_y):
                if ctx.settings[2] is None:
                    grads = products_backward(ctx, saved, grad_y)
                else:  # what may be unusual is where its rows lie
                    copy = grad_y.clone(memory_format=torch.contiguous_format)
                    grads = _kernels_backward(ctx, saved, copy)
        if grads is not None:
            return tuple(refuse_twice(grads, [grad_y, *saved]) if twice else grads)
        if twice:
            raise RuntimeError(TWICE)
        grads = formula_backward(ctx, saved, grad_y)
        return (*grads[:2], grad_y if need[2] else None, None, None, *grads[2:])


apply_on_gpu: Callable[..., Tensor] = super(torch.autograd.Function, _RoutedLoRAOnGPU).apply


def _kernels_backward(ctx: Any, saved: tuple[Any, ...], grad_y: Tensor) -> tuple[Any, ...] | None:
    """Gradients of the node's arguments by kernels alone, but for g W with dropout; None: not plain, or none for it."""
    need, weight, (scaling, top_k, dropout) = ctx.needs_input_grad, saved[3], ctx.settings
    base = None
    if dropout is not None and need[0] and weight is not None:
        with torch.no_grad():
            base = grad_y @ weight
    return _core.cuda_backward(saved, need, scaling, grad_y, base, dropout, top_k or 0)


@torch.no_grad()
def products_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Tensor | None] | None:
    """Gradients of the node's arguments by torch's products, what lies between them by kernels; None: not plain."""
    x, hidden, routing_weights, weight, *adapters = saved
    need, (scaling, top_k, _) = ctx.needs_input_grad, ctx.settings
    n, call = len(scaling), (grad_y, tuple(adapters), routing_weights, scaling, top_k or 0)
    prepared = _core.cuda_prepare(*call, True, None)
    if prepared is None:
        return None
    workspace, stacked_a, stacked_b, mixed, weighted = prepared
    g = grad_y.flatten(0, -2)
    torch.mm(g, stacked_b, out=mixed)
    grad_w = torch.empty_like(routing_weights, memory_format=torch.contiguous_format) if need[1] else None
    _core.cuda_mix_backward(*call, hidden, grad_w, workspace)
    grads: list[Tensor | None] = [None, grad_w, grad_y if need[2] else None, None, None]
    if need[0]:
        base = None if weight is None else g @ weight
        grad_x = mixed @ stacked_a if base is None else torch.addmm(base, mixed, stacked_a)
        grads[0] = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
    columns = [0]
    for a in adapters[:n]:
        columns.append(columns[-1] - (-a.shape[0] // 8) * 8)
    for first, left, right in ((0, mixed, x), (n, weighted, grad_y)):
        wanted = need[N_NODE + first : N_NODE + first + n]
        dtype = adapters[first].dtype
        stacked = torch.mm(left.t(), right.flatten(0, -2), out_dtype=dtype) if True in wanted else None
        for e, adapter in enumerate(adapters[first : first + n]):
            if stacked is None or not wanted[e]:
                grads.append(None)
                continue
            rank = adapter.shape[0 if first == 0 else 1]
            rows = stacked[columns[e] : columns[e] + rank]
            grads.append(rows if first == 0 else rows.t().clone(memory_format=torch.contiguous_format))
    return grads
