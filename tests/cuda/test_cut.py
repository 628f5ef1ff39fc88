"""How the shrink of a layer is cut among the blocks of project.cu (test_cut.c): a rule in C, which needs no GPU."""

import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"


def test_any_layer_is_cut_whole_and_between_experts(gcc):
    sources = [Path(__file__).with_name("test_cut.c"), *(file for file in CSRC.glob("*.c") if file.name != "dense.c")]
    program = gcc(
        "test_cut",
        f"-I{CSRC.parent}/core",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        *sources,
        "-pthread",
        "-ldl",
        "-lm",
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
