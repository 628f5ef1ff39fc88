"""Adoption changes classes and nothing else, and release takes it back."""

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
from peft.tuners import lora

import moelora
from moelora import adopt, release
from moelora.nn.routers import EmbeddingRouter, FixedRouter


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_an_adopted_model_without_weights_gives_the_same_bits(kind, make_lora, ids):
    stock = make_lora(kind)
    expected = stock(ids, labels=ids)
    adopted = adopt(stock)(ids, labels=ids)
    assert torch.equal(adopted.logits, expected.logits)
    assert torch.equal(adopted.loss, expected.loss)


def test_an_adopted_model_without_weights_gives_the_same_gradients(kind, make_lora, gradients, ids):
    stock, adopted = make_lora(kind).train(), adopt(make_lora(kind)).train()
    stock(ids, labels=ids).loss.backward()
    adopted(ids, labels=ids).loss.backward()
    expected, got = gradients(stock), gradients(adopted)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_adoption_keeps_names_parameters_and_their_identity(kind, make_lora):
    model = make_lora(kind)
    state, parameters = list(model.state_dict()), [(name, id(p)) for name, p in model.named_parameters()]
    modules, text = [name for name, _ in model.named_modules()], repr(model)
    assert adopt(model) is model
    assert list(model.state_dict()) == state
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert [name for name, _ in model.named_modules()] == modules
    shown = [line for line in repr(model).splitlines() if not line.lstrip().startswith("experts: ")]
    assert shown == text.splitlines()


def test_release_gives_back_exactly_the_stock_classes_and_attributes(kind, make_lora, ids):
    model = make_lora(kind)
    before, attributes = classes(model), {name: set(vars(module)) for name, module in model.named_modules()}
    forward_arguments = set(model.special_peft_forward_args)
    adopt(model)
    model.base_model.attach_router(FixedRouter(["expert_0", "expert_1", "expert_2"]))
    model.gradient_checkpointing_enable()
    model.train()(ids, labels=ids).loss.backward()
    model.gradient_checkpointing_disable()
    assert classes(model) != before
    assert release(model) is model
    assert classes(model) == before
    top = model.base_model.model
    for name, module in model.named_modules():
        added = set(vars(module)) - attributes[name]
        assert added <= {
            "_gradient_checkpointing_func",
            "gradient_checkpointing",
            "_require_grads_hook",
            "_require_grads_hooks",
        }
    assert "Recompute" not in repr([vars(m).get("_gradient_checkpointing_func") for m in model.modules()])
    assert not top._forward_hooks
    assert not top._forward_pre_hooks
    assert model.special_peft_forward_args == forward_arguments


def test_releasing_a_stock_model_does_nothing(make_lora):
    model = make_lora("gpt2")
    before = classes(model)
    assert classes(release(model)) == before


def test_adopting_twice_is_adopting_once(make_lora, ids, weights):
    model = adopt(adopt(make_lora("llama")))
    top = model.base_model.model
    assert len(top._forward_pre_hooks) == len(top._forward_hooks) == 1
    assert torch.isfinite(model(ids, routing_weights=weights).logits).all()


def test_adopting_again_changes_the_mixture(make_lora, ids, weights):
    model = adopt(make_lora("llama"))
    per_layer = model(ids, routing_weights=weights).logits
    adopt(model, mixture="logits")
    assert not torch.allclose(model(ids, routing_weights=weights).logits, per_layer)
    assert torch.equal(model(ids, routing_weights=weights, mixture="layer").logits, per_layer)


def test_the_routed_classes_are_public_and_subclasses_of_the_stock_ones(make_lora):
    model = adopt(make_lora("gpt2"))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert type(layer) is moelora.Linear
    assert isinstance(layer, moelora.LoraLayer) and isinstance(layer, lora.Linear)
    assert isinstance(model.base_model, moelora.LoraModel) and isinstance(model.base_model, lora.LoraModel)


def test_adapters_added_later_are_routed_on_modules_that_had_none(make_base, loop, ids):
    def build():
        options = {"r": 2, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(make_base("llama"), peft.LoraConfig(target_modules=["q_proj"], **options), "a")
        return model, peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False, **options)

    (model, later), (reference, _) = build(), build()
    adopt(model)
    torch.manual_seed(0)
    model.add_adapter("b", later)
    torch.manual_seed(0)
    reference.add_adapter("b", copy.deepcopy(later))
    for each in (model, reference):
        each.base_model.set_adapter(["a", "b"])
    assert type(model.base_model.model.model.layers[0].self_attn.v_proj) is moelora.Linear
    w = torch.tensor([0.3, 0.8])
    torch.testing.assert_close(model(ids, routing_weights=w).logits, loop(reference, w)(ids).logits)


