"""A convolution and what follows it in a CNN, in one pass: batch norm, residual, ReLU; channels last in memory.

Batch norm in evaluation is linear in the sums of a convolution and joins its scales and bias::

    f[n] = weight[n] / sqrt(running_var[n] + eps)           float64
    s'[n] = s[n] * f[n]                                     rounded to fp32
    b'[n] = (b[n] - running_mean[n]) * f[n] + bias[n]       rounded to fp32

so that the result is `relu(int8_conv(x, weight, s', b') + residual)`, on every path in these bits. It is folded anew in each
call, which costs microseconds: nothing has to notice that statistics have changed.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_quant.kernels import ops, packs, paths
from mono_quant.kernels.activations import AUTO, ActivationScheme
from mono_quant.kernels.choice import active, scheme_on
from mono_quant.kernels.cpu import Cpu, Longs, longs
from mono_quant.kernels.pool import for_images
from mono_quant.kernels.watching import is_plain

# Weight, bias, running mean, running variance and epsilon of `nn.BatchNorm2d` in evaluation; the first two may be None.
BatchNorm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]
# Stride, padding, dilation and groups.
ConvGeometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
_NO_NORM = (None, None, None, None, 0.0)
# What `F.max_pool2d` takes behind its input: size, stride, padding, dilation and whether sizes are rounded up.
MaxPool = tuple[Any, Any, Any, Any, bool]
# Bytes that a few images are while a convolution reads and writes them, at most, unless one alone takes more (measured: those of
# two images of 224 x 224 pixels in ResNet-50, or of eight of 112 x 112).
IN_CACHES = 16 << 20


def conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    batch_norm: BatchNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    activations: str = AUTO,
) -> Tensor:
    """Apply an int8 2-D convolution, batch norm, residual and ReLU.

    Runs fused on fp32 on a CPU with a native path, where nobody but the CPU looks at the call; elsewhere as the composition
    of `int8_conv` and torch.

    Args:
        x: float [B, I, H, W]; without a copy where the channels are last in memory.
        weight: int8 [O, I / groups, kh, kw]; read without a copy where the channels are last in memory.
        weight_scale: fp32 [O, 1].
        bias: float [O] or None.
        stride: of rows and columns, as `padding` (with zeros) and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: of channels.
        batch_norm: that of evaluation, which follows the convolution.
        residual: added to that, float [B, O, H', W'].
        relu: apply ReLU at the end.
        activations: the scheme, see `activations`.

    Returns:
        [B, O, H', W'] in the dtype of `x`; with the channels last in memory where it ran fused.

    Raises:
        FrozenWeightError: `weight` is not int8.
        InputError: `x` is not floating point, or has other channels.
    """
    how = (tuple(stride), tuple(padding), tuple(dilation), groups)
    if not is_plain_conv(x, weight_scale, bias, batch_norm, residual):
        out = ops.int8_conv(x, weight, weight_scale, bias, *how, activations)
        if batch_norm is not None:
            scale, offset, mean, variance, epsilon = batch_norm
            out = F.batch_norm(out, mean, variance, scale, offset, False, 0.0, epsilon)
        return _finished(out, residual, relu)
    cpu = active.cpu
    if cpu is not None:
        layer = (x, weight, weight_scale, bias)
        fused = native_conv(cpu, layer, how, batch_norm, residual, relu, activations)
        if fused is not None:
            return fused
    if batch_norm is not None:
        weight_scale, bias = _folded(weight_scale, bias, batch_norm)
    lists = (list(how[0]), list(how[1]), list(how[2]), groups)
    return _finished(paths.conv(x, weight, weight_scale, bias, *lists, activations), residual, relu)


def pooled_conv(x: Tensor, weight: Tensor, *layer: Any, pool: MaxPool, **after: Any) -> Tensor:
    """Apply `conv`, then `F.max_pool2d`, a few images at a time: what lies between is larger than the result, and leaves the caches.

    Args:
        x: see `conv`.
        weight: see `conv`.
        layer: the rest of what `conv` takes by position.
        pool: what `F.max_pool2d` takes behind its input.
        after: what `conv` takes by name, but for `residual`.

    Returns:
        [B, O, H'', W''], as the two functions give it.

    Raises:
        FrozenWeightError: see `conv`.
        InputError: see `conv`.
    """
    scale, bias, stride, padding, dilation, groups = layer
    plain = is_plain_conv(x, scale, bias, after.get("batch_norm"), None)
    how = (tuple(stride), tuple(padding), tuple(dilation), groups)
    made = conv_shape(x.shape, weight.shape, how) if plain else None
    at_once = images_at_once(4 * (math.prod(x.shape[1:]) + math.prod(made[1:]))) if made else 0
    if made is None or at_once >= x.shape[0]:
        return F.max_pool2d(conv(x, weight, *layer, **after), *pool)
    out = None
    for first in range(0, x.shape[0], at_once):
        part = F.max_pool2d(conv(x[first : first + at_once], weight, *layer, **after), *pool)
        if out is None:
            out = for_images(x.shape[0], part.shape[1:], part.stride()[1:], part)
        out[first : first + at_once].copy_(part)
    return cast(Tensor, out)


def images_at_once(widest: int, threads: int = 1) -> int:
    """Return how many images should go through some layers together, one at least.

    Args:
        widest: bytes of an image in the layer that reads and writes most.
        threads: that have images of their own.
    """
    return max(1, IN_CACHES // threads // max(1, widest))


def is_plain_conv(
    x: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    batch_norm: BatchNorm | None,
    residual: Tensor | None,
) -> bool:
    """Say whether the library may compute with these, where nobody but the CPU looks at the call."""
    return is_plain((x, residual, weight_scale, bias, *(batch_norm or _NO_NORM)[:4]))


def native_conv(
    cpu: Cpu,
    layer: tuple[Tensor, Tensor, Tensor, Tensor | None],
    how: ConvGeometry,
    batch_norm: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    activations: str,
) -> Tensor | None:
    """Return what `conv` returns where the library of a path computes it in one pass, and None where it does not.

    Args:
        cpu: the path.
        layer: input, weight, its scale and bias, of a call that `is_plain_conv`.
        how: stride, padding, dilation and groups.
        batch_norm: see `conv`, as the rest.
    """
    x, weight, weight_scale, bias = layer
    geometry = _geometry(x.shape, weight.shape, how)
    if geometry is None or weight.dtype is not torch.int8 or not weight.is_cpu:
        return None
    shape, sizes = geometry
    *statistics, epsilon = batch_norm or _NO_NORM
    floats = (weight_scale, bias, *statistics)
    for part in floats:
        if part is not None and (part.numel() != shape[3] or not part.is_contiguous() or part.is_neg()):
            return None
    if residual is not None and residual.shape != (shape[0], shape[3], *shape[1:3]):
        return None
    scheme = scheme_on(activations, True)
    packed = None
    if is_kept_packed(cpu, weight, how[3], scheme):
        matrix = weight.permute(0, 2, 3, 1).flatten(1)
        packed = packs.find(cpu, matrix, (matrix.data_ptr(), *matrix.shape), scheme)
    return cpu.fused_conv(x, weight, floats, epsilon, sizes, shape, residual, relu, scheme, packed)


def is_kept_packed(cpu: Cpu, weight: Tensor, groups: int, scheme: ActivationScheme) -> bool:
    """Say whether a weight [O, I, kh, kw] is read in its packed form: its channels have to be last in memory."""
    return groups == 1 and packs.pays(cpu, scheme) and weight.is_contiguous(memory_format=torch.channels_last)


def conv_shape(
    x: tuple[int, ...], weight: tuple[int, ...], how: ConvGeometry
) -> tuple[int, int, int, int] | None:
    """Return the shape [B, O, H', W'] of what `conv` gives for these shapes; None where they do not fit together."""
    found = _geometry(x, weight, how)
    if found is None:
        return None
    images, height, width, rows = found[0]
    return images, rows, height, width


@lru_cache(maxsize=4096)
def _geometry(
    given: tuple[int, ...], weight: tuple[int, ...], how: ConvGeometry
) -> tuple[tuple[int, int, int, int], Longs] | None:
    """Return the output's [B, H', W', O] and the sizes that the library is told, or None where these do not fit together."""
    (stride, padding, dilation, groups), (rows, inner, *kernel) = how, weight
    if len(given) != 4 or groups < 1 or given[1] != inner * groups or rows % groups:
        return None
    size = [
        (extent + 2 * pad - gap * (width - 1) - 1) // step + 1
        for extent, width, step, pad, gap in zip(given[2:], kernel, stride, padding, dilation, strict=True)
    ]
    if min(size) < 1:
        return None
    sizes = [
        given[0],
        groups,
        rows // groups,
        *given[2:],
        inner,
        *kernel,
        *stride,
        *padding,
        *dilation,
        *size,
    ]
    return (given[0], size[0], size[1], rows), longs(sizes)


def _folded(weight_scale: Tensor, bias: Tensor | None, batch_norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return weight scales [O, 1] and bias [O] with batch norm in them."""
    weight, offset, mean, variance, epsilon = batch_norm
    factor = (torch.ones_like(mean) if weight is None else weight).double() / (
        variance.double() + epsilon
    ).sqrt()
    moved = (torch.zeros_like(mean) if bias is None else bias).double() - mean.double()
    shifted = moved * factor
    if offset is not None:
        shifted = shifted + offset.double()
    return (weight_scale.view(-1).double() * factor).float().view(-1, 1), shifted.float()


def _finished(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        out = out + residual
    return out.relu() if relu else out
