"""What DyLoRA projects and users of PEFT call, in their order, on every family of models, against stock PEFT."""

import copy

import peft
import pytest
import torch
import transformers
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import moelora
from moelora import MoELoraConfig, activate_all_experts, get_peft_model
from moelora.peft.utils import set_peft_model_state_dict

VOCAB, N = 97, 3
NAMES = [f"expert_{i}" for i in range(N)]
CLOSE = {"rtol": 3e-5, "atol": 3e-5}

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
GEMMA = SIZES | HEADS | TOKENS | {"head_dim": 8}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# family: (model, config, its arguments, target modules)
FAMILIES = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        | TOKENS,
        ["c_attn", "c_fc"],
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | HEADS | TOKENS, ALL),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GEMMA, ALL),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA | {"sliding_window": 4}, ALL),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA | {"sliding_window": 4}, ALL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES | HEADS | TOKENS | {"head_dim": 8}, ALL),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        SIZES | HEADS | TOKENS | {"num_local_experts": 3, "num_experts_per_tok": 2},
        ATTENTION,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCAB, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": None},
        ["q", "v", "wi"],
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        SIZES
        | {"num_attention_heads": 4, "max_position_embeddings": 64}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ["query", "value", "dense"],
    ),
}


def base_of(family):
    model, config, arguments, _ = FAMILIES[family]
    torch.manual_seed(11)
    return getattr(transformers, model)(getattr(transformers, config)(**arguments))


def config_of(family, kind=MoELoraConfig):
    task = {"t5": "SEQ_2_SEQ_LM", "bert": None}.get(family, "CAUSAL_LM")
    options = {"num_experts": N} if kind is MoELoraConfig else {}
    targets = FAMILIES[family][3]
    return kind(r=4, lora_alpha=8, target_modules=targets, task_type=task, fan_in_fan_out=family == "gpt2", **options)


def experts(family, make, kind):
    """N experts, made one by one as these projects do; B is not zero."""
    model = make(base_of(family), config_of(family, kind), adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config_of(family, kind))
    torch.manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_call_sequence_in_use(family, loop, gradients, tmp_path):
    two_stacks, generates = family == "t5", family != "bert"
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    # The experts are made one by one; set_adapter freezes the others, a list makes all of them trainable.
    model, stock = experts(family, get_peft_model, MoELoraConfig), experts(family, peft.get_peft_model, peft.LoraConfig)
    assert model.state_dict().keys() == stock.state_dict().keys()
    for each in (model, stock):
        each.set_adapter("expert_1")
    assert trainable(model) == trainable(stock) != set()
    assert all("expert_1" in name for name in trainable(model))
    alone = model.eval()(**inputs)
    assert torch.equal(alone.logits, stock.eval()(**inputs).logits)
    for each in (model, stock):
        each.base_model.set_adapter(NAMES)
    assert trainable(model) == trainable(stock) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert activate_all_experts(model) == NAMES

    # A plain forward is PEFT's, to the bit; the router outside reads its hidden states.
    options = {} if family == "bert" else {"use_cache": False}
    plain = model(**inputs, output_hidden_states=True, **options)
    assert torch.equal(plain.logits, stock(**inputs).logits)
    hidden = plain.encoder_last_hidden_state.mean(1) if two_stacks else plain.hidden_states[-1]
    router = nn.Linear(hidden.shape[-1], N)
    nn.init.normal_(router.weight, std=0.5)

    def weights():
        return (router(hidden.detach()) / 0.5).softmax(-1)

    # One-hot weights are one expert, others what a loop over the experts in each layer gives.
    for i, name in enumerate(NAMES):
        stock.set_adapter(name)
        one_hot = torch.zeros_like(weights())
        one_hot[..., i] = 1
        torch.testing.assert_close(model(**inputs, routing_weights=one_hot).logits, stock(**inputs).logits, **CLOSE)
    stock.base_model.set_adapter(NAMES)
    v = weights().detach().requires_grad_()
    expected = loop(stock.train(), v)(**inputs, **options)
    expected.loss.backward()

    # A training step with gradient checkpointing.
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([*model.parameters(), *router.parameters()], lr=0.5)
    w = weights()
    w.retain_grad()
    out = model(**inputs, routing_weights=w, **options)
    assert not torch.allclose(out.logits, plain.logits, **CLOSE)
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    out.loss.backward()
    torch.testing.assert_close(w.grad, v.grad, **CLOSE)
    assert router.weight.grad.abs().sum() > 0
    got, wanted = gradients(model), gradients(stock)
    assert got.keys() == wanted.keys() == trainable(model)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], **CLOSE)
    optimizer.step()
    w = weights().detach()
    assert model(**inputs, routing_weights=w).loss < out.loss
    model.eval()
    model.gradient_checkpointing_disable()

    # Generation takes the weights of the prompt.
    if generates:
        length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        tokens = model.generate(input_ids=ids, routing_weights=w, **length)
        assert torch.equal(tokens, model.generate(input_ids=ids, routing_weights=w, use_cache=False, **length))
        assert not torch.equal(tokens, model.generate(input_ids=ids, routing_weights=torch.zeros(N), **length))

    # Each expert is saved, and opens in stock PEFT and onto a name that exists.
    for name in NAMES:
        model.save_pretrained(tmp_path, selected_adapters=[name])
    fresh = experts(family, get_peft_model, MoELoraConfig).eval()
    fresh.load_adapter(tmp_path / "expert_0", adapter_name="expert_0")
    for name in NAMES[1:]:
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
        set_peft_model_state_dict(fresh, state, adapter_name=name)
    activate_all_experts(fresh)
    mixed = model(**inputs, routing_weights=w).logits
    assert torch.equal(fresh(**inputs, routing_weights=w).logits, mixed)
    for i, name in enumerate(NAMES):
        opened = peft.PeftModel.from_pretrained(base_of(family), tmp_path / name).eval()
        one_hot = torch.zeros_like(w)
        one_hot[..., i] = 1
        got = model(**inputs, routing_weights=one_hot).logits
        torch.testing.assert_close(got, opened(**inputs).logits, **CLOSE)
        assert not torch.allclose(got, mixed, **CLOSE)


