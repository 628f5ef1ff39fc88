"""A routed layer reads its adapters anew in every call, however they are changed."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from moelora.peft import adopt


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace(module):
    module.weight = nn.Parameter(torch.randn_like(module.weight))


def widen(layer):
    """Another rank for one expert."""
    layer.lora_A["expert_1"].weight = nn.Parameter(torch.randn(6, layer.in_features))
    layer.lora_B["expert_1"].weight = nn.Parameter(torch.randn(layer.out_features, 6))


def load(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.lora_A["expert_0"].weight.data.mul_(2),
        lambda layer: layer.lora_A["expert_0"].weight.data.copy_(torch.randn(4, 24)),
        lambda layer: setattr(layer.lora_A["expert_0"].weight, "data", torch.randn(24, 4).t()),
        lambda layer: replace(layer.lora_B["expert_2"]),
        lambda layer: parametrize.register_parametrization(layer.lora_A["expert_1"], "weight", Doubled()),
        lambda layer: layer.scaling.update(expert_1=3.0),
        lambda layer: layer.base_layer.weight.data.mul_(2),
        lambda layer: replace(layer.base_layer),
        lambda layer: layer.set_adapter(["expert_2", "expert_0"]),
        lambda layer: layer.delete_adapter("expert_0"),
        widen,
        load,
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_every_change_counts_in_the_next_call(make_lora, change, grad):
    layer = adopt(make_lora("t5")).base_model.model.encoder.block[0].layer[0].SelfAttention.q
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad):
        before = layer(x, routing_weights=torch.full((len(layer.active_adapters),), 0.5))
        torch.manual_seed(2)
        change(layer)
        names = layer.active_adapters
        weights = torch.rand(2, 5, len(names))
        y = layer(x, routing_weights=weights)
        expected = layer.base_layer(x)
        for i, name in enumerate(names):
            if name in layer.lora_A:
                out = layer.lora_B[name](layer.lora_A[name](x))
                expected = expected + weights[..., i, None] * layer.scaling[name] * out
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, y)
