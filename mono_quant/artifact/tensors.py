"""The tensors of a saved folder, with codes in the shape of their weights and scales that were checked."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mono_quant.artifact.facts import Manifest, StoredCodes
from mono_quant.errors import (
    CorruptCheckpointError,
)
from mono_quant.io.disk.manifest import FORMAT, MANIFEST
from mono_quant.io.tensors.checkpoint import Checkpoint
from mono_quant.planning.kinds import unflattened

ZERO_POINT = ".weight_zero_point"


def shaped_codes(folder: Path, name: str, stored: Tensor | None, promised: StoredCodes, flat: bool) -> Tensor:
    """Return int8 codes in the shape of the float weight.

    Args:
        folder: for errors.
        name: of the tensor.
        stored: as in the file.
        promised: what the manifest says of it.
        flat: the codes lie flat in the file.

    Raises:
        CorruptCheckpointError: the file does not hold what the manifest promises.
    """
    shape = promised.shape
    if stored is None:
        raise CorruptCheckpointError(
            f"{folder}: {name} is missing from the weights, though {MANIFEST} lists it"
        )
    expected = (math.prod(shape),) if flat else shape
    if stored.dtype != torch.int8 or tuple(stored.shape) != expected:
        wanted = f"{expected[0]} flat int8 codes" if flat else f"int8 codes of shape {expected}"
        raise CorruptCheckpointError(
            f"{folder}: {name} is {stored.dtype} {tuple(stored.shape)}, but {MANIFEST} promises {wanted}"
        )
    if not flat:
        return stored
    return unflattened(stored, shape, "transposed_linear" if promised.transposed else "linear")


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


class SavedTensors:
    """The tensors of a saved folder by name, each read and checked when it is asked for; codes in the shape of their weights.

    Args:
        checkpoint: that holds them.
        table: what the manifest says, or will say, of the codes.
        flat: the codes lie flat in the files.
    """

    def __init__(self, checkpoint: Checkpoint, table: Mapping[str, StoredCodes], flat: bool) -> None:
        self._checkpoint, self._table, self._flat = checkpoint, table, flat
        self._scales = {f"{name}_scale": promised.scale for name, promised in table.items()}

    def headers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of every tensor as it is returned."""
        found = {name: (header.dtype, header.shape) for name, header in self._checkpoint.headers.items()}
        codes = {name: (torch.int8, promised.shape) for name, promised in self._table.items()}
        return found | codes | {name: (torch.float32, shape) for name, shape in self._scales.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Read one.

        Raises:
            CorruptCheckpointError: the file does not hold what the table promises.
        """
        folder, stored = self._checkpoint.folder, self._checkpoint.get(name)
        if name in self._table:
            return shaped_codes(folder, name, stored, self._table[name], self._flat)
        if name in self._scales:
            return checked_scale(folder, name, stored, self._scales[name])
        return self._checkpoint[name]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of one along its first dimension."""
        if name not in self._table:
            return (
                self[name][start:stop] if name in self._scales else self._checkpoint.part(name, start, stop)
            )
        shape = self._table[name].shape
        if self._flat and self._table[name].transposed:
            return self[name][start:stop]
        size = math.prod(shape[1:]) if self._flat else 1
        return self._checkpoint.part(name, start * size, stop * size).view(stop - start, *shape[1:])


def read_tensors(
    checkpoint: Checkpoint, manifest: Manifest | None, mapped: bool = False
) -> dict[str, Tensor]:
    """Read all tensors, give flat codes their shape back, and check codes and scales.

    Args:
        checkpoint: to read.
        manifest: of its folder; None for a foreign checkpoint, whose codes are those with scales beside them.
        mapped: leave what is large in its file; see `Checkpoint.mapped`.
    """
    folder = checkpoint.folder
    tensors = checkpoint.read(mapped)
    if manifest is None:
        # checked before: they are zero
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(ZERO_POINT)}
        codes = {name: tensor for name, tensor in tensors.items() if _is_code(name, tensor, tensors)}
        table = {n: StoredCodes(tuple(t.shape), False, (t.shape[0], 1)) for n, t in codes.items()}
    else:
        table = dict(manifest.tensors)
    flat = manifest is not None and manifest.layout == FORMAT
    for name, promised in table.items():
        tensors[name] = shaped_codes(folder, name, tensors.get(name), promised, flat)
        scale = f"{name}_scale"
        tensors[scale] = checked_scale(folder, scale, tensors.get(scale), promised.scale)
    return tensors


def check_zero_point(folder: Path, name: str, values: Tensor) -> None:
    """Accept a zero point, which some write for symmetric weights, too, and which then is zero.

    Raises:
        CorruptCheckpointError: it is not.
    """
    if bool(values.any()):
        raise CorruptCheckpointError(
            f"{folder}: {name} is not zero, but config.json describes symmetric weights, which have no zero point. Correct "
            f"one of the two: with symmetric: false, transformers and compressed-tensors run it"
        )


def _is_code(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    return name.endswith(".weight") and (tensor.dtype == torch.int8 or f"{name}_scale" in tensors)
