"""nn.route: the C core under autograd on CPU, the formula everywhere else, and that both agree."""

import copy

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moelora import _core, functional
from moelora.nn import route
from moelora.nn.route import _formula

MASK = torch.tensor([[True, True, False], [True, False, True]])


class Subclass(torch.Tensor):
    """Nothing may take its pointer; torch operations work."""


def random_logits(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def formula(logits, mask=None, top_k=None, temperature=1.0, renormalize=True):
    return _formula(logits, mask, top_k, temperature, renormalize)


@pytest.fixture
def no_core(monkeypatch):
    """It is an error if the C core computes anything; it may look at tensors and decline."""

    def declining(entry):
        def call(*arguments):
            assert entry(*arguments) is None, "the C core was called"

        return call

    for name in ("route_tensors", "route_backward_tensors"):
        monkeypatch.setattr(_core, name, declining(getattr(_core, name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (0, 3), (1, 1), (4, 300), (2, 3, 8), (2, 0, 4)])
@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("renormalize", [True, False])
def test_core_and_formula_agree_forward_and_backward(dtype, shape, top_k, renormalize):
    top_k = None if top_k is None else min(top_k, shape[-1])
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.7
    results = []
    for tensor_type in (torch.Tensor, Subclass):  # a subclass takes the formula
        leaf = random_logits(*shape, dtype=dtype).requires_grad_()
        logits = leaf.as_subclass(tensor_type)
        r = route(logits, top_k=top_k, temperature=1.3, renormalize=renormalize, mask=mask)
        r = [t if t is None else t.as_subclass(torch.Tensor) for t in r]
        loss = (r[0] * random_logits(*shape, seed=2)).sum() + (r[3] * random_logits(shape[-1], seed=3)).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        results.append((*r, grad))
    (weights, indices, counts, prob_sums, grad), expected = results
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    assert weights.dtype == prob_sums.dtype == compute
    assert counts.dtype == torch.int64
    assert grad.dtype == dtype
    assert indices is None if top_k is None else indices.shape == (*shape[:-1], top_k)
    eps = torch.finfo(compute).eps
    for got, want in zip((weights, prob_sums), (expected[0], expected[3]), strict=True):
        torch.testing.assert_close(got, want, rtol=30 * eps, atol=30 * eps)
    torch.testing.assert_close(grad, expected[4], rtol=0.01 if dtype.itemsize == 2 else 0, atol=100 * eps)
    assert counts.equal(expected[2])
    assert indices is None or indices.equal(expected[1])


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("function", [route, formula])
def test_gradcheck(function, top_k, renormalize):
    logits = random_logits(2, 3, 4).requires_grad_()

    def outputs(logits):
        r = function(logits, top_k=top_k, temperature=0.6, renormalize=renormalize, mask=MASK)
        return r.weights, r.prob_sums

    assert torch.autograd.gradcheck(outputs, logits, check_batched_grad=True)


def test_each_output_alone_has_the_right_gradient():
    for pick in ("weights", "prob_sums"):
        grads = []
        for function in (route, formula):
            logits = random_logits(2, 3, 4).requires_grad_()
            getattr(function(logits, top_k=2, mask=MASK), pick).square().sum().backward()
            grads.append(logits.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("function", [route, formula])
def test_ties_go_to_the_lower_index_and_padding_leaves_the_sums(function):
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    r = function(logits, top_k=2, mask=torch.tensor([True, True, False]))
    assert r.indices.tolist() == [[1, 2], [0, 1], [0, 1]]
    torch.testing.assert_close(r.weights[:2], torch.tensor([[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]]))
    assert r.counts.tolist() == [1, 2, 1, 0]
    torch.testing.assert_close(r.prob_sums, torch.softmax(logits[:2], -1).sum(0))


@pytest.mark.parametrize("function", [route, formula])
@pytest.mark.parametrize("temperature", [1e-60, 1e-30, 1.0, 1e30, 1e60])
def test_no_temperature_makes_large_logits_overflow(function, temperature):
    large = torch.finfo(torch.float32).max
    logits = torch.tensor([[1e30, -1e30, 0], [large, -large, large], [-torch.inf, 1, 1]], requires_grad=True)
    routing = function(logits, top_k=2, temperature=temperature)
    if temperature <= 1:
        expected = torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
        torch.testing.assert_close(routing.weights.detach(), expected, rtol=0, atol=0)
    assert routing.weights.isfinite().all() and routing.prob_sums.isfinite().all()


@pytest.mark.parametrize("function", [route, formula])
def test_nan_stays_in_its_row(function):
    logits = torch.tensor([[0.0, torch.nan, 1.0], [1.0, 0.0, 2.0], [-torch.inf, 0.0, 0.0]])
    r = function(logits, top_k=2)
    assert r.indices.tolist() == [[0, 1], [2, 0], [1, 2]]
    assert r.weights[0, :2].isnan().all()
    assert r.weights[0, 2] == 0
    assert r.weights[1:].isfinite().all()


@pytest.mark.parametrize(
    "change", [lambda t: t.mT.contiguous().mT, lambda t: t.flip(1), lambda t: t[:1].expand(4, 3, 5)]
)
def test_layouts_do_not_matter(change):
    logits = change(random_logits(4, 3, 5)).requires_grad_()
    plain = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    upstream = random_logits(*logits.shape[::-1], seed=1).permute(2, 1, 0)
    grads = []
    for t in (logits, plain):
        r = route(t, top_k=2)
        r.weights.backward(upstream)
        grads.append((r.weights.detach(), t.grad))
    assert grads[0][0].equal(grads[1][0])
    assert grads[0][1].equal(grads[1][1])


@pytest.mark.parametrize("kind", [torch.Tensor, Subclass])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_core_and_formula_pick_the_larger_of_nearly_equal_logits(kind, dtype):
    logits = torch.ones(20, 6, dtype=dtype)
    logits[:, 4] += torch.finfo(dtype).eps
    r = route(logits.as_subclass(kind), top_k=2, temperature=100.0)
    assert r.indices.as_subclass(torch.Tensor).equal(torch.tensor([[4, 0]]).expand(20, 2))


def test_core_and_formula_pick_the_same_experts_of_rounded_logits():
    logits = random_logits(500, 33, dtype=torch.bfloat16)  # many ties
    for top_k in (1, 4, 12):
        core, torch_operations = (route(t, top_k=top_k).indices for t in (logits, logits.as_subclass(Subclass)))
        assert core.equal(torch_operations.as_subclass(torch.Tensor))


def test_weights_of_all_experts_are_the_probabilities():
    for dtype in (torch.float32, torch.float64):
        logits = random_logits(40, 9, dtype=dtype)
        assert route(logits, top_k=9).weights.equal(route(logits).weights)


@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 1, 6), (1, 7, 6), (3, 5, 2, 6), (0, 6), (2, 0, 6), (6,)])
def test_leading_axes_are_kept(shape):
    logits, mask = random_logits(*shape), torch.ones(shape[:-1], dtype=torch.bool)
    r, flat = route(logits, top_k=2, mask=mask), route(logits.reshape(-1, 6), top_k=2)
    for got, want, width in ((r.weights, flat.weights, 6), (r.indices, flat.indices, 2)):
        assert got.shape == (*shape[:-1], width)
        assert got.reshape(-1, width).equal(want)
    assert r.counts.equal(flat.counts)
    assert r.prob_sums.equal(flat.prob_sums)


