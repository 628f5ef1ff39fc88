"""`examples/dylora` runs and does what it says; its old way runs on moelora by its import line."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import moelora
from moelora.cli import main
from moelora.demo.text import load_domains
from moelora.demo.training import make_llama

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "dylora"
NOVEL = ["Python source", "English prose", "JSON and CSV", "C headers"]
STREAM = ["Python source", "English prose", "JSON and CSV", "Python source", "C headers"]
IMPORT = "from peft import LoraConfig, PeftModel, get_peft_model\n"


def python(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that the command in the README writes."""
    out = tmp_path_factory.mktemp("dylora")
    (out / "printed.txt").write_text(python(FOLDER / "main.py", "--smoke", "--out", out))
    return out


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(params=["old way", "moelora"])
def way(report, request):
    return report["ways"][request.param]


class TestTheStream:
    def test_every_novel_domain_grows_one_expert_and_a_repeated_one_none(self, way):
        assert [visit["domain"] for visit in way["visits"]] == STREAM
        assert [visit["grown"] for visit in way["visits"]] == [True, True, True, False, True]
        experts = [visit["expert"] for visit in way["visits"]]
        assert experts == ["expert_0", "expert_1", "expert_2", "expert_0", "expert_3"]

    def test_known_and_novel_lie_far_from_the_threshold(self, way):
        novel = [visit["similarity"] for visit in way["visits"][1:] if visit["grown"]]
        (known,) = [visit["similarity"] for visit in way["visits"] if not visit["grown"]]
        assert max(novel) < 0.75
        assert known > 0.9

    def test_each_novel_task_is_learned(self, report, way):
        before = [report["base"], *(visit["held_out"] for visit in way["visits"])]
        for last, visit in zip(before, way["visits"], strict=False):
            assert not visit["grown"] or visit["held_out"][visit["domain"]] < last[visit["domain"]] - 0.01

    def test_the_first_domain_is_not_forgotten(self, report, way):
        losses = [visit["held_out"][NOVEL[0]] for visit in way["visits"]]
        assert losses[0] < report["base"][NOVEL[0]] - 0.02
        assert max(losses) < losses[0] + 0.06
        assert losses[-1] < report["base"][NOVEL[0]] - 0.02

    def test_what_is_loaded_is_what_was_saved_and_still_knows_its_tasks(self, way):
        assert way["loaded_difference"] == 0
        assert way["recognised_after_loading"] == ["expert_0", "expert_1", "expert_2", "expert_0", "expert_3"]

    def test_one_pass_instead_of_one_for_each_expert_and_one_for_the_router(self, report):
        assert report["ways"]["old way"]["base_passes"] == 5
        assert report["ways"]["moelora"]["base_passes"] == 1

    def test_logits_mode_is_the_old_way(self, report):
        assert 0 <= report["logits_mode_difference"] < 1e-5

    def test_one_pass_costs_less(self, report):
        cost = report["cost"]
        assert cost["moelora"]["train_mib"] < cost["old way"]["train_mib"]
        assert cost["moelora"]["forward_ms"] < cost["old way"]["forward_ms"]

    def test_it_generates_after_the_prompt(self, way):
        prompt = bytes(load_domains()[0].held_out[:48]).decode()
        assert way["generated"].startswith(prompt)
        assert len(way["generated"]) > len(prompt)

    def test_it_prints_what_it_found(self, out, report):
        printed = (out / "printed.txt").read_text()
        assert f"{report['ways']['moelora']['visits'][-1]['held_out'][NOVEL[0]]:.3f}" in printed
        assert repr(report["ways"]["moelora"]["generated"]) in printed

    def test_experts_of_both_ways_open_with_stock_peft(self, out):
        for saved in ("moelora/model/expert_3", "old_way/model/peft_adapters/expert_3/expert_3"):
            stock = peft.PeftModel.from_pretrained(make_llama(32, 2), out / saved, adapter_name="expert_3")
            assert any(p.any() for name, p in stock.named_parameters() if "lora_B.expert_3" in name)

    @pytest.mark.parametrize("saved", ["moelora", "old_way"])
    def test_what_either_way_has_saved_keeps_every_promise(self, out, saved, capsys):
        arguments = ["--checkpoint", f"{out}/{saved}/model", "--model", f"{out}/base", "--no-speed", "--tokens", "16"]
        assert main(["validate", *arguments]) == 0, capsys.readouterr().out


@pytest.fixture(scope="module")
def example():
    """The modules of the example, found as `python main.py` finds them."""
    names = ("dylora", "lifecycle", "old_way", "novelty", "stream")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            del sys.modules[name]


LOW = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(1))
HIGH = LOW + 128
TEXTS = torch.cat([LOW, HIGH])


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return make_llama(16, 2).requires_grad_(False)


