"""Hosting in PEFT: `adopt` a model, and the tuner class that routes it."""

from __future__ import annotations

import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import peft
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_layers import GradientCheckpointingLayer

from moelora.nn.losses import router_aux_loss
from moelora.nn.routers import Router, build_router
from moelora.peft import logits, quantized
from moelora.peft.balance import Balance, loss_shifts_labels, share_of_step
from moelora.peft.checkpoint import read_mixture
from moelora.peft.config import MoELoraConfig, mark_hosted
from moelora.peft.embedding import Embedding
from moelora.peft.frame import (
    MIXTURES,
    TAILS,
    Call,
    Entered,
    Frame,
    Host,
    Recompute,
    Site,
    as_given,
    columns,
    current,
    put,
)
from moelora.peft.layers import Linear, Routed
from moelora.peft.peft_model import RoutedPeftModel, routed_class

# Stock class -> the routed class that takes its place. Everything else is refused when weights arrive.
ROUTED: dict[type[lora.LoraLayer], type[Routed]] = {
    lora.Linear: Linear,
    lora.Embedding: Embedding,
} | quantized.ROUTED

# The arguments of generate whose first axis is the batch, as many sequences as there are weights for.
_PROMPTS = ("inputs", "inputs_embeds", "input_ids", "input_features", "input_values", "pixel_values")

KEYWORDS = frozenset({"routing_weights", "mixture", "routing_tail"})

Model = TypeVar("Model", bound=nn.Module)


def adopt(model: Model, *, mixture: str = "layer") -> Model:
    """Make a PEFT model routable, in place.

    It, its LoRA layers and its ``base_model`` become routed subclasses of themselves: same parameters, same names, same
    checkpoint, and the same bits as long as no routing weights are in play. Afterwards ``model(...)`` and
    ``model.generate(...)`` take ``routing_weights``, and ``model.base_model`` takes a router
    (`LoraModel.attach_router`). A model that can't be routed (IA3, DoRA, ...) is adopted too: it runs PEFT's code, and
    weights are refused.

    Parameters
    ----------
    model : peft.PeftModel or peft.PeftMixedModel
        Adopting it again only changes `mixture`.
    mixture : {"layer", "logits"}
        What routing weights mix when a call does not say: the adapters in each layer, in one pass; or the logits of the
        experts, as N passes did.

    Returns
    -------
    peft.PeftModel
        The model itself.

    Raises
    ------
    TypeError
        If `model` is not a PEFT model.
    ValueError
        If `mixture` is neither of the two.
    """
    if not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    _check_mixture(mixture)
    tuner = model.base_model
    if type(tuner) is lora.LoraModel:
        tuner.__class__ = LoraModel
        tuner._route_layers()
    if isinstance(tuner, LoraModel):
        tuner._host.mixture = mixture
        model.special_peft_forward_args.update(KEYWORDS)
        if not isinstance(model, RoutedPeftModel):
            stock: Any = type(model)
            model.__class__ = routed_class(stock)
    else:
        reason = f"{type(model).__name__} with {type(tuner).__name__} can't be routed, only LoRA in a PeftModel can"
        for module in _entrances(model):
            if not any(isinstance(hook, _Refusal) for hook in module._forward_pre_hooks.values()):
                module.register_forward_pre_hook(_Refusal(reason), with_kwargs=True)
    return model


def release(model: Model) -> Model:
    """Undo `adopt`: detach the router and give the stock classes of PEFT back, in place.

    Returns the model itself; one that is not adopted is left as it is.
    """
    if not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    tuner = model.base_model
    if isinstance(tuner, LoraModel):
        tuner._leave_model()
        for name in _ADOPTED:
            vars(tuner).pop(name, None)
        tuner.__class__ = lora.LoraModel  # type: ignore[assignment]
        model.special_peft_forward_args.difference_update(KEYWORDS)
        if isinstance(model, RoutedPeftModel):
            model.__class__ = model._stock_class
    else:
        for module in _entrances(model):
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _Refusal):
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


