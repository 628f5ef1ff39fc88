"""Who may use the kernels, and what is said where nobody may."""

import json
from pathlib import Path

import nvidia
import pytest
import torch

from moelora.nn import cuda

PROGRAM = """
import json, sys, warnings
import torch
torch.version.cuda = {cuda!r}
from moelora import runtime
from moelora.nn.cuda import available
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answers = [available(torch.device("cuda", i)) for i in (0, 1, 0)]
print(json.dumps({{
    "answers": answers,
    "warnings": [(w.category.__name__, str(w.message), w.filename) for w in caught],
    "config": runtime.show_config("dicts")["cuda"],
}}))
"""


@pytest.fixture
def look(run_python):
    """``look(folder)``: what a process with the driver of that folder says of its GPUs."""

    def look(folder, cuda="13.0", **env):
        out, err = run_python(PROGRAM.format(cuda=cuda), LD_LIBRARY_PATH=str(folder), MOELORA_CUDA=None, **env)
        assert not err
        return json.loads(out)

    return look


def reason(seen):
    """What the one warning says; the caller's line is blamed."""
    ((category, message, filename),) = seen["warnings"]
    assert category == "RuntimeWarning"
    assert filename == "<string>"
    assert message.startswith("moelora's CUDA kernels can't be used, torch's operations are: ")
    assert "MOELORA_CUDA=0" in message
    return message.removeprefix("moelora's CUDA kernels can't be used, torch's operations are: ")


def test_with_all_there_is_no_warning(nvrtc, look, driver):
    seen = look(driver())
    assert seen["answers"] == [True, True, True]
    assert not seen["warnings"]
    assert seen["config"]["driver"] == "CUDA 13.0"
    gpus = seen["config"]["gpus"]
    assert [(gpu["compute capability"], gpu["multiprocessors"]) for gpu in gpus] == [("9.0", 107), ("9.0", 108)]
    ways = next(value for name, value in gpus[0].items() if name.startswith("ways"))
    assert ways["1"].startswith("decode / ") and ways["4096"] == "fused / fused"
    assert seen["config"]["nvrtc"] == "{}.{}".format(*nvrtc)


def test_no_driver(look, tmp_path):
    (tmp_path / "libcuda.so.1").touch()  # hides any other
    seen = look(tmp_path)
    assert seen["answers"] == [False, False, False]
    assert reason(seen).startswith("there is no NVIDIA driver (libcuda.so.1)")
    assert seen["config"]["driver"] == "there is no NVIDIA driver (libcuda.so.1)"
    assert "gpus" not in seen["config"]


@pytest.mark.parametrize(
    "flags, facts, message",
    [
        ([], {"version": 11080}, "the NVIDIA driver is too old: it supports CUDA 11.8, 12.0 is needed"),
        (["-DWITHOUT_LAUNCHES"], {}, "the NVIDIA driver is too old: it has no cuLaunchKernelEx"),
        ([], {"init": 100}, "the NVIDIA driver has no GPU to offer"),
        ([], {"init": 999}, "the NVIDIA driver refused cuInit: error 999, it is broken"),
        ([], {"count": 0}, "there is no GPU 0: the NVIDIA driver offers 0"),
    ],
)
def test_a_driver_that_cannot_be_used(look, driver, flags, facts, message):
    seen = look(driver(*flags, **facts))
    assert seen["answers"] == [False, False, False]
    assert reason(seen).startswith(message)


def test_an_old_gpu_beside_one_that_will_do(nvrtc, look, driver):
    seen = look(driver(major=7))
    assert seen["answers"] == [False, True, False]
    assert reason(seen).startswith("GPU 0 has compute capability 7.0, 8.0 is needed")
    assert seen["config"]["gpus"][0] == {"error": "GPU 0 has compute capability 7.0, 8.0 is needed"}
    assert seen["config"]["gpus"][1]["multiprocessors"] == 108


@pytest.fixture
def wheel(nvrtc):
    """The folder of a wheel's NVRTC that is younger than the oldest driver that would do."""
    folders = [path.parent for root in nvidia.__path__ for path in Path(root).glob("*/lib/libnvrtc.so.13")]
    if not folders:
        pytest.skip("no NVRTC 13 in this environment")
    return folders[0]


def test_no_compiler(wheel, look, driver):
    """What the wheel's makes could not be loaded, and there is no other."""
    seen = look(driver(version=12000))
    assert seen["answers"] == [False, False, False]
    assert reason(seen).startswith("NVRTC, CUDA's run-time compiler (libnvrtc.so.13), is not found")


def test_a_compiler_that_is_too_young(wheel, look, driver):
    """The loader finds it."""
    seen = look(f"{driver(version=12000)}:{wheel}")
    assert seen["answers"] == [False, False, False]
    assert reason(seen).startswith("NVRTC 13.")
    assert "is too young for a driver of CUDA 12" in reason(seen)
    assert seen["config"]["nvrtc"].startswith("NVRTC 13.")


def test_switched_off_silently(look, run_python, driver):
    out, err = run_python(PROGRAM.format(cuda="13.0"), LD_LIBRARY_PATH=str(driver()), MOELORA_CUDA="0")
    assert not err
    seen = json.loads(out)
    assert (seen["answers"], seen["warnings"]) == ([False, False, False], [])
    assert seen["config"] == {"kernels": "switched off by MOELORA_CUDA=0"}


def test_a_torch_for_other_gpus_is_left_alone_silently(look, driver):
    seen = look(driver(), cuda=None)
    assert (seen["answers"], seen["warnings"]) == ([False, False, False], [])


def test_what_is_no_tensor_on_a_gpu():
    for x in (torch.ones(2), torch.ones(2, device="meta"), [1.0], None):
        assert not cuda.on_gpu(x)
