"""Layers of a skeleton that become int8 as a loader fills them, so that a float weight goes as soon as its codes are there.

Until its weights have come, a layer is the float one that its class made, with an eye on what is put into it: a loader sees
the names, shapes and dtypes of the float model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mono_quant.convert.contract import Decisions, Outcome, Progress, Task
from mono_quant.convert.int8 import encode, encode_weight, outcome_of, put_int8_, record
from mono_quant.convert.stored import StoredModule
from mono_quant.convert.surgery import disable_float_fast_paths_, relink_
from mono_quant.errors import CorruptCheckpointError
from mono_quant.kernels.weights import RowCodes
from mono_quant.planning.rows import Converted
from mono_quant.planning.rules import Layer
from mono_quant.planning.walk import module_aliases

# The mark that transformers gives what a checkpoint has filled, and nothing else.
FILLED = "_is_hf_initialized"


class Arrival:
    """The layers that a loader's weights turn into int8.

    Attributes:
        names: of the weights, in the model that is filled.
        floats: dtype of tensors that get another one than the skeleton's, by name in that model.

    Args:
        task: of a skeleton that is built like the model that will be filled, or that has such a part, the one to be converted; every
            tensor in the dtype that it will have.
        decisions: by layer name.
        progress: called as (layer name, done, total) when a layer has become int8.
    """

    def __init__(self, task: Task, decisions: Decisions, progress: Progress) -> None:
        self._within = f"{task.within}." if task.within else ""
        self.names = frozenset(
            f"{self._own(d.layer.name)}.{weight}".lstrip(".")
            for d in decisions.values()
            if d.quantize
            for weight in d.layer.matrices
        )
        self.floats = {self._own(name): dtype for name, dtype in task.floats.items()}
        self._task, self._decisions, self._progress = task, decisions, progress
        self._chosen = {d.layer.name: d.layer for d in decisions.values() if d.quantize}
        self._waiting: dict[str, nn.Module] = {}
        self._codes: dict[str, dict[str, RowCodes]] = {}
        self._done: dict[str, Converted] = {}
        self._replaced: dict[nn.Module, nn.Module] = {}
        self._aliases: Mapping[int, tuple[str, ...]] = {}

    def __deepcopy__(self, memo: object) -> "Arrival":
        # transformers copies the configs that carry it
        return self

    def _own(self, name: str) -> str:
        """Return the name that something has in the model that is filled."""
        return name.removeprefix(self._within)

    def await_(self, model: nn.Module) -> None:
        """Keep an eye on the chosen layers of a skeleton that is about to be filled."""
        self._model = model
        self._aliases = module_aliases(model)
        for layer in self._chosen.values():
            module = self._waiting[layer.name] = model.get_submodule(self._own(layer.name))
            for owner, weights in _owners(module, layer):
                owner.__class__ = _watched(type(owner), self, layer, weights)

    def finish_(self) -> None:
        """Convert the layers that no checkpoint has filled, once the loader has made weights for them, and tie up loose ends."""
        for name, module in list(self._waiting.items()):
            layer = self._chosen[name]
            _unwatch_(module, layer)
            self._put_(layer, module, encode(module, layer))
        relink_(self._model, self._replaced)
        disable_float_fast_paths_(self._model)
        # the classes that watched know this object, and live until the next collection
        del self._model
        self._replaced.clear()

    def outcome(self) -> Outcome:
        """Return what became of the tensors of the model."""
        return outcome_of(self._task, self._decisions, self._done)

    def take_(self, layer: Layer, name: str, param: nn.Parameter) -> None:
        """Encode a weight that has come; with the last one, the layer becomes int8.

        Raises:
            CorruptCheckpointError: it has another shape than its layer.
            NonFiniteWeightError: it holds NaN or infinity.
        """
        module = self._waiting[layer.name]
        expected = module.get_parameter(name).shape
        if param.shape != expected:
            raise CorruptCheckpointError(
                f"{layer.name}.{name} is {tuple(param.shape)} in the checkpoint and {tuple(expected)} by its config; they do "
                f"not belong together"
            )
        codes = self._codes.setdefault(layer.name, {})
        codes[name] = encode_weight(param.detach(), layer, name)
        if codes.keys() == set(layer.matrices):
            _unwatch_(module, layer)
            self._put_(layer, module, self._codes.pop(layer.name))

    def _put_(self, layer: Layer, module: nn.Module, encoded: dict[str, RowCodes]) -> None:
        del self._waiting[layer.name]
        self._progress(layer.name, len(self._replaced), len(self._chosen))
        record(module, layer, encoded, self._done)
        names = (self._own(layer.name), *self._aliases[id(module)])
        made = self._replaced[module] = put_int8_(self._model, names, module, layer.kind, encoded)
        for name, parameter in made.named_parameters():
            if name in encoded or name.removesuffix("_scale") in encoded:
                # some classes initialise whatever parameter has a certain name
                setattr(parameter, FILLED, True)


def _owners(module: nn.Module, layer: Layer) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """Yield the modules that hold the weights of a layer, each with its own names of them and theirs in the layer."""
    owners: dict[str, dict[str, str]] = {}
    for weight in layer.matrices:
        path, _, own = weight.rpartition(".")
        owners.setdefault(path, {})[own] = weight
    for path, weights in owners.items():
        yield module.get_submodule(path), weights


def _watched(cls: type[nn.Module], arrival: Arrival, layer: Layer, weights: Mapping[str, str]) -> type[Any]:
    """Return a class like `cls` that hands the weights put into it to `arrival`."""

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name in weights and param is not None and getattr(param, FILLED, False):
            arrival.take_(layer, weights[name], param)
        else:
            cls.register_parameter(self, name, param)

    own = {"register_parameter": register_parameter, "_plain": cls, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), own)


def _unwatch_(module: nn.Module, layer: Layer) -> None:
    for owner, _ in _owners(module, layer):
        owner.__class__ = type(owner)._plain  # type: ignore[attr-defined]


def unfilled(model: nn.Module) -> list[str]:
    """Return the names of the parameters that a loader had nothing for, outside of converted layers."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if not isinstance(module, StoredModule)
        for name, parameter in module.named_parameters(recurse=False)
        if not getattr(parameter, FILLED, False)
    ]


def unfinite(tensors: Mapping[str, torch.Tensor], sources: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the names in the model of tensors that are made of a tensor of a checkpoint with NaN or infinity in it.

    Args:
        tensors: of the checkpoint; each is read once, alone.
        sources: the names in the checkpoint that a tensor is made of, by its name in the model.
    """
    users: dict[str, list[str]] = {}
    for name, keys in sources.items():
        for key in keys:
            users.setdefault(key, []).append(name)
    for key, names in users.items():
        if not _is_finite(tensors[key]):
            yield from names


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # the extremes need no copy of a large table, and NaN is both
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
