"""The repository that a push goes to: what it holds and whose that is, and refusals before the first byte goes up."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    HubAuthError,
    HubConflictError,
    HubNotFoundError,
    HubOfflineError,
    LimitExceededError,
    Option,
)
from mono_quant.io.disk.json_text import parse_json
from mono_quant.io.disk.manifest import FORMAT, MANIFEST
from mono_quant.io.hub.client import CHECK_TOKEN, HUB, TRIES, Hub, ask, check_repo_id
from mono_quant.io.hub.ranges import read_small_file
from mono_quant.io.hub.repo import RepoFacts, RepoFile, resolve
from mono_quant.io.text import listed, scrub

WEIGHTS = re.compile(r"\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack)(?:\.index\.json)?$")
NO_WEIGHTS = re.compile(r"(?:^|/)(?:training_args|optimizer|scheduler|rng_state)[^/]*$")


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Attributes:
        private: visibility of a repository that is created; None makes it as private as the source.
        overwrite: replace what is in the way and was not pushed by mono_quant: weights, a licence, other files, a card that
            cannot be merged.
        create_pr: open a pull request instead of changing the branch; it may propose to replace all that.
        revision: branch to push to; None for the default one.
        commit_message: one line; None for one that says which model it is.

    Raises:
        ConfigError: the message is empty.
    """

    private: bool | None = None
    overwrite: bool = False
    create_pr: bool = False
    revision: str | None = None
    commit_message: str | None = None

    def __post_init__(self) -> None:
        if self.commit_message is not None:
            object.__setattr__(self, "commit_message", scrub(self.commit_message))
        if self.commit_message == "":
            raise ConfigError("The commit message is empty. Say what the commit is.")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "PushOptions":
        """Take options by name.

        Raises:
            ConfigError: there is no such option.
        """
        known = [entry.name for entry in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r} of a push; the options are {', '.join(known)}")
        return cls(**given)

    @property
    def may_replace(self) -> bool:
        """Whether to replace, or propose to replace, what is not ours."""
        return self.overwrite or self.create_pr


PUSH = PushOptions()


class Restricted(Protocol):
    """What has to be known of the model that was quantized, so that no copy of it gets more public."""

    @property
    def repo_id(self) -> str | None:
        """Its id on the Hub; None for anything local."""

    @property
    def private(self) -> bool | None:
        """Whether only some accounts see it; None when that is not known."""

    @property
    def gated(self) -> bool | None:
        """Whether access must be asked for; None when that is not known."""


@dataclass(frozen=True)
class Target:
    """A repository at the commit on which a push is planned.

    Attributes:
        hub: where it is.
        facts: of the commit.
        files: what the commit holds, by path.
        manifest: what an earlier push of ours said about its files; empty when there was none.
        created: it was made just now.
    """

    hub: Hub
    facts: RepoFacts
    files: Mapping[str, RepoFile]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    created: bool = False

    @property
    def repo_id(self) -> str:
        """Canonical id."""
        return self.facts.repo_id

    @property
    def subject(self) -> str:
        """Start of error messages."""
        return f"Cannot push to {self.repo_id!r} on the Hub"

    def read(self, path: str) -> bytes | None:
        """Return a small file; None when there is none.

        Raises:
            LimitExceededError: it is too large to be read.
        """
        return read_small_file(self.facts, path, hub=self.hub) if path in self.files else None

    def is_ours(self, path: str) -> bool:
        """Tell whether a file is as an earlier push of ours left it: the manifest there lists it with its size and sha256."""
        if path == MANIFEST:
            return bool(self.manifest)
        entry, listing = self.files[path], self.manifest.get("files", {}).get(path)
        if not isinstance(listing, Mapping) or listing.get("size") != entry.size:
            return False
        found = entry.sha256
        if found is None:
            # git knows a small file by another hash
            with suppress(LimitExceededError):
                found = hashlib.sha256(self.read(path) or b"").hexdigest()
        return found is not None and found == listing.get("sha256")

    def foreign(self, paths: Iterable[str]) -> list[str]:
        """Return which of some paths hold something that is not ours."""
        return [path for path in paths if path in self.files and not self.is_ours(path)]


