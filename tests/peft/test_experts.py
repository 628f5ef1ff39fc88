"""Experts are added, activated, frozen, renamed and removed, and everything else stays what it is."""

import ast
import copy
import math
import pickle
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn

import moelora
from moelora import MoELoraConfig, PeftModel, activate_all_experts, adopt, release
from moelora.nn import parameter_groups
from moelora.nn.routers import (
    EmbeddingRouter,
    FixedRouter,
    HiddenStateRouter,
    LastHiddenRouter,
    PerLayerRouter,
    Router,
)
from moelora.peft.inspection import inspect_checkpoint

NAMES = ["expert_0", "expert_1", "expert_2"]

ROUTERS = {
    "per layer, top 2": lambda names: PerLayerRouter(names, 32, num_layers=3, top_k=2, temperature=0.7),
    "per layer, capacity and dropout": lambda names: PerLayerRouter(
        names, 32, num_layers=3, top_k=2, capacity_factor=0.7, expert_dropout=0.3
    ),
    "embeddings, an MLP": lambda names: EmbeddingRouter(names, 32, mlp_dim=5),
    "layer 1": lambda names: HiddenStateRouter(names, 32, layer=1),
    "two passes": lambda names: LastHiddenRouter(names, 32, top_k=1),
    "fixed": lambda names: FixedRouter(names, range(1, len(names) + 1)),
}


def attach(model, way, names=NAMES):
    torch.manual_seed(3)
    router = ROUTERS[way](names)
    model.base_model.attach_router(router.train(model.training))
    return router


def amplify(model, name):
    """Let an expert matter: its B starts with zeros."""
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}." in key or key.endswith(f"lora_embedding_B.{name}"):
            nn.init.normal_(parameter, std=0.3)


def prefer(router, name):
    """Let a learned router give an expert most of the weight, wherever it may."""
    for gate in router.modules():
        if isinstance(gate, nn.Linear) and gate.out_features == router.num_experts:
            nn.init.constant_(gate.bias[router.column(name)], 5.0)


def of_expert(model, name):
    return {key: p for key, p in model.named_parameters() if f".{name}." in key or key.endswith(f".{name}")}


