"""`peft.tuners`, with the routed classes in place of the stock ones."""

from __future__ import annotations

from typing import Any

from moelora.peft import mirror as _mirror
from moelora.peft.model import LoraModel as LoraModel
from moelora.peft.tuners import lora as lora


def __getattr__(name: str) -> Any:
    return _mirror.lookup(__name__, name)


def __dir__() -> list[str]:
    return _mirror.names(__name__)
