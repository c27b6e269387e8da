"""What tests of io/tensors share."""

import json
import os
import struct

import torch
from safetensors.torch import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
OPENED: list[str] | None = None


def watch(event, arguments):
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        OPENED.append(os.fsdecode(arguments[0]))


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


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
