"""A router on the model: it acts in the same pass, it comes and goes, its loss counts once."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt
from moelora.nn.losses import router_aux_loss
from moelora.nn.routers import (
    EmbeddingRouter,
    FixedRouter,
    HiddenStateRouter,
    LearnedRouter,
    PerLayerRouter,
    Router,
    RoutingOutput,
)

NAMES = ["expert_0", "expert_1", "expert_2"]
WIDTH = {"gpt2": 24, "llama": 32}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def router_for(kind, reads, **options):
    torch.manual_seed(3)
    width = WIDTH[kind]
    router = {
        "embeddings": lambda: EmbeddingRouter(NAMES, width, **options),
        "layer": lambda: HiddenStateRouter(NAMES, width, layer=1, **options),
        "layers": lambda: PerLayerRouter(NAMES, width, num_layers=3, **options),
    }[reads]()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return router


def decoder_layers(model):
    base = model.base_model.model
    return base.transformer.h if hasattr(base, "transformer") else base.model.layers


def weights_it_makes(model, router, ids):
    """[B, S, L, N] of an attached router, from the inputs of the decoder layers in the routed pass."""
    inputs, handles = {}, []
    for i, layer in enumerate(decoder_layers(model)):
        handles.append(layer.register_forward_pre_hook(lambda m, args, i=i: inputs.setdefault(i, args[0])))
    handles.append(
        model.get_input_embeddings().register_forward_hook(lambda m, a, out: inputs.setdefault("embeddings", out))
    )
    with torch.no_grad():
        out = model(ids)
    for handle in handles:
        handle.remove()
    uniform = torch.full((*ids.shape, 3), 1 / 3)
    with torch.no_grad():
        if router.reads == "embeddings":
            per_layer = [router(inputs["embeddings"])] * 3
        elif router.reads == "layer":
            per_layer = [uniform, router(inputs[1]), router(inputs[1])]
        else:
            per_layer = [router(inputs[i], layer=i) for i in range(3)]
    return torch.stack(per_layer, 2), out.logits


@pytest.mark.parametrize("reads", ["embeddings", "layer", "layers"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "temperature": 2.0}])
def test_a_router_acts_as_its_weights_would(kind, make_lora, ids, reads, options):
    model = adopt(make_lora(kind))
    router = router_for(kind, reads, **options)
    model.base_model.attach_router(router)
    w, logits = weights_it_makes(model, router, ids)
    model.base_model.detach_router()
    torch.testing.assert_close(model(ids, routing_weights=w).logits, logits, **CLOSE)


@pytest.mark.parametrize("reads", ["embeddings", "layer", "layers"])
def test_a_router_needs_one_pass_of_the_base(kind, make_lora, ids, reads):
    model = adopt(make_lora(kind))
    model.base_model.attach_router(router_for(kind, reads))
    passes = []
    decoder_layers(model)[0].register_forward_pre_hook(lambda *args: passes.append(1))
    model(ids)
    assert len(passes) == 1


@pytest.mark.parametrize("reads", ["embeddings", "layer", "layers"])
def test_a_router_learns_through_the_mixture(make_lora, ids, reads):
    def loss(model):
        return nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    # The directional derivative of the loss, and its difference quotient.
    model = adopt(make_lora("gpt2").double()).train()  # Llama's norms would compute in float32
    router = router_for("gpt2", reads).double()
    model.base_model.attach_router(router)
    loss(model).backward()
    torch.manual_seed(1)
    directions = {p: torch.randn_like(p) for p in router.parameters()}
    slope = sum(float((p.grad * d).sum()) for p, d in directions.items())
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in directions.items():
                p += step * d
            values.append(float(loss(model)))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("reads", ["embeddings", "layer", "layers"])
def test_inputs_embeds_are_routed_like_the_ids_they_come_from(make_lora, ids, reads):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(router_for("llama", reads))
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_layers_before_the_decoder_are_uniform_and_the_head_takes_the_last_layer(make_lora, ids):
    model = adopt(make_lora("llama", target_modules=["lm_head"]))
    router = router_for("llama", "layers")
    model.base_model.attach_router(router)
    w, logits = weights_it_makes(model, router, ids)
    model.base_model.detach_router()
    torch.testing.assert_close(model(ids, routing_weights=w[:, :, 2]).logits, logits, **CLOSE)
    model.base_model.attach_router(router)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], **CLOSE)


@pytest.mark.parametrize("active", [NAMES, NAMES[::2]], ids=len)
@pytest.mark.parametrize("reads", ["embeddings", "layer", "layers"])
def test_no_column_is_chosen_by_numbers_from_the_host(make_lora, ids, operations, reads, active):
    """Those would be copied to a GPU, which waits for all work before that."""
    model = adopt(make_lora("llama", target_modules=["q_proj", "lm_head"]))
    model.base_model.attach_router(router_for("llama", reads, top_k=1))
    model.base_model.set_adapter(active)
    names = operations(lambda: model(ids))
    assert names and not names & {"index", "index_select"}


def test_explicit_weights_win_over_the_router(make_lora, ids, weights):
    model = adopt(make_lora("llama"))
    expected = model(ids, routing_weights=weights).logits
    model.base_model.attach_router(router_for("llama", "layers"))
    assert not torch.allclose(model(ids).logits, expected)
    assert torch.equal(model(ids, routing_weights=weights).logits, expected)


def test_columns_of_a_router_are_matched_by_name(make_lora, ids):
    model = adopt(make_lora("llama"))
    shares = {"expert_2": 5.0, "other": 9.0, "expert_0": 3.0, "expert_1": 2.0}
    model.base_model.attach_router(FixedRouter(list(shares), list(shares.values())))
    expected = model(ids, routing_weights=torch.tensor([0.3, 0.2, 0.5])).logits
    torch.testing.assert_close(model(ids).logits, expected)
    model.base_model.set_adapter(["expert_2", "expert_0"])
    expected = model(ids, routing_weights=torch.tensor([0.625, 0.375])).logits
    torch.testing.assert_close(model(ids).logits, expected)


def test_one_active_expert_has_weight_one(make_lora, ids):
    model, stock = adopt(make_lora("llama")), make_lora("llama")
    model.base_model.attach_router(router_for("llama", "layers", top_k=2))
    for each in (model, stock):
        each.set_adapter("expert_1")
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, **CLOSE)


def test_an_active_expert_that_the_router_does_not_know_is_an_error_when_it_is_used(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(FixedRouter(["expert_0", "expert_1"]))
    with pytest.raises(ValueError, match=r"\['expert_2'\] are active, but the router knows only"):
        model(ids)


def test_another_module_serves_get_routing_weights_alone(make_lora, ids):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 3)

        def forward(self, hidden_states):
            return self.gate(hidden_states).softmax(-1)

    model, gate = adopt(make_lora("llama")), Gate()
    plain = model(ids, output_hidden_states=True)
    model.base_model.attach_router(gate)
    assert torch.equal(model(ids).logits, plain.logits)
    hidden = plain.hidden_states[-1]
    w = model.base_model.get_routing_weights(hidden)
    assert torch.equal(w, gate(hidden))
    assert not torch.allclose(model(ids, routing_weights=w).logits, plain.logits)


def test_get_routing_weights_gives_columns_for_the_active_experts(make_lora):
    model = adopt(make_lora("llama"))
    hidden = torch.randn(2, 5, 32)
    assert model.base_model.get_routing_weights(hidden) is None
    router = router_for("llama", "layers")
    model.base_model.attach_router(router)
    torch.testing.assert_close(model.get_routing_weights(hidden), router(hidden, layer=2))
    model.base_model.set_adapter(["expert_2", "expert_1"])
    torch.testing.assert_close(model.get_routing_weights(hidden), router(hidden, active=[2, 1]))


class TestLife:
    @pytest.fixture
    def model(self, make_lora):
        return adopt(make_lora("llama"))

    def test_attach_adds_its_state_under_router_and_detach_takes_it_away(self, model):
        before = list(model.state_dict())
        assert not model.base_model.has_router()
        assert model.base_model.router is None
        router = router_for("llama", "layers")
        model.base_model.attach_router(router)
        assert model.base_model.has_router()
        assert model.base_model.router is router
        added = [name for name in model.state_dict() if name not in before]
        assert added == [f"base_model.router.{name}" for name in router.state_dict()]
        model.base_model.detach_router()
        assert list(model.state_dict()) == before
        assert model.base_model.router is None

    def test_a_detached_model_runs_plain(self, model, ids):
        plain = model(ids).logits
        model.base_model.attach_router(router_for("llama", "layers"))
        model.base_model.detach_router()
        model.base_model.detach_router()
        assert torch.equal(model(ids).logits, plain)
        assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))

    def test_the_router_follows_dtype_and_mode(self, model):
        router = router_for("llama", "layers")
        model.base_model.attach_router(router)
        assert not router.training
        model.train()
        assert router.training
        model.eval()
        assert not router.training
        model.double()
        assert all(p.dtype is torch.float64 for p in router.parameters())

    def test_a_second_router_replaces_the_first_with_a_warning(self, model):
        model.base_model.attach_router(router_for("llama", "layers"))
        second = router_for("llama", "embeddings")
        with pytest.warns(UserWarning, match="replaced"):
            model.base_model.attach_router(second)
        assert model.base_model.router is second
        assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))

    def test_it_reads_embeddings_that_take_the_place_of_others(self, model, ids):
        model.base_model.attach_router(router_for("llama", "embeddings"))
        model(ids)
        others = nn.Embedding(97, 32)
        model.get_base_model().set_input_embeddings(others)
        got = model(ids).logits
        weights = model.get_routing_weights(others(ids))
        torch.testing.assert_close(got, model(ids, routing_weights=weights).logits, **CLOSE)
        model.base_model.detach_router()
        assert not others._forward_hooks

    def test_an_adapter_that_saves_the_embeddings_copies_them_without_the_model(self, model, ids):
        model.base_model.attach_router(router_for("llama", "embeddings"))
        before = model(ids).logits
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        model.add_adapter("later", config)
        copied = model.get_input_embeddings().modules_to_save["later"]
        assert not copied._forward_hooks  # one of the model's own would bring a copy of the model
        assert torch.equal(model(ids).logits, before)

    def test_it_acts_on_where_an_adapter_could_not_be_added(self, model, ids):
        model.base_model.attach_router(router_for("llama", "embeddings"))
        before = model(ids).logits
        with pytest.raises(ValueError, match="LlamaRMSNorm"):  # a layer that no LoRA can be over
            model.add_adapter("later", peft.LoraConfig(target_modules=["input_layernorm"]))
        assert torch.equal(model(ids).logits, before)

    def test_a_submodule_of_the_model_is_no_router(self, model):
        with pytest.raises(ValueError, match="submodule of the model already"):
            model.base_model.attach_router(decoder_layers(model)[0].mlp)

    @pytest.mark.parametrize("router", [None, "gate", lambda x: x, torch.ones(3)])
    def test_only_modules_are_routers(self, model, router):
        with pytest.raises(TypeError, match=r"router must be a torch.nn.Module"):
            model.base_model.attach_router(router)

    def test_the_config_must_be_one_of_a_mixture(self, model):
        with pytest.raises(TypeError, match="moe_config must be a MoELoraConfig"):
            model.base_model.attach_router(router_for("llama", "layers"), {"num_experts": 3})
        assert not model.base_model.has_router()

    def test_the_config_is_kept(self, model):
        assert model.base_model.moe_config is None
        config = MoELoraConfig(num_experts=3)
        model.base_model.attach_router(router_for("llama", "layers"), config)
        assert model.base_model.moe_config is config

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: PerLayerRouter(NAMES, 32, num_layers=4), "has gates for 4 layers, the model has 3"),
            (lambda: HiddenStateRouter(NAMES, 32, layer=3), "reads layer 3, the model has 3"),
            (lambda: EmbeddingRouter(NAMES, 24), "inputs of width 24"),
        ],
    )
    def test_a_router_for_another_model_is_refused(self, model, make, message):
        with pytest.raises(ValueError, match=message):
            model.base_model.attach_router(make())
        assert not model.base_model.has_router()

    def test_what_peft_would_save_with_the_adapters_is_refused(self, model):
        router = nn.ModuleDict({"lora_gate": nn.Linear(32, 3)})
        with pytest.raises(ValueError, match="rename without 'lora_'"):
            model.base_model.attach_router(router)
        model.peft_config["expert_1"].bias = "all"
        with pytest.raises(ValueError, match="bias='all'"):
            model.base_model.attach_router(router_for("llama", "layers"))

    def test_the_router_is_not_in_adapter_files(self, model, tmp_path):
        from safetensors.torch import load_file

        model.base_model.attach_router(router_for("llama", "layers"))
        model.save_pretrained(tmp_path)
        for name in NAMES:
            tensors = load_file(tmp_path / name / "adapter_model.safetensors")
            assert len(tensors) == 42
            assert all(".lora_A." in key or ".lora_B." in key for key in tensors)

    def test_readers_of_tokens_are_refused_on_encoder_decoder_models(self, make_lora):
        t5 = adopt(make_lora("t5"))
        with pytest.raises(ValueError, match="one stack of decoder layers"):
            t5.base_model.attach_router(EmbeddingRouter(NAMES, 24))
        t5.base_model.attach_router(FixedRouter(NAMES))
        assert torch.isfinite(t5(torch.ones(2, 4).long(), labels=torch.ones(2, 3).long()).logits).all()

    def test_a_router_may_be_any_subclass(self, model, ids):
        class ByLuck(Router):
            """Equal shares of its first two experts."""

            reads = "layer"
            layer = 0

            def route(self, hidden_states, attention_mask=None, *, layer=None, active=None):
                weights = torch.tensor([0.5, 0.5, 0.0])[list(active)].expand(*hidden_states.shape[:-1], len(active))
                sums = weights.sum((0, 1))
                return RoutingOutput(weights, None, sums.long(), sums, weights, hidden_states.shape[:-1].numel())

        expected = model(ids, routing_weights=torch.tensor([0.5, 0.5, 0.0])).logits
        model.base_model.attach_router(ByLuck(NAMES))
        torch.testing.assert_close(model(ids).logits, expected)


class TestLoss:
    @pytest.fixture
    def model(self, make_lora):
        return adopt(make_lora("llama")).train()

    @pytest.mark.parametrize("formula", ["aux_loss", "z_loss", "switch"])
    def test_it_is_reported_and_added_in_training_when_labels_are_given(self, model, ids, formula):
        router = router_for("llama", "layers", top_k=2)
        model.base_model.attach_router(router, MoELoraConfig(load_balance_loss_type=formula, router_aux_loss_coef=0.5))
        out = model(ids, labels=ids)
        outputs = []
        route = router.route
        router.route = lambda *args, **kwargs: outputs.append(route(*args, **kwargs)) or outputs[-1]
        again = model(ids)
        assert len(outputs) == 3
        torch.testing.assert_close(out.router_aux_loss, router_aux_loss(outputs, formula))
        shift = nn.functional.cross_entropy(again.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, shift + 0.5 * out.router_aux_loss)

    def test_it_is_only_reported_in_evaluation_and_without_labels(self, model, ids):
        model.base_model.attach_router(router_for("llama", "layers"), MoELoraConfig(router_aux_loss_coef=10.0))
        out = model(ids)
        assert out.router_aux_loss > 0
        assert out.loss is None
        model.eval()
        out = model(ids, labels=ids)
        shift = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, shift)
        assert out.router_aux_loss > 0
        assert "router_aux_loss" not in list(out)  # Trainer would take it for predictions

    def test_a_coefficient_of_zero_leaves_the_loss_alone(self, model, ids):
        router = router_for("llama", "layers", top_k=2)
        model.base_model.attach_router(router, MoELoraConfig(router_aux_loss_coef=0.0))
        out = model(ids, labels=ids)
        shift = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, shift)
        weight = router.gate[0].weight
        (alone,) = torch.autograd.grad(out.loss, weight, retain_graph=True)
        (added,) = torch.autograd.grad(out.loss + 3 * out.router_aux_loss, weight)  # who adds it may
        assert alone.any() and not torch.equal(alone, added)

    def test_explicit_weights_have_none(self, model, ids, weights):
        model.base_model.attach_router(router_for("llama", "layers"), MoELoraConfig(router_aux_loss_coef=10.0))
        out = model(ids, labels=ids, routing_weights=weights)
        assert not hasattr(out, "router_aux_loss")

    def test_padding_does_not_count(self, model, ids):
        model.base_model.attach_router(router_for("llama", "embeddings"))
        mask = torch.ones_like(ids)
        mask[:, :3] = 0
        padded = model(ids, attention_mask=mask).router_aux_loss
        torch.testing.assert_close(padded, model(ids[:, 3:]).router_aux_loss)

    def test_the_config_of_the_adapters_is_used_where_none_is_given_with_the_router(self, make_base, ids):
        config = MoELoraConfig(
            num_experts=3, router_aux_loss_coef=2.0, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        model = moelora.get_peft_model(make_base("llama"), config).train()
        model.base_model.detach_router()
        router = router_for("llama", "layers")
        model.base_model.attach_router(router)
        assert model.base_model.moe_config.router_aux_loss_coef == 2.0
        out = model(ids, labels=ids)
        shift = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, shift + 2 * out.router_aux_loss)

    def test_it_is_in_the_loss_of_a_tuple_too(self, model, ids):
        model.base_model.attach_router(router_for("llama", "layers"), MoELoraConfig(router_aux_loss_coef=10.0))
        expected = model(ids, labels=ids)
        loss, logits = model(ids, labels=ids, return_dict=False, use_cache=False)
        assert torch.equal(loss, expected.loss)
        assert torch.equal(logits, expected.logits)

    def test_disabled_adapters_have_none(self, model, ids):
        model.base_model.attach_router(router_for("llama", "layers"), MoELoraConfig(router_aux_loss_coef=10.0))
        with model.disable_adapter():
            out = model(ids, labels=ids)
        assert not hasattr(out, "router_aux_loss")


def test_the_model_inside_routes_too(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(router_for("llama", "layers"))
    assert torch.equal(model.get_base_model()(ids).logits, model(ids).logits)


def test_a_router_without_a_gate_for_the_gradient_still_trains_the_experts(make_lora, ids):
    model = adopt(make_lora("llama")).train()
    model.base_model.attach_router(FixedRouter(NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_learned_routers_share_one_base():
    assert all(issubclass(c, LearnedRouter) for c in (EmbeddingRouter, HiddenStateRouter, PerLayerRouter))
    assert copy.copy(FixedRouter(["a", "b"])).reads == "nothing"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reads", ["embeddings", "layer", "layers"])
def test_it_acts_where_the_model_without_its_head_is_called(kind, make_lora, ids, gradients, reads, checkpointing):
    """As trainers call it that compute the logits themselves."""

    def step(call):
        model = adopt(make_lora(kind)).train()
        model.base_model.attach_router(router_for(kind, reads))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hidden_states = call(model)
        hidden_states.square().sum().backward()
        return {"hidden_states": hidden_states.detach()} | gradients(model)

    got = step(lambda model: model.get_base_model().base_model(ids, use_cache=False).last_hidden_state)
    expected = step(lambda model: model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1])
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
