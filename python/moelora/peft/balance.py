"""The load balancing loss of one training forward, and how its gradient reaches the router exactly once."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from moelora.nn.losses import BalanceLoss, average, router_aux_loss
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


class Shares(NamedTuple):
    """What part of an optimizer step a forward is, see `share_of_step`."""

    share: float | Tensor | None  # as a term of outputs.loss; None: there is none, for there are no labels
    beside: float | Tensor  # beside a loss of the trainer's own
    averages: bool  # whether that may be the mean over the labels of the step, see `Balance.observe`


def shares_of_step(arguments: dict[str, Any], *, shifted: bool) -> Shares | None:
    """The shares of a forward with these arguments; None: it is no training forward.

    A trainer with a loss of its own may tell the model neither the labels nor their number. Where a step of
    `transformers.Trainer` is under way, a loss beside ``outputs.loss`` is the mean over the forwards of that step.
    """
    share = share_of_step(arguments, shifted=shifted)
    step = _training_step() if arguments.get("num_items_in_batch") is None and torch.is_grad_enabled() else None
    if step is not None:
        # Labels are counted where the loss is divided by their number. One of preferences or policies may have the same
        # gradient for all tokens too, but its factor is an advantage, not a share.
        averages = step["num_items_in_batch"] is not None
        return Shares(share, 1 / step["self"].current_gradient_accumulation_steps, averages)
    return None if share is None else Shares(share, share, averages=True)


def _training_step() -> dict[str, Any] | None:
    """The local variables of `transformers.Trainer.training_step`, if it runs around here."""
    running: FrameType | None = None if torch.compiler.is_compiling() else sys._getframe(1)
    while running is not None:
        if running.f_code.co_name == "training_step" and running.f_globals.get("__name__") == "transformers.trainer":
            return running.f_locals
        running = running.f_back
    return None


class Balance:
    """The auxiliary loss of one forward in training, with its factor.

    It is a term of ``outputs.loss``. Trainers that compute their own loss from other outputs never differentiate that
    term. So the weights that a router makes and the loss of that routing leave one node together: a backward that comes
    through the weights alone finds no gradient of the loss there, and the node puts in the one it would have had.

    Parameters
    ----------
    kind : {"aux_loss", "z_loss", "switch"}
    coefficient : float
        Factor of the loss in ``outputs.loss``.
    routings : int
        How many routings the forward makes, for compiled code: the loss is the mean of those that were made, which are
        fewer where layers are dropped and more where they run in a loop.
    shares : Shares
        What part of an optimizer step the forward is.
    """

    def __init__(self, kind: str, coefficient: float, routings: int, shares: Shares) -> None:
        self.kind, self.coefficient, self.routings = kind, coefficient, routings
        self.share, self.beside, self.averages = shares
        self._loss = BalanceLoss(kind)
        self._losses: list[Tensor] = []
        self._outputs: list[RoutingOutput] = []
        self._half = False  # computed in float16, where losses are scaled
        self._observed: Tensor | None = None  # the trainer's own share, see `observe`

    def watch(self, output: RoutingOutput) -> Tensor:
        """The weights of `output`, whose backward brings the gradient of the loss along."""
        if not self.coefficient:  # it is only looked at
            self._outputs.append(output)
            return output.weights
        weights, loss = output.weights, self._loss(output)
        if torch.is_grad_enabled():
            compiling = torch.compiler.is_compiling()
            if not compiling:
                kind = weights.device.type
                self._half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
            supply: Any = _Supply.apply
            weights, loss = supply(
                weights, loss, self.beside, self.coefficient / self.routings, None if compiling else self
            )
        self._losses.append(loss)
        return weights

    def loss(self) -> Tensor:
        """The loss before its factor."""
        return average(self._losses) if self.coefficient else router_aux_loss(self._outputs, self.kind)

    @property
    def in_loss(self) -> bool:
        """Whether ``outputs.loss`` has a term."""
        return self.coefficient > 0 and self.share is not None

    def term(self, loss: Tensor) -> Tensor:
        """What is added to ``outputs.loss``, if it has a term."""
        assert self.share is not None
        return loss * (_on(self.share, loss) * self.coefficient)

    def observe(self, log_probs: Tensor, counted: Tensor) -> Tensor:
        """Log-probabilities of the labels, as a node that sees what a trainer makes of them.

        A loss that is their mean gives each of the `counted` ones the same gradient. Whatever the mean is multiplied
        with (accumulation, processes, a gradient scaler) then goes for the supplied gradient too. Other losses say
        nothing about it.
        """
        observe: Any = _Observe.apply
        sees = self.averages and not torch.compiler.is_compiling()
        return observe(log_probs, counted, self) if sees else log_probs

    def observed(self, gradient: Tensor, counted: Tensor) -> None:
        """Keep the share that a mean with this gradient has, if it is one."""
        highest = gradient.masked_fill(~counted, -torch.inf).amax()
        alike = (gradient.masked_fill(~counted, torch.inf).amin() >= highest) & (highest < 0)
        if self._half and not alike:
            return
        share = -(gradient * counted).sum()
        self._observed = torch.where(alike, share, torch.as_tensor(self.beside).to(share))

    def factor(self) -> float:
        """Of the loss of one routing in the term, once the forward has made all of them."""
        return self.coefficient / len(self._losses)

    def supplied(self) -> float | Tensor:
        """The share of a term that is supplied."""
        if self._observed is not None:
            return self._observed
        if self._half:
            warnings.warn(
                "the loss is not outputs.loss and the forward computes in float16: the load balancing loss can't see "
                "the scale of a gradient scaler and vanishes beside it; train in bfloat16, or add "
                "router_aux_loss_coef * outputs.router_aux_loss to the loss",
                stacklevel=2,
            )
        return self.beside


class _Supply(torch.autograd.Function):
    """Identity on the weights and the loss of one routing; a loss that nobody differentiates gets its gradient here."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, loss: Tensor, share: float | Tensor, factor: float, balance: Balance | None
    ) -> tuple[Tensor, Tensor]:
        ctx.share, ctx.factor, ctx.balance = share, factor, balance
        ctx.set_materialize_grads(False)
        return weights.view_as(weights), loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_weights, grad_loss = grad_outputs
        compiling = torch.compiler.is_compiling()  # there, no gradient is a gradient of zero
        if grad_weights is not None and (grad_loss is None or compiling):
            share, factor = ctx.share, ctx.factor
            if ctx.balance is not None:
                share, factor = ctx.balance.supplied(), ctx.balance.factor()
            supplied = _on(share, grad_weights) * grad_weights.new_full((), factor)
            grad_loss = supplied if grad_loss is None else torch.where(grad_loss == 0, supplied, grad_loss)
        return grad_weights, grad_loss, None, None, None


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


def _on(share: float | Tensor, beside: Tensor) -> float | Tensor:
    return share.to(beside) if isinstance(share, Tensor) else share
