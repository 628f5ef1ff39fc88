"""Routed embeddings against the sum over adapters written out, and against stock PEFT."""

import copy

import peft
import pytest
import torch
import transformers
from peft.tuners import lora
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt, release
from moelora.nn.routers import EmbeddingRouter, PerLayerRouter

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
NAMES = ["expert_0", "expert_1", "expert_2"]
FORMS = {"N": lambda w: w[0, 0], "BN": lambda w: w[:, 0], "BSN": lambda w: w}


def gemma3():
    config = transformers.Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(11)
    return transformers.Gemma3ForCausalLM(config).eval()


def with_experts(net, n=3, **options):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)
    model = peft.get_peft_model(net, config, "expert_0")
    for name in NAMES[1:n]:
        model.add_adapter(name, copy.deepcopy(config))
    model.base_model.set_adapter(NAMES[:n])
    torch.manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


TARGETS = {
    "gpt2": ["wte", "c_attn"],
    "llama": ["embed_tokens", "q_proj", "lm_head"],
    "gemma3": ["embed_tokens", "q_proj"],
}


@pytest.fixture(params=["gpt2", "llama", "gemma3"])
def build(request, make_base):
    def build(**options):
        kind = request.param
        options = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | options
        return with_experts(gemma3() if kind == "gemma3" else make_base(kind), **options)

    return build


@pytest.fixture
def summed(loop):
    """A stock model whose layers, embeddings too, add up their adapters one after another."""

    def embedding(layer, weights):
        def forward(ids):
            y = layer.base_layer(ids)
            scale = getattr(layer.base_layer, "embed_scale", 1.0)
            for i, name in enumerate(layer.active_adapters):
                if name in layer.lora_embedding_A:
                    w = weights[:, None, i, None] if weights.dim() == 2 else weights[..., i, None]
                    A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
                    y = y + scale * w * layer.scaling[name] * (A.T[ids] @ B.T)
            return y

        return forward

    def summed(model, weights):
        loop(model, weights)
        for layer in model.modules():
            if isinstance(layer, lora.Embedding):
                layer.forward = embedding(layer, weights)
        return model

    return summed


@pytest.mark.parametrize("form", FORMS)
def test_weights_equal_the_sum_over_adapters_with_every_gradient(build, summed, same_step, ids, weights, form):
    w, v = (FORMS[form](weights).clone().requires_grad_() for _ in range(2))
    model, reference = adopt(build()).train(), summed(build().train(), v)
    out, got = same_step(model, reference, ids, w, **CLOSE)
    torch.testing.assert_close(w.grad, v.grad, **CLOSE)
    assert any("lora_embedding_A" in name and gradient.any() for name, gradient in got.items())
    assert not torch.allclose(model(ids, routing_weights=w.detach().flip(-1)).logits, out.logits, **CLOSE)


def test_without_weights_the_bits_and_gradients_are_stocks(build, gradients, ids):
    stock, model = build().train(), adopt(build()).train()
    for each in (stock, model):
        each(ids, labels=ids).loss.backward()
    assert torch.equal(model(ids).logits, stock(ids).logits)
    got, expected = gradients(model), gradients(stock)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_one_hot_weights_are_the_single_adapter_and_ones_their_sum(build, ids):
    stock, model = build(), adopt(build())
    torch.testing.assert_close(model(ids, routing_weights=torch.ones(3)).logits, stock(ids).logits, **CLOSE)
    for i, name in enumerate(NAMES):
        stock.set_adapter(name)
        got = model(ids, routing_weights=torch.eye(3)[i].expand(2, 7, 3)).logits
        torch.testing.assert_close(got, stock(ids).logits, **CLOSE)


def test_experts_may_differ_in_rank_and_in_the_modules_they_adapt(make_base, summed, ids, weights):
    def build():
        options = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
        torch.manual_seed(2)
        config = peft.LoraConfig(r=3, use_rslora=True, target_modules=["embed_tokens"], **options)
        model = peft.get_peft_model(make_base("llama"), config, "expert_0")
        pattern = {"embed_tokens": 5}
        targets = ["embed_tokens", "k_proj"]
        model.add_adapter("expert_1", peft.LoraConfig(rank_pattern=pattern, target_modules=targets, **options))
        model.add_adapter("expert_2", peft.LoraConfig(target_modules=["k_proj"], **options))
        model.base_model.set_adapter(NAMES)
        return model.eval()

    for names in (NAMES, ["expert_2"]):  # of which the last has no embeddings
        model, reference, w = adopt(build()), build(), weights[..., : len(names)]
        for each in (model, reference):
            each.base_model.set_adapter(names)
        torch.testing.assert_close(model(ids, routing_weights=w).logits, summed(reference, w)(ids).logits, **CLOSE)


