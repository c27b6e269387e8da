"""What goes on while a shard is converted: the files of the next one come, the one before is sent away.

Both run in threads that nobody waits for long once the work was stopped: a transfer cannot be called back.
"""

import queue
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from mono_quant.stream.spec import ShardPlan, ShardRecord
from mono_quant.stream.supply import Supply

# How long a transfer that was begun may take to end by itself after a stop.
GRACE_SECONDS = 2.0
_PAUSE = 0.05


class Ahead:
    """The files of sources that are here, or on their way.

    Args:
        supply: where they come from.
        room: number of files that may be here at once. A shard that is made of more has them all, and nothing else is here then.
    """

    def __init__(self, supply: Supply, room: int) -> None:
        self._supply, self._room = supply, room
        self._changed = threading.Condition()
        self._held: list[str] = []
        self._current: Collection[str] = ()
        self._later: Collection[str] = ()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, plan: ShardPlan, later: Collection[str]) -> None:
        """Begin to fetch the files of a shard.

        Args:
            plan: of the shard.
            later: files that shards behind it will need, as far as one knows.
        """
        self._later = later
        self._thread = threading.Thread(target=self._fetch, args=(plan.files,), daemon=True)
        self._thread.start()

    def wait(self, plan: ShardPlan) -> None:
        """Wait for the files of the shard that was begun last; from now on it is the one that is converted.

        Raises:
            MonoQuantError: what fetching raised.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        self._current = plan.files

    def done(self, needed: Collection[str]) -> None:
        """Let go of the files that nobody needs any more.

        Args:
            needed: by the next shard and those behind it, as far as one knows.
        """
        with self._changed:
            self._current = ()
            for file in [file for file in self._held if file not in needed]:
                self._let_go(file)
            self._changed.notify_all()

    def stop(self) -> None:
        """Fetch nothing more, and let go of everything."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(GRACE_SECONDS)
        with self._changed:
            for file in list(self._held):
                self._let_go(file)

    def _fetch(self, files: Collection[str]) -> None:
        try:
            for file in files:
                with self._changed:
                    while not (self._stopped or self._has_room(file, files)):
                        self._changed.wait()
                    if self._stopped:
                        return
                    if file not in self._held:
                        self._held.append(file)
                self._supply.fetch(file)
        except BaseException as error:  # noqa: BLE001  raised again by the one who waits
            self._error = error

    def _has_room(self, file: str, files: Collection[str]) -> bool:
        if file in self._held or len(self._held) < self._room:
            return True
        spare = [held for held in self._held if held not in files and held not in self._current]
        if spare:
            order = list(self._later)
            # what is needed last of all goes first
            self._let_go(max(spare, key=lambda held: order.index(held) if held in order else len(order)))
            return len(self._held) < self._room or self._has_room(file, files)
        return not self._current

    def _let_go(self, file: str) -> None:
        self._held.remove(file)
        self._supply.release(file)


class Behind:
    """Sends finished files away, one at a time, at the most one waiting.

    Args:
        send: does it with one of them.
    """

    def __init__(self, send: Callable[[ShardRecord, Path], None]) -> None:
        self._send = send
        self._queue: queue.Queue[tuple[ShardRecord, Path]] = queue.Queue(1)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def is_stopped(self) -> bool:
        """Whether nothing counts any more that ends now."""
        return self._stopped.is_set()

    def put(self, record: ShardRecord, path: Path) -> None:
        """Hand a file over; wait while another one waits.

        Raises:
            MonoQuantError: what sending an earlier one raised.
        """
        while True:
            self._raise()
            try:
                self._queue.put((record, path), timeout=_PAUSE)
                return
            except queue.Full:
                continue

    def flush(self) -> None:
        """Wait until everything is sent.

        Raises:
            MonoQuantError: what sending raised.
        """
        while self._queue.unfinished_tasks:
            self._raise()
            time.sleep(_PAUSE)

    def stop(self) -> None:
        """Send nothing more."""
        self._stopped.set()
        self._thread.join(GRACE_SECONDS)

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                item = self._queue.get(timeout=_PAUSE)
            except queue.Empty:
                continue
            try:
                self._send(*item)
            except BaseException as error:  # noqa: BLE001  raised again by the one who hands over
                self._error = error
                return
            self._queue.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
