"""Routed LoRA layers over quantised bases: the library's own kernel runs the base, the mixture is added to its result.

Merging is PEFT's. A class is here only if its library is installed, as in PEFT, which imports these libraries itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_hqq_available
from peft.tuners.lora import LoraLayer, torchao
from torch import Tensor

from moelora.peft.layers import Routed

# Stock class -> the routed class that takes its place.
ROUTED: dict[type[LoraLayer], type[Routed]] = {}


class Quantized(Routed):
    """What the routed layers over quantised bases add: some kernels of theirs have no gradient, and don't say so."""

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super()._base_output(x, *args, **kwargs)
        if torch.is_grad_enabled() and x.requires_grad and (reason := self._no_gradient(y)):
            name = "this layer" if self._site is None else self._site.name
            y = _NoGradient.apply(x, y.detach(), f"{name} ({type(self).__name__}) {reason}")  # type: ignore[no-untyped-call]
        return y

    def _no_gradient(self, y: Tensor) -> str | None:
        """Why the base can't pass a gradient from its output y on to its input, and the way out; None if it can."""
        if y.requires_grad:
            return None
        return (
            "has a base whose kernel gives no gradient for its input: quantise weights only, not activations, "
            "or evaluate under torch.no_grad()"
        )


class TorchaoLoraLinear(Quantized, torchao.TorchaoLoraLinear):
    """`peft.tuners.lora.torchao.TorchaoLoraLinear` that takes routing weights."""


ROUTED[torchao.TorchaoLoraLinear] = TorchaoLoraLinear

if is_bnb_4bit_available():
    from peft.tuners.lora import bnb

    class Linear8bitLt(Quantized, bnb.Linear8bitLt):
        """`peft.tuners.lora.bnb.Linear8bitLt` that takes routing weights."""

    class Linear4bit(Quantized, bnb.Linear4bit):
        """`peft.tuners.lora.bnb.Linear4bit` that takes routing weights (QLoRA)."""

        def _no_gradient(self, y: Tensor) -> str | None:
            layer: Any = self.get_base_layer()
            if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                return super()._no_gradient(y)
            return (
                "has 4-bit weights that bitsandbytes has repacked in an evaluation, for a kernel without gradients: "
                "load the model anew, and set support_avx512bf16_for_cpu = False on its bitsandbytes layers to train "
                "and evaluate in turn on this CPU"
            )

    ROUTED |= {bnb.Linear8bitLt: Linear8bitLt, bnb.Linear4bit: Linear4bit}

if is_hqq_available():
    from peft.tuners.lora import hqq

    class HqqLoraLinear(Quantized, hqq.HqqLoraLinear):
        """`peft.tuners.lora.hqq.HqqLoraLinear` that takes routing weights."""

    ROUTED[hqq.HqqLoraLinear] = HqqLoraLinear


class _NoGradient(torch.autograd.Function):
    """A base layer's output, whose backward is an error instead of a gradient that is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, message: str) -> Tensor:
        ctx.message = message
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> None:
        raise RuntimeError(ctx.message)
