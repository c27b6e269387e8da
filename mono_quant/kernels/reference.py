"""The definition of INT8 arithmetic, in plain torch.

Every other path is held against this one, bit for bit, and falls back to it. A *token* is one row of the
flattened input: for a linear layer the last dimension, for a convolution one receptive field, in the order kernel row,
kernel column, channel. A *group* is a token's values that share a scale: all of them, or 128 or 64 consecutive ones
(`activations`).

With activation codes of A bits (Q = 2^(A-1) - 1: 127, or 2047)::

    a[m,g] = max_k |x[m, k]|  over the group g           fp32
    q[m,k] = clamp(rint(x[m, k] * (Q / a[m,g])), -Q, Q)
    S[m,n,g] = sum_k q[m, k] * w[n, k]                   exact in int32

    one group:  y[m,n] = float(S) * (a[m] / Q * s[n]) + bias[n]
    more:       y[m,n] = ((float(S[0]) * s_0 + float(S[1]) * s_1) + ...) * s[n] + bias[n],  s_g = a[m,g] / Q

in fp32 in this order, each operation rounded (no fused multiply-add), and rounded once to the output dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mono_quant.kernels.activations import INT8, ActivationScheme

QMAX = INT8.qmax
# Partial sums below 2^24 are integers that fp32 holds exactly, in any order. Weights may hold -128: foreign
# checkpoints do.
_EXACT = 2**24 // 128
# |sum| <= 127 * 128 * K must stay below 2^31.
MAX_IN_FEATURES = (2**31 - 1) // (QMAX * 128)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme = INT8,
    matmul: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply an int8 linear layer.

    Args:
        x: float [M, K].
        weight: int8 [N, K].
        weight_scale: fp32 [N, 1].
        bias: float [N] or None.
        scheme: what becomes of `x`.
        matmul: takes int8 codes [M, K] and weights [N, K] as `int_matmul` does, and gives its bits.

    Returns:
        [M, N] in the dtype of `x`.
    """
    depth = x.shape[1]
    qmax, spans = scheme.widest_code(depth), scheme.spans(depth)
    matmul = matmul or int_matmul
    if len(spans) == 1:
        codes, scale = quantize_tokens(x, qmax)
        return rescale(_exact(codes, weight, matmul), scale, weight_scale, bias, x.dtype)
    # "-0.0 + x" is x in every bit
    total = x.new_full((x.shape[0], weight.shape[0]), -0.0, dtype=torch.float32)
    for span in spans:
        codes, scale = quantize_tokens(x[:, span], qmax)
        total.add_(_exact(codes, weight[:, span], matmul).float().mul_(scale))
    return _with_bias(total.mul_(weight_scale.view(1, -1)), bias, x.dtype)


def _exact(codes: Tensor, weight: Tensor, matmul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the int32 product of codes of any width and weights."""
    if codes.dtype == torch.int8:
        return matmul(codes, weight)
    # two digits that fit in int8: they are exact in whatever format a backend multiplies fp32 in
    high, low = (codes >> 6).to(torch.int8), (codes & 63).to(torch.int8)
    return matmul(high, weight).mul_(64).add_(matmul(low, weight))


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
    # below this the fp32 scale would be subnormal: the row counts as zero
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
        codes: int8 [M, K] in [-127, 127].
        weight: int8 [N, K].

    Returns:
        int32 [M, N], `codes @ weight.T` without rounding, and without overflow for K <= MAX_IN_FEATURES.
    """
    rows, depth = codes.shape
    step = _EXACT // (QMAX + 1)
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
    return _with_bias(total.float().mul_(token_scale * weight_scale.view(1, -1)), bias, dtype)


def _with_bias(out: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        out.add_(bias.float())
    return out.to(dtype)
