"""A checkpoint is proven whole before its weights are read, and reading never leaves the folder."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import FIRST, INDEX, SECOND, SINGLE, raw, sharded, tensor, weights, write_json
from safetensors.torch import save_file

from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    UnsafeInputError,
)
from mono_quant.io.disk.json_text import read_json
from mono_quant.io.tensors import checkpoint
from mono_quant.io.tensors.checkpoint import open_checkpoint


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


def test_shards_are_read_and_each_read_has_memory_of_its_own(tmp_path):
    with open_checkpoint(sharded(tmp_path)) as found:
        assert found.files == (FIRST, SECOND) and found.folder == tmp_path
        found["a.weight"].zero_()
        for name, value in weights().items():
            assert torch.equal(found[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_parts_are_those_of_the_whole(tmp_path, dtype):
    whole = torch.arange(5 * 3 * 4).reshape(5, 3, 4).remainder(7).to(dtype)
    save_file({"w": whole, "scalar": torch.tensor(1.0), "none": torch.zeros(0, 3)}, tmp_path / SINGLE)
    with open_checkpoint(tmp_path) as found:
        for start, stop in ((0, 5), (1, 2), (4, 5), (2, 2)):
            part = found.part("w", start, stop)
            assert part.dtype == dtype and torch.equal(part, whole[start:stop])
        assert found.part("none", 0, 0).shape == (0, 3)
        for name, start, stop in (("w", 4, 6), ("w", -1, 2), ("w", 3, 2), ("scalar", 0, 1)):
            with pytest.raises(IndexError, match=rf"'{name}' is \(.*\); it has no part {start} to {stop}"):
                found.part(name, start, stop)


def test_files_without_an_index_are_opened_by_name(tmp_path):
    (sharded(tmp_path) / INDEX).unlink()
    with checkpoint.open_files(tmp_path, [SECOND, FIRST]) as found:
        assert found.files == (FIRST, SECOND) and torch.equal(found["c.weight"], weights()["c.weight"])


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
def test_a_shard_outside_the_folder_is_refused_unopened(tmp_path, name, opened):
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


def test_an_absolute_shard_name_reveals_nothing(tmp_path):
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


def test_links_out_of_the_folder_are_refused(tmp_path, opened):
    folder = sharded(tmp_path / "in")
    shutil.move(folder / FIRST, tmp_path / "elsewhere.safetensors")
    (folder / FIRST).symlink_to(tmp_path / "elsewhere.safetensors")
    opened.clear()
    with pytest.raises(
        UnsafeInputError, match=rf"{FIRST}' is a symbolic link; put a copy of the file there$"
    ):
        open_checkpoint(folder)
    assert not [path for path in opened if "elsewhere" in path]


@pytest.mark.parametrize("linked", [INDEX, SINGLE])
def test_index_and_single_file_may_not_be_links_either(tmp_path, linked):
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


def test_the_hub_cache_passes_but_not_the_blobs_of_another_repo(tmp_path):
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


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a folder", "dangling", "loop", "device"])
def test_anything_but_a_regular_file_is_refused_at_once(tmp_path, kind):
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
        open_checkpoint(folder)
    assert time.monotonic() - start < 2


def test_missing_shards_are_all_named(tmp_path):
    folder = sharded(tmp_path)
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()
    with pytest.raises(
        MissingFileError, match=rf"lacks '{FIRST}', '{SECOND}', which its index names; fetch them"
    ):
        open_checkpoint(folder)


def test_index_and_shards_must_agree_in_both_directions(tmp_path):
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


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    save_file({name: torch.zeros(1) for name in ("a.weight", "b.weight", "c.weight")}, folder / SECOND)
    with pytest.raises(CorruptCheckpointError, match=rf"'a\.weight' is in {FIRST} and {SECOND}; fetch"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [None, [], "x", 1, {}, {"a": 1}, {"a": None}, {"a": ["x"]}])
def test_a_weight_map_of_a_wrong_type_is_typed(tmp_path, value):
    write_json(sharded(tmp_path) / INDEX, {"weight_map": value})
    with pytest.raises(
        CorruptCheckpointError, match=rf"{INDEX}: 'weight_map' (must map names to files|is empty); fetch"
    ):
        open_checkpoint(tmp_path)


def test_metadata_may_be_missing_or_lie_but_must_be_an_object(tmp_path):
    write_json(
        sharded(tmp_path) / INDEX, {"weight_map": {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND}}
    )
    open_checkpoint(tmp_path).close()
    with open_checkpoint(sharded(tmp_path, metadata={"total_size": 1})) as found:
        assert found.total_bytes == 3 * 13 * 17 * 4
    with pytest.raises(CorruptCheckpointError, match=rf"{INDEX}: 'metadata' must be an object; fetch"):
        open_checkpoint(sharded(tmp_path, metadata=[]))


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', "", "{", '{"weight_map": NaN}'])
def test_an_index_that_is_no_object_is_typed(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_text(text)
    with pytest.raises(
        CorruptCheckpointError, match=rf"{INDEX} (holds a JSON|is not valid JSON).*fetch it again"
    ):
        open_checkpoint(tmp_path)


def test_a_single_file_beside_an_index_is_refused(tmp_path):
    save_file(weights(), sharded(tmp_path) / SINGLE)
    with pytest.raises(
        CorruptCheckpointError, match=rf"holds both {SINGLE} and {INDEX}.*delete {SINGLE} if the"
    ):
        open_checkpoint(tmp_path)
    write_json(tmp_path / INDEX, {"weight_map": dict.fromkeys(weights(), SINGLE)})
    with open_checkpoint(tmp_path) as found:
        assert found.files == (SINGLE,)


def test_a_tensor_larger_than_the_memory_is_refused(tmp_path):
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


def test_memory_that_is_not_there_is_typed(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("not enough memory: you tried to allocate")

    with open_checkpoint(sharded(tmp_path)) as found:
        monkeypatch.setattr(checkpoint.torch, "empty", no_memory)
        with pytest.raises(
            LimitExceededError, match=r"'a\.weight' needs 884 bytes and there is not so much memory"
        ):
            found["a.weight"]


@pytest.mark.parametrize("change", ["shrink", "touch", "grow"])
def test_a_file_that_another_process_changes_is_typed(tmp_path, change):
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


def test_truncation_in_the_middle_of_a_read_is_typed(tmp_path, monkeypatch):
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


def test_a_disk_that_cannot_be_read_is_typed(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    with open_checkpoint(sharded(tmp_path)) as found:
        monkeypatch.setattr(checkpoint.os, "preadv", broken)
        with pytest.raises(
            CorruptCheckpointError, match=rf"{FIRST} cannot be read \(Input/output error\); check the"
        ):
            found["a.weight"]
