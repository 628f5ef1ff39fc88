"""The ways that are trained side by side: what they share, and how each turns a batch into a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn

import moelora
from moelora.demo.baselines import add_experts, n_passes
from moelora.demo.training import TARGETS, Training, mean_loss
from moelora.validate.reference import AdapterLoop

EXPERTS = 4
NAMES = [f"expert_{i}" for i in range(EXPERTS)]
LEARNING_RATE = 3e-3
GATE_LEARNING_RATE = 1e-2

Loss = Callable[[Tensor, Tensor], Tensor]  # of the routing weights [B, S, N] and the token ids [B, S]


class Pair(NamedTuple):
    """A way of moelora, the older way that it must agree with, and the latter over frozen weights one ulp off."""

    way: str
    reference: str
    yardstick: str


PAIRS = (
    Pair("moelora_logits", "n_passes", "n_passes_nudged"),
    Pair("moelora", "layer_loop", "layer_loop_nudged"),
)


class Way:
    """A model that is trained together with its gate, a router outside it.

    Parameters
    ----------
    model : PeftModel
    gate : Linear
        From the frozen token embeddings to the N logits whose softmax are the weights.
    loss : callable
    steps : int
        How many there will be.
    """

    def __init__(self, model: peft.PeftModel, gate: nn.Linear, loss: Loss, steps: int) -> None:
        self.model, self.gate, self.mixed_loss = model, gate, loss
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        of_gate = {f"gate.{name}": p for name, p in gate.named_parameters()}
        self.trained = adapters | of_gate
        self.training = Training([*adapters.values()], [*of_gate.values()], steps, LEARNING_RATE, GATE_LEARNING_RATE)

    def loss(self, input_ids: Tensor) -> Tensor:
        embeddings: Any = self.model.get_input_embeddings()
        weights = self.gate(embeddings(input_ids)).softmax(-1)
        return self.mixed_loss(weights, input_ids)

    def step(self, input_ids: Tensor) -> float:
        """Train on a batch; its loss before the step."""
        loss = self.loss(input_ids)
        self.training.step(loss)
        return loss.item()

    def held_out_loss(self, sequences: Tensor) -> float:
        self.model.eval()
        loss = mean_loss(self.loss, sequences)
        self.model.train()
        return loss


def make_ways(base: nn.Module, *, rank: int, seed: int, steps: int) -> dict[str, Way]:
    """All ways over copies of `base`: those that mix have the same adapters and the same gate, drawn from `seed`."""
    torch.manual_seed(seed)
    dtype = next(base.parameters()).dtype
    stock = stock_lora(base, rank)
    add_experts(stock, NAMES)
    single = stock_lora(base, EXPERTS * rank)
    for name, parameter in [*stock.named_parameters(), *single.named_parameters()]:
        if "lora_B" in name:
            # Between experts that are still equal the gate's gradient is nothing but rounding errors, and AdamW's first
            # step is of one size whatever the gradient's.
            nn.init.normal_(parameter, std=0.01)
    embeddings: Any = stock.get_input_embeddings()
    gate = nn.Linear(embeddings.embedding_dim, EXPERTS)

    def way(loss_of: Callable[[peft.PeftModel], Loss], model: peft.PeftModel = stock) -> Way:
        model = copy.deepcopy(model).to(dtype)
        return Way(model, copy.deepcopy(gate).to(dtype), loss_of(model), steps)

    nudged = nudge(copy.deepcopy(stock))
    return {
        "n_passes": way(by_passes),
        "moelora_logits": way(by_moelora("logits")),
        "layer_loop": way(by_loop),
        "moelora": way(by_moelora("layer")),
        "one_lora": way(by_one_adapter, single),
        "n_passes_nudged": way(by_passes, nudged),
        "layer_loop_nudged": way(by_loop, nudged),
    }


def stock_lora(base: nn.Module, rank: int) -> peft.PeftModel:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    return peft.get_peft_model(copy.deepcopy(base), config, adapter_name=NAMES[0])


@torch.no_grad()
def nudge(model: peft.PeftModel) -> peft.PeftModel:
    """Move every frozen number to one of its two neighbours, at random; the model itself."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            up = torch.rand(parameter.shape) < 0.5
            parameter.copy_(parameter.nextafter(torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)))
    return model


def by_passes(model: peft.PeftModel) -> Loss:
    return lambda weights, input_ids: n_passes(model, weights, input_ids, input_ids)


def by_loop(model: peft.PeftModel) -> Loss:
    loop = AdapterLoop(model)

    def loss(weights: Tensor, input_ids: Tensor) -> Tensor:
        loop.weights = weights
        result: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return result

    return loss


def by_moelora(mixture: str) -> Callable[[peft.PeftModel], Loss]:
    def loss_of(model: peft.PeftModel) -> Loss:
        moelora.adopt(model, mixture=mixture)
        return lambda weights, input_ids: (
            model(input_ids=input_ids, labels=input_ids, routing_weights=weights, use_cache=False).loss
        )

    return loss_of


def by_one_adapter(model: peft.PeftModel) -> Loss:
    """Stock PEFT with the adapter it has; the weights are left aside."""
    return lambda weights, input_ids: model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
