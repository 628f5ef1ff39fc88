"""routing_stats: what a model's routing was like, counted by hand beside it."""

import copy
import gc
import json
import math
import weakref

import numpy as np
import peft
import pytest
import torch
from torch import nn

import moelora
from moelora import adopt, routing_stats
from moelora.nn.routers import EmbeddingRouter, FixedRouter, HiddenStateRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
LENGTHS = torch.tensor([4, 7])
MASK = (torch.arange(7) < LENGTHS[:, None]).long()


@pytest.fixture
def model(make_lora):
    return adopt(make_lora("llama"))


def router_for(reads, **options):
    torch.manual_seed(3)
    router = {
        "embeddings": lambda: EmbeddingRouter(NAMES, 32, **options),
        "layer": lambda: HiddenStateRouter(NAMES, 32, layer=1, **options),
        "layers": lambda: PerLayerRouter(NAMES, 32, num_layers=3, **options),
    }[reads]()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return router


def routings_of(router):
    """What the router decides from now on."""
    seen, route = [], router.route

    def watched(*args, layer=None, **kwargs):
        seen.append((layer, route(*args, layer=layer, **kwargs)))
        return seen[-1][1]

    router.route = watched
    return seen


def by_hand(rows):
    """The numbers of weights [T, N], one token after another."""
    rows = torch.as_tensor(rows).tolist()
    n, count = len(rows[0]), len(rows)
    usage = [sum(row[e] != 0 for row in rows) / count for e in range(n)]
    weight = [sum(row[e] for row in rows) / count for e in range(n)]

    def entropy(row):
        total = sum(map(abs, row))
        return -sum(abs(w) / total * math.log(abs(w) / total) for w in row if w)

    mean = sum(weight) / n
    deviation = math.sqrt(sum((w - mean) ** 2 for w in weight) / n)
    return {
        "tokens": count,
        "usage": usage,
        "weight": weight,
        "entropy": sum(map(entropy, rows)) / count,
        "entropy_of_mean": entropy(weight),
        "imbalance": max(weight) / mean,
        "variation": deviation / mean,
    }


def assert_counts(usage, rows):
    for name, expected in by_hand(rows).items():
        np.testing.assert_allclose(getattr(usage, name), expected, rtol=1e-5, atol=1e-7, err_msg=name)


def unmasked(weights, mask=MASK):
    return weights[mask.bool()]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 1}], ids=["dense", "top-2", "top-1"])
@pytest.mark.parametrize("reads", ["embeddings", "layer", "layers"])
def test_of_a_router_counts_tokens_that_are_not_padding(model, ids, reads, options):
    router = router_for(reads, **options)
    model.base_model.attach_router(router)
    seen = routings_of(router)
    with routing_stats(model) as stats:
        model(ids, attention_mask=MASK)
    assert stats.experts == NAMES
    assert_counts(stats, torch.cat([unmasked(output.weights) for _, output in seen]))
    assert sorted(stats.layers) == ([0, 1, 2] if reads == "layers" else [])
    for layer, usage in stats.layers.items():
        assert_counts(usage, unmasked(next(output.weights for index, output in seen if index == layer)))


class OfSequences(EmbeddingRouter):
    """One mixture for each sequence, from the mean of its embeddings."""

    def route(self, hidden_states, attention_mask=None, *, layer=None, active=None):
        return super().route(hidden_states.mean(-2), active=active)


def test_of_a_router_of_whole_sequences_counts_their_tokens(model, ids):
    router = OfSequences(NAMES, 32, top_k=2)
    nn.init.normal_(router.gate.weight, std=9.0)
    model.base_model.attach_router(router)
    seen = routings_of(router)
    with routing_stats(model) as stats:
        model(ids, attention_mask=MASK)
    assert_counts(stats, seen[0][1].weights.repeat_interleave(LENGTHS, 0))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3), (2, 7, 3, 3), (1, 1, 3, 3)])
def test_of_given_weights_counts_every_token_of_a_sequence(model, ids, shape):
    w = torch.rand(shape, generator=torch.Generator().manual_seed(4)) - 0.2
    w[..., 1] *= torch.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % 2
    with routing_stats(model) as stats:
        model(ids, attention_mask=MASK, routing_weights=w)
    each = w if len(shape) != 2 else w[:, None]
    if len(shape) < 4:
        assert_counts(stats, unmasked(each.expand(2, 7, 3)))
        assert not stats.layers
    else:
        each = w.expand(2, 7, 3, 3)
        assert_counts(stats, unmasked(each).flatten(0, 1))
        for layer, usage in stats.layers.items():
            assert_counts(usage, unmasked(each[:, :, layer]))


