"""A model's tensors under the names that a checkpoint has for them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert.int8_layers import narrow_scales, tensors_of
from mono_quant.hf.models import quiet
from mono_quant.hf.names import SCALE, scales_follow, unmergeable
from mono_quant.planning.walk import memory_of


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Give the weights of a model, for the block, the values that they would have if it had been loaded and not run yet.

    RWKV divides some of them when it is first run for inference, and notes that in an attribute that no file holds.
    """
    divided: list[Any] = [m for m in model.modules() if getattr(m, "layers_are_rescaled", False) is True]
    flags = [module.training for module in divided]
    for module in divided:
        # multiplies by the same powers of two
        module.training = True
        module._rescale_layers()  # noqa: SLF001
    try:
        yield
    finally:
        for module, training in zip(divided, flags, strict=True):
            module.training = False
            module._rescale_layers()  # noqa: SLF001
            module.training = training


def checkpoint_state(model: nn.Module, halves: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """Return the model's tensors under their checkpoint names: ties once, merged and split as its checkpoints are.

    int8 codes have the shape of the float weight they stand for, with scales beside them, one per row, in its dtype; see
    `narrow_scales`. Tensors that a checkpoint has as one, but that cannot be merged and split again here, keep the names they
    have in the model.

    Args:
        model: a transformers model.
        halves: dtype of tensors to return in half precision, by name in the model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = tensors_of(model)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        if target in state and origin in state and memory_of(state[target]) == memory_of(state[origin]):
            del state[target]
    state = {name: tensor.to((halves or {}).get(name, tensor.dtype)) for name, tensor in state.items()}
    codes = [name for name, t in state.items() if t.dtype == torch.int8 and f"{name}{SCALE}" in state]
    conversions = scales_follow(_conversions(model), codes, state)
    apart = unmergeable(conversions, state)
    twin = copy.copy(model)
    twin.__dict__["_weight_conversions"] = conversions
    with quiet():
        reverted = revert_weight_conversion(twin, {n: t for n, t in state.items() if n not in apart})
    # at last, so that scales which are merged have one dtype
    return narrow_scales(model, _with_columns({**reverted, **{name: state[name] for name in apart}}))


def _with_columns(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give scales their last dimension back, which is one: some releases of transformers lose it where they split experts."""
    for name, codes in state.items():
        scale = state.get(f"{name}{SCALE}") if codes.dtype == torch.int8 else None
        if scale is not None and codes.dim() == 2 and scale.dim() == 1:
            state[f"{name}{SCALE}"] = scale.unsqueeze(-1)
    return state


def _conversions(model: nn.Module) -> list[Any]:
    """Return the conversions that a model was loaded with, or those of its class."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    known = get_model_conversion_mapping(model, add_legacy=False)
    # nobody knows whether a checkpoint would have the prefix; transformers leaves it out, too
    return [conversion for conversion in known if not isinstance(conversion, PrefixChange)]
