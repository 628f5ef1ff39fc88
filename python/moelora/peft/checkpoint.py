"""What a mixture has on disk: its experts, the order they have, and the router.

A folder is what PEFT writes, one sub-folder for each adapter (the one called "default" is at the root), and at the root

- ``moe_lora.json``: format version, experts in their order, configuration of the mixture, what the router is, size and
  SHA-256 of every file of the set;
- ``router.safetensors``: the router's state;
- ``adapter_model.safetensors`` without tensors, unless "default" is there: transformers' Trainer looks for a file of
  this name before it loads the best model.

All files of a save take their places together, see `moelora.peft.commit`. `moelora.peft.saving` writes
them; folders without ``moe_lora.json`` are for `moelora.peft.layouts`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from moelora.nn import routers
from moelora.peft.adapter_files import Expert, differences, read_expert, read_shapes, sha256
from moelora.peft.commit import current, is_inside, pending, settle
from moelora.peft.config import FILE_NAME, MoELoraConfig, is_of_one_adapter, read_document

ROUTER_FILE = "router.safetensors"
AT_ROOT = "default"  # the adapter that PEFT keeps at the root of a folder
CARD = "README.md"  # people edit it, so it is none of the files whose hashes are kept
_RESERVED = {FILE_NAME, ROUTER_FILE, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CARD}


@dataclass(frozen=True)
class Mixture:
    """The experts of a folder, and what belongs to them."""

    folder: Path
    layout: str
    """"moelora", "dylora" or "peft": who has written it."""
    folders: dict[str, Path]
    """Folder of each expert of the set, in order."""
    active: list[str]
    """Those that were active, in the order of the routing weights' columns."""
    frozen: list[str] = field(default_factory=list)
    """Those that were frozen."""
    config: MoELoraConfig | None = None
    router: dict[str, Any] | None = None
    """Class of the router, and how to make one; None without a router."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and SHA-256 of the files of the set, by name; empty where the folder does not say."""

    @property
    def experts(self) -> list[str]:
        """Every expert of the set, in order."""
        return list(self.folders)

    def path(self, expert: str) -> Path:
        """The folder of an expert."""
        return self.folders[expert]

    @property
    def router_file(self) -> Path:
        """Where the router's state is."""
        return current(self.folder, ROUTER_FILE)

    def check(self) -> dict[str, Expert]:
        """Read all experts but for their tensors, and look whether they can be a set.

        Returns
        -------
        dict of str to Expert

        Raises
        ------
        ValueError
            Naming the file: one is missing or broken, the router's has another size than the set says, or an expert
            belongs to another base model.

        Warns
        -----
        UserWarning
            If an expert has been saved anew since, as PEFT does it.
        """
        for name in self.files:
            if not current(self.folder, name).is_file():
                raise ValueError(f"{self.folder / name} is missing, {FILE_NAME} lists it")
        experts = {name: read_expert(folder) for name, folder in self.folders.items()}
        changed = {
            name for name, known in self.files.items() if current(self.folder, name).stat().st_size != known["size"]
        }
        if ROUTER_FILE in changed:
            raise ValueError(
                f"{self.router_file} has {self.router_file.stat().st_size} bytes instead of "
                f"{self.files[ROUTER_FILE]['size']}: it is not the router that was saved with these experts"
            )
        anew = [name for name, folder in self.folders.items() if any(self._in(folder, file) for file in changed)]
        if anew:
            warnings.warn(
                f"{self.folder}: {', '.join(anew)} changed after the set was saved; taken as they are now", stacklevel=2
            )
        self._check_bases(experts)
        return experts

    def _in(self, folder: Path, file: str) -> bool:
        return (self.folder / file).parent == folder

    def _check_bases(self, experts: dict[str, Expert]) -> None:
        """An expert that was put here later must be of the base model of the others."""
        own = {
            name
            for name, folder in self.folders.items()
            if (known := self.files.get((folder / CONFIG_NAME).relative_to(self.folder).as_posix()))
            and known["sha256"] == sha256(folder / CONFIG_NAME)
        }
        bases = {experts[name].base for name in own or self.experts[:1]}
        for name, expert in experts.items():
            if name not in own and expert.base and None not in bases and expert.base not in bases:
                raise ValueError(
                    f"{self.path(name) / CONFIG_NAME} is for the base model {expert.base!r}, the other experts are for "
                    f"{', '.join(sorted(repr(base) for base in bases))}"
                )

    def make_router(self) -> routers.Router:
        """The router as it was saved, with its state.

        Raises
        ------
        ValueError
            It is of a class that `moelora.nn` does not have, or its arguments or its state do not fit.
        """
        assert self.router is not None
        router = build_router(self.router, str(self.folder))
        state = self._read_router(router)
        if any(tensor.dtype == torch.float64 for tensor in state.values()):
            router.double()  # float32 can't hold its bits
        router.load_state_dict(router.state_dict() | state)
        return router

    def load_router(self, router: nn.Module) -> None:
        """Load the saved state into a router.

        Raises
        ------
        ValueError
            The folder has no router, or one with other tensors or experts. The router is as it was then.
        """
        router.load_state_dict(router.state_dict() | self._read_router(router))

    def _read_router(self, router: nn.Module) -> dict[str, Tensor]:
        """The saved tensors, which are those of this router."""
        if self.router is None:
            raise ValueError(f"{self.folder} holds no router, but the model has one: detach it, or load another folder")
        names = getattr(router, "expert_names", None)
        saved = (self.router["arguments"] or {}).get("expert_names", names)
        if saved != names:
            raise ValueError(f"{self.folder} has a router of the experts {saved}, the model's is of {names}")
        path = self.router_file
        own, found = router.state_dict(), read_shapes(path)
        # A gate is all that DyLoRA-MoE has; what this class adds stays as it starts.
        wanted = own.keys() & found.keys() if self.layout == "dylora" else own.keys()
        faults = differences(found, {name: tuple(own[name].shape) for name in wanted})
        if faults:
            raise ValueError(f"{path} is not of this {type(router).__name__}: {faults}")
        return safetensors.torch.load_file(path)


