"""What the routed layers of all tuners have in common.

A routed layer is the stock layer with another class: same parameters, same names, same checkpoint. Without weights it
runs PEFT's own forward.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moelora.peft.frame import Site, as_weights, current, is_lost, lost

__all__ = ["Routed"]


class Routed(nn.Module, BaseTunerLayer):
    """What every routed layer adds to the stock layer that it is derived from; comes before it among the bases."""

    r: dict[str, int]  # rank of each adapter
    lora_variant: Any = {}  # adapters that are not plain LoRA, in layers of LoRA
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
        RuntimeError
            If it runs inside a checkpoint that would compute it again without its routing weights.
        """
        site = self._site
        frame = None if site is None or routing_weights is not None else current(site.host)
        if self.disable_adapters or (routing_weights is None and frame is None):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        if frame is not None and frame.off:
            return self._base_output(x, *args, **kwargs)
        experts: list[str] = self.active_adapters
        top_k = None
        if frame is not None:
            assert site is not None
            if experts != frame.experts:
                raise ValueError(
                    f"{site.name} has the active adapters {experts}, its model {frame.experts}: call "
                    "base_model.set_adapter, which sets them everywhere"
                )
            if is_lost():
                raise lost(site.name)
            weights, top_k = frame.weights_for(site, x), frame.top_k
        else:
            weights = as_weights(routing_weights)
            if weights.shape[-1] != len(experts):
                raise ValueError(
                    f"routing_weights must have one column for each active adapter {experts}, got shape "
                    f"{tuple(weights.shape)}"
                )
        if kwargs or self.merged_adapters or self.lora_variant:
            self._check(experts, kwargs)
        return self._mixed(x, weights, experts, top_k, args, kwargs)

    def extra_repr(self) -> str:
        active = self.active_adapters
        experts = (f"{name} (r={rank}{'' if name in active else ', not active'})" for name, rank in self.r.items())
        return f"experts: {', '.join(experts)}"

    def _mixed(
        self,
        x: Tensor,
        weights: Tensor,
        experts: list[str],
        top_k: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """What `forward` returns, once it is known which weights belong to x; of a row at most top_k are not 0."""
        raise NotImplementedError

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self._modules["base_layer"]
        y: Tensor = layer(x, *args, **kwargs)
        return y

    @property
    def _title(self) -> str:
        return "this layer" if self._site is None else self._site.name

    def _check(self, experts: list[str], kwargs: dict[str, Any]) -> None:
        """Take PEFT's own keywords out; raise for what can't be routed, naming the layer and the way out."""
        if self.merged_adapters:
            raise ValueError(
                f"{self._title} has merged adapters {self.merged_adapters}, which routing weights can't mix: call "
                "unmerge_adapter() first"
            )
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(f"{self._title} got adapter_names together with routing weights: pass one of them")

    def check_mergeable(self) -> None:
        """Raise if nothing can be merged into the base of this layer."""

    def _refuse_unreadable(self, factors: list[Tensor], x: Tensor) -> None:
        """Raise for adapters whose values are not here: a routed layer reads them without calling their modules."""
        name = self._title
        if any(type(factor).__name__ == "DTensor" for factor in factors):
            raise ValueError(
                f"{name} has sharded adapters (DTensor), which can't be routed: shard whole decoder layers, not the "
                "adapters one by one"
            )
        if any(factor.is_meta for factor in factors) and not x.is_meta:
            raise ValueError(
                f"{name} has offloaded adapters (meta tensors), which can't be routed: keep {name} in memory in the "
                "device_map, or leave it out of target_modules"
            )
