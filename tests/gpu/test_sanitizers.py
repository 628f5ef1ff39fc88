"""NVIDIA's compute-sanitizer finds nothing in every kernel of a routed layer.

What its tools see of these kernels: memcheck all accesses but the copy engine's (cp.async.bulk.tensor), which tensor
maps bound; synccheck barriers; racecheck the shared memory that threads read and write by themselves, not what the copy
engine writes and wgmma reads. In a process that multiplies by cuBLAS, too, racecheck (of CUDA 13) breaks off with an
internal error. initcheck takes what cuBLAS or the copy engine has written for uninitialised: that nothing depends on
what memory held before is for test_routed_lora.py to show.
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


@pytest.mark.parametrize(
    "tool, ways", [("memcheck", []), ("synccheck", []), ("racecheck", ["dual", "fused", "shared", "grouped"])]
)
def test_it_finds_nothing(tool, ways):
    # Every tensor is an allocation of its own, so that one element behind it is outside.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "10"]
    program = [sys.executable, str(Path(__file__).with_name("every_kernel.py")), *ways]
    command = [SANITIZER, *options, "--kernel-regex", "kns=ml_", *program]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert "done" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
