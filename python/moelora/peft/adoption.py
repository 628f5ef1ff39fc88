"""`adopt` a model of PEFT, and `release` it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import peft
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from moelora.nn.routers import Router
from moelora.peft.adapter_files import misfits
from moelora.peft.frame import KEYWORDS, check_mixture
from moelora.peft.layouts import find_mixture
from moelora.peft.model import TUNERS
from moelora.peft.peft_model import RoutedPeftModel, routed_class
from moelora.peft.tuner import ADDED, RoutedTuner

Model = TypeVar("Model", bound=nn.Module)


def adopt(model: Model, *, mixture: str = "layer") -> Model:
    """Make a PEFT model routable, in place.

    It, its layers with adapters (LoRA, LoHa, LoKr) and its ``base_model`` become routed subclasses of themselves: same
    parameters, same names, same checkpoint, and the same bits as long as no routing weights are in play. Afterwards
    ``model(...)`` and ``model.generate(...)`` take ``routing_weights``, and ``model.base_model`` takes a router
    (`LoraModel.attach_router`). A model that can't be routed (IA3, DoRA, ...) is adopted too: it runs PEFT's code, and
    weights are refused.

    Parameters
    ----------
    model : peft.PeftModel or peft.PeftMixedModel
        Adopting it again only changes `mixture`.
    mixture : {"layer", "logits"}
        What routing weights mix when a call does not say: the adapters in each layer, in one pass; or the logits of the
        experts, as N passes did.

    Returns
    -------
    peft.PeftModel
        The model itself.

    Raises
    ------
    TypeError
        If `model` is not a PEFT model.
    ValueError
        If `mixture` is neither of the two.
    """
    if not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    check_mixture(mixture)
    tuner: Any = model.base_model
    if type(tuner) in TUNERS:
        tuner.__class__ = TUNERS[type(tuner)]
        tuner._route_layers()
    if isinstance(tuner, RoutedTuner):
        tuner._host.mixture = mixture
        model.special_peft_forward_args.update(KEYWORDS)
        if not isinstance(model, RoutedPeftModel):
            stock: Any = type(model)
            vars(model)["_active_adapter"] = vars(model).pop("active_adapter")
            model.__class__ = routed_class(stock)
    else:
        reason = (
            f"{type(model).__name__} with {type(tuner).__name__} can't be routed, only LoRA, LoHa and LoKr in a "
            "PeftModel can"
        )
        for module in _entrances(model):
            if not any(isinstance(hook, _Refusal) for hook in module._forward_pre_hooks.values()):
                module.register_forward_pre_hook(_Refusal(reason), with_kwargs=True)
    return model


def release(model: Model) -> Model:
    """Undo `adopt`: detach the router and give the stock classes of PEFT back, in place.

    Returns the model itself; one that is not adopted is left as it is.
    """
    if not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    tuner: Any = model.base_model
    if isinstance(tuner, RoutedTuner):
        tuner._leave_model()
        for name in ADDED:
            vars(tuner).pop(name, None)
        stock: dict[type[BaseTuner], Any] = {routed: plain for plain, routed in TUNERS.items()}
        tuner.__class__ = stock[type(tuner)]
        model.special_peft_forward_args.difference_update(KEYWORDS)
        if isinstance(model, RoutedPeftModel):
            vars(model)["active_adapter"] = model.active_adapter
            del vars(model)["_active_adapter"]
            model.__class__ = model._stock_class
    else:
        for module in _entrances(model):
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _Refusal):
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


def open_pretrained(
    make: Callable[..., Any],
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **options: Any,
) -> Any:
    """PEFT's ``from_pretrained``, adopted; the folder of a whole mixture gives all its experts, and its router.

    Parameters
    ----------
    make : callable
        ``from_pretrained`` of the class that is wanted.
    model, model_id, adapter_name, is_trainable, **options
        As in PEFT. With another `adapter_name` than the default, one adapter is opened.

    Raises
    ------
    ValueError
        If something in the folder is missing, broken, unknown or does not fit the model, naming the file. The model is
        as it was then.
    """
    mixture = find_mixture(model_id) if adapter_name == "default" and not options.get("subfolder") else None
    if mixture is None:
        return adopt(make(model, model_id, adapter_name, is_trainable, **options))
    experts = mixture.check()
    router = None if mixture.router is None else mixture.make_router()
    opened: Any = None
    with _unchanged_by_failure(model):
        for name, expert in experts.items():
            folder = mixture.path(name)
            try:
                if opened is None:
                    opened = adopt(make(model, folder, name, is_trainable, **options))
                else:
                    opened.load_adapter(str(folder), name, is_trainable=is_trainable, **options)
                if faults := misfits(opened, name, expert):
                    # PEFT converts some names of other versions, and says what was left over then.
                    left = opened.load_adapter(str(folder), name, is_trainable=is_trainable, **options)
                    if left.missing_keys or left.unexpected_keys:
                        raise ValueError(faults)
            except (ValueError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                    raise
                raise ValueError(f"{expert.weights} does not fit the model: {error}") from error
        opened.base_model.set_adapter(mixture.active, inference_mode=not is_trainable)
        if mixture.frozen:
            opened.base_model.frozen_experts = frozenset(mixture.frozen)
            opened.set_requires_grad(mixture.frozen, requires_grad=False)
        if router is not None:
            router.requires_grad_(is_trainable).train(opened.training)
            opened.base_model.attach_router(router, mixture.config)
    return opened


@contextmanager
def _unchanged_by_failure(model: nn.Module) -> Iterator[None]:
    """Give a model its modules, hooks and flags back if the block raises; values of tensors are not kept."""
    modules = [
        (vars(module), dict(vars(module)), {id(v): copy.copy(v) for v in vars(module).values() if isinstance(v, dict)})
        for module in model.modules()
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for attributes, before, contents in modules:
            attributes.clear()
            attributes.update(before)
            for value in before.values():
                if id(value) in contents:  # in place, since handles of hooks know the dictionary they are in
                    value.clear()
                    value.update(contents[id(value)])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def activate_all_experts(model: nn.Module) -> list[str]:
    """Make every adapter active, and trainable unless it is frozen; return their names in the order of registration.

    A router may pick each of them from now on.

    Parameters
    ----------
    model : peft.PeftModel
        With LoRA, LoHa or LoKr adapters.

    Returns
    -------
    list of str
        What the columns of routing weights mean from now on.
    """
    tuner: Any = getattr(model, "base_model", None)
    if not isinstance(model, peft.PeftModel) or not any(isinstance(tuner, stock) for stock in TUNERS):
        raise TypeError(f"model must be a PeftModel with LoRA, LoHa or LoKr adapters, got {type(model).__name__}")
    names = list(tuner.peft_config)
    tuner.set_adapter(names)
    if isinstance(tuner, RoutedTuner) and isinstance(tuner.router, Router):
        for name in set(names) & set(tuner.router.expert_names):
            tuner.router.activate(name)
    return names


def _entrances(model: nn.Module) -> list[nn.Module]:
    """Where a call of a PEFT model that can't be routed may come in; some tuners pass over the model's own call."""
    tuner: Any = model.base_model
    return [model, tuner, tuner.model] if isinstance(tuner, BaseTuner) else [model, tuner]


class _Refusal:
    """Pre-hook of a model that can't be routed: weights must not be swallowed by its **kwargs."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if "routing_weights" in kwargs or "mixture" in kwargs:
            raise TypeError(f"{self.reason}: call it without routing_weights and mixture")
