"""Every kernel of a routed layer once, for test_sanitizers.py: python every_kernel.py [way ...].

Inputs come from the CPU, and results go there, so that little but these kernels runs on the GPU.
"""

import sys

import torch

from moelora import _core
from moelora.nn import routed_lora

# tokens, d_in, d_out, ranks, top_k: tiles that are not full, each with a few of the rest's choices
LAYERS = {
    "decode": [(1, 72, 136, (4, 1)), (20, 1032, 264, (16,) * 4), (100, 136, 72, (40, 77)), (70, 136, 8456, (4,))],
    "torch": [(130, 72, 136, (4, 1, 8))],
    "addmm": [(130, 72, 136, (4, 1, 8))],
    "dual": [(200, 264, 136, (16,) * 4), (130, 72, 392, (20, 12, 77, 40)), (140, 776, 392, (24,) * 16)],
    "fused": [(200, 264, 136, (16,) * 4), (300, 136, 264, (20, 77))],
    "shared": [(520, 2056, 2312, (16, 4)), (1930, 2056, 4104, (20, 12, 30))],
    "grouped": [(130, 72, 392, (4, 1, 16, 8), 2), (70, 264, 136, (20, 32) * 50, 3), (200, 136, 264, (64, 7, 40), 1)],
}


def leaf(*shape, dtype, std=1.0):
    return (torch.randn(shape) * std).to(dtype).cuda().requires_grad_()


def run(tokens, d_in, d_out, ranks, top_k, dtype, adapters, weights, p=0.0, need_x=True):
    x = leaf(tokens, d_in, dtype=dtype).requires_grad_(need_x)
    lora_A = [leaf(r, d_in, dtype=adapters, std=d_in**-0.5) for r in ranks]
    lora_B = [leaf(d_out, r, dtype=adapters) for r in ranks]
    own = top_k or weights == torch.float32
    w = leaf(*((tokens,) if own else ()), len(ranks), dtype=weights)
    weight, bias = leaf(d_out, d_in, dtype=dtype).detach(), leaf(d_out, dtype=dtype).detach()
    grad_y = torch.full((tokens, d_out), 2.0**-6, dtype=dtype).cuda()  # sums over tokens stay within float16
    y = routed_lora(x, lora_A, lora_B, w, 2.0, weight=weight, bias=bias, top_k=top_k, dropout_p=p)
    grads = torch.autograd.grad(y, [x][: int(need_x)] + [w, *lora_A, *lora_B], grad_y)
    assert all(t.cpu().isfinite().all() for t in (y.detach(), *grads))


torch.manual_seed(0)
for way in sys.argv[1:] or LAYERS:
    _core.set_cuda_way(way)
    for tokens, d_in, d_out, ranks, *top_k in LAYERS[way]:
        shape = tokens, d_in, d_out, ranks, *(top_k or [None])
        run(*shape, torch.bfloat16, torch.float32, torch.float32)
        run(*shape, torch.float16, torch.float16, torch.bfloat16)
        if way in ("torch", "addmm", "dual"):  # part of x's gradient is a product of cuBLAS
            run(*shape, torch.bfloat16, torch.float32, torch.float32, p=0.5, need_x=way == "torch")
torch.cuda.synchronize()
print("done")
