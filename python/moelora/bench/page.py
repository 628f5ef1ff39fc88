"""The tables of docs/benchmarks.md, from the CSV files of a CPU or of a GPU."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from moelora.bench.goals import SUMMARY_HEADS, Results, device_of, judge, limit_text, summary_rows
from moelora.bench.record import Row

MARKED = re.compile(r"(<!-- bench: ([a-z-]+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)


def render(page: str, results: Results, stem: str) -> str:
    """A page with what stands between its marks made anew.

    A block begins with ``<!-- bench: NAME -->``, where NAME is one of `BLOCKS`, and ends with ``<!-- bench: end -->``.
    Those whose name begins with "cuda-" are for results from a GPU, all others for those from a CPU; results from one
    leave the blocks for the other alone.

    Parameters
    ----------
    page : str
        Its text.
    results : mapping
        Rows by the name of their file.
    stem : str
        The folder of the pictures, as the page names it.

    Returns
    -------
    str
        The new text.

    Raises
    ------
    ValueError
        The page has no marks, or a mark has an unknown name.
    """
    marks = [name for _, name, _ in MARKED.findall(page)]
    if not marks:
        raise ValueError("has no block between <!-- bench: NAME --> and <!-- bench: end -->")
    if unknown := [name for name in marks if name not in BLOCKS]:
        raise ValueError(f"{unknown[0]!r} is none of the blocks {', '.join(BLOCKS)}")

    device = device_of(results)

    def block(match: re.Match[str]) -> str:
        if match[2].startswith("cuda-") is not (device == "cuda"):
            return match[0]
        file, make = BLOCKS[match[2]]
        text = make(results, stem) if results[file] else ""
        more = " --device cuda" if device == "cuda" else ""
        return f"{match[1]}\n{text or f'Not measured yet: `moelora bench {file}{more}`.'}\n\n{match[3]}"

    return MARKED.sub(block, page)


def _machine(results: Results, stem: str) -> str:
    row = results["layers"][0]
    versions = ", ".join(
        f"{name} {row[name]}" for name in ("torch", "peft", "transformers", "numpy", "python", "moelora")
    )
    commands = dict.fromkeys(row["command"] for rows in results.values() for row in rows)
    if device_of(results) == "cuda":
        machine = f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}, NVRTC {row['nvrtc']}, {row['cpu']}"
    else:
        machine = f"{row['cpu']}, {row['threads']} threads, {row['openblas']}"
    return "\n".join([f"{machine}; {versions}.", "", "```sh", *commands, "```"])


def _peak(results: Results, stem: str) -> str:
    return _table(
        ["", "dtype", "fastest", "quartiles"],
        (
            [row["what"], row["dtype"], f"{row['best']} {row['unit']}", f"{row['q1']} {row['median']} {row['q3']}"]
            for row in results["peak"]
        ),
    )


def _mixture(results: Results, stem: str) -> str:
    """Ratios to stacked torch over all widths and mixtures, for each number of tokens."""
    tables = []
    for dtype, isa in dict.fromkeys((row["dtype"], row["isa"]) for row in results["layers"]):
        here = [
            row for row in results["layers"] if (row["dtype"], row["isa"]) == (dtype, isa) and row["weights"] == "hot"
        ]
        columns = [(which, peer) for peer in ("stacked", "stacked_medium") for which in _values(here, "pass")]
        columns = [(which, peer) for which, peer in columns if any(row["peer"] == peer for row in here)]
        lines = [
            [
                T,
                *(
                    _spread(_over(row) for row in here if (row["T"], row["pass"], row["peer"]) == (T, which, peer))
                    for which, peer in columns
                ),
            ]
            for T in _values(here, "T")
        ]
        heads = ["T", *(f"{which}, of {peer}" for which, peer in columns)]
        tables.append(f"{dtype}, {isa}:\n\n{_table(heads, lines)}")
    return "\n\n".join(tables)


def _cold(results: Results, stem: str) -> str:
    cold = [row for row in results["layers"] if row["weights"] == "cold" and row["forced"] == "no"]
    rows = [row for row in cold if row["peer"] == "stacked"]
    lines = [
        [dtype, d, _spread(_over(row) for row in rows if (row["dtype"], row["d"]) == (dtype, d))]
        for dtype, d in dict.fromkeys((row["dtype"], row["d"]) for row in rows)
    ]
    return _table(["dtype", "d", "of stacked"], lines)


def _peers(results: Results, stem: str) -> str:
    """All peers on the widest layer, in microseconds."""
    tables = []
    compared = [row for row in results["layers"] if row["forced"] == "no" and row["weights"] == "hot"]
    if not compared:
        return ""
    mixture = next((row["N"], row["r"]) for row in compared if row["peer"] == "loop")
    d = max(_values(compared, "d"), key=int)
    compared = [row for row in compared if (row["N"], row["r"]) == mixture and row["d"] == d]
    for dtype in _values(compared, "dtype"):
        for which in _values(compared, "pass"):
            here = [row for row in compared if (row["dtype"], row["pass"]) == (dtype, which)]
            of = {(row["T"], row["peer"]): row["us_median"] for row in here}
            peers = _values(here, "peer")
            lines = [[T, *(_short(of[T, peer]) for peer in peers)] for T in _values(here, "T")]
            about = f"{dtype}, {which}, d = {d}, {mixture[0]} experts of rank {mixture[1]}:"
            tables.append(f"{about}\n\n{_table(['T', *peers], lines)}")
    return "\n\n".join(tables)


def _kept(results: Results, stem: str) -> str:
    """At the largest cell of the first mixture."""
    rows = [row for row in results["layers"] if row["kept_bytes"] and row["forced"] == "no"]
    if not rows:
        return ""
    first = rows[0]
    T, d = _largest(rows, "T"), _largest(rows, "d")
    place = (T, d, first["N"], first["r"], first["dtype"])
    here = [row for row in rows if tuple(row[name] for name in ("T", "d", "N", "r", "dtype")) == place]
    lines = [[row["peer"], f"{int(row['kept_bytes']) / 2**20:.2f} MiB"] for row in here]
    about = f"T = {T}, d = {d}, {first['N']} experts of rank {first['r']}, {first['dtype']}:"
    return f"{about}\n\n{_table(['', 'kept for the backward, parameters aside'], lines)}"


def _topk(results: Results, stem: str) -> str:
    return _median_table(results["topk"], {"what": "mixture"}, ["dtype", "T", "d", "N", "r", "k", "pass"])


def _route(results: Results, stem: str) -> str:
    return _median_table(results["topk"], {"what": "route"}, ["T", "N", "k", "pass"])


def _between(results: Results, stem: str) -> str:
    """In one go over the sum of the parts, beside what the same is for stacked torch."""
    rows = [row for row in results["neighbours"] if row["what"] == "between"]
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        place = tuple(row[name] for name in ("T", "d", "N", "r", "threads"))
        cells.setdefault(place, {})[row["peer"]] = float(row["us_median"])
    lines = (
        [
            *cell,
            _short(str(of["moelora"])),
            _short(str(of["moelora_parts"])),
            *(f"{of[peer] / of[f'{peer}_parts']:.3f}" for peer in ("moelora", "stacked")),
        ]
        for cell, of in cells.items()
    )
    return _table(["T", "d", "N", "r", "threads", "in one go", "sum of the parts", "ratio", "of stacked"], lines)


def _siblings(results: Results, stem: str) -> str:
    """Apart, and with as much in common as can be; and what both kinds save of a layer's step."""
    of = {
        tuple(row[name] for name in ("T", "d", "N", "r", "what", "pass", "peer")): float(row["us_median"])
        for row in results["neighbours"]
        if row["what"] != "between"
    }
    kinds = [(what, which) for what in ("qkv", "gate_up") for which in ("forward", "forward+backward")]
    lines = []
    for place in dict.fromkeys(key[:4] for key in of):
        apart, together = ([of[*place, *kind, peer] for kind in kinds] for peer in ("separate", "shared"))
        saved = sum(apart[i] - together[i] for i in (1, 3)) / of[*place, "qkv", "forward+backward", "step"]
        times = [f"{_short(str(a))} → {_short(str(b))}" for a, b in zip(apart, together, strict=True)]
        lines.append([*place, *times, f"{100 * saved:.1f} %"])
    heads = [f"{what.replace('_', ', ').replace('qkv', 'q, k, v')}: {which}" for what, which in kinds]
    return _table(["T", "d", "N", "r", *heads, "saved of a layer's step"], lines)


