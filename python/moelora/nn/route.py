"""`route` for torch: logits to routing weights, by the C core on CPU and by a formula in torch operations elsewhere."""

import math
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora import functional
from moelora.nn.autograd import _Once, _refuse_twice, uses_core

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
    `prob_sums`. Plain CPU tensors run in the C core, all others in torch operations.

    Parameters
    ----------
    logits : Tensor [..., N]
        One row per token; float32, float64, bfloat16 or float16. NaN propagates within its row.
    top_k : int in [1, N], optional
        How many experts each token keeps, ties going to the lower index. None: all.
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
        From the backward, when `logits` was changed in place; from differentiating twice.

    Examples
    --------
    >>> import torch
    >>> from moelora.nn import route
    >>> routing = route(torch.tensor([[1.0, 4.0, 3.0]]).log(), top_k=2)
    >>> routing.indices, routing.weights
    (tensor([[1, 2]]), tensor([[0.0000, 0.5714, 0.4286]]))
    """
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
    differentiated = torch.is_grad_enabled() and logits.requires_grad
    options = (mask, top_k, float(temperature), bool(renormalize))
    if uses_core(logits) and (mask is None or uses_core(mask)):
        return Routing(*_Route.apply(logits, *options)) if differentiated else _core(logits, *options)
    if differentiated and not torch.compiler.is_compiling():
        (logits,) = _Once.apply(logits)
    return _formula(logits, *options)


def _core(logits: Tensor, mask: Tensor | None, top_k: int | None, temperature: float, renormalize: bool) -> Routing:
    weights, indices, counts, prob_sums = functional.route(
        logits.detach().numpy(),
        top_k=top_k,
        temperature=temperature,
        renormalize=renormalize,
        mask=None if mask is None else mask.numpy(),
    )
    return Routing(
        torch.from_numpy(weights),
        None if indices is None else torch.from_numpy(indices),
        torch.from_numpy(counts),
        torch.from_numpy(prob_sums),
    )


def _formula(logits: Tensor, mask: Tensor | None, top_k: int | None, temperature: float, renormalize: bool) -> Routing:
    n = logits.shape[-1]
    p = torch.softmax(logits / temperature, -1)
    weights, indices, kept = p, None, torch.ones_like(p, dtype=torch.bool)
    if top_k is not None:
        # A stable sort: torch.topk leaves open which of several equal ones it takes.
        indices = p.detach().argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        largest = p.gather(-1, indices)
        if renormalize:
            largest = largest / largest.sum(-1, keepdim=True)
        weights = torch.zeros_like(p).scatter(-1, indices, largest)
        kept = torch.zeros_like(kept).scatter(-1, indices, True)
    if mask is not None:
        kept = kept & mask.unsqueeze(-1)
        p = p.masked_fill(~mask.unsqueeze(-1), 0)
    return Routing(weights, indices, kept.reshape(-1, n).sum(0), p.reshape(-1, n).sum(0))


class _Route(torch.autograd.Function):
    """The C core under autograd."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, mask: Tensor | None, top_k: int | None, temperature: float, renormalize: bool
    ) -> tuple[Tensor | None, ...]:
        routing = _core(logits, mask, top_k, temperature, renormalize)
        ctx.save_for_backward(logits, mask, routing.indices)
        ctx.temperature, ctx.renormalize = temperature, renormalize
        ctx.mark_non_differentiable(*(t for t in (routing.indices, routing.counts) if t is not None))
        ctx.set_materialize_grads(False)
        return tuple(routing)

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor | None, _: Any, __: Any, grad_prob_sums: Tensor | None) -> Any:
        logits, mask, indices = ctx.saved_tensors
        given = [g for g in (grad_weights, grad_prob_sums) if g is not None]
        if not given:
            return (None,) * 5
        if grad_weights is None:
            grad_weights = logits.new_zeros(()).expand(logits.shape)
        backward = _core_backward if uses_core(*given) else _formula_backward
        grad: Tensor | None = backward(
            grad_weights, grad_prob_sums, logits, mask, indices, ctx.temperature, ctx.renormalize
        )
        if torch.is_grad_enabled():  # create_graph
            (grad,) = _refuse_twice([grad], [logits, *given])
        return grad, None, None, None, None


def _core_backward(
    grad_weights: Tensor,
    grad_prob_sums: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    temperature: float,
    renormalize: bool,
) -> Tensor:
    grad = functional.route_backward(
        grad_weights.detach().numpy(),
        logits.detach().numpy(),
        None if indices is None else indices.numpy(),
        temperature=temperature,
        renormalize=renormalize,
        mask=None if mask is None else mask.numpy(),
        grad_prob_sums=None if grad_prob_sums is None else grad_prob_sums.detach().numpy(),
    )
    return torch.from_numpy(grad)


@torch.no_grad()
def _formula_backward(
    grad_weights: Tensor,
    grad_prob_sums: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    temperature: float,
    renormalize: bool,
) -> Tensor:
    """The same where the core can't read the gradients: batched by vmap (is_grads_batched), a subclass, traced."""
    p = torch.softmax(logits / temperature, -1)
    grad_p = grad_weights
    if indices is not None:
        g = grad_p.gather(-1, indices)
        if renormalize:
            kept = p.gather(-1, indices)
            norm = kept.sum(-1, keepdim=True)
            g = (g - (g * (kept / norm)).sum(-1, keepdim=True)) / norm
        grad_p = torch.zeros_like(p).scatter(-1, indices, g)
    if grad_prob_sums is not None:
        grad_p = grad_p + (grad_prob_sums if mask is None else grad_prob_sums * mask.unsqueeze(-1))
    return p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) / temperature
