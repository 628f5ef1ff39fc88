"""Training with moelora is training the old way: the same losses, the same adapters and gate after some steps."""

import csv
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from moelora.demo.text import VOCAB_SIZE
from moelora.demo.training import make_llama

FOLDER = Path(__file__).parents[1] / "benchmarks" / "convergence"
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for their threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def convergence():
    """The modules of the benchmark, by name."""
    names = ("ways", "run", "report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            del sys.modules[name]


@pytest.fixture(scope="module")
def trained(convergence):
    """In float64: all ways after some steps on the same batches, their losses, and what they started from."""
    torch.manual_seed(0)
    base = make_llama(width=32, layers=2).double().requires_grad_(False)
    ways = convergence["ways"].make_ways(base, rank=3, seed=1, steps=STEPS)
    start = {name: {key: p.detach().clone() for key, p in way.trained.items()} for name, way in ways.items()}
    batches = torch.randint(VOCAB_SIZE, (STEPS, 2, 12))
    losses = {name: [way.step(input_ids) for input_ids in batches] for name, way in ways.items()}
    return ways, losses, start


@pytest.mark.parametrize(("way", "reference"), [("moelora_logits", "n_passes"), ("moelora", "layer_loop")])
def test_losses_and_everything_that_is_trained_are_those_of_the_older_way(way, reference, trained):
    ways, losses, _ = trained
    # The model computes the loss of float64 logits in float32.
    assert losses[way] == pytest.approx(losses[reference], rel=1e-6)
    ours, theirs = ways[way].trained, ways[reference].trained
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-8)


def test_training_moves_every_expert_and_the_gate_and_two_mixtures_differ(trained):
    ways, losses, start = trained
    for name in ("n_passes", "layer_loop"):
        for key, before in start[name].items():
            assert (ways[name].trained[key] - before).norm() > 1e-3 * before.norm()
    assert losses["n_passes"] != pytest.approx(losses["layer_loop"], rel=1e-6)


def smoke(convergence, out):
    return convergence["run"].main(["--smoke", "--out", str(out)])


def test_a_run_leaves_what_table_and_picture_are_made_from(convergence, tmp_path, capsys):
    out = tmp_path / "made" / "curves.csv"
    assert smoke(convergence, out) == 0
    with out.open() as curves, out.with_name("curves_summary.csv").open() as summary:
        points, rows = list(csv.DictReader(curves)), list(csv.DictReader(summary))
    ways = {"n_passes", "moelora_logits", "layer_loop", "moelora", "one_lora", "n_passes_nudged", "layer_loop_nudged"}
    assert {point["way"] for point in points} == {row["way"] for row in rows} == ways
    of_moelora = [point for point in points if point["way"] == "moelora"]
    assert [point["step"] for point in of_moelora] == ["0", "1", "2", "3", "4"]
    assert all(float(point["loss"]) > 0 and float(point["ms"]) > 0 for point in of_moelora[:-1])
    assert of_moelora[-1]["loss"] == "" and float(of_moelora[-1]["held_out_loss"]) > 0

    capsys.readouterr()
    convergence["report"].main([str(out), "--plot", str(tmp_path / "curves.png")])
    printed = capsys.readouterr().out
    assert "| moelora_logits against n_passes |" in printed and "| moelora against layer_loop |" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("mixture", "factor", "named"),
    [("logits", 1.001, "moelora_logits"), ("layer", 1.001, "moelora"), ("layer", math.nan, "moelora")],
)
def test_a_way_that_drifts_is_named_and_fails_the_run(
    mixture, factor, named, convergence, tmp_path, monkeypatch, capsys
):
    by_moelora = convergence["ways"].by_moelora

    def a_little_off(of_mixture):
        def loss_of(model):
            loss = by_moelora(of_mixture)(model)
            return lambda weights, ids: loss(weights * factor if of_mixture == mixture else weights, ids)

        return loss_of

    monkeypatch.setattr(convergence["ways"], "by_moelora", a_little_off)
    assert smoke(convergence, tmp_path / "curves.csv") == 1
    drifted = [line for line in capsys.readouterr().out.splitlines() if " drifted from " in line]
    assert drifted and all(line.startswith(f"{named} drifted") for line in drifted)
