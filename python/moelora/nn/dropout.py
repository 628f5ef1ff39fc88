"""Dropout of x, apart for each expert, by masks that are drawn again wherever they are needed, never kept.

A mask is a pure function of a seed and of expert, token and column: the one that the C core and the CUDA kernels
compute (csrc/core/kernels/philox.h), here in torch operations. Where a GPU takes the formula it is another one, which
torch's own generator draws there in one kernel, when it is given that seed; not inside torch.func's transforms, of
which vmap may batch the seed. The seed comes from torch's generator on the CPU: what reproduces or restores that, as
`torch.manual_seed` and checkpointing do, reproduces the masks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from moelora.nn.plain import is_recorded

__all__ = ["draw_seed", "dropped", "dropped_grads", "dropped_linear"]


def draw_seed() -> Tensor:
    """Seed of one call's masks: int64, no axes, from the CPU's generator whatever device computes.

    Nothing waits for another device then, and checkpointing always restores that generator.
    """
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def dropped(x: Tensor, seed: Tensor | int, expert: int, p: float, *, as_kernels: bool = False) -> Tensor:
    """`x` [..., d] as an expert sees it: dropped elements are 0, the others divided by the share that is kept.

    `as_kernels`: by the kernels' masks on any device.
    """
    return _masked(x, *_mask(x, seed, expert, p, as_kernels))


def dropped_linear(x: Tensor, lora_A: Tensor, ranks: Sequence[int], dropout_p: Sequence[float]) -> Tensor:
    """Every expert's own x times its A [r_e, d], which are stacked in `lora_A` [R, d]: [..., R].

    Keeps for the backward what a plain product does, and a seed. Compilers and tracers get torch's own dropout instead:
    they know it, and the many small operations of a mask would cost them minutes. So does a CUDA graph, which would
    repeat one seed for ever, and a DTensor, which meets no plain mask.
    """
    if is_recorded() or type(x).__name__ == "DTensor" or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        parts = zip(lora_A.split(list(ranks)), dropout_p, strict=True)
        return torch.cat([F.linear(F.dropout(x, p), a) for a, p in parts], -1)
    # Once for all uses: a transform's own forward runs below its level, the backward in it or in one that began later.
    as_kernels = torch._C._are_functorch_transforms_active()
    hidden: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x, lora_A, draw_seed(), tuple(ranks), tuple(dropout_p), as_kernels
    )
    return hidden


def dropped_grads(
    grad: Tensor,
    x: Tensor | None,
    lora_A: Sequence[Tensor],
    seed: Tensor | int,
    dropout_p: Sequence[float],
    *,
    need_x: bool,
    as_kernels: bool = False,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of `dropped_linear`'s x, if needed, and A's, if x is given, from that of its result [..., R].

    `as_kernels`: of the same product by kernels, which have masks of their own on a GPU.
    """
    grad_x: Any = 0 if need_x else None
    grads_A: list[Tensor] | None = None if x is None else []
    for e, (a, g) in enumerate(zip(lora_A, grad.split([a.shape[0] for a in lora_A], -1), strict=True)):
        grad_seen = g @ a if need_x or x is None else x
        mask = _mask(grad_seen, seed, e, dropout_p[e], as_kernels)
        if need_x:
            grad_x = grad_x + _masked(grad_seen, *mask)
        if x is not None and grads_A is not None:
            grads_A.append(g.reshape(-1, g.shape[-1]).mT @ _masked(x, *mask).reshape(-1, x.shape[-1]))
    return grad_x, grads_A


def _linear(
    x: Tensor, lora_A: Tensor, seed: Tensor, ranks: Sequence[int], dropout_p: Sequence[float], as_kernels: bool
) -> Tensor:
    seen = [dropped(x, seed, e, p, as_kernels=as_kernels) for e, p in enumerate(dropout_p)]
    return torch.cat([F.linear(x_e, a) for x_e, a in zip(seen, lora_A.split(list(ranks)), strict=True)], -1)


