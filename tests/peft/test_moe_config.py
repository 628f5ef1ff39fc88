"""`MoELoraConfig`: its fields, what it refuses, what it writes."""

import json

import numpy as np
import peft
import pytest

from moelora import MoELoraConfig
from moelora.peft.config import mixture_fields


def test_it_is_a_lora_config_with_the_defaults_of_the_design():
    config = MoELoraConfig()
    assert isinstance(config, peft.LoraConfig)
    assert config.peft_type == "LORA"
    assert {f.name: getattr(config, f.name) for f in mixture_fields()} == {
        "use_moe_routing": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "router_hidden_size": None,
        "router_aux_loss_coef": 0.01,
        "router_temperature": 2.0,
        "router_type": "learned_with_maturity",
        "expert_capacity_factor": 1.25,
        "expert_dropout": 0.0,
        "load_balance_loss_type": "aux_loss",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 1}, "num_experts must be at least 2, got 1"),
        ({"num_experts": 0}, "num_experts must be at least 2"),
        ({"top_k_experts": 0}, r"top_k_experts must lie in \[1, 4\], got 0"),
        ({"top_k_experts": 5}, r"top_k_experts must lie in \[1, 4\], got 5"),
        ({"router_hidden_size": 0}, "router_hidden_size must be positive"),
        ({"router_temperature": 0.0}, "router_temperature must be positive"),
        ({"router_temperature": -1.0}, "router_temperature must be positive"),
        ({"router_temperature": float("nan")}, "router_temperature must be positive"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef must not be negative"),
        ({"expert_capacity_factor": 0.0}, "expert_capacity_factor must be positive"),
        ({"expert_dropout": 1.0}, r"expert_dropout must lie in \[0, 1\)"),
        ({"expert_dropout": -0.1}, r"expert_dropout must lie in \[0, 1\)"),
        ({"router_type": "random"}, "router_type must be one of"),
        ({"load_balance_loss_type": "mse"}, "load_balance_loss_type must be one of"),
    ],
)
def test_a_field_outside_its_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MoELoraConfig(**values)


@pytest.mark.parametrize("name", ["num_experts", "top_k_experts"])
def test_a_count_must_be_an_integer(name):
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        MoELoraConfig(**{name: 2.5})


@pytest.mark.parametrize(
    "name", ["router_temperature", "router_aux_loss_coef", "expert_capacity_factor", "expert_dropout"]
)
def test_a_number_must_be_real_and_finite(name):
    with pytest.raises(TypeError, match=f"{name} must be a real number, got '1'"):
        MoELoraConfig(**{name: "1"})
    with pytest.raises(ValueError, match=f"{name} must be finite, got inf"):
        MoELoraConfig(**{name: float("inf")})


def test_the_width_of_the_router_must_be_an_integer():
    with pytest.raises(TypeError, match="router_hidden_size must be an int, got '64'"):
        MoELoraConfig(router_hidden_size="64")


@pytest.mark.parametrize(
    "values",
    [
        {"top_k_experts": 1},
        {"num_experts": 2, "top_k_experts": 2},
        {"router_aux_loss_coef": 0.0},
        {"expert_dropout": 0.999},
        {"router_type": "fixed"},
        {"router_type": "learned"},
        {"load_balance_loss_type": "switch"},
        {"load_balance_loss_type": "z_loss"},
    ],
)
def test_the_edges_are_taken(values):
    config = MoELoraConfig(**values)
    assert all(getattr(config, name) == value for name, value in values.items())


def test_nothing_is_checked_while_routing_is_off_but_ignored_fields_are_warned_of():
    with pytest.warns(UserWarning, match="num_experts, router_temperature will be ignored"):
        MoELoraConfig(use_moe_routing=False, num_experts=1, router_temperature=-1.0)


def test_a_config_with_routing_off_and_nothing_else_is_silent(recwarn):
    MoELoraConfig(use_moe_routing=False)
    assert not [w for w in recwarn if "ignored" in str(w.message)]


def test_to_dict_carries_all_fields():
    values = MoELoraConfig(r=5, num_experts=7, expert_dropout=0.25).to_dict()
    assert values["r"] == 5
    assert values["num_experts"] == 7
    assert values["expert_dropout"] == 0.25
    assert {f.name for f in mixture_fields()} <= values.keys()


def test_what_it_writes_opens_in_stock_peft_without_a_warning(tmp_path, recwarn):
    MoELoraConfig(r=5, target_modules=["q_proj"], num_experts=7).save_pretrained(tmp_path)
    stock = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(stock) is peft.LoraConfig
    assert stock.r == 5
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {f.name for f in mixture_fields()} & written.keys()
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]


def test_it_comes_back_with_every_field(tmp_path):
    config = MoELoraConfig(
        r=5,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 9},
        task_type="CAUSAL_LM",
        num_experts=7,
        top_k_experts=3,
        router_hidden_size=64,
        router_aux_loss_coef=0.5,
        router_temperature=0.7,
        router_type="learned",
        expert_capacity_factor=2.5,
        expert_dropout=0.25,
        load_balance_loss_type="switch",
    )
    config.save_pretrained(tmp_path)
    assert MoELoraConfig.from_pretrained(tmp_path) == config
    config.save_pretrained(tmp_path / "inner")
    assert MoELoraConfig.from_pretrained(str(tmp_path), subfolder="inner") == config


def test_a_plain_lora_folder_gets_the_defaults(tmp_path):
    peft.LoraConfig(r=3).save_pretrained(tmp_path)
    config = MoELoraConfig.from_pretrained(tmp_path)
    assert config.r == 3
    assert config.num_experts == 4


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format_version": 99, "config": {}}, "has format version 99, expected 1"),
        ({"config": {}}, "has format version None"),
        ({"format_version": 1, "config": {"num_experts": 4, "shape": 2}}, r"unknown fields \['shape'\]"),
        ({"format_version": 1, "config": {"num_experts": 1}}, "num_experts must be at least 2"),
    ],
)
def test_a_file_it_does_not_understand_is_refused(tmp_path, document, message):
    MoELoraConfig().save_pretrained(tmp_path)
    (tmp_path / "moe_lora.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        MoELoraConfig.from_pretrained(tmp_path)


def test_a_missing_folder_and_another_method_are_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json"):
        MoELoraConfig.from_pretrained(tmp_path)
    peft.IA3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a IA3Config"):
        MoELoraConfig.from_pretrained(tmp_path)


def test_numbers_of_numpy_are_saved(tmp_path):
    config = MoELoraConfig(router_temperature=np.float32(1.5), expert_dropout=np.float16(0.25))
    config.save_pretrained(tmp_path)
    again = MoELoraConfig.from_pretrained(tmp_path)
    assert (again.router_temperature, again.expert_dropout) == (1.5, 0.25)
