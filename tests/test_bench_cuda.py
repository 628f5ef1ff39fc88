"""`moelora bench --device cuda`: peers compute the same, and goals, plots and page follow from the files."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import moelora
from moelora.bench import goals, topk
from moelora.bench.arguments import FULL
from moelora.bench.cuda import layers, models, neighbours
from moelora.bench.goals import GOALS, Goal, judge, load
from moelora.bench.layers import SCALING
from moelora.bench.layers import Cell as SquareCell
from moelora.bench.page import BLOCKS, render
from moelora.bench.topk import as_rows
from moelora.cli import main

ROOT = Path(__file__).parents[1]
WITH_WEIGHTS = ("loop", "moelora", "n_passes", "stacked", "two_pass")


# What is compared


def double(peer, cell):
    """The layer in float64, of what a peer of the experts one by one has."""
    x, w, *adapters = [t.detach().double() for t in (*peer.inputs, *peer.parameters)]
    A, B = adapters[: cell.n], adapters[cell.n :]
    return sum(SCALING * w[:, e, None] * (x @ A[e].t() @ B[e].t()) for e in range(cell.n))


@pytest.mark.parametrize("adapters", ["bfloat16", "float32"])
def test_peers_of_a_layer_compute_the_same_and_so_do_their_gradients(adapters):
    cell = layers.Cell(7, 24, 40, 3, 16, adapters)
    peers, grad_y, exact = layers.peers(cell, device="cpu")
    expected = peers["base"].forward().double() + double(peers["moelora"], cell)
    found = {}
    for name in WITH_WEIGHTS:
        y = peers[name].forward()
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.1)
        found[name] = layers.call(peers[name], "forward+backward", grad_y)()
    torch.testing.assert_close(exact(False).double(), expected, rtol=1e-2, atol=1e-2)  # but for the base's rounding
    for name in WITH_WEIGHTS:
        (dx, dw, *_), (dx_of_loop, dw_of_loop, *_) = found[name], found["loop"]
        if name == "n_passes":  # whose base is weighted, too: the same for all experts
            dw, dw_of_loop = (grad - grad.mean(-1, keepdim=True) for grad in (dw, dw_of_loop))
        torch.testing.assert_close(dx.float(), dx_of_loop.float(), rtol=0.05, atol=0.2)
        torch.testing.assert_close(dw, dw_of_loop, rtol=0.05, atol=0.2)
        assert {g.dtype for g in found[name][2:]} == {getattr(torch, adapters)}


def test_every_pass_has_the_gradients_that_it_says_and_they_are_those_of_the_whole_step():
    peers, grad_y, _ = layers.peers(layers.Cell(5, 16, 12, 2, 16, "float32"), device="cpu")
    for name in (*WITH_WEIGHTS, "base", "one_lora"):
        peer = peers[name]
        whole = layers.call(peer, "forward+backward", grad_y)()
        (dx,) = layers.call(peer, "dx", grad_y)()
        torch.testing.assert_close(dx, whole[0], rtol=0, atol=0)
        backward = layers.call(peer, "backward", grad_y)
        for _ in range(2):  # as often as one likes
            torch.testing.assert_close(backward(), whole, rtol=0, atol=0)
        assert len(whole) == len(peer.inputs) + len(peer.parameters)
        assert all(leaf.requires_grad for leaf in (*peer.inputs, *peer.parameters))


def test_stock_adapters_have_the_dtype_that_is_asked_for():
    for adapters in ("bfloat16", "float32"):
        peers = layers.peers(layers.Cell(3, 16, 8, 2, 16, adapters), device="cpu").peers
        assert [p.dtype for p in peers["one_lora"].parameters] == [getattr(torch, adapters)] * 2
        assert peers["one_lora"].forward().dtype is torch.bfloat16


def test_peers_of_a_layer_are_compared_before_they_are_timed():
    of = layers.peers(layers.Cell(7, 24, 40, 3, 16, "float32"), device="cpu")
    for which in ("forward", "dx", "forward+backward"):
        calls = {name: layers.call(peer, which, of.grad_y) for name, peer in of.peers.items() if "compiled" not in name}
        off = layers._compared(of, which, calls)
        assert set(off) == set(WITH_WEIGHTS) and all(0 < float(far) < layers.OFF for far in off.values())
        with pytest.raises(RuntimeError, match=re.escape(f"{which} of loop is wrong")):
            layers._compared(of, which, {"loop": calls["base"]})


def test_logits_are_compared_before_models_are_timed():
    base = models.build("qwen3-4b", smoke=True, device="cpu")
    ids, weights = torch.randint(256, (1, 6)), torch.rand(1, 6, 2).softmax(-1)
    of = models.peers(base, 2, 16, ids, weights)
    assert set(models._compared(of)) == {"loop", "stacked"}
    with pytest.raises(RuntimeError, match="stacked computes something else than moelora"):
        models._compared({**of, "stacked": of["base"]})


@pytest.mark.parametrize("name", FULL["cuda"]["neighbours"]["models"])
def test_siblings_are_those_of_the_model_and_share_a_call(name):
    config = models.build(name, smoke=True, device="meta").config
    found = {what: (d, widths) for what, d, widths in neighbours.siblings(name, smoke=True)}
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    expected = {"qkv": (config.hidden_size, [q, kv, kv])}
    if name == "llama-8b":
        expected["gate_up"] = (config.hidden_size, [config.intermediate_size] * 2)
    assert found == expected
    peers = neighbours.peers(5, 24, [16, 8, 8], 2)
    together, apart = peers["shared"].forward().split([16, 8, 8], -1), peers["separate"].forward()
    torch.testing.assert_close(together[0], apart[0], rtol=0.02, atol=0.02)  # whose A it takes
    bases = peers["base"].forward()
    torch.testing.assert_close(peers["base_shared"].forward(), torch.cat(bases, -1), rtol=0.02, atol=0.02)
    assert all(not torch.allclose(y, base, atol=0.1) for y, base in zip(apart, bases, strict=True))


def test_a_decoder_layer_is_routed_as_the_models_that_are_measured():
    for depth in (1, 2):
        peer = neighbours.model("gemma-2b", depth, 2, (1, 5), smoke=True, device="cpu")
        assert len(peer.parameters) == depth * 4 * 2 * 2  # q, k, v, o; A and B of two experts
        grads = torch.autograd.grad(peer.forward().float().sum(), [*peer.inputs, *peer.parameters])
        assert all(grad.abs().max() > 0 for grad in grads)


def test_top_k_peers_of_a_whole_layer_compute_the_same():
    weight = torch.randn(16, 16)
    peers = topk.mixture_peers(SquareCell(11, 16, 5, 3, "float32"), 2, weight)
    for name in ("moelora", "topk_loop"):
        torch.testing.assert_close(peers[name].forward(), peers["stacked"].forward(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "billions"),
    # of their model cards; Gemma's 2.51 with its embeddings
    [("gemma-2b", 2.51), ("llama-8b", 8.03), ("qwen3-4b", 4.02)],
)
def test_models_have_as_many_parameters_as_those_that_they_are_named_after(name, billions):
    model = models.build(name, smoke=False, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert name in FULL["cuda"]["models"]["models"]


def test_models_have_all_peers_with_float32_adapters_that_are_not_zero():
    base = models.build("qwen3-4b", smoke=True, device="cpu")
    ids, weights = torch.randint(256, (1, 6)), torch.rand(1, 6, 2).softmax(-1)
    of = models.peers(base, 2, 16, ids, weights, compiled=models.compile_layers)
    assert set(of) == set(FULL["cuda"]["models"]["peers"])
    for name, peer in of.items():
        assert {p.dtype for p in peer.trained} <= {torch.float32}
        assert bool(peer.trained) is not name.startswith("base")
        in_model = dict(peer.model.named_parameters())
        assert all(p.abs().max() > 0 for key, p in in_model.items() if "lora_" in key or key.endswith((".A", ".B_t")))


def test_each_decoder_layer_is_compiled_and_nothing_else(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    base = models.build("qwen3-4b", smoke=True, device="cpu")
    assert models.compile_layers(base) is base
    assert compiled == list(base.model.layers)


# Goals, plots and page


MACHINE = {"gpu": "GPU", "driver": "1", "cuda": "13.0", "nvrtc": "13.0", "cpu": "CPU", "command": "moelora bench"}
VERSIONS = {name: "1" for name in ("python", "numpy", "torch", "peft", "transformers", "moelora")}


def write(folder, file, rows):
    with (folder / f"{file}.csv").open("w", newline="") as opened:
        rows = [{**row, **MACHINE, **VERSIONS} for row in rows]
        writer = csv.DictWriter(opened, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def layer_rows():
    """Of the full grid, with times as if the mixture's products cost what they count, and decode 2 us."""
    for T, d_in, d_out, R in FULL["cuda"]["layers"]["shapes"]:
        floor, base = 1 + R / d_in + R / d_out, 20.0 + 1e-8 * T * d_in * d_out
        for adapters in FULL["cuda"]["layers"]["adapters"]:
            cell = layers.Cell(T, d_in, d_out, R // 16, 16, adapters)
            for which in layers.PASSES if T > layers.DECODE else ["forward"]:
                us = {"base": base, "moelora": base + 2 if T <= 64 else base * floor, "stacked": 1.3 * base + 10}
                us |= {"stacked_compiled": 1.2 * base + 10, "one_lora": 1.4 * base, "loop": 4 * base}
                us |= {"two_pass": 5 * base, "n_passes": 9 * base}
                for timed in FULL["cuda"]["layers"]["timed"]:
                    if timed == "graph" or which in layers.WHOLE:
                        peak = "" if timed == "graph" else "12.3"
                        found = {
                            name: layers.Timed(
                                "fused" if name == "moelora" else "",
                                "" if name in layers.OTHER else "0.0012",
                                peak,
                                [value * 1e-6] * 3,
                            )
                            for name, value in us.items()
                        }
                        yield from layers._rows(cell, timed, which, found)


def neighbour_rows():
    for name in FULL["cuda"]["neighbours"]["models"]:
        about = {"model": name, "T": 4096, "N": 8, "r": 16}
        for timed, which in (("graph", "forward"), ("calls", "forward+backward")):
            seconds = {"model 1": [3e-3], "model 2": [4e-3]} if timed == "graph" else {}
            for what, *_ in neighbours.siblings(name, smoke=True):
                us = {"base": 90, "base_shared": 80, "separate": 120, "shared": 100}
                seconds |= {f"{what} {peer}": [value * 1e-6] for peer, value in us.items()}
            yield from neighbours._rows({**about, "timed": timed, "pass": which}, seconds)


def model_rows():
    for name, shape in models.SHAPES.items():
        for (n, (B, S)), what in ((cell, what) for cell in shape.cells for what in ("forward", "train step")):
            about = {"model": name, "B": B, "S": S, "N": n, "r": 16, "dtype": "bfloat16", "what": what}
            ms = {"moelora": 70, "one_lora": 100, "stacked": 75, "base": 60, "n_passes": 900, "loop": 400}
            for peer, median in ms.items():
                oom = peer == "n_passes" and what == "train step"
                times = dict.fromkeys(("ms_q1", "ms_median", "ms_q3"), "" if oom else median)
                over = "" if oom else f"{median / 70:.3f}"
                more = {"peak_mib": "oom" if oom else str(10.0 * median), "rounds": 3, "off": ""}
                if (peer, what) == ("stacked", "forward"):
                    more["off"] = "0.011"
                yield {**about, "p": 0.0, "timed": "calls", "peer": peer, **times, "over_moelora": over, **more}
                if what == "forward" and peer != "n_passes":
                    times = dict.fromkeys(times, median - 10)
                    yield {**about, "p": 0.0, "timed": "graph", "peer": peer, **times, "over_moelora": over, **more}
        if name != "gemma-2b":
            continue
        about |= {"N": 4, "B": 4}
        for peer, median in (("moelora", 84), ("one_lora", 130)):
            times = dict.fromkeys(("ms_q1", "ms_median", "ms_q3"), median)
            more = {"over_moelora": f"{median / 70:.3f}", "peak_mib": "1.0", "rounds": 3, "off": ""}
            yield {**about, "p": models.DROPOUT, "timed": "calls", "peer": peer, **times, **more}


def other_rows(file):
    if file == "host":
        for what, peer, us in (("call", "moelora", 7), ("layer", "one_lora", 50), ("layer", "per_token", 40)):
            for which in ("forward", "forward_grad"):
                about = {"what": what, "T": 16, "N": 4, "pass": which, "peer": peer}
                yield {**about, "us_q1": us, "us_median": us, "us_q3": us}
        return
    for n, us in ((8, 10e-6), (64, 12e-6)):
        about = {"what": "mixture", "T": 8192, "d": 4096, "N": n, "r": 16, "k": 2, "dtype": "bfloat16"}
        seconds = {"moelora": [us], "stacked": [2 * us], "topk_loop": [9 * us]}
        yield from as_rows(seconds, {**about, "timed": "calls", "pass": "forward"})
        about = {"what": "route", "T": 8192, "d": "", "N": n, "r": "", "k": 2, "dtype": "float32"}
        yield from as_rows({"moelora": [us], "torch": [3 * us]}, {**about, "timed": "graph", "pass": "forward"})


@pytest.fixture
def measured(tmp_path):
    """A folder as a GPU would leave it, of round numbers."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    for file, rows in (
        ("layers", layer_rows()),
        ("models", model_rows()),
        ("neighbours", neighbour_rows()),
        ("topk", other_rows("topk")),
        ("host", other_rows("host")),
    ):
        write(folder, file, list(rows))
    return folder


def verdicts(folder, title):
    found = [(goal, v) for goal, v in judge(load(folder)) if goal.title == title]
    assert found, title
    return [(round(v.value, 3), v.met) for _, of in found for v in of]


def test_goals_count_the_products_of_the_mixture_what_is_added_and_memory(measured):
    assert {value for value, _ in verdicts(measured, "forward, bfloat16 adapters")} <= {1.0, 0.999, 1.001}
    # T >= 4096 and d_out >= 4096: seven shapes
    assert len(verdicts(measured, "dX, float32 adapters")) == 7
    assert verdicts(measured, "decode, float32 adapters") == [(2.0, True)] * 10
    assert verdicts(measured, "forward, T = d = 2048, bfloat16 adapters") == [(pytest.approx(1.0625, abs=1e-3), True)]
    assert verdicts(measured, "Gemma 2B, N = 8, memory of the step") == [(0.7, True)]
    assert verdicts(measured, "Llama 8B, N = 8, forward") == [(0.7, True)]
    assert verdicts(measured, "dropout p = 0.1, step") == [(1.2, False)]
    assert verdicts(measured, "top 2, N = 64") == [(1.2, True)]
    assert verdicts(measured, "host time of a layer") == [(0.8, True)] * 2


def test_a_peer_without_memory_is_no_reference_and_no_cell(measured):
    goal = Goal("n", "models", "peer=moelora p=0.0 N=8", 1, "peer=n_passes")
    ((_, found),) = judge(load(measured), [goal])
    assert [("what=forward" in v.cell, "what=train step" in v.cell) for v in found] == [(True, False)] * 2


def test_every_goal_reads_columns_that_its_file_has_and_models_that_there_are(measured):
    results = load(measured)
    for goal in GOALS["cuda"]:
        conditions = dict(condition.split("=") for condition in (*goal.against.split(), *goal.cells.split()))
        assert set(conditions) <= {*results[goal.file][0], "R"}, goal
        assert conditions.get("model", "llama-8b") in models.SHAPES
        assert set(goals.CELL["cuda"][goal.file]) <= {*results[goal.file][0]}


def test_limits_are_said_in_words():
    said = {goal.title: goals.limit_text(goal) for goal in GOALS["cuda"]}
    assert said["forward, bfloat16 adapters"] == "<= 1.01 x (1 + R/d_in + R/d_out) of base"
    assert said["decode, bfloat16 adapters"] == "<= base + 3 us"
    assert said["Llama 8B, N = 8, memory of the step"] == "<= 0.72 of the memory of one_lora"


def test_the_page_gets_the_blocks_of_a_gpu_and_keeps_those_of_a_cpu(measured, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- bench: {name} -->\nstale {name}\n<!-- bench: end -->\n" for name in BLOCKS))
    assert main(["bench", "page", str(measured), str(page)]) == 0
    made = page.read_text()
    for name in BLOCKS:
        assert (f"stale {name}\n" in made) is not name.startswith("cuda-")
    assert "GPU, driver 1, CUDA 13.0, NVRTC 13.0, CPU; torch 1" in made
    assert "| 8192 | 4096 | 14336 | 64 | fused |" in made
    assert "| 16 | 4096 | 14336 | 64 | fused |" in made
    assert "| n_passes | 900.0 ms |  | oom |  |  |  |" in made
    assert "| stacked | 75.0 ms | 65.0 ms | 75.0 ms |" in made
    assert "| moelora | 0.0012 | 0.0012 |" in made  # y and dx
    assert "| stacked | 0.011 | 0.011 | 0.011 |" in made  # of three models
    cells = "120 → 100 | 90 → 80"
    assert f"| llama-8b | graph | forward | {cells} | {cells} | 1000 | 4.0 % | 2.0 % |" in made
    assert f"| gemma-2b | calls | forward+backward | {cells} |  |  |  |  |  |" in made
    assert "| 12 / 12 / 12 |" in made  # MiB of calls
    assert "| dropout p = 0.1, step | <= 1.15 of p=0.0 | 0 of 1 |" in made
    for picture in ("cuda_layers", "cuda_models"):
        assert f"![{picture}](page/{picture}.png)" in made
        assert (tmp_path / "page" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_a_cpu_leave_the_blocks_of_a_gpu_alone():
    text = "<!-- bench: cuda-host -->\nkept\n<!-- bench: end -->\n<!-- bench: host -->\nstale\n<!-- bench: end -->\n"
    made = render(text, dict.fromkeys(goals.FILES, ()), "page")
    assert "kept" in made and "stale" not in made


def test_what_a_gpu_has_not_measured_is_said(measured):
    (measured / "host.csv").unlink()
    made = render("<!-- bench: cuda-host -->\n<!-- bench: end -->", load(measured), "page")
    assert "Not measured yet: `moelora bench host --device cuda`." in made


def test_the_page_of_the_documentation_is_what_the_committed_files_make():
    results = load(ROOT / "benchmarks" / "results" / "cuda")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    if any(results.values()):
        assert render(page, results, "benchmarks") == page
    else:
        assert page.count("Not measured yet: ") == sum(name.startswith("cuda-") for name in BLOCKS)


# Arguments


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["all", "layers", "models"])
def test_without_a_gpu_the_command_says_so_and_writes_nothing(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", command, "--device", "cuda", "--smoke", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "argument --device: torch finds no GPU here for 'cuda'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("neighbours --device cuda --widths 64", "argument --widths: there is none on 'cuda'"),
        ("neighbours --models llama-8b", "argument --models: there is none on 'cpu'"),
        ("neighbours --device cuda --models qwen3-4b", "argument --models: invalid choice: 'qwen3-4b'"),
        ("layers --timed graph", "argument --timed: there is none on 'cpu'"),
        ("layers --device cuda --tokens 4", "argument --tokens: there is none on 'cuda'"),
        ("layers --device cuda --isa avx2", "argument --isa: there is none on 'cuda'"),
        ("models --device cuda --batch 2x8", "argument --batch: there is none on 'cuda'"),
        ("models --device cuda --models gpt2", "argument --models: there is no gpt2 on 'cuda'"),
        ("models --models llama-8b", "argument --models: there is no llama-8b on 'cpu'"),
        ("layers --shapes 1x2x3x16", "argument --shapes: there is none on 'cpu'"),
        ("layers --device cuda --shapes 1x2x3", "must be four positive integers with x between them, got '1x2x3'"),
        ("layers --device cuda --shapes 1x2x3x8", "the last must be a multiple of 16, the rank of an expert"),
        ("layers --device cuda --passes sideways", "argument --passes: invalid choice: 'sideways'"),
        ("models --device cuda --peers stacked_medium", "argument --peers: invalid choice: 'stacked_medium'"),
        ("host --device tpu", "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_options_of_the_other_device_are_refused(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments.split()])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_a_smoke_run_has_every_peer(tmp_path):
    assert main(["bench", "all", "--device", "cuda", "--smoke", "--out", str(tmp_path)]) == 0
    results = load(tmp_path)
    for file in goals.CELL["cuda"]:
        for row in results[file]:
            assert row["gpu"] == torch.cuda.get_device_name() and row["cuda"] == torch.version.cuda
            assert row["moelora"] == moelora.__version__ and row["nvrtc"]
    forward = {row["peer"] for row in results["layers"] if row["pass"] == "forward"}
    whole = {"base", "moelora", "stacked", "stacked_compiled", "one_lora", "loop", "two_pass", "n_passes"}
    assert whole | {"moelora_torch"} <= forward <= set(FULL["cuda"]["layers"]["peers"])
    for name in models.SHAPES:
        for what in ("forward", "train step"):
            rows = [row for row in results["models"] if (row["model"], row["what"]) == (name, what)]
            called = [row for row in rows if row["timed"] == "calls"]
            assert {row["peer"] for row in called} == set(FULL["cuda"]["models"]["peers"])
            assert all(float(row["peak_mib"]) > 0 for row in called)
            if what == "forward":
                assert {row["peer"] for row in rows if row["timed"] == "graph"} == set(models.GRAPHS)
                assert {row["peer"] for row in rows if row["off"]} == set(models.SAME)
    ways = {"moelora_dual", "moelora_grouped"} if torch.cuda.get_device_capability()[0] == 9 else set()
    assert {row["peer"] for row in results["topk"]} == {"moelora", "stacked", "topk_loop", "torch", "softmax"} | ways
    assert {row["what"] for row in results["host"]} == {"call", "layer"}
