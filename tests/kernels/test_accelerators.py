"""Accelerators: see the room of this name. What needs a device is told by tensors on meta, fake ones and a torch that has one."""

import subprocess
import sys
import types

import pytest
import torch
from native import same
from torch._subclasses.fake_tensor import FakeTensorMode

from mono_quant import kernels
from mono_quant.kernels import accelerators, choice, paths, reference
from mono_quant.kernels.activations import SCHEMES

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    """Forget what was found, before and after."""
    monkeypatch.setattr(accelerators, "_found", {})
    monkeypatch.setattr(accelerators, "_int_mm", {})


@pytest.fixture
def one_device(monkeypatch):
    """A torch that has one CUDA device, as far as it is asked."""
    module = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda device: types.SimpleNamespace(name="card"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)


def found_as(monkeypatch, answer):
    asked = []
    room = types.SimpleNamespace(kernels_for=lambda device: asked.append(device) or answer)
    monkeypatch.setattr(accelerators, "import_module", lambda name: room)
    return asked


def test_a_device_is_asked_once(one_device, monkeypatch):
    gpu = types.SimpleNamespace(failure=None, note="unverified: so far")
    asked = found_as(monkeypatch, (gpu, None))
    assert accelerators.found_on(CUDA).kernels is gpu
    assert accelerators.found_on(CUDA) is accelerators.found_on(torch.device("cuda:0"))
    assert asked == [CUDA]
    assert kernels.describe("cuda") == kernels.describe("cuda:0") == "Triton kernels (exact)"
    assert kernels.environment()["accelerators"] == [
        {"device": "cuda:0", "name": "card", "path": "triton", "reason": None, "note": "unverified: so far"}
    ]
    with kernels.using(gpu="reference"):
        (line,) = kernels.environment()["accelerators"]
        assert (line["path"], line["reason"]) == ("reference", "reference was asked for")
        assert kernels.describe(CUDA) == "reference (plain torch, exact)"
    # Triton has failed meanwhile
    gpu.failure = "PTXASError: no"
    monkeypatch.setattr(accelerators, "int_mm_is_exact", lambda device: device == CUDA)
    (line,) = kernels.environment()["accelerators"]
    assert (line["path"], line["reason"]) == ("int_mm", "PTXASError: no")
    assert kernels.describe(CUDA) == "torch._int_mm (exact)"


def test_the_reason_of_a_refusal_is_kept(one_device, monkeypatch):
    asked = found_as(monkeypatch, (None, "compute capability 7.0 is below 7.5"))
    monkeypatch.setattr(accelerators, "int_mm_is_exact", lambda device: False)
    for _ in range(2):
        (line,) = kernels.environment()["accelerators"]
        assert line == {
            "device": "cuda:0",
            "name": "card",
            "path": "reference",
            "reason": "compute capability 7.0 is below 7.5",
            "note": "unverified: nobody has run it on such a device",
        }
    assert asked == [CUDA]


