"""Bad input is refused with an error that names the argument, by the kernels and the twin alike."""

import re

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from moelora import functional

FORWARD_ARRAYS = ["x", "lora_A[1]", "lora_B[1]", "routing_weights", "weight", "bias", "out"]
BACKWARD_ARRAYS = ["grad_y", "x", "hidden", "lora_A[1]", "lora_B[1]", "routing_weights", "weight"]


def replace(call, name, change):
    """Put change(value) in the place of the argument called `name`, which may be one of a list."""
    place = re.fullmatch(r"(\w+)(?:\[(\d)\])?", name)
    if place[2] is None:
        setattr(call, place[1], change(getattr(call, place[1])))
    else:
        arrays = getattr(call, place[1])
        arrays[int(place[2])] = change(arrays[int(place[2])])


def refused(call, module, error, *words, run="both"):
    """The call raises `error`, whose text has all `words`; arrays are as they were."""
    arrays = [a for a in (call.out, call.x, call.hidden, call.routing_weights) if type(a) is np.ndarray]
    before = [a.copy() for a in arrays]
    for name in ("forward", "backward") if run == "both" else (run,):
        with pytest.raises(error) as raised:
            getattr(call, name)(module)
        assert type(raised.value) is error
        for word in words:
            assert word in str(raised.value)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)


WRONG_TYPES = {
    "list": lambda a: a.tolist(),
    "None": lambda a: None,
    "number": lambda a: 1.0,
    "float16": lambda a: a.astype(np.float16),
    "longdouble": lambda a: a.astype(np.longdouble),
    "complex128": lambda a: a.astype(np.complex128),
    "int64": lambda a: a.astype(np.int64),
    "bool": lambda a: a.astype(np.bool_),
    "object": lambda a: a.astype(object),
    "str": lambda a: a.astype(str),
    ">f8": lambda a: a.astype(">f8"),
    "MaskedArray": lambda a: np.ma.masked_array(a),
}


def wrong_types(names):
    """Every wrong type in every place, save where None is a right one."""
    pairs = [(name, kind) for name in names for kind in WRONG_TYPES]
    return [pair for pair in pairs if pair not in (("weight", "None"), ("bias", "None"), ("out", "None"))]


@pytest.mark.parametrize(("name", "kind"), wrong_types(FORWARD_ARRAYS))
def test_forward_takes_only_arrays_of_native_floats(call, module, name, kind):
    call.out = np.zeros((2, 3, 5))
    replace(call, name, WRONG_TYPES[kind])
    refused(call, module, TypeError, f"{name} must be a NumPy array of float32 or float64", run="forward")


@pytest.mark.parametrize(("name", "kind"), wrong_types(BACKWARD_ARRAYS))
def test_backward_takes_only_arrays_of_native_floats(call, module, name, kind):
    replace(call, name, WRONG_TYPES[kind])
    refused(call, module, TypeError, f"{name} must be a NumPy array of float32 or float64", run="backward")


@pytest.mark.parametrize("name", FORWARD_ARRAYS[1:])
def test_forward_takes_one_dtype_throughout(call, module, name):
    call.out = np.zeros((2, 3, 5))
    replace(call, name, lambda a: a.astype(np.float32))
    refused(call, module, TypeError, name, "float64", "got float32", run="forward")


@pytest.mark.parametrize("name", [name for name in BACKWARD_ARRAYS if name != "x"])
def test_backward_takes_one_dtype_throughout(call, module, name):
    replace(call, name, lambda a: a.astype(np.float32))
    refused(call, module, TypeError, name, "float64", "got float32", run="backward")


