"""The header of a safetensors file, read without trust.

Every rule here is stricter than the library's own, so that whatever passes is read the same way by everybody.
"""

import math
import os
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from mono_quant.errors import CorruptCheckpointError, LimitExceededError, UnsupportedModelError
from mono_quant.io.disk.json_text import parse_json
from mono_quant.io.disk.reading import read_all
from mono_quant.io.text import printable

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 2_000_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48
MAX_NAME_BYTES = 1024

# In the order in which the official writer lays tensors out.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# As torch calls them, without `torch.`.
TORCH_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
# Valid in a file, but torch has no tensor of single elements of these.
SUB_BYTE_DTYPES = {"F4", "F6_E2M3", "F6_E3M2"}

METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


class Span(NamedTuple):
    """Where one tensor lies: offsets are counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def name_problem(name: str) -> str | None:
    """Say what is wrong with a tensor name, or return None."""
    if not name:
        return "is empty"
    if not name.isprintable():
        return "has control or invisible characters"
    if len(name) > MAX_NAME_BYTES or len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if name == METADATA:
        return "is reserved by the file format"
    return None


def collisions(names: Iterable[str]) -> list[str]:
    """Return the names that another one equals once case and Unicode form are ignored."""
    seen: dict[str, str] = {}
    found = []
    for name in names:
        key = name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
        if seen.setdefault(key, name) != name:
            found += [seen[key], name]
    return sorted(set(found))


def parse_header(descriptor: int, name: str) -> tuple[dict[str, Span], int]:
    """Read and check the header of an open safetensors file.

    Args:
        descriptor: the open file; its position is not used.
        name: how to call the file in an error.

    Returns:
        The tensors in the order of their data, and the offset at which the data begins.

    Raises:
        CorruptCheckpointError: header, offsets and file size do not agree, or break a rule.
        LimitExceededError: the header or the number of tensors is unreasonable.
        UnsupportedModelError: a dtype that torch cannot hold.
    """
    size = os.fstat(descriptor).st_size
    prefix = read_all(descriptor, 8)
    length = _header_length(prefix, size, name)
    return parse_header_bytes(prefix + read_all(descriptor, length, 8), size, name)


def parse_header_bytes(head: bytes, size: int, name: str) -> tuple[dict[str, Span], int]:
    """Check a header that was read elsewhere; see `parse_header`.

    Args:
        head: the first bytes of the file: the 8-byte length and the JSON header.
        size: of the whole file.
        name: how to call the file in an error.
    """
    length = _header_length(head[:8], size, name)
    raw = head[8 : 8 + length]
    if len(raw) != length or not raw.startswith(b"{"):
        raise CorruptCheckpointError(f"{name}: the header does not start with '{{'; fetch the file again")
    value = parse_json(raw, f"the header of {name}")
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{name}: the header is not a JSON object; fetch the file again")
    return _check_spans(value, size - 8 - length, name), 8 + length


def _header_length(prefix: bytes, size: int, name: str) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2 or length > size - 8:
        raise CorruptCheckpointError(
            f"{name} is not a whole safetensors file: it has {size} bytes and announces a header of {length}; "
            "fetch it again"
        )
    if length > MAX_HEADER_BYTES:
        raise LimitExceededError(
            f"{name} announces a header of {length} bytes, more than {MAX_HEADER_BYTES}; "
            "no known model needs that, check the file"
        )
    return length


def _check_spans(header: dict[str, Any], data_bytes: int, name: str) -> dict[str, Span]:
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise CorruptCheckpointError(
            f"{name}: {METADATA} must map strings to strings; write the file again with safetensors"
        )
    if len(header) > MAX_TENSORS:
        raise LimitExceededError(
            f"{name} lists {len(header)} tensors, more than {MAX_TENSORS}; no known model needs that, check the file"
        )
    spans = {key: _span(key, facts, name) for key, facts in header.items()}
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)))
    reached = 0
    for key, span in ordered.items():
        if span.start != reached:
            raise CorruptCheckpointError(
                f"{name}: tensor {printable(key)} starts at byte {span.start}, but the one before ends at {reached}; "
                "fetch the file again"
            )
        reached = span.end
    if reached != data_bytes:
        raise CorruptCheckpointError(
            f"{name} holds {data_bytes} bytes of data, but its header describes {reached}; fetch the file again"
        )
    return ordered


def _span(key: str, facts: Any, name: str) -> Span:
    problem = name_problem(key)
    if problem is None:
        if not isinstance(facts, dict) or facts.keys() != _FIELDS:
            problem = "is not described by exactly dtype, shape and data_offsets"
        else:
            dtype_name, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
            if isinstance(dtype_name, str) and dtype_name in SUB_BYTE_DTYPES:
                raise UnsupportedModelError(
                    f"{name}: tensor {printable(key)} is stored as {dtype_name}, which torch cannot hold; "
                    "start from a checkpoint in 16 or 32 bits"
                )
            problem = _layout_problem(dtype_name, shape, offsets)
    if problem is not None:
        raise CorruptCheckpointError(f"{name}: tensor {printable(key)} {problem}; fetch the file again")
    return Span(DTYPES[dtype_name], tuple(shape), offsets[0], offsets[1])


def _layout_problem(dtype_name: Any, shape: Any, offsets: Any) -> str | None:
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        return f"has the unknown dtype {printable(dtype_name)}"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        return f"has the shape {printable(shape)}, not a list of sizes"
    if len(shape) > MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions, more than {MAX_DIMENSIONS}"
    if math.prod(size or 1 for size in shape) >= MAX_ELEMENTS:
        return f"has the shape {printable(shape)}, more elements than any tensor can have"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        return f"has the offsets {printable(offsets)}, not a pair of integers"
    if offsets[0] < 0 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype_name].itemsize:
        return f"has the offsets {printable(offsets)}, which do not fit {dtype_name} {printable(shape)}"
    return None
