"""Experts of an adopted model come and go: added, frozen, activated, renamed and removed, router and configuration with
them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moelora.nn.routers import LearnedRouter, Router
from moelora.peft.attached import AttachedRouter
from moelora.peft.config import MoELoraConfig

# Ways of starting an adapter that take it out of the base's weights, which all experts share.
CHANGING_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


class Experts(AttachedRouter):
    """What a tuner of an adopted model knows about the life of its experts.

    Attributes
    ----------
    frozen_experts : frozenset of str
        Those that `freeze_expert` named: nothing but `unfreeze_expert` makes them trainable.
    """

    frozen_experts: frozenset[str] = frozenset()
    _route_layers: Callable[[], None]

    def add_expert(
        self,
        name: str,
        config: PeftConfig | None = None,
        *,
        maturity: float | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an expert, which is no part of the mixture until `activate_expert`.

        Outputs keep their bits, and other parameters what they are. A `moelora.nn.Router` grows by a column: what grows
        of it are new parameters, so make the optimizer afterwards. Any other router is yours to grow. Until then the
        expert can be trained by itself: ``model.set_adapter(name)``.

        Parameters
        ----------
        name : str
        config : PeftConfig, optional
            Copied; its rank may differ from that of the others. Default: that of the first expert.
        maturity : float in (0, 1], optional
            In a router that has it, see `mark_mature`. Default: 1.
        autocast_adapter_dtype : bool
            As in ``PeftModel.add_adapter``.

        Raises
        ------
        TypeError
            If `name` is not a string, or `config` not a configuration.
        ValueError
            If there is such an expert already, PEFT or the router can't take the name, the configuration is of another
            type, brings modules or tokens of its own (``modules_to_save``, ``trainable_token_indices``) or changes the
            base, or `maturity` is given and there is no router that has it. The model is as it was then.
        """
        check_new_name(name, self.peft_config, self.prefix)
        new: Any = self._new_config(config)
        router = self._growing_router()
        if router is not None and name in router.expert_names:
            raise ValueError(
                f"the router has a column for {name!r} already, which is no adapter of the model: add it with "
                "PeftModel.add_adapter"
            )
        if maturity is not None and not isinstance(router, LearnedRouter):
            raise ValueError(f"maturity={maturity} needs a router that has it, got {type(self.router).__name__}")
        layers = set(self._adapter_modules())
        with _gradients_kept(self):
            self.peft_config[name] = new
            try:
                self.inject_adapter(self.model, name)
                if not any(
                    name in of_adapters for layer in self._adapter_modules() for of_adapters in _by_adapter(layer)
                ):
                    raise ValueError(f"target_modules={new.target_modules} were not found in the base model")
                self._cast_adapter_dtype(name, autocast_adapter_dtype)
                if isinstance(router, LearnedRouter):
                    router.add_expert(name, maturity=1.0 if maturity is None else maturity)
                elif router is not None:
                    router.add_expert(name)
            except Exception:
                self._withdraw(name, layers)
                raise
        for layer in self._adapter_modules():
            for of_adapters in _by_adapter(layer):
                if isinstance(of_adapters, nn.ModuleDict) and name in of_adapters:
                    of_adapters[name].train(layer.get_base_layer().training)  # PEFT's dropout always starts in training
        self.set_requires_grad(name)
        self._count_experts()

    def remove_expert(self, name: str) -> None:
        """Remove an expert, and its column in the router; the others keep their order and are trainable as before.

        Raises
        ------
        ValueError
            If there is no such expert, it is merged, or it is the only one of the model, of the active ones or of the
            router. The model is as it was then.
        """
        self._check_known(name)
        if len(self.peft_config) == 1:
            raise ValueError(f"{name!r} is the only expert: model.unload() gives the base model back")
        if list(self.active_adapters) == [name]:
            raise ValueError(f"{name!r} is the only active expert: activate another one first")
        merged = {adapter for layer in self._adapter_modules() for adapter in getattr(layer, "merged_adapters", ())}
        if name in merged:
            raise ValueError(f"{name!r} is merged into the base: call unmerge_adapter() first")
        router = self._growing_router()
        if router is not None and router.expert_names == [name]:
            raise ValueError(f"{name!r} is the router's only expert: detach the router first")
        with _gradients_kept(self):
            self.delete_adapter(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does, and its column in the router."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.frozen_experts:
            self.frozen_experts -= {adapter_name}
        self._keep_frozen()
        router = self._growing_router()
        if router is not None and router.expert_names == [adapter_name]:
            warnings.warn(f"the router's only expert {adapter_name!r} is deleted: it is detached", stacklevel=2)
            self.detach_router()
        elif router is not None and adapter_name in router.expert_names:
            router.remove_expert(adapter_name)
        self._count_experts()

    def rename_expert(self, old: str, new: str) -> None:
        """Give an expert another name, everywhere; its place in every order and its parameters stay.

        Raises
        ------
        TypeError
            If `new` is not a string.
        ValueError
            If there is no expert `old`, or one that is called `new`, or PEFT can't take the name.
        """
        self._check_known(old)
        check_new_name(new, self.peft_config, self.prefix)
        router = self._growing_router()
        if router is not None and old in router.expert_names:
            router.rename_expert(old, new)  # which refuses a name that it has, before anything has changed
        for module in self._adapter_modules():
            for of_adapters in _by_adapter(module):
                _rename_key(of_adapters, old, new)
            module._active_adapter = _renamed(module._active_adapter, old, new)
            if isinstance(module, BaseTunerLayer):
                module.merged_adapters = _renamed(module.merged_adapters, old, new)
            else:
                module._adapters = set(_renamed(list(module._adapters), old, new))
        _rename_key(self.peft_config, old, new)
        self.active_adapter = _renamed(self.active_adapter, old, new)
        self.frozen_experts = frozenset(_renamed(list(self.frozen_experts), old, new))

    def freeze_expert(self, name: str) -> None:
        """Train an expert no more. It stays in the mixture, and nothing but `unfreeze_expert` makes it trainable.

        Raises
        ------
        ValueError
            If there is no such expert.
        """
        self._check_known(name)
        self.frozen_experts |= {name}
        self._keep_frozen()

    def unfreeze_expert(self, name: str) -> None:
        """Make an expert trainable, whether it was frozen or not; ValueError if there is none of this name."""
        self._check_known(name)
        self.frozen_experts -= {name}
        self.set_requires_grad(name)

    def activate_expert(self, name: str) -> None:
        """Let an expert take part in the mixture; it is trainable unless it is frozen, the others are as before.

        Its column follows those of the experts that are active already, whose columns so keep their meaning. In the
        router it can be picked from now on.

        Raises
        ------
        ValueError
            If there is no such expert, the router does not know it, or it has modules of its own (``modules_to_save``)
            and one of the active ones, too.
        """
        self._check_known(name)
        router, active = self._growing_router(), list(self.active_adapters)
        if name not in active:
            active.append(name)
            for module in self._adapter_modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.check_set_adapter(active)
        if router is not None:
            router.activate(name)  # which refuses a name that it does not have, before anything has changed
        with _gradients_kept(self):
            self.set_adapter(active)
        self.set_requires_grad(name)

    def mark_mature(self, name: str, value: float = 1.0) -> None:
        """Set how mature an expert is for the router.

        Parameters
        ----------
        name : str
        value : float in (0, 1]
            Its logarithm is added to the expert's logit / temperature: 1 is what all others have, less holds it back.

        Raises
        ------
        ValueError
            If there is no router that has maturities, or it has no such expert, or for another value.
        """
        if not isinstance(self.router, LearnedRouter):
            raise ValueError(f"mark_mature needs a learned moelora router, got {type(self.router).__name__}")
        self.router.mark_mature(name, value)

    # What PEFT does to gradients, but for frozen experts.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        if self.frozen_experts:
            super().set_requires_grad(list(self.frozen_experts), False)

    # Steps of the above.

    def _growing_router(self) -> Router | None:
        """The router whose columns follow the experts."""
        return self.router if isinstance(self.router, Router) else None

    def _adapter_modules(self) -> Iterator[Any]:
        """Every module that PEFT keeps adapters in."""
        return (m for m in self.model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)))

    def _check_known(self, name: str) -> None:
        if name not in self.peft_config:
            raise ValueError(f"there is no expert {name!r}, only {list(self.peft_config)}")

    def _new_config(self, config: PeftConfig | None) -> Any:
        """The checked configuration of a new expert, a copy."""
        if config is not None and not isinstance(config, PeftConfig):
            raise TypeError(f"config must be a PeftConfig, got {type(config).__name__}")
        first: Any = next(iter(self.peft_config.values()), config)
        if first is None:
            raise ValueError("config must be given, as there is no expert whose configuration could be taken")
        new: Any = copy.deepcopy(first if config is None else config)
        if new.peft_type != first.peft_type:
            raise ValueError(f"config must be of type {first.peft_type}, like the other experts, got {new.peft_type}")
        for field in ("modules_to_save", "trainable_token_indices"):
            if getattr(new, field, None):
                raise ValueError(
                    f"config has {field}={getattr(new, field)}: PEFT would give the expert its own copy of what it "
                    "names, and only one can be active: train the shared modules themselves (requires_grad_)"
                )
        if getattr(new, "layer_replication", None):
            raise ValueError(
                f"config has layer_replication={new.layer_replication}, which changes the base of all experts: pass a "
                "config without it"
            )
        start = getattr(new, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(CHANGING_THE_BASE):
            raise ValueError(
                f"config has init_lora_weights={start!r}, which changes the base weights of all experts: pass a config "
                "with init_lora_weights=True"
            )
        new.inference_mode = False
        return new

    def _withdraw(self, name: str, layers: set[Any]) -> None:
        """Take an adapter back that was added in part; `layers` are those that were there before it."""
        del self.peft_config[name]
        modules: list[tuple[str, Any]] = list(self.model.named_modules())
        for path, layer in reversed(modules):
            if layer in layers:
                for of_adapters in _by_adapter(layer):
                    if name in of_adapters:
                        del of_adapters[name]
            elif isinstance(layer, BaseTunerLayer):
                wrapper: Any = layer
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_submodule(parent), child, wrapper.base_layer)
        self._route_layers()
        router = self._growing_router()
        if router is not None:
            self._watch_for(router)

    def _count_experts(self) -> None:
        """Let every configuration of a mixture say how many experts there are: at least 2, as they have to."""
        router = self._growing_router()  # which leaves out adapters that are no experts, as a static mixture is
        n = max(2, len(self.peft_config) if router is None else router.num_experts)

        def counted(config: Any) -> Any:
            if not isinstance(config, MoELoraConfig) or not config.use_moe_routing or config.num_experts == n:
                return config
            config = copy.copy(config)  # it may be the caller's
            config.num_experts, config.top_k_experts = n, min(n, config.top_k_experts)
            return config

        for name, config in self.peft_config.items():
            self.peft_config[name] = counted(config)
        if vars(self).get("_moe_config") is not None:
            self._moe_config = counted(self._moe_config)