def test_of_a_fixed_router_and_without_a_mask(model, ids):
    model.base_model.attach_router(FixedRouter(NAMES, [2, 1, 1]))
    with routing_stats(model) as stats:
        model(ids)
    assert_counts(stats, torch.tensor([0.5, 0.25, 0.25]).expand(14, 3))


def test_adds_up_over_forwards_and_goes_on_when_entered_again(model, ids):
    mixtures = torch.rand(3, 2, 7, 3, generator=torch.Generator().manual_seed(5))
    with routing_stats(model) as stats:
        model(ids, routing_weights=mixtures[0])
        model(ids, routing_weights=mixtures[1])
    model(ids, routing_weights=mixtures[2])  # which nobody watches
    assert_counts(stats, mixtures[:2].flatten(0, 2))
    with stats:
        model(ids, routing_weights=mixtures[2])
    assert_counts(stats, mixtures.flatten(0, 2))


def test_a_capacity_shows_in_the_weights_and_not_in_the_usage(model, ids):
    router = router_for("embeddings", top_k=1, capacity_factor=0.5)
    model.base_model.attach_router(router)
    seen = routings_of(router)
    with routing_stats(model) as stats:
        model.train()(ids)
    (_, output), *_ = seen
    assert (output.weights.sum(-1) == 0).any()
    assert stats.usage.sum() == pytest.approx(1)
    np.testing.assert_allclose(stats.usage, output.counts / 14)
    np.testing.assert_allclose(stats.weight, output.weights.flatten(0, 1).mean(0).detach(), rtol=1e-6)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_training_step_counts_once_whatever_is_computed_again(model, ids, reentrant):
    router = router_for("layers", top_k=2)
    model.base_model.attach_router(router)
    with torch.no_grad(), routing_stats(model) as expected:
        model.train()(ids)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with routing_stats(model) as stats:
        model(ids, labels=ids).loss.backward()
    assert stats.tokens == 3 * 14
    np.testing.assert_allclose(stats.usage, expected.usage)
    np.testing.assert_allclose(stats.weight, expected.weight, rtol=1e-5)


def test_watching_changes_neither_results_nor_gradients(make_lora, gradients, ids):
    models = [adopt(make_lora("llama")) for _ in range(2)]
    for each in models:
        each.base_model.attach_router(router_for("layers", top_k=2))
    with routing_stats(models[0]):
        outputs = [each.train()(ids, labels=ids) for each in models]
        for output in outputs:
            output.loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    one, other = map(gradients, models)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("routed_by", ["router", "weights"])
def test_generation_counts_the_prompt_and_each_new_token(model, ids, routed_by):
    w = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(6))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    if routed_by == "router":
        model.base_model.attach_router(router_for("embeddings", top_k=1))
    else:
        options["routing_weights"] = w
    with routing_stats(model) as stats:
        model.generate(ids, **options)
    assert stats.tokens == 2 * (7 + 3)  # the last token is not read again
    if routed_by == "weights":
        assert_counts(stats, torch.cat([w, w[:, -1:].expand(2, 3, 3)], 1).flatten(0, 1))


def test_logits_mode_counts_each_token_once(model, ids, weights):
    with routing_stats(model) as stats:
        model(ids, attention_mask=MASK, routing_weights=weights, mixture="logits", use_cache=False)
    assert_counts(stats, unmasked(weights))


def test_the_stacks_of_an_encoder_decoder_model_count_their_tokens(make_lora, ids):
    model = adopt(make_lora("t5"))
    w = {name: torch.rand(2, size, 3) for name, size in (("encoder", 7), ("decoder", 5))}
    with routing_stats(model) as stats:
        model(ids, attention_mask=MASK, decoder_input_ids=ids[:, :5], routing_weights=w)
    assert_counts(stats, torch.cat([unmasked(w["encoder"]), w["decoder"].flatten(0, 1)]))
    with routing_stats(model) as stats:
        model(ids, decoder_input_ids=ids[:, :5], routing_weights=w["encoder"][:, 0])
    assert_counts(stats, w["encoder"][:, 0])  # which tokens they are for isn't known: one for each sequence


def test_a_model_of_another_kind_counts_rows():
    model = adopt(peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])))
    w = torch.tensor([[0.5], [0.0], [2.0]])
    with routing_stats(model) as stats:
        model(torch.randn(3, 4), routing_weights=w)
    assert (stats.tokens, stats.usage.tolist(), stats.weight.tolist()) == (3, [2 / 3], [2.5 / 3])


