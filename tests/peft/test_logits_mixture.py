"""mixture="logits": the N passes of old, in one call."""

import pytest
import torch
from torch import nn

from moelora import MoELoraConfig, adopt
from moelora.nn.routers import EmbeddingRouter, FixedRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]


def n_passes(model, w, ids, **keywords):
    """Run a stock model once for each expert, and mix the logits as projects did."""
    w = w[:, None] if w.dim() == 2 else w
    mixed = torch.zeros(())
    for i, name in enumerate(NAMES):
        model.base_model.set_adapter([name])
        arguments = keywords if ids is None else {"input_ids": ids} | keywords
        mixed = mixed + w[..., i, None] * model(**arguments).logits
    model.base_model.set_adapter(NAMES)
    return mixed


def difference(got, expected):
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)])
def test_it_is_the_loop_over_the_experts_to_1e_5(kind, make_lora, ids, shape):
    w = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    got = adopt(make_lora(kind))(ids, routing_weights=w, mixture="logits").logits
    assert difference(got, n_passes(make_lora(kind), w, ids)) <= 1e-5


def test_its_loss_and_gradients_are_those_of_the_loop(kind, make_lora, gradients, ids, weights):
    w, v = (weights.clone().requires_grad_() for _ in range(2))
    model, old = adopt(make_lora(kind)).train(), make_lora(kind).train()
    out = model(ids, labels=ids, routing_weights=w, mixture="logits")
    mixed = n_passes(old, v, ids)
    loss = nn.functional.cross_entropy(mixed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(w.grad, v.grad, rtol=1e-4, atol=1e-7)
    got, expected = gradients(model), gradients(old)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_padding_and_positions_are_repeated_with_the_batch(kind, make_lora, ids, weights):
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    got = adopt(make_lora(kind))(ids, routing_weights=weights, mixture="logits", **arguments).logits
    assert difference(got, n_passes(make_lora(kind), weights, ids, **arguments)) <= 1e-5
    shared = {"position_ids": torch.arange(7)[None]}
    got = adopt(make_lora(kind))(ids, routing_weights=weights, mixture="logits", **shared).logits
    assert difference(got, n_passes(make_lora(kind), weights, ids, **shared)) <= 1e-5


def test_only_the_kept_positions_are_mixed(make_lora, ids, weights):
    model = adopt(make_lora("llama", target_modules=["q_proj", "lm_head"]))
    whole = model(ids, routing_weights=weights, mixture="logits").logits
    last = model(ids, routing_weights=weights, mixture="logits", logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])
    some = model(ids, routing_weights=weights, mixture="logits", logits_to_keep=torch.tensor([1, 2])).logits
    torch.testing.assert_close(some, whole[:, 1:3])


def test_it_can_be_the_default_of_the_model(make_lora, ids, weights):
    model = adopt(make_lora("llama"), mixture="logits")
    assert difference(model(ids, routing_weights=weights).logits, n_passes(make_lora("llama"), weights, ids)) <= 1e-5
    assert torch.equal(model(ids).logits, make_lora("llama")(ids).logits)


def test_one_hot_weights_mean_the_same_in_both_mixtures(make_lora, ids):
    model, w = adopt(make_lora("llama")), torch.eye(3)[:2]
    layer = model(ids, routing_weights=w).logits
    assert difference(model(ids, routing_weights=w, mixture="logits").logits, layer) <= 1e-5


def test_a_fixed_router_mixes_logits(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(FixedRouter(NAMES, [1, 2, 5]))
    got = model(ids, mixture="logits").logits
    assert difference(got, n_passes(make_lora("llama"), torch.tensor([0.125, 0.25, 0.625]), ids)) <= 1e-5


@pytest.mark.parametrize("embeds", [False, True])
def test_a_router_on_the_embeddings_mixes_logits_and_has_its_loss(make_lora, ids, embeds):
    model = adopt(make_lora("llama")).train()
    router = EmbeddingRouter(NAMES, 32)
    nn.init.normal_(router.gate.weight)
    model.base_model.attach_router(router, MoELoraConfig(router_aux_loss_coef=0.5))
    embeddings = model.get_input_embeddings()(ids)
    given = {"inputs_embeds": embeddings} if embeds else {"input_ids": ids}
    out = model(**given, labels=ids, mixture="logits")
    mixed = n_passes(make_lora("llama"), router(embeddings), ids)
    assert difference(out.logits, mixed) <= 1e-5
    loss = nn.functional.cross_entropy(mixed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss + 0.5 * out.router_aux_loss)
    out.loss.backward()
    assert router.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"routing_weights": torch.ones(2, 7, 3, 3)}, "takes no routing_weights"),
        ({"output_hidden_states": True}, "no single result for output_hidden_states"),
        ({"output_attentions": True}, "no single result for output_attentions"),
        ({"use_cache": True}, "has no cache"),
        ({"return_dict": False}, "returns a ModelOutput"),
        ({"cu_seq_lens_q": torch.arange(3)}, "can't repeat cu_seq_lens_q"),
        ({"routing_weights": torch.ones(2, 6, 3)}, "is for 6 tokens"),
        ({"routing_weights": None}, "needs routing_weights or an attached"),
    ],
)
def test_what_it_can_not_do_exactly_is_refused(make_lora, ids, keywords, message):
    model = adopt(make_lora("llama"))
    with pytest.raises(ValueError, match=message):
        model(ids, mixture="logits", **({"routing_weights": torch.ones(3)} | keywords))


def test_it_does_not_generate(make_lora, ids):
    model = adopt(make_lora("llama"))
    with pytest.raises(ValueError, match="can't generate"):
        model.generate(input_ids=ids, routing_weights=torch.ones(3), mixture="logits", max_new_tokens=2)


def test_it_refuses_a_router_that_reads_hidden_states(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
    with pytest.raises(ValueError, match="can't use PerLayerRouter, which reads hidden states"):
        model(ids, mixture="logits")


def test_it_knows_only_the_loss_of_causal_language_models(make_lora, ids):
    model = adopt(make_lora("t5"))
    w = torch.rand(2, 3)
    labels = ids[:, :4].clone()
    with pytest.raises(ValueError, match="loss of causal language models only"):
        model(input_ids=ids, labels=labels, routing_weights=w, mixture="logits")
    got = model(input_ids=ids, decoder_input_ids=labels, routing_weights=w, mixture="logits").logits
    assert difference(got, n_passes(make_lora("t5"), w, None, input_ids=ids, decoder_input_ids=labels)) <= 1e-5
