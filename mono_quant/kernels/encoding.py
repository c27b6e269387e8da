"""The one way from a float tensor to codes: a native kernel where there is one, the definition in `weights` otherwise.

Both give the same codes and scales, bit for bit; the error sums may differ in their last digits.
"""

import torch
from torch import Tensor

from mono_quant.kernels import weights
from mono_quant.kernels.accelerators import path_of
from mono_quant.kernels.choice import active
from mono_quant.kernels.weights import HalfCast, RowCodes


def encode_rows(
    matrix: Tensor, *, into: tuple[Tensor, Tensor] | None = None, threads: int | None = None
) -> RowCodes:
    """Quantize each row of a matrix symmetrically to int8; see `weights.quantize_rows`.

    Rows are independent: those of a part of a matrix get the bits that they have in the whole.

    Args:
        matrix: floating [N, K].
        into: dense codes, int8 [N, K], and scales, fp32 [N, 1], to write and return; new ones when not given.
        threads: of the native kernel; those of torch when not given.

    Raises:
        NonFiniteWeightError: a value is NaN or infinite.
    """
    native = None
    if active.cpu is not None and matrix.is_cpu:
        native = active.cpu.encode_rows(matrix, matrix.dtype, into, threads)
    elif (device := path_of(matrix)) is not None:
        native = device.encode_rows(matrix, into)
    # what is not finite is left to the definition, which says what is wrong
    if native is None or bool(native.scale.isnan().any()):
        return weights.quantize_rows(matrix, into=into)
    return RowCodes(*native)


def cast_half(
    tensor: Tensor,
    dtype: torch.dtype = torch.float16,
    *,
    into: Tensor | None = None,
    threads: int | None = None,
) -> HalfCast:
    """Cast a floating tensor to half precision and count what does not fit; see `weights.cast_half`.

    Args:
        tensor: to cast.
        dtype: float16 or bfloat16.
        into: dense, of that dtype and shape, to write and return; a new one when not given.
        threads: of the native kernel; those of torch when not given.

    Raises:
        NonFiniteWeightError: a value is NaN or infinite already.
    """
    source = tensor.detach()
    native = None
    if active.cpu is not None and dtype == torch.float16:
        native = active.cpu.cast_half(source, into, threads)
    if native is None or native.nonfinite:
        return weights.cast_half(source, dtype, into)
    return HalfCast(native.value, native.overflowed, native.clamped, native.flushed)
