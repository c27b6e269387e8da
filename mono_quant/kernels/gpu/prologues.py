"""What lies before a product in a model, and its codes, in one kernel: norms, with an addition before them, and activations.

Each operation is rounded to the dtype of its inputs as torch and transformers round their composition
(`composed.composed_norm`), so that in half precision values are those of the composition wherever sums taken in another
order round alike. Codes and scales are those of `reference.quantize_tokens` of exactly these values.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import magnitude, narrow, scales_of, widen
from mono_quant.kernels.gpu.pointwise import ACTS
from mono_quant.kernels.gpu.quantize import (
    TILE,
    WIDEST,
    cut_of,
    dense_rows,
    empty_codes,
    is_early,
    power_of_two,
    quantize_values,
    start_next,
    store_codes,
    warps_of,
)
from mono_quant.kernels.inputs import FLOATS
from mono_quant.kernels.steps import Norm, is_wider


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a prologue leaves.

    Attributes:
        codes: of its values.
        values: [M, K], if they are kept.
        total: [M, K], the sum with a residual, where there was one.
    """

    codes: Codes
    values: Tensor | None
    total: Tensor | None


@triton.jit
def _mean(x, depth):
    """Average [TALL, SPANS, WIDE] over a row: [TALL, 1, 1]."""
    total = tl.sum(tl.sum(x, 2), 1)[:, None, None]
    return tl.div_rn(total, tl.zeros_like(total) + depth)


@triton.jit
def _normed(x, inside, depth, epsilon, RMS: tl.constexpr):
    """Return (x - mean) / sqrt(variance + epsilon) of fp32 rows; an rms norm takes no mean off."""
    if not RMS:
        x = tl.where(inside, x - _mean(x, depth), 0.0)
    # `rsqrt` flushes subnormal numbers to zero
    deviation = tl.sqrt_rn(_mean(x * x, depth) + epsilon)
    return x * tl.div_rn(tl.zeros_like(deviation) + 1.0, deviation)


