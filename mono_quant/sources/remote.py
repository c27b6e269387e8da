"""A repository on the Hub becomes a source: pinned to a commit, with only the files that are needed."""

from dataclasses import replace

import torch

from mono_quant.errors import HubOfflineError, MissingFileError, UnsupportedModelError
from mono_quant.hf.encoders import is_encoder_file
from mono_quant.io.disk.allowed import BUFFERS, is_allowed
from mono_quant.io.disk.json_text import parse_json
from mono_quant.io.hub.client import CHECK_CACHE, Hub
from mono_quant.io.hub.fetching import download
from mono_quant.io.hub.ranges import read_headers, read_small_file
from mono_quant.io.hub.repo import RepoFacts, resolve
from mono_quant.io.memory import uncollected
from mono_quant.io.phases import phase
from mono_quant.io.tensors.headers import Span, parse_header_bytes
from mono_quant.io.tensors.listing import (
    MAX_INDEX_BYTES,
    STEMS,
    FileHeader,
    Listing,
    check_headers,
    find_stem,
    read_weight_map,
    weight_files,
)
from mono_quant.io.tensors.pickles import PICKLES
from mono_quant.io.tensors.shards import index_name
from mono_quant.io.text import listed
from mono_quant.sources.folder import from_folder, from_headers, is_side_file, savable_folder
from mono_quant.sources.guards import PIPELINE, Shapes, pipeline_text, refuse_pickles
from mono_quant.sources.origin import Origin
from mono_quant.sources.source import Access, Preview, Source


def from_hub(repo_id: str, access: Access, weights: bool) -> Source:
    facts = resolve(repo_id, revision=access.revision, hub=access.client)
    names = _refuse_pipeline(facts)
    safe = any(n.endswith(".safetensors") for n in names)
    if access.client.is_offline and not safe and not any(PICKLES.fullmatch(n) for n in names):
        raise HubOfflineError(
            f"the weights of {repo_id!r} at {facts.sha[:12]} are not in the cache and the network is off; unset "
            f"HF_HUB_OFFLINE, or fetch the model once while online"
        )
    if not safe and not access.allow_pickle:
        refuse_pickles(sorted(names), f"{repo_id} at {facts.sha[:12]}")

    def wanted(name: str) -> bool:
        if name.endswith((".safetensors", ".safetensors.index.json")):
            return weights and is_allowed(name)
        if not safe and access.allow_pickle and PICKLES.fullmatch(name):
            return weights
        if not weights and name != "config.json" and not is_encoder_file(name):
            return access.trust_remote_code and name.endswith(".py")
        return is_allowed(name) or (access.trust_remote_code and name.endswith(".py"))

    folder = download(facts, wanted=wanted, hub=access.client)
    if weights or not safe:
        with phase("Reading the model"):
            opened = from_folder(folder, access, weights, is_cache=True)
    else:
        shapes = remote_headers(facts, access.client)[0]
        opened = from_headers(folder, access, shapes, _headers_below(facts, access.client))
    return _of_repository(opened, facts)


def savable_repository(facts: RepoFacts, access: Access, listing: Listing) -> Source:
    """Make a source with a skeleton in it that has everything but weights; see `savable_folder`.

    Args:
        facts: of the repository, pinned to a commit.
        access: how to read it.
        listing: what its weight files say of themselves.

    Raises:
        MonoQuantError: as `from_hub`.
    """
    _refuse_pipeline(facts)
    own = listing.files.keys() | {index_name(stem) for stem in STEMS}

    def wanted(name: str) -> bool:
        if name.endswith(".py"):
            return access.trust_remote_code
        return is_allowed(name) and name not in own

    folder = download(facts, wanted=wanted, hub=access.client)
    with phase("Reading the headers"):
        return _of_repository(savable_folder(folder, access, listing), facts)


def _refuse_pipeline(facts: RepoFacts) -> set[str]:
    """Return the names of all files of a repository that is no pipeline."""
    names = {f.path for f in facts.files}
    if PIPELINE in names:
        parts = sorted(
            n.removesuffix("/config.json") for n in names if n.count("/") == 1 and n.endswith("/config.json")
        )
        raise UnsupportedModelError(pipeline_text(f"{facts.repo_id} at {facts.sha[:12]}", parts))
    return names


