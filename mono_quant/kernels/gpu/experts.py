"""Gated experts as a handful of kernels whose shapes do not depend on the routing, so that a CUDA graph can hold them.

Tokens become codes once, whatever number of experts they go to; their outputs are added in one order, without atomics. With few
tokens each pair of token and expert reads its weights by itself; with more, pairs are sorted by expert, on the device.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.features import Features, features_of
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.pointwise import ACTS
from mono_quant.kernels.gpu.quantize import quantize, quantize_values
from mono_quant.kernels.gpu.routed import add_routed, multiply_routed_tiles, multiply_routed_vectors
from mono_quant.kernels.gpu.tables import ALIGNMENT, POINTERS, VECTORS, Config, fitted
from mono_quant.kernels.inputs import FLOATS

# So many may read weights by themselves. One was measured on an H200 (gpu.md), the others were not.
FEW_TOKENS = 4
# By the mean number of tokens of an expert that has some. Measured on an H200, at 256 tokens and one plane: the last alone.
_TILES = (
    (16, Config(POINTERS, 16, 128, 128, 4, 4)),
    (32, Config(POINTERS, 32, 128, 128, 4, 4)),
    (64, Config(POINTERS, 64, 128, 128, 4, 4)),
    (128, Config(POINTERS, 128, 128, 128, 8, 4)),
)
_LARGE = Config(POINTERS, 128, 256, 128, 8, 3)
# Two sums for each output, or one of floats beside that of integers: half the tile. Not measured.
_LARGE_DOUBLE = Config(POINTERS, 128, 128, 128, 8, 4)
_VECTORS = Config(VECTORS, 1, 8, 1024, 4, 3)
# A step is a group then, which is short: more outputs, so that each thread still loads 16 bytes. Not measured.
_GROUPED_VECTORS = Config(VECTORS, 1, 32, 128, 4, 3)
# Values of a sum that one program computes.
_WIDE = 1024
# A dimension that Triton reduces is not shorter.
_NARROWEST = 16


@dataclass(frozen=True, slots=True)
class Routing:
    """Which token goes where: pairs of a token and a slot, token by token.

    Attributes:
        index: int [T, k], contiguous; numbers outside [0, E) mark empty slots.
        share: float [T, k], contiguous: what the outputs are weighted by.
        experts: E.
        order: int [T * k], the pairs in the order of their experts; None where each is computed by itself.
        start: int [E + 1], where in that order the pairs of each expert begin; or None.
    """

    index: Tensor
    share: Tensor
    experts: int
    order: Tensor | None = None
    start: Tensor | None = None


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    act: str,
    scheme: ActivationScheme,
) -> Tensor | None:
    """Mix the outputs of gated experts, in the order of `mix_experts`; from its bits the activation's alone may differ.

    Args:
        x: [T, H].
        top_k_index: integer [T, k]; numbers outside [0, E) mark empty slots.
        top_k_weights: [T, k].
        gate_up: int8 [E, 2I, H].
        gate_up_scale: fp32 [E, 2I, 1].
        down: int8 [E, H, I].
        down_scale: fp32 [E, H, 1].
        act: of the gate, one of `ACTS`.
        scheme: how tokens become codes.

    Returns:
        [T, H] in the dtype of `x`, or None where these kernels have no answer: other activations and dtypes, weights that do
        not lie row after row or elsewhere, many tokens where no tensor core multiplies int8.
    """
    weights = (gate_up, gate_up_scale, down, down_scale)
    if act not in ACTS or x.dtype not in FLOATS or top_k_weights.dtype not in FLOATS:
        return None
    if not all(weight.is_contiguous() and weight.numel() for weight in weights):
        return None
    if any(given.device != x.device or given.is_neg() for given in (x, top_k_index, top_k_weights, *weights)):
        return None
    if top_k_index.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    features = features_of(x.device)
    alone = reads_alone(x.shape[0], gate_up, down, features)
    if not alone and not features.int8_dot:
        return None
    index, share = top_k_index.contiguous(), top_k_weights.contiguous()
    routing = Routing(index, share, gate_up.shape[0])
    if not alone:
        routing = sort_pairs(routing)
    return mix(x, routing, gate_up, gate_up_scale, down, down_scale, act, scheme)


def reads_alone(tokens: int, gate_up: Tensor, down: Tensor, features: Features) -> bool:
    """Say whether each pair of token and expert reads the weights by itself."""
    if tokens > FEW_TOKENS or not features.dp4a:
        return False
    return all(w.shape[2] % ALIGNMENT == 0 and w.data_ptr() % ALIGNMENT == 0 for w in (gate_up, down))


def sort_pairs(routing: Routing) -> Routing:
    """Return a routing with its pairs in the order of their experts."""
    numbers = routing.index.view(-1).to(torch.int32)
    experts, order = torch.sort(numbers, stable=True)
    every = torch.arange(routing.experts + 1, dtype=torch.int32, device=numbers.device)
    # pairs without an expert lie before the first and behind the last
    start = torch.searchsorted(experts, every)
    return Routing(routing.index, routing.share, routing.experts, order, start)


def mix(
    x: Tensor,
    routing: Routing,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    act: str,
    scheme: ActivationScheme,
) -> Tensor:
    """Mix experts by kernels, pair by pair or sorted as `routing` has it; see `experts`."""
    inner = down.shape[2]
    hidden = multiply_pairs(quantize(x, scheme), routing, gate_up, gate_up_scale, x.dtype, tokens=True)
    codes, _ = quantize_values(hidden[:, :inner], hidden[:, inner:], act, scheme)
    y = multiply_pairs(codes, routing, down, down_scale, x.dtype, tokens=False)
    return add_pairs(y, routing)


def multiply_pairs(
    codes: Codes, routing: Routing, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, *, tokens: bool
) -> Tensor:
    """Return the product of each pair with the weight of its expert; what lies in rows of pairs without one is undefined.

    Args:
        codes: of tokens [T, K], or of pairs [T * k, K] in the order in which those of tokens gave them.
        routing: of the pairs.
        weight: int8 [E, N, K].
        weight_scale: fp32 [E, N, 1].
        dtype: of the result.
        tokens: codes are of tokens.

    Returns:
        `dtype` [T * k, N]: sorted as `routing` is where codes are of tokens, otherwise in the order of pairs.
    """
    out = codes.planes.new_empty((routing.index.numel(), weight.shape[1]), dtype=dtype)
    if routing.order is None:
        _launch_vectors(codes, routing, weight, weight_scale, out, tokens)
    else:
        _launch_tiles(codes, routing, weight, weight_scale, out, tokens)
    return out


def config_for(pairs: int, experts: int, codes: Codes, features: Features) -> Config:
    """Return the tiles for a product of sorted pairs."""
    planes, grouped = codes.planes.shape[0], codes.scale.shape[0] > 1
    mean = triton.cdiv(pairs, min(pairs, experts))
    large = _LARGE_DOUBLE if planes == 2 or grouped else _LARGE
    config = next((config for tokens, config in _TILES if mean <= tokens), large)
    step = codes.group if grouped else config.depth
    config = Config(POINTERS, config.tokens, config.outputs, step, config.warps, config.stages)
    return fitted(config, planes, features.shared)


def tiles_at_most(pairs: int, experts: int, tokens: int) -> int:
    """Return how many tiles of so many tokens there may be, whatever the routing is: an expert's last need not be full."""
    return (pairs + min(pairs, experts) * (tokens - 1)) // tokens


