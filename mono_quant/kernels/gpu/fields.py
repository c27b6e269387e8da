"""Scales of receptive fields and of pixels, and the codes of pixels.

The largest magnitude of a receptive field is that of its pixels, which are looked at once although fields overlap. Images are read
where they lie, by strides, with the channels last in memory or first. Programs stay within an image, so that neighbours in memory
are neighbours in a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.geometry import Geometry
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import code_of, magnitude, scales_of, widen

# Values of a tile. Not measured on a device.
_TILE = 4096


@triton.jit(do_not_specialize=["HEIGHT", "WIDTH", "DOWN", "RIGHT", "TOP", "LEFT", "GAP_Y", "GAP_X"])
def _field_scales(
    largest_ptr, inverse_ptr, scale_ptr, HEIGHT, WIDTH, OUT_WIDTH, PLACES, KERNEL_Y, KERNEL_X,
    DOWN, RIGHT, TOP, LEFT, GAP_Y, GAP_X,
    BLOCK: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(PLACES, BLOCK)
    # of all groups: group after group
    image = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    top = place // OUT_WIDTH * DOWN - TOP
    left = place % OUT_WIDTH * RIGHT - LEFT
    pixels = largest_ptr + image * HEIGHT * WIDTH
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for point in range(KERNEL_Y * KERNEL_X):
        y = top + point // KERNEL_X * GAP_Y
        x = left + point % KERNEL_X * GAP_X
        inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH) & (place < PLACES)
        largest = tl.maximum(largest, tl.load(pixels + y * WIDTH + x, mask=inside, other=0))
    inverse, scale = scales_of(largest, QMAX)
    tl.store(inverse_ptr + image * PLACES + place, inverse, mask=place < PLACES)
    tl.store(scale_ptr + image * PLACES + place, scale, mask=place < PLACES)


@triton.jit(do_not_specialize=["WIDTH"])
def _pixel_maxima(
    x_ptr, largest_ptr, IMAGES, PIXELS, WIDTH, INNER, STRIDE_B, STRIDE_C, STRIDE_Y, STRIDE_X,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(PIXELS, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    at = _offsets(pixel, WIDTH, STRIDE_Y, STRIDE_X, DENSE)
    base = x_ptr + image * STRIDE_B + group * INNER * STRIDE_C
    largest = tl.zeros((BLOCK, CHANNELS), dtype=tl.int32)
    for first in range(0, INNER, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (pixel < PIXELS)[:, None] & (channel < INNER)[None, :]
        at_channel = channel.to(tl.int64) * STRIDE_C
        x = widen(tl.load(base + at[:, None] + at_channel[None, :], mask=inside, other=0.0))
        largest = tl.maximum(largest, magnitude(x))
    out = largest_ptr + (group * IMAGES + image) * PIXELS + pixel
    tl.store(out, tl.max(largest, 1), mask=pixel < PIXELS)


@triton.jit(do_not_specialize=["WIDTH"])
def _pixel_codes(
    x_ptr, code_ptr, scale_ptr, IMAGES, PIXELS, WIDTH, CHANNELS, STRIDE_B, STRIDE_C, STRIDE_Y, STRIDE_X,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(PIXELS, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    channel = part * GROUP + tl.arange(0, GROUP)
    at = _offsets(pixel, WIDTH, STRIDE_Y, STRIDE_X, DENSE)
    inside = (pixel < PIXELS)[:, None]
    pointers = x_ptr + image * STRIDE_B + at[:, None] + (channel * STRIDE_C)[None, :]
    x = widen(tl.load(pointers, mask=inside, other=0.0))
    inverse, scale = scales_of(tl.max(magnitude(x), 1), QMAX)
    token = image * PIXELS + pixel
    codes = code_of(x, inverse[:, None], QMAX).to(tl.int8)
    tl.store(code_ptr + token[:, None] * CHANNELS + channel[None, :], codes, mask=inside)
    tl.store(scale_ptr + part * IMAGES * PIXELS + token, scale, mask=pixel < PIXELS)


@triton.jit
def _offsets(pixel, WIDTH, STRIDE_Y, STRIDE_X, DENSE: tl.constexpr):
    """Return where pixels lie in an image; `DENSE` where one row follows the other as its pixels do."""
    if DENSE:
        return pixel.to(tl.int64) * STRIDE_X
    return (pixel // WIDTH).to(tl.int64) * STRIDE_Y + (pixel % WIDTH).to(tl.int64) * STRIDE_X


def field_scales(x: Tensor, geometry: Geometry, qmax: int) -> tuple[Tensor, Tensor]:
    """Return Q / a and a / Q of each receptive field, fp32 [groups, B, H' * W']; see `numerics.scales_of`."""
    largest = _largest_of_pixels(x, geometry)
    inverse = torch.empty(
        geometry.groups, geometry.images, geometry.places, dtype=torch.float32, device=x.device
    )
    scale = torch.empty_like(inverse)
    block = _power_of_two(geometry.places, 256)
    launch(
        _field_scales,
        (geometry.groups * geometry.images * triton.cdiv(geometry.places, block),),
        [largest, inverse, scale, *geometry.launch_sizes()],
        {"BLOCK": block, "QMAX": qmax},
        device=x.device,
    )
    return inverse, scale


def _largest_of_pixels(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the bit patterns of the largest magnitude of each pixel's channels in a group, int32 [groups, B, H * W]."""
    largest = torch.empty(
        geometry.groups, geometry.images, geometry.pixels, dtype=torch.int32, device=x.device
    )
    channels = _power_of_two(geometry.inner, 64 if x.stride(1) == 1 else 8)
    block = _power_of_two(geometry.pixels, _TILE // channels)
    launch(
        _pixel_maxima,
        (geometry.images * triton.cdiv(geometry.pixels, block), geometry.groups),
        [
            x,
            largest,
            geometry.images,
            geometry.pixels,
            geometry.size[1],
            geometry.inner,
            *x.stride(),
        ],
        {"BLOCK": block, "CHANNELS": channels, "DENSE": _is_dense(x)},
        device=x.device,
    )
    return largest


def pixel_codes(x: Tensor, geometry: Geometry, group: int, qmax: int) -> Codes:
    """Quantize each pixel in groups of its channels: codes int8 [1, B * H * W, I], scales fp32 [I / group, B * H * W]."""
    channels, tokens = geometry.groups * geometry.inner, geometry.images * geometry.pixels
    planes = torch.empty(1, tokens, channels, dtype=torch.int8, device=x.device)
    scale = torch.empty(channels // group, tokens, dtype=torch.float32, device=x.device)
    block = _power_of_two(geometry.pixels, _TILE // group)
    launch(
        _pixel_codes,
        (geometry.images * triton.cdiv(geometry.pixels, block), channels // group),
        [x, planes, scale, geometry.images, geometry.pixels, geometry.size[1], channels, *x.stride()],
        {"BLOCK": block, "GROUP": group, "QMAX": qmax, "DENSE": _is_dense(x)},
        device=x.device,
    )
    return Codes(planes, scale, group)


def _is_dense(x: Tensor) -> bool:
    return x.stride(2) == x.shape[3] * x.stride(3)


def _power_of_two(size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(size))
