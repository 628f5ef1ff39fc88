"""Time and memory of one pass and of N."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor

from moelora.report.timing import interleave, peak_bytes, quartiles
from moelora.validate.checks import Check, Models, at_most
from moelora.validate.reference import n_passes, twin

MEMORY = 1.10  # of one stock adapter as large as all experts together
SHORT = 20e-3  # seconds: a step below this is mostly Python and noise
SMALL = 64 * 2**20  # bytes: a peak below this is mostly the allocator


def check_cost(models: Models, rounds: int, report: dict[str, Any]) -> list[Check]:
    """Measure into ``report["cost"]``, and judge."""
    report["cost"] = measure(models, rounds)
    return judge(report["cost"], len(models.experts))


def measure(models: Models, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure the old way, one pass and one stock adapter, in turns.

    A training step is forward, loss and backward, in training mode; the optimizer's part is the same for all. A forward
    keeps no graph.

    Returns
    -------
    dict
        For "n_passes", "moelora" and "one_lora": quartiles ``train_seconds`` and ``forward_seconds``, and
        ``train_peak_bytes``, the growth of the process's memory, None where the system does not tell it.
    """
    routed, stock, single = models.routed, models.stock, _one_adapter(models)
    inputs, w = models.inputs, models.weights
    runs: dict[str, Callable[[], Tensor]] = {
        "n_passes": lambda: n_passes(stock, w, **inputs),
        "moelora": lambda: routed(**inputs, routing_weights=w).logits,
        "one_lora": lambda: single(**inputs).logits,
    }
    tuned = {"n_passes": stock, "moelora": routed, "one_lora": single}
    for name in routed.base_model.frozen_experts:
        routed.base_model.unfreeze_expert(name)  # as they were saved; the old way trains all of them, too
    for model in tuned.values():
        model.base_model.set_adapter(list(model.active_adapters))  # trainable
        model.train()
    labels = inputs["input_ids"]
    steps = {name: partial(_train_step, tuned[name], run, labels) for name, run in runs.items()}
    seconds = interleave(steps, rounds)
    forwards = interleave({name: partial(_forward, run) for name, run in runs.items()}, rounds)
    result: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        try:
            peak = peak_bytes(step)
        except OSError:  # no /proc
            peak = None
        result[name] = {
            "train_seconds": quartiles(seconds[name]),
            "forward_seconds": quartiles(forwards[name]),
            "train_peak_bytes": peak,
        }
    for model in tuned.values():
        model.eval()
    return result


def _one_adapter(models: Models) -> Any:
    """Stock PEFT with one adapter on the layers of the first expert, as large as all experts together."""
    config: Any = copy.deepcopy(models.stock.peft_config[models.experts[0]])
    config.r = sum(models.stock.peft_config[name].r for name in models.experts)
    config.rank_pattern = {layer: len(models.experts) * r for layer, r in config.rank_pattern.items()}
    config.inference_mode = False
    return peft.get_peft_model(twin(models.base), config)


def _train_step(model: Any, run: Callable[[], Tensor], labels: Tensor) -> None:
    top = model.get_base_model()
    logits = run()
    top.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1]).backward()
    model.zero_grad()


def _forward(run: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        run()


def judge(measured: dict[str, dict[str, Any]], n: int) -> list[Check]:
    """The promises: N / 2 times as fast as N passes, and the memory of one adapter.

    Parameters
    ----------
    measured : dict
        What `measure` returns.
    n : int
        Number of experts.
    """
    old, new, one = (measured[name] for name in ("n_passes", "moelora", "one_lora"))
    checks = []
    for work, promise in (
        ("train", f"time of a training step, as a share of that of {n} passes"),
        ("forward", f"time of a forward, as a share of that of {n} passes"),
    ):
        before, now = old[f"{work}_seconds"][1], new[f"{work}_seconds"][1]
        note = f"{before / now:.2f} times as fast"
        if work == "forward":
            checks.append(Check("cost", promise, now / before, None, None, note))
        elif now < SHORT:
            note += f"; not judged: a step of {1e3 * now:.1f} ms is too short, raise --batch and --tokens"
            checks.append(Check("cost", promise, now / before, 2 / n, None, note))
        else:
            checks.append(at_most("cost", promise, now / before, 2 / n, note))
    promise = "peak memory of a training step, as a share of that of one stock adapter"
    size = "the adapter has the rank of all experts together"
    ours, theirs = new["train_peak_bytes"], one["train_peak_bytes"]
    if ours is None or theirs is None:
        checks.append(Check("cost", promise, None, MEMORY, None, "not judged: the system does not tell it"))
    elif theirs < SMALL:
        share = ours / theirs if theirs > 0 else None
        note = f"{size}; not judged: {theirs / 2**20:.0f} MiB is too little, raise --batch and --tokens"
        checks.append(Check("cost", promise, share, MEMORY, None, note))
    else:
        checks.append(at_most("cost", promise, ours / theirs, MEMORY, size))
    return checks
