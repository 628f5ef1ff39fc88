"""Generation on a CPU with the KV cache: tokens per second with routed experts, against one stock LoRA.

    python benchmarks/generation/run.py --out benchmarks/results/generation_cpu_f32.csv

Greedy, a prompt of B x 32 tokens and 32 new ones, all linear layers adapted with rank r = 16, float32. The models are
those of moelora/bench/small.py; B = 1 is one token through the model at a time, nearly all of it memory traffic and
host time.

    base             the model without adapters
    one_lora         stock PEFT, one adapter of rank r
    stock_sum        stock PEFT, N active adapters, added up
    moelora          weights [B, S, N] for each token of the prompt, the last ones held for the new tokens
    moelora_router   the default router, one gate per decoder layer, on every new token
"""

from __future__ import annotations

import argparse
import copy
import itertools
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

import moelora
from moelora.bench.record import columns, write_csv
from moelora.bench.small import NAMES, build
from moelora.demo.baselines import add_experts
from moelora.report.timing import interleave, quartiles


def peers(base: PreTrainedModel, n: int, ids: Tensor, new: int) -> dict[str, Callable[[], object]]:
    names = [f"expert_{i}" for i in range(n)]
    plain = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    weights = torch.rand(*ids.shape, n).softmax(-1)

    def stock(experts: int) -> peft.PeftModel:
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**plain), adapter_name=names[0])
        add_experts(model, names[:experts])
        return model

    def calls(model: Any, **more: Any) -> Callable[[], object]:
        model.eval()
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **more)

    with_router = moelora.get_peft_model(copy.deepcopy(base), moelora.MoELoraConfig(**plain, num_experts=n))
    return {
        "moelora": calls(moelora.adopt(stock(n)), routing_weights=weights),
        "one_lora": calls(stock(1)),
        "moelora_router": calls(with_router),
        "stock_sum": calls(stock(n)),
        "base": calls(copy.deepcopy(base)),
    }


def measure(
    models: Iterable[str], cells: Iterable[tuple[int, int]], new: int, rounds: int, *, smoke: bool
) -> Iterator[dict[str, Any]]:
    for name, (batch, n) in itertools.product(models, cells):
        base = build(name, smoke=smoke)
        ids = torch.randint(1, base.config.vocab_size, (batch, 32))
        times = interleave(peers(base, n, ids, new), rounds)
        one_lora = quartiles(times["one_lora"])[1]
        for peer, seconds in times.items():
            median = quartiles(seconds)[1]
            yield {
                "model": name,
                "B": batch,
                "N": n,
                "r": 16,
                "new": new,
                "peer": peer,
                **columns(seconds, "ms"),
                "tokens_per_s": f"{batch * new / median:.1f}",
                "speed_over_one_lora": f"{one_lora / median:.3f}",
                "rounds": rounds,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--smoke", action="store_true", help="very small models, two rounds: does it run?")
    args = parser.parse_args()
    cells = [(1, 2)] if args.smoke else list(itertools.product((1, 4), (4, 8)))
    write_csv(
        args.out,
        measure(args.models, cells, 4 if args.smoke else 32, 2 if args.smoke else args.rounds, smoke=args.smoke),
        shlex.join(["python", *sys.argv]),
    )


if __name__ == "__main__":
    main()
