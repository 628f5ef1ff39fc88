"""Writing the folder of a mixture; what is in it, says `moelora.peft.checkpoint`."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from moelora.nn import routers
from moelora.peft.adapter_files import sha256
from moelora.peft.checkpoint import CARD, ROUTER_FILE, check_names, folder_of, read_mixture
from moelora.peft.commit import replacing, supersede
from moelora.peft.config import FILE_NAME, FORMAT_VERSION, MoELoraConfig, mixture_fields, read_document


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
        _stage_experts(target, staged, write_experts)
        if router is not None:
            (staged / ROUTER_FILE).write_bytes(as_safetensors(router_state or {}))
        if _root_is_free(target, staged):
            (staged / SAFETENSORS_WEIGHTS_NAME).write_bytes(as_safetensors({}))
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
        _stage_experts(target, staged, write_experts)
        document = read_document(target / FILE_NAME)
        belong = {name for name in selected if name in document["experts"]}
        folders = {folder_of(Path(), name) for name in belong}

        def of_them(file: str) -> bool:
            return Path(file).parent in folders and file != ROUTER_FILE

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


def _stage_experts(target: Path, staged: Path, write_experts: Callable[[Path], None]) -> None:
    if (target / CARD).is_file():  # PEFT goes on with the one that is there
        shutil.copyfile(target / CARD, staged / CARD)
    write_experts(staged)


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
        formats = {(folder_of(Path(), name) / file).as_posix() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)}
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
        if name not in (CARD, FILE_NAME)
    }


def describe_router(router: nn.Module) -> dict[str, Any]:
    """Class of a router and, if it is one of `moelora.nn`, the arguments that make another like it."""
    kind = type(router)
    if kind.__module__ != routers.__name__:
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "arguments": None}
    tensors = set(router.state_dict())
    arguments = {name: _plain(getattr(router, name)) for name in _parameters(kind) if name not in tensors}
    return {"class": kind.__name__, "arguments": arguments}


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as JSON takes it, everything else as it is."""
    return value.item() if isinstance(value, (np.generic, Tensor)) else value


def _parameters(kind: type) -> Iterator[str]:
    """Names of what a class is made with, through the constructors that its ``**options`` go to."""
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        yield from (p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def as_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """The file of these tensors, as PEFT writes it."""
    # Copies: safetensors takes neither views of each other nor gaps.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    return safetensors.torch.save(copies, {"format": "pt"})
