"""What a transformers model is made of, as far as routing has to know."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# Classes of transformers whose layers get [S, B, H]. Where S = B, no shape tells.
_SEQUENCE_FIRST = ("FSMTDecoder", "FSMTEncoder", "LEDEncoderSelfAttention", "LongformerSelfAttention", "XLNetModel")


def decoder(top: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The stack that sees the text, and its layers in order; the model itself, and none, if it is not transformers'."""
    stack: nn.Module = top.get_decoder() if isinstance(top, PreTrainedModel) else top  # type: ignore[no-untyped-call]
    layers = _layers(stack)
    if not layers and isinstance(top, PreTrainedModel) and not getattr(top.config, "is_encoder_decoder", False):
        below: nn.Module = top.base_model  # ModernBERT calls its output layer the decoder
        if layers := _layers(below):
            stack = below
    return stack, layers


def _layers(stack: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = []
    inner: set[int] = set()
    for module in stack.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inner:
            layers.append(module)
            inner.update(id(m) for m in module.modules())
    return layers


def token_embeddings(top: nn.Module, decoder: nn.Module) -> set[int]:
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


def not_of_tokens(top: nn.Module) -> set[int]:
    """By id, the modules that get something else than the tokens [B, S, H], which has their shape for some B and S."""
    found: set[int] = set()
    for module in top.modules():
        if type(module).__name__ in _SEQUENCE_FIRST:
            found.update(id(inner) for inner in module.modules())
        elif type(module).__name__ == "DisentangledSelfAttention":  # DeBERTa's: relative positions [1, 2 span, H], too
            names = ["pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj"]
            if getattr(module, "share_att_key", False):
                names += ["query_proj", "key_proj"]
            found.update(id(getattr(module, name, None)) for name in names)
    return found


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def reads_encoder(module: nn.Module) -> str | None:
    """The argument in which a module of a decoder gets the encoder's output."""
    names = parameters(module)
    return next((name for name in ("key_value_states", "encoder_hidden_states") if name in names), None)
