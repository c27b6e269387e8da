"""Where a loaded model lies and in which dtype its floats are, in the words of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.convert.stored import StoredModule
from mono_quant.errors import ConfigError, Option
from mono_quant.hf.dtypes import loaded_dtypes
from mono_quant.hf.models import skeleton
from mono_quant.io.text import one_line
from mono_quant.planning.walk import is_transformers_model

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_float(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a float dtype for its name; None, or `auto`, for the one that is stored.

    Raises:
        ConfigError: it is no float dtype.
    """
    found = _DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if found not in _DTYPES.values():
        raise ConfigError(
            Option("dtype", dtype),
            f" is no dtype for what is not int8; use one of {', '.join(_DTYPES)}, or 'auto' for what is stored",
        )
    return found


def check_place(device: Any, device_map: Any) -> None:
    """Refuse a place that contradicts itself, before anything is read.

    Raises:
        ConfigError: device and map are both given, or one of them is none.
    """
    if device is not None and device_map is not None:
        raise ConfigError(
            Option("device", device), " and ", Option("device_map"), " are both given; leave one out"
        )
    if isinstance(device_map, Mapping):
        return
    place = device if device is not None else device_map
    if place is None or (device is None and place in _STRATEGIES):
        return
    try:
        torch.device(place)
    except (RuntimeError, TypeError) as e:
        name = "device_map" if device is None else "device"
        raise ConfigError(
            Option(name, place), f" is no device ({e}); use 'cpu', 'cuda', 'cuda:0' or 'mps'"
        ) from e


def place_(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    device: Any = None,
    device_map: Any = None,
    offload_folder: str | Path | None = None,
) -> nn.Module:
    """Give a model the dtype of its floats and bring it to its devices; int8 codes and their scales stay what they are.

    Args:
        model: loaded, on the CPU.
        dtype: of its floats; None leaves them.
        device: that it goes to.
        device_map: `auto`, another strategy of accelerate, a device, or a device by name of module; `disk` is one of them.
        offload_folder: for what is on the disk.

    Raises:
        ConfigError: a map is given for a model that is not of transformers.
    """
    if dtype is not None:
        _cast_(model, dtype)
    if device_map is None or (isinstance(device_map, str) and device_map not in _STRATEGIES):
        place = device if device_map is None else device_map
        return model if place is None else _moved(model, place)
    if not is_transformers_model(model):
        raise ConfigError(
            Option("device_map"),
            f" is for models of transformers, and this is a {type(model).__name__}; use ",
            Option("device"),
        )
    return _dispatched(model, device_map, offload_folder)


def _cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Give floats a dtype as `from_pretrained(dtype=...)` does: tables of rotary embeddings and what a class declares stay float32."""
    core: Any = next((module for module in model.modules() if is_transformers_model(module)), None)
    if core is None:
        model.to(dtype)
        return
    bare = skeleton(type(core), core.config, dtype, type(core).__name__)
    wanted = {name: tensor.dtype for name, tensor in bare.named_buffers() if tensor.is_floating_point()}
    wanted = {n: other for n, other in {**wanted, **loaded_dtypes(bare, dtype)}.items() if other != dtype}
    tensors = {name: tensor.data for name, tensor in [*core.named_parameters(), *core.named_buffers()]}
    model.to(dtype)
    for name, other in wanted.items():
        path, _, own = name.rpartition(".")
        module = core.get_submodule(path)
        if isinstance(module, StoredModule) and own in module.held:
            module.read_as_(other)
        elif name in tensors:
            getattr(module, own).data = tensors[name].to(other)
    core.config.dtype = dtype


def _moved(model: nn.Module, place: Any) -> nn.Module:
    try:
        return model.to(place)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(
            Option("device", place), f" cannot be used here ({one_line(e, 200)}); use 'cpu'"
        ) from e


def _dispatched(model: Any, device_map: Any, offload_folder: str | Path | None) -> nn.Module:
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or ())  # noqa: SLF001
    if isinstance(device_map, str):
        limits = None
        if device_map != "sequential":
            limits = get_balanced_memory(
                model, no_split_module_classes=whole, low_zero=device_map == "balanced_low_0"
            )
        device_map = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=whole)
    if "disk" in set(map(str, device_map.values())) and offload_folder is None:
        raise ConfigError(
            Option("device_map"), " puts layers on the disk; say where with ", Option("offload_folder")
        )
    placed: nn.Module = dispatch_model(model, dict(device_map), offload_dir=offload_folder, force_hooks=False)
    return placed
