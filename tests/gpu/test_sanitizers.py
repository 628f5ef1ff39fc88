"""NVIDIA's compute-sanitizer finds nothing in every kernel of a routed layer.

What its tools see of these kernels: memcheck all accesses but the copy engine's (cp.async.bulk.tensor), which tensor
maps bound; synccheck barriers; racecheck the shared memory that threads read and write by themselves, not what the copy
engine writes and wgmma reads; initcheck the reads of threads, not the copy engine's. In a process that multiplies by
cuBLAS, too, racecheck (of CUDA 13) breaks off with an internal error. What cuBLAS or the copy engine has written
initcheck takes for uninitialised: results that are copied to the CPU, which it is told not to look at, and H of the way
"torch".
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9.0",
    ),
]


def sanitize(tool, ways=(), *options):
    # Every tensor is an allocation of its own, so that one element behind it is outside.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    quiet = ["--report-api-errors", "no", "--show-backtrace", "device", "--print-limit", "10"]
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *quiet, *options, "--kernel-regex", "kns=ml_"]
    program = [sys.executable, str(Path(__file__).with_name("every_kernel.py")), *ways]
    return subprocess.run([*command, *program], env=env, text=True, capture_output=True, timeout=300)


BUT_TORCH = ("decode", "addmm", "dual", "fused", "shared", "grouped")


@pytest.mark.parametrize(
    "arguments",
    [
        ("memcheck",),
        ("synccheck",),
        ("racecheck", ("dual", "fused", "shared", "grouped")),
        ("initcheck", BUT_TORCH, "--check-api-memory-access", "no"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_it_finds_nothing(arguments):
    done = sanitize(*arguments)
    assert "done" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout


def test_initcheck_tells_what_it_takes_for_uninitialised():
    """H, which cuBLAS has written: so reads are looked at."""
    done = sanitize("initcheck", ("torch",), "--check-api-memory-access", "no")
    assert done.returncode == 9 and "Uninitialized" in done.stdout and "ml_mix" in done.stdout, done.stdout
