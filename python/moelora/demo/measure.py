"""What one batch costs in each way of mixing experts, and how far the results of the ways lie apart."""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from moelora.demo.baselines import n_passes, router_weights, two_passes
from moelora.validate.reference import AdapterLoop

ROUNDS = 5


class Way(NamedTuple):
    """One way to run a mixture (or a single adapter): its model, and ``run(input_ids, labels)``.

    `run` gives the loss, or the logits [B, S, V] where labels are None.
    """

    model: nn.Module
    run: Callable[[Tensor, Tensor | None], Tensor]


def ways(single: PeftModel, stock: PeftModel, looped: PeftModel, mixture: PeftModel) -> dict[str, Way]:
    """The four ways that are compared.

    Parameters
    ----------
    single : PeftModel
        Stock PEFT with one adapter.
    stock, looped : PeftModel
        Stock PEFT with N adapters, for the old N passes and for the two-pass loop; `looped` is changed to loop.
    mixture : PeftModel
        Made by moelora, with N adapters and a per-layer router, which the two older ways use as well.
    """
    router: Any = mixture.base_model.router
    embeddings: Any = stock.get_input_embeddings()
    loop = AdapterLoop(looped)

    def plain(model: PeftModel, input_ids: Tensor, labels: Tensor | None) -> Tensor:
        outputs = model(input_ids=input_ids, labels=labels, use_cache=False)
        result: Tensor = outputs.logits if labels is None else outputs.loss
        return result

    def old(input_ids: Tensor, labels: Tensor | None) -> Tensor:
        # The first gate reads the token embeddings, so the old way gets its weights without a further pass.
        return n_passes(stock, router(embeddings(input_ids), layer=0), input_ids, labels)

    return {
        "n_passes": Way(stock, old),
        "two_passes": Way(looped, lambda input_ids, labels: two_passes(loop, looped, router, input_ids, labels)),
        "one_lora": Way(single, lambda input_ids, labels: plain(single, input_ids, labels)),
        "moelora": Way(mixture, lambda input_ids, labels: plain(mixture, input_ids, labels)),
    }


def cost(compared: Mapping[str, Way], input_ids: Tensor) -> dict[str, dict[str, float]]:
    """Time and memory of each way on one batch, measured in turns.

    A train step is forward, loss, backward and AdamW; a forward is without gradient. Times are medians over `ROUNDS`
    rounds; the order of the ways is reversed in every other round. Memory is the peak of what torch allocates during
    the step above what was allocated before it; what kernels allocate for themselves during a call is not seen.

    Returns
    -------
    dict
        For each way ``train_ms``, ``forward_ms``, ``train_mib`` and ``forward_mib``.
    """

    steps: dict[str, dict[str, Callable[[], None]]] = {}
    for name, way in compared.items():
        way.model.train()
        steps[name] = {
            "train": partial(_train_step, way, _adamw(way.model), input_ids),
            "forward": partial(_forward, way, input_ids),
        }
        for work in steps[name].values():
            work()

    seconds: dict[str, dict[str, list[float]]] = {name: {"train": [], "forward": []} for name in compared}
    for number in range(ROUNDS):
        for name in list(compared)[:: 1 if number % 2 == 0 else -1]:
            for kind, work in steps[name].items():
                seconds[name][kind].append(_seconds(work, input_ids.device))

    result: dict[str, dict[str, float]] = {}
    for name, way in compared.items():
        way.model.zero_grad()  # so that the step makes its gradients anew
        result[name] = {f"{kind}_ms": 1e3 * statistics.median(times) for kind, times in seconds[name].items()}
        result[name] |= {
            f"{kind}_mib": _peak_bytes(work, input_ids.device) / 2**20 for kind, work in steps[name].items()
        }
    return result


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def _train_step(way: Way, optimizer: torch.optim.Optimizer, input_ids: Tensor) -> None:
    optimizer.zero_grad()
    way.run(input_ids, input_ids).backward()
    optimizer.step()


def _forward(way: Way, input_ids: Tensor) -> None:
    with torch.no_grad():
        way.run(input_ids, None)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Peak of torch's allocations during `work`, above what was allocated before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        work()
    events: Any = profile.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        allocated += change.nbytes()
        peak = max(peak, allocated)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 away: torch's profiler writes a line there whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def differences(stock: PeftModel, mixture: PeftModel, input_ids: Tensor) -> dict[str, dict[str, float]]:
    """How far moelora's results lie from those of the older ways, on the same adapters and the same weights.

    Parameters
    ----------
    stock : PeftModel
        Stock PEFT with N adapters.
    mixture : PeftModel
        Made by moelora, with the same adapters and a per-layer router; its weights are those for `input_ids`.
    input_ids : Tensor [B, S]

    Returns
    -------
    dict
        ``forward`` and ``gradients``: mixing at each layer, against the PEFT-style loop. ``logits``:
        ``mixture="logits"`` against the old N passes. Each with ``absolute``, the largest difference, and ``relative``,
        the largest quotient of a tensor's largest difference and its largest value; ``gradients`` covers each A, each B
        and the weights.
    """
    mixture.eval()
    stock.eval()
    router: Any = mixture.base_model.router
    with torch.no_grad():
        states = mixture(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
        per_layer = router_weights(router, states)

    ours = per_layer.clone().requires_grad_()
    outputs = mixture(input_ids=input_ids, labels=input_ids, routing_weights=ours, use_cache=False)
    loop = AdapterLoop(stock)
    loop.weights = theirs = per_layer.clone().requires_grad_()
    expected = stock(input_ids=input_ids, labels=input_ids, use_cache=False)
    our_gradients = _gradients(outputs.loss, mixture, ours)
    their_gradients = _gradients(expected.loss, stock, theirs)
    loop.remove()

    with torch.no_grad():
        weights = per_layer[:, :, 0]
        batched = mixture(input_ids=input_ids, routing_weights=weights, mixture="logits", use_cache=False).logits
        old = n_passes(stock, weights, input_ids, None)
    return {
        "forward": _difference({"logits": outputs.logits}, {"logits": expected.logits}),
        "gradients": _difference(our_gradients, their_gradients),
        "logits": _difference({"logits": batched}, {"logits": old}),
    }


def _gradients(loss: Tensor, model: nn.Module, weights: Tensor) -> dict[str, Tensor]:
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found = torch.autograd.grad(loss, [*adapters.values(), weights])
    return dict(zip([*adapters, "routing_weights"], found, strict=True))


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"the two models differ in {sorted(ours.keys() ^ theirs.keys())}")
    absolute = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    scale = {name: theirs[name].abs().max().item() for name in ours}
    return {
        "absolute": max(absolute.values()),
        "relative": max(absolute[name] / scale[name] if scale[name] else absolute[name] for name in ours),
    }
