"""Headers: see the room of this name."""

import json
import os
import random
import struct
import unicodedata

import pytest
import safetensors
import torch
from checkpoints import FIRST, INDEX, SECOND, SINGLE, raw, tensor, write_json
from safetensors.torch import save_file

from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MonoQuantError,
    UnsupportedModelError,
)
from mono_quant.io.tensors import headers
from mono_quant.io.tensors.checkpoint import open_checkpoint

FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def single(folder, header, data=b"", length=None):
    raw(folder / SINGLE, header, data, length)
    return folder


def test_every_dtype_is_read_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in headers.DTYPES.values():
        if dtype is not torch.bool:
            bytes_ = torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
            tensors[str(dtype)] = bytes_.view(dtype)
    tensors |= {
        "bool": torch.tensor([[True, False]]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    assert set(FLOAT8) < {value.dtype for value in tensors.values()}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as opened_checkpoint:
        assert set(opened_checkpoint) == set(tensors) and len(opened_checkpoint) == len(tensors)
        for name, value in tensors.items():
            got, header = opened_checkpoint[name], opened_checkpoint.headers[name]
            assert (got.dtype, got.shape) == (value.dtype, value.shape) == (header.dtype, header.shape)
            assert header.nbytes == value.nbytes and header.file == SINGLE
            assert torch.equal(got.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        assert opened_checkpoint.total_bytes == sum(value.nbytes for value in tensors.values())
        assert "absent" not in opened_checkpoint
        with pytest.raises(KeyError, match="absent"):
            opened_checkpoint["absent"]


@pytest.mark.parametrize("other", ["A.weight", "a.WEIGHT"])
def test_names_that_differ_by_case_are_refused(tmp_path, other):
    save_file({"a.weight": torch.ones(1), other: torch.ones(1)}, tmp_path / SINGLE)
    with pytest.raises(
        CorruptCheckpointError, match=rf"only by case or Unicode form: '{other}', 'a.weight'; rename"
    ):
        open_checkpoint(tmp_path)


def test_names_that_differ_by_unicode_form_are_refused_across_shards(tmp_path):
    composed, split = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    save_file({composed: torch.ones(1)}, tmp_path / FIRST)
    save_file({split: torch.ones(1)}, tmp_path / SECOND)
    write_json(tmp_path / INDEX, {"weight_map": {composed: FIRST, split: SECOND}})
    with pytest.raises(CorruptCheckpointError, match="only by case or Unicode form"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "'' is empty"),
        ("a\0b", r"'a\x00b' has control or invisible characters"),
        ("a\nb", r"'a\nb' has control"),
        ("\u202egnp.exe", r"'\u202egnp.exe' has control"),
        ("zero\u200bwidth", r"'zero\u200bwidth' has control"),
        ("x" * 1025, "… (1025 characters)' is longer than 1024 bytes"),
        ("é" * 513, "is longer than 1024 bytes"),
    ],
)
def test_hostile_tensor_names_are_refused_and_printed_harmlessly(tmp_path, name, words):
    single(tmp_path, {name: tensor()}, bytes(4))
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert words in str(caught.value) and "fetch the file again" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_tensor_name_is_never_a_path(tmp_path, opened):
    single(tmp_path, {"../../x": tensor()}, bytes(4))
    with open_checkpoint(tmp_path) as found:
        assert found["../../x"].item() == 0
    assert not [path for path in opened if ".." in path]


@pytest.mark.parametrize(
    "data",
    [b"", bytes(7), bytes(8), b"\x01" + bytes(7) + b"{", b"\xff" * 8 + b"{}", b"\x03" + bytes(7) + b"{}"],
)
def test_a_broken_beginning_is_typed(tmp_path, data):
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(
        CorruptCheckpointError, match=rf"{SINGLE} is not a whole safetensors file: it has \d+ bytes.*fetch"
    ):
        open_checkpoint(tmp_path)


MATRIX = {
    "truncated": ({"a": tensor()}, bytes(3), "holds 3 bytes of data, but its header describes 4; fetch"),
    "trailing": ({"a": tensor()}, bytes(5), "holds 5 bytes of data, but its header describes 4; fetch"),
    "hole": ({"a": tensor(), "b": tensor(offsets=(8, 12))}, bytes(12), "'b' starts at byte 8, .* ends at 4; fetch"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6), "'b' starts at byte 2, .* ends at 4; fetch"),
    "late start": ({"a": tensor(offsets=(4, 8))}, bytes(8), "'a' starts at byte 4, .* ends at 0; fetch"),
    "negative": ({"a": tensor(offsets=(-4, 0))}, b"", r"'a' has the offsets '\[-4, 0\]', which do not fit"),
    "swapped": ({"a": tensor(offsets=(4, 0))}, bytes(4), r"'a' has the offsets '\[4, 0\]', which do not fit"),
    "wrong size": ({"a": tensor(shape=(2,))}, bytes(4), r"'a' has the offsets '\[0, 4\]', which do not fit F32 '\[2\]'"),
    "three offsets": ({"a": tensor(offsets=(0, 4, 4))}, bytes(4), "'a' has the offsets .* not a pair of integers"),
    "float offset": ({"a": tensor(offsets=(0, 4.0))}, bytes(4), "'a' has the offsets .* not a pair of integers"),
    "dtype": ({"a": tensor("F33")}, bytes(4), "'a' has the unknown dtype 'F33'; fetch"),
    "dtype type": ({"a": tensor([])}, bytes(4), r"'a' has the unknown dtype '\[\]'; fetch"),
    "shape": ({"a": tensor(shape=(-1,))}, bytes(4), r"'a' has the shape '\[-1\]', not a list of sizes"),
    "bool shape": ({"a": tensor(shape=(True,))}, bytes(4), r"'a' has the shape '\[True\]', not a list of sizes"),
    "overflow": ({"a": tensor(shape=(2**32, 2**32))}, bytes(4), "more elements than any tensor can have"),
    "terabyte": ({"a": tensor(shape=(2**38,), offsets=(0, 2**40))}, bytes(4), "header describes 1099511627776; fetch"),
    "empty and huge": ({"a": tensor(shape=(0, 2**62), offsets=(0, 0))}, b"", "more elements than any tensor can"),
    "dimensions": ({"a": tensor(shape=[1] * 9)}, bytes(4), "'a' has 9 dimensions, more than 8; fetch"),
    "unknown field": ({"a": tensor() | {"x": 1}}, bytes(4), "'a' is not described by exactly dtype, shape and data"),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "'a' is not described by exactly"),
    "no object": ({"a": 1}, b"", "'a' is not described by exactly"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings to strings; write the file"),
    "metadata list": ({"__metadata__": []}, b"", "__metadata__ must map strings to strings"),
    "duplicate": ('{"a":{},"a":{}}', bytes(4), "the key 'a' is there twice; fetch"),
    "hidden duplicate": ('{"a":{},"\\u0061":1}', bytes(4), "the key 'a' is there twice"),
    "leading space": (" {}", b"", "the header does not start with '{'; fetch"),
    "array": ("[]", b"", "the header does not start with '{'"),
    "bad JSON": ("{]", b"", "the header of model.safetensors is not valid JSON: .*; fetch it again"),
    "bad UTF-8": (b'{"\xff":1}', b"", "is not valid JSON: 'utf-8' codec"),
    "surrogate": (r'{"\ud800":1}', b"", "is not valid JSON: .*surrogates not allowed"),
    "deep": ('{"a":' * 5000 + "1" + "}" * 5000, b"", "is not valid JSON: nested deeper than 64 levels"),
    "negative zero": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4), "not a pair of integers"),
}  # fmt: skip


