"""How the forwards of a model were routed: use of the experts, entropy, imbalance."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moelora.peft.call import Call
from moelora.peft.frame import Host


class Usage:
    """What was seen of a number of routings.

    Numbers are of all tokens that are not padding, each routing of a token counting once; reading them before any token
    was routed is a RuntimeError. Where weights do not add up to 1, or are negative, entropies are those of their
    absolute values as shares of the sum.

    Attributes
    ----------
    experts : list of str
        What the columns of arrays [N] mean.
    """

    def __init__(self) -> None:
        self.experts: list[str] = []
        # Sums over tokens: [2, N] of tokens that hold the expert and of its weight; [2] of entropy and of 1.
        self._by_expert: Tensor | None = None
        self._totals: Tensor | None = None

    def _add(self, experts: list[str], by_expert: Tensor, totals: Tensor) -> None:
        if self._by_expert is None or self._totals is None:
            self.experts, self._by_expert, self._totals = list(experts), by_expert, totals
            return
        # Never in place: sums from torch.inference_mode can't be changed outside of it.
        device = self._totals.device
        self._totals = self._totals + totals.to(device)
        by_expert = by_expert.to(device)
        if experts == self.experts:
            self._by_expert = self._by_expert + by_expert
        else:  # other adapters are active than before
            self.experts += [name for name in experts if name not in self.experts]
            columns = torch.tensor([self.experts.index(name) for name in experts], device=device)
            padded = F.pad(self._by_expert, (0, len(self.experts) - self._by_expert.shape[1]))
            self._by_expert = padded.index_add(1, columns, by_expert)

    def _means(self) -> tuple[NDArray[np.float64], float]:
        """Means over tokens: [2, N] by expert, and the entropy."""
        if self._by_expert is None or self._totals is None or not self.tokens:
            raise RuntimeError(
                "no routed tokens were seen: call the model inside `with routing_stats(model) as stats:`"
            )
        means: NDArray[np.float64] = self._by_expert.cpu().numpy() / self.tokens
        return means, float(self._totals[0]) / self.tokens

    @property
    def tokens(self) -> int:
        """How many routings of a token there were."""
        return 0 if self._totals is None else int(self._totals[1])

    @property
    def usage(self) -> NDArray[np.float64]:
        """[N], share of the tokens whose top k holds the expert; of given weights, those whose weight is not 0."""
        held: NDArray[np.float64] = self._means()[0][0]
        return held

    @property
    def weight(self) -> NDArray[np.float64]:
        """[N], mean weight of the expert."""
        weight: NDArray[np.float64] = self._means()[0][1]
        return weight

    @property
    def entropy(self) -> float:
        """Mean over tokens of the entropy of a token's weights, in nats: 0 for one expert, log N for all alike."""
        return self._means()[1]

    @property
    def entropy_of_mean(self) -> float:
        """Entropy of the mean weights, in nats: 0 where one expert takes everything, log N where all are used alike."""
        shares = np.abs(self.weight)
        shares = shares[shares > 0] / shares.sum()
        return float(-(shares * np.log(shares)).sum())

    @property
    def imbalance(self) -> float:
        """Largest over mean of `weight`: 1 where all experts are used alike, N where one takes everything."""
        weight = self.weight
        return float(weight.max() / weight.mean())

    @property
    def variation(self) -> float:
        """Coefficient of variation of `weight`: its standard deviation over its mean."""
        weight = self.weight
        return float(weight.std() / weight.mean())

    def as_dict(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        by_expert = {name: getattr(self, name).tolist() for name in ("usage", "weight")}
        return (
            {"experts": list(self.experts), "tokens": self.tokens} | by_expert | {n: getattr(self, n) for n in _NUMBERS}
        )


_NUMBERS = ("entropy", "entropy_of_mean", "imbalance", "variation")


class RoutingStats(Usage):
    """Context manager that watches the routed forwards of a model; made by `routing_stats`.

    Its own numbers are of all layers together. `layers` has those of each decoder layer by its index, where layers are
    routed apart (a router with a gate for each layer, weights [B, S, L, N]), and nothing where they are not.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.layers: dict[int, Usage] = {}
        self._host = host
        self._lock = threading.Lock()

    def __enter__(self) -> RoutingStats:
        self._host.recorders = (*self._host.recorders, self)
        return self

    def __exit__(self, *error: object) -> None:
        self._host.recorders = tuple(other for other in self._host.recorders if other is not self)

    @torch.compiler.disable(reason="routing_stats keeps its sums outside the graph")  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def record(
        self, experts: list[str], weights: Tensor, call: Call | None, layer: int | None, counts: Tensor | None
    ) -> None:
        """Add one routing.

        Parameters
        ----------
        experts : list of str
        weights : Tensor [N], [B, N] or [B, S, N]
        call : Call, optional
            The forward that it is of; None, or one without a batch: each row is a token.
        layer : int, optional
            Decoder layer; None: for all of them.
        counts : Tensor [N], optional
            Tokens that hold each expert in their top k; None: those whose weight is not 0.
        """
        tokens = _tokens(weights, call)
        weights = torch.where(tokens.unsqueeze(-1) > 0, weights, 0).double()
        shares = weights.abs()
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        rows = tokens.reshape(-1)
        held = rows @ (weights != 0).double().reshape(len(rows), -1) if counts is None else counts.double()
        by_expert = torch.stack([held, rows @ weights.reshape(len(rows), -1)])
        totals = torch.stack([(tokens * torch.special.entr(shares).sum(-1)).sum(), rows.sum()])
        with self._lock:
            for usage in (self,) if layer is None else (self, self.layers.setdefault(layer, Usage())):
                usage._add(experts, by_expert, totals)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, as JSON takes them; those of the layers under ``"layers"``, by their index."""
        return super().as_dict() | {"layers": {layer: usage.as_dict() for layer, usage in sorted(self.layers.items())}}

    def __str__(self) -> str:
        if not self.tokens:
            return "no routed tokens"
        width = max(map(len, [*self.experts, "layer 00"]))
        lines = [f"{self.tokens:,} routed tokens" + (f" in {len(self.layers)} layers" if self.layers else "")]
        lines.append(f"{'':{width}}  {'usage':>8}  {'weight':>8}")
        lines += [
            f"{name:{width}}  {used:8.1%}  {weight:8.3f}"
            for name, used, weight in zip(self.experts, self.usage, self.weight, strict=True)
        ]
        lines.append(f"{'':{width}}" + "".join(f"  {name.replace('_', ' '):>15}" for name in _NUMBERS))
        rows = {"all": self} | {f"layer {i}": usage for i, usage in sorted(self.layers.items())}
        lines += [
            f"{title:{width}}" + "".join(f"  {getattr(usage, name):15.3f}" for name in _NUMBERS)
            for title, usage in rows.items()
        ]
        return "\n".join(lines)


def routing_stats(model: nn.Module) -> RoutingStats:
    """Watch how a model routes, as a context manager: which experts take which share, how sharply, how evenly.

    Every routed forward inside it counts, of training, evaluation and generation, by a router or by given weights, and
    what gradient checkpointing computes again does not. Sums stay on the model's device until they are read. A compiled
    model records too, with a break of its graph at each routing (an error under ``fullgraph=True``). Outside of the
    context nothing is recorded and nothing costs.

    Parameters
    ----------
    model : peft.PeftModel
        Adopted.

    Returns
    -------
    RoutingStats
        To be entered, as often as wanted: it goes on adding up.

    Raises
    ------
    TypeError
        If the model is not adopted.

    Examples
    --------
    ::

        with moelora.routing_stats(model) as stats:
            model(**batch)
        print(stats)
        stats.usage, stats.entropy, stats.imbalance
        stats.layers[0].usage
    """
    host = vars(getattr(model, "base_model", model)).get("_host")
    if not isinstance(host, Host):
        raise TypeError(f"model must be an adopted PeftModel, got {type(model).__name__}: moelora.adopt(model)")
    return RoutingStats(host)


def _tokens(weights: Tensor, call: Call | None) -> Tensor:
    """How many tokens each row of the weights stands for, [...] of float64."""
    rows = weights.shape[:-1]
    count: int | Tensor | None = None
    if call is not None and call.batch is not None:
        mask = None if call.mask is None else (call.mask != 0).to(weights.device)
        if weights.dim() == 3:
            count = mask
        elif weights.dim() == 2:
            count = (call.seq or 1) if mask is None else mask.sum(1)
        else:
            count = call.batch * (call.seq or 1) if mask is None else mask.sum()
    ones = torch.ones(rows, dtype=torch.float64, device=weights.device)
    return ones if count is None else ones * count
