"""The product of few tokens, which is as fast as weights are read: each is read once, by one program.

`multiply_vectors`: up to four rows of codes, four values at a time in one instruction. `multiply_few`: up to 64 tokens on the tensor
cores, outputs on their long side.
"""

import triton
import triton.language as tl

from mono_quant.kernels.gpu.features import INTERPRETED
from mono_quant.kernels.gpu.numerics import narrow, widen
from mono_quant.kernels.gpu.overlap import gdc_wait
from mono_quant.kernels.gpu.tiles import joined, read, scaled

_EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def dot4(w, x, total):
    """Return total + the products of the four int8 values that lie in each int32 of `w` and `x`."""
    if _EMULATED:
        total += ((w << 24) >> 24) * ((x << 24) >> 24)
        total += ((w << 16) >> 24) * ((x << 16) >> 24)
        total += ((w << 8) >> 24) * ((x << 8) >> 24)
        total += (w >> 24) * (x >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    return total


@triton.jit
def _add_row(total, w, row_ptrs, inside):
    return dot4(w, tl.load(row_ptrs, mask=inside, other=0)[None, :], total)


@triton.jit
def _finish_row(total, m: tl.constexpr, scale_ptr, weight_scale, bias, out_ptr, row_stride, output, valid):
    y = scaled(total, tl.load(scale_ptr + m), weight_scale, False)
    if bias is not None:
        y += bias
    place = tl.cast(row_stride, tl.int64) * m + output
    tl.store(out_ptr + place, narrow(y, out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def multiply_vectors(
    codes_ptr, weight_ptr, scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, N, words, row_stride,
    M: tl.constexpr, PLANES: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program computes OUTPUTS outputs of all tokens, with a step of WORDS words of K at a time.

    codes_ptr: int32 [PLANES * M, words], at most four rows; weight_ptr: int32 [N, words]: four int8 values in a word.
    scale_ptr: fp32 [M]; weight_scale_ptr: fp32 [N]; bias_ptr: float [N] or None; out_ptr: [M, N], rows `row_stride` apart.
    """
    if OVERLAP:
        gdc_wait()
    ROWS: tl.constexpr = PLANES * M
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    valid = output < N
    there = tl.minimum(output, N - 1)
    along = tl.arange(0, WORDS)
    weight_ptrs = weight_ptr + there.to(tl.int64)[:, None] * words + along[None, :]
    row0 = tl.zeros((OUTPUTS, WORDS), dtype=tl.int32)
    row1, row2, row3 = row0, row0, row0
    for k in tl.range(0, words, WORDS, num_stages=STAGES):
        inside = k + along < words
        w = tl.load(weight_ptrs + k, mask=inside[None, :], other=0)
        code_ptrs = codes_ptr + k + along
        row0 = _add_row(row0, w, code_ptrs, inside)
        if ROWS > 1:
            row1 = _add_row(row1, w, code_ptrs + words, inside)
        if ROWS > 2:
            row2 = _add_row(row2, w, code_ptrs + 2 * words, inside)
        if ROWS > 3:
            row3 = _add_row(row3, w, code_ptrs + 3 * words, inside)
    sum0, sum1, sum2, sum3 = tl.sum(row0, 1), tl.sum(row1, 1), tl.sum(row2, 1), tl.sum(row3, 1)
    if PLANES == 2:
        sum0 = joined(sum0, sum1 if M == 1 else sum2)
        sum1 = joined(sum1, sum3)
    weight_scale = tl.load(weight_scale_ptr + there)
    bias = None
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + there))
    _finish_row(sum0, 0, scale_ptr, weight_scale, bias, out_ptr, row_stride, output, valid)
    if M > 1:
        _finish_row(sum1, 1, scale_ptr, weight_scale, bias, out_ptr, row_stride, output, valid)
    if M > 2:
        _finish_row(sum2, 2, scale_ptr, weight_scale, bias, out_ptr, row_stride, output, valid)
    if M > 3:
        _finish_row(sum3, 3, scale_ptr, weight_scale, bias, out_ptr, row_stride, output, valid)


@triton.jit(do_not_specialize=["M"])
def multiply_few(
    codes_ptr, weight_ptr, scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, M, N, K, row_stride,
    PLANES: tl.constexpr, GROUPED: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program computes OUTPUTS outputs of all tokens, at most TOKENS, with a step of SPLIT * DEPTH values of K at a time.

    SPLIT: parts of a step that are multiplied side by side, by different warps, and added at the end, so that no sums travel between
    programs; 1 where GROUPED. WHOLE: K is a multiple of a step. For the other parameters see `large.multiply_tiles`.
    """
    if OVERLAP:
        gdc_wait()
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.arange(0, TOKENS)
    output = tl.minimum(columns, N - 1)
    token = tl.minimum(rows, M - 1)
    along = tl.arange(0, DEPTH)
    if SPLIT == 1:
        total = tl.zeros((OUTPUTS, TOKENS), dtype=tl.float32 if GROUPED else tl.int32)
        low = tl.zeros((OUTPUTS, TOKENS), dtype=tl.int32)
        weight_at, code_at = along[None, :], along[:, None]
        weight_ptrs = weight_ptr + output.to(tl.int64)[:, None] * K
        code_ptrs = codes_ptr + token.to(tl.int64)[None, :] * K
    else:
        total = tl.zeros((SPLIT, OUTPUTS, TOKENS), dtype=tl.int32)
        low = tl.zeros((SPLIT, OUTPUTS, TOKENS), dtype=tl.int32)
        part = tl.arange(0, SPLIT)[:, None, None] * DEPTH
        weight_at, code_at = part + along[None, None, :], part + along[None, :, None]
        weight_ptrs = weight_ptr + output.to(tl.int64)[None, :, None] * K
        code_ptrs = codes_ptr + token.to(tl.int64)[None, None, :] * K
    weight_ptrs += weight_at
    code_ptrs += code_at
    plane = tl.cast(M, tl.int64) * K
    for step in range(tl.cdiv(K, SPLIT * DEPTH)):
        k = step * SPLIT * DEPTH
        w = read(weight_ptrs + k, k + weight_at, K, WHOLE, True)
        x = read(code_ptrs + k, k + code_at, K, WHOLE, False)
        if PLANES == 2:
            x_low = read(code_ptrs + plane + k, k + code_at, K, WHOLE, False)
        if GROUPED:
            sums = tl.dot(w, x, out_dtype=tl.int32)
            total += sums.to(tl.float32) * tl.load(scale_ptr + step * M + token)[None, :]
        else:
            total = tl.dot(w, x, total, out_dtype=tl.int32)
            if PLANES == 2:
                low = tl.dot(w, x_low, low, out_dtype=tl.int32)
    if PLANES == 2:
        total = joined(total, low)
    if SPLIT > 1:
        total = tl.sum(total, 0)
    token_scale = tl.load(scale_ptr + token)[None, :]
    y = scaled(total, token_scale, tl.load(weight_scale_ptr + output)[:, None], GROUPED)
    if bias_ptr is not None:
        y += widen(tl.load(bias_ptr + output))[:, None]
    places = rows.to(tl.int64)[None, :] * row_stride + columns[:, None]
    inside = (rows < M)[None, :] & (columns < N)[:, None]
    tl.store(out_ptr + places, narrow(y, out_ptr.dtype.element_ty), mask=inside)
