"""What a chain is made of."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

# Weights int8 [N_i, K], their scales fp32 [N_i, 1], biases float [N_i] or None, and an activation scheme: several weights are
# one product, their outputs side by side.
Product: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], str]
# "layer" or "rms", weight [N] or None, bias [N] or None, epsilon.
Norm: TypeAlias = tuple[str, Tensor | None, Tensor | None, float]

ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class Steps(NamedTuple):
    """What `fused.chain` does to a tensor, but for what is added and normed at the end."""

    first: Product
    pre: Norm | None = None
    act: str | None = None
    gate: Product | None = None
    second: Product | None = None


def check_act(name: str | None, *, needed: bool = False) -> None:
    """Refuse an activation that is none of ours, and none at all where one is `needed`.

    Raises:
        ValueError: there is no such activation.
    """
    if name not in ACTS or (needed and name is None):
        known = [repr(act) for act in ACTS if act is not None or not needed]
        raise ValueError(f"unknown activation {name!r}; choose from {', '.join(known)}")


def is_wider(weight: Tensor, x: Tensor) -> bool:
    """Say whether a weight is fp32 where the values that it belongs to are in half precision."""
    return weight.dtype is torch.float32 and x.dtype is not torch.float32
