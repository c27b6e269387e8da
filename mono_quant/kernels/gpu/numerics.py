"""What kernels share: how values become fp32 and again what they were, a largest magnitude a scale, a value a code, a code two digits.

Each function of scales and codes has the bits of `reference.quantize_tokens`. That needs kernels compiled without fused multiply-adds
(`launch` sees to it) and divisions that round (`div_rn`).
"""

import triton
import triton.language as tl

from mono_quant.kernels.gpu.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
# Nothing but IEEE 754: adding and subtracting it rounds values below 2^22 half to even.
_ROUNDER = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def widen(x):
    """Return values as fp32."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        # the interpreter's own conversion loses subnormal numbers
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return fp32 values rounded to a dtype, half to even; what is too large becomes infinity."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # the interpreter's own conversion cuts off
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + (0x7FFF + ((bits >> 16) & 1)), 0x7FC00000)
        y = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def magnitude(x):
    """Bit patterns of |x|, int32: in their order NaN is above infinity and infinity above every number."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales_of(largest, QMAX: tl.constexpr):
    """Return Q / a and a / Q for the bit patterns of largest magnitudes a: 0 and 0 for zeros, 0 and NaN for what is not finite."""
    a = largest.to(tl.float32, bitcast=True)
    finite = largest < _INFINITY
    # below this the scale would be subnormal
    zero = a < QMAX * 2.0**-126
    plain = tl.where(finite & (zero == 0), a, 1.0)
    full = plain * 0.0 + QMAX
    inverse = tl.where(finite & (zero == 0), tl.div_rn(full, plain), 0.0)
    scale = tl.where(zero, 0.0, tl.div_rn(plain, full))
    return inverse, tl.where(finite, scale, float("nan"))


@triton.jit
def code_of(x, inverse, QMAX: tl.constexpr):
    """Return the codes of fp32 values as fp32 integers in [-Q, Q]; of NaN, 0."""
    v = x * inverse
    # far beyond the codes the sum below would not round to integers
    v = tl.where(v == v, tl.minimum(tl.maximum(v, -1.0 * QMAX), 1.0 * QMAX), 0.0)
    return (v + _ROUNDER) - _ROUNDER


@triton.jit
def digits_of(code):
    """Return the two int8 digits of a 12-bit code: code = 64 * high + low, 0 <= low < 64."""
    whole = code.to(tl.int32)
    return (whole >> 6).to(tl.int8), (whole & 63).to(tl.int8)
