"""Weights that are the same for every token: merged into the base, or as one adapter that stock PEFT loads."""

import copy
import json
import warnings

import peft
import pytest
import torch
from torch import nn

from moelora import adopt
from moelora.nn.routers import FixedRouter

W = torch.tensor([0.5, -0.25, 1.5])
STATIC = {"positive": [0.2, 0.3, 0.5], "negative and large": [-0.5, 3.0, 0.25], "with zeros": [0.0, 1.0, 0.0]}


def state_of(model):
    """Everything that a refused call must leave alone."""
    values = {name: p.detach().clone() for name, p in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    scalings = {name: dict(m.scaling) for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    modules = {name: type(m) for name, m in model.named_modules()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    return values, flags, scalings, modules, attributes, list(model.peft_config), list(model.active_adapters)


def assert_untouched(model, before):
    now = state_of(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    assert all(torch.equal(now[0][name], before[0][name]) for name in before[0])


def of_one_rank(model, make_base, tmp_path, name="mixture"):
    """What stock PEFT makes of the saved adapter on a fresh base."""
    model.save_pretrained(tmp_path, selected_adapters=[name])
    kind = "gpt2" if "GPT2" in type(model.get_base_model()).__name__ else "llama"
    return peft.PeftModel.from_pretrained(make_base(kind), tmp_path / name).eval()


@pytest.fixture
def uneven(make_lora, make_base):
    """Experts of different ranks, alphas and modules, embeddings among them; LoRA biases where `lora_bias`."""

    def make(*, embeddings=True, **options):
        sizes = [
            {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}},
            {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
            {"r": 4, "lora_alpha": 2, "target_modules": ["v_proj", "embed_tokens"] if embeddings else ["v_proj"]},
        ]
        configs = [peft.LoraConfig(task_type="CAUSAL_LM", **size, **options) for size in sizes]
        model = peft.get_peft_model(make_base("llama"), configs[0], "expert_0")
        for i in (1, 2):
            model.add_adapter(f"expert_{i}", configs[i])
        model.base_model.set_adapter(["expert_0", "expert_1", "expert_2"])
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        return adopt(model.eval())

    return make


class TestMerging:
    @pytest.mark.parametrize("safe_merge", [False, True])
    @pytest.mark.parametrize("w", STATIC.values(), ids=STATIC)
    def test_equals_the_routed_forward(self, kind, make_lora, ids, w, safe_merge):
        model = adopt(make_lora(kind))
        expected = model(ids, routing_weights=torch.tensor(w)).logits
        merged = model.merge_and_unload(safe_merge=safe_merge, routing_weights=torch.tensor(w))
        torch.testing.assert_close(merged(ids).logits, expected)

    def test_equals_the_sum_of_weighted_delta_weights(self, make_lora):
        model, stock = adopt(make_lora("gpt2")), make_lora("gpt2")
        merged = model.merge_and_unload(routing_weights=W)
        for name, layer in stock.get_base_model().named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                delta = sum(w * layer.get_delta_weight(f"expert_{i}") for i, w in enumerate(W))
                weight = merged.get_submodule(name).weight
                torch.testing.assert_close(weight, layer.get_base_layer().weight + delta)

    def test_leaves_a_plain_model(self, kind, make_base, make_lora):
        model = adopt(make_lora(kind))
        model.base_model.attach_router(FixedRouter(["expert_0", "expert_1", "expert_2"]))
        merged, plain = model.merge_and_unload(routing_weights=W), make_base(kind)
        assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
        assert merged.state_dict().keys() == plain.state_dict().keys()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.modules())

    def test_takes_weights_for_each_decoder_layer(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        w = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(4))
        expected = model(ids, routing_weights=w).logits
        torch.testing.assert_close(model.merge_and_unload(routing_weights=w)(ids).logits, expected)

    def test_takes_numbers_and_merges_in_silence(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        expected = model(ids, routing_weights=W).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = model.merge_and_unload(routing_weights=W.tolist())
        torch.testing.assert_close(merged(ids).logits, expected)

    def test_columns_belong_to_adapter_names_where_given(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        expected = model(ids, routing_weights=torch.tensor([0.0, 0.4, 0.7])).logits
        merged = model.merge_and_unload(adapter_names=["expert_2", "expert_1"], routing_weights=[0.7, 0.4])
        torch.testing.assert_close(merged(ids).logits, expected)

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_of_experts_in_different_layers(self, uneven, ids, safe_merge):
        model = uneven()
        expected = model(ids, routing_weights=W).logits
        merged = model.merge_and_unload(safe_merge=safe_merge, routing_weights=W)
        torch.testing.assert_close(merged(ids).logits, expected)

    def test_keeps_the_tokens_that_one_of_the_experts_trains(self, make_lora, ids):
        model = make_lora("llama", n=1, target_modules=["q_proj"])
        config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=ids[0].tolist())
        model.add_adapter("of_tokens", config)
        for name, parameter in adopt(model).named_parameters():
            if "of_tokens" in name:
                nn.init.normal_(parameter, std=0.2)
        model.base_model.set_adapter(["expert_0", "of_tokens"])
        expected = model(ids, routing_weights=W[:2]).logits
        torch.testing.assert_close(model.merge_and_unload(routing_weights=W[:2])(ids).logits, expected)

    def test_weighs_lora_biases(self, make_lora, ids):
        model = adopt(make_lora("gpt2", lora_bias=True))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.expert_1.bias"):
                nn.init.normal_(parameter)
        expected = model(ids, routing_weights=W).logits
        assert not torch.allclose(expected, adopt(make_lora("gpt2", lora_bias=True))(ids, routing_weights=W).logits)
        merged = model.merge_and_unload(safe_merge=True, routing_weights=W)
        torch.testing.assert_close(merged(ids).logits, expected)

    def test_into_bfloat16_rounds_once(self, make_lora):
        model, reference = adopt(make_lora("llama")), make_lora("llama")
        for each in (model, reference):
            for name, parameter in each.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.bfloat16()
        merged = model.merge_and_unload(routing_weights=W)
        layer = reference.get_base_model().model.layers[1].mlp.up_proj
        exact = layer.base_layer.weight.double() + sum(
            w * layer.get_delta_weight(f"expert_{i}").double() for i, w in enumerate(W.double())
        )
        got = merged.model.layers[1].mlp.up_proj.weight
        assert got.dtype is torch.bfloat16
        # Half a unit in the last of 8 bits, for the base is added to in float32.
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8).all()

    def test_says_that_a_merge_without_weights_is_unweighted(self, make_lora):
        with pytest.warns(UserWarning, match="unweighted, as PEFT does: pass routing_weights") as caught:
            adopt(make_lora("llama")).merge_and_unload()
        assert next(warning for warning in caught if warning.category is UserWarning).filename == __file__


class TestASingleAdapter:
    @pytest.mark.parametrize("w", STATIC.values(), ids=STATIC)
    def test_equals_the_mixture_in_stock_peft(self, kind, make_base, make_lora, ids, tmp_path, w):
        model = adopt(make_lora(kind))
        expected = model(ids, routing_weights=torch.tensor(w)).logits
        model.to_single_adapter(w)
        torch.testing.assert_close(of_one_rank(model, make_base, tmp_path)(ids).logits, expected)

    def test_of_weights_for_each_layer(self, make_base, make_lora, ids, tmp_path):
        model = adopt(make_lora("llama"))
        w = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(4))
        expected = model(ids, routing_weights=w).logits
        model.base_model.to_single_adapter(w)
        torch.testing.assert_close(of_one_rank(model, make_base, tmp_path)(ids).logits, expected)

    def test_of_experts_in_different_layers(self, uneven, make_base, ids, tmp_path):
        model = uneven()
        expected = model(ids, routing_weights=W).logits
        model.to_single_adapter(W)
        stock = of_one_rank(model, make_base, tmp_path)
        torch.testing.assert_close(stock(ids).logits, expected)
        first = stock.get_base_model().model.layers[0]
        ranks = {
            first.self_attn.q_proj.r["default"],
            first.self_attn.v_proj.r["default"],
            first.mlp.down_proj.r["default"],
        }
        assert ranks == {6}  # of v_proj, which needs most: 2 + 4
        assert not isinstance(first.mlp.up_proj, peft.tuners.lora.LoraLayer)

    def test_weighs_lora_biases(self, make_base, make_lora, ids, tmp_path):
        model = adopt(make_lora("gpt2", lora_bias=True))
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter)
        expected = model(ids, routing_weights=W).logits
        model.to_single_adapter(W)
        torch.testing.assert_close(of_one_rank(model, make_base, tmp_path)(ids).logits, expected)

    def test_equals_what_peft_makes_of_it_by_concatenation(self, make_lora, ids):
        model, stock = adopt(make_lora("llama")), make_lora("llama")
        model.to_single_adapter(W)
        stock.add_weighted_adapter([f"expert_{i}" for i in range(3)], W.tolist(), "mixture", combination_type="cat")
        for each in (model, stock):
            each.set_adapter("mixture")
        assert model.peft_config["mixture"].r == stock.peft_config["mixture"].r == 12
        torch.testing.assert_close(model(ids).logits, stock(ids).logits)

    def test_is_a_plain_lora_config(self, make_lora, tmp_path):
        model = adopt(make_lora("llama", lora_dropout=0.1))
        model.to_single_adapter(W)
        assert type(model.peft_config["mixture"]) is peft.LoraConfig
        model.save_pretrained(tmp_path, selected_adapters=["mixture"])
        config = json.loads((tmp_path / "mixture" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (12, 12, 0.0)
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert not config["use_rslora"]
        assert [path.name for path in (tmp_path / "mixture").glob("moe_lora*")] == []

    def test_leaves_everything_else_as_it_was(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A.expert_1" in name)
        before, expected = state_of(model), model(ids, routing_weights=W).logits
        assert model.to_single_adapter(W, "sum") is None
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
        assert torch.equal(model(ids, routing_weights=W).logits, expected)
        model.delete_adapter("sum")
        assert_untouched(model, before)

    def test_of_bfloat16_experts_is_float32(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
        model.to_single_adapter(W)
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        assert layer.lora_A["mixture"].weight.dtype is torch.float32
        exact = sum(
            w
            * layer.scaling[f"expert_{i}"]
            * (layer.lora_B[f"expert_{i}"].weight.double() @ layer.lora_A[f"expert_{i}"].weight.double())
            for i, w in enumerate(W)
        )
        torch.testing.assert_close(layer.get_delta_weight("mixture").double(), exact, rtol=1e-5, atol=1e-6)

    def test_can_be_merged_and_unmerged(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        expected = model(ids, routing_weights=W).logits
        model.to_single_adapter(W)
        model.set_adapter("mixture")
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, expected)
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, expected)

    @pytest.mark.parametrize(
        ("rank", "said"),
        [(4, "rank 12; vLLM: --max-lora-rank 16"), (64, "--max-lora-rank 256"), (100, "--max-lora-rank 320")]
        + [(128, "--max-lora-rank 512"), (171, "rank 513; vLLM takes ranks up to 512 only")],
    )
    def test_says_its_rank_and_what_vllm_needs(self, make_lora, capsys, rank, said):
        adopt(make_lora("llama", r=rank, target_modules=["q_proj"])).to_single_adapter(W)
        assert capsys.readouterr().out.strip().endswith(said)

    def test_is_undone_where_peft_fails_in_the_middle(self, make_lora, monkeypatch):
        model = adopt(make_lora("llama"))
        before, layer = state_of(model), model.get_base_model().model.layers[1].mlp.up_proj
        monkeypatch.setattr(type(layer), "update_layer", fail_at(layer, type(layer).update_layer))
        with pytest.raises(OSError, match="on purpose"):
            model.to_single_adapter(W)
        assert_untouched(model, before)


def fail_at(layer, update):
    def update_layer(self, *args, **kwargs):
        if self is layer:
            raise OSError("on purpose")
        return update(self, *args, **kwargs)

    return update_layer


CALLS = {
    "merge": lambda model, w: model.merge_and_unload(routing_weights=w),
    "single": lambda model, w: model.to_single_adapter(w),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
class TestRefuses:
    @pytest.mark.parametrize(
        ("w", "error", "message"),
        [
            (torch.ones(2, 3), ValueError, r"must have shape \[N\], or \[1, 1, L, N\] .* got \(2, 3\)"),
            (torch.ones(2, 7, 3), ValueError, r"got \(2, 7, 3\): weights that differ between tokens"),
            (torch.ones(2, 7, 3, 3), ValueError, r"got \(2, 7, 3, 3\)"),
            (
                torch.ones(1, 1, 2, 3),
                ValueError,
                r"needs L = 3, the number of decoder layers, got shape \(1, 1, 2, 3\)",
            ),
            (torch.ones(2), ValueError, r"one column for each of the adapters \['expert_0', 'expert_1', 'expert_2'\]"),
            ([1.0, float("nan"), 0.0], ValueError, "must hold finite numbers"),
            ([1.0, float("inf"), 0.0], ValueError, "must hold finite numbers"),
            (torch.ones(3, device="meta"), ValueError, "must hold finite numbers"),
            (torch.ones(3) * 1j, TypeError, "must be real"),
            ({"encoder": 1}, TypeError, "must be a torch.Tensor or numbers, got dict"),
            ("abc", TypeError, "must be a torch.Tensor or numbers, got str"),
        ],
    )
    def test_weights_that_do_not_fit(self, make_lora, call, w, error, message):
        model = adopt(make_lora("llama"))
        before = state_of(model)
        with pytest.raises(error, match=message):
            call(model, w)
        assert_untouched(model, before)

    def test_weights_for_each_layer_where_others_are_adapted(self, uneven, call):
        model = uneven()
        before = state_of(model)
        with pytest.raises(ValueError, match=r"embed_tokens is in no decoder layer.*pass \[N\]"):
            call(model, torch.ones(1, 1, 3, 3))
        assert_untouched(model, before)

    def test_adapters_that_are_merged_already(self, make_lora, call):
        model = adopt(make_lora("llama"))
        model.merge_adapter(["expert_1"])
        before = state_of(model)
        with pytest.raises(ValueError, match=r"has merged adapters \['expert_1'\].*unmerge_adapter"):
            call(model, W)
        assert_untouched(model, before)

    def test_adapters_that_are_not_plain_lora(self, make_lora, call):
        model = adopt(make_lora("llama", use_dora=True, target_modules=["q_proj"]))
        before = state_of(model)
        with pytest.raises(ValueError, match=r"q_proj can't route adapter 'expert_0', which is not plain LoRA"):
            call(model, W)
        assert_untouched(model, before)

    def test_layers_that_can_not_be_routed(self, call):
        net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
        model = adopt(peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "1"])))
        before = state_of(model)
        with pytest.raises(ValueError, match=r"1 \(Conv1d\) can't be routed"):
            call(model, [0.5])
        assert_untouched(model, before)


class TestMergingRefuses:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_broken_adapters_before_anything_is_merged(self, make_lora, ids, value):
        model = adopt(make_lora("llama"))
        last = model.get_base_model().model.layers[2].mlp.down_proj.lora_B["expert_1"].weight
        last.data[0, 0] = value
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
        with pytest.raises(ValueError, match=r"NaNs or infinities detected in .*layers.2.mlp.down_proj: one of"):
            model.merge_and_unload(safe_merge=True, routing_weights=W)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
        assert model(ids, routing_weights=W).logits.isnan().any()  # still a routed model

    def test_adapters_that_do_not_exist(self, make_lora):
        model = adopt(make_lora("llama"))
        with pytest.raises(ValueError, match=r"there are no adapters \['other'\]"):
            model.merge_and_unload(adapter_names=["expert_0", "other"], routing_weights=[1.0, 1.0])
        with pytest.raises(ValueError, match="adapter_names must be different"):
            model.merge_and_unload(adapter_names=["expert_0", "expert_0"], routing_weights=[1.0, 1.0])


class TestASingleAdapterRefuses:
    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("expert_1", ValueError, "there is an expert 'expert_1' already"),
            ("a.b", ValueError, "can't be called 'a.b'"),
            ("keys", ValueError, "can't be called 'keys'"),
            ("", ValueError, "can't be called ''"),
            (3, TypeError, "must be a string, got int"),
        ],
    )
    def test_names(self, make_lora, name, error, message):
        model = adopt(make_lora("llama"))
        before = state_of(model)
        with pytest.raises(error, match=message):
            model.to_single_adapter(W, name)
        assert_untouched(model, before)


def test_a_model_with_a_single_adapter_beside_its_experts_still_routes(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(FixedRouter(["expert_0", "expert_1", "expert_2"], [1, 2, 1]))
    expected = model(ids).logits
    model.to_single_adapter([0.25, 0.5, 0.25])
    assert torch.equal(model(ids).logits, expected)
    model.set_adapter("mixture")
    with pytest.raises(ValueError, match=r"\['mixture'\] are active, but the router knows only"):
        model(ids)
    model.base_model.detach_router()
    torch.testing.assert_close(model(ids).logits, expected)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_a_merge_that_peft_breaks_off_leaves_no_trace_in_the_layers(make_lora, monkeypatch):
    model = adopt(make_lora("gpt2", lora_bias=True))
    before = state_of(model)

    def fails(layer, **kwargs):
        assert layer.get_delta_weight("expert_0").isfinite().all()
        raise OSError("on purpose")

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", fails)
    with pytest.raises(OSError, match="on purpose"):
        model.merge_and_unload(routing_weights=W)
    assert_untouched(model, before)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert all(set(layer.lora_bias.values()) == {True} for layer in layers)
