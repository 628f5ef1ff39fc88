"""routed_lora_backward on NumPy arrays: against the twin, against what differences of the forward say, and pieces."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora import runtime

TOKENS_OF = {"call": (3, 4), "sequence": (3, 4), "token": (3, 4), "call, flat": (5,), "token, flat": (5,)}
NAMES = ("x", "lora_A", "lora_B", "routing_weights")


@pytest.mark.parametrize("per", TOKENS_OF)
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_layout_and_weight_shape_gives_what_the_twin_gives(make_mixture, layout, per, top_k, dtype):
    tokens, per = TOKENS_OF[per], per.removesuffix(", flat")
    mixture = make_mixture(tokens, 17, 13, (2, 1, 5), per=per, dtype=dtype, base=True, top_k=top_k)
    mixture.map(layout).check_backward()


@pytest.mark.parametrize("n_tokens", [1, 5, 16, 47, 48, 100, 300])
@pytest.mark.parametrize("d_in", [1, 7, 64, 130, 515])
def test_every_size_gives_what_the_twin_gives(make_mixture, n_tokens, d_in, dtype):
    for d_out in (1, 7, 64, 130, 515):
        make_mixture((n_tokens,), d_in, d_out, (8, 3, 1, 17), dtype=dtype).check_backward()
    make_mixture((n_tokens,), d_in, 130, (4,), dtype=dtype, base=True, per="call").check_backward()


@pytest.mark.parametrize("n_tokens", [1, 7, 9, 17, 50, 131])
@pytest.mark.parametrize("ranks", [(1,), (4,), (12,), (20,), (1, 4, 12, 20), (20, 1, 12, 4, 16)], ids=str)
def test_ranks_that_fill_no_vector_give_what_the_twin_gives(make_mixture, n_tokens, ranks, dtype):
    for d_in, d_out in ((65, 33), (33, 65)):
        make_mixture((n_tokens,), d_in, d_out, ranks, dtype=dtype).check_backward()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, (1,)), (1, 2, 3, (5, 7)), (600, 11, 13, (300, 1)), (2, 1100, 1090, (70,))])
def test_extreme_shapes_give_what_the_twin_gives(make_mixture, shape, base, dtype):
    n_tokens, d_in, d_out, ranks = shape
    make_mixture((n_tokens,), d_in, d_out, ranks, dtype=dtype, base=base).check_backward()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("tokens", [(0,), (0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("per", ["call", "sequence", "token"])
def test_no_tokens_give_zero_gradients(make_mixture, module, tokens, per, base):
    m = make_mixture(tokens, 4, 3, (2, 1), per=per, base=base)
    grads = m.backward(module)
    assert grads.x.shape == m.x.shape
    for got, like in zip(
        (*grads.lora_A, *grads.lora_B, grads.routing_weights), (*m.lora_A, *m.lora_B, m.routing_weights), strict=True
    ):
        np.testing.assert_array_equal(got, np.zeros_like(like))


@pytest.mark.parametrize("n_experts", [64, 65, 3000])
def test_thousands_of_experts_have_gradients(make_mixture, n_experts):
    make_mixture((3,), 4, 5, (1,) * n_experts).check_backward()
    make_mixture((3,), 4, 5, (1,) * n_experts, top_k=63).check_backward()


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=2).map(tuple),
    d_in=st.integers(1, 90),
    d_out=st.integers(1, 90),
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=6).map(tuple),
    per=st.sampled_from(["call", "token"]),
    base=st.booleans(),
    top_k=st.none() | st.integers(1, 6),
)
def test_any_shape_gives_what_the_twin_gives(tokens, d_in, d_out, ranks, per, base, top_k, make_mixture):
    top_k = None if top_k is None else min(top_k, len(ranks))
    make_mixture(tokens, d_in, d_out, ranks, per=per, base=base, top_k=top_k, dtype=np.float32).check_backward()


@pytest.mark.parametrize("per", TOKENS_OF)
@pytest.mark.parametrize("base", [False, True])
def test_gradients_foretell_the_change_of_the_output(make_mixture, module, per, base):
    """The output is linear in each argument, so a step of any size is foretold exactly."""
    tokens, per = TOKENS_OF[per], per.removesuffix(", flat")
    m = make_mixture(tokens, 5, 6, (2, 1, 3), per=per, base=base)
    step = make_mixture(tokens, 5, 6, (2, 1, 3), per=per, base=base, seed=1)
    y, _ = m.forward(module)
    grads = m.backward(module)

    def change(**changes):
        return float(((m.forward(module, **changes)[0] - y) * m.grad_y).sum())

    assert change(x=m.x + step.x) == pytest.approx(float((grads.x * step.x).sum()))
    moved = m.routing_weights + step.routing_weights
    assert change(routing_weights=moved) == pytest.approx(float((grads.routing_weights * step.routing_weights).sum()))
    for name in ("lora_A", "lora_B"):
        here, there, grad = (getattr(part, name) for part in (m, step, grads))
        foretold = sum(float((g * d).sum()) for g, d in zip(grad, there, strict=True))
        assert change(**{name: [a + b for a, b in zip(here, there, strict=True)]}) == pytest.approx(foretold)


def test_dropped_experts_have_zero_gradients(make_mixture, module, dtype):
    m = make_mixture((4, 3), 5, 6, (1, 2, 1, 2), dtype=dtype)
    m.routing_weights[..., 1] = -9  # never among the two largest
    grads = m.backward(module, top_k=2)
    kept = m.routing_weights >= np.sort(m.routing_weights, axis=-1)[..., -2:-1]
    np.testing.assert_array_equal(grads.routing_weights != 0, kept)
    assert not grads.lora_A[1].any()
    assert not grads.lora_B[1].any()


def test_what_is_not_needed_is_none_and_the_rest_does_not_change(make_mixture, module, dtype):
    m = make_mixture((2, 5), dtype=dtype, base=True)
    everything = m.backward(module)
    for n in range(5):
        for need in combinations(NAMES, n):
            some = m.backward(module, need=need)
            for name in NAMES:
                if name in need:
                    np.testing.assert_array_equal(
                        np.concatenate([np.ravel(g) for g in getattr(some, name)]),
                        np.concatenate([np.ravel(g) for g in getattr(everything, name)]),
                    )
                else:
                    assert getattr(some, name) is None


@pytest.mark.parametrize("need", [{"x"}, ["x"], iter(["x", "x"]), {"x": 1}])
def test_need_is_any_collection(make_mixture, need):
    grads = make_mixture().backward(need=need)
    assert grads.x is not None
    assert grads[1:] == (None, None, None)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("per", ["call", "sequence", "token"])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 50), (3, 333)])
def test_the_number_of_threads_does_not_change_a_bit(make_mixture, threads, tokens, per, base, dtype, isa):
    m = make_mixture(tokens, 515, 600, (8, 16, 8), per=per, dtype=dtype, base=base)
    m.hidden = m.forward()[1]
    results = []
    for n in (1, 2, 3, 4, 1):
        threads(n)
        grads = m.backward()
        results.append((grads.x, *grads.lora_A, *grads.lora_B, grads.routing_weights))
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, first)


def test_a_nan_weight_reaches_what_depends_on_it(make_mixture, module, dtype):
    m = make_mixture((2, 3), 5, 4, (1, 2), dtype=dtype)
    m.routing_weights[1, 2, 0] = np.nan
    grads = m.backward(module)
    assert np.isnan(grads.x[1, 2]).all()
    assert np.isnan(grads.x).sum() == 5
    assert np.isnan(grads.lora_A[0]).all() and not np.isnan(grads.lora_A[1]).any()
    assert np.isnan(grads.lora_B[0]).all() and not np.isnan(grads.lora_B[1]).any()
    assert not np.isnan(grads.routing_weights).any()


def as_view(a):
    """What backward_raw calls a view2 or view3; None stays None."""
    return None if a is None else (a.ctypes.data, *(s // a.itemsize for s in a.strides))


def weights_view(m, w):
    pointer, *strides = as_view(w)
    if w.ndim == 1:
        return (pointer, 0, 0, *strides)
    return (pointer, strides[0], 0, strides[1]) if w.ndim == 2 else (pointer, *strides)


def backward_raw(m, grad_x, grad_A, grad_B, grad_w, accumulate=0):  # noqa: N803
    (batch, seq), d_in, d_out = m.x.shape[:-1], m.x.shape[-1], m.lora_B[0].shape[0]
    runtime._core.backward_raw(
        int(m.x.dtype == np.float64),
        (batch, seq, d_in, d_out),
        as_view(m.x),
        tuple(as_view(a) for a in m.lora_A),
        tuple(as_view(b) for b in m.lora_B),
        tuple(a.shape[0] for a in m.lora_A),
        weights_view(m, m.routing_weights),
        tuple(m.scaling),
        as_view(m.grad_y),
        as_view(m.hidden),
        as_view(grad_x),
        None if grad_A is None else [as_view(g) for g in grad_A],
        None if grad_B is None else [as_view(g) for g in grad_B],
        None if grad_w is None else weights_view(m, grad_w),
        m.top_k or 0,
        0,
        accumulate,
    )


@pytest.mark.parametrize("per", ["call", "sequence", "token"])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 3), (4, 75)])
def test_raw_gradients_are_added_or_overwritten_as_asked(make_mixture, out_layout, tokens, per, dtype, isa):
    m = make_mixture(tokens, 33, 70, (3, 8), per=per, dtype=dtype)
    there = make_mixture(tokens, 33, 70, (3, 8), per=per, dtype=dtype, seed=1)
    m.hidden = m.forward()[1]
    fresh = m.backward()
    for accumulate in (0, 1, 2, 4, 8, 15):
        x, w = out_layout(there.x.copy()), out_layout(there.routing_weights.copy())
        A, B = ([out_layout(a.copy()) for a in arrays] for arrays in (there.lora_A, there.lora_B))
        backward_raw(m, x, A, B, w, accumulate)
        pairs = [(1, x, there.x, fresh.x), (8, w, there.routing_weights, fresh.routing_weights)]
        pairs += [(2, *arrays) for arrays in zip(A, there.lora_A, fresh.lora_A, strict=True)]
        pairs += [(4, *arrays) for arrays in zip(B, there.lora_B, fresh.lora_B, strict=True)]
        for bit, got, before, grad in pairs:
            if accumulate & bit:
                tolerance = 4 * np.finfo(dtype).eps * max(1.0, np.abs(grad).max())
                np.testing.assert_allclose(got, before + grad, rtol=0, atol=tolerance)
            else:
                np.testing.assert_array_equal(got, grad)


def test_raw_gradients_are_optional_for_each_expert(make_mixture, dtype, isa):
    m = make_mixture((4, 75), 33, 70, (3, 8, 1), dtype=dtype)
    m.hidden = m.forward()[1]
    fresh = m.backward()
    for wanted in ((0,), (1,), (2,), (0, 2)):
        A = [np.full_like(a, np.nan) if e in wanted else None for e, a in enumerate(m.lora_A)]
        B = [np.full_like(b, np.nan) if e not in wanted else None for e, b in enumerate(m.lora_B)]
        backward_raw(m, None, A, B, None)
        for e in range(3):
            got, expected = (A[e], fresh.lora_A[e]) if e in wanted else (B[e], fresh.lora_B[e])
            np.testing.assert_array_equal(got, expected)


def test_raw_backward_needs_hidden_only_for_b_and_the_weights(make_mixture, isa):
    m = make_mixture((4, 75), 33, 70, (3, 8))
    fresh = m.backward()
    x, A = np.empty_like(m.x), [np.empty_like(a) for a in m.lora_A]
    backward_raw(m, x, A, None, None)
    np.testing.assert_array_equal(x, fresh.x)
    np.testing.assert_array_equal(A[1], fresh.lora_A[1])
    with pytest.raises(ValueError):
        backward_raw(m, None, None, None, np.empty_like(m.routing_weights))


@pytest.mark.parametrize("accumulate", [16, -1])
def test_raw_backward_refuses_unknown_bits(make_mixture, accumulate):
    m = make_mixture((2, 3), 4, 5, (1, 2))
    x = np.full_like(m.x, np.nan)
    with pytest.raises(ValueError, match=f"accumulate has unknown bits, got {accumulate}"):
        backward_raw(m, x, None, None, None, accumulate)
    assert np.isnan(x).all()
