"""`moelora convert` and DyLoRA-MoE's routers: checkpoints of other layouts give the model that they hold."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from moelora import PeftModel
from moelora.cli import main
from moelora.peft import commit
from moelora.peft.checkpoint import read_mixture
from moelora.peft.convert import convert_checkpoint
from moelora.peft.layouts import find_mixture

NAMES = ["expert_0", "expert_1", "expert_2"]
TARGETS = ["q_proj", "down_proj"]


def tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def stock(make_lora):
    return make_lora("llama", target_modules=TARGETS)


@pytest.fixture
def opened(make_base):
    return lambda folder: PeftModel.from_pretrained(make_base("llama"), folder)


def legacy(folder, model, rename=lambda name, expert: name, n=3):
    """What DyLoRA-MoE's older form is: the LoRA tensors of each expert, by their names in the model."""
    (folder / "peft_adapters").mkdir(parents=True)
    for i in range(n):
        expert = f"expert_{i}"
        state = {rename(name, expert): t for name, t in tensors(model).items() if f".{expert}." in name}
        torch.save(state, folder / "peft_adapters" / f"{expert}.pt")
    return folder


def legacy_router(folder, **changes):
    gate = torch.nn.Linear(32, 3)
    state = {"gate_state_dict": gate.state_dict(), "expert_maturity": torch.ones(3), "num_experts": 3}
    (folder / "dylo_moe_state").mkdir()
    torch.save(
        state | {"input_size": 32, "top_k": 1, "temperature": 2.0} | changes, folder / "dylo_moe_state/router.pt"
    )
    return gate


class TestStateDicts:
    @pytest.mark.parametrize(
        "rename",
        [
            lambda name, expert: name,
            lambda name, expert: name.replace(f".{expert}", ""),
            lambda name, expert: name.replace(f".{expert}", ".default"),
            lambda name, expert: name.removeprefix("base_model.model."),
            lambda name, expert: name.removeprefix("base_model.model.").replace(f".{expert}", ""),
            lambda name, expert: f"foundation_model.{name}",
        ],
    )
    def test_give_the_model_that_they_were_of(self, stock, opened, ids, tmp_path, rename):
        legacy(tmp_path / "old", stock, rename)
        assert convert_checkpoint(tmp_path / "old", tmp_path / "new", lora_alpha=6) == NAMES
        again = opened(tmp_path / "new")
        assert equal(tensors(again), tensors(stock))
        assert torch.equal(again(ids).logits, stock(ids).logits)
        assert again.peft_config["expert_1"].lora_alpha == 6
        assert not list((tmp_path / "new").rglob("*.pt"))

    def test_of_all_experts_in_each_file_give_each_its_own(self, stock, opened, tmp_path):
        folder = tmp_path / "old" / "peft_adapters"
        folder.mkdir(parents=True)
        for name in NAMES:
            torch.save(tensors(stock), folder / f"{name}.pt")
        convert_checkpoint(tmp_path / "old", tmp_path / "new", lora_alpha=6)
        assert equal(tensors(opened(tmp_path / "new")), tensors(stock))

    def test_of_embeddings_too(self, make_lora, opened, ids, tmp_path):
        stock = make_lora("llama", target_modules=["embed_tokens", "q_proj"])
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                if "lora_embedding_A" in name:
                    parameter.normal_()
        legacy(tmp_path / "old", stock)
        for i in range(3):  # PEFT's names of embeddings end with the adapter's
            state = {k: t for k, t in tensors(stock).items() if f".expert_{i}." in k or k.endswith(f".expert_{i}")}
            torch.save(state, tmp_path / f"old/peft_adapters/expert_{i}.pt")
        convert_checkpoint(tmp_path / "old", tmp_path / "new", lora_alpha=6)
        assert torch.equal(opened(tmp_path / "new")(ids).logits, stock(ids).logits)

    def test_of_several_ranks_keep_their_scaling(self, make_lora, opened, ids, tmp_path):
        stock = make_lora("llama", target_modules=TARGETS, rank_pattern={"layers.1.mlp.down_proj": 7})
        legacy(tmp_path / "old", stock)
        convert_checkpoint(tmp_path / "old", tmp_path / "new", lora_alpha=6)
        assert torch.equal(opened(tmp_path / "new")(ids).logits, stock(ids).logits)

    def test_twelve_of_them_keep_their_order(self, make_lora, tmp_path):
        legacy(tmp_path / "old", make_lora("llama", n=12, target_modules=["q_proj"]), n=12)
        assert convert_checkpoint(tmp_path / "old", tmp_path / "new", lora_alpha=6) == [
            f"expert_{i}" for i in range(12)
        ]

    @pytest.mark.parametrize("place", ["peft_adapters", "."])
    def test_have_their_settings_from_a_file_beside_them(self, stock, opened, ids, tmp_path, place):
        legacy(tmp_path / "old", stock)
        stock.peft_config["expert_0"].save_pretrained(tmp_path / "old" / place)
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
        again = opened(tmp_path / "new")
        assert torch.equal(again(ids).logits, stock(ids).logits)
        with pytest.raises(ValueError, match="lora_alpha: .*adapter_config.json says that"):
            convert_checkpoint(tmp_path / "old", tmp_path / "newer", lora_alpha=6)

    @pytest.mark.parametrize(
        ("spoil", "options", "message"),
        [
            (lambda f: None, {}, "expert_0.pt has no adapter_config.json beside it: give lora_alpha"),
            (lambda f: torch.save([1], f / "expert_1.pt"), {"lora_alpha": 6}, "expert_1.pt must hold a dictionary"),
            (
                lambda f: torch.save({}, f / "expert_1.pt"),
                {"lora_alpha": 6},
                "expert_1.pt must hold the tensors of one",
            ),
            (lambda f: (f / "expert_1.pt").write_bytes(b"PK"), {"lora_alpha": 6}, "expert_1.pt is refused"),
            (
                lambda f: torch.save({"lm_head.weight": torch.ones(1)}, f / "expert_1.pt"),
                {"lora_alpha": 6},
                "expert_1.pt: lm_head.weight is no tensor of a LoRA",
            ),
            (
                lambda f: torch.save({"a.lora_A.weight": torch.ones(2, 3)}, f / "expert_1.pt"),
                {"lora_alpha": 6},
                "expert_1.pt has .*a.lora_A.weight, but .*a.lora_B.weight is missing",
            ),
            (
                lambda f: torch.save({f"a.lora_A.{n}.weight": torch.ones(2, 3) for n in "xy"}, f / "expert_1.pt"),
                {"lora_alpha": 6},
                r"expert_1.pt must hold the tensors of one adapter, or of expert_1, got \['x', 'y'\]",
            ),
        ],
    )
    def test_that_are_no_experts_are_refused(self, stock, tmp_path, spoil, options, message):
        legacy(tmp_path / "old", stock)
        spoil(tmp_path / "old" / "peft_adapters")
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "old", tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("place", ["peft_adapters/expert_1.pt", "dylo_moe_state/router.pt"])
    def test_that_attack_are_refused_and_not_executed(self, stock, tmp_path, place):
        class Attack:
            def __reduce__(self):
                return (open, (str(tmp_path / "executed"), "w"))

        legacy(tmp_path / "old", stock)
        legacy_router(tmp_path / "old")
        torch.save({"a": Attack()}, tmp_path / "old" / place)
        with pytest.raises(ValueError, match=f"{place} is refused"):
            convert_checkpoint(tmp_path / "old", tmp_path / "new", lora_alpha=6)
        assert not (tmp_path / "executed").exists()
        torch.load(tmp_path / "old" / place, weights_only=False)
        assert (tmp_path / "executed").exists()  # so it is an attack


