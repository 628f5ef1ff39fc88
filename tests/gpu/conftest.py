"""Layers on a GPU, what is right for them in float64, and which of moelora's ways computes them."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moelora import _core
from moelora.nn import gpu

WAYS = ("torch", "addmm", "decode", "dual", "fused", "shared", "grouped")


class Layer(NamedTuple):
    x: Tensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    routing_weights: Tensor
    scaling: list[float]
    base: dict[str, Tensor]  # weight and bias, or base_output, or nothing
    top_k: int | None

    @property
    def leaves(self):
        return [self.x, self.routing_weights, *self.lora_A, *self.lora_B]

    def replace(self, leaves):
        n = len(self.lora_A)
        x, w, *adapters = leaves
        return self._replace(x=x, routing_weights=w, lora_A=adapters[:n], lora_B=adapters[n:])

    def by(self, function):
        return function(
            self.x, self.lora_A, self.lora_B, self.routing_weights, self.scaling, top_k=self.top_k, **self.base
        )

    def requiring(self, *which):
        """The same values as new leaves, of which these, or all, require grad."""
        leaves = [t.detach().clone() for t in self.leaves]
        for i in which or range(len(leaves)):
            leaves[i].requires_grad_(leaves[i].is_floating_point())
        return self.replace(leaves)

    def gradients(self, function, grad_y):
        """y, then the gradients of all leaves that require one."""
        layer = self.requiring()
        y = layer.by(function)
        return [y.detach(), *torch.autograd.grad(y, [t for t in layer.leaves if t.requires_grad], grad_y)]

    def in_double(self):
        base = {name: t.detach().double() for name, t in self.base.items()}
        return self.replace([t.detach().double() for t in self.leaves])._replace(base=base)

    def loop(self):
        """Expert by expert, in the leaves' dtype."""
        w = self.routing_weights
        if 1 < w.dim() < self.x.dim():
            w = w[:, None]
        if self.top_k is not None:
            places = w.detach().argsort(dim=-1, descending=True, stable=True).argsort(-1)
            w = w.masked_fill(places >= self.top_k, 0)
        w = w.expand(*self.x.shape[:-1], len(self.lora_A))
        y = F.linear(self.x, self.base["weight"], self.base.get("bias")) if "weight" in self.base else 0
        y = y + self.base.get("base_output", 0)
        for e, (a, b, s) in enumerate(zip(self.lora_A, self.lora_B, self.scaling, strict=True)):
            y = y + (w[..., e, None] * s * (self.x @ a.T)) @ b.T
        return y

    def exact(self, grad_y):
        """`gradients` of the loop in float64."""
        layer = self.in_double().requiring()
        y = layer.loop()
        wanted = [t for t, given in zip(layer.leaves, self.leaves, strict=True) if given.is_floating_point()]
        return [y.detach(), *torch.autograd.grad(y, wanted, grad_y.double())]

    def way(self, backward=False):
        """How the C side says this layer is computed, where its memory is plain."""
        device = torch.cuda.get_device_properties(self.x.device)
        columns = sum(-(-len(a) // 8) * 8 for a in self.lora_A)
        tokens, (d_out, d_in) = self.x.shape[:-1].numel(), (len(self.lora_B[0]), self.x.shape[-1])
        about = (device.major, device.multi_processor_count, tokens, d_in, d_out, columns)
        return _core.cuda_way(*about, len(self.lora_A), self.top_k or 0, backward)


@pytest.fixture
def make_layer():
    """A function that makes a layer, the same for the same arguments, whose mixture is a tenth of its base."""

    def make(
        tokens: int | tuple[int, ...] = (2, 150),
        d_in: int = 256,
        d_out: int = 384,
        ranks: tuple[int, ...] = (16, 4, 8),
        *,
        dtype: torch.dtype = torch.bfloat16,
        adapters: torch.dtype = torch.float32,
        weights: str = "token",
        weights_dtype: torch.dtype = torch.float32,
        base: str = "weight",
        top_k: int | None = None,
        device: str = "cuda",
    ) -> Layer:
        generator = torch.Generator(device).manual_seed(sum(ranks) + d_in)
        lead = (tokens,) if isinstance(tokens, int) else tokens
        n, columns = len(ranks), sum(ranks)

        def random(*shape, std=1.0, dtype=dtype):
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

        shape = {"token": lead, "sequence": lead[:1], "static": ()}[weights]
        w = torch.rand(*shape, n, generator=generator, device=device)
        bases: dict[str, Any] = {
            "nothing": {},
            "base_output": {"base_output": random(*lead, d_out)},
            "weight": {"weight": random(d_out, d_in, std=d_in**-0.5)},
            "zeros": {"weight": torch.zeros(d_out, d_in, device=device, dtype=dtype)},
        }
        bases["weight and bias"] = {**bases["weight"], "bias": random(d_out)}
        return Layer(
            random(*lead, d_in),
            [random(r, d_in, std=d_in**-0.5, dtype=adapters) for r in ranks],
            [random(d_out, r, std=0.1 * columns**-0.5, dtype=adapters) for r in ranks],
            w.round().to(weights_dtype) if not weights_dtype.is_floating_point else w.to(weights_dtype),
            [1.5 - e % 3 for e in range(n)],
            bases[base],
            top_k,
        )

    return make


@pytest.fixture
def random_like():
    """A function that makes a tensor [..., width] for a layer's tokens, in its dtype: the gradient of its output."""

    def random_like(layer: Layer, width: int | None = None) -> Tensor:
        generator = torch.Generator(layer.x.device).manual_seed(1)
        shape = (*layer.x.shape[:-1], len(layer.lora_B[0]) if width is None else width)
        return torch.randn(shape, generator=generator, device=layer.x.device).to(layer.x.dtype)

    return random_like


def error(got: Tensor, exact: Tensor) -> float:
    """The error's norm beside that of what is right."""
    norm = exact.norm().item()
    return (got.double() - exact).norm().item() / (norm or 1.0)


@pytest.fixture
def assert_as_exact():
    """``(got, exact, peer)``: its error is at most that of the peer, another result or a number, and 5 %.

    Of few numbers the errors are a matter of luck, which the limit allows for.
    """

    def check(got: Tensor, exact: Tensor, peer: Tensor | float, what: str) -> None:
        assert got.shape == exact.shape, what
        of_peer, of_got = peer if isinstance(peer, float) else error(peer, exact), error(got, exact)
        luck = max(int(exact.count_nonzero()), 1) ** -0.5
        limit = of_peer * (1.05 + 5 * luck) + luck / 256
        assert of_got <= limit, f"{what}: {of_got:.3e}, the peer has {of_peer:.3e}"

    return check


@pytest.fixture
def force_way():
    """Compute every layer that can be so in one way; None: by the rule."""
    yield _core.set_cuda_way
    _core.set_cuda_way(None)


@pytest.fixture(params=WAYS)
def way(request, force_way):
    force_way(request.param)
    return request.param


@pytest.fixture
def taken(monkeypatch):
    """How often an entry of the C side did something: what it answers None to is left to others."""
    count: Counter[str] = Counter()

    class Counting:
        def __getattr__(self, name):
            def call(*args):
                result = getattr(_core, name)(*args)
                count[name] += result is not None or name in ("cuda_mix", "cuda_mix_backward", "cuda_drop_backward")
                if name == "cuda_call" and result is not None:
                    count["cuda_forward"] += result[3] is not None  # which has been called at once
                return result

            return call

    monkeypatch.setattr(gpu, "_core", Counting())
    return count


def fill_free_memory(value: int) -> None:
    """Leave this in all bytes of the memory that new tensors get next."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    large = torch.full((64 << 20,), value, dtype=torch.int32, device="cuda")
    small = [torch.full((1 << 17,), value, dtype=torch.int32, device="cuda") for _ in range(32)]
    del large, small


@pytest.fixture(autouse=torch.cuda.is_available())
def poisoned():
    """New tensors begin as NaN, in whichever dtype."""
    fill_free_memory(-1)


@pytest.fixture
def fill():
    return fill_free_memory
