"""`moelora.nn.routed_lora` on a GPU, by every way there is, against the loop over experts in float64."""

import threading
import time

import pytest
import torch
import torch.nn.functional as F

from moelora import _core
from moelora.nn import autograd, routed_lora, routed_lora_formula

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of compute capability 9.0",
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# tokens, d_in, d_out, ranks, dtype, adapters' dtype, base
CASES = {
    "1": (1, 4096, 4096, (16,) * 4, BF16, F32, "weight and bias"),
    "7": (7, 2056, 1032, (8,) * 8, F16, F16, "weight"),
    "16": (16, 2048, 520, (1, 4, 8, 12, 20), BF16, F32, "weight"),
    "33": (33, 1024, 14336, (40, 77), BF16, BF16, "weight and bias"),
    "64": (64, 72, 136, (4, 1), F16, F32, "weight and bias"),
    "65": ((5, 13), 520, 264, (20, 12), BF16, F32, "weight"),
    "100, wide": (100, 520, 9000, (16,) * 4, BF16, F32, "weight and bias"),
    "100, deep": (100, 8192, 520, (20, 12), F16, F16, "weight"),
    "128": (128, 1024, 2048, (16,) * 16, BF16, F32, "weight and bias"),
    "129": (129, 256, 4104, (16,) * 4, BF16, BF16, "weight and bias"),
    "130, narrow": (130, 8, 16, (3, 8), BF16, F32, "weight"),
    "200, many columns": (200, 264, 512, (77,) * 20, F16, F32, "weight"),
    "300": ((2, 150), 1024, 768, (16,) * 4, BF16, F32, "weight and bias"),
    "513": (513, 2048, 4096, (8,) * 3, F16, F16, "weight"),
    "1000": (1000, 2056, 3080, (4, 12, 20, 1), F16, F32, "weight and bias"),
    "600, 22 each": (600, 1032, 2048, (22,) * 40, BF16, F32, "weight"),
    "700, all kinds of ranks": (700, 1024, 1032, (20, 77, 8, 12, 64, 40, 30, 100, 130), F16, F16, "weight and bias"),
    "1024": (1024, 2048, 2048, (16,) * 4, BF16, F32, "weight and bias"),
    "1024, a tile for each": (1024, 2048, 2048, (32,) * 32, BF16, BF16, "weight"),
    "1930, two waves": (1930, 2056, 4104, (20, 12, 30), BF16, F32, "weight and bias"),
    "2048, 384 wide": (2048, 512, 384, (20,) * 2, BF16, F32, "weight"),
    "3 x 700": ((3, 700), 2048, 5632, (16,) * 4, F16, F16, "weight"),
    "4096": (4096, 1024, 1024, (32,) * 4, BF16, BF16, "weight"),
    "4099": (4099, 1032, 1024, (1, 4, 8, 12, 20, 40, 77), BF16, F32, "weight and bias"),
}


def make(make_layer, name, **changed):
    tokens, d_in, d_out, ranks, dtype, adapters, base = CASES[name]
    return make_layer(tokens, d_in, d_out, ranks, **{"dtype": dtype, "adapters": adapters, "base": base} | changed)


def names_of(layer):
    n = len(layer.lora_A)
    names = ["x", "w", *(f"A{e}" for e in range(n)), *(f"B{e}" for e in range(n))]
    return ["y"] + [name for name, t in zip(names, layer.leaves, strict=True) if t.is_floating_point()]


