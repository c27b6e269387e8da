"""The products as `torch.library` ops, for whoever looks at a call: compilers, exporters, fake tensors, autograd.

No compiler pass can open them and rewrite them into an inexact kernel. Gradients are straight-through: those of the float
layer with the dequantized weight, which is a constant.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from mono_quant.errors import FrozenWeightError
from mono_quant.kernels import paths
from mono_quant.kernels.activations import AUTO, check_activations
from mono_quant.kernels.inputs import NO_GRADIENT, check_codes, check_halves, check_input


def dequantized(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the fp32 weight that int8 codes [N, ...] and their scales [N, 1] stand for."""
    return weight.float() * weight_scale.view(-1, *(1,) * (weight.dim() - 1))


def keep_linear(ctx: Any, inputs: Any, output: Any) -> None:
    """Keep what the gradients of an int8 linear layer need."""
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.save_for_forward(inputs[1], inputs[2])


def linear_backward(ctx: Any, grad: Tensor) -> Any:
    """Return the gradients of the inputs of an int8 linear layer."""
    grad_x = (grad.float() @ dequantized(*ctx.saved_tensors)).to(grad.dtype)
    return grad_x, None, None, _sum_of_rows(grad) if ctx.needs_input_grad[3] else None, None


def keep_conv(ctx: Any, inputs: Any, output: Any) -> None:
    """Keep what the gradients of an int8 convolution need."""
    keep_linear(ctx, inputs, output)
    ctx.size, ctx.how = inputs[0].shape, inputs[4:8]


def conv_backward(ctx: Any, grad: Tensor) -> Any:
    """Return the gradients of the inputs of an int8 convolution."""
    weight = dequantized(*ctx.saved_tensors)
    grad_x = conv2d_input(ctx.size, weight, grad.float(), *ctx.how).to(grad.dtype)  # type: ignore[no-untyped-call]
    return grad_x, None, None, grad.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None, *(None,) * 5


def keep_half(ctx: Any, inputs: Any, output: Any) -> None:
    """Keep what the gradients of a float16 linear layer need."""
    ctx.save_for_backward(inputs[1])
    ctx.save_for_forward(inputs[1])


def half_backward(ctx: Any, grad: Tensor) -> Any:
    """Return the gradients of the inputs of a float16 linear layer.

    Raises:
        FrozenWeightError: the weight wants one.
    """
    if ctx.needs_input_grad[1]:
        raise FrozenWeightError(NO_GRADIENT)
    (weight,) = ctx.saved_tensors
    grad_x = (grad.float() @ weight.float()).to(grad.dtype)
    return grad_x, None, _sum_of_rows(grad) if ctx.needs_input_grad[2] else None


def _sum_of_rows(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


@torch.library.custom_op("mono_quant::int8_linear", mutates_args=())
def _linear_op(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activations: str = AUTO
) -> Tensor:
    check_codes(weight, paths.INT8)
    return paths.linear(x, weight, weight_scale, bias, activations)


@_linear_op.register_fake
def _linear_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activations: str = AUTO
) -> Tensor:
    check_activations(activations)
    check_codes(weight, paths.INT8)
    check_input(x, paths.INT8, weight.shape[1])
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("mono_quant::int8_conv", mutates_args=())
def _conv_op(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activations: str = AUTO,
) -> Tensor:
    check_codes(weight, paths.CONV)
    out = paths.conv(x, weight, weight_scale, bias, stride, padding, dilation, groups, activations)
    # one layout for every input, as the fake tensor has it
    return out.contiguous()


@_conv_op.register_fake
def _conv_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activations: str = AUTO,
) -> Tensor:
    check_activations(activations)
    check_codes(weight, paths.CONV)
    size = paths.out_sizes(x, weight, stride, padding, dilation)
    return x.new_empty(x.shape[0], weight.shape[0], *size)


@torch.library.custom_op("mono_quant::half_linear", mutates_args=())
def _half_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_halves(weight, paths.HALF)
    return paths.half_linear(x, weight, bias)


@_half_op.register_fake
def _half_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_halves(weight, paths.HALF)
    check_input(x, paths.HALF, weight.shape[1])
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_linear_op.register_autograd(linear_backward, setup_context=keep_linear)
_conv_op.register_autograd(conv_backward, setup_context=keep_conv)
_half_op.register_autograd(half_backward, setup_context=keep_half)
