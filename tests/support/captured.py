"""What the graph backend makes of a function or model, and the same graph with plain torch in the place of the fused calls."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from models import Family, text, transformer, whisper
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.graphs.backend import rewrite_

ORDER = ("added", "pre", "gate", "act", "second", "batch_norm", "residual", "relu", "post")


class Composed(Interpreter):
    """Runs a rewritten graph by what its calls stand for, operation by operation as models write it."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run what a call of `kernels` stands for, or the call."""
        run = getattr(self, f"as_{target.__name__}") if is_ours(target) else target
        return run(*args, **kwargs)

    @staticmethod
    def as_int8_linear(*args: Any) -> Tensor:
        return torch.ops.mono_quant.int8_linear(*args)

    @staticmethod
    def as_int8_conv(*args: Any) -> Tensor:
        return torch.ops.mono_quant.int8_conv(*args)

    @staticmethod
    def as_half_linear(*args: Any) -> Tensor:
        return torch.ops.mono_quant.half_linear(*args)

    def as_chain_parts(self, x: Tensor, first: Any, pre: Any = None) -> list[Tensor]:
        weights, scales, biases, activations = first
        x = self.as_norm(x, pre) if pre else x
        scheme = () if activations == "auto" else (activations,)
        return [
            self.as_int8_linear(x, *layer, *scheme) for layer in zip(weights, scales, biases, strict=True)
        ]

    def as_chain(self, x: Tensor, first: Any, *, pre: Any = None, act: Any = None, gate: Any = None, second: Any = None,
                 residual: Any = None, post: Any = None) -> Tensor:  # fmt: skip
        x = self.as_norm(x, pre) if pre else x
        y = torch.cat(self.as_chain_parts(x, first), -1)
        if gate:
            y = activate(act, torch.cat(self.as_chain_parts(x, gate), -1)) * y
        elif act:
            y = activate(act, y)
        y = torch.cat(self.as_chain_parts(y, second), -1) if second else y
        y = y if residual is None else y + residual
        return self.as_norm(y, post) if post else y

    def as_chain_kept(
        self, x: Tensor, first: Any, *, pre: Any, added: Any = None, keep: Any = (), **steps: Any
    ) -> Any:
        total = x if added is None else x + added
        normed = self.as_norm(total, pre)
        parts = [self.as_chain(normed, first, **steps)] if steps else self.as_chain_parts(normed, first)
        return *({"sum": total, "normed": normed}[name] for name in keep), *parts

    @staticmethod
    def as_norm(x: Tensor, how: Any, residual: Tensor | None = None) -> Any:
        kind, weight, bias, eps = how
        total = x if residual is None else x + residual
        if kind == "layer":
            normed = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
        else:
            wide = total.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            if weight is None or weight.dtype is total.dtype:
                # Llama rounds in front of the weight, Gemma behind it
                normed = normed.to(total.dtype)
            normed = normed if weight is None else (weight * normed).to(total.dtype)
        return normed if residual is None else (normed, total)

    @staticmethod
    def as_rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = q.chunk(2, -1)
        return q * cos.unsqueeze(1) + torch.cat((-high, low), -1) * sin.unsqueeze(1)

    # what eager models of transformers call too
    as_attention = staticmethod(kernels.attention)

    def as_conv(self, *args: Any, batch_norm: Any = None, residual: Any = None, relu: bool = False) -> Tensor:
        y = self.as_int8_conv(*args)
        if batch_norm:
            weight, bias, mean, variance, eps = batch_norm
            y = F.batch_norm(y, mean, variance, weight, bias, False, 0.0, eps)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y


def activate(name: str, x: Tensor) -> Tensor:
    if name == "gelu_tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    return {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[name](x)


def is_ours(target: Any) -> bool:
    return getattr(target, "__module__", "").startswith("mono_quant.kernels")


def spelled(node: Node) -> str:
    """Return the name of a call of `kernels` with its parts, as `chain pre act second`."""
    if node.target is kernels.norm and len(node.args) == 3:
        return "norm residual"
    kept = [f"and {name}" for name in node.kwargs.get("keep", ())]
    return " ".join([node.target.__name__, *(part for part in ORDER if part in node.kwargs), *kept])


