"""A checkpoint is proven whole before its weights are read, and reading never leaves the folder."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    MonoQuantError,
    OutputError,
    PickleOnlyError,
    UnsafeInputError,
    UnsupportedModelError,
)
from mono_quant.io.disk import disk
from mono_quant.io.disk.json_text import read_json, read_json_object
from mono_quant.io.disk.output import new_folder
from mono_quant.io.tensors import checkpoint, headers, pickles
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.io.tensors.shards import plan_shards, write_checkpoint
from mono_quant.io.tensors.tensor_file import TensorEntry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
OPENED: list[str] | None = None


def watch(event, arguments):
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        OPENED.append(os.fsdecode(arguments[0]))


@pytest.fixture
def opened(monkeypatch):
    """Every path that this process opens during the test."""
    if not watch.__dict__.get("installed"):
        sys.addaudithook(watch)
        watch.installed = True
    seen: list[str] = []
    monkeypatch.setitem(globals(), "OPENED", seen)
    return seen


def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(13, 17, generator=generator) for name in ("a.weight", "b.weight", "c.weight")}


def sharded(folder, **changes):
    """Two shards and an index, the latter with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights()
    save_file({"a.weight": tensors["a.weight"]}, folder / FIRST)
    save_file({name: tensors[name] for name in ("b.weight", "c.weight")}, folder / SECOND)
    weight_map = {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND} | changes.pop("weight_map", {})
    write_json(folder / INDEX, {"metadata": {"total_size": 2652}, "weight_map": weight_map} | changes)
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def raw(path, header, data=b"", length=None):
    """A file with this header, given as an object, text or bytes."""
    if not isinstance(header, bytes | str):
        header = json.dumps(header)
    header = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def single(folder, header, data=b"", length=None):
    raw(folder / SINGLE, header, data, length)
    return folder


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def cache_of(folder, base):
    """The same files as a download in the Hugging Face cache."""
    blobs, snapshot = base / "models--a--b" / "blobs", base / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / f"{number:064x}"
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


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


def test_shards_are_read_and_each_read_has_memory_of_its_own(tmp_path):
    with open_checkpoint(sharded(tmp_path)) as found:
        assert found.files == (FIRST, SECOND) and found.folder == tmp_path
        found["a.weight"].zero_()
        for name, value in weights().items():
            assert torch.equal(found[name], value)


def test_headers_need_no_weights_and_a_closed_checkpoint_says_so(tmp_path):
    found = open_checkpoint(sharded(tmp_path))
    found.close()
    found.close()
    assert found.headers["b.weight"].shape == (13, 17)
    with pytest.raises(ValueError, match=r"is closed; open it again"):
        found["b.weight"]


def test_descriptors_are_closed_after_success_failure_and_neglect(tmp_path):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    good, bad = sharded(tmp_path / "good"), sharded(tmp_path / "bad", weight_map={"x": FIRST})
    before = count()
    for _ in range(3):
        open_checkpoint(good).close()
        with pytest.raises(CorruptCheckpointError):
            open_checkpoint(bad)
        open_checkpoint(good)
    assert count() == before


def test_weights_of_diffusers_are_found(tmp_path):
    save_file(weights(), tmp_path / "diffusion_pytorch_model.safetensors")
    with open_checkpoint(tmp_path) as found:
        assert set(found) == set(weights())
    save_file(weights(), tmp_path / SINGLE)
    with pytest.raises(
        CorruptCheckpointError, match=r"two models, model and diffusion_pytorch_model; keep one"
    ):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"holds no model\.safetensors and no .*give the folder of a checkpoint"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(MissingFileError, match=r"absent' is not a folder; give the folder"):
        open_checkpoint(tmp_path / "absent")


