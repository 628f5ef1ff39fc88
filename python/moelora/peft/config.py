"""`MoELoraConfig`: a `LoraConfig` that also says how many experts there are and how they are routed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig

from moelora.peft.commit import current

FILE_NAME = "moe_lora.json"
FORMAT_VERSION = 1
ROUTER_TYPES = ("learned_with_maturity", "learned", "fixed")
LOSS_TYPES = ("aux_loss", "z_loss", "switch")


@dataclass
class MoELoraConfig(LoraConfig):
    """Configuration of a mixture of LoRA experts.

    Every field of `peft.LoraConfig` keeps its meaning and describes each expert; the checkpoint of an expert stays a
    plain LoRA checkpoint. The fields below describe the mixture. They are checked while ``use_moe_routing`` is on.

    Parameters
    ----------
    use_moe_routing : bool
        Off makes this a plain `LoraConfig` (with a warning if a field of the mixture was set all the same).
    num_experts : int
        Number of experts, at least 2.
    top_k_experts : int
        How many experts a router keeps for each token, in ``[1, num_experts]``.
    router_hidden_size : int, optional
        Width of the router's input, checked against what it reads. None: the model's hidden size.
    router_aux_loss_coef : float
        Factor of the load balancing loss in ``outputs.loss``, at least 0.
    router_temperature : float
        Logits of the router are divided by it before the softmax; positive.
    router_type : {"learned_with_maturity", "learned", "fixed"}
        What `moelora.get_peft_model` builds: one linear gate for each decoder layer (both learned types; maturities
        are 1 until `mark_mature`), or constant weights.
    expert_capacity_factor : float
        In training, an expert takes at most ``ceil(factor * tokens * top_k / num_experts)`` picks; positive.
    expert_dropout : float
        In training, probability that an expert is left out for a sequence, in ``[0, 1)``.
    load_balance_loss_type : {"aux_loss", "z_loss", "switch"}
        Formula of the load balancing loss, see `moelora.nn.router_aux_loss`.

    Raises
    ------
    TypeError
        If a count is not an integer.
    ValueError
        If a field is outside its range. Nothing is checked when ``use_moe_routing`` is off.

    Examples
    --------
    >>> from moelora import MoELoraConfig
    >>> config = MoELoraConfig(r=8, num_experts=4, top_k_experts=2)
    >>> config.router_type
    'learned_with_maturity'
    >>> MoELoraConfig(num_experts=1)
    Traceback (most recent call last):
    ...
    ValueError: num_experts must be at least 2, got 1
    """

    use_moe_routing: bool = field(default=True, metadata={"help": "Route tokens over several experts."})
    num_experts: int = field(default=4, metadata={"help": "Number of experts."})
    top_k_experts: int = field(default=2, metadata={"help": "Experts a router keeps for each token."})
    router_hidden_size: int | None = field(default=None, metadata={"help": "Width of the router's input."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Factor of the load balancing loss."})
    router_temperature: float = field(default=2.0, metadata={"help": "Divides the logits before the softmax."})
    router_type: str = field(default="learned_with_maturity", metadata={"help": "Which router is built."})
    expert_capacity_factor: float = field(default=1.25, metadata={"help": "Room of each expert, in training."})
    expert_dropout: float = field(default=0.0, metadata={"help": "Leaves experts out of sequences, in training."})
    load_balance_loss_type: str = field(default="aux_loss", metadata={"help": "Formula of the load balancing loss."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.use_moe_routing:
            self._check_mixture()
            return
        changed = [
            f.name for f in mixture_fields() if f.name != "use_moe_routing" and getattr(self, f.name) != f.default
        ]
        if changed:
            warnings.warn(f"use_moe_routing is False, so {', '.join(changed)} will be ignored", stacklevel=3)

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT's get_peft_model, and add_adapter of transformers, write the name of the base model into a configuration
        # that is complete, and know nothing of routing.
        complete = mixture_fields()[-1].name in vars(self)
        if name == "base_model_name_or_path" and complete and self.use_moe_routing and not vars(self).get("_hosted"):
            warnings.warn(
                "PEFT makes one plain adapter of a MoELoraConfig, without experts and router: use "
                "moelora.get_peft_model, or moelora.patch_peft() for code that calls PEFT's",
                stacklevel=3,
            )
        super().__setattr__(name, value)

    def _check_mixture(self) -> None:
        for name in ("num_experts", "top_k_experts", "router_hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "router_hidden_size" and value is None):
                raise TypeError(f"{name} must be an int, got {value!r}")
        for name in ("router_temperature", "router_aux_loss_coef", "expert_capacity_factor", "expert_dropout"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be a real number, got {value!r}")
            if not isinstance(value, (int, float)):  # of NumPy, which JSON does not take
                setattr(self, name, float(value))
            if value == math.inf:
                raise ValueError(f"{name} must be finite, got {value}")
        if self.num_experts < 2:
            raise ValueError(f"num_experts must be at least 2, got {self.num_experts}")
        if not 1 <= self.top_k_experts <= self.num_experts:
            raise ValueError(f"top_k_experts must lie in [1, {self.num_experts}], got {self.top_k_experts}")
        if self.router_hidden_size is not None and self.router_hidden_size < 1:
            raise ValueError(f"router_hidden_size must be positive or None, got {self.router_hidden_size}")
        if not self.router_temperature > 0:
            raise ValueError(f"router_temperature must be positive, got {self.router_temperature}")
        if not self.router_aux_loss_coef >= 0:
            raise ValueError(f"router_aux_loss_coef must not be negative, got {self.router_aux_loss_coef}")
        if not self.expert_capacity_factor > 0:
            raise ValueError(f"expert_capacity_factor must be positive, got {self.expert_capacity_factor}")
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout must lie in [0, 1), got {self.expert_dropout}")
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(f"router_type must be one of {ROUTER_TYPES}, got {self.router_type!r}")
        if self.load_balance_loss_type not in LOSS_TYPES:
            raise ValueError(f"load_balance_loss_type must be one of {LOSS_TYPES}, got {self.load_balance_loss_type!r}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` with the fields of `LoraConfig` alone, and ``moe_lora.json`` beside it.

        Stock PEFT opens the first file as it opens any LoRA; `from_pretrained` reads both.

        Raises
        ------
        ValueError
            If the folder holds a whole mixture, which its model's `save_pretrained` writes, or a ``moe_lora.json``
            that `from_pretrained` does not understand. Nothing is written.
        """
        path = Path(save_directory, FILE_NAME)
        present = current(path.parent, FILE_NAME)
        if present.is_file() and not is_of_one_adapter(read_document(present)):
            raise ValueError(
                f"{path.parent} holds a mixture with its experts, which a configuration alone would replace: take "
                "another folder, or save the model"
            )
        plain: LoraConfig = copy.copy(self)
        plain.__class__ = LoraConfig
        plain.save_pretrained(os.fspath(save_directory), **kwargs)
        mixture = {f.name: getattr(self, f.name) for f in mixture_fields()}
        document = {"format_version": FORMAT_VERSION, "config": mixture}
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> MoELoraConfig:
        """Read a configuration with all its fields from a folder or a repository of the Hub.

        Where ``moe_lora.json`` is missing, the fields of the mixture have their defaults.

        Raises
        ------
        ValueError
            If ``adapter_config.json`` is missing, is not of LoRA, or ``moe_lora.json`` has an unknown format version
            or unknown fields.
        """
        source = os.fspath(pretrained_model_name_or_path)
        plain = LoraConfig.from_pretrained(source, subfolder=subfolder, **kwargs)
        if not isinstance(plain, LoraConfig):
            raise ValueError(f"{source} holds a {type(plain).__name__}, not the configuration of a LoRA")
        values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
        return cls(**values, **_read_mixture(source, subfolder, kwargs))