def _models(results: Results, stem: str) -> str:
    tables = []
    short = "{:.1f}" if device_of(results) == "cuda" else "{:.0f}"
    for place in dict.fromkeys((row["model"], row["N"], row["dtype"]) for row in results["models"]):
        here = [row for row in results["models"] if (row["model"], row["N"], row["dtype"]) == place]
        of = {(row["peer"], row["p"], row["what"]): row for row in here if row.get("timed") != "graph"}
        graphs = {row["peer"]: row for row in here if row.get("timed") == "graph"}
        step = float(of["moelora", "0.0", "train step"]["ms_median"] or "nan")
        lines = []
        for peer, p in dict.fromkeys((row["peer"], row["p"]) for row in here):
            train, forward = of[peer, p, "train step"], of.get((peer, p, "forward"))
            name = peer if p == "0.0" else f"{peer}, dropout {p}"
            line = [name, f"{_ms(forward, 'median', short)} ms" if forward and forward["ms_median"] else ""]
            if graphs:
                line.append(f"{_ms(graphs[peer], 'median', short)} ms" if forward and peer in graphs else "")
            if train["ms_median"]:
                line += [f"{_ms(train, 'median', short)} ms"]
                line += [f"{_ms(train, 'q1', short)} to {_ms(train, 'q3', short)}"]
                line += [
                    f"{float(train['ms_median']) / step:.2f}",
                    f"{train['peak_mib']} MiB" if train["peak_mib"] else "",
                ]
            else:
                line += [train["peak_mib"], "", "", ""]
            lines.append(line)
        heads = ["", "forward", *(["in a CUDA graph"] if graphs else [])]
        heads += ["train step", "quartiles", "over moelora", "peak memory of the step"]
        first = here[0]
        tables.append(
            f"{first['model']} in {first['dtype']}, {first['N']} experts of rank {first['r']}, "
            f"{first['B']} x {first['S']} tokens:\n\n{_table(heads, lines)}"
        )
    return "\n\n".join(tables)


