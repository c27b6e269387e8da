"""Which float dtype each tensor of a transformers model has: in the file, and when transformers loads it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.planning.layers import declared_float32


def loaded_dtypes(skeleton: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype that transformers gives each float tensor of a model when it loads the model in `dtype`.

    Most have `dtype`; others are made in one of their own, or declared to need float32.

    Args:
        skeleton: on meta, built in `dtype`.
        dtype: that is asked for.
    """
    declared = declared_float32(skeleton, dtype)
    return {n: torch.float32 if n in declared else tensor.dtype for n, tensor in _floats(skeleton).items()}


def take_dtypes_(skeleton: nn.Module, dtype: torch.dtype, stored: Mapping[str, torch.dtype]) -> None:
    """Give every float tensor of a skeleton the dtype in which a checkpoint holds it.

    Args:
        skeleton: on meta, of a model whose config says which dtype it was built in.
        dtype: of most of the checkpoint, and of what it has no floats for.
        stored: dtypes of what a checkpoint has, by name in the model.
    """
    built = built_dtype(skeleton)
    for name, tensor in _floats(skeleton).items():
        held = stored.get(name)
        if held is not None and held.is_floating_point:
            tensor.data = tensor.data.to(held)
        elif tensor.dtype == built:
            tensor.data = tensor.data.to(dtype)


def built_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a transformers model says it was built in; float32 where it says none."""
    config: Any = model.config
    return config.dtype or torch.float32


def _floats(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
