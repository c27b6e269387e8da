"""The limits of a header, which bound the time and the memory that a stranger's file can take: the last one in, the first one out."""

import json
import struct

import pytest
import torch

from mono_quant.errors import CorruptCheckpointError, LimitExceededError
from mono_quant.io.tensors.headers import DTYPES, collisions, name_problem, parse_header, parse_header_bytes


def head(tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def parsed(tensors, data=0):
    raw = head(tensors)
    return parse_header_bytes(raw, len(raw) + data, "it")


def entry(shape, dtype="U8", data=0):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, data]}}


def test_a_header_of_32_mib_is_read_and_a_longer_one_is_not():
    longest = 32 * 1024 * 1024
    raw = struct.pack("<Q", longest) + b"{" + b" " * (longest - 2) + b"}"
    assert parse_header_bytes(raw, len(raw), "it") == ({}, 8 + longest)
    with pytest.raises(
        LimitExceededError, match=rf"it announces a header of {longest + 1} bytes, more than {longest};"
    ):
        parse_header_bytes(struct.pack("<Q", longest + 1), 1 << 40, "it")


def test_a_header_fills_the_file_at_most_and_has_two_bytes_at_least():
    assert parse_header_bytes(struct.pack("<Q", 2) + b"{}", 10, "it") == ({}, 10)
    for length, size in ((3, 10), (1, 9), (0, 8)):
        with pytest.raises(
            CorruptCheckpointError, match=rf"it has {size} bytes and announces a header of {length};"
        ):
            parse_header_bytes(struct.pack("<Q", length) + b"{}", size, "it")
    with pytest.raises(CorruptCheckpointError, match=r"it is not a whole safetensors file: it has 7 bytes"):
        parse_header_bytes(bytes(7), 7, "it")


def test_bytes_after_the_header_are_not_read_as_a_part_of_it(tmp_path):
    raw = head(entry([3], data=3)) + b"}}}"
    path = tmp_path / "it"
    path.write_bytes(raw)
    with path.open("rb") as file:
        spans, start = parse_header(file.fileno(), "it")
    assert (spans["a"].shape, spans["a"].start, spans["a"].end, start) == ((3,), 0, 3, len(raw) - 3)
    assert parse_header_bytes(raw, len(raw), "it") == (spans, start)


def test_eight_dimensions_are_taken_and_nine_are_not():
    assert parsed(entry([1] * 8, data=1), 1)[0]["a"].shape == (1,) * 8
    with pytest.raises(CorruptCheckpointError, match=r"'a' has 9 dimensions, more than 8"):
        parsed(entry([1] * 9, data=1), 1)


def test_sizes_count_also_where_another_one_is_zero():
    assert parsed(entry([0, 2**48 - 1]))[0]["a"].shape == (0, 2**48 - 1)
    with pytest.raises(CorruptCheckpointError, match=r"more elements than any tensor can have"):
        parsed(entry([0, 2**48]))
    assert parsed(entry([0, 0]))[0]["a"].shape == (0, 0) and parsed(entry([], data=1), 1)[0]["a"].shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_with_its_size(dtype):
    size = torch.empty(3, dtype=DTYPES[dtype]).nbytes
    assert parsed(entry([3], dtype, size), size)[0]["a"].dtype == DTYPES[dtype]
    with pytest.raises(CorruptCheckpointError, match=rf"which do not fit {dtype} '\[3\]'"):
        parsed(entry([3], dtype, size + 1), size + 1)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a" * 1024, None),
        ("a" * 1025, "is longer than 1024 bytes"),
        ("é" * 512, None),
        ("é" * 513, "is longer than 1024 bytes"),
        ("", "is empty"),
        ("a\u202eb", "has control or invisible characters"),
        ("__metadata__", "is reserved by the file format"),
        ("__metadata", None),
    ],
)
def test_a_name_that_cannot_be_one_is_told(name, problem):
    assert name_problem(name) == problem


def test_names_collide_where_a_file_system_would_not_tell_them_apart():
    assert collisions(["a.Weight", "b", "a.weight", "é", "e\u0301", "ß", "SS", "B"]) == [
        "B",
        "SS",
        "a.Weight",
        "a.weight",
        "b",
        "e\u0301",
        "ß",
        "é",
    ]
    assert collisions(["a", "b", "a.b"]) == []
