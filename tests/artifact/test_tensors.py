"""Tensors of a saved folder that are read one at a time are those that are read all together."""

import pytest
import torch
from models import FAMILIES

import mono_quant as mq
from mono_quant.artifact.facts import Manifest
from mono_quant.artifact.tensors import SavedTensors, read_tensors
from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.disk.manifest import FORMAT
from mono_quant.io.tensors.checkpoint import open_checkpoint


# codes in the shape of their weights; flat ones, of transposed weights as well
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2"])
def test_one_at_a_time_and_in_parts(name, tmp_path):
    folder = mq.quantize(FAMILIES[name].build(), fidelity=False).save(tmp_path / "out")
    manifest = Manifest.read(folder)
    with open_checkpoint(folder) as checkpoint:
        expected = read_tensors(checkpoint, manifest)
        saved = SavedTensors(checkpoint, manifest.tensors, manifest.layout == FORMAT)
        headers = saved.headers()
        assert headers.keys() == expected.keys() and len(manifest.tensors) > 5
        for key, tensor in expected.items():
            value = saved[key]
            assert torch.equal(value, tensor) and value.stride() == tensor.stride()
            assert (value.dtype, tuple(value.shape)) == (headers[key][0], tuple(headers[key][1]))
            if tensor.dim():
                assert torch.equal(saved.part(key, 1, 3), tensor[1:3])
        first = next(iter(manifest.tensors))
        wrong = SavedTensors(checkpoint, {first: manifest.tensors[first]._replace(shape=(3, 3))}, False)
        with pytest.raises(
            CorruptCheckpointError, match=rf"{first} is .* promises int8 codes of shape \(3, 3\)"
        ):
            wrong[first]
