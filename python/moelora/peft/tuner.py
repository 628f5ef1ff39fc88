"""What every tuner of an adopted model adds to PEFT's: its layers route, and calls take routing weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moelora.nn.losses import router_aux_loss
from moelora.nn.routers import Router
from moelora.peft import logits
from moelora.peft.anatomy import decoder, not_of_tokens, parameters, reads_encoder, token_embeddings
from moelora.peft.balance import Balance, loss_shifts_labels, shares_of_step
from moelora.peft.call import cache_among, check_consumed, continues, read_call
from moelora.peft.config import MoELoraConfig, mark_hosted
from moelora.peft.embedding import Embedding
from moelora.peft.experts import Experts
from moelora.peft.first_pass import keep, last_hidden_states
from moelora.peft.frame import (
    KEYWORDS,
    TAILS,
    Entered,
    Frame,
    Host,
    Recompute,
    Site,
    as_given,
    check_mixture,
    current,
    put,
)
from moelora.peft.generation import check_generate, continuous_batching
from moelora.peft.routed import Routed
from moelora.peft.static import StaticMixtures

# Attributes that adopting adds to a tuner.
ADDED = (
    "_checkpointing",
    "_decoder_layers",
    "_host",
    "_moe_config",
    "_routed",
    "_router_hooks",
    "_routing_hooks",
    "_unroutable",
    "frozen_experts",
)


class RoutedTuner(Experts, StaticMixtures):
    """What a routed tuner adds to the tuner of PEFT that it is derived from; comes before it among the bases.

    Attributes
    ----------
    routed_classes : dict
        Stock class of a layer -> the routed class that takes its place. Everything else is refused when weights arrive.
    adapter_layer : type
        What PEFT's layers of this tuner have in common.
    has_hooks : bool
        Whether PEFT's tuner puts hooks around a call (``adapter_names``, aLoRA).
    """

    routed_classes: ClassVar[Mapping[Any, type[Routed]]]
    adapter_layer: ClassVar[type[BaseTunerLayer]]
    has_hooks: ClassVar[bool] = False

    # Life: what adopting adds, and takes away again.

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        router = self.router if isinstance(self.router, Router) else None
        if router is not None:
            self._watch_nothing()  # PEFT copies modules that it saves with an adapter, and with a hook the whole model
        try:
            super().inject_adapter(*args, **kwargs)
            self._route_layers()  # modules that had no adapter until now are stock layers
        finally:
            if router is not None:
                self._watch_for(router)  # the embeddings may have an adapter now

    def _route_layers(self) -> None:
        """Give every layer with adapters its routed class and its place in the model; watch the model's forward."""
        top = self.model
        stack, self._decoder_layers = decoder(top)
        if "_host" not in vars(self):
            self._host = Host()
            self._routing_hooks: list[Any] = []
            self._router_hooks: list[Any] = []
        if not self._routing_hooks:
            self._watch_model(top)
            if getattr(getattr(top, "config", None), "is_encoder_decoder", False):
                self._watch_stacks()
            elif isinstance(top, PreTrainedModel):
                for below in {top.base_model, stack} - {top}:  # what trainers with a loss of their own call
                    self._watch_model(below)
        for config in self.peft_config.values():
            mark_hosted(config)
        host = self._host
        host.transformer = isinstance(top, PreTrainedModel)
        host.encoder_decoder = bool(getattr(getattr(top, "config", None), "is_encoder_decoder", False))
        host.shifts_labels = loss_shifts_labels(top)
        host.parameters = parameters(top)
        host.base_parameters = parameters(top.base_model) if host.transformer else ()
        host.num_layers = len(self._decoder_layers)
        layer_of = {id(m): i for i, layer in enumerate(self._decoder_layers) for m in layer.modules()}
        inside = {id(m) for m in stack.modules()}
        # Beside another tower (images, ...), only the text stack and the head see the tokens of the text.
        alone = host.encoder_decoder or all(
            id(m) in inside for m in top.modules() if isinstance(m, GradientCheckpointingLayer)
        )
        head = top.get_output_embeddings() if host.transformer else None
        trunk = {id(m) for m in top.base_model.modules()} if host.transformer else set()
        embeddings = token_embeddings(top, stack) if host.transformer else set()
        others = not_of_tokens(top)
        self._routed: list[Routed] = []
        self._unroutable: list[tuple[str, Any]] = []
        index_of = {id(layer): i for i, layer in enumerate(self._decoder_layers)}
        self._checkpointing = [(m, index_of.get(id(m))) for m in top.modules() if hasattr(m, "gradient_checkpointing")]
        for name, module in top.named_modules():
            if type(module) in self.routed_classes:
                module.__class__ = self.routed_classes[type(module)]
            if isinstance(module, Routed):
                ids = isinstance(module, Embedding)
                aligned = id(module) in embeddings if ids else alone or id(module) in inside or module is head
                aligned = aligned and id(module) not in others
                # Some models transform the positions whose logits they compute before the output embeddings, as BERT.
                on_top = module is head or (host.transformer and id(module) not in trunk)
                module._site = Site(host, name, layer_of.get(id(module)), aligned, on_top, ids)
                self._routed.append(module)
            elif isinstance(module, self.adapter_layer):
                self._unroutable.append((name, module))

    def _watch_model(self, module: nn.Module) -> None:
        self._routing_hooks += [
            module.register_forward_pre_hook(partial(self._before_model, parameters(module)), with_kwargs=True),
            module.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
        ]

    def _watch_stacks(self) -> None:
        """Hook the two stacks of an encoder-decoder model, and the attention of one to the other."""
        top: Any = self.model
        encoder, decoder = top.get_encoder(), top.get_decoder()
        for stack in {encoder, decoder} - {top}:
            before = partial(self._before_stack, parameters(stack), stack is encoder)
            self._routing_hooks += [
                stack.register_forward_pre_hook(before, with_kwargs=True),
                stack.register_forward_hook(self._after_stack, always_call=True),
            ]
        reading = {module: name for module in decoder.modules() if (name := reads_encoder(module))}
        for module, name in reading.items():
            if not any(inner in reading for inner in module.modules() if inner is not module):
                before = partial(self._before_attention, parameters(module).index(name), name)
                self._routing_hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def _leave_model(self) -> None:
        """Take the router and the hooks off the model, and the classes off its layers."""
        self.detach_router()
        for hook in self._routing_hooks:
            hook.remove()
        for module, _ in self._checkpointing:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, Recompute):
                vars(module)["_gradient_checkpointing_func"] = function.function
        stock = {routed: plain for plain, routed in self.routed_classes.items()}
        for layer in self._routed:
            vars(layer).pop("_site")
            layer.__class__ = stock[type(layer)]
        self._routed, self._unroutable, self._routing_hooks = [], [], []

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        self._leave_model()  # what is left is a model of its own
        return model

    # Calls.

    def forward(
        self, *args: Any, routing_weights: Tensor | None = None, mixture: str | None = None, **kwargs: Any
    ) -> Any:
        frame = current(self._host)
        if frame is None or frame.depth or routing_weights is not None or mixture is not None:
            frame = self._frame(routing_weights, mixture)
        with Entered(frame):  # else it is the frame of PeftModel.forward, which has taken the keywords
            return self.model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        routing_weights: Tensor | None = None,
        mixture: str | None = None,
        routing_tail: str = "hold",
        **kwargs: Any,
    ) -> Any:
        frame = current(self._host)  # of PeftModel.generate, which has taken the keywords
        if frame is None or routing_weights is not None:
            frame = self._frame(routing_weights, mixture, routing_tail)
        if frame is not None:
            frame.generating = True
            check_generate(frame, self.model, args, kwargs)
        with Entered(frame):
            return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        frame = self._frame()
        if KEYWORDS & kwargs.keys() or (frame is not None and frame.two_passes):  # transformers would ignore the former
            raise continuous_batching()
        return self.model.generate_batch(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What `PeftModel` wraps around forward and generate; here our keywords arrive."""
        weights = kwargs.pop("routing_weights", None)
        mixture = kwargs.pop("mixture", None)
        tail = kwargs.pop("routing_tail", "hold")
        if kwargs.get("adapter_names") is not None and (weights is not None or isinstance(self.router, Router)):
            raise ValueError("adapter_names can't be used together with routing weights or a router: use one of them")
        frame = self._frame(weights, mixture, tail)
        paged = kwargs.get("cache_implementation") == "paged"
        if paged and (weights is not None or (frame is not None and frame.two_passes)):
            raise continuous_batching()
        stock: Any = nullcontext()
        if self.has_hooks:
            # In one expression: torch.compile of torch 2.11 takes no super() that is kept.
            stock = _Undone(super()._enable_peft_forward_hooks(*args, **kwargs))  # type: ignore[misc]
        with stock, Entered(frame):
            yield

    def _frame(self, weights: Any = None, mixture: str | None = None, tail: str = "hold") -> Frame | None:
        """The frame of a call with these keywords; None where nothing is to be routed."""
        if mixture is not None:
            check_mixture(mixture)
        if tail not in TAILS:
            raise ValueError(f"routing_tail must be one of {TAILS}, got {tail!r}")
        router = self.router if weights is None and isinstance(self.router, Router) else None
        layers = itertools.chain(self._routed, (layer for _, layer in self._unroutable))
        if weights is None and (router is None or all(layer.disable_adapters for layer in layers)):
            if mixture == "logits" and router is None:
                raise ValueError("mixture='logits' needs routing_weights or an attached moelora Router")
            return None
        if "_is_replica" in vars(self):
            raise RuntimeError(_REPLICA)
        experts = list(self.active_adapters)
        self._check_routable(experts)
        given = None if weights is None else as_given(weights)
        return Frame(self._host, experts, given=given, router=router, mixture=mixture or self._host.mixture, tail=tail)

    def _check_routable(self, experts: list[str]) -> None:
        if not self._routed and not self._unroutable:
            raise ValueError("there is no layer with adapters to route: the adapters were unloaded or merged")
        if self._routed and getattr(getattr(self._routed[0], "_site", None), "host", None) is not self._host:
            raise ValueError(
                "another PeftModel was made of the same base model, whose layers follow that one now: call that one, "
                "or make each of a base of its own"
            )
        for name, layer in self._unroutable:
            if any(expert in layer.r for expert in experts):
                raise ValueError(
                    f"{name} ({type(layer).__name__}) can't be routed: leave it out of target_modules, or call without "
                    "routing weights and router"
                )

    # Hooks.

    def _running(self) -> Frame | None:
        """The frame of the call that is under way; one that a KeyboardInterrupt has left is taken away."""
        frame = current(self._host)
        while frame is not None and frame.is_left_over():
            put(frame.around)
            frame = current(self._host)
        return frame

    def _before_model(
        self, parameters: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The model is about to run, or what is below its head, within the model or on its own."""
        host = self._host
        frame = self._running()
        if frame is not None and (frame.off or module is not self.model):
            return None
        if frame is not None:
            frame.depth += 1
            if frame.depth > 1:
                raise RuntimeError(
                    f"{type(module).__name__} was called while a routed call of it is under way, whose weights it "
                    "would take: call the adopted PeftModel, which keeps the two apart"
                )
        check_consumed(module, kwargs)
        made_here = frame is None
        if frame is None:
            frame = self._frame()
        if frame is None:
            return None
        if "_is_replica" in vars(module):
            raise RuntimeError(_REPLICA)
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        alone = not host.encoder_decoder
        call = read_call(arguments, transformer=host.transformer, per_token=alone and frame.per_token, of_text=alone)
        balance = None
        if frame.router is not None and module.training:
            shares = shares_of_step(arguments, shifted=host.shifts_labels)
            if shares is not None:
                config = self.moe_config or MoELoraConfig
                routings = host.num_layers if frame.router.reads == "layers" else 1
                balance = Balance(config.load_balance_loss_type, config.router_aux_loss_coef, routings, shares)
        changed = None
        if frame.mixture == "logits":
            logits.check(frame, module, call, arguments)
        frame.continues = frame.custom and continues(arguments)
        frame.begin(call, balance)
        if torch.is_grad_enabled():
            self._carry_into_checkpoints()
        if frame.two_passes:
            hidden_states, first = last_hidden_states(host, self.model, arguments)
            frame.caches = first, cache_among(arguments)
            frame.see_last_hidden(hidden_states)
        if frame.mixture == "logits":
            repeated, frame.loss = logits.spread(frame, module, call, arguments)
            changed = (), repeated
        if made_here:
            frame.enter_by_hook(module)
            frame.depth = 1
        if frame.router is not None and frame.router.reads == "embeddings":
            embeddings = arguments.get("inputs_embeds")
            if embeddings is not None:
                frame.see_embeddings(embeddings if changed is None else repeated["inputs_embeds"])
            elif not torch.compiler.is_compiling():
                self._watch_embeddings(frame.router)
        return changed

    def _after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        frame = current(self._host)
        if frame is None or frame.off or (module is not self.model and frame.entered_by is not module):
            return None
        frame.depth -= 1
        if frame.depth:  # of a call inside it, which was refused
            return None
        try:
            if output is None:  # it raised
                return None
            if frame.caches is not None:
                first, cache = frame.caches
                if cache is None and isinstance(output, Mapping):
                    cache = cache_among(output)
                keep(first, cache)
            if frame.mixture == "logits":
                output = logits.mix(frame, module, output, frame.loss)
            # Nobody sees the outputs inside generate.
            return self._with_balance(frame, output) if frame.outputs and not frame.generating else output
        finally:
            if frame.entered_by is module:
                put(frame.around)

    def _with_balance(self, frame: Frame, output: Any) -> Any:
        """The output with the load balancing loss of the router, in training as a term of its loss."""
        balance = frame.balance
        if balance is None:
            loss = router_aux_loss(frame.outputs, (self.moe_config or MoELoraConfig).load_balance_loss_type)
        else:
            loss = balance.loss()
        if isinstance(output, tuple):  # return_dict=False: with labels the loss comes first
            if balance is None or not balance.in_loss or output[0].numel() != 1:
                return output
            return (output[0] + balance.term(loss), *output[1:])
        # An attribute, no key: Trainer takes every key of an evaluation's output for predictions.
        output.router_aux_loss = loss
        if balance is not None and balance.in_loss and getattr(output, "loss", None) is not None:
            output.loss = output.loss + balance.term(loss).to(output.loss.device)
        counted = getattr(output, "label_mask", None)
        if balance is not None and counted is not None:  # trl's fused head
            output.log_probs = balance.observe(output.log_probs, counted)
        return output

    def _before_stack(
        self,
        parameters: tuple[str, ...],
        encoding: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """The encoder or the decoder is about to run, within the model or, as generate does it, on its own."""
        check_consumed(module, kwargs)
        frame = self._running()
        if frame is None:
            frame = self._frame()
            if frame is None:
                return
            frame.enter_by_hook(module)
            if torch.is_grad_enabled():
                self._carry_into_checkpoints()
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        call = read_call(arguments, transformer=self._host.transformer, per_token=frame.per_token)
        frame.begin_stack(call, encoding=encoding)
        if not encoding and arguments.get("encoder_hidden_states") is not None:
            frame.see_encoded(arguments["encoder_hidden_states"])

    def _after_stack(self, module: nn.Module, args: Any, output: Any) -> None:
        frame = current(self._host)
        if frame is not None and frame.entered_by is module:
            put(frame.around)

    def _before_attention(
        self, position: int, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        frame = current(self._host)
        if frame is not None:
            frame.memory = args[position] if position < len(args) else kwargs.get(name)

    def _carry_into_checkpoints(self) -> None:
        for module, index in self._checkpointing:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Recompute):
                vars(module)["_gradient_checkpointing_func"] = Recompute(self._host, index, function)


class _Undone:
    """A context of PEFT that is left as if nothing had been raised, since it takes its hooks off only then."""

    def __init__(self, context: AbstractContextManager[None]) -> None:
        self.context = context

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(None, None, None)


_REPLICA = (
    "nn.DataParallel can't route: it would cut routing_weights [N] apart, and its replicas have no parameters: use "
    "DistributedDataParallel, or call without routing weights and router"
)
