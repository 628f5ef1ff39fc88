"""Dropout in the kernels of a GPU: masks against those of the CPU, results against float64 with these masks."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelora import _core
from moelora.nn import routed_lora
from moelora.nn.dropout import draw_seed, dropped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8,
        reason="needs a GPU of capability 8.0",
    ),
]

SHAPES = [  # tokens, d_in, d_out, ranks, probabilities
    ((8, 9), 8, 8, [1], 0.5),
    (1, 64, 128, [8, 8], 0.1),
    (130, 264, 72, [4, 12, 20, 1], (0.1, 0.5, 0.25, 0.9)),
    ((3, 333), 1032, 520, [16] * 4, 0.1),
    (1024, 2048, 2304, [16] * 4, 0.1),
    (517, 520, 1032, [8] * 9, 0.3),
    (300, 384, 256, [64, 5, 33], (0.5, 0.0, 1.0)),
]


@pytest.fixture(autouse=True, params=[None, "torch"])
def way(request, force_way):
    """As on this GPU, and as on those that Hopper's kernels don't run on."""
    force_way(request.param)
    return request.param


def entries(way):
    """Those that compute a layer with a weight, forward and backward."""
    hopper = torch.cuda.get_device_capability()[0] == 9 and way != "torch"
    return ["cuda_forward", "cuda_backward"] if hopper else ["cuda_mix", "cuda_drop_backward"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The names of the entries of the core that took dropout."""
    ran = []

    def noting(name, entry, place):
        def call(*arguments):
            result = entry(*arguments)
            if arguments[place] is not None and (result is not None or name in ("cuda_mix", "cuda_drop_backward")):
                ran.append(name)
            return result

        return call

    for name, place in (("cuda_forward", 6), ("cuda_mix", 6), ("cuda_backward", 5), ("cuda_drop_backward", 9)):
        monkeypatch.setattr(_core, name, noting(name, getattr(_core, name), place))
    return ran


def layer(tokens, d_in, d_out, ranks, dtype=torch.bfloat16, adapter_dtype=torch.float32):
    """x, A, B, routing weights, W and bias."""
    tokens = (tokens,) if isinstance(tokens, int) else tokens
    torch.manual_seed(1)

    def leaf(*shape, scale=1.0, dtype=adapter_dtype):
        return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()

    x = leaf(*tokens, d_in, dtype=dtype)
    lora_A = [leaf(r, d_in, scale=d_in**-0.5) for r in ranks]
    lora_B = [leaf(d_out, r, scale=r**-0.5) for r in ranks]
    w = torch.rand(*tokens, len(ranks), device="cuda").requires_grad_()
    weight, bias = leaf(d_out, d_in, scale=d_in**-0.5, dtype=dtype), leaf(d_out, dtype=dtype)
    return x, lora_A, lora_B, w, weight.detach(), bias.detach()


def in_float64(x, lora_A, lora_B, w, weight, bias, p, seed, grad_y):
    """y and the gradients of x, w, A and B, with the masks that the CPU draws."""
    n = len(lora_A)
    p = (p,) * n if isinstance(p, float) else p
    leaves = [t.detach().double().requires_grad_() for t in (x, w, *lora_A, *lora_B)]
    wide, w, lora_A, lora_B = leaves[0], leaves[1], leaves[2 : 2 + n], leaves[2 + n :]
    y = 0 if weight is None else wide @ weight.double().t() + bias.double()
    for e in range(n):
        mask = dropped(torch.ones(x.shape, dtype=torch.float64), seed, e, p[e]).cuda()
        y = y + 1.5 * w[..., e : e + 1] * (wide * mask @ lora_A[e].t()) @ lora_B[e].t()
    return y.detach(), torch.autograd.grad(y, leaves, grad_y.double())


