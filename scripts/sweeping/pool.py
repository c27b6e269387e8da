"""Every class in a process of its own, forked from one that has imported what they all need, with limits on time and memory."""

import json
import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Job = tuple[str, str]
Record = dict[str, Any]
Work = Callable[[Job, Path], Iterable[Record]]
_ANSWER = "records.jsonl"


@dataclass(frozen=True)
class Limits:
    """What one job may use."""

    seconds: int
    gigabytes: int


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    home: Path
    until: float


def run_all(
    jobs: Iterable[Job], work: Work, at_once: int, limits: Limits
) -> Iterator[tuple[Job, list[Record], str]]:
    """Yield each job with its records and, where its process did not end well, how it ended.

    Args:
        jobs: to do.
        work: yields the records of a job; it is given an empty folder.
        at_once: how many processes run at a time.
        limits: of each.
    """
    waiting, running = list(jobs)[::-1], []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(), work, limits))
            wait([one.process.sentinel for one in running], timeout=1.0)
            for one in [r for r in running if not r.process.is_alive() or time.monotonic() > r.until]:
                running.remove(one)
                yield one.job, *_end(one)
    finally:
        for one in running:
            _end(one)


def _start(job: Job, work: Work, limits: Limits) -> _Running:
    home = Path(tempfile.mkdtemp(prefix="sweep-"))
    process = multiprocessing.get_context("fork").Process(target=_child, args=(job, work, home, limits))
    process.start()
    return _Running(job, process, home, time.monotonic() + limits.seconds)


def _child(job: Job, work: Work, home: Path, limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limits.gigabytes << 30, limits.gigabytes << 30))
    with (home / _ANSWER).open("w", encoding="utf-8") as answer:
        for record in work(job, home):
            answer.write(json.dumps(record) + "\n")
            answer.flush()


def _end(one: _Running) -> tuple[list[Record], str]:
    """Collect what a process wrote; kill it when it is not done."""
    late = one.process.is_alive()
    if late:
        one.process.kill()
    one.process.join()
    answer = one.home / _ANSWER
    lines = answer.read_text(encoding="utf-8").splitlines() if answer.exists() else []
    shutil.rmtree(one.home, ignore_errors=True)
    code = one.process.exitcode or 0
    how = "it did not end in time" if late else f"its process ended with {_name(code)}" if code else ""
    return [json.loads(line) for line in lines], how


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
