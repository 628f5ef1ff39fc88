"""nn.route on a GPU: the kernels against the formula in float64 on the CPU."""

import pytest
import torch

from moelora import _core
from moelora.nn import route
from moelora.nn.route import _formula

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EXPERTS = [1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 64, 100, 129, 255, 256]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often the kernels ran, of each kind."""
    count = {"cuda_route": 0, "cuda_route_backward": 0}

    def counting(name, entry):
        def call(*arguments):
            result = entry(*arguments)
            count[name] += result is not None
            return result

        return call

    for name in count:
        monkeypatch.setattr(_core, name, counting(name, getattr(_core, name)))
    return count


def random_logits(*shape, dtype=torch.float32, seed=0):
    on_cpu = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (2 * on_cpu).to(dtype).cuda()


def random_mask(*shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.7).cuda()


def compare(logits, top_k, renormalize=True, mask=None, temperature=1.3, gradients="both"):
    """Outputs and the gradient of the logits against those of the formula in float64."""
    real = torch.float64 if logits.dtype is torch.float64 else torch.float32
    eps = torch.finfo(real).eps
    logits = logits.detach().requires_grad_()
    got = route(logits, top_k=top_k, temperature=temperature, renormalize=renormalize, mask=mask)
    exact = logits.detach().cpu().double().requires_grad_()
    want = _formula(exact, None if mask is None else mask.cpu(), top_k, temperature, renormalize)

    assert got.weights.dtype == got.prob_sums.dtype == real
    assert got.counts.dtype == torch.int64
    assert got.counts.cpu().equal(want.counts)
    assert got.indices is None if top_k is None else got.indices.cpu().equal(want.indices)
    close = {"equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(got.weights.cpu(), want.weights, rtol=60 * eps, atol=4 * eps, **close)
    torch.testing.assert_close(got.prob_sums.cpu(), want.prob_sums, rtol=60 * eps, atol=4 * eps, **close)

    upstream = random_logits(*logits.shape, dtype=real, seed=2), random_logits(logits.shape[-1], dtype=real, seed=3)
    chosen = {"both": (0, 1), "weights": (0,), "prob_sums": (1,)}[gradients]
    grads = []
    for routing, leaf in ((got, logits), (want, exact)):
        outputs = [(routing.weights, routing.prob_sums)[i] for i in chosen]
        grads += torch.autograd.grad(outputs, leaf, [upstream[i].to(outputs[0]) for i in chosen])
    assert grads[0].dtype == logits.dtype
    narrow = logits.dtype.itemsize == 2
    torch.testing.assert_close(
        grads[0].cpu(), grads[1], rtol=torch.finfo(logits.dtype).eps if narrow else 0, atol=200 * eps, **close
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", EXPERTS)
def test_outputs_and_gradients_are_those_of_the_formula(calls, dtype, n):
    for top_k in {None, 1, min(2, n), min(8, n), n // 2 or None, n}:
        for renormalize in (True, False):
            for mask in (None, random_mask(70)):
                compare(random_logits(70, n, dtype=dtype), top_k, renormalize, mask)
    assert calls["cuda_route"] == calls["cuda_route_backward"] > 0


@pytest.mark.parametrize("gradients", ["weights", "prob_sums"])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_output_alone_has_the_right_gradient(calls, dtype, top_k, gradients):
    compare(random_logits(9, 11, dtype=dtype), top_k, mask=random_mask(9), gradients=gradients)
    assert calls["cuda_route_backward"] == 1


@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 100_000])
@pytest.mark.parametrize("n", [1, 4, 7, 64, 256])
def test_any_number_of_tokens(tokens, n):
    for top_k in (None, min(n, 2)):
        compare(random_logits(tokens, n), top_k, mask=random_mask(tokens))


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 0.05, 50.0, 1e300])
def test_any_temperature(temperature):
    logits = random_logits(20, 9)
    r = route(logits, top_k=2, temperature=temperature)
    assert r.indices.cpu().equal(logits.cpu().argsort(dim=-1, descending=True, stable=True)[:, :2])
    want = torch.softmax(logits.cpu().double() / temperature, -1).gather(-1, r.indices.cpu())
    torch.testing.assert_close(
        r.weights.cpu().gather(-1, r.indices.cpu()), (want / want.sum(-1, keepdim=True)).float(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 8, 40, 200])
def test_ties_go_to_the_lower_index(dtype, n):
    logits = random_logits(200, n, dtype=dtype).round()
    logits[0] = 0.0
    logits[1] = -0.0
    logits[1, 1::2] = 0.0
    for top_k in (1, 2, n // 2, n):
        compare(logits, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [6, 70])
def test_the_larger_of_nearly_equal_logits_is_picked(dtype, n):
    logits = torch.ones(20, n, dtype=dtype, device="cuda")
    logits[:, n - 2] += torch.finfo(dtype).eps
    assert route(logits, top_k=2, temperature=100.0).indices.tolist() == [[n - 2, 0]] * 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 8, 70])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_bad_row_stays_alone_and_picks_its_first_experts(dtype, n, top_k):
    logits = random_logits(8, n, dtype=dtype)
    logits[0, n - 1] = torch.nan
    logits[1, 1] = torch.inf
    logits[2] = -torch.inf
    logits[3] = torch.nan
    logits[4, 0] = -torch.inf  # a good row
    r = route(logits, top_k=top_k, mask=torch.arange(8, device="cuda") >= 4)
    want = _formula(logits.cpu().double(), torch.arange(8) >= 4, top_k, 1.0, True)
    torch.testing.assert_close(r.weights.cpu(), want.weights, equal_nan=True, check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.prob_sums.cpu(), want.prob_sums, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert r.counts.cpu().equal(want.counts)
    assert top_k is None or r.indices.cpu().equal(want.indices)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.mT.contiguous().mT,
        lambda t: t[..., :1],
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: t[:, ::2],
        lambda t: t[:1].expand(4, 6, 5),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_do_not_matter(change, dtype):
    logits = change(random_logits(4, 6, 5, dtype=dtype))
    mask = random_mask(*logits.shape[:2][::-1]).t()
    top_k = min(2, logits.shape[-1])
    compare(logits, top_k, mask=mask)
    strided, dense = (route(t, top_k=top_k, mask=mask) for t in (logits, logits.contiguous()))
    assert all(a.equal(b) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradients_of_any_layout_are_read(calls, top_k):
    logits = random_logits(12, 5).requires_grad_()
    for grad in (torch.ones((), device="cuda").expand(12, 5), random_logits(5, 12).t()):
        r = route(logits, top_k=top_k)
        sums = torch.ones((), device="cuda").expand(5)
        (got,) = torch.autograd.grad([r.weights, r.prob_sums], logits, [grad, sums])
        again = route(logits, top_k=top_k)
        (want,) = torch.autograd.grad([again.weights, again.prob_sums], logits, [grad.contiguous(), sums.contiguous()])
        assert got.equal(want)
    assert calls["cuda_route_backward"] == 4


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (3, 5, 2, 6), (2, 0, 6)])
def test_leading_axes_are_kept(shape):
    compare(random_logits(*shape), 2, mask=random_mask(*shape[:-1]))


@pytest.mark.parametrize("n", [8, 24, 256])
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_same_input_gives_the_same_bits(n, top_k):
    logits, mask = random_logits(30_000, n).requires_grad_(), random_mask(30_000)
    results = []
    for _ in range(5):
        r = route(logits, top_k=top_k, mask=mask)
        (grad,) = torch.autograd.grad(r.weights.square().sum() + r.prob_sums.square().sum(), logits)
        results.append([t for t in (*r, grad) if t is not None])
    for again in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], again, strict=True))


def test_every_element_is_written():
    """Outputs come from memory that others have filled."""
    logits = random_logits(5000, 40).requires_grad_()
    want = route(logits, top_k=3)
    (grad,) = torch.autograd.grad(want.weights.square().sum(), logits)
    want = [t.detach().clone() for t in (*want, grad)]
    torch.cuda.synchronize()
    for _ in range(3):
        poison = [torch.full((5000 * 40 * 2,), torch.nan, device="cuda") for _ in range(6)]
        poison += [torch.full((40,), -1, device="cuda") for _ in range(20)]
        del poison
        r = route(logits, top_k=3)
        (grad,) = torch.autograd.grad(r.weights.square().sum(), logits)
        assert all(a.equal(b) for a, b in zip((*r, grad), want, strict=True))


@pytest.mark.parametrize("tokens", [16, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_replays(dtype, tokens):
    logits = random_logits(tokens, 24, dtype=dtype).requires_grad_()

    def step():
        r = route(logits, top_k=2)
        (grad,) = torch.autograd.grad([r.weights, r.prob_sums], logits, [r.weights.detach(), r.prob_sums.detach()])
        return [t.detach() for t in (*r, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for seed in (1, 2, 3):
        with torch.no_grad():
            logits.copy_(random_logits(tokens, 24, dtype=dtype, seed=seed))
        for t in captured:
            t.fill_(-3)
        graph.replay()
        torch.cuda.synchronize()
        assert all(a.equal(b) for a, b in zip(captured, step(), strict=True))


def test_two_streams_at_once():
    inputs = [random_logits(40_000, 64, seed=s) for s in (0, 1)]
    want = [route(t, top_k=4) for t in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((i, route(inputs[i], top_k=4)))
    torch.cuda.synchronize()
    for i, got in results:
        assert all(a.equal(b) for a, b in zip(got, want[i], strict=True))


def test_what_kernels_do_not_take_goes_to_the_formula(calls):
    compare(random_logits(4, 257), 2)
    logits = random_logits(3, 4, dtype=torch.bfloat16).requires_grad_()
    r = route(logits, top_k=2)
    batch = random_logits(5, 3, 4)
    (got,) = torch.autograd.grad(r.weights, logits, batch, is_grads_batched=True, retain_graph=True)
    assert calls == {"cuda_route": 1, "cuda_route_backward": 0}
    for upstream, grad in zip(batch, got, strict=True):
        (want,) = torch.autograd.grad(r.weights, logits, upstream, retain_graph=True)
        torch.testing.assert_close(grad.to(want.dtype), want, rtol=0.01, atol=1e-6)


def test_integers_serve_as_mask(calls):
    logits, mask = random_logits(6, 4), random_mask(6)
    assert route(logits, mask=mask.long()).counts.equal(route(logits, mask=mask).counts)
    assert calls["cuda_route"] == 2


@pytest.mark.parametrize("top_k", [None, 2])
def test_double_backward_is_a_clear_error(top_k):
    logits = random_logits(2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(route(logits, top_k=top_k).weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(("top_k", "kept"), [(2, "logits"), (None, "weights")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_must_not_change_before_the_backward(dtype, top_k, kept):
    inner = random_logits(2, 3, dtype=dtype).requires_grad_() * 1
    weights = route(inner, top_k=top_k).weights
    total = (weights * 2).sum()
    with torch.no_grad():
        (inner if kept == "logits" else weights).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_vmap_and_compile_take_the_formula(calls):
    logits = random_logits(5, 3, 4)
    batched = torch.func.vmap(lambda t: route(t, top_k=2).weights)(logits)
    compiled = torch.compile(lambda t: route(t, top_k=2).weights, backend="eager", fullgraph=True)(logits)
    assert calls["cuda_route"] == 0
    want = route(logits, top_k=2).weights
    torch.testing.assert_close(batched, want)
    torch.testing.assert_close(compiled, want)
