"""Weights become int8 where they lie: each row is read, and read again from the cache, in one launch for a matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mono_quant.kernels.cpu import EncodedRows
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import magnitude, narrow, widen

_TLDTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Values at once. Not measured on a device.
_MOST_VALUES = 2048
_QMAX = tl.constexpr(127)
_ROUNDER = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)
_TINY, _TINY_HALF = tl.constexpr(2.0**-126), tl.constexpr(2.0**-14)


@triton.jit
def _encode_rows(
    weight_ptr, code_ptr, scale_ptr, energy_ptr, DEPTH,
    VALUES: tl.constexpr, DTYPE: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, VALUES)
    largest = tl.zeros((VALUES,), dtype=tl.int32)
    for first in range(0, DEPTH, VALUES):
        at = first + within
        w = widen(tl.load(weight_ptr + row * DEPTH + at, mask=at < DEPTH, other=0.0))
        largest = tl.maximum(largest, magnitude(w))
    bits = tl.max(largest, 0)
    is_finite = bits < _INFINITY
    scale = _scale_of(tl.where(is_finite, bits, 0).to(tl.float32, bitcast=True), DTYPE, BELOW)
    is_zero = scale < _TINY
    scale = tl.where(is_zero, 1.0, scale)
    counts = is_finite & (is_zero == 0)
    signal = tl.zeros((VALUES,), dtype=tl.float64)
    noise = tl.zeros((VALUES,), dtype=tl.float64)
    for first in range(0, DEPTH, VALUES):
        at = first + within
        w = widen(tl.load(weight_ptr + row * DEPTH + at, mask=at < DEPTH, other=0.0))
        w = tl.where(is_finite, w, 0.0)
        # beyond the codes, where a scale was rounded down
        q = tl.minimum(tl.maximum(tl.div_rn(w, tl.zeros_like(w) + scale), -1.0 * _QMAX), 1.0 * _QMAX)
        q = tl.where(counts, (q + _ROUNDER) - _ROUNDER, 0.0)
        tl.store(code_ptr + row * DEPTH + at, q.to(tl.int8), mask=at < DEPTH)
        lost = (w - q * scale).to(tl.float64)
        signal += w.to(tl.float64) * w.to(tl.float64)
        noise += lost * lost
    tl.store(scale_ptr + row, tl.where(is_finite, scale, float("nan")))
    tl.store(energy_ptr + row * 2, tl.sum(signal, 0))
    tl.store(energy_ptr + row * 2 + 1, tl.sum(noise, 0))


@triton.jit
def _scale_of(largest, DTYPE: tl.constexpr, BELOW: tl.constexpr):
    """Return the scale of a row that `weights.quantize_rows` defines, before rows of zeros get theirs."""
    scale = _stored(tl.div_rn(largest, largest * 0.0 + _QMAX), DTYPE)
    lower = _stored(tl.where(scale < _TINY, 1.0, scale) * BELOW, DTYPE)
    is_infinite = magnitude(scale * (1.0 * _QMAX)) == _INFINITY
    return tl.where(is_infinite, lower, scale)


@triton.jit
def _stored(scale, DTYPE: tl.constexpr):
    """Return what `weights.round_scale` makes of a scale."""
    near = widen(narrow(scale, DTYPE))
    if tl.float16 == DTYPE:
        near = tl.where(scale < _TINY_HALF, scale, near)
    return tl.where(magnitude(near) == _INFINITY, scale, near)


def encode_rows(
    weight: Tensor, scale_dtype: torch.dtype, into: tuple[Tensor, Tensor] | None = None
) -> EncodedRows | None:
    """Quantize the rows of a weight on its device, with the bits of `weights.quantize_rows`; see `mono_quant.kernels.encode_rows`.

    Args:
        weight: fp32, fp16 or bf16 [N, K].
        scale_dtype: see `weights.quantize_rows`.
        into: dense codes and scales to write and return; new ones when not given.

    Returns:
        What the native kernel of a CPU returns: a row with NaN or infinity has the scale NaN. None where there is no kernel.
    """
    if weight.dtype not in _TLDTYPES or weight.dim() != 2:
        return None
    rows, depth = weight.shape
    weight = weight.detach().resolve_neg().contiguous()
    codes, scale = into or (
        torch.empty(rows, depth, dtype=torch.int8, device=weight.device),
        torch.empty(rows, 1, dtype=torch.float32, device=weight.device),
    )
    energy = torch.empty(rows, 2, dtype=torch.float64, device=weight.device)
    if rows:
        launch(
            _encode_rows,
            (rows,),
            [weight, codes, scale, energy, depth],
            {
                "VALUES": min(_MOST_VALUES, triton.next_power_of_2(max(1, depth))),
                "DTYPE": _TLDTYPES.get(scale_dtype, tl.float32),
                "BELOW": 1 - torch.finfo(scale_dtype).eps,
            },
            device=weight.device,
            warps=8,
        )
    signal, noise = energy.sum(0).tolist()
    return EncodedRows(codes, scale, signal, noise)
