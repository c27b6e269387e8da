"""Pure tensor math on weights: int8 rows, float16 casts, and how good they are.

One definition of the weight codes, used by every road that leads to an int8 tensor::

    a[n]   = max_k |W[n, k]|                                    fp32
    s[n]   = a[n] / 127, rounded to a value the checkpoint's dtype can hold
    q[n,k] = clamp(rint(W[n, k] / s[n]), -127, 127)             half to even, int8

Rounding the scale before computing the codes makes every reader see the same weights, whether it keeps scales in
fp32 or casts them to the model's dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant.errors import NonFiniteWeightError

QMAX = 127
# 10 * log10(12 * 127^2): the error of rounding to a step s is s^2 / 12, and s = absmax / 127.
ONE_OPERAND_DB = 10 * math.log10(12 * QMAX**2)
FP16_MAX = 65504.0
_WITHOUT_FLOAT64 = frozenset({"mps"})
# Elements held in fp32 at once while a weight is quantized: bounds the scratch memory.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RowCodes:
    """Int8 codes of a matrix and what they lost.

    Attributes:
        codes: int8 [N, K] in [-127, 127].
        scale: fp32 [N, 1], finite and positive; 1 for a row of zeros.
        signal, noise: sums of squares of the matrix, and of what rounding changed in it.
    """

    codes: Tensor
    scale: Tensor
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise of the whole matrix in dB; infinity when nothing was lost."""
        return sqnr_db(self.signal, self.noise)


