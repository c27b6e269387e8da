"""Tokens as codes: what a quantizing kernel leaves and a product reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of M tokens of K values.

    Attributes:
        planes: int8 [P, M, K], contiguous. One plane of codes, or for 12 bits two of digits: code = 64 * high + low.
        scale: fp32 [G, M]: of each group and token, so that a tile of tokens reads them side by side.
        group: consecutive values along K that share a scale; 0 for all of a token, where G is 1.
    """

    planes: Tensor
    scale: Tensor
    group: int
