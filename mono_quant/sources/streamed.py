"""A checkpoint that stays in its files: a skeleton of its model, and where each of its tensors lies."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mono_quant.io.phases import phase
from mono_quant.io.tensors.blockwise import Blockwise, scale_dtype
from mono_quant.io.tensors.checkpoint import Checkpoint, WeightFile, open_checkpoint
from mono_quant.io.tensors.listing import Listing
from mono_quant.sources.folder import savable_folder
from mono_quant.sources.opening import place_of
from mono_quant.sources.source import Access, Source
from mono_quant.stream.blocks import dtype_of
from mono_quant.stream.spec import Piece
from mono_quant.stream.supply import FolderSupply, Supply


@dataclass(frozen=True)
class Streamed:
    """A source whose weights nobody has read.

    Attributes:
        source: with a skeleton that could be saved, once it has weights.
        pieces: where the tensors of the checkpoint lie, by name.
        supply: of its files.
        identity: by which it is known again, as plain JSON.
        checkpoint: the files, open; None where they are not here.
    """

    source: Source
    pieces: Mapping[str, Piece]
    supply: Supply
    identity: Mapping[str, Any]
    checkpoint: Checkpoint | None = None


@contextmanager
def open_streamed(source: str | Path, access: Access) -> Iterator[Streamed]:
    """Open a checkpoint without reading its weights.

    Args:
        source: a folder.
        access: how to reach it.

    Raises:
        MonoQuantError: a typed error for everything that cannot be converted so.
    """
    assert place_of(source, access) == "local"
    folder = Path(source)
    with open_checkpoint(folder) as checkpoint:
        with phase("Reading the headers"):
            opened = savable_folder(folder, access, checkpoint)
        files = checkpoint.weight_files()
        identity = {
            "folder": str(folder.resolve()),
            "files": {file.path.name: _told(file) for file in files},
        }
        pieces = with_scales(_pieces(checkpoint.listing), opened.codes)
        yield Streamed(opened, pieces, FolderSupply(files), identity, checkpoint)


def _told(file: WeightFile) -> dict[str, int]:
    """Say by what a file is known again."""
    _, _, size, modified = file.identity
    return {"bytes": size, "modified_ns": modified}


def _pieces(listing: Listing) -> dict[str, Piece]:
    return {
        name: Piece(name, h.file, h.start, _name(h.dtype), h.shape, h.nbytes)
        for name, h in listing.tensors.items()
    }


def with_scales(held: Mapping[str, Piece], codes: Blockwise | None) -> dict[str, Piece]:
    """Return where the tensors of a checkpoint lie, its fp8 weights with their scales, which are none of its tensors then.

    Args:
        held: every tensor in the files, by name.
        codes: which of them are fp8, where some are.
    """
    if codes is None:
        return dict(held)
    pieces = {name: piece for name, piece in held.items() if name not in codes.hidden}
    for name, (inverse, block) in codes.scaled.items():
        scales = held[inverse]
        rows, columns = held[name].shape[-2:]
        pieces[name] = held[name]._replace(
            block=block,
            # one scale for a whole matrix comes in several shapes, and bytes may stand for powers of two
            inverse=scales._replace(
                shape=(*held[name].shape[:-2], -(-rows // block[0]), -(-columns // block[1])),
                dtype=_name(scale_dtype(dtype_of(scales.dtype))),
            ),
            read_as=_name(codes.dtype),
        )
    return pieces


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
