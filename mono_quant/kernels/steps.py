"""What a chain is made of."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# Weights int8 [N_i, K], their scales fp32 [N_i, 1], biases float [N_i] or None, and an activation scheme: several weights are
# one product, their outputs side by side.
Product: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], str]
# "layer" or "rms", weight [N] or None, bias [N] or None, epsilon.
Norm: TypeAlias = tuple[str, Tensor | None, Tensor | None, float]


class Steps(NamedTuple):
    """What `fused.chain` does to a tensor, but for what is added and normed at the end."""

    first: Product
    pre: Norm | None = None
    act: str | None = None
    gate: Product | None = None
    second: Product | None = None


def is_wider(weight: Tensor, x: Tensor) -> bool:
    """Say whether a weight is fp32 where the values that it belongs to are in half precision."""
    return weight.dtype is torch.float32 and x.dtype is not torch.float32
