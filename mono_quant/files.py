"""The only code that writes to disk: a folder appears whole under its name, or not at all.

::

    with new_folder("out") as folder:
        folder.write_json("config.json", config)
        folder.write_safetensors("model.safetensors", tensors)

Everything is built in a hidden sibling, `.<name>.mq-<run>.partial`, and renamed once every byte is on the disk.
Whatever carries that name is disposable at any moment, so cleaning up needs no bookkeeping.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mono_quant.errors import (
    CorruptCheckpointError,
    FormatVersionError,
    MonoQuantError,
    OutputBusyError,
    OutputError,
    OutputExistsError,
    OutputWriteError,
)
from mono_quant.headers import (
    DTYPE_NAMES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    build_header,
    collisions,
    is_cache_link,
    layout_order,
    name_problem,
    open_regular,
    printable,
    read_json_object,
)
from mono_quant.version import __version__

logger = logging.getLogger(__name__)

MANIFEST = "mono_quant.json"
FORMAT = "mono_quant"
FORMAT_VERSION = 1

# What an output folder may hold, in full: everything else stays behind, above all code (*.py), pickles (*.bin),
# secrets (.env), history (.git) and training state.
ALLOWED = (
    # the model's description
    r"config\.json|generation_config\.json",
    # our weights and their index; a pickle can run code when it is read
    r"model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json",
    # our manifest and report, the card
    r"mono_quant\.json|mono_quant_report\.json|README\.md",
    # tokenizer: the fast one, the settings, and the vocabularies of the slow ones
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|normalizer\.json",
    r"vocab\.(txt|json)|merges\.txt|[A-Za-z0-9][A-Za-z0-9_.-]*\.(model|tiktoken)",
    # processors of images, sound and video; templates are text that is rendered in a sandbox
    r"(preprocessor|processor|video_preprocessor|image_processor|feature_extractor)_config\.json",
    r"chat_template\.(jinja|json)|additional_chat_templates/[A-Za-z0-9][A-Za-z0-9_.-]*\.jinja",
    # sentence-transformers: the list of modules and each module's settings and dense weights
    r"modules\.json|config_sentence_transformers\.json|sentence_[a-z0-9]+_config\.json",
    r"\d+_[A-Za-z][A-Za-z0-9_]*/(config\.json|model\.safetensors)",
    # terms that must travel along
    r"(?i:LICEN[SC]E|NOTICE|USE_POLICY)[A-Za-z0-9_-]*(\.(txt|md|rst|pdf))?",
)
_ALLOWED = re.compile("|".join(f"(?:{pattern})" for pattern in ALLOWED))

# Found beside the files of every clone or download from the Hub.
_HUB_EXTRAS = (".gitattributes", ".cache/", ".git/")
_STRAY = re.compile(r"\.(.+)\.mq-([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.(partial|old)", re.DOTALL)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
_CHUNK = 64 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: what it will be, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class _Ops:
    """Every system call that changes the disk, so that a test can make the k-th one fail."""

    def open(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def allocate(self, descriptor: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def make_private(self, prefix: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=prefix))

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)  # noqa: PTH104  Path.rename hides which call it is

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two folders in one step; False where the system cannot."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            return False
        names = os.fsencode(one), os.fsencode(other)
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise OSError(code, os.strerror(code), str(one), None, str(other))

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)


_ops = _Ops()


def is_allowed(name: str) -> bool:
    """Tell whether an output folder may hold a file of this name (relative, with `/`)."""
    return len(name) <= 255 and _ALLOWED.fullmatch(name) is not None


class OutputFolder:
    """The folder under construction; `new_folder` hands it out.

    Attributes:
        path: where it is being built; the target once it is finished.
        manifest: facts to be written into `mono_quant.json`, beside the list of files.
        files: size and sha256 of every file written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}
        self.files: dict[str, dict[str, Any]] = {}

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a new file.

        Args:
            name: relative to the folder, on the list of allowed files.
            data: its content.

        Raises:
            OutputError: the name is not allowed or was written already.
            OutputWriteError: the file system refused.
        """
        self._write(name, [data], len(data))

    def write_text(self, name: str, text: str) -> None:
        """Write a new UTF-8 file; see `write_bytes`."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON with sorted keys, indent 2 and a last newline; see `write_bytes`."""
        self.write_bytes(name, _canonical_json(name, value))

    def copy(self, name: str, source: str | os.PathLike[str], *, follow: bool = False) -> None:
        """Copy a regular file byte for byte.

        Args:
            name: its name here; see `write_bytes`.
            source: the file. Links of the Hugging Face cache are followed.
            follow: follow any other link too.

        Raises:
            MissingFileError: there is no such file.
            UnsafeInputError: it is a foreign link or no regular file.
            CorruptCheckpointError: it changed while it was copied.
            OutputError: see `write_bytes`.
        """
        descriptor = open_regular(Path(source), allow_symlinks=follow)
        try:
            size = os.fstat(descriptor).st_size
            self._write(name, _chunks_of(descriptor, size, source), size)
        finally:
            os.close(descriptor)

    def write_safetensors(
        self, name: str, tensors: Mapping[str, torch.Tensor] | Sequence[TensorEntry]
    ) -> None:
        """Write tensors one by one, byte for byte as `safetensors.torch.save_file` with `{"format": "pt"}`.

        Args:
            name: the file; see `write_bytes`.
            tensors: name -> tensor, or entries whose tensors are made when their turn comes.

        Raises:
            OutputError: a name or dtype that the format cannot hold, or an entry that is not what it promised.
            OutputWriteError: the file system refused.
        """
        if isinstance(tensors, Mapping):
            entries = [_held(key, tensor) for key, tensor in tensors.items()]
        else:
            entries = list(tensors)
        _check_entries(name, entries)
        by_name = {entry.name: entry for entry in entries}
        order = [by_name[key] for key in layout_order((entry.name, entry.dtype) for entry in entries)]
        header = build_header([(entry.name, entry.dtype, entry.shape) for entry in order])
        if len(header) > MAX_HEADER_BYTES:
            raise OutputError(
                f"{name} would need a header of {len(header)} bytes, more than {MAX_HEADER_BYTES}; "
                "use more shards"
            )
        size = len(header) + sum(entry.nbytes for entry in order)
        self._write(name, _safetensors_chunks(header, order), size)

    def adopt(self, write: Callable[[Path], object]) -> list[str]:
        """Let a third party write into a scratch folder and take over what is allowed.

        Args:
            write: called with the scratch folder, such as `tokenizer.save_pretrained`.

        Returns:
            The names that were left behind: not allowed, not regular files, or written here already.

        Raises:
            OutputWriteError: the file system refused.
        """
        scratch = self.path / ".scratch"
        with _writing(scratch):
            _ops.mkdir(scratch)
        try:
            _call(write, scratch)
            dropped = []
            for name, regular in _tree(scratch):
                if regular and is_allowed(name) and name not in self.files and name != MANIFEST:
                    self.copy(name, scratch / name)
                else:
                    dropped.append(name)
        finally:
            with _writing(scratch):
                _ops.remove_tree(scratch)
        return dropped

    def _write(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        if not is_allowed(name) or name == MANIFEST:
            raise OutputError(
                f"{printable(name)} may not be written: it is not a model file; see mono_quant.files.ALLOWED"
            )
        if name in self.files:
            raise OutputError(f"{printable(name)} was written already; write each file once")
        path = self.path / name
        if path.parent != self.path and not path.parent.is_dir():
            with _writing(path.parent):
                _ops.mkdir(path.parent)
        self.files[name] = _write_new(path, chunks, size)


@contextmanager
def new_folder(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[OutputFolder]:
    """Build a folder that appears under its name only when it is complete.

    Args:
        target: the folder; missing parents are made. It must not exist, or be empty.
        overwrite: replace a folder that mono_quant wrote, as a whole and in one step.
        sources: folders being read, which the target must not touch.

    Yields:
        The folder under construction. After an exception the target is what it was before.

    Raises:
        OutputExistsError: something that is not ours to replace is there.
        OutputBusyError: another run is writing there.
        OutputWriteError: the file system refused.
    """
    place = _place(target)
    _refuse_cache(place)
    _refuse_sources(place, sources)
    partial = place.parent / f".{place.name}.mq-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial"
    parents: list[Path] = []
    lock = -1
    try:
        _make_parents(place.parent, parents)
        _recover(place)
        _holds_old_result(place, overwrite)
        lock = _make_partial(partial)
        folder = OutputFolder(partial)
        yield folder
        _seal(folder)
        _publish(partial, place, _holds_old_result(place, overwrite), parents)
        folder.path = place
        _clean(partial, place)
    except BaseException:
        _clean(partial, place)
        for path in reversed(parents):
            with suppress(OSError):
                _ops.rmdir(path)
        raise
    finally:
        if lock >= 0:
            os.close(lock)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a private folder that is removed at the end."""
    with _writing(Path(tempfile.gettempdir())):
        path = _ops.make_private("mono_quant-")
    try:
        yield path
    finally:
        _discard(path)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of a folder that mono_quant wrote.

    Args:
        folder: the folder.

    Returns:
        The manifest; its `files` map names to size and sha256.

    Raises:
        MissingFileError: there is none.
        CorruptCheckpointError: it is not one of ours.
        FormatVersionError: it was written by a newer version.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json_object(path)
    version = manifest.get("format_version")
    if manifest.get("format") != FORMAT or type(version) is not int or version < 1:
        raise CorruptCheckpointError(
            f"{printable(path, 400)} is not a manifest of mono_quant: format {printable(manifest.get('format'))}, "
            f"format_version {printable(version)}; quantize the model again"
        )
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{printable(path, 400)} has format version {version}, and mono_quant {__version__} reads up to "
            f"{FORMAT_VERSION}; upgrade with: pip install -U mono-quant"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_record(name, facts) for name, facts in files.items()):
        raise CorruptCheckpointError(
            f"{printable(path, 400)}: 'files' does not map file names to size and sha256; fetch the folder again"
        )
    return manifest


def verify_manifest(folder: str | os.PathLike[str], *, hashes: bool) -> None:
    """Prove that a folder holds what its manifest lists, and nothing else.

    A changed README.md is no fault: cards are edited on the Hub. Neither is what git and the Hub put beside it.

    Args:
        folder: the folder.
        hashes: compare sha256 too, which reads every byte.

    Raises:
        CorruptCheckpointError: names every missing, extra or differing file and every link.
        MissingFileError: there is no manifest.
        FormatVersionError: the folder was written by a newer version.
    """
    root = Path(folder)
    files = read_manifest(root)["files"]
    present = [name for name, _ in _tree(root)]
    problems = [f"{name} is missing" for name in files.keys() - present if name != "README.md"]
    for name in present:
        if name in files:
            problem = _difference(root / name, files[name], hashes)
            if problem:
                problems.append(f"{name} {problem}")
        elif name != MANIFEST and not name.startswith(_HUB_EXTRAS):
            problems.append(f"{printable(name)} is not listed")
    if problems:
        raise CorruptCheckpointError(
            f"{printable(root, 400)} does not hold what its {MANIFEST} lists: {'; '.join(sorted(problems))}; "
            "fetch it again or quantize the model again"
        )


def _is_record(name: str, facts: Any) -> bool:
    return (
        is_allowed(name)
        and isinstance(facts, dict)
        and type(facts.get("size")) is int
        and isinstance(facts.get("sha256"), str)
    )


def _difference(path: Path, facts: dict[str, Any], hashes: bool) -> str | None:
    if path.is_symlink() and not is_cache_link(path):
        return "is a symbolic link"
    try:
        descriptor = open_regular(path)
    except MonoQuantError as error:
        return f"cannot be read ({error})"
    try:
        size = os.fstat(descriptor).st_size
        if path.name == "README.md":
            return None
        if size != facts["size"]:
            return f"has {size} bytes instead of {facts['size']}"
        if hashes:
            digest = hashlib.sha256()
            for chunk in _chunks_of(descriptor, size, path):
                digest.update(chunk)
            if digest.hexdigest() != facts["sha256"]:
                return f"has sha256 {digest.hexdigest()} instead of {printable(facts['sha256'])}"
    finally:
        os.close(descriptor)
    return None


def _tree(folder: Path) -> list[tuple[str, bool]]:
    """Every entry but folders: its relative name, and whether it is a regular file."""
    found = []
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in names + links:
            path = Path(where) / name
            found.append((path.relative_to(folder).as_posix(), stat.S_ISREG(path.lstat().st_mode)))
    return sorted(found)


def _chunks_of(descriptor: int, size: int, source: str | os.PathLike[str]) -> Iterator[bytes]:
    reached = 0
    while reached < size:
        chunk = os.pread(descriptor, min(_CHUNK, size - reached), reached)
        if not chunk:
            raise CorruptCheckpointError(
                f"{printable(source, 400)} became shorter while it was read; fetch it again"
            )
        reached += len(chunk)
        yield chunk


def _canonical_json(name: str, value: Any) -> bytes:
    try:
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"{printable(name)} cannot be written as JSON: {error}") from error


def _call(write: Callable[[Path], object], scratch: Path) -> None:
    try:
        write(scratch)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OutputWriteError(_refusal(scratch, error, None)) from error


def _held(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _check_entries(name: str, entries: Sequence[TensorEntry]) -> None:
    counts = Counter(entry.name for entry in entries)
    problems = [f"{printable(key)} is there twice" for key, count in counts.items() if count > 1]
    problems += [f"{printable(key)} differs from another only by case" for key in collisions(counts)]
    for entry in entries:
        problem = name_problem(entry.name)
        if problem is None and entry.dtype not in DTYPE_NAMES:
            problem = f"has the dtype {entry.dtype}, which safetensors cannot hold"
        if problem is None and len(entry.shape) > MAX_DIMENSIONS:
            problem = f"has {len(entry.shape)} dimensions, more than {MAX_DIMENSIONS}"
        if problem:
            problems.append(f"{printable(entry.name)} {problem}")
    if problems:
        raise OutputError(f"{name} cannot hold these tensors: {'; '.join(problems)}; rename or convert them")


def _safetensors_chunks(header: bytes, entries: Sequence[TensorEntry]) -> Iterator[bytes | memoryview]:
    yield header
    for entry in entries:
        tensor = entry.get()
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
            raise OutputError(
                f"tensor {printable(entry.name)} was announced as {entry.dtype} {list(entry.shape)} and came as "
                f"{tensor.dtype} {list(tensor.shape)}; announce what is written"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise OutputError(
                f"tensor {printable(entry.name)} has no plain data ({tensor.layout}, {tensor.device}); "
                "make it dense and load it first"
            )
        # Lazy conjugates and negatives would be written with the values they are views of.
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


@contextmanager
def _writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn the file system's refusal into our error; never wraps code of the caller."""
    try:
        yield
    except OSError as error:
        raise OutputWriteError(_refusal(path, error, size)) from error


def _refusal(path: Path, error: OSError, size: int | None) -> str:
    text = f"cannot write {printable(path, 400)}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = next((folder for folder in path.parents if folder.exists()), Path("/"))
        disk = os.statvfs(where)
        needed = "" if size is None else f"needed {size} bytes, "
        return (
            f"{text}; {needed}available {disk.f_bavail * disk.f_frsize} bytes; "
            "free some space or choose another folder"
        )
    return f"{text}; check the folder and its disk, or choose another folder"


def _write_new(path: Path, chunks: Iterable[bytes | memoryview], size: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    written = 0
    with _writing(path, size):
        descriptor = _ops.open(path)
    try:
        with _writing(path, size):
            _allocate(descriptor, size)
        for chunk in chunks:
            with _writing(path, size):
                _write_whole(descriptor, memoryview(chunk))
            digest.update(chunk)
            written += len(chunk)
        with _writing(path, size):
            _ops.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    with _writing(path, size):
        _ops.close(descriptor)
    if written != size:
        raise OutputError(f"{printable(path.name)} was announced with {size} bytes and came with {written}")
    return {"size": size, "sha256": digest.hexdigest()}


def _allocate(descriptor: int, size: int) -> None:
    if size == 0:
        return
    try:
        _ops.allocate(descriptor, size)
    except OSError as error:
        # A file system that cannot reserve space tells us when it is full, only later.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_whole(descriptor: int, data: memoryview) -> None:
    while data:
        count = _ops.write(descriptor, data)
        if count <= 0:
            raise OSError(errno.EIO, "the file system took no more bytes")
        data = data[count:]


def _fsync_folder(path: Path) -> None:
    with _writing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _ops.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems have no such call for folders
                raise
        finally:
            os.close(descriptor)


def _place(target: str | os.PathLike[str]) -> Path:
    path = Path(target).absolute()
    try:
        if path.name in ("", ".."):
            path = path.resolve()
        place = path.parent.resolve() / path.name
        with suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputWriteError(
            f"{printable(target, 400)} cannot be a folder: {printable(error)}; choose another name"
        ) from error
    return place


def _refuse_cache(place: Path) -> None:
    environment = os.environ
    default = Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(environment.get("HF_HOME") or default)
    # HF_HOME itself is often a whole data disk; only what the libraries keep in it is theirs.
    caches = [home / part for part in ("hub", "xet", "assets", "datasets", "modules")]
    caches += [
        Path(value) for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if (value := environment.get(key))
    ]
    for folder in (place, *place.parents):
        in_cache = any(folder == cache.expanduser().absolute().resolve() for cache in caches)
        if in_cache or folder.name.startswith("models--"):
            raise OutputExistsError(
                f"{printable(place, 400)} lies in the Hugging Face cache, whose files other programs share; "
                "choose a folder outside it"
            )


def _refuse_sources(place: Path, sources: Iterable[str | os.PathLike[str]]) -> None:
    # Compared as the file system sees them, so that links, mounts and letter case do not hide anything.
    ours = _identity(place)
    around_ours = [_identity(folder) for folder in place.parents]
    for source in sources:
        path = Path(source).resolve()
        theirs = _identity(path)
        if theirs is None:
            continue
        if theirs == ours:
            relation = "is"
        elif theirs in around_ours:
            relation = "lies inside"
        elif ours is not None and ours in [_identity(folder) for folder in path.parents]:
            relation = "contains"
        else:
            continue
        raise OutputExistsError(
            f"the output {printable(place, 400)} {relation} the source {printable(path, 400)}; "
            "choose a folder beside it"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = []
    with _writing(folder):
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
    for path in reversed(missing):
        made.append(path)
        with _writing(path), suppress(FileExistsError):
            _ops.mkdir(path)


def _host() -> str:
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def _make_partial(partial: Path) -> int:
    """Make and lock the folder; the lock tells other runs that this one lives."""
    with _writing(partial):
        _ops.mkdir(partial)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Some network file systems cannot lock a folder; unique names and the process number still protect it.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _recover(place: Path) -> None:
    """Undo what dead runs left beside the target; refuse if a living one is at work."""
    try:
        names = sorted(path.name for path in place.parent.iterdir())
    except OSError:
        return
    for name in names:
        match = _STRAY.fullmatch(name)
        if match and match[1] == place.name:
            path = place.parent / name
            if not _is_dead(path, match[2], int(match[3])):
                logger.warning("%s was left by another run; remove it if none is using it", path)
            elif match[4] == "old" and not os.path.lexists(place):
                # That run died between setting the old result aside and putting the new one in its place.
                with _writing(place):
                    _ops.rename(path, place)
            else:
                _discard(path)


def _is_dead(path: Path, host: str, process: int) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputBusyError(
            f"process {process} is writing {printable(path, 400)} at this moment; "
            "wait for it or choose another folder"
        ) from error
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return host == _host() and (process == os.getpid() or not _is_running(process))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _holds_old_result(place: Path, overwrite: bool) -> bool:
    """Tell whether there is a result of ours to replace; refuse anything else that is in the way."""
    shown = printable(place, 400)
    if place.is_symlink():
        raise OutputExistsError(f"{shown} is a symbolic link; name the folder it leads to, or another one")
    if not os.path.lexists(place):
        return False
    if not place.is_dir():
        raise OutputExistsError(f"{shown} is a file, not a folder; choose another name")
    with _writing(place):
        if not any(place.iterdir()):
            return False
    if not overwrite:
        raise OutputExistsError(
            f"{shown} exists and is not empty; choose another folder, or pass overwrite=True "
            "to replace a result of mono_quant"
        )
    if not _is_ours(place):
        raise OutputExistsError(
            f"{shown} was not written by mono_quant (it has no valid {MANIFEST}); "
            "choose another folder or empty it yourself"
        )
    with _writing(place):
        present = _tree(place)
    foreign = [name for name, _ in present if not is_allowed(name) and not name.startswith(_HUB_EXTRAS[:2])]
    if foreign:
        raise OutputExistsError(
            f"{shown} holds files that mono_quant did not write and would delete: "
            f"{', '.join(printable(name) for name in foreign[:10])}; move them away or choose another folder"
        )
    return True


def _is_ours(folder: Path) -> bool:
    try:
        return read_json_object(folder / MANIFEST).get("format") == FORMAT
    except MonoQuantError:
        return False


def _seal(folder: OutputFolder) -> None:
    """Check that the folder holds what was written through it and nothing else; then write the manifest."""
    with _writing(folder.path):
        present = _tree(folder.path)
    strange = [name for name, regular in present if name not in folder.files or not regular]
    lost = [
        name
        for name, facts in folder.files.items()
        if (name, True) not in present or _size(folder.path / name) != facts["size"]
    ]
    if strange or lost:
        raise OutputError(
            f"{printable(folder.path, 400)} was changed from outside: "
            f"{', '.join(printable(name) for name in strange + lost)}; "
            "write through the folder's methods, and let other libraries write through adopt()"
        )
    manifest = {
        "mono_quant_version": __version__,
        **folder.manifest,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "files": folder.files,
    }
    data = _canonical_json(MANIFEST, manifest)
    _write_new(folder.path / MANIFEST, [data], len(data))
    for inner in sorted({(folder.path / name).parent for name in folder.files} - {folder.path}):
        _fsync_folder(inner)
    _fsync_folder(folder.path)


def _size(path: Path) -> int:
    with _writing(path):
        return path.stat().st_size


def _publish(partial: Path, place: Path, replaces: bool, parents: Sequence[Path]) -> None:
    try:
        if not replaces:
            _ops.rename(partial, place)
        elif not _ops.exchange(partial, place):
            _swap_in_two_steps(partial, place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise OutputBusyError(
                f"another run finished {printable(place, 400)} in the meantime; nothing was changed, "
                "choose another folder"
            ) from error
        raise OutputWriteError(_refusal(place, error, None)) from error
    for folder in (place.parent, *(path.parent for path in reversed(parents))):
        _fsync_folder(folder)


def _swap_in_two_steps(partial: Path, place: Path) -> None:
    aside = partial.with_suffix(".old")
    try:
        _ops.rename(place, aside)
        _ops.rename(partial, place)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(place):
            _ops.rename(aside, place)
        raise


def _clean(partial: Path, place: Path) -> None:
    _discard(partial)
    if os.path.lexists(place):
        _discard(partial.with_suffix(".old"))


def _discard(path: Path) -> None:
    """Remove a folder; one that resists is left to the next run, which tries again."""
    problem: OSError | None = None
    for _ in range(3):
        if not os.path.lexists(path):
            return
        try:
            _ops.remove_tree(path)
        except OSError as error:
            # Perhaps somebody else is removing it too, so that parts vanish under our hands.
            problem = error
    if problem is not None and os.path.lexists(path):
        logger.warning("%s could not be removed (%s); the next run tries again", path, problem.strerror)


def check_target(target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse early what `new_folder` would refuse after long work.

    Args:
        target: the folder to be written.
        overwrite: replace a folder that mono_quant wrote.

    Raises:
        OutputExistsError: something that is not ours to replace is there.
    """
    place = _place(target)
    _refuse_cache(place)
    _holds_old_result(place, overwrite)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file durably; for files in a `temporary_folder`.

    Raises:
        OutputWriteError: the file system refused.
    """
    _write_new(path, [data], len(data))


def record(data: bytes) -> dict[str, Any]:
    """Return what the manifest says about a file with this content."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
