"""Four ways in which routing could go wrong without an error: each raises, or works."""

import threading

import peft
import pytest
import torch
import transformers
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt, release
from moelora.nn.routers import EmbeddingRouter, FixedRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]


class TestTheKeywordIsNotSwallowed:
    """Models of transformers take **kwargs, so weights that nobody consumes would just vanish."""

    @pytest.mark.parametrize("keyword", [{"routing_weights": torch.ones(3)}, {"mixture": "layer"}])
    def test_by_the_model_inside(self, kind, make_lora, ids, keyword):
        model = adopt(make_lora(kind))
        with pytest.raises(TypeError, match="call the adopted PeftModel"):
            model.get_base_model()(ids, **keyword)
        with pytest.raises(TypeError, match="call the adopted PeftModel"):
            model.get_base_model().base_model(ids, **keyword)

    def test_by_peft_mixed_model(self, make_base, ids):
        config = peft.LoraConfig(target_modules=["q_proj"])
        model = moelora.get_peft_model(make_base("llama"), config, "a", mixed=True)
        assert isinstance(model, peft.PeftMixedModel)
        assert torch.isfinite(model(ids).logits).all()
        with pytest.raises(TypeError, match="PeftMixedModel with MixedModel can't be routed"):
            model(ids, routing_weights=torch.ones(1))

    @pytest.mark.parametrize(
        "config",
        [
            peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
            ),
            peft.OFTConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
            peft.AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10),
            peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_by_a_model_of_another_tuner(self, make_base, ids, config):
        stock = peft.get_peft_model(make_base("llama"), config).eval()
        expected = stock(ids).logits
        model = adopt(adopt(stock))
        assert torch.equal(model(ids).logits, expected)
        with pytest.raises(TypeError, match="can't be routed, only LoRA"):
            model(ids, routing_weights=torch.ones(1))
        release(model)
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_by_generate(self, make_lora, ids):
        with pytest.raises(ValueError, match="routing_weights"):
            adopt(make_lora("llama")).get_base_model().generate(ids, routing_weights=torch.ones(3), max_new_tokens=2)


def test_weights_for_a_model_whose_layers_have_gone_to_another(make_base, ids):
    """PEFT warns and goes on where a second model is made of one base: its layers follow the last one."""
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    net, w = make_base("llama"), torch.zeros(1)
    first = moelora.get_peft_model(net, config, "first").eval()
    with pytest.warns(UserWarning, match="for a second time"):
        second = moelora.get_peft_model(net, config, "second").eval()
    torch.testing.assert_close(second(ids, routing_weights=w).logits, make_base("llama")(ids).logits)
    for _ in range(2):
        with pytest.raises(ValueError, match="another PeftModel was made of the same base model"):
            first(ids, routing_weights=w)
        release(second)


class TestGradientCheckpointing:
    """Reentrant checkpointing gives no gradient to what a region merely closes over."""

    @staticmethod
    def step(model, ids, reentrant, call, **options):
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant}, **options)
        model.zero_grad()
        call(model).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def compare(self, build, ids, reentrant, call, w=None):
        expected = self.step(build(), ids, None, call)
        w_expected = None if w is None else w.grad.clone()
        if w is not None:
            w.grad = None
        got = self.step(build(), ids, reentrant, call)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
        if w is not None:
            assert w_expected.abs().sum() > 0
            torch.testing.assert_close(w.grad, w_expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3), (2, 7, 3, 3)])
    def test_gives_the_gradients_of_explicit_weights(self, kind, make_lora, ids, reentrant, shape):
        w = torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        call = lambda model: model(ids, labels=ids, routing_weights=w).loss  # noqa: E731
        self.compare(lambda: adopt(make_lora(kind)), ids, reentrant, call, w)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("reads", ["embeddings", "layers"])
    def test_gives_the_gradients_of_a_router_and_counts_its_loss_once(self, kind, make_lora, ids, reentrant, reads):
        width = 24 if kind == "gpt2" else 32

        def build():
            model = adopt(make_lora(kind))
            torch.manual_seed(1)
            embedding = reads == "embeddings"
            router = EmbeddingRouter(NAMES, width) if embedding else PerLayerRouter(NAMES, width, num_layers=3, top_k=2)
            model.base_model.attach_router(router, MoELoraConfig(router_aux_loss_coef=3.0))
            return model

        self.compare(build, ids, reentrant, lambda model: model(ids, labels=ids).loss)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_keeps_the_dropout_of_the_first_pass(self, make_lora, ids, weights, reentrant):
        def call(model):
            torch.manual_seed(4)
            return model(ids, labels=ids, routing_weights=weights).loss

        self.compare(lambda: adopt(make_lora("llama", lora_dropout=0.3)), ids, reentrant, call)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_keeps_two_forwards_in_flight_apart(self, make_lora, ids, weights, reentrant):
        def call(model):
            first = model(ids, labels=ids, routing_weights=weights).loss
            second = model(ids.flip(1), labels=ids, routing_weights=weights.flip(2)).loss
            return first + 2 * second

        self.compare(lambda: adopt(make_lora("llama")), ids, reentrant, call)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_recomputes_on_another_thread(self, make_lora, ids, weights, reentrant):
        class OnAnotherThread:
            def __init__(self, loss):
                self.loss = loss

            def backward(self):
                thread = threading.Thread(target=self.loss.backward)
                thread.start()
                thread.join()

        call = lambda model: OnAnotherThread(model(ids, labels=ids, routing_weights=weights).loss)  # noqa: E731
        self.compare(lambda: adopt(make_lora("llama")), ids, reentrant, call)

    def test_leaves_plain_forwards_alone(self, make_lora, ids, weights):
        model = adopt(make_lora("llama"))
        expected = self.step(make_lora("llama"), ids, True, lambda m: m(ids, labels=ids).loss)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model(ids, routing_weights=weights)
        got = self.step(model, ids, None, lambda m: m(ids, labels=ids).loss)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


