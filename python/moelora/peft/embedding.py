"""LoRA on embeddings, mixed by routing weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor

from moelora.peft.layers import RoutedLora

__all__ = ["Embedding"]


class Embedding(RoutedLora, lora.Embedding):
    """`peft.tuners.lora.Embedding` that takes routing weights.

    Its input is ids [...] and has no axis of features: weights are [N], [B, N] or ids.shape + (N,). In a model, the
    input embeddings take all of these; other embeddings (positions, token types) take [N] alone, since what they look
    up are not the tokens of the text. As in PEFT, ``lora_dropout`` does not act on embeddings.
    """

    def _mixed(
        self,
        x: Tensor,
        weights: Tensor,
        experts: list[str],
        top_k: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        all_A, all_B = self.lora_embedding_A, self.lora_embedding_B
        present = [(i, name) for i, name in enumerate(experts) if name in all_A]
        self._refuse_unreadable([factor for _, name in present for factor in (all_A[name], all_B[name])], x)
        weights = _for_ids(x, weights).to(x.device)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not present:
            return y

        rows = []  # of each A transposed, [..., r]
        for i, name in present:
            looked_up = self._embed(x, all_A[name].T, self.input_fns.get(name), self.output_fns.get(name))
            rows.append((looked_up * (weights[..., i, None] * self.scaling[name])).to(looked_up.dtype))
        mixture = F.linear(torch.cat(rows, -1), torch.cat([all_B[name] for _, name in present], 1))
        embed_scale: Tensor | None = self._get_embed_scale()  # type: ignore[no-untyped-call]
        if embed_scale is not None:
            mixture = mixture * embed_scale.to(mixture.dtype)
        return (y + mixture).to(y.dtype)


def _for_ids(ids: Tensor, weights: Tensor) -> Tensor:
    """The weights as they broadcast over ids.shape + (N,); the number of their axes decides what they are."""
    if weights.dim() == 2 and ids.dim() == 2:
        fits, weights = weights.shape[0] == ids.shape[0], weights.unsqueeze(1)
    else:
        fits = weights.dim() == 1 or weights.shape[:-1] == ids.shape
    if not fits:
        raise ValueError(
            f"routing_weights must have shape [N], [B, N] or ids.shape + (N,) for ids of shape {tuple(ids.shape)}, got "
            f"{tuple(weights.shape)}"
        )
    return weights
