"""`peft.tuners`, with the routed classes in `moelora.peft.tuners.lora`."""

from __future__ import annotations

from typing import Any

import peft.tuners as _tuners

from moelora.peft.tuners import lora as lora


def __getattr__(name: str) -> Any:
    return getattr(lora if hasattr(lora, name) else _tuners, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_tuners)})