def test_columns_follow_the_names_when_other_experts_become_active(model, ids):
    with routing_stats(model) as stats:
        model(ids, routing_weights=torch.tensor([0.5, 0.5, 0.0]))
        model.base_model.set_adapter(["expert_2", "expert_0"])
        model(ids, routing_weights=torch.tensor([0.25, 0.75]))
        model.add_adapter("new", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["new"])
        model(ids, routing_weights=torch.tensor([1.0]))
    assert stats.experts == [*NAMES, "new"]
    np.testing.assert_allclose(stats.weight, [1.25 / 3, 0.5 / 3, 0.25 / 3, 1 / 3])
    np.testing.assert_allclose(stats.usage, [2 / 3, 1 / 3, 1 / 3, 1 / 3])


def test_sums_from_inference_mode_go_on_outside_of_it(model, ids):
    mixtures = torch.rand(2, 2, 7, 3, generator=torch.Generator().manual_seed(7))
    with routing_stats(model) as stats:
        with torch.inference_mode():
            model(ids, routing_weights=mixtures[0])
        model(ids, routing_weights=mixtures[1])
    assert_counts(stats, mixtures.flatten(0, 2))


def test_two_models_and_nested_contexts_do_not_mix(model, make_lora, ids):
    other = adopt(make_lora("llama"))
    one, two = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    with routing_stats(model) as outer, routing_stats(other) as elsewhere:
        model(ids, routing_weights=one)
        with routing_stats(model) as inner:
            model(ids, routing_weights=two)
            other(ids, routing_weights=one)
    assert outer.weight.tolist() == [0.5, 0.5, 0]
    assert inner.weight.tolist() == [0, 1, 0]
    assert elsewhere.weight.tolist() == [1, 0, 0]


def test_nothing_is_recorded_or_kept_outside(make_lora, ids):
    model = adopt(make_lora("llama"))
    router = router_for("embeddings")
    model.base_model.attach_router(router)
    with pytest.raises(ZeroDivisionError), routing_stats(model) as stats:
        copied = copy.deepcopy(model)
        raise ZeroDivisionError
    model(ids)
    copied(ids)
    assert stats.tokens == 0
    assert model.base_model._host.recorders == copied.base_model._host.recorders == ()
    alive = weakref.ref(model)
    with routing_stats(model) as stats:
        model(ids)
    del model
    gc.collect()
    assert alive() is None
    assert stats.tokens == 14


def test_stock_forwards_are_not_routed(model, ids):
    with routing_stats(model) as stats:
        model(ids)
    assert str(stats) == "no routed tokens"
    for name in ("usage", "weight", "entropy", "entropy_of_mean", "imbalance", "variation"):
        with pytest.raises(RuntimeError, match="no routed tokens were seen"):
            getattr(stats, name)


def test_only_adopted_models_are_watched(make_lora, model):
    for wrong in (make_lora("llama"), nn.Linear(2, 2), model.get_base_model()):
        with pytest.raises(TypeError, match="model must be an adopted PeftModel, got"):
            moelora.routing_stats(wrong)


def test_numbers_are_printed_by_expert_and_by_layer_and_fit_into_json(model, ids):
    w = torch.zeros(1, 1, 3, 3)
    w[..., 0], w[0, 0, 1, 2] = 0.5, 0.5
    with routing_stats(model) as stats:
        model(ids, routing_weights=w)
    table = str(stats).splitlines()
    assert table[0] == "42 routed tokens in 3 layers"
    assert table[2].split() == ["expert_0", "100.0%", "0.500"]
    assert table[4].split() == ["expert_2", "33.3%", "0.167"]
    assert table[8].split() == ["layer", "1", "0.693", "0.693", "1.500", "0.707"]
    document = json.loads(json.dumps(stats.as_dict()))
    assert document["experts"] == NAMES
    assert document["tokens"] == 42
    assert document["layers"]["1"]["weight"] == [0.5, 0, 0.5]
    assert document["imbalance"] == pytest.approx(stats.imbalance)


@pytest.mark.slow
def test_a_compiled_model_records_with_a_break_of_its_graph(model, ids):
    torch._dynamo.reset()
    model.base_model.attach_router(router_for("embeddings", top_k=2))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = compiled(ids).logits
        with routing_stats(model) as expected:
            model(ids)
        with routing_stats(model) as stats:
            torch.testing.assert_close(compiled(ids).logits, logits)
        assert stats.tokens == expected.tokens == 14
        np.testing.assert_allclose(stats.weight, expected.weight, rtol=1e-5)
        torch._dynamo.reset()
        with routing_stats(model), pytest.raises(torch._dynamo.exc.Unsupported, match="outside the graph"):
            torch.compile(model, backend="eager", fullgraph=True)(ids)
    torch._dynamo.reset()
