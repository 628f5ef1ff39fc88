"""Routing over quantised bases: the library's own kernel runs the base, which stays as it is; every library on CPU."""

import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.tuners import lora
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import moelora
from moelora import adopt, release
from moelora.nn.routers import FixedRouter

pytestmark = pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors")

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
EXPERTS = ["expert_0", "expert_1", "expert_2"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STOCK = {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt", "torchao": "TorchaoLoraLinear"}
STOCK["hqq"] = "HqqLoraLinear"


@pytest.fixture(params=list(STOCK))
def method(request):
    pytest.importorskip({"torchao": "torchao", "hqq": "hqq"}.get(request.param, "bitsandbytes"))
    return request.param


def llama():
    torch.manual_seed(11)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, **sizes, **heads, **special))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def make_quantized(saved):
    def make(method, dtype=torch.float32):
        if method == "hqq":  # which transformers 5 can't load
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

            model, config = llama().to(dtype), BaseQuantizeConfig(nbits=4, group_size=32)
            for layer in model.model.layers:
                for parent in (layer.self_attn, layer.mlp):
                    for name, linear in list(parent.named_children()):
                        if isinstance(linear, nn.Linear):
                            setattr(parent, name, HQQLinear(linear, config, compute_dtype=dtype, device="cpu"))
        else:
            config = configuration(method, dtype)
            model = transformers.LlamaForCausalLM.from_pretrained(saved, quantization_config=config, dtype=dtype)
        return model

    return make


def configuration(method, dtype):
    if method == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if method in ("nf4", "fp4"):
        options = {"bnb_4bit_quant_type": method, "bnb_4bit_use_double_quant": method == "nf4"}
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)
    from torchao import quantization

    kind = {"torchao": "Int8WeightOnlyConfig", "dynamic": "Int8DynamicActivationInt8WeightConfig"}[method]
    return transformers.TorchAoConfig(getattr(quantization, kind)())


def with_adapters(model, experts=EXPERTS):
    """Stock adapters with B not zero, in training mode: in evaluation some kernels round more."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    torch.manual_seed(12)
    model = peft.get_peft_model(model, config, experts[0])
    for name in experts[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    model.base_model.set_adapter(list(experts))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.fixture
def make(make_quantized):
    return lambda method, dtype=torch.float32: with_adapters(make_quantized(method, dtype))


def up_proj(model, layer=0):
    return model.base_model.model.model.layers[layer].mlp.up_proj


def base_bytes(model):
    """Copies of all tensors of the base, packed ones as they are."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" in name or "router" in name:
            continue
        if is_traceable_wrapper_subclass(tensor):
            found |= {f"{name}.{part}": getattr(tensor, part).clone() for part in tensor.__tensor_flatten__()[0]}
        else:
            found[name] = tensor.detach().clone()
    return found


def test_an_adopted_model_without_weights_gives_the_bits_of_stock_and_release_its_classes(method, make, ids):
    model = make(method)
    stock, text = type(up_proj(model)), repr(model)
    expected = model(ids).logits
    adopt(model)
    assert type(up_proj(model)).__name__ == stock.__name__ == STOCK[method]
    assert isinstance(up_proj(model), stock) and type(up_proj(model)) is not stock
    assert torch.equal(model(ids).logits, expected)
    assert [line for line in repr(model).splitlines() if "experts: " not in line] == text.splitlines()
    model(ids, routing_weights=torch.ones(3))
    release(model)
    assert type(up_proj(model)) is stock
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("form", ["N", "BN", "BSN"])
def test_weights_and_gradients_equal_the_loop_over_adapters(method, make, loop, gradients, ids, weights, form):
    given = {"N": weights[0, 0], "BN": weights[:, 0], "BSN": weights}[form]
    w, v = (given.clone().requires_grad_() for _ in range(2))
    model, reference = adopt(make(method)), loop(make(method), v)
    out, expected = model(ids, labels=ids, routing_weights=w), reference(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    assert not torch.allclose(model(ids, routing_weights=w.flip(-1)).logits, expected.logits, atol=1e-3)
    out.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(w.grad, v.grad, **CLOSE)
    got, wanted = gradients(model), gradients(reference)
    assert got.keys() == wanted.keys()
    assert all("lora_" in name for name in got)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], **CLOSE)


