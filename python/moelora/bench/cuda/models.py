"""Whole language models on a GPU, with random weights in the shapes of Gemma 2B, Llama 3 8B and Qwen3 4B.

The base is bfloat16, adapters float32 as PEFT makes them, of rank 16. The peers are those of `moelora.bench.models`:
stacked computes in bfloat16, stock PEFT's layers and the loop compute in float32, as they do without autocast, and the
compiled ones have each decoder layer through `torch.compile`.

A forward is without gradients, in evaluation mode, and besides called ("calls") also replayed as a CUDA graph
("graph"), which leaves the host's time out; a train step is forward, loss, backward and AdamW, fused. Peak memory is
what torch allocates beyond what it held before, which is parameters and AdamW's moments. A peer that needs more than
there is has a row without times, with peak "oom".

Before they are timed, the logits of the peers that compute the same are compared: "off" is the distance from moelora's
over the length of those, which rounding in as many layers makes.
"""

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.linalg import vector_norm
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    masking_utils,
)

from moelora.bench.arguments import RANK
from moelora.bench.cuda import clock
from moelora.bench.cuda.layers import SELDOM
from moelora.bench.models import COMPILED, DROPOUT, Peer, peers
from moelora.bench.record import columns
from moelora.bench.work import CAN_COMPILE
from moelora.peft.anatomy import decoder
from moelora.report.timing import interleave, quartiles

DROPPED = ("gemma-2b", 4)  # where moelora and one_lora have dropout, too
SAME = ("loop", "stacked", "stacked_compiled", "moelora_compiled")  # the same function as moelora
OFF = 0.1  # at most; bfloat16 has 8 bits
GRAPHS = ("moelora", "base", "one_lora", "stacked", "moelora_router", "loop", *COMPILED)


class Shape(NamedTuple):
    """A model, the layers that are adapted, and on which batches [B, S] with how many experts."""

    config: type[PretrainedConfig]
    size: Mapping[str, Any]
    targets: str | list[str]
    cells: Sequence[tuple[int, tuple[int, int]]]


SHAPES = {
    "gemma-2b": Shape(
        GemmaConfig,
        {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "vocab_size": 256000}
        | {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256},
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        [(4, (4, 512)), (8, (8, 512))],
    ),
    "llama-8b": Shape(
        LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
        "all-linear",
        [(8, (4, 512))],
    ),
    "qwen3-4b": Shape(
        Qwen3Config,
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        "all-linear",
        [(4, (4, 512))],
    ),
}
SMOKE: Mapping[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 256}


def build(name: str, *, smoke: bool, device: str = "cuda", **size: int) -> PreTrainedModel:
    """A model of random bfloat16 weights; with `smoke` next to none. `size` are other values of its config."""
    shape = SHAPES[name]
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = shape.config(**{**shape.size, **ends, **(SMOKE if smoke else {}), **size})
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
    return model


def whole_rows() -> AbstractContextManager[object]:
    """Context in which transformers takes each row of ids for one sequence without padding, without asking the GPU.

    In a capture it can't ask, and would mask the attention, which then takes another kernel.
    """
    return patch.multiple(
        masking_utils,
        find_packed_sequence_indices=lambda *_, **__: None,
        _ignore_causal_mask_sdpa=lambda *_, **__: True,
    )


def compile_layers(model: nn.Module) -> nn.Module:
    """Compile each decoder layer, so that one compilation serves them all; returns the model."""
    _, layers = decoder(model)
    for layer in layers:
        layer.compile()
    return model


class Grid(NamedTuple):
    """Which models, each with its own batches for N experts, and which peers."""

    models: Sequence[str]
    experts: Sequence[int]
    peers: Sequence[str]
    smoke: bool


