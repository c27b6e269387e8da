"""A checkpoint that stays in its files: a skeleton of its model, and where each of its tensors lies."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_quant.io.phases import phase
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.sources.folder import savable_folder
from mono_quant.sources.opening import place_of
from mono_quant.sources.source import Access, Source
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
    """

    source: Source
    pieces: Mapping[str, Piece]
    supply: Supply
    identity: Mapping[str, Any]


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
    with phase("Reading the headers"), open_checkpoint(folder) as checkpoint:
        pieces = {
            name: Piece(
                name,
                h.file,
                h.start,
                str(h.dtype).removeprefix("torch."),
                h.shape,
                h.nbytes,
            )
            for name, h in checkpoint.listing.tensors.items()
        }
        opened = savable_folder(folder, access, checkpoint)
    files = checkpoint.weight_files()
    identity = {file.path.name: list(file.identity) for file in files}
    yield Streamed(opened, pieces, FolderSupply(files), {"folder": str(folder.resolve()), "files": identity})
