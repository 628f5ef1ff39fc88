"""Ways to generate x ways to route: each gives the tokens of a plain loop that has no cache and no batch of beams."""

import copy
import functools
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from moelora import adopt
from moelora.nn.routers import EmbeddingRouter, FixedRouter, HiddenStateRouter, LastHiddenRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
N, LAYERS, WIDTH, VOCAB = 3, 2, 32, 89
B, S, NEW = 2, 7, 5
KINDS = ["llama", "gpt2", "gemma2", "gemma3"]


def base(kind):
    torch.manual_seed(11)
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    common |= {"tie_word_embeddings": False}  # tied, a tiny model repeats its input
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes))
    common |= {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    # Sliding windows that are shorter than the prompt, in the first layer and not in the last.
    common |= {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    if kind == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**common, attn_implementation="eager"))
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**common))


def stock(kind):
    net = base(kind)
    gpt2 = kind == "gpt2"
    targets = ["c_attn", "c_proj", "c_fc"] if gpt2 else ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=gpt2, task_type="CAUSAL_LM")
    model = get_peft_model(net, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    model.base_model.set_adapter(NAMES)
    torch.manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.6)
    return model.eval()


def router(reads):
    torch.manual_seed(5)
    made = {
        "nothing": lambda: FixedRouter(NAMES, [1, 2, 7]),
        "embeddings": lambda: EmbeddingRouter(NAMES, WIDTH, top_k=2, capacity_factor=0.5, expert_dropout=0.5),
        "layer": lambda: HiddenStateRouter(NAMES, WIDTH, layer=1),
        "layers": lambda: PerLayerRouter(NAMES, WIDTH, num_layers=LAYERS, top_k=2, capacity_factor=0.5),
        "last_hidden": lambda: LastHiddenRouter(NAMES, WIDTH, top_k=2),
    }[reads]()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=2)
    return made


READS = ["nothing", "embeddings", "layer", "layers", "last_hidden"]


@functools.cache
def routed(kind, reads=None):
    """An adopted model, with a router that reads `reads`; calls leave no trace on it, so tests share it."""
    model = adopt(stock(kind))
    if reads is not None:
        model.base_model.attach_router(router(reads))
        model.eval()
    return model


@functools.cache
def single(kind):
    model = stock(kind)
    model.base_model.set_adapter(["expert_1"])
    return model


SHAPES = {
    "static": (N,),
    "sequences": (B, N),
    "prompt": (B, S, N),
    "layers": (B, S, LAYERS, N),
    "all": (B, S + NEW, N),
    "static-layers": (1, 1, LAYERS, N),
}


def mixture(shape):
    return torch.rand(SHAPES[shape], generator=torch.Generator().manual_seed(3))


def per_token(w):
    return w is not None and w.dim() > 2 and w.shape[:2] != (1, 1)


def at_length(w, length, tail="hold"):
    """Weights for `length` positions."""
    if not per_token(w):
        return w
    rest = w[:, -1:].expand(-1, max(0, length - w.shape[1]), *w.shape[2:])
    rest = rest if tail == "hold" else torch.full_like(rest, 1 / N)
    return torch.cat([w[:, :length], rest], 1)


def taught(model, ids, w=None, tail="hold", mask=None, new=NEW):
    """Greedy decoding of whole sequences, again and again."""
    for _ in range(new):
        extra = {}
        if mask is not None:
            whole = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
            extra = {"attention_mask": whole, "position_ids": (whole.cumsum(-1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(ids, use_cache=False, routing_weights=at_length(w, ids.shape[1], tail), **extra).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def generated(model, ids, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, **(settings | options))


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB, (B, S), generator=torch.Generator().manual_seed(5))


# A way to generate takes (model, ids, options of the call) and returns prompt and new tokens.


def with_inputs_embeds(model, ids, **options):
    embeds = model.get_input_embeddings()(ids)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return torch.cat([ids, model.generate(inputs_embeds=embeds, **settings, **options)], 1)


def in_two_calls(model, ids, **options):
    first = generated(model, ids, max_new_tokens=2, return_dict_in_generate=True, **options)
    return generated(model, first.sequences, max_new_tokens=NEW - 2, past_key_values=first.past_key_values, **options)


def step_by_step(model, ids, **options):
    """By hand: the prompt, then one token after another, with weights for the tokens of the call."""
    w, cache, fed = options.pop("routing_weights", None), None, ids
    with torch.no_grad():
        for _ in range(NEW):
            now = at_length(w, ids.shape[1])
            now = now[:, -fed.shape[1] :] if per_token(w) else now
            output = model(fed, past_key_values=cache, use_cache=True, routing_weights=now, **options)
            cache, fed = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, fed], 1)
    return ids


