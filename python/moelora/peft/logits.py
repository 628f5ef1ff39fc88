"""``mixture="logits"``: the N passes of old in one call on a batch that holds every sequence once for each expert.

Block e of the batch runs with expert e alone, and the logits of the blocks are mixed by the routing weights. This is
what projects did before: exact, N times the activations, and the oracle for everything that mixes at each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from moelora.peft.call import Call, cache_among
from moelora.peft.frame import Frame

_BATCHED = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
)
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")


def spread(
    frame: Frame, model: nn.Module, call: Call, arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the forward on the N-fold batch, and those that belong to the loss.

    Parameters
    ----------
    frame : Frame
        Begun with `call`; gets one-hot weights for the N-fold batch, and keeps its own for the logits.
    model : nn.Module
        The transformers model that is about to run.
    call : Call
        What the hook has seen.
    arguments : dict
        The arguments of its forward, by name.

    Raises
    ------
    ValueError
        If a tensor's batch axis is not known.
    """
    n, batch = len(frame.experts), call.batch
    assert batch is not None
    repeated, loss = {}, {}
    for name, value in arguments.items():
        if name in _OF_THE_LOSS:
            loss[name] = value
        elif not isinstance(value, Tensor) or name == "logits_to_keep":
            repeated[name] = value
        elif name in _BATCHED and value.shape[0] == batch and (name != "position_ids" or value.dim() == 2):
            repeated[name] = value.repeat(n, *(1 for _ in value.shape[1:]))
        elif name in _BATCHED and value.shape[0] == 1:
            repeated[name] = value
        else:
            raise ValueError(f"mixture='logits' can't repeat {name} of shape {tuple(value.shape)} for each expert")
    if "use_cache" in frame.host.parameters:
        repeated["use_cache"] = False
    frame.call, frame.blend = call._replace(batch=n * batch), frame.now
    frame.now = torch.eye(n, device=call.device).repeat_interleave(batch, 0)
    return repeated, loss


def check(frame: Frame, model: nn.Module, call: Call, arguments: dict[str, Any]) -> None:
    """Refuse, before the frame begins, what has no exact result in this mode."""

    def asked(name: str) -> Any:
        value = arguments.get(name)
        return getattr(model.config, name, None) if value is None else value

    if not isinstance(model, PreTrainedModel) or call.batch is None:
        raise ValueError(f"mixture='logits' needs a transformers model called with tokens, got {type(model).__name__}")
    if frame.generating or frame.call is not None:
        raise ValueError(
            "mixture='logits' can't generate: call the model on the whole sequence, or use mixture='layer'"
        )
    if frame.encoder is not None:
        raise ValueError("mixture='logits' mixes once, so it takes no weights for each stack: pass [N] or [B, N]")
    if frame.given is not None and frame.given.dim() == 4:
        raise ValueError("mixture='logits' mixes once, so it takes no routing_weights [B, S, L, N]: pass [B, S, N]")
    if frame.router is not None and frame.router.reads in ("layer", "layers"):
        raise ValueError(
            f"mixture='logits' can't use {type(frame.router).__name__}, which reads hidden states that each expert "
            "changes: pass routing_weights"
        )
    if arguments.get("use_cache") or cache_among(arguments) is not None:
        raise ValueError("mixture='logits' has no cache: pass use_cache=False and no cache")
    for name in ("output_hidden_states", "output_attentions"):
        if asked(name):
            raise ValueError(f"mixture='logits' has no single result for {name}: use mixture='layer'")
    if asked("return_dict") is False:
        raise ValueError("mixture='logits' returns a ModelOutput: leave return_dict on")
    causal = model.loss_type in (None, "ForCausalLM") and model.can_generate() and not frame.host.encoder_decoder
    if arguments.get("labels") is not None and not causal:
        raise ValueError(
            f"mixture='logits' knows the loss of causal language models only, {type(model).__name__} is none: pass no "
            "labels and compute it from outputs.logits"
        )


def mix(frame: Frame, model: nn.Module, output: Any, loss: dict[str, Any]) -> ModelOutput:
    """The output with the logits of the experts mixed, and the loss of the mixed logits where labels were given."""
    logits = getattr(output, "logits", None)
    assert isinstance(model, PreTrainedModel)
    if not isinstance(output, ModelOutput) or not isinstance(logits, Tensor):
        raise ValueError(
            f"mixture='logits' needs outputs.logits, {type(model).__name__} returned {type(output).__name__}"
        )
    n = len(frame.experts)
    each = logits.unflatten(0, (n, -1))  # [N, B, ...]
    assert frame.blend is not None and frame.call is not None
    weights = frame.blend.to(each.device)
    if weights.dim() == 3:
        weights = frame.call.kept(weights)
        if each.dim() != 4 or weights.shape[:2] != each.shape[1:3]:
            raise ValueError(
                f"routing_weights of shape {tuple(weights.shape)} can't mix logits of shape {tuple(each.shape[1:])}: "
                "pass [N] or [B, N]"
            )
    weights = weights.movedim(-1, 0)
    weights = weights.reshape(*weights.shape, *(1 for _ in range(each.dim() - weights.dim())))
    mixed = (each * weights).sum(0).to(logits.dtype)
    value = None
    if loss.get("labels") is not None:
        vocab_size = model.config.get_text_config().vocab_size
        value = model.loss_function(logits=mixed, vocab_size=vocab_size, **loss)
    return type(output)(loss=value, logits=mixed)
