"""What can't be routed is adopted, runs PEFT's code, and refuses weights with the layer's name and the way out."""

import peft
import pytest
import torch
from torch import nn

import moelora
from moelora import adopt
from moelora.nn.routers import FixedRouter


def check(model, ids, message, weights=None, error=ValueError):
    """Plain forwards are stock's; weights, and a router, are refused."""
    with torch.no_grad():
        expected = model(ids).logits
        adopt(model)
        assert torch.equal(model(ids).logits, expected)
        with pytest.raises(error, match=message):
            model(ids, routing_weights=torch.ones(len(model.base_model.active_adapters)))
        model.base_model.attach_router(FixedRouter(model.base_model.active_adapters))
        with pytest.raises(error, match=message):
            model(ids)
        model.base_model.detach_router()
        assert torch.equal(model(ids).logits, expected)


def test_dora(make_lora, ids):
    message = r"q_proj can't route adapter 'expert_0', which is not plain LoRA \(DoraLinearVariant\): convert it"
    check(make_lora("llama", use_dora=True, target_modules=["q_proj"]), ids, message)


def test_a_variant_that_is_not_active_is_no_obstacle(make_lora, make_base, ids):
    model = make_lora("llama", target_modules=["q_proj"])
    model.add_adapter("dora", peft.LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = adopt(model)
    model(ids, routing_weights=torch.ones(3))
    model.base_model.set_adapter(["expert_0", "dora"])
    with pytest.raises(ValueError, match="can't route adapter 'dora'"):
        model(ids, routing_weights=torch.ones(2))


def test_parameters(make_base, ids):
    config = peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"], task_type="CAUSAL_LM")
    check(peft.get_peft_model(make_base("llama"), config, "a"), ids, r"q_proj \(ParamWrapper\) can't be routed")


def test_convolutions_and_attention():
    for module, x in ((nn.Conv1d(4, 4, 1), torch.randn(2, 4, 5)), (nn.Conv2d(4, 4, 1), torch.randn(2, 4, 5, 5))):
        net = nn.Sequential(module)
        model = moelora.get_peft_model(net, peft.LoraConfig(target_modules=["0"]), "a")
        model(x)
        with pytest.raises(ValueError, match=r"0 \(Conv\dd\) can't be routed"):
            model(x, routing_weights=torch.ones(1))


def test_merged_adapters(make_lora, ids):
    model = make_lora("llama")
    model.merge_adapter(["expert_1"])
    check(model, ids, r"q_proj has merged adapters \['expert_1'\].*unmerge_adapter")
    model.unmerge_adapter()
    model(ids, routing_weights=torch.ones(3))


def test_adapter_names_together_with_weights(make_lora, ids):
    model = adopt(make_lora("llama"))
    names = ["expert_0", "expert_2"]
    stock = make_lora("llama")(ids, adapter_names=names).logits
    assert torch.equal(model(ids, adapter_names=names).logits, stock)
    with pytest.raises(ValueError, match="adapter_names can't be used together"):
        model(ids, adapter_names=names, routing_weights=torch.ones(3))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="got adapter_names together with routing weights"):
        layer(torch.randn(2, 3, 32), adapter_names=names, routing_weights=torch.ones(3))
    model.base_model.attach_router(FixedRouter(["expert_0", "expert_1", "expert_2"]))
    with pytest.raises(ValueError, match="adapter_names can't be used together"):
        model(ids, adapter_names=names)


def test_sharded_adapters_and_weights(make_lora, ids, tmp_path):
    from torch.distributed.tensor import distribute_tensor

    model = adopt(make_lora("llama"))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        with pytest.raises(TypeError, match=r"must not be a DTensor: pass weights.full_tensor\(\)"):
            model(ids, routing_weights=distribute_tensor(torch.ones(3), mesh))
        lora_A = model.base_model.model.model.layers[1].mlp.up_proj.lora_A["expert_0"]
        lora_A.weight = nn.Parameter(distribute_tensor(lora_A.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj has sharded adapters \(DTensor\)"):
            model(ids, routing_weights=torch.ones(3))
    finally:
        torch.distributed.destroy_process_group()


def test_active_adapters_that_differ_between_layers(make_lora, ids):
    model = adopt(make_lora("llama"))
    model.base_model.model.model.layers[1].mlp.up_proj.set_adapter(["expert_0", "expert_2"])
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj has the active adapters \['expert_0', 'expert_2'\]"):
        model(ids, routing_weights=torch.ones(3))


def test_a_mixed_adapter_with_a_mixture_config(make_base):
    with pytest.raises(ValueError, match="mixed=True can't be routed"):
        moelora.get_peft_model(make_base("llama"), moelora.MoELoraConfig(target_modules=["q_proj"]), mixed=True)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"mixture": "heads"}, "mixture must be one of"), ({"routing_tail": "last"}, "routing_tail must be one of")],
)
def test_unknown_modes(make_lora, ids, keywords, message):
    model = adopt(make_lora("llama"))
    with pytest.raises(ValueError, match=message):
        model(ids, routing_weights=torch.ones(3), **keywords)
