"""Weights for each stack of an encoder-decoder model: every layer mixes by the tokens that its rows are."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from moelora import adopt
from moelora.nn.routers import FixedRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
N, VOCAB = 3, 97
# For each family: the projections, and those of them that read the encoder's output from within the decoder.
TARGETS = {
    "t5": ["q", "k", "v", "o", "wi"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
}
CROSSING = {"t5": "EncDecAttention", "bart": "encoder_attn", "t5gemma": "cross_attn"}


def base(family):
    torch.manual_seed(11)
    if family == "t5":
        sizes = {"d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        config = transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)
        model = transformers.T5ForConditionalGeneration(config)
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))  # tied, it repeats the input
        return model
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if family == "bart":
        heads = {f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")}
        sizes = {f"{stack}_ffn_dim": 40 for stack in ("encoder", "decoder")}
        layers = {f"{stack}_layers": 2 for stack in ("encoder", "decoder")}
        config = transformers.BartConfig(
            vocab_size=VOCAB, d_model=24, dropout=0.0, max_position_embeddings=64, forced_eos_token_id=None,
            **special, **heads, **sizes, **layers,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config)
    stack = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "attn_implementation": "eager",
        "dropout_rate": 0.0, **special,
    }  # fmt: skip
    config = transformers.T5GemmaConfig(encoder=copy.copy(stack), decoder=copy.copy(stack), dropout_rate=0.0, **special)
    return transformers.T5GemmaForConditionalGeneration(config)


def stock(family, n=N):
    model = base(family)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[family], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(model, config, adapter_name="expert_0")
    for i in range(1, n):
        model.add_adapter(f"expert_{i}", copy.deepcopy(config))
    model.base_model.set_adapter(NAMES[:n])
    torch.manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.6)
    return model.eval()


def of_encoder(family, name):
    """Whether the rows of a layer are the encoder's tokens."""
    return ".encoder." in name or (
        CROSSING[family] in name and name.rsplit(".", 1)[1] in ("k", "v", "k_proj", "v_proj")
    )


@pytest.fixture(params=["t5", "bart", "t5gemma"])
def family(request):
    return request.param


@pytest.fixture
def source():
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def labels():
    return torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(8))


def mixture(*shape, seed):
    return torch.rand(*shape, N, generator=torch.Generator().manual_seed(seed))


SHAPES = {"static": ((), ()), "sequence": ((2,), (2,)), "token": ((2, 7), (2, 5)), "both": ((2, 7), ())}


def cases(shapes):
    """All shapes on one family, all families with one shape."""
    pairs = [("t5", shape) for shape in shapes] + [("bart", "token"), ("t5gemma", "token")]
    return [pytest.param((family, *shapes[shape]), id=f"{family}-{shape}") for family, shape in pairs]


def of_case(request):
    family, encoder, decoder = request.param
    return family, {"encoder": mixture(*encoder, seed=1), "decoder": mixture(*decoder, seed=2)}


@pytest.fixture(params=cases(SHAPES))
def case(request):
    """A family of models, and weights for its stacks."""
    return of_case(request)


def reference(loop, family, weights):
    stacks = [weights["decoder"], weights["encoder"]]
    return loop(stock(family), None, by_layer=lambda name: stacks[of_encoder(family, name)])


