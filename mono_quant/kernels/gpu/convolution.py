"""Int8 convolutions, implicitly: receptive fields are read from the image, and no buffer holds them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.gpu.depthwise import convolve_channels
from mono_quant.kernels.gpu.fields import pixel_codes
from mono_quant.kernels.gpu.geometry import Geometry, geometry_of, in_one_row
from mono_quant.kernels.gpu.patches import multiply_fields, multiply_pixels
from mono_quant.kernels.inputs import fits

# With fewer outputs to a group of one channel, a tile of a matrix product would be nearly empty.
_MATRIX_ROWS = 8
# What a grid holds beside its first dimension, and what kernels count in 32 bits.
_MOST_CHANNELS, _MOST_PIXELS = 65535, 2**31 - 1024


def conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scheme: ActivationScheme,
) -> Tensor | None:
    """Apply an int8 convolution with the bits of `reference`; see `mono_quant.kernels.int8_conv`.

    Args:
        x: [B, I, H, W], of any strides; read without a copy.
        weight: int8 [O, I / groups, kh, kw]; read without a copy when the channels are last in memory.

    Returns:
        [B, O, H', W'] in the dtype of `x`, the channels last in memory where those of `x` are. None where there is no kernel: for
        other arguments than `int8_conv` takes, and for groups of values that share a scale and are no parts of a pixel.
    """
    geometry = geometry_of(x, weight, stride, padding, dilation, groups)
    if geometry is None or not fits(x, weight, weight_scale, bias):
        return None
    span = scheme.group if len(scheme.spans(geometry.depth)) > 1 else 0
    is_direct = geometry.inner == 1 and (geometry.rows < _MATRIX_ROWS or span > 0)
    if span and not is_direct and geometry.inner % span:
        return None
    if max(geometry.groups, geometry.rows, geometry.inner) * geometry.groups > _MOST_CHANNELS:
        return None
    if geometry.images * max(geometry.pixels, geometry.places) > _MOST_PIXELS:
        return None
    target = out = _like(x, geometry)
    if not out.numel():
        return out
    x, weight, weight_scale = (
        x.resolve_neg(),
        weight.permute(0, 2, 3, 1).contiguous(),
        weight_scale.contiguous(),
    )
    bias = None if bias is None else bias.contiguous()
    row, out_row = in_one_row(x), in_one_row(out)
    if geometry.maps_pixels and row is not None and out_row is not None:
        # small images fill tiles together
        x, target, geometry = row, out_row, geometry.as_one_image()
    qmax = scheme.widest_code(geometry.depth)
    if is_direct:
        convolve_channels(x, weight, weight_scale, bias, target, geometry, scheme)
    elif span:
        codes = pixel_codes(x, geometry, span, qmax)
        multiply_pixels(codes, weight, weight_scale, bias, target, geometry)
    else:
        multiply_fields(x, weight, weight_scale, bias, target, geometry, qmax)
    return out


def _like(x: Tensor, geometry: Geometry) -> Tensor:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (geometry.images, geometry.groups * geometry.rows, *geometry.out),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if is_last else torch.contiguous_format,
    )
