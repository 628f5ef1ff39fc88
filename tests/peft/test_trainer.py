"""transformers.Trainer trains experts and router, and counts the balance loss as it counts the loss."""

import warnings

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from moelora import MoELoraConfig, adopt
from moelora.nn import PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
COEFFICIENT = 5.0
VOCAB = 97


@pytest.fixture
def build(make_lora):
    """An adopted model with a router in training, and the balance loss so heavy that it shows."""

    def build(kind="llama", formula="z_loss", coefficient=COEFFICIENT):
        model = adopt(make_lora(kind))
        torch.manual_seed(1)
        router = PerLayerRouter(NAMES, {"llama": 32, "gpt2": 24}[kind], num_layers=3, top_k=2)
        for parameter in router.parameters():
            nn.init.normal_(parameter)
        config = MoELoraConfig(num_experts=3, load_balance_loss_type=formula, router_aux_loss_coef=coefficient)
        model.base_model.attach_router(router, config)
        return model.train()

    return build


def dataset(rows=4, length=7, masked=0):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :masked] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",  # its step is the gradient: AdamW's first step shows the sign alone
    } | options
    return TrainingArguments(**settings)


def train(model, folder, data, *, trainer=Trainer, **options):
    known = {name: options.pop(name) for name in ("data_collator", "compute_loss_func") if name in options}
    trained = trainer(model=model, args=arguments(folder, **options), train_dataset=data, **known)
    trained.train()
    return trained


def router_of(model):
    return torch.cat([p.detach().flatten() for p in model.base_model.router.parameters()])


def experts_of(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])


def test_experts_and_router_learn(build, tmp_path, kind):
    model = build(kind, coefficient=0.01)
    experts, router = experts_of(model), router_of(model)
    trainer = train(model, tmp_path, dataset(), max_steps=8, optim="adamw_torch")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    for before, after in ((experts, experts_of(model)), (router, router_of(model))):
        assert (before != after).float().mean() > 0.8  # an expert that is never picked stays


