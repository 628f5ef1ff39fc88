"""Explicit routing weights against PEFT's own results and against the loop over adapters."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import moelora
from moelora import adopt
from moelora.nn.routers import FixedRouter

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def expand(weights, form):
    """One of the forms of weights for `ids`, from [B, S, N]."""
    return {"N": weights[0, 0], "BN": weights[:, 0], "BSN": weights}[form]


@pytest.mark.parametrize("form", ["N", "BN", "BSN"])
def test_weights_equal_the_loop_over_adapters(kind, make_lora, loop, same_step, ids, weights, form):
    w, v = (expand(weights, form).clone().requires_grad_() for _ in range(2))
    model, reference = adopt(make_lora(kind)).train(), loop(make_lora(kind).train(), v)
    same_step(model, reference, ids, w, **CLOSE)
    torch.testing.assert_close(w.grad, v.grad, **CLOSE)


def test_weights_per_layer_equal_the_loop_over_adapters(kind, make_lora, loop, ids):
    w = torch.rand(2, 7, 3, 3, generator=torch.Generator().manual_seed(0))

    def of(name):
        return w[:, :, int(name.split(".h." if kind == "gpt2" else ".layers.")[1].split(".")[0])]

    expected = loop(make_lora(kind), w, by_layer=of)(ids).logits
    torch.testing.assert_close(adopt(make_lora(kind))(ids, routing_weights=w).logits, expected, **CLOSE)


def test_gradients_reach_weights_per_layer(make_lora, loop, ids):
    w, v = (torch.rand(2, 7, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    adopt(make_lora("llama"))(ids, labels=ids, routing_weights=w).loss.backward()
    reference = loop(make_lora("llama"), v, by_layer=lambda name: v[:, :, int(name.split(".layers.")[1][0])])
    reference(ids, labels=ids).loss.backward()
    torch.testing.assert_close(w.grad, v.grad, **CLOSE)


def test_a_static_mixture_per_layer_is_the_only_broadcast(make_lora, ids):
    model, w = adopt(make_lora("llama")), torch.rand(1, 1, 3, 3)
    expected = model(ids, routing_weights=w.expand(2, 7, 3, 3)).logits
    torch.testing.assert_close(model(ids, routing_weights=w).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="is for 1 sequences, the batch has 2"):
        model(ids, routing_weights=torch.rand(1, 7, 3, 3))
    with pytest.raises(ValueError, match="is for 1 sequences, the batch has 2"):
        model(ids, routing_weights=torch.rand(1, 7, 3))


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_one_hot_weights_are_the_single_adapter(kind, make_lora, ids, expert):
    stock = make_lora(kind)
    stock.set_adapter(f"expert_{expert}")
    w = nn.functional.one_hot(torch.full((2, 7), expert), 3)  # integers are taken
    torch.testing.assert_close(adopt(make_lora(kind))(ids, routing_weights=w).logits, stock(ids).logits, **CLOSE)


def test_ones_are_the_plain_sum_of_the_active_adapters(kind, make_lora, ids):
    expected = make_lora(kind)(ids).logits
    got = adopt(make_lora(kind))(ids, routing_weights=torch.ones(2, 7, 3, dtype=torch.bool)).logits
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_single_expert_scales_its_adapter(kind, make_lora, loop, ids):
    w = torch.rand(2, 7, 1)
    expected = loop(make_lora(kind, n=1), w)(ids).logits
    torch.testing.assert_close(adopt(make_lora(kind, n=1))(ids, routing_weights=w).logits, expected, **CLOSE)


def test_zero_weights_are_the_base_model(kind, make_base, make_lora, ids):
    got = adopt(make_lora(kind))(ids, routing_weights=torch.zeros(3)).logits
    torch.testing.assert_close(got, make_base(kind)(ids).logits, **CLOSE)


def test_weights_per_sequence_are_not_per_position_when_the_batch_is_as_long_as_the_sequence(make_lora, loop):
    square = torch.randint(3, 97, (5, 5))
    w = torch.rand(5, 3)
    expected = loop(make_lora("llama"), w[:, None].expand(5, 5, 3))(square).logits
    torch.testing.assert_close(adopt(make_lora("llama"))(square, routing_weights=w).logits, expected, **CLOSE)


def test_columns_are_the_active_adapters_not_all_that_are_loaded(make_lora, loop, ids):
    w = torch.rand(2, 7, 2)
    model, reference = adopt(make_lora("llama", n=5)), make_lora("llama", n=5)
    for each in (model, reference):
        each.base_model.set_adapter(["expert_3", "expert_1"])
    torch.testing.assert_close(model(ids, routing_weights=w).logits, loop(reference, w)(ids).logits, **CLOSE)


def test_experts_may_differ_in_rank_scaling_and_modules(make_base, loop, same_step, ids, weights):
    def build():
        model = peft.get_peft_model(
            make_base("llama"), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), "a"
        )
        patterns = {"rank_pattern": {"q_proj": 40}, "alpha_pattern": {"v_proj": 7}}
        model.add_adapter("b", peft.LoraConfig(r=5, use_rslora=True, target_modules=["q_proj", "v_proj"], **patterns))
        model.add_adapter("c", peft.LoraConfig(r=1, lora_alpha=2, target_modules=["v_proj"], layers_to_transform=[1]))
        model.base_model.set_adapter(["a", "b", "c"])
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.2)
        return model

    model, reference = adopt(build()), loop(build(), weights)
    same_step(model, reference, ids, weights, **CLOSE)


def test_layers_that_none_of_the_active_experts_adapts_are_the_base(make_base, loop, ids):
    def build():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(make_base("llama"), config, "everywhere")
        torch.manual_seed(1)
        model.add_adapter("there", peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
        model.base_model.set_adapter(["there"])
        nn.init.normal_(model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["there"].weight)
        return model

    w = torch.rand(2, 7, 1)
    got = adopt(build())(ids, routing_weights=w).logits
    torch.testing.assert_close(got, loop(build(), w)(ids).logits, **CLOSE)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_base_layer_that_trains_gets_its_gradient(make_lora, loop, ids, weights, trained):
    def build():
        model = make_lora("gpt2", target_modules=["c_attn", "lm_head"]).train()
        head = model.base_model.model.lm_head
        head.base_layer.bias = nn.Parameter(torch.zeros(97), requires_grad=False)
        getattr(head.base_layer, trained).requires_grad_()
        return model

    model, reference = adopt(build()), loop(build(), weights)
    model(ids, labels=ids, routing_weights=weights).loss.backward()
    reference(ids, labels=ids).loss.backward()
    got, expected = (getattr(m.base_model.model.lm_head.base_layer, trained).grad for m in (model, reference))
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_base_layer_that_is_watched_is_called(make_lora, ids, weights):
    model = adopt(make_lora("llama"))
    expected = model(ids, routing_weights=weights).logits
    base, calls = model.base_model.model.model.layers[0].mlp.up_proj.base_layer, []
    base.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(model(ids, routing_weights=weights).logits, expected)
    assert len(calls) == 1


def test_lora_bias_is_mixed_with_its_expert(make_base, make_lora, loop, ids, weights):
    def build():
        model = make_lora("llama", lora_bias=True, target_modules=["q_proj", "down_proj"])
        torch.manual_seed(2)
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(p)
        return model

    for w in (weights, weights[:, 0], weights[0, 0]):
        expected = loop(build(), w)(ids).logits
        torch.testing.assert_close(adopt(build())(ids, routing_weights=w).logits, expected, **CLOSE)


def test_dropout_drops_in_training_alone_and_with_a_mask_of_its_own_for_each_expert(make_lora):
    # With A = 1, B = 1 and x = 1, each element of the output counts the elements that the expert has kept.
    model = adopt(make_lora("llama", n=2, lora_dropout=0.5, r=1, lora_alpha=1, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        for name in ("expert_0", "expert_1"):
            layer.lora_A[name].weight.fill_(1)
            layer.lora_B[name].weight.fill_(1)
        layer.base_layer.weight.zero_()
    x = torch.ones(2, 50, 32)
    model.eval()
    torch.testing.assert_close(layer(x, routing_weights=torch.eye(2)), torch.full((2, 50, 32), 32.0))
    model.train()
    counts = layer(x, routing_weights=torch.eye(2))[..., 0]
    assert not torch.equal(counts[0], counts[1])
    assert torch.equal(counts, counts.round())
    assert abs(float(counts.mean()) - 32) < 3


def test_adapters_in_float32_over_a_bfloat16_base_keep_the_dtype_of_the_base(kind, make_lora, loop, ids, weights):
    def build():
        model = make_lora(kind)
        for name, p in model.named_parameters():
            if "lora_" not in name:
                p.data = p.data.bfloat16()
        return model

    got = adopt(build())(ids, routing_weights=weights).logits
    exact = loop(make_lora(kind), weights)(ids).logits
    assert got.dtype is torch.bfloat16
    assert (got.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_bfloat16_model_takes_float32_weights_and_returns_their_gradient(make_lora, ids, weights):
    model = adopt(make_lora("llama").bfloat16())
    w = weights.clone().requires_grad_()
    model(ids, labels=ids, routing_weights=w).loss.backward()
    assert w.grad.dtype is torch.float32
    assert w.grad.abs().sum() > 0


def test_autocast_is_near_float32(make_lora, ids, weights):
    model = adopt(make_lora("llama"))
    exact = model(ids, routing_weights=weights).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, routing_weights=weights).logits
    assert got.dtype is torch.bfloat16
    assert (got.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_head_sees_the_weights_of_the_positions_whose_logits_are_kept(make_lora, loop, ids, weights):
    targets = ["q_proj", "lm_head"]
    model, reference = (make_lora("llama", target_modules=targets) for _ in range(2))
    adopt(model)
    expected = loop(reference, weights)(ids).logits
    torch.testing.assert_close(model(ids, routing_weights=weights).logits, expected, **CLOSE)
    last = model(ids, routing_weights=weights, logits_to_keep=2).logits
    torch.testing.assert_close(last, expected[:, -2:], **CLOSE)
    some = model(ids, routing_weights=weights, logits_to_keep=torch.tensor([0, 4, 5])).logits
    torch.testing.assert_close(some, expected[:, [0, 4, 5]], **CLOSE)
    backwards = torch.arange(7).flip(0)  # as many as there are tokens
    turned = model(ids, routing_weights=weights, logits_to_keep=backwards).logits
    torch.testing.assert_close(turned, expected[:, backwards], **CLOSE)
    per_sequence = model(ids, routing_weights=weights[:, 0], logits_to_keep=1).logits
    per_token = model(ids, routing_weights=weights[:, :1].expand(2, 7, 3), logits_to_keep=1).logits
    torch.testing.assert_close(per_sequence, per_token, **CLOSE)


def test_experts_with_no_weight_get_gradients_of_zero_not_none(kind, make_lora, ids):
    model = adopt(make_lora(kind)).train()
    w = torch.tensor([1.0, 0.0, 0.5])
    model(ids, labels=ids, routing_weights=w).loss.backward()
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.grad is not None, name
            assert bool(p.grad.abs().sum() == 0) == ("expert_1" in name)


def test_nan_weights_spread_to_their_sequence(make_lora, ids):
    w = torch.ones(2, 3)
    w[1, 2] = torch.nan
    logits = adopt(make_lora("llama"))(ids, routing_weights=w).logits
    assert torch.isfinite(logits[0]).all()
    assert logits[1].isnan().all()


def test_disabled_adapters_are_the_base_model_with_weights_too(kind, make_base, make_lora, ids, weights):
    model = adopt(make_lora(kind))
    expected = make_base(kind)(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids, routing_weights=weights).logits, expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(ids, routing_weights=weights).logits, expected)
    assert torch.equal(model.base_model(ids, routing_weights=weights).logits, expected)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_every_way_of_calling_the_adopted_model_takes_weights(make_lora, ids, weights, task):
    model = adopt(make_lora("llama", task_type=task))
    expected = model(ids, routing_weights=weights).logits
    plain = model(ids).logits
    assert not torch.allclose(plain, expected)
    assert torch.equal(
        model(input_ids=ids, attention_mask=torch.ones_like(ids), routing_weights=weights).logits, expected
    )
    assert torch.equal(model.base_model(ids, routing_weights=weights).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, routing_weights=weights).logits, expected)
    assert torch.equal(model(ids).logits, plain)


def test_a_plain_module_takes_weights_for_its_rows():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = moelora.get_peft_model(net, config, "a")
    model.add_adapter("b", copy.deepcopy(config))
    names = moelora.activate_all_experts(model)
    x, w = torch.randn(6, 5), torch.rand(6, 2)

    def by_hand(layer, x):
        y = layer.base_layer(x)
        for i, name in enumerate(names):
            y = y + w[:, i, None] * layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
        return y

    layers = model.base_model.model
    torch.testing.assert_close(model(x, routing_weights=w), by_hand(layers[2], by_hand(layers[0], x).relu()))
    with pytest.raises(ValueError, match="rows are not the tokens"):
        model(x, routing_weights=w[:4])


class TestALayerOnItsOwn:
    @pytest.fixture
    def layer(self, make_lora):
        return adopt(make_lora("gpt2")).base_model.model.transformer.h[1].attn.c_attn  # Conv1D

    def mixed(self, layer, x, w):
        y = layer.base_layer(x)
        for i, name in enumerate(layer.active_adapters):
            y = y + w[..., i, None] * layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
        return y

    @pytest.mark.parametrize("shape", [(5, 24), (2, 4, 24), (2, 3, 2, 24)])
    def test_takes_a_mixture_for_all_rows_or_for_each(self, layer, shape):
        x = torch.randn(shape)
        for w in (torch.rand(3), torch.rand(*shape[:-1], 3)):
            torch.testing.assert_close(layer(x, routing_weights=w), self.mixed(layer, x, w), **CLOSE)

    def test_takes_a_mixture_for_each_sequence(self, layer):
        x, w = torch.randn(4, 4, 24), torch.rand(4, 3)
        torch.testing.assert_close(layer(x, routing_weights=w), self.mixed(layer, x, w[:, None]), **CLOSE)

    def test_needs_no_model_around_it(self):
        layer = moelora.Linear(nn.Linear(4, 6), "a", config=peft.LoraConfig(init_lora_weights=False), r=2)
        x = torch.randn(3, 4)
        expected = 0.5 * layer(x) + 0.5 * layer.base_layer(x)
        torch.testing.assert_close(layer(x, routing_weights=torch.tensor([0.5])), expected)

    def test_takes_no_tokens(self, layer):
        assert layer(torch.empty(0, 24), routing_weights=torch.empty(0, 3)).shape == (0, 72)

    @pytest.mark.parametrize(
        ("w", "error", "message"),
        [
            ([0.5, 0.5, 0], TypeError, "must be a torch.Tensor, got list"),
            (torch.ones(3, dtype=torch.complex64), TypeError, "must be real"),
            (torch.ones(2), ValueError, "one column for each active adapter"),
            (torch.ones(4, 3), ValueError, "must have shape"),
            (torch.tensor(1.0), ValueError, "must have shape"),
        ],
    )
    def test_refuses_weights_that_do_not_fit(self, layer, w, error, message):
        with pytest.raises(error, match=message):
            layer(torch.randn(5, 24), routing_weights=w)


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        ([1.0, 0.0, 0.0], TypeError, "must be a torch.Tensor, got list"),
        ({"encoder": torch.ones(3)}, ValueError, "needs an encoder-decoder model"),
        (torch.ones(3) * 1j, TypeError, "must be real"),
        (torch.ones(4), ValueError, "one column for each active adapter"),
        (torch.tensor(1.0), ValueError, "must have shape"),
        (torch.ones(1, 2, 7, 3, 3), ValueError, "must have shape"),
        (torch.ones(3, 3), ValueError, "is for 3 sequences, the batch has 2"),
        (torch.ones(4, 7, 3), ValueError, "is for 4 sequences, the batch has 2"),
        (torch.ones(2, 6, 3), ValueError, "is for 6 tokens, the input has 7"),
        (torch.ones(2, 8, 3), ValueError, "is for 8 tokens, the input has 7"),
        (torch.ones(2, 7, 2, 3), ValueError, "needs L = 3"),
        (torch.ones(3).to_sparse(), TypeError, "must be a dense tensor"),
        (torch.ones(3, device="meta"), ValueError, "got a meta tensor"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(make_lora, ids, w, error, message):
    model = adopt(make_lora("llama"))
    plain = model(ids).logits
    with pytest.raises(error, match=message):
        model(ids, routing_weights=w)
    assert torch.equal(model(ids).logits, plain)


def test_flattened_activations_are_matched_by_batch_and_length(ids):
    # The shared expert of Qwen2-MoE sees [B * S, d].
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "shared_expert_intermediate_size": 24}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    net = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(vocab_size=97, **heads, **sizes, **experts)
    ).eval()
    config = peft.LoraConfig(r=2, target_modules=r".*shared_expert\.(up|down)_proj", init_lora_weights=False)
    model = moelora.get_peft_model(net, config, "a")
    model.add_adapter("b", copy.deepcopy(config))
    moelora.activate_all_experts(model)
    model.eval()
    w = torch.rand(2, 2)
    whole = model(ids, routing_weights=w).logits
    for row in range(2):
        alone = model(ids[row : row + 1], routing_weights=w[row]).logits
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    per_token = model(ids, routing_weights=w[:, None].expand(2, 7, 2)).logits
    torch.testing.assert_close(per_token, whole)


def test_a_layer_outside_the_decoder_layers_has_no_weights_per_layer(make_lora, ids):
    model = adopt(make_lora("llama", target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head is in no decoder layer"):
        model(ids, routing_weights=torch.ones(2, 7, 3, 3))


def test_a_fixed_router_is_a_static_mixture(make_lora, ids):
    model = adopt(make_lora("llama"))
    expected = model(ids, routing_weights=torch.tensor([0.5, 0.25, 0.25])).logits
    model.base_model.attach_router(FixedRouter(["expert_0", "expert_1", "expert_2"], [2, 1, 1]))
    torch.testing.assert_close(model(ids).logits, expected)
