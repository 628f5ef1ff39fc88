"""Training the old way and with moelora: the same curves, and how long each takes.

    python benchmarks/convergence/run.py --out benchmarks/results/convergence_cpu_f32.csv
    python benchmarks/convergence/report.py benchmarks/results/convergence_cpu_f32.csv --plot docs/convergence.png

A small Llama over bytes is trained on text that comes with Python and then frozen. Over copies of it four experts and a
gate, a linear router outside the model on the token embeddings, are trained from the same start, on the same batches in
the same order, by AdamW of the same settings, float32, no dropout:

    n_passes        stock PEFT, the whole model once for each expert, logits mixed by the gate's weights
    moelora_logits  the same mixture in one call, `mixture="logits"`
    layer_loop      stock PEFT with a Python loop over the adapters in each layer
    moelora         the same mixture in one pass
    one_lora        stock PEFT, one adapter as large as all experts together, the weights unused
    *_nudged        an older way over frozen weights that are each one ulp off

A seed draws the adapters, the gate and the order of the data. The ways advance together, a step of each in turn, in
reverse order in every other step. The time of a step is gate, forward, backward and AdamW; data and evaluation are
outside.

The command fails if moelora_logits drifts from n_passes, or moelora from layer_loop. Rounding alone makes two runs
drift apart, so what is allowed is measured: `ALLOWED` times as far as the older way drifts from itself when each frozen
weight is moved to a neighbouring float, but at least `ALLOWED` ulps. That is the size of what another order of
summation does to every product.

Beside the file of curves there is one with "_summary" in its name: a row for each way, over all seeds.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from ways import PAIRS, Way, make_ways  # noqa: E402

from moelora.bench.record import columns, write_csv  # noqa: E402
from moelora.demo.text import load_domains  # noqa: E402
from moelora.demo.training import batches, held_out_windows, make_llama, progress_bar, train  # noqa: E402
from moelora.report.timing import quartiles  # noqa: E402

ALLOWED = 10
ULP = torch.finfo(torch.float32).eps
OLD = "n_passes"
CPU = torch.device("cpu")


class Scale(NamedTuple):
    """How large everything is."""

    width: int
    layers: int
    rank: int
    base_steps: int
    held_out: int  # sequences of each domain
    evaluations: int  # of the held-out loss in the course of a run


FULL = Scale(width=256, layers=4, rank=8, base_steps=200, held_out=8, evaluations=5)
SMOKE = Scale(width=32, layers=1, rank=2, base_steps=8, held_out=1, evaluations=2)


class Point(NamedTuple):
    """One way at one step: the loss of the step's batch and its time; here and there the held-out loss before it.

    After the last step comes a point with the held-out loss alone.
    """

    seed: int
    way: str
    step: int
    loss: float | None
    seconds: float | None
    held_out_loss: float | None


def advance(
    ways: Mapping[str, Way], data: Iterator[Tensor], held_out: Tensor, seed: int, steps: int, every: int
) -> Iterator[Point]:
    """Train all ways together."""
    for way in ways.values():  # what only a first call does is no part of the training
        way.loss(held_out[:1]).backward()
        way.training.optimizer.zero_grad()
    with progress_bar(range(steps + 1), f"seed {seed}", "step") as progress:
        for step in progress:
            evaluated = step % every == 0 or step == steps
            held = {name: way.held_out_loss(held_out) if evaluated else None for name, way in ways.items()}
            if step == steps:
                yield from (Point(seed, name, step, None, None, held[name]) for name in ways)
                return
            input_ids = next(data)
            for name in list(ways)[:: 1 if step % 2 == 0 else -1]:
                start = time.perf_counter()
                loss = ways[name].step(input_ids)
                yield Point(seed, name, step, loss, time.perf_counter() - start, held[name])


def parameter_drift(ours: Way, theirs: Way) -> float:
    """The largest relative distance ``|a - b| / |b|`` of a trained tensor of two ways."""
    if ours.trained.keys() != theirs.trained.keys():
        raise RuntimeError(f"the two ways differ in {sorted(ours.trained.keys() ^ theirs.trained.keys())}")
    pairs = [(ours.trained[name].detach(), theirs.trained[name].detach()) for name in theirs.trained]
    return largest(((a - b).norm() / b.norm()).item() for a, b in pairs)


def loss_drift(points: Sequence[Point], ours: str, theirs: str) -> float:
    """The largest relative difference of two ways' losses at any step of any seed."""
    losses = {(p.way, p.seed, p.step): p.loss for p in points if p.loss is not None}
    return largest(
        abs(losses[ours, seed, step] - loss) / loss for (way, seed, step), loss in losses.items() if way == theirs
    )


