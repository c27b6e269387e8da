"""Graphs of models for the runtimes that bring their own: ONNX files, with the cache as plain tensors in and out."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import PROMPT, Inputs

# What the export loads.
ONNX_IMPORTS = ("onnx", "onnxscript", "onnxruntime", "onnxruntime.quantization")


class Whole(nn.Module):
    """A model with its inputs by position, and its first output alone."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, args, strict=True)))[0]  # type: ignore[no-any-return]


class _Step(nn.Module):
    """A decoder fed one token, with the cache as plain tensors in and out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache  # noqa: PLC0415

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)[0]
        return out, *_tensors(cache)


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def prompt(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return keys and values of the prompt, layer by layer."""
    from transformers import DynamicCache  # noqa: PLC0415

    cache = DynamicCache()
    model(input_ids=inputs["input_ids"][:, :PROMPT], past_key_values=cache, use_cache=True)
    return [tensor.contiguous() for tensor in _tensors(cache)]


def names(past: list[torch.Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of the cache's tensors, as inputs and as outputs."""
    return [f"past_{i}" for i in range(len(past))], [f"present_{i}" for i in range(len(past))]


def export(model: nn.Module, inputs: Inputs, past: list[torch.Tensor], file: Path) -> None:
    """Write an ONNX file: of fixed sizes, which suit the optimizers best, but for the cache, which grows."""
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": False}
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        if not past:
            example = tuple(inputs.values())
            torch.onnx.export(Whole(model, list(inputs)), example, file, input_names=list(inputs), **options)
            return
        before, after = names(past)
        torch.onnx.export(
            _Step(model),
            (inputs["input_ids"][:, PROMPT : PROMPT + 1], past),
            file,
            input_names=["input_ids", *before],
            output_names=["out", *after],
            dynamic_shapes=(None, [{2: torch.export.Dim.DYNAMIC}] * len(past)),
            **options,
        )
