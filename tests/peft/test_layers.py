"""Where a routed layer may sit, of which dtypes it may be, and layers that lack an expert."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from moelora import adopt

SHARED = ["shared_expert.up_proj", "shared_expert.gate_proj", "shared_expert.down_proj"]
NAMES = ["expert_0", "expert_1", "expert_2"]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def with_experts(net, **options):
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | options)
    model = peft.get_peft_model(net, config, NAMES[0])
    later = copy.deepcopy(config)
    later.modules_to_save = None
    for name in NAMES[1:]:
        model.add_adapter(name, copy.deepcopy(later))
    model.base_model.set_adapter(NAMES)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)], ids=str)
def test_the_shared_expert_of_qwen2_moe_sees_flattened_tokens(loop, ids, weights, shape):
    """Its input is [B * S, d], which says neither where a sequence ends nor how many there are."""

    def build():
        torch.manual_seed(0)
        config = transformers.Qwen2MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=24, pad_token_id=0,
        )  # fmt: skip
        return with_experts(transformers.Qwen2MoeForCausalLM(config).eval(), target_modules=SHARED)

    w = {1: weights[0, 0], 2: weights[:, 0], 3: weights}[len(shape)]
    per_token = w.expand(2, 7, 3) if w.dim() != 2 else w[:, None].expand(2, 7, 3)
    seen = []
    model = adopt(build())
    layer = model.base_model.model.model.layers[1].mlp.shared_expert.up_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    got = model(ids, routing_weights=w).logits
    assert seen == [(14, 32)]
    torch.testing.assert_close(got, loop(build(), per_token.reshape(14, 3))(ids).logits, **CLOSE)
    assert not torch.allclose(got, model(ids, routing_weights=w.flip(-1)).logits, **CLOSE)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)], ids=str)
def test_the_latents_of_deepseek_have_an_axis_of_one_head(loop, same_step, ids, shape):
    """kv_b_proj gets [B, 1, S, d], of all tokens in the cache where there is one."""

    def build():
        torch.manual_seed(0)
        config = transformers.DeepseekV3Config(
            vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
            first_k_dense_replace=2, pad_token_id=0,
        )  # fmt: skip
        return with_experts(transformers.DeepseekV3ForCausalLM(config).eval(), target_modules=["q_proj", "kv_b_proj"])

    w = torch.rand(shape)
    by_layer = lambda name: (w if w.dim() == 1 else w.reshape(2, 1, -1, 3)) if "kv_b" in name else w  # noqa: E731
    model = adopt(build())
    same_step(model, loop(build(), w, by_layer=by_layer), ids, w, rtol=1e-4, atol=1e-5)
    options = {"routing_weights": w, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    uncached = model.generate(ids, **options, use_cache=False)
    if w.dim() < 3:
        assert torch.equal(model.generate(ids, **options), uncached)
    else:
        with pytest.raises(ValueError, match=r"kv_b_proj got an input of shape \(2, 1, 8, 8\) whose rows are not"):
            model.generate(ids, **options)


@pytest.mark.parametrize("kind", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 7, 3), (1, 1, 2, 3)], ids=str)
def test_an_output_layer_that_is_called_decoder(loop, ids, kind, shape):
    """As ModernBERT's, which transformers takes for the stack that sees the text."""

    def build():
        torch.manual_seed(0)
        cls = getattr(transformers, kind)
        config = cls.config_class(
            vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        )  # fmt: skip
        return with_experts(cls(config).eval(), target_modules=["Wi", "Wo"], task_type=None)

    w = torch.rand(shape)
    expected = loop(build(), w, by_layer=lambda name: w[0, 0, int(name.split("layers.")[1][0])] if w.dim() > 3 else w)
    torch.testing.assert_close(adopt(build())(ids, routing_weights=w).logits, expected(ids).logits, **CLOSE)


def test_modules_to_save_run_and_train_beside_routed_layers(make_base, loop, same_step, ids, weights):
    def build():
        model = with_experts(make_base("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"]).train()
        nn.init.normal_(model.base_model.model.lm_head.modules_to_save[NAMES[0]].weight)
        return model

    model, reference = adopt(build()), loop(build(), weights)
    _, got = same_step(model, reference, ids, weights, **CLOSE)
    assert any("modules_to_save" in name for name in got)


def test_a_tied_head_is_routed_though_its_weight_is_the_embeddings(loop, same_step, ids, weights):
    def build():
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
        return with_experts(transformers.LlamaForCausalLM(config), target_modules=["lm_head", "v_proj"]).train()

    model, reference = adopt(build()), loop(build(), weights)
    assert model.base_model.model.lm_head.weight is model.get_input_embeddings().weight
    out, _ = same_step(model, reference, ids, weights, **CLOSE)
    for keep, part in ((3, out.logits[:, -3:]), (torch.tensor([6, 0]), out.logits[:, [6, 0]])):
        kept = model(ids, routing_weights=weights, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, part, **CLOSE)


