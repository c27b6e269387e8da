"""What tests of sources share."""

import time

import pytest

import mono_quant as mq
from mono_quant.errors import (
    MonoQuantError,
)

QUIET = {"fidelity": False}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VERBS = pytest.mark.parametrize("verb", [mq.quantize, mq.plan])


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def fails(source, error, match=None, **options):
    """Convert and save; the error is the expected one, quick, printable, and leaves no trace."""
    parent = source.parent if hasattr(source, "parent") else None
    before = listing(parent) if parent else None
    start = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        mq.quantize(source, **QUIET, **options).save(parent / "out")
    assert time.monotonic() - start < 10
    assert isinstance(caught.value, MonoQuantError) and str(caught.value).isprintable()
    if parent:
        assert listing(parent) == before
    return str(caught.value)
