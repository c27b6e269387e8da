"""Who works in a folder at this moment: each worker holds a lock of its own for as long as it lives, so that the dead need no clearing up.

Where the file system cannot lock, everybody is alone; what is written there stays right, because files appear whole by their rename.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mono_quant.errors import OutputBusyError, OutputWriteError
from mono_quant.io.disk import disk
from mono_quant.io.text import printable

# Nobody stays inside the gate for longer than a few system calls.
GATE_SECONDS = 60.0
_PAUSE = 0.02


class Member(NamedTuple):
    """One worker.

    Attributes:
        run: what all workers of one command share, and no other.
        rank: of the worker.
        process, host: where it runs.
    """

    run: str
    rank: int
    process: int
    host: str

    def __str__(self) -> str:
        return f"process {self.process} on {printable(self.host)}"


def this_member(run: str, rank: int) -> Member:
    """Return this process as a member."""
    return Member(run, rank, os.getpid(), os.uname().nodename)


@contextmanager
def gate(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Let one worker at a time look who is there, come and leave.

    Args:
        folder: that they work in.
        make: the folder where it is missing.

    Raises:
        OutputBusyError: somebody stays inside.
        OutputWriteError: the file system refused.
    """
    end = time.monotonic() + GATE_SECONDS
    while (descriptor := _try_gate(folder, make)) is None:
        if time.monotonic() > end:
            raise OutputBusyError(
                f"another process keeps {printable(folder / 'gate', 400)} locked; end it, or choose another folder"
            )
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Lock a file, and make it where it is missing; closing the descriptor unlocks it. None where another has it.

    Raises:
        OutputWriteError: the file system refused.
    """
    descriptor = disk.open_shared(path)
    try:
        is_mine = _flock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    if is_mine:
        return descriptor
    os.close(descriptor)
    return None


def enter(folder: Path, me: Member) -> int:
    """Become a member; call it inside the gate. Closing the descriptor is leaving.

    Raises:
        OutputBusyError: workers of another run are there, or one of the same rank.
    """
    for other in others(folder, -1):
        if other.run != me.run or other.rank == me.rank:
            raise OutputBusyError(
                f"{other} is writing {printable(folder, 400)} at this moment; "
                "wait for it or choose another folder"
            )
    path = _lock_file(folder, me.rank)
    descriptor = try_lock(path)
    if descriptor is None:
        raise OutputBusyError(
            f"{printable(path, 400)} is locked; wait for its owner or choose another folder"
        )
    try:
        disk.append(descriptor, (json.dumps(me) + "\n").encode(), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def others(folder: Path, rank: int) -> list[Member]:
    """Return the living members of other ranks; call it inside the gate."""
    found = []
    for path in sorted(folder.glob("worker.*.lock")):
        if path != _lock_file(folder, rank) and not is_free(path):
            found.append(_holder(path))
    return found


def ranks_at_work(folder: Path) -> set[int]:
    """Return the ranks whose locks are held; call it inside the gate."""
    return {int(path.name.split(".")[1]) for path in folder.glob("worker.*.lock") if not is_free(path)}


def is_free(path: Path) -> bool:
    """Tell whether nobody locked a file, or it is not there; call it inside the gate."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return _flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _lock_file(folder: Path, rank: int) -> Path:
    return folder / f"worker.{rank}.lock"


def _flock(descriptor: int, how: int) -> bool:
    """Tell whether a lock was to be had; it is where the file system has none."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def has_gate(folder: Path) -> bool:
    """Tell whether workers were ever in a folder."""
    return os.path.lexists(folder / "gate")


def _try_gate(folder: Path, make: bool) -> int | None:
    if make:
        disk.make_folder(folder, exist_ok=True)
    try:
        return try_lock(folder / "gate")
    except OutputWriteError as error:
        if make and isinstance(error.__cause__, FileNotFoundError):
            return None  # its run ended between the two calls and took it away
        raise


def _holder(path: Path) -> Member:
    """Read who locked a file last."""
    lines = path.read_bytes().splitlines()
    with suppress(IndexError, ValueError, TypeError):
        return Member(*json.loads(lines[-1]))
    return Member("", -1, 0, "?")


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file still has its name: its folder may have been removed while we waited."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
