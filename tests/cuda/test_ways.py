"""How a layer is computed on a GPU, which follows from its shape; and what the entries for CUDA tensors refuse."""

import re

import pytest
import torch

from moelora import _core

H200 = 9, 132  # major compute capability, multiprocessors


@pytest.fixture
def force():
    yield _core.set_cuda_way
    _core.set_cuda_way(None)


def way(tokens, d_in, d_out, columns, backward=False, gpu=H200, n_experts=1, top_k=0):
    return _core.cuda_way(*gpu, tokens, d_in, d_out, columns, n_experts, top_k, backward)


# A product's tiles have 128 rows by 256 columns, or 128 columns where fewer of 256 would be filled.
@pytest.mark.parametrize(
    "tokens, d_in, d_out, columns, forward, backward",
    [
        # up to 128 tokens and 256 columns: decode, forward
        (1, 4096, 4096, 64, "decode", "addmm"),
        (128, 4096, 4096, 256, "decode", "addmm"),
        (128, 4096, 4096, 257, "addmm", "addmm"),
        (129, 4096, 4096, 256, "addmm", "addmm"),
        # nine tenths of the multiprocessors have a tile, and those without can do the shrinks meanwhile
        (4096, 4096, 4096, 64, "fused", "fused"),  # 512 tiles, 16 idle blocks, 2 shrinks each
        (4096, 4096, 4096, 128, "fused", "fused"),
        (4096, 4096, 4096, 129, "dual", "dual"),
        (8192, 1024, 1024, 64, "dual", "dual"),  # 8 idle blocks, 8 shrinks each
        (2048, 2048, 2048, 64, "shared", "shared"),  # 4 idle blocks, 4 shrinks each
        (2048, 2048, 2048, 65, "dual", "dual"),
        (1408, 3072, 3072, 64, "shared", "shared"),  # 132 tiles: nobody is idle
        (1408, 3072, 3072, 128, "dual", "dual"),
        # one tile a block, for more than half of the multiprocessors
        (1024, 2048, 2048, 64, "shared", "shared"),
        # torch's products, where multiprocessors are idle for long
        (1024, 2048, 2048, 128, "dual", "dual"),  # 64 tiles
        (1024, 4096, 4096, 128, "fused", "dual"),  # 128 tiles, backward two shrinks for an idle block
        (512, 4096, 4096, 128, "addmm", "addmm"),  # 64 tiles
        (640, 4096, 4096, 128, "dual", "dual"),  # 80
        (1280, 4096, 4096, 256, "addmm", "addmm"),  # 160: a second wave of 28
        (2048, 4096, 4096, 256, "dual", "dual"),  # 256
        (1024, 1024, 1024, 128, "dual", "dual"),  # 32 tiles, but a short sum
        (768, 1024, 1024, 128, "addmm", "addmm"),  # 24
        (300, 1024, 768, 64, "addmm", "addmm"),
        # a first wave of whole tiles that share the shrink, the rest after it
        (8192, 2048, 16384, 64, "fused", "shared"),  # 512 tiles: 128, then 384 in 3 waves
        (4096, 4096, 2048, 64, "shared", "fused"),
        (8192, 2048, 1024, 64, "shared", "dual"),
        (8192, 1984, 1024, 64, "dual", "dual"),  # a short sum
        (8192, 4096, 8448, 64, "dual", "fused"),  # 16 full waves would become 17
        (8192, 4096, 1024, 128, "dual", "fused"),
        # forward follows d_out, backward d_in
        (4096, 1024, 4096, 64, "fused", "shared"),
        (4096, 4096, 1032, 256, "addmm", "dual"),
    ],
)
def test_the_shape_decides(tokens, d_in, d_out, columns, forward, backward):
    assert way(tokens, d_in, d_out, columns) == forward
    assert way(tokens, d_in, d_out, columns, backward=True) == backward


