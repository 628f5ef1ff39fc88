"""The life of a DyLoRA-MoE: recognise a task, grow if it is new, learn it, learn to mix. The same for both ways."""

import tempfile
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from novelty import NoveltyDetector
from stream import Task

LEARNING_RATE = 1e-2
REHEARSED = 128  # sequences kept of each task


class DyLoRA(Protocol):
    """What `old_way.DyLoRAMoE` and `dylora.DyLoRAMoE` have in common."""

    model: nn.Module
    experts: list[str]

    def hidden_states(self, input_ids: Tensor) -> Tensor: ...
    def add_expert(self) -> str: ...
    def learn_alone(self, expert: str) -> None: ...
    def learn_to_mix(self) -> None: ...
    def keep(self, expert: str) -> None: ...
    def set_maturity(self, expert: str, value: float) -> None: ...


class Visit(NamedTuple):
    """What became of a task."""

    expert: str
    grown: bool
    similarity: float | None
    """With the closest skill that was known before; None for the first task."""


class Lifecycle:
    """Takes a DyLoRA through a stream of tasks.

    Parameters
    ----------
    dylora : DyLoRA
    detector : NoveltyDetector
    skill_steps, mixing_steps : int
        Of training, in each of the two stages of a task.
    """

    def __init__(self, dylora: DyLoRA, detector: NoveltyDetector, skill_steps: int, mixing_steps: int) -> None:
        self.dylora = dylora
        self.detector = detector
        self.skill_steps = skill_steps
        self.mixing_steps = mixing_steps
        self.rehearsal: list[Tensor] = []

    def learn(self, task: Task) -> Visit:
        """Learn one task.

        First an expert learns on its own: a new one if the task is novel, else the one that knows the domain. Then that
        expert and the router learn how all experts work together, from a few sequences of this task and of all before
        it. The other experts are frozen throughout. A new expert ripens meanwhile: the router holds it back at first.
        """
        dylora, detector = self.dylora, self.detector
        embedding = embed(dylora, task.train[::4])
        similarity = max(detector.similarities(embedding).values(), default=None)
        known = detector.recognise(embedding)
        if known is not None:
            expert = known
        else:
            expert = dylora.add_expert() if detector.prototypes else dylora.experts[0]
            detector.remember(expert, embedding)

        dylora.learn_alone(expert)
        fit(dylora.model, task.train, self.skill_steps)
        self.rehearsal.append(task.train[:: max(1, len(task.train) // REHEARSED)][:REHEARSED])
        if len(dylora.experts) > 1:
            dylora.learn_to_mix()
            ripening = [] if known else [Ripening(dylora, expert)]
            fit(dylora.model, torch.cat(self.rehearsal), self.mixing_steps, ripening)
        dylora.keep(expert)
        return Visit(expert, known is None, similarity)


class Ripening(TrainerCallback):
    """Raises the maturity of a new expert with every step, up to 1."""

    def __init__(self, dylora: DyLoRA, expert: str) -> None:
        self.dylora = dylora
        self.expert = expert

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dylora.set_maturity(self.expert, (state.global_step + 1) / state.max_steps)


def embed(dylora: DyLoRA, sequences: Tensor) -> Tensor:
    """Embedding [H] of sequences [n, S]: the mean of the base's hidden states."""
    dylora.model.eval()
    return torch.cat([dylora.hidden_states(rows).mean(1) for rows in sequences.split(64)]).mean(0)


def fit(model: nn.Module, sequences: Tensor, steps: int, callbacks: list[TrainerCallback] | None = None) -> None:
    """Train what is not frozen with transformers' Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"input_ids": row, "labels": row} for row in sequences]
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Tensor) -> float:
    """Mean loss per byte on sequences [n, S]."""
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in sequences.split(32)]
    return sum(losses) / len(sequences)
