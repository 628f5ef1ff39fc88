"""DyLoRA-MoE in one pass: the same class as in `old_way.py`, on moelora.

The experts and the router live in the model, so it is an ordinary model for Trainer, generate and save_pretrained.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moelora import LoraConfig, PeftModel, activate_all_experts, get_peft_model
from moelora.nn import PerLayerRouter

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")


class DyLoRAMoE:
    """Experts over a frozen base, and a router with a gate in each decoder layer.

    Parameters
    ----------
    base : PreTrainedModel
        Gets the LoRA layers of the first expert, ``expert_0``.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.model = get_peft_model(base, LORA, adapter_name="expert_0")
        sizes = {"num_layers": base.config.num_hidden_layers, "temperature": 2.0}
        self.model.base_model.attach_router(PerLayerRouter(["expert_0"], base.config.hidden_size, **sizes))

    @property
    def experts(self) -> list[str]:
        return list(self.model.peft_config)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """What the frozen base makes of tokens [B, S]: its last hidden states [B, S, H]."""
        with self.model.disable_adapter():
            return self.model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states[-1]

    def add_expert(self) -> str:
        """A new expert, and its column in every gate. It has no weight yet, so the outputs stay what they are."""
        name = f"expert_{len(self.experts)}"
        self.model.base_model.add_expert(name)
        return name

    def learn_alone(self, expert: str) -> None:
        """Let one expert act, and learn."""
        self.model.base_model.unfreeze_expert(expert)
        self.model.set_adapter(expert)

    def learn_to_mix(self) -> None:
        """Let all experts act. Those that are not frozen learn, and the router."""
        activate_all_experts(self.model)

    def keep(self, expert: str) -> None:
        """Let an expert stay what it is from now on."""
        self.model.base_model.freeze_expert(expert)

    def set_maturity(self, expert: str, value: float) -> None:
        self.model.base_model.mark_mature(expert, value)

    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return self.model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    @classmethod
    def load(cls, base: PreTrainedModel, folder: Path) -> "DyLoRAMoE":
        loaded = cls.__new__(cls)
        loaded.model = PeftModel.from_pretrained(base, folder)
        return loaded
