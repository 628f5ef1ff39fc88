"""`moelora.nn.routed_lora` on plain CPU tensors: the C core under autograd, against the loop over experts."""

import threading

import pytest
import torch
import torch.nn.functional as F

import moelora
from moelora.nn import cpu, routed_lora, routed_lora_formula

SHAPES = {
    "sequences": dict(tokens=(2, 5), d_in=7, d_out=6, ranks=(2, 3, 1)),
    "rows": dict(tokens=(11,), d_in=5, d_out=3, ranks=(2, 2)),
    "one of everything": dict(tokens=(1,), d_in=1, d_out=1, ranks=(1,)),
    "one sequence of one token": dict(tokens=(1, 1), d_in=3, d_out=2, ranks=(1, 2)),
    "rank above width": dict(tokens=(3, 2), d_in=2, d_out=3, ranks=(5, 4)),
    "more tokens than a block": dict(tokens=(2, 67), d_in=33, d_out=17, ranks=(3, 8, 1, 4)),
    "four axes": dict(tokens=(2, 3, 2), d_in=4, d_out=5, ranks=(1, 2)),
}
CASES = [
    (name, weights)
    for name, shape in SHAPES.items()
    for weights in ("static", "sequence", "token")
    if weights != "sequence" or len(shape["tokens"]) == 2
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def gradients(y, leaves, dtype=None):
    """Of a loss in which every output counts differently, by amounts that dtype holds exactly."""
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype or y.dtype).to(y.dtype)
    return torch.autograd.grad(y, leaves, seed)


def assert_close(got, expected, dtype):
    """Within the rounding of dtype, measured against the largest element."""
    expected = expected.double()
    scale = expected.abs().max().item() if expected.numel() else 1.0
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max().item() <= TOLERANCES[dtype] * max(scale, 1e-3)


def in_double(mixture):
    return mixture.replace([t.detach().double().requires_grad_() for t in mixture.leaves])


@pytest.fixture(params=[None, 1, 2], ids=["dense", "top1", "top2"])
def top_k(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, weights", CASES)
def test_output_and_every_gradient_equal_the_loop(make_mixture, shape, weights, dtype, top_k):
    shape = SHAPES[shape]
    top_k = min(top_k, len(shape["ranks"])) if top_k else None
    lead = {"static": (), "sequence": shape["tokens"][:1], "token": shape["tokens"]}[weights]
    m = make_mixture(**shape, weights=lead, dtype=dtype)
    exact = in_double(m)

    y = routed_lora(*m, top_k=top_k)
    expected = exact.loop(top_k=top_k)

    assert y.dtype == dtype
    assert_close(y, expected.detach(), dtype)
    for got, leaf, wanted in zip(
        gradients(y, m.leaves), m.leaves, gradients(expected, exact.leaves, dtype), strict=True
    ):
        assert got.dtype == leaf.dtype
        assert_close(got, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 7), (2, 67)], ids=str)
def test_every_instruction_set_gives_what_the_loop_gives(make_mixture, tokens, dtype, isa):
    m = make_mixture(tokens=tokens, d_in=65, d_out=33, ranks=(20, 1, 12, 4), dtype=dtype)
    exact = in_double(m)
    y, expected = routed_lora(*m), exact.loop()
    assert_close(y, expected.detach(), dtype)
    for got, wanted in zip(gradients(y, m.leaves), gradients(expected, exact.leaves, dtype), strict=True):
        assert_close(got, wanted, dtype)


@pytest.mark.parametrize("function", [routed_lora, routed_lora_formula])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_over_another_dtype_lose_nothing_to_it(make_mixture, adapters, dtype, top_k, function):
    m = make_mixture(dtype=dtype, adapters=adapters)
    exact = in_double(m)
    y, expected = function(*m, top_k=top_k), exact.loop(top_k=top_k)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype))  # one rounding, at the end
    for got, leaf, wanted in zip(
        gradients(y, m.leaves), m.leaves, gradients(expected, exact.leaves, dtype), strict=True
    ):
        assert got.dtype == leaf.dtype
        assert_close(got, wanted, leaf.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["base_output", "weight", "weight and bias"])
