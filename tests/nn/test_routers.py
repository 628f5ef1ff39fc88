"""Routers: what each reads and decides, who takes part, and what training changes."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moelora import _core
from moelora.nn import (
    EmbeddingRouter,
    FixedRouter,
    HiddenStateRouter,
    LastHiddenRouter,
    LearnedRouter,
    PerLayerRouter,
    Router,
    build_router,
    route,
)
from moelora.nn.routers import SharedByLayers

NAMES = ["code", "prose", "tables", "headers"]
H = 6


def make(cls=EmbeddingRouter, names=NAMES, seed=0, **options):
    torch.manual_seed(seed)
    extra = {HiddenStateRouter: {"layer": 1}, PerLayerRouter: {"num_layers": 3}}.get(cls, {})
    return cls(names, H, **extra, **options)


def hidden(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*(shape or (2, 5)), H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gate_of(router, x):
    return nn.functional.linear(x, router.gate.weight, router.gate.bias)


LEARNED = [EmbeddingRouter, HiddenStateRouter, PerLayerRouter, LastHiddenRouter]
every_learned_router = pytest.mark.parametrize("cls", LEARNED)


# What it decides


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_the_softmax_of_the_gate_after_temperature_and_top_k(top_k, renormalize):
    router, x = make(top_k=top_k, temperature=0.3, renormalize=renormalize), hidden()
    p = torch.softmax(gate_of(router, x) / 0.3, -1)
    expected = p
    if top_k is not None:
        smallest_kept = p.sort(-1, descending=True).values[..., top_k - 1 : top_k]
        expected = p.where(p >= smallest_kept, 0)
        if renormalize:
            expected = expected / expected.sum(-1, keepdim=True)
    output = router.route(x)
    torch.testing.assert_close(output.weights, expected)
    torch.testing.assert_close(output.prob_sums, p.sum((0, 1)))
    assert output.counts.equal((expected > 0).sum((0, 1)))
    assert output.n_tokens == 10
    torch.testing.assert_close(router(x), expected)


@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 4), (0, 3), (3, 0)])
@every_learned_router
def test_any_number_of_axes_and_no_tokens_are_routed(cls, shape):
    for training in (True, False):
        router = make(cls, top_k=2, capacity_factor=1.0, expert_dropout=0.3).train(training)
        output = router.route(torch.ones(*shape, H))
        assert output.weights.shape == (*shape, 4)
        assert output.n_tokens == math.prod(shape)


@every_learned_router
@pytest.mark.parametrize("mlp_dim", [None, 3])
def test_before_training_tiny_inputs_are_routed_by_what_they_are(cls, mlp_dim):
    router, x = make(cls, top_k=1, mlp_dim=mlp_dim), hidden(40) * 1e-3
    counts = router.route(x).counts
    assert counts.sum() == 40
    assert counts.max() < 40
    assert router.route(torch.zeros(5, H)).prob_sums.tolist() == [1.25] * 4
    router.add_expert("new")
    router.activate("new")
    assert router.route(torch.zeros(5, H)).prob_sums.tolist() == [1] * 5


def test_an_mlp_gate_has_a_hidden_layer():
    router, x = make(mlp_dim=3, top_k=2), hidden()
    first, _, last = router.gate
    assert (first.in_features, first.out_features, last.out_features) == (H, 3, 4)
    torch.testing.assert_close(router.route(x).logits, last(nn.functional.silu(first(x))))
    router(x)[..., 0].sum().backward()
    assert all(p.grad is not None for p in router.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_of_hidden_states_is_routed_in_float32_at_least(dtype):
    router, x = make(), hidden(dtype=dtype)
    weights = router(x)
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(weights.float(), router(x.float()))


def test_autocast_does_not_lower_the_precision_of_the_gate():
    router, x = make(mlp_dim=5), hidden()
    with torch.autocast("cpu", torch.bfloat16):
        weights = router(x)
    assert weights.equal(router(x))


def test_a_router_cast_with_its_model_still_computes_in_float32():
    router, x = make(top_k=2).to(torch.bfloat16), hidden(dtype=torch.bfloat16)
    weights = router(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, copy.deepcopy(router).float()(x.float()))


@every_learned_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_cpu_the_c_kernel_routes_forward_and_backward(monkeypatch, cls, dtype, autocast):
    router, x = make(cls, top_k=2).to(dtype), hidden(dtype=dtype)
    calls = []

    def watched(name, entry):
        def call(*arguments):
            result = entry(*arguments)
            calls.append((name, result is not None))
            return result

        return call

    for name in ("route_tensors", "route_backward_tensors"):
        monkeypatch.setattr(_core, name, watched(name, getattr(_core, name)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weights = router(x)
    assert weights.dtype is torch.float32
    weights[..., 0].sum().backward()
    assert calls == [("route_tensors", True), ("route_backward_tensors", True)]


class RoutesPadded(nn.Module):
    """The differentiable outputs of a router, for functional_call."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        output = self.router.route(x, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
        return output.weights, output.prob_sums, output.logits