def test_strides_of_the_mask_do_not_matter():
    logits = random_logits(4, 6, 5)
    dense = random_logits(4, 6, seed=1) > 0
    want = route(logits, mask=dense)
    for mask in (dense.t().contiguous().t(), dense.flip(0).flip(0), dense.repeat_interleave(2, 1)[:, ::2]):
        got = route(logits, mask=mask)
        assert got.counts.equal(want.counts)
        assert got.prob_sums.equal(want.prob_sums)
    shared = route(logits, mask=dense[:, :1].expand(4, 6))
    assert shared.counts.equal(route(logits, mask=dense[:, :1].expand(4, 6).contiguous()).counts)


def test_a_lazily_negated_tensor_is_read_as_what_it_stands_for():
    logits = torch.imag(torch.complex(random_logits(3, 4), random_logits(3, 4, seed=1)).conj())
    assert logits.is_neg()
    assert route(logits, top_k=2).weights.equal(route(logits.clone().resolve_neg(), top_k=2).weights)
    weights = route(random_logits(3, 4).requires_grad_(), top_k=2).weights
    (grad,) = torch.autograd.grad(weights, weights.grad_fn.next_functions[0][0].variable, logits)
    assert grad.isfinite().all()


def test_more_axes_than_the_core_looks_at_take_the_formula():
    shape = (*(1,) * 16, 3, 4)
    logits = random_logits(*shape).requires_grad_()
    r = route(logits, top_k=2)
    assert r.weights.shape == shape
    torch.testing.assert_close(r.weights.reshape(3, 4), route(logits.reshape(3, 4), top_k=2).weights)


