"""Repo: see the room of this name."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from pushes import ANN, BOB, EARLIER, SOURCE, TRANSIENT, failure, holds_finished, pushed, safetensors

from mono_quant import errors
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.fetching import download
from mono_quant.io.hub.ranges import read_headers, read_small_file
from mono_quant.io.hub.repo import RepoFile, resolve

# The client library uploads with an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_resolve_tells_what_the_card_and_the_repository_say(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE, gated="manual", library_name="transformers")
    facts = resolve("ann/model", hub=hub)
    assert (facts.repo_id, facts.sha, facts.revision) == ("ann/model", server.repo("ann/model").head, None)
    assert (facts.private, facts.gated) == (False, True)
    assert (facts.card.pipeline_tag, facts.library_name) == ("fill-mask", "transformers")
    assert (facts.card.license, facts.card.license_name) == ("other", "acme")
    assert facts.card.license_link == "https://example.org/license"
    assert (facts.card.language, facts.card.datasets) == (("en", "de"), ("some/data",))
    assert facts.card.extra_gated == {"extra_gated_prompt": "Please agree"}
    weights = facts.file("model.safetensors")
    assert weights.size == len(SOURCE["model.safetensors"])
    assert weights.sha256 == hashlib.sha256(SOURCE["model.safetensors"]).hexdigest()
    assert facts.file("config.json").sha256 is None
    failure(errors.HubNotFoundError, "no file 'nope'", lambda: facts.file("nope"))


def test_resolve_survives_a_strange_card(server: LoopbackHub, hub: Hub) -> None:
    card = b"---\nlicense: [mit, apache]\nlicense_name: 3\nlanguage: 7\ndatasets: {a: b}\n---\n"
    server.add_repo("ann/model", {"README.md": card})
    facts = resolve("ann/model", hub=hub)
    assert (facts.card.license, facts.card.license_name, facts.card.language, facts.card.datasets) == (
        None,
        None,
        (),
        (),
    )


@pytest.mark.parametrize("asked", ["old/name", "Ann/MODEL"])
def test_resolve_follows_to_the_canonical_name(server: LoopbackHub, hub: Hub, asked: str) -> None:
    server.add_repo("old/name", SOURCE)
    server.rename("old/name", "ann/model")
    facts = resolve(asked, hub=hub)
    assert facts.repo_id == "ann/model"
    assert read_small_file(facts, "config.json", hub=hub) == SOURCE["config.json"]


def test_a_revision_is_resolved_once_and_stays(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE)
    facts = resolve("ann/model", hub=hub)
    server.commit("ann/model", {"config.json": b'{"moved": 1}', "model.safetensors": safetensors((2,))})
    assert read_small_file(facts, "config.json", hub=hub) == SOURCE["config.json"]
    got = download(facts, wanted=lambda path: path.endswith(".safetensors"), hub=hub)
    assert got.name == facts.sha
    assert (got / "model.safetensors").read_bytes() == SOURCE["model.safetensors"]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "my-branch", "head", "short"])
def test_every_kind_of_revision_resolves(server: LoopbackHub, hub: Hub, revision: str) -> None:
    repo = server.add_repo("ann/model", SOURCE)
    wanted = repo.head
    server.tag("ann/model", "v1")
    repo.pulls["refs/pr/1"] = repo.branches["my-branch"] = wanted
    server.commit("ann/model", {"later": b""})
    asked = {"head": wanted, "short": wanted[:9]}.get(revision, revision)
    assert resolve("ann/model", revision=asked, hub=hub).sha == wanted


def test_a_missing_revision_is_named(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE)
    failure(
        errors.HubNotFoundError, "nope.*Check the id", lambda: resolve("ann/model", revision="nope", hub=hub)
    )


def test_private_missing_and_unauthorized_repositories(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("bob/secret", SOURCE, private=True)
    failure(errors.HubNotFoundError, "bob/secret.*private", lambda: resolve("bob/secret", hub=hub))
    failure(errors.HubNotFoundError, "bob/nothing", lambda: resolve("bob/nothing", hub=hub))
    wrong = Hub(token="hf_" + "w" * 34, endpoint=server.endpoint)
    failure(errors.HubAuthError, "hf auth login", lambda: resolve("bob/secret", hub=wrong))
    assert resolve("bob/secret", hub=Hub(token=BOB, endpoint=server.endpoint)).private


def test_a_gated_repository_shows_its_facts_but_no_files(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("bob/gated", SOURCE, gated="auto")
    facts = resolve("bob/gated", hub=hub)
    assert facts.gated
    ask_access = "Ask for access"
    failure(errors.HubGatedError, ask_access, lambda: read_small_file(facts, "config.json", hub=hub))
    failure(errors.HubGatedError, ask_access, lambda: read_headers(facts, hub=hub))
    failure(errors.HubGatedError, ask_access, lambda: download(facts, wanted=lambda path: True, hub=hub))
    server.repo("bob/gated").readers.add("ann")
    assert read_small_file(facts, "config.json", hub=hub) == SOURCE["config.json"]


def test_only_wanted_files_are_fetched(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE | {"odd[1]*.json": b"1", "odd1x.json": b"2"})
    facts = resolve("ann/model", hub=hub)
    got = download(facts, wanted=lambda path: path in ("config.json", "odd[1]*.json"), hub=hub)
    assert sorted(path.name for path in got.iterdir()) == ["config.json", "odd[1]*.json"]
    failure(
        errors.HubNotFoundError,
        "none of the wanted",
        lambda: download(facts, wanted=lambda path: False, hub=hub),
    )


def test_a_path_out_of_the_folder_is_refused(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.add_repo("ann/model", {"../../evil.json": b"{}", "config.json": b"{}"})
    facts = resolve("ann/model", hub=hub)
    failure(errors.UnsafeInputError, "outside", lambda: download(facts, wanted=lambda path: True, hub=hub))
    failure(errors.UnsafeInputError, "outside", lambda: read_small_file(facts, "../../evil.json", hub=hub))
    assert not list(tmp_path.rglob("evil.json"))
    assert download(facts, wanted=lambda path: path == "config.json", hub=hub).is_dir()


def test_weights_that_arrive_changed_are_refused(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", {"model.safetensors": SOURCE["model.safetensors"]})
    facts = resolve("ann/model", hub=hub)
    server.inject("resolve", "corrupt", times=2)  # one for HEAD, one for GET
    fetch: Callable[..., object] = lambda **more: download(
        facts, wanted=lambda p: "model" in p, hub=hub, **more
    )
    failure(errors.CorruptCheckpointError, "SHA-256 .* instead of", fetch)
    fetch(verify=False)


def test_a_cache_that_does_not_fit_the_commit_is_refused(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("ann/model", SOURCE)
    facts = resolve("ann/model", hub=hub)
    fetch: Callable[[], Path] = lambda: download(facts, wanted=lambda path: "safe" in path, hub=hub)
    with (fetch() / "model.safetensors").open("ab") as file:
        file.write(b"more")
    failure(errors.CorruptCheckpointError, "bytes instead of", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "snapshot_download", lambda *_, **__: str(tmp_path))
    failure(errors.CorruptCheckpointError, "is not in .* download again", fetch)


def test_an_answer_that_ends_early_is_noticed(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE)
    facts = resolve("ann/model", hub=hub)
    longer = replace(facts, files=tuple(replace(entry, size=entry.size + 5) for entry in facts.files))
    failure(
        errors.HubTransientError, "came instead of", lambda: read_small_file(longer, "config.json", hub=hub)
    )


def test_headers_cost_no_weights(server: LoopbackHub, hub: Hub) -> None:
    big = safetensors((1000, 1000))
    files = {"model-1.safetensors": big, "model-2.safetensors": safetensors((3,), pad=250_000), "a.bin": b"x"}
    server.add_repo("ann/model", files)
    facts = resolve("ann/model", hub=hub)
    heads = read_headers(facts, hub=hub)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        size = 8 + int.from_bytes(files[name][:8], "little")
        assert heads[name] == files[name][:size]
    assert {request.method for request in server.calls("resolve")} == {"GET"}
    assert all(request.headers["range"].startswith("bytes=") for request in server.calls("resolve"))
    assert list(read_headers(facts, wanted=lambda path: "1" in path, hub=hub)) == ["model-1.safetensors"]


@pytest.mark.parametrize("content", [b"", b"1234567", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_file_shorter_than_its_header_is_refused(server: LoopbackHub, hub: Hub, content: bytes) -> None:
    server.add_repo("ann/model", {"model.safetensors": content})
    facts = resolve("ann/model", hub=hub)
    failure(errors.CorruptCheckpointError, "header claims", lambda: read_headers(facts, hub=hub))


def test_limits_of_what_is_read_into_memory(
    server: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("ann/model", SOURCE | {"empty.json": b""})
    facts = resolve("ann/model", hub=hub)
    assert read_small_file(facts, "empty.json", hub=hub) == b""
    monkeypatch.setattr("mono_quant.io.hub.ranges.MAX_HEADER_BYTES", 10)
    failure(
        errors.LimitExceededError,
        "at most 10",
        lambda: read_small_file(facts, "config.json", hub=hub, max_bytes=10),
    )
    failure(errors.LimitExceededError, "header .* at most 10", lambda: read_headers(facts, hub=hub))


@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("endpoint", ["model_info", "tree", "resolve"])
def test_reading_survives_a_failure(server: LoopbackHub, hub: Hub, endpoint: str, fault: str) -> None:
    server.add_repo("ann/model", SOURCE)
    server.inject(endpoint, fault)
    facts = resolve("ann/model", hub=hub)
    assert "model.safetensors" in read_headers(facts, hub=hub)
    server.inject(endpoint, fault)
    got = download(facts, wanted=lambda path: path.endswith((".json", ".safetensors")), hub=hub)
    assert (got / "model.safetensors").read_bytes() == SOURCE["model.safetensors"]


def test_a_hub_that_stays_down_is_a_transient_error(server: LoopbackHub, hub: Hub, naps: list[float]) -> None:
    server.add_repo("ann/model", SOURCE)
    server.inject("model_info", "503", times=4)
    failure(errors.HubTransientError, "HTTP 503.*Try again later", lambda: resolve("ann/model", hub=hub))
    assert sum(naps) <= 10
    server.close()
    huggingface_hub.close_session()
    failure(errors.HubTransientError, "Check the network", lambda: resolve("ann/model", hub=hub))


@pytest.mark.parametrize("endpoint", ["tree", "resolve", "model_info"])
def test_an_endless_retry_after_ends_a_download(
    server: LoopbackHub, hub: Hub, naps: list[float], endpoint: str
) -> None:
    server.add_repo("ann/model", SOURCE)
    facts = resolve("ann/model", hub=hub)
    server.inject(endpoint, "retry-after-huge", times=9)
    run: Callable[[], object] = (
        (lambda: resolve("ann/model", hub=hub))
        if endpoint == "model_info"
        else (lambda: download(facts, wanted=lambda path: True, hub=hub))
    )
    failure(errors.HubTransientError, "1000000000 s more", run)
    assert sum(naps) < 100


def test_offline_reads_the_cache(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE)
    off = Hub(token=ANN, endpoint=server.endpoint, cache_dir=hub.cache_dir, offline=True)
    failure(errors.HubOfflineError, "run once online", lambda: resolve("ann/model", hub=off))
    facts = resolve("ann/model", hub=hub)
    folder = download(facts, wanted=lambda path: path != "pytorch_model.bin", hub=hub)
    seen = len(server.requests)
    for revision in (None, "main", facts.sha):
        cached = resolve("ann/model", revision=revision, hub=off)
        assert (cached.sha, cached.card.license, cached.private) == (facts.sha, "other", None)
    assert cached.file("model.safetensors") == facts.file("model.safetensors")
    assert read_headers(cached, hub=off) == read_headers(facts, hub=off)
    assert download(cached, wanted=lambda path: path.endswith(".safetensors"), hub=off) == folder
    failure(errors.HubOfflineError, "v9", lambda: resolve("ann/model", revision="v9", hub=off))
    want_all: Callable[[], object] = lambda: download(facts, wanted=lambda path: True, hub=off)
    failure(errors.HubOfflineError, "cache", want_all)
    assert len(server.requests) == seen


def test_offline_headers_need_all_weights_in_the_cache(server: LoopbackHub, hub: Hub) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": safetensors((5,)) for i in (1, 2)}
    server.add_repo("org/model", {"config.json": b"{}", **shards})
    offline = replace(hub, offline=True)
    facts = resolve("org/model", hub=hub)
    download(facts, wanted=lambda path: path == "config.json", hub=hub)
    call: Callable[[], object] = lambda: read_headers(resolve("org/model", hub=offline), hub=offline)
    failure(errors.HubOfflineError, "The weights of 'org/model' at commit .* not in the cache", call)
    download(facts, wanted=lambda path: "00001" in path, hub=hub)
    failure(
        errors.HubOfflineError, "Weight files such as 'model-00002-of-00002.safetensors' of 'org/model'", call
    )
    download(facts, wanted=lambda path: "00002" in path, hub=hub)
    assert len(read_headers(resolve("org/model", hub=offline), hub=offline)) == 2


def test_the_offline_switch_of_the_environment_counts(
    server: LoopbackHub, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failure(errors.HubOfflineError, "run once online", lambda: resolve("ann/model", hub=hub))
    failure(errors.HubOfflineError, "network is off", lambda: pushed(folder, "ann/out", hub))
    assert server.requests == []


def test_a_long_file_list_is_read_to_its_end(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.page_size = 3
    repo = server.add_repo("ann/out", EARLIER | {f"a/{number}.txt": b"" for number in range(9)})
    pushed(folder, "ann/out", hub)
    assert holds_finished(repo)


def test_a_small_file_that_arrives_changed_is_asked_for_again(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE)
    facts = resolve("ann/model", hub=hub)
    server.inject("resolve", "corrupt")
    assert read_small_file(facts, "README.md", hub=hub) == SOURCE["README.md"]
    server.inject("resolve", "corrupt", times=4)
    call: Callable[[], object] = lambda: read_small_file(facts, "README.md", hub=hub)
    failure(errors.HubTransientError, "content with git id .* came instead of", call)


def test_two_files_differ_when_something_known_of_both_does() -> None:
    assert RepoFile("x", 1, "a").differs(RepoFile("x", 2, "a"))
    assert RepoFile("x", 1, "a", "i").differs(RepoFile("x", 1, None, "j"))
    assert RepoFile("x", 1, "a").differs(RepoFile("x", 1, "b"))
    assert not RepoFile("x", 1, "a").differs(RepoFile("x", 1, None, "i"))
    assert not RepoFile("x", 1, "a", "i").differs(RepoFile("x", 1, "a", None))