def test_gradcheck_of_gate_and_hidden_states():
    module = RoutesPadded(make(top_k=2, temperature=1.7).double())
    module.router.mark_mature("prose", 0.4)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def outputs(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (hidden(dtype=torch.float64), *(p.detach() for p in parameters))
    assert torch.autograd.gradcheck(outputs, [t.clone().requires_grad_() for t in inputs])


def test_padding_is_left_out_of_counts_and_sums():
    router, x = make(top_k=2), hidden()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    output, rest = router.route(x, mask), router.route(x[mask.bool()])
    assert output.weights.equal(router(x))
    assert output.counts.equal(rest.counts)
    torch.testing.assert_close(output.prob_sums, rest.prob_sums)
    assert int(output.n_tokens) == 7


# Who takes part


@every_learned_router
def test_inactive_columns_are_dropped_and_the_rest_renormalised(cls):
    router, x = make(cls, top_k=3), hidden()
    logits = router.route(x).logits
    for active in ([0, 2], [3, 1], [2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0]):
        expected = route(logits[..., active], top_k=min(3, len(active)))
        torch.testing.assert_close(router(x, active=active), expected.weights)


@pytest.mark.parametrize("router", [make(top_k=2), make(PerLayerRouter), FixedRouter(NAMES, [0, 0, 1, 1])])
@pytest.mark.parametrize("column", range(4))
def test_one_active_expert_has_weight_one(router, column):
    for activated in (True, False):
        router = copy.deepcopy(router)
        router.activated[column] = activated
        assert (router(hidden(), active=[column]) == 1).all()


@pytest.mark.parametrize("active", [[0, 2], [1, 2], [3, 0, 1]])
@pytest.mark.parametrize("mlp_dim", [None, 5])
@pytest.mark.parametrize("cls", [*LEARNED, FixedRouter])
def test_columns_are_dropped_without_a_tensor_from_the_host(operations, cls, mlp_dim, active):
    """On a GPU that would be a copy that waits for all work before it, and not to be captured in a CUDA graph."""
    router = FixedRouter(NAMES, [1, 2, 3, 4]) if cls is FixedRouter else make(cls, mlp_dim=mlp_dim, top_k=1)
    x = hidden().requires_grad_()

    def step():
        weights = router(x, active=active)
        if weights.requires_grad:
            weights.square().sum().backward()

    names = operations(step)
    assert names and not names & {"lift_fresh", "index", "index_select", "_to_copy"}


def test_an_expert_that_is_not_activated_weighs_nothing_until_it_is():
    small, x = make(names=NAMES[:3], top_k=2, temperature=0.5), hidden()
    grown = make(top_k=2, temperature=0.5)
    with torch.no_grad():
        grown.gate.weight[:3], grown.gate.bias[:3] = small.gate.weight, small.gate.bias
    grown.activated[3] = False
    before, output = small.route(x), grown.route(x)
    assert grown(x, active=[0, 1, 2]).equal(before.weights)  # to the bit
    torch.testing.assert_close(output.weights[..., :3], before.weights)
    assert not output.weights[..., 3].any()
    assert output.counts.tolist() == [*before.counts.tolist(), 0]
    output.weights.square().sum().backward()
    assert not grown.gate.weight.grad[3].any()
    grown.activate("headers")
    assert grown(x)[..., 3].any()
    torch.testing.assert_close(grown(x), make_with_gate(grown)(x))


def make_with_gate(router):
    """A new router with the gate of another one."""
    other = make(top_k=router.top_k, temperature=router.temperature)
    other.gate.load_state_dict(router.gate.state_dict())
    return other


def test_experts_that_are_not_activated_are_not_counted_where_too_few_are_left():
    router, x = make(top_k=3), hidden()
    router.activated[1:] = False
    output = router.route(x)
    assert output.counts.tolist() == [10, 0, 0, 0]
    assert (output.weights == torch.tensor([1.0, 0, 0, 0])).all()


def test_maturity_of_one_is_a_plain_learned_router_to_the_bit():
    router, x = make(top_k=2, temperature=2.0), hidden()
    assert router(x).equal(route(gate_of(router, x), top_k=2, temperature=2.0).weights)


def test_the_logarithm_of_the_maturity_is_added_after_the_temperature():
    router, x = make(temperature=2.0), hidden()
    router.mark_mature("tables", 0.25)
    maturity = torch.tensor([1, 1, 0.25, 1])
    expected = torch.softmax(gate_of(router, x) / 2 + maturity.log(), -1)
    torch.testing.assert_close(router(x), expected)
    torch.testing.assert_close(router(x, active=[2, 0]), torch.softmax(expected[..., [2, 0]].log(), -1))
    router.mark_mature("tables")
    assert router(x).equal(make(temperature=2.0)(x))


# Experts come and go

every_router = pytest.mark.parametrize("cls", [FixedRouter, *LEARNED])


def of_names(cls, names, **options):
    return FixedRouter(names, range(1, len(names) + 1)) if cls is FixedRouter else make(cls, names, **options)


def routings(router, x, active=None):
    layers = range(router.num_layers) if isinstance(router, PerLayerRouter) else [None]
    return [router.route(x, layer=layer, active=active) for layer in layers]


@every_router
@pytest.mark.parametrize("mlp_dim", [None, 3])
def test_a_new_expert_weighs_nothing_and_leaves_the_bits_of_the_others(cls, mlp_dim):
    options = {} if cls is FixedRouter else {"mlp_dim": mlp_dim, "top_k": 2, "temperature": 0.7}
    router, x = of_names(cls, NAMES[:3], **options), hidden()
    if cls is not FixedRouter:
        router.mark_mature("prose", 0.4)
    before, state = routings(router, x), {name: t.clone() for name, t in router.state_dict().items()}
    router.add_expert("headers")
    assert router.expert_names == NAMES
    for name, t in router.state_dict().items():
        old = state[name]
        assert t.dtype is old.dtype
        if t.shape != old.shape:  # with a row for each expert
            assert t.shape == (4, *old.shape[1:])
            t = t[:3]
        assert t.equal(old)
    for was, now, among in zip(before, routings(router, x), routings(router, x, active=[0, 1, 2]), strict=True):
        assert among.weights.equal(was.weights)
        assert among.counts.equal(was.counts)
        assert (now.weights[..., 3] == 0).all()
        assert now.counts[3] == 0
        torch.testing.assert_close(now.weights[..., :3], was.weights)


@every_learned_router
@pytest.mark.parametrize("mlp_dim", [None, 3])
def test_a_new_expert_has_a_gate_of_its_own_and_takes_part_when_it_is_activated(cls, mlp_dim):
    router, x = make(cls, NAMES[:3], mlp_dim=mlp_dim), hidden()
    router.add_expert("headers", maturity=0.5)
    assert router.maturity.tolist() == [1, 1, 1, 0.5]
    router.activate("headers")
    for layer in range(3):
        output = router.route(x, layer=layer)
        expected = output.logits.exp() * torch.tensor([1, 1, 1, 0.5])
        torch.testing.assert_close(output.weights, expected / expected.sum(-1, keepdim=True))
        assert output.logits[..., 3].std() > 0.01
        output.weights[..., 3].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())


