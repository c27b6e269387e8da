"""Read from the Hugging Face Hub, pinned to one commit.

A revision is resolved to a commit once; everything after that names the commit. Only the files that are wanted
are fetched, and what arrived is compared with what the Hub says it is.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers

from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    LimitExceededError,
    UnsafeInputError,
)
from mono_quant.io.disk.manifest import README
from mono_quant.io.hub.client import (
    CHECK_CACHE,
    HUB,
    TRIES,
    Hub,
    apart,
    ask,
    check_repo_id,
    is_repo_id,
    quiet_bars,
)
from mono_quant.io.hub.metadata import NO_CARD, CardMetadata, read_card, text_of
from mono_quant.io.phases import phase
from mono_quant.io.tensors.headers import MAX_HEADER_BYTES
from mono_quant.io.text import looks_like_token
from mono_quant.version import __version__

logger = logging.getLogger(__name__)

MAX_SMALL_FILE_BYTES = 32 * 2**20
_CACHED = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
FIRST_BYTES = 100_000  # holds the whole header of nearly every file, so one request is enough


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
        _check_path(facts.repo_id, entry.path)
    names = [re.sub(r"([*?[])", r"[\1]", entry.path) for entry in chosen]
    subject = f"Cannot download {facts.repo_id!r} at commit {facts.sha}"
    with quiet_bars():
        call = partial(_snapshot, facts.repo_id, facts.sha, names, hub)
        folder = ask(hub, subject, call, tries=TRIES, transfers=True)
    for entry in chosen:
        _check_arrived(facts.repo_id, folder / entry.path, entry, verify)
    if facts.revision != facts.sha and not hub.is_offline:
        _remember_revision(facts, hub)
    return folder


def read_headers(
    facts: RepoFacts, *, wanted: Callable[[str], bool] = lambda path: True, hub: Hub = HUB
) -> dict[str, bytes]:
    """Fetch the headers of the safetensors files, and no weights.

    Args:
        facts: from `resolve`.
        wanted: tells for a `.safetensors` path whether to read it.
        hub: where to ask, and with which token.

    Returns:
        For each file its first bytes: the 8-byte length and the JSON header.

    Raises:
        CorruptCheckpointError: a file is shorter than its header.
        LimitExceededError: a header is longer than 32 MiB.
        HubOfflineError: the network is off and no such file is in the cache.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    chosen = [f for f in facts.files if f.path.endswith(".safetensors") and wanted(f.path)]
    if hub.is_offline:
        _check_cached(facts, chosen)

    def read_all() -> list[bytes]:
        with ThreadPoolExecutor(max_workers=8) as pool:
            return list(pool.map(lambda entry: _read_header(facts, entry, hub), chosen))

    with phase("Reading the headers"):
        heads = apart(read_all)
    return {entry.path: head for entry, head in zip(chosen, heads, strict=True)}


