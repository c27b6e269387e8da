"""Launches for rows of the table of products, without data: what is compiled for a device that is not here."""

import torch

from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.features import Features
from mono_quant.kernels.gpu.products import Call, call_of
from mono_quant.kernels.gpu.tables import Row, choose


def largest_product(
    row: Row,
    most: tuple[int, int, int],
    features: Features,
    dtype: torch.dtype,
    *,
    group: int = 0,
    missing: int = 0,
    has_bias: bool = True,
    device: str = "meta",
) -> Call | None:
    """Return the launch for the largest product that a row covers, or None where the device has no kernel for it.

    Args:
        row: of the table.
        most: tokens, outputs and K that stand for what the row leaves open.
        features: of the device.
        dtype: of bias and outputs.
        group: values of a token that share a scale; 0 for all of them.
        missing: K is less by so much.
        has_bias: whether there is one.
        device: where tensors are made, with what memory holds there.
    """
    rows, outputs = min(row.rows, most[0]), min(row.outputs, most[1]) // 16 * 16
    depth = min(row.depth, most[2]) - missing
    config = choose(rows, outputs, depth, row.planes, group, features)
    if config is None:
        return None

    def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    groups = -(-depth // group) if group else 1
    codes = Codes(empty(row.planes, rows, depth, of=torch.int8), empty(groups, rows), group)
    weight, scale = empty(outputs, depth, of=torch.int8), empty(outputs, 1)
    bias = empty(outputs, of=dtype) if has_bias else None
    return call_of(config, codes, weight, scale, bias, empty(rows, outputs, of=dtype), features.overlap)
