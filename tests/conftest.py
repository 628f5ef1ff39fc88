"""What holds for every test of this project."""

import gc
import os

# Plain NumPy in place of a missing extension must never look like success here.
os.environ["MOELORA_REQUIRE_EXT"] = "1"
# Models are made from configs; nothing waits for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_finish() -> None:
    """Trainer collects garbage before it trains, and would walk through all that was imported every time."""
    gc.freeze()
