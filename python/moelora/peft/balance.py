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
    term, so every weight a router makes passes through a node that, in such a backward, adds the gradient of the term
    itself. The term is the last node of the graph and runs first: it tells the others that they are not needed.
    """

    def __init__(self, kind: str, coefficient: float) -> None:
        self.kind, self.coefficient = kind, coefficient
        self.claimed = False
        self._outputs: list[RoutingOutput] = []
        self._gradients: list[tuple[Tensor | None, Tensor | None]] = []

    def watch(self, output: RoutingOutput) -> Tensor:
        """The weights of `output`, as a node that can supply the gradient of the loss."""
        weights: Tensor = output.weights
        if self.coefficient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            index = len(self._outputs)
            self._outputs.append(output)
            supply: Any = _Supply.apply
            weights = supply(weights, output.prob_sums, output.logits, self, index)
        return weights

    def term(self, loss: Tensor) -> Tensor:
        """What is added to ``outputs.loss``, from the value of the loss before the factor."""
        term = loss * self.coefficient
        claim: Any = _Claim.apply
        return term if torch.compiler.is_compiling() else claim(term, self)

    def gradients(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradient of the term with respect to (prob_sums, logits) of the routing with this index."""
        if not self._gradients:
            with torch.enable_grad():
                outputs = [
                    o._replace(
                        prob_sums=o.prob_sums.detach().requires_grad_(), logits=o.logits.detach().requires_grad_()
                    )
                    for o in self._outputs
                ]
                leaves = [leaf for o in outputs for leaf in (o.prob_sums, o.logits)]
                term = router_aux_loss(outputs, self.kind) * self.coefficient
                flat = torch.autograd.grad(term, leaves, allow_unused=True)
            self._gradients = list(zip(flat[::2], flat[1::2], strict=True))
        return self._gradients[index]


class _Claim(torch.autograd.Function):
    """Identity on the term in ``outputs.loss``: its backward says that the term is being differentiated."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, balance: Balance) -> Tensor:
        ctx.balance = balance
        return term.view_as(term)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        ctx.balance.claimed = True
        return grad_outputs[0], None


class _Supply(torch.autograd.Function):
    """Identity on the weights: its backward adds the gradient of the term where nobody claimed it."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, prob_sums: Tensor, logits: Tensor, balance: Balance, index: int) -> Tensor:
        ctx.balance, ctx.index = balance, index
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads = (None, None) if ctx.balance.claimed else ctx.balance.gradients(ctx.index)
        return grad_outputs[0], *grads, None, None
