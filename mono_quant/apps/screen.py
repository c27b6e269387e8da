"""What a person sees: tables in colours on a terminal, and plain text anywhere else."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mono_quant.apps.interrupt import CLEARED, is_watched, leave
from mono_quant.apps.late import Late
from mono_quant.errors import Option, worded
from mono_quant.planning.tables import Columns, Part, plain

if TYPE_CHECKING:
    from mono_quant.apps import colours
else:
    colours = Late("mono_quant.apps.colours")

# where the client library keeps what it downloaded
CACHED = re.compile(r"[^\s'\"]*/models--([^/\s]+)/snapshots/([0-9a-f]{12})[0-9a-f]{28}")
PIPE_CLOSED = 141  # as a shell says that SIGPIPE ended a program


def tidy(text: str) -> str:
    """Return a message on one line, with repositories named in place of their folders in the cache."""
    return CACHED.sub(lambda m: f"{m[1].replace('--', '/')}@{m[2]}", " ".join(text.split()))


def put(text: str) -> None:
    """Print on stdout, where somebody may have stopped reading."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _abandon_stdout()
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as e:
        _abandon_stdout()
        leave(2, f"the result cannot be printed: {e.strerror}")


def show(parts: Iterable[Part], say: Callable[[Option], str]) -> None:
    """Print what a command found.

    Args:
        parts: lines and tables.
        say: how to name an option that they speak of.
    """
    said = [_worded(part, say) for part in parts]
    if not is_watched(sys.stdout):
        put(plain(said))
    else:
        colours.draw(said)


@contextmanager
def starting() -> Iterator[None]:
    """Let somebody who watches know that something happens while torch is imported."""
    if not is_watched(sys.stderr):
        yield
        return
    print("starting ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(CLEARED, end="", file=sys.stderr, flush=True)


def _abandon_stdout() -> None:
    # what is left in the buffer is not tried again when the process ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _worded(part: Part, say: Callable[[Option], str]) -> Part:
    if isinstance(part, str):
        return worded(part, say)
    rows = [[worded(cell, say) for cell in row] for row in part.rows]
    return Columns(rows, part.head, part.right, part.aligned)