def _launch_tiles(
    codes: Codes, routing: Routing, weight: Tensor, weight_scale: Tensor, out: Tensor, tokens: bool
) -> None:
    planes, rows, depth = codes.planes.shape
    pairs, outputs = out.shape
    config = config_for(pairs, routing.experts, codes, features_of(out.device))
    grid = (
        tiles_at_most(pairs, routing.experts, config.tokens),
        triton.cdiv(outputs, config.outputs),
    )
    launch(
        multiply_routed_tiles,
        grid,
        (codes.planes, codes.scale, routing.order, routing.start, weight, weight_scale, out, rows, outputs, depth, routing.experts),
        {
            "SLOTS": routing.index.shape[1] if tokens else 0,
            "PLANES": planes,
            "GROUPED": codes.scale.shape[0] > 1,
            "EXPERTS": _power(routing.experts),
            "TOKENS": config.tokens,
            "OUTPUTS": config.outputs,
            "DEPTH": config.depth,
            "WHOLE": depth % config.depth == 0,
        },
        device=out.device,
        warps=config.warps,
        stages=config.stages,
    )  # fmt: skip


def _launch_vectors(
    codes: Codes, routing: Routing, weight: Tensor, weight_scale: Tensor, out: Tensor, tokens: bool
) -> None:
    planes, rows, depth = codes.planes.shape
    pairs, outputs = out.shape
    grouped = codes.scale.shape[0] > 1
    config = _GROUPED_VECTORS if grouped else _VECTORS
    packed, weights = codes.planes.view(torch.int32), weight.view(torch.int32)
    launch(
        multiply_routed_vectors,
        (pairs, triton.cdiv(outputs, config.outputs)),
        (packed, codes.scale, routing.index, weights, weight_scale, out, rows, outputs, depth // 4, routing.experts),
        {
            "SLOTS": routing.index.shape[1] if tokens else 1,
            "PLANES": planes,
            "GROUPED": grouped,
            "OUTPUTS": config.outputs,
            "WORDS": (codes.group if grouped else config.depth) // 4,
            "STAGES": config.stages,
        },
        device=out.device,
        warps=config.warps,
        stages=config.stages,
    )  # fmt: skip


def add_pairs(y: Tensor, routing: Routing) -> Tensor:
    """Return the sums of the weighted outputs [T * k, N] of each token: [T, N]."""
    tokens, slots = routing.index.shape
    out = y.new_empty((tokens, y.shape[1]))
    launch(
        add_routed,
        (tokens, triton.cdiv(y.shape[1], _WIDE)),
        (y, routing.index, routing.share, out, y.shape[1], routing.experts),
        {"SLOTS": slots, "PLACES": _power(slots), "WIDE": _WIDE},
        device=y.device,
    )
    return out


def _power(length: int) -> int:
    return max(_NARROWEST, triton.next_power_of_2(length))
