"""Files of a pinned repository on the disk: only those that are wanted, and compared with what the Hub says they are."""

import hashlib
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils.tqdm import silent_tqdm

from mono_quant.errors import CorruptCheckpointError, HubError, HubNotFoundError, HubOfflineError
from mono_quant.io.hub.client import CHECK_CACHE, HUB, TRIES, Hub, ask, quiet_bars
from mono_quant.io.hub.repo import RepoFacts, RepoFile, check_path, git_id, snapshot

logger = logging.getLogger(__name__)


def download(facts: RepoFacts, *, wanted: Callable[[str], bool], verify: bool = True, hub: Hub = HUB) -> Path:
    """Fetch the wanted files of a pinned repository.

    Args:
        facts: from `resolve`.
        wanted: tells for a path whether to fetch it; nothing else is fetched.
        verify: compare the SHA-256 of large files with what the Hub says it is.
        hub: where to ask, and with which token.

    Returns:
        The snapshot folder; it may hold other files of this commit from earlier downloads.

    Raises:
        HubNotFoundError: no file is wanted.
        UnsafeInputError: a wanted path points outside the folder.
        CorruptCheckpointError: a file arrived with another size or hash.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    chosen = [entry for entry in facts.files if wanted(entry.path)]
    if not chosen:
        raise HubNotFoundError(f"{facts.repo_id!r} at commit {facts.sha} has none of the wanted files.")
    for entry in chosen:
        check_path(facts.repo_id, entry.path)
    names = [re.sub(r"([*?[])", r"[\1]", entry.path) for entry in chosen]
    subject = f"Cannot download {facts.repo_id!r} at commit {facts.sha}"
    with quiet_bars():
        call = partial(snapshot, facts.repo_id, facts.sha, names, hub)
        folder = ask(hub, subject, call, tries=TRIES, transfers=True)
    for entry in chosen:
        _check_arrived(facts.repo_id, folder / entry.path, entry, verify)
    if facts.revision != facts.sha and not hub.is_offline:
        _remember_revision(facts, hub)
    return folder


def fetch_file(facts: RepoFacts, path: str, folder: Path, *, hub: Hub = HUB) -> Path:
    """Fetch one file of a pinned repository into a folder that is not the cache.

    A connection that breaks is taken up where it broke.

    Args:
        facts: from `resolve`.
        path: of the file in the repository.
        folder: to fetch into; it may be missing, and holds notes of the client library beside the file.
        hub: where to ask, and with which token.

    Returns:
        The file, proved as `download` proves.

    Raises:
        HubNotFoundError: the commit has no such file.
        HubOfflineError: the network is off.
        UnsafeInputError: the path points outside the folder.
        CorruptCheckpointError: it arrived with another size or hash.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    entry = facts.file(path)
    check_path(facts.repo_id, path)
    subject = f"Cannot download {path!r} of {facts.repo_id!r} at commit {facts.sha}"
    if hub.is_offline:
        raise HubOfflineError(f"{subject}: not in the cache. {CHECK_CACHE}")

    def call(api: HfApi) -> str:
        found: str = api.hf_hub_download(
            facts.repo_id,
            path,
            revision=facts.sha,
            cache_dir=hub.cache_dir,
            local_dir=folder,
            tqdm_class=silent_tqdm,
        )
        return found

    found = Path(ask(hub, subject, call, tries=TRIES, transfers=True))
    problem = _problem(found, entry)
    if problem is not None:
        raise CorruptCheckpointError(f"{path!r} of {facts.repo_id!r} {problem}. Try again.")
    return found


def cached_file(facts: RepoFacts, path: str, *, hub: Hub = HUB) -> Path | None:
    """Return a file from the cache of the Hugging Face libraries, proved as `download` proves; None when it is not there.

    Raises:
        CorruptCheckpointError: it has another size or hash than the Hub says.
    """
    entry = facts.file(path)
    check_path(facts.repo_id, path)
    found = try_to_load_from_cache(facts.repo_id, path, cache_dir=hub.cache_dir, revision=facts.sha)
    if not isinstance(found, str):
        return None
    _check_arrived(facts.repo_id, Path(found), entry, verify=True)
    return Path(found)


def _check_arrived(repo_id: str, path: Path, entry: RepoFile, verify: bool) -> None:
    problem = _problem(path, entry, verify)
    if problem is not None:
        where = path.resolve() if path.is_file() else path.parent
        raise CorruptCheckpointError(
            f"{entry.path!r} of {repo_id!r} {problem}. Delete {where} and download again."
        )


def _problem(path: Path, entry: RepoFile, verify: bool = True) -> str | None:
    """Say how a file differs from what the Hub says it is; None when it does not."""
    if not path.is_file():
        return f"is not in {path.parent}"
    size = path.stat().st_size
    if size != entry.size:
        return f"has {size} bytes instead of {entry.size}"
    if verify and entry.sha256 is None and entry.blob_id is not None:
        found = git_id(path.read_bytes())
        if found != entry.blob_id:
            return f"has git id {found} instead of {entry.blob_id}"
    if verify and entry.sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:
            return f"has SHA-256 {found} instead of {entry.sha256}"
    return None


def _remember_revision(facts: RepoFacts, hub: Hub) -> None:
    """Let the cache know what the revision stands for, so that the name works offline."""
    try:
        ask(
            hub,
            f"Cannot note the revision of {facts.repo_id!r}",
            lambda api: api.resolve_revision(facts.repo_id, revision=facts.revision, cache_dir=hub.cache_dir),
        )
    except HubError as error:
        logger.debug("%s", error)
