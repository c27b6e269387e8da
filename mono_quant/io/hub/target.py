"""May this repository be pushed to? Refusals before the first byte goes up."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress

from mono_quant.errors import (
    HubAuthError,
    HubConflictError,
    HubNotFoundError,
    HubOfflineError,
    LimitExceededError,
)
from mono_quant.io.hub.client import CHECK_TOKEN, HUB, TRIES, Hub, ask, check_repo_id
from mono_quant.io.hub.repo import RepoFacts, RepoFile, read_small_file, resolve

MANIFEST = "mono_quant.json"
WEIGHTS = re.compile(r"\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack)(?:\.index\.json)?$")
NO_WEIGHTS = re.compile(r"(?:^|/)(?:training_args|optimizer|scheduler|rng_state)[^/]*$")


def check_push(
    repo_id: str,
    hub: Hub = HUB,
    *,
    source: RepoFacts | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    create_pr: bool = False,
) -> None:
    """Refuse early what `push` would refuse after long work: a bad id, a missing right, a target that does not fit.

    Args:
        repo_id: target. That it does not exist yet is fine, unless `create_pr`.
        hub: where to push, and with which token.
        source: facts of the model that will be quantized.
        private, overwrite: as for `push`.
        create_pr: a pull request is wanted, which needs no right to write.

    Raises:
        HubConflictError: the target is too public, is the source itself, or holds foreign weights.
        HubError: the token may not write there.
        ConfigError: it is no id.
    """
    if hub.is_offline:
        raise HubOfflineError(f"Cannot push to {repo_id!r}: the network is off. Unset HF_HUB_OFFLINE.")
    target = full_id(repo_id, hub)
    subject = f"Cannot push to {target!r} on the Hub"
    try:
        ask(hub, subject, lambda api: api.auth_check(target, write=not create_pr), tries=TRIES)
        facts = resolve(target, hub=hub)
    except HubNotFoundError:
        if create_pr:
            raise
        _check_may_create(hub, subject, target)
        return
    check_target_repo(facts, private, source, create_pr)
    if not (overwrite or create_pr):
        tree = tree_at(hub, facts.repo_id, facts.sha)
        refuse_foreign_weights(facts, tree, our_files(hub, facts, tree))


def _check_may_create(hub: Hub, subject: str, target: str) -> None:
    # it does not exist, or is hidden from this token: at least the token has to be good, and of this owner
    me = ask(hub, subject, lambda api: api.whoami(), tries=TRIES)
    owner = target.partition("/")[0]
    names = [me.get("name"), *(org.get("name") for org in me.get("orgs") or [])]
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if owner.casefold() not in {str(name).casefold() for name in names} or role == "read":
        why = (
            "may only read" if role == "read" else f"belongs to {me.get('name')}, who cannot create it there"
        )
        raise HubAuthError(f"{subject}: it does not exist, and the token {why}. {CHECK_TOKEN}")


def full_id(repo_id: str, hub: Hub = HUB) -> str:
    """Return a repository id with its owner, which is the account of the token when none is named.

    Raises:
        ConfigError: it is no id.
        HubError: the account cannot be asked for.
    """
    check_repo_id(repo_id)
    if "/" in repo_id or hub.is_offline:
        return repo_id
    subject = f"Cannot find the owner of {repo_id!r} on the Hub"
    return f"{ask(hub, subject, lambda api: api.whoami()['name'], tries=TRIES)}/{repo_id}"


def open_target(
    hub: Hub, repo_id: str, private: bool | None, source: RepoFacts | None, create_pr: bool
) -> tuple[RepoFacts, bool]:
    """Return the target's facts and whether it was created just now."""
    subject = f"Cannot create {repo_id!r} on the Hub"
    with suppress(HubNotFoundError):
        return resolve(repo_id, hub=hub), False
    if create_pr:
        raise HubNotFoundError(
            f"{repo_id!r} does not exist, or the token cannot see it, so no pull request can be opened. Push without one."
        )
    wanted = private if private is not None else (True if _restriction(source) else None)
    ask(hub, subject, lambda api: api.create_repo(repo_id, private=wanted, exist_ok=True), tries=TRIES)
    facts = resolve(repo_id, hub=hub)
    if wanted and not facts.private:
        raise HubConflictError(
            f"{repo_id!r} should be private but is public. Nothing was uploaded; change its visibility on the Hub."
        )
    return facts, True


def _restriction(facts: RepoFacts | None) -> int:
    """Return 0 for public, 1 for gated, 2 for private; what is unknown counts as private."""
    if facts is None:
        return 0
    if facts.private is not False:
        return 2
    return 1 if facts.gated is not False else 0


def check_target_repo(
    target: RepoFacts, private: bool | None, source: RepoFacts | None, create_pr: bool
) -> None:
    if private and not target.private:
        raise HubConflictError(
            f"{target.repo_id!r} exists and is public, and private=True does not change that. Change its visibility "
            "on the Hub or choose another name."
        )
    if private is False and target.private:
        raise HubConflictError(
            f"{target.repo_id!r} exists and is private, and private=False does not change that. Change its visibility "
            "on the Hub, or leave out private=False to push to it as it is."
        )
    if source is not None and private is not False and _restriction(target) < _restriction(source):
        kind = ("public", "gated", "private")
        raise HubConflictError(
            f"{target.repo_id!r} is {kind[_restriction(target)]}, but its source {source.repo_id!r} is "
            f"{kind[_restriction(source)]}. Choose a private target, or pass private=False to publish it anyway."
        )
    if source is not None and source.repo_id.lower() == target.repo_id.lower() and not create_pr:
        raise HubConflictError(
            f"{target.repo_id!r} is the model that was quantized; its weights are not replaced. Choose another name, "
            "or open a pull request."
        )


def is_weights(path: str) -> bool:
    return WEIGHTS.search(path) is not None and NO_WEIGHTS.search(path) is None


def refuse_foreign_weights(head: RepoFacts, tree: Mapping[str, RepoFile], ours: frozenset[str]) -> None:
    foreign = [path for path in tree if is_weights(path) and path not in ours]
    if foreign:
        raise HubConflictError(
            f"{head.repo_id!r} holds weights that mono_quant did not push, such as {foreign[0]!r}. Choose another name, "
            "pass overwrite=True to replace them, or open a pull request."
        )


def our_files(hub: Hub, head: RepoFacts, tree: Mapping[str, RepoFile]) -> frozenset[str]:
    """Return the files that an earlier push left as they are: the manifest there lists them, with this size and hash."""
    if MANIFEST not in tree:
        return frozenset()
    try:
        manifest = json.loads(read_small_file(head, MANIFEST, hub=hub))
    except (ValueError, RecursionError, LimitExceededError):
        return frozenset()
    files = (
        manifest.get("files")
        if isinstance(manifest, dict) and manifest.get("format") == "mono_quant"
        else None
    )
    return frozenset(
        path
        for path, facts in (files.items() if isinstance(files, dict) else ())
        if path in tree
        and isinstance(facts, dict)
        and facts.get("size") == tree[path].size
        and tree[path].sha256 in (None, facts.get("sha256"))
    )


def tree_at(hub: Hub, repo_id: str, sha: str) -> dict[str, RepoFile]:
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
