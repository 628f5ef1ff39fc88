"""The C core under autograd, for plain dense CPU tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora import runtime
from moelora.nn.formula import as_dtype, core_dtype, formula_backward
from moelora.nn.node import N_NODE, TWICE, Settings, forward_and_save, refuse_twice
from moelora.nn.plain import is_unwatched, uses_core

if runtime.HAS_EXT:
    from moelora import _core

__all__ = ["apply_core", "core_backward", "core_forward"]

_ACCUMULATE_X = 1  # ML_ACCUMULATE_X of moelora.h


def core_forward(
    x: Tensor,
    routing_weights: Tensor,
    base_output: Tensor | None,
    frozen: tuple[Tensor | None, Tensor | None],
    settings: Settings,
    adapters: tuple[Tensor, ...],
    *,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """y in x's dtype, and hidden in the core's where it is wanted; x has two or three axes."""
    scaling, top_k, dropout, total_rank = settings
    weight, bias = frozen
    threads = runtime.get_num_threads()
    if total_rank is not None:
        kept_rank = total_rank if keep_hidden else 0
        plain: tuple[Tensor, Tensor | None] = _core.forward_tensors(
            x, adapters, routing_weights, scaling, base_output, weight, bias, dropout, kept_rank, top_k or 0, threads
        )
        return plain
    n, d_out = len(scaling), adapters[-1].shape[0]
    ranks, dtype = [a.shape[0] for a in adapters[:n]], core_dtype(x.dtype)
    if weight is None:
        y, base = torch.empty((*x.shape[:-1], d_out), dtype=dtype, device="cpu"), base_output
    else:
        y = base = as_dtype(dtype, F.linear(x, weight, bias))
    hidden = torch.empty((*x.shape[:-1], sum(ranks)), dtype=dtype, device="cpu") if keep_hidden else None
    # Converted copies live in these names until the core returns.
    c_x, c_w, *c_adapters = [as_dtype(dtype, t) for t in (x, routing_weights, *adapters)]
    c_base = None if base is None else as_dtype(dtype, base)
    views = [_matrix(t) for t in c_adapters]
    _core.forward_raw(
        int(dtype is torch.float64),
        (*_batch_and_seq(x), x.shape[-1], d_out),
        _tokens(c_x),
        views[:n],
        views[n:],
        ranks,
        _weights(c_w, x.dim()),
        scaling,
        None if c_base is None else _tokens(c_base),
        _tokens(y),
        None if hidden is None else _tokens(hidden),
        top_k or 0,
        threads,
        dropout,
    )
    return as_dtype(x.dtype, y), hidden


class _RoutedLoRA(torch.autograd.Function):
    """The C core under autograd: what may need a gradient, the frozen base, settings; adapters last, A before B."""

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
        return forward_and_save(core_forward, ctx, x, routing_weights, base_output, frozen, settings, adapters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        need = ctx.needs_input_grad
        if not (need[0] or need[1] or True in need[N_NODE:]):
            return (None, None, grad_y, *(None,) * (len(need) - 3))
        saved = ctx.saved_tensors  # once: checkpointing recomputes on every reading
        scaling, top_k, dropout = ctx.settings
        twice = torch.is_grad_enabled()  # create_graph
        if not twice and is_unwatched():
            threads = runtime.get_num_threads()
            plain = _core.backward_tensors(saved, need, scaling, grad_y, dropout, top_k or 0, threads)
            if plain is not None:
                return plain
        if uses_core(grad_y, *saved):
            grads = core_backward(ctx, saved, grad_y)
            if twice:
                grads = refuse_twice(grads, [grad_y, *saved])
        elif twice:
            raise RuntimeError(TWICE)
        else:
            grads = formula_backward(ctx, saved, grad_y)
        return (*grads[:2], grad_y if need[2] else None, None, None, *grads[2:])


# What Function.apply comes down to where no torch.func transform is active, which routed_lora has made sure of.
apply_core: Callable[..., Tensor] = super(torch.autograd.Function, _RoutedLoRA).apply


def core_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Tensor | None]:
    """Gradients of x, the routing weights and the adapters, None where not needed."""
    x, hidden, routing_weights, weight, *adapters = saved
    need_x, need_w, *_ = ctx.needs_input_grad
    need_adapters = ctx.needs_input_grad[-len(adapters) :]
    dtype, (scaling, top_k, dropout) = core_dtype(grad_y.dtype), ctx.settings
    n, axes, d_in = len(scaling), grad_y.dim(), adapters[0].shape[1]
    wanted = zip((routing_weights, *adapters), (need_w, *need_adapters), strict=True)
    grad_w, *grad_adapters = [torch.empty_like(t, dtype=dtype) if needed else None for t, needed in wanted]
    grad_x = None
    if need_x:
        # Under autocast the product may come in another dtype.
        shape = (*grad_y.shape[:-1], d_in)
        grad_x = grad_y.new_empty(shape, dtype=dtype) if weight is None else (grad_y @ weight).to(dtype)
    # Converted copies live in these names until the core returns.
    c_grad_y, c_w, *c_adapters = [as_dtype(dtype, t) for t in (grad_y, routing_weights, *adapters)]
    c_x = None if x is None else as_dtype(dtype, x)
    views = [_matrix(t) for t in c_adapters]
    grad_views = [None if t is None else _matrix(t) for t in grad_adapters]
    _core.backward_raw(
        int(dtype is torch.float64),
        (*_batch_and_seq(grad_y), d_in, grad_y.shape[-1]),
        (0, 0, 0, 0) if c_x is None else _tokens(c_x),
        views[:n],
        views[n:],
        [a.shape[0] for a in adapters[:n]],
        _weights(c_w, axes),
        scaling,
        _tokens(c_grad_y),
        None if hidden is None else _tokens(hidden),
        None if grad_x is None else _tokens(grad_x),
        grad_views[:n],
        grad_views[n:],
        None if grad_w is None else _weights(grad_w, axes),
        top_k or 0,
        runtime.get_num_threads(),
        0 if weight is None else _ACCUMULATE_X,
        dropout,
    )
    inputs = zip((grad_x, grad_w, *grad_adapters), (grad_y, routing_weights, *adapters), strict=True)
    return [None if g is None else as_dtype(t.dtype, g) for g, t in inputs]


def _batch_and_seq(t: Tensor) -> tuple[int, int]:
    return (t.shape[0], t.shape[1]) if t.dim() == 3 else (1, t.shape[0])


# The views that the core reads and writes: a pointer, then strides in elements.


def _matrix(t: Tensor) -> tuple[int, int, int]:
    row, col = t.stride()
    return t.data_ptr(), row, col


def _tokens(t: Tensor) -> tuple[int, int, int, int]:
    """[B, S, width] as it is, [S, width] as one sequence."""
    batch, seq, col = t.stride() if t.dim() == 3 else (0, *t.stride())
    return t.data_ptr(), batch, seq, col


def _weights(t: Tensor, axes: int) -> tuple[int, int, int, int]:
    """Routing weights, or their gradient, for an x of so many axes: zero strides where tokens share them."""
    if t.dim() == axes:
        return _tokens(t)
    batch, col = t.stride() if t.dim() == 2 else (0, *t.stride())
    return t.data_ptr(), batch, 0, col
