"""Pictures of a report, drawn from ``report.json`` alone. Needs matplotlib."""

import json
import os
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moelora.report.table import Section, mean_over_layers, sections, verdict

LINE = 0.28  # inches


def draw(report_file: str | os.PathLike[str]) -> list[Path]:
    """Draw ``table.png`` and ``routing.png`` beside a report.

    Parameters
    ----------
    report_file : path
        A ``report.json``.

    Returns
    -------
    list of Path
        The pictures.
    """
    report_file = Path(report_file)
    report = json.loads(report_file.read_text(encoding="utf-8"))
    pictures = {"table.png": table_figure(report), "routing.png": routing_figure(report)}
    paths = []
    for name, figure in pictures.items():
        paths.append(report_file.with_name(name))
        FigureCanvasAgg(figure)
        figure.savefig(paths[-1], dpi=160)
    return paths


def table_figure(report: dict[str, Any]) -> Figure:
    """All tables of a report, one below the other."""
    tables = sections(report)
    columns = max(len(table.heads) for table in tables)
    lines = sum(len(table.rows) + 3 for table in tables) + 1
    width, height = 2.8 + 1.35 * (columns - 1), LINE * (lines + 1)
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y = 1.2 * LINE
    for table in tables:
        y = _draw_table(axes, table, y, width)
    axes.text(0.3, y, verdict(report), va="center", fontsize=10, fontweight="bold")
    return figure


def _draw_table(axes: Any, table: Section, y: float, width: float) -> float:
    """Draw one table from height `y` on; return where the next one begins."""
    axes.text(0.3, y, table.title, va="center", fontsize=11, fontweight="bold")
    y += LINE
    for number, row in enumerate([table.heads, *table.rows]):
        colour = "#555555" if number == 0 else "black"
        axes.text(0.3, y, row[0], va="center", fontsize=9.5, color=colour)
        for column, cell in enumerate(row[1:], 1):
            axes.text(2.6 + 1.35 * column, y, cell, va="center", ha="right", fontsize=9.5, color=colour)
        if number == 0:
            axes.plot((0.3, 2.6 + 1.35 * (len(row) - 1)), (y + LINE / 2, y + LINE / 2), color="#999999", linewidth=0.8)
        y += LINE
    return y + LINE


def routing_figure(report: dict[str, Any]) -> Figure:
    """Heat maps of domain by expert: the mean over the layers, then each layer."""
    shares = report["routing_shares"]
    domains = list(shares)
    n_layers, n_experts = len(shares[domains[0]]), len(shares[domains[0]][0])
    panels = {"mean over layers": [mean_over_layers(shares[d]) for d in domains]}
    panels |= {f"layer {layer}": [shares[d][layer] for d in domains] for layer in range(n_layers)}
    top = max(max(row) for panel in panels.values() for row in panel)

    panel_width = 0.55 * n_experts + 0.25
    figure = Figure(
        figsize=(1.6 + panel_width * len(panels), 1.5 + 0.5 * len(domains)), facecolor="white", layout="constrained"
    )
    figure.suptitle("Share of the routing weight, in percent", fontsize=11, fontweight="bold")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.imshow(panel, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(n_experts), [str(e) for e in range(n_experts)])
        axes.set_yticks(range(len(domains)), domains)
        axes.set_xlabel("expert", fontsize=9)
        axes.tick_params(length=0, labelsize=9)
        for i, row in enumerate(panel):
            for e, share in enumerate(row):
                colour = "white" if share > 0.6 * top else "black"
                axes.text(e, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
    return figure
