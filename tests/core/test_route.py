"""route and route_backward on NumPy arrays: every instruction set against the twin, closed forms and differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora import functional, reference


def logits_of(rng, tokens, n, dtype=np.float64):
    """Half of them on a coarse grid, so that there are ties."""
    logits = rng.standard_normal((*tokens, n)) * 2
    coarse = rng.random(tokens) < 0.5
    logits[coarse] = np.round(logits[coarse])
    return logits.astype(dtype)


def check_routing(logits, **options):
    """The core decides what the twin decides, and rounds as well as its dtype allows."""
    got, exact = functional.route(logits, **options), reference.route(logits.astype(np.float64), **options)
    assert [None if a is None else a.shape for a in got] == [None if a is None else a.shape for a in exact]
    assert got.weights.dtype == got.prob_sums.dtype == logits.dtype
    np.testing.assert_array_equal(got.indices, exact.indices)
    np.testing.assert_array_equal(got.counts, exact.counts)
    n = logits.shape[-1]
    # The difference of two logits is rounded before it becomes an exponent; sums over experts are rounded a few times,
    # or often, but then in float64.
    distance = (logits.max(-1, keepdims=True) - logits.astype(np.float64)) / options.get("temperature", 1.0)
    allowed = np.finfo(logits.dtype).eps * (6 + distance + n / 100) + np.finfo(np.float64).eps * n
    smallest = np.finfo(logits.dtype).tiny
    assert (np.abs(got.weights - exact.weights) <= exact.weights * allowed + smallest).all()
    p = reference.route(logits.astype(np.float64), temperature=options.get("temperature", 1.0)).weights
    spread = (p * allowed).reshape(-1, n).sum(0) + logits.size * smallest
    rounding = 2 * np.finfo(logits.dtype).eps + np.finfo(np.float64).eps * logits.size
    assert (np.abs(got.prob_sums - exact.prob_sums) <= spread + rounding * exact.prob_sums).all()


def check_gradient(rng, logits, **options):
    """The core's gradient is the twin's, given the twin's indices."""
    indices = reference.route(logits, top_k=options.pop("top_k"), **options).indices
    grad_weights = rng.standard_normal(logits.shape).astype(logits.dtype)
    for grad_prob_sums in (None, rng.standard_normal(logits.shape[-1]).astype(logits.dtype)):
        arguments = (grad_weights, logits, indices)
        got = functional.route_backward(*arguments, grad_prob_sums=grad_prob_sums, **options)
        exact = reference.route_backward(*arguments, grad_prob_sums=grad_prob_sums, **options)
        assert got.shape == exact.shape
        assert got.dtype == exact.dtype
        scale = np.abs(grad_weights).max(initial=1) / options.get("temperature", 1.0)
        np.testing.assert_allclose(got, exact, rtol=0, atol=100 * scale * np.finfo(logits.dtype).eps)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17, 300])
@pytest.mark.parametrize("tokens", [(0,), (1,), (7,), (2, 3), (3, 0), (2, 2, 2), ()])
@pytest.mark.parametrize("renormalize", [True, False])
def test_every_size_and_top_k_gives_what_the_twin_gives(tokens, n, renormalize, dtype):
    rng = np.random.default_rng(n)
    logits, mask = logits_of(rng, tokens, n, dtype), rng.random(tokens) < 0.7
    for top_k in (None, *(k for k in (1, 2, 3, n // 2, n - 1, n) if 1 <= k <= n)):
        for options in ({}, {"mask": np.asarray(mask), "temperature": 0.7}):
            check_routing(logits, top_k=top_k, renormalize=renormalize, **options)
            check_gradient(rng, logits, top_k=top_k, renormalize=renormalize, **options)


# Below, at and above whole vectors of every instruction set, and what fills many of them.
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 256, 257)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 5, 15, 16, 17, 35])
def test_every_instruction_set_gives_what_the_twin_gives(isa, n_tokens, dtype):
    rng = np.random.default_rng(n_tokens)
    for n in WIDTHS:
        logits, mask = logits_of(rng, (n_tokens,), n, dtype), rng.random(n_tokens) < 0.7
        for top_k in (None, *sorted({k for k in (1, 2, 3, 8, 9, n) if k <= n})):
            check_routing(logits, top_k=top_k, mask=mask, temperature=1.3)
            check_gradient(rng, logits, top_k=top_k, mask=mask, temperature=1.3)


