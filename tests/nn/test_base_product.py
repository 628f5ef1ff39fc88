"""The base product of `moelora.nn.routed_lora`, x W^T + b and g W, by moelora's kernels and by torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moelora
from moelora import _core
from moelora.nn import plain, routed_lora


@pytest.fixture(params=["own", "torch"])
def product(request):
    moelora.set_base_product(request.param)
    yield request.param
    moelora.set_base_product(None)


@pytest.fixture(autouse=True)
def by_shape_again():
    yield
    moelora.set_base_product(None)


@pytest.fixture
def products_of_torch(monkeypatch):
    """The base products that torch is asked for, by their arguments' shapes."""
    asked = []

    def linear(x, weight, bias=None):
        asked.append((tuple(x.shape), tuple(weight.shape)))
        return F.linear(x, weight, bias)

    def use(function):
        types = (torch.Tensor, nn.Parameter, plain.empty_cpu, plain.empty_cuda, torch.empty_like, function)
        types += (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
        assert _core.use_torch(*types)

    use(linear)
    yield asked
    use(F.linear)


def silent(d_in, d_out, dtype=torch.float32):
    """One expert that adds nothing."""
    return [torch.zeros(1, d_in, dtype=dtype)], [torch.zeros(d_out, 1, dtype=dtype)], torch.ones(1, dtype=dtype), 1.0


LAYOUTS = {
    "Linear": lambda w: w.contiguous(),
    "Conv1D": lambda w: w.t().contiguous().t(),
    "every other column": lambda w: torch.stack([w, w + 1], -1).flatten(-2)[:, ::2],
    "every other row": lambda w: torch.stack([w, w + 1], 1).flatten(0, 1)[::2],
    "one row for all": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [(1,), (2,), (3, 5), (33,), (300,)], ids=str)
@pytest.mark.parametrize("d_in, d_out", [(1, 1), (7, 3), (768, 130), (1031, 517)])
def test_the_error_is_that_of_a_sum_in_float32(product, tokens, d_in, d_out, layout):
    torch.manual_seed(0)
    weight, bias = LAYOUTS[layout](torch.randn(d_out, d_in)), torch.randn(d_out)
    x = torch.randn(*tokens, d_in, requires_grad=True)
    y = routed_lora(x, *silent(d_in, d_out), weight=weight, bias=bias)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)

    # |error| <= (depth + 1) eps / 2 * sum |x| |w| for every order of the sum; in blocks it is far smaller.
    def check(got, left, right, offset=0.0):
        exact = left.double() @ right.double() + offset
        size = left.double().abs() @ right.double().abs() + abs(offset)
        assert ((got - exact).abs() <= 0.25 * (right.shape[0] + 2) * 2.0**-24 * size + 2.0**-24 * 4 * size).all()

    check(y.detach(), x.detach(), weight.t(), bias.double())
    check(grad_x, grad_y, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens, weights", [((2, 5), ()), ((2, 5), (2,)), ((7,), (7,)), ((1,), (1,))], ids=str)
def test_base_and_mixture_are_a_sum(make_mixture, product, tokens, weights, with_bias, dtype):
    m = make_mixture(tokens=tokens, weights=weights, dtype=dtype, d_in=19, d_out=23)
    weight, bias = torch.randn(23, 19).to(dtype), torch.randn(23).to(dtype) if with_bias else None
    y = routed_lora(*m, weight=weight, bias=bias)
    expected = routed_lora(*m, base_output=F.linear(m.x, weight, bias))
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, m.leaves, grad), torch.autograd.grad(expected, m.leaves, grad), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(routed_lora(*m, weight=weight, bias=bias), y)


def test_the_choice_decides_whom_torch_is_not_asked_for(make_mixture, products_of_torch):
    m = make_mixture(tokens=(3,), d_in=19, d_out=23, dtype=torch.float32)
    weight = torch.randn(23, 19)
    moelora.set_base_product("own")
    routed_lora(*m, weight=weight).sum().backward()
    assert products_of_torch == []
    moelora.set_base_product("torch")
    routed_lora(*m, weight=weight).sum().backward()
    assert products_of_torch == [((3, 19), (23, 19))]


def test_by_itself_the_answer_follows_from_the_shape(products_of_torch):
    def asked(tokens, dtype):
        products_of_torch.clear()
        routed_lora(torch.ones(tokens, 64, dtype=dtype), *silent(64, 64, dtype), weight=torch.ones(64, 64, dtype=dtype))
        return len(products_of_torch)

    dtypes = (torch.float32, torch.float64)
    answers = {(tokens, dtype): asked(tokens, dtype) for tokens in (1, 4096) for dtype in dtypes}
    assert answers == {key: asked(*key) for key in answers}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_with_torch(dtype):
    moelora.set_base_product("own")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 19).to(dtype), torch.randn(23, 19).to(dtype), torch.randn(23).to(dtype)
    y = routed_lora(x, *silent(19, 23), weight=weight, bias=bias)
    assert y.dtype is dtype and torch.equal(y, F.linear(x, weight, bias))


def test_autocast_decides_before_the_product(product):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 19), torch.randn(23, 19)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed_lora(x, *silent(19, 23), weight=weight)
    assert torch.equal(y, F.linear(x.bfloat16(), weight.bfloat16()))


def test_a_weight_that_changed_before_the_backward_is_an_error(product):
    weight = torch.ones(5, 4)
    x = torch.ones(3, 4, requires_grad=True)
    y = routed_lora(x, *silent(4, 5), weight=weight.t().contiguous().t())
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 5.0))
    y = routed_lora(x, *silent(4, 5), weight=weight)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nan_and_infinity_come_through(product):
    weight = torch.ones(5, 4)
    weight[1, 2], weight[3, 0] = torch.nan, torch.inf
    y = routed_lora(torch.ones(3, 4), *silent(4, 5), weight=weight)
    assert y[:, 1].isnan().all() and (y[:, 3] == torch.inf).all() and (y[:, [0, 2, 4]] == 4).all()
