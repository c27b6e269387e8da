"""HubDelivery: see the room of this name."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import hub, naps, no_token_anywhere, server
from loopback_hub import LoopbackHub
from pushes import safetensors

from mono_quant.io.hub.branch import RECORDS, WorkBranch
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.target import open_target
from mono_quant.io.hub.uploads import LocalFile
from mono_quant.stream.hub_delivery import HubDelivery
from mono_quant.stream.spec import Found, Seen, ShardRecord

__all__ = ["hub", "naps", "no_token_anywhere", "server"]
pytestmark = [
    pytest.mark.usefixtures("naps", "no_token_anywhere"),
    # The client library uploads with an argument that its HTTP library deprecates.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def branch(server: LoopbackHub, hub: Hub) -> WorkBranch:
    server.add_repo("ann/out")
    return WorkBranch.open(open_target("ann/out", hub=hub), "ab" * 32)


def shard(folder: Path, name: str, rows: int) -> tuple[ShardRecord, Path]:
    data = safetensors((rows, 5))
    (folder / name).write_bytes(data)
    seen = (Seen("layer.weight", 0, signal=0.1 + 0.2, noise=1e-300), Seen("other", 1, unfinite=3))
    record = ShardRecord(name, "d" * 64, len(data), hashlib.sha256(data).hexdigest(), seen)
    return record, folder / name


def test_records_come_back_as_they_were_sent(branch: WorkBranch, tmp_path: Path) -> None:
    delivery = HubDelivery(branch)
    sent = [shard(tmp_path, name, i + 1) for i, name in enumerate(NAMES)]
    assert delivery.records() == []
    for record, path in sent:
        assert not delivery.holds(record)
        delivery.put(record, path)
        path.unlink()
        assert delivery.holds(record)
    again = HubDelivery(WorkBranch(branch.hub, branch.repo_id, branch.name))
    assert again.records() == [record for record, _ in sent]


def test_a_record_of_another_plan_or_of_other_bytes_is_not_held(branch: WorkBranch, tmp_path: Path) -> None:
    record, path = shard(tmp_path, NAMES[0], 1)
    delivery = HubDelivery(branch)
    delivery.put(record, path)
    assert not delivery.holds(replace(record, digest="e" * 64))
    assert not delivery.holds(replace(record, sha256="0" * 64))
    assert not delivery.holds(replace(record, file=NAMES[1]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: {"size": record["size"], "sha256": record["sha256"]},
        lambda record: record | {"seen": 3},
        lambda record: record | {"seen": [[1] * 99]},
        lambda record: record | {"unknown": 1},
        lambda record: record | {"found": []},
        lambda record: record | {"file": NAMES[1]},
        lambda record: record | {"found": Found(frozenset({"w"})).to_dict()},
    ],
)
def test_a_record_of_another_kind_does_not_count(
    server: LoopbackHub, branch: WorkBranch, tmp_path: Path, spoil: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    record, path = shard(tmp_path, NAMES[0], 1)
    branch.put(record.file, LocalFile(path, record.size, record.sha256), spoil(record.to_dict()))
    assert f"{RECORDS}/{NAMES[0]}.json" in server.repo("ann/out").files(branch.name)
    assert HubDelivery(branch).records() == []
    HubDelivery(branch).put(record, path)
    assert HubDelivery(branch).records() == [record]
