"""Filling a model with tensors that lie in memory already: none is copied, and what is one stays one."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Put = Callable[[nn.Module, str, nn.Parameter], None]


@dataclass(frozen=True)
class Misfit:
    """What keeps tensors from filling a model, by name.

    Attributes:
        missing: of the model, that nothing fills.
        left: of the tensors, that have no place.
        wrong: of another shape, or no floats where the model has floats.
    """

    missing: list[str]
    left: list[str]
    wrong: list[str]


def misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> Misfit:
    """Hold tensors against a model; a tied tensor has several names, of which one is enough.

    Args:
        model: its int8 codes have the shape of the float weight.
        tensors: by name in the model.
    """
    expected = model.state_dict(keep_vars=True)
    filled = {id(tensor) for name, tensor in expected.items() if name in tensors}
    return Misfit(
        sorted(name for name, tensor in expected.items() if id(tensor) not in filled),
        sorted(tensors.keys() - expected.keys()),
        [name for name in expected if name in tensors and not _fits(tensors[name], expected[name])],
    )


def _fits(given: Tensor, expected: Tensor) -> bool:
    return given.shape == expected.shape and given.is_floating_point() == expected.is_floating_point()


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module._parameters[name] = parameter


def fill_(model: nn.Module, tensors: Mapping[str, Tensor], put: Put = _put) -> None:
    """Put tensors in the place of those of a model, one after the other; both may be on meta.

    Args:
        model: is changed.
        tensors: by name in the model; those that fit, see `misfit`. Each is taken when its turn comes, and not kept.
        put: gives a module a parameter.
    """
    first: dict[int, str] = {}
    expected = model.state_dict(keep_vars=True)
    for name, tensor in expected.items():
        if name in tensors:
            first.setdefault(id(tensor), name)
    names = Counter(id(tensor) for tensor in expected.values())
    shared: dict[int, Tensor] = {}
    for name, old in expected.items():
        if id(old) in shared:
            value = shared[id(old)]
        else:
            value = tensors[name if name in tensors else first[id(old)]]
        owner, _, last = name.rpartition(".")
        holder = model.get_submodule(owner)
        if not old.is_meta and not value.is_meta:
            old.data = value
        elif last in holder._parameters:
            if not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=old.requires_grad)
                vars(value).update(vars(old))
            put(holder, last, value)
        else:
            holder._buffers[last] = value
        if names[id(old)] > 1:
            # one for all names it has, so that ties stay ties
            shared[id(old)] = value
