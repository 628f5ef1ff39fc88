"""A validation's report, as text."""

from typing import Any

from moelora.report.table import Section, render

GROUPS = ("outputs", "gradients", "cost", "compatibility")
VERDICTS = {True: "holds", False: "FAILS", None: "-"}
WORST = 5
WAYS = {"n_passes": "N passes, stock PEFT", "moelora": "one pass, moelora", "one_lora": "one stock adapter, rank N r"}


def as_text(report: dict[str, Any]) -> str:
    """Tables and verdict for a terminal, without a final newline.

    Parameters
    ----------
    report : dict
        What `moelora.validate.run.validate` returns.
    """
    tables = [
        Section(
            f"{group.capitalize()} of {report['settings']['checkpoint']}",
            ["promise", "measured", "allowed", "verdict"],
            [
                [c["promise"], _figure(c["measured"]), _figure(c["allowed"]), VERDICTS[c["holds"]]]
                for c in report["checks"]
                if c["group"] == group
            ],
        )
        for group in GROUPS
        if any(check["group"] == group for check in report["checks"])
    ]
    if layers := report.get("layers"):
        order = sorted(layers, key=lambda name: float(layers[name]), reverse=True)[:WORST]
        title = f"The routed layers that differ most from the loop, of {len(layers)}"
        tables.append(Section(title, ["layer", "relative"], [[name, _figure(layers[name])] for name in order]))
    if measured := report.get("cost"):
        heads = ["", "train step ms", "quartiles", "forward ms", "quartiles", "train peak MiB"]
        tables.append(Section("Cost of a batch", heads, [_cost_row(way, measured[way]) for way in WAYS]))
    notes = [f"{c['promise']}: {c['note']}" for c in report["checks"] if c["note"]]
    notes += [report[name] for name in ("untrained", "skipped") if name in report]
    blocks = [
        render(tables),
        *(["Notes\n" + "\n".join(f"- {note}" for note in notes)] if notes else []),
        _about(report),
    ]
    return "\n\n".join([*blocks, verdict(report)])


def verdict(report: dict[str, Any]) -> str:
    """One sentence."""
    failed = sum(check["holds"] is False for check in report["checks"])
    judged = sum(check["holds"] is not None for check in report["checks"])
    if failed:
        return f"{failed} of {judged} promises FAILED."
    return f"All {judged} promises that were judged hold."


def _figure(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.3f}"


def _cost_row(way: str, measured: dict[str, Any]) -> list[str]:
    cells = [WAYS[way]]
    for work in ("train", "forward"):
        first, median, third = (1e3 * value for value in measured[f"{work}_seconds"])
        cells += [f"{median:.1f}", f"{first:.1f}-{third:.1f}"]
    peak = measured["train_peak_bytes"]
    return [*cells, "" if peak is None else f"{peak / 2**20:.1f}"]


def _about(report: dict[str, Any]) -> str:
    on = report["machine"]
    parts = [
        f"{on['processor']} ({on['instruction_set']}), {on['threads']} threads",
        *(f"{name} {on[name]}" for name in ("moelora", "torch", "peft", "transformers")),
    ]
    lines = [", ".join(parts)]
    if "model" in report:
        size = f"{report['parameters'] / 1e6:.1f} M parameters, {report['dtype']}"
        lines.append(f"Base model {report['model']} ({size}), experts {', '.join(report['experts'])}")
        lines.append(f"Data: {report['data']}; routing weights: random, seed {report['settings']['seed']}")
    return "\n".join(lines)
