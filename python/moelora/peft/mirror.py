"""PEFT's modules under the name of this package: ``moelora.peft.utils.hotswap`` for ``peft.utils.hotswap``.

A module of PEFT runs once, as PEFT's own. One that holds nothing replaced here is the same object under both names; for
the others, and for packages, there is a mirror: a module that looks every name up in PEFT's, and gives the routed one
where there is one. A file of this package that has the name of one of PEFT's has its own names and then PEFT's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HERE = __name__.rpartition(".")[0]
_routed: dict[int, Any] = {}  # id of an object of PEFT, which lives as long as the process -> what stands for it


def stand_in(stock: Any, routed: Any) -> None:
    """Serve `routed` wherever a module of PEFT has `stock`."""
    _routed[id(stock)] = routed


def stock_name(name: str) -> str:
    """``peft.utils`` for ``moelora.peft.utils``."""
    return "peft" + name.removeprefix(_HERE)


def lookup(module: str, name: str) -> Any:
    """What `name` means in one of our modules: the ``__getattr__`` of a mirror.

    Raises
    ------
    AttributeError
        If PEFT's module does not have it.
    """
    try:
        value = getattr(import_module(stock_name(module)), name)
    except AttributeError:
        raise AttributeError(f"module {module!r} has no attribute {name!r}") from None
    if isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "peft":
        return import_module(_HERE + value.__name__.removeprefix("peft"))
    return _routed.get(id(value), value)


def names(module: str) -> list[str]:
    """The ``__dir__`` of a mirror."""
    return sorted({*vars(sys.modules[module]), *dir(import_module(stock_name(module)))})


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of PEFT that this package has no file for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{_HERE}."):
            return None
        stock = find_spec(stock_name(fullname))
        if stock is None:
            return None
        return ModuleSpec(fullname, self, is_package=stock.submodule_search_locations is not None)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        stock = import_module(stock_name(name))
        # A package is never PEFT's own object: importing a mirror inside it would set that on it.
        if not hasattr(module, "__path__") and not any(id(value) in _routed for value in vars(stock).values()):
            sys.modules[name] = stock
            return
        module.__doc__ = stock.__doc__
        module.__dict__["__getattr__"] = partial(lookup, name)
        module.__dict__["__dir__"] = partial(names, name)
        if not hasattr(stock, "__all__"):
            module.__dict__["__all__"] = [public for public in dir(stock) if not public.startswith("_")]


def install() -> None:
    """Let ``import moelora.peft.<module of PEFT>`` find it, and our modules of the same name give PEFT's names, too."""
    sys.meta_path.append(_Finder())
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{_HERE}.") and not hasattr(module, "__getattr__") and find_spec(stock_name(name)):
            module.__dict__["__getattr__"] = partial(lookup, name)