def open_pretrained(
    make: Callable[..., Any],
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **options: Any,
) -> Any:
    """PEFT's ``from_pretrained``, adopted; the folder of a whole mixture gives all its experts, and its router.

    Parameters
    ----------
    make : callable
        ``from_pretrained`` of the class that is wanted.
    model, model_id, adapter_name, is_trainable, **options
        As in PEFT. With another `adapter_name` than the default, one adapter is opened.
    """
    mixture = read_mixture(model_id) if adapter_name == "default" and not options.get("subfolder") else None
    if mixture is None:
        return adopt(make(model, model_id, adapter_name, is_trainable, **options))
    first, *others = mixture.experts
    opened = adopt(make(model, mixture.path(first), first, is_trainable, **options))
    for name in others:
        opened.load_adapter(str(mixture.path(name)), name, is_trainable=is_trainable, **options)
    opened.base_model.set_adapter(mixture.active, inference_mode=not is_trainable)
    if mixture.router is not None:
        router = mixture.make_router().requires_grad_(is_trainable)
        opened.base_model.attach_router(router.train(opened.training), mixture.config)
    return opened


def _entrances(model: nn.Module) -> list[nn.Module]:
    """Where a call of a PEFT model that can't be routed may come in; some tuners pass over the model's own call."""
    tuner: Any = model.base_model
    return [model, tuner, tuner.model] if isinstance(tuner, BaseTuner) else [model, tuner]


