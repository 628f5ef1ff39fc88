"""Gradient checkpointing changes no gradient: of the experts, of given weights, of a router."""

import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from moelora import MoELoraConfig, adopt
from moelora.nn.routers import EmbeddingRouter, FixedRouter, HiddenStateRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
WIDTH = {"gpt2": 24, "llama": 32}
TARGETS = {"gpt2": ["wte", "c_attn", "c_proj"], "llama": ["embed_tokens", "q_proj", "down_proj", "lm_head"]}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}

pytestmark = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
UNKNOWN = "runs inside a checkpoint, which would compute it again without its routing weights"


@pytest.fixture
def build(kind, make_lora):
    """A model in training, checkpointing unless `reentrant` is None, enabled before or after it is adopted."""

    def build(reentrant, *, first="adopt", embeddings=True):
        targets = TARGETS[kind] if embeddings else TARGETS[kind][1:3]
        model = make_lora(kind, target_modules=targets).train()
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name:
                nn.init.normal_(parameter, std=0.2)
        if first == "adopt":
            adopt(model)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return adopt(model)

    return build


def results(model, loss, weights=()):
    """Value of the loss, and gradients of all that trains."""
    model.zero_grad()
    for w in weights:
        w.grad = None
    loss = loss(model)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | gradients | {f"weights {i}": w.grad.clone() for i, w in enumerate(weights)}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert not [name for name, value in expected.items() if not value.any()]


