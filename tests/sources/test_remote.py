"""Remote: see the room of this name. What a folder says of its weights, and what a repository says, is one thing."""

import json
import shutil

import pytest
from checkpoints import FIRST, INDEX, SECOND, SINGLE, raw, sharded, tensor, write_json
from hub_fixtures import hub, naps, server

from mono_quant import errors
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.fetching import download
from mono_quant.io.hub.repo import resolve
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.sources.remote import remote_listing

__all__ = ["hub", "naps", "server"]


def published(server, folder):
    return server.add_repo("ann/model", {path.name: path.read_bytes() for path in folder.iterdir()})


def listed(hub):
    return remote_listing(resolve("ann/model", hub=hub), hub)


def test_a_repository_lists_what_its_folder_lists(server, hub, tmp_path):
    folder = sharded(tmp_path / "in")
    published(server, folder)
    with open_checkpoint(folder) as checkpoint:
        assert listed(hub) == checkpoint.listing
    fetched = [call.headers.get("range") for call in server.calls("resolve")]
    assert len(fetched) == 3 and all(range.startswith("bytes=0-") for range in fetched)


def test_a_single_file_needs_no_index(server, hub, tmp_path):
    raw(tmp_path / SINGLE, {"w": tensor()}, b"\0" * 4)
    published(server, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert listed(hub) == checkpoint.listing


def test_files_that_the_index_does_not_name_do_not_count(server, hub, tmp_path):
    folder = sharded(tmp_path / "in")
    shutil.copy(folder / FIRST, folder / "consolidated.safetensors")
    published(server, folder)
    with open_checkpoint(folder) as checkpoint:
        assert listed(hub) == checkpoint.listing


def index(folder, **changes):
    value = json.loads((folder / INDEX).read_text())
    write_json(folder / INDEX, value | changes)


SPOILED = {
    "missing shard": lambda folder: (folder / SECOND).unlink(),
    "extra tensor": lambda folder: index(folder, weight_map={"a.weight": FIRST, "b.weight": SECOND}),
    "missing tensor": lambda folder: index(
        folder, weight_map={"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND, "d.weight": SECOND}
    ),
    "other file": lambda folder: index(
        folder, weight_map={"a.weight": SECOND, "b.weight": SECOND, "c.weight": SECOND}
    ),
    "tensor twice": lambda folder: shutil.copy(folder / SECOND, folder / FIRST),
    "above": lambda folder: index(folder, weight_map={"a.weight": "../secret.safetensors"}),
    "absolute": lambda folder: index(folder, weight_map={"a.weight": "/etc/secret.safetensors"}),
    "no map": lambda folder: index(folder, weight_map=[]),
    "empty map": lambda folder: index(folder, weight_map={}),
    "no object": lambda folder: (folder / INDEX).write_text("[]"),
    "two keys": lambda folder: (folder / INDEX).write_text('{"weight_map": {}, "weight_map": {}}'),
    "single file too": lambda folder: shutil.copy(folder / FIRST, folder / SINGLE),
    "two models": lambda folder: shutil.copy(folder / FIRST, folder / "diffusion_pytorch_model.safetensors"),
    "no header": lambda folder: (folder / FIRST).write_bytes(b"\xff" * 40),
    "overlap": lambda folder: raw(
        folder / FIRST, {"a.weight": tensor(), "x": tensor(offsets=(2, 6))}, b"\0" * 6
    ),
    "names alike": lambda folder: (
        raw(folder / FIRST, {"a.weight": tensor(), "A.weight": tensor(offsets=(4, 8))}, b"\0" * 8),
        index(
            folder,
            weight_map={"a.weight": FIRST, "A.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND},
        ),
    ),
    "pickles alone": lambda folder: (
        [(folder / name).unlink() for name in (FIRST, SECOND, INDEX)]
        and (folder / "pytorch_model.bin").write_bytes(b"x")
    ),
    "nothing": lambda folder: [(folder / name).unlink() for name in (FIRST, SECOND, INDEX)],
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_what_a_folder_is_refused_for_a_repository_is_refused_for(server, hub, tmp_path, spoil):
    folder = sharded(tmp_path / "in")
    spoil(folder)
    published(server, folder)
    with pytest.raises(errors.MonoQuantError) as local:
        open_checkpoint(folder)
    with pytest.raises(errors.MonoQuantError) as remote:
        listed(hub)
    assert type(remote.value) is type(local.value)
    assert {call.method for call in server.requests} == {"GET"}
    assert not (tmp_path / "cache").exists()


def test_an_index_that_arrives_changed_is_asked_for_again(server, hub, naps, tmp_path):
    folder = sharded(tmp_path / "in")
    published(server, folder)
    facts = resolve("ann/model", hub=hub)
    server.inject("resolve", "corrupt")
    with open_checkpoint(folder) as checkpoint:
        assert remote_listing(facts, hub) == checkpoint.listing
    assert len(naps) == 1


def test_offline_the_cache_is_read(server, hub, tmp_path):
    folder = sharded(tmp_path / "in")
    published(server, folder)
    facts = resolve("ann/model", hub=hub)
    offline = Hub(cache_dir=hub.cache_dir, endpoint=hub.endpoint, offline=True)
    download(facts, wanted=lambda path: path in (INDEX, FIRST), hub=hub)
    with pytest.raises(errors.HubOfflineError, match=f"{SECOND}.*not in the cache"):
        remote_listing(resolve("ann/model", revision=facts.sha, hub=offline), offline)
    download(facts, wanted=lambda path: True, hub=hub)
    asked = len(server.requests)
    with open_checkpoint(folder) as checkpoint:
        assert (
            remote_listing(resolve("ann/model", revision=facts.sha, hub=offline), offline)
            == checkpoint.listing
        )
    assert len(server.requests) == asked