@pytest.mark.parametrize("tokens", [(2, 5), (7,), (2, 3, 2)], ids=str)
def test_base_layer_and_its_gradients(make_mixture, base, tokens, dtype, top_k):
    m = make_mixture(tokens=tokens, dtype=dtype)
    exact = in_double(m)
    weight, bias = torch.randn(6, 7).to(dtype), torch.randn(6).to(dtype)
    if base == "base_output":
        base_output = torch.randn(*tokens, 6).to(dtype).requires_grad_()
        before = base_output.detach().clone()
        y = routed_lora(*m, base_output=base_output, top_k=top_k)
        expected = exact.loop(base=base_output.detach().double(), top_k=top_k)
        assert torch.equal(base_output, before)
        (grad,) = torch.autograd.grad(y.sum(), base_output, retain_graph=True)
        assert torch.equal(grad, torch.ones_like(base_output))
    else:
        bias = bias if "bias" in base else None
        y = routed_lora(*m, weight=weight, bias=bias, top_k=top_k)
        expected = exact.loop(
            base=F.linear(exact.x, weight.double(), None if bias is None else bias.double()), top_k=top_k
        )
    assert_close(y, expected.detach(), dtype)
    for got, wanted in zip(gradients(y, m.leaves), gradients(expected, exact.leaves, dtype), strict=True):
        assert_close(got, wanted, dtype)


@pytest.mark.parametrize("tokens, weights", [((2, 3), ()), ((2, 3), (2,)), ((2, 3), (2, 3)), ((4,), ()), ((4,), (4,))])
@pytest.mark.parametrize("base", ["none", "base_output", "weight"])
def test_gradcheck(make_mixture, tokens, weights, base, top_k):
    m = make_mixture(tokens=tokens, weights=weights, d_in=3, d_out=4, ranks=(2, 1))
    base_output = torch.randn(*tokens, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def function(base_output, *leaves):
        given = {"none": {}, "base_output": {"base_output": base_output}, "weight": {"weight": weight, "bias": bias}}
        return routed_lora(*m.replace(leaves), top_k=top_k, **given[base])

    inputs = [base_output.requires_grad_(base == "base_output"), *m.leaves]
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)


def test_formula_equals_the_core(make_mixture, top_k):
    for shape in SHAPES.values():
        k = min(top_k, len(shape["ranks"])) if top_k else None
        m = make_mixture(**shape)
        core, formula = routed_lora(*m, top_k=k), routed_lora_formula(*m, top_k=k)
        assert_close(core, formula.detach(), torch.float64)
        for got, wanted in zip(gradients(core, m.leaves), gradients(formula, m.leaves), strict=True):
            assert_close(got, wanted, torch.float64)


def test_top_k_ties_go_to_the_lower_index_and_nan_is_the_largest(make_mixture):
    m = make_mixture(tokens=(4,), ranks=(1, 1, 1), grad=False)
    for row, kept in [
        ([1.0, 1.0, 1.0], [1.0, 0.0, 0.0]),
        ([0.0, -0.0, -1.0], [1.0, 0.0, 0.0]),
        ([0.0, 2.0, 2.0], [0.0, 1.0, 0.0]),
        ([1.0, float("nan"), 3.0], [0.0, float("nan"), 0.0]),
    ]:
        w, expected = torch.tensor(row, dtype=torch.float64), torch.tensor(kept, dtype=torch.float64)
        for function in (routed_lora, routed_lora_formula):
            # kept marks the winner; times its weight
            torch.testing.assert_close(
                function(m.x, m.lora_A, m.lora_B, w, m.scaling, top_k=1),
                m._replace(routing_weights=expected * torch.where(expected == 0, 0.0, w)).loop(),
                equal_nan=True,
            )


def test_nan_weights_reach_their_tokens_alone(make_mixture):
    m = make_mixture(tokens=(4,), grad=False)
    w = m.routing_weights.clone()
    w[2, 1] = float("nan")
    for function in (routed_lora, routed_lora_formula):
        y = function(m.x, m.lora_A, m.lora_B, w, m.scaling)
        assert y.isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("convert", [torch.Tensor.bool, torch.Tensor.long, torch.Tensor.to_dense])
def test_one_hot_weights_of_any_kind_choose_one_expert(make_mixture, convert):
    m = make_mixture()
    one_hot = F.one_hot(torch.arange(10).reshape(2, 5) % 3, 3)
    y = routed_lora(m.x, m.lora_A, m.lora_B, convert(one_hot), m.scaling)
    torch.testing.assert_close(y, m._replace(routing_weights=one_hot.double()).loop())
    y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_weights_comes_back_in_their_own_dtype(make_mixture, dtype):
    m = make_mixture(dtype=torch.float32)
    w = m.routing_weights.detach().to(dtype).requires_grad_()
    routed_lora(m.x, m.lora_A, m.lora_B, w, m.scaling).sum().backward()
    assert w.grad.dtype == dtype and w.grad.shape == w.shape


