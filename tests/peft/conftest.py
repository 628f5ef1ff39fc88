"""Tiny models from configs, stock and adopted, and the loop over adapters that routed layers are compared with."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from moelora import MoELoraConfig
from moelora.nn import PerLayerRouter

VOCAB = 97


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for their threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "t5": ["q", "v", "wi"],
}


def base(kind: str) -> Any:
    torch.manual_seed(11)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        sizes = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 64}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(vocab_size=VOCAB, **sizes, **dropout, **special)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "max_position_embeddings": 64}
        config = transformers.LlamaConfig(vocab_size=VOCAB, **heads, **sizes, **special)
        return transformers.LlamaForCausalLM(config).eval()
    sizes = {"d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def lora(kind: str, n: int = 3, **options: Any) -> Any:
    """A stock PeftModel with n active adapters whose B is not zero."""
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], "task_type": task} | options
    config = LoraConfig(**settings, fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(base(kind), config, adapter_name="expert_0")
    for i in range(1, n):
        model.add_adapter(f"expert_{i}", copy.deepcopy(config))
    model.base_model.set_adapter([f"expert_{i}" for i in range(n)])
    torch.manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def in_a_loop(model: Any, weights: torch.Tensor, *, by_layer: Callable[[str], torch.Tensor] | None = None) -> Any:
    """Make a stock model mix its adapters one after another, as patched forks of PEFT do."""

    def looping(layer: Any, weights: torch.Tensor) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            y = layer.base_layer(x)
            for i, name in enumerate(layer.active_adapters):
                if name not in layer.lora_A:
                    continue
                w = weights[..., i, None]
                if weights.dim() == 2 and x.dim() == 3:
                    w = w.unsqueeze(1)
                y = y + w * layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x)))
            return y

        return forward

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            layer.forward = looping(layer, weights if by_layer is None else by_layer(name))
    return model


@pytest.fixture(params=["gpt2", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_base() -> Callable[..., Any]:
    return base


@pytest.fixture
def make_lora() -> Callable[..., Any]:
    return lora


@pytest.fixture
def loop() -> Callable[..., Any]:
    return in_a_loop


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def balanced() -> Callable[..., Any]:
    """A function that gives a model with three experts a router of random gates, and sets it to training."""

    def balanced(model: Any, coefficient: float, formula: str = "z_loss", width: int = 32) -> Any:
        torch.manual_seed(1)
        router = PerLayerRouter(["expert_0", "expert_1", "expert_2"], width, num_layers=3, top_k=2)
        for parameter in router.parameters():
            nn.init.normal_(parameter)
        config = MoELoraConfig(num_experts=3, load_balance_loss_type=formula, router_aux_loss_coef=coefficient)
        model.base_model.attach_router(router, config)
        return model.train()

    return balanced


@pytest.fixture
def one_step(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a trainer, of transformers or trl, for one step with SGD."""
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",  # its step is the gradient: AdamW's first step shows the sign alone
        "bf16": False,
        "gradient_checkpointing": False,
    }


@pytest.fixture
def tokenizer():
    """Words w3 to w96, the ids of the models that `make_base` makes."""
    words = {"[PAD]": 0, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="<eos>")


@pytest.fixture
def weights() -> torch.Tensor:
    """[B, S, N] for `ids` and three experts."""
    return torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(6))


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def gradients() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    return gradients_of


def steps_alike(
    model: Any, reference: Any, ids: torch.Tensor, weights: torch.Tensor, **tolerance: float
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Compare logits and every parameter's gradient of a forward and backward; the model's output and gradients."""
    out, expected = model(ids, labels=ids, routing_weights=weights), reference(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected.logits, **tolerance)
    out.loss.backward()
    expected.loss.backward()
    got, wanted = gradients_of(model), gradients_of(reference)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], **tolerance)
    return out, got


@pytest.fixture
def same_step() -> Callable[..., tuple[Any, dict[str, torch.Tensor]]]:
    return steps_alike
