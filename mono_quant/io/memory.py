"""How much memory there is, and when Python looks for some that is garbage."""

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
