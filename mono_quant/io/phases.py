"""What takes its time just now, said by the room that does it and shown by whoever has a place to show it.

Without a front end, what can be counted gets a progress bar on a terminal, as everywhere in the ecosystem::

    with phase("Converting") as went:
        for done, layer in enumerate(layers, 1):
            ...
            went(done, len(layers))
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

from huggingface_hub.utils import tqdm

Went: TypeAlias = Callable[[int, int], None]
Show: TypeAlias = Callable[[str, bool], AbstractContextManager[Went]]


def phase(what: str, *, in_bytes: bool = False) -> AbstractContextManager[Went]:
    """Say that something begins that may take its time, and ends with the context.

    Args:
        what: in a few words, such as `Loading the model`.
        in_bytes: what is counted are bytes, so that a rate and the time that is left say something.

    Returns:
        A context whose value may be told how much of how much is done.
    """
    return _shows[-1](what, in_bytes)


@contextmanager
def shown(show: Show) -> Iterator[None]:
    """Let a front end show the phases of everything that happens inside.

    Args:
        show: is called with what begins, and whether bytes are counted; gives the context that `phase` hands on.
    """
    _shows.append(show)
    try:
        yield
    finally:
        _shows.remove(show)


@contextmanager
def _bar(what: str, in_bytes: bool) -> Iterator[Went]:
    """Show a bar on a terminal once something was counted; `HF_HUB_DISABLE_PROGRESS_BARS` switches it off."""
    units = {"unit": "B", "unit_scale": True} if in_bytes else {}
    with tqdm(desc=what, disable=None, leave=False, delay=0.5, name="mono_quant", **units) as bar:

        def went(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield went


_shows: list[Show] = [_bar]