def error(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def with_seed(number=7):
    """Sets torch's generator so that the next call draws the seed that is returned."""
    torch.manual_seed(number)
    seed = int(draw_seed())
    torch.manual_seed(number)
    return seed


@pytest.mark.parametrize("way", ["torch", "dual"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_are_those_of_the_cpu(kernels, dtype, way):
    """Identities for A and B, and ones or an identity for the gradient of y, make all results the masks themselves."""
    d, p = 328, (0.5, 0.1, 0.9)
    eye = torch.eye(d, device="cuda", dtype=dtype)
    for e in range(3):
        x = torch.ones(d, d, device="cuda", dtype=dtype, requires_grad=True)
        lora_A = [eye.clone().requires_grad_() for _ in p]
        w = torch.nn.functional.one_hot(torch.tensor(e), 3).float().cuda()
        seed = with_seed()
        y = routed_lora(x, lora_A, [eye] * 3, w, 1.0, weight=torch.zeros_like(eye), dropout_p=p)
        grad_x, *grads_A = torch.autograd.grad(y, [x, *lora_A], eye)
        mask = dropped(torch.ones(d, d, dtype=torch.float64), seed, e, p[e]).cuda().to(dtype)
        assert torch.equal(y, mask)
        assert torch.equal(grad_x, mask * eye)
        assert torch.equal(grads_A[e], mask)
        with_seed()
        y = routed_lora(x, [torch.ones_like(eye[:1])] * 3, [eye[:, :1].contiguous()] * 3, w, 1.0, dropout_p=p)
        assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], mask)
    forward, backward = entries(way)
    assert set(kernels) == {forward, backward}


@pytest.mark.parametrize("way", [None, "dual", "torch"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_with_these_masks(kernels, shape, way):
    *sizes, p = shape
    x, lora_A, lora_B, w, weight, bias = layer(*sizes)
    grad_y = torch.randn(*x.shape[:-1], weight.shape[0], device="cuda", dtype=x.dtype)
    seed = with_seed()
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=p)
    grads = torch.autograd.grad(y, [x, w, *lora_A, *lora_B], grad_y)
    y64, grads64 = in_float64(x, lora_A, lora_B, w, weight, bias, p, seed, grad_y)
    assert error(y, y64) < 2**-8
    for ours, theirs in zip(grads, grads64, strict=True):
        assert error(ours, theirs) < 2**-7
    assert kernels[-1] == entries(way)[1] and len(kernels) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [False, True])
def test_without_a_weight_the_mixture_alone(kernels, dtype, narrow, way):
    x, lora_A, lora_B, w, *_ = layer((2, 100), 520, 264, [16, 8, 3], dtype, dtype if narrow else torch.float32)
    base = torch.randn(2, 100, 264, device="cuda", dtype=dtype, requires_grad=True)
    grad_y = torch.randn_like(base)
    seed = with_seed()
    y = routed_lora(x, lora_A, lora_B, w, 1.5, base_output=base, dropout_p=0.25)
    *grads, grad_base = torch.autograd.grad(y, [x, w, *lora_A, *lora_B, base], grad_y)
    y64, grads64 = in_float64(x, lora_A, lora_B, w, None, None, 0.25, seed, grad_y)
    assert error(y, y64 + base.detach().double()) < 2**-8
    for ours, theirs in zip(grads, grads64, strict=True):
        assert error(ours, theirs) < 2**-7
    assert torch.equal(grad_base, grad_y)
    assert kernels == entries(way)


def test_a_weight_that_is_stored_transposed():
    x, lora_A, lora_B, w, weight, _ = layer(200, 264, 136, [16, 4])
    results = []
    for stored in (weight, weight.t().contiguous().t()):
        with_seed()
        y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=stored, dropout_p=0.25)
        results.append(torch.autograd.grad(y, [x, w, *lora_A], torch.ones_like(y)))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs.double()) < 2**-7


def test_rows_apart_and_gradients_that_are_expanded(kernels, way):
    """x is a part of a wider tensor; the gradient of a sum has no memory of its own."""
    x, lora_A, lora_B, w, weight, bias = layer(200, 264, 136, [16, 4])
    wider = torch.zeros(200, 400, device="cuda", dtype=x.dtype)
    wider[:, 8:272] = x.detach()
    part = wider[:, 8:272].requires_grad_()
    with_seed()
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.25)
    expected = torch.autograd.grad(y, [x, w, *lora_A, *lora_B], torch.ones_like(y))
    with_seed()
    z = routed_lora(part, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.25)
    assert torch.equal(y, z)
    got = torch.autograd.grad(z.sum(), [part, w, *lora_A, *lora_B])
    assert all(map(torch.equal, got, expected))
    assert kernels.count(entries(way)[1]) == 2


