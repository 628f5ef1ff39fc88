"""A run that is cut off and resumed ends where the uninterrupted run ends, bit for bit: experts and router."""

import copy
import io
import json
import pickle
import warnings

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

import moelora
from moelora import MoELoraConfig, PeftModel, adopt, release
from moelora.nn import EmbeddingRouter, FixedRouter, HiddenStateRouter, LastHiddenRouter, PerLayerRouter
from moelora.peft.checkpoint import read_mixture

NAMES = ["expert_0", "expert_1", "expert_2"]
VOCAB = 97


@pytest.fixture
def build(make_base):
    def build(**options):
        torch.manual_seed(0)
        settings = {"num_experts": 3, "r": 4, "task_type": "CAUSAL_LM", "lora_dropout": 0.1, "expert_dropout": 0.1}
        config = MoELoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **settings | options)
        model = moelora.get_peft_model(make_base("llama"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        return model

    return build


def dataset(rows=12):
    ids = torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(5))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def trainer_of(model, folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_steps": 2,
        "logging_steps": 1,
    } | options
    data = dataset()
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, eval_dataset=data)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name or ".router." in name}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestResuming:
    def test_gives_the_bits_of_the_uninterrupted_run(self, build, tmp_path):
        whole = trainer_of(build(), tmp_path / "whole")
        whole.train()
        first = trainer_of(build(), tmp_path / "cut")
        first.train()
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()  # all of it comes from the checkpoint
        resumed = trainer_of(model, tmp_path / "cut")
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
        assert losses(resumed) == losses(whole)
        assert equal(trained(model), trained(whole.model))
        assert model.base_model.active_adapters == NAMES
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
        assert not equal(trained(build()), trained(model))

    def test_keeps_frozen_experts_frozen(self, build, tmp_path):
        def frozen():
            model = build()
            for name, parameter in model.named_parameters():
                if "expert_1" in name:
                    parameter.requires_grad_(False)
            return model

        whole = trainer_of(frozen(), tmp_path, max_steps=4)
        whole.train()
        resumed = trainer_of(frozen(), tmp_path, max_steps=4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert equal(trained(resumed.model), trained(whole.model))
        assert not any(p.requires_grad for name, p in resumed.model.named_parameters() if "expert_1" in name)

    def test_of_one_expert_among_others_is_that_of_stock_peft(self, make_lora, tmp_path):
        def one(folder, prepare):
            model = prepare(make_lora("llama"))
            model.set_adapter("expert_1")
            trainer_of(model, folder, max_steps=4).train()
            again = prepare(make_lora("llama"))
            again.set_adapter("expert_1")
            trainer_of(again, folder, max_steps=4).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
            assert again.base_model.active_adapters == ["expert_1"]
            return model, again

        model, again = one(tmp_path / "adopted", adopt)
        assert equal(trained(model), trained(again))

    def test_needs_the_router_of_the_checkpoint(self, build, make_lora, tmp_path):
        trainer_of(build(), tmp_path, max_steps=2).train()
        for name in ("moe_lora.json", "router.safetensors", "adapter_model.safetensors"):
            (tmp_path / "checkpoint-2" / name).unlink()
        with pytest.raises(ValueError, match="has no moe_lora.json, so it can't restore the router"):
            trainer_of(build(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class TestTheBestModel:
    def test_is_loaded_at_the_end(self, build, tmp_path):
        seen = {}

        class Watched(Trainer):
            def _save_checkpoint(self, model, *args, **kwargs):
                seen[self.state.global_step] = trained(self.model)
                return super()._save_checkpoint(model, *args, **kwargs)

            def evaluate(self, *args, **kwargs):
                metrics = super().evaluate(*args, **kwargs)
                metrics["eval_rank"] = {2: 1.0, 4: 3.0, 6: 2.0}[self.state.global_step]
                return metrics

        model = build()
        options = {
            "load_best_model_at_end": True,
            "metric_for_best_model": "rank",
            "greater_is_better": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_total_limit": 1,
        }
        inner = trainer_of(model, tmp_path, **options)
        Watched(model=model, args=inner.args, train_dataset=dataset(), eval_dataset=dataset()).train()
        assert equal(trained(model), seen[4])
        assert not equal(seen[4], seen[6])
        assert model.base_model.active_adapters == NAMES
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
        kept = {path.name for path in tmp_path.iterdir()}
        assert "checkpoint-4" in kept
        assert "checkpoint-2" not in kept


class TestACheckpoint:
    def test_has_the_experts_as_plain_adapters_and_the_mixture_at_the_root(self, build, make_base, ids, tmp_path):
        model = build()
        model.save_pretrained(tmp_path)
        document = json.loads((tmp_path / "moe_lora.json").read_text())
        assert document["experts"] == document["active"] == NAMES
        assert document["format_version"] == 1
        assert document["config"]["num_experts"] == 3
        state = safetensors.torch.load_file(tmp_path / "router.safetensors")
        assert equal(state, model.base_model.router.state_dict())
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(NAMES)
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
        stock = peft.PeftModel.from_pretrained(make_base("llama"), tmp_path / "expert_1", adapter_name="expert_1")
        model.set_adapter("expert_1")
        model.base_model.detach_router()
        torch.testing.assert_close(stock(ids).logits, model.eval()(ids).logits)

    def test_is_opened_whole_by_from_pretrained(self, build, make_base, ids, tmp_path):
        model = build(router_temperature=1.5).eval()
        model.save_pretrained(tmp_path)
        opened = PeftModel.from_pretrained(make_base("llama"), tmp_path)
        assert torch.equal(opened(ids).logits, model(ids).logits)
        assert opened.base_model.active_adapters == NAMES
        assert opened.base_model.moe_config.router_temperature == 1.5
        assert not any(p.requires_grad for p in opened.parameters())
        assert not opened.training
        again = PeftModel.from_pretrained(make_base("llama"), str(tmp_path), is_trainable=True)
        assert {name for name, p in again.named_parameters() if p.requires_grad} == {
            name for name, p in model.named_parameters() if p.requires_grad
        }

    @pytest.mark.parametrize(
        "make",
        [
            lambda: FixedRouter(NAMES, [1, 2, 3]),
            lambda: EmbeddingRouter(NAMES, 32, top_k=1, mlp_dim=8, renormalize=False),
            lambda: HiddenStateRouter(NAMES, 32, layer=2, temperature=0.5),
            lambda: PerLayerRouter(NAMES, 32, num_layers=3, capacity_factor=2.0, expert_dropout=0.25),
            lambda: PerLayerRouter(
                NAMES, np.int64(32), num_layers=3, top_k=np.int64(2), expert_dropout=np.float32(0.5)
            ),
            lambda: LastHiddenRouter(NAMES, 32, eval_top_k=1).double(),
        ],
    )
    def test_brings_back_every_router(self, make_lora, make_base, ids, tmp_path, make):
        model = adopt(make_lora("llama"))
        router = make().eval()
        for parameter in router.parameters():
            nn.init.uniform_(parameter)  # with all bits of its dtype
        model.base_model.attach_router(router)
        model.save_pretrained(tmp_path)
        opened = PeftModel.from_pretrained(make_base("llama"), tmp_path)
        assert repr(opened.base_model.router) == repr(router)
        state = opened.base_model.router.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in router.state_dict().items())
        assert torch.equal(opened(ids).logits, model(ids).logits)
        assert opened.base_model.moe_config is None

    def test_without_a_router_has_the_order_of_the_experts(self, make_lora, make_base, ids, weights, tmp_path):
        model = adopt(make_lora("llama"))
        model.base_model.set_adapter(["expert_2", "expert_0"])
        model.save_pretrained(tmp_path)
        opened = PeftModel.from_pretrained(make_base("llama"), tmp_path)
        assert list(opened.peft_config) == NAMES
        assert opened.base_model.active_adapters == ["expert_2", "expert_0"]
        assert torch.equal(
            opened(ids, routing_weights=weights[..., :2]).logits, model(ids, routing_weights=weights[..., :2]).logits
        )

    def test_of_selected_adapters_is_plain(self, build, make_base, tmp_path):
        model = build()
        model.save_pretrained(tmp_path, selected_adapters=["expert_1"])
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["expert_1"]
        assert not (tmp_path / "moe_lora.json").exists()
        assert not list(tmp_path.rglob("router.safetensors"))
        peft.PeftModel.from_pretrained(make_base("llama"), tmp_path / "expert_1")

    def test_of_one_adapter_without_a_router_is_pefts(self, make_lora, tmp_path):
        for name, prepare in (("stock", lambda m: m), ("adopted", adopt)):
            prepare(make_lora("llama", n=1)).save_pretrained(tmp_path / name)
        files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("stock", "adopted")]
        assert files[0] == files[1]

    def test_with_a_default_adapter_keeps_it_at_the_root(self, make_base, ids, tmp_path):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = moelora.get_peft_model(make_base("llama"), config)
        model.add_adapter("other", config)
        moelora.activate_all_experts(model)
        model.base_model.attach_router(FixedRouter(["default", "other"], [1, 3]))
        model.eval().save_pretrained(tmp_path)
        opened = PeftModel.from_pretrained(make_base("llama"), tmp_path)
        assert torch.equal(opened(ids).logits, model(ids).logits)
        stock = peft.PeftModel.from_pretrained(make_base("llama"), tmp_path)
        model.base_model.detach_router()
        model.set_adapter("default")
        torch.testing.assert_close(stock(ids).logits, model(ids).logits)

    def test_overwrites_an_older_one(self, build, tmp_path):
        model = build()
        model.save_pretrained(tmp_path)
        model.base_model.detach_router()
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "router.safetensors").exists()
        assert read_mixture(tmp_path).router is None

    def test_saves_the_router_of_a_given_state(self, build, tmp_path):
        model = build()
        state = {name: tensor + 1 if ".router." in name else tensor for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=state)
        saved = safetensors.torch.load_file(tmp_path / "router.safetensors")
        assert torch.equal(saved["gate.0.weight"], model.base_model.router.gate[0].weight + 1)

    def test_is_not_loaded_as_one_adapter(self, build, tmp_path):
        model = build()
        model.save_pretrained(tmp_path)
        for name in ("expert_0", "new"):
            with pytest.raises(ValueError, match="holds the experts .* load one of their folders"):
                model.load_adapter(tmp_path, name)

    def test_with_a_router_of_ones_own_says_what_to_do(self, build, make_base, tmp_path):
        model = build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.base_model.attach_router(nn.Linear(32, 3))
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"router of class torch.nn.modules.linear.Linear.*load the experts one"):
            PeftModel.from_pretrained(make_base("llama"), tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("gate.1.bias"), "gate.1.bias is missing"),
            (lambda s: s.update(more=torch.ones(1)), "more is unknown"),
            (lambda s: s.update({"gate.0.weight": torch.ones(3, 31)}), r"gate.0.weight has shape \(3, 31\) instead"),
        ],
    )
    def test_that_does_not_fit_changes_nothing(self, build, tmp_path, change, message):
        model = build()
        model.save_pretrained(tmp_path)
        state = {name: tensor + 1 for name, tensor in model.base_model.router.state_dict().items()}
        change(state)
        safetensors.torch.save_file(state, tmp_path / "router.safetensors")
        before = trained(model)
        with pytest.raises(ValueError, match=message):
            read_mixture(tmp_path).load_router(model.base_model.router)
        assert equal(trained(model), before)


