"""Models of diffusers: their class, their config, skeletons, and filling them from a checkpoint.

As with transformers, a class is found by its name in the library and nowhere else, built from a config, and filled with tensors
that our own reader has checked; diffusers never opens a file itself. It is imported when a function here is first called.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert.arrival import FILLED, Arrival
from mono_quant.convert.filling import Misfit, fill_, misfit
from mono_quant.convert.int8 import install_
from mono_quant.errors import CorruptCheckpointError, MissingDependencyError, UnsupportedModelError
from mono_quant.hf.configs import BUILD_ERRORS, clean_config
from mono_quant.hf.described import lost_buffers, other_layers, shared_codes
from mono_quant.hf.names import SCALE, grouped
from mono_quant.io.text import one_line
from mono_quant.planning.walk import weight_owners

# What diffusers calls the class of a model in its config.json.
CLASS = "_class_name"
# The file that diffusers looks for; transformers' is called `model`.
STEM = "diffusion_pytorch_model"


def diffusion_class(raw: Mapping[str, Any], folder: Path) -> type[Any]:
    """Return the class that a `config.json` of diffusers names.

    Args:
        raw: the parsed config.
        folder: where it came from, for errors.

    Raises:
        MissingDependencyError: diffusers is not installed.
        UnsupportedModelError: it names no model class of diffusers.
    """
    library = _library(folder)
    name = raw.get(CLASS)
    cls = None
    if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        cls = getattr(library.models, name, None)
    if not isinstance(cls, type) or not issubclass(cls, library.ModelMixin) or cls is library.ModelMixin:
        raise UnsupportedModelError(
            f"{folder}: diffusers {library.__version__} has no model class {name!r}, which {CLASS} of config.json names. Update "
            f"diffusers, or load the model yourself and pass the object"
        )
    return cls


def _library(folder: Path | str) -> Any:
    try:
        import diffusers
    except ImportError as e:
        raise MissingDependencyError(
            f"{folder} is a model of diffusers; install it with: pip install diffusers"
        ) from e
    return diffusers


def builds_itself(model: nn.Module) -> bool:
    """True when `load` finds the class of a diffusers model by its name."""
    return getattr(_library("this").models, type(model).__name__, None) is type(model)


def config_of(model: Any) -> dict[str, Any]:
    """Return what diffusers would write into the `config.json` of a model, without what must not travel."""
    return clean_config(json.loads(model.to_json_string()))[0]


def diffusion_skeleton(cls: type[Any], raw: Mapping[str, Any], subject: str) -> nn.Module:
    """Build a model from its config, with its parameters on meta and the buffers that it computes on the CPU.

    Raises:
        CorruptCheckpointError: the config describes no such model.
    """
    from accelerate import init_empty_weights

    config, _ = clean_config(raw)
    try:
        with _quiet(), init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model: nn.Module = cls.from_config(config)
    except BUILD_ERRORS as e:
        raise CorruptCheckpointError(
            f"{subject}: its config.json describes no {cls.__name__} ({one_line(e, 300)})"
        ) from e
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what diffusers logs about fields of a config that it does not use."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the name in a checkpoint by that in the model: older VAEs name their attention otherwise."""
    found = {name: name for name in names}
    model._fix_state_dict_keys_on_load(found)  # noqa: SLF001
    return found


def fit_diffusion(model: Any, tensors: Mapping[str, Tensor], subject: str) -> list[str]:
    """Hold a checkpoint in float against a skeleton.

    Returns:
        The names of tensors that have no place in the model.

    Raises:
        CorruptCheckpointError: weights are missing, or have other shapes than the config says.
    """
    found = misfit(model, tensors)
    _refuse(model, found, subject)
    return found.left


def _refuse(model: nn.Module, found: Misfit, subject: str) -> None:
    name = type(model).__name__
    if found.wrong or found.missing:
        what = (
            f"{grouped(found.wrong)} have another shape than config.json says, or are no floats"
            if found.wrong
            else f"weights of {name} are missing: {grouped(found.missing)}"
        )
        raise CorruptCheckpointError(
            f"{subject}: {what}. If that is intended, load the model yourself and pass the object"
        )


