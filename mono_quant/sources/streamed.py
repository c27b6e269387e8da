"""A checkpoint that stays in its files: a skeleton of its model, and where each of its tensors lies."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_quant.io.memory import uncollected
from mono_quant.io.phases import phase
from mono_quant.io.tensors.blockwise import Blockwise, scale_dtype
from mono_quant.io.tensors.checkpoint import Checkpoint, WeightFile, open_checkpoint
from mono_quant.io.tensors.headers import TORCH_NAMES
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


@uncollected()
def _pieces(listing: Listing) -> dict[str, Piece]:
    return {
        name: Piece(name, h.file, h.start, TORCH_NAMES[h.dtype], h.shape, h.nbytes)
        for name, h in listing.tensors.items()
    }


@uncollected()
def with_scales(held: Mapping[str, Piece], codes: Blockwise | None) -> dict[str, Piece]:
    """Return where the tensors of a checkpoint lie, its fp8 weights with their scales, which are none of its tensors then.

    Args:
        held: every tensor in the files, by name.
        codes: which of them are fp8, where some are.
    """
    if codes is None:
        return dict(held)
    pieces = {}
    for name, piece in held.items():
        if name in codes.scaled:
            inverse, block = codes.scaled[name]
            scales = _scales(held[inverse], piece.shape, block)
            pieces[name] = Piece(*piece[:6], block, scales, TORCH_NAMES[codes.dtype])
        elif name not in codes.hidden:
            pieces[name] = piece
    return pieces


def _scales(held: Piece, shape: tuple[int, ...], block: tuple[int, int]) -> Piece:
    """Return scales as those of a weight of `shape`: one for a whole matrix comes in several shapes."""
    name, file, start, dtype, _, nbytes, *_ = held
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return Piece(name, file, start, TORCH_NAMES[scale_dtype(dtype_of(dtype))], grid, nbytes)
