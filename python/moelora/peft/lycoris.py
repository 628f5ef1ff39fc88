"""LoHa and LoKr layers of PEFT that mix their adapters by routing weights.

An expert's delta weight D_e is a dense [d_out, d_in] matrix that PEFT's own code makes from its factors, scaled:

    y = base(x) + sum_e w_e x D_e^T
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import loha, lokr
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.peft.routed import Routed

__all__ = ["LoHaLinear", "LoKrLinear"]

# PEFT before 0.21 drops rows in training without being asked.
_IS_ASKED = "apply_rank_dropout" in inspect.signature(LycorisLayer.get_delta_weight).parameters


class RoutedLycoris(Routed, LycorisLayer):
    """What the routed layers of LoHa and LoKr add to the stock layer; comes before it among the bases."""

    def _mixed(
        self,
        x: Tensor,
        weights: Tensor,
        experts: list[str],
        top_k: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        dtype = x.dtype
        weights = _for_rows(x, weights, len(experts)).to(x.device)
        y = self._base_output(x, *args, **kwargs)
        available = self._available_adapters
        present = [(i, name) for i, name in enumerate(experts) if name in available]
        if not present:
            return y.to(dtype)
        named = [getattr(self, factors) for factors in self.adapter_layer_names]
        self._refuse_unreadable([factors[name] for factors in named for _, name in present if name in factors], x)

        columns, deltas = [], []
        for i, name in present:
            # As in PEFT, an expert is left out, or rows of its delta weight, for all tokens of the call.
            dropout = self.module_dropout[name]
            left_out = self.training and dropout > 0 and bool(torch.rand(1) <= dropout)
            deltas.append(self._delta(name, self.training and bool(self.rank_dropout[name]) and not left_out))
            # A factor, so that the gradients of an expert that is left out are zero and not None.
            columns.append(weights[..., i] * (not left_out))
        # In which none of them loses digits, where their dtypes differ.
        inner = functools.reduce(torch.promote_types, [delta.dtype for delta in deltas])
        deltas = [delta.to(inner) for delta in deltas]
        x = self._cast_input_dtype(x, inner)
        if weights.dim() == 1:
            combined = columns[0] * deltas[0]
            for w, delta in zip(columns[1:], deltas[1:], strict=True):
                combined = combined + w * delta
            mixture = F.linear(x, combined.to(inner))
        else:
            mixture = _Mixture.apply(x, torch.stack(columns, -1), *deltas)  # type: ignore[no-untyped-call]
        return (y + mixture).to(dtype)

    def _delta(self, name: str, drops_rows: bool) -> Tensor:
        if _IS_ASKED:
            delta: Tensor = self.get_delta_weight(name, apply_rank_dropout=drops_rows)
            return delta
        probability = self.rank_dropout[name]
        try:
            self.rank_dropout[name] = probability if drops_rows else 0.0
            delta = self.get_delta_weight(name)
        finally:
            self.rank_dropout[name] = probability
        return delta


class LoHaLinear(RoutedLycoris, loha.Linear):
    """`peft.tuners.loha.Linear` that takes routing weights."""


class LoKrLinear(RoutedLycoris, lokr.Linear):
    """`peft.tuners.lokr.Linear` that takes routing weights."""


class _Mixture(torch.autograd.Function):
    """sum_e w_e x D_e^T for x [..., d_in] and weights that broadcast over x.shape[:-1] + (N,).

    The gradient of a weight is taken as <g D_e, x>, whose first factor is needed for x's gradient in any case: so no
    expert's output is kept, and one expert's at a time exists.
    """

    @staticmethod
    def forward(x: Tensor, weights: Tensor, *deltas: Tensor) -> Tensor:
        y = weights[..., 0, None] * F.linear(x, deltas[0])
        for e, delta in enumerate(deltas[1:], 1):
            y = y + weights[..., e, None] * F.linear(x, delta)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *deltas = ctx.saved_tensors
        g = g.to(x.dtype)
        need_x, need_w, *need_deltas = ctx.needs_input_grad
        grad_x = torch.zeros_like(x) if need_x else None
        grad_w: list[Tensor] = []
        grad_deltas: list[Tensor | None] = []
        for e, delta in enumerate(deltas):
            w = weights[..., e, None]
            if need_x or need_w:
                p = g @ delta  # [..., d_in]
                if grad_x is not None:
                    grad_x = grad_x + (w * p).to(x.dtype)
                grad_w.append((p * x).sum(-1))
            needed = need_deltas[e]
            grad_deltas.append((w * g).to(x.dtype).flatten(0, -2).T @ x.flatten(0, -2) if needed else None)
        return grad_x, _summed_to(weights, grad_w) if need_w else None, *grad_deltas


def _summed_to(weights: Tensor, columns: list[Tensor]) -> Tensor:
    return torch.stack(columns, -1).to(weights.dtype).sum_to_size(weights.shape)


def _for_rows(x: Tensor, weights: Tensor, n: int) -> Tensor:
    """The weights as they broadcast over x.shape[:-1] + (N,); the number of their axes decides what they are."""
    rows = x.shape[:-1]
    if weights.dim() == 1 or weights.shape == (*rows, n):
        return weights
    if weights.dim() == 2 and len(rows) == 2 and weights.shape[0] == rows[0]:
        return weights.unsqueeze(1)
    raise ValueError(
        f"routing_weights must have shape [N], [B, N] or x.shape[:-1] + (N,) for {n} experts and x of shape "
        f"{tuple(x.shape)}, got {tuple(weights.shape)}"
    )
