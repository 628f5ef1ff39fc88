"""Is this text something new? What is known of each skill, and how far new text lies from it."""

import os
from pathlib import Path

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor


class NoveltyDetector:
    """Compares the embedding of new data with a prototype of each skill.

    An embedding is the mean of the frozen base's last hidden states. All text has much of that in common, so the
    `centre`, the mean over ordinary text, is taken off first: without that, two of the domains here have a cosine
    similarity of 0.95.

    Parameters
    ----------
    centre : Tensor [H]
        Mean embedding of the base's own training text.
    threshold : float
        Data whose similarity with every prototype is lower are novel.
    """

    def __init__(self, centre: Tensor, threshold: float = 0.8) -> None:
        self.centre = centre
        self.threshold = threshold
        self.prototypes: dict[str, Tensor] = {}

    def similarities(self, embedding: Tensor) -> dict[str, float]:
        """Cosine similarity of an embedding [H] with each skill's prototype."""
        direction = embedding - self.centre
        return {
            skill: F.cosine_similarity(direction, prototype - self.centre, dim=0).item()
            for skill, prototype in self.prototypes.items()
        }

    def recognise(self, embedding: Tensor) -> str | None:
        """The skill that an embedding [H] belongs to; None if it is novel."""
        similarities = self.similarities(embedding)
        closest = max(similarities, key=similarities.__getitem__, default=None)
        return closest if closest is not None and similarities[closest] >= self.threshold else None

    def remember(self, skill: str, embedding: Tensor) -> None:
        """Take an embedding [H] as the prototype of a new skill."""
        self.prototypes[skill] = embedding

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write centre and prototypes to a safetensors file."""
        safetensors.torch.save_file({"centre": self.centre} | self.prototypes, Path(file))

    @classmethod
    def load(cls, file: str | os.PathLike[str], threshold: float = 0.8) -> "NoveltyDetector":
        """Read what `save` has written."""
        tensors = safetensors.torch.load_file(Path(file))
        detector = cls(tensors.pop("centre"), threshold)
        detector.prototypes = tensors
        return detector
