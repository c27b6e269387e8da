"""Shards: see the room of this name."""

import json

import pytest
import safetensors
import torch
from checkpoints import INDEX, SINGLE, weights

from mono_quant.errors import (
    ConfigError,
    OutputError,
)
from mono_quant.io.disk.output import new_folder
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.io.tensors.shards import plan_shards, write_checkpoint
from mono_quant.io.tensors.tensor_file import TensorEntry


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
        ConfigError, match=rf"max_shard_size is '?{size}'?; give a (positive )?number of bytes, or .*'5GB'"
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