@pytest.mark.parametrize(
    "changes", [{"d_in": 4100}, {"d_out": 4100}, {"columns": 2049}, {"gpu": (8, 132)}, {"gpu": (10, 148)}]
)
def test_what_the_kernels_do_not_take_is_torchs(changes):
    assert way(**{"tokens": 4096, "d_in": 4096, "d_out": 4096, "columns": 64} | changes) == "torch"


# Of experts of rank 16.
@pytest.mark.parametrize(
    "tokens, d_in, d_out, n, top_k, expected",
    [
        (2048, 4096, 4096, 64, 2, "grouped"),
        (2048, 4096, 4096, 64, 0, "dual"),
        (2048, 4096, 4096, 64, 3, "grouped"),
        (2048, 4096, 4096, 64, 4, "dual"),  # as many rows to move as columns to multiply
        (2048, 4096, 4096, 36, 2, "dual"),
        (2048, 4096, 4096, 37, 2, "grouped"),
        (8192, 4096, 4096, 36, 2, "dual"),
        (8192, 4096, 4096, 37, 2, "grouped"),
        (2048, 4096, 4096, 64, 64, "dual"),
        (2048, 4096, 4096, 8, 2, "fused"),
        (64, 4096, 4096, 16, 2, "decode"),
        (64, 4096, 4096, 64, 2, "addmm"),  # few tiles
        # more than all tokens can have: whichever the size
        (1, 64, 64, 97, 2, "grouped"),
        (2048, 4096, 4096, 256, 2, "grouped"),
        (2048, 4096, 4096, 128, 7, "grouped"),
        (2048, 4096, 4096, 130, 18, "torch"),  # as many rows to move as columns: the formula
        (2048, 4096, 4096, 257, 2, "torch"),
        (2048, 4096, 4096, 256, 0, "torch"),
    ],
)
def test_top_k_decides(tokens, d_in, d_out, n, top_k, expected):
    assert way(tokens, d_in, d_out, 16 * n, n_experts=n, top_k=top_k) == expected


@pytest.mark.parametrize(
    "rank, forward, backward", [(8, 73, 33), (16, 37, 17), (17, 43, 22), (32, 33, 17), (33, 47, 26), (64, 30, 17)]
)
def test_the_ranks_of_a_pair_decide(rank, forward, backward):
    """Columns are whole blocks of 8 of each expert, and of 64 in all; a pair has 16, 32 or 64 ranks."""
    for least, back in ((forward, False), (backward, True)):
        ways = [way(2048, 4096, 4096, rank * n, back, n_experts=n, top_k=2) for n in (least - 1, least)]
        assert ways == ["dual", "grouped"]


def test_pairs_have_ranks_up_to_64(force):
    force("grouped")
    assert way(2048, 4096, 4096, 256, n_experts=4, top_k=2) == "grouped"
    assert way(2048, 4096, 4096, 257, n_experts=4, top_k=2) == "dual"
    assert way(2048, 4096, 4096, 256, n_experts=4, top_k=2, gpu=(8, 108)) == "torch"


def test_the_gpu_decides():
    assert [way(4096, 4096, 4096, 64, gpu=(9, n)) for n in (132, 114, 128)] == ["fused", "fused", "shared"]


@pytest.mark.parametrize(
    "name, shape, backward, taken",
    [
        ("torch", (8, 4096, 4096, 64), False, "torch"),
        ("dual", (8, 4096, 4096, 64), False, "dual"),
        ("dual", (300, 1024, 768, 2048), True, "dual"),
        ("fused", (8, 4096, 4096, 128), True, "fused"),
        ("fused", (8, 4096, 4096, 129), False, "decode"),
        ("fused", (1408, 3072, 3072, 64), False, "shared"),  # no block is idle
        ("decode", (128, 4096, 4096, 64), False, "decode"),
        ("decode", (129, 1024, 1024, 64), False, "addmm"),
        ("decode", (1, 4096, 4096, 64), True, "addmm"),
        ("addmm", (4096, 4096, 4096, 64), True, "addmm"),
        ("shared", (4096, 4096, 4096, 64), False, "shared"),  # its first wave
        ("shared", (8192, 4096, 8448, 64), False, "dual"),  # it would be a wave more
        ("dual", (300, 1024, 1020, 64), False, "torch"),
    ],
)
def test_a_forced_way_is_taken_where_it_can_be(force, name, shape, backward, taken):
    force(name)
    assert way(*shape, backward) == taken
    force(None)
    assert way(4096, 4096, 4096, 64) == "fused"


