"""NVRTC as a wheel brings it, which needs no GPU."""

import os
import subprocess
import sys

import pytest

from moelora import _core, runtime


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