def mark_hosted(config: Any) -> None:
    """Note that the adapter of this configuration is in a model that can be routed."""
    if isinstance(config, MoELoraConfig):
        vars(config)["_hosted"] = True


def mixture_fields() -> list[dataclasses.Field[Any]]:
    """The fields that `MoELoraConfig` adds to `peft.LoraConfig`."""
    plain = {f.name for f in dataclasses.fields(LoraConfig)}
    return [f for f in dataclasses.fields(MoELoraConfig) if f.name not in plain]


def _read_mixture(source: str, subfolder: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    path = Path(source, subfolder or "", FILE_NAME)
    if not path.parent.is_dir():
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token") if name in kwargs}
        try:
            path = Path(hf_hub_download(source, FILE_NAME, subfolder=subfolder, **hub))
        except EntryNotFoundError:
            return {}
    elif not path.is_file():
        return {}
    mixture: dict[str, Any] = read_document(path)["config"] or {}
    return mixture


def read_document(path: Path) -> dict[str, Any]:
    """Read a ``moe_lora.json``; its "config" has fields of the mixture alone, or is None.

    Raises
    ------
    ValueError
        If it is no JSON, has an unknown format version, no "config", or unknown or wrongly typed fields in it.
    """
    document = read_json(path)
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {document.get('format_version')!r}, expected {FORMAT_VERSION}")
    config = document.get("config", ...)
    if not isinstance(config, dict) and config is not None:
        raise ValueError(f"{path} must have an object or null as 'config', got {config!r}")
    fields = {f.name: f for f in mixture_fields()}
    unknown = sorted((config or {}).keys() - fields.keys())
    if unknown:
        raise ValueError(f"{path} holds unknown fields {unknown}")
    for name, value in (config or {}).items():
        default = fields[name].default
        kinds = {float: (float, int), type(None): (int, type(None))}.get(type(default), (type(default),))
        if type(value) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {name} must be of type {expected}, got {value!r}")
    return document


def is_of_one_adapter(document: dict[str, Any]) -> bool:
    """Whether this ``moe_lora.json`` is the one beside a single adapter, not that of a set."""
    return document.keys() <= {"format_version", "config"}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; ValueError where it does not."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document
