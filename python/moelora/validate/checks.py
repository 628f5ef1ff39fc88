"""The promises, each with what was measured, what is allowed and whether it holds."""

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import peft
import torch
from peft.utils import load_peft_weights
from torch import Tensor

import moelora
from moelora.nn.routers import Router
from moelora.peft.checkpoint import Mixture
from moelora.peft.frame import columns
from moelora.validate.comparison import (
    Difference,
    adapter_parameters,
    difference,
    gradient_differences,
    gradients,
    worst,
)
from moelora.validate.reference import looped, n_passes, shaken, twin, watched

LOGITS = 1e-5  # float32 sums in another order, through a whole model, relative to the largest value
GRADIENTS = 1e-4  # the same through the backward, where differences of the forward add up
NOISE = 4  # what the reference differs from itself, rounded otherwise, times this, is allowed where it is more
MOST = 100  # but never more than this many times the above


@dataclass(frozen=True)
class Check:
    """One promise."""

    group: str
    promise: str
    measured: float | None
    """None where the promise is a yes or no."""
    allowed: float | None
    holds: bool | None
    """None: measured, but not judged; `note` says why."""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The fields; JSON has no infinity, so that is a string."""
        fields = asdict(self)
        if self.measured is not None and not math.isfinite(self.measured):
            fields["measured"] = str(self.measured)
        return fields


def at_most(group: str, promise: str, measured: float, allowed: float, note: str = "") -> Check:
    """A promise that a figure is not above another; NaN fails."""
    return Check(group, promise, measured, allowed, measured <= allowed, note)


def yes(group: str, promise: str, faults: list[str]) -> Check:
    """A promise that nothing is wrong."""
    return Check(group, promise, None, None, not faults, "; ".join(faults))


@dataclass
class Models:
    """The checkpoint, opened by moelora and by stock PEFT over the same base weights."""

    base: Any
    mixture: Mixture
    routed: Any
    """By moelora, with its router taken off."""
    stock: Any
    """By stock PEFT, all experts in one model, the same ones active."""
    router: Router | None
    inputs: dict[str, Any]
    """Of a batch: input_ids [B, S], perhaps attention_mask."""
    weights: Tensor
    """Random dense routing weights [B, S, N]."""
    experts: list[str] = field(init=False)
    """The active ones: what the columns mean."""

    def __post_init__(self) -> None:
        self.experts = list(self.routed.active_adapters)

    def n_passes(self) -> Tensor:
        return n_passes(self.stock, self.weights, **self.inputs)


def open_base(folder: str) -> Any:
    """The base model of a checkpoint, in float32, frozen.

    Raises
    ------
    Exception
        Of whatever type, from transformers: it can't be read, or is no causal language model.
    ValueError
        It is quantised, so that there are no float32 weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is not None:
        raise ValueError("it is quantised, and everything is compared in float32: pass the model as it was before")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def open_stock(base: Any, mixture: Mixture, names: list[str]) -> Any:
    """Some experts in one model of stock PEFT, all active."""
    first, *others = names
    model = peft.PeftModel.from_pretrained(twin(base), str(mixture.path(first)), adapter_name=first, is_trainable=True)
    for name in others:
        model.load_adapter(str(mixture.path(name)), adapter_name=name, is_trainable=True)
    tuner: Any = model.base_model
    tuner.set_adapter(names)
    return model.eval()


def check_files(base: Any, mixture: Mixture) -> tuple[Check, Check]:
    """Stock PEFT opens every expert alone, with just the tensors of its file; and these are numbers."""
    faults, infinite = [], []
    for name in mixture.experts:
        try:
            on_disk = load_peft_weights(str(mixture.path(name)), device="cpu")
            opened = _saved_tensors(open_stock(base, mixture, [name]), name)
        except Exception as error:  # whatever PEFT raises is the finding
            faults.append(f"{name}: {first_line(error)}")
            continue
        faults += [f"{name}: {fault}" for fault in _tensor_faults(on_disk, opened)]
        infinite += [f"{name}: {key}" for key, tensor in on_disk.items() if not tensor.float().isfinite().all()]
    return (
        yes("compatibility", "every expert opens in stock PEFT, with the tensors of its file", faults),
        yes("compatibility", "every tensor is finite", infinite),
    )


