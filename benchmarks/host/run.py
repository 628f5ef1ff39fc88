"""Host time: what a call costs before any arithmetic counts, against stock PEFT with one LoRA.

    OMP_NUM_THREADS=1 python benchmarks/host/run.py --out benchmarks/results/host_cpu_f32.csv

Shapes are so small, and one thread so alone, that nothing but the work of Python and of the dispatchers is left.
`layer` is one `Linear` as the forward of its model calls it; `model` is a Llama of two layers with LoRA on q and v.
Peers: `one_lora` and `stock_n` are PEFT with one and with N active adapters, `static`, `per_token` and `router` are
moelora with weights [N], weights per token, and a gate in each decoder layer. With grad: forward, backward, and the
gradients cleared as a training step does. over_one_lora: median over that of `one_lora`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import columns, interleave, quartiles, write_csv  # noqa: E402

from moelora.peft import MoELoraConfig, adopt  # noqa: E402
from moelora.peft.frame import Entered, Frame  # noqa: E402

TOKENS, WIDTH, RANK = 8, 64, 8


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def with_lora(base: nn.Module, n: int, targets: list[str]) -> Any:
    config = LoraConfig(r=RANK, target_modules=targets)
    model = get_peft_model(base, config, adapter_name="expert_0")
    for i in range(1, n):
        model.add_adapter(f"expert_{i}", copy.deepcopy(config))
    model.base_model.set_adapter([f"expert_{i}" for i in range(n)])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def timed(call: Callable[[], Tensor], leaves: list[Tensor], grad: bool) -> Callable[[], None]:
    """A call whose result has as many numbers as tokens times width or vocabulary."""
    seed = torch.randn_like(call())

    def forward() -> None:
        with torch.no_grad():
            call()

    def step() -> None:
        call().backward(seed)
        for leaf in leaves:
            leaf.grad = None

    return step if grad else forward


def layers(n: int, grad: bool) -> dict[str, Callable[[], None]]:
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)

    def peer(model: Any, weights: Tensor | None = None) -> Callable[[], None]:
        layer, tuner = model.base_model.model.proj, model.base_model
        frame = None if weights is None else Frame(tuner._host, tuner.active_adapters, given=weights)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        with Entered(frame):
            run = timed(lambda: layer(x), leaves, grad)

        def inside() -> None:
            with Entered(frame):
                run()

        return inside if frame is not None else run

    def lora(n: int) -> Any:
        return with_lora(OneLayer(), n, ["proj"])

    return {
        "one_lora": peer(lora(1)),
        "stock_n": peer(lora(n)),
        "static": peer(adopt(lora(n)), torch.rand(n)),
        "per_token": peer(adopt(lora(n)), torch.rand(TOKENS, n)),
    }


def models(n: int, grad: bool) -> dict[str, Callable[[], None]]:
    ids = torch.randint(64, (1, TOKENS))

    def peer(model: Any, **given: Any) -> Callable[[], None]:
        leaves = [p for p in model.parameters() if p.requires_grad]
        return timed(lambda: model(ids, **given).logits, leaves, grad)

    def lora(n: int) -> Any:
        return with_lora(llama(), n, ["q_proj", "v_proj"])

    router = adopt(lora(n))
    config = MoELoraConfig(num_experts=n, router_type="learned")
    router.base_model.attach_router(router.base_model.make_router(config), config)
    return {
        "one_lora": peer(lora(1)),
        "stock_n": peer(lora(n)),
        "static": peer(adopt(lora(n)), routing_weights=torch.rand(n)),
        "per_token": peer(adopt(lora(n)), routing_weights=torch.rand(1, TOKENS, n)),
        "router": peer(router),
    }


def measure(experts: list[int], rounds: dict[str, int]) -> Iterator[dict[str, Any]]:
    peers = {"layer": layers, "model": models}
    for what, n, grad in itertools.product(peers, experts, (False, True)):
        torch.manual_seed(0)
        times = interleave(peers[what](n, grad), rounds[what])
        one = quartiles(times["one_lora"])[1]
        for peer, seconds in times.items():
            median = quartiles(seconds)[1]
            yield {
                "what": what,
                "N": n,
                "grad": "yes" if grad else "no",
                "peer": peer,
                **columns(seconds, "us"),
                "over_one_lora": f"{median / one:.3f}",
                "rounds": rounds[what],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=2000, help="of a layer; a model has a tenth of them")
    parser.add_argument("--smoke", action="store_true", help="two experts, three rounds: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.smoke:
        write_csv(args.out, measure([2], {"layer": 3, "model": 3}))
    else:
        write_csv(args.out, measure([4, 8], {"layer": args.rounds, "model": -(-args.rounds // 10)}))


if __name__ == "__main__":
    main()
