"""Reading from and pushing to a real Hub server on the loopback interface, with the real client library.

Every test ends with a search for the access tokens in the output, the log and all files that were written.
"""

import hashlib
import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

import huggingface_hub
import loopback_hub
import pytest
from huggingface_hub import constants
from loopback_hub import OTHER_FAULTS, STATUS_FAULTS, LoopbackHub, Repo

from mono_quant import errors
from mono_quant.io.hub import push as pushing
from mono_quant.io.hub.client import Hub, is_repo_id
from mono_quant.io.hub.push import PushResult, push
from mono_quant.io.hub.repo import RepoFacts, download, read_headers, read_small_file, resolve
from mono_quant.io.hub.target import check_push
from mono_quant.io.text import looks_like_token

# The client library uploads with an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ANN = "hf_" + "AnnsCanaryToken" * 2 + "xyz1"
BOB = "hf_" + "BobsCanaryToken" * 2 + "xyz2"
READER = "hf_" + "ReadersCanaryTok" * 2 + "z3"
TOKENS = (ANN, BOB, READER)
LOGGERS = ("huggingface_hub", "mono_quant", "httpx2", "httpcore2")
TRANSIENT = ("500", "503", "429", "drop", "truncate", "apply-then-drop", "apply-then-500")


def safetensors(shape: tuple[int, ...], *, pad: int = 0, fill: bytes = b"\1") -> bytes:
    """Return a file with one int8 tensor; `pad` makes its header longer."""
    size = 1
    for side in shape:
        size *= side
    fields: dict[str, Any] = {"w": {"dtype": "I8", "shape": shape, "data_offsets": [0, size]}}
    if pad:
        fields["__metadata__"] = {"pad": "x" * pad}
    header = json.dumps(fields).encode()
    return len(header).to_bytes(8, "little") + header + fill * size


README = b"""---
license: other
license_name: acme
license_link: https://example.org/license
language: [en, de]
datasets: some/data
pipeline_tag: fill-mask
extra_gated_prompt: Please agree
---
# Model
"""
SOURCE = {
    "README.md": README,
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": safetensors((13, 17)),
    "pytorch_model.bin": b"a pickle that nobody wants",
}
FINISHED = {
    "README.md": b"---\nlicense: mit\n---\n# Quantized\n",
    "config.json": b'{"quantized": true}',
    "model.safetensors": safetensors((13, 17), fill=b"\7"),
}
EARLIER = {
    "README.md": b"---\nlicense: mit\n---\n# Earlier\n",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": safetensors((5,)),
    "model-00002-of-00002.safetensors": safetensors((6,)),
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"of the earlier model",
}
for saved in (FINISHED, EARLIER):
    saved["mono_quant.json"] = json.dumps({
        "format": "mono_quant",
        "files": {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in saved.items()},
    }).encode()
