"""bfloat16 on the CPU: computed in float32 by the core and rounded once, or multiplied in pairs where the CPU can."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moelora
from moelora import runtime
from moelora.nn import routed_lora

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def isas():
    """The instruction sets to choose from."""
    before = moelora.get_isa()
    yield runtime._core.isa_available()
    moelora.set_isa(before)


def assert_rounded(got, exact, magnitude, factors=0):
    """`got` is off by roundings of float32 of terms of that size together, and by half a unit in its own last place.

    `factors` of each term were rounded to bfloat16 before.
    """
    allowed = (64 * torch.finfo(F32).eps + factors / 256) * magnitude
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


@pytest.mark.parametrize("d_out", [67, 68])
@pytest.mark.parametrize("adapters", [BF16, F32], ids=str)
def test_every_instruction_set(make_mixture, isa, adapters, d_out):
    pairs = isa == "avx512bf16" and adapters is BF16 and d_out % 2 == 0
    for tokens in (1, 3, 20, 60, 300):
        m = make_mixture((tokens,), 130, d_out, (8, 16, 2), dtype=BF16, adapters=adapters)
        grad = torch.randn(tokens, d_out).to(BF16)
        y = routed_lora(*m)
        exact, sizes = exactly(m, grad), exactly(m.replace([t.abs() for t in m.leaves]), grad.abs())
        got = [y.detach(), *torch.autograd.grad(y, m.leaves, grad)]
        for i, values in enumerate(zip(got, exact, sizes, strict=True)):
            of_weights = i == 2  # which take H and P as they are
            assert_rounded(*values, factors=int(pairs and not of_weights))


def with_gradients(function, m, grad):
    """Its output and its gradients, those of all A and those of all B as one."""
    leaves = [t.detach().requires_grad_() for t in m.leaves]
    m = m.replace(leaves)
    y = function(m)
    grads = iter(torch.autograd.grad(y, leaves, grad.to(y.dtype)))
    grad_x, grad_w = next(grads), next(grads)
    return [y.detach(), grad_x, grad_w, *(torch.cat([next(grads).flatten() for _ in m.scaling]) for _ in "AB")]


def stacked(m):
    """The mixture as two products in torch."""
    ranks = torch.tensor([a.shape[0] for a in m.lora_A])
    factors = m.routing_weights * torch.tensor(m.scaling, dtype=m.x.dtype)
    return m.x @ torch.cat(m.lora_A).T * factors.repeat_interleave(ranks, -1) @ torch.cat(m.lora_B, 1).T


@pytest.mark.parametrize("tokens", [2, 33, 129, 600])
def test_no_instruction_set_is_further_off_than_stacked_torch(make_mixture, isa, tokens):
    torch.manual_seed(0)
    off = torch.zeros(2, 5, dtype=torch.float64)  # ours and torch's, squared
    for _ in range(1 + 256 // tokens):  # of few numbers chance would decide
        m = make_mixture((tokens,), 514, 386, (8, 16, 2, 8), dtype=BF16)
        grad = torch.randn(tokens, 386).to(BF16)
        exact = with_gradients(stacked, m.replace([t.detach().double() for t in m.leaves]), grad)
        results = with_gradients(lambda m: routed_lora(*m), m, grad), with_gradients(stacked, m, grad)
        for i, result in enumerate(results):
            off[i] += torch.stack(
                [(got.double() - wanted).norm() ** 2 for got, wanted in zip(result, exact, strict=True)]
            )
    assert (off[0] <= off[1]).all()


@pytest.mark.parametrize("change", ["nothing", "float32 adapters", "odd width", "odd rank", "columns apart", "dropout"])
def test_pairs_are_multiplied_where_models_have_them(make_mixture, isas, change):
    odd = change == "odd width", change == "odd rank"
    adapters = F32 if change == "float32 adapters" else BF16
    m = make_mixture((40,), 64 + odd[0], 64, (8, 8 + odd[1]), dtype=BF16, adapters=adapters, grad=False)
    if change == "columns apart":
        m = m._replace(x=m.x.repeat_interleave(2, 1)[:, ::2])
    dropout_p = 0.5 if change == "dropout" else 0.0
    results = []
    for isa in ("avx512", "avx512bf16"):
        if isa not in isas:
            pytest.skip(f"this CPU has no {isa}")
        moelora.set_isa(isa)
        torch.manual_seed(0)
        results.append(routed_lora(*m, dropout_p=dropout_p))
    assert torch.equal(*results) == (change != "nothing")


def test_pairs_take_rows_of_a_larger_array(make_mixture, isa):
    m = make_mixture((4, 9), 64, 48, (8, 8), dtype=BF16, grad=False)
    wide = torch.full((4, 9, 67), torch.nan, dtype=BF16)
    wide[..., :64] = m.x
    assert torch.equal(routed_lora(*m._replace(x=wide[..., :64])), routed_lora(*m))


@pytest.mark.parametrize("adapters", [BF16, F32], ids=str)
@pytest.mark.parametrize("tokens", [(200,), (5, 40), (1100,)], ids=str)
def test_top_k_of_many_takes_rows_as_they_stand(make_mixture, isa, adapters, tokens):
    """Which gives the bits of other layouts, whose tokens are widened first, 512 at a time."""
    m = make_mixture(tokens, 66, 130, (1, 4, 12, 20, 8) * 4, dtype=BF16, adapters=adapters)
    base, grad = torch.randn(2, *tokens, 130).to(BF16)
    exact = exactly(m, grad, base=base.double(), top_k=2)
    sizes = exactly(m.replace([t.abs() for t in m.leaves]), grad.abs(), base=base.double().abs())

    def results(x):
        y = routed_lora(x, *m[1:], base_output=base, top_k=2)
        return [y.detach(), *torch.autograd.grad(y, m.leaves, grad)]

    rows = results(m.x)
    for values in zip(rows, exact, sizes, strict=True):
        assert_rounded(*values)
    columns = results(m.x.repeat_interleave(2, -1)[..., ::2])
    same = 3 if tokens == (1100,) else len(rows)  # gradients of A and B are summed block by block
    for row, column in zip(rows[:same], columns[:same], strict=True):
        assert torch.equal(row, column)


def test_experts_that_no_token_uses_change_no_bit(make_mixture, isa):
    for tokens in (1, 2, 5, 8):
        m = make_mixture((tokens,), 64, 48, (8, 8, 8), dtype=BF16)
        m.routing_weights.data[:, 1] = 0
        y = routed_lora(*m)
        with torch.no_grad():  # the expert is left out
            assert torch.equal(routed_lora(*m), y)


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


def test_hooks_on_saved_tensors_may_give_them_back_with_other_strides(make_mixture):
    m = make_mixture((2, 5), dtype=BF16)
    y = routed_lora(*m)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
        again = routed_lora(*m)
    grads = (torch.autograd.grad(t, m.leaves, torch.ones_like(t)) for t in (y, again))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


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
