"""`moelora.testing`: passes on what is right, names what is wrong, and leaves the model alone."""

import pytest
import torch
from peft import LoHaConfig, get_peft_model

import moelora
from moelora import MoELoraConfig, adopt
from moelora.nn.routers import PerLayerRouter
from moelora.peft import layers, logits
from moelora.testing import assert_matches_n_passes


@pytest.mark.parametrize("adopted", [False, True])
def test_it_passes_on_a_stock_or_adopted_model(kind, make_lora, ids, adopted):
    model = make_lora(kind, lora_dropout=0.1)
    assert_matches_n_passes(adopt(model) if adopted else model, ids)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)])
def test_it_takes_a_dict_with_a_mask_and_labels_and_given_weights(make_lora, ids, shape):
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    assert_matches_n_passes(adopt(make_lora("llama")), batch, routing_weights=torch.rand(shape))


def test_it_takes_the_routing_weights_of_a_batch(make_lora, ids):
    batch = {"input_ids": ids, "routing_weights": torch.rand(2, 7, 3)}
    with torch.no_grad():
        assert_matches_n_passes(adopt(make_lora("llama")), batch)
    with pytest.raises(ValueError, match="is for 5 tokens"):
        assert_matches_n_passes(make_lora("llama"), batch | {"routing_weights": torch.rand(2, 5, 3)})


def test_it_takes_embeddings_and_layers_outside_the_decoder(make_lora, ids):
    model = make_lora("llama", target_modules=["embed_tokens", "q_proj", "lm_head"])
    assert_matches_n_passes(model, ids)
    assert_matches_n_passes(make_lora("llama"), {"inputs_embeds": torch.randn(2, 5, 32)})


def test_it_takes_an_encoder_decoder_model(make_lora, ids):
    assert_matches_n_passes(make_lora("t5"), {"input_ids": ids, "decoder_input_ids": ids[:, :4]})
    assert_matches_n_passes(make_lora("t5"), {"input_ids": ids, "decoder_input_ids": ids})  # equal lengths


def everything_about(model):
    """Classes, modes, flags, adapters, gradients and values of a model; random numbers' state."""
    modules = {n: (type(m), m.training, len(m._forward_hooks), "forward" in vars(m)) for n, m in model.named_modules()}
    parameters = {
        n: (id(p), p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
        for n, p in model.named_parameters()
    }
    return modules, list(model.base_model.active_adapters), parameters, torch.get_rng_state()


@pytest.mark.parametrize("adopted", [False, True])
def test_it_leaves_the_model_as_it_was(make_lora, ids, adopted):
    model = make_lora("llama", lora_dropout=0.1).train()
    if adopted:
        adopt(model, mixture="logits")
        model.base_model.attach_router(PerLayerRouter(["expert_0", "expert_1", "expert_2"], 32, num_layers=3))
    model(ids, labels=ids, **({"mixture": "layer"} if adopted else {})).loss.backward()
    model.base_model.set_adapter(["expert_2", "expert_0"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("expert_2" in name)
    model.model.lm_head.eval()
    before = everything_about(model)
    assert_matches_n_passes(model, ids)
    after = everything_about(model)
    assert after[:2] == before[:2] and torch.equal(after[3], before[3])
    assert after[2].keys() == before[2].keys()
    for name, (identity, flag, grad, value) in before[2].items():
        same_identity, same_flag, same_grad, same_value = after[2][name]
        assert (same_identity, same_flag) == (identity, flag) and torch.equal(same_value, value)
        assert same_grad is grad if grad is None else torch.equal(same_grad, grad)


def test_it_leaves_the_model_as_it_was_when_it_fails(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is for 6 tokens"):
        assert_matches_n_passes(model, ids, routing_weights=torch.rand(2, 6, 3))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.base_model.active_adapters == ["expert_0", "expert_1", "expert_2"]


def test_a_wrong_forward_is_named_with_size_and_place(make_lora, ids, monkeypatch):
    true = layers.routed_lora

    def wrong(*args, **kwargs):
        return true(*args, **kwargs) * 1.01

    monkeypatch.setattr(layers, "routed_lora", wrong)
    with pytest.raises(AssertionError) as caught:
        assert_matches_n_passes(make_lora("llama"), ids)
    message = str(caught.value)
    for part in (
        "logits with one-hot weights of 'expert_1': ",
        "logits of mixture='layer' against a loop",
        " at [",
        "N passes",
    ):
        assert part in message
    assert_matches_n_passes(make_lora("llama"), ids, rtol=10)


def test_a_wrong_gradient_names_its_parameter_and_nothing_else(make_lora, ids, monkeypatch):
    true = layers.routed_lora

    def wrong(x, lora_A, lora_B, weights, scaling, **kwargs):
        lora_A = [lora_A[0], lora_A[1] * 2 - lora_A[1].detach(), *lora_A[2:]]
        return true(x, lora_A, lora_B, weights, scaling, **kwargs)

    monkeypatch.setattr(layers, "routed_lora", wrong)
    with pytest.raises(AssertionError) as caught:
        assert_matches_n_passes(make_lora("llama"), ids)
    first, *lines = str(caught.value).splitlines()
    assert f"{len(lines)} of " in first and lines
    assert all("gradient of base_model" in line and "lora_A.expert_1.weight" in line for line in lines)


def test_a_wrong_mixture_of_logits_is_named(make_lora, ids, monkeypatch):
    true = logits.mix

    def wrong(*args):
        output = true(*args)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(logits, "mix", wrong)
    with pytest.raises(AssertionError, match="logits of mixture='logits' against N passes") as caught:
        assert_matches_n_passes(make_lora("llama"), ids)
    assert "mixture='layer'" not in str(caught.value)


def test_what_it_can_not_compare_is_an_error(make_lora, make_base, ids):
    with pytest.raises(TypeError, match="must be a PeftModel with LoRA adapters, got LlamaForCausalLM"):
        assert_matches_n_passes(make_base("llama"), ids)
    loha = get_peft_model(make_base("llama"), LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="with LoRA adapters, got PeftModel with a LoHaModel"):
        assert_matches_n_passes(loha, ids)
    model = make_lora("llama")
    with pytest.raises(TypeError, match="batch must be a tensor of token ids or a mapping of inputs, got list"):
        assert_matches_n_passes(model, [ids])
    model.base_model.set_adapter("expert_1")
    with pytest.raises(ValueError, match=r"two active adapters, got \['expert_1'\]: call moelora.activate_all_experts"):
        assert_matches_n_passes(model, ids)


def test_it_takes_a_model_as_get_peft_model_makes_it(make_base, ids):
    config = MoELoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_experts=2, top_k_experts=1)
    assert_matches_n_passes(moelora.get_peft_model(make_base("llama"), config), ids)


def test_it_takes_frozen_experts_and_leaves_them_frozen(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.freeze_expert("expert_1")
    assert_matches_n_passes(model, ids)
    assert model.base_model.frozen_experts == {"expert_1"}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and not any("expert_1" in name for name in trains)
