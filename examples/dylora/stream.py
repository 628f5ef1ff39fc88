"""What the model is shown, one task after another: text that comes with Python, as sequences of bytes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelora.demo.text import Domain, windows

LENGTH = 128  # tokens of a sequence; a token is a byte

# Domain and half of its text. Python comes back with text that was not shown before.
VISITS = (("Python source", 0), ("English prose", 0), ("JSON and CSV", 0), ("Python source", 1), ("C headers", 0))


class Task(NamedTuple):
    """One task of the stream. The model sees `train` alone; the domain's name is for the table that we print."""

    domain: str
    train: Tensor
    """[n, LENGTH] of int64."""


def make_stream(domains: list[Domain]) -> list[Task]:
    """The tasks in their order."""
    text = {domain.name: np.array_split(domain.train, 2) for domain in domains}
    return [Task(name, sequences(text[name][half])) for name, half in VISITS]


def sequences(text: np.ndarray) -> Tensor:
    """Bytes [n] as sequences [n // LENGTH, LENGTH] without overlap."""
    return torch.from_numpy(windows(text, np.arange(0, len(text) - LENGTH + 1, LENGTH), LENGTH))
