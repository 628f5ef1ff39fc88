"""`moelora demo`, with few steps on little text: its results agree with each other, and its files can be read."""

import copy
import json
import math
import subprocess
import sys

import peft
import pytest
from safetensors.torch import load_file

import moelora
from moelora.cli import main
from moelora.demo import measure, text
from moelora.demo.run import LAYERS, WIDTH, Settings, mixture_config, run
from moelora.demo.training import make_llama
from moelora.report.plots import draw
from moelora.report.table import as_text, sections, verdict

EXPERTS, STEPS = 3, 4
DOMAINS = ["Python source", "English prose", "C headers", "JSON and CSV"]


@pytest.fixture(scope="module", autouse=True)
def little_to_do():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "DOMAIN_BYTES", 50_000)
        patch.setattr(measure, "ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of one small demo, made by the command."""
    out = tmp_path_factory.mktemp("demo") / "made" / "by-it"
    assert main(["demo", "--out", str(out), "--experts", str(EXPERTS), "--steps", str(STEPS), "--seed", "5"]) == 0
    return out


@pytest.fixture(scope="module")
def report(demo):
    return json.loads((demo / "report.json").read_text())


def test_the_folder_holds_report_pictures_and_checkpoint(demo):
    assert {path.name for path in demo.iterdir()} == {"report.json", "table.png", "routing.png", "base", "checkpoint"}
    for picture in ("table.png", "routing.png"):
        assert (demo / picture).read_bytes().startswith(b"\x89PNG")


def test_its_checkpoint_keeps_every_promise(demo, capsys):
    assert main(["validate", "--checkpoint", str(demo / "checkpoint"), "--no-speed"]) == 0
    assert f"Base model {demo / 'base'} " in capsys.readouterr().out


def test_perplexities_are_finite_and_their_mean_is_geometric(report):
    assert set(report["perplexity"]) == {"base", "lora_r", "lora_nr", "mixture"}
    for values in report["perplexity"].values():
        assert list(values) == [*DOMAINS, "all"]
        assert all(1 < value < text.VOCAB_SIZE for value in values.values())
        assert values["all"] == pytest.approx(math.prod(values[name] for name in DOMAINS) ** 0.25)


def test_one_large_lora_is_as_large_as_the_experts_and_the_mixture_adds_its_gates(report):
    trained = report["trained_parameters"]
    gates = LAYERS * EXPERTS * (WIDTH + 1)
    assert trained["base"] == 0
    assert trained["lora_nr"] == EXPERTS * trained["lora_r"] == trained["mixture"] - gates


def test_routing_shares_sum_to_one_in_every_layer(report):
    assert list(report["routing_shares"]) == DOMAINS
    for layers in report["routing_shares"].values():
        assert len(layers) == LAYERS
        for shares in layers:
            assert len(shares) == EXPERTS
            assert min(shares) >= 0
            assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_results_are_those_of_the_older_ways(report):
    assert report["differences"]["forward"]["relative"] < 1e-5
    assert report["differences"]["gradients"]["relative"] < 2e-4
    assert report["differences"]["logits"]["relative"] < 1e-5


def test_every_way_has_its_cost_and_one_pass_keeps_less_than_the_older_ways(report):
    cost = report["cost"]
    assert set(cost) == {"n_passes", "two_passes", "one_lora", "moelora"}
    assert all(value > 0 for way in cost.values() for value in way.values())
    assert cost["moelora"]["train_mib"] < min(cost["two_passes"]["train_mib"], cost["n_passes"]["train_mib"])


def test_experts_open_with_stock_peft_and_the_router_with_safetensors(demo):
    base = make_llama(WIDTH, LAYERS)
    stock = peft.PeftModel.from_pretrained(base, demo / "checkpoint" / "expert_0", adapter_name="expert_0")
    for name in ("expert_1", "expert_2"):
        stock.load_adapter(demo / "checkpoint" / name, adapter_name=name)
    assert type(stock.peft_config["expert_2"]) is peft.LoraConfig
    for expert in ("expert_0", "expert_1", "expert_2"):
        trained = [p for name, p in stock.named_parameters() if f"lora_B.{expert}." in name]
        assert len(trained) == 7 * LAYERS
        assert any(p.any() for p in trained)  # not all: in few steps a layer may send an expert no token

    settings = Settings(demo, EXPERTS, 2, STEPS, 5, "cpu")
    routed = moelora.get_peft_model(make_llama(WIDTH, LAYERS), mixture_config(settings))
    routed.base_model.router.load_state_dict(load_file(demo / "checkpoint" / "router.safetensors"))


def test_the_same_seed_gives_the_same_result(demo, report, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "cost", lambda *_: report["cost"])
    again = run(Settings(tmp_path, EXPERTS, 2, STEPS, 5, "cpu"))
    assert json.loads(json.dumps(again)) == report


def test_the_table_shows_every_figure_and_the_pictures_are_drawn_from_the_report_alone(report, tmp_path):
    printed = as_text(report)
    assert all(cell in printed for table in sections(report) for row in table.rows for cell in row)
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert [path.name for path in draw(tmp_path / "report.json")] == ["table.png", "routing.png"]


def test_the_verdict_names_the_winner(report):
    report = copy.deepcopy(report)
    report["perplexity"]["lora_nr"]["all"], report["perplexity"]["mixture"]["all"] = 5.0, 4.9
    assert verdict(report) == "The mixture beats one LoRA of rank 12: its perplexity is 2.00 % lower."
    report["perplexity"]["mixture"]["all"] = 5.1
    assert verdict(report) == "The mixture does not beat one LoRA of rank 12: its perplexity is 2.00 % higher."


def test_no_text_is_both_trained_on_and_held_out():
    for domain in text.load_domains():
        pieces = [set(map(bytes, split.reshape(-1, text.PIECE))) for split in domain[1:]]
        assert all(pieces)
        assert not pieces[0] & pieces[2]
        assert not pieces[1] & pieces[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--experts", "1"], "--experts: must be at least 2, got 1"),
        (["--experts", "many"], "--experts: invalid int value: 'many'"),
        (["--top-k", "5"], "--top-k: must lie in [1, 4], got 5"),
        (["--top-k", "0"], "--top-k: must lie in [1, 4], got 0"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--seed", "-1"], "--seed: must lie in [0, 2**32), got -1"),
        (["--device", "abacus"], "--device: torch can't use 'abacus'"),
        (["--device", "meta"], "--device: must be cpu, cuda or cuda:N, got 'meta'"),
        (["--depth", "3"], "unrecognized arguments: --depth 3"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no report.json of an earlier demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["base", "checkpoint"])
def test_a_file_where_a_folder_goes_is_left_alone(tmp_path, capsys, name):
    for file in ("report.json", name):
        (tmp_path / file).write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"{tmp_path / name} is not a folder" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "{}", name: "{}"}


@pytest.mark.parametrize("missing", ["torch", "peft", "transformers", "tqdm"])
def test_without_the_hf_extra_the_command_says_what_to_install(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; from moelora.cli import main; sys.exit(main(['demo']))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith('is not installed: pip install "moelora[hf]"\n')
    assert "Traceback" not in ended.stderr


def test_without_matplotlib_there_is_a_message_and_no_pictures(report, tmp_path, monkeypatch, capsys):
    def write_only_the_report(settings):
        settings.out.mkdir()
        (settings.out / "report.json").write_text(json.dumps(report))
        return report

    monkeypatch.setattr("moelora.demo.run.run", write_only_the_report)
    monkeypatch.delitem(sys.modules, "moelora.report.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    assert 'pip install "moelora[plots]"' in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_the_module_runs_as_the_command():
    ended = subprocess.run([sys.executable, "-m", "moelora", "demo", "--help"], capture_output=True, text=True)
    assert ended.returncode == 0
    for option in ("--out", "--experts", "--top-k", "--steps", "--seed", "--device"):
        assert option in ended.stdout
