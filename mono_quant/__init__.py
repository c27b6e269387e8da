"""Quantize any Hugging Face or PyTorch model to INT8 or FP16, without calibration data."""

from mono_quant.version import __version__

__all__ = ["__version__"]
