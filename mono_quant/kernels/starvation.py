"""Whether the threads get the processors they expect: a pool that waits for one of them runs up to 100 times slower.

The threads of a parallel region wait for each other, by default without giving up their processor. Where there are more of them than
processors, or something else runs on one, the last one starts when the system takes its processor from the others, milliseconds
later.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch

# What a region of all threads may take, in times of one thread alone without a disturbance; more threads than one take less.
_TOLERATED = 1.5
# Values that torch gives to one thread at least, and a few times as many for each.
_PER_THREAD = 4 * 32768


def starved() -> str | None:
    """Say why the threads of this process hold each other up, and which variable helps; None where they do not.

    It runs for about a quarter of a second.
    """
    threads, available = torch.get_num_threads(), processors()
    if threads > math.ceil(available):
        return (
            f"{threads} threads wait for each other on {available:g} processors, all that this process may use; start it "
            f"with OMP_NUM_THREADS={max(1, int(available))}, or call torch.set_num_threads({max(1, int(available))})"
        )
    slower = slowdown()
    if slower <= _TOLERATED:
        return None
    # measured with one busy neighbour on two processors: regions of 0.4 ms took 58 ms, asleep 2.2, with one thread 7.2
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    asleep = (
        "" if passive else "start it with OMP_WAIT_POLICY=passive, so that threads sleep while they wait, or "
    )
    return (
        f"something else keeps a processor busy: {threads} threads take {slower:.1f} times as long as one alone; {asleep}"
        f"{'start it ' if passive else ''}with OMP_NUM_THREADS={max(1, threads - 1)}"
    )


def processors(folder: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many processors this process may use: by its affinity, and by the quota of its control groups.

    Args:
        folder: where the control groups are mounted, version 1 or 2.
        membership: the file that names those of this process.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(allowed), *_quotas(folder, _text(membership))])


def slowdown(seconds: float = 0.2) -> float:
    """Return how long a parallel region of all threads takes, in times of the same work on one thread left alone.

    A pool of two threads has about 0.5 where nothing disturbs it. The number of torch's threads is changed for the first half.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return 1.0
    values = torch.zeros(threads * _PER_THREAD)

    def region() -> None:
        torch.exp(values, out=values.new_empty(values.shape))

    torch.set_num_threads(1)
    try:
        alone = min(_times(region, seconds / 2))
    finally:
        torch.set_num_threads(threads)
    region()
    together = list(_times(region, seconds / 2))
    return sum(together) / len(together) / alone


def _times(call: Callable[[], None], seconds: float) -> Iterator[float]:
    end = time.perf_counter() + seconds
    start = 0.0
    while start < end:
        start = time.perf_counter()
        call()
        yield time.perf_counter() - start


def _quotas(folder: Path, membership: str) -> Iterator[float]:
    """Yield the quota of every group that this process is in, in processors; those above one bind it as well."""
    for line in membership.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        # a container sees its own group at the root of the mount, under whatever path the host knows it
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if not controllers:
                yield from _quota(_text(folder / group / "cpu.max").split())
            else:
                times = folder / controllers / group
                if not times.is_dir():
                    times = folder / "cpu" / group
                quota, period = _text(times / "cpu.cfs_quota_us"), _text(times / "cpu.cfs_period_us")
                yield from _quota([*quota.split(), *period.split()])


def _quota(words: list[str]) -> Iterator[float]:
    # "max" and -1 mean that there is none
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
        yield int(words[0]) / int(words[1])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