@pytest.fixture(scope="module")
def fit(example):
    return example["lifecycle"].fit


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """`old_way.py` with its import line changed."""
    source = (FOLDER / "old_way.py").read_text()
    assert source.count(IMPORT) == 1
    path = tmp_path_factory.mktemp("changed") / "changed_way.py"
    path.write_text(source.replace(IMPORT, IMPORT.replace("peft", "moelora", 1)))
    spec = importlib.util.spec_from_file_location("changed_way", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def learned(example, changed, base, fit):
    """For each module a DyLoRAMoE that has learned two tasks."""

    def learn(module):
        torch.manual_seed(2)
        moe = module.DyLoRAMoE(copy.deepcopy(base))
        moe.learn_alone("expert_0")
        fit(moe.model, LOW, 3)
        moe.keep("expert_0")
        moe.learn_alone(moe.add_expert())
        fit(moe.model, HIGH, 3)
        moe.learn_to_mix()
        fit(moe.model, TEXTS, 3)
        moe.keep("expert_1")
        moe.model.eval()
        return moe

    modules = {"old_way": example["old_way"], "dylora": example["dylora"], "changed": changed}
    return {name: learn(module) for name, module in modules.items()}


def parameters(moe, kind):
    return {name: p.detach().clone() for name, p in moe.model.named_parameters() if kind in name}


def changes(moe, before, kind):
    return {name for name, p in parameters(moe, kind).items() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("name", ["old_way", "dylora"])
class TestBothWays:
    def test_one_expert_learns_at_a_time_and_the_router_when_they_mix(self, name, learned, fit):
        moe = copy.deepcopy(learned[name])
        new = moe.add_expert()
        adapters, gates = parameters(moe, "lora_"), parameters(moe, "router")
        assert gates
        moe.learn_alone(new)
        fit(moe.model, HIGH, 2)
        alone = changes(moe, adapters, "lora_")
        assert alone
        assert all(f".{new}." in parameter for parameter in alone)
        assert not changes(moe, gates, "router")
        adapters = parameters(moe, "lora_")
        moe.learn_to_mix()
        fit(moe.model, TEXTS, 2)
        assert changes(moe, adapters, "lora_") == {parameter for parameter in adapters if f".{new}." in parameter}
        assert changes(moe, gates, "router") == set(gates)

    def test_a_young_expert_is_held_back(self, name, learned):
        moe = copy.deepcopy(learned[name])
        with torch.no_grad():
            mixed = moe.model(input_ids=HIGH).logits
            moe.set_maturity("expert_1", 1e-30)
            held_back = moe.model(input_ids=HIGH).logits
            moe.learn_alone("expert_0")
            first = moe.model(input_ids=HIGH).logits
        torch.testing.assert_close(held_back, first, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(mixed, first, rtol=1e-5, atol=1e-6)


def test_a_new_expert_changes_no_output_in_one_pass(learned):
    moe = copy.deepcopy(learned["dylora"])
    with torch.no_grad():
        before = moe.model(input_ids=LOW).logits
        moe.add_expert()
        assert torch.equal(moe.model(input_ids=LOW).logits, before)


def test_a_detector_recognises_what_is_near_and_keeps_that_in_a_file(example, tmp_path):
    detector = example["novelty"].NoveltyDetector(torch.tensor([1.0, 1.0]), threshold=0.8)
    assert detector.recognise(torch.tensor([2.0, 1.0])) is None  # nothing is known yet
    detector.remember("east", torch.tensor([2.0, 1.0]))
    detector.remember("north", torch.tensor([1.0, 2.0]))
    assert detector.recognise(torch.tensor([9.0, 2.0])) == "east"
    assert detector.recognise(torch.tensor([1.1, 1.9])) == "north"
    assert detector.recognise(torch.tensor([2.0, 2.0])) is None  # similarity 0.71 with both
    assert detector.similarities(torch.tensor([0.0, 1.0])) == pytest.approx({"east": -1, "north": 0})
    detector.save(tmp_path / "skills.safetensors")
    again = example["novelty"].NoveltyDetector.load(tmp_path / "skills.safetensors")
    assert again.recognise(torch.tensor([9.0, 2.0])) == "east"
    assert again.recognise(torch.tensor([2.0, 2.0])) is None


class TestTheImportLine:
    """What README.md and docs/migration.md promise of a project that uses PEFT, on `old_way.py`."""

    def test_it_trains_saves_and_loads_with_the_same_bits(self, learned, changed, base, tmp_path):
        old, new = learned["old_way"], learned["changed"]
        assert type(old.peft_model.base_model) is peft.LoraModel
        assert type(new.peft_model.base_model) is moelora.peft.LoraModel
        assert not changes(new, parameters(old, ""), "")
        with torch.no_grad():
            expected = old.model(LOW).logits
            assert torch.equal(new.model(LOW).logits, expected)
            old.save(tmp_path)
            loaded = changed.DyLoRAMoE.load(copy.deepcopy(base), tmp_path)
            assert torch.equal(loaded.model.eval()(LOW).logits, expected)

    def test_then_one_call_gives_the_old_logits(self, learned):
        moe = learned["changed"]
        with torch.no_grad():
            expected = moe.model(HIGH).logits
            weights = moe.model.router(moe.hidden_states(HIGH))
            got = moe.peft_model(input_ids=HIGH, routing_weights=weights, mixture="logits").logits
            in_layers = moe.peft_model(input_ids=HIGH, routing_weights=weights).logits
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (in_layers - expected).abs().max() > 1e-5 * expected.abs().max()

    def test_moelora_run_routes_it_without_a_change(self, tmp_path):
        script = tmp_path / "project.py"
        script.write_text(PROJECT.format(folder=str(FOLDER)))
        assert float(python("-m", "moelora", "run", script)) < 1e-5


PROJECT = """
import sys
sys.path.insert(0, {folder!r})
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import old_way

torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
moe = old_way.DyLoRAMoE(LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False))
moe.add_expert()
for name, parameter in moe.model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.2)
moe.keep("expert_1")
ids = torch.arange(7)[None]
with torch.no_grad():
    expected = moe.model.eval()(ids).logits
    weights = moe.model.router(moe.hidden_states(ids))
    got = moe.peft_model(input_ids=ids, routing_weights=weights, mixture="logits").logits
print(float((got - expected).abs().max() / expected.abs().max()))
"""
