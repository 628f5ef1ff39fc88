"""Dropout in `moelora.nn.routed_lora`: one mask per expert, drawn as PEFT draws them."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from moelora.nn import routed_lora

EXPERTS = ["expert_0", "expert_1", "expert_2"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def peft_layer(request):
    """PEFT's own layer with three active adapters of different ranks, in float32 as get_peft_model makes them."""
    torch.manual_seed(0)
    base = nn.Linear(7, 6, dtype=request.param)
    layer = Linear(base, EXPERTS[0], LoraConfig(lora_dropout=0.3, r=2), r=2, lora_alpha=3)
    for name, rank in zip(EXPERTS[1:], (3, 1), strict=True):
        layer.update_layer(name, rank, lora_alpha=4, config=LoraConfig(lora_dropout=0.3, r=rank))
    layer.set_adapter(EXPERTS)
    for name in EXPERTS:
        nn.init.normal_(layer.lora_B[name].weight)
    layer.lora_A.float()
    layer.lora_B.float()
    return layer.train()


def test_the_same_seed_gives_what_peft_gives(peft_layer):
    x = torch.randn(2, 5, 7, dtype=peft_layer.base_layer.weight.dtype)
    lora_A = [peft_layer.lora_A[name].weight for name in EXPERTS]
    lora_B = [peft_layer.lora_B[name].weight for name in EXPERTS]
    torch.manual_seed(7)
    expected = peft_layer(x)
    torch.manual_seed(7)
    y = routed_lora(
        x,
        lora_A,
        lora_B,
        torch.ones(3),
        [peft_layer.scaling[name] for name in EXPERTS],
        base_output=peft_layer.base_layer(x).detach(),
        dropout_p=0.3,
    )
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected.float().sum(), [*lora_A, *lora_B])
    for got, grad in zip(torch.autograd.grad(y.float().sum(), [*lora_A, *lora_B]), wanted, strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("top_k", [None, 2])
def test_every_expert_has_its_own_mask_and_probability(make_mixture, top_k):
    m = make_mixture()
    dropout_p = [0.2, 0.0, 0.7]
    torch.manual_seed(3)
    y = routed_lora(*m, dropout_p=dropout_p, top_k=top_k)
    torch.manual_seed(3)
    masks = [F.dropout(torch.ones_like(m.x), p) if p else torch.ones_like(m.x) for p in dropout_p]
    kept = torch.ones_like(m.routing_weights)
    if top_k:
        kept.scatter_(-1, m.routing_weights.argmin(-1, keepdim=True), 0)
    expected = sum(
        m._replace(
            x=m.x * mask,
            lora_A=[m.lora_A[e]],
            lora_B=[m.lora_B[e]],
            routing_weights=(m.routing_weights * kept)[..., e : e + 1],
            scaling=[m.scaling[e]],
        ).loop()
        for e, mask in enumerate(masks)
    )
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(
        torch.autograd.grad(y.sum(), m.leaves), torch.autograd.grad(expected.sum(), m.leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_the_mean_over_many_draws_is_the_result_without_dropout(make_mixture):
    m = make_mixture(tokens=(3,), grad=False)
    torch.manual_seed(0)
    many = m._replace(x=m.x.expand(20000, 3, 7), routing_weights=m.routing_weights.expand(20000, 3, 3))
    y = routed_lora(*many, dropout_p=0.4)
    error = y.std(0) / 20000**0.5
    assert ((y.mean(0) - m.loop()).abs() < 5 * error).all()
    # independent: the variance is the sum of the experts' own
    alone = sum(
        routed_lora(
            many.x, [m.lora_A[e]], [m.lora_B[e]], many.routing_weights[..., e : e + 1], m.scaling[e], dropout_p=0.4
        ).var(0)
        for e in range(3)
    )
    torch.testing.assert_close(y.var(0), alone, rtol=0.1, atol=0)


def test_certain_dropout_leaves_the_base_alone(make_mixture):
    m = make_mixture()
    base = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(routed_lora(*m, base_output=base, dropout_p=1.0), base)


def test_the_base_product_is_not_dropped(make_mixture):
    m = make_mixture()
    weight = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(routed_lora(*m, weight=weight, dropout_p=1.0), F.linear(m.x, weight))


def test_no_dropout_draws_nothing(make_mixture):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    routed_lora(*make_mixture(), dropout_p=0.0)
    assert torch.equal(torch.rand(3), expected)


def test_double_backward_is_an_error_with_dropout(make_mixture):
    m = make_mixture()
    (grad,) = torch.autograd.grad(routed_lora(*m, dropout_p=0.5).square().sum(), m.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad.sum().backward()
