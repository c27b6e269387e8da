"""What the products share: how tiles of codes are read, and how exact sums become outputs.

Operation by operation as `reference` defines it, for tiles of any orientation. Kernels must be compiled without fused
multiply-adds (`launch` sees to it).
"""

import triton
import triton.language as tl


@triton.jit
def read(ptrs, at, K, WHOLE: tl.constexpr, ONCE: tl.constexpr):
    """Load codes at the places `at` along K, zeros from K on; WHOLE: there are none, ONCE: nobody will read them again."""
    if WHOLE:
        codes = tl.load(ptrs, eviction_policy="evict_first" if ONCE else "")
    else:
        codes = tl.load(ptrs, mask=at < K, other=0, eviction_policy="evict_first" if ONCE else "")
    return codes


@triton.jit
def joined(high, low):
    """Return the sums of 12-bit codes, 64 * high + low: the first term may leave int32, but modulo 2^32 the sum is right, and it fits."""
    return high * 64 + low


@triton.jit
def scaled(total, token_scale, weight_scale, GROUPED: tl.constexpr):
    """Return fp32 results before the bias.

    `total` holds the int32 sums of tokens with one scale, or the fp32 totals of those whose groups have theirs in them.
    """
    if GROUPED:
        y = total * weight_scale
    else:
        y = total.to(tl.float32) * (token_scale * weight_scale)
    return y
