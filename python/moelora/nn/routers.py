"""Routers: modules that give each token a weight for each expert.

A router says what it reads (`Router.reads`) and which expert each column of its weights belongs to
(`Router.expert_names`); who hosts it feeds it and matches columns by name. A new kind of router is one subclass.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelora.nn.plain import uses_core
from moelora.nn.route import route

__all__ = [
    "EmbeddingRouter",
    "FixedRouter",
    "HiddenStateRouter",
    "LastHiddenRouter",
    "LearnedRouter",
    "PerLayerRouter",
    "Router",
    "RoutingOutput",
    "build_router",
]

# Score of an expert that must not be picked. Beside any other score its probability is exactly 0, as with -inf, but
# where nothing else is left the softmax is uniform instead of NaN.
_EXCLUDED = -1e30


class RoutingOutput(NamedTuple):
    """What a router decided for tokens [...] over N columns, and what the losses need of it."""

    weights: Tensor
    """[..., N], or [N] where all tokens share them; at least float32."""
    indices: Tensor | None
    """[..., k] of int64, by falling probability; None without top-k."""
    counts: Tensor
    """[N] of int64: unmasked tokens whose top k holds the expert, before capacity."""
    prob_sums: Tensor
    """[N]: probabilities before top-k, summed over unmasked tokens."""
    logits: Tensor
    """[..., N]: what the gate said, before temperature, maturity and masks."""
    n_tokens: int | Tensor
    """Number of unmasked tokens."""
    mask: Tensor | None = None
    """[...] of bool, False for padding; None: all tokens count."""
    activated: Tensor | None = None
    """[N] of bool, False for experts that are not activated yet; None: all are."""


class Router(nn.Module):
    """Base of all routers: gives weights [..., N] to tokens [..., H].

    A subclass sets the class attribute `reads` and implements `route`.

    Parameters
    ----------
    expert_names : iterable of str
        Adapter of each column.
    input_size : int, optional
        H; None for a router that reads nothing.
    top_k : int in [1, N], optional
        How many experts each token keeps; fewer where fewer are active. None: all.
    temperature : float
        Divides the logits; positive.
    renormalize : bool
        Divide the kept probabilities by their sum.
    capacity_factor : float, optional
        In training, each expert takes at most ceil(capacity_factor * T * k / N) of the top-k picks of the T unpadded
        tokens, first come by token; a pick beyond that weighs 0, and what is left is not renormalised. None: no limit.
        It concerns top-k picks alone.
    expert_dropout : float in [0, 1)
        In training, probability that an expert is left out for a whole sequence; the rest is renormalised, and one
        always stays. Drawn anew at each call.

    Attributes
    ----------
    reads : {"nothing", "embeddings", "layer", "layers", "last_hidden"}
        What `route` wants as `hidden_states`: nothing at all, the token embeddings, the input of decoder layer
        `self.layer`, the input of every decoder layer in turn, or the last hidden states of the base without adapters.
    expert_names : list of str
    activated : Tensor [N] of bool, a buffer
        An expert that is not activated gets weight 0 beside those that are.
    """

    reads: str
    activated: Tensor

    def __init__(
        self,
        expert_names: Iterable[str],
        *,
        input_size: int | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        renormalize: bool = True,
        capacity_factor: float | None = None,
        expert_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if getattr(self, "reads", None) not in ("nothing", "embeddings", "layer", "layers", "last_hidden"):
            raise TypeError(
                f"{type(self).__name__} must declare what it reads: set the class attribute reads to 'nothing', "
                "'embeddings', 'layer', 'layers' or 'last_hidden'"
            )
        names = [expert_names] if isinstance(expert_names, str) else list(expert_names)
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError(f"expert_names must be one or more different names, got {expert_names!r}")
        _check_kind(Real, temperature=temperature, expert_dropout=expert_dropout)
        _check_kind(Real, optional=True, capacity_factor=capacity_factor)
        _check_kind(Integral, optional=True, input_size=input_size, top_k=top_k)
        if input_size is not None and input_size < 1:
            raise ValueError(f"input_size must be positive, got {input_size}")
        if top_k is not None and not 1 <= top_k <= len(names):
            raise ValueError(f"top_k must lie in [1, {len(names)}], the number of experts, got {top_k}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be positive and finite, got {capacity_factor}")
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"expert_dropout must lie in [0, 1), got {expert_dropout}")
        self.expert_names = names
        self.input_size = input_size
        self.top_k = top_k
        self.temperature = float(temperature)
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.expert_dropout = expert_dropout
        self.register_buffer("activated", torch.ones(len(names), dtype=torch.bool))

    @property
    def num_experts(self) -> int:
        """N, the number of columns."""
        return len(self.expert_names)

    def column(self, name: str) -> int:
        """Return the column of an expert; ValueError where there is none of this name."""
        if name not in self.expert_names:
            raise ValueError(f"the router has no expert {name!r}, it has {self.expert_names}")
        return self.expert_names.index(name)

    def activate(self, name: str) -> None:
        """Let an expert be picked from now on."""
        self.activated[self.column(name)] = True

    def add_expert(self, name: str) -> None:
        """Append the column of a new expert, which weighs 0 until `activate`.

        Where `active` does not name it, the weights of the others keep their bits. Parameters that grow are new
        objects: make their optimizer afterwards.

        Raises
        ------
        TypeError
            `name` is not a string.
        ValueError
            There is an expert of this name already.
        """
        self._check_new(name)
        self.arrange([*range(self.num_experts), None])
        self.expert_names = [*self.expert_names, name]

    def remove_expert(self, name: str) -> None:
        """Remove an expert and its column; the others share what it had. At most as many are picked as are left.

        Raises
        ------
        ValueError
            There is no expert of this name, or no other.
        """
        column = self.column(name)
        if self.num_experts == 1:
            raise ValueError(f"{name!r} is the router's only expert: detach the router instead")
        self.arrange([i for i in range(self.num_experts) if i != column])
        self.expert_names = [other for other in self.expert_names if other != name]

    def rename_expert(self, old: str, new: str) -> None:
        """Let a column belong to the adapter `new`.

        Raises
        ------
        TypeError
            `new` is not a string.
        ValueError
            There is no expert `old`, or one that is called `new` already.
        """
        column = self.column(old)
        if new != old:
            self._check_new(new)
        self.expert_names = [*self.expert_names[:column], new, *self.expert_names[column + 1 :]]

    def arrange(self, columns: Sequence[int | None]) -> None:
        """Give what is kept for each expert the columns `columns`: old ones by number, None for a new one.

        `add_expert` and `remove_expert` call it; a subclass that keeps anything else for each expert extends it.
        """
        self.activated = _arranged(self.activated, columns, False)
        if self.top_k is not None:
            self.top_k = min(self.top_k, len(columns))

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of an expert must be a string, got {type(name).__name__}")
        if name in self.expert_names:
            raise ValueError(f"the router has an expert {name!r} already, it has {self.expert_names}")

    def route(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        layer: int | None = None,
        active: Sequence[int] | None = None,
    ) -> RoutingOutput:
        """Route tokens.

        Parameters
        ----------
        hidden_states : Tensor [..., H]
            What `reads` says, [B, S, H] in a model; any floating dtype.
        attention_mask : Tensor [...], optional
            0: padding, which counts, sums and capacity leave out.
        layer : int, optional
            Index of the decoder layer, for a router with one gate for each of them; None: the last. Others ignore it.
        active : sequence of int, optional
            The columns that take part, in the order wanted; the others are dropped and the rest renormalised, so that
            a single one has weight 1. None: all.

        Returns
        -------
        RoutingOutput

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it got and what it takes.
        IndexError
            `layer` or `active` is out of range.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement route")

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        layer: int | None = None,
        active: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the weights alone, [..., N] or [N]; arguments as `route`."""
        return self.route(hidden_states, attention_mask, layer=layer, active=active).weights

    def extra_repr(self) -> str:
        parts = [f"experts={self.expert_names}", f"reads={self.reads!r}"]
        if self.top_k is not None:
            parts.append(f"top_k={self.top_k}")
        parts.append(f"temperature={self.temperature:g}")
        if self.capacity_factor is not None:
            parts.append(f"capacity_factor={self.capacity_factor:g}")
        if self.expert_dropout:
            parts.append(f"expert_dropout={self.expert_dropout:g}")
        return ", ".join(parts)

    def _columns(self, active: Sequence[int] | None) -> list[int] | None:
        """The checked columns to keep; None where all are kept, in their own order."""
        if active is None:
            return None
        columns = list(active)
        if not columns or len(set(columns)) < len(columns):
            raise ValueError(f"active must name one or more different columns, got {columns}")
        for column in columns:
            if not 0 <= column < self.num_experts:
                raise IndexError(f"active must name columns in [0, {self.num_experts}), got {column}")
        return None if columns == list(range(self.num_experts)) else columns


class SharedByLayers:
    """What the routings of one forward by a `LearnedRouter` have in common; the first of them fills it in."""

    def __init__(self) -> None:
        self.tokens: torch.Size | None = None  # [...] of the hidden states; None: nothing is filled in yet
        self.mask: Tensor | None = None
        self.n_tokens: int | Tensor = 0
        self.kept: list[int] | None = None  # the columns that take part; None: all
        self.activated: Tensor
        self.maturity: Tensor
        self.plain = False  # all experts are activated and mature, and it cost nothing to see that
        self.capacity: int | Tensor | None = None  # picks that an expert takes; None: nobody has asked
        self.bias: Tensor | None = None  # [N]: what is added to the logits of a gate; None where plain


class FixedRouter(Router):
    """The same weights for every token.

    Parameters
    ----------
    expert_names : iterable of str
    weights : sequence of N numbers, optional
        Shares of the experts, not negative; brought to a sum of 1. None: equal shares. An expert that is added later
        has share 0 until ``router.weights[router.column(name)]`` is set.

    Examples
    --------
    >>> from moelora.nn import FixedRouter
    >>> FixedRouter(["code", "prose", "data"], [2, 1, 1])(None)
    tensor([0.5000, 0.2500, 0.2500])
    """

    reads = "nothing"
    weights: Tensor

    def __init__(self, expert_names: Iterable[str], weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(expert_names)
        n = self.num_experts
        shares = torch.ones(n) if weights is None else torch.as_tensor(weights)
        if shares.shape != (n,) or shares.is_complex():
            raise ValueError(f"weights must be {n} real numbers, one for each expert, got shape {tuple(shares.shape)}")
        shares = shares.detach().double()
        total = float(shares.sum())
        if not (float(shares.min()) >= 0 and 0 < total < math.inf):
            raise ValueError(f"weights must not be negative, and some must be positive, got {shares.tolist()}")
        self.register_buffer("weights", (shares / total).float())

    def arrange(self, columns: Sequence[int | None]) -> None:
        super().arrange(columns)
        self.weights = _arranged(self.weights, columns, 0.0)

    def route(
        self,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        layer: int | None = None,
        active: Sequence[int] | None = None,
    ) -> RoutingOutput:
        """Give the weights [N]; `hidden_states` may be None and then stands for one token."""
        columns = self._columns(active)
        weights = self.weights.to(torch.promote_types(self.weights.dtype, torch.float32))
        activated = self.activated
        if columns is not None:
            weights, activated = select_columns(weights, columns), select_columns(activated, columns)
        weights = torch.where(activated, weights, 0)
        total = weights.sum()
        weights = torch.where(total > 0, weights / total, 1 / len(weights))
        mask = None
        n_tokens: int | Tensor = 1
        if hidden_states is not None:
            mask = _as_mask(attention_mask, hidden_states)
            n_tokens = math.prod(hidden_states.shape[:-1]) if mask is None else mask.sum()
        return RoutingOutput(
            weights, None, (weights > 0) * n_tokens, weights * n_tokens, weights.log(), n_tokens, None, activated
        )


class LearnedRouter(Router):
    """Base of the routers with a gate: a linear layer, or an MLP with one hidden layer, from tokens to logits.

    The gate computes in float32 at least, inside autocast too. Each expert e has a maturity m_e in (0, 1]: log m_e is
    added to its logit / temperature, so that a young expert is picked with caution. With all ones, as they start, this
    is a plain learned router.

    Parameters
    ----------
    expert_names : iterable of str
    input_size : int
        H.
    mlp_dim : int, optional
        Width of the gate's hidden layer; None: a linear gate.
    eval_top_k : int in [1, N], optional
        How many experts each token keeps in evaluation; None: `top_k`, as in training. With ``top_k=None,
        eval_top_k=1`` all experts train and one of them serves, as in DyLoRA-MoE.
    **options
        As `Router`.

    Attributes
    ----------
    gate : Module
    maturity : Tensor [N], a buffer
    """

    input_size: int
    maturity: Tensor
    gate: nn.Module

    def __init__(
        self,
        expert_names: Iterable[str],
        input_size: int,
        *,
        mlp_dim: int | None = None,
        eval_top_k: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(expert_names, input_size=input_size, **options)
        _check_kind(Integral, optional=True, mlp_dim=mlp_dim, eval_top_k=eval_top_k)
        if mlp_dim is not None and mlp_dim < 1:
            raise ValueError(f"mlp_dim must be positive or None, got {mlp_dim}")
        if eval_top_k is not None and not 1 <= eval_top_k <= self.num_experts:
            raise ValueError(f"eval_top_k must lie in [1, {self.num_experts}], the number of experts, got {eval_top_k}")
        self.mlp_dim = mlp_dim
        self.eval_top_k = eval_top_k
        self.gate = self._new_gate()
        self.register_buffer("maturity", torch.ones(self.num_experts))

    def _new_gate(self) -> nn.Module:
        if self.mlp_dim is None:
            return GateLinear(self.input_size, self.num_experts)
        return nn.Sequential(
            GateLinear(self.input_size, self.mlp_dim), nn.SiLU(), GateLinear(self.mlp_dim, self.num_experts)
        )

    def gate_for(self, layer: int | None) -> nn.Module:
        """Return the gate that serves a decoder layer."""
        return self.gate

    def mark_mature(self, name: str, value: float = 1.0) -> None:
        """Set the maturity of an expert, in (0, 1]."""
        _check_maturity(value=value)
        self.maturity[self.column(name)] = value

    def add_expert(self, name: str, *, maturity: float = 1.0) -> None:
        """Append the column of a new expert, which weighs 0 until `activate`; its gate starts as that of a new router.

        Parameters
        ----------
        name : str
        maturity : float in (0, 1]
            As `mark_mature` sets it.

        Raises
        ------
        TypeError, ValueError
            As `Router.add_expert` and `mark_mature`. The router is as it was then.
        """
        _check_maturity(maturity=maturity)
        super().add_expert(name)
        self.mark_mature(name, maturity)

    def arrange(self, columns: Sequence[int | None]) -> None:
        super().arrange(columns)
        if self.eval_top_k is not None:
            self.eval_top_k = min(self.eval_top_k, len(columns))
        self.maturity = _arranged(self.maturity, columns, 1.0)
        for gate in self.gate if isinstance(self.gate, nn.ModuleList) else (self.gate,):
            head: Any = gate[-1] if isinstance(gate, nn.Sequential) else gate
            head.arrange(columns)

    def route(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        layer: int | None = None,
        active: Sequence[int] | None = None,
        shared: SharedByLayers | None = None,
    ) -> RoutingOutput:
        """As `Router.route`; `shared`: by the layers of one forward, for which mask and columns are the same."""
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            got = hidden_states.dtype if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
            raise TypeError(f"hidden_states must be a floating-point tensor, got {got}")
        if not hidden_states.dim() or hidden_states.shape[-1] != self.input_size:
            raise ValueError(
                f"hidden_states must have shape [..., {self.input_size}], as the router's input_size is "
                f"{self.input_size}, got {tuple(hidden_states.shape)}"
            )
        if shared is None:
            shared = SharedByLayers()
        if shared.tokens != hidden_states.shape[:-1]:
            self._share(shared, hidden_states.shape[:-1], _as_mask(attention_mask, hidden_states), active)
        mask, activated, plain, n_tokens = shared.mask, shared.activated, shared.plain, shared.n_tokens
        logits = self._logits(hidden_states, layer, shared.kept)
        scores, allowed = logits, activated
        if not plain:
            if shared.bias is None or shared.bias.dtype is not logits.dtype:
                bias = shared.maturity.to(logits.dtype).log() * self.temperature
                shared.bias = torch.where(activated, bias, _EXCLUDED)
            scores = logits + shared.bias
        if self.training and self.expert_dropout:
            allowed = self._draw(activated, hidden_states.shape[:-1])
            scores = scores.masked_fill(~allowed, _EXCLUDED)
        n = logits.shape[-1]
        top_k = self.top_k if self.training or self.eval_top_k is None else self.eval_top_k
        top_k = None if top_k is None else min(top_k, n)
        routing = route(scores, top_k=top_k, temperature=self.temperature, renormalize=self.renormalize, mask=mask)
        weights, counts = routing.weights, routing.counts
        dropping = self.training and self.expert_dropout > 0
        limited = self.training and self.capacity_factor is not None
        every = plain and not dropping  # expert that is among the k largest is picked
        if (every and routing.indices is None) or not (limited or dropping):
            if not plain:
                # An expert that is excluded can be among the k largest where fewer than k are left; it isn't picked.
                counts = counts * (routing.prob_sums != 0)
        else:
            picks = allowed.expand(weights.shape)
            if routing.indices is not None and routing.indices.shape[-1] < n:
                held = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, routing.indices, True)
                picks = held if every else picks & held
            if mask is not None:
                picks = picks & mask.unsqueeze(-1)
            if not every:
                counts = picks.reshape(-1, n).sum(0)
            if limited and self._limits(n):
                if shared.capacity is None:
                    shared.capacity = self._capacity(n_tokens, n if plain else activated.sum().clamp(min=1))
                place = picks.reshape(-1, n).cumsum(0).reshape(picks.shape)
                weights = weights.masked_fill(picks & (place > shared.capacity), 0)
        return RoutingOutput(weights, routing.indices, counts, routing.prob_sums, logits, n_tokens, mask, activated)

    def _share(
        self, shared: SharedByLayers, tokens: torch.Size, mask: Tensor | None, active: Sequence[int] | None
    ) -> None:
        columns = self._columns(active)
        activated, maturity = self.activated, self.maturity
        if columns is not None:
            activated, maturity = select_columns(activated, columns), select_columns(maturity, columns)
        shared.tokens, shared.mask, shared.bias, shared.capacity = tokens, mask, None, None
        shared.kept, shared.activated, shared.maturity = columns, activated, maturity
        shared.n_tokens = math.prod(tokens) if mask is None else mask.sum()
        shared.plain = _are_ones(activated, maturity)

    def _limits(self, n_experts: int) -> bool:
        """Whether a capacity can be less than all tokens."""
        assert self.capacity_factor is not None
        return self.top_k is not None and (self.top_k < n_experts or self.capacity_factor < 1)

    def _capacity(self, n_tokens: int | Tensor, n_experts: int | Tensor) -> int | Tensor:
        """How many picks an expert takes; a number if n_experts is one, which says that reading numbers is free."""
        assert self.capacity_factor is not None and self.top_k is not None
        # In float64, and from left to right: the ceiling turns any other rounding into another capacity.
        if isinstance(n_experts, int):
            tokens = int(n_tokens)
            picks = self.capacity_factor * tokens * min(n_experts, self.top_k) / n_experts
            return math.ceil(min(picks, tokens))  # no expert is picked more often
        experts = n_experts.double()
        factor = torch.full_like(experts, self.capacity_factor)
        return (factor * n_tokens * experts.clamp(max=self.top_k) / experts).ceil()

    def _logits(self, hidden_states: Tensor, layer: int | None, columns: Sequence[int] | None) -> Tensor:
        gate = self.gate_for(layer)
        *body, head = gate if isinstance(gate, nn.Sequential) else (gate,)
        for module in body:
            hidden_states = module(hidden_states)
        logits: Tensor = head(hidden_states, columns)
        return logits

    def _draw(self, activated: Tensor, tokens: torch.Size) -> Tensor:
        """Which experts stay, [..., 1, N]: drawn for each sequence of tokens [..., S]."""
        n = len(activated)
        luck = torch.rand((*tokens[:-1], 1, n) if tokens else (n,), device=activated.device)
        luck = luck.masked_fill(~activated, -1)
        return (luck >= self.expert_dropout) | (luck == luck.amax(-1, keepdim=True))

    def extra_repr(self) -> str:
        evaluation = "" if self.eval_top_k is None else f", eval_top_k={self.eval_top_k}"
        return f"input_size={self.input_size}, {super().extra_repr()}{evaluation}"


class EmbeddingRouter(LearnedRouter):
    """A learned router on the token embeddings: one mixture of each token for all layers.

    Examples
    --------
    >>> import torch
    >>> from moelora.nn import EmbeddingRouter
    >>> router = EmbeddingRouter(["code", "prose", "data"], 64, top_k=2)
    >>> router(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 3])
    """

    reads = "embeddings"


class HiddenStateRouter(LearnedRouter):
    """A learned router on the input of decoder layer `layer`; the layers below it take the uniform mixture."""

    reads = "layer"

    def __init__(self, expert_names: Iterable[str], input_size: int, *, layer: int, **options: Any) -> None:
        super().__init__(expert_names, input_size, **options)
        _check_kind(Integral, layer=layer)
        if layer < 0:
            raise ValueError(f"layer must not be negative, got {layer}")
        self.layer = layer

    def extra_repr(self) -> str:
        return f"layer={self.layer}, {super().extra_repr()}"


class PerLayerRouter(LearnedRouter):
    """A learned router with one gate for each decoder layer, on that layer's input.

    Examples
    --------
    >>> import torch
    >>> from moelora.nn import PerLayerRouter
    >>> router = PerLayerRouter(["code", "prose"], 64, num_layers=3)
    >>> router(torch.randn(2, 5, 64), layer=0).shape
    torch.Size([2, 5, 2])
    """

    reads = "layers"
    gate: nn.ModuleList

    def __init__(self, expert_names: Iterable[str], input_size: int, *, num_layers: int, **options: Any) -> None:
        super().__init__(expert_names, input_size, **options)
        _check_kind(Integral, num_layers=num_layers)
        if num_layers < 1:
            raise ValueError(f"num_layers must be positive, got {num_layers}")
        self.num_layers = num_layers
        self.gate = nn.ModuleList([self.gate, *(self._new_gate() for _ in range(1, num_layers))])

    def gate_for(self, layer: int | None) -> nn.Module:
        """Return the gate of decoder layer `layer`; None: the last."""
        if layer is None:
            layer = self.num_layers - 1
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer must lie in [0, {self.num_layers}), got {layer}")
        return self.gate[layer]


class LastHiddenRouter(LearnedRouter):
    """A learned router on the last hidden states of the base model, the input of its output head: two passes.

    The first pass runs the base without any adapter and without gradient, the second mixes the experts in all layers by
    what the gate made of the first. So it costs one more forward of the base, and a second cache while generating.
    """

    reads = "last_hidden"


class GateLinear(nn.Linear):
    """A linear layer that computes in float32 at least, whatever the model, its parameters or autocast say.

    Its bias starts at 0: where inputs are small, as in a model's first layer, any other one would decide the picks of
    all tokens alike. `rows` chooses outputs: those alone are computed, with the bits of a layer that has no others.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        if (
            rows is None
            and input.dtype is self.weight.dtype is torch.float32
            and not torch._C._is_any_autocast_enabled()
        ):
            return F.linear(input, self.weight, self.bias)
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        weight, bias = ((t if rows is None else select_columns(t, rows, 0)).to(dtype) for t in (self.weight, self.bias))
        kind = input.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return F.linear(input.to(dtype), weight, bias)
        return F.linear(input.to(dtype), weight, bias)

    def arrange(self, rows: Sequence[int | None]) -> None:
        """Give the layer these outputs: old ones by number with their bits, None for one that is drawn anew."""
        new = type(self)(self.in_features, len(rows), device=self.weight.device, dtype=self.weight.dtype)
        for name, parameter in self.named_parameters():
            values = new.get_parameter(name).detach()
            for row, old in enumerate(rows):
                if old is not None:
                    values[row] = parameter.detach()[old]
            setattr(self, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        self.out_features = len(rows)


class RouterConfig(Protocol):
    """What `build_router` reads of a `moelora.MoELoraConfig`."""

    router_type: str
    router_hidden_size: int | None
    top_k_experts: int
    router_temperature: float
    expert_capacity_factor: float
    expert_dropout: float


def build_router(config: RouterConfig, *, hidden_size: int, num_layers: int, expert_names: Iterable[str]) -> Router:
    """Build the router that a configuration names.

    Parameters
    ----------
    config : MoELoraConfig
    hidden_size, num_layers : int
        Of the model.
    expert_names : iterable of str

    Returns
    -------
    PerLayerRouter
        For router_type "learned" and "learned_with_maturity".
    FixedRouter
        For "fixed".

    Raises
    ------
    ValueError
        router_type is unknown, or router_hidden_size is not the width of what the router reads.
    """
    if config.router_type == "fixed":
        return FixedRouter(expert_names)
    if config.router_type not in ("learned", "learned_with_maturity"):
        raise ValueError(
            f"router_type must be 'learned', 'learned_with_maturity' or 'fixed', got {config.router_type!r}"
        )
    if config.router_hidden_size not in (None, hidden_size):
        raise ValueError(
            "router_hidden_size is the width of the router's input and must be None or the model's hidden size "
            f"{hidden_size}, got {config.router_hidden_size}"
        )
    return PerLayerRouter(
        expert_names,
        hidden_size,
        num_layers=num_layers,
        top_k=config.top_k_experts,
        temperature=config.router_temperature,
        capacity_factor=config.expert_capacity_factor,
        expert_dropout=config.expert_dropout,
    )


def select_columns(values: Tensor, columns: Sequence[int], dim: int = -1) -> Tensor:
    """Return ``values[..., columns]``, or the same along another axis, without an index on the device.

    Numbers of the host as an index would be copied to a GPU, which waits for all work before that, and can't be
    captured in a CUDA graph.
    """
    parts = values.split(1, dim)
    return torch.cat([parts[column] for column in columns], dim)


def _check_kind(kind: type, *, optional: bool = False, **arguments: Any) -> None:
    """Raise for an argument that is no number of this kind, nor None where that is allowed."""
    for name, value in arguments.items():
        if (value is None and optional) or (isinstance(value, kind) and not isinstance(value, bool)):
            continue
        what = ("an integer" if kind is Integral else "a real number") + (" or None" if optional else "")
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")


def _check_maturity(**argument: Any) -> None:
    _check_kind(Real, **argument)
    for name, value in argument.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value}")


def _arranged(values: Tensor, columns: Sequence[int | None], new: float) -> Tensor:
    """Values [N] of other columns: old ones by number, `new` where that is None."""
    return torch.stack([values.new_tensor(new) if column is None else values[column] for column in columns])


def _are_ones(*values: Tensor) -> bool:
    """Whether all values are 1, where it costs nothing to look; False means nothing."""
    return uses_core(*values) and all(t.tolist().count(1) == t.numel() for t in values)


def _as_mask(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor or None, got {type(attention_mask).__name__}")
    if attention_mask.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"attention_mask must have shape {tuple(hidden_states.shape[:-1])}, one value for each token, got "
            f"{tuple(attention_mask.shape)}"
        )
    return attention_mask.to(hidden_states.device) != 0
