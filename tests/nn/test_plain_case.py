"""The plain case of `moelora.nn.routed_lora`, which C checks and reads, equals the way that all other calls take."""

import numpy as np
import pytest
import torch
from torch import nn

import moelora
from moelora.nn import autograd, cpu, routed_lora


@pytest.fixture
def torchs_base():
    """The base product always from torch, as for calls that are not plain."""
    moelora.set_base_product("torch")
    yield
    moelora.set_base_product(None)


class Refusing:
    """The core when no backward is plain."""

    def __init__(self, core):
        self.core = core

    def __getattr__(self, name):
        return (lambda *args: None) if name == "backward_tensors" else getattr(self.core, name)


def both_ways(monkeypatch, function):
    """Its results when the plain case is known, and when it is not."""
    first = function()
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "plain_call", lambda *args: None)
        patch.setattr(cpu, "_core", Refusing(cpu._core))
        return first, function()


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other column": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "one row for all": lambda t: t[:1].clone().expand(t.shape),
}


DTYPES = {  # of x, and of adapters and routing weights
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 and float32": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("base", ["none", "base_output", "weight", "weight and bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "tokens, weights", [((2, 5), ()), ((2, 5), (2,)), ((2, 5), (2, 5)), ((7,), ()), ((7,), (7,)), ((1,), (1,))], ids=str
)
def test_both_ways_give_the_same_bits(
    make_mixture, monkeypatch, taken, torchs_base, tokens, weights, layout, base, dtypes
):
    dtype, adapters = DTYPES[dtypes]
    m = make_mixture(tokens=tokens, weights=weights, dtype=dtype, adapters=adapters, grad=False)
    arrange = LAYOUTS[layout]
    weight, bias, base_output = (torch.randn(shape).to(dtype) for shape in ((6, 7), (6,), (*tokens, 6)))
    given = {
        "none": {},
        "base_output": {"base_output": arrange(base_output)},
        "weight": {"weight": arrange(weight)},
        "weight and bias": {"weight": arrange(weight), "bias": bias},
    }[base]
    leaves = [arrange(t) if t.dim() > 1 else t for t in m.leaves]
    grad = arrange(torch.randn(*tokens, 6).to(dtype))

    def without():
        return [routed_lora(*m.replace(leaves), **given)]

    def differentiated():
        fresh = [t.detach().requires_grad_() for t in leaves]
        y = routed_lora(*m.replace(fresh), **given)
        return [y, *torch.autograd.grad(y, fresh, grad)]

    for function in (without, differentiated):
        for a, b in zip(*both_ways(monkeypatch, function), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    assert taken == {"forward_tensors": 2, "backward_tensors": 1, "forward_raw": 2, "backward_raw": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("weights", [(), (2, 5)], ids=str)
def test_top_k_too(make_mixture, monkeypatch, taken, torchs_base, weights, top_k, dtype):
    m = make_mixture(weights=weights, dtype=dtype)

    def differentiated():
        y = routed_lora(*m, top_k=top_k)
        return [y.detach(), *torch.autograd.grad(y, m.leaves, torch.ones_like(y))]

    for a, b in zip(*both_ways(monkeypatch, differentiated), strict=True):
        assert torch.equal(a, b)
    assert taken == {"forward_tensors": 1, "backward_tensors": 1, "forward_raw": 1, "backward_raw": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", range(8))
def test_gradients_of_some_alone_are_the_same(make_mixture, monkeypatch, taken, wanted, dtype):
    m = make_mixture(dtype=dtype, grad=False)

    def gradient():
        leaf = m.leaves[wanted].detach().requires_grad_()
        leaves = list(m.leaves)
        leaves[wanted] = leaf
        return torch.autograd.grad(routed_lora(*m.replace(leaves)).square().sum(), leaf)

    (a,), (b,) = both_ways(monkeypatch, gradient)
    assert torch.equal(a, b)
    assert taken["backward_tensors"] == taken["backward_raw"] == 1


def test_changes_of_parameters_are_seen_at_once(make_mixture, taken):
    m = make_mixture(grad=False)
    A, B = ([nn.Parameter(t) for t in adapters] for adapters in (m.lora_A, m.lora_B))
    for change in (
        lambda: A[0].data.mul_(2),
        lambda: setattr(A[1], "data", torch.randn(3, 7, dtype=torch.float64)),
        lambda: B.__setitem__(2, nn.Parameter(torch.randn(6, 1, dtype=torch.float64))),
        lambda: (
            A.__setitem__(0, nn.Parameter(torch.randn(4, 7, dtype=torch.float64)))
            or B.__setitem__(0, nn.Parameter(torch.randn(6, 4, dtype=torch.float64)))
        ),
    ):
        change()
        y = routed_lora(m.x, A, B, m.routing_weights, m.scaling)
        torch.testing.assert_close(y, m._replace(lora_A=A, lora_B=B).loop())
    assert taken["forward_tensors"] == 4 and taken["forward_raw"] == 0


def test_dtypes_that_do_not_go_together_are_converted(make_mixture, taken):
    m = make_mixture(dtype=torch.float32, grad=False)
    bf16 = make_mixture(dtype=torch.bfloat16, grad=False)
    calls = [
        m._replace(routing_weights=m.routing_weights.double()),
        m._replace(x=m.x.half()),
        m._replace(x=m.x.double()),
        bf16._replace(lora_A=m.lora_A),
        bf16._replace(lora_B=[bf16.lora_B[0], *m.lora_B[1:]]),
        bf16._replace(routing_weights=m.routing_weights.half()),
    ]
    for given in calls:
        assert routed_lora(*given).dtype is given.x.dtype
    assert taken["forward_tensors"] == 0 and taken["forward_raw"] == len(calls)


def test_what_is_plain_once_it_is_checked_is_not_converted(make_mixture, taken):
    m = make_mixture(tokens=(2, 2, 5), dtype=torch.float32, grad=False)
    y = routed_lora(*m)
    for given, options in [
        (m, {"top_k": np.int64(3)}),
        (m._replace(routing_weights=m.routing_weights > 0), {}),
        (m._replace(scaling=[1, 2, 3]), {}),
        (m._replace(lora_A=nn.ParameterList(m.lora_A)), {}),
        (m._replace(lora_B=iter(m.lora_B)), {}),
    ]:
        assert routed_lora(*given, **options).shape == y.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert routed_lora(*m).dtype is torch.bfloat16
    assert taken["forward_tensors"] == 7 and taken["forward_raw"] == 0


def test_a_saved_tensor_that_comes_back_as_another_is_read_as_what_it_is(make_mixture, taken):
    m, expected = make_mixture(dtype=torch.float32), make_mixture(dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        y = routed_lora(*m)
    y.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t):
        y = routed_lora(*make_mixture(dtype=torch.float32))
    torch.autograd.grad(y.sum(), y.grad_fn.next_functions[0][0].variable)
    expected.loop().sum().backward()
    for a, b in zip(m.leaves, expected.leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_an_error_is_that_of_the_other_way(make_mixture, monkeypatch):
    m = make_mixture(grad=False)
    for wrong in (
        {"x": m.x[..., :3]},
        {"lora_A": m.lora_A[:2]},
        {"routing_weights": m.routing_weights[:, :3]},
        {"scaling": [1.0]},
        {"base_output": m.x},
        {"bias": m.x[0, 0]},
    ):

        def message(wrong=wrong):
            with pytest.raises(ValueError) as error:
                routed_lora(**(m._asdict() | wrong))
            return str(error.value)

        first, second = both_ways(monkeypatch, message)
        assert first == second


def test_gradients_reach_accumulation_without_a_copy(make_mixture, taken):
    m = make_mixture()
    given = []
    for leaf in m.leaves:
        leaf.register_hook(lambda g: given.append(g.data_ptr()))
    routed_lora(*m).sum().backward()
    assert sorted(given) == sorted(leaf.grad.data_ptr() for leaf in m.leaves)


def test_outputs_that_are_large_enough_for_pages_of_their_own():
    """From 32 MiB on (call.c): y and the gradient of x, on some rows against the formula in float64."""
    torch.manual_seed(0)
    T, d = 1 << 12, 1 << 11
    x, w, base = torch.randn(T, d, requires_grad=True), torch.rand(2), torch.randn(T, d)
    A, B = [torch.randn(1, d) for _ in range(2)], [torch.randn(d, 1) for _ in range(2)]
    y = routed_lora(x, A, B, w, 0.5, base_output=base)
    (grad,) = torch.autograd.grad(y, x, base)
    delta = 0.5 * sum(w[e] * B[e] @ A[e] for e in range(2)).double()
    some = [0, 1, 511, 512, 2047, T - 1]
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y[some].double(), base[some] + x[some].double() @ delta.T, **tolerance)
    torch.testing.assert_close(grad[some].double(), base[some].double() @ delta, **tolerance)