def _ms(row: Row, name: str, short: str) -> str:
    return short.format(float(row[f"ms_{name}"]))


def _gpu_layers(results: Results, stem: str) -> str:
    """Large T: the base's microseconds, and the times of all others over it."""
    rows = [row for row in results["layers"] if int(row["T"]) > 64 and row["timed"] == "graph"]
    places = ["T", "d_in", "d_out", "R"]
    tables = []
    for adapters, which in itertools.product(_values(rows, "adapters"), _values(rows, "pass")):
        here = [row for row in rows if (row["adapters"], row["pass"]) == (adapters, which)]
        others = [peer for peer in _values(here, "peer") if peer != "base"]
        lines = []
        for place, of in _by_shape(here).items():
            floor = 1 + int(place[3]) / int(place[1]) + int(place[3]) / int(place[2])
            ratios = [of[peer]["over_base"] if peer in of else "" for peer in others]
            lines.append([*place, of["moelora"]["way"], _short(of["base"]["us_median"]), f"{floor:.3f}", *ratios])
        heads = [*places, "way", "base, us", "1 + R/d_in + R/d_out", *others]
        tables.append(f"{which}, {adapters} adapters:\n\n{_table(heads, lines)}")
    return "\n\n".join(tables)


def _gpu_decode(results: Results, stem: str) -> str:
    """Few tokens: microseconds."""
    rows = [row for row in results["layers"] if int(row["T"]) <= 64 and row["timed"] == "graph"]
    tables = []
    for adapters in _values(rows, "adapters"):
        here = [row for row in rows if row["adapters"] == adapters]
        peers = _values(here, "peer")
        lines = [
            [*place, of["moelora"]["way"], *(_short(of[peer]["us_median"]) if peer in of else "" for peer in peers)]
            for place, of in _by_shape(here).items()
        ]
        tables.append(f"{adapters} adapters:\n\n{_table(['T', 'd_in', 'd_out', 'R', 'way', *peers], lines)}")
    return "\n\n".join(tables)


