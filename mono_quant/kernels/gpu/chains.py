"""Chains of kernels: what becomes codes is read once, and products that share it lie side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mono_quant.kernels.activations import SCHEMES, ActivationScheme
from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.products import multiply
from mono_quant.kernels.gpu.prologues import Prepared, act_quantize, gate_quantize, norm_quantize
from mono_quant.kernels.gpu.quantize import quantize
from mono_quant.kernels.inputs import fits
from mono_quant.kernels.steps import Product, Steps

# What names a chain beside its tensors, and those.
Described = tuple[tuple[Any, ...], list[Tensor | None]]


def chain(
    x: Tensor, added: Tensor | None, steps: Steps, keep_sum: bool, keep_normed: bool
) -> tuple[Tensor, ...] | None:
    """Apply steps to a tensor, which nobody else looks at; see `device_chains.run_chain`.

    Args:
        x, added, steps, keep_sum, keep_normed: as there; the schemes of products are named, none is "auto".

    Returns:
        The sum and the normed values where they are kept, and the result: contiguous, in the dtype of `x`. None where the kernels
        have no answer.
    """
    parallel = [product for product in (steps.gate, steps.first) if product is not None]
    depth = x.shape[-1] if x.dim() else 0
    if depth == 0 or not all(_takes(product, x, depth) for product in parallel):
        return None
    if len({product[3] for product in parallel}) > 1 or (added is not None and steps.pre is None):
        return None
    width = sum(weight.shape[0] for weight in steps.first[0])
    if steps.second is not None and not _takes(steps.second, x, width):
        return None
    prepared = _prepared(x, added, steps, keep_normed)
    if prepared is None:
        return None
    y = _products(prepared.codes, parallel, x.dtype)
    if y is not None and steps.second is not None:
        codes = _codes_between(y, width, steps, SCHEMES[steps.second[3]])
        y = None if codes is None else _products(codes, [steps.second], x.dtype)
    if y is None:
        return None
    kept = [values for values, keep in ((prepared.total, keep_sum), (prepared.values, keep_normed)) if keep]
    if any(values is None for values in kept):
        return None
    return *(values.view(x.shape) for values in kept if values is not None), y.view(
        *x.shape[:-1], y.shape[-1]
    )


def described(steps: Steps) -> Described:
    """Return what steps are beside their tensors, and their tensors."""
    products = [product for product in (steps.first, steps.gate, steps.second) if product is not None]
    kind, weight, bias, epsilon = steps.pre or (None, None, None, 0.0)
    names = [(product[3], len(product[0])) for product in products]
    what = (kind, epsilon, steps.act, steps.gate is None, steps.second is None, *names)
    return what, [weight, bias, *(tensor for product in products for part in product[:3] for tensor in part)]


def _takes(product: Product, x: Tensor, depth: int) -> bool:
    layers = zip(*product[:3], strict=True)
    return all(weight.shape[1] == depth and fits(x, weight, scale, bias) for weight, scale, bias in layers)


def _prepared(x: Tensor, added: Tensor | None, steps: Steps, keep: bool) -> Prepared | None:
    """Return codes of the tokens, or of the norm of them and what is added."""
    scheme = SCHEMES[steps.first[3]]
    rows = _rows(x)
    if steps.pre is None:
        return None if keep else Prepared(quantize(rows, scheme), None, None)
    return norm_quantize(rows, steps.pre, scheme, None if added is None else _rows(added), keep=keep)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _codes_between(y: Tensor, width: int, steps: Steps, scheme: ActivationScheme) -> Codes | None:
    """Return codes of what the outputs of the first products become."""
    if steps.gate is not None:
        found = gate_quantize(y[:, :width], y[:, width:], steps.act, scheme)
    elif steps.act is not None:
        found = act_quantize(y, steps.act, scheme)
    else:
        return quantize(y, scheme)
    return None if found is None else found.codes


def _products(codes: Codes, products: Sequence[Product], dtype: torch.dtype) -> Tensor | None:
    """Return the outputs [M, N] of some products of the same codes, side by side; None where one has no kernel."""
    layers = [layer for product in products for layer in zip(*product[:3], strict=True)]
    sizes = [weight.shape[0] for weight, _, _ in layers]
    out = torch.empty(codes.planes.shape[1], sum(sizes), dtype=dtype, device=codes.planes.device)
    for (weight, scale, bias), own in zip(layers, out.split(sizes, 1), strict=True):
        if multiply(codes, weight, scale, bias, dtype, own) is None:
            return None
    return out
