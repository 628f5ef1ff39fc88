"""The arguments of `routed_lora`, checked, with errors that name them."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Call", "autocast_enabled", "check_call", "read_probabilities"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LARGEST = torch.finfo(torch.float32).max


class Call(NamedTuple):
    """The arguments of `routed_lora`, checked, in their final dtypes."""

    x: Tensor
    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]
    routing_weights: Tensor
    scaling: tuple[float, ...]
    base_output: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    top_k: int | None
    dropout_p: tuple[float, ...]

    @property
    def ranks(self) -> list[int]:
        return [a.shape[0] for a in self.lora_A]


def check_call(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: float | Sequence[float],
    base_output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    top_k: int | None,
    dropout_p: float | Sequence[float],
) -> Call:
    """Refuse what `routed_lora` does not take; return the arguments in their final dtypes, sequences as tuples."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        raise _wrong("x", x, _FLOATS)
    kind = x.device.type
    if x.dtype is not torch.float64 and autocast_enabled(kind):
        to = torch.get_autocast_dtype(kind)
        x = x.to(to)
        base_output, weight, bias = (t.to(to) if isinstance(t, Tensor) else t for t in (base_output, weight, bias))
    shape, dtype = x.shape, x.dtype
    tokens, d_in = shape[:-1], shape[-1] if shape else 0
    if not tokens or not d_in:
        raise ValueError(f"x must have shape [..., tokens, d_in] with d_in > 0, got {tuple(shape)}")

    for name, adapters in (("lora_A", lora_A), ("lora_B", lora_B)):
        if isinstance(adapters, Tensor) or not hasattr(adapters, "__iter__"):
            raise TypeError(f"{name} must be a sequence of tensors, one per expert, got {type(adapters).__name__}")
    factors_A, factors_B = list(lora_A), list(lora_B)
    n = len(factors_A)
    if not n or len(factors_B) != n:
        raise ValueError(f"lora_A and lora_B must hold one tensor per expert, got {n} and {len(factors_B)}")
    dtypes, d_out = (dtype, torch.float32), 0
    for e, (a, b) in enumerate(zip(factors_A, factors_B, strict=True)):
        if not isinstance(a, Tensor) or a.dtype not in dtypes:
            a = factors_A[e] = _in_float32(f"lora_A[{e}]", a)
        if not isinstance(b, Tensor) or b.dtype not in dtypes:
            b = factors_B[e] = _in_float32(f"lora_B[{e}]", b)
        a_shape, b_shape = a.shape, b.shape
        if len(a_shape) != 2 or a_shape[1] != d_in or not a_shape[0]:
            raise ValueError(f"lora_A[{e}] must have shape [rank, {d_in}] with rank > 0, got {tuple(a_shape)}")
        if len(b_shape) != 2 or b_shape[1] != a_shape[0] or not b_shape[0] or (e and b_shape[0] != d_out):
            rows = d_out if e else "d_out > 0"
            raise ValueError(f"lora_B[{e}] must have shape [{rows}, {a_shape[0]}], got {tuple(b_shape)}")
        d_out = b_shape[0]

    if not isinstance(routing_weights, Tensor) or routing_weights.dtype not in _FLOATS + _INTEGERS:
        raise _wrong("routing_weights", routing_weights, _FLOATS + _INTEGERS)
    if routing_weights.dtype not in _FLOATS:
        routing_weights = routing_weights.to(dtype)
    shapes = {1: (n,), 1 + len(tokens): (*tokens, n)}  # by the number of axes
    if len(tokens) == 2:
        shapes[2] = (tokens[0], n)
    if routing_weights.shape != shapes.get(routing_weights.dim()):
        raise ValueError(
            f"routing_weights must have shape {' or '.join(map(str, shapes.values()))} for {n} experts and x of shape "
            f"{tuple(shape)}, got {tuple(routing_weights.shape)}"
        )

    if base_output is not None:
        if weight is not None:
            raise ValueError("base_output and weight can't be given together: both say what the base is")
        if not isinstance(base_output, Tensor) or base_output.dtype is not dtype:
            raise _wrong("base_output", base_output, (dtype,))
        if base_output.shape != (*tokens, d_out):
            raise ValueError(f"base_output must have shape {(*tokens, d_out)}, got {tuple(base_output.shape)}")
    if bias is not None and weight is None:
        raise ValueError("bias needs weight: the two are the base layer")
    for name, frozen, expected in (("weight", weight, (d_out, d_in)), ("bias", bias, (d_out,))):
        if frozen is None:
            continue
        if not isinstance(frozen, Tensor) or frozen.dtype is not dtype:
            raise _wrong(name, frozen, (dtype,))
        if frozen.shape != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(frozen.shape)}")
        if frozen.requires_grad:
            raise ValueError(f"{name} must not require grad, it is frozen here: compute the base, pass base_output")

    if top_k is not None:
        if not isinstance(top_k, Integral) or isinstance(top_k, bool):
            raise TypeError(f"top_k must be an integer or None, got {type(top_k).__name__}")
        if not 1 <= top_k <= n:
            raise ValueError(f"top_k must lie in [1, {n}], the number of experts, got {top_k}")
        top_k = int(top_k) if top_k < n else None
    scales = _numbers("scaling", scaling, n)
    if dtype is not torch.float64 and max(map(abs, scales)) > _LARGEST:
        raise ValueError(f"scaling must be finite in float32, got {scaling!r}")
    drops = read_probabilities(dropout_p, n)
    factors = tuple(factors_A), tuple(factors_B)
    return Call(x, *factors, routing_weights, scales, base_output, weight, bias, top_k, drops)


def read_probabilities(dropout_p: Any, n: int) -> tuple[float, ...]:
    if type(dropout_p) is float and not dropout_p:
        return (0.0,) * n
    probabilities = _numbers("dropout_p", dropout_p, n)
    if min(probabilities) < 0 or max(probabilities) > 1:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p!r}")
    return probabilities


def autocast_enabled(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta


def _numbers(name: str, value: Any, n: int) -> tuple[float, ...]:
    """A finite real number, or n of them, as n floats."""
    single = type(value) is float or isinstance(value, Real)  # isinstance asks an abstract class, which is slow
    many = not single and not isinstance(value, Tensor) and hasattr(value, "__iter__") and getattr(value, "ndim", 1) > 0
    values = (value,) if not many else tuple(value)
    if not all(type(v) is float or isinstance(v, Real) for v in values):
        raise TypeError(f"{name} must be a real number or a sequence of {n} of them, got {value!r}")
    try:
        numbers = tuple(map(float, values))
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer beyond every float") from None
    if not all(-math.inf < v < math.inf for v in numbers):  # math.isfinite would break the graph of torch.compile
        raise ValueError(f"{name} must be finite, got {value!r}")
    if single:
        return numbers * n
    if len(numbers) != n:
        raise ValueError(f"{name} must be a real number or a sequence of {n} of them, got {len(numbers)}")
    return numbers


def _in_float32(name: str, adapter: Any) -> Tensor:
    """An adapter whose dtype is neither x's nor float32, in float32, where 16 bits keep their values."""
    if not isinstance(adapter, Tensor) or adapter.dtype not in _FLOATS:
        raise _wrong(name, adapter, _FLOATS)
    return adapter.float()


def _wrong(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> TypeError:
    """The error for something that is not a tensor of one of these dtypes."""
    if not isinstance(value, Tensor):
        return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return TypeError(f"{name} must be of dtype {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {value.dtype}")
