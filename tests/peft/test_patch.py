"""`patch_peft`: what stock PEFT makes is routed while it is in force, and PEFT is stock again afterwards."""

import copy
import inspect
import threading

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from transformers.integrations.peft import MIN_PEFT_VERSION

import moelora
from moelora import MoELoraConfig, patch_peft

PLACES = {
    "tuner": lambda: peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA],
    "model": lambda: vars(peft.PeftModel)["__init__"],
    "mixed": lambda: vars(peft.PeftMixedModel)["__init__"],
    "function": lambda: peft.get_peft_model,
    "code": lambda: peft.get_peft_model.__code__,
    "config": lambda: vars(peft).get("MoELoraConfig"),
}


@pytest.fixture(autouse=True)
def peft_is_stock_before_and_after():
    before = {name: place() for name, place in PLACES.items()}
    assert before["tuner"] is lora.LoraModel
    yield
    for name, place in PLACES.items():
        assert place() is before[name], name


def config(**options):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**(settings | options))


def is_routed(model, ids):
    """Whether weights given by keyword are used; stock models must say nothing of the kind."""
    n = len(model.base_model.active_adapters)
    model.eval()
    with model.disable_adapter():
        base = model(ids).logits
    if not torch.allclose(model(ids, routing_weights=torch.zeros(n)).logits, base, atol=1e-6):
        return False
    assert not torch.allclose(model(ids, routing_weights=torch.ones(n)).logits, base, atol=1e-4)
    return True


def test_names_imported_before_it_serve_routed_models(make_base, ids):
    model = get_peft_model(make_base("llama"), config())
    assert type(model.base_model) is lora.LoraModel
    with patch_peft():
        assert is_routed(get_peft_model(make_base("llama"), config()), ids)
        assert is_routed(PeftModelForCausalLM(make_base("llama"), config()), ids)
        assert is_routed(PeftModel(make_base("llama"), config(task_type=None), "a"), ids)
    assert type(get_peft_model(make_base("llama"), config()).base_model) is lora.LoraModel


def test_names_imported_under_it_are_the_same_ones(make_base, ids):
    with patch_peft():
        names = {}
        exec("from peft import MoELoraConfig, get_peft_model, PeftModel, AutoPeftModelForCausalLM", names)
        assert names["MoELoraConfig"] is MoELoraConfig
        assert names["get_peft_model"] is get_peft_model
        assert is_routed(names["get_peft_model"](make_base("llama"), config()), ids)
    with pytest.raises(ImportError):
        exec("from peft import MoELoraConfig")
    model = names["get_peft_model"](make_base("llama"), config())
    assert type(model.base_model) is lora.LoraModel


def test_the_function_keeps_its_signature():
    stock = inspect.signature(get_peft_model).parameters
    with patch_peft():
        assert inspect.signature(peft.get_peft_model).parameters == stock
    assert list(inspect.signature(moelora.get_peft_model).parameters) == list(stock)
    assert [p.default for p in inspect.signature(moelora.get_peft_model).parameters.values()] == [
        p.default for p in stock.values()
    ]


def test_a_model_has_the_bits_of_a_stock_one(make_base, ids):
    torch.manual_seed(2)
    stock = get_peft_model(make_base("llama"), config()).eval()
    with patch_peft():
        torch.manual_seed(2)
        routed = get_peft_model(make_base("llama"), config()).eval()
    assert torch.equal(routed(ids).logits, stock(ids).logits)
    assert list(routed.state_dict()) == list(stock.state_dict())
    assert [(n, p.requires_grad) for n, p in routed.named_parameters()] == [
        (n, p.requires_grad) for n, p in stock.named_parameters()
    ]


def test_the_tuner_made_directly_is_the_one_that_adopting_makes(make_base, ids):
    with patch_peft():
        made = get_peft_model(make_base("llama"), config(), "a")
    adopted = moelora.adopt(get_peft_model(make_base("llama"), config(), "a"))
    assert type(made.base_model) is type(adopted.base_model) is moelora.LoraModel
    assert vars(made.base_model).keys() == vars(adopted.base_model).keys()
    for ours, theirs in zip(made.modules(), adopted.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks)
        assert len(ours._forward_hooks) == len(theirs._forward_hooks)
    moelora.release(made)
    assert type(made.base_model) is lora.LoraModel
    assert {type(m) for m in made.modules() if isinstance(m, lora.LoraLayer)} == {lora.Linear}


