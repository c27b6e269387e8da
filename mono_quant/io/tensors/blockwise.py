"""Checkpoints whose weights are fp8 codes with a scale for every block of them: seen as the floats that they stand for.

::

    found = Blockwise.of(shapes, (128, 128), torch.bfloat16)
    weights = Dequantized(checkpoint, found)
    weights["model.layers.0.mlp.up_proj.weight"]  # bfloat16
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.tensors.checkpoint import Checkpoint, StoredTensor, memory_of, stored
from mono_quant.io.text import SHOWN, listed, printable

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
# Rows and columns that one scale is for; None for the whole matrix.
Block = tuple[int, int] | None

CODES = torch.float8_e4m3fn
INVERSE = "_scale_inv"
_LARGEST = torch.finfo(CODES).max
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
# Values that are worked on at once, at most.
_PART = 1 << 22


class Scaled(NamedTuple):
    """How the values of a weight come from its codes.

    Attributes:
        inverse: name of the scales that they are multiplied with, [..., rows / block, columns / block], rounded up; of a weight
            with one scale for the whole matrix they may have any shape of as many.
        block: rows and columns that one scale is for.
    """

    inverse: str
    block: tuple[int, int]


@dataclass(frozen=True)
class Blockwise:
    """What of a checkpoint is fp8.

    Attributes:
        dtype: of the values.
        scaled: the weights, by name.
        hidden: names of the tensors that are no part of the values' checkpoint: scales of weights and of activations.
    """

    dtype: torch.dtype
    scaled: Mapping[str, Scaled]
    hidden: frozenset[str]

    @classmethod
    def of(cls, shapes: Shapes, block: Block, dtype: torch.dtype, subject: str) -> "Blockwise":
        """Find the weights and their scales.

        Args:
            shapes: dtype and shape of every tensor in the files.
            block: that the config names.
            dtype: that the values shall have.
            subject: what to call the checkpoint in errors.

        Raises:
            CorruptCheckpointError: a weight has no scales or of another shape, or scales have no weight.
        """
        codes = [name for name, (own, _) in shapes.items() if own is CODES]
        inverses = {name: inverse_of(name, shapes) for name in codes}
        missing = [name for name, inverse in inverses.items() if not inverse]
        if missing:
            raise CorruptCheckpointError(
                f"{subject}: {len(missing)} weights are fp8 without scales: {listed(missing)} (there is no "
                f"{printable(missing[0] + INVERSE)}); fetch the checkpoint again, with all its files"
            )
        used = set(inverses.values())
        extra = [name for name in shapes if name.endswith(INVERSE) and name not in used]
        if extra:
            raise CorruptCheckpointError(
                f"{subject}: {len(extra)} tensors are scales of fp8 weights that are not there: {listed(extra)}; fetch the checkpoint "
                "again, with all its files"
            )
        found = {name: _block_of(name, inverse, shapes, block) for name, inverse in inverses.items()}
        wrong = [problem for problem in found.values() if isinstance(problem, str)]
        if wrong:
            raise CorruptCheckpointError(
                f"{subject}: {'; '.join(wrong[:SHOWN])}; fetch the checkpoint again, or correct weight_block_size of its "
                "config.json"
            )
        scaled = {
            name: Scaled(inverses[name], own) for name, own in found.items() if not isinstance(own, str)
        }
        activations = {_beside(name, "activation_scale") for name in codes}
        return cls(dtype, scaled, frozenset(used | (activations & shapes.keys())))

    def shapes(self, stored: Shapes) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of every tensor of the values' checkpoint."""
        return {
            name: (self.dtype if name in self.scaled else own, shape)
            for name, (own, shape) in stored.items()
            if name not in self.hidden
        }


def inverse_of(name: str, names: Mapping[str, object]) -> str:
    """Return the name of the scales of an fp8 weight; empty where there are none.

    DeepSeek-V4 and Mistral call them otherwise than all others; transformers' reader (finegrained_fp8) renames them.
    """
    candidates = [f"{name}{INVERSE}"]
    if name.endswith(".weight"):
        candidates += [_beside(name, "scale"), _beside(name, "qscale_weight")]
    return next((candidate for candidate in candidates if candidate in names), "")


def _beside(name: str, last: str) -> str:
    owner, dot, own = name.rpartition(".")
    return f"{owner}{dot}{last}" if own == "weight" else f"{name}_{last}"


def _block_of(name: str, inverse: str, shapes: Shapes, block: Block) -> tuple[int, int] | str:
    """Return the block of a weight; a sentence where its scales have not the dtype or the shape that they must have."""
    (_, shape), (dtype, grid) = shapes[name], shapes[inverse]
    if len(shape) < 2 or 0 in shape:
        return f"{printable(name)} is fp8 of shape {shape}, which is no matrix"
    if dtype not in _SCALE_DTYPES:
        return f"{printable(inverse)} is {dtype}, and scales are float32"
    rows, columns = block or shape[-2:]
    expected = (*shape[:-2], math.ceil(shape[-2] / rows), math.ceil(shape[-1] / columns))
    is_whole = block is None and math.prod(grid) == math.prod(expected)
    if grid == expected or is_whole:
        return rows, columns
    return f"{printable(inverse)} is {grid} and should be {expected}, one scale per {rows} x {columns} values of {shape}"


