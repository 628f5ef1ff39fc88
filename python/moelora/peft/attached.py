"""The router of an adopted model: attached, detached, fed with what it reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from moelora.nn.routers import Router, build_router
from moelora.peft.config import MoELoraConfig
from moelora.peft.frame import Host, columns, current


class AttachedRouter(BaseTuner):
    """What a tuner of an adopted model knows about its router."""

    _host: Host
    _decoder_layers: list[nn.Module]
    _router_hooks: list[Any]

    def attach_router(self, router: nn.Module, moe_config: MoELoraConfig | None = None) -> None:
        """Attach the module that decides which expert takes which token.

        A `moelora.nn.Router` acts by itself from now on: it makes the weights of every forward without explicit ones,
        in the same pass. Any other module serves `get_routing_weights` alone. The router becomes a submodule
        (``base_model.router``): it takes the model's device and mode (train or eval), follows them, and is in
        ``state_dict()``, but not in adapter files.

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
            adapters: PEFT saves what has the name of an adapter's parameters (``lora_*``, ``hada_*``, ``lokr_*``), and
            every bias if a configuration has ``bias="all"``.
        """
        if not isinstance(router, nn.Module):
            raise TypeError(f"router must be a torch.nn.Module, got {type(router).__name__}")
        if moe_config is not None and not isinstance(moe_config, MoELoraConfig):
            raise TypeError(f"moe_config must be a MoELoraConfig, got {type(moe_config).__name__}")
        if any(module is router for module in self.modules() if module is not self.router):
            raise ValueError("router is a submodule of the model already: pass its output as routing_weights instead")
        saved_by_name = [name for name in router.state_dict() if self.prefix in name]
        if saved_by_name:
            raise ValueError(
                f"router has {saved_by_name}, which PEFT would save with the adapters: rename without {self.prefix!r}"
            )
        for config in self.peft_config.values():
            _check_bias(config)
        if isinstance(router, Router):
            self._check_router(router)
        if self.router is not None:
            warnings.warn("the router that was attached is replaced", stacklevel=2)
            self.detach_router()
        self._moe_config = moe_config
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), None)
        self._modules["router"] = router.to(device) if device is not None else router
        router.train(self.training)
        if isinstance(router, Router):
            self._watch_for(router)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if self.router is not None:
            _check_bias(config)

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
        elif router.reads == "layers" and (gates := getattr(router, "num_layers", have)) != have:
            raise ValueError(f"router has gates for {gates} layers, the model has {have} decoder layers")
        if router.input_size is not None and router.input_size != width:
            raise ValueError(f"router reads inputs of width {router.input_size}, the {router.reads} have width {width}")

    def _hidden_size(self) -> int:
        size: int = self.model.config.get_text_config().hidden_size
        return size

    def _watch_for(self, router: Router) -> None:
        """Hook what the router reads, and nothing else."""
        self._watch_nothing()
        layers = list(enumerate(self._decoder_layers))
        if router.reads == "embeddings":
            self._router_hooks = [self.model.get_input_embeddings().register_forward_hook(self._after_embeddings)]
        elif router.reads in ("layer", "layers"):
            self._router_hooks = [
                layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
                for index, layer in layers
                if router.reads == "layers" or index == router.layer
            ]

    def _watch_nothing(self) -> None:
        for hook in self._router_hooks:
            hook.remove()
        self._router_hooks = []

    def _watch_embeddings(self, router: Router) -> None:
        """Hook the input embeddings anew where others have taken the place of those that the router reads."""
        (hook,) = self._router_hooks
        if hook.id not in self.model.get_input_embeddings()._forward_hooks:
            self._watch_for(router)

    def detach_router(self) -> None:
        """Detach the router; a forward without weights is PEFT's plain sum again. Nothing happens without one."""
        self._watch_nothing()
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

    def _after_embeddings(self, module: nn.Module, args: Any, output: Tensor) -> None:
        frame = current(self._host)
        if frame is not None and frame.router is not None:
            frame.see_embeddings(output)

    def _before_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frame = current(self._host)
        if frame is not None:
            frame.reach(index, args[0] if args else kwargs["hidden_states"])


def _check_bias(config: Any) -> None:
    if getattr(config, "bias", "none") == "all":
        raise ValueError("adapters with bias='all' would be saved with the router's biases: use bias='lora_only'")
