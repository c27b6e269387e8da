"""JSON: read under rules stricter than the library's own, as a stranger may have written it; written in one form."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from mono_quant.errors import CorruptCheckpointError, LimitExceededError, OutputError
from mono_quant.io.disk.reading import open_regular, read_all
from mono_quant.io.text import one_line, printable

MAX_JSON_BYTES = 8 << 20
MAX_JSON_DEPTH = 64
MAX_INTEGER_DIGITS = 1000

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(
    path: str | os.PathLike[str],
    *,
    what: str | None = None,
    max_bytes: int = MAX_JSON_BYTES,
) -> Any:
    """Read a JSON file that a stranger may have written.

    Args:
        path: the file.
        what: how to call it in an error; the path if not given.
        max_bytes: refuse a larger file.

    Returns:
        The value: UTF-8 only, no byte order mark, no NaN or infinity, no duplicate keys, at most 64 levels.

    Raises:
        MissingFileError: there is no such file.
        UnsafeInputError: it is a foreign link or no regular file.
        LimitExceededError: it is larger than `max_bytes`.
        CorruptCheckpointError: it breaks one of the rules.
    """
    name = printable(path, 400) if what is None else what
    descriptor = open_regular(Path(path))
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
) -> dict[str, Any]:
    """Read a JSON file whose top level must be an object; see `read_json`."""
    value = read_json(path, what=what, max_bytes=max_bytes)
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
            f"{name} is not valid JSON: {one_line(error)}; fetch it again"
        ) from error
    return value


def canonical_json(value: Any, name: str) -> str:
    """Return JSON with sorted keys, indent 2 and a last newline: equal values give equal bytes.

    Raises:
        OutputError: `value` is not plain data; `name` says what it is in the message.
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        text.encode("utf-8")  # an unpaired surrogate is text in Python, and no JSON
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"{printable(name)} cannot be written as JSON: {error}") from error


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
