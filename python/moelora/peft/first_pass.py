"""The first of two passes, for a router that reads the last hidden states: the base model alone, and its cache.

While generating, the first pass needs keys and values of its own. They lie in further layers of the one cache that is
passed around, so whatever is done to that (cut, reordered for beams, repeated, reset, copied) is done to them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from moelora.peft.call import CACHES, cache_among
from moelora.peft.frame import Entered, Frame, Host

# What the arguments of a model's forward say about its outputs.
_OF_THE_OUTPUT = frozenset(
    {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict"}
    | {"output_hidden_states", "output_attentions", "output_router_logits"}
)
_FIRST = "_moelora_first_pass"  # attribute of a cache: that of the first pass, whose layers are its last ones


def last_hidden_states(host: Host, model: PreTrainedModel, arguments: dict[str, Any]) -> tuple[Tensor, Cache | None]:
    """Run the base of a model without adapters and without gradient.

    Parameters
    ----------
    host : Host
    model : PreTrainedModel
        The model inside, with its head.
    arguments : dict
        Of its forward, by name.

    Returns
    -------
    Tensor [B, S, H]
        The last hidden states.
    Cache or None
        What the pass has cached, for `keep`.

    Raises
    ------
    ValueError
        The cache that was passed can't hold a first pass, or the one it holds is not of its tokens.
    """
    known = host.base_parameters
    passed = {
        name: value
        for name, value in arguments.items()
        if name not in _OF_THE_OUTPUT and (name in known or "kwargs" in known)
    }
    for name in CACHES:
        if passed.get(name) is not None:
            passed[name] = _first_of(name, passed[name])
    with torch.no_grad(), Entered(Frame(host, [], off=True)):
        output = model.base_model(**passed, return_dict=True)
    return output.last_hidden_state, cache_among(output)


def keep(first: Cache | None, cache: Cache | None) -> None:
    """Let the cache of a forward hold that of its first pass; one of another kind stays without, for `_first_of`."""
    if not isinstance(first, Cache) or not isinstance(cache, Cache):
        return
    if not first.layers or getattr(cache, _FIRST, None) is first:
        return
    cache.layers.extend(first.layers)
    setattr(cache, _FIRST, first)


def _first_of(name: str, cache: Any) -> Cache:
    """The cache of the first pass that belongs to a cache."""
    layers = getattr(cache, "layers", [None])
    grows = isinstance(cache, Cache) and all(isinstance(layer, CacheLayerMixin) for layer in layers)
    if not grows or cache.offloading:
        raise ValueError(
            f"{type(cache).__name__} as {name} can't hold the first pass of a router that reads 'last_hidden': pass "
            "use_cache=False, or a DynamicCache or StaticCache that is not offloaded"
        )
    first: Cache | None = getattr(cache, _FIRST, None)
    if not torch.compiler.is_compiling():
        have, seen = int(cache.get_seq_length()), 0 if first is None else int(first.get_seq_length())
        if have != seen:
            raise ValueError(
                f"{name} holds {have} tokens, and the first pass of the router has seen {seen} of them: go on with the "
                "weights that the cache was made with, or start with an empty one"
            )
    return copy.deepcopy(cache) if first is None else first  # a copy: of the same kind
