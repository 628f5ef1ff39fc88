"""What one forward knows about its routing, and how the layers of the model come to know it.

A call of an adopted model puts a `Frame` into a thread-local slot and takes it out again whatever happens; the layers
look into the slot and use the frame if it belongs to their model. Two threads, two models in one process and nested
calls therefore never see each other's weights, and nothing is left behind by an exception.

Which weights belong to which row of a layer's input is decided by what the hooks of the model have seen (batch, number
of tokens, cache length, logits_to_keep) and by where the layer sits, never by sizes that happen to agree.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.nn.routers import Router, RoutingOutput
from moelora.peft.balance import Balance

MIXTURES = ("layer", "logits")
TAILS = ("hold", "uniform", "error")

_slot = threading.local()


class Host:
    """What an adopted model and its layers have in common: an identity, and facts about the model.

    A plain object, so that layers can point to it without registering the model as their submodule; `copy.deepcopy` of
    the model copies it once for all of them.
    """

    mixture: str = "layer"
    transformer: bool = False  # inputs are tokens [B, S]
    encoder_decoder: bool = False
    num_layers: int = 0  # decoder layers
    shifts_labels: bool = False  # its loss compares each position with the label of the next one
    parameters: tuple[str, ...] = ()  # of the model's forward


@dataclass(frozen=True, slots=True)
class Site:
    """Where a routed layer sits in its model."""

    host: Host
    name: str
    layer: int | None  # index of the decoder layer it is part of
    aligned: bool  # its rows are the tokens of the text
    head: bool  # the output embeddings: sees only the positions of logits_to_keep


class Call(NamedTuple):
    """What the hook on the model has seen of one forward."""

    batch: int | None
    seq: int | None
    past: int
    keep: int | Tensor | None  # logits_to_keep
    mask: Tensor | None  # [B, S] attention mask of these tokens
    device: torch.device | None

    def kept(self, weights: Tensor) -> Tensor:
        """Of weights [B, S, N], those of the positions whose logits are computed."""
        if self.keep is None:
            return weights
        return weights[:, -self.keep :] if isinstance(self.keep, int) else weights[:, self.keep]


class Frame:
    """The routing of one call: the weights that were given, or the router that makes them.

    Parameters
    ----------
    host : Host
        Of the model that is called.
    experts : list of str
        The active adapters: what the columns of the weights mean.
    given : Tensor, optional
        Explicit weights [N], [B, N], [B, S, N] or [B, S, L, N].
    router : Router, optional
        Makes the weights when none are given.
    mixture : {"layer", "logits"}
        What is mixed.
    tail : {"hold", "uniform", "error"}
        Weights of positions past the given ones, in generate.
    """

    def __init__(
        self,
        host: Host,
        experts: list[str],
        *,
        given: Tensor | None = None,
        router: Router | None = None,
        mixture: str = "layer",
        tail: str = "hold",
    ) -> None:
        self.host = host
        self.experts = experts
        self.given = given
        self.router = router
        self.mixture = mixture
        self.tail = tail
        self.active = None if router is None else columns(router, experts)
        self.generating = False
        self.frozen = False  # inside a checkpointed region: the weights came in as its arguments
        self.call: Call | None = None
        self.now: Tensor | None = None  # weights of the layers that run now
        self.layers: Sequence[Tensor] | None = None  # weights of each decoder layer, where they were given
        self.blend: Tensor | None = None  # mixture="logits": weights of the logits; `now` is one-hot
        self.reached: int | None = None  # decoder layer whose gate has been read
        self.balance: Balance | None = None
        self.outputs: list[RoutingOutput] = []
        self.loss: dict[str, Any] = {}  # mixture="logits": labels and what else the loss takes
        self.of_hook = False  # entered by the hooks of the model, as no call of ours is around it
        self.around: Frame | None = None  # then: what it has to give way to again
        if given is not None:
            self._check_given(given)
            if given.dim() < 3:
                self.now = given
        elif router is not None and router.reads == "nothing":
            self.now = router(None, active=self.active)

    def _check_given(self, given: Tensor) -> None:
        if given.shape[-1] != len(self.experts):
            raise ValueError(
                f"routing_weights must have one column for each active adapter {self.experts}, got shape "
                f"{tuple(given.shape)}"
            )
        if given.dim() > 2 and self.host.encoder_decoder:
            raise ValueError(
                f"routing_weights of shape {tuple(given.shape)} can't tell the encoder's tokens from the decoder's: an "
                "encoder-decoder model takes [N] or [B, N]"
            )
        if given.dim() == 4 and given.shape[2] != self.host.num_layers:
            raise ValueError(
                f"routing_weights [B, S, L, N] needs L = {self.host.num_layers}, the number of decoder layers, got "
                f"shape {tuple(given.shape)}"
            )

    def begin(self, call: Call, balance: Balance | None = None) -> None:
        """Start one forward of the model: fit the given weights to its tokens."""
        # The model runs once for a forward, so a second time in one frame means that generate drives it.
        self.generating = self.generating or self.call is not None
        self.call, self.balance, self.outputs, self.reached = call, balance, [], None
        if self.given is not None:
            self._fit(self.given, call)
        elif self.router is not None and self.router.reads != "nothing":
            self.now = torch.full((len(self.experts),), 1 / len(self.experts), device=call.device)

    def _fit(self, given: Tensor, call: Call) -> None:
        if call.device is not None:
            if given.is_meta and call.device.type != "meta":
                raise ValueError(f"routing_weights must hold values for inputs on {call.device}, got a meta tensor")
            given = given.to(call.device)  # once, not in every layer
        if given.dim() == 4 and given.shape[:2] == (1, 1):  # a static mixture for each layer
            self.layers = given[0, 0].unbind(0)
            return
        if given.dim() > 1 and call.batch is not None:
            given = self._fit_batch(given, call.batch)
        if given.dim() > 2 and call.seq is not None:
            given = self._fit_tokens(given, call)
        if given.dim() == 4:
            self.layers = given.unbind(2)
        else:
            self.now = given

    def _fit_batch(self, given: Tensor, batch: int) -> Tensor:
        have = given.shape[0]
        if have == batch:
            return given
        if self.generating and have and batch % have == 0:  # beams and return sequences are repeated side by side
            return given.repeat_interleave(batch // have, 0)
        raise ValueError(
            f"routing_weights of shape {tuple(given.shape)} is for {have} sequences, the batch has {batch}"
        )

    def _fit_tokens(self, given: Tensor, call: Call) -> Tensor:
        have, seq, past = given.shape[1], call.seq or 0, call.past
        if not self.generating:
            if have == seq:
                return given
            if have == past + seq:
                return given[:, past:]
            cached = f" after {past} in the cache" if past else ""
            raise ValueError(
                f"routing_weights of shape {tuple(given.shape)} is for {have} tokens, the input has {seq}{cached}"
            )
        end = past + seq
        if end <= have:
            return given[:, past:end]
        if self.tail == "error":
            raise ValueError(
                f"routing_weights covers {have} positions and generation reached {end}: pass weights for all of them, "
                "or routing_tail='hold' or 'uniform'"
            )
        missing = end - max(past, have)
        rest = given[:, -1:].expand(-1, missing, *given.shape[2:])
        if self.tail == "uniform":
            rest = torch.full_like(rest, 1 / len(self.experts))
        return torch.cat([given[:, past:], rest], 1)

    def see_embeddings(self, embeddings: Tensor) -> None:
        """The token embeddings [B, S, H]: what a router that reads "embeddings" waits for."""
        if self.mixture == "logits":  # the batch is there once for each expert
            self.blend = self._route(embeddings[: len(embeddings) // len(self.experts)], None)
        else:
            self.now = self._route(embeddings, None)

    def reach(self, index: int, hidden_states: Tensor | None) -> None:
        """Decoder layer `index` is about to run on [B, S, H]: what a router that reads layers waits for."""
        router = self.router
        if self.frozen or router is None:
            return
        self.reached = index
        if router.reads == "layers":
            self.now = self._route(hidden_states, index)
        elif router.reads == "layer" and router.layer == index:
            self.now = self._route(hidden_states, None)

    def _route(self, hidden_states: Tensor | None, layer: int | None) -> Tensor:
        assert self.router is not None and self.call is not None
        output = self.router.route(hidden_states, self.call.mask, layer=layer, active=self.active)
        self.outputs.append(output)
        return output.weights if self.balance is None else self.balance.watch(output)

    def weights_for(self, site: Site, x: Tensor) -> Tensor:
        """The weights of a layer's input x [..., d_in]: [N], [B, N] or x.shape[:-1] + (N,)."""
        weights = self.now
        if self.layers is not None:
            if site.layer is None:
                raise ValueError(
                    f"{site.name} is in no decoder layer, so routing_weights [B, S, L, N] has nothing for it: pass "
                    "[B, S, N], or leave it out of target_modules"
                )
            weights = self.layers[site.layer]
        if weights is None:
            raise ValueError(
                f"{site.name} was called outside the forward of its model, where routing weights per token can't be "
                "matched: pass routing_weights to the layer"
            )
        if weights.dim() == 1:
            return weights
        matched = self._match(weights, site, x)
        if matched is None:
            raise ValueError(
                f"{site.name} got an input of shape {tuple(x.shape)} whose rows are not the tokens of routing weights "
                f"of shape {tuple(weights.shape)}: pass [N], or leave it out of target_modules"
            )
        return matched

    def _match(self, weights: Tensor, site: Site, x: Tensor) -> Tensor | None:
        call, rows = self.call, x.shape[:-1]
        if call is None or call.batch is None:  # no hook has seen tokens: as in a call of the layer on its own
            return weights if rows[: weights.dim() - 1] == weights.shape[:-1] else None
        if not site.aligned:
            return None
        tokens = None if call.seq is None else call.batch * call.seq
        if weights.dim() == 2:
            if len(rows) == 1 and rows[0] == tokens:
                return weights.repeat_interleave(tokens // call.batch if call.batch else 0, 0)
            return weights if len(rows) < 3 and rows[0] == call.batch else None
        if site.head:  # the positions kept may be as many as there are tokens, in another order
            kept = call.kept(weights)
            if rows == kept.shape[:2]:
                return kept
        if rows == weights.shape[:2]:
            return weights
        if len(rows) == 1 and rows[0] == tokens:
            return weights.flatten(0, 1)
        return None

    def inside(self, index: int | None, weights: Sequence[Tensor]) -> Frame:
        """This frame as it is in a checkpointed region whose arguments are `weights`, see `Recompute`."""
        frame = copy.copy(self)
        frame.frozen = True
        if self.layers is not None and index is None:
            frame.layers = weights
        else:
            frame.layers, frame.now = None, weights[0] if weights else None
        return frame


def put(frame: Frame | None) -> Frame | None:
    """Put a frame into the slot of this thread; return what was there."""
    around: Frame | None = getattr(_slot, "frame", None)
    _slot.frame = frame
    return around


class Entered:
    """Context in which `frame` is the one the layers see; None: they see none, whatever is around."""

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame

    def __enter__(self) -> None:
        self.around = put(self.frame)

    def __exit__(self, *error: object) -> None:
        put(self.around)


def current(host: Host) -> Frame | None:
    """The frame in the slot of this thread, if it belongs to the model of `host`."""
    frame: Frame | None = getattr(_slot, "frame", None)
    return frame if frame is not None and frame.host is host else None


class Recompute:
    """A module's gradient checkpointing function that carries the routing weights into the recomputation.

    The weights enter the region as tensor arguments, for only then does reentrant checkpointing return their gradient,
    and the frame is put back around the region whenever, and on whichever thread, it runs. A router's gate is read
    before the region, so that its loss counts once.
    """

    def __init__(self, host: Host, index: int | None, function: Callable[..., Any]) -> None:
        self.host, self.index, self.function = host, index, function

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = current(self.host)
        if frame is None:
            return self.function(function, *args, **kwargs)
        if self.index is not None and frame.reached != self.index:
            # transformers before 5.18 checkpoints the module call, so its pre-hooks run inside the region.
            frame.reach(self.index, args[0] if args else None)
        frame.reached = None
        if frame.layers is not None:
            weights = tuple(frame.layers) if self.index is None else (frame.layers[self.index],)
        else:
            weights = () if frame.now is None else (frame.now,)
        count, index, around = len(weights), self.index, copy.copy(frame)

        def region(*inputs: Any) -> Any:
            with Entered(around.inside(index, inputs[:count])):
                return function(*inputs[count:])

        return self.function(region, *weights, *args, **kwargs)


def columns(router: Router, experts: list[str]) -> list[int]:
    """The columns of a router's weights that belong to the active experts, by name."""
    unknown = [name for name in experts if name not in router.expert_names]
    if unknown:
        raise ValueError(f"adapters {unknown} are active, but the router knows only {list(router.expert_names)}")
    return [router.expert_names.index(name) for name in experts]


def as_weights(weights: Any) -> Tensor:
    """Check explicit routing weights; integers and bool become float32 and get no gradient."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"routing_weights must be a torch.Tensor, got {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"routing_weights must be real, got {weights.dtype}")
    if weights.layout is not torch.strided:
        raise TypeError(f"routing_weights must be a dense tensor, got {weights.layout}")
    if type(weights).__name__ == "DTensor":
        raise TypeError("routing_weights must not be a DTensor: pass weights.full_tensor()")
    if not 1 <= weights.dim() <= 4:
        raise ValueError(
            f"routing_weights must have shape [N], [B, N], [B, S, N] or [B, S, L, N], got {tuple(weights.shape)}"
        )
    return weights if weights.is_floating_point() else weights.float()