@dataclass
class Captured:
    """A backend that keeps what it made, gives the composed result and remembers the fused one.

    Attributes:
        path: that patterns are looked for on; what they became computes on the one that is there then.
    """

    path: str | None = None
    graphs: list[GraphModule] = field(default_factory=list)
    fused: list[Any] = field(default_factory=list)

    def __call__(self, graph: GraphModule, _inputs: Any) -> Callable[..., Any]:
        with kernels.using(path=self.path):
            self.graphs.append(rewrite_(graph))

        def run(*args: Any) -> Any:
            # tensors of its own, as a graph may write into them
            own = [arg.clone() if type(arg) is Tensor else arg for arg in args]
            self.fused.append(graph.forward(*own))
            return Composed(graph).run(*args)

        return run

    @property
    def calls(self) -> Counter[str]:
        """How often each fused call is in the graphs."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return Counter(spelled(node) for node in nodes if node.op == "call_function" and is_ours(node.target))


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Captured, Any]:
    """Return what was made of a function or module, and its composed result for these inputs."""
    torch.compiler.reset()
    captured = Captured()
    result = torch.compile(function, backend=captured)(*args, **kwargs)
    return captured, result


_TEXT = {**transformer, "num_hidden_layers": 1}
_PICTURE = {key: value for key, value in _TEXT.items() if key != "vocab_size"} | {
    "image_size": 32,
    "patch_size": 8,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LARGE_HEADS = {**_GROUPED, "head_dim": 16}


def picture() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def sound() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 20, 80)}


def of(name: str, inputs: Callable[[], dict[str, Tensor]] = text, **sizes: Any) -> Family:
    """Return a family by the name of its class, such as `BertModel`."""

    def make() -> nn.Module:
        cls = getattr(hf, name)
        return cls._from_config(cls.config_class(**sizes))

    return Family(make, inputs)


class Bottleneck(nn.Module):
    """A block of a ResNet with a shortcut that is added in place, as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((64, 64, 1), (64, 64, 3), (64, 128, 1), (64, 128, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2, bias=False) for i, o, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
        for norm in self.norms:
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norms[0](self.convs[0](x)))
        out = self.relu(self.norms[1](self.convs[1](out)))
        out = self.norms[2](self.convs[2](out))
        out += self.norms[3](self.convs[3](x))
        return self.relu(out)


