"""The two older ways to mix LoRA experts, on stock PEFT, as references for results and for cost.

Nothing here uses moelora: models come from `peft.get_peft_model`, their adapters are plain LoRA.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, wrapped by PEFT or not."""
    stacks = (getattr(module, name, None) for module in model.modules() for name in ("layers", "h"))
    return next(stack for stack in stacks if isinstance(stack, nn.ModuleList))


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


class AdapterLoop:
    """Routing weights in stock PEFT layers, the way a fork of PEFT has them: a Python loop over the adapters in each.

    Every LoRA layer computes ``base(x) + sum_e w_e * scaling_e * B_e(A_e(dropout_e(x)))``, one adapter after the other.
    Without weights it computes ``base(x)`` alone, the first of the two passes.

    Parameters
    ----------
    model : PeftModel
        Stock PEFT model over a decoder-only transformer. It is changed until `remove`.

    Attributes
    ----------
    weights : Tensor or None
        [B, S, N], or [B, S, L, N] with one mixture for each of the L decoder layers. Column i is the i-th active
        adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self.weights: Tensor | None = None
        self._layers: list[Any] = []
        for index, decoder_layer in enumerate(decoder_layers(model)):
            for layer in decoder_layer.modules():
                if isinstance(layer, LoraLayer):
                    self._layers.append(layer)
                    self._layers[-1].forward = types.MethodType(self._forward_of(index), layer)

    def _forward_of(self, index: int) -> Callable[[LoraLayer, Tensor], Tensor]:
        def forward(layer: LoraLayer, x: Tensor) -> Tensor:
            y: Tensor = layer.base_layer(x)
            if self.weights is None:
                return y
            weights = self.weights[:, :, index] if self.weights.dim() == 4 else self.weights
            for e, name in enumerate(layer.active_adapters):
                expert = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * layer.scaling[name]
                y = y + weights[..., e, None] * expert
            return y

        return forward

    def remove(self) -> None:
        """Give the layers PEFT's own forward back."""
        for layer in self._layers:
            del layer.forward


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
    tuner: Any = model.base_model
    names = list(tuner.active_adapters)
    logits: Tensor | None = None
    for e, name in enumerate(names):
        tuner.set_adapter(name)
        of_expert = weights[..., e, None] * model(input_ids=input_ids, use_cache=False).logits
        logits = of_expert if logits is None else logits + of_expert
    # set_adapter(name) freezes the others, and a frozen adapter would get no gradient from the backward to come.
    tuner.set_adapter(names)
    assert logits is not None
    if labels is None:
        return logits
    loss: Tensor = tuner.model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    return loss
