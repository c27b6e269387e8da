"""What a stack gives back: something that runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from bench.cases import Inputs


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Runner:
    """Something that runs.

    Attributes:
        call: gives the output for inputs.
        note: which of several ways was taken, and with what settings.
        reset: brings it back to where every call starts, behind the prompt; its time is nobody's.
    """

    call: Callable[[Inputs], torch.Tensor]
    note: str = ""
    reset: Callable[[], None] = _nothing

    def saying(self, note: str) -> "Runner":
        return replace(self, note=", ".join(filter(None, (self.note, note))))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Reset before a call."""
        self.reset()
        yield
