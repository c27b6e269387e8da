"""Products for devices without integer products, on tensors of the CPU; and what the reference asks of such a device."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant.kernels import paths, reference, weight_only, weights
from mono_quant.kernels.activations import SCHEMES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layer(rows=21, depth=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (rows, depth), generator=generator, dtype=torch.int8)
    return (
        weight,
        torch.rand(rows, 1, generator=generator) * 0.02 + 0.001,
        torch.randn(rows, generator=generator),
    )


def bound(x, weight, weight_scale, bias, dtype):
    """Return the exact product in float64, and how far one may be from it that rounds weights, bias and result to a dtype."""
    exact = x.double() @ (weight.double() * weight_scale.double()).T + bias.double()
    mass = x.double().abs() @ (weight.double() * weight_scale.double()).abs().T + bias.double().abs()
    # once for the weights and the bias, once for the sum; fp32 sums of K terms beside it
    slack = torch.finfo(dtype).eps + x.shape[-1] * torch.finfo(torch.float32).eps
    return exact, mass * slack


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_as_close_as_its_dtype_allows(dtype, monkeypatch):
    weight, weight_scale, bias = layer()
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact, slack = bound(x, weight, weight_scale, bias, dtype)
    whole = weight_only.linear(x, weight, weight_scale, bias)
    assert whole.dtype == dtype and whole.shape == (2, 3, 21)
    assert ((whole.double() - exact).abs() <= slack).all()

    # in blocks of four rows, and one that is left
    monkeypatch.setattr(weight_only, "_ELEMENTS", 4 * 300 + 1)
    parts = weight_only.linear(x, weight, weight_scale, bias)
    assert parts.shape == whole.shape and ((parts.double() - exact).abs() <= slack).all()
    without = weight_only.linear(x, weight, weight_scale, None)
    assert ((without.double() - (exact - bias.double())).abs() <= slack).all()


def test_sums_that_leave_float16_before_they_are_scaled_do_not():
    weight = torch.full((3, 1024), 127, dtype=torch.int8)
    x = torch.ones(1, 1024, dtype=torch.float16)
    # 1024 * 127 = 130048 is beyond 65504
    assert weight_only.linear(x, weight, torch.full((3, 1), 2.0**-10), None).tolist() == [[127.0] * 3]


def test_empty_inputs_and_layers_have_the_shapes_of_a_float_layer():
    weight, weight_scale, bias = layer(5, 7)
    assert weight_only.linear(torch.empty(0, 3, 7), weight, weight_scale, bias).shape == (0, 3, 5)
    assert weight_only.linear(torch.ones(2, 7), weight[:0], weight_scale[:0], bias[:0]).shape == (2, 0)
    assert torch.equal(
        weight_only.linear(torch.ones(2, 0), weight[:, :0], weight_scale, bias), bias.expand(2, -1)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_as_close_as_its_dtype_allows(dtype, groups):
    generator = torch.Generator().manual_seed(2)
    weight, weight_scale, bias = layer(6, 4 // groups * 6)
    x = torch.randn(2, 4, 7, 8, generator=generator).to(dtype)
    weight = weight.view(6, 3, 2, 4 // groups).movedim(-1, 1)
    geometry = ((2, 1), (1, 0), (1, 2), groups)
    found = weight_only.conv(x, weight, weight_scale, bias, *geometry)
    floats = weight.double() * weight_scale.double().view(-1, 1, 1, 1)
    exact = torch.nn.functional.conv2d(x.double(), floats, bias.double(), *geometry)
    mass = torch.nn.functional.conv2d(x.double().abs(), floats.abs(), bias.double().abs(), *geometry)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= mass * (torch.finfo(dtype).eps + 24 * 2.0**-23)).all()


def test_it_serves_where_nobody_names_a_scheme():
    assert weight_only.serves("mps", "auto", "auto")
    assert weight_only.serves(torch.device("mps", 0), "auto")
    assert not weight_only.serves("mps", "int8", "auto")
    assert not weight_only.serves("mps", "auto", "int12")
    assert not weight_only.serves("cpu", "auto")
    assert not weight_only.serves("cuda:1", "auto")
    assert weight_only.found() == (["mps"] if torch.backends.mps.is_available() else [])


class Operations(TorchDispatchMode):
    """Every operation that runs, and the dtypes of what it takes and gives."""

    def __init__(self):
        super().__init__()
        self.calls, self.dtypes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args))
        for value in (*args, *(kwargs or {}).values(), out):
            self.dtypes |= {value.dtype} if isinstance(value, torch.Tensor) else set()
        return out


def arithmetic():
    """Run everything that defines int8 arithmetic, with hostile numbers, and return what it is made of."""
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * torch.logspace(-40, 30, 5).view(
        -1, 1
    )
    x[1, 2] = float("nan")
    weight, weight_scale, bias = layer()
    image, kernel = torch.randn(1, 4, 5, 5).half(), weight[:, :36].view(21, 3, 3, 4).movedim(-1, 1)
    with Operations() as seen:
        for scheme in SCHEMES.values():
            for dtype in DTYPES:
                reference.linear(x.to(dtype), weight, weight_scale, bias, scheme)
        # more than fits in one exact block of fp32
        reference.int_matmul(weight[:, :1].expand(-1, 1100), weight[:, :1].expand(-1, 1100))
        weight_only.linear(x, weight, weight_scale, bias)
        paths.embedding(torch.tensor([0, 3]), weight, weight_scale, torch.float16)
        torch.nn.functional.unfold(image.float(), (3, 3), (1, 1), (1, 1), (2, 2))
        weight_only.conv(image, kernel, weight_scale, bias, (1, 1), (1, 1), (1, 1), 1)
    return seen


@pytest.fixture(scope="module")
def on_mps():
    """What torch says of each operation, from the file that its kernels are generated from."""
    torchgen = pytest.importorskip("torchgen.packaged")
    file = Path(torchgen.__path__[0]) / "ATen/native/native_functions.yaml"
    entries = {
        entry.partition("(")[0]: entry for entry in file.read_text(encoding="utf-8").split("\n- func: ")[1:]
    }

    def is_there(name):
        entry = entries[name]
        delegate = re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE)
        if delegate:
            return is_there(delegate[1])
        keys = re.findall(r"\w+", " ".join(re.findall(r"^    ([\w, ]+): ", entry, re.MULTILINE)))
        # without a dispatch of its own, or with a composite one, it is made of others
        return not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys)

    return is_there


def test_the_arithmetic_is_made_of_operations_that_mps_has_and_of_no_float64(on_mps):
    assert not on_mps("linalg_eig") and not on_mps("_int_mm") and on_mps("mm")
    seen = arithmetic()
    names = {
        func._schema.name.removeprefix("aten::") + f".{func._schema.overload_name}".rstrip(".")
        for func, _ in seen.calls
    }
    assert {"mm", "div.Tensor", "amax", "round_", "im2col"} <= names
    assert sorted(name for name in names if not on_mps(name)) == []
    assert torch.float64 not in seen.dtypes
    # integers are multiplied as floats
    assert all(
        a.is_floating_point() for func, args in seen.calls if func is torch.ops.aten.mm.default for a in args
    )
    assert torch.amp.is_autocast_available("mps")


def test_nothing_is_divided_by_a_number():
    # a GPU multiplies by its rounded reciprocal, and one scale in 25 is another
    seen = arithmetic()
    with seen:
        for dtype in (*DTYPES, torch.float64):
            for magnitude in (1e-42, 1.0, torch.finfo(torch.float16).max / 8):
                matrix = (torch.randn(3, 40, dtype=torch.float64) * magnitude).to(dtype)
                weights.quantize_rows(matrix)
                weights.quantize_rows(matrix, torch.bfloat16)
    inexact = {"reciprocal", "rsqrt", "exp2", "addcdiv", "div"}
    divisions = [(f, args) for f, args in seen.calls if f._schema.name.split("::")[1].rstrip("_") in inexact]
    assert len(divisions) > 40
    assert {func for func, _ in divisions} <= {torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor}
    # a tensor of no dimension is a number, too
    assert all(isinstance(b, torch.Tensor) and b.dim() for _, (_, b, *_) in divisions)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e30])
def test_sums_of_squares_without_float64_are_those_with_it(magnitude, monkeypatch):
    matrix = torch.randn(7, 129, generator=torch.Generator().manual_seed(6)) * magnitude
    matrix[3] *= 1e-6
    expected = weights.quantize_rows(matrix)
    monkeypatch.setattr(weights, "_WITHOUT_FLOAT64", {"cpu"})
    found = weights.quantize_rows(matrix)
    assert found.signal == pytest.approx(expected.signal, rel=1e-5)
    assert found.noise == pytest.approx(expected.noise, rel=1e-5)
    # what a report says
    assert round(found.sqnr_db, 3) == pytest.approx(round(expected.sqnr_db, 3), abs=1e-3)
