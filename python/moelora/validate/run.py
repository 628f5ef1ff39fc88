"""The course of `moelora validate`: open, compare, measure, report."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moelora
from moelora.peft.adapter_files import Expert, read_expert
from moelora.peft.layouts import find_mixture
from moelora.report.machine import machine
from moelora.validate import checks, cost
from moelora.validate.checks import Check, Models, yes
from moelora.validate.reference import twin

SKIPPED = "outputs, gradients and cost: the checkpoint has to open first"


@dataclass(frozen=True)
class Settings:
    """Options of a validation; see ``moelora validate --help``."""

    checkpoint: Path
    model: str | None = None
    data: Path | None = None
    batch: int = 2
    tokens: int = 64
    seed: int = 0
    rounds: int = 5
    speed: bool = True


def validate(settings: Settings) -> dict[str, Any]:
    """Check a checkpoint's promises.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    dict
        What ``--json`` writes: settings, machine, "checks" with every figure, and "holds".

    Raises
    ------
    ValueError
        If there is nothing to check: no checkpoint, no base model, data that does not fit it. The message begins with
        the argument's name.
    """
    report: dict[str, Any] = {
        "format": 1,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "machine": machine(torch.device("cpu")),
        "dtype": "float32",
    }
    found: list[Check] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tensors that are missing: they are findings of the report
        _validate(settings, report, found)
    report["checks"] = [check.as_json() for check in found]
    report["holds"] = all(check.holds is not False for check in found)
    return report


def _validate(settings: Settings, report: dict[str, Any], found: list[Check]) -> None:
    if not settings.checkpoint.is_dir():
        raise ValueError(f"argument --checkpoint: {settings.checkpoint} is not a folder")
    try:
        mixture = find_mixture(settings.checkpoint)
    except (ValueError, OSError) as error:
        found.append(yes("compatibility", "moelora reads what the folder says of its mixture", [str(error)]))
        report["skipped"] = SKIPPED
        return
    if mixture is None:
        raise ValueError(
            f"argument --checkpoint: {settings.checkpoint} is not the folder of a mixture of experts: it has neither "
            "moe_lora.json nor folders expert_<int> of adapters"
        )
    report["experts"] = mixture.experts
    experts, faults = {}, []
    for name, folder in mixture.folders.items():
        try:
            experts[name] = read_expert(folder)
        except (ValueError, OSError) as error:
            faults.append(f"{name}: {error}")
    found.append(yes("compatibility", "the files of every expert are whole", faults))
    if faults:
        report["skipped"] = SKIPPED
        return
    if kinds := {expert.config["peft_type"] for expert in experts.values()} - {"LORA"}:
        raise ValueError(
            f"argument --checkpoint: {settings.checkpoint} has experts of type {', '.join(sorted(kinds))}: what is "
            "compared here, a loop over the adapters in stock layers, is for LORA alone"
        )
    if not mixture.active:
        raise ValueError(f"argument --checkpoint: no expert of {settings.checkpoint} is active, so nothing is mixed")
    base, name = _base(settings, experts)
    report["model"] = name
    report["parameters"] = sum(p.numel() for p in base.parameters())
    inputs, report["data"] = _inputs(settings, base, name)
    report["batch"] = list(inputs["input_ids"].shape)

    found += checks.check_files(base, mixture)
    open_it = partial(moelora.PeftModel.from_pretrained, twin(base), str(settings.checkpoint))
    routed, opened = checks.check_opens(open_it)
    found.append(opened)
    if any(check.holds is False for check in found):
        report["skipped"] = SKIPPED
        return
    router = routed.base_model.router
    if router is not None:
        routed.base_model.detach_router()
    active = list(routed.active_adapters)
    stock = checks.open_stock(base, mixture, mixture.experts)
    stock.base_model.set_adapter(active)
    noise = torch.Generator().manual_seed(settings.seed)
    weights = torch.randn(*inputs["input_ids"].shape, len(active), generator=noise).softmax(-1)
    models = Models(base, mixture, routed.eval(), stock, router, inputs, weights)
    if all(not p.any() for name, p in stock.named_parameters() if "lora_B" in name or "embedding_A" in name):
        report["untrained"] = (
            "every B of the checkpoint is zero: the experts change nothing yet, so the logits prove little"
        )
    parts: dict[str, Callable[[], list[Check]]] = {
        "outputs": lambda: checks.check_outputs(models, report),
        "gradients": lambda: checks.check_gradients(models, report),
        "compatibility": lambda: checks.check_compatibility(models, report),
    }
    if settings.speed:
        parts["cost"] = lambda: cost.check_cost(models, settings.rounds, report)
    for group, check in parts.items():
        try:
            found += check()
        except Exception as error:  # what moelora refuses, or PEFT, is a finding as well
            found.append(yes(group, "can be computed", [checks.first_line(error)]))
            report["skipped"] = f"what follows the {group}: they have to be computed first"
            return


def _base(settings: Settings, experts: dict[str, Expert]) -> tuple[Any, str]:
    name = settings.model or next((expert.base for expert in experts.values() if expert.base), None)
    if not name:
        raise ValueError("argument --model: needed, the checkpoint does not name its base model")
    try:
        return checks.open_base(name), name
    except Exception as error:  # transformers and the packages below it raise errors of many types
        asked = "" if settings.model else ", which the checkpoint names: pass the folder of its base model with --model"
        raise ValueError(
            f"argument --model: can't open {name!r} as a causal language model{asked} ({checks.first_line(error)})"
        ) from error


def _inputs(settings: Settings, base: Any, name: str) -> tuple[dict[str, Any], str]:
    """A batch, and in words where it is from."""
    config = base.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or settings.tokens
    size, length = settings.batch, min(settings.tokens, longest)
    vocabulary: int = config.vocab_size
    if settings.data is None:
        noise = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(vocabulary, (size, length), generator=noise)
        return {"input_ids": ids, "use_cache": False}, f"random token ids, seed {settings.seed}"
    rows = _rows(settings.data, name, size, length)
    top = max(max(row) for row in rows)
    if top >= vocabulary or min(min(row) for row in rows) < 0:
        raise ValueError(f"argument --data: {settings.data} has token ids outside [0, {vocabulary}), up to {top}")
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if any(len(row) < width for row in rows):
        lengths = torch.tensor([len(row) for row in rows])
        mask: Tensor = (torch.arange(width) < lengths[:, None]).long()
        inputs["attention_mask"] = mask
    return inputs, f"{settings.data}, the first {len(rows)} x {width} tokens"


def _rows(path: Path, model: str, size: int, length: int) -> list[list[int]]:
    """The first sequences of a text, or of JSON lines with "input_ids"."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"argument --data: {error}") from error
    if path.suffix in (".jsonl", ".json"):
        rows: list[list[int]] = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or len(rows) == size:
                continue
            try:
                row = json.loads(line)["input_ids"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'argument --data: {path}, line {number} is no object with "input_ids"') from error
            if not isinstance(row, list) or not row or not all(type(i) is int for i in row):
                raise ValueError(f'argument --data: {path}, line {number}: "input_ids" must be a list of integers')
            rows.append(row[:length])
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"argument --data: {model} has no tokenizer for {path} ({reason}): pass JSON lines with input_ids"
            ) from error
        ids = tokenizer(text)["input_ids"]
        rows = [ids[start : start + length] for start in range(0, min(len(ids), size * length), length)]
    if not rows:
        raise ValueError(f"argument --data: {path} holds no tokens")
    return rows
