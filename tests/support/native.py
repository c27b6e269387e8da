"""What tests of kernels share."""

import pytest
import torch
from torch import Tensor

from mono_quant import kernels

NATIVE = kernels.environment()["isa_paths"]
PATHS = ["reference", *NATIVE]
native_only = pytest.mark.skipif(not NATIVE, reason="the native library is not built")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, any NaN equal to any other."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )
