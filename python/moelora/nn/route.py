"""`route` for torch: logits to routing weights, by the C core on CPU, by kernels on a GPU, by a formula elsewhere."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora import runtime
from moelora.functional import HAS_EXT
from moelora.nn import cuda
from moelora.nn.node import Once, refuse_twice
from moelora.nn.plain import is_recorded, is_unwatched, uses_core

if HAS_EXT:
    from moelora import _core

__all__ = ["Routing", "route"]


class Routing(NamedTuple):
    """What `route` decides for logits [..., N]."""

    weights: Tensor
    """[..., N], zero outside the top k."""
    indices: Tensor | None
    """[..., k] of int64, by falling probability; None without top_k."""
    counts: Tensor
    """[N] of int64: how many unmasked tokens hold the expert in their top k."""
    prob_sums: Tensor
    """[N]: probabilities before top-k, summed over unmasked tokens."""


def route(
    logits: Tensor,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    renormalize: bool = True,
    mask: Tensor | None = None,
) -> Routing:
    r"""Turn a router's logits into routing weights.

    .. math:: p = \mathrm{softmax}(\mathrm{logits} / \mathrm{temperature})

    and of these each token's `top_k` largest are kept. Differentiable once in `logits`, through `weights` and
    `prob_sums`. Plain CPU tensors run in the C core, plain CUDA tensors of up to 256 experts in moelora's kernels, all
    others in torch operations.

    Parameters
    ----------
    logits : Tensor [..., N]
        One row per token; float32, float64, bfloat16 or float16. NaN propagates within its row.
    top_k : int in [1, N], optional
        How many experts each token keeps: those with the largest logits, ties going to the lower index. None: all.
    temperature : float
        Finite and positive.
    renormalize : bool
        Divide the kept probabilities by their sum.
    mask : Tensor of bool or integers, of logits.shape[:-1], optional
        False or 0: padding, which `counts` and `prob_sums` leave out. Its weights are computed as any other's.

    Returns
    -------
    Routing
        Named tuple of weights [..., N], indices [..., k] or None, counts [N] and prob_sums [N]. Floating ones are
        float64 for float64 logits and float32 for all others.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it got and what it takes.
    RuntimeError
        From the backward, when what it keeps was changed in place (`logits`, or without top_k the weights); from
        differentiating twice.

    Examples
    --------
    >>> import torch
    >>> from moelora.nn import route
    >>> routing = route(torch.tensor([[1.0, 4.0, 3.0]]).log(), top_k=2)
    >>> routing.indices, routing.weights
    (tensor([[1, 2]]), tensor([[0.0000, 0.5714, 0.4286]]))
    """
    # The plain case is found from C, and done there. All that is unusual, or wrong, goes on below.
    routing = _plain_routing(logits, mask, top_k, temperature, renormalize)
    if routing is not None:
        return routing

    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating-point tensor, got {got}")
    if not logits.dim() or not logits.shape[-1]:
        raise ValueError(f"logits must have shape [..., N] with N > 0, got {tuple(logits.shape)}")
    if logits.layout is not torch.strided:
        raise TypeError(f"logits must be a dense tensor, got {logits.layout}")
    n = logits.shape[-1]
    if top_k is not None:
        if not isinstance(top_k, Integral) or isinstance(top_k, bool):
            raise TypeError(f"top_k must be an integer or None, got {type(top_k).__name__}")
        if not 1 <= top_k <= n:
            raise ValueError(f"top_k must lie in [1, {n}], the number of experts, got {top_k}")
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a positive number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a tensor of bool or integers, got {got}")
        if mask.shape != logits.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(logits.shape[:-1])}, got {tuple(mask.shape)}")
        if mask.device != logits.device:
            raise ValueError(f"mask must be on {logits.device} as logits is, got {mask.device}")
        mask = mask.bool()

    if logits.dtype is not torch.float64:
        logits = logits.float()
    top_k = None if top_k is None else int(top_k)
    temperature, renormalize = float(temperature), bool(renormalize)
    if is_unwatched() and (logits.is_cuda or (uses_core(logits) and (mask is None or uses_core(mask)))):
        dense_mask = None if mask is None else mask.contiguous()
        routing = _plain_routing(logits.contiguous(), dense_mask, top_k, temperature, renormalize)
        if routing is not None:
            return routing
    if torch.is_grad_enabled() and logits.requires_grad and not is_recorded():
        (logits,) = Once.apply(logits)
    return _formula(logits, mask, top_k, temperature, renormalize)


def _plain_routing(
    logits: Tensor, mask: Tensor | None, top_k: int | None, temperature: float, renormalize: bool
) -> Routing | None:
    """What the C core or the kernels make of plain tensors; None where something is not plain."""
    if not is_unwatched():
        return None
    if isinstance(logits, Tensor) and logits.is_cuda:
        if not cuda.available(logits.device):
            return None
        with cuda.device_of(logits):
            routed = _core.cuda_route(logits, mask, top_k, temperature, renormalize)
    else:
        routed = _core.route_tensors(logits, mask, top_k, temperature, renormalize, runtime.get_num_threads())
    if routed is None:
        return None
    weights, indices, counts, prob_sums = routed
    if logits.requires_grad and torch.is_grad_enabled():
        weights, prob_sums = _apply(logits, (weights, prob_sums), (mask, indices), temperature, renormalize)
    return Routing(weights, indices, counts, prob_sums)


def _formula(logits: Tensor, mask: Tensor | None, top_k: int | None, temperature: float, renormalize: bool) -> Routing:
    n = logits.shape[-1]
    p = _probabilities(logits, temperature)
    weights, indices, kept = p, None, torch.ones_like(p, dtype=torch.bool)
    if top_k is not None:
        # By the logits, of which rounding makes none equal to another; p * 0 is NaN in a NaN row, which picks its first
        # k. A stable sort: torch.topk leaves open which of several equal ones it takes.
        order = torch.add(logits.detach(), p.detach(), alpha=0)
        indices = order.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        largest = p.gather(-1, indices)
        if renormalize:
            largest = largest / largest.sum(-1, keepdim=True)
        weights = torch.zeros_like(p).scatter(-1, indices, largest)
        kept = torch.zeros_like(kept).scatter(-1, indices, 1)  # torch.jit.trace takes no True
    if mask is not None:
        kept = kept & mask.unsqueeze(-1)
        p = p.masked_fill(~mask.unsqueeze(-1), 0)
    return Routing(weights, indices, kept.reshape(-1, n).sum(0), p.reshape(-1, n).sum(0))


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature), of differences to the largest, whose quotients may overflow to -inf alone."""
    limits = torch.finfo(logits.dtype)
    below = logits - logits.detach().amax(-1, keepdim=True)
    return torch.softmax(below / min(max(temperature, limits.tiny), limits.max), -1)


class _Route(torch.autograd.Function):
    """weights and prob_sums, which have been computed, with the backward of who did."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        computed: tuple[Tensor, Tensor],
        constants: tuple[Tensor | None, Tensor | None],
        temperature: float,
        renormalize: bool,
    ) -> tuple[Tensor, Tensor]:
        # Weights of all experts are the probabilities, and whoever uses them keeps them anyway.
        ctx.save_for_backward(computed[0] if constants[1] is None else logits, *constants)
        ctx.options = temperature, renormalize, logits.dtype
        ctx.set_materialize_grads(False)
        return computed

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor | None, grad_prob_sums: Tensor | None) -> Any:
        if grad_weights is None and grad_prob_sums is None:
            return (None,) * 5
        kept, mask, indices = ctx.saved_tensors
        temperature, renormalize, dtype = ctx.options
        more = (kept, mask, indices, temperature, renormalize)
        if grad_weights is None and not kept.is_cuda:  # the kernels need no zeros
            grad_weights = kept.new_zeros(()).expand(kept.shape)
        grad: Tensor | None = None
        if is_unwatched():
            grad = _plain_gradient(grad_weights, grad_prob_sums, *more, dtype)
            if grad is None:  # perhaps for its strides
                dense_weights = None if grad_weights is None else grad_weights.contiguous()
                dense_sums = None if grad_prob_sums is None else grad_prob_sums.contiguous()
                grad = _plain_gradient(dense_weights, dense_sums, *more, dtype)
        if grad is None:
            grad = _formula_backward(grad_weights, grad_prob_sums, *more)
        if torch.is_grad_enabled():  # create_graph
            (grad,) = refuse_twice([grad], [kept, grad_weights, grad_prob_sums])
        return grad, None, None, None, None


def _plain_gradient(
    grad_weights: Tensor | None,
    grad_prob_sums: Tensor | None,
    kept: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    temperature: float,
    renormalize: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """What the C core or the kernels make of plain tensors; None where something is not plain. dtype: of the logits."""
    call = (grad_weights, grad_prob_sums, kept, mask, indices, temperature, renormalize)
    grad: Tensor | None
    if kept.is_cuda:
        with cuda.device_of(kept):
            grad = _core.cuda_route_backward(*call, dtype)
    else:
        grad = _core.route_backward_tensors(*call, runtime.get_num_threads())
    return grad


# What Function.apply comes down to where no torch.func transform is active.
_apply: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _Route).apply


@torch.no_grad()
def _formula_backward(
    grad_weights: Tensor | None,
    grad_prob_sums: Tensor | None,
    kept: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    temperature: float,
    renormalize: bool,
) -> Tensor:
    """The same where C can't read the gradients: batched by vmap (is_grads_batched), a subclass, traced."""
    if kept.dtype is not torch.float64:
        kept = kept.float()
    p = kept if indices is None else _probabilities(kept, temperature)
    grad_p = torch.zeros_like(p) if grad_weights is None else grad_weights
    if indices is not None:
        g = grad_p.gather(-1, indices)
        if renormalize:
            largest = p.gather(-1, indices)
            norm = largest.sum(-1, keepdim=True)
            g = (g - (g * (largest / norm)).sum(-1, keepdim=True)) / norm
        grad_p = torch.zeros_like(p).scatter(-1, indices, g)
    if grad_prob_sums is not None:
        grad_p = grad_p + (grad_prob_sums if mask is None else grad_prob_sums * mask.unsqueeze(-1))
    return p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) / temperature
