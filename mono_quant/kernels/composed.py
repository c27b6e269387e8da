"""What chains stand for: torch's operations and `int8_linear` one after the other, on any device, with gradients."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_quant.kernels.ops import int8_linear
from mono_quant.kernels.steps import ACTS, Norm, Product, Steps, is_wider


def composed_product(x: Tensor, product: Product) -> Tensor:
    """Apply each weight of a product; see `fused.chain`."""
    weights, scales, biases, activations = product
    outs = [
        int8_linear(x, weight, scale, bias, activations)
        for weight, scale, bias in zip(weights, scales, biases, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def composed_norm(x: Tensor, how: Norm) -> Tensor:
    """Norm the last dimension as models write it, in fp32.

    A weight in the dtype of half-precision values is applied to rounded ones, as Llama does; a wider one before the one
    rounding there is, as Gemma does.

    Raises:
        ValueError: there is no such norm.
    """
    kind, weight, bias, epsilon = how
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    if kind != "rms":
        raise ValueError(f"unknown norm {kind!r}; choose 'layer' or 'rms'")
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if weight is not None and is_wider(weight, x):
        y = (y * weight).to(x.dtype)
    else:
        y = y.to(x.dtype)
        y = y if weight is None else weight * y
    return y if bias is None else y + bias


def composed_chain(x: Tensor, added: Tensor | None, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of `x` and what is added to it, its norm, and what the steps make of that."""
    total = x if added is None else x + added
    normed = total if steps.pre is None else composed_norm(total, steps.pre)
    y, run = composed_product(normed, steps.first), ACTS[steps.act]
    y = run(y) if steps.gate is None else run(composed_product(normed, steps.gate)) * y
    return total, normed, y if steps.second is None else composed_product(y, steps.second)
