"""The code of GPUs before Hopper, run on this one: PTX for capability 8.0 stands in the cache for what was compiled."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moelora import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8,
        reason="needs a GPU of capability 8.0",
    ),
]

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"

# Layers of experts of one, two and four blocks of 8 columns, without dropout and with; all that comes out of them.
PROGRAM = """
import sys, torch
from moelora.nn import cuda, routed_lora

cuda.set_way("torch")
torch.manual_seed(0)

def leaf(*shape, dtype):
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype).cuda().requires_grad_()

results = []
for ranks, p, dtype in (
    ((4, 8), 0.0, torch.bfloat16),
    ((4, 8), 0.5, torch.bfloat16),
    ((16, 3), 0.25, torch.float16),
    ((20, 77), (0.1, 0.9), torch.bfloat16),
):
    x, weight = leaf(130, 264, dtype=dtype), leaf(392, 264, dtype=dtype).detach()
    lora_A = [leaf(r, 264, dtype=torch.float32) for r in ranks]
    lora_B = [leaf(392, r, dtype=torch.float32) for r in ranks]
    w = leaf(*((130, 2) if dtype is torch.bfloat16 else (2,)), dtype=torch.float32)
    y = routed_lora(x, lora_A, lora_B, w, 1.5, weight=weight, dropout_p=p)
    results += [y, *torch.autograd.grad(y, [x, w, *lora_A, *lora_B], torch.ones_like(y))]
torch.save([t.detach().cpu() for t in results], sys.argv[1])
"""

HEADER = 8 + 8 + 8 + 488  # cache.c: magic, length and checksum of what follows, key


def fnv1a(data):
    hash_ = 0xCBF29CE484222325
    for byte in data:
        hash_ = (hash_ ^ byte) * 0x100000001B3 % 2**64
    return hash_


def ptx_of(source, flags):
    runtime.open_nvrtc()
    maps = Path("/proc/self/maps").read_text().splitlines()
    nvrtc = ctypes.CDLL(next(line.split()[-1] for line in maps if "libnvrtc.so" in line))
    files = [path for path in CSRC.iterdir() if path.name.endswith((".cuh", ".h"))]
    texts = (ctypes.c_char_p * len(files))(*(path.read_bytes() for path in files))
    names = (ctypes.c_char_p * len(files))(*(path.name.encode() for path in files))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = (CSRC / source).read_bytes()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), len(files), texts, names)
    assert not nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
    assert not nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.raw


def make_older(file):
    """Exchange the binary in a file of the cache; return its source's name."""
    data = file.read_bytes()
    key = data[HEADER - 488 : HEADER].rstrip(b"\0").decode()
    flags = [word for word in key.split() if word.startswith("-") and "architecture" not in word]
    ptx = ptx_of(key.split()[0], ["--gpu-architecture=compute_80", *flags])
    assert b".target sm_80" in ptx
    numbers = len(ptx).to_bytes(8, sys.byteorder) + fnv1a(ptx).to_bytes(8, sys.byteorder)
    file.write_bytes(data[:8] + numbers + data[24:HEADER] + ptx)
    return key.split()[0]


def test_it_gives_the_same_results(tmp_path):
    env = os.environ | {"MOELORA_CACHE": str(tmp_path / "cache")}

    def run(name):
        subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / name], env=env, check=True, timeout=120)
        return torch.load(tmp_path / name)

    compiled = run("compiled")
    files = list((tmp_path / "cache").iterdir())
    assert {make_older(file) for file in files} == {"prepare.cu", "mix.cu", "dropout.cu"}
    before = [file.read_bytes() for file in files]
    older = run("older")
    assert [file.read_bytes() for file in files] == before  # they were taken, not replaced
    for ours, theirs in zip(older, compiled, strict=True):
        assert (ours.double() - theirs.double()).norm() < 2**-8 * theirs.double().norm()