def trainable(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def looks(model):
    """All that a refused change must leave alone."""
    tuner = model.base_model
    router = tuner.router
    layers = {name: (type(m), getattr(m, "training", None)) for name, m in model.named_modules()}
    kept = {name: (dict(m.r), dict(m.scaling), list(m.active_adapters)) for name, m in named_layers(model)}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    names = None if not isinstance(router, Router) else (list(router.expert_names), router.activated.tolist())
    configs = {name: (id(config), copy.deepcopy(vars(config))) for name, config in tuner.peft_config.items()}
    return layers, kept, parameters, names, configs, tuner.active_adapters, tuner.frozen_experts, list(tuner._routed)


def named_layers(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.fixture
def model(make_lora):
    return adopt(make_lora("llama", lora_dropout=0.1))


class TestAnAddedExpert:
    @pytest.mark.parametrize("mode", ["eval", "train", "generate"])
    @pytest.mark.parametrize("way", [*ROUTERS, "weights", "plain sum"])
    def test_changes_no_bit_of_the_outputs_until_it_is_activated(self, model, ids, weights, way, mode):
        model.train(mode == "train")
        if way in ROUTERS:
            attach(model, way)
        options = {"routing_weights": weights} if way == "weights" else {}

        def outputs():
            torch.manual_seed(8)
            if mode == "generate":
                return model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, **options)
            return model(ids, **options).logits

        before = outputs()
        model.base_model.add_expert("new", maturity=0.5 if way not in ("fixed", "weights", "plain sum") else None)
        amplify(model, "new")
        if way in ROUTERS:
            prefer(model.base_model.router, "new")
        assert torch.equal(outputs(), before)
        assert model.base_model.active_adapters == NAMES
        if mode == "generate" or way == "fixed":
            return
        model.base_model.activate_expert("new")
        if way == "weights":
            options = {"routing_weights": torch.cat([weights, weights[..., :1]], -1)}
        assert not torch.equal(outputs(), before)

    @pytest.mark.parametrize("way", ROUTERS)
    def test_and_activated_is_what_a_model_made_with_it_has(self, model, make_lora, ids, way):
        attach(model, way)
        model.base_model.add_expert("expert_3", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        amplify(model, "expert_3")
        model.base_model.activate_expert("expert_3")
        if way == "fixed":
            model.base_model.router.weights[3] = 0.5

        stock = make_lora("llama", lora_dropout=0.1)
        stock.add_adapter("expert_3", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        made = adopt(stock)
        activate_all_experts(made)
        attach(made, way, [*NAMES, "expert_3"])
        assert list(made.state_dict()) == list(model.state_dict())
        made.load_state_dict(model.state_dict())
        made.base_model.router.load_state_dict(model.base_model.router.state_dict())
        assert torch.equal(model(ids).logits, made(ids).logits)

    @pytest.mark.parametrize("way", ROUTERS)
    def test_is_the_only_one_when_it_alone_is_set(self, model, make_lora, ids, way):
        attach(model, way)
        model.base_model.add_expert("new")
        amplify(model, "new")
        model.set_adapter("new")
        stock = make_lora("llama")
        stock.add_adapter("new", stock.peft_config["expert_0"])
        stock.load_state_dict(model.state_dict(), strict=False)
        stock.set_adapter("new")
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
        model.train()
        model(ids, labels=ids).loss.backward()
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}
        assert with_gradient == of_expert(model, "new").keys()

    @pytest.mark.parametrize("way", ROUTERS)
    def test_that_is_set_beside_others_weighs_nothing_before_it_is_activated(self, model, ids, way):
        attach(model, way)
        before = model(ids).logits
        model.base_model.add_expert("new")
        amplify(model, "new")
        model.base_model.set_adapter([*NAMES, "new"])
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)

    def test_keeps_every_parameter_and_its_gradient_setting(self, model):
        attach(model, "per layer, top 2")
        model.base_model.router.gate[1].requires_grad_(False)
        model.set_adapter("expert_1")
        before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
        model.base_model.add_expert("new")
        for name, (parameter, required) in before.items():
            now = model.get_parameter(name)
            assert now.requires_grad == required, name
            assert (now is parameter) != (".router." in name), name
        assert of_expert(model, "new")
        assert all(p.requires_grad for p in of_expert(model, "new").values())

    def test_of_a_model_opened_for_inference_can_be_trained(self, model, tmp_path, make_base):
        attach(model, "per layer, top 2")
        model.save_pretrained(tmp_path)
        opened = moelora.PeftModel.from_pretrained(make_base("llama"), tmp_path)
        opened.base_model.add_expert("new")
        assert [name for name, required in trainable(opened).items() if required] == list(of_expert(opened, "new"))
        opened.base_model.activate_expert("new")
        assert [name for name, required in trainable(opened).items() if required] == list(of_expert(opened, "new"))

    def test_has_the_configuration_of_the_first_or_its_own_and_the_callers_stay_as_they_are(self, make_base):
        given = MoELoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], num_experts=3, top_k_experts=3)
        model = moelora.get_peft_model(make_base("llama"), given)
        tuner = model.base_model
        tuner.add_expert("new")
        own = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], inference_mode=True)
        tuner.add_expert("wider", own)
        assert own.inference_mode
        assert given.num_experts == 3
        assert (tuner.peft_config["new"].r, tuner.peft_config["wider"].r) == (4, 2)
        assert {config.num_experts for config in tuner.peft_config.values() if hasattr(config, "num_experts")} == {5}
        assert tuner.moe_config.num_experts == 5
        for name in ("new", "wider", "expert_0", "expert_2"):
            tuner.remove_expert(name) if name in tuner.active_adapters else tuner.delete_adapter(name)
        assert tuner.active_adapters == ["expert_1"]
        assert (tuner.moe_config.num_experts, tuner.moe_config.top_k_experts) == (2, 2)
        tuner.moe_config.__post_init__()  # it is a valid one

    def test_has_the_dropout_of_the_mode_that_its_layer_is_in(self, model, ids):
        model.base_model.add_expert("new")
        amplify(model, "new")
        model.base_model.activate_expert("new")
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("cast", [True, False])
    def test_has_the_dtype_that_peft_would_give_it(self, make_base, cast):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        model = moelora.get_peft_model(make_base("llama").bfloat16(), config, autocast_adapter_dtype=cast)
        model.base_model.add_expert("new", autocast_adapter_dtype=cast)
        model.add_adapter("stock", config, autocast_adapter_dtype=cast)
        dtypes = [{p.dtype for p in of_expert(model, name).values()} for name in ("new", "stock", "default")]
        assert dtypes == [{torch.float32 if cast else torch.bfloat16}] * 3

    def test_leaves_a_router_that_is_no_moelora_router_to_its_owner(self, model, ids):
        model.base_model.attach_router(nn.Linear(32, 3))
        model.base_model.add_expert("new")
        hidden = torch.randn(2, 7, 32)
        weights = model.base_model.get_routing_weights(hidden)
        model(ids, routing_weights=weights)
        model.base_model.activate_expert("new")
        with pytest.raises(ValueError, match="one column for each active adapter"):
            model(ids, routing_weights=weights)

    def test_can_be_read_from_the_checkpoint_of_an_adapter(self, model, make_lora, tmp_path, ids):
        stock = make_lora("llama", n=1)
        stock.save_pretrained(tmp_path)
        attach(model, "fixed")
        model.base_model.add_expert("new")
        model.load_adapter(tmp_path / "expert_0", "new", is_trainable=True)
        model.base_model.activate_expert("new")
        model.base_model.router.weights.copy_(torch.tensor([0.0, 0, 0, 1]))
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


