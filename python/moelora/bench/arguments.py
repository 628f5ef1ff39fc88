"""The arguments of `moelora bench`."""

import argparse
from pathlib import Path
from typing import Any

MEASURE = {
    "layers": "one layer: the mixture and the whole layer, forward and backward, and the machine's peak",
    "topk": "few experts of many: the mixture of each token's k best experts, and routing",
    "neighbours": "a routed layer between two others, and what layers that read the same input could share",
    "models": "small language models: forward, train step, memory",
    "host": "what a call, a layer and a model cost on the host, on one thread",
}

_CPU: dict[str, dict[str, Any]] = {
    "layers": {
        "tokens": [1, 4, 16, 64, 256, 1024, 4096],
        "widths": [768, 2048, 4096],
        "mixtures": [(8, 8), (4, 8), (4, 16), (8, 16)],
        "dtype": ["float32", "bfloat16", "bfloat16+float32"],
    },
    "topk": {
        "tokens": [2048],
        "widths": [2048],
        "mixtures": [(4, 8), (16, 8), (64, 8), (256, 8)],
        "top_k": [1, 2, 8],
        "dtype": ["float32", "bfloat16"],
    },
    "neighbours": {"tokens": [1, 16, 256, 2048], "widths": [768, 2048], "mixtures": [(8, 8)]},
    "models": {"models": ["llama", "gpt2"], "mixtures": [(4, 16), (8, 16)], "batch": (2, 256)},
    "host": {"experts": [4, 8]},
}
_CPU_SMOKE: dict[str, dict[str, Any]] = {
    "layers": {
        "tokens": [1, 5],
        "widths": [32],
        "mixtures": [(2, 4), (3, 2)],
        "dtype": ["float32", "bfloat16", "bfloat16+float32"],
    },
    "topk": {"tokens": [7], "widths": [16], "mixtures": [(3, 2), (5, 2)], "top_k": [1, 2], "dtype": ["float32"]},
    "neighbours": {"tokens": [5], "widths": [32], "mixtures": [(2, 2)]},
    "models": {"models": ["llama"], "mixtures": [(2, 4)], "batch": (1, 8)},
    "host": {"experts": [2]},
}
_PASSES = ["forward", "forward_grad", "dx", "backward", "forward+backward"]
_WAYS = [f"moelora_{way}" for way in ("torch", "addmm", "decode", "dual", "fused", "shared")]
_PEERS = ["base", "moelora", "stacked", "stacked_compiled", "one_lora", "loop", "two_pass", "n_passes", *_WAYS]
_TIMED = ["graph", "calls"]
_TOPK = ["mixture", "route"]
_MODEL_PEERS = ["moelora", "one_lora", "stacked", "base", "moelora_router", "loop", "two_pass", "n_passes"]
_MODEL_PEERS += ["base_compiled", "stacked_compiled", "moelora_compiled"]
_CUDA: dict[str, dict[str, Any]] = {
    "layers": {
        "shapes": [
            (8192, 4096, 4096, 64),
            (8192, 4096, 4096, 128),
            (4096, 4096, 4096, 64),
            (4096, 4096, 4096, 128),
            (2048, 2048, 2048, 64),
            (8192, 2048, 16384, 64),
            (8192, 4096, 14336, 64),
            (8192, 14336, 4096, 64),
            (1024, 4096, 4096, 64),
            (512, 4096, 4096, 64),
            *((T, 4096, d_out, 64) for d_out in (4096, 14336) for T in (1, 8, 16, 32, 64)),
        ],
        "adapters": ["bfloat16", "float32"],
        "timed": _TIMED,
        "passes": _PASSES,
        "peers": _PEERS,
    },
    "neighbours": {"models": ["gemma-2b", "llama-8b"]},
    "topk": {
        "tokens": [2048, 8192],
        "widths": [4096],
        "mixtures": [(8, 16), (64, 16)],
        "top_k": [2],
        "timed": _TIMED,
        "what": _TOPK,
    },
    "models": {"models": ["gemma-2b", "llama-8b", "qwen3-4b"], "experts": [4, 8], "peers": _MODEL_PEERS},
    "host": {"experts": [4, 8]},
}
_CUDA_SMOKE: dict[str, dict[str, Any]] = {
    "layers": {
        "shapes": [(4, 512, 256, 32), (512, 256, 512, 64)],
        "adapters": ["bfloat16", "float32"],
        "timed": _TIMED,
        "passes": _PASSES,
        "peers": _PEERS,
    },
    "neighbours": {"models": ["gemma-2b", "llama-8b"]},
    "topk": {"tokens": [64], "widths": [256], "mixtures": [(4, 16)], "top_k": [2], "timed": _TIMED, "what": _TOPK},
    "models": {"models": ["gemma-2b", "llama-8b", "qwen3-4b"], "experts": [4, 8], "peers": _MODEL_PEERS},
    "host": {"experts": [2]},
}
FULL = {"cpu": _CPU, "cuda": _CUDA}
SMOKE = {"cpu": _CPU_SMOKE, "cuda": _CUDA_SMOKE}
ROUNDS, SMOKE_ROUNDS = 20, 2
RANK = 16  # of the experts in `--shapes`


