"""The tensors of a saved folder, with codes in the shape of their weights and scales that were checked."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mono_quant.errors import (
    CorruptCheckpointError,
)
from mono_quant.io.disk.manifest import FORMAT, MANIFEST
from mono_quant.io.tensors.checkpoint import open_checkpoint


def shaped_codes(folder: Path, name: str, stored: Tensor | None, facts: Any, flat: bool) -> Tensor:
    """Return int8 codes in the shape of the float weight.

    Args:
        folder: for errors.
        name: of the tensor.
        stored: as in the file.
        facts: what the manifest says: `shape`, whether the rows are the columns (`transposed`), and the shape of the
            scales (`scale`).
        flat: the codes lie flat in the file.

    Raises:
        CorruptCheckpointError: the file does not hold what the manifest promises.
    """
    try:
        shape, transposed = tuple(int(d) for d in facts["shape"]), facts["transposed"] is True
        tuple(int(d) for d in facts["scale"])
    except (TypeError, KeyError, ValueError) as e:
        raise CorruptCheckpointError(
            f"{folder}: {MANIFEST} describes {name} in an unknown way ({facts!r})"
        ) from e
    if stored is None:
        raise CorruptCheckpointError(
            f"{folder}: {name} is missing from the weights, though {MANIFEST} lists it"
        )
    expected = (math.prod(shape),) if flat else shape
    if stored.dtype != torch.int8 or tuple(stored.shape) != expected:
        promised = f"{expected[0]} flat int8 codes" if flat else f"int8 codes of shape {expected}"
        raise CorruptCheckpointError(
            f"{folder}: {name} is {stored.dtype} {tuple(stored.shape)}, but {MANIFEST} promises {promised}"
        )
    if not flat:
        return stored
    return stored.view(shape[1], shape[0]).t() if transposed else stored.view(shape)


def checked_scale(folder: Path, name: str, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return the scales of int8 rows as fp32 of `shape` [..., 1].

    Raises:
        CorruptCheckpointError: they are missing, of another shape, or not finite and positive.
    """
    if scale is None:
        raise CorruptCheckpointError(
            f"{folder}: {name} is missing, so its int8 codes mean nothing; the checkpoint is incomplete"
        )
    if not scale.is_floating_point() or tuple(scale.shape) not in (shape, shape[:-1]):
        raise CorruptCheckpointError(
            f"{folder}: {name} is {scale.dtype} {tuple(scale.shape)}, expected float {shape}"
        )
    value = scale.float().view(shape)
    if not bool(torch.isfinite(value).all()) or not bool((value > 0).all()):
        raise CorruptCheckpointError(
            f"{folder}: {name} holds a scale that is not finite and positive; the file is damaged"
        )
    return value


def read_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read all tensors, give flat codes their shape back, and check codes and scales.

    Args:
        folder: to read.
        manifest: of the folder; empty for a foreign checkpoint, whose codes are those with scales beside them.
    """
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint[name] for name in checkpoint}
    table = manifest.get("tensors", {})
    if not manifest:
        codes = {name: tensor for name, tensor in tensors.items() if _is_code(name, tensor, tensors)}
        table = {
            n: {"shape": t.shape, "transposed": False, "scale": (t.shape[0], 1)} for n, t in codes.items()
        }
    for name, facts in table.items():
        tensors[name] = shaped_codes(folder, name, tensors.get(name), facts, manifest.get("layout") == FORMAT)
        scale = f"{name}_scale"
        tensors[scale] = checked_scale(folder, scale, tensors.get(scale), tuple(facts["scale"]))
    return tensors


def _is_code(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    return name.endswith(".weight") and (tensor.dtype == torch.int8 or f"{name}_scale" in tensors)
