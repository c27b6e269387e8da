"""Convolutions with one input channel per output: no matrices to multiply, so each output adds up its field by itself."""

import triton
import triton.language as tl
from torch import Tensor

from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.gpu.geometry import Geometry
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import code_of, magnitude, narrow, scales_of, widen


@triton.jit(do_not_specialize=["HEIGHT", "WIDTH", "DOWN", "RIGHT", "TOP", "LEFT", "GAP_Y", "GAP_X"])
def _convolve_channels(
    x_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    CHANNELS, ROWS, HEIGHT, WIDTH, OUT_WIDTH, PLACES, KERNEL_Y, KERNEL_X,
    DOWN, RIGHT, TOP, LEFT, GAP_Y, GAP_X,
    STRIDE_B, STRIDE_C, STRIDE_Y, STRIDE_X, OUT_B, OUT_C, OUT_PLACE,
    M: tl.constexpr, N: tl.constexpr, QMAX: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(PLACES, M)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * M + tl.arange(0, M)
    channel = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    depth = KERNEL_Y * KERNEL_X
    top = place // OUT_WIDTH * DOWN - TOP
    left = place % OUT_WIDTH * RIGHT - LEFT
    corner = top.to(tl.int64) * STRIDE_Y + left.to(tl.int64) * STRIDE_X + image * STRIDE_B
    pointers = x_ptr + corner[:, None] + (channel // ROWS * STRIDE_C)[None, :]
    kept = (place < PLACES)[:, None] & (channel < CHANNELS)[None, :]
    weight_scale = tl.load(weight_scale_ptr + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    total = tl.zeros((M, N), dtype=tl.float32)
    span = depth
    if SPAN:
        span = SPAN
    for first in range(0, depth, span):
        last = tl.minimum(first + span, depth)
        largest = tl.zeros((M, N), dtype=tl.int32)
        for k in range(first, last):
            y, x = k // KERNEL_X * GAP_Y, k % KERNEL_X * GAP_X
            inside = (top + y >= 0) & (top + y < HEIGHT) & (left + x >= 0) & (left + x < WIDTH)
            step = y.to(tl.int64) * STRIDE_Y + x.to(tl.int64) * STRIDE_X
            value = widen(tl.load(pointers + step, mask=kept & inside[:, None], other=0.0))
            largest = tl.maximum(largest, magnitude(value))
        inverse, scale = scales_of(largest, QMAX)
        sums = tl.zeros((M, N), dtype=tl.int32)
        for k in range(first, last):
            y, x = k // KERNEL_X * GAP_Y, k % KERNEL_X * GAP_X
            inside = (top + y >= 0) & (top + y < HEIGHT) & (left + x >= 0) & (left + x < WIDTH)
            step = y.to(tl.int64) * STRIDE_Y + x.to(tl.int64) * STRIDE_X
            value = widen(tl.load(pointers + step, mask=kept & inside[:, None], other=0.0))
            weight = tl.load(weight_ptr + channel * depth + k, mask=channel < CHANNELS, other=0)
            sums += code_of(value, inverse, QMAX).to(tl.int32) * weight.to(tl.int32)[None, :]
        if SPAN:
            total += sums.to(tl.float32) * scale
        else:
            total = sums.to(tl.float32) * (scale * weight_scale)
    if SPAN:
        total = total * weight_scale
    if bias_ptr is not None:
        total = total + widen(tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0))[None, :]
    out = out_ptr + image * OUT_B + (place.to(tl.int64) * OUT_PLACE)[:, None] + (channel * OUT_C)[None, :]
    tl.store(out, narrow(total, out_ptr.dtype.element_ty), mask=kept)


def convolve_channels(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    geometry: Geometry,
    scheme: ActivationScheme,
) -> None:
    """Write the convolution of an image whose groups have one channel; see `patches.multiply_fields`."""
    channels = geometry.groups * geometry.rows
    # neighbours in memory side by side; not measured on a device
    across = 64 if x.stride(1) == 1 else 4
    tile_n = min(across, triton.next_power_of_2(channels))
    tile_m = min(1024 // across, triton.next_power_of_2(geometry.places))
    span = scheme.group if len(scheme.spans(geometry.depth)) > 1 else 0
    launch(
        _convolve_channels,
        (geometry.images * triton.cdiv(geometry.places, tile_m), triton.cdiv(channels, tile_n)),
        [
            x,
            weight,
            weight_scale,
            bias,
            out,
            channels,
            geometry.rows,
            *geometry.launch_sizes(),
            *x.stride(),
            out.stride(0),
            out.stride(1),
            out.stride(3),
        ],
        {"M": tile_m, "N": tile_n, "QMAX": scheme.widest_code(geometry.depth), "SPAN": span},
        device=x.device,
    )
