"""The parts of a training step that are timed apart, made from what computes an output."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelora.report.timing import interleave

CALL = 1e-3  # seconds for which short calls are repeated
CAN_COMPILE = shutil.which(os.environ.get("CXX", "g++")) is not None  # which is what torch.compile needs on a CPU


class Peer(NamedTuple):
    """One way to compute an output, or several; what comes in, and what it has of its own, frozen or not."""

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    inputs: Sequence[Tensor]
    parameters: Sequence[Tensor]


def timed(
    peers: Mapping[str, Peer],
    which: str,
    rounds: int,
    *,
    between: Callable[[], object] | None = None,
    every: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one pass by each peer, interleaved.

    Parameters
    ----------
    peers : mapping of Peer
    which : str
        "forward": without gradients. "forward_grad": with what is kept for a backward. "backward": of a forward that is
        not counted. "forward+backward". The gradients are dropped afterwards, as a training step does.
    rounds : int
    between : callable, optional
        Runs, untimed, before each single call.
    every : mapping of int, optional
        See `interleave`.
    """
    passes = {name: part(peer, which) for name, peer in peers.items()}
    before = {name: prepare for name, (_, prepare) in passes.items() if prepare is not None}
    if between is not None:
        before = dict.fromkeys(peers, between)
    with torch.set_grad_enabled(which != "forward"):  # once: in each call it would count as the peer's time
        return interleave(
            {name: call for name, (call, _) in passes.items()}, rounds, least=CALL, before=before, every=every
        )


def part(peer: Peer, which: str) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """What is timed in one of the passes of `timed`, and what runs before it."""
    forward, leaves = peer.forward, [*peer.inputs, *peer.parameters]

    if which in ("forward", "forward_grad"):
        return forward, None
    outputs = [forward()]
    made = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
    seeds = [torch.randn_like(y) for y in made]
    del made  # and with it the graph, once it has gone backward

    def backward() -> None:
        torch.autograd.backward(outputs.pop(), seeds)
        for leaf in leaves:
            leaf.grad = None

    backward()
    if which == "backward":
        return backward, lambda: outputs.append(forward())

    def both() -> None:
        outputs.append(forward())
        backward()

    return both, None


def returned(peer: Peer, which: str) -> Callable[[], object]:
    """One of two passes, whose gradients are returned: a leaf's own would be written on the stream it was made on."""
    if which == "forward":
        return peer.forward
    leaves = [*peer.inputs, *peer.parameters]

    def outputs() -> tuple[Tensor, ...]:
        made = peer.forward()
        return made if isinstance(made, tuple) else (made,)

    seeds = [torch.randn_like(y) for y in outputs()]
    return lambda: torch.autograd.grad(outputs(), leaves, seeds)