class TestForward:
    def test_each_layer_mixes_by_the_weights_of_its_tokens(self, loop, case, source, labels):
        family, weights = case
        model = adopt(stock(family))
        got = model(input_ids=source, labels=labels, routing_weights=weights).logits
        expected = reference(loop, family, weights)(input_ids=source, labels=labels).logits
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)

    def test_stacks_of_equal_length_are_not_confused(self, loop, family, source):
        weights = {"encoder": mixture(2, 7, seed=1), "decoder": mixture(2, 7, seed=2)}
        swapped = {"encoder": weights["decoder"], "decoder": weights["encoder"]}
        model = adopt(stock(family))
        results = []
        for given in (weights, swapped):
            got = model(input_ids=source, decoder_input_ids=source, routing_weights=given).logits
            expected = reference(loop, family, given)(input_ids=source, decoder_input_ids=source).logits
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
            results.append(got)
        assert (results[0] - results[1]).abs().max() > 0.01

    def test_one_hot_weights_are_the_single_adapters(self, family, source, labels):
        model = adopt(stock(family))
        one_hot = torch.eye(N)
        per_sequence = one_hot[[2, 0]]
        per_token = {"encoder": per_sequence[:, None].expand(2, 7, N), "decoder": per_sequence[:, None].expand(2, 5, N)}
        expected = []
        for row, name in enumerate(("expert_2", "expert_0")):
            single = stock(family)
            single.base_model.set_adapter([name])
            expected.append(single(input_ids=source[row : row + 1], labels=labels[row : row + 1]).logits)
        for given in ({"encoder": per_sequence, "decoder": per_sequence}, per_token, per_sequence):
            got = model(input_ids=source, labels=labels, routing_weights=given).logits
            torch.testing.assert_close(got, torch.cat(expected), rtol=2e-4, atol=2e-4)

    def test_the_encoder_may_have_run_before(self, case, source, labels):
        family, weights = case
        model = adopt(stock(family))
        expected = model(input_ids=source, labels=labels, routing_weights=weights)
        outputs = BaseModelOutput(expected.encoder_last_hidden_state)
        got = model(encoder_outputs=outputs, labels=labels, routing_weights=weights).logits
        torch.testing.assert_close(got, expected.logits, rtol=2e-5, atol=2e-5)

    def test_a_decoding_by_hand_takes_weights_by_position_or_for_its_tokens(self, family, source, labels):
        model, weights = adopt(stock(family)), {"encoder": mixture(2, 7, seed=1), "decoder": mixture(2, 5, seed=2)}
        expected = model(input_ids=source, decoder_input_ids=labels, routing_weights=weights).logits[:, 3:]
        for rest in (weights["decoder"], weights["decoder"][:, 3:]):
            first = weights | {"decoder": weights["decoder"][:, :3]}
            begun = model(input_ids=source, decoder_input_ids=labels[:, :3], routing_weights=first, use_cache=True)
            got = model(
                encoder_outputs=BaseModelOutput(begun.encoder_last_hidden_state),
                decoder_input_ids=labels[:, 3:],
                past_key_values=begun.past_key_values,
                routing_weights=weights | {"decoder": rest},
            ).logits
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


class TestTraining:
    @staticmethod
    def gradients(model, given, source, labels, reentrant=None):
        given = {stack: w.clone().requires_grad_() for stack, w in given.items()}
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        return model, given, {"input_ids": source, "labels": labels, "use_cache": False}

    @staticmethod
    def collect(model, given):
        adapters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return adapters | {stack: w.grad for stack, w in given.items()}

    def test_gradients_of_both_weights_are_those_of_the_loop(self, loop, case, source, labels):
        family, weights = case
        model, given, inputs = self.gradients(adopt(stock(family)), weights, source, labels)
        model(**inputs, routing_weights=given).loss.backward()
        got = self.collect(model, given)
        model, given, inputs = self.gradients(stock(family), weights, source, labels)
        stacks = [given["decoder"], given["encoder"]]
        loop(model, None, by_layer=lambda name: stacks[of_encoder(family, name)])(**inputs).loss.backward()
        expected = self.collect(model, given)
        assert got.keys() == expected.keys()
        for name in expected:
            assert expected[name].abs().sum() > 0
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("encoded", [True, False], ids=["encoded", "whole"])
    def test_checkpointing_changes_no_gradient(self, case, source, labels, reentrant, encoded):
        family, weights = case
        grads = []
        for mode in (None, reentrant):
            model, given, inputs = self.gradients(adopt(stock(family)), weights, source, labels, mode)
            if encoded:  # no encoder runs in this call
                width = model.config.get_text_config().hidden_size
                states = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(3), requires_grad=True)
                inputs = {"encoder_outputs": BaseModelOutput(states)} | {"labels": labels, "use_cache": False}
            elif mode:
                model.enable_input_require_grads()
            model(**inputs, routing_weights=given).loss.backward()
            grads.append(self.collect(model, given))
        expected, got = grads
        assert got.keys() == expected.keys()
        assert expected["encoder"].abs().sum() > 0
        assert expected["decoder"].abs().sum() > 0
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)

    def test_checkpointing_keeps_stacks_of_equal_length_apart(self, loop, family, source):
        weights = {"encoder": mixture(2, 7, seed=1), "decoder": mixture(2, 7, seed=2)}
        model, given, inputs = self.gradients(stock(family), weights, source, source)
        stacks = [given["decoder"], given["encoder"]]
        loop(model, None, by_layer=lambda name: stacks[of_encoder(family, name)])(**inputs).loss.backward()
        expected = self.collect(model, given)
        for reentrant in (True, False):
            model, given, inputs = self.gradients(adopt(stock(family)), weights, source, source, reentrant)
            model(**inputs, routing_weights=given).loss.backward()
            for name, gradient in self.collect(model, given).items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


NEW = 6


def generated(model, source, **options):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(input_ids=source, **(settings | options))


def extended(weights, length, tail="hold"):
    """The decoder's weights for `length` positions."""
    w = weights["decoder"]
    if w.dim() < 3 or w.shape[1] >= length:
        return weights | {"decoder": w[:, :length] if w.dim() == 3 else w}
    rest = w[:, -1:].expand(-1, length - w.shape[1], N)
    rest = rest if tail == "hold" else torch.full_like(rest, 1 / N)
    return weights | {"decoder": torch.cat([w, rest], 1)}


