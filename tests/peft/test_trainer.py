"""transformers.Trainer trains experts and router, and counts the balance loss as it counts the loss."""

import warnings

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from moelora import RoutingWeightsCollator, adopt
from moelora.nn import parameter_groups

NAMES = ["expert_0", "expert_1", "expert_2"]
COEFFICIENT = 5.0
VOCAB = 97


@pytest.fixture
def build(make_lora, balanced):
    """An adopted model with a router in training, and the balance loss so heavy that it shows."""

    def build(kind="llama", formula="z_loss", coefficient=COEFFICIENT):
        return balanced(adopt(make_lora(kind)), coefficient, formula, {"llama": 32, "gpt2": 24}[kind])

    return build


def dataset(rows=4, length=7, masked=0):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :masked] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def train(model, step, data, *, trainer=Trainer, **options):
    known = {name: options.pop(name) for name in ("data_collator", "compute_loss_func") if name in options}
    trained = trainer(model=model, args=TrainingArguments(**step | options), train_dataset=data, **known)
    trained.train()
    return trained


def router_of(model):
    return torch.cat([p.detach().flatten() for p in model.base_model.router.parameters()])


def experts_of(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])


def test_experts_and_router_learn(build, one_step, kind):
    model = build(kind, coefficient=0.01)
    experts, router = experts_of(model), router_of(model)
    trainer = train(model, one_step, dataset(), max_steps=8, optim="adamw_torch")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    for before, after in ((experts, experts_of(model)), (router, router_of(model))):
        assert (before != after).float().mean() > 0.8  # an expert that is never picked stays


class TestBalanceLoss:
    def test_is_part_of_the_loss_that_is_logged_and_trained(self, build, one_step):
        data = dataset()
        model = build()
        ids = torch.tensor(data["input_ids"])
        with torch.no_grad():
            out = model(ids, labels=ids)
        trainer = train(model, one_step, data)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(out.loss), rel=1e-5)
        without = build(coefficient=0.0)
        with torch.no_grad():
            plain = without(ids, labels=ids).loss
        torch.testing.assert_close(out.loss, plain + COEFFICIENT * out.router_aux_loss)
        train(without, one_step, data)
        assert not torch.allclose(router_of(model), router_of(without), rtol=1e-3)

    @pytest.mark.parametrize("masked", [0, 3])
    def test_is_that_of_the_whole_batch_under_accumulation_where_it_is_a_mean_over_tokens(
        self, build, one_step, masked
    ):
        whole = train(build(), one_step, dataset(masked=masked))
        for size in (1, 2):
            parts = train(
                build(),
                one_step,
                dataset(masked=masked),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )
            torch.testing.assert_close(router_of(parts.model), router_of(whole.model), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(experts_of(parts.model), experts_of(whole.model), rtol=1e-4, atol=1e-5)
            assert parts.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-4)

    @pytest.mark.parametrize("formula", ["aux_loss", "switch"])
    def test_is_that_of_the_whole_batch_for_equal_parts_under_accumulation(self, build, one_step, formula):
        half = dataset(rows=2)
        twice = Dataset.from_dict({name: [*half[name], *half[name]] for name in half.column_names})

        class InOrder(Trainer):
            def _get_train_sampler(self, *args, **kwargs):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        whole = train(build(formula=formula), one_step, twice, trainer=InOrder)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        parts = train(build(formula=formula), one_step, twice, trainer=InOrder, **options)
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

    def test_is_divided_by_a_trainer_that_counts_no_items(self, build, one_step):
        """A loss of the model's own that ignores the count: Trainer divides by the steps of accumulation."""

        class Uncounted(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.model_accepts_loss_kwargs = False

        whole = train(build(), one_step, dataset(), trainer=Uncounted)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        parts = train(build(), one_step, dataset(), trainer=Uncounted, **options)
        torch.testing.assert_close(router_of(parts.model), router_of(whole.model), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 2])
    def test_reaches_the_router_when_trainer_smooths_labels(self, build, one_step, steps):
        """Trainer takes the labels out of the inputs then and never sees outputs.loss."""
        options = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        got = train(build(), one_step, dataset(), label_smoothing_factor=0.1, **options)
        model = build()
        ids = torch.tensor(dataset()["input_ids"])
        out = model(ids)
        got.label_smoother.epsilon = 0.1
        loss = got.label_smoother({"logits": out.logits}, ids, shift_labels=True) + COEFFICIENT * out.router_aux_loss
        loss.backward()
        expected = torch.cat([(p - 1e-2 * p.grad).flatten() for p in model.base_model.router.parameters()])
        torch.testing.assert_close(router_of(got.model), expected.detach(), rtol=1e-4, atol=1e-5)

    def test_reaches_the_router_beside_a_loss_function_of_ones_own(self, build, one_step):
        def loss(outputs, labels, num_items_in_batch=None):
            logits = outputs.logits[:, :-1].flatten(0, 1)
            return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

        def with_the_term(outputs, labels, num_items_in_batch=None):
            return loss(outputs, labels, num_items_in_batch) + COEFFICIENT * outputs.router_aux_loss

        expected = router_of(train(build(), one_step, dataset()).model)
        for function in (loss, with_the_term):  # who adds it gets it once too
            got = router_of(train(build(), one_step, dataset(), compute_loss_func=function).model)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_is_not_part_of_the_loss_of_an_evaluation(self, build, one_step):
        model = build()
        trainer = Trainer(model=model, args=TrainingArguments(**one_step), eval_dataset=dataset())
        ids = torch.tensor(dataset()["input_ids"])
        with torch.no_grad():
            expected = build(coefficient=0.0).eval()(ids, labels=ids).loss
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)

    def test_in_bfloat16_is_that_of_float32(self, build, one_step):
        start = router_of(build())
        step = router_of(train(build(), one_step, dataset()).model) - start
        got = router_of(train(build(), one_step, dataset(), bf16=True).model) - start
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


