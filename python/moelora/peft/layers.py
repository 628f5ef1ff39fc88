"""LoRA layers of PEFT that mix their adapters by routing weights."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from moelora.nn import routed_lora
from moelora.nn.cuda import on_gpu
from moelora.nn.routers import select_columns
from moelora.peft.routed import Routed

__all__ = ["Linear", "LoraLayer", "RoutedLora"]

_forwards = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}


class RoutedLora(Routed, LoraLayer):
    """What every routed LoRA layer adds to the stock layer that it is derived from; comes before it among the bases."""

    def _mixed(
        self,
        x: Tensor,
        weights: Tensor,
        experts: list[str],
        top_k: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
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
                weights = select_columns(weights, [i for i, name in enumerate(experts) if name in all_A])
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
        if top_k is not None:
            # What is not in kernels of ours has no use for it: it would have to find out anew which weights are 0.
            top_k = min(top_k, len(present)) if _leaves_experts_out(x, weights, bool(dropout_p)) else None

        plain = None if args or kwargs else _plain_base(layer, x)
        if plain is not None:
            # Base and mixture in one autograd node: its backward makes one pass over dx less.
            weight, bias = plain
            y = routed_lora(
                x, lora_A, lora_B, weights, scaling, weight=weight, bias=bias, top_k=top_k, dropout_p=dropout_p
            )
            dtype = y.dtype
        else:
            y = self._base_output(x, *args, **kwargs)
            dtype = y.dtype
            # Under autocast a base that stays in float32 would be rounded on its way through routed_lora.
            if dtype is _dtype_of_call(x):
                y = routed_lora(x, lora_A, lora_B, weights, scaling, base_output=y, top_k=top_k, dropout_p=dropout_p)
            else:
                y = y + routed_lora(x, lora_A, lora_B, weights, scaling, top_k=top_k, dropout_p=dropout_p)
        if True in self.lora_bias.values():
            y = y + self._mixed_bias(x, weights, present)
        return y if y.dtype is dtype else y.to(dtype)

    def _mixed_bias(self, x: Tensor, weights: Tensor, present: list[str]) -> Tensor:
        """sum_e s_e w_e bias_e for lora_bias=True: [d_out], or broadcasting over x's rows."""
        lora_B: list[Any] = [self.lora_B[name] for name in present]
        zero = torch.zeros_like(lora_B[0].weight[:, 0])
        biases = torch.stack(
            [
                b.bias * self.scaling[name] if self.lora_bias[name] else zero
                for name, b in zip(present, lora_B, strict=True)
            ]
        )
        mixed = weights.to(biases.dtype) @ biases
        return mixed.unsqueeze(1) if 1 < mixed.dim() < x.dim() else mixed

    def _drop_probability(self, dropout: nn.Module) -> float:
        if type(dropout) is nn.Identity:
            return 0.0
        if isinstance(dropout, nn.Dropout):
            return dropout.p if dropout.training else 0.0
        raise TypeError(
            f"{self._title} has a {type(dropout).__name__} as lora_dropout, which can't be routed: use nn.Dropout, or "
            "lora_dropout=0"
        )

    def _check(self, experts: list[str], kwargs: dict[str, Any]) -> None:
        super()._check(experts, kwargs)
        kwargs.pop("alora_offsets", None)
        variants = [expert for expert in experts if expert in self.lora_variant]
        if variants:
            kind = type(self.lora_variant[variants[0]]).__name__
            raise ValueError(
                f"{self._title} can't route adapter {variants[0]!r}, which is not plain LoRA ({kind}): convert it to "
                "LoRA, or call without routing weights"
            )


class Linear(RoutedLora, lora.Linear):
    """`peft.tuners.lora.Linear` that takes routing weights; the base may be `nn.Linear` or GPT-2's `Conv1D`."""


def _plain_base(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight [d_out, d_in] and bias of a base that is exactly ``F.linear(x, weight, bias)`` with frozen weights.

    None of any other, and where somebody watches its call.
    """
    kind = type(layer)
    forward = _forwards.get(kind)
    if forward is None or kind.forward is not forward or "forward" in layer.__dict__:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    dtype = x.dtype
    if torch._C._is_any_autocast_enabled():
        if not x.is_cuda:
            return None
        dtype = _dtype_of_call(x)
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype is not dtype:
        return None
    if bias is not None and (bias.requires_grad or bias.dtype is not dtype):
        return None
    if nn_module._has_any_global_hook():
        return None
    return (weight.t() if kind is Conv1D else weight), bias  # Conv1D holds its weight as [d_in, d_out]


def _leaves_experts_out(x: Tensor, weights: Tensor, drops: bool) -> bool:
    """Whether kernels that gain by top_k will most likely compute a layer."""
    if x.device.type == "cpu":
        return not (drops and torch.compiler.is_compiling())
    narrow = x.dtype in (torch.bfloat16, torch.float16) or _is_autocast(x)
    return narrow and not drops and weights.dim() == x.dim() and on_gpu(x)


def _dtype_of_call(x: Tensor) -> torch.dtype:
    """The dtype to which routed_lora casts x, as F.linear would: under autocast another than its own."""
    if not _is_autocast(x) or x.dtype is torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _is_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which raises for meta
