"""routed_lora_forward on NumPy arrays: every layout, shape and instruction set against the twin and closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora import runtime

TOKENS_OF = {"call": (3, 4), "sequence": (3, 4), "token": (3, 4), "call, flat": (5,), "token, flat": (5,)}


@pytest.mark.parametrize("per", TOKENS_OF)
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_layout_and_weight_shape_gives_what_the_twin_gives(make_mixture, layout, per, top_k, dtype):
    tokens, per = TOKENS_OF[per], per.removesuffix(", flat")
    mixture = make_mixture(tokens, 17, 13, (2, 1, 5), per=per, dtype=dtype, base=True, top_k=top_k)
    mixture.map(layout).check_forward()


@pytest.mark.parametrize("n_tokens", [1, 5, 16, 47, 48, 100, 300])
@pytest.mark.parametrize("d_in", [1, 7, 64, 130, 515])
def test_every_size_gives_what_the_twin_gives(make_mixture, n_tokens, d_in, dtype):
    for d_out in (1, 7, 64, 130, 515):
        make_mixture((n_tokens,), d_in, d_out, (8, 3, 1, 17), dtype=dtype).check_forward()
        make_mixture((n_tokens,), d_in, d_out, (4,), dtype=dtype, base=True).check_forward()


@pytest.mark.parametrize("n_tokens", [1, 7, 9, 17, 50, 131])
@pytest.mark.parametrize("ranks", [(1,), (4,), (12,), (20,), (1, 4, 12, 20), (20, 1, 12, 4, 16)], ids=str)
def test_ranks_that_fill_no_vector_give_what_the_twin_gives(make_mixture, n_tokens, ranks, dtype):
    for d_in, d_out in ((65, 33), (33, 65)):
        make_mixture((n_tokens,), d_in, d_out, ranks, dtype=dtype).check_forward()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, (1,)), (1, 2, 3, (5, 7)), (600, 11, 13, (300, 1)), (2, 1100, 1090, (70,))])
def test_extreme_shapes_give_what_the_twin_gives(make_mixture, shape, base, dtype):
    n_tokens, d_in, d_out, ranks = shape
    make_mixture((n_tokens,), d_in, d_out, ranks, dtype=dtype, base=base).check_forward()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("tokens", [(0,), (0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("per", ["call", "token"])
def test_no_tokens_give_an_empty_result(make_mixture, module, tokens, per, base):
    y, hidden = make_mixture(tokens, 4, 3, (2, 1), per=per, base=base).forward(module)
    assert y.shape == (*tokens, 3)
    assert hidden.shape == (*tokens, 3)


@pytest.mark.parametrize("n_experts", [64, 65, 3000])
def test_thousands_of_experts_are_mixed(make_mixture, n_experts):
    make_mixture((3,), 4, 5, (1,) * n_experts).check_forward()
    make_mixture((3,), 4, 5, (1,) * n_experts, top_k=63).check_forward()


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
    make_mixture(tokens, d_in, d_out, ranks, per=per, base=base, top_k=top_k, dtype=np.float32).check_forward()


def test_one_hot_weights_equal_the_single_adapter(make_mixture, module, dtype):
    m = make_mixture((6,), 9, 8, (2, 3, 4), dtype=dtype)
    y, _ = m.forward(module, routing_weights=np.eye(3, dtype=dtype)[[0, 1, 2, 0, 1, 2]])
    for e in range(3):
        alone = m.scaling[e] * (m.x @ m.lora_A[e].T) @ m.lora_B[e].T
        np.testing.assert_allclose(y[e::3], alone[e::3], rtol=0, atol=100 * np.finfo(dtype).eps)


def test_static_weights_equal_the_merged_adapter(make_mixture, module, dtype):
    m = make_mixture((2, 5), 9, 8, (2, 3, 4), per="call", dtype=dtype, base=True)
    delta = sum(s * w * b @ a for s, w, a, b in zip(m.scaling, m.routing_weights, m.lora_A, m.lora_B, strict=True))
    y, _ = m.forward(module)
    np.testing.assert_allclose(y, m.x @ (m.weight + delta).T + m.bias, rtol=0, atol=300 * np.finfo(dtype).eps)


def test_zero_weights_leave_the_base_layer(make_mixture, module, dtype):
    m = make_mixture((5,), 9, 8, dtype=dtype, base=True)
    y, _ = m.forward(module, routing_weights=np.zeros_like(m.routing_weights))
    np.testing.assert_allclose(y, m.x @ m.weight.T + m.bias, rtol=0, atol=100 * np.finfo(dtype).eps)


def test_hidden_is_the_unweighted_shrink_of_every_expert(make_mixture, module, dtype):
    m = make_mixture((5,), 9, 8, (2, 3), dtype=dtype)
    _, hidden = m.forward(module)
    expected = np.concatenate([m.x @ a.T for a in m.lora_A], axis=1)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=50 * np.finfo(dtype).eps)


def test_top_k_equals_weights_with_the_rest_set_to_zero(make_mixture, module, dtype):
    m = make_mixture((4, 3), 5, 6, (1, 2, 1, 2), dtype=dtype)
    order = np.argsort(-m.routing_weights, axis=-1)
    dropped = m.routing_weights.copy()
    np.put_along_axis(dropped, order[..., 2:], 0.0, axis=-1)
    masked, hidden = m.forward(module, top_k=2)
    dense, _ = m.forward(module, routing_weights=dropped)
    np.testing.assert_allclose(masked, dense, rtol=0, atol=50 * np.finfo(dtype).eps)
    zero = np.repeat(dropped == 0, [1, 2, 1, 2], axis=-1)
    assert not hidden[zero].any()
    assert hidden[~zero].all()


def test_top_k_compares_values_and_ties_go_to_the_lower_index(make_mixture, module):
    m = make_mixture((3,), 2, 2, (1, 1, 1, 1))
    weights = np.array([[1.0, -2.0, 1.0, 1.0], [-3.0, -1.0, -2.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    _, hidden = m.forward(module, routing_weights=weights, top_k=2)
    assert ((hidden != 0) == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).all()


def test_top_k_of_all_is_dense(make_mixture, module):
    m = make_mixture((5,), 4, 3, (1, 2))
    for masked, dense in zip(m.forward(module, top_k=2), m.forward(module), strict=True):
        np.testing.assert_array_equal(masked, dense)


@pytest.mark.parametrize("kind", ["number", "int", "list", "tuple", "array", "numpy scalars", "0-d array"])
def test_scaling_is_a_number_or_one_per_expert(make_mixture, module, kind):
    m = make_mixture((5,), 4, 3, (1, 2))
    same = {"number": 2.0, "int": 2, "list": [2.0, 2], "tuple": (2.0, 2.0), "array": np.array([2.0, 2.0])}
    same |= {"numpy scalars": [np.float32(2), np.int8(2)], "0-d array": np.array(2.0)}
    expected, _ = m.forward(module, scaling=[2.0, 2.0])
    y, _ = m.forward(module, scaling=same[kind])
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("base", [False, True])
def test_out_is_written_and_returned(make_mixture, module, out_layout, base, dtype):
    m = make_mixture((3, 5), 7, 6, dtype=dtype, base=base)
    out = out_layout(np.full((3, 5, 6), np.nan, dtype))
    y, _ = m.forward(module, out=out)
    assert y is out
    expected, _ = m.forward(module)
    np.testing.assert_array_equal(out, expected)


def test_out_may_lie_between_the_elements_of_an_input(make_mixture, module, dtype):
    buffer = np.zeros((5, 14), dtype)
    x, out = buffer[:, ::2], buffer[:, 1::2]
    m = make_mixture((5,), 7, 7, dtype=dtype)
    x[...] = m.x
    m.forward(module, x=x, out=out)
    np.testing.assert_array_equal(x, m.x)
    np.testing.assert_array_equal(out, m.forward(module)[0])


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("tokens", [(1,), (100,), (3, 333)])
def test_the_number_of_threads_does_not_change_a_bit(make_mixture, threads, tokens, base, dtype, isa):
    m = make_mixture(tokens, 515, 600, (8, 16, 8), dtype=dtype, base=base)
    results = []
    for n in (1, 2, 3, 4, 1):
        threads(n)
        results.append(m.forward())
    for y, hidden in results[1:]:
        np.testing.assert_array_equal(y, results[0][0])
        np.testing.assert_array_equal(hidden, results[0][1])


def test_a_nan_weight_makes_its_own_tokens_nan(make_mixture, module, dtype):
    m = make_mixture((2, 3), 5, 4, (1, 2), dtype=dtype)
    clean, _ = m.forward(module)
    m.routing_weights[1, 2, 0] = np.nan
    y, hidden = m.forward(module)
    assert np.isnan(y[1, 2]).all()
    assert not np.isnan(hidden).any()
    y[1, 2] = clean[1, 2]
    np.testing.assert_array_equal(y, clean)


def test_a_nan_weight_is_the_largest_to_top_k(make_mixture, module, dtype):
    m = make_mixture((1,), 5, 4, (1, 1, 1), dtype=dtype)
    y, hidden = m.forward(module, routing_weights=np.array([[np.inf, 2.0, np.nan]], dtype), top_k=1)
    assert np.isnan(y).all()
    assert ((hidden != 0) == [[False, False, True]]).all()


def test_a_nan_token_stays_alone(make_mixture, module, dtype):
    m = make_mixture((60,), 5, 4, dtype=dtype, base=True)
    clean, _ = m.forward(module)
    m.x[17, 3] = np.nan
    y, _ = m.forward(module)
    assert np.isnan(y[17]).all()
    y[17] = clean[17]
    np.testing.assert_array_equal(y, clean)


def as_tokens(a):
    """What forward_raw calls a view3."""
    return (a.ctypes.data, *(s // a.itemsize for s in a.strides))


def forward_raw(m, y, base=None, hidden=None):
    (batch, seq), d_in, d_out = m.x.shape[:-1], m.x.shape[-1], m.lora_B[0].shape[0]
    runtime._core.forward_raw(
        int(m.x.dtype == np.float64),
        (batch, seq, d_in, d_out),
        as_tokens(m.x),
        [as_tokens(a) for a in m.lora_A],
        [as_tokens(b) for b in m.lora_B],
        [a.shape[0] for a in m.lora_A],
        as_tokens(m.routing_weights),
        m.scaling,
        None if base is None else as_tokens(base),
        as_tokens(y),
        None if hidden is None else as_tokens(hidden),
        m.top_k or 0,
        0,
    )


@pytest.mark.parametrize("tokens", [(1, 1), (2, 3), (4, 75)])
def test_raw_base_is_added_wherever_it_lies(make_mixture, out_layout, tokens, dtype, isa):
    m = make_mixture(tokens, 33, 70, (3, 8), dtype=dtype)
    base = out_layout(make_mixture(tokens, 33, 70, (3, 8), dtype=dtype, seed=1).grad_y)
    y, hidden = np.full((*tokens, 70), np.nan, dtype), np.full((*tokens, 11), np.nan, dtype)
    forward_raw(m, y, base, hidden)
    mixed, expected_hidden = m.forward()
    np.testing.assert_allclose(y, base + mixed, rtol=0, atol=1000 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(hidden, expected_hidden)
    in_place = base.copy()
    forward_raw(m, in_place, in_place)
    np.testing.assert_array_equal(in_place, y)


@pytest.mark.parametrize("tokens", [(1, 1), (2, 3), (4, 75)])
def test_raw_output_and_hidden_may_have_any_strides(make_mixture, out_layout, tokens, dtype, isa):
    m = make_mixture(tokens, 33, 70, (3, 8), dtype=dtype, top_k=1)
    y, hidden = (out_layout(np.full((*tokens, width), np.nan, dtype)) for width in (70, 11))
    forward_raw(m, y, None, hidden)
    for got, expected in zip((y, hidden), m.forward(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_raw_counts_must_agree(make_mixture):
    m = make_mixture((2, 3), 4, 5, (1, 2))
    m.scaling = [1.0]
    with pytest.raises(ValueError, match="scaling must hold 2 items, got 1"):
        forward_raw(m, np.zeros((2, 3, 5)))
    m = make_mixture((2, 3), 4, 5, (1, 2))
    m.scaling = [1.0, math.inf]
    with pytest.raises(ValueError):
        forward_raw(m, np.zeros((2, 3, 5)))


def test_raw_scaling_is_read_without_running_python(make_mixture):
    """A number whose __float__ changes the list under the reader's hands."""
    m = make_mixture((2, 3), 4, 5, (1, 2))

    class Emptying:
        def __float__(self):
            m.scaling.clear()
            return 1.0

    m.scaling = [Emptying(), 1.0]
    with pytest.raises(TypeError, match=r"scaling\[0\] must be a float, got Emptying"):
        forward_raw(m, np.zeros((2, 3, 5)))
    assert len(m.scaling) == 2
