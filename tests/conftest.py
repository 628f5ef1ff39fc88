"""What holds for every test of this project."""

import os

# Plain NumPy in place of a missing extension must never look like success here.
os.environ["MOELORA_REQUIRE_EXT"] = "1"
# Models are made from configs; nothing waits for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
