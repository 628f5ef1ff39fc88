"""Host time: what a call costs before any arithmetic counts, on one thread and very small shapes.

`call` is `routed_lora` over four experts of rank 4 at d = 64, one token and eight, against `stacked` torch and `base`,
F.linear alone. `layer` is one layer as the forward of its model calls it, `model` a Llama of two layers with LoRA on q
and v. Their peers: `one_lora` and `stock_n` are PEFT with one and with N active adapters, `static`, `per_token` and
`router` are moelora with weights [N], weights per token, and a gate in each decoder layer.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moelora.bench.layers import Cell
from moelora.bench.layers import peers as layer_peers
from moelora.bench.record import columns
from moelora.bench.small import OneLayer, with_lora
from moelora.bench.work import Peer, timed
from moelora.peft import MoELoraConfig, adopt
from moelora.peft.frame import Entered, Frame
from moelora.report.timing import quartiles

TOKENS, WIDTH, RANK = 8, 64, 8
PASSES = ("forward", "forward_grad", "forward+backward")


def calls(tokens: int) -> dict[str, Peer]:
    """One call of the kernels."""
    of = layer_peers(Cell(tokens, 64, 4, 4, "float32"))
    return {name: of[name] for name in ("moelora", "stacked", "base")}


def layers(
    n: int, tokens: int = TOKENS, width: int = WIDTH, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Peer]:
    """One layer with N experts; their adapters are float32 whatever the base is, as PEFT makes them."""
    x = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)

    def peer(model: Any, weights: Tensor | None = None) -> Peer:
        layer, tuner = model.base_model.model.proj, model.base_model
        frame = None if weights is None else Frame(tuner._host, tuner.active_adapters, given=weights)

        def inside() -> Tensor:
            with Entered(frame):
                y: Tensor = layer(x)
            return y

        return Peer((lambda: layer(x)) if frame is None else inside, [x], list(layer.parameters()))

    def lora(n: int) -> Any:
        return with_lora(OneLayer(width).to(device, dtype), n, RANK, ["proj"])

    return {
        "one_lora": peer(lora(1)),
        "stock_n": peer(lora(n)),
        "static": peer(adopt(lora(n)), torch.rand(n, device=device)),
        "per_token": peer(adopt(lora(n)), torch.rand(tokens, n, device=device)),
    }


def models(n: int) -> dict[str, Peer]:
    """A model with N experts."""
    ids = torch.randint(64, (1, TOKENS))

    def peer(model: Any, **given: Any) -> Peer:
        return Peer(lambda: model(ids, **given).logits, [], list(model.parameters()))

    def lora(n: int) -> Any:
        return with_lora(_llama(), n, RANK, ["q_proj", "v_proj"])

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


def _llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def measure(experts: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of ``host.csv``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made: dict[str, Callable[[int], dict[str, Peer]]] = {"layer": layers, "model": models}
    try:
        for T, which in itertools.product((1, TOKENS), PASSES):
            yield from _rows("call", T, 4, calls(T), which, rounds, "stacked")
        for what, n, which in itertools.product(made, experts, PASSES):
            yield from _rows(what, TOKENS, n, made[what](n), which, rounds, "one_lora")
    finally:
        torch.set_num_threads(threads)


def _rows(
    what: str, T: int, n: int, of: dict[str, Peer], which: str, rounds: int, reference: str
) -> Iterator[dict[str, Any]]:
    yield from as_rows(what, T, n, which, timed(of, which, rounds), reference)


def as_rows(
    what: str, T: int, n: int, which: str, seconds: Mapping[str, Sequence[float]], reference: str
) -> Iterator[dict[str, Any]]:
    """A row for each peer; `reference` is the one that it is compared with."""
    one = quartiles(seconds[reference])[1]
    for name, values in seconds.items():
        yield {
            "what": what,
            "T": T,
            "N": n,
            "pass": which,
            "peer": name,
            **columns(values, "us"),
            "over": reference,
            "ratio": f"{quartiles(values)[1] / one:.3f}",
            "rounds": len(values),
        }