def test_a_deepcopy_routes_on_its_own(make_lora, ids, weights):
    model = adopt(make_lora("llama"))
    router = EmbeddingRouter(["expert_0", "expert_1", "expert_2"], 32)
    model.base_model.attach_router(router)
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name or "router" in name:
                parameter.mul_(3)
    assert not torch.allclose(twin(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    assert twin.base_model.router is not router
    release(twin)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_model_routes_as_before(make_lora, ids, weights, how):
    model = adopt(make_lora("gpt2"))
    expected = model(ids, routing_weights=weights).logits
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(ids, routing_weights=weights).logits, expected)


def test_deleting_an_adapter_drops_its_column(make_lora, loop, ids):
    model, reference = adopt(make_lora("llama")), make_lora("llama")
    for each in (model, reference):
        each.delete_adapter("expert_1")
        each.base_model.set_adapter(["expert_0", "expert_2"])
    w = torch.tensor([0.4, 0.7])
    torch.testing.assert_close(model(ids, routing_weights=w).logits, loop(reference, w)(ids).logits)
    with pytest.raises(ValueError, match="one column for each active adapter"):
        model(ids, routing_weights=torch.ones(3))


def test_merge_and_unload_is_the_plain_sum_of_the_active_adapters_and_says_so(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(FixedRouter(["expert_0", "expert_1", "expert_2"], [1, 0, 0]))
    expected = make_lora("llama")(ids).logits
    with pytest.warns(UserWarning, match=r"\['expert_0', 'expert_1', 'expert_2'\] unweighted"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)
    model = adopt(make_lora("llama"))
    model.set_adapter("expert_1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()


def test_unload_gives_back_a_model_of_its_own(make_base, make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(EmbeddingRouter(["expert_0", "expert_1", "expert_2"], 32))
    unloaded = model.unload()
    assert torch.equal(unloaded(ids).logits, make_base("llama")(ids).logits)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.modules())
    assert not model.base_model.has_router()
    with pytest.raises(ValueError, match="no layer with adapters to route"):
        model(ids, routing_weights=torch.ones(3))
    release(model)
    assert type(model.base_model) is lora.LoraModel


def test_activate_all_experts_returns_the_names_in_order_of_registration(make_lora):
    model = adopt(make_lora("llama"))
    model.set_adapter("expert_1")
    assert moelora.activate_all_experts(model) == ["expert_0", "expert_1", "expert_2"]
    assert model.base_model.active_adapters == ["expert_0", "expert_1", "expert_2"]
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("function", [adopt, release, moelora.activate_all_experts])
def test_only_peft_models_are_taken(make_base, function):
    with pytest.raises(TypeError, match="GPT2LMHeadModel"):
        function(make_base("gpt2"))


def test_an_unknown_mixture_is_an_error_and_changes_nothing(make_lora):
    model = make_lora("gpt2")
    with pytest.raises(ValueError, match="mixture must be one of"):
        adopt(model, mixture="heads")
    assert type(model.base_model) is lora.LoraModel


def test_adapters_of_an_adopted_model_open_in_stock_peft(kind, make_base, make_lora, ids, tmp_path):
    model = adopt(make_lora(kind))
    model.base_model.attach_router(FixedRouter(["expert_0", "expert_1", "expert_2"]))
    model.save_pretrained(tmp_path, selected_adapters=["expert_1"])
    stock = peft.PeftModel.from_pretrained(make_base(kind), tmp_path / "expert_1")
    release(model).set_adapter("expert_1")
    assert torch.equal(stock(ids).logits, model(ids).logits)


def test_state_loaded_in_place_is_seen_at_once(make_lora, ids, weights):
    model, other = adopt(make_lora("llama")), adopt(make_lora("llama"))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.mul_(-0.5)
    before = model(ids, routing_weights=weights).logits
    model.load_state_dict(other.state_dict())
    expected = other(ids, routing_weights=weights).logits
    assert not torch.allclose(before, expected)
    assert torch.equal(model(ids, routing_weights=weights).logits, expected)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.zeros_like(parameter)
    with model.disable_adapter():
        plain = model(ids).logits
    torch.testing.assert_close(model(ids, routing_weights=weights).logits, plain)


def test_forward_replaced_on_the_instance_breaks_nothing(make_lora, ids, weights):
    model = adopt(make_lora("llama"))
    expected = model(ids, routing_weights=weights).logits
    stock_forward = model.forward
    model.forward = lambda *args, **kwargs: stock_forward(*args, **kwargs)  # as accelerate does
    assert torch.equal(model(ids, routing_weights=weights).logits, expected)


def test_stock_forward_of_the_layers_replaced_from_outside_is_what_runs_without_weights(make_lora, ids, monkeypatch):
    model = adopt(make_lora("llama"))
    calls = []
    stock_forward = lora.Linear.forward

    def counting(self, x, *args, **kwargs):
        calls.append(self)
        return stock_forward(self, x, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", counting)
    model(ids)
    assert len(calls) == 21
