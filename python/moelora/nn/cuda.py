"""Whether moelora's own kernels can run on a GPU."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moelora import runtime

if runtime.HAS_EXT:
    from moelora import _core

__all__ = ["available", "current_device", "device_of", "on_gpu", "set_way"]

# torch's own, without a look whether CUDA is initialised: who has a tensor there has done that.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_as_it_is = nullcontext()

_known: dict[int, bool] = {}
_warned = False


def on_gpu(x: object) -> bool:
    """Return whether x is a tensor on a device that moelora's CUDA kernels can run on."""
    if not (isinstance(x, torch.Tensor) and x.is_cuda):
        return False
    known = _known.get(x.get_device())
    return available(x.device) if known is None else known


def device_of(t: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the GPU of a tensor is the current one, where new tensors are made."""
    return _as_it_is if t.get_device() == current_device() else torch.cuda.device(t.device)


def available(device: torch.device) -> bool:
    """Return whether moelora's kernels can run on a CUDA device; torch's operations do where they can't.

    The first answer for a device is kept. Why they can't run is said in one RuntimeWarning for the process, but for
    MOELORA_CUDA=0 in the environment, a missing extension, and a torch that is not built for CUDA.
    """
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    known = _known.get(ordinal)
    if known is None:
        known = _known[ordinal] = _look(ordinal)
    return known


# torch.compile asks once, while it traces, and looks for nothing in there. Its decorator for that would import it.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _look(ordinal: int) -> bool:
    global _warned
    if os.environ.get("MOELORA_CUDA") == "0" or not runtime.HAS_EXT or torch.version.cuda is None:
        return False
    try:
        _core.cuda_device(ordinal)
        runtime.open_nvrtc()
    except RuntimeError as error:
        if not _warned:
            _warned = True
            warnings.warn(
                f"moelora's CUDA kernels can't be used, torch's operations are: {error} (MOELORA_CUDA=0 switches the "
                "kernels off without a warning)",
                RuntimeWarning,
                stacklevel=3,
            )
        return False
    return True


def set_way(name: str | None) -> None:
    """Compute every layer on a GPU the same way, where it can be computed so; for measurements and tests.

    Parameters
    ----------
    name : {"fused", "shared", "dual", "grouped", "decode", "addmm", "torch"} or None
        docs/explanation/architecture.md says what they are; "torch" is how GPUs other than Hopper compute all layers.
        None: by shape again, as `moelora.show_config` tells.

    Raises
    ------
    ValueError
        `name` is another one.
    """
    _core.set_cuda_way(name)
