"""What a mixture has on disk: its experts, the order they have, and the router.

A folder is what PEFT writes, one sub-folder for each adapter (the one called "default" is at the root), and at the root

- ``moe_lora.json``: format version, experts in their order, configuration of the mixture, what the router is, size and
  SHA-256 of every file of the set;
- ``router.safetensors``: the router's state;
- ``adapter_model.safetensors`` without tensors, unless "default" is there: transformers' Trainer looks for a file of
  this name before it loads the best model.

All files of a save take their places together, see `moelora.peft.commit`. Folders without ``moe_lora.json`` are read
too: adapters ``expert_<int>`` as PEFT writes them, and what DyLoRA-MoE makes of them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from moelora.nn import routers
from moelora.peft.commit import current, is_inside, pending, replacing, settle, supersede
from moelora.peft.config import (
    FILE_NAME,
    FORMAT_VERSION,
    MoELoraConfig,
    mixture_fields,
    read_document,
    read_json,
)

ROUTER_FILE = "router.safetensors"
_AT_ROOT = "default"  # the adapter that PEFT keeps at the root of a folder
_CARD = "README.md"  # people edit it, so it is none of the files whose hashes are kept
_RESERVED = {FILE_NAME, ROUTER_FILE, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, _CARD}

Shapes = dict[str, tuple[int, ...]]


class Expert(NamedTuple):
    """What the folder of an adapter holds, without its tensors."""

    config: dict[str, Any]
    """``adapter_config.json``."""
    weights: Path
    shapes: Shapes
    """Names and shapes of the tensors."""

    @property
    def base(self) -> str | None:
        """What the adapter was trained on, if it says so."""
        return self.config.get("base_model_name_or_path") or None


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
        path = self.router_file
        own = router.state_dict()
        # A gate of DyLoRA-MoE is all that it has; what this class adds stays as it starts.
        wanted = own.keys() & GATE if self.layout == "dylora" else own.keys()
        faults = differences(read_shapes(path), {name: tuple(own[name].shape) for name in wanted})
        if faults:
            raise ValueError(f"{path} is not of this {type(router).__name__}: {faults}")
        router.load_state_dict(own | safetensors.torch.load_file(path))


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
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has a router that can't be made: {error}") from error


# What a folder holds.


def find_mixture(folder: str | os.PathLike[str]) -> Mixture | None:
    """Read what a folder has of a mixture, whoever wrote it; None where it is no folder of one.

    Raises
    ------
    ValueError
        As `read_mixture`; or an ``expert_<int>`` among others is incomplete, or the router is not of these experts.
    """
    mixture = read_mixture(folder)
    return _without_document(Path(folder)) if mixture is None else mixture


def find_unchanged(root: Path) -> Mixture | None:
    """As `find_mixture`, but changes nothing in the folder."""
    mixture = read_copy(root)
    return _without_document(root) if mixture is None else mixture


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
    if document.keys() <= {"format_version", "config"}:  # the file beside a single adapter
        return None
    _check_document(path, document)
    return Mixture(
        folder=root,
        layout="moelora",
        folders={name: root if name == _AT_ROOT else root / name for name in document["experts"]},
        active=document["active"],
        frozen=document["frozen"],
        config=_make_config(path, document),
        router=document["router"],
        files=document["files"],
    )


def _make_config(path: Path, document: dict[str, Any]) -> MoELoraConfig | None:
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


# Folders without moe_lora.json.

GATE = {"gate.weight", "gate.bias"}
"""Tensors of DyLoRA-MoE's router."""
# How DyLoRA-MoE makes a router that does not say.
_DYLORA_TOP_K, _DYLORA_TEMPERATURE = 1, 2.0


def expert_folders(root: Path) -> dict[str, Path]:
    """The sub-folders ``expert_<int>`` that hold an adapter, at once or in another folder of that name, in order.

    Raises
    ------
    ValueError
        If some of them do and others do not.
    """
    base = root / "peft_adapters" if (root / "peft_adapters").is_dir() else root
    found = [path for path in base.iterdir() if path.is_dir() and re.fullmatch(r"expert_\d+", path.name)]
    inner = {
        path.name: next((p for p in (path, path / path.name) if (p / CONFIG_NAME).is_file()), None)
        for path in sorted(found, key=lambda path: number(path.name))
    }
    folders = {name: path for name, path in inner.items() if path is not None}
    if folders and len(folders) < len(inner):
        missing = [str(base / name) for name in inner if name not in folders]
        raise ValueError(f"{', '.join(missing)}: no {CONFIG_NAME} there, as beside it")
    return folders


def number(name: str) -> int:
    """The number of ``expert_<int>``."""
    return int(name.rpartition("_")[2])


