"""Each token's top k experts alone, computed pair by pair, against the loop over experts in float64."""

import pytest
import torch
import torch.nn.functional as F

from moelora.nn import routed_lora, routed_lora_formula

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9.0",
    ),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# tokens, d_in, d_out, ranks, top_k, dtype, adapters' dtype, base
CASES = {
    "1": (1, 256, 384, (16,) * 9, 3, BF16, F32, "weight"),
    "7, rank 1": (7, 72, 136, (1,) * 12, 1, F16, F16, "weight and bias"),
    "65, narrow": (65, 8, 16, (3, 8, 16), 2, BF16, BF16, "weight"),
    "130, ragged": (130, 1032, 264, (4, 1, 12, 16, 7), 2, BF16, F32, "weight and bias"),
    "300, ranks of 32": ((2, 150), 520, 1032, (32, 20, 31, 8), 3, F16, F16, "weight"),
    "300, float32 ranks of 32": (300, 264, 776, (32, 20, 31, 8), 1, F16, F32, "weight"),
    "513, ranks of 64": (513, 776, 520, (64, 1, 40, 33, 64), 2, BF16, BF16, "weight and bias"),
    "513, float32 ranks of 64": (513, 264, 520, (64, 1, 40, 33, 64), 2, BF16, F32, "weight"),
    "1000 of 64": (1000, 2056, 1032, (16,) * 64, 2, BF16, BF16, "weight"),
    "2100 of 256": (2100, 512, 768, (16, 8) * 128, 8, BF16, F32, "weight and bias"),
    "4099": ((1, 4099), 1024, 2048, (16,) * 24, 4, F16, F16, "weight"),
    "20000, more pairs in a chunk than threads": (20000, 64, 128, (4,) * 12, 8, BF16, BF16, "weight"),
}


@pytest.fixture(params=CASES)
def layer(request, make_layer, force_way):
    tokens, d_in, d_out, ranks, top_k, dtype, adapters, base = CASES[request.param]
    force_way("grouped")
    return make_layer(tokens, d_in, d_out, ranks, top_k=top_k, dtype=dtype, adapters=adapters, base=base)


def names_of(layer):
    n = len(layer.lora_A)
    return ["y", "x", "w", *(f"A{e}" for e in range(n)), *(f"B{e}" for e in range(n))]


def assert_all(check, layer, got, exact, peer):
    """The adapters' gradients together, since the few numbers of one have a large part in luck."""
    n = len(layer.lora_A)
    for what, *results in zip(("y", "x", "w"), got, exact, peer, strict=False):
        check(*results, what)
    for what, part in (("A", slice(3, 3 + n)), ("B", slice(3 + n, None))):
        flat = [torch.cat([t.flatten() for t in of[part]]) for of in (got, exact, peer)]
        check(*flat, what)


def test_pairs_round_no_more_than_their_peer(layer, random_like, assert_as_exact, taken):
    grad_y = random_like(layer)
    got, exact = layer.gradients(routed_lora, grad_y), layer.exact(grad_y)
    assert taken["cuda_call"] == taken["cuda_forward"] == taken["cuda_backward"] == 1
    stacked = layer.gradients(routed_lora_formula, grad_y)
    base = layer.in_double()
    plain = F.linear(layer.x, **layer.base), grad_y @ layer.base["weight"]
    right = F.linear(base.x, **base.base), grad_y.double() @ base.base["weight"]
    for i, what in enumerate(("y", "x")):
        assert_as_exact(got[i], exact[i], ((plain[i].double() - right[i]).norm() / exact[i].norm()).item(), what)
    assert_all(assert_as_exact, layer, got, exact, stacked)
    for grad, leaf in zip(got[1:], layer.leaves, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
    assert not got[2][exact[2] == 0].any()  # of what is not among the top k; of those that are, one may cancel


def test_the_mixture_alone(layer, random_like, assert_as_exact):
    """Where no base hides its rounding."""
    zeros = layer._replace(base={"weight": torch.zeros_like(layer.base["weight"])})
    grad_y = random_like(layer)
    got, exact = zeros.gradients(routed_lora, grad_y), zeros.exact(grad_y)
    assert_all(assert_as_exact, zeros, got, exact, zeros.gradients(routed_lora_formula, grad_y))


def test_the_same_bits_in_any_memory_and_in_graphs(layer, random_like, fill):
    grad_y = random_like(layer)
    first = layer.gradients(routed_lora, grad_y)
    fill(0)
    second = layer.gradients(routed_lora, grad_y)
    assert all(map(torch.equal, first, second))
    leaves, stream = layer.requiring(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = leaves.by(routed_lora)
        captured = [y, *torch.autograd.grad(y, leaves.leaves, grad_y)]
    for _ in range(2):
        fill(-1)
        graph.replay()
        assert all(map(torch.equal, captured, first))


@pytest.mark.parametrize("forward, backward", [("grouped", "dual"), ("dual", "grouped"), ("grouped", "torch")])
def test_a_backward_takes_what_another_way_has_kept(
    make_layer, random_like, assert_as_exact, force_way, forward, backward
):
    layer = make_layer(300, 256, 1024, (16, 4, 12, 8, 1), top_k=2)
    grad_y, leaves = random_like(layer), layer.requiring()
    force_way(forward)
    y = leaves.by(routed_lora)
    force_way(backward)
    got = [y.detach(), *torch.autograd.grad(y, leaves.leaves, grad_y)]
    assert_all(assert_as_exact, layer, got, layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y))


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_may_have_all_tokens(make_layer, random_like, assert_as_exact, force_way, top_k):
    """And others none, whose gradients are zeros."""
    force_way("grouped")
    layer = make_layer(1000, 256, 1024, (16,) * 10, top_k=top_k)
    layer.routing_weights[:, 7] = 2.0
    layer.routing_weights[:, :5] = -1.0
    grad_y = random_like(layer)
    got = layer.gradients(routed_lora, grad_y)
    assert_all(assert_as_exact, layer, got, layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y))
    assert not any(got[3 + e].any() or got[13 + e].any() for e in range(5))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_ties_go_to_the_lower_index(make_layer, random_like, force_way, dtype):
    layer = make_layer(700, 256, 1024, (8,) * 100, top_k=3, weights_dtype=dtype)
    layer.routing_weights.copy_((layer.routing_weights * 4).round() - 2)  # five values, zeros of both signs
    layer.routing_weights[5].fill_(float("-inf"))
    layer.routing_weights[6, 40:].fill_(float("nan"))
    grad_y = random_like(layer)
    one = layer.requiring(1)
    (grad_w,) = torch.autograd.grad(one.by(routed_lora), one.leaves[1], grad_y)
    places = layer.routing_weights.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    rows = [t for t in range(700) if t not in (5, 6)]
    assert torch.equal((grad_w != 0)[rows], (places < 3)[rows])
    assert (grad_w[5] != 0).nonzero().flatten().tolist() == [0, 1, 2]
    assert (grad_w[6] != 0).nonzero().flatten().tolist() == [40, 41, 42]