def test_a_mixture_config_makes_experts_and_router(make_base, ids):
    mixture = MoELoraConfig(num_experts=3, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with patch_peft():
        model = get_peft_model(make_base("llama"), mixture)
        assert list(model.peft_config) == ["expert_0", "expert_1", "expert_2"]
        assert model.base_model.has_router()
        assert model(ids).router_aux_loss >= 0
        alone = get_peft_model(make_base("llama"), mixture, adapter_name="expert_0")
        assert list(alone.peft_config) == ["expert_0"]
        assert not alone.base_model.has_router()
        # The namespace is what it is without the patch.
        assert list(moelora.get_peft_model(make_base("llama"), mixture).peft_config) == list(model.peft_config)


def test_what_is_loaded_is_routed(make_base, make_lora, ids, weights, tmp_path):
    stock = make_lora("llama")
    stock.save_pretrained(tmp_path)
    expected = moelora.adopt(stock)(ids, routing_weights=weights).logits
    with patch_peft():
        model = PeftModel.from_pretrained(make_base("llama"), tmp_path / "expert_0", adapter_name="expert_0")
    for name in ("expert_1", "expert_2"):
        model.load_adapter(tmp_path / name, adapter_name=name)
    model.base_model.set_adapter(["expert_0", "expert_1", "expert_2"])
    assert torch.equal(model(ids, routing_weights=weights).logits, expected)


def test_auto_classes_are_routed(make_base, make_lora, ids, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    make_lora("llama", n=1).save_pretrained(tmp_path)
    saved = peft.PeftConfig.from_pretrained(tmp_path / "expert_0")
    saved.base_model_name_or_path = str(tmp_path / "base")
    saved.save_pretrained(tmp_path / "expert_0")
    with patch_peft():
        assert is_routed(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "expert_0"), ids)


def test_a_class_derived_from_pefts_is_routed(make_base, ids):
    class Mine(PeftModelForCausalLM):
        def __init__(self, model, config):
            super().__init__(model, config, "mine")
            self.greeting = "hello"

    with patch_peft():
        model = Mine(make_base("llama"), config())
    assert isinstance(model, Mine)
    assert model.greeting == "hello"
    assert is_routed(model, ids)


def test_other_task_classes_and_tuners_are_made_as_ever(make_base, ids):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with patch_peft():
        model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
        x = torch.randn(2, 4)
        base, nothing = net[0].base_layer, torch.zeros(1)
        exact = x.double() @ base.weight.double().t() + base.bias.double()
        size = x.double().abs() @ base.weight.double().abs().t() + base.bias.double().abs()
        assert ((model(x, routing_weights=nothing) - exact).abs() <= 8 * torch.finfo(x.dtype).eps * size).all()
        moelora.set_base_product("torch")
        try:
            assert torch.equal(model(x, routing_weights=nothing), base(x))
        finally:
            moelora.set_base_product(None)
        ia3 = get_peft_model(
            make_base("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        )
        ia3(ids)
        with pytest.raises(TypeError, match="IA3Model can't be routed"):
            ia3(ids, routing_weights=torch.ones(1))
        mixed = get_peft_model(make_base("llama"), config(), mixed=True)
        mixed(ids)
        with pytest.raises(TypeError, match="PeftMixedModel with MixedModel can't be routed, only LoRA, LoHa and LoKr"):
            mixed(ids, routing_weights=torch.ones(1))
        prompt = get_peft_model(
            make_base("llama"), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        )
        prompt(ids)
        with pytest.raises(TypeError, match="can't be routed"):
            prompt(ids, routing_weights=torch.ones(1))


def test_injected_adapters_run_pefts_code_and_refuse_weights(make_base, ids):
    torch.manual_seed(3)
    stock = inject_adapter_in_model(config(), make_base("llama"), "a").eval()
    with patch_peft():
        torch.manual_seed(3)
        model = inject_adapter_in_model(config(), make_base("llama"), "a").eval()
    assert torch.equal(model(ids).logits, stock(ids).logits)
    with pytest.raises(TypeError, match="routing_weights reached LlamaForCausalLM, which would ignore it"):
        model(ids, routing_weights=torch.ones(1))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter of this transformers asks for PEFT {MIN_PEFT_VERSION}, installed is {peft.__version__}",
)
def test_adapters_of_transformers_run_pefts_code_and_refuse_weights(make_base, ids):
    def add(model):
        torch.manual_seed(4)
        for name in ("a", "b"):
            model.add_adapter(config(task_type=None), adapter_name=name)
        return model.eval()

    stock = add(make_base("llama"))
    with patch_peft():
        model = add(make_base("llama"))
    assert isinstance(model.model.layers[0].self_attn.q_proj, moelora.Linear)
    for step in (
        lambda m: None,
        lambda m: m.set_adapter("a"),
        lambda m: m.disable_adapters(),
        lambda m: m.enable_adapters(),
        lambda m: m.delete_adapter("b"),
    ):
        step(stock)
        step(model)
        assert model.active_adapters() == stock.active_adapters()
        assert torch.equal(model(ids).logits, stock(ids).logits)
    assert list(model.state_dict()) == list(stock.state_dict())
    with pytest.raises(TypeError, match="routing_weights reached LlamaForCausalLM"):
        model(ids, routing_weights=torch.ones(1))
    assert torch.equal(copy.deepcopy(model)(ids).logits, stock(ids).logits)


class TestUndoing:
    def test_models_made_under_it_stay_routed(self, make_base, ids):
        with patch_peft():
            model = get_peft_model(make_base("llama"), config(), "a")
        assert is_routed(model, ids)
        model.add_adapter("b", config())
        model.base_model.set_adapter(["a", "b"])
        assert is_routed(model, ids)
        assert is_routed(copy.deepcopy(model), ids)

    def test_a_call_is_enough(self, make_base, ids):
        patch = patch_peft()
        model = get_peft_model(make_base("llama"), config())
        patch.undo()
        assert is_routed(model, ids)
        patch.undo()
        with pytest.raises(RuntimeError, match="was undone: call patch_peft"), patch:
            pass

    def test_patches_nest_and_overlap(self):
        outer = patch_peft()
        code = peft.get_peft_model.__code__
        with patch_peft():
            assert peft.get_peft_model.__code__ is code
        assert PLACES["tuner"]() is moelora.LoraModel
        other = patch_peft()
        outer.undo()
        assert PLACES["tuner"]() is moelora.LoraModel
        with other:
            assert PLACES["code"]() is code
        assert PLACES["tuner"]() is lora.LoraModel

    def test_an_exception_undoes_it(self):
        with pytest.raises(ZeroDivisionError), patch_peft():
            _ = 1 / 0
        assert PLACES["tuner"]() is lora.LoraModel

    def test_a_failed_construction_leaves_nothing(self, make_base):
        with patch_peft(), pytest.raises(ValueError, match="Target modules"):
            get_peft_model(make_base("llama"), config(target_modules=["nothing"]))

    def test_what_others_have_put_in_its_place_stays(self, make_base, monkeypatch):
        patch = patch_peft()
        ours = peft.PeftModel.__init__
        calls = []

        def theirs(model, *args, **kwargs):
            calls.append(type(model))
            ours(model, *args, **kwargs)

        peft.PeftModel.__init__ = theirs
        try:
            patch.undo()
            assert peft.PeftModel.__init__ is theirs
            model = get_peft_model(make_base("llama"), config())
            assert calls
            assert type(model.base_model) is lora.LoraModel
        finally:
            peft.PeftModel.__init__ = ours.__wrapped__

    def test_it_can_be_repeated_from_many_threads(self):
        failures = []

        def work():
            for _ in range(200):
                with patch_peft():
                    if PLACES["tuner"]() is not moelora.LoraModel:
                        failures.append("not patched")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert PLACES["tuner"]() is lora.LoraModel

    def test_it_acts_in_all_threads(self, make_base, ids):
        made = []
        with patch_peft():
            thread = threading.Thread(target=lambda: made.append(get_peft_model(make_base("llama"), config())))
            thread.start()
            thread.join()
        assert is_routed(made[0], ids)
