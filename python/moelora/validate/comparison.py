"""How far two results lie apart, and where."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Difference:
    """The largest difference between two tensors."""

    name: str
    absolute: float
    """Infinite where either has a NaN, or the shapes differ."""
    scale: float
    """The largest value of the reference."""
    where: tuple[int, ...]

    @property
    def relative(self) -> float:
        """`absolute` by `scale`."""
        if self.absolute == 0:
            return 0.0
        return self.absolute / self.scale if 0 < self.scale < math.inf else math.inf


def difference(name: str, got: Tensor, expected: Tensor, *, least_scale: float = 0.0) -> Difference:
    """Compare a tensor with its reference; `least_scale`: of a reference that is next to nothing."""
    if got.shape != expected.shape:
        return Difference(name, math.inf, math.nan, ())
    if not got.numel():
        return Difference(name, 0.0, 0.0, ())
    apart = (got.detach().double() - expected.detach().double()).abs()
    apart = apart.nan_to_num(nan=math.inf)
    place = int(apart.argmax())
    scale = max(float(expected.detach().abs().max()), least_scale)
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), apart.shape))
    return Difference(name, float(apart.flatten()[place]), scale, where)


def worst(differences: Iterable[Difference]) -> Difference:
    """The one with the largest relative difference."""
    return max(differences, key=lambda d: d.relative)


def adapter_parameters(model: nn.Module, experts: list[str]) -> dict[str, nn.Parameter]:
    """Every A, B and their biases of some experts, by their names in the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(a.startswith("lora_") and b in experts for a, b in itertools.pairwise(name.split(".")))
    }


def gradients(
    logits: Tensor, direction: Tensor, parameters: Mapping[str, Any], weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of ``sum(logits * direction) / sqrt(size)``, in which every logit counts; nothing is accumulated.

    Returns
    -------
    dict
        By the names of `parameters`; with `weights` those of them as "routing_weights". Zeros where there is no way
        from the logits.
    """
    wanted = {**parameters} if weights is None else {**parameters, "routing_weights": weights}
    value = (logits.float() * direction).sum() / math.sqrt(direction.numel())
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(wanted.items(), found, strict=True)
    }


def gradient_differences(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[Difference]:
    """Compare gradients tensor by tensor.

    The scale is the largest value of a tensor's reference, but no less than a thousandth of the largest of all: what
    cancels down to nothing, as for the keys of an attention, is nothing but rounding.
    """
    least = 1e-3 * max(float(tensor.abs().max()) for tensor in expected.values() if tensor.numel())
    return [difference(name, got[name], expected[name], least_scale=least) for name in expected]
