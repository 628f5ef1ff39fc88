"""What `moelora.nn.routed_lora` refuses: the error names the argument and what it takes."""

import math

import numpy as np
import pytest
import torch

from moelora.nn import cpu, plain, routed_lora, routed_lora_formula


@pytest.fixture(params=[routed_lora, routed_lora_formula], ids=["core", "formula"])
def call(request, make_mixture):
    """Call with a valid mixture, in which the given arguments are replaced."""

    def call(**replaced):
        arguments = make_mixture(grad=False)._asdict() | replaced
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        try:
            return request.param(**arguments)
        finally:
            for name, value in before.items():
                assert value.is_meta or value.is_sparse or torch.equal(arguments[name], value)

    return call


def tensor(*shape, dtype=torch.float64, **kwargs):
    return torch.ones(shape, dtype=dtype, **kwargs)


A, B = [tensor(2, 7), tensor(3, 7), tensor(1, 7)], [tensor(6, 2), tensor(6, 3), tensor(6, 1)]


def test_what_the_others_start_from_is_valid(call):
    assert call().shape == (2, 5, 6)
    assert call(lora_A=A, lora_B=tuple(B), scaling=2).shape == (2, 5, 6)
    assert call(lora_A=torch.nn.ParameterList(A), scaling=(1, 2.0, 3)).shape == (2, 5, 6)


@pytest.mark.parametrize(
    "name, value, names",
    [
        ("x", [[1.0] * 7], "x must be a torch.Tensor, got list"),
        ("x", torch.ones(2, 5, 7).numpy(), "x must be a torch.Tensor, got ndarray"),
        ("x", tensor(2, 5, 7, dtype=torch.int64), "x must be of dtype .*got torch.int64"),
        ("x", tensor(2, 5, 7, dtype=torch.complex64), "x must be of dtype .*got torch.complex64"),
        ("lora_A", tensor(3, 2, 7), "lora_A must be a sequence .*got Tensor"),
        ("lora_B", 1.0, "lora_B must be a sequence .*got float"),
        ("lora_A", [A[0], None, A[2]], r"lora_A\[1\] must be a torch.Tensor, got NoneType"),
        ("lora_A", [A[0], A[1].to(torch.float8_e5m2), A[2]], r"lora_A\[1\] must be of dtype .*got torch.float8"),
        ("lora_B", [B[0], B[1], B[2] * 1j], r"lora_B\[2\] must be of dtype .*float64.*got torch.complex128"),
        ("lora_B", [B[0], B[1].long(), B[2]], r"lora_B\[1\] must be of dtype .*got torch.int64"),
        ("routing_weights", [1.0, 0.0, 0.0], "routing_weights must be a torch.Tensor, got list"),
        ("routing_weights", tensor(3, dtype=torch.complex64), "routing_weights must be of dtype .*got torch.complex64"),
        ("routing_weights", tensor(3).to(torch.float8_e5m2), "routing_weights must be of dtype .*got torch.float8"),
        ("scaling", "1", "scaling must be a real number"),
        ("scaling", None, "scaling must be a real number"),
        ("scaling", np.array(1.0), "scaling must be a real number"),
        ("scaling", [1.0, None, 2.0], "scaling must be a real number"),
        ("scaling", 1j, "scaling must be a real number"),
        ("scaling", tensor(3), "scaling must be a real number"),
        ("base_output", [[0.0]], "base_output must be a torch.Tensor, got list"),
        ("base_output", tensor(2, 5, 6, dtype=torch.float32), "base_output must be of dtype torch.float64, got"),
        ("weight", [[0.0]], "weight must be a torch.Tensor, got list"),
        ("weight", tensor(6, 7, dtype=torch.float32), "weight must be of dtype torch.float64, got torch.float32"),
        ("top_k", 1.5, "top_k must be an integer or None, got float"),
        ("top_k", True, "top_k must be an integer or None, got bool"),
        ("dropout_p", "0.1", "dropout_p must be a real number"),
        ("x", tensor(2, 5, 7).to_sparse(), "x must be a dense tensor, got torch.sparse_coo"),
        ("lora_A", [A[0], A[1].to_sparse(), A[2]], r"lora_A\[1\] must be a dense tensor"),
        ("routing_weights", tensor(3).to_sparse(), "routing_weights must be a dense tensor"),
    ],
)
def test_wrong_types(call, name, value, names):
    with pytest.raises(TypeError, match=names):
        call(**{name: value})