def open_target(
    repo_id: str, options: PushOptions = PUSH, *, source: Restricted | None = None, hub: Hub = HUB
) -> Target:
    """Return the repository to push to; it is created when it is missing.

    Args:
        repo_id: `owner/name`; without an owner the account of the token is taken.
        options: how to push.
        source: the model that was quantized. The target never gets more public than it, unless `private=False`.
        hub: where to push, with which token, and how long to wait for a failing Hub.

    Raises:
        HubConflictError: it is too public, is private against `private=False`, is the source itself, or holds weights of
            somebody else.
        HubError: any other refusal; see `mono_quant.errors`.
    """
    target = full_id(repo_id, hub)
    facts = _look_up(target, options, hub)
    if facts is not None:
        return _checked(facts, options, source, hub)
    return _checked(_create(target, options, source, hub), options, source, hub, created=True)


def check_push(
    repo_id: str, options: PushOptions = PUSH, *, source: Restricted | None = None, hub: Hub = HUB
) -> Target | None:
    """Refuse early what `open_target` would refuse after long work; nothing is created.

    Args:
        repo_id, options, source, hub: as for `open_target`.

    Returns:
        The repository; None when it will be created.

    Raises:
        HubError: as `open_target`; the token may not create it.
    """
    target = full_id(repo_id, hub)
    facts = _look_up(target, options, hub)
    if facts is not None:
        return _checked(facts, options, source, hub)
    _check_may_create(hub, target)
    return None


def full_id(repo_id: str, hub: Hub = HUB) -> str:
    """Return a repository id with its owner, which is the account of the token when none is named.

    Raises:
        ConfigError: it is no id.
        HubError: the account cannot be asked for.
    """
    check_repo_id(repo_id)
    if hub.is_offline:
        raise HubOfflineError(f"Cannot push to {repo_id!r}: the network is off. Unset HF_HUB_OFFLINE.")
    if "/" in repo_id:
        return repo_id
    subject = f"Cannot find the owner of {repo_id!r} on the Hub"
    return f"{ask(hub, subject, lambda api: api.whoami()['name'], tries=TRIES)}/{repo_id}"


def is_weights(path: str) -> bool:
    """Tell whether loaders would take a file for weights."""
    return WEIGHTS.search(path) is not None and NO_WEIGHTS.search(path) is None


def refuse_foreign(target: Target, options: PushOptions, paths: Iterable[str]) -> None:
    """Refuse to replace files that are not ours, unless that was asked for.

    Raises:
        HubConflictError: some of the paths hold something that no push of ours left there.
    """
    found = [] if options.may_replace else target.foreign(paths)
    if found:
        raise HubConflictError(
            f"{target.repo_id!r} holds files that mono_quant did not push, or that were changed since: {listed(found)}. "
            "Choose another name, pass ",
            Option("overwrite", True),
            " to replace them, or ",
            Option("create_pr", True),
            " to open a pull request.",
        )


def files_at(hub: Hub, repo_id: str, sha: str) -> dict[str, RepoFile]:
    """Return the files of a commit, by path."""
    entries = ask(
        hub,
        f"Cannot list the files of {repo_id!r} at commit {sha}",
        lambda api: list(api.list_repo_tree(repo_id, recursive=True, revision=sha)),
        tries=2,
    )
    return {
        entry.path: RepoFile(
            entry.path,
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            None if entry.lfs else entry.blob_id,
        )
        for entry in entries
        if hasattr(entry, "size")
    }


def _look_up(repo_id: str, options: PushOptions, hub: Hub) -> RepoFacts | None:
    with suppress(HubNotFoundError):
        return resolve(repo_id, hub=hub)
    if options.create_pr:
        raise HubNotFoundError(
            f"{repo_id!r} does not exist, or the token cannot see it, so no pull request can be opened. Push without one."
        )
    return None


