"""Tokens to codes, with the bits of `reference.quantize_tokens`: plain, or of an activation, or of one times another tensor.

A *span* is what shares a scale: a row, or a group of its values. Each is one row of a tile, so that one kernel serves all schemes.
A tile has a power of two of columns. Short spans lie in one program together: a program of four warps loads 2048 values in
half precision with two loads of 16 bytes a thread, and one that did less would cost its start more than its work. Rows that no tile
holds are read twice, the second time mostly from L2.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.features import features_of
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import code_of, digits_of, magnitude, scales_of, widen
from mono_quant.kernels.gpu.pointwise import load_values
from mono_quant.kernels.inputs import FLOATS

try:
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # of some versions of Triton
    gdc_launch_dependents = None

# Values of a program: at least, and at most (64 a thread of 8 warps).
TILE = 2048
WIDEST = 16384
# of a row that is read in blocks
_BLOCK = 4096
# Of so few rows a kernel ends before one behind it, started early, could be in its way.
_FEW_ROWS = 64
# A dimension that Triton reduces is not shorter.
_NARROWEST = 16


class Cut(NamedTuple):
    """How rows under a scheme are cut: the largest code, spans of a row, and columns of a tile for each (a power of two)."""

    qmax: int
    spans: int
    wide: int


@triton.jit
def start_next(EARLY: tl.constexpr):
    """Let the kernel behind this one start, to wait inside for what this one writes."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def store_codes(planes_ptr, plane_step, at, inside, y, inverse, QMAX: tl.constexpr):
    """Store the codes of fp32 values, one plane or two of digits, at offsets into a plane."""
    code = code_of(y, inverse, QMAX)
    if QMAX > 127:
        high, low = digits_of(code)
        tl.store(planes_ptr + at, high, mask=inside)
        tl.store(planes_ptr + plane_step + at, low, mask=inside)
    else:
        tl.store(planes_ptr + at, code.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantize_spans(
    x_ptr,
    up_ptr,
    kept_ptr,
    planes_ptr,
    scale_ptr,
    rows,
    depth,
    x_step,
    up_step,
    plane_step,
    SPANS: tl.constexpr,
    GROUP: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    QMAX: tl.constexpr,
    ACT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """TALL spans of up to WIDE values a program, SPANS of them in a row, GROUP columns apart. `up`, `kept`: None if not there."""
    start_next(EARLY)
    span = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    row = span // SPANS
    group = (span % SPANS).to(tl.int32)
    column = (group * GROUP)[:, None] + tl.arange(0, WIDE)[None, :]
    inside = (row < rows)[:, None] & (column < depth)
    y = load_values(
        x_ptr, row[:, None] * x_step + column, up_ptr, row[:, None] * up_step + column, inside, ACT
    )
    at = row[:, None] * depth + column
    if kept_ptr is not None:
        tl.store(kept_ptr + at, y, mask=inside)
    y = widen(y)
    inverse, scale = scales_of(tl.max(magnitude(y), 1), QMAX)
    store_codes(planes_ptr, plane_step, at, inside, y, inverse[:, None], QMAX)
    tl.store(scale_ptr + group.to(tl.int64) * rows + row, scale, mask=row < rows)


@triton.jit
def quantize_long(
    x_ptr,
    up_ptr,
    kept_ptr,
    planes_ptr,
    scale_ptr,
    depth,
    x_step,
    up_step,
    plane_step,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
    ACT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row a program, in blocks: once for its largest magnitude, once for its codes."""
    start_next(EARLY)
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < depth
        y = load_values(x_ptr, row * x_step + column, up_ptr, row * up_step + column, inside, ACT)
        largest = tl.maximum(largest, magnitude(widen(y)))
    inverse, scale = scales_of(tl.max(largest, 0), QMAX)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < depth
        y = load_values(x_ptr, row * x_step + column, up_ptr, row * up_step + column, inside, ACT)
        at = row * depth + column
        if kept_ptr is not None:
            tl.store(kept_ptr + at, y, mask=inside)
        store_codes(planes_ptr, plane_step, at, inside, widen(y), inverse, QMAX)
    tl.store(scale_ptr + row, scale)


def quantize(x: Tensor, scheme: ActivationScheme) -> Codes:
    """Quantize each row, or each group of its values, symmetrically against its largest magnitude.

    Args:
        x: float [M, K], any strides; adjacent values of a row are read best.
        scheme: what becomes of it.

    Returns:
        The codes and scales that `reference.quantize_tokens` gives the columns of each group.
    """
    return quantize_values(x if x.dtype in FLOATS else x.float(), None, None, scheme)[0]


def quantize_values(
    x: Tensor, up: Tensor | None, act: str | None, scheme: ActivationScheme, *, keep: bool = False
) -> tuple[Codes, Tensor | None]:
    """Quantize `act(x) * up`; see `quantize`.

    Args:
        x: fp32, fp16 or bf16 [M, K].
        up: like `x`, or None for no factor.
        act: one of `pointwise.ACTS`, or None.
        scheme: what becomes of the values.
        keep: return the values, too.

    Returns:
        The codes, and the values [M, K] in the dtype of `x` if they are kept.
    """
    rows, depth = x.shape
    cut = cut_of(scheme, depth)
    x, up = dense_rows(x), None if up is None else dense_rows(up)
    codes = empty_codes(x, scheme, cut)
    kept = x.new_empty(rows, depth) if keep else None
    if rows == 0 or depth == 0:
        codes.scale.zero_()
        return codes, kept
    steps = x.stride(0), 0 if up is None else up.stride(0), rows * depth
    common = {"QMAX": cut.qmax, "ACT": act, "EARLY": is_early(x)}
    if cut.wide > WIDEST:
        launch(
            quantize_long,
            (rows,),
            (x, up, kept, codes.planes, codes.scale, depth, *steps),
            {"BLOCK": _BLOCK, **common},
            device=x.device,
            warps=8,
        )
        return codes, kept
    tall = max(1, TILE // cut.wide)
    launch(
        quantize_spans,
        (-(-rows * cut.spans // tall),),
        (x, up, kept, codes.planes, codes.scale, rows, depth, *steps),
        {"SPANS": cut.spans, "GROUP": codes.group, "TALL": tall, "WIDE": cut.wide, **common},
        device=x.device,
        warps=warps_of(tall * cut.wide),
    )
    return codes, kept


@functools.lru_cache
def cut_of(scheme: ActivationScheme, depth: int) -> Cut:
    """Return how rows of `depth` values are cut."""
    longest = min(scheme.group or depth, depth)
    return Cut(scheme.widest_code(depth), len(scheme.spans(depth)), max(_NARROWEST, power_of_two(longest)))


def empty_codes(x: Tensor, scheme: ActivationScheme, cut: Cut) -> Codes:
    """Return room for the codes of `x` [M, K].

    Rows so long that wider codes would overflow sums have narrow ones under every scheme, and those are one plane.
    """
    rows, depth = x.shape
    planes = torch.empty((1 if cut.qmax <= 127 else 2, rows, depth), dtype=torch.int8, device=x.device)
    return Codes(planes, torch.empty((cut.spans, rows), dtype=torch.float32, device=x.device), scheme.group)


def dense_rows(x: Tensor) -> Tensor:
    """Return `x` [M, K] with adjacent values in a row, itself where it has them."""
    if (x.stride(1) == 1 or x.shape[1] == 1) and not x.is_neg():
        return x
    return x.resolve_neg().contiguous()


def is_early(x: Tensor) -> bool:
    """Say whether a kernel that reads the rows `x` lets the one behind it start at once, to wait inside for its results."""
    return x.shape[0] <= _FEW_ROWS and features_of(x.device).overlap


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is not less; Triton's own function takes microseconds."""
    return 1 << max(0, count - 1).bit_length()


def warps_of(values: int) -> int:
    """Return the warps of a program that holds so many values: what was fastest on an H200 (gpu.md)."""
    return 4 if values <= 4096 else 8
