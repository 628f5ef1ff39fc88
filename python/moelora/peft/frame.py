"""What one forward knows about its routing, and how the layers of the model come to know it.

A call of an adopted model puts a `Frame` into a thread-local slot and takes it out again whatever happens; the layers
look into the slot and use the frame if it belongs to their model. Two threads, two models in one process and nested
calls therefore never see each other's weights, and nothing is left behind by an exception.

Which weights belong to which row of a layer's input is decided by what the hooks of the model have seen (batch, number
of tokens, cache length, logits_to_keep) and by where the layer sits, never by sizes that happen to agree.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from moelora.nn.routers import FixedRouter, LearnedRouter, Router, RoutingOutput, SharedByLayers, select_columns
from moelora.peft.balance import Balance
from moelora.peft.call import Call

MIXTURES = ("layer", "logits")
TAILS = ("hold", "uniform", "error")
KEYWORDS = frozenset({"routing_weights", "mixture", "routing_tail"})
STACKS = ("encoder", "decoder")


class _Slot(threading.local):
    def __init__(self) -> None:  # once in each thread: compiled code looks whether there is an attribute
        self.frame: Frame | None = None


_slot = _Slot()


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
    base_parameters: tuple[str, ...] = ()  # of that of the model without its head
    recorders: tuple[Any, ...] = ()  # `RoutingStats` that watch it now

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "recorders"}  # of this model alone


@dataclass(frozen=True, slots=True)
class Site:
    """Where a routed layer sits in its model."""

    host: Host
    name: str
    layer: int | None  # index of the decoder layer it is part of
    aligned: bool  # its rows are the tokens of the text
    head: bool  # the output embeddings, or before them: sees only the positions of logits_to_keep
    ids: bool  # an embedding: its input has no axis of features


class Frame:
    """The routing of one call: the weights that were given, or the router that makes them.

    Parameters
    ----------
    host : Host
        Of the model that is called.
    experts : list of str
        The active adapters: what the columns of the weights mean.
    given : Tensor or dict of Tensor, optional
        Explicit weights [N], [B, N], [B, S, N] or [B, S, L, N]; on an encoder-decoder model also [N], [B, N] or
        [B, S, N] for each of its two stacks, by name.
    router : Router, optional
        Makes the weights when none are given.
    mixture : {"layer", "logits"}
        What is mixed.
    tail : {"hold", "uniform", "error"}
        Weights of positions past the given ones, in generate.
    stack : {"encoder", "decoder"}, optional
        Whose tokens `given` is for, where each stack has weights of its own.
    off : bool
        Nothing is mixed: the layers return what their base does.
    """

    def __init__(
        self,
        host: Host,
        experts: list[str],
        *,
        given: Tensor | dict[str, Tensor] | None = None,
        router: Router | None = None,
        mixture: str = "layer",
        tail: str = "hold",
        stack: str | None = None,
        off: bool = False,
    ) -> None:
        self.host = host
        self.experts = experts
        self.encoder: Frame | None = None  # weights of the encoder's tokens, where they were given apart
        self.encoding = False  # the encoder is running
        self.memory: Tensor | None = None  # what the attention that runs now reads of the encoder
        if isinstance(given, dict):
            _check_stacks(given, host)
            self.encoder = Frame(host, experts, given=given["encoder"], stack="encoder")
            given, stack = given["decoder"], "decoder"
        self.stack = stack
        self.title = "routing_weights" if stack is None else f"routing_weights[{stack!r}]"
        self.given = given
        self.router = router
        self.mixture = mixture
        self.tail = tail
        self.off = off
        self.active = None if router is None else columns(router, experts)
        self.gates = None if router is None else next(router.parameters(), None)
        # A `route` of one's own may return anything, and may look at all tokens of a sequence.
        self.custom = router is not None and type(router).route not in (LearnedRouter.route, FixedRouter.route)
        self.continues = False  # a text that is in the cache already
        self.generating = False
        self.frozen = False  # inside a checkpointed region: the weights came in as its arguments
        self.autograd = _autograd()  # where it is entered
        self.call: Call | None = None
        self.now: Tensor | None = None  # weights of the layers that run now
        self.top_k: int | None = None  # at most so many of each row of them are not 0; None: nobody says so
        self.layers: Sequence[Tensor] | None = None  # weights of each decoder layer, where they were given
        self.blend: Tensor | None = None  # mixture="logits": weights of the logits; `now` is one-hot
        self.reached: int | None = None  # decoder layer whose gate has been read
        self.balance: Balance | None = None
        self.outputs: list[RoutingOutput] = []
        self.shared = SharedByLayers()
        self.caches: tuple[Any, Any] | None = None  # of a first pass, and the one that was passed to the forward
        self.loss: dict[str, Any] = {}  # mixture="logits": labels and what else the loss takes
        self.depth = int(off)  # forwards of the model under way
        self.entered_by: nn.Module | None = None  # whose hook entered it, where no call of ours is around
        self.around: Frame | None = None  # then: what it has to give way to again
        self.caller: FrameType | None = None  # and the Python frame that runs those hooks
        if given is not None:
            self._check_given(given)
            if given.dim() < 3:
                self.now = given
        elif router is not None and router.reads == "nothing":
            output = router.route(None, active=self.active)
            if self.custom:
                self._check_output(output, ())
            self.now = output.weights

    def _check_given(self, given: Tensor) -> None:
        if given.shape[-1] != len(self.experts):
            raise ValueError(
                f"{self.title} must have one column for each active adapter {self.experts}, got shape "
                f"{tuple(given.shape)}"
            )
        if self.stack is not None and given.dim() > 3:
            raise ValueError(f"{self.title} must have shape [N], [B, N] or [B, S, N], got {tuple(given.shape)}")
        if self.stack is None and self.host.encoder_decoder and given.dim() > 2:
            raise ValueError(
                f"routing_weights of shape {tuple(given.shape)} can't tell the encoder's tokens from the decoder's: an "
                "encoder-decoder model takes [N] or [B, N], or {'encoder': weights, 'decoder': weights}"
            )
        if given.dim() == 4 and given.shape[2] != self.host.num_layers:
            raise ValueError(
                f"routing_weights [B, S, L, N] needs L = {self.host.num_layers}, the number of decoder layers, got "
                f"shape {tuple(given.shape)}"
            )

    @property
    def per_token(self) -> bool:
        """Whether weights were given that differ between the tokens of a sequence."""
        given = self.given
        return given is not None and given.dim() > 2 and (given.dim() == 3 or given.shape[:2] != (1, 1))

    @property
    def two_passes(self) -> bool:
        """Whether the weights come from a pass of the base before the routed one."""
        return self.router is not None and self.router.reads == "last_hidden"

    def check_batch(self, prompt: Tensor | None) -> None:
        """Raise if generate is asked to continue more or fewer sequences than there are given weights for.

        Later, where it has repeated the prompt for beams and return sequences, that can't be told any more.
        """
        for frame in (self, self.encoder):
            if prompt is None or frame is None or frame.given is None or frame.given.dim() < 2:
                continue
            static = frame.given.dim() == 4 and not frame.per_token
            if not static and len(frame.given) != len(prompt):
                raise frame._wrong_batch(frame.given, len(prompt))

    def _wrong_batch(self, given: Tensor, batch: int) -> ValueError:
        shape = tuple(given.shape)
        return ValueError(f"{self.title} of shape {shape} is for {len(given)} sequences, the batch has {batch}")

    def begin(self, call: Call, balance: Balance | None = None) -> None:
        """Start one forward of the model: fit the given weights to its tokens."""
        # The model runs once for a forward, so a second time in one frame means that generate drives it.
        self.generating = self.generating or self.call is not None
        self.call, self.balance, self.outputs, self.reached = call, balance, [], None
        self.shared = SharedByLayers()
        if self.given is not None and not torch.compiler.is_compiling() and self.is_lost():
            raise lost("the model inside")  # a router would act again when that is called again
        self.autograd = _autograd()
        if self.given is not None:
            if self.stack is None:
                self._fit(self.given, call)
        elif self.router is not None and self.router.reads != "nothing":
            self.now = self.top_k = None
            return
        if self.host.recorders and self.stack is None:
            self._record_fitted()

    def begin_stack(self, call: Call, *, encoding: bool) -> None:
        """Start the encoder or the decoder: fit the weights that are given for its tokens."""
        self.encoding = encoding
        if self.encoder is None:
            return
        running = self.encoder if encoding else self
        if not encoding and self.call is not None:
            call = call._replace(keep=self.call.keep)
        running._begin_tokens(call, self.generating)
        if self.host.recorders:
            running._record_fitted()

    def _begin_tokens(self, call: Call, generating: bool) -> None:
        assert self.given is not None
        self.call, self.generating = call, generating
        self._fit(self.given, call)

    def see_encoded(self, states: Tensor) -> None:
        """The decoder is about to read the encoder's output [B, S, H], of more sequences than the encoder ran for where
        generate has repeated them, or made in another call."""
        encoder = self.encoder
        if encoder is not None and (encoder.call is None or encoder.call[:2] != states.shape[:2]):
            batch, seq = states.shape[:2]
            encoder._begin_tokens(Call(batch, seq, 0, None, None, states.device), self.generating)

    def _fit(self, given: Tensor, call: Call) -> None:
        if call.device is not None:
            if given.is_meta and call.device.type != "meta":
                raise ValueError(f"{self.title} must hold values for inputs on {call.device}, got a meta tensor")
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
        raise self._wrong_batch(given, batch)

    def _fit_tokens(self, given: Tensor, call: Call) -> Tensor:
        have, seq, past = given.shape[1], call.seq or 0, call.past
        if not self.generating or self.stack == "encoder":
            if have == seq:
                return given
            if have == past + seq:
                return given[:, past:]
            cached = f" after {past} in the cache" if past else ""
            raise ValueError(
                f"{self.title} of shape {tuple(given.shape)} is for {have} tokens, the input has {seq}{cached}"
            )
        end = past + seq
        if end <= have:
            return given[:, past:end]
        if self.tail == "error":
            raise ValueError(
                f"{self.title} covers {have} positions and generation reached {end}: pass weights for all of them, "
                "or routing_tail='hold' or 'uniform'"
            )
        missing = end - max(past, have)
        rest = given[:, -1:].expand(-1, missing, *given.shape[2:])
        if self.tail == "uniform":
            rest = torch.full_like(rest, 1 / len(self.experts))
        return torch.cat([given[:, past:], rest], 1)

    def enter_by_hook(self, module: nn.Module) -> None:
        """Put this frame into the slot from a hook of `module`, which no call of ours is around."""
        self.entered_by, self.around = module, put(self)
        if not torch.compiler.is_compiling():
            self.caller = sys._getframe(2)

    def is_left_over(self) -> bool:
        """Whether the forward that entered this frame is gone: torch runs no hook after a KeyboardInterrupt."""
        if self.caller is None or torch.compiler.is_compiling():
            return False
        return all(running is not self.caller for running in _running())

    def is_lost(self) -> bool:
        """Whether this runs inside a checkpoint of which `Recompute` knows nothing.

        It would compute layers again in the backward, without weights, and so the gradients of another function.
        Checkpoints around the whole call are there when the frame is entered, and enter it again.
        """
        if self.autograd is None or not self.autograd.enabled:
            return False
        if torch.is_grad_enabled():  # not reentrant: it changes the hooks of saved tensors
            hooks = _saved_tensors_hooks(True)
            return hooks is not None and hooks != self.autograd.hooks and hooks[0].__module__ == checkpoint.__name__
        # reentrant: an autograd.Function runs what it will differentiate later; else nobody differentiates
        return _functions() > self.autograd.functions

    def see_last_hidden(self, hidden_states: Tensor) -> None:
        """The last hidden states [B, S, H] of the base: what a router that reads "last_hidden" waits for."""
        self.now = self._route(hidden_states, None)

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
        if hidden_states is not None and self.gates is not None:
            hidden_states = hidden_states.to(self.gates.device)  # of a model that is spread over several
        router, mask = self.router, self.call.mask
        if isinstance(router, LearnedRouter) and not self.custom and "route" not in vars(router):
            output = router.route(hidden_states, mask, layer=layer, active=self.active, shared=self.shared)
        else:
            output = router.route(hidden_states, mask, layer=layer, active=self.active)
        if self.custom:
            self._check_output(output, () if hidden_states is None else hidden_states.shape[:-1])
        # A router of one's own is not held to weights of 0 outside its picks.
        self.top_k = None if self.custom or output.indices is None else output.indices.shape[-1]
        self.outputs.append(output)
        if self.host.recorders:
            # The router has counted the rows it saw; one of a whole sequence stands for all tokens of it.
            self._record(output.weights, layer, output.counts if output.weights.dim() == 3 else None)
        return output.weights if self.balance is None else self.balance.watch(output)

    def _check_output(self, output: Any, tokens: tuple[int, ...]) -> None:
        """Raise if a router returned what is no routing of these tokens [B, S]."""
        name = f"{type(self.router).__name__}.route"
        if not isinstance(output, RoutingOutput):
            raise TypeError(f"{name} must return a moelora.nn.RoutingOutput, got {type(output).__name__}")
        weights, n = output.weights, len(self.experts)
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"{name} must return weights of a floating dtype, got {got}")
        taken = [(*tokens[:axes], n) for axes in range(len(tokens) + 1)]
        if tuple(weights.shape) not in taken:
            raise ValueError(
                f"{name} must return weights of shape {' or '.join(map(str, taken))}, a column for each of the active "
                f"experts {self.experts}, got {tuple(weights.shape)}"
            )
        if self.continues and weights.dim() == 2:
            raise ValueError(
                f"{name} returned one mixture for a whole sequence, of which it has seen only the tokens that are not "
                "in the cache yet: pass use_cache=False, or the weights of the prompt as routing_weights"
            )

    def _record_fitted(self) -> None:
        """Show the weights that do not depend on hidden states to those who watch."""
        if self.layers is not None:
            for layer, weights in enumerate(self.layers):
                self._record(weights, layer)
        elif self.now is not None:
            self._record(self.now)

    def _record(self, weights: Tensor, layer: int | None = None, counts: Tensor | None = None) -> None:
        for recorder in self.host.recorders:
            recorder.record(self.experts, weights, self.call, layer, counts)

    def weights_for(self, site: Site, x: Tensor) -> Tensor:
        """The weights of a layer's input x [..., d_in], or ids [...]: [N], [B, N] or one row for each of its rows."""
        if self.encoder is not None and (self.encoding or x is self.memory):
            return self.encoder.weights_for(site, x)
        weights = self.now
        if self.layers is not None:
            if site.layer is None:
                raise ValueError(
                    f"{site.name} is in no decoder layer, so routing_weights [B, S, L, N] has nothing for it: pass "
                    "[B, S, N], or leave it out of target_modules"
                )
            weights = self.layers[site.layer]
        if weights is None:
            weights = self._before_gate()
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

    def _before_gate(self) -> Tensor | None:
        """The uniform mixture, which layers take that run before the router has read anything."""
        if self.router is not None and self.call is not None:
            assert self.active is not None
            activated = select_columns(self.router.activated, self.active).to(self.call.device)
            self.now = torch.where(activated.any(), activated / activated.sum(), 1 / len(activated))
        return self.now

    def _match(self, weights: Tensor, site: Site, x: Tensor) -> Tensor | None:
        call, rows = self.call, x.shape if site.ids else x.shape[:-1]
        if call is None or call.batch is None:  # no hook has seen tokens: as in a call of the layer on its own
            return weights if rows[: weights.dim() - 1] == weights.shape[:-1] else None
        if not site.aligned:
            return None
        if len(rows) == 3 and rows[1] == 1:  # latents of DeepSeek's attention, with those in the cache [B, 1, S, d]
            matched = self._match(weights, site, x[:, 0])
            if matched is None:
                return None
            return matched.unsqueeze(1) if matched.dim() == 3 else matched[:, None, None].expand(*rows, -1)
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

    def carried(self, index: int | None) -> tuple[Tensor | None, ...]:
        """What decoder layer `index`, or a region around all of them, takes of the weights, for `inside`."""
        if self.layers is not None:
            return tuple(self.layers) if index is None else (self.layers[index],)
        now = self.now if self.now is not None else self._before_gate()
        return (now,) if self.encoder is None else (now, self.encoder.now)

    def inside(self, index: int | None, weights: Sequence[Tensor]) -> Frame:
        """This frame as it is in a checkpointed region whose arguments are `weights`, see `Recompute`."""
        frame = copy.copy(self)
        frame.frozen, frame.autograd = True, _autograd()
        if self.layers is not None and index is None:
            frame.layers = weights
            return frame
        frame.layers, frame.now = None, weights[0]
        if self.encoder is not None:
            frame.encoder = copy.copy(self.encoder)
            frame.encoder.now = weights[1]
        return frame


