"""Settings of the process, and life without the extension."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import moelora
from moelora import runtime


@pytest.fixture(autouse=True)
def settings_are_restored():
    isa = runtime.get_isa()
    yield
    runtime.set_isa(isa)
    runtime.set_num_threads(None)
    runtime.set_base_product(None)


def run(program, **environment):
    """What a new interpreter prints."""
    env = {**os.environ, **environment}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)


def test_the_number_set_wins_over_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 7))
    assert runtime.get_num_threads() == 7
    runtime.set_num_threads(3)
    assert runtime.get_num_threads() == 3
    runtime.set_num_threads(None)
    assert runtime.get_num_threads() == 7


def test_a_torch_that_is_only_half_imported_is_not_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert runtime.get_num_threads() == runtime._core.get_num_threads()


def test_without_torch_the_environment_decides():
    program = "import moelora; print(moelora.get_num_threads())"
    assert run(program, MOELORA_NUM_THREADS="5", OMP_NUM_THREADS="3").stdout == "5\n"
    assert run(program, MOELORA_NUM_THREADS=None, OMP_NUM_THREADS="3").stdout == "3\n"
    assert int(run(program, MOELORA_NUM_THREADS=None, OMP_NUM_THREADS=None).stdout) >= 1


@pytest.mark.parametrize("n", [0, -1])
def test_there_is_at_least_one_thread(n):
    with pytest.raises(ValueError, match=f"n must be a positive int or None, got {n}"):
        runtime.set_num_threads(n)


@pytest.mark.parametrize("n", [True, 2.0, "2"])
def test_threads_are_counted_in_integers(n):
    with pytest.raises(TypeError, match="n must be a positive int or None, got"):
        runtime.set_num_threads(n)


def test_more_threads_than_64_are_never_used():
    runtime.set_num_threads(10**30)
    assert runtime.get_num_threads() == 64
    y, _ = moelora.functional.routed_lora_forward(np.ones((3, 2)), [np.ones((1, 2))], [np.ones((2, 1))], np.ones(1), 1)
    np.testing.assert_array_equal(y, np.full((3, 2), 2.0))


def test_the_base_product_can_be_chosen():
    assert runtime.get_base_product() is None
    by_shape = runtime.show_config("dicts")["base product"]
    assert by_shape["set"] is None and by_shape["rule"].startswith("own in float32")
    for name in ("own", "torch"):
        runtime.set_base_product(name)
        assert runtime.get_base_product() == name
        assert runtime.show_config("dicts")["base product"] == {"set": name, "rule": f"{name}, whatever the shape"}
    runtime.set_base_product(None)
    assert runtime.show_config("dicts")["base product"] == by_shape


def test_nobody_else_computes_the_base_product():
    for name in ("Own", "blas"):
        with pytest.raises(ValueError, match=f"name must be 'own', 'torch' or None, got '{name}'"):
            runtime.set_base_product(name)
    with pytest.raises(TypeError, match="name must be a str or None, got bool"):
        runtime.set_base_product(True)
    assert runtime.get_base_product() is None


def test_the_environment_chooses_the_base_product():
    program = "import moelora; print(moelora.get_base_product())"
    assert run(program, MOELORA_BASE_PRODUCT="torch").stdout == "torch\n"
    assert run(program, MOELORA_BASE_PRODUCT="").stdout == "None\n"
    wrong = run(program, MOELORA_BASE_PRODUCT="mkl")
    assert wrong.stdout == "None\n"
    assert "RuntimeWarning: MOELORA_BASE_PRODUCT is neither 'own' nor 'torch'" in wrong.stderr


def test_every_instruction_set_can_be_chosen():
    available = runtime._core.isa_available()
    assert available[0] == "portable"
    for name in available:
        runtime.set_isa(name)
        assert runtime.get_isa() == name
    runtime.set_isa(None)
    best = available[-1]
    if best == "avx512bf16" and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        best = "avx512"  # Intel's CPUs run that instruction at half the rate of float32's
    assert runtime.get_isa() == best


def test_an_unknown_instruction_set_is_refused():
    before = runtime.get_isa()
    with pytest.raises(ValueError, match=r"name must be one of \('portable'.*got 'sse9'"):
        runtime.set_isa("sse9")
    with pytest.raises(TypeError, match="name must be a str or None, got int"):
        runtime.set_isa(9)
    assert runtime.get_isa() == before


@pytest.mark.parametrize("name", ["own\0x", "avx2\0", "\0", "\ud800"])
@pytest.mark.parametrize("setting", ["isa", "base_product"])
def test_names_that_c_would_read_otherwise_are_refused(setting, name):
    before = getattr(runtime, f"get_{setting}")()
    with pytest.raises(ValueError, match="name must be a name, got '"):
        getattr(runtime, f"set_{setting}")(name)
    assert getattr(runtime, f"get_{setting}")() == before


SWITCHING = """
import itertools, threading, torch
from moelora import runtime
from moelora.nn import routed_lora

