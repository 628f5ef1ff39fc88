"""Folders of mixtures: saved whole or not at all, opened whole or not at all."""

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import warnings
from functools import partial
from itertools import count
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moelora
from moelora import MoELoraConfig, PeftModel, adopt
from moelora.nn import FixedRouter, PerLayerRouter
from moelora.peft import commit
from moelora.peft.checkpoint import read_mixture

NAMES = ["expert_0", "expert_1", "expert_2"]
TARGETS = ["q_proj", "down_proj"]


def mixture(base, n=3, *, seed=0, r=4, names=None):
    """A model with n experts and a router, all of whose tensors depend on the seed."""
    torch.manual_seed(seed)
    names = names or [f"expert_{i}" for i in range(n)]
    plain = peft.LoraConfig(target_modules=TARGETS, r=r, task_type="CAUSAL_LM")
    model = moelora.get_peft_model(base, plain, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(plain))
    moelora.activate_all_experts(model)
    sizes = base.config
    router = PerLayerRouter(names, sizes.hidden_size, num_layers=sizes.num_hidden_layers, top_k=2)
    model.base_model.attach_router(router, MoELoraConfig(num_experts=n, router_aux_loss_coef=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".router." in name:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def make(make_base):
    return lambda *args, **options: mixture(make_base("llama"), *args, **options)


@pytest.fixture
def opened(make_base):
    return lambda folder, **options: PeftModel.from_pretrained(make_base("llama"), folder, **options)


@pytest.mark.parametrize("names", [NAMES, ["default", "b"]], ids=["free root", "default at the root"])
def test_a_configuration_alone_does_not_take_the_place_of_a_set(tmp_path, make, opened, names):
    make(len(names), names=names).save_pretrained(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="holds a mixture with its experts"):
        MoELoraConfig().save_pretrained(tmp_path)
    assert files(tmp_path) == before
    assert opened(tmp_path).base_model.has_router()


def tensors(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items() if "lora_" in name or ".router." in name}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def document(folder):
    return json.loads((folder / "moe_lora.json").read_text())


class TestAWholeMixture:
    def test_keeps_the_order_of_twelve_experts(self, make, opened, ids, tmp_path):
        model = make(12)
        model.save_pretrained(tmp_path)
        names = [f"expert_{i}" for i in range(12)]
        again = opened(tmp_path)
        assert list(again.peft_config) == again.base_model.active_adapters == names
        assert equal(tensors(again), tensors(model))
        assert torch.equal(again(ids).logits, model(ids).logits)
        for name in ("moe_lora.json", "router.safetensors", "adapter_model.safetensors"):
            (tmp_path / name).unlink()
        plain = opened(tmp_path)
        assert list(plain.peft_config) == plain.base_model.active_adapters == names
        assert plain.base_model.router is None

    def test_has_its_state(self, make, opened, ids, tmp_path):
        model = make()
        router = model.base_model.router
        router.mark_mature("expert_1", 0.25)
        router.activated[2] = False
        model.base_model.set_adapter(["expert_2", "expert_0"])
        model.base_model.frozen_experts = {"expert_2"}
        model.save_pretrained(tmp_path)
        again = opened(tmp_path, is_trainable=True).eval()
        assert again.base_model.active_adapters == ["expert_2", "expert_0"]
        assert again.base_model.router.maturity.tolist() == [1, 0.25, 1]
        assert again.base_model.router.activated.tolist() == [True, True, False]
        assert again.base_model.frozen_experts == {"expert_2"}
        trainable = {name.split(".")[-2] for name, p in again.named_parameters() if p.requires_grad and "lora_" in name}
        assert trainable == {"expert_0"}
        assert torch.equal(again(ids).logits, model(ids).logits)

    def test_lists_size_and_hash_of_each_of_its_files(self, make, tmp_path):
        make().save_pretrained(tmp_path)
        listed = document(tmp_path)["files"]
        content = files(tmp_path)
        assert listed.keys() == content.keys() - {"README.md", "moe_lora.json"}
        for name, known in listed.items():
            assert known == {"size": len(content[name]), "sha256": hashlib.sha256(content[name]).hexdigest()}

    def test_is_replaced_by_another(self, make, opened, tmp_path):
        first, second = make(4, seed=1), make(2, seed=2, r=3)
        first.save_pretrained(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        second.save_pretrained(tmp_path)
        second.save_pretrained(tmp_path)
        assert equal(tensors(opened(tmp_path)), tensors(second))
        assert (tmp_path / "expert_3" / "adapter_model.safetensors").exists()  # of the older set, left where it is
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())

    @pytest.mark.parametrize("adapter", ["default", "expert_0"])
    def test_is_replaced_by_a_single_adapter(self, make, make_base, opened, ids, tmp_path, adapter):
        make().save_pretrained(tmp_path)
        config = peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
        single = moelora.get_peft_model(make_base("llama"), config, adapter_name=adapter).eval()
        single.save_pretrained(tmp_path)
        again = opened(tmp_path)
        assert list(again.peft_config) == [adapter]
        assert torch.equal(again(ids).logits, single(ids).logits)
        folder = tmp_path if adapter == "default" else tmp_path / adapter
        assert torch.equal(peft.PeftModel.from_pretrained(make_base("llama"), folder)(ids).logits, single(ids).logits)

    def test_as_pickles_is_opened_too_and_takes_the_place_of_safetensors(self, make, opened, tmp_path):
        make(seed=1).save_pretrained(tmp_path)
        model = make(seed=2)
        model.save_pretrained(tmp_path, safe_serialization=False)
        assert not (tmp_path / "expert_1" / "adapter_model.safetensors").exists()
        assert equal(tensors(opened(tmp_path)), tensors(model))
        model = make(seed=3)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "expert_1" / "adapter_model.bin").exists()
        assert equal(tensors(opened(tmp_path)), tensors(model))

    @pytest.mark.parametrize("kind", [str, Path])
    def test_goes_to_relative_paths_that_are_not_there_yet(self, make, opened, tmp_path, monkeypatch, kind):
        monkeypatch.chdir(tmp_path)
        model = make()
        model.save_pretrained(kind("new/inner"))
        assert equal(tensors(opened(kind("new/inner"))), tensors(model))

    def test_is_not_written_by_other_processes_than_the_main_one(self, make, opened, tmp_path):
        model = make()
        model.save_pretrained(tmp_path, is_main_process=False)
        assert not files(tmp_path)
        model.save_pretrained(tmp_path)
        before = files(tmp_path)
        make(seed=1).save_pretrained(tmp_path, is_main_process=False)
        assert files(tmp_path) == before

    def test_takes_the_tensors_of_a_given_state(self, make, opened, tmp_path):
        model, other = make(seed=1), make(seed=2)
        model.save_pretrained(tmp_path, state_dict=other.state_dict())
        assert equal(tensors(opened(tmp_path)), tensors(other))

    def test_keeps_what_people_wrote_on_the_card(self, make, tmp_path):
        model = make()
        model.save_pretrained(tmp_path)
        card = tmp_path / "README.md"
        card.write_text(card.read_text() + "\nTrained with care.\n")
        model.save_pretrained(tmp_path)
        assert "Trained with care." in card.read_text()

    def test_is_not_saved_over_a_file(self, make, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="file must be a folder, it is a file"):
            make().save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("way", ["file for a folder", "folder for a file", "link that leads out"])
    def test_is_saved_only_where_nothing_is_in_the_way(self, make, tmp_path, way):
        target, outside = tmp_path / "target", tmp_path / "outside"
        outside.mkdir()
        target.mkdir()
        if way == "file for a folder":
            (target / "expert_1").write_text("mine")
        elif way == "folder for a file":
            (target / "router.safetensors").mkdir()
        else:
            (target / "expert_1").symlink_to(outside)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="is in the way|leads out"):
            make().save_pretrained(target)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("name", ["/elsewhere", "up\\down", "double//slash"])  # torch allows no dots in them
    def test_can_not_have_experts_that_leave_the_folder(self, make, tmp_path, name):
        model = make(2, names=["good", name])
        with pytest.raises(ValueError, match="can't have a folder of this name"):
            model.save_pretrained(tmp_path)
        assert not files(tmp_path)

    def test_may_have_experts_in_folders_of_folders(self, make, opened, tmp_path):
        model = make(2, names=["team/code", "team/prose"])
        model.save_pretrained(tmp_path)
        assert equal(tensors(opened(tmp_path)), tensors(model))

    def test_leaves_the_old_one_where_it_can_not_be_written(self, make, tmp_path, monkeypatch):
        make(seed=1).save_pretrained(tmp_path)
        before = files(tmp_path)

        def full(*args):
            raise OSError("no space")

        monkeypatch.setattr(commit.os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            make(seed=2).save_pretrained(tmp_path)
        assert files(tmp_path) == before


class TestOneExpertSavedAnew:
    def test_belongs_to_the_set(self, make, opened, tmp_path):
        first, second = make(seed=1), make(seed=2, r=6)
        first.save_pretrained(tmp_path)
        second.save_pretrained(tmp_path, selected_adapters=["expert_1"])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            again = tensors(opened(tmp_path))
        for name, tensor in again.items():
            assert torch.equal(tensor, tensors(second if "expert_1" in name else first)[name])
        listed = document(tmp_path)["files"]
        assert all(listed[name]["size"] == len(content) for name, content in files(tmp_path).items() if name in listed)
        assert listed.keys() == files(tmp_path).keys() - {"README.md", "moe_lora.json"}

    def test_by_stock_peft_is_taken_with_a_warning(self, make, make_lora, opened, tmp_path):
        first = make(seed=1)
        first.save_pretrained(tmp_path)
        stock = make_lora("llama", target_modules=TARGETS, r=6)
        stock.save_pretrained(tmp_path, selected_adapters=["expert_1"])
        with pytest.warns(UserWarning, match="expert_1 changed after the set was saved"):
            again = tensors(opened(tmp_path))
        for name, tensor in again.items():
            assert torch.equal(tensor, (stock.state_dict() if "expert_1" in name else tensors(first))[name])

    def test_beside_a_set_it_is_not_of_stays_outside(self, make, opened, tmp_path):
        first = make(seed=1)
        first.save_pretrained(tmp_path)
        make(5, seed=2).save_pretrained(tmp_path, selected_adapters=["expert_4"])
        assert (tmp_path / "expert_4" / "adapter_model.safetensors").exists()
        assert equal(tensors(opened(tmp_path)), tensors(first))

    def test_called_default_leaves_the_set_what_it_is(self, make, opened, tmp_path):
        names = ["default", "other"]
        first, second = make(2, seed=1, names=names), make(2, seed=2, names=names)
        first.save_pretrained(tmp_path)
        second.save_pretrained(tmp_path, selected_adapters=["default"])
        again = tensors(opened(tmp_path))
        for name, tensor in again.items():
            assert torch.equal(tensor, tensors(second if "default" in name else first)[name])

    def test_for_another_base_is_refused(self, make, opened, tmp_path):
        model = make()
        self.name_bases(model, tmp_path, ["a", "a", "a"])
        model.save_pretrained(tmp_path / "set")
        path = tmp_path / "set" / "expert_1" / "adapter_config.json"
        path.write_text(path.read_text().replace(str(tmp_path / "a"), "b"))
        with pytest.raises(ValueError, match="expert_1.adapter_config.json is for the base model 'b', the other .*a'"):
            opened(tmp_path / "set")

    def test_of_several_bases_is_opened_as_it_was_saved(self, make, opened, tmp_path):
        model = make()
        self.name_bases(model, tmp_path, ["a", "b", "c"])
        model.save_pretrained(tmp_path / "set")
        assert equal(tensors(opened(tmp_path / "set")), tensors(model))

    @staticmethod
    def name_bases(model, folder, names):
        for config, name in zip(model.peft_config.values(), names, strict=True):
            model.get_base_model().config.save_pretrained(folder / name)  # PEFT looks for it
            config.base_model_name_or_path = str(folder / name)


CHANGES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}