def one_by_one(model, ids, how, **options):
    """Ways that take one sequence at a time."""
    w = options.pop("routing_weights", None)
    rows = []
    for row in range(len(ids)):
        own = {} if w is None else {"routing_weights": w[row : row + 1] if w.dim() > 1 and w.shape[0] == B else w}
        rows.append(generated(model, ids[row : row + 1], **own, **options, **how()))
    return torch.cat(rows)


def from_transformers(**settings):
    return lambda model, ids, **options: generated(model, ids, **settings, **options)


WAYS = {
    "cached": from_transformers(),
    "uncached": from_transformers(use_cache=False),
    "static-cache": from_transformers(cache_implementation="static", disable_compile=True),
    "chunked-prefill": from_transformers(prefill_chunk_size=3),
    "inputs-embeds": with_inputs_embeds,
    "two-calls": in_two_calls,
    "by-hand": step_by_step,
    "base-model": lambda model, ids, **options: generated(model.base_model, ids, **options),
    "prompt-lookup": lambda *args, **options: one_by_one(*args, lambda: {"prompt_lookup_num_tokens": 2}, **options),
    "assisted": lambda *args, **options: one_by_one(
        *args, lambda: {"assistant_model": base("llama").eval()}, **options
    ),
    "assisted-by-routed": lambda *args, **options: one_by_one(
        *args, lambda: {"assistant_model": routed("llama", "layers")}, **options
    ),
    "assisted-by-itself": lambda *args, **options: one_by_one(
        *args, lambda: {"assistant_model": args[0].get_base_model()}, **options
    ),
    "early-exit": lambda *args, **options: one_by_one(*args, lambda: {"assistant_early_exit": 1}, **options),
}


@pytest.fixture(params=list(WAYS))
def way(request):
    if request.param == "early-exit" and request.getfixturevalue("kind") != "llama":
        pytest.skip("transformers itself fails: GPT-2 never exits early, old releases lose the cache of Gemma's layers")
    return WAYS[request.param]


@pytest.mark.parametrize(
    ("kind", "shape"), [("llama", s) for s in SHAPES] + [(k, "prompt") for k in KINDS[1:]], ids=str
)
def test_given_weights(kind, shape, way, ids):
    model, w = routed(kind), mixture(shape)
    expected = taught(model, ids, w)
    assert torch.equal(way(model, ids, routing_weights=w), expected)
    assert not torch.equal(taught(model, ids, w.roll(1, -1)), expected)


@pytest.mark.parametrize(("kind", "reads"), [("llama", r) for r in READS] + [(k, "layers") for k in KINDS[1:]], ids=str)
def test_routers(kind, reads, way, ids):
    model = routed(kind, reads)
    expected = taught(model, ids)
    assert torch.equal(way(model, ids), expected)
    assert not torch.equal(taught(model, ids, torch.ones(N) / N), expected)


TAILED = {"cached": {}, "uncached": {"use_cache": False}, "chunked-prefill": {"prefill_chunk_size": 3}}


@pytest.mark.parametrize("options", list(TAILED.values()), ids=list(TAILED))
@pytest.mark.parametrize("shape", ["prompt", "layers"])
def test_a_uniform_tail(shape, options, ids):
    model, w = routed("llama"), mixture(shape)
    expected = taught(model, ids, w, "uniform")
    assert torch.equal(generated(model, ids, routing_weights=w, routing_tail="uniform", **options), expected)
    assert not torch.equal(taught(model, ids, w), expected)


def test_no_tail(ids):
    model = routed("llama")
    with pytest.raises(ValueError, match="covers 7 positions and generation reached 8"):
        generated(model, ids, routing_weights=mixture("prompt"), routing_tail="error")
    whole = mixture("all")  # the last token is never fed, so its position needs no weights
    expected = taught(model, ids, whole)
    assert torch.equal(generated(model, ids, routing_weights=whole[:, :-1], routing_tail="error"), expected)


