"""The life of a folder under construction: hidden beside its target, locked, swapped in, cleaned away.

Whatever carries a hidden name is disposable at any moment, so cleaning up needs no bookkeeping.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mono_quant.errors import OutputBusyError, OutputWriteError
from mono_quant.io.disk import disk
from mono_quant.io.text import printable

logger = logging.getLogger(__name__)

_STRAY = re.compile(r"\.(.+)\.mq-([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.(partial|old)", re.DOTALL)


def partial_beside(place: Path) -> Path:
    """Name the hidden folder in which this run builds."""
    return place.parent / f".{place.name}.mq-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial"


def make_parents(folder: Path, made: list[Path]) -> None:
    """Make the folders above the target, and note them in `made` before each comes to be."""
    missing = []
    with disk.writing(folder):
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
    for path in reversed(missing):
        made.append(path)
        disk.make_folder(path, exist_ok=True)


def try_place(place: Path) -> None:
    """Make and remove an empty folder where the target, or the first of its missing parents, will be.

    Raises:
        OutputWriteError: the file system refused.
    """
    parent = place.parent
    with disk.writing(place):
        while not parent.exists():
            parent = parent.parent
    probe = partial_beside(parent / place.name)
    try:
        # tried, because permissions alone do not tell: root, read-only mounts, /proc
        disk.make_folder(probe)
    except OutputWriteError as error:
        raise OutputWriteError(
            f"{printable(place, 400)} cannot be made: {printable(parent, 400)} takes no new folder "
            f"({getattr(error.__cause__, 'strerror', None) or error}); choose another folder"
        ) from error
    disk.remove_empty(probe)


def make_partial(partial: Path) -> int:
    """Make and lock the folder; the lock tells other runs that this one lives."""
    disk.make_folder(partial)
    with disk.writing(partial):
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Some network file systems cannot lock a folder; unique names and the process number still protect it.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def recover(place: Path) -> None:
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
                disk.rename(path, place)
            else:
                disk.discard(path)


def swap_in(partial: Path, place: Path, replaces: bool, parents: Sequence[Path]) -> None:
    """Put the finished folder in its place, durably up to the first parent that was there before."""
    disk.put_in_place(partial, place, replaces=replaces)
    for folder in (place.parent, *(path.parent for path in reversed(parents))):
        disk.fsync_folder(folder)


def clean(partial: Path, place: Path) -> None:
    """Remove what this run set aside; an old result only once something is in its place."""
    disk.discard(partial)
    if os.path.lexists(place):
        disk.discard(partial.with_suffix(".old"))


def _host() -> str:
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


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