@pytest.mark.parametrize("expert", [0, 2])
def test_one_hot_weights_are_the_single_adapter(method, make, ids, expert):
    stock = make(method)
    stock.set_adapter(EXPERTS[expert])
    w = nn.functional.one_hot(torch.tensor(expert), 3)
    model = adopt(make(method))
    torch.testing.assert_close(model(ids, routing_weights=w).logits, stock(ids).logits, **CLOSE)
    assert not torch.allclose(model(ids, routing_weights=w.roll(1)).logits, stock(ids).logits, atol=1e-3)


def test_gradients_pass_through_the_base(method, make):
    layer = up_proj(adopt(make(method)))
    with torch.no_grad():
        weight = layer.base_layer(torch.eye(64)).t()
    x, g = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 128)
    layer(x, routing_weights=torch.zeros(3)).backward(g)
    torch.testing.assert_close(x.grad, g @ weight, **CLOSE)


def test_disabled_adapters_are_the_quantized_base(method, make, make_quantized, ids):
    model = adopt(make(method))
    expected = make_quantized(method).train()(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids, routing_weights=torch.ones(3)).logits, expected)
    torch.testing.assert_close(model(ids, routing_weights=torch.zeros(3)).logits, expected, **CLOSE)


def test_a_base_in_bfloat16_under_adapters_in_float32(method, make, ids):
    model = adopt(make(method, torch.bfloat16))
    layer = up_proj(model)
    assert layer.lora_A["expert_0"].weight.dtype is torch.float32
    x, w = torch.randn(2, 7, 64).bfloat16().requires_grad_(), torch.rand(2, 7, 3)
    y = layer(x, routing_weights=w)
    expected = layer.base_layer(x).float()
    for e, name in enumerate(EXPERTS):
        expected = expected + w[..., e, None] * 1.5 * layer.lora_B[name](layer.lora_A[name](x.float()))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-7, atol=1e-3)
    out = model(ids, labels=ids, routing_weights=w.requires_grad_())
    out.loss.backward()
    assert out.logits.dtype is torch.bfloat16
    assert w.grad.isfinite().all() and w.grad.any(-1).any(-1).all()


def test_autocast_does_not_round_a_base_that_ignores_it(method, make):
    layer = up_proj(adopt(make(method)))
    x = torch.randn(2, 7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        base = layer.base_layer(x)
        mixed, plain = (layer(x, routing_weights=w) for w in (torch.zeros(3), torch.ones(3)))
        stock = layer(x)
    assert mixed.dtype is plain.dtype is stock.dtype is base.dtype
    assert torch.equal(mixed, base)
    torch.testing.assert_close(plain, stock, rtol=2**-6, atol=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(method, make_quantized, gradients, ids, weights, reentrant):
    found = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        base = peft.prepare_model_for_kbit_training(make_quantized(method), checkpointing, **options)
        model = adopt(with_adapters(base))
        w = weights.clone().requires_grad_()
        model(ids, labels=ids, routing_weights=w).loss.backward()
        found.append(gradients(model) | {"weights": w.grad})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], **CLOSE)


