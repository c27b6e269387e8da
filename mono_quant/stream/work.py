"""All shards of a result, from the files of the source to finished files: what is there is kept, what is missing is converted.

While one shard is converted, the files of the next are fetched and the one before is sent away; see `stages`. Of many workers each
does its turns (`crew`), and the last to end, or rank 0, does what then is missing.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mono_quant.errors import OutputError, OutputWriteError
from mono_quant.io.disk import disk
from mono_quant.io.text import printable
from mono_quant.stream.crew import Crew
from mono_quant.stream.ledger import Ledger
from mono_quant.stream.spec import Found, ShardPlan, ShardRecord
from mono_quant.stream.stages import Ahead, Behind
from mono_quant.stream.supply import Supply

logger = logging.getLogger(__name__)


class Convert(Protocol):
    """What makes one file of a result, such as `convert_shard`."""

    def __call__(
        self, plan: ShardPlan, supply: Supply, target: Path, *, told: Callable[[int], None]
    ) -> ShardRecord:
        """Write it, durably, where nothing is; leave nothing there where something was found, or this fails.

        Args:
            plan: of the file.
            supply: of the files of the source.
            target: where it is written.
            told: gets the number of bytes of the source that are done, piece by piece, from any thread.
        """
        ...


# Of files that were converted and not yet sent: one is written, one waits, one is on its way.
_UNSENT = 3


class Delivery(Protocol):
    """Where finished files are sent."""

    def put(self, record: ShardRecord, path: Path) -> None:
        """Send a file; return once the other end has it for good."""
        ...

    def holds(self, record: ShardRecord) -> bool:
        """Tell whether the other end has a file that was sent by an earlier run."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long the worker that stays waits for the others, in seconds.

    Attributes:
        arrival: for those that were started later.
        standstill: for any other to finish a shard, before it does theirs as well.
        leaving: for those that have nothing to do any more.
        pause: between two looks.
    """

    arrival: float = 300.0
    standstill: float = 1800.0
    leaving: float = 60.0
    pause: float = 0.2


def source_bytes(plan: ShardPlan) -> int:
    """Return how many bytes of sources a shard is made of."""
    pieces = [piece for job in plan.jobs for piece in (job.source, job.source.inverse) if piece]
    return sum(piece.nbytes for piece in dict.fromkeys(pieces))


def convert_all(
    shards: Sequence[ShardPlan],
    supply: Supply,
    ledger: Ledger,
    crew: Crew,
    convert: Convert,
    *,
    planned: Found,
    room: int | None = None,
    delivery: Delivery | None = None,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
    patience: Patience = Patience(),
) -> Mapping[str, ShardRecord] | Found | None:
    """Finish every shard that is not finished.

    Args:
        shards: all of them.
        supply: of the source's files.
        ledger: from `open_workspace`.
        crew: who else works on it.
        convert: makes one file.
        planned: what the shards were planned with.
        room: number of source files that may be here at once; the next ones are then fetched ahead. None where they are here
            anyway: `fetch` costs nothing.
        delivery: where finished files are sent.
        keep: them here as well.
        progress: is told the bytes of sources that are done, and of all.
        patience: with other workers.

    Returns:
        The records by file, for the one worker that publishes; None for the others, who have nothing to do any more. What was
        found, if that is more than `planned`: plan anew with it, and with what other workers found.

    Raises:
        OutputWriteError: there is too little room for what is still to be written, or the file system refused.
        OutputError: a shard found what it was planned with.
        MonoQuantError: what fetching, converting or sending raised; finished shards stay.
    """
    work = _Work(shards, supply, ledger, crew, convert, planned, delivery, keep, progress)
    work.require_room()
    crew.arrive(ledger.name)
    try:
        work.do_turns(room)
        work.wait_until_sent()
        if crew.world > 1 and not work.replan and not work.finish(patience):
            return None
    finally:
        work.stop()
    if work.replan:
        return ledger.found
    return {plan.file: ledger.record(work.digests[plan.file]) for plan in shards}


class _Work:
    def __init__(
        self,
        shards: Sequence[ShardPlan],
        supply: Supply,
        ledger: Ledger,
        crew: Crew,
        convert: Convert,
        planned: Found,
        delivery: Delivery | None,
        keep: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.shards, self.supply, self.ledger, self.crew = shards, supply, ledger, crew
        self.convert, self.planned, self.delivery, self.keep = convert, planned, delivery, keep
        self.digests = {plan.file: plan.digest() for plan in shards}
        self._bytes = {plan.file: source_bytes(plan) for plan in shards}
        self._total = sum(self._bytes.values())
        self._progress = progress
        self._telling = threading.Lock()
        self._done = self._begun = 0
        self._claims: dict[str, int] = {}
        self._behind = None if delivery is None else Behind(self._send)
        self._ahead: Ahead | None = None
        self._own = list(crew.turns(shards, ledger.name)) if crew.foresees else None

    @property
    def replan(self) -> bool:
        """Whether something was found that the shards were not planned with."""
        return bool(self.ledger.found) and (self.ledger.found | self.planned) != self.planned

    def require_room(self) -> None:
        missing = [p.size for p in self.shards if not self.ledger.seems_finished(self.digests[p.file])]
        if not self.keep:
            missing = sorted(missing)[-_UNSENT * self.crew.world :]
        disk.require_room(self.ledger.folder, sum(missing))

    def do_turns(self, room: int | None) -> None:
        """Convert what is this worker's to do."""
        turns = self._turns()
        if room is None:
            for plan in turns:
                self._convert(plan)
                later = self._later(plan)
                for file in plan.files:
                    if file not in later:
                        self.supply.release(file)
            return
        self._ahead = Ahead(self.supply, room)
        coming = self._begin_next(turns)
        while coming is not None and not self.replan:
            plan = coming
            self._ahead.wait(plan)
            coming = self._begin_next(turns)
            self._convert(plan)
            self._ahead.done([*(coming.files if coming else ()), *self._later(coming or plan)])

    def _begin_next(self, turns: Iterator[ShardPlan]) -> ShardPlan | None:
        plan = next(turns, None)
        if plan is not None and self._ahead is not None:
            self._ahead.begin(plan, self._later(plan))
        return plan

    def finish(self, patience: Patience) -> bool:
        """Do what other workers left, or leave it to them; True for the one who publishes, or plans anew."""
        if self.ledger.leave_to_others():
            logger.info(
                "worker %d of %d has nothing left to do; another one ends the work",
                self.crew.rank,
                self.crew.world,
            )
            return False
        count, since = -1, time.monotonic()
        while (missing := self._missing()) and not self.replan:
            if len(missing) != count:
                count, since = len(missing), time.monotonic()
            elif time.monotonic() - since > patience.standstill:
                logger.warning("%s takes too long elsewhere and is converted here", missing[0].file)
                self._convert(missing[0])
            plan = next((p for p in missing if self.ledger.has_locks and self._takes(p)), None)
            if plan is None:
                time.sleep(patience.pause)
            else:
                self._convert(plan)
                self.wait_until_sent()
        if not self.replan:
            self._wait_for_others(patience)
        return True

    def wait_until_sent(self) -> None:
        """Wait until the other end has what is finished here."""
        if self._behind is not None:
            self._behind.flush()

    def stop(self) -> None:
        """Begin nothing more."""
        if self._behind is not None:
            self._behind.stop()
        if self._ahead is not None:
            self._ahead.stop()
        while self._claims:
            os.close(self._claims.popitem()[1])

    def _turns(self) -> Iterator[ShardPlan]:
        """Yield the shards that this worker has to convert."""
        for plan in self.crew.turns(self.shards, self.ledger.name):
            self.ledger.refresh()
            if self.replan:
                return
            if self._takes(plan):
                yield plan
            else:
                self._tell()

    def _takes(self, plan: ShardPlan) -> bool:
        """Tell whether nobody did a shard, and keep others from it; one that is finished and not yet sent is sent."""
        digest = self.digests[plan.file]
        if self.ledger.is_known(digest, sent=self.delivery is not None) or not self._claim(plan):
            return False
        self.ledger.refresh()
        if self.delivery is not None and self.ledger.delivered(digest, self.delivery.holds) is not None:
            self._unclaim(plan.file)
            return False
        record = self.ledger.finished(digest)
        if record is not None:
            self._hand_on(record)
        return record is None

    def _convert(self, plan: ShardPlan) -> None:
        part = self.ledger.new_part(plan.file)
        try:
            record = self.convert(plan, self.supply, part, told=self._told)
            if record.found and (record.found | self.planned) == self.planned:
                raise OutputError(
                    f"{printable(plan.file)} found {record.found.to_dict()}, which it was planned with; report this, please"
                )
            self.ledger.keep(record, part)
        except BaseException:
            with suppress(OutputWriteError):
                disk.remove_file(part)
            raise
        if not record.found:
            self._hand_on(record)
        self._tell()

    def _hand_on(self, record: ShardRecord) -> None:
        if self._behind is None:
            self._unclaim(record.file)
        else:
            self._behind.put(record, self.ledger.path(record.file))

    def _send(self, record: ShardRecord, path: Path) -> None:
        if self.delivery is None or self._behind is None:
            return
        self.delivery.put(record, path)
        if not self._behind.is_stopped:
            self.ledger.send(record, keep=self.keep)
            self._unclaim(record.file)

    def _claim(self, plan: ShardPlan) -> bool:
        if self.crew.world == 1 or plan.file in self._claims:
            return True
        descriptor = self.ledger.claim(plan.file)
        if descriptor is not None:
            self._claims[plan.file] = descriptor
        return descriptor is not None

    def _unclaim(self, file: str) -> None:
        descriptor = self._claims.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)

    def _missing(self) -> list[ShardPlan]:
        self.ledger.refresh()
        sent = self.delivery is not None
        return [p for p in self.shards if not self.ledger.is_known(self.digests[p.file], sent=sent)]

    def _later(self, plan: ShardPlan) -> tuple[str, ...]:
        """Return the files that this worker will need after a shard, as far as one knows, the first first."""
        if self._own is None:
            return ()
        behind = self._own[self._own.index(plan) + 1 :]
        left = [p for p in behind if not self.ledger.seems_finished(self.digests[p.file])]
        return tuple(dict.fromkeys(file for p in left for file in p.files))

    def _wait_for_others(self, patience: Patience) -> None:
        if not self.crew.wait_for_arrivals(self.ledger.name, patience.arrival):
            logger.warning("not all of the %d workers arrived; they are not waited for", self.crew.world)
        end = time.monotonic() + patience.leaving
        while (company := self.ledger.others()) and time.monotonic() < end:
            time.sleep(patience.pause)
        if company:
            logger.warning("%s has nothing left to do and stays; it is not waited for", company[0])

    def _tell(self) -> None:
        """Say how far all workers are, by what is recorded, and this one by what it read since."""
        done = [n for file, n in self._bytes.items() if self.ledger.is_known(self.digests[file], sent=False)]
        with self._telling:
            self._done, self._begun = sum(done), 0
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _told(self, count: int) -> None:
        with self._telling:
            self._begun += count
            if self._progress is not None:
                self._progress(min(self._done + self._begun, self._total), self._total)
