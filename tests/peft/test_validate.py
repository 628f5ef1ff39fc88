"""`moelora validate`: an intact checkpoint keeps every promise, and each promise can fail."""

import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch as st
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moelora
from moelora.cli import main
from moelora.nn.routers import EmbeddingRouter, FixedRouter, HiddenStateRouter, LastHiddenRouter
from moelora.peft import layers, logits, peft_model
from moelora.validate.comparison import difference, gradient_differences
from moelora.validate.cost import judge

EXPERTS = ["expert_0", "expert_1", "expert_2"]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=97, max_position_embeddings=64, **sizes)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_mixture(base_folder, folder, *, router=None, **options):
    torch.manual_seed(4)
    config = moelora.MoELoraConfig(
        **({"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "num_experts": 3} | options),
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
    )
    model = moelora.get_peft_model(LlamaForCausalLM.from_pretrained(base_folder), config)
    if router is not None:
        model.base_model.detach_router()
        model.base_model.attach_router(router)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "router" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def intact(base_folder, tmp_path_factory):
    return save_mixture(base_folder, tmp_path_factory.mktemp("mixture"))


def run(folder, tmp_path, *options):
    """Exit status and report of the command, without timings unless asked for."""
    out = tmp_path / "report.json"
    speed = [] if "--rounds" in options else ["--no-speed"]
    sizes = [] if "--tokens" in options else ["--tokens", "12"]
    status = main(["validate", "--checkpoint", str(folder), "--json", str(out), *speed, *sizes, *options])
    return status, json.loads(out.read_text())


@pytest.fixture
def judge_no_time(monkeypatch):
    """On a busy machine a step of these models may take long enough to be judged, and be late."""
    monkeypatch.setattr("moelora.validate.cost.SHORT", math.inf)


def failed(report):
    return {check["promise"]: check["note"] for check in report["checks"] if check["holds"] is False}


def test_an_intact_checkpoint_keeps_every_promise(intact, tmp_path, capsys, judge_no_time):
    status, report = run(intact, tmp_path, "--rounds", "2")
    assert status == 0 and report["holds"] and not failed(report)
    groups = [check["group"] for check in report["checks"]]
    assert {group: groups.count(group) for group in set(groups)} == {
        "outputs": 7,
        "gradients": 2,
        "cost": 3,
        "compatibility": 8,
    }
    judged = [c for c in report["checks"] if c["measured"] is not None and c["holds"] is not None]
    assert judged and all(0 <= c["measured"] <= c["allowed"] for c in judged)
    assert len(report["layers"]) == 2 * 3
    assert len(report["gradients"]["layer"]) == 2 * 3 * 2 * 3 + 1
    assert set(report["cost"]) == {"n_passes", "moelora", "one_lora"}
    assert report["machine"]["threads"] == torch.get_num_threads()
    text = capsys.readouterr().out
    for promise in ('mixture="logits" equals N passes of stock PEFT', "release() gives the stock classes back"):
        assert promise in text
    assert "random token ids, seed 0" in text
    assert text.rstrip().endswith("hold.")


@pytest.mark.parametrize(
    "router",
    [
        FixedRouter(EXPERTS, [1, 2, 5]),
        EmbeddingRouter(EXPERTS, 32, top_k=2),
        HiddenStateRouter(EXPERTS, 32, layer=1),
        LastHiddenRouter(EXPERTS, 32, top_k=2),
    ],
    ids=lambda router: type(router).__name__,
)
def test_the_router_of_a_checkpoint_is_run_whatever_it_reads(base_folder, tmp_path, router):
    folder = save_mixture(base_folder, tmp_path / "mixture", router=router)
    status, report = run(folder, tmp_path)
    assert status == 0
    notes = {check["promise"]: check["note"] for check in report["checks"]}
    assert notes["the same with the checkpoint's router"] == type(router).__name__


def test_layers_outside_the_decoder_are_compared_too(base_folder, tmp_path):
    targets = ["embed_tokens", "lm_head", "q_proj"]
    folder = save_mixture(base_folder, tmp_path / "mixture", target_modules=targets)
    status, report = run(folder, tmp_path)
    assert status == 0 and len(report["layers"]) == 2 + 2


def test_frozen_experts_are_compared_like_the_others(base_folder, tmp_path, judge_no_time):
    model = moelora.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base_folder), str(save_mixture(base_folder, tmp_path / "mixture"))
    )
    for name in EXPERTS:  # all: then nothing of the model trains
        model.base_model.freeze_expert(name)
    model.save_pretrained(str(tmp_path / "frozen"))
    assert json.loads((tmp_path / "frozen" / "moe_lora.json").read_text())["frozen"] == EXPERTS
    status, report = run(tmp_path / "frozen", tmp_path, "--rounds", "1")
    assert status == 0
    assert any("lora_A.expert_1" in name for name in report["gradients"]["layer"])
    assert set(report["cost"]) == {"n_passes", "moelora", "one_lora"}