def quantize_rows(
    weight: Tensor,
    scale_dtype: torch.dtype | None = None,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> RowCodes:
    """Quantize each row of a matrix symmetrically to int8.

    A matrix on meta, which has no values, gives codes and scales on meta, and has lost nothing.

    Args:
        weight: floating [N, K].
        scale_dtype: dtype whose values the scales are rounded to; the dtype of `weight` when not given.
        into: codes and scales to write and return; new ones when not given.

    Returns:
        The codes, scales and the error made.

    Raises:
        NonFiniteWeightError: a value is NaN or infinite (in fp32).
    """
    rows, depth = weight.shape
    codes, scale = into or (
        torch.empty(rows, depth, dtype=torch.int8, device=weight.device),
        torch.empty(rows, 1, dtype=torch.float32, device=weight.device),
    )
    scale.fill_(1.0)
    signal = noise = 0.0
    if weight.is_meta:
        return RowCodes(codes, scale, 0.0, 0.0)
    step = max(1, _CHUNK // max(1, depth))
    for start in range(0, rows, step):
        block = weight[start : start + step].detach().float()
        if not depth:
            continue
        absmax = block.abs().amax(dim=1, keepdim=True)
        if not torch.isfinite(absmax).all():
            raise _non_finite(weight)
        # a tensor on both sides: `tensor / number` multiplies by a rounded reciprocal on a GPU
        s = round_scale(absmax / torch.full_like(absmax, QMAX), scale_dtype or weight.dtype)
        zero = s < torch.finfo(torch.float32).tiny
        s = torch.where(zero, 1.0, s)
        # next to the largest float, 127 times a scale that was rounded up is infinite
        lower = round_scale(
            s * (1 - torch.finfo(scale_dtype or weight.dtype).eps), scale_dtype or weight.dtype
        )
        s = torch.where(torch.isinf(s * QMAX), lower, s)
        q = (block / s).round_().clamp_(-QMAX, QMAX).masked_fill_(zero, 0.0)
        codes[start : start + step] = q.to(torch.int8)
        scale[start : start + step] = s
        signal += energy(block, s)
        noise += energy(torch.sub(block, q.mul_(s)), s)
    return RowCodes(codes, scale, signal, noise)


def energy(rows: Tensor, scale: Tensor) -> float:
    """Return the sum of squares of fp32 rows, in float64 where their device has it.

    Args:
        rows: [N, K].
        scale: fp32 [N, 1], positive; the measure of a row, in which its squares neither vanish nor overflow in fp32.
    """
    if rows.device.type not in _WITHOUT_FLOAT64:
        return float(rows.double().square_().sum())
    sums = (rows / scale).square_().sum(dim=1, keepdim=True)
    return float((sums.cpu().double() * scale.cpu().double().square()).sum())


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 scales to values `dtype` can hold, as fp32.

    Scales that would be subnormal or infinite in float16 are left as they are: it holds few of their bits, or none.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return scale
    rounded = scale.to(dtype).float()
    if dtype == torch.float16:
        rounded = torch.where(scale < torch.finfo(torch.float16).tiny, scale, rounded)
    return torch.where(torch.isinf(rounded), scale, rounded)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 scales as a file holds them: in the `dtype` of their weight where it has every one of them exactly.

    Readers multiply codes by scales in the dtype they find, some of them without a cast. Only float16 can lack values, see
    `round_scale`; a whole tensor has one dtype, so a single such row keeps it in fp32. Scales on meta are taken to fit.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return scale
    narrow = scale.to(dtype)
    return narrow if scale.is_meta or torch.equal(narrow.float(), scale) else scale


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `codes * scale` computed in fp32 and rounded once to `dtype`.

    Args:
        codes: int8 [..., K].
        scale: fp32 [..., 1].
        dtype: of the result.
    """
    return (codes * scale).to(dtype)


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) for two sums of squares; infinity when there is no noise."""
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def gaussian_crest_db(depth: int) -> float:
    """Return the expected absmax / rms in dB of `depth` Gaussian values.

    Extreme-value formula with n = 2 * depth (two-sided); within 0.15 dB of simulation for depth >= 256.
    """
    n = 2 * max(depth, 2)
    t = math.sqrt(2 * math.log(n))
    expected = t - (math.log(math.log(n)) + math.log(4 * math.pi)) / (2 * t) + 0.5772156649 / t
    return 20 * math.log10(expected)


def weight_limit_db(depth: int) -> float:
    """Return the SQNR that 8-bit codes reach on Gaussian rows of `depth` values."""
    return ONE_OPERAND_DB - gaussian_crest_db(depth)


@dataclass(frozen=True)
class HalfCast:
    """A copy of a tensor in half precision and what it lost.

    Attributes:
        value: float16 or bfloat16, same shape.
        overflowed: values that became infinite (in float16 those of magnitude >= 65520).
        clamped: values beyond the largest one that became that (between 65504 and 65520).
        flushed: non-zero values that became zero.
    """

    value: Tensor
    overflowed: int
    clamped: int
    flushed: int


def cast_half(tensor: Tensor, dtype: torch.dtype = torch.float16, into: Tensor | None = None) -> HalfCast:
    """Cast a floating tensor to half precision and count what does not fit; of one on meta, nothing.

    Args:
        tensor: to cast.
        dtype: float16 or bfloat16.
        into: to write and return; a new tensor when not given.

    Raises:
        NonFiniteWeightError: a value is NaN or infinite already.
    """
    source = tensor.detach()
    value = source.to(dtype) if into is None else into.copy_(source)
    if source.is_meta:
        return HalfCast(value, 0, 0, 0)
    if source.dtype == dtype:
        if not torch.isfinite(source).all():
            raise _non_finite(source)
        return HalfCast(value, 0, 0, 0)
    largest = torch.finfo(dtype).max
    overflowed = clamped = flushed = 0
    flat, half = source.reshape(-1), value.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        block = flat[start : start + _CHUNK]
        magnitude = block.abs()
        if not torch.isfinite(magnitude).all():
            raise _non_finite(source)
        # by the result: a float64 just below 65520 is rounded twice and overflows too
        overflow = torch.isinf(half[start : start + _CHUNK])
        overflowed += int(overflow.sum())
        clamped += int(((magnitude > largest) & ~overflow).sum())
        flushed += int(((half[start : start + _CHUNK] == 0) & (block != 0)).sum())
    return HalfCast(value, overflowed, clamped, flushed)


def _non_finite(weight: Tensor) -> NonFiniteWeightError:
    bad = ~torch.isfinite(weight.detach().float())
    first = [int(i) for i in bad.nonzero()[0]]
    return NonFiniteWeightError(
        f"{int(bad.sum())} of {weight.numel()} values are NaN or infinite, first at {first}"
    )