_APPLY = torch.autograd.Function.apply.__code__
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Autograd(NamedTuple):
    enabled: bool
    hooks: Any  # of saved tensors
    functions: int


def _autograd() -> _Autograd | None:
    if torch.compiler.is_compiling():
        return None
    return _Autograd(torch.is_grad_enabled(), _saved_tensors_hooks(True), _functions())


def _functions() -> int:
    """How many forwards of an autograd.Function are running around here."""
    return sum(running.f_code is _APPLY for running in _running())


def _running() -> Iterator[FrameType]:
    """The Python frames of this thread, from the innermost outwards."""
    running: FrameType | None = sys._getframe()
    while running is not None:
        yield running
        running = running.f_back


def put(frame: Frame | None) -> Frame | None:
    """Put a frame into the slot of this thread; return what was there."""
    around, _slot.frame = _slot.frame, frame
    return around


class Entered:
    """Context in which `frame` is the one the layers see; None: they see none, whatever is around."""

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame

    def __enter__(self) -> None:
        around = put(self.frame)
        while around is not None and around.is_left_over():
            around = around.around
        self.around = around

    def __exit__(self, *error: object) -> None:
        put(self.around)


def current(host: Host) -> Frame | None:
    """The frame in the slot of this thread, if it belongs to the model of `host`."""
    frame = _slot.frame
    return frame if frame is not None and frame.host is host else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_lost() -> bool:
    """Whether a checkpoint would lose the frame of this thread; of compiled code, when it is made.

    Of no layer in particular: compiled code is that of one, and would be made again for each.
    """
    frame = _slot.frame  # None while a whole model is compiled, whose checkpoints are part of the graph
    return frame is not None and frame.is_lost()