def decoded(loop, family, source, weights, tail="hold"):
    """Greedy decoding by the loop over stock adapters, without a cache."""
    model = stock(family)
    ids = torch.full((len(source), 1), model.config.decoder_start_token_id)
    for _ in range(NEW):
        stacks = extended(weights, ids.shape[1], tail)
        stacks = [stacks["decoder"], stacks["encoder"]]
        loop(model, None, by_layer=lambda name, stacks=stacks: stacks[of_encoder(family, name)])
        logits = model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits[:, -1]
        end = model.generation_config.eos_token_id
        logits[:, end if end is not None else []] = -torch.inf  # as min_new_tokens does
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


GENERATED = SHAPES | {"token": ((2, 7), (2, 1)), "all": ((2, 7), (2, NEW + 3))}


class TestGenerate:
    @pytest.fixture(params=cases(GENERATED))
    def case(self, request):
        return of_case(request)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_greedily_as_the_loop(self, loop, case, source, use_cache):
        family, weights = case
        model = adopt(stock(family))
        tokens = generated(model, source, routing_weights=weights, use_cache=use_cache)
        assert torch.equal(tokens, decoded(loop, family, source, weights))
        for stack in weights:  # either stack matters
            other = weights | {stack: weights[stack].roll(1, -1)}
            assert not torch.equal(tokens, generated(model, source, routing_weights=other))

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
    def test_beams_take_the_weights_of_their_sequence(self, case, source, options):
        family, weights = case
        model = adopt(stock(family))
        k = options.get("num_return_sequences", 1)
        whole = generated(model, source, routing_weights=weights, **options)
        for row in range(2):
            own = {stack: w if w.dim() == 1 else w[row : row + 1] for stack, w in weights.items()}
            alone = generated(model, source[row : row + 1], routing_weights=own, **options)
            assert torch.equal(whole[row * k : row * k + k], alone)
        uncached = generated(model, source, routing_weights=weights, use_cache=False, **options)
        assert torch.equal(whole, uncached)

    @pytest.mark.parametrize(
        "options",
        [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"do_sample": True, "num_beams": 2}],
        ids=str,
    )
    def test_one_hot_weights_generate_what_the_single_adapter_does(self, family, source, options):
        model, single = adopt(stock(family)), stock(family)
        single.base_model.set_adapter(["expert_1"])
        torch.manual_seed(1)
        expected = generated(single, source, **options)
        hot = torch.eye(N)[1]
        for given in (
            {"encoder": hot, "decoder": hot.expand(2, N)},
            {"encoder": hot.expand(2, 7, N), "decoder": hot.expand(2, 1, N)},
        ):
            torch.manual_seed(1)
            assert torch.equal(generated(model, source, routing_weights=given, **options), expected)

    def test_the_rule_for_later_positions(self, loop, family, source):
        model, weights = adopt(stock(family)), {"encoder": mixture(2, 7, seed=1), "decoder": mixture(2, 2, seed=2)}
        prompt = torch.tensor([[model.config.decoder_start_token_id, 9]] * 2)
        options = {"decoder_input_ids": prompt, "max_new_tokens": 4, "min_new_tokens": 4}
        tokens = [
            generated(model, source, routing_weights=weights, routing_tail=t, **options) for t in ("hold", "uniform")
        ]
        assert not torch.equal(*tokens)
        every = extended(weights, 6, "uniform")
        assert torch.equal(generated(model, source, routing_weights=every, routing_tail="error", **options), tokens[1])
        with pytest.raises(ValueError, match=r"routing_weights\['decoder'\] covers 2 positions"):
            generated(model, source, routing_weights=weights, routing_tail="error", **options)

    @pytest.mark.parametrize("routed", [True, False], ids=["routed", "stock"])
    def test_assisted(self, source, routed):
        model, source = adopt(stock("t5")), source[:1]
        weights = {"encoder": mixture(2, 7, seed=1), "decoder": mixture(2, 2, seed=2)}
        weights = {stack: w if w.dim() == 1 else w[:1] for stack, w in weights.items()}
        expected = generated(model, source, routing_weights=weights)
        assistant = base("t5").eval()
        if routed:
            assistant = adopt(stock("t5"))
            assistant.base_model.attach_router(FixedRouter(NAMES, [1, 2, 7]))
        tokens = generated(model, source, routing_weights=weights, assistant_model=assistant)
        assert torch.equal(tokens, expected)

    def test_a_static_cache(self, source):
        model, weights = adopt(stock("t5")), {"encoder": mixture(2, 7, seed=1), "decoder": mixture(2, 2, seed=2)}
        expected = generated(model, source, routing_weights=weights)
        options = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(generated(model, source, routing_weights=weights, **options), expected)


