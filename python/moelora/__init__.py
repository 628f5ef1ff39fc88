"""Mixtures of LoRA experts in one pass.

``import moelora`` itself loads neither NumPy nor torch. Names are resolved on first use: the functions on NumPy arrays
(`moelora.functional`), the torch layer (`moelora.nn`), and everything that hosts a mixture in PEFT (`moelora.peft`),
which is also a mirror of PEFT's public names: ``from moelora import get_peft_model, LoraConfig`` works as it does from
``peft``, and the models that come out are adopted.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelora.runtime import get_base_product as get_base_product
    from moelora.runtime import get_isa as get_isa
    from moelora.runtime import get_num_threads as get_num_threads
    from moelora.runtime import set_base_product as set_base_product
    from moelora.runtime import set_isa as set_isa
    from moelora.runtime import set_num_threads as set_num_threads
    from moelora.runtime import show_config as show_config

__version__ = "0.1.0"

_SUBMODULES = ("cli", "demo", "functional", "nn", "peft", "reference", "report", "runtime", "testing")
_RUNTIME = (
    "get_base_product",
    "get_isa",
    "get_num_threads",
    "set_base_product",
    "set_isa",
    "set_num_threads",
    "show_config",
)
_HOSTING = (
    "Embedding",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "MoELoraConfig",
    "PeftModel",
    "RoutingWeightsCollator",
    "activate_all_experts",
    "adopt",
    "get_peft_model",
    "patch_peft",
    "release",
    "routing_stats",
)


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":  # which a star import asks for
        raise AttributeError(f"module 'moelora' has no attribute {name!r}")
    if name in _SUBMODULES:
        return importlib.import_module(f"moelora.{name}")
    if name in _RUNTIME:
        return getattr(importlib.import_module("moelora.runtime"), name)
    try:
        hosting = importlib.import_module("moelora.peft")
    except ModuleNotFoundError as error:
        # Without the extra, probing for an unknown name (hasattr) must still answer no.
        if name in (*_HOSTING, "__all__"):
            raise ImportError(
                f"moelora.{name} needs torch, transformers and peft: pip install 'moelora[hf]'"
            ) from error
        raise AttributeError(f"module 'moelora' has no attribute {name!r}") from error
    if name == "__all__":
        return [*_RUNTIME, *hosting.__all__]
    try:
        return getattr(hosting, name)
    except AttributeError:
        raise AttributeError(f"module 'moelora' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_RUNTIME, *_HOSTING})
