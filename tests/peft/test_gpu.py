"""A routed model on a GPU: bfloat16 base, float32 adapters, as PEFT keeps them."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoKrConfig
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import MoELoraConfig, get_peft_model
from moelora.nn import EmbeddingRouter, FixedRouter, HiddenStateRouter, LastHiddenRouter, PerLayerRouter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WEIGHTS = {"static": (3,), "sequence": (2, 3), "token": (2, 7, 3), "layer": (2, 7, 2, 3)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    moe = MoELoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", num_experts=3, top_k_experts=2, init_lora_weights=False
    )
    return get_peft_model(LlamaForCausalLM(config).eval(), moe).eval()


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
def test_given_weights_on_a_gpu_equal_those_on_the_cpu(model, shape):
    ids, weights = torch.randint(64, (2, 7)), torch.rand(shape)
    on_cpu = model(input_ids=ids, routing_weights=weights).logits
    on_gpu = copy.deepcopy(model).cuda()(input_ids=ids.cuda(), routing_weights=weights.cuda()).logits
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-4)


def test_a_train_step_over_a_bf16_base_reaches_every_expert_and_the_router(model):
    model.base_model.model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    model.cuda().train()
    ids = torch.randint(64, (2, 7), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.is_cuda and g.isfinite().all() for g in gradients.values())
    assert any(g.any() for name, g in gradients.items() if "router" in name)
    assert all(g.dtype == torch.float32 for name, g in gradients.items() if "lora_" in name)


def test_cached_generation_on_a_gpu_equals_uncached(model):
    model.cuda()
    ids = torch.randint(1, 64, (2, 5), device="cuda")
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


NAMES = ["expert_0", "expert_1", "expert_2"]
ROUTERS = {
    "fixed": lambda: FixedRouter(NAMES, [1, 2, 3]),
    "embeddings": lambda: EmbeddingRouter(NAMES, 32, top_k=2),
    "layer": lambda: HiddenStateRouter(NAMES, 32, layer=1, mlp_dim=8),
    "layers": lambda: PerLayerRouter(NAMES, 32, num_layers=2, top_k=2, capacity_factor=1.0),
    "last_hidden": lambda: LastHiddenRouter(NAMES, 32, eval_top_k=1),
}


@pytest.fixture(params=ROUTERS)
def routed(request, model):
    model.base_model.detach_router()
    model.base_model.attach_router(ROUTERS[request.param]())
    return model


def on_both(model):
    return model, copy.deepcopy(model).cuda()


def test_routers_on_a_gpu_give_the_results_of_the_cpu(routed):
    ids, mask = torch.randint(1, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    cpu, gpu = on_both(routed.train())
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": ids.to(device)}
        with moelora.routing_stats(model) as stats:
            out = model(**inputs)
        out.loss.backward()
        if model is cpu:
            expected, seen = out, stats
    torch.testing.assert_close(out.logits.cpu()[mask == 1], expected.logits[mask == 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss.cpu(), expected.loss, atol=1e-4, rtol=1e-4)
    wanted = {name: p.grad for name, p in cpu.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in gpu.named_parameters() if p.grad is not None}
    assert wanted and got.keys() == wanted.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad.cpu(), wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    assert stats.tokens == seen.tokens
    assert stats.weight == pytest.approx(seen.weight, abs=1e-5)


def test_routers_generate_on_a_gpu_as_without_a_cache(routed):
    routed.cuda().eval()
    ids = torch.randint(1, 64, (2, 5), device="cuda")
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(routed.generate(**options), routed.generate(**options, use_cache=False))


def test_experts_come_and_go_on_a_gpu(model):
    model.cuda()
    ids = torch.randint(64, (2, 7), device="cuda")
    before, tuner = model(input_ids=ids).logits, model.base_model
    tuner.add_expert("new")
    assert all(p.is_cuda for p in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, before)
    tuner.activate_expert("new")
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    tuner.remove_expert("expert_1")
    assert model(input_ids=ids).logits.isfinite().all()


def test_a_mixture_is_saved_from_a_gpu_and_opened_on_the_cpu(model, tmp_path):
    ids, base = torch.randint(64, (2, 7)), copy.deepcopy(model.get_base_model())
    expected = model(input_ids=ids).logits
    model.cuda().save_pretrained(tmp_path)
    plain = LlamaForCausalLM(base.config)
    state = {name.replace(".base_layer", ""): t for name, t in base.state_dict().items() if "lora_" not in name}
    plain.load_state_dict(state)
    opened = moelora.PeftModel.from_pretrained(plain, tmp_path, torch_device="cpu").eval()
    torch.testing.assert_close(opened(input_ids=ids).logits, expected)


def test_static_mixtures_on_a_gpu(model):
    ids, weights = torch.randint(64, (2, 7), device="cuda"), torch.tensor([0.2, 0.5, 0.3])
    model.cuda()
    expected = model(input_ids=ids, routing_weights=weights).logits
    model.base_model.to_single_adapter(weights)
    alone = copy.deepcopy(model)
    alone.base_model.detach_router()
    alone.set_adapter("mixture")
    torch.testing.assert_close(alone(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload(routing_weights=weights)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3,), (2, 7, 3)])
@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_loha_and_lokr_on_a_gpu(kind, shape, model):
    config = kind(r=4, target_modules=["q_proj", "down_proj"], init_weights=False)
    mixture = get_peft_model(LlamaForCausalLM(model.config), config, adapter_name="expert_0")
    for name in NAMES[1:]:
        mixture.add_adapter(name, config)
    moelora.activate_all_experts(mixture)
    ids, weights = torch.randint(64, (2, 7)), torch.rand(shape)
    cpu, gpu = on_both(mixture.eval())
    got = gpu(input_ids=ids.cuda(), routing_weights=weights.cuda()).logits
    torch.testing.assert_close(got.cpu(), cpu(input_ids=ids, routing_weights=weights).logits, atol=1e-4, rtol=1e-4)


def replayed(call, x):
    """What a CUDA graph of a call gives for other values of x, after one call to warm up; and what eager gives."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(stream):
        call(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        stream.synchronize()
        expected = call(x)
        stream.synchronize()
    return captured, expected


@pytest.mark.parametrize("active", [[0, 2], [1, 2], [2, 0]])
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_cuda_graph_of_a_router_with_some_of_its_columns(kind, active):
    router = ROUTERS[kind]().cuda().eval()
    torch.testing.assert_close(*replayed(lambda x: router(x, active=active), torch.randn(2, 7, 32, device="cuda")))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_of_a_layer_that_lacks_an_expert(model, dtype, shape):
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    for factors in (layer.lora_A, layer.lora_B):
        del factors["expert_1"]
    layer.cuda().base_layer.to(dtype)
    weights, x = torch.rand(shape, device="cuda"), torch.randn(2, 7, 32, device="cuda", dtype=dtype)
    torch.testing.assert_close(*replayed(lambda x: layer(x, routing_weights=weights), x))
