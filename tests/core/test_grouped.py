"""Top-k on both sides of the rule that says when tokens are grouped by their experts (csrc/core/grouped.c)."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

RAGGED = (3, 1, 5, 2, 4, 1, 2, 5, 3, 1, 4)


def check(mixture):
    mixture.check_forward()
    mixture.check_backward()


@pytest.mark.parametrize("n_experts", [1, 2, 3, 4, 7, 8, 9, 16, 63, 64, 65, 256, 300])
@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_any_number_of_experts_gives_what_the_twin_gives(make_mixture, n_experts, top_k, dtype):
    ranks = tuple(RAGGED[e % len(RAGGED)] for e in range(n_experts))
    check(make_mixture((13,), 19, 17, ranks, top_k=min(top_k, n_experts), dtype=dtype))


@pytest.mark.parametrize("n_experts", [3, 40])
def test_keeping_all_experts_is_the_dense_mixture(make_mixture, n_experts):
    m = make_mixture((5,), 7, 6, (2,) * n_experts, top_k=n_experts)
    for kept, dense in zip(m.forward(), m.forward(top_k=None), strict=True):
        assert kept.tobytes() == dense.tobytes()


@pytest.mark.parametrize("per", ["call", "sequence", "token"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_layout_and_weight_shape_gives_what_the_twin_gives(make_mixture, layout, per, top_k, dtype):
    ranks = (2, 3, 1, 2, 3, 1, 2, 3, 2, 1, 3, 3) * 2
    check(make_mixture((3, 7), 17, 13, ranks, per=per, top_k=top_k, dtype=dtype).map(layout))


@pytest.mark.parametrize("tokens", [1, 2, 8, 65, 130, 2100])
@pytest.mark.parametrize("d_in, d_out", [(1, 1), (33, 70), (600, 9), (9, 1100)])
def test_blocks_and_strips_end_anywhere(make_mixture, tokens, d_in, d_out, dtype):
    check(make_mixture((tokens,), d_in, d_out, (2, 1, 3, 1, 2, 1, 1, 3, 2) * 6, top_k=2, dtype=dtype, base=True))


@pytest.mark.parametrize("tokens", [3, 4, 5, 15, 16, 17, 63, 64, 65, 79, 81])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9])
def test_every_token_gets_its_experts_wherever_it_stands(make_mixture, isa, tokens, top_k, dtype):
    m = make_mixture((tokens,), 3, 2, (1,) * 150, top_k=top_k, dtype=dtype)
    m.routing_weights[...] = np.round(2 * m.routing_weights) / 2  # many ties
    m.routing_weights[tokens // 2, [3, 140]] = np.nan
    m.routing_weights[tokens // 2, 7] = np.inf
    _, hidden = m.forward()
    worth = np.nan_to_num(m.routing_weights, nan=np.inf, posinf=1e30)
    expected = np.sort(np.argsort(-worth, axis=-1, kind="stable")[:, :top_k], axis=-1)
    assert [list(np.flatnonzero(row)) for row in hidden] == expected.tolist()


def test_an_expert_that_all_tokens_pick_and_many_that_none_does(make_mixture, dtype):
    m = make_mixture((700,), 70, 40, (4,) * 32, top_k=2, dtype=dtype)
    m.routing_weights[...] = -np.abs(m.routing_weights)
    m.routing_weights[:, 5] = 1
    m.routing_weights[:, 20] = 2
    check(m)
    grads = m.backward()
    assert grads.lora_A[5].any() and grads.lora_B[20].any()
    assert not any(grads.lora_A[e].any() or grads.lora_B[e].any() for e in range(32) if e not in (5, 20))


def test_ties_go_to_the_lower_index(make_mixture, dtype):
    m = make_mixture((9,), 5, 6, (2,) * 24, top_k=2, dtype=dtype)
    m.routing_weights[...] = 0
    m.routing_weights[3, 7] = 1
    m.routing_weights[4, 20:] = -1
    check(m)
    hidden = m.forward()[1].reshape(9, 24, 2).any(-1)
    assert [list(np.flatnonzero(row)) for row in hidden[[0, 3, 4]]] == [[0, 1], [0, 7], [0, 1]]


def test_nan_counts_as_the_largest_weight_and_stays_in_its_token(make_mixture, dtype):
    m = make_mixture((5,), 5, 6, (2,) * 40, top_k=2, dtype=dtype)
    m.routing_weights[1, [2, 35]] = np.nan
    m.routing_weights[3, [2, 20, 39]] = np.nan
    y, hidden = m.forward()
    assert list(np.isnan(y).any(-1)) == [False, True, False, True, False]
    picked = hidden.reshape(5, 40, 2).any(-1)
    assert list(np.flatnonzero(picked[1])) == [2, 35] and list(np.flatnonzero(picked[3])) == [2, 20]
    assert list(np.isnan(m.backward().x).any(-1)) == [False, True, False, True, False]


@pytest.mark.parametrize("need", ["x", "lora_A", "lora_B", "routing_weights"])
def test_one_gradient_alone_has_the_same_bits(make_mixture, need):
    m = make_mixture((11,), 7, 6, RAGGED, top_k=1)
    alone, all_of_them = (getattr(m.backward(need=n), need) for n in ((need,), None))
    for a, b in zip(np.atleast_1d(alone) if need[0] != "l" else alone, all_of_them, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("ranks, top_k", [((8,) * 64, 2), ((8,) * 6, 2), (RAGGED * 5, 3)])
def test_threads_change_no_bit(make_mixture, threads, isa, ranks, top_k, dtype):
    m = make_mixture((301,), 160, 170, ranks, top_k=top_k, dtype=dtype)

    def results():
        y, hidden = m.forward()
        grads = replace(m, hidden=hidden).backward()
        arrays = [y, hidden, grads.x, grads.routing_weights, *grads.lora_A, *grads.lora_B]
        return [a.tobytes() for a in arrays]

    threads(1)
    one = results()
    for n in (2, 3):
        threads(n)
        assert results() == one


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=40),
    per=st.sampled_from(["call", "token"]),
    top_k=st.integers(1, 3),
    base=st.booleans(),
)
def test_any_shape_gives_what_the_twin_gives(tokens, d_in, d_out, ranks, per, top_k, base, make_mixture):
    top_k = min(top_k, len(ranks))
    check(make_mixture((tokens,), d_in, d_out, tuple(ranks), per=per, top_k=top_k, base=base, dtype=np.float32))
