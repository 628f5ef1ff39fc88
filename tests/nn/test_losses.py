"""The load balancing losses: values by hand, gradients by differences."""

import math

import pytest
import torch

from moelora.nn import EmbeddingRouter, FixedRouter, PerLayerRouter, RoutingOutput, route, router_aux_loss
from moelora.nn.losses import BalanceLoss

KINDS = ("aux_loss", "switch", "z_loss")
MASK = torch.tensor([[True, True, False], [True, False, True]])


def routed(logits, mask=None, top_k=None, temperature=1.0):
    r = route(logits, top_k=top_k, temperature=temperature, mask=mask)
    n_tokens = math.prod(logits.shape[:-1]) if mask is None else mask.sum()
    return RoutingOutput(r.weights, r.indices, r.counts, r.prob_sums, logits, n_tokens, mask)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_values_by_hand():
    # Two tokens that take part, with p = (1/2, 1/2) and (3/4, 1/4): u = (5/8, 3/8).
    logits = torch.tensor([[math.log(1), math.log(1)], [math.log(3), math.log(1)], [50.0, -50.0]])
    output = routed(logits, torch.tensor([True, True, False]), top_k=1)
    torch.testing.assert_close(router_aux_loss([output], "aux_loss"), torch.tensor(1 / 64))
    # The first expert is picked by both: f = (1, 0).
    torch.testing.assert_close(router_aux_loss([output], "switch"), torch.tensor(2 * 5 / 8))
    z = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    torch.testing.assert_close(router_aux_loss([output], "z_loss"), torch.tensor(z))


def test_an_even_router_has_the_least_loss():
    even = routed(torch.zeros(6, 4), top_k=2)
    assert router_aux_loss([even], "aux_loss") == 0
    assert router_aux_loss([even], "switch") == pytest.approx(2)  # N sum f_i / N = k
    torch.testing.assert_close(router_aux_loss([even], "z_loss"), torch.tensor(math.log(4) ** 2))


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_formulas(top_k):
    logits = random_logits(2, 3, 4)
    tokens = logits[MASK]
    p = torch.softmax(tokens / 1.5, -1)
    u = p.mean(0)
    f = torch.ones(4, dtype=torch.float64)
    if top_k is not None:
        f = torch.zeros_like(p).scatter(-1, p.topk(top_k).indices, 1).mean(0)
    outputs = [routed(logits, MASK, top_k, temperature=1.5)]
    torch.testing.assert_close(router_aux_loss(outputs, "aux_loss"), ((u - 1 / 4) ** 2).mean())
    torch.testing.assert_close(router_aux_loss(outputs, "switch"), 4 * (f * u).sum())
    torch.testing.assert_close(router_aux_loss(outputs, "z_loss"), (tokens.logsumexp(-1) ** 2).mean())


def by_hand(kind, logits, mask, top_k, temperature, maturity):
    """One routing in Python's own numbers."""
    n = len(maturity)
    tokens = [row for row, counts in zip(logits, mask, strict=True) if counts]
    u, f, z = [0.0] * n, [0.0] * n, 0.0
    for row in tokens:
        scores = [m * math.exp(value / temperature) for value, m in zip(row, maturity, strict=True)]
        p = [score / sum(scores) for score in scores]
        picked = sorted(range(n), key=lambda i, p=p: (-p[i], i))[:top_k]
        for i in range(n):
            u[i] += p[i] / len(tokens)
            f[i] += (i in picked) / len(tokens)
        z += math.log(sum(math.exp(value) for value in row)) ** 2 / len(tokens)
    return {
        "aux_loss": sum((share - 1 / n) ** 2 for share in u) / n,
        "switch": n * sum(a * b for a, b in zip(f, u, strict=True)),
        "z_loss": z,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_loss_of_a_router_with_a_gate_for_each_layer_by_hand(kind, top_k):
    torch.manual_seed(2)
    router = PerLayerRouter(["a", "b", "c"], 5, num_layers=3, top_k=top_k, temperature=1.7).double()
    router.mark_mature("b", 0.5)
    x, mask = torch.randn(2, 3, 5, dtype=torch.float64), MASK
    outputs = [router.route(x, mask.long(), layer=layer) for layer in range(3)]
    values = []
    for gate in router.gate:
        logits = torch.nn.functional.linear(x, gate.weight, gate.bias).reshape(-1, 3).tolist()
        values.append(by_hand(kind, logits, mask.flatten().tolist(), top_k or 3, 1.7, [1, 0.5, 1]))
    assert router_aux_loss(outputs, kind).item() == pytest.approx(sum(values) / 3, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_maturity_and_an_expert_that_is_not_activated(kind):
    torch.manual_seed(2)
    router, x = EmbeddingRouter(["a", "b", "c", "d"], 5, top_k=2).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    router.mark_mature("b", 0.5)
    router.activated[2] = False

    def loss(x):
        return router_aux_loss([router.route(x, MASK.long())], kind)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_()])


