"""The tables of a report, as text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

WAYS = {
    "n_passes": "N passes, logits mixed (old)",
    "two_passes": "two passes, PEFT-style loop",
    "one_lora": "one stock LoRA",
    "moelora": "moelora, one pass",
}
DIFFERENCES = {
    "forward": "logits, PEFT-style loop",
    "gradients": "every gradient, PEFT-style loop",
    "logits": 'mixture="logits", N passes',
}


class Section(NamedTuple):
    """One table: a title, the heads of its columns, and rows of as many cells."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of a report.

    Parameters
    ----------
    report : dict
        What ``report.json`` holds.
    """
    settings, perplexity, cost = report["settings"], report["perplexity"], report["cost"]
    rank, experts = settings["rank"], settings["experts"]
    models = {
        "base": "base",
        "lora_r": f"LoRA r={rank}",
        "lora_nr": f"LoRA r={experts * rank}",
        "mixture": f"{experts} experts r={rank}",
    }
    domains = list(report["routing_shares"])
    quality = [[name, *(f"{perplexity[model][name]:.3f}" for model in models)] for name in domains]
    quality.append(["geometric mean", *(f"{perplexity[model]['all']:.3f}" for model in models)])
    quality.append(["trained parameters", *(f"{report['trained_parameters'][model]:,}" for model in models)])

    routing = [
        [name, *(f"{100 * share:.1f} %" for share in mean_over_layers(report["routing_shares"][name]))]
        for name in domains
    ]

    one = cost["one_lora"]
    costs = [
        [
            label,
            *(f"{cost[way][f'{work}_ms']:.1f}" for work in ("train", "forward")),
            f"{cost[way]['train_ms'] / one['train_ms']:.2f} x",
            *(f"{cost[way][f'{work}_mib']:.1f}" for work in ("train", "forward")),
        ]
        for way, label in WAYS.items()
    ]

    distances = [
        [label, *(f"{report['differences'][key][kind]:.1e}" for kind in ("absolute", "relative"))]
        for key, label in DIFFERENCES.items()
    ]

    batch = " x ".join(map(str, settings["cost_batch"]))
    return [
        Section("Perplexity per byte on held-out text", ["", *models.values()], quality),
        Section(
            f"Share of the routing weight, top-{settings['top_k']}, mean over layers",
            ["", *(f"expert_{e}" for e in range(experts))],
            routing,
        ),
        Section(
            f"Cost of a batch of {batch} tokens, Llama of {settings['cost_parameters'] / 1e6:.1f} M parameters",
            ["", "train step ms", "forward ms", "of one LoRA's step", "train MiB", "forward MiB"],
            costs,
        ),
        Section("Largest difference of moelora's results", ["", "absolute", "relative"], distances),
    ]


def mean_over_layers(shares: list[list[float]]) -> list[float]:
    """Of shares [L, N], the mean over L."""
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def verdict(report: dict[str, Any]) -> str:
    """One sentence: how the mixture did against one LoRA that is as large as its experts together."""
    rank = report["settings"]["experts"] * report["settings"]["rank"]
    ratio = report["perplexity"]["mixture"]["all"] / report["perplexity"]["lora_nr"]["all"]
    if ratio < 1:
        return f"The mixture beats one LoRA of rank {rank}: its perplexity is {100 * (1 - ratio):.2f} % lower."
    return f"The mixture does not beat one LoRA of rank {rank}: its perplexity is {100 * (ratio - 1):.2f} % higher."


def as_text(report: dict[str, Any]) -> str:
    """The tables and the verdict for a terminal, without a final newline."""
    return f"{render(sections(report))}\n\n{verdict(report)}"


def render(tables: Sequence[Section]) -> str:
    """Tables for a terminal, one below the other, without a final newline; the first columns are equally wide."""
    first = max(len(row[0]) for table in tables for row in [table.heads, *table.rows])
    blocks = []
    for table in tables:
        widths = [max(len(row[i]) for row in [table.heads, *table.rows]) for i in range(len(table.heads))]
        widths[0] = first
        lines = [
            row[0].ljust(first)
            + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in [table.heads, *table.rows]
        ]
        blocks.append("\n".join([table.title, "-" * len(lines[0]), *lines]))
    return "\n\n".join(blocks)
