"""`moelora inspect`: it says what a folder holds and what is wrong with it, and changes nothing."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from moelora import adopt
from moelora.cli import main
from moelora.nn import PerLayerRouter
from moelora.peft import MoELoraConfig, commit
from moelora.peft.inspection import inspect_checkpoint

NAMES = ["expert_0", "expert_1", "expert_2"]


@pytest.fixture
def model(make_lora):
    torch.manual_seed(0)
    model = adopt(make_lora("llama", target_modules=["q_proj", "down_proj"]))
    model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3, top_k=2), MoELoraConfig(num_experts=3))
    return model


@pytest.fixture
def saved(model, tmp_path):
    model.base_model.set_adapter(["expert_0", "expert_2"])
    model.base_model.frozen_experts = {"expert_2"}
    model.save_pretrained(tmp_path / "set")
    return tmp_path / "set"


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_says_what_a_set_holds(model, saved, capsys):
    assert main(["inspect", str(saved), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "moelora"
    assert report["format_version"] == 1
    assert [expert["name"] for expert in report["experts"]] == NAMES
    for i, expert in enumerate(report["experts"]):
        assert expert["ranks"] == [4]
        assert expert["alpha"] == 6
        assert expert["target_modules"] == ["down_proj", "q_proj"]
        own = [p.numel() for name, p in model.named_parameters() if f".expert_{i}." in name]
        assert expert["parameters"] == sum(own)
        assert expert["active"] == (i != 1)
        assert expert["frozen"] == (i == 2)
    assert report["router"]["class"] == "PerLayerRouter"
    assert report["router"]["arguments"]["top_k"] == 2
    assert report["router"]["parameters"] == sum(t.numel() for t in model.base_model.router.state_dict().values())
    assert report["config"]["num_experts"] == 3
    listed = json.loads((saved / "moe_lora.json").read_text())["files"]
    assert report["bytes"] == sum((saved / name).stat().st_size for name in (*listed, "moe_lora.json"))
    assert report["hashes_match"] is True
    assert report["notes"] == report["problems"] == []


def test_it_prints_it_for_people(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "moelora, format version 1" in out
    assert out.count("active") == 2
    assert "active, frozen down_proj, q_proj" in out
    assert "router: PerLayerRouter" in out
    assert "hashes: match" in out


def spoil_weights(folder):
    path = folder / "expert_1" / "adapter_model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in state.items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_weights, "expert_1/adapter_model.safetensors is not the file that was saved with the set"),
        (lambda f: (f / "router.safetensors").unlink(), "router.safetensors is missing"),
        (lambda f: (f / "router.safetensors").write_bytes(b"x"), "router.safetensors is no whole safetensors file"),
        (lambda f: (f / "expert_2" / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / "moe_lora.json").write_text("{"), "moe_lora.json is no JSON"),
        (lambda f: (f / "expert_0" / "adapter_config.json").write_text("[]"), "adapter_config.json must hold a JSON"),
    ],
)
def test_it_names_what_is_wrong_and_fails(saved, capsys, spoil, problem):
    spoil(saved)
    before = content(saved)
    assert main(["inspect", str(saved)]) == 1
    assert problem in capsys.readouterr().out
    assert content(saved) == before


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "is no folder"),
        (lambda path: path.mkdir(), "holds no experts"),
        (
            lambda path: (
                (path / "peft_adapters").mkdir(parents=True),
                torch.save({}, path / "peft_adapters/expert_0.pt"),
            ),
            "holds no experts but state dicts: run moelora convert",
        ),
    ],
)
def test_it_fails_where_there_is_nothing(tmp_path, capsys, make, problem):
    make(tmp_path / "set")
    assert main(["inspect", str(tmp_path / "set")]) == 1
    assert problem in capsys.readouterr().out


def test_what_the_system_refuses_ends_it_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path / ("a" * 300))])  # longer than names can be
    assert ended.value.code == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_set_that_has_lost_its_document_says_so(saved):
    (saved / "moe_lora.json").unlink()
    (problem,) = inspect_checkpoint(saved)["problems"]
    assert "one that moelora saved needs the moe_lora.json beside it" in problem


def test_it_reads_other_layouts(make_lora, tmp_path):
    stock = make_lora("llama", target_modules=["q_proj"])
    stock.save_pretrained(tmp_path / "peft")
    for name in NAMES:
        stock.save_pretrained(tmp_path / "dylora" / "peft_adapters" / name, selected_adapters=[name])
    for layout in ("peft", "dylora"):
        report = inspect_checkpoint(tmp_path / layout)
        assert report["layout"] == layout
        assert [expert["name"] for expert in report["experts"]] == NAMES
        assert report["hashes_match"] is None
        assert not report["problems"]
    alone = inspect_checkpoint(tmp_path / "peft" / "expert_1")
    assert [expert["name"] for expert in alone["experts"]] == ["default"]
    assert not alone["problems"]


def test_it_names_adapters_that_do_not_belong(make_lora, saved):
    make_lora("llama", n=5, target_modules=["q_proj"]).save_pretrained(saved, selected_adapters=["expert_4"])
    (saved / "adapter_config.json").write_bytes((saved / "expert_0" / "adapter_config.json").read_bytes())
    report = inspect_checkpoint(saved)
    strange = ["the folder itself", "expert_4"]
    assert report["notes"] == [f"{path} is an adapter that does not belong to the set" for path in strange]
    assert not report["problems"]


def test_it_reads_through_an_interrupted_save_and_moves_nothing(model, saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("moelora.peft.commit.settle", lambda target: None)
        model.base_model.set_adapter(["expert_1"])
        model.save_pretrained(saved)
    (saved / commit.STAGED).mkdir()
    before = content(saved)
    report = inspect_checkpoint(saved)
    assert [expert["active"] for expert in report["experts"]] == [False, True, False]
    assert report["hashes_match"] is True
    assert not report["problems"]
    assert "interrupted after it had written everything" in report["notes"][0]
    assert "counts for nothing" in report["notes"][1]
    assert content(saved) == before


@pytest.mark.skipif(os.name != "posix", reason="a pipe that nobody reads is another error elsewhere")
def test_a_reader_that_has_enough_ends_it_without_a_traceback(saved):
    """As `moelora inspect DIR | head -1` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "moelora", "inspect", str(saved), "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1
    assert "BrokenPipe" not in done.stderr, done.stderr
