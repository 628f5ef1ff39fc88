"""Losses that keep a router's experts in balance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora.nn.routers import RoutingOutput

__all__ = ["router_aux_loss"]


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
    losses = {"aux_loss": _aux_loss, "switch": _switch_loss, "z_loss": _z_loss}
    if kind not in losses:
        raise ValueError(f"kind must be one of {tuple(losses)}, got {kind!r}")
    if not outputs:
        raise ValueError("outputs must hold at least one RoutingOutput, got none")
    if kind != "z_loss" and _are_alike(outputs):  # the same numbers by a few operations on all of them
        first = outputs[0]
        sums, counts = (torch.stack(of) for of in zip(*((o.prob_sums, o.counts) for o in outputs), strict=True))
        return losses[kind](first._replace(prob_sums=sums, counts=counts)).mean()
    return average([losses[kind](output) for output in outputs])


def _are_alike(outputs: Sequence[RoutingOutput]) -> bool:
    """Whether the routings are of the same tokens and experts, on one device."""
    first = outputs[0]
    of = first.prob_sums.shape, first.prob_sums.dtype, first.prob_sums.device
    return len(outputs) > 1 and all(
        o.activated is first.activated
        and (o.n_tokens is first.n_tokens or (type(o.n_tokens) is int and o.n_tokens == first.n_tokens))
        and (o.prob_sums.shape, o.prob_sums.dtype, o.prob_sums.device) == of
        for o in outputs
    )


def average(losses: Sequence[Tensor]) -> Tensor:
    """The mean of the losses of several routings, whose gates may be on several devices."""
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _aux_loss(output: RoutingOutput) -> Tensor:
    live, u = _live(output), _per_token(output.prob_sums, output)
    n = live.sum().to(u.dtype)
    loss: Tensor = ((u - 1 / n) * live).square().sum(-1) / n
    return loss * (output.n_tokens > 0)


def _switch_loss(output: RoutingOutput) -> Tensor:
    u = _per_token(output.prob_sums, output)
    f = _per_token(output.counts.to(u.dtype), output)
    return _live(output).sum() * (f * u).sum(-1)  # u is 0 for an expert that takes no part


def _z_loss(output: RoutingOutput) -> Tensor:
    squares = output.logits.masked_fill(~_live(output), -torch.inf).logsumexp(-1).square()
    if output.mask is not None:
        squares = squares.masked_fill(~output.mask, 0)
    return _per_token(squares.sum(), output)


def _live(output: RoutingOutput) -> Tensor:
    """[N]: the experts that take part; all of them where none is activated."""
    if output.activated is None:
        return output.prob_sums.new_ones(output.prob_sums.shape[-1], dtype=torch.bool)
    return output.activated | ~output.activated.any()


def _per_token(sums: Tensor, output: RoutingOutput) -> Tensor:
    n = output.n_tokens
    return sums / (n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1))
