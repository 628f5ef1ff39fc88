"""What the folder of a mixture holds, without a model and without changing anything."""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from moelora.peft.adapter_files import Expert, check_pairs, read_expert, read_shapes, sha256
from moelora.peft.checkpoint import AT_ROOT, Mixture
from moelora.peft.commit import COMMITTED, STAGED, current, pending
from moelora.peft.config import FILE_NAME, FORMAT_VERSION, mixture_fields
from moelora.peft.layouts import find_unchanged


def inspect_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe the folder of a mixture, of whatever layout `moelora.PeftModel.from_pretrained` opens.

    Parameters
    ----------
    folder : path

    Returns
    -------
    dict
        Values that JSON takes. "layout" is "moelora", "dylora", "peft" (adapters alone) or None; "problems" lists what
        is wrong, and is empty where nothing is; "notes" lists what is worth knowing. The rest: "folder",
        "format_version", "experts" (a list of dicts), "router", "config", "bytes", and "hashes_match", which is None
        where the folder has no hashes.
    """
    root = Path(folder)
    report: dict[str, Any] = {"folder": str(root), "layout": None, "format_version": None, "experts": []}
    report |= {"router": None, "config": None, "bytes": 0, "hashes_match": None, "notes": [], "problems": []}
    problems = report["problems"]
    if not root.is_dir():
        problems.append(f"{root} is no folder")
        return report
    report["notes"] += _notes(root)
    try:
        mixture = find_unchanged(root)
    except ValueError as error:
        problems.append(str(error))
        return report
    if mixture is None and (root / CONFIG_NAME).is_file():
        mixture = Mixture(folder=root, layout="peft", folders={AT_ROOT: root}, active=[AT_ROOT])
    if mixture is None:
        legacy = any(re.fullmatch(r"expert_\d+\.pt", path.name) for path in root.rglob("expert_*.pt"))
        problems.append(f"{root} holds no experts" + (" but state dicts: run moelora convert" if legacy else ""))
        return report
    _describe(mixture, report)
    report["problems"] = [problem.replace(str(mixture.folder), str(root)) for problem in dict.fromkeys(problems)]
    belong = {path.relative_to(mixture.folder) for path in mixture.folders.values()}
    found = (*root.glob(CONFIG_NAME), *root.glob(f"*/{CONFIG_NAME}"))
    strange = sorted(path.parent.relative_to(root) for path in found)
    report["notes"] += [
        f"{path if path.name else 'the folder itself'} is an adapter that does not belong to the set"
        for path in strange
        if path not in belong and path.name not in (COMMITTED, STAGED)
    ]
    return report


def _notes(root: Path) -> list[str]:
    notes = []
    if pending(root):
        notes.append("a save was interrupted after it had written everything: the next load or save moves the rest")
    if (root / STAGED).is_dir():
        notes.append(f"a save is under way or was interrupted: {STAGED} counts for nothing, the next save removes it")
    return notes


def _describe(mixture: Mixture, report: dict[str, Any]) -> None:
    problems = report["problems"]
    report["layout"] = mixture.layout
    report["format_version"] = FORMAT_VERSION if mixture.layout == "moelora" else None
    if mixture.config is not None:
        report["config"] = {f.name: getattr(mixture.config, f.name) for f in mixture_fields()}
    for name, folder in mixture.folders.items():
        try:
            expert = read_expert(folder)
        except ValueError as error:
            problems.append(str(error))
        else:
            report["experts"].append(_describe_expert(name, folder, expert, mixture))
            report["bytes"] += report["experts"][-1]["bytes"]
    if mixture.router is not None:
        _describe_router(mixture, report)
    if mixture.files:
        wrong = _compare_files(mixture)
        report["hashes_match"] = not wrong
        problems += wrong
        kept = (current(mixture.folder, name) for name in (*mixture.files, FILE_NAME))
        report["bytes"] = sum(path.stat().st_size for path in kept if path.is_file())
    if not problems:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                mixture.check()
        except ValueError as error:
            problems.append(str(error))


def _describe_expert(name: str, folder: Path, expert: Expert, mixture: Mixture) -> dict[str, Any]:
    config = expert.config
    targets = config.get("target_modules")
    return {
        "name": name,
        "peft_type": config["peft_type"],
        "base_model": expert.base,
        "ranks": sorted(set(check_pairs(expert.shapes, expert.weights).values())),
        "alpha": config.get("lora_alpha", config.get("alpha")),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "parameters": sum(math.prod(shape) for shape in expert.shapes.values()),
        "bytes": expert.weights.stat().st_size + (folder / CONFIG_NAME).stat().st_size,
        "active": name in mixture.active,
        "frozen": name in mixture.frozen,
    }


def _describe_router(mixture: Mixture, report: dict[str, Any]) -> None:
    assert mixture.router is not None
    path = mixture.router_file
    try:
        shapes = read_shapes(path)
        if mixture.router["arguments"] is not None:
            mixture.make_router()
        else:
            report["notes"].append(f"the router is a {mixture.router['class']}, which only its project can make")
    except ValueError as error:
        report["problems"].append(str(error))
        return
    size = path.stat().st_size
    report["bytes"] += size
    report["router"] = {
        "class": mixture.router["class"],
        "arguments": mixture.router["arguments"],
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "bytes": size,
    }


def _compare_files(mixture: Mixture) -> list[str]:
    wrong = []
    for name, known in mixture.files.items():
        path = current(mixture.folder, name)
        if not path.is_file():
            wrong.append(f"{mixture.folder / name} is missing")
        elif path.stat().st_size != known["size"] or sha256(path) != known["sha256"]:
            wrong.append(f"{mixture.folder / name} is not the file that was saved with the set")
    return wrong


def as_text(report: dict[str, Any]) -> str:
    """The report of `inspect_checkpoint` for people."""
    layout = {"moelora": f"moelora, format version {report['format_version']}", "dylora": "DyLoRA-MoE", "peft": "PEFT"}
    lines = [f"{report['folder']}: {layout.get(report['layout'], 'no mixture')}, {_size(report['bytes'])}"]
    if report["experts"]:
        lines += ["", f"{'expert':<16}{'rank':>8}{'alpha':>8}{'parameters':>14}{'size':>12}  state    modules"]
    for expert in report["experts"]:
        state = ("active" if expert["active"] else "idle") + (", frozen" if expert["frozen"] else "")
        targets = expert["target_modules"]
        modules = targets if isinstance(targets, str) else _shortened(targets or [])
        lines.append(
            f"{expert['name']:<16}{','.join(map(str, expert['ranks'])) or '-':>8}{str(expert['alpha'] or '-'):>8}"
            f"{expert['parameters']:>14,}{_size(expert['bytes']):>12}  {state:<8} {modules}"
        )
    lines.append("")
    router = report["router"]
    if router is not None:
        lines.append(f"router: {router['class']}, {router['parameters']:,} parameters, {_size(router['bytes'])}")
        settings = {name: value for name, value in (router["arguments"] or {}).items() if value is not None}
        lines += [f"    {name}: {value}" for name, value in settings.items()]
    else:
        lines.append("router: none")
    if report["config"] is not None:
        lines += ["config:", *(f"    {name}: {value}" for name, value in report["config"].items())]
    hashes = {True: "match", False: "do not match", None: "none kept"}
    lines.append(f"hashes: {hashes[report['hashes_match']]}")
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    return "\n".join(lines)


def _shortened(targets: list[str]) -> str:
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    return ", ".join(names) + (f" ({len(targets)} modules)" if len(names) < len(targets) else "")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
