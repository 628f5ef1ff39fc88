"""The settings of this process (threads, instruction set), what was built and what was found."""

import importlib.util
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

try:
    from moelora import _core
except ImportError as error:
    if os.environ.get("MOELORA_REQUIRE_EXT") == "1":
        raise
    warnings.warn(
        f"moelora's C extension can't be loaded ({error}); plain NumPy and torch are used, which is slow",
        RuntimeWarning,
        stacklevel=2,
    )
    HAS_EXT = False
else:
    HAS_EXT = True

__all__ = [
    "HAS_EXT",
    "get_base_product",
    "get_isa",
    "get_num_threads",
    "open_nvrtc",
    "set_base_product",
    "set_isa",
    "set_num_threads",
    "show_config",
]

_MAX_THREADS = 64  # ML_MAX_THREADS
_num_threads: int | None = None


def set_num_threads(n: int | None) -> None:
    """Set how many threads moelora computes with.

    Results do not depend on the number, to the last bit.

    Parameters
    ----------
    n : int or None
        At least 1; more than 64 are never used. None: follow torch's setting again, or the default where torch
        isn't loaded (``MOELORA_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the CPUs this process may use).

    Raises
    ------
    TypeError
        `n` is neither an int nor None.
    ValueError
        `n` is less than 1.
    """
    global _num_threads
    if n is not None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be a positive int or None, got {type(n).__name__}")
        if n < 1:
            raise ValueError(f"n must be a positive int or None, got {n}")
        n = min(n, _MAX_THREADS)
    if HAS_EXT:
        _core.set_num_threads(n)
    _num_threads = n


def get_num_threads() -> int:
    """Return how many threads moelora computes with.

    Returns
    -------
    int
        What `set_num_threads` set; otherwise ``torch.get_num_threads()`` where torch is loaded; otherwise the default.
        At most 64.
    """
    if _num_threads is not None:
        return _num_threads
    torch_num_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if torch_num_threads is not None:
        return min(int(torch_num_threads()), _MAX_THREADS)
    return _core.get_num_threads() if HAS_EXT else 1


def set_isa(name: str | None) -> None:
    """Choose the instruction set of the kernels, for this process.

    Results of different instruction sets differ by rounding. The environment variable ``MOELORA_ISA`` sets the same
    from outside.

    Parameters
    ----------
    name : str or None
        One of "portable", "avx2", "avx512", "avx512bf16" and "neon", as far as this CPU has it. None: the best one.
        "avx512bf16" is "avx512" with products of bfloat16 adapters in bfloat16, summed in float32; it is the best one
        on AMD's CPUs alone, since on Intel's it was not faster.

    Raises
    ------
    TypeError
        `name` is neither a str nor None.
    ValueError
        `name` is unknown, or this CPU lacks it.
    """
    if HAS_EXT:
        _core.set_isa(name)
    elif name is not None:
        raise ValueError(f"without the C extension there is no instruction set to choose, got {name!r}")


def get_isa() -> str:
    """Return the instruction set in use; "numpy" without the C extension."""
    return _core.get_isa() if HAS_EXT else "numpy"


def set_base_product(name: str | None) -> None:
    """Choose who computes the base product of `moelora.nn.routed_lora` and of routed PEFT layers, for this process.

    That is x W^T, and in the backward g W, where a frozen weight and plain CPU tensors, all of float32 or all of
    float64, are given. Both ways have rounding errors of the same size, but not the same ones. The environment variable
    ``MOELORA_BASE_PRODUCT`` sets the same from outside. NumPy's functions always use moelora's own.

    Parameters
    ----------
    name : {"own", "torch"} or None
        "own": moelora's kernels and the OpenBLAS that it was built with. "torch": ``torch.nn.functional.linear``. None:
        moelora where it is measured to be faster, which depends on the shape, the dtype and the instruction set alone.

    Raises
    ------
    TypeError
        `name` is neither a str nor None.
    ValueError
        `name` is another one.
    """
    if HAS_EXT:
        _core.set_base_product(name)
    elif name not in ("torch", None):
        raise ValueError(f"without the C extension base products are torch's, got {name!r}")


def get_base_product() -> str | None:
    """Return what `set_base_product` set: "own", "torch" or None; "torch" without the C extension."""
    return _core.get_base_product() if HAS_EXT else "torch"


