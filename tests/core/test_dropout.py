"""Dropout in the C core: masks that follow from seed, expert, token and column, and what comes of them."""

import math
from itertools import combinations

import numpy as np
import pytest

from moelora import reference, runtime

SEED = 0x0123456789ABCDEF


def view(a):
    return None if a is None else (a.ctypes.data, *(s // a.itemsize for s in a.strides))


def run(m, seed, probabilities, n_threads=0):
    """forward_raw, then backward_raw with its hidden, for weights per token."""
    (batch, seq), d_in, d_out = m.x.shape[:-1], m.x.shape[-1], m.lora_B[0].shape[0]
    ranks = [a.shape[0] for a in m.lora_A]
    shared = (
        int(m.x.dtype == np.float64),
        (batch, seq, d_in, d_out),
        view(m.x),
        [view(a) for a in m.lora_A],
        [view(b) for b in m.lora_B],
        ranks,
        view(m.routing_weights),
        m.scaling,
    )
    y, hidden = (np.full((batch, seq, n), np.nan, m.x.dtype) for n in (d_out, sum(ranks)))
    x, w = np.full_like(m.x, np.nan), np.full_like(m.routing_weights, np.nan)
    A, B = ([np.full_like(a, np.nan) for a in arrays] for arrays in (m.lora_A, m.lora_B))
    top_k, dropout = m.top_k or 0, None if probabilities is None else (seed, probabilities)
    runtime._core.forward_raw(*shared, None, view(y), view(hidden), top_k, n_threads, dropout)
    runtime._core.backward_raw(
        *shared,
        view(m.grad_y),
        view(hidden),
        view(x),
        [view(a) for a in A],
        [view(b) for b in B],
        view(w),
        top_k,
        n_threads,
        0,
        dropout,
    )
    return {"y": y, "hidden": hidden, "x": x, "w": w} | {
        f"{name}[{e}]": array for name, arrays in (("A", A), ("B", B)) for e, array in enumerate(arrays)
    }


def twin(m, seed, probabilities):
    mixture = reference._Mixture(m.x, m.lora_A, m.lora_B, m.routing_weights, m.scaling, None, m.top_k)
    dropout = reference._Dropout(seed, probabilities)
    y, hidden = reference._forward(mixture, None, dropout)
    x, A, B, w = reference._backward(mixture, m.grad_y, hidden, dropout)
    return {"y": y, "hidden": hidden, "x": x, "w": w} | {
        f"{name}[{e}]": array for name, arrays in (("A", A), ("B", B)) for e, array in enumerate(arrays)
    }


def masks(seed, n_experts, tokens, d_in, p, dtype=np.float32):
    """[N, tokens, d_in]: what the core multiplies x by, seen through experts whose A is the identity."""
    x, weights = np.ones((1, tokens, d_in), dtype), np.ones((1, tokens, n_experts), dtype)
    y, hidden = np.empty((1, tokens, 1), dtype), np.empty((1, tokens, n_experts * d_in), dtype)
    a, b = np.eye(d_in, dtype=dtype), np.zeros((1, d_in), dtype)
    runtime._core.forward_raw(
        int(dtype is np.float64),
        (1, tokens, d_in, 1),
        view(x),
        [view(a)] * n_experts,
        [view(b)] * n_experts,
        [d_in] * n_experts,
        view(weights),
        [1.0] * n_experts,
        None,
        view(y),
        view(hidden),
        0,
        0,
        (seed, [p] * n_experts),
    )
    return hidden[0].reshape(tokens, n_experts, d_in).swapaxes(0, 1)


# ---- masks ----


@pytest.mark.parametrize("d_in", [1, 15, 130, 300])
def test_the_masks_are_those_of_the_twin(d_in, dtype, isa):
    got = masks(SEED, 3, 50, d_in, 0.25, dtype)
    dropout = reference._Dropout(SEED, [0.25] * 3)
    for e in range(3):
        np.testing.assert_array_equal(got[e], dropout.factors(e, (50,), d_in).astype(dtype))


def test_negative_seeds_are_seeds_too():
    np.testing.assert_array_equal(
        masks(-5, 1, 9, 40, 0.5)[0], reference._Dropout(-5, [0.5]).factors(0, (9,), 40).astype(np.float32)
    )
    assert (masks(-5, 1, 9, 40, 0.5) != masks(5, 1, 9, 40, 0.5)).any()


def test_the_generator_is_philox():
    """Random123's known answers for philox4x32 with 7 rounds."""
    answers = {
        (0, 0): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        (2**32 - 1, 2**64 - 1): (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    }
    for (word, key), expected in answers.items():
        assert tuple(map(int, reference._philox((np.uint64(word),) * 4, key))) == expected


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_mean_is_exact_and_the_share_is_what_was_asked(p):
    m = masks(SEED, 4, 500, 256, p)
    dropped, n = (m == 0).mean(), m.size
    drops = round(p * 2**16)
    assert abs(dropped - drops / 2**16) < 4 * math.sqrt(p * (1 - p) / n)
    assert set(np.unique(m)) == {np.float32(0), np.float32(2**16 / (2**16 - drops))}
    assert abs(m.mean(dtype=np.float64) - 1) < 4 * math.sqrt(p / (1 - p) / n)


def correlation(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return abs(((a - a.mean()) * (b - b.mean())).mean()) / (a.std() * b.std()) * math.sqrt(a.size)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_experts_tokens_columns_and_seeds_are_independent(p):
    m = masks(SEED, 4, 500, 256, p) == 0
    pairs = {f"experts {e}, {f}": (m[e], m[f]) for e, f in combinations(range(4), 2)}
    pairs |= {f"tokens {n} apart": (m[:, n:], m[:, :-n]) for n in (1, 2, 16)}
    pairs |= {f"columns {n} apart": (m[..., n:], m[..., :-n]) for n in (1, 8, 16, 17, 32, 64, 128)}
    pairs |= {"neighbour and next token": (m[:, 1:, 1:], m[:, :-1, :-1])}
    for name, seed in {"next": SEED + 1, "half": SEED ^ 1 << 32}.items():
        pairs[f"{name} seed"] = (m, masks(seed, 4, 500, 256, p) == 0)
    for name, (a, b) in pairs.items():
        assert correlation(a, b) < 4.5, name


def test_counts_are_distributed_as_independent_draws_are():
    """Chi-square of how many of each 8 neighbours are dropped, along each axis; the drawn numbers are uniform."""
    m = masks(SEED, 8, 504, 256, 0.5) == 0
    expected = np.array([math.comb(8, k) for k in range(9)]) / 2**8
    for axis in range(3):
        counts = np.moveaxis(m, axis, -1).reshape(-1, 8).sum(-1)
        seen = np.bincount(counts, minlength=9)
        chi2 = ((seen - expected * counts.size) ** 2 / (expected * counts.size)).sum()
        assert chi2 < 30, axis  # 8 degrees of freedom: exceeded once in 5000
    words = reference._philox(tuple(np.meshgrid(*[np.arange(n, dtype=np.uint64) for n in (64, 64, 1, 8)])), SEED)
    for word in words:
        for half in (word & np.uint64(0xFFFF), word >> np.uint64(16)):
            seen = np.bincount(half.ravel().astype(np.int64) >> 8, minlength=256)
            chi2 = ((seen - seen.mean()) ** 2 / seen.mean()).sum()
            assert 160 < chi2 < 375  # 255 degrees of freedom


# ---- what is computed with them ----


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("probabilities", [(0.1, 0.5, 0.9), (0.0, 0.3, 0.0), (1.0, 0.0, 0.2)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "d_in", "ranks"),
    [((1, 1), 7, (2, 1, 5)), ((2, 9), 128, (4, 20, 1)), ((1, 47), 129, (12, 1, 4)), ((3, 90), 300, (16, 3, 70))],
)
def test_forward_and_backward_are_the_twins(make_mixture, tokens, d_in, ranks, probabilities, top_k, dtype, isa):
    m = make_mixture(tokens, d_in, 21, ranks, dtype=dtype, top_k=top_k)
    got, expected, plain = run(m, SEED, probabilities), twin(m, SEED, probabilities), twin(m, SEED, (0.0,) * 3)
    for name, array in got.items():
        scale = np.abs(expected[name]).max() + np.abs(plain[name]).max()
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=50 * np.finfo(dtype).eps * scale, err_msg=name)
    if d_in > 100:
        assert np.abs(expected["y"] - plain["y"]).max() > 0.01 * np.abs(plain["y"]).max()


@pytest.mark.parametrize("probabilities", [(0.0, 0.0, 0.0), (1e-9, 0.0, 1e-6)], ids=str)
def test_where_nothing_is_dropped_the_bits_are_those_without_dropout(make_mixture, probabilities, dtype, isa):
    for tokens in ((1, 4), (1, 30), (2, 90)):
        m = make_mixture(tokens, 130, 33, (4, 3, 9), dtype=dtype)
        expected = run(m, 0, None)
        for name, array in run(m, SEED, probabilities).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_certain_dropout_gives_zeros_and_almost_certain_dropout_does_not(make_mixture, isa):
    m = make_mixture((2, 300), 64, 5, (2, 3))
    m.x[0, 0, :] = [math.inf, math.nan] * 32
    zeros = run(m, SEED, (1.0, 1.0))
    for name in ("y", "hidden", "x", "A[0]", "A[1]", "B[0]"):
        assert (zeros[name] == 0).all(), name
    m = make_mixture((2, 300), 64, 5, (2, 3))
    hidden = run(m, SEED, (1 - 1e-12, 1 - 1e-12))["hidden"]
    assert np.isfinite(hidden).all()
    assert reference._Dropout(SEED, [1 - 1e-12]).factors(0, (2000,), 640).max() == 2**16


def test_the_number_of_threads_does_not_change_the_bits(make_mixture, dtype, isa):
    m = make_mixture((2, 400), 200, 140, (16, 3, 20), dtype=dtype)
    expected = run(m, SEED, (0.1, 0.0, 0.5), 1)
    for n in (2, 3, 5):
        for name, array in run(m, SEED, (0.1, 0.0, 0.5), n).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_what_is_dropped_is_not_read_into_the_result(make_mixture, isa):
    """NaN in dropped elements of x leaves no trace."""
    m = make_mixture((1, 100), 64, 5, (2,))
    expected = run(m, SEED, (0.5,))
    m.x[reference._Dropout(SEED, [0.5]).factors(0, (1, 100), 64) == 0] = np.nan
    for name, array in run(m, SEED, (0.5,)).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("dropout", "error", "message"),
    [
        ((0, [0.1, 1.1]), ValueError, "a number is outside its domain"),
        ((0, [-0.1, 0.1]), ValueError, "a number is outside its domain"),
        ((0, [math.nan, 0.1]), ValueError, "a number is outside its domain"),
        ((0, [0.1]), ValueError, "dropout must hold 2 items, got 1"),
        ((0, [1, 0.1]), TypeError, r"dropout\[0\] must be a float, got int"),
        ((0.5, [0.1, 0.1]), TypeError, "dropout must be an int, got float"),
        ((2**63, [0.1, 0.1]), ValueError, "dropout must fit into 64 bits"),
        (0.5, TypeError, "dropout must be a list or a tuple, got float"),
        ((0,), ValueError, "dropout must hold 2 items, got 1"),
    ],
)
def test_what_is_no_dropout_is_refused(make_mixture, dropout, error, message):
    m = make_mixture((2, 3), 4, 5, (1, 2))
    y = np.full((2, 3, 5), np.nan)
    with pytest.raises(error, match=message):
        runtime._core.forward_raw(
            1,
            (2, 3, 4, 5),
            view(m.x),
            [view(a) for a in m.lora_A],
            [view(b) for b in m.lora_B],
            [1, 2],
            view(m.routing_weights),
            m.scaling,
            None,
            view(y),
            None,
            0,
            0,
            dropout,
        )
    assert np.isnan(y).all()