BAD_EXPERTS = {
    "a name that is no string": (lambda t: t.add_expert(3), TypeError, "must be a string, got int"),
    "a name that is there": (lambda t: t.add_expert("expert_1"), ValueError, "there is an expert 'expert_1' already"),
    "no name": (lambda t: t.add_expert(""), ValueError, "can't be called ''"),
    "a name with a dot": (lambda t: t.add_expert("v1.2"), ValueError, "can't be called 'v1.2'"),
    "an attribute as name": (lambda t: t.add_expert("values"), ValueError, "can't be called 'values'"),
    "no configuration": (lambda t: t.add_expert("new", {"r": 4}), TypeError, "config must be a PeftConfig, got dict"),
    "another type": (lambda t: t.add_expert("new", peft.LoHaConfig()), ValueError, "must be of type .*LORA"),
    "modules of its own": (
        lambda t: t.add_expert("new", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ValueError,
        r"modules_to_save=\['lm_head'\]: .*requires_grad_",
    ),
    "tokens of its own": (
        lambda t: t.add_expert("new", LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])),
        ValueError,
        r"trainable_token_indices=\[1, 2\]: .*requires_grad_",
    ),
    "other layers of the base": (
        lambda t: t.add_expert("new", LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)])),
        ValueError,
        "layer_replication=.*, which changes the base of all experts",
    ),
    "the biases of the router": (
        lambda t: t.add_expert("new", LoraConfig(target_modules=["q_proj"], bias="all")),
        ValueError,
        "would be saved with the router's biases",
    ),
    "another base": (
        lambda t: t.add_expert("new", LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4")),
        ValueError,
        "init_lora_weights='pissa_niter_4', which changes the base weights",
    ),
    "no such modules": (lambda t: t.add_expert("new", LoraConfig(target_modules=["x"])), ValueError, "not found in"),
    "half of it": (
        lambda t: t.add_expert("new", LoraConfig(target_modules="all-linear", rank_pattern={"v_proj": -1})),
        ValueError,
        "positive integer",
    ),
    "half of it, on modules without adapters": (
        lambda t: t.add_expert("new", LoraConfig(target_modules=["embed_tokens", "lm_head"], use_dora=True, r=-2)),
        ValueError,
        "positive integer",
    ),
    "a maturity that is none": (lambda t: t.add_expert("new", maturity=2.0), ValueError, "maturity must lie in"),
    "a column that is there": (
        lambda t: (t.router.add_expert("new"), t.add_expert("new"))[0],
        ValueError,
        "the router has a column for 'new' already",
    ),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_an_expert_that_is_refused_leaves_nothing_behind(make_lora, ids, case):
    add, error, message = BAD_EXPERTS[case]
    model = adopt(make_lora("llama", target_modules=["q_proj", "v_proj"]))
    attach(model, "embeddings, an MLP")
    model.set_adapter("expert_1")
    model.base_model.freeze_expert("expert_2")
    if case == "a column that is there":
        model.base_model.router.add_expert("new")
        add, logits = (lambda t: t.add_expert("new")), model(ids).logits
    before, logits = looks(model), model(ids).logits
    with pytest.raises(error, match=message):
        add(model.base_model)
    assert looks(model) == before
    assert torch.equal(model(ids).logits, logits)
    model.base_model.add_expert("another", LoraConfig(target_modules=["q_proj", "o_proj"]))
    model(ids)


def test_a_maturity_needs_a_router_that_has_it(model):
    for router in (None, FixedRouter(NAMES), nn.Linear(32, 3)):
        if router is not None:
            model.base_model.detach_router()
            model.base_model.attach_router(router)
        with pytest.raises(ValueError, match=f"maturity=0.5 needs a router that has it, got {type(router).__name__}"):
            model.base_model.add_expert("new", maturity=0.5)
        with pytest.raises(ValueError, match=f"needs a learned moelora router, got {type(router).__name__}"):
            model.base_model.mark_mature("expert_0")


def test_a_maturity_is_the_routers(model, ids):
    attach(model, "per layer, top 2")
    tuner = model.base_model
    tuner.add_expert("new", maturity=0.25)
    assert tuner.router.maturity.tolist() == [1, 1, 1, 0.25]
    tuner.activate_expert("new")
    amplify(model, "new")
    young = model(ids).logits
    tuner.mark_mature("new")
    assert not torch.equal(model(ids).logits, young)
    tuner.mark_mature("expert_0", 0.5)
    assert tuner.router.maturity.tolist() == [0.5, 1, 1, 1]
    with pytest.raises(ValueError, match="no expert 'other'"):
        tuner.mark_mature("other")


class TestARemovedExpert:
    @pytest.mark.parametrize("way", ROUTERS)
    @pytest.mark.parametrize("stock", [False, True])
    def test_leaves_what_a_model_made_without_it_has(self, model, make_lora, ids, way, stock):
        attach(model, way)
        (model.delete_adapter if stock else model.base_model.remove_expert)("expert_1")
        assert model.base_model.active_adapters == ["expert_0", "expert_2"]

        made = make_lora("llama", n=3, lora_dropout=0.1)
        made.delete_adapter("expert_1")
        adopt(made)
        attach(made, way, ["expert_0", "expert_2"])
        assert list(made.state_dict()) == list(model.state_dict())
        made.load_state_dict(model.state_dict())
        made.base_model.router.load_state_dict(model.base_model.router.state_dict())
        assert torch.equal(model(ids).logits, made(ids).logits)

    def test_leaves_the_gradient_settings_of_the_others(self, model):
        attach(model, "per layer, top 2")
        model.requires_grad_(False)
        for parameter in of_expert(model, "expert_2").values():
            parameter.requires_grad_(True)
        before = trainable(model)
        model.base_model.remove_expert("expert_0")
        after = trainable(model)
        assert after == {name: before[name] for name in after}
        assert not of_expert(model, "expert_0")

    def test_that_the_peft_model_took_for_the_active_one_is_no_obstacle(self, model, ids, weights):
        assert model.active_adapter == "expert_0"
        expected = model(ids, routing_weights=weights * torch.tensor([0.0, 1, 1])).logits
        model.base_model.remove_expert("expert_0")
        assert model.active_adapter == "expert_1"
        torch.testing.assert_close(model(ids, routing_weights=weights[..., 1:]).logits, expected)
        release(model)
        assert model.active_adapter == "expert_1"
        model(ids)

    def test_that_was_not_active_changes_no_bit(self, model, ids):
        attach(model, "per layer, top 2")
        model.base_model.set_adapter(["expert_2", "expert_0"])
        before = model(ids).logits
        model.base_model.remove_expert("expert_1")
        assert model.base_model.active_adapters == ["expert_2", "expert_0"]
        torch.testing.assert_close(model(ids).logits, before)

    def test_leaves_no_more_to_pick_than_there_are(self, make_base, ids):
        config = MoELoraConfig(r=2, target_modules=["q_proj"], num_experts=3, top_k_experts=3)
        model = moelora.get_peft_model(make_base("llama"), config)
        model.base_model.remove_expert("expert_2")
        assert (model.base_model.moe_config.num_experts, model.base_model.moe_config.top_k_experts) == (2, 2)
        assert model.base_model.router.top_k == 2
        model.base_model.remove_expert("expert_0")
        model(ids)

    def test_is_refused_where_nothing_would_be_left(self, model, ids):
        tuner = model.base_model
        attach(model, "fixed")
        with pytest.raises(
            ValueError, match=r"there is no expert 'other', only \['expert_0', 'expert_1', 'expert_2'\]"
        ):
            tuner.remove_expert("other")
        tuner.set_adapter("expert_1")
        with pytest.raises(ValueError, match="'expert_1' is the only active expert: activate another one first"):
            tuner.remove_expert("expert_1")
        tuner.merge_adapter(["expert_2"])
        with pytest.raises(ValueError, match="'expert_2' is merged into the base"):
            tuner.remove_expert("expert_2")
        tuner.unmerge_adapter()
        tuner.detach_router()
        tuner.attach_router(FixedRouter(["expert_2"]))
        with pytest.raises(ValueError, match="'expert_2' is the router's only expert: detach the router first"):
            tuner.remove_expert("expert_2")
        assert list(tuner.peft_config) == NAMES
        tuner.detach_router()
        tuner.remove_expert("expert_2")
        tuner.remove_expert("expert_0")
        with pytest.raises(ValueError, match="'expert_1' is the only expert"):
            tuner.remove_expert("expert_1")
        model(ids)

    def test_that_was_the_routers_only_one_takes_the_router_along_when_peft_deletes_it(self, model, ids):
        model.base_model.attach_router(FixedRouter(["expert_2"]))
        with pytest.warns(UserWarning, match="the router's only expert 'expert_2' is deleted"):
            model.delete_adapter("expert_2")
        assert not model.base_model.has_router()
        model(ids)


class TestARenamedExpert:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_keeps_bits_order_and_parameters(self, make_lora, ids, weights, kind):
        targets = {"target_modules": ["wte", "c_attn"] if kind == "gpt2" else ["embed_tokens", "q_proj", "v_proj"]}
        model = adopt(make_lora(kind, lora_dropout=0.1, lora_bias=False, **targets))
        for name in NAMES:
            amplify(model, name)
        tuner = model.base_model
        tuner.attach_router(FixedRouter(NAMES, [1, 2, 3]))
        tuner.freeze_expert("expert_1")
        routed, given = model(ids).logits, model(ids, routing_weights=weights).logits
        parameters = dict(model.named_parameters())
        statuses = model.get_layer_status()
        tuner.rename_expert("expert_1", "poems")
        names = ["expert_0", "poems", "expert_2"]
        assert torch.equal(model(ids).logits, routed)
        assert torch.equal(model(ids, routing_weights=weights).logits, given)
        assert (list(tuner.peft_config), tuner.active_adapters) == (names, names)
        assert (tuner.router.expert_names, tuner.frozen_experts) == (names, {"poems"})
        assert model.peft_config is tuner.model.peft_config
        renamed = {key.replace("expert_1", "poems"): p for key, p in parameters.items()}
        assert list(renamed) == [key for key, _ in model.named_parameters()]
        assert all(model.get_parameter(key) is p for key, p in renamed.items())
        for before, after in zip(statuses, model.get_layer_status(), strict=True):
            wanted = ast.literal_eval(repr(vars(before)).replace("expert_1", "poems"))
            assert vars(after) == wanted | {"available_adapters": sorted(names)}
        for _, layer in named_layers(model):
            for kept in (layer.r, layer.scaling, layer.lora_alpha, layer.lora_dropout, layer.use_rslora):
                assert list(kept) == names

    @pytest.mark.parametrize("method", ["lora", "dora"])
    def test_is_known_to_stock_peft_by_its_new_name(self, model, make_lora, make_base, ids, tmp_path, method):
        if method == "dora":
            model = adopt(make_lora("llama", use_dora=True, target_modules=["q_proj"]))
        model.set_adapter("expert_1")
        amplify(model, "expert_1")
        expected = model(ids).logits
        model.base_model.rename_expert("expert_1", "poems")
        assert model.active_adapter == "poems"
        assert torch.equal(model(ids).logits, expected)
        model.save_pretrained(tmp_path, selected_adapters=["poems"])
        opened = peft.PeftModel.from_pretrained(make_base("llama"), tmp_path / "poems")
        torch.testing.assert_close(opened(ids).logits, expected)
        release(model)
        model.set_adapter("expert_0")
        model.set_adapter("poems")
        assert torch.equal(model(ids).logits, expected)
        model.delete_adapter("poems")
        assert "poems" not in "".join(model.state_dict())

    def test_can_be_unmerged(self, model, ids):
        expected = model(ids).logits
        model.merge_adapter(["expert_1"])
        model.base_model.rename_expert("expert_1", "poems")
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)

    def test_trains_on_with_its_optimizer(self, model, ids):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        other = copy.deepcopy(model)
        other_optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            for net, opt in ((model, optimizer), (other, other_optimizer)):
                opt.zero_grad()
                net(ids, labels=ids, routing_weights=torch.tensor([0.5, 0.3, 0.2])).loss.backward()
                opt.step()
            if step == 1:
                model.base_model.rename_expert("expert_0", "first")
        assert torch.equal(model(ids).logits, other(ids).logits)

    @pytest.mark.parametrize(
        ("old", "new", "error", "message"),
        [
            ("other", "x", ValueError, "there is no expert 'other'"),
            ("expert_0", "expert_2", ValueError, "there is an expert 'expert_2' already"),
            ("expert_0", "expert_0", ValueError, "there is an expert 'expert_0' already"),
            ("expert_0", "a.b", ValueError, "can't be called 'a.b'"),
            ("expert_0", "keys", ValueError, "can't be called 'keys'"),
            ("expert_0", None, TypeError, "must be a string, got NoneType"),
            ("expert_0", "later", ValueError, "the router has an expert 'later' already"),
        ],
    )
    def test_is_refused_names_that_can_not_be(self, model, old, new, error, message):
        model.base_model.attach_router(FixedRouter([*NAMES, "later"]))
        before = looks(model)
        with pytest.raises(error, match=message):
            model.base_model.rename_expert(old, new)
        assert looks(model) == before


