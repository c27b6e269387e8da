"""Folders of safetensors files, read without trust and written through `files`; nothing here knows model classes.

::

    with open_checkpoint("folder") as checkpoint:
        checkpoint.headers["lm_head.weight"].shape
        checkpoint["lm_head.weight"]
"""

import json
import os
import re
import resource
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from mono_quant import errors
from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    MonoQuantError,
    PickleOnlyError,
    UnsafeInputError,
)
from mono_quant.files import OutputFolder, TensorEntry, new_folder, temporary_folder
from mono_quant.headers import (
    Span,
    collisions,
    open_regular,
    parse_header,
    printable,
    read_json,
    read_json_object,
)

__all__ = [
    "Checkpoint",
    "TensorHeader",
    "open_checkpoint",
    "plan_shards",
    "read_json",
    "read_json_object",
    "write_checkpoint",
]

# The index of the largest known model has 9 MB, so it gets more room than other JSON.
MAX_INDEX_BYTES = 64 << 20

_STEMS = ("model", "diffusion_pytorch_model")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}\.safetensors")
_PICKLE_NAME = re.compile(r"(?:pytorch_model|diffusion_pytorch_model)(?:-(\d{5})-of-(\d{5}))?\.bin")
_GIB = 1 << 30
_SHOWN = 10
# Runs in a process of its own: whatever goes wrong is told to the parent as one line of JSON.
_WORKER = """
import json, sys
task = json.loads(sys.argv[1])
sys.path[:] = task.pop("modules")
sys.excepthook = lambda kind, error, trace: sys.stdout.write(json.dumps([kind.__name__, str(error)]))
from mono_quant.checkpoint import convert_pickles
convert_pickles(**task)
"""


class TensorHeader(NamedTuple):
    """What a checkpoint says about a tensor before its data is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: str


class _Shard(NamedTuple):
    name: str
    descriptor: int
    identity: tuple[int, ...]
    spans: dict[str, Span]
    data_start: int


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of an open checkpoint; each is read anew, alone, when it is asked for.

    Attributes:
        folder: where it was opened.
        headers: dtype, shape, size and file of every tensor.
        files: the weight files, sorted.
        total_bytes: size of all tensors together.
    """

    def __init__(self, folder: Path, shards: Sequence[_Shard], resources: ExitStack) -> None:
        self.folder = folder
        self.files = tuple(shard.name for shard in shards)
        self.headers: dict[str, TensorHeader] = {}
        self._shards = {shard.name: shard for shard in shards}
        # Runs at the latest when the object or the process ends, so that no temporary folder stays.
        self._release = weakref.finalize(self, resources.close)
        for shard in shards:
            for name, span in shard.spans.items():
                self.headers[name] = TensorHeader(span.dtype, span.shape, span.end - span.start, shard.name)
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
        shard = self._shards[header.file]
        if not self._release.alive:
            raise ValueError(f"the checkpoint {printable(self.folder, 400)} is closed; open it again")
        span = shard.spans[name]
        data = _empty(header.nbytes, name)
        self._check_unchanged(shard)
        _fill(data, shard.descriptor, shard.data_start + span.start, shard.name)
        self._check_unchanged(shard)
        if header.dtype is torch.bool and header.nbytes and int(data.max()) > 1:
            raise CorruptCheckpointError(
                f"{shard.name}: the boolean tensor {printable(name)} holds the byte {int(data.max())}; "
                "fetch the file again"
            )
        return data.view(header.dtype).reshape(header.shape)

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
        """Close the files; the headers stay."""
        self._release()

    def _check_unchanged(self, shard: _Shard) -> None:
        if _identity(shard.descriptor) != shard.identity:
            raise CorruptCheckpointError(
                f"{shard.name} in {printable(self.folder, 400)} changed while it was read; "
                "stop whatever writes there and start again"
            )


