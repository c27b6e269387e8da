"""Branch: see the room of this name."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from branches import BRANCH, COMPLETE, IDENTITY, SHARDS, SMALL, gather_on, record_of, run, run_apart, write
from loopback_hub import LoopbackHub, Repo
from pushes import ANN, EARLIER, SOURCE, TRANSIENT, failure, safetensors

from mono_quant import errors
from mono_quant.io.hub.branch import RECORDS, WorkBranch
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.repo import resolve
from mono_quant.io.hub.target import open_target

# The client library uploads with an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FIRST = next(iter(SHARDS))


def holds_all(repo: Repo, revision: str = "main") -> bool:
    """Whether a revision has all of the model, and no weights or records beside it."""
    files = repo.files(revision)
    weights = {name for name in files if name.endswith((".safetensors", ".bin", ".index.json"))}
    return files | COMPLETE == files and weights <= COMPLETE.keys() and not records_in(files)


def records_in(files: dict[str, bytes]) -> list[str]:
    return [path for path in files if path.startswith(RECORDS)]


def opened(hub: Hub, identity: str = IDENTITY, repo_id: str = "ann/out") -> WorkBranch:
    return WorkBranch.open(open_target(repo_id, hub=hub), identity)


def sent(server: LoopbackHub) -> list[str]:
    """The large files that went up, by hash."""
    return [call.path.rpartition("/")[2] for call in server.calls("lfs_put")]


def test_a_model_is_published_in_one_commit_from_the_branch(
    server: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    result = run(hub, tmp_path / "work")
    repo = server.repo("ann/out")
    assert result == PushResult("ann/out", repo.head, f"{server.endpoint}/ann/out")
    assert holds_all(repo)
    assert len(repo.commits()) == 2
    assert repo.history[repo.head].title == "Push the streamed model"
    assert repo.branches.keys() == {"main"}
    assert sent(server) == [record_of(name, data)["sha256"] for name, data in SHARDS.items()]


def test_stale_weights_go_and_what_others_wrote_stays(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    run(hub, tmp_path / "work")
    assert holds_all(repo)
    assert repo.files().keys() == {*COMPLETE, "notes.txt", ".gitattributes"}


def test_running_it_again_changes_nothing(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    first = run(hub, tmp_path / "work")
    again = run(hub, tmp_path / "other")
    assert (again.commit_sha, again.already_there) == (first.commit_sha, True)
    assert len(server.repo("ann/out").commits()) == 2
    assert len(sent(server)) == len(SHARDS)
    assert server.repo("ann/out").branches.keys() == {"main"}


def test_another_machine_goes_on_from_the_branch(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.add_repo("ann/out")
    branch = opened(hub)
    name, data = next(iter(SHARDS.items()))
    branch.put(name, write(tmp_path / "one", {name: data})[name], record_of(name, data))
    other = opened(Hub(token=ANN, endpoint=server.endpoint, cache_dir=tmp_path / "elsewhere"))
    held = other.held()
    assert held.keys() == {name}
    assert held[name].record == record_of(name, data)
    assert gather_on(other, tmp_path / "two") == list(SHARDS)[1:]
    assert len(sent(server)) == len(SHARDS)
    assert len(server.repo("ann/out").commits()) == 1


def test_a_file_that_is_there_is_not_sent_again(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.add_repo("ann/out")
    branch, seen = opened(hub), 0
    for _ in range(2):
        branch.put(FIRST, write(tmp_path, {FIRST: SHARDS[FIRST]})[FIRST], record_of(FIRST, SHARDS[FIRST]))
        seen = seen or len(server.calls("commit", "lfs_put", "lfs_batch"))
    assert len(server.calls("commit", "lfs_put", "lfs_batch")) == seen == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda files: files | {FIRST: files[FIRST][:-1] + b"!"},
        lambda files: files | {FIRST: files[FIRST] + b"!"},
        lambda files: {path: data for path, data in files.items() if path != FIRST},
        lambda files: files | {f"{RECORDS}/{FIRST}.json": b"{"},
        lambda files: files | {f"{RECORDS}/{FIRST}.json": b"[]"},
        lambda files: files | {f"{RECORDS}/{FIRST}.json": b"{}"},
    ],
)
def test_what_does_not_fit_its_record_does_not_count(
    server: LoopbackHub, hub: Hub, tmp_path: Path, spoil: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    repo = server.add_repo("ann/out")
    branch = opened(hub)
    gather_on(branch, tmp_path)
    spoiled = spoil(repo.files(BRANCH))
    server.commit("ann/out", spoiled, delete=repo.files(BRANCH), branch=BRANCH)
    assert branch.held().keys() == SHARDS.keys() - {FIRST}
    assert gather_on(branch, tmp_path) == [FIRST]
    assert branch.held().keys() == SHARDS.keys()


def test_a_shard_that_git_holds_whole_counts_too(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopback_hub.is_lfs", lambda path, size: False)
    run(hub, tmp_path / "work")
    assert holds_all(server.repo("ann/out"))
    assert len(server.calls("commit")) == len(SHARDS) + 1


def test_more_shards_than_the_hub_advises_for_a_commit_are_one_commit_too(
    server: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    shards = {f"model-{i:05d}-of-00120.safetensors": safetensors((i,)) for i in range(1, 121)}
    branch = opened(hub)
    records = {f"{RECORDS}/{n}.json": json.dumps(record_of(n, d)).encode() for n, d in shards.items()}
    server.commit("ann/out", shards | records, branch=BRANCH)
    small = write(tmp_path, SMALL)
    branch.publish(open_target("ann/out", hub=hub), small, shards, message="Many", merged=["README.md"])
    assert repo.files() == shards | SMALL | {p: repo.files()[p] for p in (".gitattributes", "notes.txt")}
    assert len(repo.commits()) == 3


def test_what_the_branch_lacks_is_named_and_nothing_is_published(
    server: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    branch = opened(hub)
    gather_on(branch, tmp_path, {FIRST: SHARDS[FIRST]})
    small = write(tmp_path, SMALL)
    target, head = open_target("ann/out", hub=hub), repo.head
    match = "does not hold 'model-00002-of-00003.safetensors', 'model-00003"
    failure(
        errors.HubConflictError, match, lambda: branch.publish(target, small, SHARDS, message="Too early")
    )
    assert repo.head == head
    assert BRANCH in repo.branches


def test_the_branch_of_another_run_is_not_touched(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    repo = server.add_repo("ann/out")
    gather_on(opened(hub, "f" * 64), tmp_path, {FIRST: SHARDS[FIRST]})
    theirs = repo.branches["mono-quant-ffffffffffff"]
    assert opened(hub).held() == {}
    run(hub, tmp_path / "work")
    assert repo.branches == {"main": repo.head, "mono-quant-ffffffffffff": theirs}


def test_the_name_is_made_of_a_digest(hub: Hub, server: LoopbackHub) -> None:
    server.add_repo("ann/out")
    target = open_target("ann/out", hub=hub)
    for wrong in ("", "abc", "refs/pr/1xyz", "0123456789aB" + "0" * 52):
        failure(
            errors.ConfigError, "no hexadecimal digest", lambda wrong=wrong: WorkBranch.open(target, wrong)
        )


def test_a_record_that_is_not_of_the_file_is_refused(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.add_repo("ann/out")
    branch = opened(hub)
    file = write(tmp_path, {FIRST: SHARDS[FIRST]})[FIRST]
    wrong = record_of(FIRST, SHARDS[FIRST]) | {"sha256": "0" * 64}
    failure(errors.CorruptCheckpointError, "its record says", lambda: branch.put(FIRST, file, wrong))
    file.path.write_bytes(SHARDS[FIRST][:-1] + b"!")
    right = record_of(FIRST, SHARDS[FIRST])
    failure(errors.CorruptCheckpointError, "while it was uploaded", lambda: branch.put(FIRST, file, right))
    assert server.calls("commit") == []


# Refusals of an ordinary push: before the first byte, and before the branch.


@pytest.mark.parametrize(
    ("files", "options", "source", "kind"),
    [
        ({"private": False}, {}, {"private": True}, "is public, but its source"),
        ({"private": False}, {}, {"gated": "auto"}, "is public, but its source"),
        ({"private": False}, {"private": True}, {}, "exists and is public"),
        ({"files": SOURCE}, {}, {}, "holds weights that mono_quant did not push"),
    ],
)
def test_what_a_push_refuses_is_refused_before_anything_goes_up(
    server: LoopbackHub,
    hub: Hub,
    tmp_path: Path,
    files: dict[str, Any],
    options: dict[str, Any],
    source: dict[str, Any],
    kind: str,
) -> None:
    repo = server.add_repo("ann/out", **files)
    server.add_repo("ann/model", SOURCE, **source)
    facts = resolve("ann/model", hub=hub)
    failure(errors.HubConflictError, kind, lambda: run(hub, tmp_path, source=facts, **options))
    assert server.calls("branch", "preupload", "lfs_batch", "lfs_put", "commit") == []
    assert repo.branches.keys() == {"main"}


def test_a_repository_that_is_made_is_as_private_as_the_source(
    server: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    server.add_repo("ann/model", SOURCE, private=True)
    run(hub, tmp_path, source=resolve("ann/model", hub=hub))
    assert server.repo("ann/out").private


def test_a_repository_that_became_public_meanwhile_gets_nothing(
    server: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    server.add_repo("ann/model", SOURCE, private=True)
    repo = server.add_repo("ann/out", private=True)
    source = resolve("ann/model", hub=hub)
    branch = opened(hub)
    gather_on(branch, tmp_path)
    repo.private = False
    failure(errors.HubConflictError, "is public", lambda: run(hub, tmp_path, source=source))
    assert len(repo.commits()) == 1


def test_who_may_not_write_makes_no_branch(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.add_repo("bob/out")
    failure(errors.HubAuthError, "rights", lambda: run(hub, tmp_path, "bob/out"))
    failure(errors.HubAuthError, "make branch.*rights", lambda: run(hub, tmp_path, "bob/out", create_pr=True))
    assert server.calls("preupload", "commit") == []


def test_offline_there_is_no_push(server: LoopbackHub, tmp_path: Path) -> None:
    off = Hub(token=ANN, endpoint=server.endpoint, offline=True)
    failure(errors.HubOfflineError, "network is off", lambda: run(off, tmp_path))
    assert server.requests == []


def test_a_pull_request_leaves_main_alone(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    repo = server.add_repo("ann/out", SOURCE)
    head = repo.head
    result = run(hub, tmp_path / "work", create_pr=True)
    assert repo.head == head
    assert holds_all(repo, "refs/pr/1")
    assert (result.pr_url, result.commit_sha) == (
        f"{server.endpoint}/ann/out/discussions/1",
        repo.pulls["refs/pr/1"],
    )
    assert len(repo.commits("refs/pr/1")) == len(repo.commits()) + 1
    assert repo.branches.keys() == {"main"}


def test_a_hostile_gitignore_hides_nothing(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    repo = server.add_repo("ann/out", {".gitignore": b"*.safetensors\n*.json\n"})
    run(hub, tmp_path / "work")
    assert holds_all(repo)
    server.obeys_sent_gitignore = False
    repo = server.add_repo("ann/other", {".gitignore": b"*.safetensors\n"})
    failure(errors.HubConflictError, "hides", lambda: run(hub, tmp_path / "work", "ann/other"))
    assert len(repo.commits()) == 2


# Somebody commits meanwhile.


def interrupted(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object], *, times: int = 1
) -> list[object]:
    """Let something happen just before each of the first publishing commits."""
    client, happened = huggingface_hub.HfApi.create_commit, []

    def late(*args: Any, **options: Any) -> Any:
        if options["revision"] is None and len(happened) < times:
            happened.append(meanwhile())
        return client(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    return happened


def test_an_unrelated_commit_stays_below_ours(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    theirs = interrupted(monkeypatch, lambda: server.commit("ann/out", {"theirs.txt": b"1"}))
    run(hub, tmp_path / "work")
    assert holds_all(repo)
    assert repo.files()["theirs.txt"] == b"1"
    assert repo.history[repo.head].parent == theirs[0]
    assert len(repo.commits()) == 4


def test_a_second_unrelated_commit_stops_it(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    count = iter(range(9))
    theirs = interrupted(monkeypatch, lambda: server.commit("ann/out", {f"{next(count)}.txt": b"1"}), times=2)
    failure(errors.HubConflictError, "somebody committed", lambda: run(hub, tmp_path / "work"))
    assert repo.head == theirs[1]
    assert BRANCH in repo.branches
    run(hub, tmp_path / "work")
    assert holds_all(repo)
    assert len(sent(server)) == len(SHARDS)


@pytest.mark.parametrize(
    ("files", "delete", "named"),
    [
        ({"README.md": b"my own words"}, [], "README.md"),
        ({"config.json": b'{"mine": 1}'}, [], "config.json"),
        ({FIRST: b"other weights"}, [], FIRST),
        ({"pytorch_model.bin": b"weights"}, [], "pytorch_model.bin"),
        ({"tokenizer.json": b"edited"}, [], "tokenizer.json"),
        ({}, ["config.json"], "config.json"),
    ],
)
def test_a_commit_to_what_ours_is_about_stops_it_and_is_named(
    server: LoopbackHub,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    delete: list[str],
    named: str,
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    theirs = interrupted(monkeypatch, lambda: server.commit("ann/out", files, delete))
    failure(errors.HubConflictError, named, lambda: run(hub, tmp_path / "work"))
    assert repo.head == theirs[0]
    assert BRANCH in repo.branches


def test_our_own_commit_below_another_is_recognized(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    client = huggingface_hub.HfApi.create_commit

    def lost(*args: Any, **options: Any) -> Any:
        done = client(*args, **options)
        if options["revision"] is None:
            server.commit("ann/out", {"theirs.txt": b"1"})
            raise ConnectionError("lost")
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lost)
    assert run(hub, tmp_path / "work").commit_sha == repo.commits()[1]


def test_ranks_that_write_at_once_are_settled_by_looking(
    server: LoopbackHub, hub: Hub, tmp_path: Path, naps: list[float]
) -> None:
    repo = server.add_repo("ann/out")
    server.inject("commit", "409", 2)
    server.inject("commit", "412", 2)
    caught: list[errors.MonoQuantError] = []

    def rank(number: int, name: str) -> None:
        try:
            gather_on(opened(hub), tmp_path / f"{number}", {name: SHARDS[name]})
        except errors.MonoQuantError as error:
            caught.append(error)

    ranks = [threading.Thread(target=rank, args=item) for item in enumerate([*SHARDS, FIRST])]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert caught == []
    assert opened(hub).held().keys() == SHARDS.keys()
    # one failure is settled by a look where the other rank put the same file there meanwhile
    assert len(naps) in (3, 4)
    assert len(repo.commits(BRANCH)) <= 1 + len(SHARDS) + 1


def test_a_branch_that_cannot_be_deleted_is_left_with_a_warning(
    server: LoopbackHub, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_repo("ann/out")
    branch = opened(hub)
    gather_on(branch, tmp_path)
    server.inject("branch", "403")
    branch.drop()
    assert any(BRANCH in record.message and "delete it" in record.message for record in caplog.records)
    branch.drop()
    branch.drop()
    assert BRANCH not in server.repo("ann/out").branches


# A failure at every request, and a death at every one that changes something. Two shards, and little in the way.

TWO = tuple(SHARDS)[:2]
LITTLE = {"model.safetensors": SOURCE["model.safetensors"]}
LITTLE["mono_quant.json"] = json.dumps({
    "format": "mono_quant",
    "files": {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in LITTLE.items()},
}).encode()
WRITES = ("branch", "lfs_put", "commit")


def is_complete(repo: Repo) -> bool:
    files = repo.files()
    return files == {name: COMPLETE[name] for name in (*SMALL, *TWO)} | {
        ".gitattributes": files[".gitattributes"]
    }


def is_whole_or_as_before(repo: Repo) -> bool:
    """Whether main has the complete model by one commit, or nothing new."""
    before = repo.files(repo.commits()[-2]) == LITTLE | {".gitattributes": repo.files()[".gitattributes"]}
    return before and (len(repo.commits()) == 2 or (len(repo.commits()) == 3 and is_complete(repo)))


def afresh(server: LoopbackHub) -> Repo:
    """Return a repository with an earlier push, on a Hub that never saw a shard."""
    server.repos.clear()
    server.objects.clear()
    server.requests.clear()
    return server.add_repo("ann/out", LITTLE)


@pytest.fixture
def moments(server: LoopbackHub, hub: Hub, tmp_path: Path) -> Iterator[list[str]]:
    """The endpoints of all requests of a run in which nothing goes wrong; what is logged there is enough."""
    repo = afresh(server)
    run(hub, tmp_path / "work", shards=TWO)
    assert is_complete(repo)
    logging.disable()
    yield [request.endpoint for request in server.requests]
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "fault", ["drop", "apply-then-drop", "500", "apply-then-500", "429", "409", "412", "403", "corrupt"]
)
def test_with_a_failure_at_any_request_main_has_all_or_nothing(
    server: LoopbackHub, hub: Hub, tmp_path: Path, moments: list[str], fault: str
) -> None:
    is_usual = fault in ("drop", "500", "429")
    for number in [n for n, endpoint in enumerate(moments) if is_usual or endpoint in WRITES]:
        repo = afresh(server)
        server.fault_at = {number: fault}
        error: errors.MonoQuantError | None = None
        try:
            run(hub, tmp_path / "work", shards=TWO)
        except errors.MonoQuantError as caught:
            error = caught
        assert server.fault_at == {}
        if fault == "corrupt" and moments[number] == "commit" and len(repo.commits()) == 3:
            assert "does not hold what was pushed" in str(error)
            continue
        assert is_whole_or_as_before(repo), number
        assert fault not in TRANSIENT or error is None, number
        assert (error is None) == is_complete(repo) or moments[number] == "branch", number
        if error is not None:
            run(hub, tmp_path / "work", shards=TWO)
        assert is_complete(repo), number
        assert len(repo.commits()) == 3
        is_left = number == len(moments) - 1 and fault in ("403", "409", "412")
        assert repo.branches.keys() == {"main", *([BRANCH] if is_left else [])}


def test_killed_at_any_write_another_process_goes_on(
    server: LoopbackHub, hub: Hub, tmp_path: Path, moments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the server of forks imports once for all; it knows no other path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["branches"])
    writes = [number for number, endpoint in enumerate(moments) if endpoint in WRITES]
    # before it has its effect, and after it
    for moment in [*writes, *(~number for number in writes)]:
        repo = afresh(server)
        stored: list[str] = []
        victim = context.Process(target=run_apart, args=(server.endpoint, str(tmp_path / "victim"), TWO))
        server.watch = partial(_killing, server, victim, moment, stored)
        victim.start()
        victim.join(30)
        server.watch = partial(_killing, server, None, None, stored)
        assert victim.exitcode == -signal.SIGKILL, moment
        assert is_whole_or_as_before(repo), moment
        run(hub, tmp_path / "work", shards=TWO)
        assert is_complete(repo), moment
        assert len(repo.commits()) == 3
        assert repo.branches.keys() == {"main"}
        assert len(stored) == len(set(stored)) == len(TWO), moment


def _killing(server: LoopbackHub, victim: Any, moment: int | None, stored: list[str], number: int) -> None:
    """Kill a process at one of its requests, and note which large files arrived."""
    if number < 0 and server.requests[~number].endpoint == "lfs_put":
        stored.append(server.requests[~number].path)
    if number == moment:
        os.kill(victim.pid, signal.SIGKILL)
        raise ConnectionAbortedError
