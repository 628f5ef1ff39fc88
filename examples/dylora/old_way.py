"""DyLoRA-MoE as it is written today: stock PEFT, the whole model once for each expert, and N logits mixed.

Nothing here knows of moelora. `dylora.py` is the same class in one pass.
"""

from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")


class DynamicRouter(nn.Module):
    """A gate on the base's last hidden states, which gets a column with every expert."""

    def __init__(self, hidden_size: int, num_experts: int = 1, temperature: float = 2.0) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_experts)
        # Not saved: all experts are mature when they are kept.
        self.register_buffer("maturity", torch.ones(num_experts), persistent=False)
        self.temperature = temperature

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Weights [B, S, N] of hidden states [B, S, H]."""
        return (self.gate(hidden_states) / self.temperature + self.maturity.log()).softmax(-1)

    def add_expert(self) -> None:
        old = self.gate
        self.gate = nn.Linear(old.in_features, old.out_features + 1)
        with torch.no_grad():
            self.gate.weight[:-1], self.gate.bias[:-1] = old.weight, old.bias
        self.maturity = torch.cat([self.maturity, torch.ones(1)])


class NPasses(nn.Module):
    """The mixture as a module for Trainer: every forward runs the model once for its router and once per expert."""

    def __init__(self, foundation_model: PeftModel, router: DynamicRouter) -> None:
        super().__init__()
        self.foundation_model = foundation_model
        self.router = router
        self.learning: str | None = None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        experts = list(self.foundation_model.peft_config)
        active = self.foundation_model.active_adapters
        if len(active) == 1:
            logits = self.foundation_model(input_ids=input_ids, use_cache=False).logits
        else:
            weights = self.router(self.hidden_states(input_ids))
            logits = 0
            for i, expert in enumerate(experts):
                self.foundation_model.set_adapter(expert, inference_mode=expert != self.learning)
                passed = self.foundation_model(input_ids=input_ids, use_cache=False)
                logits = logits + weights[..., i, None] * passed.logits
            self.activate(experts)  # each set_adapter has frozen the others, and the backward is still to come
        loss = None
        if labels is not None:
            loss = self.foundation_model.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """What the frozen base makes of tokens [B, S]: its last hidden states [B, S, H]."""
        with self.foundation_model.disable_adapter():
            outputs = self.foundation_model(input_ids=input_ids, output_hidden_states=True, use_cache=False)
        return outputs.hidden_states[-1]

    def activate(self, experts: list[str]) -> None:
        """Let these experts act. Only the one that is `learning` is trainable."""
        self.foundation_model.base_model.set_adapter(experts, inference_mode=True)
        for name, parameter in self.foundation_model.named_parameters():
            if f".{self.learning}." in name:
                parameter.requires_grad_(True)


class DyLoRAMoE:
    """Experts over a frozen base, and a router.

    Parameters
    ----------
    base : PreTrainedModel
        Gets the LoRA layers of the first expert, ``expert_0``.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.peft_model = get_peft_model(base, LORA, adapter_name="expert_0")
        self.model = NPasses(self.peft_model, DynamicRouter(base.config.hidden_size))

    @property
    def experts(self) -> list[str]:
        return list(self.peft_model.peft_config)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        return self.model.hidden_states(input_ids)

    def add_expert(self) -> str:
        name = f"expert_{len(self.experts)}"
        self.peft_model.add_adapter(name, LORA)
        self.model.router.add_expert()
        return name

    def learn_alone(self, expert: str) -> None:
        self.model.learning = expert
        self.model.activate([expert])

    def learn_to_mix(self) -> None:
        self.model.activate(self.experts)

    def keep(self, expert: str) -> None:
        self.model.learning = None
        self.model.activate(self.experts)

    def set_maturity(self, expert: str, value: float) -> None:
        self.model.router.maturity[self.experts.index(expert)] = value

    @torch.no_grad()
    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        # Greedy and without a cache: N passes would have to keep N of them.
        for _ in range(new_tokens):
            following = self.model(input_ids).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, following], dim=1)
        return input_ids

    def save(self, folder: Path) -> None:
        for expert in self.experts:
            self.peft_model.save_pretrained(folder / "peft_adapters" / expert, selected_adapters=[expert])
        safetensors.torch.save_file(self.model.router.state_dict(), folder / "router.safetensors")

    @classmethod
    def load(cls, base: PreTrainedModel, folder: Path) -> "DyLoRAMoE":
        loaded = cls(base)
        state = safetensors.torch.load_file(folder / "router.safetensors")
        for _ in state["gate.bias"][1:]:
            loaded.add_expert()
        loaded.model.router.load_state_dict(state)
        for expert in loaded.experts:
            loaded.peft_model.load_adapter(folder / "peft_adapters" / expert / expert, expert)
        loaded.model.activate(loaded.experts)
        return loaded