def test_dropout_leaves_embeddings_alone_as_in_peft(make_base, ids, weights):
    options = {"target_modules": ["embed_tokens"]}
    dropping = adopt(with_experts(make_base("llama"), lora_dropout=0.5, **options)).train()
    plain = adopt(with_experts(make_base("llama"), **options)).train()
    assert torch.equal(dropping(ids, routing_weights=weights).logits, plain(ids, routing_weights=weights).logits)


def test_float32_adapters_over_a_bfloat16_base_and_autocast(build, ids, weights):
    exact = adopt(build())(ids, routing_weights=weights).logits
    model = adopt(build())
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids, routing_weights=weights).logits
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    embedding = model.get_input_embeddings()
    assert embedding(ids, routing_weights=weights).dtype is torch.bfloat16
    low = model(ids, routing_weights=weights).logits
    model.bfloat16()  # adapters too; the weights stay float32
    lowest = model(ids, routing_weights=weights).logits
    for got in (cast, low, lowest):
        assert got.dtype is torch.bfloat16
        assert (got.float() - exact).abs().max() < 0.05 * exact.abs().max()


class TestTiedToTheHead:
    """PEFT ties the first adapter of a model; later ones have embeddings and no head."""

    OPTIONS = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}

    def tied(self):
        torch.manual_seed(11)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
        return with_experts(transformers.LlamaForCausalLM(config).eval(), **self.OPTIONS)

    def test_tied_adapters_are_mixed_in_both_and_get_their_gradients(self, summed, same_step, ids, weights):
        model, reference = adopt(self.tied()).train(), summed(self.tied().train(), weights)
        embedding, head = model.get_input_embeddings(), model.base_model.model.lm_head
        assert (type(embedding), type(head)) == (moelora.Embedding, moelora.Linear)
        assert head.lora_B["expert_0"].weight.data_ptr() == embedding.lora_embedding_A["expert_0"].data_ptr()
        same_step(model, reference, ids, weights, **CLOSE)

    @pytest.mark.parametrize("way", ["adopt", "release"])
    def test_the_two_stay_one_storage(self, ids, weights, way):
        model = adopt(self.tied())
        if way == "release":
            release(model)
        embedding, head = model.get_input_embeddings(), model.base_model.model.lm_head
        with torch.no_grad():
            embedding.lora_embedding_A["expert_0"].fill_(3)
        assert (head.lora_B["expert_0"].weight == 3).all()
        assert embedding.weight.data_ptr() == head.weight.data_ptr()

    def test_the_head_follows_the_logits_that_are_kept(self, ids, weights):
        model = adopt(self.tied())
        every = model(ids, routing_weights=weights).logits
        for keep, part in ((2, every[:, -2:]), (torch.tensor([0, 5]), every[:, [0, 5]])):
            torch.testing.assert_close(model(ids, routing_weights=weights, logits_to_keep=keep).logits, part, **CLOSE)


class TestWithARouter:
    @pytest.mark.parametrize("reads", ["embeddings", "layers"])
    def test_the_embeddings_run_before_any_gate_and_take_the_uniform_mixture(self, make_base, ids, reads):
        model = adopt(with_experts(make_base("llama"), target_modules=["embed_tokens", "q_proj"]))
        torch.manual_seed(1)
        embedding = reads == "embeddings"
        router = EmbeddingRouter(NAMES, 32) if embedding else PerLayerRouter(NAMES, 32, num_layers=3)
        for gate in [router.gate] if embedding else router.gate:
            nn.init.normal_(gate.weight, std=2)
        embeddings, read = model.get_input_embeddings(), []
        expected = embeddings(ids, routing_weights=torch.full((3,), 1 / 3))
        model.base_model.attach_router(router)
        embeddings.register_forward_hook(lambda module, args, output: read.append(output))
        logits = model(ids).logits
        assert torch.equal(read[0], expected)
        if embedding:
            w = router(expected)
            assert w.std() > 0.05
            rest = model(inputs_embeds=expected, routing_weights=w).logits
            torch.testing.assert_close(logits, rest, **CLOSE)

    def test_a_router_reads_the_adapted_embeddings_though_the_adapter_came_later(self, make_base, ids):
        model = adopt(with_experts(make_base("llama"), n=2, target_modules=["q_proj"]))
        torch.manual_seed(1)
        router = EmbeddingRouter(NAMES, 32)
        nn.init.normal_(router.gate.weight, std=2)
        model.base_model.attach_router(router)
        config = peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
        model.add_adapter("expert_2", config)
        moelora.activate_all_experts(model)
        embeddings = model.get_input_embeddings()
        assert type(embeddings) is moelora.Embedding
        adapted = embeddings(ids, routing_weights=torch.full((3,), 1 / 3))
        expected = model(inputs_embeds=adapted, routing_weights=router(adapted)).logits
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        model.base_model.detach_router()
        assert not embeddings._forward_hooks and not embeddings.base_layer._forward_hooks

    def test_the_router_learns_and_the_embeddings_with_it(self, make_base, ids):
        model = adopt(with_experts(make_base("llama"), target_modules=["embed_tokens", "v_proj"])).train()
        model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3), MoELoraConfig())
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.any(), name