def killed_at(k, folder, act):
    """Run `act` in a child that is killed before its k-th change below `folder`; whether it was."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    try:
        steps = count()

        def hook(event, arguments):
            writes = event in CHANGES and (event != "open" or arguments[1] not in ("r", "rb", None))
            if writes and str(folder) in str(arguments[0]) and next(steps) == k:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda descriptor: None  # slow, and a kill does not undo what was written
        sys.addaudithook(hook)
        act()
        os._exit(0)
    finally:
        os._exit(1)


def tiny_base():
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def open_tiny(folder):
    return PeftModel.from_pretrained(tiny_base(), folder)


def check_visible_files(folder):
    for path in folder.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            safetensors.torch.load_file(path)


class TestAKill:
    @pytest.mark.parametrize("case", ["first", "over an older set", "one expert"])
    def test_at_any_point_leaves_the_old_set_or_the_new(self, tmp_path, case):
        old, new = mixture(tiny_base(), 3, seed=1), mixture(tiny_base(), 2, seed=2, r=5)
        if case == "over an older set":
            new.base_model.detach_router()
        start, expected = tmp_path / "start", {}
        start.mkdir()
        if case != "first":
            old.save_pretrained(start)
            expected["old"] = tensors(old)
        selected = ["expert_1"] if case == "one expert" else None
        whole = shutil.copytree(start, tmp_path / "whole")
        new.save_pretrained(whole, selected_adapters=selected)
        expected["new"] = tensors(open_tiny(whole))
        seen = []
        for k in count():
            folder = shutil.copytree(start, tmp_path / f"killed-{k}")
            killed = killed_at(k, folder, partial(new.save_pretrained, folder, selected_adapters=selected))
            check_visible_files(folder)
            assert killed or not any(path.name.startswith(".") for path in folder.iterdir())
            if case == "first" and not commit.pending(folder) and not (folder / "moe_lora.json").exists():
                seen.append("old")
                with pytest.raises(ValueError, match="adapter_config.json"):
                    open_tiny(folder)
            else:
                found = tensors(open_tiny(folder))
                seen += [name for name, model in expected.items() if equal(found, model)]
                assert not commit.pending(folder)
                check_visible_files(folder)
            assert len(seen) == k + 1
            if not killed:
                break
        assert seen == sorted(seen, reverse=True)  # first the old ones, then the new
        assert seen.count("old") > 10
        assert seen.count("new") > 5

    def test_of_the_reader_that_goes_on_is_harmless_too(self, tmp_path, monkeypatch):
        new = mixture(tiny_base(), 2, seed=2)
        mixture(tiny_base(), 3, seed=1).save_pretrained(tmp_path / "start")
        monkeypatch.setattr("moelora.peft.commit.settle", lambda target: None)
        new.save_pretrained(tmp_path / "start")
        monkeypatch.undo()
        assert commit.pending(tmp_path / "start")
        for k in count():
            folder = shutil.copytree(tmp_path / "start", tmp_path / f"killed-{k}")
            killed = killed_at(k, folder, partial(read_mixture, folder))
            check_visible_files(folder)
            assert equal(tensors(open_tiny(folder)), tensors(new))
            if not killed:
                break
        assert k > 5

    def test_of_the_machine_finds_files_that_count_on_the_disk(self, tmp_path, monkeypatch):
        synced, fsync, rename = set(), os.fsync, os.rename

        def noting(descriptor):
            synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def checking(source, target):
            written = {str(path) for path in (source, *source.rglob("*"))}
            assert written <= synced
            assert len(written) > 5
            synced.clear()
            rename(source, target)

        monkeypatch.setattr(commit.os, "fsync", noting)
        monkeypatch.setattr(commit.os, "rename", checking)
        mixture(tiny_base(), 2).save_pretrained(tmp_path)
        assert synced == {str(tmp_path), str(tmp_path / "expert_0"), str(tmp_path / "expert_1")}

    def test_is_followed_by_a_save_that_cleans_up(self, make, opened, tmp_path):
        new, newest = make(2, seed=2), make(2, seed=3)
        make(3, seed=1).save_pretrained(tmp_path)
        assert killed_at(12, tmp_path, lambda: new.save_pretrained(tmp_path))
        assert (tmp_path / commit.STAGED).exists()
        newest.save_pretrained(tmp_path)
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
        assert equal(tensors(opened(tmp_path)), tensors(newest))

    def test_is_read_through_where_nothing_can_be_written(self, make, opened, tmp_path, monkeypatch):
        new = make(2, seed=2)
        make(3, seed=1).save_pretrained(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("moelora.peft.commit.settle", lambda target: None)
            new.save_pretrained(tmp_path)
        (tmp_path / commit.COMMITTED / "expert_1" / "adapter_config.json").rename(  # one file was moved already
            tmp_path / "expert_1" / "adapter_config.json"
        )
        before = files(tmp_path)

        def read_only(*args):
            raise PermissionError("read-only")

        monkeypatch.setattr(commit.os, "replace", read_only)
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("TMPDIR", str(tmp_path.parent))
        again = opened(tmp_path)
        assert equal(tensors(again), tensors(new))
        assert files(tmp_path) == before
        assert not list(tmp_path.parent.glob("moelora-*"))  # the copy is gone

    def test_can_not_be_feigned_to_write_elsewhere(self, tmp_path, opened):
        target, outside = tmp_path / "target", tmp_path / "outside"
        outside.mkdir()
        (target / commit.COMMITTED / "expert_0").mkdir(parents=True)
        (target / commit.COMMITTED / "expert_0" / "file").write_text("theirs")
        (target / "expert_0").symlink_to(outside)
        with pytest.raises(ValueError, match="leads out of"):
            opened(target)
        (target / "expert_0").unlink()
        (outside / "file").write_text("mine")
        (target / commit.COMMITTED / commit.SUPERSEDED).write_text('["../outside/file"]')
        with pytest.raises(ValueError, match="leads out of"):
            opened(target)
        assert (outside / "file").read_text() == "mine"
        for content in ("{", "5", "[5]"):
            (target / commit.COMMITTED / commit.SUPERSEDED).write_text(content)
            with pytest.raises(ValueError, match=r"superseded.json is no list of names"):
                opened(target)


def edit(name, change):
    def apply(folder):
        path = folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def edit_tensors(name, change):
    def apply(folder):
        state = safetensors.torch.load_file(folder / name)
        change(state)
        safetensors.torch.save_file(state, folder / name)

    return apply


def cut(name):
    def apply(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-7])

    return apply


WEIGHTS = "expert_1/adapter_model.safetensors"
A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
MANIFEST = "moe_lora.json"
ROUTER = "router.safetensors"
BROKEN = {
    "no JSON": (lambda f: (f / MANIFEST).write_text("{"), "moe_lora.json is no JSON"),
    "no text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{}"), "moe_lora.json is no JSON"),
    "no object": (lambda f: (f / MANIFEST).write_text("[]"), "moe_lora.json must hold a JSON object, got list"),
    "a later version": (edit(MANIFEST, lambda d: d.update(format_version=2)), "has format version 2, expected 1"),
    "no version": (edit(MANIFEST, lambda d: d.pop("format_version")), "has format version None, expected 1"),
    "a field less": (edit(MANIFEST, lambda d: d.pop("active")), "moe_lora.json: 'active' is missing"),
    "no config": (edit(MANIFEST, lambda d: d.pop("config")), "must have an object or null as 'config'"),
    "a field more": (edit(MANIFEST, lambda d: d.update(more=1)), "moe_lora.json: 'more' is unknown"),
    "a field of another type": (edit(MANIFEST, lambda d: d.update(experts="abc")), "'experts' is of type str"),
    "an unknown setting": (edit(MANIFEST, lambda d: d["config"].update(more=1)), r"unknown fields \['more'\]"),
    "a setting of another type": (
        edit(MANIFEST, lambda d: d["config"].update(top_k_experts="2")),
        "top_k_experts must be of type int, got '2'",
    ),
    "a setting out of range": (
        edit(MANIFEST, lambda d: d["config"].update(num_experts=1)),
        "moe_lora.json: num_experts must be at least 2",
    ),
    "no experts": (edit(MANIFEST, lambda d: d.update(experts=[])), "experts must be one or more different names"),
    "an expert twice": (edit(MANIFEST, lambda d: d.update(experts=["expert_0"] * 2)), "one or more different names"),
    "numbers as experts": (edit(MANIFEST, lambda d: d.update(experts=[0, 1])), "one or more different names"),
    "an expert above": (edit(MANIFEST, lambda d: d["experts"].append("../x")), "can't have a folder of this name"),
    "an expert elsewhere": (edit(MANIFEST, lambda d: d["experts"].append("/tmp")), "can't have a folder of this name"),
    "an unknown active expert": (
        edit(MANIFEST, lambda d: d["active"].append("expert_7")),
        "'active' must name some of the experts",
    ),
    "a file elsewhere": (edit(MANIFEST, lambda d: d["files"].update({"../x": {}})), "'../x' leads out of the folder"),
    "a file without size": (edit(MANIFEST, lambda d: d["files"][ROUTER].pop("size")), "must give 'size' and 'sha256'"),
    "a router without class": (edit(MANIFEST, lambda d: d["router"].pop("class")), "'router' must have a 'class'"),
    "a router of no class": (
        edit(MANIFEST, lambda d: d["router"].update({"class": "build_router"})),
        "router of class build_router, which moelora can't make",
    ),
    "a router with other arguments": (
        edit(MANIFEST, lambda d: d["router"]["arguments"].update(more=1)),
        "has a router that can't be made: .*more",
    ),
    "a router beyond all memory": (
        edit(MANIFEST, lambda d: d["router"]["arguments"].update(input_size=10**12)),
        "has a router that can't be made: .*memory",
    ),
    "no folder": (lambda f: shutil.rmtree(f / "expert_1"), "expert_1.* is missing"),
    "no folder, and none listed": (
        lambda f: (edit(MANIFEST, lambda d: d.update(files={}))(f), shutil.rmtree(f / "expert_1")),
        "expert_1 is missing: it should be the folder of an adapter",
    ),
    "no file": (lambda f: (f / WEIGHTS).unlink(), "expert_1.adapter_model.safetensors is missing"),
    "no router": (lambda f: (f / ROUTER).unlink(), "router.safetensors is missing"),
    "half a router": (cut(ROUTER), "router.safetensors.* instead of"),
    "half an expert": (cut(WEIGHTS), "expert_1.adapter_model.safetensors is no whole safetensors file"),
    "another router": (
        edit_tensors(ROUTER, lambda s: s.update({"gate.0.weight": torch.ones(3, 31)})),
        "router.safetensors has .* bytes instead of",
    ),
    "a router for another model": (
        edit(MANIFEST, lambda d: d["router"]["arguments"].update(input_size=31)),
        r"router.safetensors is not of this PerLayerRouter: gate.0.weight has shape \(3, 32\) instead of \(3, 31\)",
    ),
    "a tensor less": (
        edit_tensors(WEIGHTS, lambda s: (s.pop(A), s.pop(B))),
        f"expert_1.adapter_model.safetensors does not fit the model: {A} is missing",
    ),
    "A without B": (edit_tensors(WEIGHTS, lambda s: s.pop(B)), f"{A}, but .*lora_B.weight is missing"),
    "B without A": (edit_tensors(WEIGHTS, lambda s: s.pop(A)), f"{B}, but .*lora_A.weight is missing"),
    "a tensor more": (
        edit_tensors(WEIGHTS, lambda s: s.update({"base_model.model.more": torch.ones(1)})),
        "expert_1.adapter_model.safetensors does not fit the model: base_model.model.more is unknown",
    ),
    "a pickle without tensors": (
        lambda f: (
            (f / WEIGHTS).unlink(),
            edit(MANIFEST, lambda d: d.update(files={}))(f),
            torch.save({"a": 1}, f / "expert_1" / "adapter_model.bin"),
        ),
        "expert_1.adapter_model.bin holds values that are no tensors",
    ),
    "another width": (
        edit_tensors(WEIGHTS, lambda s: s.update({A: torch.ones(4, 31)})),
        "expert_1.adapter_model.safetensors does not fit the model: .*size mismatch .*q_proj.lora_A",
    ),
    "another rank": (
        edit_tensors(WEIGHTS, lambda s: s.update({A: torch.ones(5, 32)})),
        r"expert_1.adapter_model.safetensors: .*lora_A.weight has shape \(5, 32\), .*\(32, 4\): no common rank",
    ),
    "broken settings of an expert": (
        lambda f: (f / "expert_1" / "adapter_config.json").write_text("{"),
        "expert_1.adapter_config.json is no JSON",
    ),
    "no type of adapter": (
        edit("expert_1/adapter_config.json", lambda d: d.pop("peft_type")),
        "expert_1.adapter_config.json must say a 'peft_type', got None",
    ),
    "layers that are no names": (
        edit("expert_1/adapter_config.json", lambda d: d.update(target_modules=[5])),
        r"expert_1.adapter_config.json must have names as 'target_modules', got \[5\]",
    ),
    "other layers": (
        edit("expert_1/adapter_config.json", lambda d: d.update(target_modules=["k_proj", "down_proj"])),
        "expert_1.adapter_model.safetensors does not fit the model: .*k_proj.lora_A.weight is missing",
    ),
    "layers that are not there": (
        edit("expert_1/adapter_config.json", lambda d: d.update(target_modules=["no_proj"])),
        "expert_1.adapter_model.safetensors does not fit the model: (Target modules|.*lora_A.weight is unknown)",
    ),
}


def looks(model):
    """What a failure must leave alone."""
    modules = {name: (id(m), type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
    return (
        modules,
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        hasattr(model, "peft_config"),
    )


class TestABrokenFolder:
    @pytest.mark.parametrize("case", BROKEN)
    @pytest.mark.filterwarnings("ignore:.*changed after the set was saved", "ignore:Found missing adapter keys")
    def test_is_refused_naming_the_file_and_leaves_the_model_as_it_was(self, make, make_base, ids, tmp_path, case):
        make().save_pretrained(tmp_path)
        spoil, message = BROKEN[case]
        spoil(tmp_path)
        base = make_base("llama").train()
        expected, before = base(ids).logits, looks(base)
        with pytest.raises(ValueError, match="(?s)" + message) as caught:
            PeftModel.from_pretrained(base, tmp_path)
        assert re.search(re.escape(str(tmp_path)), str(caught.value))
        assert looks(base) == before
        assert torch.equal(base(ids).logits, expected)

    def test_can_be_saved_over(self, make, opened, tmp_path):
        model = make()
        (tmp_path / "moe_lora.json").write_text("{")
        model.save_pretrained(tmp_path)
        assert equal(tensors(opened(tmp_path)), tensors(model))

    def test_is_not_half_loaded_into_experts_that_exist(self, make, tmp_path):
        make(seed=1).save_pretrained(tmp_path)
        BROKEN["a tensor less"][0](tmp_path)
        model = make(seed=2)
        before = tensors(model)
        mixture = read_mixture(tmp_path)
        with (
            pytest.warns(UserWarning, match="changed after"),
            pytest.raises(ValueError, match="does not fit the model's adapter 'expert_1': .*lora_A.weight is missing"),
        ):
            model._restore(mixture)
        assert equal(tensors(model), before)

    def test_with_too_wide_a_router_leaves_the_model_as_it_was(self, make, make_base, tmp_path):
        model = make()
        model.base_model._modules["router"] = PerLayerRouter(NAMES, 31, num_layers=3)
        model.save_pretrained(tmp_path)
        base = make_base("llama")
        before = looks(base)
        with pytest.raises(ValueError, match="router reads inputs of width 31"):
            PeftModel.from_pretrained(base, tmp_path)
        assert looks(base) == before
        assert PeftModel.from_pretrained(base, tmp_path / "expert_0", adapter_name="expert_0").base_model.router is None


class TestFoldersWithoutOurFile:
    def test_of_stock_peft_are_opened_in_numeric_order(self, make_lora, opened, ids, weights, tmp_path):
        stock = make_lora("llama", n=12, target_modules=TARGETS)
        stock.save_pretrained(tmp_path)
        names = [f"expert_{i}" for i in range(12)]
        again = opened(tmp_path)
        assert list(again.peft_config) == again.base_model.active_adapters == names
        state = stock.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors(again).items())

    def test_with_an_adapter_at_the_root_are_pefts(self, make_lora, opened, tmp_path):
        stock = make_lora("llama", target_modules=TARGETS)
        stock.save_pretrained(tmp_path)
        shutil.copytree(tmp_path / "expert_2", tmp_path, dirs_exist_ok=True)
        assert list(opened(tmp_path).peft_config) == ["default"]

    @pytest.mark.parametrize("nested", [1, 2])
    @pytest.mark.parametrize("inside", ["peft_adapters", "."])
    def test_of_dylora_are_opened(self, make_lora, opened, tmp_path, nested, inside):
        stock = make_lora("llama", target_modules=TARGETS)
        for name in NAMES:
            folder = tmp_path / inside / name
            stock.save_pretrained(folder if nested == 2 else folder.parent, selected_adapters=[name])
        (tmp_path / "config.json").write_text('{"model_name": "tiny", "num_experts": 3, "lora_r": 4}')
        again = opened(tmp_path)
        assert list(again.peft_config) == NAMES
        assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in tensors(again).items())

    def test_that_lack_one_are_refused(self, make_lora, opened, tmp_path):
        make_lora("llama", target_modules=TARGETS).save_pretrained(tmp_path)
        (tmp_path / "expert_1" / "adapter_config.json").unlink()
        with pytest.raises(ValueError, match="expert_1: no adapter_config.json there"):
            opened(tmp_path)

    def test_with_experts_for_several_bases_are_refused(self, make_lora, opened, tmp_path):
        make_lora("llama", target_modules=TARGETS).save_pretrained(tmp_path)
        for name, base in zip(NAMES, "aab", strict=True):
            edit(f"{name}/adapter_config.json", partial(dict.update, base_model_name_or_path=base))(tmp_path)
        with pytest.raises(ValueError, match="expert_2.* is for the base model 'b', the other experts are for 'a'"):
            opened(tmp_path)


class TestATrainersFolder:
    def test_of_an_older_set_brings_no_stale_experts_back(self, make, tmp_path):
        make(4, seed=1).save_pretrained(tmp_path)
        make(2, seed=2).save_pretrained(tmp_path)
        model = make(2, seed=3)
        trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none"))
        trainer._load_from_checkpoint(str(tmp_path))
        assert list(model.peft_config) == ["expert_0", "expert_1"]
        assert equal(tensors(model), tensors(make(2, seed=2)))

    def test_may_be_inside_that_of_another_set(self, make, make_base, tmp_path):
        make(2, seed=1).save_pretrained(tmp_path)
        make(2, seed=2).save_pretrained(tmp_path / "checkpoint-1")
        config = peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
        single = moelora.get_peft_model(make_base("llama"), config)
        single.save_pretrained(tmp_path / "checkpoint-2")
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
        model = make(2, seed=3)
        Trainer(model=model, args=arguments)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
        assert equal(tensors(model), tensors(make(2, seed=2)))
        other = moelora.get_peft_model(make_base("llama"), config)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        Trainer(model=other, args=arguments)._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
        assert equal(tensors(other), tensors(single))


def test_a_fixed_router_and_no_config_come_back(make_lora, make_base, ids, tmp_path):
    model = adopt(make_lora("llama", target_modules=TARGETS))
    model.base_model.attach_router(FixedRouter(NAMES, [3, 1, 2]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base("llama"), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert isinstance(again.base_model.router, nn.Module)
    assert again.base_model.moe_config is None
