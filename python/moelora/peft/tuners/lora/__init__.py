"""`peft.tuners.lora`, with the routed classes in place of the stock ones."""

from __future__ import annotations

from typing import Any

import peft.tuners.lora as _lora

from moelora.peft.config import MoELoraConfig
from moelora.peft.embedding import Embedding
from moelora.peft.layers import Linear, LoraLayer
from moelora.peft.model import LoraModel

__all__ = ["Embedding", "Linear", "LoraLayer", "LoraModel", "MoELoraConfig"]


def __getattr__(name: str) -> Any:
    try:
        return getattr(_lora, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_lora)})
