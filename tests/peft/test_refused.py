"""Everything that docs/refused.md lists raises with the layer's name and the way out, and changes nothing."""

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import moelora
from moelora import adopt
from moelora.nn.routers import EmbeddingRouter, FixedRouter, LastHiddenRouter, PerLayerRouter
from moelora.peft import frame

PAGE = Path(__file__).parents[2] / "docs" / "refused.md"
NAMES = ["expert_0", "expert_1", "expert_2"]


@dataclass
class Case:
    """A model, a call of it that is refused, and one that is not."""

    model: nn.Module
    refused: Callable[[], Any]
    message: str
    plain: Callable[[], torch.Tensor]
    error: type[Exception] = ValueError
    routed: Callable[[], Any] | None = None  # what the message advises


class Tools:
    """What the cases are made from."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.lora = request.getfixturevalue("make_lora")
        self.base = request.getfixturevalue("make_base")
        self.ids = request.getfixturevalue("ids")
        self.tmp_path = request.getfixturevalue("tmp_path")
        self.fixture = request.getfixturevalue

    def model(self, kind: str = "llama", **options: Any) -> Any:
        return adopt(self.lora(kind, **options))

    def peft(self, net: nn.Module, config: Any, **options: Any) -> Any:
        return moelora.get_peft_model(net, config, "e", **options).eval()

    def of(self, model: Any, message: str, weights: Any = None, *, advised: Any = None, **options: Any) -> Case:
        """A language model called with weights; `advised` are others that it takes."""
        if weights is None:
            weights = torch.ones(len(model.base_model.active_adapters))
        if advised is not None:
            options["routed"] = lambda: model(self.ids, routing_weights=advised)
        refused = options.pop("refused", lambda: model(self.ids, routing_weights=weights))
        return Case(model, refused, message, lambda: model(self.ids).logits, **options)


CASES: dict[str, list[Callable[[Tools], Case]]] = {}


def refuses(row: str) -> Callable[[Any], Any]:
    """The decorated function makes a case of this row of the page."""

    def decorate(make: Any) -> Any:
        CASES.setdefault(row, []).append(make)
        return make

    return decorate


# Layers and adapters.


@refuses("LoRA on parameters (`target_parameters`)")
def parameters(tools: Tools) -> Case:
    config = peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"], task_type="CAUSAL_LM")
    model = tools.peft(tools.base("llama"), config)
    return tools.of(
        model, r"layers.0.self_attn.q_proj \(ParamWrapper\) can't be routed: leave it out of target_modules"
    )


@refuses("LoRA on parameters (`target_parameters`)")
def experts_of_mixtral(tools: Tools) -> Case:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
    net = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=97, **sizes, **heads))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=parameters, task_type="CAUSAL_LM")
    return tools.of(tools.peft(net, config), r"mlp.experts.* \(ParamWrapper\) can't be routed: leave it out")


@refuses("LoRA on `nn.MultiheadAttention`")
def attention(tools: Tools) -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    model, x = tools.peft(Net(), peft.LoraConfig(target_modules=["attention"])), torch.randn(2, 3, 8)
    message = r"attention \(MultiheadAttention\) can't be routed: leave it out of target_modules"
    return Case(model, lambda: model(x, routing_weights=torch.ones(1)), message, lambda: model(x))


def convolution(axes: int, config: Any = peft.LoraConfig) -> Callable[[Tools], Case]:
    def make(tools: Tools) -> Case:
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        model = tools.peft(nn.Sequential(kind(4, 4, 1)), config(target_modules=["0"]))
        x = torch.randn(2, 4, *[3] * axes)
        message = rf"0 \(Conv{axes}d\) can't be routed: leave it out of target_modules"
        return Case(model, lambda: model(x, routing_weights=torch.ones(1)), message, lambda: model(x))

    return make


for axes in (1, 2, 3):
    refuses("adapters on convolutions")(convolution(axes))
for axes, config in itertools.product((1, 2), (peft.LoHaConfig, peft.LoKrConfig)):
    refuses("adapters on convolutions")(convolution(axes, config))


@refuses("`lora_dropout` modules of one's own")
def dropout_module(tools: Tools) -> Case:
    model = tools.model(target_modules=["q_proj"])
    for layer in model.modules():
        if isinstance(layer, moelora.Linear):
            layer.lora_dropout["expert_1"] = nn.AlphaDropout(0.1)
    message = r"q_proj has a AlphaDropout as lora_dropout, which can't be routed: use nn.Dropout"
    return tools.of(model.eval(), message, error=TypeError)


def variant(name: str, **options: Any) -> Callable[[Tools], Case]:
    def make(tools: Tools) -> Case:
        model = tools.model(target_modules=["q_proj"], **options)
        message = rf"q_proj can't route adapter 'expert_0', which is not plain LoRA \({name}\): convert it to LoRA"
        return tools.of(model, message)

    return make


VARIANTS = {
    "DoraLinearVariant": {"use_dora": True},
    "ALoraLinearVariant": {"alora_invocation_tokens": [1, 2]},
    "MiCALinearVariant": {"init_lora_weights": "mica"},
}
for name, options in VARIANTS.items():
    refuses("DoRA, aLoRA and other variants")(variant(name, **options))


@refuses("DoRA, aLoRA and other variants")
def variant_of_an_embedding(tools: Tools) -> Case:
    model = tools.model(target_modules=["embed_tokens"], use_dora=True)
    return tools.of(model, r"embed_tokens can't route adapter 'expert_0'.*\(DoraEmbeddingVariant\): convert it")


@refuses("merged adapters")
def merged(tools: Tools) -> Case:
    model = tools.model()
    model.merge_adapter(["expert_1"])

    def unmerged() -> None:
        model.unmerge_adapter()
        model(tools.ids, routing_weights=torch.ones(3))
        model.merge_adapter(["expert_1"])

    message = r"layers.0.self_attn.q_proj has merged adapters \['expert_1'\].*call unmerge_adapter\(\) first"
    return tools.of(model, message, routed=unmerged)


@refuses("sharded adapters (DTensor)")
def sharded_adapters(tools: Tools) -> Case:
    from torch.distributed.tensor import distribute_tensor

    model, mesh = tools.model(), tools.fixture("mesh")
    lora_A = model.base_model.model.model.layers[1].mlp.up_proj.lora_A["expert_0"]
    lora_A.weight = nn.Parameter(distribute_tensor(lora_A.weight.detach(), mesh))
    message = r"layers.1.mlp.up_proj has sharded adapters \(DTensor\).*shard whole decoder layers"
    with_base_alone = lambda: model.get_base_model().model.embed_tokens(tools.ids)  # noqa: E731
    return Case(model, lambda: model(tools.ids, routing_weights=torch.ones(3)), message, with_base_alone)


@refuses("offloaded adapters")
def offloaded_adapters(tools: Tools) -> Case:
    from accelerate import disk_offload

    model = tools.model()
    layer, device = model.base_model.model.model.layers[1], torch.device("cpu")
    disk_offload(layer, str(tools.tmp_path), execution_device=device)
    message = r"layers.1.self_attn.q_proj has offloaded adapters \(meta tensors\).*keep model.layers.1.* in memory"
    return tools.of(model, message)


@refuses("layers whose active adapters differ")
def different_adapters(tools: Tools) -> Case:
    model = tools.model()
    model.base_model.model.model.layers[1].mlp.up_proj.set_adapter(["expert_0", "expert_2"])
    message = r"layers.1.mlp.up_proj has the active adapters \['expert_0', 'expert_2'\].*call base_model.set_adapter"
    return tools.of(model, message)


@refuses("`adapter_names` together with weights or a router")
def adapter_names_and_weights(tools: Tools) -> Case:
    model = tools.model()
    call = lambda: model(tools.ids, adapter_names=NAMES[:2], routing_weights=torch.ones(3))  # noqa: E731
    names = lambda: model(tools.ids, adapter_names=NAMES[:2])  # noqa: E731
    return tools.of(model, "adapter_names can't be used together with.*use one of them", refused=call, routed=names)


@refuses("`adapter_names` together with weights or a router")
def adapter_names_and_a_router(tools: Tools) -> Case:
    model = tools.model()
    model.base_model.attach_router(FixedRouter(NAMES))
    call = lambda: model(tools.ids, adapter_names=NAMES[:2])  # noqa: E731
    return tools.of(model, "adapter_names can't be used together with.*use one of them", refused=call)


@refuses("`adapter_names` together with weights or a router")
def adapter_names_of_a_layer(tools: Tools) -> Case:
    model = tools.model()
    layer, x = model.base_model.model.model.layers[0].mlp.up_proj, torch.randn(2, 3, 32)
    call = lambda: layer(x, adapter_names=NAMES[:2], routing_weights=torch.ones(3))  # noqa: E731
    return tools.of(model, "layers.0.mlp.up_proj got adapter_names together with.*pass one of them", refused=call)


# Weights.


def unfit(row: str, message: str, weights: Any, **options: Any) -> None:
    error = options.pop("error", ValueError)

    def make(tools: Tools) -> Case:
        return tools.of(tools.model(**options), message, weights, advised=torch.ones(3), error=error)

    refuses(row)(make)


unfit("weights for another number of experts", "must have one column for each active adapter", torch.ones(2))
unfit("weights for another batch size", "is for 3 sequences, the batch has 2", torch.ones(3, 3))
unfit("weights for another batch size", "is for 1 sequences, the batch has 2", torch.ones(1, 7, 3))
unfit("weights for another number of tokens", "is for 6 tokens, the input has 7", torch.ones(2, 6, 3))
unfit(
    "weights [B, S, L, N] where layers outside the decoder are adapted",
    r"lm_head is in no decoder layer.*pass \[B, S, N\], or leave it out of target_modules",
    torch.ones(2, 7, 3, 3),
    target_modules=["q_proj", "lm_head"],
)
unfit(
    "weights [B, S, L, N] for another number of layers",
    r"needs L = 3, the number of decoder layers",
    torch.ones(2, 7, 2, 3),
)
for w in (torch.ones(2, 3), torch.ones(2, 7, 3)):
    unfit(
        "weights per token or sequence on positions and token types",
        r"transformer.wpe got an input of shape \(1, 7\).*pass \[N\], or leave it out of target_modules",
        w,
        kind="gpt2",
        target_modules=["wpe", "c_attn"],
    )
unfit("weights that are no dense real tensor", "must be a torch.Tensor, got list", [1.0, 1.0, 1.0], error=TypeError)
unfit("weights that are no dense real tensor", "must be real", torch.ones(3, dtype=torch.complex64), error=TypeError)
unfit("weights that are no dense real tensor", "must be a dense tensor", torch.ones(3).to_sparse(), error=TypeError)


@refuses("weights that are no dense real tensor")
def sharded_weights(tools: Tools) -> Case:
    from torch.distributed.tensor import distribute_tensor

    w = distribute_tensor(torch.ones(3), tools.fixture("mesh"))
    message = r"must not be a DTensor: pass weights.full_tensor\(\)"
    return tools.of(tools.model(), message, w, error=TypeError, advised=w.full_tensor())


@refuses("weights per token or sequence on the patches of an image")
def patches(tools: Tools) -> Case:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=32),
        text_config=transformers.LlamaConfig(vocab_size=97, **sizes),
        image_token_index=96,
        image_seq_length=4,
    )
    model = tools.peft(transformers.LlavaForConditionalGeneration(config), peft.LoraConfig(target_modules=["q_proj"]))
    inputs = {"input_ids": torch.tensor([[96, 96, 96, 96, 7]] * 2), "pixel_values": torch.randn(2, 3, 8, 8)}
    return Case(
        model,
        lambda: model(**inputs, routing_weights=torch.ones(2, 5, 1)),
        r"vision_tower.*q_proj got an input of shape \(2, 5, 32\).*pass \[N\], or leave it out of target_modules",
        lambda: model(**inputs).logits,
        routed=lambda: model(**inputs, routing_weights=torch.ones(1)),
    )


def not_of_tokens(kind: str, name: str, weights: tuple[int, ...] = (4, 1), **options: Any) -> Callable[[Tools], Case]:
    def make(tools: Tools) -> Case:
        torch.manual_seed(0)
        net = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(vocab_size=97, **options))
        model, ids = tools.peft(net, peft.LoraConfig(target_modules=name)), torch.randint(3, 97, (weights[0], 4))
        return Case(
            model,
            lambda: model(ids, routing_weights=torch.ones(weights)),
            rf"got an input of shape \({weights[0]}, 4, 32\) whose rows are not the tokens.*pass \[N\], or leave",
            lambda: model(ids)[0],
            routed=lambda: model(ids, routing_weights=torch.ones(1)),
        )

    return make


row = (
    "weights per token or sequence on layers that get [S, B, H]: "
    "all of XLNet and FSMT, the attention of Longformer and of LED's encoder"
)
sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
windows = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
refuses(row)(not_of_tokens("XLNet", r".*layer_1", d_model=32, n_layer=1, n_head=2, d_inner=40))
refuses(row)(not_of_tokens("Longformer", r".*query", **windows, attention_window=4))
led = {"decoder_attention_heads": 2, "attention_window": 4, "pad_token_id": 1}
refuses(row)(not_of_tokens("LED", r".*encoder.*query", **sizes, **led))
row = (
    "weights per token or sequence on layers of DeBERTa that get relative positions, too: "
    "`query_proj`, `key_proj`, `pos_*`"
)
positions = {"relative_attention": True, "max_relative_positions": 2, "pos_att_type": "c2p|p2c", "share_att_key": True}
refuses(row)(not_of_tokens("DebertaV2", r".*key_proj", (1, 4, 1), **windows, **positions))
apart = positions | {"share_att_key": False}
refuses(row)(not_of_tokens("DebertaV2", r".*pos_key_proj", (1, 4, 1), **windows, **apart))
refuses(row)(not_of_tokens("Deberta", r".*pos_q_proj", (1, 4, 1), **windows, **positions))


@refuses("one tensor per token on an encoder-decoder model")
def encoder_decoder(tools: Tools) -> Case:
    model, arguments = tools.model("t5"), {"input_ids": tools.ids, "labels": tools.ids}
    return Case(
        model,
        lambda: model(**arguments, routing_weights=torch.ones(2, 7, 3)),
        r"can't tell the encoder's tokens from the decoder's: an encoder-decoder model takes",
        lambda: model(**arguments).logits,
        routed=lambda: model(**arguments, routing_weights=torch.ones(2, 3)),
    )


@refuses('positions past the weights, with `routing_tail="error"`')
def tail(tools: Tools) -> Case:
    model = tools.model()

    def call(tail: str) -> Any:
        w = torch.ones(2, 7, 3)
        return model.generate(input_ids=tools.ids, routing_weights=w, routing_tail=tail, max_new_tokens=3)

    message = "covers 7 positions and generation reached 8: pass weights for all of them, or routing_tail="
    return tools.of(model, message, refused=lambda: call("error"), routed=lambda: call("hold"))


# Ways of calling.


@refuses("the keyword on the model inside")
def keyword(tools: Tools) -> Case:
    model = tools.model()
    call = lambda: model.get_base_model()(tools.ids, routing_weights=torch.ones(3))  # noqa: E731
    message = "routing_weights reached LlamaForCausalLM.*call the adopted PeftModel"
    return tools.of(model, message, refused=call, error=TypeError, advised=torch.ones(3))


@refuses("the model inside, called while a routed call of it runs")
def nested(tools: Tools) -> Case:
    model = tools.model()

    def call() -> None:
        hook = model.base_model.model.model.layers[1].register_forward_pre_hook(
            lambda *args: model.get_base_model()(tools.ids)
        )
        try:
            model(tools.ids, routing_weights=torch.ones(3))
        finally:
            hook.remove()

    message = "LlamaForCausalLM was called while a routed call of it is under way.*call the adopted PeftModel"
    return tools.of(model, message, refused=call, error=RuntimeError, advised=torch.ones(3))


def tuner(config: Any) -> Callable[[Tools], Case]:
    def make(tools: Tools) -> Case:
        model = tools.peft(tools.base("llama"), config)
        call = lambda: model(tools.ids, routing_weights=torch.ones(1))  # noqa: E731
        message = "can't be routed, only LoRA, LoHa and LoKr in a PeftModel can: call it without routing_weights"
        return Case(model, call, message, lambda: model(tools.ids).logits, TypeError)

    return make


K, TASK = ["k_proj"], "CAUSAL_LM"
for config in (
    peft.IA3Config(target_modules=K, feedforward_modules=[], task_type=TASK),
    peft.OFTConfig(target_modules=K, task_type=TASK),
    peft.AdaLoraConfig(target_modules=K, task_type=TASK, total_step=10),
    peft.PromptTuningConfig(num_virtual_tokens=2, task_type=TASK),
):
    refuses("tuners other than LoRA, LoHa and LoKr")(tuner(config))


@refuses("`PeftMixedModel`")
def mixed(tools: Tools) -> Case:
    model = tools.peft(tools.base("llama"), peft.LoraConfig(target_modules=K), mixed=True)
    call = lambda: model(tools.ids, routing_weights=torch.ones(1))  # noqa: E731
    message = "PeftMixedModel with MixedModel can't be routed.*call it without routing_weights"
    return Case(model, call, message, lambda: model(tools.ids).logits, TypeError)


@refuses("`nn.DataParallel`")
def data_parallel(tools: Tools) -> Case:
    model = tools.model()
    tuner = model.base_model._replicate_for_data_parallel()  # as one of several devices would see it
    call = lambda: tuner(tools.ids, routing_weights=torch.ones(3))  # noqa: E731
    message = "nn.DataParallel can't route.*use DistributedDataParallel"
    return tools.of(model, message, refused=call, error=RuntimeError, advised=torch.ones(3))


def checkpointed(reentrant: bool) -> None:
    @refuses("`torch.utils.checkpoint` around parts of a model that runs routed, as FSDP and DeepSpeed put it there")
    def make(tools: Tools) -> Case:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)
                self.inside = True

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return checkpoint(self.linear, x, use_reentrant=reentrant) if self.inside else self.linear(x)

        model, x, w = (
            tools.peft(Net(), peft.LoraConfig(r=2, target_modules=["linear"])),
            torch.randn(3, 8, requires_grad=True),
            torch.rand(1),
        )
        net, layer = model.base_model.model, model.base_model.model.linear
        nn.init.normal_(layer.lora_B["e"].weight)

        @torch.enable_grad()
        def gradient(call: Callable[[], torch.Tensor]) -> torch.Tensor:
            x.grad = None
            call().sum().backward()
            model.zero_grad()
            assert x.grad is not None
            return x.grad

        def around() -> None:
            net.inside = False
            call = lambda x: model(x, routing_weights=w)  # noqa: E731
            expected = gradient(lambda: call(x))
            assert torch.equal(gradient(lambda: checkpoint(call, x, use_reentrant=False)), expected)
            net.inside = True
            merged = (
                layer.base_layer.weight + w * layer.scaling["e"] * layer.lora_B["e"].weight @ layer.lora_A["e"].weight
            )
            torch.testing.assert_close(expected, merged.sum(0).expand(3, -1))

        message = "linear runs inside a checkpoint, which would compute it again without its routing weights"
        plain = lambda: torch.cat([model(x).detach(), gradient(lambda: model(x))])  # noqa: E731
        refused = lambda: gradient(lambda: model(x, routing_weights=w))  # noqa: E731
        return Case(model, refused, message, plain, RuntimeError, around)


for reentrant in (True, False):
    checkpointed(reentrant)


def logits(message: str, w: torch.Tensor, **arguments: Any) -> None:
    def make(tools: Tools) -> Case:
        model = tools.model()
        call = lambda: model(tools.ids, routing_weights=w, mixture="logits", **arguments)  # noqa: E731
        fits = lambda: model(tools.ids, routing_weights=torch.ones(3), mixture="logits")  # noqa: E731
        return tools.of(model, message, refused=call, routed=fits)

    refuses('`mixture="logits"` with caches, generate, hidden states, weights per layer or stack, a router of layers')(
        make
    )


logits("has no cache: pass use_cache=False", torch.ones(3), use_cache=True)
logits("no single result for output_hidden_states: use mixture='layer'", torch.ones(3), output_hidden_states=True)
logits(r"takes no routing_weights \[B, S, L, N\]: pass \[B, S, N\]", torch.ones(2, 7, 3, 3))


# Routers.


@refuses("routers that read tokens, on encoder-decoder models")
def router_of_two_stacks(tools: Tools) -> Case:
    model, arguments = tools.model("t5"), {"input_ids": tools.ids, "labels": tools.ids}
    router = EmbeddingRouter(NAMES, 24)
    message = "reads 'embeddings' needs a transformers model with one stack.*or pass routing_weights"
    call = lambda: model.base_model.attach_router(router)  # noqa: E731
    return Case(model, call, message, lambda: model(**arguments).logits)


@refuses("routers for another model")
def router_of_another_model(tools: Tools) -> Case:
    model = tools.model()
    call = lambda: model.base_model.attach_router(PerLayerRouter(NAMES, 32, num_layers=2))  # noqa: E731
    return tools.of(model, "router has gates for 2 layers, the model has 3 decoder layers", refused=call)


@refuses("active experts that the router does not know")
def router_of_other_experts(tools: Tools) -> Case:
    model = tools.model()
    router = FixedRouter(NAMES[:2])
    model.base_model.attach_router(router)
    message = r"adapters \['expert_2'\] are active, but the router knows only \['expert_0', 'expert_1'\]"
    call = lambda: model(tools.ids)  # noqa: E731
    plain = lambda: model(tools.ids, routing_weights=torch.ones(3)).logits  # noqa: E731
    return Case(model, call, message, plain)


class Pools(EmbeddingRouter):
    """One mixture for each sequence, of a given shape."""

    shape: tuple[int, ...] = (2, 3)

    def route(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().route(hidden_states.mean(1), active=kwargs["active"])
        return output._replace(weights=output.weights.reshape(self.shape))


def with_router(tools: Tools, router: Any) -> Any:
    model = tools.model()
    model.base_model.attach_router(router)
    return model


@refuses("what is no routing, from a router of your own")
def router_that_returns_another_shape(tools: Tools) -> Case:
    router = Pools(NAMES, 32)
    router.shape = (2, 1, 3)
    model = with_router(tools, router)
    plain = lambda: model(tools.ids, routing_weights=torch.ones(3)).logits  # noqa: E731
    message = r"Pools.route must return weights of shape \(3,\) or \(2, 3\) or \(2, 7, 3\).*got \(2, 1, 3\)"
    return Case(model, lambda: model(tools.ids), message, plain)


@refuses("one mixture for a whole sequence, from a router of your own, where a cache hides its start")
def router_that_pools(tools: Tools) -> Case:
    model = with_router(tools, Pools(NAMES, 32))
    call = lambda: model.generate(tools.ids, max_new_tokens=2)  # noqa: E731
    message = (
        "Pools.route returned one mixture for a whole sequence.*pass use_cache=False, or the weights of the prompt"
    )
    w = torch.ones(2, 3)
    advised = lambda: (  # noqa: E731
        model.generate(tools.ids, max_new_tokens=2, use_cache=False),
        model.generate(tools.ids, max_new_tokens=2, routing_weights=w),
    )
    return Case(model, call, message, lambda: model(tools.ids).logits, routed=advised)


@refuses("a router of two passes, on a cache that its first pass has not seen")
def cache_of_one_pass(tools: Tools) -> Case:
    model, w = with_router(tools, LastHiddenRouter(NAMES, 32)), torch.ones(3)
    begin = lambda: model(tools.ids[:, :4], routing_weights=w, use_cache=True).past_key_values  # noqa: E731
    call = lambda: model(tools.ids[:, 4:], past_key_values=begin())  # noqa: E731
    advised = lambda: model(tools.ids[:, 4:], past_key_values=begin(), routing_weights=w)  # noqa: E731
    message = "past_key_values holds 4 tokens, and the first pass of the router has seen 0.*start with an empty one"
    return Case(model, call, message, lambda: model(tools.ids).logits, routed=advised)


TWO_PASSES = "a router of two passes, with caches that are offloaded or not made of layers, and in continuous batching"


@refuses(TWO_PASSES)
def offloaded_cache_of_two_passes(tools: Tools) -> Case:
    model = with_router(tools, LastHiddenRouter(NAMES, 32))

    class Offloaded(transformers.DynamicCache):
        offloading = property(lambda self: True, lambda self, value: None)

    message = "Offloaded as past_key_values can't hold the first pass.*pass use_cache=False, or a DynamicCache"
    call = lambda: model(tools.ids, past_key_values=Offloaded())  # noqa: E731
    advised = lambda: model(tools.ids, past_key_values=transformers.DynamicCache())  # noqa: E731
    return Case(model, call, message, lambda: model(tools.ids).logits, routed=advised)


def two_passes_with_its_own_cache(tools: Tools, net: Any, targets: list[str], message: str) -> Case:
    model = tools.peft(net, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    model.base_model.attach_router(LastHiddenRouter(["e"], 16))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    call = lambda: model.generate(tools.ids, **options)  # noqa: E731
    advised = lambda: model.generate(tools.ids, use_cache=False, **options)  # noqa: E731
    return Case(model, call, message, lambda: model(tools.ids, use_cache=False).logits, routed=advised)


@refuses(TWO_PASSES)
def state_space_cache_of_two_passes(tools: Tools) -> Case:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "use_mambapy": False}
    net = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=97, eos_token_id=None, **sizes))
    return two_passes_with_its_own_cache(tools, net, ["in_proj"], "as cache(_params)? can't hold the first pass")


@refuses(TWO_PASSES)
def recurrent_state_of_two_passes(tools: Tools) -> Case:
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    net = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=97, context_length=32, **sizes))
    return two_passes_with_its_own_cache(tools, net, ["key", "value"], "list as state can't hold the first pass")


@refuses(TWO_PASSES)
def continuous_batching_of_two_passes(tools: Tools) -> Case:
    model = with_router(tools, LastHiddenRouter(NAMES, 32))
    call = lambda: model.generate_batch(tools.ids.tolist())  # noqa: E731
    message = "nor a router that reads 'last_hidden' can follow: attach a router that reads embeddings or layers"
    return Case(model, call, message, lambda: model(tools.ids).logits)


# Static mixtures.


def plainly(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(ids).logits


@refuses("weights per token or sequence in `merge_and_unload` and `to_single_adapter`")
def merging_weights_per_token(tools: Tools) -> Case:
    model = tools.model()
    call = lambda: model.merge_and_unload(routing_weights=torch.ones(2, 7, 3))  # noqa: E731
    return Case(model, call, r"\(2, 7, 3\): weights that differ between tokens", plainly(model, tools.ids))


@refuses("weights per token or sequence in `merge_and_unload` and `to_single_adapter`")
def one_adapter_of_weights_per_sequence(tools: Tools) -> Case:
    model = tools.model()
    call = lambda: model.to_single_adapter(torch.ones(2, 3))  # noqa: E731
    return Case(model, call, r"weights must have shape \[N\], or .* got \(2, 3\)", plainly(model, tools.ids))


@refuses("merging `lora_bias` into a layer without bias")
def merging_biases(tools: Tools) -> Case:
    model = tools.model(lora_bias=True)
    call = lambda: model.merge_and_unload(routing_weights=[1, 1, 1])  # noqa: E731
    message = "q_proj has lora_bias=True, which can't be merged: its base layer has no bias"
    return Case(model, call, message, plainly(model, tools.ids))


@refuses("merging into a layer that shares its weight with another, as tied embeddings do")
def merging_into_tied_embeddings(tools: Tools) -> Case:
    model = tools.model("gpt2", target_modules=["wte", "c_attn"])
    call = lambda: model.merge_and_unload(routing_weights=[1, 1, 1])  # noqa: E731
    message = "transformer.wte can't be merged: it shares its weight with another layer.*: use to_single_adapter"
    return Case(model, call, message, plainly(model, tools.ids))


@refuses("merging into quantised layers that can't be quantised anew")
def merging_into_quantised_layers(tools: Tools) -> Case:
    pytest.importorskip("torchao")
    from torchao import quantization

    net = tools.base("llama")
    quantization.quantize_(net.model.layers[2], quantization.Int8WeightOnlyConfig())
    model = tools.peft(net, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    call = lambda: model.merge_and_unload(routing_weights=[0.5])  # noqa: E731
    message = (
        r"nothing can be merged into .*layers.2.self_attn.q_proj \(TorchaoLoraLinear\): .*load the base unquantised"
    )
    return Case(model, call, message, plainly(model, tools.ids))


@refuses("one adapter of experts that changed the base as they started (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)")
def one_adapter_over_another_base(tools: Tools) -> Case:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    model = tools.peft(tools.base("llama"), config)
    message = "expert 'e' was started with init_lora_weights='olora', which changed the base.*convert the expert"
    return Case(model, lambda: model.to_single_adapter([0.5]), message, plainly(model, tools.ids))


@refuses("one adapter of experts with `modules_to_save`, trainable tokens or `layer_replication`")
def one_adapter_and_saved_modules(tools: Tools) -> Case:
    model = tools.model(n=1, modules_to_save=["lm_head"])
    message = "expert 'expert_0' has modules_to_save, which one LoRA adapter of all can't carry"
    return Case(model, lambda: model.to_single_adapter([0.5]), message, plainly(model, tools.ids))


@refuses("one adapter with `lora_bias` over embeddings")
def one_adapter_with_biases_and_embeddings(tools: Tools) -> Case:
    model = tools.model("gpt2", n=1, lora_bias=True)
    model.add_adapter("words", peft.LoraConfig(r=2, target_modules=["wte"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["expert_0", "words"])
    message = "wte is an embedding, and PEFT has no lora_bias=True for these: train without it"
    return Case(model, lambda: model.to_single_adapter([0.5, 0.5]), message, plainly(model, tools.ids))


# Experts.


def change(row: str, message: str, do: Callable[[Any], Any], advised: Callable[[Any], Any]) -> None:
    """A change of the experts of a model that has no router."""

    def make(tools: Tools) -> Case:
        model = tools.model()
        return tools.of(model, message, refused=lambda: do(model), routed=lambda: advised(copy.deepcopy(model)))

    refuses(row)(make)


def one_with(**options: Any) -> Callable[[Any], Any]:
    config = peft.LoraConfig(target_modules=["q_proj"], **options)
    return lambda model: model.base_model.add_expert("new", config)


def only_active(model: Any) -> None:
    model.set_adapter("expert_1")
    try:
        model.base_model.remove_expert("expert_1")
    finally:
        model.base_model.set_adapter(NAMES)


for own in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}):
    change(
        "new experts with `modules_to_save` or `trainable_token_indices`", "requires_grad_", one_with(**own), one_with()
    )
change(
    "new experts with `layer_replication`",
    "which changes the base of all experts",
    one_with(layer_replication=[(0, 2), (1, 3)]),
    one_with(),
)
for init in ("pissa", "olora", "corda", "lora_ga"):
    change(
        "new experts whose initialisation changes the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)",
        f"init_lora_weights='{init}', which changes the base weights of all experts: pass a config with",
        one_with(init_lora_weights=init),
        one_with(init_lora_weights=True),
    )
for bad in ("a.b", "items", ""):
    change(
        "names that `nn.ModuleDict` can't hold",
        f"can't be called '{bad}'",
        lambda model, bad=bad: model.base_model.rename_expert("expert_0", bad),  # type: ignore[misc]
        lambda model: model.base_model.rename_expert("expert_0", "a_b"),
    )
change(
    "removing the only expert, the only active one, or a merged one",
    "the only active expert: activate another one first",
    only_active,
    lambda model: model.base_model.remove_expert("expert_1"),
)


@refuses("removing the only expert, the only active one, or a merged one")
def the_only_expert(tools: Tools) -> Case:
    model = tools.model(n=1)
    remove = lambda: model.base_model.remove_expert("expert_0")  # noqa: E731
    return tools.of(model, r"the only expert: model.unload\(\)", refused=remove)


@refuses("removing the only expert, the only active one, or a merged one")
def a_merged_expert(tools: Tools) -> Case:
    model = tools.model()
    model.merge_adapter(["expert_1"])
    remove = lambda: model.base_model.remove_expert("expert_1")  # noqa: E731
    return tools.of(model, r"merged into the base: call unmerge_adapter\(\)", refused=remove)


change(
    "maturities without a learned router",
    "mark_mature needs a learned moelora router, got NoneType",
    lambda model: model.base_model.mark_mature("expert_0"),
    lambda model: (
        model.base_model.attach_router(EmbeddingRouter(NAMES, 32)),
        model.base_model.mark_mature("expert_0"),
    ),
)


# The test.


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def looks(model: nn.Module) -> Any:
    """What a refusal must leave alone: classes, hooks, and the values of all that is in memory."""
    modules = {name: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    values = {name: p.detach().clone() for name, p in model.named_parameters() if type(p) is nn.Parameter}
    return modules, {name: value for name, value in values.items() if not value.is_meta}


@pytest.mark.parametrize(
    ("row", "make"),
    [pytest.param(row, make, id=f"{row}-{i}") for row, cases in CASES.items() for i, make in enumerate(cases)],
)
def test_is_refused_and_leaves_the_model_as_it_was(request, row, make):
    case = make(Tools(request))
    with torch.no_grad():
        expected, (modules, values) = case.plain(), looks(case.model)
        for _ in range(2):
            with pytest.raises(case.error, match="(?s)" + case.message):
                case.refused()
            assert getattr(frame._slot, "frame", None) is None
            assert torch.equal(case.plain(), expected)
        if case.routed is not None:
            case.routed()
        modules_after, values_after = looks(case.model)
    assert modules_after == modules
    assert values_after.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(values_after[name], value, msg=name)  # unmerging rounds


def test_the_page_lists_what_is_tested_and_the_tests_test_what_it_lists():
    rows = re.findall(r"^\| (.+?) \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(row for row in rows if row != "Refused") == sorted(CASES)


def test_a_variant_that_is_not_active_is_no_obstacle(make_lora, ids):
    model = make_lora("llama", target_modules=["q_proj"])
    model.add_adapter("dora", peft.LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = adopt(model)
    model(ids, routing_weights=torch.ones(3))
    model.base_model.set_adapter(["expert_0", "dora"])
    with pytest.raises(ValueError, match="can't route adapter 'dora'"):
        model(ids, routing_weights=torch.ones(2))


def test_a_router_is_refused_as_weights_are(make_lora, ids):
    model = adopt(make_lora("llama", use_dora=True, target_modules=["q_proj"]))
    expected = model(ids).logits
    model.base_model.attach_router(FixedRouter(NAMES))
    with pytest.raises(ValueError, match="can't route adapter 'expert_0'"):
        model(ids)
    model.base_model.detach_router()
    assert torch.equal(model(ids).logits, expected)


def test_a_mixed_adapter_with_a_mixture_config(make_base):
    with pytest.raises(ValueError, match="mixed=True can't be routed"):
        moelora.get_peft_model(make_base("llama"), moelora.MoELoraConfig(target_modules=["q_proj"]), mixed=True)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"mixture": "heads"}, "mixture must be one of"), ({"routing_tail": "last"}, "routing_tail must be one of")],
)
def test_unknown_modes(make_lora, ids, keywords, message):
    model = adopt(make_lora("llama"))
    with pytest.raises(ValueError, match=message):
        model(ids, routing_weights=torch.ones(3), **keywords)
