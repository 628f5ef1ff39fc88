"""The tuner class of an adopted model: `peft.LoraModel` that routes."""

from __future__ import annotations

from peft.tuners import lora

from moelora.peft import quantized
from moelora.peft.embedding import Embedding
from moelora.peft.layers import Linear
from moelora.peft.static import SingleAdapters
from moelora.peft.tuner import RoutedTuner


class LoraModel(RoutedTuner, SingleAdapters, lora.LoraModel):
    """The tuner of an adopted model: `peft.LoraModel` that routes, and holds the router.

    It is `model.base_model`, so its methods are reached through the model too.
    """

    routed_classes = {lora.Linear: Linear, lora.Embedding: Embedding} | quantized.ROUTED
    adapter_layer = lora.LoraLayer