def given(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3), (2, 7, 3, 3), (1, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("first", ["adopt", "checkpointing"])
def test_of_given_weights(build, ids, reentrant, shape, first):
    w, embeddings = given(shape), len(shape) < 4
    step = lambda model: model(ids, labels=ids, routing_weights=w).loss  # noqa: E731
    expected = results(build(None, embeddings=embeddings), step, [w])
    assert_equal(results(build(reentrant, first=first, embeddings=embeddings), step, [w]), expected)


@pytest.mark.parametrize("reads", ["nothing", "embeddings", "layer", "layers"])
@pytest.mark.parametrize("formula", ["aux_loss", "switch", "z_loss"])
def test_of_a_router_whose_loss_counts_once(build, kind, ids, reentrant, reads, formula):
    routers = {
        "nothing": lambda: FixedRouter(NAMES, [1.0, 2.0, 3.0]),
        "embeddings": lambda: EmbeddingRouter(NAMES, WIDTH[kind]),
        "layer": lambda: HiddenStateRouter(NAMES, WIDTH[kind], layer=1),
        "layers": lambda: PerLayerRouter(NAMES, WIDTH[kind], num_layers=3),
    }
    if reads == "nothing" and formula != "aux_loss":
        pytest.skip("constant weights have no loss")

    def routed(reentrant):
        model = build(reentrant)
        torch.manual_seed(1)
        config = MoELoraConfig(load_balance_loss_type=formula, router_aux_loss_coef=2.0)
        model.base_model.attach_router(routers[reads](), config)
        return model

    step = lambda model: model(ids, labels=ids).loss  # noqa: E731
    assert_equal(results(routed(reentrant), step), results(routed(None), step))


def test_of_two_forwards_in_flight(build, ids, reentrant):
    w, v = given((2, 7, 3)), given((2, 3), seed=1)

    def step(model):
        first = model(ids, labels=ids, routing_weights=w).loss
        return first + 2 * model(ids.flip(1), labels=ids, routing_weights=v).loss

    assert_equal(results(build(reentrant), step, [w, v]), results(build(None), step, [w, v]))


def test_of_a_plain_and_a_routed_forward_in_flight(build, ids, reentrant):
    w = given((2, 7, 3))

    def step(model):
        plain = model(ids, labels=ids).loss
        return plain + 2 * model(ids.flip(1), labels=ids, routing_weights=w).loss

    assert_equal(results(build(reentrant), step, [w]), results(build(None), step, [w]))


def test_of_two_models_in_flight(build, ids, reentrant):
    w, v = given((2, 7, 3)), given((2, 7, 3), seed=1)

    def both(reentrant):
        return nn.ModuleList([build(reentrant), build(reentrant)])

    def step(models):
        one, other = models
        first = one(ids, labels=ids, routing_weights=w).loss
        return first + 2 * other(ids, labels=ids, routing_weights=v).loss

    assert_equal(results(both(reentrant), step, [w, v]), results(both(None), step, [w, v]))


def test_of_a_backward_on_another_thread_while_this_one_routes(build, ids, reentrant):
    w = given((2, 7, 3))

    class Elsewhere:
        def __init__(self, loss, model):
            self.loss, self.model = loss, model

        def detach(self):
            return self.loss.detach()

        def backward(self):
            thread = threading.Thread(target=self.loss.backward)
            thread.start()
            with torch.no_grad():
                self.model(ids, routing_weights=w.detach().flip(-1))
            thread.join()

    step = lambda model: Elsewhere(model(ids, labels=ids, routing_weights=w).loss, model)  # noqa: E731
    assert_equal(results(build(reentrant), step, [w]), results(build(None), step, [w]))


def test_with_inputs_that_require_gradients(build, ids, reentrant):
    """What Trainer and prepare_model_for_kbit_training switch on for frozen embeddings."""
    w = given((2, 7, 3))
    step = lambda model: model(ids, labels=ids, routing_weights=w).loss  # noqa: E731
    expected = results(build(None, embeddings=False), step, [w])
    model = build(reentrant, embeddings=False)
    model.enable_input_require_grads()
    assert_equal(results(model, step, [w]), expected)


def test_weights_are_needed_for_the_right_gradients(build, ids, reentrant):
    w = given((2, 7, 3))
    right = results(build(reentrant), lambda model: model(ids, labels=ids, routing_weights=w).loss, [w])
    wrong = results(build(reentrant), lambda model: model(ids, labels=ids, routing_weights=w.flip(-1)).loss, [w])
    assert not any(torch.allclose(wrong[name], right[name], **CLOSE) for name in right if "lora_" in name)


def test_switched_off_again_leaves_nothing(build, ids, reentrant):
    w = given((2, 7, 3))
    step = lambda model: model(ids, labels=ids, routing_weights=w).loss  # noqa: E731
    model = build(reentrant)
    results(model, step, [w])
    model.gradient_checkpointing_disable()
    assert_equal(results(model, step, [w]), results(build(None), step, [w]))


class Recomputed(torch.autograd.Function):
    """A reentrant checkpoint as libraries write their own."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(grad)
        return None, x.grad


def in_a_checkpoint_of_others(layer, reentrant):
    if not reentrant:
        return checkpoint_wrapper(layer)
    inner = layer.forward
    layer.forward = lambda x, **kwargs: Recomputed.apply(lambda x: inner(x, **kwargs), x)
    return layer


def test_of_others_is_refused_where_it_runs_and_not_in_plain_forwards(make_lora, ids, reentrant):
    model, plain = (adopt(make_lora("llama", target_modules=TARGETS["llama"][1:3]).train()) for _ in range(2))
    for of in (model, plain):
        of.enable_input_require_grads()
    layers = model.get_base_model().model.layers
    layers[1] = in_a_checkpoint_of_others(layers[1], reentrant)
    named = lambda got: {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in got.items()}  # noqa: E731
    step = lambda model: model(ids, labels=ids, use_cache=False).loss  # noqa: E731
    expected = results(plain, step)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"layers\.1\..*q_proj {UNKNOWN}"):
            model(ids, labels=ids, routing_weights=given((2, 3)))
        assert_equal(named(results(model, step)), expected)
    with torch.no_grad():  # nothing will be computed again
        model(ids, routing_weights=given((2, 3)))


def test_of_others_within_a_layer_that_carries_its_weights_is_refused(build, ids, reentrant):
    model = build(reentrant, embeddings=False)
    model.enable_input_require_grads()
    blocks = getattr(model.get_base_model(), "model", None) or model.get_base_model().transformer
    mlp = next(module for name, module in blocks.named_modules() if name.endswith("1.mlp"))
    inner = mlp.forward
    mlp.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    step = lambda model: model(ids, labels=ids, routing_weights=given((2, 3))).loss  # noqa: E731
    with pytest.raises(RuntimeError, match=UNKNOWN):
        results(model, step)


def test_of_others_around_a_call_with_parts_that_train_and_parts_that_do_not(make_lora, ids, reentrant):
    model = adopt(make_lora("llama", target_modules=TARGETS["llama"][1:3]).train())
    layers, w = model.get_base_model().model.layers, given((2, 3))
    layers[0].forward = torch.no_grad()(layers[0].forward)
    step = lambda model: model(ids, labels=ids, routing_weights=w).loss  # noqa: E731

    def around(model):
        return checkpoint(lambda w: model(ids, labels=ids, routing_weights=w).loss, w, use_reentrant=reentrant)

    class Early(torch.autograd.Function):
        """Differentiates while it runs forward, as a loss in pieces does."""

        @staticmethod
        def forward(ctx, w):
            with torch.enable_grad():
                loss = step(model)
            loss.backward()
            return loss.detach()

    names = lambda got: {name: g for name, g in got.items() if "layers.0" not in name}  # noqa: E731
    for parameter in layers[0].parameters():
        parameter.requires_grad = False
    expected = results(model, step, [w])
    assert_equal(names(results(model, around, [w])), names(expected))
    w.grad = None
    assert torch.equal(Early.apply(w), expected["loss"])
    torch.testing.assert_close(w.grad, expected["weights 0"], **CLOSE)


def test_of_others_around_a_compiled_layer_is_refused(make_lora, ids, reentrant):
    model = adopt(make_lora("llama", target_modules=TARGETS["llama"][1:3]).train())
    model.enable_input_require_grads()
    layers = model.get_base_model().model.layers
    layers[1].compile(backend="eager")
    layers[1] = in_a_checkpoint_of_others(layers[1], reentrant)
    with pytest.raises(RuntimeError, match=UNKNOWN):
        model(ids, labels=ids, routing_weights=given((2, 3)), use_cache=False)


def test_of_others_between_the_call_and_the_model_inside_is_refused(make_lora, ids, reentrant):
    model = adopt(make_lora("llama", target_modules=TARGETS["llama"][1:3]).train())
    inner = model.base_model.forward

    def forward(inputs_embeds, **kwargs):
        return checkpoint(lambda x: inner(inputs_embeds=x, **kwargs).logits, inputs_embeds, use_reentrant=reentrant)

    model.base_model.forward = forward
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with pytest.raises(RuntimeError, match=f"the model inside {UNKNOWN}"):
        model(inputs_embeds=embeds, use_cache=False, routing_weights=given((2, 3)))


def test_of_an_encoder_that_runs_on_its_own(make_lora, ids, reentrant):
    def gradients(reentrant):
        model = adopt(make_lora("t5").train())
        model.base_model.attach_router(FixedRouter(NAMES, [1.0, 2.0, 3.0]))
        model.get_base_model().get_decoder().requires_grad_(False)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        encoder = model.get_base_model().get_encoder()
        return results(model, lambda _: encoder(input_ids=ids).last_hidden_state[..., ::2].sum())

    assert_equal(gradients(reentrant), gradients(None))
