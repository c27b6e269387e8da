"""What is going on: the phases of the work on a terminal, and the library's warnings in the words of the command line."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.text import Text

from mono_quant.apps.interrupt import is_watched
from mono_quant.apps.screen import tidy
from mono_quant.errors import Option
from mono_quant.io.phases import Went, shown

DELAY = 0.4  # seconds; what is over by then is not shown


@contextmanager
def seen(say: Callable[[Option], str]) -> Iterator[None]:
    """Show what the library does and warns of, while the context lasts.

    Args:
        say: how to name an option.
    """
    logger, handler = logging.getLogger("mono_quant"), _Notes(say)
    logger.addHandler(handler)
    try:
        with shown(
            _Phases().show if is_watched(sys.stderr) and not are_progress_bars_disabled() else _nothing
        ):
            yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _nothing(what: str, in_bytes: bool) -> Iterator[Went]:
    yield lambda done, total: None


class _Notes(logging.Handler):
    """One line on stderr for each warning."""

    def __init__(self, say: Callable[[Option], str]) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        said = tuple(self.say(arg) if isinstance(arg, Option) else arg for arg in args)
        text = record.msg % said if said else record.getMessage()
        print(f"mono-quant: note: {tidy(text)}", file=sys.stderr)


class _Bar(BarColumn):
    """A bar for what is counted, and none for what is not."""

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
        return super().render(task) if task.total else Text()


class _Bytes(DownloadColumn):
    """How many bytes of how many, where bytes are counted."""

    def render(self, task: Task) -> Text:
        return super().render(task) if _counts_bytes(task) else Text()


class _Rate(TransferSpeedColumn):
    """How many bytes a second."""

    def render(self, task: Task) -> Text:
        return super().render(task) if _counts_bytes(task) else Text()


class _Left(TimeRemainingColumn):
    """How long the rest will take at that rate."""

    def render(self, task: Task) -> Text:
        return super().render(task) if _counts_bytes(task) else Text()


def _counts_bytes(task: Task) -> bool:
    return bool(task.total and task.fields.get("in_bytes"))


class _Phases:
    """A line for each phase that is running, once the first of them takes longer than a moment.

    Between phases nothing is live: downloads and uploads draw bars of their own.
    """

    def __init__(self) -> None:
        told = (_Bytes(binary_units=False), _Rate(), _Left())
        columns = (SpinnerColumn(), TextColumn("{task.description}"), _Bar(), *told, TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.lock = threading.Lock()
        self.running = 0
        self.timer = threading.Timer(DELAY, self._start)

    @contextmanager
    def show(self, what: str, in_bytes: bool) -> Iterator[Went]:
        task = self._begin(what, in_bytes)

        def went(done: int, total: int) -> None:
            self.progress.update(task, completed=done, total=total)

        try:
            yield went
        finally:
            self._end(task)

    def _begin(self, what: str, in_bytes: bool) -> TaskID:
        with self.lock:
            self.running += 1
            if self.running == 1:
                self.timer = threading.Timer(DELAY, self._start)
                self.timer.daemon = True
                self.timer.start()
            return self.progress.add_task(what, total=None, in_bytes=in_bytes)

    def _start(self) -> None:
        with self.lock:
            if self.running:
                self.progress.start()

    def _end(self, task: TaskID) -> None:
        with self.lock:
            self.running -= 1
            self.progress.remove_task(task)
            if not self.running:
                self.timer.cancel()
                self.progress.stop()
