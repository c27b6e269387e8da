"""Client: see the room of this name."""

import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import loopback_hub
import pytest
from huggingface_hub import constants
from loopback_hub import STATUS_FAULTS, LoopbackHub
from pushes import ANN, BOB, SOURCE, failure, pushed

from mono_quant import errors
from mono_quant.io.hub.client import Hub, is_repo_id
from mono_quant.io.hub.fetching import download
from mono_quant.io.hub.ranges import read_headers, read_small_file
from mono_quant.io.hub.repo import resolve
from mono_quant.io.text import looks_like_token

# The client library uploads with an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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
