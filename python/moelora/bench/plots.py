"""The plots of a benchmark's CSV files. Needs matplotlib."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moelora.bench.goals import Results, device_of
from moelora.bench.record import Row

COLOURS = {
    "moelora": "#2ca02c",
    "moelora_weight": "#98df8a",
    "moelora_compiled": "#006d2c",
    "stacked": "#1f77b4",
    "stacked_medium": "#17becf",
    "stacked_compiled": "#9467bd",
    "loop": "#d62728",
    "topk_loop": "#d62728",
    "one_lora": "#ff7f0e",
    "base": "#555555",
    "base_medium": "#aaaaaa",
    "base_compiled": "#222222",
    "torch": "#1f77b4",
    "moelora_router": "#98df8a",
    "two_pass": "#e377c2",
    "n_passes": "#8c564b",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what there are rows for.

    Parameters
    ----------
    results : mapping
        Rows by the name of their file.
    folder : Path
        Gets the pictures.

    Returns
    -------
    list of Path
        The pictures.
    """
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in _figures(results).items():
        figure = make()
        FigureCanvasAgg(figure)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def names(results: Results) -> list[str]:
    """The pictures that `draw` makes."""
    return list(_figures(results))


def _figures(results: Results) -> dict[str, Callable[[], Figure]]:
    if device_of(results) == "cuda":
        return _gpu_figures(results)
    figures: dict[str, Callable[[], Figure]] = {}
    layers = [row for row in results["layers"] if row["forced"] == "no" and row["weights"] == "hot"]
    for dtype in _values(layers, "dtype"):
        of_dtype = [row for row in layers if row["dtype"] == dtype]
        n, r = of_dtype[0]["N"], of_dtype[0]["r"]
        compared = [row for row in of_dtype if (row["N"], row["r"]) == (n, r)]
        title = f"One layer, {n} experts of rank {r}, {dtype}"
        figures[f"tokens_{dtype}"] = partial(_panels, compared, "T", "d", title, "tokens T")
        figures[f"roofline_{dtype}"] = partial(_roofline, of_dtype)
    few = [row for row in results["topk"] if row["what"] == "mixture"]
    for dtype in _values(few, "dtype"):
        T, d = next((row["T"], row["d"]) for row in few if row["dtype"] == dtype)
        here = [row for row in few if (row["T"], row["d"], row["dtype"]) == (T, d, dtype)]
        title = f"k experts of N for each token, T = {T}, d = {d}, {dtype}"
        figures[f"experts_{dtype}"] = partial(_panels, here, "N", "k", title, "experts N")
        figures[f"top_k_{dtype}"] = partial(_panels, here, "k", "N", title, "k")
    return figures


def _gpu_figures(results: Results) -> dict[str, Callable[[], Figure]]:
    figures: dict[str, Callable[[], Figure]] = {}
    square = [
        row
        for row in results["layers"]
        if row["d_in"] == row["d_out"] and row["timed"] == "graph" and not row["peer"].startswith("moelora_")
    ]
    if square:
        d = max(_values(square, "d_in"), key=int)
        n = min((row["N"] for row in square if row["d_in"] == d), key=int)
        figures["cuda_layers"] = partial(_over_base, [row for row in square if (row["d_in"], row["N"]) == (d, n)])
    if results["models"]:
        figures["cuda_models"] = partial(_bars, results["models"])
    return figures


def _over_base(rows: Sequence[Row]) -> Figure:
    """Time over the base's against T, a row of panels for each dtype of adapters, a column for each of two passes."""
    of_adapters = _values(rows, "adapters")
    figure = Figure(figsize=(10, 3.4 * len(of_adapters)), facecolor="white", layout="constrained")
    first = rows[0]
    figure.suptitle(
        f"One layer, {first['N']} experts of rank {first['r']}, d = {first['d_in']}: time over the base layer's",
        fontsize=11,
        fontweight="bold",
    )
    panels = figure.subplots(len(of_adapters), 2, squeeze=False)
    for line, adapters in zip(panels, of_adapters, strict=True):
        for axes, which in zip(line, ("forward", "forward+backward"), strict=True):
            here = [row for row in rows if (row["adapters"], row["pass"]) == (adapters, which)]
            for peer in _values(here, "peer"):
                points = sorted((int(row["T"]), float(row["over_base"])) for row in here if row["peer"] == peer)
                at, ratio = zip(*points, strict=True)
                width = 2 if peer == "moelora" else 1.2
                axes.plot(at, ratio, color=COLOURS[peer], label=peer, linewidth=width, marker=".")
            ticks = sorted({int(row["T"]) for row in here})
            axes.set(xscale="log", yscale="log", title=f"{which}, {adapters} adapters", xlabel="tokens T")
            axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:.2g}")
            axes.grid(alpha=0.3, which="both")
        line[0].set_ylabel("over base")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _bars(rows: Sequence[Row]) -> Figure:
    """Of each model the time and the peak memory of a train step, without what ran out of memory."""
    steps = [row for row in rows if (row["what"], row["p"]) == ("train step", "0.0") and row["ms_median"]]
    cells = list(dict.fromkeys((row["model"], row["N"]) for row in steps))
    figure = Figure(figsize=(4 * len(cells) + 1, 6), facecolor="white", layout="constrained")
    figure.suptitle("A train step, and what it needs beyond the parameters", fontsize=11, fontweight="bold")
    panels = figure.subplots(2, len(cells), squeeze=False)
    for column, cell in enumerate(cells):
        here = [row for row in steps if (row["model"], row["N"]) == cell]
        peers = [row["peer"] for row in here]
        for axes, name, scale, unit in (
            (panels[0][column], "ms_median", 1, "ms"),
            (panels[1][column], "peak_mib", 1024, "GiB"),
        ):
            axes.barh(peers, [float(row[name]) / scale for row in here], color=[COLOURS[peer] for peer in peers])
            axes.invert_yaxis()
            axes.set_xlabel(unit)
            axes.grid(alpha=0.3, axis="x")
        panels[0][column].set_title(f"{cell[0]}, {cell[1]} experts")
    return figure


