"""A router of one's own: a subclass that says what it reads, in a forward, in training and in generate."""

import pytest
import torch
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt
from moelora.nn import EmbeddingRouter, LearnedRouter, Router, RoutingOutput, route

NAMES = ["expert_0", "expert_1", "expert_2"]
N, H = 3, 32


class SentenceRouter(LearnedRouter):
    """One mixture for each sequence: the gate reads the mean of its tokens' embeddings."""

    reads = "embeddings"

    def route(self, hidden_states, attention_mask=None, *, layer=None, active=None):
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:-1])
        share = attention_mask / attention_mask.sum(-1, keepdim=True)
        return super().route((hidden_states * share.unsqueeze(-1)).sum(-2), active=active)


class NormRouter(Router):
    """Nothing of `LearnedRouter`: experts by the token's norm."""

    reads = "layers"

    def __init__(self, expert_names):
        super().__init__(expert_names)
        self.slope = nn.Parameter(torch.arange(1.0, 1 + self.num_experts))

    def route(self, hidden_states, attention_mask=None, *, layer=None, active=None):
        slope = self.slope if active is None else self.slope[list(active)]
        logits = hidden_states.norm(dim=-1, keepdim=True) * slope * (1 + layer)
        mask = None if attention_mask is None else attention_mask != 0
        routing = route(logits, top_k=2, mask=mask)
        n_tokens = logits[..., 0].numel() if mask is None else mask.sum()
        return RoutingOutput(*routing, logits, n_tokens, mask)


class Says(Router):
    """Returns what it is told."""

    reads = "embeddings"
    answer = None

    def route(self, hidden_states, attention_mask=None, *, layer=None, active=None):
        return self.answer(hidden_states)


def output(weights):
    sums = weights.reshape(-1, weights.shape[-1]).sum(0)
    return RoutingOutput(weights, None, sums.long(), sums, weights, weights[..., 0].numel())


def says(answer):
    router = Says(NAMES)
    router.answer = answer
    return router


def made(cls):
    torch.manual_seed(4)
    router = cls(NAMES, H) if issubclass(cls, LearnedRouter) else cls(NAMES)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=2.0)
    return router


@pytest.fixture
def model(make_lora):
    return adopt(make_lora("llama"))


@pytest.fixture
def mask(ids):
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return mask


def test_a_mixture_of_each_sequence_acts_as_the_same_weights_do(model, ids, mask):
    router = made(SentenceRouter)
    embeds = model.get_input_embeddings()(ids)
    means = torch.stack([e[m.bool()].mean(0) for e, m in zip(embeds, mask, strict=True)])
    w = nn.functional.linear(means, router.gate.weight, router.gate.bias).softmax(-1)
    expected = model(ids, attention_mask=mask, routing_weights=w).logits
    model.base_model.attach_router(router)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    mixed = model(ids, mixture="logits", use_cache=False).logits
    model.base_model.detach_router()
    w = nn.functional.linear(embeds.mean(1), router.gate.weight, router.gate.bias).softmax(-1)
    torch.testing.assert_close(mixed, model(ids, mixture="logits", routing_weights=w, use_cache=False).logits)


