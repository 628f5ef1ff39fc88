"""`routed_lora` for torch: the C core under autograd on CPU, a stacked formula in torch operations everywhere else."""

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from moelora import runtime
from moelora.functional import HAS_EXT
from moelora.nn.compiled import call_operator, columns, is_operator
from moelora.nn.cuda import on_gpu
from moelora.nn.dropout import draw_seed, dropped_grads, dropped_linear

if HAS_EXT:
    from moelora import _core

    _are_plain, _plain_call = _core.are_plain, _core.plain_call

    def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")

    def _empty_cuda(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")

    # The same without a dispatch, which is what torch.compile's own code allocates with.
    _empty = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", _empty)
    _empty_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_cuda)
    _dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if not _core.use_torch(Tensor, torch.nn.Parameter, _empty, _empty_cuda, torch.empty_like, F.linear, *_dtypes):
        warnings.warn(
            f"torch {torch.__version__} has no DLPack C exchange API that moelora knows; plain torch is used, which is "
            "slow",
            RuntimeWarning,
            stacklevel=2,
        )

__all__ = ["routed_lora", "routed_lora_formula", "uses_core"]

# Away from the CPU, float32 adapters over a bfloat16 or float16 x are rounded to x's dtype for the two products, which
# then run on tensor cores; False computes those in float32.
ROUND_ADAPTERS = True

_ACCUMULATE_X = 1  # ML_ACCUMULATE_X of moelora.h

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


_Dropout: TypeAlias = tuple[int, tuple[float, ...]]
"""The seed of the masks and the experts' probabilities."""

_Settings: TypeAlias = tuple[tuple[float, ...], int | None, _Dropout | None, int | None]
"""scaling, top_k, dropout, and the sum of the ranks where the call is plain (`plain_call`), else None."""


class _Call(NamedTuple):
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


