"""What holds for every test of this project."""

import gc
import os
from collections.abc import Iterator

import pytest

# Plain NumPy in place of a missing extension must never look like success here.
os.environ["MOELORA_REQUIRE_EXT"] = "1"
# Models are made from configs; nothing waits for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes side by side (pytest -n) share the cores; each with threads for all of them, they would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from moelora import runtime  # noqa: E402


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
