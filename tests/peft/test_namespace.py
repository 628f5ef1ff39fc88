"""`moelora` and `moelora.peft` give every name of peft, and what they make is adopted."""

import importlib
import os
import pkgutil
import subprocess
import sys
from types import ModuleType

import peft
import pytest
import torch
from peft.tuners import loha, lokr, lora

import moelora
import moelora.peft
from moelora import MoELoraConfig, get_peft_model
from moelora.nn.routers import FixedRouter, PerLayerRouter
from moelora.peft.lycoris import LoHaLinear, LoKrLinear

PUBLIC = [name for name in dir(peft) if not name.startswith("_") and not isinstance(getattr(peft, name), ModuleType)]
TUNERS = ("LoraModel", "LoHaModel", "LoKrModel")
MAKERS = [name for name in PUBLIC if isinstance(getattr(peft, name), type) and "Peft" in name and "Model" in name]


def routes(model, ids, n=1):
    w = torch.zeros(n)
    expected = model(ids, routing_weights=w).logits
    with model.disable_adapter():
        torch.testing.assert_close(expected, model(ids).logits)
    return isinstance(model.base_model, moelora.LoraModel)


@pytest.mark.parametrize("module", [moelora, moelora.peft], ids=["moelora", "moelora.peft"])
def test_every_public_name_of_peft_is_there(module):
    for name in PUBLIC:
        value = getattr(module, name)
        if name not in (*MAKERS, *TUNERS, "get_peft_model"):
            assert value is getattr(peft, name), name


def test_the_names_of_the_package_are_there():
    for name in ("MoELoraConfig", "LoraLayer", "Linear", "adopt", "release", "activate_all_experts", "get_peft_model"):
        assert getattr(moelora, name) is getattr(moelora.peft, name)
        assert name in dir(moelora)
        assert name in dir(moelora.peft)


def test_a_star_import_gives_what_pefts_gives_and_more():
    for module in ("moelora", "moelora.peft"):
        names = {}
        exec(f"from {module} import *", names)
        assert {*peft.__all__, "MoELoraConfig", "adopt"} <= names.keys()
        assert names["PeftModelForCausalLM"] is moelora.PeftModelForCausalLM
        assert ("show_config" in names) == (module == "moelora")


def test_an_unknown_name_is_an_attribute_error():
    for module in (moelora, moelora.peft, importlib.import_module("moelora.peft.tuners.lora")):
        with pytest.raises(AttributeError, match="has no attribute 'LoraFlower'"):
            _ = module.LoraFlower


def test_the_mirror_of_the_lora_module_has_the_routed_classes():
    from moelora.peft.tuners.lora import Embedding, Linear, LoraConfig, LoraLayer, LoraModel

    assert Linear is moelora.Linear
    assert Embedding is moelora.Embedding
    assert LoraModel is moelora.LoraModel
    assert LoraLayer is lora.LoraLayer
    assert LoraConfig is lora.LoraConfig
    from moelora.peft import tuners

    assert tuners.LoraModel is LoraModel
    assert tuners.IA3Model is peft.IA3Model


