"""The extension as a guest of the interpreter: the GIL, references, memory, other copies of itself."""

import gc
import importlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from moelora import functional, runtime


def big_call():
    """A forward and a backward of some 50 ms each."""
    x = np.ones((4096, 512))
    lora_A, lora_B = [np.ones((64, 512))], [np.ones((512, 64))]
    weights = np.ones(1)
    _, hidden = functional.routed_lora_forward(x, lora_A, lora_B, weights, 1.0)
    return {
        "forward": lambda: functional.routed_lora_forward(x, lora_A, lora_B, weights, 1.0),
        "backward": lambda: functional.routed_lora_backward(x, x, hidden, lora_A, lora_B, weights, 1.0),
    }


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_other_threads_run_during_a_call(direction):
    ticks, stop = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.0002)

    work = big_call()[direction]
    runtime.set_isa("portable")
    runtime.set_num_threads(1)
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        most = 0
        for _ in range(20):  # a loaded machine may keep the other thread waiting for a while
            before = ticks
            work()
            most = max(most, ticks - before)
            if most > 5:
                break
    finally:
        stop.set()
        ticker.join()
        runtime.set_isa(None)
        runtime.set_num_threads(None)
    assert most > 5  # a thread that waits for the GIL gets one turn before the call and one after


def test_calls_from_many_threads_give_the_same_results(call):
    expected_y, expected_hidden = call.forward(functional)
    expected = call.backward(functional)
    wrong = []

    def work():
        for _ in range(200):
            y, hidden = call.forward(functional)
            grads = call.backward(functional)
            if not all(map(np.array_equal, (y, hidden, grads.x), (expected_y, expected_hidden, expected.x))):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def spoiled(call):
    """Calls that fail after more and more of the arguments have been read."""
    bad = np.zeros(3, np.float32)
    for name in ("x", "routing_weights", "weight", "scaling", "top_k", "bias", "out", "grad_y", "hidden", "need"):
        yield {name: bad}
    yield {"lora_A": [call.lora_A[0], bad]}
    yield {"lora_B": [call.lora_B[0], bad]}
    yield {"out": call.x[..., :1] + np.zeros((2, 3, 5), np.float32)}
    unaligned = np.zeros(24 * 8 + 1, np.uint8)[1:].view(np.float64).reshape(2, 3, 4)
    yield {"x": unaligned, "scaling": [1.0]}


def run_everything(call):
    call.forward(functional)
    call.backward(functional)
    for changes in spoiled(call):
        other = type(call)(**{**vars(call), **changes})
        for work in (other.forward, other.backward):
            try:
                work(functional)
            except (TypeError, ValueError):
                continue


def test_nothing_leaks_whether_a_call_succeeds_or_fails(call, leaks_nothing):
    call.lora_A[1] = np.asfortranarray(call.lora_A[1])
    call.out = np.zeros((2, 3, 5))
    watched = [call.x, call.routing_weights, call.weight, call.bias, call.out, call.grad_y, call.hidden]
    watched += [*call.lora_A, *call.lora_B, call.lora_A, call.lora_B, call.scaling, call.need]
    leaks_nothing(lambda: run_everything(call), watched)


def test_results_own_their_memory(call):
    for array in (*call.forward(functional), call.backward(functional).x):
        assert array.base is None
        assert array.flags.c_contiguous and array.flags.writeable


def test_reloading_changes_nothing(call):
    expected, _ = call.forward(functional)
    assert importlib.reload(runtime._core) is runtime._core
    np.testing.assert_array_equal(call.forward(functional)[0], expected)


def test_a_second_copy_has_its_own_state(call, monkeypatch):
    first = runtime._core
    monkeypatch.delitem(sys.modules, "moelora._core")
    second = importlib.import_module("moelora._core")
    assert second is not first
    buffer = np.zeros((2, 3, 9))
    arguments = (call.lora_A, call.lora_B, call.routing_weights, 1.0, None, None, None)
    expected, _ = first.routed_lora_forward(call.x, *arguments, None, 1)
    del sys.modules["moelora._core"]
    buffer[..., :4] = call.x
    y, _ = second.routed_lora_forward(buffer[..., :4], *arguments, buffer[..., 4:], 1)
    np.testing.assert_array_equal(y, expected)
    del second
    gc.collect()
    np.testing.assert_array_equal(first.routed_lora_forward(call.x, *arguments, None, 1)[0], expected)
    monkeypatch.undo()


def test_a_subinterpreter_gets_an_answer_not_a_crash():
    """NumPy itself may refuse to be loaded there: then this import must fail cleanly too."""
    program = """
import sys
try:
    import _interpreters as interpreters  # 3.13
except ImportError:
    import _xxsubinterpreters as interpreters
import moelora.runtime
interpreter = interpreters.create()
try:
    interpreters.run_string(interpreter, "import moelora._core")
except Exception as error:
    print(type(error).__name__)
interpreters.destroy(interpreter)
print("alive")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("alive\n")
