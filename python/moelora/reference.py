"""What the kernels compute, in plain NumPy: the oracle of the tests and the fallback where the extension can't load.

Signatures, results and errors are those of `moelora.functional`, which documents them. Everything is computed in
float64 and rounded once, at the end.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["RoutedLoraGrads", "Routing", "route", "route_backward", "routed_lora_backward", "routed_lora_forward"]

Array: TypeAlias = NDArray[np.floating[Any]]
"""An array of float32 or float64."""

GRADS = ("x", "lora_A", "lora_B", "routing_weights")


class RoutedLoraGrads(NamedTuple):
    """Gradients of `routed_lora_forward`; None where they were not asked for."""

    x: Array | None
    lora_A: list[Array] | None
    lora_B: list[Array] | None
    routing_weights: Array | None


class Routing(NamedTuple):
    """What `route` decides for T tokens and N experts."""

    weights: Array
    """[..., N], zero outside the top k."""
    indices: NDArray[np.int64] | None
    """[..., k], by falling probability; None without top_k."""
    counts: NDArray[np.int64]
    """[N]: how many unmasked tokens hold the expert in their top k."""
    prob_sums: Array
    """[N]: probabilities before top-k, summed over unmasked tokens."""


@np.errstate(invalid="ignore", over="ignore")
def routed_lora_forward(
    x: Array,
    lora_A: Sequence[Array],
    lora_B: Sequence[Array],
    routing_weights: Array,
    scaling: SupportsFloat | Sequence[SupportsFloat],
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    top_k: SupportsIndex | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """`moelora.functional.routed_lora_forward` in plain NumPy."""
    m = _Mixture(x, lora_A, lora_B, routing_weights, scaling, weight, top_k)
    if bias is not None:
        if weight is None:
            raise ValueError("bias needs weight: it belongs to the base product")
        bias = _array(bias, "bias", (m.d_out,), m.x.dtype)
    if out is not None:
        inputs = {"x": x, "routing_weights": routing_weights, "weight": weight, "bias": bias}
        inputs |= {f"lora_A[{e}]": a for e, a in enumerate(lora_A)} | {f"lora_B[{e}]": b for e, b in enumerate(lora_B)}
        _check_out(out, (*m.tokens, m.d_out), m.x.dtype, inputs)

    y, hidden = _forward(m, bias)
    if out is None:
        out = np.empty(y.shape, m.x.dtype)
    out[...] = y
    return out, hidden.astype(m.x.dtype)


@np.errstate(invalid="ignore", over="ignore")
def routed_lora_backward(
    grad_y: Array,
    x: Array,
    hidden: Array,
    lora_A: Sequence[Array],
    lora_B: Sequence[Array],
    routing_weights: Array,
    scaling: SupportsFloat | Sequence[SupportsFloat],
    *,
    weight: Array | None = None,
    top_k: SupportsIndex | None = None,
    need: Iterable[str] = GRADS,
) -> RoutedLoraGrads:
    """`moelora.functional.routed_lora_backward` in plain NumPy."""
    need = _check_need(need)
    m = _Mixture(x, lora_A, lora_B, routing_weights, scaling, weight, top_k)
    grad_y = _array(grad_y, "grad_y", (*m.tokens, m.d_out), m.x.dtype)
    hidden = _array(hidden, "hidden", (*m.tokens, sum(a.shape[0] for a in m.A)), m.x.dtype)
    grad_x, grad_A, grad_B, grad_w = _backward(m, grad_y, hidden)
    # [N] and [B, N] weights served many tokens: their gradient is the sum over those
    grad_w = grad_w.sum(tuple(range(routing_weights.ndim - 1, m.x.ndim - 1)))
    return RoutedLoraGrads(
        grad_x.astype(m.x.dtype) if "x" in need else None,
        [a.astype(m.x.dtype) for a in grad_A] if "lora_A" in need else None,
        [b.astype(m.x.dtype) for b in grad_B] if "lora_B" in need else None,
        grad_w.astype(m.x.dtype) if "routing_weights" in need else None,
    )


def route(
    logits: Array,
    *,
    top_k: SupportsIndex | None = None,
    temperature: SupportsFloat = 1.0,
    renormalize: bool = True,
    mask: NDArray[np.bool_] | None = None,
) -> Routing:
    """`moelora.functional.route` in plain NumPy."""
    logits, temperature, counted = _check_routing(logits, temperature, mask)
    k = _check_top_k(top_k, logits.shape[-1])

    p = _softmax(logits, temperature)
    kept, indices, weights = np.ones(p.shape, np.bool_), None, p
    if top_k is not None:
        # By the logits, of which rounding makes none equal to another; a NaN row picks its first k.
        indices = np.argsort(-np.where(np.isnan(p), p, logits), axis=-1, kind="stable")[..., :k]
        kept = np.zeros(p.shape, np.bool_)
        np.put_along_axis(kept, indices, True, axis=-1)
        norm = np.where(kept, p, 0.0).sum(-1, keepdims=True) if renormalize else 1.0
        weights = np.where(kept, p / norm, 0.0)
    return Routing(
        weights.astype(logits.dtype),
        indices,
        kept[counted].sum(0, dtype=np.int64),
        p[counted].sum(0).astype(logits.dtype),
    )


def route_backward(
    grad_weights: Array,
    logits: Array,
    indices: NDArray[np.int64] | None,
    *,
    temperature: SupportsFloat = 1.0,
    renormalize: bool = True,
    mask: NDArray[np.bool_] | None = None,
    grad_prob_sums: Array | None = None,
) -> Array:
    """`moelora.functional.route_backward` in plain NumPy."""
    logits, temperature, counted = _check_routing(logits, temperature, mask)
    grad_p = _array(grad_weights, "grad_weights", logits.shape, logits.dtype).astype(np.float64)
    if indices is not None:
        indices = _check_indices(indices, logits.shape)
    if grad_prob_sums is not None:
        grad_prob_sums = _array(grad_prob_sums, "grad_prob_sums", logits.shape[-1:], logits.dtype)

    p = _softmax(logits, temperature)
    if indices is not None:
        g, p_kept = np.take_along_axis(grad_p, indices, -1), np.take_along_axis(p, indices, -1)
        if renormalize:
            norm = p_kept.sum(-1, keepdims=True)
            g = (g - (g * (p_kept / norm)).sum(-1, keepdims=True)) / norm
        grad_p = np.zeros(p.shape)
        np.put_along_axis(grad_p, indices, g, axis=-1)
    if grad_prob_sums is not None:
        grad_p[counted] += grad_prob_sums
    grad = p * (grad_p - (grad_p * p).sum(-1, keepdims=True)) / temperature
    return np.asarray(grad.astype(logits.dtype))


def _softmax(logits: Array, temperature: float) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):  # a row with NaN or +inf, or of nothing but -inf, becomes NaN
        rows = logits.astype(np.float64)
        e = np.exp((rows - rows.max(-1, keepdims=True)) / temperature)
        return np.asarray(e / e.sum(-1, keepdims=True))


class _Mixture:
    """The checked arguments that forward and backward share."""

    def __init__(
        self,
        x: Array,
        lora_A: Sequence[Array],
        lora_B: Sequence[Array],
        routing_weights: Array,
        scaling: SupportsFloat | Sequence[SupportsFloat],
        weight: Array | None,
        top_k: SupportsIndex | None,
    ) -> None:
        self.x = _array(x, "x")
        dtype = self.x.dtype
        if self.x.ndim not in (2, 3) or self.x.shape[-1] == 0:
            raise ValueError(f"x must have shape [T, d_in] or [B, S, d_in] with d_in > 0, got {self.x.shape}")
        self.tokens = self.x.shape[:-1]
        self.d_in = self.x.shape[-1]

        self.n_experts = len(_sequence(lora_A, "lora_A"))
        if self.n_experts == 0:
            raise ValueError("lora_A must hold at least one array, got none")
        if len(_sequence(lora_B, "lora_B")) != self.n_experts:
            raise ValueError(f"lora_B must hold {self.n_experts} arrays, as many as lora_A, got {len(lora_B)}")
        self.A = [_array(a, f"lora_A[{e}]", ("r", self.d_in), dtype) for e, a in enumerate(lora_A)]
        first_B = _array(lora_B[0], "lora_B[0]", ("d_out", self.A[0].shape[0]), dtype)
        self.d_out = first_B.shape[0]
        self.B = [_array(b, f"lora_B[{e}]", (self.d_out, self.A[e].shape[0]), dtype) for e, b in enumerate(lora_B)]
        self.weight = None if weight is None else _array(weight, "weight", (self.d_out, self.d_in), dtype)
        self.scaling = _scalings(scaling, self.n_experts, dtype)

        weights = _array(routing_weights, "routing_weights", None, dtype)
        allowed = [(self.n_experts,), (*self.tokens, self.n_experts)]
        if self.x.ndim == 3:
            allowed.insert(1, (self.x.shape[0], self.n_experts))
        if weights.shape not in allowed:
            *first, last = (str(list(shape)) for shape in allowed)
            expected = f"{', '.join(first)} or {last}"
            raise ValueError(f"routing_weights must have shape {expected}, got {weights.shape}")
        if weights.ndim == 2 and self.x.ndim == 3:
            weights = weights[:, None, :]
        kept = _largest(weights, _check_top_k(top_k, self.n_experts))
        self.kept = np.broadcast_to(kept, (*self.tokens, self.n_experts))
        self.weights = np.where(self.kept, weights.astype(np.float64), 0.0)


class _Dropout(NamedTuple):
    """The masks of the C core: see csrc/core/kernels/philox.h."""

    seed: int
    probabilities: Sequence[float]

    def factors(self, expert: int, tokens: tuple[int, ...], d_in: int) -> NDArray[np.float64]:
        """[*tokens, d_in]: what the expert's x is multiplied by, 0 where it is dropped."""
        token = np.arange(math.prod(tokens), dtype=np.uint64)[:, None]
        lanes = np.arange(-(-d_in // 128) * 16, dtype=np.uint64)
        counter = (lanes, token & _LOW, token >> _32, np.uint64(expert))
        words = np.stack(np.broadcast_arrays(*_philox(counter, self.seed)), -1).astype("<u4")  # [T, 16 per group, 4]
        drawn = words.view("<u2").reshape(len(token), -1, 16, 8)  # a word's low half comes first
        drawn = drawn.swapaxes(-1, -2).reshape(len(token), -1)[:, :d_in]
        p = self.probabilities[expert]
        threshold = math.floor(p * 2**16 + 0.5) if p == 1 else min(math.floor(p * 2**16 + 0.5), 2**16 - 1)
        # Not a Python integer: NumPy 2.0 may crash where one is beyond uint16, as 2^16 is.
        factors = np.where(drawn >= np.uint32(threshold), 2**16 / max(2**16 - threshold, 1), 0.0)
        return factors.reshape(*tokens, d_in)


_32, _LOW = np.uint64(32), np.uint64(2**32 - 1)


def _philox(counter: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Philox4x32 with 7 rounds: four words, each an array of numbers below 2^32 as the counter's are."""
    c0, c1, c2, c3 = counter
    for i in range(7):
        key = (np.uint64(((seed >> shift) + i * step) % 2**32) for shift, step in ((0, 0x9E3779B9), (32, 0xBB67AE85)))
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = p1 >> _32 ^ c1 ^ next(key), p1 & _LOW, p0 >> _32 ^ c3 ^ next(key), p0 & _LOW
    return c0, c1, c2, c3


def _forward(m: _Mixture, bias: Array | None, dropout: _Dropout | None = None) -> tuple[Any, Any]:
    """y and hidden, in float64."""
    x = m.x.astype(np.float64)
    y = np.zeros((*m.tokens, m.d_out))
    if m.weight is not None:
        y += x @ m.weight.T.astype(np.float64)
    if bias is not None:
        y += bias
    hidden = []
    for e in range(m.n_experts):
        seen = x if dropout is None else x * dropout.factors(e, m.tokens, m.d_in)
        h = np.where(m.kept[..., e, None], seen @ m.A[e].T.astype(np.float64), 0.0)
        y += (m.scaling[e] * m.weights[..., e, None] * h) @ m.B[e].T.astype(np.float64)
        hidden.append(h)
    return y, np.concatenate(hidden, axis=-1)


def _backward(
    m: _Mixture, grad_y: Array, hidden: Array, dropout: _Dropout | None = None
) -> tuple[Any, list[Any], list[Any], Any]:
    """Gradients of x, lora_A, lora_B and each token's routing weights, in float64."""
    x, g = m.x.astype(np.float64), grad_y.astype(np.float64)
    flat_g = g.reshape(-1, m.d_out)
    grad_x = np.zeros(m.x.shape) if m.weight is None else g @ m.weight.astype(np.float64)
    grad_A, grad_B, grad_w = [], [], np.zeros((*m.tokens, m.n_experts))
    first = 0
    for e in range(m.n_experts):
        rank = m.A[e].shape[0]
        h = hidden[..., first : first + rank].astype(np.float64)
        first += rank
        p = g @ m.B[e].astype(np.float64)
        sw = m.scaling[e] * m.weights[..., e, None]
        factors = 1.0 if dropout is None else dropout.factors(e, m.tokens, m.d_in)
        grad_x += factors * ((sw * p) @ m.A[e].astype(np.float64))
        grad_A.append((sw * p).reshape(-1, rank).T @ (factors * x).reshape(-1, m.d_in))
        grad_B.append(flat_g.T @ (sw * h).reshape(-1, rank))
        grad_w[..., e] = np.where(m.kept[..., e], m.scaling[e] * (p * h).sum(-1), 0.0)
    return grad_x, grad_A, grad_B, grad_w


def _largest(weights: Array, k: int) -> NDArray[np.bool_]:
    """Where the k largest of the last axis are: ties go to the lower index, and a NaN counts as the largest."""
    falling = np.lexsort((-weights, ~np.isnan(weights)), axis=-1)
    kept = np.zeros(weights.shape, np.bool_)
    np.put_along_axis(kept, falling[..., :k], True, axis=-1)
    return kept


def _array(value: Any, name: str, shape: tuple[int | str, ...] | None = None, dtype: Any = None) -> Array:
    """Check an array argument. A number in `shape` is wanted exactly, a name stands for any number but 0."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy array of float32 or float64, got {type(value).__name__}")
    if value.dtype not in (np.float32, np.float64) or not value.dtype.isnative:
        raise TypeError(f"{name} must be a NumPy array of float32 or float64 in native byte order, got {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} like the other arrays, got {value.dtype}")
    if shape is not None:
        matches = [n > 0 if isinstance(want, str) else n == want for n, want in zip(value.shape, shape, strict=False)]
        if value.ndim != len(shape) or not all(matches):
            expected = ", ".join(f"{want} > 0" if isinstance(want, str) else str(want) for want in shape)
            raise ValueError(f"{name} must have shape [{expected}], got {value.shape}")
    return np.asarray(value)  # np.matrix would multiply differently


def _sequence(value: Any, name: str) -> Any:
    if not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{name} must be a sequence of arrays, got {type(value).__name__}")
    return value


def _real(value: Any, name: str) -> float:
    refusal = TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if isinstance(value, str | bytes) or np.iscomplexobj(value):
        raise refusal
    try:
        return float(value)
    except TypeError:
        raise refusal from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer beyond every float") from None


def _scalings(scaling: Any, n_experts: int, dtype: Any) -> list[float]:
    many = isinstance(scaling, Sequence) and not isinstance(scaling, str | bytes) or getattr(scaling, "ndim", 0) > 0
    given = list(scaling) if many else [scaling] * n_experts
    if len(given) != n_experts:
        raise ValueError(f"scaling must be a real number or {n_experts} of them, one per expert, got {len(given)}")
    numbers = []
    for e, value in enumerate(given):
        numbers.append(_real(value, f"scaling[{e}]" if many else "scaling"))
        if not abs(numbers[e]) <= np.finfo(dtype).max:
            raise ValueError(f"scaling[{e}] must be finite in {dtype}, got {numbers[e]}")
    return numbers


def _check_top_k(top_k: Any, n_experts: int) -> int:
    if top_k is None:
        return n_experts
    refusal = TypeError(f"top_k must be None or an integer in [1, {n_experts}], got {type(top_k).__name__}")
    if isinstance(top_k, bool | np.bool_):
        raise refusal
    try:
        k = operator.index(top_k)
    except TypeError:
        raise refusal from None
    if not 1 <= k <= n_experts:
        raise ValueError(f"top_k must be None or an integer in [1, {n_experts}], got {k}")
    return k


def _check_routing(logits: Any, temperature: Any, mask: Any) -> tuple[Array, float, NDArray[np.bool_]]:
    """Check what `route` and its backward share; the mask comes back whole, True where the token counts."""
    logits = _array(logits, "logits")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., N] with N > 0, got {logits.shape}")
    temperature = _real(temperature, "temperature")
    if not 0 < temperature <= np.finfo(np.float64).max:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if mask is None:
        return logits, temperature, np.ones(logits.shape[:-1], np.bool_)
    if not isinstance(mask, np.ndarray) or isinstance(mask, np.ma.MaskedArray):
        raise TypeError(f"mask must be a NumPy array of bool, got {type(mask).__name__}")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be a NumPy array of bool, got {mask.dtype}")
    if mask.shape != logits.shape[:-1]:
        raise ValueError(f"mask must have shape {logits.shape[:-1]}, got {mask.shape}")
    return logits, temperature, np.asarray(mask)


def _check_indices(indices: Any, shape: tuple[int, ...]) -> NDArray[np.int64]:
    if not isinstance(indices, np.ndarray) or isinstance(indices, np.ma.MaskedArray):
        raise TypeError(f"indices must be None or a NumPy array of int64, got {type(indices).__name__}")
    if indices.dtype != np.int64 or not indices.dtype.isnative:
        raise TypeError(f"indices must be None or a NumPy array of int64, got {indices.dtype}")
    n = shape[-1]
    if indices.ndim != len(shape) or indices.shape[:-1] != shape[:-1] or not 1 <= indices.shape[-1] <= n:
        raise ValueError(f"indices must have shape {shape[:-1]} + (k,) with k in [1, {n}], got {indices.shape}")
    if indices.size and not 0 <= indices.min() <= indices.max() < n:
        raise ValueError(f"indices must lie in [0, {n}), got {indices.min()} to {indices.max()}")
    return np.asarray(indices)


def _check_need(need: Any) -> tuple[str, ...]:
    if isinstance(need, str) or not isinstance(need, Iterable):
        raise TypeError(f"need must be a collection of names of {GRADS}, got {type(need).__name__}")
    names = tuple(need)
    for name in names:
        if name not in GRADS:
            raise ValueError(f"need takes names of {GRADS}, got {name!r}")
    return names


def _check_out(out: Any, shape: tuple[int, ...], dtype: Any, inputs: dict[str, Any]) -> None:
    _array(out, "out", shape, dtype)
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if not out.flags.aligned:
        raise ValueError("out must be aligned, got an unaligned array")
    if out.size == 0:
        return
    reach = 0  # bytes from the first to the last element along the axes seen so far, by growing stride
    for stride, n in sorted((abs(s), n) for s, n in zip(out.strides, out.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ValueError(f"out must not overlap itself, got strides {out.strides} for shape {out.shape}")
        reach += stride * (n - 1)
    for name, value in inputs.items():
        if value is not None and np.shares_memory(out, value):
            raise ValueError(f"out must not overlap {name}")
