"""Fixtures that the tests below share."""

import shutil
import tempfile
from pathlib import Path

import pytest
from saved import saved_once


@pytest.fixture(scope="module")
def base():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        saved_once.cache_clear()


@pytest.fixture
def folder(base, name, tmp_path):
    """A saved model to spoil."""
    return shutil.copytree(saved_once(base, name), tmp_path / "saved")
