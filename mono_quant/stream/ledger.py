"""What is finished of a result, in a folder of its own that outlives a kill.

There are shards, and `records.<rank>.jsonl` with a line for every one of them, written once the shard has its name. Only a line
whose plan, size and sha256 fit counts; one that nobody can read does not.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mono_quant.errors import MonoQuantError
from mono_quant.io.disk import disk
from mono_quant.io.disk.reading import open_regular, read_all
from mono_quant.stream import members
from mono_quant.stream.members import Member
from mono_quant.stream.spec import Found, Seen, ShardRecord, summed

logger = logging.getLogger(__name__)


class _Line(NamedTuple):
    """What the ledger says last of one plan."""

    run: str
    record: ShardRecord
    sent: bool


class Ledger:
    """What is finished of one result; `workspace.open_workspace` hands it out.

    Attributes:
        folder: where it lies.
        name: of what it is of: workers that write one result have the same.
        me: this worker.
        found: what this run and those before it found, to be planned with.
        seen: sums over the values of weights that it names, by their name in the model.

        has_locks: whether the file system can lock, so that one sees who lives.

    Open it inside the gate.

    Args:
        folder, me, name: see there.
        lock: that says that this worker lives; see `members.enter`. None for one that only looks.
    """

    def __init__(self, folder: Path, me: Member, lock: int | None, name: str = "") -> None:
        self.folder = folder
        self.name = name
        self.me = me
        self.found = Found()
        self.has_locks = not members.is_free(folder / "gate")
        self._lock = lock
        self._finisher: int | None = None
        self._writing = threading.RLock()
        self._lines: dict[str, _Line] = {}
        self._seen: dict[tuple[str, int], Seen] = {}
        self._read: dict[Path, int] = {}
        self.refresh()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever finished here; what was only found is found again."""
        return not self._lines

    @property
    def seen(self) -> dict[str, Seen]:
        """What the values of the weights were that `found` names, their parts together."""
        return summed(list(self._seen.values()))

    def refresh(self) -> None:
        """Take in what all workers wrote since."""
        with self._writing:
            for path in sorted(self.folder.glob("records.*.jsonl")):
                for line in self._new_lines(path):
                    # a line that a killed worker did not finish
                    with suppress(ValueError, TypeError, KeyError, AttributeError):
                        self._learn(json.loads(line))

    def seems_finished(self, digest: str) -> bool:
        """Tell whether a file of the recorded size is here, or was sent away; reads no file."""
        line = self._lines.get(digest)
        if line is None:
            return False
        try:
            return line.sent or self.path(line.record.file).lstat().st_size == line.record.size
        except FileNotFoundError:
            return False

    def finished(self, digest: str) -> ShardRecord | None:
        """Return the record of a shard whose file is here, and is what was written: it is read once in every run.

        Args:
            digest: of its plan.
        """
        line = self._lines.get(digest)
        if line is None or not self._is_as_written(line):
            return None
        if line.run != self.me.run:
            self._append(line.record, line.sent)
        return line.record

    def delivered(self, digest: str, holds: Callable[[ShardRecord], bool]) -> ShardRecord | None:
        """Return the record of a shard that was sent away.

        Args:
            digest: of its plan.
            holds: tells whether the other end still has it; asked once in every run.
        """
        line = self._lines.get(digest)
        if line is None or not line.sent:
            return None
        if line.run != self.me.run:
            if not holds(line.record):
                return None
            self._append(line.record, sent=True)
        return line.record

    def is_known(self, digest: str, *, sent: bool) -> bool:
        """Tell whether a worker of this run said that a shard is finished, or sent as well; reads no file."""
        line = self._lines.get(digest)
        return line is not None and line.run == self.me.run and (line.sent or not sent)

    def record(self, digest: str) -> ShardRecord:
        """Return what is recorded of a shard."""
        return self._lines[digest].record

    def new_part(self, file: str) -> Path:
        """Return where this worker builds a file; nothing is there."""
        path = self.folder / f"{_flat(file)}.{self.me.rank}.part"
        if os.path.lexists(path):
            disk.remove_file(path)
        return path

    def path(self, file: str) -> Path:
        """Return where a finished file lies."""
        return self.folder / _flat(file)

    def keep(self, record: ShardRecord, part: Path) -> None:
        """Give a file that is complete and on the disk its name, and record it; or record what was found in its stead.

        Raises:
            OutputWriteError: the file system refused.
        """
        if not record.found:
            disk.move_file(part, self.path(record.file))
        self._append(record, sent=False)

    def send(self, record: ShardRecord, *, keep: bool) -> None:
        """Record that the other end has a file.

        Args:
            record: of the file.
            keep: it here as well.
        """
        self._append(record, sent=True)
        if not keep:
            disk.remove_file(self.path(record.file))

    def new_scratch(self) -> Path:
        """Return an empty folder of this worker, for files that are needed for a while; it goes with the workspace."""
        path = self.folder / f"scratch.{self.me.rank}"
        disk.discard(path)
        disk.make_folder(path)
        return path

    def learn_sent(self, records: Iterable[ShardRecord]) -> None:
        """Take in what the other end says that it has: the work of other machines, and of workspaces that are gone."""
        with self._writing:
            for record in records:
                if record.digest not in self._lines:
                    self._lines[record.digest] = _Line("", record, sent=True)

    def claim(self, file: str) -> int | None:
        """Lock a shard against other workers; closing the descriptor gives it back. None where another has it."""
        return members.try_lock(self.folder / f"{_flat(file)}.claim")

    def others(self) -> list[Member]:
        """Return the other workers of this run that live."""
        with members.gate(self.folder):
            return members.others(self.folder, self.me.rank)

    def leave_to_others(self) -> bool:
        """Leave if another sees to the rest: rank 0 where it lives, otherwise the last; False where that is this worker."""
        with members.gate(self.folder):
            company = members.others(self.folder, self.me.rank)
            if (company and self.me.rank) or (not self.has_locks and self.me.rank):
                self.leave()
                return True
            if self._finisher is None:
                self._finisher = members.try_lock(self.folder / "finisher")
            if self._finisher is None:
                self.leave()
                return True
        return False

    def leave(self) -> None:
        """Say that this worker does nothing here any more."""
        for descriptor in (self._lock, self._finisher):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._finisher = None

    @property
    def is_left(self) -> bool:
        """Whether this worker left the rest to others."""
        return self._lock is None

    def is_in(self, place: Path, files: Mapping[str, Any]) -> bool:
        """Tell whether a folder was made of everything that is recorded here.

        Args:
            place: the folder.
            files: what its manifest lists.
        """
        for record in {line.record.file: line.record for line in self._lines.values()}.values():
            here, there = self.path(record.file), place / record.file
            if files.get(record.file, {}).get("sha256") != record.sha256:
                return False
            # a second name of the same file, or the file itself where the file system has no second names
            if os.path.lexists(here) and not (there.exists() and here.samefile(there)):
                return False
        return True

    def _learn(self, data: Mapping[str, Any]) -> None:
        record = ShardRecord.from_dict(data["record"])
        if record.found:
            self.found |= record.found
            names = record.found.wide | record.found.unfinite | record.found.overflowed
            # a part that lies at the border of two files is seen twice
            self._seen |= {(seen.weight, seen.part): seen for seen in record.seen if seen.weight in names}
        else:
            self._lines[record.digest] = _Line(data["run"], record, bool(data["sent"]))

    def _append(self, record: ShardRecord, sent: bool) -> None:
        path = self.folder / f"records.{self.me.rank}.jsonl"
        data = {"run": self.me.run, "sent": sent, "record": record.to_dict()}
        with self._writing:
            descriptor = disk.open_shared(path)
            try:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                disk.append(descriptor, b"\n" * torn + json.dumps(data).encode() + b"\n", path)
            finally:
                os.close(descriptor)
            self._learn(data)

    def _new_lines(self, path: Path) -> Sequence[bytes]:
        """Read what was added to a file, up to its last whole line."""
        start = self._read.get(path, 0)
        descriptor = open_regular(path)
        try:
            data = read_all(descriptor, max(0, os.fstat(descriptor).st_size - start), start)
        finally:
            os.close(descriptor)
        end = data.rfind(b"\n") + 1
        self._read[path] = start + end
        return data[:end].splitlines()

    def _is_as_written(self, line: _Line) -> bool:
        record, path = line.record, self.path(line.record.file)
        try:
            descriptor = open_regular(path)
        except MonoQuantError:
            return False
        try:
            if os.fstat(descriptor).st_size != record.size:
                return False
            return line.run == self.me.run or _sha256(descriptor, path.name) == record.sha256
        finally:
            os.close(descriptor)


def _sha256(descriptor: int, name: str) -> str:
    start = time.monotonic()
    with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        logger.info("%s: %d bytes read again in %.1f s", name, file.tell(), time.monotonic() - start)
    return digest


def _flat(file: str) -> str:
    return file.replace("/", "%2F")
