"""torch.compile and torch.export on a GPU: the kernels as one operator, with eager's results."""

import pytest
import torch
from torch.library import opcheck
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig, get_peft_model
from moelora.nn import ops, routed_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPERATOR = torch.ops.moelora.routed_lora
RANKS, SCALING = (8, 4, 16), [0.5, 1.5, 2.0]
CLOSE = {"rtol": 2e-2, "atol": 2e-2}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernels_only(monkeypatch):
    """No call may take the formula inside of the operator."""

    def fail(*args):
        raise AssertionError("the kernels could not read a tensor")

    monkeypatch.setattr(ops, "_formula", fail)
    monkeypatch.setattr(ops, "_formula_backward", fail)


def make(tokens=(2, 150), dtype=torch.bfloat16, adapters=torch.float32, weights="token", base="weight", grad=True):
    """Positional and keyword arguments of routed_lora, its mixture a part of its base."""
    generator = torch.Generator("cuda").manual_seed(0)

    def leaf(*shape, std=1.0, dtype=dtype):
        t = torch.randn(shape, generator=generator, device="cuda") * std
        return t.to(dtype).requires_grad_(grad)

    d_in, d_out = 256, 384
    lead = {"token": tokens, "sequence": tokens[:1], "static": ()}[weights]
    frozen = leaf(d_out, d_in, std=d_in**-0.5).detach()
    options = {
        "weight": {"weight": frozen, "bias": frozen[:, 0].clone()},
        "base_output": {"base_output": leaf(*tokens, d_out)},
        "none": {},
    }[base]
    lora_A = [leaf(r, d_in, std=d_in**-0.5, dtype=adapters) for r in RANKS]
    lora_B = [leaf(d_out, r, std=0.2, dtype=adapters) for r in RANKS]
    return (leaf(*tokens, d_in), lora_A, lora_B, leaf(*lead, len(RANKS), dtype=torch.float32), SCALING), options


def leaves_of(args, options):
    x, lora_A, lora_B, w, _ = args
    return [x, w, *lora_A, *lora_B, *(t for t in options.values() if t.requires_grad)]


def results(call, args, options, **more):
    y = call(*args, **options, **more)
    grad_y = torch.linspace(-1, 1, y.numel(), device="cuda").reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves_of(args, options), grad_y)]


def assert_close(got, expected):
    """To a hundredth of the largest element: sums of bfloat16 in other orders."""
    for g, e in zip(got, expected, strict=True):
        assert g.dtype is e.dtype and g.shape == e.shape
        torch.testing.assert_close(g, e, rtol=0, atol=0.01 * e.abs().max().item())


@pytest.mark.parametrize("weights", ["token", "sequence", "static"])
@pytest.mark.parametrize(
    ("tokens", "base", "dtype", "adapters"),
    [
        ((2, 150), "weight", torch.bfloat16, torch.float32),
        ((3, 5), "base_output", torch.bfloat16, torch.bfloat16),
        ((1, 1), "weight", torch.float16, torch.float32),
        ((2, 40), "none", torch.float16, torch.float16),
    ],
)
def test_the_operator_keeps_what_torch_asks_of_operators(tokens, base, dtype, adapters, weights, kernels_only):
    args, options = make(tokens, dtype, adapters, weights, base)
    frozen = [options.get(name) for name in ("base_output", "weight", "bias")]
    opcheck(OPERATOR, (*args, *frozen, 2, True), test_utils=("test_schema", "test_faketensor"))
    assert_close(
        results(lambda *a, **o: OPERATOR(*a, *frozen, 2, True)[0], args, options),
        results(routed_lora, args, options, top_k=2),
    )
    if base == "weight":
        opcheck(OPERATOR, (*args, *frozen, None, True), rtol=1e-2, atol=1e-2)


def test_without_kernels_the_operator_computes_the_same(monkeypatch):
    for base in ("none", "base_output", "weight"):
        for weights in ("token", "sequence", "static"):
            args, options = make(weights=weights, base=base)
            frozen = [options.get(name) for name in ("base_output", "weight", "bias")]

            def call(*a, frozen=frozen, **o):
                return OPERATOR(*a, *frozen, 2, True)[0]

            hidden = OPERATOR(*args, *frozen, None, True)[1]  # with top_k, kernels may leave what they don't read
            expected = results(call, args, options)
            with monkeypatch.context() as patched:
                patched.setattr(ops, "on_gpu", lambda x: False)
                assert_close([OPERATOR(*args, *frozen, None, True)[1]], [hidden])
                assert_close(results(call, args, options), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 150)])
