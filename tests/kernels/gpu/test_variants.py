"""What compiling products for GPUs gives, without one; `scripts/check_gpu --offline` compiles all of them."""

import re

import pytest

pytest.importorskip("triton")

from mono_quant.kernels.gpu.features import of_nvidia, of_others
from mono_quant.kernels.gpu.few import multiply_few, multiply_vectors
from mono_quant.kernels.gpu.large import multiply_tiles
from mono_quant.kernels.gpu.tables import ALIGNMENT, DESCRIPTORS, TABLE
from tests.support.offline_triton import Job, compile_all
from tests.support.product_variants import everything_that_is_compiled, job_of

AMPERE = of_nvidia((8, 0), 163 << 10, 100, False)
HOPPER = of_nvidia((9, 0), 227 << 10, 100, True)
TURING = of_nvidia((7, 5), 64 << 10, 100, False)


def variant(features, kernel, **constants):
    """The first launch that has these constants."""
    return next(
        call
        for call in everything_that_is_compiled(features)
        if call.kernel is kernel and constants.items() <= call.constants.items()
    )


def test_compiled_products_multiply_integers_and_round_every_operation():
    wanted = {
        (90, "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"): variant(
            HOPPER, multiply_tiles, DESCRIPTORS=True, GROUPED=True, DEPTH=64
        ),
        (80, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"): variant(
            AMPERE, multiply_few, SPLIT=4, PLANES=2
        ),
        (75, "dp4a.s32.s32"): variant(TURING, multiply_vectors, M=1),
    }
    jobs = [Job(*job_of(call)[:3], capability, job_of(call)[3]) for (capability, _), call in wanted.items()]
    for (capability, instruction), features, made in zip(
        wanted, (HOPPER, AMPERE, TURING), compile_all(jobs), strict=True
    ):
        assert instruction in made.ptx
        assert re.search(r"mul(\.rn)?\.f32", made.ptx)
        # neither fused nor flushed to zero
        assert not re.search(r"\bfma\.|\.ftz", made.ptx)
        assert made.shared <= features.shared
        assert ("griddepcontrol.wait" in made.ptx) == (capability == 90)


@pytest.mark.parametrize("features", [TURING, AMPERE, HOPPER, of_others("amd", 64 << 10, 100)])
def test_every_row_and_every_form_is_among_them(features):
    calls = everything_that_is_compiled(features)
    jobs = [job_of(call) for call in calls]
    assert len({str(job) for job in jobs}) == len(jobs)
    kernels = {call.kernel for call in calls}
    assert (multiply_vectors in kernels) == features.dp4a
    assert {multiply_few, multiply_tiles} <= kernels or not features.int8_dot
    for kernel in kernels:
        types = [types for used, types, _, _ in jobs if used is kernel]
        assert {kind["out_ptr"] for kind in types} == {"*fp32", "*fp16", "*bf16"}
        assert any("bias_ptr" not in kind for kind in types)
        if kernel is not multiply_vectors:
            forms = {
                (constants["WHOLE"], "K" in options["aligned"])
                for used, _, constants, options in jobs
                if used is kernel
            }
            assert forms == {(True, True), (False, True), (False, False)}
    described = [call for call in calls if call.constants.get("DESCRIPTORS")]
    rows = {row.config.kernel for row in TABLE}
    assert bool(described) == (features.tma and DESCRIPTORS in rows)
    assert all(call.args[0].shape[1] % ALIGNMENT == 0 for call in described)