@pytest.mark.parametrize("case", MATRIX)
def test_a_header_that_breaks_a_rule_is_refused(tmp_path, case):
    header, data, words = MATRIX[case]
    single(tmp_path, header, data)
    with pytest.raises(CorruptCheckpointError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert SINGLE in str(caught.value)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_dtype_below_a_byte_is_valid_but_unsupported(tmp_path, dtype):
    single(tmp_path, {"a": tensor(dtype, (8,))}, bytes(4))
    with pytest.raises(
        UnsupportedModelError, match=rf"'a' is stored as {dtype}, which torch cannot hold; start from"
    ):
        open_checkpoint(tmp_path)


def test_a_boolean_must_be_zero_or_one(tmp_path):
    single(tmp_path, {"a": tensor("BOOL", (3,), (0, 3))}, b"\x01\x00\x07")
    with (
        open_checkpoint(tmp_path) as found,
        pytest.raises(
            CorruptCheckpointError, match=rf"{SINGLE}: the boolean tensor 'a' holds the byte 7; fetch"
        ),
    ):
        found["a"]


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 33 << 20) + b"{")
        file.truncate(34 << 20)
    with pytest.raises(
        LimitExceededError, match=rf"{SINGLE} announces a header of {33 << 20} bytes, more than"
    ):
        open_checkpoint(tmp_path)


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "MAX_TENSORS", 2)
    single(tmp_path, {name: tensor(shape=(0,), offsets=(0, 0)) for name in "abc"})
    with pytest.raises(LimitExceededError, match=rf"{SINGLE} lists 3 tensors, more than 2; no known model"):
        open_checkpoint(tmp_path)


