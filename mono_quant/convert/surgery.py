"""Copying a model without its weights, putting modules in the place of others, and putting everything back."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mono_quant.convert.stored import StoredModule
from mono_quant.errors import UnsupportedModelError
from mono_quant.planning.walk import tensor_names

_HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)
_REGISTRIES = (
    "_modules",
    "_buffers",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
)


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy a model without copying its weights: new modules and Parameters on the same memory.

    Raises:
        UnsupportedModelError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        twin = nn.Parameter(parameter.detach(), requires_grad=False)
        twin.requires_grad_(parameter.requires_grad)
        twin.__dict__.update(parameter.__dict__)
        memo[id(parameter)] = twin
    memo |= {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError, copy.Error) as e:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({e}); remove what cannot be copied, or convert it where it is "
            f"with inplace=True"
        ) from e


def _computed(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what hooks (weight norm, pruning) keep as attributes: results of autograd, which cannot be deep-copied."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value


def own_memory_(model: nn.Module, original: nn.Module | None) -> None:
    """Give every float parameter of `model` contiguous memory, and its own where it shares it with `original`.

    A saved tensor comes back contiguous, and products may differ in their last bit with the strides.
    """
    shared = {p.data_ptr() for p in original.parameters() if p.numel()} if original is not None else set()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            if parameter.numel() and parameter.data_ptr() in shared:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            else:
                parameter.data = parameter.data.contiguous()


def recast_(model: nn.Module, floats: Mapping[str, torch.dtype]) -> None:
    """Give tensors of a model another float dtype, by name."""
    for name, tensor, _ in tensor_names(model):
        if floats.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(floats[name])


@contextmanager
def rollback(model: nn.Module) -> Iterator[None]:
    """Put modules, parameter data, buffers and hooks of `model` back when the block fails."""
    modules = [(m, {n: dict(vars(m)[n]) for n in _REGISTRIES}, dict(vars(m))) for m in model.modules()]
    data = [(t, t.data) for t in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        for module, registries, attributes in modules:
            for name in set(vars(module)) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for name, before in registries.items():
                registry = vars(module)[name]
                registry.clear()
                registry.update(before)
        for tensor, values in data:
            tensor.data = values
        raise


def put_(model: nn.Module, names: Iterable[str], old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names, with its training flag and its hooks."""
    new.train(old.training)
    for name in _HOOKS:
        # kept, not dropped: users and libraries rely on them
        vars(new)[name] = vars(old)[name]
    for name in names:
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._modules[last] = new


def disable_float_fast_paths_(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoder` from reading the weights of our layers and computing by itself."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if any(isinstance(m, StoredModule) for m in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0
