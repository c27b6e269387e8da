"""Reading from and pushing to a real Hub server on the loopback interface, with the real client library.

Every test ends with a search for the access tokens in the output, the log and all files that were written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import loopback_hub
import pytest
from loopback_hub import OTHER_FAULTS, STATUS_FAULTS, LoopbackHub
from pushes import (
    ANN,
    BOB,
    EARLIER,
    FINISHED,
    SOURCE,
    TRANSIENT,
    check_no_secret,
    failure,
    holds_finished,
    pushed,
)

from mono_quant import errors
from mono_quant.io.hub import push as pushing
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.repo import resolve

# The client library uploads with an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_push_creates_a_repository_with_one_commit(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    (folder / "unlisted.txt").write_text("never sent")
    result = pushed(folder, "ann/out", hub)
    repo = server.repo("ann/out")
    assert result == PushResult("ann/out", repo.head, f"{server.endpoint}/ann/out", created=True)
    assert len(repo.commits()) == 2
    assert set(repo.files()) == {*FINISHED, ".gitattributes"}
    assert holds_finished(repo)
    assert not repo.private
    assert repo.history[repo.head].title == "Push int8"


def test_pushing_twice_makes_one_commit(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    first = pushed(folder, "ann/out", hub)
    seen = len(server.calls("lfs_put", "commit"))
    again = pushed(folder, "ann/out", hub)
    assert (again.commit_sha, again.already_there, again.created) == (first.commit_sha, True, False)
    assert len(server.calls("lfs_put", "commit")) == seen


def test_a_push_without_an_owner_goes_to_the_account(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    assert pushed(folder, "out", hub).repo_id == "ann/out"


def test_an_earlier_push_is_replaced_without_stale_weights(
    server: LoopbackHub, hub: Hub, folder: Path
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    pushed(folder, "ann/out", hub)
    assert holds_finished(repo)
    assert set(repo.files()) == {*FINISHED, ".gitattributes", "notes.txt"}
    assert len(repo.commits()) == 3


def test_files_of_an_earlier_push_do_not_stay(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.add_repo("ann/model", EARLIER)
    pushed(folder, "ann/model", hub)
    assert server.repo("ann/model").files().keys() == {*FINISHED, "notes.txt", ".gitattributes"}


def test_a_lost_answer_needs_no_history(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.inject("commit", "apply-then-drop")
    server.inject("commits", "403", 9)
    assert pushed(folder, "ann/model", hub).commit_sha == server.repo("ann/model").head


def test_a_pull_request_leaves_main_alone(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    repo = server.add_repo("bob/model", SOURCE)
    head = repo.head
    result = pushed(folder, "bob/model", hub, create_pr=True, source=resolve("bob/model", hub=hub))
    assert repo.head == head
    assert holds_finished(repo, "refs/pr/1")
    assert result.pr_url == f"{server.endpoint}/bob/model/discussions/1"
    assert result.commit_sha == repo.pulls["refs/pr/1"]
    failure(
        errors.HubNotFoundError, "no pull request", lambda: pushed(folder, "bob/none", hub, create_pr=True)
    )


@pytest.mark.parametrize("fault", ["apply-then-drop", "apply-then-500", "500", "drop"])
def test_a_pull_request_is_opened_once(server: LoopbackHub, hub: Hub, folder: Path, fault: str) -> None:
    repo = server.add_repo("bob/model", SOURCE)
    repo.pulls["refs/pr/1"] = repo.head
    server.inject("commit", fault)
    result = pushed(folder, "bob/model", hub, create_pr=True)
    assert sorted(repo.pulls) == ["refs/pr/1", "refs/pr/2"]
    assert result.pr_url == f"{server.endpoint}/bob/model/discussions/2"


def test_push_to_a_branch(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    repo = server.add_repo("ann/out", SOURCE)
    repo.branches["int8"] = repo.commits()[-1]
    main = repo.head
    pushed(folder, "ann/out", hub, revision="int8")
    assert repo.head == main
    assert holds_finished(repo, "int8")
    failure(errors.HubNotFoundError, "nope", lambda: pushed(folder, "ann/out", hub, revision="nope"))


def test_a_hostile_gitignore_hides_nothing(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    repo = server.add_repo("ann/out", {".gitignore": b"*.safetensors\nconfig.json\n"})
    pushed(folder, "ann/out", hub)
    assert holds_finished(repo)


def test_a_server_that_insists_on_its_gitignore_gets_no_commit(
    server: LoopbackHub, hub: Hub, folder: Path
) -> None:
    server.obeys_sent_gitignore = False
    repo = server.add_repo("ann/out", {".gitignore": b"*.safetensors\n"})
    head = repo.head
    failure(errors.HubConflictError, r"hides \['model.safetensors'\]", lambda: pushed(folder, "ann/out", hub))
    assert repo.head == head


def test_somebody_else_is_not_overwritten(
    server: LoopbackHub, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    theirs: list[str] = []
    client = huggingface_hub.HfApi.create_commit

    def late(*args: Any, **options: Any) -> Any:
        theirs.append(server.commit("ann/out", {"theirs.txt": b"1"}))
        return client(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    failure(errors.HubConflictError, "somebody committed", lambda: pushed(folder, "ann/out", hub))
    assert repo.head == theirs[0]


def test_a_commit_that_landed_below_another_is_recognized(
    server: LoopbackHub, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add_repo("ann/out", EARLIER)
    client = huggingface_hub.HfApi.create_commit

    def lost(*args: Any, **options: Any) -> Any:
        client(*args, **options)
        server.commit("ann/out", {"theirs.txt": b"1"})
        raise ConnectionError("lost")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lost)
    result = pushed(folder, "ann/out", hub)
    assert result.commit_sha == repo.commits()[1]
    assert len(repo.commits()) == 4


def test_a_commit_that_holds_other_bytes_is_reported(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.inject("commit", "corrupt")
    failure(errors.HubConflictError, "does not hold what was pushed", lambda: pushed(folder, "ann/out", hub))


def test_a_check_that_fails_after_the_commit_names_the_commit(
    server: LoopbackHub, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("ann/out")
    commit = pushing._commit

    def then_deny(*args: Any) -> tuple[str, str | None]:
        done = commit(*args)
        server.inject("tree", "403")
        return done

    monkeypatch.setattr(pushing, "_commit", then_deny)
    error = failure(
        errors.HubAuthError,
        "was made; only checking what it holds failed: .*403",
        lambda: pushed(folder, "ann/out", hub),
    )
    assert f"Commit {server.repo('ann/out').head} of 'ann/out'" in str(error)


def test_a_list_that_lags_behind_the_commit_is_read_again(
    server: LoopbackHub, hub: Hub, folder: Path
) -> None:
    server.add_repo("ann/out")
    server.inject("tree", "corrupt", times=2)  # before the commit, and once after it
    assert pushed(folder, "ann/out", hub).commit_sha == server.repo("ann/out").head


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../finished/config.json", errors.UnsafeInputError),
        ("/etc/hostname", errors.UnsafeInputError),
        ("a\nb", errors.UnsafeInputError),
        (".git/config", errors.UnsafeInputError),
        ("a\\b", errors.UnsafeInputError),
        ("link.json", errors.UnsafeInputError),
        ("linked/config.json", errors.UnsafeInputError),
        ("sub", errors.UnsafeInputError),
        ("missing.json", errors.MissingFileError),
    ],
)
def test_only_regular_files_inside_the_folder_are_pushed(
    server: LoopbackHub, hub: Hub, folder: Path, name: str, kind: type[errors.MonoQuantError]
) -> None:
    (folder / "link.json").symlink_to(folder / "config.json")
    (folder / "linked").symlink_to(folder)
    (folder / "sub").mkdir()
    failure(kind, "in |inside", lambda: pushed(folder, "ann/out", hub, files=[*FINISHED, name]))
    assert server.requests == []


def test_a_file_that_changed_since_it_was_written_is_refused(
    server: LoopbackHub, hub: Hub, folder: Path
) -> None:
    (folder / "model.safetensors").write_bytes(b"other")
    failure(errors.CorruptCheckpointError, "5 bytes", lambda: pushed(folder, "ann/out", hub))
    for options in ({"files": []}, {"files": ["config.json"] * 2}, {"files": ["config.json"]}):
        call: Callable[..., object] = lambda options=options: pushed(folder, "ann/out", hub, **options)
        failure(errors.ConfigError, "do not fit", call)
    failure(errors.ConfigError, "message", lambda: pushed(folder, "ann/out", hub, commit_message=" \n"))
    assert server.requests == []


def test_a_token_in_the_commit_message_is_removed(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    pushed(folder, "ann/out", hub, commit_message=f"made with {BOB}\nsecond line")
    repo = server.repo("ann/out")
    assert repo.history[repo.head].title == "made with *** second line"


def test_a_full_quota_is_not_called_a_login_problem(
    server: LoopbackHub, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STATUS_FAULTS, "403", (403, None, "Private repository storage limit reached"))
    server.add_repo("ann/out")
    server.inject("lfs_batch", "403")
    failure(errors.HubError, "storage limit.*Free some space", lambda: pushed(folder, "ann/out", hub))


def test_waiting_has_an_end(server: LoopbackHub, hub: Hub, folder: Path, naps: list[float]) -> None:
    server.add_repo("ann/out")
    impatient = Hub(token=ANN, endpoint=server.endpoint, patience=20.0)
    server.inject("preupload", "503", times=9)
    failure(errors.HubTransientError, "limit is 20 s", lambda: pushed(folder, "ann/out", impatient))
    assert sum(naps) <= 20
    assert len(server.repo("ann/out").commits()) == 1


def test_a_commit_waits_as_long_as_it_is_asked(
    server: LoopbackHub, hub: Hub, folder: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = loopback_hub._Handler.answer
    monkeypatch.setattr(
        loopback_hub._Handler,
        "answer",
        lambda self, status, body=b"", headers=(): answer(
            self, status, body, [*headers, ("Retry-After", "30"), ("ratelimit", '"api";r=0;t=40')]
        ),
    )
    server.inject("commit", "429")
    assert pushed(folder, "ann/out", hub).created
    assert naps == [40.0]


def test_an_invalid_card_is_refused_before_the_commit(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_bytes(b"---\nlicense: [\n---\n")
    failure(errors.HubError, "Check the request", lambda: pushed(folder, "ann/out", hub, expect={}))
    assert server.calls("commit") == []


ENDPOINTS = [
    "create_repo",
    "whoami",
    "model_info",
    "auth_check",
    "tree",
    "resolve",
    "validate_yaml",
    "preupload",
    "lfs_batch",
    "lfs_put",
    "lfs_verify",
    "commit",
]
REFUSALS = {
    "401": errors.HubAuthError,
    "403": errors.HubAuthError,
    "404": errors.HubNotFoundError,
    "409": errors.HubConflictError,
    "412": errors.HubConflictError,
    "retry-after-huge": errors.HubTransientError,
}

# A 404 or 409 around the creation only says what is looked up again anyway.
HARMLESS = {("create_repo", "409"), ("model_info", "404")}


@pytest.mark.parametrize("fault", [*STATUS_FAULTS, *sorted(OTHER_FAULTS)])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_success_is_reported_exactly_when_the_commit_is_there(
    server: LoopbackHub, hub: Hub, folder: Path, naps: list[float], endpoint: str, fault: str
) -> None:
    server.add_repo("ann/model", SOURCE, private=True)
    source = resolve("ann/model", hub=hub)
    if endpoint != "create_repo":
        server.add_repo("ann/out", EARLIER, private=True)
    before = 1 if endpoint == "create_repo" else 2
    server.inject(endpoint, fault)
    error: errors.MonoQuantError | None = None
    try:
        pushed(folder, "out" if endpoint == "whoami" else "ann/out", hub, source=source)
    except errors.MonoQuantError as caught:
        error = caught
        check_no_secret(error)

    made = len(server.repos["ann/out"].commits()) - before if "ann/out" in server.repos else 0
    assert server.faults[endpoint] == []
    assert made in (0, 1)
    if made:
        repo = server.repo("ann/out")
        assert repo.private
        assert set(repo.files()) - set(EARLIER) <= {*FINISHED, ".gitattributes"}
        assert holds_finished(repo) or (endpoint, fault) == ("commit", "corrupt")
    if (endpoint, fault) != ("commit", "corrupt"):
        assert (error is None) == (made == 1)
    if fault in TRANSIENT or (endpoint, fault) in HARMLESS:
        assert error is None
    elif fault in REFUSALS:
        assert isinstance(error, REFUSALS[fault])
    assert [r for r in server.foreign_requests if "authorization" in r.headers] == []
    assert sum(naps) < 600