def open_checkpoint(
    folder: str | os.PathLike[str], *, allow_symlinks: bool = False, allow_pickle: bool = False
) -> Checkpoint:
    """Open a folder of safetensors files and prove it whole before any weight is read.

    Args:
        folder: the folder, with one file or with shards and their index.
        allow_symlinks: follow links that leave the folder. Links of the Hugging Face cache always pass.
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
        stems = [
            stem for stem in _STEMS if _has(root, f"{stem}.safetensors") or _has(root, _index_name(stem))
        ]
        if not stems:
            where = _converted(root, allow_symlinks, allow_pickle, resources)
            stems = [_STEMS[0]]
        if len(stems) > 1:
            raise CorruptCheckpointError(
                f"{printable(root, 400)} holds the weights of two models, {' and '.join(stems)}; "
                "keep one of them"
            )
        weight_map = _weight_map(where, stems[0], allow_symlinks)
        names = sorted(set(weight_map.values())) or [f"{stems[0]}.safetensors"]
        missing = [name for name in names if not _has(where, name)]
        if missing:
            raise MissingFileError(
                f"{printable(root, 400)} lacks {_listed(missing)}, which its index names; fetch them again"
            )
        shards = [_open_shard(where, name, allow_symlinks, resources) for name in names]
        _check_agreement(shards, weight_map)
        _check_tensors(shards)
        return Checkpoint(root, shards, resources.pop_all())


def plan_shards(sizes: Mapping[str, int], max_shard_size: int | str) -> dict[str, list[str]]:
    """Decide which tensor goes into which file, in the order given.

    Args:
        sizes: tensor name -> bytes.
        max_shard_size: bytes, or text such as "5GB"; a larger tensor gets a file of its own.

    Returns:
        File name -> tensor names: `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on.

    Raises:
        ConfigError: `max_shard_size` is no positive size.
    """
    if not isinstance(max_shard_size, str) and max_shard_size <= 0:
        raise ConfigError(f"max_shard_size is {max_shard_size}; give a positive number of bytes, or '5GB'")
    try:
        split = split_state_dict_into_shards_factory(
            dict(sizes),
            get_storage_size=int,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(
            f"max_shard_size is {printable(max_shard_size)}; give a number of bytes, or text such as '5GB'"
        ) from error
    found: dict[str, list[str]] = split.filename_to_tensors
    return found or {"model.safetensors": []}


def write_checkpoint(
    folder: OutputFolder, entries: Sequence[TensorEntry], max_shard_size: int | str
) -> dict[str, list[str]]:
    """Write tensors into shards, one tensor at a time, and the index if there is more than one.

    Args:
        folder: the folder under construction.
        entries: the tensors, in the order in which they fill the shards.
        max_shard_size: see `plan_shards`.

    Returns:
        The plan that was written: file name -> tensor names.

    Raises:
        ConfigError: see `plan_shards`.
        OutputError: see `OutputFolder.write_safetensors`.
    """
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) != len(entries):
        raise errors.OutputError(
            f"{len(entries) - len(by_name)} tensors share a name with another; rename them"
        )
    sizes = {entry.name: entry.nbytes for entry in entries}
    plan = plan_shards(sizes, max_shard_size)
    for file, names in plan.items():
        folder.write_safetensors(file, [by_name[name] for name in names])
    if len(plan) > 1:
        _write_index(
            folder, {name: file for file, names in plan.items() for name in names}, sum(sizes.values())
        )
    return plan


def _write_index(folder: OutputFolder, weight_map: Mapping[str, str], total_size: int) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    folder.write_json(_index_name("model"), index)


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _has(folder: Path, name: str) -> bool:
    # A link that leads nowhere counts as present: it is refused when it is opened.
    return os.path.lexists(folder / name)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _weight_map(folder: Path, stem: str, allow_symlinks: bool) -> dict[str, str]:
    """Tensor name -> shard; empty where there is one file without an index."""
    index_name, single = _index_name(stem), f"{stem}.safetensors"
    if not _has(folder, index_name):
        return {}
    index = read_json_object(
        folder / index_name, what=index_name, max_bytes=MAX_INDEX_BYTES, allow_symlinks=allow_symlinks
    )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptCheckpointError(f"{index_name}: 'weight_map' must map names to files; fetch it again")
    if not isinstance(index.get("metadata", {}), dict):
        raise CorruptCheckpointError(f"{index_name}: 'metadata' must be an object; fetch it again")
    # Judged by the name alone, so that the answer tells nothing about what lies outside.
    unsafe = sorted({name for name in weight_map.values() if not _SHARD_NAME.fullmatch(name)})
    if unsafe:
        raise UnsafeInputError(
            f"{index_name} names {_listed(unsafe)}, which is no plain name of a safetensors file; "
            "do not use this checkpoint"
        )
    if not weight_map:
        raise CorruptCheckpointError(f"{index_name}: 'weight_map' is empty; fetch it again")
    if _has(folder, single) and set(weight_map.values()) != {single}:
        raise CorruptCheckpointError(
            f"{printable(folder, 400)} holds both {single} and {index_name}, and other programs disagree on which "
            f"counts; delete {single} if the shards are newer, or the index and its shards if they are older"
        )
    return weight_map


def _open_shard(folder: Path, name: str, allow_symlinks: bool, resources: ExitStack) -> _Shard:
    descriptor = open_regular(folder / name, allow_symlinks=allow_symlinks)
    resources.callback(os.close, descriptor)
    identity = _identity(descriptor)
    spans, data_start = parse_header(descriptor, name)
    return _Shard(name, descriptor, identity, spans, data_start)


def _identity(descriptor: int) -> tuple[int, ...]:
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _check_agreement(shards: Sequence[_Shard], weight_map: Mapping[str, str]) -> None:
    """Index and headers must say the same, in both directions."""
    if not weight_map:
        return
    holders: dict[str, list[str]] = {}
    for shard in shards:
        for name in shard.spans:
            holders.setdefault(name, []).append(shard.name)
    problems = [
        f"{printable(name)} is in {' and '.join(files)}" for name, files in holders.items() if len(files) > 1
    ]
    problems += [f"{printable(name)} is not in the index" for name in holders.keys() - weight_map.keys()]
    problems += [
        f"{printable(name)} is not in {file}"
        for name, file in weight_map.items()
        if file not in holders.get(name, [])
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:_SHOWN])
        raise CorruptCheckpointError(
            f"index and shards disagree on {len(problems)} tensors: {shown}; fetch the checkpoint again"
        )


def _check_tensors(shards: Sequence[_Shard]) -> None:
    colliding = collisions(name for shard in shards for name in shard.spans)
    if colliding:
        raise CorruptCheckpointError(
            f"tensor names differ only by case or Unicode form: {_listed(colliding)}; rename them"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for shard in shards:
        for name, span in shard.spans.items():
            if span.end - span.start > memory:
                raise LimitExceededError(
                    f"{shard.name}: tensor {printable(name)} has {span.end - span.start} bytes and this machine "
                    f"{memory} of memory; use a larger machine or check the file"
                )


def _empty(size: int, name: str) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        raise LimitExceededError(
            f"tensor {printable(name)} needs {size} bytes and there is not so much memory; use a larger machine"
        ) from error


def _fill(data: torch.Tensor, descriptor: int, offset: int, file: str) -> None:
    # Read, never mapped: a mapped file that shrinks kills the process.
    rest = data.numpy().data
    while rest:
        try:
            count = os.preadv(descriptor, [rest], offset)
        except OSError as error:
            raise CorruptCheckpointError(
                f"{file} cannot be read ({error.strerror}); check the disk"
            ) from error
        if count == 0:
            raise CorruptCheckpointError(f"{file} became shorter while it was read; fetch it again")
        rest, offset = rest[count:], offset + count


def _converted(folder: Path, allow_symlinks: bool, allow_pickle: bool, resources: ExitStack) -> Path:
    """Convert pickle files into a temporary folder; without permission, or without pickles, refuse."""
    pickles = sorted(path.name for path in folder.iterdir() if _PICKLE_NAME.fullmatch(path.name))
    if not pickles:
        raise MissingFileError(
            f"{printable(folder, 400)} holds no model.safetensors and no model.safetensors.index.json; "
            "give the folder of a checkpoint in safetensors format"
        )
    if not allow_pickle:
        raise PickleOnlyError(
            f"{printable(folder, 400)} holds only pickle weights ({_listed(pickles)}), which can run code when read; "
            "convert it with https://huggingface.co/spaces/safetensors/convert, or pass allow_pickle=True to "
            "read plain tensors from it in a process of limited memory"
        )
    _check_pickle_set(folder, pickles)
    out = resources.enter_context(temporary_folder()) / "converted"
    task = {
        "modules": sys.path,
        "paths": [str((folder / name).absolute()) for name in pickles],
        "out": str(out),
        "allow_symlinks": allow_symlinks,
    }
    command = [sys.executable, "-c", _WORKER, json.dumps(task)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise _worker_error(folder, done)
    return out


def _check_pickle_set(folder: Path, pickles: Sequence[str]) -> None:
    numbers = [match.groups() for name in pickles if (match := _PICKLE_NAME.fullmatch(name))]
    total = numbers[0][1]
    expected = {(None, None)} if total is None else {(f"{n:05d}", total) for n in range(1, int(total) + 1)}
    if set(numbers) != expected or len(numbers) != len(expected):
        raise CorruptCheckpointError(
            f"{printable(folder, 400)}: {_listed(pickles)} is not one complete set of files; fetch it again"
        )


def _worker_error(folder: Path, done: subprocess.CompletedProcess[str]) -> MonoQuantError:
    where = printable(folder, 400)
    if done.returncode < 0:
        return LimitExceededError(
            f"{where}: reading the pickle files was stopped by signal {-done.returncode}, "
            "most likely for lack of memory; convert them on a larger machine"
        )
    try:
        kind, message = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        kind, message = "", done.stderr.strip()[-200:]
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, MonoQuantError):
        return own(message)
    if kind == "MemoryError" or "DefaultCPUAllocator" in message:
        return LimitExceededError(
            f"{where}: the pickle files ask for far more memory than their size; do not use them"
        )
    if kind == "UnpicklingError":
        return UnsafeInputError(
            f"{where}: a pickle file holds more than plain tensors ({printable(message)}); do not use it"
        )
    return CorruptCheckpointError(
        f"{where}: the pickle files cannot be read ({printable(f'{kind}: {message}')}); fetch them again"
    )


def convert_pickles(paths: Sequence[str], out: str, allow_symlinks: bool) -> None:
    """Rewrite pickle files as safetensors; meant for a process of its own, whose memory it limits.

    Args:
        paths: the files of one checkpoint.
        out: the folder to make.
        allow_symlinks: see `open_checkpoint`.

    Raises:
        UnsafeInputError: something else than plain dense tensors, or compressed records.
        CorruptCheckpointError: a tensor is there twice.
    """
    weight_map: dict[str, str] = {}
    total = 0
    _limit_memory(4 * max(Path(path).stat().st_size for path in paths) + 4 * _GIB)
    with new_folder(out) as folder:
        for number, path in enumerate(paths, 1):
            tensors = _load_pickle(Path(path), allow_symlinks)
            twice = sorted(tensors.keys() & weight_map.keys())
            if twice:
                raise CorruptCheckpointError(
                    f"{_listed(twice)} is in two pickle files; fetch the checkpoint again"
                )
            name = (
                f"model-{number:05d}-of-{len(paths):05d}.safetensors"
                if len(paths) > 1
                else "model.safetensors"
            )
            folder.write_safetensors(name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(paths) > 1:
            _write_index(folder, weight_map, total)


def _limit_memory(extra: int) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:  # not Linux
        pages = 0
    limit = pages * resource.getpagesize() + extra
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _load_pickle(path: Path, allow_symlinks: bool) -> dict[str, torch.Tensor]:
    with os.fdopen(open_regular(path, allow_symlinks=allow_symlinks), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            if packed or sum(record.file_size for record in records) > size:
                raise UnsafeInputError(f"{printable(path, 400)} holds compressed records; do not use it")
        file.seek(0)
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    return _plain_tensors(value, path, size)


def _plain_tensors(value: Any, path: Path, size: int) -> dict[str, torch.Tensor]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UnsafeInputError(
            f"{printable(path, 400)} is not a dict of names to tensors; save model.state_dict() instead"
        )
    strange = [name for name, tensor in value.items() if not _is_plain(tensor)]
    if strange:
        raise UnsafeInputError(
            f"{printable(path, 400)} holds {_listed(strange)}, which is no dense tensor with data of its own; "
            "save model.state_dict() with plain tensors instead"
        )
    if sum(tensor.nbytes for tensor in value.values()) > 2 * size + (1 << 20):
        raise LimitExceededError(
            f"{printable(path, 400)} describes tensors of more than twice its size; do not use it"
        )
    return {name: tensor.detach() for name, tensor in value.items()}


def _is_plain(tensor: Any) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not any(
            step == 0 and count > 1 for step, count in zip(tensor.stride(), tensor.shape, strict=True)
        )
    )