class _Linear(torch.autograd.Function):
    """`_linear`, with a backward that draws the masks again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        lora_A: Tensor,
        seed: Tensor,
        ranks: tuple[int, ...],
        dropout_p: tuple[float, ...],
        as_kernels: bool,
    ) -> Tensor:
        return _linear(x, lora_A, seed, ranks, dropout_p, as_kernels)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, lora_A, seed, *ctx.settings = inputs
        ctx.save_for_backward(x, lora_A, seed)
        ctx.save_for_forward(x, lora_A, seed)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, lora_A, seed = ctx.saved_tensors
        ranks, dropout_p, as_kernels = ctx.settings
        need_x, need_A, *_ = ctx.needs_input_grad
        kept_x, parts = x if need_A else None, lora_A.split(list(ranks))
        grad_x, grads_A = dropped_grads(grad, kept_x, parts, seed, dropout_p, need_x=need_x, as_kernels=as_kernels)
        return grad_x, None if grads_A is None else torch.cat(grads_A), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent_x: Any, tangent_A: Any, *_: Any) -> Any:
        x, lora_A, seed = ctx.saved_tensors
        terms = []
        if tangent_x is not None:
            terms.append(_linear(tangent_x, lora_A, seed, *ctx.settings))
        if tangent_A is not None:
            terms.append(_linear(x, tangent_A, seed, *ctx.settings))
        return sum(terms)


# ---- the masks ----


def _masked(x: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    return x if kept is None else torch.where(kept, x * scale, 0)


def _mask(
    like: Tensor, seed: Tensor | int, expert: int, p: float, as_kernels: bool = False
) -> tuple[Tensor | None, float]:
    """Which elements of a tensor such as this are kept, None for all of them, and what those are multiplied by."""
    # Of 2^16 numbers that an element may draw. A p below 1 is never rounded to 1.
    numbers = 2**16
    drops = math.floor(p * numbers + 0.5)
    if drops == numbers and p < 1:
        drops -= 1
    if drops == 0:
        return None, 1.0
    if drops == numbers:
        return torch.zeros_like(like, dtype=torch.bool), 0.0
    kept = _drawn if like.is_cuda and not as_kernels else _kept
    return kept(like, seed, expert, drops), numbers / (numbers - drops)


_LOW = 2**32 - 1
_COLUMNS, _LANES = 128, 16  # columns drawn at a time, by so many counters


def _kept(x: Tensor, seed: Tensor | int, expert: int, drops: int) -> Tensor:
    """Which elements of `x` are not among those that draw one of the first `drops` of 2^16 numbers."""
    d = x.shape[-1]
    groups = -(-d // _COLUMNS)
    tokens = torch.arange(math.prod(x.shape[:-1]), device=x.device)[:, None]
    lanes = torch.arange(groups * _LANES, device=x.device)
    slices = []
    for word in _philox(lanes, tokens, expert, seed):
        slices += [word & 0xFFFF >= drops, word >> 16 >= drops]
    kept = torch.stack([s.unflatten(-1, (groups, _LANES)) for s in slices], -2)
    return kept.reshape(*kept.shape[:-3], groups * _COLUMNS)[..., :d].reshape(x.shape)


def _drawn(x: Tensor, seed: Tensor | int, expert: int, drops: int) -> Tensor:
    """The same by the generator of x's device."""
    generator = torch.Generator(x.device).manual_seed((int(seed) + expert * 0x9E3779B97F4A7C15) % 2**63)
    # A backward inside a vmap needs what its forward drew outside: the same mask for every gradient.
    with temporarily_clear_interpreter_stack():
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)  # by its elements' order, whatever x's strides
        return kept.bernoulli_(1 - drops / 2**16, generator=generator)


def _philox(lanes: Tensor, tokens: Tensor, expert: int, seed: Tensor | int) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words for each token and lane.

    Products of two 32-bit numbers may wrap to negative ones in int64; their halves are cut out by masks all the same.
    """
    c0: Any = lanes
    c1, c2, c3 = tokens & _LOW, tokens >> 32, expert
    for i in range(7):
        key0, key1 = (seed + i * 0x9E3779B9) & _LOW, ((seed >> 32) + i * 0xBB67AE85) & _LOW
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (p1 >> 32 & _LOW) ^ c1 ^ key0, p1 & _LOW
        c2, c3 = (p0 >> 32 & _LOW) ^ c3 ^ key1, p0 & _LOW
    return c0, c1, c2, c3