class TestAFrozenExpert:
    WAYS = {
        "freeze": lambda model, folder: None,
        "set_adapter of one": lambda model, folder: model.set_adapter("expert_1"),
        "set_adapter of all": lambda model, folder: model.base_model.set_adapter(NAMES),
        "activate_all_experts": lambda model, folder: activate_all_experts(model),
        "activate_expert": lambda model, folder: (
            model.base_model.set_adapter(["expert_0", "expert_2"]),
            model.base_model.activate_expert("expert_1"),
        ),
        "add_expert": lambda model, folder: model.base_model.add_expert("new"),
        "remove_expert": lambda model, folder: model.base_model.remove_expert("expert_0"),
        "delete_adapter": lambda model, folder: model.delete_adapter("expert_0"),
        "set_requires_grad": lambda model, folder: model.set_requires_grad(["expert_0", "expert_1"]),
        "load_adapter": lambda model, folder: model.load_adapter(folder / "expert_0", "expert_1", is_trainable=True),
        "load_adapter of another": lambda model, folder: model.load_adapter(
            folder / "expert_0", "x", is_trainable=True
        ),
        "disable_adapter": lambda model, folder: model.disable_adapter().__enter__() or model.enable_adapter_layers(),
        "adopt": lambda model, folder: adopt(model),
    }

    @pytest.mark.parametrize("way", WAYS)
    def test_is_trained_by_nothing_but_unfreeze_expert(self, model, tmp_path, way):
        model.save_pretrained(tmp_path)
        model.base_model.freeze_expert("expert_1")
        self.WAYS[way](model, tmp_path)
        assert not any(p.requires_grad for p in of_expert(model, "expert_1").values())
        if way != "set_adapter of one":
            assert all(p.requires_grad for p in of_expert(model, "expert_2").values())
        model.base_model.unfreeze_expert("expert_1")
        assert all(p.requires_grad for p in of_expert(model, "expert_1").values())
        assert not model.base_model.frozen_experts

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_takes_part_and_only_its_own_gradients_are_missing(self, model, ids, gradients, checkpointing):
        attach(model, "per layer, top 2")
        free = copy.deepcopy(model)
        model.base_model.freeze_expert("expert_1")
        for net in (model, free):
            net.train()
            if checkpointing:
                net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        out = model(ids, labels=ids)
        torch.manual_seed(1)
        expected = free(ids, labels=ids)
        torch.testing.assert_close(out.logits, expected.logits)
        out.loss.backward()
        expected.loss.backward()
        got, wanted = gradients(model), gradients(free)
        frozen = of_expert(model, "expert_1").keys()
        assert got.keys() == wanted.keys() - frozen
        assert wanted.keys() > frozen
        for name in got:
            torch.testing.assert_close(got[name], wanted[name])

    def test_is_forgotten_when_it_is_removed(self, model):
        model.base_model.freeze_expert("expert_1")
        model.base_model.remove_expert("expert_1")
        model.base_model.add_expert("expert_1")
        assert all(p.requires_grad for p in of_expert(model, "expert_1").values())

    def test_has_to_be_there(self, model):
        for method in (model.base_model.freeze_expert, model.base_model.unfreeze_expert):
            with pytest.raises(ValueError, match="there is no expert 'other'"):
                method("other")


