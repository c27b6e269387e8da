"""What bounds a pickle and the words about it."""

import subprocess
from pathlib import Path

import pytest
import torch

from mono_quant.errors import CorruptCheckpointError, LimitExceededError
from mono_quant.io.tensors import pickles
from mono_quant.io.tensors.checkpoint import open_checkpoint

MIB = 1 << 20


def test_tensors_may_be_twice_the_file_and_a_mebibyte():
    size = 1000
    most = torch.zeros(2 * size + MIB, dtype=torch.uint8)
    assert pickles._plain_tensors({"a": most}, Path("it"), size).keys() == {"a"}
    with pytest.raises(LimitExceededError, match=r"'it' describes tensors of more than twice its size"):
        pickles._plain_tensors({"a": most, "b": torch.zeros(1, dtype=torch.uint8)}, Path("it"), size)


def test_a_long_path_is_told_whole(tmp_path):
    folder = tmp_path / ("d" * 220)
    folder.mkdir()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(
        CorruptCheckpointError, match=r"is not one complete set of files; fetch it again"
    ) as caught:
        open_checkpoint(folder, allow_pickle=True)
    assert str(caught.value).startswith(f"'{folder}': 'pytorch_model-00001-of-00002.bin'")


def test_the_last_words_of_the_other_process_are_cut(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="y" + "x" * 200)
    monkeypatch.setattr(pickles.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CorruptCheckpointError, match=r"cannot be read \(': x{100}") as caught:
        open_checkpoint(tmp_path, allow_pickle=True)
    assert "yx" not in str(caught.value)
