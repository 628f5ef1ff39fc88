"""Whole small language models on a CPU: moelora against the old N passes, the two-pass loop and one stock LoRA.

    python benchmarks/models/run.py --out benchmarks/results/models_cpu_f32.csv

A Llama and a GPT-2 of random parameters (`small.py`), all linear layers adapted with rank r, float32, batches of B x S
tokens.

    one_lora         stock PEFT, one adapter of rank r
    n_passes         the whole model once for each expert, logits mixed by given weights [B, S, N]
    two_pass         a first pass for the router, then a PEFT-style Python loop over the adapters in each layer
    moelora          one pass with given weights [B, S, N]
    moelora_router   one pass with the default router, one gate per decoder layer
    moelora_release  the same model after `release`: stock PEFT's plain sum of N adapters

A train step is forward, loss, backward and AdamW; peak memory is that of the process beyond what it held before.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from harness import columns, interleave, peak_bytes, quartiles, write_csv  # noqa: E402
from small import NAMES, build  # noqa: E402

import moelora  # noqa: E402
from moelora.demo.baselines import add_experts, n_passes, two_passes  # noqa: E402
from moelora.validate.reference import AdapterLoop  # noqa: E402


class Peer:
    """A model, what is trained of it, and how it turns a batch into a loss or logits."""

    def __init__(
        self, model: nn.Module, forward: Callable[[Tensor | None], Tensor], more: nn.Module | None = None
    ) -> None:
        parameters = [p for m in (model, more) if m is not None for p in m.parameters() if p.requires_grad]
        self.model, self.compute = model, forward
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def forward(self) -> None:
        with torch.no_grad():
            self.compute(None)

    def train(self, labels: Tensor) -> None:
        self.compute(labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peers(base: nn.Module, n: int, r: int, ids: Tensor) -> dict[str, Peer]:
    names = [f"expert_{i}" for i in range(n)]
    plain = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    weights = torch.rand(*ids.shape, n).softmax(-1)

    def result(outputs: Any, labels: Tensor | None) -> Tensor:
        return outputs.logits if labels is None else outputs.loss

    def stock(experts: int) -> peft.PeftModel:
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**plain), adapter_name=names[0])
        add_experts(model, names[:experts])
        return model

    def routed() -> Any:
        config = moelora.MoELoraConfig(**plain, num_experts=n, top_k_experts=n, router_aux_loss_coef=0.0)
        return moelora.get_peft_model(copy.deepcopy(base), config)

    one, old, looped, given, released, with_router = stock(1), stock(n), stock(n), routed(), routed(), routed()
    loop, router = AdapterLoop(looped), copy.deepcopy(with_router.base_model.router)
    given.base_model.detach_router()
    moelora.release(released)
    return {
        "moelora": Peer(
            given, lambda labels: result(given(ids, labels=labels, routing_weights=weights, use_cache=False), labels)
        ),
        "moelora_router": Peer(
            with_router, lambda labels: result(with_router(ids, labels=labels, use_cache=False), labels)
        ),
        "one_lora": Peer(one, lambda labels: result(one(ids, labels=labels, use_cache=False), labels)),
        "two_pass": Peer(looped, lambda labels: two_passes(loop, looped, router, ids, labels), router),
        "n_passes": Peer(old, lambda labels: n_passes(old, weights, ids, labels)),
        "moelora_release": Peer(released, lambda labels: result(released(ids, labels=labels, use_cache=False), labels)),
    }


def measure(
    models: Iterable[str], cells: list[tuple[int, int, int, int]], rounds: int, *, smoke: bool
) -> Iterator[dict[str, Any]]:
    for model, (batch, seq, n, r), what in itertools.product(models, cells, ("forward", "train step")):
        base = build(model, smoke=smoke)
        torch.manual_seed(0)
        ids = torch.randint(base.config.vocab_size, (batch, seq))
        of = peers(base, n, r, ids)
        calls = {name: peer.forward if what == "forward" else partial(peer.train, ids) for name, peer in of.items()}
        times = interleave(calls, rounds)
        median = {name: quartiles(seconds)[1] for name, seconds in times.items()}
        peaks = {name: peak_bytes(call) for name, call in calls.items()}
        for name, seconds in times.items():
            yield {
                "model": model,
                "B": batch,
                "S": seq,
                "N": n,
                "r": r,
                "what": what,
                "peer": name,
                **columns(seconds, "ms"),
                "over_moelora": f"{median[name] / median['moelora']:.3f}",
                "peak_mib": f"{peaks[name] / 2**20:.1f}",
                "rounds": rounds,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--experts", type=int, nargs="+", default=(4, 8), help="N")
    parser.add_argument("--smoke", action="store_true", help="a very small model, two rounds: does it run?")
    args = parser.parse_args()
    cells = [(1, 16, 2, 4)] if args.smoke else [(2, 256, n, 16) for n in args.experts]
    write_csv(args.out, measure(args.models, cells, 2 if args.smoke else args.rounds, smoke=args.smoke))


if __name__ == "__main__":
    main()