def values_of(codes: Tensor, scales: Tensor, columns: int, into: Tensor | None = None) -> Tensor:
    """Return the values of rows: codes times scales, in float32.

    The formula of `weight_dequant` in DeepSeek-V3's inference/kernel.py.

    Args:
        codes: fp8 [rows, K].
        scales: fp32 [rows, K / columns], rounded up, or [K / columns] where they are the same for all rows.
        columns: that one scale is for.
        into: fp32 [rows, K] to write and return; a new tensor when not given.
    """
    values = _widened(codes, torch.empty(codes.shape) if into is None else into)
    rows, depth = values.shape
    whole = depth // columns
    values[:, : whole * columns].view(rows, whole, columns).mul_(scales[..., :whole, None])
    values[:, whole * columns :].mul_(scales[..., whole:])
    return values


def _widened(codes: Tensor, into: Tensor) -> Tensor:
    """Write fp8 codes as fp32; six times as fast as torch, which does one after another."""
    # the fields of float16 with an exponent that counts from 15, not from 7; the sign is in bits 14 and 15
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    into.copy_(bits.view(torch.float16)).mul_(2.0**8)
    # the codes that stand for NaN come out as 480
    if into.numel() and max(map(abs, torch.stack(into.aminmax()).tolist())) > _LARGEST:
        nan = torch.full_like(into, math.nan).copysign_(into)
        into.copy_(torch.where(into.abs() > _LARGEST, nan, into))
    return into


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    """Return the dtype that scales are to be read as: bytes are powers of two, 2 ** (byte - 127)."""
    return torch.float8_e8m0fnu if stored is torch.uint8 else stored


def check_scales(scales: Tensor, name: str, file: str) -> None:
    """Refuse scales that no method writes.

    Args:
        scales: fp32.
        name, file: of the tensor, for the error.

    Raises:
        CorruptCheckpointError: one is not a finite number above 0.
    """
    bad = scales[~(scales.isfinite() & (scales > 0))]
    if bad.numel():
        raise CorruptCheckpointError(
            f"{file}: {printable(name)} holds {bad.numel()} scales that are no finite numbers above 0, such as {float(bad[0])}; "
            "fetch the file again, or quantize the original model"
        )


class Dequantized(Mapping[str, Tensor]):
    """An open checkpoint as the floats that it stands for; each tensor is read anew, alone, when it is asked for.

    Attributes:
        folder: where it was opened.
        headers: of the values' checkpoint; `file` and `nbytes` of a weight are those of its codes' file and of its values.
        layout: which tensors are fp8.
        checkpoint: with the codes.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Blockwise) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.folder: Path = checkpoint.folder
        self.headers = {
            name: header
            if name not in layout.scaled
            else header._replace(dtype=layout.dtype, nbytes=math.prod(header.shape) * layout.dtype.itemsize)
            for name, header in checkpoint.headers.items()
            if name not in layout.hidden
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            CorruptCheckpointError: a scale is not a finite number above 0; as `Checkpoint`.
            KeyError, LimitExceededError, ValueError: as `Checkpoint`.
        """
        if name not in self.layout.scaled:
            return self.checkpoint[name]
        shape = self.headers[name].shape
        return self._values(name, 0, math.prod(shape[:-2])).reshape(shape)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of one tensor along its first dimension; see `Checkpoint.part`."""
        if name not in self.layout.scaled:
            return self.checkpoint.part(name, start, stop)
        shape = self.headers[name].shape
        if len(shape) != 3:
            return self[name][start:stop]
        return self._values(name, start, stop).reshape(stop - start, *shape[1:])

    def _values(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values of some of the matrices of a weight, as rows."""
        header, (inverse, (rows, columns)) = self.headers[name], self.layout.scaled[name]
        count, depth = header.shape[-2:]
        size = (stop - start) * count * depth * header.dtype.itemsize
        out = memory_of(size, name).view(header.dtype).reshape(-1, depth)
        step = max(_PART // depth, 1)
        grid = self._scales(inverse).reshape(-1, math.ceil(count / rows), math.ceil(depth / columns))
        for matrix, row in product(range(start, stop), range(grid.shape[1])):
            begin, end = matrix * count + row * rows, matrix * count + min((row + 1) * rows, count)
            for first in range(begin, end, step):
                last = min(first + step, end)
                place = slice(first - start * count, last - start * count)
                out[place] = values_of(self.checkpoint.rows(name, first, last), grid[matrix, row], columns)
        return out

    def _scales(self, name: str) -> Tensor:
        held = self.checkpoint[name]
        scales = held.view(scale_dtype(held.dtype)).float()
        check_scales(scales, name, self.checkpoint.headers[name].file)
        return scales

    def stored(self) -> dict[str, StoredTensor]:
        """Return all tensors, to be read when they are needed."""
        return stored(self, self.headers)

    def sha256s(self) -> dict[str, str]:
        """Return the sha256 of every weight file, by name; reads every byte."""
        return self.checkpoint.sha256s()

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, name: object) -> bool:
        return name in self.headers
