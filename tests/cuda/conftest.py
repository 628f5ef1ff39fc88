"""NVRTC as a wheel brings it, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moelora import _core, runtime

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc" / "cuda"


@pytest.fixture(scope="session")
def nvrtc():
    """NVRTC's version. Where there is a wheel of it, a missing one is a failure."""
    if sys.platform != "linux":
        pytest.skip("no NVRTC on this system")
    return runtime.open_nvrtc()


@pytest.fixture
def any_source(nvrtc):
    """The arguments of cuda_cubin for some source: its file, values of its options, an architecture."""
    file, options, for_hopper = next(source for source in _core.cuda_sources() if not source[2])
    return file, (0,) * len(options), "sm_90a" if for_hopper else "sm_80"


@pytest.fixture
def run_python():
    """``run_python(code, **env)``: the process, ended, of a new interpreter; None takes a variable away."""

    def run_python(code, **env):
        return start(code, **env).communicate()

    def start(code, **env):
        whole = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
        return subprocess.Popen([sys.executable, "-c", code], text=True, env=whole, stdout=-1, stderr=-1)

    run_python.start = start
    return run_python


@pytest.fixture
def gcc(tmp_path):
    """``gcc(name, *flags)`` compiles, and returns where to."""

    def gcc(name, *flags):
        includes = [f"-I{CSRC}", f"-I{HERE}"]
        command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", *includes, *flags, "-o", tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return gcc


@pytest.fixture
def driver(gcc):
    """``driver(version=, count=, major=, init=)``: the folder of a libcuda like that."""

    def driver(*flags, version=13000, count=2, major=9, init=0):
        values = {"VERSION": version, "COUNT": count, "MAJOR": major, "INIT": init}
        values = [f"-D{name}={value}" for name, value in values.items()]
        return gcc("libcuda.so.1", "-shared", "-fPIC", *values, *flags, HERE / "fake_driver.c").parent

    return driver
