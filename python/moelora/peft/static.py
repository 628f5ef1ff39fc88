"""Mixtures with the same weights for every token: merged into the base, or as one plain LoRA adapter."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from torch import Tensor, nn

from moelora.peft.experts import CHANGING_THE_BASE, check_new_name
from moelora.peft.frame import Host, as_weights
from moelora.peft.routed import Routed

# Of one layer: weight of each expert that it has.
Mixture = dict[str, float]

# What vLLM's --max-lora-rank takes (MaxLoRARanks in vllm/config/lora.py, 0.14).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class StaticMixtures(BaseTuner):
    """What a tuner of an adopted model can do with weights that no token decides."""

    _host: Host
    _routed: list[Routed]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        routing_weights: Tensor | Sequence[float] | None = None,
    ) -> Any:
        r"""Merge the experts into the base and return it, a plain model.

        With routing weights the base gets

        .. math:: W + \sum_e w_e s_e B_e A_e

        added at once: it is rounded, or quantised, once.

        Parameters
        ----------
        progressbar : bool
        safe_merge : bool
            Look for NaNs and infinities first.
        adapter_names : list of str, optional
            What is merged; default: the active adapters.
        routing_weights : Tensor or sequence of numbers, [N] or [1, 1, L, N], optional
            Weight of each of them, the same for all decoder layers, or for each of these. None: PEFT's plain sum, with
            a warning where several are added up.

        Returns
        -------
        nn.Module
            The model inside, with PEFT's layers and the router taken off.

        Raises
        ------
        TypeError
            If `routing_weights` are no real numbers.
        ValueError
            If they are not finite, or their shape does not fit; if an adapter does not exist or can't be mixed; if the
            base of a layer can't be merged with, or shares its weight with another; if `safe_merge` finds something.
            The model is as it was then.
        """
        experts = list(self.active_adapters) if adapter_names is None else list(adapter_names)
        if routing_weights is None:
            if len(experts) > 1:
                warnings.warn(
                    f"merging adds up the adapters {experts} unweighted, as PEFT does: pass routing_weights for a "
                    "mixture of them",
                    stacklevel=2,
                )
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        mixtures = self._mixtures(routing_weights, "routing_weights", experts)
        self._check_merge_allowed()  # type: ignore[no-untyped-call]
        self._check_shared([layer for layer, mixture in mixtures if mixture])
        for layer, mixture in mixtures:
            _check_mergeable(layer, mixture, safe_merge)
        with _merging(mixtures):
            # The names as they were given: for None PEFT's other modules take the active experts that they have.
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_shared(self, layers: list[Routed]) -> None:
        """Raise for a layer whose weight belongs to another one, too: PEFT would change both."""
        holders = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        for layer in layers:
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is not None and holders[id(weight)] > 1:
                assert layer._site is not None
                raise ValueError(
                    f"{layer._site.name} can't be merged: it shares its weight with another layer, as tied embeddings "
                    "do, which would change, too: use to_single_adapter, or give each its own weight first"
                )

    def _mixtures(self, weights: Any, title: str, experts: list[str]) -> list[tuple[Routed, Mixture]]:
        """Every routed layer with the weights of those experts that it has."""
        unknown = [name for name in experts if name not in self.peft_config]
        if unknown:
            raise ValueError(f"there are no adapters {unknown}, only {list(self.peft_config)}")
        if len(set(experts)) < len(experts):
            raise ValueError(f"adapter_names must be different ones, got {experts}")
        by_layer = _static(weights, title, experts, self._host.num_layers)
        self._check_routable(experts)
        mixtures = []
        for layer in self._routed:
            site = layer._site
            assert site is not None
            present = [name for name in experts if name in layer.r]
            layer._check(present, {})
            if present and site.layer is None and by_layer.dim() > 1:
                raise ValueError(
                    f"{site.name} is in no decoder layer, so {title} [1, 1, L, N] has nothing for it: pass [N]"
                )
            row = by_layer if by_layer.dim() == 1 else by_layer[site.layer or 0]
            mixtures.append(
                (layer, {name: w for name, w in zip(experts, row.tolist(), strict=True) if name in present})
            )
        return mixtures

    if TYPE_CHECKING:

        def _check_routable(self, experts: list[str]) -> None: ...


class SingleAdapters(StaticMixtures):
    """What a LoRA tuner can do beyond that, for LoRA experts side by side are LoRA again."""

    def to_single_adapter(self, weights: Tensor | Sequence[float], adapter_name: str = "mixture") -> None:
        r"""Add an adapter that is the mixture of the active ones: plain LoRA of the sum of their ranks, and exact.

        .. math:: A = \begin{pmatrix} A_1 \\ \vdots \\ A_N \end{pmatrix} \qquad
                  B = \begin{pmatrix} w_1 s_1 B_1 & \cdots & w_N s_N B_N \end{pmatrix}

        with a scaling of 1, in float32 at least, without dropout. It is not active and does not follow later changes of
        the experts. ``save_pretrained(folder, selected_adapters=[adapter_name])`` writes it as stock PEFT reads it. All
        its layers have one rank, that of the layer that needs most, filled up with zeros: many readers of LoRA files
        know no ranks by layer.

        Prints the rank, and the least ``--max-lora-rank`` of vLLM that is enough for it.

        Parameters
        ----------
        weights : Tensor or sequence of numbers, [N] or [1, 1, L, N]
            Of the active adapters, the same for all decoder layers, or for each of these.
        adapter_name : str
            A new name.

        Raises
        ------
        TypeError
            If `weights` are no real numbers, or `adapter_name` is no string.
        ValueError
            If there is an adapter of this name already, or it can't be a name; if `weights` are not finite, or their
            shape does not fit; if an expert is not plain LoRA or brings more than LoRA layers. The model is as it was
            then.
        """
        check_new_name(adapter_name, self.peft_config, self.prefix)
        experts = list(self.active_adapters)
        mixtures = [(layer, mixture) for layer, mixture in self._mixtures(weights, "weights", experts) if mixture]
        config = _config([self.peft_config[name] for name in experts], experts, mixtures)
        before = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
            filled = dict(mixtures)
            for layer in self._routed:
                if adapter_name in layer.r:
                    _fill(layer, adapter_name, filled.get(layer, {}))
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        finally:  # PEFT makes the active adapters trainable
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)
        enough = next((rank for rank in _VLLM_RANKS if rank >= config.r), None)
        print(
            f"{adapter_name}: one LoRA adapter of rank {config.r}; "
            + (f"vLLM: --max-lora-rank {enough}" if enough else f"vLLM takes ranks up to {_VLLM_RANKS[-1]} only")
        )


def _static(weights: Any, title: str, experts: list[str], num_layers: int) -> Tensor:
    """Checked weights [N] or [L, N], in float64 on the CPU."""
    if not isinstance(weights, Tensor):
        try:
            weights = torch.as_tensor(weights, dtype=torch.float64)
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(f"{title} must be a torch.Tensor or numbers, got {type(weights).__name__}") from None
    shape = tuple(weights.shape)
    if weights.dim() != 1 and (weights.dim() != 4 or shape[:2] != (1, 1)):
        raise ValueError(
            f"{title} must have shape [N], or [1, 1, L, N] for each decoder layer, got {shape}: weights that differ "
            "between tokens or sequences have no static mixture"
        )
    weights = as_weights(weights, title).detach()
    if shape[-1] != len(experts):
        raise ValueError(f"{title} must have one column for each of the adapters {experts}, got shape {shape}")
    if weights.dim() == 4 and shape[2] != num_layers:
        raise ValueError(
            f"{title} [1, 1, L, N] needs L = {num_layers}, the number of decoder layers, got shape {shape}"
        )
    if weights.is_meta or not weights.isfinite().all():
        raise ValueError(f"{title} must hold finite numbers, got {weights}")
    rows: Tensor = weights.to("cpu", torch.float64)
    return rows[0, 0] if rows.dim() == 4 else rows


# Merging.


def _check_mergeable(layer: Routed, mixture: Mixture, safe: bool) -> None:
    """Raise for what PEFT would find out when other layers are merged already."""
    assert layer._site is not None
    name = layer._site.name
    base: Any = layer.get_base_layer()
    if _biased(layer, mixture) and getattr(base, "bias", None) is None:
        raise ValueError(f"{name} has lora_bias=True, which can't be merged: its base layer has no bias")
    if mixture:
        layer.check_mergeable()
    if not safe or not mixture:
        return
    with torch.no_grad(), onload_layer(layer):
        weight, changes = getattr(base, "weight", None), [_delta(layer, mixture)]
        if type(weight) is nn.Parameter and weight.is_floating_point():
            changes[0] = weight + changes[0].to(weight.dtype)
        if _biased(layer, mixture):
            changes.append(_bias(layer, mixture))
        finite = all(bool(change.isfinite().all()) for change in changes)
    if not finite:
        raise ValueError(
            f"NaNs or infinities detected in the merged weights of {name}: one of the adapters {list(mixture)} seems "
            "to be broken"
        )


@contextmanager
def _merging(mixtures: list[tuple[Routed, Mixture]]) -> Iterator[None]:
    """Context in which each layer merges its mixture, whatever adapters it is told to merge."""
    for layer, mixture in mixtures:
        vars(layer)["merge"] = partial(_merge, layer, mixture)
    try:
        yield
    finally:
        for layer, _ in mixtures:
            del vars(layer)["merge"]


def _merge(layer: Any, mixture: Mixture, safe_merge: bool = False, adapter_names: Any = None) -> None:
    """Merge as PEFT merges one adapter into this kind of layer; its change of the weights is the mixture's."""
    if not mixture:
        return
    biases = getattr(layer, "lora_bias", {})
    biased = dict(biases)
    vars(layer)["get_delta_weight"] = lambda name: _delta(layer, mixture)
    biases.update(dict.fromkeys(biases, False))
    try:
        type(layer).merge(layer, safe_merge=safe_merge, adapter_names=[next(iter(mixture))])
    finally:
        biases.update(biased)
        del vars(layer)["get_delta_weight"]
    if _biased(layer, mixture):
        layer.get_base_layer().bias.data += _bias(layer, mixture)


