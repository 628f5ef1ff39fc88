"""The whole loop of a DyLoRA-MoE project on moelora: its call sequence, and its own router outside PEFT."""

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moelora import LoraLayer, MoELoraConfig, PeftModel, activate_all_experts, get_peft_model

VOCAB = 61
DOMAINS = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class DynamicRouter(nn.Module):
    """A gate on the last hidden states that the project keeps beside the model and grows with the experts."""

    def __init__(self, hidden_size, num_experts):
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_experts)

    def forward(self, hidden_states):
        return (self.gate(hidden_states.float()) / 2.0).softmax(-1)

    def grow(self):
        old = self.gate
        self.gate = nn.Linear(old.in_features, old.out_features + 1)
        with torch.no_grad():
            self.gate.weight[:-1], self.gate.bias[:-1] = old.weight, old.bias


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, initializer_range=0.2)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    return GPT2LMHeadModel(config)


def moe_config(**options):
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
    }
    return MoELoraConfig(**(settings | {"task_type": "CAUSAL_LM", "num_experts": DOMAINS} | options))


def experts(n=DOMAINS, **options):
    config = moe_config(**options)
    model = get_peft_model(tiny_gpt2(), config, adapter_name="expert_0")
    for i in range(1, n):
        model.add_adapter(f"expert_{i}", config)
    return model


def shaken(model):
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(domain, seed=0):
    """Each domain counts up in steps of its own."""
    start = torch.randint(2, VOCAB, (4, 1), generator=torch.Generator().manual_seed(seed))
    return (start + (2 * domain + 1) * torch.arange(12)) % (VOCAB - 2) + 2


def two_pass(model, router, ids, **options):
    """The project's forward: hidden states of a plain pass, the router outside, then the routed pass."""
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    w = router(hidden)
    return model(ids, use_cache=False, routing_weights=w, **options), w


def train(model, step, steps=20, lr=2e-2, extra=()):
    parameters = [p for p in model.parameters() if p.requires_grad] + list(extra)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for i in range(steps):
        loss = step(i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_experts_are_named_and_added_one_by_one():
    model = experts()
    assert list(model.peft_config) == ["expert_0", "expert_1", "expert_2"]
    assert {name.split("lora_A.")[1].split(".")[0] for name, _ in model.named_parameters() if "lora_A" in name} == {
        "expert_0",
        "expert_1",
        "expert_2",
    }


def test_setting_one_expert_freezes_the_others():
    model = experts()
    model.set_adapter("expert_1")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("expert_1" in name for name in trainable)


def test_setting_all_experts_trains_them_all():
    model = experts()
    model.set_adapter("expert_1")
    model.base_model.set_adapter(["expert_0", "expert_1", "expert_2"])
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    assert activate_all_experts(model) == ["expert_0", "expert_1", "expert_2"]


def test_an_expert_learns_its_domain_without_touching_the_others():
    model = experts()
    model.set_adapter("expert_1")
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model, lambda i: model(batch_of(1), labels=batch_of(1)).loss)
    assert losses[-1] < losses[0] - 0.5
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("expert_1" in name for name in changed)


def test_the_two_pass_forward_trains_router_and_experts_together():
    model, router = experts(), DynamicRouter(24, DOMAINS)
    activate_all_experts(model)

    def step(i):
        ids = batch_of(i % DOMAINS)
        return two_pass(model, router, ids, labels=ids)[0].loss

    losses = train(model, step, steps=30, extra=router.parameters())
    assert sum(losses[-6:]) < sum(losses[:6]) - 3
    assert router.gate.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_the_routed_pass_equals_a_loop_over_experts_in_each_layer():
    model, router = shaken(experts()).eval(), DynamicRouter(24, DOMAINS)
    names = activate_all_experts(model)
    out, w = two_pass(model, router, batch_of(0))

    looped = shaken(experts()).eval()
    activate_all_experts(looped)
    for layer in (module for module in looped.modules() if isinstance(module, LoraLayer)):

        def forward(x, layer=layer):
            y = layer.base_layer(x)
            for i, name in enumerate(names):
                y = y + w[..., i : i + 1] * layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
            return y

        layer.forward = forward
    torch.testing.assert_close(out.logits, looped(batch_of(0)).logits, rtol=1e-5, atol=1e-5)


def test_the_old_n_passes_are_reproduced_by_mixing_logits():
    model, router = shaken(experts()).eval(), DynamicRouter(24, DOMAINS)
    names = activate_all_experts(model)
    ids = batch_of(2)
    out, w = two_pass(model, router, ids, mixture="logits", labels=ids)
    mixed = torch.zeros_like(out.logits)
    with torch.no_grad():
        for i, name in enumerate(names):
            model.set_adapter(name)
            mixed += w[..., i : i + 1] * model(ids).logits
    assert (out.logits - mixed).abs().max() <= 1e-5 * mixed.abs().max()
    shift = nn.functional.cross_entropy(mixed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, shift)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    def gradients(checkpointing):
        torch.manual_seed(3)
        model, router = shaken(experts(lora_dropout=0.1)).train(), DynamicRouter(24, DOMAINS)
        activate_all_experts(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(4)
        two_pass(model, router, batch_of(0), labels=batch_of(0))[0].loss.backward()
        named = [*model.named_parameters(), *router.named_parameters()]
        return {name: p.grad for name, p in named if p.grad is not None}

    expected, got = gradients(False), gradients(True)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_new_domain_adds_an_expert_and_a_column():
    model, router = shaken(experts()), DynamicRouter(24, DOMAINS)
    activate_all_experts(model)
    two_pass(model, router, batch_of(0))
    model.add_adapter("expert_3", moe_config())
    router.grow()
    with pytest.raises(ValueError, match="one column for each active adapter"):
        two_pass(model, router, batch_of(0))
    assert activate_all_experts(model)[-1] == "expert_3"
    out, w = two_pass(model, router, batch_of(0))
    assert w.shape == (4, 12, 4)
    assert torch.isfinite(out.logits).all()


def test_experts_are_saved_one_by_one_and_open_in_stock_peft(tmp_path):
    model = shaken(experts()).eval()
    for i in range(DOMAINS):
        model.save_pretrained(tmp_path / f"expert_{i}", selected_adapters=[f"expert_{i}"])
    folder = tmp_path / "expert_2" / "expert_2"  # nested twice, as these projects have it
    assert (folder / "adapter_model.safetensors").exists()
    stock = peft.PeftModel.from_pretrained(tiny_gpt2(), folder).eval()
    model.set_adapter("expert_2")
    assert torch.equal(stock(batch_of(0)).logits, model(batch_of(0)).logits)


def test_a_saved_expert_is_loaded_onto_a_name_that_exists(tmp_path):
    model, fresh = shaken(experts()).eval(), experts().eval()
    model.save_pretrained(tmp_path)
    for i in range(DOMAINS):
        fresh.load_adapter(tmp_path / f"expert_{i}", adapter_name=f"expert_{i}")
    for each in (model, fresh):
        activate_all_experts(each)
    w = torch.rand(4, 12, DOMAINS)
    expected = model(batch_of(1), routing_weights=w).logits
    assert torch.equal(fresh(batch_of(1), routing_weights=w).logits, expected)


def test_the_state_of_an_expert_can_be_set_in_place():
    model, fresh = shaken(experts()).eval(), experts().eval()
    for i in range(DOMAINS):
        state = peft.get_peft_model_state_dict(model, adapter_name=f"expert_{i}")
        peft.set_peft_model_state_dict(fresh, state, adapter_name=f"expert_{i}")
    for each in (model, fresh):
        activate_all_experts(each)
    w = torch.tensor([0.1, 0.2, 0.7])
    expected = model(batch_of(1), routing_weights=w).logits
    assert torch.equal(fresh(batch_of(1), routing_weights=w).logits, expected)


def test_a_whole_project_is_read_back_through_from_pretrained(tmp_path):
    model = shaken(experts()).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "expert_0", adapter_name="expert_0")
    for i in range(1, DOMAINS):
        loaded.load_adapter(tmp_path / f"expert_{i}", adapter_name=f"expert_{i}")
    for each in (model, loaded):
        activate_all_experts(each)
    w = torch.rand(4, DOMAINS)
    expected = model(batch_of(1), routing_weights=w).logits
    assert torch.equal(loaded.eval()(batch_of(1), routing_weights=w).logits, expected)


def test_it_generates_with_the_weights_of_the_prompt():
    model, router = shaken(experts()).eval(), DynamicRouter(24, DOMAINS)
    activate_all_experts(model)
    prompt = batch_of(0)[:, :5]
    _, w = two_pass(model, router, prompt)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=prompt, routing_weights=w, **options)
    assert cached.shape == (4, 9)
    assert torch.equal(cached, model.generate(input_ids=prompt, routing_weights=w, use_cache=False, **options))


def test_its_router_may_also_live_on_the_model():
    model, router = shaken(experts()).eval(), DynamicRouter(24, DOMAINS)
    activate_all_experts(model)
    expected, w = two_pass(model, router, batch_of(0))
    model.base_model.attach_router(router, moe_config())
    hidden = model(batch_of(0), output_hidden_states=True, use_cache=False).hidden_states[-1]
    got = model.base_model.get_routing_weights(hidden)
    torch.testing.assert_close(got, w)
    assert torch.equal(model(batch_of(0), routing_weights=w).logits, expected.logits)


def test_the_single_pass_needs_no_router_outside():
    torch.manual_seed(5)
    model = get_peft_model(tiny_gpt2(), moe_config(router_type="learned")).train()
    losses = train(model, lambda i: model(batch_of(i % DOMAINS), labels=batch_of(i % DOMAINS)).loss, steps=30)
    assert sum(losses[-6:]) < sum(losses[:6]) - 3
    assert all(p.grad is not None for p in model.base_model.router.parameters())
