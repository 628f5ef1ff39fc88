"""LoRA layers of PEFT that mix their adapters by routing weights.

A routed layer is the stock layer with another class: same parameters, same names, same checkpoint. Without weights it
runs PEFT's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from moelora.nn import routed_lora
from moelora.peft.frame import Site, as_weights, current

__all__ = ["Linear", "LoraLayer", "Routed"]

_linear_forward = nn.Linear.forward


class Routed(nn.Module, LoraLayer):
    """What every routed layer adds to the stock layer that it is derived from; comes before it among the bases."""

    _site: Site | None = None

    def forward(self, x: Tensor, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Apply the base layer and the active adapters, mixed by routing weights if there are any.

        Parameters
        ----------
        x : Tensor [..., d_in]
            Input of the base layer, which also gets the remaining arguments.
        routing_weights : Tensor [N], [B, N] or x.shape[:-1] + (N,), optional
            Column i belongs to the i-th active adapter. None: what the model that is running says; PEFT's own forward
            when it says nothing.

        Returns
        -------
        Tensor [..., d_out]
            In the dtype of the base layer's output.

        Raises
        ------
        TypeError
            If `routing_weights` is not a tensor, or complex.
        ValueError
            If its shape does not fit x and the active adapters, or the layer can't be routed: merged, a variant of LoRA
            (DoRA, ...), together with ``adapter_names``, sharded adapters.
        """
        site = self._site
        frame = None if site is None or routing_weights is not None else current(site.host)
        if self.disable_adapters or (routing_weights is None and frame is None):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        if frame is not None and frame.off:
            return self._base_output(x, *args, **kwargs)
        experts: list[str] = self.active_adapters
        if frame is not None:
            assert site is not None
            if experts != frame.experts:
                raise ValueError(
                    f"{site.name} has the active adapters {experts}, its model {frame.experts}: call "
                    "base_model.set_adapter, which sets them everywhere"
                )
            weights = frame.weights_for(site, x)
        else:
            weights = as_weights(routing_weights)
            if weights.shape[-1] != len(experts):
                raise ValueError(
                    f"routing_weights must have one column for each active adapter {experts}, got shape "
                    f"{tuple(weights.shape)}"
                )
        adapter_names = kwargs.pop("adapter_names", None)
        if self.merged_adapters or self.lora_variant or adapter_names is not None:
            self._refuse(experts, adapter_names)
        kwargs.pop("alora_offsets", None)
        return self._mixed(x, weights, experts, args, kwargs)

    def _mixed(
        self, x: Tensor, weights: Tensor, experts: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        # Every lookup of a submodule by attribute is a call of nn.Module.__getattr__, so each is done once.
        modules: dict[str, Any] = self._modules
        all_A, all_B = modules["lora_A"]._modules, modules["lora_B"]._modules
        layer, present = modules["base_layer"], experts
        try:
            lora_A = [all_A[name]._parameters["weight"] for name in experts]
            lora_B = [all_B[name]._parameters["weight"] for name in experts]
        except KeyError:  # an expert that this layer lacks, or one that is parametrized
            present = [name for name in experts if name in all_A]
            if not present:
                return self._base_output(x, *args, **kwargs)
            if len(present) < len(experts):
                weights = weights[..., [i for i, name in enumerate(experts) if name in all_A]]
            lora_A = [all_A[name].weight for name in present]
            lora_B = [all_B[name].weight for name in present]
        scalings = self.scaling
        scaling = [scalings[name] for name in present]
        dropout = modules["lora_dropout"]._modules
        dropout_p: float | list[float] = 0.0
        if {*map(type, dropout.values())} != {nn.Identity}:
            drops = [self._drop_probability(dropout[name]) for name in present]
            dropout_p = drops if any(drops) else 0.0
        factors = lora_A + lora_B
        if {*map(type, factors)} != {nn.Parameter} or True in [factor.is_meta for factor in factors]:
            self._refuse_unreadable(factors, x)
        if weights.device != x.device:
            weights = weights.to(x.device)

        if not args and not kwargs and _is_plain(layer, x):
            # Base and mixture in one autograd node: its backward makes one pass over dx less.
            y = routed_lora(
                x, lora_A, lora_B, weights, scaling, weight=layer.weight, bias=layer.bias, dropout_p=dropout_p
            )
            dtype = y.dtype
        else:
            y = self._base_output(x, *args, **kwargs)
            dtype = y.dtype
            inner = lora_A[0].dtype
            if inner is not torch.float32:
                x = self._cast_input_dtype(x, inner)
            # Under autocast a base that stays in float32 would be rounded on its way through routed_lora.
            if x.dtype is dtype and not (dtype is torch.float32 and _is_autocast(x)):
                y = routed_lora(x, lora_A, lora_B, weights, scaling, base_output=y, dropout_p=dropout_p)
            else:
                y = y + routed_lora(x, lora_A, lora_B, weights, scaling, dropout_p=dropout_p)
        if True in self.lora_bias.values():
            y = y + self._mixed_bias(x, weights, present)
        return y if y.dtype is dtype else y.to(dtype)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self._modules["base_layer"]
        y: Tensor = layer(x, *args, **kwargs)
        return y

    def _mixed_bias(self, x: Tensor, weights: Tensor, present: list[str]) -> Tensor:
        """sum_e s_e w_e bias_e for lora_bias=True: [d_out], or broadcasting over x's rows."""
        lora_B: list[Any] = [self.lora_B[name] for name in present]
        zero = torch.zeros_like(lora_B[0].weight[:, 0])
        biases = [
            b.bias * self.scaling[name] if self.lora_bias[name] else zero
            for name, b in zip(present, lora_B, strict=True)
        ]
        mixed = weights.to(zero.dtype) @ torch.stack(biases)
        return mixed.unsqueeze(1) if 1 < mixed.dim() < x.dim() else mixed

    def _drop_probability(self, dropout: nn.Module) -> float:
        if type(dropout) is nn.Identity:
            return 0.0
        if isinstance(dropout, nn.Dropout):
            return dropout.p if dropout.training else 0.0
        name = "this layer" if self._site is None else self._site.name
        raise TypeError(
            f"{name} has a {type(dropout).__name__} as lora_dropout, which can't be routed: use nn.Dropout, or "
            "lora_dropout=0"
        )

    def _refuse(self, experts: list[str], adapter_names: list[str] | None) -> None:
        """Raise for what can't be routed, naming the layer and the way out."""
        name = "this layer" if self._site is None else self._site.name
        if self.merged:
            raise ValueError(
                f"{name} has merged adapters {self.merged_adapters}, which routing weights can't mix: call "
                "unmerge_adapter() first"
            )
        variants = [expert for expert in experts if expert in self.lora_variant]
        if variants:
            kind = type(self.lora_variant[variants[0]]).__name__
            raise ValueError(
                f"{name} can't route adapter {variants[0]!r}, which is not plain LoRA ({kind}): convert it to LoRA, or "
                "call without routing weights"
            )
        if adapter_names is not None:
            raise ValueError(f"{name} got adapter_names together with routing weights: pass one of them")

    def _refuse_unreadable(self, factors: list[Tensor], x: Tensor) -> None:
        """Raise for adapters whose values are not here: a routed layer reads them without calling their modules."""
        name = "this layer" if self._site is None else self._site.name
        if any(type(factor).__name__ == "DTensor" for factor in factors):
            raise ValueError(
                f"{name} has sharded adapters (DTensor), which can't be routed: shard whole decoder layers, not lora_A "
                "and lora_B one by one"
            )
        if any(factor.is_meta for factor in factors) and not x.is_meta:
            raise ValueError(
                f"{name} has offloaded adapters (meta tensors), which can't be routed: keep {name} in memory in the "
                "device_map, or leave it out of target_modules"
            )


class Linear(Routed, lora.Linear):
    """`peft.tuners.lora.Linear` that takes routing weights; the base may be `nn.Linear` or GPT-2's `Conv1D`."""


def _is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether the base is exactly ``F.linear(x, weight, bias)`` with frozen weights, and nobody watches its call."""
    if type(layer) is not nn.Linear or nn.Linear.forward is not _linear_forward or "forward" in layer.__dict__:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype is not x.dtype:
        return False
    if bias is not None and (bias.requires_grad or bias.dtype is not x.dtype):
        return False
    return not nn_module._has_any_global_hook() and not torch._C._is_any_autocast_enabled()


def _is_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which raises for meta
