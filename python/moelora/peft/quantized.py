"""Routed LoRA layers over quantised bases: the library's own kernel runs the base, the mixture is added to its result.

Merging is PEFT's. A class is here only if its library is installed, as in PEFT, which imports these libraries itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_hqq_available
from peft.tuners.lora import LoraLayer, torchao
from torch import Tensor

from moelora.peft.layers import RoutedLora

# Stock class -> the routed class that takes its place.
ROUTED: dict[type[LoraLayer], type[RoutedLora]] = {}


class Quantized(RoutedLora):
    """What the routed layers over quantised bases add: some of those kernels have no gradient, and don't say so."""

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not x.requires_grad or not torch.is_grad_enabled():
            return super()._base_output(x, *args, **kwargs)
        repacked = self._is_repacked()
        with torch.set_grad_enabled(not repacked):
            y = super()._base_output(x, *args, **kwargs)
        if y.requires_grad:
            return y
        message = f"{self._title} ({type(self).__name__}) {_REPACKED if repacked else _NO_GRADIENT}"
        refusing: Tensor = _NoGradient.apply(x, y, message)  # type: ignore[no-untyped-call]
        return refusing

    def _is_repacked(self) -> bool:
        """Whether the base's weights are in a form that has a forward kernel alone."""
        return False

    def _not_mergeable(self, reason: str) -> ValueError:
        name = "this layer" if self._site is None else self._site.name
        return ValueError(
            f"nothing can be merged into {name} ({type(self).__name__}): {reason}; load the base unquantised to merge"
        )


_NO_GRADIENT = (
    "has a base whose kernel gives no gradient for its input, so what is below it can't train: quantise the weights "
    "alone, not activations"
)
_REPACKED = (
    "has 4-bit weights that bitsandbytes has repacked for evaluation on this CPU, in a form without gradients: load "
    "the model anew, and to evaluate between training steps, set support_avx512bf16_for_cpu = False on its base layers"
)


class _NoGradient(torch.autograd.Function):
    """Identity on y, of which autograd does not know that it comes from x: an error where x's gradient would miss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, message: str) -> Tensor:
        ctx.message = message
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> None:
        raise RuntimeError(ctx.message)


class TorchaoLoraLinear(Quantized, torchao.TorchaoLoraLinear):
    """`peft.tuners.lora.torchao.TorchaoLoraLinear` that takes routing weights."""

    def check_mergeable(self) -> None:
        layer: Any = self.get_base_layer()
        try:
            layer.weight.dequantize()
            if self.get_apply_tensor_subclass is not None:
                return
            reason = "transformers' TorchAoConfig did not quantise it, so PEFT can't do so anew"
        except NotImplementedError:
            reason = f"its weights ({type(layer.weight).__name__}) can't be dequantised"
        raise self._not_mergeable(reason)


ROUTED[torchao.TorchaoLoraLinear] = TorchaoLoraLinear

if is_bnb_4bit_available():
    from peft.tuners.lora import bnb

    class Linear8bitLt(Quantized, bnb.Linear8bitLt):
        """`peft.tuners.lora.bnb.Linear8bitLt` that takes routing weights."""

    class Linear4bit(Quantized, bnb.Linear4bit):
        """`peft.tuners.lora.bnb.Linear4bit` that takes routing weights (QLoRA)."""

        def _is_repacked(self) -> bool:
            layer: Any = self.get_base_layer()
            return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)

        def check_mergeable(self) -> None:
            if self._is_repacked():
                raise self._not_mergeable("bitsandbytes has repacked its weights for evaluation on this CPU")

    ROUTED |= {bnb.Linear8bitLt: Linear8bitLt, bnb.Linear4bit: Linear4bit}

if is_hqq_available():
    from peft.tuners.lora import hqq

    class HqqLoraLinear(Quantized, hqq.HqqLoraLinear):
        """`peft.tuners.lora.hqq.HqqLoraLinear` that takes routing weights."""

    ROUTED[hqq.HqqLoraLinear] = HqqLoraLinear
