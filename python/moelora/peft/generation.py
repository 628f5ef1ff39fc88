"""What generate can't do with given weights, or with a router of two passes, is refused before it begins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moelora.peft.frame import Frame

# The arguments of generate whose first axis is the batch, as many sequences as there are weights for.
_PROMPTS = ("inputs", "inputs_embeds", "input_ids", "input_features", "input_values", "pixel_values")


def check_generate(frame: Frame, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse, before generate begins, what given weights or a router of two passes can't follow."""
    if kwargs.get("cache_implementation") == "paged" and (frame.given is not None or frame.two_passes):
        raise continuous_batching()
    prompt = next((kwargs[name] for name in _PROMPTS if isinstance(kwargs.get(name), Tensor)), None)
    frame.check_batch(args[0] if args and isinstance(args[0], Tensor) else prompt)
    config = kwargs.get("generation_config") or model.generation_config
    guidance = kwargs.get("guidance_scale", config.guidance_scale)
    if frame.per_token and guidance not in (None, 1):
        raise ValueError(
            f"guidance_scale={guidance} runs the model on another prompt, for whose tokens there are no "
            "routing_weights: pass [N] or [B, N], or attach a router"
        )


def continuous_batching() -> ValueError:
    return ValueError(
        "continuous batching packs the tokens of all requests into one row, on a thread of its own, where "
        "neither routing_weights nor a router that reads 'last_hidden' can follow: attach a router that reads "
        "embeddings or layers, or call generate without cache_implementation='paged'"
    )
