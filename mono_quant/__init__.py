"""Quantize any Hugging Face or PyTorch model to INT8 or FP16, without calibration data."""

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
from mono_quant.planning.config import QuantizationConfig
from mono_quant.version import __version__

__all__ = [
    "MonoQuantError",
    "QuantizationConfig",
    "QuantizedModel",
    "__version__",
    "dynamic_quantize",
    "inspect",
    "load",
    "plan",
    "push_to_hub",
    "quantize",
    "quantize_from_hub",
    "verify",
]
