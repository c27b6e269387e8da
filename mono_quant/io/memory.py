"""How much memory there is."""

import os
from pathlib import Path


def free_bytes() -> int:
    """Return the memory that is free for this process: the machine's, or its control group's if that is less."""
    free = _number("/proc/meminfo", "MemAvailable:")
    if free is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return free * 1024 if limit is None or used is None else max(0, min(free * 1024, limit - used))


def _number(file: str, name: str | None = None) -> int | None:
    """Return the number in a file, or the one after `name`; None where there is none, as in "max"."""
    try:
        words = Path(file).read_text(encoding="ascii").split()
    except OSError:
        return None
    place = 0 if name is None else words.index(name) + 1 if name in words else len(words)
    return int(words[place]) if place < len(words) and words[place].isdecimal() else None
