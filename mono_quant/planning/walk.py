"""Walking over the modules and tensors of a model, shared ones included."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mono_quant.planning.kinds import weights_of


def weight_owners(model: nn.Module) -> dict[str, str]:
    """Return for every float parameter that could be int8 the name of its layer."""
    return {
        f"{name}.{weight}".lstrip("."): name
        for name, module in model.named_modules()
        for weight in weights_of(module)
    }


def is_transformers_model(model: nn.Module) -> bool:
    """True for a transformers `PreTrainedModel`, without importing transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.")
        for c in type(model).mro()
    )


def is_diffusers_model(model: nn.Module) -> bool:
    """True for a model of diffusers, or a class of somebody's own made from one, without importing diffusers."""
    return any(
        c.__name__ == "ModelMixin" and c.__module__.startswith("diffusers.") for c in type(model).mro()
    )


def own_floats(module: nn.Module) -> dict[str, Tensor]:
    """Return the float parameters and saved float buffers that a module itself owns.

    Those of one byte are not among them: such values are codes, which mean something only with their scale.
    """
    skip = module._non_persistent_buffers_set
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    own |= {n: b for n, b in module.named_buffers(recurse=False) if n not in skip}
    return {n: t for n, t in own.items() if t.is_floating_point() and t.itemsize > 1}


def common_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """Return the floating dtype that most values have; float32 where there are none.

    Args:
        sizes: dtype and number of values of each tensor.
    """
    values: Counter[torch.dtype] = Counter()
    for dtype, size in sizes:
        values[dtype] += size if dtype.is_floating_point else 0
    return max(values, key=lambda dtype: values[dtype]) if values.total() else torch.float32


def below(name: str, within: str) -> bool:
    """Tell whether a module lies in the part of a model that is called `within`; everything does when that is empty."""
    return not within or name == within or name.startswith(f"{within}.")


def module_aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return by id of a module the other names it has."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    return defaultdict(tuple, {key: tuple(found[1:]) for key, found in names.items()})


def owners_of(model: nn.Module) -> dict[int, set[int]]:
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
    return owners


def memory_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """Return what tensors have in common that are the same memory; on meta, where there is none, only one object is itself."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape


def tensor_names(model: nn.Module) -> Iterable[tuple[str, Tensor, bool]]:
    """Yield (name, tensor, is_buffer) for every parameter and persistent buffer, shared ones under every name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, False
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, buffer, True
