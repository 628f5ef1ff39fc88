"""The load balancing loss of one training forward, and how its gradient reaches the router exactly once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from moelora.nn.losses import router_aux_loss
from moelora.nn.routers import RoutingOutput

_IGNORED = -100  # label of a token that the loss leaves out


def loss_shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss compares each position with the label of the next one."""
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def share_of_step(arguments: dict[str, Any], *, shifted: bool) -> float | Tensor | None:
    """What part of an optimizer step a forward with these arguments is; None: it is no training forward.

    A trainer that accumulates gradients passes ``num_items_in_batch``, the number of labels in all forwards of the step
    (and in all processes); the share is that of this forward's labels. Without it the forward stands for itself, and
    whoever accumulates divides ``outputs.loss``. Without labels beside it, the trainer has taken them out to compute
    the loss itself, and every token that is not padding is taken for one.

    Parameters
    ----------
    arguments : dict
        Of the model's forward, by name.
    shifted : bool
        See `loss_shifts_labels`.
    """
    labels, items = arguments.get("labels"), arguments.get("num_items_in_batch")
    if items is None:
        return None if labels is None else 1.0
    first = int(shifted)
    if arguments.get("shift_labels") is not None:
        labels, first = arguments["shift_labels"], 0
    if labels is not None:
        counted = labels[..., first:] != _IGNORED
    elif arguments.get("attention_mask") is not None:
        counted = arguments["attention_mask"][..., first:] != 0
    elif arguments.get("input_ids") is not None:
        counted = torch.ones_like(arguments["input_ids"][..., first:])
    else:
        return None
    items = torch.as_tensor(items, device=counted.device).flatten()[0]  # nn.DataParallel has one for each replica
    share: Tensor = counted.sum() / items.clamp(min=1)
    return share


class Balance:
    """The auxiliary loss of one forward in training, with its factor.

    It is a term of ``outputs.loss``. Trainers that compute their own loss from other outputs never differentiate that
    term, so every weight a router makes passes through a node that, in such a backward, adds the gradient of the term
    itself. The reported loss is the last node of the graph and runs first: where it is differentiated, in
    ``outputs.loss`` or in a loss of the caller's own, it tells the others that they are not needed.

    Parameters
    ----------
    kind : str
        Which formula, see `moelora.nn.router_aux_loss`.
    coefficient : float
        Factor of the loss.
    share : float or Tensor
        What part of an optimizer step the forward is.
    """

    def __init__(self, kind: str, coefficient: float, share: float | Tensor = 1.0) -> None:
        self.kind, self.coefficient, self.share = kind, coefficient, share
        self.claimed = False
        self._half = False  # computed in float16, where losses are scaled
        self._outputs: list[RoutingOutput] = []
        self._gradients: list[tuple[Tensor | None, Tensor | None]] = []
        self._observed: Tensor | None = None  # the trainer's own factor, see `observe`

    def watch(self, output: RoutingOutput) -> Tensor:
        """The weights of `output`, as a node that can supply the gradient of the loss."""
        weights: Tensor = output.weights
        if self.coefficient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kind = weights.device.type
            self._half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
            index = len(self._outputs)
            self._outputs.append(output)
            supply: Any = _Supply.apply
            weights = supply(weights, output.prob_sums, output.logits, self, index)
        return weights

    def report(self, loss: Tensor) -> Tensor:
        """The value of the loss before its factor, as a node that knows when it is differentiated."""
        claim: Any = _Claim.apply
        return loss if torch.compiler.is_compiling() else claim(loss, self)

    def term(self, reported: Tensor) -> Tensor:
        """What is added to ``outputs.loss``."""
        return self._weigh(reported, self.share)

    def _weigh(self, loss: Tensor, share: float | Tensor) -> Tensor:
        share = share.to(loss.device) if isinstance(share, Tensor) else share
        return loss * (self.coefficient * share)

    def observe(self, log_probs: Tensor, counted: Tensor) -> Tensor:
        """Log-probabilities of the labels, as a node that sees what a trainer makes of them.

        A loss that is their mean gives each of the `counted` ones the same gradient. Whatever the mean is multiplied
        with (accumulation, processes, a gradient scaler) then goes for the supplied gradient too. Other losses say
        nothing about it.
        """
        observe: Any = _Observe.apply
        return log_probs if torch.compiler.is_compiling() else observe(log_probs, counted, self)

    def observed(self, gradient: Tensor, counted: Tensor) -> None:
        """Keep the factor of a mean with this gradient, if it is one."""
        highest = gradient.masked_fill(~counted, -torch.inf).amax()
        alike = (gradient.masked_fill(~counted, torch.inf).amin() >= highest) & (highest < 0)
        factor = -(gradient * counted).sum()
        if self._half and not alike:
            return
        self._observed = torch.where(alike, factor, torch.as_tensor(self.share).to(factor))

    def gradients(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradient of the term with respect to (prob_sums, logits) of the routing with this index."""
        if not self._gradients:
            if self._half and self._observed is None:
                warnings.warn(
                    "the loss is not outputs.loss and the forward computes in float16: the load balancing loss can't "
                    "see the scale of a gradient scaler and vanishes beside it; train in bfloat16, or add "
                    "router_aux_loss_coef * outputs.router_aux_loss to the loss",
                    stacklevel=2,
                )
            share = self.share if self._observed is None else self._observed
            with torch.enable_grad():
                outputs = [
                    o._replace(
                        prob_sums=o.prob_sums.detach().requires_grad_(), logits=o.logits.detach().requires_grad_()
                    )
                    for o in self._outputs
                ]
                leaves = [leaf for o in outputs for leaf in (o.prob_sums, o.logits)]
                term = self._weigh(router_aux_loss(outputs, self.kind), share)
                flat = torch.autograd.grad(term, leaves, allow_unused=True)
            self._gradients = list(zip(flat[::2], flat[1::2], strict=True))
        return self._gradients[index]


class _Claim(torch.autograd.Function):
    """Identity on the reported loss: its backward says that the loss is being differentiated."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, balance: Balance) -> Tensor:
        ctx.balance = balance
        ctx.set_materialize_grads(False)  # nn.parallel.DistributedDataParallel runs it for an unused loss too
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if grad_outputs[0] is not None:
            ctx.balance.claimed = True
        return grad_outputs[0], None


class _Observe(torch.autograd.Function):
    """Identity on log-probabilities: its backward shows their gradient to the balance."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, counted: Tensor, balance: Balance) -> Tensor:
        ctx.balance, ctx.counted = balance, counted
        ctx.set_materialize_grads(False)
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if grad_outputs[0] is not None:
            ctx.balance.observed(grad_outputs[0], ctx.counted)
        return grad_outputs[0], None, None


class _Supply(torch.autograd.Function):
    """Identity on the weights: its backward adds the gradient of the loss where nobody claimed it."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, prob_sums: Tensor, logits: Tensor, balance: Balance, index: int) -> Tensor:
        ctx.balance, ctx.index = balance, index
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads = (None, None) if ctx.balance.claimed else ctx.balance.gradients(ctx.index)
        return grad_outputs[0], *grads, None, None
