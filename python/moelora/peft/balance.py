"""The load balancing loss of one training forward, and how its gradient reaches the router exactly once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelora.nn.losses import router_aux_loss
from moelora.nn.routers import RoutingOutput


class Balance:
    """The auxiliary loss of one forward in training, with its factor.

    It is a term of ``outputs.loss``. Trainers that compute their own loss from the logits never differentiate that
    term. So the weights that a router makes and the loss of that routing leave one node together: a backward that comes
    through the weights alone finds no gradient of the loss there, and the node puts in the one it would have had.

    Parameters
    ----------
    kind : {"aux_loss", "z_loss", "switch"}
    coefficient : float
        Factor of the loss in ``outputs.loss``.
    routings : int
        How many routings the forward makes: the loss is the mean of theirs.
    """

    def __init__(self, kind: str, coefficient: float, routings: int) -> None:
        self.kind, self.coefficient, self.routings = kind, coefficient, routings
        self._losses: list[Tensor] = []

    def watch(self, output: RoutingOutput) -> Tensor:
        """The weights of `output`, whose backward brings the gradient of the loss along."""
        weights, loss = output.weights, router_aux_loss([output], self.kind)
        if self.coefficient and torch.is_grad_enabled():
            supply: Any = _Supply.apply
            weights, loss = supply(weights, loss, self.coefficient / self.routings)
        self._losses.append(loss)
        return weights

    def loss(self) -> Tensor:
        """The loss before the factor."""
        return torch.stack(self._losses).mean()


class _Supply(torch.autograd.Function):
    """Identity on the weights and the loss of one routing; a loss that nobody differentiates gets gradient `share`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, share: float) -> tuple[Tensor, Tensor]:
        ctx.share = share
        ctx.set_materialize_grads(False)
        return weights.view_as(weights), loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_weights, grad_loss = grad_outputs
        if grad_loss is None:
            grad_loss = grad_weights.new_full((), ctx.share)
        elif torch.compiler.is_compiling():  # where no gradient is a gradient of zero
            grad_loss = torch.where(grad_loss == 0, ctx.share, grad_loss)
        return grad_weights, grad_loss, None