def _without_document(root: Path) -> Mixture | None:
    if not root.is_dir() or (root / CONFIG_NAME).is_file():
        return None
    folders = expert_folders(root)
    if not folders:
        return None
    names = list(folders)
    path = root / ROUTER_FILE
    router = None
    if path.is_file():
        settings = read_json(root / "config.json") if (root / "config.json").is_file() else {}
        router = dylora_router(names, read_shapes(path), settings, path)
    beside = next(iter(folders.values())) / FILE_NAME
    return Mixture(
        folder=root,
        layout="dylora" if router or (root / "peft_adapters").is_dir() else "peft",
        folders=folders,
        active=names,
        config=_make_config(beside, read_document(beside)) if beside.is_file() else None,
        router=router,
    )


def dylora_router(names: list[str], shapes: Shapes, settings: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """What a router of DyLoRA-MoE is here: one gate on the last hidden states of a first pass.

    DyLoRA-MoE takes the softmax of the top k logits as they are or, as long as an expert is new, that of all logits
    divided by the temperature. In evaluation this is the same; in training all experts take part.

    Parameters
    ----------
    names : list of str
        The experts.
    shapes : dict
        Tensors of the router's file.
    settings : mapping
        What is saved of the router; of this "num_experts", "input_size", "top_k", "temperature" and "expert_maturity"
        are read, where they are there.
    source : Path
        For error messages.
    """
    if shapes.keys() != GATE:
        raise ValueError(f"{source} must have the tensors {sorted(GATE)}, got {sorted(shapes)}")
    n, width = shapes["gate.weight"] if len(shapes["gate.weight"]) == 2 else (0, 0)
    if n != len(names) or shapes["gate.bias"] != (n,):
        raise ValueError(
            f"{source} has gate.weight {shapes['gate.weight']} and gate.bias {shapes['gate.bias']}, but there are the "
            f"experts {names}"
        )
    for key, value in (("num_experts", n), ("input_size", width)):
        if settings.get(key, value) != value:
            raise ValueError(f"{source} has {key} {value}, but its settings say {settings[key]!r}")
    arguments = {"expert_names": names, "input_size": width, "top_k": None}
    arguments["temperature"] = settings.get("temperature", _DYLORA_TEMPERATURE)
    maturity = settings.get("expert_maturity")
    if maturity is None or all(value != 0 for value in torch.as_tensor(maturity).flatten().tolist()):
        arguments["eval_top_k"] = settings.get("top_k", _DYLORA_TOP_K)
        if arguments["eval_top_k"] != 1:  # for a single one it makes no difference in evaluation
            arguments["temperature"] = 1.0
    return {"class": "LastHiddenRouter", "arguments": arguments}


# Files of one adapter.


def read_expert(folder: Path) -> Expert:
    """Read what the folder of an adapter holds, but for its tensors.

    Raises
    ------
    ValueError
        Naming the file that is missing, broken, or no adapter's; or the tensor of a LoRA that has no counterpart.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: it should be the folder of an adapter")
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    config = read_json(path)
    if not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{path} must say a 'peft_type', got {config.get('peft_type')!r}")
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    weights = next((folder / name for name in names if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"{folder / SAFETENSORS_WEIGHTS_NAME} is missing")
    shapes = read_shapes(weights)
    if config["peft_type"] == "LORA":
        check_pairs(shapes, weights)
    return Expert(config, weights, shapes)


def misfits(model: PeftModel, name: str, expert: Expert) -> str:
    """What distinguishes the tensors of a file from those of the adapter `name` of a model; empty if nothing does."""
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    found = expert.shapes
    if shapes == found:
        return ""
    others = model.state_dict().keys()  # embeddings that PEFT saves with an adapter
    return differences({key: found[key] for key in found if key in shapes or key not in others}, shapes)


def differences(found: Shapes, expected: Shapes) -> str:
    """What tensors have other names or shapes than expected; empty where none has."""
    faults = [f"{key} is missing" for key in expected.keys() - found.keys()]
    faults += [f"{key} is unknown" for key in found.keys() - expected.keys()]
    faults += [
        f"{key} has shape {found[key]} instead of {expected[key]}"
        for key in expected.keys() & found.keys()
        if expected[key] != found[key]
    ]
    shown = "; ".join(sorted(faults)[:5])
    return f"{shown}; and {len(faults) - 5} more" if len(faults) > 5 else shown


_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


def check_pairs(shapes: Shapes, source: Path) -> dict[str, int]:
    """The rank of each module of a LoRA; ValueError where A and B are not a pair."""
    ranks = {}
    for names in (_PAIRS, {b: a for a, b in _PAIRS.items()}):
        for mine, other in names.items():
            for name in shapes:
                if name.endswith(mine) and name.removesuffix(mine) + other not in shapes:
                    raise ValueError(f"{source} has {name}, but {name.removesuffix(mine)}{other} is missing")
    for first, second in _PAIRS.items():
        for name in shapes:
            if name.endswith(first):
                a, b = shapes[name], shapes[name.removesuffix(first) + second]
                if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
                    raise ValueError(f"{source}: {name} has shape {a}, and {second} beside it {b}: no common rank")
                ranks[name.removesuffix(first).removesuffix(".").removeprefix("base_model.model.")] = a[0]
    return ranks


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of the tensors of a file; ValueError where it is broken."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.suffix != ".safetensors":
        content = load_pickled(path)
        if not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise ValueError(f"{path} holds values that are no tensors")
        return {name: tuple(tensor.shape) for name, tensor in content.items()}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def load_pickled(path: Path) -> dict[str, Any]:
    """Load what torch.save has written, if it is a dictionary of plain values and tensors; nothing of it is executed.

    Raises
    ------
    ValueError
        If it holds anything else, or is broken.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch documents no class of errors for this
        raise ValueError(f"{path} is refused, torch.load(weights_only=True) can't read it: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} must hold a dictionary with names, got {type(content).__name__}")
    return content


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing.


def save_mixture(
    target: Path,
    write_experts: Callable[[Path], None],
    experts: list[str],
    *,
    active: list[str],
    frozen: list[str],
    config: MoELoraConfig | None = None,
    router: dict[str, Any] | None = None,
    router_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a set, whose files take the places of those in a folder all together, or not at all.

    Parameters
    ----------
    target : Path
        Made if it is not there.
    write_experts : callable
        Called with a folder, writes the experts into it.
    experts, active, frozen : list of str
        All experts, and some of them, in order.
    config : MoELoraConfig, optional
    router : dict, optional
        As `describe_router` gives it.
    router_state : mapping of str to Tensor, optional
        Its tensors.

    Raises
    ------
    ValueError
        If the name of an expert can't be that of a folder, or something is in the way.
    """
    check_names(experts, str(target))
    with replacing(target) as staged:
        if (target / _CARD).is_file():  # PEFT goes on with the one that is there
            shutil.copyfile(target / _CARD, staged / _CARD)
        write_experts(staged)
        if router is not None:
            (staged / ROUTER_FILE).write_bytes(_tensors(router_state or {}))
        if _root_is_free(target, staged):
            (staged / SAFETENSORS_WEIGHTS_NAME).write_bytes(_tensors({}))
        _finish(
            target,
            staged,
            {
                "active": active,
                "config": None if config is None else {f.name: getattr(config, f.name) for f in mixture_fields()},
                "experts": experts,
                "files": _describe_files(staged),
                "format_version": FORMAT_VERSION,
                "frozen": frozen,
                "router": router,
            },
            experts,
        )


def save_selected(target: Path, write_experts: Callable[[Path], None], selected: list[str]) -> None:
    """Save some adapters into the folder of a set; those that belong to it take the places of the set's.

    Parameters as `save_mixture`.
    """
    with replacing(target) as staged:
        if (target / _CARD).is_file():
            shutil.copyfile(target / _CARD, staged / _CARD)
        write_experts(staged)
        document = read_document(target / FILE_NAME)
        belong = {name for name in selected if name in document["experts"]}
        folders = {"." if name == _AT_ROOT else name for name in belong}

        def of_them(file: str) -> bool:
            return Path(file).parent.as_posix() in folders and file != ROUTER_FILE

        document["files"] = {name: known for name, known in document["files"].items() if not of_them(name)} | {
            name: known for name, known in _describe_files(staged).items() if of_them(name)
        }
        _finish(target, staged, document, belong)


def holds_set(folder: Path) -> bool:
    """Whether a folder has the ``moe_lora.json`` of a set, be it broken; that of a single adapter is none."""
    try:
        return read_mixture(folder) is not None
    except ValueError:
        return True


def _root_is_free(target: Path, staged: Path) -> bool:
    """Whether no adapter is at the root, neither "default" of this set nor one that is there already."""
    if (staged / CONFIG_NAME).exists() or (target / WEIGHTS_NAME).exists():
        return False
    return not ((target / CONFIG_NAME).exists() and (target / SAFETENSORS_WEIGHTS_NAME).exists())


def _finish(target: Path, staged: Path, document: dict[str, Any], written: Iterable[str]) -> None:
    """Write ``moe_lora.json``, and note which files of the target the set leaves no place for."""
    gone = {ROUTER_FILE} if document["router"] is None else set()
    # PEFT would go on loading an expert's older weights in the other format.
    for name in written:
        folder = Path("." if name == _AT_ROOT else name)
        formats = {(folder / file).as_posix() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)}
        gone |= formats - document["files"].keys()
    gone = {name for name in gone if (target / name).exists()}
    if gone:
        supersede(staged, gone)
    (staged / FILE_NAME).write_text(json.dumps(document, indent=2) + "\n")


def _describe_files(staged: Path) -> dict[str, dict[str, Any]]:
    found = sorted(path for path in staged.rglob("*") if path.is_file())
    names = {path.relative_to(staged).as_posix(): path for path in found}
    return {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in names.items()
        if name not in (_CARD, FILE_NAME)
    }


def describe_router(router: nn.Module) -> dict[str, Any]:
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
