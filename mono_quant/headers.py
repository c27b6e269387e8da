"""Reading what strangers wrote: regular files, JSON, and the header of a safetensors file.

Every rule here is stricter than the library's own, so that whatever passes is read the same way by everybody.
"""

import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    UnsafeInputError,
    UnsupportedModelError,
)

MAX_JSON_BYTES = 8 << 20
MAX_JSON_DEPTH = 64
MAX_INTEGER_DIGITS = 1000
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
RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}
# Valid in a file, but torch has no tensor of single elements of these.
SUB_BYTE_DTYPES = {"F4", "F6_E2M3", "F6_E3M2"}

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Span(NamedTuple):
    """Where one tensor lies: offsets are counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def printable(text: object, limit: int = 200) -> str:
    """Quote foreign text on one line, with control and bidi characters escaped."""
    shown = str(text)
    if len(shown) > limit:
        shown = f"{shown[:limit]}… ({len(shown)} characters)"
    return "'" + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown) + "'"


def name_problem(name: str) -> str | None:
    """Say what is wrong with a tensor name, or return None."""
    if not name:
        return "is empty"
    if not name.isprintable():
        return "has control or invisible characters"
    if len(name) > MAX_NAME_BYTES or len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if name == _METADATA:
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


def is_cache_link(path: Path) -> bool:
    """Tell whether a link is one of the Hugging Face cache: snapshots/<commit>/… to blobs/<hash> of the same repo."""
    where = path.parent.resolve()
    target = path.resolve()
    for folder in (where, *where.parents):
        if folder.parent.name == "snapshots":
            blobs = folder.parent.parent / "blobs"
            return target.parent == blobs and _BLOB.fullmatch(target.name) is not None
    return False


def open_regular(path: Path, *, allow_symlinks: bool = False) -> int:
    """Open a regular file for reading; the caller closes the descriptor.

    Args:
        path: the file; its folder is trusted, its last part is not.
        allow_symlinks: follow a link wherever it goes. Links of the Hugging Face cache always pass.

    Returns:
        A file descriptor.

    Raises:
        MissingFileError: there is no such file.
        UnsafeInputError: it is a link that leaves its place, or no regular file.
        CorruptCheckpointError: the file system does not let it be read.
    """
    shown = printable(path, 400)
    try:
        if path.is_symlink():
            if not allow_symlinks and not is_cache_link(path):
                raise UnsafeInputError(
                    f"{shown} is a symbolic link; put a copy of the file there, or pass allow_symlinks=True "
                    "if you trust the folder"
                )
            path = path.resolve(strict=True)
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise MissingFileError(f"{shown} is missing; fetch the checkpoint again") from error
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: pathlib's word for a link loop
        raise CorruptCheckpointError(f"{shown} cannot be opened ({error}); fetch it again") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeInputError(f"{shown} is not a regular file; remove it or fetch the checkpoint again")
    return descriptor


def read_all(descriptor: int, size: int, offset: int = 0) -> bytes:
    """Read exactly `size` bytes, or fewer where the file ends."""
    pieces = []
    while size > 0:
        piece = os.pread(descriptor, min(size, 1 << 26), offset)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def read_json(
    path: str | os.PathLike[str],
    *,
    what: str | None = None,
    max_bytes: int = MAX_JSON_BYTES,
    allow_symlinks: bool = False,
) -> Any:
    """Read a JSON file that a stranger may have written.

    Args:
        path: the file.
        what: how to call it in an error; the path if not given.
        max_bytes: refuse a larger file.
        allow_symlinks: see `open_regular`.

    Returns:
        The value: UTF-8 only, no byte order mark, no NaN or infinity, no duplicate keys, at most 64 levels.

    Raises:
        MissingFileError: there is no such file.
        UnsafeInputError: it is a foreign link or no regular file.
        LimitExceededError: it is larger than `max_bytes`.
        CorruptCheckpointError: it breaks one of the rules.
    """
    name = printable(path, 400) if what is None else what
    descriptor = open_regular(Path(path), allow_symlinks=allow_symlinks)
    try:
        data = read_all(descriptor, max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise LimitExceededError(
            f"{name} is larger than {max_bytes} bytes; no such file needs that, check it"
        )
    value = parse_json(data, name)
    _check_depth(value, name)
    return value


def read_json_object(
    path: str | os.PathLike[str],
    *,
    what: str | None = None,
    max_bytes: int = MAX_JSON_BYTES,
    allow_symlinks: bool = False,
) -> dict[str, Any]:
    """Read a JSON file whose top level must be an object; see `read_json`."""
    value = read_json(path, what=what, max_bytes=max_bytes, allow_symlinks=allow_symlinks)
    if not isinstance(value, dict):
        name = printable(path, 400) if what is None else what
        raise CorruptCheckpointError(
            f"{name} holds a JSON {type(value).__name__} where an object was expected; fetch it again"
        )
    return value


def parse_json(data: bytes, name: str) -> Any:
    """Parse JSON under the rules of `read_json`, the depth excepted."""
    try:
        if data.startswith(b"\xef\xbb\xbf"):
            raise ValueError("it starts with a byte order mark")
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        if _SURROGATE.search(data):
            # An unpaired surrogate parses, but no other reader takes it and it cannot be written back.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CorruptCheckpointError(
            f"{name} is not valid JSON: nested deeper than {MAX_JSON_DEPTH} levels; fetch it again"
        ) from error
    except ValueError as error:
        raise CorruptCheckpointError(
            f"{name} is not valid JSON: {_one_line(error)}; fetch it again"
        ) from error
    return value


def _one_line(error: Exception) -> str:
    return printable(error)[1:-1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice)} is there twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {printable(text, 40)} is too large")
    return value


def _integer(text: str) -> int | float:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits, more than {MAX_INTEGER_DIGITS}")
    # JSON has a negative zero and Python's int has not; as a float it is refused wherever an integer counts.
    return -0.0 if text == "-0" else int(text)


def _check_depth(value: Any, name: str) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        nested: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                nested.extend(child for child in item.values() if isinstance(child, dict | list))
            elif isinstance(item, list):
                nested.extend(child for child in item if isinstance(child, dict | list))
        if not nested:
            return
        level = nested
    raise CorruptCheckpointError(f"{name} is nested deeper than {MAX_JSON_DEPTH} levels; fetch it again")


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
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise CorruptCheckpointError(
            f"{name}: {_METADATA} must map strings to strings; write the file again with safetensors"
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


def layout_order(tensors: Iterable[tuple[str, torch.dtype]]) -> list[str]:
    """Sort tensor names as the official writer lays them out: wide dtypes first, then by name."""
    return [name for name, _ in sorted(tensors, key=lambda item: (RANK[item[1]], item[0]))]


def build_header(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """Build the beginning of a safetensors file, byte for byte as the official writer does.

    Args:
        tensors: name, dtype and shape of each tensor, in the order of `layout_order`.

    Returns:
        Length and header, padded to a multiple of 8 bytes.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    reached = 0
    for name, dtype, shape in tensors:
        start, reached = reached, reached + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, reached]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
