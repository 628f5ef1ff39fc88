"""Mixtures to compute with, and the settings to compute them under."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from moelora import functional, reference, runtime

DTYPES = (np.float32, np.float64)


def each_isa() -> Iterator[str]:
    """Every instruction set that this CPU has, one after the other."""
    before = runtime.get_isa()
    try:
        for name in runtime._core.isa_available():
            runtime.set_isa(name)
            yield name
    finally:
        runtime.set_isa(before)


@pytest.fixture(params=["twin", *runtime._core.isa_available()])
def module(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The twin, and the kernels with each instruction set."""
    before = runtime.get_isa()
    if request.param != "twin":
        runtime.set_isa(request.param)
    yield reference if request.param == "twin" else functional
    runtime.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int | None], None]]:
    """Set the number of threads for one test."""
    yield runtime.set_num_threads
    runtime.set_num_threads(None)


@pytest.fixture(params=DTYPES, ids=["f32", "f64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


def as_it_is(a):
    return a


def fortran(a):
    return np.asfortranarray(a)


def every_other(a):
    """Every second element of every axis of something larger."""
    buffer = np.full([2 * n for n in a.shape], np.nan, a.dtype)
    view = buffer[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def backwards(a):
    flip = tuple(slice(None, None, -1) for _ in a.shape)
    return np.ascontiguousarray(a[flip])[flip]


def padded_rows(a):
    buffer = np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan, a.dtype)
    buffer[..., : a.shape[-1]] = a
    return buffer[..., : a.shape[-1]]


def columns_of_sequences(a):
    """The last axis outermost in memory, the first innermost but one."""
    order = (a.ndim - 1, *range(a.ndim - 1))
    return np.ascontiguousarray(a.transpose(order)).transpose((*range(1, a.ndim), 0))


def unaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


def repeated(a):
    """Its first slice everywhere, by a zero stride. This one changes the values."""
    return np.broadcast_to(a[:1], a.shape) if a.ndim > 1 else a


OUT_LAYOUTS = (as_it_is, fortran, every_other, backwards, padded_rows, columns_of_sequences)
LAYOUTS = (*OUT_LAYOUTS, unaligned, repeated)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def layout(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=OUT_LAYOUTS, ids=lambda layout: layout.__name__)
def out_layout(request: pytest.FixtureRequest) -> Any:
    return request.param


def check_rounded(name: str, got: Any, exact: Any, magnitude: Any) -> None:
    """`got` is `exact` up to a few roundings of a sum of terms that are together as large as `magnitude`."""
    assert got.shape == exact.shape, name
    assert got.dtype == exact.dtype, name
    limits = np.finfo(got.dtype)
    allowed = 8 * limits.eps * magnitude.astype(np.float64) + limits.tiny
    worst = float((np.abs(got.astype(np.float64) - exact.astype(np.float64)) / allowed).max(initial=0.0))
    assert worst <= 1.0, f"{name} is {8 * worst:.1f} eps off"


@dataclass
class Mixture:
    """The arguments of routed_lora_forward and routed_lora_backward."""

    x: Any
    lora_A: list[Any]
    lora_B: list[Any]
    routing_weights: Any
    scaling: Any
    grad_y: Any
    weight: Any = None
    bias: Any = None
    top_k: int | None = None
    hidden: Any = field(default=None)

    def forward(self, module: Any = functional, **changes: Any) -> Any:
        m = replace(self, **{k: v for k, v in changes.items() if k != "out"})
        return module.routed_lora_forward(
            m.x,
            m.lora_A,
            m.lora_B,
            m.routing_weights,
            m.scaling,
            weight=m.weight,
            bias=m.bias,
            top_k=m.top_k,
            out=changes.get("out"),
        )

    def backward(self, module: Any = functional, *, need: Any = None, **changes: Any) -> Any:
        m = replace(self, **changes)
        hidden = m.forward(module)[1] if m.hidden is None else m.hidden
        chosen = {} if need is None else {"need": need}
        return module.routed_lora_backward(
            m.grad_y,
            m.x,
            hidden,
            m.lora_A,
            m.lora_B,
            m.routing_weights,
            m.scaling,
            weight=m.weight,
            top_k=m.top_k,
            **chosen,
        )

    def map(self, change: Callable[[Any], Any]) -> "Mixture":
        """The same with every array changed."""

        def some(a: Any) -> Any:
            return None if a is None else change(a)

        return replace(
            self,
            x=some(self.x),
            lora_A=[change(a) for a in self.lora_A],
            lora_B=[change(b) for b in self.lora_B],
            routing_weights=some(self.routing_weights),
            grad_y=some(self.grad_y),
            weight=some(self.weight),
            bias=some(self.bias),
            hidden=some(self.hidden),
        )

    def check_forward(self) -> None:
        """With each instruction set the kernels compute what the twin computes, rounded."""
        exact, magnitude = self.forward(reference), self.magnitude().forward(reference)
        for isa in each_isa():
            for name, *values in zip(("y", "hidden"), self.forward(), exact, magnitude, strict=True):
                check_rounded(f"{isa}: {name}", *values)

    def check_backward(self) -> None:
        """The same of the gradients, given the twin's hidden."""
        m = replace(self, hidden=self.forward(reference)[1])
        exact, magnitude = m.backward(reference), m.magnitude().backward(reference)
        for isa in each_isa():
            got = m.backward()
            check_rounded(f"{isa}: x", got.x, exact.x, magnitude.x)
            check_rounded(f"{isa}: w", got.routing_weights, exact.routing_weights, magnitude.routing_weights)
            for name in ("lora_A", "lora_B"):
                arrays = (getattr(grads, name) for grads in (got, exact, magnitude))
                for e, values in enumerate(zip(*arrays, strict=True)):
                    check_rounded(f"{isa}: {name}[{e}]", *values)

    def magnitude(self) -> "Mixture":
        """Everything positive and dense: what it computes bounds the terms that are summed up in this one."""
        positive = replace(self.map(np.abs), scaling=np.abs(self.scaling), top_k=None)
        return replace(positive, hidden=positive.forward(reference)[1])


def random_mixture(
    tokens: tuple[int, ...] = (5,),
    d_in: int = 7,
    d_out: int = 6,
    ranks: tuple[int, ...] = (2, 1, 5),
    *,
    per: str = "token",
    dtype: Any = np.float64,
    base: bool = False,
    top_k: int | None = None,
    seed: int = 0,
) -> Mixture:
    """A mixture of normal numbers; `per` says what each row of its routing weights is for."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    rows = {"call": (), "sequence": tokens[:1], "token": tokens}[per]
    return Mixture(
        x=normal(*tokens, d_in),
        lora_A=[normal(r, d_in) for r in ranks],
        lora_B=[normal(d_out, r) for r in ranks],
        routing_weights=normal(*rows, len(ranks)),
        scaling=list(rng.uniform(0.5, 2.0, len(ranks))),
        grad_y=normal(*tokens, d_out),
        weight=normal(d_out, d_in) if base else None,
        bias=normal(d_out) if base else None,
        top_k=top_k,
    )


@pytest.fixture(scope="session")
def make_mixture() -> Callable[..., Mixture]:
    return random_mixture
