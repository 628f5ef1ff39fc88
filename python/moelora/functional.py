"""A mixture of LoRA experts, and the routing that weighs them, on NumPy arrays.

The C core computes everything here. Where the extension can't be loaded, `moelora.reference` does, after one
RuntimeWarning; `HAS_EXT` says which it is. Arrays are float32 or float64, one of them throughout a call, and results
have the same dtype. Inputs may have any strides, zero and negative ones included, and are only copied where their
elements are not aligned. Subclasses of ndarray are read as plain arrays, except masked arrays, which are refused. NaN
and infinity are computed with, not refused.
"""

from collections.abc import Iterable, Sequence
from typing import SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from moelora import reference
from moelora.reference import GRADS, Array, RoutedLoraGrads, Routing
from moelora.runtime import HAS_EXT, get_num_threads

if HAS_EXT:
    from moelora import _core

__all__ = [
    "HAS_EXT",
    "RoutedLoraGrads",
    "Routing",
    "route",
    "route_backward",
    "routed_lora_backward",
    "routed_lora_forward",
]


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
    r"""Add the weighted outputs of N LoRA experts, and those of the frozen layer under them, in one pass.

    .. math:: y = x W^T + b + \sum_e s_e \, w_e \, (x A_e^T) B_e^T

    Parameters
    ----------
    x : ndarray [T, d_in] or [B, S, d_in]
        The tokens. T, B or S may be 0.
    lora_A : sequence of N ndarrays [r_e, d_in]
        Ranks may differ between experts.
    lora_B : sequence of N ndarrays [d_out, r_e]
    routing_weights : ndarray
        The number of axes says what it is: [N] one mixture for all tokens, [B, N] one per sequence (x with three axes
        only), [T, N] or [B, S, N] one per token. Used as given. A NaN makes its tokens NaN.
    scaling : float or sequence of N floats
        ``lora_alpha / r``, finite.
    weight : ndarray [d_out, d_in], optional
        The frozen layer. Without it the result is the mixture alone.
    bias : ndarray [d_out], optional
        Only with `weight`.
    top_k : int in [1, N], optional
        Keep each token's `top_k` largest routing weights by value (ties go to the lower index, a NaN is the largest)
        and take the others as 0. The kept ones are not renormalised.
    out : ndarray, optional
        Written, and returned as `y`: x's dtype, shape ``x.shape[:-1] + (d_out,)``, any strides without zeros. It
        may overlap neither itself nor an input.

    Returns
    -------
    y : ndarray ``x.shape[:-1] + (d_out,)``
    hidden : ndarray ``x.shape[:-1] + (R,)``
        Every ``x A_e^T`` side by side, R being the sum of the ranks: not weighted, and 0 where `top_k` dropped the
        expert. `routed_lora_backward` wants it.

    Raises
    ------
    TypeError
        An argument is no ndarray of float32 or float64 in native byte order, or not of x's dtype; `scaling` is no
        number; `top_k` is no integer.
    ValueError
        A shape doesn't fit; N, d_in, d_out or a rank is 0; `top_k` is outside [1, N]; a scaling isn't finite; `bias`
        comes without `weight`; `out` is read-only or overlaps; a result would be too large to address.
    MemoryError

    Notes
    -----
    One expert is LoRA, ``h = W x + B A x`` [1]_; the weighted sum is that of a mixture of experts [2]_. `out` is not
    touched unless the call succeeds. Whether an expert is read for a token whose weight for it is 0, or that `top_k`
    drops it for, depends on the shapes; so it is not specified what infinite elements of its A and B, and NaNs, make of
    that token.

    References
    ----------
    .. [1] E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. (3).
    .. [2] N. Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
       ICLR 2017, eq. (1).

    Examples
    --------
    >>> import numpy as np
    >>> from moelora.functional import routed_lora_forward
    >>> x = np.array([[1.0, 2.0]])
    >>> lora_A = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]
    >>> lora_B = [np.array([[1.0], [0.0], [0.0]]), np.array([[0.0], [1.0], [1.0]])]
    >>> y, hidden = routed_lora_forward(x, lora_A, lora_B, np.array([0.25, 0.75]), scaling=2.0)
    >>> y
    array([[0.5, 3. , 3. ]])
    >>> hidden
    array([[1., 2.]])
    """
    if not HAS_EXT:
        return reference.routed_lora_forward(
            x, lora_A, lora_B, routing_weights, scaling, weight=weight, bias=bias, top_k=top_k, out=out
        )
    return _core.routed_lora_forward(
        x, lora_A, lora_B, routing_weights, scaling, weight, bias, top_k, out, get_num_threads()
    )


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
    """Compute the gradients of `routed_lora_forward`.

    Parameters
    ----------
    grad_y : ndarray ``x.shape[:-1] + (d_out,)``
        Gradient of a scalar by `y`.
    x, lora_A, lora_B, routing_weights, scaling, weight, top_k
        As given to `routed_lora_forward`.
    hidden : ndarray ``x.shape[:-1] + (R,)``
        As `routed_lora_forward` returned it.
    need : collection of str
        Which gradients to compute, of "x", "lora_A", "lora_B" and "routing_weights"; the others cost nothing.

    Returns
    -------
    RoutedLoraGrads
        Named tuple of x, lora_A (a list), lora_B (a list) and routing_weights, each of its argument's shape and
        dtype; None for what was not asked. With `top_k` the dropped experts' part is 0.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `routed_lora_forward`; also ValueError for an unknown name in `need`.

    Examples
    --------
    >>> import numpy as np
    >>> from moelora.functional import routed_lora_backward, routed_lora_forward
    >>> x, lora_A, lora_B = np.array([[1.0, 2.0]]), [np.array([[1.0, 1.0]])], [np.array([[3.0]])]
    >>> routing_weights = np.array([0.5])
    >>> y, hidden = routed_lora_forward(x, lora_A, lora_B, routing_weights, scaling=1.0)
    >>> grads = routed_lora_backward(np.ones_like(y), x, hidden, lora_A, lora_B, routing_weights, scaling=1.0)
    >>> grads.x
    array([[1.5, 1.5]])
    >>> grads.routing_weights
    array([9.])
    """
    if not HAS_EXT:
        return reference.routed_lora_backward(
            grad_y, x, hidden, lora_A, lora_B, routing_weights, scaling, weight=weight, top_k=top_k, need=need
        )
    return RoutedLoraGrads(
        *_core.routed_lora_backward(
            grad_y, x, hidden, lora_A, lora_B, routing_weights, scaling, weight, top_k, need, get_num_threads()
        )
    )


