"""Starting kernels directly: with what Triton itself would start them with, for the kinds of arguments that it tells apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
from coded import DEVICE
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from mono_quant.kernels.gpu.launch import kinds_of, launch

ROOT = Path(__file__).parents[3]


def _four(a, b, c, d, WIDTH: tl.constexpr):
    pass


@pytest.fixture(scope="module")
def specialization():
    """What Triton itself makes of four arguments on an NVIDIA device."""
    kernel = JITFunction(_four)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return lambda args: str(bind(*args, WIDTH=1)[1])


def _arguments():
    bytes_, halves = torch.zeros(64, dtype=torch.int8), torch.zeros(64, dtype=torch.float16)
    grid = torch.zeros(64, 64, dtype=torch.int8)
    numbers = (
        0,
        1,
        2,
        -1,
        15,
        16,
        17,
        -16,
        2**31 - 1,
        2**31,
        2**31 - 16,
        -(2**31),
        -(2**31) - 1,
        2**40,
        2**40 + 1,
    )
    tensors = (
        bytes_,
        bytes_[1:],
        bytes_[16:],
        halves,
        halves[1:],
        halves[8:],
        halves.bfloat16(),
        halves.float(),
    )
    tiles = (
        TensorDescriptor.from_tensor(grid, [16, 32]),
        TensorDescriptor.from_tensor(grid, [32, 16]),
        TensorDescriptor.from_tensor(grid.view(32, 2, 64), [16, 1, 16]),
        TensorDescriptor.from_tensor(torch.zeros(64, 64, dtype=torch.float16), [16, 32]),
    )
    return [*numbers, *tensors, *tiles, 0.0, 1.0, -0.5, True, False, None, torch.nn.Parameter(halves)]


def test_calls_of_one_kind_are_of_one_kind_for_triton_too(specialization):
    arguments = _arguments()
    ours = [kinds_of([arg])[1] for arg in arguments]
    theirs = [specialization((arg, 2, 2, 2)) for arg in arguments]
    assert None not in ours
    for mine, his in zip(ours, theirs, strict=True):
        for other, foreign in zip(ours, theirs, strict=True):
            assert mine != other or his == foreign
    # and as few
    assert len({str(kinds) for kinds in ours}) == len(set(theirs))


def test_kinds_of_several_arguments_cannot_be_mistaken_for_each_other(specialization):
    few = [
        1,
        2,
        16,
        torch.zeros(4),
        torch.zeros(4)[1:],
        None,
        TensorDescriptor.from_tensor(torch.zeros(16, 16), [8, 8]),
    ]
    rows = [(a, b, c, 2) for a in few for b in few for c in few]
    seen = {}
    for row in rows:
        assert seen.setdefault(str(kinds_of(row)[1]), specialization(row)) == specialization(row)


def test_what_no_rule_is_known_for_is_left_to_triton():
    for strange in (2**63, "text", (1, 2), object(), torch.float32):
        assert kinds_of([3, strange])[1] is None


def test_values_are_addresses_and_the_numbers_themselves():
    x = torch.zeros(8)
    tiles = TensorDescriptor.from_tensor(torch.zeros(16, 16), [8, 8])
    assert kinds_of([x, 7, None, 0.5, tiles, x[3:]])[0] == [
        x.data_ptr(), 7, None, 0.5, tiles, x.data_ptr() + 12
    ]  # fmt: skip


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """What reaches the device, with kernels that are compiled for sm_90 and never run."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "launches.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_direct_start_is_the_start_that_triton_would_make(driven):
    cases = [name for name, start in driven.items() if isinstance(start, dict) and "differ" in start]
    assert len(cases) == 9
    for name in cases:
        assert driven[name]["differ"] == []
        # the constant, which the compiled code holds
        assert driven[name]["left out"] == [[3] if name == "again" else [], [3]]
    # Triton's launcher is asked once for each kind
    assert {name: driven[name]["asked"] for name in cases} == {name: int(name != "again") for name in cases}
    functions = [driven[name]["function"] for name in cases]
    assert driven["again"]["function"] == driven["plain"]["function"] and len(set(functions)) == 8
    assert driven["again"]["grid"] == [5, 2, 1] and driven["overlap"]["grid"] == [3, 1, 4]
    assert [name for name in cases if driven[name]["overlaps"]] == ["overlap"]


def test_a_call_that_is_replayed_starts_what_it_started_before(driven):
    first, *others = driven["replayed"]
    told, is_apart, (add, copy) = first
    assert told == [16, 48, 0, [[4, 16], [16, 1], [4, 16], "zero", False], 0, 64, 0] and is_apart
    assert (add["grid"], copy["grid"]) == ([1, 1, 1], [1, 2, 1]) and add["function"] != copy["function"]
    # by Triton, by `launch` while it is written down, and twice from the script
    assert others == [first] * 3


def test_a_profiler_sees_every_launch(driven):
    assert driven["observed"] == 1


def test_a_launcher_with_other_arguments_is_left_to_triton(driven):
    assert driven["unknown launcher"] == 2


def test_another_device_has_its_own_code_and_stream(driven):
    first, second = driven["elsewhere"]["starts"]
    assert first["stream"] == second["stream"] == 7001
    assert first["function"] == second["function"] != driven["plain"]["function"]
    assert driven["elsewhere"]["current"] == 0


def test_a_kernel_runs_as_it_is():
    @triton.jit
    def double(x_ptr, n, WIDTH: tl.constexpr):
        at = tl.arange(0, WIDTH)
        tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)

    x = torch.arange(5.0, device=DEVICE)
    launch(double, (1,), (x, 3), {"WIDTH": 8}, device=x.device, warps=8, stages=3, overlap=True)
    assert x.tolist() == [0, 2, 4, 3, 4]
