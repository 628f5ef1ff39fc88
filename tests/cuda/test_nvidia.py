"""What csrc/cuda/nvidia.h says of NVIDIA's libraries, where there are headers to compare with."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NVIDIA_H = HERE.parents[1] / "csrc" / "cuda" / "nvidia.h"


@pytest.fixture(scope="module")
def include_folders():
    nvidia = importlib.util.find_spec("nvidia")
    wheels = (nvidia and nvidia.submodule_search_locations) or ()
    folders = [Path("/usr/local/cuda/include"), *(path for root in wheels for path in Path(root).glob("*/include"))]
    for header in ("cuda.h", "nvrtc.h"):
        if not any((folder / header).exists() for folder in folders):
            pytest.skip(f"no {header} on this machine")
    return folders


def test_names_numbers_layouts_and_prototypes_are_nvidias(include_folders, tmp_path):
    compiled = tmp_path / "facts.o"
    flags = [f"-I{folder}" for folder in (NVIDIA_H.parent, *include_folders)]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-variable"]
    done = subprocess.run(
        ["gcc", "-std=gnu11", *warnings, *flags, "-c", HERE / "test_nvidia.c", "-o", compiled],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    undefined = subprocess.run(["nm", "-u", compiled], capture_output=True, text=True, check=True).stdout
    ours = re.findall(r"X\((\w+),", NVIDIA_H.read_text())
    assert set(undefined.split()) - {"U", "_GLOBAL_OFFSET_TABLE_"} == set(ours)
