"""What the two ways of mixing have in common, and what they cost."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dylora
import old_way
from lifecycle import DyLoRA
from moelora import PeftModel
from moelora.demo.measure import Way, cost


@torch.no_grad()
def logits(model: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
    return model.eval()(input_ids=input_ids, **options).logits


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def old_logits_in_one_call(base: PreTrainedModel, old: old_way.DyLoRAMoE, saved: Path, input_ids: Tensor) -> float:
    """How far moelora's logits mode is from the old way: its saved experts, its router's weights, its result."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), saved)
    expected = logits(old.model, input_ids)
    weights = old.model.router(old.hidden_states(input_ids)).detach()
    return difference(logits(model, input_ids, routing_weights=weights, mixture="logits"), expected)


def base_passes(model: nn.Module, input_ids: Tensor) -> int:
    """How often one forward of a mixture runs the base model."""
    embeddings = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    calls: list[int] = []
    hook = embeddings.register_forward_hook(lambda *_: calls.append(1))
    logits(model, input_ids)
    hook.remove()
    return len(calls)


def costs(old: DyLoRA, new: dylora.DyLoRAMoE, input_ids: Tensor) -> dict[str, dict[str, float]]:
    """Time and memory of a step in which the youngest expert and the router learn to mix. It changes the models."""
    for moe in (old, new):
        moe.learn_alone(moe.experts[-1])
        moe.learn_to_mix()

    def run(model: nn.Module, input_ids: Tensor, labels: Tensor | None) -> Tensor:
        outputs = model(input_ids=input_ids, labels=labels)
        return outputs.logits if labels is None else outputs.loss

    ways = {
        name: Way(moe.model, lambda ids, labels, model=moe.model: run(model, ids, labels))
        for name, moe in (("old way", old), ("moelora", new))
    }
    return cost(ways, input_ids)
