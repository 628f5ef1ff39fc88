"""trl's SFTTrainer computes its loss from log-probabilities; experts and router learn as with transformers' Trainer."""

import peft
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import moelora
from moelora import MoELoraConfig, RoutingWeightsCollator, adopt

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")

NAMES = ["expert_0", "expert_1", "expert_2"]
COEFFICIENT = 5.0
VOCAB = 97
IDS = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def build(make_lora, balanced):
    def build(coefficient=COEFFICIENT):
        return balanced(adopt(make_lora("llama")), coefficient)

    return build


@pytest.fixture
def sft(tokenizer, one_step):
    def sft(model, data=None, data_collator=None, peft_config=None, **options):
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**one_step | options),
            train_dataset=Dataset.from_dict({"input_ids": IDS.tolist()}) if data is None else data,
            processing_class=tokenizer,
            data_collator=data_collator,
            peft_config=peft_config,
        )
        trainer.train()
        return trainer.model

    return sft


def router_of(model):
    return torch.cat([p.detach().flatten() for p in model.base_model.router.parameters()])


def experts_of(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])


@pytest.fixture
def expected(build, one_step):
    """The model after the same step of transformers' Trainer, which uses outputs.loss."""
    model = build()
    data = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    Trainer(model=model, args=TrainingArguments(**one_step), train_dataset=data).train()
    return model


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_balance_loss_counts_once_in_a_step(build, sft, expected, steps):
    model = sft(build(), per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps)
    torch.testing.assert_close(router_of(model), router_of(expected), **CLOSE)
    torch.testing.assert_close(experts_of(model), experts_of(expected), **CLOSE)
    without = sft(build(0.0))
    assert not torch.allclose(router_of(without), router_of(expected), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_balance_loss_counts_once_with_checkpointing(build, sft, expected, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = sft(build(), **options)
    torch.testing.assert_close(router_of(model), router_of(expected), **CLOSE)
    torch.testing.assert_close(experts_of(model), experts_of(expected), **CLOSE)


def test_balance_loss_is_beside_another_loss_too(build, sft):
    got = router_of(sft(build(), loss_type="dft"))
    model = build()
    out = model(IDS)
    log_probs = out.logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    (-(log_probs * log_probs.exp().detach()).mean() + COEFFICIENT * out.router_aux_loss).backward()
    stepped = torch.cat([(p - 1e-2 * p.grad).flatten() for p in model.base_model.router.parameters()])
    torch.testing.assert_close(got, stepped.detach(), **CLOSE)


def test_balance_loss_is_scaled_by_a_gradient_scaler(build):
    from trl.trainer.utils import add_fused_lm_head

    gradients = []
    for scale in (1.0, 1024.0):
        model = build()
        add_fused_lm_head(model.get_base_model())
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(input_ids=IDS, labels=IDS, fused_lm_head=True)
        (-out.log_probs.sum() / out.label_mask.sum() * scale).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.base_model.router.parameters()]) / scale)
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.999
    assert float(gradients[1].norm() / gradients[0].norm()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True, "max_length": 16},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"padding_free": True, "max_length": None},
    ],
    ids=["padded", "packed", "wrapped", "padding_free"],
)
def test_experts_and_router_learn_from_text(build, sft, options):
    rows = [" ".join(f"w{i}" for i in row[: 4 + k]) for k, row in enumerate(IDS.tolist())]
    model = build(0.01)
    router, experts = router_of(model), experts_of(model)
    sft(model, Dataset.from_dict({"text": rows}), max_steps=2, optim="adamw_torch", **options)
    for before, after in ((router, router_of(model)), (experts, experts_of(model))):
        assert torch.isfinite(after).all()
        assert (before != after).float().mean() > 0.8


def test_routing_weights_of_a_dataset_are_used_with_our_collator(make_lora, sft):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = RoutingWeightsCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    results = []
    for weights in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        data = Dataset.from_dict({"input_ids": IDS.tolist(), "routing_weights": [weights] * 4})
        model = adopt(make_lora("llama"))
        results.append(experts_of(sft(model, data, collator, remove_unused_columns=False)))
    assert not torch.equal(*results)


def test_a_mixture_config_given_to_the_trainer_is_one_plain_adapter_and_warns(make_base, sft):
    config = MoELoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="one plain adapter of a MoELoraConfig"):
        model = sft(make_base("llama"), peft_config=config)
    assert type(model) is peft.PeftModelForCausalLM
    assert list(model.peft_config) == ["default"]


def test_a_model_that_was_made_before_has_the_whole_mixture(make_base, sft):
    config = MoELoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", num_experts=3)
    model = moelora.get_peft_model(make_base("llama"), config)
    before = router_of(model)
    sft(model)
    assert not torch.equal(router_of(model), before)
    assert model.base_model.active_adapters == NAMES
