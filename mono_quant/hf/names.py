"""How a checkpoint calls the tensors of a transformers model: renamed, merged or split on the way into it.

transformers' mapping is read once for a whole checkpoint, and its own operations run, on tensors without data where names
and shapes are enough: what comes out where is never guessed from names.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mono_quant.convert.stored import StoredModule
from mono_quant.hf.making import Recipe
from mono_quant.hf.stacking import MetaStack

SCALE = "_scale"

# Operations of transformers after which rows are still rows, in whatever order: saving brings back theirs, and that of their scales.
_ROWWISE = {
    "MergeModulelist",
    "SplitModulelist",
    "Concatenate",
    "Chunk",
    "Split",
    "Interleave",
    "PermuteForRope",
}

# What transformers' operations raise for tensors that they cannot merge or split.
_CONVERSION_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


class Described(Protocol):
    """A tensor of which dtype and shape are known, here or still in its file."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a checkpoint go in a model.

    Attributes:
        tensors: what arrives, by name in the model.
        recipes: how it is made, by name in the model.
        left: the name that it would have in the model, by checkpoint name of a tensor that has no place there.
        broken: why a tensor cannot be made, by name in the model.
        conversions: transformers' that took part.
        reordered: names in the model of tensors whose rows are no rows in the checkpoint.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    conversions: list[Any] = field(default_factory=list)
    reordered: set[str] = field(default_factory=set)

    @cached_property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """The checkpoint names that a tensor is made of, by name in the model."""
        return {name: recipe.keys for name, recipe in self.recipes.items()}


@dataclass(frozen=True)
class Fit:
    """What keeps a checkpoint from filling a model.

    Attributes:
        left: checkpoint names of tensors that no layer takes.
        missing: names in the model of tensors that nothing fills.
        wrong: what arrives in another shape than the model's, or cannot be made; a sentence each.
        integers: what arrives as something else than floats where the model has floats; a sentence each.
        placed: what arrives, and from where.
    """

    left: list[str]
    missing: list[str]
    wrong: list[str]
    integers: list[str]
    placed: Placement

    def problem(self, name: str) -> str:
        """Return what keeps a checkpoint from filling a class of that name; empty when nothing does."""
        if self.wrong:
            return f"{len(self.wrong)} tensors have another shape than config.json says: {'; '.join(self.wrong[:3])}"
        if self.missing:
            return f"{len(self.missing)} weights of {name} are missing: {grouped(self.missing)}"
        return ""


def on_meta(headers: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, Tensor]:
    """Return tensors without data for the dtypes and shapes of a checkpoint."""
    return {
        name: torch.empty(tuple(shape), dtype=dtype, device="meta")
        for name, (dtype, shape) in headers.items()
    }


def floats_of(tensors: Mapping[str, Described], codes: Iterable[str]) -> dict[str, Tensor]:
    """Return the floats that a checkpoint stands for, without data: codes as such, and no scales."""
    found = set(codes)
    scales = {f"{name}{SCALE}" for name in found}
    return {
        name: torch.empty(t.shape, dtype=torch.float32 if name in found else t.dtype, device="meta")
        for name, t in tensors.items()
        if name not in scales
    }


def place(model: Any, tensors: Mapping[str, Tensor], codes: Iterable[str] | None = None) -> Placement:
    """Do what transformers' loader does with a checkpoint.

    Args:
        model: a transformers model on any device; in float, or with int8 layers where there are codes.
        tensors: of the checkpoint by name; without scales where the model is in float.
        codes: names of its int8 codes, whose scales go the way of their codes; None without scales.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    mapping = _mapping(model)
    mapping = mapping if codes is None else scales_follow(mapping, codes, tensors)
    renamings, converters = _split(mapping)
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    placed = Placement()
    gathered: dict[str, list[tuple[str, str]]] = defaultdict(list)
    # sorted as transformers does it: some renamings depend on the names before
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state or name in placed.tensors or (pattern is None and name in gathered):
            placed.left[key] = name
        elif pattern is None:
            placed.tensors[name], placed.recipes[name] = tensors[key], Recipe(name, ((key, ""),))
        else:
            gathered[name].append((key, pattern))
    with MetaStack():
        for name, parts in gathered.items():
            # the conversion of the first, as transformers has it
            _convert(model, Recipe(name, tuple(parts), by_pattern[parts[0][1]]), tensors, placed, state)
    placed.conversions.extend(conversion for conversion in mapping if conversion.was_used())
    return placed


def _mapping(model: Any) -> list[Any]:
    """Return what transformers does to the names and tensors of a checkpoint of a model's class."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def _split(mapping: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the renamings and the conversions of a mapping."""
    from transformers.core_model_loading import WeightConverter

    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    return [m for m in mapping if not isinstance(m, WeightConverter)], converters


def _convert(
    model: Any, recipe: Recipe, tensors: Mapping[str, Tensor], placed: Placement, state: Mapping[str, Tensor]
) -> None:
    try:
        made = recipe.make(model, tensors)
    except _CONVERSION_ERRORS as e:
        placed.broken[recipe.name] = f"it cannot be made of {_some(recipe.keys)} ({e})"
        return
    keeps_rows = all(type(operation).__name__ in _ROWWISE for operation in recipe.conversion.operations)
    for target, value in made.items():
        placed.reordered.update(() if keeps_rows else (target,))
        if target in state:
            placed.tensors[target], placed.recipes[target] = value, recipe
        else:
            placed.broken[target] = (
                f"{type(model).__name__} has no such tensor to be made of {_some(recipe.keys)}"
            )