def check_new_name(name: Any, taken: Collection[str], prefix: str) -> None:
    """Raise for a name that an adapter can't get, which PEFT would find out halfway; `prefix` is that of the tuner."""
    if not isinstance(name, str):
        raise TypeError(f"the name of an expert must be a string, got {type(name).__name__}")
    if name in taken:
        raise ValueError(f"there is an expert {name!r} already")
    if not name or "." in name or any(hasattr(kind(), name) for kind in (nn.ModuleDict, nn.ParameterDict)):
        raise ValueError(
            f"an expert can't be called {name!r}: a name must not be empty, have a dot, or be an attribute of "
            "torch.nn.ModuleDict or ParameterDict"
        )
    if name in prefix:
        warnings.warn(f"PEFT may not load {name!r} again, a name that is part of {prefix!r}", stacklevel=3)


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Context that leaves the parameters that are there with the ``requires_grad`` that they came with."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def _by_adapter(module: Any) -> Iterable[Any]:
    """What a module of PEFT keeps for each adapter: dicts, ModuleDicts, ParameterDicts, BufferDicts."""
    declared = (*module.adapter_layer_names, *getattr(module, "other_param_names", ()))
    # With a dot: of a layer inside, which is one of PEFT's modules itself.
    names = [name for name in declared if "." not in name] + ["lora_variant", "frozen_peft_weight_names"]
    return [kept for name in names if hasattr(kept := getattr(module, name, None), "keys")]


def _rename_key(mapping: Any, old: str, new: str) -> None:
    """Rename a key in place; it keeps its place in the order."""
    if old in mapping:
        items = list(mapping.items())
        mapping.clear()
        for key, value in items:
            mapping[new if key == old else key] = value


def _renamed(names: Any, old: str, new: str) -> Any:
    """A name, or a list of names, in which `old` is called `new`."""
    if isinstance(names, str):
        return new if names == old else names
    return [new if name == old else name for name in names]
