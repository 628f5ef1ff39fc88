"""Models over several devices and processes: device_map and offloading, DataParallel, DistributedDataParallel."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

import moelora
from moelora import MoELoraConfig, adopt
from moelora.nn.routers import EmbeddingRouter, FixedRouter, PerLayerRouter

NAMES = ["expert_0", "expert_1", "expert_2"]
two_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def add_experts(net, **options):
    targets = {"target_modules": ["q_proj", "down_proj", "lm_head"]}
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **targets | options)
    model = peft.get_peft_model(net, config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    model.base_model.set_adapter(NAMES)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).mul_(0.2).to(parameter.device)
    return adopt(model.eval())


class TestOffloading:
    """What accelerate keeps on disk, or in the memory of the CPU, is a meta tensor until its module is called."""

    DEVICE_MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"} | {
        name: "disk" for name in ("model.layers.1", "model.layers.2", "model.norm", "lm_head")
    }

    IN_MEMORY = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]}

    @pytest.fixture
    def offloaded(self, make_base, tmp_path):
        return dispatch_model(make_base("llama"), self.DEVICE_MAP, main_device="cpu", offload_dir=str(tmp_path))

    @pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)])
    def test_of_other_layers_changes_nothing(self, offloaded, make_base, ids, shape):
        model, expected = (add_experts(net, **self.IN_MEMORY) for net in (offloaded, make_base("llama")))
        assert any(p.is_meta for p in model.parameters())
        w = torch.rand(shape)
        with torch.no_grad():
            got = model(ids, routing_weights=w).logits
            torch.testing.assert_close(got, expected(ids, routing_weights=w).logits)
            assert not torch.allclose(got, model(ids, routing_weights=w.flip(-1)).logits)

    def test_of_other_layers_leaves_the_experts_and_a_router_trainable(self, offloaded, make_base, ids):
        def step(net):
            model = add_experts(net, **self.IN_MEMORY).train()
            torch.manual_seed(1)
            model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3))
            model(ids, labels=ids).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

        got, expected = step(offloaded), step(make_base("llama"))
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])

    @pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
    def test_of_the_adapters_is_refused_and_plain_calls_go_on(self, make_base, ids, tmp_path, offload):
        options = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
        expected = add_experts(make_base("llama"))(ids).logits
        model = add_experts(make_base("llama"))
        offload(model.base_model.model.model.layers[1], execution_device=torch.device("cpu"), **options)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected)
            with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj has offloaded adapters \(meta tensors\)"):
                model(ids, routing_weights=torch.ones(3))
            torch.testing.assert_close(model(ids).logits, expected)

    def test_of_the_adapters_of_an_embedding_is_refused(self, make_base, ids):
        config = peft.LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
        model = moelora.get_peft_model(make_base("llama"), config, NAMES[0])
        model.get_input_embeddings().lora_embedding_A.to("meta")
        with pytest.raises(ValueError, match=r"model.embed_tokens has offloaded adapters"):
            model(ids, routing_weights=torch.ones(1))

    def test_a_model_that_is_meta_altogether_has_shapes(self, make_base):
        model = add_experts(make_base("llama")).to("meta")
        ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
        assert model(ids, routing_weights=torch.ones(2, 7, 3, device="meta")).logits.shape == (2, 7, 97)


class TestSeveralDevices:
    pytestmark = two_gpus

    @pytest.fixture
    def pair(self, make_base):
        net = make_base("llama")
        first = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0}
        rest = {"model.layers.2": 1, "model.norm": 1, "lm_head": 1}
        return add_experts(dispatch_model(copy.deepcopy(net), first | rest)), add_experts(net)

    @pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 7, 3)])
    def test_weights_follow_the_device_of_each_layer(self, pair, ids, shape):
        model, on_cpu = pair
        w, v = (torch.rand(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        model(ids.cuda(), labels=ids.cuda(), routing_weights=w).loss.backward()
        on_cpu(ids, labels=ids, routing_weights=v).loss.backward()
        torch.testing.assert_close(w.grad, v.grad, rtol=1e-3, atol=1e-4)
        got, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, on_cpu))
        assert {g.device.index for g in got.values()} == {0, 1}
        for name in expected:
            torch.testing.assert_close(got[name].cpu(), expected[name], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("reads", ["nothing", "embeddings", "layers"])
    def test_a_router_reads_layers_on_other_devices(self, pair, ids, reads):
        routers = {
            "nothing": lambda: FixedRouter(NAMES, [1, 2, 3]),
            "embeddings": lambda: EmbeddingRouter(NAMES, 32),
            "layers": lambda: PerLayerRouter(NAMES, 32, num_layers=3, top_k=2),
        }
        logits = []
        for model in pair:
            torch.manual_seed(1)
            model.base_model.attach_router(routers[reads]())
            device = next(model.parameters()).device
            logits.append(model(ids.to(device), labels=ids.to(device)).logits.cpu())
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


class TestDataParallel:
    MESSAGE = "nn.DataParallel can't route: .* use DistributedDataParallel, or call without"

    @staticmethod
    def replica(model):
        """What nn.DataParallel runs on a second device, without the second device: see torch.nn.parallel.replicate."""
        modules = list(model.modules())
        copies = {id(module): module._replicate_for_data_parallel() for module in modules}
        for module in modules:
            made = copies[id(module)]
            for name, child in module._modules.items():
                setattr(made, name, copies[id(child)]) if child is not None else made._modules.update({name: None})
            for name, parameter in module._parameters.items():
                if parameter is None:
                    made._parameters[name] = None
                else:
                    setattr(made, name, parameter * 1)
        return copies[id(model)]

    def test_a_replica_runs_plain(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        assert torch.equal(self.replica(model)(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("shape", [(3,), (1,), (2, 3), (2, 7, 3)])  # [N] is cut apart
    def test_a_replica_refuses_weights(self, make_lora, ids, shape):
        model = adopt(make_lora("llama"))
        plain, routed = model(ids).logits, model(ids, routing_weights=torch.ones(3)).logits
        for call in (self.replica(model), self.replica(model).base_model):
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                call(ids, routing_weights=torch.rand(shape))
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids, routing_weights=torch.ones(3)).logits, routed)

    def test_a_replica_refuses_a_router(self, make_lora, ids):
        model = adopt(make_lora("llama"))
        model.base_model.attach_router(FixedRouter(NAMES))
        routed = model(ids).logits
        for call in (self.replica(model), self.replica(model.get_base_model())):
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                call(ids)
        assert torch.equal(model(ids).logits, routed)

    @pytest.mark.gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_on_two_devices(self, make_lora, ids):
        model = adopt(make_lora("llama")).cuda()
        parallel = nn.DataParallel(model, device_ids=[0, 1])
        expected = model(ids.cuda()).logits
        torch.testing.assert_close(parallel(ids.cuda()).logits, expected)
        for shape in ((3,), (2, 3), (2, 7, 3)):
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                parallel(ids.cuda(), routing_weights=torch.rand(shape))
        torch.testing.assert_close(parallel(ids.cuda()).logits, expected)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="where there are GPUs, DataParallel wants the model on one")
    def test_on_the_cpu_is_the_model_itself(self, make_lora, ids, weights):
        model = adopt(make_lora("llama"))
        expected = model(ids, routing_weights=weights).logits
        assert torch.equal(nn.DataParallel(model)(ids, routing_weights=weights).logits, expected)


def train_step(wrap, rows):
    """Gradients of one step on some rows of a batch, with a router and its loss."""
    import conftest

    model = adopt(conftest.lora("llama", lora_dropout=0.0)).train()
    torch.manual_seed(1)
    config = MoELoraConfig(load_balance_loss_type="z_loss", router_aux_loss_coef=0.5)  # a mean over tokens
    model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=3, top_k=2), config)
    ids = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(2))[rows]
    wrapped = wrap(model)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_distributed_data_parallel_gives_the_gradients_of_the_joined_batch(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        expected = train_step(lambda model: model, slice(None))
    finally:
        sys.path.pop(0)
    for got in ranks:
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for name, gradient in expected.items() if "router" in name)


if __name__ == "__main__":  # one of the two processes
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    gradients = train_step(nn.parallel.DistributedDataParallel, slice(2 * rank, 2 * rank + 2))
    torch.save(gradients, Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
