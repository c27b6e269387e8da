"""A model's tensors under the names that a checkpoint has for them."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mono_quant.hf.models import quiet
from mono_quant.hf.quantizer import classes


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


def checkpoint_state(model: nn.Module, halves: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the model's tensors under their checkpoint names: ties once, fused experts one by one.

    int8 codes have the shape of the float weight they stand for; scales are fp32 [N, 1].

    Args:
        model: a transformers model.
        halves: names in the model of tensors to return as float16.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        if target in state and origin in state and _same_memory(state[target], state[origin]):
            del state[target]
    state = {name: tensor.half() if name in halves else tensor for name, tensor in state.items()}
    with quiet():
        reverted = dict(revert_weight_conversion(_with_scale_conversions(model), state))
    return _with_renamed_scales(state, reverted)


def _with_renamed_scales(state: Mapping[str, Tensor], reverted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give scales the name of their codes where transformers renamed the codes alone."""
    now = {id(tensor): name for name, tensor in reverted.items()}
    for name, codes in state.items():
        new = now.get(id(codes))
        if f"{name}_scale" in state and new not in (None, name) and f"{name}_scale" in reverted:
            reverted[f"{new}_scale"] = reverted.pop(f"{name}_scale")
    return reverted


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _with_scale_conversions(model: nn.Module) -> nn.Module:
    """Return a shallow twin of `model` whose conversions also split fused scales."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    plain = [c for c in conversions if not all(t.endswith("_scale") for t in c.target_patterns)]
    config_class, quantizer_class, _ = classes()
    twin = copy.copy(model)
    twin.__dict__["_weight_conversions"] = quantizer_class(config_class()).update_weight_conversions(
        plain, model
    )
    return twin