def largest(values: Iterable[float]) -> float:
    """The largest value, or NaN where one is NaN, which Python's `max` may lose."""
    return torch.tensor([*values], dtype=torch.float64).max().item()


def summary(points: Sequence[Point], parameter_drifts: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    """A row for each way over all seeds."""
    last = max(p.step for p in points)
    final = {(p.way, p.seed): p.held_out_loss for p in points if p.step == last}
    seeds = sorted({p.seed for p in points})
    names = list(dict.fromkeys(p.way for p in points))
    seconds = {name: [p.seconds for p in points if p.way == name and p.seconds is not None] for name in names}
    reference = {name: pair.reference for pair in PAIRS for name in (pair.way, pair.yardstick)}
    drifts = {
        "loss": {name: loss_drift(points, name, of) for name, of in reference.items()},
        "parameter": {name: largest(parameter_drifts[name]) for name in reference},
    }
    yardstick = {pair.way: pair.yardstick for pair in PAIRS}

    def spread(values: Sequence[float], name: str) -> dict[str, str]:
        numbers = (statistics.fmean(values), min(values), max(values))
        return {f"{name}_{what}": f"{value:.5f}" for what, value in zip(("mean", "min", "max"), numbers, strict=True)}

    for name in names:
        row = {"way": name, "seeds": len(seeds), "steps": last}
        row |= spread([final[name, seed] for seed in seeds], "held_out_loss")
        row |= spread([final[name, seed] - final[OLD, seed] for seed in seeds], f"over_{OLD}")
        row["total_s"] = f"{sum(seconds[name]) / len(seeds):.2f}"
        row |= columns(seconds[name], "ms")
        row["less_time_total"] = f"{1 - sum(seconds[name]) / sum(seconds[OLD]):.4f}"
        row["less_time_median"] = f"{1 - quartiles(seconds[name])[1] / quartiles(seconds[OLD])[1]:.4f}"
        row["compared_with"] = reference.get(name, "")
        for what, of in drifts.items():
            allowed = f"{ALLOWED * largest((of[yardstick[name]], ULP)):.2e}" if name in yardstick else ""
            row[f"{what}_drift"] = f"{of[name]:.2e}" if name in of else ""
            row[f"{what}_drift_allowed"] = allowed
        yield row


def drifted(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What drifted further than is allowed, NaN included, in words."""
    return [
        f"{row['way']} drifted from {row['compared_with']}: {what} {row[f'{what}_drift']}, allowed is "
        f"{row[f'{what}_drift_allowed']}"
        for row in rows
        for what in ("loss", "parameter")
        if row[f"{what}_drift_allowed"] and not float(row[f"{what}_drift"]) <= float(row[f"{what}_drift_allowed"])
    ]


def write_points(path: Path, points: Iterator[Point]) -> Iterator[Point]:
    """Write points as they pass, so that an interrupted run keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("seed", "way", "step", "loss", "ms", "held_out_loss"))
        for point in points:
            ms = None if point.seconds is None else f"{1e3 * point.seconds:.1f}"
            loss, held_out = (None if x is None else f"{x:.9g}" for x in (point.loss, point.held_out_loss))
            writer.writerow((point.seed, point.way, point.step, loss, ms, held_out))
            file.flush()
            yield point


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the curves")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs, with seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--smoke", action="store_true", help="a very small model, one seed, few steps: does it run?")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    scale, seeds, steps = (SMOKE, 1, 4) if args.smoke else (FULL, args.seeds, args.steps)

    domains = load_domains()
    held_out = torch.cat([held_out_windows(domain, CPU)[: scale.held_out] for domain in domains])
    torch.manual_seed(0)
    base = make_llama(scale.width, scale.layers)
    train(base, batches(domains, "base", 0, CPU), scale.base_steps, 3e-3, "base model")
    base.requires_grad_(False)

    parameter_drifts: defaultdict[str, list[float]] = defaultdict(list)  # of each seed

    def run() -> Iterator[Point]:
        for seed in range(seeds):
            ways = make_ways(base, rank=scale.rank, seed=seed, steps=steps)
            data = batches(domains, "train", seed, CPU, per_domain=1)
            yield from advance(ways, data, held_out, seed, steps, max(1, steps // scale.evaluations))
            for pair in PAIRS:
                for name in (pair.way, pair.yardstick):
                    parameter_drifts[name].append(parameter_drift(ways[name], ways[pair.reference]))

    points = list(write_points(args.out, run()))
    rows = list(summary(points, parameter_drifts))
    write_csv(args.out.with_stem(f"{args.out.stem}_summary"), rows, shlex.join(["python", *sys.argv]))
    failures = drifted(rows)
    print("\n".join(failures or ["No way drifted further than rounding does."]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
