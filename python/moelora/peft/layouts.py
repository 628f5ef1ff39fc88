"""Folders without ``moe_lora.json``: adapters ``expert_<int>`` as PEFT writes them, and what DyLoRA-MoE makes of
them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME

from moelora.peft.adapter_files import Shapes, read_shapes
from moelora.peft.checkpoint import ROUTER_FILE, Mixture, make_config, read_copy, read_mixture
from moelora.peft.config import FILE_NAME, read_document, read_json


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


# Tensors of DyLoRA-MoE's router, and how it makes one that does not say.
_GATE = {"gate.weight", "gate.bias"}
_TOP_K, _TEMPERATURE = 1, 2.0


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
        config=make_config(beside, read_document(beside)) if beside.is_file() else None,
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
    if shapes.keys() != _GATE:
        raise ValueError(
            f"{source} must have the tensors {sorted(_GATE)} of DyLoRA-MoE's router, got {sorted(shapes)}; one that "
            f"moelora saved needs the {FILE_NAME} beside it"
        )
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
    arguments["temperature"] = settings.get("temperature", _TEMPERATURE)
    maturity = settings.get("expert_maturity")
    try:
        mature = maturity is None or bool(torch.as_tensor(maturity).all())
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has settings whose 'expert_maturity' are no numbers: {error}") from error
    if mature:
        arguments["eval_top_k"] = settings.get("top_k", _TOP_K)
        if arguments["eval_top_k"] != 1:  # for a single one it makes no difference in evaluation
            arguments["temperature"] = 1.0
    return {"class": "LastHiddenRouter", "arguments": arguments}
