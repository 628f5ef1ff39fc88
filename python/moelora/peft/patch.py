"""`patch_peft`: routed models from code that imports ``peft``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType, TracebackType
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from moelora.peft.adoption import adopt
from moelora.peft.config import MoELoraConfig
from moelora.peft.model import LoHaModel, LoKrModel, LoraModel


def _copy(function: Any) -> Any:
    copied = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    return functools.update_wrapper(copied, function)


# PEFT's own, whatever `peft.get_peft_model` does now.
stock_get_peft_model: Callable[..., Any] = _copy(peft.get_peft_model)


def _redirected(  # type: ignore[no-untyped-def]
    model,
    peft_config,
    adapter_name="default",
    mixed=False,
    autocast_adapter_dtype=True,
    revision=None,
    low_cpu_mem_usage=False,
):
    # Runs with the globals of PEFT's module.
    from moelora.peft import get_peft_model

    return get_peft_model(model, peft_config, adapter_name, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage)


class Patch:
    """PEFT as `patch_peft` has changed it, until `undo`; as a context manager it undoes itself at the end."""

    def __init__(self) -> None:
        with _lock:
            if not _active:
                _install()
            _active.add(self)

    def undo(self) -> None:
        """Take this patch back. Calling it again changes nothing."""
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    _undo.close()

    def __enter__(self) -> Patch:
        if self not in _active:
            raise RuntimeError("this patch was undone: call patch_peft() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


_active: set[Patch] = set()
_undo = ExitStack()  # what gives PEFT back while there is an active patch
_lock = threading.RLock()


def patch_peft() -> Patch:
    """Make PEFT itself produce adopted models, in this process, from now on.

    For code that imports ``peft`` and can't be edited. It does not matter whether that code has imported PEFT, or names
    from it, before or after. While a patch is active,

    - every `peft.PeftModel` that is constructed is adopted (`moelora.adopt`), by whichever function or class of PEFT;
    - ``peft.get_peft_model`` is `moelora.get_peft_model`: with a `MoELoraConfig` it makes experts and a router;
    - ``peft.MoELoraConfig`` exists;
    - LoRA, LoHa and LoKr adapters that are injected without a `PeftModel` (``inject_adapter_in_model``,
      ``model.add_adapter`` of transformers) run PEFT's code, and a forward with ``routing_weights`` raises instead of
      ignoring them.

    Models that exist already stay what they are. Models made under a patch stay adopted after it.

    Returns
    -------
    Patch
        With ``undo()``; in a ``with`` statement, undone at its end whatever happens. Patches may overlap: PEFT is stock
        again, the very same objects in the same places, when the last one is undone. What somebody else has put in
        place of a patched function in the meantime is left there.

    Notes
    -----
    The patch belongs to the process: it acts in all threads. Installing and undoing are guarded by a lock; a model that
    another thread constructs at that very moment may come out either way.

    Examples
    --------
    >>> import moelora
    >>> from peft import get_peft_model
    >>> with moelora.patch_peft():
    ...     model = get_peft_model(base, config)  # doctest: +SKIP
    """
    return Patch()


_MISSING = object()
_TUNERS = {peft.PeftType.LORA: LoraModel, peft.PeftType.LOHA: LoHaModel, peft.PeftType.LOKR: LoKrModel}


def _install() -> None:
    try:
        for kind, tuner in _TUNERS.items():
            _exchange(PEFT_TYPE_TO_TUNER_MAPPING, kind, tuner)
        for model in (peft.PeftModel, peft.PeftMixedModel):
            _exchange(model, "__init__", _adopting(model.__init__))
        # Names that were imported earlier hold the function itself, so it is its code that is exchanged.
        _exchange(peft.get_peft_model, "__code__", _redirected.__code__)
        _exchange(peft, "MoELoraConfig", MoELoraConfig)
    except BaseException:
        _undo.close()
        raise


def _exchange(owner: Any, name: str, value: Any) -> None:
    """Put `value` in place of an attribute, or of a dict's entry, until `_undo`; what has replaced it then stays."""
    read: Any
    read, write, remove = (
        (dict.get, dict.__setitem__, dict.__delitem__) if isinstance(owner, dict) else (getattr, setattr, delattr)
    )
    before = read(owner, name, _MISSING)

    def restore() -> None:
        if read(owner, name, _MISSING) is not value:
            return
        if before is _MISSING:
            remove(owner, name)
        else:
            write(owner, name, before)

    write(owner, name, value)
    _undo.callback(restore)


def _adopting(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(model: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(model, *args, **kwargs)
        if _active:  # not so where somebody else's wrapper has kept this one
            adopt(model)

    return __init__
