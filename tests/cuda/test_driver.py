"""The driver's side in C (test_driver.c), over a driver that runs nothing: contexts, launches, threads, failures."""

import os
import subprocess
from pathlib import Path

import nvidia
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc" / "cuda"


@pytest.mark.parametrize("checks", [(), ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")])
def test_kernels_and_launches(nvrtc, gcc, driver, tmp_path, checks):
    (library, *_) = (path for root in nvidia.__path__ for path in Path(root).glob(f"*/lib/libnvrtc.so.{nvrtc[0]}"))
    sources = [HERE / "test_driver.c", *(CSRC / f"{name}.c" for name in ("driver", "program", "cache"))]
    program = gcc("test_driver", "-O1", "-g", *checks, *sources, "-pthread", "-ldl")
    env = {"MOELORA_CACHE": str(tmp_path / "cache"), "LD_LIBRARY_PATH": f"{driver()}:{library.parent}"}
    done = subprocess.run([program, library], env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
