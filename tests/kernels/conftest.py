"""Fixtures that the tests below share."""

from collections.abc import Iterator

import pytest
import torch
from native import NATIVE, PATHS

from mono_quant import kernels


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Undo what the environment chose, such as MONO_QUANT_ISA=reference for the whole run; draw the same numbers."""
    torch.manual_seed(0)
    with kernels.using(NATIVE[-1] if NATIVE else "reference", "auto"):
        yield


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.using(request.param, "int8"):
        yield request.param