class TestFolders:
    def test_of_dylora_become_ours(self, stock, opened, tmp_path):
        for name in NAMES:
            stock.save_pretrained(tmp_path / "old" / "peft_adapters" / name, selected_adapters=[name])
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
        assert read_mixture(tmp_path / "new").experts == NAMES
        assert equal(tensors(opened(tmp_path / "new")), tensors(stock))

    def test_of_pickles_become_safetensors(self, stock, opened, tmp_path):
        stock.save_pretrained(tmp_path / "old", safe_serialization=False)
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
        assert not list((tmp_path / "new").rglob("*.bin"))
        assert equal(tensors(opened(tmp_path / "new")), tensors(stock))

    def test_of_our_own_are_copied(self, stock, opened, tmp_path):
        from moelora import adopt
        from moelora.nn import FixedRouter

        model = adopt(stock)
        model.base_model.attach_router(FixedRouter(NAMES, [1, 2, 3]))
        model.base_model.set_adapter(["expert_2", "expert_0"])
        model.save_pretrained(tmp_path / "old")
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
        again = opened(tmp_path / "new")
        assert equal(tensors(again), tensors(model))
        assert again.base_model.active_adapters == ["expert_2", "expert_0"]
        assert torch.equal(again.base_model.router.weights, model.base_model.router.weights)

    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            (lambda path: path.write_text("mine"), "target must not exist or be an empty folder"),
            (lambda path: (path.mkdir(), (path / "file").write_text("mine")), "target must not exist or be an empty"),
        ],
    )
    def test_are_not_written_over_anything(self, stock, tmp_path, prepare, message):
        stock.save_pretrained(tmp_path / "old")
        prepare(tmp_path / "new")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "old", tmp_path / "new")
        assert sorted(tmp_path.rglob("*")) == before

    def test_take_no_options_that_nothing_needs(self, stock, tmp_path):
        stock.save_pretrained(tmp_path / "old")
        with pytest.raises(ValueError, match="base_model, lora_alpha: .* has an adapter_config.json for each expert"):
            convert_checkpoint(tmp_path / "old", tmp_path / "new", base_model="x", lora_alpha=1)

    @pytest.mark.parametrize("content", [None, []])
    def test_without_experts_are_refused(self, tmp_path, content):
        if content is not None:
            (tmp_path / "old").mkdir()
        with pytest.raises(ValueError, match="source must be a folder" if content is None else "has neither folders"):
            convert_checkpoint(tmp_path / "old", tmp_path / "new")


