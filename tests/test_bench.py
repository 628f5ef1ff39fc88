"""`moelora bench`: peers compute the same, files say where they come from, goals, plots and page follow from them."""

import csv
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import moelora
from moelora.bench import goals, host, layers, models, neighbours, topk
from moelora.bench.goals import GOALS, Goal, as_text, judge, load
from moelora.bench.layers import Cell
from moelora.bench.page import BLOCKS, render
from moelora.bench.small import build
from moelora.bench.work import Peer, timed
from moelora.cli import main
from moelora.demo.baselines import n_passes
from moelora.report.timing import interleave, kept_bytes
from moelora.validate.reference import looped

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, since such small calls only wait for more on a busy machine, and no C++ to compile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a smoke run of everything, made by the command."""
    out = tmp_path_factory.mktemp("bench") / "made" / "by-it"
    assert main(["bench", "all", "--smoke", "--threads", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(measured):
    return load(measured)


# What is compared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 13, 3, 2), (7, 24, 1, 5), (17, 8, 4, 9)], ids=str)
def test_peers_of_a_layer_compute_the_same(shape, dtype):
    peers = layers.peers(Cell(*shape, dtype))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    found = {}
    for name in ("loop", "moelora", "stacked", "stacked_medium", "stacked_compiled"):
        if name in peers:
            y = peers[name].forward()
            found[name] = [y.detach(), *torch.autograd.grad(y.float().square().sum(), peers[name].inputs)]
    for results in found.values():
        for ours, theirs in zip(results, found["loop"], strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


def test_peers_with_float32_adapters_of_a_bfloat16_layer_compute_in_float32():
    peers = layers.peers(Cell(7, 24, 3, 5, "bfloat16+float32"), layers.FORCED)
    found = {}
    for name, peer in peers.items():
        assert {x.dtype for x in peer.parameters} == {torch.float32}
        y = peer.forward()
        assert y.dtype is torch.bfloat16
        found[name] = [y.detach(), *torch.autograd.grad(y.float().sum(), peer.inputs)]
    torch.testing.assert_close(found["moelora"], found["stacked"], rtol=0.01, atol=0.01)


def test_whole_layers_are_the_base_and_a_mixture():
    peers = layers.peers(Cell(5, 12, 3, 2, "float32"))
    x, w = peers["moelora_weight"].inputs
    *adapters, weight = peers["moelora_weight"].parameters
    delta = sum(w[:, e, None] * layers.SCALING * (x @ adapters[e].t() @ adapters[3 + e].t()) for e in range(3))
    torch.testing.assert_close(peers["moelora_weight"].forward(), x @ weight.t() + delta)
    torch.testing.assert_close(peers["base"].forward(), x @ weight.t())
    y = peers["one_lora"].forward()
    assert y.shape == (5, 12) and not torch.allclose(y, x @ weight.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_peers_compute_the_same_and_so_do_their_gradients(k, dtype):
    peers = topk.mixture_peers(Cell(11, 16, 5, 3, dtype), k)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.05, "atol": 0.1}
    x, w = peers["moelora"].inputs
    found = {}
    for name, peer in peers.items():
        y = peer.forward()
        found[name] = [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, w])]
    for name in ("moelora", "topk_loop"):
        for ours, theirs in zip(found[name], found["stacked"], strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("k", [2, None])
def test_route_peers_compute_the_same_and_so_do_their_gradients(k):
    peers = topk.route_peers(9, 6, k)
    found = {}
    for name in ("moelora", "torch"):
        outputs = peers[name].forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert len(outputs) == (2 if k is None else 1)
        total = sum(output.square().sum() for output in outputs)
        found[name] = [*outputs, *torch.autograd.grad(total, peers[name].inputs)]
    torch.testing.assert_close(found["moelora"], found["torch"])
    if k is None:
        torch.testing.assert_close(peers["softmax"].forward(), found["torch"][0])


def test_a_peer_with_several_outputs_has_gradients_through_all_of_them():
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    seen = []
    a.register_hook(lambda grad: seen.append("a"))
    b.register_hook(lambda grad: seen.append("b"))
    seconds = timed({"both": Peer(lambda: (a * 2, b * 3), [a, b], [])}, "forward+backward", 1)
    assert len(seconds["both"]) == 1 and set(seen) == {"a", "b"}
    assert a.grad is None and b.grad is None


def test_a_layer_between_two_others_and_its_parts_compute_the_same():
    calls = neighbours.between(Cell(5, 12, 3, 2, "float32"))
    torch.testing.assert_close(calls["moelora"](), calls["stacked"]())
    torch.testing.assert_close(calls["moelora alone"](), calls["stacked alone"]())


def test_siblings_with_everything_in_common_have_the_same_gradients():
    ways = neighbours.siblings(Cell(5, 16, 3, 2, "float32"), "qkv")
    apart, leaves = ways["separate"]()
    (together,), same_leaves = ways["shared"]()
    assert [y.shape for y in apart] == [together.shape] * 3
    grad = torch.randn_like(together)
    got = torch.autograd.grad(together, same_leaves, grad)
    want = torch.autograd.grad(apart, leaves, [grad] * 3)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1].view(5, 3, 3).sum(1), want[1])
    torch.testing.assert_close(got[2:], want[2:])


def test_parts_are_added_up_and_shares_are_of_the_step_of_a_layer(results):
    rows = results["neighbours"]
    assert {row["what"] for row in rows} == {"between", "qkv", "gate_up"}
    assert {row["peer"] for row in rows if row["what"] == "between"} == {
        "moelora",
        "moelora_parts",
        "stacked",
        "stacked_parts",
    }
    (step,) = (float(row["us_median"]) for row in rows if row["peer"] == "step")
    saved = 0.0
    for row in rows:
        if row["pass"] == "forward+backward" and row["peer"] in ("separate", "shared"):
            saved += float(row["us_median"]) * (1 if row["peer"] == "separate" else -1)
    made = render("<!-- bench: siblings -->\n<!-- bench: end -->", results, "page")
    assert f"| {100 * saved / step:.1f} % |" in made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peers_of_a_model_with_the_same_experts_give_the_same_logits(name):
    base = build(name, smoke=True)
    ids = torch.randint(256, (2, 5))
    weights = torch.rand(2, 5, 3).softmax(-1)
    peers = models.peers(base, 3, 2, ids, weights)
    logits = {}
    for way, peer in peers.items():
        peer.model.eval()
        with torch.no_grad():
            logits[way] = peer.compute(None)
    for way in ("stacked", "moelora"):
        torch.testing.assert_close(logits[way], logits["loop"], rtol=1e-4, atol=1e-5)
    for way in ("base", "one_lora", "two_pass", "moelora_router", "n_passes"):  # others, by design
        assert not torch.allclose(logits[way], logits["loop"], rtol=1e-3, atol=1e-3)
    one_hot = torch.zeros_like(weights).index_fill_(-1, torch.tensor([1]), 1)
    with torch.no_grad():
        old = n_passes(peers["n_passes"].model, one_hot, ids, None)
        torch.testing.assert_close(old, looped(peers["n_passes"].model, one_hot, input_ids=ids, use_cache=False))


def test_peers_of_a_model_train_the_same_parameters_each_by_its_own_optimizer():
    base = build("llama", smoke=True)
    ids = torch.randint(256, (2, 5))
    peers = models.peers(base, 3, 2, ids, torch.rand(2, 5, 3).softmax(-1))
    experts = {id(parameter) for parameter in peers["loop"].trained}
    for way in ("moelora", "n_passes", "two_pass", "moelora_router"):
        assert experts <= {id(parameter) for parameter in peers[way].trained}
    assert len({id(peer.optimizer) for peer in peers.values() if peer.optimizer}) == len(peers) - 1  # the base has none
    sizes = {way: sum(parameter.numel() for parameter in peer.trained) for way, peer in peers.items()}
    assert sizes["stacked"] == sizes["moelora"] == 3 * sizes["one_lora"]


def test_a_bfloat16_base_has_float32_adapters_whichever_way_it_runs():
    base = build("llama", smoke=True).bfloat16()
    ids = torch.randint(256, (2, 5))
    peers = models.peers(base, 3, 2, ids, torch.rand(2, 5, 3).softmax(-1))
    for name in models.HALF:
        assert {p.dtype for p in peers[name].model.parameters() if p.requires_grad} == {torch.float32}
        assert peers[name].model.get_input_embeddings().weight.dtype is torch.bfloat16
        peers[name].model.eval()
    torch.testing.assert_close(peers["moelora"].compute(None), peers["stacked"].compute(None), rtol=0.05, atol=0.05)


def test_a_layer_keeps_x_h_and_w():
    T, d, n, r = 7, 24, 3, 2
    peers = layers.peers(Cell(T, d, n, r, "float32"))
    assert kept_bytes(peers["moelora"].forward, peers["moelora"].parameters) == 4 * T * (d + n * r + n)
    assert kept_bytes(peers["base"].forward, peers["base"].parameters) == 0
    assert kept_bytes(peers["loop"].forward, peers["loop"].parameters) > 4 * n * T * d


# How it is timed


def test_calls_alternate_slow_ones_are_rare_and_what_comes_before_is_not_counted():
    order = []
    calls = {name: partial(order.append, name) for name in "abc"}
    seconds = interleave(calls, 4, before={"b": lambda: order.append("-")}, every={"c": 3})
    assert "".join(order) == "a-bc" + "a-bc" + "-ba" + "a-b" + "c-ba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 2}


def test_short_calls_are_repeated_and_their_mean_is_taken():
    count = 0

    def call():
        nonlocal count
        count += 1

    (seconds,) = interleave({"call": call}, 3, least=1e-3).values()
    assert count > 300
    assert max(seconds) < 1e-4


def test_bytes_kept_count_a_storage_once_and_leave_parameters_out():
    x, parameter = torch.ones(5, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert kept_bytes(lambda: (x * parameter) * x, [parameter]) == 2 * x.nbytes


# What the files hold


def test_every_file_has_its_cells_peers_and_where_it_comes_from(results):
    for name, rows in results.items():
        assert rows, name
        for row in rows:
            assert row["command"] == "moelora bench all --smoke --threads 1"
            assert row["threads"] == "1"
            assert row["torch"] == torch.__version__ and row["moelora"] == moelora.__version__
            assert row["isa"] and row["cpu"] and row["openblas"] and row["peft"] and row["rounds"] in "12"
    for name in goals.CELL["cpu"]:
        unit = "ms" if name == "models" else "us"
        for row in results[name]:
            low, middle, high = (float(row[f"{unit}_{quartile}"]) for quartile in ("q1", "median", "q3"))
            assert 0 < low <= middle <= high


def test_layers_have_all_peers_for_the_first_mixture_and_fewer_for_others_and_for_a_forced_instruction_set(results):
    def peers(**where):
        return {row["peer"] for row in results["layers"] if all(row[key] == value for key, value in where.items())}

    hot = {"dtype": "float32", "forced": "no", "weights": "hot", "pass": "backward"}
    whole = {"base", "base_medium", "one_lora", "moelora_weight", "loop"}
    if shutil.which("g++"):
        whole.add("stacked_compiled")
    few = {"moelora", "stacked", "stacked_medium"}
    assert peers(**hot, N="2") == whole | few
    assert peers(**hot, N="3") == few
    assert peers(**hot | {"dtype": "bfloat16"}, N="3") == few - {"stacked_medium"}
    assert peers(**hot | {"dtype": "bfloat16+float32"}, N="2") == {"moelora", "stacked"}
    assert peers(weights="cold") == peers(forced="yes") | {"moelora", "stacked"} == {"moelora", "stacked"}
    assert {row["T"] for row in results["layers"] if row["weights"] == "cold"} == {"1"}


def test_the_instruction_set_is_put_back_and_each_row_names_its_own(results):
    best = moelora.get_isa()
    assert best == moelora.show_config(mode="dicts")["instruction set"]["available"][-1]
    for row in results["layers"]:
        assert (row["isa"] == best) == (row["forced"] == "no")


def test_the_peak_is_the_fastest_product_of_the_run(results):
    for dtype, computed in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16+float32", "float32")):
        products = [float(row["best"]) for row in results["peak"] if (row["dtype"], row["unit"]) == (computed, "GF/s")]
        assert {row["peak_gflops"] for row in results["layers"] if row["dtype"] == dtype} == {f"{max(products):.4g}"}


def test_models_have_every_way_with_memory_and_dropout_rows(results):
    of = {(row["peer"], row["p"], row["what"]): row for row in results["models"] if row["dtype"] == "float32"}
    half = {(row["peer"], row["what"]) for row in results["models"] if row["dtype"] == "bfloat16"}
    assert half == {(peer, what) for peer in models.HALF for what in ("forward", "train step")}
    ways = {"base", "one_lora", "stacked", "loop", "two_pass", "n_passes", "moelora", "moelora_router"}
    for what in ("forward", "train step"):
        assert {peer for peer, p, of_what in of if (p, of_what) == ("0.0", what)} - {*models.COMPILED} == ways
    assert {peer for peer, p, _ in of if p == "0.1"} == {"moelora", "one_lora", "loop"}
    assert all(float(row["peak_mib"]) >= 0 for row in of.values())


def test_dropout_and_compiled_rows_are_there_for_the_first_mixture(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # compiled in earnest by a slow test below
    monkeypatch.setattr(models, "CAN_COMPILE", True)
    rows = list(models.measure(models.Grid(["gpt2"], [(3, 2), (2, 2)], (1, 4), True), 1))
    assert {row["N"] for row in rows} == {2, 3}
    assert {row["N"] for row in rows if row["p"] or row["peer"] in models.COMPILED} == {3}


def test_a_chosen_grid_is_what_is_measured(tmp_path):
    grid = "--tokens 3 5 --widths 8 --mixtures 4x3 --top-k 1 4 --dtype bfloat16 --rounds 1"
    assert main(["bench", "topk", *grid.split(), f"--out={tmp_path}"]) == 0
    rows = [row for row in load(tmp_path)["topk"] if row["what"] == "mixture"]
    cells = {tuple(row[name] for name in ("T", "d", "N", "r", "k", "dtype", "rounds")) for row in rows}
    assert cells == {(T, "8", "4", "3", "1", "bfloat16", "1") for T in "35"}  # k = N is no top-k
    assert {row["command"] for row in rows} == {f"moelora bench topk {grid}"}


def test_host_time_is_that_of_one_thread_and_leaves_the_number_alone(results):
    torch.set_num_threads(2)
    try:
        rows = host.measure([2], 1)
        assert next(rows)["what"] == "call"
        assert torch.get_num_threads() == 1
        rows.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert {row["what"] for row in results["host"]} == {"call", "layer", "model"}


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.slow  # a minute of compiling; the smoke run of the benchmarks in .ci/run does the same
def test_compiled_peers_run_through_inductor(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "moelora", "bench", "models", "--smoke", "--threads", "1", "--out", tmp_path],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    compiled = {(row["peer"], row["what"]) for row in load(tmp_path)["models"] if "compiled" in row["peer"]}
    assert compiled == {(peer, what) for peer in models.COMPILED for what in ("forward", "train step")}


# Goals


def layer_row(peer, median, **other):
    cell = {"T": "256", "d": "768", "N": "8", "r": "8", "dtype": "float32", "isa": "avx512", "pass": "forward"}
    more = {"weights": "hot", "forced": "no", "gflops": "80", "peak_gflops": "100", "kept_bytes": ""}
    return {**cell, **more, "peer": peer, "us_median": str(median), **other}


def values(goal, rows, file="layers"):
    ((_, verdicts),) = judge({file: rows}, [goal])
    return [(pytest.approx(verdict.value), verdict.met) for verdict in verdicts]


def test_a_ratio_is_that_of_the_same_cell_and_two_percent_beyond_the_goal_are_met():
    goal = Goal("half", "layers", "peer=moelora pass=forward T=256..", 0.5, "peer=stacked")
    rows = [
        layer_row("moelora", 51),
        layer_row("stacked", 100),
        layer_row("moelora", 52, T="1024"),
        layer_row("stacked", 100, T="1024"),
        layer_row("moelora", 1, T="255"),  # out of range
        layer_row("stacked", 100, T="255"),
        layer_row("moelora", 1, **{"pass": "backward"}),  # another pass
        layer_row("moelora", 1, T="4096"),  # nothing to compare with
    ]
    assert values(goal, rows) == [(0.51, True), (0.52, False)]


@pytest.mark.parametrize(
    ("cells", "fits"),
    [
        ("isa=avx512*", True),
        ("isa=avx2", False),
        ("T=256", True),
        ("T=25", False),
        ("T=..256 R=64..64", True),
        ("R=65..", False),
        ("R=..63", False),
        ("d=768..4096 dtype=float32", True),
    ],
)
def test_cells_are_picked_by_patterns_and_ranges(cells, fits):
    goal = Goal("any", "layers", f"peer=moelora {cells}", 1, "peer=stacked")
    assert bool(values(goal, [layer_row("moelora", 1), layer_row("stacked", 1)])) is fits


def test_a_goal_may_compare_two_cells_of_one_peer():
    def row(n, median):
        cell = {"what": "mixture", "T": "2048", "d": "2048", "r": "8", "k": "2", "dtype": "float32", "pass": "forward"}
        return {**cell, "N": n, "peer": "moelora", "us_median": median}

    goal = Goal("top 2", "topk", "peer=moelora N=64 k=2", 1.25, "N=4")
    assert values(goal, [row("4", "100"), row("16", "1"), row("64", "130")], "topk") == [(1.3, False)]


def test_other_quantities():
    peak = Goal("peak", "layers", "peer=moelora", 0.85, quantity="peak")
    assert values(peak, [layer_row("moelora", 1, gflops="84")]) == [(0.84, True)]
    assert values(peak, [layer_row("moelora", 1, gflops="83")]) == [(0.83, False)]
    kept = Goal("kept", "layers", "peer=moelora", 1, quantity="kept")
    exactly = 2 * 256 * (768 + 64 + 8)
    row = layer_row("moelora", 1, dtype="bfloat16", kept_bytes=str(2 * exactly))
    assert values(kept, [row]) == [(2, False)]
    call = Goal("call", "host", "peer=moelora what=call", 8, quantity="us")
    row = {"what": "call", "T": "1", "N": "4", "pass": "forward", "peer": "moelora", "us_median": "8.1"}
    assert values(call, [row], "host") == [(8.1, True)]


def test_models_are_compared_in_milliseconds_and_by_dropout():
    def row(peer, p, median):
        cell = {"model": "llama", "B": "2", "S": "256", "N": "4", "r": "16", "dtype": "float32", "what": "train step"}
        return {**cell, "peer": peer, "p": p, "ms_median": median}

    rows = [row("moelora", "0.0", "100"), row("moelora", "0.1", "140"), row("loop", "0.1", "200")]
    judged = judge({"models": rows}, [goal for goal in GOALS["cpu"] if goal.title.startswith("dropout")])
    assert [(goal.against, [(v.value, v.met) for v in verdicts]) for goal, verdicts in judged] == [
        ("p=0.0", [(1.4, False)]),
        ("peer=loop", [(0.7, True)]),
    ]


def test_every_goal_reads_columns_that_its_file_has_and_names_of_peers_that_are_measured(results):
    for goal in GOALS["cpu"]:
        rows = results[goal.file]
        conditions = [condition.split("=") for condition in (*goal.cells.split(), *goal.against.split())]
        assert {name for name, _ in conditions} <= {*rows[0], "R"}, goal
        peers = {row["peer"] for row in rows}
        assert {value for name, value in conditions if name == "peer"} <= peers, goal


def test_goals_are_printed_cell_by_cell_and_what_is_not_measured_is_said():
    met, missing = Goal("half", "layers", "peer=moelora", 0.5, "peer=stacked"), Goal("none", "host", "peer=x", 1)
    rows = {"layers": [layer_row("moelora", 40), layer_row("stacked", 100)], "host": []}
    printed = as_text(judge(rows, [met, missing]))
    assert "half: <= 0.50 of stacked" in printed
    assert "T=256 d=768 N=8 r=8 dtype=float32 isa=avx512 pass=forward weights=hot  0.400   0.5  met" in printed
    assert "not measured" in printed


@pytest.mark.parametrize(("median", "status"), [("7.9", 0), ("9", 1)])
def test_the_exit_status_of_goals_tells_whether_all_are_met(median, status, tmp_path, capsys):
    row = {"what": "call", "T": "1", "N": "4", "pass": "forward", "peer": "moelora", "us_median": median}
    with (tmp_path / "host.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*row])
        writer.writeheader()
        writer.writerow(row)
    assert main(["bench", "goals", str(tmp_path)]) == status
    assert ("short" in capsys.readouterr().out) is bool(status)


# Plots and page


def test_plots_are_drawn_from_the_csv_files_alone(measured, tmp_path):
    for file in measured.glob("*.csv"):
        shutil.copy(file, tmp_path)
    assert main(["bench", "plot", str(tmp_path)]) == 0
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    dtypes = ("float32", "bfloat16", "bfloat16+float32")
    of_layers = {f"{kind}_{dtype}" for kind in ("tokens", "roofline") for dtype in dtypes}
    assert drawn == of_layers | {"experts_float32", "top_k_float32"}
    assert {path.name for path in measured.glob("*.png")} == {f"{name}.png" for name in drawn}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_without_matplotlib_files_are_written_and_a_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "moelora.bench.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["bench", "topk", "--smoke", "--rounds", "1", "--mixtures", "2x1", "--out", str(tmp_path)]) == 0
    assert 'pip install "moelora[plots]"' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["topk.csv"]


def test_a_page_is_written_between_its_marks_and_nowhere_else(measured, results, tmp_path):
    page = tmp_path / "page.md"
    names = [name for name in BLOCKS if not name.startswith("cuda-")]
    text = "# Title\n" + "".join(f"\n{name}:\n<!-- bench: {name} -->\nstale\n<!-- bench: end -->\n" for name in names)
    page.write_text(text)
    assert main(["bench", "page", str(measured), str(page)]) == 0
    made = page.read_text()
    assert "stale" not in made and made.startswith("# Title\n\nmachine:\n<!-- bench: machine -->\n")
    assert render(made, results, "page") == made
    for row in results["models"]:
        assert f"{float(row['ms_median']):.0f} ms" in made
    for row in results["peak"]:
        assert f"| {row['what']} | {row['dtype']} | {row['best']} {row['unit']} |" in made
    for picture in ("tokens_float32", "top_k_float32"):
        assert f"![{picture}](page/{picture}.png)" in made
        assert (tmp_path / "page" / f"{picture}.png").is_file()


def test_a_page_says_what_is_not_measured():
    empty = dict.fromkeys(goals.FILES, ())
    made = render("<!-- bench: topk -->\n<!-- bench: end -->", empty, "page")
    assert made == "<!-- bench: topk -->\n\nNot measured yet: `moelora bench topk`.\n\n<!-- bench: end -->"


@pytest.mark.skipif(moelora.get_isa() == "portable", reason="there is no other instruction set")
def test_page_and_plots_take_a_grid_that_lacks_what_they_show(tmp_path):
    grid = "--isa portable --dtype bfloat16 --tokens 2 --widths 8 --mixtures 2x1 --rounds 1"
    assert main(["bench", "layers", *grid.split(), "--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.png")) == []
    text = "".join(f"<!-- bench: {name} -->\n<!-- bench: end -->\n" for name in BLOCKS)
    made = render(text, load(tmp_path), "page")
    assert "<!-- bench: peers -->\n\nNot measured yet" in made
    assert "bfloat16, portable:" in made


def test_the_page_of_the_documentation_is_what_the_committed_files_make():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    results = load(ROOT / "benchmarks" / "results" / "cpu")
    assert set(BLOCKS) == {line.split()[2] for line in page.splitlines() if line.startswith("<!-- bench:")} - {"end"}
    assert render(page, results, "benchmarks") == page


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("everything", "argument COMMAND: invalid choice: 'everything'"),
        ("layers --rounds 0", "argument --rounds: must be a positive integer, got '0'"),
        ("all --rounds many", "argument --rounds: must be a positive integer, got 'many'"),
        ("host --threads -1", "argument --threads: must be a positive integer, got '-1'"),
        ("layers --tokens 4 0", "argument --tokens: must be a positive integer, got '0'"),
        ("layers --widths x", "argument --widths: must be a positive integer, got 'x'"),
        ("layers --mixtures 8", "argument --mixtures: must be two positive integers with x between them, got '8'"),
        ("models --mixtures 8x0", "argument --mixtures: must be two positive integers with x between them, got '8x0'"),
        ("models --batch 2x2x2", "argument --batch: must be two positive integers with x between them, got '2x2x2'"),
        ("models --models bert", "argument --models: invalid choice: 'bert'"),
        ("topk --dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("topk --top-k 8 --mixtures 4x2", "argument --top-k: 8 is not less than the experts of any of the mixtures"),
        ("layers --isa sse", "argument --isa: this CPU has "),
        ("models --tokens 4", "unrecognized arguments: --tokens 4"),
        ("all --widths 4", "unrecognized arguments: --widths 4"),
        ("topk --top 2", "unrecognized arguments: --top 2"),
        ("plot nowhere", "argument DIR: nowhere is not a folder"),
        ("goals .", "argument DIR: . has none of peak.csv, layers.csv, topk.csv, neighbours.csv, models.csv, host.csv"),
        ("plot .", "argument DIR: . has none of"),
        ("page . page.md", "argument PAGE: page.md is not a file"),
        ("page . plain.md", "argument PAGE: plain.md: has no block between <!-- bench: NAME --> and"),
        ("page . wrong.md", "argument PAGE: wrong.md: 'weather' is none of the blocks machine, "),
        ("host --out plain.md", "argument --out: plain.md is not a folder"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.md").write_text("# Plain\n")
    (tmp_path / "wrong.md").write_text("<!-- bench: weather -->\n<!-- bench: end -->\n")
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments.split()])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"plain.md", "wrong.md"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda head, row, rest: [head, row, *rest, row], r"has twice what=\S+ T=\d+ N=\d+ pass=\S+ peer=\S+"),
        (lambda head, row, rest: [head, row[:20]], r"row 1 of .* has not the columns of its head"),
        (
            lambda head, row, rest: [head, *rest, f"{row.strip()},more\n"],
            r"row \d+ of .* has not the columns of its head",
        ),
        (lambda head, row, rest: [head, re.sub(r"\d+\.\d+", "fast", row)], "has the time 'fast' at what="),
        (lambda head, row, rest: [head, "\udcff", row], "is no CSV file: 'utf-8' codec can't decode byte 0xff"),
    ],
    ids=["twice", "short", "long", "no number", "binary"],
)
@pytest.mark.parametrize("command", ["goals", "plot", "page"])
def test_a_damaged_file_is_refused(damage, said, command, tmp_path, capsys):
    head, row, *rest = (ROOT / "benchmarks" / "results" / "cpu" / "host.csv").read_text().splitlines(keepends=True)
    (tmp_path / "host.csv").write_bytes("".join(damage(head, row, rest)).encode(errors="surrogateescape"))
    page = tmp_path / "page.md"
    page.write_text("<!-- bench: host -->\nkept\n<!-- bench: end -->\n")
    with pytest.raises(SystemExit) as stopped:
        main(["bench", command, str(tmp_path), *([str(page)] if command == "page" else [])])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "argument DIR: " in error and "host.csv" in error
    assert re.search(said, error)
    assert "kept" in page.read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_results_of_two_devices_in_one_folder_are_refused(tmp_path, capsys):
    for device, file in (("cpu", "layers.csv"), ("cuda", "host.csv")):
        shutil.copy(ROOT / "benchmarks" / "results" / device / file, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "plot", str(tmp_path)])
    assert stopped.value.code == 2
    assert "layers.csv has not what results of 'cuda' have: T, d_in, d_out, " in capsys.readouterr().err


def test_what_is_asked_for_twice_is_measured_once_and_stays_beside_results_of_another_device(tmp_path, capsys):
    shutil.copy(ROOT / "benchmarks" / "results" / "cuda" / "host.csv", tmp_path)
    grid = "--isa portable portable --dtype bfloat16 --tokens 2 2 --widths 8 8 --mixtures 2x1 2x1 --rounds 1"
    assert main(["bench", "layers", *grid.split(), "--out", str(tmp_path)]) == 1
    assert re.search(r"no plots: .*layers\.csv has not what results of 'cuda' have", capsys.readouterr().err)
    (tmp_path / "host.csv").unlink()
    assert load(tmp_path)["layers"]


def test_without_the_c_core_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(moelora.functional, "HAS_EXT", False)
    assert main(["bench", "host", "--smoke", "--out", str(tmp_path / "out")]) == 1
    assert "the C extension is not loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_torch_the_command_says_what_to_install():
    program = "import sys; sys.modules['torch'] = None; from moelora.cli import main; sys.exit(main(['bench', 'host']))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == 'moelora bench: torch is not installed: pip install "moelora[hf]"\n'
