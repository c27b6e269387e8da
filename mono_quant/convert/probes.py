"""Inputs to measure a model with.

Text models are probed with sentences when there is a tokenizer, else with random tokens; vision and audio models with noise in
the shape their config names; other modules with the inputs the user gives. Synthetic probes under-represent rare
inputs: the numbers say how close the arithmetic is, not how good the model is.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert.untouched import untouched
from mono_quant.errors import MonoQuantError
from mono_quant.io.text import scrub
from mono_quant.planning.walk import is_transformers_model

SENTENCES = (
    "The ferry leaves the harbour at seven and returns before noon.",
    "She measured the voltage twice, because the first reading looked wrong.",
    "How many people live in the capital of Portugal?",
    "Fresh bread, salted butter, two ripe tomatoes and a pinch of oregano.",
    "The committee will publish its decision within thirty days.",
    "def area(radius): return 3.14159 * radius ** 2",
    "A glacier carries rocks downhill and leaves them where the ice melts.",
    "Please confirm your appointment by replying to this message.",
    "In 1969 two astronauts walked on the surface of the Moon.",
    "The price of copper rose by 4.2 % while demand for zinc stayed flat.",
    "He could not remember whether the key was under the mat or in the shed.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
)
_SEED = 20
_BATCH, _LENGTH = 4, 32
# What the code of a model or a tokenizer raises when it does not fit its inputs.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
    MonoQuantError,
)


class ProbeError(Exception):
    """The model could not be run on the probe; the text says why."""


@dataclass(frozen=True)
class Probe:
    """Inputs for one forward pass.

    Attributes:
        args, kwargs: of the call.
        name: what the inputs are, for the report.
        mask: bool [B, L], True at real tokens; None when all count.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str
    mask: Tensor | None = None


@contextmanager
def probing(what: str) -> Iterator[None]:
    """Turn whatever foreign code raises into a `ProbeError`: measuring must never cost the conversion."""
    try:
        yield
    except _FAILURES as e:
        raise ProbeError(f"{what}: {_public(e)}") from e


def _public(error: BaseException) -> str:
    """Cut a foreign message down to a line that may be published: no access token, no path of this machine."""
    line = scrub(str(error)) or type(error).__name__
    return re.sub(r"(?<![\w.])(~|[A-Za-z]:)?[/\\][^\s'\",;:)]+", "<path>", line)[:200]


