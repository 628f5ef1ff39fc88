"""The demo's language model, its batches, its training loop and its perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from moelora.demo.text import VOCAB_SIZE, Domain, windows

LENGTH = 128  # tokens of a sequence
PER_DOMAIN = 2  # sequences of each domain in a batch
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_llama(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama over bytes with random weights from torch's generator."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(
    domains: Sequence[Domain], split: str, seed: int, device: torch.device, per_domain: int = PER_DOMAIN
) -> Iterator[Tensor]:
    """Endless batches [len(domains) * per_domain, LENGTH] of token ids, each with all domains in random order."""
    random = np.random.default_rng(seed)
    while True:
        rows = []
        for domain in domains:
            stream = getattr(domain, split)
            rows.append(windows(stream, random.integers(0, len(stream) - LENGTH, per_domain), LENGTH))
        yield torch.from_numpy(random.permutation(np.concatenate(rows))).to(device)


class Training:
    """AdamW without weight decay, after a short warm-up on a cosine to zero; the adapters' gradient is clipped.

    Parameters
    ----------
    adapters, router : sequence of Parameter
        `router` may be empty.
    steps : int
        How many there will be.
    learning_rate, router_learning_rate : float
        The highest value of each.
    """

    def __init__(
        self,
        adapters: Sequence[nn.Parameter],
        router: Sequence[nn.Parameter],
        steps: int,
        learning_rate: float,
        router_learning_rate: float,
    ) -> None:
        self.adapters = adapters
        groups = [{"params": adapters, "lr": learning_rate}, {"params": router, "lr": router_learning_rate}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        warm_up = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )

    def step(self, loss: Tensor) -> None:
        """Run the backward of a batch's loss, and take a step."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.adapters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def train(
    model: nn.Module,
    data: Iterator[Tensor],
    steps: int,
    learning_rate: float,
    title: str,
    router_learning_rate: float = 0.0,
) -> None:
    """Train what requires a gradient as `Training` does; show a progress bar.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(input_ids=..., labels=...)``; its parameters named ``router`` learn at `router_learning_rate`.
    data : iterator of Tensor [B, S]
        Token ids, on the model's device.
    steps : int
    learning_rate, router_learning_rate : float
        The highest value of each.
    title : str
        Of the progress bar.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapters = [p for name, p in named if ".router." not in name]
    router = [p for name, p in named if ".router." in name]
    training = Training(adapters, router, steps, learning_rate, router_learning_rate)
    model.train()
    with progress_bar(range(steps), title, "step") as progress:
        for _ in progress:
            input_ids = next(data)
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            training.step(loss)
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def progress_bar(items: Iterable[int], title: str, unit: str) -> "tqdm[int]":
    """A bar on stderr, below the bars of the other stages."""
    return tqdm(items, desc=f"{title:<32}", unit=unit, mininterval=0.5)


def perplexity(model: nn.Module, domains: Sequence[Domain], device: torch.device) -> dict[str, float]:
    """Perplexity per byte on the held-out text of each domain, and over all of them (the geometric mean)."""
    model.eval()

    def loss(rows: Tensor) -> Tensor:
        result: Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
        return result

    nats = {domain.name: mean_loss(loss, held_out_windows(domain, device)) for domain in domains}
    return {name: math.exp(value) for name, value in nats.items()} | {"all": math.exp(sum(nats.values()) / len(nats))}


def held_out_windows(domain: Domain, device: torch.device) -> Tensor:
    """The domain's held-out text as sequences [n, LENGTH], without overlap."""
    starts = np.arange(0, len(domain.held_out) - LENGTH + 1, LENGTH)
    return torch.from_numpy(windows(domain.held_out, starts, LENGTH)).to(device)


@torch.no_grad()
def mean_loss(loss: Callable[[Tensor], Tensor], sequences: Tensor) -> float:
    """The mean of ``loss(rows)`` over sequences [n, S], a few at a time."""
    return sum(loss(rows).item() * len(rows) for rows in sequences.split(32)) / len(sequences)
