"""The entries for torch tensors: what they take by pointer, what they leave to moelora.nn, and no leaks."""

import gc
import importlib
import sys

import pytest

import moelora
from moelora import runtime

torch = pytest.importorskip("torch")
plain = pytest.importorskip("moelora.nn.plain")

core = runtime._core


class Subclass(torch.Tensor):
    pass


def negated(t):
    return torch._neg_view(t)


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def arguments(tokens=(2, 3), n=2, dtype=torch.float64):
    """Of a plain call with experts of rank 2, d_in = 4 and d_out = 5."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": random(*tokens, 4),
        "lora_A": [random(2, 4) for _ in range(n)],
        "lora_B": [random(5, 2) for _ in range(n)],
        "routing_weights": random(*tokens, n),
        "scaling": [0.5 + e for e in range(n)],
        "base_output": None,
        "weight": random(5, 4),
        "bias": random(5),
    }


def plain_call(**replaced):
    return core.plain_call(*(arguments() | replaced).values())


def with_base(**replaced):
    return plain_call(weight=None, bias=None, **{"base_output": torch.zeros(2, 3, 5, dtype=torch.float64)} | replaced)


# ---- what is plain ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 70])
@pytest.mark.parametrize("tokens", [(3,), (2, 3)], ids=str)
def test_the_plain_case_comes_back_in_its_final_form(tokens, n, dtype):
    given = arguments(tokens, n, dtype)
    adapters, scaling, total_rank, requires_grad = core.plain_call(*given.values())
    expected = given["lora_A"] + given["lora_B"]
    assert len(adapters) == 2 * n and all(a is b for a, b in zip(adapters, expected, strict=True))
    assert scaling == tuple(given["scaling"]) and total_rank == 2 * n and requires_grad is False


@pytest.mark.parametrize(
    "changes",
    [
        {"routing_weights": torch.ones(2, dtype=torch.float64)},
        {"routing_weights": torch.ones(2, 2, dtype=torch.float64)},
        {"routing_weights": torch.ones(2, dtype=torch.float64).expand(2, 3, 2)},
        {"x": torch.ones(4, dtype=torch.float64).expand(2, 3, 4)},
        {"x": torch.ones(4, 3, 2, dtype=torch.float64).transpose(0, 2)},
        {"x": torch.nn.Parameter(torch.ones(2, 3, 4, dtype=torch.float64)).view(2, 3, 4)},
        {"lora_A": tuple(torch.ones(4, 2, dtype=torch.float64).t() for _ in range(2))}
        | {"lora_B": tuple(torch.ones(5, 2, dtype=torch.float64) for _ in range(2))},
        {"weight": torch.nn.Parameter(torch.ones(5, 4, dtype=torch.float64), requires_grad=False)},
        {"bias": None},
        {"weight": None, "bias": None},
        {"scaling": 2.0},
        {"scaling": (1.0, -1.0)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_strides_parameters_and_options_are_plain_too(changes):
    assert plain_call(**changes) is not None


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("requires", [False, True])
def test_bfloat16_goes_together_with_itself_and_with_float32(adapters, weights, requires):
    given, wide = arguments(dtype=torch.bfloat16), arguments(dtype=torch.float32)
    for name in ("lora_A", "lora_B"):
        given[name] = [t.to(adapters).requires_grad_(requires) for t in given[name]]
    given["routing_weights"] = given["routing_weights"].to(weights)
    assert core.plain_call(*given.values())[3] is requires
    for name in ("x", "weight", "bias"):
        assert core.plain_call(*(given | {name: wide[name]}).values()) is None
    other = torch.float32 if adapters is torch.bfloat16 else torch.bfloat16
    for name in ("lora_A", "lora_B"):
        mixed = [given[name][0], given[name][1].to(other)]
        assert core.plain_call(*(given | {name: mixed}).values()) is None
    assert core.plain_call(*(given | {"routing_weights": given["routing_weights"].half()}).values()) is None


def test_scaling_is_spread():
    assert plain_call(scaling=2.0)[1] == (2.0, 2.0)


@pytest.mark.parametrize("name", ["x", "routing_weights", "base_output", "lora_A", "lora_B"])
def test_requires_grad_is_seen_wherever_it_is(name):
    given = arguments()
    value = given[name] if name != "base_output" else torch.zeros(2, 3, 5, dtype=torch.float64)
    (value[1] if isinstance(value, list) else value).requires_grad_()
    assert with_base()[3] is False
    assert with_base(**{name: value})[3] is True


SPOIL = {
    "a subclass": lambda t: t.as_subclass(Subclass),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "negated": negated,
    "complex": lambda t: t.to(torch.complex128),
    "conjugated": lambda t: t.to(torch.complex128).conj(),
    "another float": lambda t: t.float(),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "integers": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "one axis less": lambda t: t[0],
    "one axis more": lambda t: t[None, None],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "no rows": lambda t: t[:0],
    "another width": lambda t: t[..., :1],
    "no width": lambda t: t[..., :0],
    "freed": freed,
    "NumPy": lambda t: t.numpy(),
    "nothing of the kind": lambda t: object(),
}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "routing_weights", "base_output", "weight", "bias"])
def test_unusual_tensors_are_not(name, spoil):
    given = arguments()
    if name == "base_output":
        call, value = with_base, torch.ones(2, 3, 5, dtype=torch.float64)
    else:
        call, value = plain_call, given[name]
    value = [value[0], SPOIL[spoil](value[1])] if isinstance(value, list) else SPOIL[spoil](value)
    assert call() is not None
    assert call(**{name: value}) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(2, 0, 4, dtype=torch.float64), "routing_weights": torch.ones(2, dtype=torch.float64)},
        {"x": torch.ones(1, 2, 3, 4, dtype=torch.float64), "routing_weights": torch.ones(2, dtype=torch.float64)},
        {"routing_weights": torch.ones(3, 2, dtype=torch.float64)},
        {"routing_weights": torch.tensor(1.0, dtype=torch.float64)},
        {"lora_A": []},
        {"lora_A": [], "lora_B": []},
        {"lora_A": arguments()["lora_A"][:1]},
        {"lora_A": torch.ones(2, 2, 4, dtype=torch.float64)},
        {"lora_A": tuple(arguments()["lora_A"])},  # one a tuple, one a list: not worth a look
        {"lora_A": torch.nn.ParameterList(arguments()["lora_A"])},
        {"lora_A": None},
        {"scaling": [1.0]},
        {"scaling": [1.0, float("nan")]},
        {"scaling": float("inf")},
        {"scaling": 1},
        {"scaling": [1.0, 1]},
        {"scaling": "12"},
        {"scaling": None},
        {"weight": None},  # and a bias
        {"weight": torch.ones(5, 4, dtype=torch.float64, requires_grad=True)},
        {"bias": torch.ones(5, dtype=torch.float64, requires_grad=True)},
        {"base_output": torch.ones(2, 3, 5, dtype=torch.float64)},  # and a weight
    ],
    ids=str,
)
def test_unusual_calls_are_not(changes):
    assert plain_call(**changes) is None


def test_are_plain_passes_over_none():
    t = torch.ones(2)
    assert core.are_plain() and core.are_plain(t, None, t > 0, t.half(), t[:0])
    assert not core.are_plain(t, t.to("meta")) and not core.are_plain(negated(t)) and not core.are_plain([1.0])


# ---- the calls themselves ----


def run(given=None, *, dropout=None, total_rank=0, top_k=0, **replaced):
    given = (given or arguments()) | replaced
    adapters, base = (*given["lora_A"], *given["lora_B"]), (given["base_output"], given["weight"], given["bias"])
    scaling = tuple(given["scaling"])
    x, weights = given["x"], given["routing_weights"]
    return core.forward_tensors(x, adapters, weights, scaling, *base, dropout, total_rank, top_k, 1)


def gradients(needed=(True,) * 9, **replaced):
    """By the names x, routing_weights, base_output and adapters; None: not plain."""
    given = arguments() | {
        "adapters": None,
        "grad_y": torch.ones(2, 3, 5, dtype=torch.float64),
        "hidden": torch.ones(2, 3, 4, dtype=torch.float64),
        "dropout": None,
    }
    given |= replaced
    adapters = given["adapters"] or (*given["lora_A"], *given["lora_B"])
    saved = (given["x"], given["hidden"], given["routing_weights"], given["weight"], *adapters)
    return core.backward_tensors(saved, needed, tuple(given["scaling"]), given["grad_y"], given["dropout"], 0, 1)


def test_forward_gives_what_is_wanted_and_refuses_what_does_not_fit():
    y, hidden = run()
    assert y.shape == (2, 3, 5) and y.is_contiguous() and hidden is None
    again, hidden = run(total_rank=4)
    assert torch.equal(again, y) and hidden.shape == (2, 3, 4)
    for changes in (
        {"x": torch.ones(2, 3, 3, dtype=torch.float64)},
        {"x": torch.ones(2, 3, 4)},
        {"x": None},
        {"routing_weights": torch.ones(2, 3, 3, dtype=torch.float64)},
        {"lora_A": [], "lora_B": []},
        {"lora_A": arguments()["lora_A"][:1]},
        {"lora_B": arguments()["lora_A"]},
        {"lora_B": [arguments()["lora_B"][0], None]},
        {"base_output": torch.ones(2, 3, 4, dtype=torch.float64), "weight": None, "bias": None},
        {"total_rank": 5},
        {"total_rank": -1},
        {"scaling": [1.0]},
        {"scaling": [1, 2]},
        {"dropout": 0.5},
        {"dropout": (1, (0.5,))},
        {"dropout": (-1, (0.5, 0.5))},
        {"dropout": (2**64, (0.5, 0.5))},
        {"dropout": (1, (0.5, 1.5))},
        {"dropout": (1, (0.5, float("nan")))},
    ):
        with pytest.raises(ValueError, match="forward_tensors takes plain tensors"):
            run(**changes)
    for top_k in (-1, 3):
        with pytest.raises(ValueError, match=r"top_k is outside \[1, number of experts\]"):
            run(top_k=top_k)


@pytest.mark.parametrize("who", ["own", "torch"])
def test_the_base_product_is_a_part_of_forward_and_backward(who):
    try:
        moelora.set_base_product(who)
        with_weight, given = run()[0], arguments()
        mixture = run(weight=None, bias=None)[0]
        torch.testing.assert_close(with_weight, mixture + given["x"] @ given["weight"].T + given["bias"])
        torch.testing.assert_close(run(bias=None)[0], mixture + given["x"] @ given["weight"].T)
        grad_y = torch.randn(2, 3, 5, dtype=torch.float64)
        with_weight, mixture = gradients(grad_y=grad_y), gradients(grad_y=grad_y, weight=None)
        torch.testing.assert_close(with_weight[0], mixture[0] + grad_y @ given["weight"])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(with_weight[1:], mixture[1:], strict=True))
    finally:
        moelora.set_base_product(None)


def test_a_weight_that_does_not_fit_is_no_matter_of_the_core():
    try:
        moelora.set_base_product("own")
        for changes in (
            {"weight": torch.ones(4, 4, dtype=torch.float64)},
            {"weight": torch.ones(5, 4)},
            {"bias": torch.ones(4, dtype=torch.float64)},
            {"bias": torch.ones(1, 5, dtype=torch.float64)},
        ):
            with pytest.raises(ValueError, match="forward_tensors takes plain tensors"):
                run(**changes)
        with pytest.raises(ValueError, match="outside its domain"):  # a bias alone
            run(weight=None)
    finally:
        moelora.set_base_product(None)


def test_backward_gives_what_is_needed():
    grads = gradients()
    assert [None if g is None else tuple(g.shape) for g in grads] == [
        (2, 3, 4),
        (2, 3, 2),
        (2, 3, 5),
        None,
        None,
        (2, 4),
        (2, 4),
        (5, 2),
        (5, 2),
    ]
    for i in (0, 1, 2, 5, 8):
        alone = gradients(needed=tuple(j == i for j in range(9)))
        assert [g is not None for g in alone] == [j == i for j in range(9)]
        assert torch.equal(alone[i], grads[i])


def test_backward_says_no_to_what_does_not_fit():
    assert gradients() is not None
    x_alone = (True, *(False,) * 8)
    assert gradients(needed=x_alone, x=None, hidden=None)[0].shape == (2, 3, 4)
    double = torch.float64
    for changes in (
        {"x": torch.ones(2, 3, 3, dtype=double)},
        {"routing_weights": torch.ones(3, dtype=double)},
        {"grad_y": torch.ones(2, 3, 5)},
        {"grad_y": torch.ones(2, 3, 4, dtype=double), "weight": None},
        {"grad_y": negated(torch.ones(2, 3, 5, dtype=double))},
        {"grad_y": torch.ones(2, 3, 5, dtype=double).as_subclass(Subclass)},
        {"grad_y": torch.ones(0, 3, 5, dtype=double)},
        {"grad_y": None},
        {"hidden": torch.ones(2, 3, 5, dtype=double)},
        {"scaling": (1.0,)},
        {"dropout": 0.5},
        {"adapters": (None,) * 4},
        {"adapters": tuple(arguments()["lora_A"])},
        {"needed": (True,) * 8},
        {"needed": [True] * 9},
        {"lora_A": [negated(a) for a in arguments()["lora_A"]]},
    ):
        assert gradients(**changes) is None, changes
    with pytest.raises(ValueError, match="missing"):  # hidden, for the gradient of B
        gradients(hidden=None)


# ---- routing ----


def route_arguments(**replaced):
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    return {
        "logits": logits,
        "mask": mask,
        "top_k": 2,
        "temperature": 1.0,
        "renormalize": True,
        "n_threads": 1,
    } | replaced


def backward_arguments(**replaced):
    given = route_arguments()
    _, indices, _, prob_sums = core.route_tensors(*given.values())
    del given["top_k"]
    grads = {"grad_weights": torch.ones(2, 3, 4), "grad_prob_sums": prob_sums}
    shared = {"logits": given.pop("logits"), "mask": given.pop("mask"), "indices": indices}
    return grads | shared | given | replaced


UNUSUAL = {
    "top_k": [0, 5, -1, 2**70, True, 2.0, "2"],
    "temperature": [1, 0.0, -1.0, float("nan"), float("inf"), "1"],
    "renormalize": [1, None],
    "logits": [
        None,
        0.5,
        torch.ones(()),
        torch.ones(2, 3, 0),
        torch.ones(2, 3, 4, dtype=torch.int32),
        torch.ones(2, 3, 4, dtype=torch.bfloat16),
        torch.ones(2, 3, 4, dtype=torch.complex64),
        torch.ones(2, 3, 4, device="meta"),
        torch.ones(2, 3, 4).to_sparse(),
        torch.ones(2, 3, 4).as_subclass(Subclass),
        torch.ones(3, 2, 4).transpose(0, 1),
        negated(torch.ones(2, 3, 4)),
        freed(torch.ones(2, 3, 4)),
        torch.ones((1,) * 14 + (2, 3, 4)),
    ],
    "mask": [
        1,
        torch.ones(2, 3),
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(3, 2, dtype=torch.bool).t(),
        torch.ones(2, 3, 1, dtype=torch.bool),
        freed(torch.ones(2, 3, dtype=torch.bool)),
    ],
}
UNUSUAL_GRADIENTS = {name: values for name, values in UNUSUAL.items() if name != "top_k"} | {
    "grad_weights": [
        None,
        torch.ones(2, 3, 5),
        torch.ones(6, 4),
        torch.ones(2, 3, 4).double(),
        torch.ones(3, 2, 4).transpose(0, 1),
        negated(torch.ones(2, 3, 4)),
        freed(torch.ones(2, 3, 4)),
    ],
    "grad_prob_sums": [
        torch.ones(5),
        torch.ones(1, 4),
        torch.ones(4).double(),
        torch.ones(8)[::2],
        torch.ones(1).expand(4),
        freed(torch.ones(4)),
    ],
    "indices": [
        torch.zeros(2, 3, 2, dtype=torch.int32),
        torch.zeros(2, 3, 0, dtype=torch.int64),
        torch.zeros(2, 4, 2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64).expand(2, 3, 2),
        torch.zeros(2, 3, 4, dtype=torch.int64)[..., ::2],
        freed(torch.zeros(2, 3, 2, dtype=torch.int64)),
    ],
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_routings_are_left_alone(name):
    assert core.route_tensors(*route_arguments().values()) is not None
    for value in UNUSUAL[name]:
        assert core.route_tensors(*route_arguments(**{name: value}).values()) is None


@pytest.mark.parametrize("name", UNUSUAL_GRADIENTS)
def test_unusual_gradients_of_a_routing_are_left_alone(name):
    assert core.route_backward_tensors(*backward_arguments().values()).shape == (2, 3, 4)
    for value in UNUSUAL_GRADIENTS[name]:
        assert core.route_backward_tensors(*backward_arguments(**{name: value}).values()) is None


def test_indices_that_are_no_experts_are_an_error():
    for k, bad in ((1, 4), (2, -1), (5, 0)):
        indices = torch.full((2, 3, k), bad)
        with pytest.raises(ValueError, match="outside"):
            core.route_backward_tensors(*backward_arguments(indices=indices).values())


def test_a_routing_without_tokens_is_plain():
    weights, indices, counts, prob_sums = core.route_tensors(
        *route_arguments(logits=torch.ones(2, 0, 4), mask=torch.ones(2, 0, dtype=torch.bool)).values()
    )
    assert weights.shape == (2, 0, 4)
    assert indices.shape == (2, 0, 2)
    assert not counts.any()
    assert not prob_sums.any()


def test_routings_keep_no_tensor_alive():
    plain, unusual = route_arguments(), route_arguments(temperature=1)
    backward, refused = backward_arguments(), backward_arguments(indices=torch.full((2, 3, 2), 9))

    def counts():
        gc.collect()
        given = [t for t in (*plain.values(), *backward.values(), *refused.values()) if isinstance(t, torch.Tensor)]
        return [sys.getrefcount(t) for t in given], sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before = counts()
    for _ in range(100):
        core.route_tensors(*plain.values())
        core.route_tensors(*unusual.values())
        core.route_backward_tensors(*backward.values())
        with pytest.raises(ValueError, match="outside"):
            core.route_backward_tensors(*refused.values())
    assert counts() == before


def test_arguments_are_counted():
    for name, n in (
        ("use_torch", 11),
        ("plain_call", 8),
        ("forward_tensors", 11),
        ("backward_tensors", 7),
        ("route_tensors", 6),
        ("route_backward_tensors", 8),
    ):
        with pytest.raises(TypeError, match=f"{name} takes {n} arguments, got 1"):
            getattr(core, name)(1)
    with pytest.raises(TypeError, match="n_threads must be an int"):
        core.forward_tensors(torch.ones(1), (1, 2), 3, 4, 5, 6, 7, None, 0, 0, 1.5)
    with pytest.raises(TypeError, match="total_rank must be an int"):
        core.forward_tensors(torch.ones(1), (1, 2), 3, 4, 5, 6, 7, None, 0.0, 0, 1)


def test_a_torch_without_the_exchange_api_is_left_alone():
    class Tensor:
        is_neg = None

    functions = (plain.empty_cpu, plain.empty_cuda, torch.empty_like, torch.nn.functional.linear)
    functions += (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
    try:
        assert core.use_torch(Tensor, Tensor, *functions) is False
        assert not core.are_plain(torch.ones(1)) and not core.are_plain(Tensor())
        assert plain_call() is None
        Tensor.__dlpack_c_exchange_api__ = object()
        assert core.use_torch(Tensor, Tensor, *functions) is False
        with pytest.raises(AttributeError):
            core.use_torch(object, object, *functions)
        assert not core.are_plain(torch.ones(1))
    finally:
        assert core.use_torch(torch.Tensor, torch.nn.Parameter, *functions) is True
    assert core.are_plain(torch.ones(1))


def test_before_torch_is_known_nothing_is_plain(monkeypatch):
    monkeypatch.delitem(sys.modules, "moelora._core")
    other = importlib.import_module("moelora._core")
    assert other is not core
    assert not other.are_plain(torch.ones(1))
    monkeypatch.setitem(globals(), "core", other)
    assert plain_call() is None and gradients() is None
    with pytest.raises(ValueError, match="forward_tensors takes plain tensors"):
        run()


def test_nothing_leaks_whether_a_call_is_plain_or_not(leaks_nothing):
    given = arguments()
    bad = torch.ones(3)
    watched = [given["x"], given["routing_weights"], given["weight"], given["bias"], given["scaling"], bad]
    watched += [*given["lora_A"], *given["lora_B"], given["lora_A"], given["lora_B"], torch.Tensor.is_neg]
    calls = [given, given | {"scaling": 0.25}]
    calls += [given | {name: bad} for name in given]
    calls += [given | {"lora_A": [given["lora_A"][0], bad]}, given | {"lora_B": (bad,)}, given | {"scaling": [0.25]}]
    calls += [given | {"x": given["x"].to("meta")}]

    def everything():
        for call in calls:
            core.plain_call(*call.values())
            core.are_plain(*call.values())
        for changes in ({}, {"x": bad}, {"routing_weights": bad}, {"total_rank": 3}, {"dropout": (1, (0.5, bad))}):
            try:
                run(given, **{"total_rank": 4} | changes)
            except ValueError:
                continue
        for changes in ({}, {"x": bad}, {"grad_y": bad}, {"hidden": bad}, {"needed": (True,) * 8}):
            gradients(**given | changes)

    leaks_nothing(everything, watched)
