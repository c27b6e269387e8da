"""What runs at every forward, on the path that `choice` holds.

`int8_linear` and `int8_embedding` are what modules call. In eager mode they go straight to the chosen path;
under `torch.compile`, `torch.export`, fake tensors and autograd they go through `torch.library` ops, which no
compiler pass can open and rewrite into an inexact kernel; under the transforms of `torch.func`, which those ops
do not know, through the functions of `transforms`. Gradients are straight-through: those of the float layer with
the dequantized weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_quant.kernels import paths, transforms
from mono_quant.kernels.activations import AUTO
from mono_quant.kernels.inputs import check_halves, check_input
from mono_quant.kernels.watching import is_followed, wants_gradient


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activations: str = AUTO
) -> Tensor:
    """Apply an int8 linear layer to the last dimension of `x`.

    Args:
        x: fp32, fp16 or bf16 [..., K].
        weight: int8 [N, K].
        weight_scale: fp32 [N, 1].
        bias: float [N] or None.
        activations: how `x` becomes codes, one of `ACTIVATIONS`.

    Returns:
        [..., N] in the dtype of `x`. Each row depends on that row of `x` alone; with "auto", which looks at how
        many there are (see `choice`), its scheme does not.

    Raises:
        InputError: `x` is not floating point, or has another width.
        FrozenWeightError: `weight` is not int8.
        ValueError: there is no such activation scheme.
    """
    if _needs_op(x, bias):
        return transforms.linear(x, weight, weight_scale, bias, activations)
    return paths.linear(x, weight, weight_scale, bias, activations)


def int8_conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activations: str = AUTO,
) -> Tensor:
    """Apply an int8 2-D convolution with zero padding; each receptive field is one token.

    Args:
        x: fp32, fp16 or bf16 [B, I, H, W].
        weight: int8 [O, I / groups, kh, kw]; read without a copy when the channels are last in memory.
        weight_scale: fp32 [O, 1].
        bias: float [O] or None.
        activations: how a receptive field becomes codes, one of `ACTIVATIONS`.

    Returns:
        [B, O, H', W'] in the dtype of `x`.

    Raises:
        FrozenWeightError: `weight` is not int8.
        ValueError: there is no such activation scheme.
    """
    args = (list(stride), list(padding), list(dilation), groups, activations)
    if _needs_op(x, bias):
        return transforms.conv(x, weight, weight_scale, bias, *args)
    return paths.conv(x, weight, weight_scale, bias, *args)


def int8_embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather rows of an int8 table and dequantize them.

    Args:
        indices: integer, any shape.
        weight: int8 [V, D].
        weight_scale: fp32 [V, 1].
        dtype: of the result.

    Returns:
        `dtype` [*indices.shape, D].

    Raises:
        InputError: the indices are no int64 or int32.
        FrozenWeightError: `weight` is not int8.
    """
    if not _needs_op(indices, None):
        out = paths.native_embedding(indices, weight, weight_scale, dtype)
        if out is not None:
            return out
    return paths.embedding(indices, weight, weight_scale, dtype)


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer with float16 weights: float32 arithmetic on CPU, the weight's own elsewhere.

    The native kernel widens weights in registers. Sums are fp32; their order, and with it the last bit, may change with
    the number of tokens.

    Args:
        x: fp32, fp16 or bf16 [..., K].
        weight: float16 [N, K]; a weight that was cast to another dtype is used as it is.
        bias: float [N] or None.

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        InputError: `x` is not floating point, or has another width.
        FrozenWeightError: `weight` is not floating point.
    """
    if weight.dtype is not torch.float16 or weight.device.type not in ("cpu", "meta"):
        check_halves(weight, paths.HALF)
        check_input(x, paths.HALF, weight.shape[1])
        own = weight.dtype
        return F.linear(x.to(own), weight, None if bias is None else bias.to(own)).to(x.dtype)
    if _needs_op(x, bias, weight):
        return transforms.half_linear(x, weight, bias)
    return paths.half_linear(x, weight, bias)


def _needs_op(x: Tensor, bias: Tensor | None, weight: Tensor | None = None) -> bool:
    """Say whether someone other than the device looks at this call: a compiler, a tracer, autograd, a fake tensor."""
    return type(x) is not Tensor or is_followed() or wants_gradient(x, bias, weight)
