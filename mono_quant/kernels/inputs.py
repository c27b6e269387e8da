"""What an input has to be: asked where a fast path has no answer, so that the ordinary call pays nothing."""

import torch
from torch import Tensor

from mono_quant.errors import FrozenWeightError, InputError

NO_GRADIENT = (
    "the weight of a float16 or bfloat16 layer requires gradients, which it does not get; switch them off with "
    ".requires_grad_(False) and train adapters, or convert the model after training"
)
INDICES = frozenset({torch.int64, torch.int32})
# What kernels on a device take, and give.
FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


def fits(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool:
    """Say whether kernels on a device take a layer for an input: int8 weights [N, ...], N scales and no or N biases, all where `x` is."""
    if x.dtype not in FLOATS or weight.dtype is not torch.int8 or weight_scale.dtype is not torch.float32:
        return False
    if bias is not None and bias.dtype not in FLOATS:
        return False
    rows = [weight_scale] if bias is None else [weight_scale, bias]
    return weight.device == x.device and all(
        row.numel() == weight.shape[0] and row.device == x.device and not row.is_neg() for row in rows
    )


def check_input(x: Tensor, layer: str, width: int, axis: int = -1, dims: tuple[int, ...] = ()) -> None:
    """Refuse what a float layer would refuse, too.

    Args:
        x: the input.
        layer: what an error calls the layer.
        width: of the dimension `axis` of `x`.
        axis: the features, or the channels.
        dims: how many dimensions `x` may have; any number but none when not given.

    Raises:
        InputError: `x` is not floating point, or of another shape.
    """
    if not x.is_floating_point():
        raise InputError(
            f"{layer} takes floating-point inputs, not {x.dtype} {tuple(x.shape)}; cast them first, with .float()"
        )
    wrong = x.dim() not in dims if dims else not x.dim()
    if wrong or x.shape[axis] != width:
        what = "features" if axis == -1 else "channels"
        raise InputError(
            f"{layer} takes inputs with {width} {what}, not {tuple(x.shape)}; give it what the float layer took"
        )


def check_indices(indices: Tensor, layer: str) -> None:
    """Refuse indices that are no int64 or int32.

    Raises:
        InputError: they are of another dtype.
    """
    if indices.dtype not in INDICES:
        raise InputError(
            f"{layer} takes int64 or int32 indices, not {indices.dtype} {tuple(indices.shape)}; cast them first, with .long()"
        )


def check_codes(weight: Tensor, layer: str) -> None:
    """Refuse a weight that is not int8: a tracer that opens a layer puts there what reading `.weight` gives.

    Raises:
        FrozenWeightError: it is of another dtype.
    """
    if weight.dtype != torch.int8:
        raise FrozenWeightError(
            f"{layer} found {weight.dtype} weights in the place of its int8 codes. A tracer that opens a layer puts them there; "
            f"use torch.export.export, or a Tracer to which the layer is a leaf, as it is to torch.fx.symbolic_trace in a model"
        )


def check_halves(weight: Tensor, layer: str) -> None:
    """Refuse a weight that holds no floats; in another float dtype it holds the same values.

    Raises:
        FrozenWeightError: it is of another dtype.
    """
    if not weight.is_floating_point():
        raise FrozenWeightError(
            f"{layer} found {weight.dtype} weights in the place of its float16 ones. Put those there, or convert the model that "
            f"has these weights (quantize)"
        )
