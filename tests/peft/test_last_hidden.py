"""A router of two passes: the base without adapters, its last hidden states to the gate, then the mixture."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt
from moelora.nn import LastHiddenRouter, PerLayerRouter, router_aux_loss

NAMES = ["expert_0", "expert_1", "expert_2"]
WIDTH = {"gpt2": 24, "llama": 32}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def router_for(kind, **options):
    torch.manual_seed(3)
    router = LastHiddenRouter(NAMES, WIDTH[kind], **options)
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return router


def attached(make_lora, kind="llama", **options):
    model, router = adopt(make_lora(kind)), router_for(kind, **options)
    model.base_model.attach_router(router)
    return model, router


def inner(model):
    return model.get_base_model().base_model


def hidden_of_base(model, ids, **options):
    """What the output head reads with all adapters off, in PEFT's own way."""
    with model.disable_adapter(), torch.no_grad():
        return inner(model)(ids, **options).last_hidden_state


@pytest.mark.parametrize("options", [{}, {"top_k": 1, "temperature": 2.0}])
def test_it_acts_as_the_weights_it_makes_of_the_base_model_would(kind, make_lora, ids, options):
    model, router = attached(make_lora, kind, **options)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    logits = model(ids, attention_mask=mask).logits
    w = router(hidden_of_base(model, ids, attention_mask=mask))
    torch.testing.assert_close(logits, model(ids, attention_mask=mask, routing_weights=w).logits, **CLOSE)
    assert not torch.allclose(logits, model(ids, attention_mask=mask, routing_weights=w.roll(1, -1)).logits, atol=1e-3)


def test_its_weights_are_there_before_the_first_layer(make_lora, ids):
    model = adopt(make_lora("llama", target_modules=["embed_tokens", "lm_head"]))
    router = router_for("llama")
    model.base_model.attach_router(router)
    w = router(hidden_of_base(model, ids))
    torch.testing.assert_close(model(ids).logits, model(ids, routing_weights=w).logits, **CLOSE)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds", "position_ids", "logits_to_keep"])
def test_arguments_of_the_forward_reach_both_passes(make_lora, ids, given):
    model, router = attached(make_lora)
    embeds = model.get_input_embeddings()(ids)
    options = {
        "input_ids": {"input_ids": ids},
        "inputs_embeds": {"inputs_embeds": embeds},
        "position_ids": {"input_ids": ids, "position_ids": torch.arange(7)[None] * 3},
        "logits_to_keep": {"input_ids": ids, "logits_to_keep": 2},
    }[given]
    read = {name: value for name, value in options.items() if name not in ("input_ids", "logits_to_keep")}
    w = router(hidden_of_base(model, None if given == "inputs_embeds" else ids, **read))
    got = model(**options, output_hidden_states=True)
    expected = model(**options, routing_weights=w, output_hidden_states=True)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    assert len(got.hidden_states) == 4
    torch.testing.assert_close(got.hidden_states, expected.hidden_states, **CLOSE)


def test_logits_are_mixed_by_it_too(make_lora, ids):
    model, router = attached(make_lora)
    w = router(hidden_of_base(model, ids))
    options = {"labels": ids, "mixture": "logits"}
    got, expected = model(ids, **options), model(ids, routing_weights=w, **options)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.loss, expected.loss)


def test_a_model_without_a_head_has_two_passes(make_base, ids):
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = adopt(get_peft_model(make_base("llama").model, config, "expert_0")).eval()
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(NAMES)
    router = router_for("llama")
    model.base_model.attach_router(router)
    with model.disable_adapter():
        w = router(model(ids).last_hidden_state)
    expected = model(ids, routing_weights=w).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected, **CLOSE)


