"""`routed_lora` for torch: the C core on CPU, kernels on a GPU, a formula in torch operations everywhere else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora.nn.arguments import check_call, read_probabilities
from moelora.nn.compiled import call_operator, is_operator
from moelora.nn.cpu import apply_core, core_forward
from moelora.nn.cuda import on_gpu
from moelora.nn.formula import formula
from moelora.nn.gpu import call_on_gpu
from moelora.nn.node import draw
from moelora.nn.plain import is_unwatched, uses_core
from moelora.runtime import HAS_EXT

if HAS_EXT:
    from moelora._core import plain_call

__all__ = ["routed_lora", "routed_lora_formula"]

# Away from the CPU, float32 adapters over a bfloat16 or float16 x are rounded to x's dtype for the two products, which
# then run on tensor cores; False computes those in float32.
ROUND_ADAPTERS = True


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
        Of any of x's dtypes; what is neither of x's nor float32 is taken in float32. Ranks may differ.
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

    Notes
    -----
    Whether an expert is read for a token whose weight for it is 0, or that `top_k` drops it for, depends on the shapes.
    So it is not specified what infinite elements of its A and B, and NaNs, make of that token.

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
    usual = (top_k is None or (type(top_k) is int and top_k >= 1)) and is_unwatched()
    if usual and not torch._C._is_any_autocast_enabled():
        # The plain case costs no more than a few looks from C. All that is unusual, or wrong, goes on below.
        if not on_gpu(x):
            plain = plain_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
            if plain is not None and (top_k or 0) > len(plain[1]):
                plain = None
        elif ROUND_ADAPTERS:
            y = call_on_gpu(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
            if y is not None:
                return y
    if plain is None:
        call = check_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
        if torch.compiler.is_compiling() and ROUND_ADAPTERS and is_operator(call):
            return call_operator(call)
        tensors = [t for t in (call.x, call.routing_weights, call.base_output, call.weight, call.bias) if t is not None]
        tensors += call.lora_A
        tensors += call.lora_B
        if not call.x.numel() or not uses_core(*tensors):
            drops = call.dropout_p if any(call.dropout_p) else 0.0
            y = call_on_gpu(*call[:-1], drops) if ROUND_ADAPTERS and is_unwatched() and on_gpu(call.x) else None
            return formula(call, ROUND_ADAPTERS) if y is None else y
        x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p = call
        if x.dim() > 3:
            lead = x.shape[:-2]
            x = x.flatten(0, -3)
            routing_weights = routing_weights.flatten(0, -3) if routing_weights.dim() > 1 else routing_weights
            base_output = None if base_output is None else base_output.flatten(0, -3)
        # What these dtypes, autocast's among them, and axes make of it may be plain.
        plain = plain_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
        plain = plain or ((*lora_A, *lora_B), call.scaling, None, any(t.requires_grad for t in tensors))

    adapters, scales, total_rank, needs_grad = plain
    settings = (
        scales,
        None if top_k == len(scales) else top_k,
        draw(read_probabilities(dropout_p, len(scales))),
        total_rank,
    )
    if needs_grad and torch.is_grad_enabled():
        y = apply_core(x, routing_weights, base_output, (weight, bias), settings, *adapters)
    else:
        y, _ = core_forward(x, routing_weights, base_output, (weight, bias), settings, adapters, keep_hidden=False)
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
    call = check_call(x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, dropout_p)
    return formula(call, ROUND_ADAPTERS)
