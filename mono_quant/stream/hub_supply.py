"""The files of a source on the Hub: downloaded ahead of the work, and deleted behind it."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.disk.disk import discard
from mono_quant.io.hub.client import HUB, Hub
from mono_quant.io.hub.fetching import cached_file, fetch_file
from mono_quant.io.hub.repo import RepoFacts
from mono_quant.io.hub.xet import bound_buffers
from mono_quant.io.tensors.checkpoint import WeightFile
from mono_quant.io.tensors.listing import Listing, TensorHeader


@dataclass
class _Slot:
    """Room for one file in the scratch folder.

    Attributes:
        folder: that the file lies in, alone.
        arrival: done when it is there.
        is_used: it was fetched, and not released yet.
    """

    folder: Path
    arrival: "Future[WeightFile]" = field(default_factory=Future)
    is_used: bool = False

    @property
    def failed(self) -> bool:
        return self.arrival.done() and self.arrival.exception() is not None


class HubSupply:
    """The files of a pinned repository, of which only a few lie in the scratch folder at any time.

    While files are used, the next ones arrive, one after the other. What the cache of the Hugging Face libraries holds already is
    used where it is, and stays there.

    Args:
        facts: of the repository.
        listing: what its headers said; a file that says something else is refused.
        scratch: folder to download into; whoever made it removes it.
        hub: where to ask, and with which token.
        ahead: how many files may wait for their use. There are never more than this plus two, unless more are used at once.
    """

    def __init__(
        self, facts: RepoFacts, listing: Listing, scratch: Path, hub: Hub = HUB, ahead: int = 1
    ) -> None:
        bound_buffers()
        self._facts, self._hub, self._scratch, self._ahead = facts, hub, scratch, ahead
        self._tensors: dict[str, dict[str, TensorHeader]] = {file: {} for file in listing.files}
        for name, tensor in listing.tensors.items():
            self._tensors[tensor.file][name] = tensor
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}
        self._expected: list[str] = []
        self._started = 0
        self._arriving = 0

    def expect(self, files: Sequence[str]) -> None:
        """Say what will be fetched from now on, in which order; a file that is used again is named again."""
        with self._lock:
            self._expected = list(files)
            for file in [f for f, slot in self._slots.items() if not slot.is_used and f not in files]:
                self._free(file)
            self._look_ahead()

    def fetch(self, file: str) -> WeightFile:
        """Return a file, complete and proved; wait until it is here.

        Raises:
            CorruptCheckpointError: it is not what the Hub, or what its header said.
            HubOfflineError: the network is off and the file is not in the cache.
            HubError: the Hub refused; see `mono_quant.errors`.
        """
        with self._lock:
            if file in self._expected:
                self._expected.remove(file)
            slot = self._slots.get(file)
            if slot is None or slot.failed:
                self._make_room()
                slot = self._begin(file)
            slot.is_used = True
            self._look_ahead()
        try:
            while not slot.arrival.done():
                wait(
                    [slot.arrival], timeout=0.2
                )  # an endless wait would not see a signal that came before it
            return slot.arrival.result()
        except BaseException:
            with self._lock:
                self._let_go(file, slot)
            raise

    def release(self, file: str) -> None:
        """Delete a file that nobody needs any more, however often it was fetched, unless it is the next to be fetched."""
        with self._lock:
            if file in self._slots:
                self._let_go(file, self._slots[file])
            self._look_ahead()

    def close(self) -> None:
        """Begin no more downloads; those that run end with the process, or when their folder is removed."""
        with self._lock:
            self._expected = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _let_go(self, file: str, slot: _Slot) -> None:
        slot.is_used = False
        is_next = file in self._expected[: self._ahead] and not slot.failed
        if not is_next and self._slots.get(file) is slot:
            self._free(file)

    def _look_ahead(self) -> None:
        """Begin the next download, if there is room and none is running."""
        waiting = sum(not slot.is_used for slot in self._slots.values())
        if self._arriving or waiting >= self._ahead or len(self._slots) >= self._ahead + 2:
            return
        following = next((file for file in self._expected if file not in self._slots), None)
        if following is not None:
            self._begin(following)

    def _make_room(self) -> None:
        """Delete what waits for a use that comes later than that of a file which is needed now."""
        idle = [f for f, slot in self._slots.items() if not slot.is_used and slot.arrival.done()]
        idle.sort(key=lambda f: self._expected.index(f) if f in self._expected else len(self._expected))
        while idle and len(self._slots) >= self._ahead + 2:
            self._free(idle.pop())

    def _begin(self, file: str) -> _Slot:
        if file in self._slots:
            self._free(file)
        self._started += 1
        slot = self._slots[file] = _Slot(self._scratch / f"{self._started}")
        self._arriving += 1
        threading.Thread(target=self._arrive, args=(file, slot), daemon=True).start()
        return slot

    def _free(self, file: str) -> None:
        slot = self._slots.pop(file)
        discard(slot.folder)

    def _arrive(self, file: str, slot: _Slot) -> None:
        try:
            found = self._get(file, slot.folder)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            slot.arrival.set_exception(error)
        else:
            slot.arrival.set_result(found)
        with self._lock:
            self._arriving -= 1
            if self._slots.get(file) is not slot:
                discard(slot.folder)  # nobody waited for it
            elif not slot.failed:
                self._look_ahead()

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
