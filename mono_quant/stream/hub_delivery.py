"""Where finished files go when the result is on the Hub: to a work branch, which knows them again."""

from pathlib import Path

from mono_quant.io.hub.branch import WorkBranch
from mono_quant.io.hub.uploads import LocalFile
from mono_quant.stream.spec import ShardRecord


class HubDelivery:
    """Sends files to a work branch.

    Args:
        branch: of the run.
    """

    def __init__(self, branch: WorkBranch) -> None:
        self._branch = branch

    def put(self, record: ShardRecord, path: Path) -> None:
        """Send a file; return once the branch has it for good.

        Raises:
            CorruptCheckpointError: the file was changed since it was written.
            HubError: the Hub refused; see `mono_quant.errors`.
        """
        file = LocalFile(path, record.size, record.sha256)
        self._branch.put(record.file, file, record.to_dict())

    def holds(self, record: ShardRecord) -> bool:
        """Tell whether the branch has a file that was sent earlier."""
        return self._branch.holds(record.file, record.to_dict())

    def records(self) -> list[ShardRecord]:
        """Return what the branch knows of the files it holds: the work of other machines, and of runs that were cut off."""
        found = []
        for held in self._branch.held().values():
            try:
                record = ShardRecord.from_dict(held.record)
            except (TypeError, KeyError, ValueError, AttributeError):
                continue  # of another version, or not ours: its file is made again
            if record.file == held.stored.file.path and not record.found:
                found.append(record)
        return found
