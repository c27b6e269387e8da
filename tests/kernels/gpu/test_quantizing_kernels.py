"""Quantizing kernels as a GPU gets them, and what they write."""

import re

import pytest
import torch

pytest.importorskip("triton")

from coded import DEVICE, assert_codes_of
from offline_triton import Job, compile_all

from mono_quant.kernels.activations import SCHEMES
from mono_quant.kernels.gpu import prologues, quantize
from mono_quant.kernels.gpu.codes import Codes

INT12 = {"QMAX": 2047}
POINTERS = ("x_ptr", "up_ptr", "residual_ptr", "total_ptr", "weight_ptr", "bias_ptr", "kept_ptr")
SIZES = ("rows", "depth", "x_step", "up_step", "residual_step", "plane_step")


def job(kernel, dtype, constants, capability, early=False):
    constants = constants | {"EARLY": early}
    types = {"planes_ptr": "*i8", "scale_ptr": "*fp32", "epsilon": "fp32"}
    types |= dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys(SIZES, "i32")
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    aligned = [name for name in signature if name not in ("rows", "epsilon")]
    return Job(kernel, signature, constants, capability, {"num_warps": 4, "aligned": aligned})


def test_every_kernel_compiles_in_arithmetic_that_rounds_each_operation():
    rows = {"SPANS": 1, "GROUP": 0, "TALL": 4, "WIDE": 512}
    groups = {"SPANS": 4, "GROUP": 128, "TALL": 8, "WIDE": 128}
    kinds = [
        (quantize.quantize_spans, "bf16", groups | {"QMAX": 127, "ACT": "silu"}),
        (quantize.quantize_long, "fp32", INT12 | {"BLOCK": 2048, "up_ptr": None, "ACT": "gelu_tanh"}),
        (prologues.norm_spans, "bf16", rows | INT12 | {"RMS": True, "ROUNDED": True}),
    ]
    bare = groups | {"QMAX": 127, "residual_ptr": None, "total_ptr": None, "kept_ptr": None}
    layer = job(prologues.norm_spans, "fp16", bare | {"RMS": False, "ROUNDED": False}, 90)
    # the error function is a library's, whose own arithmetic is fused
    erf = job(quantize.quantize_spans, "fp16", groups | {"QMAX": 127, "ACT": "gelu", "up_ptr": None}, 90)
    jobs = [job(*kind, capability, capability >= 90) for kind in kinds for capability in (75, 90, 100)]
    made = compile_all([*jobs, layer, erf])
    for compiled in made[:-1]:
        assert not re.search(r"\b(fma\.|mad\.f|(add|sub|mul)\.f32|rsqrt)|\.ftz", compiled.ptx)
    assert not re.search(r"\b(fma\.rn\.f32|(add|sub|mul)\.f32|rsqrt)", made[-1].ptx)
    for compiled, has in zip(made, (False, True, True) * 3, strict=False):
        assert ("griddepcontrol.launch_dependents" in compiled.ptx) is has
    for compiled in made:
        assert len(re.findall(r"\bdiv\.rn\.f32", compiled.ptx)) >= 2
        # 16 bytes at once
        assert re.search(r"\bld\.global\S*\.v4\.b32", compiled.ptx)
        assert re.search(r"\bsqrt\.rn\.f32", compiled.ptx) or compiled not in made[6:10]


@pytest.mark.parametrize("name", ["int8", "int8-g64", "int12"])
def test_nothing_is_written_beyond_codes_and_scales(monkeypatch, name):
    guards = []

    def roomy(x, scheme, cut):
        codes = room_for(x, scheme, cut)
        room = []
        for part in (codes.planes, codes.scale):
            whole = torch.full((part.numel() + 8192,), 77, dtype=part.dtype, device=DEVICE)
            guards.extend((whole[:4096], whole[-4096:]))
            room.append(whole[4096:-4096].view(part.shape))
        return Codes(*room, codes.group)

    room_for = quantize.empty_codes
    monkeypatch.setattr(quantize, "empty_codes", roomy)
    monkeypatch.setattr(prologues, "empty_codes", roomy)
    scheme, x = SCHEMES[name], torch.randn(3, 300, device=DEVICE)
    assert_codes_of(quantize.quantize(x, scheme), x, scheme)
    found = prologues.norm_quantize(x, ("rms", None, None, 1e-5), scheme, keep=True)
    assert_codes_of(found.codes, found.values, scheme)
    long = x.view(1, 900).repeat(1, 20)
    assert_codes_of(quantize.quantize(long, scheme), long, scheme)
    assert len(guards) == 12
    assert all((guard == 77).all() for guard in guards)
