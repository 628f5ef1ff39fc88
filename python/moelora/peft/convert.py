"""Checkpoints of other layouts become folders of a mixture."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from moelora.nn.routers import Router
from moelora.peft.adapter_files import Expert, Shapes, check_pairs, load_pickled
from moelora.peft.checkpoint import build_router, folder_of
from moelora.peft.config import read_json
from moelora.peft.layouts import dylora_router, find_mixture, number
from moelora.peft.saving import as_safetensors, describe_router, save_mixture


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    lora_alpha: float | None = None,
    task_type: str | None = None,
) -> list[str]:
    """Write a checkpoint of another layout as the folder of a mixture.

    Parameters
    ----------
    source : path
        What `moelora.PeftModel.from_pretrained` opens as a mixture: a folder of moelora, of adapters ``expert_<int>``,
        or of DyLoRA-MoE. Or DyLoRA-MoE's older form: ``peft_adapters/expert_<int>.pt``, each a dictionary of LoRA
        tensors, and ``dylo_moe_state/router.pt``. Pickles are read with ``weights_only=True``.
    target : path
        Not there yet, or an empty folder.
    base_model, lora_alpha, task_type : optional
        For state dicts without an ``adapter_config.json`` beside them, where `lora_alpha` must be given: it is not in
        the tensors. `task_type` is "CAUSAL_LM" unless given.

    Returns
    -------
    list of str
        The experts.

    Raises
    ------
    ValueError
        If the source is none of these, is broken, holds what is no tensor of a LoRA, or needs what was not given; if
        an option is given that nothing needs; or if the target has files. Nothing is written then.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise ValueError(f"source must be a folder, got {source}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target must not exist or be an empty folder, got {target}")
    options = {"base_model": base_model, "lora_alpha": lora_alpha, "task_type": task_type}
    options = {name: value for name, value in options.items() if value is not None}
    mixture = find_mixture(source)
    if mixture is None:
        return _convert_state_dicts(source, target, options)
    if options:
        raise ValueError(f"{', '.join(options)}: {source} has an {CONFIG_NAME} for each expert, which says that")
    experts = mixture.check()
    router, state = mixture.router, None
    if router is not None and router["arguments"] is not None:
        made = mixture.make_router()
        router, state = describe_router(made), made.state_dict()
    elif router is not None:  # of a class that only its project can make
        state = safetensors.torch.load_file(mixture.router_file)

    def write(folder: Path) -> None:
        for name, expert in experts.items():
            place = folder_of(folder, name)
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(mixture.path(name) / CONFIG_NAME, place / CONFIG_NAME)
            (place / SAFETENSORS_WEIGHTS_NAME).write_bytes(as_safetensors(_load(expert)))

    save_mixture(
        target,
        write,
        mixture.experts,
        active=mixture.active,
        frozen=mixture.frozen,
        config=mixture.config,
        router=router,
        router_state=state,
    )
    return mixture.experts


def _load(expert: Expert) -> dict[str, Tensor]:
    if expert.weights.suffix == ".safetensors":
        return safetensors.torch.load_file(expert.weights)
    return load_pickled(expert.weights)


def _convert_state_dicts(source: Path, target: Path, options: dict[str, Any]) -> list[str]:
    base = source / "peft_adapters" if (source / "peft_adapters").is_dir() else source
    paths = [path for path in base.glob("expert_*.pt") if re.fullmatch(r"expert_\d+", path.stem)]
    if not paths:
        raise ValueError(f"{source} has neither folders nor .pt files expert_<int>, nor has its peft_adapters")
    paths.sort(key=lambda path: number(path.stem))
    states = {path.stem: _read_state(path) for path in paths}
    configs = {path.stem: _config_of(path, states[path.stem], source, options) for path in paths}
    router = _read_router(source, list(states))

    def write(folder: Path) -> None:
        for name, state in states.items():
            (folder / name).mkdir()
            (folder / name / CONFIG_NAME).write_text(json.dumps(configs[name], indent=2, sort_keys=True))
            (folder / name / SAFETENSORS_WEIGHTS_NAME).write_bytes(as_safetensors(state))

    save_mixture(
        target,
        write,
        list(states),
        active=list(states),
        frozen=[],
        router=None if router is None else describe_router(router),
        router_state=None if router is None else router.state_dict(),
    )
    return list(states)


_PREFIX = r"(?:.*?base_model\.model\.)?(?P<module>.+?)\."
_LINEAR = re.compile(_PREFIX + r"(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(_PREFIX + r"(?P<part>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?")


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of one expert, by the names that PEFT has in its files."""
    content = load_pickled(path)
    found: dict[str | None, dict[str, Tensor]] = {}
    for name, tensor in content.items():
        match = _LINEAR.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name} is no tensor of a LoRA")
        end = ".weight" if match.re is _LINEAR else ""
        key = f"base_model.model.{match['module']}.{match['part']}{end}"
        found.setdefault(match["adapter"], {})[key] = tensor
    own = path.stem if path.stem in found else next(iter(found), None)
    if own not in found or (own != path.stem and len(found) > 1):
        raise ValueError(
            f"{path} must hold the tensors of one adapter, or of {path.stem}, got {sorted(map(str, found))}"
        )
    return found[own]


def _config_of(path: Path, state: dict[str, Tensor], source: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What ``adapter_config.json`` has to say of a state dict: what a file beside it says, but for the ranks."""
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    ranks = check_pairs(shapes, path)
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {module: rank for module, rank in ranks.items() if rank != common}
    beside = (path.parent / CONFIG_NAME, source / CONFIG_NAME)
    found = next((file for file in beside if file.is_file()), None)
    if found is not None:
        if options:
            raise ValueError(f"{', '.join(options)}: {found} says that")
        return read_json(found) | {"r": common, "rank_pattern": pattern}
    if "lora_alpha" not in options:
        raise ValueError(f"{path} has no {CONFIG_NAME} beside it: give lora_alpha, and base_model where it is known")
    config = LoraConfig(
        r=common,
        lora_alpha=options["lora_alpha"],
        target_modules=sorted(ranks),
        rank_pattern=pattern,
        task_type=options.get("task_type", "CAUSAL_LM"),
        base_model_name_or_path=options.get("base_model"),
        inference_mode=True,
    )
    values: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _read_router(source: Path, names: list[str]) -> Router | None:
    path = source / "dylo_moe_state" / "router.pt"
    if not path.is_file():
        return None
    content = load_pickled(path)
    gate = content.get("gate_state_dict")
    if not isinstance(gate, dict) or not all(isinstance(tensor, Tensor) for tensor in gate.values()):
        raise ValueError(f"{path} must have a 'gate_state_dict' of tensors, got {sorted(content)}")
    gate = {f"gate.{name.removeprefix('gate.')}": tensor for name, tensor in gate.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in gate.items()}
    router = build_router(dylora_router(names, shapes, content, path), str(path))
    router.load_state_dict(router.state_dict() | gate)
    return router