def _create(repo_id: str, options: PushOptions, source: Restricted | None, hub: Hub) -> RepoFacts:
    subject = f"Cannot create {repo_id!r} on the Hub"
    wanted = options.private if options.private is not None else (True if _restriction(source) else None)
    ask(hub, subject, lambda api: api.create_repo(repo_id, private=wanted, exist_ok=True), tries=TRIES)
    facts = resolve(repo_id, hub=hub)
    if wanted and not facts.private:
        raise HubConflictError(
            f"{repo_id!r} should be private but is public. Nothing was uploaded; change its visibility on the Hub."
        )
    return facts


def _checked(
    facts: RepoFacts, options: PushOptions, source: Restricted | None, hub: Hub, *, created: bool = False
) -> Target:
    _check_visibility(facts, options, source)
    subject = f"Cannot push to {facts.repo_id!r} on the Hub"
    ask(hub, subject, lambda api: api.auth_check(facts.repo_id, write=not options.create_pr), tries=TRIES)
    if options.revision is not None:
        facts = resolve(facts.repo_id, revision=options.revision, hub=hub)
    files = files_at(hub, facts.repo_id, facts.sha)
    target = Target(hub, facts, files, _read_manifest(hub, facts, files), created)
    if not options.may_replace:
        _refuse_foreign_weights(target)
    return target


def _read_manifest(hub: Hub, facts: RepoFacts, files: Mapping[str, RepoFile]) -> dict[str, Any]:
    if MANIFEST not in files:
        return {}
    try:
        manifest = parse_json(read_small_file(facts, MANIFEST, hub=hub), MANIFEST)
    except (CorruptCheckpointError, LimitExceededError):
        return {}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return {}
    return manifest if isinstance(manifest.get("files"), dict) else {}


def _check_may_create(hub: Hub, target: str) -> None:
    # it does not exist, or is hidden from this token: at least the token has to be good, and of this owner
    subject = f"Cannot push to {target!r} on the Hub"
    me = ask(hub, subject, lambda api: api.whoami(), tries=TRIES)
    owner = target.partition("/")[0]
    names = [me.get("name"), *(org.get("name") for org in me.get("orgs") or [])]
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if owner.casefold() not in {str(name).casefold() for name in names} or role == "read":
        why = (
            "may only read" if role == "read" else f"belongs to {me.get('name')}, who cannot create it there"
        )
        raise HubAuthError(f"{subject}: it does not exist, and the token {why}. {CHECK_TOKEN}")


def _restriction(facts: Restricted | None) -> int:
    """Return 0 for public, 1 for gated, 2 for private; what is unknown counts as private, what is local as public."""
    if facts is None or facts.repo_id is None:
        return 0
    if facts.private is not False:
        return 2
    return 1 if facts.gated is not False else 0


def _check_visibility(target: RepoFacts, options: PushOptions, source: Restricted | None) -> None:
    if options.private and not target.private:
        raise HubConflictError(
            f"{target.repo_id!r} exists and is public, and ",
            Option("private", True),
            " does not change that. Change its visibility on the Hub or choose another name.",
        )
    if options.private is False and target.private:
        raise HubConflictError(
            f"{target.repo_id!r} exists and is private, and ",
            Option("private", False),
            " does not change that. Change its visibility on the Hub, or leave out ",
            Option("private", False),
            " to push to it as it is.",
        )
    if source is None or source.repo_id is None:
        return
    if options.private is not False and _restriction(target) < _restriction(source):
        kind = ("public", "gated", "private")
        raise HubConflictError(
            f"{target.repo_id!r} is {kind[_restriction(target)]}, but its source {source.repo_id!r} is "
            f"{kind[_restriction(source)]}. Choose a private target, or pass ",
            Option("private", False),
            " to publish it anyway.",
        )
    if source.repo_id.lower() == target.repo_id.lower() and not options.create_pr:
        raise HubConflictError(
            f"{target.repo_id!r} is the model that was quantized; its weights are not replaced. Choose another name, "
            "or open a pull request."
        )


def _refuse_foreign_weights(target: Target) -> None:
    foreign = target.foreign(path for path in target.files if is_weights(path))
    if foreign:
        raise HubConflictError(
            f"{target.repo_id!r} holds weights that mono_quant did not push, such as {foreign[0]!r}. Choose another name, "
            "pass ",
            Option("overwrite", True),
            " to replace them, or open a pull request.",
        )