def activate_all_experts(model: nn.Module) -> list[str]:
    """Make every LoRA adapter active and trainable; return their names in the order of registration.

    Parameters
    ----------
    model : peft.PeftModel
        With LoRA adapters.

    Returns
    -------
    list of str
        What the columns of routing weights mean from now on.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, peft.PeftModel) or not isinstance(tuner, lora.LoraModel):
        raise TypeError(f"model must be a PeftModel with LoRA adapters, got {type(model).__name__}")
    names = list(tuner.peft_config)
    tuner.set_adapter(names)
    return names


# Attributes that adopting adds to the tuner.
_ADOPTED = (
    "_checkpointing",
    "_decoder_layers",
    "_host",
    "_moe_config",
    "_routed",
    "_router_hooks",
    "_routing_hooks",
    "_unroutable",
)


class LoraModel(lora.LoraModel):
    """The tuner of an adopted model: `peft.LoraModel` that routes, and holds the router.

    It is `model.base_model`, so its methods are reached through the model too.
    """

    # Life: what adopting adds, and takes away again.

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
        self._route_layers()  # modules that had no adapter until now are stock layers
        if isinstance(self.router, Router):
            self._watch_for(self.router)  # the embeddings may be a LoRA layer now

    def _route_layers(self) -> None:
        """Give every LoRA layer its routed class and its place in the model; watch the model's forward."""
        top = self.model
        if "_host" not in vars(self):
            self._host = Host()
            self._routing_hooks: list[Any] = []
            self._router_hooks: list[Any] = []
        if not self._routing_hooks:
            self._routing_hooks = [
                top.register_forward_pre_hook(self._before_model, with_kwargs=True),
                top.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
            ]
            if getattr(getattr(top, "config", None), "is_encoder_decoder", False):
                self._watch_stacks()
        for config in self.peft_config.values():
            mark_hosted(config)
        host = self._host
        host.transformer = isinstance(top, PreTrainedModel)
        host.encoder_decoder = bool(getattr(getattr(top, "config", None), "is_encoder_decoder", False))
        host.shifts_labels = loss_shifts_labels(top)
        host.parameters = _parameters(top)
        stack, self._decoder_layers = _decoder(top)
        host.num_layers = len(self._decoder_layers)
        layer_of = {id(m): i for i, layer in enumerate(self._decoder_layers) for m in layer.modules()}
        inside = {id(m) for m in stack.modules()}
        # Beside another tower (images, ...), only the text stack and the head see the tokens of the text.
        alone = host.encoder_decoder or all(
            id(m) in inside for m in top.modules() if isinstance(m, GradientCheckpointingLayer)
        )
        head = top.get_output_embeddings() if host.transformer else None
        embeddings = _token_embeddings(top, stack) if host.transformer else set()
        self._routed: list[Routed] = []
        self._unroutable: list[tuple[str, lora.LoraLayer]] = []
        index_of = {id(layer): i for i, layer in enumerate(self._decoder_layers)}
        self._checkpointing = [(m, index_of.get(id(m))) for m in top.modules() if hasattr(m, "gradient_checkpointing")]
        for name, module in top.named_modules():
            if type(module) in ROUTED:
                module.__class__ = ROUTED[type(module)]
            if isinstance(module, Routed):
                ids = isinstance(module, Embedding)
                aligned = id(module) in embeddings if ids else alone or id(module) in inside or module is head
                module._site = Site(host, name, layer_of.get(id(module)), aligned, module is head, ids)
                self._routed.append(module)
            elif isinstance(module, lora.LoraLayer):
                self._unroutable.append((name, module))

    def _watch_stacks(self) -> None:
        """Hook the two stacks of an encoder-decoder model, and the attention of one to the other."""
        top: Any = self.model
        encoder, decoder = top.get_encoder(), top.get_decoder()
        for stack in {encoder, decoder} - {top}:
            before = partial(self._before_stack, _parameters(stack), stack is encoder)
            self._routing_hooks += [
                stack.register_forward_pre_hook(before, with_kwargs=True),
                stack.register_forward_hook(self._after_stack, always_call=True),
            ]
        reading = {module: name for module in decoder.modules() if (name := _reads_encoder(module))}
        for module, name in reading.items():
            if not any(inner in reading for inner in module.modules() if inner is not module):
                before = partial(self._before_attention, _parameters(module).index(name), name)
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
        stock = {routed: plain for plain, routed in ROUTED.items()}
        for layer in self._routed:
            vars(layer).pop("_site")
            layer.__class__ = stock[type(layer)]  # type: ignore[assignment]
        self._routed, self._unroutable, self._routing_hooks = [], [], []

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        adapters = kwargs.get("adapter_names") or self.active_adapters
        if merge and len(adapters) > 1:
            warnings.warn(f"merging adds up the adapters {adapters} unweighted, as PEFT does", stacklevel=3)
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self._leave_model()  # what is left is a model of its own
        return model

    # The router.

    def attach_router(self, router: nn.Module, moe_config: MoELoraConfig | None = None) -> None:
        """Attach the module that decides which expert takes which token.

        A `moelora.nn.Router` acts by itself from now on: it makes the weights of every forward without explicit ones,
        in the same pass. Any other module serves `get_routing_weights` alone. The router becomes a submodule
        (``base_model.router``): it follows ``.to()``, train and eval, and is in ``state_dict()``, but not in adapter
        files.

        Parameters
        ----------
        router : nn.Module
            Replaces one that is attached already, with a warning.
        moe_config : MoELoraConfig, optional
            Whose load balancing loss counts. Default: that of the adapters, if they have one, else the default values.

        Raises
        ------
        TypeError
            If `router` is not a module, or `moe_config` not a `MoELoraConfig`.
        ValueError
            If the router is part of the model already, reads what this model does not have, or would be saved with the
            adapters: PEFT saves what is named ``lora_*``, and every bias if a configuration has ``bias="all"``.
        """
        if not isinstance(router, nn.Module):
            raise TypeError(f"router must be a torch.nn.Module, got {type(router).__name__}")
        if moe_config is not None and not isinstance(moe_config, MoELoraConfig):
            raise TypeError(f"moe_config must be a MoELoraConfig, got {type(moe_config).__name__}")
        if any(module is router for module in self.modules() if module is not self.router):
            raise ValueError("router is a submodule of the model already: pass its output as routing_weights instead")
        saved_by_name = [name for name in router.state_dict() if "lora_" in name]
        if saved_by_name:
            raise ValueError(
                f"router has {saved_by_name}, which PEFT would save with the adapters: rename without 'lora_'"
            )
        if any(getattr(config, "bias", "none") == "all" for config in self.peft_config.values()):
            raise ValueError("adapters with bias='all' would be saved with the router's biases: use bias='lora_only'")
        if isinstance(router, Router):
            self._check_router(router)
        if self.router is not None:
            warnings.warn("the router that was attached is replaced", stacklevel=2)
            self.detach_router()
        self._moe_config = moe_config
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), None)
        self._modules["router"] = router.to(device) if device is not None else router
        if isinstance(router, Router):
            self._watch_for(router)

    def make_router(self, moe_config: MoELoraConfig) -> Router:
        """Build the router that ``moe_config.router_type`` names, for this model and its active adapters.

        Raises
        ------
        ValueError
            If the type is learned and the model has no decoder layers to read, or ``router_hidden_size`` is not their
            width.
        """
        num_layers = self._host.num_layers
        if moe_config.router_type != "fixed":
            self._check_readable("layers")
        hidden_size = self._hidden_size() if num_layers else 0
        return build_router(
            moe_config, hidden_size=hidden_size, num_layers=num_layers, expert_names=self.active_adapters
        )

    def _check_readable(self, reads: str) -> None:
        if self._host.encoder_decoder or not self._decoder_layers:
            raise ValueError(
                f"a router that reads {reads!r} needs a transformers model with one stack of decoder layers, got "
                f"{type(self.model).__name__}: use router_type='fixed' or pass routing_weights [N] or [B, N]"
            )

    def _check_router(self, router: Router) -> None:
        if router.reads == "nothing":
            return
        self._check_readable(router.reads)
        have = len(self._decoder_layers)
        width = self._hidden_size()
        if router.reads == "embeddings":
            width = self.model.get_input_embeddings().weight.shape[-1]
        elif router.reads == "layer":
            layer: Any = router.layer
            if not 0 <= layer < have:
                raise ValueError(f"router reads layer {layer}, the model has {have} decoder layers")
        elif (gates := getattr(router, "num_layers", have)) != have:
            raise ValueError(f"router has gates for {gates} layers, the model has {have} decoder layers")
        if router.input_size is not None and router.input_size != width:
            raise ValueError(f"router reads inputs of width {router.input_size}, the {router.reads} have width {width}")

    def _hidden_size(self) -> int:
        size: int = self.model.config.get_text_config().hidden_size
        return size

    def _watch_for(self, router: Router) -> None:
        """Hook what the router reads, and nothing else."""
        for hook in self._router_hooks:
            hook.remove()
        layers = list(enumerate(self._decoder_layers))
        if router.reads == "embeddings":
            self._router_hooks = [self.model.get_input_embeddings().register_forward_hook(self._after_embeddings)]
        elif router.reads in ("layer", "layers"):
            self._router_hooks = [
                layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
                for index, layer in layers
                if router.reads == "layers" or index == router.layer
            ]

    def detach_router(self) -> None:
        """Detach the router; a forward without weights is PEFT's plain sum again. Nothing happens without one."""
        for hook in self._router_hooks:
            hook.remove()
        self._router_hooks = []
        self._modules.pop("router", None)

    def has_router(self) -> bool:
        """Whether a router is attached."""
        return self.router is not None

    @property
    def router(self) -> nn.Module | None:
        """The attached router."""
        router: nn.Module | None = self._modules.get("router")
        return router

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        # PEFT saves every named child of a tuner with each adapter; the router is none of them.
        return (named for named in super().named_children() if named[1] is not self.router)

    def children(self) -> Iterator[nn.Module]:
        # What .to(), train() and apply() walk over.
        return (module for _, module in super().named_children())

    @property
    def moe_config(self) -> MoELoraConfig | None:
        """The configuration given with the router, else the first `MoELoraConfig` among the adapters'."""
        given: MoELoraConfig | None = self.__dict__.get("_moe_config")
        if given is not None:
            return given
        return next((config for config in self.peft_config.values() if isinstance(config, MoELoraConfig)), None)

    def get_routing_weights(self, hidden_states: Tensor) -> Any:
        """What the attached router makes of `hidden_states`: weights [..., N] of the active experts.

        Parameters
        ----------
        hidden_states : Tensor [..., H]

        Returns
        -------
        Tensor [..., N]
            Ready to be passed as ``routing_weights``; a router with a gate per layer uses the last. None without a
            router. A module that is not a `moelora.nn.Router` decides itself what it returns.
        """
        router = self.router
        if router is None:
            return None
        if isinstance(router, Router):
            return router(hidden_states, active=columns(router, self.active_adapters))
        return router(hidden_states)

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
            if frame.given is not None:
                _check_generate(frame, self.model, args, kwargs)
        with Entered(frame):
            return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        if KEYWORDS & kwargs.keys():  # transformers would ignore them
            raise _continuous()
        return self.model.generate_batch(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What `PeftModel` wraps around forward and generate; here our keywords arrive."""
        weights = kwargs.pop("routing_weights", None)
        mixture = kwargs.pop("mixture", None)
        tail = kwargs.pop("routing_tail", "hold")
        if kwargs.get("adapter_names") is not None and (weights is not None or isinstance(self.router, Router)):
            raise ValueError("adapter_names can't be used together with routing weights or a router: use one of them")
        if weights is not None and kwargs.get("cache_implementation") == "paged":
            raise _continuous()
        frame = self._frame(weights, mixture, tail)
        with _Undone(super()._enable_peft_forward_hooks(*args, **kwargs)), Entered(frame):
            yield

    def _frame(self, weights: Any = None, mixture: str | None = None, tail: str = "hold") -> Frame | None:
        """The frame of a call with these keywords; None where nothing is to be routed."""
        if mixture is not None:
            _check_mixture(mixture)
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
        if not self._routed and not self._unroutable:
            raise ValueError("there is no LoRA layer to route: the adapters were unloaded or merged")
        for name, layer in self._unroutable:
            if any(expert in layer.r for expert in experts):
                raise ValueError(
                    f"{name} ({type(layer).__name__}) can't be routed: leave it out of target_modules, or call without "
                    "routing weights and router"
                )
        given = None if weights is None else as_given(weights)
        return Frame(self._host, experts, given=given, router=router, mixture=mixture or self._host.mixture, tail=tail)

    # Hooks.

    def _running(self) -> Frame | None:
        """The frame of the call that is under way; one that a KeyboardInterrupt has left is taken away."""
        frame = current(self._host)
        while frame is not None and frame.is_left_over():
            put(frame.around)
            frame = current(self._host)
        return frame

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        host = self._host
        frame = self._running()
        if frame is not None:
            frame.depth += 1
            if frame.depth > 1:
                raise RuntimeError(
                    f"{type(module).__name__} was called while a routed call of it is under way, whose weights it "
                    "would take: call the adopted PeftModel, which keeps the two apart"
                )
        _check_consumed(module, kwargs)
        made_here = frame is None
        if frame is None:
            frame = self._frame()
        if frame is None:
            return None
        if "_is_replica" in vars(module):
            raise RuntimeError(_REPLICA)
        arguments = dict(zip(host.parameters, args, strict=False)) | kwargs
        alone = not host.encoder_decoder
        call = _read_call(host, arguments, per_token=alone and frame.per_token, of_text=alone)
        balance = None
        if frame.router is not None and module.training:
            share = share_of_step(arguments, shifted=host.shifts_labels)
            if share is not None:
                config = self.moe_config or MoELoraConfig
                routings = host.num_layers if frame.router.reads == "layers" else 1
                balance = Balance(config.load_balance_loss_type, config.router_aux_loss_coef, routings, share)
        changed = None
        if frame.mixture == "logits":
            logits.check(frame, module, call, arguments)
            frame.begin(call, balance)
            repeated, frame.loss = logits.spread(frame, module, call, arguments)
            changed = (), repeated
        else:
            frame.begin(call, balance)
        if torch.is_grad_enabled():
            self._carry_into_checkpoints()
        if made_here:
            frame.enter_by_hook(module)
            frame.depth = 1
        embeddings = arguments.get("inputs_embeds")
        if embeddings is not None and frame.router is not None and frame.router.reads == "embeddings":
            frame.see_embeddings(embeddings if changed is None else repeated["inputs_embeds"])
        return changed

    def _after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        frame = current(self._host)
        if frame is None:
            return None
        frame.depth -= 1
        if frame.depth:  # of a call inside it, which was refused
            return None
        try:
            if output is None:  # it raised
                return None
            if frame.mixture == "logits":
                output = logits.mix(frame, module, output, frame.loss)
            return self._with_balance(frame, output) if frame.outputs else output
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
            if balance is None or output[0].numel() != 1:
                return output
            return (output[0] + balance.term(loss), *output[1:])
        # An attribute, no key: Trainer takes every key of an evaluation's output for predictions.
        output.router_aux_loss = loss
        if balance is not None and getattr(output, "loss", None) is not None:
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
        _check_consumed(module, kwargs)
        frame = self._running()
        if frame is None:
            frame = self._frame()
            if frame is None:
                return
            frame.enter_by_hook(module)
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        frame.begin_stack(_read_call(self._host, arguments, per_token=frame.per_token), encoding=encoding)
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

    def _after_embeddings(self, module: nn.Module, args: Any, output: Tensor) -> None:
        frame = current(self._host)
        if frame is not None and frame.router is not None:
            frame.see_embeddings(output)

    def _before_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frame = current(self._host)
        if frame is not None:
            frame.reach(index, args[0] if args else kwargs["hidden_states"])

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


class _Refusal:
    """Pre-hook of a model that can't be routed: weights must not be swallowed by its **kwargs."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if "routing_weights" in kwargs or "mixture" in kwargs:
            raise TypeError(f"{self.reason}: call it without routing_weights and mixture")


def _check_mixture(mixture: str) -> None:
    if mixture not in MIXTURES:
        raise ValueError(f"mixture must be one of {MIXTURES}, got {mixture!r}")


def _decoder(top: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The stack that sees the text, and its layers in order; the model itself, and none, if it is not transformers'."""
    stack: nn.Module = top.get_decoder() if isinstance(top, PreTrainedModel) else top  # type: ignore[no-untyped-call]
    layers: list[nn.Module] = []
    inner: set[int] = set()
    for module in stack.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inner:
            layers.append(module)
            inner.update(id(m) for m in module.modules())
    return stack, layers


def _token_embeddings(top: nn.Module, decoder: nn.Module) -> set[int]:
    """By id, the embeddings that look up the tokens of the text; others look up positions, token types, ..."""
    model: Any = top
    stacks = [model, decoder]
    if getattr(model.config, "is_encoder_decoder", False):
        stacks.append(model.get_encoder())
    found = set()
    for stack in stacks:
        with suppress(AttributeError, NotImplementedError):  # a stack that reads no text
            found.add(id(stack.get_input_embeddings()))
    return found


def _check_generate(frame: Frame, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse, before generate begins, what given weights can't follow."""
    if kwargs.get("cache_implementation") == "paged":
        raise _continuous()
    prompt = next((kwargs[name] for name in _PROMPTS if isinstance(kwargs.get(name), Tensor)), None)
    frame.check_batch(args[0] if args and isinstance(args[0], Tensor) else prompt)
    config = kwargs.get("generation_config") or model.generation_config
    guidance = kwargs.get("guidance_scale", config.guidance_scale)
    if frame.per_token and guidance not in (None, 1):
        raise ValueError(
            f"guidance_scale={guidance} runs the model on another prompt, for whose tokens there are no "
            "routing_weights: pass [N] or [B, N], or attach a router"
        )


def _continuous() -> ValueError:
    return ValueError(
        "continuous batching packs the tokens of all requests into one row, on a thread of its own, where "
        "routing_weights can't follow: attach a router, or call generate without cache_implementation='paged'"
    )


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _reads_encoder(module: nn.Module) -> str | None:
    """The argument in which a module of a decoder gets the encoder's output."""
    names = _parameters(module)
    return next((name for name in ("key_value_states", "encoder_hidden_states") if name in names), None)


def _check_consumed(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise where our keywords have come so far that a model would swallow them in its own keywords."""
    for name in ("routing_weights", "mixture"):
        if name in kwargs:
            raise TypeError(
                f"{name} reached {type(module).__name__}, which would ignore it: call the adopted PeftModel, not the "
                "model inside it"
            )


def _cached(arguments: dict[str, Any]) -> int:
    """How many tokens of the text the cache holds."""
    cache = next((arguments[name] for name in ALL_CACHE_NAMES if arguments.get(name) is not None), None)
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        raise ValueError(
            f"{type(cache).__name__} does not know how many tokens it holds, so routing_weights per token can't be "
            "matched: pass use_cache=False, weights [N] or [B, N], or attach a router"
        ) from None


def _read_call(host: Host, arguments: dict[str, Any], *, per_token: bool, of_text: bool = True) -> Call:
    """What this forward is about, from its arguments by name.

    The cache matters to weights per token alone; `of_text`: the input is the one text that the model, or stack, reads.
    """
    tokens = arguments.get("inputs_embeds")
    if tokens is None:
        tokens = arguments.get("input_ids")
    tensors = (a for a in arguments.values() if isinstance(a, Tensor) and a.dim() > 1)
    first = tokens if tokens is not None else next(tensors, None)
    device = None if first is None else first.device
    if not host.transformer or first is None:
        return Call(None, None, 0, None, None, device)
    seq = tokens.shape[1] if tokens is not None and of_text else None
    past = _cached(arguments) if per_token else 0
    keep = arguments.get("logits_to_keep")
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or seq is None or mask.shape[1] < seq:
        mask = None
    else:
        mask = mask[:, mask.shape[1] - seq :]
    return Call(first.shape[0], seq, past, None if isinstance(keep, int) and not keep else keep, mask, device)
