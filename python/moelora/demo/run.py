"""The course of `moelora demo`: train, compare, measure, write."""

import copy
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn

import moelora
from moelora import MoELoraConfig
from moelora.demo import measure
from moelora.demo.baselines import add_experts, router_weights
from moelora.demo.text import VOCAB_SIZE, Domain, load_domains
from moelora.demo.training import (
    TARGETS,
    batches,
    held_out_windows,
    make_llama,
    perplexity,
    progress_bar,
    train,
)
from moelora.report.machine import machine

LAYERS = 4
WIDTH = 64  # of the model that is trained
COST_WIDTH = 256  # of the model whose cost is measured
COST_BATCH = (2, 256)
RANK = 4
SCALING = 4  # of every adapter: lora_alpha = SCALING * r
LEARNING_RATE = 1e-2
ROUTER_LEARNING_RATE = 3e-4  # a router as fast as the adapters keeps moving tokens from expert to expert
BASE_LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Settings:
    """Options of the demo; see ``moelora demo --help``."""

    out: Path
    experts: int
    top_k: int
    steps: int
    seed: int
    device: str


def device_error(name: str) -> str | None:
    """What is wrong with the name of a device, if anything is."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            return f"must be cpu, cuda or cuda:N, got {name!r}"
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"torch can't use {name!r}: {str(error).splitlines()[0]}"
    return None


def run(settings: Settings) -> dict[str, Any]:
    """Run the demo and write its folder, except for the pictures.

    Parameters
    ----------
    settings : Settings
        Checked already. ``settings.out`` is made if need be; files of an earlier run are replaced.

    Returns
    -------
    dict
        What ``report.json`` holds.
    """
    # PEFT reads a property that transformers is about to rename; neither is the reader's business here.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    device = torch.device(settings.device)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    domains = load_domains()

    base: Any = make_llama(WIDTH, LAYERS)
    base.to(device)
    train(base, batches(domains, "base", settings.seed, device), 2 * settings.steps, BASE_LEARNING_RATE, "base model")
    base.requires_grad_(False)
    save(base, settings.out / "base")
    base.name_or_path = str((settings.out / "base").resolve())  # what adapters name as theirs
    mixture = moelora.get_peft_model(copy.deepcopy(base), mixture_config(settings))
    models: dict[str, nn.Module] = {
        "base": base,
        "lora_r": peft.get_peft_model(copy.deepcopy(base), lora_config(RANK)),
        "lora_nr": peft.get_peft_model(copy.deepcopy(base), lora_config(settings.experts * RANK)),
        "mixture": mixture,
    }
    titles = {
        "lora_r": f"one LoRA of rank {RANK}",
        "lora_nr": f"one LoRA of rank {settings.experts * RANK}",
        "mixture": f"{settings.experts} experts of rank {RANK} and router",
    }
    for name, title in titles.items():
        data = batches(domains, "train", settings.seed, device)  # the same batches for each
        train(models[name], data, settings.steps, LEARNING_RATE, title, ROUTER_LEARNING_RATE)

    with progress_bar(range(4), "comparing", "part") as progress:
        perplexities = {name: perplexity(model, domains, device) for name, model in models.items()}
        progress.update()
        shares = routing_shares(mixture, domains, device)
        progress.update()
        folder = settings.out / "checkpoint"
        save(mixture, folder)
        batch = torch.cat([held_out_windows(domain, device)[:2] for domain in domains])
        differences = measure.differences(open_with_stock_peft(copy.deepcopy(base), folder), mixture, batch)
        progress.update()
        cost_base: Any = make_llama(COST_WIDTH, LAYERS).requires_grad_(False)
        cost_base.to(device)
        cost_batch = torch.randint(VOCAB_SIZE, COST_BATCH, device=device)
        costs = measure.cost(cost_ways(cost_base, settings), cost_batch)
        progress.update()

    report = {
        "format": 1,
        "settings": {
            "experts": settings.experts,
            "top_k": settings.top_k,
            "steps": settings.steps,
            "seed": settings.seed,
            "device": settings.device,
            "rank": RANK,
            "scaling": SCALING,
            "learning_rate": LEARNING_RATE,
            "router_learning_rate": ROUTER_LEARNING_RATE,
            "batch": list(next(data).shape),
            "base_parameters": count(base.parameters()),
            "cost_parameters": count(cost_base.parameters()),
            "cost_batch": list(COST_BATCH),
        },
        "machine": machine(device),
        "trained_parameters": {name: count(trained(model)) for name, model in models.items()},
        "perplexity": perplexities,
        "routing_shares": shares,
        "cost": costs,
        "differences": differences,
    }
    (settings.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def lora_config(rank: int) -> LoraConfig:
    """A stock LoRA on all linear layers."""
    return LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=list(TARGETS))


def mixture_config(settings: Settings) -> MoELoraConfig:
    """Experts of rank `RANK` and the default router, which may send any share of the tokens to an expert."""
    return MoELoraConfig(
        r=RANK,
        lora_alpha=SCALING * RANK,
        target_modules=list(TARGETS),
        num_experts=settings.experts,
        top_k_experts=settings.top_k,
        expert_capacity_factor=settings.experts / settings.top_k,
    )


@torch.no_grad()
def routing_shares(mixture: PeftModel, domains: Sequence[Domain], device: torch.device) -> dict[str, list[list[float]]]:
    """The weight that each expert has on a domain's held-out text, on average: for each domain [L, N]."""
    mixture.eval()
    router: Any = mixture.base_model.router
    shares = {}
    for domain in domains:
        parts = held_out_windows(domain, device).split(32)
        totals = torch.zeros(())
        for rows in parts:
            states = mixture(input_ids=rows, output_hidden_states=True, use_cache=False).hidden_states
            totals = totals + router_weights(router, states).sum((0, 1)).cpu()
        shares[domain.name] = (totals / sum(rows.numel() for rows in parts)).tolist()
    return shares


def save(model: Any, folder: Path) -> None:
    """Write a model as it does, of a mixture one folder for each expert, and the router beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))


def open_with_stock_peft(base: nn.Module, folder: Path) -> PeftModel:
    """The experts of a checkpoint as trainable, active adapters of a stock `peft.PeftModel` over `base`."""
    names = sorted((path.name for path in folder.glob("expert_*")), key=lambda name: int(name.removeprefix("expert_")))
    model = PeftModel.from_pretrained(base, str(folder / names[0]), adapter_name=names[0], is_trainable=True)
    for name in names[1:]:
        model.load_adapter(str(folder / name), adapter_name=name, is_trainable=True)
    tuner: Any = model.base_model
    tuner.set_adapter(names)
    return model


def cost_ways(base: nn.Module, settings: Settings) -> dict[str, measure.Way]:
    """The models whose cost is compared, over copies of one base."""
    names = [f"expert_{i}" for i in range(settings.experts)]
    stock = peft.get_peft_model(copy.deepcopy(base), lora_config(RANK), adapter_name=names[0])
    add_experts(stock, names)
    return measure.ways(
        single=peft.get_peft_model(copy.deepcopy(base), lora_config(RANK)),
        stock=stock,
        looped=copy.deepcopy(stock),
        mixture=moelora.get_peft_model(copy.deepcopy(base), mixture_config(settings)),
    )


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a model trains."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in parameters)
