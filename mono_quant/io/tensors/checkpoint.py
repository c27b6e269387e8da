"""A folder of safetensors files, read without trust; nothing here knows model classes.

::

    with open_checkpoint("folder") as checkpoint:
        checkpoint.headers["lm_head.weight"].shape
        checkpoint["lm_head.weight"]
"""

import hashlib
import mmap
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    MonoQuantError,
)
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.reading import open_regular, read_chunks, read_into
from mono_quant.io.memory import uncollected
from mono_quant.io.tensors.headers import DTYPE_NAMES, parse_header
from mono_quant.io.tensors.listing import (
    MAX_INDEX_BYTES,
    STEMS,
    FileHeader,
    Listing,
    TensorHeader,
    check_headers,
    find_stem,
    read_weight_map,
    weight_files,
)
from mono_quant.io.tensors.pickles import converted
from mono_quant.io.tensors.shards import index_name
from mono_quant.io.text import listed, printable

# As many as transformers uses.
_READERS = 4
# Bytes from which a tensor gets pages of its own.
_OWN_MAPPING = 1 << 20

_USUAL = re.compile(rf"(?:{'|'.join(STEMS)})(?:-\d{{5}}-of-\d{{5}})?\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file, with the ways of a slice of safetensors; `tensor[...]` reads it, each time anew.

    Attributes:
        dtype, shape: of the tensor.
    """

    dtype: torch.dtype
    shape: torch.Size
    _tensors: Mapping[str, torch.Tensor]
    _name: str

    def __getitem__(self, place: Any) -> torch.Tensor:
        whole: torch.Tensor = self._tensors[self._name]
        return whole[place]

    def get_dtype(self) -> str:
        """Return the dtype as a safetensors header has it."""
        return DTYPE_NAMES[self.dtype]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)


class _Shard(NamedTuple):
    header: FileHeader
    descriptor: int
    identity: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.header.name


class WeightFile(NamedTuple):
    """A weight file as it was when it was opened."""

    path: Path
    identity: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> tuple[Self, FileHeader]:
        """Open a weight file and prove its header.

        Returns:
            The file, and what it says about itself.

        Raises:
            MonoQuantError: as `open_checkpoint`.
        """
        with ExitStack() as resources:
            shard = _open_shard(path.parent, path.name, resources)
            return cls(path, shard.identity), shard.header

    def sha256(self) -> str | None:
        """Return the sha256 of its bytes, all of which are read; None when it is gone or was changed since."""
        try:
            descriptor = open_regular(self.path)
        except MonoQuantError:
            return None
        try:
            return _sha256(descriptor, self.path.name) if identity_of(descriptor) == self.identity else None
        finally:
            os.close(descriptor)


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of an open checkpoint; each is read anew, alone, when it is asked for.

    Attributes:
        folder: where it was opened.
        listing: where every tensor lies.
        headers: the tensors of that.
        files: the weight files, sorted.
        total_bytes: size of all tensors together.
    """

    def __init__(self, folder: Path, shards: Sequence[_Shard], resources: ExitStack) -> None:
        self.folder = folder
        self.files = tuple(shard.name for shard in shards)
        self.listing = Listing.of([shard.header for shard in shards])
        self.headers = self.listing.tensors
        self._shards = {shard.name: shard for shard in shards}
        self._pages: dict[str, mmap.mmap] = {}
        # Runs at the latest when the object or the process ends, so that no temporary folder stays.
        self._release = weakref.finalize(self, resources.close)
        self.total_bytes = sum(header.nbytes for header in self.headers.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Raises:
            KeyError: there is no such tensor.
            CorruptCheckpointError: the file changed since it was opened, or a boolean is neither 0 nor 1.
            LimitExceededError: the tensor does not fit into memory.
            ValueError: the checkpoint is closed.
        """
        header = self.headers[name]
        data = self._bytes(name, 0, header.nbytes)
        if header.dtype is torch.bool and header.nbytes and int(data.max()) > 1:
            raise CorruptCheckpointError(
                f"{header.file}: the boolean tensor {printable(name)} holds the byte {int(data.max())}; "
                "fetch the file again"
            )
        return data.view(header.dtype).reshape(header.shape)

    def mapped(self, name: str) -> torch.Tensor:
        """Return one tensor as the file has it in the system's cache: writes into it stay in this process.

        It is memory that the system can take back, and reads anew from the file: that must stay as it is while the tensor is used.
        What is small, boolean or lies where its dtype cannot be read is copied as by `[]`.

        Raises:
            as `__getitem__`.
        """
        header, shard = self.headers[name], self._shards[self.headers[name].file]
        if header.nbytes < _OWN_MAPPING or header.dtype is torch.bool or header.start % header.dtype.itemsize:
            return self[name]
        self._check_open()
        self._check_unchanged(shard)
        if shard.name not in self._pages:
            access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
            self._pages[shard.name] = mmap.mmap(shard.descriptor, shard.identity[2], **access)
        data = torch.frombuffer(
            self._pages[shard.name], dtype=torch.uint8, count=header.nbytes, offset=header.start
        )
        return data.view(header.dtype).reshape(header.shape)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read the rows `first` to `last`, without that one, of a tensor that is not boolean, seen as [rows, last dimension].

        Raises:
            as `__getitem__`.
        """
        header = self.headers[name]
        size = header.shape[-1] * header.dtype.itemsize
        data = self._bytes(name, first * size, (last - first) * size)
        return data.view(header.dtype).reshape(last - first, header.shape[-1])

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read a part of one tensor along its first dimension, from `start` to `stop`, into memory of its own.

        Raises:
            IndexError: it has no such part.
            KeyError, CorruptCheckpointError, LimitExceededError, ValueError: as `__getitem__`.
        """
        header = self.headers[name]
        if not header.shape or not 0 <= start <= stop <= header.shape[0]:
            raise IndexError(f"{printable(name)} is {tuple(header.shape)}; it has no part {start} to {stop}")
        if header.dtype is torch.bool:
            return self[name][start:stop]
        size = header.nbytes // max(1, header.shape[0])
        data = self._bytes(name, start * size, (stop - start) * size)
        return data.view(header.dtype).reshape(stop - start, *header.shape[1:])

    def _bytes(self, name: str, start: int, size: int) -> torch.Tensor:
        shard = self._shards[self.headers[name].file]
        self._check_open()
        data = memory_of(size, name)
        self._check_unchanged(shard)
        read_into(
            data.numpy().data,
            shard.descriptor,
            self.headers[name].start + start,
            shard.name,
        )
        self._check_unchanged(shard)
        return data

    def read(self, mapped: bool = False) -> dict[str, torch.Tensor]:
        """Read all tensors, several at a time; see `__getitem__` and `mapped`."""
        if mapped:
            return {name: self.mapped(name) for name in self.headers}
        with ThreadPoolExecutor(_READERS) as readers:
            return dict(zip(self.headers, readers.map(self.__getitem__, self.headers), strict=True))

    def stored(self) -> dict[str, StoredTensor]:
        """Return all tensors, to be read when they are needed."""
        return stored(self, self.headers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the headers stay, and what was mapped."""
        self._pages.clear()
        self._release()

    def _check_open(self) -> None:
        if not self._release.alive:
            raise ValueError(f"the checkpoint {printable(self.folder, 400)} is closed; open it again")

    def sha256s(self) -> dict[str, str]:
        """Return the sha256 of every weight file, by name; reads every byte."""
        found = {shard.name: _sha256(shard.descriptor, shard.name) for shard in self._shards.values()}
        return dict(sorted(found.items()))

    def weight_files(self) -> tuple["WeightFile", ...]:
        """Return the weight files, to be hashed when somebody wants to know."""
        return tuple(WeightFile(self.folder / s.name, s.identity) for s in self._shards.values())

    def _check_unchanged(self, shard: _Shard) -> None:
        check_unchanged(shard.descriptor, WeightFile(self.folder / shard.name, shard.identity))


def stored(
    tensors: Mapping[str, torch.Tensor], headers: Mapping[str, TensorHeader]
) -> dict[str, StoredTensor]:
    """Return tensors that are read when they are needed.

    Args:
        tensors: reads one each time that it is asked for it.
        headers: of all of them.
    """
    return {
        name: StoredTensor(header.dtype, torch.Size(header.shape), tensors, name)
        for name, header in headers.items()
    }


@uncollected()
def open_checkpoint(folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """Open a folder of safetensors files and prove it whole before any weight is read.

    Args:
        folder: the folder, with one file or with shards and their index.
        allow_pickle: where there are only pickle files, convert them in a process of limited memory that
            builds plain tensors and nothing else.

    Returns:
        The open checkpoint; close it, or use it in a `with`.

    Raises:
        MissingFileError: no weights, or a shard is missing.
        PickleOnlyError: there are only pickle files.
        UnsafeInputError: a shard lies elsewhere, is a foreign link or no regular file, or a pickle holds more
            than tensors.
        CorruptCheckpointError: index, headers and files contradict each other.
        LimitExceededError: unreasonable sizes.
        UnsupportedModelError: a dtype that torch cannot hold.
    """
    root = Path(folder)
    if not root.is_dir():
        raise MissingFileError(f"{printable(root, 400)} is not a folder; give the folder of a checkpoint")
    with ExitStack() as resources:
        where = root
        stem = find_stem(partial(_has, root), printable(root, 400))
        if stem is None:
            where = converted(root, allow_pickle, resources)
            stem = STEMS[0]
        weight_map = _weight_map(where, stem)
        names = weight_files(stem, weight_map)
        missing = [name for name in names if not _has(where, name)]
        if missing:
            raise MissingFileError(
                f"{printable(root, 400)} lacks {listed(missing)}, which its index names; fetch them again"
            )
        shards = [_open_shard(where, name, resources) for name in names]
        check_headers([shard.header for shard in shards], weight_map)
        _check_sizes(shards)
        return Checkpoint(root, shards, resources.pop_all())


def open_weights(folder: str | os.PathLike[str], names: Sequence[str]) -> Checkpoint:
    """Open the files that another loader reads, which are not those of `open_checkpoint` where it was asked for a variant.

    Args:
        folder: that they lie in.
        names: of safetensors files.

    Raises:
        MonoQuantError: as `open_checkpoint`.
    """
    if all(_USUAL.fullmatch(name) for name in names):
        return open_checkpoint(folder)
    return open_files(folder, names)


def open_files(folder: str | os.PathLike[str], names: Sequence[str]) -> Checkpoint:
    """Open some files of a folder, whatever else is in it.

    Args:
        folder: that they lie in.
        names: of safetensors files.

    Raises:
        MonoQuantError: as `open_checkpoint`.
    """
    root = Path(folder)
    with ExitStack() as resources:
        shards = [_open_shard(root, name, resources) for name in sorted(names)]
        check_headers([shard.header for shard in shards], {})
        _check_sizes(shards)
        return Checkpoint(root, shards, resources.pop_all())


def _has(folder: Path, name: str) -> bool:
    # A link that leads nowhere counts as present: it is refused when it is opened.
    return os.path.lexists(folder / name)


def _weight_map(folder: Path, stem: str) -> dict[str, str]:
    """Tensor name -> shard; empty where there is one file without an index."""
    index_file = index_name(stem)
    if not _has(folder, index_file):
        return {}
    index = read_json_object(folder / index_file, what=index_file, max_bytes=MAX_INDEX_BYTES)
    return read_weight_map(index, stem, _has(folder, f"{stem}.safetensors"), printable(folder, 400))


def _open_shard(folder: Path, name: str, resources: ExitStack) -> _Shard:
    descriptor = open_regular(folder / name)
    resources.callback(os.close, descriptor)
    identity = identity_of(descriptor)
    spans, data_start = parse_header(descriptor, name)
    return _Shard(FileHeader(name, identity[2], spans, data_start), descriptor, identity)


def _sha256(descriptor: int, name: str) -> str:
    digest = hashlib.sha256()
    for piece in read_chunks(descriptor, os.fstat(descriptor).st_size, name):
        digest.update(piece)
    return digest.hexdigest()


def identity_of(descriptor: int) -> tuple[int, ...]:
    """Return what tells whether an open file is the one it was: device, inode, size, time of the last change."""
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def check_unchanged(descriptor: int, file: WeightFile) -> None:
    """Refuse an open file that is no longer as it was.

    Raises:
        CorruptCheckpointError: somebody wrote into it.
    """
    if identity_of(descriptor) != file.identity:
        raise CorruptCheckpointError(
            f"{file.path.name} in {printable(file.path.parent, 400)} changed while it was read; "
            "stop whatever writes there and start again"
        )


def _check_sizes(shards: Sequence[_Shard]) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for shard in shards:
        for name, span in shard.header.spans.items():
            if span.end - span.start > memory:
                raise LimitExceededError(
                    f"{shard.name}: tensor {printable(name)} has {span.end - span.start} bytes and this machine "
                    f"{memory} of memory; use a larger machine or check the file"
                )


def memory_of(size: int, name: str) -> torch.Tensor:
    """Return so many bytes of new memory, for the tensor of that name.

    Raises:
        LimitExceededError: there is not so much.
    """
    try:
        if size < _OWN_MAPPING:
            return torch.empty(size, dtype=torch.uint8)
        # goes back to the system when it is freed: among smaller things that stay, the heap would keep it. No large pages are
        # asked for: to make room for them takes the system three times as long as reading does
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)
    except (RuntimeError, MemoryError, OSError) as error:
        raise LimitExceededError(
            f"tensor {printable(name)} needs {size} bytes and there is not so much memory; use a larger machine"
        ) from error
