"""Dropout in `moelora.nn.routed_lora`: one mask per expert, from a seed of torch's generator, never kept."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import moelora
from moelora import reference
from moelora.nn import autograd, dropout, routed_lora, routed_lora_formula
from moelora.nn.dropout import draw_seed, dropped

FUNCTIONS = [routed_lora, routed_lora_formula]
P = [0.3, 0.0, 0.6]


@pytest.fixture(params=FUNCTIONS, ids=lambda f: f.__name__)
def function(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["core's masks", "masks of a generator"])
def masks(request, monkeypatch):
    """Of the formula: also those that it draws on a GPU, here by the generator of the CPU."""
    if request.param:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def with_masks(m, seed, dropout_p, top_k=None):
    """The loop over the experts, each with its own x."""
    kept = torch.ones_like(m.routing_weights)
    if top_k:
        assert top_k == len(m.lora_A) - 1
        kept.scatter_(-1, m.routing_weights.argmin(-1, keepdim=True), 0)
    return sum(
        m._replace(
            x=dropped(m.x, seed, e, p),
            lora_A=[m.lora_A[e]],
            lora_B=[m.lora_B[e]],
            routing_weights=(m.routing_weights * kept)[..., e : e + 1],
            scaling=[m.scaling[e]],
        ).loop()
        for e, p in enumerate(dropout_p)
    )


def seeded(function, seed=3):
    torch.manual_seed(seed)
    return function()


def drawn(seed=3):
    return int(seeded(draw_seed, seed))


def gradients(y, leaves):
    return torch.autograd.grad(y.square().sum(), leaves)


def assert_same(y, expected, leaves, **tolerance):
    torch.testing.assert_close(y, expected, **tolerance)
    for got, wanted in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


# ---- the masks ----


@pytest.mark.parametrize("seed", [0, -5, 2**62 + 12345])
@pytest.mark.parametrize("shape", [(1, 1), (50, 300), (3, 7, 130)])
def test_the_masks_are_those_of_the_core(shape, seed):
    x = torch.ones(shape, dtype=torch.float64)
    probabilities = [0.1, 0.5, 0.0, 1.0, 1e-9, 1 - 1e-12]
    twin = reference._Dropout(seed, probabilities)
    for e, p in enumerate(probabilities):
        expected = twin.factors(e, shape[:-1], shape[-1])
        np.testing.assert_array_equal(dropped(x, seed, e, p).numpy(), expected)
        np.testing.assert_array_equal(dropped(x, torch.tensor(seed), e, p).numpy(), expected)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("tokens", [(2, 5), (9,), (2, 70), (2, 3, 4)])
def test_every_expert_has_its_own_mask_and_probability(make_mixture, function, tokens, top_k):
    m = make_mixture(tokens=tokens, d_in=140)
    y = seeded(lambda: function(*m, dropout_p=P, top_k=top_k))
    assert_same(y, with_masks(m, drawn(), P, top_k), m.leaves)
    assert (y - with_masks(m, drawn(), [0.0] * 3, top_k)).abs().max() > 0.1


@pytest.mark.parametrize("tokens", [(1, 1), (2, 7), (2, 67)], ids=str)
def test_every_instruction_set_draws_the_same_masks(make_mixture, tokens, isa):
    m = make_mixture(tokens=tokens, d_in=140, d_out=33, ranks=(20, 1, 12))
    assert_same(seeded(lambda: routed_lora(*m, dropout_p=P)), with_masks(m, drawn(), P), m.leaves)


@pytest.mark.parametrize("given", ["weight", "base_output", "shared weights", "strided x"])
def test_with_everything_that_can_be_given(make_mixture, function, given):
    m = make_mixture(weights=() if given == "shared weights" else None)
    if given == "strided x":
        m = m._replace(x=m.x.detach().mT.contiguous().mT.requires_grad_())
    weight = torch.randn(6, 7, dtype=torch.float64)
    base = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    options = {"weight": {"weight": weight}, "base_output": {"base_output": base}}.get(given, {})
    expected = with_masks(m, drawn(), P)
    expected = expected + {"weight": F.linear(m.x, weight), "base_output": base}.get(given, 0)
    leaves = [*m.leaves, base] if given == "base_output" else m.leaves
    assert_same(seeded(lambda: function(*m, dropout_p=P, **options)), expected, leaves)


def test_masks_that_the_generator_of_a_device_draws(make_mixture, monkeypatch):
    """As on a GPU; here by the generator of the CPU."""
    monkeypatch.setattr(dropout, "_kept", lambda x, seed, e, drops: dropout._drawn(x, int(seed), e, drops))
    m = make_mixture(tokens=(2, 5))
    y = seeded(lambda: routed_lora_formula(*m, dropout_p=P))
    assert_same(y, with_masks(m, drawn(), P), m.leaves)
    assert not torch.equal(seeded(lambda: routed_lora_formula(*m, dropout_p=P), 4), y)

    x = torch.ones(400, 300)
    first, second = (dropped(x, 7, e, 0.3) for e in (0, 1))
    assert abs((first == 0).double().mean() - 0.3) < 4 * (0.3 * 0.7 / x.numel()) ** 0.5
    both = ((first == 0) & (second == 0)).double().mean()
    assert abs(both - 0.09) < 4 * (0.09 * 0.91 / x.numel()) ** 0.5
    torch.testing.assert_close(first.max(), torch.tensor(1 / 0.7), atol=1e-4, rtol=0)
    assert torch.equal(dropped(torch.ones(300, 400).T, 7, 0, 0.3), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("top_k", [None, 2])
def test_on_a_gpu(make_mixture, top_k):
    m = make_mixture(tokens=(2, 5))
    m = m.replace([t.detach().cuda().requires_grad_() for t in m.leaves])
    y = seeded(lambda: routed_lora(*m, dropout_p=P, top_k=top_k))
    assert_same(y, with_masks(m, drawn(), P, top_k), m.leaves, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradients_are_those_of_finite_differences(make_mixture, function, top_k):
    m = make_mixture(tokens=(2, 3))

    def same_masks(*leaves):
        return seeded(lambda: function(*m.replace(leaves), dropout_p=P, top_k=top_k))

    assert torch.autograd.gradcheck(same_masks, m.leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_x(make_mixture, function, dtype):
    m = make_mixture(dtype=dtype, adapters=torch.float32)
    y = seeded(lambda: function(*m, dropout_p=P))
    assert y.dtype is dtype
    wide = m.replace([t.double() for t in m.leaves])
    expected = with_masks(wide, drawn(), P)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.05)
    got = torch.autograd.grad(y.sum(), m.leaves)
    for grad, wanted, leaf in zip(got, torch.autograd.grad(expected.sum(), m.leaves), m.leaves, strict=True):
        assert grad.dtype is leaf.dtype
        torch.testing.assert_close(grad, wanted, rtol=0.02, atol=0.05)


def test_autocast(make_mixture, function):
    m = make_mixture(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = seeded(lambda: function(*m, dropout_p=P))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), with_masks(m, drawn(), P), rtol=0.02, atol=0.1)


def test_certain_dropout_leaves_the_base_alone(make_mixture, function):
    m = make_mixture()
    base = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(function(*m, base_output=base, dropout_p=1.0), base)


def test_the_base_product_is_not_dropped(make_mixture, function):
    m = make_mixture()
    weight = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(function(*m, weight=weight, dropout_p=1.0), F.linear(m.x, weight))


def test_what_is_dropped_leaves_no_trace(make_mixture, function):
    m = make_mixture(grad=False)
    expected = seeded(lambda: function(*m, dropout_p=0.5))
    everywhere = torch.stack([dropped(torch.ones_like(m.x), drawn(), e, 0.5) for e in range(3)]).sum(0) == 0
    assert everywhere.any()
    poisoned = m._replace(x=m.x.masked_fill(everywhere, float("nan")))
    torch.testing.assert_close(seeded(lambda: function(*poisoned, dropout_p=0.5)), expected)


# ---- the seed ----


def test_the_seed_comes_from_torchs_generator(make_mixture, function):
    m = make_mixture(grad=False)
    first, other = (seeded(lambda: function(*m, dropout_p=0.5), seed) for seed in (0, 1))
    assert not torch.equal(first, other)
    again, next_one = seeded(lambda: [function(*m, dropout_p=0.5) for _ in range(2)], 0)
    assert torch.equal(again, first)
    assert not torch.equal(next_one, first)


def test_both_functions_draw_the_same(make_mixture):
    m = make_mixture()
    assert_same(*(seeded(lambda f=f: f(*m, dropout_p=P)) for f in FUNCTIONS), m.leaves)


def test_no_dropout_draws_nothing(make_mixture, function):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    function(*make_mixture(), dropout_p=0.0)
    assert torch.equal(torch.rand(3), expected)


def test_the_number_of_threads_does_not_change_the_bits(make_mixture):
    m, results = make_mixture(tokens=(2, 90), d_in=140), []
    try:
        for n in (1, 2, 3):
            moelora.set_num_threads(n)
            y = seeded(lambda: routed_lora(*m, dropout_p=P))
            results.append([y, *gradients(y, m.leaves)])
    finally:
        moelora.set_num_threads(None)
    for other in results[1:]:
        for got, first in zip(other, results[0], strict=True):
            assert torch.equal(got, first)


# ---- recomputed, kept ----


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_bits_of_the_run_without(make_mixture, function, reentrant):
    m = make_mixture()

    def twice(x, w, *adapters):
        y = function(x, adapters[:3], adapters[3:], w, m.scaling, dropout_p=P)
        return y + function(x, adapters[:3], adapters[3:], w, m.scaling, dropout_p=0.5)

    results = []
    for run in (twice, lambda *args: checkpoint(twice, *args, use_reentrant=reentrant)):
        leaves = [leaf.detach().requires_grad_() for leaf in m.leaves]
        y = seeded(lambda run=run, leaves=leaves: run(*leaves))
        torch.rand(5)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def kept_bytes(function):
    """Of the storages that autograd holds on to."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return sum(storages.values()), y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_a_mask_is_kept(make_mixture, function, dtype):
    m = make_mixture(tokens=(4, 50), d_in=256, dtype=dtype, adapters=torch.float32)
    plain, _ = kept_bytes(lambda: function(*m))
    with_dropout, y = kept_bytes(lambda: function(*m, dropout_p=P))
    assert plain <= with_dropout <= plain + 64
    gradients(y, m.leaves)


