"""Routed layers tell the core how many experts a router of ours keeps; results are those of the dense mixture."""

import pytest
import torch
from torch import nn

import moelora
from moelora.nn import EmbeddingRouter, HiddenStateRouter, LearnedRouter, PerLayerRouter
from moelora.peft import layers

N = 12


@pytest.fixture
def passed(monkeypatch):
    """The top_k of each routed_lora call; `dense` has it forgotten."""
    seen, original = [], layers.routed_lora

    def recording(*args, top_k=None, **kwargs):
        seen.append(top_k)
        return original(*args, top_k=None if recording.dense else top_k, **kwargs)

    recording.dense, recording.seen = False, seen
    monkeypatch.setattr(layers, "routed_lora", recording)
    return recording


def adopted(make_lora, router, kind="llama", **options):
    model = moelora.adopt(make_lora(kind, N, **options))
    torch.manual_seed(3)
    model.base_model.attach_router(router([f"expert_{i}" for i in range(N)]))
    return model


def steps_both_ways(model, passed, gradients, **inputs):
    """A training step with top_k and one without: logits, losses and all gradients agree."""
    results = []
    for passed.dense in (False, True):
        model.zero_grad()
        torch.manual_seed(7)
        out = model(**inputs)
        out.loss.backward()
        results.append((out.logits, out.loss, out.router_aux_loss, {n: g.clone() for n, g in gradients(model).items()}))
    grouped, dense = results
    for a, b in zip(grouped[:3], dense[:3], strict=True):
        torch.testing.assert_close(a, b)
    assert grouped[3].keys() == dense[3].keys()
    assert any("router" in name for name in grouped[3])
    for name, g in grouped[3].items():
        torch.testing.assert_close(g, dense[3][name], rtol=1e-4, atol=1e-6, msg=name)


ROUTERS = {
    "per layer": lambda names: PerLayerRouter(names, 32, num_layers=3, top_k=2),
    "embeddings": lambda names: EmbeddingRouter(names, 32, top_k=1),
    "not renormalised": lambda names: EmbeddingRouter(names, 32, top_k=2, renormalize=False),
    "capacity": lambda names: PerLayerRouter(names, 32, num_layers=3, top_k=2, capacity_factor=0.5),
    "expert dropout": lambda names: PerLayerRouter(names, 32, num_layers=3, top_k=2, expert_dropout=0.9),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_that_of_the_dense_mixture(make_lora, ids, gradients, passed, router, checkpointing):
    model = adopted(make_lora, ROUTERS[router]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    steps_both_ways(model, passed, gradients, input_ids=ids, labels=ids)
    assert set(passed.seen) == {1 if router == "embeddings" else 2}


def test_maturity_and_experts_that_are_not_activated(make_lora, ids, gradients, passed):
    model = adopted(make_lora, ROUTERS["per layer"]).train()
    router = model.base_model.router
    router.mark_mature("expert_3", 0.2)
    router.activated[2:] = False
    router.activated[0] = False  # one is left for two picks
    steps_both_ways(model, passed, gradients, input_ids=ids, labels=ids)
    assert set(passed.seen) == {2}


def test_dropout_of_x_falls_back_to_everything_with_the_same_masks(make_lora, ids, gradients, passed):
    model = adopted(make_lora, ROUTERS["per layer"], lora_dropout=0.3).train()
    steps_both_ways(model, passed, gradients, input_ids=ids, labels=ids)


def test_eval_top_k_and_few_active_experts_count(make_lora, ids, passed):
    model = adopted(make_lora, lambda names: PerLayerRouter(names, 32, num_layers=3, top_k=2, eval_top_k=5))
    with torch.no_grad():
        model.eval()(ids)
        assert set(passed.seen) == {5}
        passed.seen.clear()
        model.train()(ids)
        assert set(passed.seen) == {2}
        passed.seen.clear()
        model.base_model.set_adapter(["expert_4"])
        model(ids)
        assert set(passed.seen) == {1}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_before_the_gate_stay_dense(make_lora, ids, gradients, passed, use_reentrant):
    model = adopted(make_lora, lambda names: HiddenStateRouter(names, 32, layer=2, top_k=2)).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    steps_both_ways(model, passed, gradients, input_ids=ids, labels=ids)
    assert set(passed.seen) == {None, 2}


def test_layers_before_the_gate_take_the_uniform_mixture_of_all(make_lora, ids, passed):
    model = adopted(make_lora, lambda names: HiddenStateRouter(names, 32, layer=1, top_k=2))
    with torch.no_grad():
        for _ in range(2):
            passed.seen.clear()
            model(ids)
            assert passed.seen == [None] * 7 + [2] * 14


def test_weights_that_are_passed_stay_dense(make_lora, ids, passed):
    model = adopted(make_lora, ROUTERS["per layer"])
    weights = nn.functional.one_hot(torch.arange(N), N)[3].float()
    with torch.no_grad():
        model(ids)
        passed.seen.clear()
        model(ids, routing_weights=weights)
        layer = next(m for m in model.modules() if isinstance(m, moelora.Linear))
        layer(torch.zeros(3, 32), routing_weights=weights)
    assert set(passed.seen) == {None}


def test_a_router_of_ones_own_is_not_held_to_zeros_outside_its_picks(make_lora, ids, passed):
    class Soft(LearnedRouter):
        reads = "embeddings"

        def route(self, *args, **kwargs):
            output = super().route(*args, **kwargs)
            return output._replace(weights=output.weights + 0.1)

    model = adopted(make_lora, lambda names: Soft(names, 32, top_k=2))
    with torch.no_grad():
        model(ids)
    assert set(passed.seen) == {None}


def test_generating_gives_the_tokens_of_the_dense_mixture(make_lora, ids, passed):
    model = adopted(make_lora, ROUTERS["per layer"])
    texts = []
    for passed.dense in (False, True):
        texts.append(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)
    assert set(passed.seen) == {2}
