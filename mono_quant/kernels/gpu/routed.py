"""Kernels of routed tokens: rows of codes with the weights of the expert that each is sent to, and the sums over experts.

A *pair* is a slot of a token: `token * SLOTS + slot`. It has an expert, or none where its number is not in [0, E); such pairs are
not computed, and nothing of what lies in their rows is read.
"""

import triton
import triton.language as tl

from mono_quant.kernels.gpu.few import dot4
from mono_quant.kernels.gpu.numerics import narrow, widen
from mono_quant.kernels.gpu.tiles import joined, read, scaled

# Behind every pair.
_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _place_of(tile, start_ptr, E, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the expert of a tile of TOKENS rows, its first row and the end of that expert's rows; from E on there is no expert."""
    at = tl.arange(0, EXPERTS)
    start = tl.load(start_ptr + at, mask=at < E, other=0).to(tl.int32)
    end = tl.load(start_ptr + at + 1, mask=at < E, other=0).to(tl.int32)
    tiles = tl.cdiv(end - start, TOKENS)
    before = tl.cumsum(tiles, 0) - tiles
    # the last one that begins at or before this tile, of those that have any
    own = (before <= tile) & (tile < before + tiles)
    expert = tl.min(tl.where(own, at, EXPERTS), 0)
    first = tl.sum(tl.where(own, start + (tile - before) * TOKENS, 0), 0)
    return expert, first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit(do_not_specialize=["M"])
def multiply_routed_tiles(
    codes_ptr, scale_ptr, order_ptr, start_ptr, weight_ptr, weight_scale_ptr, out_ptr, M, N, K, E,
    SLOTS: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of TOKENS pairs of one expert and OUTPUTS outputs, with a step of DEPTH values of K at a time.

    Programs: as many tiles of tokens as there may be, times those of outputs.

    codes_ptr: int8 [PLANES, M, K]; scale_ptr: fp32 [groups, M], and GROUPED where groups are several; then a step is a group.
    order_ptr: int [pairs], the pairs in the order of their experts; start_ptr: int [E + 1], where those of each expert begin.
    weight_ptr: int8 [E, N, K]; weight_scale_ptr: fp32 [E, N]; out_ptr: [pairs, N].
    SLOTS: pairs of a row of codes, where rows are tokens: outputs then lie in the order of experts. 0 where rows are pairs in that
    order: their outputs lie in the order of pairs.
    EXPERTS: a power of two, not below E. WHOLE: K is a multiple of DEPTH.
    """
    expert, first, end = _place_of(tl.program_id(0), start_ptr, E, TOKENS, EXPERTS)
    if expert < E:
        rows = first + tl.arange(0, TOKENS)
        columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        valid = rows < end
        there = tl.where(valid, rows, first).to(tl.int64)
        pair = tl.load(order_ptr + there).to(tl.int64)
        if SLOTS > 0:
            source, target = pair // SLOTS, there
        else:
            source, target = there, pair
        output = tl.minimum(columns, N - 1)
        of_expert = expert.to(tl.int64) * N + output
        along = tl.arange(0, DEPTH)
        code_ptrs = codes_ptr + source[:, None] * K + along[None, :]
        weight_ptrs = weight_ptr + of_expert[None, :] * K + along[:, None]
        plane = tl.cast(M, tl.int64) * K
        total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32 if GROUPED else tl.int32)
        low = tl.zeros((TOKENS, OUTPUTS), dtype=tl.int32)
        for step in range(tl.cdiv(K, DEPTH)):
            k = step * DEPTH
            a = read(code_ptrs + k, k + along[None, :], K, WHOLE, False)
            w = read(weight_ptrs + k, k + along[:, None], K, WHOLE, False)
            if PLANES == 2:
                a_low = read(code_ptrs + plane + k, k + along[None, :], K, WHOLE, False)
            if GROUPED:
                sums = tl.dot(a, w, out_dtype=tl.int32)
                if PLANES == 2:
                    sums = joined(sums, tl.dot(a_low, w, out_dtype=tl.int32))
                total += sums.to(tl.float32) * tl.load(scale_ptr + step * M + source)[:, None]
            else:
                total = tl.dot(a, w, total, out_dtype=tl.int32)
                if PLANES == 2:
                    low = tl.dot(a_low, w, low, out_dtype=tl.int32)
        if PLANES == 2 and not GROUPED:
            total = joined(total, low)
        token_scale = tl.load(scale_ptr + source)[:, None]
        y = scaled(total, token_scale, tl.load(weight_scale_ptr + of_expert)[None, :], GROUPED)
        inside = valid[:, None] & (columns < N)[None, :]
        tl.store(
            out_ptr + target[:, None] * N + columns[None, :],
            narrow(y, out_ptr.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def _sum_of(high, low, PLANES: tl.constexpr):
    total = tl.sum(high, 1)
    if PLANES == 2:
        total = joined(total, tl.sum(low, 1))
    return total


@triton.jit(do_not_specialize=["M"])
def multiply_routed_vectors(
    codes_ptr, scale_ptr, index_ptr, weight_ptr, weight_scale_ptr, out_ptr, M, N, words, E,
    SLOTS: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr,
    OUTPUTS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program computes OUTPUTS outputs of one pair, with a step of WORDS words of K at a time; pairs are beside each other.

    codes_ptr: int32 [PLANES, M, words] and weight_ptr: int32 [E, N, words]: four int8 values in a word.
    index_ptr: int [pairs], the experts; out_ptr: [pairs, N]. SLOTS: pairs of a row of codes.
    For the others see `multiply_routed_tiles`.
    """
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index_ptr + pair).to(tl.int64)
    if (expert >= 0) & (expert < E):
        source = pair // SLOTS
        columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        of_expert = expert * N + tl.minimum(columns, N - 1)
        along = tl.arange(0, WORDS)
        weight_ptrs = weight_ptr + of_expert[:, None] * words + along[None, :]
        code_ptrs = codes_ptr + source * words + along
        plane = tl.cast(M, tl.int64) * words
        none = tl.zeros((OUTPUTS, WORDS), dtype=tl.int32)
        high, low = none, none
        total = tl.zeros((OUTPUTS,), dtype=tl.float32 if GROUPED else tl.int32)
        for k in tl.range(0, words, WORDS, num_stages=STAGES):
            inside = k + along < words
            w = tl.load(weight_ptrs + k, mask=inside[None, :], other=0)
            high = dot4(w, tl.load(code_ptrs + k, mask=inside, other=0)[None, :], high)
            if PLANES == 2:
                low = dot4(w, tl.load(code_ptrs + plane + k, mask=inside, other=0)[None, :], low)
            if GROUPED:
                sums = _sum_of(high, low, PLANES)
                total += sums.to(tl.float32) * tl.load(scale_ptr + k // WORDS * M + source)
                high, low = none, none
        if not GROUPED:
            total = _sum_of(high, low, PLANES)
        y = scaled(total, tl.load(scale_ptr + source), tl.load(weight_scale_ptr + of_expert), GROUPED)
        tl.store(out_ptr + pair * N + columns, narrow(y, out_ptr.dtype.element_ty), mask=columns < N)


@triton.jit
def add_routed(
    y_ptr, index_ptr, share_ptr, out_ptr, N, E, SLOTS: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr
):
    """One program adds the weighted outputs of one token in WIDE columns: in the order of experts, rounded as `mix_experts` does.

    y_ptr: [pairs, N]; index_ptr: int [pairs]; share_ptr: float [pairs]; out_ptr: [tokens, N] in the dtype of `y`.
    PLACES: a power of two, not below SLOTS.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    slot = tl.arange(0, PLACES)
    expert = tl.load(index_ptr + token * SLOTS + slot, mask=slot < SLOTS, other=-1)
    left = tl.where((expert >= 0) & (expert < E), expert.to(tl.int32) * PLACES + slot, _NONE)
    total = tl.zeros((WIDE,), dtype=tl.float32)
    for _ in range(SLOTS):
        key = tl.min(left, 0)
        if key < _NONE:
            pair = token * SLOTS + key % PLACES
            y = widen(tl.load(y_ptr + pair * N + column, mask=column < N, other=0.0))
            share = widen(tl.load(share_ptr + pair))
            total = widen(narrow(total + widen(narrow(y * share, dtype)), dtype))
        left = tl.where(left == key, _NONE, left)
    tl.store(out_ptr + token * N + column, narrow(total, dtype), mask=column < N)