@every_learned_router
@pytest.mark.parametrize("mlp_dim", [None, 3])
def test_gates_that_grow_keep_dtype_and_what_is_frozen_and_are_new_parameters(cls, mlp_dim):
    router = make(cls, mlp_dim=mlp_dim).to(torch.bfloat16)
    frozen = [name for name, _ in router.named_parameters() if name.endswith("bias")]
    for name in frozen:
        router.get_parameter(name).requires_grad_(False)
    before = dict(router.named_parameters())
    router.add_expert("new")
    after = dict(router.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.dtype is torch.bfloat16
        assert parameter.requires_grad == (name not in frozen)
        assert (parameter is before[name]) == (parameter.shape == before[name].shape)
    assert "experts=['code', 'prose', 'tables', 'headers', 'new']" in repr(router)
    assert "out_features=5" in repr(router)


@every_router
@pytest.mark.parametrize("name", ["code", "tables", "headers"])
def test_a_removed_expert_takes_its_column_along(cls, name):
    router, x = of_names(cls, NAMES), hidden()
    if cls is not FixedRouter:
        router.mark_mature("tables", 0.3)
    rest = [i for i in range(4) if NAMES[i] != name]
    expected = routings(router, x, active=rest)
    router.remove_expert(name)
    assert router.expert_names == [NAMES[i] for i in rest]
    for got, wanted in zip(routings(router, x), expected, strict=True):
        assert got.weights.equal(wanted.weights)


def test_fewer_experts_than_top_k_are_all_picked():
    router, x = make(top_k=3, capacity_factor=1.0), hidden()
    router.remove_expert("code")
    router.remove_expert("headers")
    assert (router.num_experts, router.top_k) == (2, 2)
    assert (router(x) > 0).all()
    router.add_expert("code")
    assert router.top_k == 2


@every_router
def test_adding_and_removing_gives_the_router_back(cls):
    router, x = of_names(cls, NAMES), hidden()
    expected = routings(router, x)
    router.add_expert("new")
    router.remove_expert("new")
    for got, wanted in zip(routings(router, x), expected, strict=True):
        assert got.weights.equal(wanted.weights)


@every_router
def test_a_renamed_expert_keeps_its_column(cls):
    router, x = of_names(cls, NAMES), hidden()
    before = router(x)
    router.rename_expert("prose", "poems")
    router.rename_expert("code", "code")
    assert router.expert_names == ["code", "poems", "tables", "headers"]
    assert router.column("poems") == 1
    assert router(x).equal(before)


def test_a_new_expert_of_a_fixed_router_gets_the_share_that_is_set():
    router = FixedRouter(NAMES[:2])
    router.add_expert("tables")
    router.activate("tables")
    assert router(None).tolist() == [0.5, 0.5, 0]
    router.weights[router.column("tables")] = 1.0
    assert router(None).tolist() == [0.25, 0.25, 0.5]


@every_router
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda router: router.add_expert("prose"), ValueError, "has an expert 'prose' already"),
        (lambda router: router.add_expert(4), TypeError, "must be a string, got int"),
        (lambda router: router.remove_expert("poems"), ValueError, "no expert 'poems'"),
        (lambda router: router.rename_expert("poems", "prose"), ValueError, "no expert 'poems'"),
        (lambda router: router.rename_expert("code", "prose"), ValueError, "has an expert 'prose' already"),
        (lambda router: router.rename_expert("code", None), TypeError, "must be a string, got NoneType"),
    ],
)
def test_what_can_not_come_or_go_changes_nothing(cls, change, error, message):
    router = of_names(cls, NAMES)
    with pytest.raises(error, match=message):
        change(router)
    assert router.expert_names == NAMES
    assert all(t.shape[:1] != (5,) for t in router.state_dict().values())


