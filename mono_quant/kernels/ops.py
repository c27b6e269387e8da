"""What runs at every forward, on the path that `choice` holds.

`int8_linear` and `int8_embedding` are what modules call. In eager mode they go straight to the chosen path;
under `torch.compile`, `torch.export`, fake tensors and autograd they go through `torch.library` ops, which no
compiler pass can open and rewrite into an inexact kernel.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_quant.errors import FrozenWeightError
from mono_quant.kernels import reference
from mono_quant.kernels.choice import active
from mono_quant.kernels.inputs import check_codes, check_indices, check_input

_INT8, _HALF = "an int8 linear layer", "a float16 linear layer"

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

    Raises:
        InputError: `x` is not floating point, or has another width.
    """
    if _needs_op(x, bias):
        out: Tensor = torch.ops.mono_quant.int8_linear(x, weight, weight_scale, bias)
        return out
    return _linear(x, weight, weight_scale, bias)


def int8_conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Apply an int8 2-D convolution with zero padding; each receptive field is one token.

    Args:
        x: fp32, fp16 or bf16 [B, I, H, W].
        weight: int8 [O, I / groups, kh, kw]; read without a copy when the channels are last in memory.
        weight_scale: fp32 [O, 1].
        bias: float [O] or None.

    Returns:
        [B, O, H', W'] in the dtype of `x`.
    """
    args = (list(stride), list(padding), list(dilation), groups)
    if _needs_op(x, bias):
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

    Raises:
        InputError: the indices are no int64 or int32.
    """
    if active.cpu is not None and not _needs_op(indices, None):
        out = active.cpu.embedding(indices, weight, weight_scale, dtype)
        if out is not None:
            return out
    check_indices(indices, "an int8 embedding")
    rows = F.embedding(indices, weight)
    return (rows.float() * F.embedding(indices, weight_scale)).to(dtype)


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
    """
    if weight.dtype is not torch.float16 or weight.device.type not in ("cpu", "meta"):
        check_input(x, _HALF, weight.shape[1])
        own = weight.dtype
        return F.linear(x.to(own), weight, None if bias is None else bias.to(own)).to(x.dtype)
    if _needs_op(x, bias, weight):
        out: Tensor = torch.ops.mono_quant.half_linear(x, weight, bias)
        return out
    return _half_linear(x, weight, bias)


def is_watched() -> bool:
    """Say whether a compiler, a tracer, a transform or a mode runs this code on something that stands for tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _has_memory()
    )


def _needs_op(x: Tensor, bias: Tensor | None, weight: Tensor | None = None) -> bool:
    """Say whether someone other than the CPU looks at this call: a compiler, a tracer, autograd, a fake tensor."""
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or (
            torch.is_grad_enabled()
            and (
                x.requires_grad
                or (bias is not None and bias.requires_grad)
                or (weight is not None and weight.requires_grad)
            )
        )
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    if active.cpu is not None and _has_memory():
        out = active.cpu.linear(x, weight, weight_scale, bias)
        if out is not None:
            return out
    check_input(x, _INT8, weight.shape[1])
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    codes, scale = reference.quantize_tokens(rows)
    matmul = torch._int_mm if _has_int_mm(codes, weight) else reference.int_matmul
    total = matmul(codes, weight.t() if matmul is torch._int_mm else weight)
    out = reference.rescale(total, scale, weight_scale, bias, x.dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _half_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if active.cpu is not None and _has_memory():
        out = active.cpu.half_linear(x, weight, bias)
        if out is not None:
            return out
    check_input(x, _HALF, weight.shape[1])
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _has_memory() -> bool:
    # under functorch a tensor may stand for another one
    return torch._C._functorch.peek_interpreter_stack() is None


def _has_int_mm(codes: Tensor, weight: Tensor) -> bool:
    # with one input feature torch 2.13 confuses the strides and the result is wrong
    if not codes.is_cpu or codes.shape[0] <= 16 or codes.shape[1] < 16 or weight.shape[0] == 0:
        return False
    # on CPUs without VNNI it is a scalar loop
    return _int_mm_is_exact()


@functools.cache
def _int_mm_is_exact() -> bool:
    if not torch.cpu._is_vnni_supported():
        return False
    codes = torch.full((32, 256), reference.QMAX, dtype=torch.int8)
    weight = torch.tensor([127, -128, -127, 1], dtype=torch.int8).view(4, 1).expand(4, 256).contiguous()
    try:
        return torch.equal(torch._int_mm(codes, weight.t()), reference.int_matmul(codes, weight))
    except RuntimeError:
        return False


def _out_sizes(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, gap in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]


def _conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = _out_sizes(x, weight, stride, padding, dilation)
    if active.cpu is not None and _has_memory():
        native = active.cpu.conv(x, weight, weight_scale, bias, stride, padding, dilation, groups, size)
        if native is not None:
            return native
    places = size[0] * size[1]
    kernel_size, channels = weight.shape[2:], weight.shape[0]
    weight = weight.flatten(1)
    out = x.new_empty(x.shape[0], channels, *size)
    depth, width = weight.shape[1], channels // groups
    step = max(1, _PATCH_ELEMENTS // max(1, places * depth * groups))
    for start in range(0, x.shape[0], step):
        # unfold has no half kernel on every device; the codes are computed from fp32 in any case
        part = x[start : start + step].float()
        patches = F.unfold(part, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))
        tokens = patches.view(part.shape[0], groups, depth, places).permute(1, 0, 3, 2)
        for group in range(groups):
            rows = slice(group * width, (group + 1) * width)
            y = _linear(tokens[group], weight[rows], weight_scale[rows], None if bias is None else bias[rows])
            out[start : start + step, rows] = y.transpose(1, 2).reshape(part.shape[0], width, *size)
    return out


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, weight_scale = ctx.saved_tensors
    # Straight-through estimate: the gradient of the linear layer with the dequantized weight.
    grad_x = (grad.float() @ (weight.float() * weight_scale)).to(grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias


def _linear_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1], inputs[2])


@torch.library.custom_op("mono_quant::int8_linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_codes(weight, _INT8)
    return _linear(x, weight, weight_scale, bias)


@_linear_op.register_fake
def _linear_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_codes(weight, _INT8)
    check_input(x, _INT8, weight.shape[1])
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


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
) -> Tensor:
    out = _conv(x, weight, weight_scale, bias, stride, padding, dilation, groups)
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
) -> Tensor:
    size = _out_sizes(x, weight, stride, padding, dilation)
    return x.new_empty(x.shape[0], weight.shape[0], *size)


def _half_backward(ctx, grad):  # type: ignore[no-untyped-def]
    if ctx.needs_input_grad[1]:
        raise FrozenWeightError(
            "the weight of a float16 layer requires gradients, which it does not get; switch them off with "
            ".requires_grad_(False) and train adapters, or convert the model after training"
        )
    (weight,) = ctx.saved_tensors
    grad_x = (grad.float() @ weight.float()).to(grad.dtype)
    return grad_x, None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None


def _half_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


@torch.library.custom_op("mono_quant::half_linear", mutates_args=())
def _half_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _half_linear(x, weight, bias)


@_half_op.register_fake
def _half_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_input(x, _HALF, weight.shape[1])
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_half_op.register_autograd(_half_backward, setup_context=_half_setup)