def read_small_file(facts: RepoFacts, path: str, *, hub: Hub = HUB) -> bytes:
    """Fetch one small file, such as `config.json`, into memory.

    Raises:
        HubNotFoundError: the commit has no such file.
        LimitExceededError: it is larger than 32 MiB.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    entry = facts.file(path)
    if entry.size > MAX_SMALL_FILE_BYTES:
        raise LimitExceededError(
            f"{path!r} of {facts.repo_id!r} has {entry.size} bytes; at most {MAX_SMALL_FILE_BYTES} are read here."
        )
    return _read_range(facts, entry, 0, entry.size, hub, whole=True) if entry.size else b""


def _by_path(files: Iterable[RepoFile]) -> tuple[RepoFile, ...]:
    return tuple(sorted(files, key=lambda entry: entry.path))


def _snapshot(repo_id: str, revision: str | None, names: list[str], hub: Hub, api: HfApi) -> Path:
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
    folder = ask(hub, subject, partial(_snapshot, repo_id, revision, [], hub))
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


def _check_path(repo_id: str, path: str) -> None:
    parts = path.split("/")
    if "\\" in path or not path.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise UnsafeInputError(
            f"{repo_id!r} has a file named {path!r}, which points outside the download folder."
        )


def _check_arrived(repo_id: str, path: Path, entry: RepoFile, verify: bool) -> None:
    if not path.is_file():
        raise CorruptCheckpointError(
            f"{entry.path!r} of {repo_id!r} is not in {path.parent}. Delete that folder and download again."
        )
    size = path.stat().st_size
    if size != entry.size:
        raise CorruptCheckpointError(
            f"{entry.path!r} of {repo_id!r} has {size} bytes instead of {entry.size}. Delete {path.resolve()} and "
            "download again."
        )
    if verify and entry.sha256 is None and entry.blob_id is not None:
        found = git_id(path.read_bytes())
        if found != entry.blob_id:
            raise CorruptCheckpointError(
                f"{entry.path!r} of {repo_id!r} has git id {found} instead of {entry.blob_id}. Delete {path.resolve()} "
                "and download again."
            )
    if verify and entry.sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:
            raise CorruptCheckpointError(
                f"{entry.path!r} of {repo_id!r} has SHA-256 {found} instead of {entry.sha256}. Delete "
                f"{path.resolve()} and download again."
            )


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


def _check_cached(facts: RepoFacts, weights: Sequence[RepoFile]) -> None:
    """Refuse when the cache lacks weight files: offline, the list of files is only what the cache holds."""
    names = {entry.path for entry in weights}
    shards = [match for name in names if (match := SHARD.fullmatch(name))]
    missing = {
        f"{m[1]}-{i:05d}-of-{m[2]}.safetensors" for m in shards for i in range(1, int(m[2]) + 1)
    } - names
    if missing or not names:
        what = f"Weight files such as {min(missing)!r}" if missing else "The weights"
        raise HubOfflineError(
            f"{what} of {facts.repo_id!r} at commit {facts.sha} are not in the cache. {CHECK_CACHE}"
        )


def _read_header(facts: RepoFacts, entry: RepoFile, hub: Hub) -> bytes:
    head = _read_range(facts, entry, 0, min(entry.size, FIRST_BYTES), hub)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or 8 + length > entry.size:
        raise CorruptCheckpointError(
            f"{entry.path!r} of {facts.repo_id!r} has {entry.size} bytes, but its header claims {length}. "
            "It is cut off or no safetensors file."
        )
    if length > MAX_HEADER_BYTES:
        raise LimitExceededError(
            f"The header of {entry.path!r} of {facts.repo_id!r} has {length} bytes; at most {MAX_HEADER_BYTES} are read."
        )
    if 8 + length > len(head):
        head += _read_range(facts, entry, len(head), 8 + length, hub)
    return head[: 8 + length]


def _read_range(
    facts: RepoFacts, entry: RepoFile, start: int, stop: int, hub: Hub, *, whole: bool = False
) -> bytes:
    """Return the bytes [start, stop) of a file, from the cache when offline; a whole one is compared with its git id."""
    subject = f"Cannot read {entry.path!r} of {facts.repo_id!r} at commit {facts.sha}"
    _check_path(facts.repo_id, entry.path)
    if hub.is_offline:
        folder = ask(hub, subject, partial(_snapshot, facts.repo_id, facts.sha, [], hub))
        with (folder / entry.path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
    wanted = entry.blob_id if whole else None
    return ask(hub, subject, partial(_fetch_range, facts, entry.path, start, stop, hub, wanted), tries=TRIES)


def _fetch_range(
    facts: RepoFacts, path: str, start: int, stop: int, hub: Hub, blob_id: str | None, api: HfApi
) -> bytes:
    url = hf_hub_url(facts.repo_id, path, revision=facts.sha, endpoint=hub.url)
    headers = build_hf_headers(token=api.token, library_name=api.library_name, library_version=__version__)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    with get_session().stream("GET", url, headers=headers) as response:
        hf_raise_for_status(response)
        # Without Range support the whole file comes: read only as far as needed.
        begin = 0 if response.status_code == 206 else start
        end = begin + stop - start
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= end:
                break
    if len(content) < end:
        raise EOFError(f"{len(content)} bytes came instead of {end}")
    found = bytes(content[begin:end])
    if blob_id is not None and git_id(found) != blob_id:
        raise EOFError(f"content with git id {git_id(found)} came instead of {blob_id}")
    return found


def git_id(content: bytes) -> str:
    """Return the id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
