"""Target: see the room of this name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub
from pushes import (
    ANN,
    BOB,
    EARLIER,
    READER,
    SOURCE,
    check_no_secret,
    failure,
    holds_finished,
    pushed,
    safetensors,
)

from mono_quant import errors
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.repo import RepoFacts, resolve
from mono_quant.io.hub.target import PushOptions, Target, check_push, open_target

# The client library uploads with an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_foreign_weights_beside_ours_are_refused(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.add_repo("ann/model", EARLIER | {"pytorch_model.bin": b"somebody's"})
    failure(errors.HubConflictError, "pytorch_model.bin", lambda: pushed(folder, "ann/model", hub))
    server.commit(
        "ann/model", {"model-00002-of-00002.safetensors": safetensors((6,), fill=b"!")}, ["pytorch_model.bin"]
    )
    failure(errors.HubConflictError, "model-00002", lambda: pushed(folder, "ann/model", hub))


@pytest.mark.parametrize("manifest", [None, b"{", b"[]", b'{"format": "other"}', b"[" * 100_000])
def test_foreign_weights_are_refused(
    server: LoopbackHub, hub: Hub, folder: Path, manifest: bytes | None
) -> None:
    repo = server.add_repo("ann/out", SOURCE | ({"mono_quant.json": manifest} if manifest else {}))
    head = repo.head
    failure(errors.HubConflictError, "did not push.*overwrite=True", lambda: pushed(folder, "ann/out", hub))
    assert repo.head == head
    assert server.calls("preupload", "lfs_put", "commit") == []


def test_overwrite_replaces_foreign_weights_in_one_commit(
    server: LoopbackHub, hub: Hub, folder: Path
) -> None:
    repo = server.add_repo("ann/out", SOURCE | {"training_args.bin": b"kept", "onnx/model.onnx": b"kept"})
    pushed(folder, "ann/out", hub, overwrite=True)
    assert {"training_args.bin", "onnx/model.onnx"} < set(repo.files())
    assert "pytorch_model.bin" not in repo.files()
    assert len(repo.commits()) == 3


def test_the_quantized_model_itself_is_not_replaced(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    repo = server.add_repo("ann/model", SOURCE)
    source = resolve("ann/model", hub=hub)
    head = repo.head
    call: Callable[[], object] = lambda: pushed(folder, "Ann/Model", hub, source=source, overwrite=True)
    failure(errors.HubConflictError, "is the model that was quantized", call)
    assert repo.head == head


def restriction(private: bool, gated: str | bool) -> int:
    return 2 if private else 1 if gated else 0


@pytest.mark.parametrize("private", [None, True, False])
@pytest.mark.parametrize("target", ["missing", (False, False), (False, "auto"), (True, False)])
@pytest.mark.parametrize("source", [(False, False), (False, "manual"), (True, False), (True, "auto")])
def test_nothing_gets_more_public_than_its_source(
    server: LoopbackHub,
    hub: Hub,
    folder: Path,
    source: tuple[bool, str | bool],
    target: Any,
    private: bool | None,
) -> None:
    server.add_repo("ann/model", SOURCE, private=source[0], gated=source[1])
    facts = resolve("ann/model", hub=hub)
    if target != "missing":
        server.add_repo("ann/out", private=target[0], gated=target[1])
    try:
        pushed(folder, "ann/out", hub, source=facts, private=private)
    except errors.HubConflictError as error:
        check_no_secret(error)
        repo = server.repo("ann/out")
        assert len(repo.commits()) == 1
        assert server.calls("preupload", "lfs_put", "commit") == []
        assert target != "missing"
        is_ignored = private is not None and private is not target[0]
        assert is_ignored or restriction(*target) < restriction(*source)
        return
    repo = server.repo("ann/out")
    assert holds_finished(repo)
    assert private is False or restriction(repo.private, repo.gated) >= restriction(*source)
    assert not private or repo.private
    if target != "missing":
        assert (repo.private, repo.gated) == target


def test_a_private_target_is_not_silently_left_private(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.add_repo("ann/out", private=True)
    call: Callable[[], object] = lambda: pushed(folder, "ann/out", hub, private=False)
    failure(errors.HubConflictError, "exists and is private.*leave out private=False", call)
    assert len(server.repo("ann/out").commits()) == 1


def test_what_a_push_would_refuse_is_refused_before_the_work(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE, private=True)
    server.add_repo("ann/open")
    server.add_repo("ann/used", SOURCE, private=True)
    server.add_repo("ann/ours", EARLIER, private=True)
    source = resolve("ann/model", hub=hub)
    for target, says in {
        "Ann/Model": "is the model that was quantized",
        "ann/open": "is public, but its source 'ann/model' is private",
        "ann/used": "holds weights that mono_quant did not push",
    }.items():
        call: Callable[[], object] = lambda target=target: check_push(target, hub=hub, source=source)  # type: ignore[misc]
        failure(errors.HubConflictError, says, call)
    look: Callable[..., Target | None] = lambda name, **options: check_push(
        name, PushOptions(**options), source=source, hub=hub
    )
    assert look("ann/open", private=False)
    assert look("ann/used", overwrite=True)
    assert look("ann/used", create_pr=True)
    assert look("ann/ours")
    assert look("ann/new") is None
    assert "ann/new" not in server.repos


def test_an_offline_source_counts_as_private(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    unknown = RepoFacts("ann/model", None, "0" * 40, None, None)
    pushed(folder, "ann/out", hub, source=unknown)
    assert server.repo("ann/out").private


def test_a_repository_that_was_not_made_private_gets_nothing(
    server: LoopbackHub, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = server.add_repo
    monkeypatch.setattr(server, "add_repo", lambda repo_id, **_: add(repo_id))
    call: Callable[[], object] = lambda: pushed(folder, "ann/out", hub, private=True)
    failure(errors.HubConflictError, "should be private but is public", call)
    assert server.calls("preupload", "lfs_put", "commit") == []


@pytest.mark.parametrize(
    ("repo_id", "token"), [("bob/out", ANN), ("eve/out", READER), ("team/out", BOB)], ids=range(3)
)
@pytest.mark.parametrize("exists", [True, False])
def test_missing_rights_show_before_anything_is_uploaded(
    server: LoopbackHub, folder: Path, repo_id: str, token: str, exists: bool
) -> None:
    if exists:
        server.add_repo(repo_id)
    hub = Hub(token=token, endpoint=server.endpoint)
    failure(errors.HubAuthError, "rights", lambda: pushed(folder, repo_id, hub))
    anonymous = Hub(token=False, endpoint=server.endpoint)
    failure(errors.HubAuthError, "hf auth login", lambda: pushed(folder, repo_id, anonymous))
    assert server.calls("preupload", "lfs_batch", "lfs_put", "commit") == []
    assert pushed(folder, "team/other", Hub(token=ANN, endpoint=server.endpoint)).created


def test_a_file_is_ours_as_long_as_nobody_changed_it(server: LoopbackHub, hub: Hub) -> None:
    ours = {name for name in EARLIER if name != "notes.txt"}
    server.add_repo("ann/model", EARLIER)
    target = open_target("ann/model", hub=hub)
    assert {path for path in target.files if target.is_ours(path)} == ours
    assert target.foreign([*EARLIER, "missing"]) == ["notes.txt"]
    # as long as before, and of another kind
    changed = {"config.json": b"[]", "tokenizer.json": b"OF the earlier model"}
    server.commit("ann/model", changed | {"model-00001-of-00002.safetensors": safetensors((5,), fill=b"?")})
    target = open_target("ann/model", PushOptions(overwrite=True), hub=hub)
    left = {
        "README.md",
        "mono_quant.json",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert {path for path in target.files if target.is_ours(path)} == left


@pytest.mark.parametrize(
    "files",
    [
        '{"config.json": 3}',
        '{"config.json": {"size": 2}}',
        '{"config.json": {"sha256": "x"}}',
        "[]",
        '"x"',
        "null",
    ],
)
def test_a_manifest_of_another_form_makes_nothing_ours(server: LoopbackHub, hub: Hub, files: str) -> None:
    manifest = f'{{"format": "mono_quant", "files": {files}}}'.encode()
    server.add_repo("ann/model", {"config.json": b"{}", "mono_quant.json": manifest})
    assert not open_target("ann/model", hub=hub).is_ours("config.json")


def test_files_that_are_not_ours_are_not_replaced(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    repo = server.add_repo(
        "ann/model", {"config.json": b"theirs", "mono_quant.json": b"{}", "README.md": b"words"}
    )
    head = repo.head
    says = r"did not push, or that were changed since: 'README.md', 'config.json', 'mono_quant.json'"
    failure(errors.HubConflictError, says, lambda: pushed(folder, "ann/model", hub))
    assert repo.head == head
    assert pushed(folder, "ann/model", hub, create_pr=True).pr_url
    pushed(folder, "ann/model", hub, overwrite=True)
    assert holds_finished(repo)


def test_a_deleted_file_of_ours_comes_back_and_an_edited_one_that_is_not_needed_stays(
    server: LoopbackHub, hub: Hub, folder: Path
) -> None:
    repo = server.add_repo("ann/model", EARLIER)
    server.commit("ann/model", {"tokenizer.json": b"theirs now"}, ["config.json"])
    pushed(folder, "ann/model", hub)
    assert repo.files()["tokenizer.json"] == b"theirs now"
    assert holds_finished(repo)