@torch.no_grad()
def _delta(layer: Any, mixture: Mixture) -> Tensor:
    """sum_e w_e s_e B_e A_e, in the layout of the base's weight."""
    deltas = (w * _at_least_float32(type(layer).get_delta_weight(layer, name)) for name, w in mixture.items())
    total: Tensor = next(deltas)
    for delta in deltas:
        total += delta
    return total


@torch.no_grad()
def _bias(layer: Any, mixture: Mixture) -> Tensor:
    """sum_e w_e s_e bias_e over the experts that have one."""
    biases = [
        _at_least_float32(layer.lora_B[name].bias) * (mixture[name] * layer.scaling[name])
        for name in _biased(layer, mixture)
    ]
    return torch.stack(biases).sum(0)


def _biased(layer: Any, mixture: Mixture) -> list[str]:
    biases = getattr(layer, "lora_bias", {})
    return [name for name in mixture if biases.get(name)]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# One adapter.


def _config(configs: list[Any], experts: list[str], mixtures: list[tuple[Any, Mixture]]) -> LoraConfig:
    """The configuration of one adapter for all of these layers."""
    for name, config in zip(experts, configs, strict=True):
        for field in ("modules_to_save", "trainable_token_indices", "layer_replication"):
            if getattr(config, field, None):
                raise ValueError(f"expert {name!r} has {field}, which one LoRA adapter of all can't carry")
        start = config.init_lora_weights
        if isinstance(start, str) and start.startswith(CHANGING_THE_BASE):
            raise ValueError(
                f"expert {name!r} was started with init_lora_weights={start!r}, which changed the base, so the mixture "
                "would be wrong on the base as it was: convert the expert to plain LoRA, as PEFT does it with "
                "path_initial_model_for_weight_conversion, or merge_and_unload(routing_weights=...)"
            )
    lora_bias = any(_biased(layer, mixture) for layer, mixture in mixtures)
    for layer, mixture in mixtures:
        assert layer._site is not None
        name = layer._site.name
        if lora_bias and not len(layer.lora_A):
            raise ValueError(f"{name} is an embedding, and PEFT has no lora_bias=True for these: train without it")
        for factor in (factor for expert in mixture for factor in _factors(layer, expert)):
            if factor.is_meta or type(factor).__name__ == "DTensor":
                raise ValueError(f"{name} has sharded or offloaded adapters, whose values are not here: gather them")
    biases = [config.bias for config in configs]
    rank = max((sum(layer.r[name] for name in mixture) for layer, mixture in mixtures), default=1)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[layer._site.name for layer, _ in mixtures if layer._site is not None],
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        bias=next((bias for bias in ("all", "lora_only") if bias in biases), "none"),
        lora_bias=lora_bias,
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
        revision=configs[0].revision,
        inference_mode=True,
    )


@torch.no_grad()
def _fill(layer: Any, name: str, mixture: Mixture) -> None:
    """Give the new adapter of a layer the values of its mixture."""
    new_A, new_B = _factors(layer, name)
    experts = [(*_factors(layer, expert), w * layer.scaling[expert]) for expert, w in mixture.items()]
    dtype = torch.float32
    for A, B, _ in experts:
        dtype = torch.promote_types(dtype, torch.promote_types(A.dtype, B.dtype))
    new_A.data, new_B.data = torch.zeros_like(new_A, dtype=dtype), torch.zeros_like(new_B, dtype=dtype)
    start = 0
    for A, B, factor in experts:
        rows = slice(start, start := start + len(A))
        new_A[rows] = A
        new_B[:, rows] = B.to(dtype) * factor
    if layer.lora_bias[name]:
        bias = layer.lora_B[name].bias
        bias.data = _bias(layer, mixture).to(dtype) if _biased(layer, mixture) else torch.zeros_like(bias, dtype=dtype)


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] of an adapter."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight
