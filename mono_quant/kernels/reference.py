"""The definition of INT8 arithmetic, in plain torch.

Every other path is held against this one, bit for bit, and falls back to it. A *token* is one row of the
flattened input: for a linear layer the last dimension, for a convolution one receptive field.

With activation codes of A bits (Qa = 2^(A-1) - 1, 127 for A = 8)::

    a[m]   = max_k |x[m, k]|                            fp32
    q[m,k] = clamp(rint(x[m, k] * (Qa / a[m])), -Qa, Qa)
    y[m,n] = float(sum_k q[m, k] * w[n, k]) * (a[m] / Qa * s[n]) + bias[n]

The sum is exact in int32; the epilogue is fp32 in this order, without fused multiply-add, rounded once to the
output dtype.
"""

import torch
from torch import Tensor

BITS = 8
QMAX = 127
# Below this the fp32 scale a / 127 would be subnormal: the row counts as zero.
TINY = QMAX * 2.0**-126
# Partial sums below 2^24 are integers that fp32 holds exactly, in any order. Weights may hold -128: foreign
# checkpoints do.
_EXACT = 2**24 // 128
# |sum| <= 127 * 128 * K must stay below 2^31.
MAX_IN_FEATURES = (2**31 - 1) // (QMAX * 128)


def quantize_tokens(x: Tensor, qmax: int = QMAX) -> tuple[Tensor, Tensor]:
    """Quantize each row symmetrically against its largest magnitude.

    Args:
        x: float [M, K].
        qmax: largest code; 127 gives int8 codes, up to 2047 int16 codes.

    Returns:
        Codes [M, K] in [-qmax, qmax] (int8, or int16 for qmax > 127) and scales, fp32 [M, 1]. A row of zeros
        has scale 0; a row with NaN or infinity has codes 0 and scale NaN.
    """
    x = x.float()
    absmax = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    finite = torch.isfinite(absmax)
    zero = absmax < qmax * 2.0**-126
    # a tensor on both sides: with a number on one, `/` multiplies by a rounded reciprocal
    largest = torch.full_like(absmax, qmax)
    inverse = torch.where(zero | ~finite, 0.0, largest / absmax)
    codes = (x * inverse).round_().clamp_(-qmax, qmax).nan_to_num_(0.0)
    scale = torch.where(zero, 0.0, absmax / largest).masked_fill_(~finite, float("nan"))
    return codes.to(torch.int8 if qmax <= QMAX else torch.int16), scale


def int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """Multiply integer codes exactly.

    Args:
        codes: int8 [M, K] in [-127, 127], or int16 in [-2047, 2047].
        weight: int8 [N, K].

    Returns:
        int32 [M, N], `codes @ weight.T` without rounding, and without overflow for int8 and K <= MAX_IN_FEATURES.
    """
    rows, depth = codes.shape
    step = _EXACT // (QMAX + 1 if codes.dtype == torch.int8 else 2048)
    # autocast would run the product in half precision
    with torch.autocast("cpu" if codes.is_meta else codes.device.type, enabled=False):
        if depth <= step:
            return (codes.float() @ weight.float().t()).to(torch.int32)
        total = torch.zeros(rows, weight.shape[0], dtype=torch.int32, device=codes.device)
        for start in range(0, depth, step):
            block = slice(start, start + step)
            total += (codes[:, block].float() @ weight[:, block].float().t()).to(torch.int32)
    return total


def rescale(
    total: Tensor, token_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Turn integer sums into outputs: `float(total) * (token_scale * weight_scale) + bias`.

    Args:
        total: int32 [M, N].
        token_scale: fp32 [M, 1].
        weight_scale: fp32 [N, 1].
        bias: float [N] or None.
        dtype: of the result.

    Returns:
        `dtype` [M, N].
    """
    out = total.float().mul_(token_scale * weight_scale.view(1, -1))
    if bias is not None:
        out.add_(bias.float())
    return out.to(dtype)
