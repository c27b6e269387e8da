"""The only system calls that change the disk; every refusal comes out as an error that says what to do.

They all go through `_ops`, so that a test can make the k-th one fail.
"""

import ctypes
import errno
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mono_quant.errors import OutputBusyError, OutputError, OutputWriteError
from mono_quant.io.text import printable

logger = logging.getLogger(__name__)

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
_NO_MORE = "the file system took no more bytes"
# Bytes that are hashed at a time: they stay in the cache between reading and hashing.
_WINDOW = 1 << 20
# What file systems without hard links say, or where a file has too many.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class _Ops:
    """Every system call that changes the disk."""

    def open(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def open_shared(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def allocate(self, descriptor: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def write_at(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

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

    def replace(self, old: Path, new: Path) -> None:
        os.replace(old, new)  # noqa: PTH105  as rename

    def link(self, old: Path, new: Path) -> None:
        os.link(old, new)

    def unlink(self, path: Path) -> None:
        path.unlink()

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


@contextmanager
def writing(path: Path, size: int | None = None, *, foreign: bool = False) -> Iterator[None]:
    """Turn the file system's refusal into our error.

    Args:
        path: what is being written.
        size: how much room it needs, where that is known.
        foreign: the code inside is not ours, so let errors pass that do not speak of a disk.

    Raises:
        OutputWriteError: the file system refused.
    """
    try:
        yield
    except OSError as error:
        if foreign and error.errno not in _DISK_ERRORS:
            raise
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


def write_new(path: Path, chunks: Iterable[bytes | memoryview], size: int) -> dict[str, Any]:
    """Write a new file durably.

    Args:
        path: where there is nothing yet.
        chunks: its content; whatever making them raises comes through.
        size: of all of them together, reserved before the first.

    Returns:
        What the manifest says about the file: size and sha256.

    Raises:
        OutputError: the chunks are more or less than announced.
        OutputWriteError: the file system refused.
    """
    digest = hashlib.sha256()
    written = 0
    with writing(path, size):
        descriptor = _ops.open(path)
    try:
        with writing(path, size):
            _allocate(descriptor, size)
        for chunk in chunks:
            with writing(path, size):
                _write_whole(descriptor, memoryview(chunk))
            digest.update(chunk)
            written += len(chunk)
        with writing(path, size):
            _ops.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    with writing(path, size):
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
            raise OSError(errno.EIO, _NO_MORE)
        data = data[count:]


class NewFile:
    """A new file of a size known before, written in any order, by several threads where they write different parts.

    Attributes:
        path: where it is.
        size: in bytes.
        is_sealed: it is whole and durable.
    """

    def __init__(self, path: Path, size: int, descriptor: int) -> None:
        self.path, self.size, self.is_sealed = path, size, False
        self._descriptor = descriptor

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write bytes that begin at `offset`.

        Raises:
            OutputWriteError: the file system refused.
        """
        with writing(self.path, self.size):
            while data:
                count = _ops.write_at(self._descriptor, data, offset)
                if count <= 0:
                    raise OSError(errno.EIO, _NO_MORE)
                data, offset = data[count:], offset + count

    def seal(self) -> dict[str, Any]:
        """Make the file durable, once all of it is written.

        Returns:
            What the manifest says about the file: size and sha256, of what was read back meanwhile.

        Raises:
            OutputWriteError: the file system refused.
        """
        with ThreadPoolExecutor(1) as hasher, writing(self.path, self.size):
            digest = hasher.submit(self._sha256)
            _ops.fsync(self._descriptor)
            self.is_sealed = True
            return {"size": self.size, "sha256": digest.result()}

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        window = memoryview(bytearray(_WINDOW))
        reached = 0
        while reached < self.size:
            count = os.preadv(self._descriptor, [window], reached)
            if count <= 0:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            digest.update(window[:count])
            reached += count
        return digest.hexdigest()


@contextmanager
def new_file(path: Path, size: int) -> Iterator[NewFile]:
    """Make a file that the code inside writes and seals; where it fails, or does not seal it, no file is left.

    Args:
        path: where there is nothing yet.
        size: of the file in bytes, reserved before the first is written.

    Raises:
        OutputWriteError: the file system refused.
    """
    with writing(path, size):
        descriptor = _ops.open(path)
    file = NewFile(path, size, descriptor)
    try:
        try:
            with writing(path, size):
                _allocate(descriptor, size)
            yield file
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        with writing(path, size):
            _ops.close(descriptor)
    except BaseException:
        file.is_sealed = False
        raise
    finally:
        if not file.is_sealed:
            _remove(path)


def _remove(path: Path) -> None:
    problem: OSError | None = None
    for _ in range(3):
        try:
            _ops.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            problem = error
    logger.warning(
        "%s could not be removed (%s); the next run tries again", path, problem and problem.strerror
    )


def open_shared(path: Path) -> int:
    """Open a file that is kept and grows, and make it where it is missing; the caller closes the descriptor."""
    with writing(path):
        return _ops.open_shared(path)


def append(descriptor: int, data: bytes, path: Path) -> None:
    """Write behind what an open file holds, durably.

    Args:
        descriptor: from `open_shared`.
        data: to be written.
        path: of the file, for errors.
    """
    with writing(path, len(data)):
        _write_whole(descriptor, memoryview(data))
        _ops.fsync(descriptor)


def move_file(old: Path, new: Path) -> None:
    """Give a file another name, durably; a file that has it already is replaced."""
    with writing(new):
        _ops.replace(old, new)
    fsync_folder(new.parent)


def link_file(old: Path, new: Path) -> None:
    """Give a file a second name; where the file system has no links, another name.

    Raises:
        OutputWriteError: the file system refused.
    """
    with writing(new):
        try:
            _ops.link(old, new)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _ops.rename(old, new)


def remove_file(path: Path) -> None:
    """Remove a file that may be gone already."""
    with writing(path), suppress(FileNotFoundError):
        _ops.unlink(path)


def require_room(folder: Path, size: int) -> None:
    """Refuse what a disk has no room for.

    Args:
        folder: that is to be written.
        size: of everything that is still to be written, in bytes.

    Raises:
        OutputWriteError: there is less room.
    """
    with writing(folder):
        facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if size > free:
        raise OutputWriteError(
            f"{printable(folder, 400)} has no room: needed {size} bytes, available {free} bytes; "
            "free some space or choose another folder"
        )


def fsync_folder(path: Path) -> None:
    """Make what was created and renamed in a folder durable."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _ops.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems have no such call for folders
                raise
        finally:
            os.close(descriptor)


def make_folder(path: Path, *, exist_ok: bool = False) -> None:
    """Make one folder in a folder that is there."""
    with writing(path):
        try:
            _ops.mkdir(path)
        except FileExistsError:
            if not exist_ok:
                raise


def make_private_folder() -> Path:
    """Make a folder in the system's temporary place that nobody else can read."""
    with writing(Path(tempfile.gettempdir())):
        return _ops.make_private("mono_quant-")


def rename(old: Path, new: Path) -> None:
    """Rename a file or a folder."""
    with writing(new):
        _ops.rename(old, new)


def remove_tree(path: Path) -> None:
    """Remove a folder and all that is in it."""
    with writing(path):
        _ops.remove_tree(path)


def remove_empty(path: Path) -> None:
    """Remove a folder if that is possible; one that holds something stays."""
    with suppress(OSError):
        _ops.rmdir(path)


def put_in_place(new: Path, place: Path, *, replaces: bool) -> None:
    """Give a finished folder its name, in one step where the system can.

    Args:
        new: the finished folder; where it replaces another, that one has this name, or ends in `.old`, afterwards.
        place: where it belongs.
        replaces: there is an older folder.

    Raises:
        OutputBusyError: somebody else was faster.
        OutputWriteError: the file system refused.
    """
    with writing(place):
        try:
            if not replaces:
                _ops.rename(new, place)
            elif not _ops.exchange(new, place):
                _swap_in_two_steps(new, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise OutputBusyError(
                f"another run finished {printable(place, 400)} in the meantime; nothing was changed, "
                "choose another folder"
            ) from error


def _swap_in_two_steps(partial: Path, place: Path) -> None:
    aside = partial.with_suffix(".old")
    try:
        _ops.rename(place, aside)
        _ops.rename(partial, place)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(place):
            _ops.rename(aside, place)
        raise


def discard(path: Path) -> None:
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
