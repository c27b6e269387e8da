"""Fixtures that the tests below share."""

from pathlib import Path

import pytest
from hub_fixtures import hub, naps, no_token_anywhere, server
from pushes import FINISHED

__all__ = ["hub", "naps", "no_token_anywhere", "server"]


@pytest.fixture(autouse=True)
def watched(naps: list[float], no_token_anywhere: None) -> None:
    """Let nobody sleep, and no token show."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "finished"
    path.mkdir()
    for name, content in FINISHED.items():
        (path / name).write_bytes(content)
    return path
