"""The files of a source on the Hub: here from when they are needed first until nobody needs them any more."""

import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import NamedTuple

from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.disk.disk import discard
from mono_quant.io.hub.client import HUB, Hub
from mono_quant.io.hub.fetching import cached_file, fetch_file
from mono_quant.io.hub.repo import RepoFacts
from mono_quant.io.hub.xet import bound_buffers
from mono_quant.io.tensors.checkpoint import WeightFile
from mono_quant.io.tensors.listing import Listing, TensorHeader


class _Slot(NamedTuple):
    """One file in the scratch folder.

    Attributes:
        folder: that it lies in, alone.
        arrival: done when it is there.
    """

    folder: Path
    arrival: "Future[WeightFile]"


class HubSupply:
    """The files of a pinned repository, of which the scratch folder holds those that were fetched and not released.

    How many that are, and which are fetched ahead of their use, is up to the caller (`stages.Ahead`). What the cache of the Hugging
    Face libraries holds already is used where it is, and stays there.

    Args:
        facts: of the repository.
        listing: what its headers said; a file that says something else is refused.
        scratch: folder to download into; whoever made it removes it.
        hub: where to ask, and with which token.
    """

    def __init__(self, facts: RepoFacts, listing: Listing, scratch: Path, hub: Hub = HUB) -> None:
        bound_buffers()
        self._facts, self._scratch, self._hub = facts, scratch, hub
        self._tensors: dict[str, dict[str, TensorHeader]] = {file: {} for file in listing.files}
        for name, tensor in listing.tensors.items():
            self._tensors[tensor.file][name] = tensor
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}
        self._begun = 0

    def fetch(self, file: str) -> WeightFile:
        """Return a file, complete and proved; download it if it is not here, and wait if somebody does so already.

        Raises:
            CorruptCheckpointError: it is not what the Hub, or what its header said.
            HubOfflineError: the network is off and the file is not in the cache.
            HubError: the Hub refused; see `mono_quant.errors`.
        """
        with self._lock:
            slot = self._slots.get(file)
            is_first = slot is None
            if slot is None:
                self._begun += 1
                slot = self._slots[file] = _Slot(self._scratch / f"{self._begun}", Future())
        if is_first:
            self._download(file, slot)
        while not slot.arrival.done():
            wait([slot.arrival], timeout=0.2)  # an endless wait would not see a signal that came before it
        return slot.arrival.result()

    def release(self, file: str) -> None:
        """Delete a file that nobody needs any more, however often it was fetched; what the cache holds stays there."""
        with self._lock:
            slot = self._slots.pop(file, None)
        if slot is not None:
            discard(slot.folder)

    def _download(self, file: str, slot: _Slot) -> None:
        try:
            slot.arrival.set_result(self._get(file, slot.folder))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for, here and by others
            slot.arrival.set_exception(error)
        with self._lock:
            is_wanted = self._slots.get(file) is slot
            if is_wanted and slot.arrival.exception() is not None:
                del self._slots[file]  # whoever asks next tries anew
                is_wanted = False
        if not is_wanted:
            discard(slot.folder)

    def _get(self, file: str, folder: Path) -> WeightFile:
        path = cached_file(self._facts, file, hub=self._hub)
        if path is None:
            path = fetch_file(self._facts, file, folder, hub=self._hub)
        found, header = WeightFile.of(path)
        if header.tensors() != self._tensors[file]:
            raise CorruptCheckpointError(
                f"{file} of {self._facts.repo_id!r} at commit {self._facts.sha} has another header than the Hub sent at first. "
                "Start again."
            )
        return found