names = itertools.cycle(runtime._core.isa_available())
done = threading.Event()

def switch():
    while not done.wait(0.0001):
        runtime.set_isa(next(names))

x = torch.ones(1100, 64, dtype=torch.bfloat16, requires_grad=True)
lora_A, lora_B = ([torch.ones(*shape, dtype=torch.bfloat16)] * 4 for shape in ((8, 64), (64, 8)))
thread = threading.Thread(target=switch)
thread.start()
try:
    for _ in range(400):
        y = routed_lora(x, lora_A, lora_B, torch.ones(1100, 4), 2.0**-12)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert (y == 0.5).all() and (grad == 0.5).all()
finally:
    done.set()
    thread.join()
print("the same")
"""


def test_the_instruction_set_can_be_chosen_while_another_thread_computes():
    result = run(SWITCHING, MOELORA_REQUIRE_EXT="1")
    assert result.stdout == "the same\n", result.stderr


def test_the_environment_chooses_the_instruction_set():
    program = "import moelora; print(moelora.get_isa())"
    assert run(program, MOELORA_ISA="portable").stdout == "portable\n"
    unknown = run(program, MOELORA_ISA="sse9")
    assert unknown.stdout == run(program, MOELORA_ISA=None).stdout
    assert "RuntimeWarning: MOELORA_ISA names no instruction set of this CPU" in unknown.stderr


def test_show_config_prints_what_it_returns(capsys):
    config = moelora.show_config(mode="dicts")
    assert config["instruction set"]["used"] == runtime.get_isa()
    assert config["moelora"]["version"] == moelora.__version__
    assert config["moelora"]["extension"] == runtime._core.__file__
    assert config["blas"]["name"]
    assert moelora.show_config() is None
    assert json.loads(capsys.readouterr().out) == config


def test_show_config_knows_two_modes():
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'json'"):
        moelora.show_config(mode="json")


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["moelora._core"] = None
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import moelora
    from moelora import functional, reference, runtime
    importlib_again = [moelora.functional, moelora.get_isa]
assert [w.category for w in caught] == [RuntimeWarning], caught
assert "C extension" in str(caught[0].message)
assert not functional.HAS_EXT
x, A, B, w = np.ones((3, 2)), [np.ones((1, 2))], [np.ones((4, 1))], np.ones(1)
y, hidden = functional.routed_lora_forward(x, A, B, w, 0.5)
assert (y == 1).all() and y.shape == (3, 4)
grads = functional.routed_lora_backward(y, x, hidden, A, B, w, 0.5)
assert (grads.x == 2).all()
routing = functional.route(x, top_k=1)
assert functional.route_backward(x, x, routing.indices).shape == x.shape
runtime.set_num_threads(2)
assert runtime.get_num_threads() == 2
runtime.set_num_threads(None)
assert runtime.get_num_threads() == 1
runtime.set_isa(None)
assert runtime.get_isa() == "numpy"
try:
    runtime.set_isa("avx2")
except ValueError:
    pass
else:
    raise AssertionError
assert runtime.show_config(mode="dicts")["moelora"]["extension"] is None
print("done")
"""


def test_without_the_extension_numpy_computes_after_one_warning():
    result = run(WITHOUT_EXTENSION, MOELORA_REQUIRE_EXT=None)
    assert result.stdout == "done\n", result.stderr


def test_the_extension_can_be_required():
    result = run(WITHOUT_EXTENSION, MOELORA_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "ModuleNotFoundError" in result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("first", ["numpy", "torch"])
def test_a_forked_child_computes_the_same_bits_alone(first):
    """The threads of the parent, of either layer, don't exist in its children."""
    program = f"""
import multiprocessing, {first}, numpy, moelora
from moelora.functional import routed_lora_forward
moelora.set_num_threads(2)
x, w, weight = numpy.ones((512, 256)), numpy.ones(2), numpy.ones((256, 256))
lora_A, lora_B = [numpy.ones((8, 256))] * 2, [numpy.ones((256, 8))] * 2
def compute(_=None):
    return routed_lora_forward(x, lora_A, lora_B, w, 1.0, weight=weight)[0].tobytes()
expected = compute()
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(compute, range(2)) == [expected] * 2, compute() == expected)
"""
    if first == "torch":
        pytest.importorskip("torch")
    result = run(program)
    assert result.stdout == "True True\n", result.stderr