def fit(model: Any, tensors: Mapping[str, Tensor]) -> Fit:
    """Hold a checkpoint against a model, as transformers' loader does.

    Args:
        model: a transformers model in float, on meta.
        tensors: of the checkpoint by name, without scales of int8 codes; on meta.
    """
    placed = place(model, tensors)
    state, sources = model.state_dict(keep_vars=True), placed.sources
    # a tied tensor has several names, of which a checkpoint holds one
    present = {id(state[name]) for name in [*placed.tensors, *placed.broken] if name in state}
    absent = [name for name, tensor in state.items() if id(tensor) not in present]
    missing = _unless(absent, getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    needless = _unless(placed.left.values(), _needless(model))
    left = [key for key, name in placed.left.items() if name in needless]
    wrong = [f"{name}: {problem}" for name, problem in placed.broken.items()]
    integers = []
    for name, tensor in placed.tensors.items():
        what, shape = _made(name, sources[name]), tuple(state[name].shape)
        if tuple(tensor.shape) != shape:
            wrong.append(f"{what} is {tuple(tensor.shape)} and should be {shape}")
        elif state[name].is_floating_point() and not tensor.is_floating_point():
            integers.append(f"{what} is {tensor.dtype}")
    return Fit(left, missing, wrong, integers, placed)


def _needless(model: Any) -> list[str]:
    """Return patterns of tensors that may be left over, as transformers has them."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _unless(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _made(name: str, sources: Sequence[str]) -> str:
    return name if tuple(sources) == (name,) else f"{name} (of {_some(sources)})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def grouped(names: Sequence[str]) -> str:
    """List names; of many, those below one numbered layer as one."""
    if len(names) <= 8:
        return ", ".join(names)
    groups = dict.fromkeys(re.sub(r"^(.*\.\d+)\..*$", r"\1.*", name) for name in names)
    return ", ".join(list(groups)[:8]) + (" ..." if len(groups) > 8 else "")


def scales_follow(conversions: Iterable[Any], codes: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return transformers' conversions such that the scales of int8 codes go the way of their codes.

    Rows stay rows in all of them: what merges, splits or reorders the rows of a matrix does the same to its scales. A
    pattern may end inside the name of a weight or behind it; for a scale it sees the name of the codes.

    Args:
        conversions: of a model.
        codes: names of the int8 codes where the conversions begin.
        names: of all tensors there.
    """
    scales = {f"{name}{SCALE}" for name in codes}
    # parameters of the model itself may be called so, too
    others = {name for name in names if name.endswith(SCALE)} - scales
    classes: dict[type[Any], type[Any]] = {}
    followed = []
    for conversion in conversions:
        plain = plain_class(conversion)
        twin = copy.copy(conversion)
        twin.__class__ = classes.setdefault(plain, _following(plain, others))
        followed.append(twin)
    return followed


def plain_class(conversion: Any) -> type[Any]:
    """Return the class that transformers gave a conversion."""
    return getattr(type(conversion), "plain", type(conversion))


def _following(plain: type[Any], others: set[str]) -> type[Any]:
    def rename_source_key(self: Any, source_key: str) -> tuple[str, str | None]:
        if source_key.endswith(SCALE) and source_key not in others:
            name, pattern = plain.rename_source_key(self, source_key.removesuffix(SCALE))
            return f"{name}{SCALE}", pattern
        name, pattern = plain.rename_source_key(self, source_key)
        if name.endswith(SCALE):
            others.add(name)
        return name, pattern

    def convert(self: Any, layer_name: str, model: Any = None, **options: Any) -> Any:
        return plain.convert(self, layer_name, model=_Held(model), **options)

    # no slots of its own: an object of the plain class can change into it
    own = {"__slots__": (), "rename_source_key": rename_source_key, "convert": convert, "plain": plain}
    return type(plain.__name__, (plain,), own)


class _Held:
    """A model whose `get_parameter` gives what a layer holds; reading `weight` of an int8 layer gives floats."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor | None:
        module, _, last = name.rpartition(".")
        return dict(self._model.get_submodule(module).named_parameters(recurse=False)).get(last)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def unmergeable(conversions: Sequence[Any], state: Mapping[str, Tensor]) -> set[str]:
    """Name the tensors that a file cannot hold merged: a partner has another dtype, is not there, or could not be cut off again.

    Args:
        conversions: of a model, in the direction of loading.
        state: its tensors by name.
    """
    from transformers.core_model_loading import Chunk, WeightConverter

    converters = [c for c in conversions[::-1] if isinstance(c, WeightConverter)]
    backwards = [converter.reverse_transform() for converter in converters]
    groups: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for name in state:
        for count, backward in enumerate(backwards):
            merged, pattern = backward.rename_source_key(name)
            if pattern is not None:
                groups[count, merged][name] = pattern
                break
    apart: set[str] = set()
    for (count, _), parts in groups.items():
        is_whole = set(parts.values()) == set(backwards[count].source_patterns)
        is_even = any(isinstance(operation, Chunk) for operation in converters[count].operations)
        kinds = {(state[name].dtype, state[name].shape if is_even else None) for name in parts}
        if not is_whole or len(kinds) > 1:
            apart |= parts.keys()
    return apart


def standard_obstacle(model: nn.Module) -> str:
    """Return why transformers cannot load int8 linear layers of this model by itself; empty when it can."""
    for module in model.modules():
        matrices = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()]
        if "Experts" in type(module).__name__ and not isinstance(module, StoredModule) and matrices:
            return f"{type(module).__name__} stays in float, which compressed-tensors cannot load beside int8 layers"
    targets = [target for converter in _split(_mapping(model))[1] for target in converter.target_patterns]
    other = [target for target in targets if not target.endswith(("gate_up_proj", "down_proj"))]
    return (
        f"transformers builds {other[0]} from several tensors, which it does not do for int8" if other else ""
    )
