"""A branch on which a model that is too large for one commit's worth of disk gathers, file by file, until all of it is published at once.

The branch is the ledger: each file is committed together with a record of what is in it, so that any process on any machine goes on
from what is there. Main gets one commit that names the files of the branch; nothing is sent twice.
"""

import hashlib
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from huggingface_hub import CommitOperationAdd

from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubTransientError,
    LimitExceededError,
)
from mono_quant.io.disk.json_text import canonical_json, parse_json
from mono_quant.io.hub.client import TRIES, Hub, apart, ask, quiet_bars
from mono_quant.io.hub.patience import patience
from mono_quant.io.hub.push import PushResult, push_unless_moved
from mono_quant.io.hub.ranges import read_small_file
from mono_quant.io.hub.repo import RepoFacts, RepoFile, git_id, resolve
from mono_quant.io.hub.target import PUSH, PushOptions, Restricted, Target, is_weights, open_target
from mono_quant.io.hub.uploads import LocalFile, Sent, StoredFile, upload
from mono_quant.io.hub.xet import bound_buffers
from mono_quant.io.phases import phase
from mono_quant.io.text import listed

logger = logging.getLogger(__name__)

# Folder of the records; it is on work branches alone.
RECORDS = "mono_quant_records"
_NAME = "mono-quant-"
_DIGITS = 12
# Of a commit to the branch: several ranks that finish at once are in each other's way.
_PATIENT_TRIES = 6


@dataclass(frozen=True)
class Held:
    """A file that a work branch holds whole.

    Attributes:
        record: what was said of it when it was put there; `size` and `sha256` are those of the file.
        stored: where it is.
    """

    record: Mapping[str, Any]
    stored: StoredFile


