"""The one way from a float tensor to codes: a native kernel where there is one, the definition in `weights` otherwise.

Both give the same codes and scales, bit for bit; the error sums may differ in their last digits.
"""

import torch
from torch import Tensor

from mono_quant.kernels import weights
from mono_quant.kernels.choice import active
from mono_quant.kernels.weights import QMAX, HalfCast, RowCodes, sqnr_db


def encode_rows(matrix: Tensor) -> RowCodes:
    """Quantize each row of a matrix symmetrically to int8; see `weights.quantize_rows`.

    Args:
        matrix: floating [N, K].

    Raises:
        NonFiniteWeightError: a value is NaN or infinite.
    """
    native = None if active.cpu is None else active.cpu.encode_rows(matrix, matrix.dtype)
    # What is not finite, or next to the largest float, is left to the definition, which says what is wrong; so are
    # magnitudes whose squares leave the range of the kernel's fp32 partial sums. Zeros have no magnitude.
    if native is None or not bool(torch.isfinite(native.scale * QMAX).all()):
        return weights.quantize_rows(matrix)
    if not 1e-24 < native.signal / max(1, matrix.numel()) < 1e24:
        return weights.quantize_rows(matrix)
    return RowCodes(native.codes, native.scale, sqnr_db(native.signal, native.noise))


def cast_half(tensor: Tensor, dtype: torch.dtype = torch.float16) -> HalfCast:
    """Cast a floating tensor to half precision and count what does not fit; see `weights.cast_half`.

    Raises:
        NonFiniteWeightError: a value is NaN or infinite already.
    """
    source = tensor.detach()
    native = active.cpu.cast_half(source) if active.cpu is not None and dtype == torch.float16 else None
    if native is None or native.nonfinite:
        return weights.cast_half(source, dtype)
    return HalfCast(native.value, native.overflowed, native.clamped, native.flushed)
