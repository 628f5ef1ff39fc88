"""The two older ways to mix LoRA experts, on stock PEFT, as references for results and for cost.

No kernel or layer of moelora is used here: models come from `peft.get_peft_model`, their adapters are plain LoRA.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from moelora.validate import reference
from moelora.validate.reference import AdapterLoop


def add_experts(model: PeftModel, names: Sequence[str]) -> None:
    """Give a stock PEFT model with one adapter further ones of the same config, and activate all of them.

    Parameters
    ----------
    model : PeftModel
        Made with ``adapter_name=names[0]``.
    names : sequence of str
        All adapters the model shall have, in order.
    """
    for name in names[1:]:
        model.add_adapter(name, model.peft_config[names[0]])
    tuner: Any = model.base_model
    tuner.set_adapter(list(names))


def router_weights(router: nn.Module, hidden_states: Sequence[Tensor]) -> Tensor:
    """What a per-layer router makes of each decoder layer's input.

    Parameters
    ----------
    router : moelora.Router
        Called as ``router(hidden, layer=i)``.
    hidden_states : sequence of Tensor [B, S, H]
        ``outputs.hidden_states``: the inputs of the L decoder layers, then the model's last state, which is not read.

    Returns
    -------
    Tensor [B, S, L, N]
    """
    return torch.stack([router(h, layer=i) for i, h in enumerate(hidden_states[:-1])], dim=2)


def two_passes(
    loop: AdapterLoop, model: PeftModel, router: nn.Module, input_ids: Tensor, labels: Tensor | None
) -> Tensor:
    """One forward of the two-pass way: the base alone feeds the router, then `AdapterLoop` mixes the adapters.

    The first pass keeps no graph and computes no adapters, which is the cheapest form in use.

    Returns
    -------
    Tensor
        The loss if labels are given, else the logits [B, S, V].
    """
    loop.weights = None
    with torch.no_grad():
        states = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    loop.weights = router_weights(router, states)
    outputs = model(input_ids=input_ids, labels=labels, use_cache=False)
    result: Tensor = outputs.logits if labels is None else outputs.loss
    return result


def n_passes(model: PeftModel, weights: Tensor, input_ids: Tensor, labels: Tensor | None) -> Tensor:
    """One forward of the old way: the whole model once for each expert, and the logits mixed.

    Parameters
    ----------
    model : PeftModel
        With N active LoRA adapters, which are active and trainable again afterwards.
    weights : Tensor [B, S, N]
        Column i is the i-th active adapter.
    input_ids, labels : Tensor [B, S]
        `labels` None: no loss.

    Returns
    -------
    Tensor
        The loss of the mixed logits if labels are given, else those logits [B, S, V].
    """
    logits = reference.n_passes(model, weights, input_ids=input_ids, use_cache=False)
    if labels is None:
        return logits
    tuner: Any = model.base_model
    loss: Tensor = tuner.model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    return loss