def _gpu_calls(results: Results, stem: str) -> str:
    """Microseconds without graphs, and the peak of memory."""
    rows = [row for row in results["layers"] if row["timed"] == "calls"]
    tables = []
    for adapters, which in dict.fromkeys((row["adapters"], row["pass"]) for row in rows):
        here = [row for row in rows if (row["adapters"], row["pass"]) == (adapters, which)]
        peers = _values(here, "peer")
        lines = []
        for place, of in _by_shape(here).items():
            times = [_short(of[peer]["us_median"]) if peer in of else "" for peer in peers]
            most = [f"{float(of[peer]['peak_mib']):.0f}" for peer in ("moelora", "stacked", "one_lora") if peer in of]
            lines.append([*place, *times, " / ".join(most)])
        heads = ["T", "d_in", "d_out", "R", *peers, "MiB of moelora / stacked / one_lora"]
        tables.append(f"{which}, {adapters} adapters:\n\n{_table(heads, lines)}")
    return "\n\n".join(tables)


def _gpu_agreement(results: Results, stem: str) -> str:
    """The largest distance of each peer from float32, of y and of dx; of whole models from moelora."""
    layers = [row for row in results["layers"] if row["off"]]
    lines = []
    for peer in _values(layers, "peer"):
        of = {"y": [], "dx": []}  # type: dict[str, list[float]]
        for row in (row for row in layers if row["peer"] == peer):
            of["y" if row["pass"] in ("forward", "forward_grad") else "dx"].append(float(row["off"]))
        lines.append([peer, *(f"{max(far):.2g}" if far else "" for far in of.values())])
    tables = [_table(["layers, from float32", "y", "dx"], lines)]
    models = [row for row in results["models"] if row["off"]]
    names = _values(models, "model")
    lines = [
        [peer, *(_largest_off(row for row in models if (row["peer"], row["model"]) == (peer, name)) for name in names)]
        for peer in _values(models, "peer")
    ]
    tables.append(_table(["logits, from moelora's", *names], lines))
    return "\n\n".join(table for table in tables if table)


def _largest_off(rows: Iterable[Row]) -> str:
    return max((row["off"] for row in rows), key=float, default="")


def _gpu_siblings(results: Results, stem: str) -> str:
    """Apart, with as much in common as can be, the same of the base alone; in graphs also shares of a decoder layer."""
    of = {
        tuple(row[name] for name in ("model", "timed", "pass", "what", "peer")): float(row["us_median"])
        for row in results["neighbours"]
    }
    kinds = {"qkv": "q, k, v", "gate_up": "gate, up"}
    lines = []
    for place in dict.fromkeys(key[:3] for key in of):
        cells = []
        saved = {"separate": 0.0, "base": 0.0}
        for what in kinds:
            for apart, together in (("separate", "shared"), ("base", "base_shared")):
                if (*place, what, apart) in of:
                    a, b = of[*place, what, apart], of[*place, what, together]
                    saved[apart] += a - b
                    cells.append(f"{_short(str(a))} → {_short(str(b))}")
                else:
                    cells.append("")
        layer = of.get((*place, "layer", "decoder_layer"))
        shares = (
            [_short(str(layer)), *(f"{100 * each / layer:.1f} %" for each in saved.values())] if layer else [""] * 3
        )
        lines.append([*place, *cells, *shares])
    heads = [f"{said}{base}" for said in kinds.values() for base in ("", ", base alone")]
    return _table(["model", "timed", "pass", *heads, "decoder layer", "saved", "saved by the base"], lines)


