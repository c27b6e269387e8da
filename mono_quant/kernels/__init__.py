"""Arithmetic: definitions (`weights`, `reference`) and the fast paths that are held against them.

`ops` is what runs at every forward, `fused` what graphs call, `encoding` what makes codes, `choice` decides which path does it. From
outside this is one room: its parts are its own affair.
"""

from mono_quant.kernels.activations import ACTIVATIONS, AUTO, SCHEMES, ActivationScheme, check_activations
from mono_quant.kernels.attention import attention, try_attention
from mono_quant.kernels.captured import ATTENTION_OPS, CONV_OPS, HALF_OPS, LINEAR_OPS
from mono_quant.kernels.choice import activation_scheme, active, describe, describe_half, environment, using
from mono_quant.kernels.device_chains import runs_on_device
from mono_quant.kernels.encoding import cast_half, encode_rows
from mono_quant.kernels.experts import has_experts, int8_experts, mix_experts
from mono_quant.kernels.fused import chain, chain_kept, chain_parts, is_fusable, norm, rotary
from mono_quant.kernels.fused_conv import (
    BatchNorm,
    ConvGeometry,
    conv,
    conv_shape,
    images_at_once,
    pooled_conv,
)
from mono_quant.kernels.inputs import NO_GRADIENT, check_indices, check_input
from mono_quant.kernels.ops import half_linear, int8_conv, int8_embedding, int8_linear
from mono_quant.kernels.packs import bytes_held
from mono_quant.kernels.pool import for_images
from mono_quant.kernels.program import Program
from mono_quant.kernels.recording import Recorder
from mono_quant.kernels.recurrent import run_recurrent
from mono_quant.kernels.reference import MAX_IN_FEATURES
from mono_quant.kernels.starvation import processors, starved
from mono_quant.kernels.steps import Norm, Product
from mono_quant.kernels.watching import is_followed, is_watched

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_OPS",
    "AUTO",
    "CONV_OPS",
    "HALF_OPS",
    "LINEAR_OPS",
    "MAX_IN_FEATURES",
    "NO_GRADIENT",
    "SCHEMES",
    "ActivationScheme",
    "BatchNorm",
    "ConvGeometry",
    "Norm",
    "Product",
    "Program",
    "Recorder",
    "activation_scheme",
    "active",
    "attention",
    "bytes_held",
    "cast_half",
    "chain",
    "chain_kept",
    "chain_parts",
    "check_activations",
    "check_indices",
    "check_input",
    "conv",
    "conv_shape",
    "describe",
    "describe_half",
    "encode_rows",
    "environment",
    "for_images",
    "half_linear",
    "has_experts",
    "images_at_once",
    "int8_conv",
    "int8_embedding",
    "int8_experts",
    "int8_linear",
    "is_followed",
    "is_fusable",
    "is_watched",
    "mix_experts",
    "norm",
    "pooled_conv",
    "processors",
    "rotary",
    "run_recurrent",
    "runs_on_device",
    "starved",
    "try_attention",
    "using",
]