# Dtypes of base and x, of two experts' adapters, and of autocast.
DTYPES = {
    "bfloat16 over float32": (torch.float32, [torch.bfloat16, torch.bfloat16], None),
    "float16 over float32": (torch.float32, [torch.float16, torch.float16], None),
    "float32 and bfloat16 over float32": (torch.float32, [torch.float32, torch.bfloat16], None),
    "bfloat16 and float32 over float32": (torch.float32, [torch.bfloat16, torch.float32], None),
    "float16 over bfloat16": (torch.bfloat16, [torch.float16, torch.float16], None),
    "bfloat16 and float16 over bfloat16": (torch.bfloat16, [torch.bfloat16, torch.float16], None),
    "bfloat16 and float64 over float64": (torch.float64, [torch.bfloat16, torch.float64], None),
    "bfloat16 over float32, autocast to float16": (torch.float32, [torch.bfloat16, torch.bfloat16], torch.float16),
    "bfloat16 over bfloat16, autocast to float16": (torch.bfloat16, [torch.bfloat16, torch.bfloat16], torch.float16),
}


def error(got, expected):
    """The norm of the difference beside that of what is expected."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize(("dtype", "adapters", "autocast"), DTYPES.values(), ids=DTYPES)
def test_adapters_of_other_dtypes_than_the_base(make_lora, dtype, adapters, autocast, hooked):
    model = make_lora("llama", n=2, target_modules=["q_proj"]).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.to(dtype)
    for name, adapter in zip(NAMES, adapters, strict=False):
        layer.lora_A[name].to(adapter)
        layer.lora_B[name].to(adapter)
    stock, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    adopt(model)
    if hooked:
        layer.base_layer.register_forward_hook(lambda *args: None)
    values, g = torch.randn(2, 7, 32).to(dtype), torch.randn(2, 7, 32)

    def step(layer, as_x=dtype, **options):
        x = values.to(as_x, copy=True).requires_grad_()
        y = layer(x, **options)
        y.backward(g.to(y.dtype))
        return {"y": y.detach(), "x": x.grad} | {
            name: p.grad for name, p in layer.named_parameters() if "lora_" in name
        }

    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        got, peer = step(layer, routing_weights=torch.ones(2)), step(stock)
    right = step(exact, torch.float64)
    assert got.keys() == peer.keys() == right.keys()
    eps = torch.finfo(dtype).eps if autocast is None else max(torch.finfo(t).eps for t in (dtype, autocast))
    for name, value in got.items():
        assert value.dtype is peer[name].dtype, name
        assert error(value, right[name]) < 4 * max(eps, torch.finfo(value.dtype).eps), name
        assert error(value, peer[name]) < 4 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("narrow", NAMES[:2])
def test_biases_of_adapters_in_several_dtypes(make_lora, narrow):
    model = make_lora("llama", n=2, target_modules=["q_proj"], lora_bias=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for name in NAMES[:2]:
        nn.init.normal_(layer.lora_B[name].bias)
    layer.lora_A[narrow].bfloat16()
    layer.lora_B[narrow].bfloat16()
    x = torch.randn(2, 7, 32)
    expected = copy.deepcopy(layer)(x)
    adopt(model)
    assert error(layer(x, routing_weights=torch.ones(2)), expected) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("lacks", NAMES)
def test_a_layer_that_lacks_an_expert_mixes_the_others(
    make_base, loop, same_step, operations, ids, weights, lacks, shape
):
    """No tensor is made on the host for that: copied to a GPU, it would wait for all work before it."""

    def build():
        model = None
        for name in NAMES:
            targets = ["v_proj"] if name == lacks else ["q_proj", "v_proj"]
            config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
            if model is None:
                model = peft.get_peft_model(make_base("llama"), config, name)
            else:
                model.add_adapter(name, config)
        model.base_model.set_adapter(NAMES)
        return model

    w = {1: weights[0, 0], 2: weights[:, 0], 3: weights}[len(shape)].clone().requires_grad_()
    v = w.detach().clone().requires_grad_()
    torch.manual_seed(3)
    stock = build()
    model, reference = adopt(copy.deepcopy(stock)).train(), loop(stock.train(), v)
    same_step(model, reference, ids, w, **CLOSE)
    torch.testing.assert_close(w.grad, v.grad, **CLOSE)

    layer, x = model.base_model.model.model.layers[0].self_attn.q_proj, torch.randn(2, 7, 32)
    names = operations(lambda: layer(x, routing_weights=w).sum().backward())
    assert names and not names & {"lift_fresh", "index", "index_select", "_to_copy"}