def mutate(data, rng):
    """Damage a file as fuzzers do: bits, pieces, numbers, words of the format."""
    data = bytearray(data)
    words = [
        b"F32",
        b"F16",
        b"BOOL",
        b"F4",
        b"[]",
        b"[0]",
        b"null",
        b"-0",
        b"1e0",
        b" ",
        b"{",
        b"}",
        b'"',
        b"\\u0000",
    ]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 5)]
        elif kind == 2:
            data[at:at] = rng.choice(words)
        elif kind == 3 and at < len(data):
            data[at] = rng.choice(b'0123456789{}[],:" ')
        elif kind == 4:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.randrange(1, 40)]
        else:
            data[at : at + 3] = rng.choice(words)
    if rng.random() < 0.7 and len(data) > 8:
        # Keep the length honest most of the time, or nothing behind it would ever be looked at.
        end = data.rfind(b"}") + 1
        data[:8] = struct.pack("<Q", max(end - 8, 0))
    return bytes(data)


def invent(rng):
    """A file built to the rules, but for a few slips."""
    dtypes = [*headers.DTYPES, "F4", "F64"]
    header, reached = {}, 0
    for name in rng.sample(["a", "b", "é", "a/b", "A", "__metadata__", ""], rng.randrange(4)):
        dtype, shape = rng.choice(dtypes), [rng.randrange(4) for _ in range(rng.choice([0, 1, 1, 2, 3, 9]))]
        width = headers.DTYPES[dtype].itemsize if dtype in headers.DTYPES else 1
        size = width * torch.Size(shape).numel() + (rng.random() < 0.02)
        header[name] = tensor(dtype, shape, (reached, reached + size))
        if rng.random() < 0.03:
            header[name][rng.choice(["extra", "dtype", "shape"])] = rng.choice([None, "F32", [1], [1.0]])
        reached += size
    names = list(header)
    rng.shuffle(names)
    text = json.dumps({name: header[name] for name in names}, ensure_ascii=rng.random() < 0.5)
    raw_header = (text + " " * rng.randrange(3)).encode()
    return struct.pack("<Q", len(raw_header)) + raw_header + bytes(reached + (rng.random() < 0.02))


def test_whatever_passes_here_the_official_library_reads_alike():
    rng = random.Random(0)
    small = {
        "a": torch.arange(3, dtype=torch.float32),
        "b": torch.ones(2, 2, dtype=torch.int8),
        "c": torch.ones(0, 3),
    }
    seeds = [
        safetensors.torch.save(small, metadata={"format": "pt"}),
        safetensors.torch.save({"x": torch.ones(1)}),
    ]
    descriptor = os.memfd_create("fuzz")
    passed = 0
    for number in range(6000):
        data = invent(rng) if number % 2 else mutate(rng.choice(seeds), rng)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        try:
            spans, start = headers.parse_header(descriptor, SINGLE)
        except MonoQuantError:
            continue
        passed += 1
        official = dict(safetensors.deserialize(data))
        assert official.keys() == spans.keys()
        for name, span in spans.items():
            assert headers.DTYPES[official[name]["dtype"]] is span.dtype
            assert tuple(official[name]["shape"]) == span.shape
            assert bytes(official[name]["data"]) == data[start + span.start : start + span.end]
    os.close(descriptor)
    assert passed > 1000
