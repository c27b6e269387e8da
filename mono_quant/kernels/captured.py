"""What a captured graph calls our products by."""

import torch

from mono_quant.kernels import attention, library  # noqa: F401 - importing them makes the ops

LINEAR_OPS = (torch.ops.mono_quant.int8_linear, torch.ops.mono_quant.int8_linear.default)
CONV_OPS = (torch.ops.mono_quant.int8_conv, torch.ops.mono_quant.int8_conv.default)
HALF_OPS = (torch.ops.mono_quant.half_linear, torch.ops.mono_quant.half_linear.default)
ATTENTION_OPS = (torch.ops.mono_quant.attention, torch.ops.mono_quant.attention.default)
