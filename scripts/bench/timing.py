"""Timing competitors side by side."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]

# Calls longer than this, in seconds, are not preceded by one that warms the caches.
WARM = 5e-3


def measure(
    calls: Calls,
    seconds: float,
    best: bool,
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] | None = None,
    *,
    warm: bool = True,
) -> dict[str, float]:
    """Return seconds per call of each competitor, called in turn for about `seconds` each.

    Args:
        calls: the competitors by name.
        seconds: for each of them.
        best: the minimum in place of the median.
        contexts: entered around the calls of a competitor, not timed.
        warm: let a call that is not timed bring the data into the caches first.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        # the first call may build what later ones use
        with (contexts or {}).get(name, nullcontext)():
            call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 3:
        for name, call in calls.items():
            with (contexts or {}).get(name, nullcontext)():
                if warm and (not times[name] or times[name][-1] < WARM):
                    # the one before may have left this one's data in the cache, or pushed it out
                    call()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: min(t) if best else sorted(t)[len(t) // 2] for name, t in times.items()}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