@pytest.mark.parametrize("tokens", [(0,), (0, 4), (3, 0)], ids=str)
def test_no_tokens_give_an_empty_result_and_zero_gradients(make_mixture, tokens):
    for weights in [(), tokens]:
        m = make_mixture(tokens=tokens, weights=weights)
        for kwargs in ({}, {"top_k": 2}, {"weight": torch.randn(6, 7, dtype=torch.float64)}):
            y = routed_lora(*m, **kwargs)
            assert y.shape == (*tokens, 6)
            for grad, leaf in zip(torch.autograd.grad(y.sum(), m.leaves), m.leaves, strict=True):
                assert torch.equal(grad, torch.zeros_like(leaf))


def test_gradients_of_unused_experts_are_zero_not_none(make_mixture):
    m = make_mixture()
    w = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    routed_lora(m.x, m.lora_A, m.lora_B, w, m.scaling).sum().backward()
    for e in (1, 2):
        assert torch.equal(m.lora_A[e].grad, torch.zeros_like(m.lora_A[e]))
        assert torch.equal(m.lora_B[e].grad, torch.zeros_like(m.lora_B[e]))


def test_gradients_are_ordinary_tensors_of_their_own(make_mixture):
    m = make_mixture()
    routed_lora(*m).sum().backward()
    grads = [leaf.grad for leaf in m.leaves]
    assert all(type(g) is torch.Tensor and g.is_contiguous() and g._base is None for g in grads)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


