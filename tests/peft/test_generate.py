"""Generation with routing weights: with the cache as without it, and never blind to the weights."""

import pytest
import torch
import transformers
from torch import nn

from moelora import MoELoraConfig, adopt, get_peft_model
from moelora.nn.routers import EmbeddingRouter, FixedRouter, HiddenStateRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
NEW = 6


@pytest.fixture
def model(kind, make_lora):
    model = adopt(make_lora(kind))
    with torch.no_grad():  # so that other weights give other tokens
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(4)
    return model


def generated(model, ids, **options):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, **(settings | options))


def by_hand(model, ids, weights_for):
    """Greedy decoding without a cache, with the weights of every length given by a function."""
    for _ in range(NEW):
        logits = model(ids, use_cache=False, routing_weights=weights_for(ids.shape[1])).logits[:, -1]
        logits[:, 2] = -torch.inf  # as min_new_tokens does
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_with_one_mixture_for_all_or_for_each_sequence(model, ids, shape, use_cache):
    w = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tokens = generated(model, ids, routing_weights=w, use_cache=use_cache)
    assert torch.equal(tokens, by_hand(model, ids, lambda length: w))
    assert not torch.equal(tokens, generated(model, ids, routing_weights=1 - w))
    assert not torch.equal(tokens, generated(model, ids))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("tail", ["hold", "uniform"])
def test_with_weights_for_the_prompt_and_a_rule_for_what_follows(model, ids, weights, tail, use_cache):
    def padded(length):
        last = weights[:, -1:] if tail == "hold" else torch.full((2, 1, 3), 1 / 3)
        return torch.cat([weights, last.expand(2, length - 7, 3)], 1)

    tokens = generated(model, ids, routing_weights=weights, routing_tail=tail, use_cache=use_cache)
    assert torch.equal(tokens, by_hand(model, ids, padded))
    assert not torch.equal(tokens, generated(model, ids, routing_weights=weights.flip(2), routing_tail=tail))


def test_holding_is_the_default(model, ids, weights):
    expected = generated(model, ids, routing_weights=weights, routing_tail="hold")
    assert torch.equal(generated(model, ids, routing_weights=weights), expected)


def test_positions_past_the_weights_may_be_an_error(model, ids, weights):
    with pytest.raises(ValueError, match="covers 7 positions and generation reached 8"):
        generated(model, ids, routing_weights=weights, routing_tail="error")


def test_weights_for_the_positions_to_come_are_used(model, ids):
    w = torch.rand(2, 7 + NEW, 3, generator=torch.Generator().manual_seed(3))
    expected = by_hand(model, ids, lambda length: w[:, :length])
    assert torch.equal(generated(model, ids, routing_weights=w, routing_tail="error"), expected)


def test_weights_per_layer(model, ids):
    w = torch.rand(2, 7, 3, 3, generator=torch.Generator().manual_seed(4))
    expected = by_hand(model, ids, lambda n: torch.cat([w, w[:, -1:].expand(2, n - 7, 3, 3)], 1))
    assert torch.equal(generated(model, ids, routing_weights=w), expected)


@pytest.mark.parametrize("reads", ["nothing", "embeddings", "layer", "layers"])
def test_a_router_generates_with_the_cache_as_without(kind, model, ids, reads):
    width = 24 if kind == "gpt2" else 32
    torch.manual_seed(5)
    router = {
        "nothing": lambda: FixedRouter(NAMES, [1, 2, 7]),
        "embeddings": lambda: EmbeddingRouter(NAMES, width),
        "layer": lambda: HiddenStateRouter(NAMES, width, layer=1),
        "layers": lambda: PerLayerRouter(NAMES, width, num_layers=3, top_k=2),
    }[reads]()
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=2)
    plain = generated(model, ids)
    model.base_model.attach_router(router)
    tokens = generated(model, ids, use_cache=True)
    assert torch.equal(tokens, generated(model, ids, use_cache=False))
    assert torch.equal(tokens, generated(model.get_base_model(), ids))
    assert not torch.equal(tokens, plain)


def test_the_batch_generates_what_its_sequences_generate_alone(model, ids, weights):
    whole = generated(model, ids, routing_weights=weights)
    for row in range(2):
        alone = generated(model, ids[row : row + 1], routing_weights=weights[row : row + 1])
        assert torch.equal(whole[row : row + 1], alone)


def test_beams_take_the_weights_of_their_sequence(model, ids, weights):
    whole = generated(model, ids, routing_weights=weights, num_beams=3)
    for row in range(2):
        alone = generated(model, ids[row : row + 1], routing_weights=weights[row : row + 1], num_beams=3)
        assert torch.equal(whole[row : row + 1], alone)


def test_a_continuation_by_hand_takes_weights_by_position_or_for_its_tokens(model, ids, weights):
    expected = model(ids, routing_weights=weights).logits[:, 4:]
    for given in (weights, weights[:, 4:]):
        cache = model(ids[:, :4], routing_weights=weights[:, :4], use_cache=True).past_key_values
        got = model(ids[:, 4:], routing_weights=given, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    cache = model(ids[:, :4], routing_weights=weights[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="is for 6 tokens, the input has 3 after 4 in the cache"):
        model(ids[:, 4:], routing_weights=weights[:, :6], past_key_values=cache)


def test_a_model_without_a_task_generates_too(make_lora, ids, weights):
    options = {"task_type": None}
    expected = generated(adopt(make_lora("llama")), ids, routing_weights=weights)
    assert torch.equal(generated(adopt(make_lora("llama", **options)), ids, routing_weights=weights), expected)


def test_an_encoder_decoder_model_generates_with_a_static_mixture(make_lora, ids):
    model, w = adopt(make_lora("t5")), torch.tensor([0.1, 0.2, 0.7])
    tokens = generated(model, ids, routing_weights=w)
    assert torch.equal(generated(model, ids, routing_weights=w, use_cache=False), tokens)
    model.base_model.attach_router(FixedRouter(NAMES, w))
    assert torch.equal(generated(model, ids), tokens)


def test_a_head_of_several_layers_sees_the_positions_of_its_logits(ids, weights):
    """BERT's transforms them before the output embeddings."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=97, is_decoder=True, **sizes))
    config = MoELoraConfig(target_modules="all-linear", num_experts=3)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    whole = model(ids, routing_weights=weights).logits
    for keep in (1, 3, torch.tensor([4, 0, 2]), torch.arange(6, -1, -1)):
        kept = model(ids, routing_weights=weights, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=ids, routing_weights=weights, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, routing_weights=weights, use_cache=False, **options))
