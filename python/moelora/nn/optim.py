"""Parameter groups for torch's optimizers."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import nn

from moelora.nn.routers import Router, _check_kind

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, *, lr: float, router_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Divide what a model trains into groups for an optimizer, so that the router has a learning rate of its own.

    Parameters
    ----------
    model : nn.Module
        Its frozen parameters are left out. Router parameters are those of every `Router` in it, and of the module that
        is attached to an adopted PEFT model, whatever that is.
    lr : float
        Learning rate of everything else.
    router_lr : float, optional
        Learning rate of the router. Default: `lr`.
    weight_decay : float
        Of matrices; biases and other vectors have none.

    Returns
    -------
    list of dict
        Up to four groups with "params", "lr" and "weight_decay": matrices, vectors, the router's matrices, its vectors.

    Raises
    ------
    TypeError
        If `model` is not a module, or a rate or the decay not a real number.
    ValueError
        If the model trains nothing, or a rate or the decay is negative or not finite.

    Examples
    --------
    >>> import torch
    >>> from moelora.nn import EmbeddingRouter, parameter_groups
    >>> model = torch.nn.ModuleDict({"router": EmbeddingRouter(["a", "b"], 8), "head": torch.nn.Linear(8, 2)})
    >>> groups = parameter_groups(model, lr=1e-3, router_lr=1e-4, weight_decay=0.1)
    >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
    [(1, 0.001, 0.1), (1, 0.001, 0.0), (1, 0.0001, 0.1), (1, 0.0001, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_kind(Real, lr=lr, weight_decay=weight_decay)
    _check_kind(Real, optional=True, router_lr=router_lr)
    for name, value in (("lr", lr), ("router_lr", router_lr), ("weight_decay", weight_decay)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    routers: list[nn.Module] = [module for module in model.modules() if isinstance(module, Router)]
    attached = getattr(getattr(model, "base_model", None), "router", None)
    if isinstance(attached, nn.Module):
        routers.append(attached)
    of_router = {id(p) for router in routers for p in router.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"model must have parameters that require a gradient, {type(model).__name__} has none")
    rates = ((lr, False), (lr if router_lr is None else router_lr, True))
    groups = []
    for rate, inside in rates:
        chosen = [p for p in trained if (id(p) in of_router) == inside]
        groups += _by_decay(chosen, rate, weight_decay)
    return groups


def _by_decay(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