def test_the_sequence_runs_on_stock_imports_under_the_patch(loop):
    ids = torch.randint(3, VOCAB, (2, 7))
    with moelora.patch_peft():
        model = experts("llama", peft.get_peft_model, peft.LoraConfig).eval()
    model.base_model.set_adapter(NAMES)
    reference = experts("llama", peft.get_peft_model, peft.LoraConfig).eval()
    reference.base_model.set_adapter(NAMES)
    w = torch.rand(2, 7, N)
    torch.testing.assert_close(model(ids, routing_weights=w).logits, loop(reference, w)(ids).logits, **CLOSE)


def test_an_adapter_swapped_in_place_is_routed_at_once(tmp_path):
    ids = torch.randint(3, VOCAB, (2, 7))
    source, model = (experts("llama", get_peft_model, MoELoraConfig).eval() for _ in range(2))
    activate_all_experts(model)
    torch.manual_seed(1)
    for name, parameter in source.named_parameters():
        if "lora_B.expert_1" in name:
            nn.init.normal_(parameter, std=0.2)
    source.save_pretrained(tmp_path, selected_adapters=["expert_1"])
    w = torch.rand(2, 7, N)
    before = model(ids, routing_weights=w).logits
    hotswap_adapter(model, tmp_path / "expert_1", adapter_name="expert_2")
    after = model(ids, routing_weights=w).logits
    assert not torch.allclose(after, before, **CLOSE)

    expected = experts("llama", get_peft_model, MoELoraConfig).eval()
    expected.load_adapter(tmp_path / "expert_1", adapter_name="expert_2")
    activate_all_experts(expected)
    torch.testing.assert_close(after, expected(ids, routing_weights=w).logits, **CLOSE)


def test_merging_and_unloading_give_what_pefts_do():
    ids = torch.randint(3, VOCAB, (2, 7))
    model = experts("llama", get_peft_model, MoELoraConfig).eval()
    stock = experts("llama", peft.get_peft_model, peft.LoraConfig).eval()
    for each in (model, stock):
        each.set_adapter("expert_1")
    merged, expected = copy.deepcopy(model).merge_and_unload(), copy.deepcopy(stock).merge_and_unload()
    assert torch.equal(merged(ids).logits, expected(ids).logits)
    assert type(merged) is type(expected)
    assert torch.equal(model.unload()(ids).logits, stock.unload()(ids).logits)
