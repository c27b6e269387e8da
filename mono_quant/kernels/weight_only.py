"""Products with int8 weights in the arithmetic of their input, for devices that multiply no integers: those of Apple ("mps").

Weights become floats block by block, rounded once to the dtype of the input; activations stay as they are::

    y = x @ round(q * s)^T + bias

The scales go into the weights and not behind the product: a sum of codes leaves float16. How close the result is depends on the
device, where a scheme that is named promises bits: that is left to `reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_quant.kernels.activations import AUTO
from mono_quant.kernels.weights import dequantize_rows

DEVICES = frozenset({"mps"})
# For people: reports, and `mono-quant env`.
DESCRIPTION = "int8 weights, arithmetic of the input (unverified on this device)"
# Weights that are floats at once: bounds the scratch memory.
_ELEMENTS = 1 << 24


def serves(device: torch.device | str, *schemes: str) -> bool:
    """Say whether products on a device are computed here.

    Args:
        device: where the input lies.
        schemes: what the layer asks for, and what was asked for in the place of that: all have to leave it open.
    """
    return torch.device(device).type in DEVICES and all(scheme == AUTO for scheme in schemes)


def found() -> list[str]:
    """Return the devices of this machine that products are computed on here."""
    return ["mps"] if torch.backends.mps.is_available() else []


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Apply an int8 linear layer without quantizing its input.

    Args:
        x: fp32, fp16 or bf16 [..., K].
        weight: int8 [N, K].
        weight_scale: fp32 [N, 1].
        bias: float [N] or None.

    Returns:
        [..., N] in the dtype of `x`.
    """
    rows, depth = weight.shape
    step = max(1, _ELEMENTS // max(1, depth))
    bias = None if bias is None else bias.to(x.dtype)
    parts = []
    for start in range(0, max(1, rows), step):
        block = slice(start, start + step)
        floats = dequantize_rows(weight[block], weight_scale[block], x.dtype)
        parts.append(F.linear(x, floats, None if bias is None else bias[block]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Apply an int8 convolution without quantizing its input; see `mono_quant.kernels.int8_conv`."""
    floats = (weight * weight_scale.view(-1, 1, 1, 1)).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, floats, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
