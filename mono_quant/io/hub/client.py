"""The way to the Hugging Face Hub: who asks, and what a failure means.

Whatever the client library raises leaves here as one typed error with no secret in its text, its cause or its
traceback.
"""

import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    DeviceCodeError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from mono_quant.errors import (
    ConfigError,
    HubAuthError,
    HubConflictError,
    HubError,
    HubGatedError,
    HubNotFoundError,
    HubOfflineError,
    HubTransientError,
    MonoQuantError,
    OutputWriteError,
)
from mono_quant.io.hub.patience import asked_wait, patience, watch_session
from mono_quant.io.text import looks_like_token, scrub
from mono_quant.version import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")
TRIES = 4  # for a call that may be repeated and that the client library does not repeat
NETWORK_ERROR = HfHubHTTPError.__bases__[0]  # HTTPError of the HTTP library that the client uses


class _Secret(str):
    """A token that does not show in a repr, such as a traceback that prints local variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True)
class Hub:
    """Where the Hub is and who asks.

    Args:
        token: access token; None or True takes the saved login, False sends none.
        endpoint: address of the Hub; None takes `HF_ENDPOINT` or huggingface.co.
        cache_dir: where downloads are kept; None takes `HF_HUB_CACHE`.
        offline: read from the cache only; `HF_HUB_OFFLINE=1` does the same.
        patience: seconds that a failing Hub may make one call wait in all. Transfers do not count.

    Raises:
        HubAuthError: the token holds characters that no token has.
    """

    token: str | bool | None = field(default=None, repr=False)
    endpoint: str | None = None
    cache_dir: Path | None = None
    offline: bool = False
    patience: float = 600.0

    def __post_init__(self) -> None:
        if isinstance(self.token, str):
            object.__setattr__(self, "token", _checked_token(self.token))

    @property
    def is_offline(self) -> bool:
        """Whether the network must not be used."""
        return self.offline or constants.is_offline_mode()

    @property
    def url(self) -> str:
        """Address of the Hub, without a final slash."""
        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    def sent_token(self) -> str | None:
        """Return the token that requests carry, or None."""
        if isinstance(self.token, str):
            return self.token
        if self.token is False or (self.token is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
            return None
        found = get_token()
        return None if found is None else _checked_token(found)


HUB = Hub()


def is_repo_id(text: str) -> bool:
    """Tell whether a text can be the id of a Hub repository: `name` or `owner/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return not looks_like_token(text)


def check_repo_id(text: str) -> str:
    """Return a repository id, or explain why it is none.

    Raises:
        ConfigError: not an id; a text like an access token is not repeated in the message.
    """
    if looks_like_token(text):
        raise ConfigError(
            "The repository id contains what looks like an access token. Pass it as `token` instead."
        )
    if not is_repo_id(text):
        raise ConfigError(
            f"{text[:200]!r} is not a repository id. Use 'owner/name' with letters, digits, '-', '_' and '.' only, "
            "at most 96 characters each, without '--' or '..'."
        )
    return text


def ask(hub: Hub, subject: str, call: Callable[[HfApi], T], *, tries: int = 1, transfers: bool = False) -> T:
    """Make one call to the Hub; the only way out for what the client library raises.

    Args:
        hub: where to ask, and with which token.
        subject: start of the error message, such as "Cannot read 'owner/name' on the Hub".
        call: what to do with the client.
        tries: how often to try when the Hub fails for now; more than 1 only for calls that can be repeated.
        transfers: it moves large files, and commits nothing: Ctrl-C ends the wait for it, not only the files that were not begun.

    Returns:
        What `call` returned.

    Raises:
        MonoQuantError: the one typed error that the failure stands for.
    """
    done: list[T] = []
    with patience(hub.patience):
        failure = _attempt(hub, subject, call, done, transfers)
        for attempt in range(1, tries):
            if failure is None or failure.is_final:
                break
            wait = max(2.0 ** (attempt - 1), failure.wait)
            logger.info("%s Trying again in %.0f s.", failure.error, wait)
            time.sleep(wait)
            failure = _attempt(hub, subject, call, done, transfers)
    if failure is not None:
        # Outside of any handler, so that the client's error does not stay on as the context.
        raise failure.error
    return done[0]


def quiet_bars() -> Any:
    """Return a context without progress bars when nobody watches; an explicit environment setting wins."""
    watched = sys.stderr is not None and sys.stderr.isatty()
    is_set = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    return nullcontext() if watched or is_set else disable_progress_bars()


def apart(call: Callable[[], T]) -> T:
    """Make a call in a thread of its own, so that Ctrl-C ends the wait for it: whoever uses threads waits for them.

    Args:
        call: what to do; when it is given up it goes on until the process ends.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # a signal in the moment before an endless wait would be seen after it
    return outcome.result()


@dataclass(frozen=True)
class _Failure:
    error: MonoQuantError
    wait: float = 0.0
    is_final: bool = True


def _attempt(
    hub: Hub, subject: str, call: Callable[[HfApi], T], done: list[T], transfers: bool
) -> _Failure | None:
    token = None
    try:
        token = hub.sent_token()
        watch_session()
        api = HfApi(
            endpoint=hub.url, token=token or False, library_name="mono_quant", library_version=__version__
        )
        done.append(apart(partial(call, api)) if transfers else call(api))
    except Exception as error:  # noqa: BLE001 - whatever it is, it may carry the request with the token
        return _failure(_root(error), subject, token)
    return None


def _root(error: BaseException) -> BaseException:
    """Return what a wrapper of the client library wraps."""
    wrappers = (RuntimeError, ValueError, LocalEntryNotFoundError, RevisionResolutionError)
    while (
        isinstance(error, wrappers)
        and not isinstance(error, HfHubHTTPError)
        and isinstance(error.__cause__, Exception)
    ):
        error = error.__cause__
    return error


def _failure(error: BaseException, subject: str, token: str | None) -> _Failure:
    if isinstance(error, HubTransientError):
        return _Failure(HubTransientError(f"{subject}: ", *error.args))
    if isinstance(error, MonoQuantError):
        return _Failure(type(error)(*error.args))
    kind, remedy = _kind(error)
    wait = 0.0
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, HfHubHTTPError):
        said = f"HTTP {error.response.status_code} {error.server_message or error.response.reason_phrase}"
        wait = asked_wait(error.response)
    elif kind is HubOfflineError:
        said = "not in the cache"
    message = f"{subject}: {scrub(said, token).rstrip('. ')}. {remedy}"
    return _Failure(kind(message), wait, is_final=kind is not HubTransientError)


CHECK_ID = (
    "Check the id and the revision; a private repository needs a token that can see it (`hf auth login`)."
)
CHECK_TOKEN = "Log in with `hf auth login`, or pass a token with the needed rights."
ASK_ACCESS = "Ask for access on the repository's page, then pass a token of that account (`hf auth login`)."
CHANGED = "Somebody changed the repository meanwhile. Look at it, then try again."
TRY_AGAIN = "Try again later."
CHECK_CACHE = "The network is off; run once online (HF_HUB_OFFLINE=0)."
BY_CLASS: tuple[tuple[Any, type[MonoQuantError], str], ...] = (
    (GatedRepoError, HubGatedError, ASK_ACCESS),
    ((LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError), HubOfflineError, CHECK_CACHE),
    ((RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError), HubNotFoundError, CHECK_ID),
    ((LocalTokenNotFoundError, OIDCError, DeviceCodeError), HubAuthError, CHECK_TOKEN),
    (HFValidationError, ConfigError, "Use an id like 'owner/name'."),
)
BY_STATUS: dict[int, tuple[type[MonoQuantError], str]] = {
    401: (HubAuthError, CHECK_TOKEN),
    403: (HubAuthError, CHECK_TOKEN),
    404: (HubNotFoundError, CHECK_ID),
    408: (HubTransientError, TRY_AGAIN),
    409: (HubConflictError, CHANGED),
    412: (HubConflictError, CHANGED),
    429: (HubTransientError, TRY_AGAIN),
}


def _kind(error: BaseException) -> tuple[type[MonoQuantError], str]:
    """Return the error class and the remedy for what the client library raised."""
    for classes, kind, remedy in BY_CLASS:
        if isinstance(error, classes):
            return kind, remedy
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 403 and re.search(r"storage|quota", str(error.server_message), re.IGNORECASE):
            return HubError, "Free some space on the Hub or choose another owner."
        if status >= 500:
            return HubTransientError, TRY_AGAIN
        return BY_STATUS.get(status, (HubError, "Check the request and the repository's settings."))
    is_network = isinstance(error, (NETWORK_ERROR, ConnectionError, TimeoutError))
    if isinstance(error, OSError) and error.errno is not None and not is_network:
        return OutputWriteError, "Check the free space and the permissions of the folder."
    return HubTransientError, "Check the network and try again."


def _checked_token(text: str) -> _Secret:
    token = text.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise HubAuthError(
            f"The access token ({len(token)} characters) is empty or holds spaces, line breaks or other characters "
            "that no token has. Copy it again."
        )
    return _Secret(token)