@pytest.mark.parametrize("cls", [SentenceRouter, NormRouter])
def test_it_learns_beside_its_experts_and_its_loss_counts(model, ids, cls):
    config = MoELoraConfig(router_aux_loss_coef=0.1, load_balance_loss_type="switch")
    router = made(cls)
    model.base_model.attach_router(router, config)
    moelora.activate_all_experts(model)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        out = model(ids, labels=ids)
        plain = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, plain + 0.1 * out.router_aux_loss)
        out.loss.backward()
        assert all(p.grad is not None for p in router.parameters())
        assert any(p.grad.any() for p in router.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_checkpointing_recomputes_with_its_weights(model, ids):
    gradients = []
    model.base_model.attach_router(made(NormRouter))
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "base_model.router.slope" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Skewed(EmbeddingRouter):
    """Keeps a number for each expert beside the gate."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.skew = nn.Parameter(torch.arange(float(self.num_experts)))

    def arrange(self, columns):
        super().arrange(columns)
        self.skew = nn.Parameter(
            torch.stack([torch.zeros(()) if c is None else self.skew.detach()[c] for c in columns])
        )

    def route(self, hidden_states, attention_mask=None, *, layer=None, active=None):
        routing = super().route(hidden_states, attention_mask, active=active)
        skew = self.skew if active is None else self.skew[list(active)]
        weights = routing.weights * skew.exp()
        return routing._replace(weights=weights / weights.sum(-1, keepdim=True))


def test_what_it_keeps_for_each_expert_comes_and_goes_with_it(model, ids):
    router = made(Skewed)
    model.base_model.attach_router(router)
    expected = model(ids).logits
    router.add_expert("expert_3")
    router.activate("expert_3")
    assert torch.equal(model(ids).logits, expected)  # expert_3 is not active
    router.remove_expert("expert_1")
    assert len(router.skew) == 3
    model.base_model.set_adapter(["expert_0", "expert_2"])
    assert model(ids).logits.isfinite().all()


def test_weights_per_token_generate_the_same_with_a_cache_as_without(model, ids, mask):
    plain = model.generate(ids, attention_mask=mask, routing_weights=torch.ones(N) / N, **GREEDY)
    model.base_model.attach_router(made(NormRouter))
    cached = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
    assert not torch.equal(cached, plain)


def test_a_mixture_of_a_sequence_is_refused_with_a_cache_that_hides_its_start(model, ids):
    model.base_model.attach_router(made(SentenceRouter))
    message = r"SentenceRouter.route returned one mixture for a whole sequence.*pass use_cache=False"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **GREEDY)
    begun = model(ids[:, :4], use_cache=True)
    with pytest.raises(ValueError, match=message):
        model(ids[:, 4:], past_key_values=begun.past_key_values)
    tokens = ids
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), tokens)


@pytest.mark.parametrize("shape", [(N,), (2, N), (2, 7, N)])
def test_the_shapes_that_it_may_return(model, ids, shape):
    w = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    expected = model(ids, routing_weights=w).logits
    model.base_model.attach_router(says(lambda hidden: output(w)))
    torch.testing.assert_close(model(ids).logits, expected)


def test_weights_that_are_the_same_for_all_tokens_may_be_generated_with(model, ids):
    w = torch.tensor([0.2, 0.8, 0.0])
    expected = model.generate(ids, routing_weights=w, **GREEDY)
    model.base_model.attach_router(says(lambda hidden: output(w)))
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("shape", [(2, 7, 2), (2, 7, 4), (2, 1, N), (1, 7, N), (3, N), (7, N), (), (2, 7, 1, N)])
def test_other_shapes_are_refused_by_the_name_of_the_router(model, ids, shape):
    answer = output(torch.ones(shape)) if shape else RoutingOutput(torch.ones(()), *[None] * 5)
    model.base_model.attach_router(says(lambda hidden: answer))
    with pytest.raises(ValueError, match=r"Says.route must return weights of shape \(3,\) or \(2, 3\) or \(2, 7, 3\)"):
        model(ids)
    model.base_model.detach_router()
    assert model(ids).logits.isfinite().all()


def test_what_is_no_routing_is_refused_by_the_name_of_the_router(model, ids):
    for answer, message in (
        (torch.ones(2, 7, N), "Says.route must return a moelora.nn.RoutingOutput, got Tensor"),
        (None, "Says.route must return a moelora.nn.RoutingOutput, got NoneType"),
        (output(torch.ones(2, 7, N).long()), "Says.route must return weights of a floating dtype, got torch.int64"),
        (RoutingOutput([1.0] * N, *[None] * 5), "Says.route must return weights of a floating dtype, got list"),
    ):
        router = says(lambda hidden, answer=answer: answer)
        model.base_model.attach_router(router)
        with pytest.raises(TypeError, match=message):
            model(ids)
        model.base_model.detach_router()


def test_nan_goes_where_it_is_given(model, ids):
    w = torch.full((2, 7, N), 1 / N)
    w[1, 5] = torch.nan
    model.base_model.attach_router(says(lambda hidden: output(w)))
    logits = model(ids).logits
    assert logits[0].isfinite().all()
    assert logits[1, 5].isnan().all()


def test_a_router_that_reads_nothing_gives_one_mixture(make_lora, ids):
    class Constant(Says):
        reads = "nothing"

    model, router = adopt(make_lora("llama")), Constant(NAMES)
    router.answer = lambda hidden: output(torch.ones(2, N))
    model.base_model.attach_router(router)
    with pytest.raises(ValueError, match=r"Constant.route must return weights of shape \(3,\)"):
        model(ids)


def test_it_is_asked_for_the_active_experts(model, ids):
    embeddings = EmbeddingRouter(NAMES, H)
    asked = []

    class Asked(EmbeddingRouter):
        def route(self, *args, active=None, **kwargs):
            asked.append(active)
            return embeddings.route(*args, active=active, **kwargs)

    model.base_model.attach_router(Asked(NAMES, H))
    model.base_model.set_adapter(["expert_2", "expert_0"])
    model(ids)
    assert asked == [[2, 0]]
