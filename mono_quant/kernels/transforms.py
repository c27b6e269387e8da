"""The products under the transforms of `torch.func` and forward-mode gradients, which `torch.library` ops do not know.

Each is a function with rules of its own: gradients as in `library`, batches one after another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from mono_quant.kernels import library
from mono_quant.kernels.activations import AUTO
from mono_quant.kernels.choice import scheme_of


def is_transformed() -> bool:
    """Say whether a transform looks; a compiler deals with those by itself."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        # off while a function with a rule of its own runs
        or (forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled())
    )


def linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activations: str = AUTO
) -> Tensor:
    """Apply an int8 linear layer where someone looks at the call; see `ops.int8_linear`."""
    run: Any = _Linear.apply if is_transformed() else torch.ops.mono_quant.int8_linear
    out: Tensor = run(x, weight, weight_scale, bias, activations)
    return out


def conv(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """Apply an int8 convolution where someone looks at the call; see `ops.int8_conv`."""
    run: Any = _Conv.apply if is_transformed() else torch.ops.mono_quant.int8_conv
    out: Tensor = run(x, weight, weight_scale, bias, *how)
    return out


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer with float16 weights where someone looks at the call; see `ops.half_linear`."""
    run: Any = _Half.apply if is_transformed() else torch.ops.mono_quant.half_linear
    out: Tensor = run(x, weight, bias)
    return out


def _batched(
    product: Callable[..., Tensor], info: Any, axes: Sequence[int | None], args: Sequence[Any]
) -> Any:
    """Apply a product to each element of a batch, which may be one of weights as well as of inputs."""
    elements = (
        product(
            *(a.select(axis, i) if isinstance(axis, int) else a for a, axis in zip(args, axes, strict=True))
        )
        for i in range(info.batch_size)
    )
    return torch.stack(list(elements)), 0


def _rows(product: Callable[..., Tensor], info: Any, axes: Sequence[int | None], args: Sequence[Any]) -> Any:
    """Apply a product of rows to a batch: at once where the weights are the same for all."""
    if any(axis is not None for axis in axes[1:]):
        return _batched(product, info, axes, args)
    return product(args[0].movedim(axes[0], 0), *args[1:]), 0


def _changed(product: Tensor | None, bias: Tensor | None, ctx: Any) -> Tensor:
    """Return how an output changes when its product with the weight and its bias do, where they do."""
    out = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.saved_tensors[0].device)
    for change in (product, bias):
        out = out if change is None else out + change.to(ctx.dtype)
    return out


class _Linear(torch.autograd.Function):
    forward = staticmethod(linear)
    backward = staticmethod(library.linear_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        library.keep_linear(ctx, inputs, output)
        ctx.shape, ctx.dtype = output.shape, output.dtype

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        x, *rest, activations = args
        if in_dims[0] is not None:
            # of one element: all of them together are more tokens
            activations = scheme_of(activations, x.select(in_dims[0], 0)).name
        return _rows(linear, info, in_dims, (x, *rest, activations))

    @staticmethod
    def jvp(ctx: Any, x: Any, _weight: Any, _scale: Any, bias: Any, _activations: Any) -> Any:
        weight = library.dequantized(*ctx.saved_tensors)
        return _changed(None if x is None else F.linear(x.float(), weight), bias, ctx)


class _Conv(torch.autograd.Function):
    forward = staticmethod(conv)
    backward = staticmethod(library.conv_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        library.keep_conv(ctx, inputs, output)
        ctx.shape, ctx.dtype = output.shape, output.dtype

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _batched(conv, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, x: Any, _weight: Any, _scale: Any, bias: Any, *_how: Any) -> Any:
        weight = library.dequantized(*ctx.saved_tensors)
        product = None if x is None else F.conv2d(x.float(), weight, None, *ctx.how)
        return _changed(product, None if bias is None else bias.view(-1, 1, 1), ctx)


class _Half(torch.autograd.Function):
    forward = staticmethod(half_linear)
    backward = staticmethod(library.half_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        library.keep_half(ctx, inputs, output)
        ctx.shape, ctx.dtype = output.shape, output.dtype

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _rows(half_linear, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, x: Any, _weight: Any, bias: Any) -> Any:
        product = None if x is None else F.linear(x.float(), ctx.saved_tensors[0].float())
        return _changed(product, bias, ctx)