def measure(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``models.csv``."""
    # Peers take turns with very different tensors.
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield from _models(grid, rounds)


def _models(grid: Grid, rounds: int) -> Iterator[dict[str, Any]]:
    for name in grid.models:
        base, shape = build(name, smoke=grid.smoke), SHAPES[name]
        for n, batch in shape.cells:
            if n not in grid.experts:
                continue
            B, S = (1, 64) if grid.smoke else batch
            ids = torch.randint(base.config.vocab_size, (B, S), device="cuda")
            weights = torch.rand(B, S, n, device="cuda").softmax(-1)
            call = (base, n, RANK, ids, weights)
            with torch.device("cuda"):
                ways = peers(
                    *call,
                    targets=shape.targets,
                    compiled=compile_layers if CAN_COMPILE else None,
                    only={"moelora", *grid.peers},
                )
                dropped = {}
                if (name, n) == DROPPED:
                    both = {"moelora", "one_lora"} & {*ways}
                    dropped = peers(*call, targets=shape.targets, only=both, p=DROPOUT)
            off = _compared(ways)
            about = {"model": name, "B": B, "S": S, "N": n, "r": RANK, "dtype": "bfloat16"}
            of = {(way, 0.0): peer for way, peer in ways.items()}
            for row in _rows(of, "forward", ids, rounds, about):
                yield {**row, "off": off.get(row["peer"], "")}
            steps = of | {(way, DROPOUT): peer for way, peer in dropped.items()}
            rows = itertools.chain(_rows(steps, "train step", ids, rounds, about), _graphs(ways, rounds, about))
            yield from ({**row, "off": ""} for row in rows)
            del of, steps, ways, dropped
            _release()
        del base
        _release()


@torch.no_grad()
def _compared(of: Mapping[str, Peer]) -> dict[str, str]:
    """How far the logits of those that compute the same are from moelora's, over the length of these."""
    ours, off = _logits(of["moelora"]), {}
    for name in (name for name in SAME if name in of):
        far = float(vector_norm(_logits(of[name]) - ours, dtype=torch.float32) / vector_norm(ours, dtype=torch.float32))
        if not far <= OFF:
            raise RuntimeError(f"{name} computes something else than moelora: {far:.3g} of its logits' length")
        off[name] = f"{far:.2g}"
    return off


def _logits(peer: Peer) -> Tensor:
    peer.model.eval()
    return peer.compute(None)


def _rows(
    of: Mapping[tuple[str, float], Peer], what: str, ids: Tensor, rounds: int, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    calls: dict[tuple[str, float], Callable[[], None]] = {}
    peaks = {}
    for place, peer in of.items():
        peer.model.train(what == "train step")
        run = partial(_whole, peer.forward if what == "forward" else partial(peer.step, ids))
        peaks[place] = _peak_mib(peer, run)
        if peaks[place] != "oom":
            calls[place] = run
    every = {f"{name} {p}": SELDOM[name] for name, p in calls if name in SELDOM}
    seconds = interleave({f"{name} {p}": run for (name, p), run in calls.items()}, rounds, every=every)
    ours = seconds.get("moelora 0.0")
    for (name, p), peak in peaks.items():
        row = _row("calls", name, p, seconds.get(f"{name} {p}"), ours)
        yield {**about, "what": what, **row, "peak_mib": peak}


def _graphs(of: Mapping[str, Peer], rounds: int, about: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Forwards in CUDA graphs, but for those of several passes."""
    graphs = {}
    for name in (name for name in of if name in GRAPHS):
        of[name].model.eval()
        graphs[name] = [of[name].forward]
    with torch.cuda.stream(torch.cuda.Stream()), whole_rows():
        seconds = clock.in_graphs(graphs, rounds, every=SELDOM)
    for name, values in seconds.items():
        row = _row("graph", name, 0.0, values, seconds["moelora"])
        yield {**about, "what": "forward", **row, "peak_mib": ""}


def _row(timed: str, name: str, p: float, seconds: list[float] | None, ours: list[float] | None) -> dict[str, Any]:
    """Without times if there was no memory."""
    times = columns(seconds, "ms") if seconds else dict.fromkeys(columns([0.0], "ms"), "")
    over = f"{quartiles(seconds)[1] / quartiles(ours)[1]:.3f}" if seconds and ours else ""
    return {"p": p, "timed": timed, "peer": name, **times, "over_moelora": over, "rounds": len(seconds or ())}


def _whole(call: Callable[[], None]) -> None:
    call()
    torch.cuda.synchronize()


def _peak_mib(peer: Peer, call: Callable[[], None]) -> str:
    """Of a call that is not the first one; "oom" if there is not as much."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            call()
        except torch.OutOfMemoryError:
            peer.clear()
            break
    else:
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"
    _release()  # once the error, and what its frames hold, is gone
    return "oom"


def _release() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
