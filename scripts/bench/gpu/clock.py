"""Timing on a device: replayed graphs for what kernels take, the host's clock for what launching them takes.

On a CPU (`--dry`) a call is timed once by the host's clock: the numbers mean nothing, the way to them is the same.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[int], Any]


class Clock:
    """Times what runs on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.real = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self.real else None

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize(self.device)

    def capture(self, call: Callable[[], Any], warm: int = 2) -> Callable[[], Any]:
        """Return what replays the kernels of a call; on a CPU, what calls it."""
        if self._side is None:
            return call
        graph, side = torch.cuda.CUDAGraph(), self._side
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            # compiles and loads kernels, and what libraries allocate for themselves
            for _ in range(warm):
                call()
            side.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(side)
        return graph.replay

    def in_graph(self, step: Step, calls: int, repeats: int = 9) -> float:
        """Return the seconds of one of `calls` calls that are replayed as one graph: the median of the replays."""

        def all_of_them() -> None:
            for i in range(calls if self.real else 1):
                step(i)

        replay = self.capture(all_of_them, 1)
        return self._between_events(replay, repeats) / (calls if self.real else 1)

    def replays(self, call: Callable[[], Any], repeats: int = 20) -> float:
        """Return the seconds of one replay of a call."""
        return self._between_events(self.capture(call), repeats)

    def _between_events(self, call: Callable[[], Any], repeats: int) -> float:
        if not self.real:
            return _once(call)
        call()
        self.wait()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in marks:
            start.record()
            call()
            end.record()
        self.wait()
        return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3

    def eager(self, call: Callable[[], Any], calls: int = 3, rounds: int = 5) -> float:
        """Return the seconds of a call by the host's clock, the device's work included: the median of rounds of some calls in a row."""
        return self._by_host(call, 2, calls, rounds, self.wait)

    def on_host(self, call: Callable[[], Any], calls: int = 40, rounds: int = 15) -> float:
        """Return the seconds in which the host has asked for a call, which the device need not have begun."""
        return self._by_host(call, 20, calls, rounds, lambda: None)

    def _by_host(
        self, call: Callable[[], Any], warm: int, calls: int, rounds: int, end: Callable[[], None]
    ) -> float:
        if not self.real:
            return _once(call)
        for _ in range(warm):
            call()
        times = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            end()
            times.append((time.perf_counter() - start) / calls)
        self.wait()
        return statistics.median(times)


def _once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
