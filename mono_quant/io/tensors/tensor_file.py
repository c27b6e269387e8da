"""The bytes of a safetensors file, made one tensor at a time; nothing here touches the disk."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from mono_quant.errors import OutputError
from mono_quant.io.tensors.headers import (
    DTYPE_NAMES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    METADATA,
    collisions,
    name_problem,
)
from mono_quant.io.text import printable

_CHUNK = 64 << 20
# The official writer lays wide dtypes out first, in the order of the table.
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: what it will be, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]

    @cached_property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.dtype.itemsize * math.prod(self.shape)


class FileImage(NamedTuple):
    """A safetensors file that is made while it is written."""

    size: int
    chunks: Iterator[bytes | memoryview]


class Layout(NamedTuple):
    """Where everything lies in a safetensors file.

    Attributes:
        size: of the file in bytes.
        header: its first bytes, up to the data.
        entries: in the order of their data.
        starts: of the data of each tensor, from the beginning of the file.
    """

    size: int
    header: bytes
    entries: tuple[TensorEntry, ...]
    starts: dict[str, int]


def lay_out(name: str, entries: Sequence[TensorEntry]) -> Layout:
    """Lay tensors out as one file, as `safetensors.torch.save_file` with `{"format": "pt"}` does; none is made.

    Args:
        name: how to call the file in an error.
        entries: what will be written.

    Raises:
        OutputError: a name or dtype that the format cannot hold, or too many tensors.
    """
    _check_entries(name, entries)
    ordered = tuple(sorted(entries, key=lambda entry: (_RANK[entry.dtype], entry.name)))
    header = _header(ordered)
    if len(header) > MAX_HEADER_BYTES:
        raise OutputError(
            f"{name} would need a header of {len(header)} bytes, more than {MAX_HEADER_BYTES}; use more shards"
        )
    starts, reached = {}, len(header)
    for entry in ordered:
        starts[entry.name] = reached
        reached += entry.nbytes
    return Layout(reached, header, ordered, starts)


def file_image(name: str, tensors: Mapping[str, torch.Tensor] | Sequence[TensorEntry]) -> FileImage:
    """Lay tensors out as one file, byte for byte as `safetensors.torch.save_file` with `{"format": "pt"}`.

    Args:
        name: how to call the file in an error.
        tensors: name -> tensor, or entries whose tensors are made when their turn comes.

    Returns:
        The size, and the bytes; taking them raises OutputError where an entry is not what it promised.

    Raises:
        OutputError: a name or dtype that the format cannot hold, or too many tensors.
    """
    if isinstance(tensors, Mapping):
        entries = [_held(key, tensor) for key, tensor in tensors.items()]
    else:
        entries = list(tensors)
    layout = lay_out(name, entries)
    return FileImage(layout.size, _chunks(layout.header, layout.entries))


def _held(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _check_entries(name: str, entries: Sequence[TensorEntry]) -> None:
    counts = Counter(entry.name for entry in entries)
    problems = [f"{printable(key)} is there twice" for key, count in counts.items() if count > 1]
    problems += [f"{printable(key)} differs from another only by case" for key in collisions(counts)]
    for entry in entries:
        problem = name_problem(entry.name)
        if problem is None and entry.dtype not in DTYPE_NAMES:
            problem = f"has the dtype {entry.dtype}, which safetensors cannot hold"
        if problem is None and len(entry.shape) > MAX_DIMENSIONS:
            problem = f"has {len(entry.shape)} dimensions, more than {MAX_DIMENSIONS}"
        if problem:
            problems.append(f"{printable(entry.name)} {problem}")
    if problems:
        raise OutputError(f"{name} cannot hold these tensors: {'; '.join(problems)}; rename or convert them")


def _header(entries: Sequence[TensorEntry]) -> bytes:
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    reached = 0
    for entry in entries:
        start, reached = reached, reached + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, reached],
        }
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _chunks(header: bytes, entries: Sequence[TensorEntry]) -> Iterator[bytes | memoryview]:
    yield header
    for entry in entries:
        tensor = entry.get()
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
            raise OutputError(
                f"tensor {printable(entry.name)} was announced as {entry.dtype} {list(entry.shape)} and came as "
                f"{tensor.dtype} {list(tensor.shape)}; announce what is written"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise OutputError(
                f"tensor {printable(entry.name)} has no plain data ({tensor.layout}, {tensor.device}); "
                "make it dense and load it first"
            )
        # Lazy conjugates and negatives would be written with the values they are views of.
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]