def _of_repository(opened: Source, facts: RepoFacts) -> Source:
    """Say of a source that was read from files of a repository where it comes from."""
    found = opened.subject.origin
    opened.subject.origin = replace(_origin(facts, found.name), access=found.access, stored=found.stored)
    if facts.gated:
        opened.notes.append("the source repository is gated; its terms apply to the result")
    return opened


def preview_hub(repo_id: str, access: Access) -> Preview:
    """Say what is known of a repository before anything of it is fetched."""
    facts = resolve(repo_id, revision=access.revision, hub=access.client)
    side_files = {file.path: file for file in facts.files if is_side_file(file.path)}
    rewritten = tuple(file.path for file in facts.files if file.path == "config.json")
    return Preview(_origin(facts), side_files, rewritten)


def _origin(facts: RepoFacts, name: str = "model") -> Origin:
    return Origin(name, facts.repo_id, facts.sha, facts.private, facts.gated, facts.card)


def remote_headers(facts: RepoFacts, client: Hub) -> tuple[Shapes, int]:
    """Fetch dtype and shape of every tensor of a repository, and the size of its weights in bytes."""

    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    size = 0
    for spans in _spans(facts, client, below=False).values():
        shapes.update({key: (span.dtype, span.shape) for key, span in spans.items()})
        size += sum(span.end - span.start for span in spans.values())
    return shapes, size


def remote_listing(facts: RepoFacts, client: Hub) -> Listing:
    """Say where every tensor of a repository lies, from its index and its headers; no weight is fetched.

    Raises:
        MissingFileError: no weights, or the index names files that are not there.
        PickleOnlyError: there are only pickle files.
        UnsafeInputError: the index names what is no plain file.
        CorruptCheckpointError: index, headers and files contradict each other.
        LimitExceededError: unreasonable sizes.
        UnsupportedModelError: a dtype that torch cannot hold.
        HubOfflineError: the network is off, and not all weights are in the cache.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    where = f"{facts.repo_id!r} at {facts.sha[:12]}"
    names = {file.path for file in facts.files}
    stem = find_stem(names.__contains__, where)
    if stem is None:
        refuse_pickles(sorted(names), where)
        raise MissingFileError(f"{where} holds no weights in safetensors files")
    weight_map: dict[str, str] = {}
    if index_name(stem) in names:
        raw = read_small_file(facts, index_name(stem), hub=client, max_bytes=MAX_INDEX_BYTES)
        index = parse_json(raw, index_name(stem))
        weight_map = read_weight_map(index, stem, f"{stem}.safetensors" in names, where)
    files = weight_files(stem, weight_map)
    missing = [name for name in files if name not in names]
    if missing and client.is_offline:
        raise HubOfflineError(f"{listed(missing)} of {where} are not in the cache. {CHECK_CACHE}")
    if missing:
        raise MissingFileError(f"{where} lacks {listed(missing)}, which its index names")
    heads = read_headers(facts, wanted=set(files).__contains__, hub=client)
    headers = []
    for name, head in sorted(heads.items()):
        size = facts.file(name).size
        headers.append(FileHeader(name, size, *parse_header_bytes(head, size, f"{facts.repo_id}/{name}")))
    check_headers(headers, weight_map)
    return Listing.of(headers)


def _headers_below(facts: RepoFacts, client: Hub) -> dict[str, Shapes]:
    """Fetch the same of the weights in folders: those of the modules around a transformer."""
    return {
        name.rpartition("/")[0]: {key: (span.dtype, span.shape) for key, span in spans.items()}
        for name, spans in _spans(facts, client, below=True).items()
    }


@uncollected()
def _spans(facts: RepoFacts, client: Hub, *, below: bool) -> dict[str, dict[str, Span]]:
    def is_weight(name: str) -> bool:
        return ("/" in name) == below and is_allowed(name) and not name.startswith(f"{BUFFERS}/")

    heads = read_headers(facts, wanted=is_weight, hub=client)
    return {
        name: parse_header_bytes(head, facts.file(name).size, f"{facts.repo_id}/{name}")[0]
        for name, head in heads.items()
    }
