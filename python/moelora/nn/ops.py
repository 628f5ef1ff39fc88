"""`routed_lora` as operators of torch's dispatcher, which torch.compile and torch.export keep as they are.

    moelora::routed_lora           -> y, and hidden, the experts' x A^T: empty unless it is kept
    moelora::routed_lora_forward   -> the same without gradients: what compiled code is left with
    moelora::routed_lora_backward  -> gradients of x, the routing weights, each A and each B: those that are needed

They compute with the code of the eager path, which doesn't use them: a call through the dispatcher and Python's
registrations costs more than a small layer does. Where the kernels can't read the tensors that come, the formula's
operations compute the same, in the kernels' layout of hidden: [..., R] in float32 or float64 on CPU, on a GPU
[..., C] in x's dtype, with the columns of `compiled.columns`.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora import runtime
from moelora.nn.compiled import columns
from moelora.nn.cpu import core_backward, core_forward
from moelora.nn.cuda import device_of, on_gpu
from moelora.nn.formula import core_dtype, mix
from moelora.nn.gpu import gpu_forward, kernels_backward, products_backward
from moelora.nn.node import N_NODE, refuse_twice
from moelora.nn.plain import is_unwatched, uses_core

if runtime.HAS_EXT:
    from moelora import _core

__all__: list[str] = []

_FORWARD = (
    "(Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor routing_weights, float[] scaling, Tensor? base_output, "
    "Tensor? weight, Tensor? bias, int? top_k, bool keep_hidden) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad_y, Tensor? x, Tensor? hidden, Tensor[] lora_A, Tensor[] lora_B, Tensor routing_weights, "
    "float[] scaling, Tensor? weight, int? top_k, bool[] need) -> Tensor[]"
)


# ---- what they compute ----


def _forward(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: Sequence[float],
    base_output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    top_k: int | None,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    call = (x, lora_A, lora_B, routing_weights, tuple(scaling), base_output, weight, bias)
    arguments, settings = (x, routing_weights, base_output, (weight, bias)), (call[4], top_k, None)
    y, hidden = None, None
    if not is_unwatched():
        pass
    elif on_gpu(x):
        on_its_gpu = _core.cuda_call(*call, top_k or 0, False, keep_hidden)
        if on_its_gpu is not None:
            adapters, _, _, done = on_its_gpu
            y, hidden = gpu_forward(*arguments, (*settings, done), adapters, keep_hidden=keep_hidden)
    elif x.numel():
        adapters, _, total_rank, _ = _core.plain_call(*call) or ((*lora_A, *lora_B), None, None, None)
        tensors = (*arguments[:3], weight, bias, *adapters)
        if total_rank is not None or uses_core(*(t for t in tensors if t is not None)):
            y, hidden = core_forward(*arguments, (*settings, total_rank), adapters, keep_hidden=keep_hidden)
    if y is None:
        y, hidden = _formula(*call, top_k)
    return y.contiguous(), hidden if keep_hidden and hidden is not None else x.new_empty(0)


def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    hidden: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: Sequence[float],
    weight: Tensor | None,
    top_k: int | None,
    need: Sequence[bool],
) -> list[Tensor]:
    grad_y = grad_y.contiguous()  # that of a sum is one number, expanded
    saved, scales = (x, hidden, routing_weights, weight, *lora_A, *lora_B), tuple(scaling)
    node_need = (*need[:2], False, False, False, *need[2:])
    node = SimpleNamespace(needs_input_grad=node_need, settings=(scales, top_k, None))
    grads: Sequence[Tensor | None] | None = None
    own = True  # each in memory of its own, as the results of operators have to be
    if not is_unwatched():
        pass
    elif on_gpu(grad_y):
        grads = kernels_backward(node, saved, grad_y)
        if grads is None:
            grads, own = products_backward(node, saved, grad_y), False
    elif grad_y.numel():
        threads = runtime.get_num_threads()
        grads = _core.backward_tensors(saved, node_need, scales, grad_y, None, top_k or 0, threads)
        if grads is None and uses_core(*(t for t in (grad_y, *saved) if t is not None)):
            first, second, *others = core_backward(node, saved, grad_y)
            grads = first, second, None, None, None, *others
    if grads is None:
        every, own = _formula_backward(grad_y, x, hidden, lora_A, lora_B, routing_weights, scales, weight, top_k), False
    else:
        every = [*grads[:2], *grads[N_NODE:]]
    wanted = [g for g, needed in zip(every, need, strict=True) if needed and g is not None]
    return [g.contiguous() for g in wanted] if own else [_alone(g) for g in wanted]


def _alone(t: Tensor) -> Tensor:
    if t.untyped_storage().nbytes() == t.numel() * t.element_size():
        return t.contiguous()
    return t.clone(memory_format=torch.contiguous_format)


def _stacked(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[int], Tensor, Tensor]:
    """How many columns of hidden each expert has, all A [C, d_in] and all B [d_out, C], zero where there is no rank."""
    widths = _widths(lora_A)
    a = torch.cat([F.pad(a, (0, 0, 0, width - a.shape[0])) for a, width in zip(lora_A, widths, strict=True)])
    b = torch.cat([F.pad(b, (0, width - b.shape[1])) for b, width in zip(lora_B, widths, strict=True)], 1)
    return widths, a.to(dtype), b.to(dtype)


def _widths(lora_A: Sequence[Tensor]) -> list[int]:
    ranks = [a.shape[0] for a in lora_A]
    return ranks if lora_A[0].device.type == "cpu" else columns(ranks)


def _dropped(routing_weights: Tensor, axes: int, top_k: int) -> Tensor:
    """Which experts are not among the top k, for results of so many axes."""
    dropped = routing_weights.argsort(dim=-1, descending=True, stable=True).argsort(-1) >= top_k
    return dropped.unsqueeze(1) if 1 < dropped.dim() < axes else dropped


def _compute_dtype(t: Tensor) -> torch.dtype:
    return core_dtype(t.dtype) if t.device.type == "cpu" else t.dtype


def _formula(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: Sequence[float],
    base_output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    top_k: int | None,
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(x)
    widths, a, b = _stacked(lora_A, lora_B, dtype)
    hidden = F.linear(x.to(dtype), a)
    if top_k is not None:
        dropped = _dropped(routing_weights, hidden.dim(), top_k)
        parts = zip(hidden.split(widths, -1), dropped.split(1, -1), strict=True)
        hidden = torch.cat([part.masked_fill(mask, 0) for part, mask in parts], -1)
    y = F.linear(mix(hidden, routing_weights, widths, scaling, top_k), b)
    base = base_output if weight is None else F.linear(x, weight, bias)
    return (y if base is None else y + base).to(x.dtype), hidden


def _formula_backward(
    grad_y: Tensor,
    x: Tensor | None,
    hidden: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: Sequence[float],
    weight: Tensor | None,
    top_k: int | None,
) -> list[Tensor | None]:
    """Written out, since nothing records operations inside of an operator; None where x or hidden is missing for it."""
    dtype = _compute_dtype(grad_y)
    widths, a, b = _stacked(lora_A, lora_B, dtype)
    g = grad_y.to(dtype)
    projected = g @ b  # P [..., C]
    mixed = mix(projected, routing_weights, widths, scaling, top_k)  # Q [..., C]
    grad_x = mixed @ a
    if weight is not None:
        grad_x = grad_x + grad_y @ weight
    grad_w = grad_a = grad_b = None
    if x is not None:
        grad_a = mixed.flatten(0, -2).mT @ x.to(dtype).flatten(0, -2)
    if hidden is not None:
        weighted = mix(hidden, routing_weights, widths, scaling, top_k)
        grad_b = g.flatten(0, -2).mT @ weighted.flatten(0, -2)
        products = zip((projected * hidden).split(widths, -1), scaling, strict=True)
        grad_w = torch.stack([s * product.sum(-1) for product, s in products], -1)  # of every token
        if top_k is not None:
            grad_w = grad_w.masked_fill(_dropped(routing_weights, grad_w.dim(), top_k), 0)
        if routing_weights.dim() == 1:
            grad_w = grad_w.flatten(0, -2).sum(0)
        elif routing_weights.dim() < grad_w.dim():
            grad_w = grad_w.sum(1)
    like, n = (grad_y, routing_weights, *lora_A, *lora_B), len(lora_A)
    grads_A = (
        [None] * n if grad_a is None else [t[: a.shape[0]] for t, a in zip(grad_a.split(widths), lora_A, strict=True)]
    )
    grads_B = (
        [None] * n
        if grad_b is None
        else [t[:, : b.shape[1]] for t, b in zip(grad_b.split(widths, 1), lora_B, strict=True)]
    )
    grads = zip((grad_x, grad_w, *grads_A, *grads_B), like, strict=True)
    return [None if grad is None else grad.to(t.dtype) for grad, t in grads]


# ---- what tracing sees: shapes and dtypes ----


def _fake_forward(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: Sequence[float],
    base_output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    top_k: int | None,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], lora_B[0].shape[0]))
    if not keep_hidden:
        return y, x.new_empty(0)
    return y, x.new_empty((*x.shape[:-1], sum(_widths(lora_A))), dtype=_compute_dtype(x))


def _fake_backward(
    grad_y: Tensor,
    x: Tensor | None,
    hidden: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: Sequence[float],
    weight: Tensor | None,
    top_k: int | None,
    need: Sequence[bool],
) -> list[Tensor]:
    shapes = [(*grad_y.shape[:-1], lora_A[0].shape[1]), *(t.shape for t in (routing_weights, *lora_A, *lora_B))]
    likes = (grad_y, routing_weights, *lora_A, *lora_B)
    return [like.new_empty(shape) for like, shape, needed in zip(likes, shapes, need, strict=True) if needed]


# ---- their gradients ----


def _apply(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: Sequence[float],
    base_output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    top_k: int | None,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    if not keep_hidden and torch.is_grad_enabled() and any(t.requires_grad for t in (routing_weights, *lora_B)):
        raise RuntimeError("moelora::routed_lora needs keep_hidden=True for gradients of routing_weights and lora_B")
    settings = tuple(scaling), top_k, keep_hidden
    y: Tensor
    hidden: Tensor
    y, hidden = _Operator.apply(  # type: ignore[no-untyped-call]
        x, routing_weights, base_output, (weight, bias), settings, *lora_A, *lora_B
    )
    return y, hidden


class _Operator(torch.autograd.Function):
    """routed_lora of the two operators that compute; arguments as those of the eager path's nodes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing_weights: Tensor,
        base_output: Tensor | None,
        frozen: tuple[Tensor | None, Tensor | None],
        settings: tuple[tuple[float, ...], int | None, bool],
        *adapters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        scaling, top_k, keep_hidden = settings
        n, need = len(scaling), ctx.needs_input_grad
        y, hidden = torch.ops.moelora.routed_lora_forward(
            x, adapters[:n], adapters[n:], routing_weights, scaling, base_output, *frozen, top_k, keep_hidden
        )
        ctx.settings = scaling, top_k
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        kept_x = x if True in need[-2 * n : -n] else None
        kept_hidden = hidden if need[1] or True in need[-n:] else None
        ctx.save_for_backward(kept_x, kept_hidden, routing_weights, frozen[0] if need[0] else None, *adapters)
        return y, hidden

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        need, (scaling, top_k) = ctx.needs_input_grad, ctx.settings
        wanted, n = [*need[:2], *need[N_NODE:]], len(scaling)
        every: list[Tensor | None] = [None] * len(wanted)
        if grad_y is not None and True in wanted:
            x, hidden, routing_weights, weight, *adapters = saved = ctx.saved_tensors
            grads = torch.ops.moelora.routed_lora_backward(
                grad_y, x, hidden, adapters[:n], adapters[n:], routing_weights, scaling, weight, top_k, wanted
            )
            if torch.is_grad_enabled():  # create_graph
                grads = refuse_twice(grads, [grad_y, *saved])
            needed = iter(grads)
            every = [next(needed) if this else None for this in wanted]
        return (*every[:2], grad_y if need[2] else None, None, None, *every[2:])


# ---- their registration ----


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """With its first tensor's GPU as the current one, where new tensors are made."""

    def on_its_device(t: Tensor, *others: Any) -> Any:
        with device_of(t):
            return function(t, *others)

    return on_its_device


_library = torch.library.Library("moelora", "FRAGMENT")
for _name, _arguments, _compute, _fake in (
    ("routed_lora", _FORWARD, _forward, _fake_forward),
    ("routed_lora_forward", _FORWARD, _forward, _fake_forward),
    ("routed_lora_backward", _BACKWARD, _backward, _fake_backward),
):
    _library.define(_name + _arguments, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _compute, "CPU")
    _library.impl(_name, _on_its_device(_compute), "CUDA")
    torch.library.register_fake(f"moelora::{_name}", _fake, lib=_library)
_library.impl("routed_lora", _apply, "Autograd")
