"""Every kernel that the table of products can ask for, without data: what an offline check compiles for a device."""

from typing import Any

import torch
from gpu.variants import largest_product
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mono_quant.kernels.gpu.features import Features
from mono_quant.kernels.gpu.products import Call
from mono_quant.kernels.gpu.tables import TABLE, Row

# Tokens, outputs and K where a row leaves them open.
_MOST = (2048, 12288, 16384)
# The number of tokens differs from call to call: kernels do not look at it while they are compiled.
_VARYING = "M"
_NAMES = {
    torch.int8: "i8", torch.int32: "i32", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"
}  # fmt: skip


def everything_that_is_compiled(features: Features) -> list[Call]:
    """Return launches on tensors of meta: each row of the table once, and each kernel in each of its forms.

    Forms are the dtypes of outputs, no bias, rows of weights that end inside a step, and rows of odd length.
    """
    calls: dict[str, Call] = {}
    formed: set[tuple[Any, bool]] = set()
    for row in TABLE:
        for group in (128, 64) if row.grouped else (0,):
            for call in _calls(row, group, features, torch.bfloat16, 0, True):
                calls.setdefault(str(job_of(call)), call)
                if (call.kernel, row.grouped) in formed:
                    continue
                formed.add((call.kernel, row.grouped))
                for dtype, missing, has_bias in (
                    (torch.float16, 0, False), (torch.float32, 0, True), (torch.bfloat16, 16, True), (torch.float32, 1, True)
                ):  # fmt: skip
                    for other in _calls(row, group, features, dtype, missing, has_bias):
                        calls.setdefault(str(job_of(other)), other)
    return list(calls.values())


def _calls(
    row: Row, group: int, features: Features, dtype: torch.dtype, missing: int, has_bias: bool
) -> list[Call]:
    """Return the launch for the largest product that a row covers, if the device has one."""
    call = largest_product(row, _MOST, features, dtype, group=group, missing=missing, has_bias=has_bias)
    return [] if call is None else [call]


def job_of(call: Call) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return what Triton's compiler asks of a launch.

    Returns:
        The kernel; the types of its parameters that are no constants; those that are, with their values; and options: `num_warps`,
        `num_stages`, and in `aligned` the names of parameters that 16 divides.
    """
    types: dict[str, str] = {}
    constants = dict(call.constants)
    aligned = []
    for name, value in zip(call.kernel.arg_names, call.args, strict=False):
        if value is None or (type(value) is int and value == 1 and name != _VARYING):
            constants[name] = value
        elif isinstance(value, TensorDescriptor):
            types[name] = f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            types[name] = f"*{_NAMES[value.dtype]}"
            aligned.append(name)
        else:
            types[name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0 and name != _VARYING:
                aligned.append(name)
    options = {"num_warps": call.warps, "num_stages": call.stages, "aligned": tuple(aligned)}
    return call.kernel, types, constants, options