@pytest.mark.parametrize("way", ["cached", "static-cache", "by-hand", "prompt-lookup", "assisted", "inputs-embeds"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_one_token(kind, way, ids):
    model, w = routed(kind), mixture("prompt")[:, :1]
    expected = taught(model, ids[:, :1], w)
    assert torch.equal(WAYS[way](model, ids[:, :1], routing_weights=w), expected)
    assert not torch.equal(taught(model, ids[:, :1], w.roll(1, -1)), expected)


def test_a_cache_whose_first_layer_has_no_keys(ids):
    torch.manual_seed(11)
    net = transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            block_size=4,
            eos_token_id=None,
            tie_word_embeddings=False,
            layer_types=["linear_attention", "full_attention"],
        )  # fmt: skip
    )
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(net, config, NAMES[0])
    model.add_adapter(NAMES[1], config)
    model.base_model.set_adapter(NAMES[:2])
    model, w = adopt(model).eval(), 4 * torch.rand(B, S, 2)
    got = generated(model, ids, routing_weights=w, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        length = S + NEW - 1
        expected = model(got.sequences[:, :length], routing_weights=at_length(w, length), use_cache=False).logits
    torch.testing.assert_close(torch.stack(got.logits, 1), expected[:, S - 1 :], rtol=1e-4, atol=1e-5)


class TestLeftPadding:
    PAD = 3

    def padded(self, ids):
        mask = torch.ones_like(ids)
        mask[1, : self.PAD] = 0
        return ids.masked_fill(mask == 0, 0), mask

    CASES = {
        "cached": {},
        "uncached": {"use_cache": False},
        "static-cache": {"cache_implementation": "static", "disable_compile": True},
        "chunked-prefill": {"prefill_chunk_size": 2},
        "beams": {"num_beams": 3},
    }

    @pytest.mark.parametrize("options", list(CASES.values()), ids=list(CASES))
    @pytest.mark.parametrize(
        ("kind", "shape"),
        [("llama", s) for s in ("sequences", "prompt", "layers", "all")] + [(k, "prompt") for k in KINDS[1:]],
    )
    def test_weights_lie_on_the_padded_positions(self, kind, shape, options, ids):
        (ids, mask), w, model = self.padded(ids), mixture(shape), routed(kind)
        got = generated(model, ids, attention_mask=mask, routing_weights=w, **options)
        if "num_beams" not in options:
            assert torch.equal(got, taught(model, ids, w, mask=mask))
        own = w[1:, self.PAD :] if per_token(w) else w[1:]
        alone = generated(model, ids[1:, self.PAD :], routing_weights=own, **options)
        assert torch.equal(got[1:, self.PAD :], alone)
        wrong = w[1:, : w.shape[1] - self.PAD] if per_token(w) else w[:1]  # as if there were no padding
        assert not torch.equal(generated(model, ids[1:, self.PAD :], routing_weights=wrong, **options), alone)

    @pytest.mark.parametrize("options", list(CASES.values()), ids=list(CASES))
    @pytest.mark.parametrize("reads", READS)
    def test_a_router(self, reads, options, ids):
        (ids, mask), model = self.padded(ids), routed("llama", reads)
        got = generated(model, ids, attention_mask=mask, **options)
        assert torch.equal(got[:1], generated(model, ids[:1], **options))
        assert torch.equal(got[1:, self.PAD :], generated(model, ids[1:, self.PAD :], **options))
        plain = generated(routed("llama"), ids, attention_mask=mask, **options)
        assert not torch.equal(got, plain)


# Beams and samples: the prompt is repeated, and so are its weights.

MANY = {
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "temperature": 0.2},
    "samples-returned": {"do_sample": True, "temperature": 0.2, "num_return_sequences": 3},
    "beam-samples": {"do_sample": True, "temperature": 0.2, "num_beams": 2, "num_return_sequences": 2},
}


def seeded(model, ids, **options):
    torch.manual_seed(21)
    return generated(model, ids, **options)


