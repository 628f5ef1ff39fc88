"""Hosting in PEFT, and PEFT's own namespace around it.

Every name of ``peft`` is here under the same name, and every module of it (`moelora.peft.mirror`). What makes a
`PeftModel` makes an adopted one, `LoraModel` and `Linear` are the routed classes; the rest are PEFT's objects
themselves.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import peft as _peft
from peft.tuners import loha as _loha
from peft.tuners import lokr as _lokr
from peft.tuners import lora as _lora
from torch import nn

from moelora.peft import mirror as _mirror
from moelora.peft.adoption import activate_all_experts, adopt, open_pretrained, release
from moelora.peft.config import MoELoraConfig, mark_hosted
from moelora.peft.data import RoutingWeightsCollator
from moelora.peft.embedding import Embedding
from moelora.peft.layers import Linear, LoraLayer
from moelora.peft.lycoris import LoHaLinear, LoKrLinear
from moelora.peft.model import LoHaModel, LoKrModel, LoraModel
from moelora.peft.patch import patch_peft, stock_get_peft_model
from moelora.peft.stats import routing_stats

__all__ = [
    "Embedding",
    "Linear",
    "LoHaModel",
    "LoKrModel",
    "LoraLayer",
    "LoraModel",
    "MoELoraConfig",
    "RoutingWeightsCollator",
    "activate_all_experts",
    "adopt",
    "get_peft_model",
    "patch_peft",
    "release",
    "routing_stats",
]
__all__ += _peft.__all__


# Task types whose head PEFT saves with each adapter.
_WITH_A_HEAD = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """`peft.get_peft_model`, adopted; with a `MoELoraConfig`, a whole mixture.

    Parameters
    ----------
    model, peft_config, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage
        As in PEFT.
    adapter_name : str
        Left at its default, a `MoELoraConfig` gives adapters ``expert_0`` .. ``expert_{N-1}``, all of them active and
        trainable, and the router that ``router_type`` names. Any other name gives that adapter alone and no router.

    Returns
    -------
    peft.PeftModel or peft.PeftMixedModel
        Adopted, see `adopt`.

    Raises
    ------
    ValueError
        If a mixture has ``mixed=True``, or modules that PEFT keeps for each adapter (``modules_to_save``, or the head
        that it saves for some task types), or if the model does not suit the router.
    """

    def stock(config: Any, name: str) -> Any:
        mark_hosted(config)
        return stock_get_peft_model(
            model,
            config,
            adapter_name=name,
            mixed=mixed,
            autocast_adapter_dtype=autocast_adapter_dtype,
            revision=revision,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )

    if not isinstance(peft_config, MoELoraConfig) or not peft_config.use_moe_routing or adapter_name != "default":
        return adopt(stock(peft_config, adapter_name))
    if mixed:
        raise ValueError("mixed=True can't be routed: a mixture of experts needs one type of adapter")
    if peft_config.modules_to_save or peft_config.task_type in _WITH_A_HEAD:
        raise ValueError(
            f"modules_to_save={peft_config.modules_to_save} with task_type={peft_config.task_type!r}: PEFT would give "
            "each expert its own copy of the saved modules, of which only one can be active: use task_type=None "
            "without modules_to_save and train the shared modules themselves (requires_grad_)"
        )

    names = [f"expert_{i}" for i in range(peft_config.num_experts)]
    routed = adopt(stock(peft_config, names[0]))
    for name in names[1:]:
        routed.add_adapter(
            name,
            copy.deepcopy(peft_config),
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    activate_all_experts(routed)
    routed.base_model.attach_router(routed.base_model.make_router(peft_config), peft_config)
    return routed


class _Adopting(type):
    """Metaclass of the faces of PEFT's model classes: calling one makes an adopted object of PEFT's own class.

    A face stands for its class in isinstance and issubclass checks; what is derived from a face is a class of its own.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        stock = cls.__dict__.get("_stands_for")
        return adopt(super().__call__(*args, **kwargs) if stock is None else stock(*args, **kwargs))

    def __instancecheck__(cls, instance: Any) -> bool:
        stock = cls.__dict__.get("_stands_for")
        return super().__instancecheck__(instance) if stock is None else isinstance(instance, stock)

    def __subclasscheck__(cls, subclass: type) -> bool:
        stock = cls.__dict__.get("_stands_for")
        return super().__subclasscheck__(subclass) if stock is None else issubclass(subclass, stock)


def _face(stock: Any) -> Any:
    """The class that stands for a model class of PEFT here: the same, but what it makes is adopted."""

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = stock if "_stands_for" in cls.__dict__ else cls
        make = partial(stock.from_pretrained.__func__, made)
        if issubclass(stock, _peft.PeftModel):
            return open_pretrained(make, *args, **kwargs)
        return adopt(make(*args, **kwargs))

    from_pretrained.__doc__ = stock.from_pretrained.__doc__
    members = {"__module__": __name__, "__doc__": stock.__doc__, "_stands_for": stock}
    return _Adopting(stock.__name__, (stock,), members | {"from_pretrained": classmethod(from_pretrained)})


for _value in list(vars(_peft).values()):
    if isinstance(_value, type) and (
        issubclass(_value, (_peft.PeftModel, _peft.PeftMixedModel)) or hasattr(_value, "_target_peft_class")
    ):
        _mirror.stand_in(_value, _face(_value))
_mirror.stand_in(_peft.get_peft_model, get_peft_model)
_mirror.stand_in(_lora.LoraModel, LoraModel)
_mirror.stand_in(_lora.Linear, Linear)
_mirror.stand_in(_lora.Embedding, Embedding)
_mirror.stand_in(_loha.LoHaModel, LoHaModel)
_mirror.stand_in(_loha.Linear, LoHaLinear)
_mirror.stand_in(_lokr.LoKrModel, LoKrModel)
_mirror.stand_in(_lokr.Linear, LoKrLinear)
_mirror.install()


def __getattr__(name: str) -> Any:
    return _mirror.lookup(__name__, name)


def __dir__() -> list[str]:
    return _mirror.names(__name__)