def test_the_backward_makes_no_mask_for_all_experts_at_once(make_mixture):
    """The formula's largest tensors belong to one expert."""
    m, largest = make_mixture(tokens=(4, 50), d_in=256, ranks=(1,) * 8), 0

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watching():
        routed_lora(*m, dropout_p=0.5).sum().backward()
    assert 200 * 256 <= largest < 2 * 200 * 256


# ---- as PEFT has it ----

EXPERTS = ["expert_0", "expert_1", "expert_2"]


@pytest.fixture
def peft_layer():
    """PEFT's own layer with three active adapters of different ranks."""
    torch.manual_seed(0)
    layer = Linear(nn.Linear(7, 6), EXPERTS[0], LoraConfig(lora_dropout=0.4, r=2), r=2, lora_alpha=3)
    for name, rank in zip(EXPERTS[1:], (3, 1), strict=True):
        layer.update_layer(name, rank, lora_alpha=4, config=LoraConfig(lora_dropout=0.4, r=rank))
    for name in EXPERTS:
        nn.init.normal_(layer.lora_B[name].weight)
    return layer.train()


@pytest.mark.parametrize("n", [1, 3])
def test_mean_and_variance_are_those_of_peft(peft_layer, n):
    names, draws = EXPERTS[:n], 20000
    peft_layer.set_adapter(names)
    x = torch.randn(1, 3, 7).expand(draws, 3, 7)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = peft_layer(x)
        y = routed_lora(
            x,
            [peft_layer.lora_A[name].weight for name in names],
            [peft_layer.lora_B[name].weight for name in names],
            torch.ones(n),
            [peft_layer.scaling[name] for name in names],
            base_output=peft_layer.base_layer(x),
            dropout_p=0.4,
        )
    error = (y.var(0) + expected.var(0)).sqrt() / draws**0.5
    assert ((y.mean(0) - expected.mean(0)).abs() < 4.5 * error).all()
    torch.testing.assert_close(y.var(0), expected.var(0), rtol=0.1, atol=0)