def lost(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} runs inside a checkpoint, which would compute it again without its routing weights: use "
        "gradient_checkpointing_enable() of the adopted model, or a checkpoint around calls of that model"
    )


class Recompute:
    """A module's gradient checkpointing function that carries the routing weights into the recomputation.

    The weights enter the region as tensor arguments, for only then does reentrant checkpointing return their gradient,
    and the frame is put back around the region whenever, and on whichever thread, it runs. A router's gate is read
    before the region, so that its loss counts once. In one graph with its surroundings (torch.compile) the region is
    recomputed from that graph and needs no frame of its own, nor may it put one there.
    """

    def __init__(self, host: Host, index: int | None, function: Callable[..., Any]) -> None:
        self.host, self.index, self.function = host, index, function

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = current(self.host)
        if frame is None:
            return self.function(function, *args, **kwargs)
        if frame.off:  # without gradient, so nothing is recomputed
            return function(*args, **kwargs)
        if self.index is not None and frame.reached != self.index:
            # transformers before 5.18 checkpoints the module call, so its pre-hooks run inside the region.
            frame.reach(self.index, args[0] if args else None)
        frame.reached = None
        weights = frame.carried(self.index)
        count, index, around = len(weights), self.index, copy.copy(frame)
        around.caller = None  # whose locals must not live until the backward

        def region(*inputs: Any) -> Any:
            if torch.compiler.is_compiling() and current(around.host) is frame:
                return function(*inputs[count:])
            with Entered(around.inside(index, inputs[:count])):
                return function(*inputs[count:])

        return self.function(region, *weights, *args, **kwargs)