class TestTraining:
    @pytest.mark.parametrize("reentrant", [None, False, True])
    def test_gate_and_experts_get_the_gradients_of_the_same_weights(self, make_lora, ids, reentrant):
        model, router = attached(make_lora, top_k=2, expert_dropout=0.3)
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        passes = []
        inner(model).register_forward_pre_hook(lambda *args: passes.append(torch.is_grad_enabled()))
        torch.manual_seed(0)
        recomputed = []
        for module in model.modules():
            if (function := vars(module).get("_gradient_checkpointing_func")) is not None:
                function = getattr(function, "function", function)
                spy = lambda *args, f=function, **kw: recomputed.append(torch.is_grad_enabled()) or f(*args, **kw)  # noqa: E731
                module._gradient_checkpointing_func = spy
        out = model(ids, labels=ids)
        out.loss.backward()
        assert all(recomputed)  # nothing is kept or recomputed of the first pass
        assert bool(recomputed) == (reentrant is not None)
        assert passes == [False, True]  # once each, and none in the recomputation
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()

        hidden = hidden_of_base(model, ids)
        torch.manual_seed(0)
        routing = router.route(hidden)
        expected = model(ids, labels=ids, routing_weights=routing.weights)
        aux = router_aux_loss([routing], MoELoraConfig.load_balance_loss_type)
        loss = expected.loss + MoELoraConfig.router_aux_loss_coef * aux
        torch.testing.assert_close(out.router_aux_loss, aux)
        torch.testing.assert_close(out.loss, loss)
        loss.backward()
        wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, **CLOSE)
        assert got["base_model.router.gate.weight"].any()


class TestCache:
    def test_the_first_pass_lies_in_further_layers_of_the_cache(self, make_lora, ids):
        model, _ = attached(make_lora)
        out = model(ids, use_cache=True)
        assert len(out.past_key_values.layers) == 6
        with model.disable_adapter():
            alone = inner(model)(ids, use_cache=True).past_key_values
        for layer, expected in zip(out.past_key_values.layers[3:], alone.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys)

    @pytest.mark.parametrize(
        ("make", "return_dict"),
        [("none", True), ("dynamic", True), ("dynamic", False), ("lazy", True), ("static", True), ("static", False)],
    )
    def test_calls_by_hand_go_on_with_it(self, make_lora, ids, make, return_dict):
        model, _ = attached(make_lora)
        config = model.get_base_model().config
        cache = {
            "none": lambda: None,
            "dynamic": lambda: transformers.DynamicCache(config=config),
            "lazy": lambda: transformers.DynamicCache(),
            "static": lambda: transformers.StaticCache(config=config, max_cache_len=8),
        }[make]()
        expected = model(ids, use_cache=False).logits
        parts = []
        with torch.no_grad():
            for fed in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
                out = model(fed, past_key_values=cache, use_cache=True, return_dict=return_dict)
                cache = out.past_key_values if cache is None else cache
                parts.append(out[0])
        torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)

    @torch.no_grad()
    def test_a_copied_and_a_cut_cache_go_on(self, make_lora, ids):
        model, _ = attached(make_lora)
        expected = model(ids, use_cache=False).logits
        begun = model(ids[:, :4], use_cache=True).past_key_values
        other = copy.deepcopy(begun)
        model(ids.flip(1)[:, :2], past_key_values=begun)  # goes another way
        torch.testing.assert_close(model(ids[:, 4:], past_key_values=other).logits, expected[:, 4:], **CLOSE)
        for layer in begun.layers:
            layer.keys, layer.values = layer.keys[..., :4, :], layer.values[..., :4, :]
        torch.testing.assert_close(model(ids[:, 4:], past_key_values=begun).logits, expected[:, 4:], **CLOSE)

    def test_a_cache_that_the_first_pass_has_not_seen_is_refused(self, make_lora, ids):
        model, _ = attached(make_lora)
        w = torch.ones(3) / 3
        given = model(ids[:, :4], routing_weights=w, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="holds 4 tokens, and the first pass of the router has seen 0"):
            model(ids[:, 4:], past_key_values=given)
        both = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:6], past_key_values=both, routing_weights=w)
        with pytest.raises(ValueError, match="holds 6 tokens, and the first pass of the router has seen 4"):
            model(ids[:, 6:], past_key_values=both)

    def test_its_cache_serves_given_weights_and_one_pass_routers(self, make_lora, ids):
        model, _ = attached(make_lora)
        hidden = hidden_of_base(model, ids)
        w = model.base_model.get_routing_weights(hidden)
        expected = model(ids, routing_weights=w).logits
        cache = model(ids[:, :4], use_cache=True).past_key_values
        rest = model(ids[:, 4:], past_key_values=cache, routing_weights=w[:, 4:]).logits
        torch.testing.assert_close(rest, expected[:, 4:], **CLOSE)

    def test_a_cache_that_is_offloaded_is_refused(self, make_lora, ids):
        model, _ = attached(make_lora)
        cache = transformers.DynamicCache(config=model.get_base_model().config)
        cache.offloading = True
        with pytest.raises(ValueError, match="DynamicCache as past_key_values can't hold the first pass"):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="list as past_key_values can't hold the first pass"):
            model(ids, past_key_values=[1])