@pytest.mark.parametrize("options", list(MANY.values()), ids=list(MANY))
class TestManySequences:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", ["static", "sequences", "prompt", "layers"])
    def test_one_hot_weights_are_the_single_adapter(self, kind, shape, options, ids):
        w = torch.eye(N)[1].expand(SHAPES[shape])
        got = seeded(routed(kind), ids, routing_weights=w, **options)
        assert torch.equal(got, seeded(single(kind), ids, **options))
        assert not torch.equal(got, seeded(routed(kind), ids, routing_weights=w.roll(1, -1), **options))

    @pytest.mark.parametrize("shape", ["sequences", "prompt", "layers", "all"])
    def test_cached_as_uncached(self, shape, options, ids):
        model, w = routed("llama"), mixture(shape)
        got = seeded(model, ids, routing_weights=w, **options)
        assert torch.equal(got, seeded(model, ids, routing_weights=w, use_cache=False, **options))
        assert not torch.equal(got, seeded(model, ids, routing_weights=w.flip(0), **options))

    @pytest.mark.parametrize("reads", READS)
    def test_routers_cached_as_uncached(self, reads, options, ids):
        model = routed("llama", reads)
        got = seeded(model, ids, **options)
        assert torch.equal(got, seeded(model, ids, use_cache=False, **options))
        assert not torch.equal(got, seeded(routed("llama"), ids, **options))

    @pytest.mark.parametrize("shape", ["sequences", "prompt", "layers", "all"])
    def test_each_sequence_by_its_own_weights(self, shape, options, ids):
        model, w, k = routed("llama"), mixture(shape), options.get("num_return_sequences", 1)
        if options.get("do_sample") and "num_beams" not in options:  # repeated beforehand, by hand
            alone = {name: value for name, value in options.items() if name != "num_return_sequences"}
            expected = seeded(model, ids.repeat_interleave(k, 0), routing_weights=w.repeat_interleave(k, 0), **alone)
            assert torch.equal(seeded(model, ids, routing_weights=w, **options), expected)
        elif "do_sample" not in options:
            got = generated(model, ids, routing_weights=w, **options)
            for row in range(B):
                own = generated(model, ids[row : row + 1], routing_weights=w[row : row + 1], **options)
                assert torch.equal(got[row * k : row * k + k], own)
        else:  # draws of a batch and of a single sequence differ: the batch of one sequence twice
            got = seeded(
                model, ids[:1].repeat(2, 1), routing_weights=w[:1].repeat(2, *(1 for _ in w.shape[1:])), **options
            )
            other = seeded(model, ids[:1].repeat(2, 1), routing_weights=w, **options)
            assert torch.equal(got[:k], other[:k])