class TestTheLossReachesTheRouter:
    """Some trainers compute their own loss and ignore outputs.loss, and the term of the router with it."""

    @staticmethod
    def build(make_lora, coefficient):
        model = adopt(make_lora("llama")).train()
        torch.manual_seed(1)
        router = PerLayerRouter(NAMES, 32, num_layers=3)
        model.base_model.attach_router(router, MoELoraConfig(router_aux_loss_coef=coefficient))
        return model

    @staticmethod
    def own_loss(out, ids):
        return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def router_gradients(self, model):
        return torch.cat([p.grad.flatten() for p in model.base_model.router.parameters()])

    def expected(self, make_lora, ids, coefficient):
        """Without labels nothing is added, so the term is added here."""
        model = self.build(make_lora, coefficient)
        out = model(ids)
        (self.own_loss(out, ids) + coefficient * out.router_aux_loss).backward()
        return self.router_gradients(model)

    def test_of_a_trainer_that_uses_outputs_loss(self, make_lora, ids):
        model = self.build(make_lora, 7.0)
        model(ids, labels=ids).loss.backward()
        torch.testing.assert_close(self.router_gradients(model), self.expected(make_lora, ids, 7.0))

    def test_of_a_trainer_that_ignores_outputs_loss(self, make_lora, ids):
        model = self.build(make_lora, 7.0)
        self.own_loss(model(ids, labels=ids), ids).backward()
        torch.testing.assert_close(self.router_gradients(model), self.expected(make_lora, ids, 7.0))
        assert not torch.allclose(self.router_gradients(model), self.expected(make_lora, ids, 0.0))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_of_a_trainer_that_ignores_it_and_checkpoints(self, make_lora, ids, reentrant):
        model = self.build(make_lora, 7.0)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        self.own_loss(model(ids, labels=ids), ids).backward()
        torch.testing.assert_close(self.router_gradients(model), self.expected(make_lora, ids, 7.0))

    def test_of_a_trainer_that_ignores_it_where_every_output_gets_a_backward(self, make_lora, ids):
        """As in DistributedDataParallel: all outputs pass one node, and those not used have no gradient."""

        class Sink(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *outputs):
                ctx.set_materialize_grads(False)
                return outputs

            @staticmethod
            def backward(ctx, *gradients):
                return gradients

        model = self.build(make_lora, 7.0)
        out = model(ids, labels=ids)
        out.loss, out.logits = Sink.apply(out.loss, out.logits)
        self.own_loss(out, ids).backward()
        torch.testing.assert_close(self.router_gradients(model), self.expected(make_lora, ids, 7.0))

    def test_of_a_trainer_that_ignores_it_where_layers_are_dropped(self, ids):
        """As OPT does in training: the loss is the mean over the layers that ran."""

        def gradients(coefficient, loss):
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
            base = transformers.OPTForCausalLM(
                transformers.OPTConfig(vocab_size=97, num_hidden_layers=4, layerdrop=0.5, dropout=0.0, **sizes)
            )
            config = MoELoraConfig(
                target_modules=["q_proj", "fc1"],
                num_experts=3,
                router_aux_loss_coef=coefficient,
                load_balance_loss_type="z_loss",
            )
            model = moelora.get_peft_model(base, config).train()
            torch.manual_seed(2)
            loss(model(ids, labels=ids)).backward()
            gradients = [p.grad for p in model.base_model.router.parameters()]
            assert any(gradient is None for gradient in gradients)
            return torch.cat([torch.zeros(1) if gradient is None else gradient.flatten() for gradient in gradients])

        used = gradients(7.0, lambda out: out.loss)
        torch.testing.assert_close(gradients(7.0, lambda out: self.own_loss(out, ids)), used)
        assert not torch.allclose(gradients(0.0, lambda out: out.loss), used)

    def test_of_a_trainer_that_scales_outputs_loss(self, make_lora, ids):
        model = self.build(make_lora, 7.0)
        (model(ids, labels=ids).loss / 4).backward()
        torch.testing.assert_close(self.router_gradients(model), self.expected(make_lora, ids, 7.0) / 4)


