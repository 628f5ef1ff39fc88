"""The CUDA sources compile, in the forms in which they are launched."""

import itertools
import re

import pytest

from moelora import _core

# The values that an option takes; where its meaning differs between sources, of one of them.
VALUES = {
    "ML_F16": (0, 1),
    "ML_F32_ADAPTERS": (0, 1),
    "ML_F32_GRADS": (0, 1),
    "ML_BACKWARD": (0, 1),
    "ML_BIAS": (0, 1),
    "ML_LOGITS": (0, 1, 2),
    "ML_CHUNKS": (1, 2),
    "ML_TILES": (1, 2, 4),
    "ML_RANKS": (16, 32, 64),
    "ML_ADDS": (0, 1),
    "ML_DEEP": (0, 1),
    "ML_TOP": (0, 1),
    ("decode.cu", "ML_ROWS"): (16, 32, 64, 112, 256),
    ("decode.cu", "ML_TOKENS"): (8, 16, 32, 64, 128),
    ("decode.cu", "ML_SHARE"): (1, 2),
    ("dual.cu", "ML_WIDTH"): (128, 256),
    ("dual.cu", "ML_COLS"): (0, 64, 128),
    ("few.cu", "ML_TOKENS"): (16, 32),
    ("project.cu", "ML_COLS"): (64, 128, 256),
    ("shared.cu", "ML_WIDTH"): (128, 256),
    ("route.cu", "ML_WIDTH"): (1, 2, 4, 8, 16, 32, 64, 128),
}


def forms(which):
    """Which values options have together: ``which`` of the values of each option gives tuples of one for each."""
    for file, options, for_hopper in _core.cuda_sources():
        for chosen in which([VALUES.get((file, option)) or VALUES[option] for option in options]):
            for arch in ("sm_90a",) if for_hopper else ("sm_80", "sm_90", "sm_100"):
                yield pytest.param(file, chosen, arch, id="-".join([file, arch, *map(str, chosen)]))


def one_at_a_time(values):
    """The first of each, and each other beside the first of the others."""
    first = tuple(options[0] for options in values)
    others = [first[:i] + (v,) + first[i + 1 :] for i, options in enumerate(values) for v in options[1:]]
    return [first, *others]


@pytest.mark.parametrize("file, options, arch", list(forms(one_at_a_time)))
def test_every_value_of_an_option_compiles(nvrtc, file, options, arch):
    cubin, log = _core.cuda_compile(file, options, arch)
    assert cubin.startswith(b"\x7fELF")
    assert log is None


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize("file, options", [source[:2] for source in _core.cuda_sources() if not source[2]], ids=str)
def test_what_is_not_hoppers_compiles_for_every_architecture(nvrtc, file, options, arch):
    chosen = tuple((VALUES.get((file, option)) or VALUES[option])[-1] for option in options)
    assert _core.cuda_compile(file, chosen, arch)[1] is None


@pytest.mark.slow
@pytest.mark.parametrize("file, options, arch", list(forms(lambda values: itertools.product(*values))))
def test_every_form_compiles(nvrtc, file, options, arch):
    cubin, log = _core.cuda_compile(file, options, arch)
    assert cubin.startswith(b"\x7fELF")
    assert log is None


def test_the_log_says_what_is_wrong(any_source):
    file, options, _ = any_source
    with pytest.raises(RuntimeError, match=f"doesn't compile {file}, --gpu-architecture=sm_1 .*invalid value"):
        _core.cuda_compile(file, options, "sm_1")


def test_an_option_is_a_macro(nvrtc):
    """Another value gives another binary."""
    binaries = [_core.cuda_compile("mix.cu", options, "sm_80")[0] for options in ((0,), (1,), ())]
    assert binaries[0] != binaries[1]
    assert binaries[0] == binaries[2]


def test_options_that_a_source_does_not_name_are_zero(any_source):
    file, options, arch = any_source
    assert _core.cuda_compile(file, (*options, 0), arch) == _core.cuda_compile(file, options, arch)
    with pytest.raises(ValueError, match=f"{file} names {len(options)} options"):
        _core.cuda_compile(file, (*options, 1), arch)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("core.cu", (), "sm_80"), ValueError, "there is no source 'core.cu'"),
        (("mix.cu\0", (), "sm_80"), ValueError, "there is no source"),
        ((b"mix.cu", (), "sm_80"), TypeError, "source and arch must be str"),
        (("mix.cu", (0,), "sm_80 --std=c++20"), ValueError, "there is no architecture"),
        (("mix.cu", (0,) * 7, "sm_80"), ValueError, "options must hold at most 6 numbers, got 7"),
        (("mix.cu", (2**15,), "sm_80"), ValueError, "options must fit into 16 bits"),
        (("mix.cu", 0, "sm_80"), TypeError, "options must be a list or a tuple"),
        (("mix.cu", ("0",), "sm_80"), TypeError, "options must be an int"),
        (("mix.cu", (0,)), TypeError, "takes 3 arguments, got 2"),
    ],
)
@pytest.mark.parametrize("function", [_core.cuda_compile, _core.cuda_cubin])
def test_wrong_arguments_are_named(nvrtc, function, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments)
