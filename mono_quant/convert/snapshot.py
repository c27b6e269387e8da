"""What objects hold, and putting it back: attributes, containers, the memory of tensors, the state of generators."""

import argparse
import random
import sys
import types
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

# What cannot change, and what is not the holder's own: code, and whatever it closes over.
ATOMS = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
)
# Of the standard library only what is meant to hold data: a logger, a lock or a pool has a life of its own.
_DATA = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList)


class Snapshot:
    """Everything that can be reached from some objects through attributes and containers, as it is now.

    Of a tensor it knows which memory it has, not the values in it; see `untouched` for those.

    Attributes:
        tensors: all that were reached and have memory of their own.
    """

    def __init__(self, *roots: Any) -> None:
        self.tensors: list[Tensor] = []
        self._undo: list[Callable[[], object]] = []
        # the objects themselves are held, so that none can get the id of another meanwhile
        self._seen: dict[int, Any] = {}
        waiting: list[Any] = list(roots)
        while waiting:
            thing = waiting.pop()
            if not isinstance(thing, ATOMS) and id(thing) not in self._seen:
                self._seen[id(thing)] = thing
                waiting += self._take(thing)

    def restore(self) -> None:
        """Put everything back; what did not change is left alone."""
        for undo in self._undo:
            undo()

    def _take(self, thing: Any) -> list[Any]:
        """Note what one object holds, and return what to look at next."""
        inside: list[Any] = []
        if isinstance(thing, Tensor):
            grad = thing.grad if thing.is_leaf else None
            if has_memory(thing):
                self.tensors.append(thing)
                self._undo.append(partial(_restore_tensor, thing, thing.detach(), thing.requires_grad, grad))
            inside = [grad]
        elif isinstance(thing, dict):
            inside = list(dict.values(thing))
            keys = tuple(_base_of(thing).keys(thing)) if inside else ()
            self._undo.append(
                partial(_restore_dict, thing, keys, tuple(_base_of(thing).values(thing)) if inside else ())
            )
        elif isinstance(thing, (list, set, deque)):
            inside = list(thing)
            self._undo.append(partial(_restore_items, thing, tuple(inside)))
        elif isinstance(thing, (tuple, frozenset)):
            inside = list(thing)
        else:
            self._undo += _undo_state(thing)
        if holds_attributes(thing):
            inside.append(getattr(thing, "__dict__", None))
            names = _slots(type(thing))
            slots = {name: getattr(thing, name) for name in names if hasattr(thing, name)}
            if names:
                self._undo.append(partial(_restore_slots, thing, slots))
                inside += slots.values()
        return inside


def holds_attributes(thing: Any) -> bool:
    """Tell whether the attributes of a thing are data."""
    library = type(thing).__module__.partition(".")[0]
    return isinstance(thing, _DATA) or library not in sys.stdlib_module_names


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor has one piece of memory; sparse ones and some subclasses are made of several tensors."""
    return tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells whether a tensor has the memory that it had: address, dtype, device, shape and strides."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _restore_tensor(tensor: Tensor, memory: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if place(tensor) != place(memory):
        tensor.data = memory
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    if tensor.is_leaf and tensor.grad is not grad:
        tensor.grad = grad


def _slots(cls: type) -> tuple[str, ...]:
    """Return the names that objects of a class written in Python keep outside their `__dict__`."""
    found = [] if issubclass(cls, (Tensor, torch.nn.Module)) else [vars(c) for c in cls.__mro__]
    return tuple(
        name
        for own in found
        if "__slots__" in own
        for name, value in own.items()
        if isinstance(value, types.MemberDescriptorType)
    )


def _restore_slots(thing: Any, slots: dict[str, Any]) -> None:
    for name in _slots(type(thing)):
        if name in slots:
            # not `setattr`: a frozen dataclass refuses it
            if getattr(thing, name, None) is not slots[name]:
                object.__setattr__(thing, name, slots[name])
        elif hasattr(thing, name):
            object.__delattr__(thing, name)


def _base_of(held: dict[Any, Any]) -> Any:
    # its methods are called: subclasses (the outputs of transformers) refuse some of them
    return OrderedDict if isinstance(held, OrderedDict) else dict


def _restore_dict(held: dict[Any, Any], keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    base = _base_of(held)
    if not (_same(base.keys(held), keys) and _same(base.values(held), values)):
        base.clear(held)
        for key, value in zip(keys, values, strict=True):
            base.__setitem__(held, key, value)


def _restore_items(held: Any, items: tuple[Any, ...]) -> None:
    if not _same(held, items):
        held.clear()
        (held.update if isinstance(held, set) else held.extend)(items)


def _same(now: Collection[Any], before: tuple[Any, ...]) -> bool:
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _undo_state(thing: Any) -> list[Callable[[], object]]:
    """Return how to put back what objects of a few known kinds keep where no attribute shows it."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return [lambda: thing.set_state(state)]
    if isinstance(thing, random.Random):
        number = thing.getstate()
        return [lambda: thing.setstate(number)]
    if isinstance(thing, bytearray):
        content = bytes(thing)
        return [lambda: thing.__setitem__(slice(None), content)]
    library, name = type(thing).__module__.partition(".")[0], type(thing).__name__
    if library == "numpy":
        return _undo_numpy(thing)
    # a fast tokenizer keeps the padding and truncation of its last call
    return _undo_tokenizer(thing) if (library, name) == ("tokenizers", "Tokenizer") else []


def _undo_numpy(thing: Any) -> list[Callable[[], object]]:
    np: Any = sys.modules["numpy"]
    if isinstance(thing, np.random.Generator):
        state = thing.bit_generator.state
        return [lambda: setattr(thing.bit_generator, "state", state)]
    if isinstance(thing, np.random.RandomState):
        legacy = thing.get_state()
        return [lambda: thing.set_state(legacy)]
    if isinstance(thing, np.ndarray) and thing.flags.writeable:
        values = thing.copy()
        return [lambda: np.copyto(thing, values)]
    return []


def _undo_tokenizer(tokenizer: Any) -> list[Callable[[], object]]:
    truncation, padding = tokenizer.truncation, tokenizer.padding

    def undo() -> None:
        tokenizer.no_truncation() if truncation is None else tokenizer.enable_truncation(**truncation)
        tokenizer.no_padding() if padding is None else tokenizer.enable_padding(**padding)

    return [undo]