@pytest.mark.parametrize("subclass", [np.matrix, np.memmap])
def test_other_subclasses_of_ndarray_are_read_as_arrays(call, module, subclass):
    expected, _ = call.forward(module)
    call.lora_A = [a.view(subclass) for a in call.lora_A]
    y, hidden = call.forward(module)
    assert type(y) is type(hidden) is np.ndarray
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("x", (4,), "[T, d_in] or [B, S, d_in]"),
        ("x", (1, 2, 3, 4), "[T, d_in] or [B, S, d_in]"),
        ("x", (), "[T, d_in] or [B, S, d_in]"),
        ("x", (2, 3, 0), "d_in > 0"),
        ("lora_A[0]", (2, 3), "[r > 0, 4], got (2, 3)"),
        ("lora_A[0]", (0, 4), "[r > 0, 4], got (0, 4)"),
        ("lora_A[1]", (4,), "[r > 0, 4], got (4,)"),
        ("lora_B[0]", (0, 2), "[d_out > 0, 2], got (0, 2)"),
        ("lora_B[0]", (5, 3), "[d_out > 0, 2], got (5, 3)"),
        ("lora_B[1]", (6, 2), "[5, 2], got (6, 2)"),
        ("lora_B[1]", (5, 3), "[5, 2], got (5, 3)"),
        ("lora_B[1]", (5,), "[5, 2], got (5,)"),
        ("routing_weights", (), "[2], [2, 2] or [2, 3, 2], got ()"),
        ("routing_weights", (3,), "[2], [2, 2] or [2, 3, 2], got (3,)"),
        ("routing_weights", (3, 2), "[2], [2, 2] or [2, 3, 2], got (3, 2)"),
        ("routing_weights", (1, 2), "[2], [2, 2] or [2, 3, 2], got (1, 2)"),
        ("routing_weights", (2, 1, 2), "[2], [2, 2] or [2, 3, 2], got (2, 1, 2)"),
        ("routing_weights", (2, 3, 3), "[2], [2, 2] or [2, 3, 2], got (2, 3, 3)"),
        ("routing_weights", (1, 2, 3, 2), "[2], [2, 2] or [2, 3, 2], got (1, 2, 3, 2)"),
        ("weight", (4, 5), "[5, 4], got (4, 5)"),
        ("weight", (5,), "[5, 4], got (5,)"),
    ],
)
def test_shapes_must_fit(call, module, name, shape, words):
    replace(call, name, lambda a: np.zeros(shape))
    refused(call, module, ValueError, f"{name} must have shape ", words)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("bias", (4,), "[5], got (4,)"),
        ("bias", (1, 5), "[5], got (1, 5)"),
        ("out", (2, 3, 4), "[2, 3, 5], got (2, 3, 4)"),
    ]
    + [("out", (6, 5), "[2, 3, 5], got (6, 5)")],
)
def test_shapes_of_bias_and_out_must_fit(call, module, name, shape, words):
    replace(call, name, lambda a: np.zeros(shape))
    refused(call, module, ValueError, f"{name} must have shape ", words, run="forward")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("grad_y", (2, 3, 4), "[2, 3, 5], got (2, 3, 4)"),
        ("grad_y", (6, 5), "[2, 3, 5], got (6, 5)"),
        ("hidden", (2, 3, 5), "[2, 3, 4], got (2, 3, 5)"),
        ("hidden", (3, 2, 4), "[2, 3, 4], got (3, 2, 4)"),
    ],
)
def test_shapes_of_grad_y_and_hidden_must_fit(call, module, name, shape, words):
    replace(call, name, lambda a: np.zeros(shape))
    refused(call, module, ValueError, f"{name} must have shape ", words, run="backward")


def test_two_axes_of_x_leave_two_weight_shapes(call, module):
    call.x, call.routing_weights = call.x[0], call.routing_weights[0, :2]
    refused(call, module, ValueError, "routing_weights must have shape [2] or [3, 2], got (2, 2)", run="forward")


def test_there_must_be_an_expert(call, module):
    call.lora_A = call.lora_B = []
    refused(call, module, ValueError, "lora_A must hold at least one array")


def test_every_a_has_its_b(call, module):
    call.lora_B = call.lora_B[:1]
    refused(call, module, ValueError, "lora_B must hold 2 arrays", "got 1")


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [None, 3, {1, 2}, {0: 1}, object()])
def test_experts_come_in_a_sequence(call, module, name, value):
    setattr(call, name, value)
    refused(call, module, TypeError, f"{name} must be a sequence of arrays, got {type(value).__name__}")


def test_experts_may_be_slices_of_one_array(call, module):
    expected, _ = call.forward(module)
    call.lora_A, call.lora_B = np.stack(call.lora_A), tuple(call.lora_B)
    np.testing.assert_array_equal(call.forward(module)[0], expected)


@pytest.mark.parametrize("value", [True, False, np.True_, 1.0, "1", [1], np.array(1.5)])
def test_top_k_is_an_integer(call, module, value):
    call.top_k = value
    refused(call, module, TypeError, "top_k must be None or an integer in [1, 2]")


@pytest.mark.parametrize("value", [0, -1, 3, 10**30, -(10**30), np.int8(0), np.uint64(2**63)])
def test_top_k_is_between_one_and_the_number_of_experts(call, module, value):
    call.top_k = value
    refused(call, module, ValueError, f"top_k must be None or an integer in [1, 2], got {value}")


@pytest.mark.parametrize("value", [1, np.int64(1), np.uint8(1), np.array(1)])
def test_top_k_is_any_integer(call, module, value):
    call.top_k = 1
    expected, _ = call.forward(module)
    call.top_k = value
    np.testing.assert_array_equal(call.forward(module)[0], expected)


