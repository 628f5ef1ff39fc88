"""lora_dropout of a routed model: which of PEFT's dropout modules act, and when."""

import pytest
import torch
from torch import nn

from moelora.peft import adopt


@pytest.fixture
def layer(make_lora):
    """A routed layer of two experts of which the first has dropout, over a base of zeros."""
    model = adopt(make_lora("llama", n=2, lora_dropout=0.5, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_dropout["expert_1"] = nn.Identity()  # what lora_dropout=0 makes
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    return layer.train()


def outputs(layer):
    """Two calls on the same x, for one expert after the other."""
    x = torch.ones(2, 9, 32)
    return [[layer(x, routing_weights=w) for _ in range(2)] for w in torch.eye(2)]


def test_each_expert_has_its_own_module(layer):
    (first, second), (without, again) = outputs(layer)
    assert not torch.equal(first, second)
    assert torch.equal(without, again)
    assert without.abs().sum() > 0


@pytest.mark.parametrize("part", ["layer", "module"])
def test_evaluation_drops_nothing(layer, part):
    layer.eval() if part == "layer" else layer.lora_dropout.eval()
    (first, second), _ = outputs(layer)
    assert torch.equal(first, second)


def test_dropout_modules_may_train_alone(layer):
    """As in Monte Carlo dropout: the model evaluates, its dropout does not. PEFT asks the module too."""
    layer.eval()
    layer.lora_dropout.train()
    (first, second), _ = outputs(layer)
    assert not torch.equal(first, second)


def test_a_seed_gives_the_same_step_again(make_lora, ids, weights):
    model, steps = adopt(make_lora("llama", lora_dropout=0.3)).train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        model(ids, labels=ids, routing_weights=weights).loss.backward()
        steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, steps[0], steps[1]))
    assert not all(map(torch.equal, steps[0], steps[2]))
