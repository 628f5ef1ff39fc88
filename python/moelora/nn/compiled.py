"""Which calls of `routed_lora` stay one operator in compiled and exported code, and the call of that operator.

What is known while code is traced are the tensors' types, dtypes, devices and shapes; nothing here looks at values.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from moelora.nn.cuda import available
from moelora.runtime import HAS_EXT

if TYPE_CHECKING:
    from moelora.nn.arguments import Call

__all__ = ["call_operator", "columns", "is_operator"]

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
_MAX_EXPERTS, _MAX_COLUMNS = 96, 2048  # ML_MAX_EXPERTS and ML_MAX_COLUMNS of csrc/cuda/arguments.h


def columns(ranks: list[int]) -> list[int]:
    """How many columns of hidden each expert has on a GPU: its rank rounded up to 8, the sum of all to 64."""
    widths = [-(-rank // 8) * 8 for rank in ranks]
    total = sum(widths)
    return [*widths[:-1], widths[-1] - total + -(-total // 64) * 64]


def is_operator(call: "Call") -> bool:
    """Whether a call that is being traced is one operator, and not the formula's operations.

    It is where the kernels will most likely run: plain tensors of their dtypes on one device, without dropout, and
    outside torch.func transforms and forward-mode derivatives, which have to see the operations.
    """
    x, factors = call.x, (*call.lora_A, *call.lora_B)
    if not HAS_EXT or x.dim() > 3 or any(call.dropout_p):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    for t in (x, call.routing_weights, call.base_output, call.weight, call.bias, *factors):
        if t is not None and (type(t) not in _PLAIN or t.layout is not torch.strided or t.device != x.device):
            return False
    if x.device.type == "cpu":
        return True
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return (
        all(t.dtype is factors[0].dtype for t in factors)
        and call.routing_weights.dtype is not torch.float64
        and x.shape[-1] % 8 == 0
        and factors[-1].shape[0] % 8 == 0
        and len(call.ranks) <= _MAX_EXPERTS
        and sum(columns(call.ranks)) <= _MAX_COLUMNS
        and available(x.device)
    )


def call_operator(call: "Call") -> Tensor:
    """The operator, with the hidden of the experts only where a backward may want it."""
    keep_hidden = torch.is_grad_enabled() and any(t.requires_grad for t in (call.routing_weights, *call.lora_B))
    y: Tensor = torch.ops.moelora.routed_lora(
        call.x,
        list(call.lora_A),
        list(call.lora_B),
        call.routing_weights,
        list(call.scaling),
        call.base_output,
        call.weight,
        call.bias,
        call.top_k,
        keep_hidden,
    )[0]
    return y