def test_what_needs_no_gradient_gets_none(kernels, way):
    """Of x, the routing weights and the experts' A and B one at a time."""
    leaves = layer(300, 264, 136, [16, 4])
    x, lora_A, lora_B, w, weight, bias = leaves
    groups = {"x": [x], "w": [w], "A": lora_A, "B": lora_B}

    def gradients(of):
        for name, tensors in groups.items():
            for t in tensors:
                t.requires_grad_(name in of)
        with_seed()
        y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.25)
        return torch.autograd.grad(y, [t for name in of for t in groups[name]], torch.ones_like(y))

    together = iter(gradients(list(groups)))
    for name in groups:
        for alone in gradients([name]):
            assert error(alone, next(together).double()) < 1e-6
    assert kernels.count(entries(way)[1]) == 5


def test_all_dropped_is_the_base():
    x, lora_A, lora_B, w, weight, bias = layer(150, 264, 136, [16, 4])
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=1.0)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    grad_x, grad_w, *grads = torch.autograd.grad(y, [x, w, *lora_A, *lora_B], torch.ones_like(y))
    assert torch.equal(grad_x, torch.ones_like(y) @ weight)
    assert not any(t.any() for t in (grad_w, *grads))


def test_top_k_and_static_weights():
    x, lora_A, lora_B, _, weight, bias = layer(150, 264, 136, [16, 4, 8])
    w = torch.tensor([0.2, 0.5, 0.3], device="cuda", requires_grad=True)
    kept = torch.tensor([0.0, 0.5, 0.3], device="cuda", requires_grad=True)
    grad_y = torch.randn(150, 136, device="cuda", dtype=x.dtype)
    seed = with_seed()
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, top_k=2, dropout_p=0.25)
    grad_w = torch.autograd.grad(y, w, grad_y)[0]
    y64, (_, grad_w64, *_) = in_float64(x, lora_A, lora_B, kept, weight, bias, 0.25, seed, grad_y)
    assert error(y, y64) < 2**-8
    assert error(grad_w[1:], grad_w64[1:]) < 2**-7
    assert grad_w[0] == 0


def test_frozen_experts_get_no_gradient():
    x, lora_A, lora_B, w, weight, bias = layer(400, 264, 136, [16, 4, 8])
    results = []
    for frozen in (False, True):
        for t in (lora_A[1], lora_B[1]):
            t.requires_grad_(not frozen)
        with_seed()
        y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.25)
        results.append(torch.autograd.grad(y, [lora_A[0], lora_A[2], lora_B[0], lora_B[2]], torch.ones_like(y)))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs.double()) < 1e-6


def test_backward_inside_autocast():
    x, lora_A, lora_B, w, weight, bias = layer(200, 264, 136, [16, 4])
    leaves = [x, w, *lora_A, *lora_B]
    with_seed()
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.25)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cuda", dtype=torch.float16):
        got = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is b.dtype
        assert error(a, b.double()) < 2**-7


def test_same_seed_same_bits_other_seed_others():
    x, lora_A, lora_B, w, weight, bias = layer(1000, 1032, 520, [16] * 4)

    def run(number):
        with_seed(number)
        y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.1)
        return y, *torch.autograd.grad(y, [x, w, *lora_A, *lora_B], torch.ones_like(y))

    first, again, other = run(7), run(7), run(8)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_draws_the_same_masks(use_reentrant):
    x, lora_A, lora_B, w, weight, bias = layer(300, 520, 264, [16] * 4)

    def forward(x):
        return routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.1)

    results = []
    for run in (forward, lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)):
        with_seed()
        leaf = x.detach().requires_grad_()
        y = run(leaf)
        y.backward(torch.ones_like(y))
        results.append([y, leaf.grad, *(t.grad for t in (w, *lora_A, *lora_B))])
        for t in (w, *lora_A, *lora_B):
            t.grad = None
    assert all(map(torch.equal, *results))


