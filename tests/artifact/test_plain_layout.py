"""A folder in the plain layout holds no int8 codes: only a code with its scale is one."""

from pathlib import Path

import pytest
import torch

from mono_quant.artifact.loading import _refuse_codes
from mono_quant.errors import CorruptCheckpointError

CODES, FLOATS = torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 2)


@pytest.mark.parametrize("tensors", [{"a": CODES}, {"a": FLOATS, "a_scale": FLOATS}, {"a_scale": CODES}])
def test_integers_alone_and_floats_called_scale_are_tensors_of_the_model(tensors):
    _refuse_codes(Path("saved"), tensors)


def test_codes_are_refused_by_name():
    with pytest.raises(
        CorruptCheckpointError, match=r"saved: b holds int8 codes, but mono_quant\.json says .*'plain'"
    ):
        _refuse_codes(Path("saved"), {"a": FLOATS, "b": CODES, "b_scale": FLOATS})
