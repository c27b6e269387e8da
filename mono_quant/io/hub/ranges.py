"""The first bytes of large files and all of small ones, read from the Hub into memory."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256

from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers

from mono_quant.errors import CorruptCheckpointError, HubOfflineError, LimitExceededError
from mono_quant.io.hub.client import CHECK_CACHE, HUB, TRIES, Hub, apart, ask
from mono_quant.io.hub.repo import RepoFacts, RepoFile, check_path, git_id, snapshot
from mono_quant.io.phases import phase
from mono_quant.io.tensors.headers import MAX_HEADER_BYTES
from mono_quant.version import __version__

MAX_SMALL_FILE_BYTES = 32 * 2**20
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
FIRST_BYTES = 100_000  # holds the whole header of nearly every file, so one request is enough


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


def read_small_file(
    facts: RepoFacts, path: str, *, hub: Hub = HUB, max_bytes: int = MAX_SMALL_FILE_BYTES
) -> bytes:
    """Fetch one small file, such as `config.json`, into memory.

    Raises:
        HubNotFoundError: the commit has no such file.
        LimitExceededError: it is larger than `max_bytes`.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    entry = facts.file(path)
    if entry.size > max_bytes:
        raise LimitExceededError(
            f"{path!r} of {facts.repo_id!r} has {entry.size} bytes; at most {max_bytes} are read here."
        )
    return _read_range(facts, entry, 0, entry.size, hub, whole=True) if entry.size else b""


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
    """Return the bytes [start, stop) of a file, from the cache when offline; a whole one is compared with its hash."""
    subject = f"Cannot read {entry.path!r} of {facts.repo_id!r} at commit {facts.sha}"
    check_path(facts.repo_id, entry.path)
    if hub.is_offline:
        folder = ask(hub, subject, partial(snapshot, facts.repo_id, facts.sha, [], hub))
        with (folder / entry.path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
    expected = entry if whole else None
    call = partial(_fetch_range, facts, entry.path, start, stop, hub, expected)
    return ask(hub, subject, call, tries=TRIES)


def _fetch_range(
    facts: RepoFacts, path: str, start: int, stop: int, hub: Hub, expected: RepoFile | None, api: HfApi
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
    if expected is not None and expected.blob_id not in (None, git_id(found)):
        raise EOFError(f"content with git id {git_id(found)} came instead of {expected.blob_id}")
    if expected is not None and expected.sha256 not in (None, sha256(found).hexdigest()):
        raise EOFError(f"content with SHA-256 {sha256(found).hexdigest()} came instead of {expected.sha256}")
    return found
