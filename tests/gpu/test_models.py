"""A routed model whose layers the kernels compute, against the same model by the formula."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig, _core, get_peft_model
from moelora.nn import cuda, gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of compute capability 9.0",
)

N_LINEARS = 2 * 7
TOKENS = (3, 90)  # more than decode.cu takes


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    # All experts of a token: which of them are its best is no matter of rounding.
    moe = MoELoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        target_modules="all-linear",
        num_experts=4,
        top_k_experts=4,
        init_lora_weights=False,
    )
    model = get_peft_model(base, moe).cuda()
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.dtype == torch.float32  # as PEFT keeps adapters over a narrow base
            p.data.mul_(0.3)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(1, 96, TOKENS, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


@pytest.fixture
def by_formula(monkeypatch):
    """``by_formula(call)``: its result where no kernels can be used."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setitem(cuda._known, torch.cuda.current_device(), False)
            return call()

    return run


def step(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), gradients


def assert_as_close(got, peer, exact, what):
    """got is not much further from what is right than another result of the same precision, whose rounding differs."""
    norm = exact.norm().clamp_min(1e-12)
    ours, theirs = ((t.double() - exact).norm() / norm for t in (got, peer))
    assert ours.item() <= 2 * theirs.item() + 1e-4, what


WEIGHTS = {"router": None, "static": (4,), "sequence": (3, 4), "token": (3, 90, 4)}


@hopper
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("way", ["torch", "dual", "fused"])
def test_a_step_is_that_of_the_formula(model, ids, taken, force_way, by_formula, way, shape):
    force_way(way)
    inputs = {"input_ids": ids, "labels": ids}
    if shape:
        inputs["routing_weights"] = torch.rand(shape, device="cuda")
    logits, gradients = step(model, **inputs)
    kernels = 0 if way == "torch" else N_LINEARS
    assert taken["cuda_call"] == N_LINEARS
    assert taken["cuda_forward"] == kernels
    assert taken["cuda_backward"] == kernels
    taken.clear()
    expected, wanted = by_formula(lambda: step(model, **inputs))
    assert not any(taken.values())
    exact, right = step(copy.deepcopy(model).double(), **inputs)
    assert_as_close(logits, expected, exact, "logits")
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == wanted[name].dtype
        assert_as_close(gradient, wanted[name], right[name], name)


@hopper
def test_generation_decodes_by_the_kernels(model, ids, taken, by_formula):
    inputs = {"input_ids": ids[:, :20], "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options = {"return_dict_in_generate": True, "pad_token_id": 0}
    out = model.generate(**inputs, **options)
    assert taken["cuda_forward"] == 6 * N_LINEARS
    taken.clear()
    peer = by_formula(lambda: model.generate(**inputs, **options))
    assert not any(taken.values())
    torch.testing.assert_close(out.logits[0], peer.logits[0], atol=3e-2, rtol=3e-2)
    whole = model(input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences)).logits[:, 19:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.float(), atol=5e-2, rtol=5e-2)


def test_a_static_cache_gives_what_a_dynamic_one_gives(model, ids):
    inputs = {"input_ids": ids[:, :20], "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options = {"return_dict_in_generate": True, "pad_token_id": 0, "disable_compile": True}
    static = model.generate(**inputs, **options, cache_implementation="static")
    dynamic = model.generate(**inputs, **options)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.logits, dynamic.logits, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, ids, force_way, reentrant):
    force_way("dual")
    model.train()
    inputs = {"input_ids": ids, "labels": ids, "routing_weights": torch.rand(3, 90, 4, device="cuda")}
    logits, gradients = step(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, recomputed = step(model, **inputs)
    assert torch.equal(again, logits)
    assert recomputed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_lowers_the_loss(model, ids, force_way, autocast):
    force_way("fused")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@hopper
def test_a_float16_base_and_adapters_in_its_dtype(model, ids, taken, by_formula, force_way):
    force_way("dual")
    model.to(torch.float16)
    weights = torch.rand(3, 90, 4, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        logits = model(input_ids=ids, routing_weights=weights).logits
        assert taken["cuda_forward"] == N_LINEARS
        expected = by_formula(lambda: model(input_ids=ids, routing_weights=weights).logits)
        exact = copy.deepcopy(model).double()(input_ids=ids, routing_weights=weights).logits
    assert_as_close(logits, expected, exact, "logits")


@hopper
def test_the_top_k_of_a_router_reaches_the_kernels(model, ids, force_way, monkeypatch):
    model.base_model.router.top_k = 2
    seen = []

    class Seeing:
        def __getattr__(self, name):
            if name == "cuda_call":
                return lambda *args: seen.append(args[8]) or _core.cuda_call(*args)
            return getattr(_core, name)

    monkeypatch.setattr(gpu, "_core", Seeing())
    exact = model(input_ids=ids).logits
    assert seen == [2] * N_LINEARS
    force_way("grouped")
    torch.testing.assert_close(model(input_ids=ids).logits, exact, atol=3e-2, rtol=3e-2)
