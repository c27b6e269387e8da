"""Ctrl-C: the process leaves with one line and exit code 130, from its first moment to its last.

Until there is something to put back it leaves at once, also in the middle of an import. After `unwinding` the interrupt is an
exception, so that whatever was begun is removed; a second one does not wait for that.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
end = os._exit  # at once: Python itself would wait for the threads of a transfer that was given up
CLEARED = "\r\x1b[J"  # the rest of a line, and the bars below it


@contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C end the process at once while the context lasts, until `unwinding` is called.

    A process that ignores interrupts, such as one in the background, goes on doing so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def unwinding() -> None:
    """Let Ctrl-C be a KeyboardInterrupt from now on."""
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, _unwind)


def leave(code: int, line: str) -> NoReturn:
    """Say one line on stderr and leave."""
    _say(line)
    if code == INTERRUPTED:
        end(code)
    raise SystemExit(code) from None


def is_watched(stream: object) -> bool:
    """Tell whether a stream goes to a terminal that can move its cursor."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _say(line: str) -> None:
    with suppress(OSError):  # nobody reads it
        print(f"{CLEARED if is_watched(sys.stderr) else ''}mono-quant: {line}", file=sys.stderr, flush=True)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    _say("interrupted; nothing was written")
    end(INTERRUPTED)


def _unwind(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave_now)
    raise KeyboardInterrupt


def _leave_now(number: int, frame: FrameType | None) -> None:
    _say("interrupted twice; stopped at once")
    end(INTERRUPTED)