def given_probe(inputs: Any) -> Probe:
    """Wrap the user's inputs: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        mask = inputs.get("attention_mask")
        return Probe((), dict(inputs), "the given inputs", mask.bool() if isinstance(mask, Tensor) else None)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return Probe(args, {}, "the given inputs")


def make_probe(model: nn.Module, processor: Any) -> Probe:
    """Make inputs for a transformers model.

    Args:
        model: on the device where it runs.
        processor: its tokenizer or processor, or None.

    Raises:
        ProbeError: what it takes is not known.
    """
    if not is_transformers_model(model):
        raise ProbeError("a plain module's inputs are not known; pass probe=<inputs>")
    with probing("no inputs could be made"), untouched(processor):
        generator = torch.Generator().manual_seed(_SEED)
        probe = _main_inputs(model, processor, generator)
        kwargs = {**probe.kwargs, **_decoder_inputs(model, probe)}
        return Probe(probe.args, _on_device_of(model, kwargs), probe.name, probe.mask)


def _main_inputs(model: nn.Module, processor: Any, generator: torch.Generator) -> Probe:
    main = getattr(model, "main_input_name", "input_ids")
    if _takes_text_and_image(model):
        return _text_and_image(model, processor, generator)
    if main == "input_ids":
        return _sentences(processor) or _random_tokens(model, generator)
    if main == "pixel_values":
        return _noise_image(model, generator)
    if main == "input_features":
        return _noise_audio(model, generator)
    if main == "input_values":
        return _noise_values(model, generator)
    raise ProbeError(f"inputs called {main} are not known; pass probe=<inputs>")


def _takes_text_and_image(model: nn.Module) -> bool:
    """True where the two are separate inputs (CLIP); a model with image tokens (LLaVA) runs on text alone."""
    config: Any = model.config
    tokens = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return (
        {"input_ids", "pixel_values"} <= inspect.signature(model.forward).parameters.keys()
        and getattr(config, "text_config", None) is not None
        and getattr(config, "vision_config", None) is not None
        and all(token is None for token in tokens)
    )


def _text_and_image(model: nn.Module, processor: Any, generator: torch.Generator) -> Probe:
    text = _sentences(processor) or _random_tokens(model, generator)
    image = _noise_image(model, generator)
    known = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in text.kwargs.items() if name in known} | dict(image.kwargs)
    count = min(len(value) for value in inputs.values())
    pairs = {name: value[:count] for name, value in inputs.items()}
    mask = None if text.mask is None else text.mask[:count]
    return Probe((), pairs, f"{count} of {text.name} with {image.name}", mask)


def _sentences(processor: Any) -> Probe | None:
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not callable(tokenizer):
        return None
    padding = getattr(tokenizer, "pad_token", None) is not None
    texts = list(SENTENCES) if padding else [" ".join(SENTENCES)]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=padding, truncation=True, max_length=128))
    mask = batch.get("attention_mask")
    name = f"{len(SENTENCES)} built-in sentences"
    return Probe((), batch, name, mask.bool() if isinstance(mask, Tensor) else None)


def _random_tokens(model: nn.Module, generator: torch.Generator) -> Probe:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    size = getattr(config, "vocab_size", None)
    if not size:
        raise ProbeError("the config names no vocab_size; pass probe=<inputs>")
    longest = getattr(config, "max_position_embeddings", None)
    limit = min(_LENGTH, longest) if isinstance(longest, int) and longest > 0 else _LENGTH
    ids = torch.randint(0, size, (_BATCH, limit), generator=generator)
    # the end and padding tokens would cut sequences short in classifiers and decoders
    special = [
        t
        for t in (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None))
        if isinstance(t, int)
    ]
    for token in special:
        ids[ids == token] = next(t % size for t in range(token + 1, token + size) if t % size not in special)
    end = getattr(config, "eos_token_id", None)
    if getattr(model.config, "is_encoder_decoder", False) and isinstance(end, int):
        # classifiers read their answer at the end token
        ids[:, -1] = end
    mask = torch.ones_like(ids)
    return Probe(
        (), {"input_ids": ids, "attention_mask": mask}, f"{_BATCH} x {limit} random tokens", mask.bool()
    )


def _noise_image(model: nn.Module, generator: torch.Generator) -> Probe:
    whole: Any = model.config
    config = getattr(whole, "vision_config", None) or getattr(whole, "encoder", None) or whole
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    shape = (2, getattr(config, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=generator)
    return Probe((), {"pixel_values": pixels}, f"2 noise images of {height} x {width}")


def _noise_audio(model: nn.Module, generator: torch.Generator) -> Probe:
    bins, frames = (
        getattr(model.config, "num_mel_bins", None),
        getattr(model.config, "max_source_positions", None),
    )
    if not isinstance(bins, int) or not isinstance(frames, int):
        raise ProbeError("the config names no num_mel_bins and max_source_positions; pass probe=<inputs>")
    features = torch.randn(1, bins, 2 * frames, generator=generator)
    return Probe((), {"input_features": features}, f"noise of {2 * frames} frames")


def _noise_values(model: nn.Module, generator: torch.Generator) -> Probe:
    config: Any = model.config
    if not hasattr(config, "frequency_stride"):
        wave = torch.randn(2, 8000, generator=generator)
        return Probe((), {"input_values": wave}, "noise of 8,000 samples")
    # a transformer of spectrograms, which are called input_values too
    frames, bins = config.max_length, config.num_mel_bins
    values = torch.randn(2, frames, bins, generator=generator)
    return Probe((), {"input_values": values}, f"2 noise spectrograms of {frames} x {bins}")


def _decoder_inputs(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    config = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    if type(model).__name__.endswith("ForSequenceClassification"):
        return {}  # these give the decoder the text of the encoder
    start = getattr(config, "decoder_start_token_id", None)
    text = config.get_text_config()  # type: ignore[union-attr,operator]
    if not getattr(text, "vocab_size", None):
        return {}  # DETR and its like are encoder-decoders without tokens
    generator = torch.Generator().manual_seed(_SEED + 1)
    batch = next(v.shape[0] for v in probe.kwargs.values() if isinstance(v, Tensor))
    ids = torch.randint(0, text.vocab_size, (batch, 8), generator=generator)
    ids[:, 0] = start if isinstance(start, int) else 0
    return {"decoder_input_ids": ids}


def _on_device_of(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    parameter = next(model.parameters())
    return {k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
