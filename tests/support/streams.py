"""What tests of stream share: sources, plans whose header the official writer made, and what has to come out."""

import json
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from mono_quant.io.tensors.checkpoint import WeightFile, identity_of
from mono_quant.io.tensors.headers import DTYPES
from mono_quant.kernels.weights import quantize_rows, stored_scale
from mono_quant.planning.kinds import as_rows, flattened, from_rows
from mono_quant.stream.spec import Constant, Job, Piece, Place, ShardPlan
from mono_quant.stream.supply import FolderSupply


class Made(NamedTuple):
    """One tensor of a source, and what is to become of it."""

    name: str
    tensor: torch.Tensor
    action: str = "copy"
    kind: str = "linear"
    dtype: torch.dtype | None = None
    flat: bool = False
    piece: Piece | None = None


def spans(path):
    """Yield name, dtype, shape, first byte and size of the tensors of a file, as its header says."""
    with path.open("rb") as file:
        data = file.read(1 << 20)
    length = int.from_bytes(data[:8], "little")
    for name, facts in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = facts["data_offsets"]
            dtype = str(DTYPES[facts["dtype"]]).removeprefix("torch.")
            yield name, dtype, tuple(facts["shape"]), 8 + length + start, end - start


def pieces(path):
    return {
        name: Piece(name, path.name, start, dtype, shape, size)
        for name, dtype, shape, start, size in spans(path)
    }


def places(path):
    return {span[0]: Place(*span) for span in spans(path)}


def source(folder, tensors, file="model.safetensors"):
    """Write a source, and return its pieces by name."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    return pieces(folder / file)


def supply(folder):
    files = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            files.append(WeightFile(path, identity_of(file.fileno())))
    return FolderSupply(files)


def expected_of(made):
    """Return what the definitions make of a tensor, by name in the file."""
    if made.action == "copy":
        return {made.name: made.tensor}
    if made.action == "cast":
        return {made.name: made.tensor.to(made.dtype)}
    rows = quantize_rows(as_rows(made.tensor, made.kind))
    codes = from_rows(rows.codes, made.tensor.shape, made.kind).contiguous()
    return {
        made.name: flattened(codes, made.kind).clone()
        if made.flat or made.kind == "transposed_linear"
        else codes,
        f"{made.name}_scale": stored_scale(rows.scale, made.tensor.dtype),
    }


def plan_of(listed, found, path, constants=None):
    """Return the plan of the file at `path`, which has the right bytes already.

    Args:
        listed: what is made.
        found: pieces of the source.
        path: written by the official writer.
        constants: tensors that no source has.
    """
    where = places(path)
    with path.open("rb") as file:
        data = file.read(1 << 20)
    jobs = [
        Job(
            made.name,
            0,
            made.action,
            made.piece or found[made.name],
            made.kind if made.action == "int8" else "",
            where.get(made.name),
            where.get(f"{made.name}_scale") if made.action == "int8" else None,
        )
        for made in listed
        if made.name in where or f"{made.name}_scale" in where
    ]
    fixed = [
        Constant(where[name], data[where[name].start :][: where[name].nbytes]) for name in constants or ()
    ]
    begin = 8 + int.from_bytes(data[:8], "little")
    return ShardPlan(path.name, path.stat().st_size, data[:begin], tuple(jobs), tuple(fixed))


def shard_of(tmp_path, listed, constants=None):
    """Return the plan for one file, its supply, and the bytes that have to come out."""
    found = source(tmp_path / "source", {made.name: made.tensor for made in listed if made.piece is None})
    wanted = {name: tensor for made in listed for name, tensor in expected_of(made).items()}
    path = tmp_path / "wanted.safetensors"
    save_file({**wanted, **(constants or {})}, path, {"format": "pt"})
    return plan_of(listed, found, path, constants), supply(tmp_path / "source"), path.read_bytes()
