"""What a transformers model is made of, as far as routing has to know."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder(top: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The stack that sees the text, and its layers in order; the model itself, and none, if it is not transformers'."""
    stack: nn.Module = top.get_decoder() if isinstance(top, PreTrainedModel) else top  # type: ignore[no-untyped-call]
    layers: list[nn.Module] = []
    inner: set[int] = set()
    for module in stack.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inner:
            layers.append(module)
            inner.update(id(m) for m in module.modules())
    return stack, layers


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


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def reads_encoder(module: nn.Module) -> str | None:
    """The argument in which a module of a decoder gets the encoder's output."""
    names = parameters(module)
    return next((name for name in ("key_value_states", "encoder_hidden_states") if name in names), None)
