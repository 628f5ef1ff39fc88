"""Base layers that routed layers compute with the mixture in one call, and those that they leave to themselves."""

import copy

import pytest
import torch
import transformers
from torch import nn

import moelora
from moelora import adopt
from moelora.peft import layers

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(autouse=True, params=["own", "torch"])
def product(request):
    moelora.set_base_product(request.param)
    yield request.param
    moelora.set_base_product(None)


@pytest.fixture
def fused(monkeypatch):
    """Of each base layer's call, whether it was one with the mixture."""
    taken = []

    def routed_lora(*args, weight=None, **options):
        taken.append(weight is not None)
        return function(*args, weight=weight, **options)

    function = layers.routed_lora
    monkeypatch.setattr(layers, "routed_lora", routed_lora)
    return taken


def first(model, kind):
    """A routed layer."""
    inside = model.base_model.model
    return inside.transformer.h[0].attn.c_attn if kind == "gpt2" else inside.model.layers[0].self_attn.q_proj


def test_a_model_equals_the_loop_over_adapters(kind, make_lora, loop, same_step, ids, weights, fused):
    w, v = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    model, reference = adopt(make_lora(kind)).train(), loop(make_lora(kind).train(), v)
    same_step(model, reference, ids, w, **CLOSE)
    torch.testing.assert_close(w.grad, v.grad, **CLOSE)
    assert fused and all(fused)


def test_without_gradients_too(kind, make_lora, loop, ids, weights, fused):
    with torch.no_grad():
        expected = loop(make_lora(kind), weights)(ids).logits
        torch.testing.assert_close(adopt(make_lora(kind))(ids, routing_weights=weights).logits, expected, **CLOSE)
    assert fused and all(fused)


WATCHED = {
    "a forward hook": lambda base, seen: base.register_forward_hook(lambda *args: seen.append(1)),
    "a forward pre-hook": lambda base, seen: base.register_forward_pre_hook(lambda *args: seen.append(1)),
    "a hook for all": lambda base, seen: nn.modules.module.register_module_forward_hook(
        lambda module, *args: seen.append(1) if module is base else None
    ),
    "a forward of its own": lambda base, seen: setattr(
        base, "forward", lambda x, forward=base.forward: seen.append(1) or forward(x)
    ),
}


@pytest.mark.parametrize("how", WATCHED)
def test_a_base_that_somebody_watches_runs_as_it_is(kind, make_lora, ids, weights, fused, how):
    model, seen = adopt(make_lora(kind)), []
    expected = model(ids, routing_weights=weights).logits
    hook = WATCHED[how](first(model, kind).base_layer, seen)
    try:
        got = model(ids, routing_weights=weights).logits
    finally:
        if hook is not None:
            hook.remove()
    torch.testing.assert_close(got, expected, **CLOSE)
    assert seen == [1] and not all(fused)


def test_a_class_whose_forward_was_replaced_runs_it(kind, make_lora, ids, weights, fused, monkeypatch):
    model, seen = adopt(make_lora(kind)), []
    of = type(first(model, kind).base_layer)
    forward = of.forward
    monkeypatch.setattr(of, "forward", lambda self, x: seen.append(1) or forward(self, x))
    model(ids, routing_weights=weights)
    assert seen and not any(fused)


def test_a_subclass_of_a_base_runs_its_own_forward(kind, make_lora, ids, weights, fused):
    model = adopt(make_lora(kind))
    base = first(model, kind).base_layer

    class Twice(type(base)):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(3, base.weight.shape[0 if kind == "gpt2" else 1])
    plain = first(model, kind)(x, routing_weights=weights[0, 0])
    base.__class__ = Twice
    twice = first(model, kind)(x, routing_weights=weights[0, 0])
    torch.testing.assert_close(twice - plain, base(x) / 2)
    assert fused == [True, False]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_trains_gets_its_gradient(make_lora, ids, weights, fused, name):
    model = adopt(make_lora("gpt2")).train()
    parameter = getattr(first(model, "gpt2").base_layer, name).requires_grad_()
    model(ids, labels=ids, routing_weights=weights).loss.backward()
    assert parameter.grad.abs().max() > 0 and not all(fused)
    parameter.requires_grad_(False)
    fused.clear()
    model(ids, routing_weights=weights)
    assert all(fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_come_out_in_theirs(kind, make_lora, ids, weights, dtype):
    model = adopt(make_lora(kind))
    expected = model(ids, routing_weights=weights).logits
    logits = adopt(make_lora(kind)).to(dtype)(ids, routing_weights=weights).logits
    close = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else CLOSE
    assert logits.dtype is dtype
    torch.testing.assert_close(logits.float(), expected, **close)


def test_autocast_casts_the_base(kind, make_lora, ids, weights, fused):
    model = adopt(make_lora(kind))
    expected = model(ids, routing_weights=weights).logits
    fused.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = first(model, kind)
        assert layer(torch.randn(3, layer.in_features), routing_weights=weights[0, 0]).dtype is torch.bfloat16
        logits = model(ids, routing_weights=weights).logits
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    assert not any(fused)


def test_release_gives_the_stock_layers_back(kind, make_lora, ids, weights, fused):
    stock = make_lora(kind)
    expected = copy.deepcopy(stock)(ids).logits
    model = adopt(stock)
    model(ids, routing_weights=weights)
    fused.clear()
    assert torch.equal(moelora.release(model)(ids).logits, expected)
    assert not fused


def test_the_weight_of_conv1d_is_read_transposed_and_stays_as_it_is():
    torch.manual_seed(0)
    base = transformers.pytorch_utils.Conv1D(5, 3).requires_grad_(False)  # [3, 5]
    nn.init.normal_(base.bias)
    x = torch.randn(2, 3)
    weight, bias = layers._plain_base(base, x)
    assert weight.shape == (5, 3) and weight.data_ptr() == base.weight.data_ptr() and bias is base.bias
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), base(x))
