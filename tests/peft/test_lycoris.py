"""LoHa and LoKr experts are mixed as LoRA's are; each expert is what PEFT's own module makes of it."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners import loha, lokr
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt, release
from moelora.nn.routers import FixedRouter, Router
from moelora.peft.inspection import inspect_checkpoint
from moelora.peft.model import LoHaModel, LoKrModel

NAMES = ["expert_0", "expert_1", "expert_2"]
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "loha": (LoHaConfig, {}),
    "lokr": (LoKrConfig, {}),  # W1 whole, W2 in two factors
    "lokr of four factors": (LoKrConfig, {"r": 1, "decompose_both": True}),
    "lokr of whole matrices": (LoKrConfig, {"r": 40, "decompose_factor": 4}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def make(make_base):
    def make(kind, n=3, family="llama", **options):
        """A stock PeftModel with n active experts that all do something."""
        of, settings = KINDS[kind]
        about = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        if family == "t5":
            about = {"target_modules": ["q", "v", "wi"], "task_type": "SEQ_2_SEQ_LM"}
        settings = {"r": 2, "alpha": 3} | about | settings | options
        config = of(**settings)
        model = peft.get_peft_model(make_base(family), config, adapter_name=NAMES[0])
        for name in NAMES[1:n]:
            model.add_adapter(name, copy.deepcopy(config))
        model.base_model.set_adapter(NAMES[:n])
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "hada_" in name or "lokr_" in name:
                nn.init.normal_(parameter, std=0.6)
        return model.eval()

    return make


def looping(model, weights, by_layer=None):
    """The plain loop over experts that routed layers are compared with, in a stock model."""

    def forward_of(layer, weights):
        def forward(x):
            y = layer.base_layer(x)
            for i, name in enumerate(layer.active_adapters):
                w = weights[..., i, None]
                w = w.unsqueeze(1) if weights.dim() == 2 else w
                y = y + w * nn.functional.linear(x, layer.get_delta_weight(name))
            return y

        return forward

    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.forward = forward_of(layer, weights if by_layer is None else by_layer(name))
    return model


def test_without_weights_it_is_stock_bit_for_bit_and_release_gives_the_stock_classes_back(make, kind, ids):
    stock, model = make(kind), adopt(make(kind))
    tuner, layer = (LoHaModel, loha.Linear) if kind == "loha" else (LoKrModel, lokr.Linear)
    assert type(model.base_model) is tuner
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert list(model.state_dict()) == list(stock.state_dict())
    release(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert layer in {type(m) for m in model.modules()}
    assert vars(model.base_model).keys() == vars(stock.base_model).keys()


def test_one_hot_weights_equal_the_module_of_peft_with_that_expert_alone(make, kind, ids):
    stock, model = make(kind), adopt(make(kind))
    for i, name in enumerate(NAMES):
        stock.base_model.set_adapter(name)
        expected = stock(ids).logits
        for w in (torch.eye(3)[i], torch.eye(3)[i].expand(2, 7, 3)):
            torch.testing.assert_close(model(ids, routing_weights=w).logits, expected, **CLOSE)
    assert not torch.allclose(model(ids, routing_weights=torch.eye(3)[0]).logits, expected, atol=1e-3)


def test_weights_of_one_equal_the_several_active_adapters_of_peft(make, kind, ids):
    stock, model = make(kind), adopt(make(kind))
    expected = stock(ids).logits
    for shape in ((3,), (2, 3), (2, 7, 3), (2, 7, 3, 3)):
        torch.testing.assert_close(model(ids, routing_weights=torch.ones(shape)).logits, expected, **CLOSE)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)])
def test_a_training_step_equals_a_loop_over_experts(make, kind, shape, ids, same_step):
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = (weights.clone().requires_grad_() for _ in range(2))
    model, reference = adopt(make(kind)), looping(make(kind), theirs)
    same_step(model.train(), reference.train(), ids, mine, **CLOSE)
    torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
    assert mine.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(make, reentrant, ids, weights, gradients):
    def step(checkpointing):
        model, w = adopt(make("loha")).train(), weights.clone().requires_grad_()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, routing_weights=w, use_cache=False).loss.backward()
        return gradients(model) | {"w": w.grad}

    got, expected = step(True), step(False)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_a_layer_alone_takes_what_a_layer_of_lora_takes(make, name):
    layer = adopt(make(name)).base_model.model.model.layers[0].self_attn.q_proj
    x, w = torch.randn(5, 32), torch.rand(5, 3)
    y = layer.base_layer(x)
    for i, expert in enumerate(NAMES):
        y = y + w[:, i, None] * (x @ layer.get_delta_weight(expert).T)
    torch.testing.assert_close(layer(x, routing_weights=w), y, **CLOSE)
    with pytest.raises(ValueError, match=r"routing_weights must have shape .* got \(4, 3\)"):
        layer(x, routing_weights=torch.rand(4, 3))
    with pytest.raises(ValueError, match="one column for each active adapter"):
        layer(x, routing_weights=torch.rand(5, 2))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_experts_of_different_dtypes(make, name, dtypes, shape):
    layer = adopt(make(name)).base_model.model.model.layers[0].self_attn.q_proj
    for parameter, dtype in ((p, dtypes[NAMES[1] in key]) for key, p in layer.named_parameters() if "base" not in key):
        parameter.data = parameter.data.to(dtype)
    x, w = torch.randn(2, 7, 32, requires_grad=True), torch.rand(shape, requires_grad=True)
    y = layer(x, routing_weights=w)
    spread = w.unsqueeze(1) if w.dim() == 2 else w
    expected = layer.base_layer(x)
    for e, expert in enumerate(NAMES):
        delta = layer.get_delta_weight(expert)
        assert delta.dtype is dtypes[e == 1]
        expected = expected + spread[..., e, None] * nn.functional.linear(x, delta.float())
    torch.testing.assert_close(y, expected, **CLOSE)
    leaves = [x, w, *(p for key, p in layer.named_parameters() if "base" not in key)]
    g = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(result, leaves, g) for result in (y, expected))
    for leaf, ours, theirs in zip(leaves, got, wanted, strict=True):
        assert ours.dtype is leaf.dtype
        close = CLOSE if leaf.dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02 * theirs.abs().max().item()}
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("options", [{"module_dropout": 0.4}, {"module_dropout": 0.4, "rank_dropout": 0.3}])
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_dropout_of_rows_and_of_experts_is_that_of_peft(make, name, options, ids):
    stock, model = make(name, **options).train(), adopt(make(name, **options)).train()
    for seed in range(3):
        torch.manual_seed(seed)
        expected = stock(ids).logits
        for shape in ((3,), (2, 7, 3)):
            torch.manual_seed(seed)
            torch.testing.assert_close(model(ids, routing_weights=torch.ones(shape)).logits, expected, **CLOSE)
    assert not torch.allclose(expected, stock.eval()(ids).logits, atol=1e-3)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_an_expert_that_is_dropped_has_zero_gradients(make, name, ids, weights):
    model = adopt(make(name, module_dropout=1.0)).train()
    model(ids, labels=ids, routing_weights=weights).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "hada_w" in n or "lokr_w" in n]
    assert grads and all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_peft(make, dtype, ids, weights):
    for name in ("loha", "lokr"):
        stock, model = make(name), adopt(make(name))
        for m in (stock, model):
            m.base_model.model.to(dtype)
            for n, p in m.named_parameters():
                p.data = p.data.float() if "hada_" in n or "lokr_" in n else p.data
        out = model(ids, labels=ids, routing_weights=torch.ones(2, 7, 3)).logits
        expected = stock(ids).logits
        assert out.dtype is expected.dtype is dtype
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else CLOSE
        torch.testing.assert_close(out, expected, **tolerance)
        model(ids, labels=ids, routing_weights=weights).loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_a_layer_under_autocast_is_that_of_peft(make, name, dtype, gradients):
    x, g = torch.randn(2, 7, 32), torch.randn(2, 7, 32)

    def step(model, **routing):
        layer, read = model.base_model.model.model.layers[0].self_attn.q_proj, x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = layer(read, **routing)
        y.backward(g.to(y.dtype))
        return gradients(model) | {"x": read.grad, "y": y}

    expected = step(make(name))
    for shape in ((3,), (2, 7, 3)):
        got = step(adopt(make(name)), routing_weights=torch.ones(shape))
        assert {key: t.dtype for key, t in got.items()} == {key: t.dtype for key, t in expected.items()}
        for key, value in expected.items():
            assert (got[key] - value).float().norm() < 2 * torch.finfo(dtype).eps * value.float().norm(), key


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_weights_of_each_stack_of_an_encoder_decoder_model_equal_a_loop(make, name, ids, gradients):
    labels = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(8))

    def step(model, **routing):
        loss = model(input_ids=ids, labels=labels, **routing).loss
        loss.backward()
        return loss, gradients(model)

    def given():
        chance = torch.Generator().manual_seed(9)
        return {s: torch.rand(2, n, 3, generator=chance).requires_grad_() for s, n in (("encoder", 7), ("decoder", 5))}

    mine, theirs = given(), given()
    reads = lambda layer: "encoder" if ".encoder." in layer or "EncDecAttention.v" in layer else "decoder"  # noqa: E731
    reference = looping(make(name, family="t5"), None, by_layer=lambda layer: theirs[reads(layer)])
    loss, got = step(adopt(make(name, family="t5")), routing_weights=mine)
    expected, wanted = step(reference)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(
        got | {s: w.grad for s, w in mine.items()}, wanted | {s: w.grad for s, w in theirs.items()}, **CLOSE
    )
    assert all(w.grad.abs().sum() > 0 for w in mine.values())


@pytest.mark.parametrize(("name", "shape"), [("loha", (2, 7, 3)), ("lokr", (3,))])
def test_a_training_step_compiles_without_a_break(make, name, shape, ids, gradients):
    torch._dynamo.reset()
    w = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    eager, model = adopt(make(name, target_modules=["q_proj"])), adopt(make(name, target_modules=["q_proj"]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, got = (m(ids, labels=ids, use_cache=False, routing_weights=w) for m in (eager, compiled))
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    expected.loss.backward()
    got.loss.backward()
    torch.testing.assert_close(gradients(model), gradients(eager), **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_generation_with_a_cache_equals_one_without(make, name, ids):
    model = adopt(make(name))
    w = torch.rand(2, 13, 3, generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 6, "do_sample": False, "routing_weights": w}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(cached, model.generate(ids, **(options | {"routing_weights": -3 * w})))


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_routers_act_by_themselves(make, name, ids):
    model = adopt(make(name))
    w = torch.tensor([0.5, 0.3, 0.2])
    expected = model(ids, routing_weights=w).logits
    model.base_model.attach_router(FixedRouter(NAMES, weights=w))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    model.base_model.detach_router()

    config = MoELoraConfig(num_experts=3, top_k_experts=2)
    router = model.base_model.make_router(config)
    model.base_model.attach_router(router, config)
    assert isinstance(model.base_model.router, Router)
    out = model.train()(ids, labels=ids)
    out.loss.backward()
    assert out.router_aux_loss.isfinite()
    assert all(p.grad is not None for p in router.parameters())


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_mixed_logits_are_those_of_the_passes_with_each_expert(make, name, ids, weights):
    stock, model = make(name), adopt(make(name))
    expected = 0
    for i, expert in enumerate(NAMES):
        stock.base_model.set_adapter(expert)
        expected = expected + weights[..., i, None] * stock(ids).logits
    out = model(ids, routing_weights=weights, mixture="logits", use_cache=False)
    torch.testing.assert_close(out.logits, expected, **CLOSE)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_a_saved_mixture_opens_again_and_each_expert_in_stock_peft(make, make_base, name, ids, tmp_path):
    model = adopt(make(name))
    model.base_model.attach_router(FixedRouter(NAMES, weights=torch.tensor([0.5, 0.3, 0.2])))
    model.save_pretrained(tmp_path)
    opened = moelora.PeftModel.from_pretrained(make_base("llama"), tmp_path).eval()
    assert list(opened.peft_config) == NAMES
    torch.testing.assert_close(opened(ids).logits, model(ids).logits, **CLOSE)
    described = inspect_checkpoint(tmp_path)
    assert [expert["alpha"] for expert in described["experts"]] == [model.peft_config[name].alpha for name in NAMES]
    assert not described["problems"]
    alone = peft.PeftModel.from_pretrained(make_base("llama"), str(tmp_path / NAMES[1])).eval()
    torch.testing.assert_close(alone(ids).logits, model(ids, routing_weights=torch.eye(3)[1]).logits, **CLOSE)


def test_all_experts_can_be_activated(make):
    model = adopt(make("loha"))
    model.set_adapter(NAMES[1])
    assert moelora.activate_all_experts(model) == NAMES
    assert all(p.requires_grad for n, p in model.named_parameters() if "hada_" in n)


def test_adapters_added_after_adoption_are_routed(make_base, ids):
    config = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    model = moelora.get_peft_model(make_base("llama"), config, "a").eval()
    model.add_adapter("b", LoHaConfig(r=3, target_modules=["v_proj"], init_weights=False))
    model.base_model.set_adapter(["a", "b"])
    out = model(ids, routing_weights=torch.tensor([0.0, 1.0])).logits
    model.base_model.set_adapter("b")
    torch.testing.assert_close(out, model(ids).logits, **CLOSE)


def test_the_namespace_has_the_routed_classes():
    from moelora.peft.tuners.loha import Linear as OfLoHa
    from moelora.peft.tuners.loha import LoHaModel as Mirrored
    from moelora.peft.tuners.lokr import Linear as OfLoKr

    assert Mirrored is LoHaModel is moelora.peft.LoHaModel and issubclass(OfLoHa, loha.Linear)
    assert issubclass(OfLoKr, lokr.Linear) and OfLoKr is not lokr.Linear


def test_patched_peft_makes_routed_models(make, ids):
    with moelora.patch_peft():
        model = make("lokr")
    assert type(model.base_model) is LoKrModel
    with model.disable_adapter():
        base = model(ids).logits
    torch.testing.assert_close(model(ids, routing_weights=torch.zeros(3)).logits, base, **CLOSE)
    assert type(make("lokr").base_model) is lokr.LoKrModel


def test_a_router_that_peft_would_save_with_the_adapters_is_refused(make):
    model = adopt(make("loha"))
    router = nn.Linear(4, 3)
    router.register_buffer("hada_table", torch.zeros(1))
    with pytest.raises(ValueError, match="hada_table"):
        model.base_model.attach_router(router)
