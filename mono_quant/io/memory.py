"""How much memory there is, and when Python looks for some that is garbage."""

import ctypes
import gc
import os
import resource
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
# of Linux 5.4
_MADV_PAGEOUT = 21
# less is not worth a look at what memory it is
_WORTH_A_LOOK = 1 << 16
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def free_bytes() -> int:
    """Return the memory that is free for this process: the machine's, or its control group's if that is less."""
    free = _number("/proc/meminfo", "MemAvailable:")
    if free is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return free * 1024 if limit is None or used is None else max(0, min(free * 1024, limit - used))


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage in cycles while many small objects are made that stay.

    It would look at all those of torch and transformers again and again, which takes as long as a third of the work. Whoever else
    runs in this process goes without that for as long.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def let_go(spans: Iterable[tuple[int, int]]) -> None:
    """Let the system take back the pages of memory that lies in files; other memory stays as it is.

    What was written to stays, and what is read again comes back from the file. Where the system refuses, nothing happens.

    Args:
        spans: addresses and sizes in bytes. To find out what they are takes a millisecond, for all of them together.
    """
    if _libc is None:
        return
    files: list[tuple[int, int]] | None = None
    for address, size in spans:
        first = address + -address % _PAGE
        whole = (address + size) // _PAGE * _PAGE - first
        if whole < _WORTH_A_LOOK:
            continue
        if files is None:
            files = _mapped_files()
        at = bisect_right(files, (address, sys.maxsize)) - 1
        if at >= 0 and address < files[at][1]:
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), _MADV_PAGEOUT)


def _mapped_files() -> list[tuple[int, int]]:
    """Return where this process has files in its memory: first address and the one behind, in ascending order."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        span, _, _, _, inode, *_ = line.split(None, 5)
        if inode != "0":
            first, _, end = span.partition("-")
            files.append((int(first, 16), int(end, 16)))
    return files


def _number(file: str, name: str | None = None) -> int | None:
    """Return the number in a file, or the one after `name`; None where there is none, as in "max"."""
    try:
        words = Path(file).read_text(encoding="ascii").split()
    except OSError:
        return None
    place = 0 if name is None else words.index(name) + 1 if name in words else len(words)
    return int(words[place]) if place < len(words) and words[place].isdecimal() else None


def peak_bytes() -> int:
    """Return the most memory that this process ever had, files that it maps included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