@pytest.mark.parametrize("name", ["", "Torch", "fuse"])
def test_other_ways_are_refused(force, name):
    force("dual")
    with pytest.raises(ValueError, match=re.escape(f"or None, got {name!r}")):
        force(name)
    assert way(8, 4096, 4096, 64) == "dual"


@pytest.mark.parametrize("name", [1, b"dual", ("dual",)])
def test_ways_are_strings(name):
    with pytest.raises(TypeError, match=f"name must be a str or None, got {type(name).__name__}"):
        _core.set_cuda_way(name)


NAMES = ["major", "multiprocessors", "tokens", "d_in", "d_out", "ranks", "n_experts", "top_k"]
GIVEN = dict(zip(NAMES, (*H200, 8, 4096, 4096, 64, 4, 2), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_a_layer_have_limits(name):
    least, most = {"n_experts": (1, 64), "top_k": (0, 4)}.get(name, (1, 2**31 - 1))
    low = 4 if name == "ranks" else least  # of 4 experts
    for value in (least - 1, -1, -100, most + 1, 2**33 + 8):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[{least}, {most}\], got {value}"):
            _core.cuda_way(*(GIVEN | {name: value}).values(), False)
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        _core.cuda_way(*(GIVEN | {name: 8.0}).values(), False)
    for value in (max(low, 2) if name == "n_experts" else low, most):
        assert isinstance(_core.cuda_way(*(GIVEN | {name: value}).values(), False), str)


# ---- tensors ----


def arguments(device="cpu", n=2):
    def ones(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=device)

    x, weight = ones(3, 16, dtype=torch.bfloat16), ones(24, 16, dtype=torch.bfloat16)
    return {
        "x": x,
        "lora_A": [ones(8, 16) for _ in range(n)],
        "lora_B": [ones(24, 8) for _ in range(n)],
        "weights": ones(3, n),
        "scaling": (1.0,) * n,
        "weight": weight,
        "bias": weight[:, 0].clone(),
    }


def call(**given):
    g = arguments() | given
    call = (g["x"], g["lora_A"], g["lora_B"], g["weights"], g["scaling"], None, g["weight"], g["bias"])
    return _core.cuda_call(*call, 0, True, False)


def forward(**given):
    g = arguments() | given
    adapters = (*g["lora_A"], *g["lora_B"])
    return _core.cuda_forward(g["x"], adapters, g["weights"], g["scaling"], g["weight"], g["bias"], None, 0, True)


def backward(**given):
    g = arguments() | {"grad_y": torch.ones(3, 24, dtype=torch.bfloat16), "need": (True,) * 9} | given
    hidden = torch.ones(3, 64, dtype=torch.bfloat16)
    saved = (g["x"], hidden, g["weights"], g["weight"], *g["lora_A"], *g["lora_B"])
    return _core.cuda_backward(saved, g["need"], g["scaling"], g["grad_y"], None, None, 0)


def prepare(**given):
    g = arguments() | given
    return _core.cuda_prepare(g["x"], (*g["lora_A"], *g["lora_B"]), g["weights"], g["scaling"], 0, False, None)


OTHERS = [None, 1, "x", object(), torch.ones(3, 16), torch.ones(3, 16, dtype=torch.bfloat16, device="meta")]


@pytest.mark.parametrize("entry", [call, forward, backward, prepare])
def test_what_is_on_no_gpu_is_left_alone(entry):
    assert entry() is None
    assert entry(**arguments("meta")) is None
    for other in OTHERS:
        for name in ("x", "weights", "weight", "bias", "scaling"):
            assert entry(**{name: other}) is None
        for name in ("lora_A", "lora_B"):
            assert entry(**{name: [other, other]}) is None
            assert entry(**{name: []}) is None


def test_a_backward_without_its_tensors_is_left_alone():
    for saved in (None, (), (1,) * 4, [1] * 8):
        assert _core.cuda_backward(saved, (True,) * 9, (1.0,), torch.ones(1), None, None, 0) is None
    for need in (None, (True,) * 8, [True] * 9):
        assert backward(need=need) is None
    assert backward(grad_y=None) is None


def test_a_mix_without_what_was_prepared_is_an_error():
    x, w = arguments()["x"], arguments()["weights"]
    for tensors in ((x, x), (None, None), (1, "x")):
        with pytest.raises(ValueError, match="expected the tensors that cuda_prepare took and made"):
            _core.cuda_mix(x, (x,) * 4, w, (1.0, 1.0), 0, tensors[0], None, tensors[1])
        with pytest.raises(ValueError, match="expected the tensors that cuda_prepare took and made"):
            _core.cuda_mix_backward(x, (x,) * 4, w, (1.0, 1.0), 0, tensors[0], None, None, tensors[1])
        with pytest.raises(ValueError, match="expected the tensors that cuda_prepare took and made"):
            dropout = 1, (0.5, 0.5)
            _core.cuda_drop_backward(x, (x,) * 4, w, (1.0, 1.0), 0, x, (x, x), tensors[0], False, dropout, tensors[1])


def test_arguments_are_counted():
    for name, n in (
        ("cuda_call", 11),
        ("cuda_forward", 9),
        ("cuda_backward", 7),
        ("cuda_prepare", 7),
        ("cuda_mix", 8),
        ("cuda_mix_backward", 9),
        ("cuda_drop_backward", 11),
        ("cuda_way", 9),
    ):
        for given in ((), (1,) * (n - 1), (1,) * (n + 1)):
            with pytest.raises(TypeError, match=f"{name} takes {n} arguments, got {len(given)}"):
                getattr(_core, name)(*given)


@pytest.mark.parametrize("top_k", [None, 1.5, "1"])
def test_top_k_is_a_number(top_k):
    x = torch.ones(3, 16)
    calls = {
        "cuda_call": (x, (x,), (x,), x, 1.0, None, None, None, top_k, True, False),
        "cuda_forward": (x, (x,), x, (1.0,), None, None, None, top_k, True),
        "cuda_backward": ((x,) * 6, (True,) * 7, (1.0,), x, None, None, top_k),
        "cuda_prepare": (x, (x,), x, (1.0,), top_k, False, None),
        "cuda_mix": (x, (x,), x, (1.0,), top_k, x, None, x),
        "cuda_mix_backward": (x, (x,), x, (1.0,), top_k, x, x, None, x),
        "cuda_drop_backward": (x, (x,), x, (1.0,), top_k, x, (x,), x, False, (1, (0.5,)), x),
    }
    for name, given in calls.items():
        with pytest.raises(TypeError, match="top_k must be an int"):
            getattr(_core, name)(*given)


def test_nothing_leaks(force, leaks_nothing):
    given = arguments()
    watched = [given["x"], given["weights"], given["weight"], given["bias"], given["scaling"], given["lora_A"]]
    watched += [*given["lora_A"], *given["lora_B"]]

    def everything():
        for entry in (call, forward, backward, prepare):
            entry(**given)
            for name in given:
                entry(**given | {name: given["weight"] if "lora" not in name else [None, None]})
        with pytest.raises(ValueError, match="expected the tensors"):
            _core.cuda_mix(
                given["x"], (given["x"],) * 4, given["weights"], given["scaling"], 0, given["x"], None, given["x"]
            )
        for name in ("no way", "dual", None):
            try:
                force(name)
            except ValueError:
                continue
        way(8, 64, 64, 8)

    leaks_nothing(everything, watched)
