"""The models that the benchmarks run, with random weights, and the LoRA that is put on them."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

NAMES = ("llama", "gpt2")


def build(name: str, *, smoke: bool) -> PreTrainedModel:
    """Some 34 million parameters, hidden size 512, 8 layers; with `smoke` next to none."""
    hidden, layers, vocab = (64, 2, 256) if smoke else (512, 8, 8192)
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=hidden, n_layer=layers, n_head=hidden // 64, vocab_size=vocab, bos_token_id=0, eos_token_id=0
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            vocab_size=vocab,
        )
    )


class OneLayer(nn.Module):
    """A model that is one linear layer [d_out, d_in]; square where d_out is not given."""

    def __init__(self, d_in: int, d_out: int | None = None) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out or d_in, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def with_lora(base: nn.Module, n: int, rank: int, targets: list[str]) -> Any:
    """Stock PEFT with N active adapters "expert_0", ..., whose B is not zero."""
    config = LoraConfig(r=rank, target_modules=targets)
    model = get_peft_model(base, config, adapter_name="expert_0")
    for i in range(1, n):
        model.add_adapter(f"expert_{i}", copy.deepcopy(config))
    tuner: Any = model.base_model
    tuner.set_adapter([f"expert_{i}" for i in range(n)])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model
