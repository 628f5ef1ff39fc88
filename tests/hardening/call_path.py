"""Calls of a few microseconds under callgrind: run by test_call_path.py, with the library of its client requests."""

import ctypes
import gc
import sys

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from moelora import adopt
from moelora.nn import routed_lora

N, D, RANK = 4, 64, 4
REPEATED = 40


def leaf(*shape):
    return nn.Parameter(torch.randn(shape))


def calls():
    """By name: (whether gradients are on, the call)."""
    torch.manual_seed(0)
    x, w, grad = torch.randn(1, D, requires_grad=True), torch.rand(1, N, requires_grad=True), torch.ones(1, D)
    lora_A, lora_B = [leaf(RANK, D) for _ in range(N)], [leaf(D, RANK) for _ in range(N)]
    stacked_A, stacked_B = leaf(N * RANK, D), leaf(D, N * RANK)

    def routed():
        return routed_lora(x, lora_A, lora_B, w, 2.0)

    def stacked():
        hidden = F.linear(x, stacked_A) * (w * 2.0).repeat_interleave(RANK, 1)
        return F.linear(hidden, stacked_B)

    def step(call, leaves):
        def run():
            for tensor in leaves:
                tensor.grad = None
            call().backward(grad)

        return run

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(D, D)

        def forward(self, x):
            return self.projection(x)

    config = LoraConfig(r=RANK, target_modules=["projection"])
    model = get_peft_model(Model(), config, adapter_name="expert_0")
    for i in range(1, N):
        model.add_adapter(f"expert_{i}", config)
    model.base_model.set_adapter([f"expert_{i}" for i in range(N)])
    layer = adopt(model).base_model.model.projection

    return {
        "routed": (False, routed),
        "stacked": (False, stacked),
        "routed forward": (True, routed),
        "stacked forward": (True, stacked),
        "routed step": (True, step(routed, [x, w, *lora_A, *lora_B])),
        "stacked step": (True, step(stacked, [x, w, stacked_A, stacked_B])),
        "layer": (False, lambda: layer(x, routing_weights=w)),
    }


def repeat(call, n):
    for _ in range(n):
        call()


def main():
    requests = ctypes.CDLL(sys.argv[1])
    torch.set_num_threads(1)
    measured = calls()
    gc.disable()
    for with_grad, call in measured.values():
        with torch.set_grad_enabled(with_grad):
            repeat(call, 50)
    requests.start()
    for name, (with_grad, call) in measured.items():
        with torch.set_grad_enabled(with_grad):
            for n in (REPEATED, 2 * REPEATED):
                repeat(call, 5)
                requests.zero()
                repeat(call, n)
                requests.dump(f"{name}: {n}".encode())


if __name__ == "__main__":
    main()
