"""Stacking tensors that have no data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MetaStack(TorchFunctionMode):
    """While it is active, `torch.stack` of alike tensors on meta makes one of their shape.

    torch does it in Python, with several checks for each of them: a model with 15,000 experts waits for nothing else as long.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch."""
        if func is torch.stack and "out" not in (kwargs or {}):
            made = _stacked(*args, **(kwargs or {}))
            if made is not None:
                return made
        return func(*args, **(kwargs or {}))


def _stacked(tensors: Any, dim: int = 0) -> Tensor | None:
    """Return the result; None where torch has to say what it is."""
    if not isinstance(tensors, (list, tuple)) or not tensors or type(tensors[0]) is not Tensor:
        return None
    first = tensors[0]
    shape, dtype = first.shape, first.dtype
    if not -len(shape) - 1 <= dim <= len(shape):
        return None
    if not all(type(t) is Tensor and t.is_meta and t.dtype is dtype and t.shape == shape for t in tensors):
        return None
    place = dim % (len(shape) + 1)
    return torch.empty((*shape[:place], len(tensors), *shape[place:]), dtype=dtype, device="meta")