def test_experts_and_router_train_over_a_base_that_stays_as_it_is(method, make_quantized, ids):
    base = peft.prepare_model_for_kbit_training(make_quantized(method))
    config = moelora.MoELoraConfig(
        r=4, num_experts=3, router_type="learned", target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.1
    )
    torch.manual_seed(0)
    model = moelora.get_peft_model(base, config).train()
    before, trained = base_bytes(model), [p for p in model.parameters() if p.requires_grad]
    assert not any("base_layer" in name for name, p in model.named_parameters() if p.requires_grad)
    start = [p.detach().clone() for p in trained]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    assert type(up_proj(model)).__name__ == STOCK[method]
    after = base_bytes(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_generation_with_weights_per_token(method, make, ids):
    model = adopt(make(method)).eval()
    w = nn.functional.one_hot(torch.randint(3, (2, 7), generator=torch.Generator().manual_seed(3)), 3).float()
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids, routing_weights=w, **options)
    assert not torch.equal(model.generate(ids, routing_weights=w.flip(-1), **options), tokens)
    for _ in range(2):  # a batch and its sequences one by one
        one = torch.cat([model.generate(ids[i : i + 1], routing_weights=w[i : i + 1], **options) for i in range(2)])
        assert torch.equal(one, tokens)
        options["use_cache"] = False


def test_a_router_decides_where_no_weights_are_given(method, make, ids):
    model = adopt(make(method))
    w = torch.tensor([0.2, 0.5, 0.3])
    expected = model(ids, routing_weights=w).logits
    model.base_model.attach_router(FixedRouter(EXPERTS, w.tolist()))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_adapters_added_and_loaded_later(method, make, loop, ids, tmp_path):
    make(method).save_pretrained(tmp_path, selected_adapters=["expert_1"])
    model, reference = adopt(make(method)), make(method)
    for each in (model, reference):
        each.load_adapter(tmp_path / "expert_1", "loaded")
        each.base_model.set_adapter(["expert_0", "loaded"])
    w = torch.rand(2, 7, 2)
    torch.testing.assert_close(model(ids, routing_weights=w).logits, loop(reference, w)(ids).logits, **CLOSE)


def test_copies_and_pickles_route_on_their_own(method, make, ids, weights):
    model = adopt(make(method))
    expected = model(ids, routing_weights=weights).logits
    copies = [copy.deepcopy(model)]
    if method != "torchao":  # PEFT keeps what can't be pickled in its layers over torchao
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    for each in copies:
        assert type(up_proj(each)) is type(up_proj(model))
        assert torch.equal(each(ids, routing_weights=weights).logits, expected)


def test_merging_is_stock_merging(method, make, ids):
    def merged(model):
        model.set_adapter("expert_1")
        return model.merge_and_unload().train()

    expected, got = merged(make(method)), merged(adopt(make(method)))
    assert torch.equal(got(ids).logits, expected(ids).logits)
    assert {name: type(m) for name, m in got.named_modules()} == {name: type(m) for name, m in expected.named_modules()}


def test_a_mixture_is_merged_as_stock_peft_merges_one_adapter_of_all(method, make, ids):
    """So that the base is quantised anew once, whatever the number of experts."""
    w = torch.tensor([0.5, -0.25, 1.0])
    stock, model = make(method), adopt(make(method))
    stock.add_weighted_adapter(EXPERTS, w.tolist(), "all", combination_type="cat")
    expected = stock.merge_and_unload(adapter_names=["all"]).train()
    got = model.merge_and_unload(routing_weights=w, safe_merge=True).train()
    torch.testing.assert_close(got(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)
    assert {name: type(m) for name, m in got.named_modules()} == {name: type(m) for name, m in expected.named_modules()}


def test_nothing_is_merged_into_bases_that_can_not_be_quantised_anew(make_quantized, ids):
    pytest.importorskip("torchao")
    from torchao import quantization

    net = llama()
    quantization.quantize_(net.model.layers[1], quantization.Int8WeightOnlyConfig())
    model = adopt(with_adapters(net))
    expected = model(ids, routing_weights=torch.ones(3)).logits
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_proj \(TorchaoLoraLinear\): transformers' TorchAoConfig"
    ):
        model.merge_and_unload(routing_weights=torch.ones(3))
    assert torch.equal(model(ids, routing_weights=torch.ones(3)).logits, expected)


def test_merged_adapters_are_refused(method, make, ids):
    model = adopt(make(method))
    model.merge_adapter(["expert_1"])
    with pytest.raises(ValueError, match=r"q_proj has merged adapters \['expert_1'\].*unmerge_adapter"):
        model(ids, routing_weights=torch.ones(3))


