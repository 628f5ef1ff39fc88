"""bfloat16 on the CPU: computed in float32 by the core, and rounded once."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelora.nn import routed_lora

BF16, F32 = torch.bfloat16, torch.float32


def assert_rounded(got, exact, magnitude):
    """`got` is off by roundings of float32 of terms of that size together, and by half a unit in its own last place."""
    allowed = 64 * torch.finfo(F32).eps * magnitude
    if got.dtype is BF16:
        allowed = allowed + (exact.abs() + allowed) / 256
    assert ((got.double() - exact).abs() <= allowed).all()


def exactly(m, grad, **options):
    """The output and all gradients in float64."""
    leaves = [t.detach().double().requires_grad_() for t in m.leaves]
    y = m.replace(leaves).loop(**options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("adapters", [BF16, F32], ids=str)
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize(
    "tokens, weights",
    [((1,), ()), ((4,), (4,)), ((2, 8), (2,)), ((3, 30), (3, 30)), ((700,), (700,)), ((2, 300), (2,)), ((1200,), ())],
    ids=str,
)
def test_one_rounding_of_the_output_and_of_each_gradient(make_mixture, taken, tokens, weights, base, adapters, top_k):
    m = make_mixture(tokens, 70, 33, (8, 16, 3), weights=weights, dtype=BF16, adapters=adapters)
    base_output = torch.randn(*tokens, 33).to(BF16) if base else None
    grad = torch.randn(*tokens, 33).to(BF16)

    y = routed_lora(*m, base_output=base_output, top_k=top_k)
    got = [y.detach(), *torch.autograd.grad(y, m.leaves, grad)]

    assert [t.dtype for t in got] == [BF16, *(t.dtype for t in m.leaves)]
    start = base_output.double() if base else 0.0
    exact = exactly(m, grad, base=start, top_k=top_k)
    # Of absolute values top_k may keep others: the sum over all experts is no smaller.
    sizes = exactly(m.replace([t.abs() for t in m.leaves]), grad.abs(), base=abs(start))
    for values in zip(got, exact, sizes, strict=True):
        assert_rounded(*values)
    assert taken == {"forward_tensors": 1, "backward_tensors": 1, "forward_raw": 0, "backward_raw": 0}


@pytest.mark.parametrize("adapters", [BF16, F32], ids=str)
def test_every_instruction_set(make_mixture, isa, adapters):
    for tokens in (1, 3, 20, 60):
        m = make_mixture((tokens,), 130, 67, (8, 8, 8), dtype=BF16, adapters=adapters)
        grad = torch.randn(tokens, 67).to(BF16)
        y = routed_lora(*m)
        exact, sizes = exactly(m, grad), exactly(m.replace([t.abs() for t in m.leaves]), grad.abs())
        for values in zip([y.detach(), *torch.autograd.grad(y, m.leaves, grad)], exact, sizes, strict=True):
            assert_rounded(*values)


def test_the_base_is_rounded_where_torch_rounds_it(make_mixture, taken):
    m = make_mixture((5,), 70, 33, dtype=BF16, grad=False)
    weight, bias = torch.randn(33, 70).to(BF16), torch.randn(33).to(BF16)
    base = torch.nn.functional.linear(m.x, weight, bias)
    assert torch.equal(routed_lora(*m, weight=weight, bias=bias), routed_lora(*m, base_output=base))
    assert taken["forward_tensors"] == 2


def test_x_is_kept_as_it_is_and_hidden_in_float32(make_mixture):
    m = make_mixture((2, 5), dtype=BF16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routed_lora(*m)
    addresses = {t.data_ptr() for t in m.leaves}
    assert [(t.dtype, tuple(t.shape)) for t in kept if t.data_ptr() not in addresses] == [(F32, (2, 5, 6))]


def test_checkpointing_and_no_grad_change_no_bit(make_mixture):
    m = make_mixture((3, 200), dtype=BF16)
    y = routed_lora(*m)
    again = checkpoint(routed_lora, *m, use_reentrant=False)
    with torch.no_grad():
        assert torch.equal(routed_lora(*m), y)
    assert torch.equal(again, y)
    grad = torch.ones_like(y)
    for a, b in zip(torch.autograd.grad(y, m.leaves, grad), torch.autograd.grad(again, m.leaves, grad), strict=True):
        assert torch.equal(a, b)


def test_tokens_do_not_depend_on_those_beside_them_in_a_block(make_mixture):
    m = make_mixture((1100,), 70, 33, dtype=BF16, grad=False)
    y = routed_lora(*m)
    for part in (slice(0, 512), slice(512, 1024)):
        assert torch.equal(routed_lora(*m._replace(x=m.x[part], routing_weights=m.routing_weights[part])), y[part])
