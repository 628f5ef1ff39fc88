"""What print(model), print_trainable_parameters and PEFT's status functions say of a mixture."""

import math
import re

import peft
import pytest
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt
from moelora.nn.routers import FixedRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
# Of a rank-4 adapter on q_proj [32 x 32] in 3 layers, and on the 97 embeddings of width 32.
EACH = 3 * 4 * (32 + 32) + 4 * (97 + 32)
ROUTER = 3 * (32 * 3 + 3)


@pytest.fixture
def mixture(make_base):
    config = MoELoraConfig(r=4, num_experts=3, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    return moelora.get_peft_model(make_base("llama"), config)


def size(module):
    return sum(math.prod(p.shape) for p in module.parameters())


class TestPrintingAModel:
    def test_shows_the_experts_of_each_layer_and_the_router(self, mixture):
        mixture.base_model.set_adapter(["expert_0", "expert_2"])
        text = repr(mixture)
        experts = "experts: expert_0 (r=4), expert_1 (r=4, not active), expert_2 (r=4)"
        assert re.search(rf"\(embed_tokens\): lora.Embedding\(\s+{re.escape(experts)}\s+\(base_layer\)", text)
        assert re.search(rf"\(q_proj\): lora.Linear\(\s+{re.escape(experts)}\s+\(base_layer\)", text)
        assert "(0-2): 3 x LlamaDecoderLayer(" in text
        assert re.search(r"\(router\): PerLayerRouter\(\s+input_size=32, experts=\['expert_0', 'expert_1'", text)
        mixture.base_model.detach_router()
        assert "router" not in repr(mixture)

    def test_is_stock_again_after_release(self, make_lora):
        stock, model = make_lora("llama"), adopt(make_lora("llama"))
        assert repr(model) != repr(stock)
        assert repr(moelora.release(model)) == repr(stock)


class TestPrintTrainableParameters:
    def test_counts_experts_and_router(self, mixture, make_base, capsys):
        mixture.print_trainable_parameters()
        trained, everything = 3 * EACH + ROUTER, size(make_base("llama")) + 3 * EACH + ROUTER
        line = f"trainable params: {trained:,d} || all params: {everything:,d} || trainable%: "
        assert capsys.readouterr().out.splitlines() == [
            f"{line}{100 * trained / everything:.4f}",
            *(f"  {name}: trainable params: {EACH:,d} || all params: {EACH:,d}" for name in NAMES),
            f"  router: trainable params: {ROUTER:,d} || all params: {ROUTER:,d}",
        ]

    def test_tells_frozen_experts_from_trained_ones(self, mixture, capsys):
        mixture.set_adapter("expert_1")
        mixture.base_model.router.requires_grad_(False)
        mixture.print_trainable_parameters()
        first, *parts = capsys.readouterr().out.splitlines()
        assert first.startswith(f"trainable params: {EACH:,d} ||")
        trained = {part.split(":")[0].strip(): part.split("||")[0].split()[-1] for part in parts}
        assert trained == {"expert_0": "0", "expert_1": f"{EACH:,d}", "expert_2": "0", "router": "0"}

    def test_counts_the_copies_that_peft_keeps_for_an_adapter(self, make_lora, capsys):
        model = adopt(make_lora("llama", n=1, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model.base_model.attach_router(FixedRouter(["expert_0"]))
        model.print_trainable_parameters()
        here = 3 * 4 * (32 + 32) + 97 * 32
        assert f"  expert_0: trainable params: {here:,d} || all params: {here:,d}" in capsys.readouterr().out

    def test_is_stock_peft_for_one_adapter(self, make_lora, capsys):
        make_lora("llama", n=1).print_trainable_parameters()
        expected = capsys.readouterr().out
        adopt(make_lora("llama", n=1)).print_trainable_parameters()
        assert capsys.readouterr().out == expected


class TestStatus:
    def test_is_that_of_stock_peft(self, make_lora):
        stock, model = make_lora("llama"), adopt(make_lora("llama"))
        assert model.get_layer_status() == stock.get_layer_status()
        assert model.get_model_status() == stock.get_model_status()

    def test_shows_every_active_expert_and_no_router(self, mixture):
        layers = mixture.get_layer_status()
        assert [layer.module_type for layer in layers] == ["lora.Embedding", *["lora.Linear"] * 3]
        for layer in layers:
            assert layer.active_adapters == layer.available_adapters == NAMES
            assert layer.requires_grad == dict.fromkeys(NAMES, True)
        assert peft.get_layer_status(mixture) == layers

    def test_of_the_model_counts_the_router_among_its_parameters(self, mixture, make_base):
        status = mixture.get_model_status()
        assert status.trainable_params == 3 * EACH + ROUTER
        assert status.total_params == size(make_base("llama")) + 3 * EACH + ROUTER
        assert status.num_adapter_layers == 4
        assert status.active_adapters == NAMES
        assert status.peft_types == dict.fromkeys(NAMES, "LORA")
        assert status.adapter_model_type == "LoraModel"
        assert status.enabled is True

    def test_follows_the_active_and_the_merged(self, make_lora):
        model = adopt(make_lora("llama"))
        model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
        model.set_adapter("expert_1")
        status = model.get_model_status()
        assert status.active_adapters == ["expert_1"]
        assert status.requires_grad == {"expert_0": False, "expert_1": True, "expert_2": False}
        model.merge_adapter()
        assert model.get_model_status().merged_adapters == ["expert_1"]

    def test_works_on_a_merged_mixture_as_on_the_base(self, mixture):
        merged = mixture.merge_and_unload(routing_weights=[0.5, 0.5, 0.0])
        assert not any(isinstance(module, nn.ModuleDict) for module in merged.modules())
        with pytest.raises(ValueError, match="No adapter layers found"):
            peft.get_layer_status(merged)
