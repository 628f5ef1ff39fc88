"""What one forward of a model is about, read from its arguments by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES

# What models call the cache among their arguments and outputs: "cache" since transformers 5.24.
CACHES = tuple(dict.fromkeys(["cache", "past_key_values", "cache_params", *ALL_CACHE_NAMES]))


class Call(NamedTuple):
    """What the hook on the model has seen of one forward."""

    batch: int | None
    seq: int | None
    past: int
    keep: int | Tensor | None  # logits_to_keep
    mask: Tensor | None  # [B, S] attention mask of these tokens
    device: torch.device | None

    def kept(self, weights: Tensor) -> Tensor:
        """Of weights [B, S, N], those of the positions whose logits are computed."""
        if self.keep is None:
            return weights
        return weights[:, -self.keep :] if isinstance(self.keep, int) else weights[:, self.keep]


def read_call(arguments: dict[str, Any], *, transformer: bool, per_token: bool, of_text: bool = True) -> Call:
    """What this forward is about, from its arguments by name.

    The cache matters to weights per token alone; `of_text`: the input is the one text that the model, or stack, reads.
    """
    tokens = arguments.get("inputs_embeds")
    if tokens is None:
        tokens = arguments.get("input_ids")
    tensors = (a for a in arguments.values() if isinstance(a, Tensor) and a.dim() > 1)
    first = tokens if tokens is not None else next(tensors, None)
    device = None if first is None else first.device
    if not transformer or first is None:
        return Call(None, None, 0, None, None, device)
    seq = tokens.shape[1] if tokens is not None and of_text else None
    past = _cached(arguments) if per_token else 0
    keep = arguments.get("logits_to_keep")
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or seq is None or mask.shape[1] < seq:
        mask = None
    else:
        mask = mask[:, mask.shape[1] - seq :]
    return Call(first.shape[0], seq, past, None if isinstance(keep, int) and not keep else keep, mask, device)


def cache_among(values: Mapping[str, Any]) -> Any:
    """The cache among the arguments or the outputs of a model, or None."""
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def _cached(arguments: dict[str, Any]) -> int:
    """How many tokens of the text the cache holds."""
    cache = cache_among(arguments)
    if cache is None:
        return 0
    try:
        length = int(cache.get_seq_length())
        if not length:  # of the first layer, which may be one without keys, as in MiniMax
            layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, CacheLayerMixin)]
            length = max((int(layer.get_seq_length()) for layer in layers), default=0)
        return length
    except (AttributeError, ValueError):
        raise ValueError(
            f"{type(cache).__name__} does not know how many tokens it holds, so routing_weights per token can't be "
            "matched: pass use_cache=False, weights [N] or [B, N], or attach a router"
        ) from None


def continues(arguments: dict[str, Any]) -> bool:
    """Whether tokens of the text may be in the cache already."""
    try:
        return _cached(arguments) > 0
    except ValueError:
        return True


def check_consumed(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise where our keywords have come so far that a model would swallow them in its own keywords."""
    for name in ("routing_weights", "mixture"):
        if name in kwargs:
            raise TypeError(
                f"{name} reached {type(module).__name__}, which would ignore it: call the adopted PeftModel, not the "
                "model inside it"
            )