class TestOtherEmbeddings:
    """Positions and token types are no tokens of the text, whatever their number."""

    @pytest.fixture
    def model(self, make_base):
        return adopt(with_experts(make_base("gpt2"), target_modules=["wpe", "c_attn"], fan_in_fan_out=True))

    def test_take_one_mixture_for_all(self, model, make_base, summed, ids):
        reference = with_experts(make_base("gpt2"), target_modules=["wpe", "c_attn"], fan_in_fan_out=True)
        w = torch.tensor([0.2, 0.9, 0.4])
        torch.testing.assert_close(model(ids, routing_weights=w).logits, summed(reference, w)(ids).logits, **CLOSE)

    @pytest.mark.parametrize("batch", [1, 2, 7])
    @pytest.mark.parametrize("axes", [2, 3])
    def test_refuse_everything_else(self, model, batch, axes):
        ids = torch.randint(3, 97, (batch, 7))
        shape = (batch, 3) if axes == 2 else (batch, 7, 3)
        message = r"transformer.wpe got an input of shape \(1, 7\) whose rows are not the tokens.*pass \[N\], or leave"
        with pytest.raises(ValueError, match=message):
            model(ids, routing_weights=torch.rand(shape))

    def test_of_token_types(self):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
        net = transformers.BertModel(transformers.BertConfig(vocab_size=97, **sizes))
        targets = ["word_embeddings", "token_type_embeddings", "query"]
        model = adopt(with_experts(net, target_modules=targets, task_type=None))
        ids = torch.randint(3, 97, (2, 7))
        w = torch.rand(2, 7, 3)
        with pytest.raises(ValueError, match=r"token_type_embeddings got an input of shape"):
            model(ids, token_type_ids=torch.zeros_like(ids), routing_weights=w)
        model(ids, routing_weights=w[0, 0])

    def test_the_relative_positions_of_t5_as_many_as_there_are_sequences(self, make_base):
        model = adopt(with_experts(make_base("t5"), target_modules=["relative_attention_bias", "q"], task_type=None))
        ids = torch.randint(3, 97, (7, 7))
        with pytest.raises(ValueError, match=r"relative_attention_bias got an input of shape \(7, 7\)"):
            model(input_ids=ids, labels=ids, routing_weights=torch.rand(7, 3))

    def test_weights_per_layer_have_nothing_for_an_embedding(self, make_base, ids):
        model = adopt(with_experts(make_base("llama"), target_modules=["embed_tokens", "q_proj"]))
        with pytest.raises(ValueError, match=r"model.embed_tokens is in no decoder layer"):
            model(ids, routing_weights=torch.rand(2, 7, 3, 3))


def test_the_embeddings_of_encoder_and_decoder_take_mixtures_of_sequences(make_base, summed, ids):
    def build():
        return with_experts(make_base("t5"), target_modules=["shared", "embed_tokens", "q"], task_type=None)

    w, labels = torch.rand(2, 3), ids[:, :4].clone()
    assert any(isinstance(m, lora.Embedding) for m in build().modules())
    expected = summed(build(), w)(input_ids=ids, labels=labels).logits
    got = adopt(build())(input_ids=ids, labels=labels, routing_weights=w).logits
    torch.testing.assert_close(got, expected, **CLOSE)


