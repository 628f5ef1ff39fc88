"""trl's trainers of preferences, rewards and policies: a mixture of equal experts is one LoRA; the balance loss counts
once in a step."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import moelora
from moelora import MoELoraConfig, adopt, get_peft_model

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")

COEFFICIENT = 5.0
RATE = 1e-2
VOCAB = 97
NAMES = ["expert_0", "expert_1", "expert_2"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def text(length, seed):
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def rows(**lengths):
    """Four rows whose texts have these lengths; with a label where trl asks for one."""
    columns = [{name: text(n, 10 * row + i) for i, (name, n) in enumerate(lengths.items())} for row in range(4)]
    return Dataset.from_list([row | {"label": k % 2 == 0} for k, row in enumerate(columns)])


def rewards(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


PAIRS = {"prompt": 4, "chosen": 3, "rejected": 3}
KINDS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {"prompt": 4, "completion": 3}, {"loss_type": "apo_zero_unpaired"}),
    "grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"prompt": 4},
        {"num_generations": 4, "max_completion_length": 5, "generation_kwargs": {"min_new_tokens": 5}},
    ),
    "reward": (trl.RewardTrainer, trl.RewardConfig, PAIRS, {}),
    "dft": (trl.SFTTrainer, trl.SFTConfig, {"text": 7}, {"loss_type": "dft"}),
    "smoothed": (trl.SFTTrainer, trl.SFTConfig, {"text": 7}, {"label_smoothing_factor": 0.1}),
}


@pytest.fixture
def build(tokenizer, one_step):
    """A trainer of one of these kinds that makes one step with SGD."""

    def build(kind, model, given=None, **options):
        trainer, config, lengths, settings = KINDS[kind]
        given = (given or {}) | ({"reward_funcs": rewards} if kind == "grpo" else {})
        args, data = config(**one_step | {"learning_rate": RATE} | settings | options), rows(**lengths)
        return trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **given)

    return build


def lora_parameters(model, adapter):
    return {
        n.replace(f".{adapter}", ""): p for n, p in model.named_parameters() if "lora_" in n and f".{adapter}." in n
    }


def make_equal(model):
    """Give every adapter of a model the same weights; B is not zero."""
    for adapter in model.peft_config:
        for seed, parameter in enumerate(lora_parameters(model, adapter).values()):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))


MEANT = {"loss", "kl", "entropy", "reward", "rewards/margins", "logps/chosen", "logps/rejected"}


class TestEqualExperts:
    """Under uniform weights N equal experts are one LoRA, and each has the Nth part of its gradient."""

    @pytest.fixture
    def compare(self, build, make_base):
        def trained(kind, config, **options):
            trainer = build(kind, make_base("llama"), {"peft_config": config}, **options)
            make_equal(trainer.model)
            trainer.train()
            logs = [{k: v for k, v in log.items() if k in MEANT} for log in trainer.state.log_history]
            return trainer.model, logs

        def compare(kind, **options):
            stock, expected_logs = trained(kind, LoraConfig(**LORA, task_type="CAUSAL_LM"), **options)
            config = MoELoraConfig(**LORA, task_type="CAUSAL_LM", num_experts=3, router_type="fixed")
            with moelora.patch_peft():
                model, logs = trained(kind, config, learning_rate=3 * RATE, **options)
            assert list(model.peft_config) == NAMES
            for got, expected in zip(logs, expected_logs, strict=True):
                assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
            expected = lora_parameters(stock, "default")
            for name in NAMES:
                got = lora_parameters(model, name)
                assert got.keys() == expected.keys()
                for parameter, value in expected.items():
                    torch.testing.assert_close(got[parameter], value, rtol=1e-5, atol=1e-6)

        return compare

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"precompute_ref_log_probs": True},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        ],
        ids=["plain", "precomputed", "accumulated", "reentrant", "not_reentrant"],
    )
    def test_learn_preferences_against_the_base_as_one_lora(self, compare, options):
        compare("dpo", max_steps=2, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_iterations": 2},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        ],
        ids=["old_policy", "reentrant", "not_reentrant"],
    )
    def test_learn_a_policy_against_the_base_as_one_lora(self, compare, options):
        compare("grpo", max_steps=2, beta=0.5, **options)


@pytest.fixture
def mixture(make_lora, balanced):
    """A model with a router in training, and the balance loss so heavy that it shows."""

    def mixture(kind, coefficient=COEFFICIENT):
        if kind == "reward":
            torch.manual_seed(11)
            sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
            base = LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB, num_labels=1, **sizes))
            base.config.pad_token_id = 0
            model = get_peft_model(base, MoELoraConfig(**LORA, num_experts=3))
            make_equal(model)
            model.base_model.detach_router()
        else:
            model = adopt(make_lora("llama"))
        return balanced(model, coefficient)

    return mixture


def router_of(model):
    return torch.cat([p.detach().flatten() for p in model.base_model.router.parameters()])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_model_inside_another_mixture_is_the_reference(build, mixture, kind):
    reference = mixture(kind).eval().get_base_model()
    trainer = build(kind, mixture(kind), {"ref_model": reference}, learning_rate=10.0, max_steps=2)
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(second["rewards/margins"]) > 1e-3


class TestBalanceLoss:
    @pytest.mark.parametrize("steps", [1, 4])
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_counts_once_in_a_step_of_a_trainer_with_a_loss_of_its_own(self, build, mixture, make_base, kind, steps):
        given = {"ref_model": make_base("llama")} if kind in ("dpo", "kto") else None
        options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 4 // steps}
        stepped, batches = [], []
        for coefficient in (0.0, COEFFICIENT):
            model = mixture(kind, coefficient)
            batches.clear()

            def keep(module, args, kwargs):
                if torch.is_grad_enabled():
                    batches.append({name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs})

            with_hook = model.register_forward_pre_hook(keep, with_kwargs=True)
            build(kind, model, given, **options).train()
            with_hook.remove()
            stepped.append(router_of(model))
        assert len(batches) == steps
        model = mixture(kind)
        sum(COEFFICIENT * model(**batch).router_aux_loss / steps for batch in batches).backward()
        expected = torch.cat([-RATE * p.grad.flatten() for p in model.base_model.router.parameters()])
        torch.testing.assert_close(stepped[1] - stepped[0], expected, **CLOSE)

    def test_is_in_no_forward_without_labels_that_is_no_step_of_a_trainer(self, mixture):
        ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(5))
        gradients = []
        for coefficient in (0.0, COEFFICIENT):
            model = mixture("reward", coefficient)
            model(ids).logits.sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.base_model.router.parameters()]))
        assert torch.equal(*gradients)
