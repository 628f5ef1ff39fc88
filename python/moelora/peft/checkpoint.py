"""What a mixture has on disk beside its experts: which they are, and the router.

A folder is what PEFT writes, one sub-folder for each adapter (the one called "default" is at the root), and at the root

- ``moe_lora.json``: format version, experts in their order, configuration of the mixture, what the router is;
- ``router.safetensors``: its state;
- ``adapter_model.safetensors`` without tensors, unless "default" is there: transformers' Trainer looks for a file of
  this name before it loads the best model.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from moelora.nn import routers
from moelora.peft.config import FILE_NAME, FORMAT_VERSION, MoELoraConfig, mixture_fields, read_document

ROUTER_FILE = "router.safetensors"
_AT_ROOT = "default"  # the adapter that PEFT keeps at the root of a folder


@dataclass(frozen=True)
class Mixture:
    """What ``moe_lora.json`` at the root of a folder says."""

    folder: Path
    experts: list[str]
    """Every expert of the set, in order."""
    active: list[str]
    """Those that were active, in the order of the routing weights' columns."""
    config: MoELoraConfig | None
    router: dict[str, Any] | None
    """Class of the router, and how to make one; None without a router."""

    def path(self, expert: str) -> Path:
        """The folder of an expert."""
        return self.folder if expert == _AT_ROOT else self.folder / expert

    def make_router(self) -> routers.Router:
        """The router as it was saved, with its state.

        Raises
        ------
        ValueError
            It is of a class that `moelora.nn` does not have, or its state does not fit.
        """
        assert self.router is not None
        made = getattr(routers, self.router["class"], None) if self.router["arguments"] is not None else None
        if made is None:
            raise ValueError(
                f"{self.folder} has a router of class {self.router['class']}, which moelora can't make: load the "
                "experts one by one, attach the router and load its state"
            )
        router: routers.Router = made(**self.router["arguments"])
        self.load_router(router)
        return router

    def load_router(self, router: nn.Module) -> None:
        """Load the saved state into a router.

        Raises
        ------
        ValueError
            The folder has no router, or one with other tensors or experts. The router is as it was then.
        """
        if self.router is None:
            raise ValueError(f"{self.folder} holds no router, but the model has one: detach it, or load another folder")
        names = getattr(router, "expert_names", None)
        saved = (self.router["arguments"] or {}).get("expert_names", names)
        if saved != names:
            raise ValueError(f"{self.folder} has a router of the experts {saved}, the model's is of {names}")
        path = self.folder / ROUTER_FILE
        state = safetensors.torch.load_file(path)
        own = router.state_dict()
        faults = [f"{name} is missing" for name in own.keys() - state.keys()]
        faults += [f"{name} is unknown" for name in state.keys() - own.keys()]
        faults += [
            f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ]
        if faults:
            raise ValueError(f"{path} is not of this {type(router).__name__}: {'; '.join(sorted(faults))}")
        router.load_state_dict(state)


def read_mixture(folder: str | os.PathLike[str]) -> Mixture | None:
    """Read what a folder says of its mixture; None where it is no folder of a mixture.

    Raises
    ------
    ValueError
        If ``moe_lora.json`` has an unknown format version or unknown fields.
    """
    path = Path(folder, FILE_NAME)
    if not path.is_file():
        return None
    document = read_document(path)
    if "experts" not in document:  # the file beside a single expert
        return None
    config = document["config"]
    return Mixture(
        folder=path.parent,
        experts=document["experts"],
        active=document["active"],
        config=None if config is None else MoELoraConfig(**config),
        router=document["router"],
    )


def write_mixture(
    folder: str | os.PathLike[str],
    experts: list[str],
    *,
    active: list[str],
    config: MoELoraConfig | None = None,
    router: nn.Module | None = None,
    router_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what belongs to a mixture beside its experts, each file whole or not at all.

    Parameters
    ----------
    folder : path
        Where PEFT has written the experts.
    experts, active : list of str
        All experts, and the active ones, in order.
    config : MoELoraConfig, optional
    router : nn.Module, optional
    router_state : mapping of str to Tensor, optional
        Written instead of ``router.state_dict()``, as where that is sharded.
    """
    folder = Path(folder)
    if router is not None:
        state = router.state_dict() if router_state is None else router_state
        _replace(folder / ROUTER_FILE, _tensors(state))
    document = {
        "active": active,
        "config": None if config is None else {f.name: getattr(config, f.name) for f in mixture_fields()},
        "experts": experts,
        "format_version": FORMAT_VERSION,
        "router": None if router is None else _description(router),
    }
    _replace(folder / FILE_NAME, (json.dumps(document, indent=2) + "\n").encode())
    if router is None:
        (folder / ROUTER_FILE).unlink(missing_ok=True)  # of an earlier mixture
    if _AT_ROOT not in experts and not (folder / WEIGHTS_NAME).exists():
        _replace(folder / SAFETENSORS_WEIGHTS_NAME, _tensors({}))


def _description(router: nn.Module) -> dict[str, Any]:
    """Class of a router and, if it is one of `moelora.nn`, the arguments that make another like it."""
    kind = type(router)
    if kind.__module__ != routers.__name__:
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "arguments": None}
    tensors = set(router.state_dict())
    arguments = {name: getattr(router, name) for name in _parameters(kind) if name not in tensors}
    return {"class": kind.__name__, "arguments": arguments}


def _parameters(kind: type) -> Iterator[str]:
    """Names of what a class is made with, through the constructors that its ``**options`` go to."""
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        yield from (p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def _tensors(state: Mapping[str, Tensor]) -> bytes:
    # Copies: safetensors takes neither views of each other nor gaps.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    return safetensors.torch.save(copies, {"format": "pt"})


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