def test_an_immature_new_expert_and_the_last_one_are_refused():
    router = make(names=["code"])
    for maturity, error in ((0.0, ValueError), (1.5, ValueError), ("young", TypeError)):
        with pytest.raises(error, match="maturity must"):
            router.add_expert("prose", maturity=maturity)
    with pytest.raises(ValueError, match="'code' is the router's only expert"):
        router.remove_expert("code")
    assert router.expert_names == ["code"]


# What training changes


def test_without_capacity_and_dropout_training_and_evaluation_are_the_same():
    router, x = make(top_k=2), hidden()
    assert router.train()(x).equal(router.eval()(x))


@every_learned_router
def test_experts_may_all_train_and_one_of_them_serve(cls):
    router, x = make(cls, eval_top_k=1), hidden()
    dense, single = router.train()(x), router.eval()(x)
    assert dense.equal(make(cls)(x))
    assert single.equal(make(cls, top_k=1)(x))
    assert "eval_top_k=1" in repr(router)
    sparse = make(cls, top_k=1, eval_top_k=4, capacity_factor=0.2)
    assert sparse.eval()(x).equal(dense)
    assert sparse.train()(x).equal(make(cls, top_k=1, capacity_factor=0.2)(x))
    sparse.remove_expert("code")
    assert (sparse.eval_top_k, router.eval_top_k) == (3, 1)


