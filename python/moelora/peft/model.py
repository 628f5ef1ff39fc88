"""The tuner classes of adopted models: PEFT's, which route."""

from __future__ import annotations

from peft.tuners import loha, lokr, lora
from peft.tuners.tuners_utils import BaseTuner

from moelora.peft import lycoris, quantized
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
    has_hooks = True


class LoHaModel(RoutedTuner, loha.LoHaModel):
    """`peft.LoHaModel` that routes; see `LoraModel`."""

    routed_classes = {loha.Linear: lycoris.LoHaLinear}
    adapter_layer = loha.LoHaLayer


class LoKrModel(RoutedTuner, lokr.LoKrModel):
    """`peft.LoKrModel` that routes; see `LoraModel`."""

    routed_classes = {lokr.Linear: lycoris.LoKrLinear}
    adapter_layer = lokr.LoKrLayer


# Stock class of a tuner -> the routed class that takes its place.
TUNERS: dict[type[BaseTuner], type[RoutedTuner]] = {
    lora.LoraModel: LoraModel,
    loha.LoHaModel: LoHaModel,
    lokr.LoKrModel: LoKrModel,
}