HOSTILE = [
    "../elsewhere/x.safetensors",
    "a/../../elsewhere/x.safetensors",
    "sub/x.safetensors",
    "..\\elsewhere\\x.safetensors",
    "%2e%2e/elsewhere/x.safetensors",
    "%2e%2e%2felsewhere%2fx.safetensors",
    "x\0.safetensors",
    "x\n.safetensors",
    "x.safetensors\n",
    "a" * 5000 + ".safetensors",
    "",
    ".",
    "..",
    ".safetensors",
    "weights.bin",
    "x.py",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_P1_a_shard_outside_the_folder_is_refused_unopened(tmp_path, name, opened):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file({"a.weight": torch.ones(1)}, elsewhere / "x.safetensors")
    folder = sharded(tmp_path / "in", weight_map={"a.weight": name})
    opened.clear()
    with pytest.raises(
        UnsafeInputError, match=rf"{INDEX} names '.*no plain name .*; do not use this"
    ) as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert not [path for path in opened if "elsewhere" in path or path.endswith(".safetensors")]


def test_P2_an_absolute_shard_name_reveals_nothing(tmp_path):
    secret = tmp_path / "x.safetensors"
    folder = sharded(tmp_path / "in", weight_map={"a.weight": str(secret)})
    messages = []
    for exists in (False, True):
        if exists:
            save_file({"a.weight": torch.ones(1)}, secret)
        with pytest.raises(UnsafeInputError, match="no plain name") as caught:
            open_checkpoint(folder)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_P3_links_out_of_the_folder_need_permission(tmp_path, opened):
    folder = sharded(tmp_path / "in")
    shutil.move(folder / FIRST, tmp_path / "elsewhere.safetensors")
    (folder / FIRST).symlink_to(tmp_path / "elsewhere.safetensors")
    opened.clear()
    with pytest.raises(
        UnsafeInputError, match=rf"{FIRST}' is a symbolic link; put a copy of the file there$"
    ):
        open_checkpoint(folder)
    assert not [path for path in opened if "elsewhere" in path]
    with open_checkpoint(folder, allow_symlinks=True) as found:
        assert torch.equal(found["a.weight"], weights()["a.weight"])


@pytest.mark.parametrize("linked", [INDEX, SINGLE])
def test_P3_index_and_single_file_may_not_be_links_either(tmp_path, linked):
    if linked == INDEX:
        folder = sharded(tmp_path / "in")
    else:
        folder = tmp_path / "in"
        folder.mkdir()
        save_file(weights(), folder / SINGLE)
    shutil.move(folder / linked, tmp_path / "elsewhere")
    (folder / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError, match=rf"{linked}' is a symbolic link"):
        open_checkpoint(folder)


def test_P3_the_hub_cache_passes_but_not_the_blobs_of_another_repo(tmp_path):
    snapshot = cache_of(sharded(tmp_path / "in"), tmp_path / "cache")
    with open_checkpoint(snapshot) as found:
        assert torch.equal(found["c.weight"], weights()["c.weight"])
    assert read_json(snapshot / INDEX)["metadata"] == {"total_size": 2652}
    blob = (snapshot / FIRST).resolve()
    other = tmp_path / "cache" / "models--x--y" / "blobs"
    other.mkdir(parents=True)
    for target in (other / blob.name, blob.with_name("not-a-hash")):
        shutil.copy(blob, target)
        (snapshot / FIRST).unlink()
        (snapshot / FIRST).symlink_to(os.path.relpath(target, snapshot))
        with pytest.raises(UnsafeInputError, match=rf"{FIRST}' is a symbolic link"):
            open_checkpoint(snapshot)


@pytest.mark.parametrize("allow_symlinks", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a folder", "dangling", "loop", "device"])
def test_P3_anything_but_a_regular_file_is_refused_at_once(tmp_path, kind, allow_symlinks):
    folder = sharded(tmp_path)
    path = folder / FIRST
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        targets = {"link to a folder": tmp_path, "dangling": "nowhere", "loop": path, "device": "/dev/zero"}
        path.symlink_to(targets[kind])
    start = time.monotonic()
    with pytest.raises(
        (UnsafeInputError, CorruptCheckpointError),
        match=rf"{FIRST}' (is a symbolic link; put|is not a regular file; remove|is missing; fetch|cannot be opened)",
    ):
        open_checkpoint(folder, allow_symlinks=allow_symlinks)
    assert time.monotonic() - start < 2


def test_P5_missing_shards_are_all_named(tmp_path):
    folder = sharded(tmp_path)
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()
    with pytest.raises(
        MissingFileError, match=rf"lacks '{FIRST}', '{SECOND}', which its index names; fetch them"
    ):
        open_checkpoint(folder)


def test_P6_index_and_shards_must_agree_in_both_directions(tmp_path):
    with pytest.raises(
        CorruptCheckpointError, match=rf"1 tensors: 'x' is not in {FIRST}; fetch the checkpoint again"
    ):
        open_checkpoint(sharded(tmp_path / "more", weight_map={"x": FIRST}))
    with pytest.raises(
        CorruptCheckpointError, match=rf"'a\.weight' is not in {SECOND}; 'b\.weight' is not in {FIRST}; f"
    ):
        open_checkpoint(sharded(tmp_path / "moved", weight_map={"a.weight": SECOND, "b.weight": FIRST}))
    folder = sharded(tmp_path / "less")
    write_json(folder / INDEX, {"weight_map": {"a.weight": FIRST, "b.weight": SECOND}})
    with pytest.raises(CorruptCheckpointError, match=r"'c\.weight' is not in the index; fetch"):
        open_checkpoint(folder)


def test_P7_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    save_file({name: torch.zeros(1) for name in ("a.weight", "b.weight", "c.weight")}, folder / SECOND)
    with pytest.raises(CorruptCheckpointError, match=rf"'a\.weight' is in {FIRST} and {SECOND}; fetch"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [None, [], "x", 1, {}, {"a": 1}, {"a": None}, {"a": ["x"]}])
def test_P8_a_weight_map_of_a_wrong_type_is_typed(tmp_path, value):
    write_json(sharded(tmp_path) / INDEX, {"weight_map": value})
    with pytest.raises(
        CorruptCheckpointError, match=rf"{INDEX}: 'weight_map' (must map names to files|is empty); fetch"
    ):
        open_checkpoint(tmp_path)


def test_P8_P9_metadata_may_be_missing_or_lie_but_must_be_an_object(tmp_path):
    write_json(
        sharded(tmp_path) / INDEX, {"weight_map": {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND}}
    )
    open_checkpoint(tmp_path).close()
    with open_checkpoint(sharded(tmp_path, metadata={"total_size": 1})) as found:
        assert found.total_bytes == 3 * 13 * 17 * 4
    with pytest.raises(CorruptCheckpointError, match=rf"{INDEX}: 'metadata' must be an object; fetch"):
        open_checkpoint(sharded(tmp_path, metadata=[]))


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', "", "{", '{"weight_map": NaN}'])
def test_P8_an_index_that_is_no_object_is_typed(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_text(text)
    with pytest.raises(
        CorruptCheckpointError, match=rf"{INDEX} (holds a JSON|is not valid JSON).*fetch it again"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("other", ["A.weight", "a.WEIGHT"])
def test_P9_names_that_differ_by_case_are_refused(tmp_path, other):
    save_file({"a.weight": torch.ones(1), other: torch.ones(1)}, tmp_path / SINGLE)
    with pytest.raises(
        CorruptCheckpointError, match=rf"only by case or Unicode form: '{other}', 'a.weight'; rename"
    ):
        open_checkpoint(tmp_path)


def test_P9_names_that_differ_by_unicode_form_are_refused_across_shards(tmp_path):
    composed, split = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    save_file({composed: torch.ones(1)}, tmp_path / FIRST)
    save_file({split: torch.ones(1)}, tmp_path / SECOND)
    write_json(tmp_path / INDEX, {"weight_map": {composed: FIRST, split: SECOND}})
    with pytest.raises(CorruptCheckpointError, match="only by case or Unicode form"):
        open_checkpoint(tmp_path)


def test_P10_a_single_file_beside_an_index_is_refused(tmp_path):
    save_file(weights(), sharded(tmp_path) / SINGLE)
    with pytest.raises(
        CorruptCheckpointError, match=rf"holds both {SINGLE} and {INDEX}.*delete {SINGLE} if the"
    ):
        open_checkpoint(tmp_path)
    write_json(tmp_path / INDEX, {"weight_map": dict.fromkeys(weights(), SINGLE)})
    with open_checkpoint(tmp_path) as found:
        assert found.files == (SINGLE,)


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
def test_P12_hostile_tensor_names_are_refused_and_printed_harmlessly(tmp_path, name, words):
    single(tmp_path, {name: tensor()}, bytes(4))
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert words in str(caught.value) and "fetch the file again" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_P12_a_tensor_name_is_never_a_path(tmp_path, opened):
    single(tmp_path, {"../../x": tensor()}, bytes(4))
    with open_checkpoint(tmp_path) as found:
        assert found["../../x"].item() == 0
    assert not [path for path in opened if ".." in path]


@pytest.mark.parametrize(
    "data",
    [b"", bytes(7), bytes(8), b"\x01" + bytes(7) + b"{", b"\xff" * 8 + b"{}", b"\x03" + bytes(7) + b"{}"],
)
def test_S1_a_broken_beginning_is_typed(tmp_path, data):
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
def test_S2_S3_a_header_that_breaks_a_rule_is_refused(tmp_path, case):
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


def test_S3_a_boolean_must_be_zero_or_one(tmp_path):
    single(tmp_path, {"a": tensor("BOOL", (3,), (0, 3))}, b"\x01\x00\x07")
    with (
        open_checkpoint(tmp_path) as found,
        pytest.raises(
            CorruptCheckpointError, match=rf"{SINGLE}: the boolean tensor 'a' holds the byte 7; fetch"
        ),
    ):
        found["a"]


def test_S4_a_huge_header_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 33 << 20) + b"{")
        file.truncate(34 << 20)
    with pytest.raises(
        LimitExceededError, match=rf"{SINGLE} announces a header of {33 << 20} bytes, more than"
    ):
        open_checkpoint(tmp_path)


def test_S4_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "MAX_TENSORS", 2)
    single(tmp_path, {name: tensor(shape=(0,), offsets=(0, 0)) for name in "abc"})
    with pytest.raises(LimitExceededError, match=rf"{SINGLE} lists 3 tensors, more than 2; no known model"):
        open_checkpoint(tmp_path)


def test_S5_a_tensor_larger_than_the_memory_is_refused(tmp_path):
    size = 1 << 42
    header = json.dumps({"a": tensor("U8", (size,), (0, size))}).encode()
    path = raw(tmp_path / SINGLE, header)
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("the file system has no files of this size")
    with pytest.raises(
        LimitExceededError, match=rf"'a' has {size} bytes and this machine \d+ of memory; use a larger"
    ):
        open_checkpoint(tmp_path)


def test_S5_memory_that_is_not_there_is_typed(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("not enough memory: you tried to allocate")

    with open_checkpoint(sharded(tmp_path)) as found:
        monkeypatch.setattr(checkpoint.torch, "empty", no_memory)
        with pytest.raises(
            LimitExceededError, match=r"'a\.weight' needs 884 bytes and there is not so much memory"
        ):
            found["a.weight"]


@pytest.mark.parametrize("change", ["shrink", "touch", "grow"])
def test_S6_a_file_that_another_process_changes_is_typed(tmp_path, change):
    with open_checkpoint(sharded(tmp_path)) as found:
        found["b.weight"]
        code = {
            "shrink": "import os,sys; os.truncate(sys.argv[1], 200)",
            "touch": "import os,sys; os.utime(sys.argv[1], (1, 1))",
            "grow": "import sys; open(sys.argv[1], 'ab').write(b'x')",
        }[change]
        subprocess.run([sys.executable, "-S", "-c", code, tmp_path / SECOND], check=True)
        with pytest.raises(
            CorruptCheckpointError, match=rf"{SECOND} in .* changed while it was read; stop whatever"
        ):
            found["b.weight"]
        assert torch.equal(found["a.weight"], weights()["a.weight"])


def test_S6_truncation_in_the_middle_of_a_read_is_typed(tmp_path, monkeypatch):
    real = os.preadv

    def short(descriptor, buffers, offset):
        count = real(descriptor, [buffers[0][:100]], offset)
        subprocess.run(
            [sys.executable, "-S", "-c", "import os,sys; os.truncate(sys.argv[1], 9)", tmp_path / FIRST],
            check=True,
        )
        return count

    with open_checkpoint(sharded(tmp_path)) as found:
        monkeypatch.setattr(checkpoint.os, "preadv", short)
        with pytest.raises(CorruptCheckpointError, match=rf"{FIRST} became shorter while it was read; fetch"):
            found["a.weight"]


def test_O7_a_disk_that_cannot_be_read_is_typed(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    with open_checkpoint(sharded(tmp_path)) as found:
        monkeypatch.setattr(checkpoint.os, "preadv", broken)
        with pytest.raises(
            CorruptCheckpointError, match=rf"{FIRST} cannot be read \(Input/output error\); check the"
        ):
            found["a.weight"]


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


def test_G2_whatever_passes_here_the_official_library_reads_alike():
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


BAD_JSON = {
    "empty": (b"", "Expecting value"),
    "array of depth 900": (b"[" * 900 + b"]" * 900, "nested deeper than 64 levels"),
    "object of depth 65": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
    "depth 100000": (b"[" * 100000, "nested deeper than 64 levels"),
    "digits": (b'{"a": ' + b"9" * 10000 + b"}", "an integer has 10000 digits, more than 1000"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "overflow": (b'{"a": 1e999}', "the number '1e999' is too large"),
    "duplicate": (b'{"a": 1, "a": 1}', "the key 'a' is there twice"),
    "inner duplicate": (b'[{"x\\n": 1, "x\\u000a": 1}]', r"the key 'x\\n' is there twice"),
    "byte order mark": (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "codec can't decode"),
    "Latin-1": (b'{"a": "\xe9"}', "codec can't decode"),
    "surrogate": (b'{"a": "\\uD800"}', "surrogates not allowed"),
    "trailing": (b"{} x", "Extra data"),
    "control": (b'{"a": "\n"}', "Invalid control character"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_K9_json_that_breaks_a_rule_is_refused(tmp_path, case):
    data, words = BAD_JSON[case]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=rf"config\.json'.*{words}.*; fetch it again") as caught:
        read_json(tmp_path / "config.json")
    assert str(caught.value).isprintable()


def test_K9_json_has_a_size_limit_and_a_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'"' + b"x" * (8 << 20) + b'"')
    with pytest.raises(LimitExceededError, match=r"config\.json' is larger than 8388608 bytes; no such file"):
        read_json(path)
    assert len(read_json(path, max_bytes=9 << 20)) == 8 << 20
    path.write_bytes(b"{")
    with pytest.raises(CorruptCheckpointError, match=r"^the config is not valid JSON"):
        read_json(path, what="the config")


def test_K9_the_top_must_be_an_object_where_one_is_expected(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(
        CorruptCheckpointError, match=r"config\.json' holds a JSON list where an object was expected; f"
    ):
        read_json_object(path)
    with pytest.raises(CorruptCheckpointError, match=r"^the config holds a JSON list"):
        read_json_object(path, what="the config")


def test_K9_valid_json_is_read(tmp_path):
    value = {"a": [1, -2.5, None, True, "é\u202e😀"], "b": {"": 10**900}}
    (tmp_path / "x.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_json_object(tmp_path / "x.json") == value
    (tmp_path / "x.json").write_text("[" * 64 + "]" * 64)
    assert read_json(tmp_path / "x.json")
    with pytest.raises(MissingFileError, match=r"absent\.json' is missing; fetch"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "x.json")
    with pytest.raises(UnsafeInputError, match=r"link\.json' is a symbolic link"):
        read_json(tmp_path / "link.json")
    assert read_json(tmp_path / "link.json", allow_symlinks=True)


def no_process(*_, **__):
    raise AssertionError("no process may start")


def test_K1_pickles_alone_are_refused_with_a_remedy(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(pickles.subprocess, "run", no_process)
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    opened.clear()
    with pytest.raises(
        PickleOnlyError, match=r"only pickle weights \('pytorch_model\.bin'\).*convert it with .* allow_p"
    ):
        open_checkpoint(tmp_path)
    assert not [path for path in opened if path.endswith(".bin")]


def test_K1_pickles_beside_safetensors_are_never_touched(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(pickles.subprocess, "run", no_process)
    (sharded(tmp_path) / "pytorch_model.bin").write_bytes(b"whatever")
    opened.clear()
    with open_checkpoint(tmp_path, allow_pickle=True) as found:
        assert len(found) == 3
    assert not [path for path in opened if path.endswith(".bin")]


def test_K1_pickles_are_converted_on_request_and_the_copy_goes_away(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(disk.tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    tensors = weights() | {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "view": torch.arange(12.0).reshape(3, 4).t(),
    }
    names = list(tensors)
    torch.save({name: tensors[name] for name in names[:2]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(
        OrderedDict((name, torch.nn.Parameter(tensors[name])) for name in names[2:]),
        tmp_path / "pytorch_model-00002-of-00002.bin",
        _use_new_zipfile_serialization=False,
    )
    with open_checkpoint(tmp_path, allow_pickle=True) as found:
        assert found.folder == tmp_path and set(found) == set(names)
        for name in names:
            assert torch.equal(found[name], tensors[name])
        assert list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "tmp").iterdir())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_K2_code_in_a_pickle_is_refused_and_never_run(tmp_path):
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": Evil(tmp_path / "canary")}, file)
    with pytest.raises(MonoQuantError, match=r"pickle files? .*; (do not use it|fetch them again)"):
        open_checkpoint(tmp_path, allow_pickle=True)
    torch.save({"a": Evil(tmp_path / "canary")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UnsafeInputError, match=r"a pickle file holds more than plain tensors .*; do not use it"
    ):
        open_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "canary").exists()


def test_K2_no_code_path_reads_pickles_in_full():
    for path in Path(checkpoint.__file__).parents[2].rglob("*.py"):
        assert "weights_only=False" not in path.read_text(encoding="utf-8"), path


def load_pickle(folder, value, **options):
    torch.save(value, folder / "pytorch_model.bin", **options)
    return pickles._load_pickle(folder / "pytorch_model.bin", False)


def test_K3_compressed_records_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as source,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.namelist():
            target.writestr(record, source.read(record))
    with pytest.raises(
        UnsafeInputError, match=r"pytorch_model\.bin' holds compressed records; do not use it"
    ):
        pickles._load_pickle(tmp_path / "pytorch_model.bin", False)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_K3_what_is_no_dense_tensor_is_named(tmp_path):
    value = {
        "fine": torch.ones(3),
        "claim": torch.ones(1).expand(10**10),
        "sparse": torch.eye(3).to_sparse(),
        "number": 3,
        "meta": torch.empty(3, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }
    for name, bad in value.items():
        if name != "fine":
            with pytest.raises(
                UnsafeInputError, match=rf"holds '{name}', which is no dense tensor .*; save model.state"
            ):
                load_pickle(tmp_path, {"fine": value["fine"], name: bad})
    assert set(load_pickle(tmp_path, {"fine": value["fine"]})) == {"fine"}


@pytest.mark.parametrize("value", [[torch.ones(1)], torch.ones(1), {1: torch.ones(1)}])
def test_K1_what_is_no_state_dict_is_refused(tmp_path, value):
    with pytest.raises(
        UnsafeInputError, match=r"is not a dict of names to tensors; save model\.state_dict\(\) inst"
    ):
        load_pickle(tmp_path, value)


def test_K3_many_views_of_one_storage_are_refused(tmp_path):
    base = torch.ones(300_000)
    with pytest.raises(
        LimitExceededError, match=r"describes tensors of more than twice its size; do not use it"
    ):
        load_pickle(tmp_path, {f"w{number}": base for number in range(10)})


@pytest.mark.parametrize(
    "names", [["-00001-of-00002"], ["", "-00001-of-00001"], ["-00001-of-00001", "-00002-of-00002"]]
)
def test_K1_an_incomplete_set_of_pickles_is_refused(tmp_path, names, monkeypatch):
    monkeypatch.setattr(pickles.subprocess, "run", no_process)
    for name in names:
        (tmp_path / f"pytorch_model{name}.bin").write_bytes(b"")
    with pytest.raises(
        CorruptCheckpointError, match=r"pytorch_model.* is not one complete set of files; fetch"
    ):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_K1_other_pickles_are_not_weights(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"")
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(MissingFileError, match=r"holds no model\.safetensors"):
        open_checkpoint(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    ("code", "out", "kind", "words"),
    [
        (-9, "", LimitExceededError, "stopped by signal 9, most likely for lack of memory; convert"),
        (1, '["MemoryError", ""]', LimitExceededError, "ask for far more memory than their size; do not use"),
        (1, '["RuntimeError", "DefaultCPUAllocator: x"]', LimitExceededError, "ask for far more memory"),
        (
            1,
            '["UnpicklingError", "a\\nb"]',
            UnsafeInputError,
            r"more than plain tensors \('a\\nb'\); do not use",
        ),
        (1, '["UnsafeInputError", "told"]', UnsafeInputError, "^told$"),
        (
            1,
            '["EOFError", "x"]',
            CorruptCheckpointError,
            r"cannot be read \('EOFError: x'\); fetch them again",
        ),
        (1, '["sys", "x"]', CorruptCheckpointError, "cannot be read"),
        (1, "garbage", CorruptCheckpointError, r"cannot be read \(': on stderr'\); fetch"),
    ],
)
def test_K1_every_end_of_the_other_process_is_typed(tmp_path, monkeypatch, code, out, kind, words):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    done = subprocess.CompletedProcess([], code, stdout=out, stderr="on stderr")
    monkeypatch.setattr(pickles.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(kind, match=words):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_K3_the_memory_of_the_other_process_is_limited(tmp_path):
    script = """
import torch
from mono_quant.io.tensors import pickles
pickles._limit_memory(1 << 30)
torch.ones(1 << 20)
try:
    torch.empty(1 << 31, dtype=torch.uint8)
except RuntimeError as error:
    raise SystemExit(42 if "DefaultCPUAllocator" in str(error) else 1)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 42


def test_a_tensor_in_two_pickles_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_limit_memory", lambda extra: None)
    paths = [tmp_path / "1.bin", tmp_path / "2.bin"]
    for path in paths:
        torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(CorruptCheckpointError, match=r"'w' is in two pickle files; fetch"):
        pickles.convert_pickles([str(path) for path in paths], str(tmp_path / "out"), False)
    assert not (tmp_path / "out").exists()


def test_shards_are_planned_in_order():
    sizes = {"a": 6, "b": 6, "c": 2, "d": 20, "e": 2}
    plan = plan_shards(sizes, 10)
    assert sorted(name for names in plan.values() for name in names) == sorted(sizes)
    assert all(sum(sizes[name] for name in names) <= 10 or len(names) == 1 for names in plan.values())
    assert list(plan) == [f"model-{n:05d}-of-{len(plan):05d}.safetensors" for n in range(1, len(plan) + 1)]
    assert plan_shards(sizes, "1GB") == {SINGLE: list(sizes)}
    assert plan_shards({}, 10) == {SINGLE: []}


@pytest.mark.parametrize("size", [0, -1, "many", "5XB"])
def test_a_strange_shard_size_is_refused(size):
    with pytest.raises(
        ConfigError, match=r"max_shard_size is .*; give a (positive )?number of bytes, or .*'5GB'"
    ):
        plan_shards({"a": 1}, size)


def entries():
    return [
        TensorEntry(name, value.dtype, tuple(value.shape), lambda value=value: value)
        for name, value in weights().items()
    ]


@pytest.mark.parametrize("limit", [1000, 2000, "5GB"])
def test_what_is_written_can_be_opened_here_and_by_the_official_library(tmp_path, limit):
    with new_folder(tmp_path / "out") as folder:
        plan = write_checkpoint(folder, entries(), limit)
    with open_checkpoint(tmp_path / "out") as found:
        assert found.files == tuple(sorted(plan))
        assert {name: found.headers[name].file for name in found} == {
            n: f for f, names in plan.items() for n in names
        }
        for name, value in weights().items():
            assert torch.equal(found[name], value)
    for file, names in plan.items():
        with safetensors.safe_open(tmp_path / "out" / file, "pt") as official:
            assert sorted(official.keys()) == sorted(names)
    if len(plan) > 1:
        assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {"total_size": 2652}
    else:
        assert not (tmp_path / "out" / INDEX).exists()


def test_the_unfinished_folder_can_be_read_back(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        write_checkpoint(folder, entries(), 1000)
        with open_checkpoint(folder.path) as found:
            assert set(found) == set(weights())


def test_two_entries_of_one_name_are_refused(tmp_path):
    with (
        new_folder(tmp_path / "out") as folder,
        pytest.raises(OutputError, match=r"1 tensors share a name.*; rename"),
    ):
        write_checkpoint(folder, entries() + entries()[:1], 1000)