@pytest.mark.parametrize("kind", KINDS)
def test_routings_on_several_devices_are_averaged_where_the_first_one_is(kind):
    outputs = [routed(torch.zeros(2, 3, device=device)) for device in ("meta", "cpu")]
    assert router_aux_loss(outputs, kind).device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_averaged(kind):
    outputs = [routed(random_logits(5, 3, seed=i), top_k=2) for i in range(3)]
    alone = [router_aux_loss([output], kind) for output in outputs]
    torch.testing.assert_close(router_aux_loss(outputs, kind), torch.stack(alone).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_what_routings_have_in_common_is_that_of_their_tokens_and_experts(kind):
    router, x = EmbeddingRouter(["a", "b", "c", "d"], 5, top_k=2), torch.randn(2, 3, 5)
    few = EmbeddingRouter(["a", "b", "c"], 5).double()
    few.activated[1] = False
    outputs = [router.route(x), router.route(x, MASK.long()), router.route(x, MASK.long() * 0), router.route(x[:1])]
    outputs += [router.route(x, active=[0, 3]), few.route(x.double()), routed(random_logits(2, 3, 4), MASK), outputs[0]]
    loss = BalanceLoss(kind)
    for output in outputs:
        torch.testing.assert_close(loss(output), router_aux_loss([output], kind), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("top_k", [None, 2])
def test_gradcheck(kind, mask, top_k):
    def loss(a, b):
        return router_aux_loss([routed(t, mask, top_k, 0.8) for t in (a, b)], kind)

    inputs = [random_logits(2, 3, 4, seed=i).requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_value_nor_gradient(kind):
    grads = []
    for padding in (0.0, 7.0):
        logits = random_logits(2, 3, 4).where(MASK.unsqueeze(-1), padding).requires_grad_()
        loss = router_aux_loss([routed(logits, MASK, top_k=2)], kind)
        loss.backward()
        grads.append((loss.detach(), logits.grad))
        assert not logits.grad[~MASK].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_not_activated_do_not_count(kind):
    torch.manual_seed(0)
    router, x = EmbeddingRouter(["a", "b", "c", "d"], 5, top_k=2), torch.randn(2, 6, 5)
    router.activated[2] = False
    without = router.route(x, active=[0, 1, 3])
    torch.testing.assert_close(router_aux_loss([router.route(x)], kind), router_aux_loss([without], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_a_router_train_its_gate(kind):
    torch.manual_seed(0)
    router, x = EmbeddingRouter(["a", "b", "c"], 5, top_k=2), torch.randn(4, 16, 5) + 1
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    losses = []
    for _ in range(50):
        loss = router_aux_loss([router.route(x)], kind)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_states_give_a_float32_loss(kind):
    router = EmbeddingRouter(["a", "b"], 4, top_k=1).to(torch.bfloat16)
    loss = router_aux_loss([router.route(torch.ones(2, 3, 4, dtype=torch.bfloat16))], kind)
    assert loss.dtype == torch.float32
    loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_no_loss(kind):
    logits = random_logits(2, 3, 4).requires_grad_()
    nothing = [routed(logits, torch.zeros(2, 3, dtype=torch.bool), 2), routed(logits[:0], None, 2)]
    loss = router_aux_loss(nothing, kind)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_a_fixed_router_has_a_constant_loss():
    output = FixedRouter(["a", "b"], [0.75, 0.25]).route(torch.ones(2, 3, 4))
    torch.testing.assert_close(router_aux_loss([output], "aux_loss"), torch.tensor(1 / 16))
    assert router_aux_loss([output], "z_loss") == pytest.approx(0, abs=1e-12)


def test_unknown_kinds_and_no_outputs_are_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        router_aux_loss([routed(torch.zeros(2, 3))], "entropy")
    with pytest.raises(ValueError, match="outputs"):
        router_aux_loss([], "switch")
