"""Copying a model without its weights, putting modules in the place of others, and putting everything back."""

import copy
import dis
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from mono_quant.convert.snapshot import ATOMS, Snapshot, holds_attributes
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import UnsupportedModelError
from mono_quant.planning.kinds import weights_of
from mono_quant.planning.walk import tensor_names

_HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook"))
)


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy a model without copying its weights: new modules and Parameters on the same memory.

    Raises:
        UnsupportedModelError: something in the model cannot be copied.
    """
    _refuse_closures(model)
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


def _refuse_closures(model: nn.Module) -> None:
    """Refuse a function in place of a forward that closes over the model: in a copy it would run the original."""
    own = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        if any(True for _ in module.children()) and _closes_over(vars(module).get("forward"), own):
            raise UnsupportedModelError(
                f"{name or type(model).__name__} has a forward of its own (a function, or what torch.compile made of one) that "
                f"runs the original, also in a copy; take it off (del model.forward) and use model.compile(), or convert it "
                f"where it is with inplace=True"
            )


def _closes_over(function: Any, own: Container[int]) -> bool:
    """Tell whether a function holds one of the modules, or a method of one, where a copy does not reach."""
    waiting, seen = [function], set[int]()
    while waiting:
        thing = waiting.pop()
        if not isinstance(thing, FunctionType) or id(thing) in seen:
            continue
        seen.add(id(thing))
        names = thing.__globals__
        loaded = {i.argval for i in dis.get_instructions(thing) if i.opname == "LOAD_GLOBAL"}
        held = [names[name] for name in loaded & names.keys()]
        for cell in thing.__closure__ or ():
            # an empty one is of a name that has no value yet
            with suppress(ValueError):
                held.append(cell.cell_contents)
        if any(id(x) in own or (isinstance(x, MethodType) and id(x.__self__) in own) for x in held):
            return True
        waiting += held
    return False


def _computed(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what hooks (weight norm, pruning) keep as attributes: results of autograd, which cannot be deep-copied."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value


def own_memory_(model: nn.Module, original: nn.Module | None) -> None:
    """Give every parameter of `model` contiguous memory, and its own where it shares it with `original`.

    A saved tensor comes back contiguous, and products may differ in their last bit with the strides.
    """
    shared = {p.data_ptr() for p in original.parameters() if p.numel()} if original is not None else set()
    for parameter in model.parameters():
        if parameter.numel() and parameter.data_ptr() in shared:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        elif parameter.is_floating_point():
            parameter.data = parameter.data.contiguous()


def recast_(model: nn.Module, floats: Mapping[str, torch.dtype]) -> None:
    """Give tensors of a model another float dtype, by name."""
    for name, tensor, _ in tensor_names(model):
        if floats.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(floats[name])


@contextmanager
def rollback(model: nn.Module) -> Iterator[None]:
    """Put modules, tensors, attributes and hooks of `model` back when the block fails."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


def clash(old: nn.Module, cls: Any) -> str:
    """Return why a layer of the class `cls` cannot take over the attributes of `old`; empty when it can."""
    tensors = {"_float", "_shapes", "activations", *(f"{weight}_scale" for weight in weights_of(old))}
    # the projection of an attention is replaced with it
    held = {n for m in (old, *old.children()) if m is old or isinstance(m, nn.Linear) for n in vars(m)}
    names = sorted(n for n in held - cls.replaces if n in tensors or _is_code(getattr(cls, n, None)))
    return (
        f"it has attributes of its own ({', '.join(names)}) with names that its new form uses"
        if names
        else ""
    )


def _is_code(value: object) -> bool:
    return callable(value) or isinstance(value, property)


def put_(model: nn.Module, names: Iterable[str], old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names, with all that users and libraries hang on one."""
    _hand_over_(old, new)
    for name in names:
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._modules[last] = new


def relink_(model: nn.Module, replaced: Mapping[Any, Any]) -> None:
    """Let lists and attributes that hold a replaced module, a method of it, or a replaced tensor, hold the new one.

    A forward that goes through them would compute with the old layers.

    Args:
        model: in which the new modules are in their places already.
        replaced: the new module or tensor by the old one.
    """
    waiting: list[Any] = [model] if replaced else []
    seen: dict[int, Any] = {}
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, (*ATOMS, torch.Tensor)) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, dict):
            for key, value in list(dict.items(thing)):
                new = _renewed(value, replaced)
                if new is not value:
                    dict.__setitem__(thing, key, new)
            waiting += dict.values(thing)
        elif isinstance(thing, (list, deque)):
            for i, value in enumerate(thing):
                new = _renewed(value, replaced)
                if new is not value:
                    thing[i] = new
            waiting += thing
        elif isinstance(thing, set):
            if any(isinstance(value, nn.Module) and value in replaced for value in thing):
                renewed = [_renewed(value, replaced) for value in thing]
                thing.clear()
                thing.update(renewed)
            waiting += thing
        elif isinstance(thing, (tuple, frozenset)):
            waiting += thing
        if holds_attributes(thing):
            waiting.append(getattr(thing, "__dict__", None))


def _renewed(value: Any, replaced: Mapping[Any, Any]) -> Any:
    """Return what takes the place of a value: of a module or tensor, a method of one, or a tuple with such; or itself."""
    if isinstance(value, (nn.Module, torch.Tensor)):
        return replaced.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return getattr(replaced.get(value.__self__), value.__func__.__name__, value)
    if isinstance(value, tuple):
        items = [_renewed(item, replaced) for item in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            make = getattr(type(value), "_make", type(value))
            return make(items)
    return value


def _hand_over_(old: nn.Module, new: nn.Module) -> None:
    """Give a new module the hooks, the training flag and the plain attributes of an old one, and its tensors their tags."""
    new.train(old.training)
    for name in _HOOKS:
        vars(new)[name] = vars(old)[name]
    hooks: dict[int, Any] = new._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if hook.with_module:
            # it knows by itself, weakly, which module it belongs to
            hooks[key] = type(hook)(hook.hook, new)
    replaces = new.replaces if isinstance(new, StoredModule) else frozenset()
    for name, value in vars(old).items():
        if name not in vars(new) and not hasattr(type(new), name) and name not in replaces:
            vars(new)[name] = value
    for name, parameter in old._parameters.items():
        held = new._parameters.get(name)
        if parameter is not None and held is not None:
            vars(held).update(vars(parameter))
    for name, module in new.named_children():
        if module is not old._modules.get(name):
            _hand_over_(old.get_submodule(name), module)


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
