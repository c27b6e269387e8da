"""HubSupply: see the room of this name."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hub_fixtures import hub, naps, no_token_anywhere, server
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from pushes import TRANSIENT, failure
from safetensors.torch import save

from mono_quant import errors
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.fetching import download
from mono_quant.io.hub.repo import RepoFacts, resolve
from mono_quant.io.hub.xet import BOUNDS
from mono_quant.io.tensors.checkpoint import WeightFile
from mono_quant.sources.remote import remote_listing
from mono_quant.stream.hub_supply import HubSupply
from mono_quant.stream.spec import Job, Piece, ShardPlan
from mono_quant.stream.stages import Ahead

__all__ = ["hub", "naps", "no_token_anywhere", "server"]
pytestmark = pytest.mark.usefixtures("naps", "no_token_anywhere")

NAMES = [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
CONTENT = {name: save({f"layer.{i}": torch.full((3, 5), float(i))}) for i, name in enumerate(NAMES)}
INDEX = ('{"weight_map": {' + ", ".join(f'"layer.{i}": "{n}"' for i, n in enumerate(NAMES)) + "}}").encode()


@pytest.fixture
def facts(server: LoopbackHub, hub: Hub) -> RepoFacts:
    server.add_repo("ann/model", CONTENT | {"model.safetensors.index.json": INDEX})
    return resolve("ann/model", hub=hub)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


@pytest.fixture
def supply(facts: RepoFacts, hub: Hub, scratch: Path) -> HubSupply:
    return HubSupply(facts, remote_listing(facts, hub), scratch, hub)


def here(scratch: Path) -> set[str]:
    """Which files lie in the scratch folder, arrived or not."""
    return {path.name for path in scratch.rglob("*.safetensors")} | {
        path.name for path in scratch.rglob("*.incomplete")
    }


def fetched(server: LoopbackHub) -> list[str]:
    """Which files were downloaded, in order; headers do not count."""
    return [
        call.path.rpartition("/")[2]
        for call in server.calls("resolve")
        if call.method == "GET" and "range" not in call.headers and call.path.endswith(".safetensors")
    ]


def plan(*files: str) -> ShardPlan:
    pieces = [Piece(f"layer of {file}", file, 0, "float32", (3, 5), 60) for file in files]
    return ShardPlan(" and ".join(files), 0, b"", tuple(Job(p.name, 0, "copy", p) for p in pieces))


def test_a_file_is_here_until_it_is_released(server: LoopbackHub, supply: HubSupply, scratch: Path) -> None:
    for name in NAMES:
        found = supply.fetch(name)
        assert isinstance(found, WeightFile)
        assert found.path.read_bytes() == CONTENT[name]
        assert supply.fetch(name) == found
        assert here(scratch) == {name}
        supply.release(name)
        assert here(scratch) == set()
        assert list(scratch.iterdir()) == []
    assert fetched(server) == NAMES


@pytest.mark.parametrize("room", [1, 2, 3])
def test_the_disk_holds_no_more_than_it_may(
    server: LoopbackHub, supply: HubSupply, scratch: Path, room: int
) -> None:
    most, done = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, len(list(scratch.iterdir())))  # each file has a folder of its own

    watcher = threading.Thread(target=look)
    watcher.start()
    server.watch = lambda number: time.sleep(0.002)
    plans = [plan(name) for name in NAMES]
    ahead = Ahead(supply, room)
    ahead.begin(plans[0], ())
    for now, following in zip(plans, [*plans[1:], None], strict=True):
        ahead.wait(now)
        if following is not None:
            ahead.begin(following, ())
        time.sleep(0.01)
        assert supply.fetch(now.files[0]).path.read_bytes() == CONTENT[now.files[0]]
        ahead.done(following.files if following else ())
    done.set()
    watcher.join()
    assert most == min(room, 2)
    assert list(scratch.iterdir()) == []
    assert fetched(server) == NAMES


def test_a_download_that_nobody_waits_for_any_more_leaves_nothing(
    server: LoopbackHub, supply: HubSupply, scratch: Path
) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        begun.set()
        go.wait(20)

    server.watch = hold
    thread = threading.Thread(target=supply.fetch, args=(NAMES[0],))
    thread.start()
    begun.wait(20)
    supply.release(NAMES[0])
    server.watch = lambda number: None
    go.set()
    thread.join()
    assert list(scratch.iterdir()) == []


def test_several_threads_share_a_file(server: LoopbackHub, supply: HubSupply, scratch: Path) -> None:
    found: list[WeightFile] = []
    threads = [threading.Thread(target=lambda: found.append(supply.fetch(NAMES[0]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert here(scratch) == {NAMES[0]}
    supply.release(NAMES[0])
    supply.release(NAMES[0])
    assert here(scratch) == set()
    assert fetched(server) == NAMES[:1]


def test_what_the_cache_holds_is_used_where_it_is(
    server: LoopbackHub, supply: HubSupply, facts: RepoFacts, hub: Hub, scratch: Path
) -> None:
    folder = download(facts, wanted=lambda path: path == NAMES[1], hub=hub)
    asked = len(fetched(server))
    for name in NAMES[:3]:
        found = supply.fetch(name)
        assert (found.path == folder / name) == (name == NAMES[1])
        supply.release(name)
    assert (folder / NAMES[1]).read_bytes() == CONTENT[NAMES[1]]
    assert fetched(server)[asked:] == [NAMES[0], NAMES[2]]


def test_a_spoiled_cache_is_not_used(facts: RepoFacts, supply: HubSupply, hub: Hub) -> None:
    folder = download(facts, wanted=lambda path: path == NAMES[1], hub=hub)
    blob = (folder / NAMES[1]).resolve()
    blob.write_bytes(CONTENT[NAMES[0]])
    failure(errors.CorruptCheckpointError, "Delete .*blobs", lambda: supply.fetch(NAMES[1]))


def test_offline_there_is_the_cache_or_an_error(
    server: LoopbackHub, facts: RepoFacts, hub: Hub, scratch: Path
) -> None:
    listing = remote_listing(facts, hub)
    folder = download(facts, wanted=lambda path: path == NAMES[1], hub=hub)
    asked = len(server.requests)
    off = Hub(endpoint=hub.endpoint, cache_dir=hub.cache_dir, offline=True)
    supply = HubSupply(facts, listing, scratch, off)
    assert supply.fetch(NAMES[1]).path == folder / NAMES[1]
    failure(errors.HubOfflineError, "not in the cache", lambda: supply.fetch(NAMES[0]))
    assert len(server.requests) == asked
    assert here(scratch) == set()


@pytest.mark.parametrize("fault", ["corrupt", "404", "403"])
def test_what_arrives_wrong_is_an_error_and_is_asked_for_anew(
    server: LoopbackHub, supply: HubSupply, scratch: Path, fault: str
) -> None:
    kinds = {"404": errors.HubNotFoundError, "403": errors.HubAuthError}
    kind = kinds.get(fault, errors.CorruptCheckpointError)
    # the HEAD request comes first, and has no body to spoil
    number = len(server.requests) + (fault == "corrupt")
    server.fault_at = {number: fault}
    failure(kind, NAMES[0], lambda: supply.fetch(NAMES[0]))
    assert here(scratch) == set()
    assert supply.fetch(NAMES[0]).path.read_bytes() == CONTENT[NAMES[0]]


def test_a_header_that_is_not_the_one_of_the_plan_is_refused(
    facts: RepoFacts, supply: HubSupply, hub: Hub, scratch: Path
) -> None:
    listing = remote_listing(facts, hub)
    name, tensor = next(iter(listing.tensors.items()))
    lied = {**listing.tensors, name: tensor._replace(start=tensor.start + 4, nbytes=tensor.nbytes - 4)}
    other = HubSupply(facts, type(listing)(lied, listing.files), scratch, hub)
    failure(errors.CorruptCheckpointError, "another header", lambda: other.fetch(NAMES[0]))
    assert other.fetch(NAMES[1]).path.read_bytes() == CONTENT[NAMES[1]]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_reading_survives_a_failure_at_every_request(
    server: LoopbackHub, facts: RepoFacts, hub: Hub, tmp_path: Path, fault: str
) -> None:
    listing, before = remote_listing(facts, hub), len(server.requests)

    def run(number: int) -> None:
        supply = HubSupply(facts, listing, tmp_path / f"{number}", hub)
        for name in NAMES[:2]:
            assert supply.fetch(name).path.read_bytes() == CONTENT[name]
            supply.release(name)

    run(0)
    clean = len(server.requests) - before
    assert clean == 4
    for number in range(clean):
        server.fault_at = {len(server.requests) + number: fault}
        run(number + 1)
        assert server.fault_at == {}


def test_an_answer_that_breaks_off_is_taken_up_where_it_broke(
    server: LoopbackHub, supply: HubSupply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 11)
    server.fault_at = {len(server.requests) + 1: "truncate"}
    supply.fetch(NAMES[0])
    ranges = [call.headers.get("range") for call in server.calls("resolve")[-2:]]
    assert ranges == [None, f"bytes={len(CONTENT[NAMES[0]]) // 2}-"]


PROBE = """
import hf_xet
from mono_quant.io.hub.xet import bound_buffers
bound_buffers()
config = hf_xet.XetConfig()
for name in ("reconstruction.download_buffer_size", "reconstruction.download_buffer_perfile_size",
             "reconstruction.download_buffer_limit", "reconstruction.min_prefetch_buffer",
             "data.max_concurrent_file_ingestion", "client.ac_max_upload_concurrency"):
    print(config.get(name))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [64_000_000] * 4 + [1, 2]),
        (
            {"HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "1gb"},
            [64_000_000] * 2 + [10**9, 64_000_000, 1, 2],
        ),
    ],
)
def test_hf_xet_takes_the_bounds_and_the_user_wins(given: dict[str, str], expected: list[int]) -> None:
    pytest.importorskip("hf_xet")
    clean = {name: value for name, value in os.environ.items() if name not in BOUNDS}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=clean | given, capture_output=True, text=True, check=True
    )
    assert [int(line) for line in done.stdout.split()] == expected
