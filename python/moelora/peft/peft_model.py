"""The class of an adopted `peft.PeftModel`: saves the router beside the experts, and trains on with all of them.

transformers' Trainer takes a PEFT model for one with a single adapter. Resuming, it makes the first active adapter the
only one and freezes the rest; and it drops every column of a dataset that the model inside does not name. PEFT's calls
mean something else to everybody else, so the answers below that are for Trainer look at who asks.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn

from moelora.peft.adapter_files import misfits
from moelora.peft.checkpoint import Mixture, read_mixture
from moelora.peft.saving import describe_router, holds_set, save_mixture, save_selected


class RoutedPeftModel(peft.PeftModel):
    """What adopting adds to the class of a `peft.PeftModel`; see `routed_class`."""

    base_model: Any
    _stock_class: Any
    _active_adapter: (
        Any  # not in __dict__["active_adapter"], which torch.compile of torch 2.11 would read here for ever
    )

    @property
    def active_adapter(self) -> Any:
        """The adapter that PEFT takes for the active one; it may have been renamed or removed in the tuner."""
        name = self._active_adapter
        return name if name in self.peft_config else next(iter(self.base_model.active_adapters), name)

    @active_adapter.setter
    def active_adapter(self, name: Any) -> None:
        self._active_adapter = name

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as PEFT does and, with all adapters of a mixture, what belongs to it.

        That is ``moe_lora.json`` and ``router.safetensors`` at the root of the folder, see `moelora.peft.checkpoint`;
        all files take their places together. With ``selected_adapters``, or where there is one adapter and no router,
        it is PEFT's folder and nothing else, unless the folder holds a set: then adapters of the set that are saved
        alone are its own from then on, and a whole model takes its place.
        """
        given = _SAVE.bind(self, save_directory, *args, **kwargs)
        options = given.arguments.get("kwargs", {})
        target = Path(save_directory)

        def write(folder: str | os.PathLike[str]) -> None:
            given.arguments["save_directory"] = str(folder)
            super(RoutedPeftModel, self).save_pretrained(*given.args[1:], **given.kwargs)

        router = self.base_model.router
        experts = list(self.peft_config)
        selected = given.arguments.get("selected_adapters")
        if not given.arguments.get("is_main_process", True):
            write(target)
        elif selected is None and (router is not None or len(experts) > 1 or holds_set(target)):
            save_mixture(
                target,
                write,
                experts,
                active=list(self.active_adapters),
                frozen=[name for name in experts if name in self.base_model.frozen_experts],
                config=self.base_model.moe_config,
                router=None if router is None else describe_router(router),
                router_state=None if router is None else _router_state(router, options.get("state_dict")),
            )
        elif selected is not None and (mixture := read_mixture(target)) and {*selected} & {*mixture.experts}:
            save_selected(target, write, selected)
        else:
            write(target)

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load one adapter, as PEFT does.

        Raises
        ------
        ValueError
            If `model_id` is the folder of a whole mixture.
        """
        resuming = _asked_by_trainer("_load_from_checkpoint")
        folder = Path(model_id)
        whole = read_mixture(folder.parent) if resuming and folder.name == adapter_name else None
        if whole is not None and folder not in whole.folders.values():
            return None  # of an older set, which was saved to the same folder
        mixture = read_mixture(model_id)
        if mixture is not None and (resuming or _asked_by_trainer("_load_best_model")):
            return self._restore(mixture)
        if mixture is not None and not Path(model_id, peft.utils.CONFIG_NAME).exists():
            raise ValueError(
                f"{model_id} holds the experts {mixture.experts}: load one of their folders, or all of them and the "
                "router with moelora.PeftModel.from_pretrained"
            )
        result = super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        if resuming and self.base_model.router is not None:
            self._restore_router(Path(model_id).parent)
        return result

    def set_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not _asked_by_trainer("_load_from_checkpoint"):
            super().set_adapter(adapter_name, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if self._stock_class.generate is not peft.PeftModel.generate:
            return super().generate(*args, **kwargs)  # type: ignore[no-untyped-call]
        # PEFT's generate of a model without a task passes over the tuner, which follows the routing weights.
        with self._enable_peft_forward_hooks(*args, **kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in self.special_peft_forward_args}
            return self.base_model.generate(*args, **kwargs)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters as PEFT does, and below those of each expert and of the
        router, if there are several experts or a router."""
        super().print_trainable_parameters()
        parts = {name: _parameters_of(self.base_model, name) for name in self.peft_config}
        if self.base_model.router is not None:
            parts["router"] = list(self.base_model.router.parameters())
        if len(parts) < 2:
            return
        for name, parameters in parts.items():
            sizes = [(p.numel() or getattr(p, "ds_numel", 0), p.requires_grad) for p in parameters]
            trainable, every = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
            print(f"  {name}: trainable params: {trainable:,d} || all params: {every:,d}")

    def get_base_model(self) -> Any:
        model = super().get_base_model()
        if not torch.compiler.is_compiling() and _asked_by_trainer("_set_signature_columns_if_needed"):
            return SimpleNamespace(forward=_with_routing_weights(model.forward))
        return model

    def _restore(self, mixture: Mixture) -> Any:
        """Load a whole mixture into the adapters and the router that are there."""
        missing = [name for name in mixture.experts if name not in self.peft_config]
        if missing:
            raise ValueError(f"{mixture.folder} holds the experts {missing}, which the model does not have")
        for name, expert in mixture.check().items():
            if faults := misfits(self, name, expert):
                raise ValueError(f"{expert.weights} does not fit the model's adapter {name!r}: {faults}")
        if self.base_model.router is not None:
            mixture.load_router(self.base_model.router)
        for name in mixture.experts:
            result = super().load_adapter(str(mixture.path(name)), name)
        return result

    def _restore_router(self, folder: Path) -> None:
        mixture = read_mixture(folder)
        if mixture is None:
            raise ValueError(f"{folder} has no moe_lora.json, so it can't restore the router: was it saved by moelora?")
        mixture.load_router(self.base_model.router)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle would not find it by its name.
        return (_blank, (self._stock_class,), *super().__reduce_ex__(protocol)[2:])


