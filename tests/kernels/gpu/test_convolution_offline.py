"""The kernels of convolutions, tables and weights compile for GPUs that are not here."""

import re

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")
from offline_triton import Job, compile_all

from mono_quant.kernels.gpu import depthwise, embedding, encoding, fields, patches
from mono_quant.kernels.gpu.features import of_nvidia

CAPABILITIES = (75, 80, 90, 100)
_BYTES = {"code_ptr", "weight_ptr"}
_FLOATS = {"x_ptr", "bias_ptr", "out_ptr"}
_OTHERS = {"largest_ptr": "*i32", "index_ptr": "*i64", "energy_ptr": "*fp64"}


def job(kernel, capability, half, constants, **types):
    """Return a kernel for images with channels last in memory, in half precision."""
    constants = constants | {at: 1 for at in ("STRIDE_C", "OUT_C") if at in kernel.arg_names}
    signature = {at: "i32" for at in kernel.arg_names if at not in constants}
    for at in signature:
        if at.endswith("_ptr"):
            signature[at] = "*i8" if at in _BYTES else half if at in _FLOATS else _OTHERS.get(at, "*fp32")
    aligned = [
        at for at in signature if at.endswith("_ptr") or at in ("INNER", "STRIDE_B", "STRIDE_Y", "STRIDE_X")
    ]
    return Job(
        kernel,
        signature | types,
        constants,
        capability,
        {"num_warps": 4, "num_stages": 2, "aligned": aligned},
    )


def jobs(capability):
    half = "*bf16" if capability % 20 else "*fp16"
    tile = {"M": 16, "N": 16, "BYTES": of_nvidia(divmod(capability, 10), 1 << 16, 1, False).int8_dot}
    yield job(patches._multiply_fields, capability, half, tile | {"K": 32, "QMAX": 2047, "PADDED": True})
    # a second of compiler each: the others where most is different
    if capability in (75, 90):
        yield job(patches._multiply_pixels, capability, half, tile | {"K": 64})
    if capability == 75:
        yield job(depthwise._convolve_channels, capability, half, {"M": 16, "N": 64, "QMAX": 127, "SPAN": 0})
        yield job(fields._field_scales, capability, half, {"BLOCK": 64, "QMAX": 127})
        yield job(fields._pixel_maxima, capability, half, {"BLOCK": 16, "CHANNELS": 64, "DENSE": True})
        yield job(
            fields._pixel_codes, capability, half, {"BLOCK": 16, "GROUP": 64, "QMAX": 127, "DENSE": True}
        )
        yield job(embedding._gather, capability, half, {"VALUES": 512})
        rows = {"VALUES": 256, "DTYPE": encoding._TLDTYPES[torch.bfloat16], "BELOW": 1 - 2.0**-7}
        yield job(encoding._encode_rows, capability, half, rows, weight_ptr=half, code_ptr="*i8")


def test_kernels_compile_for_every_generation_and_round_every_operation():
    planned = [made for capability in CAPABILITIES for made in jobs(capability)]
    for asked, made in zip(planned, compile_all(planned), strict=True):
        name = asked.kernel.fn.__name__
        assert made.cubin > 0, name
        # no fused multiply-add: but one without tensor cores adds up products of float16 that fp32 holds exactly
        if asked.constants.get("BYTES", True):
            assert "fma.rn.f32" not in made.ptx, (name, asked.capability)
            assert ("mma" in made.ptx) == ("BYTES" in asked.constants), (name, asked.capability)
        # divisions and sums keep subnormal numbers
        assert not re.search(r"(div|mul|add|sub)\S*\.ftz", made.ptx), name
        assert "div.full" not in made.ptx and "div.approx" not in made.ptx, name
