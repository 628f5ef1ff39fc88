"""moelora for torch: the routed LoRA product, routing, routers, their losses, and groups of parameters."""

from moelora.nn import ops as ops  # registers what compiled code calls
from moelora.nn.autograd import routed_lora, routed_lora_formula
from moelora.nn.losses import router_aux_loss
from moelora.nn.optim import parameter_groups
from moelora.nn.route import Routing, route
from moelora.nn.routers import (
    EmbeddingRouter,
    FixedRouter,
    HiddenStateRouter,
    LastHiddenRouter,
    LearnedRouter,
    PerLayerRouter,
    Router,
    RoutingOutput,
    build_router,
)

__all__ = [
    "EmbeddingRouter",
    "FixedRouter",
    "HiddenStateRouter",
    "LastHiddenRouter",
    "LearnedRouter",
    "PerLayerRouter",
    "Router",
    "Routing",
    "RoutingOutput",
    "build_router",
    "parameter_groups",
    "route",
    "routed_lora",
    "routed_lora_formula",
    "router_aux_loss",
]
