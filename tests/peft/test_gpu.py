"""A routed model on a GPU: bfloat16 base, float32 adapters, as PEFT keeps them."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig, get_peft_model

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
