"""Buffers that are not in a state dict: tables and scales that a model computes when it is built.

Of a transformers model, building it again gives them back; what that does not give, and those of a plain module, lie in a file
of their own.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mono_quant.convert.int8_layers import Int8Module
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import CorruptCheckpointError
from mono_quant.hf.computed import put_buffers_
from mono_quant.hf.dtypes import built_dtype
from mono_quant.hf.models import computed_buffers
from mono_quant.io.disk.allowed import BUFFERS
from mono_quant.io.disk.manifest import MANIFEST
from mono_quant.io.disk.output import OutputFolder
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.io.tensors.headers import DTYPE_NAMES
from mono_quant.io.tensors.shards import write_tensors
from mono_quant.planning.walk import is_transformers_model


class Buffers(NamedTuple):
    """How the buffers of a model that no state dict holds come back.

    Attributes:
        built: dtype that the class is to be built in.
        casts: dtype of those that were cast after that, by name.
        values: those that building does not give, by name.
    """

    built: torch.dtype
    casts: Mapping[str, torch.dtype]
    values: Mapping[str, Tensor]


def buffers_of(core: nn.Module, dtype: torch.dtype) -> Buffers:
    """Find out how the buffers of a converted model come back.

    Args:
        core: the converted part; a transformers model, or a plain module, which only the user can build.
        dtype: that int8 weights are expected to read as.
    """
    built, unsaved, computed = torch.float32, unsaved_buffers(core), dict[str, Tensor]()
    if is_transformers_model(core):
        built = built_dtype(core)
        # what cannot be built again has to be written down
        with contextlib.suppress(CorruptCheckpointError):
            computed = computed_buffers(core, built) if unsaved else {}
    casts = {
        f"{name}._float".lstrip("."): module.float_dtype
        for name, module in core.named_modules()
        if isinstance(module, Int8Module) and module.float_dtype != dtype
    }
    values = {}
    for name, buffer in unsaved.items():
        again = computed.get(name)
        if again is not None and again.is_floating_point() and buffer.is_floating_point():
            again = again.to(buffer.dtype)
        if not _equal(again, buffer):
            values[name] = buffer
        elif computed[name].dtype != buffer.dtype:
            casts[name] = buffer.dtype
    return Buffers(built, casts, values)


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and torch.equal(a, b.cpu())


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in the state dict of a model, but those that only carry a dtype."""
    saved = model.state_dict(keep_vars=True).keys()
    own = {id(module.get_buffer("_float")) for module in model.modules() if isinstance(module, StoredModule)}
    return {n: b for n, b in model.named_buffers() if n not in saved and id(b) not in own and not b.is_meta}


def write_values(folder: OutputFolder, values: Mapping[str, Tensor]) -> None:
    """Write buffers into their own file, if there are any that a file can hold."""
    stored = {
        name: value.detach().cpu().contiguous()
        for name, value in values.items()
        if value.dtype in DTYPE_NAMES and value.layout == torch.strided
    }
    if stored:
        write_tensors(folder, f"{BUFFERS}/model.safetensors", stored)


def read_values(folder: Path) -> dict[str, Tensor]:
    """Read the buffers that `write_values` wrote; none where there is no such file.

    Raises:
        MonoQuantError: a typed error for a file that cannot be read.
    """
    if not (folder / BUFFERS).is_dir():
        return {}
    with open_checkpoint(folder / BUFFERS) as checkpoint:
        return {name: checkpoint[name] for name in checkpoint}


def restore_(core: nn.Module, casts: Mapping[str, torch.dtype], values: Mapping[str, Tensor]) -> None:
    """Give a loaded model its buffers back; see `Buffers`.

    Buffers that are of another size in a plain module that the user built are left as they are.

    Raises:
        CorruptCheckpointError: the model has no such buffer.
    """
    known = dict(core.named_buffers())
    strange = sorted((casts.keys() | values.keys()) - known.keys())
    if strange:
        raise CorruptCheckpointError(
            f"{MANIFEST} names {strange[0]}, which {type(core).__name__} does not have; save it again"
        )
    for name, dtype in casts.items():
        known[name].data = known[name].data.to(dtype)
    whole = is_transformers_model(core)
    put_buffers_(
        core, {name: value for name, value in values.items() if whole or known[name].shape == value.shape}
    )
