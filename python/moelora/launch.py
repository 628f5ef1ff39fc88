"""Run a program as ``python program.py`` would, with PEFT patched: what ``moelora run`` does.

Nothing heavy is imported before the program, which still decides about environment variables, devices and the order of
its imports: PEFT is patched at the moment when the program first imports it.
"""

from __future__ import annotations

import importlib.util
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import spawn
from types import ModuleType
from typing import Any


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a file as ``__main__``, with PEFT patched. The process is the program's from then on.

    Raises
    ------
    OSError
        If the file can't be read.
    SystemExit
        The program's own, or with status 1 after an exception of the program, which is reported as Python does.
    """
    file = os.path.abspath(path)
    with io.open_code(file) as stream:
        source = stream.read()
    _become([path, *arguments], os.path.dirname(os.path.realpath(path)))
    main = ModuleType("__main__")
    main.__file__ = file
    sys.modules["__main__"] = main
    try:
        exec(compile(source, file, "exec", dont_inherit=True), vars(main))
    except Exception as error:
        _exit_after(error)


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module as ``python -m`` does, with PEFT patched. The process is the program's from then on.

    Raises
    ------
    ModuleNotFoundError
        If there is no such module.
    SystemExit
        As for `run_script`.
    """
    _become([name, *arguments], os.getcwd())
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception as error:
        _exit_after(error)


def _become(argv: list[str], folder: str) -> None:
    sys.argv = argv
    if not sys.flags.safe_path:
        sys.path[0] = folder
    patch_when_imported()


def _exit_after(error: Exception) -> None:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        traceback = traceback.tb_next
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
    raise SystemExit(1)


def patch_when_imported() -> None:
    """Call `moelora.patch_peft` as soon as this process has imported PEFT; the same in those it spawns."""
    if "peft" in sys.modules:
        _patch()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
    if not isinstance(spawn.get_preparation_data, _Preparation):
        spawn.get_preparation_data = _Preparation(spawn.get_preparation_data)


def _patch() -> None:
    from moelora.peft.patch import patch_peft

    patch_peft()


class _Watch(MetaPathFinder):
    """Waits for the import of PEFT."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPatch(spec.loader)
        return spec


class _ThenPatch(Loader):
    """Loads a module as its own loader does, then patches PEFT."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _patch()


class _Preparation:
    """`multiprocessing.spawn.get_preparation_data`, whose result patches the new process when it is read there."""

    def __init__(self, stock: Callable[[str], dict[str, Any]]) -> None:
        self.stock = stock

    def __call__(self, name: str) -> dict[str, Any]:
        return self.stock(name) | {"moelora": _OnArrival()}


class _OnArrival:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return patch_when_imported, ()