def test_an_expert_that_is_not_activated_takes_no_part_but_its_files_do(base_folder, tmp_path):
    base = LlamaForCausalLM.from_pretrained(base_folder)
    model = moelora.PeftModel.from_pretrained(base, str(save_mixture(base_folder, tmp_path / "mixture")))
    model.base_model.add_expert("young")
    model.save_pretrained(str(tmp_path / "grown"))
    status, report = run(tmp_path / "grown", tmp_path)
    assert status == 0 and report["experts"] == [*EXPERTS, "young"] and set(report["one_hot"]) == set(EXPERTS)
    (tmp_path / "grown" / "young" / ADAPTER).unlink()
    status, report = run(tmp_path / "grown", tmp_path)
    assert status == 1 and f"young/{ADAPTER} is missing" in failed(report)["the files of every expert are whole"]


@pytest.mark.parametrize("n", [1, 2, 8])
def test_folders_of_stock_peft_are_a_mixture_of_experts_of_any_number_and_rank(base_folder, tmp_path, judge_no_time, n):
    torch.manual_seed(6)
    for e in range(n):
        config = LoraConfig(r=1 + e, target_modules=["q_proj", ["v_proj", "up_proj"][e % 2]], task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base_folder), config, adapter_name=f"expert_{e}")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(tmp_path / "plain"))
    status, report = run(tmp_path / "plain", tmp_path, "--rounds", "1")
    assert status == 0 and report["experts"] == [f"expert_{e}" for e in range(n)]


def test_layers_of_gpt2_are_compared(tmp_path):
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=10)).save_pretrained(
        tmp_path / "base"
    )
    config = moelora.MoELoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], num_experts=2)
    model = moelora.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(tmp_path / "mixture"))
    status, report = run(tmp_path / "mixture", tmp_path)
    assert status == 0 and len(report["layers"]) == 3 and report["batch"] == [2, 10]


def test_a_base_that_was_saved_in_bfloat16_is_compared_in_float32(base_folder, tmp_path):
    LlamaForCausalLM.from_pretrained(base_folder).bfloat16().save_pretrained(tmp_path / "base")
    status, report = run(save_mixture(tmp_path / "base", tmp_path / "mixture"), tmp_path)
    assert status == 0 and report["dtype"] == "float32" and report["model"] == str(tmp_path / "base")


def test_what_rounding_does_to_a_model_that_magnifies_it_is_allowed(base_folder, tmp_path):
    folder = save_mixture(base_folder, tmp_path / "mixture", lora_alpha=1000)
    status, report = run(folder, tmp_path)
    assert status == 0
    judged = {check["promise"]: check for check in report["checks"]}
    one_hot = judged["one-hot weights equal each adapter alone"]
    assert 1e-5 < one_hot["allowed"] <= 1e-3
    assert one_hot["allowed"] == pytest.approx(min(4 * report["noise"]["one_hot"], 1e-3))


def change(path, edit):
    tensors = st.load_file(path)
    edit(tensors)
    st.save_file(tensors, path, {"format": "pt"})


def drop_b(tensors):
    del tensors[next(name for name in tensors if "lora_B" in name)]


def put_nan(tensors):
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = math.nan


def cut(tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


def narrow_router(tensors):
    for name in tensors:
        if tensors[name].dim() == 2:
            tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        (f"expert_1/{ADAPTER}", drop_b, "^expert_1: .*lora_B"),
        (f"expert_2/{ADAPTER}", put_nan, "expert_2: .*lora_B"),
        (f"expert_0/{ADAPTER}", cut, "expert_0: .*(lora_A|size mismatch)"),
        ("router.safetensors", narrow_router, "router"),
    ],
    ids=["missing tensor", "NaN", "wrong shape", "router's columns"],
)
def test_a_damaged_checkpoint_fails_and_what_is_wrong_is_named(intact, tmp_path, capsys, file, edit, named):
    folder = shutil.copytree(intact, tmp_path / "mixture")
    change(folder / file, edit)
    status, report = run(folder, tmp_path)
    assert status == 1 and not report["holds"]
    assert re.search(named, " ".join(failed(report).values()))
    text = capsys.readouterr().out
    assert "FAILS" in text and "the checkpoint has to open first" in text


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-9])


