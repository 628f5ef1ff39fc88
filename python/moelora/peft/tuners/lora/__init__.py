"""`peft.tuners.lora`, with the routed classes in place of the stock ones."""

from __future__ import annotations

from typing import Any

import peft.tuners.lora as _lora

from moelora.peft import mirror as _mirror
from moelora.peft.config import MoELoraConfig
from moelora.peft.embedding import Embedding
from moelora.peft.layers import Linear, LoraLayer
from moelora.peft.model import LoraModel

__all__ = ["Embedding", "Linear", "LoraLayer", "LoraModel", "MoELoraConfig"]
__all__ += [name for name in _lora.__all__ if name not in __all__]


def __getattr__(name: str) -> Any:
    return _mirror.lookup(__name__, name)


def __dir__() -> list[str]:
    return _mirror.names(__name__)