@pytest.mark.parametrize("active", [None, [3, 1]])
@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("training", [False, True])
def test_what_layers_share_changes_no_bit(training, top_k, active):
    router = PerLayerRouter(NAMES, 6, num_layers=3, top_k=top_k, capacity_factor=0.6).train(training)
    router.mark_mature("tables", 0.3)
    router.activated[1] = False
    shared = SharedByLayers()
    shapes = [(2, 5), (2, 5), (3, 4)]  # of the last layer it is not the same
    for layer, (shape, dtype) in enumerate(zip(shapes, [torch.float32, torch.float64, torch.float32], strict=True)):
        x, mask = hidden(*shape, dtype=dtype), torch.arange(math.prod(shape)).reshape(shape) % 4 != 3
        alone = router.route(x, mask, layer=layer, active=active)
        got = router.route(x, mask, layer=layer, active=active, shared=shared)
        assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))


def route_by_hand(router, x, mask, active, kept):
    """Weights [T, N] of tokens [T, H] in Python's own numbers; `kept` [T, N]: what the expert dropout leaves."""
    n = len(active)
    live = [bool(router.activated[column]) for column in active]
    k = n if router.top_k is None else min(router.top_k, sum(live))
    capacity = math.inf
    if router.training and router.capacity_factor is not None and router.top_k is not None:
        capacity = math.ceil(router.capacity_factor * sum(mask) * k / sum(live))
    taken, rows = [0] * n, []
    for token, counts, left in zip(x.tolist(), mask, kept, strict=True):
        scores = []
        for i, column in enumerate(active):
            gate = zip(router.gate.weight[column].tolist(), token, strict=True)
            logit = sum(a * b for a, b in gate) + router.gate.bias.tolist()[column]
            maturity = router.maturity.tolist()[column]
            scores.append(maturity * math.exp(logit / router.temperature) if live[i] and left[i] else 0.0)
        picked = [i for i in sorted(range(n), key=lambda i, s=scores: (-s[i], i))[:k] if scores[i]]
        total = sum(scores[i] for i in picked)
        row = [scores[i] / total if i in picked else 0.0 for i in range(n)]
        for i in picked if counts else ():
            taken[i] += 1
            if taken[i] > capacity:
                row[i] = 0.0
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, n)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (3, 5), (2, 7), (5, 1), (2, 0)])
@pytest.mark.parametrize(("top_k", "factor", "dropout"), [(1, 0.7, 0), (2, 1.25, 0.4), (3, 0.3, 0), (None, 1.0, 0.6)])
@pytest.mark.parametrize("active", [[0, 1, 2, 3, 4], [4, 1, 2], [3]])
def test_weights_are_those_of_the_definitions_in_plain_python(training, shape, top_k, factor, dropout, active):
    names = [*NAMES, "footers"]
    options = {"top_k": top_k, "capacity_factor": factor, "expert_dropout": dropout, "temperature": 1.7}
    router = make(names=names, **options).double().train(training)
    router.mark_mature("tables", 0.3)
    router.activated[1] = False
    x = hidden(*shape, dtype=torch.float64)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.7
    kept = torch.ones(*shape, len(active), dtype=torch.bool)
    torch.manual_seed(1)
    if training and dropout:
        kept = router._draw(router.activated[active], torch.Size(shape)).expand(kept.shape)
    torch.manual_seed(1)
    got = router(x, mask, active=active)
    expected = route_by_hand(
        router, x.reshape(-1, H), mask.flatten().tolist(), active, kept.reshape(-1, len(active)).tolist()
    )
    torch.testing.assert_close(got.reshape(-1, len(active)), expected)