def test_a_default_device_does_not_move_the_results():
    logits = random_logits(3, 4)
    with torch.device("meta"):
        r = route(logits, top_k=2)
    assert {t.device.type for t in r} == {"cpu"}
    assert r.weights.equal(route(logits, top_k=2).weights)


@pytest.mark.parametrize("top_k", [None, 2])
def test_bits_do_not_depend_on_the_number_of_threads(top_k):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            logits = random_logits(3000, 16, dtype=torch.float32).requires_grad_()
            r = route(logits, top_k=top_k)
            (grad,) = torch.autograd.grad((r.weights**2).sum() + r.prob_sums.square().sum(), logits)
            results.append((r.weights, r.counts, r.prob_sums, grad))
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5, 16, 35])
def test_gradients_from_kept_weights_are_those_from_logits(isa, tokens, dtype):
    for n in (1, 3, 8, 15, 16, 17, 32, 33, 64, 257):
        logits = random_logits(tokens, n, dtype=dtype).requires_grad_()
        mask = torch.rand(tokens) < 0.7
        routing = route(logits, temperature=1.3, mask=mask)
        grads = random_logits(tokens, n, dtype=dtype), random_logits(n, dtype=dtype)
        for sums in (None, grads[1]):
            outputs = [routing.weights] if sums is None else [routing.weights, routing.prob_sums]
            (got,) = torch.autograd.grad(outputs, logits, grads[: len(outputs)], retain_graph=True)
            want = functional.route_backward(
                grads[0].numpy(),
                logits.detach().numpy(),
                None,
                grad_prob_sums=None if sums is None else sums.numpy(),
                temperature=1.3,
                mask=mask.numpy(),
            )
            torch.testing.assert_close(got, torch.from_numpy(want), rtol=0, atol=50 * torch.finfo(dtype).eps)


def test_results_can_be_changed_in_place_and_saved():
    for logits in (random_logits(2, 3), random_logits(2, 3).requires_grad_()):
        r = route(logits, top_k=1)
        assert copy.deepcopy(r.counts).equal(r.counts)
        before = r.weights.detach().clone()
        assert r.weights.mul(2).equal(before * 2)
        with torch.no_grad():
            assert r.weights.mul_(2).equal(before * 2)


def test_integers_serve_as_mask():
    logits = random_logits(2, 3, 4)
    assert route(logits, mask=MASK.long()).counts.equal(route(logits, mask=MASK).counts)


def test_the_core_is_what_runs_on_cpu(no_core):
    with pytest.raises(AssertionError, match="C core"):
        route(random_logits(2, 3))


def test_the_core_is_what_runs_backward_on_cpu(request):
    weights = route(random_logits(2, 3).requires_grad_()).weights
    request.getfixturevalue("no_core")
    with pytest.raises(AssertionError, match="C core"):
        weights.sum().backward()


def test_results_of_the_core_own_their_memory():
    logits = random_logits(2, 3)
    r = route(logits, top_k=1)
    before = copy.deepcopy(r)
    logits.zero_()
    for got, want in zip(r, before, strict=True):
        assert got.equal(want)


