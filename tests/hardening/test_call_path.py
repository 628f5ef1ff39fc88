"""The host's part of a call, counted in instructions: what no other work on the machine disturbs.

Limits are ratios to stacked torch in the same run, since Python, torch and the compiler change all counts. The numbers
measured are those of Python 3.11, torch 2.13 and gcc 12 on x86-64 with AVX2 kernels, which valgrind can run.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
HEADROOM = 1.15


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Of one call each, by name: the difference between 2 n calls and n, divided by n."""
    if platform.machine() != "x86_64":
        pytest.skip("the limits are of x86-64")
    if not all(map(shutil.which, ("valgrind", "gcc"))) and os.environ.get("MOELORA_REQUIRE_EXT") != "1":
        pytest.skip("needs valgrind and gcc")
    folder = tmp_path_factory.mktemp("callgrind")
    (folder / "requests.c").write_text(REQUESTS)
    library = folder / "requests.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / "requests.c"], check=True)
    program = [sys.executable, Path(__file__).with_name("call_path.py"), library]
    options = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'out'}"]
    avx2 = {"MOELORA_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    environment = {**os.environ, **avx2, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    subprocess.run(["valgrind", *options, *program], check=True, env=environment, timeout=1200)
    totals = {}
    for path in folder.glob("out.*"):
        text = path.read_text()
        name, n = re.search(r"Client Request: (.*): (\d+)$", text, re.M).groups()
        totals.setdefault(name, {})[int(n)] = int(re.search(r"^totals: (\d+)", text, re.M)[1])
    return {name: (of[max(of)] - of[min(of)]) / min(of) for name, of in totals.items()}


def difference(a, b):
    return lambda counts: counts[a] - counts[b]


CALLS = {
    "without gradients": (lambda counts: counts["routed"], lambda counts: counts["stacked"], 0.62),
    "forward": (lambda counts: counts["routed forward"], lambda counts: counts["stacked forward"], 0.96),
    "backward": (
        difference("routed step", "routed forward"),
        difference("stacked step", "stacked forward"),
        1.00,
    ),
    "a routed PEFT layer": (lambda counts: counts["layer"], lambda counts: counts["stacked"], 1.64),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_call_takes_no_more_instructions_than_it_did(instructions, call):
    routed, stacked, measured = CALLS[call]
    ratio = routed(instructions) / stacked(instructions)
    print(f"{call}: {routed(instructions):.0f} instructions, {ratio:.2f} of stacked torch's")
    assert ratio <= HEADROOM * measured
