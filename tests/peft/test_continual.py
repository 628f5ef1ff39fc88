"""A stream of domains: experts keep what they have learned, and one adapter does not."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "continual-learning.md"


@pytest.fixture(scope="module")
def stream() -> dict[str, Any]:
    """What is left by the program of the page."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    assert printed.getvalue()
    return names


def test_experts_forget_nothing_that_one_adapter_forgets(stream):
    untrained = stream["make_base"]()
    for domain in stream["domains"]:
        chance = stream["loss_of"](untrained, domain)
        assert stream["learned"][domain] < 1
        assert stream["one_learned"][domain] < 1 < chance
        assert stream["kept"][domain] < stream["learned"][domain] + 0.1
    for domain in stream["domains"][:-1]:
        assert stream["one_kept"][domain] > stream["one_learned"][domain] + 2


def test_the_first_expert_is_what_training_it_alone_gives(stream):
    """Its parameters are untouched, so what the mixture loses the router loses."""
    domain = stream["domains"][0]
    frozen = {name: p for name, p in stream["model"].named_parameters() if f".{domain}." in name}
    assert frozen
    alone = stream["get_peft_model"](stream["make_base"](), stream["config"], adapter_name=domain)
    stream["train"](alone, stream["lessons"](domain), lr=1e-2)
    for name, parameter in frozen.items():
        torch.testing.assert_close(parameter, alone.get_parameter(name).requires_grad_(False))


def test_each_domain_goes_to_its_expert(stream):
    model, domains = stream["model"], stream["domains"]
    for column, domain in enumerate(domains):
        ids = stream["texts"](domain, 16, seed=2000)
        weights = model.base_model.get_routing_weights(model.get_input_embeddings()(ids))
        assert (weights.argmax(-1) == column).float().mean() > 0.95