class TestCalls:
    def test_a_hook_of_a_user_on_the_base_sees_two_forwards(self, make_lora, ids):
        model, _ = attached(make_lora)
        seen = []
        inner(model).register_forward_hook(lambda *args: seen.append(1))
        model.get_base_model().register_forward_hook(lambda *args: seen.append("top"))
        model(ids)
        assert seen == [1, 1, "top"]

    def test_an_exception_in_the_first_pass_leaves_nothing(self, make_lora, ids):
        model, _ = attached(make_lora)
        expected = model(ids).logits

        def fail(*args):
            raise KeyError("stop")

        hook = inner(model).register_forward_pre_hook(fail)
        for call in (model, model.get_base_model()):
            with pytest.raises(KeyError):
                call(ids)
        hook.remove()
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.get_base_model()(ids).logits, expected)
        with model.disable_adapter():
            off = model(ids).logits
        assert not torch.allclose(off, expected)

    def test_explicit_weights_and_other_routers_take_one_pass(self, make_lora, ids, weights):
        model, _ = attached(make_lora)
        seen = []
        inner(model).register_forward_hook(lambda *args: seen.append(1))
        model(ids, routing_weights=weights)
        assert len(seen) == 1
        with pytest.warns(UserWarning, match="replaced"):
            model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
        model(ids)
        assert len(seen) == 2

    def test_an_adopted_model_in_bfloat16(self, make_lora, ids):
        model, router = attached(make_lora)
        model.to(torch.bfloat16)
        out = model(ids)
        w = router(hidden_of_base(model, ids))
        assert w.dtype is torch.float32
        torch.testing.assert_close(out.logits, model(ids, routing_weights=w).logits)

    @torch.no_grad()
    def test_it_compiles_without_a_break(self, make_lora, ids):
        model = adopt(make_lora("llama", target_modules=["q_proj"]))
        model.base_model.attach_router(router_for("llama"))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got, expected = compiled(ids[:, :5], use_cache=True), model(ids)
        torch.testing.assert_close(got.logits, expected.logits[:, :5], **CLOSE)
        rest = model(ids[:, 5:], past_key_values=got.past_key_values)
        torch.testing.assert_close(rest.logits, expected.logits[:, 5:], **CLOSE)

    def test_it_is_saved_and_opened_with_its_model(self, make_lora, make_base, ids, tmp_path):
        model, router = attached(make_lora, eval_top_k=1, mlp_dim=5)
        router.add_expert("unused")
        model.save_pretrained(tmp_path)
        opened = moelora.PeftModel.from_pretrained(make_base("llama"), tmp_path).eval()
        assert isinstance(opened.base_model.router, LastHiddenRouter)
        assert opened.base_model.router.expert_names == [*NAMES, "unused"]
        assert opened.base_model.router.eval_top_k == 1
        torch.testing.assert_close(opened(ids).logits, model(ids).logits)

    def test_a_router_for_another_width_is_refused(self, make_lora):
        model = adopt(make_lora("llama"))
        with pytest.raises(ValueError, match="reads inputs of width 24, the last_hidden have width 32"):
            model.base_model.attach_router(router_for("gpt2"))
        with pytest.raises(ValueError, match="one stack of decoder layers"):
            adopt(make_lora("t5")).base_model.attach_router(router_for("gpt2"))
