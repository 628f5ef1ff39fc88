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

from moelora.peft.checkpoint import Mixture, read_mixture, write_mixture


class RoutedPeftModel(peft.PeftModel):
    """What adopting adds to the class of a `peft.PeftModel`; see `routed_class`."""

    base_model: Any
    _stock_class: Any

    @property
    def active_adapter(self) -> Any:
        """The adapter that PEFT takes for the active one; it may have been renamed or removed in the tuner."""
        name = self.__dict__.get("active_adapter")
        return name if name in self.peft_config else next(iter(self.base_model.active_adapters), name)

    @active_adapter.setter
    def active_adapter(self, name: Any) -> None:
        self.__dict__["active_adapter"] = name

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as PEFT does and, with all adapters of a mixture, what belongs to it.

        That is ``moe_lora.json`` and ``router.safetensors`` at the root of the folder, see `moelora.peft.checkpoint`.
        With ``selected_adapters``, or where there is one adapter and no router, it is PEFT's folder and nothing else.
        """
        super().save_pretrained(str(save_directory), *args, **kwargs)
        given = _SAVE.bind(self, save_directory, *args, **kwargs).arguments
        router = self.base_model.router
        experts = list(self.peft_config)
        if given.get("selected_adapters") is not None or not given.get("is_main_process", True):
            return
        if router is None and len(experts) == 1:
            return
        prefix, state = "base_model.router.", given.get("kwargs", {}).get("state_dict")
        if state is not None:
            state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        write_mixture(
            save_directory,
            experts,
            active=list(self.active_adapters),
            config=self.base_model.moe_config,
            router=router,
            router_state=state,
        )

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load one adapter, as PEFT does.

        Raises
        ------
        ValueError
            If `model_id` is the folder of a whole mixture.
        """
        resuming = _asked_by_trainer("_load_from_checkpoint")
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


_SAVE = inspect.signature(peft.PeftModel.save_pretrained)


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
