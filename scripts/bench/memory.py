"""How much memory this process holds, the code of its libraries left out: they load what they use when they use it."""

import ctypes
import gc
import re
import resource
from pathlib import Path


def resident() -> float:
    """Return the resident set now, in MiB."""
    return _status("VmRSS") - _libraries()


def anonymous() -> float:
    """Return the part of the resident set that belongs to no file, in MiB: what the system cannot take back."""
    return _status("RssAnon")


def peak() -> float:
    """Return the largest resident set since the start or the last `forget`, in MiB."""
    return _status("VmHWM") - _libraries()


def forget() -> bool:
    """Give free memory back to the system and let `peak` start anew; False where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _status(name: str) -> float:
    try:
        found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        found = None
    if found is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(found[1]) / 1024


def _libraries() -> float:
    try:
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    total, inside = 0, False
    for line in maps.splitlines():
        if line.startswith("Rss:"):
            total += int(line.split()[1]) if inside else 0
        elif "-" in line.split(" ", 1)[0]:
            # the header of a mapping: addresses, rights, ..., file
            inside = ".so" in line.rsplit("/", 1)[-1]
    return total / 1024