def _parameters_of(tuner: nn.Module, adapter: str) -> list[nn.Parameter]:
    """What PEFT's layers hold for one adapter."""
    found: dict[int, nn.Parameter] = {}
    for layer in tuner.modules():
        for kind in getattr(layer, "adapter_layer_names", ()):
            by_adapter = getattr(layer, kind)
            if adapter in by_adapter:
                held = by_adapter[adapter]
                found |= {id(p): p for p in (held.parameters() if isinstance(held, nn.Module) else [held])}
    return list(found.values())


_SAVE = inspect.signature(peft.PeftModel.save_pretrained)


def _router_state(router: torch.nn.Module, state: Any) -> Any:
    """The router's tensors, from the state of the whole model where that is given, as where it is sharded."""
    if state is None:
        return router.state_dict()
    prefix = "base_model.router."
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


@functools.cache
def routed_class(stock: Any) -> Any:
    """The subclass of a class of PEFT models that adopted models of it have."""
    members = {
        "__module__": __name__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_stock_class": stock,
    }
    return type(stock)(stock.__name__, (RoutedPeftModel, stock), members)


def _blank(stock: type) -> Any:
    routed = routed_class(stock)
    return routed.__new__(routed)


def _asked_by_trainer(method: str) -> bool:
    """Whether the caller of our caller is this method of `transformers.Trainer`."""
    frame = sys._getframe(2)
    return frame.f_code.co_name == method and frame.f_globals.get("__name__") == "transformers.trainer"


def _with_routing_weights(forward: Any) -> Any:
    """A function whose signature is that of `forward` and ``routing_weights``."""
    signature = inspect.signature(forward)
    added = inspect.Parameter("routing_weights", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, last = signature.parameters.values()
    rest = [last] if last.kind is last.VAR_KEYWORD else []
    named = named if rest else [*named, last]

    def accepts() -> None: ...

    accepts.__signature__ = signature.replace(parameters=[*named, added, *rest])  # type: ignore[attr-defined]
    return accepts
