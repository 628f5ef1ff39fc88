"""The C extension. `moelora.functional` documents what its functions do; here are the positions of the arguments."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moelora.reference import Array

# (pointer, strides in elements)
_Tokens: TypeAlias = tuple[int, int, int, int]  # (pointer, batch, seq, col)
_Matrix: TypeAlias = tuple[int, int, int]  # (pointer, row, col)
_Dropout: TypeAlias = tuple[int, Sequence[float]]  # (seed, probabilities of the experts)
_Forward = tuple[Any, Any, tuple[Any, Any] | None]  # y, hidden, factors of what is left to torch

def routed_lora_forward(
    x: Array,
    lora_A: Sequence[Array],
    lora_B: Sequence[Array],
    routing_weights: Array,
    scaling: SupportsFloat | Sequence[SupportsFloat],
    weight: Array | None,
    bias: Array | None,
    top_k: SupportsIndex | None,
    out: Array | None,
    n_threads: int,
    /,
) -> tuple[Array, Array]: ...
def routed_lora_backward(
    grad_y: Array,
    x: Array,
    hidden: Array,
    lora_A: Sequence[Array],
    lora_B: Sequence[Array],
    routing_weights: Array,
    scaling: SupportsFloat | Sequence[SupportsFloat],
    weight: Array | None,
    top_k: SupportsIndex | None,
    need: Iterable[str],
    n_threads: int,
    /,
) -> tuple[Array | None, list[Array] | None, list[Array] | None, Array | None]: ...
def route(
    logits: Array,
    top_k: SupportsIndex | None,
    temperature: SupportsFloat,
    renormalize: bool,
    mask: NDArray[np.bool_] | None,
    n_threads: int,
    /,
) -> tuple[Array, NDArray[np.int64] | None, NDArray[np.int64], Array]: ...
def route_backward(
    grad_weights: Array,
    logits: Array,
    indices: NDArray[np.int64] | None,
    temperature: SupportsFloat,
    renormalize: bool,
    mask: NDArray[np.bool_] | None,
    grad_prob_sums: Array | None,
    n_threads: int,
    /,
) -> Array: ...
def forward_raw(
    dtype: int,
    shape: tuple[int, int, int, int],
    x: _Tokens,
    lora_A: Sequence[_Matrix],
    lora_B: Sequence[_Matrix],
    ranks: Sequence[int],
    routing_weights: _Tokens,
    scaling: Sequence[float],
    base: _Tokens | None,
    y: _Tokens,
    hidden: _Tokens | None,
    top_k: int,
    n_threads: int,
    dropout: _Dropout | None = None,
    /,
) -> None: ...
def backward_raw(
    dtype: int,
    shape: tuple[int, int, int, int],
    x: _Tokens,
    lora_A: Sequence[_Matrix],
    lora_B: Sequence[_Matrix],
    ranks: Sequence[int],
    routing_weights: _Tokens,
    scaling: Sequence[float],
    grad_y: _Tokens,
    hidden: _Tokens | None,
    grad_x: _Tokens | None,
    grad_A: Sequence[_Matrix | None] | None,
    grad_B: Sequence[_Matrix | None] | None,
    grad_w: _Tokens | None,
    top_k: int,
    n_threads: int,
    accumulate: int,
    dropout: _Dropout | None = None,
    /,
) -> None: ...

# Tensors in their plain case: strided CPU memory, all of float32 or of float64; or x, the base and y of bfloat16, where
# adapters, and routing weights, are of bfloat16 or float32. Annotated as Any, since numpy users have no torch.

def use_torch(
    Tensor: type,
    Parameter: type,
    empty: Callable[[Any, Any, Any], Any],
    empty_cuda: Callable[[Any, Any, Any], Any],
    empty_like: Callable[[Any], Any],
    linear: Callable[[Any, Any, Any], Any],
    float32: Any,
    float64: Any,
    bfloat16: Any,
    float16: Any,
    int64: Any,
    /,
) -> bool: ...
def are_plain(*tensors: Any) -> bool: ...
def plain_call(
    x: Any,
    lora_A: Any,
    lora_B: Any,
    routing_weights: Any,
    scaling: Any,
    base_output: Any,
    weight: Any,
    bias: Any,
    /,
) -> tuple[tuple[Any, ...], tuple[float, ...], int, bool] | None: ...
def forward_tensors(
    x: Any,
    adapters: tuple[Any, ...],
    routing_weights: Any,
    scaling: tuple[float, ...],
    base_output: Any,
    weight: Any,
    bias: Any,
    dropout: _Dropout | None,
    total_rank: int,
    top_k: int,
    n_threads: int,
    /,
) -> tuple[Any, Any]: ...
def backward_tensors(
    saved: tuple[Any, ...],
    needs_input_grad: tuple[bool, ...],
    scaling: tuple[float, ...],
    grad_y: Any,
    dropout: _Dropout | None,
    top_k: int,
    n_threads: int,
    /,
) -> tuple[Any, ...] | None: ...

# The same on a GPU: x, the base and y of bfloat16 or float16, adapters of that dtype or of float32, without gaps,
# weights of any of these.

def cuda_call(
    x: Any,
    lora_A: Any,
    lora_B: Any,
    routing_weights: Any,
    scaling: Any,
    base_output: Any,
    weight: Any,
    bias: Any,
    top_k: int,
    record: bool,
    keep_hidden: bool | None,
    /,
) -> tuple[tuple[Any, ...], tuple[float, ...], bool, _Forward | None] | None: ...
def cuda_forward(
    x: Any,
    adapters: tuple[Any, ...],
    routing_weights: Any,
    scaling: tuple[float, ...],
    weight: Any,
    bias: Any,
    dropout: _Dropout | None,
    top_k: int,
    keep_hidden: bool,
    /,
) -> _Forward | None: ...
def cuda_backward(
    saved: tuple[Any, ...],
    needs_input_grad: tuple[bool, ...],
    scaling: tuple[float, ...],
    grad_y: Any,
    grad_x: Any,
    dropout: _Dropout | None,
    top_k: int,
    /,
) -> tuple[tuple[Any, ...], tuple[Any, Any] | None] | None: ...
def cuda_prepare(
    x: Any,
    adapters: tuple[Any, ...],
    routing_weights: Any,
    scaling: tuple[float, ...],
    top_k: int,
    backward: bool,
    dropout: _Dropout | None,
    /,
) -> tuple[Any, Any, Any, Any, Any] | None: ...
def cuda_mix(
    x: Any,
    adapters: tuple[Any, ...],
    routing_weights: Any,
    scaling: tuple[float, ...],
    top_k: int,
    hidden: Any,
    dropout: _Dropout | None,
    workspace: Any,
    /,
) -> None: ...
def cuda_mix_backward(
    grad_y: Any,
    adapters: tuple[Any, ...],
    routing_weights: Any,
    scaling: tuple[float, ...],
    top_k: int,
    hidden: Any,
    grad_w: Any,
    dropout: _Dropout | None,
    workspace: Any,
    /,
) -> None: ...
def cuda_drop_backward(
    grad_y: Any,
    adapters: tuple[Any, ...],
    routing_weights: Any,
    scaling: tuple[float, ...],
    top_k: int,
    x: Any,
    grads_A: tuple[Any, ...] | None,
    grad_x: Any,
    adds: bool,
    dropout: _Dropout,
    workspace: Any,
    /,
) -> None: ...
def set_cuda_way(name: str | None, /) -> None: ...
def cuda_way(
    major: int,
    multiprocessors: int,
    tokens: int,
    d_in: int,
    d_out: int,
    ranks: int,
    n_experts: int,
    top_k: int,
    backward: bool,
    /,
) -> str: ...
def route_tensors(
    logits: Any,
    mask: Any,
    top_k: int | None,
    temperature: float,
    renormalize: bool,
    n_threads: int,
    /,
) -> tuple[Any, Any, Any, Any] | None: ...
def route_backward_tensors(
    grad_weights: Any,
    grad_prob_sums: Any,
    logits: Any,
    mask: Any,
    indices: Any,
    temperature: float,
    renormalize: bool,
    n_threads: int,
    /,
) -> Any: ...
def cuda_route(
    logits: Any, mask: Any, top_k: int | None, temperature: float, renormalize: bool, /
) -> tuple[Any, Any, Any, Any] | None: ...
def cuda_route_backward(
    grad_weights: Any,
    grad_prob_sums: Any,
    kept: Any,
    mask: Any,
    indices: Any,
    temperature: float,
    renormalize: bool,
    dtype: Any,
    /,
) -> Any: ...
def set_num_threads(n: int | None, /) -> None: ...
def get_num_threads() -> int: ...
def set_isa(name: str | None, /) -> None: ...
def get_isa() -> str: ...
def isa_available() -> tuple[str, ...]: ...
def set_base_product(name: str | None, /) -> None: ...
def get_base_product() -> str | None: ...
def base_limits() -> tuple[int, int]: ...
def threading_layer() -> str: ...
def blas_config() -> str: ...

# CUDA. Errors of the driver and of the compiler are RuntimeErrors.

def cuda_sources() -> tuple[tuple[str, tuple[str, ...], bool], ...]: ...  # (file, options, for Hopper alone)
def cuda_compile(source: str, options: tuple[int, ...], arch: str, /) -> tuple[bytes, str | None]: ...  # (cubin, log)
def cuda_cubin(source: str, options: tuple[int, ...], arch: str, /) -> bytes: ...  # from the cache where it is there
def set_cuda_places(nvrtc: str | PathLike[str] | None, cache: str | PathLike[str] | None, /) -> None: ...
def cuda_driver() -> tuple[int, int]: ...  # (1000 major + 10 minor of the CUDA it supports, number of GPUs)
def cuda_compiler() -> tuple[int, int]: ...  # (major, minor) of NVRTC
def cuda_cache() -> str | None: ...
def cuda_device(ordinal: int, /) -> tuple[int, int, int]: ...  # (major, minor, multiprocessors)