class TestRouters:
    def test_a_fixed_router_reaches_an_encoder_that_runs_on_its_own(self, family, source):
        model, w = adopt(stock(family)), torch.tensor([0.1, 0.2, 0.7])
        expected = generated(model, source, routing_weights=w)
        encoded = model.base_model.model.get_encoder()(input_ids=source)[0]
        model.base_model.attach_router(FixedRouter(NAMES, w))
        assert torch.equal(generated(model, source), expected)
        assert torch.equal(generated(model.get_base_model(), source), expected)
        assert (model.base_model.model.get_encoder()(input_ids=source)[0] - encoded).abs().max() > 0.01

    def test_a_router_that_reads_layers_is_refused(self, family):
        model = adopt(stock(family))
        with pytest.raises(ValueError, match="needs a transformers model with one stack of decoder layers"):
            model.base_model.attach_router(PerLayerRouter(NAMES, 24, num_layers=2))


class TestRefused:
    def check(self, source, weights, message, error=ValueError, **options):
        model = adopt(stock("t5"))
        expected = model(input_ids=source, labels=source).logits
        with pytest.raises(error, match=message):
            model(input_ids=source, labels=source, routing_weights=weights, **options)
        assert torch.equal(model(input_ids=source, labels=source).logits, expected)

    @pytest.mark.parametrize("keys", [("encoder",), ("decoder",), ("encoder", "decoder", "vision"), ("a", "b"), ()])
    def test_other_keys(self, source, keys):
        self.check(source, dict.fromkeys(keys, torch.ones(N)), r"exactly the keys \['encoder', 'decoder'\]")

    @pytest.mark.parametrize("shape", [(2, 7, N), (2, 7, 2, N), (1, 1, 2, N)])
    def test_a_bare_tensor_per_token(self, source, shape):
        self.check(source, torch.rand(shape), "can't tell the encoder's tokens from the decoder's.*'encoder': weights")

    @pytest.mark.parametrize("stack", ["encoder", "decoder"])
    @pytest.mark.parametrize(
        ("part", "message", "error"),
        [
            (torch.ones(2, 7, 2, N), r"must have shape \[N\], \[B, N\] or \[B, S, N\]", ValueError),
            (torch.ones(2), "one column for each active adapter", ValueError),
            (torch.ones(3, N), "is for 3 sequences, the batch has 2", ValueError),
            (torch.ones(1, N), "is for 1 sequences, the batch has 2", ValueError),
            (torch.ones(2, 6, N), "is for 6 tokens, the input has 7", ValueError),
            (torch.ones(2, 8, N), "is for 8 tokens, the input has 7", ValueError),
            ([1.0, 0.0, 0.0], "must be a torch.Tensor, got list", TypeError),
            (None, "must be a torch.Tensor, got NoneType", TypeError),
        ],
        ids=str,
    )
    def test_weights_that_do_not_fit(self, source, stack, part, message, error):
        weights = {"encoder": torch.rand(N), "decoder": torch.rand(N)} | {stack: part}
        self.check(source, weights, rf"routing_weights\['{stack}'\].*{message}", error)

    def test_more_weights_for_the_source_than_it_has_tokens_in_generate(self, source):
        weights = {"encoder": torch.rand(2, 8, N), "decoder": torch.rand(N)}
        with pytest.raises(ValueError, match=r"routing_weights\['encoder'\].*is for 8 tokens, the input has 7"):
            generated(adopt(stock("t5")), source, routing_weights=weights)

    def test_a_model_with_one_stack(self, make_lora, ids):
        with pytest.raises(ValueError, match="needs an encoder-decoder model, and this one has one stack"):
            adopt(make_lora("llama"))(ids, routing_weights={"encoder": torch.ones(3), "decoder": torch.ones(3)})

    def test_mixed_logits(self, source):
        weights = {"encoder": torch.rand(N), "decoder": torch.rand(N)}
        self.check(source, weights, "takes no weights for each stack", mixture="logits")

    def test_a_layer_called_on_its_own(self, source):
        layer = adopt(stock("t5")).base_model.model.encoder.block[0].layer[0].SelfAttention.q
        with pytest.raises(TypeError, match="must be a torch.Tensor, got dict"):
            layer(torch.randn(2, 3, 24), routing_weights={"encoder": torch.ones(N), "decoder": torch.ones(N)})

    def test_a_stack_called_with_weights(self, source):
        encoder = adopt(stock("t5")).base_model.model.encoder
        with pytest.raises(TypeError, match="routing_weights reached T5Stack, which would ignore it"):
            encoder(input_ids=source, routing_weights=torch.ones(N))
