"""For the tests of projects that use moelora."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners import lora
from torch import Tensor

from moelora.peft.adoption import adopt, release
from moelora.validate.comparison import (
    Difference,
    adapter_parameters,
    difference,
    gradient_differences,
    gradients,
)
from moelora.validate.reference import looped, n_passes, twin

__all__ = ["assert_matches_n_passes"]


def assert_matches_n_passes(
    model: Any,
    batch: Tensor | Mapping[str, Any],
    *,
    routing_weights: Tensor | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Assert that one pass of moelora does what a pass of stock PEFT for each expert does.

    Without dropout: logits and gradients of ``mixture="logits"`` against the mixed logits of N passes, one-hot weights
    against each adapter alone, and the gradients of ``mixture="layer"`` against a loop over the adapters in each layer.
    The model is left as it was: gradients, modes, active adapters, router, adoption; random numbers too.

    Parameters
    ----------
    model : peft.PeftModel
        Adopted or stock, with at least two active LoRA adapters. A router that is attached takes no part.
    batch : Tensor [B, S] or mapping
        Token ids, or the model's inputs by name. Labels are left out.
    routing_weights : Tensor [N], [B, N] or [B, S, N], optional
        Column i belongs to the i-th active adapter. Default: those of the batch; without any random ones, for each
        token where the logits are of tokens, else for each sequence.
    rtol, atol : float
        Differences of up to ``atol + rtol * largest`` are let pass, with the largest value of the reference; for
        gradients the largest of the tensor, or a thousandth of that of all tensors. The defaults are for float32.

    Raises
    ------
    AssertionError
        Naming everything that differs, by how much, and where.
    TypeError
        If `model` is not a PeftModel with LoRA adapters, or `batch` neither tensor nor mapping.
    ValueError
        If fewer than two adapters are active, or moelora refuses the model, the inputs or the weights.

    Examples
    --------
    >>> assert_matches_n_passes(model, {"input_ids": ids, "attention_mask": mask})  # doctest: +SKIP
    """
    if not isinstance(model, peft.PeftModel) or not isinstance(model.base_model, lora.LoraModel):
        inside = f" with a {type(model.base_model).__name__}" if isinstance(model, peft.PeftModel) else ""
        raise TypeError(f"model must be a PeftModel with LoRA adapters, got {type(model).__name__}{inside}")
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a tensor of token ids or a mapping of inputs, got {type(batch).__name__}")
    experts = list(model.base_model.active_adapters)
    if len(experts) < 2:
        raise ValueError(
            f"model must have at least two active adapters, got {experts}: call moelora.activate_all_experts(model)"
        )
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "routing_weights")}
    given = batch.get("routing_weights") if routing_weights is None else routing_weights
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            found = _differences(model, experts, inputs, given)
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
    failed = [d for d in found if not d.absolute <= atol + rtol * d.scale]
    if failed:
        lines = [
            f"  {d.name}: {d.absolute:.2e} at {list(d.where)}, {d.relative:.1e} of the largest value {d.scale:.2e}"
            for d in failed
        ]
        raise AssertionError(
            f"{len(failed)} of {len(found)} results differ from stock PEFT by more than atol={atol:g} + "
            f"rtol={rtol:g} * largest:\n" + "\n".join(lines)
        )


def _differences(model: Any, experts: list[str], inputs: dict[str, Any], given: Tensor | None) -> list[Difference]:
    # Copies around the same parameters: the model itself is never changed.
    stock: Any = release(twin(model)).eval()
    routed: Any = adopt(release(twin(model))).eval()
    for tuned in (stock, routed):
        tuned.base_model.set_adapter(experts)
        for parameter in adapter_parameters(tuned, experts).values():
            parameter.requires_grad_(True)
    found = []
    with torch.no_grad():
        for e, name in enumerate(experts):
            stock.base_model.set_adapter(name)
            alone = stock(**inputs).logits
            one_hot = torch.eye(len(experts), device=alone.device)[e]
            one = routed(**inputs, routing_weights=one_hot).logits
            found.append(difference(f"logits with one-hot weights of {name!r}", one, alone))
    stock.base_model.set_adapter(experts)
    weights = _random_weights(alone, len(experts), inputs) if given is None else given
    noise = torch.Generator().manual_seed(1)
    direction = torch.randn(alone.shape, generator=noise).to(alone.device)

    for mixture, reference, title in (
        ("logits", n_passes, "N passes"),
        ("layer", looped, "a loop over the adapters in each layer"),
    ):
        ours, theirs = (weights.detach().float().clone().requires_grad_() for _ in range(2))
        got = routed(**inputs, routing_weights=ours, mixture=mixture).logits
        expected = reference(stock, theirs, **inputs)
        found.append(difference(f"logits of mixture={mixture!r} against {title}", got, expected))
        pairs = [(got, routed, ours), (expected, stock, theirs)]
        mine, other = (gradients(y, direction, adapter_parameters(m, experts), w) for y, m, w in pairs)
        for d in gradient_differences(mine, other):
            name = f"gradient of {d.name} with mixture={mixture!r} against {title}"
            found.append(Difference(name, d.absolute, d.scale, d.where))
    return found


def _random_weights(logits: Tensor, n: int, inputs: dict[str, Any]) -> Tensor:
    tokens: Any = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    per_token = tokens is not None and logits.dim() == 3 and tokens.shape[:2] == logits.shape[:2]
    shape = logits.shape[:2] if per_token and "decoder_input_ids" not in inputs else logits.shape[:1]
    noise = torch.randn(*shape, n, generator=torch.Generator().manual_seed(0))
    return noise.softmax(-1).to(logits.device)
