"""A recurrent int8 layer over all time steps in one native call: products with the last output, and the gates between them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mono_quant.kernels.activations import AUTO
from mono_quant.kernels.choice import active, scheme_on
from mono_quant.kernels.cpu import longs
from mono_quant.kernels.watching import is_plain

# The numbers are part of the C interface.
_CELLS = {"LSTM": 0, "GRU": 1, "RNN_TANH": 2, "RNN_RELU": 3}
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def run_recurrent(
    mode: str,
    given: Tensor,
    sizes: Sequence[int],
    state: Sequence[Tensor],
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activations: str = AUTO,
    backward: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Run one recurrent layer in one direction over time.

    Outputs are quantized per sequence and step before they are multiplied; the gates are fp32 and have the same bits on every
    native path.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        given: fp32 [sum of sizes, G * H], the products of the inputs with their bias, step after step; gates in torch's order.
        sizes: how many sequences each step has, never more than the one before; at least one.
        state: the initial output and, of an LSTM, the initial cells, fp32 [sizes[0], H] each.
        weight: int8 [G * H, H].
        weight_scale: fp32 [G * H, 1].
        bias: float [G * H] or None.
        activations: the scheme, see `activations`.
        backward: run from the last step to the first; sequences that are shorter join at their own last step.

    Returns:
        The outputs fp32 [sum of sizes, H] and the last states; None where the library does not run here, or someone looks at
        the call: a compiler, autograd.
    """
    cpu = active.cpu
    if cpu is None or not is_plain((given, *state, weight_scale, bias)):
        return None
    size = weight.shape[1]
    if weight.dtype is not torch.int8 or not weight.is_cpu or not size or not sizes or min(sizes) < 1:
        return None
    if not _fits(mode, given, sizes, state, weight, weight_scale, bias):
        return None
    fresh = [part.clone(memory_format=torch.contiguous_format) for part in state]
    out = cpu.recurrent(
        _CELLS[mode],
        given.resolve_neg().contiguous(),
        longs(sizes),
        fresh,
        weight.contiguous(),
        weight_scale.resolve_neg().contiguous(),
        None if bias is None else bias.resolve_neg().contiguous(),
        backward,
        scheme_on(activations, True),
    )
    return None if out is None else (out, tuple(fresh))


def _fits(
    mode: str,
    given: Tensor,
    sizes: Sequence[int],
    state: Sequence[Tensor],
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> bool:
    """Say whether all that the library reads is there; what is not is left to torch, which says so."""
    rows, size = weight.shape
    return (
        rows == _GATES[mode] * size
        and given.shape == (sum(sizes), rows)
        and all(later <= before for before, later in pairwise(sizes))
        and len(state) == (2 if mode == "LSTM" else 1)
        and all(part.shape == (sizes[0], size) for part in state)
        and weight_scale.numel() == rows
        and (bias is None or bias.numel() == rows)
    )