class TestAnActivatedExpert:
    def test_has_the_last_column_and_leaves_the_others_as_they_are(self, model, ids):
        tuner = model.base_model
        tuner.set_adapter(["expert_2", "expert_0"])
        tuner.set_requires_grad("expert_2", False)
        tuner.activate_expert("expert_1")
        assert tuner.active_adapters == ["expert_2", "expert_0", "expert_1"]
        required = [all(p.requires_grad for p in of_expert(model, name).values()) for name in NAMES]
        assert required == [True, True, False]
        assert {tuple(layer.active_adapters) for _, layer in named_layers(model)} == {
            ("expert_2", "expert_0", "expert_1")
        }
        tuner.activate_expert("expert_1")
        assert tuner.active_adapters == ["expert_2", "expert_0", "expert_1"]

    def test_has_to_be_there_and_known_to_the_router(self, model):
        model.add_adapter("x", copy.deepcopy(model.peft_config["expert_0"]))
        attach(model, "per layer, top 2")
        before = looks(model)
        with pytest.raises(ValueError, match="there is no expert 'other'"):
            model.base_model.activate_expert("other")
        with pytest.raises(ValueError, match="the router has no expert 'x'"):
            model.base_model.activate_expert("x")
        assert looks(model) == before

    def test_can_not_have_modules_of_its_own_beside_another(self, make_base):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = moelora.get_peft_model(make_base("llama"), config, adapter_name="one")
        model.add_adapter("two", copy.deepcopy(config))
        before = looks(model)
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            model.base_model.activate_expert("two")
        assert looks(model) == before

    def test_among_all_is_one_that_the_router_may_pick(self, model, ids):
        attach(model, "per layer, top 2")
        model.base_model.add_expert("new")
        assert activate_all_experts(model) == [*NAMES, "new"]
        assert model.base_model.router.activated.all()