@pytest.mark.parametrize("alternate", [False, True])
def test_four_bits_repacked_for_evaluation_refuse_to_train(make, gradients, ids, weights, alternate):
    bnb = pytest.importorskip("bitsandbytes")
    model = adopt(make("nf4"))
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not all(layer.support_avx512bf16_for_cpu for layer in layers):
        pytest.skip("bitsandbytes repacks only where the CPU has AVX512-BF16")
    if alternate:  # the way out that the error names
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
    model(ids, labels=ids, routing_weights=weights).loss.backward()
    expected = copy.deepcopy(gradients(model))
    model.zero_grad()
    with torch.no_grad():
        model.eval()(ids, routing_weights=weights)
    loss = model.train()(ids, labels=ids, routing_weights=weights).loss
    if not alternate:
        with pytest.raises(RuntimeError, match=r"layers.1.mlp.down_proj \(Linear4bit\) has 4-bit .* model anew"):
            loss.backward()
        return
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


def test_quantized_activations_run_and_refuse_to_train(make, loop, ids, weights):
    pytest.importorskip("torchao")
    model, reference = adopt(make("dynamic")), loop(make("dynamic"), weights)
    with torch.no_grad():
        got, expected = model(ids, routing_weights=weights).logits, reference(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0.01)  # a rounding apart is a step of 1/127 apart
    with pytest.raises(RuntimeError, match=r"down_proj \(TorchaoLoraLinear\) has a base whose kernel gives no"):
        model(ids, labels=ids, routing_weights=weights).loss.backward()


def test_a_base_quantized_under_its_adapters_runs_its_own_kernel(loop, ids, weights):
    quantization = pytest.importorskip("torchao.quantization")
    models = []
    for _ in range(2):
        model = with_adapters(llama())
        exact = model(ids).logits
        for module in model.modules():
            if type(module) is lora.Linear:
                quantization.quantize_(module.base_layer, quantization.Int8WeightOnlyConfig())
        assert not torch.equal(model(ids).logits, exact)
        models.append(model)
    assert type(up_proj(adopt(models[0]))) is moelora.Linear
    got, expected = models[0](ids, routing_weights=weights).logits, loop(models[1], weights)(ids).logits
    torch.testing.assert_close(got, expected, **CLOSE)
    assert not torch.allclose(got, adopt(with_adapters(llama()))(ids, routing_weights=weights).logits, atol=1e-4)


def test_layers_of_bitsandbytes_that_peft_takes_for_plain_ones_run_their_own_kernel(loop):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Sequential(bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32), nn.ReLU()).to("cpu")
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], init_lora_weights=False), "a")
    x, w = torch.randn(5, 64), torch.rand(5, 1)
    expected = loop(copy.deepcopy(model), w)(x)
    assert type(adopt(model).base_model.model[0]) is moelora.Linear
    torch.testing.assert_close(model(x, routing_weights=w), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["gptq.GPTQLoraLinear", "awq.AwqLoraLinear", "aqlm.AqlmLoraLinear"])
def test_other_quantized_layers_refuse_weights(kind):
    module, name = kind.split(".")
    stock = getattr(__import__(f"peft.tuners.lora.{module}", fromlist=[name]), name)
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: stock})
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, "a")
    x = torch.randn(2, 4)
    expected = model(x)
    assert torch.equal(adopt(model)(x), expected)
    with pytest.raises(ValueError, match=rf"0 \({name}\) can't be routed: leave it out of target_modules"):
        model(x, routing_weights=torch.ones(1))


def test_the_program_in_the_documentation_runs(capsys):
    pytest.importorskip("bitsandbytes")
    page = Path(__file__).parents[2] / "docs" / "quantized.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert losses[0] > losses[1] > losses[2]


def test_importing_moelora_imports_none_of_the_libraries():
    code = "import moelora, sys; print({'bitsandbytes', 'torchao', 'hqq', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
