"""Listing: see the room of this name."""

import torch
from checkpoints import INDEX, SINGLE, sharded, weights
from safetensors import safe_open
from safetensors.torch import save_file

from mono_quant.io.tensors.checkpoint import WeightFile, open_checkpoint


def test_every_tensor_lies_where_the_listing_says(tmp_path):
    folder = sharded(tmp_path / "in")
    with open_checkpoint(folder) as checkpoint:
        listing = checkpoint.listing
    assert listing.files == {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    assert listing.tensors.keys() == weights().keys()
    for name, expected in weights().items():
        tensor = listing.tensors[name]
        data = (folder / tensor.file).read_bytes()[tensor.start : tensor.start + tensor.nbytes]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert data == expected.numpy().tobytes()


def test_the_order_is_that_of_the_data(tmp_path):
    tensors = {"z": torch.ones(3, dtype=torch.float32), "a": torch.ones(5, dtype=torch.int8)}
    save_file(tensors, tmp_path / SINGLE)
    with open_checkpoint(tmp_path) as checkpoint, safe_open(tmp_path / SINGLE, "pt") as official:
        assert list(checkpoint.listing.tensors) == official.offset_keys()


def test_an_empty_tensor_has_a_place(tmp_path):
    save_file({"a": torch.ones(0, 4), "b": torch.ones(2)}, tmp_path / SINGLE)
    with open_checkpoint(tmp_path) as checkpoint:
        tensors = checkpoint.listing.tensors
    assert (tensors["a"].nbytes, tensors["b"].nbytes) == (0, 8)
    assert tensors["b"].start == (tmp_path / SINGLE).stat().st_size - 8


def test_a_weight_file_says_the_same_alone(tmp_path):
    folder = sharded(tmp_path / "in")
    with open_checkpoint(folder) as checkpoint:
        expected, opened = checkpoint.listing, checkpoint.weight_files()
    for file in opened:
        found, header = WeightFile.of(file.path)
        assert found == file
        assert header.size == expected.files[header.name]
        assert header.tensors() == {n: t for n, t in expected.tensors.items() if t.file == header.name}
    assert (folder / INDEX).is_file()
