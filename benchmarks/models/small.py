"""The small language models that the benchmarks run, with random weights."""

from __future__ import annotations

import torch
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
