"""routed_lora as an operator: what compiled and exported code makes of it, with eager's results and gradients."""

import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.library import opcheck

from moelora.nn import ops, routed_lora
from moelora.nn.compiled import columns

OPERATOR = torch.ops.moelora.routed_lora
BACKWARD = torch.ops.moelora.routed_lora_backward
BASES = ["none", "base_output", "weight"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bases(mixture, kind):
    """The base as keyword arguments of routed_lora."""
    generator, d_out = torch.Generator().manual_seed(1), mixture.lora_B[0].shape[0]
    if kind == "none":
        return {}
    if kind == "base_output":
        shape = (*mixture.x.shape[:-1], d_out)
        return {"base_output": torch.randn(shape, generator=generator).to(mixture.x.dtype).requires_grad_()}
    weight = torch.randn(d_out, mixture.x.shape[-1], generator=generator).to(mixture.x.dtype)
    return {"weight": weight, "bias": weight[:, 0].clone()}


def operands(mixture, base, top_k=None, keep_hidden=True):
    frozen = [base.get(name) for name in ("base_output", "weight", "bias")]
    return (*mixture[:1], mixture.lora_A, mixture.lora_B, *mixture[3:], *frozen, top_k, keep_hidden)


def gradients(y, leaves):
    return torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))


def assert_as_eager(call, mixture, base, tolerance=None, **options):
    tolerance = tolerance or {}
    leaves = [*mixture.leaves, *(t for t in base.values() if t.requires_grad)]
    got, expected = (f(*mixture, **base, **options) for f in (call, routed_lora))
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves), **tolerance)


def operators_of(graph):
    return [str(node.target) for node in graph.graph.nodes if "moelora" in str(node.target)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("shape", "top_k"),
    [
        ({}, 2),
        ({"dtype": torch.float32, "weights": ()}, None),
        ({"dtype": torch.bfloat16, "adapters": torch.float32, "weights": (2,)}, 1),
        ({"dtype": torch.float16, "tokens": (5,)}, None),
        ({"dtype": torch.float32, "tokens": (2, 0)}, 2),
        ({"tokens": (1,), "d_in": 1, "d_out": 1, "ranks": (1,)}, None),
    ],
)
def test_the_operator_keeps_what_torch_asks_of_operators(shape, top_k, base, make_mixture):
    mixture = make_mixture(**shape)
    opcheck(OPERATOR, operands(mixture, bases(mixture, base), top_k))
    opcheck(OPERATOR, operands(make_mixture(**shape, grad=False), {}, top_k, keep_hidden=False))


@pytest.mark.parametrize("needed", ["all", "x", "routing_weights", "lora_A", "lora_B"])
def test_the_backward_operator_keeps_what_torch_asks_of_operators(needed, make_mixture):
    mixture = make_mixture(grad=False, weights=(2,))
    y, hidden = OPERATOR(*operands(mixture, {}))
    names = ["x", "routing_weights", *["lora_A"] * 3, *["lora_B"] * 3]
    need = [needed in ("all", name) for name in names]
    rest = (mixture.lora_A, mixture.lora_B, mixture.routing_weights, mixture.scaling, None, 2, need)
    assert len(BACKWARD(y, mixture.x, hidden, *rest)) == sum(need)
    opcheck(BACKWARD, (y, mixture.x, hidden, *rest))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("weights", [(), (2,), (2, 5)])
def test_without_kernels_the_operator_computes_the_same(weights, base, make_mixture, monkeypatch):
    mixture = make_mixture(weights=weights)
    given = bases(mixture, base)
    leaves = [*mixture.leaves, *(t for t in given.values() if t.requires_grad)]
    y, hidden = OPERATOR(*operands(mixture, given, 2))
    expected = gradients(y, leaves)
    monkeypatch.setattr(ops, "is_unwatched", lambda: False)
    formula = OPERATOR(*operands(mixture, given, 2))
    torch.testing.assert_close(formula, (y, hidden))
    torch.testing.assert_close(gradients(formula[0], leaves), expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [{}, {"dtype": torch.float32, "weights": ()}, {"tokens": (7,), "ranks": (9, 1)}])
def test_compiled_code_has_one_operator_and_eager_gradients(shape, base, make_mixture):
    mixture = make_mixture(**shape)
    graphs = []

    def backend(graph, inputs):
        graphs.append(operators_of(graph))
        return graph

    assert_as_eager(torch.compile(routed_lora, backend=backend, fullgraph=True), mixture, bases(mixture, base), top_k=2)
    assert graphs == [["moelora.routed_lora"]]
    assert_as_eager(torch.compile(routed_lora, backend="aot_eager", fullgraph=True), mixture, bases(mixture, base))


def test_compiled_code_is_left_with_the_operators_that_compute(make_mixture):
    """The one that autograd sees would cost each call a second way through the dispatcher."""
    mixture, graphs = make_mixture(), []

    def compiler(graph, inputs):
        graphs.append(operators_of(graph))
        return make_boxed_func(graph)

    compiled = torch.compile(routed_lora, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    assert_as_eager(compiled, mixture, {}, top_k=2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*mixture, top_k=2), routed_lora(*mixture, top_k=2))
    forward = ["moelora.routed_lora_forward.default"]
    assert graphs == [forward, ["moelora.routed_lora_backward.default"], forward]