def columns(router: Router, experts: list[str]) -> list[int]:
    """The columns of a router's weights that belong to the active experts, by name."""
    unknown = [name for name in experts if name not in router.expert_names]
    if unknown:
        raise ValueError(f"adapters {unknown} are active, but the router knows only {list(router.expert_names)}")
    return [router.expert_names.index(name) for name in experts]


def as_given(weights: Any) -> Tensor | dict[str, Tensor]:
    """Check explicit routing weights of a model: `as_weights`, or one of them for each stack of an encoder-decoder."""
    if isinstance(weights, Mapping):
        return {stack: as_weights(part, f"routing_weights[{stack!r}]") for stack, part in weights.items()}
    return as_weights(weights)


def check_mixture(mixture: str) -> None:
    if mixture not in MIXTURES:
        raise ValueError(f"mixture must be one of {MIXTURES}, got {mixture!r}")


def as_weights(weights: Any, title: str = "routing_weights") -> Tensor:
    """Check explicit routing weights; integers and bool become float32 and get no gradient."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{title} must be a torch.Tensor, got {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"{title} must be real, got {weights.dtype}")
    if weights.layout is not torch.strided:
        raise TypeError(f"{title} must be a dense tensor, got {weights.layout}")
    if type(weights).__name__ == "DTensor":
        raise TypeError(f"{title} must not be a DTensor: pass weights.full_tensor()")
    if not 1 <= weights.dim() <= 4:
        raise ValueError(f"{title} must have shape [N], [B, N], [B, S, N] or [B, S, L, N], got {tuple(weights.shape)}")
    return weights if weights.is_floating_point() else weights.float()


def _check_stacks(given: dict[str, Tensor], host: Host) -> None:
    if not host.encoder_decoder:
        raise ValueError(
            f"routing_weights for the stacks {list(given)} needs an encoder-decoder model, and this one has one stack: "
            "pass a tensor"
        )
    if set(given) != set(STACKS):
        raise ValueError(f"routing_weights must have exactly the keys {list(STACKS)}, got {list(given)}")
