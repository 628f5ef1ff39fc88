"""Calls leave nothing behind and do not see each other's weights."""

import gc
import threading
import weakref

import pytest
import torch

from moelora import adopt
from moelora.nn.routers import FixedRouter, PerLayerRouter
from moelora.peft import frame

NAMES = ["expert_0", "expert_1", "expert_2"]


def slot():
    return getattr(frame._slot, "frame", None)


def second(model):
    return model.get_base_model().model.layers[1]


@pytest.fixture
def model(make_lora):
    return adopt(make_lora("llama"))


class OnPurposeError(RuntimeError):
    pass


class TestAnException:
    CALLS = {
        "call": lambda model, ids, w: model(ids, routing_weights=w),
        "router": lambda model, ids, w: model(ids),
        "base_model": lambda model, ids, w: model.base_model(ids, routing_weights=w),
        "base_model with router": lambda model, ids, w: model.base_model(ids),
        "inside": lambda model, ids, w: model.get_base_model()(ids),
        "generate": lambda model, ids, w: model.generate(input_ids=ids, routing_weights=w, max_new_tokens=2),
        "generate with router": lambda model, ids, w: model.generate(input_ids=ids, max_new_tokens=2),
        "base_model.generate": lambda model, ids, w: model.base_model.generate(
            input_ids=ids, routing_weights=w, max_new_tokens=2
        ),
        "logits": lambda model, ids, w: model(ids, routing_weights=w, mixture="logits"),
    }
    PLACES = {
        "after a base layer": lambda model, fail: second(model).mlp.up_proj.base_layer.register_forward_hook(fail),
        "before a decoder layer": lambda model, fail: second(model).register_forward_pre_hook(fail),
        "before the model": lambda model, fail: model.get_base_model().register_forward_pre_hook(fail),
        "after the model": lambda model, fail: model.get_base_model().register_forward_hook(fail),
        "after a gate": lambda model, fail: model.base_model.router.gate[2].register_forward_hook(fail),
    }

    @pytest.mark.parametrize("error", [OnPurposeError, KeyboardInterrupt])
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("way", CALLS)
    def test_leaves_no_frame_and_a_model_that_runs_as_before(self, model, ids, weights, way, place, error):
        if place == "after a gate" and "router" not in way and way != "inside":
            pytest.skip("explicit weights need no router")
        if way == "inside" and error is KeyboardInterrupt:
            pytest.skip("the next test: torch runs no hook then")
        torch.manual_seed(1)
        model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
        expected = model(ids).logits

        def fail(*args):
            raise error("on purpose")

        hook = self.PLACES[place](model, fail)
        with pytest.raises(error, match="on purpose"):
            self.CALLS[way](model, ids, weights)
        hook.remove()
        assert slot() is None
        assert torch.equal(model(ids).logits, expected)

    def test_leaves_a_model_that_runs_plain(self, model, ids, weights):
        plain = model(ids).logits
        with pytest.raises(ValueError, match="is for 6 tokens"):
            model(ids, routing_weights=weights[:, :6])
        assert slot() is None
        assert torch.equal(model(ids).logits, plain)

    def test_that_torch_tells_no_hook_of_does_not_route_the_next_forward(self, model, ids):
        """A KeyboardInterrupt in the model inside, whose hooks are all that knows of the call."""
        plain = model(ids).logits
        model.base_model.attach_router(FixedRouter(NAMES, [1, 0, 0]))

        def interrupt(*args):
            raise KeyboardInterrupt

        hook = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.get_base_model()(ids)
        hook.remove()
        model.base_model.detach_router()
        assert torch.equal(model.get_base_model()(ids).logits, plain)
        assert slot() is None

    def test_takes_the_hooks_of_peft_off_too(self, model, ids):
        """Those that carry adapter_names to the layers, which PEFT itself leaves behind."""
        expected = model(ids).logits
        hook = second(model).register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, adapter_names=["expert_0", "expert_1"])
        hook.remove()
        assert not any(layer._forward_pre_hooks for layer in model.base_model._routed)
        assert torch.equal(model(ids).logits, expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_in_a_recomputation_leaves_no_frame(self, model, ids, weights, reentrant):
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = model(ids, labels=ids, routing_weights=weights).loss
        model.base_model.model.model.layers[1].self_attn.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        assert slot() is None


def test_threads_with_different_weights_do_not_mix(model, ids):
    mixtures = list(torch.rand(8, 2, 7, 3, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        expected = [model(ids, routing_weights=w).logits for w in mixtures]
    wrong, start = [], threading.Barrier(len(mixtures))

    def work(i):
        start.wait()
        with torch.no_grad():
            for _ in range(6):
                if not torch.equal(model(ids, routing_weights=mixtures[i]).logits, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(mixtures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_models_in_one_process_do_not_mix(make_lora, ids, weights):
    one, other = adopt(make_lora("llama")), adopt(make_lora("llama"))
    expected, plain = one(ids, routing_weights=weights).logits, other(ids).logits
    inner = []
    one.base_model.model.model.layers[1].register_forward_pre_hook(lambda *args: inner.append(other(ids).logits))
    assert torch.equal(one(ids, routing_weights=weights).logits, expected)
    assert torch.equal(inner[0], plain)


def test_a_call_inside_a_routed_call_is_its_own(model, ids, weights):
    expected, plain = model(ids, routing_weights=weights).logits, model(ids).logits
    inner, w = [], weights.flip(1)
    inner_expected = model(ids, routing_weights=w).logits

    def nested(*args):
        handle.remove()
        inner.append(model(ids).logits)
        inner.append(model(ids, routing_weights=w).logits)

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(nested)
    assert torch.equal(model(ids, routing_weights=weights).logits, expected)
    assert torch.equal(inner[0], plain)
    assert torch.equal(inner[1], inner_expected)


@pytest.mark.parametrize("routed_by", ["weights", "router"])
def test_a_base_model_called_inside_a_routed_call_is_its_own(model, ids, weights, routed_by):
    """The tuner: as the PeftModel, unlike the model inside, whose calls can't be told apart."""
    w = weights if routed_by == "weights" else None
    if w is None:
        torch.manual_seed(1)
        model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
    inner_expected, expected = model(ids[:1]).logits, model(ids, routing_weights=w).logits
    inner = []
    hook = model.base_model.model.model.layers[1].register_forward_pre_hook(
        lambda *args: (hook.remove(), inner.append(model.base_model(ids[:1]).logits))[0]
    )
    assert torch.equal(model(ids, routing_weights=w).logits, expected)
    assert torch.equal(inner[0], inner_expected)


@pytest.mark.parametrize("way", ["weights", "router", "the model inside"])
def test_the_model_inside_called_inside_its_own_routed_call_is_refused(model, ids, weights, way):
    torch.manual_seed(1)
    model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
    calls = {
        "weights": lambda: model(ids, routing_weights=weights),
        "router": lambda: model(ids),
        "the model inside": lambda: model.get_base_model()(ids),
    }
    expected, messages = calls[way]().logits, []

    def nested(*args):
        with pytest.raises(
            RuntimeError, match="LlamaForCausalLM was called while a routed call of it is under way"
        ) as e:
            model.get_base_model()(ids)
        messages.append(str(e.value))

    hook = model.base_model.model.model.layers[1].register_forward_pre_hook(nested)
    assert torch.equal(calls[way]().logits, expected)  # the call around it goes on as if nothing had been
    assert len(messages) == 1
    hook.remove()
    assert torch.equal(calls[way]().logits, expected)
    assert slot() is None


def test_an_interrupt_keeps_nothing_alive_once_the_model_is_called_again(model, ids):
    model.base_model.attach_router(FixedRouter(NAMES, [1, 0, 0]))

    class Input:
        pass

    marker = Input()
    alive = weakref.ref(marker)

    def interrupt(*args):
        raise KeyboardInterrupt

    def call(marker):
        model.get_base_model()(ids)

    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(marker)
    hook.remove()
    del marker
    model(ids)
    gc.collect()
    assert alive() is None
    assert slot() is None


def test_a_layer_called_alone_inside_nothing_is_plain(model, ids, weights):
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 32)
    plain = layer(x)
    model(ids, routing_weights=weights)
    assert torch.equal(layer(x), plain)


def test_train_and_eval_route_alike_without_dropout(model, ids, weights):
    expected = model.eval()(ids, routing_weights=weights).logits
    assert torch.equal(model.train()(ids, routing_weights=weights).logits, expected)


def test_a_router_keeps_nothing_between_forwards(model, ids):
    torch.manual_seed(0)
    model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
    first = model(ids).logits
    model(ids[:1, :3])
    assert torch.equal(model(ids).logits, first)


def test_optimizer_steps_are_seen_by_the_next_forward(model, ids, weights):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids, routing_weights=weights).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


def test_a_compiled_model_routes_as_it_does_uncompiled(model, ids, weights):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        compiled(ids, routing_weights=weights).logits, model(ids, routing_weights=weights).logits
    )
    model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3, top_k=2))
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert slot() is None


def test_an_exported_model_takes_weights(model, ids, weights):
    keywords = {"routing_weights": weights, "use_cache": False}
    program = torch.export.export(model, (ids,), keywords, strict=False)
    keywords["routing_weights"] = weights.flip(0)
    torch.testing.assert_close(program.module()(ids, **keywords).logits, model(ids, **keywords).logits)
