"""Rows of an int8 table: gathered and dequantized in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import narrow
from mono_quant.kernels.inputs import FLOATS, INDICES

# Values of a program. Not measured on a device.
_MOST_VALUES = 4096


@triton.jit(do_not_specialize=["ROWS"])
def _gather(index_ptr, weight_ptr, scale_ptr, out_ptr, ROWS, WIDTH, VALUES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + token).to(tl.int64)
    is_there = (row >= 0) & (row < ROWS)
    row = tl.where(is_there, row, 0)
    column = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    code = tl.load(weight_ptr + row * WIDTH + column, mask=column < WIDTH, other=0)
    scale = tl.where(is_there, tl.load(scale_ptr + row), float("nan"))
    value = narrow(code.to(tl.float32) * scale, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * WIDTH + column, value, mask=column < WIDTH)


def embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Gather and dequantize rows; see `mono_quant.kernels.int8_embedding`.

    An index that the table does not have gives a row of NaN, and reads nothing outside of the table. torch stops the whole device
    there, by an assertion that compiled kernels do not have, and to look at the indices from the host would wait for the device.

    Returns:
        `dtype` [*indices.shape, D], or None where there is no kernel for the arguments.
    """
    if dtype not in FLOATS or indices.dtype not in INDICES or weight.dim() != 2 or not weight.numel():
        return None
    if weight.dtype is not torch.int8 or weight_scale.dtype is not torch.float32:
        return None
    rows, width = weight.shape
    if weight_scale.numel() != rows or not indices.device == weight.device == weight_scale.device:
        return None
    out = torch.empty((*indices.shape, width), dtype=dtype, device=weight.device)
    if out.numel():
        values = min(_MOST_VALUES, triton.next_power_of_2(width))
        launch(
            _gather,
            (indices.numel(), triton.cdiv(width, values)),
            [indices.contiguous(), weight.contiguous(), weight_scale.contiguous(), out, rows, width],
            {"VALUES": values},
            device=weight.device,
        )
    return out