# One layer each, as time goes into capturing.
CLASSIFIER = of("BertForSequenceClassification", **_TEXT)
GENERATOR = of("LlamaForCausalLM", **_GROUPED)
_ENCODER = {
    "norm": 1,
    "chain_parts": 1,
    "attention": 1,
    "chain residual post": 1,
    "chain act second residual post": 1,
}
_PRE = {"chain_parts pre": 1, "attention": 1, "chain residual": 1}
_MLP = {"chain pre act second residual post": 1}
_GATED = {"chain pre gate act second residual post": 1}
_LLAMA = {**_PRE, **_GATED, "rotary": 2}
_SUMMED = {key: value for key, value in _ENCODER.items() if key != "norm"} | {"norm residual": 1}
_BEHIND = {"chain_parts pre": 1, "chain post": 1, "chain pre gate act second post": 1}
_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 200}
_OPT = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
}
# Each with one layer, and what it has to become: a new spelling in transformers shows here.
GRAPHS: Mapping[str, tuple[Family, Mapping[str, int]]] = {
    "bert": (of("BertModel", **_TEXT), _ENCODER),
    "roberta": (of("RobertaModel", **_TEXT), _SUMMED),
    "distilbert": (
        of("DistilBertModel", dim=64, hidden_dim=128, n_layers=1, n_heads=4, vocab_size=200),
        _ENCODER,
    ),
    # attention written out
    "mpnet": (of("MPNetModel", **_TEXT), {key: n for key, n in _SUMMED.items() if key != "attention"}),
    "modernbert": (
        of("ModernBertModel", **_TEXT, pad_token_id=0, cls_token_id=1, sep_token_id=2),
        {**_GATED, "norm": 1, "int8_linear": 1, "rotary": 2, "attention": 1, "chain residual": 1},
    ),
    "vit": (of("ViTModel", picture, **_PICTURE), {**_PRE, **_MLP}),
    # its layers are scaled behind the products
    "dinov2": (
        of("Dinov2Model", picture, **_PICTURE, mlp_ratio=2),
        {
            "chain_parts pre": 1,
            "attention": 1,
            "int8_linear": 1,
            "norm residual": 1,
            "chain pre act second": 1,
        },
    ),
    "siglip": (of("SiglipVisionModel", picture, **_PICTURE), {**_PRE, **_MLP, "chain pre act": 1}),
    # its activation (quick_gelu) is none of ours
    "clip": (of("CLIPTextModel", **_GROUPED), {**_PRE, "chain pre": 1, "chain residual post": 1}),
    # its last layer stays in float
    "t5": (of("T5EncoderModel", **_T5), {**_PRE, "chain pre act": 1, "norm residual": 1}),
    "flan-t5": (
        of("T5EncoderModel", **_T5, feed_forward_proj="gated-gelu"),
        {**_PRE, "chain pre gate act": 1, "norm residual": 1},
    ),
    "llama": (of("LlamaModel", **_GROUPED), _LLAMA),
    "mistral": (of("MistralModel", **_GROUPED), _LLAMA),
    "qwen2": (of("Qwen2Model", **_GROUPED), _LLAMA),
    "qwen3": (of("Qwen3Model", **_LARGE_HEADS), {**_LLAMA, "norm": 2}),
    "gemma": (of("GemmaModel", **_LARGE_HEADS), _LLAMA),
    # its scores are capped, so its attention is written out
    "gemma2": (of("Gemma2Model", **_LARGE_HEADS), {**_BEHIND, "rotary": 2, "norm": 1}),
    "gemma3": (of("Gemma3TextModel", **_LARGE_HEADS), {**_BEHIND, "rotary": 2, "attention": 1, "norm": 3}),
    "phi3": (
        of("Phi3Model", **_GROUPED),
        {**_GATED, "chain pre": 1, "rotary": 2, "attention": 1, "chain residual": 1},
    ),
    # neighbours are turned, not halves
    "glm4": (of("Glm4Model", **_LARGE_HEADS), {**_BEHIND, "attention": 1, "norm residual": 1}),
    "gpt2": (
        of("GPT2Model", n_embd=64, n_layer=1, n_head=4, n_positions=64, vocab_size=200),
        {**_MLP, "chain pre": 1, "attention": 1, "chain residual": 1},
    ),
    "gpt-neox": (
        of("GPTNeoXModel", **_TEXT),
        {
            "chain pre": 1,
            "rotary": 2,
            "attention": 1,
            "int8_linear": 1,
            "norm residual": 1,
            "chain pre act second residual": 1,
        },
    ),
    "opt": (of("OPTModel", **_OPT, vocab_size=200), {**_PRE, "chain pre act second residual": 1, "norm": 1}),
    "whisper": (
        Family(lambda: whisper().model.encoder, sound),
        {key: 2 * n for key, n in _PRE.items()} | {**_MLP, "chain pre act second residual": 1},
    ),
    "convnext": (
        of("ConvNextModel", picture, hidden_sizes=[32, 64], depths=[1, 1], num_stages=2),
        {"norm": 3, "chain pre act second": 2},
    ),
    "resnet": (
        Family(Bottleneck, lambda: {"x": torch.randn(2, 64, 8, 8)}),
        {"conv batch_norm relu": 2, "conv batch_norm residual relu": 1, "conv batch_norm": 1},
    ),
}

_GATED_THERE = {"chain_kept added pre gate act second and sum": 1}
# What some become where kernels for a device are, in any dtype: attention, rotary embeddings and norms without a product behind them
# are what torch's compiler makes of them.
ON_DEVICE: Mapping[str, Mapping[str, int]] = {
    "bert": {
        "chain_kept pre and normed": 1,
        "int8_linear": 1,
        "chain_kept added pre act second and normed": 1,
        "norm": 1,
    },
    "t5": {"chain_parts pre": 1, "int8_linear": 1, "chain_kept added pre act and sum": 1, "norm": 1},
    "llama": {"chain_parts pre": 1, "int8_linear": 1, **_GATED_THERE, "norm": 1},
    "qwen3": {"chain_parts pre": 1, "int8_linear": 1, **_GATED_THERE, "norm": 3},
    "gemma3": {"chain_parts pre": 1, "int8_linear": 1, **_GATED_THERE, "norm": 5},
    "phi3": {"chain pre": 1, "int8_linear": 1, **_GATED_THERE, "norm": 1},
    "gpt2": {"chain pre": 1, "int8_linear": 1, "chain_kept added pre act second and sum": 1, "norm": 1},
    # its experts are an op of their own
    "mixtral": {"chain_parts pre": 1, "int8_linear": 1, "norm": 2},
}