class _Read(Mapping[str, Tensor]):
    """Tensors of a checkpoint by their names in a model, read when they are asked for, in the dtypes that they get."""

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str], floats: Mapping[str, torch.dtype]
    ) -> None:
        self._tensors, self._names, self._floats = tensors, names, floats

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[self._names[name]]
        return tensor.to(self._floats.get(name, tensor.dtype))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_diffusion(
    cls: type[Any],
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    subject: str,
    arrival: Arrival | None,
) -> nn.Module:
    """Build a model and fill it from a checkpoint in float that was held against its skeleton.

    Args:
        cls: the model class.
        raw: the `config.json`.
        tensors: by name in the checkpoint; each is read once, when its turn comes.
        subject: what to call the checkpoint in errors.
        arrival: the layers that become int8 while the weights are read; None for none.
    """
    model = diffusion_skeleton(cls, raw, subject)
    names = checkpoint_names(model, tensors)
    if arrival is None:
        fill_(model, _Read(tensors, names, {}))
        return model
    arrival.await_(model)
    fill_(model, _Read(tensors, names, arrival.floats), _put_filled)
    arrival.finish_()
    return model


def _put_filled(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    setattr(parameter, FILLED, True)
    module.register_parameter(name, parameter)
    delattr(parameter, FILLED)


def load_diffusion(
    cls: type[Any], raw: Mapping[str, Any], tensors: Mapping[str, Tensor], subject: str
) -> nn.Module:
    """Build a model and fill it, with int8 layers where the tensors are int8 codes; every tensor keeps its dtype.

    Args:
        cls: the model class.
        raw: the `config.json`.
        tensors: by name; int8 codes in the shape of the float weight, scales fp32 [N, 1].
        subject: what to call the checkpoint in errors.

    Raises:
        CorruptCheckpointError: weights are missing, left over, int8 without a layer for it, or of other shapes than the config
            says.
    """
    model = diffusion_skeleton(cls, raw, subject)
    codes = {name for name, t in tensors.items() if t.dtype == torch.int8 and f"{name}{SCALE}" in tensors}
    owners = weight_owners(model)
    stray = sorted(codes - owners.keys())
    if stray:
        raise CorruptCheckpointError(
            f"{subject}: {stray[0]} is int8, but {cls.__name__} has no layer there that can hold it; it does not fit its "
            f"config.json"
        )
    install_(model, sorted({owners[name] for name in codes}))
    left = fit_diffusion(model, tensors, subject)
    if left:
        raise CorruptCheckpointError(
            f"{subject}: {cls.__name__} has no place for {grouped(left)}; it does not fit its config.json"
        )
    fill_(model, tensors)
    return model


def check_diffusion(model: Any, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that `load` would not build from its config, before anything is written.

    Args:
        model: a converted model, of a class that diffusers has.
        state: what is to be written, with the scales of int8 codes.

    Raises:
        UnsupportedModelError: names what differs.
    """
    name = type(model).__name__
    built = diffusion_skeleton(type(model), config_of(model), name)
    codes = {n for n, t in state.items() if t.dtype == torch.int8 and f"{n}{SCALE}" in state}
    scales = {f"{n}{SCALE}" for n in codes}
    floats = {
        n: torch.empty_like(t, dtype=torch.float32, device="meta") if n in codes else t
        for n, t in state.items()
    }
    found = misfit(built, {n: t for n, t in floats.items() if n not in scales})
    sentences = [
        *(f"{n} would be missing" for n in found.missing),
        *(f"{n} would be left out" for n in found.left),
        *(f"{n} would have another shape" for n in found.wrong),
        *(
            f"{n} is int8, and the layer there would not be one that can be"
            for n in codes - weight_owners(built).keys()
        ),
        *other_layers(model, built, "diffusers."),
        *lost_buffers(model, built),
        *shared_codes(model, built),
    ]
    if sentences:
        raise UnsupportedModelError(
            f"{name} cannot be saved: built from its config, it would be another model ({'; '.join(sentences[:4])}). Undo that, or "
            f"make it in a class of your own (class My{name}({name}): ...) for load(folder, model=...)"
        )