def capacity_by_hand(weights, mask, capacity):
    """First come by token."""
    weights, used = weights.detach().clone(), [0] * weights.shape[-1]
    for row, counts in zip(weights.reshape(-1, weights.shape[-1]), mask.reshape(-1).tolist(), strict=True):
        for e in row.nonzero().flatten().tolist() if counts else ():
            used[e] += 1
            if used[e] > capacity:
                row[e] = 0
    return weights


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.25, 4.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_drops_the_last_picks_in_training_without_renormalising(factor, top_k, padded):
    router, x = make(top_k=top_k, capacity_factor=factor), hidden(3, 7)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.7 if padded else torch.ones(3, 7)
    free = router.eval().route(x, mask)
    capacity = math.ceil(factor * int(mask.sum()) * top_k / 4)
    limited = router.train().route(x, mask if padded else None)
    assert limited.weights.equal(capacity_by_hand(free.weights, mask, capacity))
    assert limited.counts.equal(free.counts)
    torch.testing.assert_close(limited.prob_sums, free.prob_sums)


def test_capacity_is_shared_among_the_experts_that_take_part():
    router, x = make(top_k=2, capacity_factor=1.0), hidden(3, 8)
    router.activated[3] = False
    free, limited = router.eval().route(x), router.train().route(x)
    expected = capacity_by_hand(free.weights, torch.ones(3, 8), math.ceil(24 * 2 / 3))
    assert limited.weights.equal(expected)
    free, limited = router.eval().route(x, active=[0, 3, 2]), router.train().route(x, active=[0, 3, 2])
    assert limited.weights.equal(capacity_by_hand(free.weights, torch.ones(3, 8), 24))


def test_capacity_leaves_a_dense_mixture_alone():
    router, x = make(capacity_factor=0.1), hidden()
    assert router.train()(x).equal(router.eval()(x))


def test_dropped_picks_get_no_gradient_and_the_others_do():
    router, x = make(top_k=1, capacity_factor=0.5, renormalize=False), hidden()
    weights = router(x)
    assert (weights == 0).all(-1).any()
    weights.sum().backward()
    assert router.gate.weight.grad.isfinite().all()
    assert router.gate.weight.grad.any()


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_dropped_experts_are_missing_for_the_whole_sequence_and_the_rest_is_renormalised(top_k):
    router, x = make(top_k=top_k, expert_dropout=0.5), hidden(200, 3)
    torch.manual_seed(0)
    output = router.route(x)
    weights = output.weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(200, 3))
    torch.manual_seed(0)
    kept = router._draw(router.activated, (200, 3))
    assert kept.any(-1).all()
    assert 0.4 < kept.float().mean() < 0.65
    logits = gate_of(router, x).masked_fill(~kept, -torch.inf)
    expected = route(logits, top_k=top_k).weights
    torch.testing.assert_close(weights, expected)
    assert output.counts.equal((expected > 0).sum((0, 1)))
    assert router.eval()(x).equal(make(top_k=top_k)(x))


def test_dropout_never_takes_the_last_expert_that_is_activated():
    router = make(expert_dropout=0.9)
    router.activated[:3] = False
    assert (router(hidden(50, 2)) == torch.tensor([0.0, 0, 0, 1])).all()
    assert (make(expert_dropout=0.99)(hidden(50, 2), active=[1]) == 1).all()


# Each kind


def test_what_each_router_reads():
    assert [make(cls).reads for cls in LEARNED] == ["embeddings", "layer", "layers", "last_hidden"]
    assert make(HiddenStateRouter).layer == 1
    assert FixedRouter(NAMES).reads == "nothing"
    assert FixedRouter(NAMES).input_size is None


def test_each_layer_has_its_own_gate_and_none_means_the_last():
    router, x = make(PerLayerRouter), hidden()
    weights = [router(x, layer=i) for i in range(3)]
    assert not weights[0].equal(weights[1])
    assert router(x).equal(weights[2])
    for layer in (3, -1):
        with pytest.raises(IndexError, match="layer"):
            router(x, layer=layer)


