"""A small DyLoRA-MoE learns a stream of tasks, the old way and in one pass. What it shows is in README.md."""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import compare
import dylora
import old_way
from lifecycle import Lifecycle, embed, held_out_loss
from moelora.demo.text import load_domains
from moelora.demo.training import batches, make_llama, train
from novelty import NoveltyDetector
from stream import make_stream, sequences

WAYS = {"old way": old_way.DyLoRAMoE, "moelora": dylora.DyLoRAMoE}
PROMPT, NEW_TOKENS = 48, 32


class Size(NamedTuple):
    """How much is computed."""

    width: int
    layers: int
    base_steps: int
    skill_steps: int
    mixing_steps: int
    held_out: int
    """Sequences of each domain."""


FULL = Size(width=64, layers=2, base_steps=200, skill_steps=60, mixing_steps=60, held_out=48)
SMOKE = Size(width=32, layers=2, base_steps=150, skill_steps=20, mixing_steps=20, held_out=12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--out", type=Path, default="dylora-example", help="folder to write (default: %(default)s)")
    options = parser.parse_args()
    # PEFT reads a property that transformers is about to rename.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    report = run(SMOKE if options.smoke else FULL, options.out)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report)


def run(size: Size, out: Path) -> dict[str, Any]:
    """Everything; writes what each way has learned to a folder of `out`."""
    domains = load_domains()
    stream = make_stream(domains)
    held_out = {domain.name: sequences(domain.held_out)[: size.held_out] for domain in domains}
    batch = torch.cat([rows[:2] for rows in held_out.values()])
    prompt = batch[:1, :PROMPT]

    torch.manual_seed(0)
    base: Any = make_llama(size.width, size.layers)
    train(base, batches(domains, "base", 0, torch.device("cpu")), size.base_steps, 5e-3, "base model")
    base.requires_grad_(False)
    base.save_pretrained(out / "base")
    ordinary = torch.cat([sequences(domain.base)[:32] for domain in domains])

    report: dict[str, Any] = {"base": losses(base, held_out), "ways": {}}
    learned: dict[str, Any] = {}
    for name, way in WAYS.items():
        torch.manual_seed(1)
        moe = learned[name] = way(copy.deepcopy(base))
        detector = NoveltyDetector(centre=embed(moe, ordinary))
        lifecycle = Lifecycle(moe, detector, size.skill_steps, size.mixing_steps)
        visits, seconds = [], 0.0
        for task in stream:
            start = time.perf_counter()
            visit = lifecycle.learn(task)
            seconds += time.perf_counter() - start
            visits.append({"domain": task.domain, **visit._asdict(), "held_out": losses(moe.model, held_out)})
            print(f"{name:8} {task.domain:14} {visit.expert}{' (new)' if visit.grown else ''}", flush=True)

        folder = out / name.replace(" ", "_")
        moe.save(folder / "model")
        detector.save(folder / "skills.safetensors")
        loaded = way.load(copy.deepcopy(base), folder / "model")
        known = NoveltyDetector.load(folder / "skills.safetensors")
        start = time.perf_counter()
        text = moe.generate(prompt, NEW_TOKENS)
        report["ways"][name] = {
            "visits": visits,
            "seconds": seconds,
            "base_passes": compare.base_passes(moe.model, batch),
            "loaded_difference": compare.difference(
                compare.logits(loaded.model, batch), compare.logits(moe.model, batch)
            ),
            "recognised_after_loading": [known.recognise(embed(loaded, task.train[::4])) for task in stream],
            "generated": bytes(text[0].tolist()).decode(errors="replace"),
            "tokens_per_second": NEW_TOKENS / (time.perf_counter() - start),
        }

    old, new = learned["old way"], learned["moelora"]
    report["logits_mode_difference"] = compare.old_logits_in_one_call(base, old, out / "old_way" / "model", batch)
    report["cost"] = compare.costs(old, new, batch)
    return report


def losses(model: nn.Module, held_out: dict[str, Tensor]) -> dict[str, float]:
    return {name: held_out_loss(model, rows) for name, rows in held_out.items()}


def show(report: dict[str, Any]) -> None:
    """Print a report."""
    ways, domains = report["ways"], list(report["base"])

    def row(head: str, values: dict[str, float]) -> None:
        print(f"  {head:34}" + "".join(f"{values[domain]:>15.3f}" for domain in domains))

    print("\nSimilarity of each task with the closest skill known")
    for visit in ways["moelora"]["visits"]:
        similarity = "none known" if visit["similarity"] is None else f"{visit['similarity']:.2f}"
        print(f"  {visit['domain']:15}{similarity:>12}  {'new ' if visit['grown'] else ''}{visit['expert']}")

    print(f"\n{'Held-out loss per byte, nats':36}" + "".join(f"{domain:>15}" for domain in domains))
    row("base", report["base"])
    for name, way in ways.items():
        for visit in way["visits"]:
            row(f"{name}, after {visit['domain']}", visit["held_out"])

    print(f"\n{'':36}{'old way':>15}{'moelora':>15}")
    old, new = ways["old way"], ways["moelora"]
    figures = {
        "base passes in a forward": (f"{old['base_passes']}", f"{new['base_passes']}"),
        "the stream learned in, s": (f"{old['seconds']:.1f}", f"{new['seconds']:.1f}"),
        "generated tokens per second": (f"{old['tokens_per_second']:.0f}", f"{new['tokens_per_second']:.0f}"),
    }
    for work, title in (("train", "a training step"), ("forward", "a forward")):
        for unit in ("ms", "mib"):
            values = (f"{report['cost'][name][f'{work}_{unit}']:.1f}" for name in ways)
            figures[f"{title}, {'MiB' if unit == 'mib' else unit}"] = tuple(values)
    for title, (before, after) in figures.items():
        print(f"  {title:34}{before:>15}{after:>15}")

    print(f'\nThe old logits in one call (mixture="logits"): difference {report["logits_mode_difference"]:.1e}')
    print(f"What was saved, loaded: difference {new['loaded_difference']:.1e}")
    print(f"Generated: {new['generated']!r}")


if __name__ == "__main__":
    main()
