"""What bounds the waits for a Hub is on the client library's session while a call of ours runs, and not a moment longer."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import _http
from loopback_hub import LoopbackHub

from mono_quant.errors import HubTransientError
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.patience import SILENCE, patience, watch_session
from mono_quant.io.hub.ranges import read_headers
from mono_quant.io.hub.repo import resolve

TENSORS = b"\x02\0\0\0\0\0\0\0{}"


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.add_repo("ann/model", {f"model-{i}.safetensors": TENSORS for i in range(9)})
        yield running
        huggingface_hub.set_client_factory(_http.default_client_factory)


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub(token=False, endpoint=server.endpoint, cache_dir=tmp_path)


@pytest.fixture
def seen(server: LoopbackHub) -> list[Any]:
    """Every request that goes through a session which the user made in a way of their own."""
    requests: list[Any] = []

    def factory() -> Any:
        client = _http.default_client_factory()
        client.headers["X-Theirs"] = "yes"
        client.event_hooks = {"request": [*client.event_hooks["request"], requests.append], "response": []}
        return client

    huggingface_hub.set_client_factory(factory)
    return requests


def hooks(session: Any) -> dict[str, list[Any]]:
    return {kind: list(found) for kind, found in session.event_hooks.items()}


def test_the_users_session_is_used_and_is_afterwards_as_it_was(
    server: LoopbackHub, hub: Hub, seen: list[Any]
) -> None:
    session = huggingface_hub.get_session()
    before = hooks(session)
    read_headers(resolve("ann/model", hub=hub), hub=hub)
    assert huggingface_hub.get_session() is session
    assert hooks(session) == before
    assert len(seen) == 10
    assert {request.headers["x-theirs"] for request in server.requests} == {"yes"}
    # a request of somebody else has no limit of ours
    session.get(f"{server.endpoint}/api/models/ann/model")
    assert set(seen[-1].extensions["timeout"].values()) == {None}


def test_limits_hold_until_the_last_call_has_ended(server: LoopbackHub, seen: list[Any]) -> None:
    session = huggingface_hub.get_session()
    before = hooks(session)

    first, second = patience(60), patience(60)
    first.__enter__()
    watch_session()
    second.__enter__()
    watch_session()
    added = {kind: len(found) - len(before[kind]) for kind, found in hooks(session).items()}
    assert added == {"request": 1, "response": 1}
    first.__exit__(None, None, None)
    session.get(f"{server.endpoint}/api/models/ann/model")
    assert hooks(session) != before
    second.__exit__(None, None, None)
    assert hooks(session) == before


def test_a_new_session_in_the_middle_of_a_call_is_limited_too(server: LoopbackHub, hub: Hub) -> None:
    with patience(20):
        watch_session()
        old = huggingface_hub.get_session()
        huggingface_hub.close_session()
        server.inject("model_info", "503", times=1)
        resolve("ann/model", hub=hub)
        new = huggingface_hub.get_session()
        assert new is not old
        server.inject("model_info", "retry-after-huge", times=1)
        with pytest.raises(HubTransientError, match="limit is 20 s"):
            resolve("ann/model", hub=hub)
    assert hooks(new) == {"request": [_http.hf_request_event_hook], "response": []}


def test_calls_in_many_threads_leave_nothing_behind(hub: Hub) -> None:
    session = huggingface_hub.get_session()
    before = hooks(session)
    threads = [threading.Thread(target=lambda: resolve("ann/model", hub=hub)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hooks(huggingface_hub.get_session()) == before


def test_a_request_of_ours_waits_for_silence_only_so_long(hub: Hub, seen: list[Any]) -> None:
    asked: list[dict[str, Any]] = []
    session = huggingface_hub.get_session()
    real = type(session).send

    def send(self: Any, request: Any, **options: Any) -> Any:
        response = real(self, request, **options)
        asked.append(dict(request.extensions["timeout"]))
        return response

    type(session).send = send
    try:
        resolve("ann/model", hub=hub)
    finally:
        type(session).send = real
    assert asked == [dict.fromkeys(("connect", "read", "write", "pool"), SILENCE)]
