"""Arithmetic: definitions (`weights`, `reference`) and the fast paths that are held against them.

`ops` is what runs at every forward, `encoding` what makes codes, `choice` decides which path does it. From outside this is one room:
its parts are its own affair.
"""

from mono_quant.kernels.activations import ACTIVATIONS, AUTO, SCHEMES, ActivationScheme, check_activations
from mono_quant.kernels.attention import attention, try_attention
from mono_quant.kernels.choice import activation_scheme, describe, describe_half, environment, using
from mono_quant.kernels.encoding import cast_half, encode_rows
from mono_quant.kernels.inputs import NO_GRADIENT, check_indices, check_input
from mono_quant.kernels.ops import half_linear, int8_conv, int8_embedding, int8_linear, is_watched
from mono_quant.kernels.reference import MAX_IN_FEATURES
from mono_quant.kernels.starvation import processors, starved

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "MAX_IN_FEATURES",
    "NO_GRADIENT",
    "SCHEMES",
    "ActivationScheme",
    "activation_scheme",
    "attention",
    "cast_half",
    "check_activations",
    "check_indices",
    "check_input",
    "describe",
    "describe_half",
    "encode_rows",
    "environment",
    "half_linear",
    "int8_conv",
    "int8_embedding",
    "int8_linear",
    "is_watched",
    "processors",
    "starved",
    "try_attention",
    "using",
]