def routed_lora(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: float | Sequence[float],
    *,
    base_output: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    top_k: int | None = None,
    dropout_p: float | Sequence[float] = 0.0,
) -> Tensor:
    r"""Mix N LoRA experts over one base layer, in one pass.

    .. math:: y = base + \sum_e s_e \, w_e * (x A_e^T) B_e^T

    Differentiable once in `x`, `lora_A`, `lora_B`, `routing_weights` and `base_output`. Every gradient is in the dtype
    and shape of its tensor, and a zero tensor, not None, for an expert that no token uses. Plain CPU tensors run in
    the C core, which keeps for the backward x, x A^T, the weights and the adapters. bfloat16 and
    float16 on a GPU run in moelora's CUDA kernels, where those can run. torch.compile and torch.export see either as
    one operator, moelora::routed_lora. All others (meta, fake, traced, DTensor, subclasses, inside torch.func
    transforms) and empty inputs take `routed_lora_formula`.

    Parameters
    ----------
    x : Tensor [..., d_in]
        Two or more axes; float32, float64, bfloat16 or float16.
    lora_A, lora_B : sequences of N Tensors [r_e, d_in], [d_out, r_e]
        In x's dtype or float32; ranks may differ.
    routing_weights : Tensor
        [N]: one mixture for all tokens. [B, N], with x [B, S, d_in]: one per sequence. x.shape[:-1] + (N,): one per
        token. The number of axes decides, never the sizes. Any of x's dtypes, whichever x has; integers and bool are
        converted and get no gradient. NaN propagates.
    scaling : real number, or N of them
        Finite.
    base_output : Tensor [..., d_out], optional
        What the mixture is added to, in x's dtype; it is not modified.
    weight, bias : Tensor [d_out, d_in], [d_out], optional
        The frozen base layer in torch.nn.Linear's layout, in x's dtype; instead of `base_output`.
    top_k : int, optional
        Keep each token's k largest weights, ties to the lower index, without renormalising.
    dropout_p : real number in [0, 1], or N of them
        Every expert drops elements of x by its own mask, as in PEFT. The masks follow from a seed that each call draws
        from torch's CPU generator, so they are distributed as PEFT's, but not the same. No mask is kept: the backward
        computes it again. Probabilities are rounded to multiples of 2^-16. torch.compile, tracing and DTensor take
        torch's own dropout. Whether the model trains is the caller's business: p > 0 drops.

    Returns
    -------
    Tensor [..., d_out]
        In x's dtype. On CPU the mixture of a bfloat16 or float16 x is computed in float32, added to the base, and
        rounded once, whatever the adapters' dtype; with the instruction set "avx512bf16", bfloat16 adapters meet an H
        weighted and rounded to bfloat16, and sums are float32. Elsewhere float32 adapters are rounded to x's dtype
        unless `moelora.nn.autograd.ROUND_ADAPTERS` is False. Inside `torch.autocast` a float32, bfloat16 or float16 x,
        base_output, weight and bias are first cast to autocast's dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it got and what it takes.
    RuntimeError
        From the backward, when a tensor it needs was changed in place; from differentiating twice.

    Examples
    --------
    >>> import torch
    >>> from moelora.nn import routed_lora
    >>> x, A, B = torch.ones(3, 4), [torch.ones(2, 4)] * 2, [torch.ones(5, 2)] * 2
    >>> routed_lora(x, A, B, torch.tensor([0.25, 0.5]), 1.0)[0]
    tensor([6., 6., 6., 6., 6.])
    """
    plain: tuple[tuple[Tensor, ...], tuple[float, ...], int | None, bool] | None = None
    y: Tensor | None
    lead = torch.Size()
    if (top_k is None or (type(top_k) is int and top_k >= 1)) and _is_unwatched():
        # The plain case costs no more than a few looks from C. All that is unusual, or wrong, goes on below.
        plain = _plain_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
        if plain is not None and (torch._C._is_any_autocast_enabled() or (top_k or 0) > len(plain[1])):
            plain = None
        if plain is None and on_gpu(x) and not torch._C._is_any_autocast_enabled():
            y = _on_gpu(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
            if y is not None:
                return y
    if plain is None:
        call = _check(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
        if torch.compiler.is_compiling() and ROUND_ADAPTERS and is_operator(call):
            return call_operator(call)
        tensors = [t for t in (call.x, call.routing_weights, call.base_output, call.weight, call.bias) if t is not None]
        tensors += call.lora_A
        tensors += call.lora_B
        if not call.x.numel() or not uses_core(*tensors):
            y = _on_gpu(*call) if _is_unwatched() and on_gpu(call.x) else None
            return _formula(call) if y is None else y
        x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p = call
        if x.dim() > 3:
            lead = x.shape[:-2]
            x = x.flatten(0, -3)
            routing_weights = routing_weights.flatten(0, -3) if routing_weights.dim() > 1 else routing_weights
            base_output = None if base_output is None else base_output.flatten(0, -3)
        # What these dtypes, autocast's among them, and axes make of it may be plain.
        plain = _plain_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
        plain = plain or ((*lora_A, *lora_B), call.scaling, None, any(t.requires_grad for t in tensors))

    adapters, scales, total_rank, needs_grad = plain
    settings = (
        scales,
        None if top_k == len(scales) else top_k,
        _draw(_probabilities(dropout_p, len(scales))),
        total_rank,
    )
    if needs_grad and torch.is_grad_enabled():
        y = _apply(x, routing_weights, base_output, (weight, bias), settings, *adapters)
    else:
        y, _ = _core_forward(x, routing_weights, base_output, (weight, bias), settings, adapters, keep_hidden=False)
    return y.unflatten(0, lead) if lead else y


def routed_lora_formula(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    routing_weights: Tensor,
    scaling: float | Sequence[float],
    *,
    base_output: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    top_k: int | None = None,
    dropout_p: float | Sequence[float] = 0.0,
) -> Tensor:
    """The same as `routed_lora`, in torch operations on any device: A and B stacked, one product, scaled, one addmm.

    Parameters, result and errors are those of `routed_lora`.
    """
    return _formula(_check(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p))


def uses_core(*tensors: Tensor) -> bool:
    """Whether the C core may read these real tensors by pointer, here and now.

    True for plain dense CPU tensors and parameters while nothing watches or rewrites torch operations (compile, export,
    tracing, torch.func transforms, forward-mode derivatives, dispatch and function modes).
    """
    return _is_unwatched() and bool(_are_plain(*tensors))


def _is_unwatched() -> bool:
    """Whether there is a C core, and nothing watches or rewrites torch operations in this thread."""
    if torch.compiler.is_compiling() or not HAS_EXT:
        return False
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    # torch.set_default_device is a function mode, and concerns no operation that the core replaces.
    return not torch._C._len_torch_function_stack() or all(
        type(mode) is DeviceContext for mode in torch.overrides._get_current_function_mode_stack()
    )


def _check(
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
) -> _Call:
    """Refuse what `routed_lora` does not take; return the arguments in their final dtypes, sequences as tuples."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        raise _wrong("x", x, _FLOATS)
    kind = x.device.type
    if x.dtype is not torch.float64 and _autocast_enabled(kind):
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
    lora_A, lora_B = tuple(lora_A), tuple(lora_B)
    n = len(lora_A)
    if not n or len(lora_B) != n:
        raise ValueError(f"lora_A and lora_B must hold one tensor per expert, got {n} and {len(lora_B)}")
    dtypes, d_out = (dtype, torch.float32), 0
    for e, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        if not isinstance(a, Tensor) or a.dtype not in dtypes:
            raise _wrong(f"lora_A[{e}]", a, dtypes)
        if not isinstance(b, Tensor) or b.dtype not in dtypes:
            raise _wrong(f"lora_B[{e}]", b, dtypes)
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
    drops = _probabilities(dropout_p, n)
    return _Call(x, lora_A, lora_B, routing_weights, scales, base_output, weight, bias, top_k, drops)


def _probabilities(dropout_p: Any, n: int) -> tuple[float, ...]:
    if type(dropout_p) is float and not dropout_p:
        return (0.0,) * n
    probabilities = _numbers("dropout_p", dropout_p, n)
    if min(probabilities) < 0 or max(probabilities) > 1:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p!r}")
    return probabilities


def _draw(probabilities: tuple[float, ...]) -> _Dropout | None:
    return (int(draw_seed()), probabilities) if any(probabilities) else None


def _autocast_enabled(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta


def _numbers(name: str, value: Any, n: int) -> tuple[float, ...]:
    """A finite real number, or n of them, as n floats."""
    single = type(value) is float or isinstance(value, Real)  # isinstance asks an abstract class, which is slow
    many = not single and not isinstance(value, Tensor) and hasattr(value, "__iter__")
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


def _wrong(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> TypeError:
    """The error for something that is not a tensor of one of these dtypes."""
    if not isinstance(value, Tensor):
        return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return TypeError(f"{name} must be of dtype {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {value.dtype}")


def _formula(call: _Call) -> Tensor:
    x, kind = call.x, call.x.device.type
    for name, value in zip(call._fields, call, strict=True):
        for e, t in enumerate(value if isinstance(value, tuple) else (value,)):
            if not isinstance(t, Tensor) or (t.device == x.device and t.layout is torch.strided):
                continue
            place = f"{name}[{e}]" if isinstance(value, tuple) else name
            if t.device != x.device:
                raise ValueError(f"{place} must be on {x.device} as x is, got {t.device}")
            raise TypeError(f"{place} must be a dense tensor, got {t.layout}")
    if _autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # the dtypes are chosen by now
            return _formula(call)
    dtype, ranks, w = x.dtype, call.ranks, call.routing_weights
    adapters = (*call.lora_A, *call.lora_B)
    if kind == "cpu" or (not ROUND_ADAPTERS and any(t.dtype is torch.float32 for t in adapters)):
        dtype = _core_dtype(dtype)
    a, b = torch.cat(call.lora_A), torch.cat(call.lora_B, 1)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch._C._is_tracing():
        x, w, a, b = _Once.apply(x, w, a, b)  # type: ignore[no-untyped-call]
    a, b = a.to(dtype), b.to(dtype)

    wide = x.to(dtype)
    hidden = dropped_linear(wide, a, ranks, call.dropout_p) if any(call.dropout_p) else F.linear(wide, a)
    mixed = _mix(hidden, w, ranks, call.scaling, call.top_k)
    base = call.base_output if call.weight is None else F.linear(x, call.weight, call.bias)
    if base is None:
        y = F.linear(mixed, b)
    else:
        y = torch.addmm(base.to(dtype).flatten(0, -2), mixed.flatten(0, -2), b.t()).reshape(base.shape)
    return y.to(x.dtype)


def _mix(
    hidden: Tensor, routing_weights: Tensor, ranks: Sequence[int], scaling: Sequence[float], top_k: int | None
) -> Tensor:
    """s_e w_e * H_e for all experts: [..., R] in hidden's dtype, 0 where top_k drops the expert."""
    n = len(ranks)
    w = routing_weights.to(_core_dtype(hidden.dtype))
    if 1 < w.dim() < hidden.dim():  # one mixture per sequence
        w = w.unsqueeze(1)
    kept = None
    if top_k is not None:
        places = w.detach().argsort(dim=-1, descending=True, stable=True).argsort(-1)
        kept = places < top_k
        w = w.masked_fill(~kept, 0)
    if min(scaling) == max(scaling):
        w = w * scaling[0]
    else:
        w = torch.cat([w_e * s for w_e, s in zip(w.split(1, -1), scaling, strict=True)], -1)

    equal = min(ranks) == max(ranks)

    def spread(t: Tensor) -> Tensor:
        """[..., N] -> [..., N, 1], or [..., R] where ranks differ."""
        if equal:
            return t.unsqueeze(-1)
        columns = zip(t.split(1, -1), ranks, strict=True)
        return torch.cat([column.expand(*t.shape[:-1], rank) for column, rank in columns], -1)

    rows: Tensor = hidden.unflatten(-1, (n, ranks[0])) if equal else hidden
    if kept is not None:
        rows = rows.masked_fill(~spread(kept), 0)
    return (rows * spread(w)).to(hidden.dtype).reshape(hidden.shape)


def _core_forward(
    x: Tensor,
    routing_weights: Tensor,
    base_output: Tensor | None,
    frozen: tuple[Tensor | None, Tensor | None],
    settings: _Settings,
    adapters: tuple[Tensor, ...],
    *,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """y in x's dtype, and hidden in the core's where it is wanted; x has two or three axes."""
    scaling, top_k, dropout, total_rank = settings
    weight, bias = frozen
    threads = runtime.get_num_threads()
    if total_rank is not None:
        kept_rank = total_rank if keep_hidden else 0
        plain: tuple[Tensor, Tensor | None] = _core.forward_tensors(
            x, adapters, routing_weights, scaling, base_output, weight, bias, dropout, kept_rank, top_k or 0, threads
        )
        return plain
    n, d_out = len(scaling), adapters[-1].shape[0]
    ranks, dtype = [a.shape[0] for a in adapters[:n]], _core_dtype(x.dtype)
    if weight is None:
        y, base = torch.empty((*x.shape[:-1], d_out), dtype=dtype, device="cpu"), base_output
    else:
        y = base = _as(dtype, F.linear(x, weight, bias))
    hidden = torch.empty((*x.shape[:-1], sum(ranks)), dtype=dtype, device="cpu") if keep_hidden else None
    # Converted copies live in these names until the core returns.
    c_x, c_w, *c_adapters = [_as(dtype, t) for t in (x, routing_weights, *adapters)]
    c_base = None if base is None else _as(dtype, base)
    views = [_matrix(t) for t in c_adapters]
    _core.forward_raw(
        int(dtype is torch.float64),
        (*_batch_and_seq(x), x.shape[-1], d_out),
        _tokens(c_x),
        views[:n],
        views[n:],
        ranks,
        _weights(c_w, x.dim()),
        scaling,
        None if c_base is None else _tokens(c_base),
        _tokens(y),
        None if hidden is None else _tokens(hidden),
        top_k or 0,
        threads,
        dropout,
    )
    return _as(x.dtype, y), hidden


def _forward_and_save(
    forward: Callable[..., tuple[Tensor, Tensor | None]],
    ctx: Any,
    x: Tensor,
    routing_weights: Tensor,
    base_output: Tensor | None,
    frozen: tuple[Tensor | None, Tensor | None],
    settings: _Settings,
    adapters: tuple[Tensor, ...],
) -> Tensor:
    """y, with what the backward of a node needs kept in its ctx."""
    n, need = len(settings[0]), ctx.needs_input_grad
    keep_hidden = need[1] or True in need[-n:]
    y, hidden = forward(x, routing_weights, base_output, frozen, settings, adapters, keep_hidden=keep_hidden)
    ctx.settings = settings[:3]
    kept_x = x if True in need[-2 * n : -n] else None
    ctx.save_for_backward(kept_x, hidden, routing_weights, frozen[0] if need[0] else None, *adapters)
    return y


class _RoutedLoRA(torch.autograd.Function):
    """The C core under autograd: what may need a gradient, the frozen base, settings; adapters last, A before B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing_weights: Tensor,
        base_output: Tensor | None,
        frozen: tuple[Tensor | None, Tensor | None],
        settings: _Settings,
        *adapters: Tensor,
    ) -> Tensor:
        return _forward_and_save(_core_forward, ctx, x, routing_weights, base_output, frozen, settings, adapters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        need = ctx.needs_input_grad
        if not (need[0] or need[1] or True in need[_N_NODE:]):
            return (None, None, grad_y, *(None,) * (len(need) - 3))
        saved = ctx.saved_tensors  # once: checkpointing recomputes on every reading
        scaling, top_k, dropout = ctx.settings
        twice = torch.is_grad_enabled()  # create_graph
        if not twice and _is_unwatched():
            threads = runtime.get_num_threads()
            plain = _core.backward_tensors(saved, need, scaling, grad_y, dropout, top_k or 0, threads)
            if plain is not None:
                return plain
        if uses_core(grad_y, *saved):
            grads = _core_backward(ctx, saved, grad_y)
            if twice:
                grads = _refuse_twice(grads, [grad_y, *saved])
        elif twice:
            raise RuntimeError(_TWICE)
        else:
            grads = _formula_backward(ctx, saved, grad_y)
        return (*grads[:2], grad_y if need[2] else None, None, None, *grads[2:])


_N_NODE = 5  # arguments of the node before the adapters


# What Function.apply comes down to where no torch.func transform is active, which routed_lora has made sure of.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _RoutedLoRA).apply


def _core_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Tensor | None]:
    """Gradients of x, the routing weights and the adapters, None where not needed."""
    x, hidden, routing_weights, weight, *adapters = saved
    need_x, need_w, *_ = ctx.needs_input_grad
    need_adapters = ctx.needs_input_grad[-len(adapters) :]
    dtype, (scaling, top_k, dropout) = _core_dtype(grad_y.dtype), ctx.settings
    n, axes, d_in = len(scaling), grad_y.dim(), adapters[0].shape[1]
    wanted = zip((routing_weights, *adapters), (need_w, *need_adapters), strict=True)
    grad_w, *grad_adapters = [torch.empty_like(t, dtype=dtype) if needed else None for t, needed in wanted]
    grad_x = None
    if need_x:
        # Under autocast the product may come in another dtype.
        shape = (*grad_y.shape[:-1], d_in)
        grad_x = grad_y.new_empty(shape, dtype=dtype) if weight is None else (grad_y @ weight).to(dtype)
    # Converted copies live in these names until the core returns.
    c_grad_y, c_w, *c_adapters = [_as(dtype, t) for t in (grad_y, routing_weights, *adapters)]
    c_x = None if x is None else _as(dtype, x)
    views = [_matrix(t) for t in c_adapters]
    grad_views = [None if t is None else _matrix(t) for t in grad_adapters]
    _core.backward_raw(
        int(dtype is torch.float64),
        (*_batch_and_seq(grad_y), d_in, grad_y.shape[-1]),
        (0, 0, 0, 0) if c_x is None else _tokens(c_x),
        views[:n],
        views[n:],
        [a.shape[0] for a in adapters[:n]],
        _weights(c_w, axes),
        scaling,
        _tokens(c_grad_y),
        None if hidden is None else _tokens(hidden),
        None if grad_x is None else _tokens(grad_x),
        grad_views[:n],
        grad_views[n:],
        None if grad_w is None else _weights(grad_w, axes),
        top_k or 0,
        runtime.get_num_threads(),
        0 if weight is None else _ACCUMULATE_X,
        dropout,
    )
    inputs = zip((grad_x, grad_w, *grad_adapters), (grad_y, routing_weights, *adapters), strict=True)
    return [None if g is None else _as(t.dtype, g) for g, t in inputs]


def _formula_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Tensor | None]:
    """The same where no kernel can read grad_y: batched by vmap (is_grads_batched), a subclass, traced."""
    x, hidden, routing_weights, weight, *adapters = saved
    scaling, top_k, dropout = ctx.settings
    n = len(scaling)
    lora_A, lora_B = adapters[:n], adapters[n:]
    ranks, on_cpu = [a.shape[0] for a in lora_A], routing_weights.device.type == "cpu"
    dtype = _core_dtype(grad_y.dtype) if on_cpu else grad_y.dtype
    if hidden is None:  # then nothing below depends on its values
        hidden = routing_weights.new_zeros((*grad_y.shape[:-1], sum(ranks)), dtype=dtype)
    elif not on_cpu:
        parts = zip(hidden.split(columns(ranks), -1), ranks, strict=True)
        hidden = torch.cat([part[..., :rank] for part, rank in parts], -1)
    leaves = [t.detach().requires_grad_() for t in (hidden, routing_weights, *lora_B)]
    with torch.enable_grad():
        y = F.linear(_mix(leaves[0], leaves[1], ranks, scaling, top_k), torch.cat(leaves[2:], 1).to(dtype))
    grad_hidden, grad_w, *grad_B = torch.autograd.grad(y, leaves, grad_y.to(dtype))
    seed, dropout_p = dropout or (0, (0.0,) * n)
    c_x, c_A = None if x is None else x.to(dtype), [a.to(dtype) for a in lora_A]
    grad_x, grads_A = dropped_grads(grad_hidden, c_x, c_A, seed, dropout_p, need_x=True, as_kernels=True)
    if weight is not None:
        grad_x = grad_x + grad_y @ weight
    grad_A: Sequence[Tensor | None] = grads_A or [None] * n
    inputs = zip((grad_x, grad_w, *grad_A, *grad_B), (grad_y, routing_weights, *adapters), strict=True)
    return [None if g is None else _as(t.dtype, g) for g, t in inputs]


# ---- on a GPU ----


def _on_gpu(
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
) -> Tensor | None:
    """What the CUDA kernels make of plain tensors on the current GPU; None where something is not plain."""
    if not ROUND_ADAPTERS:
        return None
    if x.get_device() != torch.cuda.current_device():  # where new tensors are made
        with torch.cuda.device(x.device):
            return _on_gpu(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
    drops = type(dropout_p) is not float or dropout_p != 0
    dense = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided
    if drops and dense and not (x.is_contiguous() and x.data_ptr() % 16 == 0):
        x = x.clone(memory_format=torch.contiguous_format)  # the masks have no other way
    plain = _core.cuda_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
    if plain is None:
        return None
    adapters, scales, needs_grad, has_dropout = plain
    if (top_k or 0) > len(scales):
        return None
    probabilities = _probabilities(dropout_p, len(scales))
    if any(probabilities) and (not has_dropout or torch.cuda.is_current_stream_capturing()):
        return None
    settings = (scales, None if top_k == len(scales) else top_k, _draw(probabilities), None)
    if needs_grad and torch.is_grad_enabled():
        return _apply_on_gpu(x, routing_weights, base_output, (weight, bias), settings, *adapters)
    y, _ = _gpu_forward(x, routing_weights, base_output, (weight, bias), settings, adapters, keep_hidden=False)
    return y


def _gpu_forward(
    x: Tensor,
    routing_weights: Tensor,
    base_output: Tensor | None,
    frozen: tuple[Tensor | None, Tensor | None],
    settings: _Settings,
    adapters: tuple[Tensor, ...],
    *,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and hidden [..., C] with the experts' columns as the kernels lay them."""
    scaling, top_k, dropout, _ = settings
    weight, bias = frozen
    if weight is not None:
        done = _core.cuda_forward(x, adapters, routing_weights, scaling, weight, bias, dropout, top_k or 0, keep_hidden)
        if done is not None:
            return done[0], done[1]
        base_output = F.linear(x, weight, bias)
    call = (x, adapters, routing_weights, scaling, top_k or 0)
    prepared: Any = _core.cuda_prepare(*call, False, dropout)
    workspace, stacked_a, stacked_b, mixed, _ = prepared
    hidden = x.flatten(0, -2) @ stacked_a.t() if dropout is None else torch.empty_like(mixed)
    _core.cuda_mix(*call, hidden, dropout, workspace)
    y = mixed @ stacked_b.t() if base_output is None else torch.addmm(base_output.flatten(0, -2), mixed, stacked_b.t())
    return y.view(*x.shape[:-1], y.shape[-1]), hidden.view(*x.shape[:-1], hidden.shape[-1]) if keep_hidden else None


class _RoutedLoRAOnGPU(torch.autograd.Function):
    """The CUDA kernels under autograd; arguments as those of `_RoutedLoRA`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing_weights: Tensor,
        base_output: Tensor | None,
        frozen: tuple[Tensor | None, Tensor | None],
        settings: _Settings,
        *adapters: Tensor,
    ) -> Tensor:
        return _forward_and_save(_gpu_forward, ctx, x, routing_weights, base_output, frozen, settings, adapters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        need = ctx.needs_input_grad
        if not (need[0] or need[1] or True in need[_N_NODE:]):
            return (None, None, grad_y, *(None,) * (len(need) - 3))
        saved = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # create_graph
        grads: Sequence[Tensor | None] | None = None
        if _is_unwatched():
            grads = _kernels_backward(ctx, saved, grad_y)
            if grads is None and on_gpu(grad_y):
                if ctx.settings[2] is None:
                    grads = _products_backward(ctx, saved, grad_y)
                else:  # what may be unusual is where its rows lie
                    copy = grad_y.clone(memory_format=torch.contiguous_format)
                    grads = _kernels_backward(ctx, saved, copy)
        if grads is not None:
            return tuple(_refuse_twice(grads, [grad_y, *saved]) if twice else grads)
        if twice:
            raise RuntimeError(_TWICE)
        grads = _formula_backward(ctx, saved, grad_y)
        return (*grads[:2], grad_y if need[2] else None, None, None, *grads[2:])


_apply_on_gpu: Callable[..., Tensor] = super(torch.autograd.Function, _RoutedLoRAOnGPU).apply


def _kernels_backward(ctx: Any, saved: tuple[Any, ...], grad_y: Tensor) -> tuple[Any, ...] | None:
    """Gradients of the node's arguments by kernels alone, but for g W with dropout; None: not plain, or none for it."""
    need, weight, (scaling, top_k, dropout) = ctx.needs_input_grad, saved[3], ctx.settings
    base = None
    if dropout is not None and need[0] and weight is not None:
        with torch.no_grad():
            base = grad_y @ weight
    return _core.cuda_backward(saved, need, scaling, grad_y, base, dropout, top_k or 0)


@torch.no_grad()
def _products_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Tensor | None] | None:
    """Gradients of the node's arguments by torch's products, what lies between them by kernels; None: not plain."""
    x, hidden, routing_weights, weight, *adapters = saved
    need, (scaling, top_k, _) = ctx.needs_input_grad, ctx.settings
    n, call = len(scaling), (grad_y, tuple(adapters), routing_weights, scaling, top_k or 0)
    prepared = _core.cuda_prepare(*call, True, None)
    if prepared is None:
        return None
    workspace, stacked_a, stacked_b, mixed, weighted = prepared
    g = grad_y.flatten(0, -2)
    torch.mm(g, stacked_b, out=mixed)
    grad_w = torch.empty_like(routing_weights, memory_format=torch.contiguous_format) if need[1] else None
    _core.cuda_mix_backward(*call, hidden, grad_w, workspace)
    grads: list[Tensor | None] = [None, grad_w, grad_y if need[2] else None, None, None]
    if need[0]:
        base = None if weight is None else g @ weight
        grad_x = mixed @ stacked_a if base is None else torch.addmm(base, mixed, stacked_a)
        grads[0] = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
    columns = [0]
    for a in adapters[:n]:
        columns.append(columns[-1] - (-a.shape[0] // 8) * 8)
    for first, left, right in ((0, mixed, x), (n, weighted, grad_y)):
        wanted = need[_N_NODE + first : _N_NODE + first + n]
        dtype = adapters[first].dtype
        stacked = torch.mm(left.t(), right.flatten(0, -2), out_dtype=dtype) if True in wanted else None
        for e, adapter in enumerate(adapters[first : first + n]):
            if stacked is None or not wanted[e]:
                grads.append(None)
                continue
            rank = adapter.shape[0 if first == 0 else 1]
            rows = stacked[columns[e] : columns[e] + rank]
            grads.append(rows if first == 0 else rows.t().clone(memory_format=torch.contiguous_format))
    return grads


def _core_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)  # .to takes its time to find that there is nothing to do


def _batch_and_seq(t: Tensor) -> tuple[int, int]:
    return (t.shape[0], t.shape[1]) if t.dim() == 3 else (1, t.shape[0])


# The views that the core reads and writes: a pointer, then strides in elements.


def _matrix(t: Tensor) -> tuple[int, int, int]:
    row, col = t.stride()
    return t.data_ptr(), row, col


def _tokens(t: Tensor) -> tuple[int, int, int, int]:
    """[B, S, width] as it is, [S, width] as one sequence."""
    batch, seq, col = t.stride() if t.dim() == 3 else (0, *t.stride())
    return t.data_ptr(), batch, seq, col


def _weights(t: Tensor, axes: int) -> tuple[int, int, int, int]:
    """Routing weights, or their gradient, for an x of so many axes: zero strides where tokens share them."""
    if t.dim() == axes:
        return _tokens(t)
    batch, col = t.stride() if t.dim() == 2 else (0, *t.stride())
    return t.data_ptr(), batch, 0, col


_TWICE = "moelora's torch functions can be differentiated once only: double backward is not supported"


class _Refuse(torch.autograd.Function):
    """Identity whose backward is the error for differentiating a gradient of routed_lora."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(_TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_TWICE)


def _refuse_twice(grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, tied to all they come from: differentiating them meets the refusal, not a silent zero."""
    tied = [t for t in (*grads, *sources) if t is not None]
    refused = iter(_Refuse.apply(*tied))  # type: ignore[no-untyped-call]
    return [None if g is None else next(refused) for g in grads]


class _Once(torch.autograd.Function):
    """Identity whose gradients pass through `_Refuse`: what is computed from the outputs has no second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return grad_outputs
        if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in grad_outputs):
            raise RuntimeError(_TWICE)  # is_grads_batched would lose the tie
        return _Refuse.apply(*grad_outputs)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple(t if t is None else t.view_as(t) for t in tangents)