def test_sizes_that_vary_compile_once(make_mixture):
    counters.clear()
    compiled = torch.compile(routed_lora, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in [(10, 11), (12, 13), (14, 17)]:  # a size that another axis has, too, would be taken for the same
        mixture = make_mixture(tokens=tokens)
        assert_as_eager(compiled, mixture, bases(mixture, "weight"), top_k=2)
    assert counters["stats"]["unique_graphs"] == 1


def test_only_what_needs_a_gradient_is_kept(make_mixture):
    mixture = make_mixture(tokens=(5,))
    kept = {}
    for name, trained in {"x": [mixture.x], "A": mixture.lora_A, "B": mixture.lora_B}.items():
        for leaf in mixture.leaves:
            leaf.requires_grad_(any(leaf is t for t in trained))
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=packed: to.append(t) or t, lambda t: t):
            OPERATOR(*operands(mixture, {}))
        wide = [t for t in packed if t.shape == (5, 6)]
        kept[name] = any(t.data_ptr() == mixture.x.data_ptr() for t in packed), len(wide)
    assert kept == {"x": (False, 0), "A": (True, 0), "B": (False, 1)}


def test_a_gradient_that_needs_hidden_is_refused_without_it(make_mixture):
    with pytest.raises(RuntimeError, match="keep_hidden=True"):
        OPERATOR(*operands(make_mixture(), {}, keep_hidden=False))


def test_dropout_and_function_transforms_keep_the_formula(make_mixture):
    mixture = make_mixture(grad=False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(operators_of(graph))
        return graph

    def run(f, *args):
        return torch.compile(f, backend=backend, fullgraph=True)(*args)

    run(lambda: routed_lora(*mixture, dropout_p=0.5))
    x, A, B, w, scaling = mixture

    def per_sequence(x, w):
        return routed_lora(x, A, B, w, scaling)

    torch.testing.assert_close(run(torch.vmap(per_sequence), x, w), routed_lora(*mixture))
    torch.testing.assert_close(
        run(torch.func.grad(lambda x: per_sequence(x, w).sum()), x),
        torch.autograd.grad(per_sequence(x.requires_grad_(), w).sum(), x)[0],
    )
    assert graphs == [[], [], []]


def test_differentiating_twice_is_refused(make_mixture):
    mixture = make_mixture()
    for call in (lambda *args: OPERATOR(*operands(mixture, {}))[0], torch.compile(routed_lora, backend="eager")):
        (grad,) = torch.autograd.grad(call(*mixture).sum(), mixture.x, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once only"):
            grad.sum().backward()


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_runs(strict, make_mixture, tmp_path):
    mixture = make_mixture(dtype=torch.float32)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = torch.nn.ParameterList(mixture.lora_A)
            self.lora_B = torch.nn.ParameterList(mixture.lora_B)

        def forward(self, x, routing_weights):
            return routed_lora(x, self.lora_A, self.lora_B, routing_weights, mixture.scaling, top_k=2)

    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(
        Layer(),
        (mixture.x.detach(), mixture.routing_weights.detach()),
        dynamic_shapes=({1: tokens}, {1: tokens}),
        strict=strict,
    )
    assert operators_of(program.graph_module) == ["moelora.routed_lora.default"]
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    other = make_mixture(tokens=(2, 9), dtype=torch.float32)
    expected = routed_lora(other.x, mixture.lora_A, mixture.lora_B, other.routing_weights, mixture.scaling, top_k=2)
    torch.testing.assert_close(loaded(other.x, other.routing_weights), expected)
    weights = other.routing_weights.requires_grad_()
    grads = gradients(loaded(other.x, weights), [other.x, weights]), gradients(expected, [other.x, weights])
    torch.testing.assert_close(*grads)
    inference = program.run_decompositions()
    assert operators_of(inference.graph_module) == ["moelora.routed_lora_forward.default"]
    with torch.no_grad():
        torch.testing.assert_close(inference.module()(other.x, weights), expected)


@pytest.mark.parametrize("ranks", [[1], [8, 8], [9, 1, 60], [64], [63, 65]])
def test_columns_on_a_gpu(ranks):
    widths = columns(ranks)
    assert sum(widths) % 64 == 0 and sum(widths) - sum(ranks) < 64 + 8 * len(ranks)
    assert all(width >= rank and width % 8 == 0 for width, rank in zip(widths, ranks, strict=True))
    assert all(width - rank < 8 for width, rank in zip(widths[:-1], ranks[:-1], strict=True))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.slow
def test_inductor(make_mixture):
    with fresh_cache():
        for shape in ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "adapters": torch.float32, "weights": (2,)}):
            mixture = make_mixture(**shape)
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if mixture.x.dtype is torch.bfloat16 else {}
            compiled = torch.compile(routed_lora, fullgraph=True)
            assert_as_eager(compiled, mixture, bases(mixture, "weight"), tolerance, top_k=2)