@hopper
@pytest.mark.parametrize("case", CASES)
def test_every_way_rounds_no_more_than_its_peer(make_layer, random_like, assert_as_exact, force_way, taken, case):
    """One product of cuBLAS for the ways that are one kernel's; stacked torch for the gradients, and for the others."""
    layer = make(make_layer, case)
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
    base = layer._replace(routing_weights=torch.zeros_like(layer.routing_weights)).in_double()
    plain = [F.linear(layer.x, **layer.base), grad_y @ layer.base["weight"]]
    rounding = [
        ((plain[0].double() - base.loop()).norm() / exact[0].norm()).item(),
        ((plain[1].double() - grad_y.double() @ base.base["weight"]).norm() / exact[1].norm()).item(),
    ]
    for name in ("torch", "addmm", "decode", "dual", "fused", "shared"):
        force_way(name)
        ways = layer.way(), layer.way(backward=True)
        if name not in ways:
            continue
        taken.clear()
        got = layer.gradients(routed_lora, grad_y)
        assert taken["cuda_call"] == 1
        assert taken["cuda_forward"] == (ways[0] != "torch")
        assert taken["cuda_backward"] == (ways[1] != "torch")
        for i, (what, a, b, peer) in enumerate(zip(names_of(layer), got, exact, stacked, strict=True)):
            assert a.dtype == peer.dtype
            limit = rounding[i] if i < 2 and ways[i] not in ("torch", "addmm") else peer
            assert_as_exact(a, b, limit, f"{what} by {ways}")


@hopper
def test_the_cases_take_every_way_in_both_directions(make_layer, force_way):
    for name in ("torch", "addmm", "decode", "dual", "fused", "shared"):
        force_way(name)
        layers = [make(make_layer, case) for case in CASES]
        assert any(layer.way() == name for layer in layers)
        assert any(layer.way(backward=True) == name for layer in layers) or name == "decode"


@pytest.mark.parametrize("base", ["nothing", "zeros", "base_output"])
@pytest.mark.parametrize("case", ["1", "16", "65", "300", "1000", "1024", "4096"])
def test_the_mixture_alone(make_layer, random_like, assert_as_exact, way, case, base):
    """Where no base hides its rounding."""
    layer = make(make_layer, case, base=base)
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
    for what, *results in zip(names_of(layer), layer.gradients(routed_lora, grad_y), exact, stacked, strict=True):
        assert_as_exact(*results, what)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("weights", ["static", "sequence", "token"])
@pytest.mark.parametrize("tokens", [(3, 17), (3, 171), (3, 700)], ids=str)
def test_weights_of_every_shape_and_dtype(make_layer, random_like, assert_as_exact, tokens, weights, dtype):
    layer = make_layer(tokens, 512, 2048, weights=weights, weights_dtype=dtype)
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
    got = layer.gradients(routed_lora, grad_y)
    for what, *results in zip(names_of(layer), got, exact, stacked, strict=True):
        assert_as_exact(*results, what)
    if dtype.is_floating_point:
        assert got[2].dtype == dtype


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("weights", ["static", "sequence", "token"])
def test_top_k(make_layer, random_like, assert_as_exact, way, weights, top_k):
    for tokens in ((2, 30), (2, 600)):
        layer = make_layer(tokens, 256, 1024, (8,) * 5, weights=weights, top_k=top_k)
        layer.routing_weights[..., 3] = layer.routing_weights[..., 1]  # ties go to the lower index
        grad_y = random_like(layer)
        exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
        got = layer.gradients(routed_lora, grad_y)
        for what, *results in zip(names_of(layer), got, exact, stacked, strict=True):
            assert_as_exact(*results, what)
        assert torch.equal(got[2] == 0, exact[2] == 0)


@pytest.mark.parametrize("tokens", [20, 600])
def test_exact_zeros_and_ones_choose_experts(make_layer, way, tokens):
    """Of the experts that no token uses, the gradients are zeros; the chosen one's are those of a layer of its own."""
    layer = make_layer(tokens, 256, 1024, (16, 4, 8))
    layer.routing_weights.copy_(torch.tensor([0.0, 1.0, 0.0]))
    alone = layer._replace(
        lora_A=layer.lora_A[1:2],
        lora_B=layer.lora_B[1:2],
        routing_weights=layer.routing_weights[:, 1:2].clone(),
        scaling=layer.scaling[1:2],
    )
    grad_y = torch.ones(tokens, 1024, device="cuda", dtype=BF16)
    y, _, _, a0, a1, a2, b0, b1, b2 = layer.gradients(routed_lora, grad_y)
    y1, _, _, a, b = alone.gradients(routed_lora, grad_y)
    torch.testing.assert_close(y, y1)
    torch.testing.assert_close(a1, a)
    torch.testing.assert_close(b1, b)
    assert not any(t.any() for t in (a0, a2, b0, b2))