def _saved_tensors(model: Any, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(model, adapter_name=name)
    return state


def _tensor_faults(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    faults = [f"{key} is missing" for key in wanted.keys() - found.keys()]
    faults += [f"{key} is unknown" for key in found.keys() - wanted.keys()]
    for key in found.keys() & wanted.keys():
        if found[key].shape != wanted[key].shape:
            faults.append(f"{key} has shape {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}")
        elif not torch.equal(found[key].float(), wanted[key].float()) and found[key].float().isfinite().all():
            faults.append(f"{key} has other values")
    return sorted(faults)


def first_line(error: BaseException) -> str:
    """Kind of an error and the beginning of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def check_opens(open_it: Any) -> tuple[Any, Check]:
    """Call what opens the whole checkpoint by moelora; its result, and the check."""
    promise = "moelora opens the checkpoint, with its router"
    try:
        return open_it(), yes("compatibility", promise, [])
    except Exception as error:  # a named error of the loader is the finding
        return None, yes("compatibility", promise, [first_line(error)])


def allowance(noise: float, floor: float) -> float:
    """What two ways to compute the same may differ by, from what one, rounded otherwise, differs from itself."""
    return min(max(floor, NOISE * noise), MOST * floor)


def noise_of_logits(models: Models, run: Callable[..., Tensor]) -> float:
    """How far logits of stock PEFT are from themselves, rounded otherwise.

    That is on the batch twice over, on its sequences one by one, and with `shaken` embeddings.

    Parameters
    ----------
    models : Models
    run : callable
        Called with weights [B, S, N] and inputs by name.
    """
    w, inputs = models.weights, models.inputs
    with torch.no_grad():
        once = run(w, **inputs)
        twice = run(w.repeat(2, 1, 1), **_twice(inputs))[: len(once)]
        rows = [run(w[b : b + 1], **_row(inputs, b)) for b in range(len(w))]
        with shaken(models.stock):
            other = run(w, **inputs)
    return max(difference("noise", found, once).relative for found in (twice, torch.cat(rows), other))


def _row(inputs: dict[str, Any], b: int) -> dict[str, Any]:
    return {name: value[b : b + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _twice(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat([value, value]) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@torch.no_grad()
def check_outputs(models: Models, report: dict[str, Any]) -> list[Check]:
    """Logits and outputs of layers against the older ways."""
    routed, stock, w, inputs = models.routed, models.stock, models.weights, models.inputs
    noise = noise_of_logits(models, partial(n_passes, stock))
    allowed = allowance(noise, LOGITS)
    report["noise"] = {"logits": noise, "one_hot": 0.0}
    note = f"N passes, rounded otherwise, differ by {noise:.1e}"
    old = models.n_passes()
    batched = routed(**inputs, routing_weights=w, mixture="logits").logits
    checks = [
        at_most("outputs", 'mixture="logits" equals N passes of stock PEFT', _relative(batched, old), allowed, note)
    ]

    one_hot = []
    for e, name in enumerate(models.experts):
        stock.base_model.set_adapter(name)
        alone = stock(**inputs).logits
        got = routed(**inputs, routing_weights=torch.eye(len(models.experts))[e]).logits
        one_hot.append(difference(name, got, alone))
        noise = noise_of_logits(models, lambda w, **inputs: stock(**inputs).logits)
        report["noise"]["one_hot"] = max(noise, report["noise"]["one_hot"])
    stock.base_model.set_adapter(models.experts)
    report["one_hot"] = {d.name: _number(d.relative) for d in one_hot}
    found = worst(one_hot)
    note = f"most: {found.name}; an adapter alone, rounded otherwise, differs by {report['noise']['one_hot']:.1e}"
    alike = allowance(report["noise"]["one_hot"], LOGITS)
    checks.append(at_most("outputs", "one-hot weights equal each adapter alone", found.relative, alike, note))

    plain, expected = routed(**inputs).logits, stock(**inputs).logits
    faults = [] if torch.equal(plain, expected) else [f"they differ by {_relative(plain, expected):.1e}"]
    checks.append(yes("outputs", "without weights the logits are stock PEFT's, bit for bit", faults))

    layer, in_a_loop, layers = _by_layer(models)
    found = worst(layers)
    report["layers"] = {d.name: _number(d.relative) for d in layers}
    checks += [
        at_most(
            "outputs", "one pass equals a loop over the adapters in each layer", _relative(layer, in_a_loop), allowed
        ),
        at_most("outputs", "and so does every routed layer", found.relative, allowed, f"most: {found.name}"),
    ]
    if models.router is not None:
        checks.append(
            at_most(
                "outputs", "the same with the checkpoint's router", *_with_router(models, allowed), note=_kind(models)
            )
        )
    same = (layer.argmax(-1) == old.argmax(-1)).float().mean().item()
    checks.append(
        Check(
            "outputs",
            "one pass, mixing in each layer, from N passes",
            _relative(layer, old),
            None,
            None,
            f"another mixture by design; the most likely token agrees in {100 * same:.1f} %",
        )
    )
    return checks


def _kind(models: Models) -> str:
    return type(models.router).__name__


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _relative(got: Tensor, expected: Tensor) -> float:
    return difference("", got, expected).relative


def _by_layer(models: Models) -> tuple[Tensor, Tensor, list[Difference]]:
    """Logits of one pass and of the loop, and how far apart the outputs of each routed layer are."""
    expected: dict[str, Tensor] = {}
    differences: list[Difference] = []
    with watched(models.stock, expected.__setitem__):
        reference = looped(models.stock, models.weights, **models.inputs)
    with watched(models.routed, lambda name, y: differences.append(difference(name, y, expected[name]))):
        logits = models.routed(**models.inputs, routing_weights=models.weights).logits
    return logits, reference, differences


def _with_router(models: Models, allowed: float) -> tuple[float, float]:
    """One pass with the checkpoint's router, against the loop with what this router makes of the same states."""
    routed, router = models.routed, models.router
    assert router is not None
    routed.base_model.attach_router(router, models.mixture.config)
    try:
        outputs = routed(**models.inputs, output_hidden_states=True)
    finally:
        routed.base_model.detach_router()
    expected = looped(models.stock, _weights_of(models, router, outputs.hidden_states), **models.inputs)
    return _relative(outputs.logits, expected), allowed


def _weights_of(models: Models, router: Router, states: tuple[Tensor, ...]) -> Tensor:
    """A router's weights, [N], [B, S, N] or [B, S, L, N], from the inputs of the decoder layers."""
    mask, active = models.inputs.get("attention_mask"), columns(router, models.experts)
    inputs = states[:-1]
    if router.reads == "nothing":
        return router(None, mask, active=active)  # type: ignore[no-any-return]
    if router.reads == "last_hidden":
        with models.stock.disable_adapter():
            first = models.stock(**models.inputs, output_hidden_states=True)
        return router(first.hidden_states[-1], mask, active=active)  # type: ignore[no-any-return]
    if router.reads == "embeddings":
        seen = models.stock.get_input_embeddings()(models.inputs["input_ids"])
        each = [router(seen, mask, active=active)] * len(inputs)
    elif router.reads == "layers":
        each = [router(state, mask, layer=i, active=active) for i, state in enumerate(inputs)]
    else:
        reached: Any = router.layer
        w = router(inputs[reached], mask, active=active)
        each = [w if i >= reached else torch.full_like(w, 1 / len(active)) for i in range(len(inputs))]
    return torch.stack(each, 2)


def check_gradients(models: Models, report: dict[str, Any]) -> list[Check]:
    """Gradients of every A, every B and the weights, against autograd through the older ways."""
    routed, stock, inputs = models.routed, models.stock, models.inputs
    for model in (routed, stock):
        for parameter in adapter_parameters(model, models.experts).values():
            parameter.requires_grad_(True)
    seen = torch.Generator().manual_seed(1)
    checks = []
    report["gradients"] = {}
    for mixture, reference, promise in (
        ("layer", looped, "one pass: of every A, B and weight, as through the loop"),
        ("logits", n_passes, 'mixture="logits": the same as through N passes'),
    ):

        def expected(w: Tensor, direction: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            w = w.clone().requires_grad_()
            logits = reference(stock, w, **inputs)  # noqa: B023 - called within this round
            direction = torch.randn(logits.shape, generator=seen) if direction is None else direction
            return direction, gradients(logits, direction, adapter_parameters(stock, models.experts), w)

        w = models.weights.clone().requires_grad_()
        direction, theirs = expected(models.weights, None, inputs)
        _, doubled = expected(models.weights.repeat(2, 1, 1), torch.cat([direction, direction]), _twice(inputs))
        # Twice the sum, over the root of twice the size.
        doubled = {name: g / math.sqrt(2) for name, g in doubled.items()}
        doubled["routing_weights"] = doubled["routing_weights"][: len(w)] * 2
        with shaken(stock):
            _, other = expected(models.weights, direction, inputs)
        noise = max(worst(gradient_differences(found, theirs)).relative for found in (doubled, other))
        logits = routed(**inputs, routing_weights=w, mixture=mixture).logits
        ours = gradients(logits, direction, adapter_parameters(routed, models.experts), w)
        differences = gradient_differences(ours, theirs)
        found = worst(differences)
        report["gradients"][mixture] = {d.name: _number(d.relative) for d in differences}
        report["noise"][f"gradients, {mixture}"] = noise
        note = f"most: {found.name}; the reference from itself {noise:.1e}"
        checks.append(at_most("gradients", promise, found.relative, allowance(noise, GRADIENTS), note))
    return checks


@torch.no_grad()
def check_compatibility(models: Models, report: dict[str, Any]) -> list[Check]:
    """Experts alone in stock PEFT, names, classes, and another round through the disk."""
    allowed = allowance(report["noise"]["one_hot"], LOGITS)
    differences = []
    for e, name in enumerate(models.experts):
        alone = open_stock(models.base, models.mixture, [name])(**models.inputs).logits
        got = models.routed(**models.inputs, routing_weights=torch.eye(len(models.experts))[e]).logits
        differences.append(difference(name, got, alone))
    found = worst(differences)
    checks = [
        at_most(
            "compatibility",
            "an expert opened alone in stock PEFT has the logits of its one-hot weights",
            found.relative,
            allowed,
            f"most: {found.name}",
        )
    ]
    ours, theirs = set(models.routed.state_dict()), set(models.stock.state_dict())
    checks.append(yes("compatibility", "the keys of state_dict() are stock PEFT's", sorted(ours ^ theirs)))

    released = moelora.release(twin(models.routed))
    stock_classes = {name: type(module) for name, module in models.stock.named_modules()}
    faults = [
        f"{name or 'the model'} is {type(module).__name__}"
        for name, module in released.named_modules()
        if type(module) is not stock_classes.get(name)
    ]
    checks.append(yes("compatibility", "release() gives the stock classes back", faults))
    checks.append(yes("compatibility", "saved and loaded again, every tensor is the same", _round_trip(models)))
    return checks


def _round_trip(models: Models) -> list[str]:
    routed = twin(models.routed)
    if models.router is not None:
        routed.base_model.attach_router(copy.deepcopy(models.router), models.mixture.config)
    with tempfile.TemporaryDirectory() as folder:
        try:
            routed.save_pretrained(folder)
            again: Any = moelora.PeftModel.from_pretrained(twin(models.base), folder)
        except Exception as error:  # a named error of the loader is the finding
            return [first_line(error)]
    faults = []
    for name in models.mixture.experts:
        faults += [f"{name}: {f}" for f in _tensor_faults(_saved_tensors(again, name), _saved_tensors(routed, name))]
    if models.router is not None:
        states = [m.base_model.router.state_dict() for m in (again, routed)]
        faults += [f"router: {fault}" for fault in _tensor_faults(*states)]
    return faults
