"""A repository on the Hugging Face Hub, pinned to one commit: a revision is resolved once, and everything after that names the commit."""

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi

from mono_quant.errors import (
    ConfigError,
    HubError,
    HubNotFoundError,
    UnsafeInputError,
)
from mono_quant.io.disk.manifest import README
from mono_quant.io.hub.client import (
    HUB,
    TRIES,
    Hub,
    ask,
    check_repo_id,
    is_repo_id,
)
from mono_quant.io.hub.metadata import NO_CARD, CardMetadata, read_card, text_of
from mono_quant.io.phases import phase
from mono_quant.io.text import looks_like_token

logger = logging.getLogger(__name__)

_CACHED = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")


@dataclass(frozen=True)
class RepoFile:
    """One file of a repository at a commit.

    Attributes:
        path: relative to the repository, with `/`.
        size: in bytes.
        sha256: of the content for a large (LFS) file, else None.
        blob_id: git id of the content of a small file, else None.
    """

    path: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None

    def differs(self, other: "RepoFile") -> bool:
        """Tell whether two files surely have another content; of one only the other kind of hash may be known."""
        hashes = ((self.sha256, other.sha256), (self.blob_id, other.blob_id))
        return self.size != other.size or any(None not in pair and pair[0] != pair[1] for pair in hashes)


@dataclass(frozen=True)
class RepoFacts:
    """What the Hub says about a model repository at one commit.

    Attributes:
        repo_id: canonical id, with exact case and the present name of a renamed repository.
        revision: as asked for, None for the default branch.
        sha: the commit it stands for; everything is read from this commit.
        private: whether only some accounts see the repository; None when offline.
        gated: whether access must be asked for; None when offline.
        card: metadata of its card, with the task as the Hub derived it.
        library_name: as the Hub derived it.
        files: every file of the commit, or the cached ones when offline.
    """

    repo_id: str
    revision: str | None
    sha: str
    private: bool | None
    gated: bool | None
    card: CardMetadata = NO_CARD
    library_name: str | None = None
    files: tuple[RepoFile, ...] = ()

    def file(self, path: str) -> RepoFile:
        """Return one file.

        Raises:
            HubNotFoundError: the commit has no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise HubNotFoundError(f"{self.repo_id!r} has no file {path!r} at commit {self.sha}.")


def resolve(repo_id: str, *, revision: str | None = None, hub: Hub = HUB) -> RepoFacts:
    """Look a model up and pin it to a commit.

    Args:
        repo_id: `owner/name`; an old name or another case is followed to the present one.
        revision: branch, tag or commit; None for the default branch.
        hub: where to ask, and with which token.

    Returns:
        The facts, at one commit.

    Raises:
        ConfigError: the id or the revision cannot be one.
        HubNotFoundError: no such repository or revision, or it is private and the token cannot see it.
        HubOfflineError: the network is off and the revision is not in the cache.
        HubError: any other refusal; see `mono_quant.errors`.
    """
    check_repo_id(repo_id)
    if revision is not None and (
        looks_like_token(revision) or not re.fullmatch(r"[\w./+@-]{1,255}", revision)
    ):
        raise ConfigError(
            f"The revision for {repo_id!r} is not a branch, tag or commit name. Use for example 'main'."
        )
    subject = (
        f"Cannot read {repo_id!r} on the Hub"
        if revision is None
        else f"Cannot read {repo_id!r} at {revision!r}"
    )
    if hub.is_offline:
        return _cached_facts(repo_id, revision, hub, subject)
    with phase("Asking the Hub"):
        info = ask(
            hub,
            subject,
            lambda api: api.model_info(repo_id, revision=revision, files_metadata=True),
            tries=TRIES,
        )
    if (
        not isinstance(info.sha, str)
        or not re.fullmatch(r"[0-9a-f]{40}", info.sha)
        or not is_repo_id(info.id)
    ):
        raise HubError(
            f"{subject}: the answer names no repository and commit. Check that HF_ENDPOINT is a Hub."
        )
    data = info.card_data.to_dict() if info.card_data is not None else {}
    card = CardMetadata.of(data)
    files = [
        RepoFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
        for s in info.siblings or []
    ]
    facts = RepoFacts(
        info.id,
        revision,
        info.sha,
        bool(info.private),
        bool(info.gated),
        replace(card, pipeline_tag=text_of(info.pipeline_tag) or card.pipeline_tag),
        text_of(info.library_name) or text_of(data.get("library_name")),
        _by_path(files),
    )
    logger.info("%s at %s", facts.repo_id, facts.sha)
    return facts


def cached_commit(folder: Path) -> tuple[str, str] | None:
    """Return the id and the commit of a folder in the cache of the Hugging Face libraries; None for any other folder."""
    match = _CACHED.search(folder.as_posix())
    return None if match is None else (match[1].replace("--", "/"), match[2])


def _by_path(files: Iterable[RepoFile]) -> tuple[RepoFile, ...]:
    return tuple(sorted(files, key=lambda entry: entry.path))


def snapshot(repo_id: str, revision: str | None, names: list[str], hub: Hub, api: HfApi) -> Path:
    """Return the folder of a commit in the cache, with the files of some names."""
    return Path(
        api.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=names,
            cache_dir=hub.cache_dir,
            local_files_only=hub.is_offline,
        )
    )


def _cached_facts(repo_id: str, revision: str | None, hub: Hub, subject: str) -> RepoFacts:
    folder = ask(hub, subject, partial(snapshot, repo_id, revision, [], hub))
    files = [
        RepoFile(path.relative_to(folder).as_posix(), path.stat().st_size, _cached_sha256(path))
        for path in folder.rglob("*")
        if path.is_file()
    ]
    data = read_card(folder / README)
    card, library = CardMetadata.of(data), text_of(data.get("library_name"))
    return RepoFacts(repo_id, revision, folder.name, None, None, card, library, _by_path(files))


def _cached_sha256(path: Path) -> str | None:
    # The cache stores a large file under its SHA-256 and a small one under its git id.
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def git_id(content: bytes) -> str:
    """Return the id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def check_path(repo_id: str, path: str) -> None:
    """Refuse a path that leads out of the folder it is fetched to."""
    parts = path.split("/")
    if "\\" in path or not path.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise UnsafeInputError(
            f"{repo_id!r} has a file named {path!r}, which points outside the download folder."
        )
