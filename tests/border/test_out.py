"""`out` is written only where that is safe."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided


def refused(call, module, words):
    before = None if call.out is None else call.out.copy()
    with pytest.raises(ValueError, match=words):
        call.forward(module)
    np.testing.assert_array_equal(call.out, before)


def test_read_only_is_refused(call, module):
    call.out = np.zeros((2, 3, 5))
    call.out.flags.writeable = False
    refused(call, module, "out .*(writeable|read-only)")


def test_unaligned_is_refused(call, module):
    call.out = np.zeros(30 * 8 + 1, np.uint8)[1:].view(np.float64).reshape(2, 3, 5)
    refused(call, module, "out must be aligned")


@pytest.mark.parametrize("strides", [(0, 40, 8), (120, 0, 8), (120, 40, 0), (8, 16, 8), (120, 40, 8 * 4), (0, 0, 0)])
def test_overlap_with_itself_is_refused(call, module, strides):
    call.out = as_strided(np.zeros(60), (2, 3, 5), strides)
    refused(call, module, "out must not overlap itself")


@pytest.mark.parametrize("strides", [(-120, -40, -8), (8, 16, 48), (40, 80, 8), (-40, 80, -8)])
def test_permuted_and_reversed_axes_are_no_overlap(call, module, strides):
    buffer = np.zeros(61)
    call.out = as_strided(buffer[30:], (2, 3, 5), strides)
    expected = call.forward(module)[0].copy()
    call.out = None
    np.testing.assert_array_equal(call.forward(module)[0], expected)


def test_a_zero_stride_of_an_axis_of_one_is_no_overlap(call, module):
    call.x, call.routing_weights = call.x[:1], call.routing_weights[:1]
    call.out = as_strided(np.zeros(15), (1, 3, 5), (0, 40, 8))
    assert call.forward(module)[0] is call.out


def overlapping(call, name):
    """Arrays of the shapes of the input called `name` and of out, which have one element in common."""
    index = int(name[-2]) if name.endswith("]") else None
    value = getattr(call, name[:6]) if index is not None else getattr(call, name)
    array = value[index] if index is not None else value
    buffer = np.zeros(array.size + 29)
    buffer[: array.size] = array.ravel()
    shared = buffer[: array.size].reshape(array.shape)
    call.out = buffer[array.size - 1 :].reshape(2, 3, 5)
    if index is None:
        setattr(call, name, shared)
    else:
        value[index] = shared


@pytest.mark.parametrize(
    "name", ["x", "lora_A[0]", "lora_A[1]", "lora_B[0]", "lora_B[1]", "routing_weights", "weight", "bias"]
)
def test_overlap_with_an_input_is_refused(call, module, name):
    overlapping(call, name)
    refused(call, module, "out|" + name.replace("[", r"\["))
    with pytest.raises(ValueError, match=name.replace("[", r"\[").replace("]", r"\]")):
        call.forward(module)


def test_the_input_itself_is_refused(call, module):
    call.x = np.zeros((2, 3, 5))
    call.lora_A = [np.zeros((2, 5))] * 2
    call.weight = call.bias = None
    call.out = call.x
    refused(call, module, "overlap")


def test_memory_that_only_interleaves_is_accepted(call, module):
    expected, _ = call.forward(module)
    buffer = np.zeros((2, 3, 9))
    buffer[..., :4] = call.x
    call.x, call.out = buffer[..., :4], buffer[..., 4:]
    np.testing.assert_array_equal(call.forward(module)[0], expected)


def test_empty_out_overlaps_nothing(call, module):
    call.x, call.routing_weights = call.x[:0], call.routing_weights[:0]
    call.out = np.zeros((0, 3, 5))
    assert call.forward(module)[0] is call.out


def test_a_subclass_is_written_and_returned(call, module, tmp_path):
    expected, _ = call.forward(module)
    call.out = np.memmap(tmp_path / "y", np.float64, "w+", shape=(2, 3, 5))
    assert call.forward(module)[0] is call.out
    np.testing.assert_array_equal(call.out, expected)
