"""Fixtures that the tests below share."""

import sys

import pytest
from checkpoints import watch
from folders import save, snapshot


@pytest.fixture
def opened(monkeypatch):
    """Every path that this process opens during the test."""
    if not watch.__dict__.get("installed"):
        sys.addaudithook(watch)
        watch.installed = True
    seen: list[str] = []
    monkeypatch.setitem(globals(), "OPENED", seen)
    return seen


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The bytes of the old and the new result."""
    base = tmp_path_factory.mktemp("expected")
    save(base / "old", 1)
    save(base / "new", 2)
    return {"absent": None, "old": snapshot(base / "old"), "new": snapshot(base / "new")}