class TestModules:
    """Every module of PEFT is there under our name too, and runs once."""

    STOCK = [module.name for module in pkgutil.walk_packages(peft.__path__, "peft.")]
    ROUTED = {id(getattr(peft, name)): getattr(moelora, name) for name in ("get_peft_model", *TUNERS, *MAKERS)} | {
        id(lora.Linear): moelora.Linear,
        id(lora.Embedding): moelora.Embedding,
        id(loha.Linear): LoHaLinear,
        id(lokr.Linear): LoKrLinear,
    }

    @pytest.mark.parametrize("name", STOCK)
    def test_a_module_gives_what_pefts_gives(self, name):
        try:
            stock = importlib.import_module(name)
        except ImportError as error:  # of a package that is not installed
            with pytest.raises(type(error)):
                importlib.import_module(f"moelora.{name}")
            return
        ours = importlib.import_module(f"moelora.{name}")
        assert stock.__spec__.name == name
        assert sys.modules[name] is stock
        if ours is stock:
            assert not {id(value) for value in vars(stock).values()} & self.ROUTED.keys()
            return
        for key, value in vars(stock).items():
            if key.startswith("__"):
                continue
            if isinstance(value, ModuleType) and value.__name__.startswith("peft."):
                assert getattr(ours, key) is importlib.import_module(f"moelora.{value.__name__}"), key
            else:
                routed = self.ROUTED.get(id(value))
                assert getattr(ours, key) is (value if routed is None else routed), key

    @pytest.mark.parametrize("first", ["moelora.peft.utils.save_and_load", "moelora.peft.tuners.lora.layer"])
    def test_the_first_import_may_go_deep(self, first):
        code = f"import {first} as m, sys; import peft; print(m.__name__, {first[8:]!r} in sys.modules)"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        name = first[8:] if "utils" in first else first  # PEFT's own module where nothing in it is routed
        assert out.stdout.split() == [name, "True"]

    def test_imports_are_written_as_with_peft(self):
        import moelora.peft.tuners.lora as by_path
        from moelora.peft.auto import AutoPeftModelForCausalLM
        from moelora.peft.config import MoELoraConfig as Ours
        from moelora.peft.config import PeftConfigMixin
        from moelora.peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from moelora.peft.mapping_func import get_peft_model as make
        from moelora.peft.peft_model import PeftModel, PeftModelForCausalLM
        from moelora.peft.tuners import lora as by_name
        from moelora.peft.tuners.lora.layer import Embedding, Linear, LoraLayer
        from moelora.peft.tuners.lora.model import LoraModel
        from moelora.peft.utils import _get_submodules, save_and_load, set_peft_model_state_dict

        assert by_path is by_name
        assert (make, PeftModel, LoraModel, Linear) == (
            get_peft_model,
            moelora.PeftModel,
            moelora.LoraModel,
            moelora.Linear,
        )
        assert (PeftModelForCausalLM, AutoPeftModelForCausalLM) == (
            moelora.PeftModelForCausalLM,
            moelora.AutoPeftModelForCausalLM,
        )
        assert (Embedding, LoraLayer) == (moelora.Embedding, lora.LoraLayer)
        assert save_and_load is importlib.import_module("peft.utils.save_and_load")
        assert save_and_load.set_peft_model_state_dict is set_peft_model_state_dict is peft.set_peft_model_state_dict
        assert _get_submodules is peft.utils._get_submodules
        assert PEFT_TYPE_TO_TUNER_MAPPING is peft.PEFT_TYPE_TO_TUNER_MAPPING
        assert Ours is MoELoraConfig
        assert PeftConfigMixin is peft.config.PeftConfigMixin

    def test_a_star_import_of_a_module_without_all_gives_its_public_names(self):
        names = {}
        exec("from moelora.peft.mapping_func import *", names)
        assert names["get_peft_model"] is get_peft_model

    def test_what_peft_does_not_have_is_not_found(self):
        with pytest.raises(ModuleNotFoundError, match="moelora.peft.flowers"):
            importlib.import_module("moelora.peft.flowers")
        with pytest.raises(ModuleNotFoundError, match="moelora.peft.tuners.lora.flower"):
            importlib.import_module("moelora.peft.tuners.lora.flower")
        with pytest.raises(ImportError, match="cannot import name 'Rose' from 'moelora.peft.peft_model'"):
            exec("from moelora.peft.peft_model import Rose")

    def test_the_version_is_pefts(self):
        assert moelora.peft.__version__ == peft.__version__
        assert moelora.__version__ != peft.__version__


