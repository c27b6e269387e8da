"""Processes forked from one that has torch and transformers imported, each with the copy as its current folder."""

import contextlib
import importlib
import mmap
import os
import runpy
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from mutation.workspace import Workspace

FIRST = (
    "torch",
    "torch._dynamo",
    "torch.export",
    "transformers",
    "sentence_transformers",
    "compressed_tensors",
    "peft",
    "sklearn",
    "coverage",
    "hypothesis",
    "pytest",
)
FAULT = 70


class Deadline:
    """A moment that a forked process sets and the one that waits for it reads."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def put_off(self, seconds: float) -> None:
        self._memory[:] = struct.pack("d", time.monotonic() + seconds)

    def is_over(self) -> bool:
        return time.monotonic() > self._moment()

    def add(self, seconds: float) -> None:
        self._memory[:] = struct.pack("d", self._moment() + seconds)

    def _moment(self) -> float:
        return float(struct.unpack("d", self._memory)[0])


class Ended(NamedTuple):
    """How a process ended: its exit status, negative for a signal, None when it was ended for being late."""

    status: int | None
    seconds: float
    log: str


def prepare(workspace: Workspace) -> None:
    """Take over the settings of the tests before anything imports huggingface_hub, and the copy as the package."""
    runpy.run_path(str(workspace.tree / "tests" / "conftest.py"))
    # a shell lets its background jobs ignore this, and they would hand that on to what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # the copy is removed then, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ |= {"PYTHONPATH": str(workspace.tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(workspace.tree))


def warm(modules: Iterable[str]) -> None:
    """Import what tests import, so that no forked process has to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            importlib.import_module(name)


def loaded() -> list[str]:
    """Name what this process has imported of transformers, which imports each family when it is first asked for."""
    found = {name: module for name, module in sys.modules.items() if name.startswith("transformers.models.")}
    # it also lists modules under their old names, which cannot be imported
    return sorted(name for name, module in found.items() if getattr(module, "__name__", "") == name)


def run_forked(workspace: Workspace, work: Callable[[Deadline], int]) -> Ended:
    """Call `work` in a process of its own and wait for it, as long as it puts its deadline off.

    Returns:
        How it ended; with the status FAULT when `work` raised, as pytest does after a test that left things open.
    """
    log = workspace.scratch / "log"
    temporary = tempfile.mkdtemp(dir=workspace.scratch)
    deadline = Deadline()
    deadline.put_off(300)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_worker(workspace.tree, log, temporary, work, deadline)
    status = _wait(child, deadline)
    seconds = time.monotonic() - start
    shutil.rmtree(temporary, ignore_errors=True)
    return Ended(status, seconds, log.read_text(encoding="utf-8", errors="replace"))


def _become_worker(
    tree: Path, log: Path, temporary: str, work: Callable[[Deadline], int], deadline: Deadline
) -> NoReturn:
    status = FAULT
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        os.environ["TMPDIR"] = temporary
        tempfile.tempdir = None
        status = work(deadline)
    except BaseException:  # noqa: BLE001  printed into the log, which the parent shows
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, deadline: Deadline) -> int | None:
    looked = time.monotonic()
    try:
        while not deadline.is_over():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
            looked, before = time.monotonic(), looked
            if looked - before > 5:
                # both processes were stopped, which is not the mutant's fault
                deadline.add(looked - before)
    finally:
        # also what it started and left running, and all of it when this process is to end
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
