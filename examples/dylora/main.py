"""A stream of tasks, learned by a DyLoRA-MoE twice: the old way, and in one pass. See README.md."""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import dylora
import old_way
import torch
from lifecycle import Lifecycle, embed, held_out_loss
from moelora import PeftModel, activate_all_experts
from moelora.demo.measure import Way, cost
from moelora.demo.text import load_domains
from moelora.demo.training import batches, make_llama, train
from novelty import NoveltyDetector
from stream import make_stream, sequences
from torch import Tensor
from transformers import PreTrainedModel

WAYS = {"old way": old_way.DyLoRAMoE, "moelora": dylora.DyLoRAMoE}


class Size(NamedTuple):
    """How much is computed."""

    width: int
    layers: int
    base_steps: int
    skill_steps: int
    mixing_steps: int
    held_out: int
    """Sequences of each domain."""


FULL = Size(width=64, layers=4, base_steps=400, skill_steps=100, mixing_steps=60, held_out=64)
SMOKE = Size(width=32, layers=2, base_steps=150, skill_steps=30, mixing_steps=20, held_out=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a smaller model and fewer steps: seconds")
    parser.add_argument("--out", type=Path, default=Path("dylora-example"), help="folder to write (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    report = run(SMOKE if options.smoke else FULL, options.out)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report)


def run(size: Size, out: Path) -> dict[str, Any]:
    domains = load_domains()
    stream = make_stream(domains)
    held_out = {domain.name: sequences(domain.held_out)[: size.held_out] for domain in domains}
    torch.manual_seed(0)
    base = make_llama(size.width, size.layers)
    train(base, batches(domains, "base", 0, torch.device("cpu")), size.base_steps, 5e-3, "base model")
    base.requires_grad_(False)
    ordinary = torch.cat([sequences(domain.base)[:32] for domain in domains])

    report: dict[str, Any] = {"base": losses(base, held_out)}
    learned = {}
    for name, way in WAYS.items():
        torch.manual_seed(1)
        moe = learned[name] = way(copy.deepcopy(base))
        detector = NoveltyDetector(centre=embed(moe, ordinary))
        lifecycle = Lifecycle(moe, detector, size.skill_steps, size.mixing_steps)
        report[name] = {"visits": [], "seconds": 0.0}
        for task in stream:
            start = time.perf_counter()
            visit = lifecycle.learn(task)
            report[name]["seconds"] += time.perf_counter() - start
            after = {"domain": task.domain, "held_out": losses(moe.model, held_out)}
            report[name]["visits"].append(visit._asdict() | after)
            print(name, task.domain, visit, after)
    return report


def losses(model: torch.nn.Module, held_out: dict[str, Tensor]) -> dict[str, float]:
    return {name: held_out_loss(model, rows) for name, rows in held_out.items()}


def show(report: dict[str, Any]) -> None:
    pass


if __name__ == "__main__":
    main()