def folder_of(root: Path, expert: str) -> Path:
    """Where PEFT keeps an adapter in a folder of several."""
    return root if expert == AT_ROOT else root / expert


def build_router(description: dict[str, Any], where: str) -> routers.Router:
    """A new router of the class and with the arguments that `describe_router` gave; ValueError where that can't be."""
    name, arguments = description["class"], description["arguments"]
    kind = getattr(routers, name, None) if name in routers.__all__ else None
    if arguments is None or not (isinstance(kind, type) and issubclass(kind, routers.Router)):
        raise ValueError(
            f"{where} has a router of class {name}, which moelora can't make: load the experts one by one, attach the "
            "router and load its state"
        )
    try:
        return kind(**arguments)
    except (RuntimeError, TypeError, ValueError) as error:  # the first where it would be larger than the memory
        raise ValueError(f"{where} has a router that can't be made: {error}") from error


def read_mixture(folder: str | os.PathLike[str]) -> Mixture | None:
    """Read what the ``moe_lora.json`` of a folder says; None where there is none, or only that of a single adapter.

    What an interrupted save has left to do is done; where the folder can't be written, in a temporary copy of the set.

    Raises
    ------
    ValueError
        If ``moe_lora.json`` is broken, or has an unknown format version or unknown, missing or wrong fields.
    """
    root = Path(folder)
    try:
        settle(root)
    except OSError:
        return read_copy(root)
    return read_set(root)


def read_set(root: Path) -> Mixture | None:
    """As `read_mixture`, but moves nothing: files of the set may still wait for their places, see `commit.current`."""
    path = current(root, FILE_NAME)
    if not path.is_file():
        return None
    document = read_document(path)
    if is_of_one_adapter(document):
        return None
    _check_document(path, document)
    return Mixture(
        folder=root,
        layout="moelora",
        folders={name: folder_of(root, name) for name in document["experts"]},
        active=document["active"],
        frozen=document["frozen"],
        config=make_config(path, document),
        router=document["router"],
        files=document["files"],
    )


def make_config(path: Path, document: dict[str, Any]) -> MoELoraConfig | None:
    try:
        return None if document["config"] is None else MoELoraConfig(**document["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_copy(root: Path) -> Mixture | None:
    """As `read_mixture`, but copies a set whose files wait for their places to a temporary folder; moves nothing."""
    if not pending(root):
        return read_set(root)
    mixture = read_set(root)
    if mixture is None:
        return None
    copy = Path(tempfile.mkdtemp(prefix="moelora-"))
    try:
        for name in (FILE_NAME, *mixture.files):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # `check` names what is missing
                shutil.copyfile(current(root, name), copy / name)
        copied = read_set(copy)
    except BaseException:
        shutil.rmtree(copy)
        raise
    weakref.finalize(copied, shutil.rmtree, copy, ignore_errors=True)
    return copied


_TYPES: dict[str, tuple[type, ...]] = {
    "active": (list,),
    "config": (dict, type(None)),
    "experts": (list,),
    "files": (dict,),
    "format_version": (int,),
    "frozen": (list,),
    "router": (dict, type(None)),
}


def _check_document(path: Path, document: dict[str, Any]) -> None:
    faults = [f"{name!r} is missing" for name in _TYPES.keys() - document.keys()]
    faults += [f"{name!r} is unknown" for name in document.keys() - _TYPES.keys()]
    if faults:
        raise ValueError(f"{path}: {'; '.join(sorted(faults))}")
    for name, kinds in _TYPES.items():
        if not isinstance(document[name], kinds):
            raise ValueError(f"{path}: {name!r} is of type {type(document[name]).__name__}")
    experts = document["experts"]
    check_names(experts, str(path))
    for name in ("active", "frozen"):
        if not all(expert in experts for expert in document[name]) or len(set(document[name])) < len(document[name]):
            raise ValueError(f"{path}: {name!r} must name some of the experts {experts}, got {document[name]}")
    for name, known in document["files"].items():
        if not is_inside(name):
            raise ValueError(f"{path}: the file {name!r} leads out of the folder")
        if not isinstance(known, dict) or [type(known.get(key)) for key in ("size", "sha256")] != [int, str]:
            raise ValueError(f"{path}: 'files' must give 'size' and 'sha256' of {name}, got {known!r}")
    router = document["router"]
    if router is not None and not (
        router.keys() == {"class", "arguments"}
        and isinstance(router["class"], str)
        and isinstance(router["arguments"], (dict, type(None)))
    ):
        raise ValueError(f"{path}: 'router' must have a 'class' and its 'arguments', got {router}")


def check_names(experts: list[Any], where: str) -> None:
    """Raise a ValueError unless these can be names of experts, and of their folders."""
    if not experts or not all(isinstance(name, str) for name in experts) or len(set(experts)) < len(experts):
        raise ValueError(f"{where}: experts must be one or more different names, got {experts}")
    for name in experts:
        if not is_inside(name) or name.startswith(".") or name in _RESERVED:
            raise ValueError(f"{where}: the expert {name!r} can't have a folder of this name inside that of the set")