def test_a_fixed_router_gives_its_weights_whatever_it_reads():
    router = FixedRouter(NAMES, [0.4, 0.3, 0.2, 0.1])
    torch.testing.assert_close(router(None), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert router(hidden()).equal(router(None))
    torch.testing.assert_close(router(None, active=[3, 1]), torch.tensor([0.25, 0.75]))
    router.activated[0] = False
    torch.testing.assert_close(router(None), torch.tensor([0, 3, 2, 1]) / 6)
    assert FixedRouter(NAMES)(None).tolist() == [0.25] * 4
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    output = FixedRouter(NAMES, [1, 1, 0, 0]).route(hidden(), mask)
    assert output.counts.tolist() == [8, 8, 0, 0]
    assert output.prob_sums.tolist() == [4, 4, 0, 0]


def test_a_router_of_ones_own_is_one_class():
    class Everything(Router):
        reads = "embeddings"

        def route(self, hidden_states, attention_mask=None, *, layer=None, active=None):
            return make(names=self.expert_names).route(hidden_states, attention_mask, active=active)

    assert Everything(NAMES)(hidden()).shape == (2, 5, 4)
    with pytest.raises(NotImplementedError, match="route"):

        class Lazy(Router):
            reads = "nothing"

        Lazy(NAMES)(None)
    with pytest.raises(TypeError, match="reads"):
        LearnedRouter(NAMES, H)


# A module among others


@every_learned_router
@pytest.mark.parametrize("mlp_dim", [None, 3])
def test_state_goes_around_and_copies_are_independent(cls, mlp_dim):
    router, other, x = make(cls, mlp_dim=mlp_dim), make(cls, mlp_dim=mlp_dim, seed=1), hidden()
    router.mark_mature("prose", 0.5)
    router.activated[0] = False
    assert not router(x).equal(other(x))
    other.load_state_dict(router.state_dict())
    assert router(x).equal(other(x))
    twin = copy.deepcopy(router)
    twin.mark_mature("prose")
    twin.activate("code")
    assert router.maturity[1] == 0.5
    assert not router.activated[0]
    assert not any("lora_" in name for name in router.state_dict())


def test_a_linear_gate_has_the_names_of_dylora():
    assert set(dict(make().named_parameters())) == {"gate.weight", "gate.bias"}


def test_repr_says_what_matters():
    text = repr(make(PerLayerRouter, top_k=2, temperature=2.0, capacity_factor=1.25, expert_dropout=0.1))
    for part in ("'prose'", "reads='layers'", "top_k=2", "temperature=2", "capacity_factor=1.25", "expert_dropout=0.1"):
        assert part in text


@pytest.mark.parametrize("training", [False, True])
def test_compiled_routers_have_no_break(training):
    router = make(PerLayerRouter, top_k=2, capacity_factor=0.6, names=NAMES).train(training)
    compiled = torch.compile(router.route, backend="aot_eager", fullgraph=True)
    x, mask = hidden(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for active in (None, [2, 0, 3]):
        got, expected = (f(x, mask, layer=1, active=active) for f in (compiled, router.route))
        torch.testing.assert_close(got.weights, expected.weights)
        assert got.counts.equal(expected.counts)
        torch.testing.assert_close(got.prob_sums, expected.prob_sums)


def test_meta_routers_give_shapes():
    with torch.device("meta"):
        router = make(PerLayerRouter, top_k=2, capacity_factor=1.0, expert_dropout=0.1)
        x, mask = torch.empty(2, 5, H), torch.ones(2, 5)
    assert router(x, mask).shape == (2, 5, 4)


# What is refused


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: make(names=[]), ValueError, "expert_names"),
        (lambda: make(names=["a", "a"]), ValueError, "expert_names"),
        (lambda: make(names=[1, 2]), ValueError, "expert_names"),
        (lambda: make(top_k=0), ValueError, "top_k"),
        (lambda: make(top_k=5), ValueError, "top_k"),
        (lambda: make(top_k=1.5), TypeError, "top_k"),
        (lambda: make(eval_top_k=0), ValueError, r"eval_top_k must lie in \[1, 4\]"),
        (lambda: make(eval_top_k=5), ValueError, "eval_top_k"),
        (lambda: make(eval_top_k=True), TypeError, "eval_top_k"),
        (lambda: make(temperature=0), ValueError, "temperature"),
        (lambda: make(capacity_factor=0), ValueError, "capacity_factor"),
        (lambda: make(expert_dropout=1.0), ValueError, "expert_dropout"),
        (lambda: make(expert_dropout=-0.1), ValueError, "expert_dropout"),
        (lambda: make(mlp_dim=0), ValueError, "mlp_dim"),
        (lambda: make(temperature="1"), TypeError, "temperature must be a real number, got str"),
        (lambda: make(capacity_factor="1"), TypeError, "capacity_factor"),
        (lambda: make(expert_dropout=[0.1]), TypeError, "expert_dropout"),
        (lambda: make(mlp_dim=1.5), TypeError, "mlp_dim must be an integer or None, got float"),
        (lambda: make(temperature=None), TypeError, "temperature must be a real number, got NoneType"),
        (lambda: EmbeddingRouter(NAMES, "8"), TypeError, "input_size"),
        (lambda: HiddenStateRouter(NAMES, H, layer="0"), TypeError, "layer"),
        (lambda: PerLayerRouter(NAMES, H, num_layers=1.0), TypeError, "num_layers"),
        (lambda: make().mark_mature("prose", "old"), TypeError, "value"),
        (lambda: EmbeddingRouter(NAMES, 0), ValueError, "input_size"),
        (lambda: HiddenStateRouter(NAMES, H, layer=-1), ValueError, "layer"),
        (lambda: PerLayerRouter(NAMES, H, num_layers=0), ValueError, "num_layers"),
        (lambda: FixedRouter(NAMES, [1, 2]), ValueError, "weights"),
        (lambda: FixedRouter(NAMES, [1, 2, 3, -1]), ValueError, "weights"),
        (lambda: FixedRouter(NAMES, [0, 0, 0, 0]), ValueError, "weights"),
        (lambda: FixedRouter(NAMES, [1, 2, 3, math.nan]), ValueError, "weights"),
        (lambda: make()(torch.ones(2, 5, H + 1)), ValueError, "input_size"),
        (lambda: make()(torch.ones(2, 5, H, dtype=torch.long)), TypeError, "hidden_states"),
        (lambda: make()(None), TypeError, "hidden_states"),
        (lambda: make()(hidden(), torch.ones(2, 4)), ValueError, "attention_mask"),
        (lambda: make()(hidden(), [[1] * 5] * 2), TypeError, "attention_mask"),
        (lambda: make()(hidden(), active=[]), ValueError, "active"),
        (lambda: make()(hidden(), active=[1, 1]), ValueError, "active"),
        (lambda: make()(hidden(), active=[4]), IndexError, "active"),
        (lambda: FixedRouter(NAMES)(None, active=[-1]), IndexError, "active"),
        (lambda: make().mark_mature("prose", 0.0), ValueError, "value"),
        (lambda: make().mark_mature("prose", 1.5), ValueError, "value"),
        (lambda: make().mark_mature("poems"), ValueError, "poems"),
        (lambda: make().activate("poems"), ValueError, "poems"),
    ],
)
def test_wrong_arguments_are_refused_by_name(build, error, message):
    with pytest.raises(error, match=message):
        build()