EARLIER["notes.txt"] = b"kept"


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.add_user("ann", ANN, orgs=["team"])
        running.add_user("bob", BOB)
        running.add_user("eve", READER, role="read")
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub(token=ANN, endpoint=server.endpoint, cache_dir=tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "finished"
    path.mkdir()
    for name, content in FINISHED.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let nobody sleep; return how long they would have."""
    slept: list[float] = []
    for module in (
        "huggingface_hub.utils._http",
        "huggingface_hub.file_download",
        "mono_quant.io.hub.client",
        "mono_quant.io.hub.push",
    ):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return slept


@pytest.fixture(autouse=True)
def no_token_anywhere(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[None]:
    for name in LOGGERS:
        logging.getLogger(name).propagate = True
        caplog.set_level(logging.DEBUG, logger=name)
    yield
    out, err = capfd.readouterr()
    said = out + err + caplog.text + "".join(repr(record.args) for record in caplog.records)
    assert not [token for token in TOKENS if token in said]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not [token for token in TOKENS if token.encode() in path.read_bytes()], path


def failure(
    kind: type[errors.MonoQuantError], match: str, call: Callable[[], object], *, see_locals: bool = True
) -> errors.MonoQuantError:
    """Return the error of a call, after looking for secrets in all of it, local variables included."""
    with pytest.raises(kind, match=match) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    check_no_secret(error, see_locals)
    return error


def check_no_secret(error: BaseException, see_locals: bool = True) -> None:
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = str(error) + repr(error) + "".join(traceback.format_exception(error))
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__) if "mono_quant" in f.f_globals["__name__"]]
    shown += "".join(repr(frame.f_locals) for frame in frames if see_locals)
    assert not [token for token in TOKENS if token in shown]
    assert "Bearer" not in shown


def pushed(folder: Path, repo_id: str, hub: Hub, **options: Any) -> PushResult:
    """Push the finished folder."""
    expect = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FINISHED.items()}
    options = {"files": list(FINISHED), "expect": expect, "commit_message": "Push int8"} | options
    return push(folder, repo_id, hub=hub, **options)


def holds_finished(repo: Repo, revision: str = "main") -> bool:
    files = repo.files(revision)
    weights = {name for name in files if ".safetensors" in name or name.endswith(".bin")}
    return weights == {"model.safetensors"} and files | FINISHED == files


# Ids and tokens


@pytest.mark.parametrize("text", ["gpt2", "org/model", "a.b-c_d/E.f", "hf-internal-testing/tiny", "x" * 96])
def test_repo_ids_are_recognized(text: str) -> None:
    assert is_repo_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a/b/c",
        "/abs/path",
        "./rel",
        "a--b",
        "a..b",
        "org/",
        "org/model\n",
        "o\u0440g/model",
        "a b",
        "x.git",
        "x" * 97,
    ],
)
def test_other_texts_are_no_repo_ids(text: str, hub: Hub, server: LoopbackHub) -> None:
    assert not is_repo_id(text)
    failure(errors.ConfigError, "repository id", lambda: resolve(text, hub=hub))
    assert server.requests == []


def test_a_token_in_place_of_an_id_is_not_repeated(hub: Hub, folder: Path, server: LoopbackHub) -> None:
    assert looks_like_token(f"org/{ANN}")
    assert not is_repo_id(ANN)
    failure(errors.ConfigError, "access token", lambda: resolve(f"org/{ANN}", hub=hub), see_locals=False)
    failure(errors.ConfigError, "access token", lambda: pushed(folder, ANN, hub), see_locals=False)
    failure(
        errors.ConfigError, "revision", lambda: resolve("org/model", revision=ANN, hub=hub), see_locals=False
    )
    assert server.requests == []


def test_a_revision_with_a_line_break_is_refused(hub: Hub) -> None:
    failure(errors.ConfigError, "revision", lambda: resolve("org/model", revision="main\nx", hub=hub))


def test_a_token_shows_in_no_repr(hub: Hub) -> None:
    assert ANN not in repr(hub) + repr(hub.token) + repr(vars(hub))
    assert f"Bearer {hub.token}" == f"Bearer {ANN}"


@pytest.mark.parametrize("token", ["", "  ", f"{ANN}\nX-Evil: 1", f"{ANN} {BOB}", ANN + "é"], ids=range(5))
def test_a_token_that_cannot_be_one_is_refused_without_repeating_it(token: str) -> None:
    failure(errors.HubAuthError, "characters", lambda: Hub(token=token), see_locals=False)


def test_a_token_is_stripped() -> None:
    assert Hub(token=f" {ANN}\n").token == ANN


def test_the_saved_token_is_used_and_hidden(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("ann/secret", SOURCE, private=True)
    monkeypatch.setenv("HF_TOKEN", ANN)
    assert resolve("ann/secret", hub=Hub(endpoint=server.endpoint)).private
    failure(
        errors.HubNotFoundError,
        "nobody/model",
        lambda: resolve("nobody/model", hub=Hub(endpoint=server.endpoint)),
    )
    monkeypatch.setenv("HF_TOKEN", f"{ANN}é")
    failure(
        errors.HubAuthError, "Copy it again", lambda: resolve("ann/secret", hub=Hub(endpoint=server.endpoint))
    )


def test_no_token_is_sent_when_it_is_switched_off(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("ann/model", SOURCE)
    monkeypatch.setenv("HF_TOKEN", ANN)
    resolve("ann/model", hub=Hub(endpoint=server.endpoint, token=False))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    resolve("ann/model", hub=Hub(endpoint=server.endpoint))
    assert [request for request in server.requests if "authorization" in request.headers] == []


def test_a_server_that_repeats_the_token_does_not_get_it_shown(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE)
    message = f"who is {ANN}? Authorization: Bearer {BOB}"
    STATUS_FAULTS["403"], before = (403, None, message), STATUS_FAULTS["403"]
    try:
        server.inject("model_info", "403")
        error = failure(errors.HubAuthError, r"who is \*\*\*", lambda: resolve("ann/model", hub=hub))
    finally:
        STATUS_FAULTS["403"] = before
    assert "hf auth login" in str(error)


# Reading


def test_resolve_tells_what_the_card_and_the_repository_say(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE, gated="manual", library_name="transformers")
    facts = resolve("ann/model", hub=hub)
    assert (facts.repo_id, facts.sha, facts.revision) == ("ann/model", server.repo("ann/model").head, None)
    assert (facts.private, facts.gated) == (False, True)
    assert (facts.pipeline_tag, facts.library_name) == ("fill-mask", "transformers")
    assert (facts.license, facts.license_name) == ("other", "acme")
    assert facts.license_link == "https://example.org/license"
    assert (facts.language, facts.datasets) == (("en", "de"), ("some/data",))
    assert facts.extra_gated == {"extra_gated_prompt": "Please agree"}
    weights = facts.file("model.safetensors")
    assert weights.size == len(SOURCE["model.safetensors"])
    assert weights.sha256 == hashlib.sha256(SOURCE["model.safetensors"]).hexdigest()
    assert facts.file("config.json").sha256 is None
    failure(errors.HubNotFoundError, "no file 'nope'", lambda: facts.file("nope"))


def test_resolve_survives_a_strange_card(server: LoopbackHub, hub: Hub) -> None:
    card = b"---\nlicense: [mit, apache]\nlicense_name: 3\nlanguage: 7\ndatasets: {a: b}\n---\n"
    server.add_repo("ann/model", {"README.md": card})
    facts = resolve("ann/model", hub=hub)
    assert (facts.license, facts.license_name, facts.language, facts.datasets) == (None, None, (), ())


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
    monkeypatch.setattr("mono_quant.io.hub.repo.MAX_SMALL_FILE_BYTES", 10)
    monkeypatch.setattr("mono_quant.io.hub.repo.MAX_HEADER_BYTES", 10)
    failure(errors.LimitExceededError, "at most 10", lambda: read_small_file(facts, "config.json", hub=hub))
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


def test_a_redirect_to_a_foreign_origin_gets_no_token(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE, private=True)
    facts = resolve("ann/model", hub=hub)
    server.inject("resolve", "redirect-foreign", times=20)
    assert read_small_file(facts, "config.json", hub=hub) == SOURCE["config.json"]
    assert "model.safetensors" in read_headers(facts, hub=hub)
    got = download(facts, wanted=lambda path: path.endswith(".safetensors"), hub=hub)
    assert (got / "model.safetensors").read_bytes() == SOURCE["model.safetensors"]
    assert len(server.foreign_requests) >= 3
    assert [r for r in server.foreign_requests if ANN in str(r.headers) + r.path] == []


def test_offline_reads_the_cache(server: LoopbackHub, hub: Hub) -> None:
    server.add_repo("ann/model", SOURCE)
    off = Hub(token=ANN, endpoint=server.endpoint, cache_dir=hub.cache_dir, offline=True)
    failure(errors.HubOfflineError, "run once online", lambda: resolve("ann/model", hub=off))
    facts = resolve("ann/model", hub=hub)
    folder = download(facts, wanted=lambda path: path != "pytorch_model.bin", hub=hub)
    seen = len(server.requests)
    for revision in (None, "main", facts.sha):
        cached = resolve("ann/model", revision=revision, hub=off)
        assert (cached.sha, cached.license, cached.private) == (facts.sha, "other", None)
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


# Pushing


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


def test_foreign_weights_beside_ours_are_refused(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.add_repo("ann/model", EARLIER | {"pytorch_model.bin": b"somebody's"})
    failure(errors.HubConflictError, "pytorch_model.bin", lambda: pushed(folder, "ann/model", hub))
    server.commit(
        "ann/model", {"model-00002-of-00002.safetensors": safetensors((6,), fill=b"!")}, ["pytorch_model.bin"]
    )
    failure(errors.HubConflictError, "model-00002", lambda: pushed(folder, "ann/model", hub))


def test_files_of_an_earlier_push_do_not_stay(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.add_repo("ann/model", EARLIER)
    pushed(folder, "ann/model", hub)
    assert server.repo("ann/model").files().keys() == {*FINISHED, "notes.txt", ".gitattributes"}


def test_a_lost_answer_needs_no_history(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.inject("commit", "apply-then-drop")
    server.inject("commits", "403", 9)
    assert pushed(folder, "ann/model", hub).commit_sha == server.repo("ann/model").head


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
        call: Callable[[], object] = lambda target=target: check_push(target, hub, source=source)  # type: ignore[misc]
        failure(errors.HubConflictError, says, call)
    check_push("ann/open", hub, source=source, private=False)
    check_push("ann/used", hub, source=source, overwrite=True)
    check_push("ann/used", hub, source=source, create_pr=True)
    check_push("ann/ours", hub, source=source)
    check_push("ann/new", hub, source=source)


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


def test_a_full_disk_is_named(server: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    server.add_repo("ann/model", SOURCE)
    facts = resolve("ann/model", hub=hub)
    monkeypatch.setattr(huggingface_hub.HfApi, "snapshot_download", full)
    want_all: Callable[[], object] = lambda: download(facts, wanted=lambda path: True, hub=hub)
    failure(errors.OutputWriteError, "No space left.*free space", want_all)


def test_a_silent_server_is_given_up(server: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mono_quant.io.hub.patience.SILENCE", 0.05)
    monkeypatch.setattr(loopback_hub._Handler, "on_model_info", lambda self: threading.Event().wait(0.5))
    failure(errors.HubTransientError, "Timeout.*Check the network", lambda: resolve("ann/model", hub=hub))


def test_a_long_file_list_is_read_to_its_end(server: LoopbackHub, hub: Hub, folder: Path) -> None:
    server.page_size = 3
    repo = server.add_repo("ann/out", EARLIER | {f"a/{number}.txt": b"" for number in range(9)})
    pushed(folder, "ann/out", hub)
    assert holds_finished(repo)


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
