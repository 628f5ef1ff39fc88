"""Where the C core can't be used, `moelora.nn.routed_lora` takes its torch formula and nothing crashes."""

import copy
import shutil

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.distributed.tensor as dtensor
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moelora.nn import autograd, cpu, routed_lora, routed_lora_formula
from moelora.nn.plain import uses_core


@pytest.fixture
def no_core(monkeypatch):
    """The C core may not be entered."""

    class Refusing:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    monkeypatch.setattr(cpu, "_core", Refusing(), raising=False)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, mixture, **kwargs):
        super().__init__()
        self.lora_A = nn.ParameterList([a.detach().clone() for a in mixture.lora_A])
        self.lora_B = nn.ParameterList([b.detach().clone() for b in mixture.lora_B])
        self.scaling, self.kwargs = mixture.scaling, kwargs

    def forward(self, x, routing_weights):
        return routed_lora(x, self.lora_A, self.lora_B, routing_weights, self.scaling, **self.kwargs)


def assert_same_gradients(y, expected, leaves):
    for got, wanted in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)


# ---- which tensors are read by pointer ----


def test_plain_cpu_tensors_and_parameters_use_the_core():
    t = torch.randn(3, 4)
    assert uses_core(t, nn.Parameter(t), t.t(), t.expand(2, 3, 4), t.double(), t > 0)
    with torch.no_grad(), torch.device("meta"), torch.autocast("cpu"):
        assert uses_core(t)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore::DeprecationWarning")
