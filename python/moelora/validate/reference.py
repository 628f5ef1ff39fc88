"""The older ways to mix LoRA experts, on stock PEFT: what results and cost are compared with."""

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, LoraLayer
from torch import Tensor, nn

from moelora.peft.anatomy import decoder

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A copy of a model that shares its parameters, so that what is changed around them leaves the model alone."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class AdapterLoop:
    """Routing weights in stock PEFT layers, the way a fork of PEFT has them: a Python loop over the adapters in each.

    Every LoRA layer computes ``base(x) + sum_e w_e * scaling_e * B_e(A_e(dropout_e(x)))``, one adapter after the other.
    Without weights it computes ``base(x)`` alone, the first of two passes.

    Parameters
    ----------
    model : PeftModel
        Stock PEFT model. It is changed until `remove`.

    Attributes
    ----------
    weights : Tensor or None
        [N], [B, N], [B, S, N], or [B, S, L, N] with one mixture for each of the L decoder layers: embeddings then take
        the uniform one, what follows the layers that of the last. Column i is the i-th active adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self.weights: Tensor | None = None
        self._layers: list[Any] = []
        _, layers = decoder(model.get_base_model())
        index_of = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
        for module in model.modules():
            if isinstance(module, LoraLayer):
                looped: Any = module
                looped.forward = types.MethodType(self._forward_of(index_of.get(id(module))), module)
                self._layers.append(looped)

    def _forward_of(self, index: int | None) -> Callable[..., Tensor]:
        def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = layer.base_layer(x, *args, **kwargs)
            if self.weights is None:
                return y
            weights = self.weights
            if weights.dim() == 4:
                outside = torch.full_like(weights[:, :, 0], 1 / weights.shape[-1])
                if index is not None:
                    weights = weights[:, :, index]
                else:
                    weights = outside if isinstance(layer, Embedding) else weights[:, :, -1]
            mixed: Tensor = y
            for e, name in enumerate(layer.active_adapters):
                if name in layer.scaling:
                    mixed = mixed + _for_rows(weights[..., e], y) * _expert(layer, name, x) * layer.scaling[name]
            return mixed.to(y.dtype)

        return forward

    def remove(self) -> None:
        """Give the layers PEFT's own forward back."""
        for layer in self._layers:
            del layer.forward


def _expert(layer: Any, name: str, x: Tensor) -> Tensor:
    """What one adapter of a stock layer adds, without its scaling."""
    added: Tensor
    if isinstance(layer, Embedding):
        added = layer._embed(x, layer.lora_embedding_A[name].T) @ layer.lora_embedding_B[name].T
    else:
        lora_A = layer.lora_A[name]
        added = layer.lora_B[name](lora_A(layer.lora_dropout[name](x.to(lora_A.weight.dtype))))
    return added


def _for_rows(column: Tensor, y: Tensor) -> Tensor:
    """One expert's weights, scalar, [B] or [B, S], so that they multiply y: [B, S, d], [B, ...] or [B * S, d]."""
    if column.dim() == 2 and y.dim() == 2:
        column = column.flatten()
    return column.reshape(*column.shape, *(1 for _ in range(y.dim() - column.dim())))


def looped(model: PeftModel, weights: Tensor, **inputs: Any) -> Tensor:
    """Logits of a stock model whose layers mix the active adapters in a loop; arguments as `n_passes`."""
    loop = AdapterLoop(model)
    loop.weights = weights
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        loop.remove()
    return logits


def n_passes(model: PeftModel, weights: Tensor, **inputs: Any) -> Tensor:
    """Mix logits the old way: the whole model once for each expert.

    Parameters
    ----------
    model : PeftModel
        Stock PEFT with N active LoRA adapters, which are active and trainable again afterwards.
    weights : Tensor [N], [B, N] or [B, S, N]
        Column i is the i-th active adapter.
    **inputs
        Of the model, without labels.

    Returns
    -------
    Tensor [B, S, V]
        Whatever the model has as logits, mixed.
    """
    tuner: Any = model.base_model
    experts = list(tuner.active_adapters)
    mixed: Tensor | None = None
    try:
        for e, name in enumerate(experts):
            tuner.set_adapter(name)
            logits = model(**inputs).logits
            part = _for_rows(weights[..., e], logits) * logits
            mixed = part if mixed is None else mixed + part
    finally:
        # set_adapter(name) freezes the others, and a frozen adapter would get no gradient from the backward to come.
        tuner.set_adapter(experts)
    assert mixed is not None
    return mixed


@contextmanager
def watched(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Context in which ``see(name, output)`` is called for each LoRA layer that runs."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: see(name, output.detach())

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(cast(Any, module), LoraLayer)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def shaken(model: Any) -> Iterator[None]:
    """Context in which the model's embeddings are as if rounded otherwise: off by up to one unit in the last place."""
    noise = torch.Generator().manual_seed(2)

    def shake(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        off = 2 * torch.rand(output.shape, generator=noise) - 1
        return output * (1 + torch.finfo(output.dtype).eps * off)

    hook = model.get_input_embeddings().register_forward_hook(shake)
    try:
        yield
    finally:
        hook.remove()