@triton.jit(do_not_specialize=["rows"])
def norm_spans(
    x_ptr,
    residual_ptr,
    total_ptr,
    weight_ptr,
    bias_ptr,
    kept_ptr,
    planes_ptr,
    scale_ptr,
    rows,
    depth,
    x_step,
    residual_step,
    plane_step,
    epsilon,
    SPANS: tl.constexpr,
    GROUP: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    ROUNDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """TALL rows a program, each as SPANS groups of up to WIDE values. Pointers to what is not there are None."""
    start_next(EARLY)
    row = (tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL))[:, None, None]
    group = tl.arange(0, SPANS)[None, :, None]
    column = group * GROUP + tl.arange(0, WIDE)[None, None, :]
    inside = (row < rows) & (column < depth)
    at = row * depth + column
    x = tl.load(x_ptr + row * x_step + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        x = narrow(
            widen(x) + widen(tl.load(residual_ptr + row * residual_step + column, mask=inside, other=0.0)),
            x.dtype,
        )
        tl.store(total_ptr + at, x, mask=inside)
    y = _normed(widen(x), inside, depth, epsilon, RMS)
    # an rms norm rounds after each step, but not in front of a weight in fp32; a layer norm rounds once
    if ROUNDED:
        y = widen(narrow(y, x.dtype))
    if weight_ptr is not None:
        y = y * widen(tl.load(weight_ptr + column, mask=column < depth, other=0.0))
        if RMS:
            y = widen(narrow(y, x.dtype))
    if bias_ptr is not None:
        y = y + widen(tl.load(bias_ptr + column, mask=column < depth, other=0.0))
    y = narrow(y, x.dtype)
    if kept_ptr is not None:
        tl.store(kept_ptr + at, y, mask=inside)
    y = widen(y)
    inverse, scale = scales_of(tl.max(magnitude(y), 2)[:, :, None], QMAX)
    store_codes(planes_ptr, plane_step, at, inside, y, inverse, QMAX)
    tl.store(scale_ptr + group.to(tl.int64) * rows + row, scale, mask=(row < rows) & (group * GROUP < depth))


def norm_quantize(
    x: Tensor, norm: Norm, scheme: ActivationScheme, residual: Tensor | None = None, *, keep: bool = False
) -> Prepared | None:
    """Norm rows, or their sums with a residual, and quantize them.

    Args:
        x: fp32, fp16 or bf16 [M, K].
        norm: ("layer" or "rms", weight [K], bias [K], epsilon), as `fused.norm` takes it; the weight of an rms norm may be fp32.
        scheme: what becomes of the values.
        residual: like `x`; the norm is of `x + residual`.
        keep: return the normed values, too.

    Returns:
        None where the kernel has no answer: rows of more than `WIDEST` values or of none, an unknown norm, dtypes that differ.
    """
    kind, weight, bias, epsilon = norm
    rows, depth = x.shape
    cut = cut_of(scheme, depth)
    spans = power_of_two(cut.spans)
    width = spans * cut.wide
    if depth == 0 or width > WIDEST or kind not in ("layer", "rms") or x.dtype not in FLOATS:
        return None
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return None
    if not _is_row_of(x, bias) or not _is_row_of(x, weight, kind == "rms"):
        return None
    x, residual = dense_rows(x), None if residual is None else dense_rows(residual)
    codes = empty_codes(x, scheme, cut)
    total = None if residual is None else x.new_empty(rows, depth)
    kept = x.new_empty(rows, depth) if keep else None
    if rows > 0:
        tall = max(1, TILE // width)
        steps = x.stride(0), 0 if residual is None else residual.stride(0), rows * depth
        shape = {"SPANS": spans, "GROUP": codes.group, "TALL": tall, "WIDE": cut.wide}
        rms = kind == "rms"
        rounded = rms and not (weight is not None and is_wider(weight, x))
        launch(
            norm_spans,
            (-(-rows // tall),),
            (x, residual, total, weight, bias, kept, codes.planes, codes.scale, rows, depth, *steps, epsilon),
            {**shape, "QMAX": cut.qmax, "RMS": rms, "ROUNDED": rounded, "EARLY": is_early(x)},
            device=x.device,
            warps=warps_of(tall * width),
        )
    return Prepared(codes, kept, total)


def _is_row_of(x: Tensor, term: Tensor | None, may_be_wider: bool = False) -> bool:
    """Say whether this is no term, or a weight or bias of a norm of `x` that no operation would widen the result to."""
    if term is None:
        return True
    known = term.dtype == x.dtype or (may_be_wider and is_wider(term, x))
    return known and term.shape == x.shape[1:] and term.is_contiguous() and not term.is_neg()


def act_quantize(x: Tensor, act: str, scheme: ActivationScheme, *, keep: bool = False) -> Prepared | None:
    """Quantize `act(x)`.

    Args:
        x: fp32, fp16 or bf16 [M, K].
        act: one of `pointwise.ACTS`.
        scheme: what becomes of the values.
        keep: return the values, too.

    Returns:
        None where the kernel has no answer: an unknown activation, another dtype.
    """
    if act not in ACTS or x.dtype not in FLOATS:
        return None
    codes, values = quantize_values(x, None, act, scheme, keep=keep)
    return Prepared(codes, values, None)


def gate_quantize(
    gate: Tensor, up: Tensor, act: str | None, scheme: ActivationScheme, *, keep: bool = False
) -> Prepared | None:
    """Quantize `act(gate) * up`.

    Args:
        gate: fp32, fp16 or bf16 [M, K]; both may be columns of one tensor.
        up: like `gate`.
        act: one of `pointwise.ACTS`, or None for the product alone.
        scheme: what becomes of the values.
        keep: return the values, too.

    Returns:
        None where the kernel has no answer: an unknown activation, another dtype, or two of them.
    """
    known = act is None or act in ACTS
    if not known or gate.dtype not in FLOATS or up.dtype != gate.dtype or up.shape != gate.shape:
        return None
    codes, values = quantize_values(gate, up, act, scheme, keep=keep)
    return Prepared(codes, values, None)
