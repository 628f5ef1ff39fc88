"""One build of everything, shared by these tests: a source distribution, a wheel made from it, and where that goes.

Needs the package index and a C compiler, and takes a minute.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, cwd="/", **env):
    """Run a program, with `env` added to the environment, and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {name: str(value) for name, value in env.items()},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{done.args} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def make_venv(folder):
    venv.create(folder, with_pip=True, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def run_program():
    return run


@pytest.fixture(scope="session")
def run_code():
    """``run_code(python, code, **env)``: what code printed in a process of its own, warnings being errors."""

    def run_code(python, code, **env):
        return run(python, "-W", "error::RuntimeWarning", "-c", code, **env)

    return run_code


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
    """The Python of an environment that holds the build requirements and nothing else."""
    python = make_venv(tmp_path_factory.mktemp("builder"))
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    run(python, "-m", "pip", "install", "--quiet", *requires)
    return python


@pytest.fixture(scope="session")
def build(builder):
    """``build(*command, cwd=)`` runs the builder's Python with the builder's programs within reach."""

    def build(*command, cwd):
        return run(builder, *command, cwd=cwd, PATH=f"{builder.parent}{os.pathsep}{os.environ['PATH']}")

    return build


@pytest.fixture(scope="session")
def sdist(build, tmp_path_factory):
    checkout = tmp_path_factory.mktemp("checkout") / "moelora"
    leftovers = shutil.ignore_patterns(".?*", "build", "dist", "*.egg-info", "*.so", "_libs", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=leftovers)
    folder = tmp_path_factory.mktemp("sdist")
    build("-c", f"import setuptools.build_meta; setuptools.build_meta.build_sdist({str(folder)!r})", cwd=checkout)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="session")
def source_tree(sdist, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    shutil.unpack_archive(sdist, folder)
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="session")
def wheel(build, source_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, cwd=source_tree)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def fresh_python(wheel, tmp_path_factory):
    """The Python of an environment into which only the wheel was installed."""
    python = make_venv(tmp_path_factory.mktemp("fresh"))
    run(python, "-m", "pip", "install", "--quiet", wheel)
    return python


@pytest.fixture(scope="session")
def unpacked_wheel(wheel, tmp_path_factory):
    """A folder that, on PYTHONPATH, puts the wheel's moelora beside the packages of the environment under test."""
    folder = tmp_path_factory.mktemp("unpacked")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="session")
def compute():
    """Code that computes with moelora, checks the result and prints facts about the process as JSON."""
    return """
import json, sys
import numpy as np
from moelora import _core, functional

rng = np.random.default_rng(0)
x, weight = rng.normal(size=(300, 70)), rng.normal(size=(90, 70))
lora_A, lora_B = [rng.normal(size=(5, 70)) for _ in range(3)], [rng.normal(size=(90, 5)) for _ in range(3)]
w = rng.random((300, 3))
expected = x @ weight.T + sum(2 * w[:, [e]] * (x @ lora_A[e].T @ lora_B[e].T) for e in range(3))
for dtype, tolerance in (np.float64, 1e-11), (np.float32, 1e-3):
    cast = lambda array: array.astype(dtype)
    y, _ = functional.routed_lora_forward(
        cast(x), [cast(a) for a in lora_A], [cast(b) for b in lora_B], cast(w), 2.0, weight=cast(weight)
    )
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)
with open("/proc/self/maps") as maps:
    mapped = sorted({line.split()[-1] for line in maps if "openblas" in line})
print(json.dumps({"extension": _core.__file__, "blas": _core.blas_config(), "openblas": mapped}))
"""
