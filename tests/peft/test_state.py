"""Calls leave nothing behind and do not see each other's weights."""

import threading

import pytest
import torch
from torch import nn

from moelora import adopt
from moelora.nn.routers import FixedRouter, PerLayerRouter
from moelora.peft import frame

NAMES = ["expert_0", "expert_1", "expert_2"]


def slot():
    return getattr(frame._slot, "frame", None)


@pytest.fixture
def model(make_lora):
    return adopt(make_lora("llama"))


class TestAnException:
    @pytest.fixture
    def broken(self, model):
        def fail(*args):
            raise RuntimeError("broken on purpose")

        handle = model.base_model.model.model.layers[1].mlp.register_forward_hook(fail)
        yield model
        handle.remove()

    @pytest.mark.parametrize("way", ["call", "base_model", "generate", "inside", "logits"])
    def test_leaves_no_frame(self, broken, ids, weights, way):
        broken.base_model.attach_router(FixedRouter(NAMES))
        calls = {
            "call": lambda: broken(ids, routing_weights=weights),
            "base_model": lambda: broken.base_model(ids, routing_weights=weights),
            "generate": lambda: broken.generate(input_ids=ids, routing_weights=weights, max_new_tokens=2),
            "inside": lambda: broken.get_base_model()(ids),
            "logits": lambda: broken(ids, routing_weights=weights, mixture="logits"),
        }
        with pytest.raises(RuntimeError, match="broken on purpose"):
            calls[way]()
        assert slot() is None

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there are GPUs, DataParallel wants the model on one")
def test_data_parallel_on_the_cpu_is_the_model_itself(model, ids, weights):
    expected = model(ids, routing_weights=weights).logits
    assert torch.equal(nn.DataParallel(model)(ids, routing_weights=weights).logits, expected)


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
