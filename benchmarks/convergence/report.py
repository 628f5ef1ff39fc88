"""Table and picture of a run of `run.py`, from its two files alone. Needs matplotlib for the picture.

    python benchmarks/convergence/report.py benchmarks/results/convergence_cpu_f32.csv --plot docs/convergence.png

The table is Markdown. The picture has the training loss, as the mean over seeds of a running mean over `WINDOW` steps
with the range of the seeds, and the held-out loss over the time that the training took.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

WINDOW = 10
COLOURS = {
    "n_passes": "#d62728",
    "moelora_logits": "#1f77b4",
    "layer_loop": "#ff7f0e",
    "moelora": "#2ca02c",
    "one_lora": "#7f7f7f",
}

Row = Mapping[str, str]


def table(rows: Iterable[Row]) -> str:
    """What a summary says of the ways that are compared, in Markdown."""
    lines = [
        "| | held-out loss | minus that of n_passes | training time | step, quartiles | less time | less, of medians |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["way"] in COLOURS:
            mean, low, high = (float(row[f"held_out_loss_{what}"]) for what in ("mean", "min", "max"))
            over = [float(row[f"over_n_passes_{what}"]) for what in ("mean", "min", "max")]
            cells = (
                row["way"],
                f"{mean:.4f} ({low:.4f} to {high:.4f})",
                "{:+.4f} ({:+.4f} to {:+.4f})".format(*over),
                f"{float(row['total_s']):.1f} s",
                " ".join(f"{float(row[f'ms_{what}']):.0f}" for what in ("q1", "median", "q3")) + " ms",
                f"{100 * float(row['less_time_total']):.1f} %",
                f"{100 * float(row['less_time_median']):.1f} %",
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| | largest difference of the loss | allowed | of a trained tensor | allowed |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["loss_drift_allowed"]:
            drifts = [row[f"{what}_drift{of}"] for what in ("loss", "parameter") for of in ("", "_allowed")]
            lines.append(f"| {row['way']} against {row['compared_with']} | {' | '.join(drifts)} |")
    return "\n".join(lines)


def draw(points: Sequence[Row], picture: Path) -> None:
    """Draw the curves of all seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), facecolor="white", layout="constrained")
    losses, against_time = figure.subplots(1, 2)
    for way, colour in COLOURS.items():
        # Curves that lie on each other stay visible: those of moelora are drawn thin and dashed, above the older ways'.
        line = {"color": colour, "label": way} | (
            {"linestyle": "--", "linewidth": 1.2} if way.startswith("moelora") else {"linewidth": 2.5, "alpha": 0.6}
        )
        of_seed: defaultdict[str, list[Row]] = defaultdict(list)
        for point in points:
            if point["way"] == way:
                of_seed[point["seed"]].append(point)
        curves = [running_mean([float(p["loss"]) for p in run if p["loss"]]) for run in of_seed.values()]
        at_steps = list(zip(*curves, strict=True))
        steps = range(len(at_steps))
        losses.plot(steps, [statistics.fmean(values) for values in at_steps], **line)
        losses.fill_between(steps, *zip(*((min(v), max(v)) for v in at_steps), strict=True), color=colour, alpha=0.06)

        evaluations = list(zip(*(held_out_over_time(run) for run in of_seed.values()), strict=True))
        seconds, values = (
            [statistics.fmean(pair[i] for pair in at_evaluation) for at_evaluation in evaluations] for i in (0, 1)
        )
        against_time.plot(seconds, values, marker=".", **line)
    losses.set(xlabel="step", ylabel=f"training loss (nats per byte, mean of {WINDOW} steps)")
    against_time.set(xlabel="training time (s)", ylabel="held-out loss (nats per byte)")
    losses.legend(fontsize=9)
    FigureCanvasAgg(figure)
    figure.savefig(picture, dpi=120)


def running_mean(values: Sequence[float]) -> list[float]:
    """Of the last `WINDOW` values at each place, fewer at the beginning."""
    return [statistics.fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def held_out_over_time(run: Sequence[Row]) -> list[tuple[float, float]]:
    """Seconds of training until each evaluation, and the held-out loss there, of one way with one seed."""
    passed, found = 0.0, []
    for point in run:
        if point["held_out_loss"]:
            found.append((passed, float(point["held_out_loss"])))
        passed += float(point["ms"] or 0) / 1e3
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, help="CSV file that run.py wrote; the summary is taken from beside it")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    args = parser.parse_args(arguments)
    with args.curves.open(newline="") as curves, args.curves.with_stem(f"{args.curves.stem}_summary").open() as rows:
        points, summary = list(csv.DictReader(curves)), list(csv.DictReader(rows))
    print(table(summary))
    if args.plot:
        draw(points, args.plot)


if __name__ == "__main__":
    main()
