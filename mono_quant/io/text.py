"""Text that strangers wrote: quoted on one line, cut, and without anything that looks like an access token."""

import re
from collections.abc import Sequence

SHOWN = 10


def printable(text: object, limit: int = 200) -> str:
    """Quote foreign text on one line, with control and bidi characters escaped."""
    shown = str(text)
    if len(shown) > limit:
        shown = f"{shown[:limit]}… ({len(shown)} characters)"
    return "'" + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown) + "'"


def one_line(text: object, limit: int = 200) -> str:
    """Return text without line breaks, control and direction characters, cut at `limit`."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def listed(names: Sequence[str]) -> str:
    """Quote the first names of many."""
    shown = ", ".join(printable(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


TOKEN_LIKE = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{16,}")
SECRET = re.compile(r"(?i:bearer|basic)\s+[^\s'\",;]+|(?:hf|api_org)_[A-Za-z0-9_]{8,}")


def looks_like_token(text: str) -> bool:
    """Tell whether a text contains what looks like an access token, so that it must not be repeated."""
    return TOKEN_LIKE.search(text) is not None


def scrub(text: str, *secrets: str | None) -> str:
    """Return a text as one line of at most 300 printable characters, without anything that looks like a token."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return one_line(SECRET.sub("***", text), 300)