def test_the_mean_over_many_draws_is_the_result_without_dropout(make_mixture):
    m = make_mixture(tokens=(3,), grad=False)
    torch.manual_seed(0)
    many = m._replace(x=m.x.expand(20000, 3, 7), routing_weights=m.routing_weights.expand(20000, 3, 3))
    y = routed_lora(*many, dropout_p=0.4)
    error = y.std(0) / 20000**0.5
    assert ((y.mean(0) - m.loop()).abs() < 5 * error).all()
    # independent: the variance is the sum of the experts' own
    alone = sum(
        routed_lora(
            many.x, [m.lora_A[e]], [m.lora_B[e]], many.routing_weights[..., e : e + 1], m.scaling[e], dropout_p=0.4
        ).var(0)
        for e in range(3)
    )
    torch.testing.assert_close(y.var(0), alone, rtol=0.1, atol=0)


# ---- paths ----


def test_the_core_computes_it(make_mixture, monkeypatch):
    def refuse(*args):
        raise AssertionError("the formula was called")

    monkeypatch.setattr(autograd, "formula", refuse)
    m = make_mixture()
    assert_same(seeded(lambda: routed_lora(*m, dropout_p=P)), with_masks(m, drawn(), P), m.leaves)


def test_double_backward_is_an_error(make_mixture, function):
    m = make_mixture()
    (grad,) = torch.autograd.grad(function(*m, dropout_p=0.5).square().sum(), m.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad.sum().backward()


def test_batched_gradients(make_mixture, function):
    m = make_mixture()
    y = seeded(lambda: function(*m, dropout_p=P))
    rows = torch.stack([torch.ones_like(y), torch.randn_like(y)])
    batched = torch.autograd.grad(y, m.leaves, rows, is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(rows):
        for got, wanted in zip(batched, torch.autograd.grad(y, m.leaves, row, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], wanted)


def test_torch_func(make_mixture):
    m = make_mixture()

    def loss(x):
        return routed_lora(x, m.lora_A, m.lora_B, m.routing_weights, m.scaling, dropout_p=P).square().sum()

    (wanted,) = gradients(with_masks(m, drawn(), P), [m.x])
    torch.testing.assert_close(seeded(lambda: torch.func.grad(loss)(m.x)), wanted)
    x = m.x.detach()
    same, different = (
        seeded(lambda r=r: torch.func.vmap(torch.func.grad(loss), randomness=r)(torch.stack([x, x])))
        for r in ("same", "different")
    )
    torch.testing.assert_close(same[0], wanted)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    value, slope = seeded(lambda: torch.func.jvp(loss, (x,), (x,)))
    torch.testing.assert_close(slope, 2 * value)


@pytest.mark.usefixtures("masks")
def test_transforms_differentiate_the_masks_of_the_forward(make_mixture):
    """y is linear in x, so that its derivative along x is y itself."""
    m = make_mixture()
    x = m.x.detach()

    def y_of(x):
        return routed_lora_formula(x, *m[1:], dropout_p=P)

    slope, total = torch.func.grad_and_value(lambda x: y_of(x).sum())(x)
    torch.testing.assert_close((slope * x).sum(), total)
    y, along_x = torch.func.jvp(y_of, (x,), (x,))
    torch.testing.assert_close(along_x, y)
    jacobian, y = torch.func.jacrev(lambda x: (y_of(x),) * 2, has_aux=True)(x)
    torch.testing.assert_close((jacobian * x).sum((-3, -2, -1)), y)


@pytest.mark.usefixtures("masks")
def test_vmap_over_a_backward_meets_the_masks_of_the_forward(make_mixture):
    m = make_mixture()
    y = routed_lora_formula(*m, dropout_p=P)
    rows = torch.randn(2, 3, *y.shape, dtype=y.dtype)

    def gradients(row):
        return torch.autograd.grad(y, m.leaves, row, retain_graph=True)

    batched = torch.vmap(torch.vmap(gradients))(rows)
    for i, j in np.ndindex(2, 3):
        for got, wanted in zip(batched, gradients(rows[i, j]), strict=True):
            torch.testing.assert_close(got[i, j], wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["dynamo", "aot_eager", "make_fx", "jit.trace"])
def test_compiled_and_traced_calls_draw_anew(make_mixture, how):
    torch._dynamo.reset()
    m = make_mixture(grad=False)
    x = m.x.requires_grad_() if how in ("dynamo", "aot_eager") else m.x

    def call(x):
        return routed_lora(x, *m[1:], dropout_p=P)

    recorded = {
        "dynamo": lambda: torch.compile(call, fullgraph=True, backend="eager"),
        "aot_eager": lambda: torch.compile(call, fullgraph=True, backend="aot_eager"),
        "make_fx": lambda: make_fx(call)(x),
        "jit.trace": lambda: torch.jit.trace(call, (x,), check_trace=False),
    }[how]()
    first, second = seeded(lambda: [recorded(x), recorded(x)])
    assert not torch.equal(first, second)
    assert torch.equal(first, seeded(lambda: recorded(x)))
    if x.requires_grad:  # y is linear in x: its gradient tells of the mask
        for y in (first, second):
            (grad,) = torch.autograd.grad(y.sum(), x)
            torch.testing.assert_close((grad * x).sum(), y.sum())
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device_changes_nothing(make_mixture, device):
    m = make_mixture()
    with torch.device(device):
        y = seeded(lambda: routed_lora(*m, dropout_p=P))
    torch.testing.assert_close(y, with_masks(m, drawn(), P))
