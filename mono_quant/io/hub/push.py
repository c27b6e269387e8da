"""Push a finished folder to the Hugging Face Hub as exactly one commit.

Everything that can be refused is refused before the first byte goes up (see `target`). The commit names the head it was planned
on, and what the Hub then holds is read back and compared with the folder. A lost answer is settled by looking.
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from mono_quant.errors import HubConflictError, HubError, HubTransientError, MonoQuantError
from mono_quant.io.hub.client import TRIES, Hub, ask, quiet_bars
from mono_quant.io.hub.patience import Patience, patience
from mono_quant.io.hub.repo import resolve
from mono_quant.io.hub.target import PushOptions, Target, files_at, is_weights, refuse_foreign
from mono_quant.io.hub.uploads import Sent, upload
from mono_quant.io.phases import phase
from mono_quant.io.text import scrub

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushResult:
    """What a push left on the Hub.

    Attributes:
        repo_id: canonical id of the target.
        commit_sha: the commit that holds the files.
        url: page of the repository.
        pr_url: page of the pull request, if one was asked for.
        created: whether the repository is new.
        already_there: whether the Hub held exactly these files before, so that no commit was needed.
    """

    repo_id: str
    commit_sha: str
    url: str
    pr_url: str | None = None
    created: bool = False
    already_there: bool = False


@dataclass(frozen=True)
class _Plan:
    """One commit: where it goes, and what the tree must hold afterwards."""

    target: Target
    options: PushOptions
    message: str
    description: str
    files: Mapping[str, Sent]
    changed: tuple[str, ...]
    superseded: tuple[str, ...]

    @property
    def hub(self) -> Hub:
        """Where it goes."""
        return self.target.hub

    @property
    def repo_id(self) -> str:
        """Canonical id of the target."""
        return self.target.repo_id

    @property
    def head(self) -> str:
        """The commit on which it is planned."""
        return self.target.facts.sha


def push(
    target: Target,
    files: Mapping[str, Sent],
    options: PushOptions,
    *,
    message: str,
    description: str = "",
    merged: Collection[str] = (),
) -> PushResult:
    """Push some files in one commit.

    Args:
        target: from `open_target`.
        files: what to push, by path in the repository; see `uploads`.
        options: as `open_target` got them.
        message: one line, where the options have none.
        description: what a pull request says below that line.
        merged: paths whose new content holds what the owner of the repository wrote there.

    Returns:
        The commit that holds the files. Pushing the same files twice makes one commit.

    Raises:
        HubConflictError: something that is not ours would be replaced, the repository hides files from commits, or changed
            meanwhile.
        HubError: any other refusal; see `mono_quant.errors`.
    """
    result = push_unless_moved(
        target, files, options, message=message, description=description, merged=merged
    )
    if isinstance(result, HubConflictError):
        raise result
    return result


def push_unless_moved(
    target: Target,
    files: Mapping[str, Sent],
    options: PushOptions,
    *,
    message: str,
    description: str = "",
    merged: Collection[str] = (),
) -> PushResult | HubConflictError:
    """Do what `push` does, but return the error where somebody committed meanwhile, so that nothing of ours is there."""
    line = options.commit_message or scrub(message)
    try:
        return _push(target, files, options, line, description, merged)
    except _Moved as error:
        moved = HubConflictError(*error.args)
    return moved


class _Moved(HubConflictError):
    """The branch has another head than the one a commit was planned on, and the commit is not there."""


def _push(
    target: Target,
    files: Mapping[str, Sent],
    options: PushOptions,
    line: str,
    description: str,
    merged: Collection[str],
) -> PushResult:
    with patience(target.hub.patience) as patient, quiet_bars():
        changed = tuple(path for path, file in files.items() if not file.equals(target.files.get(path)))
        refuse_foreign(target, options, (path for path in changed if path not in merged))
        # what an earlier push left behind goes too: a stale tokenizer is as wrong as a stale shard
        superseded = tuple(p for p in target.files if p not in files and (is_weights(p) or target.is_ours(p)))
        url = f"{target.hub.url}/{target.repo_id}"
        if not changed and not superseded:
            sha = target.facts.sha
            return PushResult(target.repo_id, sha, url, created=target.created, already_there=True)
        plan = _Plan(target, options, line, description, files, changed, superseded)
        operations = _upload(plan)
        with phase("Committing"):
            sha, pr_url = _commit(plan, operations, patient)
            _check_pushed(plan, sha)
    logger.info("%d files are in %s at %s", len(files), target.repo_id, sha)
    return PushResult(target.repo_id, sha, url, pr_url, target.created)


def _upload(plan: _Plan) -> list[Any]:
    """Upload what the repository does not have yet; return the operations of the commit."""
    operations = [plan.files[path].operation(path) for path in plan.changed]
    additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    upload(
        plan.hub, plan.repo_id, additions, plan.target.subject, plan.options.revision, plan.options.create_pr
    )
    return [*operations, *(CommitOperationDelete(path, is_folder=False) for path in plan.superseded)]


def _commit(plan: _Plan, operations: list[Any], patient: Patience) -> tuple[str, str | None]:
    """Commit, and settle by looking when the answer is lost; return the commit and the pull request's page."""
    pulls = set(_pull_requests(plan)) if plan.options.create_pr else set()
    for is_last in (False, True):
        failure: HubTransientError | HubConflictError
        patient.asked = 0.0
        try:
            info = ask(
                plan.hub,
                plan.target.subject,
                lambda api: api.create_commit(
                    plan.repo_id,
                    operations,
                    commit_message=plan.message,
                    commit_description=plan.description if plan.options.create_pr else None,
                    revision=plan.options.revision,
                    parent_commit=plan.head,
                    create_pr=plan.options.create_pr,
                ),
            )
            return info.oid, info.pr_url
        except (HubTransientError, HubConflictError) as error:
            failure = error
        landed = _landed_pull_request(plan, pulls) if plan.options.create_pr else _landed_commit(plan)
        if landed is not None:
            return landed
        if is_last or patient.left < 0 or isinstance(failure, HubConflictError):
            break
        time.sleep(max(1.0, patient.asked))
    raise failure


