"""Running a kernel: always in arithmetic that rounds every operation, compiled for a device or interpreted on a CPU."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

# Triton reads it when a kernel is defined, too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launch(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    constants: Mapping[str, Any],
    *,
    device: torch.device,
    warps: int = 4,
    stages: int = 1,
) -> None:
    """Run a Triton kernel on the current stream of `device`.

    Args:
        kernel: a function under `triton.jit`.
        grid: one to three numbers of programs, none of them 0.
        args: tensors, numbers, descriptors or None, for the parameters of the kernel in their order.
        constants: its `tl.constexpr` parameters.
        device: where the tensors lie.
        warps: of a program.
        stages: of the loads in its loop.
    """
    if INTERPRETED:
        # it computes with NumPy, which warns where a GPU gives NaN or infinity
        with numpy.errstate(all="ignore"):
            kernel[tuple(grid)](*args, **constants)
        return
    with torch.cuda.device(device):
        kernel[tuple(grid)](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
