"""Losses that keep a router's experts in balance."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelora.nn.routers import RoutingOutput

__all__ = ["BalanceLoss", "average", "router_aux_loss"]


def router_aux_loss(outputs: Sequence[RoutingOutput], kind: str) -> Tensor:
    r"""Compute the load balancing loss of one forward, averaged over its routings.

    With T unmasked tokens, N experts, :math:`u_i` the mean probability of expert i before top-k and :math:`f_i` the
    share of tokens whose top k holds it:

    ============ =======================================================================
    "aux_loss"   :math:`\frac1N \sum_i (u_i - 1/N)^2`, as DyLoRA-MoE does
    "switch"     :math:`N \sum_i f_i u_i` [1]_
    "z_loss"     :math:`\frac1T \sum_t (\log \sum_i e^{l_{ti}})^2` of the gate's logits l [2]_
    ============ =======================================================================

    Experts that are not activated count neither in N nor in the sums. Where every token is masked, the loss is 0.

    Parameters
    ----------
    outputs : sequence of RoutingOutput
        One for each layer that was routed; a routing that serves all layers is a sequence of one.
    kind : {"aux_loss", "switch", "z_loss"}

    Returns
    -------
    Tensor
        A scalar, float32 at least, where the first of the outputs is; differentiable in the logits of the gates.

    Raises
    ------
    ValueError
        `kind` is unknown, or `outputs` is empty.

    References
    ----------
    .. [1] W. Fedus, B. Zoph, N. Shazeer, "Switch Transformers", JMLR 23, 2022, section 2.2.
    .. [2] B. Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", 2022, section 3.2.
    """
    loss = BalanceLoss(kind)
    if not outputs:
        raise ValueError("outputs must hold at least one RoutingOutput, got none")
    alike = len(outputs) > 1 and all(_are_alike(output, outputs[0]) for output in outputs)
    if alike and kind != "z_loss":  # the same numbers by a few operations on all of them
        sums, counts = (torch.stack(of) for of in zip(*((o.prob_sums, o.counts) for o in outputs), strict=True))
        return loss(outputs[0]._replace(prob_sums=sums, counts=counts)).mean()
    return average([loss(output) for output in outputs])


def average(losses: Sequence[Tensor]) -> Tensor:
    """The mean of the losses of several routings, whose gates may be on several devices."""
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


class BalanceLoss:
    """The loss of one routing after the other; what follows from tokens and experts alone is made once for all layers.

    Called with one routing, it returns a scalar; with sums and counts [L, N] of several, one for each of them, [L].
    """

    def __init__(self, kind: str) -> None:
        losses = {"aux_loss": _aux_loss, "switch": _switch_loss, "z_loss": _z_loss}
        if kind not in losses:
            raise ValueError(f"kind must be one of {tuple(losses)}, got {kind!r}")
        self._loss = losses[kind]
        self._common: _Common | None = None

    def __call__(self, output: RoutingOutput) -> Tensor:
        if self._common is None or not _are_alike(output, self._common.first):
            self._common = _common_of(output)
        return self._loss(output, self._common)


class _Common(NamedTuple):
    """What routings of the same tokens and experts have in common. Where no expert is activated, all take part."""

    first: RoutingOutput
    """The one that this was made of."""
    excluded: Tensor | None
    """[N] of bool: the experts that take no part; None: there are none."""
    n: Tensor | int
    """Number of experts that take part."""
    tokens: Tensor | int
    """Number of tokens; 1 where there are none."""
    divisor: Tensor
    """[N]: that number, infinite for experts that take no part."""
    minus_even: Tensor
    """[N]: -1 / n, 0 for experts that take no part."""
    scale: Tensor | float
    """1 / n, 0 where there are no tokens."""


def _common_of(output: RoutingOutput) -> _Common:
    sums, excluded = output.prob_sums, None
    n: Tensor | int = sums.shape[-1]
    n_tokens = output.n_tokens.to(sums.dtype) if isinstance(output.n_tokens, Tensor) else output.n_tokens
    tokens = n_tokens.clamp(min=1) if isinstance(n_tokens, Tensor) else max(n_tokens, 1)
    divisor = sums.new_ones(sums.shape[-1]) * tokens
    minus_even = torch.full_like(divisor, -1 / sums.shape[-1])
    if output.activated is not None:
        excluded = ~output.activated & output.activated.any()
        n = (~excluded).sum().to(sums.dtype)
        divisor = divisor.masked_fill(excluded, torch.inf)
        minus_even = (-1 / n).expand_as(divisor).masked_fill(excluded, 0)
    scale = n_tokens.clamp(max=1) / n if isinstance(n_tokens, Tensor) else min(n_tokens, 1) / n
    return _Common(output, excluded, n, tokens, divisor, minus_even, scale)


def _are_alike(one: RoutingOutput, other: RoutingOutput) -> bool:
    """Whether the routings are of the same tokens and experts, on one device."""
    sums, others = one.prob_sums, other.prob_sums
    return (
        one.activated is other.activated
        and (one.n_tokens is other.n_tokens or (type(one.n_tokens) is int and one.n_tokens == other.n_tokens))
        and (sums.shape, sums.dtype, sums.device) == (others.shape, others.dtype, others.device)
    )


def _aux_loss(output: RoutingOutput, common: _Common) -> Tensor:
    off = torch.addcdiv(common.minus_even, output.prob_sums, common.divisor)  # u - 1 / n
    loss: Tensor = off.square().sum(-1) * common.scale
    return loss


def _switch_loss(output: RoutingOutput, common: _Common) -> Tensor:
    sums = output.prob_sums  # 0 for an expert that takes no part
    loss: Tensor = (output.counts.to(sums.dtype) * sums).sum(-1) * (common.n / common.tokens**2)
    return loss


def _z_loss(output: RoutingOutput, common: _Common) -> Tensor:
    logits = output.logits
    if common.excluded is not None:
        logits = logits.masked_fill(common.excluded, -torch.inf)
    squares = logits.logsumexp(-1).square()
    if output.mask is not None:
        squares = squares.masked_fill(~output.mask, 0)
    loss: Tensor = squares.sum() / common.tokens
    return loss
