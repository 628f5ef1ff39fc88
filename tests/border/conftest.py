"""One valid call, for the tests to spoil."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moelora import functional, reference


@pytest.fixture(params=["kernels", "twin"])
def module(request: pytest.FixtureRequest) -> Any:
    return functional if request.param == "kernels" else reference


class Call(SimpleNamespace):
    """Arguments by name: x [2, 3, 4], two experts of rank 2, d_out 5."""

    def forward(self, module: Any) -> Any:
        return module.routed_lora_forward(
            self.x,
            self.lora_A,
            self.lora_B,
            self.routing_weights,
            self.scaling,
            weight=self.weight,
            bias=self.bias,
            top_k=self.top_k,
            out=self.out,
        )

    def backward(self, module: Any) -> Any:
        return module.routed_lora_backward(
            self.grad_y,
            self.x,
            self.hidden,
            self.lora_A,
            self.lora_B,
            self.routing_weights,
            self.scaling,
            weight=self.weight,
            top_k=self.top_k,
            need=self.need,
        )


@pytest.fixture
def call() -> Call:
    rng = np.random.default_rng(0)
    return Call(
        x=rng.standard_normal((2, 3, 4)),
        lora_A=[rng.standard_normal((2, 4)) for _ in range(2)],
        lora_B=[rng.standard_normal((5, 2)) for _ in range(2)],
        routing_weights=rng.standard_normal((2, 3, 2)),
        scaling=[1.0, 2.0],
        weight=rng.standard_normal((5, 4)),
        bias=rng.standard_normal(5),
        top_k=None,
        out=None,
        grad_y=rng.standard_normal((2, 3, 5)),
        hidden=rng.standard_normal((2, 3, 4)),
        need=("x", "lora_A", "lora_B", "routing_weights"),
    )