def dylora(folder, model, gate, **settings):
    for name in NAMES:
        model.save_pretrained(folder / "peft_adapters" / name, selected_adapters=[name])
    safetensors.torch.save_file(gate, folder / "router.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_name": "tiny", "lora_r": 4} | settings))
    return folder


def as_dylora_routes(gate, x, top_k, temperature, dense):
    logits = x @ gate["gate.weight"].T + gate["gate.bias"]
    if dense:
        return (logits / temperature).softmax(-1)
    best, where = logits.topk(top_k, -1)
    return torch.zeros_like(logits).scatter(-1, where, best.softmax(-1))


GATE = {"gate.weight": torch.randn(3, 32), "gate.bias": torch.randn(3)}


class TestAGateOfDyLoRA:
    @pytest.mark.parametrize("settings", [{}, {"top_k": 2, "temperature": 0.5, "num_experts": 3}])
    def test_weighs_as_it_did_there(self, stock, opened, ids, tmp_path, settings):
        dylora(tmp_path / "old", stock, GATE, **settings)
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
        x = torch.randn(2, 5, 32)
        expected = as_dylora_routes(GATE, x, settings.get("top_k", 1), 0, dense=False)
        for folder in ("old", "new"):
            model = opened(tmp_path / folder)
            torch.testing.assert_close(model.base_model.get_routing_weights(x), expected)
            assert torch.isfinite(model(ids).logits).all()

    @pytest.mark.parametrize("young", [False, True])
    @pytest.mark.parametrize("prefix", ["", "gate."])
    def test_of_the_older_form_too(self, stock, opened, tmp_path, young, prefix):
        legacy(tmp_path / "old", stock)
        maturity = torch.tensor([1.0, 0.0, 1.0]) if young else torch.ones(3)
        gate = legacy_router(tmp_path / "old", expert_maturity=maturity, top_k=2)
        if prefix:
            path = tmp_path / "old/dylo_moe_state/router.pt"
            state = torch.load(path)
            state["gate_state_dict"] = {prefix + name: t for name, t in state["gate_state_dict"].items()}
            torch.save(state, path)
        convert_checkpoint(tmp_path / "old", tmp_path / "new", lora_alpha=6)
        x = torch.randn(2, 5, 32)
        gate = {f"gate.{name}": tensor for name, tensor in gate.state_dict().items()}
        expected = as_dylora_routes(gate, x, 2, 2.0, dense=young)
        torch.testing.assert_close(opened(tmp_path / "new").base_model.get_routing_weights(x), expected)

    @pytest.mark.parametrize(
        ("gate", "settings", "message"),
        [
            ({"gate.weight": torch.ones(3, 32)}, {}, "must have the tensors .*'gate.bias'"),
            (GATE | {"more": torch.ones(1)}, {}, "must have the tensors .*got .*more"),
            ({"gate.weight": torch.ones(2, 32), "gate.bias": torch.ones(2)}, {}, "but there are the experts"),
            (GATE, {"num_experts": 4}, "has num_experts 3, but its settings say 4"),
            (GATE, {"input_size": 31}, "has input_size 32, but its settings say 31"),
            (GATE, {"expert_maturity": "all"}, "has settings whose 'expert_maturity' are no numbers"),
        ],
    )
    def test_that_is_not_of_these_experts_is_refused(self, stock, opened, tmp_path, gate, settings, message):
        dylora(tmp_path, stock, gate, **settings)
        with pytest.raises(ValueError, match="router.safetensors .*" + message):
            opened(tmp_path)

    def test_becomes_the_class_that_reads_what_it_read(self, stock, tmp_path):
        mixture = find_mixture(dylora(tmp_path, stock, GATE))
        arguments = {"expert_names": NAMES, "input_size": 32, "top_k": None, "eval_top_k": 1, "temperature": 2.0}
        assert mixture.router == {"class": "LastHiddenRouter", "arguments": arguments}
        assert mixture.layout == "dylora"


def test_the_command_converts_and_says_what_it_wrote(stock, opened, ids, tmp_path, capsys):
    legacy(tmp_path / "old", stock)
    arguments = ["convert", str(tmp_path / "old"), str(tmp_path / "new")]
    assert main(arguments) == 1
    assert "give lora_alpha" in capsys.readouterr().err
    assert main([*arguments, "--lora-alpha", "6", "--base-model", "tiny"]) == 0
    assert "Wrote expert_0, expert_1, expert_2 to" in capsys.readouterr().out
    again = opened(tmp_path / "new")
    assert torch.equal(again(ids).logits, stock(ids).logits)
    assert again.peft_config["expert_2"].base_model_name_or_path == "tiny"


def test_a_pending_commit_is_converted_whole(stock, tmp_path, monkeypatch):
    stock.save_pretrained(tmp_path / "plain")
    convert_checkpoint(tmp_path / "plain", tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "inner")
    shutil.rmtree(tmp_path / "old")
    (tmp_path / "old").mkdir()
    (tmp_path / "inner").rename(tmp_path / "old" / commit.COMMITTED)
    assert convert_checkpoint(tmp_path / "old", tmp_path / "new") == NAMES