def views_of(t):
    """The same values in other memory layouts."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
    wide[..., ::2] = t
    yield wide[..., ::2]
    yield t.transpose(0, -1).contiguous().transpose(0, -1)
    if t.dim() == 3:
        yield t.transpose(0, 1).contiguous().transpose(0, 1)


def test_any_strides_give_the_same(make_mixture, top_k):
    m = make_mixture(grad=False)
    base = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = routed_lora(*m, base_output=base, top_k=top_k)
    for leaf in range(len(m.leaves)):
        for view in views_of(m.leaves[leaf]):
            leaves = [t.clone().requires_grad_() for t in m.leaves]
            leaves[leaf] = view.requires_grad_()
            for base_view in views_of(base):
                y = routed_lora(*m.replace(leaves), base_output=base_view, top_k=top_k)
                torch.testing.assert_close(y, expected)
            exact = in_double(m)
            wanted = gradients(exact.loop(top_k=top_k), exact.leaves)
            # and a gradient that comes in transposed
            got = gradients(y.transpose(0, 1), leaves)
            again = gradients(exact.loop(top_k=top_k).transpose(0, 1), exact.leaves)
            for a, b in zip(got, again, strict=True):
                assert_close(a, b, torch.float64)
            for a, b in zip(gradients(routed_lora(*m.replace(leaves), top_k=top_k), leaves), wanted, strict=True):
                assert_close(a, b, torch.float64)


def test_expanded_tensors_are_read_without_a_copy(make_mixture):
    m = make_mixture(tokens=(1, 5), weights=(), grad=False)
    x = m.x.expand(3, 5, 7)
    w = m.routing_weights.expand(3, 5, 3).detach().requires_grad_()
    y = routed_lora(x, m.lora_A, m.lora_B, w, m.scaling)
    torch.testing.assert_close(y, m.loop().expand(3, 5, 6))
    (grad,) = torch.autograd.grad(y.sum(), w)
    assert grad.shape == (3, 5, 3)
    torch.testing.assert_close(grad, torch.autograd.grad(m._replace(x=x, routing_weights=w).loop().sum(), w)[0])


def test_one_tensor_as_two_experts_gets_both_gradients(make_mixture):
    m = make_mixture(ranks=(2, 2))
    shared = m._replace(lora_A=[m.lora_A[0]] * 2)
    y, expected = routed_lora(*shared), shared.loop()
    (got,), (wanted,) = (torch.autograd.grad(t.sum(), m.lora_A[0]) for t in (y, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("which", range(8))
def test_gradients_come_only_where_needed(make_mixture, which):
    m = make_mixture(grad=False)
    exact = make_mixture()
    expected = torch.autograd.grad(exact.loop().sum(), exact.leaves)
    for other in range(8):
        for leaf in m.leaves:
            leaf.requires_grad_(False)
        chosen = sorted({which, other})
        for i in chosen:
            m.leaves[i].requires_grad_()
        got = torch.autograd.grad(routed_lora(*m).sum(), [m.leaves[i] for i in chosen])
        for i, grad in zip(chosen, got, strict=True):
            torch.testing.assert_close(grad, expected[i])


def test_no_graph_where_nothing_requires_grad(make_mixture):
    assert not routed_lora(*make_mixture(grad=False)).requires_grad
    with torch.no_grad():
        assert not routed_lora(*make_mixture()).requires_grad
    with torch.inference_mode():
        assert routed_lora(*make_mixture()).is_inference()


def saved_tensors(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_x_hidden_weights_and_adapters(make_mixture, dtype):
    m = make_mixture(tokens=(3, 16), d_in=32, d_out=24, ranks=(4,) * 8, dtype=dtype)
    weight = torch.randn(24, 32).to(dtype)
    kept = saved_tensors(lambda: routed_lora(*m, weight=weight))
    (hidden,) = [t for t in kept if not any(t.data_ptr() == s.data_ptr() for s in (*m.leaves, weight))]
    assert hidden.shape == (3, 16, 32) and hidden.dtype == torch.float32
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (*m.leaves, weight, hidden))


def test_frozen_experts_keep_neither_x_nor_copies(make_mixture):
    m = make_mixture(grad=False)
    m.routing_weights.requires_grad_()
    kept = saved_tensors(lambda: routed_lora(*m))
    assert not any(t.data_ptr() == m.x.data_ptr() for t in kept)


@pytest.mark.parametrize("changed", range(8))
def test_in_place_change_before_backward_raises(make_mixture, changed):
    m = make_mixture()
    y = routed_lora(*m)
    with torch.no_grad():
        m.leaves[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", [routed_lora, routed_lora_formula])
@pytest.mark.parametrize("second", range(8))
def test_double_backward_is_an_error(make_mixture, function, second):
    m = make_mixture()
    y = function(*m, weight=torch.randn(6, 7, dtype=torch.float64))
    for first in range(8):
        (grad,) = torch.autograd.grad((y**2).sum(), m.leaves[first], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once only"):
            torch.autograd.grad(grad.sum(), m.leaves[second])


def test_a_gradient_penalty_is_never_silently_ignored(make_mixture):
    m = make_mixture()
    (grad,) = torch.autograd.grad(routed_lora(*m).sum(), m.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        (grad.square().sum() + m.x.sum()).backward()


def test_backward_twice_without_retaining_is_torchs_own_error(make_mixture):
    m = make_mixture()
    y = routed_lora(*m).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_the_c_core_is_what_runs(make_mixture, monkeypatch):
    class Broken:
        @staticmethod
        def forward_raw(*args):
            raise ZeroDivisionError("forward")

        @staticmethod
        def backward_raw(*args):
            raise ZeroDivisionError("backward")

        forward_tensors, backward_tensors = forward_raw, backward_raw

    for dtype in DTYPES:
        for tokens in [(2, 5), (7,), (2, 3, 2)]:
            m = make_mixture(dtype=dtype, tokens=tokens)
            y = routed_lora(*m)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "_core", Broken)
                with pytest.raises(ZeroDivisionError, match="forward"):
                    routed_lora(*m)
                with pytest.raises(ZeroDivisionError, match="forward"), torch.no_grad():
                    routed_lora(*m)
                with pytest.raises(ZeroDivisionError, match="backward"):
                    y.sum().backward()


def test_threads_follow_torch_unless_moelora_says(make_mixture, monkeypatch):
    m, given = make_mixture(), []
    core = cpu._core

    class Watched:
        @staticmethod
        def forward_raw(*args):
            given.append(args[12])
            core.forward_raw(*args)

        @staticmethod
        def backward_raw(*args):
            given.append(args[15])
            core.backward_raw(*args)

        @staticmethod
        def forward_tensors(*args):
            given.append(args[-1])
            return core.forward_tensors(*args)

        @staticmethod
        def backward_tensors(*args):
            given.append(args[-1])
            return core.backward_tensors(*args)

    monkeypatch.setattr(cpu, "_core", Watched)
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            routed_lora(*m).sum().backward()
        moelora.set_num_threads(3)
        routed_lora(*m).sum().backward()
    finally:
        torch.set_num_threads(before)
        moelora.set_num_threads(None)
    assert given == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(make_mixture, dtype, top_k):
    m = make_mixture(tokens=(3, 71), d_in=130, d_out=75, ranks=(8, 3, 5), dtype=dtype)
    results = []
    try:
        for n in (1, 2, 3, 1):
            moelora.set_num_threads(n)
            y = routed_lora(*m, top_k=top_k)
            results.append([y, *gradients(y, m.leaves)])
    finally:
        moelora.set_num_threads(None)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_on_another_thread(make_mixture):
    m, other = make_mixture(), make_mixture()
    y = routed_lora(*m).sum()
    worker = threading.Thread(target=y.backward)
    worker.start()
    worker.join()
    other.loop().sum().backward()
    for a, b in zip(m.leaves, other.leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_many_threads_at_once_do_not_disturb_each_other(make_mixture):
    m = make_mixture(tokens=(4, 33), d_in=40, d_out=24)
    expected = [t.clone() for t in gradients(routed_lora(*m), m.leaves)]
    failures = []

    def work():
        for _ in range(20):
            got = gradients(routed_lora(*m), m.leaves)
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                failures.append(got)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