def as_opened(model, base, folder):
    """The model saved into a folder and opened again, which must be the same."""
    model.save_pretrained(folder)
    opened = PeftModel.from_pretrained(base, folder)
    state, expected = opened.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    tuners = opened.base_model, model.base_model
    for kept in ("active_adapters", "frozen_experts"):
        assert getattr(tuners[0], kept) == getattr(tuners[1], kept)
    assert list(opened.peft_config) == list(model.peft_config)
    assert repr(tuners[0].router) == repr(tuners[1].router)
    assert not inspect_checkpoint(folder)["problems"]
    return opened


@pytest.mark.parametrize("way", ROUTERS)
def test_a_life_is_saved_into_one_folder_again_and_again(make_lora, make_base, ids, tmp_path, way):
    model = adopt(make_lora("llama", target_modules=["q_proj", "down_proj"]))
    attach(model, way)
    base = partial(make_base, "llama")
    model.base_model.add_expert("new", LoraConfig(r=7, target_modules=["k_proj", "o_proj"]))
    amplify(model, "new")
    if way != "fixed":
        model.base_model.mark_mature("expert_1", 0.3)
    model.base_model.freeze_expert("expert_1")
    model = as_opened(model, base(), tmp_path)
    assert model.base_model.router.activated.tolist() == [True, True, True, False]
    model.base_model.rename_expert("expert_0", "first")
    model.base_model.activate_expert("new")
    model = as_opened(model, base(), tmp_path)
    before = model(ids).logits
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    model.base_model.to_single_adapter([0.1, 0.2, 0.3, 0.4])
    model = as_opened(model, base(), tmp_path)
    assert torch.equal(model(ids).logits, before)
    for gone in ("mixture", "expert_2", "first"):
        model.base_model.remove_expert(gone)
    opened = as_opened(model, base(), tmp_path)
    assert list(opened.peft_config) == ["expert_1", "new"]
    assert torch.equal(opened(ids).logits, model(ids).logits)
    assert type(release(opened)) is peft.PeftModelForCausalLM