class TestParameterGroups:
    def test_divide_what_is_trained(self, build):
        model = build()
        frozen = next(name for name, _ in model.named_parameters() if "expert_1" in name)
        model.get_parameter(frozen).requires_grad_(False)
        groups = parameter_groups(model, lr=1e-3, router_lr=1e-4, weight_decay=0.1)
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-4, 0.1), (1e-4, 0.0)]
        names = {id(p): name for name, p in model.named_parameters()}
        divided = [{names[id(p)] for p in group["params"]} for group in groups]
        assert divided[0] == {name for name in names.values() if "lora_" in name} - {frozen}
        assert divided[1] == {f"base_model.router.gate.{i}.weight" for i in range(3)}
        assert divided[2] == {f"base_model.router.gate.{i}.bias" for i in range(3)}

    def test_take_the_rate_of_the_rest_for_the_router_where_none_is_given(self, build):
        assert {group["lr"] for group in parameter_groups(build(), lr=0.5)} == {0.5}

    def test_know_any_attached_module(self, make_lora):
        model = adopt(make_lora("llama"))
        model.base_model.attach_router(nn.Linear(32, 3))
        groups = parameter_groups(model, lr=1.0, router_lr=2.0)
        assert [len(group["params"]) for group in groups if group["lr"] == 2.0] == [1, 1]

    def test_need_something_to_train(self, build):
        with pytest.raises(ValueError, match="PeftModelForCausalLM has none"):
            parameter_groups(build().requires_grad_(False), lr=1.0)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"lr": "fast"}, TypeError),
            ({"lr": -1.0}, ValueError),
            ({"lr": 1.0, "router_lr": float("nan")}, ValueError),
            ({"lr": 1.0, "weight_decay": None}, TypeError),
        ],
    )
    def test_refuse_what_is_no_rate(self, arguments, error):
        with pytest.raises(error, match=rf"^{list(arguments)[-1]} must be"):
            parameter_groups(nn.Linear(2, 2), **arguments)

    def test_refuse_what_is_no_module(self):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
            parameter_groups([nn.Parameter(torch.ones(2))], lr=1.0)

    @pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
    def test_give_the_router_its_rate_in_trainer(self, build, one_step, way):
        model = build()
        experts, router = experts_of(model), router_of(model)
        groups = parameter_groups(model, lr=1e-2, router_lr=0.0)
        given = {
            "optimizers": (torch.optim.AdamW(groups), None),
            "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups}),
        }[way]
        Trainer(model=model, args=TrainingArguments(**one_step), train_dataset=dataset(), **{way: given}).train()
        assert torch.equal(router_of(model), router)
        assert not torch.equal(experts_of(model), experts)


