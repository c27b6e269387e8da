"""The experts of a layer: token by token in one order, whoever computes them, and all of them as one call.

`mix_experts` is the definition. `int8_experts` is one `torch.library` op where a compiler or a mode looks: which experts get
tokens depends on the data, so that nothing else could be part of a whole graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.kernels import paths
from mono_quant.kernels.accelerators import path_of
from mono_quant.kernels.activations import AUTO, check_activations
from mono_quant.kernels.choice import scheme_of
from mono_quant.kernels.inputs import check_codes
from mono_quant.kernels.steps import ACTS, check_act
from mono_quant.kernels.transforms import is_transformed
from mono_quant.kernels.watching import is_followed, is_watched, wants_gradient

_LAYER = "an int8 layer of experts"


def mix_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    num_experts: int,
    expert: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Mix the outputs of experts.

    A token's outputs are added in the order of their experts; each is weighted and rounded to the dtype of the result before,
    and so is each sum.

    Args:
        hidden_states: float [T, H].
        top_k_index: integer [T, k], the experts of each token; a number that no expert has marks an empty slot.
        top_k_weights: float [T, k].
        num_experts: how many there are.
        expert: takes tokens [N, H] and the number of their expert, and returns [N, H].

    Returns:
        [T, H] in the dtype of `hidden_states`.
    """
    out = torch.zeros_like(hidden_states)
    for number in range(num_experts):
        token, slot = torch.where(top_k_index == number)
        if token.numel() == 0:
            continue
        y = expert(hidden_states[token], number) * top_k_weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def has_experts(hidden_states: Tensor, top_k_weights: Tensor) -> bool:
    """Say whether `int8_experts` takes this call: the device has kernels for it, or a compiler or a mode looks that can take an op.

    Gradients and the transforms of `torch.func` go through the products one by one.
    """
    if wants_gradient(hidden_states, top_k_weights) or is_transformed():
        return False
    return is_watched() or hidden_states.is_meta or path_of(hidden_states) is not None


def int8_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    act: str,
    activations: str = AUTO,
) -> Tensor:
    """Mix the outputs of gated experts with int8 weights, as `mix_experts` does.

    Args:
        hidden_states: fp32, fp16 or bf16 [T, H].
        top_k_index: integer [T, k].
        top_k_weights: float [T, k].
        gate_up: int8 [E, 2I, H], the rows of the gate above those of what it gates.
        gate_up_scale: fp32 [E, 2I, 1].
        down: int8 [E, H, I].
        down_scale: fp32 [E, H, 1].
        act: of the gate; "gelu", "gelu_tanh", "silu" or "relu".
        activations: how tokens become codes, one of `ACTIVATIONS`.

    Returns:
        [T, H] in the dtype of `hidden_states`.

    Raises:
        InputError: the shapes do not go together.
        FrozenWeightError: a weight is not int8.
        ValueError: there is no such activation or activation scheme.
    """
    args = (hidden_states, top_k_index, top_k_weights, gate_up, gate_up_scale, down, down_scale)
    if type(hidden_states) is Tensor and not hidden_states.is_meta and not is_followed():
        return _mixed(*args, act, activations)
    out: Tensor = torch.ops.mono_quant.int8_experts(*args, act, activations)
    return out


def _mixed(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    act: str,
    activations: str,
) -> Tensor:
    _check(hidden_states, top_k_index, top_k_weights, gate_up, down, act, activations)
    args = (hidden_states, top_k_index, top_k_weights, gate_up, gate_up_scale, down, down_scale)
    device = path_of(hidden_states)
    out = None if device is None else device.experts(*args, act, scheme_of(activations, hidden_states))
    return by_products(*args, act, activations) if out is None else out


def by_products(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    act: str,
    activations: str,
) -> Tensor:
    """Mix experts by one product after another; see `int8_experts`."""
    run = ACTS[act]

    def expert(x: Tensor, number: int) -> Tensor:
        both = paths.linear(x, gate_up[number], gate_up_scale[number], None, activations)
        gate, up = both.chunk(2, dim=-1)
        return paths.linear(run(gate) * up, down[number], down_scale[number], None, activations)

    return mix_experts(hidden_states, top_k_index, top_k_weights, gate_up.shape[0], expert)


@torch.library.custom_op("mono_quant::int8_experts", mutates_args=())
def _experts_op(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    act: str,
    activations: str = AUTO,
) -> Tensor:
    weights = (gate_up, gate_up_scale, down, down_scale)
    out = _mixed(hidden_states, top_k_index, top_k_weights, *weights, act, activations)
    # one layout for every input, as the fake tensor has it
    return out.contiguous()


@_experts_op.register_fake
def _experts_fake(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    act: str,
    activations: str = AUTO,
) -> Tensor:
    _check(hidden_states, top_k_index, top_k_weights, gate_up, down, act, activations)
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _check(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str, activations: str
) -> None:
    check_activations(activations)
    check_act(act, needed=True)
    check_codes(gate_up, _LAYER)
    check_codes(down, _LAYER)
    experts, hidden, inner = down.shape
    routed = (
        x.dim() == 2 and index.dim() == 2 and index.shape == weights.shape and index.shape[0] == x.shape[0]
    )
    if not routed or x.shape[1] != hidden or gate_up.shape != (experts, 2 * inner, hidden):
        raise InputError(
            f"{_LAYER} takes tokens [T, H], experts and weights [T, k] and codes [E, 2I, H] and [E, H, I], not {tuple(x.shape)}, "
            f"{tuple(index.shape)}, {tuple(weights.shape)}, {tuple(gate_up.shape)} and {tuple(down.shape)}; route each token to as "
            f"many experts as it has weights"
        )
