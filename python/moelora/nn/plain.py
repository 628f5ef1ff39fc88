"""Which tensors C may read, here and now. Importing this tells it what of torch it calls."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from moelora.runtime import HAS_EXT

if HAS_EXT:
    from moelora import _core

    _are_plain = _core.are_plain

    def empty_cpu(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")

    def empty_cuda(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")

    # The same without a dispatch, which is what torch.compile's own code allocates with.
    empty_cpu = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", empty_cpu)
    empty_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", empty_cuda)
    _dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
    if not _core.use_torch(Tensor, torch.nn.Parameter, empty_cpu, empty_cuda, torch.empty_like, F.linear, *_dtypes):
        warnings.warn(
            f"torch {torch.__version__} has no DLPack C exchange API that moelora knows; plain torch is used, which is "
            "slow",
            RuntimeWarning,
            stacklevel=2,
        )

__all__ = ["is_unwatched", "uses_core"]


def uses_core(*tensors: Tensor) -> bool:
    """Whether the C core may read these real tensors by pointer, here and now.

    True for plain dense CPU tensors and parameters while nothing watches or rewrites torch operations (compile, export,
    tracing, torch.func transforms, forward-mode derivatives, dispatch and function modes).
    """
    return is_unwatched() and bool(_are_plain(*tensors))


def is_recorded() -> bool:
    """Whether torch.compile or torch.jit.trace records operations, to run them without this code later."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_unwatched() -> bool:
    """Whether there is a C core, and nothing watches or rewrites torch operations in this thread."""
    if torch.compiler.is_compiling() or not HAS_EXT:
        return False
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    # torch.set_default_device is a function mode, and concerns no operation that the core replaces.
    return not torch._C._len_torch_function_stack() or all(
        type(mode) is DeviceContext for mode in torch.overrides._get_current_function_mode_stack()
    )
