"""The tensors of a model, made of those of a checkpoint when they are asked for: as they are, merged or split."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mono_quant.io.tensors.checkpoint import memory_of


class Stored(Protocol):
    """The tensors of a checkpoint by name, still in their files."""

    def __getitem__(self, name: str, /) -> Tensor:
        """Read one."""

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of one along its first dimension."""


@dataclass(frozen=True)
class Recipe:
    """How tensors of a model are made of those of a checkpoint.

    Attributes:
        name: in the model, of the tensor or of the first of several.
        parts: the names in the checkpoint, each with the pattern of the conversion that it belongs to.
        conversion: of transformers; None where a tensor is taken as it is.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    conversion: Any = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The names in the checkpoint, sorted."""
        return tuple(sorted({key for key, _ in self.parts}))

    def make(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is made, by name in the model; whatever transformers raises where it cannot be.

        Args:
            model: a transformers model.
            tensors: by name in the checkpoint.
        """
        if self.conversion is None:
            return {self.name: tensors[self.parts[0][0]]}
        converter = copy.deepcopy(self.conversion)
        for key, pattern in self.parts:
            converter.add_tensor(self.name, key, pattern, tensors[key])
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def is_stack(self) -> bool:
        """Tell whether each part of the tensor along its first dimension is made of one tensor per pattern: merged experts."""
        names = [type(operation).__name__ for operation in getattr(self.conversion, "operations", ())]
        if names not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            return False
        first, *then = self.conversion.operations
        return first.dim == 0 and all(operation.dim > 0 for operation in then)

    def part(self, index: int) -> "Recipe":
        """Return how one part of a stack is made."""
        found: dict[str, list[str]] = {}
        for key, pattern in self.parts:
            found.setdefault(pattern, []).append(key)
        parts = tuple((keys[index], pattern) for pattern, keys in found.items())
        return Recipe(self.name, parts, self.conversion)


class Made:
    """The tensors of a model by name, made of those of a checkpoint; each is read anew when it is asked for.

    Args:
        model: a transformers model, on any device, which conversions look at; not one that asks here for its own parameters.
            Another one where no recipe has a conversion.
        recipes: by name in the model.
        tensors: of the checkpoint.
        shapes: of what is made, by name in the model.
    """

    def __init__(
        self, model: Any, recipes: Mapping[str, Recipe], tensors: Stored, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        self._model, self._recipes, self._tensors, self._shapes = model, recipes, tensors, shapes

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __getitem__(self, name: str) -> Tensor:
        """Make one tensor.

        Raises:
            KeyError: there is no such tensor.
            MonoQuantError: it cannot be read.
        """
        recipe = self._recipes[name]
        if recipe.is_stack():
            # one part after the other: transformers would hold all of them beside the whole
            return self.part(name, 0, self._shapes[name][0])
        return self._made(recipe, name)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Make a part of one tensor along its first dimension; see `Stored`."""
        recipe = self._recipes[name]
        if recipe.conversion is None:
            return self._tensors.part(recipe.parts[0][0], start, stop)
        if not recipe.is_stack():
            return self._made(recipe, name)[start:stop]
        parts = (self._made(recipe.part(index), name) for index in range(start, stop))
        return _stacked(parts, stop - start, name)

    def is_cheap_in_parts(self, name: str) -> bool:
        """Tell whether `part` reads no more than it returns."""
        recipe = self._recipes[name]
        return recipe.conversion is None or recipe.is_stack()

    def is_same(self, a: str, b: str) -> bool:
        """Tell whether two names are made of the same tensors in the same way."""
        return self._recipes[a].conversion is None and self._recipes[a].parts == self._recipes[b].parts

    def _made(self, recipe: Recipe, name: str) -> Tensor:
        read = {key: self._tensors[key] for key in recipe.keys}
        return recipe.make(self._model, read)[name]


def _stacked(parts: Iterator[Tensor], count: int, name: str) -> Tensor:
    """Put parts [1, ...] into one tensor, each as it comes."""
    first = next(parts)
    if count == 1:
        return first
    whole = memory_of(count * first.nbytes, name).view(first.dtype).reshape(count, *first.shape[1:])
    whole[0] = first[0]
    del first
    for index, part in enumerate(parts, 1):
        whole[index] = part[0]
    return whole