@pytest.mark.parametrize("n", [5, 20, 300])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_token_has_the_same_bits_wherever_it_stands(isa, n, top_k, dtype):
    rng = np.random.default_rng(n)
    logits, grad_weights = (logits_of(rng, (101,), n, dtype) for _ in range(2))
    order = rng.permutation(101)
    routing, moved = functional.route(logits, top_k=top_k), functional.route(logits[order], top_k=top_k)
    np.testing.assert_array_equal(moved.weights, routing.weights[order])
    indices = None
    if top_k:
        np.testing.assert_array_equal(moved.indices, routing.indices[order])
        indices = routing.indices
    grad = functional.route_backward(grad_weights, logits, indices)
    np.testing.assert_array_equal(
        functional.route_backward(grad_weights[order], logits[order], moved.indices), grad[order]
    )


@pytest.mark.parametrize("n", [4, 20, 300])
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_experts_are_picked_by_logits_even_where_probabilities_are_equal(module, n_tokens, n, dtype):
    logits = np.ones((n_tokens, n), dtype)
    best = np.arange(n_tokens) * 7 % n
    logits[np.arange(n_tokens), best] = np.nextafter(dtype(1), dtype(2))
    indices = module.route(logits, top_k=3, temperature=100.0).indices
    rest = [[e for e in range(n) if e != b][:2] for b in best]
    np.testing.assert_array_equal(indices, np.column_stack([best, rest]))


def test_float32_and_float64_logits_of_equal_value_pick_the_same_experts(isa):
    logits = np.random.default_rng(7).standard_normal((300, 40)).astype(np.float32)
    for top_k in (1, 2, 5, 8, 20, 40):
        np.testing.assert_array_equal(
            functional.route(logits, top_k=top_k, temperature=50.0).indices,
            functional.route(logits.astype(np.float64), top_k=top_k, temperature=0.01).indices,
        )


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NaN around the elements of a mask
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_layout_gives_what_the_twin_gives(layout, top_k, dtype):
    rng = np.random.default_rng(0)
    logits, grad_weights = (logits_of(rng, (3, 4), 5, dtype) for _ in range(2))
    mask = rng.random((3, 4)) < 0.6
    sums = logits_of(rng, (), 5, dtype)
    options = {"mask": layout(mask), "temperature": 1.5}
    check_routing(layout(logits), top_k=top_k, **options)
    indices = reference.route(layout(logits), top_k=top_k, **options).indices
    arguments = [layout(grad_weights), layout(logits), None if indices is None else layout(indices)]
    got, exact = (
        module.route_backward(*arguments, grad_prob_sums=layout(sums), **options) for module in (functional, reference)
    )
    np.testing.assert_allclose(got, exact, rtol=0, atol=200 * np.finfo(dtype).eps)


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    n=st.integers(1, 60),
    top_k=st.none() | st.integers(1, 60),
    temperature=st.floats(0.05, 20),
    renormalize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_what_the_twin_gives(tokens, n, top_k, temperature, renormalize, seed):
    rng = np.random.default_rng(seed)
    options = {
        "top_k": None if top_k is None else min(top_k, n),
        "temperature": temperature,
        "renormalize": renormalize,
        "mask": rng.random(tokens) < 0.8,
    }
    logits = logits_of(rng, tokens, n)
    check_routing(logits, **options)
    check_gradient(rng, logits, **options)


@pytest.mark.parametrize("top_k", [None, 1, 2, 5])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_equal_central_differences(module, top_k, renormalize):
    rng = np.random.default_rng(1)
    logits, mask = rng.standard_normal((4, 5)), np.array([True, False, True, True])
    grad_weights, grad_sums = rng.standard_normal((4, 5)), rng.standard_normal(5)
    options = {"temperature": 1.7, "renormalize": renormalize, "mask": mask}

    def loss(logits):
        routing = module.route(logits, top_k=top_k, **options)
        return (routing.weights * grad_weights).sum() + (routing.prob_sums * grad_sums).sum()

    indices = module.route(logits, top_k=top_k, **options).indices
    got = module.route_backward(grad_weights, logits, indices, grad_prob_sums=grad_sums, **options)
    step = 1e-5
    for at in np.ndindex(logits.shape):
        nudge = np.zeros_like(logits)
        nudge[at] = step
        assert got[at] == pytest.approx((loss(logits + nudge) - loss(logits - nudge)) / (2 * step), abs=1e-8)


