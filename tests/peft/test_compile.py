"""torch.compile: a routed model breaks the graph and compiles anew only where stock PEFT does, with eager's results."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from moelora import MoELoraConfig, adopt
from moelora.nn import EmbeddingRouter, FixedRouter, HiddenStateRouter, PerLayerRouter, Router

NAMES = ["expert_0", "expert_1", "expert_2"]
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj"]}
GIVEN = {"[N]": (3,), "[B, N]": (2, 3), "[B, S, N]": (2, 7, 3), "[B, S, L, N]": (2, 7, 3, 3)}

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def router_for(kind: str, reads: str) -> Router:
    size = {"gpt2": 24, "llama": 32}[kind]
    torch.manual_seed(21)
    router: Any
    if reads == "nothing":
        return FixedRouter(NAMES, [3, 1, 2])
    if reads == "embeddings":
        router = EmbeddingRouter(NAMES, size, top_k=2)
    elif reads == "layer":
        router = HiddenStateRouter(NAMES, size, layer=1, top_k=1)
        router.activated[2] = False
    else:
        router = PerLayerRouter(NAMES, size, num_layers=3, top_k=2, capacity_factor=0.8)
        router.mark_mature("expert_1", 0.5)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.5)
    return router


@pytest.fixture
def build(make_lora) -> Callable[..., Any]:
    def build(kind: str, how: str) -> tuple[Any, dict[str, Any]]:
        """A model and more arguments for it; `how` is "stock", a shape of weights, or what a router reads."""
        model = make_lora(kind, target_modules=TARGETS[kind])
        if how == "stock":
            return model, {}
        adopt(model)
        if how in GIVEN:
            return model, {"routing_weights": torch.rand(GIVEN[how], generator=torch.Generator().manual_seed(22))}
        moe_config = MoELoraConfig(router_aux_loss_coef=5.0, load_balance_loss_type="switch")
        model.base_model.attach_router(router_for(kind, how), moe_config)
        return model, {}

    return build


def breaks() -> int:
    return sum(counters["graph_break"].values())


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def train(model: Any, call: Any, gradients: Any, loss: Callable[[Any], torch.Tensor], **inputs: Any) -> tuple[Any, ...]:
    out = call(**inputs)
    loss(out).backward()
    grads = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    return out.loss.detach(), out.logits.detach(), getattr(out, "router_aux_loss", torch.zeros(())).detach(), grads


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


def own_loss(ids: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    return lambda out: nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("llama", "layers"),
        *(pytest.param("llama", how, marks=SLOW) for how in (*GIVEN, "nothing", "embeddings", "layer")),
        pytest.param("gpt2", "layers", marks=SLOW),
    ],
)
def test_training_in_one_graph(kind, how, build, ids, gradients):
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    inputs["attention_mask"][1, :2] = 0
    stock, _ = build(kind, "stock")
    torch.compile(stock.train(), backend="eager")(**inputs)
    allowed = breaks()
    model, given = build(kind, how)
    expected = train(model.train(), model, gradients, lambda out: out.loss, **inputs, **given)
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(train(model, compiled, gradients, lambda out: out.loss, **inputs, **given), expected)
    assert breaks() <= allowed
    if given:  # other weights, other results, in the code that there is
        before = graphs()
        other = {"routing_weights": torch.rand_like(given["routing_weights"])}
        logits = compiled(**inputs, **other).logits
        assert not torch.allclose(logits, expected[1], atol=1e-3)
        assert_same(logits, model(**inputs, **other).logits)
        assert graphs() == before


@pytest.mark.parametrize("how", ["[B, S, N]", "layers"])
def test_evaluation_in_one_graph(how, build, ids):
    model, given = build("llama", how)
    expected, got = (call(ids, **given) for call in (model, torch.compile(model, backend="eager", fullgraph=True)))
    torch.testing.assert_close(got.logits, expected.logits)
    if not given:
        torch.testing.assert_close(got.router_aux_loss, expected.router_aux_loss)


def test_the_routing_loss_counts_once_for_a_trainer_that_ignores_outputs_loss(build, ids, gradients):
    model, _ = build("llama", "layers")
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    inputs = {"input_ids": ids, "labels": ids}
    loss = own_loss(ids)
    expected = train(model, model, gradients, lambda out: loss(out) + 5.0 * out.router_aux_loss, **inputs)[3]
    for differentiated in (loss, lambda out: out.loss, lambda out: loss(out) + 5.0 * out.router_aux_loss):
        assert_same(train(model, compiled, gradients, differentiated, **inputs)[3], expected)
    gates = [name for name in expected if "router" in name]
    model.base_model.moe_config.router_aux_loss_coef = 0.0
    plain = train(model, model, gradients, loss, **inputs)[3]
    assert gates and not any(torch.allclose(plain[name], expected[name]) for name in gates)


@SLOW
@pytest.mark.parametrize(("how", "reentrant"), [("[B, S, L, N]", True), ("layers", False)])
def test_gradient_checkpointing(how, reentrant, build, ids, gradients):
    def prepared(how: str) -> tuple[Any, dict[str, Any]]:
        model, given = build("llama", how)
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return model, given

    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    stock, _ = prepared("stock")
    torch.compile(stock, backend="eager")(**inputs)
    allowed = breaks()
    plain, given = build("llama", how)
    expected = train(plain.train(), plain, gradients, lambda out: out.loss, **inputs, **given)
    counters.clear()
    model, given = prepared(how)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(train(model, compiled, gradients, lambda out: out.loss, **inputs, **given), expected)
    assert breaks() <= allowed


@SLOW
def test_compiles_anew_where_stock_peft_does(build):
    """Evaluation, training, other lengths; weights of its own in each step."""

    def run(how: str) -> list[int]:
        torch._dynamo.reset()
        counters.clear()
        model, given = build("llama", how)
        compiled = torch.compile(model, backend="eager")
        seen = []
        for batch, seq, training in [(2, 7, False)] * 3 + [(2, 7, True)] * 2 + [(2, n, False) for n in (8, 9, 10)]:
            ids = torch.randint(3, 97, (batch, seq))
            weights = {"routing_weights": torch.rand(batch, seq, 3)} if given else {}
            compiled(ids, labels=ids if training else None, **weights)
            seen.append(graphs())
            if how == "layers":
                model.base_model.router.mark_mature("expert_0", 1 / len(seen))
        return seen

    stock = run("stock")
    for how in ("[B, S, N]", "layers"):
        assert run(how) == stock


@SLOW
@pytest.mark.parametrize("cache", [None, "static"])
def test_generates_with_a_compiled_forward(cache, build, ids):
    """The length of the cache grows in every step, which must not compile anew in every step."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    compiled = {}
    for how in ("stock", "[B, S, N]", "layers"):
        torch._dynamo.reset()
        counters.clear()
        model, given = build("llama", how)
        expected = model.generate(input_ids=ids, cache_implementation=cache, **options, **given)
        top = model.base_model.model
        top.forward = torch.compile(top.forward, backend="eager")
        got = model.generate(input_ids=ids, cache_implementation=cache, **options, **given)
        assert torch.equal(got, expected)
        compiled[how] = graphs(), breaks()
    assert compiled["[B, S, N]"] == compiled["layers"] == compiled["stock"]


