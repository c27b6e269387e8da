"""Two tensors of a source are one where all of their bytes are."""

import pytest
import torch
from streams import source, supply

from mono_quant.errors import CorruptCheckpointError
from mono_quant.stream.twins import are_equal

LARGE = torch.arange(700_001, dtype=torch.float32)  # more than two windows, and not a multiple of one


def pair(tmp_path, one, other):
    found = source(tmp_path / "source", {"a": one, "unrelated": torch.ones(3)}, "one.safetensors")
    found |= source(tmp_path / "source", {"b": other}, "two.safetensors")
    return found["a"], found["b"]


@pytest.mark.parametrize("where", [None, 0, 262_143, 262_144, 700_000])
def test_every_byte_counts(tmp_path, where):
    other = LARGE.clone()
    if where is not None:
        other[where] += 1
    one, two = pair(tmp_path, LARGE, other)
    files = supply(tmp_path / "source")
    assert are_equal(one, two, files) == (where is None)
    assert are_equal(one, one, files)


@pytest.mark.parametrize(
    "other", [LARGE.view(torch.int32), LARGE[:-1], LARGE.reshape(1, -1), -torch.zeros(700_001)]
)
def test_dtype_and_shape_count(tmp_path, other):
    one, two = pair(tmp_path, torch.zeros(700_001) if other.eq(0).all() else LARGE, other)
    assert not are_equal(one, two, supply(tmp_path / "source"))


def test_scales_of_fp8_count(tmp_path):
    codes = torch.ones(16, 16).to(torch.float8_e4m3fn)
    held = {
        "a": codes,
        "b": codes.clone(),
        "x": torch.ones(1, 1),
        "y": torch.ones(1, 1),
        "z": 2 * torch.ones(1, 1),
    }
    found = source(tmp_path / "source", held)
    files = supply(tmp_path / "source")
    one, two = (
        found[name]._replace(block=(16, 16), inverse=found[scale], read_as="bfloat16")
        for name, scale in ("ax", "by")
    )
    assert are_equal(one, two, files)
    assert not are_equal(one, two._replace(inverse=found["z"]), files)
    assert not are_equal(one, found["b"], files)


def test_a_file_that_was_changed_meanwhile(tmp_path):
    one, two = pair(tmp_path, LARGE, LARGE)
    files = supply(tmp_path / "source")
    path = tmp_path / "source/two.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CorruptCheckpointError, match=r"two\.safetensors"):
        are_equal(one, two, files)
