"""How long a failing or silent Hub may make this process wait; the client library sets no limit of its own.

The library uploads and downloads in threads of its own through one session of the whole process, so the limits are hooks on
that session. They are there only while a call of ours runs: afterwards the session is as its owner made it. (The library's
`set_client_factory` would close that session under other threads, and replace a factory that the user has set.)
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_session

from mono_quant.errors import HubTransientError

SILENCE = 120.0  # seconds without a byte; the client library sets no limit of its own


class Patience:
    """Bounds how long a failing Hub makes this process wait; the client library obeys any `Retry-After`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.left = seconds
        self.asked = 0.0  # the latest wait
        self.lock = threading.Lock()

    def spend(self, seconds: float) -> None:
        with self.lock:
            self.asked = seconds
            self.left -= seconds
            if self.left < 0:
                raise HubTransientError(
                    f"the Hub keeps failing and asks to wait {seconds:.0f} s more; the limit is {self.seconds:.0f} s "
                    "in all. Try again later."
                )


_running: list[Patience] = []
_hooked: list[
    Any
] = []  # sessions that carry our hooks; more than one after the library replaced a broken one
_lock = threading.Lock()


@contextmanager
def patience(seconds: float) -> Iterator[Patience]:
    """Bound the waits of everything that happens inside by `seconds` in all."""
    patient = Patience(seconds)
    with _lock:
        _running.append(patient)
    try:
        yield patient
    finally:
        with _lock:
            _running.remove(patient)
            while _hooked and not _running:
                _set_hooks(_hooked.pop(), on=False)


def watch_session() -> None:
    """Put the hooks on the session of this moment, until the last `patience` ends; call it before each attempt."""
    with _lock:
        session = get_session()
        if session not in _hooked:
            _set_hooks(session, on=True)
            _hooked.append(session)


def _set_hooks(session: Any, *, on: bool) -> None:
    # new lists: another thread may be walking through the old ones
    ours: dict[str, list[Any]] = {"request": [_before_request], "response": [_after_response]}
    session.event_hooks = {
        kind: [hook for hook in hooks if hook not in ours[kind]] + (ours[kind] if on else [])
        for kind, hooks in session.event_hooks.items()
    }


def _before_request(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {n: SILENCE if limits.get(n) is None else limits[n] for n in names}


def _after_response(response: Any) -> None:
    if response.status_code < 400:
        return
    is_repeated = response.status_code in (408, 429) or response.status_code >= 500
    # 8 s is the client's longest own pause; some refusals it repeats without a pause and without end.
    wait = max(8.0, asked_wait(response)) if is_repeated else 1.0
    for patient in tuple(_running):
        patient.spend(wait)


def asked_wait(response: Any) -> float:
    asked = response.headers.get("Retry-After", "").strip()
    waits = [asked] if asked.isdecimal() else []
    if response.status_code == 429:
        waits += re.findall(r";\s*t\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
    return max((float(wait[:12]) for wait in waits), default=0.0)
