"""A checkpoint that stays in its files: a skeleton of its model, and where each of its tensors lies."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_quant.errors import SourceNotFoundError
from mono_quant.io.disk.allowed import is_allowed
from mono_quant.io.hub.repo import resolve
from mono_quant.io.memory import uncollected
from mono_quant.io.phases import phase
from mono_quant.io.tensors.blockwise import Blockwise, scale_dtype
from mono_quant.io.tensors.checkpoint import Checkpoint, WeightFile, open_checkpoint
from mono_quant.io.tensors.headers import TORCH_NAMES
from mono_quant.io.tensors.listing import Listing
from mono_quant.sources.folder import savable_folder
from mono_quant.sources.guards import read_config
from mono_quant.sources.opening import looked_up, place_of
from mono_quant.sources.remote import remote_listing, savable_repository
from mono_quant.sources.source import Access, Source
from mono_quant.stream.blocks import dtype_of
from mono_quant.stream.hub_supply import HubSupply
from mono_quant.stream.spec import Piece
from mono_quant.stream.supply import FolderSupply, Supply

# Of files that are downloaded one is used, one arrives, and one more may hold tensors of the same shard.
ROOM = 3


@dataclass(frozen=True)
class Streamed:
    """A source whose weights nobody has read.

    Attributes:
        source: with a skeleton that could be saved, once it has weights.
        pieces: where the tensors of the checkpoint lie, by name.
        identity: by which it is known again, as plain JSON.
        supply: makes its files come; gets a folder that it may use meanwhile.
        room: number of its files that may be here at once; None where they are here anyway.
        checkpoint: the files, open; None where they are not here.
    """

    source: Source
    pieces: Mapping[str, Piece]
    identity: Mapping[str, Any]
    supply: Callable[[Path], Supply]
    room: int | None = None
    checkpoint: Checkpoint | None = None


@contextmanager
def open_streamed(source: str | Path, access: Access) -> Iterator[Streamed]:
    """Open a checkpoint without reading its weights.

    Args:
        source: a folder or a Hub id.
        access: how to reach it.

    Raises:
        MonoQuantError: a typed error for everything that cannot be converted so.
    """
    place = place_of(source, access)
    if place == "memory":
        raise SourceNotFoundError(
            f"an object of type {type(source).__name__} cannot be streamed; pass a folder or a Hub id such as 'org/model'"
        )
    if place == "hub":
        with looked_up(str(source), access):
            found = _from_hub(str(source), access)
        yield found
        return
    folder = Path(source)
    read_config(folder)  # which says what the folder is, where it is no checkpoint
    with open_checkpoint(folder) as checkpoint:
        files = checkpoint.weight_files()
        with phase("Reading the headers"):
            opened = savable_folder(folder, access, checkpoint.listing, files)
        identity = {
            "folder": str(folder.resolve()),
            "files": {file.path.name: _told(file) for file in files},
        }
        pieces = with_scales(_pieces(checkpoint.listing), opened.codes)
        supply = FolderSupply(files)
        yield Streamed(opened, pieces, identity, lambda scratch: supply, checkpoint=checkpoint)


def weight_bytes(source: str | Path, access: Access) -> int:
    """Return the size of the safetensors files of a source; 0 where it has none, or is no such place.

    Args:
        source: a folder or a Hub id.
        access: how to reach it.

    Raises:
        MonoQuantError: the source cannot be found.
    """
    if place_of(source, access) == "local":
        sizes = {path.name: path.stat().st_size for path in Path(source).glob("*.safetensors")}
    else:
        with looked_up(str(source), access):
            facts = resolve(str(source), revision=access.revision, hub=access.client)
        sizes = {file.path: file.size for file in facts.files if "/" not in file.path}
    return sum(size for name, size in sizes.items() if name.endswith(".safetensors") and is_allowed(name))


def _from_hub(repo_id: str, access: Access) -> Streamed:
    facts = resolve(repo_id, revision=access.revision, hub=access.client)
    listing = remote_listing(facts, access.client)
    opened = savable_repository(facts, access, listing)
    identity = {"repo_id": facts.repo_id, "commit": facts.sha}
    pieces = with_scales(_pieces(listing), opened.codes)
    return Streamed(
        opened, pieces, identity, lambda scratch: HubSupply(facts, listing, scratch, access.client), ROOM
    )


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
