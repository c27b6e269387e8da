"""What runs at every forward, and the one place that chooses how.

`int8_linear` and `int8_embedding` are what modules call. In eager mode they go straight to the chosen path;
under `torch.compile`, `torch.export`, fake tensors and autograd they go through `torch.library` ops, which no
compiler pass can open and rewrite into an inexact kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_quant.kernels import reference
from mono_quant.kernels.reference import MAX_IN_FEATURES

__all__ = ["MAX_IN_FEATURES", "activation_bits", "describe", "int8_conv", "int8_embedding", "int8_linear"]

# Rows of unfolded patches held at once by a convolution, in elements: bounds its scratch memory.
_PATCH_ELEMENTS = 1 << 24


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Apply an int8 linear layer to the last dimension of `x`.

    Args:
        x: fp32, fp16 or bf16 [..., K].
        weight: int8 [N, K].
        weight_scale: fp32 [N, 1].
        bias: float [N] or None.

    Returns:
        [..., N] in the dtype of `x`. Each row depends on that row of `x` alone.
    """
    if _needs_op(x):
        out: Tensor = torch.ops.mono_quant.int8_linear(x, weight, weight_scale, bias)
        return out
    return _linear(x, weight, weight_scale, bias)


def int8_conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Apply an int8 2-D convolution with zero padding; each receptive field is one token.

    Args:
        x: fp32, fp16 or bf16 [B, I, H, W].
        weight: int8 [O, I / groups * kh * kw].
        weight_scale: fp32 [O, 1].
        bias: float [O] or None.

    Returns:
        [B, O, H', W'] in the dtype of `x`.
    """
    args = (list(kernel_size), list(stride), list(padding), list(dilation), groups)
    if _needs_op(x):
        out: Tensor = torch.ops.mono_quant.int8_conv(x, weight, weight_scale, bias, *args)
        return out
    return _conv(x, weight, weight_scale, bias, *args)


def int8_embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather rows of an int8 table and dequantize them.

    Args:
        indices: integer, any shape.
        weight: int8 [V, D].
        weight_scale: fp32 [V, 1].
        dtype: of the result.

    Returns:
        `dtype` [*indices.shape, D].
    """
    rows = F.embedding(indices, weight)
    return (rows.float() * F.embedding(indices, weight_scale)).to(dtype)


def activation_bits(device: torch.device | str = "cpu") -> int:
    """Return the width of the activation codes that the chosen path uses on `device`."""
    return 8


def describe(device: torch.device | str = "cpu") -> str:
    """Name the path that runs int8 products on `device`, for reports."""
    return "reference (plain torch, exact)"


def _needs_op(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled())


def _linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return reference.int8_linear(rows, weight, weight_scale, bias).reshape(*x.shape[:-1], weight.shape[0])


def _out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = [
        _out_size(*args) for args in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    places = size[0] * size[1]
    channels = weight.shape[0]
    out = x.new_empty(x.shape[0], channels, *size)
    depth, width = weight.shape[1], channels // groups
    step = max(1, _PATCH_ELEMENTS // max(1, places * depth * groups))
    for start in range(0, x.shape[0], step):
        # unfold has no half kernel on every device; the codes are computed from fp32 in any case
        part = x[start : start + step].float()
        patches = F.unfold(part, kernel_size, dilation, padding, stride)
        tokens = patches.view(part.shape[0], groups, depth, places).permute(1, 0, 3, 2)
        for group in range(groups):
            rows = slice(group * width, (group + 1) * width)
            y = _linear(
                tokens[group], weight[rows], weight_scale[rows], None if bias is None else bias[rows]
            )
            out[start : start + step, rows] = y.transpose(1, 2).reshape(part.shape[0], width, *size)
    return out


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, weight_scale = ctx.saved_tensors
    # Straight-through estimate: the gradient of the linear layer with the dequantized weight.
    grad_x = (grad.float() @ (weight.float() * weight_scale)).to(grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias


def _linear_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1], inputs[2])


@torch.library.custom_op("mono_quant::int8_linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, weight_scale, bias)


@_linear_op.register_fake
def _linear_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("mono_quant::int8_conv", mutates_args=())
def _conv_op(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return _conv(x, weight, weight_scale, bias, kernel_size, stride, padding, dilation, groups)


@_conv_op.register_fake
def _conv_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = [
        _out_size(*args) for args in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    return x.new_empty(x.shape[0], weight.shape[0], *size)