class TestBalanceLoss:
    def test_is_part_of_the_loss_that_is_logged_and_trained(self, build, tmp_path):
        data = dataset()
        model = build()
        ids = torch.tensor(data["input_ids"])
        with torch.no_grad():
            out = model(ids, labels=ids)
        trainer = train(model, tmp_path, data)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(out.loss), rel=1e-5)
        without = build(coefficient=0.0)
        with torch.no_grad():
            plain = without(ids, labels=ids).loss
        torch.testing.assert_close(out.loss, plain + COEFFICIENT * out.router_aux_loss)
        train(without, tmp_path, data)
        assert not torch.allclose(router_of(model), router_of(without), rtol=1e-3)

    @pytest.mark.parametrize("masked", [0, 3])
    def test_is_that_of_the_whole_batch_under_accumulation_where_it_is_a_mean_over_tokens(
        self, build, tmp_path, masked
    ):
        whole = train(build(), tmp_path, dataset(masked=masked))
        for size in (1, 2):
            parts = train(
                build(),
                tmp_path,
                dataset(masked=masked),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )
            torch.testing.assert_close(router_of(parts.model), router_of(whole.model), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(experts_of(parts.model), experts_of(whole.model), rtol=1e-4, atol=1e-5)
            assert parts.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-4)

    @pytest.mark.parametrize("formula", ["aux_loss", "switch"])
    def test_is_that_of_the_whole_batch_for_equal_parts_under_accumulation(self, build, tmp_path, formula):
        half = dataset(rows=2)
        twice = Dataset.from_dict({name: [*half[name], *half[name]] for name in half.column_names})

        class InOrder(Trainer):
            def _get_train_sampler(self, *args, **kwargs):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        whole = train(build(formula=formula), tmp_path, twice, trainer=InOrder)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        parts = train(build(formula=formula), tmp_path, twice, trainer=InOrder, **options)
        torch.testing.assert_close(router_of(parts.model), router_of(whole.model), rtol=1e-4, atol=1e-5)
        start = router_of(build())
        assert (router_of(whole.model) - start).abs().max() > 1e-3

    def test_of_a_part_weighs_as_its_labels_do(self, build):
        model = build()
        ids = torch.tensor(dataset()["input_ids"])
        labels = ids.clone()
        labels[:, :4] = -100
        full = model(ids, labels=labels).loss
        out = model(ids, labels=labels, num_items_in_batch=torch.tensor(48))  # 12 of them here
        torch.testing.assert_close(out.loss, full / 4)
        for items in (48, torch.tensor([48])):
            again = model(ids, labels=labels, num_items_in_batch=items).loss
            torch.testing.assert_close(again.reshape(()), out.loss)
        shifted = torch.cat([labels[:, 1:], torch.full((4, 1), -100)], 1)
        again = model(ids, labels=labels, shift_labels=shifted, num_items_in_batch=torch.tensor(48))
        torch.testing.assert_close(again.loss, out.loss)

    def test_of_a_part_without_labels_is_nothing(self, build):
        model = build()
        ids = torch.tensor(dataset()["input_ids"])
        loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(24)).loss
        loss.backward()
        assert float(loss.detach()) == 0
        assert all(float(p.grad.abs().sum()) == 0 for p in model.base_model.router.parameters())

    def test_is_divided_by_a_trainer_that_counts_no_items(self, build, tmp_path):
        """A loss of the model's own that ignores the count: Trainer divides by the steps of accumulation."""

        class Uncounted(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.model_accepts_loss_kwargs = False

        whole = train(build(), tmp_path, dataset(), trainer=Uncounted)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        parts = train(build(), tmp_path, dataset(), trainer=Uncounted, **options)
        torch.testing.assert_close(router_of(parts.model), router_of(whole.model), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 2])
    def test_reaches_the_router_when_trainer_smooths_labels(self, build, tmp_path, steps):
        """Trainer takes the labels out of the inputs then and never sees outputs.loss."""
        options = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        got = train(build(), tmp_path, dataset(), label_smoothing_factor=0.1, **options)
        model = build()
        ids = torch.tensor(dataset()["input_ids"])
        out = model(ids)
        got.label_smoother.epsilon = 0.1
        loss = got.label_smoother({"logits": out.logits}, ids, shift_labels=True) + COEFFICIENT * out.router_aux_loss
        loss.backward()
        expected = torch.cat([(p - 1e-2 * p.grad).flatten() for p in model.base_model.router.parameters()])
        torch.testing.assert_close(router_of(got.model), expected.detach(), rtol=1e-4, atol=1e-5)

    def test_reaches_the_router_beside_a_loss_function_of_ones_own(self, build, tmp_path):
        def loss(outputs, labels, num_items_in_batch=None):
            logits = outputs.logits[:, :-1].flatten(0, 1)
            return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

        def with_the_term(outputs, labels, num_items_in_batch=None):
            return loss(outputs, labels, num_items_in_batch) + COEFFICIENT * outputs.router_aux_loss

        expected = router_of(train(build(), tmp_path, dataset()).model)
        for function in (loss, with_the_term):  # who adds it gets it once too
            got = router_of(train(build(), tmp_path, dataset(), compute_loss_func=function).model)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_is_not_part_of_the_loss_of_an_evaluation(self, build, tmp_path):
        model = build()
        trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=dataset())
        ids = torch.tensor(dataset()["input_ids"])
        with torch.no_grad():
            expected = build(coefficient=0.0).eval()(ids, labels=ids).loss
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)

    def test_in_bfloat16_is_that_of_float32(self, build, tmp_path):
        start = router_of(build())
        step = router_of(train(build(), tmp_path, dataset()).model) - start
        got = router_of(train(build(), tmp_path, dataset(), bf16=True).model) - start
        assert torch.nn.functional.cosine_similarity(step, got, 0) > 0.995
        assert float(got.norm() / step.norm()) == pytest.approx(1, abs=0.05)


class TestAGradientScaler:
    """What torch.amp.GradScaler does: the loss times a number before backward."""

    SCALE = 1024.0

    def gradients(self, model, loss):
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.base_model.router.parameters()])

    def test_scales_the_term_in_outputs_loss(self, build):
        ids = torch.tensor(dataset()["input_ids"])
        plain, scaled = build(), build()
        expected = self.gradients(plain, plain(ids, labels=ids).loss)
        got = self.gradients(scaled, scaled(ids, labels=ids).loss * self.SCALE)
        torch.testing.assert_close(got / self.SCALE, expected)

    def test_is_unseen_by_a_term_that_is_supplied_and_warned_of(self, build):
        ids = torch.tensor(dataset()["input_ids"])
        model = build()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(ids, labels=ids).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        with pytest.warns(UserWarning, match="gradient scaler"):
            loss.backward()

    def test_is_not_warned_of_where_the_loss_is_used(self, build):
        ids = torch.tensor(dataset()["input_ids"])
        model = build()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(ids, labels=ids).loss
            loss.backward()
