"""Pickles: see the room of this name."""

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoints import sharded, weights

from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    MonoQuantError,
    PickleOnlyError,
    UnsafeInputError,
)
from mono_quant.io.disk import disk
from mono_quant.io.tensors import checkpoint, pickles
from mono_quant.io.tensors.checkpoint import open_checkpoint


def no_process(*_, **__):
    raise AssertionError("no process may start")


def test_pickles_alone_are_refused_with_a_remedy(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(pickles.subprocess, "run", no_process)
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    opened.clear()
    with pytest.raises(
        PickleOnlyError, match=r"only pickle weights \('pytorch_model\.bin'\).*convert it with .* allow_p"
    ):
        open_checkpoint(tmp_path)
    assert not [path for path in opened if path.endswith(".bin")]


def test_pickles_beside_safetensors_are_never_touched(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(pickles.subprocess, "run", no_process)
    (sharded(tmp_path) / "pytorch_model.bin").write_bytes(b"whatever")
    opened.clear()
    with open_checkpoint(tmp_path, allow_pickle=True) as found:
        assert len(found) == 3
    assert not [path for path in opened if path.endswith(".bin")]


def test_pickles_are_converted_on_request_and_the_copy_goes_away(tmp_path, monkeypatch):
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


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path):
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


def test_no_code_path_reads_pickles_in_full():
    for path in Path(checkpoint.__file__).parents[2].rglob("*.py"):
        assert "weights_only=False" not in path.read_text(encoding="utf-8"), path


def load_pickle(folder, value, **options):
    torch.save(value, folder / "pytorch_model.bin", **options)
    return pickles._load_pickle(folder / "pytorch_model.bin")


def test_compressed_records_are_refused(tmp_path):
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
        pickles._load_pickle(tmp_path / "pytorch_model.bin")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_what_is_no_dense_tensor_is_named(tmp_path):
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
def test_what_is_no_state_dict_is_refused(tmp_path, value):
    with pytest.raises(
        UnsafeInputError, match=r"is not a dict of names to tensors; save model\.state_dict\(\) inst"
    ):
        load_pickle(tmp_path, value)


def test_many_views_of_one_storage_are_refused(tmp_path):
    base = torch.ones(300_000)
    with pytest.raises(
        LimitExceededError, match=r"describes tensors of more than twice its size; do not use it"
    ):
        load_pickle(tmp_path, {f"w{number}": base for number in range(10)})


@pytest.mark.parametrize(
    "names", [["-00001-of-00002"], ["", "-00001-of-00001"], ["-00001-of-00001", "-00002-of-00002"]]
)
def test_an_incomplete_set_of_pickles_is_refused(tmp_path, names, monkeypatch):
    monkeypatch.setattr(pickles.subprocess, "run", no_process)
    for name in names:
        (tmp_path / f"pytorch_model{name}.bin").write_bytes(b"")
    with pytest.raises(
        CorruptCheckpointError, match=r"pytorch_model.* is not one complete set of files; fetch"
    ):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_other_pickles_are_not_weights(tmp_path):
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
def test_every_end_of_the_other_process_is_typed(tmp_path, monkeypatch, code, out, kind, words):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    done = subprocess.CompletedProcess([], code, stdout=out, stderr="on stderr")
    monkeypatch.setattr(pickles.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(kind, match=words):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_the_memory_of_the_other_process_is_limited(tmp_path):
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
        pickles.convert_pickles([str(path) for path in paths], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
