"""Reading what strangers left in a folder: regular files only, and whole."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from mono_quant.errors import CorruptCheckpointError, MissingFileError, UnsafeInputError
from mono_quant.io.text import printable

# Bytes that are read at a time: they stay in the caches until they are hashed or written.
_CHUNK = 1 << 20
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_cache_link(path: Path) -> bool:
    """Tell whether a link is one of the Hugging Face cache: snapshots/<commit>/… to blobs/<hash> of the same repo."""
    try:
        where, target = path.parent.resolve(), path.resolve()
    except RuntimeError:  # pathlib's word for a link loop
        return False
    for folder in (where, *where.parents):
        if folder.parent.name == "snapshots":
            blobs = folder.parent.parent / "blobs"
            return target.parent == blobs and _BLOB.fullmatch(target.name) is not None
    return False


def open_regular(path: Path) -> int:
    """Open a regular file for reading; the caller closes the descriptor.

    Args:
        path: the file; its folder is trusted, its last part is not. Only links of the Hugging Face cache are followed.

    Returns:
        A file descriptor.

    Raises:
        MissingFileError: there is no such file.
        UnsafeInputError: it is a link that leaves its place, or no regular file.
        CorruptCheckpointError: the file system does not let it be read.
    """
    shown = printable(path, 400)
    try:
        if path.is_symlink():
            if not is_cache_link(path):
                raise UnsafeInputError(f"{shown} is a symbolic link; put a copy of the file there")
            path = path.resolve(strict=True)
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise MissingFileError(f"{shown} is missing; fetch the checkpoint again") from error
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a link loop behind the cache's
        raise CorruptCheckpointError(f"{shown} cannot be opened ({error}); fetch it again") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeInputError(f"{shown} is not a regular file; remove it or fetch the checkpoint again")
    return descriptor


def read_from_front_to_back(descriptor: int) -> None:
    """Tell the system that an open file is about to be read so, that it fetches more of it ahead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def read_all(descriptor: int, size: int, offset: int = 0) -> bytes:
    """Read exactly `size` bytes, or fewer where the file ends."""
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return b"".join(pieces)


def read_into(data: memoryview, descriptor: int, offset: int, file: str) -> None:
    """Fill memory with the bytes of an open file that begin at `offset`.

    Args:
        file: how to call it in an error.

    Raises:
        CorruptCheckpointError: it ends earlier, or cannot be read.
    """
    # Read, never mapped: a mapped file that shrinks kills the process.
    while data:
        try:
            count = os.preadv(descriptor, [data], offset)
        except OSError as error:
            raise CorruptCheckpointError(
                f"{file} cannot be read ({error.strerror}); check the disk"
            ) from error
        if count == 0:
            raise CorruptCheckpointError(f"{file} became shorter while it was read; fetch it again")
        data, offset = data[count:], offset + count


def read_chunks(descriptor: int, size: int, source: str | os.PathLike[str]) -> Iterator[memoryview]:
    """Yield the first `size` bytes in pieces, each in the place of the one before.

    Raises:
        CorruptCheckpointError: the file ends earlier.
    """
    read_from_front_to_back(descriptor)
    window = memoryview(bytearray(min(size, _CHUNK)))
    reached = 0
    while reached < size:
        count = os.preadv(descriptor, [window[: size - reached]], reached)
        if count == 0:
            raise CorruptCheckpointError(
                f"{printable(source, 400)} became shorter while it was read; fetch it again"
            )
        yield window[:count]
        reached += count


def tree(folder: Path) -> list[tuple[str, bool]]:
    """List everything but folders: its relative name, and whether it is a regular file."""
    found = []
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in names + links:
            path = Path(where) / name
            found.append((path.relative_to(folder).as_posix(), stat.S_ISREG(path.lstat().st_mode)))
    return sorted(found)