class TestTokensAreNotMatchedByTheirNumber:
    """Inputs of the same size need not be the same tokens."""

    @pytest.mark.parametrize("shape", [(2, 7, 3), (2, 7, 2, 3)])
    def test_of_an_encoder_and_a_decoder_of_equal_lengths(self, make_lora, ids, shape):
        model = adopt(make_lora("t5"))
        with pytest.raises(ValueError, match="can't tell the encoder's tokens from the decoder's"):
            model(input_ids=ids, labels=ids, routing_weights=torch.rand(shape))

    def test_but_an_encoder_decoder_model_takes_mixtures_of_sequences(self, make_lora, loop, ids):
        labels = ids[:, :4].clone()
        for w in (torch.rand(3), torch.rand(2, 3)):
            expected = loop(make_lora("t5"), w)(input_ids=ids, labels=labels)
            got = adopt(make_lora("t5"))(input_ids=ids, labels=labels, routing_weights=w)
            torch.testing.assert_close(got.logits, expected.logits, rtol=2e-5, atol=2e-5)

    def test_of_position_embeddings(self, make_lora, ids, weights):
        model = adopt(make_lora("gpt2", target_modules=["c_attn", "wpe"]))
        assert torch.isfinite(model(ids).logits).all()
        for call in (weights, weights[:, 0], weights[:1, :, :]):
            with pytest.raises(ValueError, match=r"transformer.wpe got an input of shape"):
                model(ids[: len(call)], routing_weights=call)

    def test_of_a_layer_on_positions(self, ids):
        from transformers import LlamaConfig, LlamaForCausalLM

        class WithPositions(LlamaForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                self.positions = nn.Linear(4, 32)

            def forward(self, input_ids=None, **kwargs):
                embeds = self.get_input_embeddings()(input_ids)
                positions = torch.linspace(0, 1, 4 * input_ids.shape[1]).reshape(1, -1, 4)
                return super().forward(inputs_embeds=embeds + self.positions(positions), **kwargs)

        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        net = WithPositions(
            LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=1, **heads)
        )
        config = peft.LoraConfig(target_modules=["positions", "q_proj"], init_lora_weights=False)
        model = moelora.get_peft_model(net, config, "a")
        for w in (torch.rand(2, 1), torch.rand(2, 7, 1)):
            with pytest.raises(ValueError, match="positions got an input of shape"):
                model(ids, routing_weights=w)
        model(ids, routing_weights=torch.rand(1))

    def test_of_the_patches_of_an_image(self):
        import transformers

        vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=32),
            text_config=transformers.LlamaConfig(**sizes, **heads),
            image_token_index=96,
            image_seq_length=4,
        )
        inputs = {"input_ids": torch.tensor([[96, 96, 96, 96, 7]] * 2), "pixel_values": torch.randn(2, 3, 8, 8)}

        def build(targets):
            net = transformers.LlavaForConditionalGeneration(config)
            return moelora.get_peft_model(net, peft.LoraConfig(target_modules=targets, init_lora_weights=False), "a")

        model = build(["q_proj"])
        for w in (torch.rand(2, 1), torch.rand(2, 5, 1)):  # a patch for each token and one more for the class: 5
            with pytest.raises(
                ValueError, match=r"vision_tower.* got an input of shape \(2, 5, 32\) whose rows are not"
            ):
                model(**inputs, routing_weights=w)
        assert torch.isfinite(model(**inputs, routing_weights=torch.ones(1)).logits).all()
        model = build(r".*language_model.*q_proj")
        assert torch.isfinite(model(**inputs, routing_weights=torch.rand(2, 5, 1)).logits).all()
        assert torch.isfinite(model(**inputs, routing_weights=torch.rand(2, 5, 2, 1)).logits).all()

    def test_of_a_fixed_router_on_an_encoder_decoder_model(self, make_lora, ids):
        model = adopt(make_lora("t5"))
        expected = model(input_ids=ids, labels=ids, routing_weights=torch.tensor([0.2, 0.3, 0.5])).logits
        model.base_model.attach_router(FixedRouter(NAMES, [2, 3, 5]))
        torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, expected)