@dataclass(frozen=True)
class WorkBranch:
    """A branch of a repository that one run, on however many machines, writes its files to.

    Attributes:
        hub: where it is.
        repo_id: canonical id of the repository.
        name: of the branch.
    """

    hub: Hub
    repo_id: str
    name: str

    @classmethod
    def open(cls, target: Target, identity: str) -> "WorkBranch":
        """Return the branch of a run; it is made from the commit of the target when it is missing.

        Args:
            target: from `open_target`, which refused whatever can be refused.
            identity: hexadecimal digest of everything that the result depends on.

        Raises:
            ConfigError: the identity is no digest.
            HubAuthError: the token may not make branches there.
            HubError: any other refusal; see `mono_quant.errors`.
        """
        digits = identity[:_DIGITS]
        if len(digits) < _DIGITS or not set(digits) <= set("0123456789abcdef"):
            raise ConfigError(f"{identity!r} is no hexadecimal digest. Pass the sha256 of the plan.")
        bound_buffers()
        branch = cls(target.hub, target.repo_id, _NAME + digits)
        ask(
            branch.hub,
            branch._subject("make"),
            lambda api: api.create_branch(
                branch.repo_id, branch=branch.name, revision=target.facts.sha, exist_ok=True
            ),
            tries=TRIES,
        )
        return branch

    def held(self) -> dict[str, Held]:
        """Return the files that are there whole, by path: those of the size and sha256 that their record says."""
        facts = self._look()
        paths = [file.path for file in facts.files if file.path.startswith(f"{RECORDS}/")]

        def read_all() -> list[Mapping[str, Any] | None]:
            with ThreadPoolExecutor(max_workers=8) as pool:
                return list(pool.map(lambda path: self._read_record(facts, path), paths))

        with phase("Reading what is there"):
            records = apart(read_all)
        there = {file.path: file for file in facts.files}
        found = {}
        for path, record in zip(paths, records, strict=True):
            file = there.get(path.removeprefix(f"{RECORDS}/").removesuffix(".json"))
            if file is not None and record is not None and self._is_of(facts, record, file):
                found[file.path] = Held(record, StoredFile(facts.sha, file))
        return found

    def holds(self, path: str, record: Mapping[str, Any]) -> bool:
        """Tell whether a file is there whole, with this record; one look."""
        facts = self._look()
        there = {found.path: found for found in facts.files}
        file, note = there.get(path), there.get(_record_path(path))
        if file is None or note is None or note.blob_id != git_id(_note(path, record)):
            return False
        return self._is_of(facts, record, file)

    def put(self, path: str, file: LocalFile, record: Mapping[str, Any]) -> None:
        """Commit a file and its record; nothing happens when both are there.

        A lost answer, and a conflict with somebody else who writes to the branch, are settled by looking.

        Args:
            path: of the file in the repository.
            file: to put there.
            record: plain data to be given back by `held`, with the `size` and `sha256` of the file.

        Raises:
            CorruptCheckpointError: the file is not what its record says, or was changed since it was looked at.
            HubConflictError: the branch does not hold what was committed, or the repository hides the file.
            HubError: any other refusal; see `mono_quant.errors`.
        """
        if (record.get("size"), record.get("sha256")) != (file.size, file.sha256):
            raise CorruptCheckpointError(
                f"{path!r} has {file.size} bytes and SHA-256 {file.sha256}, but its record says {record.get('size')} bytes "
                f"and {record.get('sha256')}. Make it again."
            )
        with patience(self.hub.patience) as patient, quiet_bars():
            if self.holds(path, record):
                return
            additions = [file.operation(path), CommitOperationAdd(_record_path(path), _note(path, record))]
            upload(self.hub, self.repo_id, additions, self._subject("write to"), self.name)
            if additions[0].upload_info.sha256.hex() != file.sha256:
                raise CorruptCheckpointError(
                    f"{file.path} was changed while it was uploaded. Nothing was committed; make it again."
                )
            failure: HubError | None = None
            for attempt in range(_PATIENT_TRIES):
                patient.asked = 0.0
                failure = self._commit(f"Add {path}", additions)
                # the list may lag behind the commit
                if self.holds(path, record) or (failure is None and self.holds(path, record)):
                    return
                if failure is None or patient.left < 0:
                    break
                time.sleep(max(2.0**attempt, patient.asked))
        raise failure or HubConflictError(
            f"Branch {self.name!r} of {self.repo_id!r} does not hold {path!r} as it was committed. Try again."
        )

    def publish(
        self,
        target: Target,
        files: Mapping[str, LocalFile],
        gathered: Iterable[str],
        options: PushOptions = PUSH,
        *,
        source: Restricted | None = None,
        message: str,
        description: str = "",
        merged: Collection[str] = (),
    ) -> PushResult:
        """Publish the files of the branch, together with others, in one commit; then delete the branch.

        Where somebody commits meanwhile, and touches nothing that the commit is about, it is made once more on top.

        Args:
            target: from `open_target`, not long ago: what is in `files` was made for it.
            files: other files, by path.
            gathered: paths of the files of the branch; all of them are held.
            options: as `open_target` got them.
            source: the model that was quantized; see `open_target`.
            message, description, merged: see `push`.

        Returns:
            The commit that holds all files.

        Raises:
            HubConflictError: the branch lacks a file, or somebody changed what the commit is about.
            HubError: any other refusal; see `mono_quant.errors`.
        """
        held = self.held()
        missing = sorted(set(gathered) - held.keys())
        if missing:
            raise HubConflictError(
                f"Branch {self.name!r} of {self.repo_id!r} does not hold {listed(missing)}. Nothing was published; run the "
                "same command again, it makes what is missing."
            )
        sent: dict[str, Sent] = {**files, **{path: held[path].stored for path in gathered}}

        commit = partial(
            push_unless_moved, options=options, message=message, description=description, merged=merged
        )
        result = commit(target, sent)
        if isinstance(result, HubConflictError):
            later = open_target(self.repo_id, options, source=source, hub=self.hub)
            _refuse_changes(target, later, sent)
            result = commit(later, sent)
        if isinstance(result, HubConflictError):
            raise result
        self.drop()
        return result

    def drop(self) -> None:
        """Delete the branch; one that resists stays, with a warning: everything in it is published or of no use."""
        try:
            ask(
                self.hub,
                self._subject("delete"),
                lambda api: api.delete_branch(self.repo_id, branch=self.name),
                tries=TRIES,
            )
        except HubNotFoundError:
            return
        except HubError as error:
            logger.warning("%s It holds nothing that is needed; delete it on the Hub.", error)

    def _subject(self, what: str) -> str:
        return f"Cannot {what} branch {self.name!r} of {self.repo_id!r} on the Hub"

    def _look(self) -> RepoFacts:
        return resolve(self.repo_id, revision=self.name, hub=self.hub)

    def _read_record(self, facts: RepoFacts, path: str) -> Mapping[str, Any] | None:
        try:
            record = parse_json(read_small_file(facts, path, hub=self.hub), path)
        except (CorruptCheckpointError, LimitExceededError):
            return None
        return record if isinstance(record, dict) else None

    def _is_of(self, facts: RepoFacts, record: Mapping[str, Any], file: RepoFile) -> bool:
        if record.get("size") != file.size:
            return False
        found = file.sha256
        if found is None:
            # git knows a small file by another hash
            with suppress(LimitExceededError):
                found = hashlib.sha256(read_small_file(facts, file.path, hub=self.hub)).hexdigest()
        return found is not None and found == record.get("sha256")

    def _commit(self, message: str, operations: list[Any]) -> HubError | None:
        """Commit to the branch; return what went wrong, where looking and trying again may help."""
        try:
            ask(
                self.hub,
                self._subject("write to"),
                lambda api: api.create_commit(
                    self.repo_id, operations, commit_message=message, revision=self.name
                ),
            )
        except (HubTransientError, HubConflictError) as error:
            return error
        return None


def _record_path(path: str) -> str:
    return f"{RECORDS}/{path}.json"


def _note(path: str, record: Mapping[str, Any]) -> bytes:
    return canonical_json(dict(record), path).encode()


def _refuse_changes(target: Target, later: Target, sent: Mapping[str, Sent]) -> None:
    """Refuse to go on where what a commit is about is not as it was when it was planned."""
    before, after = target.files, later.files
    paths = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    ours = [path for path in paths if path in before and target.is_ours(path)]
    changed = [path for path in paths if path in sent or path in ours or is_weights(path)]
    if changed:
        raise HubConflictError(
            f"{target.subject}: somebody changed {listed(changed)} meanwhile, in commit {later.facts.sha}. Nothing was published; "
            "look at it, then run the same command again."
        )