def rank_as_text(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": "three"}))


@pytest.mark.parametrize(
    ("file", "damage", "promise", "named"),
    [
        (f"expert_1/{ADAPTER}", Path.unlink, "the files of every expert are whole", "expert_1: .* is missing"),
        (f"expert_1/{ADAPTER}", cut_short, "the files of every expert are whole", "expert_1: .* no whole safetensors"),
        ("expert_0/adapter_config.json", cut_short, "the files of every expert are whole", "expert_0: .* no JSON"),
        ("expert_2", shutil.rmtree, "the files of every expert are whole", "expert_2: .* is missing"),
        ("expert_0/adapter_config.json", rank_as_text, "every expert opens in stock PEFT.*", "expert_0: TypeError"),
        ("moe_lora.json", cut_short, "moelora reads what the folder says.*", "moe_lora.json is no JSON"),
        ("moe_lora.json", Path.unlink, "moelora reads what the folder says.*", "router.safetensors must have"),
        ("router.safetensors", Path.unlink, "moelora opens the checkpoint.*", "router.safetensors is missing"),
        ("router.safetensors", cut_short, "moelora opens the checkpoint.*", "bytes instead of"),
    ],
)
def test_every_damage_is_a_promise_that_fails(intact, tmp_path, file, damage, promise, named):
    folder = shutil.copytree(intact, tmp_path / "mixture")
    damage(folder / file)
    status, report = run(folder, tmp_path)
    assert status == 1 and report["skipped"].endswith("the checkpoint has to open first")
    (note,) = (note for name, note in failed(report).items() if re.fullmatch(promise, name))
    assert re.search(named, note)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_of_another_dtype_are_taken_as_stock_peft_takes_them(intact, tmp_path, dtype):
    folder = shutil.copytree(intact, tmp_path / "mixture")
    change(folder / "expert_2" / ADAPTER, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    assert run(folder, tmp_path)[0] == 0


def test_a_folder_of_an_unknown_version_fails(intact, tmp_path):
    folder = shutil.copytree(intact, tmp_path / "mixture")
    document = json.loads((folder / "moe_lora.json").read_text())
    (folder / "moe_lora.json").write_text(json.dumps(document | {"format_version": 99}))
    status, report = run(folder, tmp_path)
    assert status == 1 and "99" in " ".join(failed(report).values())


def test_experts_that_moelora_refuses_to_route_are_a_finding(base_folder, tmp_path):
    folder = save_mixture(base_folder, tmp_path / "mixture", use_dora=True)
    status, report = run(folder, tmp_path)
    assert status == 1 and "not plain LoRA" in failed(report)["can be computed"]


# Results that are wrong on purpose.


def a_little_more(monkeypatch):
    true = layers.routed_lora
    monkeypatch.setattr(layers, "routed_lora", lambda *args, **kwargs: true(*args, **kwargs) * 1.001)


def half_the_gradient_of_b(monkeypatch):
    true = layers.routed_lora

    def wrong(x, lora_A, lora_B, *args, **kwargs):
        return true(x, lora_A, [b / 2 + (b / 2).detach() for b in lora_B], *args, **kwargs)

    monkeypatch.setattr(layers, "routed_lora", wrong)


def no_gradient_of_the_weights(monkeypatch):
    true = layers.routed_lora

    def wrong(x, lora_A, lora_B, weights, *args, **kwargs):
        return true(x, lora_A, lora_B, weights.detach(), *args, **kwargs)

    monkeypatch.setattr(layers, "routed_lora", wrong)


def experts_in_another_order(monkeypatch):
    true = layers.routed_lora

    def wrong(x, lora_A, lora_B, weights, *args, **kwargs):
        return true(x, lora_A, lora_B, weights.flip(-1), *args, **kwargs)

    monkeypatch.setattr(layers, "routed_lora", wrong)


def logits_not_mixed(monkeypatch):
    true = logits.mix

    def wrong(*args):
        output = true(*args)
        output.logits = output.logits + 0.01
        return output

    monkeypatch.setattr(logits, "mix", wrong)


def not_quite_stock(monkeypatch):
    true = layers.Routed.forward
    monkeypatch.setattr(layers.Routed, "forward", lambda *args, **kwargs: true(*args, **kwargs) * (1 + 3e-7))


def never_released(monkeypatch):
    monkeypatch.setattr(moelora, "release", lambda model: model, raising=False)


def saved_wrongly(monkeypatch):
    true = peft_model.RoutedPeftModel.save_pretrained

    def wrong(self, folder, *args, **kwargs):
        true(self, folder, *args, **kwargs)
        change(f"{folder}/expert_1/{ADAPTER}", lambda tensors: next(iter(tensors.values())).zero_())

    monkeypatch.setattr(peft_model.RoutedPeftModel, "save_pretrained", wrong)


ONE_PASS = {
    "one pass equals a loop over the adapters in each layer",
    "and so does every routed layer",
    "the same with the checkpoint's router",
}
ONE_HOT = {
    "one-hot weights equal each adapter alone",
    "an expert opened alone in stock PEFT has the logits of its one-hot weights",
    'mixture="logits" equals N passes of stock PEFT',
}
BACKWARD = {
    "one pass: of every A, B and weight, as through the loop",
    'mixture="logits": the same as through N passes',
}


@pytest.mark.parametrize(
    ("fault", "promises"),
    [
        (a_little_more, ONE_PASS | ONE_HOT | BACKWARD),
        (experts_in_another_order, ONE_PASS | ONE_HOT | BACKWARD),
        (half_the_gradient_of_b, BACKWARD),
        (no_gradient_of_the_weights, {"one pass: of every A, B and weight, as through the loop"}),
        (logits_not_mixed, {'mixture="logits" equals N passes of stock PEFT'}),
        (not_quite_stock, {"without weights the logits are stock PEFT's, bit for bit"}),
        (never_released, {"release() gives the stock classes back"}),
        (saved_wrongly, {"saved and loaded again, every tensor is the same"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_results_fail_just_the_promises_they_break(intact, tmp_path, monkeypatch, fault, promises):
    fault(monkeypatch)
    status, report = run(intact, tmp_path)
    assert status == 1 and set(failed(report)) == promises


def figures(old, new, ours, theirs):
    def way(median, peak):
        return {"train_seconds": (median,) * 3, "forward_seconds": (median,) * 3, "train_peak_bytes": peak}

    return {"n_passes": way(old, ours), "moelora": way(new, ours), "one_lora": way(new, theirs)}


@pytest.mark.parametrize(
    ("measured", "speed", "memory"),
    [
        (figures(1.0, 0.5, 110 << 20, 100 << 20), True, True),
        (figures(1.0, 0.51, 111 << 20, 100 << 20), False, False),
        (figures(0.01, 0.015, 3 << 20, 1 << 20), None, None),
        (figures(1.0, 0.2, None, None), True, None),
        (figures(1.0, 0.2, 3 << 20, 0), True, None),
    ],
    ids=["at the limit", "beyond it", "too small", "no memory", "nothing"],
)
def test_time_and_memory_are_judged_by_what_is_promised_for_four_experts(measured, speed, memory):
    train, forward, peak = judge(measured, 4)
    assert (train.holds, forward.holds, peak.holds) == (speed, None, memory)
    assert train.allowed == 0.5
    assert all("not judged" in check.note for check in (train, peak) if check.holds is None)


def test_nan_and_another_shape_are_an_infinite_difference():
    one = torch.ones(2, 3)
    assert difference("", one * math.nan, one).relative == math.inf
    assert difference("", one, one * math.nan).relative == math.inf
    assert difference("", one, torch.ones(3, 2)).relative == math.inf
    assert difference("", one, torch.zeros(2, 3)).relative == math.inf
    assert difference("", torch.zeros(0), torch.zeros(0)).relative == 0
    other = one.clone()
    other[1, 2] = 1.5
    found = difference("", other, one)
    assert found.where == (1, 2) and found.relative == pytest.approx(0.5)


def test_a_gradient_that_cancels_is_measured_by_the_largest_of_all():
    got = {"a": torch.tensor([1000.0]), "b": torch.tensor([1e-6])}
    expected = {"a": torch.tensor([1000.0]), "b": torch.tensor([0.0])}
    assert gradient_differences(got, expected)[1].relative == pytest.approx(1e-6)


def test_a_checkpoint_that_was_never_trained_is_said_to_prove_little(intact, tmp_path, capsys):
    folder = shutil.copytree(intact, tmp_path / "mixture")
    for name in EXPERTS:
        change(folder / name / ADAPTER, lambda tensors: [t.zero_() for key, t in tensors.items() if "lora_B" in key])
    status, _ = run(folder, tmp_path)
    assert status == 0 and "every B of the checkpoint is zero" in capsys.readouterr().out


def test_the_script_for_dylora_is_the_same_command(intact, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples/dylora/validate_moe_modifications.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--checkpoint", str(intact), "--no-speed", "--tokens", "5"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert "promises that were judged hold" in capsys.readouterr().out


# Data.


def test_json_lines_of_unequal_length_are_padded_and_masked(intact, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": list(range(3, 3 + n))}) + "\n" for n in (9, 4, 30)))
    status, report = run(intact, tmp_path, "--data", str(data), "--batch", "3")
    assert status == 0 and report["batch"] == [3, 12]
    assert str(data) in report["data"]


def test_a_text_is_cut_by_the_tokenizer_of_the_model(intact, base_folder, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(90)}
    tokenizer = Tokenizer(models.WordLevel(words | {"?": 90}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = shutil.copytree(base_folder, tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in range(50)))
    status, report = run(intact, tmp_path, "--model", str(model), "--data", str(tmp_path / "text.txt"))
    assert status == 0 and report["batch"] == [2, 12] and report["model"] == str(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"input_ids": [1, 97]}', "token ids outside [0, 97), up to 97"),
        ('{"input_ids": "text"}', "must be a list of integers"),
        ('{"text": "a"}', 'no object with "input_ids"'),
        ("", "holds no tokens"),
    ],
)
def test_data_that_do_not_fit_are_a_wrong_argument(intact, tmp_path, capsys, content, message):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        run(intact, tmp_path, "--data", str(data))
    error = capsys.readouterr().err
    assert "argument --data" in error and message in error


def test_a_text_without_a_tokenizer_is_a_wrong_argument(intact, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(SystemExit, match="2"):
        run(intact, tmp_path, "--data", str(tmp_path / "text.txt"))
    assert "pass JSON lines with input_ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere"], "argument --checkpoint: nowhere is not a folder"),
        (["--checkpoint", "."], "neither moe_lora.json nor folders expert_<int>"),
        (["--batch", "0"], "argument --batch: must be at least 1, got 0"),
        (["--seed", "-1"], "argument --seed: must lie in [0, 2**32), got -1"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
        (["--json", "."], "argument --json: . is a folder"),
        (["--json", "nowhere/report.json"], "argument --json: nowhere is not a folder"),
        (["--model", "nowhere"], "argument --model: can't open 'nowhere'"),
    ],
)
def test_wrong_arguments_are_named(intact, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["validate", "--checkpoint", str(intact), "--no-speed", *options])
    assert message in capsys.readouterr().err


def test_a_base_model_that_is_gone_asks_for_model(intact, tmp_path, capsys):
    folder = shutil.copytree(intact, tmp_path / "mixture")
    for name in EXPERTS:
        path = folder / name / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path)
    assert "pass the folder of its base model with --model" in capsys.readouterr().err


def test_a_base_model_that_is_quantised_or_broken_is_a_wrong_argument(intact, base_folder, tmp_path, capsys):
    quantised = shutil.copytree(base_folder, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    broken = shutil.copytree(base_folder, tmp_path / "broken")
    cut_short(broken / "model.safetensors")
    for model, reason in ((quantised, "it is quantised"), (broken, "SafetensorError")):
        with pytest.raises(SystemExit, match="2"):
            run(intact, tmp_path, "--model", str(model))
        error = capsys.readouterr().err
        assert f"argument --model: can't open '{model}'" in error and reason in error


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_experts_of_another_kind_than_lora_are_a_wrong_argument(base_folder, tmp_path, capsys, config):
    options = config(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = moelora.get_peft_model(LlamaForCausalLM.from_pretrained(base_folder), options, adapter_name="a")
    model.add_adapter("b", options)
    model.save_pretrained(str(tmp_path / "mixture"))
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "mixture", tmp_path)
    error = capsys.readouterr().err
    assert f"experts of type {options.peft_type.value}" in error and "is for LORA alone" in error


def test_a_checkpoint_without_an_active_expert_is_a_wrong_argument(intact, tmp_path, capsys):
    folder = shutil.copytree(intact, tmp_path / "mixture")
    document = json.loads((folder / "moe_lora.json").read_text())
    (folder / "moe_lora.json").write_text(json.dumps(document | {"active": []}))
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path)
    assert "is active, so nothing is mixed" in capsys.readouterr().err
