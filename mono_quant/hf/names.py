"""How a checkpoint calls the tensors of a transformers model: renamed, merged or split on the way into it."""

import re
from collections.abc import Callable, Mapping

from torch import nn

from mono_quant.convert.stored import StoredModule
from mono_quant.errors import CorruptCheckpointError


def check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], subject: str) -> list[str]:
    """Compare a skeleton with the headers of a checkpoint, before a weight is read.

    Args:
        model: on meta.
        shapes: of the checkpoint's tensors, by name.
        subject: what to call the checkpoint in errors.

    Returns:
        Names of tensors that belong to no layer of the model.

    Raises:
        CorruptCheckpointError: a tensor has another shape than the model's.
    """
    rename = renamer(model)
    state = model.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left, wrong = [], []
    for key, shape in shapes.items():
        name, merged = rename(key)
        if name not in state:
            left += [] if any(re.search(pattern, name) for pattern in ignored) else [key]
        elif not merged and tuple(state[name].shape) != tuple(shape):
            wrong.append(f"{key} is {tuple(shape)} and should be {tuple(state[name].shape)}")
    if wrong:
        raise CorruptCheckpointError(
            f"{subject}: {len(wrong)} tensors have another shape than config.json says: {'; '.join(wrong[:3])}"
        )
    return left


def standard_obstacle(model: nn.Module) -> str:
    """Return why transformers cannot load int8 linear layers of this model by itself; empty when it can."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for module in model.modules():
        matrices = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()]
        if "Experts" in type(module).__name__ and not isinstance(module, StoredModule) and matrices:
            return f"{type(module).__name__} stays in float, which compressed-tensors cannot load beside int8 layers"
    targets = [
        target
        for conversion in get_model_conversion_mapping(model)
        if isinstance(conversion, WeightConverter)
        for target in conversion.target_patterns
    ]
    other = [target for target in targets if not target.endswith(("gate_up_proj", "down_proj"))]
    return (
        f"transformers builds {other[0]} from several tensors, which it does not do for int8" if other else ""
    )


def renamer(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """Return what turns a checkpoint name into the model's name, and says whether several tensors become one there."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix

    def rename(key: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        return name, pattern is not None

    return rename


def split_names(model: nn.Module, name: str) -> list[str]:
    """Return all names in the model that one tensor of the checkpoint is split into; `name` is one of them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for conversion in get_model_conversion_mapping(model):
        targets = conversion.target_patterns if isinstance(conversion, WeightConverter) else []
        own = next((target for target in targets if name.endswith(target)), None)
        if own is not None:
            return [name.removesuffix(own) + target for target in targets]
    return [name]