class TestRoutingWeightsInADataset:
    """A column of weights is passed to the model, which trains with it."""

    @pytest.fixture
    def tokenizer(self):
        words = {"[PAD]": 0} | {f"w{i}": i for i in range(1, VOCAB)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")

    @staticmethod
    def weighted(data, weights):
        return data.add_column("routing_weights", weights)

    @staticmethod
    def grown(model):
        """Which experts' B have changed, from what they were at the start."""
        return {
            name.split(".")[-2]: p.detach().clone()
            for name, p in model.named_parameters()
            if "0.self_attn.q_proj.lora_B" in name
        }

    @pytest.mark.parametrize("collator", ["default", "padding", "language"])
    def test_of_each_sequence_chooses_the_experts_that_learn(self, make_lora, one_step, tokenizer, collator):
        collate = {
            "default": default_data_collator,
            "padding": DataCollatorWithPadding(tokenizer),
            "language": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        }[collator]
        for chosen in range(3):
            model = adopt(make_lora("llama"))
            before = self.grown(model)
            weights = [[float(i == chosen) for i in range(3)]] * 4
            data = self.weighted(dataset(), weights)
            train(
                model,
                one_step,
                data if collator != "language" else data.remove_columns("labels"),
                data_collator=collate,
            )
            after = self.grown(model)
            changed = [not torch.equal(before[name], after[name]) for name in NAMES]
            assert changed == [i == chosen for i in range(3)]

    def test_wins_over_a_router(self, build, one_step):
        model = build()
        before = router_of(model)
        train(model, one_step, self.weighted(dataset(), [[0.2, 0.3, 0.5]] * 4))
        assert torch.equal(router_of(model), before)

    def test_of_integers_are_taken_too(self, make_lora, one_step):
        results = []
        for row in ([0, 1, 0], [0.0, 1.0, 0.0]):
            model = adopt(make_lora("llama"))
            train(model, one_step, self.weighted(dataset(), [row] * 4))
            results.append(experts_of(model))
        assert torch.equal(*results)

    @staticmethod
    def uneven():
        generator = torch.Generator().manual_seed(3)
        rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (7, 4)]
        weights = [torch.rand(len(row), 3, generator=generator).tolist() for row in rows]
        return Dataset.from_dict({"input_ids": rows, "routing_weights": weights})

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_of_each_token_is_padded_as_the_tokens_are(self, tokenizer, side):
        tokenizer.padding_side = side
        collator = RoutingWeightsCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False))
        data = self.uneven()
        batch = collator([data[0], data[1]])
        assert batch["routing_weights"].shape == (2, 7, 3)
        present = batch["attention_mask"].bool()
        given = [*data[0]["routing_weights"], *data[1]["routing_weights"]]
        torch.testing.assert_close(batch["routing_weights"][present], torch.tensor(given))
        assert not batch["routing_weights"][~present].any()

    def test_of_each_token_weighs_that_token(self, make_lora, tokenizer, one_step):
        collator = RoutingWeightsCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False))
        data, model = self.uneven(), adopt(make_lora("llama"))
        expected = 0.0
        for row in data:  # each alone, unpadded
            ids, weights = torch.tensor([row["input_ids"]]), torch.tensor([row["routing_weights"]])
            with torch.no_grad():
                expected += float(model(ids, labels=ids, routing_weights=weights, num_items_in_batch=9).loss)
        trainer = train(model, one_step, data, data_collator=collator)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("given", [None, "abc", ["a"], [[1.0], [1.0, 2.0]], 1.0, [[[1.0]]]])
    def test_that_are_none_name_their_row(self, given):
        rows = [{"input_ids": [1], "routing_weights": [1.0]}, {"input_ids": [2]}]
        if given is not None:
            rows[1]["routing_weights"] = given
        with pytest.raises(ValueError, match=r"routing_weights must be numbers \[N\] or \[S, N\] .* row 1 has"):
            RoutingWeightsCollator(default_data_collator)(rows)

    def test_need_rows_and_a_collator(self):
        with pytest.raises(ValueError, match="features must hold at least one row"):
            RoutingWeightsCollator(default_data_collator)([])
        with pytest.raises(TypeError, match="collate must be callable, got NoneType"):
            RoutingWeightsCollator(None)

    @pytest.mark.parametrize("first, second", [([1.0], [1.0, 2.0]), ([[1.0]], [[1.0, 2.0]])])
    def test_of_different_numbers_of_experts_are_an_error(self, first, second):
        rows = [{"input_ids": [1], "routing_weights": weights} for weights in (first, second)]
        with pytest.raises(ValueError, match="in every row, got"):
            RoutingWeightsCollator(default_data_collator)(rows)

    def test_of_another_number_of_tokens_is_an_error(self):
        collator = RoutingWeightsCollator(default_data_collator)
        with pytest.raises(ValueError, match=r"are for \[2\] tokens, the sequences of the batch have \[3\]"):
            collator([{"input_ids": [1, 2, 3], "routing_weights": [[1, 0], [0, 1]]}])
        with pytest.raises(ValueError, match="in every row"):
            collator([{"input_ids": [1], "routing_weights": [1]}, {"input_ids": [2], "routing_weights": [[1]]}])
