"""A weight that is made when it is read: reading works as with any tensor, a write would be lost and is refused."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mono_quant.errors import FrozenWeightError

_GRADIENT = (Tensor.requires_grad.__set__, Tensor.requires_grad_)  # type: ignore[attr-defined]


class ComputedWeight(Tensor):
    """A tensor that others may only read. What is computed from it is a plain tensor; a view of it is like it."""

    # transformers initialises a tensor without this mark: a parent does it to the weights of its children.
    _is_hf_initialized = True
    _plain: Tensor
    _refusal: str
    _made: "tuple[list[Tensor], tuple[Any, ...]]"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` on the plain tensor, and refuse when it writes there."""
        held: list[ComputedWeight] = []
        plain = [_unwrap(value, held) for value in args]
        named = {name: _unwrap(value, held) for name, value in (kwargs or {}).items()}
        if args and isinstance(args[0], cls) and _changes_its_tensor(func, (*args[1:], *named.values())):
            raise FrozenWeightError(args[0]._refusal)
        before = [weight._plain._version for weight in held]
        out = func(*plain, **named)
        for weight, version in zip(held, before, strict=True):
            # whatever way the write came, through `out=`, a list or `inplace=True`
            if weight._plain._version != version:
                raise FrozenWeightError(weight._refusal)
        return _wrap(out, held)


# By the id of what it belongs to.
_ALIVE: WeakValueDictionary[int, ComputedWeight] = WeakValueDictionary()


def computed(value: Tensor, refusal: str) -> Tensor:
    """Return `value` as a tensor that refuses writes.

    Args:
        value: fresh; nobody else holds it.
        refusal: the text of the error.
    """
    # neither keeps track of writes, and there is nothing to write into
    if value.is_inference() or value.is_meta or not value.numel():
        return value
    weight = value.as_subclass(ComputedWeight)
    weight._plain, weight._refusal = value, refusal
    return weight


def read_once(sources: list[Tensor], dtype: torch.dtype, make: Callable[[], Tensor], refusal: str) -> Tensor:
    """Return a computed weight, the same one as long as somebody holds it and what it is made from is the same.

    Libraries ask for a weight many times to learn its device, and compare the memory of two to see whether they are one.

    Args:
        sources: what it is made from, and what it belongs to first.
        dtype: of the weight.
        make: returns its values.
        refusal: the text of the error when it is written into.
    """
    if any(source.is_inference() for source in sources):
        return computed(make(), refusal)
    alive = _ALIVE.get(id(sources[0]))
    if alive is not None and alive._made[1] == _state(sources, dtype, alive._plain):
        return alive
    weight = computed(make(), refusal)
    if isinstance(weight, ComputedWeight):
        # held, so that no other tensor gets their ids
        weight._made = sources, _state(sources, dtype, weight._plain)
        _ALIVE[id(sources[0])] = weight
    return weight


def _state(sources: Iterable[Tensor], dtype: torch.dtype, weight: Tensor) -> tuple[Any, ...]:
    # a write into the weight was refused, but it was made
    return (dtype, weight._version, *((id(t), t._version, t.data_ptr()) for t in sources))


def _changes_its_tensor(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Tell by torch's convention whether a method changes the tensor it is called on, be it the values or a property."""
    if func in _GRADIENT and args == (False,):
        # it takes none as it is
        return False
    name = getattr(func, "__name__", "")
    return name == "__set__" or (name.endswith("_") and not name.endswith("__"))


def _unwrap(value: Any, held: list[ComputedWeight]) -> Any:
    if isinstance(value, ComputedWeight):
        held.append(value)
        return value._plain
    return type(value)(_unwrap(v, held) for v in value) if type(value) in (tuple, list) else value


def _wrap(out: Any, held: Iterable[ComputedWeight]) -> Any:
    if type(out) in (tuple, list):
        return type(out)(_wrap(value, held) for value in out)
    if not isinstance(out, Tensor):
        return out
    for weight in held:
        if out is weight._plain:
            return weight
        if out.layout == torch.strided and _memory(out) == _memory(weight._plain):
            return computed(out, weight._refusal)
    return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
