"""Fixtures that the tests below share."""

import shutil

import pytest
from models import tiny_llama


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A good folder, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "in" / "llama")