def test_a_static_mixture_is_not_counted_as_an_expert(make_base):
    model = moelora.get_peft_model(make_base("llama"), MoELoraConfig(target_modules=["q_proj"], num_experts=3))
    model.base_model.to_single_adapter([1, 1, 1])
    model.base_model.add_expert("new")
    assert model.base_model.moe_config.num_experts == 4


class TestAfterGrowth:
    @pytest.fixture
    def grown(self, model):
        attach(model, "per layer, top 2")
        model.base_model.add_expert("new", maturity=0.5)
        amplify(model, "new")
        model.base_model.activate_expert("new")
        model.base_model.freeze_expert("expert_0")
        return model

    def test_a_copy_is_the_same_and_apart(self, grown, ids):
        other = copy.deepcopy(grown)
        expected = grown(ids).logits
        assert torch.equal(other(ids).logits, expected)
        assert other.base_model.frozen_experts == {"expert_0"}
        other.base_model.remove_expert("new")
        other.base_model.unfreeze_expert("expert_0")
        assert torch.equal(grown(ids).logits, expected)
        assert grown.base_model.frozen_experts == {"expert_0"}

    def test_a_saved_mixture_opens_as_it_is(self, grown, ids, tmp_path, make_base):
        grown.save_pretrained(tmp_path)
        opened = moelora.PeftModel.from_pretrained(make_base("llama"), tmp_path)
        assert torch.equal(opened(ids).logits, grown(ids).logits)

    def test_a_released_model_is_stock_peft(self, grown, ids):
        state = grown.state_dict()
        release(grown)
        assert type(grown.base_model) is peft.LoraModel
        assert {key for key in state if ".router." not in key} == set(grown.state_dict())
        assert "frozen_experts" not in vars(grown.base_model)
        stock = grown(ids).logits
        grown.set_adapter("expert_0")
        assert all(p.requires_grad for p in of_expert(grown, "expert_0").values())
        assert not torch.equal(grown(ids).logits, stock)

    def test_an_optimizer_made_anew_trains_what_grew(self, grown, ids):
        prefer(grown.base_model.router, "new")
        grown.train()
        groups = parameter_groups(grown, lr=1e-2, router_lr=1e-3)
        held = {id(p) for group in groups for p in group["params"]}
        router = list(grown.base_model.router.parameters())
        assert {id(p) for p in router} <= held
        optimizer = torch.optim.AdamW(groups)
        before = [p.detach().clone() for p in [*router, *of_expert(grown, "new").values()]]
        for _ in range(2):
            optimizer.zero_grad()
            grown(ids, labels=ids).loss.backward()
            optimizer.step()
        after = [*router, *of_expert(grown, "new").values()]
        assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))

    @pytest.mark.slow
    def test_a_compiled_model_follows(self, make_lora, ids):
        model = adopt(make_lora("llama", target_modules=["q_proj"]))
        attach(model, "layer 1")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            before = compiled(ids).logits
            model.base_model.add_expert("new")
            amplify(model, "new")
            assert torch.equal(compiled(ids).logits, before)
            model.base_model.activate_expert("new")
            grown = compiled(ids).logits
            torch.testing.assert_close(grown, model(ids).logits)
            model.base_model.remove_expert("expert_0")
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
            assert not torch.allclose(grown, before)

    def test_the_learned_router_shares_out_among_all(self, grown, ids):
        hidden = torch.randn(2, 7, 32)
        weights = grown.base_model.get_routing_weights(hidden)
        assert weights.shape == (2, 7, 4)
        assert math.isclose(float(weights.sum()), 14, rel_tol=1e-5)
        assert (weights > 0).sum() == 28