@pytest.mark.parametrize("n", [1, 64, 96, 97])
@pytest.mark.parametrize("tokens", [5, 300])
def test_numbers_of_experts(make_layer, random_like, assert_as_exact, taken, n, tokens):
    layer = make_layer(tokens, 512, 4096, (1, 4, 8)[:n] * 33, top_k=None)
    keep = slice(n)
    layer = layer._replace(
        lora_A=layer.lora_A[keep],
        lora_B=layer.lora_B[keep],
        routing_weights=layer.routing_weights[:, keep],
        scaling=layer.scaling[keep],
    )
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
    for what, *results in zip(names_of(layer), layer.gradients(routed_lora, grad_y), exact, stacked, strict=True):
        assert_as_exact(*results, what)
    assert bool(taken["cuda_call"]) == (n <= 96)


@pytest.mark.parametrize("d_in, d_out", [(100, 256), (256, 100), (7, 5)])
def test_widths_that_are_no_multiples_of_8_take_the_formula(make_layer, random_like, taken, d_in, d_out):
    layer = make_layer((2, 9), d_in, d_out)
    grad_y = random_like(layer)
    got, stacked = layer.gradients(routed_lora, grad_y), layer.gradients(routed_lora_formula, grad_y)
    assert all(map(torch.equal, got, stacked))
    assert not any(taken.values())


# ---- values ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "w", "A", "B"])
@pytest.mark.parametrize("tokens", [20, 600])
def test_nan_and_inf_go_where_they_do_in_the_formula(make_layer, random_like, way, tokens, where, value):
    layer = make_layer(tokens, 256, 1024)
    place = {"x": layer.x[3], "w": layer.routing_weights[3], "A": layer.lora_A[1][0], "B": layer.lora_B[1][5]}[where]
    place[2] = value
    grad_y = random_like(layer)
    got, stacked = layer.gradients(routed_lora, grad_y), layer.gradients(routed_lora_formula, grad_y)
    for what, a, b in zip(names_of(layer), got, stacked, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), what


@pytest.mark.parametrize("tokens", [20, 600])
def test_an_expert_that_top_k_drops_may_be_broken(make_layer, random_like, way, tokens):
    layer = make_layer(tokens, 256, 1024, top_k=2)
    layer.routing_weights[:, 1] = 0.0
    layer.lora_A[1].fill_(float("nan"))
    y, _, grad_w, *grads = layer.gradients(routed_lora, random_like(layer))
    assert y.isfinite().all()
    assert grad_w.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_a_nan_weight_is_the_largest(make_layer):
    layer = make_layer(20, 256, 1024, top_k=1)
    layer.routing_weights[4, 2] = float("nan")
    assert layer.by(routed_lora).isnan().any(-1).nonzero().tolist() == [[4]]


def test_large_float16_hidden_values_do_not_overflow_where_they_are_mixed(make_layer, way):
    """H is 16 bits wide only where it is kept; s w H, which is added, is in range."""
    for tokens in (20, 600):
        layer = make_layer(tokens, 256, 1024, dtype=F16, base="zeros")
        layer.lora_A[0].mul_(60)
        layer.routing_weights.mul_(1e-2)
        exact = layer.in_double().loop()
        assert (layer.by(routed_lora).double() - exact).norm() < 2e-3 * exact.norm()


# ---- which gradients ----


@pytest.mark.parametrize("tokens", [20, 600])
@pytest.mark.parametrize("base", ["weight", "base_output"])
def test_gradients_come_only_where_needed(make_layer, random_like, assert_as_exact, way, tokens, base):
    layer = make_layer(tokens, 256, 1024, base=base)
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y)[1:], layer.gradients(routed_lora_formula, grad_y)[1:]
    subsets = [(i,) for i in range(8)] + [(0, 1), (2, 5), (1, 3, 7), (0, 4, 6)]
    for which in subsets:
        some = layer.requiring(*which)
        got = torch.autograd.grad(some.by(routed_lora), [some.leaves[i] for i in which], grad_y)
        for i, grad in zip(which, got, strict=True):
            assert_as_exact(grad, exact[i], stacked[i], f"{i} of {which}")


