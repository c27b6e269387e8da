"""The product of codes and int8 weights: the choice by shape, and the launch of one kernel that gives finished outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.features import features_of
from mono_quant.kernels.gpu.few import multiply_few, multiply_vectors
from mono_quant.kernels.gpu.large import multiply_tiles
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.tables import ALIGNMENT, DESCRIPTORS, FEW, POINTERS, VECTORS, Config, choose

# Tiles below each other that are computed before those beside them.
_BAND = 8


@dataclass(frozen=True, slots=True)
class Call:
    """What `launch` needs for one product."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int

    def run(self, device: torch.device) -> None:
        """Start it on the current stream of `device`."""
        launch(
            self.kernel,
            self.grid,
            self.args,
            self.constants,
            device=device,
            warps=self.warps,
            stages=self.stages,
            overlap=self.constants["OVERLAP"],
        )


def multiply(
    codes: Codes,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor | None:
    """Return the product of M tokens with a linear layer, with the bits of `reference.linear`.

    Args:
        codes: of M tokens of K values.
        weight: int8 [N, K]. One whose rows do not lie one after the other is copied, at each call: our layers have none.
        weight_scale: fp32 [N, 1].
        bias: float [N] or None.
        dtype: of the result: fp32, fp16 or bf16.
        out: `dtype` [M, N] to be written, whose rows may be further apart than N; a new tensor if None.

    Returns:
        `dtype` [M, N]. None, with nothing written, where Triton has no instructions for it: without `Features.int8_dot`,
        for more than a few tokens.
    """
    planes, rows, depth = codes.planes.shape
    outputs = weight.shape[0]
    weight = weight.contiguous()
    features = features_of(weight.device)
    aligned = (codes.planes.data_ptr() | weight.data_ptr()) % ALIGNMENT == 0
    group = codes.group if codes.scale.shape[0] > 1 else 0
    config = choose(rows, outputs, depth, planes, group, features, aligned)
    if config is None:
        return None
    if out is None:
        out = codes.planes.new_empty((rows, outputs), dtype=dtype)
    if rows and outputs:
        call_of(config, codes, weight, weight_scale, bias, out, features.overlap).run(weight.device)
    return out


def call_of(
    config: Config,
    codes: Codes,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    overlap: bool = False,
) -> Call:
    """Return the launch that computes a product as `config` says.

    Args:
        config: its depth is the group of the codes, where they have several.
        codes: of M tokens, M > 0.
        weight: int8 [N, K], N > 0, contiguous.
        weight_scale: fp32 [N, 1].
        bias: float [N] or None.
        out: [M, N], to be written.
        overlap: let it start before the kernel in front of it has ended.
    """
    bias = None if bias is None else bias.contiguous()
    epilogue = (codes.scale, weight_scale.contiguous(), bias, out)
    return _CALLS[config.kernel](config, codes, weight, epilogue, {"OVERLAP": overlap})


_Epilogue = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _vectors(
    config: Config, codes: Codes, weight: Tensor, epilogue: _Epilogue, constants: dict[str, Any]
) -> Call:
    planes, rows, depth = codes.planes.shape
    words = config.depth // 4
    constants |= {"M": rows, "PLANES": planes, "OUTPUTS": config.outputs, "WORDS": words}
    constants["STAGES"] = config.stages
    packed = (codes.planes.view(torch.int32), weight.view(torch.int32))
    args = (*packed, *epilogue, weight.shape[0], depth // 4, epilogue[-1].stride(0))
    grid = (triton.cdiv(weight.shape[0], config.outputs),)
    return Call(multiply_vectors, grid, args, constants, config.warps, config.stages)


def _few(
    config: Config, codes: Codes, weight: Tensor, epilogue: _Epilogue, constants: dict[str, Any]
) -> Call:
    constants |= _tile(config, codes) | {"SPLIT": config.split}
    args = (codes.planes, weight, *epilogue, *_sizes(codes, weight, epilogue[-1]))
    grid = (triton.cdiv(weight.shape[0], config.outputs),)
    return Call(multiply_few, grid, args, constants, config.warps, config.stages)


def _tiles(
    config: Config, codes: Codes, weight: Tensor, epilogue: _Epilogue, constants: dict[str, Any]
) -> Call:
    planes, rows, depth = codes.planes.shape
    is_described = config.kernel == DESCRIPTORS
    constants |= _tile(config, codes) | {"BAND": _BAND, "DESCRIPTORS": is_described}
    operands: tuple[Any, ...] = (codes.planes, weight)
    if is_described:
        # beyond the end of K a descriptor reads zeros
        constants["WHOLE"] = True
        tokens = codes.planes.view(planes * rows, depth)
        operands = (
            TensorDescriptor.from_tensor(tokens, [config.tokens, config.depth]),
            TensorDescriptor.from_tensor(weight, [config.outputs, config.depth]),
        )
    args = (*operands, *epilogue, *_sizes(codes, weight, epilogue[-1]))
    grid = (triton.cdiv(rows, config.tokens) * triton.cdiv(weight.shape[0], config.outputs),)
    return Call(multiply_tiles, grid, args, constants, config.warps, config.stages)


_CALLS: dict[str, Callable[..., Call]] = {
    VECTORS: _vectors,
    FEW: _few,
    POINTERS: _tiles,
    DESCRIPTORS: _tiles,
}


def _tile(config: Config, codes: Codes) -> dict[str, Any]:
    planes, _, depth = codes.planes.shape
    return {
        "PLANES": planes,
        "GROUPED": codes.scale.shape[0] > 1,
        "TOKENS": config.tokens,
        "OUTPUTS": config.outputs,
        "DEPTH": config.depth,
        "WHOLE": depth % (config.split * config.depth) == 0,
    }


def _sizes(codes: Codes, weight: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """Return M, N, K and the distance of output rows."""
    _, rows, depth = codes.planes.shape
    return rows, weight.shape[0], depth, out.stride(0)