def route(
    logits: Array,
    *,
    top_k: SupportsIndex | None = None,
    temperature: SupportsFloat = 1.0,
    renormalize: bool = True,
    mask: NDArray[np.bool_] | None = None,
) -> Routing:
    r"""Turn a router's logits into routing weights.

    .. math:: p = \mathrm{softmax}(\mathrm{logits} / \mathrm{temperature})

    and of these each token's `top_k` largest are kept.

    Parameters
    ----------
    logits : ndarray [..., N]
        One row per token.
    top_k : int in [1, N], optional
        How many experts each token keeps: those with the largest logits, ties going to the lower index. None: all.
    temperature : float
        Finite and positive.
    renormalize : bool
        Divide the kept probabilities by their sum.
    mask : ndarray of bool, of logits.shape[:-1], optional
        False: padding, which `counts` and `prob_sums` leave out. Its weights are computed as any other's.

    Returns
    -------
    Routing
        Named tuple of weights [..., N] (zero outside the top k), indices [..., k] (int64, by falling probability;
        None without `top_k`), counts [N] (int64: unmasked tokens whose top k holds the expert) and prob_sums [N]
        (probabilities before top-k, summed over unmasked tokens).

    Raises
    ------
    TypeError
        `logits` is no ndarray of float32 or float64 in native byte order; `mask` is not of bool; `top_k` is no
        integer or `temperature` no number.
    ValueError
        A shape doesn't fit; N is 0; `top_k` is outside [1, N]; `temperature` isn't positive and finite.
    MemoryError

    Notes
    -----
    The gating of a sparsely gated mixture [1]_, with the softmax taken before the top k. It is computed in the dtype of
    `logits`: a probability is good to a few ULP, and to as many more as its logit lies below the row's largest in units
    of `temperature`.

    References
    ----------
    .. [1] N. Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
       ICLR 2017, section 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> from moelora.functional import route
    >>> routing = route(np.log([[1.0, 4.0, 3.0]]), top_k=2)
    >>> routing.indices
    array([[1, 2]])
    >>> routing.weights.round(4)
    array([[0.    , 0.5714, 0.4286]])
    """
    if not HAS_EXT:
        return reference.route(logits, top_k=top_k, temperature=temperature, renormalize=renormalize, mask=mask)
    return Routing(*_core.route(logits, top_k, temperature, renormalize, mask, get_num_threads()))


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
    """Compute the gradient of `route` by the logits.

    Parameters
    ----------
    grad_weights : ndarray [..., N]
        Gradient of a scalar by `Routing.weights`.
    logits, temperature, renormalize, mask
        As given to `route`.
    indices : ndarray [..., k] of int64, or None
        As `route` returned it.
    grad_prob_sums : ndarray [N], optional
        Gradient by `Routing.prob_sums`; `mask` concerns this part alone.

    Returns
    -------
    ndarray [..., N]

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `route`; also ValueError where `indices` names an expert that isn't there.

    Examples
    --------
    >>> import numpy as np
    >>> from moelora.functional import route, route_backward
    >>> logits = np.log([[1.0, 3.0]])
    >>> route_backward(np.array([[1.0, 0.0]]), logits, route(logits).indices)
    array([[ 0.1875, -0.1875]])
    """
    if not HAS_EXT:
        return reference.route_backward(
            grad_weights,
            logits,
            indices,
            temperature=temperature,
            renormalize=renormalize,
            mask=mask,
            grad_prob_sums=grad_prob_sums,
        )
    return _core.route_backward(
        grad_weights, logits, indices, temperature, renormalize, mask, grad_prob_sums, get_num_threads()
    )
