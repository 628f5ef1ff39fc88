"""The command `moelora`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moelora import __version__
from moelora.bench.arguments import add_arguments
from moelora.report.table import as_text

DEMO = """\
Train a small language model on text that comes with Python, then four LoRA experts and a router over it in one pass per
step, and compare: perplexity per domain, who routes what, time and memory, and the results of the older ways.
Takes one to two minutes on two CPU cores and needs no network.
"""


CONVERT = """\
Write a checkpoint as the folder of a mixture that moelora.PeftModel.from_pretrained opens. It may be DyLoRA-MoE's
folders, its older .pt files (read without executing anything of them), or folders of PEFT called expert_<int>.
"""


INSPECT = """\
Print what the folder of a mixture holds, and whether it is whole: experts, router, configuration, sizes, hashes.
Changes nothing. The exit status is 1 if something is wrong.
"""


RUN = """\
Run a Python program as "python script.py arguments" or "python -m module arguments" does, with moelora.patch_peft() in
force: the models that it makes with PEFT are routed. So are those of the processes that it starts through
multiprocessing. What follows the name of the script or module is the program's own.
"""

VALIDATE = """\
Prove on a checkpoint that one pass does what N passes of stock PEFT did: outputs, gradients, time, memory and
compatibility with PEFT, each with what was measured and what is allowed. Everything is computed in float32 on the CPU.
"""


BENCH = """\
Measure what a routed layer, whole models and single calls cost on this CPU or a GPU, against stacked torch, loops over
adapters, one stock LoRA and the base alone: in one process, in turns, as CSV files and plots.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name. Default: those of the process.

    Returns
    -------
    int
        Exit status: 0; or 1 if a package is missing, or a command says that something is wrong. Wrong arguments leave
        through ``SystemExit(2)``, as argparse has it, and a program that ``moelora run`` has run may leave through a
        ``SystemExit`` of its own.
    """
    parser = argparse.ArgumentParser(prog="moelora", description="A mixture of LoRA experts in one pass.")
    parser.add_argument("--version", action="version", version=f"moelora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_run(commands)
    _add_convert(commands)
    _add_inspect(commands)
    _add_validate(commands)
    _add_bench(commands)

    given = list(sys.argv[1:] if arguments is None else arguments)
    own = len(given)
    if given[:1] == ["run"]:  # what follows the program is not for argparse
        own = 3 if given[1:2] == ["-m"] else 2
    options = parser.parse_args(given[:own])
    options.rest = given[own:]
    options.given = given
    try:
        status: int = options.act(options)
        sys.stdout.flush()
    except BrokenPipeError:
        if options.command == "run":  # the program's own
            raise
        # Who reads the output has enough of it, as `head` does. What is left must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if options.command == "run" or error.filename is None:
            raise
        parser.error(str(error))
    return status


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="train and measure a small mixture on this machine", description=DEMO)
    demo.add_argument("--out", type=Path, default=Path("moelora-demo"), help="folder to write (default: %(default)s)")
    demo.add_argument("--experts", type=int, default=4, help="number of experts, at least 2 (default: %(default)s)")
    demo.add_argument("--top-k", type=int, default=2, help="experts for each token (default: %(default)s)")
    demo.add_argument(
        "--steps", type=int, default=250, help="training steps; the base takes twice as many (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    demo.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    demo.set_defaults(act=partial(_demo, demo))


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run a program with PEFT patched",
        description=RUN,
        usage="moelora run [-h] (SCRIPT | -m MODULE) [arguments ...]",
    )
    run.add_argument("-m", dest="as_module", action="store_true", help="run a module, as python -m does")
    run.add_argument("program", metavar="SCRIPT", help="file to run, or with -m the name of a module")
    run.set_defaults(act=partial(_run, run))


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert", help="bring a checkpoint into the folder of a mixture", description=CONVERT
    )
    convert.add_argument("source", metavar="SOURCE", type=Path, help="folder to read")
    convert.add_argument("target", metavar="TARGET", type=Path, help="folder to write, new or empty")
    beside = convert.add_argument_group("for .pt files without adapter_config.json beside them")
    beside.add_argument("--lora-alpha", type=float, help="must be given: the tensors don't tell it")
    beside.add_argument("--base-model", help="name or path of the base model")
    beside.add_argument("--task-type", help="of PEFT (default: CAUSAL_LM)")
    convert.set_defaults(act=_convert)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="print what the folder of a mixture holds", description=INSPECT)
    inspect.add_argument("folder", metavar="DIR", type=Path, help="folder to read")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(act=_inspect)


def _add_validate(commands: Any) -> None:
    validate = commands.add_parser("validate", help="check a checkpoint against stock PEFT", description=VALIDATE)
    validate.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder of a mixture")
    validate.add_argument("--model", metavar="M", help="base model (default: what the first expert names)")
    validate.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help='text, or JSON lines (.jsonl, .json) with "input_ids" (default: random token ids)',
    )
    validate.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    validate.add_argument("--batch", type=int, default=2, help="sequences (default: %(default)s)")
    validate.add_argument("--tokens", type=int, default=64, help="tokens of a sequence, at most (default: %(default)s)")
    validate.add_argument("--rounds", type=int, default=5, help="timings of each kind (default: %(default)s)")
    validate.add_argument("--seed", type=int, default=0, help="of token ids and weights (default: %(default)s)")
    validate.add_argument("--no-speed", action="store_true", help="leave time and memory out")
    validate.set_defaults(act=partial(_validate, validate))


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure against the other ways on this machine", description=BENCH)
    add_arguments(bench)
    bench.set_defaults(act=_bench)


def _bench(options: argparse.Namespace) -> int:
    try:
        from moelora.bench.run import run
    except ModuleNotFoundError as error:
        return _without_extra("bench", error)
    return run(options, options.given)


def _convert(options: argparse.Namespace) -> int:
    try:
        from moelora.peft.convert import convert_checkpoint
    except ModuleNotFoundError as error:
        return _without_extra("convert", error)
    given = {"base_model": options.base_model, "lora_alpha": options.lora_alpha, "task_type": options.task_type}
    try:
        experts = convert_checkpoint(options.source, options.target, **given)
    except (ValueError, OSError) as error:
        print(f"moelora convert: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {', '.join(experts)} to {options.target}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    try:
        from moelora.peft.inspection import as_text as text_of
        from moelora.peft.inspection import inspect_checkpoint
    except ModuleNotFoundError as error:
        return _without_extra("inspect", error)
    report = inspect_checkpoint(options.folder)
    print(json.dumps(report, indent=2) if options.json else text_of(report))
    return 1 if report["problems"] else 0


def _validate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    for name in ("batch", "tokens", "rounds"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"argument --seed: must lie in [0, 2**32), got {options.seed}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"argument --json: {options.json.parent} is not a folder")
    if options.json is not None and options.json.is_dir():
        parser.error(f"argument --json: {options.json} is a folder")
    try:
        from moelora.validate.report import as_text as validation_as_text
        from moelora.validate.run import Settings, validate
    except ModuleNotFoundError as error:
        return _without_extra("validate", error)
    settings = Settings(
        options.checkpoint,
        options.model,
        options.data,
        options.batch,
        options.tokens,
        options.seed,
        options.rounds,
        not options.no_speed,
    )
    try:
        report = validate(settings)
    except ValueError as error:
        parser.error(str(error))
    print(validation_as_text(report))
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            parser.error(f"argument --json: {error}")
    return 0 if report["holds"] else 1


def _without_extra(command: str, error: ModuleNotFoundError) -> int:
    """Say which package of the extra is missing; an own module that is missing is a fault of ours."""
    if error.name is None or error.name.startswith("moelora"):
        raise error
    print(f'moelora {command}: {error.name} is not installed: pip install "moelora[hf]"', file=sys.stderr)
    return 1


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from moelora.launch import run_module, run_script

    try:
        (run_module if options.as_module else run_script)(options.program, options.rest)
    except (OSError, ImportError) as error:
        parser.error(str(error))
    return 0


def _demo(demo: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    started = time.perf_counter()
    if options.experts < 2:
        demo.error(f"argument --experts: must be at least 2, got {options.experts}")
    if not 1 <= options.top_k <= options.experts:
        demo.error(f"argument --top-k: must lie in [1, {options.experts}], got {options.top_k}")
    if options.steps < 1:
        demo.error(f"argument --steps: must be at least 1, got {options.steps}")
    if not 0 <= options.seed < 2**32:
        demo.error(f"argument --seed: must lie in [0, 2**32), got {options.seed}")
    if options.out.exists() and not (options.out / "report.json").is_file():
        if not options.out.is_dir():
            demo.error(f"argument --out: {options.out} is not a folder")
        if any(options.out.iterdir()):
            demo.error(f"argument --out: {options.out} has files, but no report.json of an earlier demo")
    for folder in (options.out / "base", options.out / "checkpoint"):
        if folder.exists() and not folder.is_dir():
            demo.error(f"argument --out: {folder} is not a folder, and the demo writes one there")

    try:
        from moelora.demo.run import Settings, device_error, run
    except ModuleNotFoundError as error:
        return _without_extra("demo", error)
    if problem := device_error(options.device):
        demo.error(f"argument --device: {problem}")

    settings = Settings(options.out, options.experts, options.top_k, options.steps, options.seed, options.device)
    report = run(settings)
    print(f"\n{as_text(report)}\n")
    try:
        from moelora.report.plots import draw
    except ModuleNotFoundError as error:
        print(f'No pictures, {error.name} is not installed: pip install "moelora[plots]"')
    else:
        draw(options.out / "report.json")
    print(f"Wrote {', '.join(sorted(path.name for path in options.out.iterdir()))} to {options.out}")
    print(f"Took {time.perf_counter() - started:.0f} s")
    return 0
