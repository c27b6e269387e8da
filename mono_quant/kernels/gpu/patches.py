"""The product of receptive fields and int8 weights, without a buffer for the fields.

A tile of fields is read from the image through computed offsets and becomes codes in registers; or codes of pixels are read, which
fields share. Exact int32 sums, and the epilogue of `reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.features import features_of
from mono_quant.kernels.gpu.fields import field_scales
from mono_quant.kernels.gpu.geometry import Geometry
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import code_of, digits_of, narrow, widen

_GEOMETRY = ["HEIGHT", "WIDTH", "DOWN", "RIGHT", "TOP", "LEFT", "GAP_Y", "GAP_X"]


@triton.jit(do_not_specialize=_GEOMETRY)
def _multiply_fields(
    x_ptr, inverse_ptr, scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    IMAGES, INNER, ROWS, HEIGHT, WIDTH, OUT_WIDTH, PLACES, KERNEL_Y, KERNEL_X,
    DOWN, RIGHT, TOP, LEFT, GAP_Y, GAP_X,
    STRIDE_B, STRIDE_C, STRIDE_Y, STRIDE_X, OUT_B, OUT_C, OUT_PLACE,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, QMAX: tl.constexpr, PADDED: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    image, place, group, row = _tile(PLACES, ROWS, M, N)
    depth = KERNEL_Y * KERNEL_X * INNER
    field = (group * IMAGES + image) * PLACES + place
    inverse = tl.load(inverse_ptr + field, mask=place < PLACES, other=0.0)
    top = place // OUT_WIDTH * DOWN - TOP
    left = place % OUT_WIDTH * RIGHT - LEFT
    corner = top.to(tl.int64) * STRIDE_Y + left.to(tl.int64) * STRIDE_X
    corner += image * STRIDE_B + group * INNER * STRIDE_C
    weights = weight_ptr + (group * ROWS + row)[None, :] * depth
    total = tl.zeros((M, N), dtype=tl.int32)
    upper = tl.zeros((M, N), dtype=tl.int32)
    for first in range(0, depth, K):
        k = first + tl.arange(0, K)
        point = k // INNER
        y = point // KERNEL_X * GAP_Y
        x = point % KERNEL_X * GAP_X
        step = y.to(tl.int64) * STRIDE_Y + x.to(tl.int64) * STRIDE_X + (k % INNER).to(tl.int64) * STRIDE_C
        inside = (place < PLACES)[:, None] & (k < depth)[None, :]
        if PADDED:
            at_y = top[:, None] + y[None, :]
            at_x = left[:, None] + x[None, :]
            inside = inside & (at_y >= 0) & (at_y < HEIGHT) & (at_x >= 0) & (at_x < WIDTH)
        values = widen(tl.load(x_ptr + corner[:, None] + step[None, :], mask=inside, other=0.0))
        code = code_of(values, inverse[:, None], QMAX)
        weight = tl.load(weights + k[:, None], mask=(k < depth)[:, None] & (row < ROWS)[None, :], other=0)
        if QMAX > 127:
            high, low = digits_of(code)
            upper = _add_product(high, weight, upper, BYTES)
            total = _add_product(low, weight, total, BYTES)
        else:
            total = _add_product(code.to(tl.int8), weight, total, BYTES)
    total = upper * 64 + total
    scale = tl.load(scale_ptr + field, mask=place < PLACES, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + group * ROWS + row, mask=row < ROWS, other=0.0)
    y = total.to(tl.float32) * (scale[:, None] * weight_scale[None, :])
    _finish(y, bias_ptr, out_ptr, image, place, group, row, PLACES, ROWS, OUT_B, OUT_C, OUT_PLACE)


@triton.jit(do_not_specialize=_GEOMETRY)
def _multiply_pixels(
    code_ptr, scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    IMAGES, CHANNELS, INNER, ROWS, HEIGHT, WIDTH, OUT_WIDTH, PLACES, KERNEL_Y, KERNEL_X,
    DOWN, RIGHT, TOP, LEFT, GAP_Y, GAP_X, OUT_B, OUT_C, OUT_PLACE,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    image, place, group, row = _tile(PLACES, ROWS, M, N)
    depth = KERNEL_Y * KERNEL_X * INNER
    top = place // OUT_WIDTH * DOWN - TOP
    left = place % OUT_WIDTH * RIGHT - LEFT
    k = tl.arange(0, K)
    weights = weight_ptr + (group * ROWS + row)[None, :] * depth + k[:, None]
    pixels = HEIGHT * WIDTH
    total = tl.zeros((M, N), dtype=tl.float32)
    parts = INNER // K
    for step in range(KERNEL_Y * KERNEL_X * parts):
        point = step // parts
        part = group * parts + step % parts
        y = top + point // KERNEL_X * GAP_Y
        x = left + point % KERNEL_X * GAP_X
        inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH) & (place < PLACES)
        token = image * pixels + y * WIDTH + x
        code = tl.load(
            code_ptr + token[:, None] * CHANNELS + (part * K + k)[None, :], mask=inside[:, None], other=0
        )
        weight = tl.load(weights + step * K, mask=(row < ROWS)[None, :], other=0)
        # what lies outside of the image is zero, and adds one
        scale = tl.load(scale_ptr + part * IMAGES * pixels + token, mask=inside, other=0.0)
        sums = _add_product(code, weight, tl.zeros((M, N), dtype=tl.int32), BYTES)
        total += sums.to(tl.float32) * scale[:, None]
    y = total * tl.load(weight_scale_ptr + group * ROWS + row, mask=row < ROWS, other=0.0)[None, :]
    _finish(y, bias_ptr, out_ptr, image, place, group, row, PLACES, ROWS, OUT_B, OUT_C, OUT_PLACE)


@triton.jit
def _tile(PLACES, ROWS, M: tl.constexpr, N: tl.constexpr):
    """Return image, places, group and rows of weights of this program; those that share a part of an image run side by side."""
    across, along = tl.cdiv(ROWS, N), tl.cdiv(PLACES, M)
    tile = tl.program_id(0) // across
    place = tile % along * M + tl.arange(0, M)
    row = tl.program_id(0) % across * N + tl.arange(0, N)
    return (tile // along).to(tl.int64), place, tl.program_id(1).to(tl.int64), row


@triton.jit
def _add_product(codes, weight, total, BYTES: tl.constexpr):
    """Add the int8 product of two tiles to int32 sums."""
    if BYTES:
        return tl.dot(codes, weight, total, out_dtype=tl.int32)
    # float16 holds each byte, and fp32 the sums of one tile
    return total + tl.dot(codes.to(tl.float16), weight.to(tl.float16)).to(tl.int32)


@triton.jit
def _finish(y, bias_ptr, out_ptr, image, place, group, row, PLACES, ROWS, OUT_B, OUT_C, OUT_PLACE):
    """Add the bias, round once and store."""
    channel = group * ROWS + row
    if bias_ptr is not None:
        y = y + widen(tl.load(bias_ptr + channel, mask=row < ROWS, other=0.0))[None, :]
    out = out_ptr + image * OUT_B + (place.to(tl.int64) * OUT_PLACE)[:, None] + (channel * OUT_C)[None, :]
    kept = (place < PLACES)[:, None] & (row < ROWS)[None, :]
    tl.store(out, narrow(y, out_ptr.dtype.element_ty), mask=kept)


def multiply_fields(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    geometry: Geometry,
    qmax: int,
) -> None:
    """Write the convolution of an image with one scale per receptive field.

    Args:
        x: fp32, fp16 or bf16 [B, I, H, W], of any strides.
        weight: int8 [O, kh, kw, I / groups], dense.
        weight_scale: fp32 [O], dense.
        bias: float [O], dense, or None.
        out: [B, O, H', W'] in the dtype of `x`, the places of an image one stride apart.
        geometry: of the convolution.
        qmax: largest code of `x`.
    """
    inverse, scale = field_scales(x, geometry, qmax)
    tile = _tile_of(geometry, x.device, 64 if qmax > 127 else 128)
    constants = tile | {
        "K": 32 if geometry.depth <= 32 else 64,
        "QMAX": qmax,
        "PADDED": geometry.is_padded,
    }
    launch(
        _multiply_fields,
        _grid(geometry, constants),
        [
            x,
            inverse,
            scale,
            weight,
            weight_scale,
            bias,
            out,
            geometry.images,
            geometry.inner,
            geometry.rows,
            *geometry.launch_sizes(),
            *x.stride(),
            *_strides(out),
        ],
        constants,
        device=x.device,
        warps=_warps(constants),
        stages=3,
    )


def multiply_pixels(
    codes: Codes,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    geometry: Geometry,
) -> None:
    """Write the convolution of pixels that are codes already, in groups of channels; see `multiply_fields`.

    Args:
        codes: of the pixels, from `fields.pixel_codes`, in groups that divide I / groups.
    """
    constants = _tile_of(geometry, out.device, 128) | {"K": codes.group}
    launch(
        _multiply_pixels,
        _grid(geometry, constants),
        [
            codes.planes,
            codes.scale,
            weight,
            weight_scale,
            bias,
            out,
            geometry.images,
            geometry.groups * geometry.inner,
            geometry.inner,
            geometry.rows,
            *geometry.launch_sizes(),
            *_strides(out),
        ],
        constants,
        device=out.device,
        warps=_warps(constants),
        stages=3,
    )


def _strides(out: Tensor) -> list[int]:
    return [out.stride(0), out.stride(1), out.stride(3)]


def _tile_of(geometry: Geometry, device: torch.device, most_rows: int) -> dict[str, int]:
    """Return the places and rows of a tile, and whether Triton multiplies bytes. Not measured on a device."""
    multiplies_bytes = features_of(device).int8_dot
    # without tensor cores each value of a tile is code
    places, rows = (128, most_rows) if multiplies_bytes else (32, 32)
    return {
        "M": min(places, max(16, triton.next_power_of_2(geometry.places))),
        "N": min(rows, max(16, triton.next_power_of_2(geometry.rows))),
        "BYTES": multiplies_bytes,
    }


def _grid(geometry: Geometry, constants: dict[str, int]) -> tuple[int, int]:
    along, across = triton.cdiv(geometry.places, constants["M"]), triton.cdiv(geometry.rows, constants["N"])
    return geometry.images * along * across, geometry.groups


def _warps(constants: dict[str, int]) -> int:
    return 8 if constants["M"] * constants["N"] > 128 * 64 else 4