@pytest.mark.parametrize("tensor_type", [torch.Tensor, Subclass])
@pytest.mark.parametrize("pick", ["weights", "prob_sums"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_double_backward_is_a_clear_error(tensor_type, pick, top_k):
    logits = random_logits(2, 3).requires_grad_()
    routing = route(logits.as_subclass(tensor_type), top_k=top_k)
    (grad,) = torch.autograd.grad(getattr(routing, pick).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
    # Also where the gradient from above is a constant and only the logits are left to differentiate by.
    (grad,) = torch.autograd.grad(
        getattr(route(logits.as_subclass(tensor_type), top_k=top_k), pick)[..., 0].sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(("top_k", "kept"), [(2, "logits"), (None, "weights")])
def test_what_is_kept_must_not_change_before_the_backward_and_nothing_else_matters(top_k, kept):
    logits = random_logits(2, 3).requires_grad_()
    for changed in ("logits", "weights"):
        inner = logits * 1
        weights = route(inner, top_k=top_k).weights
        total = (weights * torch.arange(3.0, dtype=weights.dtype)).sum()
        with torch.no_grad():
            (inner if changed == "logits" else weights).mul_(2)
        if changed == kept:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()
        else:
            (grad,) = torch.autograd.grad(total, logits)
            again = route(logits, top_k=top_k).weights
            (want,) = torch.autograd.grad((again * torch.arange(3.0, dtype=weights.dtype)).sum(), logits)
            assert grad.equal(want)


def test_no_graph_is_kept_where_none_is_wanted():
    logits = random_logits(2, 3).requires_grad_()
    with torch.no_grad():
        assert not route(logits).weights.requires_grad
    with torch.inference_mode():
        assert route(logits).weights.shape == (2, 3)
    routing = route(logits, top_k=1)
    assert routing.weights.requires_grad
    assert not routing.counts.requires_grad
    assert not routing.indices.requires_grad


# Where a pointer means nothing


def test_meta_and_fake_tensors_give_shapes(no_core):
    r = route(torch.empty(2, 3, 4, device="meta"), top_k=2)
    assert [t.shape for t in r] == [(2, 3, 4), (2, 3, 2), (4,), (4,)]
    with FakeTensorMode():
        r = route(torch.empty(2, 3, 4), top_k=2, mask=torch.ones(2, 3, dtype=torch.bool))
        assert [t.shape for t in r] == [(2, 3, 4), (2, 3, 2), (4,), (4,)]


def test_vmap_maps_over_batches(no_core):
    logits = random_logits(5, 3, 4)
    got = torch.func.vmap(lambda t: route(t, top_k=2))(logits)
    expected = [formula(t, top_k=2) for t in logits]
    for i, t in enumerate(got):
        torch.testing.assert_close(t, torch.stack([e[i] for e in expected]))


def test_functional_gradients_agree(no_core):
    logits, factor = random_logits(5, 3, 4), random_logits(3, 4, seed=1)

    def loss(t):
        return (route(t, top_k=2).weights * factor).sum()

    got = torch.func.vmap(torch.func.grad(loss))(logits)
    leaf = logits.clone().requires_grad_()
    (formula(leaf, top_k=2).weights * factor).sum().backward()
    torch.testing.assert_close(got, leaf.grad)


def test_forward_mode_gives_the_directional_derivative(no_core):
    logits, direction = random_logits(3, 4), random_logits(3, 4, seed=1)
    _, got = torch.func.jvp(lambda t: route(t, top_k=2).weights, (logits,), (direction,))
    step = 1e-6
    up, down = (formula(logits + s * direction, top_k=2).weights for s in (step, -step))
    torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_make_fx_traces_operations(no_core):
    graph = make_fx(lambda t: route(t, top_k=2).weights)(random_logits(3, 4))
    logits = random_logits(3, 4, seed=1)
    torch.testing.assert_close(graph(logits), formula(logits, top_k=2).weights)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("top_k", [None, 2])
def test_jit_trace(top_k):
    logits = random_logits(3, 4).requires_grad_()
    traced = torch.jit.trace(lambda t: route(t, top_k=top_k).weights, (logits,))
    torch.testing.assert_close(traced(logits[:2] + 1), route(logits[:2] + 1, top_k=top_k).weights)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_has_no_break_and_the_same_gradients(backend):
    compiled = torch.compile(
        lambda t, m: route(t, top_k=2, temperature=0.7, mask=m), backend=backend, fullgraph=True, dynamic=True
    )
    for batch in (2, 5):
        grads = []
        for function in (compiled, lambda t, m: route(t, top_k=2, temperature=0.7, mask=m)):
            logits = random_logits(batch, 3, 4).requires_grad_()
            r = function(logits, torch.ones(batch, 3, dtype=torch.bool))
            ((r.weights**2).sum() + r.prob_sums.square().sum()).backward()
            grads.append((r.weights.detach(), r.counts, r.prob_sums.detach(), logits.grad))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


def test_export_holds_operations_alone():
    class Route(torch.nn.Module):
        def forward(self, logits):
            return route(logits, top_k=2).weights

    logits = random_logits(3, 4)
    program = torch.export.export(Route(), (logits,))
    torch.testing.assert_close(program.module()(logits), route(logits, top_k=2).weights)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": np.ones((2, 3))}, TypeError, "logits"),
        ({"logits": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "logits"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits"),
        ({"logits": torch.ones(2, 0)}, ValueError, "logits"),
        ({"logits": torch.ones(2, 3).to_sparse()}, TypeError, "logits must be a dense tensor"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 4}, ValueError, "top_k"),
        ({"top_k": 1.0}, TypeError, "top_k"),
        ({"top_k": True}, TypeError, "top_k"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"mask": torch.ones(2)}, TypeError, "mask"),
        ({"mask": [True, True]}, TypeError, "mask"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask"),
        ({"mask": torch.ones(2, dtype=torch.bool, device="meta")}, ValueError, "mask"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes, error, message):
    arguments = {"logits": torch.ones(2, 3)} | changes
    with pytest.raises(error, match=message):
        route(arguments.pop("logits"), **arguments)
