"""Who may make a repository, what is ours in one, and how that is said."""

import hashlib
import json

import pytest
from loopback_hub import LoopbackHub
from pushes import ANN, READER

from mono_quant import errors
from mono_quant.io.disk.manifest import FORMAT, MANIFEST
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.repo import resolve
from mono_quant.io.hub.target import check_push, open_target


@pytest.mark.parametrize(
    ("repo_id", "token", "why"),
    [
        ("eve/new", READER, r"it does not exist, and the token may only read\. "),
        ("bob/new", ANN, r"it does not exist, and the token belongs to ann, who cannot create it there\. "),
    ],
)
def test_a_repository_that_cannot_be_made_is_refused_with_the_reason(
    server: LoopbackHub, repo_id: str, token: str, why: str
) -> None:
    hub = Hub(token=token, endpoint=server.endpoint)
    with pytest.raises(errors.HubAuthError, match=rf"^Cannot push to '{repo_id}' on the Hub: {why}"):
        check_push(repo_id, hub=hub)


@pytest.mark.parametrize("repo_id", ["ann/new", "ANN/new", "team/new"])
def test_a_repository_of_ones_own_or_of_an_organization_can_be_made(
    server: LoopbackHub, hub: Hub, repo_id: str
) -> None:
    assert check_push(repo_id, hub=hub) is None


@pytest.mark.parametrize("content", [b"", b"words"])
def test_a_file_is_ours_by_size_and_hash_an_empty_one_too(
    server: LoopbackHub, hub: Hub, content: bytes
) -> None:
    listing = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": FORMAT, "files": {"NOTICE": listing, "LICENSE": listing | {"size": 1}}}
    files = {"NOTICE": content, "LICENSE": content, MANIFEST: json.dumps(manifest).encode()}
    server.add_repo("ann/model", files)
    target = open_target("ann/model", hub=hub)
    assert target.is_ours("NOTICE") and target.is_ours(MANIFEST) and not target.is_ours("LICENSE")
    assert target.foreign(["NOTICE", "LICENSE", "absent"]) == ["LICENSE"]


@pytest.mark.parametrize(
    ("there", "source", "words"),
    [
        ({}, {"gated": "auto"}, "public, but its source 'ann/source' is gated"),
        ({}, {"private": True}, "public, but its source 'ann/source' is private"),
        ({"gated": "auto"}, {"private": True}, "gated, but its source 'ann/source' is private"),
    ],
)
def test_a_target_that_more_people_see_than_its_source_is_named_with_both(
    server: LoopbackHub, hub: Hub, there: dict[str, object], source: dict[str, object], words: str
) -> None:
    server.add_repo("ann/out", {}, **there)
    server.add_repo("ann/source", {}, **source)
    with pytest.raises(errors.HubConflictError, match=rf"^'ann/out' is {words}\. Choose a private target"):
        check_push("ann/out", hub=hub, source=resolve("ann/source", hub=hub))
