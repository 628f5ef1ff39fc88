"""Builds ``moelora._core``: the C core, one kernel file per instruction set, the host side of the CUDA kernels with
their sources as text, the Python border and an OpenBLAS.

The environment variable ``MOELORA_BLAS`` says where the base product's BLAS comes from:

``bundled`` (default on Linux)
    the OpenBLAS of the ``scipy-openblas32`` wheel, copied into the package under a name of its own
``system``
    the OpenBLAS that ``pkg-config openblas`` finds; it must take 32-bit integers
``none`` (default elsewhere)
    no BLAS; moelora's own kernels compute the base product
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ARM64 = platform.machine().lower() in ("aarch64", "arm64")

# What a kernel file is compiled with besides CFLAGS; the run-time dispatch enters it only on a CPU that has all of it.
# The tuning: gcc's generic one, since 13, takes fused multiply-adds that follow each other in a sum apart, and does so
# or not depending on the tile, so that the bits of a row depend on its neighbours.
X86_KERNEL_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mtune=haswell"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mtune=haswell"],
    "avx512bf16": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma", "-mtune=haswell"],
}
CFLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread"]

SOURCES = [
    path.as_posix()
    for pattern in ("core/*.c", "core/kernels/*.c", "cuda/*.c", "python/*.c")
    for path in sorted(Path("csrc").glob(pattern))
    if (X86_64 or path.stem not in X86_KERNEL_FLAGS) and (ARM64 or path.stem != "neon")
]

# What NVRTC compiles at run time; no toolkit is needed here.
CUDA_SOURCES = [
    *sorted(Path("csrc/cuda").glob("*.cu")),
    *sorted(Path("csrc/cuda").glob("*.cuh")),
    Path("csrc/cuda/arguments.h"),
]


class BuildExtension(build_ext):
    """Adds the kernels' own flags, the CUDA sources, NumPy's headers and the BLAS."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # an extension left in build/ may have been built with another MOELORA_BLAS

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        in_source = Path(self.get_finalized_command("build_py").get_package_dir("moelora"), "_libs")
        shutil.rmtree(in_source, ignore_errors=True)
        if self._libs().exists():
            shutil.copytree(self._libs(), in_source)

    def _libs(self):
        return Path(self.build_lib, "moelora", "_libs")

    def build_extension(self, ext):
        import numpy

        ext.include_dirs.append(numpy.get_include())
        ext.sources.append(self._embed_cuda_sources())
        shutil.rmtree(self._libs(), ignore_errors=True)
        blas = os.environ.get("MOELORA_BLAS") or ("bundled" if sys.platform == "linux" else "none")
        if blas == "bundled":
            self._link_bundled_openblas(ext)
        elif blas == "system":
            ext.define_macros += [("ML_HAVE_BLAS", "1"), ("ML_BLAS_PREFIX", "")]
            ext.extra_compile_args += _pkg_config("--cflags")
            ext.extra_link_args += _pkg_config("--libs")
        elif blas != "none":
            raise SystemExit(f"MOELORA_BLAS is {blas!r}; it takes 'bundled', 'system' or 'none'")

        compile_one = self.compiler._compile

        def compile_with_kernel_flags(obj, src, extension, cc_args, postargs, pp_opts):
            kernel_flags = X86_KERNEL_FLAGS.get(Path(src).stem, [])
            compile_one(obj, src, extension, cc_args, [*postargs, *kernel_flags], pp_opts)

        self.compiler._compile = compile_with_kernel_flags
        super().build_extension(ext)

    def _embed_cuda_sources(self):
        """Write the CUDA sources down as a C file, which defines ml_cuda_files; return its path."""
        lines = ['#include "program.h"', "const ml_file ml_cuda_files[] = {"]
        for path in CUDA_SOURCES:
            text = ",".join(map(str, [*path.read_bytes(), 0]))
            lines.append(f'    {{"{path.name}", (const unsigned char[]){{{text}}}}},')
        embedded = Path(self.build_temp, "cuda_sources.c")
        embedded.parent.mkdir(parents=True, exist_ok=True)
        embedded.write_text("\n".join([*lines, "    {NULL, NULL},", "};", ""]))
        return embedded.as_posix()

    def _link_bundled_openblas(self, ext):
        """Place a renamed OpenBLAS beside the extension and link with it.

        The dynamic loader knows libraries by SONAME and functions by symbol name. A copy that kept its SONAME would
        be ignored wherever SciPy or another package has loaded its own before; one that kept its symbols would have
        its calls bound to any other OpenBLAS that was loaded with RTLD_GLOBAL. So both are renamed.
        """
        import scipy_openblas32

        wheel = importlib.metadata.distribution("scipy-openblas32")
        original = Path(scipy_openblas32.get_lib_dir(), scipy_openblas32.get_library(fullname=True))
        digest = hashlib.sha256(original.read_bytes()).hexdigest()[:8]
        folder = self._libs()
        folder.mkdir(parents=True)
        library = folder / f"libmoelora_openblas-{wheel.version}-{digest}.so"
        shutil.copyfile(original, library)
        library.chmod(0o755)

        listing = _output("nm", "--dynamic", "--defined-only", "--format=posix", str(library))
        symbols = [line.split()[0] for line in listing.splitlines()]
        renames = Path(self.build_temp, "openblas_symbols.txt")
        renames.parent.mkdir(parents=True, exist_ok=True)
        renames.write_text("".join(f"{name} moelora_{name.removeprefix('scipy_')}\n" for name in symbols))
        _output("patchelf", "--set-soname", library.name, "--rename-dynamic-symbols", str(renames), str(library))
        for text in wheel.files or ():
            if "LICENSE" in text.name:
                shutil.copyfile(text.locate(), folder / f"{text.stem}-openblas.txt")

        ext.define_macros += [("ML_HAVE_BLAS", "1"), ("ML_BLAS_PREFIX", "moelora_")]
        ext.extra_link_args += [str(library), "-Wl,-rpath,$ORIGIN/_libs"]


def _output(*command):
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    except FileNotFoundError:
        raise SystemExit(f"building moelora needs the program {command[0]!r}") from None


def _pkg_config(what):
    return _output("pkg-config", what, "openblas").split()


setup(
    ext_modules=[
        Extension(
            "moelora._core",
            SOURCES,
            depends=[path.as_posix() for path in sorted(Path("csrc").rglob("*.h"))],
            include_dirs=["csrc/core", "csrc/cuda"],
            extra_compile_args=CFLAGS,
            extra_link_args=["-pthread"],
            libraries=["m", "dl"] if sys.platform == "linux" else [],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