def test_a_base_output_gets_the_gradient_of_y(make_layer, random_like):
    layer = make_layer(300, 256, 1024, base="base_output")
    layer.base["base_output"].requires_grad_()
    before, grad_y = layer.base["base_output"].detach().clone(), random_like(layer)
    layer.by(routed_lora).backward(grad_y)
    assert torch.equal(layer.base["base_output"].grad, grad_y)
    assert torch.equal(layer.base["base_output"], before)


def test_gradients_accumulate_in_the_strides_of_their_parameters(make_layer, random_like, way):
    layer = make_layer((2, 300), 256, 1024, (16, 1, 7)).requiring()
    grad_y = random_like(layer)
    layer.by(routed_lora).backward(grad_y)
    once = [t.grad.clone() for t in layer.leaves]
    layer.by(routed_lora).backward(grad_y)
    for leaf, first in zip(layer.leaves, once, strict=True):
        assert leaf.grad.stride() == leaf.stride()
        torch.testing.assert_close(leaf.grad, 2 * first)


@pytest.mark.parametrize("changed", range(8))
@pytest.mark.parametrize("tokens", [20, 600])
def test_in_place_change_before_backward_raises(make_layer, tokens, changed):
    layer = make_layer(tokens).requiring()
    y = layer.by(routed_lora)
    with torch.no_grad():
        layer.leaves[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("tokens", [20, 600])
def test_double_backward_is_an_error(make_layer, tokens):
    layer = make_layer(tokens).requiring()
    y = layer.by(routed_lora)
    for leaf in layer.leaves:
        (grad,) = torch.autograd.grad((y.float() ** 2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once only"):
            torch.autograd.grad(grad.sum(), layer.x)


@pytest.mark.parametrize("tokens", [20, 600])
def test_the_gradient_of_a_sum_is_expanded_but_no_other(make_layer, taken, way, tokens):
    """The kernels get a copy, whether or not create_graph is given; only the second differentiation is refused."""
    layer = make_layer(tokens, 256, 1024).requiring()
    y = layer.by(routed_lora)
    taken.clear()
    wanted = torch.autograd.grad(y, layer.leaves, torch.ones_like(y), retain_graph=True)
    once = torch.autograd.grad(y.sum(), layer.leaves, create_graph=True)
    assert all(map(torch.equal, once, wanted))
    for grad in once:
        with pytest.raises(RuntimeError, match="differentiated once only"):
            torch.autograd.grad(grad.sum(), layer.x, retain_graph=True)
    y.sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(layer.leaves, wanted, strict=True))
    assert taken["cuda_backward"] + taken["cuda_mix_backward"] == 3


def test_batched_gradients(make_layer):
    layer = make_layer(40).requiring()
    y = layer.by(routed_lora)
    rows = torch.randn(3, *y.shape, device="cuda", dtype=y.dtype)
    batched = torch.autograd.grad(y, layer.leaves, rows, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        for grad, one in zip(batched, torch.autograd.grad(y, layer.leaves, rows[i], retain_graph=True), strict=True):
            torch.testing.assert_close(grad[i].float(), one.float(), rtol=2e-2, atol=2e-2 * one.float().abs().max())


def test_no_graph_where_nothing_requires_grad(make_layer, way):
    layer = make_layer(600)
    expected = layer.by(routed_lora)
    assert not expected.requires_grad
    with torch.no_grad():
        y = layer.requiring().by(routed_lora)
        assert not y.requires_grad
        assert torch.equal(y, expected)
    with torch.inference_mode():
        y = layer.requiring().by(routed_lora)
        assert y.is_inference()
        assert torch.equal(y, expected)


def test_autocast_casts_x_and_the_base(make_layer, random_like, assert_as_exact):
    layer = make_layer(300, dtype=F32)
    grad_y = random_like(layer).to(BF16)
    exact = layer.exact(grad_y)
    with torch.autocast("cuda", dtype=BF16):
        got, stacked = layer.gradients(routed_lora, grad_y), layer.gradients(routed_lora_formula, grad_y)
    assert got[0].dtype == BF16
    assert all(g.dtype == F32 for g in got[1:])
    for what, *results in zip(names_of(layer), got, exact, stacked, strict=True):
        assert_as_exact(*results, what)


# ---- memory ----


def strided(t):
    """The same values, every other element of a row of twice the width."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def padded(t):
    """The same values in rows that lie further apart."""
    wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 24, dtype=t.dtype, device=t.device)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def off(t):
    """The same values, one element off all alignment."""
    flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


VIEWS = {
    "strided": strided,
    "padded": padded,
    "off": off,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "negated": lambda t: torch._neg_view(-t),
    "imaginary": lambda t: torch.complex(torch.zeros_like(t.float()), -t.float()).conj().imag.to(t.dtype),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("tokens", [(2, 10), (2, 300)], ids=str)
def test_any_memory_gives_the_same(make_layer, random_like, assert_as_exact, way, tokens, view):
    layer, change = make_layer(tokens, 256, 1024, (16, 8), base="weight and bias"), VIEWS[view]
    grad_y = random_like(layer)
    exact = layer.exact(grad_y)
    wanted = [[layer.x], [layer.routing_weights], layer.lora_A, layer.lora_B, [*layer.base.values()], [grad_y]]
    for changed in wanted:
        swap = {id(t): change(t) for t in changed}
        new = [swap.get(id(t), t).detach().requires_grad_() for t in layer.leaves]
        base = {name: swap.get(id(t), t) for name, t in layer.base.items()}
        results = []
        for function in (routed_lora, routed_lora_formula):
            y = layer.replace(new)._replace(base=base).by(function)
            results.append([y.detach(), *torch.autograd.grad(y, new, swap.get(id(grad_y), grad_y))])
        got, stacked = results
        for what, *results in zip(names_of(layer), got, exact, stacked, strict=True):
            assert_as_exact(*results, f"{what}, changed {[tuple(t.shape) for t in changed]}")


@pytest.mark.parametrize("view", [strided, padded, off, lambda t: t[:1].expand(t.shape)])
@pytest.mark.parametrize("tokens", [20, 600])
def test_any_memory_gives_the_same_with_dropout(make_layer, random_like, tokens, view):
    layer = make_layer(tokens, 256, 1024)
    grad_y, results = random_like(layer), []
    for x in (view(layer.x), view(layer.x).contiguous().clone()):
        x.requires_grad_()
        torch.manual_seed(0)
        y = routed_lora(x, *layer[1:5], dropout_p=0.5, **layer.base)
        results.append([y.detach(), *torch.autograd.grad(y, x, grad_y)])
    assert all(map(torch.equal, *results))


def test_expanded_tensors(make_layer, random_like, way):
    """Rows that are the same memory."""
    for tokens in (20, 600):
        layer = make_layer(tokens, 256, 1024)
        expanded = layer._replace(
            x=layer.x[:1].expand(tokens, 256),
            routing_weights=layer.routing_weights[:1].expand(tokens, 3),
            base={"weight": layer.base["weight"][:1].expand(1024, 256)},
        )
        grad_y = random_like(layer)[:1].expand(tokens, 1024)
        leaves = [t.detach().requires_grad_() for t in expanded.leaves]
        dense = expanded._replace(base={"weight": expanded.base["weight"].contiguous()})
        y = expanded.replace(leaves).by(routed_lora)
        got = [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]
        for what, a, b in zip(names_of(layer), got, dense.exact(grad_y), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-2 * b.abs().max().item(), msg=what)


def test_a_weight_that_is_transposed(make_layer, random_like, assert_as_exact, taken, way):
    """As Conv1D's is: torch multiplies by it."""
    layer = make_layer(600, 256, 1024, base="weight and bias")
    layer = layer._replace(base=layer.base | {"weight": layer.base["weight"].t().contiguous().t()})
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
    taken.clear()
    for what, *results in zip(names_of(layer), layer.gradients(routed_lora, grad_y), exact, stacked, strict=True):
        assert_as_exact(*results, what)
    assert taken["cuda_call"] == 1
    assert taken["cuda_forward"] == taken["cuda_backward"] == (way != "torch")


@pytest.mark.parametrize("tokens", [(0,), (0, 4), (3, 0)], ids=str)
def test_no_tokens_give_an_empty_result_and_zero_gradients(make_layer, tokens):
    layer = make_layer(tokens).requiring()
    y = layer.by(routed_lora)
    assert y.shape == (*tokens, 384)
    for grad, leaf in zip(torch.autograd.grad(y.sum(), layer.leaves), layer.leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_four_axes(make_layer, random_like, assert_as_exact):
    layer = make_layer((2, 3, 50))
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
    for what, *results in zip(names_of(layer), layer.gradients(routed_lora, grad_y), exact, stacked, strict=True):
        assert_as_exact(*results, what)


@pytest.mark.parametrize("case", ["7", "16", "33", "200, many columns", "1000", "1024", "4099"])
def test_bits_are_the_same_in_every_run_whatever_memory_held(make_layer, random_like, way, fill, case):
    layer = make(make_layer, case)
    grad_y, results = random_like(layer), []
    for value in (-1, 0, -1):
        fill(value)
        results.append(layer.gradients(routed_lora, grad_y))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tokens", [20, 600])
def test_a_gpu_that_is_not_the_current_one(make_layer, way, tokens):
    here, there = make_layer(tokens), make_layer(tokens, device="cuda:1")
    there = there.replace([t.to("cuda:1") for t in here.leaves])
    there = there._replace(base={name: t.to("cuda:1") for name, t in here.base.items()})
    grad_y = torch.ones(tokens, 384, device="cuda", dtype=BF16)
    assert torch.cuda.current_device() == 0
    got = there.gradients(routed_lora, grad_y.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, here.gradients(routed_lora, grad_y), strict=True):
        assert a.device == torch.device("cuda:1")
        assert torch.equal(a.cpu(), b.cpu())


# ---- streams, graphs, threads ----


@pytest.mark.parametrize("tokens", [20, 600])
def test_a_captured_graph_replays_with_changed_inputs(make_layer, random_like, way, tokens):
    layer = make_layer(tokens, 256, 1024).requiring()
    grad_y = random_like(layer)

    def step():
        y = layer.by(routed_lora)
        return [y.detach(), *torch.autograd.grad(y, layer.leaves, grad_y)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for t in (*layer.leaves, grad_y, *layer.base.values()):
                t.normal_(std=0.1)
        graph.replay()
        assert all(map(torch.equal, captured, step()))


SOAK = {  # by the rule of a GPU of 132 multiprocessors
    "decode": (16, 1024, 2048, (16,) * 4),
    "addmm": (200, 1024, 2048, (16,) * 4),
    "fused": (1408, 512, 2816, (32,) * 4),
    "dual": (1408, 512, 3072, (32,) * 4),
    "shared": (1024, 1024, 2048, (16,) * 4),
}


def test_a_thread_that_has_not_used_the_gpu_yet(make_layer, random_like, way):
    layer = make_layer(600)
    grad_y = random_like(layer)
    expected, got = layer.by(routed_lora), []
    saved = layer.requiring()
    y = saved.by(routed_lora)
    threads = [threading.Thread(target=lambda: got.append(layer.by(routed_lora)))]
    # torch's own thread for backwards is such a one in a process whose first backward this is.
    threads.append(threading.Thread(target=lambda: y.backward(grad_y)))
    for thread in threads:
        thread.start()
        thread.join()
    assert torch.equal(got[0], expected)
    assert all(t.grad is not None for t in saved.leaves)


@hopper
def test_ten_thousand_calls_on_several_streams(make_layer, random_like):
    layers = [make_layer(*shape) for shape in SOAK.values()]
    assert {layer.way() for layer in layers} == set(SOAK) or torch.cuda.get_device_properties(
        0
    ).multi_processor_count != 132
    gradients = [random_like(layer) for layer in layers]
    expected = [layer.gradients(routed_lora, g) for layer, g in zip(layers, gradients, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for i in range(10_000):
        at, which = i % 4, (i // 4 + i) % len(layers)
        with torch.cuda.stream(streams[at]):
            if i % 16 < 4:
                got = layers[which].gradients(routed_lora, gradients[which])
            else:
                got = [layers[which].by(routed_lora)]
            for a, b in zip(got, expected[which], strict=False):
                wrong[at].logical_or_((a != b).any())
    torch.cuda.synchronize()
    assert not any(w.item() for w in wrong)


def test_many_threads_at_once_do_not_disturb_each_other(make_layer, random_like):
    layers = [make_layer(tokens, 512, 2048) for tokens in (5, 130, 700)]
    gradients = [random_like(layer) for layer in layers]
    expected = [layer.gradients(routed_lora, g) for layer, g in zip(layers, gradients, strict=True)]
    torch.cuda.synchronize()
    failures = []

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(40):
                which = (seed + i) % 3
                got = layers[which].gradients(routed_lora, gradients[which])
                if not all(map(torch.equal, got, expected[which])):
                    failures.append(which)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_adapters_can_be_left_as_they_are(make_layer, monkeypatch, taken):
    monkeypatch.setattr(autograd, "ROUND_ADAPTERS", False)
    layer = make_layer(300)
    exact = layer.in_double().loop()
    assert torch.equal(layer.by(routed_lora), layer.by(routed_lora_formula))
    assert (layer.by(routed_lora).double() - exact).norm() < 4e-3 * exact.norm()
    assert not any(taken.values())


# ---- the entries of the C side ----


def plain(make_layer, tokens=300):
    layer = make_layer(tokens)
    return layer, (layer.x, (*layer.lora_A, *layer.lora_B), layer.routing_weights, tuple(layer.scaling))


def test_what_is_not_plain_is_left_alone(make_layer):
    layer, (x, adapters, w, scaling) = plain(make_layer)
    weight = layer.base["weight"]
    call = {"x": x, "adapters": adapters, "w": w, "scaling": scaling, "weight": weight, "bias": None}
    for changes in (
        {"x": x.float()},
        {"x": x.cpu()},
        {"x": x[0]},
        {"x": x[:, :128]},
        {"x": x.half()},
        {"x": None},
        {"adapters": adapters[:4]},
        {"adapters": adapters[:5]},
        {"adapters": list(adapters)},
        {"adapters": (None,) * 6},
        {"adapters": (*adapters[:3], *adapters[:3])},
        {"w": w.double()},
        {"w": w[:-1]},
        {"w": w[:, :2]},
        {"w": w.cpu()},
        {"scaling": list(scaling)},
        {"scaling": scaling[:2]},
        {"scaling": (1.0, float("nan"), 1.0)},
        {"weight": weight.t()},
        {"weight": weight.float()},
        {"bias": weight[0]},
    ):
        assert _core.cuda_forward(*(call | changes).values(), None, 0, True) is None, changes
    assert _core.cuda_forward(*call.values(), None, 4, True) is None


def test_the_mix_takes_only_what_was_prepared(make_layer, random_like):
    layer, call = plain(make_layer)
    workspace, stacked_a, *_ = _core.cuda_prepare(*call, 0, False, None)
    hidden = call[0] @ stacked_a.t()
    assert _core.cuda_mix(*call, 0, hidden, None, workspace) is None
    wrong = [(hidden[:-1], workspace), (hidden.float(), workspace), (hidden.t(), workspace), (None, workspace)]
    wrong += [(hidden, workspace[:-1]), (hidden, workspace.float()), (hidden, None), (hidden.cpu(), workspace)]
    for given in wrong:
        with pytest.raises(ValueError, match="expected the tensors that cuda_prepare took and made"):
            _core.cuda_mix(*call, 0, given[0], None, given[1])
    call = (random_like(layer), *call[1:])
    workspace = _core.cuda_prepare(*call, 0, True, None)[0]
    for grad_w in (call[2][:-1].clone(), call[2].half(), call[2].t().contiguous().t(), 1):
        with pytest.raises(ValueError, match="expected the tensors that cuda_prepare took and made"):
            _core.cuda_mix_backward(*call, 0, hidden, grad_w, None, workspace)


def test_memory_does_not_grow(make_layer, random_like):
    layer = make_layer(300)
    grad_y = random_like(layer)
    for _ in range(2):
        layer.gradients(routed_lora, grad_y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        layer.gradients(routed_lora, grad_y)
        _core.cuda_forward(layer.x.float(), (), None, (), None, None, None, 0, False)
    deadline = time.monotonic() + 10  # autograd's own thread lets go of the last gradients when it gets to it
    while torch.cuda.memory_allocated() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() <= before