@pytest.mark.parametrize(
    "value", ["1", b"1", None, 1j, np.complex64(1), np.array(1j), [1.0, None], [1.0, "2"], [1, 1j]]
)
def test_scaling_is_real(call, module, value):
    call.scaling = value
    refused(call, module, TypeError, "scaling", "real number")


@pytest.mark.parametrize("value", [[], [1.0], [1.0, 1.0, 1.0], np.ones(3)])
def test_there_is_a_scaling_for_each_expert(call, module, value):
    call.scaling = value
    refused(call, module, ValueError, "scaling must be a real number or 2 of them", f"got {len(value)}")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 10**400, [1.0, np.inf], [1.0, np.nan]])
def test_scaling_is_finite(call, module, value):
    call.scaling = value
    refused(call, module, ValueError, "scaling", "must be finite")


def test_scaling_is_finite_in_the_dtype_of_x(call, module):
    for name in ("x", "grad_y", "hidden", "routing_weights", "weight", "bias"):
        setattr(call, name, getattr(call, name).astype(np.float32))
    call.lora_A = [a.astype(np.float32) for a in call.lora_A]
    call.lora_B = [b.astype(np.float32) for b in call.lora_B]
    call.scaling = [1.0, 1e39]
    refused(call, module, ValueError, "scaling[1] must be finite in float32, got 1e+39")


def test_bias_needs_weight(call, module):
    call.weight = None
    refused(call, module, ValueError, "bias", "weight", run="forward")


@pytest.mark.parametrize("need", [("x", "y"), ["lora_a"], {"weight"}, (1,)])
def test_need_names_gradients(call, module, need):
    call.need = need
    refused(call, module, ValueError, "need", repr([name for name in need if name != "x"][0]), run="backward")


@pytest.mark.parametrize("need", ["x", "lora_A", None, 1])
def test_need_is_a_collection(call, module, need):
    call.need = need
    refused(call, module, TypeError, "need", type(need).__name__, run="backward")


def test_an_error_from_a_number_reaches_the_caller(call, module):
    class Broken:
        def __float__(self):
            raise ZeroDivisionError("broken")

        __index__ = __float__

    call.scaling = [1.0, Broken()]
    refused(call, module, ZeroDivisionError, "broken")
    call.scaling, call.top_k = 1.0, Broken()
    refused(call, module, ZeroDivisionError, "broken")


def test_sizes_that_overflow_are_refused(call):
    """Zero strides make arrays of any size; their products are another matter."""
    many = 2**40
    call.x = as_strided(call.x, (many, 4), (0, 8))
    call.routing_weights = np.ones(2)
    call.lora_A = [np.ones((1, 4))] * 2
    call.lora_B = [as_strided(np.ones(1), (many, 1), (0, 0))] * 2
    call.weight = call.bias = None
    with pytest.raises(ValueError, match="y would be too large"):
        call.forward(functional)
    call.grad_y = call.hidden = as_strided(np.ones(1), (many, 2), (0, 0))
    with pytest.raises(ValueError, match="y would be too large"):
        call.backward(functional)


def test_ranks_that_overflow_are_refused(call):
    many = 2**39
    call.x = as_strided(call.x, (many, 4), (0, 8))
    call.routing_weights = np.ones(2)
    call.lora_A = [as_strided(np.ones(1), (many, 4), (0, 0))] * 2
    call.lora_B = [as_strided(np.ones(1), (1, many), (0, 0))] * 2
    call.weight = call.bias = None
    with pytest.raises(ValueError, match="hidden would be too large"):
        call.forward(functional)


@pytest.mark.parametrize("n", [10**30, -(10**30)])
def test_integers_beyond_64_bits_are_refused_by_name(n):
    with pytest.raises(ValueError, match="n_threads must fit into 64 bits, got"):
        functional._core.set_num_threads(n)


def test_too_few_arguments_are_refused():
    with pytest.raises(TypeError, match="routed_lora_forward takes 10 arguments, got 0"):
        functional._core.routed_lora_forward()
    with pytest.raises(TypeError, match="backward_raw takes 17 arguments, got 1"):
        functional._core.backward_raw(1)


def test_errors_spell_out_as_many_axes_as_arrays_have(module):
    logits = np.zeros((1,) * 31 + (2,))
    with pytest.raises(ValueError, match=r"grad_weights must have shape [\[(](1, ){31}2[\])], got \(2,\)"):
        module.route_backward(np.zeros(2), logits, None)
