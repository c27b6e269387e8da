"""The product of many tokens: tiles of tokens and outputs on the tensor cores, fed by descriptors (TMA) or pointers."""

import triton
import triton.language as tl

from mono_quant.kernels.gpu.numerics import narrow, widen
from mono_quant.kernels.gpu.overlap import gdc_wait
from mono_quant.kernels.gpu.tiles import joined, read, scaled


@triton.jit
def _tile_of(program, down, across, BAND: tl.constexpr):
    """Return row and column of a program's tile: bands of tiles are walked column by column, so that neighbours share loads."""
    width = BAND * across
    first = (program // width) * BAND
    height = tl.minimum(down - first, BAND)
    return first + program % width % height, program % width // height


@triton.jit(do_not_specialize=["M"])
def multiply_tiles(
    codes, weight, scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, M, N, K, row_stride,
    PLANES: tl.constexpr, GROUPED: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of TOKENS x OUTPUTS, with a step of DEPTH values of K at a time.

    codes: int8 [PLANES * M, K]; weight: int8 [N, K]; both contiguous, as descriptors where DESCRIPTORS, else as pointers.
    scale_ptr: fp32 [groups, M], and GROUPED where groups are several; then a step is a group, and there is one plane.
    weight_scale_ptr: fp32 [N]; bias_ptr: float [N] or None; out_ptr: [M, N], rows `row_stride` apart.
    WHOLE: K is a multiple of DEPTH.
    """
    if OVERLAP:
        gdc_wait()
    down, across = tl.cdiv(M, TOKENS), tl.cdiv(N, OUTPUTS)
    tile_row, tile_column = _tile_of(tl.program_id(0), down, across, BAND)
    rows = tile_row * TOKENS + tl.arange(0, TOKENS)
    columns = tile_column * OUTPUTS + tl.arange(0, OUTPUTS)
    token, output = rows % M, columns % N
    along = tl.arange(0, DEPTH)
    if not DESCRIPTORS:
        code_ptrs = codes + token.to(tl.int64)[:, None] * K + along[None, :]
        weight_ptrs = weight + output.to(tl.int64)[None, :] * K + along[:, None]
        plane = tl.cast(M, tl.int64) * K
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32 if GROUPED else tl.int32)
    low = tl.zeros((TOKENS, OUTPUTS), dtype=tl.int32)
    for step in range(tl.cdiv(K, DEPTH)):
        k = step * DEPTH
        if DESCRIPTORS:
            # beyond the ends lie zeros, or below the high digits the low ones, in rows that nobody stores
            a = codes.load([tile_row * TOKENS, k])
            w = weight.load([tile_column * OUTPUTS, k]).T
            if PLANES == 2:
                a_low = codes.load([M + tile_row * TOKENS, k])
        else:
            a = read(code_ptrs + k, k + along[None, :], K, WHOLE, False)
            w = read(weight_ptrs + k, k + along[:, None], K, WHOLE, False)
            if PLANES == 2:
                a_low = read(code_ptrs + plane + k, k + along[None, :], K, WHOLE, False)
        if GROUPED:
            sums = tl.dot(a, w, out_dtype=tl.int32)
            total += sums.to(tl.float32) * tl.load(scale_ptr + step * M + token)[:, None]
        else:
            total = tl.dot(a, w, total, out_dtype=tl.int32)
            if PLANES == 2:
                low = tl.dot(a_low, w, low, out_dtype=tl.int32)
    if PLANES == 2:
        total = joined(total, low)
    token_scale = tl.load(scale_ptr + token)[:, None]
    y = scaled(total, token_scale, tl.load(weight_scale_ptr + output)[None, :], GROUPED)
    if bias_ptr is not None:
        y += widen(tl.load(bias_ptr + output))[None, :]
    places = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out_ptr + places, narrow(y, out_ptr.dtype.element_ty), mask=inside)