@pytest.mark.parametrize("where", ["x", "w", "A", "B"])
def test_nan_goes_where_it_does_in_the_formula(make_layer, random_like, force_way, where):
    force_way("grouped")
    layer = make_layer(600, 256, 1024, (16, 4, 8, 8), top_k=2)
    place = {"x": layer.x[3], "w": layer.routing_weights[3], "A": layer.lora_A[1][0], "B": layer.lora_B[1][5]}[where]
    place[2] = float("nan")
    grad_y = random_like(layer)
    got, stacked = layer.gradients(routed_lora, grad_y), layer.gradients(routed_lora_formula, grad_y)
    for what, a, b in zip(names_of(layer), got, stacked, strict=True):
        nan = a.isnan()
        assert torch.equal(nan, b.isnan()) or not (nan & ~b.isnan()).any(), what
    assert got[0].isnan().any()


def test_gradients_come_only_where_needed(make_layer, random_like, assert_as_exact, force_way):
    force_way("grouped")
    layer = make_layer(600, 256, 1024, (16, 4, 8, 8), top_k=2)
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y)[1:], layer.gradients(routed_lora_formula, grad_y)[1:]
    for which in [(i,) for i in range(10)] + [(0, 1), (2, 6), (1, 3, 8), (0, 4, 7)]:
        some = layer.requiring(*which)
        got = torch.autograd.grad(some.by(routed_lora), [some.leaves[i] for i in which], grad_y)
        for i, grad in zip(which, got, strict=True):
            assert_as_exact(grad, exact[i], stacked[i], f"{i} of {which}")


@pytest.mark.parametrize("n, ranks, top_k", [(97, 8, 2), (256, 16, 4), (257, 8, 2), (256, 16, None), (128, 72, 2)])
def test_what_only_pairs_can_be_computed_of(make_layer, random_like, assert_as_exact, taken, n, ranks, top_k):
    """More experts or columns than all tokens can have; gradients of some leaves alone, too."""
    layer = make_layer(200, 264, 520, (ranks,) * n, top_k=top_k)
    grad_y = random_like(layer)
    exact, stacked = layer.exact(grad_y), layer.gradients(routed_lora_formula, grad_y)
    taken.clear()
    assert_all(assert_as_exact, layer, layer.gradients(routed_lora, grad_y), exact, stacked)
    grouped = n <= 256 and ranks <= 64 and top_k is not None
    assert taken["cuda_forward"] == taken["cuda_backward"] == grouped
    some = layer.requiring(1, 2, 3 + n)
    got = torch.autograd.grad(some.by(routed_lora), [some.leaves[i] for i in (1, 2, 3 + n)], grad_y)
    for i, grad in zip((2, 3, 4 + n), got, strict=True):
        assert_as_exact(grad, exact[i], stacked[i], str(i))
    layer.base.clear()
    assert_as_exact(layer.by(routed_lora), layer.in_double().loop(), layer.by(routed_lora_formula), "without a base")


@pytest.mark.parametrize("unusual", ["expanded", "not aligned"])
def test_rows_that_only_pairs_could_take_but_not_read(make_layer, unusual):
    layer = make_layer(200, 264, 520, (8,) * 97, top_k=2)
    x = layer.x.detach()
    x = x[:1].expand(200, 264) if unusual == "expanded" else F.pad(x, (4, 0))[:, 4:]
    got = layer._replace(x=x).by(routed_lora)
    expected = layer._replace(x=x.contiguous()).by(routed_lora_formula)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2 * expected.abs().max().item())
