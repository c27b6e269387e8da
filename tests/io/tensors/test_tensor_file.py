"""Tensor file: see the room of this name."""

import pytest
import torch
from folders import listing
from safetensors.torch import save_file

from mono_quant.errors import (
    OutputError,
)
from mono_quant.io.disk.output import new_folder
from mono_quant.io.tensors import tensor_file
from mono_quant.io.tensors.shards import write_tensors
from mono_quant.io.tensors.tensor_file import TensorEntry

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BITS8 = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
OTHERS = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def zoo():
    """One tensor of every dtype, odd shapes, names that need care."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [*FLOATS, *BITS8, *OTHERS, torch.complex64]
    tensors = {}
    for number, dtype in enumerate(dtypes):
        raw = torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[f"{'zyx'[number % 3]}.{number}"] = raw.view(dtype)
    tensors["flags"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(3.0)
    tensors["empty"] = torch.zeros(0, 7, dtype=torch.bfloat16)
    tensors['quote"back\\slash/é'] = torch.ones(2)
    tensors["param"] = torch.nn.Parameter(torch.ones(3, 1))
    return tensors


def official(path, tensors):
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path.read_bytes()


def written(path, tensors):
    with new_folder(path) as folder:
        write_tensors(folder, "model.safetensors", tensors)
    return (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tensors", [zoo(), {}, {"a": torch.zeros(0)}, {"é": torch.ones(1)}])
def test_bytes_are_those_of_the_official_writer(tmp_path, tensors):
    assert written(tmp_path / "out", tensors) == official(tmp_path / "official", tensors)


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK", 100)
    tensors = {"w": torch.arange(1000.0), "v": torch.arange(7)}
    assert written(tmp_path / "out", tensors) == official(tmp_path / "official", tensors)


def test_views_are_written_with_their_values(tmp_path):
    base = torch.randn(4, 6, dtype=torch.complex64)
    views = {
        "conj": base.conj(),
        "neg": base.conj().imag,
        "t": base.t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
    }
    plain = {name: view.resolve_conj().resolve_neg().contiguous().clone() for name, view in views.items()}
    assert written(tmp_path / "out", views) == official(tmp_path / "official", plain)


def test_tensors_are_made_one_at_a_time(tmp_path):
    log = []

    class Watched:
        def __init__(self, name):
            self.name = name

        def __call__(self):
            log.append(self.name)
            return torch.full((13, 17), float(self.name))

    entries = [TensorEntry(name, torch.float32, (13, 17), Watched(name)) for name in ("2", "1", "3")]
    got = written(tmp_path / "out", entries)
    assert log == ["1", "2", "3"]
    assert got == official(tmp_path / "official", {name: torch.full((13, 17), float(name)) for name in "123"})


def test_an_entry_must_be_what_it_promised(tmp_path):
    meta = TensorEntry("w", torch.float32, (2,), lambda: torch.empty(2, device="meta"))
    other = TensorEntry("w", torch.int8, (2,), lambda: torch.ones(3))
    sparse = TensorEntry("w", torch.float32, (2, 2), lambda: torch.eye(2).to_sparse())
    for entry, words in [
        (other, r"'w' was announced as torch.int8 \[2\] and came as torch.float32 \[3\]; announce"),
        (meta, r"'w' has no plain data .*meta.*; make it dense and load it first"),
        (sparse, r"'w' has no plain data \(torch.sparse_coo, cpu\); make it dense"),
    ]:
        with pytest.raises(OutputError, match=words):
            written(tmp_path / "out", [entry])
    assert listing(tmp_path) == []


def test_unwritable_tensors_are_named_together(tmp_path):
    tensors = {
        "": torch.ones(1),
        "a\nb": torch.ones(1),
        "\u202egnp": torch.ones(1),
        "__metadata__": torch.ones(1),
        "x" * 1025: torch.ones(1),
        "double": torch.ones(1, dtype=torch.complex128),
        "deep": torch.ones([1] * 9),
        "Case": torch.ones(1),
        "case": torch.ones(1),
    }
    with pytest.raises(OutputError) as caught:
        written(tmp_path / "out", tensors)
    message = str(caught.value)
    for words in [
        "'' is empty",
        r"'a\nb' has control",
        r"'\u202egnp' has control",
        "'__metadata__' is reserved",
        "longer than 1024 bytes",
        "'double' has the dtype torch.complex128",
        "'deep' has 9 dimensions",
        "'Case' differs from another only by case",
    ]:
        assert words in message
    assert "rename or convert them" in message and message.isprintable()
    entry = TensorEntry("w", torch.float32, (1,), lambda: torch.ones(1))
    with pytest.raises(OutputError, match=r"'w' is there twice; rename"):
        written(tmp_path / "out", [entry, entry])


def test_a_header_that_no_reader_takes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", 100)
    with pytest.raises(
        OutputError, match=r"model\.safetensors would need a header of \d+ bytes.*use more shards"
    ):
        written(tmp_path / "out", zoo())