def test_compiled_code_computes_as_eager(tokens, mode, kernels_only):
    compiled = torch.compile(routed_lora, fullgraph=True, mode=mode)
    for _ in range(4):  # warm-up, recording, replays
        for base in ("weight", "base_output"):
            args, options = make(tokens, base=base)
            torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in results(compiled, args, options)]
            assert_close(got, results(routed_lora, args, options))


def test_a_graph_is_replayed_with_new_values(kernels_only):
    compiled = torch.compile(routed_lora, fullgraph=True, mode="reduce-overhead")
    args, options = make(grad=False)
    with torch.no_grad():
        for step in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            fresh = (args[0] * (step + 1), args[1], args[2], args[3] - step, SCALING)
            args[1][0].mul_(0.5)  # an adapter, in place
            assert_close([compiled(*fresh, **options).clone()], [routed_lora(*fresh, **options)])


def test_sizes_that_vary(kernels_only):
    compiled = torch.compile(routed_lora, fullgraph=True, dynamic=True)
    for tokens in [(2, 150), (3, 33), (5, 401)]:
        args, options = make(tokens)
        assert_close(results(compiled, args, options), results(routed_lora, args, options))


def test_autocast(kernels_only):
    args, options = make(dtype=torch.float32)
    compiled = torch.compile(routed_lora, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        got, expected = (results(call, args, options) for call in (compiled, routed_lora))
    assert got[0].dtype is torch.bfloat16
    assert_close(got, expected)


def model_of(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    moe = MoELoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", num_experts=3, top_k_experts=2, init_lora_weights=False
    )
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), moe).cuda()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() * 0.3
    return model


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_model_trains_in_one_graph(mode, kernels_only):
    model = model_of().train()
    ids = torch.randint(1, 64, (2, 16), device="cuda")
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, mode=mode)

    def train(call):
        loss = call(**inputs).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach().clone(), grads

    loss, grads = train(model)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got_loss, got = train(compiled)
        torch.testing.assert_close(got_loss, loss, **CLOSE)
        assert got.keys() == grads.keys()
        for name, grad in grads.items():
            difference = (got[name].double() - grad.double()).norm()
            assert difference <= 0.1 * grad.double().norm() + 1e-6, name


def test_an_exported_model_runs(kernels_only):
    model = model_of().eval()
    ids = torch.randint(1, 64, (2, 7), device="cuda")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    weights = torch.rand(2, 7, 3, device="cuda")
    program = torch.export.export(model, (), {**inputs, "routing_weights": weights}, strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("moelora.routed_lora.default") == 2 * 7
    other = torch.rand(2, 7, 3, device="cuda")
    got = program.module()(**inputs, routing_weights=other).logits
    torch.testing.assert_close(got, model(**inputs, routing_weights=other).logits, **CLOSE)


@pytest.mark.parametrize("given", ["router", "static"])
def test_generates_with_a_static_cache_and_the_compiled_forward_of_transformers(given, monkeypatch):
    """Logits are compared as far as the tokens agree: of two that are as likely, rounding picks one."""
    calls = []
    monkeypatch.setattr(ops, "on_gpu", lambda x: calls.append(x.shape) or True)
    model = model_of().eval()
    weights = {} if given == "router" else {"routing_weights": torch.tensor([0.2, 0.5, 0.3], device="cuda")}
    options = {
        "input_ids": torch.randint(1, 64, (2, 5), device="cuda"),
        "max_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": "static",
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(**options, **weights, disable_compile=True)
    assert not calls
    for _ in range(2):
        got = model.generate(**options, **weights)
        assert calls and all(shape[:2] == (2, 1) for shape in calls)
        for row in range(2):
            new = got.sequences[row, 5:] == expected.sequences[row, 5:]
            agreed = int(new.long().cumprod(0).sum())
            assert agreed >= 4
            for step in range(min(agreed + 1, 12)):
                torch.testing.assert_close(got.logits[step][row], expected.logits[step][row], rtol=0.05, atol=0.05)
