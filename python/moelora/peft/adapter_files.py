"""Files of one adapter: what they hold, and whether it can be one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from moelora.peft.config import read_json

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
    targets = config.get("target_modules")
    if not isinstance(targets, (str, type(None))) and not (
        isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    ):
        raise ValueError(f"{path} must have names as 'target_modules', got {targets!r}")
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
