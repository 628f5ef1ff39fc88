"""A mixture to test with, and the loop over its experts that says what is right."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moelora.nn import cpu


class Mixture(NamedTuple):
    x: Tensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    routing_weights: Tensor
    scaling: list[float]

    @property
    def leaves(self):
        return [self.x, self.routing_weights, *self.lora_A, *self.lora_B]

    def replace(self, leaves):
        n = len(self.lora_A)
        x, w, *adapters = leaves
        return Mixture(x, adapters[:n], adapters[n:], w, self.scaling)

    def loop(self, *, base=0.0, top_k=None):
        """Expert by expert, token weights spelled out, in the dtype of the leaves."""
        x, w, n = self.x, self.routing_weights, len(self.lora_A)
        if 1 < w.dim() < x.dim():
            w = w[:, None]
        w = w.expand(*x.shape[:-1], n)
        if top_k is not None:
            kept = torch.zeros_like(w, dtype=torch.bool)
            for token in range(kept.reshape(-1, n).shape[0]):
                row = w.detach().reshape(-1, n)[token].tolist()
                largest = sorted(range(n), key=lambda e: (-row[e], e))[:top_k]
                kept.reshape(-1, n)[token, largest] = True
            w = torch.where(kept, w, 0)
        y = base
        for e, (a, b, s) in enumerate(zip(self.lora_A, self.lora_B, self.scaling, strict=True)):
            y = y + w[..., e, None] * s * (x @ a.T @ b.T)
        return y


@pytest.fixture
def make_mixture():
    """A function that makes a mixture of random tensors, the same for the same arguments."""

    def make(
        tokens=(2, 5), d_in=7, d_out=6, ranks=(2, 3, 1), weights=None, dtype=torch.float64, adapters=None, grad=True
    ):
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape, dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

        n, adapters = len(ranks), adapters or dtype
        return Mixture(
            leaf(*tokens, d_in, dtype=dtype),
            [leaf(r, d_in, dtype=adapters) for r in ranks],
            [leaf(d_out, r, dtype=adapters) for r in ranks],
            leaf(*(tokens if weights is None else weights), n, dtype=adapters),
            [0.5 + e for e in range(n)],
        )

    return make


@pytest.fixture
def taken(monkeypatch):
    """How often the core was entered with plain tensors."""
    count = {"forward_tensors": 0, "backward_tensors": 0, "forward_raw": 0, "backward_raw": 0}
    core = cpu._core

    class Counting:
        def __getattr__(self, name):
            count[name] += 1
            return getattr(core, name)

    monkeypatch.setattr(cpu, "_core", Counting())
    return count