def test_without_triton_there_is_a_reason(one_device, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(accelerators, "import_module", missing)
    assert accelerators.found_on(CUDA).reason == "Triton cannot be imported: No module named 'triton'"
    with (
        pytest.raises(
            ValueError, match="kernel path 'triton' is not available: Triton cannot be imported: No"
        ),
        kernels.using("triton"),
    ):
        raise AssertionError
    assert choice.active.cpu is not None or not choice.loaded.paths


def test_a_process_without_triton_still_computes(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('not for this machine')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\nfrom mono_quant import kernels\n"
        "w, s = torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1)\n"
        "print(kernels.int8_linear(torch.ones(2, 4), w, s, None).shape)\n"
        "try:\n    kernels.using('triton').__enter__()\nexcept ValueError as e:\n    print(e)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [
        "torch.Size([2, 3])",
        "kernel path 'triton' is not available: Triton cannot be imported: not for this machine",
    ]


@pytest.mark.parametrize("kind", ["meta", "mps", "hpu"])
def test_other_kinds_of_devices_have_no_kernels(kind):
    found = accelerators.found_on(torch.device(kind))
    assert found == accelerators.Found(None, f"Triton has no backend for {kind}")


def test_apples_devices_compute_with_the_weights_alone(one_device, monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps")
    )
    (line,) = kernels.environment()["accelerators"]
    assert (line["device"], line["path"], line["note"][:10]) == ("mps:0", "weight_only", "unverified")
    assert kernels.describe("mps").startswith("int8 weights, arithmetic of the input (unverified")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_has_none_and_fake_tensors_may_ask():
    assert accelerators.found_on(CUDA) == accelerators.Found(None, "there is no such device here")
    assert not accelerators.has_int_mm(CUDA)
    with FakeTensorMode():
        assert accelerators.path_of(torch.empty(2, 3, device="meta")) is None
    assert accelerators.path_of(torch.empty(2)) is None


def test_the_switches_are_read_from_the_environment_and_checked(monkeypatch):
    for road in accelerators.ROADS:
        monkeypatch.setenv("MONO_QUANT_GPU", road)
        assert accelerators.road_from_environment() == road
    monkeypatch.setenv("MONO_QUANT_GPU", "")
    assert accelerators.road_from_environment() == "triton"
    monkeypatch.setenv("MONO_QUANT_GPU", "fast")
    with pytest.raises(ValueError, match="MONO_QUANT_GPU is 'fast'; choose from triton, int_mm, reference"):
        accelerators.road_from_environment()
    with pytest.raises(ValueError, match="no road 'fast'; choose from"), kernels.using(gpu="fast"):
        raise AssertionError
    with kernels.using(gpu="int_mm"):
        assert accelerators.wanted.road == "int_mm"
        assert accelerators.path_of(torch.empty(2, device="meta")) is None
    assert accelerators.wanted.road == "triton"


def test_a_device_is_tried_on_real_tensors_while_a_compiler_looks_on(one_device, monkeypatch):
    seen = []

    def kernels_for(device):
        seen.append(type(torch.zeros(2) + 1))
        return None, "no"

    monkeypatch.setattr(
        accelerators, "import_module", lambda name: types.SimpleNamespace(kernels_for=kernels_for)
    )
    with FakeTensorMode():
        assert type(torch.zeros(2)) is not torch.Tensor
        accelerators.found_on(CUDA)
    assert seen == [torch.Tensor]


def test_the_environment_tells_the_version_of_triton():
    triton = pytest.importorskip("triton")
    assert kernels.environment()["triton"] == triton.__version__.partition("+")[0]


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("qmax", [127, 2047])
def test_few_tokens_are_filled_up_for_torchs_product(rows, qmax):
    if not accelerators.int_mm_is_exact("cpu"):
        pytest.skip("torch's int8 product is not exact here")
    x, weight = torch.randn(rows, 64), torch.randint(-128, 128, (24, 64), dtype=torch.int8)
    shapes = []

    def multiply(codes, part):
        shapes.append(codes.shape)
        return paths.by_int_mm(codes, part, 32)

    scheme = SCHEMES["int8" if qmax == 127 else "int12"]
    scale, bias = torch.rand(24, 1), torch.randn(24)
    expected = reference.linear(x, weight, scale, bias, scheme)
    assert same(reference.linear(x, weight, scale, bias, scheme, multiply), expected)
    assert shapes == [(rows, 64)] * (1 if qmax == 127 else 2)


@pytest.mark.parametrize(
    ("codes", "weight", "fits"),
    [
        ((17, 64), (24, 64), True),
        ((1, 8), (8, 8), True),
        ((0, 8), (8, 8), False),
        ((20, 12), (8, 12), False),
        ((20, 16), (12, 16), False),
        ((20, 0), (8, 0), False),
        ((20, 8), (0, 8), False),
    ],
)
def test_sizes_that_torchs_product_takes_on_a_device(codes, weight, fits):
    codes, weight = (torch.empty(shape, dtype=torch.int8, device="meta") for shape in (codes, weight))
    assert paths.fits_int_mm(codes, weight) == fits
    assert not paths._has_int_mm(codes, weight)


def test_a_product_that_is_not_exact_is_not_used(monkeypatch):
    right = torch._int_mm
    if accelerators.int_mm_is_exact("cpu"):
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b) + 1)
        assert not accelerators.int_mm_is_exact("cpu")

    def fails(a, b):
        raise NotImplementedError("not for this device")

    monkeypatch.setattr(torch, "_int_mm", fails)
    assert not accelerators.int_mm_is_exact("cpu")