# From a configuration


def config(**changes):
    return SimpleNamespace(
        **{
            "router_type": "learned_with_maturity",
            "router_hidden_size": None,
            "top_k_experts": 2,
            "router_temperature": 2.0,
            "expert_capacity_factor": 1.25,
            "expert_dropout": 0.1,
        }
        | changes
    )


@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity"])
@pytest.mark.parametrize("size", [None, H])
def test_a_configuration_names_a_gate_for_each_layer(router_type, size):
    cfg = config(router_type=router_type, router_hidden_size=size)
    router = build_router(cfg, hidden_size=H, num_layers=3, expert_names=NAMES)
    assert isinstance(router, PerLayerRouter)
    assert router.expert_names == NAMES
    assert (router.top_k, router.temperature, router.capacity_factor, router.expert_dropout) == (2, 2.0, 1.25, 0.1)
    assert (router.num_layers, router.input_size, router.num_experts) == (3, H, 4)


def test_a_configuration_names_fixed_weights():
    router = build_router(config(router_type="fixed"), hidden_size=H, num_layers=3, expert_names=NAMES)
    assert router(None).tolist() == [0.25] * 4


@pytest.mark.parametrize("changes", [{"router_hidden_size": H + 1}, {"router_type": "guess"}, {"top_k_experts": 5}])
def test_a_configuration_that_does_not_fit_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes)).removesuffix("_experts")):
        build_router(config(**changes), hidden_size=H, num_layers=3, expert_names=NAMES)
