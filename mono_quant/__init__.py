"""Quantize any Hugging Face or PyTorch model to INT8 or FP16, without calibration data."""

from typing import Any

from mono_quant.api import diffusion_on_load, on_load
from mono_quant.api.on_load import enable
from mono_quant.api.result import QuantizedModel
from mono_quant.api.verbs import (
    dynamic_quantize,
    inspect,
    load,
    plan,
    push_to_hub,
    quantize,
    quantize_from_hub,
)
from mono_quant.artifact.inspection import verify
from mono_quant.errors import MonoQuantError
from mono_quant.hf import marks
from mono_quant.hf.late import when_imported
from mono_quant.planning.config import QuantizationConfig
from mono_quant.version import __version__

__all__ = [  # noqa: F822
    "MonoQuantConfig",
    "MonoQuantError",
    "QuantizationConfig",
    "QuantizedModel",
    "__version__",
    "dynamic_quantize",
    "enable",
    "inspect",
    "load",
    "plan",
    "push_to_hub",
    "quantize",
    "quantize_from_hub",
    "verify",
]

when_imported("transformers.quantizers.auto", on_load.register)
when_imported("sentence_transformers.base.model", marks.mark_encoders_)
when_imported("diffusers.quantizers.auto", diffusion_on_load.register)


def __getattr__(name: str) -> Any:
    if name == "MonoQuantConfig":
        return on_load.MonoQuantConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
