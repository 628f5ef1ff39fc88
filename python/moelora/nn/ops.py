"""`routed_lora` as operators of torch's dispatcher, which torch.compile and torch.export keep as they are.

    moelora::routed_lora           -> y, and hidden, the experts' x A^T: empty unless it is kept
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
from moelora.nn.cuda import on_gpu
from moelora.nn.formula import core_dtype, mix
from moelora.nn.gpu import gpu_backward, gpu_forward
from moelora.nn.node import TWICE, Settings
from moelora.nn.plain import is_unwatched, uses_core

if runtime.HAS_EXT:
    from moelora import _core

__all__: list[str] = []

_library = torch.library.Library("moelora", "FRAGMENT")
_library.define(
    "routed_lora(Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor routing_weights, float[] scaling, "
    "Tensor? base_output, Tensor? weight, Tensor? bias, int? top_k, bool keep_hidden) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "routed_lora_backward(Tensor grad_y, Tensor? x, Tensor? hidden, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor routing_weights, float[] scaling, Tensor? weight, int? top_k, bool[] need) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
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
    frozen, adapters = (weight, bias), (*lora_A, *lora_B)
    call = (x, lora_A, lora_B, routing_weights, tuple(scaling), base_output, weight, bias)
    settings: Settings = tuple(scaling), top_k, None, None
    tensors = [t for t in (x, routing_weights, base_output, weight, bias, *adapters) if t is not None]
    y, hidden = None, None
    if on_gpu(x):
        if is_unwatched() and _core.cuda_call(*call, top_k or 0, False, False) is not None:
            y, hidden = gpu_forward(
                x, routing_weights, base_output, frozen, settings, adapters, keep_hidden=keep_hidden
            )
    elif x.numel() and uses_core(*tensors):
        plain = _core.plain_call(*call)
        settings = (*settings[:3], None if plain is None else plain[2])
        y, hidden = core_forward(x, routing_weights, base_output, frozen, settings, adapters, keep_hidden=keep_hidden)
    if y is None:
        y, hidden = _formula(x, lora_A, lora_B, routing_weights, settings[0], base_output, weight, bias, top_k)
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
    grads: Sequence[Tensor | None] | None = None
    if on_gpu(grad_y):
        if is_unwatched():
            node = SimpleNamespace(needs_input_grad=node_need, settings=(scales, top_k, None))
            grads = gpu_backward(node, saved, grad_y)
    elif grad_y.numel() and uses_core(*(t for t in (grad_y, *saved) if t is not None)):
        threads = runtime.get_num_threads()
        grads = _core.backward_tensors(saved, node_need, scales, grad_y, None, top_k or 0, threads)
        if grads is None:
            node = SimpleNamespace(needs_input_grad=node_need, settings=(scales, top_k, None))
            first, second, *others = core_backward(node, saved, grad_y)
            grads = (first, second, None, None, None, *others)
    if grads is None:
        every = _formula_backward(grad_y, x, hidden, lora_A, lora_B, routing_weights, scales, weight, top_k)
    else:
        every = [*grads[:2], *grads[5:]]
    return [_own(g) for g, needed in zip(every, need, strict=True) if needed and g is not None]


def _own(t: Tensor) -> Tensor:
    """Without gaps and alone in its memory, as the results of operators have to be."""
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_A, lora_B, routing_weights, scaling, _, weight, _, top_k, keep_hidden = inputs
    _, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.settings = len(lora_A), scaling, top_k
    kept_x = x if any(a.requires_grad for a in lora_A) else None
    kept_hidden = hidden if any(t.requires_grad for t in (routing_weights, *lora_B)) else None
    if kept_hidden is not None and not keep_hidden:
        raise RuntimeError("moelora::routed_lora needs keep_hidden=True for gradients of routing_weights and lora_B")
    ctx.save_for_backward(kept_x, kept_hidden, routing_weights, weight if x.requires_grad else None, *lora_A, *lora_B)


def _differentiate(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Any, ...]:
    n, scaling, top_k = ctx.settings
    need_x, need_A, need_B, need_w, _, need_base, *_ = ctx.needs_input_grad
    need = [need_x, need_w, *need_A, *need_B]
    grads: list[Tensor | None] = [None] * len(need)
    if grad_y is not None and True in need:
        x, hidden, routing_weights, weight, *adapters = ctx.saved_tensors
        needed = iter(
            torch.ops.moelora.routed_lora_backward(
                grad_y, x, hidden, adapters[:n], adapters[n:], routing_weights, scaling, weight, top_k, need
            )
        )
        grads = [next(needed) if wanted else None for wanted in need]
    grad_x, grad_w, *others = grads
    return grad_x, others[:n], others[n:], grad_w, None, grad_y if need_base else None, None, None, None, None


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(TWICE)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """With its first tensor's GPU as the current one, where new tensors are made."""

    def on_its_device(t: Tensor, *others: Any) -> Any:
        with torch.cuda.device(t.device):
            return function(t, *others)

    return on_its_device


_library.impl("routed_lora", _forward, "CPU")
_library.impl("routed_lora", _on_its_device(_forward), "CUDA")
_library.impl("routed_lora_backward", _backward, "CPU")
_library.impl("routed_lora_backward", _on_its_device(_backward), "CUDA")
torch.library.register_fake("moelora::routed_lora", _fake_forward, lib=_library)
torch.library.register_fake("moelora::routed_lora_backward", _fake_backward, lib=_library)
torch.library.register_autograd("moelora::routed_lora", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("moelora::routed_lora_backward", _refuse, lib=_library)
