"""What holds for every test of this project."""

import gc
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Plain NumPy in place of a missing extension must never look like success here.
os.environ["MOELORA_REQUIRE_EXT"] = "1"
# Models are made from configs; nothing waits for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes side by side (pytest -n) share the cores; each with threads for all of them, they would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from moelora import runtime  # noqa: E402


@pytest.fixture
def operations() -> Callable[[Callable[[], Any]], set[str]]:
    """A function that calls another one and returns the names of torch's operations in there, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode  # the core's tests run without torch

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    names: set[str] = set()

    def operations(function: Callable[[], Any]) -> set[str]:
        names.clear()
        with Recorded():
            function()
        return set(names)

    return operations


@pytest.fixture
def leaks_nothing() -> Callable[[Callable[[], Any], list[Any]], None]:
    """A function that calls another one often, and asserts that neither references to ``watched`` nor memory grow."""

    def leaks_nothing(function: Callable[[], Any], watched: list[Any]) -> None:
        for _ in range(3):
            function()
        gc.collect()
        references = [sys.getrefcount(o) for o in watched]
        grown = []
        tracemalloc.start()
        try:
            for _ in range(3):
                gc.collect()
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(100):
                    function()
                gc.collect()
                grown.append(tracemalloc.get_traced_memory()[0] - before)
        finally:
            tracemalloc.stop()
        assert [sys.getrefcount(o) for o in watched] == references
        # One object lost in each call would be more, each time; free lists and caches of others come and go.
        assert min(grown) < 100 * 16, grown

    return leaks_nothing


@pytest.fixture(params=runtime._core.isa_available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Compute with each instruction set that this CPU has."""
    before = runtime.get_isa()
    runtime.set_isa(request.param)
    yield request.param
    runtime.set_isa(before)


def pytest_collection_finish() -> None:
    """Trainer collects garbage before it trains, and would walk through all that was imported every time."""
    gc.freeze()