def add_arguments(bench: argparse.ArgumentParser) -> None:
    """Give the parser of `moelora bench` its commands; each has its name in ``bench`` and its parser in ``parser``."""
    commands = bench.add_subparsers(dest="bench", required=True, metavar="COMMAND")
    for name, about in MEASURE.items():
        command = _add(commands, name, about, f"Measure {about}. Writes {name}.csv, and the plots of what DIR holds.")
        _add_common(command)
        _add_grid(command, name)
    everything = "all of these, with their own grids"
    _add_common(_add(commands, "all", everything, f"Measure {everything}. Writes a CSV file for each, and plots."))

    plot = _add(
        commands, "plot", "draw the plots of the CSV files", "Draw the plots of the CSV files. Needs matplotlib."
    )
    goals = _add(
        commands,
        "goals",
        "compare the CSV files with the goals",
        "Print every cell that has a goal, and whether it meets it; 2 % beyond a goal count as met. "
        "The exit status is 1 if a cell falls short.",
    )
    page = _add(
        commands,
        "page",
        "write the tables of a page anew",
        "Write what stands between the marks of a Markdown page anew from the CSV files, and the plots beside it.",
    )
    for command in (plot, goals, page):
        command.add_argument("folder", metavar="DIR", type=Path, help="folder with the CSV files")
    page.add_argument("page", metavar="PAGE", type=Path, help="Markdown file with marks, such as docs/benchmarks.md")


def _add(commands: Any, name: str, about: str, description: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=description, allow_abbrev=False
    )
    command.set_defaults(parser=command)
    return command


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, default=Path("moelora-bench"), metavar="DIR", help="folder to write (default: %(default)s)"
    )
    command.add_argument("--device", choices=list(FULL), default="cpu", help="where to measure (default: %(default)s)")
    command.add_argument("--rounds", type=_positive, help=f"timings of each kind (default: {ROUNDS})")
    command.add_argument("--threads", type=_positive, help="of torch and moelora (default: as many as torch has)")
    command.add_argument("--smoke", action="store_true", help="very small, few rounds: does it run?")


def _add_grid(command: argparse.ArgumentParser, name: str) -> None:
    grid = command.add_argument_group("what is measured")
    full = {device: FULL[device].get(name, {}) for device in FULL}
    known = {key for of_device in full.values() for key in of_device}

    def add(option: str, type: Any, about: str, **more: Any) -> None:
        shown = {}
        for device, of_device in full.items():
            if values := of_device.get(option.replace("-", "_")):
                words = ("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
                shown[device] = f"{device}: {' '.join(words)}"
        about += f" (default on {'; on '.join(shown.values())})"
        grid.add_argument(f"--{option}", type=type, nargs="+", help=about, **more)

    if "shapes" in known:
        about = f"T, d_in, d_out and R = the sum of the ranks, which are {RANK}"
        add("shapes", _shape, about, metavar="TxDxDxR")
        add("adapters", str, "dtypes of the adapters", choices=full["cuda"]["adapters"], metavar="DTYPE")
        add("passes", str, "which", choices=full["cuda"]["passes"], metavar="PASS")
    if "what" in known:
        add("what", str, "which", choices=full["cuda"]["what"], metavar="WHAT")
    if "timed" in known:
        add("timed", str, "in CUDA graphs, or called", choices=full["cuda"]["timed"], metavar="HOW")
    if "tokens" in known:
        add("tokens", _positive, "numbers of tokens", metavar="T")
        add("widths", _positive, "d_in = d_out", metavar="D")
    if "models" in known:
        add("models", str, "which", choices=[model for of in full.values() for model in of.get("models", ())])
    if "batch" in known:
        grid.add_argument("--batch", type=_pair, metavar="BxS", help="sequences and their tokens (default: 2x256)")
    if "mixtures" in known:
        about = "N experts of rank R"
        if name == "layers":
            about += "; the first has all peers"
        add("mixtures", _pair, about, metavar="NxR")
    if "top_k" in known:
        add("top-k", _positive, "experts for each token", metavar="K")
    if "experts" in known:
        add("experts", _positive, "numbers of experts", metavar="N")
    if "peers" in known:
        always = "base and moelora" if name == "layers" else "moelora"
        add("peers", str, f"which, besides {always}", choices=full["cuda"]["peers"], metavar="PEER")
    if "dtype" in known:
        about = "of x and adapters" if name == "layers" else "which"
        add("dtype", str, about, choices=full["cpu"]["dtype"], metavar="DTYPE")
    if name == "layers":
        grid.add_argument(
            "--isa", nargs="+", metavar="ISA", help="of moelora on a CPU (default: the best one, and AVX2)"
        )


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def _pair(text: str) -> tuple[int, ...]:
    return _product(text, "two", 2)


def _shape(text: str) -> tuple[int, ...]:
    shape = _product(text, "four", 4)
    if shape[3] % RANK:
        raise argparse.ArgumentTypeError(f"the last must be a multiple of {RANK}, the rank of an expert, got {text!r}")
    return shape


def _product(text: str, said: str, n: int) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != n or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be {said} positive integers with x between them, got {text!r}")
    return tuple(map(int, parts))
