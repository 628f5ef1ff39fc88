"""Batches whose sequences bring routing weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class RoutingWeightsCollator:
    """Data collator for a dataset with a column ``routing_weights``, around another collator.

    Weights of a sequence [N] become [B, N], as every collator makes them. Weights of its tokens [S, N] become
    [B, S, N]: they go where the batch has tokens, and padding has weight 0.

    Parameters
    ----------
    collate : callable
        Makes the rest of the batch, with ``attention_mask`` where it pads: `transformers.DataCollatorWithPadding`, ...

    Raises
    ------
    TypeError
        If `collate` can't be called.
    ValueError
        If there are no rows, a row has no weights or others than numbers, rows differ in the kind of weights or the
        number of experts, or the weights of a sequence are for another number of tokens than the batch has of it, as in
        a batch that is packed or flattened.

    Examples
    --------
    >>> from transformers import default_data_collator
    >>> from moelora.peft import RoutingWeightsCollator
    >>> collator = RoutingWeightsCollator(default_data_collator)
    >>> batch = collator([{"input_ids": [5, 6, 7], "routing_weights": [[1, 0], [1, 0], [0.5, 0.5]]}])
    >>> batch["routing_weights"].shape
    torch.Size([1, 3, 2])
    """

    collate: Callable[[list[dict[str, Any]]], Any]

    def __post_init__(self) -> None:
        if not callable(self.collate):
            raise TypeError(f"collate must be callable, got {type(self.collate).__name__}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        if not features:
            raise ValueError("features must hold at least one row, got none")
        weights = [_weights_of(i, feature) for i, feature in enumerate(features)]
        if any((w.dim(), w.shape[-1]) != (weights[0].dim(), weights[0].shape[-1]) for w in weights):
            shapes = [tuple(w.shape) for w in weights]
            raise ValueError(f"routing_weights must be [N] in every row, or [S, N] in every row, got {shapes}")
        rest = [{name: value for name, value in f.items() if name != "routing_weights"} for f in features]
        batch = self.collate(rest)
        batch["routing_weights"] = torch.stack(weights) if weights[0].dim() == 1 else _spread(weights, batch)
        return batch


def _weights_of(row: int, feature: Mapping[str, Any]) -> Tensor:
    given = feature.get("routing_weights")
    try:
        weights = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        weights = None
    if weights is None or not 1 <= weights.dim() <= 2:
        raise ValueError(f"routing_weights must be numbers [N] or [S, N] in every row, row {row} has {given!r}")
    return weights


def _spread(weights: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
    """[B, S, N], zero where the batch is padded."""
    mask = batch.get("attention_mask")
    present = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0
    tokens, given = present.sum(1).tolist(), [len(w) for w in weights]
    if tokens != given:
        raise ValueError(f"routing_weights are for {given} tokens, the sequences of the batch have {tokens}")
    spread = torch.zeros(*present.shape, weights[0].shape[-1])
    spread[present] = torch.cat(weights)
    return spread
