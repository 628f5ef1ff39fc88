"""The routing keyword, the config and the router's life, as a project that uses moelora in place of peft sees them."""

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moelora import LoraConfig, LoraLayer, MoELoraConfig, adopt, get_peft_model, release
from moelora.nn.routers import EmbeddingRouter, FixedRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 61}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).eval()


def with_experts(config, make=get_peft_model):
    model = make(tiny_gpt2(), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(NAMES)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def plain_config(**options):
    return LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM", **options)


@pytest.fixture
def model():
    return with_experts(plain_config())


@pytest.fixture
def stock():
    return with_experts(plain_config(), make=peft.get_peft_model)


@pytest.fixture
def ids():
    return torch.randint(2, 61, (2, 6), generator=torch.Generator().manual_seed(2))


class TestTheKeyword:
    def test_without_it_the_model_is_stock_peft_to_the_bit(self, model, stock, ids):
        assert torch.equal(model(ids).logits, stock(ids).logits)

    @pytest.mark.parametrize("expert", range(3))
    def test_one_hot_weights_are_one_adapter(self, model, stock, ids, expert):
        stock.set_adapter(NAMES[expert])
        w = nn.functional.one_hot(torch.full((2, 6), expert), 3)
        torch.testing.assert_close(model(ids, routing_weights=w).logits, stock(ids).logits, **CLOSE)

    def test_weights_of_one_are_all_active_adapters(self, model, stock, ids):
        torch.testing.assert_close(model(ids, routing_weights=torch.ones(3)).logits, stock(ids).logits, **CLOSE)

    def test_weights_of_zero_are_the_base_model(self, model, ids):
        got = model(ids, routing_weights=torch.zeros(2, 3)).logits
        torch.testing.assert_close(got, tiny_gpt2()(ids).logits, **CLOSE)

    def test_all_shapes_of_one_mixture_agree(self, model, ids):
        w = torch.tensor([0.2, 0.5, 0.3])
        expected = model(ids, routing_weights=w).logits
        for shape in [(2, 3), (2, 6, 3), (2, 6, 2, 3), (1, 1, 2, 3)]:
            torch.testing.assert_close(model(ids, routing_weights=w.expand(shape)).logits, expected, **CLOSE)

    def test_each_token_gets_its_own_mixture(self, model, ids):
        w = torch.rand(2, 6, 3)
        other = w.clone()
        other[:, 4] = 1 - other[:, 4]
        one, two = model(ids, routing_weights=w).logits, model(ids, routing_weights=other).logits
        assert torch.equal(one[:, :4], two[:, :4])  # attention is causal
        assert not torch.allclose(one[:, 4], two[:, 4])

    def test_weights_get_a_gradient_in_their_own_shape(self, model, ids):
        for shape in [(3,), (2, 3), (2, 6, 3), (2, 6, 2, 3)]:
            w = torch.full(shape, 1 / 3, requires_grad=True)
            model(ids, labels=ids, routing_weights=w).loss.backward()
            assert w.grad.shape == shape
            assert w.grad.abs().sum() > 0

    def test_a_layer_takes_it_on_its_own(self, model):
        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        x, w = torch.randn(2, 5, 24), torch.rand(2, 5, 3)
        expected = layer.base_layer(x)
        for i, name in enumerate(NAMES):
            expected = expected + w[..., i, None] * layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        torch.testing.assert_close(layer(x, routing_weights=w), expected, **CLOSE)

    def test_logits_can_be_mixed_as_n_passes_did(self, model, stock, ids):
        w, mixed = torch.rand(2, 6, 3), torch.zeros(2, 6, 61)
        for i, name in enumerate(NAMES):
            stock.set_adapter(name)
            mixed += w[..., i, None] * stock(ids).logits.detach()
        got = model(ids, routing_weights=w, mixture="logits").logits
        assert (got - mixed).abs().max() <= 1e-5 * mixed.abs().max()

    @pytest.mark.parametrize("shape", [(4,), (3, 3), (2, 5, 3), (2, 6, 3, 3)])
    def test_weights_that_do_not_fit_are_an_error(self, model, ids, shape):
        with pytest.raises(ValueError, match="routing_weights"):
            model(ids, routing_weights=torch.ones(shape))

    def test_a_model_that_was_released_knows_it_no_more(self, model, ids):
        adopt(release(model))(ids, routing_weights=torch.ones(3))
        plain = release(model)(ids).logits
        assert torch.isfinite(plain).all()


class TestTheConfig:
    def test_it_makes_a_whole_mixture(self, ids):
        config = MoELoraConfig(
            r=2, num_experts=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        model = get_peft_model(tiny_gpt2(), config)
        assert model.base_model.active_adapters == NAMES
        assert isinstance(model.base_model.router, PerLayerRouter)
        out = model.train()(ids, labels=ids)
        out.loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
        assert out.router_aux_loss >= 0

    def test_it_refuses_what_makes_no_sense(self):
        for values in ({"num_experts": 1}, {"top_k_experts": 9}, {"router_temperature": 0}, {"router_type": "best"}):
            with pytest.raises(ValueError, match=next(iter(values))):
                MoELoraConfig(**values)

    def test_it_survives_its_folder_and_stock_peft_reads_the_rest(self, tmp_path):
        config = MoELoraConfig(r=3, num_experts=5, top_k_experts=4, target_modules=["c_attn"])
        config.save_pretrained(tmp_path)
        assert MoELoraConfig.from_pretrained(tmp_path) == config
        assert type(peft.PeftConfig.from_pretrained(tmp_path)) is LoraConfig


class TestTheRouter:
    def test_it_comes_and_goes(self, model):
        base = model.base_model
        assert not base.has_router() and base.router is None and base.get_routing_weights(torch.ones(1, 24)) is None
        router = EmbeddingRouter(NAMES, 24)
        base.attach_router(router)
        assert base.has_router() and base.router is router
        assert any(name.startswith("base_model.router.") for name in model.state_dict())
        base.detach_router()
        assert not base.has_router() and base.router is None

    def test_it_routes_by_itself(self, model, ids):
        expected = model(ids, routing_weights=torch.tensor([0.6, 0.3, 0.1])).logits
        model.base_model.attach_router(FixedRouter(NAMES, [6, 3, 1]))
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)

    def test_it_learns(self, model, ids):
        router = PerLayerRouter(NAMES, 24, num_layers=2)
        model.base_model.attach_router(router, MoELoraConfig(num_experts=3))
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())

    def test_its_loss_is_in_the_loss(self, model, ids):
        model.base_model.attach_router(
            PerLayerRouter(NAMES, 24, num_layers=2), MoELoraConfig(router_aux_loss_coef=0.25)
        )
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        out = model.train()(ids, labels=ids)
        own = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, own + 0.25 * out.router_aux_loss)

    def test_only_a_module_can_be_one(self, model):
        with pytest.raises(TypeError, match="router"):
            model.base_model.attach_router(lambda hidden: hidden)
        with pytest.raises(TypeError, match="moe_config"):
            model.base_model.attach_router(FixedRouter(NAMES), moe_config=LoraConfig())