class TestTheClass:
    """Adopting changes the class of the model object; nobody but Trainer can tell."""

    def test_is_a_subclass_that_goes_again(self, make_lora):
        model = make_lora("llama")
        printed = str(model).splitlines()[0]
        adopt(model)
        kind = type(model)
        assert kind.__name__ == "PeftModelForCausalLM"
        assert str(model).splitlines()[0] == printed
        assert isinstance(model, (peft.PeftModelForCausalLM, moelora.PeftModel))
        assert type(adopt(make_lora("llama"))) is kind
        assert type(adopt(model)) is kind
        assert type(release(model)) is peft.PeftModelForCausalLM

    def test_is_copied_and_pickled(self, build, ids):
        model = build().eval()
        expected = model(ids).logits
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(model),
            copy.copy(model),
            *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)),
            torch.load(buffer, weights_only=False),
        ]
        for other in copies:
            assert type(other) is type(model)
            assert torch.equal(other(ids).logits, expected)
        assert type(release(copies[0])) is peft.PeftModelForCausalLM

    def test_keeps_what_set_adapter_means(self, build):
        model = build()
        model.set_adapter("expert_1")
        assert model.base_model.active_adapters == ["expert_1"]
        trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
        assert trainable
        assert all("expert_1" in name for name in trainable)

    def test_is_left_alone_where_nothing_can_be_routed(self, make_base):
        model = peft.get_peft_model(make_base("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
        assert type(adopt(model)) is peft.PeftModelForCausalLM