def _by_shape(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    shapes: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        R = str(int(row["N"]) * int(row["r"]))
        shapes.setdefault((row["T"], row["d_in"], row["d_out"], R), {})[row["peer"]] = row
    return shapes


def _gpu_topk(results: Results, stem: str) -> str:
    return _median_table(results["topk"], {"what": "mixture"}, ["timed", "dtype", "T", "d", "N", "r", "k", "pass"])


def _gpu_route(results: Results, stem: str) -> str:
    return _median_table(results["topk"], {"what": "route"}, ["timed", "T", "N", "k", "pass"])


def _host(results: Results, stem: str) -> str:
    return "\n\n".join(
        _median_table(results["host"], {"what": what}, ["what", "T", "N", "pass"])
        for what in _values(results["host"], "what")
    )


def _goals(results: Results, stem: str) -> str:
    return _table(SUMMARY_HEADS, summary_rows(judge(results)))


def _short_cells(results: Results, stem: str) -> str:
    lines = [
        [goal.title, limit_text(goal), verdict.cell, f"{verdict.value:.3g}"]
        for goal, verdicts in judge(results)
        for verdict in verdicts
        if not verdict.met
    ]
    return _table(["goal", "limit", "cell", "value"], lines) if lines else "None."


def _plots(results: Results, stem: str) -> str:
    from moelora.bench.plots import names

    return "\n\n".join(f"![{name}]({stem}/{name}.png)" for name in names(results))


BLOCKS: dict[str, tuple[str, Callable[[Results, str], str]]] = {
    "machine": ("layers", _machine),
    "peak": ("layers", _peak),
    "mixture": ("layers", _mixture),
    "cold": ("layers", _cold),
    "peers": ("layers", _peers),
    "kept": ("layers", _kept),
    "plots": ("layers", _plots),
    "topk": ("topk", _topk),
    "route": ("topk", _route),
    "between": ("neighbours", _between),
    "siblings": ("neighbours", _siblings),
    "models": ("models", _models),
    "host": ("host", _host),
    "goals": ("layers", _goals),
    "short": ("layers", _short_cells),
    "cuda-machine": ("layers", _machine),
    "cuda-goals": ("layers", _goals),
    "cuda-short": ("layers", _short_cells),
    "cuda-layers": ("layers", _gpu_layers),
    "cuda-decode": ("layers", _gpu_decode),
    "cuda-calls": ("layers", _gpu_calls),
    "cuda-agreement": ("layers", _gpu_agreement),
    "cuda-siblings": ("neighbours", _gpu_siblings),
    "cuda-topk": ("topk", _gpu_topk),
    "cuda-route": ("topk", _gpu_route),
    "cuda-models": ("models", _models),
    "cuda-host": ("host", _host),
    "cuda-plots": ("layers", _plots),
}
"""By name: the file that a block shows, which is also the command that measures it, and what makes its text."""


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def _median_table(rows: Sequence[Row], where: dict[str, str], places: Sequence[str]) -> str:
    """Medians of all peers, in microseconds, with a line for each cell."""
    here = [row for row in rows if all(row[name] == value for name, value in where.items())]
    peers = _values(here, "peer")
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in here:
        cells.setdefault(tuple(row[name] for name in places), {})[row["peer"]] = _short(row["us_median"])
    return _table([*places, *peers], ([*cell, *(of.get(peer, "") for peer in peers)] for cell, of in cells.items()))


def _over(row: Row) -> float:
    """moelora's median over that of this row's peer."""
    return 1 / float(row["over_moelora"])


def _spread(values: Iterable[float]) -> str:
    found = sorted(values)
    return " ".join(f"{value:.2f}" for value in (found[0], found[len(found) // 2], found[-1])) if found else ""


def _short(microseconds: str) -> str:
    return f"{float(microseconds):.3g}" if float(microseconds) < 100 else f"{float(microseconds):.0f}"


def _largest(rows: Sequence[Row], name: str) -> str:
    return max(_values(rows, name), key=int)


def _values(rows: Iterable[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))
