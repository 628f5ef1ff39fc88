"""`routed_lora` in torch operations, on any device: A and B stacked, one product, scaled, one addmm."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora.nn.arguments import Call, autocast_enabled
from moelora.nn.compiled import columns
from moelora.nn.dropout import dropped_grads, dropped_linear
from moelora.nn.node import Once
from moelora.nn.plain import is_recorded

__all__ = ["as_dtype", "core_dtype", "formula", "formula_backward", "mix"]


def formula(call: Call, round_adapters: bool) -> Tensor:
    """`round_adapters`: to x's dtype, away from the CPU; else these products are float32."""
    x, kind = call.x, call.x.device.type
    for name, value in zip(call._fields, call, strict=True):
        for e, t in enumerate(value if isinstance(value, tuple) else (value,)):
            if not isinstance(t, Tensor) or (t.device == x.device and t.layout is torch.strided):
                continue
            place = f"{name}[{e}]" if isinstance(value, tuple) else name
            if t.device != x.device:
                raise ValueError(f"{place} must be on {x.device} as x is, got {t.device}")
            raise TypeError(f"{place} must be a dense tensor, got {t.layout}")
    if autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # the dtypes are chosen by now
            return formula(call, round_adapters)
    dtype, ranks, w = x.dtype, call.ranks, call.routing_weights
    adapters = (*call.lora_A, *call.lora_B)
    if kind == "cpu" or (not round_adapters and any(t.dtype is torch.float32 for t in adapters)):
        dtype = core_dtype(dtype)
    a, b = torch.cat(call.lora_A), torch.cat(call.lora_B, 1)
    if torch.is_grad_enabled() and not is_recorded():
        x, w, a, b = Once.apply(x, w, a, b)  # type: ignore[no-untyped-call]
    a, b = a.to(dtype), b.to(dtype)

    wide = x.to(dtype)
    hidden = dropped_linear(wide, a, ranks, call.dropout_p) if any(call.dropout_p) else F.linear(wide, a)
    mixed = mix(hidden, w, ranks, call.scaling, call.top_k)
    base = call.base_output if call.weight is None else F.linear(x, call.weight, call.bias)
    if base is None:
        y = F.linear(mixed, b)
    else:
        y = torch.addmm(base.to(dtype).flatten(0, -2), mixed.flatten(0, -2), b.t()).reshape(base.shape)
    return y.to(x.dtype)


def mix(
    hidden: Tensor, routing_weights: Tensor, ranks: Sequence[int], scaling: Sequence[float], top_k: int | None
) -> Tensor:
    """s_e w_e * H_e for all experts: [..., R] in hidden's dtype, 0 where top_k drops the expert."""
    n = len(ranks)
    w = routing_weights.to(core_dtype(hidden.dtype))
    if 1 < w.dim() < hidden.dim():  # one mixture per sequence
        w = w.unsqueeze(1)
    kept = None
    if top_k is not None:
        places = w.detach().argsort(dim=-1, descending=True, stable=True).argsort(-1)
        kept = places < top_k
        w = w.masked_fill(~kept, 0)
    if min(scaling) == max(scaling):
        w = w * scaling[0]
    else:
        w = torch.cat([w_e * s for w_e, s in zip(w.split(1, -1), scaling, strict=True)], -1)

    equal = min(ranks) == max(ranks)

    def spread(t: Tensor) -> Tensor:
        """[..., N] -> [..., N, 1], or [..., R] where ranks differ."""
        if equal:
            return t.unsqueeze(-1)
        columns = zip(t.split(1, -1), ranks, strict=True)
        return torch.cat([column.expand(*t.shape[:-1], rank) for column, rank in columns], -1)

    rows: Tensor = hidden.unflatten(-1, (n, ranks[0])) if equal else hidden
    if kept is not None:
        rows = rows.masked_fill(~spread(kept), 0)
    return (rows * spread(w)).to(hidden.dtype).reshape(hidden.shape)


def formula_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Tensor | None]:
    """The same where no kernel can read grad_y: batched by vmap (is_grads_batched), a subclass, traced."""
    x, hidden, routing_weights, weight, *adapters = saved
    scaling, top_k, dropout = ctx.settings
    n = len(scaling)
    lora_A, lora_B = adapters[:n], adapters[n:]
    ranks, on_cpu = [a.shape[0] for a in lora_A], routing_weights.device.type == "cpu"
    dtype = core_dtype(grad_y.dtype) if on_cpu else grad_y.dtype
    if hidden is None:  # then nothing below depends on its values
        hidden = routing_weights.new_zeros((*grad_y.shape[:-1], sum(ranks)), dtype=dtype)
    elif not on_cpu:
        parts = zip(hidden.split(columns(ranks), -1), ranks, strict=True)
        hidden = torch.cat([part[..., :rank] for part, rank in parts], -1)
    leaves = [t.detach().requires_grad_() for t in (hidden, routing_weights, *lora_B)]
    with torch.enable_grad():
        y = F.linear(mix(leaves[0], leaves[1], ranks, scaling, top_k), torch.cat(leaves[2:], 1).to(dtype))
    grad_hidden, grad_w, *grad_B = torch.autograd.grad(y, leaves, grad_y.to(dtype))
    seed, dropout_p = dropout or (0, (0.0,) * n)
    c_x, c_A = None if x is None else x.to(dtype), [a.to(dtype) for a in lora_A]
    grad_x, grads_A = dropped_grads(grad_hidden, c_x, c_A, seed, dropout_p, need_x=True, as_kernels=True)
    if weight is not None:
        grad_x = grad_x + grad_y @ weight
    grad_A: Sequence[Tensor | None] = grads_A or [None] * n
    inputs = zip((grad_x, grad_w, *grad_A, *grad_B), (grad_y, routing_weights, *adapters), strict=True)
    return [None if g is None else as_dtype(t.dtype, g) for g, t in inputs]


def core_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def as_dtype(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)  # .to takes its time to find that there is nothing to do