def _panels(rows: Sequence[Row], x: str, column: str, title: str, label: str) -> Figure:
    """Time against `x`, a row of panels for each pass, a column of them for each value of `column`."""
    passes, columns = _values(rows, "pass"), sorted(_values(rows, column), key=int)
    figure = Figure(figsize=(4 * len(columns) + 1.6, 3.2 * len(passes)), facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    panels = figure.subplots(len(passes), len(columns), squeeze=False)
    for line, which in enumerate(passes):
        for place, value in enumerate(columns):
            axes = panels[line][place]
            here = [row for row in rows if row["pass"] == which and row[column] == value]
            for peer in _values(here, "peer"):
                points = sorted((int(row[x]), *_quartiles(row)) for row in here if row["peer"] == peer)
                at, low, middle, high = zip(*points, strict=True)
                ours = peer.startswith("moelora")
                axes.plot(at, middle, color=COLOURS[peer], label=peer, linewidth=2 if ours else 1.2, marker=".")
                axes.fill_between(at, low, high, color=COLOURS[peer], alpha=0.15)
            axes.set(xscale="log", yscale="log", title=f"{which}, {column} = {value}", xlabel=label)
            ticks = sorted({int(row[x]) for row in here})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
        panels[line][0].set_ylabel("microseconds")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _quartiles(row: Row) -> tuple[float, float, float]:
    return float(row["us_q1"]), float(row["us_median"]), float(row["us_q3"])


def _roofline(rows: Sequence[Row]) -> Figure:
    """Products of the mixture against what the machine reached in the same run."""
    figure = Figure(figsize=(10, 4), facecolor="white", layout="constrained")
    first = rows[0]
    peak, bandwidth = float(first["peak_gflops"]), float(first["peak_gb_per_s"])
    figure.suptitle(
        f"Products of the mixture, {first['dtype']}; peak {peak:.0f} GF/s, copying {bandwidth:.0f} GB/s",
        fontsize=11,
        fontweight="bold",
    )
    for axes, which in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        here = [row for row in rows if row["pass"] == which]
        for peer in ("stacked", "moelora"):
            of_peer = [row for row in here if row["peer"] == peer]
            at = [_intensity(row) for row in of_peer]
            axes.scatter(at, [float(row["gflops"]) for row in of_peer], 14, color=COLOURS[peer], label=peer, alpha=0.7)
        ends = [min(map(_intensity, here)) / 2, max(map(_intensity, here)) * 2]
        line = sorted([*ends, peak / bandwidth])
        axes.plot(line, [min(peak, bandwidth * x) for x in line], color="black", linewidth=1)
        axes.set(
            xscale="log", yscale="log", xlim=ends, title=which, xlabel="flops for each byte of arguments and results"
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("GF/s")
    return figure


def _intensity(row: Row) -> float:
    """Flops for each byte that has to be read or written once."""
    T, d, n, r = (int(row[name]) for name in ("T", "d", "N", "r"))
    size, of_adapters = {"float32": (4, 4), "bfloat16": (2, 2), "bfloat16+float32": (2, 4)}[row["dtype"]]
    # Three arrays [T, d] (x, base, y; or x, g, dx), and A and B, whose gradients are written in the backward.
    adapters = 2 * n * r * d * (2 if row["pass"] == "backward" else 1)
    flops = (8 if row["pass"] == "backward" else 4) * T * d * n * r
    return flops / (size * 3 * T * d + of_adapters * (adapters + T * (n + n * r)))


def _values(rows: Iterable[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))
