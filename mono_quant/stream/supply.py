"""Where the files of a source come from while they are converted."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from mono_quant.io.tensors.checkpoint import WeightFile


class Supply(Protocol):
    """The files of a source, one at a time, so that not all of them have to be here at once."""

    def fetch(self, file: str) -> WeightFile:
        """Return a file, complete and proved; wait until it is here.

        Raises:
            MonoQuantError: it cannot be had.
        """
        ...

    def release(self, file: str) -> None:
        """Say that nobody needs a file any more."""
        ...


class FolderSupply:
    """The files of a folder, as they were when its headers were read.

    Args:
        files: by name.
    """

    def __init__(self, files: Iterable[WeightFile]) -> None:
        self._files: Mapping[str, WeightFile] = {file.path.name: file for file in files}

    def fetch(self, file: str) -> WeightFile:
        """Return a file; whoever opens it compares its identity."""
        return self._files[file]

    def release(self, file: str) -> None:
        """Keep it: it is the user's."""