@pytest.mark.parametrize("how", ["[B, S, N]", "[B, S, L, N]", "layers"])
def test_layers_compiled_one_by_one(how, build, ids, gradients):
    model, given = build("llama", how)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False} | given
    expected = train(model.train(), model, gradients, lambda out: out.loss, **inputs)
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for loss in [lambda out: out.loss] if given else [lambda out: out.loss, own_loss(ids)]:
        assert_same(train(model, model, gradients, loss, **inputs)[3], expected[3])
    before = graphs()
    train(model, model, gradients, lambda out: out.loss, **inputs)
    assert graphs() == before


@pytest.mark.parametrize("how", ["[N]", "[B, S, N]", "embeddings"])
def test_layers_compiled_one_by_one_have_their_code_in_common(how, build, ids):
    compiled = {}
    for kind in ("stock", how):
        torch._dynamo.reset()
        counters.clear()
        model, given = build("llama", kind)
        layers = model.train().base_model.model.model.layers
        for layer in layers:
            layer.compile(backend="eager", fullgraph=True)
        model(input_ids=ids, labels=ids, use_cache=False, **given).loss.backward()
        compiled[kind] = graphs()
    assert compiled[how] == compiled["stock"] < len(layers)  # the first one's input needs no gradient


def test_export_with_weights_as_an_input(build, ids):
    model, given = build("llama", "[B, S, N]")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    program = torch.export.export(model, (), inputs | given, strict=False).module()
    other = {"routing_weights": torch.rand(2, 7, 3)}
    expected = model(**inputs, **other).logits
    torch.testing.assert_close(program(**inputs, **other).logits, expected)
    assert not torch.allclose(program(**inputs, **given).logits, expected, atol=1e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@SLOW
def test_inductor(build, ids, gradients):
    model, _ = build("llama", "layers")
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    expected = train(model.train(), model, gradients, lambda out: out.loss, **inputs)
    with fresh_cache():  # of code that was compiled before
        compiled = torch.compile(model, fullgraph=True)
        assert_same(train(model, compiled, gradients, lambda out: out.loss, **inputs), expected)
        assert_same(train(model, compiled, gradients, own_loss(ids), **inputs)[3], expected[3])