def _base_rule() -> str:
    chosen = get_base_product()
    if chosen is not None:
        return f"{chosen}, whatever the shape"
    product, transposed = _core.base_limits()
    if product == transposed == 2**63 - 1:
        return "own in float32; torch in other dtypes"
    return f"own in float32 for fewer than {product} tokens, in the backward {transposed}; torch for others"


def open_nvrtc() -> tuple[int, int]:
    """Open NVRTC, CUDA's run-time compiler, and return its version.

    One that this process has loaded is taken, else that of NVIDIA's wheels, which torch depends on, else what the
    dynamic loader finds.

    Raises
    ------
    RuntimeError
        There is none, or what it compiles is too young for the driver.
    """
    try:
        driver = _core.cuda_driver()[0] // 1000
    except RuntimeError:
        driver = sys.maxsize  # compiling needs none
    nvidia = importlib.util.find_spec("nvidia")  # a namespace: nothing is imported
    folders = (nvidia and nvidia.submodule_search_locations) or ()
    found = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    versions = {int(path.suffix[1:]): path for path in found if path.suffix[1:].isdigit()}
    _core.set_cuda_places(versions.get(max((v for v in versions if v <= driver), default=0)), None)
    version = _core.cuda_compiler()
    if version[0] > driver:
        raise RuntimeError(f"NVRTC {version[0]}.{version[1]} is too young for a driver of CUDA {driver}")
    return version


def _cuda_config() -> dict[str, Any]:
    if os.environ.get("MOELORA_CUDA") == "0" or not HAS_EXT:
        return {"kernels": "switched off by MOELORA_CUDA=0" if HAS_EXT else "none without the C extension"}
    config: dict[str, Any] = {"cache": _core.cuda_cache()}
    try:
        version, n_gpus = _core.cuda_driver()
        config["driver"] = f"CUDA {version // 1000}.{version % 1000 // 10}"
        config["gpus"] = [_describe_gpu(ordinal) for ordinal in range(n_gpus)]
    except RuntimeError as error:
        config["driver"] = str(error)
    try:
        config["nvrtc"] = "{}.{}".format(*open_nvrtc())
    except RuntimeError as error:
        config["nvrtc"] = str(error)
    return config


def _describe_gpu(ordinal: int) -> dict[str, Any]:
    try:
        major, minor, multiprocessors = _core.cuda_device(ordinal)
    except RuntimeError as error:
        return {"error": str(error)}
    # The rule itself, for some layers: whatever decides, this can't differ from it.
    gpu = major, multiprocessors

    def ways(ranks: int, n_experts: int, top_k: int) -> dict[int, str]:
        layer = 4096, 4096, ranks, n_experts, top_k
        return {
            tokens: " / ".join(_core.cuda_way(*gpu, tokens, *layer, backward) for backward in (False, True))
            for tokens in (1, 64, 256, 1024, 4096, 16384)
        }

    return {
        "compute capability": f"{major}.{minor}",
        "multiprocessors": multiprocessors,
        "ways of a layer of 4096 x 4096, ranks 64, by tokens (forward / backward)": ways(64, 4, 0),
        "the same with the top 2 of 64 experts of rank 16": ways(1024, 64, 2),
    }


@overload
def show_config() -> None: ...
@overload
def show_config(mode: Literal["stdout"]) -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, dict[str, Any]]: ...
def show_config(mode: str = "stdout") -> dict[str, dict[str, Any]] | None:
    """Show what moelora was built with and what it uses on this machine.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it as a dict of dicts.

    Returns
    -------
    dict or None
        None for ``mode="stdout"``.

    Raises
    ------
    ValueError
        `mode` is another one.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    from moelora import __version__

    config: dict[str, dict[str, Any]] = {
        "moelora": {"version": __version__, "extension": _core.__file__ if HAS_EXT else None},
        "instruction set": {"used": get_isa(), "available": list(_core.isa_available()) if HAS_EXT else []},
        "threads": {"number": get_num_threads(), "layer": _core.threading_layer() if HAS_EXT else "none"},
        "base product": {"set": get_base_product(), "rule": _base_rule()},
        "blas": {"name": _core.blas_config() if HAS_EXT else "NumPy's"},
        "cuda": _cuda_config(),
        "python": {"version": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()},
    }
    if mode == "dicts":
        return config
    print(json.dumps(config, indent=2))
    return None