@pytest.mark.parametrize(
    "name, value, names",
    [
        ("x", tensor(7), r"x must have shape .*got \(7,\)"),
        ("x", tensor(), r"x must have shape .*got \(\)"),
        ("x", tensor(2, 5, 0), r"x must have shape .*d_in > 0, got \(2, 5, 0\)"),
        ("x", tensor(2, 5, 8), r"lora_A\[0\] must have shape \[rank, 8\].*got \(2, 7\)"),
        ("lora_A", [], "lora_A and lora_B must hold one tensor per expert, got 0 and 3"),
        ("lora_A", A[:2], "lora_A and lora_B must hold one tensor per expert, got 2 and 3"),
        ("lora_A", [A[0], tensor(3, 7, 1), A[2]], r"lora_A\[1\] must have shape .*got \(3, 7, 1\)"),
        ("lora_A", [A[0], tensor(3, 6), A[2]], r"lora_A\[1\] must have shape .*got \(3, 6\)"),
        ("lora_A", [A[0], A[1], tensor(0, 7)], r"lora_A\[2\] must have shape .*rank > 0, got \(0, 7\)"),
        ("lora_A", [A[0], A[0], A[2]], r"lora_B\[1\] must have shape \[6, 2\], got \(6, 3\)"),
        ("lora_B", [tensor(0, 2), *B[1:]], r"lora_B\[0\] must have shape \[d_out > 0, 2\], got \(0, 2\)"),
        ("lora_B", [B[0], tensor(5, 3), B[2]], r"lora_B\[1\] must have shape \[6, 3\], got \(5, 3\)"),
        ("routing_weights", tensor(), r"routing_weights must have shape .*got \(\)"),
        ("routing_weights", tensor(2), r"routing_weights must have shape .*3 experts.*got \(2,\)"),
        ("routing_weights", tensor(5, 3), r"routing_weights must have shape .*\(2, 3\).*got \(5, 3\)"),
        ("routing_weights", tensor(1, 3), r"routing_weights must have shape .*got \(1, 3\)"),
        ("routing_weights", tensor(2, 5, 4), r"routing_weights must have shape .*got \(2, 5, 4\)"),
        ("routing_weights", tensor(1, 1, 3), r"routing_weights must have shape .*got \(1, 1, 3\)"),
        ("routing_weights", tensor(2, 5, 1, 3), r"routing_weights must have shape .*got \(2, 5, 1, 3\)"),
        ("scaling", [1.0, 2.0], "scaling must be .*3 of them, got 2"),
        ("scaling", math.nan, "scaling must be finite, got nan"),
        ("scaling", 10**400, "scaling must be finite, got an integer beyond every float"),
        ("scaling", [1.0, math.inf, 1.0], "scaling must be finite"),
        ("base_output", tensor(2, 5, 7), r"base_output must have shape \(2, 5, 6\), got \(2, 5, 7\)"),
        ("base_output", tensor(6), r"base_output must have shape \(2, 5, 6\), got \(6,\)"),
        ("weight", tensor(7, 6), r"weight must have shape \(6, 7\), got \(7, 6\)"),
        ("weight", tensor(6, 7, requires_grad=True), "weight must not require grad"),
        ("bias", tensor(6), "bias needs weight"),
        ("top_k", 0, r"top_k must lie in \[1, 3\].*got 0"),
        ("top_k", 4, r"top_k must lie in \[1, 3\].*got 4"),
        ("dropout_p", -0.1, r"dropout_p must lie in \[0, 1\], got -0.1"),
        ("dropout_p", [0.0, 0.5, 1.5], r"dropout_p must lie in \[0, 1\]"),
        ("dropout_p", math.nan, "dropout_p must be finite"),
        ("lora_A", [A[0], A[1].to("meta"), A[2]], r"lora_A\[1\] must be on cpu as x is, got meta"),
        ("lora_B", [B[0].to("meta"), *B[1:]], r"lora_B\[0\] must be on cpu as x is, got meta"),
        ("routing_weights", tensor(3, device="meta"), "routing_weights must be on cpu as x is, got meta"),
        ("base_output", tensor(2, 5, 6, device="meta"), "base_output must be on cpu as x is, got meta"),
        ("weight", tensor(6, 7, device="meta"), "weight must be on cpu as x is, got meta"),
    ],
)
def test_wrong_values(call, name, value, names):
    with pytest.raises(ValueError, match=names):
        call(**{name: value})


def test_base_arguments_that_exclude_each_other(call):
    with pytest.raises(ValueError, match="base_output and weight can't be given together"):
        call(base_output=tensor(2, 5, 6), weight=tensor(6, 7))
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(7,\)"):
        call(weight=tensor(6, 7), bias=tensor(7))
    with pytest.raises(ValueError, match="bias must not require grad"):
        call(weight=tensor(6, 7), bias=tensor(6, requires_grad=True))
    with pytest.raises(TypeError, match="bias must be of dtype torch.float64, got torch.float32"):
        call(weight=tensor(6, 7), bias=tensor(6, dtype=torch.float32))


def test_one_mixture_per_sequence_needs_sequences(make_mixture):
    m = make_mixture(tokens=(2, 2, 5), grad=False)
    with pytest.raises(ValueError, match=r"routing_weights must have shape \(3,\) or \(2, 2, 5, 3\)"):
        routed_lora(m.x, m.lora_A, m.lora_B, tensor(2, 3), 1.0)


def test_a_tensor_whose_memory_was_freed_is_refused(make_mixture):
    m = make_mixture(grad=False)
    m.lora_A[1].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="missing"):
        routed_lora(*m)


def test_without_the_extension_the_formula_runs(make_mixture, monkeypatch):
    monkeypatch.setattr(plain, "HAS_EXT", False)
    monkeypatch.delattr(cpu, "_core", raising=False)
    m = make_mixture()
    y = routed_lora(*m)
    torch.testing.assert_close(y, m.loop())
    y.sum().backward()


def test_scaling_is_finite_in_the_dtype_of_the_sums(make_mixture):
    m = make_mixture(grad=False)
    assert routed_lora(*m[:4], 1e39).isfinite().all()
    for dtype in (torch.float32, torch.bfloat16):
        narrow = [m.x.to(dtype), [a.to(dtype) for a in m.lora_A], [b.to(dtype) for b in m.lora_B], m.routing_weights]
        for scaling in (-1e39, [1.0, 1e39, 1.0]):
            with pytest.raises(ValueError, match="scaling must be finite in float32, got .*1e\\+39"):
                routed_lora(*narrow, scaling)