def test_logarithms_of_shares_give_the_shares(module, dtype):
    shares = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], dtype)
    routing = module.route(np.log(shares), top_k=2)
    np.testing.assert_array_equal(routing.indices, [[3, 2], [0, 1]])
    np.testing.assert_allclose(routing.weights, [[0, 0, 3 / 7, 4 / 7], [4 / 7, 3 / 7, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(routing.counts, [1, 1, 1, 1])
    np.testing.assert_allclose(routing.prob_sums, [0.5] * 4, rtol=1e-6)
    np.testing.assert_allclose(module.route(np.log(shares)).weights, shares, rtol=1e-6)
    kept = module.route(np.log(shares), top_k=2, renormalize=False).weights
    np.testing.assert_allclose(kept, [[0, 0, 0.3, 0.4], [0.4, 0.3, 0, 0]], rtol=1e-6)


def test_temperature_divides_the_logits(module):
    logits = np.random.default_rng(0).standard_normal((3, 4))
    warm = module.route(logits, temperature=2.5).weights
    np.testing.assert_allclose(warm, module.route(logits / 2.5).weights, rtol=1e-14)


@pytest.mark.parametrize("n", [2, 5, 8, 300])
def test_ties_go_to_the_lower_index(module, n, dtype):
    for k in range(1, min(n, 12) + 1):
        routing = module.route(np.zeros((2, n), dtype), top_k=k)
        np.testing.assert_array_equal(routing.indices, [list(range(k))] * 2)
        np.testing.assert_allclose(routing.weights[:, :k], 1 / k, rtol=20 * np.finfo(dtype).eps)
        assert not routing.weights[:, k:].any()
    assert module.route(np.array([[1, 3, 0, 3, 3]], dtype), top_k=2).indices.tolist() == [[1, 3]]


def test_the_largest_expert_alone_has_weight_one_and_no_gradient(module, dtype):
    logits = logits_of(np.random.default_rng(3), (50,), 7, dtype)
    routing = module.route(logits, top_k=1)
    np.testing.assert_array_equal(routing.weights, np.eye(7, dtype=dtype)[logits.argmax(-1)])
    grad = module.route_backward(np.ones_like(logits), logits, routing.indices)
    np.testing.assert_array_equal(grad, np.zeros_like(logits))


def test_padding_is_left_out_of_the_sums_alone(module, dtype):
    logits = logits_of(np.random.default_rng(4), (6,), 3, dtype)
    mask = np.array([True, False, True, True, False, False])
    all_tokens, unmasked = module.route(logits, top_k=2), module.route(logits, top_k=2, mask=mask)
    np.testing.assert_array_equal(unmasked.weights, all_tokens.weights)
    np.testing.assert_array_equal(unmasked.indices, all_tokens.indices)
    rest = module.route(logits[mask], top_k=2)
    np.testing.assert_array_equal(unmasked.counts, rest.counts)
    np.testing.assert_allclose(unmasked.prob_sums, rest.prob_sums, rtol=1e-6)
    nothing = module.route(logits, mask=np.zeros(6, bool))
    assert not nothing.counts.any()
    assert not nothing.prob_sums.any()


def test_a_mask_and_indices_of_other_types_are_read_as_arrays(module):
    rng = np.random.default_rng(5)
    logits = logits_of(rng, (2, 3), 4, np.float64)
    mask = np.pad([True, False, True, True, True, False], (0, 64))[:6].reshape(2, 3)
    plain = module.route(logits, top_k=2, mask=mask)
    # As [T] a matrix would have two axes again.
    routing = module.route(logits, top_k=2, mask=mask.view(np.matrix))
    np.testing.assert_array_equal(routing.counts, plain.counts)
    np.testing.assert_array_equal(routing.prob_sums, plain.prob_sums)
    np.testing.assert_array_equal(
        module.route_backward(logits, logits, plain.indices.astype(np.longlong)),
        module.route_backward(logits, logits, plain.indices),
    )


def test_extreme_logits_neither_overflow_nor_lose_a_token(module, dtype):
    large = np.finfo(dtype).max
    logits = np.array([[1e30, -1e30, 0], [large, -large, large], [-np.inf, 0, 0], [-1e30, -1e30, -1e30]], dtype)
    expected = np.array([[1, 0, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [1 / 3] * 3], dtype)
    for temperature in (1.0, 1e-30, 1e30):
        routing = module.route(logits[:3], temperature=temperature)
        if temperature <= 1:
            np.testing.assert_array_equal(routing.weights, expected[:3])
        assert np.isfinite(routing.weights).all()
    np.testing.assert_allclose(module.route(logits).weights, expected, rtol=1e-6)
    grad = module.route_backward(np.ones_like(logits), logits, module.route(logits, top_k=2).indices)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("bad", [[0, np.nan, 1], [np.nan, 0, 1], [0, np.inf, 1], [-np.inf] * 3], ids=str)
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_bad_row_becomes_nan_and_no_other_does(module, bad, top_k, dtype):
    logits = np.array([[1, 2, 3], bad, [3, 2, 1]], dtype)
    mask = np.array([True, False, True])
    routing = module.route(logits, top_k=top_k, mask=mask)
    assert np.isnan(routing.weights[1, : top_k or 3]).all()
    np.testing.assert_array_equal(routing.weights[[0, 2]], module.route(logits[[0, 2]], top_k=top_k).weights)
    assert np.isfinite(routing.prob_sums).all()
    assert np.isnan(module.route(logits, top_k=top_k).prob_sums).all()
    if top_k:
        assert routing.indices[1].tolist() == [0, 1]
        assert routing.weights[1, 2] == 0
    grad = module.route_backward(np.ones_like(logits), logits, routing.indices, mask=mask)
    assert np.isnan(grad[1]).any()
    assert np.isfinite(grad[[0, 2]]).all()


@pytest.mark.parametrize("n", [5, 40, 300])
@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@pytest.mark.parametrize("top_k", [None, 1, 3, 5])
def test_bad_rows_stay_apart_at_every_width(module, n_tokens, n, top_k, dtype):
    rng = np.random.default_rng(n)
    logits = logits_of(rng, (n_tokens,), n, dtype)
    logits[:, 1::3] = -np.inf
    good = functional.route(logits, top_k=top_k)
    for value in (np.nan, np.inf):
        for bad in {0, n_tokens // 2, n_tokens - 1}:
            spoilt = logits.copy()
            spoilt[bad, rng.integers(n)] = value
            routing = module.route(spoilt, top_k=top_k)
            others = np.arange(n_tokens) != bad
            np.testing.assert_allclose(routing.weights[others], good.weights[others], rtol=1e-5)
            assert np.isnan(routing.weights[bad, : top_k or n]).all()
            assert not routing.weights[bad, top_k or n :].any()
            assert np.isnan(routing.prob_sums).all()
            if top_k:
                np.testing.assert_array_equal(routing.indices[others], good.indices[others])
                assert routing.indices[bad].tolist() == list(range(top_k))
            grad = module.route_backward(np.ones_like(logits), spoilt, routing.indices)
            assert np.isnan(grad[bad]).any()
            assert np.isfinite(grad[others]).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-30, 1e30, 1e40, 1e308])
def test_no_temperature_is_too_small_or_too_large(module, temperature, dtype):
    logits = np.array([[1.0, 3.0, -np.inf, 2.0], [5.0, 5.0, 5.0, 5.0]], dtype)
    routing = module.route(logits, top_k=2, temperature=temperature)
    np.testing.assert_array_equal(routing.indices, [[1, 3], [0, 1]])
    first = [0, 1, 0, 0] if temperature < 1 else [0, 0.5, 0, 0.5]
    np.testing.assert_array_equal(routing.weights, np.array([first, [0.5, 0.5, 0, 0]], dtype))
    assert np.isfinite(routing.prob_sums).all()


@pytest.mark.parametrize(("n_tokens", "n"), [(5000, 8), (257, 300), (40000, 1), (3, 5000)])
def test_bits_do_not_depend_on_the_number_of_threads(isa, threads, n_tokens, n, dtype):
    rng = np.random.default_rng(5)
    logits, mask = logits_of(rng, (n_tokens,), n, dtype), rng.random(n_tokens) < 0.9
    grad_weights, grad_sums = logits[::-1], logits[0]
    results = []
    for count in (1, 2, 3, 7, 64, 1):
        threads(count)
        routing = functional.route(logits, top_k=min(n, 3), mask=mask)
        grad = functional.route_backward(grad_weights, logits, routing.indices, mask=mask, grad_prob_sums=grad_sums)
        results.append([a.tobytes() for a in (*routing, grad)])
    assert all(result == results[0] for result in results)


def test_thousands_of_experts_and_many_tokens_give_what_the_twin_gives(dtype):
    rng = np.random.default_rng(6)
    for shape in ((40, 3000), (30000, 4)):
        logits = logits_of(rng, shape[:1], shape[1], dtype)
        for top_k in (None, 2, min(shape[1], 1000)):
            check_routing(logits, top_k=top_k, mask=rng.random(shape[0]) < 0.5)
            check_gradient(rng, logits, top_k=top_k)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [[1.0, 2.0]]}, TypeError, "logits"),
        ({"logits": np.ones((2, 3), np.float16)}, TypeError, "logits"),
        ({"logits": np.ones((2, 3), ">f4")}, TypeError, "logits"),
        ({"logits": np.ones((2, 3), int)}, TypeError, "logits"),
        ({"logits": np.array(1.0)}, ValueError, "logits"),
        ({"logits": np.ones((2, 0))}, ValueError, "logits"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 4}, ValueError, "top_k"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_k": 2.0}, TypeError, "top_k"),
        ({"top_k": True}, TypeError, "top_k"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": np.nan}, ValueError, "temperature"),
        ({"temperature": np.inf}, ValueError, "temperature"),
        ({"temperature": "1"}, TypeError, "temperature"),
        ({"temperature": 1j}, TypeError, "temperature"),
        ({"mask": [True, False]}, TypeError, "mask"),
        ({"mask": np.ones(2)}, TypeError, "mask"),
        ({"mask": np.ones(3, bool)}, ValueError, "mask"),
        ({"mask": np.ones((2, 1), bool)}, ValueError, "mask"),
    ],
)
def test_wrong_arguments_of_route_are_refused_by_name(module, changes, error, message):
    arguments = {"logits": np.ones((2, 3))} | changes
    with pytest.raises(error, match=message):
        module.route(arguments.pop("logits"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grad_weights": np.ones((3, 3))}, ValueError, "grad_weights"),
        ({"grad_weights": np.ones((2, 3), np.float32)}, TypeError, "grad_weights"),
        ({"indices": np.zeros((2, 1), np.int32)}, TypeError, "indices"),
        ({"indices": [[0], [1]]}, TypeError, "indices"),
        ({"indices": np.zeros((3, 1), np.int64)}, ValueError, "indices"),
        ({"indices": np.zeros((2, 0), np.int64)}, ValueError, "indices"),
        ({"indices": np.zeros((2, 4), np.int64)}, ValueError, "indices"),
        ({"indices": np.array([[0], [3]])}, ValueError, "indices"),
        ({"indices": np.array([[0], [-1]])}, ValueError, "indices"),
        ({"grad_prob_sums": np.ones(2)}, ValueError, "grad_prob_sums"),
        ({"grad_prob_sums": np.ones(3, np.float32)}, TypeError, "grad_prob_sums"),
    ],
)
def test_wrong_arguments_of_the_backward_are_refused_by_name(module, changes, error, message):
    arguments = {"grad_weights": np.ones((2, 3)), "logits": np.ones((2, 3)), "indices": None} | changes
    with pytest.raises(error, match=message):
        module.route_backward(
            arguments.pop("grad_weights"), arguments.pop("logits"), arguments.pop("indices"), **arguments
        )
