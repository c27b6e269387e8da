"""Whether a config makes the very model that is to be saved: its tensors, their shapes and ties, and its layers."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mono_quant.convert.int8_layers import Int8Module
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import CorruptCheckpointError, UnsupportedModelError
from mono_quant.hf.models import model_class, skeleton
from mono_quant.hf.names import SCALE, Fit, fit, floats_of, grouped
from mono_quant.planning.walk import memory_of, weight_owners


@dataclass(frozen=True)
class Differences:
    """How the model that a config makes differs from the one that is there.

    Attributes:
        sentences: what keeps `load` from giving the model back.
        count: how many tensors and layers that concerns.
        ties: what is one tensor in one of them and two in the other; loading leaves both as they are in the file.
        sizes: numbers that the model has, by the number that the config has in their place.
    """

    sentences: list[str]
    count: int
    ties: list[str] = field(default_factory=list)
    sizes: Mapping[int, set[int]] = field(default_factory=dict)


def differences(model: Any, state: Mapping[str, Tensor], raw: Mapping[str, Any]) -> Differences:
    """Build a skeleton as `load` would, and compare it with a model.

    Args:
        model: a converted transformers model.
        state: its tensors by checkpoint name, with the scales of int8 codes.
        raw: the `config.json` beside them.
    """
    name = type(model).__name__
    try:
        cls, config = model_class(raw, Path(name), trust_remote_code=False)
        built: Any = skeleton(cls, config, torch.float32, name)
    except (CorruptCheckpointError, UnsupportedModelError) as e:
        return Differences([str(e)], len(state))
    codes = {n for n, t in state.items() if t.dtype == torch.int8 and f"{n}{SCALE}" in state}
    found = fit(built, floats_of(state, codes))
    others = [
        *_codes_without_layer(built, found, codes),
        *other_layers(model, built, "transformers."),
        *lost_buffers(model, built),
        *shared_codes(model, built),
    ]
    sentences = [*found.wrong, *found.integers, *others]
    if found.left:
        sentences.append(f"{grouped(found.left)} would be left out")
    if found.missing:
        sentences.append(f"{grouped(found.missing)} would be missing")
    count = sum(map(len, (found.wrong, found.integers, found.left, found.missing, others)))
    return Differences(sentences, count, list(_broken_ties(model, built)), _sizes(model, built, found))


def _codes_without_layer(built: nn.Module, found: Fit, codes: set[str]) -> Iterator[str]:
    owners = weight_owners(built)
    for name, sources in found.placed.sources.items():
        if not codes.isdisjoint(sources) and name not in owners:
            yield f"{name} is int8, and the layer there would not be one that can be"


def _broken_ties(model: nn.Module, built: nn.Module) -> Iterator[str]:
    """Name parameters that the config makes one and that differ, or the other way round."""
    own = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.numel()}
    there = dict(built.named_parameters(remove_duplicate=False))
    one: dict[int, str] = {}
    shared: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in own.items():
        if name not in there:
            continue
        first = one.setdefault(id(there[name]), name)
        if not _same(own[first], tensor):
            yield f"{first} and {name} differ, and would be one"
        first = shared.setdefault(memory_of(tensor), name)
        if there[first] is not there[name]:
            yield f"{first} and {name} are one, and would be two"


def _same(a: Tensor, b: Tensor) -> bool:
    if memory_of(a) == memory_of(b):
        return True
    # equal codes may have other scales
    is_equal = a.dtype == b.dtype and a.is_floating_point() and a.shape == b.shape and not a.is_meta
    return is_equal and torch.equal(a, b)


def other_layers(model: nn.Module, built: nn.Module, home: str) -> Iterator[str]:
    """Name layers of another class; those of the library's own files (in `home`) may depend on more than the config."""
    there = dict(built.named_modules())
    for name, module in model.named_modules():
        if name not in there or isinstance(module, StoredModule):
            continue
        own, other = (parametrize.type_before_parametrizations(m) for m in (module, there[name]))
        idle = own is nn.Identity and "Drop" in other.__name__
        if own is not other and not own.__module__.startswith(home) and not idle:
            yield f"{name} is a {own.__name__} and would be a {other.__name__}"


def lost_buffers(model: nn.Module, built: nn.Module) -> Iterator[str]:
    """Name buffers outside the state that the skeleton does not have, so that loading has no place for them."""
    there = {*dict(built.named_buffers()), *model.state_dict()}
    for name, buffer in model.named_buffers():
        if buffer.numel() and name not in there:
            yield f"the buffer {name} would be lost"


def shared_codes(model: nn.Module, built: nn.Module) -> Iterator[str]:
    """Name int8 layers that are one and would be two: float weights may lie in the file twice, codes are counted once."""
    there = dict(built.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Int8Module) and name in there:
            other = first.setdefault(id(module), name)
            if there[other] is not there[name]:
                yield f"{other} and {name} are one int8 layer, and would be two"


def _sizes(model: nn.Module, built: nn.Module, found: Fit) -> dict[int, set[int]]:
    wanted: dict[int, set[int]] = defaultdict(set)
    state = built.state_dict()
    for name, tensor in found.placed.tensors.items():
        for old, new in zip(state[name].shape, tensor.shape, strict=False):
            wanted[old] |= {new} - {old}
    depths = _depths(state)
    for prefix, depth in _depths(model.state_dict()).items():
        old = depths.get(prefix, depth)
        wanted[old] |= {depth} - {old}
    return {old: new for old, new in wanted.items() if new}


def _depths(names: Iterable[str]) -> dict[str, int]:
    """Return how many numbered parts each list of modules has, by its name."""
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for match in re.finditer(r"\.(\d+)(?=\.)", name):
            parts[name[: match.start()]].add(match[1])
    return {prefix: len(numbers) for prefix, numbers in parts.items()}