def test_importing_the_package_imports_neither_torch_nor_peft():
    code = (
        "import sys, moelora; moelora.__version__; dir(moelora); print({'torch', 'peft', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip() == "set()"


class TestGetPeftModel:
    def test_with_a_plain_lora_config_makes_an_adopted_model(self, make_base, ids):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(make_base("llama"), config)
        assert model.base_model.active_adapters == ["default"]
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert not model.base_model.has_router()
        assert routes(model.eval(), ids)

    @pytest.mark.parametrize("arguments", [{}, {"adapter_name": "default"}])
    def test_with_a_mixture_config_makes_experts_and_router(self, kind, make_base, ids, arguments):
        config = MoELoraConfig(num_experts=3, task_type="CAUSAL_LM", target_modules="all-linear")
        model = get_peft_model(make_base(kind), config, **arguments)
        names = ["expert_0", "expert_1", "expert_2"]
        assert list(model.peft_config) == model.base_model.active_adapters == names
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
        router = model.base_model.router
        assert isinstance(router, PerLayerRouter)
        assert router.expert_names == names
        assert (router.top_k, router.temperature, router.num_layers) == (2, 2.0, 3)
        assert model.base_model.moe_config is config
        assert model(ids).router_aux_loss >= 0

    def test_with_a_name_makes_that_expert_alone(self, make_base):
        config = MoELoraConfig(num_experts=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(make_base("llama"), config, adapter_name="expert_0")
        assert list(model.peft_config) == ["expert_0"]
        assert not model.base_model.has_router()
        model.add_adapter("expert_1", config)
        assert moelora.activate_all_experts(model) == ["expert_0", "expert_1"]

    def test_with_routing_off_makes_one_adapter(self, make_base):
        config = MoELoraConfig(use_moe_routing=False, target_modules=["q_proj"])
        model = get_peft_model(make_base("llama"), config)
        assert list(model.peft_config) == ["default"]
        assert not model.base_model.has_router()

    @pytest.mark.parametrize("kind_of_router", ["learned", "learned_with_maturity", "fixed"])
    def test_builds_the_router_that_is_named(self, make_base, kind_of_router):
        config = MoELoraConfig(router_type=kind_of_router, target_modules=["q_proj"])
        model = get_peft_model(make_base("llama"), config)
        assert isinstance(model.base_model.router, FixedRouter if kind_of_router == "fixed" else PerLayerRouter)

    def test_checks_the_width_of_the_router(self, make_base):
        get_peft_model(make_base("llama"), MoELoraConfig(router_hidden_size=32, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="router_hidden_size"):
            get_peft_model(make_base("llama"), MoELoraConfig(router_hidden_size=31, target_modules=["q_proj"]))

    def test_needs_decoder_layers_for_a_learned_router(self):
        net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        with pytest.raises(ValueError, match="needs a transformers model with one stack"):
            get_peft_model(net, MoELoraConfig(target_modules=["0"]))
        net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model = get_peft_model(net, MoELoraConfig(target_modules=["0"], router_type="fixed", init_lora_weights=False))
        assert model(torch.ones(2, 4)).shape == (2, 4)

    @pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["lm_head"]}])
    def test_refuses_modules_that_each_expert_would_have_for_itself(self, make_base, options):
        base = make_base("llama")
        with pytest.raises(ValueError, match="only one can be active: use task_type=None without modules_to_save"):
            get_peft_model(base, MoELoraConfig(target_modules=["q_proj"], **options))
        assert not any(isinstance(module, lora.LoraLayer) for module in base.modules())

    def test_gives_each_expert_a_config_of_its_own(self, make_base):
        model = get_peft_model(make_base("llama"), MoELoraConfig(target_modules=["q_proj"]))
        assert len({id(config) for config in model.peft_config.values()}) == 4

    def test_in_bfloat16_keeps_float32_adapters_and_router(self, make_base, ids):
        model = get_peft_model(
            make_base("llama").bfloat16(), MoELoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        out = model.train()(ids, labels=ids)
        out.loss.backward()
        assert out.logits.dtype is torch.bfloat16


class TestFaces:
    """Classes that stand for PEFT's: what they make is PEFT's own class, adopted."""

    @pytest.fixture
    def saved(self, make_lora, make_base, tmp_path):
        model = make_lora("llama", n=1)
        model.save_pretrained(tmp_path)
        base = make_base("llama")
        base.save_pretrained(tmp_path / "base")
        return tmp_path / "expert_0", tmp_path / "base"

    @pytest.mark.parametrize("name", MAKERS)
    def test_a_face_stands_for_its_class(self, name):
        face, stock = getattr(moelora, name), getattr(peft, name)
        assert issubclass(stock, face)
        assert issubclass(face, stock)
        assert face.__name__ == stock.__name__
        assert face.__doc__ == stock.__doc__
        assert face is getattr(moelora.peft, name)

    @pytest.mark.parametrize("name", ["PeftModel", "PeftModelForCausalLM"])
    def test_from_pretrained_adopts(self, make_base, make_lora, saved, ids, name):
        model = getattr(moelora, name).from_pretrained(make_base("llama"), saved[0])
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert isinstance(model, getattr(moelora, name))
        assert isinstance(make_lora("llama"), moelora.PeftModel)
        assert not isinstance(make_base("llama"), moelora.PeftModel)
        assert not isinstance(model, moelora.PeftModelForSeq2SeqLM)
        assert routes(model, ids)

    def test_the_constructor_adopts(self, make_base, ids):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = moelora.PeftModelForCausalLM(make_base("llama"), config, adapter_name="a")
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert routes(model.eval(), ids)

    def test_auto_classes_adopt(self, saved, ids, make_base):
        config = peft.PeftConfig.from_pretrained(saved[0])
        config.base_model_name_or_path = str(saved[1])
        config.save_pretrained(saved[0])
        model = moelora.AutoPeftModelForCausalLM.from_pretrained(saved[0])
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert routes(model, ids)

    def test_a_class_of_ones_own_stays_one(self, make_base, make_lora, ids):
        class Mine(moelora.PeftModelForCausalLM):
            def greet(self):
                return "hello"

        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = Mine(make_base("llama"), config, "a")
        assert isinstance(model, Mine)
        assert model.greet() == "hello"
        assert isinstance(model, moelora.PeftModel)
        assert not isinstance(make_lora("llama"), Mine)
        assert not issubclass(peft.PeftModel, Mine)
        assert routes(model.eval(), ids)

    def test_experts_loaded_one_after_another_route(self, make_base, make_lora, ids, weights, tmp_path):
        model = moelora.adopt(make_lora("llama"))
        model.save_pretrained(tmp_path)
        loaded = moelora.PeftModel.from_pretrained(make_base("llama"), tmp_path / "expert_0", adapter_name="expert_0")
        for name in ("expert_1", "expert_2"):
            loaded.load_adapter(tmp_path / name, adapter_name=name)
        loaded.base_model.set_adapter(["expert_0", "expert_1", "expert_2"])
        expected = model(ids, routing_weights=weights).logits
        assert torch.equal(loaded(ids, routing_weights=weights).logits, expected)


def test_the_config_of_an_expert_is_plain_lora_in_its_checkpoint(make_base, tmp_path, recwarn):
    model = get_peft_model(make_base("llama"), MoELoraConfig(num_experts=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(make_base("llama"), tmp_path / "expert_1")
    assert type(stock.peft_config["default"]) is peft.LoraConfig
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]
    assert MoELoraConfig.from_pretrained(tmp_path / "expert_1").num_experts == 2