def _landed_commit(plan: _Plan) -> tuple[str, None] | None:
    """Return our commit if it is on the branch, None if nothing is.

    Raises:
        _Moved: somebody else committed.
    """
    head = resolve(plan.repo_id, revision=plan.options.revision, hub=plan.hub).sha
    if head == plan.head:
        return None
    try:
        commits = ask(
            plan.hub,
            plan.target.subject,
            lambda api: api.list_repo_commits(plan.repo_id, revision=plan.options.revision),
            tries=TRIES,
        )
    except HubError:
        # the history cannot be read: whether our files are there is what counts
        if _differences(plan, head):
            raise
        return head, None
    newer = list(takewhile(lambda sha: sha != plan.head, (commit.commit_id for commit in commits)))
    for sha in newer[-20:][::-1]:
        if not _differences(plan, sha):
            return sha, None
    raise _Moved(
        f"{plan.target.subject}: somebody committed {head} after {plan.head}. Nothing was overwritten; look at it, then push "
        "again."
    )


def _pull_requests(plan: _Plan) -> dict[str, str]:
    refs = ask(
        plan.hub,
        plan.target.subject,
        lambda api: api.list_repo_refs(plan.repo_id, include_pull_requests=True).pull_requests,
        tries=TRIES,
    )
    return {ref.ref: ref.target_commit for ref in refs or []}


def _landed_pull_request(plan: _Plan, known: set[str]) -> tuple[str, str] | None:
    for ref, sha in _pull_requests(plan).items():
        if ref not in known and not _differences(plan, sha):
            return sha, f"{plan.hub.url}/{plan.repo_id}/discussions/{ref.rsplit('/', 1)[-1]}"
    return None


def _differences(plan: _Plan, sha: str) -> list[str]:
    tree = files_at(plan.hub, plan.repo_id, sha)
    wrong = [path for path, file in plan.files.items() if not file.equals(tree.get(path))]
    return wrong + [path for path in plan.superseded if path in tree]


def _check_pushed(plan: _Plan, sha: str) -> None:
    # Read twice before complaining: the list may lag behind the commit.
    failure: MonoQuantError | None = None
    wrong: list[str] = []
    try:
        wrong = _differences(plan, sha) and _differences(plan, sha)
    except MonoQuantError as error:
        failure = error
    if failure is not None:
        raise type(failure)(
            f"Commit {sha} of {plan.repo_id!r} was made; only checking what it holds failed: ",
            *failure.args,
            " Pushing the same files again checks it and makes no second commit.",
        )
    if wrong:
        raise HubConflictError(
            f"Commit {sha} of {plan.repo_id!r} does not hold what was pushed: {wrong} differ. Do not use it; revert "
            "that commit and push again."
        )