@pytest.mark.parametrize("shape", ["prompt", "all"])
def test_samples_are_drawn_from_the_logits_of_whole_sequences(shape, ids):
    model, w, expected = routed("llama"), mixture(shape), ids
    got = seeded(model, ids, routing_weights=w, do_sample=True, top_k=0)
    torch.manual_seed(21)
    with torch.no_grad():
        for _ in range(NEW):
            now = at_length(w, expected.shape[1])
            logits = model(expected, use_cache=False, routing_weights=now).logits[:, -1]
            expected = torch.cat([expected, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert torch.equal(got, expected)


class TestState:
    """What happens around a call of generate."""

    def test_weights_for_another_batch_are_refused_before_they_are_repeated(self, ids):
        model = routed("llama")
        for batch in (1, 3):
            for w in (torch.rand(batch, N), torch.rand(batch, S, N), torch.rand(batch, S, LAYERS, N)):
                for call in (model.generate, model.base_model.generate):
                    with pytest.raises(ValueError, match=f"is for {batch} sequences, the batch has 6"):
                        call(ids.repeat(3, 1), routing_weights=w, max_new_tokens=2)

    def test_an_exception_leaves_nothing(self, ids):
        model = routed("llama")

        def fail(*args):
            raise KeyError("stop")

        expected = generated(model, ids)
        with pytest.raises(KeyError):
            generated(model, ids, routing_weights=mixture("prompt"), logits_processor=[fail])
        assert torch.equal(generated(model, ids), expected)

    def test_a_generate_within_another(self, ids):
        model, w = routed("llama"), mixture("prompt")
        inner = generated(model, ids, routing_weights=w.roll(1, -1))
        outer = taught(model, ids, w)
        seen = []

        def nested(input_ids, scores):
            seen.append(generated(model, ids, routing_weights=w.roll(1, -1)))
            return scores

        assert torch.equal(generated(model, ids, routing_weights=w, logits_processor=[nested]), outer)
        assert len(seen) == NEW
        assert all(torch.equal(tokens, inner) for tokens in seen)

    def test_two_threads_with_weights_of_their_own(self, ids):
        model = routed("llama")
        given = [mixture("prompt"), mixture("prompt").roll(1, -1), None]
        expected = [generated(model, ids, routing_weights=w) for w in given]
        results = [[] for _ in given]

        def work(i):
            for _ in range(5):
                results[i].append(
                    model.base_model.generate(ids, routing_weights=given[i], max_new_tokens=NEW, do_sample=False)
                )

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for tokens, alone in zip(results, expected, strict=True):
            assert len(tokens) == 5
            assert all(torch.equal(t, alone) for t in tokens)

    def test_a_generation_config_and_a_streamer(self, ids):
        class Streamer:
            def __init__(self):
                self.pieces = []

            def put(self, tokens):
                self.pieces.append(tokens.reshape(1, -1))

            def end(self):
                self.pieces = torch.cat(self.pieces, 1)

        model, w, streamer = routed("llama"), mixture("prompt")[:1], Streamer()
        config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        tokens = model.generate(ids[:1], generation_config=config, streamer=streamer, routing_weights=w)
        assert torch.equal(tokens, taught(model, ids[:1], w))
        assert torch.equal(streamer.pieces, tokens)

    def test_in_training_mode(self, ids):
        model, w = adopt(stock("llama")), mixture("prompt")
        expected = taught(model, ids, w)
        assert torch.equal(generated(model.train(), ids, routing_weights=w), expected)
        assert model.training

    def test_explicit_weights_win_over_a_router(self, ids):
        model, w = routed("llama", "layers"), mixture("prompt")
        assert torch.equal(generated(model, ids, routing_weights=w), taught(routed("llama"), ids, w))


class TestContinuousBatching:
    CONFIG = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)

    @staticmethod
    def small():
        return {"continuous_batching_config": transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)}

    @pytest.mark.parametrize("reads", [reads for reads in READS if reads != "last_hidden"])
    def test_works_with_a_router(self, reads, ids):
        model = routed("llama", reads)
        results = model.generate_batch(ids.tolist(), generation_config=self.CONFIG, warmup=False, **self.small())
        new = torch.tensor([result.generated_tokens for result in results.values()])
        assert torch.equal(torch.cat([ids, new], 1), taught(model, ids))
        assert not torch.equal(new, taught(routed("llama"), ids)[:, S:])

    @pytest.mark.parametrize("w", [torch.ones(N), torch.ones(B, S, N)], ids=["static", "prompt"])
    def test_refuses_weights(self, w, ids):
        model = routed("llama")
        with pytest.raises(ValueError, match="continuous batching packs the tokens.*attach a router"):
            model.generate_batch(ids.tolist(), generation_config=self.CONFIG, routing_weights=w)
        for call in (model.generate, model.base_model.generate):
            with pytest.raises(ValueError, match="continuous batching packs the tokens.*attach a router"):
                call(ids, routing_weights=w, cache_implementation="paged", max_new_tokens=2)

    def test_refuses_a_router_of_two_passes(self, ids):
        model = routed("llama", "last_hidden")
        with pytest.raises(ValueError, match="nor a router that reads 'last_hidden' can follow"):
            model.generate_batch(ids.tolist(), generation_config=self.CONFIG)
        for call in (model.generate, model.base_model.generate):
            with pytest.raises(ValueError, match="nor a router that reads 'last_hidden' can follow"):
                call(ids, cache_implementation="paged", max_new_tokens=2)


class TestRefused:
    """Where weights per token would lie on other tokens than those they were made for."""

    def test_a_cache_without_a_length(self):
        sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "use_mambapy": False}
        net = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=VOCAB, eos_token_id=None, **sizes))
        config = LoraConfig(target_modules=["in_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model, ids = adopt(get_peft_model(net, config, "a")).eval(), torch.randint(3, VOCAB, (B, S))
        w = torch.rand(B, S, 1)
        with pytest.raises(ValueError, match="does not know how many tokens it holds.*use_cache=False"):
            generated(model, ids, routing_weights=w)
        assert torch.equal(generated(model, ids, routing_weights=w, use_cache=False), taught(model, ids, w))
        assert generated(model, ids, routing_weights=w[:, 0]).shape == (B, S + NEW)

    @pytest.mark.parametrize("shape", ["prompt", "layers"])
    def test_the_other_prompt_of_guidance(self, shape, ids):
        model = routed("llama")
        config = transformers.GenerationConfig(guidance_scale=1.5, max_new_tokens=2, do_sample=False)
        for options in ({"guidance_scale": 1.5}, {"generation_config": config, "max_new_tokens": None}):
            with pytest.raises(ValueError, match="guidance_scale=1.5 runs the model on another prompt"):
                generated(model, ids, routing_weights=mixture(shape), **options)
        one_hot = torch.eye(N)[1].expand(B, N)
        expected = generated(single("llama"), ids, guidance_scale=1.5)
        assert torch.equal(generated(model, ids, routing_weights=one_hot, guidance_scale=1.5), expected)