class TestOnItsOwn:
    @pytest.fixture
    def layer(self, make_base):
        return adopt(with_experts(make_base("llama"), target_modules=["embed_tokens"])).get_input_embeddings()

    @pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
    def test_takes_weights_for_its_ids(self, layer, shape):
        ids = torch.randint(3, 97, shape)
        w = torch.rand(*shape, 3)
        each = torch.stack([layer(ids, routing_weights=torch.eye(3)[i]) - layer.base_layer(ids) for i in range(3)], -2)
        expected = layer.base_layer(ids) + (w[..., None] * each).sum(-2)
        torch.testing.assert_close(layer(ids, routing_weights=w), expected, **CLOSE)
        if len(shape) == 2:
            per_sequence = layer(ids, routing_weights=w[:, :1].expand_as(w))
            torch.testing.assert_close(layer(ids, routing_weights=w[:, 0]), per_sequence)

    def test_weights_per_sequence_are_not_per_position(self, layer):
        ids, w = torch.randint(3, 97, (5, 5)), torch.rand(5, 3)
        expected = layer(ids, routing_weights=w[:, None].expand(5, 5, 3))
        torch.testing.assert_close(layer(ids, routing_weights=w), expected)

    @pytest.mark.parametrize("shape", [(2, 4, 3), (3, 3), (1, 5, 3), (2, 5, 1, 3)])
    def test_refuses_weights_that_do_not_fit(self, layer, shape):
        with pytest.raises(ValueError, match=r"must have shape \[N\], \[B, N\] or ids.shape \+ \(N,\)"):
            layer(torch.randint(3, 97, (2, 5)), routing_weights=torch.rand(shape))

    def test_refuses_adapter_names_and_merged_adapters(self, layer):
        ids, w = torch.randint(3, 97, (2, 5)), torch.rand(3)
        with pytest.raises(ValueError, match="got adapter_names together with routing weights"):
            layer(ids, adapter_names=NAMES[:2], routing_weights=w)
        layer.merge(adapter_names=["expert_0"])
        with pytest.raises(ValueError, match=r"model.embed_tokens has merged adapters \['expert_0'\]"):
            layer(ids, routing_weights=w)
        layer.unmerge()
        assert torch.isfinite(layer(ids, routing_weights=w)).all()

    def test_keeps_no_tensor_of_all_experts_and_features(self, layer):
        """Nothing as large as tokens x experts x width is made for the backward."""
        ids, w, kept = torch.randint(3, 97, (2, 50)), torch.rand(2, 50, 3), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            layer(ids, routing_weights=w.requires_grad_())
        assert max(kept) <= max(100 * 32, 97 * 4)


def test_generate_with_weights_per_token_is_cached_as_uncached(make_base, ids, weights):
    model = adopt(with_experts(make_base("llama"), target_modules=["embed_tokens", "q_proj", "lm_head"]))
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**options, routing_weights=weights)
    assert torch.equal(cached, model.generate(**options, routing_weights=weights, use_cache=False))
    assert not torch.equal(cached, model.generate(**options, routing_weights=weights.flip(-1)))


def test_logits_mixture_is_n_passes(make_base, ids, weights):
    options = {"target_modules": ["embed_tokens", "q_proj"]}
    stock, model = with_experts(make_base("llama"), **options), adopt(with_experts(make_base("llama"), **options))
    expected = 0
    for i, name in enumerate(NAMES):
        stock.set_adapter(name)
        expected = expected + weights[..., i, None] * stock(ids).logits
    got = model(ids, routing_weights=weights, mixture="logits").logits
    torch.testing.assert_close(got, expected, **CLOSE)


def test_release_gives_the_stock_class_back(make_base):
    model = with_experts(make_base("llama"), target_modules=["embed_tokens"])
    text = repr(model)
    assert type(adopt(model).get_input_embeddings()) is moelora.Embedding
    assert [line for line in repr(model).splitlines() if "experts: " not in line] == text.splitlines()
    assert type(release(model).get_input_embeddings()) is lora.Embedding


def test_the_padding_token_gets_no_gradient_as_in_peft(make_base):
    model = adopt(with_experts(make_base("llama"), target_modules=["embed_tokens"])).train()
    ids = torch.tensor([[5, 0, 9]])
    assert model.get_input_embeddings().base_layer.padding_idx == 0
    model(ids, labels=ids, routing_weights=torch.rand(1, 3, 3)).loss.backward()
    gradient = model.get_input_embeddings().lora_embedding_A["expert_1"].grad
    assert not gradient[:, 0].any() and gradient[:, 5].any()