def test_only_the_narrow_side_is_kept():
    x, lora_A, lora_B, w, weight, bias = layer(1024, 2048, 2304, [16] * 4)
    routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.1)  # compiles
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.1)
    assert torch.cuda.memory_stats()["requested_bytes.all.current"] - before == 2 * 1024 * (2304 + 64)
    y.backward(torch.ones_like(y))


def test_no_mask_is_ever_in_memory():
    """Forward and backward together need less than one byte for each token, expert and column."""
    tokens, d, n = 4096, 2048, 8
    x, lora_A, lora_B, w, weight, bias = layer(tokens, d, 256, [8] * n)

    def run():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.1)
        torch.autograd.grad(y, [x, w, *lora_A, *lora_B], torch.ones_like(y))
        return torch.cuda.max_memory_allocated() - before

    run()
    assert run() < tokens * d * n


def test_batched_gradients_meet_the_same_masks():
    x, lora_A, lora_B, w, weight, bias = layer(40, 136, 72, [8, 4])
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.5)
    leaves, grads_y = [x, w, *lora_A, *lora_B], torch.randn(3, *y.shape, device="cuda", dtype=y.dtype)
    batched = torch.autograd.grad(y, leaves, grads_y, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in grads_y]
    for ours, theirs in zip(batched, zip(*each, strict=True), strict=True):
        assert error(ours, torch.stack(theirs).double()) < 2**-6


@pytest.mark.parametrize("way", [None], indirect=True)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 2**-5)], ids=str)
def test_transforms_differentiate_the_masks_of_the_forward(dtype, limit):
    """Without a base y is linear in x: its derivative along x is y, that of its squares' sum is twice that sum."""
    x, lora_A, lora_B, w, *_ = layer(12, 136, 72, [8, 4], dtype)
    x = x.detach()

    def y_of(x):
        return routed_lora(x, lora_A, lora_B, w, 1.5, dropout_p=0.5)

    slope, squares = torch.func.grad_and_value(lambda x: y_of(x).float().square().sum())(x)
    assert error((slope.double() * x.double()).sum(), 2 * squares.double()) < limit
    y, along_x = torch.func.jvp(y_of, (x,), (x,))
    assert error(along_x, y.double()) < limit
    jacobian, y = torch.func.jacrev(lambda x: (y_of(x),) * 2, has_aux=True)(x)
    assert error((jacobian.double() * x.double()).sum((-2, -1)), y.double()) < limit


@pytest.mark.parametrize("way", [None], indirect=True)
def test_vmap_over_a_backward_meets_the_masks_of_the_forward():
    x, lora_A, lora_B, w, *_ = layer(40, 136, 72, [8, 4], torch.float32)
    y = routed_lora(x, lora_A, lora_B, w, 1.5, dropout_p=0.5)
    leaves, grads_y = [x, w, *lora_A, *lora_B], torch.randn(3, *y.shape, device="cuda")
    batched = torch.vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(grads_y)
    each = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in grads_y]
    for ours, theirs in zip(batched, zip(*each, strict=True), strict=True):
        assert error(ours, torch.stack(theirs).double()) < 1e-5


def test_a_captured_graph_takes_other_masks_each_time(kernels):
    x, lora_A, lora_B, w, weight, bias = layer(64, 136, 72, [8, 4])
    with torch.no_grad():
        routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=0.5)
    assert len(kernels) == 1
    results = []
    for _ in range(2):
        graph.replay()
        results.append(y.clone())
    assert not torch.equal(*results)


def test_a_probability_that_rounds_to_none():
    x, lora_A, lora_B, w, weight, bias = layer(64, 136, 72, [8, 4])
    with torch.no_grad():
        y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias, dropout_p=1e-9)
        z = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, bias=bias)
    assert error(y, z.double()) < 2**-8