def test_all_others_do_not():
    t = torch.randn(3, 4)
    negated = torch.zeros(3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for other in [t.to("meta"), t.to_sparse(), t.to_sparse_csr(), negated, t.as_subclass(TwoTensor), t.to_mkldnn()]:
        assert not uses_core(t, other)
    for mode in [FakeTensorMode(), FlopCounterMode(display=False), forward_ad.dual_level()]:
        with mode:
            assert not uses_core(t)
    inside = []
    torch.func.vmap(lambda row: inside.append(uses_core(t)) or row)(t)
    torch.jit.trace(lambda row: inside.append(uses_core(t)) or row + 1, t, check_trace=False)
    torch.compile(lambda row: row + int(uses_core(t)), backend="eager", fullgraph=True)
    assert inside == [False, False]
    assert torch.equal(torch.compile(lambda row: row + int(uses_core(row)), backend="eager", fullgraph=True)(t), t)


# ---- compilers and tracers ----


@pytest.mark.parametrize(
    "ranks, base, top_k",
    [((2, 3, 1), "base_output", None), ((2, 3, 1), "weight", 2), ((2, 2, 2), "none", None), ((2, 2, 2), "none", 2)],
    ids=str,
)
def test_compile_keeps_one_graph(make_mixture, base, top_k, ranks):
    def function(x, w, lora_A, lora_B, scaling, given):
        return routed_lora(x, lora_A, lora_B, w, scaling, top_k=top_k, **given)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens, scaling in [((2, 5), 0.5), ((3, 4), 0.75), ((4, 6), [0.5, 1.0, 2.0])]:
        m = make_mixture(tokens=tokens, ranks=ranks)
        given = {
            "none": {},
            "base_output": {"base_output": torch.randn(*tokens, 6, dtype=torch.float64)},
            "weight": {"weight": torch.randn(6, 7, dtype=torch.float64)},
        }[base]
        y = compiled(m.x, m.routing_weights, m.lora_A, m.lora_B, scaling, given)
        expected = routed_lora_formula(m.x, m.lora_A, m.lora_B, m.routing_weights, scaling, top_k=top_k, **given)
        torch.testing.assert_close(y, expected)
        assert_same_gradients(y, expected, m.leaves)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compile_to_machine_code(make_mixture):
    m = make_mixture(dtype=torch.float32)
    y = torch.compile(Layer(m, top_k=2), fullgraph=True)(m.x, m.routing_weights)
    expected = m.loop(top_k=2)
    torch.testing.assert_close(y, expected)
    assert_same_gradients(y, expected, [m.x, m.routing_weights])


def test_compile_with_autocast_and_dropout(make_mixture, no_core):
    m = make_mixture(dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return routed_lora(x, m.lora_A, m.lora_B, w, m.scaling, dropout_p=0.5)

    y = function(m.x, m.routing_weights)
    assert y.dtype == torch.bfloat16
    y.sum().backward()


def test_compiled_double_backward_is_an_error(make_mixture):
    m = make_mixture()
    y = torch.compile(Layer(m), fullgraph=True, backend="aot_eager")(m.x, m.routing_weights)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad,) = torch.autograd.grad(y.square().sum(), m.x, create_graph=True)
        grad.sum().backward()


def test_backward_under_compiled_autograd(make_mixture):
    m = make_mixture()
    y = routed_lora(*m).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    for leaf, wanted in zip(m.leaves, torch.autograd.grad(m.loop().sum(), m.leaves), strict=True):
        torch.testing.assert_close(leaf.grad, wanted)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(make_mixture, strict):
    m, other = make_mixture(grad=False), make_mixture(tokens=(3, 9), grad=False)
    layer = Layer(m, top_k=2)
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("seq", min=2)}
    program = torch.export.export(
        layer,
        (m.x, m.routing_weights),
        dynamic_shapes={"x": dims, "routing_weights": dims},
        strict=strict,
    )
    torch.testing.assert_close(
        program.module()(other.x, other.routing_weights),
        other.replace([other.x, other.routing_weights, *m.lora_A, *m.lora_B]).loop(top_k=2),
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(make_mixture):
    m, other = make_mixture(grad=False), make_mixture(tokens=(2, 9), grad=False)
    traced = torch.jit.trace(Layer(m, top_k=2), (m.x, m.routing_weights))
    torch.testing.assert_close(
        traced(other.x, other.routing_weights),
        other.replace([other.x, other.routing_weights, *m.lora_A, *m.lora_B]).loop(top_k=2),
    )


def test_make_fx_sees_every_operation(make_mixture, no_core):
    m = make_mixture(grad=False)

    def function(x):
        return routed_lora(x, m.lora_A, m.lora_B, m.routing_weights, m.scaling)

    graph = make_fx(function)(m.x)
    torch.testing.assert_close(graph(m.x + 1), m._replace(x=m.x + 1).loop())


# ---- torch.func ----


def test_vmap_over_any_argument(make_mixture, no_core):
    m = make_mixture(tokens=(4, 2, 5), grad=False)

    def mixture(x, w, a):
        return routed_lora(x, [a, *m.lora_A[1:]], m.lora_B, w, m.scaling, top_k=2)

    first = torch.stack([m.lora_A[0] * i for i in range(4)])
    got = torch.func.vmap(mixture)(m.x, m.routing_weights, first)
    expected = torch.stack(
        [m.replace([m.x[i], m.routing_weights[i], first[i], *m.lora_A[1:], *m.lora_B]).loop(top_k=2) for i in range(4)]
    )
    torch.testing.assert_close(got, expected)
    got = torch.func.vmap(mixture, in_dims=(None, None, 0))(m.x[0], m.routing_weights[0, 0, 0], first)
    assert got.shape == (4, 2, 5, 6)


@pytest.mark.parametrize("argument", range(8))
def test_grad_and_jacobians(make_mixture, argument):
    m = make_mixture(tokens=(2, 3), grad=False)

    def function(leaf):
        leaves = list(m.leaves)
        leaves[argument] = leaf
        return routed_lora(*m.replace(leaves))

    def loop(leaf):
        leaves = list(m.leaves)
        leaves[argument] = leaf
        return m.replace(leaves).loop()

    leaf = m.leaves[argument]
    expected = torch.func.jacrev(loop)(leaf)
    torch.testing.assert_close(torch.func.jacrev(function)(leaf), expected)
    torch.testing.assert_close(torch.func.jacfwd(function)(leaf), expected)
    torch.testing.assert_close(
        torch.func.grad(lambda t: function(t).sum())(leaf), torch.func.grad(lambda t: loop(t).sum())(leaf)
    )


def test_gradients_per_sample(make_mixture):
    m = make_mixture(tokens=(4, 5), grad=False)

    def loss(function):
        return lambda a, x, w: function(a, x, w).square().sum()

    core = loss(lambda a, x, w: routed_lora(x, [a, *m.lora_A[1:]], m.lora_B, w, m.scaling))
    loop = loss(lambda a, x, w: m.replace([x, w, a, *m.lora_A[1:], *m.lora_B]).loop())
    got, wanted = (
        torch.func.vmap(torch.func.grad(f), in_dims=(None, 0, 0))(m.lora_A[0], m.x, m.routing_weights)
        for f in (core, loop)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("twice", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
def test_second_derivatives_are_an_error_here_too(make_mixture, twice):
    m = make_mixture(grad=False)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        twice(lambda w: routed_lora(m.x, m.lora_A, m.lora_B, w, m.scaling).square().sum())(m.routing_weights)


def test_forward_mode_derivatives(make_mixture):
    m = make_mixture(grad=False)
    tangent = torch.randn_like(m.x)
    with forward_ad.dual_level():
        y = routed_lora(*m._replace(x=forward_ad.make_dual(m.x, tangent)))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, m._replace(x=tangent).loop())


@pytest.mark.parametrize("function", [routed_lora, routed_lora_formula])
def test_many_gradients_at_once(make_mixture, function):
    m = make_mixture()
    weight = torch.randn(6, 7, dtype=torch.float64)
    y = function(*m, weight=weight, top_k=2)
    seeds = torch.randn(4, *y.shape, dtype=torch.float64)
    got = torch.autograd.grad(y, m.leaves, seeds, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, m.leaves, seed, retain_graph=True) for seed in seeds]
    for grads, expected in zip(got, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(grads, torch.stack(expected))
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(y, m.leaves, seeds, is_grads_batched=True, create_graph=True)


# ---- other tensors ----


def test_meta_tensors_have_the_right_shapes(make_mixture, no_core):
    m = make_mixture(grad=False)
    meta = m.replace([t.to("meta").requires_grad_() for t in m.leaves])
    y = routed_lora(*meta, top_k=2)
    assert y.device.type == "meta" and y.shape == (2, 5, 6)
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in meta.leaves)


def test_fake_tensors(make_mixture, no_core):
    m = make_mixture(grad=False)
    with FakeTensorMode() as mode:
        y = routed_lora(*m.replace([mode.from_tensor(t) for t in m.leaves]))
    assert y.fake_mode is mode and y.shape == (2, 5, 6)


def test_a_subclass_stays_one(make_mixture, no_core):
    class Named(torch.Tensor):
        pass

    m = make_mixture(grad=False)
    y = routed_lora(*m._replace(x=m.x.as_subclass(Named)))
    assert type(y) is Named
    torch.testing.assert_close(y.as_subclass(torch.Tensor), m.loop())
    y = routed_lora(*m._replace(x=TwoTensor(m.x, 2 * m.x)))
    assert type(y) is TwoTensor
    torch.testing.assert_close(y.b, 2 * m.loop())


def test_negated_views_are_read_right(make_mixture):
    m = make_mixture(grad=False)
    x = torch.complex(m.x, -m.x).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(routed_lora(*m._replace(x=x)), m.loop())
    m = make_mixture()
    seed = torch.complex(torch.zeros(2, 5, 6).double(), torch.randn(2, 5, 6).double()).conj().imag
    got, wanted = (torch.autograd.grad(y, m.leaves, seed) for y in (routed_lora(*m), m.loop()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dtensor.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_with_dropout(make_mixture, no_core, mesh):
    m = make_mixture()
    spread = m.replace([dtensor.distribute_tensor(t, mesh, [dtensor.Replicate()]) for t in m.leaves])
    first, second = (routed_lora(*spread, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first.full_tensor(), second.full_tensor())
    (grad,) = torch.autograd.grad(first.full_tensor().sum(), spread.x)
    torch.testing.assert_close((grad * spread.x).sum().full_tensor(), first.full_tensor().sum())  # y is linear in x


@pytest.mark.parametrize("given", ["none", "top_k", "base_output", "weight"])
def test_dtensors(make_mixture, no_core, mesh, given):
    m = make_mixture()

    def distribute(t, dim=None):
        placement = [dtensor.Replicate() if dim is None else dtensor.Shard(dim)]
        return dtensor.distribute_tensor(t.detach(), mesh, placement).requires_grad_(t.requires_grad)

    base, weight = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    spread = m.replace(
        [distribute(m.x, 0), distribute(m.routing_weights, 0)]
        + [distribute(a) for a in m.lora_A]
        + [distribute(b, 0) for b in m.lora_B]
    )
    options = {
        "none": ({}, {}),
        "top_k": ({"top_k": 2}, {"top_k": 2}),
        "base_output": ({"base_output": distribute(base, 0)}, {"base": base}),
        "weight": ({"weight": distribute(weight, 0)}, {"base": F.linear(m.x.detach(), weight)}),
    }
    given, same = options[given]
    y = routed_lora(*spread, **given)
    torch.testing.assert_close(y.full_tensor(), m.loop(**same))
    y.sum().backward()
    for leaf in spread.leaves:
        assert type(leaf.grad) is dtensor.DTensor


# ---- modes that stay on the core ----


@pytest.mark.parametrize("function", [routed_lora, routed_lora_formula])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(make_mixture, function, reentrant):
    m = make_mixture()

    def again(x, w):
        return function(x, m.lora_A, m.lora_B, w, m.scaling)

    y = checkpoint(again, m.x, m.routing_weights, use_reentrant=reentrant)
    y.square().sum().backward()
    for leaf, wanted in zip(m.leaves, torch.autograd.grad(m.loop().square().sum(), m.leaves), strict=True):
        torch.testing.assert_close(leaf.grad, wanted)
    if not reentrant:
        y = checkpoint(again, m.x, m.routing_weights, use_reentrant=False)
        (grad,) = torch.autograd.grad(y.square().sum(), m.x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once only"):
            grad.sum().backward()


@pytest.mark.parametrize("function", [routed_lora, routed_lora_formula])
@pytest.mark.parametrize("base", ["none", "base_output", "weight"])
def test_autocast_takes_x_in_its_dtype_and_gives_what_a_linear_layer_gives(make_mixture, function, base):
    m = make_mixture(dtype=torch.float32)
    weight, bias = torch.randn(6, 7), torch.randn(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = F.linear(m.x, weight, bias)
        given = {"none": {}, "base_output": {"base_output": linear}, "weight": {"weight": weight, "bias": bias}}[base]
        y = function(*m, **given)
    assert y.dtype == linear.dtype == torch.bfloat16
    rounded = m._replace(x=m.x.bfloat16().float())
    expected = rounded.loop(base=0.0 if base == "none" else linear.detach().float())
    torch.testing.assert_close(y, expected.bfloat16())
    y.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in m.leaves)


@pytest.mark.parametrize("function", [routed_lora, routed_lora_formula])
def test_backward_inside_autocast(make_mixture, function):
    m = make_mixture(dtype=torch.float32)
    y = function(*m, weight=torch.randn(6, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in m.leaves)


def test_autocast_leaves_double_alone(make_mixture):
    m = make_mixture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for function in (routed_lora, routed_lora_formula):
            torch.testing.assert_close(function(*m), m.loop())


def test_a_default_device_does_not_move_the_work(make_mixture):
    m = make_mixture()
    with torch.device("meta"):
        y = routed_lora(*m)
    assert y.device.type == "cpu"
    torch.testing.assert_close(y, m.loop())


def test_a_layer_can_be_copied_and_moved(make_mixture):
    m = make_mixture(grad=False)
    layer = copy.deepcopy(Layer(m)).double()
    torch.testing.assert_close(layer(m.x, m.routing_weights), m.loop())


# ---- away from the CPU ----


def test_adapters_are_rounded_away_from_the_cpu_unless_told_otherwise(make_mixture, monkeypatch):
    m = make_mixture(dtype=torch.bfloat16, adapters=torch.float32, grad=False)
    meta = m.replace([t.to("meta") for t in m.leaves])

    def product_dtypes():
        with Products() as seen:
            assert routed_lora(*meta).dtype == torch.bfloat16
        return seen.dtypes

    assert product_dtypes() == {torch.bfloat16}
    monkeypatch.setattr(autograd, "ROUND_ADAPTERS", False)
    assert product_dtypes() == {torch.float32}


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __enter__(self):
        self.dtypes = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in ("mm", "addmm"):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_gpu_tensors_take_the_formula(make_mixture, dtype, tolerance, top_k):
    m = make_mixture(dtype=dtype, adapters=torch.float64 if dtype is torch.float64 else torch.float32)
    exact = m.replace([t.detach().double().requires_grad_() for t in m.leaves])
    gpu = m.replace([t.detach().cuda().requires_grad_() for t in m.leaves])
    y, expected = routed_lora(*gpu, top_k=top_k), exact.loop(top_k=top_k)
    assert y.is_cuda and y.dtype == dtype
    results = zip(
        [y, *torch.autograd.grad(y.sum(), gpu.leaves)],
        [expected, *torch.autograd.grad(expected.sum(), exact.leaves)],
        strict=True,
    )
    for got, wanted in results:
        assert (got.double().cpu() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "n"), [(1, 3), (3, 8), (8, 64), (8, 70)])
def test_experts_that_no_token_uses_are_not_read_and_the_bits_are_the_same(tokens, n, dtype):
    ranks, used = [1 + e % 5 for e in range(n)], torch.arange(n) % 3 == 1
    x = torch.randn(tokens, 33, dtype=dtype)
    lora_A, lora_B = (
        [torch.randn(*s, dtype=dtype) for s in shapes]
        for shapes in zip(*(((r, 33), (21, r)) for r in ranks), strict=True)
    )
    for weights in (torch.rand(tokens, n, dtype=dtype) * used, torch.rand(n, dtype=dtype) * used):
        kept = routed_lora(x.clone().requires_grad_(), lora_A, lora_B, weights.requires_grad_(), 0.5)
        with torch.no_grad():
            assert torch.equal(routed_lora(x, lora_A, lora_B, weights, 0.5), kept)
            broken = [a if e % 3 == 1 or e >= 64 else a + torch.nan for e, a in enumerate(lora_A)]
            assert torch.equal(routed_lora(x, broken, lora_B, weights, 0.5), kept)
            nothing = routed_lora(x, lora_A, lora_B, torch.zeros_like(weights), 0.5)
            assert torch.equal(nothing, torch.zeros_like(kept))
            unread = routed_lora(x, lora_A, lora_B, torch.full_like(weights, torch.nan), 0.5)
            assert unread.isnan().all()
